"""Fixtures that several test modules share: a made text, a tiny trained language model, and the
command line in a folder of its own.
"""

from __future__ import annotations

import os
import signal

# Before torch is imported: the tests are small, and other work shares the processors.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before Triton is: without a GPU its kernels run in its interpreter.
if not (os.path.exists("/dev/nvidiactl") or os.path.exists("/dev/dxg")):
    os.environ.setdefault("TRITON_INTERPRET", "1")

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support import removals
from support.common import Experiment, corpus_spec, english, lm_spec

# A shell starts what ends in `&` with SIGINT ignored, which the commands under test would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)
removals.refuse()  # before a library takes hold of warnings.warn


#: Files that take longest; a worker that began one last would keep the others waiting.
FIRST = (
    "test_golden.py",
    "test_experiment.py",
    "test_notebook.py",
    "test_loaded_saes.py",
    "test_workers.py",
    "test_source.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Longest files first: workers get whole files, in this order (`make test`)."""
    items.sort(key=lambda item: FIRST.index(name) if (name := item.path.name) in FIRST else 99)


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Steps on a CPU are recorded on tapes, which this lists."""
    from sae_experiments.training import recorded
    from support.tape import Tape

    monkeypatch.setitem(recorded.RECORDERS, "cpu", Tape)
    monkeypatch.setattr(Tape, "made", [])
    return Tape.made


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20,000 characters of made text."""
    path = tmp_path_factory.mktemp("corpus") / "made.txt"
    path.write_text(english(20_000))
    return path


@pytest.fixture(scope="session")
def corpus(corpus_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The made text as a CharCorpus."""
    from sae_experiments.corpora.corpus import load_corpus

    return load_corpus(
        corpus_spec(corpus_file),
        cache=tmp_path_factory.mktemp("corpora"),
        offline=True,
        say=lambda line: None,
    )


@pytest.fixture(scope="session")
def lm_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lms")


@pytest.fixture(scope="session")
def trained(corpus: Any, lm_cache: Path) -> Any:
    """A TrainedLM that has learned enough for an ablation to hurt (about a second)."""
    import torch

    from sae_experiments.models.gpt2 import train_lm
    from sae_experiments.training.loop import Session

    return train_lm(
        lm_spec(), corpus, {}, seed=0, cache=lm_cache, device=torch.device("cpu"), session=Session()
    )


@pytest.fixture(scope="session")
def make_experiment(
    tmp_path_factory: pytest.TempPathFactory, corpus_file: Path
) -> Callable[[str], Experiment]:
    """A function that makes an :class:`Experiment` in a new folder."""
    return lambda name: Experiment(tmp_path_factory.mktemp(name), corpus_file)


@pytest.fixture
def experiment(tmp_path: Path, corpus_file: Path) -> Experiment:
    return Experiment(tmp_path, corpus_file)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections that leave this machine are refused at once, whatever the machine can reach."""
    import socket

    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> Any:
        if isinstance(address, tuple) and not str(address[0]).startswith(
            ("127.", "localhost", "::1")
        ):
            raise ConnectionRefusedError(111, f"tests may not connect to {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)


_known: dict[Any, Any] = {}


@pytest.fixture
def quick_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """What costs a run in this process most of its first second is asked once: the state of
    git, the package's digest, compositions.
    """
    import copy

    from sae_experiments.config import compose as config
    from sae_experiments.runner import run
    from sae_experiments.sweeps import jobs as sweeps

    def once(owner: Any, name: str, key: Callable[..., Any]) -> None:
        plain = getattr(owner, name)

        def asked(*args: Any) -> Any:
            k = (name, key(*args))
            if k not in _known:
                _known[k] = plain(*args)
            return copy.deepcopy(_known[k])

        monkeypatch.setattr(owner, name, asked)

    once(run, "_git", lambda: None)
    once(run, "package_digest", str)
    once(sweeps, "package_digest", str)
    once(config, "_compose", tuple)

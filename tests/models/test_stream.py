"""Rows on disk, in memory and in a stream: the same rows, each used once an epoch, in bounded
memory, whatever is killed where.
"""

from __future__ import annotations

import itertools
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sae_experiments.config.compose import build, compose_checked
from sae_experiments.console import Console
from sae_experiments.errors import UserError
from sae_experiments.fitting.spec import FitSpec
from sae_experiments.models.hooks import Kept, Site
from sae_experiments.models.store import Source, Store, collect
from sae_experiments.models.stream import BATCHES, SMALLEST, Stream, Watch
from sae_experiments.studies.base import Context
from sae_experiments.studies.language.stores import Stores
from sae_experiments.training import loop
from sae_experiments.training.loop import Session
from support.common import CONF, train_config

SITE, LENGTH = Site("resid", 1), 16


def source(trained: Any, corpus: Any, dtype: str = "float16") -> Source:
    return Source(
        model=trained.model,
        tokens_of=lambda starts: corpus.windows("train", starts, LENGTH),
        length=LENGTH,
        split="train",
        key={"lm": 1},
        dtype=dtype,
        batch=8,
    )


def made_up(n: int, length: int, batch: int, chunk: int) -> Stream:
    """A stream whose rows are never collected."""
    empty: Any = SimpleNamespace(length=length, split="train")
    return Stream(empty, np.arange(n) * length, [SITE], chunk_rows=chunk, batch_rows=batch, kept={})


SIZES = [
    (n, length, batch, SMALLEST * batch * more)
    for n, (length, batch), more in itertools.product(
        (3, 777, 6001), ((16, 64), (24, 64), (7, 50), (64, 128)), (1, 3)
    )
    if n * length >= batch
]


@pytest.mark.parametrize(("n", "length", "batch", "chunk"), SIZES)
def test_an_epoch_uses_every_row_once(n: int, length: int, batch: int, chunk: int) -> None:
    """But for a remainder of less than a batch, of each chunk where no few batches are whole
    windows.
    """
    stream = made_up(n, length, batch, chunk)
    sizes = np.diff(stream.bounds) * length
    assert sizes.max() <= chunk and (len(sizes) == 1 or sizes.min() >= BATCHES * batch)
    steps = int((sizes // batch).sum())
    index = [stream.index_at(step, rows=batch, seed=3) for step in range(steps)]
    used = np.concatenate([part.rows for part in index])
    assert all(len(part.rows) == batch and (np.diff(part.rows) > 0).all() for part in index)
    assert len(np.unique(used)) == len(used) and used.max() < n * length
    whole = batch // math.gcd(batch, length) * length <= 8 * batch
    assert n * length - len(used) < batch * (1 if whole else len(sizes))
    later = stream.index_at(steps, rows=batch, seed=3)
    assert later.chunk[1] == 1 and not np.array_equal(later.rows, index[0].rows)


def test_a_batch_is_a_function_of_seed_and_step_alone() -> None:
    stream, order = made_up(4000, 16, 64, SMALLEST * 64), np.random.default_rng(0)
    expected = [
        made_up(4000, 16, 64, SMALLEST * 64).index_at(s, rows=64, seed=5) for s in range(1100)
    ]
    for step in order.permutation(1100).tolist():
        found = stream.index_at(step, rows=64, seed=5)
        assert found.chunk == expected[step].chunk
        assert np.array_equal(found.rows, expected[step].rows)
    assert not np.array_equal(stream.index_at(0, rows=64, seed=6).rows, expected[0].rows)


def test_rows_of_a_chunk_come_from_all_over_the_text() -> None:
    stream = made_up(20_000, 16, 64, SMALLEST * 64)
    windows = stream.index_at(0, rows=64, seed=0).rows // 16
    assert len(np.unique(windows)) > 55 and windows.max() - windows.min() > 15_000


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_streamed_rows_are_those_of_a_store(
    dtype: str, trained: Any, corpus: Any, tmp_path: Path
) -> None:
    """Bit for bit on one thread: the same windows in other forward passes, kept about the same
    centre.
    """
    sites = [SITE, Site("mlp_out", 2)]
    starts = np.arange(0, 1000 * LENGTH, LENGTH)
    disk = collect(source(trained, corpus, dtype), starts, sites, cache=tmp_path)
    memory = Store.in_memory(source(trained, corpus, dtype), starts, sites)
    stream = Stream(
        source(trained, corpus, dtype),
        starts,
        sites,
        chunk_rows=6400,
        batch_rows=40,
        kept=disk.kept,
    )
    assert len(stream.bounds) > 2
    for step in (0, 1, 170, 399, 500):
        index = stream.index_at(step, rows=40, seed=1)
        for where in (SITE, (SITE, Site("mlp_out", 2))):
            expected = disk.rows(where, index.rows)
            assert torch.equal(memory.rows(where, index.rows), expected)
            close = {"rtol": 0, "atol": 1e-6 if dtype == "float32" else 2e-3}
            torch.testing.assert_close(stream.rows(where, index), expected, **close)
            torch.testing.assert_close(stream.rows(where, index.rows), expected, **close)
    alone = stream.only([Site("mlp_out", 2)])
    assert torch.equal(
        alone.rows(Site("mlp_out", 2), index), stream.rows(Site("mlp_out", 2), index)
    )


def test_a_chunk_is_collected_once_for_all_of_its_batches(trained: Any, corpus: Any) -> None:
    asked: list[int] = []
    made = source(trained, corpus)
    tokens = made.tokens_of

    def counted(starts: np.ndarray) -> Tensor:
        asked.append(len(starts))
        return tokens(starts)

    made = Source(**(vars(made) | {"tokens_of": counted}))
    kept = {SITE: Kept(torch.zeros(16), 1.0)}
    starts = np.arange(0, 1000 * LENGTH, LENGTH)
    stream = Stream(made, starts, [SITE], chunk_rows=6400, batch_rows=40, kept=kept)
    for step in range(400):
        stream.rows(SITE, stream.index_at(step, rows=40, seed=1))
    assert sum(asked) == 1000


def test_memory_is_that_of_one_chunk_whatever_the_text(tmp_path: Path) -> None:
    """Peak of what NumPy allocates, which the arrays of activations are, against the size of
    the whole.
    """
    import tracemalloc

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

    def peak(n: int) -> int:
        made = source(SimpleNamespace(model=Model()), SimpleNamespace(windows=None))
        values = np.zeros((8 * LENGTH, 64), np.float16)
        stream = Stream(
            made, np.arange(n) * LENGTH, [SITE], chunk_rows=SMALLEST * 64, batch_rows=64, kept={}
        )

        def read(starts: np.ndarray, sites: Any, kept: Any) -> Any:
            for begin in range(0, len(starts), 8):
                end = min(begin + 8, len(starts))
                yield end, {SITE: values[: (end - begin) * LENGTH]}

        object.__setattr__(made, "read", read)
        tracemalloc.start()
        for step in range(0, n * LENGTH // 64, 50):
            stream.rows(SITE, stream.index_at(step, rows=64, seed=0))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    chunk = SMALLEST * 64 * 64 * 2
    small, large = peak(2_000), peak(16_000)
    assert large < 2 * chunk, "one chunk, with what shuffles it"
    assert large - small < 14_000 * 32, "beyond it only the order of the windows grows"


# ------------------------------------------------------------------------------------ in a study


def spec(**changes: Any) -> FitSpec:
    plain: dict[str, Any] = {
        "train_rows": 12_000,
        "calibration_rows": 320,
        "held_out_rows": 320,
        "init_rows": 64,
        "dead_after_frac": 0.1,
        "store_dtype": "float16",
        "collect_batch": 32,
        "train": train_config(batch_size=32),
    }
    return FitSpec(**(plain | changes))


def context(folder: Path) -> Context:
    return Context(
        folder=folder,
        cache=folder / "cache",
        device=torch.device("cpu"),
        console=Console(verbosity="quiet"),
    )


def stored(kind: str, trained: Any, corpus: Any, folder: Path, **changes: Any) -> Stores:
    return Stores(spec(store=kind, **changes), [SITE], corpus, trained, 0, context(folder))


def test_memory_and_disk_give_the_same_batches_and_fits(
    trained: Any, corpus: Any, tmp_path: Path
) -> None:
    disk, memory = (stored(k, trained, corpus, tmp_path / k) for k in ("disk", "memory"))
    for step in range(40):
        assert torch.equal(disk.batch_at(step, SITE, SITE).x, memory.batch_at(step, SITE, SITE).x)
    for one, other in zip(disk.sample(SITE, SITE), memory.sample(SITE, SITE), strict=True):
        assert torch.equal(one, other)
    assert disk.identity(SITE, SITE) == memory.identity(SITE, SITE), "their fits are the same"
    assert not (tmp_path / "memory" / "cache" / "stores").exists()
    stream = stored("stream", trained, corpus, tmp_path / "stream")
    assert stream.identity(SITE, SITE) != disk.identity(SITE, SITE)
    assert not (tmp_path / "stream" / "cache" / "stores").exists()


@pytest.mark.parametrize("free", ["much", "little", "little, but made before"])
def test_auto_streams_where_the_disk_is_too_small(
    free: str, trained: Any, corpus: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "before" in free:
        stored("disk", trained, corpus, tmp_path)
    rows = 12_000 + 320 + 320
    asked = rows * 16 * 2
    space = asked * 4 if free == "much" else asked * 1.5
    usage = SimpleNamespace(free=space)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    expected = "stream" if free == "little" else "disk"
    assert stored("auto", trained, corpus, tmp_path).kind == expected
    assert stored("auto", trained, corpus, tmp_path / "b", disk_share=0.9).kind == (
        "disk" if free == "much" or 0.9 * space > asked else "stream"
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"store": "tape"}, "fit.store='tape' is not one of auto, disk, memory, stream"),
        ({"stream_rows": 64 * 32}, "fit.stream_rows=2048 must be at least 5120, 160 batches"),
        ({"disk_share": 0}, "fit.disk_share=0 must lie in"),
    ],
)
def test_what_cannot_be_is_one_line(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        spec(**change)


def small(corpus_file: Path, *args: str) -> Any:
    """A study that fits one SAE for 400 steps to 9,000 rows of a made text."""
    plain = [
        "preset=smoke",
        "data=[text8]",
        f"data.text8.file={corpus_file}",
        "data.text8.head=null",
        "lm.n_embd=16",
        "lm.n_positions=16",
        "lm.train.steps=40",
        "lm.samples=0",
        "fit.train_rows=12000",
        "fit.init_rows=512",
        "fit.train.steps=400",
        "fit.train.batch_size=32",
        "fit.train.log_every=50",
        "sae.target_l0=4",
        "metric=[reconstruction]",
    ]
    sae = [] if any(arg.startswith("sae=") for arg in args) else ["sae=batch_topk"]
    return build(compose_checked(CONF, [*plain, *sae, *args])[0].study)


class Killed(BaseException):
    """Ends a process wherever it is."""


def weights_of(study: Any, folder: Path) -> dict[str, Tensor]:
    """The weights of the fitted SAE."""
    ctx = context(folder)
    study.prepare(ctx)
    study.run(study.cells()[0], ctx)
    (fitted,) = (ctx.cache / "fits").glob("*/sae.safetensors")
    from safetensors.torch import load_file

    return load_file(fitted)


def fvu_of(study: Any, folder: Path) -> tuple[float, str]:
    ctx = context(folder)
    study.prepare(ctx)
    (outcome,) = study.run(study.cells()[0], ctx).values()
    return outcome.metrics["sae_fvu"], outcome.facts["rows"]


def test_a_stream_of_one_chunk_trains_to_the_same_quality(
    corpus_file: Path, tmp_path: Path
) -> None:
    (disk, on_disk), (stream, streamed) = (
        fvu_of(
            small(corpus_file, f"fit.store={kind}", "fit.stream_rows=20000", "fit.train.steps=800"),
            tmp_path / kind,
        )
        for kind in ("disk", "stream")
    )
    assert (on_disk, streamed) == ("disk", "stream")
    assert stream == pytest.approx(disk, rel=0.05)


def test_a_fit_killed_in_a_chunk_goes_on_with_the_same_bits(
    corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = small(corpus_file, "fit.store=stream", "fit.train.checkpoint_every_s=0")
    whole = weights_of(study, tmp_path / "whole")
    leave, steps = loop.leave, itertools.count()

    def killed() -> None:
        if training_sae[0] and next(steps) == 233:
            raise Killed
        leave()

    training_sae = [False]
    fit = type(study)._fit

    def marked(*args: Any, **kwargs: Any) -> Any:
        training_sae[0] = True
        return fit(*args, **kwargs)

    monkeypatch.setattr(type(study), "_fit", marked)
    monkeypatch.setattr(loop, "leave", killed)
    with pytest.raises(Killed):
        weights_of(study, tmp_path / "cut")
    assert next(steps) == 234
    monkeypatch.setattr(loop, "leave", leave)
    again = weights_of(study, tmp_path / "cut")
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_a_run_says_in_its_manifest_where_its_rows_were(experiment: Any) -> None:
    made = experiment("out_dir=run", "sae=batch_topk", "fit.store=stream", "metric=[downstream]")
    assert made.returncode == 0, made.stderr
    assert experiment.json("run", "manifest.json")["rows"] == "stream"


@pytest.mark.parametrize(
    "args",
    [
        ["sae=end_to_end"],
        ["sae=purified", "sae.model.noise=token"],
        ["sae=crosscoder", "sae.read=[resid.1,resid.2]"],
    ],
)
def test_windows_second_views_and_several_sites_can_be_streamed(
    args: list[str], corpus_file: Path, tmp_path: Path
) -> None:
    own = [*args, "fit.store=stream", "fit.train.steps=6", "lm.n_layer=2", "metric=[sparsity]"]
    study, ctx = small(corpus_file, *own), context(tmp_path)
    study.prepare(ctx)
    (outcome,) = study.run(study.cells()[0], ctx).values()
    assert outcome.facts["rows"] == "stream" and outcome.metrics["sae_l0"] > 0


# ------------------------------------------------------------- while a chunk is collected


class Slow:
    """Replaces `Source.read`: reading a window takes a while, and its rows are its number."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.length, self.split = seconds, LENGTH, "train"

    def read(self, starts: np.ndarray, sites: Any, kept: Any) -> Any:
        for i, start in enumerate(starts):
            time.sleep(self.seconds)
            yield i + 1, {SITE: np.full((LENGTH, 4), start, np.float16)}


def slow_stream(seconds: float, watch: Watch) -> tuple[Stream, int]:
    """A stream of three chunks, and the batches of the first."""
    source: Any = Slow(seconds)
    rows = SMALLEST * 2
    stream = Stream(
        source,
        np.arange(3 * rows // LENGTH - 8) * LENGTH,
        [SITE],
        chunk_rows=rows,
        batch_rows=2,
        kept={},
        watch=watch,
    )
    assert len(stream.bounds) > 2
    return stream, int(stream.bounds[1]) * LENGTH // 2


class Counting(loop.Learner):
    """A learner of one parameter that counts its steps."""

    def __init__(self) -> None:
        module = nn.Linear(4, 1)
        super().__init__("counting", module, train_config(steps=400, log_every=1000), seed=0)

    def loss(self, batch: Tensor, info: Any) -> Any:
        return loop.Loss(self.module(batch).square().mean(), {})


def test_the_deadline_ends_a_fit_in_the_middle_of_a_chunk() -> None:
    stages: list[str] = []
    ticks: list[tuple[int, int]] = []

    session = Session()

    @contextmanager
    def stage(name: str) -> Iterator[Any]:
        if stages:
            session.deadline = time.monotonic() + 0.05
        stages.append(name)
        yield lambda done, total: ticks.append((done, total))

    watch = Watch(stage)
    stream, first = slow_stream(0.02, watch)
    n = len(stream.bounds) - 1

    def batch_at(step: int) -> Tensor:
        return stream.rows(SITE, stream.index_at(step, rows=2, seed=0))

    batch_at(0)
    assert stages == [f"collect chunk 1 of {n}"]
    assert ticks == [(i + 1, int(stream.bounds[1])) for i in range(stream.bounds[1])]
    watch.check = session.check
    learner = Counting()
    progress = loop.train([learner], batch_at, learner.cfg, session)
    assert progress.cut and progress.step == first, "every step of the first chunk was made"
    assert stages[-1] == f"collect chunk 2 of {n}" and ticks[-1][0] < ticks[-1][1]


def test_before_the_first_step_no_deadline_ends_a_chunk() -> None:
    watch = Watch()
    stream, _ = slow_stream(0.0, watch)
    session = Session(deadline=time.monotonic() - 1)
    watch.check = session.check
    learner = Counting()
    index = stream.index_at
    progress = loop.train(
        [learner], lambda step: stream.rows(SITE, index(step, rows=2, seed=0)), learner.cfg, session
    )
    assert progress.cut and progress.step == 1

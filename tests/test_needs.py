"""What work will need is said before it begins: what cannot fit is refused in one line, what is
ordinary is not mentioned.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_experiments import resources as needs
from sae_experiments.config.compose import build, compose_checked
from sae_experiments.console import Console
from sae_experiments.errors import UserError
from sae_experiments.models.gpt2 import build_lm, training_need
from sae_experiments.resources import Need, announce, free_memory, in_bytes, in_time, speed
from sae_experiments.studies.base import Context
from sae_experiments.studies.ground_truth.world import World
from sae_experiments.studies.superposition import toy
from support.common import CONF, ROOT, Experiment, lm_spec, train_config
from support.planted import recipe

CPU, GB = torch.device("cpu"), 1e9


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """One with 16 GB free and 100 GFLOP/s."""
    monkeypatch.setattr(needs, "free_memory", lambda device: 16 * GB)
    monkeypatch.setattr(needs, "speed", lambda device: 1e11)


def said(*overrides: str, folder: Path = Path()) -> list[str]:
    """What a study says of its needs."""
    study, lines = build(compose_checked(CONF, list(overrides))[0].study), []
    console = Console()
    console.say = lambda line, always=False: lines.append(line)  # type: ignore[method-assign]
    study.check()
    getattr(study, "fits", study).announce(
        Context(folder=folder, cache=folder, device=CPU, console=console)
    )
    return lines


STUDIES = ["language", "circuits", "ground_truth", "superposition"]
WIDE = [
    (["preset=laptop", "lm.n_positions=100000"], "lm.n_positions=100000"),
    (
        ["preset=laptop", "lm.n_positions=100000", "lm.precision=fp32", "lm.train.batch_size=64"],
        "lm.train.batch_size=64",
    ),
    (["preset=full", "lm.n_positions=20000", "device=cpu"], "lm.n_positions=20000"),
    (
        ["preset=laptop", "lm.n_positions=4000", "lm.train.batch_size=1", "fit.collect_batch=3000"],
        "fit.collect_batch=3000",
    ),
    (["study=ground_truth", "study.world.features=100000"], "study.world.features=100000"),
    (["study=ground_truth", "study.held_out_rows=3000000"], "study.held_out_rows=3000000"),
    (["study=superposition", "study.depths=[15]", "study.probe.depth=15"], "study.depths=15"),
]


@pytest.mark.parametrize(("overrides", "key"), WIDE)
def test_what_cannot_fit_is_refused_in_one_line_that_names_key_need_and_fix(
    overrides: Sequence[str], key: str
) -> None:
    with pytest.raises(
        UserError,
        match=r"needs about .* of memory \(.*\), and 16 GB are free: use fewer|use smaller",
    ) as told:
        said(*overrides)
    assert key in str(told.value) and "\n" not in str(told.value) and told.value.exit_status == 2


@pytest.mark.parametrize("study", STUDIES)
@pytest.mark.parametrize("preset", ["smoke", "laptop"])
def test_ordinary_runs_say_nothing(study: str, preset: str) -> None:
    assert said(f"study={study}", f"preset={preset}") == []


def test_a_long_run_says_how_long_at_least() -> None:
    (line,) = said("preset=laptop", "lm.n_positions=10000", "lm.precision=fp32", "data=[text8]")
    assert (
        "lm.n_positions=10000" in line
        and "of the 16 GB that are free" in line
        and "at least 14 hours" in line
    )
    work = training_need(lm_spec(n_positions=64), train_config(steps=7, batch_size=3), 65, CPU).work
    assert work == 7 * 6 * 3 * 64 * (12 * 3 * 16**2 + 65 * 16 + 3 * 16 * 64)


def test_a_wide_world_says_how_long_drawing_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    few = [
        "study=ground_truth",
        "study.world.features=3000",
        "study.world.width=8",
        "study.train.batch_size=64",
        "sae.d_sae=16",
    ]
    (line,) = said(
        *few, "study.train.steps=100000000", "study.held_out_rows=64", "study.calibration_rows=64"
    )
    assert (
        "study.world.features=3000" in line
        and "at least" in line
        and ("hours" in line or "days" in line)
    )


def test_nothing_is_built_before_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_tree", "_blocks"):
        monkeypatch.setattr(
            f"sae_experiments.studies.superposition.trees.{name}", lambda *a: pytest.fail("built")
        )
    monkeypatch.setattr(
        "sae_experiments.studies.ground_truth.study.World", lambda *a: pytest.fail("built")
    )
    for overrides, _ in WIDE[4:]:
        with pytest.raises(UserError):
            said(*overrides)


def test_the_command_leaves_no_run_folder(experiment: Experiment) -> None:
    done = experiment("--out_dir=wide", "lm.n_positions=40000000")
    assert (
        done.returncode == 2
        and "lm.n_positions=40000000" in done.stderr
        and len(done.stderr.splitlines()) == 1
    )
    assert not (experiment.runs / "wide").exists()


@pytest.mark.parametrize(
    ("memory", "seconds", "told"),
    [(3, None, 0), (3, 60.0, 0), (5, None, 1), (3, 7200.0, 1), (16, None, 1)],
)
def test_only_what_is_notable_is_told(memory: float, seconds: float | None, told: int) -> None:
    lines: list[str] = []
    announce(
        "work",
        Need({"all": memory * GB}, seconds=seconds),
        "use less",
        device=CPU,
        say=lines.append,
    )
    assert len(lines) == told and all(("2 hours" in line) == (seconds == 7200) for line in lines)


def test_a_machine_that_does_not_say_what_is_free_refuses_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(needs, "free_memory", lambda device: None)
    announce("work", Need({"all": 1e15}), "use less", device=CPU, say=lambda line: None)


def test_free_memory_is_the_least_of_what_the_system_and_the_group_leave(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.undo()
    found = free_memory(CPU)
    assert found is None or 1e6 < found < 1e14
    limit, used = tmp_path / "max", tmp_path / "current"
    used.write_text("1000000\n")
    monkeypatch.setattr(
        needs, "GROUPS", ((str(limit), str(used)), (str(tmp_path / "none"), str(used)))
    )
    for text, left in (("3000000\n", 2e6), ("max\n", None), ("500000\n", 0.0)):
        limit.write_text(text)
        now = free_memory(CPU)
        if found is None:
            assert now is None
        elif left is None:  # the system's own number, which moves from one moment to the next
            assert now is not None and now > 1e7
        else:
            assert now == left
    assert speed(CPU, 128) > 1e6


def test_numbers_are_told_in_words() -> None:
    assert [in_bytes(v) for v in (3e6, 1.24e9, 66.1e9, 955e9, 2.5e12)] == [
        "3 MB",
        "1.2 GB",
        "66 GB",
        "955 GB",
        "2.5 TB",
    ]
    assert [in_time(v) for v in (1900, 5400, 3 * 3600, 51 * 86400)] == [
        "32 minutes",
        "2 hours",
        "3 hours",
        "51 days",
    ]


# ------------------------------------------------------------------------------------------------
# what is really needed


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def peak(code: str) -> float:
    """Bytes by which the memory of a fresh process grows at most while it runs ``work()``,
    which ``code`` defines.
    """
    measure = (
        "import os\nbefore = int(open('/proc/self/statm').read().split()[1]) *"
        " os.sysconf('SC_PAGE_SIZE')\nwork()\n"
    )
    print_it = "from sae_experiments.memory import peak_memory\nprint(peak_memory() - before)\n"
    paths = f"import sys\nsys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
    done = subprocess.run(
        [sys.executable, "-c", paths + code + measure + print_it],
        check=True,
        capture_output=True,
        text=True,
    )
    return float(done.stdout)


@linux
def test_the_peak_of_a_process_is_its_own_and_not_that_of_what_started_it() -> None:
    code = """
import subprocess, sys
large = bytearray(700_000_000)
for i in range(0, len(large), 4096):
    large[i] = 1
child = "from sae_experiments.memory import peak_memory; print(peak_memory())"
print(subprocess.run([sys.executable, "-c", child], capture_output=True, text=True).stdout)
from sae_experiments.memory import peak_memory
print(peak_memory())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT
    )
    of_child, own = map(float, done.stdout.split())
    assert 1e6 < of_child < 7e8 < own < 2e9


LM = """
import torch
from support.common import lm_spec, train_config
from sae_experiments.models.gpt2 import LMLearner, build_lm
from sae_experiments.training.loop import Session, train
spec = lm_spec(
    n_layer=3, n_embd=64, n_positions={n}, precision={precision!r}, dropout={dropout}
)
cfg = train_config(steps=1, batch_size=8, eval_every=9)
learner = LMLearner(build_lm(spec, 65, seed=0), None, spec, cfg, seed=0)
learner.evaluate = lambda step: {{}}
x = torch.zeros(8, {n}, dtype=torch.int64)
def work():
    train([learner], lambda step: (x, x), cfg, Session())
"""


@pytest.mark.slow
@linux
@pytest.mark.parametrize(
    ("n", "precision", "dropout"),
    [
        (2048, "fp32", 0.0),
        (2048, "bf16", 0.0),
        (2048, "fp32", 0.2),
        (2048, "bf16", 0.2),
        (4096, "fp32", 0.0),
    ],
)
def test_training_needs_about_what_is_foretold(n: int, precision: str, dropout: float) -> None:
    spec, cfg = (
        lm_spec(n_layer=3, n_embd=64, n_positions=n, precision=precision, dropout=dropout),
        train_config(steps=1, batch_size=8),
    )
    foretold = sum(training_need(spec, cfg, 65, CPU).memory.values())
    assert (
        0.5 * foretold < peak(LM.format(n=n, precision=precision, dropout=dropout)) < 1.6 * foretold
    )
    assert sum(p.numel() for p in build_lm(spec, 65, seed=0).parameters()) * 16 == pytest.approx(
        training_need(spec, cfg, 65, CPU).memory["weights and optimiser"], rel=0.05
    )


@pytest.mark.slow
@linux
def test_a_world_needs_about_what_is_foretold() -> None:
    code = (
        "import torch\nfrom support.planted import recipe\nfrom"
        " sae_experiments.studies.ground_truth.world import World\n"
    )
    code += (
        "world = World(recipe(features=20000, width=64), 0, torch.device('cpu'))\ndef work():\n   "
        " world.rows(world.acts(2048, 1), 2)\n"
    )
    foretold = sum(recipe(features=20000, width=64).memory(2048).values())
    assert 0.7 * foretold < peak(code) < 1.3 * foretold


TOY = """
import torch
from sae_experiments.config.compose import build, compose_checked
from sae_experiments.studies.superposition import toy
from sae_experiments.training.loop import Session, train
from support.common import CONF
study = build(compose_checked(CONF, {overrides})[0].study)
features = study.families[{family!r}]
def work():
    made = toy.make(
        study.shapes(features),
        features,
        study.train,
        instances=5,
        init=study.init,
        seed=0,
        device=torch.device("cpu"),
    )
    train([made], made.batch_at, study.train, Session())
    made.final(study.eval_rows)
"""


@pytest.mark.slow
@linux
@pytest.mark.parametrize(
    ("family", "depth", "rows"),
    [("control", 10, 32768), ("early_stopping", 11, 8192), ("exclusive", 12, 2048)],
)
def test_toy_models_need_about_what_is_foretold(family: str, depth: int, rows: int) -> None:
    overrides = [
        "study=superposition",
        "preset=smoke",
        f"study.depths=[{depth}]",
        "study.hidden=[4,10]",
        "study.train.steps=2",
    ]
    overrides += [f"study.eval_rows={rows}", f"study.probe.depth={depth}"]
    study: Any = build(compose_checked(CONF, overrides)[0].study)
    features = study.families[family]
    foretold = toy.memory(
        study.shapes(features), features, instances=5, batch=study.train.batch_size, eval_rows=rows
    )
    assert 0.5 < peak(TOY.format(overrides=overrides, family=family)) / sum(foretold.values()) < 2


def test_children_are_those_of_the_structure() -> None:
    world = World(recipe(), 0, CPU)
    for parent, children in zip(world.inner(), world.children.tolist(), strict=True):
        assert children == [c for c, p in enumerate(world.structure.parent) if p == parent]

"""Automated callers, played through: ``python experiment.py --out_dir=run_i`` and nothing else,
in every way that it can end.

They read ``final_info.json`` and take ``["means"]`` of every top-level value; on failure they
see the last 1,500 characters of stderr.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from support.common import ROOT, TINY, Experiment

pytestmark = pytest.mark.slow


class Answer(NamedTuple):
    """What such a caller knows after a run: its exit status, the means it read (None: there
    were none), the end of stderr, the pictures.
    """

    status: int | None
    means: dict[str, dict[str, Any]] | None
    tail: str
    pictures: list[str]


class Caller:
    """Copies the repository, edits the two scripts it may edit, runs with a time limit of its
    own, and removes what failed.
    """

    def __init__(self, home: Path, corpus: Path, experiment: Experiment) -> None:
        self.home, self.experiment = home, experiment
        shutil.copytree(
            ROOT,
            home,
            ignore=shutil.ignore_patterns(".*", "runs", "__pycache__", "tests", "*.egg-info"),
        )
        self.small = [
            *(o for o in TINY.split() if o != "report=false"),
            "data=[text8]",
            f"data.text8.file={corpus}",
            "data.text8.head=null",
        ]
        self.small += ["runs_root=.", "metric=[reconstruction,sparsity,downstream]"]
        self.edit()

    def edit(self, *overrides: str) -> None:
        """Rewrite OVERRIDES in experiment.py."""
        path = self.home / "experiment.py"
        kept = [line for line in path.read_text().splitlines() if not line.startswith("OVERRIDES")]
        at = next(i for i, line in enumerate(kept) if line.startswith("PLAN"))
        path.write_text(
            "\n".join(
                [*kept[: at + 1], f"OVERRIDES = {[*self.small, *overrides]!r}", *kept[at + 1 :]]
            )
            + "\n"
        )

    def __call__(self, run: str, limit_s: float = 120) -> Answer:
        try:
            done = subprocess.run(
                [sys.executable, "experiment.py", f"--out_dir={run}"],
                cwd=self.home,
                env=self.environment(),
                capture_output=True,
                text=True,
                timeout=limit_s,
            )
        except subprocess.TimeoutExpired:  # SIGKILL
            shutil.rmtree(self.home / run, ignore_errors=True)
            return Answer(None, None, "", [])
        folder = self.home / run
        means = None
        if done.returncode == 0:
            final = json.loads(
                (folder / "final_info.json").read_text(),
                parse_constant=lambda c: pytest.fail(f"{c} is not JSON"),
            )
            means = {dataset: entry["means"] for dataset, entry in final.items()}
        else:
            shutil.rmtree(folder, ignore_errors=True)
        return Answer(done.returncode, means, done.stderr[-1500:], [])

    def plot(self) -> list[str]:
        done = subprocess.run(
            [sys.executable, "plot.py"],
            cwd=self.home,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return sorted(p.name for p in self.home.glob("*.png"))

    def environment(self) -> dict[str, str]:
        return self.experiment.environment() | {"PYTHONPATH": str(self.home)}


@pytest.fixture(scope="module")
def caller(
    tmp_path_factory: pytest.TempPathFactory,
    corpus_file: Path,
    make_experiment: Callable[[str], Experiment],
) -> Caller:
    return Caller(
        tmp_path_factory.mktemp("caller") / "repository", corpus_file, make_experiment("contract")
    )


def test_a_baseline_and_a_planned_run_give_means_of_every_dataset_and_pictures(caller):
    for run in ("run_0", "run_1"):
        answer = caller(run)
        assert answer.status == 0 and answer.tail == "" and answer.means is not None
        assert set(answer.means) == {"text8"} and all(
            v is None or isinstance(v, float) for v in answer.means["text8"].values()
        )
        assert {
            "final_train_loss_mean",
            "best_val_loss_mean",
            "total_train_time_mean",
            "avg_inference_tokens_per_second_mean",
        } <= set(answer.means["text8"])
    assert caller.plot(), "pictures lie in the folder of the scripts"


def test_a_run_that_diverges_says_so_in_what_the_caller_sees_and_the_next_try_works(caller):
    caller.edit("fit.train.lr=1e30")
    answer = caller("run_2")
    assert answer.status == 1 and answer.means is None
    assert (
        "not finite at step" in answer.tail.splitlines()[-1]
        and "lr=" in answer.tail
        and "Traceback" not in answer.tail
    )
    caller.edit()
    assert caller("run_2").status == 0


def test_a_typo_is_named_with_the_nearest_key(caller):
    caller.edit("sae.taget_l0=4")
    answer = caller("run_3")
    assert (
        answer.status == 2
        and "did you mean sae.target_l0" in answer.tail
        and not (caller.home / "run_3").exists()
    )
    caller.edit("sae=nosuch")
    assert "choose from" in caller("run_3").tail
    caller.edit()


def test_a_syntax_error_in_a_script_is_the_last_thing_said(caller):
    path = caller.home / "experiment.py"
    whole = path.read_text()
    path.write_text(whole.replace("OVERRIDES = [", "OVERRIDES = [["))
    assert "SyntaxError" in caller("run_3").tail
    path.write_text(whole)


def test_a_slow_run_that_knows_the_limit_ends_before_it_with_results(caller):
    caller.edit(
        "lm.train.steps=1000000", "fit.train.steps=1000000", "seeds=[0,1]", "time_limit_s=15"
    )
    answer = caller("run_4", limit_s=60)
    assert (
        answer.status == 0
        and answer.means is not None
        and answer.means["text8"]["best_val_loss_mean"] is not None
    )
    assert json.loads((caller.home / "run_4" / "manifest.json").read_text())["status"] == "cut"


def test_a_slow_run_that_is_killed_loses_its_folder_and_no_training(caller):
    """The caller removes the run folder; checkpoints lie in the cache, so the next try goes on."""
    caller.edit("lm.train.steps=1500", "lm.train.checkpoint_every_s=0.1")
    assert caller("run_5", limit_s=8) == Answer(None, None, "", [])
    checkpoints = list(caller.experiment.cache.glob("lms/*/checkpoint.safetensors"))
    assert checkpoints and not (caller.home / "run_5").exists()
    caller.edit("lm.train.steps=1500", "lm.train.checkpoint_every_s=0.1")
    answer = caller("run_5", limit_s=300)
    assert answer.status == 0, answer.tail


def test_what_failed_left_nothing_that_spoils_the_pictures(caller):
    caller.edit()
    (caller.home / "run_9").mkdir(exist_ok=True)
    (caller.home / "run_9" / "final_info.json").write_text("{")
    assert caller.plot()

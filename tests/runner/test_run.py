"""A run folder with a made-up study: what is skipped, refused, kept, and told, whatever happens
to a cell or a tracker.
"""

from __future__ import annotations

import functools
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sae_experiments.errors import NonFinite, UserError
from sae_experiments.files import read_json
from sae_experiments.metric_info import SelfDescribed, info
from sae_experiments.metrics.base import Measured
from sae_experiments.results.records import load_arrays, read_curves, read_records
from sae_experiments.runner import run as run_module
from sae_experiments.runner.run import RunFailed, run
from sae_experiments.runner.track import MODES, NoTracker, Wandb
from sae_experiments.stopping import limited
from sae_experiments.studies.base import Cell, Context, Outcome
from support.fake_runner import Fake, final, go, manifest, outcome, settings

_git, _package_digest = functools.cache(run_module._git), functools.cache(run_module.package_digest)


@pytest.fixture(autouse=True)
def asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Git and the digest of the package answer what they answer, but only the first run pays
    for it.
    """
    monkeypatch.setattr(run_module, "_git", _git)
    monkeypatch.setattr(run_module, "package_digest", _package_digest)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "r"


def fail_at(dataset: str, seed: int, error: BaseException) -> Callable[[Cell, Context], None]:
    def act(cell: Cell, ctx: Context) -> None:
        if (cell.dataset, cell.seed) == (dataset, seed):
            raise error

    return act


# ------------------------------------------------------------------------------------------------
# mistakes that are found late


def raised(name: str, study: Fake) -> Fake:
    """The study, in which a mistake of the user is found at the stage ``name``."""

    def fail(*args: Any) -> Any:
        raise UserError(f"found at {name}")

    setattr(study, name, fail)
    return study


@pytest.mark.parametrize("stage", ["check", "prepare", "infos", "cells", "run"])
@pytest.mark.parametrize("before", ["nothing", "the folder above", "an empty folder"])
def test_a_mistake_leaves_no_run_folder_whatever_stage_finds_it(tmp_path, stage, before):
    folder = tmp_path / "runs" / "a" / "r"
    if before != "nothing":
        (folder if before == "an empty folder" else folder.parent).mkdir(parents=True)
    left = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=f"found at {stage}") as caught:
        go(raised(stage, Fake()), folder)
    assert caught.value.exit_status == 2
    assert sorted(tmp_path.rglob("*")) == left


def test_a_mistake_that_is_found_after_results_is_a_failure_and_keeps_them(folder):
    with pytest.raises(RunFailed, match="too short") as caught:
        go(Fake(act=fail_at("a", 1, UserError("the text is too short"))), folder)
    assert caught.value.exit_status == 1 and manifest(folder)["status"] == "failed"
    assert {(r.dataset, r.seed) for r in read_records(folder)} == {("a", 0), ("b", 0)}


def test_what_lay_in_the_folder_before_stays_there(folder):
    folder.mkdir(parents=True)
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="found at run"):
        go(raised("run", Fake()), folder)
    assert (folder / "mine.txt").read_text() == "mine"


def test_a_mistake_does_not_take_the_folder_of_a_run_that_goes_on(folder):
    """Two processes that make one folder at once: the one that must not have it leaves it to
    the other.
    """

    def meanwhile(cell: Cell, ctx: Context) -> None:
        with pytest.raises(UserError, match="in use") as caught:
            go(Fake(), folder)
        assert caught.value.exit_status == 2 and (folder / "manifest.json").exists()

    assert go(Fake(act=meanwhile), folder) == "done"


# ------------------------------------------------------------------------------------------------
# what a run leaves behind


def test_a_run_leaves_manifest_records_curves_arrays_and_final_info(folder):
    assert go(Fake(), folder) == "done"
    assert final(folder)["a"] == {
        "means": {"loss_mean": 1.5},
        "more_means": {"nothing_mean": None},
        "stderrs": {"loss_stderr": 0.5, "nothing_stderr": None},
        "final_info_dict": {"loss": [1.0, 2.0], "nothing": [None, None]},
    }
    assert set(final(folder)) == {"a", "b"}
    assert read_json(folder / "final_info_b_1.json") == {"loss": 2.0, "nothing": None}
    (record,) = [r for r in read_records(folder) if (r.dataset, r.seed) == ("b", 1)]
    assert (
        record.why_null == {"nothing": "there is nothing"}
        and record.seconds["fit"] == 0.5
        and "cell" in record.seconds
    )
    assert read_curves(folder, "a", 0) == [(0, "lm/loss", 2.0), (1, "lm/loss", 1.0)]
    assert np.array_equal(load_arrays(folder, "a", 1)["x"], np.arange(3))


def test_the_manifest_says_what_was_run_by_what_and_how_it_ended(folder):
    go(Fake(), folder)
    found = manifest(folder)
    assert (
        found["status"] == "done"
        and found["label"] == "fake"
        and found["preset"] == "smoke"
        and found["argv"] == ["--out_dir=r"]
    )
    assert (
        found["config"]["sae"] == {"k": 32, "name": "topk"}
        and found["corpora"]["a"]["corpus"] == "a"
    )
    assert (
        found["metrics"]["loss"]["better"] == "down"
        and found["versions"]["torch"]
        and found["device"]
    )
    assert {
        "git",
        "overrides",
        "preset_reason",
        "config_hash",
        "source_hash",
        "started",
        "ended",
    } <= set(found)
    assert "cause" not in found
    assert {r.config_hash for r in read_records(folder)} == {found["config_hash"]}


def test_the_manifest_says_running_while_it_runs(folder):
    seen = []
    go(Fake(act=lambda cell, ctx: seen.append(manifest(folder)["status"])), folder)
    assert set(seen) == {"running"}


def test_everything_of_a_cell_is_on_disk_before_the_next_begins(folder):
    def act(cell: Cell, ctx: Context) -> None:
        before = study.ran[:-1]
        assert [(r.dataset, r.seed) for r in read_records(folder)] == sorted(before)
        for dataset, seed in before:
            assert read_curves(folder, dataset, seed) and load_arrays(folder, dataset, seed)
            assert (folder / f"final_info_{dataset}_{seed}.json").exists()
        if before:
            assert sum(len(v["final_info_dict"]["loss"]) for v in final(folder).values()) == len(
                before
            )

    study = Fake(act=act)
    assert go(study, folder) == "done"


def test_what_is_logged_is_on_disk_at_once(folder):
    def act(cell: Cell, ctx: Context) -> None:
        ctx.log(7, {"lm/train_loss": 3.0})
        assert (7, "lm/train_loss", 3.0) in read_curves(folder, cell.dataset, cell.seed)

    assert go(Fake(act=act), folder) == "done"


def test_several_reports_of_a_cell_are_kept_apart(folder):
    study = Fake(datasets=("a",))
    study.saes = (".topk", ".gated")
    go(study, folder)
    assert set(final(folder)) == {"a.topk", "a.gated"}
    assert len(read_records(folder)) == 4
    again = Fake(datasets=("a",))
    again.saes = study.saes
    go(again, folder)
    assert not again.ran


def test_a_metric_that_is_not_finite_becomes_null_and_the_run_is_done(folder):
    study = Fake(
        act=lambda cell, ctx: {
            r: outcome(0, metrics={"loss": float("nan"), "x": float("inf"), "y": 1.0})
            for r in cell.reports
        }
    )
    assert go(study, folder) == "done"
    assert final(folder)["a"]["final_info_dict"] == {
        "loss": [None, None],
        "x": [None, None],
        "y": [1.0, 1.0],
    }


# ------------------------------------------------------------------------------------------------
# running again


def test_finished_cells_are_skipped_and_their_files_untouched(folder, capsys):
    go(Fake(), folder)
    kept = {
        p: (p.read_bytes(), p.stat().st_mtime_ns)
        for d in ("cells", "curves", "arrays")
        for p in (folder / d).iterdir()
    }
    before, again = final(folder), Fake()
    capsys.readouterr()
    assert go(again, folder) == "done"
    assert again.ran == [] and final(folder) == before
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in kept} == kept
    assert capsys.readouterr().out.count("already done") == 4


def test_only_what_is_missing_or_damaged_is_run_again(folder):
    go(Fake(), folder)
    before = final(folder)
    (folder / "cells" / "a_1.json").write_text('{"dataset": "a"')
    (folder / "cells" / "b_0.json").unlink()
    again = Fake()
    go(again, folder)
    assert again.ran == [("b", 0), ("a", 1)] and final(folder) == before


def test_an_interrupted_run_goes_on_where_it_stopped(folder):
    with pytest.raises(KeyboardInterrupt):
        go(Fake(act=fail_at("a", 1, KeyboardInterrupt())), folder)
    assert (
        manifest(folder)["status"] == "stopped" and "KeyboardInterrupt" in manifest(folder)["cause"]
    )
    again = Fake()
    assert go(again, folder) == "done"
    assert again.ran == [("a", 1), ("b", 1)]
    assert "cause" not in manifest(folder)


def test_another_configuration_is_refused_in_one_line_with_key_and_both_values(folder):
    go(Fake(), folder)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    study = Fake()
    with pytest.raises(UserError) as caught:
        go(study, folder, config={"sae": {"k": 64, "name": "topk"}})
    said = str(caught.value)
    assert (
        "sae.k: 32 -> 64" in said
        and "overwrite=true" in said
        and str(folder) in said
        and "\n" not in said
    )
    assert "name" not in said and caught.value.exit_status == 2
    assert not study.ran and {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_a_key_that_only_one_configuration_has_is_a_difference(folder):
    go(Fake(), folder)
    with pytest.raises(UserError, match=r"new\.key: None -> 1"):
        go(Fake(), folder, config={"new": {"key": 1}})


def test_settings_that_change_no_result_may_change(folder):
    go(Fake(), folder)
    again = Fake()
    edges = {
        "out_dir": "x",
        "runs_root": "y",
        "verbosity": "quiet",
        "time_limit_s": 5,
        "threads": 3,
        "track": {"a": 1},
        "label": "z",
    }
    assert go(again, folder, config=edges) == "done" and not again.ran


def test_overwrite_runs_every_cell_again_under_the_new_configuration(folder):
    go(Fake(), folder)
    again = Fake()
    assert go(again, folder, config={"sae": {"k": 64}}, overwrite=True) == "done"
    assert len(again.ran) == 4 and manifest(folder)["config"]["sae"] == {"k": 64}


def test_overwrite_leaves_no_cell_of_the_old_configuration(folder):
    """Readers take every record in cells/ for a part of the run."""
    go(Fake(), folder)
    go(Fake(seeds=(0,)), folder, config={"sae": {"k": 64}}, overwrite=True)
    assert {(r.dataset, r.seed) for r in read_records(folder)} == {("a", 0), ("b", 0)}
    assert {r.config_hash for r in read_records(folder)} == {manifest(folder)["config_hash"]}
    assert not (folder / "final_info_a_1.json").exists()


def test_final_info_never_mixes_configurations(folder):
    go(Fake(), folder)

    def act(cell: Cell, ctx: Context) -> Any:
        if cell == Cell("b", 0, ("b",)):
            raise NonFinite("b: loss is NaN")
        return {r: outcome(cell.seed, metrics={"loss": 100.0}) for r in cell.reports}

    with pytest.raises(RunFailed):
        go(Fake(act=act), folder, config={"sae": {"k": 64}}, overwrite=True)
    assert final(folder)["b"]["final_info_dict"]["loss"] in ([100.0], [None, 100.0])


def test_another_source_runs_finished_cells_again(folder, monkeypatch):
    go(Fake(), folder)
    monkeypatch.setattr(run_module, "package_digest", lambda root: "other")
    again = Fake()
    assert go(again, folder) == "done"
    assert len(again.ran) == 4 and len({r.source_hash for r in read_records(folder)}) == 1


# ------------------------------------------------------------------------------------------------
# failures


def test_a_loss_that_is_not_finite_ends_its_cell_only(folder, capsys):
    study = Fake(act=fail_at("a", 1, NonFinite("sae: loss term mse is not finite at step 12")))
    with pytest.raises(RunFailed) as caught:
        go(study, folder)
    assert len(study.ran) == 4
    assert caught.value.exit_status == 1 and all(
        words in str(caught.value) for words in ("1 of 4 cells failed", "a seed 1", "step 12")
    )
    assert manifest(folder)["status"] == "failed" and "step 12" in manifest(folder)["cause"]
    assert final(folder)["a"]["final_info_dict"]["loss"] == [1.0] and final(folder)["b"][
        "final_info_dict"
    ]["loss"] == [1.0, 2.0]
    again = Fake()
    assert go(again, folder) == "done" and again.ran == [("a", 1)]


def test_where_every_cell_fails_final_info_is_valid_and_empty(folder):
    def act(cell: Cell, ctx: Context) -> None:
        raise NonFinite("sae: broken")

    with pytest.raises(RunFailed, match="4 of 4"):
        go(Fake(act=act), folder)
    assert final(folder) == {} and manifest(folder)["status"] == "failed"


def test_any_other_error_ends_the_run_and_keeps_what_is_finished(folder):
    with pytest.raises(ZeroDivisionError, match="by zero"):
        go(Fake(act=fail_at("a", 1, ZeroDivisionError("by zero"))), folder)
    assert (
        manifest(folder)["status"] == "failed"
        and manifest(folder)["cause"] == "ZeroDivisionError: by zero"
    )
    assert final(folder)["a"]["final_info_dict"]["loss"] == [1.0]


def test_an_error_before_the_first_cell_leaves_no_folder(folder):
    study = Fake()
    study.prepare = lambda ctx: (_ for _ in ()).throw(UserError("no corpus"))
    with pytest.raises(UserError, match="no corpus"):
        go(study, folder)
    assert not folder.exists()
    study.prepare, study.check = (
        Fake().prepare,
        study.prepare,
    )
    study.check = lambda: (_ for _ in ()).throw(UserError("no such thing"))
    with pytest.raises(UserError, match="no such thing"):
        go(study, folder)
    assert not folder.exists()


def test_a_folder_in_use_by_another_process_is_one_line(folder):
    folder.mkdir(parents=True)
    code = "import sys, time\nfrom pathlib import Path\nfrom sae_experiments.cache import locked\n"
    code += "with locked(Path(sys.argv[1])):\n print('held', flush=True)\n time.sleep(60)"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(folder / ".lock")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        study = Fake()
        with pytest.raises(UserError, match="in use by another process") as caught:
            go(study, folder)
    finally:
        holder.kill()
        holder.wait()
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value) and not study.ran
    assert go(study, folder) == "done", "the lock of a dead process holds nobody up"


@pytest.mark.parametrize("place", ["the folder", "its parent"])
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, place):
    (tmp_path / "f").write_text("a file in place of a folder")
    folder = tmp_path / "f" if place == "the folder" else tmp_path / "f" / "r"
    study = Fake()
    with pytest.raises(UserError, match="cannot be written") as caught:
        go(study, folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value) and not study.ran


# ------------------------------------------------------------------------------------------------
# time limit


def test_a_run_cut_short_says_so_and_the_same_command_makes_it_whole(folder):
    def act(cell: Cell, ctx: Context) -> Any:
        return (
            {r: outcome(cell.seed, cut=True) for r in cell.reports} if cell.dataset == "b" else None
        )

    assert go(Fake(act=act), folder, time_limit_s=100) == "cut"
    assert manifest(folder)["status"] == "cut" and set(final(folder)) == {
        "a",
        "b",
    }, "what was cut short is reported all the same"
    again = Fake()
    assert go(again, folder) == "done"
    assert again.ran == [("b", 0), ("b", 1)] and manifest(folder)["status"] == "done"


def test_every_cell_gets_an_equal_share_of_the_time_left(folder):
    shares = []
    go(
        Fake(act=lambda cell, ctx: shares.append(ctx.deadline - time.monotonic())),
        folder,
        time_limit_s=400,
    )
    assert shares == pytest.approx([100, 400 / 3, 200, 400], abs=3)


def test_without_a_limit_there_is_no_deadline(folder):
    seen = []
    go(Fake(act=lambda cell, ctx: seen.append(ctx.deadline)), folder)
    assert seen == [None] * 4


def test_a_deadline_that_has_passed_gives_sessions_no_time_instead_of_time_in_the_past(folder):
    seen = []

    def act(cell: Cell, ctx: Context) -> None:
        with ctx.session("stage", "lm", share=0.6) as session:
            seen.append(session.deadline - time.monotonic())

    assert go(Fake(act=act), folder, time_limit_s=1e-3) == "cut"
    assert seen == pytest.approx([0], abs=2), (
        "the first cell ends with something to show; the others find no time left"
    )


def test_a_cell_that_is_busy_when_the_limit_is_over_is_left_for_another_time(folder):
    """Not only training: whatever it does."""

    def act(cell: Cell, ctx: Context) -> None:
        if cell == Cell("a", 1, ("a",)):
            time.sleep(60)

    began = time.monotonic()
    assert go(Fake(act=act), folder, time_limit_s=2) == "cut"
    assert time.monotonic() - began < 10 and manifest(folder)["status"] == "cut"
    assert final(folder)["a"]["final_info_dict"]["loss"] == [1.0], "what was finished is reported"
    again = Fake()
    assert go(again, folder) == "done" and again.ran == [("a", 1), ("b", 1)]


@pytest.mark.parametrize("seconds", [10.0, 60.0, 600.0, 7200.0])
@pytest.mark.parametrize("report", [True, False])
def test_every_part_of_a_run_ends_within_its_limit(folder, seconds, report):
    """Cells, the report and what follows it have times of their own, counted from the command."""
    ends = {}

    def act(cell: Cell, ctx: Context) -> None:
        ends.setdefault("cells", ctx.ends)

    def closing(folder: Path) -> None:
        ends["report"] = time.monotonic() + signal.getitimer(signal.ITIMER_REAL)[0]

    began = time.monotonic() - 0.5  # imports came before
    limits = {"time_limit_s": seconds, "began": began}
    study = Fake(act=act)
    run(study, settings(folder, **limits), NoTracker(), closing if report else None)
    kept = began + seconds - ends["cells"]
    if not report:
        assert kept == pytest.approx(min(0.03 * seconds, 2), abs=0.05)
        return
    after_report = began + seconds - ends["report"]
    assert after_report == pytest.approx(min(0.03 * seconds, 2), abs=0.1)
    assert kept - after_report == pytest.approx(min(0.1 * seconds, 20), abs=0.15)


def test_a_report_that_takes_too_long_is_left_out(folder, capsys):
    began = time.monotonic()
    chosen = settings(folder, time_limit_s=2, verbosity="normal")
    assert run(Fake(), chosen, NoTracker(), lambda folder: time.sleep(60)) in ("done", "cut")
    assert (
        time.monotonic() - began < 20 and "no time left for report.html" in capsys.readouterr().out
    )


def test_a_metric_that_takes_too_long_is_null_even_in_the_first_cell():
    """The limit of the first cell interrupts nothing else: it must have something to show."""

    class Sleeps(SelfDescribed):
        infos = [info("slow", "slow", "a metric", better="up")]
        settings: dict[str, Any] = {}

        def __call__(self, evaluation: Any) -> Any:
            time.sleep(60)

    def quick(evaluation: Any) -> Measured:
        return Measured({"quick": 1.0})

    evaluation = SimpleNamespace(held_out=None, n_rows=4)
    one, began = Outcome(), time.monotonic()
    with limited(began + 0.5, lambda: False):
        one.measure({"quick": quick, "slow": Sleeps()}, evaluation, began + 0.5)
    assert time.monotonic() - began < 20 and one.cut
    assert one.metrics == {"quick": 1.0, "slow": None} and "time limit" in one.why_null["slow"]


# ------------------------------------------------------------------------------------------------
# trackers


class FakeWandb(ModuleType):
    """A wandb that raises where it is told to."""

    def __init__(self, broken: str = "", key: str | None = None, mode: str = "online") -> None:
        super().__init__("wandb")
        self.broken, self.calls = broken, []
        self.known = SimpleNamespace(api_key=key, mode=mode, base_url="https://wandb.example")
        self.summary = SimpleNamespace(update=lambda values: self.call("summary", values))

    def call(self, what: str, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((what, args, kwargs))
        if what == self.broken:
            raise ConnectionError(f"{what} broke\nwith a second line")
        return self

    def setup(self) -> Any:
        return SimpleNamespace(settings=self.known)

    def init(self, **kwargs: Any) -> Any:
        return self.call("init", **kwargs)

    def log(self, values: Mapping[str, Any]) -> Any:
        return self.call("log", values)

    def finish(self, **kwargs: Any) -> Any:
        return self.call("finish", **kwargs)

    def Settings(self, **kwargs: Any) -> Any:
        return kwargs

    def Table(self, columns: list[str], data: list[list[Any]]) -> Any:
        return self.call("Table", columns, data) and data

    def Image(self, path: str) -> Any:
        return path

    def Html(self, page: str, inject: bool) -> Any:
        return page


def with_wandb(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    wandb: Any,
    act: Any = None,
    mode: str = "auto",
    **variables: str,
) -> tuple[str, list[str]]:
    said: list[str] = []
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"NETRC": str(folder / "no netrc")} | variables).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    study = Fake(act=act or (lambda cell, ctx: ctx.log(3, {"lm/loss": 1.5})))
    return go(study, folder, Wandb(project="p", group=None, mode=mode, say=said.append)), said


@pytest.mark.parametrize(
    "broken", ["init", "log", "summary", "Table", "finish", "Settings", "import"]
)
def test_a_tracker_that_raises_changes_neither_status_nor_results(folder, monkeypatch, broken):
    wandb: Any = (
        None if broken == "import" else FakeWandb(broken)
    )  # None in sys.modules makes the import fail
    if broken == "Settings":
        wandb.Settings = lambda **kwargs: wandb.call("Settings", **kwargs)
    status, said = with_wandb(monkeypatch, folder, wandb)
    assert status == "done" == manifest(folder)["status"] and len(read_records(folder)) == 4
    told = [line for line in said if "failed" in line]
    assert len(told) == 1 and "\n" not in told[0] and "going on without it" in told[0], (
        "said once, in one line"
    )
    if broken == "log":
        assert [what for what, *_ in wandb.calls] == [
            "init",
            "log",
        ], "after its first error it is left alone"


def test_wandb_is_offline_without_a_key_and_online_with_one(folder, tmp_path, monkeypatch):
    modes = []
    for key in (None, "secret"):
        wandb = FakeWandb(key=key)
        with_wandb(monkeypatch, tmp_path / f"{key}", wandb)
        modes.append(wandb.calls[0][2]["mode"])
    assert modes == ["offline", "online"]
    wandb = FakeWandb(key="secret")
    with_wandb(monkeypatch, tmp_path / "disabled", wandb, mode="disabled")
    assert wandb.calls[0][2]["mode"] == "disabled"


@pytest.mark.parametrize("key", [None, "secret"])
@pytest.mark.parametrize("variable", [None, "online", "offline", "disabled"])
@pytest.mark.parametrize("mode", MODES)
def test_a_mode_that_was_asked_for_is_kept(folder, monkeypatch, mode, variable, key):
    """The configuration first, then WANDB_MODE, then what there is a key for."""
    wandb = FakeWandb(key=key)
    with_wandb(
        monkeypatch, folder, wandb, mode=mode, **({"WANDB_MODE": variable} if variable else {})
    )
    expected = mode if mode != "auto" else variable or ("online" if key else "offline")
    assert wandb.calls[0][2]["mode"] == expected


def test_auto_knows_wandb_s_own_settings_and_the_keys_of_a_netrc_file(
    folder, tmp_path, monkeypatch
):
    wandb = FakeWandb(key="secret", mode="disabled")  # as after `wandb disabled`
    with_wandb(monkeypatch, tmp_path / "disabled", wandb)
    assert wandb.calls[0][2]["mode"] == "disabled"
    for host, mode in (
        ("wandb.example", "online"),
        ("api.wandb.ai", "online"),
        ("elsewhere", "offline"),
    ):
        (tmp_path / "netrc").write_text(f"machine {host} login user password secret\n")
        (tmp_path / "netrc").chmod(0o600)
        wandb = FakeWandb()
        with_wandb(monkeypatch, tmp_path / host, wandb, NETRC=str(tmp_path / "netrc"))
        assert wandb.calls[0][2]["mode"] == mode, host


def test_a_mode_that_wandb_does_not_have_is_one_line():
    with pytest.raises(
        UserError, match=r"track\.mode=foo is not one of auto, online, offline, disabled"
    ):
        Wandb(project="p", group=None, mode="foo")


@pytest.mark.parametrize("variable", ["offline", "disabled"])
def test_the_real_wandb_does_not_go_online_against_wandb_mode(folder, monkeypatch, variable):
    """With a key and track.mode=auto; whatever else it needs of wandb is still there."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_MODE", variable)
    wandb.teardown()  # its settings are read once
    said: list[str] = []
    tracker = Wandb(project="p", group=None, mode="auto", say=said.append)
    assert go(Fake(act=lambda cell, ctx: ctx.log(3, {"lm/loss": 1.5})), folder, tracker) == "done"
    wandb.teardown()
    assert [line for line in said if line.startswith(f"wandb: {variable}, ")] == said
    assert any(folder.glob("wandb/offline-run-*")) == (variable == "offline")


def test_wandb_gets_the_curves_the_metrics_and_the_status(folder, monkeypatch):
    wandb = FakeWandb()
    status, _ = with_wandb(monkeypatch, folder, wandb)
    calls = {what: [(a, k) for w, a, k in wandb.calls if w == what] for what, *_ in wandb.calls}
    assert (
        status == "done"
        and calls["init"][0][1]["dir"] == str(folder)
        and calls["init"][0][1]["config"]["sae"]["k"] == 32
    )
    assert calls["log"][0][0][0] == {"a/0/lm/loss": 1.5, "a/0/step": 3}
    assert calls["summary"][0][0][0]["a/0/loss"] == 1.0
    assert calls["finish"] == [((), {"exit_code": 0})]


def test_wandb_gets_the_final_table_the_figures_and_the_report(folder, monkeypatch):
    def closing(where: Path) -> None:
        (where / "figures").mkdir(exist_ok=True)
        (where / "figures" / "pareto.png").write_bytes(b"")
        (where / "report.html").write_text("<p>page</p>")

    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run(
        Fake(), settings(folder), Wandb(project="p", group=None, mode="offline", say=print), closing
    )
    shown = [args[0] for what, args, _ in wandb.calls if what == "log"][-1]
    assert shown["report"] == "<p>page</p>" and shown["figures/pareto"].endswith("pareto.png")
    assert [row[:2] for row in shown["final_info"]] == [
        ["a", "loss"],
        ["a", "nothing"],
        ["b", "loss"],
        ["b", "nothing"],
    ]
    assert [what for what, *_ in wandb.calls][-1] == "finish"


def test_wandb_is_told_of_a_failed_run(folder, monkeypatch):
    wandb = FakeWandb()
    with pytest.raises(RunFailed):
        with_wandb(monkeypatch, folder, wandb, act=fail_at("a", 0, NonFinite("broken")))
    assert ("finish", (), {"exit_code": 1}) in wandb.calls


def test_a_real_failure_is_not_hidden_by_a_tracker_that_fails_too(folder, monkeypatch):
    with pytest.raises(RunFailed, match="step 12"):
        with_wandb(
            monkeypatch,
            folder,
            FakeWandb("finish"),
            act=fail_at("a", 0, NonFinite("broken at step 12")),
        )
    assert manifest(folder)["status"] == "failed"


def test_results_on_another_text_are_refused_and_the_same_text_from_elsewhere_is_not(folder):
    """A stand-in and the real corpus have the same configuration: only the text tells their
    results apart.
    """

    def text(source: str, sha256: str) -> Callable[[Context], dict[str, Any]]:
        return lambda ctx: {
            "a": {"corpus": "a", "source": source, "sha256": sha256, "stand_in": sha256 == "made"}
        }

    study = Fake()
    study.prepare = text("one.txt", "real")
    go(study, folder)
    study.prepare = text("https://elsewhere", "real")
    done = dict(read_json(next(folder.glob("cells/*.json"))))
    assert go(study, folder) == "done"
    assert read_json(next(folder.glob("cells/*.json"))) == done
    study.prepare = text("stand-in", "made")
    with pytest.raises(UserError, match="another text") as error:
        go(study, folder)
    assert "one.txt" in str(error.value) or "elsewhere" in str(error.value)
    assert "overwrite=true" in str(error.value)
    assert go(study, folder, overwrite=True) == "done"

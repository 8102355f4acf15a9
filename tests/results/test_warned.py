"""What is worse than it looks is said: in the log, the record, the closing table, the
comparison and the report, and in no mean.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sae_experiments import build_sae, fit_saes
from sae_experiments.cli.main import print_summary
from sae_experiments.files import read_json
from sae_experiments.fitting.fit import FitReport
from sae_experiments.metrics import sparsity
from sae_experiments.metrics.base import EvalContext
from sae_experiments.quality_warnings import (
    Warned,
    checked,
    lines,
    of_dead,
    of_fit,
    of_metrics,
    of_rows,
    of_text,
)
from sae_experiments.report.page import page
from sae_experiments.results.compare import compare
from sae_experiments.results.markdown import markdown
from sae_experiments.results.records import Record, read_records, write_record
from sae_experiments.results.table import load_table
from sae_experiments.results.terminal import terminal
from sae_experiments.saes.topk import TopK
from sae_experiments.studies.base import Outcome
from sae_experiments.studies.language.stores import Stores
from support.fake_runner import Fake, go, outcome
from support.fake_runs import make_run


def keys(found: Any) -> list[str]:
    return [one.key for one in found]


@pytest.mark.parametrize(
    ("metrics", "asked", "expected"),
    [
        ({"sae_fvu": 1.0}, None, []),
        ({"sae_fvu": 1.001}, None, ["sae_fvu"]),
        ({"sae_fvu": None}, None, []),
        ({"sae_fvu": float("inf"), "sae_l0": float("nan")}, 32.0, []),
        ({"sae_fvu": 9.0, "sae_outlier_frac": 1e-4, "sae_fvu_ordinary": 0.2}, None, []),
        (
            {"sae_fvu": 0.1, "sae_outlier_frac": 1e-4, "sae_fvu_ordinary": 1.2},
            None,
            ["sae_fvu_ordinary"],
        ),
        ({"explained_variance": 0.0}, None, []),
        ({"explained_variance": -0.1}, None, ["explained_variance"]),
        ({"sae_l0": 33.5}, 32.0, []),
        ({"sae_l0": 33.7}, 32.0, ["sae_l0"]),
        ({"sae_l0": 30.5}, 32.0, []),
        ({"sae_l0": 30.3}, 32.0, ["sae_l0"]),
        ({"sae_l0": 0.0}, 32.0, ["sae_l0"]),
        ({"sae_l0": 900.0}, None, []),
        ({}, 32.0, []),
    ],
)
def test_numbers_beyond_their_limits(
    metrics: Any, asked: float | None, expected: list[str]
) -> None:
    found = of_metrics(metrics, asked)
    assert keys(found) == expected
    assert all(one.says.startswith(one.key) and one.do for one in found)


def _curves(fvu: Any, l0: Any = None, dead: Any = 0.0) -> list[tuple[int, str, float]]:
    """Curves of a fit, one point every 20 steps."""
    points = []
    for i, value in enumerate(fvu):
        active = 32.0 if l0 is None else l0[i]
        share = dead if isinstance(dead, float) else dead[i]
        for name, v in (("fvu", value), ("l0", active), ("dead_frac", share)):
            points.append((20 * i, name, v))
    return points


def _of_fit(*args: Any, firings: float = 100.0, judge_error: bool = True, **more: Any) -> Any:
    settings = {"lr": 5e-3, "warmup_steps": 100, "firings": firings, "judge_error": judge_error}
    return of_fit(_curves(*args, **more), **settings)


FALLING = [1 / (1 + i) for i in range(40)]
CLIMBING = [*FALLING[:20], *(0.05 * 1.05**i for i in range(20))]


def test_a_fit_that_goes_well_says_nothing() -> None:
    assert _of_fit(FALLING) == []
    spike = [*FALLING[:20], 3.0, *FALLING[20:]]
    assert _of_fit(spike) == [], "one odd batch is no climb"
    assert _of_fit([0.9, *([5.0] * 4), *FALLING]) == [], "nor is the warm-up"


def test_an_error_that_climbs_is_told_with_its_steps() -> None:
    (one,) = _of_fit(CLIMBING)
    assert one.key == "fit_fvu" and one.value > 2
    assert "climbed from 0.05" in one.says
    assert "lr=0.005" in one.do and "try 0.0025" in one.do
    assert _of_fit(CLIMBING, judge_error=False) == []


def test_an_error_that_climbs_as_latents_are_taken_away_is_no_fault() -> None:
    active = [32 * (4 - i / 13) for i in range(40)]
    assert _of_fit(CLIMBING, active) == []
    assert keys(_of_fit(CLIMBING, [32.0] * 40)) == ["fit_fvu"]


def test_latents_that_die_in_masses_are_told_even_if_they_come_back() -> None:
    dead = [0.0] * 15 + [0.3] * 10 + [0.02] * 15
    (one,) = _of_fit(FALLING, dead=dead)
    assert one.key == "fit_dead_frac" and one.value == 0.3
    assert one.says.startswith("30% of the latents were dead at step 300")
    assert one.says.endswith("and 2% at its end")
    assert _of_fit(FALLING, dead=0.1) == []
    assert _of_fit(FALLING, dead=dead, firings=5.0) == [], "too few rows to call a latent dead"


def test_a_fit_reports_its_rate_and_what_went_wrong() -> None:
    """A rate far too high, through the door for tensors: warnings, report and facts."""
    torch.manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(256, 64), dim=1)
    x = (torch.rand(8192, 256) < 0.03).float() @ directions
    sae = build_sae("batch_topk", 64, target_l0=8, d_sae=256)
    settings = {"steps": 150, "batch_size": 256, "warmup_steps": 10, "log_every": 5}
    with pytest.warns(UserWarning, match="sae: .* of the latents were dead"):
        report = fit_saes(sae, x, lr=0.3, **settings)["sae"]
    assert report.lr == 0.3 and report.facts["lr"] == 0.3
    assert "fit_dead_frac" in keys(report.warned)
    again = FitReport(**json.loads(json.dumps(report._asdict())))
    assert again.warned == report.warned
    told = Outcome()
    told.add_fit(again)
    assert told.warnings == report.warned and told.facts["fit"]["lr"] == 0.3


def test_text_that_was_dropped() -> None:
    assert of_text({"dropped_frac": 0.0}) == of_text({}) == of_text({"dropped_frac": None}) == []
    assert "83.00% of the text was dropped or unknown" in of_text({"dropped_frac": 0.83})[0].says


@pytest.mark.parametrize(("rows", "asked", "short"), [(512, 512, 0), (508, 512, 0), (500, 512, 1)])
def test_fewer_rows_than_asked_but_for_a_broken_window(rows: int, asked: int, short: int) -> None:
    assert len(of_rows("fit.held_out_rows", rows, asked)) == short


def test_stores_that_a_text_cannot_fill() -> None:
    rows = {"train": 900, "calibration": 30, "held_out": 50}
    stores = SimpleNamespace(**{k: SimpleNamespace(n_rows=n) for k, n in rows.items()})
    stores.fit = SimpleNamespace(train_rows=1000, calibration_rows=40, held_out_rows=50)
    short = Stores.short(stores)  # type: ignore[arg-type]
    assert keys(short) == ["fit.train_rows", "fit.calibration_rows"]


@pytest.mark.parametrize("rows", [8, 64, 20_000])
def test_a_dead_share_from_few_rows_is_doubtful(rows: int) -> None:
    """Latents of a small random TopK SAE all fire now and then: on few rows most seem dead."""
    torch.manual_seed(0)
    sae = TopK(k=4, d_in=32, d_sae=64)
    ctx = EvalContext(sae=sae, device=torch.device("cpu"), x=torch.randn(rows, 32))
    found = sparsity.measure(ctx, rows=None, entropy_latents=8)
    assert keys(found.warnings) == (["sae_dead_frac"] if rows < 1000 else [])


def test_latents_that_never_fire_are_dead_however_many_fire_often() -> None:
    assert of_dead(10_000, 4.0, 64, 0, 0) == []
    assert of_dead(10_000, 0.0, 64, 0, 0) == []


def test_a_run_says_it_everywhere_but_in_the_means(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def act(cell: Any, ctx: Any) -> Any:
        bad = {"sae_fvu": 1.5, "sae_l0": 40.0}
        told = [Warned("fit.held_out_rows", 5, "fit.held_out_rows: 5 rows instead of 9", "more")]
        found = outcome(cell.seed, metrics=bad, facts={"asked_l0": 32.0}, warnings=told)
        return dict.fromkeys(cell.reports, found)

    study = Fake(datasets=("a",), act=act)
    # type: ignore[method-assign]
    study.prepare = lambda ctx: {"a": {"corpus": "a", "dropped_frac": 0.25}}
    folder = tmp_path / "runs" / "r"
    go(study, folder)
    log = capsys.readouterr().out
    says = ["sae_fvu is 1.5", "sae_l0 is 40, 25% above the 32 asked for", "5 rows instead of 9"]
    says.append("25.00% of the text was dropped or unknown")
    for text in says:
        assert log.count(f"{text}") == 1, "once, though two seeds say it"
    for record in read_records(folder):
        assert {w["key"] for w in record.warnings} == {
            "sae_fvu",
            "sae_l0",
            "fit.held_out_rows",
            "dropped_frac",
        }
    assert set(read_json(folder / "final_info.json")["a"]["means"]) == {
        "sae_fvu_mean",
        "sae_l0_mean",
    }
    assert set(read_json(folder / "final_info_a_0.json")) == {"sae_fvu", "sae_l0"}
    print_summary(folder, "done")
    table = load_table([folder])
    rows = compare(table)
    closing = capsys.readouterr().out
    assert max(len(line) for line in closing.splitlines() if str(tmp_path) not in line) <= 100
    for shown in (closing, terminal(table, rows), markdown(table, rows), page(table, [])):
        plain = " ".join(shown.split())
        for text in says:
            assert text in plain
        assert "seed 0 and 1 more cell" in plain


def test_one_line_for_each_kind() -> None:
    one = {"key": "sae_fvu", "value": 2.0, "says": "it is bad", "do": "train"}
    cells = [("a", seed, [one, {**one, "key": "sae_l0"}]) for seed in range(3)]
    assert lines(cells) == ["a seed 0 and 2 more cells: it is bad; train"] * 2
    assert lines([("a", 0, [])]) == []


@pytest.mark.parametrize(
    "given", [None, 3, "x", {}, [1], [{"key": 1}], [{"key": "a", "says": "b"}]]
)
def test_what_is_no_warning_is_left_out(given: Any, tmp_path: Path) -> None:
    assert checked(given) == []
    record = Record(dataset="d", seed=0, metrics={}, warnings=given, facts=given)
    write_record(tmp_path, record)
    assert read_records(tmp_path) == [record]


def test_markup_in_a_warning_stays_text(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "run_0", curves=False)
    warning = {"key": "k", "value": 1, "says": "<script>alert(1)</script>", "do": "x"}
    record = Record(dataset="shakespeare_char", seed=0, metrics={"m": 1.0}, warnings=[warning])
    write_record(folder, record)
    found = page(load_table([folder]), [])
    assert "<script>alert(1)" not in found and "&lt;script&gt;alert(1)" in found
    assert json.loads((folder / "cells/shakespeare_char_0.json").read_text())["warnings"] == [
        warning
    ]

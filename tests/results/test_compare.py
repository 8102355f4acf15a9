"""Deltas against the baseline: their errors, what may be compared with what, and the tables."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from sae_experiments.files import read_json, write_json
from sae_experiments.report.chart import sparsity_against_fidelity
from sae_experiments.results.choices import ABSENT, chosen_differences, config_diff
from sae_experiments.results.compare import Delta, compare, delta, verdict
from sae_experiments.results.headline import MOST, error_metric, headline
from sae_experiments.results.markdown import markdown
from sae_experiments.results.notes import not_comparable_lines
from sae_experiments.results.numbers import plain, short, with_error
from sae_experiments.results.records import (
    Record,
    Stat,
    mean_stderr,
    read_records,
    write_final_info,
    write_record,
)
from sae_experiments.results.table import RunTable, load_table
from sae_experiments.results.terminal import terminal
from support.fake_runs import make_run


def stat(*values: float | None, first_seed: int = 0) -> Stat:
    return Stat(*mean_stderr(values), dict(enumerate(values, first_seed)))


def table_of(root: Path, *names: str, **options: Any) -> RunTable:
    return load_table([root / name for name in names], **options)


def row(
    table: RunTable, run: str, metric: str, dataset: str = "shakespeare_char"
) -> dict[str, Any]:
    found = compare(table)
    return (
        found[(found["run"] == run) & (found["metric"] == metric) & (found["dataset"] == dataset)]
        .iloc[0]
        .to_dict()
    )


def test_paired_where_the_seeds_are_the_same() -> None:
    found = delta(stat(1.1, 2.1, 3.4), stat(1.0, 2.0, 3.0))
    assert found.test == "paired"
    assert found.n == 3
    assert found.value == pytest.approx(0.2)
    assert found.stderr == pytest.approx(
        0.1
    )  # differences 0.1, 0.1, 0.4: stdev 0.1732, over sqrt(3)


def test_welch_where_they_are_not() -> None:
    run, baseline = stat(1.0, 3.0, first_seed=5), stat(0.0, 2.0, 4.0)
    found = delta(run, baseline)
    assert found.test == "welch"
    assert found.value == 0.0
    assert found.stderr == pytest.approx(math.hypot(run.stderr or 0, baseline.stderr or 0))
    assert (
        delta(stat(1.0, None, 3.0), stat(1.0, 2.0, 3.0)).test == "welch"
    )  # a null breaks the pair


@pytest.mark.parametrize("run", [stat(1.0), stat(1.0, None)])
def test_one_value_has_a_delta_but_no_error(run: Stat) -> None:
    assert delta(run, stat(2.0, 3.0)) == Delta(-1.5, None, "", 0)


def test_no_value_no_delta() -> None:
    assert delta(stat(None), stat(2.0, 3.0)) == Delta(None, None, "", 0)


@pytest.mark.parametrize(
    ("value", "error", "better", "expected"),
    [
        (-0.3, 0.1, "down", "better"),
        (-0.3, 0.1, "up", "worse"),
        (0.3, 0.1, "none", "differs"),
        (0.3, 0.1, "target", "differs"),
        (0.2, 0.1, "up", ""),  # not more than two
        (0.3, None, "up", ""),
        (None, None, "up", ""),
        (1e-16, 0.0, "up", ""),  # rounding, not a result
        (0.3, 0.0, "up", "better"),
    ],
)
def test_verdicts(value: float | None, error: float | None, better: str, expected: str) -> None:
    assert verdict(Delta(value, error, "paired", 3), 1.0, better) == expected


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0.28123, 0.0031, "0.2812 ± 0.0031"),
        (1.46932, None, "1.469"),
        (2371.97, 12.3, "2,372 ± 12"),
        (3.0, 0.0, "3.0000 ± 0.0000"),
        (1e-9, 2e-10, "1e-09 ± 2e-10"),
    ],
)
def test_values_are_as_long_as_their_error_allows(
    value: float, error: float | None, text: str
) -> None:
    assert with_error(value, error) == text


@pytest.mark.parametrize("digits", [3, 4])
@pytest.mark.parametrize(
    "value", [0.0123456, 9.996, 99.96, 999.4, 999.6, 1500.4, 9999.7, -123456.7]
)
def test_large_numbers_have_no_exponent(value: float, digits: int) -> None:
    text = plain(value, digits)
    assert "e" not in text
    number = float(text.replace(",", ""))
    assert number == pytest.approx(value, rel=0.5 * 10 ** (1 - digits))
    assert short(value, None) == (plain(value, 3), "")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"preset": "full"}, "preset full vs laptop"),
        ({"stand_in": True}, "stand-in vs real text"),
        ({"corpora": {"enwik8": {"corpus": "enwik8"}}}, "corpus enwik8 vs enwik8-head-4000000"),
        (
            {"corpora": {"enwik8": {"corpus": "enwik8-head-4000000", "counts": {"train": 1}}}},
            "corpus sizes differ",
        ),
        ({"corpora": {}}, "corpus unknown vs enwik8-head-4000000"),
        ({"preset": ""}, "preset of run_1 unknown"),
    ],
)
def test_what_must_not_be_subtracted_is_not(
    tmp_path: Path, options: dict[str, Any], why: str
) -> None:
    make_run(tmp_path, "run_0", datasets=["enwik8"], curves=False)
    make_run(tmp_path, "run_1", datasets=["enwik8"], sae="topk", curves=False, **options)
    table = table_of(tmp_path, "run_0", "run_1")
    found = compare(table)
    mine = found[found["run"] == "run_1"]
    assert set(mine["not_comparable"]) == {why}
    assert mine["delta"].isna().all()
    assert set(mine["verdict"]) == {""}
    assert not_comparable_lines(found) == [f"Not comparable with run_0: run_1: {why}."]
    text = " ".join(terminal(table, found).split())
    assert text.count(why) == 1, "the reason is given once"
    assert why in " ".join(markdown(table, found).split())


def test_the_published_figures_stand_in_at_full_scale_only(tmp_path: Path) -> None:
    make_run(tmp_path / "a/b", "run_1", preset="full", curves=False)
    make_run(tmp_path / "a/b", "run_2", preset="laptop", curves=False)
    table = table_of(tmp_path / "a/b", "run_1", "run_2")
    found = row(table, "run_1", "best_val_loss")
    assert found["baseline"] == "published"
    assert found["delta"] == pytest.approx(found["mean"] - 1.4693279266357422)
    assert math.isnan(found["delta_stderr"])
    assert found["verdict"] == ""
    assert row(table, "run_2", "best_val_loss")["not_comparable"] == "preset laptop vs full"
    assert row(table, "run_1", "sae_fvu")["not_comparable"] == "baseline has no value"
    assert "unknown" in terminal(table, compare(table))  # the GPU: times are of different devices


def test_a_better_run_is_called_better(tmp_path: Path) -> None:
    make_run(tmp_path, "run_0", sae="standard", curves=False)
    make_run(tmp_path, "run_1", sae="topk", curves=False)
    table = table_of(tmp_path, "run_0", "run_1")
    found = row(table, "run_1", "sae_fvu")
    assert (found["verdict"], found["test"], found["pairs"]) == ("better", "paired", 3)
    assert row(table, "run_1", "best_val_loss")["delta"] == 0
    assert row(table, "run_0", "sae_fvu")["is_baseline"]


def test_without_a_baseline_there_are_no_deltas(tmp_path: Path) -> None:
    make_run(tmp_path / "a/b", "run_3", curves=False)
    table = table_of(tmp_path / "a/b", "run_3")
    found = compare(table)
    assert found["delta"].isna().all()
    assert "No baseline" in terminal(table, found)
    assert "No baseline" in markdown(table, found)


def test_nulls_and_missing_metrics(tmp_path: Path) -> None:
    write_record(tmp_path / "run_0", Record(dataset="d", seed=0, metrics={"m": 1.0, "gone": 2.0}))
    write_record(
        tmp_path / "run_1",
        Record(
            dataset="d",
            seed=0,
            metrics={"m": math.nan, "new": 3.0},
            why_null={"m": "constant input"},
        ),
    )
    for name in ("run_0", "run_1"):
        write_json(
            tmp_path / name / "manifest.json",
            {"preset": "laptop", "corpora": {"d": {"corpus": "d"}}},
        )
    table = table_of(tmp_path, "run_0", "run_1")
    found = compare(table)
    assert row(table, "run_1", "m", "d")["why_null"] == "constant input"
    assert found[(found["run"] == "run_1") & (found["metric"] == "gone")].empty
    assert "null" in terminal(table, found)
    page = markdown(table, found)
    assert "null (constant input)" in page
    assert "not comparable: baseline has no value" in page


def test_configuration_differences(tmp_path: Path) -> None:
    make_run(tmp_path, "run_0", curves=False)
    make_run(tmp_path, "run_1", sae="topk", k=64, curves=False)
    manifest = read_json(tmp_path / "run_1/manifest.json")
    manifest["config"]["sae"]["aux"] = {"coeff": 0.03}
    manifest["config"]["runs"] = [{"a": 1}]
    write_json(tmp_path / "run_1/manifest.json", manifest | {"device": "cuda"})
    table = table_of(tmp_path, "run_0", "run_1")
    assert table.baseline is not None
    assert chosen_differences(table.runs[1], table.baseline) == [
        ("SAE", "standard", "topk"),
        ("device", "cpu", "cuda"),
    ]
    found = {key: (was, now) for key, was, now in config_diff(table.runs[1], table.baseline)}
    assert found == {
        "device": ("cpu", "cuda"),
        "runs.0.a": (ABSENT, "1"),
        "sae.aux.coeff": (ABSENT, "0.03"),
        "sae.model._target_": (
            "sae_experiments.saes.standard.StandardSAE",
            "sae_experiments.saes.topk.TopkSAE",
        ),
        "sae.model.k": ("32", "64"),
    }
    text = " ".join(terminal(table, compare(table)).split())
    line = "run_1 differs from run_0: SAE standard -> topk; device cpu -> cuda"
    assert f"{line} (5 recorded settings)." in text
    assert "Times and speeds are from different devices (cpu, cuda)" in text


def test_tables_are_narrow_aligned_and_whole(tmp_path: Path) -> None:
    names = [f"run_{i}" for i in range(8)]
    for i, name in enumerate(names):
        label = "a label much longer than any column of the table can be, as a sweep would make it"
        preset = "full" if i == 6 else "laptop"
        make_run(
            tmp_path,
            name,
            sae="topk",
            k=8 * (i + 1),
            datasets=("enwik8", "text8"),
            preset=preset,
            curves=False,
            label=label,
        )
    table = table_of(tmp_path, *names)
    found = compare(table)
    for width in (60, 80, 100, 120):
        lines = terminal(table, found, width=width).splitlines()
        assert max(map(len, lines)) <= width
        heads = [line for line in lines if "FVU" in line]
        assert len(heads) == 2 and not any("…" in line for line in lines), "no head is cut"
    assert "\033" not in "\n".join(lines)
    assert "\033[3" in terminal(table, found, colour=True)
    for dataset in table.datasets:
        chosen = headline(table, dataset)
        assert len(chosen) <= MOST and "sae_mse" not in chosen  # shown: false
    back = pd.read_csv(io.StringIO(found.to_csv(index=False)))
    assert len(back) == 8 * 2 * 10
    assert set(back["metric"]) >= {"sae_mse", "sae_fvu"}
    page = markdown(table, found)
    assert page.count("| run_7: ") == 2 * 9
    assert "STAND-IN" not in page


def test_stand_in_text_is_said_aloud(tmp_path: Path) -> None:
    for name in ("run_0", "run_1"):
        make_run(tmp_path, name, stand_in=True, curves=False)
    table = table_of(tmp_path, "run_0", "run_1")
    assert "STAND-IN TEXT" in terminal(table, compare(table))
    assert "STAND-IN TEXT" in markdown(table, compare(table))
    assert row(table, "run_1", "sae_fvu")["not_comparable"] == ""


def test_a_delta_below_the_noise_of_the_evaluation_is_not_called_better(tmp_path: Path) -> None:
    for name, shift in (("run_0", 0.0), ("run_1", 0.02)):
        make_run(tmp_path, name)
        for seed in range(3):
            value = 1.0 + shift + 0.001 * seed**2
            record = Record(
                dataset="shakespeare_char",
                seed=seed,
                metrics={"m": value, "n": value},
                noise={"m": 0.01 + 0.001 * seed},
            )
            write_record(tmp_path / name, record)
    table = table_of(tmp_path, "run_0", "run_1")
    noisy, exact = (row(table, "run_1", metric) for metric in ("m", "n"))
    assert noisy["believable"] == pytest.approx(2 * math.sqrt(2) * 0.012) and math.isnan(
        exact["believable"]
    )
    assert noisy["delta"] == pytest.approx(0.02) and (noisy["verdict"], exact["verdict"]) == (
        "",
        "differs",
    )


def test_saes_of_one_run_are_compared_with_one_another(tmp_path: Path) -> None:
    saes = {"topk": 0.02, "gated": 0.021, "standard": 0.2}
    reports = [f"text8.{sae}" for sae in saes]
    make_run(tmp_path, "run_0", datasets=reports, config={"saes": saes}, curves=False)
    for sae, fvu in saes.items():
        for seed in range(3):
            metrics = {"sae_fvu": fvu + 0.002 * seed * (-1) ** len(sae), "sae_l0": 32.0}
            record = Record(dataset=f"text8.{sae}", seed=seed, metrics=metrics)
            write_record(tmp_path / "run_0", record)
    table = table_of(tmp_path, "run_0")
    rows = compare(table)
    places = rows[rows["metric"] == "sae_fvu"].set_index("sae")["place"].to_dict()
    assert places == {"gated": "best", "topk": "tied", "standard": "behind"}
    assert set(rows.loc[rows["metric"] == "sae_l0", "place"]) == {""}, "no direction, no best"
    text = terminal(table, rows, width=100)
    assert text.count("*") == 2, "one best mean, and a line that tells what the mark means"
    assert "not comparable" not in text.lower() and "differs" not in text.split("better, worse")[0]
    assert [line.split()[0] for line in text.splitlines() if line[:2] in ("ga", "st", "to")] == [
        "gated",
        "standard",
        "topk",
    ]


def test_rows_with_outliers_are_judged_by_the_ordinary_ones(tmp_path):
    """With outliers, the table, the picture and the sentences show the error of the others."""
    for name, sae, every, ordinary in (("run_0", "topk", 0.1, 0.5), ("run_1", "gated", 0.9, 0.2)):
        run = make_run(tmp_path, name, sae=sae, datasets=["text"], seeds=[0])
        (record,) = read_records(run)
        more = {"sae_fvu": every, "sae_fvu_ordinary": ordinary, "sae_outlier_frac": 1e-3}
        record.metrics.update(more)
        write_record(run, record)
        write_final_info(run, read_records(run))
    table = table_of(tmp_path, "run_0", "run_1")
    assert error_metric(table, "text") == "sae_fvu_ordinary"
    chosen = headline(table, "text")
    assert "sae_fvu_ordinary" in chosen
    assert "sae_fvu" not in chosen
    picture = str(sparsity_against_fidelity(table))
    assert "FVU 0.2" in picture
    assert "no outliers" in picture

"""The results schema: what is written, what is read back, and that damage is a warning and
never a traceback.
"""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from sae_experiments.errors import UserError
from sae_experiments.files import write_json
from sae_experiments.metric_info import MetricInfo, describe
from sae_experiments.metrics import reconstruction
from sae_experiments.results.leading import leading
from sae_experiments.results.names import CIRCUIT_ROLES, put_together, take_apart
from sae_experiments.results.records import (
    NOT_FINITE,
    PUBLISHED,
    CurveWriter,
    Record,
    aggregate,
    load_arrays,
    mean_stderr,
    means_of,
    read_curves,
    read_records,
    save_arrays,
    write_final_info,
    write_record,
)
from sae_experiments.results.table import find_runs, load_runs, load_table, published
from support.fake_runs import make_run


def strict(path: Path) -> object:
    """JSON as the standard has it: NaN and Infinity are errors."""

    def no(token: str) -> None:
        raise AssertionError(f"{token} in {path}")

    return json.loads(path.read_text(), parse_constant=no)


def record(seed: int, dataset: str = "text8", **metrics: float | None) -> Record:
    return Record(dataset=dataset, seed=seed, metrics=metrics)


def test_a_record_survives_the_disk(tmp_path: Path) -> None:
    written = Record(
        dataset="text8",
        seed=3,
        metrics={"a": 1.5, "b": None},
        why_null={"b": "no dead latents"},
        seconds={"lm": 2.0},
        config_hash="c",
        source_hash="s",
    )
    write_record(tmp_path, written)
    assert read_records(tmp_path) == [written]
    assert strict(tmp_path / "final_info_text8_3.json") == {"a": 1.5, "b": None}
    assert sorted(strict(tmp_path / "cells" / "text8_3.json")) == [
        "checksum",
        "config_hash",
        "dataset",
        "facts",
        "files",
        "metrics",
        "noise",
        "seconds",
        "seed",
        "source_hash",
        "warnings",
        "why_null",
    ]  # type: ignore[call-overload]


def test_numbers_that_json_lacks_become_null_with_a_reason() -> None:
    found = Record(
        dataset="d",
        seed=0,
        metrics={
            "nan": math.nan,
            "inf": -math.inf,
            "said": np.float32("nan"),
            "null": None,
            "fine": np.float32(0.5),
        },  # type: ignore[dict-item]
        why_null={"said": "constant input", "fine": "stale reason"},
        seconds={"lm": math.nan, "sae": 1.0},
    )
    assert found.metrics == {"nan": None, "inf": None, "said": None, "null": None, "fine": 0.5}
    assert found.why_null == {
        "nan": NOT_FINITE,
        "inf": NOT_FINITE,
        "said": "constant input",
        "null": "no value and no reason given",
    }
    assert found.seconds == {"sae": 1.0}


@pytest.mark.parametrize("name", ["", "a/b", "..\\a", "a b", "é", "a\n"])
def test_a_dataset_must_be_able_to_name_a_file(name: str) -> None:
    with pytest.raises(UserError, match="dataset="):
        record(0, dataset=name)
    with pytest.raises(UserError, match="seed="):
        Record(dataset="ok", seed=True, metrics={})


def test_means_and_standard_errors() -> None:
    assert mean_stderr([1.0, 2.0, 4.0]) == (
        pytest.approx(7 / 3),
        pytest.approx(math.sqrt(7 / 3) / math.sqrt(3)),
        3,
    )
    assert mean_stderr([0.1, 0.1, 0.1]) == (0.1, 0.0, 3)
    assert mean_stderr([5.0]) == (5.0, None, 1)
    assert mean_stderr([5.0, None, math.nan]) == (5.0, None, 1)
    assert mean_stderr([None]) == (None, None, 0)
    assert mean_stderr([1e308, 1e308])[0] == 1e308


def test_aggregate_is_exactly_the_contract() -> None:
    records = [
        record(2, m=3.0, late=1.0),
        record(0, m=1.0),
        record(1, m=math.nan),
        record(0, "enwik8", m=7.0),
    ]
    assert aggregate(records) == {
        "enwik8": {
            "means": {"m_mean": 7.0},
            "more_means": {},
            "stderrs": {"m_stderr": None},
            "final_info_dict": {"m": [7.0]},
        },
        "text8": {
            "means": {"m_mean": 2.0, "late_mean": 1.0},
            "more_means": {},
            "stderrs": {"m_stderr": 1.0, "late_stderr": None},
            "final_info_dict": {"m": [1.0, None, 3.0], "late": [None, None, 1.0]},
        },
    }
    with pytest.raises(UserError, match="seed=0"):
        aggregate([record(0, m=1.0), record(0, m=2.0)])


def test_final_info_is_standard_json_and_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    records = [record(s, m=s / 3, n=math.inf) for s in range(3)]
    write_final_info(tmp_path / "a", records)
    write_final_info(tmp_path / "b", records[::-1])
    assert (tmp_path / "a/final_info.json").read_bytes() == (
        tmp_path / "b/final_info.json"
    ).read_bytes()
    content = strict(tmp_path / "a/final_info.json")
    assert content["text8"]["means"] == {"m_mean": pytest.approx(1 / 3)}
    assert content["text8"]["more_means"] == {"n_mean": None}


def test_callers_get_at_most_ten_means_the_leading_ones_first_and_the_published_four() -> None:
    many = {f"m{i:02}": float(i) for i in range(30)} | {"sae_fvu": math.nan}
    many |= dict.fromkeys(PUBLISHED, 1.0)
    entry = aggregate([record(0, **many)], ["m07", "nothing", "sae_fvu", "m03"])["text8"]
    names = [key.removesuffix("_mean") for key in entry["means"]]
    assert names == ["m07", "m03", "m00", "m01", "m02", "m04", *PUBLISHED]
    assert set(means_of(entry)) == {f"{name}_mean" for name in many}
    assert not set(entry["means"]) & set(entry["more_means"])
    assert means_of({"means": {"x_mean": 1}}) == {"x_mean": 1}, "a file of another program"


def test_where_rows_are_outliers_the_error_of_the_others_leads() -> None:
    order = leading(reconstruction.INFO)
    fvus = {"sae_fvu": 0.003, "sae_fvu_ordinary": 0.4}
    for share, first in ((0.02, "sae_fvu_ordinary"), (0.0, "sae_fvu")):
        metrics = dict.fromkeys(PUBLISHED, 1.0) | fvus | {"sae_outlier_frac": share}
        means = aggregate([record(0, **metrics)], order)["text8"]["means"]
        assert next(iter(means)) == f"{first}_mean"


def test_damaged_cells_are_one_warning_each(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_record(tmp_path, record(0, m=1.0))
    cells = tmp_path / "cells"
    (cells / "text8_1.json").write_text('{"dataset": "text8", "se')
    write_json(cells / "text8_2.json", {"dataset": "text8", "seed": 2})
    write_json(cells / "text8_3.json", [1, 2])
    write_json(cells / "text8_4.json", {"dataset": "text8", "seed": 4, "metrics": {"m": "high"}})
    (cells / "text8_0 (copy).json").write_bytes((cells / "text8_0.json").read_bytes())
    (cells / "text8_5.json").mkdir()
    with caplog.at_level(logging.WARNING):
        assert [r.seed for r in read_records(tmp_path)] == [0]
    assert len(caplog.messages) == 6
    assert all("\n" not in message for message in caplog.messages)


def test_curves_go_on_after_a_kill(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with CurveWriter(tmp_path, "d", 0, resume=True) as out:
        out.write(1, "loss", 2.0)
        out.write(2, "loss", math.nan)
    path = tmp_path / "curves" / "d_0.jsonl"
    path.write_text(path.read_text() + '{"step": 3, "na')
    assert read_curves(tmp_path, "d", 0) == [(1, "loss", 2.0), (2, "loss", None)]
    assert not caplog.messages  # a torn last line is what a kill leaves
    with CurveWriter(tmp_path, "d", 0, resume=True) as out:
        out.write(2, "loss", 1.5)
    assert read_curves(tmp_path, "d", 0) == [(1, "loss", 2.0), (2, "loss", 1.5)]
    path.write_text('{"step": 1}\nnonsense\n[]\n{"step": 4, "name": "loss", "value": 1}\n')
    assert read_curves(tmp_path, "d", 0) == [(4, "loss", 1.0)]
    assert caplog.messages == [f"{path}: 3 unreadable lines left out"]
    with CurveWriter(tmp_path, "d", 0, resume=False) as out:
        out.write(9, "loss", 0.0)
    assert read_curves(tmp_path, "d", 0) == [(9, "loss", 0.0)]
    assert read_curves(tmp_path, "d", 1) == []


def test_arrays_without_pickle(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_arrays(
        tmp_path, "d", 0, {"density_hist": np.arange(4), "density_edges": np.linspace(-7, 0, 5)}
    )
    found = load_arrays(tmp_path, "d", 0)
    assert found["density_hist"].tolist() == [0, 1, 2, 3]
    assert load_arrays(tmp_path, "d", 7) == {}
    with pytest.raises(ValueError, match="dtype object"):
        save_arrays(tmp_path, "d", 1, {"x": np.array([{}], dtype=object)})
    path = tmp_path / "arrays" / "d_0.npz"
    for damaged in (b"PK nonsense", path.read_bytes()[:-30], b""):
        path.write_bytes(damaged)
        assert load_arrays(tmp_path, "d", 0) == {}
    assert len(caplog.messages) == 3


def test_runs_are_found_in_order_and_one_level_deep(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("run_10", "run_2", "sweep/a", "sweep/b"):
        write_json(tmp_path / "runs" / name / "manifest.json", {})
    assert [p.name for p in find_runs([tmp_path / "runs"])] == ["run_2", "run_10"]
    assert [
        p.name
        for p in find_runs(
            [tmp_path / "runs" / "sweep", tmp_path / "runs" / "run_2", tmp_path / "runs"]
        )
    ] == ["a", "b", "run_2", "run_10"]
    assert find_runs([tmp_path, tmp_path / "none"]) == []
    assert "holds no run itself, but runs in it does" in caplog.messages[0]
    assert "is no folder" in caplog.messages[1]


def _rows(table, run: str, metric: str):
    values = table.frame
    return values[(values["run"] == run) & (values["metric"] == metric)]


def test_bad_runs_do_not_hide_good_ones(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = make_run(tmp_path, "run_0", curves=False)
    running = make_run(tmp_path, "run_1", seeds=(0,), status="running", curves=False)
    empty = tmp_path / "run_2"
    write_json(empty / "manifest.json", {"status": "running"})
    broken = make_run(tmp_path, "run_3", curves=False)
    (broken / "manifest.json").write_text("{")
    foreign = tmp_path / "run_4"  # another program's run: no manifest, no cells, lists and means
    final_info = {
        "text8": {
            "means": {"m_mean": 2.0, "n_mean": "x"},
            "stderrs": {"m_stderr": 9},
            "final_info_dict": {"m": [1.0, 3.0]},
        },
        "bad": 3,
    }
    write_json(foreign / "final_info.json", final_info)
    runs = load_runs([good, running, empty, broken, foreign])
    assert [run.name for run in runs] == ["run_0", "run_1", "run_3", "run_4"]
    assert "run_1 is still running: what it has finished is shown (cells: 1)" in caplog.messages
    assert "run_2 has no results (status running); left out" in caplog.messages
    assert all("\n" not in message for message in caplog.messages)
    stat = runs[-1].stats["text8"]["m"]
    assert (stat.mean, stat.stderr, stat.n, stat.values) == (2.0, 1.0, 2, {})
    table = load_table([good, running, empty, broken, foreign])
    assert table.baseline is table.runs[0]
    columns = ["run", "dataset", "sae", "seed", "metric", "value", "noise"]
    assert table.frame.columns.tolist() == columns
    assert _rows(table, "run_4", "m")["seed"].isna().all()
    assert _rows(table, "run_0", "sae_fvu")["seed"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("key", ["saes", "arms"])  # `arms` until version 0.2
def test_results_of_several_saes_have_dataset_and_sae_in_columns(tmp_path: Path, key: str) -> None:
    saes = ("topk", "batch_topk", "topk-target_l0_8", "topk-target_l0_16")
    reports = [put_together(corpus, sae) for corpus in ("enwik8", "my.text") for sae in saes]
    config = {key: {sae: {"model": {}} for sae in saes}}
    make_run(tmp_path, "run_0", datasets=reports, config=config, curves=False)
    make_run(tmp_path, "run_1", sae="gated", datasets=["enwik8"], curves=False)
    table = load_table([tmp_path / "run_0", tmp_path / "run_1"])
    cells = table.frame[["run", "dataset", "sae"]].drop_duplicates()
    expected = {("run_0", corpus, sae) for corpus in ("enwik8", "my.text") for sae in saes}
    assert set(cells.itertuples(index=False, name=None)) == expected | {
        ("run_1", "enwik8", "gated")
    }
    assert table.datasets == ["enwik8", "my.text"]
    for record in read_records(tmp_path / "run_0"):
        dataset, sae = take_apart(record.dataset, saes)
        assert put_together(dataset, sae) == record.dataset
        frame = table.frame
        mine = frame[
            (frame["dataset"] == dataset) & (frame["sae"] == sae) & (frame["seed"] == record.seed)
        ]
        assert dict(zip(mine["metric"], mine["value"], strict=True)) == record.metrics


def test_the_parts_of_a_circuit_are_its_saes(tmp_path: Path) -> None:
    reports = [put_together("enwik8", role) for role in ("", *CIRCUIT_ROLES)]
    config = {"study": {role: {} for role in CIRCUIT_ROLES}}
    table = load_table([make_run(tmp_path, "c", datasets=reports, config=config, curves=False)])
    assert [(run.name, run.sae, *run.stats) for run in table.runs] == [
        ("c", "", "enwik8"),
        ("down", "down", "enwik8"),
        ("up", "up", "enwik8"),
    ]


def test_runs_of_the_same_name_keep_apart(tmp_path: Path) -> None:
    paths = [make_run(tmp_path / root, "run_1", curves=False) for root in ("a", "b")]
    assert [run.name for run in load_runs(paths)] == ["a/run_1", "b/run_1"]


def test_which_run_is_the_baseline(tmp_path: Path) -> None:
    run_1, run_2 = (make_run(tmp_path, name, curves=False) for name in ("run_1", "run_2"))
    assert load_table([run_1, run_2]).baseline is None
    table = load_table([run_1, run_2], baseline="run_2")
    assert table.baseline is table.runs[1]
    make_run(tmp_path, "run_0", curves=False)
    table = load_table([run_1, run_2])
    assert [run.name for run in table.runs] == ["run_0", "run_1", "run_2"]
    assert table.baseline is table.runs[0]
    assert len(load_table([run_1], baseline=str(run_1)).runs) == 1
    with pytest.raises(UserError, match="baseline=run_9"):
        load_table([run_1], baseline="run_9")
    full = make_run(tmp_path / "elsewhere/deep", "run_1", preset="full", curves=False)
    found = load_table([full]).baseline
    assert found is not None
    assert found.name == "published"


def test_the_published_figures() -> None:
    stats = published().stats
    assert stats["shakespeare_char"]["best_val_loss"].mean == 1.4693279266357422
    assert stats["text8"]["total_train_time"].mean == 2351.458997964859
    assert {metric.stderr for by_metric in stats.values() for metric in by_metric.values()} == {
        None
    }
    assert {len(by_metric) for by_metric in stats.values()} == {4}


def test_metric_infos_keep_their_order_through_the_manifest(tmp_path: Path) -> None:
    infos = [
        MetricInfo(
            name=name, title=name.title(), formula="f", unit="", better="up", shown=name != "a"
        )
        for name in ("z", "a")
    ]
    write_record(tmp_path / "run_0", record(0, z=1.0, a=2.0, unknown=3.0))
    write_json(tmp_path / "run_0" / "manifest.json", {"metrics": describe(infos)})
    table = load_table([tmp_path / "run_0"])
    assert table.metrics == ["z", "a", "unknown"]
    assert table.info("a")["shown"] is False
    assert table.info("unknown") | {"order": 0} == {
        "title": "unknown",
        "formula": "",
        "unit": "",
        "better": "none",
        "shown": True,
        "order": 0,
    }
    with pytest.raises(ValueError, match="better='sideways'"):
        # type: ignore[arg-type]
        MetricInfo(name="m", title="", formula="", unit="", better="sideways")


def test_fifty_runs_are_read_in_moments(tmp_path: Path) -> None:
    paths = [
        make_run(tmp_path, f"run_{i}", datasets=("enwik8", "text8"), seeds=(0, 1), curves=False)
        for i in range(50)
    ]
    start = time.monotonic()
    table = load_table(paths)
    assert len(table.frame) == 50 * 4 * 10
    assert time.monotonic() - start < 5


def test_nothing_here_imports_torch() -> None:
    code = (
        "import sys, sae_experiments.results.records, sae_experiments.results.compare,"
        " sae_experiments.report.figures, plot;from sae_experiments.plots import density,"
        " final_metrics, pareto, training_curves;print([m for m in ('torch', 'transformers',"
        " 'wandb', 'matplotlib.pyplot') if m in sys.modules])"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
    # experiment.py pays for neither
    light = (
        "import sys, sae_experiments.results.records; print([m for m in ('pandas', 'matplotlib') if"
        " m in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", light], cwd=root, capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )

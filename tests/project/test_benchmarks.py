"""The benchmarks at tiny sizes: turns are taken in turn, tables say what was measured, results
come back from disk.
"""

from __future__ import annotations

import json
import sys

import pytest

from sae_experiments.results.records import Record, write_record
from support.common import ROOT

sys.path.append(str(ROOT / "benchmarks"))
hierarchy_table = pytest.importorskip("hierarchy_table")
metrics_table = pytest.importorskip("metrics_table")
purification_table = pytest.importorskip("purification_table")
tables = pytest.importorskip("tables")
workers = pytest.importorskip("workers")


@pytest.fixture(scope="module")
def host():
    with workers.Host(["contestants", "language_contestants"], threads=1) as host:
        yield host


def test_a_worker_makes_the_steps_it_is_told_and_no_others(host):
    work = {"variant": "batch_topk", "d": 16, "m": 64, "k": 4, "batch": 64}
    with (
        host.start("contestants:ours", **work) as a,
        host.start("contestants:ours", **work, copies=2) as b,
    ):
        first, both = a.run(3), b.run(2)
        assert (
            len(first) == 3
            and len(both) == 2
            and all(wall > 0 and cpu >= 0 for wall, cpu in first + both)
        )
        loss = a.info["loss"]
        assert a.info["active"] == 4 and a.info["sparse"] and a.peak > 0
        a.run(5)
        assert a.info["loss"] < loss  # it is training
        assert b.run(1) and len(b.run(4)) == 4


def test_a_contestant_that_fails_says_why(host):
    with pytest.raises(workers.ContestantError, match="no_such_variant"):
        host.start("contestants:ours", variant="no_such_variant", d=16, m=64, k=4, batch=64)
    with pytest.raises(workers.ContestantError, match="AttributeError"):
        host.start("contestants:nothing_here")


@pytest.mark.parametrize(
    ("call", "args"),
    [
        ("contestants:encoder_product", {"d": 8, "m": 32, "batch": 16, "library": "onednn"}),
        ("contestants:encoder_product", {"d": 8, "m": 32, "batch": 16, "library": "bf16"}),
        ("contestants:plain_sae", {"variant": "topk", "d": 8, "m": 32, "k": 2, "batch": 16}),
        ("contestants:matrix_rate", {"size": 32, "library": "default"}),
        ("language_contestants:train_ours", {"preset": "smoke"}),
        ("language_contestants:train_plain", {"preset": "smoke"}),
        ("language_contestants:generate_ours", {"preset": "smoke", "rows": 2, "length": 3}),
        ("language_contestants:generate_plain", {"preset": "smoke", "rows": 2, "length": 3}),
        ("language_contestants:collect_ours", {"preset": "smoke", "batch": 2}),
        ("language_contestants:collect_plain", {"preset": "smoke", "batch": 2}),
    ],
)
def test_every_contestant_runs(host, call, args):
    with host.start(call, **args) as worker:
        assert len(worker.run(2)) == 2


def test_ratios_are_medians_over_rounds_not_ratios_of_medians():
    results = {
        "a": {"rounds": [10.0, 30.0, 20.0]},
        "b": {"rounds": [1.0, 10.0, 4.0]},
        "c": {"failed": "no"},
    }
    assert tables.ratio(results, "a", "b") == 5.0
    assert tables.ratio(results, "a", "c") is None


def test_the_table_of_steps_names_the_fastest_peer_and_the_leanest(tmp_path, capsys):
    def found(ms, peak):
        return {"ms": ms, "rounds": [ms, ms], "peak": peak << 20, "info": {"active": 32.0}}

    results = {
        "product, default": found(2.0, 0),
        "product, onednn": found(1.0, 0),
        "product, bf16": found(0.5, 0),
        "ours": found(4.0, 60),
    }
    results |= {
        "sae-lens": found(20.0, 100),
        "dictionary-learning": found(16.0, 120),
        "dictionary-learning, tuned": found(8.0, 120),
    }
    about = tables.machine() | {
        "threads": 1,
        "rounds": 2,
        "versions": {"ours": {"torch": "2"}},
        "peers": True,
        "note": "a note",
    }
    data = {
        "groups": [{"d": 8, "m": 64, "variant": "topk", "results": results}],
        "gflops": {"default": 100.0},
        "about": about,
    }
    tables.write(tmp_path, "steps", data)
    text = (tmp_path / "steps.md").read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if line.startswith("| topk | 1 / 2 / 0.5"))
    assert "**4.00** | 2.00 | 4.00 | 2.00 |" in row
    assert "| topk | 60 | sae-lens 100, dictionary-learning 120 | 0.60 |" in text
    assert json.loads((tmp_path / "steps.json").read_text()) == data and "processor time" in text


def test_stages_of_a_run_are_summed_over_its_cells(tmp_path):
    (tmp_path / "cells").mkdir()
    for i, seconds in enumerate(({"lm": 1.0, "metric.rules": 2.5}, {"lm": 3.0})):
        (tmp_path / "cells" / f"c_{i}.json").write_text(json.dumps({"seconds": seconds}))
    lines = tables.RENDER["jobs"]({"run": "run_0", "cells": tables.stages(tmp_path)})
    assert "| lm | 1.0 | 3.0 | 4.0 |" in lines and "| metric.rules | 2.5 | - | 2.5 |" in lines


def test_quality_takes_a_peers_best_rate_at_about_the_asked_l0(tmp_path):
    quality = pytest.importorskip("quality")
    fits = {
        "ours_topk_32.0_9": (0.02, 32),
        "sae-lens_topk_9_lr0.002": (0.03, 32),
        "sae-lens_topk_9_lr0.005": (0.025, 32),
        "sae-lens_gated_9_lr0.002": (0.01, 200.0),
        "sae-lens_gated_9_lr0.005": (0.04, 30.04),
        "ours_gated_30.0_9": (0.02, 30.0),
    }
    for name, (fvu, l0) in fits.items():
        (tmp_path / f"{name}.json").write_text(
            json.dumps({"fvu": fvu, "l0": l0, "dead": 0.0, "seconds": 1.0})
        )
    found = quality.Bench(tmp_path, 9, 1).found()
    assert found["topk"]["sae-lens"]["lr"] == 0.005 and found["topk"]["sae-lens"]["rates"] == [
        0.002,
        0.005,
    ]
    assert (
        found["gated"]["sae-lens"]["fvu"] == 0.04
    )  # the better one has six times the active latents
    assert found["gated"]["ours at sae-lens's L0"]["fvu"] == 0.02
    about = tables.machine() | {"threads": 1, "rounds": 1, "versions": {}}
    tables.write(
        tmp_path,
        "quality",
        {"m": 8, "l0": 32, "batch": 4, "steps": 9, "variants": found, "about": about},
    )
    assert (
        "| topk | sae-lens (0.002, 0.005) | 0.005 | 32.0 | 0.0250 | 0.000 | 1 |"
        in (tmp_path / "quality.md").read_text()
    )


def test_the_tables_of_the_hierarchy_hold_what_its_runs_measured(tmp_path):
    """Means with standard errors, changes paired by seed, and a gap for what is missing."""
    values = {"run_1": {0: 0.02, 1: 0.04}, "run_2": {0: 0.022, 1: 0.042}, "run_0": {0: 0.01}}
    for run, seeds in values.items():
        for seed, fvu in seeds.items():
            write_record(
                tmp_path / run,
                Record(
                    dataset="shakespeare_char",
                    seed=seed,
                    metrics={"sae_fvu": fvu, "bottom_sparsity": 0.9},
                ),
            )
    lines = hierarchy_table.tables(tmp_path).splitlines()
    fvu = next(line for line in lines if line.startswith("| FVU |"))
    assert fvu == "| FVU | 0.0300 ± 0.0100 | 0.0320 ± 0.0100 | +7.5 ± 2.5 % | - | - | - | - |"
    assert next(line for line in lines if line.startswith("| run_0 |")).startswith(
        "| run_0 | 0.0100 | - |"
    )


def test_the_tables_of_metrics_have_a_row_per_metric_and_a_column_per_sae(tmp_path):
    found = {"topk": {"sae_fvu": 0.0123456, "rule_f1": None}, "random": {"sae_fvu": 0.5}}
    for sae, metrics in found.items():
        metrics = metrics | {"best_val_loss": 1.5, "sae_train_time": 9.0}
        write_record(tmp_path, Record(dataset=f"text8.{sae}", seed=0, metrics=metrics))
    infos = {
        "sae_fvu": {"better": "down", "order": 7},
        "rule_f1": {"better": "up", "order": 1},
        "best_val_loss": {"better": "down"},
        "sae_train_time": {"better": "down"},
    }
    (tmp_path / "manifest.json").write_text(json.dumps({"metrics": infos}))
    head, fvu = "| metric | better | random | topk |", "| sae_fvu | down | 0.5 | 0.0123 |"
    lines = metrics_table.tables(tmp_path).splitlines()
    assert lines == ["## text8", "", head, "|---|---|---|---|", fvu]


def test_the_purification_tables_compare_each_sae_with_the_host_of_its_cell(tmp_path):
    measured = {
        "run_0": ("batch_topk", {0: (0.02, 10.0), 1: (0.01, 8.0)}),
        "run_1": ("purified", {0: (0.019, 4.0), 1: (0.011, 4.0), 2: (0.5, 1.0)}),
    }
    for run, (sae, cells) in measured.items():
        folder = tmp_path / run
        for seed, (fvu, change) in cells.items():
            metrics = {"sae_fvu": fvu, "rob_change_mask": change, "rob_change_mean": change}
            write_record(folder, Record(dataset="text8", seed=seed, metrics=metrics))
        manifest = {"config": {}, "status": "complete", "overrides": [f"sae={sae}"]}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    fits = list(purification_table.fits([tmp_path / run for run in measured]))
    assert {fit.sae for fit in fits} == {"batch_topk", "purified"}
    lines = purification_table.tables(fits, "batch_topk").splitlines()
    mask = [line.split(" | ") for line in lines if line.startswith("| text8")]
    cells = {row[0].removeprefix("| "): row[1:] for row in mask[:4]}
    assert set(cells) == {
        "text8 0: batch_topk (`run_0`)",
        "text8 1: batch_topk (`run_0`)",
        "text8 0: purified (`run_1`)",
        "text8 1: purified (`run_1`)",  # seed 2 has no host
    }
    assert cells["text8 0: purified (`run_1`)"][0] == "0.0190 (-5.0 %)"
    assert cells["text8 0: purified (`run_1`)"][4] == "4.0 (0.40)"
    assert cells["text8 1: batch_topk (`run_0`)"][4] == "8.0"
    stability = lines.index(next(line for line in lines if line.startswith("| host -> SAE")))
    assert lines[stability + 2].startswith("| text8 0: purified (`run_1`) | 10.0 -> 4.0 (0.40) |")

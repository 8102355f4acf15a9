"""The last lines of a run's output, which programs read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sae_experiments.cli.closing import block


def run_folder(folder: Path, saes: list[str], fvus: dict[str, float | None]) -> Path:
    config = {"saes": {key: {} for key in saes}} if len(saes) > 1 else {"sae": {}}
    times = {"started": "2026-01-01T00:00:00", "ended": "2026-01-01T00:01:30"}
    (folder / "manifest.json").write_text(json.dumps({"config": config, **times}))
    means = {name: {"means": {"sae_fvu_mean": fvu}} for name, fvu in fvus.items()}
    (folder / "final_info.json").write_text(json.dumps(means))
    return folder


def test_metrics_of_one_sae_are_means_over_the_datasets(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, ["topk"], {"enwik8": 0.1, "text8": 0.3, "a.b": None})
    lines = block(folder).splitlines()
    assert lines[:3] == ["---", "sae_fvu: 0.200000", "total_seconds: 90.0"]
    assert lines[3].startswith("peak_memory_mb: ")


def test_each_of_several_saes_has_its_own_numbers(tmp_path: Path) -> None:
    names = ["topk", "jumprelu-target_l0_8.5", "k-topk"]
    fvus = {
        f"{corpus}.{n}": i + 0.5 * j for i, n in enumerate(names) for j, corpus in enumerate("xy")
    }
    lines = block(run_folder(tmp_path, names, fvus)).splitlines()
    expected = ["---"]
    for i, name in enumerate(names):
        expected += [f"sae: {name}", f"sae_fvu: {i + 0.25:.6f}"]
    assert lines[:-2] == expected


@pytest.mark.parametrize("fvu", [None, 0.25])
def test_a_metric_without_a_value_has_no_line(tmp_path: Path, fvu: float | None) -> None:
    text = block(run_folder(tmp_path, ["topk"], {"enwik8": fvu}))
    assert ("sae_fvu" in text) == (fvu is not None)


def test_a_circuit_comes_before_its_two_saes(tmp_path: Path) -> None:
    fvus = {"enwik8": 1.0, "enwik8.up": 2.0, "enwik8.down": 3.0}
    folder = run_folder(tmp_path, ["topk"], fvus)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["config"]["study"] = {"up": {}, "down": {}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    expected = ["sae_fvu: 1.000000", "sae: up", "sae_fvu: 2.000000", "sae: down"]
    assert block(folder).splitlines()[1:6] == [*expected, "sae_fvu: 3.000000"]

"""Command lines run in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sae_experiments.cli.main import main
from sae_experiments.results.records import load_arrays
from support.common import CONF, TIMED, Experiment


def in_this_process(experiment: Experiment, *args: str, tiny: bool = True) -> int:
    """As typed in the folder of ``experiment``, without the seconds of importing torch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(experiment.here)
        patch.setenv("SAE_CACHE", str(experiment.cache))
        argv = experiment.command(*args, tiny=tiny)[2:]
        return main(argv, plan="variants", extra=[], conf=CONF)


def assert_is_refused(
    experiment: Experiment,
    capsys: pytest.CaptureFixture[str],
    told: str,
    *args: str,
    tiny: bool = True,
) -> None:
    """A command ends with status 2 and one line on stderr, and leaves no run folder."""
    assert in_this_process(experiment, "--out_dir=bad", *args, tiny=tiny) == 2
    stderr = capsys.readouterr().err
    assert told in stderr and len(stderr.splitlines()) == 1
    assert not (experiment.runs / "bad").exists()


def lasting(run: Path, report: str = "text8_0") -> dict[str, Any]:
    """Everything a cell left behind that no clock has a part in."""
    cell = json.loads((run / "cells" / f"{report}.json").read_text())
    dataset, _, seed = report.rpartition("_")
    return {
        "metrics": {k: v for k, v in cell["metrics"].items() if k not in TIMED},
        "why_null": cell["why_null"],
        "curves": sorted((run / "curves" / f"{report}.jsonl").read_text().splitlines()),
        "arrays": {k: repr(v.tolist()) for k, v in load_arrays(run, dataset, int(seed)).items()},
        "sae": {p.name: p.read_bytes() for p in sorted((run / "saes" / report).iterdir())},
    }


def assert_same(a: dict[str, Any], b: dict[str, Any], *, but: tuple[str, ...] = ()) -> None:
    different = [k for k in a if k not in but and a[k] != b[k]]
    assert not different, {k: (a[k], b[k]) for k in different if k == "metrics"} or different

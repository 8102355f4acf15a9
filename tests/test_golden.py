"""Golden numbers: the first losses and results of every study and SAE variant stay what they
were.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from support import golden

#: Jobs whose rows do not come from a model that was trained here: rounding differences between
#: kinds of processors stay small enough in them to compare losses elsewhere.
PORTABLE = ("planted", "palindrome")
#: With the instructions of another processor (ATEN_CPU_CAPABILITY=avx2) all losses agree to 1e-6
#: over ten steps but JumpReLU's, where one entry crosses its threshold in step 3 (1.8e-6).
PORTABLE_STEPS = 3
REMEDY = "if the change is meant to move it: make golden, and say why in the commit"


@pytest.fixture(scope="module", params=list(golden.jobs()))
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A golden job's name, its stored numbers and the numbers of today."""
    name = request.param
    stored = json.loads((golden.FOLDER / f"{name}.json").read_text())
    return name, stored, golden.run_job(name, tmp_path_factory.mktemp(name))


def test_golden_numbers_are_unchanged(job):
    name, stored, today = job
    if stored["machine"] == golden.machine():
        for kind in ("losses", "results"):
            assert today[kind].keys() == stored[kind].keys()
            for key, value in stored[kind].items():
                assert today[kind][key] == value, f"{name}: {kind} of {key} moved; {REMEDY}"
    elif name in PORTABLE:
        for key, value in stored["losses"].items():
            expected = pytest.approx(value[:PORTABLE_STEPS], rel=1e-6)
            assert today["losses"][key][:PORTABLE_STEPS] == expected, f"{name}: {key} moved"
    else:
        models = [key for key in stored["losses"] if key.endswith(("/lm", "/toy"))]
        assert models
        for key in models:
            assert today["losses"][key][0] == pytest.approx(stored["losses"][key][0], rel=1e-6)


def test_every_job_has_golden_numbers():
    assert {p.stem for p in Path(golden.FOLDER).glob("*.json")} == set(golden.jobs())

"""Every benchmark runs as a command, at the smallest sizes it takes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from support.common import ROOT

#: Arguments that keep a benchmark to seconds; `OUT` is a folder of the test's.
SMALL = {
    "bench": [
        *("steps", "--sizes", "16x64", "--variants", "topk", "matryoshka", "--rounds", "1"),
        *("--threads", "1", "--quick", "--out", "OUT"),
    ],
    "circuits": [
        *("--width", "16", "--length", "16", "--layers", "4", "--expansion", "2", "--l0", "4"),
        *("--prompts", "2", "--targets", "20", "--few", "4", "--rounds", "1"),
    ],
    "collection": ["--help"],  # a model of 124 M parameters
    "hierarchy_table": None,  # its tables have tests of their own in test_benchmarks.py
    "purification": [
        *("--d_in", "8", "--d_sae", "32", "--batch", "64", "--l0", "4"),
        *("--steps", "2", "--rounds", "1"),
    ],
    "purification_table": None,
    "quality": ["--help"],  # activations of a trained model
    "rates": [
        *("fit", "planted:8", "--d-sae", "32", "--l0", "2", "--steps", "10", "--batch", "64"),
        *("--results", "OUT/rates.jsonl"),
    ],
    "scale": ["--model", "4096", "--rows", "5e6"],
    "superposition": ["--steps", "4", "--rounds", "1", "--instances", "2"],
    "variant_table": None,
}
#: Modules that the scripts share.
SHARED = {"contestants", "language_contestants", "peers", "rows", "tables", "workers"}


def test_every_script_is_listed() -> None:
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    assert scripts == set(SMALL) | SHARED


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, arguments in SMALL.items() if arguments])
def test_a_benchmark_runs(name: str, tmp_path: Path) -> None:
    arguments = [one.replace("OUT", str(tmp_path)) for one in SMALL[name] or ()]
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.strip()

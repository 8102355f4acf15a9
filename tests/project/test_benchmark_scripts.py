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
    "bench on a device": [
        *("steps", "lm", "--device", "cpu", "--sizes", "16x64", "--variants", "topk", "jumprelu"),
        *("--batch", "64", "--warm", "4", "--steps", "6", "--quick", "--out", "OUT"),
        *("--overrides", "lm.n_layer=1", "lm.n_embd=32", "lm.n_positions=16", "lm.n_head=2"),
        *("lm.samples=1", "lm.sample_length=20", "lm.train.batch_size=4"),
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
    "metrics_table": None,
    "purification_table": None,
    "quality": [
        *("--work", "OUT/work", "--out", "OUT", "--steps", "3", "--only", "ours:topk", "--threads"),
        *("1", "--overrides", "lm.n_layer=2", "lm.n_embd=16", "lm.n_head=2", "lm.n_positions=16"),
        *("data.shakespeare_char.stand_in=always", "lm.train.steps=2", "lm.train.batch_size=4"),
        *("lm.samples=1", "lm.sample_length=20", "fit.train_rows=8192"),
        *("fit.calibration_rows=4096", "fit.held_out_rows=4096"),
    ],
    "rates": [
        *("fit", "planted:8", "--d-sae", "32", "--l0", "2", "--steps", "10", "--batch", "64"),
        *("--results", "OUT/rates.jsonl"),
    ],
    "scale": ["--model", "4096", "--rows", "5e6"],
    "superposition": ["--steps", "4", "--rounds", "1", "--instances", "2"],
    "variant_table": None,
}
#: Modules that the scripts share.
SHARED = {"contestants", "device", "language_contestants", "peers", "rows", "tables", "workers"}


def test_every_script_is_listed() -> None:
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    assert scripts == {name.split()[0] for name in SMALL} | SHARED


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, arguments in SMALL.items() if arguments])
def test_a_benchmark_runs(name: str, tmp_path: Path) -> None:
    arguments = [one.replace("OUT", str(tmp_path)) for one in SMALL[name] or ()]
    script = ROOT / "benchmarks" / f"{name.split()[0]}.py"
    command = [sys.executable, str(script), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.strip()

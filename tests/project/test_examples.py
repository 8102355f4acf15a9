"""The scripts in examples/ run as they are, from any folder."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from support.common import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(script: str, *argv: str, cwd: object) -> str:
    """What `python examples/<script>` prints."""
    command = [sys.executable, str(ROOT / "examples" / script), *argv]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("examples")


def test_an_sae_is_fitted_to_a_tensor_and_its_directory_evaluated(folder):
    printed = run("fit_any_tensor.py", cwd=folder)
    assert float(printed.split("sae_fvu: ")[1].split()[0]) < 0.25
    assert float(printed.rsplit(" ", 1)[1]) < 1e-4
    np.save(folder / "rows.npy", np.random.default_rng(0).normal(size=(256, 64)).astype("float32"))
    table = run("evaluate_saelens.py", "my_sae", "rows.npy", cwd=folder)
    assert "sae_l0" in table and "sae_fvu" in table


def test_a_variant_of_ones_own_learns(folder):
    printed = run("new_variant.py", cwd=folder)
    assert float(printed.split("FVU ")[1].split()[0]) < 0.5


def test_every_example_has_a_test():
    assert {p.name for p in EXAMPLES} == {
        "fit_any_tensor.py",
        "evaluate_saelens.py",
        "new_variant.py",
    }

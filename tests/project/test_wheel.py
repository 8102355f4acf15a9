"""A wheel works from an empty folder, without a checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from support.common import ROOT, TINY

CODE = (
    "import sae_experiments as s; print(s.__file__); print(type(s.build_sae('topk', 8)).__name__)"
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, built without the network."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode != 0:
        pytest.skip("not a git checkout")
    for name in tracked.stdout.splitlines():
        if name.startswith(("sae_experiments/", "conf/", "templates/")) or "/" not in name:
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    options = ["--no-deps", "--no-build-isolation", "-q", "-w", str(folder)]
    command = [sys.executable, "-m", "pip", "wheel", *options, str(source)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return next(folder.glob("*.whl"))


def test_a_wheel_holds_every_file_that_the_package_reads(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    for path in (ROOT / "conf").rglob("*.yaml"):
        assert f"sae_experiments/conf/{path.relative_to(ROOT / 'conf').as_posix()}" in inside
    for path in (ROOT / "templates").rglob("*.*"):
        if "__pycache__" not in path.parts and path.is_file():
            assert f"sae_experiments/{path.relative_to(ROOT).as_posix()}" in inside
    for path in (ROOT / "sae_experiments").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert path.relative_to(ROOT).as_posix() in inside


def test_an_installed_wheel_runs_in_an_empty_folder(wheel, tmp_path):
    target, here = tmp_path / "installed", tmp_path / "empty"
    here.mkdir()
    options = ["--no-deps", "-q", "--target", str(target)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(wheel)], check=True)
    env = {**os.environ, "PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"}

    def python(*argv: str) -> str:
        command = [sys.executable, *argv]
        done = subprocess.run(command, cwd=here, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    file, name = python("-c", CODE).split()
    assert Path(file).is_relative_to(target) and name == "TopK"
    run = ["--out_dir=run_0", f"cache={tmp_path / 'cache'}", "data=[text8]", *TINY.split()]
    python("-m", "sae_experiments", *run, "data.text8.stand_in=always")
    assert (here / "runs" / "run_0" / "final_info.json").is_file()

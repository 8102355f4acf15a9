"""Files from strangers: no code of theirs runs, nothing is written outside, memory is bounded,
and what is wrong is one clear line.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sae_experiments.errors import UserError
from sae_experiments.files import read_json, write_json, write_sealed
from sae_experiments.results.records import load_arrays, read_curves, read_records
from sae_experiments.results.table import load_table
from sae_experiments.saes.saelens import load_sae
from support.common import ROOT
from support.fake_runs import make_run

DEEP = "[" * 200_000 + "]" * 200_000


class Trap:
    """Unpickled, it would leave a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def bomb() -> bytes:
    """An array of 8 TB of zeros, as its header says, in a few hundred bytes."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f8", "fortran_order": False, "shape": (1 << 40,)}
    )
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as folder:
        folder.writestr("x.npy", header.getvalue() + bytes(1000))
    return packed.getvalue()


def big(n: int = (1 << 30) + 1) -> bytes:
    """An archive that truly unpacks to more than a gigabyte."""
    packed = io.BytesIO()
    with (
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as folder,
        folder.open("x.npy", "w", force_zip64=True) as out,
    ):
        np.lib.format.write_array_header_1_0(
            out, {"descr": "|u1", "fortran_order": False, "shape": (n,)}
        )
        zeros = bytes(1 << 24)
        for _ in range(n // len(zeros)):
            out.write(zeros)
    return packed.getvalue()


def trapped(mark: Path) -> bytes:
    packed = io.BytesIO()
    np.savez(packed, x=np.array([Trap(mark)], dtype=object))
    return packed.getvalue()


def link(target: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.unlink()
        path.symlink_to(target)

    return make


def text(content: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(content) and None


FILES = [
    "manifest.json",
    "final_info.json",
    "cells/shakespeare_char_0.json",
    "curves/shakespeare_char_0.jsonl",
    "arrays/shakespeare_char_0.npz",
]
CONTENTS: dict[str, Callable[[Path], Any]] = {
    "deep": text(DEEP),
    "a list": text("[]"),
    "a number": text("1e999"),
    "null": text("null"),
    "not text": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "empty": text(""),
    "endless": link("/dev/zero"),
    "another file": link("/etc/passwd"),
    "loop": lambda path: link(path.name)(path),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "nothing there": link("/nonexistent"),
    "strange keys": text(
        json.dumps(
            {
                "../../x": {"means": {"../../y": 1}},
                "": {},
                "a\u0000b": [],
                "metrics": {"\u202e": None},
                "config": 3,
                "corpora": [],
            }
        )
    ),
    "a huge number": text('{"dataset": "shakespeare_char", "seed": ' + "9" * 5000 + "}"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_run_folder_hides_no_other_and_harms_nothing(tmp_path, name, caplog):
    runs = tmp_path / "runs"
    make_run(runs, "run_0", seeds=(0,))
    for i, make in enumerate(CONTENTS.values()):
        make_run(runs, f"run_{i + 1}", seeds=(0,))
        make(runs / f"run_{i + 1}" / name)
    if name.endswith("npz"):
        for i, content in enumerate((bomb(), trapped(tmp_path / "mark"))):
            make_run(runs, f"run_9{i}", seeds=(0,))
            (runs / f"run_9{i}" / name).write_bytes(content)
    before = set(tmp_path.rglob("*"))
    table = load_table(sorted(p for p in runs.iterdir()))
    assert "run_0" in [run.name for run in table.runs]
    for run in table.runs:
        assert run.path is not None
        read_records(run.path)
        read_curves(run.path, "shakespeare_char", 0)
        load_arrays(run.path, "shakespeare_char", 0)
        _ = table.frame, run.curves
    assert set(tmp_path.rglob("*")) == before, "nothing was run, nothing was written"
    assert all("\n" not in record.getMessage() for record in caplog.records)


@pytest.mark.slow
def test_plot_py_draws_what_is_left_beside_hostile_runs(tmp_path):
    """As a whole, in a process with little memory: bounded, no code run, nothing written
    outside, and no markup of theirs in the page.
    """
    runs, mark = tmp_path / "runs", tmp_path / "mark"
    evil = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"
    make_run(runs, "run_0", seeds=(0,), label=evil)
    for i, (what, make) in enumerate(
        [*CONTENTS.items(), ("bomb", None), ("trap", None), ("big", None)]
    ):
        folder = make_run(runs, f"run_{i + 1}", seeds=(0,))
        arrays = folder / "arrays" / "shakespeare_char_0.npz"
        if make is not None:
            for name in FILES[i % 2 :: 2]:
                make(folder / name)
        else:
            arrays.write_bytes({"bomb": bomb, "trap": lambda: trapped(mark), "big": big}[what]())
    write_json(
        runs / "run_1" / "features" / "shakespeare_char_0.json",
        [{"latent": evil, "contexts": DEEP[:100]}, 3, None],
    )
    limited = (
        f"ulimit -v {8 << 20}; exec {sys.executable} {ROOT}/plot.py {runs} --png_dir {tmp_path}/png"
        " --figures pareto,density,final_metrics"
    )
    done = subprocess.run(
        ["bash", "-c", limited],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr and not mark.exists()
    assert {p.name for p in tmp_path.iterdir()} == {"runs", "png"}
    for page in (runs / "comparison").rglob("*.html"):
        assert not any(markup in page.read_text() for markup in ("<script>alert", "<img src=x"))


def weights(header: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header


HOSTILE_WEIGHTS = {
    "a pickle": pickle.dumps({"W_enc": [1.0]}),
    "a header longer than the file": weights(b"{}", 1 << 60),
    "a tensor outside the file": weights(
        b'{"W_enc":{"dtype":"F32","shape":[9999999,9999999],"data_offsets":[0,399999840000016]}}'
    ),
    "tensors that overlap": (
        weights(
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
            b'"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
        )
        + bytes(4)
    ),
    "a negative shape": (
        weights(b'{"W_enc":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}') + bytes(4)
    ),
    "deep": weights(b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}"),
    "nothing": b"",
}
HOSTILE_CONFIGS = {
    "deep": DEEP,
    "a list": "[]",
    "a target": '{"_target_": "os.system", "architecture": "topk", "d_in": 4, "d_sae": 8, "k": 2}',
    "huge": '{"architecture": "topk", "d_in": 1e300, "d_sae": 99999999999999999999, "k": 2}',
    "a path": '{"architecture": "../../../etc/passwd"}',
    "null": '{"architecture": "topk", "d_in": null, "d_sae": [], "k": {}}',
}


@pytest.mark.parametrize(
    "what", [*HOSTILE_WEIGHTS, *(f"config: {name}" for name in HOSTILE_CONFIGS)]
)
def test_a_hostile_sae_directory_is_one_line(tmp_path, what):
    (tmp_path / "cfg.json").write_text(
        HOSTILE_CONFIGS.get(
            what.removeprefix("config: "), '{"architecture": "topk", "d_in": 4, "d_sae": 8, "k": 2}'
        )
        if what.startswith("config")
        else '{"architecture": "topk", "d_in": 4, "d_sae": 8, "k": 2}'
    )
    (tmp_path / "sae_weights.safetensors").write_bytes(HOSTILE_WEIGHTS.get(what, weights(b"{}")))
    with pytest.raises(UserError) as caught:
        load_sae(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_json_that_never_ends_or_nests_without_end_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for target in ("/dev/zero", str(tmp_path / "pipe")):
        path = tmp_path / "f.json"
        path.unlink(missing_ok=True)
        path.symlink_to(target)
        with pytest.raises(UserError, match="not a regular file"):
            read_json(path)
    path.unlink()
    with open(path, "wb") as f:
        f.truncate(1 << 40)
    with pytest.raises(UserError, match="more than"):
        read_json(path)


def test_a_cell_whose_name_would_leave_the_run_folder_is_left_out(tmp_path, caplog):
    write_sealed(tmp_path / "cells" / "x_0.json", {"dataset": "../../x", "seed": 0, "metrics": {}})
    assert read_records(tmp_path) == [] and "cannot name a file" in caplog.text

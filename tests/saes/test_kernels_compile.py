"""The Triton kernels as machine code of GPUs, which Triton makes without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

#: Compiles every kernel for two generations of GPUs, and prints what is wanted of the results.
SCRIPT = """
import json
import re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sae_experiments.saes import kernels

F32, I32, I64 = "*fp32", "*i32", "*i64"
PARAMETERS = {name: F32 for name in ("scale", "shift", "bias")}
SIZES = {"n_rows": "i32", "n_cols": "i32"}
TILES = {"CHUNK": kernels.CHUNK, "ROWS": kernels.TILE[0], "COLUMNS": kernels.TILE[1]}
jobs = [
    (
        kernels._weighted_rows,
        {"begins": I32, "ends": I32, "col": I32, "values": F32, "dense": F32, "out": F32}
        | {"width": "i32"},
        {"COLUMNS": kernels.COLUMNS},
    ),
    (
        kernels._entry_products,
        {"row": I64, "col": I32, "left": F32, "right": F32, "out": F32, "n": "i32", "width": "i32"},
        {"COLUMNS": kernels.COLUMNS},
    ),
]
for form in ("relu", "jump", "gated"):
    outputs = {"values": F32, "gate": F32, "counted": F32, "fires": I32}
    types = {"pre": F32} | PARAMETERS | outputs | SIZES
    jobs.append((kernels._code, types, TILES | {"FORM": form}))
    grads = dict.fromkeys(["grad_values", "grad_gate", "grad_counted", "grad_pre", "sums"], F32)
    jobs.append(
        (
            kernels._code_gradient,
            {"pre": F32} | PARAMETERS | grads | SIZES | {"half_width": "fp32"},
            TILES | {"FORM": form, "THROUGH": form == "jump"},
        )
    )
for kernel, types, constants in jobs:
    names = kernel.arg_names
    assert set(names) == set(types) | set(constants), kernel.__name__
    signature = {name: types.get(name, "constexpr") for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    for capability in (80, 90):
        source = ASTSource(fn=kernel, signature=signature, constexprs=values)
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        line = {
            "kernel": kernel.__name__,
            "capability": capability,
            "bytes": len(made.asm["cubin"]),
            "atomic": bool(re.search(r"\\b(atom|red)\\.", made.asm["ptx"])),
        }
        print(json.dumps(line))
"""


def test_every_kernel_compiles_for_gpus_and_adds_without_atomics(tmp_path: Path) -> None:
    # Triton's own cache must not stand in for the compiler, nor its interpreter for the kernels.
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["kernel"] for line in lines} == {
        "_weighted_rows",
        "_entry_products",
        "_code",
        "_code_gradient",
    }
    assert len(lines) == 16
    assert all(line["bytes"] > 1000 and not line["atomic"] for line in lines)

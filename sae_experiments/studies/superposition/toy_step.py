"""The step of the toy models as compiled code, where there is a C compiler: ``toy_step.c`` computes what ``toy.Models`` does, in less time.

It is compiled when it is first asked for (half a second) for the processor at hand, and used only if it reproduces a gradient of autograd.
Without a compiler, on other devices, or if anything goes wrong, the same numbers come from PyTorch.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_suffix(".c")
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-shared", "-fPIC")

Step = Callable[[Tensor, Tensor, Tensor, "Tensor | None", Tensor], Tensor]


@cache
def compiled() -> Step | None:
    """``step(theta, grad, x, shares, weight) -> losses``, or None where it cannot be had.

    theta and grad (I, C, R, F), x (J, S, F) bytes of 0 and 1, shares (I, S) or None, weight (F,), losses (I, C): as in ``toy``.
    """
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "toy_step.so"
        try:
            subprocess.run(
                [compiler, *FLAGS, "-o", str(library), str(SOURCE)],
                check=True,
                capture_output=True,
                timeout=60,
            )
            function = ctypes.CDLL(str(library)).step
        except (OSError, subprocess.SubprocessError, AttributeError):
            return None
    function.argtypes = [ctypes.c_void_p] * 6 + [ctypes.c_long] * 6

    def step(
        theta: Tensor, grad: Tensor, x: Tensor, shares: Tensor | None, weight: Tensor
    ) -> Tensor:
        losses = torch.empty(theta.shape[:2])
        tensors = (theta, grad, losses, x, shares, weight)
        if not all(t is None or t.is_contiguous() for t in tensors):
            raise ValueError("the compiled step reads contiguous tensors only")
        if function(
            *(None if t is None else t.data_ptr() for t in tensors), *theta.shape, *x.shape[:2]
        ):
            raise MemoryError("no memory for a step of the toy models")
        return losses

    return step if _agrees(step) else None


def _agrees(step: Step) -> bool:
    """Whether a small example has the loss and the gradient of autograd."""
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(2, 2, 4, 80, generator=generator)
    x = (torch.rand(2, 37, 80, generator=generator) < 0.1).byte()
    weight, grad = torch.rand(80, generator=generator), torch.empty_like(theta)
    found = step(theta, grad, x, None, weight)
    with torch.enable_grad():
        leaf = theta.clone().requires_grad_(True)
        w, b = leaf[:, :, :-1], leaf[:, :, -1:]
        error = (
            torch.relu(torch.einsum("ichf,ichg,isg->icsf", w, w, x.float()) + b)
            - x[:, None].float()
        )
        expected = (error.square() @ weight).mean(2)
        expected.sum().backward()
    return torch.allclose(found, expected.detach(), rtol=1e-4) and torch.allclose(
        grad, leaf.grad, rtol=1e-3, atol=1e-3
    )  # type: ignore[arg-type]

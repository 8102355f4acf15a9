"""The training step of the toy models as compiled code, where there is a C compiler.

`toy_step.c` computes the same as `toy.Models` in less time. It is compiled for the processor at
hand when it is first needed, which takes half a second, and used only if it reproduces a gradient
of autograd. Without a compiler, on other devices, or if anything goes wrong, PyTorch computes the
step.
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
    """The function `step(theta, grad, x, shares, weight) -> losses`, or None if it is unavailable.

    Shapes are those of `toy`: theta and grad (I, C, R, F), x (J, S, F) bytes of 0 and 1, shares
    (I, S) or None, weight (F,), losses (I, C).
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
        pointers = [None if t is None else t.data_ptr() for t in tensors]
        if function(*pointers, *theta.shape, *x.shape[:2]):
            raise MemoryError("no memory for a step of the toy models")
        return losses

    return step if _agrees(step) else None


def _agrees(step: Step) -> bool:
    """Check loss and gradient of a small example against autograd."""
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(2, 2, 4, 80, generator=generator)
    x = (torch.rand(2, 37, 80, generator=generator) < 0.1).byte()
    weight, grad = torch.rand(80, generator=generator), torch.empty_like(theta)
    losses = step(theta, grad, x, None, weight)
    with torch.enable_grad():
        leaf = theta.clone().requires_grad_(True)
        w, b = leaf[:, :, :-1], leaf[:, :, -1:]
        out = torch.relu(torch.einsum("ichf,ichg,isg->icsf", w, w, x.float()) + b)
        error = out - x[:, None].float()
        expected = (error.square() @ weight).mean(2)
        (expected_grad,) = torch.autograd.grad(expected.sum(), leaf)
    same_losses = torch.allclose(losses, expected.detach(), rtol=1e-4)
    return same_losses and torch.allclose(grad, expected_grad, rtol=1e-3, atol=1e-3)

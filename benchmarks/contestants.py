"""Work that is timed on this project's side, and plain loops of the same work.

Each is a function that calls `turns.next()` before every step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rows import pool_of, rows
from torch import nn
from workers import Turns

from sae_experiments.config.compose import build, compose_checked
from sae_experiments.fitting.fit import Sample, fit_saes
from sae_experiments.saes import ops
from sae_experiments.saes.base import Batch

CONF = Path(__file__).resolve().parents[1] / "conf"


def study(*overrides: str) -> Any:
    """The laptop preset's language study with `overrides`.

    Numbers of the fit and SAEs are exactly those of a run.
    """
    return build(compose_checked(CONF, ["preset=laptop", *overrides])[0].study)


def ours(
    turns: Turns,
    variant: str,
    d: int,
    m: int,
    k: int,
    batch: int,
    overrides: tuple[str, ...] = (),
    copies: int = 1,
) -> None:
    """`fit_saes` of one variant as a run calls it (`copies` of it in one pass)."""
    torch.manual_seed(0)
    chosen = study(
        f"sae={variant}",
        f"sae.target_l0={k}",
        f"sae.d_sae={m}",
        f"fit.train.batch_size={batch}",
        *overrides,
    )
    pool = pool_of(d, batch)
    sae_spec = next(iter(chosen.saes.values()))
    cfg = sae_spec.config(chosen.fit.train)
    start = torch.cat(pool)[: max(8192, batch)]
    turns.prepared()
    saes = {f"{variant}_{i}": sae_spec.seeded(d, d, i) for i in range(copies)}
    first = next(iter(saes.values()))
    loss = first.loss

    def observed(b: Batch, step: Any) -> Any:
        found = loss(b, step)
        codes = found.extra.codes
        turns.info = {
            "active": (
                len(codes.pattern.col) / batch
                if codes.pattern is not None
                else float((codes.values != 0).sum() / batch)
            ),
            "sparse": codes.pattern is not None,
            "loss": float(found.total.detach()),
        }
        return found

    first.loss = observed

    def batch_at(step: int) -> Batch:
        turns.next()
        x = pool[step % len(pool)]
        return Batch(x, x)

    fit_saes(saes, batch_at, cfg, Sample(start, start, start), seed=0, dead_after=10**9)


def encoder_product(turns: Turns, d: int, m: int, batch: int, library: str) -> None:
    """The product that every SAE begins with, into a buffer that is reused.

    `library`: default, onednn (as this project asks for it), or bf16.
    """
    x, weight, out = rows(d, batch, 1), torch.randn(m, d) / d**0.5, torch.empty(batch, m)
    bias = torch.zeros(m)
    turns.prepared()
    if library == "bf16":
        x, weight, out = x.bfloat16(), weight.bfloat16(), out.bfloat16()
    while True:
        turns.next()
        if library == "onednn":
            ops.encoder_matmul(x, weight, bias, out=out)
        else:
            torch.mm(x, weight.t(), out=out)


def plain_sae(turns: Turns, variant: str, d: int, m: int, k: int, batch: int) -> None:
    """The textbook loop in dense PyTorch: `topk` or `standard` (ReLU and L1)."""
    torch.manual_seed(0)
    pool = pool_of(d, batch)
    turns.prepared()
    decoder = F.normalize(torch.randn(m, d), dim=1)
    params = [nn.Parameter(t) for t in (decoder.clone(), torch.zeros(m), decoder, torch.zeros(d))]
    w_enc, b_enc, w_dec, b_dec = params
    optimizer = torch.optim.Adam(params, lr=1e-3)
    step = 0
    while True:
        turns.next()
        x = pool[step % len(pool)]
        z = torch.relu((x - b_dec) @ w_enc.t() + b_enc)
        if variant == "topk":
            top = z.topk(k, dim=1)
            z = torch.zeros_like(z).scatter(1, top.indices, top.values)
        recon = z @ w_dec + b_dec
        loss = (x - recon).square().sum(1).mean() + (
            1e-3 * z.sum(1).mean() if variant == "standard" else 0
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        w_dec.data.div_(w_dec.data.norm(dim=1, keepdim=True))
        step += 1


def matrix_rate(turns: Turns, size: int, library: str) -> None:
    """A square product, for the machine's rate (2 size^3 operations)."""
    a, b, out = torch.randn(size, size), torch.randn(size, size), torch.empty(size, size)
    turns.prepared()
    if library == "bf16":
        a, b, out = a.bfloat16(), b.bfloat16(), out.bfloat16()
    while True:
        turns.next()
        if library == "onednn":
            with ops.fast_matmul():
                torch.mm(a, b, out=out)
        else:
            torch.mm(a, b, out=out)

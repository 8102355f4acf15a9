"""What several metrics start from: the held-out codes as one sparse matrix, the text they belong to, a random dictionary to compare with."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from scipy import sparse

from sae_experiments.metrics.base import Bench, Measured, MetricInfo
from sae_experiments.saes.base import SAE

NO_TEXT = "there is no text"
NOT_FINITE = "the codes or activations are not finite"


class Text(NamedTuple):
    """The held-out text, row by row as the activations: character and the one after it (N,), as code points, and whole windows of ``length``."""

    chars: np.ndarray
    following: np.ndarray
    length: int
    breaks: np.ndarray  # rows at which the text does not go on from the row before (0 among them)

    @property
    def offset(self) -> np.ndarray:
        """Position of every row in its window: how much the model has read before it."""
        return np.arange(len(self.chars)) % self.length

    def blocks(self, windows: int) -> np.ndarray:
        """Number of the document of every row: ``windows`` neighbouring windows are one document."""
        return np.arange(len(self.chars)) // (self.length * windows)


def read_text(bench: Bench, rows: int | None) -> Text | None:
    """The text of the first ``rows`` held-out rows, cut to whole windows; None where there is none."""
    if bench.lm is None or bench.held_out is None or not bench.symbols:
        return None
    store = bench.held_out
    starts = store.starts[: max(1, min(rows or store.n_rows, store.n_rows) // store.length)]
    ids, following = (t.cpu().numpy().reshape(-1) for t in bench.lm.tokens(starts))
    points = np.array([ord(s) for s in bench.symbols], dtype=np.uint32)
    breaks = np.flatnonzero(np.diff(starts, prepend=starts[0] - 1) != store.length) * store.length
    return Text(points[ids], points[following], store.length, breaks)


def sparse_codes(bench: Bench, rows: int | None, sae: SAE | None = None) -> sparse.csr_matrix | None:
    """Codes of the first ``rows`` held-out rows as (N, F) float32 in CSR form, made once a bench; None where one is not finite.

    ``sae``: another SAE on the same rows, not kept.
    """
    n = min(rows or bench.n_rows, bench.n_rows)
    key = f"codes of {n} rows"
    if sae is None and key in bench.extras:
        return bench.extras[key]
    of = bench if sae is None else Bench(sae=sae, device=bench.device, read=bench.read, write=bench.write, held_out=bench.held_out, x=bench.x)
    counts, cols, values, finite = [np.zeros(1, np.int64)], [], [], True
    for r in of.chunks(n):
        active = r.acts.nonzero()
        value = r.acts[active[:, 0], active[:, 1]]
        finite = finite and bool(torch.isfinite(value).all())
        counts.append(torch.bincount(active[:, 0], minlength=len(r.acts)).cpu().numpy())
        cols.append(active[:, 1].int().cpu().numpy())
        values.append(value.float().cpu().numpy())
    shape = (n, of.sae.d_sae)
    found = sparse.csr_matrix((np.concatenate(values), np.concatenate(cols), np.concatenate(counts).cumsum()), shape=shape) if finite else None
    if sae is None:
        bench.extras[key] = found
    return found


def raw_rows(bench: Bench, rows: int | None) -> np.ndarray:
    """What the encoder reads, (N, D) float32."""
    part = slice(0, min(rows or bench.n_rows, bench.n_rows))
    return (bench.x[part] if bench.held_out is None else bench.held_out.rows(bench.read, part)).cpu().numpy()


@torch.no_grad()
def random_sae(bench: Bench, l0: float, *, rows: int, seed: int) -> SAE:
    """An untrained SAE of the same size: random unit rows, tied, one threshold that leaves ``l0`` latents active on the first ``rows`` rows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sae = SAE(d_in=bench.sae.d_in, d_sae=bench.sae.d_sae, d_out=bench.sae.d_out).to(bench.device)
    x = torch.from_numpy(raw_rows(bench, rows)).to(bench.device)
    if sae.pre_bias:
        sae.b_dec.copy_(x.mean(0))
    sae.calibrate_threshold(x, min(l0, sae.d_sae))
    return sae.eval()


def nulls(infos: list[MetricInfo], why: str) -> Measured:
    """Every metric of ``infos`` as None for one reason."""
    return Measured(dict.fromkeys((i.name for i in infos), None), why_null=dict.fromkeys((i.name for i in infos), why))

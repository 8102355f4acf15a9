"""Perturbations of an encoder's input: nine kinds of noise of one size, made for a whole batch at once.

Every kind changes a row x by delta with ``||delta|| ~ eps R``, R the mean distance of the rows from their mean, so kinds can be compared:

=========== ============================================================================================================================
gaussian    ``(eps R / sqrt d) n``, n ~ N(0, I)
uniform     ``delta_i ~ U(-sqrt 3, sqrt 3) eps R / sqrt d``
mask        coordinates of ``x - mean`` set to zero with probability ``eps^2``
covariance  ``eps R Sigma^{1/2} n / sqrt(tr Sigma)``: directions in which the rows themselves vary
swap        a step of length eps R (at most all the way) towards another row of the batch
token       a step of length eps R along what a changed earlier character does to the row (needs a second view of the rows)
fgsm        one step of length eps R up the gradient of the code's change (Goodfellow et al. 2015, in the l2 norm)
pgd         several such steps, projected back to length eps R (Madry et al. 2018)
targeted    ``+-eps R d_i``: the decoder direction of one latent
=========== ============================================================================================================================

Shape letters: B rows, D d_in, F d_sae, Q directions of a pool, n active entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sae_experiments.errors import UserError
from sae_experiments.saes.base import Codes
from sae_experiments.saes.selection import Pattern

#: Directions that do not depend on the row: a few of them can serve a whole batch.
SHARED = ("gaussian", "uniform", "covariance")
#: Deltas that depend on the row (``targeted`` needs to be told which latent).
ROWWISE = ("mask", "swap", "token", "fgsm", "pgd", "targeted")
TYPES = SHARED + ROWWISE
#: How the latent of a targeted perturbation is chosen among (or beside) those active in the row.
WAYS = ("weak", "marginal", "confusable")


class NoiseModel(nn.Module):
    """What noise has to know about the rows: ``mean`` (D,), ``radius`` R = mean ||x - mean||, ``root`` (D, D) with root root^T = Sigma / tr Sigma."""

    mean: Tensor
    radius: Tensor
    root: Tensor

    def __init__(self, d_in: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(d_in))
        self.register_buffer("radius", torch.ones(()))
        self.register_buffer("root", torch.eye(d_in) / math.sqrt(d_in))

    @torch.no_grad()
    def learn(self, x: Tensor) -> NoiseModel:
        """Take mean, radius and covariance from rows (N, D)."""
        self.mean.copy_(x.mean(0))
        centred = (x - self.mean).double()
        self.radius.copy_(centred.norm(dim=1).mean())
        values, vectors = torch.linalg.eigh(centred.t() @ centred)
        values = values.clamp_min(0)
        self.root.copy_(vectors * (values / values.sum().clamp_min(1e-30)).sqrt())
        return self

    def directions(self, kind: str, n: int, generator: torch.Generator) -> Tensor:
        """``n`` random directions (n, D) of mean square length 1, of one of the kinds in ``SHARED``."""
        d, device = len(self.mean), self.mean.device
        if kind == "uniform":
            return (
                torch.rand(n, d, generator=generator, device=device)
                .sub_(0.5)
                .mul_(2 * math.sqrt(3 / d))
            )
        normal = torch.randn(n, d, generator=generator, device=device)
        return normal.mul_(1 / math.sqrt(d)) if kind == "gaussian" else normal @ self.root.t()

    def mask(self, x: Tensor, eps: float, generator: torch.Generator) -> Tensor:
        """Delta (B, D) that removes each coordinate of ``x - mean`` with probability eps^2, so that ``E ||delta||^2 = eps^2 ||x - mean||^2``."""
        gone = torch.rand(x.shape, generator=generator, device=x.device) < eps * eps
        return (self.mean - x) * gone

    def towards(self, x: Tensor, other: Tensor, eps: float, *, beyond: bool) -> Tensor:
        """Delta (B, D) of length eps R from rows towards ``other`` rows (``beyond``: also further than these); 0 where both are equal."""
        step = other - x
        factor = eps * self.radius / step.norm(dim=1, keepdim=True).clamp_min(1e-12)
        return step * (factor if beyond else factor.clamp_max(1)) * (step != 0).any(1, keepdim=True)


def unit(rows: Tensor) -> Tensor:
    """Rows of length 1; rows of zeros stay."""
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)


def signs(n: int, generator: torch.Generator) -> Tensor:
    """n random signs, as floats."""
    return (
        torch.randint(0, 2, (n,), generator=generator, device=generator.device)
        .mul_(2)
        .sub_(1)
        .float()
    )


def fgsm(
    encode: Callable[[Tensor], Tensor], x: Tensor, reach: Tensor | float, generator: torch.Generator
) -> Tensor:
    """One step (B, D) of length ``reach`` up the gradient of ``||z(x + delta) - z(x)||^2``, taken a tenth of the way along a random direction:
    at delta = 0 that gradient is zero.
    """
    return pgd(encode, x, reach, 1, generator)


def pgd(
    encode: Callable[[Tensor], Tensor],
    x: Tensor,
    reach: Tensor | float,
    steps: int,
    generator: torch.Generator,
) -> Tensor:
    """``steps`` ascents of ``||z(x + delta) - z(x)||^2`` from a random start of a tenth of ``reach``, each followed by a projection to length
    ``reach``; gradients pass through the active latents of either code. One step goes all the way.
    """
    with torch.no_grad():
        clean = encode(x)
    delta = unit(torch.randn(x.shape, generator=generator, device=x.device)) * (0.1 * reach)
    for _ in range(steps):
        with torch.enable_grad():
            at = (x + delta).detach().requires_grad_(True)
            change = encode(at) - clean
            lost = (change < 0) & (
                change == -clean
            )  # gone out: nothing of the encoder is left in the gradient, and nothing more can go
            (gradient,) = torch.autograd.grad(change.masked_fill(lost, 0).square().sum(), at)
        uphill = unit(gradient)
        delta = uphill * reach if steps == 1 else delta + uphill * (2.5 * reach / steps)
        delta = delta * (reach / delta.norm(dim=1, keepdim=True).clamp_min(1e-12)).clamp_max(1)
    return delta.detach()


def choose(
    codes: Codes,
    stability: Tensor,
    w_enc: Tensor,
    w_dec: Tensor,
    aim: Mapping[str, float],
    generator: torch.Generator,
) -> Tensor:
    """A latent for each row of ``codes`` (-1 where none is active): in a share ``aim.weak`` of the rows an active one with probability
    proportional to ``(1 - stability)^2``, in ``aim.marginal`` the active one nearest to going out (least ``z_j / ||e_j||``), and in
    ``aim.confusable`` the latent whose decoder row is nearest to that of a random active one.
    """
    pattern, values = active_entries(codes)
    row, col = pattern.row, pattern.col.long()
    counts = dict(
        zip(WAYS, _split([aim.get(way, 0.0) for way in WAYS], pattern.n_rows), strict=True)
    )
    weak, edge = counts["weak"], counts["weak"] + counts["marginal"]
    gumbel = (
        -torch.rand(len(col), generator=generator, device=col.device)
        .clamp_(1e-12, 1 - 1e-7)
        .log()
        .neg()
        .log()
    )
    score = torch.where(row < weak, gumbel + 2 * (1 - stability[col]).clamp_min(1e-3).log(), gumbel)
    score = torch.where(
        (row >= weak) & (row < edge), -values / w_enc.norm(dim=1)[col].clamp_min(1e-12), score
    )
    entry = first_best(score, pattern)
    found = torch.where(entry >= 0, col[entry.clamp_min(0)], -1) if len(col) else entry
    near = found[edge:]
    if len(near):
        rows = unit(w_dec)
        cosines = rows[near.clamp_min(0)] @ rows.t()
        cosines.scatter_(1, near.clamp_min(0)[:, None], -2.0)
        found[edge:] = torch.where(near >= 0, cosines.argmax(1), -1)
    return found


def active_entries(codes: Codes) -> tuple[Pattern, Tensor]:
    """Where a code is not zero, and its values there, without a graph.

    A sparse code may hold zeros: a TopK of a row with fewer than k positive pre-activations, the window around a JumpReLU's threshold.
    """
    values = codes.values.detach()
    if codes.pattern is None:
        pattern = Pattern.from_mask(values != 0)
        return pattern, pattern.gather(values.contiguous())
    on = (values != 0).nonzero().squeeze(1)
    if len(on) == len(values):
        return codes.pattern, values
    pattern = Pattern.from_flat(
        codes.pattern.flat.index_select(0, on), codes.pattern.n_rows, codes.pattern.n_cols
    )
    return pattern, values.index_select(0, on)


def shares(mixture: Mapping[str, float], rows: int) -> dict[str, int]:
    """How many of ``rows`` each kind gets: whole numbers that add up, in the order of :data:`TYPES` (largest remainders are rounded up)."""
    kinds = [kind for kind in TYPES if mixture.get(kind, 0) > 0]
    return {
        kind: m
        for kind, m in zip(kinds, _split([mixture[k] for k in kinds], rows), strict=True)
        if m
    }


def _split(parts: list[float], n: int) -> list[int]:
    exact = [part * n / (sum(parts) or 1) for part in parts]
    counts = [int(value) for value in exact]
    if sum(parts):
        for i in sorted(range(len(parts)), key=lambda i: counts[i] - exact[i])[: n - sum(counts)]:
            counts[i] += 1
    return counts


def checked(mixture: Mapping[str, float], where: str) -> dict[str, float]:
    """The mixture, if every name is a kind of noise and every share is at least 0 with one above."""
    for kind, share in mixture.items():
        if kind not in TYPES:
            raise UserError(f"{where}.{kind} is no kind of noise: use {', '.join(TYPES)}")
        if not share >= 0:
            raise UserError(f"{where}.{kind}={share} must not be negative")
    if not sum(mixture.values()) > 0:
        raise UserError(f"{where} gives no kind of noise a share above 0")
    return dict(mixture)


def take_rows(pattern: Pattern, rows: Tensor) -> tuple[Pattern, Tensor]:
    """The pattern of some rows (n,) in their order, and where its entries stand in the whole one."""
    start = pattern.crow[rows].long()
    count = pattern.crow[rows + 1].long() - start
    crow = torch.zeros(len(rows) + 1, dtype=torch.int32, device=rows.device)
    crow[1:] = count.cumsum(0)
    total = int(crow[-1])
    shift = torch.repeat_interleave(start - crow[:-1], count, output_size=total)
    place = torch.arange(total, device=rows.device) + shift
    return Pattern(crow, pattern.col.index_select(0, place), pattern.n_cols), place


def first_best(score: Tensor, pattern: Pattern) -> Tensor:
    """For each row of the pattern, the entry with the largest score (n,); -1 for a row without entries."""
    best = torch.full(
        (pattern.n_rows,), -torch.inf, device=score.device, dtype=score.dtype
    ).scatter_reduce(0, pattern.row, score, "amax")
    hits = (score >= best[pattern.row]).nonzero().squeeze(1)
    none = len(score)
    found = torch.full((pattern.n_rows,), none, dtype=torch.int64, device=score.device)
    found = found.scatter_reduce(0, pattern.row[hits], hits, "amin")
    return found.masked_fill(found == none, -1)


class Answer(NamedTuple):
    """What the encoder says to ``rows`` (n,) of a batch after they moved to ``x`` (n, D), and what it said before; the last
    ``len(latents)`` rows were moved along the decoder row of a chosen latent (-1: of none), forwards or backwards (``sign``).
    """

    rows: Tensor
    x: Tensor
    before: Codes
    after: Codes
    latents: Tensor
    sign: Tensor


class Change(NamedTuple):
    """The change of a code entry by entry, n entries: those in the support afterwards, then those that left it. Entries that are zero both times
    may be among them: they have no mass, and are active in neither code.
    """

    row: Tensor
    col: Tensor
    value: Tensor  # after minus before
    kept: Tensor  # active before and after
    mass: Tensor  # |before| + |after|, without a graph

    def jaccard(self, n_rows: int) -> float:
        """Mean over rows of |S and S~| / |S or S~|; rows without any entry do not count."""
        union = torch.bincount(self.row, weights=(self.mass > 0).float(), minlength=n_rows)
        shared = torch.bincount(self.row, weights=self.kept.float(), minlength=n_rows)
        some = union > 0
        return float((shared[some] / union[some]).mean()) if bool(some.any()) else 1.0


def changed(before: Codes, after: Codes, scratch: dict[str, Tensor]) -> Change:
    """What moved between two codes of the same rows; ``scratch`` keeps a table from call to call."""
    if before.pattern is None or after.pattern is None:
        z, moved = before.dense(), after.dense()
        row, col = ((z != 0) | (moved != 0)).nonzero().unbind(1)
        z, moved = z[row, col], moved[row, col]
        return Change(
            row, col, moved - z, (z != 0) & (moved != 0), (z.abs() + moved.abs()).detach()
        )
    where = places(before.pattern, after.pattern, scratch)
    kept = where >= 0
    old = (
        torch.where(kept, before.values.index_select(0, where.clamp_min(0)), 0)
        if len(before.values)
        else torch.zeros_like(after.values)
    )
    out = torch.ones_like(before.pattern.col, dtype=torch.bool)
    out[where[kept]] = False
    out = out.nonzero().squeeze(1)
    gone = before.values.index_select(0, out)
    return Change(
        torch.cat([after.pattern.row, before.pattern.row.index_select(0, out)]),
        torch.cat([after.pattern.col, before.pattern.col.index_select(0, out)]),
        torch.cat([after.values - old, -gone]),
        torch.cat([(old != 0) & (after.values != 0), torch.zeros_like(out, dtype=torch.bool)]),
        torch.cat([after.values.detach().abs() + old.detach().abs(), gone.detach().abs()]),
    )


def places(among: Pattern, wanted: Pattern, scratch: dict[str, Tensor]) -> Tensor:
    """Where each entry of ``wanted`` (m,) stands among those of another pattern of the same shape, -1 for nowhere.

    A table of all positions that is used again in each step, and left as it was: a third of the time of a binary search.
    """
    size, device = among.n_rows * among.n_cols, among.col.device
    table = scratch.get("places")
    if table is None or len(table) != size or table.device != device:
        table = scratch["places"] = torch.full((size,), -1, dtype=torch.int32, device=device)
    table[among.flat] = torch.arange(len(among.col), dtype=torch.int32, device=device)
    found = table.index_select(0, wanted.flat).long()
    table[among.flat] = -1
    return found


def crosstalk(
    change: Change, answer: Answer, reach: Tensor, l0: float, sizes: Tensor | None
) -> Tensor:
    """The targeted term (see :class:`.purified.Purified`) over the rows that were moved along a decoder row; a latent counts with the length ``sizes`` (F,)
    of its decoder row, 1 where these are None.
    """
    first = len(answer.rows) - len(answer.latents)
    here = (change.row >= first).nonzero().squeeze(1)
    row = change.row[here] - first
    moved, sign = change.value[here] / reach, answer.sign[row]
    moved = moved if sizes is None else moved * sizes[change.col[here]]
    own = change.col[here] == answer.latents[row]
    slope = ((moved * sign - 1).square() * (own & change.kept[here])).sum()
    others = (moved.square() * (~own & (sign != 0))).sum()
    return (slope + others / max(l0, 1.0)) / len(answer.latents)

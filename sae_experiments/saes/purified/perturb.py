"""Perturbations of an encoder's input: nine kinds of noise of one size, for a whole batch at once.

Every kind changes a row x by delta with `||delta|| ~ eps R`, where R is the mean distance of the
rows from their mean, so that kinds can be compared:

- `gaussian`: `(eps R / sqrt d) n`, n ~ N(0, I);
- `uniform`: `delta_i ~ U(-sqrt 3, sqrt 3) eps R / sqrt d`;
- `mask`: coordinates of `x - mean` set to zero with probability `eps^2`;
- `covariance`: `eps R Sigma^{1/2} n / sqrt(tr Sigma)`, directions in which the rows vary;
- `swap`: a step of length eps R towards another row of the batch, but not beyond that row;
- `token`: a step of length eps R along the effect of a changed earlier character on the row, which
  needs a second view of the rows;
- `fgsm`: one step of length eps R up the gradient of the code's change, in the l2 norm
  (Goodfellow et al. 2015);
- `pgd`: several such steps, projected back to length eps R (Madry et al. 2018);
- `targeted`: `+-eps R d_i`, along the decoder direction of one latent.

Shape letters: B rows, D `d_in`, F `d_sae`, Q directions of a pool, n active entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sae_experiments.errors import UserError
from sae_experiments.saes.base import Codes
from sae_experiments.saes.ops import unit_rows
from sae_experiments.saes.pattern import Pattern

#: Kinds whose deltas do not depend on the row: a few directions can serve a whole batch.
SHARED = ("gaussian", "uniform", "covariance")
#: Kinds whose deltas depend on the row; `targeted` also on a latent.
ROWWISE = ("mask", "swap", "token", "fgsm", "pgd", "targeted")
TYPES = SHARED + ROWWISE
#: Ways to choose the latent of a targeted perturbation, see `choose`.
WAYS = ("weak", "marginal", "confusable")


class NoiseModel(nn.Module):
    """Mean and spread of the rows, which set the size and the directions of noise.

    Buffers: `mean` (D,); `radius` R = mean ||x - mean||; `root` (D, D), with
    `root root^T = Sigma / tr Sigma`.

    Args:
        d_in: Width D of the rows.
    """

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
        """Take mean, radius and covariance from rows (N, D); returns itself."""
        self.mean.copy_(x.mean(0))
        centred = (x - self.mean).double()
        self.radius.copy_(centred.norm(dim=1).mean())
        values, vectors = torch.linalg.eigh(centred.t() @ centred)
        values = values.clamp_min(0)
        self.root.copy_(vectors * (values / values.sum().clamp_min(1e-30)).sqrt())
        return self

    def directions(self, kind: str, n: int, generator: torch.Generator) -> Tensor:
        """Random directions (n, D) of mean square length 1, of one of the kinds in `SHARED`."""
        d, device = len(self.mean), self.mean.device
        if kind == "uniform":
            values = torch.rand(n, d, generator=generator, device=device)
            return values.sub_(0.5).mul_(2 * math.sqrt(3 / d))
        normal = torch.randn(n, d, generator=generator, device=device)
        return normal.mul_(1 / math.sqrt(d)) if kind == "gaussian" else normal @ self.root.t()

    def mask(self, x: Tensor, eps: float, generator: torch.Generator) -> Tensor:
        """Delta (B, D) that removes each coordinate of `x - mean` with probability eps^2.

        Thus `E ||delta||^2 = eps^2 ||x - mean||^2`.
        """
        removed = torch.rand(x.shape, generator=generator, device=x.device) < eps * eps
        return (self.mean - x) * removed

    def towards(self, x: Tensor, other: Tensor, eps: float, *, beyond: bool) -> Tensor:
        """Delta of length eps R from rows towards other rows; 0 where both are equal.

        Args:
            x: Rows (B, D).
            other: Rows to move to (B, D).
            eps: Length of the step in units of R.
            beyond: Allow a step longer than the distance to the other row.

        Returns:
            Delta (B, D).
        """
        step = other - x
        factor = eps * self.radius / step.norm(dim=1, keepdim=True).clamp_min(1e-12)
        if not beyond:
            factor = factor.clamp_max(1)
        return step * factor * (step != 0).any(1, keepdim=True)


def signs(n: int, generator: torch.Generator) -> Tensor:
    """Random signs (n,), as floats."""
    bits = torch.randint(0, 2, (n,), generator=generator, device=generator.device)
    return bits.mul_(2).sub_(1).float()


def pgd(
    encode: Callable[[Tensor], Tensor],
    x: Tensor,
    reach: Tensor | float,
    steps: int,
    generator: torch.Generator,
) -> Tensor:
    """Steps up the gradient of `||z(x + delta) - z(x)||^2`, each projected back to length `reach`.

    Starts at a tenth of `reach` along a random direction. Gradients pass through the active latents
    of either code. A single step has length `reach`.

    Args:
        encode: Maps rows (B, D) to codes (B, F).
        x: Rows (B, D).
        reach: Largest length of the delta.
        steps: Number of steps.
        generator: Source of the random start.

    Returns:
        Delta (B, D).
    """
    with torch.no_grad():
        clean = encode(x)
    delta = unit_rows(torch.randn(x.shape, generator=generator, device=x.device)) * (0.1 * reach)
    for _ in range(steps):
        uphill = unit_rows(_gradient(encode, x + delta, clean))
        delta = uphill * reach if steps == 1 else delta + uphill * (2.5 * reach / steps)
        delta = delta * (reach / delta.norm(dim=1, keepdim=True).clamp_min(1e-12)).clamp_max(1)
    return delta.detach()


def _gradient(encode: Callable[[Tensor], Tensor], x: Tensor, clean: Tensor) -> Tensor:
    """Gradient (B, D) of the squared change of the code with respect to the perturbed rows."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_(True)
        change = encode(leaf) - clean
        # A latent that went out cannot change further, and its encoder row gets no gradient.
        gone = (change < 0) & (change == -clean)
        (gradient,) = torch.autograd.grad(change.masked_fill(gone, 0).square().sum(), leaf)
    return gradient


def choose(
    codes: Codes,
    stability: Tensor,
    w_enc: Tensor,
    w_dec: Tensor,
    aim: Mapping[str, float],
    generator: torch.Generator,
) -> Tensor:
    """Choose a latent for each row.

    The rows are divided between three ways, in this order:

    - `weak`: an active latent, with probability proportional to `(1 - stability)^2`;
    - `marginal`: the active latent nearest to going out, of the smallest `z_j / ||e_j||`;
    - `confusable`: the latent whose decoder row is nearest to that of a random active one.

    Args:
        codes: Codes of B rows.
        stability: Stability of each latent, (F,) in [0, 1].
        w_enc: Encoder rows (F, D).
        w_dec: Decoder rows (F, O).
        aim: Share of the rows for each of `WAYS`.
        generator: Source of random choices.

    Returns:
        Latents (B,); -1 for rows without an active one.
    """
    pattern, values = active_entries(codes)
    row, col = pattern.row, pattern.col.long()
    n_weak, n_marginal, _ = _split([aim.get(way, 0.0) for way in WAYS], pattern.n_rows)
    edge = n_weak + n_marginal
    # The largest of scores with Gumbel noise is a random choice.
    uniform = torch.rand(len(col), generator=generator, device=col.device)
    gumbel = -uniform.clamp_(1e-12, 1 - 1e-7).log().neg().log()
    unstable = 2 * (1 - stability[col]).clamp_min(1e-3).log()
    margin = values / w_enc.norm(dim=1)[col].clamp_min(1e-12)
    score = torch.where(row < n_weak, gumbel + unstable, gumbel)
    score = torch.where((row >= n_weak) & (row < edge), -margin, score)
    entry = first_best(score, pattern)
    latents = torch.where(entry >= 0, col[entry.clamp_min(0)], -1) if len(col) else entry
    near = latents[edge:]
    if len(near):
        rows = unit_rows(w_dec)
        cosines = rows[near.clamp_min(0)] @ rows.t()
        cosines.scatter_(1, near.clamp_min(0)[:, None], -2.0)
        latents[edge:] = torch.where(near >= 0, cosines.argmax(1), -1)
    return latents


def active_entries(codes: Codes) -> tuple[Pattern, Tensor]:
    """Positions of the nonzero entries of a code, and their values (n,) without a graph.

    A sparse code may hold zeros: a TopK row with fewer than k positive pre-activations, or the
    window around a JumpReLU's threshold.
    """
    values = codes.values.detach()
    if codes.pattern is None:
        pattern = Pattern.from_mask(values != 0)
        return pattern, pattern.gather(values.contiguous())
    on = (values != 0).nonzero().squeeze(1)
    if len(on) == len(values):
        return codes.pattern, values
    flat = codes.pattern.flat.index_select(0, on)
    pattern = Pattern.from_flat(flat, codes.pattern.n_rows, codes.pattern.n_cols)
    return pattern, values.index_select(0, on)


def shares(mixture: Mapping[str, float], rows: int) -> dict[str, int]:
    """Number of rows for each kind of noise.

    Args:
        mixture: Share of each kind, of any sum.
        rows: Rows to divide.

    Returns:
        Numbers that sum to `rows`, in the order of `TYPES`, without kinds that get none. The
        largest remainders are rounded up.
    """
    kinds = [kind for kind in TYPES if mixture.get(kind, 0) > 0]
    counts = _split([mixture[kind] for kind in kinds], rows)
    return {kind: count for kind, count in zip(kinds, counts, strict=True) if count}


def _split(parts: list[float], n: int) -> list[int]:
    """Whole numbers in proportion to `parts` that sum to `n`; zeros if all parts are 0."""
    total = sum(parts)
    exact = [part * n / (total or 1) for part in parts]
    counts = [int(value) for value in exact]
    if total:
        by_remainder = sorted(range(len(parts)), key=lambda i: counts[i] - exact[i])
        for i in by_remainder[: n - sum(counts)]:
            counts[i] += 1
    return counts


def checked(mixture: Mapping[str, float], where: str) -> dict[str, float]:
    """The mixture, if its names are kinds of noise and its shares at least 0, not all of them 0.

    Args:
        mixture: Share of each kind.
        where: Key of the mixture, for errors.
    """
    for kind, share in mixture.items():
        if kind not in TYPES:
            raise UserError(f"{where}.{kind} is no kind of noise: use {', '.join(TYPES)}")
        if not share >= 0:
            raise UserError(f"{where}.{kind}={share} must not be negative")
    if not sum(mixture.values()) > 0:
        raise UserError(f"{where} gives no kind of noise a share above 0")
    return dict(mixture)


def take_rows(pattern: Pattern, rows: Tensor) -> tuple[Pattern, Tensor]:
    """The pattern of some rows (m,) in their order, and the positions (n,) of its entries."""
    start = pattern.crow[rows].long()
    count = pattern.crow[rows + 1].long() - start
    crow = torch.zeros(len(rows) + 1, dtype=torch.int32, device=rows.device)
    crow[1:] = count.cumsum(0)
    total = int(crow[-1])
    shift = torch.repeat_interleave(start - crow[:-1], count, output_size=total)
    place = torch.arange(total, device=rows.device) + shift
    return Pattern(crow, pattern.col.index_select(0, place), pattern.n_cols), place


def first_best(score: Tensor, pattern: Pattern) -> Tensor:
    """Entry with the largest score in each row of the pattern, (B,); -1 for an empty row.

    Args:
        score: Score of each entry, (n,).
        pattern: The entries, in B rows.
    """
    n_rows = pattern.n_rows
    best = torch.full((n_rows,), -torch.inf, device=score.device, dtype=score.dtype)
    best = best.scatter_reduce(0, pattern.row, score, "amax")
    hits = (score >= best[pattern.row]).nonzero().squeeze(1)
    none = len(score)
    first = torch.full((n_rows,), none, dtype=torch.int64, device=score.device)
    first = first.scatter_reduce(0, pattern.row[hits], hits, "amin")
    return first.masked_fill(first == none, -1)


class Answer(NamedTuple):
    """Codes of some rows of a batch before and after a perturbation."""

    rows: Tensor
    """Rows of the batch, (n,)."""
    x: Tensor
    """The perturbed rows, (n, D)."""
    before: Codes
    """Codes of the clean rows."""
    after: Codes
    """Codes of the perturbed rows."""
    latents: Tensor
    """Targets (m,) of the last m rows, moved along their decoder rows; -1: not moved."""
    sign: Tensor
    """Direction (m,) of that step, -1.0, 0.0 or 1.0."""


class Change(NamedTuple):
    """Change of a code, for each of n entries.

    The entries of the code after come first, then those that occur only in the code before. Entries
    may be zero in both codes; their mass is 0 and they do not count as active.
    """

    row: Tensor
    """Row of each entry, (n,)."""
    col: Tensor
    """Latent of each entry, (n,)."""
    value: Tensor
    """Value after minus before, (n,)."""
    kept: Tensor
    """Mask of the entries that are active before and after, (n,)."""
    mass: Tensor
    """`|before| + |after|` without a graph, (n,)."""

    def jaccard(self, n_rows: int) -> float:
        """Mean over rows of |S and S~| / |S or S~|; rows without any entry do not count."""
        union = torch.bincount(self.row, weights=(self.mass > 0).float(), minlength=n_rows)
        shared = torch.bincount(self.row, weights=self.kept.float(), minlength=n_rows)
        some = union > 0
        return float((shared[some] / union[some]).mean()) if bool(some.any()) else 1.0


def changed(before: Codes, after: Codes, scratch: dict[str, Tensor]) -> Change:
    """The change between two codes of the same rows.

    Args:
        before: Codes of the clean rows.
        after: Codes of the perturbed rows.
        scratch: Dictionary that keeps a table between calls; see `places`.
    """
    if before.pattern is None or after.pattern is None:
        return _changed_dense(before.dense(), after.dense())
    where = places(before.pattern, after.pattern, scratch)
    kept = where >= 0
    old = torch.zeros_like(after.values)
    if len(before.values):
        old = torch.where(kept, before.values.index_select(0, where.clamp_min(0)), 0)
    left = torch.ones_like(before.pattern.col, dtype=torch.bool)
    left[where[kept]] = False
    left = left.nonzero().squeeze(1)
    gone = before.values.index_select(0, left)
    mass = after.values.detach().abs() + old.detach().abs()
    on_both = (old != 0) & (after.values != 0)
    return Change(
        row=torch.cat([after.pattern.row, before.pattern.row.index_select(0, left)]),
        col=torch.cat([after.pattern.col, before.pattern.col.index_select(0, left)]),
        value=torch.cat([after.values - old, -gone]),
        kept=torch.cat([on_both, torch.zeros_like(left, dtype=torch.bool)]),
        mass=torch.cat([mass, gone.detach().abs()]),
    )


def _changed_dense(z: Tensor, moved: Tensor) -> Change:
    """The change between dense codes (B, F)."""
    row, col = ((z != 0) | (moved != 0)).nonzero().unbind(1)
    z, moved = z[row, col], moved[row, col]
    mass = (z.abs() + moved.abs()).detach()
    return Change(row, col, moved - z, (z != 0) & (moved != 0), mass)


def places(among: Pattern, wanted: Pattern, scratch: dict[str, Tensor]) -> Tensor:
    """Position of each entry of a pattern among those of another one of the same shape.

    Uses a table of all positions that is left as it was and used again in the next step, which
    takes a third of the time of a binary search.

    Args:
        among: Pattern to look in.
        wanted: Pattern of the m entries to look for.
        scratch: Dictionary that keeps the table between calls.

    Returns:
        Positions (m,); -1 for an entry that is not there.
    """
    size, device = among.n_rows * among.n_cols, among.col.device
    table = scratch.get("places")
    if table is None or len(table) != size or table.device != device:
        table = scratch["places"] = torch.full((size,), -1, dtype=torch.int32, device=device)
    table[among.flat] = torch.arange(len(among.col), dtype=torch.int32, device=device)
    positions = table.index_select(0, wanted.flat).long()
    table[among.flat] = -1
    return positions


def crosstalk(
    change: Change, answer: Answer, reach: Tensor, l0: float, sizes: Tensor | None
) -> Tensor:
    """The targeted term of `Purified`, as a mean over the rows moved along a decoder row.

    Args:
        change: Change of the code on all perturbed rows.
        answer: Codes before and after.
        reach: Length of the step.
        l0: Active latents per row.
        sizes: Lengths of the decoder rows (F,), with which latents count. None: 1.
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

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

import torch
from torch import Tensor, nn

from sae_experiments.errors import UserError
from sae_experiments.saes import static
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

    def mask(self, x: Tensor, eps: float | Tensor, generator: torch.Generator) -> Tensor:
        """Delta (B, D) that removes each coordinate of `x - mean` with probability eps^2.

        Thus `E ||delta||^2 = eps^2 ||x - mean||^2`.
        """
        removed = torch.rand(x.shape, generator=generator, device=x.device) < eps * eps
        return (self.mean - x) * removed

    def towards(self, x: Tensor, other: Tensor, eps: float | Tensor, *, beyond: bool) -> Tensor:
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
    n_weak, n_marginal, _ = _split([aim.get(way, 0.0) for way in WAYS], codes.n_rows)
    edge = n_weak + n_marginal

    def scores(row: Tensor, col: Tensor, values: Tensor) -> Tensor:
        # The largest of scores with Gumbel noise is a random choice.
        uniform = torch.rand(values.shape, generator=generator, device=values.device)
        gumbel = -uniform.clamp_(1e-12, 1 - 1e-7).log().neg().log()
        unstable = 2 * (1 - stability[col]).clamp_min(1e-3).log()
        margin = values / w_enc.norm(dim=1)[col].clamp_min(1e-12)
        score = torch.where(row < n_weak, gumbel + unstable, gumbel)
        return torch.where((row >= n_weak) & (row < edge), -margin, score)

    if static.on():
        z = codes.dense().detach()
        row = torch.arange(len(z), device=z.device)[:, None]
        score = scores(row, torch.arange(z.shape[1], device=z.device), z)
        best = score.masked_fill(z == 0, -torch.inf).max(1)
        latents = torch.where(best.values > -torch.inf, best.indices, -1)
    else:
        pattern, values = active_entries(codes)
        col = pattern.col.long()
        entry = first_best(scores(pattern.row, col, values), pattern)
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

"""Comparison of attributions with the effects of interventions.

Upstream latents are removed, or moved along the gradient, and the change of the target is measured.

Shape letters: R targets, T positions, K active latents per position, N pairs (a target and one
active upstream latent), Q numbers of removed latents, B bootstrap samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from sae_experiments.studies.circuits.attribution import Circuit, Prompts, Targets


class Pairs(NamedTuple):
    """Pairs of a target and an active upstream latent, (N,) each."""

    row: Tensor
    """Number of the target."""
    position: Tensor
    """Position of the upstream latent."""
    slot: Tensor
    """Its number among the active ones there."""

    def of(self, table: Tensor) -> Tensor:
        """The entries (N,) of a table (R, T, K)."""
        return table[self.row, self.position, self.slot]


def reachable(prompts: Prompts, targets: Targets, *, same: bool) -> Tensor:
    """Mask (R, T, K) of the active upstream latents that each target can depend on.

    Args:
        prompts: The prompts.
        targets: The targets.
        same: Only those at the target's own position, not those before it.
    """
    at = torch.arange(prompts.index.shape[1], device=targets.position.device)
    here = at == targets.position[:, None] if same else at <= targets.position[:, None]
    return here[:, :, None] & (prompts.value[targets.prompt] != 0)


def batched(circuit: Circuit, prompts: Prompts, n: int, make: Callable[[slice], Tensor]) -> Tensor:
    """Results of `make` for parts of 0..n that fit into the circuit's memory."""
    size = circuit.chunk(prompts)
    parts = [make(slice(begin, min(begin + size, n))) for begin in range(0, n, size)]
    return torch.cat(parts) if parts else torch.zeros(0)


def clean(circuit: Circuit, prompts: Prompts, targets: Targets) -> Tensor:
    """Pre-activations (R,) of targets in their prompts' own states."""

    def make(part: slice) -> Tensor:
        return circuit.values(prompts, targets[part], prompts.state[targets.prompt[part]])

    return batched(circuit, prompts, targets.n, make)


def single_effects(
    circuit: Circuit,
    prompts: Prompts,
    targets: Targets,
    pairs: Pairs,
    *,
    clean_values: Tensor | None = None,
) -> Tensor:
    """Effects `A(clean) - A(without this latent at this position)`.

    Everything else is kept, the SAE's error too.

    Args:
        circuit: The two SAEs.
        prompts: The prompts.
        targets: The targets.
        pairs: Targets with the upstream latent to remove.
        clean_values: Clean pre-activations of the targets (R,). None: they are computed.

    Returns:
        Effects (N,).
    """
    clean_values = clean(circuit, prompts, targets) if clean_values is None else clean_values

    def make(part: slice) -> Tensor:
        row, position, slot = (x[part] for x in pairs)
        some = targets[row]
        states = prompts.state[some.prompt]
        at = torch.arange(len(row), device=row.device)
        direction = circuit.directions[prompts.index[some.prompt, position, slot]]
        states[at, position] -= prompts.amount[some.prompt, position, slot][:, None] * direction
        return clean_values[row] - circuit.values(prompts, some, states)

    return batched(circuit, prompts, len(pairs.row), make)


def joint_effects(
    circuit: Circuit,
    prompts: Prompts,
    targets: Targets,
    share: Callable[[slice], Tensor],
    *,
    clean_values: Tensor | None = None,
) -> Tensor:
    """Effects `A(clean) - A(changed)` of removing parts of all active latents at once.

    Args:
        circuit: The two SAEs.
        prompts: The prompts.
        targets: The targets, in the order of their prompts.
        share: Gives the share (r, T, K) of each latent's amount to remove, for a part of r targets.
        clean_values: Clean pre-activations of the targets (R,). None: they are computed.

    Returns:
        Effects (R,).
    """
    clean_values = clean(circuit, prompts, targets) if clean_values is None else clean_values

    def make(part: slice) -> Tensor:
        some = targets[part]
        states = circuit.changed(prompts, some.prompt, share(part))
        return clean_values[part] - circuit.values(prompts, some, states)

    return batched(circuit, prompts, targets.n, make)


def ranks(score: Tensor, allowed: Tensor, most: int) -> Tensor:
    """Rank of every allowed entry within its target, 0 for the largest score.

    Args:
        score: Scores (R, T, K).
        allowed: Mask (R, T, K) of the entries to rank.
        most: Number of ranks to tell apart.

    Returns:
        Ranks (R, T, K); at least `most` for later entries and those that are not allowed.
    """
    flat = score.masked_fill(~allowed, -torch.inf).flatten(1)
    most = min(most, flat.shape[1])
    top = flat.topk(most, dim=1)
    places = torch.full(flat.shape, most, dtype=torch.int32, device=flat.device)
    order = torch.arange(most, dtype=torch.int32, device=flat.device).expand(len(flat), -1)
    known = torch.where(torch.isfinite(top.values), order, torch.full_like(order, most))
    places.scatter_(1, top.indices, known)
    return places.view(score.shape)


def deletion(
    circuit: Circuit,
    prompts: Prompts,
    targets: Targets,
    places: Tensor,
    counts: Sequence[int],
    *,
    clean_values: Tensor | None = None,
) -> np.ndarray:
    """Effects of removing the first q latents of a ranking, for several q.

    The rows of one target are neighbours, so that its prompt's directions are looked up once.

    Args:
        circuit: The two SAEs.
        prompts: The prompts.
        targets: The targets, in the order of their prompts.
        places: Ranks (R, T, K).
        counts: The numbers q.
        clean_values: Clean pre-activations of the targets (R,). None: they are computed.

    Returns:
        Effects (R, Q).
    """
    clean_values = clean(circuit, prompts, targets) if clean_values is None else clean_values
    row = torch.arange(targets.n, device=places.device).repeat_interleave(len(counts))
    n_removed = torch.tensor(counts, device=places.device).repeat(targets.n)

    def share(part: slice) -> Tensor:
        return (places[row[part]] < n_removed[part, None, None]).to(prompts.amount.dtype)

    effects = joint_effects(circuit, prompts, targets[row], share, clean_values=clean_values[row])
    return effects.view(targets.n, len(counts)).cpu().numpy()


def nudge(
    circuit: Circuit,
    prompts: Prompts,
    targets: Targets,
    gradient: Tensor,
    allowed: Tensor,
    step: float,
) -> tuple[Tensor, Tensor]:
    """Changes of targets when the upstream codes move along the gradient.

    Args:
        circuit: The two SAEs.
        prompts: The prompts.
        targets: The targets, in the order of their prompts.
        gradient: Gradients (R, T, K).
        allowed: Mask (R, T, K) of the codes that move.
        step: Length of the step, as a share of the norm of these codes.

    Returns:
        Predicted and actual changes, (R,) each.
    """
    g = gradient * allowed
    size = torch.where(allowed, prompts.value[targets.prompt], 0).flatten(1).norm(dim=1)
    move = g * (step * size / g.flatten(1).norm(dim=1).clamp_min(1e-12))[:, None, None]
    amount = prompts.amount[targets.prompt]
    share = torch.where(amount != 0, -move / torch.where(amount != 0, amount, 1), 0)
    moved = torch.where(amount != 0, move, 0)
    predicted = (g * moved).flatten(1).sum(1)
    return predicted, -joint_effects(circuit, prompts, targets, lambda part: share[part])


class Agreement(NamedTuple):
    """Agreement of predicted with measured changes."""

    pearson: float
    spearman: float
    sign: float
    """Share of pairs with equal signs."""
    slope: float
    """Least-squares slope, through the origin, of the actual on the predicted; ideally 1."""


def agreement(predicted: np.ndarray, actual: np.ndarray) -> Agreement:
    """Agreement over pairs (N,); NaN where either side does not vary."""
    x = np.asarray(predicted, np.float64)
    y = np.asarray(actual, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        both = (x != 0) | (y != 0)
        sign = float(np.mean(np.sign(x[both]) == np.sign(y[both]))) if both.any() else float("nan")
        slope = float(np.divide(x @ y, x @ x))
        return Agreement(_pearson(x, y), _pearson(rankdata(x), rankdata(y)), sign, slope)


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    if len(x):
        x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale > 0 else float("nan")


def resampled(groups: np.ndarray, n: int, seed: int) -> list[np.ndarray]:
    """Bootstrap samples of rows that draw whole groups, as rows of one prompt are not independent.

    Args:
        groups: Group of each row, (N,).
        n: Number of samples.
        seed: Seed of the samples.

    Returns:
        Row numbers of each sample; no samples if there is only one group.
    """
    chance = np.random.default_rng(seed)
    names, at = np.unique(groups, return_inverse=True)
    order = np.argsort(at, kind="stable")
    members = np.split(order, np.cumsum(np.bincount(at))[:-1]) if len(names) else []
    if len(names) < 2:
        return []
    drawn = [chance.integers(0, len(names), len(names)) for _ in range(n)]
    return [np.concatenate([members[i] for i in chosen]) for chosen in drawn]


class Curve(NamedTuple):
    """A deletion curve."""

    share: np.ndarray
    """Share of the targets' pre-activation that is removed, (Q,)."""
    area: float
    """Its mean over q: with one point per doubling, the area over log q."""
    shares: np.ndarray
    """`share` in every bootstrap sample, (B, Q)."""
    areas: np.ndarray
    """`area` in every bootstrap sample, (B,)."""


def curve_of(removed: np.ndarray, value: np.ndarray, samples: Sequence[np.ndarray]) -> Curve:
    """The deletion curve: a ratio of sums, in which targets near zero weigh little.

    Args:
        removed: Effects (R, Q).
        value: Clean pre-activations (R,).
        samples: Bootstrap samples of the targets.
    """
    share = removed.sum(0) / value.sum()
    resampled = [removed[s].sum(0) / value[s].sum() for s in samples]
    shares = np.array(resampled).reshape(-1, removed.shape[1])
    return Curve(share, float(share.mean()), shares, shares.mean(1))


def interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Interval of the middle share `level` of bootstrap values; NaN without finite values."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return float("nan"), float("nan")
    low, high = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def spread(values: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Standard error by name, over bootstrap values of which at least two are finite."""
    finite = {k: v[np.isfinite(v)] for k, v in values.items()}
    return {k: float(v.std(ddof=1)) for k, v in finite.items() if len(v) > 1}

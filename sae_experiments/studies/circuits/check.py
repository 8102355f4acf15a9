"""Is an attribution true? Upstream latents are really removed, or moved along the gradient, and the change of the target is compared.

Shape letters: R targets, T positions, K active latents a position, N pairs (a target and one active upstream latent), Q numbers removed.
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
    """Row of the target and where the upstream latent is: position and slot among the active ones, (N,) each."""

    row: Tensor
    position: Tensor
    slot: Tensor

    def of(self, table: Tensor) -> Tensor:
        """The entries (N,) of a table (R, T, K)."""
        return table[self.row, self.position, self.slot]


def reachable(prompts: Prompts, targets: Targets, *, same: bool) -> Tensor:
    """Which active upstream latents (R, T, K) a target can depend on: those at its own position (``same``), or there and before."""
    at = torch.arange(prompts.index.shape[1], device=targets.position.device)
    here = at == targets.position[:, None] if same else at <= targets.position[:, None]
    return here[:, :, None] & (prompts.value[targets.prompt] != 0)


def batched(circuit: Circuit, prompts: Prompts, n: int, make: Callable[[slice], Tensor]) -> Tensor:
    """The results of ``make`` for 0..n, in chunks that keep the memory bounded."""
    size = circuit.chunk(prompts)
    parts = [make(slice(begin, min(begin + size, n))) for begin in range(0, n, size)]
    return torch.cat(parts) if parts else torch.zeros(0)


def clean(circuit: Circuit, prompts: Prompts, targets: Targets) -> Tensor:
    """Pre-activations (R,) of targets in their prompts' own states."""
    return batched(
        circuit,
        prompts,
        targets.n,
        lambda part: circuit.values(prompts, targets[part], prompts.state[targets.prompt[part]]),
    )


def single_effects(
    circuit: Circuit,
    prompts: Prompts,
    targets: Targets,
    pairs: Pairs,
    *,
    whole: Tensor | None = None,
) -> Tensor:
    """``A(clean) - A(without this latent at this position)`` for every pair (N,), everything else (the SAE's error too) kept.

    ``whole``: the targets' clean pre-activations (R,), if they are known.
    """
    whole = clean(circuit, prompts, targets) if whole is None else whole

    def make(part: slice) -> Tensor:
        row, position, slot = (x[part] for x in pairs)
        some = targets[row]
        states, at = prompts.state[some.prompt], torch.arange(len(row), device=row.device)
        direction = circuit.directions[prompts.index[some.prompt, position, slot]]
        states[at, position] -= prompts.amount[some.prompt, position, slot][:, None] * direction
        return whole[row] - circuit.values(prompts, some, states)

    return batched(circuit, prompts, len(pairs.row), make)


def joint_effects(
    circuit: Circuit,
    prompts: Prompts,
    targets: Targets,
    share: Callable[[slice], Tensor],
    *,
    whole: Tensor | None = None,
) -> Tensor:
    """``A(clean) - A(changed)`` (R,) when ``share(part)`` (r, T, K) of the amount of every active latent is removed at once. Targets are in
    order of their prompts; ``whole``: their clean pre-activations, if they are known."""
    whole = clean(circuit, prompts, targets) if whole is None else whole

    def make(part: slice) -> Tensor:
        some = targets[part]
        return whole[part] - circuit.values(
            prompts, some, circuit.changed(prompts, some.prompt, share(part))
        )

    return batched(circuit, prompts, targets.n, make)


def ranks(score: Tensor, allowed: Tensor, most: int) -> Tensor:
    """Place (0: the largest score) of every allowed entry of (R, T, K) in its row; at least ``most`` for what comes later or is not allowed."""
    flat = score.masked_fill(~allowed, -torch.inf).flatten(1)
    most = min(most, flat.shape[1])
    top = flat.topk(most, dim=1)
    places = torch.full(flat.shape, most, dtype=torch.int32, device=flat.device)
    order = torch.arange(most, dtype=torch.int32, device=flat.device).expand(len(flat), -1)
    places.scatter_(
        1, top.indices, torch.where(torch.isfinite(top.values), order, torch.full_like(order, most))
    )
    return places.view(score.shape)


def deletion(
    circuit: Circuit,
    prompts: Prompts,
    targets: Targets,
    places: Tensor,
    counts: Sequence[int],
    *,
    whole: Tensor | None = None,
) -> np.ndarray:
    """What removing the first q latents of an order (``places`` (R, T, K)) takes from the target, (R, Q) for q in ``counts``.

    The q of one target are neighbouring rows, so that its prompt's directions are looked up once for all of them.
    """
    whole = clean(circuit, prompts, targets) if whole is None else whole
    row = torch.arange(targets.n, device=places.device).repeat_interleave(len(counts))
    least = torch.tensor(counts, device=places.device).repeat(targets.n)

    def share(part: slice) -> Tensor:
        return (places[row[part]] < least[part, None, None]).to(prompts.amount.dtype)

    return (
        joint_effects(circuit, prompts, targets[row], share, whole=whole[row])
        .view(targets.n, len(counts))
        .cpu()
        .numpy()
    )


def nudge(
    circuit: Circuit,
    prompts: Prompts,
    targets: Targets,
    gradient: Tensor,
    allowed: Tensor,
    step: float,
) -> tuple[Tensor, Tensor]:
    """Predicted and actual change (R,) of targets when all upstream codes they depend on move by ``step`` times their norm along the gradient."""
    g = gradient * allowed
    size = torch.where(allowed, prompts.value[targets.prompt], 0).flatten(1).norm(dim=1)
    move = g * (step * size / g.flatten(1).norm(dim=1).clamp_min(1e-12))[:, None, None]
    amount = prompts.amount[targets.prompt]
    share = torch.where(amount != 0, -move / torch.where(amount != 0, amount, 1), 0)
    moved = torch.where(amount != 0, move, 0)
    return (g * moved).flatten(1).sum(1), -joint_effects(
        circuit, prompts, targets, lambda part: share[part]
    )


class Agreement(NamedTuple):
    """How a prediction meets what happened: Pearson, Spearman, share of equal signs, slope of the actual on the predicted (ideal: 1)."""

    pearson: float
    spearman: float
    sign: float
    slope: float


def agreement(predicted: np.ndarray, actual: np.ndarray) -> Agreement:
    """Agreement over pairs (N,); NaN where a side does not vary. The slope is of the least-squares line through the origin."""
    x, y = np.asarray(predicted, np.float64), np.asarray(actual, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        both = (x != 0) | (y != 0)
        sign = float(np.mean(np.sign(x[both]) == np.sign(y[both]))) if both.any() else float("nan")
        return Agreement(
            _pearson(x, y), _pearson(rankdata(x), rankdata(y)), sign, float(np.divide(x @ y, x @ x))
        )


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean() if len(x) else x, y - y.mean() if len(y) else y
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale > 0 else float("nan")


def resampled(groups: np.ndarray, n: int, seed: int) -> list[np.ndarray]:
    """``n`` bootstrap samples of rows (N,) that draw whole groups (prompts) with replacement: rows of one prompt are not independent."""
    chance = np.random.default_rng(seed)
    names, at = np.unique(groups, return_inverse=True)
    order = np.argsort(at, kind="stable")
    members = np.split(order, np.cumsum(np.bincount(at))[:-1]) if len(names) else []
    return [
        np.concatenate([members[i] for i in chance.integers(0, len(names), len(names))])
        for _ in range(n if len(names) > 1 else 0)
    ]


class Curve(NamedTuple):
    """A deletion curve: share of the targets' pre-activation removed (Q,), its mean over q (one point a doubling: the area over log q), and
    both in every bootstrap sample, (B, Q) and (B,)."""

    share: np.ndarray
    area: float
    shares: np.ndarray
    areas: np.ndarray


def curve_of(removed: np.ndarray, value: np.ndarray, samples: Sequence[np.ndarray]) -> Curve:
    """The curve of (R, Q) changes of targets of pre-activation (R,): a ratio of sums, so that targets near zero weigh little."""
    share = removed.sum(0) / value.sum()
    shares = np.array([removed[s].sum(0) / value[s].sum() for s in samples]).reshape(
        -1, removed.shape[1]
    )
    return Curve(share, float(share.mean()), shares, shares.mean(1))


def interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The middle ``level`` of bootstrap values; NaN where there are none."""
    finite = values[np.isfinite(values)]
    return (
        tuple(float(v) for v in np.quantile(finite, [(1 - level) / 2, (1 + level) / 2]))
        if len(finite)
        else (float("nan"), float("nan"))
    )


def spread(values: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Standard error of each name over its bootstrap values, where there are at least two finite ones."""
    finite = {k: v[np.isfinite(v)] for k, v in values.items()}
    return {k: float(v.std(ddof=1)) for k, v in finite.items() if len(v) > 1}

"""Worlds of SynthSAEBench: features by falling frequency, the most frequent ones in trees.

After Chanin and Garriga-Alonso 2026, arXiv 2602.14687. Shape letters: B rows, D width, G features,
n active entries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sae_experiments.errors import UserError
from sae_experiments.saes import ops, selection
from sae_experiments.saes.ops import unit_rows
from sae_experiments.saes.pattern import Pattern
from sae_experiments.saes.types import Codes

#: Rows drawn at once: a sample of many rows is the same however much memory there is.
BLOCK = 8192
#: Share of a feature's variance that stays its own, at least.
LEAST_OWN = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Synth:
    """Recipe of a world of SynthSAEBench.

    Features are numbered by falling nominal rate `p_min + (p_max - p_min) (i^-z - G^-z) / (1 -
    G^-z)`, and fill complete trees breadth first: all roots, then the children of the first root,
    of the second, and so on. The rarest features are in no tree. A feature fires if its entry of a
    Gaussian copula passes a threshold. A child needs its parent, and of several siblings that fire
    a random one stays; thresholds make up for both, not quite. The magnitude is `relu(mean_i + s_i
    normal)`, and a child's is multiplied by the parent's over the parent's mean.
    """

    width: int
    """Width D of the rows."""
    features: int
    """Number G of features."""
    trees: int
    """Number of trees."""
    p_max: float
    """Nominal rate of the most frequent feature."""
    p_min: float = 0.0005
    """Nominal rate of the least frequent one."""
    zipf: float = 0.5
    """Exponent of the rates."""
    depth: int = 3
    """Levels of a tree below its root."""
    branching: int = 4
    """Children of a node."""
    rank: int = 25
    """Dimensions of the common factor of the copula."""
    correlation: float = 0.1
    """Standard deviation of a feature's loading on each of them."""
    first_mean: float = 5.0
    """Mean magnitude of the first feature; it falls linearly to that of the last."""
    last_mean: float = 4.0
    """Mean magnitude of the last feature."""
    spread: float = 0.5
    """Mean, and standard deviation, of the normal number whose size is a feature's s."""
    bias: float = 0.5
    """Length of the constant that is added to every row."""
    orthogonal_steps: int = 0
    """Steps of Adam that make the random directions more orthogonal."""

    def __post_init__(self) -> None:
        for name in ("width", "features", "depth", "branching", "rank"):
            if getattr(self, name) < 1:
                raise UserError(f"world: {name}={getattr(self, name)} must be at least 1")
        if not 0 < self.p_min <= self.p_max < 1:
            raise UserError(
                f"world: p_min={self.p_min} and p_max={self.p_max} must satisfy "
                "0 < p_min <= p_max < 1"
            )
        if not 0 <= self.starts[-1] <= self.features:
            raise UserError(
                f"world: trees={self.trees} with {self.starts[-1]} nodes in all exceed "
                f"features={self.features}"
            )

    @property
    def starts(self) -> list[int]:
        """First feature of every level of the trees, and the first one outside them."""
        sizes = [self.trees * self.branching**level for level in range(self.depth + 1)]
        return [sum(sizes[:level]) for level in range(self.depth + 2)]

    def memory(self, rows: int) -> dict[str, float]:
        """Peak memory in bytes of drawing rows, by purpose."""
        free = self.features - self.starts[-1] + self.trees
        return {
            "feature activations": 13.0 * min(rows, BLOCK) * free,
            "rows and directions": 4.0 * self.width * (2 * rows + 3 * self.features),
        }

    def draw(self, seed: int, device: torch.device) -> SynthWorld:
        """Draw a world."""
        return SynthWorld(self, seed, device)


class _Entries(NamedTuple):
    """Active features of some rows."""

    row: Tensor
    feature: Tensor
    value: Tensor


class SynthWorld:
    """Directions, rates and correlations; rows are a function of a seed.

    Args:
        recipe: Recipe of the world.
        seed: Seed of the draw.
        device: Device of directions and rows.
    """

    def __init__(self, recipe: Synth, seed: int, device: torch.device) -> None:
        self.recipe = recipe
        self.device = device
        n = recipe.features
        g = torch.Generator().manual_seed(seed)
        directions = unit_rows(torch.randn(n, recipe.width, generator=g))
        bias = torch.randn(recipe.width, generator=g)
        loadings = recipe.correlation * torch.randn(n, recipe.rank, generator=g)
        deviations = (recipe.spread + recipe.spread * torch.randn(n, generator=g)).abs()
        longest = math.sqrt(1 - LEAST_OWN)
        loadings *= (longest / loadings.norm(dim=1, keepdim=True).clamp_min(1e-12)).clamp_max(1)
        directions = orthogonalised(directions.to(device), recipe.orthogonal_steps)
        self.directions = directions
        self.bias = (recipe.bias * bias / bias.norm()).to(device)
        self.loadings = loadings.to(device)
        self.own = (1 - loadings.square().sum(1)).sqrt().to(device)
        self.mean = torch.linspace(recipe.first_mean, recipe.last_mean, n, device=device)
        self.deviation = deviations.to(device)
        self.nominal = nominal_rates(recipe)
        rate = conditional_rates(recipe, self.nominal)
        self.threshold = (math.sqrt(2) * torch.erfinv(1 - 2 * rate)).float().to(device)
        outside = range(recipe.starts[-1], n)
        self.free = torch.tensor([*range(recipe.trees), *outside], device=device)

    def acts(self, rows: int, seed: int) -> Codes:
        """True feature activations of rows: a sparse code over the features."""
        sizes = [min(BLOCK, rows - begin) for begin in range(0, rows, BLOCK)]
        g = torch.Generator(self.device).manual_seed(seed)
        parts = [self._block(n, g) for n in sizes]
        if len(parts) == 1:
            return parts[0]
        patterns = [part.pattern for part in parts if part.pattern is not None]
        return Codes(torch.cat([part.values for part in parts]), Pattern.stacked(patterns))

    def rows(self, acts: Codes, seed: int = 0) -> Tensor:
        """Rows (B, D) of feature activations: sums of active directions, and the bias."""
        return ops.decode(acts.values, acts.pattern, self.directions) + self.bias

    def _block(self, rows: int, g: torch.Generator) -> Codes:
        """Draw roots and independent features densely, children under firing parents alone.

        Given the common factor features are independent, so that those whose parent is silent
        need not be drawn.
        """

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, device=self.device)

        common = normal(rows, self.recipe.rank)
        score = normal(rows, len(self.free)).mul_(self.own[self.free])
        score.addmm_(common, self.loadings[self.free].t())
        at = selection.positions(score > self.threshold[self.free])
        row = torch.div(at, len(self.free), rounding_mode="floor")
        feature = self.free[at - row * len(self.free)]
        value = self.mean[feature] + self.deviation[feature] * normal(len(feature))
        level = _kept(_Entries(row, feature, value), value > 0)
        levels = [level]
        level = _kept(level, level.feature < self.recipe.trees)
        for start, below in zip(self.recipe.starts, self.recipe.starts[1:-1], strict=False):
            level = self._children(level, start, below, common, g)
            levels.append(level)
        parts = [torch.cat(part) for part in zip(*levels, strict=True)]
        flat, order = (parts[0] * self.recipe.features + parts[1]).sort()
        return Codes(parts[2][order], Pattern.from_flat(flat, rows, self.recipe.features))

    def _children(
        self, parents: _Entries, start: int, below: int, common: Tensor, g: torch.Generator
    ) -> _Entries:
        """The children, at most one of each parent, that fire.

        Args:
            parents: Active features of a level.
            start: First feature of that level.
            below: First feature of the next one.
            common: Common factor of the rows, (B, rank).
            g: Random numbers.
        """
        branching = self.recipe.branching
        first = below + branching * (parents.feature - start)
        child = first[:, None] + torch.arange(branching, device=self.device)
        noise = torch.randn(2, *child.shape, generator=g, device=self.device)
        factor = torch.bmm(self.loadings[child], common[parents.row][:, :, None]).squeeze(2)
        value = self.mean[child] + self.deviation[child] * noise[1]
        fires = factor + self.own[child] * noise[0] > self.threshold[child]
        fires &= value > 0
        lot = torch.rand(child.shape, generator=g, device=self.device)
        one = lot.masked_fill(~fires, -1.0).argmax(1, keepdim=True)
        scale = parents.value / self.mean[parents.feature]
        chosen = _Entries(
            parents.row, child.gather(1, one).squeeze(1), scale * value.gather(1, one).squeeze(1)
        )
        return _kept(chosen, fires.any(1))


def _kept(entries: _Entries, keep: Tensor) -> _Entries:
    return _Entries(*(part[keep] for part in entries))


def nominal_rates(recipe: Synth) -> Tensor:
    """The rates (G,) that features would fire with if thresholds made up for everything."""
    number = torch.arange(1, recipe.features + 1, dtype=torch.float64)
    last = float(recipe.features) ** -recipe.zipf
    fall = (number**-recipe.zipf - last) / max(1 - last, 1e-12)
    return recipe.p_min + (recipe.p_max - recipe.p_min) * fall


def conditional_rates(recipe: Synth, nominal: Tensor) -> Tensor:
    """Rates (G,) before siblings exclude each other, given the parent: at most 1.

    `p_i / p_parent (1 + sum of the other siblings' p / p_parent)` for the nodes below a root.
    """
    rate = nominal.clone()
    starts = recipe.starts
    for start, below, end in zip(starts, starts[1:], starts[2:], strict=False):
        parents = nominal[start:below, None]
        share = nominal[below:end].view(-1, recipe.branching) / parents
        others = share.sum(1, keepdim=True) - share
        rate[below:end] = (share * (1 + others)).clamp_max(1).flatten()
    return rate


def orthogonalised(directions: Tensor, steps: int, lr: float = 3e-4) -> Tensor:
    """Unit vectors (G, D) after steps of Adam on the sum of their squared products.

    A second term, G times the squared difference of squared lengths from 1, keeps the lengths. The
    gradient goes through the (D, D) matrix of second moments: the (G, G) matrix of products is
    never made.
    """
    if not steps:
        return directions
    v = torch.nn.Parameter(directions.clone())
    adam = torch.optim.Adam([v], lr=lr)
    for _ in range(steps):
        with torch.no_grad():
            length = v.square().sum(1, keepdim=True)
            v.grad = 4 * (v @ (v.t() @ v) - length * v + len(v) * (length - 1) * v)
        adam.step()
    return unit_rows(v.detach())

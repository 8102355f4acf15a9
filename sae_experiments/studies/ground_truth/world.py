"""A world whose features are known: sparse, of very different frequency, partly in trees, a little correlated (after SynthSAEBench).

Shape letters: B rows, D width, G features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sae_experiments.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Planted:
    """The recipe of a world. Roots of trees and the independent features fire with probabilities from ``p_max`` down to ``p_min`` by Zipf's law.

    ``trees`` trees of ``levels`` levels: when a node fires, one of its ``branching`` children fires too with probability ``child`` (the
    children exclude each other), its magnitude scaled by the parent's. Firing is a Gaussian copula: a factor of ``rank`` dimensions
    explains ``correlation`` of each variance. Magnitudes are normal(``magnitude``, ``spread``), cut at 0.
    """

    width: int
    features: int
    zipf: float
    p_max: float
    p_min: float
    trees: int
    levels: int
    branching: int
    child: float
    rank: int
    correlation: float
    magnitude: float
    spread: float
    noise: float

    def __post_init__(self) -> None:
        for name in ("width", "features", "levels", "branching", "rank"):
            if getattr(self, name) < 1:
                raise UserError(f"study.world.{name}={getattr(self, name)} must be at least 1")
        if not 0 < self.p_min <= self.p_max < 1:
            raise UserError(
                f"study.world: p_min={self.p_min} and p_max={self.p_max} must satisfy 0 < p_min <= p_max < 1"
            )
        if not 0 <= self.child <= 1:
            raise UserError(f"study.world.child={self.child} must be a probability")
        if not 0 <= self.correlation < 1:
            raise UserError(
                f"study.world.correlation={self.correlation} must be at least 0 and below 1"
            )
        if not self.magnitude > 0:
            raise UserError(f"study.world.magnitude={self.magnitude} must be positive")
        if self.trees * self.tree_size > self.features:
            raise UserError(
                f"study.world.trees={self.trees} of {self.tree_size} features each exceed features={self.features}"
            )

    def memory(self, rows: int) -> dict[str, float]:
        """Bytes at the peak of drawing ``rows`` rows: five numbers a feature and row are held at once, and the directions."""
        return {
            "feature activations": 20.0 * rows * self.features,
            "rows and directions": 4.0 * self.width * (2 * rows + 3 * self.features),
        }

    @property
    def tree_size(self) -> int:
        return sum(self.branching**level for level in range(self.levels))


class Structure(NamedTuple):
    """Which feature is whose child: parents (-1: none) and levels (0: a root or independent), both (G,). Parents come before children."""

    parent: list[int]
    level: list[int]


class World:
    """One draw of directions (G, D), probabilities and correlations; rows are then a function of (seed, step).

    ``free`` features stand on their own: the roots of the trees, spread evenly over the frequencies, and the independent ones.
    """

    def __init__(self, recipe: Planted, seed: int, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        g = torch.Generator().manual_seed(seed)
        self.structure = _structure(recipe)
        self.free = [i for i, p in enumerate(self.structure.parent) if p < 0]
        n = len(self.free)
        rank = torch.arange(1, n + 1, dtype=torch.float64)
        fall = (rank**-recipe.zipf - n**-recipe.zipf) / max(1 - n**-recipe.zipf, 1e-12)
        zipf = recipe.p_min + (recipe.p_max - recipe.p_min) * fall
        self.free_probability = zipf[torch.randperm(n, generator=g)]
        self.threshold = (
            (math.sqrt(2) * torch.erfinv(1 - 2 * self.free_probability)).float().to(device)
        )
        loadings = torch.randn(n, recipe.rank, generator=g)
        self.loadings = (
            math.sqrt(recipe.correlation) * loadings / loadings.norm(dim=1, keepdim=True)
        ).to(device)
        directions = torch.randn(recipe.features, recipe.width, generator=g)
        self.directions = (directions / directions.norm(dim=1, keepdim=True)).to(device)
        children: dict[int, list[int]] = {i: [] for i in self.inner()}
        for child, parent in enumerate(self.structure.parent):
            if parent >= 0:
                children[parent].append(child)
        self.children = torch.tensor(list(children.values()), device=device)

    def inner(self) -> list[int]:
        """Features that have children, parents first."""
        return sorted(set(self.structure.parent) - {-1})

    def acts(self, rows: int, seed: int) -> Tensor:
        """True feature activations (B, G), non-negative."""
        r, g = self.recipe, torch.Generator(self.device).manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, generator=g, device=self.device)  # noqa: E731
        n = len(self.free)
        common = draw(rows, r.rank) @ self.loadings.t()
        on = torch.zeros(rows, r.features, device=self.device)
        on[:, self.free] = (
            common + math.sqrt(1 - r.correlation) * draw(rows, n) > self.threshold
        ).float()
        size = (1 + r.spread / r.magnitude * draw(rows, r.features)).clamp_min_(0)
        for i, children in zip(self.inner(), self.children, strict=True):
            fires = on[:, i] * (torch.rand(rows, generator=g, device=self.device) < r.child)
            which = torch.randint(len(children), (rows,), generator=g, device=self.device)
            on[torch.arange(rows, device=self.device), children[which]] = fires
            size[:, children] *= size[:, i : i + 1]  # a weak parent has weak children
        return r.magnitude * on * size

    def rows(self, acts: Tensor, seed: int) -> Tensor:
        """What an SAE sees (B, D): the sum of the active directions, and a little noise."""
        x = acts @ self.directions
        if not self.recipe.noise:
            return x
        return x + self.recipe.noise * torch.randn(
            x.shape, generator=torch.Generator(self.device).manual_seed(seed), device=self.device
        )


def _structure(recipe: Planted) -> Structure:
    parent, level = [-1] * recipe.features, [0] * recipe.features
    for tree in range(recipe.trees):
        begin = tree * recipe.tree_size
        for i in range(1, recipe.tree_size):
            parent[begin + i] = begin + (i - 1) // recipe.branching
            level[begin + i] = level[parent[begin + i]] + 1
    return Structure(parent, level)

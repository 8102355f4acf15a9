"""A world of known features, after SynthSAEBench.

They are sparse, of very different frequency, partly in trees and a little correlated.

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
    """Recipe of a world.

    Free features, which are the roots of trees and the independent features, fire with
    probabilities that fall from `p_max` to `p_min` by Zipf's law. When a node of a tree fires, one
    of its children fires too with probability `child`; the children exclude each other. Free
    features fire together by a Gaussian copula.
    """

    width: int
    """Width D of the rows."""
    features: int
    """Number G of features."""
    zipf: float
    """Exponent of Zipf's law."""
    p_max: float
    """Largest probability of a free feature."""
    p_min: float
    """Smallest probability of a free feature."""
    trees: int
    """Number of trees."""
    levels: int
    """Levels of a tree."""
    branching: int
    """Children of a node."""
    child: float
    """Probability that one of the children of a firing node fires."""
    rank: int
    """Dimensions of the common factor of the copula."""
    correlation: float
    """Share of each variance that the common factor explains."""
    magnitude: float
    """Mean magnitude of a feature; a child's is scaled by its parent's."""
    spread: float
    """Standard deviation of the magnitude, which is cut at 0."""
    noise: float
    """Standard deviation of the noise on every coordinate of a row."""

    def __post_init__(self) -> None:
        for name in ("width", "features", "levels", "branching", "rank"):
            if getattr(self, name) < 1:
                raise UserError(f"study.world.{name}={getattr(self, name)} must be at least 1")
        if not 0 < self.p_min <= self.p_max < 1:
            raise UserError(
                f"study.world: p_min={self.p_min} and p_max={self.p_max} must satisfy "
                "0 < p_min <= p_max < 1"
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
                f"study.world.trees={self.trees} of {self.tree_size} features each exceed "
                f"features={self.features}"
            )

    def memory(self, rows: int) -> dict[str, float]:
        """Peak memory in bytes of drawing rows, by purpose.

        Five numbers per feature and row are held at once, besides the directions.
        """
        return {
            "feature activations": 20.0 * rows * self.features,
            "rows and directions": 4.0 * self.width * (2 * rows + 3 * self.features),
        }

    def draw(self, seed: int, device: torch.device) -> World:
        """Draw a world."""
        return World(self, seed, device)

    @property
    def tree_size(self) -> int:
        """Features of a tree."""
        return sum(self.branching**level for level in range(self.levels))


class Structure(NamedTuple):
    """Trees of the features; parents come before their children."""

    parent: list[int]
    """Parent of each feature, (G,); -1: none."""
    level: list[int]
    """Level of each feature, (G,); 0 for roots and independent features."""


class World:
    """Directions, probabilities and correlations; rows are a function of a seed.

    The roots of the trees are spread evenly over the frequencies.

    Args:
        recipe: Recipe of the world.
        seed: Seed of the draw.
        device: Device of directions and rows.
    """

    def __init__(self, recipe: Planted, seed: int, device: torch.device) -> None:
        self.recipe = recipe
        self.device = device
        g = torch.Generator().manual_seed(seed)
        self.structure = _structure(recipe)
        self.free = [i for i, p in enumerate(self.structure.parent) if p < 0]
        n = len(self.free)
        rank = torch.arange(1, n + 1, dtype=torch.float64)
        fall = (rank**-recipe.zipf - n**-recipe.zipf) / max(1 - n**-recipe.zipf, 1e-12)
        zipf = recipe.p_min + (recipe.p_max - recipe.p_min) * fall
        self.free_probability = zipf[torch.randperm(n, generator=g)]
        threshold = math.sqrt(2) * torch.erfinv(1 - 2 * self.free_probability)
        self.threshold = threshold.float().to(device)
        loadings = torch.randn(n, recipe.rank, generator=g)
        lengths = loadings.norm(dim=1, keepdim=True)
        self.loadings = (math.sqrt(recipe.correlation) * loadings / lengths).to(device)
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
        r = self.recipe
        g = torch.Generator(self.device).manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, device=self.device)

        common = draw(rows, r.rank) @ self.loadings.t()
        copula = common + math.sqrt(1 - r.correlation) * draw(rows, len(self.free))
        on = torch.zeros(rows, r.features, device=self.device)
        on[:, self.free] = (copula > self.threshold).float()
        size = (1 + r.spread / r.magnitude * draw(rows, r.features)).clamp_min_(0)
        for i, children in zip(self.inner(), self.children, strict=True):
            fires = on[:, i] * (torch.rand(rows, generator=g, device=self.device) < r.child)
            which = torch.randint(len(children), (rows,), generator=g, device=self.device)
            on[torch.arange(rows, device=self.device), children[which]] = fires
            size[:, children] *= size[:, i : i + 1]  # a weak parent has weak children
        return r.magnitude * on * size

    def rows(self, acts: Tensor, seed: int) -> Tensor:
        """Rows (B, D) of feature activations (B, G): sums of active directions, plus noise."""
        x = acts @ self.directions
        if not self.recipe.noise:
            return x
        g = torch.Generator(self.device).manual_seed(seed)
        return x + self.recipe.noise * torch.randn(x.shape, generator=g, device=self.device)


def _structure(recipe: Planted) -> Structure:
    """The trees come first, then the independent features."""
    parent = [-1] * recipe.features
    level = [0] * recipe.features
    for tree in range(recipe.trees):
        begin = tree * recipe.tree_size
        for i in range(1, recipe.tree_size):
            parent[begin + i] = begin + (i - 1) // recipe.branching
            level[begin + i] = level[parent[begin + i]] + 1
    return Structure(parent, level)

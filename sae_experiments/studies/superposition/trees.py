"""Binary features with a known structure: trees, independent features, pairs.

A set of features is a list of independent blocks, each with few outcomes of known probability.
Marginals, joints, samples and the list of distinct samples follow from these.

Shape letters: F features, S distinct samples, B rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from sae_experiments.errors import UserError

TREES = ("exclusive", "early_stopping")
MODES = (*TREES, "independent", "pairs")
#: Binary digits with which probabilities are drawn.
BITS = 32
#: Features are padded to a multiple of this: whole vector registers, whole bytes of bits.
PAD = 16
#: Rows of bits that are processed as one.
TALL = 64


class Block(NamedTuple):
    """Features that depend on one another."""

    features: np.ndarray
    """Numbers of the features, (k,)."""
    rows: np.ndarray
    """Their values of 0 and 1 in every outcome, (S, k)."""
    probs: np.ndarray
    """Probability of every outcome, (S,)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """Distribution of samples for a complete tree of any depth.

    The features are the nodes without the root, level by level.

    - `exclusive`: below a node that is on, exactly one child is on.
    - `early_stopping`: below such a node no child is on with probability `stop`, else one is.
    - `independent`: the control, independent features with the marginals of the tree `match`.
    - `pairs`: as many features, correlated or anticorrelated in pairs.

    In trees, all nodes below a node that is off are off.
    """

    mode: str
    """One of `MODES`."""
    branching: int
    """Children of a node."""
    probability: float
    """Probability of the root; for `pairs`, that of every feature."""
    stop: float
    """Probability that a path ends early."""
    importance: float
    """The squared error of a feature weighs `importance ** (level - 1)`."""
    match: str
    """Tree whose marginals independent features have."""
    correlated: float
    """Share of the features in pairs that are on together."""
    anticorrelated: float
    """Share of the features in pairs of which at most one is on; the rest is independent."""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UserError(f"mode={self.mode!r} is not one of {', '.join(MODES)}")
        if self.match not in TREES:
            raise UserError(f"match={self.match!r} is not one of {', '.join(TREES)}")
        if self.branching < 2:
            raise UserError(f"branching={self.branching} must be at least 2")
        for name in ("probability", "stop", "correlated", "anticorrelated"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name}={getattr(self, name)} must lie between 0 and 1")
        if not self.importance > 0 or not math.isfinite(self.importance):
            raise UserError(f"importance={self.importance} must be a positive number")
        if self.correlated + self.anticorrelated > 1:
            raise UserError(
                f"correlated={self.correlated} and anticorrelated={self.anticorrelated} are shares "
                "of the features: at most 1 together"
            )
        if self.mode == "pairs" and self.anticorrelated and self.probability > 0.5:
            raise UserError(
                f"probability={self.probability} must be at most 0.5 where pairs exclude each "
                "other (anticorrelated)"
            )

    def n_features(self, depth: int) -> int:
        """Nodes of the tree without its root: `(b^(D+1) - b) / (b - 1)`."""
        return (self.branching ** (depth + 1) - self.branching) // (self.branching - 1)

    def levels(self, depth: int) -> np.ndarray:
        """Level (F,) of every feature, from 1 below the root."""
        return np.repeat(
            np.arange(1, depth + 1), [self.branching**level for level in range(1, depth + 1)]
        )

    def parents(self, depth: int) -> np.ndarray:
        """Index (F,) of every feature's parent, -1 if the parent is the root."""
        return np.arange(self.n_features(depth)) // self.branching - 1

    def importances(self, depth: int) -> np.ndarray:
        """Weight (F,) of every feature's squared error."""
        return self.importance ** (self.levels(depth) - 1.0)

    def marginals(self, depth: int) -> np.ndarray:
        """Probability (F,) that a feature is on."""
        if self.mode == "pairs":
            return np.full(self.n_features(depth), float(self.probability))
        tree = self.match if self.mode == "independent" else self.mode
        stop = self.stop if tree == "early_stopping" else 0.0
        return self.probability * ((1 - stop) / self.branching) ** self.levels(depth)

    def joints(self, depth: int) -> np.ndarray:
        """Probability (F, F) that two features are on together, with the marginals as diagonal."""
        marginals = self.marginals(depth)
        joints = np.outer(marginals, marginals)
        for features, rows, probs in self.blocks(depth):
            joints[np.ix_(features, features)] = rows.T @ (rows * probs[:, None])
        return joints

    def blocks(self, depth: int) -> list[Block]:
        """The independent blocks of a sample."""
        return _blocks(self, depth)

    def n_distinct(self, depth: int) -> int:
        """Number of distinct samples, also where they are too many to list."""
        return math.prod(len(block.probs) for block in self.blocks(depth))

    def support(self, depth: int) -> tuple[np.ndarray, np.ndarray]:
        """All distinct samples (S, F) and their probabilities (S,)."""
        rows, probs = np.zeros((1, self.n_features(depth)), np.uint8), np.ones(1)
        for block in self.blocks(depth):
            rows = np.repeat(rows, len(block.probs), axis=0)
            rows[:, block.features] = np.tile(block.rows, (len(probs), 1))
            probs = np.outer(probs, block.probs).ravel()
        return rows, probs

    def draw(self, depth: int, n: int, rng: np.random.Generator) -> np.ndarray:
        """Samples of 0 and 1, (n, F) with F padded to a multiple of 16."""
        width = padded(self.n_features(depth))
        single = np.zeros(width)
        blocks = self.blocks(depth)
        for block in blocks:
            if len(block.features) == 1:
                single[block.features[0]] = block.rows[:, 0] @ block.probs
        rows = bernoulli(single, n, rng) if single.any() else np.zeros((n, width), np.uint8)
        for block in blocks:
            if len(block.features) > 1:
                which = np.searchsorted(np.cumsum(block.probs)[:-1], rng.random(n), side="right")
                rows[:, block.features] = block.rows[which]
        return rows


def padded(n: int) -> int:
    """A number rounded up to a multiple of `PAD`."""
    return -(-n // PAD) * PAD


def bernoulli(probs: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Independent 0/1 values, exact to 32 binary digits.

    Eight features are packed into a byte. From the last digit of p to the first, a random bit b and
    the digit turn r into `r | b` (digit 1) or `r & b` (digit 0); then P(r = 1) = p. A probability
    such as 2^-5 takes five random bits per value.

    Args:
        probs: Probabilities (F,), F a multiple of 8.
        n: Number of rows.
        rng: Source of random bits.

    Returns:
        Values (n, F).
    """
    numbers = np.round(probs * 2.0**BITS).astype(np.uint64)
    # The least significant digit first.
    digits = [(numbers >> np.uint64(t)) & np.uint64(1) for t in range(BITS)]
    first = next((t for t, digit in enumerate(digits) if digit.any()), BITS)
    # Many rows in one: numpy is slow along short axes.
    r = np.zeros((-(-n // TALL), TALL * len(probs) // 8), np.uint8)
    for digit in digits[first:]:
        ones = np.tile(np.packbits(digit.astype(np.uint8)), TALL)
        b = np.frombuffer(rng.bytes(r.size), np.uint8).reshape(r.shape)
        r = (r & b) | (ones & (r | b))
    certain = np.tile(np.packbits(numbers == 2**BITS), TALL)
    return np.unpackbits(r | certain).reshape(-1, len(probs))[:n]


@lru_cache(maxsize=64)
def _blocks(features: Features, depth: int) -> list[Block]:
    n = features.n_features(depth)
    if features.mode in TREES:
        return [_tree(features, depth)]
    singles = features.marginals(depth)
    if features.mode == "independent":
        return [_single(i, p) for i, p in enumerate(singles)]
    p = features.probability
    # The small number keeps a share such as 0.3 from being rounded down.
    together = int(features.correlated * n / 2 + 1e-9)
    apart = int(features.anticorrelated * n / 2 + 1e-9)
    blocks = []
    for i in range(together + apart):
        pair = [2 * i, 2 * i + 1]
        if i < together:
            blocks.append(_block(pair, [[0, 0], [1, 1]], [1 - p, p]))
        else:
            blocks.append(_block(pair, [[0, 0], [0, 1], [1, 0]], [1 - 2 * p, p, p]))
    return blocks + [_single(i, p) for i in range(2 * (together + apart), n)]


def _tree(features: Features, depth: int) -> Block:
    """All features of a tree as one block.

    A sample is the path from the root to the node where it ends: any leaf, and any inner node where
    it may stop.
    """
    levels, parents = features.levels(depth), features.parents(depth)
    stop = features.stop if features.mode == "early_stopping" else 0.0
    rows = np.eye(len(levels), dtype=np.uint8)
    for i, parent in enumerate(parents):
        if parent >= 0:
            rows[i] |= rows[parent]
    ends = np.where(levels == depth, 1.0, stop)
    probs = features.marginals(depth) * ends
    with_none = np.vstack([np.zeros_like(rows[:1]), rows])
    return _block(range(len(levels)), with_none, [1 - probs.sum(), *probs])


def _single(i: int, p: float) -> Block:
    return _block([i], [[0], [1]], [1 - p, p])


def _block(features: object, rows: object, probs: object) -> Block:
    """A block without its impossible outcomes."""
    p = np.asarray(probs, float)
    possible = p > 1e-12  # 1 minus the sum of the others is zero but for rounding
    rows = np.asarray(rows, np.uint8)[possible]
    return Block(np.asarray(features), rows, p[possible] / p[possible].sum())

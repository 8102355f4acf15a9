"""Binary features with a known structure: the nodes of a tree, independent features, correlated and anticorrelated pairs.

A set of features is a list of independent blocks, each with few outcomes of known probability; marginals, joints, samples and the list of
distinct samples all follow from that. Shape letters: F features, S distinct samples, B rows.
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
BITS = 32  # binary digits a probability is drawn with
PAD = 16  # features are padded to a multiple of this (whole vector registers, whole bytes of bits)
TALL = 64  # rows of bits that are worked on as one


class Block(NamedTuple):
    """Features (k,) that depend on one another: their values (S, k) of 0 and 1 in every outcome, and its probability (S,)."""

    features: np.ndarray
    rows: np.ndarray
    probs: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """How samples are made for a complete tree of any depth, whose nodes without the root are the features, level by level.

    ``exclusive``: below a node that is on exactly one child is on. ``early_stopping``: with probability ``stop`` none is, else one of them;
    in both, below a node that is off everything is off, and ``probability`` is that of the root. ``independent``: the control, features
    independent with the marginals of the tree that ``match`` names. ``pairs``: as many features, each on with ``probability``; the share
    ``correlated`` of them in pairs that are on together, ``anticorrelated`` in pairs of which at most one is on, the rest independent.
    The squared error of a feature weighs ``importance ** (level - 1)``.
    """

    mode: str
    branching: int
    probability: float
    stop: float
    importance: float
    match: str
    correlated: float
    anticorrelated: float

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
                f"correlated={self.correlated} and anticorrelated={self.anticorrelated} are shares of the features: at most 1 together"
            )
        if self.mode == "pairs" and self.anticorrelated and self.probability > 0.5:
            raise UserError(
                f"probability={self.probability} must be at most 0.5 where pairs exclude each other (anticorrelated)"
            )

    def n_features(self, depth: int) -> int:
        """Nodes of the tree without its root: ``(b^(D+1) - b) / (b - 1)``."""
        return (self.branching ** (depth + 1) - self.branching) // (self.branching - 1)

    def levels(self, depth: int) -> np.ndarray:
        """Level (F,) of every feature, from 1 below the root."""
        return np.repeat(
            np.arange(1, depth + 1), [self.branching**level for level in range(1, depth + 1)]
        )

    def parents(self, depth: int) -> np.ndarray:
        """Index (F,) of every feature's parent, -1 for the root."""
        return np.arange(self.n_features(depth)) // self.branching - 1

    def importances(self, depth: int) -> np.ndarray:
        """Weight (F,) of every feature's squared error."""
        return self.importance ** (self.levels(depth) - 1.0)

    def marginals(self, depth: int) -> np.ndarray:
        """Probability (F,) that a feature is on."""
        if self.mode == "pairs":
            return np.full(self.n_features(depth), float(self.probability))
        stop = (
            self.stop
            if "early_stopping" in (self.mode, self.match if self.mode == "independent" else "")
            else 0.0
        )
        return self.probability * ((1 - stop) / self.branching) ** self.levels(depth)

    def joints(self, depth: int) -> np.ndarray:
        """Probability (F, F) that two features are on together; the diagonal holds the marginals."""
        marginals = self.marginals(depth)
        found = np.outer(marginals, marginals)
        for features, rows, probs in self.blocks(depth):
            found[np.ix_(features, features)] = rows.T @ (rows * probs[:, None])
        return found

    def blocks(self, depth: int) -> list[Block]:
        """The independent blocks that a sample is made of."""
        return _blocks(self, depth)

    def n_distinct(self, depth: int) -> int:
        """How many distinct samples there are (also where they are too many to list)."""
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
        """``n`` samples as (n, F padded to a multiple of 16), 0 or 1."""
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
    """``n`` rounded up to a multiple of 16."""
    return -(-n // PAD) * PAD


def bernoulli(probs: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """``n`` rows of independent 0/1 values (n, F) with probabilities (F,), F a multiple of 8, exact to 32 binary digits.

    Eight features a byte: a random bit b and the next digit of p turn r into ``r | b`` (digit 1) or ``r & b`` (digit 0), from the last digit up;
    then P(r = 1) = p. A probability such as 2^-5 takes five random bits a value.
    """
    numbers = np.round(probs * 2.0**BITS).astype(np.uint64)
    digits = [
        (numbers >> np.uint64(t)) & np.uint64(1) for t in range(BITS)
    ]  # least significant first
    first = next((t for t, digit in enumerate(digits) if digit.any()), BITS)
    r = np.zeros(
        (-(-n // TALL), TALL * len(probs) // 8), np.uint8
    )  # many rows in one: numpy is slow along short axes
    for digit in digits[first:]:
        ones = np.tile(np.packbits(digit.astype(np.uint8)), TALL)
        b = np.frombuffer(rng.bytes(r.size), np.uint8).reshape(r.shape)
        r = (r & b) | (ones & (r | b))
    return np.unpackbits(r | np.tile(np.packbits(numbers == 2**BITS), TALL)).reshape(
        -1, len(probs)
    )[:n]


@lru_cache(maxsize=64)
def _blocks(features: Features, depth: int) -> list[Block]:
    n = features.n_features(depth)
    if features.mode in TREES:
        return [_tree(features, depth)]
    singles = features.marginals(depth)
    if features.mode == "independent":
        return [_single(i, p) for i, p in enumerate(singles)]
    p = features.probability
    together, apart = (
        int(share * n / 2 + 1e-9) for share in (features.correlated, features.anticorrelated)
    )
    found = [_block([2 * i, 2 * i + 1], [[0, 0], [1, 1]], [1 - p, p]) for i in range(together)]
    found += [
        _block([2 * i, 2 * i + 1], [[0, 0], [0, 1], [1, 0]], [1 - 2 * p, p, p])
        for i in range(together, together + apart)
    ]
    return found + [_single(i, p) for i in range(2 * (together + apart), n)]


def _tree(features: Features, depth: int) -> Block:
    """A sample is the path from the root to the node where it ends: every leaf, and every inner node where it may stop."""
    levels, parents = features.levels(depth), features.parents(depth)
    stop = features.stop if features.mode == "early_stopping" else 0.0
    rows = np.eye(len(levels), dtype=np.uint8)
    for i, parent in enumerate(parents):
        if parent >= 0:
            rows[i] |= rows[parent]
    ends = np.where(levels == depth, 1.0, stop)
    probs = features.marginals(depth) * ends
    return _block(
        range(len(levels)), np.vstack([np.zeros_like(rows[:1]), rows]), [1 - probs.sum(), *probs]
    )


def _single(i: int, p: float) -> Block:
    return _block([i], [[0], [1]], [1 - p, p])


def _block(features: object, rows: object, probs: object) -> Block:
    """A block without its impossible outcomes."""
    p = np.asarray(probs, float)
    possible = p > 1e-12  # 1 - sum of the others is zero but for rounding
    return Block(
        np.asarray(features), np.asarray(rows, np.uint8)[possible], p[possible] / p[possible].sum()
    )

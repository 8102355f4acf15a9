"""Geometry of a dictionary, and the part of it that another seed reproduces."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from scipy import sparse
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from sae_experiments.conditions import WITH_REPLICAS
from sae_experiments.metrics.base import EvalContext, Measured, MetricInfo
from sae_experiments.metrics.codes import NOT_FINITE, nulls, sparse_codes
from sae_experiments.saes.base import SAE
from sae_experiments.saes.ops import unit_rows

WITHIN = [
    MetricInfo(
        name="dict_max_cosine",
        title="nearest atom",
        formula="mean over alive latents i of max_{j != i} cos(d_i, d_j)",
        better="down",
    ),
    MetricInfo(
        name="dict_coherence_ratio",
        title="coherence",
        formula="d mean_{i != j} cos(d_i, d_j)^2: 1 for random directions",
        better="down",
        shown=False,
    ),
    MetricInfo(
        name="dict_twin_frac",
        title="twins",
        formula="share of alive latents with max_{j != i} cos(d_i, d_j) > 0.5",
        better="down",
        shown=False,
    ),
    MetricInfo(
        name="dict_encoder_cosine",
        title="encoder-decoder cosine",
        formula="mean cos(e_j, d_j) over alive latents; low where latents absorb others",
        better="none",
        shown=False,
    ),
    MetricInfo(
        name="dict_max_cosine_random",
        title="nearest atom (random)",
        formula="the same for random directions",
        better="none",
        shown=False,
    ),
]
ACROSS = [
    MetricInfo(
        name="seed_mmcs",
        title="MMCS",
        formula=(
            "mean over own alive latents i of max_j cos(d_i, d'_j), "
            "d' of another seed on the same activations"
        ),
        better="up",
    ),
    MetricInfo(
        name="seed_mmcs_back",
        title="MMCS back",
        formula="the same from the other seed's latents",
        better="up",
        shown=False,
    ),
    MetricInfo(
        name="seed_matched_cosine",
        title="matched cosine",
        formula="max over one-to-one matchings of mean cos(d_i, d'_p(i)) (Hungarian)",
        better="up",
        shown=False,
    ),
    MetricInfo(
        name="seed_found_again",
        title="found again",
        formula=(
            "share of matched pairs with decoder and encoder cosine > 0.7, of all own alive latents"
        ),
        better="up",
    ),
    MetricInfo(
        name="seed_mmcs_random",
        title="MMCS (random)",
        formula="MMCS with a random dictionary of the same size",
        better="none",
        shown=False,
    ),
    MetricInfo(
        name="seed_matched_random",
        title="matched (random)",
        formula="matched cosine with a random dictionary of the same size",
        better="none",
        shown=False,
    ),
]
INFO = [*WITHIN, *(replace(info, depends=WITH_REPLICAS) for info in ACROSS)]


def measure(
    ctx: EvalContext,
    *,
    rows: int | None,
    match: int,
    block: int,
    twin: float,
    found_again: float,
    seed: int,
) -> Measured:
    """Cosines of decoder rows within the dictionary and with the dictionaries of other seeds.

    Only latents that fire on the evaluated rows count. Values across seeds are means over
    `ctx.replicas`, which must have been fitted to the same activations: dictionaries of different
    language models have no common basis.

    Args:
        ctx: Evaluation context.
        rows: Number of held-out rows, from the first on; None for all.
        match: Number of latents matched one to one with another seed's; the most active ones if
            more are alive, since matching is cubic in it.
        block: Latents whose cosines are computed at a time; bounds the memory.
        twin: Cosine above which two latents are twins.
        found_again: Decoder and encoder cosine above which a matched latent is found again.
        seed: Seed of the random reference dictionary.
    """
    codes = sparse_codes(ctx, rows)
    own = None if codes is None else _alive_part(ctx.sae, codes)
    if own is None:
        return nulls(INFO, NOT_FINITE)
    n, d = own.atoms.shape
    if n < 2:
        return nulls(INFO, f"{n} latents are alive")
    # Not the stream that initialised some dictionary from the same seed.
    generator = torch.Generator().manual_seed(seed + 0x5EED)
    random = unit_rows(torch.randn(own.atoms.shape, generator=generator).double())
    nearest, squares = within(own.atoms, block)
    values: dict[str, float | None] = {
        "dict_max_cosine": float(nearest.mean()),
        "dict_coherence_ratio": d * squares / (n * (n - 1)),
        "dict_twin_frac": float((nearest > twin).double().mean()),
        "dict_max_cosine_random": float(within(random, block)[0].mean()),
        "dict_encoder_cosine": None,
    }
    why_null = {}
    if ctx.sae.W_enc.shape == ctx.sae.W_dec.shape and ctx.sae.pre_bias:
        values["dict_encoder_cosine"] = float((own.encoder * own.atoms).sum(1).mean())
    else:
        why_null["dict_encoder_cosine"] = "encoder and decoder live in different spaces"
    nearest_of_all = np.full(ctx.sae.d_sae, np.nan)
    nearest_of_all[own.alive.numpy()] = nearest.numpy()
    across = _across(ctx, rows, own, random, match, found_again)
    return Measured(
        values | across.scalars,
        {"dict_max_cosine": nearest_of_all} | across.arrays,
        why_null | across.why_null,
    )


class _Dictionary(NamedTuple):
    """The n alive latents of an SAE, in float64 on the CPU."""

    alive: Tensor
    """Indices of the latents, (n,)."""
    atoms: Tensor
    """Unit decoder rows, (n, O)."""
    encoder: Tensor
    """Unit encoder rows, (n, D)."""
    mass: np.ndarray
    """Mean absolute activation, (n,)."""

    def most_active(self, n: int) -> Tensor:
        """Positions of the `n` most active latents, ascending."""
        return torch.from_numpy(np.sort(np.argsort(-self.mass, kind="stable")[:n]))


def _alive_part(sae: SAE, codes: sparse.csr_matrix) -> _Dictionary | None:
    """The latents that are active in `codes` (N, F); None if a decoder row is not finite."""
    atoms = unit_rows(sae.W_dec.detach().cpu().double())
    if not torch.isfinite(atoms).all():
        return None
    mass = np.asarray(abs(codes).mean(0, dtype=np.float64)).ravel()
    alive = np.flatnonzero(mass)
    encoder = unit_rows(sae.W_enc.detach().cpu().double())
    return _Dictionary(torch.from_numpy(alive), atoms[alive], encoder[alive], mass[alive])


def _across(
    ctx: EvalContext,
    rows: int | None,
    own: _Dictionary,
    random: Tensor,
    match: int,
    found_again: float,
) -> Measured:
    """Metrics across seeds, means over the replicas."""
    if not ctx.replicas:
        return nulls(ACROSS, "no other seed was fitted to the same activations")
    compared: list[dict[str, float]] = []
    again_frac = np.zeros(ctx.sae.d_sae)
    for replica in ctx.replicas:
        codes = sparse_codes(ctx, rows, replica)
        other = None if codes is None else _alive_part(replica, codes)
        if other is None or other.atoms.shape[1] != own.atoms.shape[1]:
            return nulls(ACROSS, f"a replica does not fit: {NOT_FINITE}, or its width differs")
        if not len(other.alive):
            return nulls(ACROSS, "a replica is dead")
        values, again = _compare(own, other, match, found_again)
        compared.append(values)
        again_frac[own.alive[again].numpy()] += 1 / len(ctx.replicas)
    means: dict[str, float | None] = {
        name: float(np.mean([values[name] for values in compared])) for name in compared[0]
    }
    reference = own.atoms @ random.t()
    kept = reference[:match, :match]
    means["seed_mmcs_random"] = float(reference.max(1).values.mean())
    means["seed_matched_random"] = float(kept[linear_sum_assignment(-kept)].mean())
    return Measured(means, {"seed_found_again": again_frac})


def _compare(
    own: _Dictionary, other: _Dictionary, match: int, found_again: float
) -> tuple[dict[str, float], Tensor]:
    """Metrics against one replica, and the positions of the own latents that it has too."""
    cosines = own.atoms @ other.atoms.t()
    mine = own.most_active(match)
    theirs = other.most_active(match)
    row, column = linear_sum_assignment(-cosines[mine][:, theirs].numpy())
    mine = mine[torch.from_numpy(row)]
    theirs = theirs[torch.from_numpy(column)]
    matched = cosines[mine, theirs]
    encoder_cosines = (own.encoder[mine] * other.encoder[theirs]).sum(1)
    again = (matched > found_again) & (encoder_cosines > found_again)
    values = {
        "seed_mmcs": float(cosines.max(1).values.mean()),
        "seed_mmcs_back": float(cosines.max(0).values.mean()),
        "seed_matched_cosine": float(matched.mean()),
        "seed_found_again": float(again.sum()) / min(len(own.alive), match),
    }
    return values, mine[again]


def within(atoms: Tensor, block: int) -> tuple[Tensor, float]:
    """Cosines between the rows of one dictionary, computed in blocks.

    Args:
        atoms: Unit rows, (n, d).
        block: Rows that are compared with all others at a time.

    Returns:
        The cosine of each row with its nearest other row, (n,), and the sum of squared cosines over
        all ordered pairs.
    """
    nearest = []
    squares = 0.0
    for begin in range(0, len(atoms), block):
        cosines = atoms[begin : begin + block] @ atoms.t()
        row = torch.arange(len(cosines))
        cosines[row, begin + row] = 0
        squares += float(cosines.square().sum())
        cosines[row, begin + row] = -math.inf
        nearest.append(cosines.max(1).values)
    return torch.cat(nearest), squares

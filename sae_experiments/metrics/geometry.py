"""The shape of a dictionary, and how much of it another seed finds again, with a random dictionary beside it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from sae_experiments.conditions import WITH_REPLICAS
from sae_experiments.metrics.base import Bench, Measured, MetricInfo
from sae_experiments.metrics.codes import NOT_FINITE, nulls, sparse_codes
from sae_experiments.saes.base import SAE

WITHIN = [
    MetricInfo(
        name="dict_max_cosine", title="nearest atom", formula="mean over alive latents i of max_{j != i} cos(d_i, d_j)", unit="", better="down"
    ),
    MetricInfo(
        name="dict_coherence_ratio",
        title="coherence",
        formula="d mean_{i != j} cos(d_i, d_j)^2: 1 for random directions",
        unit="",
        better="down",
        shown=False,
    ),
    MetricInfo(
        name="dict_twin_frac",
        title="twins",
        formula="share of alive latents with max_{j != i} cos(d_i, d_j) > 0.5",
        unit="",
        better="down",
        shown=False,
    ),
    MetricInfo(
        name="dict_encoder_cosine",
        title="encoder-decoder cosine",
        formula="mean cos(e_j, d_j) over alive latents; low where latents absorb others",
        unit="",
        better="none",
        shown=False,
    ),
    MetricInfo(
        name="dict_max_cosine_random", title="nearest atom (random)", formula="the same for random directions", unit="", better="none", shown=False
    ),
]
ACROSS = [
    MetricInfo(
        name="seed_mmcs",
        title="MMCS",
        formula="mean over own alive latents i of max_j cos(d_i, d'_j), d' of another seed on the same activations",
        unit="",
        better="up",
    ),
    MetricInfo(name="seed_mmcs_back", title="MMCS back", formula="the same from the other seed's latents", unit="", better="up", shown=False),
    MetricInfo(
        name="seed_matched_cosine",
        title="matched cosine",
        formula="max over one-to-one matchings of mean cos(d_i, d'_p(i)) (Hungarian)",
        unit="",
        better="up",
        shown=False,
    ),
    MetricInfo(
        name="seed_found_again",
        title="found again",
        formula="share of matched pairs with decoder and encoder cosine > 0.7, of all own alive latents",
        unit="",
        better="up",
    ),
    MetricInfo(
        name="seed_mmcs_random", title="MMCS (random)", formula="MMCS with a random dictionary of the same size", unit="", better="none", shown=False
    ),
    MetricInfo(
        name="seed_matched_random",
        title="matched (random)",
        formula="matched cosine with a random dictionary of the same size",
        unit="",
        better="none",
        shown=False,
    ),
]
INFO = [*WITHIN, *(replace(info, depends=WITH_REPLICAS) for info in ACROSS)]


def measure(bench: Bench, *, rows: int | None, match: int, block: int, twin: float, found_again: float, seed: int) -> Measured:
    """Cosines within the dictionary and with the dictionaries of ``bench.replicas`` (means over them); latents that fire on ``rows`` only.

    Matching one to one is cubic: of more than ``match`` alive latents the most active are taken. A replica must have been fitted to the
    same activations: dictionaries of different language models have no common basis.
    """
    codes = sparse_codes(bench, rows)
    atoms = _atoms(bench.sae)
    if codes is None or not torch.isfinite(atoms).all():
        return nulls(INFO, NOT_FINITE)
    mass = _mass(codes)
    alive = torch.from_numpy(np.flatnonzero(mass))
    if len(alive) < 2:
        return nulls(INFO, f"{len(alive)} latents are alive")
    own, generator = atoms[alive], torch.Generator().manual_seed(seed + 0x5EED)  # not the stream that drew some dictionary
    nearest, squares = within(own, block)
    random = unit(torch.randn(own.shape, generator=generator))
    n, d = own.shape
    values: dict[str, float | None] = {
        "dict_max_cosine": float(nearest.mean()),
        "dict_coherence_ratio": d * squares / (n * (n - 1)),
        "dict_twin_frac": float((nearest > twin).double().mean()),
        "dict_max_cosine_random": float(within(random, block)[0].mean()),
    }
    why, aligned = {}, _encoder_cosine(bench.sae)
    values["dict_encoder_cosine"] = None if aligned is None else float(aligned[alive].mean())
    if aligned is None:
        why["dict_encoder_cosine"] = "encoder and decoder live in different spaces"
    arrays = {"dict_max_cosine": _spread(nearest, alive, len(atoms))}
    across = _across(bench, rows, own, alive, mass, random, match, found_again)
    return Measured(values | across.scalars, arrays | across.arrays, why | across.why_null)


def _across(bench: Bench, rows: int | None, own: Tensor, alive: Tensor, mass: np.ndarray, random: Tensor, match: int, found_again: float) -> Measured:
    if not bench.replicas:
        return nulls(ACROSS, "no other seed was fitted to the same activations")
    found: list[dict[str, float]] = []
    again = np.zeros(len(mass))
    for other in bench.replicas:
        codes, atoms = sparse_codes(bench, rows, other), _atoms(other)
        if codes is None or atoms.shape[1] != own.shape[1] or not torch.isfinite(atoms).all():
            return nulls(ACROSS, f"a replica does not fit: {NOT_FINITE}, or its width differs")
        theirs = torch.from_numpy(np.flatnonzero(_mass(codes)))
        if not len(theirs):
            return nulls(ACROSS, "a replica is dead")
        cosines = own @ atoms[theirs].t()
        mine, yours = (torch.from_numpy(np.sort(np.argsort(-m, kind="stable")[:match])) for m in (mass[alive], _mass(codes)[theirs]))
        rows_at, cols_at = linear_sum_assignment(-cosines[mine][:, yours].numpy())
        pairs = mine[torch.from_numpy(rows_at)], yours[torch.from_numpy(cols_at)]
        encoders = (unit(bench.sae.W_enc.detach().cpu().double())[alive[pairs[0]]] * unit(other.W_enc.detach().cpu().double())[theirs[pairs[1]]]).sum(
            1
        )
        both = (cosines[pairs] > found_again) & (encoders > found_again)
        again[alive[pairs[0]].numpy()] += both.numpy() / len(bench.replicas)
        found.append(
            {
                "seed_mmcs": float(cosines.max(1).values.mean()),
                "seed_mmcs_back": float(cosines.max(0).values.mean()),
                "seed_matched_cosine": float(cosines[pairs].mean()),
                "seed_found_again": float(both.sum()) / min(len(alive), match),
            }
        )
    reference = own @ random.t()
    kept = reference[:match, :match]
    values = {name: float(np.mean([f[name] for f in found])) for name in found[0]}
    values |= {"seed_mmcs_random": float(reference.max(1).values.mean()), "seed_matched_random": float(kept[linear_sum_assignment(-kept)].mean())}
    return Measured(values, {"seed_found_again": again})


def within(atoms: Tensor, block: int) -> tuple[Tensor, float]:
    """Cosine with the nearest other row (n,), and the sum of squared cosines of all ordered pairs, block by block of unit rows (n, d)."""
    nearest, squares = [], 0.0
    for begin in range(0, len(atoms), block):
        cosines = atoms[begin : begin + block] @ atoms.t()
        cosines[torch.arange(len(cosines)), torch.arange(begin, begin + len(cosines))] = 0
        squares += float(cosines.square().sum())
        cosines[torch.arange(len(cosines)), torch.arange(begin, begin + len(cosines))] = -math.inf
        nearest.append(cosines.max(1).values)
    return torch.cat(nearest), squares


def unit(rows: Tensor) -> Tensor:
    """Rows at length 1 (zero rows stay zero), in float64."""
    rows = rows.double()
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)


def _atoms(sae: SAE) -> Tensor:
    return unit(sae.W_dec.detach().cpu())


def _mass(codes) -> np.ndarray:
    """Mean absolute activation of every latent, (F,)."""
    return np.asarray(abs(codes).mean(0, dtype=np.float64)).ravel()


def _encoder_cosine(sae: SAE) -> Tensor | None:
    if sae.W_enc.shape != sae.W_dec.shape or not sae.pre_bias:
        return None
    return (unit(sae.W_enc.detach().cpu()) * _atoms(sae)).sum(1)


def _spread(values: Tensor, alive: Tensor, n: int) -> np.ndarray:
    out = np.full(n, np.nan)
    out[alive.numpy()] = values.numpy()
    return out

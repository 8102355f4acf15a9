"""What the latents of the palindrome study mean: strongest strings, (position, letter) selectivity; and what its transformer does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae_experiments.metric_info import MetricInfo
from sae_experiments.saes.base import SAE
from sae_experiments.studies.palindrome.strings import HALF, LENGTH, LETTERS, text_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Analysis:
    """What is kept of every latent: its ``strongest`` strings; attention and log-probabilities of ``samples`` test strings."""

    strongest: int
    samples: int
    selective: (
        float  # a latent is selective if one (position, letter) explains this share of its variance
    )


class Selectivity(NamedTuple):
    """Numbers, arrays, and what the feature browser shows."""

    scalars: dict[str, float | None]
    arrays: dict[str, np.ndarray]
    why_null: dict[str, str]
    browser: list[dict[str, Any]]


@torch.no_grad()
def measure(
    sae: SAE, x: Tensor, ids: Tensor, n_test: int, analysis: Analysis, mean: Tensor | float = 0.0
) -> Selectivity:
    """Measure an SAE on the vectors (N, D) of all strings (N, 9), the last ``n_test`` of which it was not trained on.

    ``mean`` (D,): what was taken out of the vectors before the SAE saw them. A latent is active where z > 0. Two definitions of alive: active on
    at least one test string, and active on average, a mean above zero over the test strings. Two of explained variance: about the mean vector,
    and about one mean of all entries (:func:`explained`). Selectivity (F, 3, 26): ``E[z | letter at position] - E[z]`` in standard
    deviations of z; a position's share is how much of a latent's variance its letter explains (eta squared).
    """
    acts = sae.encode(x)
    test = x[-n_test:]
    active = acts[-n_test:] > 0
    counts = active.sum(0)
    alive = counts > 0
    about_vector, about_number = explained(test + mean, test - sae.decode(acts[-n_test:]))
    table, share = tables(acts, ids[:, 1 : 1 + HALF])
    best = share.max(1).values
    any_alive = bool(alive.any())
    scalars: dict[str, float | None] = {
        "explained_variance": about_vector,
        "explained_variance_entries": about_number,
        "alive_latents": float(alive.sum()),
        "alive_on_average_latents": float((acts[-n_test:].mean(0) > 0).sum()),
        "alive_frac": float(alive.float().mean()),
        "sae_l0": float(active.float().sum(1).mean()),
        "selective_frac": float((best[alive] >= analysis.selective).float().mean())
        if any_alive
        else None,
    }
    arrays = {
        "dictionary": sae.W_dec.view(sae.d_sae, LENGTH - 1, -1).cpu().numpy().astype(np.float32),
        "selectivity": table.cpu().numpy().astype(np.float32),
        "position_share": share.cpu().numpy().astype(np.float32),
        "active_frac": (counts / n_test).cpu().numpy().astype(np.float32),
        "mean_activation": acts.mean(0).cpu().numpy().astype(np.float32),
    }
    why = {} if any_alive else {"selective_frac": "no latent is alive"}
    why |= {
        name: "the vectors of the test strings do not vary"
        for name in ("explained_variance", "explained_variance_entries")
        if scalars[name] is None
    }
    return Selectivity(
        scalars, arrays, why, browser(acts, ids, table, share, counts / n_test, analysis.strongest)
    )


def explained(x: Tensor, error: Tensor) -> tuple[float | None, float | None]:
    """Share of the variance of vectors (N, D) that a reconstruction with ``error`` (N, D) explains, by two definitions.

    The first is ``1 - sum ||e||^2 / sum ||x - mean x||^2`` with the mean vector, so that a constant reconstruction explains nothing. The second is
    ``1 - Var e / Var x``, the variances over all entries about one mean each: what the coordinates' means differ by counts as variance
    to be explained, and a constant error is forgiven. None where there is no variance.
    """
    x, error = x.double(), error.double()
    vectors, entries = (x - x.mean(0)).square().sum(), x.var(correction=0)
    return (
        float(1 - error.square().sum() / vectors) if vectors > 0 else None,
        float(1 - error.var(correction=0) / entries) if entries > 0 else None,
    )


def tables(acts: Tensor, letters: Tensor) -> tuple[Tensor, Tensor]:
    """Selectivity (F, 3, 26) and the share (F, 3) of each latent's variance that the letter at a position explains; 0 for a constant latent."""
    n, n_letters = len(acts), len(LETTERS)
    mean, std = acts.mean(0), acts.std(0, correction=0)
    scale = torch.where(std > 1e-9, 1 / std.clamp_min(1e-9), 0.0)
    found, shares = [], []
    for position in range(letters.shape[1]):
        column = letters[:, position]
        sums = acts.new_zeros(n_letters, acts.shape[1]).index_add_(0, column, acts)
        counts = torch.bincount(column, minlength=n_letters).to(acts.dtype)[:, None]
        above = torch.where(counts > 0, (sums / counts.clamp_min(1) - mean) * scale, 0.0)
        found.append(above.t())
        shares.append((above.square() * counts / n).sum(0))
    return torch.stack(found, 1), torch.stack(shares, 1)


def browser(
    acts: Tensor, ids: Tensor, table: Tensor, share: Tensor, active: Tensor, strongest: int
) -> list[dict[str, Any]]:
    """For every latent: its strongest strings with their activations, and the position (1 to 3) and letter that it answers to most.

    ``share`` of its variance is explained by the letter there; ``selectivity`` is in standard deviations.
    """
    values, rows = acts.topk(strongest, dim=0)
    texts = {i: text_of(ids[i]) for i in rows.unique().tolist()}
    latents = []
    for j in range(acts.shape[1]):
        position = int(share[j].argmax())
        letter = int(table[j, position].argmax())
        strings = [
            [texts[i], round(v, 4)]
            for i, v in zip(rows[:, j].tolist(), values[:, j].tolist(), strict=True)
            if v > 0
        ]
        strength = {"density": round(float(active[j]), 5), "max": round(float(values[0, j]), 4)}
        rule = (
            {"rule": f"{LETTERS[letter]} as letter {position + 1}"}
            if table[j, position, letter] > 0
            else {}
        )
        about = (
            strength
            | rule
            | {
                "position": position + 1,
                "letter": LETTERS[letter],
                "selectivity": round(float(table[j, position, letter]), 3),
            }
        )
        latents.append(
            {
                "latent": j,
                "active_frac": round(float(active[j]), 5),
                "share": round(float(share[j, position]), 4),
                **about,
                "strings": strings,
            }
        )
    return latents


@torch.no_grad()
def look(model: torch.nn.Module, samples: Tensor, strings: Tensor) -> dict[str, np.ndarray]:
    """Attention (8, 8) from each position to those before, mean over ``strings`` and for each of ``samples``; log-probabilities of the samples' characters."""
    kind = model.config._attn_implementation
    model.set_attn_implementation("eager")  # the fused kernel does not give its weights away
    try:
        out = model(input_ids=samples[:, :-1], use_cache=False, output_attentions=True)
        mean = (
            model(input_ids=strings[:, :-1], use_cache=False, output_attentions=True)
            .attentions[0]
            .mean((0, 1))
        )
    finally:
        model.set_attn_implementation(kind)
    logp = out.logits.float().log_softmax(-1)
    return {
        "attention_mean": mean.float().cpu().numpy(),
        "attention": out.attentions[0].mean(1).float().cpu().numpy(),
        "token_logprob": logp.gather(-1, samples[:, 1:, None])[..., 0].cpu().numpy(),
        "samples": np.array([text_of(ids) for ids in samples]),
    }


def _info(
    name: str, title: str, formula: str, unit: str, better: Any, *, shown: bool = True
) -> MetricInfo:
    return MetricInfo(
        name=name, title=title, formula=formula, unit=unit, better=better, shown=shown
    )


INFO = [
    _info(
        "explained_variance",
        "explained variance",
        "1 - ||x - xhat||^2 / ||x - mean x||^2 over the test strings, about the mean vector",
        "",
        "up",
    ),
    _info(
        "explained_variance_entries",
        "explained variance (entries)",
        "1 - Var(x - xhat) / Var(x) over all entries of the test strings' vectors, about one mean of all entries",
        "",
        "up",
        shown=False,
    ),
    _info(
        "alive_latents",
        "alive latents",
        "latents active (above zero) on at least one test string",
        "",
        "up",
    ),
    _info(
        "alive_on_average_latents",
        "alive on average",
        "latents whose mean over the test strings is above zero",
        "",
        "up",
        shown=False,
    ),
    _info("alive_frac", "alive (share)", "alive_latents / d_sae", "", "up", shown=False),
    _info("sae_l0", "L0", "latents active on a test string, mean", "", "target"),
    _info(
        "selective_frac",
        "selective latents",
        "share of the alive latents of which the letter at one position explains most of the variance",
        "",
        "none",
    ),
]

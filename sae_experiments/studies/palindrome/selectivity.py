"""Meaning of the palindrome study's latents, and attention of its transformer.

A latent is described by its strongest strings and by its selectivity for letters at positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae_experiments.metric_info import info
from sae_experiments.models.layouts import CausalLM
from sae_experiments.models.linear_blocks import eager_attention
from sae_experiments.saes.base import SAE
from sae_experiments.studies.palindrome.strings import HALF, LENGTH, LETTERS, text_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Analysis:
    """Size of the analysis."""

    strongest: int
    """Strongest strings kept of every latent."""
    samples: int
    """Test strings whose attention and log-probabilities are kept."""
    selective: float
    """A latent is selective if the letter at one position explains this share of its variance."""


class Selectivity(NamedTuple):
    """Results of `measure`."""

    scalars: dict[str, float | None]
    """Numbers by name; None if undefined."""
    arrays: dict[str, np.ndarray]
    """Arrays for figures."""
    why_null: dict[str, str]
    """Reasons of undefined numbers."""
    browser: list[dict[str, Any]]
    """Entries of the feature browser, one per latent."""


@torch.no_grad()
def measure(
    sae: SAE, x: Tensor, ids: Tensor, n_test: int, analysis: Analysis, mean: Tensor | float = 0.0
) -> Selectivity:
    """Measure an SAE on all strings.

    A latent is active where z > 0. There are two definitions of an alive latent: active on at least
    one test string, and a mean above zero over the test strings. There are also two of explained
    variance, see `explained`.

    Args:
        sae: The SAE.
        x: Vectors of all strings, (N, D).
        ids: Ids of the strings, (N, 9).
        n_test: Number of test strings, the last ones.
        analysis: Size of the analysis.
        mean: Vector (D,) that was subtracted from the vectors.
    """
    acts = sae.encode(x)
    test, test_acts = x[-n_test:], acts[-n_test:]
    active = test_acts > 0
    counts = active.sum(0)
    alive = counts > 0
    about_vector, about_number = explained(test + mean, test - sae.decode(test_acts))
    table, share = tables(acts, ids[:, 1 : 1 + HALF])
    best = share.max(1).values
    selective = None
    if bool(alive.any()):
        selective = float((best[alive] >= analysis.selective).float().mean())
    scalars: dict[str, float | None] = {
        "explained_variance": about_vector,
        "explained_variance_entries": about_number,
        "alive_latents": float(alive.sum()),
        "alive_on_average_latents": float((test_acts.mean(0) > 0).sum()),
        "alive_frac": float(alive.float().mean()),
        "sae_l0": float(active.float().sum(1).mean()),
        "selective_frac": selective,
    }
    arrays = {
        "dictionary": sae.W_dec.view(sae.d_sae, LENGTH - 1, -1).cpu().numpy().astype(np.float32),
        "selectivity": table.cpu().numpy().astype(np.float32),
        "position_share": share.cpu().numpy().astype(np.float32),
        "active_frac": (counts / n_test).cpu().numpy().astype(np.float32),
        "mean_activation": acts.mean(0).cpu().numpy().astype(np.float32),
    }
    why = {} if selective is not None else {"selective_frac": "no latent is alive"}
    for name in ("explained_variance", "explained_variance_entries"):
        if scalars[name] is None:
            why[name] = "the vectors of the test strings do not vary"
    entries = browser(acts, ids, table, share, counts / n_test, analysis.strongest)
    return Selectivity(scalars, arrays, why, entries)


def explained(x: Tensor, error: Tensor) -> tuple[float | None, float | None]:
    """Share of the variance that a reconstruction explains, by two definitions.

    The first is `1 - sum ||e||^2 / sum ||x - mean x||^2` with the mean vector, so that a constant
    reconstruction explains nothing. The second is `1 - Var e / Var x`, with variances over all
    entries about one mean each: differences between the means of the coordinates count as variance
    to be explained, and a constant error is forgiven.

    Args:
        x: Vectors (N, D).
        error: Errors of their reconstructions, (N, D).

    Returns:
        Both shares; None without variance.
    """
    x, error = x.double(), error.double()
    vectors = (x - x.mean(0)).square().sum()
    entries = x.var(correction=0)
    about_vector = float(1 - error.square().sum() / vectors) if vectors > 0 else None
    about_number = float(1 - error.var(correction=0) / entries) if entries > 0 else None
    return about_vector, about_number


def tables(acts: Tensor, letters: Tensor) -> tuple[Tensor, Tensor]:
    """Selectivity of latents for letters at positions.

    Args:
        acts: Dense codes (N, F).
        letters: Letters at three positions, (N, 3).

    Returns:
        `E[z | letter at position] - E[z]` in standard deviations of z, (F, 3, 26), and the share of
        each latent's variance that the letter at a position explains (eta squared), (F, 3). Both
        are 0 for a constant latent.
    """
    n, n_letters = len(acts), len(LETTERS)
    mean, std = acts.mean(0), acts.std(0, correction=0)
    scale = torch.where(std > 1e-9, 1 / std.clamp_min(1e-9), 0.0)
    selectivity, shares = [], []
    for position in range(letters.shape[1]):
        column = letters[:, position]
        sums = acts.new_zeros(n_letters, acts.shape[1]).index_add_(0, column, acts)
        counts = torch.bincount(column, minlength=n_letters).to(acts.dtype)[:, None]
        above = torch.where(counts > 0, (sums / counts.clamp_min(1) - mean) * scale, 0.0)
        selectivity.append(above.t())
        shares.append((above.square() * counts / n).sum(0))
    return torch.stack(selectivity, 1), torch.stack(shares, 1)


def browser(
    acts: Tensor, ids: Tensor, table: Tensor, share: Tensor, active: Tensor, strongest: int
) -> list[dict[str, Any]]:
    """Entries of the feature browser.

    Each holds the strongest strings of a latent with their activations, and the position (1 to 3)
    and letter that it is most selective for.

    Args:
        acts: Dense codes (N, F).
        ids: Ids of the strings, (N, 9).
        table: Selectivity (F, 3, 26).
        share: Share of the variance that each position explains, (F, 3).
        active: Share of the test strings on which each latent is active, (F,).
        strongest: Number of strings.
    """
    values, rows = acts.topk(strongest, dim=0)
    texts = {i: text_of(ids[i]) for i in rows.unique().tolist()}
    latents = []
    for j in range(acts.shape[1]):
        position = int(share[j].argmax())
        letter = int(table[j, position].argmax())
        selectivity = float(table[j, position, letter])
        pairs = zip(rows[:, j].tolist(), values[:, j].tolist(), strict=True)
        entry: dict[str, Any] = {
            "latent": j,
            "active_frac": round(float(active[j]), 5),
            "share": round(float(share[j, position]), 4),
            "density": round(float(active[j]), 5),
            "max": round(float(values[0, j]), 4),
        }
        if selectivity > 0:
            entry["rule"] = f"{LETTERS[letter]} as letter {position + 1}"
        entry |= {
            "position": position + 1,
            "letter": LETTERS[letter],
            "selectivity": round(selectivity, 3),
            "strings": [[texts[i], round(value, 4)] for i, value in pairs if value > 0],
        }
        latents.append(entry)
    return latents


@torch.no_grad()
def look(model: CausalLM, samples: Tensor, strings: Tensor) -> dict[str, np.ndarray]:
    """Attention of the transformer, and log-probabilities of characters.

    Args:
        model: The transformer.
        samples: Strings (n, 9) whose own attention (n, 8, 8) and log-probabilities are returned.
        strings: Strings (N, 9) over which the mean attention (8, 8) is taken.
    """
    with eager_attention(model):
        out = model(input_ids=samples[:, :-1], use_cache=False, output_attentions=True)
        whole = model(input_ids=strings[:, :-1], use_cache=False, output_attentions=True)
    mean = whole.attentions[0].mean((0, 1))
    logp = out.logits.float().log_softmax(-1)
    return {
        "attention_mean": mean.float().cpu().numpy(),
        "attention": out.attentions[0].mean(1).float().cpu().numpy(),
        "token_logprob": logp.gather(-1, samples[:, 1:, None])[..., 0].cpu().numpy(),
        "samples": np.array([text_of(ids) for ids in samples]),
    }


INFO = [
    info(
        "explained_variance",
        "explained variance",
        "1 - ||x - xhat||^2 / ||x - mean x||^2 over the test strings, about the mean vector",
        "up",
    ),
    info(
        "explained_variance_entries",
        "explained variance (entries)",
        "1 - Var(x - xhat) / Var(x) over all entries of the test strings' vectors, "
        "about one mean of all entries",
        "up",
        shown=False,
    ),
    info(
        "alive_latents",
        "alive latents",
        "latents active (above zero) on at least one test string",
        "up",
    ),
    info(
        "alive_on_average_latents",
        "alive on average",
        "latents whose mean over the test strings is above zero",
        "up",
        shown=False,
    ),
    info("alive_frac", "alive (share)", "alive_latents / d_sae", "up", shown=False),
    info("sae_l0", "L0", "latents active on a test string, mean", "target"),
    info(
        "selective_frac",
        "selective latents",
        "share of the alive latents of which the letter at one position explains most of the "
        "variance",
        "none",
    ),
]

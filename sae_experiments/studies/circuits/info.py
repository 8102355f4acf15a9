"""Descriptions of the metrics of a circuit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sae_experiments.conditions import ON_ACTIVATIONS
from sae_experiments.metric_info import MetricInfo, info

WHAT = "A(clean) - A(without one upstream latent)"
METHODS = {
    "attribution": "z dA/dz",
    "cosine": "cosine of decoder and encoder directions",
    "gated_cosine": "the same with mean slopes of the neurons",
    "coactivation": "phi of firing at that lag",
    "activation": "|z|",
    "random": "random order",
}


PLACES = {"": "same position", "earlier_": "earlier positions"}
POOLS = {"": "at the target's position", "all_": "at all positions up to the target's"}
PARTS = ("latents", "error", "bias", "rest")
OTHERS = {
    "earlier_n_pairs": "pairs at earlier positions whose effect was measured",
    "n_attributed_pairs": (
        "pairs of a target and an active upstream latent at or before it that were attributed"
    ),
    "earlier_attribution_sign_agreement": (
        "share of pairs at earlier positions where attribution and effect have one sign"
    ),
    "earlier_attribution_slope": "slope of effect on attribution at earlier positions",
}


def infos(nudges: Sequence[float]) -> list[MetricInfo]:
    """Descriptions of all metrics of a circuit.

    Args:
        nudges: Steps along the gradient, as shares of the norm of the codes.
    """
    described = [*MAIN, *_completeness()]
    for step in nudges:
        described += _nudge(step)
    names = {known.name for known in described}
    rest = (*_single_removals(), *_deletions(), *_others())
    return described + [extra for extra in rest if extra.name not in names]


def _completeness() -> list[MetricInfo]:
    """Shares of the pre-activations that the parts of the upstream state account for."""
    return [
        info(
            f"completeness_{part}",
            f"share of {part}",
            f"sum of {part} gradient terms / sum of A",
            "none",
            shown=False,
        )
        for part in PARTS
    ]


def _nudge(step: float) -> list[MetricInfo]:
    """Agreement of predicted and actual change for one step along the gradient."""
    name = f"nudge_{step:g}".replace(".", "_")
    return [
        info(
            f"{name}_pearson",
            f"r(nudge {step:g})",
            f"Pearson of predicted and actual change, step {step:g} of the codes' norm",
            "up",
        ),
        info(
            f"{name}_slope",
            f"slope (nudge {step:g})",
            "least-squares slope of actual on predicted change",
            "none",
            shown=False,
        ),
    ]


def _single_removals() -> list[MetricInfo]:
    """Agreement of each method with the effects of removing single latents."""
    described = []
    for prefix, place in PLACES.items():
        for method, formula in METHODS.items():
            if method == "random":
                continue
            for kind in ("pearson", "spearman"):
                name = f"{prefix}{method}_ablation_{kind}"
                formula_of_kind = f"{kind} of {formula} and {WHAT}, {place}"
                described.append(_hidden(name, formula_of_kind, "up"))
    return described


def _deletions() -> list[MetricInfo]:
    """Areas of the deletion curves of each method, and gains of attribution over the others."""
    described = []
    for prefix, pool in POOLS.items():
        for method, formula in METHODS.items():
            name = f"{prefix}deletion_area_{method}"
            described.append(
                _hidden(name, f"share of A removed, latents {pool} by {formula}", "up")
            )
        for method in ("cosine", "coactivation"):
            name = f"{prefix}deletion_gain_over_{method}"
            gain = f"deletion area by attribution less that by {method}, latents {pool}"
            low = info(
                f"{name}_low",
                f"{name} (low)".replace("_", " "),
                "lower end of its 95 % bootstrap interval over prompts",
                "up",
                shown=False,
            )
            described += [_hidden(name, gain, "up"), low]
    return described


def _others() -> list[MetricInfo]:
    return [_hidden(name, formula, "none") for name, formula in OTHERS.items()]


def _hidden(name: str, formula: str, better: Any) -> MetricInfo:
    """A metric that the printed tables leave out, with its name as title."""
    return info(name, name.replace("_", " "), formula, better, shown=False)


#: The numbers that tables show.
MAIN = [
    info(
        "attribution_ablation_pearson",
        "r(attribution, ablation)",
        f"Pearson of z dA/dz and {WHAT}, same position",
        "up",
    ),
    info(
        "attribution_ablation_spearman",
        "rho(attribution, ablation)",
        f"Spearman of z dA/dz and {WHAT}, same position",
        "up",
    ),
    info(
        "attribution_slope",
        "slope",
        "least-squares slope of effect on attribution, same position (ideal 1)",
        "none",
    ),
    info(
        "attribution_sign_agreement",
        "same sign",
        "share of pairs where attribution and effect have one sign",
        "up",
    ),
    info(
        "cosine_ablation_pearson",
        "r(cosine, ablation)",
        f"Pearson of the weights' cosine and {WHAT}, same position",
        "none",
    ),
    info(
        "coactivation_ablation_pearson",
        "r(co-activation, ablation)",
        f"Pearson of phi of firing and {WHAT}, same position",
        "none",
    ),
    info(
        "earlier_attribution_ablation_pearson",
        "r, earlier positions",
        f"Pearson of z dA/dz and {WHAT}, earlier positions",
        "up",
    ),
    info(
        "deletion_area_attribution",
        "deletion: attribution",
        "mean over q = 1, 2, 4, ... of the share of A removed with the q first latents",
        "up",
    ),
    info(
        "deletion_gain_over_cosine",
        "gain over cosine",
        "deletion area by attribution less that by cosine",
        "up",
    ),
    info(
        "deletion_gain_over_coactivation",
        "gain over co-activation",
        "deletion area by attribution less that by co-activation",
        "up",
    ),
    info("n_pairs", "pairs", "pairs at the same position whose effect was measured", "none"),
    info(
        "attribution_targets_per_second",
        "targets/s",
        "targets attributed to all upstream latents at all positions",
        "up",
        unit="1/s",
        depends=(*ON_ACTIVATIONS, "device"),
    ),
    info(
        "integrated_gap",
        "IG gap",
        "sum |sum of integrated gradients - effect of removing all| / sum |effect|",
        "down",
    ),
    info(
        "joint_ablation_pearson",
        "r(joint)",
        "Pearson of the sum of attributions and the effect of removing all upstream latents",
        "up",
    ),
    info(
        "ngram_f1",
        "n-gram F1",
        "mean F1 of the chosen downstream latents with their n-gram, chosen on other text",
        "none",
    ),
]

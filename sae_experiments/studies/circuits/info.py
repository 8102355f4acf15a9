"""Title, formula and direction of every number of a circuit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sae_experiments.conditions import ON_ACTIVATIONS
from sae_experiments.metric_info import MetricInfo

WHAT = "A(clean) - A(without one upstream latent)"
METHODS = {
    "attribution": "z dA/dz",
    "cosine": "cosine of decoder and encoder directions",
    "gated_cosine": "the same with mean slopes of the neurons",
    "coactivation": "phi of firing at that lag",
    "activation": "|z|",
    "random": "random order",
}


def infos(nudges: Sequence[float]) -> list[MetricInfo]:
    """All of them; ``nudges`` are the steps along the gradient."""
    found = [
        _info(
            "attribution_ablation_pearson",
            "r(attribution, ablation)",
            f"Pearson of z dA/dz and {WHAT}, same position",
            "up",
        ),
        _info(
            "attribution_ablation_spearman",
            "rho(attribution, ablation)",
            f"Spearman of z dA/dz and {WHAT}, same position",
            "up",
        ),
        _info(
            "attribution_slope",
            "slope",
            "least-squares slope of effect on attribution, same position (ideal 1)",
            "none",
        ),
        _info(
            "attribution_sign_agreement",
            "same sign",
            "share of pairs where attribution and effect have one sign",
            "up",
        ),
        _info(
            "cosine_ablation_pearson",
            "r(cosine, ablation)",
            f"Pearson of the weights' cosine and {WHAT}, same position",
            "none",
        ),
        _info(
            "coactivation_ablation_pearson",
            "r(co-activation, ablation)",
            f"Pearson of phi of firing and {WHAT}, same position",
            "none",
        ),
        _info(
            "earlier_attribution_ablation_pearson",
            "r, earlier positions",
            f"Pearson of z dA/dz and {WHAT}, earlier positions",
            "up",
        ),
        _info(
            "deletion_area_attribution",
            "deletion: attribution",
            "mean over q = 1, 2, 4, ... of the share of A removed with the q first latents",
            "up",
        ),
        _info(
            "deletion_gain_over_cosine",
            "gain over cosine",
            "deletion area by attribution less that by cosine",
            "up",
        ),
        _info(
            "deletion_gain_over_coactivation",
            "gain over co-activation",
            "deletion area by attribution less that by co-activation",
            "up",
        ),
        _info("n_pairs", "pairs", "pairs at the same position whose effect was measured", "none"),
        _info(
            "attribution_targets_per_second",
            "targets/s",
            "targets attributed to all upstream latents at all positions",
            "up",
            "1/s",
            depends=(*ON_ACTIVATIONS, "device"),
        ),
        _info(
            "integrated_gap",
            "IG gap",
            "sum |sum of integrated gradients - effect of removing all| / sum |effect|",
            "down",
        ),
        _info(
            "joint_ablation_pearson",
            "r(joint)",
            "Pearson of the sum of attributions and the effect of removing all upstream latents",
            "up",
        ),
        _info(
            "ngram_f1",
            "n-gram F1",
            "mean F1 of the chosen downstream latents with their n-gram, chosen on other text",
            "none",
        ),
    ]
    found += [
        _info(
            f"completeness_{k}",
            f"share of {k}",
            f"sum of {k} gradient terms / sum of A",
            "none",
            shown=False,
        )
        for k in PARTS
    ]
    for step in nudges:
        name = f"nudge_{step:g}".replace(".", "_")
        found.append(
            _info(
                f"{name}_pearson",
                f"r(nudge {step:g})",
                f"Pearson of predicted and actual change, step {step:g} of the codes' norm",
                "up",
            )
        )
        found.append(
            _info(
                f"{name}_slope",
                f"slope (nudge {step:g})",
                "least-squares slope of actual on predicted change",
                "none",
                shown=False,
            )
        )
    known = {i.name for i in found}
    for prefix, place in (("", "same position"), ("earlier_", "earlier positions")):
        for method, formula in METHODS.items():
            for kind in ("pearson", "spearman") if method != "random" else ():
                name = f"{prefix}{method}_ablation_{kind}"
                found += [
                    _info(
                        name,
                        name.replace("_", " "),
                        f"{kind} of {formula} and {WHAT}, {place}",
                        "up",
                        shown=False,
                    )
                ] * (name not in known)
    for prefix, pool in (
        ("", "at the target's position"),
        ("all_", "at all positions up to the target's"),
    ):
        for method, formula in METHODS.items():
            name, how = (
                f"{prefix}deletion_area_{method}",
                f"share of A removed, latents {pool} by {formula}",
            )
            found += [_info(name, name.replace("_", " "), how, "up", shown=False)] * (
                name not in known
            )
        for method in ("cosine", "coactivation"):
            name = f"{prefix}deletion_gain_over_{method}"
            how = f"deletion area by attribution less that by {method}, latents {pool}"
            found += [_info(name, name.replace("_", " "), how, "up", shown=False)] * (
                name not in known
            )
            found.append(
                _info(
                    f"{name}_low",
                    f"{name} (low)".replace("_", " "),
                    "lower end of its 95 % bootstrap interval over prompts",
                    "up",
                    shown=False,
                )
            )
    for name, how in OTHERS.items():
        found.append(_info(name, name.replace("_", " "), how, "none", shown=False))
    return found


PARTS = ("latents", "error", "bias", "rest")
OTHERS = {
    "earlier_n_pairs": "pairs at earlier positions whose effect was measured",
    "n_attributed_pairs": "pairs of a target and an active upstream latent at or before it that were attributed",
    "earlier_attribution_sign_agreement": "share of pairs at earlier positions where attribution and effect have one sign",
    "earlier_attribution_slope": "slope of effect on attribution at earlier positions",
}


def _info(
    name: str,
    title: str,
    formula: str,
    better: Any,
    unit: str = "",
    *,
    shown: bool = True,
    depends: tuple[str, ...] = ON_ACTIVATIONS,
) -> MetricInfo:
    return MetricInfo(
        name=name,
        title=title,
        formula=formula,
        unit=unit,
        better=better,
        shown=shown,
        depends=depends,
    )

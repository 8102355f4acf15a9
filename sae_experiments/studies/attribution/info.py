"""Descriptions of the metrics of attribution graphs and their checks."""

from __future__ import annotations

from sae_experiments.conditions import OF_SAE_TIME, ON_ACTIVATIONS
from sae_experiments.metric_info import Better, MetricInfo, info
from sae_experiments.studies.attribution import removal

_MEAN = "mean over prompts"
_GRAPH: list[tuple[str, str, str, Better, bool]] = [
    ("graph_replacement", "replacement", "influence of tokens / (tokens + errors)", "up", True),
    (
        "graph_completeness",
        "completeness",
        "share of the edges into a node that is not from errors, weighted by influence, over nodes "
        "with inputs",
        "up",
        True,
    ),
    (
        "graph_completeness_all",
        "completeness (all)",
        "the same with tokens and errors counted as complete nodes, as circuit-tracer counts",
        "up",
        False,
    ),
    (
        "pruned_replacement",
        "replacement, pruned",
        "replacement of the pruned graph, dropped latents counted as errors",
        "up",
        False,
    ),
    (
        "pruned_completeness",
        "completeness, pruned",
        "completeness of the pruned graph, dropped latents counted as errors",
        "up",
        False,
    ),
    ("graph_latents", "latents", "active latents of a prompt", "none", False),
    ("graph_latents_kept", "latents kept", "latents of the pruned graph", "none", True),
    ("graph_edges_kept", "edges kept", "edges of the pruned graph", "none", False),
    (
        "graph_path_length",
        "path length",
        "mean number of latents between a token or error and a logit, weighted by influence",
        "none",
        False,
    ),
    (
        "graph_constant_share",
        "constants",
        "absolute attribution of positions and biases to the logits / that of all sources",
        "none",
        False,
    ),
    (
        "graph_attention_share",
        "through attention",
        "absolute parts of the kept edges that pass a head / all absolute parts, by the last head "
        "that a path passes",
        "none",
        False,
    ),
    (
        "graph_top_head_share",
        "top head",
        "largest part of one head / that of all heads, over the kept edges, weighted by the latter",
        "none",
        False,
    ),
    ("graph_supernodes", "supernodes", "groups of latents that are alike", "none", False),
    ("graph_supernode_size", "supernode size", "mean latents of a supernode", "none", False),
    ("graph_seconds", "graph time", "seconds to make one graph, without checks", "down", False),
]
_CLAMPED = "MLPs and attention weights of the clean run plus the writes of what is clamped"
_FREE = "the writes to the latents' own layers alone, everything after them responds"
#: By check: the thing that is clamped, the beginning of the title, and the formula.
_CHECKS = {
    "constrained": ("a latent is", "r constrained", _CLAMPED),
    "free": ("a latent is", "r free", _FREE),
    "supernode_constrained": ("a supernode's latents are", "r supernodes, constrained", _CLAMPED),
    "supernode_free": ("a supernode's latents are", "r supernodes, free", _FREE),
}
ORDERS = {
    "influence": "influence on the logits",
    "direct": "absolute edge to the most probable token",
    "activation": "activation",
    "random": "random order",
}


def _removals() -> list[MetricInfo]:
    """Descriptions of the metrics of removed virtual weights."""
    described = [
        info(
            f"virtual_removable_{order}",
            f"removable, {order}",
            f"share of the virtual weights whose removal, {formula}, raises the loss of the "
            f"frozen replacement by at most {removal.TOLERATED_BITS} bit",
            "none",
            shown=False,
        )
        for order, formula in removal.ORDERS.items()
    ]
    worth = info(
        "virtual_worth",
        "worth of virtual weights",
        "rise of the loss of the frozen replacement when all virtual weights are removed",
        "none",
        unit="bit/char",
        shown=False,
    )
    return [*described, worth]


def infos() -> list[MetricInfo]:
    """Descriptions of all metrics of the study."""
    described = [
        info(
            name,
            title,
            f"{_MEAN}: {formula}",
            better,
            shown=shown,
            unit="s" if name == "graph_seconds" else "",
            depends=OF_SAE_TIME if name == "graph_seconds" else ON_ACTIVATIONS,
        )
        for name, title, formula, better, shown in _GRAPH
    ]
    described.append(
        info(
            "graph_gap",
            "sum gap",
            "largest difference of a pre-activation from the sum of what goes into it, relative to "
            "their root mean square",
            "down",
            shown=False,
        )
    )
    described += [
        info(
            "virtual_never_share",
            "interference",
            "share of the largest 1 % of absolute virtual weights into described latents that are "
            "between latents that never fire together",
            "none",
            shown=False,
        ),
        info(
            "virtual_rank_r",
            "virtual rank r",
            "Spearman correlation of absolute virtual weights and those corrected by "
            "co-activation, of latents that fire together",
            "none",
            shown=False,
        ),
    ]
    described += _removals()
    for check in _CHECKS:
        for target in ("latent", "logit"):
            described += _agreement(check, target)
    for order, formula in ORDERS.items():
        described.append(
            info(
                f"deletion_{order}",
                f"deletion, {order}",
                "mean KL(p || p without the first latents of an order) over the numbers of latents "
                f"removed freely; order: {formula}",
                "up" if order != "random" else "none",
                unit="nat",
                shown=order != "direct",
            )
        )
    described.append(
        info(
            "deletion_gain",
            "deletion gain",
            "deletion by influence minus deletion by activation, prompt by prompt",
            "up",
            unit="nat",
        )
    )
    return described


def _agreement(check: str, target: str) -> list[MetricInfo]:
    """Descriptions of the agreement of predicted and measured changes in one check."""
    clamped, title, formula = _CHECKS[check]
    of = f"predicted and measured change of a {target} when {clamped} set to 0 or doubled"
    slope, pairs = title.replace("r ", "slope ", 1), title.replace("r ", "pairs ", 1)
    shown = not check.startswith("supernode")
    return [
        info(
            f"{check}_{target}_pearson",
            f"{title}, {target}s",
            f"Pearson correlation of the {of}; {formula}",
            "up",
            shown=shown,
        ),
        info(
            f"{check}_{target}_slope",
            f"{slope}, {target}s",
            f"slope of measured on predicted for the {of}",
            "target",
            shown=False,
        ),
        info(
            f"{check}_{target}_pairs",
            f"{pairs}, {target}s",
            f"number of pairs of the {of}",
            "none",
            shown=False,
        ),
    ]

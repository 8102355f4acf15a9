"""Comparability of a metric between two runs, and the reasons against it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sae_experiments import conditions
from sae_experiments.conditions import NOT_THE_MODEL
from sae_experiments.results.runs import Run, mapping

#: Provenance of real text. Generated rows have other entries, which say what generated them.
OF_REAL_TEXT = {
    "corpus",
    "source",
    "sha256",
    "bytes",
    "stand_in",
    "verified",
    "symbols",
    "counts",
    "dropped_frac",
    "held_out",
}


def why_not_comparable(
    run: Run, other: Run, dataset: str, metric: str, depends: Sequence[str]
) -> str:
    """Say in a few words what keeps a metric of two runs from being subtracted.

    Preset and text come first, then every condition that the metric depends on. If a run does not
    record its conditions, both are judged by their configurations. SAEs of one folder share their
    text, and are told apart by their conditions alone.

    Args:
        run: First run.
        other: Second run.
        dataset: Dataset of both.
        metric: Name of the metric.
        depends: Conditions that the metric depends on.

    Returns:
        The reason, such as `context 128 vs 64`; empty if the runs may be compared.
    """
    same_folder = run.path is not None and run.path == other.path
    why = "" if same_folder else _text_differs(run, other, dataset)
    if why:
        return why
    mine, theirs = run.facts(dataset), other.facts(dataset)
    if mine and theirs:
        return "; ".join(conditions.differences(metric, depends, mine, theirs))
    if same_folder:
        return ""
    configured = _configured(run, dataset), _configured(other, dataset)
    return "; ".join(conditions.known_differences(depends, *configured))


def _text_differs(run: Run, other: Run, dataset: str) -> str:
    """The first of preset, stand-in text, corpus, size and content that differs or is unknown."""
    if dataset not in other.stats:
        return f"{other.name} lacks it"
    if not run.preset or not other.preset:
        return f"preset of {(other if run.preset else run).name} unknown"
    if run.preset != other.preset:
        return f"preset {run.preset} vs {other.preset}"
    if run.stand_in(dataset) != other.stand_in(dataset):
        return "stand-in vs real text" if run.stand_in(dataset) else "real vs stand-in text"
    return _provenance_differs(run.provenance(dataset), other.provenance(dataset))


def _provenance_differs(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    if mine.get("corpus") != theirs.get("corpus"):
        return f"corpus {mine.get('corpus') or 'unknown'} vs {theirs.get('corpus') or 'unknown'}"
    for key, why in (("counts", "corpus sizes differ"), ("sha256", "texts of other content")):
        if mine.get(key) and theirs.get(key) and mine[key] != theirs[key]:
            return why
    recipes = [{"made by": _recipe(provenance)} for provenance in (mine, theirs)]
    return "; ".join(conditions.known_differences(["made by"], *recipes))


def _recipe(provenance: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in provenance.items() if key not in OF_REAL_TEXT}


def _configured(run: Run, dataset: str) -> dict[str, Any]:
    """Conditions that a configuration names, for runs that do not record those of their cells."""
    lm, fit, sae = (mapping(run.config.get(name)) for name in ("lm", "fit", "sae"))
    sites = [str(sae.get(end) or run.config.get("site") or "") for end in ("read", "write")]
    configured = {
        "language model": {key: v for key, v in lm.items() if key not in NOT_THE_MODEL},
        "context": lm.get("n_positions"),
        "held-out rows": fit.get("held_out_rows"),
        "site": " -> ".join(dict.fromkeys(sites)) or None,
        "device": run.device,
        "held-out part": run.held_out(dataset),
    }
    return configured | mapping(run.manifest.get("facts"))

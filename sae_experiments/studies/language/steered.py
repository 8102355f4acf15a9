"""Steered continuations in the feature data of a run."""

from __future__ import annotations

import time

from sae_experiments.metrics.base import EvalContext
from sae_experiments.metrics.steering import examples
from sae_experiments.stopping import OutOfTime
from sae_experiments.studies.base import Outcome, merged


def add_examples(
    outcome: Outcome, evaluation: EvalContext, latents: int, ends: float | None
) -> None:
    """Add continuations under the most rule-like latents to the features of an outcome.

    Args:
        outcome: Outcome that holds the results of the metrics; changed in place.
        evaluation: The SAE, its language model and its held-out text.
        latents: Number of latents; 0 for none.
        ends: Time (`time.monotonic`) after which nothing begins; None: never.
    """
    began = time.monotonic()
    if not latents or (ends is not None and began > ends):
        return
    try:
        shown = examples(evaluation, outcome.features, latents=latents)
    except OutOfTime:
        outcome.cut = True
        return
    outcome.features = merged(outcome.features, shown)
    outcome.seconds["steering"] = time.monotonic() - began

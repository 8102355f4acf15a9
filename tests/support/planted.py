"""Worlds with planted features."""

from __future__ import annotations

from typing import Any

from sae_experiments.studies.ground_truth.world import Planted


def recipe(**changes: Any) -> Planted:
    plain = {
        "width": 64,
        "features": 80,
        "zipf": 0.5,
        "p_max": 0.3,
        "p_min": 0.01,
        "trees": 2,
        "levels": 3,
        "branching": 3,
        "child": 0.8,
        "rank": 4,
        "correlation": 0.1,
        "magnitude": 4.5,
        "spread": 0.5,
        "noise": 0.0,
    }
    return Planted(**(plain | changes))

"""Train small language models, fit sparse autoencoders to their activations, and compare them.

In a notebook, on a plain tensor of activations:

    from sae_experiments import build_sae, fit_saes, evaluate, load_sae, save_sae
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae_experiments.api import build_sae, evaluate, fit_saes
    from sae_experiments.saes.saelens import load_sae, save_sae
    from sae_experiments.steering import steer

__version__ = "0.2.0"
#: True if torch was imported before the line below could tell its threads anything.
LATE = "torch" in sys.modules and "GOMP_SPINCOUNT" not in os.environ
# Threads that wait give their core away soon: beside other work, spinning makes a training step
# four to ten times slower, and on an idle machine this changes nothing (two cores, a small GPT-2:
# 61 ms per step both ways). Read when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

_HOME = {
    "build_sae": "api",
    "evaluate": "api",
    "fit_saes": "api",
    "load_sae": "saes.saelens",
    "save_sae": "saes.saelens",
    "steer": "steering",
}
__all__ = [
    "__version__",
    "build_sae",
    "evaluate",
    "fit_saes",
    "load_sae",
    "save_sae",
    "steer",
]


def __getattr__(name: str) -> Any:
    """Import a name on first use, so that the command line reports mistakes before torch loads."""
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

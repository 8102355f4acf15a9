"""SAEs of the family that other libraries can read."""

from __future__ import annotations

EXPORTABLE = [
    "standard",
    "tied",
    "gated",
    "jumprelu",
    "topk",
    "batch_topk",
    "matryoshka",
    "p_anneal",
    "kl",
    "orthogonal",
    "end_to_end",
    "random",
]

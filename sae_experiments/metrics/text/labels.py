"""Concepts that apply to a text of characters or of tokens, and their labels."""

from __future__ import annotations

import numpy as np

from sae_experiments.metrics.base import EvalContext
from sae_experiments.metrics.codes import Text
from sae_experiments.metrics.text.concepts import Concept, bank, label_all
from sae_experiments.metrics.text.token_concepts import label_tokens, token_bank


def labelled(
    ctx: EvalContext, text: Text, *, causal: bool = False
) -> tuple[list[Concept], np.ndarray]:
    """Concepts of a text and their labels at every row.

    Args:
        ctx: Evaluation context.
        text: The text of the rows.
        causal: Leave out concepts that depend on what follows.

    Returns:
        K concepts, and labels, bool (K, N).
    """
    concepts = token_bank(text) if text.pieces else bank(ctx.symbols)
    if causal:
        concepts = [c for c in concepts if c.causal]
    if text.pieces:
        return concepts, label_tokens(concepts, text)
    return concepts, label_all(concepts, text.chars, text.following, text.breaks)

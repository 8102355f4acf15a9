"""A language model at given prompts, to be rerun with some of its parts held or changed.

Attention weights and the denominators of the norms can be held at the values they have in the clean
run. With both held and the MLPs replaced by something linear, the logits are linear in the
embeddings: the local replacement model of Ameisen et al. 2025.

Shape letters: P prompts, R rows, T positions, C width of the residual stream, H heads, V tokens,
n_begin positions of a begin-of-text token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_experiments.errors import UserError
from sae_experiments.models.begin import as_given, with_begin
from sae_experiments.models.hooks import Site, blocks_of, capture, patched
from sae_experiments.models.layouts import CausalLM, embeddings, final_norm, layout_of_model
from sae_experiments.models.layouts import unembedding as unembedding_of
from sae_experiments.models.linear_blocks import LinearBlock, eager_attention
from sae_experiments.models.norms import HALF, full

#: Largest relative difference of the logits computed here from the model's own; the second for
#: weights of half precision.
TOLERANCE = (1e-3, 5e-2)


class Clean(NamedTuple):
    """Values of one block in the clean run."""

    weights: Tensor
    """Attention weights, (P, H, T, T)."""
    rstd_1: Tensor
    """Inverse deviation in the norm before attention, (P, T, 1)."""
    rstd_out: Tensor | None
    """The same in the norm of what attention writes; None if there is no such norm."""
    rstd_2: Tensor
    """The same in the norm before the MLP, (P, T, 1)."""
    mlp_in: Tensor
    """Input of the MLP, (P, T, C)."""
    mlp_out: Tensor
    """What the MLP adds to the stream, (P, T, C)."""


class Rerun(NamedTuple):
    """One run with parts held or changed."""

    logits: Tensor
    """Before any soft cap, (R, T, V), or (R, 1, V) of the last position alone."""
    mlp_in: list[Tensor]
    """Inputs of the MLPs, (R, T, C) each."""


class FrozenModel:
    """A causal language model of a known layout at prompts (P, T).

    A begin-of-text token that the model puts before every text is a position here: the first.

    Args:
        model: The language model.
        tokens: Token ids (P, T), without a begin-of-text token.

    Raises:
        UserError: The blocks, run as their layout says, do not reproduce the model's logits.
    """

    @torch.no_grad()
    def __init__(self, model: CausalLM, tokens: Tensor) -> None:
        self.model = model
        #: Token ids with the begin-of-text token, (P, T).
        self.tokens = with_begin(model, tokens)
        self.n_begin = self.tokens.shape[1] - tokens.shape[1]
        n_layer = len(blocks_of(model))
        self.blocks = [LinearBlock(model, k) for k in range(n_layer)]
        self.norm = final_norm(model)
        head: Any = unembedding_of(model)
        #: Unembedding (V, C), and its bias (V,) if it has one.
        self.unembedding = full(head.weight)
        self.logit_bias = None if getattr(head, "bias", None) is None else full(head.bias)
        #: Size beyond which the model bends logits, or None.
        self.cap: float | None = getattr(model.config, "final_logit_softcapping", None)
        streams = [Site("resid", k) for k in range(n_layer + 1)]
        inside = [Site(s, k + 1) for s in ("attn_out", "mlp_in", "mlp_out") for k in range(n_layer)]
        with (
            as_given(model),
            eager_attention(model),
            capture(model, [*streams, *inside]) as seen,
        ):
            out = model(input_ids=self.tokens, use_cache=False, output_attentions=True)
        #: The stream before the first block, (P, T, C).
        self.embedded = seen[streams[0]]
        self.clean = [
            self._clean(k, seen[streams[k]], out.attentions[k], seen) for k in range(n_layer)
        ]
        self.rstd_f = self.norm.rstd(seen[streams[-1]])
        self.logits = self.unembed(self.norm(seen[streams[-1]]))
        self._check(out.logits)

    def _clean(self, k: int, h: Tensor, weights: Tensor, seen: dict[Site, Tensor]) -> Clean:
        """Values of block k, from the stream before it and its attention weights."""
        block = self.blocks[k]
        weights = weights.to(h.dtype)
        attended, mlp_in, mlp_out = (
            seen[Site(s, k + 1)] for s in ("attn_out", "mlp_in", "mlp_out")
        )
        r = h if block.parallel else h + attended
        rstd_out = None
        if block.norm_out is not None:
            rstd_out = block.norm_out.rstd(block.mix(weights, block.norm_1(h)))
        rstd_1, rstd_2 = block.norm_1.rstd(h), block.norm_2.rstd(r)
        return Clean(weights, rstd_1, rstd_out, rstd_2, mlp_in, mlp_out)

    def _check(self, wanted: Tensor) -> None:
        """Raise `UserError` unless a run with everything held gives the model's logits."""
        text = [clean.mlp_out[:, self.n_begin :] for clean in self.clean]
        again = self.soft_capped(self.held(lambda k, _: text[k]).logits)
        error = float((again - wanted).norm() / wanted.norm().clamp_min(1e-12))
        half = next(self.model.parameters()).dtype in HALF
        if not error <= TOLERANCE[half]:
            raise UserError(
                f"{type(self.model).__name__}: its blocks do not compute its logits (relative "
                f"error {error:.2g}): an option of the model is not known here"
            )

    def unembed(self, n: Tensor) -> Tensor:
        """Logits (..., V) of normed rows (..., C), before any soft cap."""
        return torch.nn.functional.linear(n, self.unembedding, self.logit_bias)

    def soft_capped(self, logits: Tensor) -> Tensor:
        """The model's own logits (..., V): soft-capped if the model caps them."""
        return logits if not self.cap else self.cap * torch.tanh(logits / self.cap)

    def log_probs(self, logits: Tensor) -> Tensor:
        """Log-probabilities (..., V) of logits before any soft cap."""
        return self.soft_capped(logits).log_softmax(-1)

    @property
    def token_embedding(self) -> Tensor:
        """Part of the stream before the first block that each token adds, (P, T, C).

        The rest is position embeddings; without those it is all of the stream.
        """
        if not layout_of_model(self.model).positions:
            return self.embedded
        return full(embeddings(self.model))[self.tokens]

    @torch.no_grad()
    def held(
        self,
        mlp: Callable[[int, Tensor], Tensor],
        *,
        rows: int | None = None,
        norms: bool = True,
        last: bool = False,
    ) -> Rerun:
        """Run with attention weights held, and other MLPs.

        At a begin-of-text token MLPs write what they write in the clean run.

        Args:
            mlp: Output (R, T - n_begin, C) of the MLP of a block, from its number and its input.
            rows: Copies of the only prompt to run. None: each prompt once.
            norms: Hold the denominators of the norms as well.
            last: Logits of the last position alone.
        """
        h = self.embedded
        if rows is not None:
            h = h.expand(rows, -1, -1)
        inputs = []
        for k, (block, clean) in enumerate(zip(self.blocks, self.clean, strict=True)):
            n = block.norm_1(h, clean.rstd_1 if norms else None)
            written = block.mix(clean.weights, n)
            if block.norm_out is not None:
                written = block.norm_out(written, clean.rstd_out if norms else None)
            r = h + written
            x = block.norm_2(h if block.parallel else r, clean.rstd_2 if norms else None)
            inputs.append(x)
            y = mlp(k, x[:, self.n_begin :])
            if self.n_begin:
                begin = clean.mlp_out[:, : self.n_begin].expand(len(y), -1, -1)
                y = torch.cat([begin, y], 1)
            h = r + y
        rstd = self.rstd_f
        if last:
            h, rstd = h[:, -1:], rstd[:, -1:]
        return Rerun(self.unembed(self.norm(h, rstd if norms else None)), inputs)

    @torch.no_grad()
    def free(self, added: Sequence[Tensor]) -> Rerun:
        """Run copies of the only prompt with something added to what the MLPs write.

        Everything responds. Logits are those of the last position.

        Args:
            added: By block, (R, T, C).
        """
        model, n_layer = self.model, len(self.blocks)
        end = Site("resid", n_layer)
        reads = [Site("mlp_in", k + 1) for k in range(n_layer)]
        with ExitStack() as stack:
            stack.enter_context(as_given(model))
            for k, extra in enumerate(added):
                write = Site("mlp_out", k + 1)
                stack.enter_context(patched(model, write, lambda y, extra=extra: y + extra))
            seen = stack.enter_context(capture(model, [*reads, end]))
            tokens = self.tokens.expand(len(added[0]), -1)
            model(input_ids=tokens, use_cache=False, logits_to_keep=1)
        return Rerun(self.unembed(self.norm(seen[end][:, -1:])), [seen[site] for site in reads])

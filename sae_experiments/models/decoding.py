"""Sampling from a GPT-2 with a cache of a fixed size, in steps that can be recorded."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sae_experiments.training.recorded import RecordedSteps, own_stream


class _Read(NamedTuple):
    """Ids (B, T) to read, and the position of the first one, a scalar."""

    ids: Tensor
    start: Tensor


class StaticDecoder:
    """Next-id logits of a GPT-2 whose keys and values stay at fixed places.

    Every step reads the whole cache and masks what is not there yet, so that all steps have the
    same shapes and nothing waits for the device.

    Args:
        model: The language model, a `GPT2LMHeadModel` in eval mode.
        n_rows: Texts that are sampled side by side, B.
        recorded: Record the steps on a GPU, see `training.recorded`.
    """

    def __init__(self, model: nn.Module, n_rows: int, *, recorded: bool = False) -> None:
        self.model: Any = model
        config = self.model.config
        self.limit: int = config.n_positions
        self.n_head: int = config.n_head
        weight = self.model.transformer.wte.weight
        self.device = weight.device
        width = config.n_embd // config.n_head
        shape = (config.n_layer, 2, n_rows, config.n_head, self.limit, width)
        # Attention multiplies what is masked by 0: there must be no NaN.
        self.cache = torch.zeros(shape, dtype=weight.dtype, device=self.device)
        self.read: Callable[[_Read], Tensor] = self._read
        if recorded:
            self.read = RecordedSteps(self._read, [], self.device)

    def _read(self, what: _Read) -> Tensor:
        """Read ids, keep their keys and values; returns the logits (B, V) after the last one."""
        body = self.model.transformer
        n_rows, length = what.ids.shape
        place = what.start + torch.arange(length, device=self.device)
        x = body.wte(what.ids) + body.wpe(place)
        seen = torch.arange(self.limit, device=self.device) <= place[:, None]
        for block, (keys, values) in zip(body.h, self.cache, strict=True):
            parts = block.attn.c_attn(block.ln_1(x)).chunk(3, -1)
            query, key, value = (
                part.view(n_rows, length, self.n_head, -1).transpose(1, 2) for part in parts
            )
            keys.index_copy_(2, place, key)
            values.index_copy_(2, place, value)
            mixed = F.scaled_dot_product_attention(query, keys, values, attn_mask=seen)
            x = x + block.attn.c_proj(mixed.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.ln_2(x))
        return self.model.lm_head(body.ln_f(x[:, -1]))


@torch.no_grad()
def generate(
    decoder: StaticDecoder,
    prompt: Tensor,
    n: int,
    *,
    temperature: float,
    top_k: int,
    generator: torch.Generator,
) -> Tensor:
    """Sample characters or tokens after a prompt.

    Each step costs one position. When the context is full, the cache is made anew from the last
    half of it: GPT-2's positions are absolute, so a window that slid by one would have to be
    computed anew at every step.

    Args:
        decoder: Decoder of the language model, for as many rows as the prompt has.
        prompt: Ids (B, T).
        n: Number of ids to sample.
        temperature: Temperature of the sampling.
        top_k: Number of most probable ids that are sampled from.
        generator: Source of the random numbers.

    Returns:
        Ids (B, T + n), the prompt included.
    """
    decoder.model.eval()
    limit, length = decoder.limit, prompt.shape[1]
    out = torch.empty(len(prompt), length + n, dtype=prompt.dtype, device=prompt.device)
    out[:, :length] = prompt
    start = torch.zeros((), dtype=torch.int64, device=prompt.device)
    first, end = max(0, length - limit), length  # ids to read next
    filled = 0  # positions of the cache in use
    with own_stream(prompt.device):
        for _ in range(n):
            if filled + end - first > limit:
                # As positions are absolute, the cache is made anew from the last half of it.
                first, filled = end - limit // 2, 0
            start.fill_(filled)
            logits = decoder.read(_Read(out[:, first:end], start)).float() / temperature
            filled += end - first
            if top_k < logits.shape[-1]:
                logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
            # What `torch.multinomial` does for one draw, without its checks.
            drawn = torch.empty_like(logits).exponential_(1, generator=generator)
            out[:, end] = (logits.softmax(-1) / drawn).argmax(-1)
            first, end = end, end + 1
    return out

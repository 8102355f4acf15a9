"""Random language models with random transcoders of all their layers, in double precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sae_experiments.models.begin import begin_with
from sae_experiments.models.hooks import Site, capture
from sae_experiments.saes.cross_layer import CrossLayerTranscoder
from sae_experiments.studies.attribution.influence import Graph
from sae_experiments.studies.attribution.local import Adjacency, LocalModel
from support.circuit_worlds import model, tokens
from support.layouts import MADE, VOCABULARY, made

P = 30  # latents per layer

#: Layouts by name, beside "gpt2", which has four blocks.
LAYOUTS = {" ".join(key): config for key, config in MADE.items()}
#: End of the name of a model that reads a begin-of-text token before every text.
BEGUN = " begun"
#: Model, cross-layer decoders, skip paths.
WORLDS = [
    ("gpt2", True, False),
    ("gpt2", True, True),
    ("gpt2", False, True),
    ("gpt2" + BEGUN, True, True),
    *((name, True, True) for name in LAYOUTS),
    ("llama plain" + BEGUN, False, True),
]
#: Model and cross-layer decoders: blocks of every kind, for laws that need no skip paths.
CASES = [
    ("gpt2", True),
    ("gpt2", False),
    ("gpt_neo wide", True),
    ("phi plain", True),
    ("gemma2 mixed", False),
    ("llama plain begun", True),
]
every_world = pytest.mark.parametrize(("kind", "cross", "skip"), WORLDS)


def sites(stream: str, layers: int) -> list[Site]:
    """One stream of all blocks."""
    return [Site(stream, k + 1) for k in range(layers)]


def side_by_side(lm: nn.Module, ids: Tensor, stream: str, layers: int) -> Tensor:
    """Activations (N, L C) of one stream of all blocks."""
    names = sites(stream, layers)
    with torch.no_grad(), capture(lm, names) as seen:
        lm(input_ids=ids, use_cache=False)
    return torch.cat([seen[name].flatten(0, 1) for name in names], 1)


def language_model(kind: str) -> nn.Module:
    """A random language model in double precision."""
    name = kind.removesuffix(BEGUN)
    lm = model("gpt2") if name == "gpt2" else made(LAYOUTS[name]).double()
    if name != kind:
        begin_with(lm, 5)
    return lm.requires_grad_(False)


def prompts(kind: str, n: int) -> Tensor:
    """Random prompts (n, T)."""
    if kind in LAYOUTS or kind.removesuffix(BEGUN) in LAYOUTS:
        chance = torch.Generator().manual_seed(0)
        return torch.randint(0, VOCABULARY, (n, 11), generator=chance)
    return tokens(n)[:, : -1 if kind.endswith(BEGUN) else None]


def transcoder(
    lm: nn.Module, ids: Tensor, *, cross: bool = True, skip: bool = False
) -> CrossLayerTranscoder:
    """A random transcoder with biases, a centre and about 5 active latents per layer."""
    torch.manual_seed(3)
    layers, width = lm.config.num_hidden_layers, lm.config.hidden_size
    made = CrossLayerTranscoder(
        n_sites=layers, cross=cross, skip=skip, k=5 * layers, d_in=width * layers, d_sae=P * layers
    ).double()
    made.requires_grad_(False)
    made.b_dec.normal_(0, 0.3)
    made.b_enc.normal_(0, 0.1)
    made.centre.normal_(0, 0.1)
    if made.W_skip is not None:
        made.W_skip.normal_(0, 0.1)
    made.calibrate_threshold(side_by_side(lm, ids, "mlp_in", layers), made.k)
    return made.eval()


def world(
    kind: str = "gpt2", *, n: int = 3, cross: bool = True, skip: bool = False
) -> tuple[nn.Module, CrossLayerTranscoder, Tensor]:
    """A model, its transcoder and prompts (n, T)."""
    lm, ids = language_model(kind), prompts(kind, n)
    return lm, transcoder(lm, ids, cross=cross, skip=skip), ids


def local_model(kind: str = "gpt2", cross: bool = True, skip: bool = False, **kwargs: Any) -> Any:
    """The local replacement model of the first prompt, and its adjacency."""
    lm, sae, ids = world(kind, cross=cross, skip=skip)
    local = LocalModel(lm, sae, ids[:1], **kwargs)
    return local, local.adjacency()


def graph_of(local: LocalModel, adjacency: Adjacency) -> Graph:
    """The part of an adjacency that influence flows through."""
    columns = adjacency.weights[:, : local.sources.tokens.stop]
    return Graph(columns, local.logits.probability, local.error.shape[0] * local.length)


#: Name of the model whose weights are waves.
WAVES = "waves"


@torch.no_grad()
def _fill_with_waves(module: nn.Module, scale: float) -> None:
    """Give all weights values that depend on no random number generator."""
    for i, p in enumerate(module.parameters()):
        steps = torch.arange(p.numel(), dtype=torch.float64)
        wave = torch.sin(steps * (1.7 + 0.13 * i) + i) + torch.cos(steps.square() * 0.37 + i)
        p.copy_(scale * wave.view_as(p))


def wave_world() -> tuple[nn.Module, CrossLayerTranscoder, Tensor]:
    """A GPT-2 of two blocks, cross-layer transcoders and one prompt, the same everywhere."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=2,
        n_head=2,
        n_embd=8,
        n_positions=6,
        vocab_size=12,
        bos_token_id=None,
        eos_token_id=None,
    )
    lm = GPT2LMHeadModel(config).eval().requires_grad_(False)
    _fill_with_waves(lm, 0.5)
    sae = CrossLayerTranscoder(n_sites=2, cross=True, skip=False, k=4, d_in=16, d_sae=24)
    sae.requires_grad_(False)
    _fill_with_waves(sae, 0.4)
    sae.threshold.fill_(0.5)
    return lm, sae.eval(), torch.tensor([[3, 7, 1, 10, 4, 7]])

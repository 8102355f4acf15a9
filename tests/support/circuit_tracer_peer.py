"""Attribution by circuit-tracer itself, run by the Python of an environment that has it.

    python circuit_tracer_peer.py <folder> ...

Each folder holds a GPT-2 (`config.json`, `model.safetensors`), `transcoders/`, `tokens.json` and a
graph as we write it for circuit-tracer's page, `page.json`. Written to it: `graph.safetensors`, the
adjacency, what its rows and columns are and which nodes a pruned graph keeps; `scores.json`; and
`page_read.json`, the graph as circuit-tracer has read it. Nothing of this project is imported,
since circuit-tracer needs another version of transformers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from circuit_tracer.attribution.attribute import attribute
from circuit_tracer.frontend.graph_models import Model
from circuit_tracer.graph import Graph, compute_graph_scores, compute_node_influence, prune_graph
from circuit_tracer.replacement_model.replacement_model_transformerlens import (
    TransformerLensReplacementModel,
)
from circuit_tracer.utils.hf_utils import load_transcoder_from_hub
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformer_lens import HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast


def hooked_config(config: Any) -> HookedTransformerConfig:
    """TransformerLens' configuration of a GPT-2."""
    return HookedTransformerConfig(
        n_layers=config.n_layer,
        d_model=config.n_embd,
        n_ctx=config.n_positions,
        d_head=config.n_embd // config.n_head,
        n_heads=config.n_head,
        d_mlp=4 * config.n_embd,
        d_vocab=config.vocab_size,
        act_fn="gelu_new",
        eps=config.layer_norm_epsilon,
        normalization_type="LN",
        original_architecture="GPT2LMHeadModel",
        model_name="gpt2",
        device="cpu",
    )


def replacement_model(folder: Path) -> TransformerLensReplacementModel:
    """The language model of a folder with its transcoders."""
    lm = GPT2LMHeadModel.from_pretrained(folder).eval()
    transcoders, _ = load_transcoder_from_hub(
        str((folder / "transcoders").resolve()), device=torch.device("cpu"), dtype=torch.float32
    )
    config = hooked_config(lm.config)
    model = TransformerLensReplacementModel.from_config(config, transcoders)
    weights = convert_gpt2_weights(lm, config)
    weights["unembed.b_U"] = torch.zeros(config.d_vocab)
    # The replacement model wraps each MLP and the unembedding.
    moved = {
        name.replace(".mlp.", ".mlp.old_mlp.").replace("unembed.", "unembed.old_unembed."): value
        for name, value in weights.items()
    }
    missing, unknown = model.load_state_dict(moved, strict=False)
    wanted = {name for name, _ in model.named_parameters() if not name.startswith("transcoders")}
    if unknown or wanted.intersection(missing):
        raise SystemExit(f"weights do not fit: missing {missing}, unknown {unknown}")
    # By default circuit-tracer puts a special token first and leaves its position out.
    model.zero_positions = slice(0, 0)
    model.ensure_tokenized = lambda prompt: prompt
    words = Tokenizer(WordLevel({str(i): i for i in range(config.d_vocab)}, unk_token="0"))
    model.tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="0")
    return model


def influence(graph: Graph) -> torch.Tensor:
    """Influence of every node on the logits, as pruning takes it."""
    start = torch.zeros(len(graph.adjacency_matrix))
    start[-len(graph.logit_targets) :] = graph.logit_probabilities
    return compute_node_influence(graph.adjacency_matrix, start)


def trace(folder: Path) -> None:
    """Write the graph of the folder's prompt."""
    model = replacement_model(folder)
    tokens = torch.tensor(json.loads((folder / "tokens.json").read_text()))
    graph = attribute(tokens, model, batch_size=64, max_n_logits=10, desired_logit_prob=0.95)
    pruned = prune_graph(graph, 0.8, 0.98)
    tensors = {
        "adjacency": graph.adjacency_matrix,
        "latents": graph.active_features,
        "values": graph.activation_values,
        "logits": graph.logit_token_ids,
        "probability": graph.logit_probabilities,
        "influence": influence(graph),
        "kept": pruned.node_mask,
        "kept_edges": pruned.edge_mask,
    }
    save_file(
        {name: tensor.detach().contiguous() for name, tensor in tensors.items()},
        folder / "graph.safetensors",
    )
    replacement, completeness = compute_graph_scores(graph)
    scores = {"replacement": float(replacement), "completeness": float(completeness)}
    (folder / "scores.json").write_text(json.dumps(scores))
    page = Model.model_validate_json((folder / "page.json").read_text(), strict=True)
    (folder / "page_read.json").write_text(page.model_dump_json())


if __name__ == "__main__":
    for name in sys.argv[1:]:
        trace(Path(name))

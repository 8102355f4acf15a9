"""The laws of every layout in the table, and the refusal of every other; checkpoints that do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from sae_experiments.errors import UserError
from sae_experiments.metrics.base import EvalContext, LMSplice
from sae_experiments.metrics.features import logit_effect
from sae_experiments.models.hooks import Site, activations, blocks_of, capture, patched
from sae_experiments.models.layouts import LAYOUTS, layout_of_model, matrix
from sae_experiments.models.local import load_local, sizes_of
from sae_experiments.saes.topk import TopK
from sae_experiments.studies.language.stores import effect_of

WIDTH, VOCABULARY, LENGTH = 16, 31, 12
NAMES = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": None}
NEO: dict[str, Any] = {
    **NAMES,
    "hidden_size": WIDTH,
    "num_layers": 2,
    "num_heads": 2,
    "window_size": 4,
    "max_position_embeddings": LENGTH,
    "attention_types": [[["global", "local"], 1]],
}
GPT: dict[str, Any] = {**NAMES, "n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": LENGTH}
#: By model type and width of the MLP: wider than the stream, as wide, and four times as wide.
MADE = {
    (kind, inner): config(**names, **{LAYOUTS[kind].inner: inner})
    for inner in (24, WIDTH, None)
    for kind, config, names in (
        ("gpt2", transformers.GPT2Config, GPT),
        ("gpt_neo", transformers.GPTNeoConfig, NEO),
    )
}


def made(config: Any) -> nn.Module:
    """A random model whose parts are far enough from zero to be told apart."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for p in model.parameters():
        p.data.normal_(0.0 if p.ndim > 1 else 0.5, 0.3)
    return model.eval().requires_grad_(False)


@pytest.fixture(params=MADE, ids=lambda p: f"{p[0]}-{p[1]}")
def model(request: pytest.FixtureRequest) -> nn.Module:
    return made(MADE[request.param])


def ids(n: int = 3) -> torch.Tensor:
    seeded = torch.Generator().manual_seed(1)
    return torch.randint(0, VOCABULARY, (n, LENGTH), generator=seeded)


def test_the_table_is_tested_whole() -> None:
    assert {kind for kind, _ in MADE} == set(LAYOUTS)


def test_sites_are_what_they_are_called(model: nn.Module) -> None:
    layout, n = layout_of_model(model), len(blocks_of(model))
    assert n == 2
    streams = [Site("resid", i) for i in range(n + 1)]
    inside = [Site(s, i + 1) for s in ("mlp_in", "mlp_act", "mlp_out") for i in range(n)]
    found = activations(model, ids(), [*streams, *inside])
    for i, block in enumerate(blocks_of(model)):
        attention = {}
        with capture(model, [Site("resid", 0)]):
            up, down = block.get_submodule(layout.up), block.get_submodule(layout.down)
            handle = block.ln_2.register_forward_pre_hook(
                lambda _, args, attention=attention: attention.update(middle=args[0])
            )
            model(input_ids=ids(), use_cache=False)
            handle.remove()
        read, hidden, wrote = (found[Site(s, i + 1)] for s in ("mlp_in", "mlp_act", "mlp_out"))
        middle = attention["middle"]
        torch.testing.assert_close(block.ln_2(middle), read)
        torch.testing.assert_close(block.mlp.act(read @ matrix(up) + up.bias), hidden)
        torch.testing.assert_close(hidden @ matrix(down) + down.bias, wrote)
        torch.testing.assert_close(middle + wrote, found[Site("resid", i + 1)])
    norm, head = model.get_submodule(layout.norm), model.get_output_embeddings()
    logits = model(input_ids=ids(), use_cache=False).logits
    torch.testing.assert_close(head(norm(found[streams[-1]])), logits)


def test_writing_what_was_read_changes_nothing_and_zeros_take_a_write_away(
    model: nn.Module,
) -> None:
    logits = model(input_ids=ids(), use_cache=False).logits
    for stream in ("resid", "mlp_in", "mlp_act", "mlp_out"):
        with patched(model, Site(stream, 2), lambda x: x.clone()):
            assert torch.equal(model(input_ids=ids(), use_cache=False).logits, logits)
    out, stream = (
        activations(model, ids(), [Site(s, 2)])[Site(s, 2)] for s in ("mlp_out", "resid")
    )
    with (
        patched(model, Site("mlp_out", 2), torch.zeros_like),
        capture(model, [Site("resid", 2)]) as seen,
    ):
        model(input_ids=ids(), use_cache=False)
    torch.testing.assert_close(seen[Site("resid", 2)], stream - out)


def test_the_width_of_the_mlp_is_that_of_its_activations(model: nn.Module, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    site = Site("mlp_act", 1)
    assert sizes_of(tmp_path).inner == activations(model, ids(), [site])[site].shape[-1]


@pytest.mark.parametrize("stream", ["mlp_act", "mlp_out", "resid"])
def test_the_effect_on_logits_is_that_of_the_models_own_modules(
    model: nn.Module, stream: str
) -> None:
    """A latent's direction is sent through the output projection itself, whatever its weights' layout."""
    site, layout = Site(stream, 2), layout_of_model(model)
    sae = TopK(d_in=activations(model, ids(), [site])[site].shape[-1], d_sae=8, k=2)
    starts = np.arange(3)

    class Held:
        pass

    held = Held()
    held.starts = starts
    lm = LMSplice(model, site, lambda s: (ids()[: len(s)], ids()[: len(s)]))
    ctx = EvalContext(
        sae=sae, device=torch.device("cpu"), read=site, write=site, held_out=held, lm=lm
    )
    found = logit_effect(ctx, np.ones(8), 3)
    down = blocks_of(model)[1].get_submodule(layout.down)
    d = sae.W_dec.detach()
    d = down(d) - down(torch.zeros_like(d)) if stream == "mlp_act" else d
    last = activations(model, ids(), [Site("resid", 2)])[Site("resid", 2)]
    norm = model.get_submodule(layout.norm)
    sigma = (last.var(-1, correction=0) + norm.eps).sqrt().mean()
    logits = ((d - d.mean(1, keepdim=True)) / sigma * norm.weight) @ model.lm_head.weight.T
    wanted = logits - logits.mean(1, keepdim=True)
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-4, atol=1e-5)


def test_the_effect_of_a_reconstruction_is_none_for_the_activations_themselves(
    model: nn.Module,
) -> None:
    site = Site("mlp_act", 1)
    x = activations(model, ids(), [site])[site].flatten(0, 1)
    same, other = (effect_of(model, site, ids(), r) for r in (x, 0.5 * x))
    assert abs(float(same["kl"])) < 1e-5 and abs(float(same["later"])) < 1e-8
    assert float(other["kl"]) > 1e-4 and float(other["later"]) > 1e-4


SMALL = {"vocab_size": VOCABULARY, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
OTHERS = {
    "gptj": transformers.GPTJConfig(**SMALL, rotary_dim=4),
    "codegen": transformers.CodeGenConfig(**SMALL, rotary_dim=4, bos_token_id=0, eos_token_id=0),
    "openai-gpt": transformers.OpenAIGPTConfig(**SMALL),
    "gpt_bigcode": transformers.GPTBigCodeConfig(**SMALL, bos_token_id=0, eos_token_id=0),
    "bloom": transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=1, n_head=2),
    "opt": transformers.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2
    ),
    "gpt_neox": transformers.GPTNeoXConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_attention_heads=2
    ),
    "llama": transformers.LlamaConfig(vocab_size=VOCABULARY, hidden_size=16, num_attention_heads=2),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_layout_that_is_not_proven_is_one_line(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    OTHERS[kind].save_pretrained(tmp_path)
    capsys.readouterr()
    with pytest.raises(UserError, match=rf"model_type='{kind}' is not a known layout") as told:
        sizes_of(tmp_path)
    assert "\n" not in str(told.value) and not "".join(capsys.readouterr())
    stub = nn.Module()
    stub.config = OTHERS[kind]
    with pytest.raises(UserError, match="not a known layout"):
        blocks_of(stub)


# ------------------------------------------------------------------------------------------------ checkpoints


def checkpoint(folder: Path, kind: str, **more: Any) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A saved model and the tensors of its file."""
    config = {"gpt2": transformers.GPT2Config(**GPT, **more)}.get(
        kind
    ) or transformers.GPTNeoConfig(**NEO, **more)
    model = made(config)
    model.save_pretrained(folder)
    return model, load_file(folder / "model.safetensors")


def read(folder: Path, tensors: dict[str, torch.Tensor]) -> Any:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return load_local(folder, context=LENGTH, device=torch.device("cpu"))


@pytest.mark.parametrize("kind", sorted(LAYOUTS))
@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."]
)
def test_a_known_prefix_is_left_out_and_said(kind: str, prefix: str, tmp_path: Path) -> None:
    model, tensors = checkpoint(tmp_path, kind)
    found = read(tmp_path, {prefix + k: v for k, v in tensors.items()})
    wanted = model(input_ids=ids(), use_cache=False).logits
    assert torch.equal(found.model(input_ids=ids(), use_cache=False).logits, wanted)
    assert len(found.notes) == 1 and prefix in found.notes[0]


def test_a_prefix_inside_names_is_left_out_too(tmp_path: Path) -> None:
    model, tensors = checkpoint(tmp_path, "gpt2")
    found = read(tmp_path, {k.replace(".h.1.", ".h.1._orig_mod."): v for k, v in tensors.items()})
    wanted = model(input_ids=ids(), use_cache=False).logits
    assert torch.equal(found.model(input_ids=ids(), use_cache=False).logits, wanted) and found.notes


@pytest.mark.parametrize("kind", sorted(LAYOUTS))
def test_a_weight_that_is_missing_or_has_no_place_is_one_line(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, tensors = checkpoint(tmp_path, kind)
    gone = next(k for k in sorted(tensors) if ".h.1.mlp" in k)
    less = {k: v for k, v in tensors.items() if k != gone}
    half = {("_orig_mod." if ".h.0." in k else "") + k: v for k, v in less.items()}
    both = {**tensors, "_orig_mod." + gone: tensors[gone].clone()}
    more = {**tensors, "transformer.h.1.adapter.weight": torch.ones(3)}
    for wrong, name in ((less, gone), (half, gone), (both, gone), (more, "adapter")):
        with pytest.raises(UserError, match=rf"local\.folder=.*{name}") as told:
            read(tmp_path, wrong)
        assert "\n" not in str(told.value) and told.value.exit_status == 2
    assert "LOAD REPORT" not in "".join(capsys.readouterr())


def test_what_transformers_itself_leaves_out_is_no_fault(tmp_path: Path) -> None:
    """A tied head is not in the file; old files hold causal masks; a body alone has no first name."""
    model, tensors = checkpoint(tmp_path, "gpt2")
    assert "lm_head.weight" not in tensors
    masks = {
        f"transformer.h.{i}.attn.{n}": torch.ones(1)
        for i in (0, 1)
        for n in ("bias", "masked_bias")
    }
    body = {k.removeprefix("transformer."): v for k, v in tensors.items()}
    wanted = model(input_ids=ids(), use_cache=False).logits
    for fine in (tensors, tensors | masks, body):
        found = read(tmp_path, fine)
        assert torch.equal(found.model(input_ids=ids(), use_cache=False).logits, wanted)
        assert not found.notes
    _, untied = checkpoint(tmp_path, "gpt2", tie_word_embeddings=False)
    del untied["lm_head.weight"]
    with pytest.raises(UserError, match=r"1 missing \(lm_head\.weight\)"):
        read(tmp_path, untied)


def test_prefixed_weights_of_an_old_pickle_are_read_as_well(tmp_path: Path) -> None:
    model, tensors = checkpoint(tmp_path, "gpt2")
    (tmp_path / "model.safetensors").unlink()
    torch.save({"_orig_mod." + k: v for k, v in tensors.items()}, tmp_path / "pytorch_model.bin")
    found = load_local(tmp_path, context=LENGTH, device=torch.device("cpu"))
    wanted = model(input_ids=ids(), use_cache=False).logits
    assert torch.equal(found.model(input_ids=ids(), use_cache=False).logits, wanted)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "gpt2"

"""The laws of every layout in the table, and the refusal of every other; checkpoints that do
not fit.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from sae_experiments.errors import UserError
from sae_experiments.fitting.fit import FitReport, Sample, fit_saes
from sae_experiments.metrics.base import EvalContext, LMSplice
from sae_experiments.metrics.features import logit_effect
from sae_experiments.models.hooks import (
    Site,
    activations,
    blocks_of,
    capture,
    check_layout,
    patched,
    prefix_of,
    spliced,
)
from sae_experiments.models.layouts import LAYOUTS, layout_of_model
from sae_experiments.models.local import load_local, sizes_of
from sae_experiments.saes.base import SAE, Batch
from sae_experiments.saes.saelens_config import hook_of_site, site_of_hook
from sae_experiments.saes.topk import TopK
from sae_experiments.saes.types import Downstream
from sae_experiments.studies.language.stores import effect_of
from support.hand_forward import GEMMA, RMS, Hand
from support.layouts import (
    GPT,
    LENGTH,
    MADE,
    NEO,
    OPT,
    VOCABULARY,
    all_sites,
    made,
)
from support.saes import config, sae_spec
from support.tape import Tape


@pytest.fixture(params=MADE, ids=lambda p: "-".join(p))
def model(request: pytest.FixtureRequest) -> nn.Module:
    return made(MADE[request.param])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ids(n: int = 3) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (n, LENGTH), generator=seeded(1))


def logits_of(model: nn.Module) -> torch.Tensor:
    return model(input_ids=ids(), use_cache=False).logits


def error(x: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference, in the largest value."""
    return float((x.double() - wanted).abs().max() / wanted.abs().max())


def test_the_table_is_tested_whole() -> None:
    assert {kind for kind, _ in MADE} == set(LAYOUTS)


def test_every_site_is_what_a_forward_pass_by_hand_gives(model: nn.Module) -> None:
    wanted, logits = Hand(model).forward(ids())
    read = activations(model, ids(), all_sites(model))
    assert set(read) == set(wanted) == set(all_sites(model))
    assert len({tuple(x.flatten().tolist()) for x in read.values()}) == len(read)
    for site, x in wanted.items():
        assert read[site].shape == x.shape == (3, LENGTH, x.shape[-1])
        assert error(read[site], x) < 1e-5, site
    assert error(logits_of(model), logits) < 1e-5
    check_layout(model, "made")


def test_the_identity_changes_no_logit_and_zero_mean_and_splice_do(model: nn.Module) -> None:
    logits, read = logits_of(model), activations(model, ids(), all_sites(model))
    changes = {
        "zero": torch.zeros_like,
        "mean": lambda x: x.mean((0, 1), keepdim=True).expand_as(x),
        "splice": lambda x: x + 0.1 * x.std() * torch.linspace(-1, 1, x.shape[-1]),
    }
    for site, x in read.items():
        with patched(model, site, lambda x: x.clone()):
            assert torch.equal(logits_of(model), logits), site
        for name, change in changes.items():
            with patched(model, site, change), capture(model, [site]) as seen:
                other = logits_of(model)
            assert float((other - logits).abs().max()) > 1e-3, (site, name)
            torch.testing.assert_close(seen[site], change(x))
    assert torch.equal(logits_of(model), logits)


def test_a_pass_that_goes_on_from_a_prefix_has_the_same_bits(model: nn.Module) -> None:
    for site in all_sites(model):
        with capture(model, [site]) as seen, prefix_of(model, [site]) as prefixes:
            clean = logits_of(model)
        prefix, zeros = prefixes[-1], {site: torch.zeros_like(seen[site])}
        with spliced(model, zeros):
            wanted = logits_of(model)
        with spliced(model, zeros, None, prefix):
            assert torch.equal(logits_of(model), wanted), site
        with spliced(model, {site: seen[site]}, None, prefix.part(slice(0, 3))):
            assert torch.equal(logits_of(model), clean), site
        assert prefix.n_blocks == (site.layer if site.stream == "resid" else site.layer - 1), site
        assert torch.equal(logits_of(model), clean), "every block computes again"


def test_a_model_whose_blocks_do_something_else_is_refused(model: nn.Module) -> None:
    """What the table cannot know is found when the model is loaded, before it gives a number."""
    layout, block = layout_of_model(model), blocks_of(model)[0]
    handle = block.register_forward_hook(
        lambda _m, _a, out: (2 * out[0], *out[1:]) if isinstance(out, tuple) else 2 * out
    )
    with pytest.raises(UserError, match="the stream after block 1") as told:
        check_layout(model, "lm.path=x")
    handle.remove()
    norm = model.get_submodule(layout.norm)
    norm.register_forward_hook(lambda _m, _a, out: out + (len(out) == 2) * torch.rand(1))
    with pytest.raises(UserError, match="the logits"):
        check_layout(model, "lm.path=x")
    assert "\n" not in str(told.value)


def test_site_names_are_hook_names_of_transformer_lens_both_ways(model: nn.Module) -> None:
    hooks = {str(site): hook_of_site(str(site)) for site in all_sites(model)}
    assert len(set(hooks.values())) == len(hooks) and None not in hooks.values()
    assert {site_of_hook(h): h for h in hooks.values()} == hooks
    assert hooks["resid.2"] == "blocks.1.hook_resid_post"
    assert hooks["attn_out.1"] == "blocks.0.hook_attn_out"


def test_zeros_take_a_write_away(model: nn.Module) -> None:
    for stream in ("attn_out", "mlp_out"):
        sites = [Site(s, 2) for s in ("attn_out", "mlp_out")] + [Site("resid", 1)]
        read = activations(model, ids(), sites)
        with patched(model, Site(stream, 2), torch.zeros_like), capture(model, sites) as seen:
            with capture(model, [Site("resid", 2)]) as after:
                logits_of(model)
        other = next(s for s in sites if s.stream not in (stream, "resid"))
        left = after[Site("resid", 2)] - read[Site("resid", 1)]
        torch.testing.assert_close(left, seen[other], rtol=1e-4, atol=1e-4)


def test_the_width_of_the_mlp_is_that_of_its_activations(model: nn.Module, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    site = Site("mlp_act", 1)
    assert sizes_of(tmp_path).inner == activations(model, ids(), [site])[site].shape[-1]


@pytest.mark.parametrize("stream", ["mlp_act", "mlp_out", "resid"])
def test_the_effect_on_logits_is_that_of_the_models_own_modules(
    model: nn.Module, stream: str
) -> None:
    """A latent's direction is sent through the output projection itself, whatever its weights'
    layout.
    """
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
    if stream == "mlp_act" and layout.mlp_out != layout.mlp_act:
        assert found is None, "a norm between the MLP and the stream makes the path depend on x"
        return
    down = blocks_of(model)[1].get_submodule(layout.mlp_act)
    d = sae.W_dec.detach()
    d = down(d) - down(torch.zeros_like(d)) if stream == "mlp_act" else d
    last = activations(model, ids(), [Site("resid", 2)])[Site("resid", 2)]
    norm = model.get_submodule(layout.norm)
    if model.config.model_type in RMS:
        sigma = (last.square().mean(-1) + model.config.rms_norm_eps).sqrt().mean()
        gain = norm.weight + (model.config.model_type in GEMMA)
    else:
        sigma, gain = (last.var(-1, correction=0) + norm.eps).sqrt().mean(), norm.weight
        d = d - d.mean(1, keepdim=True)
    logits = (d / sigma * gain) @ model.lm_head.weight.T
    wanted = logits - logits.mean(1, keepdim=True)
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-4, atol=1e-5)


def test_the_effect_of_a_reconstruction_is_none_for_the_activations_themselves(
    model: nn.Module,
) -> None:
    site = Site("mlp_act", 1)
    x = activations(model, ids(), [site])[site].flatten(0, 1)
    same, other = (effect_of(model, site, ids(), r) for r in (x, x.roll(1, 0)))
    assert abs(float(same["kl"])) < 1e-5 and abs(float(same["later"])) < 1e-8
    assert float(other["kl"]) > 1e-4 and float(other["later"]) > 1e-4


def test_steps_that_go_through_the_model_are_replayed_on_a_device(
    model: nn.Module, tapes: list[Tape]
) -> None:
    """`end_to_end` on windows of text, outlier rows among them; nothing waits."""
    site = Site("resid", 1)
    effect = partial(effect_of, model, site)
    recordable = not layout_of_model(model).waits

    def batch_at(step: int) -> Batch:
        tokens = torch.randint(0, VOCABULARY, (8, LENGTH), generator=seeded(step))
        x = activations(model, tokens, [site])[site].flatten(0, 1)
        x[3] = 1e4 * x[3]
        return Batch(x, x, None, Downstream(effect, tokens, recordable=recordable))

    def fit() -> tuple[SAE, FitReport]:
        torch.manual_seed(0)
        d_in = batch_at(0).x.shape[1]
        sae = sae_spec("end_to_end", "sae.target_l0=4").model(d_in=d_in, d_sae=32, d_out=d_in)
        start = torch.cat([batch_at(step).x for step in range(100, 110)])
        reports = fit_saes(
            {"end_to_end": sae},
            batch_at,
            config(steps=15, log_every=1),
            Sample(start, start, start),
            seed=0,
            dead_after=10**6,
            backend="device",
        )
        return sae, reports["end_to_end"]

    replayed, report = fit()
    assert sum(tape.replays for tape in tapes) == (11 if recordable else 0)
    # Losses of a replayed step are those of its own windows.
    kl = [value for _, name, value in report.history if name == "kl"]
    assert len(kl) == len(set(kl)) == 15
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sae_experiments.training.recorded.RECORDERS", {})
        ordinary, expected = fit()
    assert report.history == expected.history
    for name, value in replayed.state_dict().items():
        assert torch.equal(value, ordinary.state_dict()[name]), name


SMALL = {"vocab_size": VOCABULARY, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
OTHERS = {
    "gptj": transformers.GPTJConfig(**SMALL, rotary_dim=4),
    "codegen": transformers.CodeGenConfig(**SMALL, rotary_dim=4, bos_token_id=0, eos_token_id=0),
    "openai-gpt": transformers.OpenAIGPTConfig(**SMALL),
    "gpt_bigcode": transformers.GPTBigCodeConfig(**SMALL, bos_token_id=0, eos_token_id=0),
    "bloom": transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=1, n_head=2),
    "mixtral": transformers.MixtralConfig(hidden_size=16, num_attention_heads=2),
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
    assert "models/layouts.py" in str(told.value) and "gpt2, gpt_neo" in str(told.value)
    stub = nn.Module()
    stub.config = OTHERS[kind]
    with pytest.raises(UserError, match="not a known layout"):
        blocks_of(stub)


def test_models_that_are_no_causal_language_models_or_whose_streams_are_no_sums(
    tmp_path: Path,
) -> None:
    bert = transformers.BertConfig(hidden_size=16, num_attention_heads=2)
    bert.architectures = ["BertForMaskedLM"]
    bert.save_pretrained(tmp_path / "bert")
    with pytest.raises(UserError, match="BertForMaskedLM .bert. is not a causal language model"):
        sizes_of(tmp_path / "bert")
    transformers.OPTConfig(**OPT, do_layer_norm_before=False).save_pretrained(tmp_path / "opt")
    with pytest.raises(UserError, match="do_layer_norm_before=false"):
        sizes_of(tmp_path / "opt")


# ------------------------------------------------------------------------------------------------
# checkpoints


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


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neo"])
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


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neo"])
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
    """A tied head is not in the file; old files hold causal masks; a body alone has no first
    name.
    """
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

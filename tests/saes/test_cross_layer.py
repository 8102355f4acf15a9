"""Transcoders of every layer: against a plain computation, and the metrics of the replaced
model.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file
from torch import Tensor

from sae_experiments.errors import UserError
from sae_experiments.fitting.fit import units_of
from sae_experiments.metrics.replacement import replaced_logits, with_errors_gap
from sae_experiments.models.frozen import FrozenModel
from sae_experiments.models.hooks import Site
from sae_experiments.saes import ops
from sae_experiments.saes.circuit_tracer import load_transcoders, save_transcoders
from sae_experiments.saes.cross_layer import CrossLayerTranscoder, EveryLayer
from sae_experiments.saes.transcoder import Transcoder
from sae_experiments.saes.types import Batch
from support.attribution_worlds import side_by_side, world
from support.saes import L0, make, rows, sae_spec, step, trained

KINDS = ("cross_layer_transcoder", "per_layer_transcoder", "cross_layer_jumprelu")


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_an_output_is_the_sum_of_what_the_layers_up_to_it_write(name: str, skip: bool) -> None:
    sae = trained(name, f"sae.model.skip={str(skip).lower()}", n_train=30)
    x, n, width = rows(16, 5), sae.n_sites, sae.width
    acts = sae.encode(x)
    assert acts.count_nonzero()
    for k in range(n):
        expected = sae.b_dec[sae.site_of(k)].clone().expand(16, -1).clone()
        for source in range(n):
            mine = acts[:, sae.latents_of(source)]
            x_in = x[:, sae.site_of(source)] - sae.centre[sae.site_of(source)]
            pre = x_in @ sae.encoders[sae.latents_of(source)].T + sae.b_enc[sae.latents_of(source)]
            active = pre > sae.cutoffs()[sae.latents_of(source)]
            torch.testing.assert_close(mine, pre * active, rtol=1e-4, atol=1e-5)
            writes = source <= k if sae.cross else source == k
            block = sae.W_dec[sae.latents_of(source), sae.site_of(k)]
            assert bool((block != 0).any()) == writes
            expected = expected + mine @ block
            torch.testing.assert_close(sae.encode_from(source, x[:, sae.site_of(source)]), mine)
        if skip:
            direct = (x - sae.centre)[:, sae.site_of(k)] @ sae.W_skip[k].T
            assert float(direct.abs().max()) > 1e-3, "it has learnt something"
            expected = expected + direct
        torch.testing.assert_close(sae(x)[:, k * width :][:, :width], expected)


@pytest.mark.parametrize("k_aux", [3, 40, 1000])
@pytest.mark.parametrize("name", KINDS)
def test_aux_k_of_dead_latents_is_that_of_their_rows_with_all_zeros(name: str, k_aux: int) -> None:
    sae = make(name).train()
    sae.k_aux = k_aux
    x, residual = rows(32, 5), rows(32, 6)
    dead = torch.arange(sae.d_sae) % 2 == 1
    grads = []
    for loss_of in (sae.aux_k_loss, lambda *args: dense_aux_k(sae, *args)):
        sae.zero_grad()
        loss = loss_of(x, residual, dead)
        loss.backward()
        found = {key: p.grad for key, p in sae.named_parameters() if p.grad is not None}
        grads.append({"loss": loss.detach()} | {key: g.clone() for key, g in found.items()})
    assert {"encoders", "b_enc", "decoders.0"} <= grads[0].keys()
    for key, value in grads[0].items():
        torch.testing.assert_close(value, grads[1][key], rtol=1e-4, atol=1e-6)


def dense_aux_k(sae: EveryLayer, x: Tensor, residual: Tensor, dead: Tensor) -> Tensor:
    """AuxK from encoder and decoder rows of the whole width."""
    layers = range(sae.n_sites)
    w_enc = torch.block_diag(*(sae.encoders[sae.latents_of(k)] for k in layers))
    padded = []
    for k, weight in enumerate(sae.decoders):
        sources = sae.sources(k)
        padded.append(F.pad(weight, (0, 0, sources.start, sae.d_sae - sources.stop)))
    w_dec = torch.cat(padded, 1)
    torch.testing.assert_close(sae.W_enc, w_enc.detach())
    torch.testing.assert_close(sae.W_dec, w_dec.detach())
    bias = sae.b_enc[dead] - w_enc[dead] @ sae.origin().detach()
    return ops.aux_k(x, residual, w_enc[dead], bias, w_dec[dead], sae.k_aux)


def test_some_pre_activations_are_those_of_all_in_any_order() -> None:
    sae, x = make("cross_layer_transcoder"), rows(8, 5)
    latents = torch.tensor([40, 3, 17, 2, 41])
    torch.testing.assert_close(sae.some_pre_acts(x, latents), sae.pre_acts(x)[:, latents])


def test_a_layer_by_itself_is_the_transcoder_of_the_family() -> None:
    """With one layer, loss and gradients are those of the transcoder for a single MLP."""
    mine = make("cross_layer_transcoder", "sae.model.n_sites=1").train()
    plain = Transcoder(skip=False, k=mine.k, aux_coeff=mine.aux_coeff, d_in=16, d_sae=48).train()
    with torch.no_grad():
        plain.W_enc.copy_(mine.encoders)
        plain.W_dec.copy_(mine.decoders[0])
        plain.b_enc.copy_(mine.b_enc)
        plain.b_dec.copy_(mine.b_dec)
    dead = torch.arange(48) % 5 == 0
    batch = Batch(rows(64, 0), rows(64, 1))
    losses = [sae.loss(batch, step(sae, dead=dead)).total for sae in (mine, plain)]
    for loss in losses:
        loss.backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    for one, other in ((mine.encoders, plain.W_enc), (mine.decoders[0], plain.W_dec)):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", KINDS[:2])
def test_gradients_are_those_of_a_dense_computation(name: str) -> None:
    sae = make(name).train()
    batch = Batch(rows(64, 0), rows(64, 1))
    forward = sae.training_forward(batch)
    sae.loss(batch, step(sae)).total.backward()
    mask = forward.codes.dense() != 0
    encoder = sae.W_enc.requires_grad_()
    decoder = sae.W_dec.requires_grad_()
    acts = (batch.x @ encoder.T + sae.b_enc.detach()) * mask
    ((acts @ decoder + sae.b_dec.detach() - batch.y).square().sum() / 64).backward()
    for layer in range(sae.n_sites):
        latents = sae.latents_of(layer)
        expected = encoder.grad[latents, sae.site_of(layer)]
        torch.testing.assert_close(sae.encoders.grad[latents], expected, rtol=1e-4, atol=1e-5)
        expected = decoder.grad[sae.sources(layer), sae.site_of(layer)]
        torch.testing.assert_close(sae.decoders[layer].grad, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["step", "tanh"])
def test_thresholds_of_one_layer_are_those_of_jumprelu(form: str) -> None:
    """With one layer, loss and gradients are those of a JumpReLU that reads x and rebuilds y."""
    asked = (f"sae.model.form={form}", "sae.model.pre_act_coeff=1e-3")
    mine = make("cross_layer_jumprelu", "sae.model.n_sites=1", *asked).train()
    plain = make("jumprelu", *asked, pre_bias=False).train()
    with torch.no_grad():
        for name in ("b_enc", "b_dec", "theta"):
            getattr(plain, name).copy_(getattr(mine, name))
        plain.W_enc.copy_(mine.encoders)
        plain.W_dec.copy_(mine.decoders[0])
    dead = torch.arange(48) % 5 == 0
    batch = Batch(rows(64, 0), rows(64, 1))
    losses = [sae.loss(batch, step(sae, dead=dead)) for sae in (mine, plain)]
    assert set(losses[0].parts) == set(losses[1].parts) >= {"mse", "sparsity", "aux_k"}
    for loss in losses:
        loss.total.backward()
    assert losses[0].total.item() == pytest.approx(losses[1].total.item(), rel=1e-5)
    pairs = [(mine.encoders, plain.W_enc), (mine.decoders[0], plain.W_dec)]
    pairs += [(mine.theta, plain.theta), (mine.b_enc, plain.b_enc)]
    for one, other in pairs:
        assert float(one.grad.abs().max()) > 1e-6
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-6)


def test_learned_thresholds_differ_and_the_l0_is_exact() -> None:
    sae = trained("cross_layer_jumprelu")
    active = sae.encode(rows(16384, 10**6 + 1)) != 0
    assert float(active.sum(1).float().mean()) == pytest.approx(L0, rel=1e-2)
    assert float(sae.cutoffs().std()) > 1e-3
    per_layer = active.view(len(active), sae.n_sites, -1).sum((0, 2))
    assert bool((per_layer > 0).all())


def test_every_layer_counts_the_same_whatever_its_scale() -> None:
    x = rows(2048, 0)
    y = x * torch.linspace(1, 100, 2).repeat_interleave(8)
    scaled = units_of(y, "targets", 2).apply(y)
    per_layer = scaled.view(-1, 2, 8).square().sum(2).mean(0)
    torch.testing.assert_close(per_layer, torch.ones(2), rtol=1e-3, atol=0)


def test_sizes_that_cannot_work_are_one_line() -> None:
    with pytest.raises(UserError, match="multiple of the number of layers, 2"):
        sae_spec("cross_layer_transcoder", "sae.d_sae=47").build(16, 16)
    with pytest.raises(UserError, match="3 sites"):
        sae_spec("cross_layer_transcoder", "sae.model.n_sites=3").build(16, 16)


def test_all_names_every_block() -> None:
    spec = sae_spec("cross_layer_transcoder")
    read, write = spec.sites("resid.1", 3)
    assert read == tuple(Site("mlp_in", k) for k in (1, 2, 3))
    assert write == tuple(Site("mlp_out", k) for k in (1, 2, 3))


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("cross", [False, True])
def test_error_nodes_give_the_logits_back(cross: bool, skip: bool) -> None:
    lm, sae, ids = world(cross=cross, skip=skip)
    assert with_errors_gap(lm, sae, ids) < 1e-9
    clean = lm(input_ids=ids).logits.detach()
    without = replaced_logits(lm, ids, sae.replacement(ids.shape)).detach()
    assert float((without - clean).abs().max()) > 0.1, "without them it is another model"


def test_with_everything_held_the_replaced_model_is_that_of_the_clean_codes_at_layer_one() -> None:
    """The first layer's input does not depend on any MLP: its codes are those of the clean run."""
    lm, sae, ids = world()
    frozen = FrozenModel(lm, ids)
    run = frozen.held(sae.replacement(ids.shape))
    torch.testing.assert_close(run.mlp_in[0], frozen.clean[0].mlp_in)
    x = side_by_side(lm, ids, "mlp_in", 4)
    torch.testing.assert_close(
        sae.encode(x)[:, : sae.per_layer], sae.encode_from(0, run.mlp_in[0]).flatten(0, 1)
    )
    assert isinstance(sae, CrossLayerTranscoder)


# --- circuit-tracer's files ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "skip"), [(KINDS[0], False), (KINDS[1], False), (KINDS[1], True), (KINDS[2], False)]
)
def test_transcoders_come_back_from_circuit_tracers_layout(
    name: str, skip: bool, tmp_path: Path
) -> None:
    sae = trained(name, f"sae.model.skip={str(skip).lower()}", n_train=30)
    assert bool(sae.centre.any())
    save_transcoders(sae, tmp_path, model="gpt2", scan="mine")
    again = load_transcoders(tmp_path)
    x = rows(64, 5)
    torch.testing.assert_close(again.encode(x), sae.encode(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again(x), sae(x), rtol=1e-4, atol=1e-5)
    part = again.encode_from(1, x[:, again.site_of(1)])
    torch.testing.assert_close(part, again.encode(x)[:, again.latents_of(1)])
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert config["model_kind"] == (KINDS[0] if sae.cross else "transcoder_set")


def test_the_files_are_in_circuit_tracers_orientation(tmp_path: Path) -> None:
    """`W_dec_i` (F, L - i, C): [:, j] writes layer i + j, and a reconstruction made from it."""
    sae = trained("cross_layer_transcoder", n_train=30)
    save_transcoders(sae, tmp_path, model="gpt2", scan="mine")
    x, out = rows(32, 5), torch.zeros(32, 2, 8)
    for i in range(2):
        encoder = load_file(tmp_path / f"W_enc_{i}.safetensors")
        decoder = load_file(tmp_path / f"W_dec_{i}.safetensors")[f"W_dec_{i}"]
        assert decoder.shape == (24, 2 - i, 8)
        pre = x[:, 8 * i : 8 * i + 8] @ encoder[f"W_enc_{i}"].T + encoder[f"b_enc_{i}"]
        acts = pre * (pre > encoder[f"threshold_{i}"])
        out[:, i:] += torch.einsum("bf,fjc->bjc", acts, decoder)
        out[:, i] += encoder[f"b_dec_{i}"]
    torch.testing.assert_close(out.flatten(1), sae(x), rtol=1e-4, atol=1e-5)


def test_what_is_no_set_of_transcoders_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"W_enc_0\.safetensors"):
        load_transcoders(tmp_path)
    sae = trained("cross_layer_transcoder", n_train=30)
    save_transcoders(sae, tmp_path, model="gpt2", scan="mine")
    (tmp_path / "W_dec_1.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match="W_dec_1"):
        load_transcoders(tmp_path)
    (tmp_path / "W_dec_1.safetensors").write_bytes((tmp_path / "W_dec_0.safetensors").read_bytes())
    with pytest.raises(UserError, match="a tensor is missing or has another shape"):
        load_transcoders(tmp_path)
    skipping = make("cross_layer_transcoder", "sae.model.skip=true")
    with pytest.raises(UserError, match="no skip paths"):
        save_transcoders(skipping, tmp_path / "other", model="gpt2", scan="mine")

"""SAELens directories: what is written loads again and, where sae-lens is installed, loads
there and computes the same.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_experiments import load_sae, save_sae
from sae_experiments.errors import UserError
from sae_experiments.saes import saelens as interop
from sae_experiments.saes.base import Inference
from support.interchange import EXPORTABLE
from support.saes import D, M, rows, trained


@pytest.fixture(params=EXPORTABLE)
def written(request, tmp_path):
    sae = trained(request.param, n_train=60)
    save_sae(sae, tmp_path / "sae", reference=rows(64, 3), metadata={"hook_name": "resid.2"})
    return sae, tmp_path / "sae"


def test_a_directory_read_back_computes_the_same(written):
    sae, folder = written
    x = rows(500, 4)
    again = load_sae(folder)
    assert ((again.encode(x) != 0) == (sae.encode(x) != 0)).float().mean() > 0.9999
    torch.testing.assert_close(again.encode(x), sae.encode(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again(x), sae(x), rtol=1e-4, atol=1e-4)


def test_written_again_it_is_the_same_directory(written, tmp_path):
    _, folder = written
    save_sae(
        load_sae(folder),
        tmp_path / "again",
        reference=rows(64, 3),
        metadata={"hook_name": "resid.2"},
    )
    one, two = (load_file(f / "sae_weights.safetensors") for f in (folder, tmp_path / "again"))
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert torch.equal(value, two[key])


def test_sae_lens_computes_the_same_codes_and_reconstructions(written):
    sae_lens = pytest.importorskip(
        "sae_lens",
        reason="sae-lens is not installed: pip install -e '.[peers]' in an environment of its own",
    )
    sae, folder = written
    x = rows(500, 4)
    theirs = sae_lens.SAE.load_from_disk(str(folder))
    torch.testing.assert_close(theirs.encode(x).to_dense(), sae.encode(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(theirs(x), sae(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "gated"])
def test_what_sae_lens_writes_loads_here(architecture, tmp_path):
    sae_lens = pytest.importorskip(
        "sae_lens",
        reason="sae-lens is not installed: pip install -e '.[peers]' in an environment of its own",
    )
    kinds = {
        "standard": ("StandardSAE", "StandardSAEConfig", {}),
        "topk": ("TopKSAE", "TopKSAEConfig", {"k": 5}),
        "jumprelu": ("JumpReLUSAE", "JumpReLUSAEConfig", {}),
        "gated": ("GatedSAE", "GatedSAEConfig", {}),
    }
    cls, cfg, extra = kinds[architecture]
    torch.manual_seed(0)
    theirs = getattr(sae_lens, cls)(
        getattr(sae_lens, cfg)(d_in=16, d_sae=M, dtype="float32", device="cpu", **extra)
    )
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.rand_like(p))
    theirs.save_model(tmp_path)
    x = rows(200, 4)
    ours = load_sae(tmp_path)
    torch.testing.assert_close(ours.encode(x), theirs.encode(x).to_dense(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


def _saved(tmp_path):
    folder = tmp_path / "sae"
    save_sae(trained("batch_topk", n_train=20), folder, reference=rows(64, 3), metadata={})
    return folder


@pytest.mark.parametrize("name", ["W_enc", "W_dec", "b_enc", "b_dec", "threshold"])
def test_a_missing_tensor_is_named(name, tmp_path):
    folder = _saved(tmp_path)
    tensors = load_file(folder / "sae_weights.safetensors")
    del tensors[name]
    save_file(tensors, folder / "sae_weights.safetensors")
    with pytest.raises(UserError, match=f"tensor {name} is missing"):
        load_sae(folder)


def test_a_transposed_tensor_is_named(tmp_path):
    folder = _saved(tmp_path)
    tensors = load_file(folder / "sae_weights.safetensors")
    tensors["W_enc"] = tensors["W_enc"].t().contiguous()
    save_file(tensors, folder / "sae_weights.safetensors")
    with pytest.raises(UserError, match="W_enc has shape"):
        load_sae(folder)


def test_swapped_tensors_are_noticed_by_the_reference_rows(tmp_path):
    folder = _saved(tmp_path)
    tensors = load_file(folder / "sae_weights.safetensors")
    tensors["b_enc"], tensors["threshold"] = tensors["threshold"], tensors["b_enc"]
    save_file(tensors, folder / "sae_weights.safetensors")
    with pytest.raises(UserError, match="swapped or damaged"):
        load_sae(folder)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("architecture", "magic", "architecture='magic'"),
        ("d_in", "x", "d_in"),
        ("normalize_activations", "constant_scalar_rescale", "constant_scalar_rescale"),
    ],
)
def test_a_setting_that_is_not_known_is_named(key, value, said, tmp_path):
    folder = _saved(tmp_path)
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(UserError, match=said):
        load_sae(folder)


def test_what_is_no_sae_directory_or_no_whole_file_is_one_line(tmp_path):
    with pytest.raises(UserError, match="is not an SAE directory"):
        load_sae(tmp_path)
    folder = _saved(tmp_path)
    (folder / "sae_weights.safetensors").write_bytes(
        (folder / "sae_weights.safetensors").read_bytes()[:-50]
    )
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load_sae(folder)


@pytest.mark.parametrize("rescaled", [False, True])
def test_what_a_loaded_latent_writes_follows_its_decoder(rescaled):
    """SAELens' TopK may divide the code by the lengths of the decoder's rows before it decodes."""
    g = torch.Generator().manual_seed(0)
    rows_dec = torch.randn(M, D, generator=g) * torch.rand(M, 1, generator=g).mul(5)
    tensors = {
        "W_enc": torch.randn(D, M, generator=g),
        "W_dec": rows_dec,
        "b_enc": torch.zeros(M),
        "b_dec": torch.zeros(D),
    }
    sae = interop.Loaded(
        Inference("topk", tensors, {"k": 4, "rescale_acts_by_decoder_norm": rescaled})
    )
    acts, direction = sae.encode(torch.randn(32, D, generator=g)), torch.randn(D, generator=g)
    torch.testing.assert_close(
        sae.contributions(acts, direction).sum(1),
        (sae.decode(acts) - sae.b_dec) @ direction,
        rtol=1e-4,
        atol=1e-5,
    )
    torch.testing.assert_close(
        sae.decoder_norms(),
        (sae.decode(torch.eye(M)) - sae.b_dec).norm(dim=1),
        rtol=1e-4,
        atol=1e-6,
    )

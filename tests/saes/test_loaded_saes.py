"""SAEs from SAELens directories: every architecture and normalisation computes what sae-lens
does, and a run evaluates them beside its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_experiments import load_sae, save_sae
from sae_experiments.config.compose import build, compose_checked
from sae_experiments.errors import UserError
from sae_experiments.saes.base import Inference
from sae_experiments.saes.loaded import NormalisedRows, loaded
from sae_experiments.saes.saelens_config import TRANSCODERS
from support.command_line import in_this_process
from support.common import CONF

D, F, OUT = 12, 40, 10
NORMALISATIONS = ("none", "layer_norm", "constant_norm_rescale")
X = 3 * torch.randn(200, D, generator=torch.Generator().manual_seed(5)) + 1.5
ARCHITECTURES = ("standard", "topk", "jumprelu", "gated", "batchtopk", *TRANSCODERS)


def weights(architecture: str) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    kind, skip = TRANSCODERS.get(architecture, (architecture, False))
    out = OUT if architecture in TRANSCODERS else D
    t = {"W_enc": (D, F), "W_dec": (F, out), "b_dec": (out,), "b_enc": (F,)}
    t |= {"threshold": (F,)} if kind == "jumprelu" else {}
    t |= {"r_mag": (F,), "b_mag": (F,), "b_gate": (F,)} if kind == "gated" else {}
    t |= {"W_skip": (out, D)} if skip else {}
    made = {name: 0.5 * torch.randn(shape, generator=g) for name, shape in t.items()}
    if kind == "gated":
        del made["b_enc"]
    return made | ({"topk_threshold": torch.tensor(0.7)} if kind == "batchtopk" else {})


def config(architecture: str, normalisation: str) -> dict[str, Any]:
    keys = {"d_in": D, "d_sae": F, "architecture": architecture, "dtype": "float32"}
    keys |= {"normalize_activations": normalisation}
    keys |= {"k": 5} if architecture in ("topk", "batchtopk") else {}
    transcoder = architecture in TRANSCODERS
    return keys | {"apply_b_dec_to_input": not transcoder} | ({"d_out": OUT} if transcoder else {})


def reference(c: dict[str, Any], t: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and reconstructions of sae-lens, as plain as can be."""
    raw, shift, scale = x, torch.zeros(len(x), 1), torch.ones(len(x), 1)
    if c["normalize_activations"] == "layer_norm":
        shift, scale = x.mean(1, keepdim=True), x.std(1, keepdim=True)
        x = (x - shift) / (scale + 1e-5)
    elif c["normalize_activations"] == "constant_norm_rescale":
        scale = x.norm(dim=1, keepdim=True) / D**0.5
        x = x / scale
    kind, skip = TRANSCODERS.get(c["architecture"], (c["architecture"], False))
    pre = (x - t["b_dec"] if c["apply_b_dec_to_input"] else x) @ t["W_enc"]
    norms = t["W_dec"].norm(dim=1) if kind == "batchtopk" else torch.ones(F)
    if kind == "gated":
        z = (pre + t["b_gate"] > 0) * (t["r_mag"].exp() * pre + t["b_mag"]).relu()
    else:
        pre = (pre + t["b_enc"]) * norms
        z = pre.relu()
        if kind == "topk":
            z = z * (pre >= pre.sort(dim=1, descending=True).values[:, [c["k"] - 1]])
        if kind in ("jumprelu", "batchtopk"):
            z = z * (pre > t["threshold" if kind == "jumprelu" else "topk_threshold"])
    y = (z / norms) @ t["W_dec"] + t["b_dec"]
    if c["architecture"] in TRANSCODERS:
        return z, y + (raw @ t["W_skip"].t() if skip else 0)
    return z, y * scale + shift


def write(folder: Path, c: dict[str, Any], t: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(c))
    save_file(t, folder / "sae_weights.safetensors")
    return folder


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_and_normalisation_computes_what_sae_lens_does(
    architecture: str, normalisation: str, tmp_path: Path
) -> None:
    c, t = config(architecture, normalisation), weights(architecture)
    codes, recon = reference(c, t, X)
    for rows in (None, X):  # before and after the decoder is put in the units of typical rows
        sae = load_sae(write(tmp_path, c, t), rows=rows)
        torch.testing.assert_close(sae.encode(X), codes, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(sae(X), recon, rtol=1e-4, atol=1e-4)
        assert torch.equal(sae(X), sae.reconstruct(X, sae.encode(X)))
    if architecture not in TRANSCODERS:
        save_sae(sae, tmp_path / "again", reference=X, metadata={})
        torch.testing.assert_close(load_sae(tmp_path / "again")(X), recon, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("given", ["activation_scaler.json", "store state", "rows", "nothing"])
def test_a_factor_of_the_input_is_folded_from_a_file_or_estimated_or_asked_for(
    given: str, architecture: str, tmp_path: Path
) -> None:
    c, t = config(architecture, "expected_average_only_in"), weights(architecture)
    write(tmp_path, c, t)
    factor = float(D**0.5 / X.norm(dim=1).mean()) if given == "rows" else 0.37
    if given == "activation_scaler.json":
        (tmp_path / given).write_text(json.dumps({"scaling_factor": factor}))
    if given == "store state":
        state = {"estimated_norm_scaling_factor": torch.tensor(factor), "n": torch.tensor(3)}
        save_file(state, tmp_path / "activations_store_state.safetensors")
    if given == "nothing":
        with pytest.raises(UserError, match="expected_average_only_in needs the factor"):
            load_sae(tmp_path)
        return
    sae = load_sae(tmp_path, rows=X if given == "rows" else None)
    codes, recon = reference(c | {"normalize_activations": "none"}, t, factor * X)
    torch.testing.assert_close(sae.encode(X), codes, rtol=1e-4, atol=1e-4)
    if "skip" not in architecture:
        torch.testing.assert_close(sae(X), recon / factor, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("text", "said"),
    [("{}", None), ('{"scaling_factor": -1}', "-1"), ('{"scaling_factor": "a"}', "'a'")],
)
def test_a_factor_that_is_none_is_one_line(text: str, said: str | None, tmp_path: Path) -> None:
    write(tmp_path, config("standard", "expected_average_only_in"), weights("standard"))
    (tmp_path / "activation_scaler.json").write_text(text)
    with pytest.raises(UserError, match=said or "needs the factor"):
        load_sae(tmp_path)


def test_a_decoder_in_units_of_typical_rows_predicts_what_a_latent_adds() -> None:
    """What metrics read off the decoder alone must have the units of the activations, not of
    normalised rows.
    """
    t = weights("standard")
    sae = loaded(Inference("standard", t, {"normalize_activations": "layer_norm"}))
    assert isinstance(sae, NormalisedRows)
    sae.adapt(X)
    acts = torch.zeros(len(X), F)
    base, acts[:, 3] = sae.reconstruct(X, acts), 1.0
    added = (sae.reconstruct(X, acts) - base).norm(dim=1)
    torch.testing.assert_close(added.mean(), sae.decoder_norms()[3], rtol=1e-4, atol=0)


# ------------------------------------------------------------------------------- real sae-lens


PEER_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "standard": ("StandardSAE", {}),
    "topk": ("TopKSAE", {"k": 5}),
    "jumprelu": ("JumpReLUSAE", {}),
    "gated": ("GatedSAE", {}),
    "transcoder": ("Transcoder", {"d_out": OUT, "apply_b_dec_to_input": False}),
    "skip_transcoder": ("SkipTranscoder", {"d_out": OUT, "apply_b_dec_to_input": False}),
    "jumprelu_transcoder": ("JumpReLUTranscoder", {"d_out": OUT, "apply_b_dec_to_input": False}),
}


def fvu(y: Tensor, recon: Tensor) -> float:
    return float((y - recon).square().sum() / (y - y.mean(0)).square().sum())


@pytest.mark.parametrize("normalisation", [*NORMALISATIONS, "expected_average_only_in"])
@pytest.mark.parametrize("kind", PEER_KINDS)
def test_fvu_and_l0_are_those_of_sae_lens(kind: str, normalisation: str, tmp_path: Path) -> None:
    sae_lens = pytest.importorskip(
        "sae_lens",
        reason="sae-lens is not installed: pip install -e '.[peers]' in an environment of its own",
    )
    name, extra = PEER_KINDS[kind]
    cls = getattr(sae_lens, name, None) or getattr(sae_lens.saes.transcoder, name)
    config_cls = getattr(sae_lens, f"{name}Config", None) or getattr(
        sae_lens.saes.transcoder, f"{name}Config"
    )
    keys = {"d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu"}
    theirs = cls(config_cls(**keys, **extra, normalize_activations=normalisation))
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=g))
    theirs.save_model(tmp_path)
    ours = load_sae(tmp_path, rows=X)
    x, y = X, X[:, :OUT] if "transcoder" in kind else X
    if normalisation == "expected_average_only_in":  # sae-lens folds the factor before it evaluates
        theirs.fold_activation_norm_scaling_factor(float(D**0.5 / X.norm(dim=1).mean()))
    with torch.no_grad():
        codes = theirs.encode(x)
        codes = codes.to_dense() if codes.is_sparse else codes
        recon = theirs(x)
    assert float((ours.encode(x) != 0).sum(1).float().mean()) == pytest.approx(
        float((codes != 0).sum(1).float().mean()), rel=0.01
    )
    assert fvu(y, ours(x)) == pytest.approx(fvu(y, recon), rel=0.01)


# ------------------------------------------------------------------------------------ in a run


WIDTH = 16  # of the made language model


def foreign(
    folder: Path, architecture: str = "standard", normalisation: str = "none", **more: Any
) -> Path:
    """A directory of an SAE of the made language model's stream after its first block."""
    c = config(architecture, normalisation) | {"d_in": WIDTH}
    c |= {"d_out": WIDTH, "hook_name_out": "blocks.0.hook_mlp_out"} if "d_out" in c else {}
    c |= {"metadata": {"sae_lens_version": "6.5.0", "hook_name": "blocks.0.hook_resid_post"}}
    g = torch.Generator().manual_seed(3)
    sizes = {D: WIDTH, OUT: WIDTH}
    t = {
        name: 0.3 * torch.randn([sizes.get(n, n) for n in v.shape], generator=g)
        for name, v in weights(architecture).items()
    }
    return write(folder, c | more, t)


def run(experiment: Any, *args: str) -> Any:
    return in_this_process(experiment, "out_dir=run", *args)


def test_a_run_evaluates_it_beside_its_own_with_every_metric(
    experiment: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = foreign(experiment.here / "o'ther #1", "jumprelu", "layer_norm")
    args = ["sae=[saelens,batch_topk]", f"sae.path={folder}", "site=resid.1", "metric=all"]
    args += ["study.replicas=1"]
    made = run(experiment, *args, "report=true")
    said = capsys.readouterr()
    assert made == 0, said.err
    assert "report: " in said.out
    final = experiment.json("run", "final_info.json")
    assert set(final) == {"text8.saelens", "text8.batch_topk"}
    record = experiment.json("run", "cells", "text8.saelens_0.json")
    own = experiment.json("run", "cells", "text8.batch_topk_0.json")
    assert record["metrics"].keys() == own["metrics"].keys()
    assert record["metrics"]["sae_train_time"] is None
    assert record["why_null"]["sae_train_time"] == "the SAE was loaded, not trained here"
    assert record["facts"]["loaded"]["path"] == str(folder)
    assert record["metrics"]["sae_fvu"] > 0 and record["metrics"]["ce_delta_bits"] is not None
    assert run(experiment, *args) == 0, "the same command again finds its results"
    tensors = load_file(folder / "sae_weights.safetensors")
    save_file(tensors | {"b_dec": tensors["b_dec"] + 1}, folder / "sae_weights.safetensors")
    assert run(experiment, *args) == 2
    assert "holds results on another SAE" in capsys.readouterr().err


def test_the_numbers_of_a_run_are_those_of_its_directory(experiment: Any) -> None:
    """An SAE that was fitted and exported here, evaluated again from its directory."""
    assert run(experiment, "sae=jumprelu", "site=resid.1") == 0
    folder = experiment.runs / "run" / "saes" / "text8_0"
    args = ["out_dir=again", "sae=saelens", f"sae.path={folder}", "site=resid.1"]
    assert in_this_process(experiment, *args) == 0
    first = experiment.json("run", "cells", "text8_0.json")["metrics"]
    second = experiment.json("again", "cells", "text8_0.json")["metrics"]
    for name in ("sae_fvu", "sae_l0", "ce_delta_bits"):
        assert second[name] == pytest.approx(first[name], rel=1e-3)


def check(*args: str) -> None:
    small = ["preset=smoke", "lm.n_embd=16", "lm.n_layer=2", "sae=saelens", *args]
    build(compose_checked(CONF, small)[0].study).check()


def test_a_transcoder_has_its_own_sites(tmp_path: Path) -> None:
    name = {"metadata": {"hook_name": "blocks.0.mlp.hook_in"}}
    folder = foreign(tmp_path / "a", "transcoder", **name)
    cfg, _ = compose_checked(CONF, ["preset=smoke", "sae=saelens", f"sae.path={folder}"])
    study = build(cfg.study)
    (spec,) = study.saes.values()
    assert tuple(map(str, study.sites(spec))) == ("mlp_in.1", "mlp_out.1")
    foreign(tmp_path / "b", "transcoder", **name, hook_name_out=None)
    with pytest.raises(UserError, match=r"hook_name_out names no site here.*sae\.write"):
        check(f"sae.path={tmp_path / 'b'}")
    check(f"sae.path={tmp_path / 'b'}", "sae.write=mlp_out.2")


@pytest.mark.parametrize(
    ("change", "args", "said"),
    [
        ({}, ["site=resid.2"], "was fitted at resid.1, not at resid.2: set site=resid.1"),
        ({}, ["lm.n_embd=32"], "has d_in=16, but the site that it reads is 32 wide"),
        ({"architecture": "temporal"}, [], "architecture='temporal' is not one of"),
        ({"hook_name": "blocks.0.hook_q", "metadata": {}}, [], "is no site here.*sae.read"),
        ({"normalize_activations": "magic"}, [], "normalize_activations='magic' is not supported"),
        ({"d_sae": None}, [], "d_sae=None must be a whole number"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line_before_any_computing(
    change: dict[str, Any], args: list[str], said: str, tmp_path: Path
) -> None:
    folder = foreign(tmp_path / "sae", **change)
    with pytest.raises(UserError, match=said) as told:
        check("site=resid.1", *args, f"sae.path={folder}")
    assert "\n" not in str(told.value)


def test_a_missing_directory_or_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not an SAE directory"):
        check(f"sae.path={tmp_path}")
    with pytest.raises(UserError, match=r"give sae\.path=DIR"):
        check()
    folder = foreign(tmp_path / "sae")
    (folder / "sae_weights.safetensors").unlink()
    with pytest.raises(UserError, match="is not an SAE directory"):
        check(f"sae.path={folder}", "site=resid.1")
    foreign(tmp_path / "sae")
    for study in ("ground_truth", "palindrome"):
        with pytest.raises(UserError, match="evaluated by study=language only"):
            check(f"study={study}", f"sae.path={folder}")
    with pytest.raises(UserError, match="sae/host=saelens does not exist"):
        compose_checked(CONF, ["sae=purified", "sae/host=saelens"])

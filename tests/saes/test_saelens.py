"""Foreign SAE directories: the right value, checked against a plain reference, or one line that
names the key.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sae_experiments import load_sae, save_sae
from sae_experiments.errors import UserError
from sae_experiments.models.hooks import Site
from sae_experiments.saes.saelens_config import ABOUT, READ, hook_name, hook_of_site, site_of_hook
from sae_experiments.saes.topk import TopK
from sae_experiments.studies.circuits import sources

D, F = 6, 16
X = torch.randn(40, D, generator=torch.Generator().manual_seed(5))


def tensors(seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (D, F), "W_dec": (F, D), "b_dec": (D,)}
    return {
        k: torch.randn(shapes.get(k, (F,)), generator=g)
        for k in ("W_enc", "W_dec", "b_dec", "b_enc")
    }


def more(architecture: str, t: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an architecture."""
    own = {"jumprelu": ("threshold",), "gated": ("b_gate", "r_mag", "b_mag")}.get(architecture, ())
    g = torch.Generator().manual_seed(9)
    plain = {k: v for k, v in t.items() if k != "b_enc" or architecture != "gated"}
    return plain | {k: 0.5 * torch.randn(F, generator=g) for k in own}


def reference(c: dict[str, Any], t: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """What SAELens computes, any version, as plain as can be. Raises where it means nothing."""
    t = {k: v.float() for k, v in t.items()}
    act = (
        c.get("activation_fn_str")
        or c.get("activation_fn")
        or {"topk": "topk"}.get(c.get("architecture", ""), "relu")
    )
    shift, factor = torch.zeros(len(x), 1), torch.ones(len(x), 1)
    norm = c.get("normalize_activations") or "none"
    if norm == "layer_norm":
        shift, factor = x.mean(1, keepdim=True), x.std(1, keepdim=True) + 1e-5
    elif norm == "constant_norm_rescale":
        factor = x.norm(dim=1, keepdim=True) / D**0.5
    elif norm != "none":
        raise NotImplementedError(norm)
    x = (x - shift) / factor
    pre = (x - t["b_dec"] if c.get("apply_b_dec_to_input", True) else x) @ t["W_enc"]
    norms = t["W_dec"].norm(dim=1) if c.get("rescale_acts_by_decoder_norm") else torch.ones(F)
    if c.get("architecture") == "gated":
        z = (pre + t["b_gate"] > 0) * (t["r_mag"].exp() * pre + t["b_mag"]).relu()
    else:
        pre = (pre + t["b_enc"]) * norms
        z = {"relu": pre.relu(), "topk": pre.relu(), "tanh-relu": pre.relu().tanh()}[act]
        if act == "topk":
            k = c["k"] if "k" in c else c["activation_fn_kwargs"]["k"]
            z = z * (pre >= pre.sort(dim=1, descending=True).values[:, [k - 1]])
        if c.get("architecture") == "jumprelu":
            z = z * (pre > (t["threshold"] if "threshold" in t else t["log_threshold"].exp()))
    scale = next((t[k] for k in t if k.endswith("scaling_factor")), torch.ones(F))
    scale = scale if c.get("finetuning_scaling_factor") else torch.ones(F)
    return z, ((z / norms * scale) @ t["W_dec"] + t["b_dec"]) * factor + shift


def spelled(version: int, kind: str, k: int) -> dict[str, Any]:
    """One SAE as the versions of sae-lens write it."""
    size = {"d_in": D, "d_sae": F, "device": "cpu", "context_size": 128, "prepend_bos": True}
    topk = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": k}}
    relu = {"activation_fn_str": "relu", "activation_fn_kwargs": {}}
    if version == 2:
        return size | {
            "hook_point": "blocks.{layer}.hook_resid_post",
            "hook_point_layer": 3,
            "hook_point_head_index": None,
            "activation_fn": "relu",
            "dtype": "torch.float32",
            "normalize_activations": False,
            "noise_scale": 0.0,
            "l1_coefficient": 1e-3,
            "sae_lens_version": "2.1.3",
            "lr": 4e-4,
            "wandb_project": "x",
            "log_to_wandb": True,
            "mse_loss_normalization": None,
            "finetuning_tokens": 0,
        }
    if version == 3:
        return (
            size
            | relu
            | {
                "hook_name": "blocks.3.hook_resid_post",
                "hook_layer": 3,
                "hook_head_index": None,
                "dtype": "float32",
            }
        )
    if version == 5:
        acts = topk if kind == "topk" else relu
        old = {
            "architecture": kind,
            "finetuning_scaling_factor": False,
            "normalize_activations": "none",
            "sae_lens_training_version": "5.1.0",
        }
        return (
            size
            | acts
            | old
            | {
                "hook_name": "blocks.3.hook_resid_post",
                "hook_layer": 3,
                "hook_head_index": None,
            }
        )
    new = {
        "architecture": kind,
        "dtype": "float32",
        "reshape_activations": "none",
        "normalize_activations": "none",
        "apply_b_dec_to_input": True,
    }
    own = {"k": k, "rescale_acts_by_decoder_norm": False} if kind == "topk" else {}
    return (
        {
            "d_in": D,
            "d_sae": F,
            "metadata": {"sae_lens_version": "6.5.0", "hook_name": "blocks.3.hook_resid_post"},
        }
        | new
        | own
    )


#: Values of keys, and whether the SAE must load with them.
ODD: list[tuple[str, Any, bool]] = [
    ("architecture", "standard", False),
    ("architecture", "topk", False),
    ("architecture", "jumprelu", False),
    ("architecture", "gated", False),
    ("architecture", "batchtopk", False),
    ("architecture", "temporal", False),
    ("architecture", ["topk"], False),
    ("architecture", None, False),
    ("activation_fn_str", "relu", False),
    ("activation_fn_str", "topk", False),
    ("activation_fn_str", "tanh-relu", False),
    ("activation_fn", "topk", False),
    ("activation_fn", "gelu", False),
    ("activation_fn_kwargs", {"k": 3}, False),
    ("activation_fn_kwargs", {"k": 3, "postact_fn": "identity"}, False),
    ("activation_fn_kwargs", "k", False),
    ("activation_fn_kwargs", None, False),
    ("k", "abc", False),
    ("k", None, False),
    ("k", 4.7, False),
    ("k", F + 1, False),
    ("k", 0, False),
    ("k", -2, False),
    ("k", True, False),
    ("normalize_activations", None, True),
    ("normalize_activations", False, True),
    ("normalize_activations", True, False),
    ("normalize_activations", "none", True),
    ("normalize_activations", "layer_norm", False),
    ("normalize_activations", 1, False),
    ("normalize_activations", "constant_norm_rescale", False),
    ("normalize_activations", "expected_average_only_in", False),
    ("reshape_activations", "hook_z", True),
    ("reshape_activations", "other", False),
    ("apply_b_dec_to_input", False, True),
    ("apply_b_dec_to_input", "false", False),
    ("apply_b_dec_to_input", None, False),
    ("finetuning_scaling_factor", True, False),
    ("finetuning_scaling_factor", "yes", False),
    ("finetuning_scaling_factor", None, True),
    ("rescale_acts_by_decoder_norm", True, False),
    ("rescale_acts_by_decoder_norm", False, True),
    ("rescale_acts_by_decoder_norm", "no", False),
    ("hook_head_index", 3, False),
    ("hook_head_index", 0, False),
    ("hook_point_head_index", 2, False),
    ("noise_scale", 0.1, True),
    ("dtype", "torch.bfloat16", True),
    ("dtype", "int8", False),
    ("dtype", 3, False),
    ("d_in", float(D), True),
    ("d_in", D + 1, False),
    ("d_in", "x", False),
    ("d_in", None, False),
    ("d_sae", F + 1, False),
    ("d_sae", [F], False),
    ("d_sae", True, False),
    ("d_out", D, True),
    ("d_out", D + 2, False),
    ("d_out", None, True),
    ("sparsity_scale", 0.5, False),
    ("decoder_gain", 2.0, False),
    ("unknown", None, True),
    ("unknown", False, True),
    ("two\nlines", 1, False),
    ("metadata", "text", False),
    ("metadata", None, True),
    ("prepend_bos", False, True),
    ("seqpos_slice", [1, None], True),
    ("seed", 3, True),
    ("postact_fn", "identity", False),
    ("use_error_term", True, False),
    ("k", float("inf"), False),
    ("d_sae", float("nan"), False),
]
GARBAGE: list[Any] = [
    None,
    "",
    "abc",
    -1,
    0,
    3,
    4.7,
    True,
    False,
    [],
    ["topk"],
    {},
    {"k": 2},
    float("inf"),
    "none",
    "topk",
    "relu",
    1 << 70,
]
NOT_COMPUTED = {"hook_name", "hook_point", "hook_layer", "hook_point_layer"}
#: What a message may call a key: a missing k stands for the place where it was looked for.
ALSO = {
    "activation_fn_kwargs": ["k="],
    "activation_fn_str": ["k=", "activation_fn"],
    "activation_fn": ["k="],
    "architecture": ["k=", "activation_fn"],
}


def write(folder: Path, config: Any, t: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file(t, folder / "sae_weights.safetensors")
    return folder


def outcome(
    folder: Path, config: dict[str, Any], t: dict[str, Tensor], changed: set[str], must_load: bool
) -> bool:
    """Whether it loaded; asserts that it then is right, and that a refusal is one line about
    something that was changed.
    """
    try:
        sae = load_sae(write(folder, config, t))
    except UserError as error:
        line = str(error)
        assert not must_load, (line, config)
        assert "\n" not in line and len(line) < 500
        names = [n for key in changed for n in (key, repr(key), *ALSO.get(key, []))]
        assert any(n in line.replace(str(folder), "") for n in names), (line, changed)
        return False
    codes, recon = reference(config, t, X)
    torch.testing.assert_close(sae.encode(X), codes, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae(X), recon, rtol=1e-3, atol=1e-3)
    return True


FORMS = [
    (2, "standard"),
    (3, "standard"),
    (5, "standard"),
    (5, "topk"),
    (5, "jumprelu"),
    (5, "gated"),
]
FORMS += [(6, "standard"), (6, "topk"), (6, "jumprelu"), (6, "gated")]


@pytest.mark.parametrize(("version", "kind"), FORMS)
def test_every_spelling_of_an_sae_computes_the_same(
    version: int, kind: str, tmp_path: Path
) -> None:
    t = more(kind, tensors(1))
    assert outcome(tmp_path, spelled(version, kind, 4), t, set(), True)
    assert site_of_hook(sources.hook_of(tmp_path)) == "resid.4"
    assert outcome(
        tmp_path, spelled(version, kind, 4), {k: v.bfloat16() for k, v in t.items()}, set(), True
    )


def test_five_hundred_directories_are_read_rightly_or_refused_by_name(tmp_path: Path) -> None:
    chance, loaded = random.Random(0), 0
    for i in range(500):
        version, kind = chance.choice(FORMS)
        config, t = spelled(version, kind, chance.randint(1, F)), more(kind, tensors(i))
        odd = chance.sample(ODD, chance.choice([0, 1, 1, 1, 2]))
        changes = {key: value for key, value, _ in odd}
        loaded += outcome(
            tmp_path, config | changes, t, set(changes), all(fine for *_, fine in odd)
        )
    assert 150 < loaded < 400


def test_whatever_stands_at_a_key_it_is_read_rightly_or_refused_by_name(tmp_path: Path) -> None:
    for i, (key, value) in enumerate((k, v) for k in sorted(READ - NOT_COMPUTED) for v in GARBAGE):
        version, kind = FORMS[i % len(FORMS)]
        outcome(
            tmp_path, spelled(version, kind, 4) | {key: value}, more(kind, tensors(2)), {key}, False
        )


def test_what_says_how_it_was_trained_changes_nothing(tmp_path: Path) -> None:
    t = tensors(3)
    for key in sorted(ABOUT - {"metadata"}):
        assert outcome(tmp_path, spelled(6, "standard", 4) | {key: "something"}, t, {key}, True)
    write(tmp_path, spelled(2, "standard", 4) | {"noise_scale": 0.1}, t)
    assert "noise_scale=0.1" in load_sae(tmp_path).notes[0]
    for other in ([], "text", 3, None):
        with pytest.raises(UserError, match="is not a mapping"):
            load_sae(write(tmp_path, other, t))


SPECIAL: list[tuple[str, dict[str, Tensor], dict[str, Any], str | None]] = [
    (
        "standard",
        {"scaling_factor": torch.full((F,), 2.0)},
        {"finetuning_scaling_factor": True},
        None,
    ),
    (
        "topk",
        {"finetuning_scaling_factor": torch.rand(F) + 0.5},
        {"finetuning_scaling_factor": True},
        None,
    ),
    ("jumprelu", {"scaling_factor": torch.rand(F)}, {"finetuning_scaling_factor": True}, None),
    ("standard", {"scaling_factor": torch.ones(F)}, {}, None),
    ("standard", {"scaling_factor": torch.full((F,), 2.0)}, {}, "finetuning_scaling_factor"),
    (
        "standard",
        {"scaling_factor": torch.ones(3)},
        {"finetuning_scaling_factor": True},
        "finetuning_scaling_factor",
    ),
    (
        "topk",
        {"scaling_factor": torch.rand(F)},
        {"finetuning_scaling_factor": True, "rescale_acts_by_decoder_norm": True},
        "finetuning",
    ),
    ("topk", {}, {"rescale_acts_by_decoder_norm": True}, None),
    ("standard", {"W_skip": torch.ones(D, D)}, {}, "W_skip"),
    ("standard", {"W_skip": torch.zeros(D, D)}, {}, None),
    ("standard", {"threshold": torch.ones(F)}, {}, "threshold"),
    ("gated", {"b_enc": torch.ones(F)}, {}, "b_enc"),
    ("gated", {"b_enc": torch.zeros(F)}, {}, None),
    ("topk", {"topk_threshold": torch.tensor(0.3)}, {}, "topk_threshold"),
    ("standard", {"b_enc": torch.full((F,), float("nan"))}, {}, "b_enc"),
    ("standard", {"W_dec": torch.full((F, D), float("inf"))}, {}, "W_dec"),
    ("standard", {"W_enc": torch.ones(D, F, dtype=torch.int8)}, {}, "W_enc"),
]


@pytest.mark.parametrize(("kind", "tensor", "keys", "named"), SPECIAL)
def test_tensors_that_matter_are_used_or_named(
    kind: str, tensor: dict[str, Tensor], keys: dict[str, Any], named: str | None, tmp_path: Path
) -> None:
    config = spelled(6, kind, 4) | keys
    assert outcome(
        tmp_path, config, more(kind, tensors(4)) | tensor, {named or ""}, named is None
    ) == (named is None)


def test_a_raw_log_threshold_is_exponentiated(tmp_path: Path) -> None:
    t = more("jumprelu", tensors(5))
    t["log_threshold"] = 0.3 * t.pop("threshold")
    assert outcome(tmp_path, spelled(6, "jumprelu", 4), t, set(), True)


# ------------------------------------------------------------------------------------------------
# sites


STREAMS = {
    "resid": "hook_resid_post",
    "mlp_act": "mlp.hook_post",
    "mlp_out": "hook_mlp_out",
    "mlp_in": "mlp.hook_in",
    "attn_out": "hook_attn_out",
}
NOWHERE = [
    "hook_resid_mid",
    "attn.hook_z",
    "hook_mlp_in",
    "ln2.hook_normalized",
    "hook_in",
    "mlp.hook_pre",
    "hook_resid_post.x",
]
ELSEWHERE = [
    "model.layers.2",
    "transformer.h.2",
    "hook_embed",
    "blocks.x.hook_resid_post",
    "resid",
    "resid.mid",
    "mlp_act",
    "hook_resid_post",
    "a\nb",
]


def test_hook_points_and_sites_name_each_other() -> None:
    for stream, hook in STREAMS.items():
        for block in range(30):
            name = f"{stream}.{block + 1}"
            assert (
                hook_of_site(name) == f"blocks.{block}.{hook}"
                and site_of_hook(f"blocks.{block}.{hook}") == name
            )
            assert site_of_hook(name) == name
    assert [site_of_hook(f"blocks.{b}.hook_resid_pre") for b in (0, 1, 7)] == [
        "resid.0",
        "resid.1",
        "resid.7",
    ]
    assert hook_of_site("resid.0") == "blocks.0.hook_resid_pre"
    assert all(site_of_hook(f"blocks.2.{h}") is None for h in NOWHERE) and all(
        site_of_hook(n) is None for n in ELSEWHERE
    )
    assert all(
        hook_of_site(n) is None for n in (*ELSEWHERE, "mlp_in.0", "resid.1, resid.2", "None")
    )


def named(version: int, hook: str) -> dict[str, Any]:
    """A configuration that names a hook point where its version does."""
    config = spelled(version, "standard", 4)
    for key in ("hook_name", "hook_layer", "hook_point", "hook_point_layer"):
        config.pop(key, None)
    place = {2: "hook_point"}.get(version, "hook_name")
    return config | (
        {"metadata": config["metadata"] | {place: hook}} if version == 6 else {place: hook}
    )


@pytest.mark.parametrize("version", [2, 3, 5, 6])
def test_an_sae_passes_for_its_own_site_and_for_no_other(version: int, tmp_path: Path) -> None:
    t, all_sites = tensors(6), [Site(s, n) for s in STREAMS for n in (1, 2, 3)]
    for hook in [
        f"blocks.{b}.{h}"
        for b in (0, 1, 2)
        for h in (*STREAMS.values(), "hook_resid_pre", *NOWHERE)
    ] + ELSEWHERE:
        write(tmp_path, named(version, hook), t)
        for site in all_sites:
            if site_of_hook(hook) == str(site):
                assert sources.load_sae("upstream", tmp_path, "text8", 0, site, D).d_sae == F
                continue
            with pytest.raises(UserError, match=r"study\.upstream\.sae=.* was fitted at") as told:
                sources.load_sae("upstream", tmp_path, "text8", 0, site, D)
            assert "\n" not in str(told.value)


def test_names_and_layers_that_contradict_each_other_are_one_line(tmp_path: Path) -> None:
    hook, path = "blocks.3.hook_resid_post", tmp_path / "cfg.json"
    assert (
        hook_name({"hook_point": "blocks.{layer}.hook_resid_post", "hook_point_layer": 3}, path)
        == hook
    )
    assert (
        hook_name({"metadata": {"hook_name": hook}, "hook_name": hook, "hook_layer": 3}, path)
        == hook
    )
    assert hook_name({}, path) == hook_name({"metadata": None}, path) == hook_name([], path) == ""
    for wrong in (
        {"hook_name": hook, "hook_layer": 4},
        {"hook_name": hook, "metadata": {"hook_name": "blocks.4.hook_resid_post"}},
        {"hook_layer": 3, "metadata": {"hook_layer": 2, "hook_name": hook}},
    ):
        with pytest.raises(UserError, match=r"cfg\.json: hook_(name|layer)"):
            hook_name(wrong, path)


def test_what_may_be_the_wrong_sae_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    config = spelled(6, "standard", 4)
    for metadata, told in (
        ({}, "names no hook_name"),
        (
            {
                "hook_name": "blocks.0.hook_resid_post",
                "sae_lens_training_version": "3.18.2",
                "sae_lens_version": "6.1.0",
            },
            "less their mean",
        ),
        ({"hook_name": "blocks.0.hook_resid_post"}, "less their mean"),
        ({"hook_name": "blocks.0.hook_resid_post", "sae_lens_training_version": "3.19.2"}, None),
    ):
        said.clear()
        write(tmp_path, config | {"metadata": metadata}, tensors(7))
        sources.load_sae("upstream", tmp_path, "text8", 0, Site("resid", 1), D, said.append)
        assert (told is None and not said) or (len(said) == 1 and told in said[0])


# ------------------------------------------------------------------------------------------------
# what is written here


@pytest.mark.parametrize("site", ["resid.0", "resid.2", "mlp_in.1", "mlp_act.3", "mlp_out.4"])
def test_exports_name_their_site_in_terms_that_others_read(site: str, tmp_path: Path) -> None:
    said: list[str] = []
    about = {"hook_name": site, "context_size": 64}
    save_sae(TopK(d_in=D, d_sae=F, k=3), tmp_path, reference=X, metadata=about)
    metadata = json.loads((tmp_path / "cfg.json").read_text())["metadata"]
    assert (
        metadata["hook_name"] == hook_of_site(site)
        and metadata["site"] == site
        and metadata["sae_lens_version"] >= "6"
    )
    stream, layer = site.split(".")
    sources.load_sae("upstream", tmp_path, "text8", 0, Site(stream, int(layer)), D, said.append)
    assert not said


def test_sae_lens_keeps_the_metadata_of_an_export(tmp_path: Path) -> None:
    sae_lens = pytest.importorskip(
        "sae_lens",
        reason="sae-lens is not installed: pip install -e '.[peers]' in an environment of its own",
    )
    save_sae(
        TopK(d_in=D, d_sae=F, k=3),
        tmp_path,
        reference=X,
        metadata={"hook_name": "resid.2", "context_size": 64},
    )
    theirs = sae_lens.SAE.load_from_disk(str(tmp_path))
    assert theirs.cfg.metadata.hook_name == "blocks.1.hook_resid_post"
    assert theirs.cfg.metadata.context_size == 64 and theirs.cfg.metadata.prepend_bos is False

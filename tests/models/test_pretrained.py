"""A pretrained model from a folder: what is refused before it is loaded, and the study on it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from sae_experiments.config.compose import build, compose_checked
from sae_experiments.errors import UserError
from sae_experiments.files import read_json
from sae_experiments.models import hub, pretrained
from sae_experiments.models.begin import n_begin
from sae_experiments.models.pretrained import (
    Checked,
    PretrainedSpec,
    check_pretrained,
    load_pretrained,
    loading_need,
)
from sae_experiments.steering import steer
from support.common import CONF, ROOT
from support.pretrained import TEXT, VOCABULARY, folder_of
from support.stores import context


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("models") / "tiny")


def spec(path: Any, **changes: Any) -> PretrainedSpec:
    plain = {"n_positions": 16, "begin": "auto", "dtype": "auto", "eval_windows": 8}
    return PretrainedSpec(**{"path": str(path), **plain, **changes})


CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------ loading


def test_a_folder_is_checked_without_weights_and_loaded_with_them(folder, monkeypatch):
    loads: list[Any] = []
    real = transformers.AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM,
        "from_pretrained",
        lambda *a, **k: (loads.append(k), real(*a, **k))[1],
    )
    checked = check_pretrained(spec(folder))
    assert not loads and checked.sizes.n_layer == 2 and checked.sizes.inner == 24
    model = transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(folder))
    assert checked.n_parameters == sum(p.numel() for p in model.parameters())
    lm = load_pretrained(checked, CPU)
    assert loads[0]["trust_remote_code"] is False and loads[0]["use_safetensors"] is True
    assert lm.key["begin"] == checked.begin == VOCABULARY - 1 and checked.context == 17
    plain = real(folder)
    ids = torch.randint(300, (2, 16), generator=torch.Generator().manual_seed(0))
    whole = torch.cat([torch.full((2, 1), VOCABULARY - 1), ids], 1)
    wanted = plain(input_ids=whole, use_cache=False).logits[:, 1:]
    torch.testing.assert_close(lm.model(input_ids=ids, use_cache=False).logits, wanted)
    assert not any(p.requires_grad for p in lm.model.parameters()) and not lm.model.training


@pytest.mark.parametrize(("name", "size"), [("fp32", 4), ("bf16", 2), ("fp16", 2), ("auto", 4)])
def test_the_type_of_the_weights_is_the_one_asked_for_and_sites_are_float32(folder, name, size):
    from sae_experiments.models.hooks import Site, activations, patched

    checked = check_pretrained(spec(folder, dtype=name))
    need = loading_need(checked, CPU)
    assert sum(need.memory.values()) == size * checked.n_parameters
    model = load_pretrained(checked, CPU).model
    assert next(model.parameters()).element_size() == size
    ids = torch.randint(300, (2, 16), generator=torch.Generator().manual_seed(0))
    site = Site("mlp_out", 2)
    assert activations(model, ids, [site])[site].dtype == torch.float32
    logits = model(input_ids=ids, use_cache=False).logits
    with patched(model, site, lambda x: x.clone()):
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, logits)


@pytest.mark.parametrize(
    ("begin", "asked", "token"),
    [(True, "auto", VOCABULARY - 1), (True, "no", None), (False, "auto", None)],
)
def test_a_window_begins_as_asked(begin, asked, token, tmp_path):
    checked = check_pretrained(spec(folder_of(tmp_path / "m", begin=begin), begin=asked))
    assert checked.begin == token
    model = load_pretrained(checked, CPU).model
    assert model(input_ids=torch.tensor([[1, 2]])).logits.shape[1] == 2
    assert n_begin(model) == (token is not None)


def test_special_tokens_that_a_text_spells_out_are_text(folder):
    encode = check_pretrained(spec(folder)).tokenizer.encode
    (ids,) = encode(["a <s> b"])
    assert VOCABULARY - 1 not in ids and len(ids) > 4


# ------------------------------------------------------------------------------------ refusals


def broken(folder: Path, how: str) -> Path:
    """What is wrong with a folder, done to a good one."""
    weights, config = folder / "model.safetensors", folder / "config.json"
    if how == "no config":
        config.unlink()
    elif how == "cut weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "no safetensors":
        torch.save(load_file(weights), folder / "pytorch_model.bin")
        weights.unlink()
    elif how == "missing weight":
        tensors = load_file(weights)
        tensors.pop("model.layers.1.mlp.up_proj.weight")
        save_file(tensors, weights, metadata={"format": "pt"})
    elif how == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    elif how == "bad tokenizer":
        (folder / "tokenizer.json").write_text("{}")
    elif how == "small vocabulary":
        other = json.loads(config.read_text()) | {"vocab_size": 200}
        config.write_text(json.dumps(other))
    elif how == "encoder":
        bert = transformers.BertConfig(architectures=["BertForMaskedLM"])
        config.write_text(bert.to_json_string())
    elif how == "only gguf":
        config.unlink()
        weights.rename(folder / "model.gguf")
    elif how == "remote code":
        other = json.loads(config.read_text())
        other |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
        config.write_text(json.dumps(other))
        (folder / "own.py").write_text("raise SystemExit('code of a model was run')")
    return folder


BROKEN = {
    "no config": "it has no config.json",
    "cut weights": "model.safetensors is not a whole safetensors file",
    "no safetensors": r"no weights \(\*.safetensors\): convert its \*.bin",
    "no tokenizer": "holds no tokenizer",
    "bad tokenizer": "tokenizer that cannot be read",
    "small vocabulary": "its tokenizer has 320 tokens, but the model has 200 ids",
    "encoder": "BertForMaskedLM .bert. is not a causal language model",
    "only gguf": "model.gguf is GGUF: load it",
    "remote code": "not that of a language model",
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_folder_that_is_no_whole_model_is_one_line_before_it_is_loaded(how, tmp_path):
    with pytest.raises(UserError, match=BROKEN[how]) as told:
        check_pretrained(spec(broken(folder_of(tmp_path / "m"), how)))
    assert "\n" not in str(told.value) and str(told.value).startswith("lm.path=")
    assert told.value.exit_status == 2


def test_weights_of_another_model_are_one_line(tmp_path):
    checked = check_pretrained(spec(broken(folder_of(tmp_path / "m"), "missing weight")))
    with pytest.raises(UserError, match=r"lm.path=.*1 missing \(model.layers.1.mlp.up_proj"):
        load_pretrained(checked, CPU)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"path": None}, "names no model"),
        ({"path": "model.gguf"}, "is a GGUF file: convert it once"),
        ({"path": "nowhere"}, "is not a directory"),
        ({"path": "/nowhere/at/all"}, "is not a directory"),
        ({"n_positions": 1}, "at least 2"),
        ({"n_positions": 64}, "must be at most 63"),
        ({"dtype": "int8"}, "not one of auto, fp32"),
        ({"begin": "maybe"}, "not one of auto, yes, no"),
        ({"eval_windows": 0}, "at least 1"),
    ],
)
def test_a_wrong_option_is_one_line(folder, changes, told):
    plain = {"n_positions": 16, "begin": "auto", "dtype": "auto", "eval_windows": 8}
    plain |= {"path": str(folder)}
    with pytest.raises(UserError, match=told) as caught:
        check_pretrained(PretrainedSpec(**{**plain, **changes}))
    assert "\n" not in str(caught.value) and "lm." in str(caught.value)


def test_begin_yes_needs_a_begin_token(tmp_path):
    with pytest.raises(UserError, match="has no begin-of-text token"):
        check_pretrained(spec(folder_of(tmp_path / "m", begin=False), begin="yes"))


# ------------------------------------------------------------------------------------ the hub


def test_the_network_is_used_for_an_id_that_was_named_and_for_no_folder(
    folder, tmp_path, monkeypatch
):
    asked: list[Any] = []

    def snapshot(name, **options):
        asked.append((name, options, hub.constants.HF_HUB_OFFLINE))
        return str(folder)

    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAE_HUB_OFFLINE", "0")
    assert check_pretrained(spec(folder)).folder == folder and not asked
    assert check_pretrained(spec("org/tiny")).folder == folder
    ((name, options, offline),) = asked
    assert name == "org/tiny" and not offline and not options["local_files_only"]
    assert not any("bin" in p or p.endswith(".py") for p in options["allow_patterns"])
    assert hub.constants.HF_HUB_OFFLINE is True, "what follows is off the network again"
    for setting, argument in (("1", False), ("0", True)):
        monkeypatch.setenv("SAE_HUB_OFFLINE", setting)
        check_pretrained(spec("org/tiny"), offline=argument)
        assert asked[-1][2] and asked[-1][1]["local_files_only"]


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path, monkeypatch):
    def fail(name, **options):
        raise OSError("no route\nto host")

    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", fail)
    monkeypatch.chdir(tmp_path)
    for offline, told in ((False, "no route"), (True, "was not fetched before")):
        with pytest.raises(UserError, match=told) as caught:
            check_pretrained(spec("org/tiny"), offline=offline)
        assert "\n" not in str(caught.value) and "lm.path=org/tiny" in str(caught.value)


# ------------------------------------------------------------------------------------ the study

SMALL = [
    "preset=smoke",
    "lm=pretrained",
    "lm.n_positions=16",
    "data=text",
    "site=resid.1",
    "sae=batch_topk",
    "sae.target_l0=4",
    "fit.train_rows=3000",
    "fit.held_out_rows=2048",
    "fit.calibration_rows=512",
    "fit.init_rows=512",
    "fit.train.steps=12",
    "fit.train.batch_size=128",
    "metric.downstream.windows=16",
]


def run_of(here: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "experiment.py"), "--out_dir=r", *SMALL, *overrides]
    command += ["metric=[reconstruction,sparsity,downstream,probing,features,rules,ngrams]"]
    command += [f"cache={here / 'cache'}", "threads=1", "report=false", "verbosity=quiet"]
    return subprocess.run(
        command,
        cwd=here,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the study on the tiny model."""
    here = tmp_path_factory.mktemp("run")
    (here / "text.txt").write_text(TEXT)
    done = run_of(here, f"lm.path={folder}", f"data.text.file={here / 'text.txt'}")
    assert done.returncode == 0, done.stderr
    return here / "runs" / "r"


def test_a_run_on_a_pretrained_model_has_numbers_per_token_and_per_byte(run):
    info = read_json(run / "final_info.json")["text"]["final_info_dict"]
    manifest = read_json(run / "manifest.json")
    about, units = manifest["corpora"]["text"], manifest["metrics"]
    bytes_per_token = about["utf8_bytes"]["val"] / about["counts"]["val"]
    assert about["utf8_bytes"]["val"] == pytest.approx(0.05 * len(TEXT), rel=0.01)
    loss = info["best_val_loss"][0]
    assert info["val_bits_per_byte"][0] == pytest.approx(loss / np.log(2) / bytes_per_token)
    assert info["ce_delta_bits"][0] is not None and info["sae_fvu"][0] is not None
    assert units["best_val_loss"]["unit"] == "nat/token"
    assert units["ce_delta_bits"]["unit"] == "bit/token"
    assert not any("char" in u["unit"] for u in units.values())
    begin = about["begin_token"]
    assert begin["text"] == "<s>"
    assert begin["left_out_of_rows_and_metrics"]["val"] == (about["counts"]["val"] - 1) // 16
    record = json.loads((run / "cells" / "text_0.json").read_text())
    assert "loaded" in record["why_null"]["total_train_time"]
    assert not any("character" in why for why in record["why_null"].values())


def test_what_the_browser_shows_of_tokens_spells_the_text(run):
    features = read_json(run / "features" / "text_0.json")
    shown = [c for f in features for c in f.get("top", [])]
    assert shown
    for place in shown:
        text = place["before"] + place["at"] + place["after"]
        assert text in TEXT and len(place["acts"]) == len(text)
        assert "".join(place["tokens"]).replace("␣", " ") == text
    rules = [f["rule"] for f in features if f.get("rule")]
    assert rules and any("␣" in rule for rule in rules)
    assert any(f.get("promotes") for f in features)


def test_a_run_on_a_pretrained_model_can_be_steered_as_it_steers_itself(run, folder, tmp_path):
    features = read_json(run / "features" / "text_0.json")
    one, *_ = [f for f in features if "steering" in f]
    shown = dict(one["steering"]["texts"])
    given = {"latent": one["latent"], "prompt": one["steering"]["prompt"]}
    texts = steer(run, **given, length=60)
    assert {0.0, 4.0, -4.0} == texts.keys() and texts == shown
    assert len(set(texts.values())) > 1, "the latent changes the text"
    with pytest.raises(UserError, match="prompt is empty"):
        steer(run, **given | {"prompt": ""})
    shutil.copytree(run, tmp_path / "r")
    other = folder_of(tmp_path / "other" / "tiny", hidden_size=16, rms_norm_eps=1e-3)
    manifest = tmp_path / "r" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(str(folder), str(other)))
    with pytest.raises(UserError, match=r"lm.path=.*tiny holds other files"):
        steer(tmp_path / "r", **given)


def test_an_exported_sae_names_model_hook_and_context(run, folder):
    (cfg,) = (run / "saes").glob("*/cfg.json")
    metadata = read_json(cfg)["metadata"]
    assert metadata["model_name"] == "tiny" and metadata["prepend_bos"] is True
    assert metadata["context_size"] == 17 and metadata["hook_name"] == "blocks.0.hook_resid_post"


def test_rows_of_the_store_are_those_of_the_model_with_a_begin_token(run, folder):
    from sae_experiments.models.hooks import Site
    from sae_experiments.models.store import Store

    (store,) = (
        s
        for s in map(Store, (run.parents[1] / "cache" / "stores").glob("[0-9a-f]*[0-9a-f]"))
        if s.split == "val"
    )
    checked = check_pretrained(spec(folder))
    ids = np.concatenate(checked.tokenizer.encode([TEXT]))
    n_val = read_json(run / "manifest.json")["corpora"]["text"]["counts"]
    val = ids[n_val["train"] :][: n_val["val"]]
    start = int(store.starts[1])
    whole = torch.tensor([[VOCABULARY - 1, *val[start : start + 16]]])
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
    states = plain(input_ids=whole, output_hidden_states=True).hidden_states[1]
    rows = store.rows(Site("resid", 1), slice(16, 32))
    torch.testing.assert_close(rows, states[0, 1:], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["site=resid.3"], "site='resid.3' does not exist: use resid.0 to resid.2"),
        (["lm.n_layer=3"], "lm.n_layer is not an option"),
        (["study=circuits"], "study=circuits trains a character model"),
        (["lm.path=null"], "lm.path names no model"),
        (["lm=gpt2_char", "lm.n_positions=16"], "data=text is read as tokens"),
    ],
)
def test_a_run_that_cannot_work_is_one_line_before_anything_is_read(folder, overrides, told):
    fixed = [f"lm.path={folder}"] if "lm=gpt2_char" not in overrides else []
    with pytest.raises(UserError, match=told) as caught:
        checked_study(*fixed, "data.text.file=x.txt", *overrides)
    assert "\n" not in str(caught.value)


def checked_study(*overrides: str) -> Any:
    study = build(compose_checked(CONF, [*SMALL, *overrides])[0].study)
    study.check()
    return study


@pytest.mark.parametrize("begin", ["auto", "no"])
def test_a_text_shorter_than_a_window_is_one_line_before_the_model_is_loaded(
    begin, folder, tmp_path
):
    (tmp_path / "text.txt").write_text(TEXT)
    study = checked_study(
        f"lm.path={folder}",
        f"data.text.file={tmp_path / 'text.txt'}",
        "lm.n_positions=63",
        "data.text.val_frac=0.001",
        f"lm.begin={begin}",
    )
    with pytest.raises(UserError, match="is longer than a window of 63"):
        study.prepare(context(tmp_path))
    assert study.models._loaded is None


@pytest.mark.parametrize(
    ("asked", "sites"),
    [
        (["site=resid.all"], ["resid.1", "resid.2"]),
        (["site=[resid.0,mlp_act.1]"], ["resid.0", "mlp_act.1"]),
        (["sae.read=[resid.1,attn_out.all]"], ["resid.1", "attn_out.1", "attn_out.2"]),
    ],
)
def test_several_sites_are_an_sae_each_in_one_run(folder, asked, sites):
    study = checked_study(f"lm.path={folder}", "data.text.file=x.txt", *asked)
    labels = [f"batch_topk-{site.replace('.', '_')}" for site in sites]
    assert list(study.saes) == labels
    assert [str(study.sites(s)[0]) for s in study.saes.values()] == sites
    (cell,) = study.cells()
    assert cell.reports == tuple(f"text.{label}" for label in labels)
    assert [study.width(study.sites(s)[0]) for s in study.saes.values()] == [
        24 if "act" in site else 16 for site in sites
    ]


def test_a_crosscoder_reads_its_sites_together_and_a_write_site_is_for_one_alone(folder):
    fixed = [f"lm.path={folder}", "data.text.file=x.txt"]
    both = checked_study(*fixed, "sae=crosscoder", "sae.read=[resid.1,resid.2]", "site=resid.all")
    assert list(both.saes) == ["crosscoder"]
    with pytest.raises(UserError, match="sae.write=mlp_out.1 is for one site, but 2"):
        checked_study(*fixed, "site=resid.all", "sae.write=mlp_out.1")
    with pytest.raises(UserError, match="list the sites"):
        checked_study("lm.path=org/name", "data.text.file=x.txt", "site=resid.all")
    with pytest.raises(UserError, match="names no site"):
        checked_study(*fixed, "site=[]")


def test_a_model_larger_than_the_memory_is_refused_before_it_is_loaded(
    folder, tmp_path, monkeypatch
):
    from sae_experiments import resources
    from sae_experiments.studies.language import lms

    monkeypatch.setattr(resources, "free_memory", lambda device: 1e4)
    monkeypatch.setattr(lms, "load_pretrained", lambda *a: pytest.fail("it was loaded"))
    overrides = [*SMALL, f"lm.path={folder}", "data.text.file=x.txt"]
    study = build(compose_checked(CONF, overrides)[0].study)
    ctx = context(tmp_path)
    with pytest.raises(UserError, match=r"lm.path=.*needs about .*weights"):
        study.announce(ctx)


def test_a_study_is_sent_to_other_processes_without_what_was_read(folder):
    import pickle

    overrides = [*SMALL, f"lm.path={folder}", "data.text.file=x.txt"]
    study = build(compose_checked(CONF, overrides)[0].study)
    study.check()
    assert isinstance(study.models.lm, Checked)
    again = pickle.loads(pickle.dumps(study))
    assert "models" not in vars(again) and again.sizes == study.sizes
    assert pretrained.KEY == "lm.path"

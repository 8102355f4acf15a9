"""The circuits study from start to end: on a model trained here, on SAEs of another run, on
local Hugging Face directories; and its mistakes.
"""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from omegaconf import OmegaConf

from sae_experiments import quality_warnings
from sae_experiments.cli.main import execute
from sae_experiments.config.compose import build, compose_checked
from sae_experiments.errors import UserError
from sae_experiments.models.local import cut, load_local, sizes_of
from sae_experiments.results.records import means_of
from sae_experiments.saes.batch_topk import BatchTopK
from sae_experiments.saes.saelens import save_sae
from sae_experiments.studies.circuits.sources import load_sae, site_of
from support.common import CONF, TINY, english
from support.drawing import drawn

SMALL = [
    *(
        o
        for o in TINY.split()
        if not o.startswith(("metric.", "fit.train.steps", "fit.train.batch"))
    ),
    "study=circuits",
    "metric=[reconstruction,rules]",
    "metric.rules.latents=4",
    "metric.rules.min_fires=2",
    "fit.train.steps=20",
    "fit.train.batch_size=256",
    "data=[text8]",
    "study.prompts=12",
    "study.rows=512",
    "study.checks.targets=40",
    "study.checks.checked=12",
    "study.checks.bootstrap=10",
    "study.graph.min_fires=2",
    "study.graph.count=2",
    "seeds=[0]",
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("circuits")


def run(home: Path, text: Path | None, out: str, *more: str) -> Path:
    """A run in this process; ``text`` stands for text8."""
    file = [f"data.text8.file={text}", "data.text8.head=null"] if text else []
    where = [
        f"runs_root={home}/runs",
        f"cache={home}/cache",
        f"out_dir={out}",
        "verbosity=quiet",
        "device=cpu",
    ]
    cfg, label = compose_checked(CONF, [*SMALL, *file, *where, *more])
    about = {
        "argv": [],
        "overrides": [],
        "preset": "smoke",
        "preset_reason": "asked for",
        "plan_note": "",
    }
    return execute(cfg, about=about, label=label)


def load(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def first(home: Path, corpus_file: Path) -> Path:
    """A finished run on the made text."""
    return run(home, corpus_file, "run_0")


def test_a_run_measures_draws_and_describes(first: Path, tmp_path: Path) -> None:
    final = load(first / "final_info.json")
    assert set(final) == {"text8", "text8.upstream", "text8.downstream"}
    means = means_of(final["text8"])
    assert means["n_pairs_mean"] > 20 and means["earlier_n_pairs_mean"] > 20
    assert (
        means["attribution_ablation_pearson_mean"]
        > 0.9
        > means["coactivation_ablation_pearson_mean"]
    )
    assert means["integrated_gap_mean"] < 1e-3 and means["nudge_0_01_pearson_mean"] > 0.99
    parts = [means[f"completeness_{k}_mean"] for k in ("latents", "error", "bias", "rest")]
    assert sum(parts) == pytest.approx(1)
    assert means["deletion_area_attribution_mean"] >= max(
        means[f"deletion_area_{m}_mean"] for m in ("cosine", "coactivation", "random")
    )
    manifest = load(first / "manifest.json")
    assert set(load(first / "cells" / "text8_0.json")["metrics"]) - {"final_train_loss"} <= set(
        manifest["metrics"]
    )
    assert (
        "sae_fvu_mean" in final["text8.upstream"]["means"]
        and (first / "saes" / "text8.downstream_0").is_dir()
    )
    done, empty = drawn(first, "circuits", tmp_path)
    assert len(done) == 6 and not empty


def test_graphs_hold_what_the_report_shows(first: Path) -> None:
    graphs = load(first / "graphs" / "text8_0.json")
    assert len(graphs) == 2
    for graph in graphs:
        names = {n["id"] for n in graph["nodes"]}
        assert (
            len(names) == len(graph["nodes"])
            and {e["from"] for e in graph["edges"]} | {e["to"] for e in graph["edges"]} <= names
        )
        target = [n for n in graph["nodes"] if n["column"] == 1]
        assert (
            len(target) == 1
            and target[0]["row"] == 0
            and target[0]["contexts"]
            and target[0]["rule"]
        )
        for node in graph["nodes"]:
            assert (
                set(node) >= {"id", "label", "column", "row", "value", "rule", "contexts"}
                and node["row"] <= 0
            )
            for context in node["contexts"]:
                assert len(context["acts"]) == sum(
                    len(context[k]) for k in ("before", "at", "after")
                )
        shown = [e["weight"] for e in graph["edges"] if e["from"].startswith("up.")]
        assert shown and all(abs(a) >= abs(b) - 1e-6 for a, b in itertools.pairwise(shown))
    described = {
        f["latent"] for f in load(first / "features" / "text8.upstream_0.json") if "rule" in f
    }
    wanted = {
        int(n["id"].split(".")[1].split("@")[0])
        for g in graphs
        for n in g["nodes"]
        if n["id"].startswith("up.")
    }
    assert len(described) >= 4 and wanted


def test_a_second_run_finds_its_parts_in_the_cache_and_the_saes_of_the_first(
    first: Path, home: Path, corpus_file: Path
) -> None:
    before = {p: p.stat().st_mtime_ns for p in (home / "cache").rglob("done.json")}
    again = run(
        home,
        corpus_file,
        "run_1",
        f"study.upstream.sae={first}",
        f"study.downstream.sae={first / 'saes' / 'text8.downstream_0'}",
    )
    assert {p: p.stat().st_mtime_ns for p in (home / "cache").rglob("done.json")} == before
    a, b = (load(p / "cells" / "text8_0.json")["metrics"] for p in (first, again))
    timed = {"attribution_targets_per_second"}
    assert {k: v for k, v in a.items() if k not in timed} == pytest.approx(
        {k: v for k, v in b.items() if k not in timed}, rel=1e-3, abs=1e-4
    )
    assert (
        load(again / "cells" / "text8.upstream_0.json")["why_null"]["sae_train_time"]
        == "the SAE was loaded"
    )


def test_a_finished_run_is_not_done_again(first: Path, home: Path, corpus_file: Path) -> None:
    path = first / "cells" / "text8_0.json"
    before = path.stat().st_mtime_ns
    assert run(home, corpus_file, "run_0") == first and path.stat().st_mtime_ns == before


def test_options_change_what_is_measured(first: Path, home: Path, corpus_file: Path) -> None:
    plain = load(first / "cells" / "text8_0.json")["metrics"]
    wanted = [
        "study.steps=3",
        "study.baseline=mean",
        "study.error=drop",
        "study.graph.latents=[3]",
        "study.upstream.site=mlp_out.1",
    ]
    other = run(home, corpus_file, "run_2", *wanted, "study.downstream.site=resid.2")
    found = load(other / "cells" / "text8_0.json")["metrics"]
    assert (
        found["n_pairs"]
        and found["attribution_ablation_pearson"] != plain["attribution_ablation_pearson"]
    )
    graphs = load(other / "graphs" / "text8_0.json")
    assert all(n["id"] == "down.3" for g in graphs for n in g["nodes"] if n["column"] == 1)


@pytest.mark.parametrize("choice", ["study.steps=3", "study.baseline=mean", "study.error=drop"])
def test_every_choice_of_how_to_attribute_changes_a_number(
    choice: str, first: Path, home: Path, corpus_file: Path
) -> None:
    plain = load(first / "cells" / "text8_0.json")["metrics"]
    found = load(
        run(home, corpus_file, choice.replace("=", "_"), choice) / "cells" / "text8_0.json"
    )["metrics"]
    measured = ("attribution_ablation_pearson", "attribution_slope", "deletion_area_attribution")
    assert any(abs(found[name] - plain[name]) > 1e-4 for name in measured)


def test_an_upstream_latent_that_does_not_exist_is_one_line(
    first: Path, home: Path, corpus_file: Path
) -> None:
    with pytest.raises(
        UserError, match=r"upstream_latent=100000: the upstream SAE has latents 0 to"
    ):
        run(home, corpus_file, "run_5", "study.graph.upstream_latent=100000")


# ------------------------------------------------------------------------------------------------
# local directories


def words_tokenizer(folder: Path, text: str) -> int:
    """A tokenizer of whole words with the spaces before them, in a model's folder; how many it
    knows.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = dict.fromkeys(pre for pre in re.findall(r" ?[^ ]+", text))
    vocabulary = {p: i for i, p in enumerate(["<unk>", *pieces])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[^ ]+"), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>").save_pretrained(folder)
    return len(vocabulary)


def byte_pairs(folder: Path, text: str) -> int:
    """A byte-level byte-pair tokenizer in a model's folder; how many tokens it knows."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=alphabet,
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    made.train_from_iterator([text], trainer)
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<|endoftext|>").save_pretrained(
        folder
    )
    return made.get_vocab_size()


def directory(
    folder: Path, kind: str, text: str, tokenizer: Callable[[Path, str], int] = words_tokenizer
) -> Path:
    """A tiny random model of a kind with its tokenizer, as ``save_pretrained`` leaves it."""
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        GPTNeoConfig,
        GPTNeoForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
    )

    folder.mkdir()
    n = tokenizer(folder, text)
    torch.manual_seed(0)
    names = {"vocab_size": n, "bos_token_id": None, "eos_token_id": None, "initializer_range": 0.3}
    if kind == "gpt_neo":
        config = GPTNeoConfig(
            hidden_size=16,
            num_layers=2,
            num_heads=2,
            attention_types=[[["global", "local"], 1]],
            window_size=8,
            max_position_embeddings=32,
            intermediate_size=48,
            **names,
        )
        GPTNeoForCausalLM(config).save_pretrained(folder)
    elif kind == "llama":
        config = LlamaConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            intermediate_size=48,
            **names,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
    else:
        GPT2LMHeadModel(
            GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, **names)
        ).save_pretrained(folder)
    return folder


def test_words_that_a_tokenizer_does_not_know_are_counted(tmp_path: Path) -> None:
    n = words_tokenizer(tmp_path, "one two")
    for text, share in (("one two two two", 0.0), ("one three two three", 0.5)):
        found = cut(text, tmp_path, name="t", val_frac=0.5, vocabulary=n)
        assert found.provenance["dropped_frac"] == share


#: The study's own metrics, as a user who names none gets them.
DEFAULTS = next(
    d["override /metric"]
    for d in yaml.safe_load((CONF / "study" / "circuits.yaml").read_text())["defaults"]
    if "override /metric" in d
)


@pytest.mark.parametrize(
    ("kind", "tokenizer"),
    [
        ("gpt_neo", words_tokenizer),
        ("gpt2", words_tokenizer),
        ("gpt_neo", byte_pairs),
        ("llama", byte_pairs),
    ],
)
def test_a_local_directory_with_its_own_tokenizer_and_the_default_metrics(
    kind: str, tokenizer: Callable[[Path, str], int], tmp_path: Path
) -> None:
    text = tmp_path / "some words.txt"
    text.write_text(english(24_000, seed=1))
    folder = directory(tmp_path / "model", kind, text.read_text(), tokenizer)
    local = [
        f"study.local.folder={folder}",
        f"study.local.text='{text}'",
        "study.local.context=16",
        "study.graph.order=1",
    ]
    if kind == "llama":  # few of its latents are active at one position
        local.append("study.checks.checked=40")
    local.append(f"metric=[{','.join(DEFAULTS)}]")
    found = run(tmp_path, None, "run_0", *local)
    metrics = load(found / "cells" / "some_words_0.json")["metrics"]
    assert metrics["attribution_ablation_pearson"] > 0.8 and metrics["n_pairs"] > 20
    manifest = load(found / "manifest.json")
    assert manifest["corpora"]["some_words.upstream"]["symbols"] > 20
    features = load(found / "features" / "some_words.downstream_0.json")
    alive = [f for f in features if f["density"]]
    assert alive and all(piece for f in alive for piece, _ in f["promotes"] + f["suppresses"])
    assert any(len(piece) > 1 for f in alive for piece, _ in f["promotes"]), (
        "a token is more than a character"
    )
    described = [f for f in features if f.get("rule") or f.get("weak_rule")]
    assert described and all(
        len(c["acts"]) == len(c["before"] + c["at"] + c["after"])
        for f in described
        for c in f["top"]
    )
    graph = load(found / "graphs" / "some_words_0.json")[0]
    assert any(len(c["at"]) > 1 for n in graph["nodes"] for c in n["contexts"]), (
        "a token is more than a character"
    )


def test_a_model_trained_here_is_a_local_directory_too(
    first: Path, home: Path, corpus_file: Path
) -> None:
    folder = next(p.parent for p in (home / "cache" / "lms").glob("*/symbols.json"))
    found = cut(
        corpus_file.read_text(),
        folder,
        name="made",
        val_frac=0.1,
        vocabulary=sizes_of(folder).vocabulary,
    )
    assert (
        found.symbols
        and "".join(found.pieces[i] for i in found.windows("train", np.array([7]), 9)[0])
        == corpus_file.read_text()[7:16]
    )
    assert load_local(folder, context=8, device=torch.device("cpu")).model.config.n_positions == 8


def test_what_is_no_model_directory_is_said_in_one_line(tmp_path: Path) -> None:
    for name, content in (
        ("empty", None),
        ("odd", "{}"),
        ("unknown", '{"model_type": "nothing"}'),
        ("heads", '{"model_type": "gpt_neox", "hidden_size": 16}'),
    ):
        folder = tmp_path / name
        folder.mkdir()
        if content:
            (folder / "config.json").write_text(content)
        with pytest.raises(UserError, match=r"local\.folder=.*(no config|not that of)") as told:
            sizes_of(folder)
        assert "\n" not in str(told.value)
    with pytest.raises(UserError, match="no config"):
        sizes_of(tmp_path / "nowhere")
    folder = directory(tmp_path / "model", "gpt2", "a b c d")
    with pytest.raises(UserError, match="between 2 and the 32"):
        load_local(folder, context=33, device=torch.device("cpu"))
    for p in folder.glob("tokenizer*"):
        p.unlink()
    with pytest.raises(UserError, match="no tokenizer"):
        cut("a b", folder, name="x", val_frac=0.1, vocabulary=5)
    next(folder.glob("*.safetensors")).write_bytes(b"not weights")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_local(folder, context=8, device=torch.device("cpu"))
    next(folder.glob("*.safetensors")).unlink()
    with pytest.raises(UserError, match="no weights"):
        load_local(folder, context=8, device=torch.device("cpu"))


# ------------------------------------------------------------------------------------------------
# mistakes


def test_a_gap_of_integrated_gradients_reaches_the_record(
    home: Path, corpus_file: Path, first: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality_warnings, "GAP", -1.0)  # every gap is too large
    again = run(home, corpus_file, "run_gap")
    warned = load(again / "cells" / "text8_0.json")["warnings"]
    assert "integrated_gap" in [one["key"] for one in warned]


@pytest.fixture(scope="module")
def composed() -> Any:
    return compose_checked(CONF, SMALL)[0]


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("study.upstream.site=mlp_act.7", "does not exist: use resid.0 to resid.2"),
        ("study.upstream.site=mlp_act.2", "last of 2 blocks"),
        ("study.downstream.site=resid.0", "does not come before"),
        ("study.downstream.site=mlp_act.9", "does not exist"),
        ("study.upstream.sae=/no/such/place", "does not exist"),
        ("study.local.text=/a/text", "needs study.local.folder"),
        ("study.local.folder=/no/model", "no config.json"),
        ("study.error=neither", "is not one of keep, drop"),
        ("study.steps=-1", "at least 0"),
        ("study.checks.counts=[4,2]", "that grow"),
        ("study.checks.nudges=[0.0]", "positive"),
        ("study.graph.edges=0", "at least 1"),
        ("saes=two", "one kind of SAE"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_computed(
    composed: Any, override: str, told: str
) -> None:
    key, value = override.split("=", 1)
    cfg = copy.deepcopy(composed)
    if key == "saes":
        cfg.saes = {"topk": cfg.saes.batch_topk, "batch_topk": cfg.saes.batch_topk}
    else:
        OmegaConf.update(cfg, key, yaml.safe_load(value))
    with pytest.raises(UserError, match=told):
        check(cfg)


def check(cfg: Any) -> None:
    build(cfg.study).check()


def test_saes_of_another_site_or_width_are_refused(first: Path, tmp_path: Path) -> None:
    from sae_experiments.models.hooks import Site

    saved = first / "saes" / "text8.upstream_0"
    assert site_of(saved) == "mlp_act.1"
    with pytest.raises(UserError, match=r"was fitted at mlp_act\.1, not at resid\.1"):
        load_sae("upstream", saved, "text8", 0, Site("resid", 1), 16)
    with pytest.raises(UserError, match="has d_in=64, but mlp_act.1 is 128 wide"):
        load_sae("upstream", saved, "text8", 0, Site("mlp_act", 1), 128)
    with pytest.raises(UserError, match="no SAE of text8, seed 3"):
        load_sae("upstream", first, "text8", 3, Site("mlp_act", 1), 64)
    with pytest.raises(UserError, match="neither an SAE directory"):
        load_sae("upstream", tmp_path, "text8", 0, Site("mlp_act", 1), 64)
    made = BatchTopK(d_in=16, d_sae=32, k=4)
    save_sae(
        made,
        tmp_path / "foreign",
        reference=torch.randn(8, 16),
        metadata={"hook_name": "blocks.0.hook_resid_post"},
    )
    assert site_of(tmp_path / "foreign") == "resid.1", "SAELens counts blocks from 0"
    assert load_sae("upstream", tmp_path / "foreign", "text8", 0, Site("resid", 1), 16).d_sae == 32

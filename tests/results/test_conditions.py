"""Which metrics of two runs may be subtracted: laws over all metrics, and the same SAE looked
at in other ways.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from pathlib import Path
from typing import Any

import pytest

import sae_experiments
from sae_experiments.cli.main import execute
from sae_experiments.conditions import CONDITIONS, ON_ACTIVATIONS, differences
from sae_experiments.config.compose import compose_checked
from sae_experiments.files import read_json, sha256_file, write_json
from sae_experiments.metric_info import MetricInfo
from sae_experiments.results.compare import compare
from sae_experiments.results.records import Record, write_record
from sae_experiments.results.table import load_table
from sae_experiments.studies.circuits.info import infos as circuits
from sae_experiments.studies.superposition.study import smallest_info
from support.common import CONF, TINY
from support.fake_runs import make_run

#: A value of every condition, and one that differs from it.
FACTS: dict[str, Any] = dict.fromkeys(CONDITIONS, "one") | {"context": 64, "held-out rows": 4096}
OTHERS: dict[str, Any] = dict.fromkeys(CONDITIONS, "two") | {"context": 32, "held-out rows": 512}
#: Numbers about the language model, or about the toy models, not about an SAE.
MODELS = ("final_train_loss", "best_val_loss", "ce_clean", "test_loss", "excess_loss")
TOYS = ("loss_min", "loss_mean", "smallest_hidden", "solved_depths")


@functools.cache
def infos() -> dict[str, MetricInfo]:
    """Every metric that a module of the package declares, and those that depend on options."""
    found = [*circuits(nudges=[0.01]), smallest_info(2, 1e-5)]
    for module in pkgutil.walk_packages(sae_experiments.__path__, "sae_experiments."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, list):
                found += [one for one in value if isinstance(one, MetricInfo)]
    return {info.name: info for info in found}


def test_there_are_metrics_of_every_study() -> None:
    names = ("sae_fvu", "n_pairs", "truth_mcc", "loss_min", "mirror_accuracy", "rob_fss")
    assert set(names) <= set(infos()) and len(infos()) > 200


@pytest.mark.parametrize("condition", CONDITIONS)
def test_every_metric_is_refused_where_a_condition_of_its_own_differs_and_only_there(
    condition: str,
) -> None:
    other = FACTS | {condition: OTHERS[condition]}
    for name, info in infos().items():
        assert differences(name, info.depends, {0: FACTS}, {0: FACTS}) == []
        said = differences(name, info.depends, {0: other}, {0: FACTS})
        assert bool(said) == (condition in info.depends), name
        assert all(condition in words or "texts" in words for words in said) and len(said) < 2
        missing = {k: v for k, v in FACTS.items() if k != condition}
        said = differences(name, info.depends, {0: missing}, {0: FACTS})
        assert bool(said) == (condition in info.depends), f"{name}: unknown is not the same"


def test_times_depend_on_the_device_and_nothing_else_does() -> None:
    for name, info in infos().items():
        timed = info.unit in ("s", "1/s", "ms", "MiB") or name.startswith("overhead_")
        assert ("device" in info.depends) == timed, name


def test_metrics_of_saes_depend_on_all_that_lies_under_them() -> None:
    for name, info in infos().items():
        about_model = name.startswith((*MODELS, *TOYS)) or name in (
            "mirror_accuracy",
            "feature_norm",
            "interference",
            "dimensionality",
        )
        if about_model:
            assert "language model" not in info.depends and "settings" in info.depends, name
        elif info.unit not in ("s", "1/s"):
            assert set(ON_ACTIVATIONS) <= set(info.depends), name


def test_a_metric_that_declares_nothing_known_is_refused() -> None:
    plain = {"name": "m", "title": "m", "formula": "f", "unit": "", "better": "up"}
    for wrong in ((), ("the weather",)):
        with pytest.raises(ValueError, match="depends"):
            MetricInfo(**plain, depends=wrong)  # type: ignore[arg-type]


def test_the_same_parameters_are_the_same_language_model_whatever_the_code_says() -> None:
    mine = FACTS | {"language model": {"code": "a"}, "weights": "w"}
    theirs = FACTS | {"language model": {"code": "b"}}
    for weights, same in (("w", True), ("v", False), (None, False)):
        other = {0: theirs | {"weights": weights}}
        assert (differences("m", ON_ACTIVATIONS, {0: mine}, other) == []) == same


def test_what_differs_is_said_in_few_words() -> None:
    small = {"n_layer": 4, "n_embd": 128, "train.steps": 900, "code": "0123456789abcdef"}
    model = {"n_layer": 6, "n_embd": 384, "train.steps": 5000, "code": "0123456789abcdef"}
    mine = FACTS | {"language model": model, "held-out rows": 131072}
    said = differences("m", ON_ACTIVATIONS, {0: mine}, {0: FACTS | {"language model": small}})
    assert said == [
        "language model: n_layer 6 vs 4, n_embd 384 vs 128 and 1 more",
        "held-out rows 131,072 vs 4,096",
    ]


# --------------------------------------------------------------------------- runs from start to end


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("conditions")


METRIC_SET = "metric=[reconstruction,sparsity,downstream,ngrams]"


def run(home: Path, text: Path, out: str, *more: str) -> Path:
    """A finished run in this process."""
    file = [f"data.text8.file={text}", "data.text8.head=null", "data=[text8]", "seeds=[0]"]
    where = [f"runs_root={home}/runs", f"cache={home}/cache", f"out_dir={out}", "device=cpu"]
    small = [*TINY.split(), METRIC_SET, "metric.ngrams.rows=256"]
    options = [*small, *file, *where, "sae=topk", "verbosity=quiet", *more]
    cfg, label = compose_checked(CONF, options)
    about = {"argv": [], "overrides": [], "preset": "smoke"}
    about |= {"preset_reason": "asked for", "plan_note": ""}
    return execute(cfg, about=about, label=label)


@pytest.fixture(scope="module")
def first(home: Path, corpus_file: Path) -> Path:
    return run(home, corpus_file, "run_0")


#: Numbers of a language model on its own random batches.
LOSSES = ("final_train_loss", "best_val_loss")
#: Overrides, words that say what differs, and metrics that stay comparable (by the start of their
#: names).
CHANGES = {
    "rows": (["fit.held_out_rows=768"], "held-out rows 768 vs 512", ("ngram_", *LOSSES)),
    "part": (["held_out=search"], "held-out part search vs val", LOSSES),
    "site": (["site=resid.2"], "site resid.2 vs resid.1", MODELS),
    "context": (["lm.n_positions=8"], "context 8 vs 16", ()),
    "model": (["lm.n_embd=32"], "n_embd 32 vs 16", MODELS),
    "settings": (["metric.ngrams.longest=3"], "settings: longest 3 vs 6", None),
    "evaluated": (["lm.eval_batches=8"], "settings: eval_batches 8 vs 4", None),
}
TIMES = ("total_train_time", "avg_inference", "sae_train_time", "sae_tokens")


@pytest.mark.parametrize("what", CHANGES)
def test_runs_of_other_conditions_are_compared_metric_by_metric(
    home: Path, corpus_file: Path, first: Path, what: str
) -> None:
    """The same SAE is fitted again but for what changes; whatever its number becomes, no
    verdict comes of it.
    """
    overrides, words, kept = CHANGES[what]
    folder = run(home, corpus_file, f"run_{what}", *overrides)
    if what in ("rows", "settings"):
        both = [
            sha256_file(f / "saes" / "text8_0" / "sae_weights.safetensors") for f in (first, folder)
        ]
        assert both[0] == both[1], "the SAE is the same to the byte"
    rows = compare(load_table([first, folder]))
    mine = rows[(rows["run"] == folder.name)].set_index("metric")
    assert any(words in why for why in mine["not_comparable"])
    for metric, row in mine.iterrows():
        if row["not_comparable"]:
            assert row["verdict"] == "" and row["delta"] != row["delta"]
        elif what in ("rows", "settings") and not str(metric).startswith(TIMES):
            assert row["delta"] == 0 or row["delta"] != row["delta"], f"{metric} moved with {what}"
        if kept is not None and not str(metric).startswith(TIMES):
            assert (row["not_comparable"] == "") == str(metric).startswith(kept), metric
    if what == "settings":
        refused = {m for m, row in mine.iterrows() if row["not_comparable"]}
        assert refused and all(str(m).startswith("ngram_") for m in refused)
    if what == "evaluated":
        assert mine.loc["best_val_loss", "not_comparable"] == words
        assert mine.loc["sae_fvu", "not_comparable"] == "", "the weights are the same"


def test_a_variant_on_the_same_activations_is_compared_in_everything(
    home: Path, corpus_file: Path, first: Path
) -> None:
    folder = run(home, corpus_file, "run_variant", "sae=batch_topk", "sae.expansion=4")
    rows = compare(load_table([first, folder]))
    assert set(rows["not_comparable"]) == {""}


def test_runs_from_before_conditions_were_recorded_are_judged_by_their_configurations(
    tmp_path: Path,
) -> None:
    for name, width in (("run_0", 128), ("run_1", 256), ("run_2", 128)):
        folder = make_run(tmp_path, name, curves=False)
        manifest = read_json(folder / "manifest.json")
        manifest["config"] |= {"lm": {"n_embd": width, "n_positions": 64}, "site": "resid.mid"}
        write_json(folder / "manifest.json", manifest)
    rows = compare(load_table([tmp_path / f"run_{i}" for i in range(3)]))
    why = {run: set(rows[rows["run"] == run]["not_comparable"]) for run in ("run_1", "run_2")}
    assert why == {"run_1": {"language model: n_embd 256 vs 128"}, "run_2": {""}}


def test_a_run_with_conditions_and_one_without_are_judged_by_their_configurations(
    tmp_path: Path,
) -> None:
    for name in ("run_0", "run_1"):
        make_run(tmp_path, name, curves=False)
    for seed in range(3):
        record = Record(
            dataset="shakespeare_char", seed=seed, metrics={"sae_fvu": 0.5}, facts=FACTS
        )
        write_record(tmp_path / "run_1", record)
    rows = compare(load_table([tmp_path / "run_0", tmp_path / "run_1"]))
    assert set(rows["not_comparable"]) == {""}

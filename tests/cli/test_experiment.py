"""The command line from end to end, in processes of their own, offline: what callers read, and
what a kill may not change.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
from omegaconf import OmegaConf

from support.command_line import assert_same, in_this_process, lasting
from support.common import CONF, Experiment

PUBLISHED = (
    "final_train_loss",
    "best_val_loss",
    "total_train_time",
    "avg_inference_tokens_per_second",
)
LONGER = ("lm.train.steps=60", "fit.train.steps=60")


@pytest.fixture(scope="module")
def first(make_experiment: Callable[[str], Experiment]) -> tuple[Experiment, Any]:
    """One finished run, ``runs/first``, of sae=topk."""
    experiment = make_experiment("first")
    done = experiment("--out_dir=first", "sae=topk")
    assert done.returncode == 0, done.stderr
    return experiment, done


@pytest.fixture
def here(first: tuple[Experiment, Any]) -> Callable[..., int]:
    """Type a command in the folder of the first run, with its cache."""
    return lambda *args: in_this_process(first[0], *args)


# ------------------------------------------------------------------------------------------------
# one run


def test_final_info_is_exactly_what_callers_read(first):
    experiment, _ = first
    final = experiment.json("first", "final_info.json")
    assert list(final) == ["text8"], "nothing but datasets on top"
    entry = final["text8"]
    assert list(entry) == ["means", "more_means", "stderrs", "final_info_dict"]
    metrics = set(entry["final_info_dict"])
    means = entry["means"] | entry["more_means"]
    assert set(means) == {f"{m}_mean" for m in metrics} and set(entry["stderrs"]) == {
        f"{m}_stderr" for m in metrics
    }
    assert next(iter(entry["means"])) == "sae_fvu_mean" and len(entry["means"]) <= 10
    assert None not in entry["means"].values()
    numbers = [
        *means.values(),
        *entry["stderrs"].values(),
        *(v for vs in entry["final_info_dict"].values() for v in vs),
    ]
    assert all(v is None or isinstance(v, float) for v in numbers)
    assert all(isinstance(vs, list) and len(vs) == 1 for vs in entry["final_info_dict"].values()), (
        "one value a seed"
    )
    assert set(PUBLISHED) <= metrics and all(
        isinstance(entry["means"][f"{m}_mean"], float) for m in PUBLISHED
    )
    family = (
        "sae_l0 sae_sparsity sae_fvu sae_mse sae_cosine sae_l2_ratio sae_dead_frac sae_dense_frac"
        " sae_latent_entropy sae_train_time"
    )
    downstream = (
        "sae_tokens_per_second ce_clean ce_spliced ce_delta_bits loss_recovered"
        " loss_recovered_zero kl"
    )
    assert {*family.split(), *downstream.split()} <= metrics
    assert experiment.json("first", "final_info_text8_0.json") == {
        m: vs[0] for m, vs in entry["final_info_dict"].items()
    }


def test_the_run_folder_holds_what_the_design_lists_and_nothing_lies_about_elsewhere(first):
    experiment, _ = first
    run = experiment.runs / "first"
    files = (
        "manifest.json cells/text8_0.json final_info_text8_0.json curves/text8_0.jsonl"
        " arrays/text8_0.npz saes/text8_0/cfg.json"
    )
    for name in files.split():
        assert (run / name).is_file(), name
    assert {p.name for p in experiment.here.iterdir()} == {"runs", "cache"}
    assert not [
        p for p in experiment.here.rglob("*") if p.suffix in (".pt", ".pkl", ".pickle", ".tmp")
    ]


def test_the_manifest_records_the_command_and_where_the_text_came_from(first):
    experiment, _ = first
    manifest = experiment.json("first", "manifest.json")
    assert (
        manifest["status"] == "done"
        and manifest["preset"] == "smoke"
        and "--out_dir=first" in manifest["argv"]
    )
    assert (
        manifest["corpora"]["text8"]["source"] == experiment.corpus_file.name
        and manifest["corpora"]["text8"]["stand_in"] is False
    )
    assert manifest["config"]["sae"]["target_l0"] == 4 and manifest["label"] == "topk"


def test_the_asked_for_l0_is_met(first):
    assert first[0].json("first", "final_info_text8_0.json")["sae_l0"] == pytest.approx(4, abs=0.5)


def test_without_a_terminal_the_output_is_plain_lines_and_stderr_is_empty(first):
    _, done = first
    assert "\r" not in done.stdout and "\x1b" not in done.stdout
    assert done.stderr == ""
    assert (
        "final_info.json" in done.stdout.splitlines()[-1]
        and max(map(len, done.stdout.splitlines())) < 250
    )


def test_the_same_command_again_says_already_done_and_changes_nothing(first, here, capsys):
    experiment, _ = first

    def kept():
        return {
            p: p.read_bytes()
            for p in experiment.here.rglob("*")
            if p.is_file() and p.name != "manifest.json"
        }

    def manifest():
        return {
            k: v
            for k, v in experiment.json("first", "manifest.json").items()
            if k not in ("started", "ended", "pid")
        }

    before, told = kept(), manifest()
    assert here("--out_dir=first", "sae=topk") == 0
    said = capsys.readouterr()
    assert "already done" in said.out and said.err == ""
    assert kept() == before
    assert manifest() | {"argv": told["argv"]} == told


def test_another_sae_reuses_the_language_model_and_the_activations(first, here):
    experiment, _ = first
    before = {kind: experiment.made(kind) for kind in ("lms", "stores", "corpora", "fits")}
    assert here("--out_dir=second", "sae=standard") == 0
    after = {kind: experiment.made(kind) for kind in before}
    assert {k: after[k] for k in ("lms", "stores", "corpora")} == {
        k: before[k] for k in ("lms", "stores", "corpora")
    }
    assert (
        len(before["lms"]) == 1
        and len(before["stores"]) == 3
        and len(after["fits"]) > len(before["fits"])
    )
    info = [experiment.json(run, "final_info_text8_0.json") for run in ("first", "second")]
    assert all(info[0][m] == info[1][m] for m in PUBLISHED), (
        "also its times are those of the one training"
    )


def test_saes_fitted_side_by_side_are_reported_apart_and_equal_those_fitted_alone_bit_for_bit(
    first, here
):
    experiment, _ = first
    assert here("--out_dir=both", "sae=[topk,batch_topk]") == 0
    assert here("--out_dir=alone", "sae=batch_topk") == 0
    assert list(experiment.json("both", "final_info.json")) == ["text8.batch_topk", "text8.topk"]
    assert_same(
        lasting(experiment.runs / "both", "text8.topk_0"), lasting(experiment.runs / "first")
    )
    assert_same(
        lasting(experiment.runs / "both", "text8.batch_topk_0"), lasting(experiment.runs / "alone")
    )


def test_a_grid_reports_every_arm(first, here):
    experiment, _ = first
    assert here("--out_dir=grid", "sae=topk", "sae.target_l0=[2,8]", "fit.train.steps=3") == 0
    final = experiment.json("grid", "final_info.json")
    l0 = {name: entry["means"]["sae_l0_mean"] for name, entry in final.items()}
    assert [name for name, _ in sorted(l0.items(), key=lambda kv: kv[1])] == [
        "text8.topk-target_l0_2",
        "text8.topk-target_l0_8",
    ]
    assert sorted(l0.values()) == pytest.approx([2, 8], abs=1)


def test_seeds_are_the_seeds_asked_for_and_differ(first, here):
    experiment, _ = first
    assert here("--out_dir=seeds", "sae=topk", "seeds=[0,1]", "lm.samples=0") == 0
    final = experiment.json("seeds", "final_info.json")["text8"]
    values = final["final_info_dict"]["sae_fvu"]
    assert (
        len(values) == 2
        and values[0] != values[1]
        and final["stderrs"]["sae_fvu_stderr"] == pytest.approx(abs(values[0] - values[1]) / 2)
    )
    assert final["final_info_dict"]["avg_inference_tokens_per_second"] == [None, None]


def test_cut_by_its_time_limit_and_run_again_without_one_gives_the_same_result(first, experiment):
    assert in_this_process(experiment, "--out_dir=limited", "sae=topk", "time_limit_s=0.001") == 0
    assert experiment.json("limited", "manifest.json")["status"] == "cut"
    assert set(PUBLISHED) <= set(experiment.json("limited", "final_info_text8_0.json"))
    assert in_this_process(experiment, "--out_dir=limited", "sae=topk") == 0
    assert experiment.json("limited", "manifest.json")["status"] == "done"
    assert_same(lasting(experiment.runs / "limited"), lasting(first[0].runs / "first"))


def test_the_exported_sae_gives_back_its_reference_rows(first):
    from safetensors.torch import load_file

    folder = first[0].runs / "first" / "saes" / "text8_0"
    weights, rows = (
        load_file(folder / "sae_weights.safetensors"),
        load_file(folder / "reference.safetensors"),
    )
    config = json.loads((folder / "cfg.json").read_text())
    assert config["architecture"] == "topk" and config["k"] == 4
    recon = rows["acts"] @ weights["W_dec"] + weights["b_dec"]
    assert float((recon - rows["recon"]).abs().max()) < 1e-4
    assert weights["W_enc"].shape == (config["d_in"], config["d_sae"])
    pre = ((rows["x"] - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]).relu()
    kept = pre.topk(4, dim=1)
    acts = pre.new_zeros(pre.shape).scatter(1, kept.indices, kept.values)
    assert float((acts - rows["acts"]).abs().max()) < 1e-3 * float(rows["acts"].max())


# ------------------------------------------------------------------------------------------------
# what goes wrong


@pytest.mark.parametrize("typo", ["sae=nosuch", "sae.target_l0=nan", "bogus=1"])
def test_a_failing_option_is_status_2_one_line_and_no_folder(experiment, typo):
    done = experiment("--out_dir=x", typo)
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr.startswith("error: ")
        and done.stderr.count("\n") == 1
        and typo.split("=")[0] in done.stderr
    )
    assert not list(experiment.here.iterdir())


def test_results_of_another_configuration_are_refused_in_one_line(first, here, capsys):
    experiment, _ = first
    before = (experiment.runs / "first" / "final_info.json").read_bytes()
    assert here("--out_dir=first", "sae=topk", "sae.target_l0=5") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "sae.target_l0: 4 -> 5" in said and "overwrite=true" in said
    assert (experiment.runs / "first" / "final_info.json").read_bytes() == before


def test_a_loss_that_is_not_finite_is_the_last_thing_on_stderr(first):
    experiment, _ = first
    done = experiment("--out_dir=broken", "sae=topk", "fit.train.lr=1e30")
    assert done.returncode == 1
    tail = done.stderr[-1500:]
    assert (
        re.search(r"topk: .*not finite at step \d+", tail.splitlines()[-1])
        and "Traceback" not in done.stderr
    ), done.stderr
    assert "Warning" not in done.stderr
    assert (
        experiment.json("broken", "manifest.json")["status"] == "failed"
        and "not finite" in experiment.json("broken", "manifest.json")["cause"]
    )
    assert experiment.json("broken", "final_info.json") == {}


def test_a_sweep_goes_on_after_a_failing_job_names_the_cause_and_exits_with_1(first):
    experiment, _ = first
    done = experiment(
        "-m", "out_dir=sweep", "sae=topk", "fit.train.lr=1e-3,1e30,1e-2", "launcher=inline"
    )
    assert done.returncode == 1
    finals = sorted((experiment.runs / "sweep").glob("*/final_info.json"))
    results = [p for p in finals if json.loads(p.read_text())]
    assert len(results) == 2, "the other jobs are done"
    table = [line for line in done.stdout.splitlines() if re.match(r" +\d+  (done|failed)", line)]
    assert [line.split()[1] for line in table] == ["done", "failed", "done"]
    assert "1e+30" in table[1].replace("1e30", "1e+30") and "not finite" in table[1]
    assert (
        "1 of 3 jobs failed" in done.stderr.splitlines()[-1]
        and "not finite" in done.stderr.splitlines()[-1]
    )
    names = {p.parent.name for p in finals}
    assert len(names) == 3 and all(
        "lr-" in name and "offline" not in name and "topk" not in name for name in names
    ), "named by what varies"
    again = experiment(
        "-m", "out_dir=sweep", "sae=topk", "fit.train.lr=1e-3,1e-2", "launcher=inline"
    )
    assert again.returncode == 0 and "2 of 2 jobs are already done" in again.stdout


def test_a_sweep_over_a_choice_that_does_not_exist_is_one_line(experiment):
    done = experiment("-m", "out_dir=sweep", "sae=topk,nosuch")
    assert (
        done.returncode == 2
        and done.stderr.count("\n") == 1
        and "nosuch" in done.stderr
        and "Traceback" not in done.stdout
    ), done.stderr
    assert not list(experiment.here.iterdir())


# ------------------------------------------------------------------------------------------------
# kills


def kill(process: Any) -> bool:
    """SIGKILL to the process and what it started; True if it was still running."""
    if process.poll() is not None:
        return False
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return True


@pytest.fixture(scope="module")
def undisturbed(make_experiment: Callable[[str], Experiment]) -> dict[str, Any]:
    """What the run of the kill tests leaves behind where nobody kills it."""
    experiment = make_experiment("undisturbed")
    assert in_this_process(experiment, "--out_dir=k", "sae=batch_topk", *LONGER) == 0
    return lasting(experiment.runs / "k")


def finished_after_kills(
    experiment: Experiment, moments: list[Callable[[Experiment, float], bool]]
) -> int:
    """Start the command, kill it at each moment, then let it finish; returns how many kills hit
    a running process.
    """
    hits = 0
    for moment in moments:
        process, began = (
            experiment.start("--out_dir=k", "sae=batch_topk", *LONGER),
            time.monotonic(),
        )
        while process.poll() is None and not moment(experiment, time.monotonic() - began):
            time.sleep(0.002)
        hits += kill(process)
    assert in_this_process(experiment, "--out_dir=k", "sae=batch_topk", *LONGER) == 0
    return hits


def once(pattern: str) -> Callable[[Experiment, float], bool]:
    """The moment at which a file that matches appears in the cache."""
    return lambda experiment, seconds: any(experiment.cache.glob(pattern))


def test_killed_while_each_model_trains_and_started_again_gives_the_same_bytes(
    experiment, undisturbed
):
    hits = finished_after_kills(
        experiment,
        [once("lms/*/checkpoint.safetensors"), once("passes/*/checkpoint_0.safetensors")],
    )
    assert hits == 2
    assert_same(lasting(experiment.runs / "k"), undisturbed)
    assert not list(experiment.cache.rglob("checkpoint*")), (
        "checkpoints are gone when their stage is done"
    )


@pytest.mark.slow
def test_killed_at_eight_random_moments_and_started_again_gives_the_same_bytes(
    experiment, undisturbed
):
    chance = random.Random(0)
    began = time.monotonic()
    assert (
        experiment(
            "--out_dir=once", "sae=batch_topk", *LONGER, f"cache={experiment.here}/other"
        ).returncode
        == 0
    )
    delays = [chance.uniform(0.3, 1.0) * (time.monotonic() - began) for _ in range(8)]
    finished_after_kills(experiment, [lambda _, seconds, d=d: seconds > d for d in delays])
    assert_same(lasting(experiment.runs / "k"), undisturbed)


@pytest.mark.slow
def test_two_runs_at_once_on_one_cache_train_one_language_model(experiment):
    processes = [
        experiment.start(f"--out_dir={sae}", f"sae={sae}") for sae in ("topk", "batch_topk")
    ]
    assert [p.wait(120) for p in processes] == [0, 0]
    assert len(experiment.made("lms")) == 1 and len(experiment.made("stores")) == 3
    info = [experiment.json(sae, "final_info_text8_0.json") for sae in ("topk", "batch_topk")]
    assert info[0]["total_train_time"] == info[1]["total_train_time"]


@pytest.mark.slow
@pytest.mark.parametrize("run", list(OmegaConf.load(CONF / "plan" / "variants.yaml").runs))
def test_every_planned_run_works_from_its_out_dir_alone(first, run):
    """As automated callers start them, but for the sizes."""
    experiment, _ = first
    done = experiment(f"--out_dir={run}")
    assert done.returncode == 0, done.stderr
    assert {name.split(".")[0] for name in experiment.json(run, "final_info.json")} == {"text8"}
    assert experiment.json(run, "manifest.json")["plan_note"].startswith(f"plan variants: {run} is")

"""The benchmark on known features: its score, its rules, its seeds and its list of tries."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sae_experiments.cli.main import main
from sae_experiments.config.compose import build, compose_checked
from sae_experiments.errors import UserError
from sae_experiments.studies.base import Finished
from sae_experiments.studies.ground_truth import challenge
from sae_experiments.studies.ground_truth.challenge import Challenge
from sae_experiments.studies.ground_truth.study import GroundTruth
from support.common import CONF

CHOSEN = ["preset=challenge", "study=ground_truth"]


def study_of(*overrides: str) -> GroundTruth:
    return build(compose_checked(CONF, [*CHOSEN, *overrides])[0].study)


@pytest.fixture(scope="module")
def rules() -> Challenge:
    return study_of().challenge


def finished(name: str = "synth_S", seed: int = 0, *, cut: bool = False, **metrics: Any):
    usual = {"truth_f1": 0.8, "truth_mcc": 0.7, "sae_fvu": 0.2, "sae_l0": 5.0}
    return Finished(name=name, seed=seed, metrics=usual | metrics, seconds={"fit": 30.0}, cut=cut)


@pytest.mark.usefixtures("quick_start")
def test_one_command_gives_a_number_and_a_line_of_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAE_CACHE", str(tmp_path / "cache"))
    conf = Path(shutil.copytree(CONF, tmp_path / "conf"))
    preset = conf / "preset" / "challenge.yaml"
    preset.write_text(preset.read_text().replace("rows: 131072", "rows: 4096"))  # in a second
    argv = ["preset=challenge", "sae=[batch_topk,random]", "study.train.steps=4", "threads=1"]
    argv += ["report=false", "workers=1", "--out_dir=try"]
    assert main(argv, plan="variants", extra=[], conf=conf) == 0
    out = capsys.readouterr().out
    final = json.loads((tmp_path / "runs/try/final_info.json").read_text())
    means = final["synth_S.batch_topk"]["means"]
    assert f"\nscore.batch_topk: {means['truth_f1_mean']:.6f}\n" in out and "0.879" in out
    header, *lines = (tmp_path / "runs" / "results.tsv").read_text().splitlines()
    rows = [dict(zip(header.split("\t"), line.split("\t"), strict=True)) for line in lines]
    assert [row["sae"] for row in rows] == ["batch_topk", "random"]
    assert float(rows[0]["score"]) == pytest.approx(means["truth_f1_mean"], abs=1e-6)
    assert rows[0]["status"] == "done" and rows[0]["seeds"] == "development"
    assert main(argv, plan="variants", extra=[], conf=conf) == 0
    assert len((tmp_path / "runs/results.tsv").read_text().splitlines()) == 3, "no try twice"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("sae.target_l0=4", "scored at sae.target_l0=5"),
        ("sae.active_frac=0.1", "scored at sae.target_l0=5"),
        ("sae.d_sae=700", "scored with sae.d_sae=683"),
        ("sae.expansion=4", "scored with sae.d_sae=683"),
        ("study.train.steps=4001", "more than the 4096000 rows"),
        ("study.train.batch_size=1025", "more than the 4096000 rows"),
    ],
)
def test_other_rules_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        study_of("sae=batch_topk", given).check()


@pytest.mark.parametrize("world", ["S", "M", "full"])
def test_every_world_has_a_latent_for_four_features_and_the_published_interference(world):
    study = study_of("sae=batch_topk", f"challenge.world={world}")
    study.check()
    recipe, rules = study.recipe, study.challenge.rules
    assert recipe.features / recipe.width == pytest.approx(21.333, rel=1e-3)
    d_sae = study.saes["batch_topk"].build(recipe.width, recipe.width).d_sae
    assert d_sae == round(recipe.features / 4)
    assert recipe.starts[-1] / recipe.features == pytest.approx(2 / 3, rel=0.03)
    assert rules.l0 / recipe.width == pytest.approx(25 / 768, rel=0.25)
    assert study.train.steps == rules.steps and study.held_out_rows == rules.rows


def test_scoring_draws_other_worlds_which_nobody_draws_without_the_secret(monkeypatch):
    monkeypatch.delenv(challenge.SECRET, raising=False)
    develop, score = study_of(), study_of("challenge.seeds=scoring")
    assert [c.seed for c in develop.cells()] == [0] and len(score.cells()) == 3
    seeds = {develop.challenge.seed(s) for s in range(100)}
    public = [score.challenge.seed(c.seed) for c in score.cells()]
    facts = score.challenge.provenance()
    monkeypatch.setenv(challenge.SECRET, "known to one")
    secret = [score.challenge.seed(c.seed) for c in score.cells()]
    assert len(seeds | {*public} | {*secret}) == 106, "all differ"
    assert develop.challenge.provenance() != facts != score.challenge.provenance()
    assert "known to one" not in str(score.challenge.provenance())


def test_a_score_at_another_l0_or_cut_short_does_not_count(rules, tmp_path):
    for one in (finished(sae_l0=5.3), finished(sae_l0=None), finished(cut=True)):
        lines = rules.conclude(tmp_path / "run", {"topk": [one]})
        assert lines[-1] == "score: 0.000000" and "does not count" in "".join(lines)
    good = rules.conclude(
        tmp_path / "run", {"topk": [finished(sae_l0=5.2), finished(seed=1, truth_f1=0.6)]}
    )
    assert good[-1] == "score: 0.700000"
    none = rules.conclude(tmp_path / "run", {"topk": [finished(truth_f1=None)]})
    assert none[-1] == "score: 0.000000"
    assert len((tmp_path / "results.tsv").read_text().splitlines()) == 6


def test_a_table_of_another_kind_is_left_as_it_is(rules, tmp_path):
    path = Path(tmp_path / "results.tsv")
    path.write_text("commit\tsae_fvu\n")
    assert "another table" in rules.conclude(tmp_path / "run", {"topk": [finished()]})[0]
    assert path.read_text() == "commit\tsae_fvu\n"


def test_seeds_are_one_of_two(rules):
    with pytest.raises(UserError, match=r"challenge.seeds=mine is not one of"):
        replace(rules, seeds="mine")

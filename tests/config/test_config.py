"""The configuration: every file composes and builds, plans and grids mean what they say, and
every mistake is one line.
"""

from __future__ import annotations

import ast
import copy
import functools
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import DictConfig, OmegaConf

from sae_experiments.cli.main import main, parse
from sae_experiments.config import checks
from sae_experiments.config import compose as config
from sae_experiments.config.axes import split_grid
from sae_experiments.config.checks import parse as parse_overrides
from sae_experiments.config.compose import build, compose_checked, options_of
from sae_experiments.config.hydra_habits import LAUNCHERS, translate
from sae_experiments.config.plans import complete, planned_overrides, preset_file
from sae_experiments.errors import UserError
from sae_experiments.flatten import flatten
from sae_experiments.saes.purified.sae import Purified
from sae_experiments.studies.language.study import Language
from support.common import CONF, ROOT, Experiment
from support.pretrained import folder_of

_compose = config._compose


def options(group: str) -> list[str]:
    return sorted(p.stem for p in (CONF / group).glob("*.yaml") if not p.stem.startswith("_"))


PLANS = options("plan")
#: The study that a preset is for, if it is not for all; and the presets that are.
STUDY_OF_PRESET = {
    preset: preset_file(CONF, preset).get("for_study") for preset in options("preset")
}
PRESETS = [preset for preset, study in STUDY_OF_PRESET.items() if study is None]
SAES = [name for name in options("sae") if name != "saelens"]  # that one is read from a directory
PLANNED = [
    (plan, run) for plan in PLANS for run in OmegaConf.load(CONF / "plan" / f"{plan}.yaml").runs
]


@pytest.fixture(scope="module", autouse=True)
def compose_once() -> Iterator[None]:
    """Hydra needs a tenth of a second for each composition; the same overrides give the same
    answer.
    """
    known: dict[tuple[str, ...], DictConfig] = {}

    def compose(overrides: Sequence[str]) -> DictConfig:
        key = tuple(overrides)
        if key not in known:
            known[key] = _compose(overrides)
        return copy.deepcopy(known[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "_compose", compose)
        yield


def composed(*overrides: str, preset: str = "smoke") -> DictConfig:
    return compose_checked(CONF, [f"preset={preset}", *overrides])[0]


@functools.cache
def study_of(*overrides: str, preset: str = "smoke") -> Language:
    """The study of some overrides, built and checked (every SAE on the meta device)."""
    study = build(composed(*overrides, preset=preset).study)
    study.check()
    return study


# ------------------------------------------------------------------------------------------------
# every file


@pytest.mark.parametrize("sae", SAES)
def test_every_sae_composes_and_builds_on_meta_at_every_preset(sae):
    saes = study_of(f"sae={sae}").saes
    assert list(saes) == [sae]
    # composing is what takes time, and the presets leave the SAE's own numbers alone (see below)
    for preset in PRESETS:
        study = replace(study_of(preset=preset), saes=saes)
        study.check()
        read, write = study.sites(saes[sae])
        with torch.device("meta"):
            built = saes[sae].build(study.width(read), study.width(write))
        assert built.d_in == study.width(read) < built.d_sae, "overcomplete by default"
        assert all(p.is_meta for p in built.parameters())


def test_presets_change_sizes_only():
    before = composed(preset="smoke")
    for preset in PRESETS:
        other = composed(preset=preset)
        for part in ("sae", "saes", "metric", "track", "site"):
            assert other[part] == before[part], f"{preset} changes {part}"


@pytest.mark.parametrize("preset", sorted(STUDY_OF_PRESET.keys() - set(PRESETS)))
def test_a_preset_for_one_study_chooses_it_and_holds_its_rules(preset):
    study = STUDY_OF_PRESET[preset]
    given, about = complete([f"preset={preset}"], plan="superposition", extra=[], conf=CONF)
    assert given == [f"preset={preset}", f"study={study}"] and "not about" in about["plan_note"]
    cfg = compose_checked(CONF, given)[0]
    build(cfg.study).check()
    keys = flatten(OmegaConf.to_container(cfg, resolve=False), branches=True)
    for key in cfg.fixed:
        assert key in keys
        with pytest.raises(UserError, match=f"which fixes {key}: leave it out"):
            composed(f"study={study}", f"{key}.any=1", preset=preset)
    with pytest.raises(UserError, match=f"is for study={study} alone"):
        composed("study=language", preset=preset)
    typed = complete([f"preset={preset}", "study=palindrome"], plan="plain", extra=[], conf=CONF)
    assert "study=palindrome" in typed[0], "what is typed is not replaced, but refused above"


def with_what_it_needs(group: str, name: str, folder: Path) -> list[str]:
    """What must be typed beside a choice: the text, the model, or the path that it is about."""
    (folder / "text.txt").write_text("a text of some words")
    needs = {
        ("data", "text"): ["lm=gpt2_bpe", f"data.text.file={folder / 'text.txt'}"],
        ("data", "hub"): ["lm=gpt2_bpe", "data.hub.path=org/name"],
    }
    if (group, name) == ("lm", "pretrained"):
        return [f"lm.path={folder_of(folder / 'model')}", "lm.n_positions=16"]
    return needs.get((group, name), [])


@pytest.mark.parametrize(
    ("group", "name"),
    [
        (g.name, n)
        for g in sorted(CONF.iterdir())
        if g.is_dir() and g.name not in ("sae", "plan", "plot", "sweep", "launcher", "search")
        for n in options(g.name)
    ],
)
def test_every_choice_of_every_group_composes_and_builds(group, name, tmp_path):
    value = f"[{name}]" if group in ("data", "metric") else name
    overrides = [f"{group}={value}", *with_what_it_needs(group, name, tmp_path)]
    if group == "preset" and STUDY_OF_PRESET[name]:
        overrides.append(f"study={STUDY_OF_PRESET[name]}")
    cfg = compose_checked(CONF, overrides if group == "preset" else ["preset=smoke", *overrides])[0]
    study = build(cfg.study)
    study.check()
    build(cfg.track)
    assert study.infos()


@pytest.mark.parametrize(
    "saes", [SAES[:3], pytest.param(SAES, marks=pytest.mark.slow)], ids=["three", "all"]
)
def test_saes_of_any_kind_fit_into_one_run(saes):
    assert list(study_of(f"sae=[{','.join(saes)}]").saes) == saes


def test_the_presets_are_a_ladder_of_sizes():
    sizes = [study_of(preset=p) for p in ("smoke", "laptop", "full")]
    rows = [s.fit.train_rows for s in sizes]
    widths = [s.lm.n_embd for s in sizes]
    assert (
        rows == sorted(rows)
        and widths == sorted(widths)
        and len(set(rows)) == len(set(widths)) == 3
    )


def test_the_full_preset_is_the_published_protocol():
    study = study_of(preset="full")
    lm = study.lm
    assert (lm.n_layer, lm.n_head, lm.n_embd, lm.n_positions, lm.dropout, lm.freeze_bias) == (
        6,
        6,
        384,
        256,
        0.2,
        True,
    )
    assert (lm.eval_batches, lm.samples, lm.sample_length, lm.prompt, lm.temperature, lm.top_k) == (
        200,
        10,
        500,
        " ",
        0.8,
        200,
    )
    assert {name: list(spec.seeds) for name, spec in study.data.items()} == {
        "shakespeare_char": [0, 1, 2],
        "enwik8": [0],
        "text8": [0],
    }
    assert {name: spec.head for name, spec in study.data.items()} == dict.fromkeys(study.data)
    assert [(c.dataset, c.seed) for c in study.cells()] == [
        *(("shakespeare_char", seed) for seed in range(3)),
        ("enwik8", 0),
        ("text8", 0),
    ]
    assert str(study.sites(next(iter(study.saes.values())))[0]) == "resid.3", (
        "the residual stream after block n_layer // 2"
    )


def test_the_laptop_preset_uses_heads_of_the_large_corpora():
    assert {n: s.head for n, s in study_of(preset="laptop").data.items()} == {
        "shakespeare_char": None,
        "enwik8": 4_000_000,
        "text8": 3_000_000,
    }


@pytest.mark.parametrize(("plan", "run"), PLANNED)
def test_every_planned_run_composes_and_builds(plan, run):
    overrides, about = complete([f"out_dir={run}"], plan=plan, extra=[], conf=CONF)
    cfg, _ = compose_checked(CONF, overrides)
    study = build(cfg.study)
    study.check()
    assert cfg.out_dir == run and run in about["plan_note"] and cfg.label


@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_has_a_title_a_baseline_and_runs_that_differ(plan):
    content = OmegaConf.to_container(OmegaConf.load(CONF / "plan" / f"{plan}.yaml"))
    assert content["title"] and "run_0" in content["runs"]
    assert all(re.fullmatch(r"run_\d+", name) for name in content["runs"])
    plain = [tuple(o for o in v if not o.startswith("label=")) for v in content["runs"].values()]
    assert len(set(plain)) == len(plain)


def test_the_main_script_names_a_plan_that_exists():
    tree = ast.parse((ROOT / "experiment.py").read_text())
    plan = next(
        n.value.value for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "PLAN"
    )
    assert plan in PLANS


YAML_FILES = sorted(CONF.rglob("*.yaml"))
#: Keys that need no comment: those of Hydra, and the two under which a file's own settings stand.
PLAIN_KEYS = {"_target_", "_partial_", "_convert_", "defaults", "model", "study"}
#: Mappings whose keys are names and no settings: the comment of the mapping is theirs.
TABLES = {"runs", "sizes", "curves", "bars", "kinds", "companions", "head_sha256", "sources"}
TABLES |= {"families", "metrics"}


def uncommented_keys(node: yaml.Node, lines: Sequence[str]) -> Iterator[str]:
    """Keys in block style without a comment beside them or on the line above."""
    if not isinstance(node, yaml.MappingNode) or node.flow_style:
        return
    for key, value in node.value:
        line = key.start_mark.line
        above = lines[line - 1].strip() if line else ""
        passed_on = re.fullmatch(r"\$\{\w+\}", str(value.value))
        commented = " # " in lines[line] or (above.startswith("#") and "@package" not in above)
        if not commented and key.value not in PLAIN_KEYS and not passed_on:
            yield key.value
        if key.value not in TABLES:
            yield from uncommented_keys(value, lines)


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda p: str(p.relative_to(CONF)))
def test_a_yaml_file_fits_a_screen_and_explains_every_key(path):
    text = path.read_text()
    lines = text.splitlines()
    assert len(lines) <= 50
    assert max(map(len, lines)) <= 100
    assert lines[0].startswith("# "), "the first comment says what the file is"
    assert list(uncommented_keys(yaml.compose(text), lines)) == []


def test_no_group_of_the_command_line_has_a_single_option_forever():
    """A choice of one is no choice: such a group is for later options only, so there are few of
    them.
    """
    groups = [g.name for g in CONF.iterdir() if g.is_dir() and len(options(g.name)) == 1]
    assert set(groups) <= {"fit", "lm", "plan", "study"}


# ------------------------------------------------------------------------------------------------
# the command line


@pytest.mark.parametrize(
    ("argv", "overrides"),
    [
        (["--out_dir=run_1"], ["out_dir=run_1"]),
        (["--out_dir", "run_1"], ["out_dir=run_1"]),
        (["out_dir=run_1", "sae=topk"], ["out_dir=run_1", "sae=topk"]),
        (
            ["--sae.target_l0", "16", "--out_dir=x", "a.b=c=d"],
            ["sae.target_l0=16", "out_dir=x", "a.b=c=d"],
        ),
        (["--lm.prompt= "], ["lm.prompt= "]),
        (["--shift", "-5"], ["shift=-5"]),
        (["++a=1", "~metric.downstream"], ["++a=1", "~metric.downstream"]),
    ],
)
def test_dashes_are_a_matter_of_taste(argv, overrides):
    assert parse(argv) == (overrides, False, [])


def test_hydras_own_flags_are_set_aside():
    assert parse(["-m", "sae=a,b"]) == (["sae=a,b"], True, [])
    assert parse(["--multirun", "--a=1"]) == (["a=1"], True, [])
    assert parse(["--cfg", "job", "sae=topk", "--resolve"]) == (
        ["sae=topk"],
        False,
        ["--cfg", "job", "--resolve"],
    )
    assert parse(["--cfg=job"]) == parse(["--cfg", "job"]) == ([], False, ["--cfg", "job"])


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["run_1"], "run_1"),
        (["--out_dir"], "--out_dir"),
        (["--out_dir", "--sae=topk"], "--out_dir"),
        (["-x"], "-x"),
        ([""], "''"),
    ],
)
def test_what_is_no_option_is_named(argv, named):
    with pytest.raises(UserError, match=re.escape(named)):
        parse(argv)


def test_help_is_for_people_and_lists_what_there_is(capsys):
    assert main(["--help"], plan="variants", extra=[], conf=CONF) == 0
    page = capsys.readouterr().out
    for word in (
        *SAES,
        *PRESETS,
        *PLANS,
        "auto",
        "shakespeare_char",
        "enwik8",
        "text8",
        "--out_dir=run_1",
        "final_info.json",
        "run_1",
        "plot.py",
    ):
        assert word in page
    assert max(map(len, page.splitlines())) <= 110 and "_base" not in page


def test_cfg_job_prints_the_configuration_of_the_planned_run(experiment: Experiment):
    done = experiment("--cfg", "job", "--out_dir=run_1", "preset=smoke", tiny=False)
    assert done.returncode == 0, done.stderr
    cfg = OmegaConf.create(done.stdout)
    assert (
        cfg.sae.model._target_.endswith("TopK")
        and cfg.out_dir == "run_1"
        and cfg.corpus_size == "smoke"
    )
    assert not list(experiment.here.iterdir()), "nothing is written"


@pytest.mark.parametrize(
    "typed",
    [
        ["sae=topk"],
        ["sae=purified", "sae/host=topk"],
        ["sae=[topk,gated]", "sae.gated.target_l0=16"],
        ["sae=[batch_topk,purified]", "sae.purified.model.noise=[gaussian,swap]"],
        ["sae=topk", "sae.target_l0=[16,32]"],
    ],
)
def test_cfg_job_prints_what_would_run(capsys: pytest.CaptureFixture[str], typed: list[str]):
    typed = ["out_dir=a", "preset=smoke", *typed]
    assert main(["--cfg", "job", *typed], plan="variants", extra=[], conf=CONF) == 0
    shown = OmegaConf.create(capsys.readouterr().out)
    cfg, _ = values(typed)
    if len(cfg.saes) == 1:
        assert shown.sae == cfg.sae and "saes" not in shown
    else:
        assert shown.saes == cfg.saes and "sae" not in shown
    assert shown.fit.train == cfg.fit.train
    flags = ["--cfg=job", "--resolve", "--package=fit.train"]
    assert main([*flags, *typed], plan="variants", extra=[], conf=CONF) == 0
    assert OmegaConf.create(capsys.readouterr().out).steps == cfg.fit.train.steps


def test_info_shows_one_sae_or_says_so(capsys: pytest.CaptureFixture[str]):
    typed = ["--info", "defaults", "--out_dir=a", "sae=[topk,gated]"]
    assert main(typed, plan="variants", extra=[], conf=CONF) == 2
    assert "shows one SAE" in capsys.readouterr().err


def test_a_flag_that_shows_no_configuration_minds_no_list(experiment: Experiment):
    done = experiment("--version", "--out_dir=a", "sae=[topk,gated]")
    assert done.returncode == 0 and "Hydra" in done.stdout


def test_help_and_mistakes_do_not_wait_for_torch():
    code = "import sys\nfrom pathlib import Path\nfrom sae_experiments.cli.main import main\n"
    code += (
        "main(sys.argv[1:], plan='variants', extra=[], conf=Path('conf'))\nprint('torch' in"
        " sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.endswith("False\n")


# ------------------------------------------------------------------------------------------------
# plans and presets


def values(
    user: list[str], extra: Sequence[str] = (), plan: str = "variants"
) -> tuple[DictConfig, dict[str, Any]]:
    overrides, about = complete(user, plan=plan, extra=extra, conf=CONF)
    return compose_checked(CONF, overrides)[0], about


def test_out_dir_chooses_the_planned_run_and_no_out_dir_is_run_0():
    assert (
        values(["out_dir=run_1"])[0].sae.model._target_.endswith("TopK")
        and values(["out_dir=run_1"])[0].label == "topk"
    )
    assert (
        values([])[0].sae.model._target_.endswith("Standard") and values([])[0].out_dir == "run_0"
    )


def test_a_run_that_the_plan_does_not_name_is_plain_and_says_so():
    cfg, about = values(["out_dir=mine"])
    assert cfg.label is None and "does not name mine" in about["plan_note"]


def test_the_users_overrides_win_over_the_file_and_the_file_over_the_plan():
    assert list(values(["out_dir=run_1", "sae=batch_topk"])[0].saes) == ["batch_topk"]
    assert list(values(["out_dir=run_1"], extra=["sae=batch_topk"])[0].saes) == ["batch_topk"]
    assert list(values(["out_dir=run_1", "sae=standard"], extra=["sae=batch_topk"])[0].saes) == [
        "standard"
    ]
    assert values(["sae.target_l0=8", "sae.target_l0=9"])[0].sae.target_l0 == 9, (
        "of a key typed twice the later counts"
    )


def test_a_planned_run_that_the_user_changes_loses_its_label():
    assert values(["out_dir=run_1", "sae.target_l0=16"])[0].label is None
    assert values(["out_dir=run_1"], extra=["sae.target_l0=16"])[0].label is None
    assert values(["out_dir=run_1", "sae=batch_topk", "label=mine"])[0].label == "mine"
    for same in ("verbosity=quiet", "runs_root=/tmp/x", "time_limit_s=5", "threads=2"):
        assert values(["out_dir=run_1", same])[0].label == "topk", (
            "what changes no result changes no label"
        )


@pytest.mark.parametrize("cuda", [True, False])
def test_auto_is_laptop_and_says_how_to_ask_for_full_on_a_cuda_device(monkeypatch, cuda):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    for user in ([], ["preset=auto"]):
        overrides, about = complete(user, plan="variants", extra=[], conf=CONF)
        assert (
            "preset=laptop" in overrides
            and about["preset"] == "laptop"
            and "CUDA" in about["preset_reason"]
            and ("preset=full" in about["preset_reason"]) == cuda
        )
    assert complete(["preset=smoke"], plan="variants", extra=[], conf=CONF)[1] == pytest.approx(
        {
            "preset": "smoke",
            "preset_reason": "asked for",
            "plan": "variants",
            "plan_note": planned_overrides(CONF, "variants", "run_0")[1],
        }
    )


def test_a_plan_that_does_not_exist_is_named_with_those_that_do():
    with pytest.raises(
        UserError, match=r"PLAN='variant' .*choose one of .*variants.*did you mean variants\?"
    ):
        complete([], plan="variant", extra=[], conf=CONF)


# ------------------------------------------------------------------------------------------------
# grids


def test_two_saes_and_two_l0s_are_four_arms_with_the_right_values():
    study = study_of("sae=[topk,batch_topk]", "sae.target_l0=[16,32]")
    found = {
        name: (sae_spec.model.func.__name__, sae_spec.target_l0, sae_spec.model.keywords["k"])
        for name, sae_spec in study.saes.items()
    }
    assert len(found) == 4
    assert sorted(found.values()) == [
        ("BatchTopK", 16, 16),
        ("BatchTopK", 32, 32),
        ("TopK", 16, 16),
        ("TopK", 32, 32),
    ]
    for name, (kind, l0, _) in found.items():
        assert name.startswith("topk" if kind == "TopK" else "batch_topk") and name.endswith(
            str(l0)
        )
    assert [c.reports for c in study.cells() if c.dataset == "text8"] == [
        tuple(f"text8.{name}" for name in study.saes)
    ]


def test_a_grid_of_one_sae_keeps_other_overrides():
    study = study_of(
        "sae=topk", "sae.target_l0=[4,8,16]", "sae.expansion=4", "sae.model.aux_coeff=0"
    )
    assert [
        (a.target_l0, a.expansion, a.model.keywords["aux_coeff"]) for a in study.saes.values()
    ] == [(4, 4, 0), (8, 4, 0), (16, 4, 0)]


def test_a_grid_may_span_several_keys():
    study = study_of("sae=topk", "sae.target_l0=[4,8]", "sae.expansion=[2,4]")
    assert [(a.target_l0, a.expansion) for a in study.saes.values()] == [
        (4, 2),
        (4, 4),
        (8, 2),
        (8, 4),
    ]


def test_a_key_may_be_for_one_sae_of_the_list_alone():
    study = study_of(
        "sae=[topk,batch_topk]",
        "sae.topk.target_l0=[4,8]",
        "sae.target_l0=16",
        "sae.batch_topk.expansion=2",
    )
    assert {
        name: (sae_spec.target_l0, sae_spec.expansion) for name, sae_spec in study.saes.items()
    } == {"topk-target_l0_4": (4, 8), "topk-target_l0_8": (8, 8), "batch_topk": (16, 2)}


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (
            "sae.gated.target_l0=4",
            (
                r"sae\.gated\.target_l0: sae=gated is not among the SAEs of this run \(topk,"
                r" batch_topk\)"
            ),
        ),
        ("sae.topk.no_such_key=4", "sae.no_such_key is not an option"),
        ("sae.topk.target_l0=many", "sae.target_l0=many must be"),
    ],
)
def test_a_key_for_one_sae_alone_is_checked(wrong, told):
    with pytest.raises(UserError, match=told):
        study_of("sae=[topk,batch_topk]", wrong)


def test_the_five_runs_of_purification_hold_all_that_the_study_must_show():
    """Early stopping is in run_3 and the price in time and memory in run_4: an automated caller
    has no further runs.
    """
    third, fourth = (
        build(values([f"out_dir=run_{i}"], extra=["preset=smoke"], plan="purification")[0].study)
        for i in (3, 4)
    )
    patience = {
        name: sae_spec.model.keywords["stop"]["patience"] for name, sae_spec in third.saes.items()
    }
    assert (
        sum(p > 0 for p in patience.values()) == 1 and sum(p == 0 for p in patience.values()) == 10
    )
    assert len({sae_spec.model.keywords["noise"] for sae_spec in third.saes.values()}) == 10
    assert {"overhead_time", "overhead_memory"} <= {
        info.name for info in fourth.infos() if info.shown
    }
    assert any(isinstance(sae_spec.build(16, 16), Purified) for sae_spec in fourth.saes.values())


def test_null_and_truth_values_may_stand_in_a_grid():
    study = study_of("sae=gated", "sae.model.start_l0=[null,3]")
    assert {name: sae_spec.model.keywords["start_l0"] for name, sae_spec in study.saes.items()} == {
        "gated-start_l0_null": None,
        "gated-start_l0_3": 3,
    }
    study = study_of("sae=matryoshka", "sae.model.detach_inner=[true,false]")
    assert [sae_spec.model.keywords["detach_inner"] for sae_spec in study.saes.values()] == [
        True,
        False,
    ]


@pytest.mark.parametrize(
    "typed",
    [
        "resid.mid",
        "a\\ b",
        "'a b'",
        "'it\\'s'",
        '"a,b"',
        "'x=y'",
        "'[1]'",
        "'1'",
        "1",
        "null",
        "true",
        "1e-3",
        "[1,2]",
        "'c:\\d'",
    ],
)
def test_values_of_a_grid_mean_what_they_mean_alone(typed):
    def read(value):
        (o,) = parse_overrides([f"sae.model.noise={value}"])
        return o.value()

    base = OmegaConf.create({"sae": {"model": {"noise": "mixture"}}})
    for listed, n in ((typed, 1), (f"{typed},2", 2)):
        grid, plain = split_grid(parse_overrides([f"sae.model.noise=[{listed}]"]), base)
        values = [read(value) for value in grid["sae.model.noise"]]
        assert (
            len(values) == n
            and not plain
            and values[0] == read(typed)
            and type(values[0]) is type(read(typed))
        )


def test_a_list_for_a_key_that_holds_a_list_is_one_value_and_no_grid():
    study = study_of("sae=topk", "sae.train.betas=[0.5,0.95]")
    assert len(study.saes) == 1
    assert [tuple(a.config(study.fit.train).betas) for a in study.saes.values()] == [(0.5, 0.95)]
    assert tuple(study_of("fit.train.betas=[0.5,0.95]").fit.train.betas) == (0.5, 0.95)
    assert list(study_of("seeds=[3,4]").seeds) == [3, 4]


@pytest.mark.parametrize("study", sorted(p.stem for p in (CONF / "study").glob("[a-z]*.yaml")))
def test_seeds_are_numbers_in_every_study_and_one_number_is_a_list_of_one(study):
    assert composed(f"study={study}", "seeds=3").seeds == [3]
    assert composed(f"study={study}", "seeds=0").study.seeds == [0]
    with pytest.raises(UserError, match="seeds=ab must be a list of whole numbers"):
        composed(f"study={study}", "seeds=ab")


def test_one_number_is_a_list_of_one_wherever_the_configuration_has_a_list_of_numbers():
    cfg = composed("metric=all", "sae=matryoshka")
    values = flatten(OmegaConf.to_container(cfg, resolve=True), branches=True)
    of_numbers = [
        key
        for key, value in values.items()
        if isinstance(value, list) and value and {type(v) for v in value} <= {int, float}
    ]
    assert {"data.text8.seeds", "sae.model.group_fracs", "metric.probing.k"} <= set(of_numbers)
    for key in of_numbers:
        (given,) = parse_overrides([f"{key}=3"])
        is_pair = key.endswith(".betas")
        expected = 3 if is_pair else [3]
        assert checks.listed(given, OmegaConf.select(cfg, key)).value() == expected, key
    saes = composed("sae=[topk,matryoshka]", "sae.matryoshka.model.group_fracs=1.0").saes
    assert saes["matryoshka"]["model"]["group_fracs"] == [1.0]
    with pytest.raises(UserError, match=r"start_coeff=\[0.1\] must be two numbers"):
        study_of("sae=hierarchical", "sae.model.start_coeff=0.1")


def test_a_list_of_one_sae_is_that_sae():
    assert study_of("sae=[topk]").saes.keys() == study_of("sae=topk").saes.keys() == {"topk"}


def test_an_own_number_of_a_variant_comes_on_top_of_the_fits():
    study = study_of("sae=topk", "sae.train.lr=0.123", "fit.train.lr=0.5")
    (sae_spec,) = study.saes.values()
    assert sae_spec.config(study.fit.train).lr == 0.123 and study.fit.train.lr == 0.5


def test_metric_all_is_every_metric():
    assert set(study_of("metric=all").metrics) == set(options("metric"))


# ------------------------------------------------------------------------------------------------
# mistakes


class ReachedCompute(Exception):
    """A mistake was accepted: the run would have begun."""


@pytest.fixture
def typed(tmp_path, monkeypatch, capsys):
    """Type a command line; what comes back is (exit status, stderr). Nothing can begin to
    compute.
    """

    def begin(study: Any, settings: Any, *rest: Any) -> str:
        study.check()
        raise ReachedCompute(settings)

    monkeypatch.setattr("sae_experiments.runner.run.run", begin)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAE_CACHE", str(tmp_path / "cache"))

    def type_(*argv: str) -> tuple[int, str]:
        status = main(
            ["preset=smoke", f"runs_root={tmp_path}/runs", *argv],
            plan="variants",
            extra=[],
            conf=CONF,
        )
        assert not list(tmp_path.iterdir()), "a mistake leaves nothing behind"
        return status, capsys.readouterr().err

    return type_


MISTAKES = {
    # unknown keys and choices, with the nearest one
    "sae.taget_l0=16": ["sae.taget_l0", "did you mean sae.target_l0?"],
    "target_l0=16": ["target_l0", "did you mean sae.target_l0?"],
    "bogus=1": ["bogus", "--help"],
    "sed=1": ["sed", "did you mean"],
    "sae=top_k": ["sae=top_k", "did you mean topk?", "batch_topk"],
    "sae=[topk,nosuch]": ["nosuch", "standard"],
    "sae=[]": ["sae=[]"],
    "data=[]": ["data=[]"],
    "data=[shakespear]": ["shakespear", "did you mean shakespeare_char?"],
    "preset=labtop": ["labtop", "did you mean laptop?", "auto"],
    "metric=[sparsety]": ["sparsety", "did you mean sparsity?"],
    "study=langage": ["langage", "language"],
    "track=wndb": ["wndb", "did you mean wandb?"],
    "corpus_size=tiny": ["corpus_size", "tiny"],
    # types
    "sae.target_l0=many": ["sae.target_l0=many", "number"],
    "sae.target_l0=[16,many]": ["sae.target_l0=many"],
    "sae.target_l0=true": ["sae.target_l0", "number"],
    "lm.n_layer=2.5": ["lm.n_layer=2.5", "whole number"],
    "lm.n_layer=two": ["lm.n_layer=two", "whole number"],
    "overwrite=perhaps": ["overwrite=perhaps", "true or false"],
    "fit.train.betas=0.9": ["fit.train.betas=0.9", "list"],
    "data.text8.seeds=a": ["data.text8.seeds=a", "list"],
    "lm.train.steps=many": ["lm.train.steps", "many"],
    "sae.d_sae=wide": ["sae.d_sae", "wide"],
    "sae.d_sae=10.5": ["sae.d_sae", "10.5"],
    "sae.train.lr=fast": ["sae.train.lr", "fast"],
    "seeds=-1": ["seeds", "-1"],
    "seeds=1.5": ["seeds", "1.5"],
    "seeds=true": ["seeds", "True"],
    "seeds=ab": ["seeds=ab", "list"],
    "seeds=[a]": ["seeds", "a"],
    "seeds=[]": ["seeds"],
    "time_limit_s=soon": ["time_limit_s", "soon"],
    "threads=all": ["threads", "all"],
    "threads=0": ["threads", "0"],
    "site=5": ["site", "5"],
    "metric.sparsity.rows=all": ["metric.sparsity.rows", "all"],
    "metric.reconstruction.rows=0.5": ["metric.reconstruction.rows", "0.5"],
    "data.text8.head=big": ["head", "big"],
    # numbers that are none
    "sae.target_l0=nan": ["sae.target_l0=nan", "finite"],
    "fit.train.lr=inf": ["fit.train.lr=inf", "finite"],
    "lm.dropout=nan": ["lm.dropout=nan", "finite"],
    "sae.train.lr=nan": ["sae.train.lr=nan", "finite"],
    # sizes and values that cannot work
    "sae.target_l0=0": ["0"],
    "sae.target_l0=-3": ["-3"],
    "sae.expansion=0": ["d_sae=0"],
    "sae.d_sae=-1": ["d_sae=-1"],
    "lm.n_head=5": ["lm.n_head=5", "lm.n_embd=32"],
    "lm.n_head=0": ["lm.n_head=0"],
    "lm.n_positions=1": ["lm.n_positions=1"],
    "lm.precision=fp8": ["lm.precision", "fp8"],
    "lm.activation_function=rely": ["lm.activation_function", "rely"],
    "lm.train.steps=0": ["steps=0"],
    "lm.train.optimizer=sgd": ["optimizer", "sgd", "adamw"],
    "fit.train.steps=0": ["steps=0"],
    "fit.train.lr=0": ["lr=0"],
    "fit.train.decay=step": ["decay", "step"],
    "fit.train.betas=[0.9]": ["betas"],
    "fit.train.betas=[0.9,1.5]": ["betas", "1.5"],
    "fit.train_rows=0": ["fit.train_rows=0"],
    "fit.train_rows=100": ["fit.train.batch_size=512", "fit.train_rows=100"],
    "fit.store_dtype=int8": ["fit.store_dtype", "int8"],
    "site=resid.9": ["site='resid.9'", "resid.2"],
    "site=attn.1": ["site='attn.1'", "mlp_in"],
    "sae.read=nowhere.1": ["nowhere.1"],
    "metric.downstream.windows=0": ["windows", "0"],
    "metric.downstream.batch=0": ["batch", "0"],
    "metric.sparsity.entropy_latents=0": ["entropy_latents", "0"],
    "device=gpu": ["device", "gpu"],
    "verbosity=loud": ["verbosity", "loud"],
    "time_limit_s=-1": ["time_limit_s", "-1"],
    "data.text8.val_frac=2": ["val_frac=2"],
    "data.text8.stand_in=perhaps": ["stand_in", "perhaps"],
    # folders that would leave runs_root
    "out_dir=../elsewhere": ["out_dir='../elsewhere'", "runs_root"],
    "out_dir=a/../../b": ["out_dir", "runs_root"],
    "out_dir=/tmp/x": ["out_dir='/tmp/x'", "runs_root"],
    "out_dir=.": ["out_dir='.'"],
    "out_dir=": ["out_dir"],
    # what is not even an option
    "sae=topk,standard": ["sae"],
    "sae.target_l0=[16": ["sae.target_l0"],
    "a=b=c,d]": ["a=b=c,d]"],
    "~preset": ["preset"],
    "~out_dir": ["out_dir"],
    "+lm.n_layer=3": ["lm.n_layer"],
}


@pytest.mark.parametrize("typo", MISTAKES)
def test_a_mistake_is_one_line_with_key_value_and_remedy_status_2_and_no_folder(typed, typo):
    status, said = typed(typo)
    assert status == 2
    assert said.startswith("error: ") and said.count("\n") == 1, said
    assert all(word in said for word in MISTAKES[typo]), said


def test_a_mode_of_tracking_that_does_not_exist_is_a_mistake(typed):
    status, said = typed("track=wandb", "track.mode=foo")
    assert status == 2 and "track.mode=foo is not one of auto, online, offline, disabled" in said
    assert said.count("\n") == 1


def test_a_number_too_large_for_the_dictionary_names_both(typed):
    status, said = typed("sae=topk", "sae.target_l0=100000")
    assert status == 2 and "k=100000" in said and "d_sae=256" in said


def test_a_key_of_one_sae_is_refused_where_another_does_not_have_it(typed):
    status, said = typed("sae=[topk,standard]", "sae.model.k=4")
    assert status == 2 and "sae.model.k" in said


def test_cuda_that_is_not_there_is_one_line(typed, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, said = typed("device=cuda")
    assert status == 2 and "device=cuda" in said and "device=cpu" in said


FINE = [
    "sae.target_l0=16.5",
    "seeds=[0,1]",
    "time_limit_s=10.5",
    "threads=1",
    "data.text8.head=1000",
    "sae.d_sae=100",
    "out_dir=a/b",
    "out_dir=nan",
]


@pytest.mark.parametrize("fine", FINE)
def test_what_is_no_mistake_is_accepted(typed, fine):
    with pytest.raises(ReachedCompute):
        typed(fine)


def test_nothing_in_the_package_asks_a_configuration_for_a_key_that_may_be_missing():
    found = [
        str(p)
        for p in (ROOT / "sae_experiments").rglob("*.py")
        if re.search(r"\bcfg\.get\(", p.read_text())
    ]
    assert not found


def test_a_name_with_spaces_is_a_folder(typed, tmp_path):
    with pytest.raises(ReachedCompute) as caught:
        typed("out_dir=my run")
    assert caught.value.args[0].folder == Path(f"{tmp_path}/runs/my run")


# ------------------------------------------------------------------------------ pages and Hydra


def shown(capsys, *argv: str) -> str:
    capsys.readouterr()
    assert main(list(argv), plan="variants", extra=[], conf=CONF) == 0
    return capsys.readouterr().out


def test_help_fits_a_screen_and_a_half(capsys):
    lines = shown(capsys, "--help").splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 100


def test_list_has_one_explained_line_for_every_choice(capsys):
    listed = [line.split(None, 1) for line in shown(capsys, "list").splitlines() if line[:1] == " "]
    assert all(len(entry) == 2 for entry in listed)
    names = [name for name, _ in listed]
    for group in ("sae", "metric", "study", "plan", "preset"):
        assert set(options(group)) <= set(names)


@pytest.mark.parametrize(
    ("typed", "ours", "sweep"),
    [
        (["hydra/launcher=joblib"], ["launcher=joblib"], False),
        (["hydra/launcher=ray"], ["launcher=ray"], False),
        (["hydra/launcher=submitit_slurm"], ["launcher=submitit", "launcher.cluster=slurm"], False),
        (["hydra.mode=MULTIRUN", "a=1,2"], ["a=1,2"], True),
        (["hydra.run.dir=some/where"], ["runs_root=some", "out_dir=where"], False),
        (["hydra.sweep.dir=some/where"], [], False),
        (["hydra.verbose=true", "sae=topk"], ["hydra.verbose=true", "sae=topk"], False),
    ],
)
def test_options_of_hydra_mean_what_its_documentation_says(typed, ours, sweep):
    assert translate(typed, multirun=False) == (ours, sweep)


def test_the_folder_of_a_multirun_is_hydras():
    typed = ["hydra.sweep.dir=a/b", "hydra.run.dir=c/d"]
    assert translate(typed, multirun=True) == (["runs_root=a", "out_dir=b"], True)


@pytest.mark.parametrize("launcher", LAUNCHERS.values(), ids=LAUNCHERS)
def test_hydras_launchers_are_ours(launcher):
    assert options_of(CONF, "launcher", launcher)


@pytest.mark.parametrize(
    "typed",
    [
        ["hydra/launcher=dask"],
        ["hydra/sweeper=optuna"],
        ["hydra.sweeper.n_trials=3"],
        ["hydra.launcher.n_jobs=2"],
        ["-m", "--cfg", "job"],
        ["--config-name=other"],
    ],
)
def test_options_of_hydra_without_a_counterpart_are_answered_in_one_line(capsys, typed):
    assert main(typed, plan="variants", extra=[], conf=CONF) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_info_takes_a_topic_or_none():
    assert parse(["--info", "defaults", "sae=topk"]).flags == ["--info=defaults"]
    assert parse(["--info", "sae=topk"]) == (["sae=topk"], False, ["--info=all"])


def test_the_shell_completes_keys_and_choices():
    assert "@hydra.main" in (ROOT / "experiment.py").read_text(), "bash looks for it"
    for line, completed in (("sae=batch", "sae=batch_topk"), ("fit.train.lo", "log_every=")):
        answer = subprocess.run(
            [sys.executable, "experiment.py", "-sc", "query=bash"],
            cwd=ROOT,
            env={**os.environ, "COMP_LINE": f"python experiment.py {line}"},
            capture_output=True,
            text=True,
            check=True,
        )
        assert completed in answer.stdout


@pytest.mark.parametrize("key", ["sae.model.k", "sae.model.target_l0"])
def test_a_sparsity_that_is_typed_twice_is_refused(key: str) -> None:
    name = {"sae.model.k": "batch_topk", "sae.model.target_l0": "jumprelu"}[key]
    typed = [f"sae={name}", "sae.target_l0=16"]
    with pytest.raises(UserError, match=f"sae.target_l0=16 and {key}=40 contradict each other"):
        compose_checked(CONF, [*typed, f"{key}=40"])
    compose_checked(CONF, [*typed, f"{key}=16"])
    cfg, _ = compose_checked(CONF, [f"sae={name}", f"{key}=40"])
    assert OmegaConf.select(cfg, key) == 40

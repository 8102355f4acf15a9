"""Generated command lines and edited YAML files: each is run, or refused in one line with
status 2; never a traceback, never a folder.
"""

from __future__ import annotations

import collections
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from sae_experiments.cli.main import main
from sae_experiments.config.compose import compose_checked
from sae_experiments.flatten import flatten
from support.common import CONF

WORDS = (
    "0 1 -1 2 3.5 -0.0 1e-3 1e300 -1e300 99999999999999999999 1e999 nan inf -inf true false null"
    " True None yes '' \"\" ' ' abc ü 日本語 🦆 a\u0301 [] [1] [1,2] [a,b] [[1]] {} {a:1} {a:{b:c}}"
    " [ ] { } [1 1,2 ( ) a=b == = , ; : # \\ / ../x /etc/passwd ~ * ? ${out_dir} ${nosuch}"
    " ${oc.env:HOME} ${oc.env:NO_SUCH_VARIABLE} ${ $x range(3) choice(1,2) glob(*) interval(0,1)"
    " sort(3,1) int(3) str(1) @x x@y a.b.c 0x10 1_000 1e 1.2.3 +1 %00 \x00 \x7f"
)
VALUES = WORDS.split(" ")
GROUPS = (
    "preset",
    "data",
    "sae",
    "metric",
    "track",
    "study",
    "lm",
    "fit",
    "launcher",
    "sweep",
    "search",
    "plan",
    "plot",
)
FORMS = ("{k}={v}",) * 16 + (
    "--{k}={v}",
    "--{k} {v}",
    "+{k}={v}",
    "++{k}={v}",
    "~{k}",
    "{k}",
    "{k} = {v}",
    "{k}:{v}",
    "={v}",
    "--{k}",
    "-{k}={v}",
    "{k}@_global_={v}",
)


class ReachedCompute(Exception):
    """It was accepted: the run would have begun."""


@pytest.fixture
def typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Type a command line; what comes back is "runs", "refused", or what is wrong with the
    answer.
    """
    here = tmp_path / "here"
    here.mkdir()

    def begin(study: Any, settings: Any, *rest: Any) -> str:
        study.check()
        assert settings.folder.resolve().is_relative_to(
            Path(settings.config["runs_root"]).resolve()
        ), settings.folder
        raise ReachedCompute

    def begin_sweep(self: Any, jobs: Any, here: Any) -> None:
        raise ReachedCompute

    monkeypatch.setattr("sae_experiments.runner.run.run", begin)
    monkeypatch.setattr("sae_experiments.sweeps.jobs.Jobs.run", begin_sweep)
    monkeypatch.chdir(here)
    monkeypatch.setenv("SAE_CACHE", str(here / "cache"))

    def type_(argv: list[str], conf: Path = CONF) -> str:
        try:
            status = main(argv, plan="variants", extra=[], conf=conf)
        except ReachedCompute:
            return "runs"
        except BaseException as error:  # whatever escapes is what this test is about
            return f"{type(error).__name__}: {error}"
        finally:
            left = [p.name for p in here.iterdir()]
            shutil.rmtree(here / "runs", ignore_errors=True)
        said = capsys.readouterr()
        if left:
            return f"left {left}"
        if status == 0 and not said.err:
            return "runs"
        fine = (
            status == 2
            and said.err.startswith("error: ")
            and said.err.count("\n") == 1
            and "Traceback" not in said.err + said.out
        )
        return "refused" if fine and len(said.err) < 1500 else f"status {status}: {said.err[-500:]}"

    return type_


def misspelt(key: str, chance: random.Random) -> str:
    at = chance.randrange(len(key))
    return chance.choice(
        [
            key[:at] + key[at + 1 :],
            key[:at] + chance.choice("xü._ ") + key[at:],
            key.upper(),
            f"{key}.{key}",
            key.rsplit(".", 1)[-1],
        ]
    )


def near(value: Any, chance: random.Random) -> str:
    """A value a person may well try in place of ``value``."""
    if isinstance(value, bool) or value is None:
        return chance.choice(["true", "false", "null", "1"])
    if isinstance(value, int):
        return str(
            chance.choice([value, value + 1, value * 2, value // 2, value - 1, value * 1000])
        )
    if isinstance(value, float):
        return repr(chance.choice([value, value * 2, value / 3, value + 1]))
    return str(value).replace(" ", "") if chance.random() < 0.8 else chance.choice(VALUES)


def command_line(chance: random.Random, keys: dict[str, Any]) -> list[str]:
    argv = ["preset=smoke"] if chance.random() < 0.9 else []
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        key = chance.choice(list(keys)) if chance.random() < 0.85 else chance.choice(GROUPS)
        value = near(keys.get(key, "x"), chance) if chance.random() < 0.5 else chance.choice(VALUES)
        key = misspelt(key, chance) if chance.random() < 0.1 else key
        argv += chance.choice(FORMS).format(k=key, v=value).split(" ", 1)
    if chance.random() < 0.05:
        argv += ["-m"]
    return argv


def all_keys() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for overrides in (
        ["sae=[topk]"],
        ["study=palindrome"],
        ["study=superposition"],
        ["track=wandb"],
        ["sae=[matryoshka]"],
    ):
        found |= flatten(
            OmegaConf.to_container(
                compose_checked(CONF, ["preset=smoke", *overrides])[0], resolve=False
            ),
            branches=True,
        )
    return {key: found[key] for key in sorted(found) if not key.startswith(("saes", "study."))}


def try_many(typed: Callable[..., str], n: int, seed: int) -> collections.Counter[str]:
    chance, keys = random.Random(seed), all_keys()
    answers: collections.Counter[str] = collections.Counter()
    wrong: list[Any] = []
    for _ in range(n):
        argv = command_line(chance, keys)
        answer = typed(argv)
        answers[answer if answer in ("runs", "refused") else "wrong"] += 1
        if answer not in ("runs", "refused"):
            wrong.append((argv, answer))
    assert not wrong, "\n".join(map(str, wrong[:25]))
    return answers


def test_some_generated_command_lines(typed):
    try_many(typed, 8, seed=1)


@pytest.mark.slow
def test_a_thousand_generated_command_lines(typed, capsys):
    answers = try_many(typed, 1000, seed=2)
    with capsys.disabled():
        print(
            f"\ncommand lines tried: {answers.total()}, {answers['runs']} accepted,"
            f" {answers['refused']} refused in one line"
        )
    assert answers["runs"] > 50 and answers["refused"] > 500


def edit(text: str, chance: random.Random) -> str:
    """One thing a person does to a YAML file in a hurry."""
    lines = text.splitlines()
    at = chance.randrange(len(lines))
    line = lines[at]
    key = line.split(":")[0] if ":" in line else line
    lines[at : at + 1] = chance.choice(
        [
            [],
            [line, line],
            [f"{key}: {chance.choice(VALUES)}"],
            [f" {line}"],
            [f"\t{line}"],
            [line[: len(line) // 2]],
            [f"{line} {{"],
            [f"{line}: x"],
            [f"{key}:", "  nested: 1"],
            [line.replace("_target_: ", "_target_: no.such.")],
            [line.replace("_target_: sae_experiments", "_target_: os")],
            [f"- {line}"],
            ["<<<<<<< HEAD", line],
            [f"{key}: !!python/object:os.system 'true'"],
            [line[::-1]],
            ["ü" + line],
            [f"{key}: [1, 2"],
        ]
    )
    return "\n".join(lines) + "\n"


def try_edits(
    typed: Callable[..., str], tmp_path: Path, n: int, seed: int
) -> collections.Counter[str]:
    chance, conf = random.Random(seed), tmp_path / "conf"
    shutil.copytree(CONF, conf)
    shutil.copy(CONF.parent / "experiment.py", tmp_path)
    files = [
        *(conf / "sae").glob("topk.yaml"),
        *(conf / "data").glob("text8.yaml"),
        *conf.glob("*.yaml"),
    ]
    files += [
        conf / name
        for name in (
            "preset/smoke.yaml",
            "lm/gpt2_char.yaml",
            "fit/default.yaml",
            "study/language.yaml",
            "metric/sparsity.yaml",
        )
    ]
    files += [conf / name for name in ("sae/_base.yaml", "plan/variants.yaml", "track/none.yaml")]
    answers: collections.Counter[str] = collections.Counter()
    wrong: list[Any] = []
    for _ in range(n):
        path = chance.choice(files)
        before = path.read_text()
        path.write_text(edit(before, chance))
        answer = typed(
            ["preset=smoke", "sae=topk", "data=[text8]", "metric=[sparsity]", "out_dir=run_1"], conf
        )
        answers[answer if answer in ("runs", "refused") else "wrong"] += 1
        if answer not in ("runs", "refused"):
            wrong.append(
                (
                    path.name,
                    [
                        line
                        for line in path.read_text().splitlines()
                        if line not in before.splitlines()
                    ],
                    answer,
                )
            )
        path.write_text(before)
    assert not wrong, "\n".join(map(str, wrong[:25]))
    return answers


def test_some_edits_of_yaml_files(typed, tmp_path):
    try_edits(typed, tmp_path, 5, seed=1)


@pytest.mark.slow
def test_three_hundred_edits_of_yaml_files(typed, tmp_path, capsys):
    answers = try_edits(typed, tmp_path, 300, seed=2)
    with capsys.disabled():
        print(
            f"\nedits of YAML files tried: {answers.total()}, {answers['runs']} accepted,"
            f" {answers['refused']} refused in one line"
        )

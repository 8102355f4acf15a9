"""Options that are text mean what was typed: in plans, single runs, sweeps and their jobs
alike, whatever the characters.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any

import pytest
import yaml

from sae_experiments.cli.main import main, parse
from sae_experiments.config.axes import axes_of
from sae_experiments.config.checks import parse as parse_overrides
from sae_experiments.config.typed import (
    PLACES,
    TEXTS,
    choices_of,
    for_hydra,
    is_text,
    last_text,
    text_of,
    value_of,
    written,
)
from sae_experiments.errors import UserError
from sae_experiments.sweeps import jobs as sweeps
from sae_experiments.sweeps.launchers import Job, Local
from support.common import CONF, ROOT

PLANNED = yaml.safe_load((CONF / "plan" / "variants.yaml").read_text())["runs"]
#: What people call things, and what Hydra, YAML, shells or file systems may take for something
#: else.
KNOWN = (
    "run_0",
    "run_1",
    "./run_2/",
    "run_3/.",
    "2026_11_27",
    "2026_1_12",
    "2026_11_2",
    "1e5",
    "1_000",
    "007",
    "0x10",
    "1.0",
    "-1",
    "+1",
    "inf",
    "-inf",
)
KNOWN += (
    "nan",
    "true",
    "False",
    "yes",
    "null",
    "None",
    "~",
    "[a,b]",
    "[]",
    "{a:b}",
    "(x)",
    "a,b",
    "a=b",
    "a==b",
    "=",
    ",",
    ":",
    "a:b",
    "#",
    "a#b",
    "ü",
)
KNOWN += (
    "日本",
    "🦆",
    "a\u0301",
    "Ł ó",
    "a b",
    " a",
    "a ",
    "it's",
    "'",
    '"',
    "''",
    '"a"',
    "'a'",
    "a\\ b",
    "\\",
    "a\\",
    "c:\\d",
    "$x",
    "$",
    "${",
    "${out_dir}",
)
KNOWN += (
    "${oc.env:HOME}",
    "%d",
    "%00",
    "*",
    "?",
    "!",
    "&",
    "|",
    ";",
    "<x>",
    "@x",
    "x@y",
    "choice(a,b)",
    "range(3)",
    "interval(0,1)",
    "glob(*)",
    "tag(a,b)",
)
KNOWN += (
    "a.b.c",
    "..",
    ".",
    "../x",
    "a/../b",
    "/tmp/x",
    "a/b",
    "a//b",
    "-m",
    "--help",
    "+x",
    "++x",
    "",
    " ",
    "\t",
    "a\nb",
    "\x7f",
    "x" * 300,
    "é" * 200,
)
KNOWN += (
    "\udc80",
    "run_1\u200b",
    "RUN_1",
    "run_01",
    "out_dir=run_1",
    "label",
    "~nosuchuser/x",
    "\\'",
    '\\"',
    "a'b\"c",
)
READ = ("data.text8.file", "study.upstream.sae")
LETTERS = "ab1_ .-+=,:;#'\"\\$@%~()[]{}<>&|!?*^`/üñ日🦆\u0301\u2028"


def names(n: int, seed: int) -> list[str]:
    """``n`` names, the known ones first."""
    chance = random.Random(seed)
    made = (
        "".join(chance.choice(LETTERS) for _ in range(chance.randrange(1, 12))) for _ in range(n)
    )
    return [*KNOWN, *made][:n]


def quoted(text: str, mark: str) -> str:
    """``text`` between quotes, as Hydra's documentation says: a backslash before a quote, and
    before those that stand before one.
    """
    out, slashes = "", 0
    for c in text:
        out += "\\" * (slashes + 1) if c == mark else ""
        out += c
        slashes = slashes + 1 if c == "\\" else 0
    return mark + out + "\\" * slashes + mark


def ways(text: str) -> dict[str, bool]:
    """How a text may be typed, and whether that is certain to mean it (a text with its own
    quotes may lose them).
    """
    plain = text == text.strip() and text[:1] not in ("'", '"') and text.lower() != "null"
    return {text: plain, quoted(text, '"'): True, quoted(text, "'"): True}


def may_be(key: str, text: str) -> bool:
    """Whether ``text`` can be the value of ``key`` at all."""
    if any(ord(c) < 32 or ord(c) == 127 or 0xD800 <= ord(c) < 0xE000 for c in text) or "${" in text:
        return False
    if key in PLACES and not text.strip():
        return False
    if key in (*PLACES, *READ) and any(len(p.encode()) > 255 for p in PurePath(text).parts):
        return False
    if text.startswith("~") and key in ("runs_root", "cache", *READ):
        return text == "~" or text.startswith("~/")
    parts = PurePath(text).parts
    return key != "out_dir" or not (PurePath(text).is_absolute() or ".." in parts or not parts)


def read(key: str, typed: str) -> Any:
    """What comes out of the reader and of Hydra, which must agree; the error where it is
    refused.
    """
    try:
        text = text_of(f"{key}={typed}")
    except UserError as error:
        told = str(error)
        return error if "\n" not in told and key in told and error.exit_status == 2 else told
    (parsed,) = parse_overrides([f"{key}={typed}"])
    assert parsed.value() == text and parsed.key_or_group == key
    return text


@pytest.mark.parametrize(
    "key",
    [
        "out_dir",
        "label",
        "cache",
        "runs_root",
        "data.text8.file",
        "study.upstream.sae",
        "track.project",
    ],
)
def test_five_hundred_names_are_read_as_they_were_typed_or_refused_in_one_line(key):
    refused = 0
    for text in names(500, seed=len(key)):
        for typed, certain in ways(text).items():
            found = read(key, typed)
            refused += isinstance(found, UserError)
            if certain and may_be(key, text):
                assert found == text, (typed, found)
            elif (
                certain and key != "out_dir"
            ):  # whether a folder lies below runs_root is looked at later
                assert isinstance(found, UserError), (typed, found)
    assert refused < 300


def test_null_is_none_where_there_may_be_none_and_a_name_only_in_quotes():
    assert text_of("label=null") is None and text_of("data.text8.file=null") is None
    assert text_of('label="null"') == "null" and for_hydra("label='null'") == 'label="null"'
    for key in PLACES:
        with pytest.raises(UserError, match=f"{key}=null must be a text"):
            text_of(f"{key}=null")


def test_a_prompt_keeps_its_spaces():
    assert [text_of(f"lm.prompt={t}") for t in (" ", " a ", "5", "' '", "a\nb")] == [
        " ",
        " a ",
        "5",
        " ",
        "a\nb",
    ]
    assert [text_of(f"label={t}") for t in (" a ", "' a '")] == ["a", " a "]


@pytest.mark.parametrize("text", [t for t in names(200, seed=9) if may_be("label", t)])
def test_what_is_written_for_a_job_is_read_as_it_was_meant(text):
    assert text_of(written("label", text)) == text
    assert text_of(for_hydra(written("label", text))) == text


def test_other_options_are_left_to_hydra():
    for override in (
        "sae.target_l0=[1,2]",
        "seeds=[0]",
        "~metric",
        "+x=1",
        "sae.model.noise='a b'",
        "data.text8.head=5",
    ):
        assert for_hydra(override) == override
    assert (
        for_hydra("++label=1e5") == '++label="1e5"'
        and for_hydra("out_dir = 1_0") == 'out_dir="1_0"'
    )
    assert not is_text("data.text8.seeds") and all(is_text(key.replace("*", "x")) for key in TEXTS)
    assert value_of("preset='smoke'") == "smoke"


# ------------------------------------------------------------------------------ whole command lines


class Began(Exception):
    """The run would have begun; its settings, and the SAE's class."""


@pytest.fixture
def typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Any]:
    """Type a command line: what comes back are the settings of the run that would begin, or the
    one line of the error.
    """
    here = tmp_path / "here"
    here.mkdir()

    def begin(study: Any, settings: Any, *rest: Any) -> None:
        raise Began(settings, next(iter(study.saes)))

    monkeypatch.setattr("sae_experiments.runner.run.run", begin)
    monkeypatch.chdir(here)
    monkeypatch.setenv("SAE_CACHE", "elsewhere")

    def type_(*argv: str, conf: Path = CONF) -> Any:
        try:
            status = main(["preset=smoke", *argv], plan="variants", extra=[], conf=conf)
        except Began as began:
            return began.args
        finally:
            assert not list(here.iterdir())
        said = capsys.readouterr().err
        assert status == 2 and said.startswith("error: ") and said.count("\n") == 1, said
        return said

    return type_


def check(typed: Callable[..., Any], text: str, most: int = 2) -> bool:
    """All text options at once are ``text``, and so is what is looked up in the plan; or the
    line names what is wrong.
    """
    keys = ("out_dir", "label", "cache", "runs_root", "data.text8.file")
    for way in [way for way, certain in ways(text).items() if certain][:most]:
        found = typed(*(f"{key}={way}" for key in keys))
        if not all(may_be(key, text) for key in keys):
            assert isinstance(found, str) and any(key in found for key in keys), (way, found)
            return False
        settings, sae_spec = found
        assert settings.folder == Path(text).expanduser() / text
        assert settings.label == (text or sae_spec) and settings.cache == Path(text).expanduser()
        assert settings.config["data"]["text8"]["file"] == text
        planned = next(
            (o.removeprefix("sae=") for o in PLANNED.get(str(PurePath(text)), [])), "standard"
        )
        assert sae_spec == planned, (way, sae_spec)
        assert json.loads(json.dumps(settings.about))["overrides"]
    return True


@pytest.mark.parametrize(
    "text",
    [
        "run_2",
        "./run_3/",
        "2026_11_2",
        "1e5",
        "true",
        "[a,b]",
        "ü#日本 🦆",
        "a,b='c' \"d\"\\",
        "null",
        "../x",
        "a\nb",
    ],
)
def test_every_way_to_type_a_name_is_one_reader_everywhere(typed, text):
    check(typed, text)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(5))
def test_five_hundred_whole_command_lines(typed, part):
    made = names(500, seed=5)[100 * part : 100 * (part + 1)]
    assert sum(check(typed, text, most=1) for text in made) > 30


def test_folders_that_hydra_took_for_one_are_two(typed):
    assert typed("out_dir=2026_1_12")[0].folder != typed("out_dir=2026_11_2")[0].folder


def test_several_values_in_a_single_run_are_told_apart_from_a_list(typed):
    said = typed("seeds=0,1")
    assert "seeds=[0,1]" in said and "-m" in said and "Sweep" not in said
    assert "sae=[topk,gated]" in typed("sae=topk,gated")


@pytest.mark.parametrize(
    "argv", ["site=ü", "sae.model.coeff=#", "metric=[日本]", "verbosity=a{b}", "sae.target_l0=🦆"]
)
def test_what_hydra_cannot_read_is_one_line_that_says_what_to_do(typed, argv):
    said = typed(argv)
    assert argv.split("=")[0] in said and "Exception" not in said and "quotes" in said


def test_text_in_a_file_is_text_as_well(typed, tmp_path):
    conf = tmp_path / "conf"
    shutil.copytree(CONF, conf)
    path = conf / "config.yaml"
    for line, now in (
        ("out_dir: run_0", "out_dir: 2026_11_2"),
        ("label: null", "label: 1e5"),
        ("runs_root: runs", "runs_root: null"),
    ):
        path.write_text((CONF / "config.yaml").read_text().replace(line, now))
        said = typed("verbosity=quiet", conf=conf)
        assert now.split(":")[0] in said and "quotes" in said


# ------------------------------------------------------------------------------ sweeps


@pytest.mark.usefixtures("quick_start")
def test_the_jobs_of_a_sweep_get_the_names_as_they_were_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    n = 0
    for text in names(120, seed=3):
        if (
            not all(may_be(key, text) for key in ("out_dir", "label", "runs_root", "cache"))
            or "," in text
        ):
            continue
        for way in [way for way, certain in ways(text).items() if certain]:
            n += 1
            overrides = [
                "preset=smoke",
                "sae=topk,gated",
                *(
                    f"{key}={way}"
                    for key in ("out_dir", "label", "runs_root", "cache", "data.text8.file")
                ),
            ]
            asked = sweeps.asked_for(CONF, overrides)
            assert asked.root == Path(text).expanduser() / text
            axes, fixed = axes_of(CONF, asked.overrides)
            assert [axis.key for axis in axes] == ["sae"]
            jobs = object.__new__(sweeps.Jobs)
            jobs.asked, jobs.fixed, jobs.script = asked, fixed, ROOT / "experiment.py"
            again = parse(jobs.job(0, ["sae=topk"]).command[2:]).overrides
            assert last_text(again, "out_dir") == f"{PurePath(text)}/topk"
            assert {
                last_text(again, key) for key in ("label", "runs_root", "cache", "data.text8.file")
            } == {text}
    assert n > 80


def test_input_files_are_varied_with_choice_and_a_comma_alone_is_asked_about():
    axes, fixed = axes_of(
        CONF,
        [
            "data.text8.file=choice(1e5, 'a,b' ,\"c d\")",
            "label=a,b",
            "out_dir=choice(a,b)",
            "data.enwik8.file='a,b'",
        ],
    )
    assert [text_of(f"{a.key}={c}") for a in axes for c in a.choices] == ["1e5", "a,b", "c d"]
    assert fixed == ["label=a,b", "out_dir=choice(a,b)", "data.enwik8.file='a,b'"]
    with pytest.raises(UserError, match=r"choice\(a.txt,b.txt\)"):
        axes_of(CONF, ["data.text8.file=a.txt,b.txt"])
    with pytest.raises(UserError, match="names no file"):
        choices_of("data.text8.file=choice( )")


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_launcher_hands_on_every_character(tmp_path, at_once):
    words = [text for text in KNOWN if may_be("label", text)]
    code = "import json, sys; print(json.dumps(sys.argv[1:]))"
    jobs = [
        Job(
            i,
            f"j{i}",
            [],
            [sys.executable, "-S", "-c", code, *words],
            tmp_path / f"ü # [{i}]" / "j.log",
        )
        for i in range(2)
    ]
    Local(jobs=at_once, threads=1, devices=None, first_alone=False).run(
        jobs, lambda job, how: None, lambda argv: 0
    )
    for job in jobs:
        assert json.loads(job.log.read_text()) == words

"""What README says is so: its commands parse, its example runs, its files exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sae_experiments.cli.main import parse
from sae_experiments.config.compose import compose_checked
from sae_experiments.config.plans import complete

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
USING = (ROOT / "docs" / "using.md").read_text(encoding="utf-8")
COMMANDS = [
    line.split("#")[0].strip()
    for line in (README + USING).splitlines()
    if re.match(r"(\.venv/bin/)?python experiment\.py ", line)
]


@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if " -m " not in c and " sweep=" not in c and "--help" not in c]
)
def test_every_command_of_the_readme_composes(command):
    import shlex

    argv = [a for a in shlex.split(command)[2:] if "=" in a]
    overrides, _ = complete(
        parse(argv).overrides, plan="variants", extra=["preset=laptop"], conf=ROOT / "conf"
    )
    compose_checked(ROOT / "conf", overrides)


def test_there_are_commands_to_check():
    assert len(COMMANDS) >= 5


def test_the_notebook_example_runs(tmp_path, monkeypatch):
    code = re.search(r"```python\n(.*?)```", README, re.S).group(1)
    assert len(code.strip().splitlines()) <= 12
    monkeypatch.chdir(tmp_path)
    small = (
        code.replace("200_000", "6_000")
        .replace("20_000", "1_000")
        .replace("steps=500", "steps=5, batch_size=256")
    )
    exec(small, {})
    assert (tmp_path / "my_sae" / "cfg.json").is_file()


def test_the_files_that_the_pages_name_exist():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    pattern = r"`((?:sae_experiments|conf|tests|benchmarks)/[\w/.]+\.(?:py|yaml|md|c))`"
    for page in pages:
        for name in re.findall(pattern, page.read_text(encoding="utf-8")):
            assert (ROOT / name).is_file(), f"{page.name}: {name}"


@pytest.mark.parametrize("result", ["superposition", "superposition_no_compiler"])
def test_the_speed_of_the_superposition_sweep_stands_in_a_result_file(result):
    text = (ROOT / "docs" / "superposition.md").read_text(encoding="utf-8")
    row = next(
        line
        for line in text.splitlines()
        if line.startswith("|") and f"(../benchmarks/results/{result}.md)" in line
    )
    claimed = row.strip("| ").split(" | ")[1:5]
    table = (ROOT / "benchmarks" / "results" / f"{result}.md").read_text(encoding="utf-8")
    measured = dict(
        re.findall(
            r"^\| (\w[\w ]*) \|.*\| \**([\d.]+)\** \|$", table.partition("Agreement")[0], re.M
        )
    )
    assert claimed == [
        measured[name] for name in ("exclusive", "early_stopping", "control", "all three")
    ]


def test_the_readme_is_short_and_its_links_lead_somewhere():
    assert len(README.split()) <= 800
    for target in re.findall(r"\]\(([^)#]+)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_the_report_that_is_shipped_is_small_and_names_no_path_of_a_machine():
    path = ROOT / "docs" / "report" / "run_0.html"
    text = path.read_text(encoding="utf-8")
    assert path.stat().st_size <= 2_000_000
    assert not re.search(r"/(work|tmp|root|home|Users)\b", text, re.IGNORECASE)
    assert "Content-Security-Policy" in text and 'id="cell-2"' in text
    assert "rebuilds best on shakespeare_char" in text, "several SAEs, and the best of them named"

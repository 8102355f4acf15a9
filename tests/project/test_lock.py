"""The versions that `make run` and `make test` install: complete, for every Python, from
nowhere in particular.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
LINES = [
    line
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line.strip() and not line.startswith("#")
]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def project() -> list[Requirement]:
    """What pyproject.toml asks for, the test extra included (Python 3.10 has no reader of TOML)."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lists = [
        re.search(rf"^{name} = \[(.*?)\]$", text, re.MULTILINE | re.DOTALL)
        for name in ("dependencies", "test")
    ]
    return [
        Requirement(each) for found in lists if found for each in re.findall(r'"([^"]+)"', found[1])
    ]


def chosen(python: str, system: str = "linux") -> dict[str, str]:
    """Package -> version of the lines that hold for this Python on this system."""
    here = {"python_version": python, "python_full_version": f"{python}.1", "sys_platform": system}
    here |= {"platform_machine": "x86_64", "platform_system": system.title()}
    found: dict[str, str] = {}
    for line in map(Requirement, LINES):
        if line.marker is None or line.marker.evaluate(here):
            assert line.name not in found, f"{line.name} twice for Python {python}"
            found[line.name] = str(line.specifier).removeprefix("==")
    return found


@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_has_one_version_that_pyproject_allows(python):
    found = chosen(python)
    assert len(project()) > 15
    for wanted in project():
        assert wanted.specifier.contains(found[wanted.name]), (wanted, found[wanted.name])


def test_a_line_is_a_name_and_a_version_and_says_nothing_of_where_it_comes_from():
    for line in LINES:
        assert re.fullmatch(r"[a-z0-9-]+==[0-9][^\s/:@+]*( ; [^/:@]+)?", line), line


def test_torch_is_a_version_that_has_no_build_in_its_name():
    """A build for one accelerator would force it on every machine; 2.13.0 is whatever build is
    at hand.
    """
    assert {chosen(python)["torch"] for python in PYTHONS} == {"2.13.0"}


def test_the_makefile_installs_with_it_and_makes_it():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("install", "testing"):
        recipe = re.search(
            rf"^\$\(VENV\)/\.{target if target == 'testing' else 'installed'}:.*\n\t(.*)",
            text,
            re.MULTILINE,
        )
        assert recipe and "$(LOCKED)" in recipe[1]
    assert "PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt" in text
    assert re.search(r"^lock:.*\n(\t.*\n)*\t.*--universal", text, re.MULTILINE)

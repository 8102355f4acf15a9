"""AGENTS.md is so: its commands and plans exist, its two lines are those of experiment.py, and
results look as it says.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sae_experiments.config.compose import compose_checked
from sae_experiments.config.plans import complete

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "AGENTS.md").read_text(encoding="utf-8")
PLANS = re.findall(r"^\| .* \| `(\w+)` \|$", PAGE, re.M)


def test_every_plan_is_named_and_every_named_plan_composes():
    assert sorted(PLANS) == sorted(p.stem for p in (ROOT / "conf" / "plan").glob("*.yaml"))


@pytest.mark.parametrize("plan", PLANS)
def test_the_baseline_of_every_plan_needs_no_further_argument(plan):
    overrides, _ = complete(
        ["out_dir=run_0"], plan=plan, extra=["preset=smoke"], conf=ROOT / "conf"
    )
    compose_checked(ROOT / "conf", overrides)


def test_the_two_lines_are_those_of_the_script():
    script = (ROOT / "experiment.py").read_text(encoding="utf-8")
    for line in re.findall(r"^(?:PLAN|OVERRIDES).*?(?=\s+#)", PAGE, re.M):
        assert line.split("=")[0].strip() in [
            s.split("=")[0].strip() for s in script.splitlines()
        ], line
    assert 'PLAN = "variants"' in script


def test_the_example_overrides_compose():
    example = json.loads(re.search(r"as if typed: (\[.*?\])", PAGE).group(1))
    overrides, _ = complete(
        ["out_dir=x", *example], plan="variants", extra=["preset=smoke"], conf=ROOT / "conf"
    )
    compose_checked(ROOT / "conf", overrides)


def test_the_page_fits_a_page():
    assert len(PAGE.splitlines()) <= 70
    for name in re.findall(r"`((?:sae_experiments|conf|tests)/[\w/.]+\.(?:py|yaml))`", PAGE):
        assert (ROOT / name).is_file(), name

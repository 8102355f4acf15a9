"""Differences between two runs: what a person chose, and every recorded setting."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from sae_experiments.flatten import flatten
from sae_experiments.results import names
from sae_experiments.results.records import RESULT_NEUTRAL_KEYS
from sae_experiments.results.runs import Run, mapping

ABSENT = "(absent)"
NOT_CHOSEN = "-"
AROUND = ("preset", "device", "git", "versions")
#: Overrides that have a line of their own.
NAMED = ("preset", "data", "sae", "study")


class Difference(NamedTuple):
    """A setting or choice in which a run differs from the baseline."""

    key: str
    baseline: str
    run: str


def chosen_differences(run: Run, baseline: Run) -> list[Difference]:
    """Choices in which two runs differ: preset, corpora, SAEs, overrides, then code and device."""
    mine, theirs = choices(run), choices(baseline)
    return _differences(mine, theirs, NOT_CHOSEN, [*mine, *theirs])


def choices(run: Run) -> dict[str, str]:
    """Choices of a person for a run, in a few words each."""
    config, git = run.whole_config, mapping(run.manifest.get("git"))
    study = mapping(config.get("study")).get("_target_")
    named = {
        "preset": run.preset,
        "study": str(study).split(".")[-2] if study and "." in str(study) else "",
        "corpora": ", ".join(_corpora(config.get("data"))),
        "SAE": ", ".join(names.sae_configs(config)) or names.only_sae(run.manifest),
    }
    around = {
        "device": str(run.manifest.get("device") or ""),
        "code": str(git.get("commit") or "")[:7] + (" with changes" if git.get("dirty") else ""),
    }
    return {key: value for key, value in (named | _overrides(run) | around).items() if value}


def _corpora(data: Any) -> list[str]:
    return [str(name) for name in data] if isinstance(data, (dict, list)) else []


def _overrides(run: Run) -> dict[str, str]:
    """The overrides of the command line and the plan, the last of each key."""
    given = run.manifest.get("overrides")
    chosen: dict[str, str] = {}
    for override in given if isinstance(given, list) else []:
        key, _, value = str(override).lstrip("+").partition("=")
        if key not in NAMED and key.split(".")[0] not in RESULT_NEUTRAL_KEYS:
            chosen[key] = value
    return chosen


def config_diff(run: Run, baseline: Run) -> list[Difference]:
    """Every recorded setting that differs: configuration, preset, device, code and versions."""
    mine, theirs = _recorded(run), _recorded(baseline)
    return _differences(mine, theirs, ABSENT, sorted(mine.keys() | theirs.keys()))


def _differences(
    mine: Mapping[str, str], theirs: Mapping[str, str], absent: str, keys: list[str]
) -> list[Difference]:
    pairs = [
        Difference(key, theirs.get(key, absent), mine.get(key, absent))
        for key in dict.fromkeys(keys)
    ]
    return [pair for pair in pairs if pair.baseline != pair.run]


def flat_config(config: Mapping[str, Any]) -> dict[str, str]:
    """`{"a": {"b": 1}}` as `{"a.b": "1"}`, sorted by key; values other than text are JSON."""
    flat = flatten(config, lists=True)
    return {
        key: flat[key] if isinstance(flat[key], str) else json.dumps(flat[key], default=str)
        for key in sorted(flat)
    }


def _recorded(run: Run) -> dict[str, str]:
    config = {k: v for k, v in run.whole_config.items() if k not in RESULT_NEUTRAL_KEYS}
    around = {key: run.manifest[key] for key in AROUND if key in run.manifest}
    return flat_config(around) | flat_config(config)

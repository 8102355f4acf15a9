"""Conditions of a measurement, and those in which two runs differ.

Every cell records its conditions as facts: a number, a word, or a flat dict of these for each name
in `CONDITIONS`. Facts may hold `evaluations`, a list of `{"metrics": [names], ...}` with the
conditions of these metrics alone, and `weights`, a digest of the language model's parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

CONDITIONS = (
    "vocabulary",  # number of symbols: losses are a symbol
    "text",  # a digest of the symbols and of their split
    "language model",  # its recipe and code, or the files it was loaded from
    "toy models",  # the same for the models of study=superposition
    "site",  # where the SAE reads and what it rebuilds
    "context",  # symbols in a window
    "held-out part",  # of the text, where these rows are: val, search or test
    "held-out rows",  # that the metric looks at
    "store",  # precision in which activations were kept
    "settings",  # the metric's own options
    "replicas",  # further fits that seeds are compared with
    "device",  # what times and speeds were taken on
)
#: Numbers of an SAE on held-out activations: what a metric depends on if it does not say otherwise.
ON_ACTIVATIONS = tuple(name for name in CONDITIONS if name not in ("replicas", "device"))
#: The same with other seeds' SAEs.
WITH_REPLICAS = (*ON_ACTIVATIONS, "replicas")
#: Numbers about a language model: the model is what is measured.
OF_MODEL = ("vocabulary", "text", "context", "settings")
#: The same on the rows that SAEs are evaluated on.
OF_MODEL_ON_ROWS = (*OF_MODEL, "held-out part", "held-out rows")
#: Settings of a language model that do not change the model.
NOT_THE_MODEL = (
    "n_positions",
    "eval_batches",
    "curve_batches",
    "samples",
    "sample_length",
    "prompt",
    "temperature",
    "top_k",
    "compile",
)
#: Seconds and speeds: of a language model, and of an SAE.
OF_MODEL_TIME = ("text", "settings", "device")
OF_SAE_TIME = ("text", "language model", "toy models", "site", "device")

MOST = 2  # differing entries of one condition that are named
Facts = Mapping[str, Any]


def of_metric(facts: Facts, metric: str, name: str) -> Any:
    """The condition `name` under which `metric` was measured; None where it does not apply."""
    groups = facts.get("evaluations")
    for group in groups if isinstance(groups, list) else ():
        if isinstance(group, Mapping) and metric in group.get("metrics", ()) and name in group:
            return group[name]
    return facts.get(name)


def differences(
    metric: str, depends: Iterable[str], mine: Mapping[int, Facts], theirs: Mapping[int, Facts]
) -> list[str]:
    """The conditions of `metric` in which two runs differ, each in a few words.

    Two language models count as the same if their parameters agree in every seed that both runs
    have, however they were made.

    Args:
        metric: Name of the metric.
        depends: Names of the conditions that its value depends on.
        mine: Facts of one run by seed.
        theirs: Facts of the other run by seed.

    Returns:
        For example `["context 128 vs 64"]`; [] if the runs may be compared.
    """
    differing = []
    for name in depends:
        both = tuple(
            _distinct(of_metric(f, metric, name) for f in x.values()) for x in (mine, theirs)
        )
        if _same(*both) or (name == "language model" and _same_weights(mine, theirs)):
            continue
        differing.append(_said(name, *both))
    return differing


def known_differences(depends: Iterable[str], mine: Facts, theirs: Facts) -> list[str]:
    """Conditions that both sides record and in which they differ."""
    differing = []
    for name in depends:
        a, b = mine.get(name), theirs.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            shared = a.keys() & b.keys()
            a, b = ({k: v for k, v in x.items() if k in shared} for x in (a, b))
        if a is not None and b is not None and a != b:
            differing.append(_said(name, [a], [b]))
    return differing


def _distinct(values: Iterable[Any]) -> list[Any]:
    distinct: list[Any] = []
    for value in values:
        if value not in distinct:
            distinct.append(value)
    return distinct


def _same(mine: list[Any], theirs: list[Any]) -> bool:
    return len(mine) == len(theirs) and all(value in theirs for value in mine)


def _same_weights(mine: Mapping[int, Facts], theirs: Mapping[int, Facts]) -> bool:
    shared = mine.keys() & theirs.keys()
    pairs = [(mine[seed].get("weights"), theirs[seed].get("weights")) for seed in shared]
    return bool(pairs) and all(a is not None and a == b for a, b in pairs)


def _said(name: str, mine: list[Any], theirs: list[Any]) -> str:
    """`context 128 vs 64`; of a dict the first entries that differ."""
    if None in mine or None in theirs:
        return f"{name} not recorded by both"
    only_mine = [v for v in mine if v not in theirs] or mine
    only_theirs = [v for v in theirs if v not in mine] or theirs
    a, b = only_mine[0], only_theirs[0]
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return f"{name}: {_differing_entries(a, b)}"
    if name == "text":
        return "texts of other content"
    return f"{name} {', '.join(map(_word, only_mine))} vs {', '.join(map(_word, only_theirs))}"


def _differing_entries(a: Facts, b: Facts) -> str:
    keys = [key for key in dict.fromkeys([*a, *b]) if a.get(key) != b.get(key)]
    parts = [f"{key} {_word(a.get(key))} vs {_word(b.get(key))}" for key in keys[:MOST]]
    more = f" and {len(keys) - MOST} more" if len(keys) > MOST else ""
    return f"{', '.join(parts)}{more}"


def _word(value: Any) -> str:
    """A value in few characters: thousands set apart, digests cut short."""
    if isinstance(value, bool) or value is None:
        return str(value).lower() if value is not None else "none"
    if isinstance(value, (int, float)):
        return f"{value:,}" if isinstance(value, int) else f"{value:g}"
    text = str(value)
    return text if len(text) <= 24 else f"{text[:8]}…"

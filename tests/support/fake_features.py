"""Made-up features and graphs for runs of ``fake_runs``, for the tests of the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sae_experiments.results.records import save_features, save_graphs

WORDS = [
    *("the", "and", "you", "my", "of", "thing", "where", "what", "kind", "eat", "tale", "stone"),
    *("water", "bring", "quiet", "in", "him", "win", "great", "people", "island", "never"),
    *("upon", "walk"),
]
LENGTH = 128  # of a window
#: What must never become anything but text.
HOSTILE = [
    "</script><script>window.hacked = 1</script>",
    '<img src=x onerror="window.hacked = 2">',
    "<svg/onload=window.hacked=3>",
    "&lt;b&gt; &amp;amp; &#60;script&#62; &#x3c;i &nbsp &notanentity; &",
    "{{title}} ${window.hacked=4} {% raw %} \\u003cscript\\u003e",
    "a\u202eevil\u202c b\u2066c\u2069 \u200b\u200d \ufeff \u061c",
    "nul\x00 bell\x07 esc\x1b[31m del\x7f c1\x85\x9b",
    "line\u2028separator\u2029paragraph\r\ntab\tend",
    "lone \ud800 surrogate \udfff and \U000e0001 tag, \uffff",
    "javascript:window.hacked=5 ' \" ` -->  ]]> <!-- <![CDATA[",
    "عربي עברית a\u0301\u0302 \u0301",
]


def text_of(n: int, seed: int = 0) -> str:
    """``n`` characters of words and lines."""
    chance, out = np.random.default_rng(seed), ""
    while len(out) < n:
        out += (
            " ".join(chance.choice(WORDS, chance.integers(3, 11))).capitalize()
            + str(chance.choice([".", "?", ";", "!"]))
            + "\n"
        )
    return out[:n]


def contexts(
    text: str, rows: np.ndarray, chance: np.random.Generator, top: float
) -> list[dict[str, Any]]:
    """Contexts as ``metrics.contexts`` makes them."""
    found = []
    for value, row in zip(
        np.sort(chance.random(len(rows)))[::-1] * top, rows.tolist(), strict=True
    ):
        start = row - row % LENGTH
        begin, end = max(row - 40, start), min(row + 17, start + LENGTH)
        acts: list[float] = [0] * (end - begin)
        acts[row - begin] = float(f"{value:.3g}")
        if row > begin:
            acts[row - begin - 1] = float(f"{value / 3:.3g}")
        found.append(
            {
                "before": text[begin:row],
                "at": text[row],
                "after": text[row + 1 : end],
                "acts": acts,
                "row": row,
            }
        )
    return found


def features_of(
    text: str, n: int, *, seed: int = 0, contexts_of: int = 10, samples: int = 6, tree: bool = False
) -> list[dict[str, Any]]:
    """``n`` latents that fire at random places of ``text``; every tenth is dead."""
    chance, letters, found = np.random.default_rng(seed), sorted(set(text)), []
    for j in range(n):
        if j % 10 == 9:
            found.append({"latent": j, "density": 0.0})
            continue
        top = float(f"{chance.uniform(1, 30):.3g}")
        rows = chance.integers(0, len(text), contexts_of + samples)
        char = [str(c) for c in chance.choice(letters, 24)]
        feature = {
            "latent": j,
            "density": float(f"{10 ** chance.normal(-2.2, 0.6):.3g}"),
            "max": top,
            "mean": top / 3,
            "histogram": chance.poisson(40 * np.exp(-np.arange(24) / 5)).tolist(),
            "top": contexts(text, rows[:contexts_of], chance, top),
            "samples": contexts(text, rows[contexts_of:], chance, top),
            "partners": [[int(k), 0.31] for k in chance.integers(0, n, 6)],
            "promotes": [
                [c, float(f"{v:.3g}")]
                for c, v in zip(char[:8], np.sort(chance.random(8))[::-1] * 3, strict=True)
            ],
            "suppresses": [
                [c, -float(f"{v:.3g}")]
                for c, v in zip(char[8:16], np.sort(chance.random(8))[::-1] * 3, strict=True)
            ],
            "next": [[c, 0.21, 4.2] for c in char[16:]],
            "rule": f"[vowel]{char[0]} or {char[1]}␣",
            "f1": float(f"{chance.random():.3g}"),
            "precision": 0.8,
            "recall": 0.5,
            "lift": 20.0,
            "length": 3,
            "order": 2,
            "r2": 0.8,
            "concept": "first letter of a word",
            "phi": 0.61,
        }
        if j % 10 == 0:
            lines = [[strength, text[j : j + 60]] for strength in (-4.0, 0.0, 4.0)]
            feature["steering"] = {"prompt": text[:8], "texts": lines}
        if tree:
            feature["level"] = 1 if j < n // 4 else 0
            key = "children" if j < n // 4 else "parents"
            other = chance.integers(n // 4, n, 3) if j < n // 4 else chance.integers(0, n // 4, 2)
            feature[key] = [[int(k), float(f"{chance.random():.2g}")] for k in other]
        found.append(feature)
    return found


def hostile_features() -> list[dict[str, Any]]:
    """A latent for each hostile text, which stands in every place that takes text."""
    found = []
    for j, text in enumerate(HOSTILE):
        top = {"before": text, "at": text[0], "after": text, "acts": [0.5] * (2 * len(text) + 1)}
        found.append(
            {
                "latent": j,
                "density": 0.01 * (j + 1),
                "max": 1.0,
                "mean": 0.5,
                "histogram": [3, 2, 1],
                "top": [top, top | {"row": 500 * j + 200}],
                "samples": [top],
                "rule": text,
                "concept": text,
                "f1": 0.5,
                "next": [[c, 0.1, 2.0] for c in text[:8]],
                "promotes": [[text, 1.0]],
                "suppresses": [[text, -1.0]],
                "partners": [[0, 0.1]],
                "steering": {"prompt": text, "texts": [[-4.0, text], [0.0, text]]},
                text: text,
            }
        )
    return found


def graph_of(label: str = "th → e", contexts: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """Two columns of nodes and what flows between them."""
    nodes = [
        {
            "id": f"{column}.{row}",
            "label": f"{label} {column}.{row}",
            "column": column,
            "row": row,
            "value": 1.5 + row,
            "rule": label,
            "contexts": contexts or [],
            "influence": 0.1 + 0.1 * row + 0.05 * column,
        }
        for column, rows in ((0, 5), (1, 2))
        for row in range(rows)
    ]
    edges = [
        {
            "from": f"0.{i}",
            "to": f"1.{j}",
            "weight": (-1) ** i * (1 + i) / (1 + j),
            "parts": [[f"block 1 head {1 + j}", 0.75], ["no head", 0.25]],
        }
        for i in range(5)
        for j in range(2)
    ]
    groups = [{"label": f"{label} twins", "members": ["0.0", "0.1", "not shown"]}]
    removals = [{"before": 0.75, "after": 0.5, "predicted": -1.25, "measured": -0.875}]
    return {
        "title": f"What makes {label} fire",
        "nodes": nodes,
        "edges": edges,
        "groups": groups,
        "removals": removals,
    }


def add_features(
    run: Path,
    dataset: str,
    seed: int,
    features: list[dict[str, Any]],
    graphs: list[dict[str, Any]] | None = None,
) -> None:
    """Put features and graphs into a run folder."""
    save_features(run, dataset, seed, features)
    if graphs:
        save_graphs(run, dataset, seed, graphs)

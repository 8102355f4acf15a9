"""What the feature browser and the graphs of a report are given: the stored features of every cell, packed small.

Contexts that know their row share one copy of the held-out text; activations are kept where they are not zero, in hundredths of the
latent's maximum.
"""

from __future__ import annotations

import base64
import gzip
import itertools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from sae_experiments.results.records import cell_name, number, try_json
from sae_experiments.results.table import Run

log = logging.getLogger(__name__)
FULL = (10, 6)
#: How many strongest contexts and samples a latent keeps, the most that fits.
SIZES = (FULL, (6, 4), (4, 2), (2, 1), (1, 0))
SCALE = 99
ROWS = 1 << 23  # contexts further down keep their own text


class FeatureCell(NamedTuple):
    """The features of one cell of one run, as stored."""

    run: str
    dataset: str
    seed: int
    is_bytes: bool  # characters from 128 on are raw bytes
    features: list[dict[str, Any]]

    @property
    def title(self) -> str:
        return f"{self.dataset}, seed {self.seed}"


def cells_of(run: Run) -> Iterator[FeatureCell]:
    """Every cell of a run that has features; a damaged file is a warning and is left out."""
    for dataset, seed, found in _stored(run, "features"):
        features = [f for f in found if isinstance(f, dict) and isinstance(f.get("latent"), int)]
        if features:
            yield FeatureCell(run.name, dataset, seed, _is_bytes(run, dataset), features)


def graphs_of(run: Run) -> list[dict[str, Any]]:
    """The graphs of a run (``graphs/<report>_<seed>.json``), each with the cell it belongs to; those without nodes are left out."""
    found = []
    for dataset, seed, graphs in _stored(run, "graphs"):
        for graph in graphs:
            if isinstance(graph, dict) and isinstance(graph.get("nodes"), list) and graph["nodes"]:
                about = {
                    "run": run.name,
                    "cell": f"{dataset}, seed {seed}",
                    "bytes": _is_bytes(run, dataset),
                }
                nodes = [
                    node | _plain(node.get("contexts"))
                    for node in graph["nodes"]
                    if isinstance(node, dict)
                ]
                found.append(graph | about | {"nodes": nodes})
    return found


def _stored(run: Run, folder: str) -> Iterator[tuple[str, int, list[Any]]]:
    for record in run.records if run.path else []:
        path = run.path / folder / f"{cell_name(record.dataset, record.seed)}.json"
        found = try_json(path) if path.exists() else None
        if isinstance(found, list):
            yield record.dataset, record.seed, found
        elif found is not None:
            log.warning("%s holds no list; left out", path)


def _is_bytes(run: Run, dataset: str) -> bool:
    data = run.config.get("data")
    about = data.get(dataset.split(".")[0]) if isinstance(data, dict) else None
    return isinstance(about, dict) and about.get("encoding") == "latin-1"


def _plain(contexts: Any) -> dict[str, Any]:
    """Contexts of a graph's node with their text in them, and the largest value among them."""
    found = _dicts(contexts)
    top = max((abs(v) for c in found for v in _acts(c)), default=0.0)
    return {"contexts": [_inline(c, top) for c in found], "max": top}


def pack(cell: FeatureCell, size: tuple[int, int]) -> bytes:
    """``{"latents": [...], "text": [[row, characters], ...]}`` as compressed JSON; a latent keeps ``size`` contexts and samples.

    A context is ``[row, length, at, [place, value, ...]]``, or ``[text, at, [place, value, ...]]`` where its row is not known.
    """
    pool: list[str | None] = []
    latents = []
    for feature in cell.features:
        top = number(feature.get("max")) or max(
            (abs(v) for c in _dicts(feature.get("top")) for v in _acts(c)), default=0.0
        )
        kept = {k: v for k, v in feature.items() if k not in ("top", "samples", "strings")}
        kept["top"] = [
            _context(c, top, pool) for c in _dicts(feature.get("top"))[: size[0]]
        ] + _strings(feature, top, size[0])
        kept["samples"] = [
            _context(c, top, pool) for c in _dicts(feature.get("samples"))[: size[1]]
        ]
        latents.append({k: v for k, v in kept.items() if v is not None and v != []})
    content = {"latents": latents, "text": _segments(pool)}
    try:
        text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(content), separators=(",", ":"))
    return gzip.compress(text.encode(), 6, mtime=0)


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [v for v in value if isinstance(v, dict)] if isinstance(value, list) else []


def _finite(value: Any) -> Any:
    """The same with null for the numbers that JSON does not have."""
    if isinstance(value, float):
        return number(value)
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return {k: _finite(v) for k, v in value.items()} if isinstance(value, dict) else value


def _acts(context: Mapping[str, Any]) -> list[float]:
    acts = context.get("acts")
    return [v and (number(v) or 0.0) for v in acts] if isinstance(acts, list) else []


def _sparse(acts: Sequence[float], top: float) -> list[int]:
    """Place and value of what is not zero, in hundredths of ``top``; what is too small for that counts as one."""
    found: list[int] = []
    for place, value in enumerate(acts):
        if value:
            shown = round(SCALE * value / top) if top else 0
            found += [place, max(-SCALE, min(SCALE, shown)) or (1 if value > 0 else -1)]
    return found


def _context(context: Mapping[str, Any], top: float, pool: list[str | None]) -> list[Any]:
    before, at, after = (str(context.get(k) or "") for k in ("before", "at", "after"))
    text, row = before + at + after, context.get("row")
    if not isinstance(row, int) or isinstance(row, bool) or not len(before) <= row < ROWS:
        return _inline(context, top)
    first = row - len(before)
    end = first + len(text)
    pool.extend([None] * (end - len(pool)))
    if any(
        known is not None and known != c for known, c in zip(pool[first:end], text, strict=True)
    ):  # not the same text after all
        return _inline(context, top)
    pool[first:end] = text
    return [first, len(text), len(before), _sparse(_acts(context), top)]


def _inline(context: Mapping[str, Any], top: float) -> list[Any]:
    before, at, after = (str(context.get(k) or "") for k in ("before", "at", "after"))
    return [before + at + after, len(before) if at else -1, _sparse(_acts(context), top)]


def _strings(feature: Mapping[str, Any], top: float, most: int) -> list[list[Any]]:
    """Whole strings with one value each (``strings``), as contexts; the value stands at the character ``position`` where that is known."""
    pairs = [p for p in feature.get("strings") or [] if isinstance(p, list) and len(p) == 2]
    top = top or max((abs(number(v) or 0.0) for _, v in pairs), default=0.0)
    place = feature.get("position")
    found = []
    for string, value in ((str(text), number(v) or 0.0) for text, v in pairs[: max(most, 1)]):
        at = place if isinstance(place, int) and 0 <= place < len(string) else -1
        found.append(
            [
                string,
                at,
                _sparse([value if at in (-1, i) else 0.0 for i in range(len(string))], top),
            ]
        )
    return found


def _segments(pool: Sequence[str | None]) -> list[list[Any]]:
    """Neighbouring characters joined: ``[[first row, text], ...]``."""
    groups = itertools.groupby(enumerate(pool), key=lambda at: at[1] is not None)
    runs = [list(group) for there, group in groups if there]
    return [[run[0][0], "".join(str(c) for _, c in run)] for run in runs]


def packed(cells: Sequence[FeatureCell], room: int) -> tuple[list[tuple[FeatureCell, str]], str]:
    """Cells as base64 of compressed JSON, altogether at most ``room`` characters, and a note on what had to be left out.

    First fewer contexts a latent, then only the first seed of every dataset, then only as many cells as there is room for.
    """
    firsts = {(c.run, c.dataset): c for c in reversed(cells)}
    only = [c for c in cells if firsts[c.run, c.dataset] is c]
    tries = [
        *((s, cells) for s in SIZES[:3]),
        *((s, only) for s in (SIZES if len(only) < len(cells) else SIZES[3:])),
    ]
    for size, chosen in tries:
        found = _all(chosen, size, room)
        if found is not None:
            notes = (
                [
                    f"{size[0]} strongest contexts and {size[1]} samples a latent are kept in this file"
                ]
                if size != FULL
                else []
            )
            notes += ["only the first seed of each dataset is"] if len(chosen) < len(cells) else []
            return found, "; ".join(notes)
    found, used = [], 0
    for cell in only:
        data = _text(cell, SIZES[-1])
        if used + len(data) > room:
            break
        found, used = [*found, (cell, data)], used + len(data)
    return (
        found,
        f"only {len(found)} of {len(cells)} cells fit into this file; the others are in the runs' folders features/",
    )


def _text(cell: FeatureCell, size: tuple[int, int]) -> str:
    return base64.b64encode(pack(cell, size)).decode()


def _all(
    cells: Sequence[FeatureCell], size: tuple[int, int], room: int
) -> list[tuple[FeatureCell, str]] | None:
    """All cells, or None as soon as it is clear that there is no room for them, at the size that a latent has had so far."""
    found, used, latents, total = [], 0, 0, sum(len(c.features) for c in cells)
    for cell in cells:
        found.append((cell, _text(cell, size)))
        used, latents = used + len(found[-1][1]), latents + len(cell.features)
        if used > room or used * total / latents > 1.15 * room:
            return None
    return found

"""Data of the feature browser and the graphs of a report: the stored features, packed small.

Contexts whose row is known share one copy of the held-out text. Only non-zero activations are kept,
in hundredths of the latent's maximum.
"""

from __future__ import annotations

import base64
import gzip
import itertools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from sae_experiments.results.names import put_together
from sae_experiments.results.records import cell_name, number, try_json
from sae_experiments.results.table import Run

log = logging.getLogger(__name__)
FULL = (10, 6)
#: Numbers of strongest contexts and samples that latents keep; the first pair that fits is used.
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
    sae: str = ""

    @property
    def title(self) -> str:
        """Corpus, SAE and seed, as a heading."""
        where = f"{self.dataset}, {self.sae}" if self.sae else self.dataset
        return f"{where}, seed {self.seed}"


def cells_of(run: Run) -> Iterator[FeatureCell]:
    """Every cell of a run that has features; damaged files are left out with a warning."""
    for dataset, seed, stored in _stored(run, "features"):
        features = [f for f in stored if isinstance(f, dict) and isinstance(f.get("latent"), int)]
        if features:
            is_bytes = _is_bytes(run, dataset)
            yield FeatureCell(run.folder, dataset, seed, is_bytes, features, run.sae)


def graphs_of(run: Run) -> list[dict[str, Any]]:
    """The graphs of a run, each with its cell; those without nodes are left out."""
    graphs = []
    for dataset, seed, stored in _stored(run, "graphs"):
        for graph in stored:
            if not isinstance(graph, dict) or not _dicts(graph.get("nodes")):
                continue
            about = {
                "run": run.name,
                "cell": f"{dataset}, seed {seed}",
                "bytes": _is_bytes(run, dataset),
            }
            nodes = [node | _plain(node.get("contexts")) for node in _dicts(graph["nodes"])]
            graphs.append(graph | about | {"nodes": nodes})
    return graphs


def _stored(run: Run, folder: str) -> Iterator[tuple[str, int, list[Any]]]:
    if run.path is None:
        return
    for record in run.records:
        name = cell_name(put_together(record.dataset, run.sae), record.seed)
        path = run.path / folder / f"{name}.json"
        content = try_json(path) if path.exists() else None
        if isinstance(content, list):
            yield record.dataset, record.seed, content
        elif content is not None:
            log.warning("%s holds no list; left out", path)


def _is_bytes(run: Run, dataset: str) -> bool:
    data = run.config.get("data")
    about = data.get(dataset) if isinstance(data, dict) else None
    return isinstance(about, dict) and about.get("encoding") == "latin-1"


def _plain(contexts: Any) -> dict[str, Any]:
    """Contexts of a graph's node with their text in them, and the largest value among them."""
    listed = _dicts(contexts)
    top = max((abs(value) for context in listed for value in _acts(context)), default=0.0)
    return {"contexts": [_inline(context, top) for context in listed], "max": top}


def pack(cell: FeatureCell, size: tuple[int, int]) -> bytes:
    """Compress a cell to JSON of `latents` and `text`, a list of [first row, characters].

    A context is `[row, length, at, [place, value, ...]]`, or `[text, at, [place, value, ...]]` if
    its row is unknown; the characters of the token at `at` stand before the list if it has several.

    Args:
        cell: Features to pack.
        size: Numbers of strongest contexts and of samples that a latent keeps.
    """
    pool: list[str | None] = []
    latents = []
    for feature in cell.features:
        strongest, samples = (_dicts(feature.get(key)) for key in ("top", "samples"))
        largest = max((abs(v) for context in strongest for v in _acts(context)), default=0.0)
        top = number(feature.get("max")) or largest
        kept = {k: v for k, v in feature.items() if k not in ("top", "samples", "strings")}
        kept["top"] = [_context(c, top, pool) for c in strongest[: size[0]]]
        kept["top"] += _strings(feature, top, size[0])
        kept["samples"] = [_context(c, top, pool) for c in samples[: size[1]]]
        latents.append({k: v for k, v in kept.items() if v is not None and v != []})
    content = {"latents": latents, "text": _segments(pool), "tokens": _reads_tokens(cell)}
    try:
        text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(content), separators=(",", ":"))
    return gzip.compress(text.encode(), 6, mtime=0)


def _reads_tokens(cell: FeatureCell) -> bool:
    """True if contexts are made of tokens, false for characters."""
    return any("tokens" in c for feature in cell.features for c in _dicts(feature.get("top")))


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
    """Places and values of what is not zero, in hundredths of `top`; at least one hundredth."""
    pairs: list[int] = []
    for place, value in enumerate(acts):
        if value:
            shown = round(SCALE * value / top) if top else 0
            pairs += [place, max(-SCALE, min(SCALE, shown)) or (1 if value > 0 else -1)]
    return pairs


def _context(context: Mapping[str, Any], top: float, pool: list[str | None]) -> list[Any]:
    before, at, after = (str(context.get(k) or "") for k in ("before", "at", "after"))
    text, row = before + at + after, context.get("row")
    if not isinstance(row, int) or isinstance(row, bool) or not len(before) <= row < ROWS:
        return _inline(context, top)
    first = row - len(before)
    end = first + len(text)
    pool.extend([None] * (end - len(pool)))
    pairs = zip(pool[first:end], text, strict=True)
    if any(known is not None and known != char for known, char in pairs):
        return _inline(context, top)  # not the same text after all
    pool[first:end] = text
    return [first, len(text), len(before), *_span(at), _sparse(_acts(context), top)]


def _inline(context: Mapping[str, Any], top: float) -> list[Any]:
    before, at, after = (str(context.get(k) or "") for k in ("before", "at", "after"))
    place = len(before) if at else -1
    return [before + at + after, place, *_span(at), _sparse(_acts(context), top)]


def _span(at: str) -> list[int]:
    """Length of a token, if it has several characters."""
    return [len(at)] if len(at) > 1 else []


def _strings(feature: Mapping[str, Any], top: float, most: int) -> list[list[Any]]:
    """Whole strings with one value each, as contexts; the value is at `position` if known."""
    pairs = [p for p in feature.get("strings") or [] if isinstance(p, list) and len(p) == 2]
    top = top or max((abs(number(v) or 0.0) for _, v in pairs), default=0.0)
    place = feature.get("position")
    contexts = []
    for string, value in ((str(text), number(v) or 0.0) for text, v in pairs[: max(most, 1)]):
        at = place if isinstance(place, int) and 0 <= place < len(string) else -1
        acts = [value if at in (-1, i) else 0.0 for i in range(len(string))]
        contexts.append([string, at, _sparse(acts, top)])
    return contexts


def _segments(pool: Sequence[str | None]) -> list[list[Any]]:
    """Neighbouring characters joined: `[[first row, text], ...]`."""
    groups = itertools.groupby(enumerate(pool), key=lambda at: at[1] is not None)
    runs = [list(group) for there, group in groups if there]
    return [[run[0][0], "".join(str(c) for _, c in run)] for run in runs]


def packed(cells: Sequence[FeatureCell], room: int) -> tuple[list[tuple[FeatureCell, str]], str]:
    """Pack cells as base64, altogether at most `room` characters.

    If they do not fit, latents keep fewer contexts, then only the first seed of every dataset and
    SAE is kept, then only as many cells as there is room for.

    Returns:
        Cells with their data, and a note about what was left out.
    """
    first: dict[tuple[str, str, str], FeatureCell] = {}
    for cell in cells:
        first.setdefault((cell.run, cell.dataset, cell.sae), cell)
    only = list(first.values())
    tries: list[tuple[tuple[int, int], Sequence[FeatureCell]]] = [(s, cells) for s in SIZES[:3]]
    tries += [(s, only) for s in (SIZES if len(only) < len(cells) else SIZES[3:])]
    for size, chosen in tries:
        data = _all(chosen, size, room)
        if data is not None:
            return data, _note(size, some=len(chosen) < len(cells))
    data, used = [], 0
    for cell in only:
        text = _text(cell, SIZES[-1])
        if used + len(text) > room:
            break
        data.append((cell, text))
        used += len(text)
    return data, (
        f"only {len(data)} of {len(cells)} cells fit into this file; "
        "the others are in the runs' folders features/"
    )


def _note(size: tuple[int, int], *, some: bool) -> str:
    """Words for what was left out; empty if nothing was."""
    notes = []
    if size != FULL:
        notes.append(
            f"{size[0]} strongest contexts and {size[1]} samples per latent are kept in this file"
        )
    if some:
        notes.append("only the first seed of each dataset is")
    return "; ".join(notes)


def _text(cell: FeatureCell, size: tuple[int, int]) -> str:
    return base64.b64encode(pack(cell, size)).decode()


def _all(
    cells: Sequence[FeatureCell], size: tuple[int, int], room: int
) -> list[tuple[FeatureCell, str]] | None:
    """All cells; None as soon as they cannot fit, judged by the latents packed so far."""
    data = []
    used = latents = 0
    total = sum(len(cell.features) for cell in cells)
    for cell in cells:
        data.append((cell, _text(cell, size)))
        used += len(data[-1][1])
        latents += len(cell.features)
        if used > room or used * total / latents > 1.15 * room:
            return None
    return data

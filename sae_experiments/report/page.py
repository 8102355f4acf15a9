"""One self-contained HTML file for a run or for a comparison of runs.

Safety: text from corpora and configurations is data. Python escapes what it writes as HTML
(`markup`); what the browser shows is JSON or compressed JSON that the script puts into the page as
text nodes. The content security policy allows the one script and the one style sheet of this file
by their hashes, no network, no markup from strings (trusted types), and pictures from this file
alone.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pandas as pd

from sae_experiments.files import write_bytes
from sae_experiments.report import chart, comparison, configuration, header, overview
from sae_experiments.report.features import FeatureCell, cells_of, graphs_of, packed
from sae_experiments.report.markup import Markup, join, json_block, tag
from sae_experiments.results.compare import compare
from sae_experiments.results.table import RunTable

T = TypeVar("T")
log = logging.getLogger(__name__)
HERE = Path(__file__).parent
SCRIPTS = (
    "base.js",
    "charts.js",
    "contexts.js",
    "latent.js",
    "browser.js",
    "cards.js",
    "graphs.js",
    "start.js",
)
ROOM = 4_000_000  # bytes of a whole report
GENERAL = "general"
#: Figures in the order of their importance; the others follow.
IMPORTANT = ("pareto", "final_metrics", "density", "sae_curves", "training_curves")


class Picture(NamedTuple):
    """A figure of the report: SVG without the title and caption, which are set as text."""

    name: str  # as in conf/plot
    title: str
    caption: str
    svg: bytes


class Section(NamedTuple):
    """A section of the page; without a body it is left out."""

    key: str
    title: str
    body: Markup | None


def write_report(table: RunTable, pictures: Sequence[Picture], path: Path) -> Path:
    """Write the report of one or many runs, whole or not at all; returns the path."""
    write_bytes(path, page(table, pictures).encode("utf-8", "replace"))
    return path


def page(table: RunTable, pictures: Sequence[Picture]) -> str:
    """The whole file as text. A part that fails is left out with a warning."""
    title = _title(table)
    rows = _safely("numbers", lambda: compare(table))
    rows = pd.DataFrame() if rows is None else rows
    graphs = _safely("graphs", lambda: [g for run in table.runs for g in graphs_of(run)]) or []
    cells = _safely("features", lambda: [c for run in table.runs for c in cells_of(run)]) or []
    first = _safely("overview", lambda: _overview(table, rows, cells))
    sections = [
        Section(
            "summary",
            "Comparison",
            _safely("summary", lambda: comparison.comparison(table, rows)),
        ),
        Section("features", "Features", None),
        Section("circuits", "Attribution graphs", tag("div", id="graphs") if graphs else None),
        *_figure_sections(pictures),
        Section(
            "differences",
            "What differs",
            _safely("differences", lambda: configuration.differences(table)),
        ),
        Section("details", "Details", _safely("details", lambda: configuration.details(table))),
    ]
    fixed = _assets()
    head = header.header(table, title)
    data: dict[str, Any] = {"title": title, "graphs": graphs, "running": header.running(table)}
    blobs = {f"figure-{_id(p.name)}": _compressed(p.svg) for p in pictures}
    used = sum(map(len, fixed.values())) + len(json_block(data)) + len(head) + len(first or "")
    used += sum(len(section.body or "") for section in sections) + sum(map(len, blobs.values()))
    kept, note = _safely("features", lambda: packed(cells, max(ROOM - used, 0))) or ([], "")
    data["cells"] = [_about(cell) for cell, _ in kept]
    data["cards"] = (
        _safely("cards", lambda: overview.telling_latents([cell for cell, _ in kept])) or []
    )
    blobs |= {f"cell-{i}": content for i, (_, content) in enumerate(kept)}
    browser = None
    if kept:
        small = tag("p", note, class_="quiet") if note else None
        browser = join(small, tag("div", id="browser"))
    shown = [s._replace(body=browser) if s.key == "features" else s for s in sections]
    shown = [section for section in shown if section.body]
    return _fill(
        fixed["page.html"],
        {
            "policy": _policy(fixed),
            "title": tag("title", title),
            "style": fixed["report.css"],
            "script": fixed["script"],
            "header": join(head, first),
            "nav": join([tag("a", s.title, href=f"#{s.key}") for s in shown]),
            "sections": join([tag("section", tag("h2", s.title), s.body, id=s.key) for s in shown]),
            "data": json_block(data),
            "blobs": "\n".join(
                f'<script type="application/gzip" id="{name}">{content}</script>'
                for name, content in blobs.items()
            ),
        },
    )


def _title(table: RunTable) -> str:
    folders = [of_folder[0] for of_folder in table.folders]
    if len(folders) != 1:
        return f"Comparison of {len(folders)} runs"
    run = folders[0]
    label = run.label or str(run.manifest.get("label") or "")
    return run.folder if label in ("", run.folder) else f"{run.folder}: {label}"


def _overview(table: RunTable, rows: pd.DataFrame, cells: Sequence[FeatureCell]) -> Markup:
    """The first screen: sentences, the picture of sparsity against fidelity, places of cards."""
    sentences = [overview.what_was_done(table), overview.what_came_out(table, rows)]
    words = [tag("p", sentence, class_="lead") for sentence in sentences if sentence]
    why_not = [tag("p", line, class_="quiet") for line in overview.caveats(table, rows)]
    picture = chart.sparsity_against_fidelity(table)
    cards = tag("div", id="cards") if overview.telling_latents(cells, 1) else None
    body = tag("div", picture, cards, class_="overview") if picture or cards else None
    return tag("section", words, why_not, body, header.warnings(table), id="overview")


def _about(cell: FeatureCell) -> dict[str, Any]:
    return {
        "run": cell.run,
        "title": cell.title,
        "dataset": cell.dataset,
        "sae": cell.sae,
        "seed": cell.seed,
        "bytes": cell.is_bytes,
        "n": len(cell.features),
    }


def _figure_sections(pictures: Sequence[Picture]) -> list[Section]:
    """The figures of studies in sections of their own, then the general ones.

    Figures belong to a study if their names begin with the same word.
    """
    words = [p.name.split("_")[0] for p in pictures]
    groups: dict[str, list[Picture]] = {}
    for word, picture in zip(words, pictures, strict=True):
        of_study = words.count(word) > 1 and picture.name not in IMPORTANT
        groups.setdefault(word if of_study else GENERAL, []).append(picture)
    groups[GENERAL] = sorted(groups.get(GENERAL, []), key=_importance)
    ordered = {GENERAL: groups.pop(GENERAL)} | groups
    return [
        Section(
            f"figures-{_id(word)}",
            "Figures" if word == GENERAL else word.capitalize(),
            join([_figure(picture) for picture in members]),
        )
        for word, members in ordered.items()
        if members
    ]


def _importance(picture: Picture) -> int:
    return IMPORTANT.index(picture.name) if picture.name in IMPORTANT else len(IMPORTANT)


def _figure(picture: Picture) -> Markup:
    """The place of a picture; the script fills it from the compressed SVG."""
    caption = tag("figcaption", tag("strong", picture.title), " ", picture.caption)
    place = tag(
        "div",
        class_="picture",
        data_blob=f"figure-{_id(picture.name)}",
        data_alt=f"{picture.title}. {picture.caption}",
    )
    return tag("figure", place, caption)


def _id(word: str) -> str:
    return re.sub(r"[^A-Za-z0-9]", "-", word)


def _compressed(content: bytes) -> str:
    return base64.b64encode(gzip.compress(content, 9, mtime=0)).decode()


def _safely(what: str, make: Callable[[], T]) -> T | None:
    """Result of `make`; None, with a warning, if it fails: one bad file costs one part."""
    try:
        return make()
    except Exception as error:  # a run folder may hold anything
        message = " ".join(str(error).split())[:200]
        log.warning("report: %s left out, %s: %s", what, type(error).__name__, message)
        return None


def _assets() -> dict[str, str]:
    """The template, the style sheet and the script, which is made of its parts."""
    files = {
        name: (HERE / name).read_text(encoding="utf-8")
        for name in ("page.html", "report.css", *SCRIPTS)
    }
    parts = "\n".join(files.pop(name) for name in SCRIPTS)
    return files | {"script": f'"use strict";\n(() => {{\n{parts}\n}})();\n'}


def _policy(fixed: dict[str, str]) -> str:
    """The content security policy: this script, this style sheet, pictures made here."""
    script, style = (
        base64.b64encode(hashlib.sha256(fixed[name].encode()).digest()).decode()
        for name in ("script", "report.css")
    )
    return (
        f"default-src 'none'; script-src 'sha256-{script}'; style-src 'sha256-{style}'; "
        "img-src blob:; base-uri 'none'; form-action 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )


def _fill(template: str, values: dict[str, str]) -> str:
    """Replace `{{name}}` in one pass, so that nothing that is inserted is looked at again."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], template)

"""One self-contained HTML file for one run or for a comparison: tables, figures, the feature browser, graphs.

Safety: text from corpora and configurations is data. What Python writes as HTML is escaped (``markup``); what the browser shows is JSON or
compressed JSON that the script puts into the page as text nodes. The content security policy allows the one script and the one style sheet
of this file by their hashes, no network, no markup from strings (trusted types), and pictures from this file alone.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sae_experiments.files import write_bytes
from sae_experiments.report import summary
from sae_experiments.report.features import FeatureCell, cells_of, graphs_of, packed
from sae_experiments.report.markup import Markup, join, json_block, tag
from sae_experiments.results.compare import compare
from sae_experiments.results.table import RunTable

log = logging.getLogger(__name__)
HERE = Path(__file__).parent
SCRIPTS = (
    "base.js",
    "charts.js",
    "contexts.js",
    "latent.js",
    "browser.js",
    "graphs.js",
    "start.js",
)
ROOM = 4_900_000  # bytes of a whole report
MORE = "general"


class Picture(NamedTuple):
    """A figure for the report: the SVG without its title and caption, which stand beside it as text."""

    name: str  # as in conf/plot
    title: str
    caption: str
    svg: bytes


def write_report(table: RunTable, pictures: Sequence[Picture], path: Path) -> Path:
    """Write the report of the runs of ``table``, one or many, whole or not at all; returns the path."""
    write_bytes(path, page(table, pictures).encode("utf-8", "replace"))
    return path


def page(table: RunTable, pictures: Sequence[Picture]) -> str:
    """The whole file as text. A part that fails is left out with a warning and a line in its place."""
    title = table.runs[0].title if len(table.runs) == 1 else f"Comparison of {len(table.runs)} runs"
    graphs = _safely("graphs", lambda: [g for run in table.runs for g in graphs_of(run)]) or []
    sections = [
        (
            "summary",
            "Summary",
            _safely("summary", lambda: summary.final_numbers(table, compare(table))),
        ),
        ("differences", "What differs", _safely("differences", lambda: summary.differences(table))),
        *_figure_sections(pictures),
        ("features", "Features", None),
        ("circuits", "Attribution graphs", tag("div", id="graphs") if graphs else None),
        ("details", "Details", _safely("details", lambda: _details(table))),
    ]
    fixed = _assets()
    data = {"title": title, "graphs": graphs}
    used = (
        sum(map(len, fixed.values()))
        + sum(len(body or "") for _, _, body in sections)
        + len(json_block(data))
    )
    blobs = {
        f"figure-{_id(p.name)}": base64.b64encode(gzip.compress(p.svg, 9, mtime=0)).decode()
        for p in pictures
    }
    cells, note = _cells(table, ROOM - used - sum(map(len, blobs.values())))
    data["cells"] = [
        {
            "run": c.run,
            "title": c.title,
            "dataset": c.dataset,
            "seed": c.seed,
            "bytes": c.is_bytes,
            "n": len(c.features),
        }
        for c, _ in cells
    ]
    blobs |= {f"cell-{i}": found for i, (_, found) in enumerate(cells)}
    browser = (
        join(tag("p", note, class_="quiet") if note else None, tag("div", id="browser"))
        if cells
        else None
    )
    shown = [(key, name, browser if key == "features" else body) for key, name, body in sections]
    return _fill(
        fixed["page.html"],
        {
            "policy": _policy(fixed),
            "title": tag("title", title),
            "style": fixed["report.css"],
            "script": fixed["script"],
            "header": summary.header(table, title),
            "nav": join([tag("a", name, href=f"#{key}") for key, name, body in shown if body]),
            "sections": join(
                [tag("section", tag("h2", name), body, id=key) for key, name, body in shown if body]
            ),
            "data": json_block(data),
            "blobs": "\n".join(
                f'<script type="application/gzip" id="{name}">{text}</script>'
                for name, text in blobs.items()
            ),
        },
    )


def _cells(table: RunTable, room: int) -> tuple[list[tuple[FeatureCell, str]], str]:
    found = (
        _safely("features", lambda: [cell for run in table.runs for cell in cells_of(run)]) or []
    )
    return (
        (_safely("features", lambda: packed(found, max(room, 0))) or ([], ""))
        if found
        else ([], "")
    )


def _details(table: RunTable) -> Markup:
    of_runs = [
        [summary.configuration(r), summary.provenance(r), summary.times(r)] for r in table.runs[:20]
    ]
    return join(of_runs, summary.formulas(table))


def _figure_sections(pictures: Sequence[Picture]) -> list[tuple[str, str, Markup | None]]:
    """Figures whose names begin with the same word as another's (a study's) have a section of their own."""
    words = [p.name.split("_")[0] for p in pictures]
    groups: dict[str, list[Picture]] = {MORE: []}
    for word, picture in zip(words, pictures, strict=True):
        groups.setdefault(word if words.count(word) > 1 else MORE, []).append(picture)
    names = {MORE: "Figures"}
    return [
        (f"figures-{_id(w)}", names.get(w, w.capitalize()), join([_figure(p) for p in found]))
        for w, found in groups.items()
        if found
    ]


def _figure(picture: Picture) -> Markup:
    """The picture's place; the script fills it from the compressed SVG."""
    caption = tag("figcaption", tag("strong", picture.title), " ", picture.caption)
    return tag(
        "figure",
        tag(
            "div",
            class_="picture",
            data_blob=f"figure-{_id(picture.name)}",
            data_alt=f"{picture.title}. {picture.caption}",
        ),
        caption,
    )


def _id(word: str) -> str:
    return re.sub(r"[^A-Za-z0-9]", "-", word)


def _safely(what: str, make: Any) -> Any:
    """What ``make`` gives, or None with a warning: one bad file must not cost the whole report."""
    try:
        return make()
    except Exception as error:  # whatever lies in a run folder
        log.warning(
            "report: %s left out, %s: %s",
            what,
            type(error).__name__,
            " ".join(str(error).split())[:200],
        )
        return None


def _assets() -> dict[str, str]:
    """The template, the style sheet and the one script, made of its parts."""
    found = {
        name: (HERE / name).read_text(encoding="utf-8")
        for name in ("page.html", "report.css", *SCRIPTS)
    }
    parts = "\n".join(found.pop(name) for name in SCRIPTS)
    return found | {"script": f'"use strict";\n(() => {{\n{parts}\n}})();\n'}


def _policy(fixed: dict[str, str]) -> str:
    """Nothing is allowed but this script, this style sheet and pictures made here."""
    hashes = {
        kind: base64.b64encode(hashlib.sha256(fixed[name].encode()).digest()).decode()
        for kind, name in (("script", "script"), ("style", "report.css"))
    }
    return (
        f"default-src 'none'; script-src 'sha256-{hashes['script']}'; style-src 'sha256-{hashes['style']}'; img-src blob:; "
        "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )


def _fill(template: str, values: dict[str, str]) -> str:
    """``{{name}}`` replaced in one pass, so that nothing inserted is looked at again."""
    return re.sub(r"\{\{(\w+)\}\}", lambda found: values[found[1]], template)

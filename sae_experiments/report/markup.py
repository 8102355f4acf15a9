"""HTML from Python values: everything that is not markup made here is escaped."""

from __future__ import annotations

import html
import json
from typing import Any


class Markup(str):
    """Text that is HTML already; made by `tag` and `join` only."""

    __slots__ = ()


def text(value: Any) -> Markup:
    """Format a value as HTML text.

    Markup stays, everything else is escaped (quotes too), and what HTML cannot hold is replaced.
    """
    if isinstance(value, Markup):
        return value
    plain = str(value).encode("utf-8", "replace").decode()
    allowed = [c if c in "\n\t" or ord(c) >= 32 else "\ufffd" for c in plain]
    return Markup(html.escape("".join(allowed)))


def join(*children: Any) -> Markup:
    """Children one after the other; None and '' are left out, lists are taken apart."""
    parts: list[str] = []
    for child in children:
        if isinstance(child, (list, tuple)):
            parts.append(join(*child))
        elif child is not None:
            parts.append(text(child))
    return Markup("".join(parts))


def tag(name: str, *children: Any, **attributes: Any) -> Markup:
    """An element; `class_` becomes `class`, `data_x` becomes `data-x`.

    Attributes that are None or False are left out.
    """
    shown = ""
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        given = key.rstrip("_").replace("_", "-")
        shown += f" {given}" if value is True else f' {given}="{text(value)}"'
    return Markup(f"<{name}{shown}>{join(*children)}</{name}>")


def json_block(value: Any) -> str:
    """JSON for a `<script type="application/json">`.

    No character of it can end the element, open another, or end a line of a script: U+2028 and lone
    surrogates are escaped as every character beyond ASCII.
    """
    block = json.dumps(value, allow_nan=False, separators=(",", ":"), ensure_ascii=True)
    return block.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def table(head: list[Any], rows: list[list[Any]], **attributes: Any) -> Markup:
    """A table that scrolls by itself on a narrow page; the first cell of each row names it."""
    heads = [_cell("th", cell, scope="col") for cell in head]
    body = [
        tag("tr", tag("th", first, scope="row"), [_cell("td", cell) for cell in rest])
        for first, *rest in rows
    ]
    inner = tag("table", tag("thead", tag("tr", heads)), tag("tbody", body), **attributes)
    return tag("div", inner, class_="scroll", tabindex="0", role="region", aria_label="table")


def _cell(name: str, content: Any, **attributes: Any) -> Markup:
    """A cell, unless the content is one already."""
    if isinstance(content, Markup) and content.startswith(f"<{name}"):
        return content
    return tag(name, content, **attributes)

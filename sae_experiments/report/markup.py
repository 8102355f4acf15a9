"""HTML from Python values: everything that is not markup made here is escaped."""

from __future__ import annotations

import html
import json
from typing import Any


class Markup(str):
    """Text that is HTML already; made by :func:`tag` and :func:`join` only."""

    __slots__ = ()


def text(value: Any) -> Markup:
    """A value as HTML text: markup stays, everything else is escaped (quotes too), and what HTML cannot hold is replaced."""
    if isinstance(value, Markup):
        return value
    plain = str(value).encode("utf-8", "replace").decode()
    return Markup(
        html.escape("".join(c if c in "\n\t" or ord(c) >= 32 else "\ufffd" for c in plain))
    )


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
    """``<name attributes>children</name>``; ``class_`` is ``class``, ``data_x`` is ``data-x``; attributes that are None or False are left out."""
    given = (
        (key.rstrip("_").replace("_", "-"), value)
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    shown = "".join(
        f" {key}" if value is True else f' {key}="{text(value)}"' for key, value in given
    )
    return Markup(f"<{name}{shown}>{join(*children)}</{name}>")


def json_block(value: Any) -> str:
    """JSON for a ``<script type="application/json">``: no character of it can end the element, open another, or end a line of a script."""
    found = json.dumps(
        value, allow_nan=False, separators=(",", ":"), ensure_ascii=True
    )  # U+2028 and lone surrogates are escaped by ensure_ascii
    return found.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def table(head: list[Any], rows: list[list[Any]], **attributes: Any) -> Markup:
    """A table with a head row; the first cell of each row names it. It scrolls by itself where the page is narrow."""
    heads = [
        cell
        if isinstance(cell, Markup) and cell.startswith("<th")
        else tag("th", cell, scope="col")
        for cell in head
    ]
    body = [
        tag(
            "tr",
            tag("th", first, scope="row"),
            [c if isinstance(c, Markup) and c.startswith("<td") else tag("td", c) for c in rest],
        )
        for first, *rest in rows
    ]
    inner = tag("table", tag("thead", tag("tr", heads)), tag("tbody", body), **attributes)
    return tag("div", inner, class_="scroll", tabindex="0", role="region", aria_label="table")

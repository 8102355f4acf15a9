"""The report in a real browser: it opens without a word on the console, does what it says, and
lets no text of a corpus become anything else.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sae_experiments.plots.base import bare, finish, panels
from sae_experiments.report import page as report_page
from sae_experiments.report.page import Picture, write_report
from sae_experiments.results.headline import GROUPS, ORDINARY_FVU
from sae_experiments.results.records import Record, write_record
from sae_experiments.results.table import load_table
from support.chromium import BROWSER, WHY_NOT, Page, browser
from support.fake_features import (
    HOSTILE,
    add_features,
    contexts,
    features_of,
    graph_of,
    hostile_features,
    text_of,
)
from support.fake_runs import make_run

pytestmark = pytest.mark.skipif(BROWSER is None, reason=WHY_NOT)
SCHEMES = ("file:", "blob:", "data:")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


def picture() -> Picture:
    fig, axes = panels(1, 2, width=6, height=2)
    axes[0, 0].plot([1, 2])
    return Picture("pareto", *bare(finish(fig, "A figure", ["n = 1 seed."])))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two cells of 1024 and 60 latents (the second with levels), a graph, a figure."""
    import numpy as np

    root, text = tmp_path_factory.mktemp("report"), text_of(131_072)
    run = make_run(root, "run_1", datasets=("enwik8", "text8"), seeds=(0,), curves=False)
    shown = contexts(text, np.array([500, 900]), np.random.default_rng(0), 3.0)
    add_features(run, "enwik8", 0, features_of(text, 1024), [graph_of(contexts=shown)])
    add_features(run, "text8", 0, features_of(text[:4000], 60, tree=True))
    return write_report(load_table([run]), [picture()], root / "report.html")


@pytest.fixture
def ready(page: Page, report: Path) -> Page:
    page.resize(1280, 900)
    page.open(report)
    return page


def until(page: Page, expression: str, wait_s: float = 5) -> Any:
    end = time.monotonic() + wait_s
    while not (found := page(expression)):
        assert time.monotonic() < end, f"{expression} does not hold; {page.messages}"
        time.sleep(0.02)
    return found


def rows(page: Page) -> list[int]:
    return page(
        "[...document.querySelectorAll('#browser .latents tr[data-latent]')].map((r) =>"
        " Number(r.dataset.latent))"
    )


def card(page: Page) -> str:
    return page("document.querySelector('#latent').innerText")


def type_in(page: Page, text: str) -> None:
    page(
        f"(() => {{ const b = document.querySelector('#search'); b.value = {text!r};"
        " b.dispatchEvent(new Event('input')); })()"
    )


# ------------------------------------------------------------------------------------------------
# it opens


@pytest.mark.slow  # by the clock: it says something only where nothing else runs
def test_it_opens_in_under_two_seconds(page: Page, report: Path) -> None:
    took = min(page.open(report) for _ in range(3))
    assert took < 2, f"{took:.1f} s"


def test_it_opens_without_console_messages_or_requests(page: Page, report: Path) -> None:
    page.resize(1280, 900)
    page.open(report)
    assert page.messages == []
    assert page.requests and all(url.startswith(SCHEMES) for url in page.requests)
    assert page("document.querySelector('.picture img').naturalWidth") > 100, "figures are shown"
    assert page("getComputedStyle(document.querySelector('main')).maxWidth") == "1240px", (
        "the style sheet is allowed"
    )


def test_the_policy_refuses_what_was_not_in_the_file(ready: Page) -> None:
    assert (
        ready(
            "(() => { const n = document.createElement('script'); try { n.text = 'window.hacked ="
            " 9'; } catch { return 'refused'; } document.head.append(n); return window.hacked; })()"
        )
        == "refused"
    )
    assert (
        ready("fetch('https://127.0.0.1:9/').then(() => 'reached', () => 'refused')") == "refused"
    )
    assert any(
        "Content Security Policy" in message or "Trusted" in message or "TrustedScript" in message
        for message in ready.messages
    )


# ------------------------------------------------------------------------------------------------
# it works


def test_sorting(ready: Page) -> None:
    order = (
        "[...document.querySelectorAll('#browser .latents tr[data-latent]"
        " td:nth-child({})')].map((c) => parseFloat(c.innerText))"
    )
    assert len(rows(ready)) == 100, "a page of the list"
    f1 = ready(order.format(3))
    assert f1 == sorted(f1, reverse=True)
    ready("document.querySelector('[data-sort=latent]').click()")
    assert rows(ready) == list(range(100))
    ready("document.querySelector('[aria-label=\"next page\"]').click()")
    assert rows(ready) == list(range(100, 200))
    assert "101 to 200 of 1024" in ready("document.querySelector('.pager').innerText")
    ready("document.querySelector('[data-sort=latent]').click()")
    assert rows(ready)[0] == 1023
    assert (
        ready(
            "document.querySelector('[data-sort=latent]').closest('th').getAttribute('aria-sort')"
        )
        == "descending"
    )


def test_a_latent_is_open_and_the_first_screen_shows_six(ready: Page) -> None:
    assert ready("document.querySelector('#latent-title').innerText").startswith("Latent ")
    assert ready("location.hash") == "", "opening the page goes nowhere"
    cards = "document.querySelectorAll('#cards .telling')"
    assert ready(f"{cards}.length") == 6
    assert ready(f"[...{cards}].every((n) => n.querySelectorAll('.ctx .at').length === 3)")
    assert ready(f"Math.max(...[...{cards}].map((n) => n.getBoundingClientRect().bottom))") < 900
    link = ready(f"{cards}[3].querySelector('a').getAttribute('href')")
    ready(f"{cards}[3].querySelector('a').click()")
    latent = link.rsplit("-", 1)[1]
    until(ready, f"document.querySelector('#latent-title')?.innerText === 'Latent {latent}'")
    until(ready, "document.querySelector('#latent').getBoundingClientRect().top < innerHeight")


def choose(page: Page, key: str, value: str) -> None:
    page(
        f"(() => {{ const b = document.querySelector('#{key}'); b.value = {value!r};"
        " b.dispatchEvent(new Event('change')); })()"
    )


def test_filters(ready: Page) -> None:
    stored = features_of(text_of(131_072), 1024)
    fits = {
        "all": lambda f: True,
        "rule": lambda f: f.get("f1", 0) >= 0.5,
        "unexplained": lambda f: f["density"] > 0 and not f.get("f1", 0) >= 0.5,
        "dense": lambda f: f["density"] > 0.1,
        "dead": lambda f: not f["density"],
    }
    offered = ready("[...document.querySelector('#filter').options].map((o) => o.value)")
    ready("document.querySelector('[data-sort=latent]').click()")
    for key, is_of_kind in fits.items():
        expected = [f["latent"] for f in stored if is_of_kind(f)]
        assert (key in offered) == bool(expected)
        if expected:
            choose(ready, "filter", key)
            assert rows(ready) == expected[:100], key
    choose(ready, "filter", "all")
    for concept in ready("[...document.querySelector('#concept').options].map((o) => o.value)")[1:]:
        choose(ready, "concept", concept)
        expected = [
            f["latent"] for f in stored if f.get("concept") == concept and abs(f["phi"]) >= 0.3
        ]
        assert expected and rows(ready) == expected[:100]


def test_a_page_of_a_running_run_reloads(
    page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assets = report_page._assets()
    script = assets["script"].replace("RELOAD_MS = 20000", "RELOAD_MS = 200")
    assert script != assets["script"]
    monkeypatch.setattr(report_page, "_assets", lambda: assets | {"script": script})
    for status, reloads in (("running", True), ("done", False)):
        run = make_run(tmp_path, status, seeds=(0,), status=status, curves=False)
        page.open(write_report(load_table([run]), [], tmp_path / "report.html"))
        page("window.before = true")
        if reloads:
            until(page, "window.before === undefined", wait_s=10)
        else:
            time.sleep(1)
            assert page("window.before"), "a finished run stays as it is"


def test_searching_text_rules_and_numbers(ready: Page) -> None:
    type_in(ready, "#77")
    assert rows(ready) == [77]
    ready(f"location.hash = '#latent-0-{rows(ready)[0]}'")
    shown = until(ready, "document.querySelector('#latent .rule code')?.innerText")
    type_in(ready, shown.upper())
    assert 77 in rows(ready), "the case of letters does not matter"
    type_in(ready, "zqzqzq")
    assert rows(ready) == [] and "0 of 1024" in ready(
        "document.querySelector('#browser .tools').innerText"
    )


def test_the_density_histogram_leads_to_latents(ready: Page) -> None:
    ready("document.querySelector('.pick.dead').dispatchEvent(new MouseEvent('click'))")
    assert all(i % 10 == 9 for i in rows(ready)) and "102 of 1024" in ready(
        "document.querySelector('#browser .tools').innerText"
    )
    ready("document.querySelector('.clear').click()")
    assert "1024 of 1024" in ready("document.querySelector('#browser .tools').innerText")
    ready("document.querySelectorAll('.pick')[5].focus()")
    ready.key("Enter")
    name = ready("document.querySelector('.pick.on').getAttribute('aria-label')")
    assert (
        name.split()[0]
        == ready("document.querySelector('#browser .tools [role=status]').innerText").split()[0]
    )


def test_a_latent_is_chosen_by_click_key_link_and_address(ready: Page, report: Path) -> None:
    first, second = rows(ready)[:2]
    ready("document.querySelector('#browser tr[data-latent]').click()")
    until(ready, f"document.querySelector('#latent-title')?.innerText === 'Latent {first}'")
    for part in (
        "Strongest contexts",
        "Promotes",
        "Suppresses",
        "Followed by",
        "Fires together with",
        "Activations where it fires",
    ):
        assert part in card(ready)
    ready("document.querySelector('#browser tr[data-latent]').focus()")
    ready.key("ArrowDown")
    until(ready, f"document.querySelector('#latent-title')?.innerText === 'Latent {second}'")
    ready("history.back()")
    until(ready, f"document.querySelector('#latent-title')?.innerText === 'Latent {first}'")
    other = ready("document.querySelector('#latent .related a').innerText").lstrip("#")
    ready("document.querySelector('#latent .related a').click()")
    until(ready, f"document.querySelector('#latent-title')?.innerText === 'Latent {other}'")
    ready.open(report, "#latent-1-3")
    assert "Latent 3" in card(ready) and ready("document.querySelector('#cell').value") == "1"
    ready("document.activeElement.blur()")
    ready.key("/")
    assert ready("document.activeElement.id") == "search"


def test_contexts_show_spaces_newlines_and_how_strongly_it_fires(ready: Page) -> None:
    ready("location.hash = '#latent-0-0'")
    until(ready, "document.querySelector('#latent-title')?.innerText === 'Latent 0'")
    shown = ready("[...document.querySelectorAll('#latent .ctx .text')].map((n) => n.textContent)")
    stored = features_of(text_of(131_072), 1024)[0]
    assert shown == [
        (c["before"] + c["at"] + c["after"]).replace("\n", "⏎")
        for c in stored["top"] + stored["samples"]
    ]
    assert ready("document.querySelectorAll('#latent .ctx .at').length") == 16
    assert (
        ready("getComputedStyle(document.querySelector('#latent .ctx .sp'), '::after').content")
        == '"·"'
    ), "a space can be seen"
    strongest = ready("[...document.querySelector('#latent .ctx .at').classList]")
    assert any(
        name.startswith("a") and name[1:].isdigit() and int(name[1:]) >= 8 for name in strongest
    )


def test_levels_are_a_tree_down_to_contexts(ready: Page, report: Path) -> None:
    ready.open(report, "#latent-1-0")
    ready(
        "[...document.querySelectorAll('#browser .tools button')].find((b) => b.innerText === 'As a"
        " tree').click()"
    )
    found = rows(ready)
    assert found and all(i < 15 for i in found), "the latents of the top level"
    ready("document.querySelector('#latent .branches details').open = true")
    until(
        ready,
        "document.querySelectorAll('#latent .branches .ctx').length > 0 ||"
        " document.querySelectorAll('#latent .branches details').length > 0",
    )
    assert "Below it" in card(ready)


def test_a_graph_opens_the_contexts_of_a_node(ready: Page) -> None:
    assert (
        ready("document.querySelectorAll('.graph .node').length") == 7
        and ready("document.querySelectorAll('.graph .edge').length") == 10
    )
    ready("document.querySelector('.graph .node').focus()")
    ready.key("Enter")
    assert "Strongest contexts" in ready("document.querySelector('.graph-card').textContent")
    assert ready("document.querySelectorAll('.graph .edge.on').length") == 2


def count(page: Page, selector: str) -> int:
    return page(f"document.querySelectorAll({selector!r}).length")


def press(page: Page, selector: str) -> None:
    page(f"document.querySelector({selector!r}).click()")


def at_node(page: Page, node: str, what: str) -> None:
    """Do something with a node of the graph, as `n`."""
    page(f"((n) => {{ {what} }})(document.querySelector('.node[data-node=\"{node}\"]'))")


def choose_node(page: Page, node: str) -> None:
    at_node(page, node, "n.dispatchEvent(new MouseEvent('click'))")


def test_an_edge_names_the_heads_that_carry_it(ready: Page) -> None:
    titles = ready("[...document.querySelectorAll('.graph .edge title')].map((n) => n.textContent)")
    assert any("block 1 head 2 0.750, no head 0.250" in title for title in titles)
    choose_node(ready, "1.0")
    assert "(block 1 head 1 0.750" in ready("document.querySelector('.graph-card').textContent")


def test_supernodes_fold_and_say_what_their_removal_did(ready: Page) -> None:
    press(ready, ".graph-figure .fold")
    assert count(ready, ".graph .node") == 6 and count(ready, ".graph .edge") == 8
    assert ready("document.querySelector('.graph-figure .fold').ariaPressed") == "true"
    choose_node(ready, "group 0")
    said = ready("document.querySelector('.graph-card').textContent")
    assert "Its 3 latents removed together" in said and "0.750 → 0.500" in said and "-1.25" in said
    assert "sum of 2 edges" in said and "Ungroup" in said
    # 1 - 2 into the first, half of it into the second: what opposes each other is added up.
    titles = ready(
        "[...document.querySelectorAll('.graph .edge.on title')].map((n) => n.textContent)"
    )
    assert len(titles) == 2 and all("-1 (" in title or "-0.500 (" in title for title in titles)
    press(ready, ".graph-card .ungroup")
    assert count(ready, ".graph .node") == 7


def test_nodes_are_pinned_grouped_and_hidden_by_hand(ready: Page) -> None:
    for node in ("0.3", "0.4"):
        at_node(ready, node, "n.focus()")
        ready.key("p")
        assert ready("document.activeElement.classList.contains('pinned')"), "focus stays"
    assert count(ready, ".graph .node.pinned") == 2
    ready(
        "(() => { const r = document.querySelector('.graph-figure input[type=range]'); r.value ="
        " r.min; r.dispatchEvent(new Event('input')); })()"
    )
    kept = ready("[...document.querySelectorAll('.graph .node')].map((n) => n.dataset.node)")
    assert {"0.3", "0.4", "0.0"} <= set(kept) and len(kept) < 6
    press(ready, ".graph-figure .join")
    assert count(ready, ".graph .node.many") == 1
    ready.resize(390, 844)
    assert ready("document.documentElement.scrollWidth <= 390"), "no scrolling sideways"


def test_dark_light_and_what_the_system_says(ready: Page) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    light = ready(background)
    ready("document.querySelector('#theme').click()")
    dark = ready(background)
    assert light != dark and ready("document.querySelector('#theme').innerText") == "Light"
    ready("document.querySelector('#theme').click()")
    assert ready(background) == light
    ready(
        "(() => { delete document.documentElement.dataset.theme; try { localStorage.clear(); }"
        " catch {} })()"
    )
    ready.resize(1280, 900, dark=True)
    assert ready(background) == dark


def test_a_phone_shows_it_without_scrolling_sideways(ready: Page) -> None:
    ready.resize(390, 844)
    ready("location.hash = '#latent-0-0'")
    until(ready, "document.querySelector('#latent-title')?.innerText === 'Latent 0'")
    assert ready("document.documentElement.scrollWidth") == 390
    for part in ("#summary .scroll", "#browser .list", "#latent", "figure"):
        assert ready(f"document.querySelector('{part}').getBoundingClientRect().right") <= 390


def test_printing_leaves_the_controls_out_and_the_tables_whole(ready: Page) -> None:
    ready("location.hash = '#latent-0-0'")
    ready.resize(800, 900, media="print")
    shown = "getComputedStyle(document.querySelector('{}')).display"
    assert [ready(shown.format(part)) for part in ("nav", ".tools", ".list")] == ["none"] * 3
    assert (
        ready(shown.format("#latent")) == "block"
        and ready("getComputedStyle(document.querySelector('#latent')).maxHeight") == "none"
    )
    ready.resize(1280, 900)


def test_tokens_are_marked_whole_and_their_spaces_are_seen(page: Page, tmp_path: Path) -> None:
    def context(before: str, at: str, after: str) -> dict[str, Any]:
        acts = [0.0] * len(before) + [1.0] * len(at) + [0.0] * len(after)
        return {"before": before, "at": at, "after": after, "acts": acts, "tokens": [at], "row": 3}

    near, far = context("the old", " cat", " sat"), context("x" * 200, "\n\n", "A")
    token = {"density": 0.01, "max": 1.0, "histogram": [3, 1], "promotes": [[" authent", 1.5]]}
    latents = [
        token | {"latent": 0, "top": [near]},
        token | {"latent": 1, "top": [near, far]},
        {"latent": 2, "rule": "amp", "f1": 0.7},
        {"latent": 3, "weak_rule": "zzz", "f1": 0.02},
    ]
    run = make_run(tmp_path, "run_1", datasets=("text8",), seeds=(0,), curves=False)
    add_features(run, "text8", 0, latents)
    path = write_report(load_table([run]), [], tmp_path / "report.html")
    page.open(path, "#latent-0-0")
    marked = "[...document.querySelectorAll('#latent .ctx .at')].map((n) => n.textContent).join('')"
    assert page(marked) == " cat"
    svg = "document.querySelector('#latent svg.chart').textContent"
    assert "␣authent" in card(page) and "3 tokens (log scale)" in page(svg)
    assert page("document.querySelector('#latent .chars li .char').textContent") == "␣authent"
    page.open(path, "#latent-0-1")
    assert page(marked) == " cat⏎⏎"
    assert not page("Boolean(document.querySelector('#latent .aligned'))"), "long ones are wrapped"
    page.open(path, "#latent-0-2")
    assert "amp" in card(page) and "Dead" not in card(page), "its density is not known"
    page.open(path, "#latent-0-3")
    assert "No short rule" in card(page) and "F1 0.02" in card(page) and "zzz" not in card(page)


def test_many_large_graphs_open_as_fast_as_one_looks_at_them(page: Page, tmp_path: Path) -> None:
    nodes = [{"id": str(i), "label": f"node {i}", "column": i % 5} for i in range(45)]
    edges = [
        {"from": str(i), "to": str(j), "weight": (i - j) / 45}
        for i in range(45)
        for j in range(45)
        if i % 5 < j % 5
    ]
    graphs = [{"title": f"graph {i}", "nodes": nodes, "edges": edges} for i in range(24)]
    run = make_run(tmp_path, "run_1", datasets=("enwik8",), seeds=(0,), curves=False)
    add_features(run, "enwik8", 0, features_of(text_of(4000), 10), graphs)
    page.open(write_report(load_table([run]), [], tmp_path / "report.html"))
    assert page("document.querySelectorAll('.graph-figure .node').length") == 24 * len(nodes)
    looks = "[...document.querySelectorAll('.graph-figure')].map((f) => {}).filter(Boolean).length"
    drawn = "f.querySelector('svg').checkVisibility({ contentVisibilityAuto: true })"
    assert page(looks.format(drawn)) < 4, "graphs out of sight are laid out when they are reached"
    assert page("document.querySelector('.graph-figure').firstElementChild.tagName") == (
        "FIGCAPTION"
    ), "what a graph is about stands above it"


def test_a_page_of_paper_holds_a_table_with_every_main_metric(page: Page, tmp_path: Path) -> None:
    # Without outliers, the error of all rows stands alone.
    names = [m for group in GROUPS.values() for m in group if m != ORDINARY_FVU]
    metrics = dict.fromkeys(names, 0.12345)
    run = make_run(tmp_path, "run_1", datasets=("enwik8",), seeds=(0,), curves=False)
    write_record(run, Record(dataset="enwik8", seed=0, metrics=metrics))
    page.resize(720, 1000, media="print")
    page.open(write_report(load_table([run]), [], tmp_path / "report.html"))
    assert page("document.querySelectorAll('#summary .main tbody td').length") == len(metrics)
    assert page("document.querySelector('#summary .main').getBoundingClientRect().right") <= 720
    page.resize(1280, 900)


# ------------------------------------------------------------------------------------------------
# hostile text


def visible(text: str, *, is_bytes: bool) -> str:
    """What a person must see: every character as itself, or as its name where it would not be
    seen or would move others.
    """
    import unicodedata

    out = ""
    for char in text:
        code, kind = ord(char), unicodedata.category(char)
        if char in "\n\t\r":
            out += {"\n": "⏎", "\t": "⇥", "\r": "␍"}[char]
        elif char == " ":
            out += char
        elif code < 32 or (code > 126 if is_bytes else 126 < code < 160):
            out += f"{code:02X}"
        elif kind in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs"):
            out += f"U+{code:04X}"
        else:
            out += "◌" + char if kind.startswith("M") else char
    return out


#: Whether the characters of every context stand from left to right, line by line, in the order in
#: which they are stored.
IN_ORDER = """[...document.querySelectorAll('#latent .ctx .text > span')].every((text) => {
  const walker = document.createTreeWalker(text, NodeFilter.SHOW_TEXT);
  const range = document.createRange();
  let right = -1e9, bottom = -1e9;
  for (let node = walker.nextNode(); node; node = walker.nextNode())
    for (let i = 0; i < node.length; i++) {
      if (/[\\p{M}\\p{Cs}◌]/u.test(node.data[i])) continue;
      range.setStart(node, i); range.setEnd(node, i + 1);
      const box = range.getBoundingClientRect();
      if (box.width === 0) continue;
      if (box.left < right - 2 && box.top < bottom - 2) return false;
      right = box.right; bottom = box.bottom;
    }
  return true;
})"""


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_hostile_text_is_shown_as_it_is_and_nothing_runs(
    page: Page, tmp_path: Path, encoding: str
) -> None:
    bad = HOSTILE[0] + HOSTILE[1] + HOSTILE[2]
    run = make_run(
        tmp_path,
        "run_1",
        seeds=(0,),
        curves=False,
        label=bad,
        config={"data": {"shakespeare_char": {"encoding": encoding}}, bad: bad},
    )
    add_features(run, "shakespeare_char", 0, hostile_features(), [graph_of(bad)])
    path = write_report(
        load_table([run]), [picture()._replace(title=bad, caption=bad)], tmp_path / "report.html"
    )
    page.resize(1280, 900)
    page.open(path)
    assert bad in page("document.title") and bad in page("document.querySelector('h1').innerText")
    page("document.querySelector('.graph .node').dispatchEvent(new MouseEvent('click'))")
    for j, text in enumerate(HOSTILE):
        page(f"location.hash = '#latent-0-{j}'")
        until(page, f"document.querySelector('#latent-title')?.innerText === 'Latent {j}'")
        shown = page(
            "[...document.querySelectorAll('#latent .ctx .text')].map((n) => n.textContent)"
        )
        # lone surrogates reach the driver as U+FFFD wherever they stand by themselves; in the page
        # they are named
        assert shown == [visible(text + text[0] + text, is_bytes=encoding == "latin-1")] * 3, (
            j,
            text,
        )
        assert page(IN_ORDER), f"marks for writing direction move nothing: {text!r}"
    type_in(page, "</script>")
    assert 0 in rows(page)
    assert page("document.querySelectorAll('#latent .ctx').length") > 0
    names = set(page("[...document.querySelectorAll('main *')].map((n) => n.localName)"))
    assert not names & {
        "script",
        "iframe",
        "object",
        "embed",
        "link",
        "meta",
        "base",
        "form",
        "style",
        "foreignObject",
    }
    assert page("[...document.querySelectorAll('img')].every((n) => n.src.startsWith('blob:'))")
    assert page(
        "[...document.querySelectorAll('*')].every((n) => [...n.attributes].every((a) =>"
        " !a.name.startsWith('on')))"
    )
    assert page(
        "[...document.querySelectorAll('a')].every((n) => n.getAttribute('href').startsWith('#'))"
    )
    assert page("window.hacked === undefined") and page.messages == []
    assert all(url.startswith(SCHEMES) for url in page.requests)

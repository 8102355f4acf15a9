"""The report as a file: numbers, escaping, packing, and what it does with runs that are
incomplete or hostile.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import logging
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from sae_experiments.cli.main import draw_report
from sae_experiments.errors import UserError
from sae_experiments.plots.base import bare, finish, panels
from sae_experiments.report import chart, comparison, features, markup, overview, page
from sae_experiments.report.figures import draw_all, run_report
from sae_experiments.report.page import Picture
from sae_experiments.results.compare import compare
from sae_experiments.results.records import Record, read_records, write_record
from sae_experiments.results.table import RunTable, load_table
from support.common import CONF, ROOT
from support.fake_features import (
    HOSTILE,
    LENGTH,
    add_features,
    contexts,
    features_of,
    graph_of,
    hostile_features,
    text_of,
)
from support.fake_runs import make_run

SCRIPT = "".join((page.HERE / name).read_text() for name in page.SCRIPTS)


KNOWN = """
html head meta title style body a nav div button main header h1 h2 h3 p section table thead
tbody tr th td small span b strong ul li svg text line circle details summary code pre figure
figcaption script noscript
"""


class Elements(HTMLParser):
    """Every element of a page with its attributes, and the text of the visible part by element."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def made(tmp_path: Path, name: str = "run_1", **options: Any) -> Path:
    return make_run(tmp_path, name, **({"seeds": (0,), "curves": False} | options))


def unpacked(html: str, name: str) -> Any:
    (found,) = re.findall(rf'<script type="application/gzip" id="{name}">([^<]*)</script>', html)
    return json.loads(gzip.decompress(base64.b64decode(found)))


def opened(cell: dict[str, Any], context: list[Any]) -> tuple[str, dict[int, int]]:
    """Text and values of a packed context, as the script reads them."""
    flat = context[-1]
    acts = dict(zip(flat[::2], flat[1::2], strict=True))
    if isinstance(context[0], str):
        return context[0], acts
    row, length = context[:2]
    first, text = next((first, text) for first, text in reversed(cell["text"]) if first <= row)
    return text[row - first : row - first + length], acts


# ------------------------------------------------------------------------------------------------
# markup


@pytest.mark.parametrize("text", HOSTILE)
def test_text_cannot_become_markup(text: str) -> None:
    html = markup.tag("p", text, markup.tag("b", "bold"), title=text)
    found = Elements(html).found
    assert [name for name, _ in found] == ["p", "b"]
    assert set(found[0][1]) == {"title"}
    plain = "".join(
        c if c in "\n\t" or ord(c) >= 32 else "\ufffd"
        for c in text.encode("utf-8", "replace").decode()
    )
    assert html == f'<p title="{markup.text(plain)}">{markup.text(plain)}<b>bold</b></p>'
    assert Elements(html).text[0] == plain or min(c for c in text if ord(c) > 127) >= "\x80", (
        "characters survive (C1 controls become what HTML says)"
    )


@pytest.mark.parametrize("text", HOSTILE)
def test_json_in_a_page_cannot_end_its_element(text: str) -> None:
    block = markup.json_block({text: [text]})
    assert json.loads(block) == {text: [text]}
    assert block.isascii() and not set(block) & set("<>&")


def test_nothing_inserted_into_the_template_is_filled_again() -> None:
    assert page._fill("{{a}} {{b}}", {"a": "{{b}}", "b": "x"}) == "{{b}} x"


# ------------------------------------------------------------------------------------------------
# safety of the whole file


def test_a_hostile_run_gives_a_page_of_known_elements(tmp_path: Path) -> None:
    bad = HOSTILE[0] + HOSTILE[1]
    run = made(
        tmp_path,
        label=bad,
        device=bad,
        argv=[bad],
        config={"data": {}, bad: bad},
        corpora={"shakespeare_char": {"corpus": bad, bad: [bad]}},
    )
    add_features(run, "shakespeare_char", 0, hostile_features(), [graph_of(bad)])
    picture = Picture("pareto", bad, bad, b"<svg></svg>")
    html = page.page(load_table([run]), [picture])
    elements = Elements(html).found
    known = set(re.findall(r"\w+", KNOWN))
    assert {name for name, _ in elements} <= known
    for name, attributes in elements:
        assert not any(
            key.startswith("on") or key in ("src", "style", "srcdoc", "formaction")
            for key in attributes
        ), (name, attributes)
        assert (attributes.get("href") or "#").startswith("#")
    scripts = [attributes.get("type") for name, attributes in elements if name == "script"]
    assert scripts == ["application/json", "application/gzip", "application/gzip", None]


def test_the_policy_allows_this_script_and_style_and_nothing_else(tmp_path: Path) -> None:
    html = page.page(load_table([made(tmp_path)]), [])
    policy = next(
        a["content"]
        for name, a in Elements(html).found
        if name == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    for kind, pattern in (
        ("script", r"<script>(.*?)</script>"),
        ("style", r"<style>(.*?)</style>"),
    ):
        (content,) = re.findall(pattern, html, re.S)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}';" in policy
    assert (
        "default-src 'none'" in policy
        and "unsafe" not in policy
        and "http" not in policy
        and "require-trusted-types-for 'script'" in policy
    )


def test_the_script_makes_no_markup_from_strings_and_asks_no_network() -> None:
    for word in (
        "innerHTML",
        "outerHTML",
        "insertAdjacent",
        "document.write",
        "eval(",
        "Function(",
        "fetch(",
        "XMLHttp",
        "WebSocket",
        "import(",
        "srcdoc",
        "DOMParser",
        "createContextualFragment",
        "postMessage",
        "</script",
        "http:",
        'setTimeout("',
    ):
        assert word not in SCRIPT.replace("http://www.w3.org/2000/svg", ""), word
    css = (page.HERE / "report.css").read_text()
    assert "url(" not in css and "@import" not in css and "</style" not in css


# ------------------------------------------------------------------------------------------------
# features


def test_packed_contexts_are_the_text_and_the_values_that_were_stored(tmp_path: Path) -> None:
    text = text_of(20_000)
    stored = features_of(text, 40)
    cell = features.FeatureCell("run_1", "d", 0, False, stored)
    found = json.loads(gzip.decompress(features.pack(cell, features.FULL)))
    assert len(found["latents"]) == 40
    for was, now in zip(stored, found["latents"], strict=True):
        for kind in ("top", "samples") if "top" in was else ():
            for before, after in zip(was[kind], now[kind], strict=True):
                got, acts = opened(found, after)
                assert got == before["before"] + before["at"] + before["after"]
                expected = {i: v for i, v in enumerate(before["acts"]) if v}
                assert set(acts) == set(expected)
                assert all(abs(acts[i] - 99 * v / was["max"]) <= 1 for i, v in expected.items())
        assert {k: v for k, v in now.items() if k not in ("top", "samples")} == {
            k: pytest.approx(v, rel=5e-3) if isinstance(v, float) else v
            for k, v in was.items()
            if k not in ("top", "samples")
        }


def test_contexts_that_disagree_about_a_row_keep_their_own_text() -> None:
    one = {"before": "ab", "at": "c", "after": "d", "acts": [0, 0, 2.0, 0], "row": 12}
    other, without = one | {"before": "xy"}, {k: v for k, v in one.items() if k != "row"}
    packed = features.pack(
        features.FeatureCell(
            "r",
            "d",
            0,
            False,
            [{"latent": 0, "max": 2.0, "top": [one, other, without, one | {"row": 1}]}],
        ),
        features.FULL,
    )
    found = json.loads(gzip.decompress(packed))
    assert found["text"] == [[10, "abcd"]]
    top = found["latents"][0]["top"]
    assert top == [
        [10, 4, 2, [2, 99]],
        ["xycd", 2, [2, 99]],
        ["abcd", 2, [2, 99]],
        ["abcd", 2, [2, 99]],
    ]


def test_numbers_that_json_does_not_have_become_null() -> None:
    packed = features.pack(
        features.FeatureCell(
            "r",
            "d",
            0,
            False,
            [{"latent": 0, "max": 1.0, "f1": float("nan"), "partners": [[1, float("inf")]]}],
        ),
        (1, 0),
    )
    assert json.loads(gzip.decompress(packed), parse_constant=lambda name: 1 / 0)["latents"] == [
        {"latent": 0, "max": 1.0, "f1": None, "partners": [[1, None]]}
    ]


def test_negative_and_tiny_values_keep_their_sign() -> None:
    top = {"before": "", "at": "a", "after": "bc", "acts": [-4.0, 1e-9, -1e-9], "row": 0}
    found = json.loads(
        gzip.decompress(
            features.pack(
                features.FeatureCell("r", "d", 0, False, [{"latent": 0, "max": 4.0, "top": [top]}]),
                (1, 0),
            )
        )
    )
    assert found["latents"][0]["top"] == [[0, 3, 0, [0, -99, 1, 1, 2, -1]]]


def test_whole_strings_become_contexts() -> None:
    cell = features.FeatureCell(
        "r",
        "palindrome",
        0,
        False,
        [
            {
                "latent": 3,
                "density": 0.5,
                "max": 2.0,
                "strings": [["<ab|ba>", 2.0], ["<bb|bb>", 1.0]],
            }
        ],
    )
    (latent,) = json.loads(gzip.decompress(features.pack(cell, features.FULL)))["latents"]
    assert latent["top"] == [
        ["<ab|ba>", -1, [v for i in range(7) for v in (i, 99)]],
        ["<bb|bb>", -1, [v for i in range(7) for v in (i, 50)]],
    ]
    assert "strings" not in latent
    cell.features[0]["position"] = 2
    (latent,) = json.loads(gzip.decompress(features.pack(cell, features.FULL)))["latents"]
    assert latent["top"][0] == ["<ab|ba>", 2, [2, 99]]


def test_a_laptop_run_fits_and_what_does_not_is_said() -> None:
    text = text_of(131_072)
    assert LENGTH == 128
    cell = features.FeatureCell("r", "shakespeare_char", 0, False, features_of(text, 256))
    found, note = features.packed([cell], 4_000_000)
    assert not note and 20 * len(found[0][1]) < 4_200_000, (
        "five cells of 1024 latents, and the rest of the page, in 5 MB"
    )
    small = len(found[0][1])
    other = cell._replace(seed=1)
    found, note = features.packed([cell, other], small * 3 // 2)
    assert (
        len(found) == 2
        and "contexts" in note
        and sum(len(data) for _, data in found) <= small * 3 // 2
    )
    found, note = features.packed([cell, other], small * 2 // 3)
    assert len(found) == 1 and "first seed" in note and len(found[0][1]) <= small * 2 // 3
    found, note = features.packed([cell, other], 1000)
    assert found == [] and "only 0 of 2 cells" in note


def test_damaged_features_are_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = made(tmp_path, seeds=(0, 1, 2))
    (run / "features").mkdir()
    (run / "features" / "shakespeare_char_0.json").write_text("[{ torn")
    (run / "features" / "shakespeare_char_1.json").write_text('{"not": "a list"}')
    (run / "features" / "shakespeare_char_2.json").write_text(
        '[null, {"no": "latent"}, {"latent": 4, "density": 0.5, "top": [{"acts": "?"}, 3]}]'
    )
    html = page.page(load_table([run]), [])
    assert unpacked(html, "cell-0")["latents"] == [
        {"latent": 4, "density": 0.5, "top": [["", -1, []]]}
    ]
    assert "cell-1" not in html and len(caplog.messages) >= 2


def test_bytes_are_told_from_characters(tmp_path: Path) -> None:
    run = made(
        tmp_path,
        datasets=("enwik8", "text8"),
        config={"data": {"enwik8": {"encoding": "latin-1"}, "text8": {"encoding": "utf-8"}}},
    )
    for dataset in ("enwik8", "text8"):
        add_features(run, dataset, 0, features_of(text_of(1000), 3))
    (loaded,) = load_table([run]).runs
    assert {cell.dataset: cell.is_bytes for cell in features.cells_of(loaded)} == {
        "enwik8": True,
        "text8": False,
    }


def test_graphs_carry_the_contexts_of_their_nodes(tmp_path: Path) -> None:
    run = made(tmp_path)
    text = text_of(2000)
    shown = contexts(text, np.array([500, 900]), np.random.default_rng(0), 3.0)
    add_features(
        run,
        "shakespeare_char",
        0,
        features_of(text, 3),
        [graph_of(contexts=shown), {"title": "empty", "nodes": [], "edges": []}],
    )
    (graph,) = features.graphs_of(load_table([run]).runs[0])
    node = graph["nodes"][0]
    assert node["max"] == pytest.approx(max(max(c["acts"]) for c in shown), rel=5e-3)
    assert [c[0] for c in node["contexts"]] == [c["before"] + c["at"] + c["after"] for c in shown]
    assert '<div id="graphs"></div>' in page.page(load_table([run]), [])


# ------------------------------------------------------------------------------------------------
# tables


def test_one_run_shows_every_dataset_beside_the_baseline(tmp_path: Path) -> None:
    base, run = (
        made(tmp_path, "run_0", seeds=(0, 1, 2), datasets=("enwik8", "text8")),
        made(tmp_path, sae="topk", seeds=(0, 1, 2), datasets=("enwik8", "text8")),
    )
    table = load_table([base, run])
    html = page.page(RunTable([table.runs[1]], table.baseline), [])
    stat = table.runs[1].stats["text8"]["sae_fvu"]
    text = " ".join(Elements(html).text)
    assert (
        f"{stat.mean:.4f}"[:6] in text and "Δ -0.0" in text and "▲ better" in text and "n=3" in text
    )
    assert (
        "Baseline: run_0: standard k=32." in text
        and "standard.StandardSAE" in text
        and "topk.TopkSAE" in text
    )
    assert "python experiment.py --out_dir=run_1" in text and "sum |x - recon|^2" in text


def test_many_runs_become_rows_and_what_cannot_be_compared_says_why(tmp_path: Path) -> None:
    paths = [made(tmp_path, f"run_{i}", k=8 * (i + 1)) for i in range(4)] + [
        made(tmp_path, "run_9", preset="full")
    ]
    html = page.page(load_table(paths), [])
    text = " ".join(Elements(html).text)
    assert "Comparison of 5 runs" in text
    why = "preset full vs laptop"
    assert text.count(why) == 1 and f"Not comparable with run_0: run_9: {why}." in text
    rows = load_table([*paths, *(made(tmp_path, f"more_{i}") for i in range(3))])
    tall = Elements(page.page(rows, []))
    assert ("table", {"class": "numbers wide"}) in tall.found


def test_stand_in_text_null_and_unfinished_are_said(tmp_path: Path) -> None:
    run = made(tmp_path, stand_in=True, status="cut")
    (record,) = read_records(run)
    metrics: dict[str, Any] = record.metrics | {"sae_fvu": None}
    write_record(
        run,
        Record(
            dataset=record.dataset,
            seed=0,
            metrics=metrics,
            why_null={"sae_fvu": "the <loss> blew up"},
        ),
    )
    text = " ".join(Elements(page.page(load_table([run]), [])).text)
    assert (
        "STAND-IN TEXT" in text
        and "the <loss> blew up" in text
        and "Not finished in good order: run_1 cut." in text
    )


def test_a_part_that_fails_costs_only_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(comparison, "comparison", lambda *_: 1 / 0)
    html = page.page(load_table([made(tmp_path)]), [])
    assert 'id="details"' in html and 'id="summary"' not in html
    assert caplog.messages == ["report: summary left out, ZeroDivisionError: division by zero"]


def test_the_first_screen_is_written_from_the_numbers(tmp_path: Path) -> None:
    saes = ("topk", "standard")
    reports = [f"{corpus}.{sae}" for corpus in ("enwik8", "text8") for sae in saes]
    run = made(tmp_path, datasets=reports, config={"saes": {sae: {} for sae in saes}})
    for corpus in ("enwik8", "text8"):
        for sae, fvu in (("topk", 0.1), ("standard", 0.3)):
            for seed in range(3):
                metrics = {"sae_fvu": fvu + 0.001 * seed, "sae_l0": 30.0 + seed}
                record = Record(dataset=f"{corpus}.{sae}", seed=seed, metrics=metrics)
                write_record(run, record)
    for report in reports:
        add_features(run, report, 0, features_of(text_of(4000), 40))
    table = load_table([run])
    html = page.page(table, [])
    text = " ".join(Elements(html).text)
    assert "run_1 fitted 2 SAEs (standard, topk)" in text and "3 seeds" in text
    assert "topk rebuilds best on enwik8 (FVU 0.1010 ± 0.0006 at L0 31) and text8" in text
    assert "its lead over standard is believable" in text
    assert "rebuilds best on" not in overview.what_came_out(table, pd.DataFrame())
    assert html.count('<svg viewBox="0 0 360') == 2 and html.count('class="dot v') == 4
    data = json.loads(re.findall(r'id="data">([^<]*)<', html)[0])
    assert len(data["cards"]) == len({tuple(card) for card in data["cards"]}) > 2
    for cell, latent in data["cards"]:
        feature = unpacked(html, f"cell-{cell}")["latents"][latent]
        assert feature["latent"] == latent and feature["rule"] and feature["top"]


@pytest.mark.parametrize(
    ("places", "said"),
    [
        ({"b": ("behind", "behind"), "c": ("behind", "behind")}, ["over all others is believable"]),
        (
            {"b": ("behind", "tied"), "c": ("behind", "behind")},
            ["over b on x, c is believable", "from b on y is within the error"],
        ),
        ({"b": ("", "")}, ["with one seed, and so no standard error, its lead is only a hint"]),
    ],
)
def test_leads_are_said_once_for_all_datasets(places: Any, said: list[str]) -> None:
    contested = {
        dataset: [{"name": "a", "place": "best"}]
        + [{"name": name, "place": of_name[i]} for name, of_name in places.items()]
        for i, dataset in enumerate(("x", "y"))
    }
    parts = list(overview._believable(contested))
    assert len(parts) == len(said)
    assert all(part.endswith(end) for part, end in zip(parts, said, strict=True)), parts


def test_the_states_of_many_runs_are_one_line_that_opens(tmp_path: Path) -> None:
    runs = [made(tmp_path, f"run_{i}", status="done" if i else "cut") for i in range(6)]
    text = page.page(load_table(runs), [])
    assert "6 runs: 1 cut; 5 done; preset laptop" in text
    assert "6 runs: " not in page.page(load_table(runs[:3]), [])


def test_concepts_with_a_name_tell_more_than_single_characters() -> None:
    plain = {"density": 0.01, "f1": 0.9, "lift": 50.0, "top": [1]}
    told = {
        rule: overview._telling(plain | {"rule": rule})
        for rule in ("(after the word the)", "the", "N", "(letter t)")
    }
    assert told["(after the word the)"] == told["the"] > told["N"] > told["(letter t)"]
    unruled = [overview._telling({"density": d, "top": [1]}) for d in (2e-4, 0.01, 0.25)]
    assert 0 < max(unruled) == unruled[1] < told["(letter t)"]


def test_every_study_is_called_by_its_name(tmp_path: Path) -> None:
    for folder in sorted((ROOT / "sae_experiments" / "studies").glob("[a-z]*/study.py")):
        name = folder.parent.name
        target = f"sae_experiments.studies.{name}.study.{name.capitalize()}"
        run = made(tmp_path, f"run_{name}", config={"study": {"_target_": target}})
        said = overview.what_was_done(load_table([run]))
        assert (f"in the study {name} " in said) == (name != "language"), said


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"site": "resid.mid"}, "to resid.mid of"),
        ({"site": "resid.mid", "sae": {"read": "mlp_in.2", "write": "mlp_out.2"}}, "mlp_in.2 -> m"),
        ({"sae": {"read": ["resid.1", "resid.2"]}}, "to resid.1, resid.2 of"),
        (
            {"saes": {str(n): {"read": f"resid.{n}"} for n in (15, 5, 25)}},
            "to resid.5, resid.15, resid.25 of",
        ),
        ({}, "to activations of"),
    ],
)
def test_the_first_sentence_names_the_sites_that_were_read(
    tmp_path: Path, config: dict[str, Any], said: str
) -> None:
    target = {"_target_": "sae_experiments.studies.language.study.Language"}
    run = made(tmp_path, "run_1", config={"study": target} | config)
    assert said in overview.what_was_done(load_table([run]))


def test_names_stay_inside_the_picture(tmp_path: Path) -> None:
    names = ("cross_layer_transcoder", "per_layer_transcoder", "a" * 60, "topk")
    runs = [made(tmp_path, name, sae="topk") for name in names]
    svg = str(chart.sparsity_against_fidelity(load_table(runs)))
    texts = [tag for tag in re.findall(r"<text[^>]*>[^<]*", svg) if 'class="name' in tag]
    assert len(texts) == len(names)
    for text in texts:
        (x,), name = re.findall(r' x="([\d.]+)"', text), text.partition(">")[2]
        assert float(x) + chart.CHARACTER * len(name) <= chart.WIDTH, name
    assert "cross_layer_transcoder" in svg


def test_the_first_screen_of_a_lone_sae_says_what_it_keeps_adds_and_explains(
    tmp_path: Path,
) -> None:
    run = made(tmp_path, sae="topk", datasets=["text8"])
    metrics = {
        "sae_fvu": 0.02,
        "sae_l0": 31.5,
        "ce_delta_bits": 0.0123,
        "rule_interpretable_frac": 0.45,
    }
    write_record(run, Record(dataset="text8", seed=0, metrics=metrics))
    table = load_table([run])
    assert overview.what_came_out(table, compare(table)) == (
        "topk keeps 98 % of the variance of the activations on text8 (FVU 0.02 at L0 31.5), "
        "adds 0.0123 bits/char to the model's loss and has a rule for 45 % of its latents."
    )
    scale = chart._scale([0.02, 0.0], 0, 100)
    assert scale.low == 0, "with nothing to compare, the picture begins at zero"


@pytest.mark.parametrize("values", [[3.0], [3.0, 3.0], [1e-9, 2e-9], [8, 32, 1000], [31.0, 33.0]])
def test_ticks_of_the_picture_are_within_the_axis(values: list[float]) -> None:
    scale = chart._scale(values, 0, 100)
    assert all(scale.low <= tick <= scale.high for tick in scale.ticks())
    assert 1 <= len(scale.ticks()) <= 12
    assert all(0 <= scale(value) <= 100 for value in values)


def test_a_run_that_goes_on_says_so_and_reloads(tmp_path: Path) -> None:
    progress = {"cells": 5, "finished": 1, "running": ["enwik8 seed 0", "<b> seed 0"]}
    run = made(tmp_path, status="running", progress=progress)
    html = page.page(load_table([run]), [])
    data = json.loads(re.findall(r'id="data">([^<]*)<', html)[0])
    assert data["running"] == [
        {"run": "run_1", "cells": 5, "finished": 1, "at_work": progress["running"]}
    ]
    text = " ".join(Elements(html).text)
    assert "run_1 is still running: 1 of 5 cells are finished; now enwik8 seed 0, <b>" in text
    done = page.page(load_table([made(tmp_path, "run_2")]), [])
    assert 'id="alive"' not in done and '"running":[]' in done


# ------------------------------------------------------------------------------------------------
# figures


def figure(caption: str) -> Figure:
    fig, axes = panels(1, 1, width=3, height=2)
    axes[0, 0].plot([1, 2])
    return finish(fig, "A title", [caption])


def test_a_figure_in_a_report_has_title_and_caption_as_text() -> None:
    fig = figure("n = 3 seeds. " * 8)
    tall = fig.get_figheight()
    title, caption, svg = bare(fig)
    assert (
        (title, caption) == ("A title", " ".join(["n = 3 seeds."] * 8))
        and svg.startswith(b"<?xml")
        and fig.get_figheight() < tall
    )


def test_figures_of_a_study_have_a_section_of_their_own(tmp_path: Path) -> None:
    pictures = [
        Picture(name, f"T {name}", "C", b"<svg/>")
        for name in ("pareto", "toy_a", "toy_b", "circuit_x")
    ]
    html = page.page(load_table([made(tmp_path)]), pictures)
    sections = re.findall(r'<section id="([^"]*)">|<section[^>]*id="([^"]*)"', html)
    assert [a or b for a, b in sections] == [
        "overview",
        "summary",
        "figures-general",
        "figures-toy",
        "details",
    ]
    assert unpacked_svg(html, "figure-toy-a") == b"<svg/>"


def unpacked_svg(html: str, name: str) -> bytes:
    (found,) = re.findall(rf'id="{name}">([^<]*)</script>', html)
    return gzip.decompress(base64.b64decode(found))


def test_a_report_of_a_run_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    run = made(tmp_path)
    path = run_report(run, {"mine": lambda: lambda table: figure("x"), "bad": lambda: 1 / 0})
    assert (
        path == run / "report.html"
        and "figure-mine" in path.read_text()
        and "figure-bad" not in path.read_text()
    )
    assert draw_all(load_table([run]), {}, None, None) == ([], [])
    with pytest.raises(UserError, match="no results"):
        run_report(tmp_path / "nothing", {})


def test_the_same_run_the_same_bytes(tmp_path: Path) -> None:
    run = made(tmp_path)
    add_features(run, "shakespeare_char", 0, features_of(text_of(1000), 3))
    first = run_report(run, {"mine": lambda: lambda table: figure("x")}).read_bytes()
    assert run_report(run, {"mine": lambda: lambda table: figure("x")}).read_bytes() == first


def test_a_run_is_never_lost_to_its_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw_report(tmp_path / "nothing", CONF)
    out, err = capsys.readouterr()
    assert out.splitlines()[-1].startswith("no report.html: UserError: ") and err == ""


def test_a_run_ends_with_its_report(experiment: Any) -> None:
    done = experiment(
        "--out_dir=shown", "seeds=[0]", "report=true", "metric=[sparsity,downstream,features,rules]"
    )
    assert done.returncode == 0, done.stderr
    path = experiment.runs / "shown" / "report.html"
    assert any(
        line.startswith("report: ") and line.endswith("report.html")
        for line in done.stdout.splitlines()
    )
    assert unpacked(path.read_text(), "cell-0")["latents"]

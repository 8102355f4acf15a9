"""Corpora: where they come from and in which order, how they are verified, encoded, split,
read, fetched and replaced.
"""

from __future__ import annotations

import bz2
import dataclasses
import gzip
import hashlib
import http.server
import io
import lzma
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from sae_experiments.corpora import corpus as data
from sae_experiments.corpora import download as fetch
from sae_experiments.corpora import standin
from sae_experiments.corpora.corpus import CorpusSpec, load_corpus
from sae_experiments.corpora.documents import HubSpec, TextSpec
from sae_experiments.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
TEXT = ("The quick brown fox jumps over the lazy dog; " * 200).encode()[:8000]


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def spec(**changes: object) -> CorpusSpec:
    """A corpus whose whole text is TEXT and which may not be replaced, but for ``changes``."""
    plain = {
        "name": "fox",
        "sources": [],
        "bytes": len(TEXT),
        "sha256": sha(TEXT),
        "local_names": ["fox.txt"],
        "head": None,
        "file": None,
    }
    plain |= {
        "encoding": "utf-8",
        "val_frac": 0.05,
        "test_frac": 0.05,
        "seeds": [0],
        "stand_in": "never",
        "stand_in_alphabet": "text8",
        "recipe": {},
    }
    return CorpusSpec(**(plain | changes))


def of_file(path: Path, content: bytes, cache: Path, **changes: object) -> data.CharCorpus:
    path.write_bytes(content)
    return load_corpus(spec(file=str(path), **changes), cache=cache, offline=True)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SAE_DATA_DIR", raising=False)
    monkeypatch.setenv("no_proxy", "*")  # the server is on this machine


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder SAE_DATA_DIR, empty."""
    (tmp_path / "mine").mkdir()
    monkeypatch.setenv("SAE_DATA_DIR", str(tmp_path / "mine"))
    return tmp_path / "mine"


# ------------------------------------------------------------------------------------------------
# encoding, splits, batches


@pytest.mark.parametrize(
    ("n", "fracs", "counts"),
    [
        (1_115_394, (0.1, 0), (1_003_854, 111_540)),
        (1000, (0.05, 0.05), (900, 50, 50)),
        (40, (0.05, 0.05), (36, 2, 2)),
    ],
)
def test_splits_are_exact_and_cover_the_text_in_order(tmp_path, n, fracs, counts):
    text = (b"abcdefghij\n" * (n // 11 + 1))[:n]
    corpus = of_file(tmp_path / "t", text, tmp_path, val_frac=fracs[0], test_frac=fracs[1])
    assert (
        tuple(corpus.provenance["counts"].values())
        == counts
        == tuple(len(ids) for ids in corpus.splits.values())
    )
    assert list(corpus.splits) == ["train", "val", "test"][: len(counts)]
    assert "".join(corpus.decode(ids) for ids in corpus.splits.values()) == text.decode()


def test_bytes_are_symbols_sorted_and_memory_mapped(tmp_path):
    corpus = of_file(tmp_path / "t", bytes(range(255, -1, -1)) * 4, tmp_path, encoding="latin-1")
    assert corpus.symbols == [chr(i) for i in range(256)]
    assert all(
        isinstance(ids, np.memmap) and ids.dtype == np.uint8 for ids in corpus.splits.values()
    )
    assert corpus.splits["train"][:3].tolist() == [255, 254, 253]
    every = "".join(corpus.symbols)
    assert corpus.decode(torch.from_numpy(corpus.encode(every))) == every  # the zero byte too


def test_many_symbols_and_characters_across_blocks(tmp_path, monkeypatch):
    text = "".join(map(chr, range(0x4E00, 0x4E00 + 300))) + "é😀" * 50
    whole = of_file(tmp_path / "t", text.encode(), tmp_path / "a")
    monkeypatch.setattr(data, "BLOCK", 7)
    corpus = of_file(tmp_path / "t", text.encode(), tmp_path / "b")
    assert corpus.key == whole.key
    assert len(corpus.symbols) == 302
    assert corpus.splits["val"].dtype == np.uint16
    assert "".join(corpus.decode(ids) for ids in corpus.splits.values()) == text
    head = of_file(
        tmp_path / "t", text.encode(), tmp_path / "b", head=904
    )  # two bytes into a character of four
    assert sum(map(len, head.splits.values())) == 301
    with pytest.raises(
        UserError, match=r"not UTF-8 at byte 902 .*unexpected end"
    ):  # the same bytes, but as a whole text they are damaged
        of_file(tmp_path / "t", text.encode()[:904], tmp_path / "b")
    with pytest.raises(
        UserError, match=r"not UTF-8 at byte 10 "
    ):  # in the block after the one that began its last character
        of_file(tmp_path / "t", "é".encode() * 5 + b"\xff", tmp_path / "b")


WESTERN, CYRILLIC = "the quick brown fox \n" * 40, "съешь ещё этих мягких французских булок\n" * 20


@pytest.mark.parametrize("text", [WESTERN, CYRILLIC], ids=["western", "cyrillic"])
@pytest.mark.parametrize(
    "encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]
)
def test_a_text_in_a_wide_encoding_is_named_and_latin_1_is_not_advised(tmp_path, text, encoding):
    """Without its mark such a text can be valid UTF-8, one control character beside each
    letter: it must not pass.
    """
    with pytest.raises(UserError, match=r"data\.fox: .*t is UTF-(16|32)") as told:
        of_file(tmp_path / "t", text.encode(encoding), tmp_path)
    family, iconv = encoding[:6].upper(), re.search(r"iconv -f (\S+) ", str(told.value))
    assert iconv and iconv[1].startswith(family) and "latin-1" not in str(told.value)
    assert text.encode(encoding).decode(iconv[1]) == text, "what is advised works"


@pytest.mark.parametrize(
    "packed", [gzip.compress, bz2.compress, lzma.compress], ids=["gzip", "bzip2", "xz"]
)
def test_an_archive_is_named_and_latin_1_is_not_advised(tmp_path, packed):
    with pytest.raises(UserError, match=r"t is an? \w+ archive, .*; unpack it") as told:
        of_file(tmp_path / "t", packed(TEXT), tmp_path)
    assert "latin-1" not in str(told.value)


def test_zero_bytes_in_what_is_no_utf_8_are_no_text(tmp_path):
    with pytest.raises(UserError, match="holds zero bytes: name a file of text"):
        of_file(tmp_path / "t", TEXT + b"\xff\x00" + TEXT, tmp_path)
    separated = TEXT.replace(b" ", b"\x00")  # in a valid text it is a character like others
    assert "\x00" in of_file(tmp_path / "t", separated, tmp_path).symbols


def test_what_cannot_be_encoded_is_named(tmp_path):
    with pytest.raises(UserError, match=r"not UTF-8 at byte 8,000 .*data\.fox\.encoding=latin-1"):
        of_file(tmp_path / "t", TEXT + b"\xff" + TEXT, tmp_path)
    corpus = of_file(tmp_path / "t", TEXT, tmp_path)
    for character in "ÿ!~":  # above, below and between the known ones
        with pytest.raises(UserError, match=re.escape(f"{character!r} (at position 4")):
            corpus.encode("fox " + character)
    for wrong in (-1, len(corpus.symbols)):
        with pytest.raises(UserError, match=str(wrong)):
            corpus.decode([0, wrong])


@pytest.mark.parametrize(
    ("content", "changes", "message"),
    [
        (b"", {}, "is empty"),
        (TEXT, {"head": 8001}, "head=8001 .* 8,000 bytes"),
        (b"abc" * 13, {}, "39 characters are too few to split"),
    ],
    ids=["empty", "shorter than its head", "too short to split"],
)
def test_a_text_too_short_is_refused(tmp_path, content, changes, message):
    with pytest.raises(UserError, match=message):
        of_file(tmp_path / "t", content, tmp_path, **changes)


def test_batches_depend_on_seed_and_step_alone(tmp_path):
    corpus = of_file(
        tmp_path / "t",
        np.random.default_rng(0).integers(33, 127, 4000).astype(np.uint8).tobytes(),
        tmp_path,
    )
    x, y = corpus.batch_at("train", 5, rows=8, length=32, seed=1)
    assert x.shape == y.shape == (8, 32)
    assert x.dtype == y.dtype == torch.int64
    assert torch.equal(x[:, 1:], y[:, :-1])
    starts = np.random.Generator(np.random.Philox(np.random.SeedSequence([1, 5]))).integers(
        0, 3600 - 32, size=8
    )
    assert starts.tolist() == [
        3287,
        1349,
        2232,
        1231,
        3466,
        2499,
        3278,
        123,
    ]  # what numpy draws today it must draw tomorrow
    assert torch.equal(x, corpus.windows("train", starts, 32))
    assert torch.equal(y, corpus.windows("train", starts + 1, 32))
    corpus.batch_at("val", 6, rows=8, length=32, seed=1)  # consumes nothing
    assert torch.equal(x, corpus.batch_at("train", 5, rows=8, length=32, seed=1)[0])
    assert not torch.equal(x, corpus.batch_at("train", 6, rows=8, length=32, seed=1)[0])
    assert not torch.equal(x, corpus.batch_at("train", 5, rows=8, length=32, seed=2)[0])


def test_windows_reach_both_ends_and_no_further(tmp_path):
    corpus = of_file(tmp_path / "t", TEXT, tmp_path)
    val = corpus.splits["val"].astype(np.int64)  # 400 characters
    assert corpus.windows("val", np.array([0, 390]), 10).tolist() == [
        val[:10].tolist(),
        val[390:].tolist(),
    ]
    assert corpus.windows("val", np.array([], dtype=int), 10).shape == (0, 10)
    for start in (-1, 391):
        with pytest.raises(UserError, match="not inside the 400 characters of val"):
            corpus.windows("val", np.array([5, start]), 10)
    x, y = corpus.batch_at(
        "val", 0, rows=50, length=399, seed=0
    )  # the one window that has a target
    assert x[:, 0].unique().tolist() == [val[0]]
    assert y[:, -1].unique().tolist() == [val[399]]
    with pytest.raises(UserError, match="too few for windows of 400"):
        corpus.batch_at("val", 0, rows=1, length=400, seed=0)
    with pytest.raises(UserError, match="no split 'dev'; it has train, val, test"):
        corpus.batch_at("dev", 0, rows=1, length=4, seed=0)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-8"])
def test_encoding_is_bounded_in_memory(tmp_path, monkeypatch, encoding):
    (tmp_path / "t").write_bytes(TEXT * 1000)
    monkeypatch.setattr(data, "BLOCK", 1 << 16)
    tracemalloc.start()
    load_corpus(spec(file=str(tmp_path / "t"), encoding=encoding), cache=tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6e6  # the file has 8 MB


# --------------------------------------------------------------------------------------------------
# files of the user's


def test_the_order_of_the_sources(tmp_path, folder):
    (folder / "fox.txt").write_bytes(TEXT)
    (tmp_path / "own").write_bytes(TEXT[::-1])
    assert (
        load_corpus(spec(file=str(tmp_path / "own")), cache=tmp_path).provenance["source"] == "own"
    )
    found = load_corpus(spec(), cache=tmp_path)
    assert found.provenance == {
        "corpus": "fox",
        "source": "fox.txt",
        "sha256": sha(TEXT),
        "bytes": 8000,
        "symbols": len(set(TEXT)),
        "counts": {"train": 7200, "val": 400, "test": 400},
        "stand_in": False,
        "verified": True,
    }
    assert (
        load_corpus(spec(stand_in="always"), cache=tmp_path, say=lambda _: None).provenance[
            "source"
        ]
        == "stand-in"
    )


def test_a_file_the_user_names_is_taken_but_never_passes_for_the_corpus(tmp_path):
    own = of_file(tmp_path / "own", TEXT[::-1], tmp_path).provenance
    assert own["corpus"] == f"fox-file-{sha(TEXT[::-1])[:8]}"
    assert own["sha256"] == sha(TEXT[::-1])
    assert not own["verified"]
    assert (
        of_file(tmp_path / "own", TEXT[::-1], tmp_path, head=100)
        .provenance["corpus"]
        .endswith("-head-100")
    )
    assert (
        of_file(tmp_path / "own", TEXT, tmp_path).provenance["corpus"] == "fox"
    )  # it is the corpus
    with pytest.raises(UserError, match=r"data\.fox\.file=.*nothing is not a file"):
        load_corpus(spec(file=str(tmp_path / "nothing")), cache=tmp_path)


def test_heads_are_cut_from_the_whole_or_from_a_longer_head(tmp_path, folder):
    sums = {2000: sha(TEXT[:2000])}
    for m in (1000, 3000, 5000):
        (folder / f"fox-head-{m}").write_bytes(TEXT[:m])
    (folder / "fox-head-old").write_bytes(b"")
    head = load_corpus(spec(head=2000, head_sha256=sums), cache=tmp_path / "a")
    assert head.provenance["corpus"] == "fox-head-2000"
    assert head.provenance["sha256"] == sums[2000]
    assert head.provenance["verified"]
    assert head.provenance["source"] == "fox-head-3000"
    assert not load_corpus(spec(head=2001, head_sha256=sums), cache=tmp_path / "a").provenance[
        "verified"
    ]
    with pytest.raises(UserError, match="stand_in=never"):  # a head does not serve for the whole
        load_corpus(spec(), cache=tmp_path / "a", offline=True)
    (folder / "fox.txt").write_bytes(TEXT)
    cut = load_corpus(spec(head=2000), cache=tmp_path / "b")
    assert cut.provenance["source"] == "fox.txt"
    assert cut.key == head.key
    with pytest.raises(UserError, match=r"head=8001 must be .* up to 8,000"):
        spec(head=8001)


@pytest.mark.parametrize(
    ("name", "content", "changes", "message"),
    [
        ("fox.txt", TEXT[:-1], {}, "fox.txt has 7,999 bytes, expected 8,000"),
        ("fox.txt", TEXT[::-1], {}, f"SHA-256 {sha(TEXT[::-1])}, expected {sha(TEXT)}"),
        ("fox.txt", TEXT[::-1], {"head": 10}, "expected"),  # the whole is verified before it is cut
        (
            "fox.txt",
            TEXT[::-1],
            {"sha256": None, "md5": hashlib.md5(TEXT).hexdigest()},
            "has MD5 .*, expected",
        ),
        (
            "fox-head-3000",
            TEXT[:2999],
            {"head": 2000},
            "fox-head-3000 has 2,999 bytes, expected 3,000",
        ),
        (
            "fox-head-3000",
            TEXT[1:3001],
            {"head": 2000, "head_sha256": {2000: sha(TEXT[:2000])}},
            "in its first 2,000 bytes, expected",
        ),
    ],
    ids=["size", "SHA-256", "whole before head", "MD5", "size of a head", "SHA-256 of a head"],
)
def test_a_wrong_local_file_is_an_error_and_never_passed_over(
    tmp_path, folder, name, content, changes, message
):
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_corpus(spec(**{"stand_in": "auto"} | changes), cache=tmp_path, offline=True)
    assert str(folder / name) in str(error.value)
    assert "\n" not in str(error.value)
    assert "data.fox.file=" in str(error.value)


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "checksum", lambda *_, **__: sha(b"what it was a moment ago"))
    with pytest.raises(UserError, match="own changed while it was read"):
        of_file(tmp_path / "own", TEXT, tmp_path)


def test_a_folder_that_is_none_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("SAE_DATA_DIR", str(tmp_path / "typo"))
    with pytest.raises(UserError, match=r"SAE_DATA_DIR=.*typo is not a folder"):
        load_corpus(spec(stand_in="auto"), cache=tmp_path, offline=True)


def test_the_source_is_not_needed_again_but_a_change_of_it_is_noticed(tmp_path):
    path = tmp_path / "own"
    first = of_file(path, TEXT, tmp_path / "c")
    stat = path.stat()
    path.write_bytes(TEXT[::-1])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # neither size nor time gives it away
    second = load_corpus(spec(file=str(path)), cache=tmp_path / "c")
    assert second.key != first.key
    assert second.decode(second.splits["train"][:20]) == TEXT[::-1][:20].decode()
    path.unlink()
    again = load_corpus(spec(file=str(path)), cache=tmp_path / "c")
    assert (again.key, again.provenance) == (second.key, second.provenance)
    del again, second
    for ids in (tmp_path / "c" / "corpora").glob("*/ids.bin"):
        ids.write_bytes(b"x" + ids.read_bytes()[1:])
    with pytest.raises(UserError, match="is not a file"):  # damaged, and nothing to make it from
        load_corpus(spec(file=str(path)), cache=tmp_path / "c")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoding": "ascii"}, r"data\.fox\.encoding=ascii is not one of latin-1, utf-8"),
        ({"stand_in": "maybe"}, "auto, never, always"),
        ({"val_frac": 0}, "val_frac=0 must be above 0"),
        ({"val_frac": 0.5, "test_frac": 0.5}, "their sum below 1"),
        ({"head": 0}, "head=0 must be"),
        ({"sources": [{"url": "https://x/y"}]}, "needs url, bytes"),
        ({"sources": [{"url": "https://x/y", "bytes": 1, "archive": "zip"}]}, "member"),
        ({"sources": [{"url": "https://x/y", "bytes": 1}], "sha256": None}, "cannot be verified"),
    ],
)
def test_a_specification_that_cannot_work_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        spec(**changes)


# --------------------------------------------------------------------------------------------------
# stand-ins


def test_a_stand_in_is_announced_and_recorded(tmp_path, monkeypatch):
    said: list[str] = []
    corpus = load_corpus(spec(stand_in="auto"), cache=tmp_path, offline=True, say=said.append)
    assert len(said) == 1
    assert said[0].startswith("WARNING: STAND-IN TEXT for fox (offline")
    assert f"put the file fox.txt (8,000 bytes, SHA-256 {sha(TEXT)}) into a folder" in said[0]
    assert corpus.provenance["stand_in"]
    assert corpus.provenance["source"] == "stand-in"
    assert corpus.provenance["bytes"] == 8000
    monkeypatch.setattr(standin, "LIMIT", 5000)
    capped = load_corpus(
        spec(stand_in="auto", head=6000), cache=tmp_path, offline=True, say=said.append
    )
    assert capped.provenance["bytes"] == 5000
    assert "5,000 bytes made from" in said[1]
    assert "in place of 6,000" in said[1]
    with pytest.raises(
        UserError,
        match=(
            r"data\.fox\.stand_in=never.*fox\.txt.* or fox-head-60 \(its first 60"
            r" bytes\).*SAE_DATA_DIR.*file=PATH"
        ),
    ):
        load_corpus(spec(head=60), cache=tmp_path, offline=True)


def test_a_stand_in_is_not_remembered_when_the_corpus_is_there_again(tmp_path, folder):
    said: list[str] = []
    for _ in range(2):
        assert load_corpus(
            spec(stand_in="auto", head=6000), cache=tmp_path, offline=True, say=said.append
        ).provenance["stand_in"]
    assert len(said) == 2  # each time
    with pytest.raises(UserError, match="stand_in=never"):
        load_corpus(spec(head=6000), cache=tmp_path, offline=True)
    (folder / "fox.txt").write_bytes(TEXT)
    assert not load_corpus(
        spec(stand_in="auto", head=6000), cache=tmp_path, offline=True
    ).provenance["stand_in"]


@pytest.mark.parametrize("alphabet", standin.FORMS)
def test_a_stand_in_has_the_alphabet_and_form_of_its_corpus(alphabet):
    content = standin.text(alphabet, 300_000)
    assert len(content) == 300_000
    text = content.decode("latin-1")
    if alphabet == "text8":
        assert re.fullmatch("( [a-z]+)+ ?", text)
    if alphabet == "shakespeare":
        assert set(text) <= set(
            "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
        )
        assert len(re.findall(r"(?m)^[A-Z][A-Za-z ]*:$", text)) > 500
        assert max(map(len, text.split("\n"))) < 80
    if alphabet == "wiki":
        for mark in ("<page>", "<title>", "[[", "\n== ", "&quot;", "\n* "):
            assert text.count(mark) > 20
    lines = [line for line in text.split("\n") if len(line) > 200]
    assert len(set(lines)) == len(
        lines
    )  # nothing is said twice, so validation text was not trained on


def test_code_fills_up_a_stand_in_and_is_mixed_in(monkeypatch):
    documents = [(chr(97 + i) * 9, ["prose"]) for i in range(12)]
    code = [(title, ["code"]) for title, _ in documents]

    def _prose():
        yield from documents

    def _code():
        yield from code

    monkeypatch.setattr(standin, "_prose", _prose)
    monkeypatch.setattr(standin, "_code", _code)
    assert b"code" not in standin.text("text8", 12 * len(" aaaaaaaaa prose"))
    kinds = re.findall(b"prose|code", standin.text("text8", 10_000))
    assert kinds.count(b"prose") == kinds.count(b"code") == 12
    assert b"code" in kinds[:12]


def test_a_stand_in_is_the_same_in_every_process(tmp_path):
    code = (
        "from sae_experiments.corpora import standin; import hashlib;"
        " print(hashlib.sha256(standin.text('wiki', 700_000)).hexdigest())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == sha(standin.text("wiki", 700_000))


# --------------------------------------------------------------------------------------------------
# fetching


class Server(http.server.ThreadingHTTPServer):
    """Serves ``files``; ``mode`` says how badly. ``asked`` lists (path, Range) of each request."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.mode: dict[str, object] = {}
        self.asked: list[tuple[str, str | None]] = []
        self.over = threading.Event()

    def source(self, path: str, content: bytes, **more: object) -> dict[str, object]:
        self.files[path] = content
        return {
            "url": f"http://127.0.0.1:{self.server_port}{path}",
            "bytes": len(content),
            "sha256": sha(content),
        } | more


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        mode, content, asked = (
            self.server.mode,
            self.server.files.get(self.path),
            self.headers.get("Range"),
        )
        self.server.asked.append((self.path, asked))
        if "silent" in mode:
            self.server.over.wait(5)
            return
        if content is None or "moved" in mode:
            self.send_response(302 if "moved" in mode else 404)
            self.send_header("Location", str(mode.get("moved")))
            self.end_headers()
            return
        start = int(asked[6:-1]) if asked and "no ranges" not in mode else 0
        body = content[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if "no length" not in mode:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        sent = body[: mode.get("piece", len(body))]
        sent = sent[: max(0, mode.get("wall", len(content)) - start)]
        for at in range(0, len(sent), mode.get("drip", 1 << 20)):
            self.wfile.write(sent[at : at + mode.get("drip", 1 << 20)])
            self.wfile.flush()
            time.sleep(0.05 if "drip" in mode else 0)
        if "stall" in mode:
            self.server.over.wait(5)


@pytest.fixture
def server():
    made = Server()
    thread = threading.Thread(
        target=made.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
    )
    thread.start()
    yield made
    made.over.set()
    made.shutdown()
    made.server_close()
    thread.join()


def network(**changes: object) -> fetch.Network:
    return fetch.Network(
        **({"plain_http": True, "pause_s": 0, "connect_s": 2, "stall_s": 0.2} | changes)
    )


def zipped(**members: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as folder:
        for name, content in members.items():
            folder.writestr(name, content)
    return out.getvalue()


def fetched(
    tmp_path: Path, *sources: dict[str, object], net: fetch.Network | None = None, **changes: object
) -> data.CharCorpus:
    return load_corpus(
        spec(sources=list(sources), **changes),
        cache=tmp_path / "c",
        say=lambda _: None,
        _network=net or network(),
    )


@pytest.mark.parametrize(
    ("content", "more"),
    [
        (TEXT, {}),
        (gzip.compress(TEXT), {"archive": "gz", "sha256": None}),
        (zipped(**{"../evil": b"x", "fox": TEXT}), {"archive": "zip", "member": "fox"}),
        (
            zipped(**{"../evil": TEXT}),
            {"archive": "zip", "member": "../evil"},
        ),  # read under its name, written under ours
    ],
    ids=["plain", "gz", "zip", "zip slip"],
)
def test_a_download_is_unpacked_verified_and_kept(tmp_path, server, content, more):
    source = server.source("/fox", content, **more)
    corpus = fetched(tmp_path, source)
    assert corpus.provenance["source"] == source["url"]
    assert corpus.provenance["sha256"] == sha(TEXT)
    assert corpus.provenance["verified"]
    head = load_corpus(
        spec(head=2000, sources=[source]), cache=tmp_path / "c", offline=True
    )  # another head, without the network
    assert head.provenance["source"] == source["url"]
    assert head.provenance["sha256"] == sha(TEXT[:2000])
    assert len(server.asked) == 1
    assert not list(tmp_path.rglob("evil"))
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize(
    "mode",
    [{"piece": 3000}, {"piece": 3000, "no length": 1}, {"piece": 3000, "stall": 1}],
    ids=["short", "unannounced", "stalled"],
)
def test_a_download_that_breaks_off_is_resumed(tmp_path, server, mode):
    server.mode, began = mode, time.monotonic()
    assert fetched(tmp_path, server.source("/fox", TEXT)).provenance["sha256"] == sha(TEXT)
    assert time.monotonic() - began < 4  # the server would keep silent for 5 s each time
    assert [asked for _, asked in server.asked] == [None, "bytes=3000-", "bytes=6000-"]


def test_a_server_without_ranges_sends_it_all_again(tmp_path, server):
    source = server.source("/fox", TEXT)
    server.mode = {"wall": 3000}
    with pytest.raises(
        UserError, match="broke off at 3,000 of 8,000 bytes, 4 times in a row; run again to resume"
    ) as error:
        fetched(tmp_path, source)
    assert "\n" not in str(error.value)
    assert len(server.asked) == 5
    server.mode = {"no ranges": 1}
    assert fetched(tmp_path, source).provenance["sha256"] == sha(TEXT)


def test_a_stale_beginning_is_thrown_away(tmp_path, server):
    source = server.source("/fox", TEXT)
    server.mode = {"wall": 3000}
    with pytest.raises(UserError):
        fetched(tmp_path, source)
    (part,) = tmp_path.rglob("*.part")
    part.write_bytes(b"?" * 3000)
    server.mode, server.asked = {}, []
    assert fetched(tmp_path, source).provenance["sha256"] == sha(TEXT)
    assert [asked for _, asked in server.asked] == ["bytes=3000-", None]


@pytest.mark.parametrize(
    ("content", "more", "mode", "message"),
    [
        (
            TEXT[::-1],
            {"sha256": sha(TEXT)},
            {},
            f"/fox has SHA-256 {sha(TEXT[::-1])}, expected {sha(TEXT)}",
        ),
        (TEXT[::-1], {}, {}, "the text from .*/fox has SHA-256"),
        (TEXT + b"!", {"bytes": 8000}, {}, "/fox has 8,001 bytes, expected 8,000"),
        (TEXT + b"!", {"bytes": 8000}, {"no length": 1}, "more than the expected 8,000 bytes"),
        (
            gzip.compress(TEXT + b"!"),
            {"archive": "gz"},
            {},
            "unpacks to more than the expected 8,000 bytes",
        ),
        (gzip.compress(TEXT)[:-20], {"archive": "gz"}, {}, "cannot be unpacked"),
        (zipped(fox=bytes(10**7)), {"archive": "zip", "member": "fox"}, {}, "unpacks to more than"),
        (zipped(cat=TEXT), {"archive": "zip", "member": "fox"}, {}, "has no member 'fox'"),
        (TEXT, {"archive": "zip", "member": "fox"}, {}, "cannot be unpacked"),
        (
            TEXT,
            {},
            {"moved": "ftp://127.0.0.1/fox"},
            "ftp://127.0.0.1/fox is not an https:// address",
        ),
    ],
    ids=[
        "download",
        "text",
        "long",
        "long, unannounced",
        "long in gz",
        "broken gz",
        "zip bomb",
        "no member",
        "no zip",
        "moved to ftp",
    ],
)
def test_wrong_bytes_are_an_error_not_a_stand_in_and_the_next_address_is_tried(
    tmp_path, server, content, more, mode, message
):
    source = server.source("/fox", content, **more)
    server.mode = mode
    with pytest.raises(UserError, match=message) as error:
        fetched(tmp_path, source, stand_in="auto")
    assert "\n" not in str(error.value)
    assert "SAE_DATA_DIR" in str(error.value)
    assert all(
        path.stat().st_size <= 8001 for path in tmp_path.rglob("*")
    )  # a bomb does not go off on the disk
    server.mode = {}
    mirror = server.source("/mirror", TEXT)
    if not mode:
        assert fetched(tmp_path, source, mirror).provenance["source"] == mirror["url"]


def test_plain_http_is_refused_where_no_test_allows_it(tmp_path, server):
    with pytest.raises(UserError, match="is not an https:// address"):
        fetched(tmp_path, server.source("/fox", TEXT), net=fetch.Network())
    assert server.asked == []


def test_no_network_is_noticed_once_for_all(tmp_path, monkeypatch):
    asked: list[str] = []
    over = threading.Event()

    def look_up(host: str, *_: object, **__: object) -> None:
        asked.append(host)
        over.wait(9)  # as a name server that does not answer; no time-out of a socket covers this
        raise socket.gaierror("no answer")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    net = network(connect_s=0.2, budget_s=0.3)
    began = time.monotonic()
    for name in ("a", "a", "b", "c"):
        sources = [{"url": f"https://{name}.invalid/x", "bytes": 1}]
        corpus = load_corpus(
            spec(name=name, sources=sources, stand_in="auto"),
            cache=tmp_path,
            say=lambda _: None,
            _network=net,
        )
        assert corpus.provenance["stand_in"]
    over.set()
    assert asked == ["a.invalid", "b.invalid"]  # the third is refused by the verdict
    assert net.lost_s < 1
    assert time.monotonic() - began < 3
    assert fetch.NETWORK.budget_s < 10
    assert fetch.NETWORK.stall_s < fetch.NETWORK.connect_s <= fetch.NETWORK.budget_s


def test_hosts_that_say_no_or_nothing(tmp_path, server):
    with pytest.raises(UserError, match=r"stand_in=never.*answered HTTP 404"):
        fetched(
            tmp_path,
            {**server.source("/fox", TEXT), "url": f"http://127.0.0.1:{server.server_port}/none"},
        )
    server.mode = {"silent": 1}
    with pytest.raises(UserError, match=r"timed out|no answer in"):
        fetched(tmp_path, server.source("/fox", TEXT))
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(UserError, match="refused"):
            fetched(
                tmp_path, {"url": f"http://127.0.0.1:{closed.getsockname()[1]}/fox", "bytes": 1}
            )


def test_progress_is_a_bar_for_a_person_and_two_lines_for_a_log(tmp_path, server, monkeypatch):
    said: list[str] = []
    source = server.source("/fox", TEXT)
    load_corpus(spec(sources=[source]), cache=tmp_path / "a", say=said.append, _network=network())
    assert said == [
        f"fetching {source['url']} (8,000 bytes)",
        f"fetched 8,000 of 8,000 bytes of {source['url']}",
    ]
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdout", screen)
    load_corpus(spec(sources=[source]), cache=tmp_path / "b", say=said.append, _network=network())
    assert len(said) == 2
    assert "fox: 100%" in screen.getvalue()


# --------------------------------------------------------------------------------------------------
# kill and resume

CHILD = """
import sys, time; sys.path.insert(0, {root!r})
from pathlib import Path
from sae_experiments.corpora import corpus as data
from sae_experiments.corpora import download as fetch
def slow(*a, _blocks=data._blocks):
    for block in _blocks(*a): yield block; time.sleep({nap})
data._blocks, data.BLOCK = slow, 500
spec = data.CorpusSpec(**{fields!r})
data.load_corpus(spec, cache=Path({cache!r}), _network=fetch.Network(plain_http=True))
"""


def kill_when(ready: object, **changes: object) -> None:
    child = subprocess.Popen([sys.executable, "-c", CHILD.format(root=str(ROOT), **changes)])
    try:
        for _ in range(2000):
            if ready() or child.poll() is not None:
                break
            time.sleep(0.01)
        assert child.poll() is None, "the child ended before it could be killed"
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()


def fields(wanted: CorpusSpec) -> dict[str, object]:
    return {name: getattr(wanted, name) for name in CorpusSpec.__slots__}


def test_killed_while_encoding(tmp_path):
    (tmp_path / "own").write_bytes(TEXT)
    wanted, cache = spec(file=str(tmp_path / "own")), tmp_path / "c"
    kill_when(
        lambda: any(ids.stat().st_size for ids in cache.glob("corpora/*/ids.bin")),
        fields=fields(wanted),
        cache=str(cache),
        nap=0.1,
    )
    (ids,) = cache.glob("corpora/*/ids.bin")
    assert 0 < ids.stat().st_size < 8000
    assert not list(cache.rglob("done.json"))
    corpus = load_corpus(wanted, cache=cache)
    assert corpus.key == load_corpus(wanted, cache=tmp_path / "fresh").key
    assert "".join(map(corpus.decode, corpus.splits.values())) == TEXT.decode()


def test_killed_while_it_is_written_down_where_the_text_came_from(tmp_path):
    """The folder of these notes is every corpus's: what a killed process left there goes with
    the next note.
    """
    (tmp_path / "own").write_bytes(TEXT)
    wanted, cache = spec(file=str(tmp_path / "own")), tmp_path / "c"
    load_corpus(wanted, cache=cache)
    (note,) = cache.glob("corpora/last/*.json")
    half = note.with_name(f".{note.name}.4194305.tmp")
    half.write_bytes(b"{")
    note.unlink()
    load_corpus(wanted, cache=cache)
    assert note.exists() and not half.exists()


def test_killed_while_downloading(tmp_path, server):
    server.mode = {"drip": 500}
    wanted, cache = spec(sources=[server.source("/fox", TEXT)]), tmp_path / "c"
    kill_when(
        lambda: any(p.stat().st_size for p in cache.rglob("*.part")),
        fields=fields(wanted),
        cache=str(cache),
        nap=0,
    )
    (part,) = cache.rglob("*.part")
    have = part.stat().st_size
    server.mode = {}
    corpus = load_corpus(wanted, cache=cache, say=lambda _: None, _network=network())
    assert 0 < have < 8000
    assert server.asked[-1] == ("/fox", f"bytes={have}-")
    assert corpus.provenance["sha256"] == sha(TEXT)


# --------------------------------------------------------------------------------------------------
# conf/data and real files

#: Texts that are named and not known: a user's own files, a data set of the hub.
UNKNOWN = {"text": TextSpec, "hub": HubSpec}
NAMES = sorted(
    path.stem for path in (ROOT / "conf" / "data").glob("*.yaml") if path.stem not in UNKNOWN
)


def configured(size: str, *overrides: str) -> dict[str, CorpusSpec]:
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose(
            overrides=[f"+data=[{','.join(NAMES)}]", f"+corpus_size={size}", *overrides]
        )
    return instantiate(config.data, _convert_="all")


@pytest.mark.parametrize(("name", "kind"), UNKNOWN.items())
def test_a_text_that_is_named_composes_with_every_field_of_its_specification(name, kind):
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose(overrides=[f"+data=[{name}]"])
    spec = instantiate(config.data, _convert_="all")[name]
    assert type(spec) is kind and spec.name == name
    raw = yaml.safe_load((ROOT / "conf" / "data" / f"{name}.yaml").read_text())
    assert set(raw) - {"_target_", "_convert_"} == {f.name for f in dataclasses.fields(kind)}


def test_every_corpus_composes_with_the_sizes_of_the_presets():
    sizes = {
        size: {name: corpus.head for name, corpus in configured(size).items()}
        for size in ("full", "laptop", "smoke")
    }
    assert sizes["laptop"] == {"shakespeare_char": None, "enwik8": 4_000_000, "text8": 3_000_000}
    assert set(sizes["full"].values()) == {None}
    assert set(sizes["smoke"].values()) == {200_000}
    assert configured("full", "data.text8.head=5")["text8"].head == 5
    for name, corpus in configured("full").items():
        assert corpus.name == name
        assert type(corpus.sources[0]) is dict
        assert all(s["url"].startswith("https://") for s in corpus.sources)
        assert set(corpus.recipe) == {
            "batch_size",
            "steps",
            "lr",
            "min_lr",
            "warmup_steps",
            "eval_every",
        }
        assert {type(corpus.recipe[key]) for key in ("lr", "min_lr")} == {float}
        raw = yaml.safe_load((ROOT / "conf" / "data" / f"{name}.yaml").read_text())
        assert set(raw) - {"_target_", "_convert_"} == set(
            CorpusSpec.__slots__
        )  # every value is in the YAML


REAL = [
    ("shakespeare_char", None, 65, {"train": 1_003_854, "val": 111_540}),
    ("enwik8", 4_000_000, 200, {"train": 3_600_000, "val": 200_000, "test": 200_000}),
    ("text8", 3_000_000, 27, {"train": 2_700_000, "val": 150_000, "test": 150_000}),
    ("enwik8", None, 205, {"train": 90_000_000, "val": 5_000_000, "test": 5_000_000}),
    ("text8", None, 27, {"train": 90_000_000, "val": 5_000_000, "test": 5_000_000}),
]
FOLDER = os.environ.get("SAE_DATA_DIR")


@pytest.mark.skipif(not FOLDER, reason="SAE_DATA_DIR is not set: no real corpus to compare with")
@pytest.mark.parametrize(("name", "head", "symbols", "counts"), REAL)
def test_golden_facts_of_the_real_corpora(tmp_path, monkeypatch, name, head, symbols, counts):
    monkeypatch.setenv("SAE_DATA_DIR", str(FOLDER))
    wanted = configured("laptop" if head else "full", f"data.{name}.stand_in=never")[name]
    if not any(
        (Path(str(FOLDER)) / file).exists() for file in (*wanted.local_names, f"{name}-head-{head}")
    ):
        pytest.skip(f"SAE_DATA_DIR has no {name}{f' of {head} bytes' if head else ''}")
    corpus = load_corpus(wanted, cache=tmp_path, offline=True)
    assert corpus.provenance["counts"] == counts
    assert len(corpus.symbols) == symbols
    assert corpus.provenance["verified"]
    assert corpus.provenance["corpus"] == (name if head is None else f"{name}-head-{head}")

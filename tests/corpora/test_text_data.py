"""Text of any kind becomes tokens, documents apart, and windows that spell the text again."""

from __future__ import annotations

import gzip
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sae_experiments.corpora.corpus import load_corpus, source_of
from sae_experiments.corpora.documents import PIECE, HubSpec, TextSpec, cut_text
from sae_experiments.corpora.tokens import TokenCorpus, encoded
from sae_experiments.errors import UserError
from sae_experiments.models.tokens import Tokenizer, trained_tokenizer
from support.common import corpus_spec, english

DOCUMENTS = [english(n, seed=n) for n in (900, 40, 1500, 700, 2, 1200)] + ["Grüße, 世界! " * 60]
RECIPE = {"column": "text", "across": False, "separator": "\n\n", "seeds": [0], "recipe": {}}


def spec(file: Any, **changes: Any) -> TextSpec:
    plain = {"name": "text", "document_end": None, "val_frac": 0.2, "test_frac": 0.0, **RECIPE}
    return TextSpec(**{**plain, "file": None if file is None else str(file), **changes})


def written(kind: str, folder: Path) -> Path:
    """The documents in a file of a kind."""
    path = folder / f"text{kind}"
    lines = "\n".join(json.dumps({"text": d, "id": i}) for i, d in enumerate(DOCUMENTS))
    if kind == ".txt":
        path.write_text("<|end|>".join(DOCUMENTS))
    elif kind == ".jsonl":
        path.write_text(lines + "\n\n")
    elif kind == ".jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode(), mtime=0))
    elif kind == ".jsonl.zst":
        pyarrow = pytest.importorskip("pyarrow")
        with pyarrow.CompressedOutputStream(str(path), "zstd") as f:
            f.write(lines.encode())
    elif kind == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"id": [0] * len(DOCUMENTS), "text": DOCUMENTS}), path)
    else:
        path = folder / "folder"
        path.mkdir()
        for i, document in enumerate(DOCUMENTS):
            (path / f"{i}.txt").write_text(document)
        path = path if kind == "folder" else path / "*.txt"
    return path


def documents(text: TextSpec) -> list[str]:
    """The documents that a text is read as."""
    ((split, pieces),) = text.source().parts()
    assert split is None
    found = [""]
    for piece in pieces:
        found[-1] += piece.text
        found += [""] if piece.last else []
    assert found.pop() == ""
    return found


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return trained_tokenizer(
        lambda: DOCUMENTS, 300, key={"of": "test"}, cache=tmp_path_factory.mktemp("bpe")
    )


def tokens(text: TextSpec, tokenizer: Tokenizer, cache: Path) -> TokenCorpus:
    key = tokenizer.key
    return encoded(
        text, text.source(), tokenizer.encode, tokenizer.pieces, tokenizer=key, cache=cache
    )


KINDS = [".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", "folder", "glob"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_documents_and_tokens(kind, tokenizer, tmp_path):
    end = "<|end|>" if kind == ".txt" else None
    text = spec(written(kind, tmp_path), document_end=end)
    assert documents(text) == DOCUMENTS
    corpus = tokens(text, tokenizer, tmp_path)
    ids = np.concatenate([corpus.splits["train"], corpus.splits["val"]])
    assert ids.dtype == np.uint16
    wanted = np.concatenate([tokenizer.encode([d])[0] for d in DOCUMENTS])
    assert ids.tolist() == wanted.tolist()
    assert len(corpus.splits["val"]) == pytest.approx(0.2 * len(ids), abs=1)
    total = sum(corpus.provenance["utf8_bytes"].values())
    assert total == pytest.approx(sum(len(d.encode()) for d in DOCUMENTS))


@pytest.mark.parametrize("across", [False, True])
def test_no_window_crosses_the_end_of_a_document_unless_asked(across, tokenizer, tmp_path):
    text = spec(written(".jsonl", tmp_path), across=across)
    corpus, length = tokens(text, tokenizer, tmp_path), 16
    whole = "\n\n".join(DOCUMENTS) if across else None
    for split in ("train", "val"):
        starts = corpus.window_starts(split, length)
        assert len(starts) and (np.diff(starts) >= length).all()
        for row in corpus.windows(split, starts, length + 1).tolist():
            spelled = tokenizer_text(tokenizer, row)
            if whole is None:
                assert any(spelled in d for d in DOCUMENTS), spelled
            else:
                assert spelled in whole
    if across:
        assert corpus.provenance["documents"] == {"train": 1, "val": 1}
        n = len(corpus.splits["train"])
        assert len(corpus.window_starts("train", length)) == (n - 1) // length


def tokenizer_text(tokenizer: Tokenizer, ids: list[int]) -> str:
    """What ids spell, without characters that the window cuts in two."""
    import tokenizers

    text = tokenizers.Tokenizer.from_file(str(tokenizer.file)).decode(ids)
    return text.strip("\N{REPLACEMENT CHARACTER}")


def test_batches_are_a_function_of_seed_and_step(tokenizer, tmp_path):
    corpus = tokens(spec(written("folder", tmp_path)), tokenizer, tmp_path)
    x, y = corpus.batch_at("train", 3, rows=4, length=8, seed=1)
    again = corpus.batch_at("train", 3, rows=4, length=8, seed=1)[0]
    assert x.shape == y.shape == (4, 8) and (x[:, 1:] == y[:, :-1]).all() and (x == again).all()
    assert (x != corpus.batch_at("train", 4, rows=4, length=8, seed=1)[0]).any()


def test_a_text_is_encoded_once(tokenizer, tmp_path, monkeypatch):
    text = spec(written(".jsonl", tmp_path))
    first = tokens(text, tokenizer, tmp_path)
    other = Tokenizer(encode=None, pieces=tokenizer.pieces, begin=None, key=tokenizer.key)
    assert tokens(text, other, tmp_path).key == first.key
    assert tokens(spec(text.file, val_frac=0.3), tokenizer, tmp_path).key != first.key


def test_the_pieces_of_a_long_document_are_bounded_and_break_no_word():
    text = english(3 * PIECE) + "\nx" * 10
    pieces = list(cut_text(text))
    assert "".join(p.text for p in pieces) == text and [p.last for p in pieces[-2:]] == [
        False,
        True,
    ]
    assert len(pieces) > 3 and all(len(p.text) <= PIECE for p in pieces)
    assert all(p.text[0].isspace() for p in pieces[1:])
    hard = list(cut_text("x" * (2 * PIECE + 5)))
    assert [len(p.text) for p in hard] == [PIECE, PIECE, 5]


def test_a_character_corpus_is_read_as_text_with_its_own_splits(tokenizer, tmp_path):
    path = tmp_path / "bytes.txt"
    path.write_text("".join(DOCUMENTS))
    wanted = path.read_bytes()
    char = corpus_spec(path, encoding="latin-1", test_frac=0.1)
    corpus = load_corpus(char, cache=tmp_path, offline=True, say=lambda line: None)
    source = source_of(corpus, char)
    parts = {split: "".join(p.text for p in pieces) for split, pieces in source.parts()}
    assert list(parts) == ["train", "val", "test"]
    # A character that a split cuts in two is replaced, and no other one.
    joined = "".join(parts.values())
    assert joined.replace("\N{REPLACEMENT CHARACTER}", "")[:500] == wanted.decode()[:500]
    assert parts["train"].startswith(DOCUMENTS[0]) and "世界" in joined
    split = spec(None, test_frac=0.1)
    made = encoded(
        split, source, tokenizer.encode, tokenizer.pieces, tokenizer=tokenizer.key, cache=tmp_path
    )
    assert list(made.splits) == ["train", "val", "test"]
    assert tokenizer_text(tokenizer, made.splits["val"].tolist())[:50] in parts["val"]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("empty.txt", b"", "too few to split"),
        ("short.txt", b"ab", "too few to split"),
        ("bytes.txt", b"\xff\xfe\x00a", "not UTF-8"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": ', "JSON lines"),
        ("other.jsonl", b'{"body": "a"}\n', "line 1 has no text under 'text'"),
        ("list.jsonl", b"[1]\n", "line 1 has no text under 'text'"),
        ("cut.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:30], "JSON lines"),
        ("bad.parquet", b"PAR1 this is no parquet", "not a whole parquet file|needs pyarrow"),
        ("bad.jsonl.zst", b"no zstd", "JSON lines|needs pyarrow"),
        ("some.doc", b"x", "of no known kind"),
        ("missing.txt", None, "names no text file"),
        ("nothing*.txt", None, "names no text file"),
    ],
)
def test_a_text_that_cannot_be_read_is_one_line(name, content, told, tokenizer, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=told) as caught:
        tokens(spec(path), tokenizer, tmp_path / "cache")
    assert "\n" not in str(caught.value) and "data.text" in str(caught.value)


def test_a_file_without_a_suffix_is_plain_text(tokenizer, tmp_path):
    plain, bare = tmp_path / "made.txt", tmp_path / "made"
    for path in (plain, bare):
        path.write_text("one two three. " * 400)
    first, second = (tokens(spec(p), tokenizer, tmp_path / p.name[-3:]) for p in (plain, bare))
    assert first.splits["train"].tolist() == second.splits["train"].tolist()


def test_documents_shorter_than_a_window_are_one_line(tokenizer, tmp_path):
    corpus = tokens(spec(written("folder", tmp_path)), tokenizer, tmp_path)
    with pytest.raises(UserError, match=r"no document of the train split .* across=true"):
        corpus.window_starts("train", 5000)


def test_a_text_of_no_name_and_fractions_that_leave_nothing_are_refused():
    with pytest.raises(UserError, match="names no text"):
        spec(None).source()
    with pytest.raises(UserError, match="val_frac=0"):
        spec(None, val_frac=0.0)


def hub(**changes: Any) -> HubSpec:
    plain = {"name": "hub", "path": "org/set", "subset": None, "split": "train"}
    plain |= {"revision": "v1", "documents": None, "val_frac": 0.2, "test_frac": 0.0}
    return HubSpec(**{**plain, **RECIPE, **changes})


def test_a_data_set_is_streamed_to_the_number_of_documents_asked_for(
    tokenizer, tmp_path, monkeypatch
):
    asked: dict[str, Any] = {}

    def load_dataset(path, name, **options):
        asked.update(path=path, name=name, **options)
        yield from ({"text": d} for d in DOCUMENTS)
        raise AssertionError("more was read than was asked for")

    fake = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    monkeypatch.setenv("SAE_HUB_OFFLINE", "0")
    corpus = tokens(hub(documents=3), tokenizer, tmp_path)
    assert asked["revision"] == "v1" and asked["streaming"] and asked["split"] == "train"
    assert corpus.provenance["source"] == "org/set@v1"
    assert sum(corpus.provenance["counts"].values()) == sum(
        map(len, tokenizer.encode(DOCUMENTS[:3]))
    )
    assert tokens(hub(documents=3), tokenizer, tmp_path).key == corpus.key


def test_a_data_set_that_cannot_be_had_is_one_line(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"needs datasets: pip install 'sae-experiments\[datasets"):
        hub().source()
    fake = types.SimpleNamespace(load_dataset=lambda *a, **k: [])
    monkeypatch.setitem(sys.modules, "datasets", fake)
    monkeypatch.setenv("SAE_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        tokens(hub(), tokenizer, tmp_path)
    with pytest.raises(UserError, match="names no data set"):
        hub(path=None).source()


def test_a_vocabulary_that_the_text_does_not_give_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"lm.vocab_size=5000 is more than the \d+ tokens"):
        trained_tokenizer(lambda: DOCUMENTS, 5000, key={}, cache=tmp_path)

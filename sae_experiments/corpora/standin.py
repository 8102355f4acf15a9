"""Stand-in text for a corpus that cannot be reached, in the form of that corpus.

It is made from what comes with every Python: documentation topics and the standard library.
"""

from __future__ import annotations

import hashlib
import html
import re
import sys
import sysconfig
import textwrap
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from sae_experiments.cache import cached
from sae_experiments.files import write_bytes
from sae_experiments.source import source_digest

LIMIT = 4_000_000  # bytes: about what the standard library has to say
# Left out: files that differ between installations of one version, tables rather than text, and
# copies of the topics.
SKIPPED = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "test",
    "tests",
    "idle_test",
    "encodings",
    "pydoc_data",
    "lib-dynload",
}
PROSE = re.compile(
    r'("""|\'\'\')(?P<doc>.*?)\1|(?P<note>(?:^[ \t]*#[^\n]*\n)+)', re.DOTALL | re.MULTILINE
)
DIGITS = dict(
    zip(
        "0123456789",
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"],
        strict=True,
    )
)
Document = tuple[str, list[str]]  # a title and its paragraphs


def stand_in(
    cache: Path,
    name: str,
    alphabet: str,
    asked: int,
    *,
    reason: str,
    remedy: str,
    say: Callable[[str], None],
) -> Path:
    """A file in the cache to take the place of a corpus, with a warning.

    Args:
        cache: Folder of the cache.
        name: Name of the corpus.
        alphabet: Form of the text, a key of `FORMS`.
        asked: Size in bytes, of which at most `LIMIT` can be made.
        reason: Reason why the corpus itself is missing.
        remedy: Advice on how to provide it.
        say: Prints a line.
    """
    size = min(asked, LIMIT)
    # Another Python version has another text, so it has another file.
    key = {
        "alphabet": alphabet,
        "bytes": size,
        "python": sys.version.split()[0],
        "code": source_digest(__name__),
    }
    path = (
        cached(
            cache,
            "stand_in",
            key,
            lambda folder: write_bytes(folder / "text", text(alphabet, size)),
        )
        / "text"
    )
    have = path.stat().st_size
    made = f"{have:,} bytes made from the documentation and sources of Python" + (
        f" in place of {asked:,}" if have < asked else ""
    )
    say(
        f"WARNING: STAND-IN TEXT for {name} ({reason}): {made}. "
        f"No result is comparable with published ones. For the real corpus, {remedy}."
    )
    return path


def remedy(name: str, file: str, facts: Mapping[str, Any], head: int | None) -> str:
    """Advice on how to provide the corpus itself.

    Args:
        name: Name of the corpus.
        file: Name of its file.
        facts: Size and checksums of the file.
        head: Number of its first bytes that would do; None: the whole file.
    """
    size = [] if facts["size"] is None else [f"{facts['size']:,} bytes"]
    sums = [
        f"{kind} {facts[key]}"
        for key, kind in (("sha256", "SHA-256"), ("md5", "MD5"))
        if facts[key]
    ]
    whole = f"the file {file} ({', '.join(size + sums) or 'the whole text'})"
    part = "" if head is None else f" or {name}-head-{head} (its first {head:,} bytes)"
    return (
        f"put {whole}{part} into a folder and name that folder with SAE_DATA_DIR, "
        f"or name a text with data.{name}.file=PATH"
    )


def text(alphabet: str, size: int) -> bytes:
    """The first `size` bytes of the stand-in, or all of it.

    It is the same for every installation of one Python version. Documentation and comments come
    first, and code fills up. The pieces are then shuffled by a digest of their names, so that
    training and validation text are of one kind.
    """
    form, pieces, have = FORMS[alphabet], [], 0
    for kind in (_prose, _code):
        for title, paragraphs in kind():
            if have >= size:
                break
            if not paragraphs:
                continue
            piece = form(title, paragraphs).encode("utf-8", "replace")
            pieces.append((_order(f"{kind.__name__} {title}"), piece))
            have += len(piece)
    return b"".join(piece for _, piece in sorted(pieces))[:size]


def _order(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _modules() -> list[tuple[str, Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    files = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    kept = {
        n: p
        for n, p in files.items()
        if not SKIPPED & set(n.split("/"))
        and not re.search(r"(^|/)(_sysconfig|(site|user)customize|config-)", n)
    }
    return sorted(kept.items(), key=lambda item: _order(item[0]))


def _title(name: str) -> str:
    return (
        " ".join(
            re.findall(r"[A-Za-z]+", name.removesuffix(".py").removesuffix("/__init__"))
        ).title()
        or "Module"
    )


def _prose() -> Iterator[Document]:
    told: set[str] = set()  # licences and the like are said once
    try:
        topics = import_module("pydoc_data.topics").topics
    except ImportError:  # some trimmed installations
        topics = {}
    for name in sorted(topics, key=_order):
        yield _title(name), list(_paragraphs(topics[name], told))
    for name, path in _modules():
        source = path.read_text("utf-8", "replace")
        parts = (
            match["doc"] or re.sub(r"(?m)^[ \t]*#+ ?", "", match["note"] or "")
            for match in PROSE.finditer(source)
        )
        yield _title(name), [paragraph for part in parts for paragraph in _paragraphs(part, told)]


def _code() -> Iterator[Document]:
    told: set[str] = set()
    for name, path in _modules():
        yield (
            _title(name),
            list(
                _paragraphs(
                    PROSE.sub("\n\n", path.read_text("utf-8", "replace")),
                    told,
                    words=3,
                    letters=0.4,
                )
            ),
        )


def _paragraphs(
    source: str, told: set[str], *, words: int = 5, letters: float = 0.65
) -> Iterator[str]:
    for block in re.split(r"\n\s*\n", source):
        line = " ".join(re.sub(r"[*=~^\"#+-]{3,}", " ", block).split())
        if (
            line.count(" ") >= words - 1
            and sum(map(str.isalpha, line)) >= letters * len(line)
            and line not in told
        ):
            told.add(line)
            yield line


def _text8(title: str, paragraphs: list[str]) -> str:
    return "".join(" " + word for word in _words(" ".join([title, *paragraphs]).lower()).split())


def _words(line: str, keep: str = "") -> str:
    """Only letters, spaces and `keep`; digits spelled out, as in text8."""
    return re.sub(
        f"[^A-Za-z{re.escape(keep)}]+",
        " ",
        re.sub("[0-9]", lambda digit: f" {DIGITS[digit[0]]} ", line),
    )


def _shakespeare(title: str, paragraphs: list[str]) -> str:
    """Short speeches of two speakers in turn, in lines of verse that begin with a capital."""
    name, speeches = title.split()[-1], []
    for paragraph in paragraphs:
        line = re.sub(
            r" +([,.:;?!])",
            r"\1",
            " ".join(_words(paragraph.replace('"', "'"), " !$&',.:;?-").split()),
        )
        lines = [
            verse[0].upper() + verse[1:]
            for verse in textwrap.wrap(line, 44, break_on_hyphens=False)
        ]
        for first in range(0, len(lines), 8):
            speaker = ("First", "Second")[len(speeches) % 2]
            speeches.append("\n".join([f"{speaker} {name}:", *lines[first : first + 8], "", ""]))
    return "".join(speeches)


def _wiki(title: str, paragraphs: list[str]) -> str:
    """An article of an export file, with headings, lists and links."""
    number, body = int(_order(title)[:6], 16), [f"'''{title}'''"]
    for i, paragraph in enumerate(paragraphs):
        if i % 6 == 3:
            body.append(f"== {' '.join(_words(paragraph).split()[:3]).capitalize()} ==")
        linked = re.sub(
            r"((?:\b\w+\W+){11})\b([a-z]{5,})\b", r"\1[[\2]]", paragraph
        )  # every twelfth word, if it is a long one
        body.append(("* " if i % 5 == 4 else "") + linked)
    content = html.escape(
        "\n\n".join([*body, f"[[Category:{title.split()[0]}]]"]), quote=True
    ).replace("&#x27;", "'")
    body_xml = f'<text xml:space="preserve">{content}</text>'
    revision = f"<revision>\n      <id>{number * 3}</id>\n      {body_xml}\n    </revision>"
    return (
        f"  <page>\n    <title>{title}</title>\n    <id>{number}</id>\n    {revision}\n  </page>\n"
    )


FORMS: dict[str, Callable[[str, list[str]], str]] = {
    "text8": _text8,
    "shakespeare": _shakespeare,
    "wiki": _wiki,
}

"""Files are whole or absent, digests name content, and the cache makes everything exactly once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sae_experiments import cache, errors, files
from sae_experiments.cache import DONE, cached, discard, entry, locked
from sae_experiments.errors import UserError
from sae_experiments.files import digest, read_json, write_bytes, write_json
from sae_experiments.source import package_digest, source_digest


def python(code: str, *args: object) -> subprocess.Popen[str]:
    """Another process that has imported the modules under test."""
    start = (
        "import os, signal, sys, time\nfrom pathlib import Path\nfrom sae_experiments import cache,"
        " files\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", start + code, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# ------------------------------------------------------------------------------------------------
# files


def test_a_reader_sees_the_old_bytes_or_the_new_ones_and_never_half(tmp_path):
    path, contents, stop = (
        tmp_path / "sub" / "f",
        [b"a" * 400_000, b"b" * 300_000],
        threading.Event(),
    )
    write_bytes(path, contents[0])

    def write():
        while not stop.is_set():
            for content in contents:
                write_bytes(path, content)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen = {path.read_bytes() for _ in range(200)}
    finally:
        stop.set()
        writer.join()
    assert seen <= set(contents)


def test_a_writer_that_fails_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    path = tmp_path / "f"
    write_bytes(path, b"old")

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_writer_that_is_killed_leaves_the_old_file(tmp_path, moment):
    path = tmp_path / "f"
    write_bytes(path, b"old")
    killed = python(
        f"os.{moment} = lambda *a: os.kill(os.getpid(),"
        " signal.SIGKILL)\nfiles.write_bytes(Path(sys.argv[1]), b'new')",
        path,
    )
    assert killed.wait(30) == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    write_bytes(path, b"next")
    assert path.read_bytes() == b"next"


def test_bytes_are_on_the_disk_before_the_name_points_to_them(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))
    write_bytes(tmp_path / "f", b"x")
    assert calls[:2] == ["fsync", "replace"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [1, -float("inf")]}])
def test_json_on_disk_never_holds_nan_or_infinity(tmp_path, value):
    write_json(tmp_path / "f.json", {"old": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "f.json", value)
    assert read_json(tmp_path / "f.json") == {"old": 1}


def test_json_bytes_do_not_depend_on_the_order_of_keys(tmp_path):
    write_json(tmp_path / "a", {"x": 1, "y": {"p": 2, "q": 3}})
    write_json(tmp_path / "b", {"y": {"q": 3, "p": 2}, "x": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_damaged_json_is_one_line_that_names_the_file(tmp_path):
    (tmp_path / "f.json").write_text('{"a": 1')
    with pytest.raises(UserError, match=r"f\.json") as caught:
        read_json(tmp_path / "f.json")
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------
# digests


def test_digest_depends_on_content_and_not_on_key_order():
    assert digest({"a": 1, "b": [1, 2], "c": {"x": None, "y": "z"}}) == digest(
        {"c": {"y": "z", "x": None}, "b": [1, 2], "a": 1}
    )
    different = [
        {"a": 1},
        {"a": 2},
        {"b": 1},
        {"a": "1"},
        {"a": [1]},
        {"a": None},
        {"a": True},
        {"a": 1.5},
        [1, 2],
        [2, 1],
        [[1], 2],
    ]
    assert len({digest(v) for v in different}) == len(different)
    assert len(digest({})) == 16 and int(digest({}), 16) >= 0
    with pytest.raises(ValueError, match="JSON"):
        digest({"a": float("nan")})


def code(folder: Path, text: str) -> str:
    (folder / "m.py").write_text(text)
    assert package_digest(folder) == package_digest(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        return source_digest("m")


PLAIN = "def f(x):\n    return x + 1\n\nclass A:\n    y = 'text'\n"


@pytest.mark.parametrize(
    "same",
    [
        '"""What it is."""\n' + PLAIN,
        "# why\n" + PLAIN.replace("x + 1", "x + 1  # one more"),
        PLAIN.replace("    return", '    """Docstring\n\n    of two paragraphs."""\n    return'),
        PLAIN.replace("    y", "    '''of a class'''\n    y"),
        PLAIN.replace("x + 1", "(x\n            +    1)"),
    ],
    ids=["module docstring", "comments", "function docstring", "class docstring", "layout"],
)
def test_source_digest_ignores_comments_docstrings_and_layout(tmp_path, same):
    assert code(tmp_path, same) == code(tmp_path, PLAIN)


@pytest.mark.parametrize(
    "other",
    [
        PLAIN.replace("1", "2"),
        PLAIN.replace("'text'", "'txt'"),
        PLAIN.replace("x", "z"),
        PLAIN + "import os\n",
        PLAIN.replace("+", "-"),
        PLAIN.replace("    return x + 1", "    y = 1\n    'not a docstring'\n    return x + 1"),
    ],
    ids=["number", "string", "name", "statement", "operator", "body"],
)
def test_source_digest_notices_every_change_of_code(tmp_path, other):
    assert code(tmp_path, other) != code(tmp_path, PLAIN)


def test_package_digest_notices_a_new_and_a_renamed_module(tmp_path):
    code(tmp_path, PLAIN)
    before = package_digest(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "n.py").write_text("")
    added = package_digest(tmp_path)
    (tmp_path / "m.py").rename(tmp_path / "k.py")
    assert len({before, added, package_digest(tmp_path)}) == 3


# ------------------------------------------------------------------------------------------------
# the cache


def make_of(calls: list[Path], name: str = "f", content: bytes = b"content" * 100):
    def make(folder: Path) -> None:
        calls.append(folder)
        write_bytes(folder / "sub" / name, content)

    return make


def test_cached_makes_once_and_names_the_folder_by_its_key(tmp_path):
    calls: list[Path] = []
    folder = cached(tmp_path, "kind", {"a": 1, "b": 2}, make_of(calls))
    assert (
        cached(tmp_path, "kind", {"b": 2, "a": 1}, make_of(calls))
        == folder
        == tmp_path / "kind" / digest({"a": 1, "b": 2})
    )
    assert calls == [folder]
    assert cached(tmp_path, "kind", {"a": 2}, make_of(calls)) != folder
    assert cached(tmp_path, "other", {"a": 1, "b": 2}, make_of(calls)) != folder
    assert json.loads((folder / DONE).read_text())["key"] == {"a": 1, "b": 2}


def test_an_entry_tells_whether_it_was_there(tmp_path):
    calls: list[Path] = []

    def cut(folder: Path) -> bool:
        return False

    assert not entry(tmp_path, "kind", {"a": 1}, cut).was_there
    first = entry(tmp_path, "kind", {"a": 1}, make_of(calls))
    again = entry(tmp_path, "kind", {"a": 1}, make_of(calls))
    assert (first.was_there, again.was_there, len(calls)) == (False, True, 1)
    assert first.folder == again.folder == cached(tmp_path, "kind", {"a": 1}, make_of(calls))


def test_cached_goes_on_in_the_same_folder_after_an_exception(tmp_path):
    def fail(folder: Path) -> None:
        write_bytes(folder / "checkpoint", b"half")
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        cached(tmp_path, "kind", {"a": 1}, fail)
    found = []
    folder = cached(
        tmp_path, "kind", {"a": 1}, lambda f: found.append((f / "checkpoint").read_bytes())
    )
    assert found == [b"half"] and (folder / DONE).exists()


def test_cached_goes_on_in_the_same_folder_after_a_kill_and_nobody_waits_for_the_dead(tmp_path):
    make = (
        "def make(f):\n files.write_bytes(f / 'checkpoint', b'half')\n os.kill(os.getpid(),"
        " signal.SIGKILL)\n"
    )
    killed = python(make + "cache.cached(Path(sys.argv[1]), 'kind', {'a': 1}, make)", tmp_path)
    assert killed.wait(30) == -signal.SIGKILL
    found = []
    cached(tmp_path, "kind", {"a": 1}, lambda f: found.append((f / "checkpoint").read_bytes()))
    assert found == [b"half"]


def flip(folder: Path) -> None:
    content = bytearray((folder / "sub" / "f").read_bytes())
    content[50] ^= 1
    (folder / "sub" / "f").write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (flip, "sub/f"),
        (lambda f: (f / "sub" / "f").unlink(), "sub/f"),
        (lambda f: (f / "sub" / "f").write_bytes(b"content"), "sub/f"),
        (lambda f: (f / DONE).write_text("{"), DONE),
        (lambda f: (f / DONE).write_text("[]"), DONE),
    ],
    ids=["flipped bit", "missing", "shorter", "list is not JSON", "list is something else"],
)
def test_cached_notices_damage_says_so_and_makes_it_again(tmp_path, capsys, damage, named):
    calls: list[Path] = []
    folder = cached(tmp_path, "kind", {"a": 1}, make_of(calls))
    (folder / "stale").write_text("made by nobody")
    damage(folder)
    capsys.readouterr()
    assert cached(tmp_path, "kind", {"a": 1}, make_of(calls)) == folder
    said = capsys.readouterr().out
    assert len(calls) == 2 and named in said and "damaged" in said and said.count("\n") == 1
    assert (folder / "sub" / "f").read_bytes() == b"content" * 100 and not (
        folder / "stale"
    ).exists()
    cached(tmp_path, "kind", {"a": 1}, make_of(calls))
    assert len(calls) == 2 and not capsys.readouterr().out


def test_two_processes_that_want_the_same_make_it_once_and_both_get_it(tmp_path):
    code = """
root = Path(sys.argv[1])
def make(f):
    with open(root / "calls", "a") as out:
        out.write("made\\n")
    time.sleep(0.4)
    files.write_bytes(f / "x", b"x")
print((cache.cached(root, "kind", {"a": 1}, make) / "x").read_bytes())
"""
    both = [python(code, tmp_path) for _ in range(2)]
    said = [p.communicate(timeout=30) for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    assert [out for out, _ in said] == ["b'x'\n"] * 2
    assert (tmp_path / "calls").read_text() == "made\n"


def test_a_make_that_was_cut_short_is_returned_as_it_is_and_continued_next_time(tmp_path):
    def make(folder: Path) -> bool:
        done = int((folder / "n").read_text()) + 1 if (folder / "n").exists() else 1
        (folder / "n").write_text(str(done))
        return done >= 3

    numbers = []
    for _ in range(5):
        folder = cached(tmp_path, "kind", {}, make)
        numbers.append((int((folder / "n").read_text()), (folder / DONE).exists()))
    assert numbers == [(1, False), (2, False), (3, True), (3, True), (3, True)]


def test_a_folder_that_several_write_to_is_cleared_of_what_killed_writers_left_and_of_nothing_else(
    tmp_path,
):
    folder = tmp_path / "shared"
    killed = python(
        "os.replace = lambda *a: os.kill(os.getpid(),"
        " signal.SIGKILL)\nfiles.write_bytes(Path(sys.argv[1]), b'half')",
        folder / "a.json",
    )
    assert killed.wait(30) == -signal.SIGKILL and len(list(folder.glob(".a.json.*.tmp"))) == 1
    (folder / "inside").mkdir()
    others = [folder / ".notes.tmp", folder / "own.12.tmp", folder / "inside" / ".a.json.12.tmp"]
    for path in others:
        path.touch()
    with cache.clearing(folder):
        files.write_bytes(folder / "b.json", b"whole")
        with pytest.raises(UserError), locked(folder / ".lock", wait_s=0):
            pass
    assert {p for p in folder.rglob("*") if p.is_file()} == {
        *others,
        folder / "b.json",
        folder / ".lock",
    }


def test_two_threads_that_write_one_file_do_not_share_a_temporary_one(tmp_path, monkeypatch):
    names: list[str] = []
    replace = os.replace
    monkeypatch.setattr(
        os, "replace", lambda a, b: (names.append(str(a)), time.sleep(0.1), replace(a, b))
    )
    threads = [
        threading.Thread(target=files.write_bytes, args=(tmp_path / "f", bytes([i]) * 99))
        for i in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(names)) == 2 and len(set((tmp_path / "f").read_bytes())) == 1


def test_a_lock_that_is_held_is_one_line_and_is_free_when_its_holder_dies(tmp_path):
    holder = python(
        "with cache.locked(Path(sys.argv[1])):\n print('held', flush=True)\n time.sleep(60)",
        tmp_path / "lock",
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with (
        pytest.raises(UserError, match="somebody has it"),
        locked(tmp_path / "lock", wait_s=0, held="somebody has it"),
    ):
        pass
    holder.kill()
    holder.wait()
    began = time.monotonic()
    with locked(tmp_path / "lock", wait_s=10):
        assert time.monotonic() - began < 5


def test_this_module_imports_neither_torch_nor_numpy():
    """The command line answers a mistake at once because what it needs for that is light."""
    probe = python("print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])")
    assert probe.communicate(timeout=30)[0] == "[]\n"
    assert errors.UserError.exit_status == 2


def test_a_folder_is_discarded_only_when_nobody_is_making_it(tmp_path):
    order: list[str] = []

    def make(folder: Path) -> None:
        other = threading.Thread(
            target=lambda: (discard(tmp_path, "kind", {"a": 1}), order.append("discarded"))
        )
        other.start()
        time.sleep(0.3)
        (folder / "f").write_text("whole")
        order.append("made")
        threads.append(other)

    threads: list[threading.Thread] = []
    folder = cached(tmp_path, "kind", {"a": 1}, make)
    threads[0].join(10)
    assert order == ["made", "discarded"] and not folder.exists()

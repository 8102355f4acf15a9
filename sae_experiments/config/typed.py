"""What people type: the one reader of options that are text, such as names of folders and files.

Hydra reads ``2026_11_2`` as a number, ``1e5``, ``true`` and ``[a,b]`` as other things than text, and ``ü`` and ``#`` not at all. Options in
:data:`TEXTS` are what was typed; quotes around the whole of it are taken off, as the shell would.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePath

from sae_experiments.errors import UserError

#: Places where results go: text, and never null.
PLACES = ("out_dir", "runs_root", "cache")
#: Files and folders that are read.
INPUTS = ("data.*.file", "study.local.folder", "study.local.text", "study.*.sae")
#: Text that is shown or handed on.
NAMES = (
    "label",
    "track.project",
    "track.group",
    "launcher.address",
    "launcher.cluster",
    "launcher.parameters.name",
)
NAMES += tuple(
    f"launcher.parameters.slurm_{name}" for name in ("partition", "account", "qos", "constraint")
)
#: Text that may hold spaces at its ends and line breaks.
VERBATIM = ("lm.prompt", "study.lm.prompt")
TEXTS = (*PLACES, *INPUTS, *NAMES, *VERBATIM)
REQUIRED = (*PLACES, *VERBATIM, "track.project")
LONGEST = 255  # bytes of a file's name on the usual file systems


def key_of(override: str) -> str:
    """``sae.target_l0`` of ``sae.target_l0=32`` (also with a leading + or ++)."""
    return override.lstrip("+~").split("=", 1)[0].strip()


def is_text(key: str, among: Sequence[str] = TEXTS) -> bool:
    """Whether an option is text."""
    return any(fnmatchcase(key, pattern) for pattern in among)


def value_of(override: str) -> str:
    """What stands after the ``=``, without quotes around the whole of it."""
    typed = override.split("=", 1)[1]
    found = _unquoted(typed.strip())
    if found is not None:
        return found
    return typed if is_text(key_of(override), VERBATIM) else typed.strip()


def text_of(override: str) -> str | None:
    """The text that was typed for an option in :data:`TEXTS`; None for null, where it may be null.

    Raises:
        UserError: no text that can be used.
    """
    key, text = key_of(override), value_of(override)
    if text.lower() == "null" and _unquoted(override.split("=", 1)[1].strip()) is None:
        if is_text(key, REQUIRED):
            raise UserError(
                f"{key}=null must be a text: give one, or '{key}=\"null\"' if null is its name"
            )
        return None
    return checked(key, text)


def checked(key: str, text: str) -> str:
    """``text``, or a :class:`UserError` for what cannot be the value of a text option."""
    if is_text(key, PLACES) and not text.strip():
        raise UserError(f"{key}={text} names nothing: give the name of a folder")
    if not is_text(key, VERBATIM) and re.search(r"[\x00-\x1f\x7f]", text):
        raise UserError(f"{key}={text!r} holds a control character: leave it out")
    if re.search(r"[\ud800-\udfff]", text):
        raise UserError(f"{key}={text!r} is not valid UTF-8: type the name again")
    if "${" in text:
        raise UserError(
            f"{key}={text} is text, in which ${{...}} means nothing: write out what it stands for"
        )
    if is_text(key, (*PLACES, *INPUTS)):
        _check_path(key, text)
    return text


def _check_path(key: str, text: str) -> None:
    long = [part for part in PurePath(text).parts if len(part.encode()) > LONGEST]
    if long:
        raise UserError(
            f"{key}={text}: {long[0][:40]}... has more than the {LONGEST} bytes that a name may have"
        )
    try:
        if key != "out_dir":
            Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"{key}={text}: nobody's home is {PurePath(text).parts[0]}") from error


def last_text(overrides: Iterable[str], key: str, default: str | None = None) -> str | None:
    """The text of ``key`` that counts among ``overrides``: the last one."""
    found = [text_of(o) for o in overrides if key_of(o) == key and "=" in o]
    return found[-1] if found else default


def folder_of(text: str) -> str:
    """The one spelling of a folder's name: ``run_1`` of ``./run_1/``."""
    return str(PurePath(text)) if text else text


def run_folder(runs_root: str | None, out_dir: str) -> Path:
    """``<runs_root>/<out_dir>``; out_dir cannot leave runs_root."""
    if not runs_root:
        raise UserError(f"runs_root={runs_root} must name a folder, for example runs")
    inside = Path(out_dir)
    if not out_dir or inside.is_absolute() or ".." in inside.parts or inside == Path("."):
        raise UserError(
            f"out_dir={out_dir!r} must name a folder below runs_root={runs_root} (set runs_root to write elsewhere)"
        )
    return Path(runs_root).expanduser() / inside


def for_hydra(override: str) -> str:
    """The override in a form in which Hydra reads what was meant."""
    key = key_of(override)
    if "=" not in override or not is_text(key):
        return override
    text, plus = text_of(override), override[: len(override) - len(override.lstrip("+"))]
    return f"{plus}{key}={'null' if text is None else _quoted(text)}"


def written(key: str, text: str) -> str:
    """The override that :func:`text_of` reads as ``text``, as a person would type it."""
    plain = f"{key}={text}"
    return plain if value_of(plain) == text and text.lower() != "null" else f"{key}={_quoted(text)}"


def choices_of(override: str) -> list[str] | None:
    """The overrides that ``data.text8.file=choice(a.txt,b.txt)`` stands for in a sweep; None where it is one text.

    Raises:
        UserError: a list of input files without ``choice``, or an empty one.
    """
    key, typed = key_of(override), override.split("=", 1)[1].strip()
    if not is_text(key, INPUTS) or _unquoted(typed) is not None:
        return None
    listed = re.fullmatch(r"choice\((.*)\)", typed)
    if listed is None and "," in typed:
        raise UserError(
            f"{key}={typed} is one name: to vary it write '{key}=choice({typed})', to keep it '{key}=\"{typed}\"'"
        )
    if listed is None:
        return None
    one = r"""\s*("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|[^,]*?)\s*(?:,|$)"""
    found = [
        f"{key}={part}" for part in re.findall(one, listed[1])[: listed[1].count(",") + 1] if part
    ]
    if not found:
        raise UserError(f"{key}={typed} names no file")
    return found


#: Keys of earlier versions, by their last part, with the names that replaced them.
RENAMED_KEYS = {
    "arms": ("saes",),
    "product": ("matmul_precision",),
    "warmup": ("warmup_frac",),
    "fractions": ("group_fracs", "phase_fracs"),
    "least": ("min_fires", "min_positives", "min_gain"),
    "clean": ("clean_frac",),
    "start": ("start_frac",),
    "every": ("eval_every_frac",),
    "rows": ("row_frac", "eval_rows"),
}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The known name that was probably meant, as the end of a message; "" if none is near."""
    known = list(known)
    group, _, last = name.rpartition(".")
    for renamed in RENAMED_KEYS.get(last, ()):
        full = f"{group}.{renamed}" if group else renamed
        if full in known:
            return f"; did you mean {full}?"
    close = difflib.get_close_matches(name, known, 1, 0.6) or difflib.get_close_matches(
        name.rsplit(".", 1)[-1], [k for k in known if "." not in k], 1, 0.8
    )
    tails = [k for k in known if k.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1] and k != name]
    guess = (tails[:1] or close) if "." not in name else (close or tails[:1])
    return f"; did you mean {guess[0]}?" if guess else ""


def _unquoted(typed: str) -> str | None:
    """What stands between the quotes, if one pair of them holds all of it.

    A backslash counts as such but before a quote, where two stand for one, and one takes the
    quote's meaning away.
    """
    mark = typed[:1]
    if len(typed) < 2 or mark not in "'\"" or typed[-1] != mark:
        return None
    inside = typed[1:-1]
    end = len(inside) - len(inside.rstrip("\\"))
    if end % 2 or any(len(m[1]) % 2 == 0 for m in re.finditer(rf"(\\*){mark}", inside)):
        return None
    plain = re.sub(
        rf"(\\*){mark}", lambda m: "\\" * (len(m[1]) // 2) + mark, inside[: len(inside) - end]
    )
    return plain + "\\" * (end // 2)


def _quoted(text: str) -> str:
    """``text`` in double quotes, as :func:`_unquoted` and Hydra read it."""
    end = len(text) - len(text.rstrip("\\"))
    inside = re.sub(r'(\\*)"', lambda m: m[1] * 2 + '\\"', text[: len(text) - end])
    return '"' + inside + "\\" * (2 * end) + '"'

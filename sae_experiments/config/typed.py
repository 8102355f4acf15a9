"""Parser of the overrides that users type: which keys are text, lists, numbers or choices.

Hydra parses `2026_11_2` as a number, does not read `1e5`, `true` or `[a,b]` as text either, and
rejects `ü` and `#`. The values of keys in `TEXTS` are taken as they were typed; quotes around the
whole of a value are taken off, as the shell would. Plans, single runs and sweeps all use this
module.
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
INPUTS = (
    "data.*.file",
    "data.*.path",
    "lm.path",
    "study.lm.path",
    "study.local.folder",
    "study.local.text",
    "study.*.sae",
)
INPUTS += ("sae.path", "sae.saelens.path", "saes.*.path")
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

#: Keys that are null in the YAML, but a list if given: they span no grid of SAEs.
NUMBER_LISTS = ("seeds", "study.seeds")
LISTS = (*NUMBER_LISTS, "sae.train.betas", "sae.read")
#: Keys that hold exactly two numbers, so that one number is not a list of them.
PAIRS = ("*.betas",)
#: Keys that hold the seeds of cells.
SEEDS = ("seeds", "study.seeds", "data.*.seeds")
#: Keys that are a whole number in the YAML, but may have a fraction.
FRACTIONS = ("sae.target_l0", "sae.expansion")
#: Keys, or beginnings of keys, that take a number if they are null in the YAML.
NUMBERS = ("threads", "time_limit_s", "metric.", "fit.", "lm.train.", "sae.train.")
NUMBERS += ("sae.model.coeff", "sae.d_sae", "sae.target_l0", "sae.active_frac")
#: Keys that must be positive, or null.
POSITIVE = ("threads", "time_limit_s")
#: Keys with a few possible values.
CHOICES = {"verbosity": ("quiet", "normal", "verbose"), "corpus_size": ("full", "laptop", "smoke")}
CHOICES |= {"challenge.world": ("S", "M", "full"), "challenge.seeds": ("development", "scoring")}

# ------------------------------------------------------------------------------ overrides


def key_of(override: str) -> str:
    """The key of an override: `sae.target_l0` of `sae.target_l0=32`, also after + or ++."""
    return override.lstrip("+~").split("=", 1)[0].strip()


def is_text(key: str, among: Sequence[str] = TEXTS) -> bool:
    """True if the value of a key is text."""
    return any(fnmatchcase(key, pattern) for pattern in among)


def value_of(override: str) -> str:
    """The value of an override, without quotes around the whole of it."""
    typed = override.split("=", 1)[1]
    inside = _unquoted(typed.strip())
    if inside is not None:
        return inside
    return typed if is_text(key_of(override), VERBATIM) else typed.strip()


def text_of(override: str) -> str | None:
    """The text given to a key in `TEXTS`; None for null.

    Raises:
        UserError: The text cannot be used, or the key cannot be null.
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
    """Return `text` if it can be the value of a key in `TEXTS`, else raise `UserError`."""
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
            f"{key}={text}: {long[0][:40]}... has more than the {LONGEST} bytes "
            "that a name may have"
        )
    try:
        if key != "out_dir":
            Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(
            f"{key}={text}: there is no user {PurePath(text).parts[0][1:]} here"
        ) from error


def last_text(overrides: Iterable[str], key: str, default: str | None = None) -> str | None:
    """The text of `key` that counts among `overrides`: the last one."""
    texts = [text_of(o) for o in overrides if key_of(o) == key and "=" in o]
    return texts[-1] if texts else default


def by_key(overrides: Iterable[str]) -> dict[str, str]:
    """The overrides that count, by key: of several for one key, the last."""
    return {key_of(o): o for o in overrides}


def in_group(override: str, *groups: str) -> bool:
    """True if an override chooses from one of the groups or changes a setting in it."""
    return key_of(override).split(".")[0] in groups


def folder_of(text: str) -> str:
    """Normalise the name of a folder: `run_1` for `./run_1/`."""
    return str(PurePath(text)) if text else text


def run_folder(runs_root: str | None, out_dir: str) -> Path:
    """The folder `<runs_root>/<out_dir>`; raise `UserError` if it lies outside runs_root."""
    if not runs_root:
        raise UserError(f"runs_root={runs_root} must name a folder, for example runs")
    inside = Path(out_dir)
    if not out_dir or inside.is_absolute() or ".." in inside.parts or inside == Path("."):
        raise UserError(
            f"out_dir={out_dir!r} must name a folder below runs_root={runs_root} "
            "(set runs_root to write elsewhere)"
        )
    return Path(runs_root).expanduser() / inside


def for_hydra(override: str) -> str:
    """Quote an override so that Hydra reads its text as it was typed."""
    key = key_of(override)
    if "=" not in override or not is_text(key):
        return override
    text, plus = text_of(override), override[: len(override) - len(override.lstrip("+"))]
    return f"{plus}{key}={'null' if text is None else _quoted(text)}"


def written(key: str, text: str) -> str:
    """The override that `text_of` reads as `text`, as a user would type it."""
    plain = f"{key}={text}"
    return plain if value_of(plain) == text and text.lower() != "null" else f"{key}={_quoted(text)}"


def choices_of(override: str) -> list[str] | None:
    """The overrides that `data.text8.file=choice(a.txt,b.txt)` stands for in a sweep.

    Returns:
        An override for each file; None if the value is a single text.

    Raises:
        UserError: Several files are given without `choice`, or none.
    """
    key, typed = key_of(override), override.split("=", 1)[1].strip()
    if not is_text(key, INPUTS) or _unquoted(typed) is not None:
        return None
    listed = re.fullmatch(r"choice\((.*)\)", typed)
    if listed is None and "," in typed:
        raise UserError(
            f"{key}={typed} is one name: to vary it write '{key}=choice({typed})', "
            f"to keep it '{key}=\"{typed}\"'"
        )
    if listed is None:
        return None
    one = r"""\s*("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|[^,]*?)\s*(?:,|$)"""
    files = re.findall(one, listed[1])[: listed[1].count(",") + 1]
    if not any(files):
        raise UserError(f"{key}={typed} names no file")
    return [f"{key}={file}" for file in files if file]


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
    """End of an error message that suggests the most similar known name; "" if none is similar."""
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
    """The text between quotes, or None unless one pair of quotes holds all of it.

    Backslashes stand for themselves, except before a quote: there two stand for one, and a single
    one makes the quote part of the text.
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
    """`text` in double quotes, as `_unquoted` and Hydra read it."""
    end = len(text) - len(text.rstrip("\\"))
    inside = re.sub(r'(\\*)"', lambda m: m[1] * 2 + '\\"', text[: len(text) - end])
    return '"' + inside + "\\" * (2 * end) + '"'

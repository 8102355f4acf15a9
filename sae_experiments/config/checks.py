"""Checks of a command line against the configuration: groups, keys, types and texts.

Every mistake is a `UserError` of one line that names key, value and fix.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sae_experiments.config import own
from sae_experiments.config.typed import (
    CHOICES,
    FRACTIONS,
    LISTS,
    NUMBER_LISTS,
    NUMBERS,
    PAIRS,
    POSITIVE,
    REQUIRED,
    SEEDS,
    TEXTS,
    checked,
    did_you_mean,
    for_hydra,
    is_text,
    key_of,
)
from sae_experiments.errors import UserError, first_line
from sae_experiments.flatten import flatten

#: Groups that a command line may choose from.
GROUPS = ("preset", "data", "lm", "fit", "sae", "metric", "track", "study")
#: Errors that Hydra, OmegaConf and PyYAML raise for a file or a value they cannot read.
CONFIGURATION_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError)
#: Types of the values in the YAML files, of what may replace them, and their names.
_KINDS: tuple[tuple[type, Any, str], ...] = (
    (bool, bool, "true or false"),
    (int, int, "a whole number"),
    (float, (int, float), "a number"),
    (ListConfig, list, "a list like [1,2]"),
    (DictConfig, dict, "a mapping"),
)

# ------------------------------------------------------------------------------ reading


def as_dict(cfg: DictConfig, *, resolve: bool = True) -> dict[str, Any]:
    """A configuration as plain Python values."""
    return cast("dict[str, Any]", OmegaConf.to_container(cfg, resolve=resolve))


def line_of(o: Override) -> str:
    """An override that came from `parse`, as it was typed."""
    return o.input_line or ""


def parse(overrides: Sequence[str]) -> list[Override]:
    """Parse overrides by Hydra's grammar; values of text keys are taken as typed.

    Raises:
        UserError: An override cannot be parsed.
    """
    parser = OverridesParser.create()
    parsed: list[Override] = []
    for override in overrides:
        try:
            parsed += parser.parse_overrides([for_hydra(override)])
        except HydraException as error:
            why = first_line(error).split(":")[0]
            why = why.replace("LexerNoViableAltException", "a character that must stand in quotes")
            raise UserError(
                f"{override} cannot be read ({why}): put the value in quotes, as in 'key=\"value\"'"
            ) from error
    return parsed


def as_list(value: Any) -> list[Any]:
    """Return a list unchanged, and any other value as a list of one."""
    return value if isinstance(value, list) else [value]


def last_value(parsed: Sequence[Override], key: str, default: Any = None) -> Any:
    """The value of `key` that counts: the last one."""
    values = [o.value() for o in parsed if o.key_or_group == key]
    return values[-1] if values else default


def is_group(conf: Path, key: str) -> bool:
    """True if `key` is a folder of the configuration, from which a file is chosen."""
    return (conf / key).is_dir()


def options(conf: Path, group: str) -> list[str]:
    """Names to choose from: the files of a group, and what the script adds.

    Files with shared parts (`_name.yaml`) are left out.
    """
    files = [p.stem for p in (conf / group).glob("*.yaml") if not p.stem.startswith("_")]
    return sorted([*files, *own.names(group)])


def is_grid(key: str, value: Any, before: Any) -> bool:
    """True if a list is given for a setting of an SAE that takes a single value.

    Args:
        key: Full key, for example `sae.target_l0`.
        value: The value as given.
        before: The value in the configuration.
    """
    takes_list = isinstance(before, ListConfig) or key in LISTS
    return key.startswith("sae.") and isinstance(value, list) and not takes_list


def listed(o: Override, before: Any) -> Override:
    """Turn a single number into a list of one if the key expects a list of numbers.

    Args:
        o: The override.
        before: The value that it replaces.
    """
    key, value = o.key_or_group, o.value() if not o.is_delete() else None
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if o.is_sweep_override() or not is_number or not _holds_numbers(key, before):
        return o
    start, _, typed = line_of(o).partition("=")
    return parse([f"{start}=[{typed.strip()}]"])[0]


def _holds_numbers(key: str, before: Any) -> bool:
    """True if a key holds a list of numbers, as many as one likes."""
    if is_text(key, PAIRS):
        return False
    if isinstance(before, ListConfig):
        return bool(before) and all(isinstance(v, (int, float)) for v in before)
    return before is None and key in NUMBER_LISTS


# ------------------------------------------------------------------------------ checking


def refuse_sweeps(parsed: Sequence[Override]) -> None:
    """Raise `UserError` if an override of a single run gives several values, as in `a=1,2`."""
    for o in parsed:
        if o.is_sweep_override():
            listed = f"{o.key_or_group}=[{line_of(o).split('=', 1)[1]}]"
            raise UserError(
                f"{line_of(o)} gives several values: one run with all of them is {listed}, "
                "one run of each a sweep (-m)"
            )


def check_groups(conf: Path, parsed: Sequence[Override]) -> None:
    """Raise `UserError` for a choice that has no file."""
    for o in parsed:
        group = o.key_or_group
        if not is_group(conf, group) or o.is_delete():
            continue
        known = options(conf, group)
        if group == "preset":
            known = ["auto", *known]
        names = as_list(o.value())
        for name in names:
            if str(name) not in known:
                raise UserError(
                    f"{group}={name} does not exist: choose from {', '.join(known)}"
                    f"{did_you_mean(str(name), known)}"
                )
        if group == "data" and not names:
            raise UserError("data=[] names no corpus: use for example data=[shakespeare_char]")


def check_keys(parsed: Sequence[Override], bases: Sequence[DictConfig]) -> None:
    """Check that every key exists in all of `bases`, and that its value has the right type."""
    for base in bases:
        known = flatten(as_dict(base, resolve=False), branches=True)
        for o in parsed:
            if not _is_left_to_hydra(o):
                check_key(o, known, OmegaConf.select(base, o.key_or_group))


def _is_left_to_hydra(o: Override) -> bool:
    key = o.key_or_group
    changes_keys = o.is_delete() or o.is_add() or o.is_force_add()
    return changes_keys or key.startswith("hydra.") or "/" in key or key in GROUPS


def check_key(
    o: Override,
    known: Collection[str],
    before: Any,
    where: str = "python experiment.py --help lists the keys",
) -> None:
    """Check one override `key=value`.

    Args:
        o: The override.
        known: Full names of all keys.
        before: The value that it replaces.
        where: Advice on where to find the keys.

    Raises:
        UserError: The key does not exist, or the value has the wrong type.
    """
    key = o.key_or_group
    if key not in known:
        raise UserError(f"{key} is not an option{did_you_mean(key, known)}; {where}")
    check_type(key, o.value(), before)


def check_type(key: str, value: Any, before: Any) -> None:
    """Check that a value, or every value of a grid, can replace the one in the configuration.

    Null can replace everything, and text is checked elsewhere (`check_texts`).
    """
    if key in CHOICES and value not in CHOICES[key]:
        raise UserError(f"{key}={value} is not one of {', '.join(CHOICES[key])}")
    if is_text(key, SEEDS) and value is not None:
        check_seeds(key, value)
    if isinstance(before, str):
        return
    singles = value if isinstance(value, list) and is_grid(key, value, before) else [value]
    for single in singles:
        _check_number(key, single, before)
        _check_kind(key, single, before)


def check_seeds(key: str, value: Any) -> None:
    """Raise `UserError` unless a value is a list of seeds with at least one."""
    seeds = value if isinstance(value, (list, tuple)) else [None]
    if not seeds or any(type(seed) is not int or seed < 0 for seed in seeds):
        raise UserError(
            f"{key}={value} must be a list of whole numbers like [0,1,2], or null for each "
            "corpus's own"
        )


def _check_number(key: str, value: Any, before: Any) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{key}={value} must be a finite number")
    is_number = key.startswith(NUMBERS) and key not in LISTS
    if before is None and is_number and isinstance(value, (str, bool)):
        raise UserError(f"{key}={value} must be a number, or null")
    _check_bound(key, value, before)


def _check_bound(key: str, value: Any, before: Any) -> None:
    counts = before is None or (isinstance(before, int) and before > 0)
    if key.startswith("metric.") and counts and isinstance(value, int) and value < 1:
        raise UserError(f"{key}={value} must be at least 1")
    if key in POSITIVE and value is not None and not value > 0:
        raise UserError(f"{key}={value} must be positive, or null")


def _check_kind(key: str, value: Any, before: Any) -> None:
    if value is None or before is None or (key in FRACTIONS and isinstance(value, float)):
        return
    allowed, words = next(
        (allowed, words) for kind, allowed, words in _KINDS if isinstance(before, kind)
    )
    fits = isinstance(value, allowed)
    if isinstance(value, bool):  # to Python, true is a whole number
        fits = isinstance(before, bool)
    if not fits:
        nested = isinstance(before, (ListConfig, DictConfig))
        now = OmegaConf.to_container(before) if nested else before
        raise UserError(f"{key}={value} must be {words} (now {now})")


def check_l0(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Raise `UserError` if the sparsity of an SAE was typed twice, with different numbers."""
    typed = {key_of(override) for override in overrides}
    for key in ("sae.model.k", "sae.model.target_l0"):
        if not {key, "sae.target_l0"} <= typed:
            continue
        asked, other = OmegaConf.select(cfg, "sae.target_l0"), OmegaConf.select(cfg, key)
        if asked != other:
            raise UserError(
                f"sae.target_l0={asked} and {key}={other} contradict each other: leave out {key}, "
                "which follows from the first"
            )


def check_texts(cfg: DictConfig) -> None:
    """Check that text settings in YAML files are text: unquoted, 2026_11_2 is read as a number."""
    for key, value in flatten(as_dict(cfg), branches=True).items():
        if not is_text(key, TEXTS) or (value is None and not is_text(key, REQUIRED)):
            continue
        if not isinstance(value, str):
            raise UserError(
                f"{key}: {value} in a file of conf/ is not text there: put it in quotes"
            )
        checked(key, value)


# ------------------------------------------------------------------------------ errors


def configuration_error(error: Exception) -> str:
    """One line for an error; for a file that is not valid YAML, its name, line and column."""
    mark = getattr(error, "problem_mark", None)
    if not isinstance(error, yaml.YAMLError) or mark is None:
        return first_line(error)
    problem = getattr(error, "problem", None) or "unexpected text"
    place = f"in line {mark.line + 1}, column {mark.column + 1}"
    return f"{mark.name} is not valid YAML {place}: {problem}"


@contextmanager
def configuring() -> Iterator[None]:
    """Turn every error within the context into a `UserError` of one line.

    Nothing is computed yet, so that an error is a mistake in a file or on the command line.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        line = configuration_error(error)
        if not isinstance(error, CONFIGURATION_ERRORS):
            line = f"the configuration cannot be used: {type(error).__name__}: {line}"
        raise UserError(line) from error

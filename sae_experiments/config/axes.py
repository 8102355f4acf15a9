"""Several values for one key: the axes of a sweep, and grids of SAEs within one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from hydra.core.override_parser.types import IntervalSweep, Override
from omegaconf import DictConfig, OmegaConf

from sae_experiments.config.checks import (
    as_list,
    check_groups,
    is_grid,
    is_group,
    last_value,
    line_of,
    options,
    parse,
)
from sae_experiments.config.typed import choices_of, did_you_mean, for_hydra, is_text, key_of
from sae_experiments.errors import UserError

#: Key of the SAE that another one wraps, as users write it, and its name in Hydra.
HOST, HYDRA_HOST = "sae/host", "sae@sae.host"
#: The SAE that is read from a directory, and the key of that directory, which no other SAE has.
LOADED, PATH = "saelens", "sae.path"

# ------------------------------------------------------------------------------ sweeps


class Axis(NamedTuple):
    """One key that a sweep varies: over `choices` as typed, or from `low` to `high`."""

    key: str
    choices: list[str]
    low: float = 0.0
    high: float = 0.0
    log: bool = False  # the interval is logarithmic
    whole: bool = False  # whole numbers only


def axes_of(conf: Path, overrides: Sequence[str]) -> tuple[list[Axis], list[str]]:
    """Split overrides into those that vary and those that are the same for every job.

    Values vary as `a=1,2`, `range()`, `choice()` or `interval()`.

    Raises:
        UserError: A choice does not exist. This is raised before any job starts.
    """
    axes: list[Axis] = []
    fixed: list[str] = []
    for override in overrides:
        if not is_text(key_of(override)):
            continue
        choices = choices_of(override)
        if choices is None:
            for_hydra(override)  # raises for what cannot be text
            fixed.append(override)
        else:
            values = [choice.split("=", 1)[1] for choice in choices]
            axes.append(Axis(key_of(override), values))
    for o in parse([o for o in overrides if not is_text(key_of(o))]):
        if o.is_sweep_override():
            axes.append(_axis(conf, o))
        else:
            check_groups(conf, [o])
            fixed.append(line_of(o))
    return axes, fixed


def _axis(conf: Path, o: Override) -> Axis:
    key = o.key_or_group
    value = o.value()
    if not isinstance(value, IntervalSweep):
        choices = list(dict.fromkeys(o.sweep_string_iterator()))
        if is_group(conf, key):
            check_groups(conf, parse([f"{key}={choice}" for choice in choices]))
        return Axis(key, choices)
    log = "log" in value.tags
    whole = isinstance(value.start, int)
    low, high = (float(end or 0.0) for end in (value.start, value.end))
    if not low < high or (log and not low > 0):
        raise UserError(
            f"{line_of(o)}: an interval goes from a smaller to a larger number, "
            "both positive where it is logarithmic"
        )
    return Axis(key, [], low, high, log, whole)


# ------------------------------------------------------------------------------ one run


def split_grid(
    parsed: Sequence[Override], base: DictConfig
) -> tuple[dict[str, list[str]], list[str]]:
    """Split overrides of one SAE into its grid and all others.

    Args:
        parsed: The overrides.
        base: The configuration without the overrides, which shows the keys that take a list.

    Returns:
        The values of each key of the grid as typed, and the other overrides.
    """
    grid: dict[str, list[str]] = {}
    plain: list[str] = []
    for o in parsed:
        key = o.key_or_group
        if is_grid(key, o.value(), OmegaConf.select(base, key)):
            grid[key] = _values(o)
        else:
            plain.append(line_of(o))
    return grid, plain


def _values(o: Override) -> list[str]:
    """The entries of a list, each as it was typed."""
    key = o.key_or_group
    if not o.value():
        raise UserError(f"{key}=[] names no value: give one, or several like [1,2]")
    without_brackets = o.get_value_element_as_str()[1:-1]
    (entries,) = parse([f"{key}={without_brackets}"])
    if entries.is_sweep_override():
        return list(entries.sweep_string_iterator())
    return [entries.get_value_element_as_str()]


def split_by_sae(
    conf: Path, parsed: Sequence[Override], names: Sequence[str]
) -> tuple[list[Override], dict[str, list[Override]]]:
    """Split overrides into those for all SAEs and those for one, `sae.<name>.<key>=value`.

    Args:
        conf: Folder of the configuration.
        parsed: The overrides.
        names: SAEs of the run.

    Returns:
        The overrides for all SAEs, and those of each name in the form `sae.<key>=value`.

    Raises:
        UserError: An override is for an SAE that is not among `names`.
    """
    known = set(options(conf, "sae"))
    common: list[Override] = []
    own: dict[str, list[Override]] = {}
    for o in parsed:
        name, _, key = o.key_or_group.removeprefix("sae.").partition(".")
        if o.key_or_group == PATH and LOADED in names:
            own.setdefault(LOADED, []).append(o)
        elif not o.key_or_group.startswith("sae.") or not key or name not in known:
            common.append(o)
        elif name in names:
            plain = line_of(o).replace(f"sae.{name}.", "sae.", 1)
            own.setdefault(name, []).extend(parse([plain]))
        else:
            these = ", ".join(names) or "the study's own"
            raise UserError(
                f"{o.key_or_group}: sae={name} is not among the SAEs of this run ({these})"
            )
    return common, own


def hosts_of(
    conf: Path, parsed: Sequence[Override], bases: Mapping[str, DictConfig]
) -> dict[str, list[str]]:
    """Translate `sae/host=jumprelu`, or a list of hosts, into overrides that Hydra understands.

    Args:
        conf: Folder of the configuration.
        parsed: The overrides.
        bases: The configuration with each SAE of the run.

    Returns:
        Overrides that choose a host, for each SAE; empty for SAEs that wrap no other SAE.

    Raises:
        UserError: A host does not exist, or no SAE of the run wraps another.
    """
    asked = as_list(last_value(parsed, HOST, []))
    wrapping = [name for name, base in bases.items() if "host" in base.sae]
    if asked and not wrapping:
        raise UserError(
            f"{HOST}={asked[0]} is for an SAE that is built around another, such as sae=purified"
        )
    known = [name for name in options(conf, "sae") if name != LOADED and not _wraps(conf, name)]
    for host in asked:
        if str(host) not in known:
            raise UserError(
                f"{HOST}={host} does not exist: choose from {', '.join(known)}"
                f"{did_you_mean(str(host), known)}"
            )
    choices = [f"{HYDRA_HOST}={host}" for host in asked]
    return {name: choices if name in wrapping else [] for name in bases}


def _wraps(conf: Path, name: str) -> bool:
    path = conf / "sae" / f"{name}.yaml"
    return path.exists() and "sae@host" in path.read_text()

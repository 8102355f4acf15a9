"""Configuration: plans, presets and Hydra overrides in, one checked configuration out; every mistake is one line.

Hydra and OmegaConf stay in this module, ``sweeps`` and ``cli``: below them nothing sees a DictConfig.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sae_experiments.config.typed import (
    REQUIRED,
    TEXTS,
    checked,
    choices_of,
    did_you_mean,
    for_hydra,
    is_text,
    key_of,
    value_of,
)
from sae_experiments.errors import UserError

_LISTS = ("sae.train.betas", "sae.read")  # null in the YAML, but a list where they are given
_GROUPS = ("preset", "data", "lm", "fit", "sae", "metric", "track", "study")
#: The SAE that another one is built around, as users write it, and Hydra's name of the same choice.
_HOST, _HYDRA_HOST = "sae/host", "sae@sae.host"


def compose_checked(conf: Path, overrides: Sequence[str]) -> tuple[DictConfig, str]:
    """The configuration of ``overrides`` with ``saes`` filled in, and a label made of their names. Whatever is wrong is a one-line error.

    ``sae=[a,b]`` and a list for a ``sae.*`` key that holds a single value span a grid of SAEs, all fitted in one run. ``sae.<name>.<key>``
    is for the SAE ``<name>`` of the list alone.
    """
    parsed = _parsed(
        [
            f"metric=[{','.join(_options(conf, 'metric'))}]" if o == "metric=all" else o
            for o in overrides
        ]
    )
    _refuse_sweeps(parsed)
    _check_groups(conf, parsed)
    names = next((_as_list(o.value()) for o in reversed(parsed) if o.key_or_group == "sae"), None)
    if names == []:
        raise UserError(f"sae=[] names no SAE: choose from {', '.join(_options(conf, 'sae'))}")
    parsed, alone = _for_one_sae(conf, parsed, [str(name) for name in names or []])
    with _hydra_at(conf):
        groups = [
            o.input_line
            for o in parsed
            if _is_group(conf, o.key_or_group) and o.key_or_group != "sae"
        ]
        names = names or [_default_sae(groups)]
        bases = [_compose([*groups, f"sae={name}"]) for name in names]
        hosts = _hosts(
            conf, parsed, {str(name): base for name, base in zip(names, bases, strict=True)}
        )
        bases = [_compose([*groups, f"sae={name}", *hosts[str(name)][:1]]) for name in names]
        _check_keys(parsed, bases)
        saes: dict[str, Any] = {}
        for name, base in zip(names, bases, strict=True):
            own = alone.get(str(name), [])
            _check_keys(own, [base])
            taken = {"sae", _HOST, *(o.key_or_group for o in own)}
            grid, plain = _split_grid(
                [*(o for o in parsed if o.key_or_group not in taken), *own], base
            )
            around = hosts[str(name)] or [None]
            for host, *values in itertools.product(
                around, *([(k, v) for v in vs] for k, vs in grid.items())
            ):
                cfg = _compose(
                    [
                        *plain,
                        f"sae={name}",
                        *([host] if host else []),
                        *(f"{k}={v}" for k, v in values),
                    ]
                )
                inside = [host.rsplit("=", 1)[1]] if host and len(around) > 1 else []
                label = "-".join(
                    [str(name), *inside, *(f"{k.rsplit('.', 1)[1]}_{v}" for k, v in values)]
                )
                saes[re.sub(r"[^A-Za-z0-9_.-]", "_", label)] = OmegaConf.to_container(
                    cfg.sae, resolve=True
                )
    _check_texts(cfg)
    OmegaConf.set_struct(cfg, False)
    cfg.saes = saes
    return cfg, ", ".join(saes)


def _for_one_sae(
    conf: Path, parsed: Sequence[Override], names: Sequence[str]
) -> tuple[list[Override], dict[str, list[Override]]]:
    """What is for all SAEs, and by name what ``sae.<name>.<key>=value`` says about one of ``names``, as ``sae.<key>=value``.

    Raises :class:`UserError` where that SAE is not among those of the run.
    """
    known, common, alone = set(_options(conf, "sae")), [], {}
    for o in parsed:
        _, _, rest = o.key_or_group.partition("sae.")
        name, _, key = rest.partition(".")
        if not o.key_or_group.startswith("sae.") or not key or name not in known:
            common.append(o)
        elif name not in names:
            these = ", ".join(names) or "the study's own"
            raise UserError(
                f"{o.key_or_group}: sae={name} is not among the SAEs of this run ({these})"
            )
        else:
            alone.setdefault(name, []).extend(
                _parsed([o.input_line.replace(f"sae.{name}.", "sae.", 1)])
            )
    return common, alone


def _hosts(
    conf: Path, parsed: Sequence[Override], bases: Mapping[str, DictConfig]
) -> dict[str, list[str]]:
    """What ``sae/host=jumprelu``, or a list of hosts, means to Hydra, for each SAE: nothing for those that are built around no other."""
    asked = next((_as_list(o.value()) for o in reversed(parsed) if o.key_or_group == _HOST), [])
    wrapping = [name for name, base in bases.items() if "host" in base.sae]
    if asked and not wrapping:
        raise UserError(
            f"{_HOST}={asked[0]} is for an SAE that is built around another, such as sae=purified"
        )
    known = [
        name
        for name in _options(conf, "sae")
        if "sae@host" not in (conf / "sae" / f"{name}.yaml").read_text()
    ]
    for host in asked:
        if str(host) not in known:
            raise UserError(
                f"{_HOST}={host} does not exist: choose from {', '.join(known)}{did_you_mean(str(host), known)}"
            )
    return {
        name: [f"{_HYDRA_HOST}={host}" for host in asked] if name in wrapping else []
        for name in bases
    }


def _default_sae(groups: Sequence[str]) -> str:
    """The SAE of the defaults list, or the one that the chosen study puts in its place."""
    try:
        return compose("config", list(groups), return_hydra_config=True).hydra.runtime.choices[
            "sae"
        ]
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(first_line(error)) from error


@contextmanager
def _hydra_at(conf: Path) -> Iterator[None]:
    """Hydra's compose API for ``conf``, also within a job of a multirun (which has an initialised Hydra of its own: it is put back)."""
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf), version_base="1.3"):
            yield
    finally:
        GlobalHydra.instance().hydra = outer


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _compose(overrides: Sequence[str]) -> DictConfig:
    try:
        cfg = compose("config", list(overrides))
        OmegaConf.to_container(cfg, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(first_line(error)) from error
    return cfg


def _parsed(overrides: Sequence[str]) -> list[Override]:
    parser, out = OverridesParser.create(), []
    for override in overrides:
        try:
            out += parser.parse_overrides([for_hydra(override)])
        except HydraException as error:
            why = (
                first_line(error)
                .split(":")[0]
                .replace("LexerNoViableAltException", "a character that must stand in quotes")
            )
            raise UserError(
                f"{override} cannot be read ({why}): put the value in quotes, as in 'key=\"value\"'"
            ) from error
    return out


def _is_group(conf: Path, key: str) -> bool:
    return (conf / key).is_dir()


def _options(conf: Path, group: str) -> list[str]:
    return sorted(p.stem for p in (conf / group).glob("*.yaml") if not p.stem.startswith("_"))


def _check_groups(conf: Path, parsed: Sequence[Override]) -> None:
    for o in parsed:
        if _is_group(conf, o.key_or_group) and not o.is_delete():
            known = _options(conf, o.key_or_group)
            for name in _as_list(o.value()):
                if str(name) not in known:
                    shown = ["auto", *known] if o.key_or_group == "preset" else known
                    raise UserError(
                        f"{o.key_or_group}={name} does not exist: choose from {', '.join(shown)}{did_you_mean(str(name), shown)}"
                    )
            if o.key_or_group == "data" and not _as_list(o.value()):
                raise UserError("data=[] names no corpus: use for example data=[shakespeare_char]")


class Axis(NamedTuple):
    """What a sweep varies: ``choices`` (as they are typed), or an interval of numbers from ``low`` to ``high``."""

    key: str
    choices: list[str]
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False


def axes_of(conf: Path, overrides: Sequence[str]) -> tuple[list[Axis], list[str]]:
    """What ``overrides`` vary (``a=1,2``, ``range()``, ``choice()``, ``interval()``), and those that are the same for every job.

    Raises :class:`UserError` for a choice that does not exist, before any job starts.
    """
    axes, fixed = [], []
    for typed in (typed for typed in overrides if is_text(key_of(typed))):
        if (choices := choices_of(typed)) is None:
            for_hydra(typed)
            fixed.append(typed)
        else:
            axes.append(Axis(key_of(typed), [choice.split("=", 1)[1] for choice in choices]))
    for o in _parsed([o for o in overrides if not is_text(key_of(o))]):
        if not o.is_sweep_override():
            _check_groups(conf, [o])
            fixed.append(o.input_line)
            continue
        value, key = o.value(), o.key_or_group
        if isinstance(value, IntervalSweep):
            whole = isinstance(value.start, int)
            if not value.start < value.end or ("log" in value.tags and not value.start > 0):
                raise UserError(
                    f"{o.input_line}: an interval goes from a smaller to a larger number, both positive where it is logarithmic"
                )
            axes.append(
                Axis(key, [], float(value.start), float(value.end), "log" in value.tags, whole)
            )
        else:
            axes.append(Axis(key, list(dict.fromkeys(o.sweep_string_iterator()))))
            if _is_group(conf, key):
                _check_groups(conf, _parsed([f"{key}={choice}" for choice in axes[-1].choices]))
    return axes, fixed


def options_of(conf: Path, group: str, overrides: Sequence[str]) -> DictConfig:
    """``conf/<group>/<name>.yaml`` by itself, with the overrides ``group=name`` and ``group.key=value`` among ``overrides``."""
    names = [value_of(o) for o in overrides if key_of(o) == group]
    known = _options(conf, group)
    if not names or names[-1] not in known:
        raise UserError(
            f"{group}={names[-1] if names else ''} does not exist: choose from {', '.join(known)}{did_you_mean(str(names[-1:]), known)}"
        )
    cfg = DictConfig(OmegaConf.load(conf / group / f"{names[-1]}.yaml"))
    own = [o for o in overrides if key_of(o).startswith(f"{group}.")]
    _set_checked(cfg, group, _parsed(own))
    return cfg


def _set_checked(cfg: DictConfig, group: str, parsed: Sequence[Override]) -> None:
    flat = {f"{group}.{k}": v for k, v in _flat_keys(OmegaConf.to_container(cfg)).items()}
    for o in parsed:
        if o.key_or_group not in flat:
            raise UserError(
                f"{o.key_or_group} is not an option{did_you_mean(o.key_or_group, flat)}; see conf/{group}"
            )
        key = o.key_or_group.split(".", 1)[1]
        _check_type(o.key_or_group, o.value(), OmegaConf.select(cfg, key))
        OmegaConf.update(cfg, key, o.value())


def _split_grid(
    parsed: Sequence[Override], base: DictConfig
) -> tuple[dict[str, list[str]], list[str]]:
    """The ``sae.*`` keys given a list where one value belongs, with their values as they are typed, and all other overrides."""
    grid, plain = {}, []
    for o in parsed:
        one_value = (
            not isinstance(OmegaConf.select(base, o.key_or_group), ListConfig)
            and o.key_or_group not in _LISTS
        )
        if o.key_or_group.startswith("sae.") and one_value and isinstance(o.value(), list):
            if not o.value():
                raise UserError(
                    f"{o.key_or_group}=[] names no value: give one, or several like [1,2]"
                )
            (each,) = _parsed(
                [f"{o.key_or_group}={o.get_value_element_as_str()[1:-1]}"]
            )  # the list without its brackets
            grid[o.key_or_group] = (
                list(each.sweep_string_iterator())
                if each.is_sweep_override()
                else [each.get_value_element_as_str()]
            )
        else:
            plain.append(o.input_line)
    return grid, plain


def _check_keys(parsed: Sequence[Override], bases: Sequence[DictConfig]) -> None:
    """Every key exists for every SAE of the run, and every value has the type of the one it replaces."""
    for base in bases:
        known = _flat_keys(OmegaConf.to_container(base, resolve=False))
        for o in parsed:
            key = o.key_or_group
            if (
                o.is_delete()
                or o.is_add()
                or o.is_force_add()
                or key.startswith("hydra.")
                or "/" in key
                or key in _GROUPS
            ):
                continue
            if key not in known:
                raise UserError(
                    f"{key} is not an option{did_you_mean(key, known)}; python experiment.py --help lists the keys"
                )
            _check_type(key, o.value(), OmegaConf.select(base, key))


def _refuse_sweeps(parsed: Sequence[Override]) -> None:
    for o in parsed:
        if o.is_sweep_override():
            listed = f"{o.key_or_group}=[{o.input_line.split('=', 1)[1]}]"
            raise UserError(
                f"{o.input_line} gives several values: one run with all of them is {listed}, one run of each a sweep (-m)"
            )


def _check_texts(cfg: DictConfig) -> None:
    """What is text is text in the files as well: YAML, too, reads 2026_11_2 as a number."""
    for key, value in _flat_keys(OmegaConf.to_container(cfg, resolve=True)).items():
        if not is_text(key, TEXTS) or (value is None and not is_text(key, REQUIRED)):
            continue
        if not isinstance(value, str):
            raise UserError(
                f"{key}: {value} in a file of conf/ is not text there: put it in quotes"
            )
        checked(key, value)


def _flat_keys(value: Any, prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, v in value.items():
        name = f"{prefix}{key}"
        out[name] = v
        if isinstance(v, Mapping):
            out |= _flat_keys(v, f"{name}.")
    return out


#: Keys that stand as a whole number in the YAML but may have a fraction.
_FRACTIONS = ("sae.target_l0", "sae.expansion")
_CHOICES = {"verbosity": ("quiet", "normal", "verbose"), "corpus_size": ("full", "laptop", "smoke")}
_NUMBERS = (
    "threads",
    "time_limit_s",
    "metric.",
    "fit.",
    "lm.train.",
    "sae.train.",
    "sae.model.coeff",
)
_NUMBERS += ("sae.d_sae", "sae.target_l0", "sae.active_frac")
_KINDS: tuple[tuple[type, Any, str], ...] = (
    (bool, bool, "true or false"),
    (int, int, "a whole number"),
    (float, (int, float), "a number"),
    (ListConfig, list, "a list like [1,2]"),
    (DictConfig, dict, "a mapping"),
)


def _check_type(key: str, value: Any, before: Any) -> None:
    """The value (each one of a grid) is finite and of the kind that stands in the configuration; null fits everywhere."""
    grid = (
        key.startswith("sae.")
        and isinstance(value, list)
        and not isinstance(before, ListConfig)
        and key not in _LISTS
    )
    if key in _CHOICES and value not in _CHOICES[key]:
        raise UserError(f"{key}={value} is not one of {', '.join(_CHOICES[key])}")
    for v in value if grid else [value]:
        if isinstance(before, str):
            continue
        if isinstance(v, float) and not math.isfinite(v):
            raise UserError(f"{key}={v} must be a finite number")
        if (
            before is None
            and isinstance(v, (str, bool))
            and key.startswith(_NUMBERS)
            and key not in _LISTS
        ):
            raise UserError(f"{key}={v} must be a number, or null")
        if (
            key.startswith("metric.")
            and isinstance(v, int)
            and v < 1
            and (before is None or (isinstance(before, int) and before > 0))
        ):
            raise UserError(f"{key}={v} must be at least 1")
        if key in ("threads", "time_limit_s") and v is not None and not v > 0:
            raise UserError(f"{key}={v} must be positive, or null")
        if v is None or before is None or (key in _FRACTIONS and isinstance(v, float)):
            continue
        kinds, words = next(
            (allowed, words) for kind, allowed, words in _KINDS if isinstance(before, kind)
        )
        if not isinstance(v, kinds) or (isinstance(v, bool) and not isinstance(before, bool)):
            now = (
                OmegaConf.to_container(before)
                if isinstance(before, (ListConfig, DictConfig))
                else before
            )
            raise UserError(f"{key}={v} must be {words} (now {now})")


def first_line(error: BaseException | None) -> str:
    """The first line with something in it, of the error or of what caused it."""
    while error is not None:
        for line in str(error).splitlines():
            if line.strip():
                return line.strip()
        kind, error = type(error).__name__, error.__cause__ or error.__context__
    return kind


#: What Hydra, OmegaConf and PyYAML raise for a file or a value they cannot read.
CONFIGURATION_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError)


def configuration_error(error: Exception) -> str:
    """One line of such an error; for a YAML file that is none, its name, the line and what stands there."""
    mark = getattr(error, "problem_mark", None)
    if isinstance(error, yaml.YAMLError) and mark is not None:
        return f"{mark.name} is not valid YAML in line {mark.line + 1}, column {mark.column + 1}: {getattr(error, 'problem', None) or 'unexpected text'}"
    return first_line(error)


@contextmanager
def configuring() -> Iterator[None]:
    """Within the context nothing is computed yet, so whatever goes wrong is a mistake in a file or on the command line: one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        told = configuration_error(error)
        kind = (
            ""
            if isinstance(error, CONFIGURATION_ERRORS)
            else f"the configuration cannot be used: {type(error).__name__}: "
        )
        raise UserError(f"{kind}{told}") from error


def build(node: DictConfig) -> Any:
    """Instantiate a node; whatever its constructors object to becomes a one-line error."""
    try:
        return instantiate(node, _convert_="all")
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None and not isinstance(cause, UserError):
            cause = cause.__cause__
        if isinstance(cause, UserError):
            raise cause from None
        raise UserError(f"the configuration cannot be built: {first_line(cause)}") from error

"""The configuration of one run, composed by Hydra from plans, presets and overrides.

Hydra and OmegaConf stay in this folder, `sweeps` and `cli`: nothing below sees a DictConfig.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sae_experiments.config.axes import HOST, hosts_of, split_by_sae, split_grid
from sae_experiments.config.checks import (
    as_dict,
    as_list,
    check_groups,
    check_key,
    check_keys,
    check_l0,
    check_texts,
    is_group,
    last_value,
    line_of,
    listed,
    options,
    parse,
    refuse_sweeps,
)
from sae_experiments.config.plans import preset_file
from sae_experiments.config.sites import per_site
from sae_experiments.config.typed import did_you_mean, key_of, value_of
from sae_experiments.errors import UserError, first_line
from sae_experiments.flatten import flatten


@dataclass
class _Chosen:
    """One name in `sae=[...]` with its overrides."""

    name: str
    """Name of the SAE."""
    base: DictConfig
    """The configuration with this SAE and nothing else changed."""
    hosts: list[str]
    """Choices of the SAE that it wraps."""
    own: list[Override] = field(default_factory=list)
    """Overrides that were given as `sae.<name>.<key>=value`."""

    def variants(self, common: Sequence[Override]) -> Iterator[tuple[str, list[str]]]:
        """Label and overrides of each SAE of the grid.

        Args:
            common: Overrides for all SAEs of the run.
        """
        replaced = {"sae", HOST, *(o.key_or_group for o in self.own)}
        shared = [o for o in common if o.key_or_group not in replaced]
        grid, plain = split_grid([*shared, *self.own], self.base)
        axes = [[(key, value) for value in values] for key, values in grid.items()]
        for host in self.hosts or [None]:
            common_to_host = [*plain, f"sae={self.name}", *([host] if host else [])]
            for values in itertools.product(*axes):
                own = [f"{key}={value}" for key, value in values]
                yield self._label(host, values), [*common_to_host, *own]

    def _label(self, host: str | None, values: Sequence[tuple[str, str]]) -> str:
        parts = [self.name]
        if host and len(self.hosts) > 1:
            parts.append(host.rsplit("=", 1)[1])
        parts += [f"{key.rsplit('.', 1)[1]}_{value}" for key, value in values]
        return re.sub(r"[^A-Za-z0-9_.-]", "_", "-".join(parts))


def compose_checked(conf: Path, overrides: Sequence[str]) -> tuple[DictConfig, str]:
    """Compose and check the configuration of one run, with `saes` filled in.

    `sae=[a,b]`, and a list for a key `sae.*` that takes a single value, span a grid of SAEs that
    are all fitted in one run. `sae.<name>.<key>` is for the SAE `<name>` of the list alone.

    Args:
        conf: Folder of the YAML files, an absolute path.
        overrides: `key=value` in Hydra's grammar.

    Returns:
        The configuration, and a label made of the names of its SAEs.

    Raises:
        UserError: The configuration is invalid; the message is one line.
    """
    parsed = parse([_every_metric(conf) if o == "metric=all" else o for o in overrides])
    refuse_sweeps(parsed)
    check_groups(conf, parsed)
    _check_preset(conf, parsed)
    common, own = split_by_sae(conf, parsed, names := _names(conf, parsed))
    with _hydra_at(conf):
        chosen = _choose(conf, common, names)
        bases = [each.base for each in chosen]
        common = _listed(common, bases)
        check_keys(common, bases)
        runs: dict[str, DictConfig] = {}
        for each in chosen:
            each.own = _listed(own.get(each.name, []), [each.base])
            check_keys(each.own, [each.base])
            for label, complete in each.variants(common):
                runs[label] = _compose(complete)
                check_l0(runs[label], complete)
    saes = {label: as_dict(run.sae) for label, run in runs.items()}
    cfg = list(runs.values())[-1]  # they differ in nothing but the SAE
    check_texts(cfg)
    OmegaConf.set_struct(cfg, False)
    plain = as_dict(cfg)
    cfg.saes = per_site(saes, plain["site"], plain["lm"])
    return cfg, ", ".join(saes)


def _listed(overrides: Sequence[Override], bases: Sequence[DictConfig]) -> list[Override]:
    """The overrides, with single numbers as lists where any base has a list of numbers."""
    changed = list(overrides)
    for base in bases:
        changed = [listed(o, OmegaConf.select(base, o.key_or_group)) for o in changed]
    return changed


def _check_preset(conf: Path, parsed: Sequence[Override]) -> None:
    """Check that a preset is used as its file says: `for_study` and `fixed`.

    Raises:
        UserError: The study is another one, or a key was given that the preset fixes.
    """
    preset = str(last_value(parsed, "preset", ""))
    says = preset_file(conf, preset)
    study = says.get("for_study")
    if study is not None and last_value(parsed, "study", "language") != study:
        raise UserError(f"preset={preset} is for study={study} alone: add study={study}")
    for o in parsed:
        for key in says.get("fixed", ()):
            if f"{o.key_or_group}.".startswith(f"{key}."):
                raise UserError(
                    f"{o.input_line} cannot be given with preset={preset}, which fixes {key}: "
                    "leave it out"
                )


def _every_metric(conf: Path) -> str:
    return f"metric=[{','.join(options(conf, 'metric'))}]"


def _names(conf: Path, parsed: Sequence[Override]) -> list[str]:
    """Names of the SAEs that were asked for; none means the study's own."""
    names = as_list(last_value(parsed, "sae", []))
    if not names and any(o.key_or_group == "sae" for o in parsed):
        raise UserError(f"sae=[] names no SAE: choose from {', '.join(options(conf, 'sae'))}")
    return [str(name) for name in names]


def _choose(conf: Path, common: Sequence[Override], names: Sequence[str]) -> list[_Chosen]:
    groups = [
        line_of(o) for o in common if is_group(conf, o.key_or_group) and o.key_or_group != "sae"
    ]
    names = names or [_default_sae(groups)]
    plain = {name: _compose([*groups, f"sae={name}"]) for name in names}
    hosts = hosts_of(conf, common, plain)
    return [
        _Chosen(name, _compose([*groups, f"sae={name}", *hosts[name][:1]]), hosts[name])
        for name in names
    ]


def _default_sae(groups: Sequence[str]) -> str:
    """The SAE of the defaults list, or the one with which the chosen study replaces it."""
    try:
        cfg = compose("config", list(groups), return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(first_line(error)) from error
    return cfg.hydra.runtime.choices["sae"]


@contextmanager
def _hydra_at(conf: Path) -> Iterator[None]:
    """Initialise Hydra's compose API for `conf`.

    A job of a multirun has an initialised Hydra of its own, which is put back at the end.
    """
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf), version_base="1.3"):
            yield
    finally:
        GlobalHydra.instance().hydra = outer


def _compose(overrides: Sequence[str]) -> DictConfig:
    try:
        cfg = compose("config", list(overrides))
        OmegaConf.to_container(cfg, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(first_line(error)) from error
    return cfg


def options_of(conf: Path, group: str, overrides: Sequence[str]) -> DictConfig:
    """Read `conf/<group>/<name>.yaml` on its own and apply the overrides `group.key=value`.

    Args:
        conf: Folder of the YAML files.
        group: Name of the group.
        overrides: Must contain `group=name`; overrides of other groups are ignored.

    Raises:
        UserError: The name or a key does not exist, or a value has the wrong type.
    """
    names = [value_of(o) for o in overrides if key_of(o) == group]
    known = options(conf, group)
    if not names or names[-1] not in known:
        raise UserError(
            f"{group}={names[-1] if names else ''} does not exist: "
            f"choose from {', '.join(known)}{did_you_mean(str(names[-1:]), known)}"
        )
    cfg = DictConfig(OmegaConf.load(conf / group / f"{names[-1]}.yaml"))
    keys = flatten({group: OmegaConf.to_container(cfg)}, branches=True)
    for o in parse([o for o in overrides if key_of(o).startswith(f"{group}.")]):
        key = o.key_or_group.split(".", 1)[1]
        before = OmegaConf.select(cfg, key)
        o = listed(o, before)
        check_key(o, keys, before, where=f"see conf/{group}")
        OmegaConf.update(cfg, key, o.value())
    return cfg


def build(node: DictConfig) -> Any:
    """Instantiate a node of the configuration; errors of constructors become `UserError`."""
    try:
        return instantiate(node, _convert_="all")
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None and not isinstance(cause, UserError):
            cause = cause.__cause__
        if isinstance(cause, UserError):
            raise cause from None
        raise UserError(f"the configuration cannot be built: {first_line(cause)}") from error

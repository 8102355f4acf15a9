"""SAEs and metrics that a script defines itself, chosen like those of `conf/`.

`SAES = {"mine": Mine}` in the script makes `sae=mine` a choice: it starts from the YAML file of the
nearest base class that has one. `METRICS = {"spread": spread}` is measured in every run, unless
`metric=` says otherwise.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import yaml
from hydra.core.config_store import ConfigStore

from sae_experiments.config.typed import by_key, value_of
from sae_experiments.errors import UserError
from sae_experiments.source import INSTALLED

BASE = "sae_experiments.saes.base.SAE"
BETTER = ("up", "down", "none", "target")
GUARD = 'keep `if __name__ == "__main__":` around the call of main: the script is imported as well'
#: Arguments that the frame gives to every SAE, and the L0 under the names that variants use.
OF_THE_FRAME = ("self", "d_in", "d_sae", "d_out")
L0_NAMES = ("k", "target_l0")


class _Registry:
    """Definitions of the script of this process."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.script: Path | None = None
        self.comments: dict[str, dict[str, str]] = {"sae": {}, "metric": {}}
        self.loading = self.again = False


_known = _Registry()


class Argument(NamedTuple):
    """An argument of a constructor or of a metric."""

    name: str
    default: Any


def names(group: str) -> list[str]:
    """Names that the script adds to a group of the configuration."""
    return sorted(_known.comments.get(group, {}))


def comment(group: str, name: str) -> str:
    """The first line of the docstring of an SAE or a metric of the script."""
    return _known.comments[group][name]


def script() -> Path | None:
    """The script that was registered."""
    return _known.script


def register(path: str | Path | None, conf: Path) -> None:
    """Load a script as a module that workers can import, and register its SAEs and metrics.

    Args:
        path: The script; None if there is none.
        conf: Folder of the YAML files.

    Raises:
        UserError: The script cannot be loaded, or an entry of `SAES` or `METRICS` cannot be used.
    """
    if _known.loading:
        _known.again = True
        raise UserError(GUARD)
    _known.clear()
    if path is None:
        return
    _known.script = Path(path).resolve()
    module = _loaded(_known.script)
    for name, sae in _entries(module, "SAES"):
        _add("sae", name, sae, conf, _sae_node(name, sae, conf))
    for name, value in _entries(module, "METRICS"):
        metric, better = value if isinstance(value, tuple) and len(value) == 2 else (value, "none")
        _add("metric", name, metric, conf, _metric_node(name, metric, better))


def _loaded(path: Path) -> ModuleType:
    name = path.stem
    if not name.isidentifier() or name in sys.stdlib_module_names or name in INSTALLED:
        raise UserError(f"{path.name} cannot be imported by that name: call it experiment.py")
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is not Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    _known.loading = True
    try:
        spec.loader.exec_module(module)
    finally:
        _known.loading = False
    if _known.again:
        raise UserError(GUARD)
    return module


def _entries(module: ModuleType, key: str) -> Iterator[tuple[str, Any]]:
    entries = getattr(module, key, {})
    if not isinstance(entries, Mapping):
        raise UserError(f"{key} must be a dictionary like {{'mine': Mine}}")
    for name, value in entries.items():
        if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise UserError(f"{key}: {name!r} must be a name of lower-case letters, digits and _")
        yield name, value


def _add(group: str, name: str, value: Any, conf: Path, node: dict[str, Any]) -> None:
    if (conf / group / f"{name}.yaml").exists():
        raise UserError(f"{name} exists in conf/{group}: give yours another name")
    package = f"metric.{name}" if group == "metric" else None
    ConfigStore.instance().store(group=group, name=name, node=node, package=package)
    lines = (inspect.getdoc(value) or "").splitlines()
    _known.comments[group][name] = lines[0] if lines else f"{name}, of this script."


def _target(key: str, name: str, value: Any) -> str:
    """The full name by which another process finds a class or a function."""
    full = f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}"
    home: Any = sys.modules.get(getattr(value, "__module__", ""))
    if getattr(home, getattr(value, "__qualname__", ""), None) is not value:
        raise UserError(f"{key}: {name} must be defined at the top level of a file, with a name")
    return full


def _sae_node(name: str, sae: Any, conf: Path) -> dict[str, Any]:
    """The configuration of an SAE, as its YAML file would have it."""
    if not isinstance(sae, type) or BASE not in map(_full_name, sae.__mro__):
        raise UserError(f"SAES: {name} must be a class that extends an SAE, such as BatchTopK")
    home, settings = _nearest_file(sae, conf)
    model: dict[str, Any] = {"_target_": _target("SAES", name, sae), "_partial_": True}
    for argument in _arguments(sae, up_to_base=home == "_base"):
        if argument.name in settings:
            continue
        if argument.name in L0_NAMES:
            model[argument.name] = "${sae.target_l0}"
        elif argument.default is inspect.Parameter.empty:
            raise UserError(f"SAES: {name} needs a default value of its argument {argument.name}")
        elif _is_plain(argument.default):
            model[argument.name] = argument.default
    return {"defaults": [home, "_self_"], "model": model}


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _nearest_file(sae: type, conf: Path) -> tuple[str, dict[str, Any]]:
    """Name and model settings of the YAML file of the nearest class that has one."""
    files = {
        path.stem: yaml.safe_load(path.read_text(encoding="utf-8")).get("model", {})
        for path in sorted((conf / "sae").glob("[!_]*.yaml"))
    }
    for cls in sae.__mro__:
        matching = [n for n, model in files.items() if model.get("_target_") == _full_name(cls)]
        if matching:
            home = min(matching, key=lambda n: (n != cls.__module__.rpartition(".")[2], len(n)))
            return home, files[home]
    return "_base", {}


def _arguments(sae: type, *, up_to_base: bool) -> list[Argument]:
    """Arguments of a constructor and of those to which it hands further keywords."""
    arguments: dict[str, Argument] = {}
    for cls in sae.__mro__:
        if "__init__" not in vars(cls) or (_full_name(cls) == BASE and not up_to_base):
            continue
        parameters = inspect.signature(cls.__init__).parameters.values()
        for p in parameters:
            if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in OF_THE_FRAME:
                arguments.setdefault(p.name, Argument(p.name, p.default))
        if _full_name(cls) == BASE or all(p.kind is not p.VAR_KEYWORD for p in parameters):
            break
    return list(arguments.values())


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return isinstance(value, (int, float, str, bool, type(None)))


def _metric_node(name: str, metric: Any, better: Any) -> dict[str, Any]:
    """The configuration of a metric; its arguments with defaults are settings."""
    if not callable(metric) or isinstance(metric, type) or better not in BETTER:
        raise UserError(
            f"METRICS: {name} must be a function of the evaluation context, alone or as "
            f"(function, better) with better one of {', '.join(BETTER)}"
        )
    parameters = list(inspect.signature(metric).parameters.values())[1:]
    settings = {p.name: p.default for p in parameters if _is_plain(p.default)}
    function = {"_target_": _target("METRICS", name, metric), "_partial_": True, **settings}
    return {
        "_target_": "sae_experiments.metrics.own.Own",
        "name": name,
        "better": better,
        "function": function,
    }


def measured_too(conf: Path, overrides: Sequence[str]) -> list[str]:
    """Overrides that add the script's metrics to those of a run; none if `metric=` was given.

    Args:
        conf: Folder of the YAML files.
        overrides: The overrides of the run.

    Raises:
        UserError: The study measures no metrics but its own.
    """
    given = by_key(overrides)
    if not names("metric") or "metric" in given:
        return []
    chosen = value_of(given["study"]) if "study" in given else "language"
    path = conf / "study" / f"{chosen}.yaml"
    if not path.exists():  # refused elsewhere
        return []
    text = path.read_text(encoding="utf-8")
    if re.search(r"^\s+metrics: \$\{metric\}", text, re.M):
        return [f"+metric@metric.{name}={name}" for name in names("metric")]
    if re.search(r"^  metrics:", text, re.M):
        return [f"+metric@study.metrics.{name}={name}" for name in names("metric")]
    mine = ", ".join(names("metric"))
    raise UserError(
        f"METRICS: {mine} cannot be measured with study={chosen}: choose another study, or set "
        "METRICS = {}"
    )

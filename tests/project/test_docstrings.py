"""Everything public has a docstring, its own or that of the method it overrides."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator

import sae_experiments
from sae_experiments.studies.base import Study

MODULES = [
    module.name
    for module in pkgutil.walk_packages(sae_experiments.__path__, "sae_experiments.")
    if not module.name.endswith("__main__")
]
#: Openings that announce a description instead of giving it.
ANNOUNCED = re.compile(r"(What|How|Where|Whether|When|Why)\b")


def public(module_name: str) -> Iterator[tuple[str, str]]:
    """Name and docstring of every public function, class and method that a module defines."""
    module = importlib.import_module(module_name)
    for name, thing in vars(module).items():
        if name.startswith("_") or getattr(thing, "__module__", None) != module_name:
            continue
        if inspect.isfunction(thing) or inspect.isclass(thing):
            yield name, inspect.getdoc(thing) or ""
        if not inspect.isclass(thing):
            continue
        for method, value in vars(thing).items():
            if method.startswith("_") or not is_method(value) or of_study(thing, method):
                continue
            yield f"{name}.{method}", inspect.getdoc(getattr(thing, method)) or ""


def is_method(value: object) -> bool:
    """True for a method or property; a function that is the default of a field is none."""
    is_field = getattr(value, "__name__", "") == "<lambda>"
    return isinstance(value, property) or (inspect.isroutine(value) and not is_field)


def of_study(cls: type, method: str) -> bool:
    """True for a method of a study, which the protocol of studies describes."""
    return hasattr(cls, "infos") and bool(inspect.getdoc(getattr(Study, method, None)))


def test_everything_public_says_what_it_is() -> None:
    docs = {f"{module}.{name}": text for module in MODULES for name, text in public(module)}
    assert len(docs) > 1500
    assert [name for name, text in docs.items() if not text] == []
    assert [name for name, text in docs.items() if ANNOUNCED.match(text)] == []

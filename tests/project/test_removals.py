"""The rule that our own calls of what will be removed are errors in these tests."""

from __future__ import annotations

import sys
import types
import warnings
from typing import Any

import pytest
import torch


def library(name: str, source: str) -> Any:
    """A module of that name, made of ``source``."""
    module = types.ModuleType(name)
    exec(compile(source, f"/site-packages/{name}.py", "exec"), module.__dict__)
    sys.modules[name] = module
    return module


SOURCE = (
    "import warnings, functools\n\ndef old(kind):\n    warnings.warn('old will be removed', kind,"
    " stacklevel=2)\n"
)


@pytest.fixture
def old(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(sys.modules, "some_library", types.ModuleType("some_library"))
    return library("some_library", SOURCE).old


@pytest.mark.parametrize("kind", [DeprecationWarning, PendingDeprecationWarning, FutureWarning])
def test_a_call_of_ours_is_an_error(old, kind):
    with pytest.raises(kind, match="will be removed"):
        old(kind)


def test_a_call_of_ours_through_a_module_of_torch_is_an_error(old):
    """The name of the caller that the warning itself carries is torch's there."""

    class Old(torch.nn.Module):
        forward = staticmethod(lambda: old(FutureWarning))

    with pytest.raises(FutureWarning):
        Old()()


def test_what_one_library_calls_of_another_is_not(old, monkeypatch):
    monkeypatch.setitem(sys.modules, "other_library", types.ModuleType("other_library"))
    other = library("other_library", "def call(old, kind):\n    old(kind)\n")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        other.call(old, FutureWarning)
    assert [str(w.message) for w in told] == ["old will be removed"]
    assert told[0].filename.endswith("other_library.py"), "it says who called, as ever"


def test_other_warnings_of_ours_are_no_errors():
    with pytest.warns(UserWarning, match="look"):
        warnings.warn("look", stacklevel=1)

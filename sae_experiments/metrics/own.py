"""A metric that the user's script defines (`METRICS` in experiment.py)."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from sae_experiments.errors import UserError
from sae_experiments.files import digest
from sae_experiments.metric_info import Better, MetricInfo, SelfDescribed
from sae_experiments.metrics.base import EvalContext, Measured


@dataclass(frozen=True, kw_only=True)
class Own(SelfDescribed):
    """A function of the evaluation context that returns one number, or None if it is undefined."""

    name: str
    """Name of the metric in `final_info.json`."""
    function: Callable[..., Any]
    """Returns the number."""
    better: Better
    """Direction of improvement."""

    def __call__(self, context: EvalContext) -> Measured:
        with torch.no_grad():
            value = self.function(context)
        if value is None:
            return Measured({self.name: None}, why_null={self.name: "the metric returned None"})
        try:
            return Measured({self.name: float(value)})
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"METRICS: {self.name} returned {type(value).__name__}, which is no single number: "
                "return a float, or None where it is undefined"
            ) from error

    @property
    def infos(self) -> list[MetricInfo]:
        """The description: the first line of the function's docstring is its formula."""
        plain = self._plain()
        formula = (inspect.getdoc(plain) or plain.__name__).splitlines()[0]
        title = self.name.replace("_", " ")
        return [MetricInfo(name=self.name, title=title, formula=formula, better=self.better)]

    @property
    def settings(self) -> dict[str, Any]:
        """Conditions that two values must share: the function's settings and its code."""
        given = self.function.keywords if isinstance(self.function, functools.partial) else {}
        return {**given, "code": _code(self._plain())}

    def _plain(self) -> Callable[..., Any]:
        own = self.function
        return own.func if isinstance(own, functools.partial) else own


def _code(function: Callable[..., Any]) -> str:
    """A digest of a function's code without comments; "" if its source cannot be read."""
    try:
        return digest(ast.dump(ast.parse(textwrap.dedent(inspect.getsource(function)))))
    except (OSError, TypeError, SyntaxError):
        return ""

"""Numbers as text: values with their standard errors, differences, verdicts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def missing(value: Any) -> bool:
    """True for None and NaN."""
    return value is None or math.isnan(value)


def plain(value: float, digits: int, sign: str = "") -> str:
    """Format a value with this many significant digits, and at least those before the point."""
    whole = abs(value) >= 10**digits - 0.5
    return f"{value:{sign},.0f}" if whole else f"{value:{sign}.{digits}g}"


def with_error(value: float, error: float | None, sign: str = "") -> str:
    """Format a value to the second digit of its error, or to four digits without an error."""
    if error is None or missing(error):
        return plain(value, 4, sign)
    digits = 1 - math.floor(math.log10(error)) if error else 4
    if digits > 7 or abs(value) >= 1e9:
        return f"{value:{sign}.3g} ± {error:.1g}"
    digits = max(digits, 0)
    return f"{value:{sign},.{digits}f} ± {error:,.{digits}f}"


def short(value: float, error: float | None, sign: str = "") -> tuple[str, str]:
    """A value with as many digits as its error allows, at most four, and the error by itself."""
    if error is None or missing(error) or error == 0:
        return plain(value, 3, sign), ""
    digits = min(max(1 - math.floor(math.log10(error)), 0), 4)
    shown = f"{error:,.{digits}f}"
    return f"{value:{sign},.{digits}f}", shown if float(shown.replace(",", "")) else f"{error:.0e}"


def value_text(row: Mapping[str, Any]) -> str:
    """`0.281 ± 0.003 (n=3)`, or why there is no value."""
    if missing(row["mean"]):
        return f"null ({row['why_null']})" if row["why_null"] else "null"
    return with_error(row["mean"], row["stderr"]) + (f" (n={row['n']})" if row["n"] else "")


def delta_text(row: Mapping[str, Any]) -> str:
    """`-0.031 ± 0.005`; empty if nothing was subtracted."""
    if row["delta"] == 0 and (missing(row["delta_stderr"]) or not row["delta_stderr"]):
        return "0"
    if missing(row["delta"]):
        return ""
    return with_error(row["delta"], row["delta_stderr"], sign="+")

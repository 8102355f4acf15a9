"""Warnings about results that are worse than they look.

A warning never changes a number. It stands in the log, in `cells/*.json`, in the report and under
the closing table.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

OFF_TARGET = 0.05  # of an L0, relative
SHORT = 0.01  # share of the rows asked for that may be missing: windows are whole
UNSEEN = 0.01  # share of the latents that may be alive and unseen
GAP = 0.01  # of the effect of removing everything, that integrated gradients may miss
FIRINGS = 10  # of an average latent, with fewer of which nothing can be called dead
DYING = 0.10  # share of the latents that may be silent at once while an SAE is fitted
OUTLYING = 0.01  # share of the variance that outlier rows may hold unmentioned
CLIMB = 0.20  # of the lowest error of a fit: how far the error may climb above it
LOOKS = 200  # points of a training curve that are compared, at most about
SMOOTH = 5  # points of a training curve that are judged together, by their median
MORE_ACTIVE = 1.05  # times as many active latents are more: a lower error is then no feat


class Warned(NamedTuple):
    """One warning."""

    key: str  # the metric or setting that it is about
    value: float
    says: str  # what is wrong, with its numbers
    do: str  # what to change


def of_metrics(metrics: Mapping[str, float | None], fixed_l0: float | None) -> list[Warned]:
    """Warnings about a reconstruction worse than the mean and an L0 off its target.

    Args:
        metrics: Values by name.
        fixed_l0: Requested active latents per row; None if there is no such target.
    """
    # A number that is not finite is null in the record, with its reason.
    metrics = {k: v for k, v in metrics.items() if v is not None and math.isfinite(v)}
    warnings = []
    fvu, explained, l0 = (metrics.get(n) for n in ("sae_fvu", "explained_variance", "sae_l0"))
    worse = "the SAE rebuilds its rows worse than their mean would"
    do = "train longer or at another rate (fit.train.steps, fit.train.lr), and look at its curves"
    name = "sae_fvu"
    if metrics.get("sae_outlier_frac") and metrics.get("sae_fvu_ordinary") is not None:
        # Outliers hold most of the variance, and the fit has left them out.
        name, fvu = "sae_fvu_ordinary", metrics["sae_fvu_ordinary"]
    if fvu is not None and fvu > 1:
        warnings.append(Warned(name, fvu, f"{name} is {fvu:.4g}: {worse}", do))
    if explained is not None and explained < 0:
        says = f"explained_variance is {explained:.4g}: {worse}"
        warnings.append(Warned("explained_variance", explained, says, do))
    if l0 is not None and fixed_l0 and abs(l0 / fixed_l0 - 1) > OFF_TARGET:
        side = "above" if l0 > fixed_l0 else "below"
        off = f"{abs(l0 / fixed_l0 - 1):.0%} {side}"
        says = f"sae_l0 is {l0:.4g}, {off} the {fixed_l0:.4g} asked for"
        do = "train longer (fit.train.steps), or compare at the L0 that was reached"
        warnings.append(Warned("sae_l0", l0, says, do))
    return warnings


def of_fit(
    points: Iterable[tuple[int, str, float]],
    *,
    lr: float,
    warmup_steps: int,
    firings: float,
    judge_error: bool = True,
) -> list[Warned]:
    """Warnings about many latents that died, or an error that climbed, while an SAE was fitted.

    The error is the FVU, as the median of `SMOOTH` points of its curve. An earlier error counts
    only if it was reached with no more active latents, since an SAE whose L0 is steered down to
    its target must lose reconstruction on the way.

    Args:
        points: Curves of the fit as (step, name, value); `fvu`, `l0` and `dead_frac` are read.
        lr: The peak learning rate, for the message.
        warmup_steps: Steps of warm-up, whose points are ignored.
        firings: Expected firings of an average latent within the rows of silence after which it
            counts as dead.
        judge_error: Whether the SAE is trained to lower the FVU, so that its curve is checked too.
    """
    curves: dict[str, list[tuple[int, float]]] = {"fvu": [], "l0": [], "dead_frac": []}
    for step, name, value in points:
        if name in curves and step >= warmup_steps:
            curves[name].append((step, value))
    warnings = _died(curves["dead_frac"], lr) if firings >= FIRINGS else []
    return warnings + (_climbed(curves["fvu"], curves["l0"], lr) if judge_error else [])


def of_back_off(lr: float, factor: float) -> list[Warned]:
    """Warning about a default learning rate that was too high and was lowered during the fit.

    Args:
        lr: The peak learning rate.
        factor: Factor of the rate at the end of the fit.
    """
    if not factor < 1:
        return []
    lower = lr * factor
    says = f"the default learning rate {lr:.3g} was too high: the fit stepped back to {lower:.2g}"
    do = f"fit again from the start with the lower rate (lr={lower:.2g})"
    return [Warned("fit_lr", factor, says, do)]


def of_outliers(*, rows: int, outliers: int, variance_frac: float, handling: str) -> list[Warned]:
    """Warning about outlier rows, a few of which hold much of the variance.

    Args:
        rows: Rows looked at.
        outliers: Outliers among them.
        variance_frac: Their share of the variance.
        handling: `leave_out` or `keep`, as in `fit.outliers`.
    """
    if not variance_frac > OUTLYING:
        return []
    says = (
        f"{outliers:,} of {rows:,} rows ({outliers / rows:.2%}) are outliers with "
        f"{variance_frac:.0%} of the variance; the SAE was fitted "
        f"{'without' if handling == 'leave_out' else 'with'} such rows"
    )
    do = "judge it by sae_fvu_ordinary, not by sae_fvu"
    if handling == "keep":
        do += ", and leave them out of the fit (outliers=leave_out)"
    return [Warned("fit_outliers", outliers / rows, says, do)]


def of_splice(untouched: int, rows: int) -> list[Warned]:
    """Warning about outlier rows that a splice into the language model leaves as they are.

    Args:
        untouched: Number of outlier rows.
        rows: Rows of the spliced windows.
    """
    if not untouched:
        return []
    says = (
        f"{untouched:,} of {rows:,} spliced rows are outliers, which the SAE was not fitted to: "
        "they stay as they are"
    )
    do = "read the loss as that of the other rows, or fit them too (fit.outliers=keep)"
    return [Warned("ce_spliced", untouched / rows, says, do)]


def _lower_rate(lr: float) -> str:
    return (
        f"use a lower learning rate (lr={lr:.3g} was used; try {lr / 2:.2g}), or train longer, "
        "and look at the curves of the fit"
    )


def _died(dead: Sequence[tuple[int, float]], lr: float) -> list[Warned]:
    """The check with the most dead latents, if these are many."""
    step, most = max(dead, key=lambda point: point[1], default=(0, 0.0))
    if not most > DYING:
        return []
    says = f"{most:.0%} of the latents were dead at step {step} of the fit"
    if dead[-1][1] < most:
        says += f", and {dead[-1][1]:.0%} at its end"
    return [Warned("fit_dead_frac", most, says, _lower_rate(lr))]


def _climbed(
    fvu: Sequence[tuple[int, float]], l0: Sequence[tuple[int, float]], lr: float
) -> list[Warned]:
    """The largest climb of the error above an earlier one that needed no more active latents."""
    ends = range(SMOOTH, len(fvu) + 1, max(1, len(fvu) // LOOKS))
    looks = [(fvu[end - SMOOTH // 2 - 1][0], _median(fvu, end), _median(l0, end)) for end in ends]
    pairs = [
        (error / max(lowest, 1e-12), start, lowest, step, error)
        for (start, lowest, few), (step, error, n) in combinations(looks, 2)
        if few <= MORE_ACTIVE * n
    ]
    climb, start, lowest, step, error = max(pairs, default=(0.0,) * 5)
    if not climb > 1 + CLIMB:
        return []
    says = (
        f"the error (FVU) of the fit climbed from {lowest:.3g} at step {start} "
        f"to {error:.3g} at step {step}"
    )
    return [Warned("fit_fvu", climb, says, _lower_rate(lr))]


def _median(curve: Sequence[tuple[int, float]], end: int) -> float:
    """The median of the `SMOOTH` values before index `end`."""
    return statistics.median(value for _, value in curve[end - SMOOTH : end])


def of_text(provenance: Mapping[str, Any]) -> list[Warned]:
    """Warning about symbols of the text that the language model does not have."""
    dropped = provenance.get("dropped_frac")
    if not isinstance(dropped, (int, float)) or not dropped > 0:
        return []
    says = f"{dropped:.2%} of the text was dropped or unknown: "
    says += "the language model has no symbols for it"
    return [Warned("dropped_frac", dropped, says, "use a text in the model's own symbols")]


def of_rows(key: str, rows: int, asked: int) -> list[Warned]:
    """Warning about fewer rows than a setting asks for.

    Args:
        key: The setting, for example `fit.held_out_rows`.
        rows: Available rows.
        asked: Requested rows.
    """
    if rows >= (1 - SHORT) * asked:
        return []
    says = f"{key}: {rows:,} rows instead of the {asked:,} asked for, which is all the text has"
    return [Warned(key, rows, says, f"use a longer text, or ask for at most {rows:,}")]


def of_dead(rows: int, l0: float, d_sae: int, once: int, twice: int) -> list[Warned]:
    """Warning about a fraction of dead latents from too few rows to tell dead from rare ones.

    The number of latents that are alive and did not fire is estimated after Chao (1984) as
    `once (once - 1) / (2 (twice + 1))`.

    Args:
        rows: Held-out rows evaluated.
        l0: Mean number of active latents per row.
        d_sae: Number of latents.
        once: Latents that fired once.
        twice: Latents that fired twice.
    """
    unseen = min(once * (once - 1) / (2 * (twice + 1)), d_sae) / d_sae
    each = rows * l0 / d_sae
    do = "raise fit.held_out_rows (and metric.sparsity.rows)"
    if unseen > UNSEEN:
        why = f"an estimated {unseen:.0%} of the latents are alive and did not happen to fire"
    elif 0 < each < FIRINGS:
        why = f"a latent of average frequency fires {each:.1f} times in them"
    else:
        return []
    says = f"sae_dead_frac is from {rows:,} rows, too few: {why}"
    return [Warned("sae_dead_frac", rows, says, do)]


def of_gap(gap: float | None, jumps: str | None) -> list[Warned]:
    """Warning about integrated gradients that do not add up to the effect of removing everything.

    Args:
        gap: `integrated_gap`, relative; None if it was not measured.
        jumps: Variant of a downstream SAE whose pre-activations may jump; None for others.
    """
    if gap is None or not gap > GAP:
        return []
    says = f"integrated_gap is {gap:.2g}: "
    says += "integrated gradients miss that share of what removing everything does"
    if jumps is None:
        return [Warned("integrated_gap", gap, says, "raise study.checks.nodes")]
    why = f"{says}, since pre-activations of {jumps} jump "
    why += "where a latent of its first code goes on or off"
    return [
        Warned("integrated_gap", gap, why, "trust the removals, or choose another downstream SAE")
    ]


def checked(given: Any) -> list[dict[str, Any]]:
    """The well-formed warnings of a record; anything else that its file may hold is left out."""
    warnings = []
    for one in given if isinstance(given, Sequence) else ():
        one = one._asdict() if isinstance(one, Warned) else one
        if isinstance(one, Mapping) and all(
            isinstance(one.get(k), str) for k in ("key", "says", "do")
        ):
            warnings.append({k: one.get(k) for k in Warned._fields})
    return warnings


def lines(cells: Iterable[tuple[str, int, Sequence[Mapping[str, Any]]]]) -> list[str]:
    """One line per kind of warning: that of the first cell, and the number of other cells.

    Args:
        cells: Dataset, seed and warnings of each cell.
    """
    groups: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for dataset, seed, warnings in cells:
        for one in warnings:
            groups.setdefault(one["key"], []).append((f"{dataset} seed {seed}", one))
    shown = []
    for same in groups.values():
        where, first = same[0]
        others = len(same) - 1
        more = f" and {others} more cell{'s' * (others > 1)}" if others else ""
        shown.append(f"{where}{more}: {first['says']}; {first['do']}")
    return shown

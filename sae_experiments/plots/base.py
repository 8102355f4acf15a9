"""What all figures share: colours, sizes, panels, the caption that says what was drawn, and saving. Draws with Agg, without pyplot.

A figure is ``draw(table, **options) -> Figure`` in a file of its own and a YAML file in ``conf/plot``; it raises
:class:`NothingToDrawError` where no run has what it shows.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from sae_experiments.errors import UserError
from sae_experiments.files import write_bytes
from sae_experiments.results.table import Run, RunTable

# Okabe and Ito's palette (without the yellow, too pale on white), then Tol's: told apart with any colour vision; shapes differ as well.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#999933")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
Line = Literal["-", "--", "-.", ":"]
LINES: tuple[Line, ...] = ("-", "--", "-.", ":")
BASELINE_COLOUR = "#222222"
GREY = "#777777"
ALARM = "#B00020"  # stand-in text, dead latents
DPI = 150
BETTER = {"up": "higher is better", "down": "lower is better", "target": "has a target", "none": ""}
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8.5,
    "figure.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-4, 5),
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.5,
    "legend.frameon": False,
    "svg.hashsalt": "sae_experiments",  # the same figure, the same bytes
}
styled = mpl.rc_context(STYLE)  # a decorator for draw()


class NothingToDrawError(UserError):
    """No run holds what the figure shows."""


class Look(NamedTuple):
    """How a run is drawn in every figure."""

    color: str
    marker: str
    line: Line


def looks(table: RunTable) -> dict[str, Look]:
    """A look for each run by name; the baseline is black. Beyond eight runs, markers and line styles tell equal colours apart."""
    others = [run.name for run in table.runs if run is not table.baseline]
    found = {name: Look(PALETTE[i % 8], MARKERS[(i + i // 8) % 8], LINES[(i // 8) % 4]) for i, name in enumerate(others)}
    return found | ({table.baseline.name: Look(BASELINE_COLOUR, "*", "-")} if table.baseline else {})


def panels(rows: int, cols: int, *, width: float, height: float, **options: Any) -> tuple[Figure, np.ndarray]:
    """A figure of ``rows`` x ``cols`` panels of ``width`` x ``height`` inches, with room around them found by the layout engine."""
    fig = Figure(figsize=(max(cols * width, 4.2), rows * height + 1.2), dpi=DPI, layout="constrained")
    FigureCanvasAgg(fig)
    fig.get_layout_engine().set(w_pad=0.08, h_pad=0.06)  # pyright: ignore[reportOptionalMemberAccess, reportCallIssue]
    return fig, fig.subplots(rows, cols, squeeze=False, **options)


def finish(fig: Figure, title: str, caption: Sequence[str], handles: Sequence[Any] = ()) -> Figure:
    """Title above; legend right of the panels (the figure grows for it); caption below, wrapped to the width."""
    if handles:
        longest = max(len(str(handle.get_label())) for handle in handles)
        fig.set_figwidth(fig.get_figwidth() + 0.55 + 0.068 * longest)
        fig.set_figheight(max(fig.get_figheight(), 1.4 + 0.2 * len(handles)))
        fig.legend(handles=list(handles), loc="outside right upper")
    chars = int(fig.get_figwidth() * 17)
    lines = [line for text in caption for line in textwrap.wrap(text, chars)]
    fig.set_figheight(fig.get_figheight() + 0.13 * len(lines))
    fig.suptitle(title, x=0.01, ha="left", weight="bold")
    fig.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=7.5, color="#444444")
    return fig


def caption(table: RunTable, runs: Iterable[Run], datasets: Sequence[str], *, error: str = "") -> list[str]:
    """What was drawn: seeds, kind of error bar, presets, corpora, stand-in text, runs that are not finished."""
    runs = list(runs)
    counts = {sum(record.dataset == dataset for record in run.records) for run in runs for dataset in datasets if dataset in run.stats} - {0}
    many = f"{min(counts)} to {max(counts)}" if len(counts) > 1 else f"{max(counts, default=0)}"
    seeds = f"n = {many} seed{'s' * (max(counts) > 1)}" if counts else "seeds unknown"
    lines = [f"{seeds}{'; ' * bool(error)}{error}. {_grouped('Preset', {run.name: run.preset or 'unknown' for run in runs})}"]
    for dataset in datasets:
        corpora = {run.name: str(run.provenance(dataset).get("corpus") or "") for run in runs if dataset in run.stats}
        if set(corpora.values()) - {"", dataset}:
            lines[0] += f" {_grouped(f'{dataset}: corpus', {name: corpus or 'unknown' for name, corpus in corpora.items()})}"
    stand_ins = [dataset for dataset in datasets if any(run.stand_in(dataset) for run in runs)]
    if stand_ins:
        lines.append(f"STAND-IN TEXT, not the real corpus: {', '.join(stand_ins)}. Compare with no published number.")
    states = [f"{run.name} {run.status}" for run in runs if run.status not in ("", "done")]
    return lines + ([f"Not finished in good order: {', '.join(states)}."] if states else [])


def _grouped(what: str, by_run: dict[str, str]) -> str:
    """``Preset laptop; full for run_6.``: what most runs have, then the exceptions."""
    groups: dict[str, list[str]] = {}
    for name, value in by_run.items():
        groups.setdefault(value, []).append(name)
    first, *others = sorted(groups, key=lambda value: -len(groups[value]))
    return f"{what} {'; '.join([first, *(f'{value} for {short_list(groups[value])}' for value in others)])}."


def short_list(names: Sequence[str], most: int = 4) -> str:
    """``a, b, c, d and 4 more``."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def not_comparable(table: RunTable, runs: Iterable[Run], datasets: Sequence[str], metrics: Sequence[str]) -> list[str]:
    """The caption line for hollow markers: which runs must not be compared with the baseline, and why."""
    reasons: dict[str, dict[str, None]] = {}
    for run in runs:
        for dataset in datasets:
            for metric in metrics:
                if metric in run.stats.get(dataset, {}) and hollow(table, run, dataset, metric):
                    reasons.setdefault(table.why_not(run, dataset, metric), {})[run.name] = None
    texts = [f"{short_list(list(names))} ({why})" for why, names in reasons.items()]
    return [f"Hollow: not comparable with the baseline: {'; '.join(texts)}."] if texts else []


def hollow(table: RunTable, run: Run, dataset: str, *metrics: str) -> bool:
    """Whether a run's marker is drawn hollow: the baseline has this dataset too, but one of the metrics must not be compared with its own."""
    base = table.baseline
    return base is not None and run is not base and dataset in base.stats and any(table.why_not(run, dataset, metric) for metric in metrics)


def limit(items: Sequence[Any], most: int, what: str, notes: list[str]) -> list[Any]:
    """The first ``most`` items; what is left out is said in the caption."""
    if len(items) > most:
        notes.append(f"Only the first {most} of {len(items)} {what} are drawn.")
    return list(items[:most])


def head_panel(ax: Axes, runs: Iterable[Run], dataset: str) -> None:
    """Title of a dataset's panel; where a run drew on stand-in text it says so in red on a tinted panel."""
    having = [run for run in runs if dataset in run.stats]
    stand_in = [run.name for run in having if run.stand_in(dataset)]
    some = f" in {short_list(stand_in, 1)}" if len(stand_in) < len(having) else ""
    ax.set_title(f"{dataset}\nSTAND-IN TEXT{some}" if stand_in else dataset, color=ALARM if stand_in else "black", weight="bold", loc="left")
    tint(ax, bool(stand_in))


def tint(ax: Axes, stand_in: bool) -> None:
    """A reddish panel means stand-in text."""
    ax.set_facecolor("#FFF4F1" if stand_in else "white")


def percent(share: float) -> str:
    """A share in per cent, two significant digits and no more than one decimal."""
    value = 100 * share
    return "0 %" if value == 0 else "< 0.1 %" if 0 < value < 0.1 else f"{value:.1f} %" if value < 9.95 and round(value, 1) % 1 else f"{value:.0f} %"


def metric_label(table: RunTable, metric: str, *, direction: bool = True) -> str:
    """``title (unit)`` and, on a second line, which way is better."""
    info = table.info(metric)
    better = BETTER[info["better"]] if direction else ""
    return info["title"] + (f" ({info['unit']})" if info["unit"] else "") + (f"\n{better}" if better else "")


def handle(run: Run, look: Look, *, line: bool) -> Line2D:
    """The legend entry of a run."""
    kind: dict[str, Any] = {"linestyle": look.line, "marker": ""} if line else {"linestyle": "", "marker": look.marker}
    return Line2D([], [], color=look.color, markersize=9 if look.marker == "*" else 6, label=clip(run.title), **kind)


def clip(text: str, width: int = 38) -> str:
    """Long names lose their middle, where they differ least."""
    return text if len(text) <= width else f"{text[: width // 2]}…{text[-(width - width // 2 - 1) :]}"


def plain_log(ax: Axes, which: str, low: float, high: float, *, least: float = 4.0) -> None:
    """A logarithmic axis from ``low`` > 0 to ``high``, at least a factor ``least`` wide, with ticks such as 1, 2, 5 in plain numbers."""
    stretch = max((high / low) ** 0.07, (least * low / high) ** 0.5, 1.05)
    axis = ax.xaxis if which == "x" else ax.yaxis
    (ax.set_xscale if which == "x" else ax.set_yscale)("log")
    (ax.set_xlim if which == "x" else ax.set_ylim)(low / stretch, high * stretch)
    decades = np.log10(high * stretch) - np.log10(low / stretch)
    axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7) if decades < 1 else (1, 2, 5) if decades < 2.5 else (1,), numticks=99))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def bare(fig: Figure) -> tuple[str, str, bytes]:
    """Title, caption, and the figure without them as SVG, for pages that set them as text. The figure is changed: save it before."""
    title, below = fig.get_suptitle(), fig.get_supxlabel()
    n = len(below.splitlines())
    fig.suptitle("")
    fig.supxlabel("")
    fig.set_figheight(max(fig.get_figheight() - 0.13 * n - 0.35, 1.0))
    with mpl.rc_context(STYLE):
        buffer = io.BytesIO()
        fig.savefig(buffer, format="svg", dpi=DPI, metadata={"Date": None})
    return title, " ".join(below.split()), buffer.getvalue()


def save(fig: Figure, name: str, folder: Path) -> list[Path]:
    """Write ``<folder>/<name>.png`` and ``.svg``, whole or not at all, without a date in them."""
    found = []
    with mpl.rc_context(STYLE):
        for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            buffer = io.BytesIO()
            fig.savefig(buffer, format=kind, dpi=DPI, metadata=metadata)
            write_bytes(folder / f"{name}.{kind}", buffer.getvalue())
            found.append(folder / f"{name}.{kind}")
    return found

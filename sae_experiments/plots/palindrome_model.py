"""Palindrome: attention patterns of the transformer and the log-probabilities of the characters of some test strings."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sae_experiments.plots.base import NothingToDrawError, caption, finish, limit, panels, styled
from sae_experiments.results.table import Run, RunTable


@styled
def draw_attention(table: RunTable, *, title: str, samples: int, max_rows: int) -> Figure:
    """A row for each run: attention from each position (vertical) to those before (horizontal), mean over the test strings and for ``samples``."""
    notes: list[str] = []
    rows = limit(
        [(run, d, a) for run in table.runs for d in sorted(run.stats) if (a := first(run, d, "attention_mean", "attention", "samples"))],
        max_rows,
        "runs",
        notes,
    )
    if not rows:
        raise NothingToDrawError("no run has attention patterns (attention_mean)")
    shown = min(samples, *(len(a["samples"]) for _, _, a in rows))
    fig, axes = panels(len(rows), 1 + shown, width=2.2, height=2.2)
    for row, (run, _, a) in enumerate(rows):
        for column, ax in enumerate(axes[row]):
            text = str(a["samples"][max(column - 1, 0)])
            ax.imshow(a["attention_mean"] if column == 0 else a["attention"][column - 1], vmin=0, vmax=1, cmap="magma")
            _letters(ax, list("<abc|cba") if column == 0 else list(text[:-1]))
            ax.set_title("mean of the test strings" if column == 0 else text, weight="bold" if column == 0 else None)
        axes[row, 0].set_ylabel(f"{run.title}\nreads from" if len(rows) > 1 else "reads at")
    fig.colorbar(next(image for ax in axes.flat for image in ax.images), ax=axes, label="attention", fraction=0.02)
    notes += ["Each row of a panel: where the model looks when it has read the character at the left. First seed."]
    return finish(fig, title, notes + caption(table, [run for run, _, _ in rows], sorted({d for _, d, _ in rows})))


@styled
def draw_logprob(table: RunTable, *, title: str, max_rows: int) -> Figure:
    """A panel for each run: log-probability of every character of some test strings, given those before."""
    notes: list[str] = []
    rows = limit(
        [(run, d, a) for run in table.runs for d in sorted(run.stats) if (a := first(run, d, "token_logprob", "samples"))], max_rows, "runs", notes
    )
    if not rows:
        raise NothingToDrawError("no run has token log-probabilities (token_logprob)")
    height = 0.4 + 0.3 * max(len(a["samples"]) for _, _, a in rows)
    fig, axes = panels(len(rows), 1, width=6.4, height=height)
    low = min(-np.log(26) * 1.5, *(float(a["token_logprob"].min()) for _, _, a in rows))
    for ax, (run, _, a) in zip(axes[:, 0], rows, strict=True):
        values = a["token_logprob"]
        ax.imshow(values, vmin=low, vmax=0, cmap="viridis", aspect="auto")
        ax.grid(visible=False)
        ax.set_xticks(range(values.shape[1]), ["a", "b", "c", "|", "c", "b", "a", ">"][: values.shape[1]])
        ax.set_yticks(range(len(values)), [str(s) for s in a["samples"]], family="monospace")
        for (i, j), value in np.ndenumerate(values):
            text = f"{str(a['samples'][i])[j + 1]} {round(float(value), 2) + 0.0:.2f}".replace("-", "\N{MINUS SIGN}")
            ax.text(j, i, text, ha="center", va="center", fontsize=7, color="white" if value < 0.45 * low else "black")
        if len(rows) > 1:
            ax.set_title(run.title, loc="left", weight="bold")
    fig.colorbar(next(image for ax in axes.flat for image in ax.images), ax=axes, label="nats", fraction=0.03)
    notes += [f"The free letters can cost no less than log 26 = {np.log(26):.2f} nats each; all that follows is certain. First seed."]
    return finish(fig, title, notes + caption(table, [run for run, _, _ in rows], sorted({d for _, d, _ in rows})))


def first(run: Run, dataset: str, *names: str) -> dict[str, np.ndarray] | None:
    """The arrays of the first seed that has all of ``names``."""
    return next((a for a in run.arrays(dataset).values() if set(names) <= a.keys()), None)


def _letters(ax: Axes, letters: list[str]) -> None:
    ax.grid(visible=False)
    ax.set_xticks(range(len(letters)), letters, family="monospace")
    ax.set_yticks(range(len(letters)), letters, family="monospace")

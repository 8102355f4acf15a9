"""Palindrome: attention patterns of the transformer, and log-probabilities of test strings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sae_experiments.plots.axes import first_image
from sae_experiments.plots.base import finish, panels, styled
from sae_experiments.plots.captions import row_caption
from sae_experiments.plots.selection import find_rows, first_arrays, limit
from sae_experiments.plots.text import minus
from sae_experiments.results.table import RunTable

PATTERN = "<abc|cba>"  # start, three free letters, middle, the letters mirrored, end


@styled
def draw_attention(table: RunTable, *, title: str, samples: int, max_rows: int) -> Figure:
    """Draw attention from each position (down) to those before it (across), a row per run.

    The first panel is the mean over the test strings, the others are single strings.

    Args:
        table: Runs.
        title: Title of the figure.
        samples: Number of single strings to draw.
        max_rows: Maximum number of rows to draw.

    Raises:
        NothingToDrawError: No run stored attention patterns.
    """
    notes: list[str] = []
    rows = find_rows(
        table,
        first_arrays("attention_mean", "attention", "samples"),
        missing="no run has attention patterns (attention_mean)",
    )
    rows = limit(rows, max_rows, "runs", notes)
    shown = min(samples, *(len(row.data["samples"]) for row in rows))
    fig, axes = panels(len(rows), 1 + shown, width=2.2, height=2.2)
    for row, row_axes in zip(rows, axes, strict=True):
        _draw_attention(row_axes[0], row.data["attention_mean"], PATTERN[:-1])
        row_axes[0].set_title("mean of the test strings", weight="bold")
        for ax, attention, sample in zip(
            row_axes[1:], row.data["attention"], row.data["samples"], strict=False
        ):
            _draw_attention(ax, attention, str(sample)[:-1])
            ax.set_title(str(sample))
        row_axes[0].set_ylabel(f"{row.run.title}\nreads from" if len(rows) > 1 else "reads at")
    fig.colorbar(first_image(axes), ax=axes, label="attention", fraction=0.02)
    notes.append(
        "Each row of a panel: where the model looks when it has read the character at the left. "
        "First seed."
    )
    return finish(fig, title, notes + row_caption(rows))


def _draw_attention(ax: Axes, attention: np.ndarray, characters: Sequence[str]) -> None:
    """Draw one pattern, (reading position, position read), with a character per position."""
    ax.imshow(attention, vmin=0, vmax=1, cmap="magma")
    ax.grid(visible=False)
    ticks = range(len(characters))
    ax.set_xticks(ticks, list(characters), family="monospace")
    ax.set_yticks(ticks, list(characters), family="monospace")


@styled
def draw_logprob(table: RunTable, *, title: str, max_rows: int) -> Figure:
    """Draw the log-probability of every character of some test strings, a panel per run.

    Args:
        table: Runs.
        title: Title of the figure.
        max_rows: Maximum number of panels to draw.

    Raises:
        NothingToDrawError: No run stored token log-probabilities.
    """
    notes: list[str] = []
    rows = find_rows(
        table,
        first_arrays("token_logprob", "samples"),
        missing="no run has token log-probabilities (token_logprob)",
    )
    rows = limit(rows, max_rows, "runs", notes)
    height = 0.4 + 0.3 * max(len(row.data["samples"]) for row in rows)
    low = min(-np.log(26) * 1.5, *(float(row.data["token_logprob"].min()) for row in rows))
    fig, axes = panels(len(rows), 1, width=6.4, height=height)
    for ax, row in zip(axes[:, 0], rows, strict=True):
        samples = [str(sample) for sample in row.data["samples"]]
        _draw_logprob(ax, row.data["token_logprob"], samples, low)
        if len(rows) > 1:
            ax.set_title(row.run.title, loc="left", weight="bold")
    fig.colorbar(first_image(axes), ax=axes, label="nats", fraction=0.03)
    notes.append(
        f"The free letters can cost no less than log 26 = {np.log(26):.2f} nats each; all that "
        "follows is certain. First seed."
    )
    return finish(fig, title, notes + row_caption(rows))


def _draw_logprob(ax: Axes, logprobs: np.ndarray, samples: Sequence[str], low: float) -> None:
    """Draw log-probabilities, (strings, characters after the start), from `low` to 0."""
    ax.imshow(logprobs, vmin=low, vmax=0, cmap="viridis", aspect="auto")
    ax.grid(visible=False)
    n_characters = logprobs.shape[1]
    ax.set_xticks(range(n_characters), list(PATTERN[1 : n_characters + 1]))
    ax.set_yticks(range(len(samples)), list(samples), family="monospace")
    for (i, j), value in np.ndenumerate(logprobs):
        rounded = round(float(value), 2) + 0.0  # + 0.0 turns -0.0 into 0.0
        text = minus(f"{samples[i][j + 1]} {rounded:.2f}")
        color = "white" if value < 0.45 * low else "black"
        ax.text(j, i, text, ha="center", va="center", fontsize=7, color=color)

"""Palindrome: letters that each latent responds to, and decoder rows by position."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sae_experiments.plots.base import finish, panels, styled
from sae_experiments.plots.captions import row_caption
from sae_experiments.plots.selection import Arrays, Row, find_rows, first_arrays, limit
from sae_experiments.results.table import RunTable

LETTERS = "abcdefghijklmnopqrstuvwxyz"
POSITIONS = 3  # free positions, each with any letter
INPUTS = list("<abc|cba")  # positions that the model reads


class Meaning(NamedTuple):
    """The free position and letter that each latent responds to most."""

    order: np.ndarray  # live latents by position, then letter, then share (largest first)
    position: np.ndarray  # (latents,), from 0
    letter: np.ndarray  # (latents,), from 0
    share: np.ndarray  # (latents,), share of the variance that the position explains


def _meaning(arrays: Arrays) -> Meaning:
    share, selectivity = arrays["position_share"], arrays["selectivity"]
    position = share.argmax(1)
    letter = selectivity[np.arange(len(selectivity)), position].argmax(1)
    largest = share.max(1)
    live = np.flatnonzero(arrays["active_frac"] > 0)
    order = live[np.lexsort((-largest[live], letter[live], position[live]))]
    return Meaning(order, position, letter, largest)


@styled
def draw_selectivity(table: RunTable, *, title: str, max_runs: int) -> Figure:
    """Draw the mean activation of every live latent given a letter, in standard deviations.

    Rows of panels are runs, columns are the free positions of the letter.

    Args:
        table: Runs.
        title: Title of the figure.
        max_runs: Maximum number of runs to draw.

    Raises:
        NothingToDrawError: No run stored a dictionary over positions.
    """
    notes: list[str] = []
    rows = limit(_rows(table), max_runs, "runs", notes)
    fig, axes = panels(len(rows), POSITIONS, width=2.9, height=3.4)
    for row, row_axes in zip(rows, axes, strict=True):
        meaning = _meaning(row.data)
        sorted_means = row.data["selectivity"][meaning.order]
        span = 1.0
        if len(sorted_means):
            span = max(float(np.quantile(np.abs(sorted_means), 0.999)), 0.1)
        counts = np.bincount(meaning.position[meaning.order], minlength=POSITIONS)
        for position, ax in enumerate(row_axes):
            _draw_values(ax, sorted_means[:, position], span)
            ax.set_xticks(range(0, 26, 2), list(LETTERS[::2]))
            ax.set_title(f"letter {position + 1} ({counts[position]} latents)", weight="bold")
        label = "latents, sorted by position and letter"
        row_axes[0].set_ylabel(f"{row.run.title}\nlatents, sorted" if len(rows) > 1 else label)
        image = row_axes[0].images[0]
        fig.colorbar(image, ax=row_axes, label="standard deviations", fraction=0.03)
    notes.append(
        "Live latents only, sorted by the position whose letter explains most of their variance, "
        "then by letter. First seed."
    )
    return finish(fig, title, notes + row_caption(rows))


@styled
def draw_dictionary(table: RunTable, *, title: str, latents: int, max_runs: int) -> Figure:
    """Draw decoder rows as (position, width) panels, a row of panels per run.

    The latents are those that respond most clearly to different letters and positions.

    Args:
        table: Runs.
        title: Title of the figure.
        latents: Number of latents per run.
        max_runs: Maximum number of runs to draw.

    Raises:
        NothingToDrawError: No run stored a dictionary over positions.
    """
    notes: list[str] = []
    rows = limit(_rows(table), max_runs, "runs", notes)
    fig, axes = panels(len(rows), latents, width=1.45, height=1.5)
    for row, row_axes in zip(rows, axes, strict=True):
        meaning = _meaning(row.data)
        chosen = _clearest(meaning, latents)
        for ax, latent in zip(row_axes, chosen, strict=False):
            dictionary = row.data["dictionary"][latent]
            _draw_values(ax, dictionary, float(np.abs(dictionary).max()) or 1.0)
            ax.set_xticks([])
            labels = INPUTS if ax is row_axes[0] else []
            ax.set_yticks(range(len(INPUTS)), labels, family="monospace", fontsize=6.5)
            input_name = f"{meaning.position[latent] + 1}{LETTERS[meaning.letter[latent]]}"
            ax.set_title(f"{latent}: {input_name} {meaning.share[latent]:.0%}", fontsize=7.5)
        for ax in row_axes[len(chosen) :]:
            ax.set_axis_off()
        if len(rows) > 1:
            row_axes[0].set_ylabel(row.run.title)
    notes.append(
        "Red: positive, blue: negative. Down: position read; across: the model's width. Title: "
        "latent, position and letter it answers to, share of its variance explained. First seed."
    )
    return finish(fig, title, notes + row_caption(rows))


def _rows(table: RunTable) -> list[Row[Arrays]]:
    return find_rows(
        table,
        first_arrays("dictionary", "selectivity", "position_share", "active_frac"),
        missing="no run has a dictionary over positions (dictionary, selectivity)",
    )


def _draw_values(ax: Axes, values: np.ndarray, span: float) -> None:
    """Draw a matrix in colours from -`span` to `span`."""
    colors = {"cmap": "RdBu_r", "vmin": -span, "vmax": span}
    ax.imshow(values, aspect="auto", interpolation="nearest", **colors)
    ax.grid(visible=False)


def _clearest(meaning: Meaning, n: int) -> list[int]:
    """The `n` latents of largest share, taken from the positions in turn."""
    candidates = []  # (rank within its position, position, latent)
    for position in range(POSITIONS):
        of_position = [j for j in meaning.order if meaning.position[j] == position]
        of_position.sort(key=lambda j: -meaning.share[j])
        candidates += [(rank, position, j) for rank, j in enumerate(of_position)]
    chosen = [j for _, _, j in sorted(candidates)[:n]]
    return sorted(chosen, key=lambda j: (meaning.position[j], meaning.letter[j]))

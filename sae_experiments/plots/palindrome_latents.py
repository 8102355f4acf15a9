"""Palindrome: panels of the dictionary (position x width) and the table of what each latent answers to."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from sae_experiments.plots.base import NothingToDrawError, caption, finish, limit, panels, styled
from sae_experiments.plots.palindrome_model import first
from sae_experiments.results.table import Run, RunTable

LETTERS = "abcdefghijklmnopqrstuvwxyz"
INPUTS = ["<", "a", "b", "c", "|", "c", "b", "a"]


class Meaning(NamedTuple):
    """Latents in the order of what they mean: (position, letter), the clearest first within a position; ``share`` of the variance explained."""

    order: np.ndarray
    position: np.ndarray
    letter: np.ndarray
    share: np.ndarray


def meaning(arrays: dict[str, np.ndarray]) -> Meaning:
    """What every latent answers to most, and the live latents sorted by it."""
    share, table = arrays["position_share"], arrays["selectivity"]
    position = share.argmax(1)
    letter = table[np.arange(len(table)), position].argmax(1)
    alive = np.flatnonzero(arrays["active_frac"] > 0)
    order = alive[np.lexsort((-share.max(1)[alive], letter[alive], position[alive]))]
    return Meaning(order, position, letter, share.max(1))


@styled
def draw_selectivity(table: RunTable, *, title: str, max_runs: int) -> Figure:
    """A row for each run, a column for each free position: mean activation of every live latent given the letter there, in standard deviations."""
    notes: list[str] = []
    rows = limit(_rows(table), max_runs, "runs", notes)
    fig, axes = panels(len(rows), 3, width=2.9, height=3.4)
    for row, (run, _, a) in enumerate(rows):
        found = meaning(a)
        span = max(float(np.quantile(np.abs(a["selectivity"][found.order]), 0.999)) if len(found.order) else 1.0, 0.1)
        for position, ax in enumerate(axes[row]):
            ax.imshow(a["selectivity"][found.order, position], aspect="auto", cmap="RdBu_r", vmin=-span, vmax=span, interpolation="nearest")
            ax.grid(visible=False)
            ax.set_xticks(range(0, 26, 2), list(LETTERS[::2]))
            ax.set_title(f"letter {position + 1} ({int((found.position[found.order] == position).sum())} latents)", weight="bold")
        axes[row, 0].set_ylabel(f"{run.title}\nlatents, sorted" if len(rows) > 1 else "latents, sorted by position and letter")
        fig.colorbar(axes[row, 0].images[0], ax=axes[row], label="standard deviations", fraction=0.03)  # type: ignore[arg-type]
    notes += ["Live latents only, sorted by the position whose letter explains most of their variance, then by letter. First seed."]
    return finish(fig, title, notes + caption(table, [run for run, _, _ in rows], sorted({d for _, d, _ in rows})))


@styled
def draw_dictionary(table: RunTable, *, title: str, latents: int, max_runs: int) -> Figure:
    """A row for each run: decoder rows as (position, width) panels, of latents that answer clearly to different letters and positions."""
    notes: list[str] = []
    rows = limit(_rows(table), max_runs, "runs", notes)
    fig, axes = panels(len(rows), latents, width=1.45, height=1.5)
    for row, (run, _, a) in enumerate(rows):
        found = meaning(a)
        chosen = _clearest(found, latents)
        for ax in axes[row]:
            ax.set_axis_off()
        for ax, j in zip(axes[row], chosen, strict=False):
            ax.set_axis_on()
            panel = a["dictionary"][j]
            span = float(np.abs(panel).max()) or 1.0
            ax.imshow(panel, aspect="auto", cmap="RdBu_r", vmin=-span, vmax=span, interpolation="nearest")
            ax.grid(visible=False)
            ax.set_xticks([])
            ax.set_yticks(range(len(INPUTS)), INPUTS if ax is axes[row, 0] else [], family="monospace", fontsize=6.5)
            ax.set_title(f"{j}: {found.position[j] + 1}{LETTERS[found.letter[j]]} {found.share[j]:.0%}", fontsize=7.5)
        if len(rows) > 1:
            axes[row, 0].set_ylabel(run.title)
    notes += [
        "Down: position read; across: the model's width. Title: latent, position and letter it answers to, share of its variance explained. First seed."
    ]
    return finish(fig, title, notes + caption(table, [run for run, _, _ in rows], sorted({d for _, d, _ in rows})))


def _rows(table: RunTable) -> list[tuple[Run, str, dict[str, np.ndarray]]]:
    names = ("dictionary", "selectivity", "position_share", "active_frac")
    rows = [(run, d, a) for run in table.runs for d in sorted(run.stats) if (a := first(run, d, *names))]
    if not rows:
        raise NothingToDrawError("no run has a dictionary over positions (dictionary, selectivity)")
    return rows


def _clearest(found: Meaning, n: int) -> list[int]:
    """The latents with the largest share, taken from the positions in turn."""
    by_position = [sorted((j for j in found.order if found.position[j] == p), key=lambda j: -found.share[j]) for p in range(3)]
    turns = [j for turn in zip(*(row[:n] + [-1] * (n - len(row[:n])) for row in by_position), strict=True) for j in turn if j >= 0]
    return sorted(turns[:n], key=lambda j: (found.position[j], found.letter[j]))

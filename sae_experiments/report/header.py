"""The head of a report: title, state of each run, alarms, and the cells that are still running."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from sae_experiments.report.markup import Markup, tag
from sae_experiments.results.notes import WARNING, warning_lines
from sae_experiments.results.runs import mapping
from sae_experiments.results.table import Run, RunTable

MOST_RUNS = 50
MOST_UNFOLDED = 3  # runs whose states are shown without opening a list


def header(table: RunTable, title: str) -> Markup:
    """Title, and for each run its state in a few words."""
    folders = [of_folder[0] for of_folder in table.folders]
    runs = [_about(run, named=len(folders) > 1) for run in folders[:MOST_RUNS]]
    return tag(
        "header",
        tag("h1", title),
        runs if len(folders) <= MOST_UNFOLDED else _folded(folders, runs),
        _alive(table),
        _stand_in(table),
        id="top",
    )


def _folded(folders: Sequence[Run], runs: Sequence[Markup]) -> Markup:
    """Many runs as one line that opens; how many are in each state, and what they share."""
    states = Counter(run.status or "of unknown state" for run in folders)
    facts = [f"{n} {state}" for state, n in states.items()]
    presets = list(dict.fromkeys(run.preset for run in folders if run.preset))
    if presets:
        facts.append(f"preset {', '.join(presets)}")
    return tag("details", tag("summary", f"{len(folders)} runs: {'; '.join(facts)}"), runs)


def _about(run: Run, *, named: bool) -> Markup:
    manifest, git = run.manifest, mapping(run.manifest.get("git"))
    changed = " + changes" if git.get("dirty") else ""
    when = str(manifest.get("ended") or manifest.get("started") or "")
    state = f"chip {'good' if run.status == 'done' else 'bad'}"
    facts = [
        tag("strong", run.title) if named else None,
        tag("span", run.status, class_=state) if run.status else None,
        f"preset {run.preset}" if run.preset else None,
        manifest.get("device"),
        when.replace("T", " ")[:16] or None,
        f"commit {str(git['commit'])[:7]}{changed}" if git.get("commit") else None,
    ]
    shown = [fact if isinstance(fact, Markup) else tag("span", fact) for fact in facts if fact]
    return tag("p", shown, class_="facts")


def running(table: RunTable) -> list[dict[str, Any]]:
    """The runs that are still at work: name, cells in all, finished cells, cells at work."""
    alive = [of_folder[0] for of_folder in table.folders if of_folder[0].status == "running"]
    states = []
    for run in alive:
        progress = mapping(run.manifest.get("progress"))
        at_work = progress.get("running")
        states.append(
            {
                "run": run.folder,
                "cells": _whole(progress.get("cells")),
                "finished": _whole(progress.get("finished")),
                "at_work": [str(c) for c in at_work] if isinstance(at_work, list) else [],
            }
        )
    return states


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _alive(table: RunTable) -> Markup | None:
    """A line for each run that is still at work; the script reloads the page meanwhile."""
    lines = []
    for state in running(table):
        cells = ""
        if state["cells"] is not None and state["finished"] is not None:
            cells = f": {state['finished']} of {state['cells']} cells are finished"
        at_work = f"; now {', '.join(state['at_work'][:4])}" if state["at_work"] else ""
        line = f"{state['run']} is still running{cells}{at_work}. This page reloads by itself."
        lines.append(tag("p", line, class_="alive", role="status"))
    return tag("div", lines, id="alive") if lines else None


def _stand_in(table: RunTable) -> Markup | None:
    datasets = sorted({d for run in table.runs for d in run.stats if run.stand_in(d)})
    if not datasets:
        return None
    return tag(
        "p",
        f"STAND-IN TEXT, not the real corpus: {', '.join(datasets)}. "
        "Compare these numbers with nothing published.",
        class_="alarm",
    )


def warnings(table: RunTable) -> Markup | None:
    """Results that are worse than they look, of every run."""
    lines = [tag("li", line.removeprefix(WARNING).strip()) for line in warning_lines(table)]
    if not lines:
        return None
    title = f"{len(lines)} warning{'s' * (len(lines) > 1)}: results that are worse than they look"
    return tag("details", tag("summary", title), tag("ul", lines), class_="alarm")

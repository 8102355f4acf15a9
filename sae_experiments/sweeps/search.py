"""Searching for values instead of running them all: Optuna proposes, the jobs answer with a metric, and what is known is on disk.

The proposals are a function of (seed, number of the trial, results so far), so a search that was stopped and started again goes on
as if nothing had happened, and one whose number of trials is raised continues. ``search.log`` in the sweep's folder is Optuna's journal
of JSON lines.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from sae_experiments.config.compose import Axis, key_of
from sae_experiments.errors import UserError
from sae_experiments.files import read_json, write_json
from sae_experiments.results.records import number, try_json

SAMPLERS = ("tpe", "random")


#: What the trials of a search are evaluated on, and what its winner is reported on.
SEARCHED, REPORTED = "held_out=search", "held_out=test"


class Trial(NamedTuple):
    """One proposal: the values of what is searched over, as overrides; ``value``: what it gave."""

    number: int
    name: str
    overrides: list[str]
    value: float | None = None


class Search:
    """A search over ``axes`` for the best mean of ``metric`` over the reports of a job; ``spec`` is ``conf/search/*.yaml``."""

    def __init__(
        self, root: Path, spec: Mapping[str, Any], axes: Sequence[Axis], fixed: Sequence[str]
    ) -> None:
        if not axes:
            raise UserError(
                "a search needs something to search over, for example 'fit.train.lr=tag(log,interval(1e-4,1e-1))' or sae=topk,gated"
            )
        if spec["sampler"] not in SAMPLERS:
            raise UserError(f"search.sampler={spec['sampler']} is not one of {', '.join(SAMPLERS)}")
        for key in ("n_trials", "at_once"):
            if not isinstance(spec[key], int) or spec[key] < 1:
                raise UserError(f"search.{key}={spec[key]} must be a whole number of at least 1")
        if any(key_of(o) == "held_out" for o in [*fixed, *(a.key for a in axes)]):
            raise UserError(
                "held_out: a search chooses by validation text and reports its winner on test text, so it sets this itself: leave it out"
            )
        self.root, self.axes, self.fixed = root, list(axes), list(fixed)
        self.metric, self.better = str(spec["metric"]), ""
        self.n_trials, self.at_once, self.sampler, self.seed = (
            spec["n_trials"],
            spec["at_once"],
            spec["sampler"],
            int(spec["seed"]),
        )
        self.same = {
            "axes": [list(a) for a in self.axes],
            "fixed": sorted(self.fixed),
            "metric": self.metric,
            "seed": self.seed,
            "by": self.sampler,
        }
        self.same |= {"text": SEARCHED}
        self._study: Any = None

    def check_metric(self, infos_of: Callable[[list[str]], Sequence[Any]]) -> None:
        """Find out which direction of the metric is better. Raises :class:`UserError` for a metric that no job would report."""
        first = [
            f"{a.key}={a.choices[0] if a.choices else _text(a.low, a.whole)}" for a in self.axes
        ]
        infos = {
            info.name: info.better
            for info in infos_of([o for o in [*self.fixed, *first] if not o.startswith("preset=")])
        }
        if infos.get(self.metric) not in ("up", "down"):
            known = ", ".join(name for name, better in infos.items() if better in ("up", "down"))
            raise UserError(
                f"search.metric={self.metric} is nothing that can be better or worse; use one of {known}"
            )
        self.better = infos[self.metric]

    def claim(self) -> None:
        """Make the sweep's folder this search's. Raises :class:`UserError` where it is another's."""
        path = self.root / "search.json"
        if path.exists() and read_json(path) != self.same:
            raise UserError(
                f"{self.root} holds another search (see {path.name}): choose another out_dir"
            )
        write_json(path, self.same)

    @property
    def study(self) -> Any:
        """Optuna's study, from its journal in the sweep's folder."""
        if self._study is None:
            optuna = _optuna()
            storage = optuna.storages.JournalStorage(
                optuna.storages.journal.JournalFileBackend(str(self.root / "search.log"))
            )
            direction = "maximize" if self.better == "up" else "minimize"
            self._study = optuna.create_study(
                study_name="search", storage=storage, direction=direction, load_if_exists=True
            )
        return self._study

    def trials(self) -> list[Trial]:
        """Everything proposed so far."""
        return (
            [self._trial(t) for t in self.study.trials]
            if (self.root / "search.log").exists()
            else []
        )

    def next(self) -> list[Trial]:
        """Up to ``at_once`` trials to run now: first those that a stopped search left without an answer. [] when there are enough."""
        optuna = _optuna()
        open_ = [t for t in self.study.trials if t.state == optuna.trial.TrialState.RUNNING][
            : self.at_once
        ]
        trials = [self._trial(t) for t in open_]
        while len(trials) < self.at_once and len(self.study.trials) < self.n_trials:
            trials.append(self._ask())
        return trials

    def _ask(self) -> Trial:
        optuna = _optuna()
        seed = self.seed + 1_000_003 * len(
            self.study.trials
        )  # a sampler of its own for each trial: nothing to remember between them
        samplers = optuna.samplers
        self.study.sampler = (
            samplers.RandomSampler(seed=seed)
            if self.sampler == "random"
            else samplers.TPESampler(seed=seed, constant_liar=True)
        )
        trial = self.study.ask()
        for axis in self.axes:
            if axis.choices:
                trial.suggest_categorical(axis.key, axis.choices)
            elif axis.whole:
                trial.suggest_int(axis.key, int(axis.low), int(axis.high), log=axis.log)
            else:
                trial.suggest_float(axis.key, axis.low, axis.high, log=axis.log)
        return self._trial(self.study.trials[trial.number])

    def _trial(self, found: Any) -> Trial:
        values = [
            f"{a.key}={_text(found.params[a.key], a.whole)}"
            for a in self.axes
            if a.key in found.params
        ]
        return Trial(
            found.number,
            f"trial_{found.number:03d}",
            values,
            found.value if found.state.is_finished() else None,
        )

    def tell(self, trial: Trial, folder: Path, done: bool) -> None:
        """Give the study what a job found: the mean of the metric over its reports; a failed job has no value."""
        value = self._value(folder) if done else None
        state = _optuna().trial.TrialState
        self.study.tell(
            trial.number, value, state=state.COMPLETE if value is not None else state.FAIL
        )

    def _value(self, folder: Path) -> float | None:
        final = try_json(folder / "final_info.json") or {}
        values = [
            number(entry.get("means", {}).get(f"{self.metric}_mean")) for entry in final.values()
        ]
        return statistics.mean(values) if values and None not in values else None  # pyright: ignore[reportArgumentType]

    def _told(self) -> list[Trial]:
        state = _optuna().trial.TrialState
        return [self._trial(t) for t in self.study.trials if t.state == state.COMPLETE]

    def best(self) -> Trial | None:
        """The trial with the best value on the text that the search sees; None where none gave a value."""
        return (min if self.better == "down" else max)(
            self._told(), key=lambda t: cast(float, t.value), default=None
        )

    def summary(self, reported: Path | None = None) -> str:
        """The best trial, in one line, and what it gives on the test text: its run folder for that, where there is one."""
        best = self.best()
        if best is None:
            return f"search: no trial gave a {self.metric}"
        found = f"search: best {self.metric} {best.value:.6g} of {len(self._told())} trials: {best.name} ({' '.join(best.overrides)})"
        value = None if reported is None else self._value(reported)
        if reported is None or value is None:
            return f"{found}; not yet reported on test text"
        if value == best.value:
            return f"{found}; {self.metric} does not depend on the held-out text: see {reported.name} for what does"
        return f"{found}; on test text {value:.6g} ({reported.name})"


def _text(value: Any, whole: bool) -> str:
    return value if isinstance(value, str) else str(int(value)) if whole else repr(float(value))


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise UserError(
            "a search needs a package that is not installed: pip install 'sae-experiments[optuna]'"
        ) from error
    optuna.logging.set_verbosity(logging.WARNING)
    return optuna

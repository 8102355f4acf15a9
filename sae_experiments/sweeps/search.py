"""A search for the best values instead of all combinations: Optuna proposes, jobs evaluate.

Proposals are a function of the seed, the number of the trial and the results so far. A search that
was stopped therefore continues as if nothing had happened, also with more trials. Its state is
Optuna's journal of JSON lines, `search.log` in the sweep's folder.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from sae_experiments.config.axes import Axis
from sae_experiments.config.typed import key_of
from sae_experiments.errors import UserError
from sae_experiments.files import read_json, write_json
from sae_experiments.results.records import means_of, number, try_json

SAMPLERS = ("tpe", "random")


#: Settings by which trials of a search are evaluated, and by which its winner is reported.
SEARCHED, REPORTED = "held_out=search", "held_out=test"


class Trial(NamedTuple):
    """One proposal."""

    number: int
    name: str  # of its job
    overrides: list[str]  # the proposed values
    value: float | None = None  # the metric, once it is known


class Search:
    """A search for the best mean of a metric over the results of a job.

    Args:
        root: Folder of the sweep.
        spec: Settings, see `conf/search`.
        axes: Keys to search over.
        fixed: Overrides of every job.
    """

    def __init__(
        self, root: Path, spec: Mapping[str, Any], axes: Sequence[Axis], fixed: Sequence[str]
    ) -> None:
        if not axes:
            raise UserError(
                "a search needs something to search over, for example "
                "'fit.train.lr=tag(log,interval(1e-4,1e-1))' or sae=topk,gated"
            )
        if spec["sampler"] not in SAMPLERS:
            raise UserError(f"search.sampler={spec['sampler']} is not one of {', '.join(SAMPLERS)}")
        for key in ("n_trials", "at_once"):
            if not isinstance(spec[key], int) or spec[key] < 1:
                raise UserError(f"search.{key}={spec[key]} must be a whole number of at least 1")
        if any(key_of(o) == "held_out" for o in [*fixed, *(a.key for a in axes)]):
            raise UserError(
                "held_out: a search chooses by validation text and reports its winner on test "
                "text, so it sets this itself: leave it out"
            )
        self.root = root
        self.axes = list(axes)
        self.fixed = list(fixed)
        self.metric, self.better = str(spec["metric"]), ""
        self.n_trials = spec["n_trials"]
        self.at_once = spec["at_once"]
        self.sampler = spec["sampler"]
        self.seed = int(spec["seed"])
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
        """Look up the direction of the metric, or raise `UserError` if no job would report it."""
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
                f"search.metric={self.metric} is nothing that can be better or worse; "
                f"use one of {known}"
            )
        self.better = infos[self.metric]

    def claim(self) -> None:
        """Claim the sweep's folder, or raise `UserError` if it belongs to another search."""
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
        """Up to `at_once` trials to run now, first those left open by a search that was stopped.

        Returns:
            The trials; none when there are enough.
        """
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
        # A sampler of its own for each trial, so that no state has to be kept between them.
        seed = self.seed + 1_000_003 * len(self.study.trials)
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

    def _trial(self, trial: Any) -> Trial:
        values = [
            f"{a.key}={_text(trial.params[a.key], a.whole)}"
            for a in self.axes
            if a.key in trial.params
        ]
        value = trial.value if trial.state.is_finished() else None
        return Trial(trial.number, f"trial_{trial.number:03d}", values, value)

    def tell(self, trial: Trial, folder: Path, done: bool) -> None:
        """Tell the study the mean of the metric over a job's results; a failed job has none."""
        value = self._value(folder) if done else None
        state = _optuna().trial.TrialState
        self.study.tell(
            trial.number, value, state=state.COMPLETE if value is not None else state.FAIL
        )

    def _value(self, folder: Path) -> float | None:
        final = try_json(folder / "final_info.json") or {}
        key = f"{self.metric}_mean"
        values = [number(means_of(entry).get(key)) for entry in final.values()]
        known = [value for value in values if value is not None]
        return statistics.mean(known) if known and len(known) == len(values) else None

    def _told(self) -> list[Trial]:
        state = _optuna().trial.TrialState
        return [self._trial(t) for t in self.study.trials if t.state == state.COMPLETE]

    def best(self) -> Trial | None:
        """The trial with the best value on validation text; None if no trial has a value."""
        return (min if self.better == "down" else max)(
            self._told(), key=lambda t: cast(float, t.value), default=None
        )

    def summary(self, reported: Path | None = None) -> str:
        """One line about the best trial.

        Args:
            reported: Run folder of the best trial on test text, if it was run.
        """
        best = self.best()
        if best is None:
            return f"search: no trial gave a {self.metric}"
        line = f"search: best {self.metric} {best.value:.6g} of {len(self._told())} trials: "
        line += f"{best.name} ({' '.join(best.overrides)})"
        value = None if reported is None else self._value(reported)
        if reported is None or value is None:
            return f"{line}; not yet reported on test text"
        if value == best.value:
            return (
                f"{line}; {self.metric} does not depend on the held-out text: "
                f"see {reported.name} for what does"
            )
        return f"{line}; on test text {value:.6g} ({reported.name})"


def _text(value: Any, whole: bool) -> str:
    if isinstance(value, str):
        return value
    return str(int(value)) if whole else repr(float(value))


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise UserError(
            "a search needs a package that is not installed: pip install 'sae-experiments[optuna]'"
        ) from error
    optuna.logging.set_verbosity(logging.WARNING)
    return optuna

"""A benchmark on worlds of SynthSAEBench: one score per SAE, references, and a list of attempts."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from sae_experiments.errors import UserError
from sae_experiments.fitting.spec import SAESpec
from sae_experiments.saes.base import SAE
from sae_experiments.studies.base import Finished
from sae_experiments.studies.ground_truth.synth import Synth
from sae_experiments.training.loop import TrainConfig, seed_of

#: Environment variable of the one who scores: with a value that nobody else knows, nobody else
#: can draw the worlds of `challenge.seeds=scoring`.
SECRET = "SAE_CHALLENGE_SECRET"
#: Seeds of cells unless `seeds` is given.
SEEDS = {"development": (0,), "scoring": (0, 1, 2)}
#: Relative distance from the L0 that scores are for, beyond which a score does not count.
TOLERANCE = 0.05
#: The list of tries, and its columns.
TABLE = "results.tsv"
HEADER = (
    "run",
    "sae",
    "world",
    "seeds",
    "score",
    "f1",
    "mcc",
    "unique",
    "fvu",
    "l0",
    "seconds",
    "status",
)


class Reference(NamedTuple):
    """A reference to compare scores with; None where a number was not published."""

    name: str
    f1: float
    mcc: float | None = None
    unique: float | None = None
    fvu: float | None = None


#: Published for the full world at L0 25, means of 5 seeds (arXiv 2602.14687), and what agents
#: reached on it (F1 at L0 25; the repositories of chanind and bigsnarfdude).
PUBLISHED = (
    Reference("supervised probes", 0.974),
    Reference("Matryoshka BatchTopK", 0.879, 0.793, 0.999, 1 - 0.779),
    Reference("BatchTopK", 0.732, 0.757, 0.984, 1 - 0.792),
    Reference("JumpReLU", 0.732, 0.753, 0.989, 1 - 0.795),
    Reference("standard (L1)", 0.556, 0.604, 0.898, 1 - 0.765),
    Reference("matching pursuit", 0.446, 0.693, 0.828, 1 - 0.835),
    Reference("agents: LISTA-Matryoshka", 0.978, 0.82),
    Reference("agents: six prefixes on top", 0.987),
    Reference("agents: pruned at inference", 0.989),
)


class Score(NamedTuple):
    """Means over the seeds of one SAE."""

    sae: str
    f1: float
    mcc: float | None
    unique: float | None
    fvu: float | None
    l0: float | None
    seconds: float
    cut: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Conditions that are the same for all SAEs that are scored on a world."""

    l0: float
    """Active latents per row."""
    expansion: float
    """Latents per dimension of the rows."""
    steps: int
    """Optimiser steps, at most."""
    batch_size: int
    """Rows of a step; smaller steps may be more."""
    lr: float
    """Peak learning rate, unless the SAE brings its own."""
    rows: int
    """Rows to calibrate thresholds on, and as many to evaluate on."""
    min_fires: int
    """Rows that a feature must be active on to count."""
    recipe: Synth
    """The world."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Challenge:
    """A world with its rules, and the seeds to draw it from."""

    world: str
    """Name of the world."""
    seeds: str
    """development, or scoring: other worlds, rows and weights."""
    rules: Rules
    """The rules of that world."""

    def __post_init__(self) -> None:
        if self.seeds not in SEEDS:
            raise UserError(f"challenge.seeds={self.seeds} is not one of {', '.join(SEEDS)}")

    @property
    def default_seeds(self) -> Sequence[int]:
        """Seeds of the cells unless others are asked for."""
        return SEEDS[self.seeds]

    @property
    def dataset(self) -> str:
        """Name of the results."""
        return f"synth_{self.world}"

    def seed(self, seed: int) -> int:
        """The seed that a cell draws everything from."""
        if self.seeds == "development":
            return seed
        return seed_of(seed, "scoring", os.environ.get(SECRET, ""))

    def provenance(self) -> dict[str, str]:
        """Facts that tell development from scoring, and one secret from another."""
        if self.seeds == "development":
            return {"seeds": self.seeds}
        secret = os.environ.get(SECRET, "")
        known = hashlib.sha256(f"challenge {secret}".encode()).hexdigest()[:8]
        return {"seeds": f"{self.seeds} {known}"}

    def check(self, name: str, spec: SAESpec, sae: SAE, train: TrainConfig) -> None:
        """Raise `UserError` for an SAE that would be scored under other rules.

        Args:
            name: Name of the SAE.
            spec: Its description.
            sae: The SAE, built.
            train: Its optimisation.
        """
        asked = spec.target_l0 if sae.fixed_l0 is None else sae.fixed_l0
        if asked != self.rules.l0:
            raise UserError(
                f"sae.target_l0={asked:g} of {name}: world {self.world} is scored at "
                f"sae.target_l0={self.rules.l0:g}"
            )
        latents = round(self.rules.expansion * self.rules.recipe.width)
        if sae.d_sae != latents:
            raise UserError(
                f"sae.d_sae={sae.d_sae} of {name}: world {self.world} is scored with "
                f"sae.d_sae={latents}"
            )
        most = self.rules.steps * self.rules.batch_size
        if train.steps * train.batch_size > most:
            raise UserError(
                f"study.train.steps={train.steps} of batch_size={train.batch_size} rows are more "
                f"than the {most} rows that an SAE of world {self.world} may see"
            )

    def status(self, score: Score) -> str:
        """`done`, or why a score does not count."""
        if score.cut:
            return "cut by time_limit_s"
        if score.l0 is None or abs(score.l0 / self.rules.l0 - 1) > TOLERANCE:
            return f"L0 is not {self.rules.l0:g}"
        return "done"

    def conclude(self, folder: Path, finished: Mapping[str, Sequence[Finished]]) -> list[str]:
        """Append the scores of a run to `results.tsv` beside its folder.

        Args:
            folder: The run folder.
            finished: Results by name of the SAE, one per seed.

        Returns:
            Lines for people: the scores among the references, then `score: <number>`.
        """
        scores = [score_of(sae, each) for sae, each in finished.items()]
        note = self._append(folder, scores)
        lines = [
            f"SynthSAEBench, world {self.world}, {self.seeds} seeds: F1 at L0 {self.rules.l0:g} "
            f"(within {TOLERANCE:.0%}) is the score; {note}",
            _row("", *HEADER[5:11]),
        ]
        for s in scores:
            status = self.status(s)
            says = "" if status == "done" else f"  does not count: {status}"
            lines.append(_row(s.sae, s.f1, s.mcc, s.unique, s.fvu, s.l0, s.seconds) + says)
        lines.append("  published or reached by agents, full world, L0 25:")
        lines += [_row(r.name, r.f1, r.mcc, r.unique, r.fvu, None, None) for r in PUBLISHED]
        lines += [
            f"{'score' if len(scores) == 1 else f'score.{s.sae}'}: {self.value(s):.6f}"
            for s in scores
        ]
        return lines

    def value(self, score: Score) -> float:
        """F1, or 0 for a score that does not count."""
        return score.f1 if self.status(score) == "done" else 0.0

    def _append(self, folder: Path, scores: Sequence[Score]) -> str:
        """Add lines that are not in the list of tries yet, and say where it is."""
        path = folder.parent / TABLE
        header = "\t".join(HEADER)
        before = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        if before and before[0] != header:
            return f"{path} is another table: nothing appended"
        lines = [self._line(folder.name, score) for score in scores]
        new = [line for line in lines if line not in before]
        text = "".join(f"{line}\n" for line in ([] if before else [header]) + new)
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
        return f"tries are listed in {path}"

    def _line(self, run: str, score: Score) -> str:
        numbers = (score.f1, score.mcc, score.unique, score.fvu, score.l0)
        texts = ["" if x is None else f"{x:.4f}" for x in numbers]
        fields = [run, score.sae, self.world, self.seeds, f"{self.value(score):.6f}", *texts]
        return "\t".join([*fields, f"{score.seconds:.1f}", self.status(score)])


def score_of(sae: str, each: Sequence[Finished]) -> Score:
    """Mean scores over the seeds; without an F1 they are 0."""

    def over_seeds(name: str) -> float | None:
        values = [one.metrics.get(name) for one in each]
        given = [value for value in values if value is not None]
        return mean(given) if len(given) == len(values) else None

    return Score(
        sae=sae,
        f1=over_seeds("truth_f1") or 0.0,
        mcc=over_seeds("truth_mcc"),
        unique=over_seeds("truth_uniqueness"),
        fvu=over_seeds("sae_fvu"),
        l0=over_seeds("sae_l0"),
        seconds=mean(one.seconds.get("fit", 0.0) for one in each),
        cut=any(one.cut for one in each),
    )


def _row(name: str, *cells: str | float | None) -> str:
    return f"  {name:<28}" + "".join(f"{_cell(cell):>9}" for cell in cells)


def _cell(value: str | float | None) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:.1f}" if value >= 10 else f"{value:.3f}"

"""SAEs on a world with known features, which shows how many of them each variant finds.

After SynthSAEBench.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sae_experiments.console import listed, took
from sae_experiments.errors import UserError
from sae_experiments.fitting import cached as cached_module
from sae_experiments.fitting import fit
from sae_experiments.fitting import spec as sae_spec_module
from sae_experiments.fitting.cached import fit_cached
from sae_experiments.fitting.fit import FitReport, Sample, fit_saes
from sae_experiments.fitting.spec import SAESpec, code_of
from sae_experiments.metrics.base import EvalContext, Metric, MetricInfo
from sae_experiments.metrics.recovery import Truth
from sae_experiments.resources import Need
from sae_experiments.saes.base import SAE, Batch
from sae_experiments.saes.types import Codes
from sae_experiments.source import source_digest
from sae_experiments.studies import conditions as facts
from sae_experiments.studies.base import (
    Cell,
    Context,
    Finished,
    Outcome,
    check_held_out,
    infos_of,
    part_of,
    rows_seed,
)
from sae_experiments.studies.ground_truth.challenge import Challenge
from sae_experiments.studies.ground_truth.synth import Synth, SynthWorld
from sae_experiments.studies.ground_truth.world import Planted, World
from sae_experiments.training import loop as training
from sae_experiments.training.loop import TrainConfig, seed_of

DATASET = "planted"
Recipe = Planted | Synth
AnyWorld = World | SynthWorld
#: Feature activations drawn in a fit above which drawing is timed beforehand: some minutes' worth.
NOTABLE_DRAWS = 3e10


@dataclass(frozen=True, kw_only=True)
class GroundTruth:
    """The study of known features.

    It has one cell per seed: a world drawn from the recipe, and all SAEs fitted to rows that are
    never repeated.
    """

    world: Planted
    """Recipe of the world."""
    saes: Mapping[str, SAESpec]
    """SAEs by name."""
    metrics: Mapping[str, Metric]
    """Metrics by name."""
    train: TrainConfig
    """Optimisation of the SAEs."""
    seeds: Sequence[int] | None
    """Seeds; None: 0 alone."""
    calibration_rows: int
    """Rows to initialise from, and as many to calibrate thresholds on."""
    held_out_rows: int
    """Rows to evaluate on."""
    dead_after_frac: float
    """Share of the rows of the fit without firing after which a latent is dead."""
    held_out: str = "val"
    """Held-out part of the rows, one of `HELD_OUT`."""
    challenge: Challenge | None = None
    """Rules of the benchmark, whose world replaces `world`; None: no benchmark."""

    @property
    def recipe(self) -> Recipe:
        """Recipe of the world that rows come from."""
        return self.world if self.challenge is None else self.challenge.rules.recipe

    @property
    def dataset(self) -> str:
        """Name of the results of a single SAE."""
        return DATASET if self.challenge is None else self.challenge.dataset

    def check(self) -> None:
        check_held_out(self.held_out)
        for name in ("calibration_rows", "held_out_rows"):
            if getattr(self, name) < 1:
                raise UserError(f"study.{name}={getattr(self, name)} must be at least 1")
        width = self.recipe.width
        for name, sae_spec in self.saes.items():
            sae_spec.check(width, width, self.train)
            with torch.device("meta"):
                sae = sae_spec.build(width, width)
            if sae.needs_model:
                raise UserError(
                    f"sae={name} needs a language model, and study=ground_truth has none"
                )
            if self.challenge is not None:
                self.challenge.check(name, sae_spec, sae, self.train)

    def announce(self, ctx: Context) -> None:
        """Print what drawing rows will need.

        Raises:
            UserError: The largest sample does not fit into memory.
        """
        sizes = {
            "study.held_out_rows": self.held_out_rows,
            "study.calibration_rows": self.calibration_rows,
            "batch_size": self.train.batch_size,
        }
        key = max(sizes, key=sizes.__getitem__)
        features = self.recipe.features
        what = f"a world of study.world.features={features} with {key}={sizes[key]}"
        fix = "use fewer features or rows"
        need = Need(self.recipe.memory(sizes[key]))
        ctx.announce(what, need, fix)
        if features * self.train.batch_size * self.train.steps < NOTABLE_DRAWS:
            return
        world = self.recipe.draw(seed_of(0, "world"), ctx.device)
        began = time.monotonic()
        self.rows(world, self.train.batch_size, 0)
        seconds = (time.monotonic() - began) * self.train.steps * len(self.cells())
        ctx.announce(what, need._replace(seconds=seconds), fix)

    def prepare(self, ctx: Context) -> dict[str, Any]:
        self.announce(ctx)
        seeds = {} if self.challenge is None else self.challenge.provenance()
        return {
            self.result_name(sae): {
                "corpus": self.dataset,
                "stand_in": False,
                **asdict(self.recipe),
                **part_of(self.held_out),
                **seeds,
            }
            for sae in self.saes
        }

    def result_name(self, sae: str) -> str:
        """Name of an SAE's results, which has the SAE's own name if several are fitted."""
        return self.dataset if len(self.saes) == 1 else f"{self.dataset}.{sae}"

    def cells(self) -> list[Cell]:
        usual = [0] if self.challenge is None else self.challenge.default_seeds
        return [
            Cell(self.dataset, seed, tuple(map(self.result_name, self.saes)))
            for seed in (self.seeds if self.seeds is not None else usual)
        ]

    def conclude(self, folder: Path, finished: Sequence[Finished]) -> list[str]:
        """Lines that close a run; those of a benchmark score the SAEs."""
        if self.challenge is None:
            return []
        by_sae = {
            sae: [one for one in finished if one.name == self.result_name(sae)] for sae in self.saes
        }
        return self.challenge.conclude(folder, by_sae)

    def infos(self) -> list[MetricInfo]:
        return infos_of(self.metrics.values())

    def run(self, cell: Cell, ctx: Context) -> dict[str, Outcome]:
        if self.challenge is not None:
            cell = cell._replace(seed=self.challenge.seed(cell.seed))
        world = self.recipe.draw(seed_of(cell.seed, "world"), ctx.device)
        outcomes = {}
        for name, (sae, fitted) in self.fitted(world, cell, ctx).items():
            outcome = self.evaluate(sae, world, cell, ctx)
            outcome.seconds["fit"] = fitted.seconds
            outcome.cut = fitted.cut
            outcome.curves = [(step, f"sae/{n}", value) for step, n, value in fitted.history]
            outcome.add_fit(fitted)
            outcomes[self.result_name(name)] = outcome
            titles = {"truth_mcc": "MCC", "truth_f1": "F1"}
            shown = [
                f"{title} {outcome.metrics[key]:.3f}"
                for key, title in titles.items()
                if outcome.metrics.get(key) is not None
            ]
            spent = took("fitted", fitted.seconds, from_cache=fitted.from_cache)
            ctx.console.say(f"  {name}: {', '.join(shown)} ({spent})")
        return outcomes

    def rows(self, world: AnyWorld, n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor | Codes]:
        """Rows (n, D), and their true feature activations (n, G)."""
        if isinstance(world, SynthWorld):
            codes = world.acts(n, seed)
            return world.rows(codes, seed + 1), codes
        acts = world.acts(n, seed)
        return world.rows(acts, seed + 1), acts

    def fitted(self, world: AnyWorld, cell: Cell, ctx: Context) -> dict[str, tuple[SAE, FitReport]]:
        """The SAEs of a cell, from the cache or fitted now in one pass."""
        width = self.recipe.width
        saes = {
            name: sae_spec.seeded(width, width, cell.seed).to(ctx.device)
            for name, sae_spec in self.saes.items()
        }
        source = source_digest(
            *code_of(self.saes, saes),
            training,
            fit,
            cached_module,
            sys.modules[type(self.recipe).__module__],
            sae_spec_module,
            alone=[__name__],
        )
        key = {
            "what": "planted",
            "world": asdict(self.recipe),
            "train": asdict(self.train),
            "seed": cell.seed,
            "torch": torch.__version__,
            "rows": [self.calibration_rows, self.dead_after_frac],
            "saes": {name: sae_spec.describe() for name, sae_spec in self.saes.items()},
            "device": ctx.device.type,
            "source": source,
        }

        def fit_now(checkpoint: Path) -> dict[str, FitReport]:
            return self._fit(checkpoint, saes, world, cell, ctx)

        return fit_cached(ctx.cache, key, saes, fit_now)

    def _fit(
        self, checkpoint: Path, saes: Mapping[str, SAE], world: AnyWorld, cell: Cell, ctx: Context
    ) -> dict[str, FitReport]:
        """Fit the SAEs to fresh rows in every step."""

        def batch_at(step: int) -> Batch:
            x, _ = self.rows(world, self.train.batch_size, seed_of(cell.seed, "rows", step))
            return Batch(x, x)

        x, held = (
            self.rows(world, self.calibration_rows, seed_of(cell.seed, what))[0]
            for what in ("initial", "calibration")
        )
        n_rows = self.train.steps * self.train.batch_size
        with ctx.session(f"fit {listed(list(saes))}", "sae") as session:
            session.checkpoint = checkpoint
            return fit_saes(
                saes,
                batch_at,
                {name: sae_spec.config(self.train) for name, sae_spec in self.saes.items()},
                Sample(x, x, held),
                seed=cell.seed,
                dead_after=round(self.dead_after_frac * n_rows),
                session=session,
            )

    def evaluate(self, sae: SAE, world: AnyWorld, cell: Cell, ctx: Context) -> Outcome:
        """Measure an SAE on rows that no SAE was fitted to."""
        x, acts = self.rows(world, self.held_out_rows, rows_seed(cell.seed, self.held_out))
        evaluation = EvalContext(
            sae=sae, device=ctx.device, x=x, extras={"truth": Truth(world.directions, acts)}
        )
        outcome = Outcome(facts=facts.of_sae(sae))
        outcome.measure(self.metrics, evaluation, ctx.ends)
        return outcome

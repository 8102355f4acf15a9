"""SAEs on a world whose features are known: how many of them does each variant find? (C.23; after SynthSAEBench)"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from sae_experiments.cache import cached
from sae_experiments.console import listed
from sae_experiments.errors import UserError
from sae_experiments.files import read_json, write_bytes, write_json
from sae_experiments.fitting import fit
from sae_experiments.fitting import spec as sae_spec_module
from sae_experiments.fitting.fit import FitReport, Sample, fit_saes
from sae_experiments.fitting.spec import SAESpec, code_of
from sae_experiments.metrics.base import EvalContext, Metric, MetricInfo
from sae_experiments.metrics.recovery import Truth
from sae_experiments.resources import Need, announce
from sae_experiments.saes.base import SAE, Batch
from sae_experiments.source import source_digest
from sae_experiments.studies import conditions as facts
from sae_experiments.studies.base import Cell, Context, Outcome, check_held_out, part_of, rows_seed
from sae_experiments.studies.ground_truth import world as planted
from sae_experiments.studies.ground_truth.world import Planted, World
from sae_experiments.training import loop as training
from sae_experiments.training.loop import TrainConfig, seed_of

DATASET = "planted"
#: Feature activations drawn in a fit above which drawing is timed beforehand: some minutes' worth.
NOTABLE_DRAWS = 3e10


@dataclass(frozen=True, kw_only=True)
class GroundTruth:
    """One cell a seed: a world drawn from the recipe, and every SAE fitted to rows that are never repeated."""

    world: Planted
    saes: Mapping[str, SAESpec]
    metrics: Mapping[str, Metric]
    train: TrainConfig
    seeds: Sequence[int] | None
    calibration_rows: int
    held_out_rows: int
    dead_after_frac: float
    held_out: str = "val"

    def check(self) -> None:
        check_held_out(self.held_out)
        for name in ("calibration_rows", "held_out_rows"):
            if getattr(self, name) < 1:
                raise UserError(f"study.{name}={getattr(self, name)} must be at least 1")
        for name, sae_spec in self.saes.items():
            sae_spec.check(self.world.width, self.world.width, self.train)
            with torch.device("meta"):
                if sae_spec.build(self.world.width, self.world.width).needs_model:
                    raise UserError(
                        f"sae={name} needs a language model, and study=ground_truth has none"
                    )

    def announce(self, ctx: Context) -> None:
        """Say what drawing rows will need. Raises :class:`UserError` where the largest sample does not fit."""
        sizes = {
            "study.held_out_rows": self.held_out_rows,
            "study.calibration_rows": self.calibration_rows,
            "batch_size": self.train.batch_size,
        }
        key = max(sizes, key=sizes.__getitem__)
        what, fix = (
            f"a world of study.world.features={self.world.features} with {key}={sizes[key]}",
            "use fewer features or rows",
        )
        need = Need(self.world.memory(sizes[key]))
        announce(what, need, fix, device=ctx.device, say=ctx.console.say)
        if self.world.features * self.train.batch_size * self.train.steps < NOTABLE_DRAWS:
            return
        world, began = World(self.world, seed_of(0, "world"), ctx.device), time.monotonic()
        self.rows(world, self.train.batch_size, 0)
        seconds = (time.monotonic() - began) * self.train.steps * len(self.cells())
        announce(what, need._replace(seconds=seconds), fix, device=ctx.device, say=ctx.console.say)

    def prepare(self, ctx: Context) -> dict[str, Any]:
        self.announce(ctx)
        return {
            self.result_name(sae): {
                "corpus": DATASET,
                "stand_in": False,
                **asdict(self.world),
                **part_of(self.held_out),
            }
            for sae in self.saes
        }

    def result_name(self, sae: str) -> str:
        """The name results appear under: with the SAE's label where several are fitted."""
        return DATASET if len(self.saes) == 1 else f"{DATASET}.{sae}"

    def cells(self) -> list[Cell]:
        return [
            Cell(DATASET, seed, tuple(map(self.result_name, self.saes)))
            for seed in (self.seeds if self.seeds is not None else [0])
        ]

    def infos(self) -> list[MetricInfo]:
        functions = [
            m.func if isinstance(m, functools.partial) else m for m in self.metrics.values()
        ]
        return [
            i
            for module in dict.fromkeys(sys.modules[f.__module__] for f in functions)
            for i in module.INFO
        ]

    def run(self, cell: Cell, ctx: Context) -> dict[str, Outcome]:
        world = World(self.world, seed_of(cell.seed, "world"), ctx.device)
        outcomes = {}
        for name, (sae, fitted) in self.fitted(world, cell, ctx).items():
            outcomes[self.result_name(name)] = outcome = self.evaluate(sae, world, cell, ctx)
            outcome.seconds["fit"], outcome.cut = fitted.seconds, fitted.cut
            outcome.curves = [(s, f"sae/{n}", v) for s, n, v in fitted.history]
            outcome.add_fit(fitted)
            m = outcome.metrics
            shown = ", ".join(
                f"{title} {m[key]:.3f}"
                for title, key in (("MCC", "truth_mcc"), ("F1", "truth_f1"))
                if m.get(key) is not None
            )
            ctx.console.say(f"  {name}: {shown} (fitted in {fitted.seconds:.0f} s)")
        return outcomes

    def rows(self, world: World, n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """``n`` rows and the truth about them."""
        acts = world.acts(n, seed)
        return world.rows(acts, seed + 1), acts

    def fitted(self, world: World, cell: Cell, ctx: Context) -> dict[str, tuple[SAE, FitReport]]:
        """The SAEs of a cell: from the cache, or all of them fitted now in one pass."""
        width = self.world.width
        saes = {
            name: sae_spec.seeded(width, width, cell.seed).to(ctx.device)
            for name, sae_spec in self.saes.items()
        }
        source = source_digest(
            *code_of(self.saes, saes), training, fit, planted, sae_spec_module, alone=[__name__]
        )
        key = {
            "what": "planted",
            "world": asdict(self.world),
            "train": asdict(self.train),
            "seed": cell.seed,
            "torch": torch.__version__,
            "rows": [self.calibration_rows, self.dead_after_frac],
            "saes": {n: a.describe() for n, a in self.saes.items()},
            "device": ctx.device.type,
            "source": source,
        }
        folder = cached(
            ctx.cache, "fits", key, lambda part: self._fit(part, saes, world, cell, ctx)
        )
        reports = read_json(folder / "fits.json")
        for name, sae in saes.items():
            sae.load_state_dict(load_file(folder / f"{name}.safetensors", device=str(ctx.device)))
            sae.eval().requires_grad_(False)
        return {name: (sae, FitReport(**reports[name])) for name, sae in saes.items()}

    def _fit(
        self, part: Path, saes: dict[str, SAE], world: World, cell: Cell, ctx: Context
    ) -> bool:
        def batch_at(step: int) -> Batch:
            x, _ = self.rows(world, self.train.batch_size, seed_of(cell.seed, "rows", step))
            return Batch(x, x)

        x, held = (
            self.rows(world, self.calibration_rows, seed_of(cell.seed, what))[0]
            for what in ("initial", "calibration")
        )
        with ctx.session(f"fit {listed(list(saes))}", "sae") as session:
            session.checkpoint = part / "checkpoint.safetensors"
            reports = fit_saes(
                saes,
                batch_at,
                {n: sae_spec.config(self.train) for n, sae_spec in self.saes.items()},
                Sample(x, x, held),
                seed=cell.seed,
                dead_after=round(self.dead_after_frac * self.train.steps * self.train.batch_size),
                session=session,
            )
        for name, sae in saes.items():
            write_bytes(
                part / f"{name}.safetensors",
                save(
                    {k: v.detach().cpu().contiguous().clone() for k, v in sae.state_dict().items()}
                ),
            )
        write_json(part / "fits.json", {name: r._asdict() for name, r in reports.items()})
        cut = any(r.cut for r in reports.values())
        if not cut:
            (part / "checkpoint.safetensors").unlink(missing_ok=True)
        return not cut

    def evaluate(self, sae: SAE, world: World, cell: Cell, ctx: Context) -> Outcome:
        """All metrics of one SAE on rows that no SAE was fitted to."""
        x, acts = self.rows(world, self.held_out_rows, rows_seed(cell.seed, self.held_out))
        evaluation = EvalContext(
            sae=sae, device=ctx.device, x=x, extras={"truth": Truth(world.directions, acts)}
        )
        outcome = Outcome(facts=facts.of_sae(sae))
        outcome.measure(self.metrics, evaluation, ctx.ends)
        return outcome

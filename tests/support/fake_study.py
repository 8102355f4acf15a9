"""A study of cells that do next to nothing, which other processes can import."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from sae_experiments.errors import NonFinite, UserError
from sae_experiments.fitting.spec import SAESpec
from sae_experiments.metric_info import MetricInfo
from sae_experiments.resources import Need
from sae_experiments.studies.base import Cell, Context, Outcome

INFO = [MetricInfo(name="loss", title="loss", formula="f", unit="nat", better="down")]


@dataclass
class FakeStudy:
    """Cells of two datasets and some seeds, each of which does what `acts` says."""

    seeds: tuple[int, ...] = (0, 1)
    names: tuple[str, ...] = ("a", "b")
    acts: dict[str, str] = field(default_factory=dict)
    """What a cell does, by "dataset seed": nan, memory, mistake, bug, kill, sleep or nothing."""
    memory: float = 0.0
    """Bytes that every cell announces."""
    seconds: float = 0.0
    """Time that every cell takes."""
    saes: dict[str, SAESpec] = field(default_factory=dict)
    """No SAE is fitted."""

    def check(self) -> None:
        """Nothing can be wrong."""

    def prepare(self, ctx: Context) -> dict[str, Any]:
        """Provenance of the texts."""
        ctx.announce("a fake cell", Need({"all": self.memory}), "use less")
        return {name: {"corpus": name, "stand_in": False} for name in self.names}

    def cells(self) -> list[Cell]:
        """Every seed of the first text, then of the next."""
        return [Cell(name, seed, (name,)) for name in self.names for seed in self.seeds]

    def infos(self) -> list[MetricInfo]:
        """One metric."""
        return INFO

    def run(self, cell: Cell, ctx: Context) -> dict[str, Outcome]:
        """Do what the cell is to do, then report a number that depends on arithmetic."""
        print(f"printed by {cell.dataset} {cell.seed}")
        with ctx.console.stage("working") as tick:
            for done in range(10):
                time.sleep(self.seconds / 10)
                tick(done + 1, 10)
        ctx.log(0, {"loss": 1.0})
        self._act(self.acts.get(f"{cell.dataset} {cell.seed}", ""))
        torch.manual_seed(cell.seed)
        rows = torch.randn(300, 4000)
        loss = float((rows @ rows.t()).sum() / 1e6)
        return {
            cell.dataset: Outcome(
                metrics={"loss": loss},
                curves=[(0, "loss", loss)],
                seconds={"fit": 0.5},
                facts={"threads": torch.get_num_threads(), "pid": os.getpid()},
            )
        }

    @staticmethod
    def _act(what: str) -> None:
        if what == "nan":
            raise NonFinite("loss is not finite at step 3")
        if what == "memory":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 1 TB")
        if what == "mistake":
            raise UserError("sae.k=0 must be at least 1")
        if what == "bug":
            raise ZeroDivisionError("by zero")
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "sleep":
            time.sleep(120)

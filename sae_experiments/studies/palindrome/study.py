"""A palindrome task: a one-layer transformer learns ``<abc|cba>``, and SAEs learn its MLP output, all positions in one vector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor

from sae_experiments.cache import cached
from sae_experiments.conditions import OF_MODEL_ON_ROWS, OF_MODEL_TIME, OF_SAE_TIME, ON_ACTIVATIONS
from sae_experiments.console import listed
from sae_experiments.errors import UserError
from sae_experiments.files import read_json, write_bytes, write_json
from sae_experiments.fitting import fit
from sae_experiments.fitting import spec as sae_spec_module
from sae_experiments.fitting.fit import FitReport, Sample, fit_saes
from sae_experiments.fitting.spec import FitSpec, SAESpec, code_of
from sae_experiments.metric_info import MetricInfo
from sae_experiments.models import gpt2 as lm
from sae_experiments.models.gpt2 import LMLearner, LMSpec, build_lm
from sae_experiments.models.hooks import Site, activations
from sae_experiments.saes.base import SAE, Batch
from sae_experiments.sampling import spread_rows
from sae_experiments.source import source_digest
from sae_experiments.studies import conditions as facts
from sae_experiments.studies.base import Cell, Context, Outcome, check_held_out, part_of
from sae_experiments.studies.palindrome import selectivity, strings
from sae_experiments.studies.palindrome.selectivity import Analysis
from sae_experiments.studies.palindrome.strings import (
    FLOOR,
    LENGTH,
    MIRROR,
    SYMBOLS,
    Strings,
    rows_at,
)
from sae_experiments.training import loop as training
from sae_experiments.training.loop import Session, TrainConfig, seed_of, train

SITE = Site("mlp_out", 1)


class PalindromeLearner(LMLearner):
    """Next-character cross-entropy over the strings; evaluated on all test strings."""

    def __init__(
        self,
        model: torch.nn.Module,
        train_strings: Tensor,
        test_strings: Tensor,
        spec: LMSpec,
        cfg: TrainConfig,
        *,
        seed: int,
    ) -> None:
        super().__init__(model, None, spec, cfg, seed=seed)  # type: ignore[arg-type] (no corpus: batch and evaluate are its only readers)
        self.train_strings, self.test_strings = train_strings, test_strings

    def batch_at(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets (B, 8)."""
        rows = rows_at(
            len(self.train_strings), step, self.cfg.batch_size, seed_of(self.seed, "batches")
        )
        return split_ids(self.train_strings[rows.to(self.train_strings.device)])

    def evaluate(self, step: int) -> dict[str, float]:
        scored = score(self.module, self.test_strings)
        return {"test_loss": scored["test_loss"], "mirror_accuracy": scored["mirror_accuracy"]}


def split_ids(ids: Tensor) -> tuple[Tensor, Tensor]:
    """What the model reads and what it predicts, (N, 8) each."""
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


@torch.no_grad()
def score(model: torch.nn.Module, ids: Tensor) -> dict[str, float]:
    """Loss (nats a token), its excess over the floor, and the accuracy on the mirrored half."""
    model.eval()
    x, y = split_ids(ids)
    logits = model(input_ids=x, use_cache=False).logits.float()
    loss = float(F.cross_entropy(logits.flatten(0, 1), y.flatten()))
    right = (logits.argmax(-1) == y)[:, MIRROR]
    return {
        "test_loss": loss,
        "excess_loss": loss - FLOOR,
        "mirror_accuracy": float(right.float().mean()),
    }


@dataclass(frozen=True, kw_only=True)
class Palindrome:
    """Cells are seeds of the one dataset; a seed decides the split, the weights and the batches."""

    data: Strings
    lm: LMSpec
    train: TrainConfig
    saes: Mapping[str, SAESpec]
    fit: FitSpec
    center: bool  # take the training strings' mean out of the vectors first: nearly all of their square is the mean
    analysis: Analysis
    seeds: Sequence[int] | None
    held_out: str = "val"

    @property
    def width(self) -> int:
        """Width of the vector an SAE reads: all positions of the MLP output."""
        return (LENGTH - 1) * self.lm.n_embd

    def check(self) -> None:
        if self.lm.n_layer != 1:
            raise UserError(
                f"study.lm.n_layer={self.lm.n_layer}: this study reads a model of one layer"
            )
        if self.lm.n_positions < LENGTH - 1:
            raise UserError(
                f"study.lm.n_positions={self.lm.n_positions} must be at least {LENGTH - 1}"
            )
        check_held_out(self.held_out)
        n_train, n_test = len(self.data.parts(0)[0]), len(self.shown(self.data.parts(0)[1]))
        left, batch = n_train - self.fit.calibration_rows, self.fit.train.batch_size
        if left < batch:
            raise UserError(
                f"study.fit.calibration_rows={self.fit.calibration_rows} leaves {max(left, 0):,} of the {n_train:,} training strings, "
                f"fewer than study.fit.train.batch_size={batch}: use at most {n_train - batch}"
            )
        for name in ("strongest", "samples"):
            if not 1 <= getattr(self.analysis, name) <= n_test:
                raise UserError(
                    f"study.analysis.{name}={getattr(self.analysis, name)} must lie between 1 and the {n_test} test strings"
                )
        for sae_spec in self.saes.values():
            sae_spec.check(self.width, self.width, self.fit.train)

    def shown(self, strings: Tensor) -> Tensor:
        """Those of the test strings that are evaluated on; a search sees every second one, and its winner is reported on the others."""
        return strings if self.held_out == "val" else strings[self.held_out == "test" :: 2]

    def prepare(self, ctx: Context) -> dict[str, Any]:
        return {
            self.result_name(sae): {
                "corpus": f"palindromes-{self.data.split}",
                "stand_in": False,
                "symbols": len(SYMBOLS),
                **part_of(self.held_out),
            }
            for sae in self.saes
        }

    def result_name(self, sae: str) -> str:
        """The name results appear under."""
        return "palindrome" if len(self.saes) == 1 else f"palindrome.{sae}"

    def cells(self) -> list[Cell]:
        return [
            Cell("palindrome", seed, tuple(self.result_name(sae) for sae in self.saes))
            for seed in (self.seeds if self.seeds is not None else [0])
        ]

    def infos(self) -> list[MetricInfo]:
        return [*INFO, *selectivity.INFO]

    def run(self, cell: Cell, ctx: Context) -> dict[str, Outcome]:
        parts = tuple(ids.to(ctx.device) for ids in self.data.parts(seed_of(cell.seed, "split")))
        model, info, key = self.trained(parts, cell.seed, ctx)
        parts = parts[0], self.shown(parts[1])
        scored = score(model, parts[1])
        ctx.console.say(
            f"  transformer: excess {scored['excess_loss']:.4f} nats, mirrored half {scored['mirror_accuracy']:.2%} in {info['seconds']:.0f} s"
        )
        looked = selectivity.look(model, spread_rows(parts[1], self.analysis.samples), parts[1])
        x_train, x_test = (flattened(model, split_ids(ids)[0]) for ids in parts)
        mean = x_train.mean(0) if self.center else 0.0
        x_train, x_test = x_train - mean, x_test - mean
        saes, reports = self.fitted(x_train, key, cell.seed, ctx)
        outcomes = {}
        for name, sae in saes.items():
            outcome = Outcome(
                metrics=scored | {"lm_train_time": info["seconds"]},
                cut=info["cut"] or reports[name].cut,
                arrays=dict(looked),
            )
            outcome.curves = [(s, f"lm/{n}", v) for s, n, v in info["history"]] + [
                (s, f"sae/{n}", v) for s, n, v in reports[name].history
            ]
            outcome.seconds = {"lm": info["seconds"], "fit": reports[name].seconds}
            outcome.metrics["sae_train_time"] = reports[name].seconds
            measured = selectivity.measure(
                sae,
                torch.cat([x_train, x_test]),
                torch.cat(parts),
                len(x_test),
                self.analysis,
                mean,
            )
            outcome.metrics |= measured.scalars
            outcome.facts = self._facts(key, len(x_test)) | facts.of_sae(sae, str(SITE))
            outcome.add_fit(reports[name])
            outcome.why_null |= measured.why_null
            outcome.arrays |= measured.arrays
            outcome.features = measured.browser
            m = outcome.metrics
            explained = "-" if m["explained_variance"] is None else f"{m['explained_variance']:.4f}"
            ctx.console.say(
                f"  {name}: explained variance {explained}, alive {m['alive_latents']:.0f}/{sae.d_sae}, L0 {m['sae_l0']:.1f}"
            )
            outcomes[self.result_name(name)] = outcome
        return outcomes

    def _facts(self, key: Mapping[str, Any], rows: int) -> dict[str, Any]:
        """What the numbers depend on beside the SAE."""
        recipe = {k: key[k] for k in ("lm", "train", "cut") if k in key}
        return {
            "language model": facts.flat(recipe) | {"code": key["source"]},
            "text": facts.flat(key["data"]),
            "held-out rows": rows,
            "settings": {"center": self.center, "selective": self.analysis.selective},
        }

    def trained(
        self, parts: tuple[Tensor, ...], seed: int, ctx: Context
    ) -> tuple[torch.nn.Module, dict[str, Any], dict[str, Any]]:
        """The transformer: from the cache, or trained now, continuing where a killed process stopped."""
        key = {
            "what": "palindrome",
            "data": asdict(self.data),
            "lm": asdict(self.lm),
            "train": asdict(self.train),
            "seed": seed,
            "device": ctx.device.type,
            "torch": torch.__version__,
            "source": source_digest(strings, lm, training, alone=[__name__]),
        }
        model = build_lm(self.lm, len(SYMBOLS), seed=seed_of(seed, "lm")).to(ctx.device)

        def make(part: Path) -> bool:
            learner = PalindromeLearner(model, *parts, self.lm, self.train, seed=seed)
            with ctx.session("transformer", "lm", share=0.6) as session:
                checkpoint = part / "checkpoint.safetensors"
                progress = train(
                    [learner],
                    learner.batch_at,
                    self.train,
                    Session(session.log, session.tick, checkpoint, session.deadline),
                )
            write_bytes(part / "model.safetensors", tensors_of(model))
            write_json(
                part / "info.json",
                {
                    "seconds": progress.seconds,
                    "cut": progress.cut,
                    "history": progress.history,
                    "step": progress.step,
                },
            )
            if not progress.cut:
                checkpoint.unlink(missing_ok=True)
            return not progress.cut

        folder = cached(ctx.cache, "palindromes", key, make)
        info = read_json(folder / "info.json")
        model.load_state_dict(load_file(folder / "model.safetensors", device=str(ctx.device)))
        return model.eval(), info, key | ({"cut": info["step"]} if info["cut"] else {})

    def split(self, x: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Rows (N, D) of the training strings that SAEs are fitted to, and those they are calibrated on, drawn at random."""
        order = torch.randperm(
            len(x), generator=torch.Generator().manual_seed(seed_of(seed, "calibration"))
        ).to(x.device)
        n = self.fit.calibration_rows
        return x[order[n : n + self.fit.train_rows]], x[order[:n]]

    def fitted(
        self, x: Tensor, key: Mapping[str, Any], seed: int, ctx: Context
    ) -> tuple[dict[str, SAE], dict[str, FitReport]]:
        """The SAEs: from the cache, or fitted now in one pass over the training strings but for those kept to calibrate on."""
        saes = {
            name: sae_spec.seeded(self.width, self.width, seed).to(ctx.device)
            for name, sae_spec in self.saes.items()
        }
        full = {
            "what": "palindrome SAEs",
            "of": dict(key),
            "center": self.center,
            "saes": {n: sae_spec.describe() for n, sae_spec in self.saes.items()},
            "fit": asdict(self.fit),
            "source": source_digest(*code_of(self.saes, saes), fit, training, sae_spec_module),
        }
        cfg = self.fit.train
        learned, held = self.split(x, seed)

        def batch_at(step: int) -> Batch:
            rows = learned[
                rows_at(len(learned), step, cfg.batch_size, seed_of(seed, "rows")).to(x.device)
            ]
            return Batch(rows, rows)

        def make(part: Path) -> bool:
            few = spread_rows(learned, self.fit.init_rows)
            with ctx.session(f"fit {listed(list(saes))}", "sae") as session:
                session.checkpoint = part / "checkpoint.safetensors"
                configs = {name: sae_spec.config(cfg) for name, sae_spec in self.saes.items()}
                sample = Sample(few, few, held)
                found = fit_saes(
                    saes,
                    batch_at,
                    configs,
                    sample,
                    seed=seed,
                    dead_after=self.fit.dead_after,
                    scale=self.fit.scale,
                    session=session,
                )
            for name, sae in saes.items():
                write_bytes(part / f"{name}.safetensors", tensors_of(sae))
            write_json(
                part / "fits.json", {name: report._asdict() for name, report in found.items()}
            )
            cut = any(report.cut for report in found.values())
            if not cut:
                session.checkpoint.unlink(missing_ok=True)
            return not cut

        folder = cached(ctx.cache, "fits", full, make)
        for name, sae in saes.items():
            sae.load_state_dict(load_file(folder / f"{name}.safetensors", device=str(ctx.device)))
            sae.eval().requires_grad_(False)
        return saes, {
            name: FitReport(**report) for name, report in read_json(folder / "fits.json").items()
        }


def tensors_of(module: torch.nn.Module) -> bytes:
    """A module's state as safetensors (tied weights as copies)."""
    return save({k: v.detach().cpu().contiguous().clone() for k, v in module.state_dict().items()})


def flattened(model: torch.nn.Module, x: Tensor, rows: int = 2048) -> Tensor:
    """The MLP output at all positions of every string, (N, 8 * width)."""
    with torch.no_grad():
        return torch.cat(
            [activations(model, part, [SITE])[SITE].flatten(1) for part in x.split(rows)]
        )


def _info(
    name: str,
    title: str,
    formula: str,
    unit: str,
    better: Any,
    *,
    shown: bool = True,
    depends: tuple[str, ...] = ON_ACTIVATIONS,
) -> MetricInfo:
    return MetricInfo(
        name=name,
        title=title,
        formula=formula,
        unit=unit,
        better=better,
        shown=shown,
        depends=depends,
    )


INFO = [
    _info(
        "excess_loss",
        "excess loss",
        "test_loss - 3 log(26) / 8, the least that is possible",
        "nat/char",
        "down",
        depends=OF_MODEL_ON_ROWS,
    ),
    _info(
        "mirror_accuracy",
        "mirrored half",
        "share of the mirrored letters of the test strings that the model ranks first",
        "",
        "up",
        depends=OF_MODEL_ON_ROWS,
    ),
    _info(
        "test_loss",
        "test loss",
        "mean cross-entropy of the characters of the test strings",
        "nat/char",
        "down",
        depends=OF_MODEL_ON_ROWS,
    ),
    _info(
        "lm_train_time",
        "LM time",
        "seconds of training the transformer",
        "s",
        "down",
        shown=False,
        depends=OF_MODEL_TIME,
    ),
    _info(
        "sae_train_time",
        "SAE time",
        "seconds of the SAE's training",
        "s",
        "down",
        shown=False,
        depends=OF_SAE_TIME,
    ),
]

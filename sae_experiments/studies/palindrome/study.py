"""A palindrome task: a one-layer transformer learns `<abc|cba>`, and SAEs learn its MLP output.

An SAE reads the outputs at all positions as one vector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from sae_experiments.cache import entry
from sae_experiments.conditions import OF_MODEL_ON_ROWS, OF_MODEL_TIME, OF_SAE_TIME
from sae_experiments.console import listed, took
from sae_experiments.errors import UserError
from sae_experiments.files import read_json, write_bytes, write_json
from sae_experiments.fitting import cached as cached_module
from sae_experiments.fitting import fit
from sae_experiments.fitting import spec as sae_spec_module
from sae_experiments.fitting.cached import fit_cached
from sae_experiments.fitting.fit import FitReport, Sample, fit_saes
from sae_experiments.fitting.spec import FitSpec, SAESpec, code_of
from sae_experiments.metric_info import MetricInfo, info
from sae_experiments.metrics.base import EvalContext, Metric
from sae_experiments.models import gpt2 as lm
from sae_experiments.models.gpt2 import GPT2LMHeadModel, LMLearner, LMSpec, build_lm
from sae_experiments.models.hooks import Site, activations
from sae_experiments.models.layouts import CausalLM, moved
from sae_experiments.saes.base import SAE, Batch
from sae_experiments.sampling import spread_rows
from sae_experiments.source import source_digest
from sae_experiments.studies import conditions as facts
from sae_experiments.studies.base import (
    Cell,
    Context,
    Outcome,
    check_held_out,
    infos_of,
    part_of,
)
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
from sae_experiments.training.checkpoint import tensors_of
from sae_experiments.training.loop import TrainConfig, seed_of, train

SITE = Site("mlp_out", 1)


class PalindromeLearner(LMLearner):
    """Next-character cross-entropy over the strings; evaluated on all test strings."""

    def __init__(
        self,
        model: GPT2LMHeadModel,
        train_strings: Tensor,
        test_strings: Tensor,
        spec: LMSpec,
        cfg: TrainConfig,
        *,
        seed: int,
    ) -> None:
        # Without a corpus, which only methods that are overridden here would read.
        super().__init__(model, None, spec, cfg, seed=seed)  # pyright: ignore[reportArgumentType]
        self.train_strings = train_strings
        self.test_strings = test_strings

    def batch_at(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets (B, 8)."""
        n = len(self.train_strings)
        rows = rows_at(n, step, self.cfg.batch_size, seed_of(self.seed, "batches"))
        return split_ids(self.train_strings[rows.to(self.train_strings.device)])

    def evaluate(self, step: int) -> dict[str, float]:
        scored = score(self.model, self.test_strings)
        return {"test_loss": scored["test_loss"], "mirror_accuracy": scored["mirror_accuracy"]}


def split_ids(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and targets of the model, (N, 8) each, of strings (N, 9)."""
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


@torch.no_grad()
def score(model: CausalLM, ids: Tensor) -> dict[str, float]:
    """Loss in nats per token, its excess over the floor, and accuracy on the mirrored half."""
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
    """The palindrome study.

    Its cells are the seeds of one dataset; a seed decides the split, the weights and the batches.
    """

    data: Strings
    """Split of the strings."""
    lm: LMSpec
    """The transformer."""
    train: TrainConfig
    """Optimisation of the transformer."""
    saes: Mapping[str, SAESpec]
    """SAEs by name."""
    fit: FitSpec
    """Fits of the SAEs."""
    center: bool
    """Subtract the mean over training strings from the vectors; it is most of their square."""
    analysis: Analysis
    """Size of the analysis."""
    seeds: Sequence[int] | None
    """Seeds; None: 0 alone."""
    held_out: str = "val"
    """Held-out part of the test strings, one of `HELD_OUT`."""
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    """Further metrics of the SAEs by name, measured on the vectors of the test strings."""

    @property
    def width(self) -> int:
        """Width of the vectors that SAEs read: the MLP output at all positions."""
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
                f"study.fit.calibration_rows={self.fit.calibration_rows} leaves {max(left, 0):,} "
                f"of the {n_train:,} training strings, fewer than "
                f"study.fit.train.batch_size={batch}: use at most {n_train - batch}"
            )
        for name in ("strongest", "samples"):
            value = getattr(self.analysis, name)
            if not 1 <= value <= n_test:
                raise UserError(
                    f"study.analysis.{name}={value} must lie between 1 and the {n_test} test "
                    "strings"
                )
        for sae_spec in self.saes.values():
            sae_spec.check(self.width, self.width, self.fit.train)

    def shown(self, strings: Tensor) -> Tensor:
        """The test strings that are evaluated on.

        A search evaluates on every second one, and its winner is reported on the others.
        """
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
        """Name of an SAE's results."""
        return "palindrome" if len(self.saes) == 1 else f"palindrome.{sae}"

    def cells(self) -> list[Cell]:
        return [
            Cell("palindrome", seed, tuple(self.result_name(sae) for sae in self.saes))
            for seed in (self.seeds if self.seeds is not None else [0])
        ]

    def infos(self) -> list[MetricInfo]:
        return [*INFO, *selectivity.INFO, *infos_of(self.metrics.values())]

    def run(self, cell: Cell, ctx: Context) -> dict[str, Outcome]:
        train_ids, test_ids = self.data.parts(seed_of(cell.seed, "split"))
        parts = train_ids.to(ctx.device), test_ids.to(ctx.device)
        model, info, key = self.trained(parts, cell.seed, ctx)
        parts = parts[0], self.shown(parts[1])
        scored = score(model, parts[1])
        excess, mirrored = scored["excess_loss"], scored["mirror_accuracy"]
        ctx.console.say(
            f"  transformer: excess {excess:.4f} nats, mirrored half {mirrored:.2%} "
            f"({took('trained', info['seconds'], from_cache=info['from_cache'])})"
        )
        samples = spread_rows(parts[1], self.analysis.samples)
        arrays = selectivity.look(model, samples, parts[1])
        x_train, x_test = (flattened(model, split_ids(ids)[0]) for ids in parts)
        mean = x_train.mean(0) if self.center else 0.0
        x_train, x_test = x_train - mean, x_test - mean
        x, strings_of_x = torch.cat([x_train, x_test]), torch.cat(parts)
        outcomes = {}
        for name, (sae, report) in self.fitted(x_train, key, cell.seed, ctx).items():
            measured = selectivity.measure(sae, x, strings_of_x, len(x_test), self.analysis, mean)
            times = {"lm_train_time": info["seconds"], "sae_train_time": report.seconds}
            outcome = Outcome(
                metrics=scored | times | measured.scalars,
                why_null=measured.why_null,
                seconds={"lm": info["seconds"], "fit": report.seconds},
                arrays=arrays | measured.arrays,
                curves=[(step, f"lm/{n}", value) for step, n, value in info["history"]],
                features=measured.browser,
                facts=self._facts(key, len(x_test)) | facts.of_sae(sae, str(SITE)),
                cut=info["cut"] or report.cut,
            )
            outcome.curves += [(step, f"sae/{n}", value) for step, n, value in report.history]
            outcome.add_fit(report)
            evaluation = EvalContext(sae=sae, device=ctx.device, x=x_test)
            outcome.measure(self.metrics, evaluation, ctx.ends)
            outcomes[self.result_name(name)] = outcome
            _say_measured(name, sae, outcome.metrics, ctx)
        return outcomes

    def _facts(self, key: Mapping[str, Any], rows: int) -> dict[str, Any]:
        """Conditions of the numbers, beside the SAE."""
        recipe = {k: key[k] for k in ("lm", "train", "cut") if k in key}
        return {
            "language model": facts.flat(recipe) | {"code": key["source"]},
            "text": facts.flat(key["data"]),
            "held-out rows": rows,
            "settings": {"center": self.center, "selective": self.analysis.selective},
        }

    def trained(
        self, parts: tuple[Tensor, Tensor], seed: int, ctx: Context
    ) -> tuple[GPT2LMHeadModel, dict[str, Any], dict[str, Any]]:
        """The transformer, from the cache or trained now.

        Training continues where a killed process stopped.

        Args:
            parts: Training and test strings.
            seed: Seed of the cell.
            ctx: Context of the run.

        Returns:
            The transformer, the information on its training, and its key in the cache.
        """
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
        model = build_lm(self.lm, len(SYMBOLS), seed=seed_of(seed, "lm"))
        model = moved(model, ctx.device)

        def make(part: Path) -> bool:
            learner = PalindromeLearner(model, *parts, self.lm, self.train, seed=seed)
            with ctx.session("transformer", "lm", share=0.6) as session:
                checkpoint = part / "checkpoint.safetensors"
                session = replace(session, checkpoint=checkpoint)
                progress = train([learner], learner.batch_at, self.train, session)
            write_bytes(part / "model.safetensors", tensors_of(model))
            names = ("seconds", "cut", "history", "step")
            write_json(part / "info.json", {name: getattr(progress, name) for name in names})
            if not progress.cut:
                checkpoint.unlink(missing_ok=True)
            return not progress.cut

        folder, was_there = entry(ctx.cache, "palindromes", key, make)
        info = read_json(folder / "info.json") | {"from_cache": was_there}
        model.load_state_dict(load_file(folder / "model.safetensors", device=str(ctx.device)))
        return model.eval(), info, key | ({"cut": info["step"]} if info["cut"] else {})

    def split(self, x: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Divide rows (N, D) at random into those to fit SAEs to and those to calibrate them on."""
        generator = torch.Generator().manual_seed(seed_of(seed, "calibration"))
        order = torch.randperm(len(x), generator=generator).to(x.device)
        n = self.fit.calibration_rows
        return x[order[n : n + self.fit.train_rows]], x[order[:n]]

    def fitted(
        self, x: Tensor, key: Mapping[str, Any], seed: int, ctx: Context
    ) -> dict[str, tuple[SAE, FitReport]]:
        """The SAEs, from the cache or fitted now in one pass.

        Args:
            x: Vectors of the training strings, (N, D).
            key: Key of the transformer in the cache.
            seed: Seed of the cell.
            ctx: Context of the run.
        """
        saes = {
            name: sae_spec.seeded(self.width, self.width, seed).to(ctx.device)
            for name, sae_spec in self.saes.items()
        }
        modules = (*code_of(self.saes, saes), fit, cached_module, training, sae_spec_module)
        fit_key = {
            "what": "palindrome SAEs",
            "of": dict(key),
            "center": self.center,
            "saes": {name: sae_spec.describe() for name, sae_spec in self.saes.items()},
            "fit": asdict(self.fit),
            "source": source_digest(*modules),
        }

        def fit_now(checkpoint: Path) -> dict[str, FitReport]:
            return self._fit(checkpoint, saes, x, seed, ctx)

        return fit_cached(ctx.cache, fit_key, saes, fit_now)

    def _fit(
        self, checkpoint: Path, saes: Mapping[str, SAE], x: Tensor, seed: int, ctx: Context
    ) -> dict[str, FitReport]:
        """Fit the SAEs to the training strings but those kept for calibration."""
        cfg = self.fit.train
        learned, held = self.split(x, seed)
        initial = spread_rows(learned, self.fit.init_rows)

        def batch_at(step: int) -> Batch:
            rows = rows_at(len(learned), step, cfg.batch_size, seed_of(seed, "rows"))
            batch = learned[rows.to(x.device)]
            return Batch(batch, batch)

        with ctx.session(f"fit {listed(list(saes))}", "sae") as session:
            session.checkpoint = checkpoint
            return fit_saes(
                saes,
                batch_at,
                {name: sae_spec.config(cfg) for name, sae_spec in self.saes.items()},
                Sample(initial, initial, held),
                seed=seed,
                dead_after=self.fit.dead_after,
                handling=self.fit.handling,
                backend=self.fit.backend,
                session=session,
            )


def _say_measured(name: str, sae: SAE, metrics: Mapping[str, float | None], ctx: Context) -> None:
    """Print the main numbers of an SAE."""
    explained = metrics["explained_variance"]
    shown = "-" if explained is None else f"{explained:.4f}"
    ctx.console.say(
        f"  {name}: explained variance {shown}, alive {metrics['alive_latents']:.0f}/{sae.d_sae}, "
        f"L0 {metrics['sae_l0']:.1f}"
    )


def flattened(model: CausalLM, x: Tensor, rows: int = 2048) -> Tensor:
    """MLP output at all positions of strings (N, 8), as (N, 8 C); `rows` strings at once."""
    with torch.no_grad():
        parts = [activations(model, part, [SITE])[SITE].flatten(1) for part in x.split(rows)]
    return torch.cat(parts)


INFO = [
    info(
        "excess_loss",
        "excess loss",
        "test_loss - 3 log(26) / 8, the least that is possible",
        "down",
        unit="nat/char",
        depends=OF_MODEL_ON_ROWS,
    ),
    info(
        "mirror_accuracy",
        "mirrored half",
        "share of the mirrored letters of the test strings that the model ranks first",
        "up",
        depends=OF_MODEL_ON_ROWS,
    ),
    info(
        "test_loss",
        "test loss",
        "mean cross-entropy of the characters of the test strings",
        "down",
        unit="nat/char",
        depends=OF_MODEL_ON_ROWS,
    ),
    info(
        "lm_train_time",
        "LM time",
        "seconds of training the transformer",
        "down",
        unit="s",
        shown=False,
        depends=OF_MODEL_TIME,
    ),
    info(
        "sae_train_time",
        "SAE time",
        "seconds of the SAE's training",
        "down",
        unit="s",
        shown=False,
        depends=OF_SAE_TIME,
    ),
]

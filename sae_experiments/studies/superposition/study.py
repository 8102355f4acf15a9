"""Toy models of superposition with tree-structured features, over depths and hidden sizes.

All models of a family of features are trained together. Results are the number of hidden units that
each tree needs, the way features share these, and the part of a known tree that an SAE on the
hidden layer recovers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from sae_experiments.cache import entry
from sae_experiments.conditions import OF_MODEL, OF_MODEL_TIME
from sae_experiments.console import took
from sae_experiments.errors import UserError
from sae_experiments.files import digest, read_json, write_bytes, write_json
from sae_experiments.fitting.fit import FitReport, Sample, fit_saes
from sae_experiments.fitting.spec import SAESpec
from sae_experiments.metric_info import MetricInfo, info
from sae_experiments.metrics.base import EvalContext, Metric
from sae_experiments.resources import Need
from sae_experiments.saes.base import SAE, Batch
from sae_experiments.saes.ops import unit_rows
from sae_experiments.source import source_digest
from sae_experiments.studies import conditions as facts
from sae_experiments.studies.base import (
    Cell,
    Context,
    Outcome,
    check_held_out,
    infos_of,
    part_of,
    rows_seed,
)
from sae_experiments.studies.superposition import toy, toy_step, trees
from sae_experiments.studies.superposition.toy import ToyLearner
from sae_experiments.studies.superposition.trees import Features
from sae_experiments.training import loop as training
from sae_experiments.training.checkpoint import tensors_of
from sae_experiments.training.loop import TrainConfig, seed_of, train

#: Losses (instances,) by depth and hidden size.
Losses = dict[tuple[int, int], np.ndarray]
#: Most features of a tree.
MAX_FEATURES = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """The SAEs on the hidden layer of one configuration's best instance.

    A feature is recovered if the decoder row of a latent has a cosine of at least `match` with it.
    """

    depth: int
    """Depth of the configuration."""
    hidden: int
    """Hidden units of the configuration."""
    rows: int
    """Held-out rows, and as many to initialise from and to calibrate on."""
    match: float
    """Cosine from which a feature is recovered."""
    min_norm: float
    """Length below which a feature's direction does not represent it: it cannot be recovered, and
    does not count in MMCS."""
    dead_after_frac: float
    """Share of the rows of the fit without firing after which a latent is dead."""
    train: TrainConfig
    """Optimisation of the SAEs."""


@dataclass(frozen=True, kw_only=True)
class Superposition:
    """The study of superposition.

    Its cells are pairs of a family of features and a seed. A cell trains every configuration, a
    pair of depth and hidden size, `instances` times in one pass.
    """

    families: Mapping[str, Features]
    """Families of features by name."""
    depths: Sequence[int]
    """Depths of the trees."""
    hidden: Sequence[int]
    """Hidden sizes."""
    instances: int
    """Models per configuration."""
    init: str
    """Xavier-normal of each `matrix`, or `stacked`: of the (instances, hidden, features) tensor, as
    PyTorch counts its fans."""
    threshold: float
    """Loss below which a configuration counts as solved."""
    eval_rows: int
    """Samples of the final loss, where it is not exact."""
    train: TrainConfig
    """Optimisation of the toy models."""
    probe: Probe
    """The SAEs."""
    saes: Mapping[str, SAESpec]
    """SAEs by name."""
    seeds: Sequence[int] | None
    """Seeds; None: 0 alone."""
    held_out: str = "val"
    """Held-out part of the rows, one of `HELD_OUT`."""
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    """Further metrics of the SAEs by name, measured on the held-out rows of the hidden layer."""

    def check(self) -> None:
        check_held_out(self.held_out)
        self._check_sweep()
        for name, features in self.families.items():
            sizes = {depth: features.n_features(depth) for depth in self.depths}
            self._check_sizes(name, sizes)
            if not features.marginals(max(self.depths)).any():
                raise UserError(
                    f"study.families.{name}.probability={features.probability}: "
                    "no feature is ever on"
                )
        probed = (self.probe.depth, self.probe.hidden)
        if probed not in self.shapes(next(iter(self.families.values()))):
            raise UserError(
                f"study.probe: depth={probed[0]} with hidden={probed[1]} is not a configuration "
                "of the sweep"
            )
        for sae_spec in self.saes.values():
            sae_spec.check(self.probe.hidden, self.probe.hidden, self.probe.train)

    def _check_sweep(self) -> None:
        if not self.families:
            raise UserError("study.families names no family of features")
        for name, values in (("depths", self.depths), ("hidden", self.hidden)):
            if not values or min(values) < 1 or len(set(values)) < len(values):
                raise UserError(
                    f"study.{name}={list(values)} must list different whole numbers of at least 1"
                )
        for name in ("instances", "eval_rows"):
            if getattr(self, name) < 1:
                raise UserError(f"study.{name}={getattr(self, name)} must be at least 1")
        if self.init not in toy.INITS:
            raise UserError(f"study.init={self.init!r} is not one of {', '.join(toy.INITS)}")

    def _check_sizes(self, name: str, sizes: Mapping[int, int]) -> None:
        """Check hidden sizes against the number of features by depth.

        A hidden size above the features of some depths is left out there. One above those of all
        depths is a mistake, and so is a depth without any hidden size.
        """
        largest, smallest = max(self.hidden), min(self.hidden)
        if largest > max(sizes.values()):
            raise UserError(
                f"study.hidden={largest} exceeds the {max(sizes.values())} features of the "
                f"deepest tree of {name}"
            )
        for depth, n in sizes.items():
            if smallest > n:
                raise UserError(
                    f"study.hidden={smallest} exceeds the {n} features of depth {depth} of {name}: "
                    "leave the depth out"
                )
            if n > MAX_FEATURES:
                raise UserError(
                    f"study.depths={depth} with branching={self.families[name].branching} makes "
                    f"{n:,} features: at most {MAX_FEATURES:,} fit"
                )

    def shapes(self, features: Features) -> list[tuple[int, int]]:
        """The configurations of the sweep: (depth, hidden) with at most one unit per feature."""
        return [(d, h) for d in self.depths for h in self.hidden if h <= features.n_features(d)]

    def announce(self, ctx: Context) -> None:
        """Print what the deepest tree will need.

        Raises:
            UserError: It does not fit into memory.
        """
        depth = max(self.depths)
        for name, features in self.families.items():
            sizes = {
                "instances": self.instances,
                "batch": self.train.batch_size,
                "eval_rows": self.eval_rows,
            }
            need = Need(toy.memory(self.shapes(features), features, **sizes))
            what = (
                f"family {name}: {features.n_features(depth):,} features of study.depths={depth}, "
                f"study.instances={self.instances}"
            )
            fix = "use smaller depths or branching, or fewer instances"
            ctx.announce(what, need, fix)

    def prepare(self, ctx: Context) -> dict[str, Any]:
        self.announce(ctx)
        return {
            self.result_name(name, sae): {
                "corpus": f"tree-{features.mode}",
                "stand_in": False,
                "branching": features.branching,
                **part_of(self.held_out),
            }
            for name, features in self.families.items()
            for sae in self.saes
        }

    def result_name(self, family: str, sae: str) -> str:
        """Name of results: the family's, with that of the SAE if several are fitted."""
        return family if len(self.saes) == 1 else f"{family}.{sae}"

    def cells(self) -> list[Cell]:
        seeds = self.seeds if self.seeds is not None else [0]
        return [
            Cell(name, seed, tuple(self.result_name(name, sae) for sae in self.saes))
            for name in self.families
            for seed in seeds
        ]

    def infos(self) -> list[MetricInfo]:
        smallest = [smallest_info(depth, self.threshold) for depth in self.depths]
        return [*INFO, *smallest, *infos_of(self.metrics.values())]

    def run(self, cell: Cell, ctx: Context) -> dict[str, Outcome]:
        features = self.families[cell.dataset]
        learner, losses, info = self.trained(features, cell.seed, ctx)
        outcome = Outcome(
            cut=info["cut"],
            seconds={"toy": info["seconds"]},
            curves=[(s, f"toy/{n}", v) for s, n, v in info["history"]],
        )
        outcome.metrics["toy_train_time"] = info["seconds"]
        summarise(outcome, losses, self.threshold)
        represent(outcome, learner, losses, features)
        m = outcome.metrics
        ctx.console.say(
            f"  {len(losses)} configurations x {self.instances}: loss {m['loss_mean']:.5f} "
            f"(best {m['loss_min']:.5f}), "
            f"{took('trained', info['seconds'], from_cache=info['from_cache'])}"
        )
        weights = self.hidden_directions(learner, losses)
        saes, reports = self.fitted(features, weights, cell.seed, ctx)
        outcomes = {}
        for name, sae in saes.items():
            own = self._with_fit(outcome, reports[name])
            site = f"hidden {self.probe.hidden} of depth {self.probe.depth}"
            own.facts = self._facts(features) | facts.of_sae(sae, site)
            own.add_fit(reports[name])
            self.evaluate(own, sae, features, weights, cell.seed, ctx)
            mmcs, recovered = own.metrics["sae_mmcs"] or 0, own.metrics["sae_recovered_frac"]
            ctx.console.say(f"  {name}: MMCS {mmcs:.3f}, {recovered:.0%} of the tree found")
            outcomes[self.result_name(cell.dataset, name)] = own
        return outcomes

    def _with_fit(self, outcome: Outcome, report: FitReport) -> Outcome:
        """A copy of the toy models' outcome, with the fit of an SAE."""
        curves = [(step, f"sae/{name}", value) for step, name, value in report.history]
        return replace(
            outcome,
            metrics=dict(outcome.metrics),
            why_null=dict(outcome.why_null),
            arrays=dict(outcome.arrays),
            noise=dict(outcome.noise),
            seconds=outcome.seconds | {"fit": report.seconds},
            curves=[*outcome.curves, *curves],
            cut=outcome.cut or report.cut,
        )

    def _facts(self, features: Features) -> dict[str, Any]:
        """Conditions of the numbers, beside the SAE."""
        shapes = self.shapes(features)
        return {
            "text": facts.flat(asdict(features)),
            "toy models": facts.flat({"train": asdict(self.train)})
            | {"init": self.init, "instances": self.instances},
            "held-out rows": self.probe.rows,
            "settings": {
                "depths": sorted({d for d, _ in shapes}),
                "hidden": sorted({h for _, h in shapes}),
                "instances": self.instances,
                "threshold": self.threshold,
                "eval_rows": self.eval_rows,
                "match": self.probe.match,
                "min_norm": self.probe.min_norm,
            },
        }

    def trained(
        self, features: Features, seed: int, ctx: Context
    ) -> tuple[ToyLearner, Losses, dict[str, Any]]:
        """All models of a family, from the cache or trained now.

        Training continues where a killed process stopped.

        Returns:
            The models, the losses (instances,) by configuration, and information on the training.
        """
        shapes = self.shapes(features)
        key = {
            "what": "toys",
            "features": asdict(features),
            "shapes": shapes,
            "instances": self.instances,
            "init": self.init,
            "train": asdict(self.train),
            "eval_rows": self.eval_rows,
            "seed": seed,
            "device": ctx.device.type,
            "torch": torch.__version__,
            "source": source_digest(toy, toy_step, trees, training, alone=[__name__]),
            "step": digest(toy_step.SOURCE.read_text(encoding="utf-8")),
        }
        learner = toy.make(
            shapes,
            features,
            self.train,
            instances=self.instances,
            init=self.init,
            seed=seed,
            device=ctx.device,
        )

        def make(part: Path) -> bool:
            with ctx.session(f"{len(shapes)} toy models", "toy", share=0.9) as session:
                checkpoint = part / "checkpoint.safetensors"
                session = replace(session, checkpoint=checkpoint)
                progress = train([learner], learner.batch_at, self.train, session)
            write_bytes(part / "models.safetensors", tensors_of(learner.module))
            losses = learner.final(self.eval_rows)
            names = ("seconds", "cut", "history")
            info = {name: getattr(progress, name) for name in names}
            info["losses"] = [[*shape, values.tolist()] for shape, values in losses.items()]
            write_json(part / "info.json", info)
            if not progress.cut:
                checkpoint.unlink(missing_ok=True)
            return not progress.cut

        folder, was_there = entry(ctx.cache, "toys", key, make)
        info = read_json(folder / "info.json") | {"from_cache": was_there}
        state = load_file(folder / "models.safetensors", device=str(ctx.device))
        learner.module.load_state_dict(state)
        losses = {(d, h): np.asarray(values) for d, h, values in info["losses"]}
        return learner, losses, info

    def hidden_directions(self, learner: ToyLearner, losses: Losses) -> Tensor:
        """W (hidden, F) of the probed configuration's best instance."""
        shape = self.probe.depth, self.probe.hidden
        best = int(losses[shape].argmin())
        return learner.module.weights(*shape)[0][best].contiguous()

    def hidden_rows(self, features: Features, weights: Tensor, n: int, seed: int) -> Tensor:
        """Hidden activations (n, hidden) of fresh samples."""
        rng = np.random.default_rng([seed & 0xFFFFFFFF, seed >> 32])
        drawn = features.draw(self.probe.depth, n, rng)[:, : weights.shape[1]]
        return torch.from_numpy(drawn).float().to(weights.device) @ weights.t()

    def fitted(
        self, features: Features, weights: Tensor, seed: int, ctx: Context
    ) -> tuple[dict[str, SAE], dict[str, FitReport]]:
        """The SAEs on the hidden layer, fitted in one pass."""
        cfg = self.probe.train
        saes = {
            name: sae_spec.seeded(self.probe.hidden, self.probe.hidden, seed).to(ctx.device)
            for name, sae_spec in self.saes.items()
        }

        def batch_at(step: int) -> Batch:
            x = self.hidden_rows(features, weights, cfg.batch_size, seed_of(seed, "probe", step))
            return Batch(x, x)

        x, held = (
            self.hidden_rows(features, weights, self.probe.rows, seed_of(seed, what))
            for what in ("initial", "calibration")
        )
        dead_after = round(self.probe.dead_after_frac * cfg.steps * cfg.batch_size)
        with ctx.session("fit SAEs", "sae") as session:
            configs = {name: sae_spec.config(cfg) for name, sae_spec in self.saes.items()}
            reports = fit_saes(
                saes,
                batch_at,
                configs,
                Sample(x, x, held),
                seed=seed,
                dead_after=dead_after,
                session=session,
            )
        return saes, reports

    @torch.no_grad()
    def evaluate(
        self,
        outcome: Outcome,
        sae: SAE,
        features: Features,
        weights: Tensor,
        seed: int,
        ctx: Context,
    ) -> None:
        """Add the error on held-out rows, the recovery of the tree, and `metrics`."""
        x = self.hidden_rows(features, weights, self.probe.rows, rows_seed(seed, self.held_out))
        acts = sae.encode(x)
        alive = (acts != 0).any(0)
        error = (x - sae.decode(acts)).square().sum() / (x - x.mean(0)).square().sum()
        outcome.metrics |= {
            "sae_l0": float((acts != 0).float().sum(1).mean()),
            "sae_fvu": float(error),
        }
        cosines = best_cosines(weights.t(), sae.W_dec[alive])
        shown = (weights.norm(dim=0) >= self.probe.min_norm).cpu().numpy()
        generator = torch.Generator().manual_seed(0)
        random = torch.randn(sae.W_dec.shape, generator=generator).to(weights.device)
        chance = best_cosines(weights.t(), random)
        for name, values in (("sae_mmcs", cosines), ("sae_mmcs_chance", chance)):
            outcome.metrics[name] = float(values[shown].mean()) if shown.any() else None
            if not shown.any():
                outcome.why_null[name] = (
                    f"no feature's direction is as long as {self.probe.min_norm}"
                )
        recovered = shown & (cosines >= self.probe.match)
        outcome.metrics["sae_recovered_frac"] = float(recovered.mean())
        outcome.arrays["sae_best_cosine"] = np.where(shown, cosines, np.nan)
        evaluation = EvalContext(sae=sae, device=ctx.device, x=x)
        outcome.measure(self.metrics, evaluation, ctx.ends)


def best_cosines(directions: Tensor, decoder: Tensor) -> np.ndarray:
    """The largest cosine of each direction with a decoder row.

    Args:
        directions: Directions (F, D).
        decoder: Decoder rows (n, D).

    Returns:
        Cosines (F,); 0 if there are no latents.
    """
    if not len(decoder):
        return np.zeros(len(directions))
    cosines = unit_rows(directions) @ unit_rows(decoder).t()
    return cosines.max(1).values.cpu().numpy().astype(float)


def summarise(outcome: Outcome, losses: Losses, threshold: float) -> None:
    """Add the loss over the sweep, and the smallest hidden size below the threshold by depth."""
    outcome.metrics["loss_min"] = float(np.mean([values.min() for values in losses.values()]))
    outcome.metrics["loss_mean"] = float(np.mean([values.mean() for values in losses.values()]))
    smallest_losses: dict[int, dict[int, float]] = {}
    for (depth, hidden), values in losses.items():
        smallest_losses.setdefault(depth, {})[hidden] = values.min()
    depths = sorted(smallest_losses)
    solved = {}
    for depth in depths:
        sizes = [h for h, loss in smallest_losses[depth].items() if loss < threshold]
        solved[depth] = min(sizes, default=None)
    outcome.metrics["solved_depths"] = float(sum(size is not None for size in solved.values()))
    names = {"smallest_hidden": depths[-1]} | {f"smallest_hidden_depth_{d}": d for d in depths}
    for name, depth in names.items():
        outcome.metrics[name] = solved[depth]
        if solved[depth] is None:
            least = min(smallest_losses[depth].values())
            outcome.why_null[name] = (
                f"no hidden size of the sweep brings depth {depth} below {threshold:g}; "
                f"the least loss is {least:.2g}"
            )
    outcome.arrays |= {
        "depth": np.array([depth for depth, _ in losses]),
        "hidden": np.array([hidden for _, hidden in losses]),
        "loss": np.array(list(losses.values())),
        "threshold": np.array(threshold),
    }


def represent(outcome: Outcome, learner: ToyLearner, losses: Losses, features: Features) -> None:
    """Add the representation of the features by each configuration's best instance.

    It consists of norms, interference and dimensions per feature, and of the weights in the plane
    for two hidden units.

    Args:
        outcome: Outcome to add to, changed in place.
        learner: The trained models.
        losses: Loss of every instance (instances,) by (depth, hidden).
        features: Features of the trees.
    """
    width = features.n_features(max(depth for depth, _ in losses))
    kinds = ("feature_norm", "interference", "dimensionality")
    tables = {kind: np.full((len(losses), width), np.nan) for kind in kinds}
    for row, ((depth, hidden), loss) in enumerate(losses.items()):
        best = int(loss.argmin())
        w, b = (part[best].cpu().double() for part in learner.module.weights(depth, hidden))
        for kind, values in zip(kinds, measures(w), strict=True):
            tables[kind][row, : w.shape[1]] = values.numpy()
        if hidden == 2:
            outcome.arrays[f"plane_{depth}"] = torch.cat([w, b[None]]).numpy()
            outcome.arrays[f"parents_{depth}"] = features.parents(depth)
    outcome.arrays |= tables
    for kind in kinds:
        outcome.metrics[kind] = float(np.mean([np.nanmean(row) for row in tables[kind]]))


def measures(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Representation of each feature (Elhage et al. 2022).

    Args:
        w: Weights (hidden, F).

    Returns:
        Norms `|w_i|`, interference `sum_{j != i} (w_i/|w_i| . w_j)^2` and dimensions per feature
        `|w_i|^2 / sum_j (w_i/|w_i| . w_j)^2`, (F,) each; all 0 for a feature without a direction.
    """
    norms = w.norm(dim=0)
    unit = torch.where(norms > 1e-6, w / norms.clamp_min(1e-6), 0.0)
    own = (unit * w).sum(0).square()
    # sum_j (u_i . w_j)^2 = u_i^T W W^T u_i, without a table of all pairs.
    total = (unit * (w @ w.t() @ unit)).sum(0)
    dimensions = torch.where(total > 1e-12, own / total.clamp_min(1e-12), 0.0)
    return norms, (total - own).clamp_min(0), dimensions


def smallest_info(depth: int, threshold: float) -> MetricInfo:
    """Description of the smallest hidden size of one depth."""
    formula = (
        f"least hidden size of the sweep at which the best instance of depth {depth} has a loss "
        f"below {threshold:g}; null where there is none"
    )
    return info(
        f"smallest_hidden_depth_{depth}",
        f"smallest hidden, depth {depth}",
        formula,
        "none",
        unit="units",
        depends=OF_MODEL,
    )


INFO = [
    info(
        "loss_min",
        "loss, best instance",
        "least expected loss of the instances, mean over the configurations",
        "down",
        depends=OF_MODEL,
    ),
    info(
        "loss_mean",
        "loss, mean",
        "expected loss, mean over instances and configurations",
        "down",
        depends=OF_MODEL,
    ),
    info(
        "smallest_hidden",
        "smallest hidden",
        "as smallest_hidden_depth_<d>, for the deepest tree of the sweep",
        "none",
        unit="units",
        depends=OF_MODEL,
    ),
    info(
        "solved_depths",
        "depths solved",
        "depths at which some hidden size brings the best instance below the threshold",
        "up",
        depends=OF_MODEL,
    ),
    info(
        "feature_norm",
        "feature norm",
        "|w_i|, mean over features and configurations (best instance)",
        "none",
        shown=False,
        depends=OF_MODEL,
    ),
    info(
        "interference",
        "interference",
        "sum_{j != i} (w_i/|w_i| . w_j)^2, mean as above",
        "down",
        shown=False,
        depends=OF_MODEL,
    ),
    info(
        "dimensionality",
        "dimensions per feature",
        "|w_i|^2 / sum_j (w_i/|w_i| . w_j)^2, mean as above",
        "none",
        shown=False,
        depends=OF_MODEL,
    ),
    info(
        "sae_mmcs",
        "SAE MMCS",
        "mean over represented features of the largest cosine with a live latent's decoder row",
        "up",
    ),
    info(
        "sae_mmcs_chance",
        "MMCS by chance",
        "the same with as many random directions as the SAE has latents",
        "none",
        shown=False,
    ),
    info(
        "sae_recovered_frac",
        "tree found",
        "share of all nodes that are represented and have a latent of cosine >= match",
        "up",
    ),
    info("sae_l0", "SAE L0", "latents active a held-out row", "target"),
    info(
        "sae_fvu",
        "SAE FVU",
        "||x - xhat||^2 / ||x - mean||^2 over held-out rows of the hidden layer",
        "down",
    ),
    info(
        "toy_train_time",
        "toy time",
        "seconds of training all configurations together",
        "down",
        unit="s",
        shown=False,
        depends=OF_MODEL_TIME,
    ),
]

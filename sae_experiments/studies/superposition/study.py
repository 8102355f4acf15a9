"""Toy models of superposition with tree-structured features: a sweep over depth and hidden size, all models trained together.

For each family of features: which trees fit into how many hidden units, how the features share them, and how much of the tree an SAE on
the hidden layer finds (here the truth is known).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from sae_experiments.cache import cached
from sae_experiments.conditions import OF_MODEL, OF_MODEL_TIME, ON_ACTIVATIONS
from sae_experiments.errors import UserError
from sae_experiments.files import digest, read_json, write_bytes, write_json
from sae_experiments.fitting.fit import FitReport, Sample, fit_saes
from sae_experiments.fitting.spec import SAESpec
from sae_experiments.metric_info import MetricInfo
from sae_experiments.resources import Need, announce
from sae_experiments.saes.base import SAE, Batch
from sae_experiments.source import source_digest
from sae_experiments.studies import conditions as facts
from sae_experiments.studies.base import Cell, Context, Outcome, check_held_out, part_of, rows_seed
from sae_experiments.studies.superposition import toy, toy_step, trees
from sae_experiments.studies.superposition.toy import ToyLearner
from sae_experiments.studies.superposition.trees import Features
from sae_experiments.training import loop as training
from sae_experiments.training.loop import Session, TrainConfig, seed_of, train

Losses = dict[tuple[int, int], np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """The SAE on the hidden layer of one configuration's best instance. A feature is found if a latent's decoder has cosine ``match`` with it."""

    depth: int
    hidden: int
    rows: int  # held-out rows, and rows to initialise and calibrate with
    match: float
    min_norm: float  # a feature with a shorter direction is not represented: it cannot be found and stays out of MMCS
    dead_after_frac: float
    train: TrainConfig


@dataclass(frozen=True, kw_only=True)
class Superposition:
    """Cells are (family of features, seed); a cell trains every (depth, hidden) pair, ``instances`` times, in one pass."""

    families: Mapping[str, Features]
    depths: Sequence[int]
    hidden: Sequence[int]
    instances: int
    init: str  # Xavier-normal of each "matrix", or as if "stacked": of the (instances, hidden, features) tensor, as PyTorch counts its fans
    threshold: float
    eval_rows: int
    train: TrainConfig
    probe: Probe
    saes: Mapping[str, SAESpec]
    seeds: Sequence[int] | None
    held_out: str = "val"

    def check(self) -> None:
        check_held_out(self.held_out)
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
        for name, features in self.families.items():
            sizes = {depth: features.n_features(depth) for depth in self.depths}
            self._check_sizes(name, sizes)
            if not features.marginals(max(self.depths)).any():
                raise UserError(
                    f"study.families.{name}.probability={features.probability}: no feature is ever on"
                )
        if (self.probe.depth, self.probe.hidden) not in self.shapes(
            next(iter(self.families.values()))
        ):
            raise UserError(
                f"study.probe: depth={self.probe.depth} with hidden={self.probe.hidden} is not a configuration of the sweep"
            )
        for sae_spec in self.saes.values():
            sae_spec.check(self.probe.hidden, self.probe.hidden, self.probe.train)

    def _check_sizes(self, name: str, sizes: Mapping[int, int]) -> None:
        """A hidden size above the features of some depths is left out there; one above those of all depths, or a depth without any, is a mistake."""
        if max(self.hidden) > max(sizes.values()):
            raise UserError(
                f"study.hidden={max(self.hidden)} exceeds the {max(sizes.values())} features of the deepest tree of {name}"
            )
        for depth, n in sizes.items():
            if min(self.hidden) > n:
                raise UserError(
                    f"study.hidden={min(self.hidden)} exceeds the {n} features of depth {depth} of {name}: leave the depth out"
                )
            if n > 100_000:
                raise UserError(
                    f"study.depths={depth} with branching={self.families[name].branching} makes {n:,} features: at most 100,000 fit"
                )

    def shapes(self, features: Features) -> list[tuple[int, int]]:
        """The configurations of the sweep: (depth, hidden) with hidden <= features."""
        return [(d, h) for d in self.depths for h in self.hidden if h <= features.n_features(d)]

    def announce(self, ctx: Context) -> None:
        """Say what the deepest tree will need. Raises :class:`UserError` where it does not fit."""
        depth = max(self.depths)
        for name, features in self.families.items():
            sizes = {
                "instances": self.instances,
                "batch": self.train.batch_size,
                "eval_rows": self.eval_rows,
            }
            need = Need(toy.memory(self.shapes(features), features, **sizes))
            what = f"family {name}: {features.n_features(depth):,} features of study.depths={depth}, study.instances={self.instances}"
            announce(
                what,
                need,
                "use smaller depths or branching, or fewer instances",
                device=ctx.device,
                say=ctx.console.say,
            )

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
        """The name results appear under: the family, and the SAE's label where several are fitted."""
        return family if len(self.saes) == 1 else f"{family}.{sae}"

    def cells(self) -> list[Cell]:
        seeds = self.seeds if self.seeds is not None else [0]
        return [
            Cell(name, seed, tuple(self.result_name(name, sae) for sae in self.saes))
            for name in self.families
            for seed in seeds
        ]

    def infos(self) -> list[MetricInfo]:
        return [*INFO, *(smallest_info(depth, self.threshold) for depth in self.depths)]

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
            f"  {len(losses)} configurations x {self.instances}: loss {m['loss_mean']:.5f} (best {m['loss_min']:.5f}) in {info['seconds']:.0f} s"
        )
        weights = self.hidden_directions(learner, losses)
        saes, reports = self.fitted(features, weights, cell.seed, ctx)
        outcomes = {}
        for name, sae in saes.items():
            own = replace(
                outcome,
                metrics=dict(m),
                why_null=dict(outcome.why_null),
                arrays=dict(outcome.arrays),
                seconds=dict(outcome.seconds),
            )
            own.cut, own.curves = (
                own.cut or reports[name].cut,
                [*outcome.curves, *((s, f"sae/{n}", v) for s, n, v in reports[name].history)],
            )
            own.seconds["fit"] = reports[name].seconds
            own.facts = self._facts(features) | facts.of_sae(
                sae, f"hidden {self.probe.hidden} of depth {self.probe.depth}"
            )
            own.add_fit(reports[name])
            self.evaluate(own, sae, features, weights, cell.seed)
            ctx.console.say(
                f"  {name}: MMCS {own.metrics['sae_mmcs'] or 0:.3f}, {own.metrics['sae_recovered_frac']:.0%} of the tree found"
            )
            outcomes[self.result_name(cell.dataset, name)] = own
        return outcomes

    def _facts(self, features: Features) -> dict[str, Any]:
        """What the numbers depend on beside the models (of those about the models) and the SAE."""
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
        """All models of a family: from the cache, or trained now, continuing where a killed process stopped."""
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
                progress = train(
                    [learner],
                    learner.batch_at,
                    self.train,
                    Session(session.log, session.tick, checkpoint, session.deadline),
                )
            write_bytes(
                part / "models.safetensors",
                save({k: v.cpu().clone() for k, v in learner.module.state_dict().items()}),
            )
            losses = [
                [*shape, found.tolist()] for shape, found in learner.final(self.eval_rows).items()
            ]
            write_json(
                part / "info.json",
                {
                    "losses": losses,
                    "seconds": progress.seconds,
                    "cut": progress.cut,
                    "history": progress.history,
                },
            )
            if not progress.cut:
                checkpoint.unlink(missing_ok=True)
            return not progress.cut

        folder = cached(ctx.cache, "toys", key, make)
        info = read_json(folder / "info.json")
        learner.module.load_state_dict(
            load_file(folder / "models.safetensors", device=str(ctx.device))
        )
        return learner, {(d, h): np.asarray(values) for d, h, values in info["losses"]}, info

    def hidden_directions(self, learner: ToyLearner, losses: Losses) -> Tensor:
        """W (hidden, F) of the probed configuration's best instance."""
        shape = self.probe.depth, self.probe.hidden
        return learner.module.weights(*shape)[0][int(losses[shape].argmin())].contiguous()

    def hidden_rows(self, features: Features, weights: Tensor, n: int, seed: int) -> Tensor:
        """Hidden activations (n, hidden) of fresh samples."""
        rng = np.random.default_rng([seed & 0xFFFFFFFF, seed >> 32])
        x = (
            torch.from_numpy(features.draw(self.probe.depth, n, rng)[:, : weights.shape[1]])
            .float()
            .to(weights.device)
        )
        return x @ weights.t()

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
        self, outcome: Outcome, sae: SAE, features: Features, weights: Tensor, seed: int
    ) -> None:
        """How well the SAE rebuilds held-out rows, and how much of the tree its decoder holds."""
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
        chance = best_cosines(
            weights.t(),
            torch.randn(sae.W_dec.shape, generator=torch.Generator().manual_seed(0)).to(
                weights.device
            ),
        )
        for name, values in (("sae_mmcs", cosines), ("sae_mmcs_chance", chance)):
            outcome.metrics[name] = float(values[shown].mean()) if shown.any() else None
            if not shown.any():
                outcome.why_null[name] = (
                    f"no feature's direction is as long as {self.probe.min_norm}"
                )
        outcome.metrics["sae_recovered_frac"] = float(
            (shown & (cosines >= self.probe.match)).mean()
        )
        outcome.arrays["sae_best_cosine"] = np.where(shown, cosines, np.nan)


def best_cosines(directions: Tensor, decoder: Tensor) -> np.ndarray:
    """The largest cosine (F,) of each direction (F, D) with a row of the decoder (latents, D); 0 where there is no latent."""
    if not len(decoder):
        return np.zeros(len(directions))
    unit = torch.nn.functional.normalize
    return (
        (unit(directions, dim=1) @ unit(decoder, dim=1).t())
        .max(1)
        .values.cpu()
        .numpy()
        .astype(float)
    )


def summarise(outcome: Outcome, losses: Losses, threshold: float) -> None:
    """Loss over the sweep, and for each depth the smallest hidden size below the threshold (None where there is none)."""
    outcome.metrics["loss_min"] = float(np.mean([found.min() for found in losses.values()]))
    outcome.metrics["loss_mean"] = float(np.mean([found.mean() for found in losses.values()]))
    depths = sorted({depth for depth, _ in losses})
    solved = {
        d: sorted(
            h for (depth, h), found in losses.items() if depth == d and found.min() < threshold
        )
        for d in depths
    }
    outcome.metrics["solved_depths"] = float(sum(bool(sizes) for sizes in solved.values()))
    for name, depth in [
        ("smallest_hidden", depths[-1]),
        *((f"smallest_hidden_depth_{d}", d) for d in depths),
    ]:
        outcome.metrics[name] = solved[depth][0] if solved[depth] else None
        if not solved[depth]:
            least = min(found.min() for (d, _), found in losses.items() if d == depth)
            outcome.why_null[name] = (
                f"no hidden size of the sweep brings depth {depth} below {threshold:g}; the least loss is {least:.2g}"
            )
    outcome.arrays |= {
        "depth": np.array([depth for depth, _ in losses]),
        "hidden": np.array([hidden for _, hidden in losses]),
        "loss": np.array(list(losses.values())),
        "threshold": np.array(threshold),
    }


def represent(outcome: Outcome, learner: ToyLearner, losses: Losses, features: Features) -> None:
    """How each configuration's best instance represents its features: norms, interference, dimensions per feature, and the plane of hidden = 2."""
    width = features.n_features(max(depth for depth, _ in losses))
    kinds = ("feature_norm", "interference", "dimensionality")
    tables = {kind: np.full((len(losses), width), np.nan) for kind in kinds}
    for row, ((depth, hidden), found) in enumerate(losses.items()):
        w, b = (
            t[int(found.argmin())].cpu().double() for t in learner.module.weights(depth, hidden)
        )
        for kind, values in zip(kinds, measures(w), strict=True):
            tables[kind][row, : w.shape[1]] = values.numpy()
        if hidden == 2:
            outcome.arrays[f"plane_{depth}"] = torch.cat([w, b[None]]).numpy()
            outcome.arrays[f"parents_{depth}"] = features.parents(depth)
    outcome.arrays |= tables
    for kind in kinds:
        outcome.metrics[kind] = float(np.mean([np.nanmean(row) for row in tables[kind]]))


def measures(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of W (hidden, F): norms ``|w_i|``; interference ``sum_{j != i} (w_i/|w_i| . w_j)^2``; dimensions of a feature ``|w_i|^2 / sum_j (w_i/|w_i| . w_j)^2``.

    All (F,); a feature without a direction has norm, interference and dimensions 0 (Elhage et al. 2022).
    """
    norms = w.norm(dim=0)
    unit = torch.where(norms > 1e-6, w / norms.clamp_min(1e-6), 0.0)
    own = (unit * w).sum(0).square()
    total = (unit * (w @ w.t() @ unit)).sum(
        0
    )  # sum_j (u_i . w_j)^2 = u_i^T W W^T u_i, without a table of all pairs
    return (
        norms,
        (total - own).clamp_min(0),
        torch.where(total > 1e-12, own / total.clamp_min(1e-12), 0.0),
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


def smallest_info(depth: int, threshold: float) -> MetricInfo:
    """The metric of one depth."""
    formula = f"least hidden size of the sweep at which the best instance of depth {depth} has a loss below {threshold:g}; null where there is none"
    return _info(
        f"smallest_hidden_depth_{depth}",
        f"smallest hidden, depth {depth}",
        formula,
        "units",
        "none",
        depends=OF_MODEL,
    )


INFO = [
    _info(
        "loss_min",
        "loss, best instance",
        "least expected loss of the instances, mean over the configurations",
        "",
        "down",
        depends=OF_MODEL,
    ),
    _info(
        "loss_mean",
        "loss, mean",
        "expected loss, mean over instances and configurations",
        "",
        "down",
        depends=OF_MODEL,
    ),
    _info(
        "smallest_hidden",
        "smallest hidden",
        "as smallest_hidden_depth_<d>, for the deepest tree of the sweep",
        "units",
        "none",
        depends=OF_MODEL,
    ),
    _info(
        "solved_depths",
        "depths solved",
        "depths at which some hidden size brings the best instance below the threshold",
        "",
        "up",
        depends=OF_MODEL,
    ),
    _info(
        "feature_norm",
        "feature norm",
        "|w_i|, mean over features and configurations (best instance)",
        "",
        "none",
        shown=False,
        depends=OF_MODEL,
    ),
    _info(
        "interference",
        "interference",
        "sum_{j != i} (w_i/|w_i| . w_j)^2, mean as above",
        "",
        "down",
        shown=False,
        depends=OF_MODEL,
    ),
    _info(
        "dimensionality",
        "dimensions per feature",
        "|w_i|^2 / sum_j (w_i/|w_i| . w_j)^2, mean as above",
        "",
        "none",
        shown=False,
        depends=OF_MODEL,
    ),
    _info(
        "sae_mmcs",
        "SAE MMCS",
        "mean over represented features of the largest cosine with a live latent's decoder row",
        "",
        "up",
    ),
    _info(
        "sae_mmcs_chance",
        "MMCS by chance",
        "the same with as many random directions as the SAE has latents",
        "",
        "none",
        shown=False,
    ),
    _info(
        "sae_recovered_frac",
        "tree found",
        "share of all nodes that are represented and have a latent of cosine >= match",
        "",
        "up",
    ),
    _info("sae_l0", "SAE L0", "latents active a held-out row", "", "target"),
    _info(
        "sae_fvu",
        "SAE FVU",
        "||x - xhat||^2 / ||x - mean||^2 over held-out rows of the hidden layer",
        "",
        "down",
    ),
    _info(
        "toy_train_time",
        "toy time",
        "seconds of training all configurations together",
        "s",
        "down",
        shown=False,
        depends=OF_MODEL_TIME,
    ),
]

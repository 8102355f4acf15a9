"""The main study: train a character GPT-2, fit SAEs to its activations, evaluate them on held-out text."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from sae_experiments import activations, fit, interop, training
from sae_experiments.activations import Site, Store, collect, parse_site
from sae_experiments.data import CharCorpus, CorpusSpec, load_corpus
from sae_experiments.fit import FitReport, Sample, fit_saes
from sae_experiments.io import UserError, cached, read_json, source_digest, write_bytes, write_json
from sae_experiments.lm import INFO as LM_INFO
from sae_experiments.lm import LMSpec, TrainedLM, train_lm
from sae_experiments.metrics.base import Bench, Metric, MetricInfo, Spliced
from sae_experiments.saes.base import SAE, Batch, NotExportable
from sae_experiments.studies.base import Cell, Context, Outcome
from sae_experiments.training import TrainConfig, seed_of

FIT_INFO = [
    MetricInfo(name="sae_train_time", title="SAE time", formula="seconds of the SAE's training", unit="s", better="down", shown=False),
    MetricInfo(name="sae_tokens_per_second", title="SAE rows/s", formula="rows trained on a second", unit="1/s", better="up", shown=False),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One SAE to fit: ``model`` builds it from d_in, d_sae and d_out; ``train`` overrides numbers of the fit for this variant."""

    model: Callable[..., SAE]
    target_l0: float
    expansion: float
    d_sae: int | None
    read: str | None  # site the encoder reads (null: the study's)
    write: str | None  # site the decoder rebuilds (null: the one it reads)
    train: Mapping[str, Any]

    def build(self, d_in: int, d_out: int) -> SAE:
        """The untrained SAE. Raises :class:`UserError` for sizes that cannot work."""
        d_sae = self.d_sae if self.d_sae is not None else round(self.expansion * d_in)
        return self.model(d_in=d_in, d_sae=d_sae, d_out=d_out)


@dataclass(frozen=True, slots=True, kw_only=True)
class FitSpec:
    """How activations are sampled and SAEs fitted. ``dead_after_frac``: silent for this share of the run's rows means dead."""

    train_rows: int
    calibration_rows: int
    held_out_rows: int
    init_rows: int
    dead_after_frac: float
    store_dtype: str
    collect_batch: int
    train: TrainConfig

    def __post_init__(self) -> None:
        for name in ("train_rows", "calibration_rows", "held_out_rows", "init_rows", "collect_batch"):
            if getattr(self, name) < 1:
                raise UserError(f"fit.{name}={getattr(self, name)} must be at least 1")
        if self.store_dtype not in ("float16", "float32"):
            raise UserError(f"fit.store_dtype={self.store_dtype!r} is not one of float16, float32")
        if self.train.batch_size > self.train_rows:
            raise UserError(f"fit.train.batch_size={self.train.batch_size} exceeds fit.train_rows={self.train_rows}")


@dataclass(frozen=True, kw_only=True)
class Language:
    """Cells are (corpus, seed); every cell trains (or reuses) its language model, its stores and its SAEs."""

    data: Mapping[str, CorpusSpec]
    lm: LMSpec
    arms: Mapping[str, Arm]
    metrics: Mapping[str, Metric]
    fit: FitSpec
    site: str
    seeds: Sequence[int] | None
    offline: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "_corpora", {})

    def check(self) -> None:
        """Build every SAE on the meta device and read every recipe, so that bad numbers die before the first second of compute."""
        if not self.data:
            raise UserError("data=[] names no corpus: use for example data=[shakespeare_char]")
        for spec in self.data.values():
            self.lm.train_config(spec.recipe)
        for arm in self.arms.values():
            read, write = self.sites(arm)
            self.arm_config(arm)
            with torch.device("meta"):
                arm.build(self.width(read), self.width(write))

    def sites(self, arm: Arm) -> tuple[Site, Site]:
        """Where the arm reads and what it rebuilds."""
        read = parse_site(arm.read or self.site, self.lm.n_layer)
        return read, parse_site(arm.write, self.lm.n_layer) if arm.write else read

    def width(self, site: Site) -> int:
        """Width of a site of this language model."""
        return 4 * self.lm.n_embd if site.stream == "mlp_act" else self.lm.n_embd

    def arm_config(self, arm: Arm) -> TrainConfig:
        """The fit's numbers with the variant's own on top."""
        own = {k: v for k, v in arm.train.items() if v is not None}
        unknown = set(own) - {"lr", "min_lr", "betas", "eps", "weight_decay", "clip", "warmup_steps", "decay", "decay_from", "optimizer"}
        if unknown:
            raise UserError(f"sae.train.{min(unknown)} cannot differ between SAEs of one pass: set fit.train.{min(unknown)}")
        return replace(self.fit.train, **own)

    def prepare(self, ctx: Context) -> dict[str, Any]:
        for name, spec in self.data.items():
            self._corpora[name] = load_corpus(spec, cache=ctx.cache, offline=self.offline, say=ctx.console.say)
        return {self.report(name, arm): self._corpora[name].provenance for name in self.data for arm in self.arms}

    def report(self, dataset: str, arm: str) -> str:
        """The name results appear under: the corpus, and the SAE's label where several are fitted."""
        return dataset if len(self.arms) == 1 else f"{dataset}.{arm}"

    def cells(self) -> list[Cell]:
        return [Cell(name, seed, tuple(self.report(name, arm) for arm in self.arms))
                for name, spec in self.data.items() for seed in (self.seeds if self.seeds is not None else spec.seeds)]  # fmt: skip

    def infos(self) -> list[MetricInfo]:
        modules = dict.fromkeys(sys.modules[_function(m).__module__] for m in self.metrics.values())
        return [*LM_INFO, *(i for m in modules for i in m.INFO), *FIT_INFO]

    def run(self, cell: Cell, ctx: Context) -> dict[str, Outcome]:
        corpus = self._corpora[cell.dataset]
        with ctx.session("language model", "lm", share=0.6) as session:
            lm = train_lm(self.lm, corpus, self.data[cell.dataset].recipe, seed=cell.seed, cache=ctx.cache, device=ctx.device, session=session)
        ctx.console.say(f"  language model: val loss {lm.metrics['best_val_loss']:.4f} after {lm.seconds:.0f} s of training")
        stores = Stores(self, corpus, lm, cell.seed, ctx)
        saes, reports = self.fitted(lm, stores, cell, ctx)
        outcomes = {}
        for name, sae in saes.items():
            outcome = self.evaluate(name, sae, corpus, lm, stores, reports[name], ctx)
            export(sae, ctx.folder / "saes" / f"{self.report(cell.dataset, name)}_{cell.seed}", stores, self.sites(self.arms[name]), ctx)
            outcomes[self.report(cell.dataset, name)] = outcome
        return outcomes

    def fitted(self, lm: TrainedLM, stores: Stores, cell: Cell, ctx: Context) -> tuple[dict[str, SAE], dict[str, FitReport]]:
        """The SAEs of a cell: from the cache, or all of them fitted now in one pass over the activations."""
        key = {"what": "fits", "stores": stores.train.key, "fit": asdict(self.fit), "seed": cell.seed, "torch": torch.__version__,
               "arms": {n: describe(a.model) | {"read": a.read, "write": a.write, "train": dict(a.train), "d": (a.d_sae, a.expansion)} for n, a in self.arms.items()}}  # fmt: skip
        built = {name: self.build(arm, cell.seed).to(ctx.device) for name, arm in self.arms.items()}
        modules = {
            sys.modules[c.__module__]
            for s in built.values()
            for m in s.modules()
            for c in type(m).__mro__
            if c.__module__.startswith("sae_experiments")
        }
        key["source"] = source_digest(*sorted(modules, key=lambda m: m.__name__), training, fit, activations)
        folder = cached(ctx.cache, "fits", key, lambda part: self._fit(part, built, stores, cell, ctx))
        info = read_json(folder / "fits.json")
        for name, sae in built.items():
            sae.load_state_dict(load_file(folder / f"{name}.safetensors", device=str(ctx.device)))
            sae.eval().requires_grad_(False)
        return built, {name: FitReport(**r) for name, r in info.items()}

    def build(self, arm: Arm, seed: int) -> SAE:
        """An untrained SAE whose weights depend on the seed alone, not on what is fitted beside it."""
        torch.manual_seed(seed_of(seed, "sae"))
        read, write = self.sites(arm)
        return arm.build(self.width(read), self.width(write))

    def _fit(self, part: Path, built: dict[str, SAE], stores: Stores, cell: Cell, ctx: Context) -> bool:
        pairs = {name: self.sites(arm) for name, arm in self.arms.items()}
        groups: dict[tuple[Site, Site], list[str]] = {}
        for name, pair in pairs.items():
            groups.setdefault(pair, []).append(name)
        reports: dict[str, FitReport] = {}
        for i, (pair, names) in enumerate(groups.items()):
            with ctx.session(f"fit {', '.join(names)}", "sae", share=0.8) as session:
                session.checkpoint = part / f"checkpoint_{i}.safetensors"
                reports |= fit_saes({n: built[n] for n in names}, lambda step, pair=pair: stores.batch_at(step, pair), {n: self.arm_config(self.arms[n]) for n in names},
                                    stores.sample(pair), seed=cell.seed, dead_after=round(self.fit.dead_after_frac * self.fit.train.steps * self.fit.train.batch_size), session=session)  # fmt: skip
        for name, sae in built.items():
            write_bytes(part / f"{name}.safetensors", save({k: v.detach().cpu().contiguous().clone() for k, v in sae.state_dict().items()}))
        write_json(part / "fits.json", {name: r._asdict() for name, r in reports.items()})
        cut = any(r.cut for r in reports.values())
        for checkpoint in [] if cut else part.glob("checkpoint_*"):
            checkpoint.unlink()
        return not cut

    def evaluate(self, name: str, sae: SAE, corpus: CharCorpus, lm: TrainedLM, stores: Stores, fitted: FitReport, ctx: Context) -> Outcome:
        """All metrics of one SAE on held-out text."""
        read, write = self.sites(self.arms[name])

        def tokens(starts: np.ndarray) -> tuple[Tensor, Tensor]:
            return tuple(corpus.windows("val", starts + shift, stores.held_out.length) for shift in (0, 1))

        bench = Bench(sae=sae, device=ctx.device, read=read, write=write, held_out=stores.held_out, lm=Spliced(lm.model, write, tokens))
        outcome = Outcome(metrics=dict(lm.metrics), cut=lm.cut or fitted.cut)
        outcome.metrics |= {"sae_train_time": fitted.seconds, "sae_tokens_per_second": fitted.rows_per_second}
        outcome.curves = [(s, f"lm/{n}", v) for s, n, v in lm.history] + [(s, f"sae/{n}", v) for s, n, v in fitted.history]
        outcome.seconds = {"lm": lm.seconds, "collect": stores.seconds, "fit": fitted.seconds}
        for label, metric in self.metrics.items():
            began = time.monotonic()
            measured = metric(bench)
            outcome.metrics |= measured.scalars
            outcome.why_null |= measured.why_null
            outcome.arrays |= measured.arrays
            outcome.seconds[f"metric.{label}"] = time.monotonic() - began
        m = outcome.metrics
        shown = [
            f"{k} {m[v]:.{d}f}"
            for k, v, d in (("L0", "sae_l0", 2), ("FVU", "sae_fvu", 4), ("dead", "sae_dead_frac", 3), ("delta CE", "ce_delta_bits", 4))
            if m.get(v) is not None
        ]
        ctx.console.say(f"  {name}: {', '.join(shown)} (fitted in {fitted.seconds:.0f} s)")
        return outcome


class Stores:
    """The three stores of a cell: rows to train on, rows of the train split kept for calibration, rows of the validation split."""

    def __init__(self, study: Language, corpus: CharCorpus, lm: TrainedLM, seed: int, ctx: Context) -> None:
        self.fit, self.seed, self.device = study.fit, seed, ctx.device
        sites = list(dict.fromkeys(s for arm in study.arms.values() for s in study.sites(arm)))
        length = lm.model.config.n_positions
        began = time.monotonic()
        train, calibration = split_windows(
            len(corpus.splits["train"]), length, self.fit.train_rows, self.fit.calibration_rows, seed_of(seed, "windows")
        )
        held = window_starts(len(corpus.splits["val"]), length)[: max(1, self.fit.held_out_rows // length)]

        def store(split: str, starts: np.ndarray, what: str) -> Store:
            with ctx.console.stage(f"collect {what}", "window") as tick:
                return collect(lm.model, lambda s: corpus.windows(split, s, length), starts, sites, length=length, split=split, cache=ctx.cache,
                               key=lm.key, dtype=self.fit.store_dtype, batch=self.fit.collect_batch, tick=tick)  # fmt: skip

        self.train, self.calibration, self.held_out = (
            store("train", train, "train"),
            store("train", calibration, "calibration"),
            store("val", held, "held-out"),
        )
        self.seconds = time.monotonic() - began

    def batch_at(self, step: int, pair: tuple[Site, Site]) -> Batch:
        """The rows of one step, as raw float32 activations on the device."""
        index = self.train.index_at(step, rows=self.fit.train.batch_size, seed=seed_of(self.seed, "rows"))
        x = self.train.rows(pair[0], index).to(self.device, non_blocking=True)
        return Batch(x, x if pair[0] == pair[1] else self.train.rows(pair[1], index).to(self.device, non_blocking=True))

    def sample(self, pair: tuple[Site, Site]) -> Sample:
        """Rows to initialise from (training rows) and to calibrate on (never trained on)."""
        index = self.train.index_at(0, rows=min(self.fit.init_rows, self.train.n_rows), seed=seed_of(self.seed, "init"))
        x, y = (self.train.rows(site, index).to(self.device) for site in pair)
        return Sample(x, y, self.calibration.rows(pair[0], slice(None)).to(self.device))


def window_starts(n: int, length: int) -> np.ndarray:
    """Starts of the non-overlapping windows of a text of n characters; each has a character after it to predict."""
    starts = np.arange(0, n - length, length, dtype=np.int64)
    if not len(starts):
        raise UserError(f"a split of {n} characters holds no window of {length}: use a longer text or a smaller lm.n_positions")
    return starts


def split_windows(n: int, length: int, train_rows: int, calibration_rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Disjoint windows for training and calibration, drawn at random and then sorted; calibration gets at most a tenth of all windows."""
    starts = np.random.default_rng([seed & 0xFFFFFFFF, seed >> 32]).permutation(window_starts(n, length))
    if len(starts) < 2:
        raise UserError(f"a training split of {n} characters holds fewer than two windows of {length}: use a longer text or a smaller lm.n_positions")
    n_calibration = max(1, min(calibration_rows // length, len(starts) // 10))
    n_train = max(1, min(train_rows // length, len(starts) - n_calibration))
    return np.sort(starts[n_calibration : n_calibration + n_train]), np.sort(starts[:n_calibration])


def export(sae: SAE, folder: Path, stores: Stores, sites: tuple[Site, Site], ctx: Context) -> None:
    """Write the SAE as a SAELens directory, with reference rows, where it has such a form."""
    x = stores.held_out.rows(sites[0], slice(0, 64)).to(ctx.device)
    try:
        interop.save_sae(sae, folder, reference=x, metadata={"hook_name": str(sites[0])})
    except NotExportable as reason:
        ctx.console.detail(f"  not exported: {reason}")


def describe(value: Any) -> Any:
    """A JSON-like description of a partial, for cache keys."""
    if isinstance(value, functools.partial):
        return {"target": f"{value.func.__module__}.{value.func.__qualname__}"} | {k: describe(v) for k, v in value.keywords.items()}
    return value


def _function(metric: Metric) -> Any:
    return metric.func if isinstance(metric, functools.partial) else metric

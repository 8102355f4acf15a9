"""SAEs of a run and their training settings, shared by every study that trains SAEs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from sae_experiments.errors import UserError
from sae_experiments.fitting.fit import OUTLIERS, SCALES, RowHandling
from sae_experiments.models.hooks import Site, Sites, parse_site
from sae_experiments.models.stream import SMALLEST
from sae_experiments.resources import cpu_has_bf16
from sae_experiments.saes.base import SAE
from sae_experiments.source import modules_behind
from sae_experiments.training.loop import TrainConfig, seed_of
from sae_experiments.training.recorded import BACKENDS

#: Fields of `TrainConfig` that may differ between SAEs of one pass.
PER_SAE_SETTINGS = (
    "lr",
    "min_lr",
    "betas",
    "eps",
    "weight_decay",
    "clip",
    "warmup_steps",
    "decay",
    "decay_from",
    "optimizer",
)
#: Precisions in which training may select the active latents.
PRECISIONS = ("auto", "fp32", "bf16")
#: Places of the rows of a fit. disk: a store in the cache, which later fits find there; memory: the
#: same rows, and nothing on disk; stream: collected while they are read, in chunks; auto: disk, or
#: stream where the disk is too small.
KEPT_IN = ("auto", "disk", "memory", "stream")


@dataclass(frozen=True, slots=True, kw_only=True)
class SAESpec:
    """One SAE to fit: its model, its size, the sites it reads and rebuilds, and its own recipe."""

    model: Callable[..., SAE]  # builds the SAE from d_in, d_sae and d_out
    target_l0: float  # active latents per row
    expansion: float  # latents per input dimension, if d_sae is null
    d_sae: int | None  # number of latents; null: expansion * d_in
    # Site to encode; null: the study's; several for a crosscoder: a list, or mlp_in.all
    read: str | Sequence[str] | None
    write: str | Sequence[str] | None  # site, or sites, to reconstruct; null: what is read
    train: Mapping[str, Any]  # fields of fit.train that this SAE overrides
    active_frac: float | None = None  # L0 as a fraction of the latents, instead of target_l0
    matmul_precision: str = "auto"
    """Precision in which training selects the active latents: auto, fp32 or bf16."""
    host: SAESpec | None = None
    """SAE that a variant such as purified wraps; its model becomes part of this one."""
    path: str | None = None
    """SAELens directory of an SAE that is evaluated and not trained, see `DirectorySpec`."""

    def build(self, d_in: int, d_out: int) -> SAE:
        """Build the untrained SAE.

        Args:
            d_in: Width of the site that is read.
            d_out: Width of the site that is rebuilt.

        Raises:
            UserError: The sizes or settings are invalid or do not fit together.
        """
        if self.d_sae is not None and (not isinstance(self.d_sae, int) or self.d_sae < 1):
            raise UserError(f"sae.d_sae={self.d_sae} must be a whole number of at least 1")
        d_sae = self.d_sae if self.d_sae is not None else round(self.expansion * d_in)
        if self.matmul_precision not in PRECISIONS:
            raise UserError(
                f"sae.matmul_precision={self.matmul_precision!r} is not one of "
                f"{', '.join(PRECISIONS)}"
            )
        sae = self.model(d_in=d_in, d_sae=d_sae, d_out=d_out, **self._asked(d_sae))
        asked = self.target_l0 if sae.fixed_l0 is None else sae.fixed_l0
        if asked is not None and asked >= d_sae:
            raise UserError(
                f"sae.target_l0={asked:g} must be below d_sae={d_sae}: "
                "ask for fewer, or raise sae.expansion or sae.d_sae"
            )
        sae.matmul_precision = self.matmul_precision
        if not sae.supports_bf16 and self.matmul_precision == "bf16":
            raise UserError(
                f"sae.matmul_precision={self.matmul_precision} is not for this SAE, "
                "which makes its products in its own way: use auto"
            )
        return sae

    def _asked(self, d_sae: int) -> dict[str, float]:
        """The L0 that `active_frac` asks for, under the name of the model's argument."""
        if self.active_frac is None:
            return {}
        names = [n for n in ("k", "target_l0") if n in getattr(self.model, "keywords", {})]
        if not names or not 0 < self.active_frac < 1:
            raise UserError(
                f"sae.active_frac={self.active_frac} must lie between 0 and 1, "
                "and the SAE take an L0: give null and its own numbers"
            )
        return {names[0]: self.active_frac * d_sae}

    def seeded(self, d_in: int, d_out: int, seed: int) -> SAE:
        """Build the untrained SAE with weights that depend on the seed alone."""
        with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they are
            torch.manual_seed(seed_of(seed, "sae"))
            return self.build(d_in, d_out)

    def check(self, d_in: int, d_out: int, cfg: TrainConfig, *, loads: bool = False) -> None:
        """Build on the meta device and read the recipe: invalid settings fail before any compute.

        Args:
            d_in: Width of the site that is read.
            d_out: Width of the site that is rebuilt.
            cfg: Training settings of the run.
            loads: True if the study can evaluate an SAE from a directory.
        """
        self.config(cfg)
        with torch.device("meta"):
            self.build(d_in, d_out)

    def sites(self, default: str, n_layer: int) -> tuple[Site | Sites, Site | Sites]:
        """The sites that the encoder reads and that the decoder reconstructs."""
        read = _parsed(self.read if self.read is not None else default, n_layer)
        return read, _parsed(self.write, n_layer) if self.write else read

    def config(self, cfg: TrainConfig) -> TrainConfig:
        """Training settings of the run, overridden by this SAE's own."""
        own = {k: v for k, v in self.train.items() if v is not None}
        for key in own.keys() - set(PER_SAE_SETTINGS):
            raise UserError(
                f"sae.train.{key} cannot differ between the SAEs of one pass: set fit.train.{key}"
            )
        return replace(cfg, **own)

    def describe(self) -> dict[str, Any]:
        """A JSON-like description, for cache keys."""
        return {
            "model": _to_jsonable(self.model),
            "d_sae": self.d_sae,
            "expansion": self.expansion,
            "read": self.read,
            "write": self.write,
            "train": dict(self.train),
        } | self._unusual()

    def _unusual(self) -> dict[str, Any]:
        """Settings added later, if used: fits without them keep their cache keys."""
        given = {} if self.active_frac is None else {"active_frac": self.active_frac}
        if self.matmul_precision == "fp32":
            return given
        native = {"native_bf16": cpu_has_bf16()} if self.matmul_precision == "auto" else {}
        return given | {"matmul_precision": self.matmul_precision} | native


def _parsed(named: str | Sequence[str], n_layer: int) -> Site | Sites:
    """A site, or several: given as a list, or `<stream>.all` for every block."""
    if isinstance(named, str) and named.endswith(".all"):
        named = [f"{named.removesuffix('.all')}.{layer}" for layer in range(1, n_layer + 1)]
    if not isinstance(named, (list, tuple)):
        return parse_site(str(named), n_layer)
    return tuple(parse_site(one, n_layer) for one in named)


def _to_jsonable(value: Any) -> Any:
    """A value for a cache key; a partial function is its name with its arguments."""
    if isinstance(value, functools.partial):
        return {"target": f"{value.func.__module__}.{value.func.__qualname__}"} | {
            k: _to_jsonable(v) for k, v in value.keywords.items()
        }
    return value


def code_of(specs: Mapping[str, SAESpec], saes: Mapping[str, SAE]) -> list[str]:
    """Modules whose code builds SAEs or determines what they compute, the user's included.

    Args:
        specs: Specifications of the SAEs.
        saes: The SAEs, whose parts may come from modules that the builder does not import.
    """
    models = [spec.model for spec in specs.values()]
    return modules_behind(*models, *{type(part) for sae in saes.values() for part in sae.modules()})


@dataclass(frozen=True, slots=True, kw_only=True)
class FitSpec:
    """Sampling of activations and fitting of SAEs."""

    train_rows: int  # rows of activations to train on
    calibration_rows: int  # rows to calibrate thresholds on, never trained on
    held_out_rows: int  # rows to evaluate on
    init_rows: int  # rows to initialise SAEs from
    dead_after_frac: float  # a latent silent for this fraction of all rows of the fit is dead
    store_dtype: str  # precision of stored activations: float16 or float32
    collect_batch: int  # windows of text per forward pass while activations are collected
    train: TrainConfig  # optimisation
    scale: str = "spread"  # centring and scaling: spread, robust or none, see `fit.units_of`
    outliers: str = "leave_out"  # rows far out: leave_out or keep, see `saes.outliers`
    store: str = "auto"  # where rows are kept: auto, disk, memory or stream, see `KEPT_IN`
    stream_rows: int | None = None  # rows of a chunk of a stream at most; None: SMALLEST batches
    disk_share: float = 0.5  # of the free disk that auto may fill before it streams
    backend: str = "auto"  # way to make steps: auto, host or device, see `training.recorded`

    def __post_init__(self) -> None:
        for name in (
            "train_rows",
            "calibration_rows",
            "held_out_rows",
            "init_rows",
            "collect_batch",
        ):
            if getattr(self, name) < 1:
                raise UserError(f"fit.{name}={getattr(self, name)} must be at least 1")
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            if value not in known:
                raise UserError(f"fit.{name}={value!r} is not one of {', '.join(known)}")
        if not 0 < self.disk_share <= 1:
            raise UserError(f"fit.disk_share={self.disk_share} must lie in (0, 1]")
        self._check_chunks()
        if self.train.batch_size > self.train_rows:
            raise UserError(
                f"fit.train.batch_size={self.train.batch_size} "
                f"exceeds fit.train_rows={self.train_rows}"
            )

    def _check_chunks(self) -> None:
        least = SMALLEST * self.train.batch_size
        if self.stream_rows is not None and self.stream_rows < least:
            raise UserError(
                f"fit.stream_rows={self.stream_rows} must be at least {least}, {SMALLEST} batches, "
                "or null: smaller chunks are shuffled too little"
            )

    @property
    def chunk_rows(self) -> int:
        """Maximum rows per chunk, if rows are streamed."""
        return self.stream_rows or SMALLEST * self.train.batch_size

    def of_result(self) -> dict[str, Any]:
        """Settings that a fit depends on besides its rows, for cache keys."""
        left_out = ["store", "stream_rows", "disk_share"]
        if self.backend != "device":
            left_out.append("backend")
        return {name: value for name, value in asdict(self).items() if name not in left_out}

    @property
    def handling(self) -> RowHandling:
        """Scaling of the rows and handling of outliers."""
        return RowHandling(self.scale, self.outliers)

    @property
    def dead_after(self) -> int:
        """Rows without firing after which a latent counts as dead."""
        return round(self.dead_after_frac * self.train.steps * self.train.batch_size)


#: Fields of `FitSpec` that are one of a few words.
_CHOICES = {
    "store_dtype": ("float16", "float32"),
    "store": KEPT_IN,
    "scale": SCALES,
    "backend": BACKENDS,
    "outliers": OUTLIERS,
}

"""SAEs on a plain tensor of activations, without configuration files or run folders."""

from __future__ import annotations

import difflib
import functools
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import sae_experiments
from sae_experiments.config.compose import build, compose_checked
from sae_experiments.errors import UserError, check_whole
from sae_experiments.files import conf_folder
from sae_experiments.fitting import fit
from sae_experiments.fitting.fit import FitReport, RowHandling, Sample
from sae_experiments.fitting.spec import SAESpec
from sae_experiments.metrics import reconstruction, sparsity
from sae_experiments.metrics.base import EvalContext
from sae_experiments.quality_warnings import Warned, of_metrics
from sae_experiments.saes.base import SAE, Batch, warn_unless_fitted
from sae_experiments.sampling import spread_rows
from sae_experiments.steering import steer
from sae_experiments.training.loop import TrainConfig, seed_of

__all__ = ["build_sae", "evaluate", "fit_saes", "steer"]

#: Rows that are searched at once for values that are not finite.
CHUNK = 1 << 14


def build_sae(name: str, d_in: int, *, seed: int = 0, **settings: Any) -> SAE:
    """Build an untrained SAE, with the defaults of `conf/sae/<name>.yaml`.

    Example: `build_sae("jumprelu", 512, target_l0=20, d_sae=4096, model__bandwidth=0.05)`.

    Args:
        name: Name of the variant.
        d_in: Width of the activations.
        seed: Seed of the weights.
        **settings: Options of the variant without the leading `sae.`; two underscores stand for
            the dot of an option of the model itself.

    Raises:
        UserError: The variant or an option does not exist, or the variant needs more than one
            tensor of activations.
    """
    check_whole(d_in=d_in)
    sae_spec, _ = _sae_spec(name, settings)
    sae = sae_spec.seeded(d_in, d_in, seed)
    if sae.n_sites != 1 or sae.needs_model:
        raise UserError(
            f"{name} needs more than one tensor of activations: use it in study=language"
        )
    return sae


def fit_saes(
    saes: SAE | Mapping[str, SAE],
    activations: Tensor | np.ndarray,
    *,
    seed: int = 0,
    held_out: Tensor | np.ndarray | None = None,
    scale: str = "spread",
    outliers: str = "leave_out",
    backend: str = "auto",
    **train: Any,
) -> dict[str, FitReport]:
    """Fit one SAE, or several in one pass, and leave them calibrated and in eval mode.

    An SAE that `load_sae` returned is trained further from its weights.

    Args:
        saes: The SAE, or SAEs by name.
        activations: Rows (..., D) in their own units.
        seed: Seed of everything random in the fit.
        held_out: Rows (..., D) to calibrate thresholds on. None: a twentieth of the activations,
            which are then not trained on (at most 2^17 rows, and at least 4,096 or a fifth,
            whichever is smaller).
        scale: Centring and scaling of the rows during the fit, see `fitting.fit.units_of`;
            `robust` for activations with a few huge rows.
        outliers: `leave_out` rows far from all others (see `saes.outliers`), or `keep` them.
        backend: `device` for steps that nothing waits for, recorded as CUDA graphs on a GPU; see
            `training.recorded`.
        **train: Fields of `TrainConfig` to change, such as `steps=5000` or `lr=1e-3`.

    Returns:
        Report of each fit by name of the SAE; a single SAE has the name `sae`.

    Raises:
        UserError: The rows have the wrong width, are too few or hold non-finite values; or a
            setting does not exist.
        NonFinite: A loss became NaN or infinite.
    """
    _tell_late()
    named = _named(saes)
    d_in = sorted({sae.d_in for sae in named.values()})
    device = next(iter(named.values())).b_enc.device
    cfg = _config(train)
    x = _rows(activations, d_in, "activations", least=2 if held_out is not None else 3)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed_of(seed, "rows")))
    if held_out is None:
        n_held = min(max(len(order) // 20, min(4096, len(order) // 5), 1), 1 << 17)
        held = x[order[:n_held]]
        order = order[n_held:]
    else:
        held = _rows(held_out, d_in, "held_out")

    def batch_at(step: int) -> Batch:
        generator = torch.Generator().manual_seed(seed_of(seed, "batch", step))
        chosen = torch.randint(len(order), (cfg.batch_size,), generator=generator)
        rows = x[order[chosen]].float().to(device)
        return Batch(rows, rows)

    first = x[order[: 1 << 15]].float().to(device)
    dead_after = round(0.03 * cfg.steps * cfg.batch_size)
    reports = fit.fit_saes(
        named,
        batch_at,
        cfg,
        Sample(first, first, held.float().to(device)),
        seed=seed,
        dead_after=dead_after,
        handling=RowHandling(scale, outliers),
        backend=backend,
    )
    for name, report in reports.items():
        missed = _missed_l0(named[name], held)
        reports[name] = report._replace(
            warnings=[*report.warnings, *(one._asdict() for one in missed)]
        )
        for one in reports[name].warned:
            warnings.warn(f"{name}: {one.says}; {one.do}", stacklevel=2)
    return reports


def _named(saes: Any) -> dict[str, SAE]:
    """SAEs by name; a single one has the name `sae`."""
    if isinstance(saes, SAE):
        return {"sae": saes}
    if not isinstance(saes, Mapping) or not all(isinstance(sae, SAE) for sae in saes.values()):
        raise UserError(
            'fit_saes needs an SAE, or SAEs by name such as {"a": sae, "b": other}, not '
            f"{saes!r:.80}"
        )
    if not saes:
        raise UserError("there is no SAE to fit")
    return dict(saes)


def _missed_l0(sae: SAE, held: Tensor) -> list[Warned]:
    """Warning about an L0 on held-out rows (N, D) that is not the one asked for."""
    some = spread_rows(held, CHUNK).float().to(sae.b_enc.device)
    with torch.no_grad():
        l0 = float((sae.encode(some) != 0).sum(1).float().mean())
    return of_metrics({"sae_l0": l0}, sae.fixed_l0)


def evaluate(sae: SAE, activations: Tensor | np.ndarray) -> dict[str, float | None]:
    """Measure reconstruction and sparsity of an SAE.

    Args:
        sae: The SAE.
        activations: Rows (..., D) that it was not fitted to.

    Returns:
        Value of each metric by name; None if it is undefined.

    Raises:
        UserError: There are no rows, they have the wrong width, or they hold non-finite values.
    """
    if not isinstance(sae, SAE):
        raise UserError(f"evaluate needs an SAE and activations, not {sae!r:.80}")
    warn_unless_fitted(sae, "evaluate")
    x = _rows(activations, [sae.d_in], "activations").float()
    ctx = EvalContext(sae=sae, device=sae.b_enc.device, x=x)
    quality = reconstruction.measure(ctx, rows=None)
    density = sparsity.measure(ctx, rows=None, entropy_latents=256)
    return {**quality.scalars, **density.scalars}


def _rows(x: Tensor | np.ndarray, d_in: Sequence[int], what: str, least: int = 1) -> Tensor:
    """Rows (N, D) without a graph, from a tensor or array with any leading dimensions.

    Args:
        x: Tensor or array.
        d_in: Widths of the SAEs, of which there must be only one.
        what: Name of the rows, for messages.
        least: Number of rows that are needed.

    Raises:
        UserError: The rows cannot be used.
    """
    try:
        with warnings.catch_warnings():
            # The array is only read, so the warning does not apply.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            if isinstance(x, np.ndarray):  # torch takes no reversed arrays, or swapped bytes
                x = np.ascontiguousarray(x, dtype=x.dtype.newbyteorder("="))
            x = torch.as_tensor(x).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{what} must be a tensor or an array of numbers, not {type(x).__name__} ({error})"
        ) from error
    if not x.ndim or [x.shape[-1]] != list(d_in) or x.is_complex():
        raise UserError(
            f"{what} of shape {tuple(x.shape)} and type {x.dtype} do not fit SAEs with"
            f" d_in={list(d_in)}: give rows (N, d_in) of real numbers"
        )
    if x.layout != torch.strided or x.is_meta:
        raise UserError(f"{what} must be a dense tensor with data: use .to_dense()")
    x = x.reshape(-1, x.shape[-1])
    if len(x) < least:
        raise UserError(f"{what} hold {len(x)} rows: at least {least} are needed")
    for first, part in zip(range(0, len(x), CHUNK), x.split(CHUNK), strict=True):
        # In float32, in which they are used: what float64 holds may be too large for it.
        wrong = (~torch.isfinite(part.float()).all(1)).nonzero()
        if len(wrong):
            raise UserError(
                f"{what} hold a value that is not finite in row {first + int(wrong[0])} of"
                f" {len(x)}, as float32: leave such rows out"
            )
    return x


def _config(train: Mapping[str, Any]) -> TrainConfig:
    """The settings of `fit.train` with some of them changed."""
    known = [f.name for f in fields(TrainConfig)]
    for name in train:
        if name not in known:
            close = difflib.get_close_matches(
                name, [*known, "seed", "held_out", "scale", "outliers"], 1
            )
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
            raise UserError(f"fit_saes: {name} is no setting of the training; {hint}")
    try:
        return replace(_sae_spec("batch_topk", {})[1], **train)
    except TypeError as error:
        raise UserError(
            f"fit_saes: {', '.join(f'{k}={v!r}' for k, v in train.items())} cannot be used"
            f" ({error})"
        ) from error


@functools.cache
def _tell_late() -> None:
    """Warn once if torch was imported too early to set how long its threads wait."""
    if sae_experiments.LATE and torch.get_num_threads() > 1 and sys.platform == "linux":
        warnings.warn(
            "torch was imported before sae_experiments: beside other work on this machine its"
            " waiting threads can make a step ten times as long. Import sae_experiments first, or"
            " set GOMP_SPINCOUNT=1000 before Python starts.",
            stacklevel=3,
        )


def _sae_spec(name: str, settings: dict[str, Any]) -> tuple[SAESpec, TrainConfig]:
    """The specification of a variant with some options changed, and its training settings."""
    overrides = [f"sae.{k.replace('__', '.')}={_text(v)}" for k, v in settings.items()]
    cfg, _ = compose_checked(conf_folder(), ["preset=laptop", f"sae={name}", *overrides])
    study = build(cfg.study)
    if len(study.saes) != 1:
        raise UserError(
            f"build_sae({name!r}) with {', '.join(overrides) or 'no settings'} asks for "
            f"{len(study.saes)} SAEs: give one value each, and build them one by one"
        )
    (sae_spec,) = study.saes.values()
    return sae_spec, sae_spec.config(study.fit.train)


def _text(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{','.join(_text(v) for v in value)}]"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)

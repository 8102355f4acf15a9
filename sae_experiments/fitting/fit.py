"""Fit one or many SAEs in one pass over a stream of activations. Needs no Hydra and no run folder.

The policy that all variants share is here: input scale, dead-latent tracking, calibration and
folding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sae_experiments.errors import UserError
from sae_experiments.fitting.rates import BackOff, with_default_lrs
from sae_experiments.quality_warnings import Warned, of_back_off, of_fit, of_outliers
from sae_experiments.saes import ops, static
from sae_experiments.saes.base import SAE, Batch, Forward, Step, Units
from sae_experiments.saes.outliers import OrdinaryRows
from sae_experiments.saes.types import RESOLUTION
from sae_experiments.training.loop import (
    History,
    Learner,
    Loss,
    Phase,
    Progress,
    Session,
    StepInfo,
    TrainConfig,
    train,
)
from sae_experiments.training.recorded import BACKENDS

#: Steps between two looks of a recorded fit at whether latents are dead.
LOOK_EVERY = BackOff.EVERY
#: Fields of `TrainConfig` that belong to the pass: they are the same for all of its SAEs.
OF_THE_PASS = ("steps", "batch_size", "log_every", "eval_every", "checkpoint_every_s")


class FitReport(NamedTuple):
    """Outcome of fitting one SAE.

    Args:
        seconds: Time of its own steps plus its share of reading batches.
        rows_per_second: Rows it was trained on, per second.
        steps: Steps done.
        history: Curves, as (step, name, value).
        cut: Whether the deadline ended the fit early.
        lr: Peak learning rate that was used; None in reports of older versions.
        lr_factor: Factor that the rate had at the end: below 1 if the fit stepped back.
        outliers: Outliers among the rows looked at (`saes.outliers.Outliers`), as a dictionary;
            None in reports of older versions.
        warnings: Signs that the fit went wrong (`quality_warnings.Warned`), as plain dictionaries.
        from_cache: Whether it was fitted before, by an earlier command or cell.
        backend: Way that its steps were made: host, device, or device with products in TF32.
    """

    seconds: float
    rows_per_second: float
    steps: int
    history: History
    cut: bool
    lr: float | None = None
    lr_factor: float = 1.0
    outliers: Mapping[str, Any] | None = None
    warnings: Sequence[Mapping[str, Any]] = ()
    from_cache: bool = False
    backend: str = "host"

    @property
    def warned(self) -> list[Warned]:
        """The warnings in the form of a record."""
        return [Warned(**one) for one in self.warnings]

    @property
    def facts(self) -> dict[str, Any]:
        """Settings that the fit chose itself, in the form of a record."""
        chosen = {"lr": self.lr, "lr_factor": self.lr_factor, "backend": self.backend}
        return chosen | {"outliers": self.outliers}


class Sample(NamedTuple):
    """Rows outside the stream of batches.

    Args:
        x: Inputs (N, D) to initialise from.
        y: Targets (N, O) to initialise from.
        held: Inputs (M, D) to calibrate thresholds on, never trained on.
    """

    x: Tensor
    y: Tensor
    held: Tensor


class RowHandling(NamedTuple):
    """Treatment of rows before an SAE sees them."""

    scale: str = "spread"
    """One of `SCALES`; with "none" the SAE sees the rows in their own units."""
    outliers: str = "leave_out"
    """One of `OUTLIERS`."""


class Counts(nn.Module):
    """An SAE with counters that only its training needs."""

    since_fired: Tensor
    """Rows since each latent was last active, (F,)."""
    rows_used: Tensor
    """Rows used so far. A step may use fewer than `batch_size` (whole windows, or a subset)."""

    def __init__(self, sae: SAE) -> None:
        super().__init__()
        self.sae = sae
        device = sae.b_enc.device
        zeros = torch.zeros(sae.d_sae, dtype=torch.int64, device=device)
        self.register_buffer("since_fired", zeros)
        self.register_buffer("rows_used", torch.zeros((), dtype=torch.int64, device=device))


class Decided(NamedTuple):
    """Decisions of the host about the coming steps."""

    some_dead: bool
    """They have terms for dead latents."""
    over: bool
    """Training of the SAE has stopped early."""


class SAELearner(Learner):
    """An SAE as a learner: counts the rows since each latent fired and calls the SAE's hooks."""

    def __init__(
        self,
        name: str,
        sae: SAE,
        cfg: TrainConfig,
        sample: Sample,
        *,
        dead_after: int,
        seed: int,
        recorded: bool = False,
    ) -> None:
        self.counts = Counts(sae)
        super().__init__(name, self.counts, cfg, seed=seed)
        self.recorded = recorded
        if recorded:
            none_dead = torch.zeros((), dtype=torch.bool, device=sae.b_enc.device)
            self.counts.register_buffer("some_dead", none_dead)
        # What the host decides from numbers of the device; None: not read yet.
        self._decided: Decided | None = None
        self.back_off: BackOff | None = None
        self.sae = sae
        self.sample = sample
        self.dead_after = dead_after

    def phases(self) -> list[Phase]:
        return self.sae.phases()

    def watch(self, given: TrainConfig) -> None:
        """Halve a default learning rate whenever the fit goes wrong (see `BackOff`).

        Args:
            given: Training settings as given; `lr` is null if the default is to be used.
        """
        if given.lr is not None or not self.sae.judged_by_fvu:
            return
        firings = self.dead_after * (self.sae.fixed_l0 or 0.0) / self.sae.d_sae
        self.back_off = BackOff(steps=self.cfg.steps, firings=firings)
        self.counts.add_module("back_off", self.back_off)

    def lr_factor(self) -> float | Tensor:
        if self.back_off is None:
            return 1.0
        return self.back_off.factor if self.recorded else self.back_off.factor.item()

    def inputs(self, batch: Batch) -> Batch:
        return batch if self.sae.needs_model else batch._replace(downstream=None)

    def recordable(self, batch: Batch) -> bool:
        return batch.downstream is None or batch.downstream.recordable

    def decided(self) -> Decided:
        if self._decided is None:
            some_dead = bool(self.counts.get_buffer("some_dead"))
            self._decided = Decided(some_dead, self.sae.training_over())
        return self._decided

    @property
    def backend(self) -> str:
        """Way that steps are made, for the record."""
        if not self.recorded:
            return "host"
        with self.computing():
            return "device, TF32" if ops.rounds(self.sae.b_enc) else "device"

    @contextmanager
    def computing(self) -> Iterator[None]:
        if not self.recorded:
            yield
            return
        with static.shapes(), ops.tensor_cores(self.sae.matmul_precision):
            yield

    def begin(self, phase: str) -> None:
        if self.back_off is not None:
            self.back_off.restart()
        begin = self.sae.resume_training if self.sae.fitted else self.sae.begin
        begin(phase, self.sample.x, self.sample.y)

    def finish(self, phase: str) -> None:
        with torch.no_grad():
            self.sae.finish(phase, self.sample.held)

    def step_of(self, info: StepInfo) -> Step:
        """The state of the fit at a step, as an SAE gets it."""
        return Step(
            phase=info.phase,
            progress=info.progress if info.clock is None else info.clock.progress,
            dead=self.counts.since_fired > self.dead_after,
            generator=info.generator,
            some_dead=self.decided().some_dead if self.recorded else None,
            over=self.decided().over if self.recorded else None,
        )

    def loss(self, batch: Batch, info: StepInfo) -> Loss:
        return self.sae.loss(batch, self.step_of(info))

    def before_update(self) -> None:
        self.sae.before_update()

    @torch.no_grad()
    def after_update(self, loss: Loss, info: StepInfo) -> None:
        fwd: Forward = loss.extra
        step = self.step_of(info)
        n_rows = len(fwd.batch.x)
        self.counts.rows_used.add_(n_rows)
        self.counts.since_fired.add_(n_rows).masked_fill_(fwd.codes.fires > 0, 0)
        self.sae.after_update(fwd, step)

    @torch.no_grad()
    def look(self, loss: Loss, info: StepInfo) -> None:
        fwd: Forward = loss.extra
        if not self.recorded or info.step % LOOK_EVERY == 0:
            self.sae.look(info.progress)
        if self.recorded and info.step % LOOK_EVERY == 0:
            some_dead = self.counts.get_buffer("some_dead")
            some_dead.copy_((self.counts.since_fired > self.dead_after).any())
            self._decided = None
        # The loop shortens a warm-up longer than half a phase.
        warm = info.phase_step >= min(self.cfg.warmup_steps, info.phase_steps // 2)
        if self.back_off is not None and warm and info.step % BackOff.EVERY == 0:
            values = self._state(fwd)
            self.back_off.look(values["fvu"], values["l0"], values["dead_frac"])

    def _state(self, fwd: Forward) -> dict[str, float]:
        """Active latents per row, error and dead share at a step."""
        variance = (fwd.batch.y - fwd.batch.y.mean(0)).square().sum()
        return {
            "l0": fwd.codes.l0,
            "fvu": float((fwd.batch.y - fwd.recon).square().sum() / variance.clamp_min(1e-12)),
            "dead_frac": float((self.counts.since_fired > self.dead_after).float().mean()),
        }

    @torch.no_grad()
    def observe(self, loss: Loss, info: StepInfo) -> dict[str, float]:
        values = self._state(loss.extra)
        if self.sae.controller is not None:
            values["coeff"] = self.sae.controller.coeff
        return values


def fit_saes(  # noqa: PLR0913 (keyword-only settings)
    saes: Mapping[str, SAE],
    batch_at: Callable[[int], Batch],
    cfg: TrainConfig | Mapping[str, TrainConfig],
    sample: Sample,
    *,
    seed: int,
    dead_after: int,
    handling: RowHandling | None = None,
    backend: str = "auto",
    session: Session | None = None,
) -> dict[str, FitReport]:
    """Fit `saes` side by side and leave them calibrated, in eval mode and in raw units.

    During the fit, inputs and outputs are centred and scaled by one number each (`units_of`), which
    is folded into the weights at the end. Coefficients and learning rates thus carry over between
    models, and neither the unit nor the mean of the data matters. Outlier rows (`saes.outliers`)
    are left out of initialisation, training and calibration; they would make up most of the loss,
    and take latents away from the other rows.

    An SAE's result does not depend on the others in the same pass. Training a fitted SAE
    continues from its weights, if it allows that.

    Args:
        saes: SAEs by name.
        batch_at: Gives the batch of a step, in raw units.
        cfg: Training settings, for all SAEs or by name; those in `OF_THE_PASS` must not differ.
        sample: Rows for initialisation and calibration, in raw units.
        seed: Seed of everything random in the fit.
        dead_after: Rows without firing after which a latent counts as dead.
        handling: Scaling of the rows and handling of outliers. None: the defaults.
        backend: One of `BACKENDS`; `device` for steps that nothing waits for, see `saes.static`.
        session: Log, progress, checkpoint and deadline.

    Raises:
        NonFinite: A loss became NaN or infinite; names SAE, step and term.
        UserError: The sample holds a non-finite value, or nothing but zeros; an SAE cannot be
            trained further, or can only rebuild its input and has other targets; SAEs differ in a
            setting that the pass shares.
    """
    given = cfg if isinstance(cfg, Mapping) else dict.fromkeys(saes, cfg)
    _check_shared(saes, given)
    first = given[next(iter(saes))]
    recorded = {name: runs_recorded(sae, backend) for name, sae in saes.items()}
    rows = FittedRows(
        sample, _n_sites(saes), handling or RowHandling(), static_size=backend == "device"
    )
    for name, sae in saes.items():
        _check_start(name, sae, rows.same, min(first.batch_size, len(rows.sample.held)))
        if sae.fitted:
            sae.rescale(rows.inputs.inverse(), rows.outputs.inverse())
        if sae.controller is not None:
            sae.controller.horizon = first.steps
    scaled = rows.scaled_sample()
    configs = with_default_lrs(given, saes, scaled.x)
    learners = [
        SAELearner(
            name,
            sae,
            configs[name],
            scaled,
            dead_after=dead_after,
            seed=seed,
            recorded=recorded[name],
        )
        for name, sae in saes.items()
    ]
    for learner in learners:
        learner.watch(given[learner.name])
    progress = train(
        learners, lambda step: rows.scaled(batch_at(step)), learners[0].cfg, session or Session()
    )
    for sae in saes.values():
        sae.rescale(rows.inputs, rows.outputs)
        sae.fitted = True
        sae.eval()
        sae.requires_grad_(False)
    return {
        learner.name: _report(learner, progress, rows, alone=len(saes) == 1) for learner in learners
    }


def runs_recorded(sae: SAE, backend: str) -> bool:
    """True if steps of an SAE are made within `static.shapes()`, and recorded on a GPU.

    With `backend=device` those of every variant are that says it can. A subclass has to say so
    itself, since it may depend on numbers that a recorded step would not read again.

    Raises:
        UserError: The backend is not known.
    """
    if backend not in BACKENDS:
        raise UserError(f"fit.backend={backend!r} is not one of {', '.join(BACKENDS)}")
    return backend == "device" and bool(type(sae).__dict__.get("static_steps"))


class FittedRows:
    """Rows as a fit sees them: centred, scaled, and without outliers.

    Args:
        sample: Rows for initialisation and calibration, in raw units.
        n_sites: Sites side by side in a row; each gets a scale of its own.
        handling: Scaling of the rows and handling of outliers.
        static_size: Replace outliers of a batch by ordinary rows instead of leaving them out, so
            that every batch has the same size.

    Raises:
        UserError: An option is not known, or the rows cannot be scaled.
    """

    def __init__(
        self, sample: Sample, n_sites: int, handling: RowHandling, *, static_size: bool = False
    ) -> None:
        self.static_size = static_size
        if handling.outliers not in OUTLIERS:
            raise UserError(
                f"fit.outliers={handling.outliers!r} is not one of {', '.join(OUTLIERS)}"
            )
        self.handling = handling
        #: The targets are the inputs.
        self.same = sample.y is sample.x or torch.equal(sample.x, sample.y)
        y = sample.x if self.same else sample.y
        self.ordinary = OrdinaryRows(sample.x, y, n_sites)
        if handling.outliers == "leave_out":
            pairs = self.ordinary.of_pairs(sample.x, y)
            sample = Sample(*pairs, self.ordinary.of_inputs(sample.held))
        #: The sample in raw units, without the outliers that are left out.
        self.sample = sample
        self.inputs = units_of(sample.x, "activations", n_sites, scale=handling.scale)
        self.outputs = self.inputs
        if not self.same:
            self.outputs = units_of(sample.y, "targets", n_sites, scale=handling.scale)

    def scaled_sample(self) -> Sample:
        """The sample in the units of the fit."""
        x = self.inputs.apply(self.sample.x)
        y = x if self.same else self.outputs.apply(self.sample.y)
        return Sample(x, y, self.inputs.apply(self.sample.held))

    def scaled(self, batch: Batch) -> Batch:
        """A batch in the units of the fit."""
        if self.handling.outliers == "leave_out":
            ordinary = self.ordinary
            of_batch = ordinary.of_batch_in_place if self.static_size else ordinary.of_batch
            batch = of_batch(batch)
        x = self.inputs.apply(batch.x)
        rest = batch.downstream
        return Batch(
            x,
            x if batch.y is batch.x else self.outputs.apply(batch.y),
            None if batch.alt is None else self.inputs.apply(batch.alt),
            None if rest is None else rest._replace(units=self.outputs),
        )


def _report(learner: SAELearner, progress: Progress, rows: FittedRows, *, alone: bool) -> FitReport:
    """Report of one SAE of a pass; in curves of several SAEs each name begins with the SAE's."""
    counts = rows.ordinary.counts._asdict()
    history = progress.history if alone else _own_history(learner.name, progress)
    warnings = [
        *of_outliers(**counts, handling=rows.handling.outliers),
        *_warnings(learner, history),
    ]
    seconds = progress.seconds_of(learner.name)
    return FitReport(
        seconds=seconds,
        rows_per_second=int(learner.counts.rows_used) / max(seconds, 1e-9),
        steps=progress.step,
        history=history,
        cut=progress.cut,
        lr=learner.cfg.peak_lr,
        lr_factor=float(learner.lr_factor()),
        outliers=counts,
        warnings=[one._asdict() for one in warnings],
        backend=learner.backend,
    )


def _own_history(name: str, progress: Progress) -> History:
    """The curves of one SAE of a pass, in which each name begins with the SAE's and a slash."""
    # The name of an SAE may hold slashes itself.
    longer = tuple(f"{n}/" for n in progress.own_seconds if n.startswith(f"{name}/"))
    return [
        (step, key.removeprefix(f"{name}/"), value)
        for step, key, value in progress.history
        if key.startswith(f"{name}/") and not key.startswith(longer)
    ]


def _warnings(learner: SAELearner, history: History) -> list[Warned]:
    """Signs in the curves of a fit that it went wrong."""
    # The most, not the last: a code that collapses ends with hardly any active latents.
    l0 = max((value for _, name, value in history if name == "l0"), default=0.0)
    factor = float(learner.lr_factor())
    stepped_back = of_back_off(learner.cfg.peak_lr, factor)
    return stepped_back + of_fit(
        history,
        lr=learner.cfg.peak_lr * factor,
        warmup_steps=learner.cfg.warmup_steps,
        firings=learner.dead_after * l0 / learner.sae.d_sae,
        judge_error=learner.sae.judged_by_fvu,
    )


def _n_sites(saes: Mapping[str, SAE]) -> int:
    """Sites side by side in the rows of one pass."""
    n_sites = {sae.n_sites for sae in saes.values()}
    if len(n_sites) != 1:
        raise UserError("SAEs over different numbers of sites cannot share one pass")
    return n_sites.pop()


def _check_shared(saes: Mapping[str, SAE], configs: Mapping[str, TrainConfig]) -> None:
    """Raise `UserError` for an SAE with two names, and for SAEs with different shared settings."""
    first = next(iter(saes))
    names: dict[int, str] = {}
    for name, sae in saes.items():
        if names.setdefault(id(sae), name) != name:
            raise UserError(
                f"{names[id(sae)]} and {name} are one and the same SAE, which would be trained "
                "twice: build one for each name"
            )
        for key in OF_THE_PASS:
            value, expected = getattr(configs[name], key), getattr(configs[first], key)
            if value != expected:
                raise UserError(
                    f"{key}={value} of {name} differs from {key}={expected} of {first}: "
                    "SAEs of one pass share it, so give both the same or fit them one by one"
                )


def _check_start(name: str, sae: SAE, same: bool, rows: int) -> None:
    """Raise `UserError` for an SAE that cannot be fitted here.

    Args:
        name: Name of the SAE in messages.
        sae: The SAE.
        same: Targets and inputs are the same rows.
        rows: Rows of a batch or rows for calibration, whichever are fewer.
    """
    if sae.fixed_l0 is not None and round(sae.fixed_l0 * rows) < 1:
        raise UserError(
            f"{name}: target_l0={sae.fixed_l0:g} leaves no latent active in {rows} rows, so "
            f"nothing could be learnt: ask for more than {0.5 / rows:.2g}, or use larger batches "
            "and more calibration rows"
        )
    if sae.same_units and not same:
        raise UserError(
            f"{name}: a {type(sae).__name__} SAE rebuilds what it reads: set sae.write=null"
        )
    if sae.fitted and not sae.trains_on:
        raise UserError(
            f"{name} is fitted already, and its weights are in the data's units: build it anew, or "
            "save it with save_sae and train what load_sae gives on"
        )
    if (dtype := next(sae.parameters()).dtype) != torch.float32:
        raise UserError(
            f"{name} has weights in {dtype}, and training needs float32: call .float() on it first"
        )


#: Ways to centre and scale activations.
SCALES = ("spread", "robust", "none")
#: Handling of outlier rows.
OUTLIERS = ("leave_out", "keep")
#: Share of the rows that "robust" uses: those nearest to the medians of the columns.
ORDINARY = 0.95


def units_of(x: Tensor, what: str, blocks: int = 1, *, scale: str = "spread") -> Units:
    """The units in which rows (N, D) have mean 0 and mean squared length 1.

    Args:
        x: Rows (N, D).
        what: Name of the rows in messages.
        blocks: Number of equal parts of the columns, each of which gets a scale of its own.
        scale: `spread` looks at all rows; `robust` at the 95 % nearest to the medians of the
            columns, so that a few huge rows change nothing; `none` leaves rows as they are.

    Raises:
        UserError: A part holds values that are not finite, or nothing but zeros.
    """
    if scale not in SCALES:
        raise UserError(f"fit.scale={scale!r} is not one of {', '.join(SCALES)}")
    centre, factor = [], []
    for part in x.double().tensor_split(blocks, 1):
        size = part.square().sum(1).mean()
        if not bool(size > 0) or not bool(torch.isfinite(size)):
            raise UserError(
                f"{what} cannot be scaled: their mean square is {size.item():g} "
                "(constant zero or non-finite values in the store)"
            )
        middle, spread = _middle(part, robust=scale == "robust")
        if not bool(spread > RESOLUTION**2 * size):
            # Constant rows, which can be scaled by nothing but their size.
            middle, spread = torch.zeros_like(middle), size
        centre.append(middle)
        factor.append(spread.rsqrt().expand_as(middle))
    if scale == "none":
        return Units(x.new_zeros(x.shape[1]), x.new_ones(x.shape[1]))
    return Units(torch.cat(centre).to(x), torch.cat(factor).to(x))


def _middle(x: Tensor, *, robust: bool) -> tuple[Tensor, Tensor]:
    """The mean of rows (N, D), and their mean squared distance from it."""
    if robust:
        distance = (x - x.median(0).values).square().sum(1)
        near = x[distance <= distance.kthvalue(max(round(ORDINARY * len(x)), 1)).values]
        x = near if len(near) > 1 else x
    middle = x.mean(0)
    return middle, (x - middle).square().sum(1).mean()

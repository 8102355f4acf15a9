"""The training loop of language models, sparse autoencoders and toy models.

Everything random is a function of (seed, step). A run that was killed and resumed from its
checkpoint ends with the same bits as one that was not, and several learners on one stream of
batches do not influence each other.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sae_experiments import memory
from sae_experiments.errors import UserError
from sae_experiments.stopping import asked, at_boundaries, leave
from sae_experiments.training.checkpoint import read_checkpoint, write_checkpoint
from sae_experiments.training.finite import FiniteGuard
from sae_experiments.training.recorded import Clock, RecordedSteps, own_stream

History = list[tuple[int, str, float]]

DECAYS = ("cosine", "quarter_cosine", "linear", "constant")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Settings of a training run. Their values are in `conf/`; none has a default here.

    The learning rate rises linearly over `warmup_steps` to its peak `lr`. After that, `decay` is

    - `cosine`: down to `min_lr` as half a period, `(1 + cos(pi t)) / 2` with t from 0 to 1;
    - `quarter_cosine`: down to `min_lr` as a quarter of a period, `cos(pi t / 2)`;
    - `linear`: constant up to `decay_from`, then linearly down to `min_lr`;
    - `constant`: no decay.
    """

    steps: int  # optimiser steps
    batch_size: int  # rows per step (sequences, for a language model)
    lr: float | None  # peak learning rate; null: an SAE's own default (`fitting.rates`)
    min_lr: float  # learning rate at the end of the decay
    warmup_steps: int  # steps of linear warmup, at most half of a phase
    decay: str  # cosine, quarter_cosine, linear or constant
    decay_from: float  # for linear: fraction of the steps after which the learning rate falls
    optimizer: str  # adam, adamw (decay on matrices only) or muon (AdamW where it does not apply)
    muon_lr: float  # peak learning rate of the matrices that muon updates
    betas: tuple[float, float]  # Adam's decay rates of the first and second moment
    eps: float  # Adam's epsilon
    weight_decay: float  # decoupled weight decay; 0 disables it
    clip: float  # largest gradient norm; 0 disables clipping
    log_every: int  # steps between two points of the training curves
    eval_every: int  # steps between two held-out evaluations
    checkpoint_every_s: float  # seconds between two checkpoints

    def __post_init__(self) -> None:
        self._check_types()
        self._check_choices()
        self._check_ranges()

    def _check_types(self) -> None:
        for name in _NUMBERS:
            value = getattr(self, name)
            if name == "lr" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise UserError(f"{name}={value!r} must be a number")
        for name in ("steps", "batch_size", "warmup_steps", "log_every", "eval_every"):
            value = getattr(self, name)
            if not isinstance(value, int):
                raise UserError(f"{name}={value!r} must be a whole number")

    def _check_choices(self) -> None:
        for name in ("steps", "batch_size", "log_every", "eval_every"):
            value = getattr(self, name)
            if value < 1:
                raise UserError(f"{name}={value} must be at least 1")
        for name, known in (("decay", DECAYS), ("optimizer", ("adam", "adamw", "muon"))):
            value = getattr(self, name)
            if value not in known:
                raise UserError(f"{name}={value!r} is not one of {', '.join(known)}")

    def _check_ranges(self) -> None:
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise UserError(f"betas={list(self.betas)} must be two numbers in [0, 1)")
        for name in ("lr", "eps"):
            value = getattr(self, name)
            if value is not None and (not value > 0 or not math.isfinite(value)):
                raise UserError(f"{name}={value} must be a positive number")
        for name in _NOT_NEGATIVE:
            value = getattr(self, name)
            if not value >= 0:
                raise UserError(f"{name}={value} must not be negative")
        if not 0 <= self.decay_from <= 1:
            raise UserError(f"decay_from={self.decay_from} must lie between 0 and 1")

    @property
    def peak_lr(self) -> float:
        """The peak learning rate.

        Raises:
            UserError: `lr` is None.
        """
        if self.lr is None:
            raise UserError("train.lr=null: only SAEs have a default rate; give a number")
        return self.lr


_NUMBERS = (
    "lr",
    "min_lr",
    "decay_from",
    "muon_lr",
    "eps",
    "weight_decay",
    "clip",
    "checkpoint_every_s",
)
_NOT_NEGATIVE = (
    "min_lr",
    "warmup_steps",
    "weight_decay",
    "clip",
    "muon_lr",
    "checkpoint_every_s",
)


class Group(NamedTuple):
    """Parameters that share an optimiser setting."""

    params: list[nn.Parameter]
    lr_factor: float = 1.0
    decay: bool = False  # whether weight decay applies
    muon: bool = False  # whether optimizer=muon handles these (matrices only)


class Phase(NamedTuple):
    """A part of training in which `groups` learn and every other parameter is frozen.

    The fractions of all phases sum to 1.
    """

    name: str
    fraction: float
    groups: list[Group]


class Loss(NamedTuple):
    """A training loss.

    Args:
        total: The scalar to minimise.
        parts: Weighted terms by name, which sum to `total`.
        extra: Anything that `after_update` needs, detached.
    """

    total: Tensor
    parts: dict[str, Tensor]
    extra: Any = None


class StepInfo(NamedTuple):
    """The current step of training."""

    step: int
    """Number of the step in the whole run, from 0."""
    phase: str
    """Name of the phase."""
    phase_step: int
    """Number of the step in its phase, from 0."""
    phase_steps: int
    """Number of steps of the phase."""
    generator: torch.Generator
    """The only source of randomness of the step."""

    clock: Clock | None = None
    """The numbers of the step on the device, for a step that may be recorded."""

    @property
    def progress(self) -> float:
        """Share of the phase that is done, 0 to 1."""
        return self.phase_step / max(self.phase_steps, 1)


class Learner:
    """One model with its loss. Subclasses give `loss` and override the hooks that they need.

    `loss` changes no state; only `after_update` may write buffers. All state that must survive a
    kill is in the parameters and buffers of `module` (the loop saves the optimisers itself).

    With `recorded`, steps may be replayed (`training.recorded`): between `seed` and `look`, a step
    reads no number from its device, and what changes from step to step is in its batch, in
    `info.clock` and in tensors of `module`. Decisions of the host are in `decided`.
    """

    #: Steps may be replayed.
    recorded = False

    def __init__(self, name: str, module: nn.Module, cfg: TrainConfig, *, seed: int) -> None:
        self.name = name
        self.module = module
        self.cfg = cfg
        self.seed = seed

    def phases(self) -> list[Phase]:
        """The phases, in order; one phase with every parameter by default."""
        return [
            Phase("train", 1.0, [Group([p for p in self.module.parameters() if p.requires_grad])])
        ]

    def begin(self, phase: str) -> None:
        """Called before the first step of `phase` (not again on resume within it)."""

    def loss(self, batch: Any, info: StepInfo) -> Loss:
        """The training loss of `batch`; leaves every parameter and buffer as it was."""
        raise NotImplementedError

    def lr_factor(self) -> float | Tensor:
        """Factor of the learning rate at the coming step; depends on `module` alone.

        A scalar tensor with `recorded`, unless it is always the same.
        """
        return 1.0

    def seed_step(self, info: StepInfo) -> None:
        """Called first in every step: seeds sources of random numbers other than `info`'s."""

    def computing(self) -> AbstractContextManager[Any]:
        """Context of the computation of a step, from its loss to `after_update`."""
        return nullcontext()

    def inputs(self, batch: Any) -> Any:
        """The part of a batch that a recorded step reads.

        A (nested) tuple of tensors, None, and objects of the host that are the same at every step.
        """
        return batch

    def recordable(self, batch: Any) -> bool:
        """True if the step of a batch may be recorded and replayed."""
        return True

    def decided(self) -> Hashable:
        """Decisions of the host that the coming step depends on; may read numbers now and then."""
        return None

    def before_update(self) -> None:
        """Called when gradients are there and not yet clipped."""

    def after_update(self, loss: Loss, info: StepInfo) -> None:
        """Called after the optimiser has stepped: may write buffers."""

    def look(self, loss: Loss, info: StepInfo) -> None:
        """Called last in every step: may read numbers and write buffers."""

    def finish(self, phase: str) -> None:
        """Called after the last step of `phase`."""

    def observe(self, loss: Loss, info: StepInfo) -> dict[str, float]:
        """Further numbers for the log (called every `log_every` steps, must not change state)."""
        return {}

    def evaluate(self, step: int) -> dict[str, float]:
        """Held-out numbers, every `eval_every` steps and at the end (must not change state)."""
        return {}


@dataclass
class Session:
    """Callbacks, checkpoint and deadline of a training run.

    Args:
        log: Called with a step and its numbers.
        tick: Called with the number of steps done and the total.
        checkpoint: File of the checkpoint; None disables checkpoints.
        deadline: Time (`time.monotonic`) at which training stops early; None: never.
        steps: Number of steps done so far.
    """

    log: Callable[[int, dict[str, float]], None] = lambda step, values: None
    tick: Callable[[int, int], None] = lambda done, total: None
    checkpoint: Path | None = None
    deadline: float | None = None
    steps: int = 0

    def check(self) -> None:
        """Raise `BatchCut` after the deadline, but never before the first step."""
        if self.steps and self.deadline is not None and time.monotonic() > self.deadline:
            raise BatchCut


class BatchCut(Exception):
    """The deadline passed while a batch was prepared: training ends with the step before it."""


@dataclass
class Progress:
    """State and outcome of a training run.

    Args:
        step: Steps done.
        seconds: Time spent, in which steps lost to a kill are not counted twice.
        cut: Whether the deadline ended training early.
        history: Curves, as (step, name, value).
        own_seconds: Time of the steps of each learner, by name.
    """

    step: int = 0
    seconds: float = 0.0
    cut: bool = False
    history: History = field(default_factory=list)
    own_seconds: dict[str, float] = field(default_factory=dict)

    def seconds_of(self, name: str) -> float:
        """Seconds of a learner's own steps plus its share of common work (batches, checkpoints)."""
        shared = self.seconds - sum(self.own_seconds.values())
        return self.own_seconds[name] + shared / len(self.own_seconds)


def lr_at(index: int, steps: int, cfg: TrainConfig) -> float:
    """Learning rate as a fraction of the peak, at step `index` of a phase of `steps` steps.

    It is never zero at the first step.
    """
    floor = cfg.min_lr / cfg.peak_lr
    # A phase much shorter than planned still reaches its peak.
    warmup = min(cfg.warmup_steps, steps // 2)
    if index < warmup:
        return (index + 1) / (warmup + 1)
    if cfg.decay == "constant":
        return 1.0
    if cfg.decay == "cosine":
        done = (index - warmup) / max(steps - warmup, 1)
        return floor + 0.5 * (1 + math.cos(math.pi * done)) * (1 - floor)
    if cfg.decay == "quarter_cosine":
        done = (index - warmup) / max(steps - warmup, 1)
        return floor + math.cos(math.pi * done / 2) * (1 - floor)
    start = max(warmup, cfg.decay_from * steps)
    return (
        1.0
        if index < start
        else floor + (1 - floor) * (1 - (index - start) / max(steps - start, 1))
    )


def seed_of(*parts: Any) -> int:
    """A 63-bit seed from any values: the same on every platform and in every process."""
    return (
        int.from_bytes(hashlib.sha256(json.dumps(parts, default=str).encode()).digest()[:8], "big")
        >> 1
    )


class _Running:
    """A learner with the optimisers of its current phase."""

    def __init__(self, learner: Learner, steps: int) -> None:
        self.learner = learner
        self.phases = learner.phases()
        total = sum(p.fraction for p in self.phases)
        if abs(total - 1) > 1e-6:
            raise UserError(f"{learner.name}: the fractions of its phases sum to {total:g}, not 1")
        ends = [
            round(steps * sum(p.fraction for p in self.phases[: i + 1]))
            for i in range(len(self.phases))
        ]
        spans = list(zip([0, *ends[:-1]], ends, strict=True))
        # A phase too short for one step is left out.
        kept = [i for i, (start, end) in enumerate(spans) if end > start]
        self.phases, self.spans = [self.phases[i] for i in kept], [spans[i] for i in kept]
        self.lr_fraction = 0.0  # of the peak rate, at the last step
        self.now: StepInfo
        self.optimizers: list[torch.optim.Optimizer] = []
        self.factors: list[tuple[dict[str, Any], float]] = []
        self.params: list[nn.Parameter] = []
        self.device = next(learner.module.parameters()).device
        self.generator = torch.Generator(self.device)
        # In steps that may be replayed, numbers are read now and then.
        self.clock = Clock(self.device) if learner.recorded else None
        self.replayed: RecordedSteps | None = None
        self.guard = FiniteGuard(
            learner.name,
            learner.module,
            learner.cfg.peak_lr,
            later=True if learner.recorded else None,
        )

    def phase_at(self, step: int) -> int:
        """Number of the phase that a step falls in."""
        return next((i for i, (_, end) in enumerate(self.spans) if step < end), len(self.spans) - 1)

    def enter(self, index: int) -> None:
        """Fresh optimisers over the phase's parameters; everything else frozen."""
        phase, cfg = self.phases[index], self.learner.cfg
        self.params = [p for g in phase.groups for p in g.params]
        chosen = {id(p) for p in self.params}
        for p in self.learner.module.parameters():
            p.requires_grad_(id(p) in chosen)
            p.grad = None
        adam_groups = []
        muon_groups = []
        for group in phase.groups:
            with_muon = cfg.optimizer == "muon" and group.muon
            peak = (cfg.muon_lr if with_muon else cfg.peak_lr) * group.lr_factor
            options = {
                "params": group.params,
                "lr": peak if self.clock is None else torch.tensor(peak, device=self.device),
                "peak": peak,
                "weight_decay": cfg.weight_decay if group.decay else 0.0,
            }
            (muon_groups if with_muon else adam_groups).append(options)
        self.optimizers = []
        if adam_groups:
            make = torch.optim.Adam if cfg.optimizer == "adam" else torch.optim.AdamW
            betas = cfg.betas[0], cfg.betas[1]
            on_gpu = self.clock is not None and self.device.type == "cuda"
            self.optimizers.append(
                make(adam_groups, betas=betas, eps=cfg.eps, fused=True, capturable=on_gpu)
            )
        if muon_groups:
            # RMS matching makes the step size independent of a matrix's orientation (GPT-2 stores
            # its weights transposed).
            self.optimizers.append(torch.optim.Muon(muon_groups, adjust_lr_fn="match_rms_adamw"))
        if self.clock is not None:
            self.replayed = RecordedSteps(self._computed, [self.generator], self.device)

    def release(self) -> None:
        """Let go of recordings, gradients and optimisers, which a device's memory is full of."""
        if self.replayed is not None:
            self.replayed = None
            self.optimizers = []
            for p in self.learner.module.parameters():
                p.grad = None

    def change_phase(self, step: int) -> None:
        """End a phase and begin the next one if this is its first step."""
        index = self.phase_at(step)
        if step == self.spans[index][0] and index > 0:
            self.learner.finish(self.phases[index - 1].name)
            self.learner.begin(self.phases[index].name)
            self.enter(index)

    def info(self, step: int) -> StepInfo:
        """Place of a step in its phase, with its random numbers."""
        index = self.phase_at(step)
        start, end = self.spans[index]
        self.generator.manual_seed(seed_of(self.learner.seed, "step", step))
        return StepInfo(
            step,
            self.phases[index].name,
            step - start,
            end - start,
            self.generator,
            self.clock,
        )

    def step(self, step: int, batch: Any) -> tuple[Loss, StepInfo, Tensor]:
        """Make one step; returns its loss, its place and the norm of its gradient."""
        learner = self.learner
        self.now = info = self.info(step)
        self.lr_fraction = lr_at(info.phase_step, info.phase_steps, learner.cfg)
        if self.clock is None:
            self.lr_fraction *= float(learner.lr_factor())
        learner.seed_step(info)
        if self.clock is None or self.replayed is None:
            loss, norm = self._computed(batch)
        else:
            self.clock.set(step, info.progress, self.lr_fraction)
            inputs = learner.inputs(batch)
            if learner.recordable(inputs):
                loss, norm = self.replayed(inputs, learner.decided())
            else:
                loss, norm = self._computed(inputs)
            self.guard.last = loss, norm  # `see` ran when the step was recorded
        learner.look(loss, info)
        return loss, info, norm

    def _set_rates(self) -> None:
        """Set the learning rates of the optimisers."""
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        if self.clock is None:
            for group in groups:
                group["lr"] = group["peak"] * self.lr_fraction
            return
        fraction = self.clock.rate * self.learner.lr_factor()
        for group in groups:
            group["lr"].copy_(group["peak"] * fraction)

    def _rate_used(self) -> float:
        """The last step's learning rate as a share of its peak."""
        if self.clock is None or not self.optimizers:
            return self.lr_fraction
        group = self.optimizers[0].param_groups[0]
        return float(group["lr"]) / group["peak"]

    def _computed(self, batch: Any) -> tuple[Loss, Tensor]:
        """Loss, gradient and update of a step; returns its loss and the norm of its gradient."""
        with self.learner.computing():
            return self._update(batch, self.now)

    def _update(self, batch: Any, info: StepInfo) -> tuple[Loss, Tensor]:
        learner = self.learner
        self._set_rates()
        loss = learner.loss(batch, info)
        if self.params:
            loss.total.backward()
        learner.before_update()
        grads = [p.grad for p in self.params if p.grad is not None]
        norm = nn.utils.get_total_norm(grads) if grads else torch.zeros_like(loss.total.detach())
        # Before clipping, which would spread a NaN to every gradient.
        self.guard.see(info.step if self.clock is None else self.clock.step, loss, norm)
        if learner.cfg.clip:
            nn.utils.clip_grads_with_norm_(self.params, learner.cfg.clip, norm)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        learner.after_update(loss, info)
        # A loss that kept its graph would keep nodes that belong to another recording.
        return loss._replace(total=loss.total.detach()), norm

    def numbers(self, loss: Loss, info: StepInfo, norm: Tensor) -> dict[str, float]:
        """The numbers of a step for the curves; raises `NonFinite` for any that is not finite."""
        self.guard.check()
        values = {name: float(value) for name, value in loss.parts.items()}
        values |= {"loss": loss.total.item(), "grad_norm": norm.item()}
        values["lr"] = self.learner.cfg.peak_lr * self._rate_used()
        return values | self.learner.observe(loss, info)

    def state(self) -> dict[str, Tensor]:
        """Tensors that training continues from."""
        out = {
            f"{self.learner.name}/module/{k}": v
            for k, v in self.learner.module.state_dict().items()
        }
        for i, optimizer in enumerate(self.optimizers):
            params = [p for g in optimizer.param_groups for p in g["params"]]
            for j, p in enumerate(params):
                out |= {
                    f"{self.learner.name}/opt{i}/{j}/{k}": v
                    for k, v in optimizer.state[p].items()
                    if isinstance(v, Tensor)
                }
        return out

    def restore(self, state: dict[str, Tensor]) -> None:
        """Continue from the tensors of `state`."""
        prefix = f"{self.learner.name}/module/"
        self.learner.module.load_state_dict(
            {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
        )
        for i, optimizer in enumerate(self.optimizers):
            params = [p for g in optimizer.param_groups for p in g["params"]]
            for key, value in state.items():
                head = f"{self.learner.name}/opt{i}/"
                if key.startswith(head):
                    j, name = key[len(head) :].split("/", 1)
                    optimizer.state[params[int(j)]][name] = value.clone()


@at_boundaries()
def train(
    learners: Sequence[Learner], batch_at: Callable[[int], Any], cfg: TrainConfig, session: Session
) -> Progress:
    """Train `learners` side by side on the same batches for `cfg.steps` steps.

    A checkpoint is written every `cfg.checkpoint_every_s` seconds. If `session.checkpoint` exists,
    training continues from it. Training stops early at `session.deadline` and after a signal.

    Args:
        learners: The models, which do not influence each other.
        batch_at: Gives the batch of a step; must depend on the step alone. May raise `BatchCut`.
        cfg: Steps and intervals. The other settings come from each learner.
        session: Log, progress, checkpoint and deadline.

    Raises:
        NonFinite: A loss or gradient is not finite; names the step, the term and the tensor.
    """
    memory.keep()
    device = next(learners[0].module.parameters()).device
    with own_stream(device) if any(one.recorded for one in learners) else nullcontext():
        run = _Pass(learners, cfg, session)
        try:
            run.train(batch_at)
        finally:
            for r in run.running:
                r.release()
    return run.progress


class _Pass:
    """Learners that are trained side by side, with their curves, clocks and checkpoints."""

    def __init__(self, learners: Sequence[Learner], cfg: TrainConfig, session: Session) -> None:
        self.cfg = cfg
        self.session = session
        self.running = [_Running(learner, cfg.steps) for learner in learners]
        self.progress = _resume(self.running, session.checkpoint)
        for r in self.running:
            self.progress.own_seconds.setdefault(r.learner.name, 0.0)
        self._started = 0.0
        self._saved = 0.0

    def train(self, batch_at: Callable[[int], Any]) -> None:
        """Make all steps that are left, or those before the deadline or a signal."""
        self.begin()
        for step in range(self.progress.step, self.cfg.steps):
            try:
                batch = batch_at(step)
            except BatchCut:
                self.progress.cut = True
            else:
                self.step(step, batch)
            self.save_if_due()
            leave()
            if self.progress.cut:
                break
        self.finish()

    def begin(self) -> None:
        """Begin the first phase, unless a checkpoint goes on, and start the clocks."""
        for r in self.running:
            r.learner.module.train()
            if self.progress.step == 0:
                r.learner.begin(r.phases[0].name)
                r.enter(0)
        self._saved = time.monotonic()
        self._started = self._saved - self.progress.seconds
        self.session.steps = self.progress.step

    def step(self, step: int, batch: Any) -> None:
        """Make one step of every learner, and record its numbers when they are due."""
        for r in self.running:
            r.change_phase(step)
        last = step + 1 == self.cfg.steps
        for r in self.running:
            began = time.monotonic()
            outcome = r.step(step, batch)
            self.progress.own_seconds[r.learner.name] += time.monotonic() - began
            if step % self.cfg.log_every == 0 or last:
                self._note(r, step, r.numbers(*outcome))
            if (step + 1) % self.cfg.eval_every == 0 or last:
                values = r.learner.evaluate(step + 1)
                r.guard.numbers(values, step)
                self._note(r, step + 1, values)
                r.learner.module.train()
        now = time.monotonic()
        self.progress.step = self.session.steps = step + 1
        self.progress.seconds = now - self._started
        self.session.tick(step + 1, self.cfg.steps)
        deadline = self.session.deadline
        self.progress.cut = not last and deadline is not None and time.monotonic() > deadline

    def _note(self, r: _Running, step: int, values: Mapping[str, float]) -> None:
        """Add numbers to the curves and the log, under the learner's name if there are several."""
        prefix = f"{r.learner.name}/" if len(self.running) > 1 else ""
        named = {f"{prefix}{name}": value for name, value in values.items()}
        self.progress.history.extend((step, name, value) for name, value in named.items())
        if named:
            self.session.log(step, named)

    def save_if_due(self) -> None:
        """Write a checkpoint after a while, before a stop, and never after the last step."""
        if self.session.checkpoint is None or self.progress.step == self.cfg.steps:
            return
        waited = time.monotonic() - self._saved
        if self.progress.cut or asked() or waited > self.cfg.checkpoint_every_s:
            save_checkpoint(self.session.checkpoint, self.running, self.progress)
            self._saved = time.monotonic()

    def finish(self) -> None:
        """End the last phase of every learner."""
        step = self.progress.step - 1
        for r in self.running:
            r.guard.weights(step)
            r.learner.finish(r.phases[r.phase_at(max(step, 0))].name)
            r.learner.module.eval()
        self.progress.seconds = time.monotonic() - self._started


def save_checkpoint(path: Path, running: Sequence[_Running], progress: Progress) -> None:
    """Write parameters, buffers, optimisers, progress and curves."""
    tensors: dict[str, Tensor] = {}
    for r in running:
        r.guard.check()
        tensors |= r.state()
    info = {
        "step": progress.step,
        "seconds": progress.seconds,
        "history": progress.history,
        "own_seconds": progress.own_seconds,
    }
    write_checkpoint(path, tensors, info)


def _resume(running: Sequence[_Running], path: Path | None) -> Progress:
    """Continue from a checkpoint, if there is one."""
    checkpoint = read_checkpoint(path)
    if checkpoint is None:
        return Progress()
    tensors, info = checkpoint
    device = next(running[0].learner.module.parameters()).device
    state = {name: tensor.to(device) for name, tensor in tensors.items()}
    for r in running:
        r.enter(r.phase_at(info["step"] - 1))
        r.restore(state)
    return Progress(
        info["step"],
        info["seconds"],
        False,
        [tuple(row) for row in info["history"]],
        info["own_seconds"],
    )

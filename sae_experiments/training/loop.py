"""The one training loop: language models, sparse autoencoders and toy models all pass here.

Everything random is a function of (seed, step). A run that was killed and resumed from its
checkpoint ends with the same bits as one that was not, and several learners on one stream of
batches do not influence each other.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
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

History = list[tuple[int, str, float]]

DECAYS = ("cosine", "quarter_cosine", "linear", "constant")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Numbers of a training run. Their values are in `conf/`; none has a default here.

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
        """The peak learning rate. Raises :class:`UserError` if there is no number yet."""
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
    """The current step: `step` of the whole run, `index` and `progress` (0 to 1) in `phase`."""

    step: int
    phase: str
    index: int
    phase_steps: int
    generator: torch.Generator

    @property
    def progress(self) -> float:
        return self.index / max(self.phase_steps, 1)


class Learner:
    """One model with its loss. Subclasses give `loss` and override the hooks that they need.

    `loss` changes no state; only `after_update` may write buffers. All state that must survive a
    kill is in the parameters and buffers of `module` (the loop saves the optimisers itself).
    """

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
        """Called before the first step of ``phase`` (not again on resume within it)."""

    def loss(self, batch: Any, info: StepInfo) -> Loss:
        """The training loss of ``batch``; leaves every parameter and buffer as it was."""
        raise NotImplementedError

    def lr_factor(self) -> float:
        """Factor of the learning rate at the coming step; depends on `module` alone."""
        return 1.0

    def before_update(self) -> None:
        """Called when gradients are there and not yet clipped."""

    def after_update(self, loss: Loss, info: StepInfo) -> None:
        """Called after the optimiser has stepped: the only place that may write buffers."""

    def finish(self, phase: str) -> None:
        """Called after the last step of ``phase``."""

    def observe(self, loss: Loss, info: StepInfo) -> dict[str, float]:
        """Further numbers for the log (called every ``log_every`` steps, must not change state)."""
        return {}

    def evaluate(self, step: int) -> dict[str, float]:
        """Held-out numbers, every ``eval_every`` steps and at the end (must not change state)."""
        return {}


@dataclass
class Session:
    """Connections of a training run to its surroundings.

    Args:
        log: Called with a step and its numbers.
        tick: Called with the number of steps done and in all.
        checkpoint: File of the checkpoint; None disables checkpoints.
        deadline: Time (`time.monotonic`) at which training stops early; None: never.
    """

    log: Callable[[int, dict[str, float]], None] = lambda step, values: None
    tick: Callable[[int, int], None] = lambda done, total: None
    checkpoint: Path | None = None
    deadline: float | None = None


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
    """A learner with its optimisers: knows which phase a step falls in."""

    def __init__(self, learner: Learner, steps: int) -> None:
        self.learner, self.steps = learner, steps
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
        self.optimizers: list[torch.optim.Optimizer] = []
        self.factors: list[tuple[dict[str, Any], float]] = []
        self.params: list[nn.Parameter] = []
        self.generator = torch.Generator(next(learner.module.parameters()).device)
        self.guard = FiniteGuard(learner.name, learner.module, learner.cfg.peak_lr)

    def phase_at(self, step: int) -> int:
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
                "lr": peak,
                "peak": peak,
                "weight_decay": cfg.weight_decay if group.decay else 0.0,
            }
            (muon_groups if with_muon else adam_groups).append(options)
        self.optimizers = []
        if adam_groups:
            make = torch.optim.Adam if cfg.optimizer == "adam" else torch.optim.AdamW
            self.optimizers.append(
                make(adam_groups, betas=tuple(cfg.betas), eps=cfg.eps, fused=True)
            )
        if muon_groups:
            # RMS matching makes the step size independent of a matrix's orientation (GPT-2 stores
            # its weights transposed).
            self.optimizers.append(torch.optim.Muon(muon_groups, adjust_lr_fn="match_rms_adamw"))

    def change_phase(self, step: int) -> None:
        """End a phase and begin the next one if this is its first step."""
        index = self.phase_at(step)
        if step == self.spans[index][0] and index > 0:
            self.learner.finish(self.phases[index - 1].name)
            self.learner.begin(self.phases[index].name)
            self.enter(index)

    def info(self, step: int) -> StepInfo:
        index = self.phase_at(step)
        start, end = self.spans[index]
        self.generator.manual_seed(seed_of(self.learner.seed, "step", step))
        return StepInfo(step, self.phases[index].name, step - start, end - start, self.generator)

    def step(self, step: int, batch: Any) -> tuple[Loss, StepInfo, Tensor]:
        learner = self.learner
        info = self.info(step)
        factor = lr_at(info.index, info.phase_steps, learner.cfg) * learner.lr_factor()
        self.lr_fraction = factor
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
        loss = learner.loss(batch, info)
        if self.params:
            loss.total.backward()
        learner.before_update()
        norm = nn.utils.get_total_norm([p.grad for p in self.params if p.grad is not None])
        # Before clipping, which would spread a NaN to every gradient.
        self.guard.see(step, loss, norm)
        if learner.cfg.clip:
            nn.utils.clip_grads_with_norm_(self.params, learner.cfg.clip, norm)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        learner.after_update(loss, info)
        return loss, info, norm

    def state(self) -> dict[str, Tensor]:
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
        batch_at: Gives the batch of a step; must depend on the step alone.
        cfg: Steps and intervals. The other numbers are those of each learner.
        session: Log, progress, checkpoint and deadline.

    Raises:
        NonFinite: A loss or gradient is not finite; names the step, the term and the tensor.
    """
    memory.keep()
    running = [_Running(learner, cfg.steps) for learner in learners]
    progress = _resume(running, session.checkpoint)
    for r in running:
        progress.own_seconds.setdefault(r.learner.name, 0.0)
    fresh = progress.step == 0
    for r in running:
        r.learner.module.train()
        if fresh:
            r.learner.begin(r.phases[0].name)
            r.enter(0)
    _mark = time.monotonic() - progress.seconds
    saved = time.monotonic()
    for step in range(progress.step, cfg.steps):
        for r in running:
            r.change_phase(step)
        batch = batch_at(step)
        last = step + 1 == cfg.steps
        for r in running:
            began = time.monotonic()
            loss, info, norm = r.step(step, batch)
            progress.own_seconds[r.learner.name] += time.monotonic() - began
            if step % cfg.log_every == 0 or last:
                _record(r, loss, info, norm, len(running) > 1, progress, session)
            if (step + 1) % cfg.eval_every == 0 or last:
                values = r.learner.evaluate(step + 1)
                r.guard.numbers(values, step)
                _note(
                    {_name(r, k, len(running) > 1): v for k, v in values.items()},
                    step + 1,
                    progress,
                    session,
                )
                r.learner.module.train()
        progress.step, progress.seconds = step + 1, time.monotonic() - _mark
        session.tick(step + 1, cfg.steps)
        progress.cut = (
            not last and session.deadline is not None and time.monotonic() > session.deadline
        )
        if (
            session.checkpoint
            and not last
            and (progress.cut or asked() or time.monotonic() - saved > cfg.checkpoint_every_s)
        ):
            save_checkpoint(session.checkpoint, running, progress)
            saved = time.monotonic()
        leave()
        if progress.cut:
            break
    for r in running:
        r.guard.weights(progress.step - 1)
        r.learner.finish(r.phases[r.phase_at(max(progress.step - 1, 0))].name)
        r.learner.module.eval()
    progress.seconds = time.monotonic() - _mark
    return progress


def _name(r: _Running, key: str, several: bool) -> str:
    return f"{r.learner.name}/{key}" if several else key


def _record(
    r: _Running,
    loss: Loss,
    info: StepInfo,
    norm: Tensor,
    several: bool,
    progress: Progress,
    session: Session,
) -> None:
    r.guard.check()
    values = {k: float(v) for k, v in loss.parts.items()} | {
        "loss": loss.total.item(),
        "grad_norm": norm.item(),
    }
    values["lr"] = r.learner.cfg.peak_lr * r.lr_fraction
    values |= r.learner.observe(loss, info)
    _note({_name(r, k, several): v for k, v in values.items()}, info.step, progress, session)


def _note(values: dict[str, float], step: int, progress: Progress, session: Session) -> None:
    progress.history.extend((step, k, v) for k, v in values.items())
    if values:
        session.log(step, values)


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
    found = read_checkpoint(path)
    if found is None:
        return Progress()
    device = next(running[0].learner.module.parameters()).device
    state, info = {k: v.to(device) for k, v in found[0].items()}, found[1]
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

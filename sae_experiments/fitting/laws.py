"""Laws that every SAE obeys, checked in seconds on a small world of sparse features.

The tests check every variant of `conf/sae`; `python experiment.py --check=NAME` checks one, which
may be a class in experiment.py. A law returns a complaint with its number, or "" if it holds.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sae_experiments.errors import UserError
from sae_experiments.fitting.fit import Sample, fit_saes
from sae_experiments.fitting.spec import SAESpec
from sae_experiments.saes import static
from sae_experiments.saes.base import SAE, Batch, Step, Units
from sae_experiments.saes.types import Downstream
from sae_experiments.training.loop import TrainConfig

#: The world: width, latents, active latents asked for, and true features.
D, M, L0, TRUE = 16, 48, 4, 40
L0_TOLERANCE = 0.05
FVU_BELOW = 0.6
STATIC_TOLERANCE = 1e-3


class LawBroken(UserError):
    """An SAE breaks laws."""

    exit_status = 1


# ------------------------------------------------------------------------------ the world


@functools.cache
def _features() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.nn.functional.normalize(torch.randn(TRUE, D, generator=generator), dim=1)


def rows(n: int, seed: int) -> Tensor:
    """Rows (n, D) that are sums of a few of 40 fixed directions, with a mean that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    on = (torch.rand(n, TRUE, generator=generator) < 0.06).float()
    size = 1 + 0.2 * torch.randn(n, TRUE, generator=generator)
    return on * size @ _features() + 0.3


def effect(tokens: Tensor, recon: Tensor) -> dict[str, Tensor]:
    """A stand-in for the rest of a language model."""
    return {"kl": (recon[:, 0] - 0.1).square().mean(), "later": recon[:, 1].square().mean()}


def downstream(x: Tensor) -> Downstream:
    """The rest of a language model that has activations x (N, D)."""
    return Downstream(effect, torch.zeros(len(x), 1, dtype=torch.int64, device=x.device))


def batch(n: int = 64, seed: int = 0) -> Batch:
    """A batch of n rows for an autoencoder."""
    x = rows(n, seed)
    return Batch(x, x, None, downstream(x))


def step(sae: SAE, progress: float = 0.5, dead: Tensor | None = None) -> Step:
    """A moment of training, by default in the middle."""
    none = torch.zeros(sae.d_sae, dtype=torch.bool)
    return Step(
        phase="train",
        progress=progress,
        dead=none if dead is None else dead,
        generator=torch.Generator().manual_seed(5),
    )


def config(**changes: Any) -> TrainConfig:
    """Training settings of a short fit."""
    plain: dict[str, Any] = {
        "steps": 300,
        "batch_size": 256,
        "lr": 3e-3,
        "min_lr": 0.0,
        "warmup_steps": 20,
        "decay": "linear",
        "decay_from": 0.7,
        "optimizer": "adam",
        "muon_lr": 0.0,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.0,
        "clip": 1.0,
        "log_every": 50,
        "eval_every": 10**9,
        "checkpoint_every_s": 1e9,
    }
    return TrainConfig(**(plain | changes))


def unsettled(sae: SAE, seed: int = 0) -> SAE:
    """The SAE with biases and scales moved off their initial values, so that none is trivial."""
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in sae.parameters():
            if p.ndim == 1:
                p.add_(0.05 * torch.rand(p.shape, generator=generator))
    return sae


@dataclass(frozen=True)
class Subject:
    """The SAE under test.

    Args:
        model: Builds the SAE from `d_in`, `d_sae` and `d_out`; asked for an L0 of `L0`.
        n_train: Steps of the fit that the laws of trained SAEs look at.
        l0_tolerance: Largest relative distance of the L0 on unseen rows from the one asked for.
    """

    model: Callable[..., SAE]
    n_train: int = 300
    l0_tolerance: float = L0_TOLERANCE
    _fits: dict[int, SAE] = field(default_factory=dict)

    def make(self, seed: int = 0) -> SAE:
        """A new untrained SAE."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return unsettled(self.model(d_in=D, d_sae=M, d_out=D), seed)

    @torch.enable_grad()
    def fitted(self, steps: int) -> SAE:
        """A newly fitted and calibrated SAE."""
        sae = self.make()
        start = rows(4096, 10**6)
        sample = Sample(start, start, rows(16384, 10**6 + 1))
        fit_saes(
            {"sae": sae},
            lambda s: batch(256, s),
            config(steps=steps),
            sample,
            seed=0,
            dead_after=4000,
        )
        return sae

    def trained(self, steps: int | None = None) -> SAE:
        """A copy of a fitted SAE; each number of steps is fitted once."""
        steps = steps or self.n_train
        if steps not in self._fits:
            self._fits[steps] = self.fitted(steps)
        return copy.deepcopy(self._fits[steps])


Law = Callable[[Subject], str]


def _shape(what: str, got: Tensor, wanted: tuple[int, ...]) -> str:
    shape = tuple(got.shape)
    return "" if shape == wanted else f"{what} has shape {shape}, not {wanted}"


def _distance(one: Tensor, other: Tensor) -> float:
    """Largest difference, relative to the larger of 1 and the largest entry; NaN counts as inf."""
    if one.shape != other.shape:
        return float("inf")
    one, other = one.detach(), other.detach()
    size = max(1.0, float(other.abs().max()))
    return float((one - other).abs().max().nan_to_num(float("inf"))) / size


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Bit for bit, NaN included."""
    return one.numpy().tobytes() == other.numpy().tobytes()


# ------------------------------------------------------------------------------ before training


@torch.no_grad()
def shapes(subject: Subject) -> str:
    """Codes are (B, d_sae), reconstructions (B, d_in), weights have one row per latent."""
    sae, x = subject.make().eval(), rows(8, 0)
    acts = sae.encode(x)
    complaints = [
        _shape("encode(x)", acts, (8, M)),
        _shape("decode(acts)", sae.decode(acts), (8, D)),
        _shape("W_enc", sae.W_enc, (M, D)),
        _shape("W_dec", sae.W_dec, (M, D)),
        _shape("b_enc", sae.b_enc, (M,)),
        _shape("b_dec", sae.b_dec, (D,)),
    ]
    return next(filter(None, complaints), "")


def parts_sum_to_the_total(subject: Subject) -> str:
    """The terms of the loss sum to what is minimised, which is finite."""
    sae = subject.make().train()
    loss = sae.loss(batch(), step(sae, dead=torch.arange(M) % 5 == 0))
    total, parts = loss.total.item(), sum(part.item() for part in loss.parts.values())
    if not abs(total - parts) <= 1e-5 * max(abs(parts), 1e-12):
        return f"the loss is {total:.6g}, its parts sum to {parts:.6g}"
    return ""


def loss_changes_nothing(subject: Subject) -> str:
    """The loss is a pure function: same batch and step, same value; weights and buffers stay."""
    sae = subject.make().train()
    before = copy.deepcopy(sae.state_dict())
    dead = torch.arange(M) % 5 == 0
    first, second = (sae.loss(batch(), step(sae, dead=dead)).total.item() for _ in range(2))
    if first != second:
        return f"twice the same batch gave {first:.8g} and {second:.8g}"
    after = sae.state_dict()
    moved = [key for key in before if not _is_same(before[key], after[key])]
    return f"{moved[0]} was changed; only after_step may do that" if moved else ""


def everything_learns(subject: Subject) -> str:
    """Every parameter that the phases train gets a gradient that is finite and not 0."""
    sae = subject.make().train()
    sae.begin("train", rows(1024, 3), rows(1024, 3))
    learning = {id(p): p for phase in sae.phases() for g in phase.groups for p in g.params}
    for seed in range(4):  # a latent that fires in no batch has no gradient
        total = sae.loss(batch(256, seed), step(sae)).total
        if learning:
            total.backward()
    for name, p in sae.named_parameters():
        if id(p) not in learning:
            continue
        if p.grad is None or not bool((p.grad != 0).any()):
            return f"{name} ({p.numel()} values) gets no gradient"
        if not bool(torch.isfinite(p.grad).all()):
            return f"{name} gets {int((~torch.isfinite(p.grad)).sum())} gradients not finite"
    return ""


@torch.no_grad()
def scale_is_only_units(subject: Subject) -> str:
    """Folding the input's scale into the weights changes units, and nothing else."""
    sae, x = subject.make().eval(), rows(64, 4)
    units = Units(torch.linspace(-3, 3, D), torch.full((D,), 0.37))
    scaled = units.apply(x)
    acts, recon = sae.encode(scaled), units.undo(sae(scaled))
    sae.rescale(units, units)
    flipped = int(((sae.encode(x) != 0) != (acts != 0)).sum())
    if flipped:
        return f"{flipped} of {acts.numel()} entries of the code are active in one unit only"
    far = _distance(sae(x), recon)
    return "" if far <= 1e-4 else f"reconstructions differ by {far:.3g}"


# ------------------------------------------------------------------------------ after training


@torch.no_grad()
def forward_is_decode_of_encode(subject: Subject) -> str:
    """`sae(x)` is `decode(encode(x))`, plus the direct path if there is one."""
    sae, x = subject.trained(20), rows(32, 1)
    direct = sae.linear_path(x)
    expected = sae.decode(sae.encode(x)) + (0 if direct is None else direct)
    far = _distance(sae(x), expected)
    return "" if far <= 1e-6 else f"they differ by {far:.3g}"


@torch.no_grad()
def rows_are_independent(subject: Subject) -> str:
    """In eval mode the code of a row does not depend on the other rows of its batch."""
    sae, x = subject.trained(20), rows(64, 2)
    together = sae.encode(x)
    alone = torch.cat([sae.encode(row[None]) for row in x])
    flipped = int(((together != 0) != (alone != 0)).sum())
    if flipped:
        return f"{flipped} of {together.numel()} entries are active only alone or only together"
    far = _distance(together, alone)
    return "" if far <= 1e-4 else f"values differ by {far:.3g}"


def same_seed_same_weights(subject: Subject) -> str:
    """Two fits from one seed give the same bits, so that a killed run can continue."""
    one, two = subject.trained(20).state_dict(), subject.fitted(20).state_dict()
    other = [key for key in one if not _is_same(one[key], two[key])]
    return f"{other[0]} differs by {_distance(one[other[0]], two[other[0]]):.3g}" if other else ""


@torch.no_grad()
def weights_say_it_all(subject: Subject) -> str:
    """A new SAE with the weights and buffers of a fitted one gives its codes."""
    sae, x = subject.trained(20), rows(64, 5)
    new = subject.model(d_in=D, d_sae=M, d_out=D)
    new.load_state_dict(sae.state_dict())
    far = _distance(new.eval().encode(x), sae.encode(x))
    return "" if far <= 1e-6 else f"codes differ by {far:.3g}: keep state in buffers"


@torch.no_grad()
def l0_is_met(subject: Subject) -> str:
    """The L0 on rows never seen is the one asked for."""
    sae = subject.trained()
    asked = L0 if sae.fixed_l0 is None else sae.fixed_l0
    if sae.controller is not None and sae.controller.fixed:
        return ""  # a fixed coefficient asks for no L0
    l0 = (sae.encode(rows(16384, 77)) != 0).sum(1).float().mean().item()
    if abs(l0 - asked) <= subject.l0_tolerance * asked:
        return ""
    return f"L0 is {l0:.3f}, asked for {asked:g} (tolerance {subject.l0_tolerance:.0%})"


@torch.no_grad()
def fit_beats_the_mean(subject: Subject) -> str:
    """A short fit explains the rows much better than their mean does."""
    sae, x = subject.trained(), rows(4096, 78)
    fvu = float((x - sae(x)).square().sum() / (x - x.mean(0)).square().sum())
    return "" if fvu < FVU_BELOW else f"FVU is {fvu:.3f}, must be below {FVU_BELOW}"


def static_steps_are_the_same(subject: Subject) -> str:
    """An SAE with `static_steps` has the same loss and gradients within `static.shapes()`."""
    sae = subject.make().train()
    if not (type(sae).__dict__.get("static_steps") and sae.same_draws):
        return ""
    dead = torch.arange(M) % 5 == 0
    ordinary = step(sae, dead=dead)
    on_device = replace(ordinary, progress=torch.tensor(ordinary.progress), some_dead=True)
    found: list[dict[str, Tensor]] = []
    for now, context in ((ordinary, nullcontext()), (on_device, static.shapes())):
        sae.zero_grad()
        now.generator.manual_seed(5)
        with context:
            loss = sae.loss(batch(), now)
            if loss.total.requires_grad:
                loss.total.backward()
        grads = {name: p.grad for name, p in sae.named_parameters() if p.grad is not None}
        found.append({name: g.clone() for name, g in grads.items()} | {"loss": loss.total.detach()})
    expected, got = found
    for name, value in expected.items():
        distance = _distance(got[name].to(value.dtype), value)
        if not distance <= STATIC_TOLERANCE:
            return f"{name} differs by {distance:.3g} within static.shapes()"
    return ""


#: Laws that need no training: a fraction of a second in all.
QUICK: dict[str, Law] = {
    "shapes": shapes,
    "parts sum to the total": parts_sum_to_the_total,
    "the loss changes nothing": loss_changes_nothing,
    "everything learns": everything_learns,
    "scale is only units": scale_is_only_units,
    "static steps are the same": static_steps_are_the_same,
}
LAWS: dict[str, Law] = QUICK | {
    "forward is decode of encode": forward_is_decode_of_encode,
    "rows are independent": rows_are_independent,
    "same seed, same weights": same_seed_same_weights,
    "weights say it all": weights_say_it_all,
    "L0 is met": l0_is_met,
    "a fit beats the mean": fit_beats_the_mean,
}


def complaint(law: Law, subject: Subject) -> str:
    """The complaint of a law, "" for none; an exception within the SAE's code is one too."""
    try:
        return law(subject)
    except UserError as error:
        return str(error)
    except Exception as error:
        trace, place = error.__traceback__, ""
        while trace is not None:
            code = trace.tb_frame.f_code
            place = f"{code.co_filename.rpartition('/')[2]} line {trace.tb_lineno}"
            trace = trace.tb_next
        text = " ".join(str(error).split())
        return f"{type(error).__name__}: {text} ({place})"


def check(name: str, spec: SAESpec, say: Callable[[str], None] = print) -> int:
    """Check all laws of one SAE.

    Args:
        name: Its name, for messages.
        spec: Its description, with `target_l0` at `L0`.
        say: Prints one line for each law.

    Returns:
        0 if all hold.

    Raises:
        LawBroken: A law does not hold; names the first such law with its number.
    """
    subject, broken = Subject(spec.model), {}
    began = time.monotonic()
    for law_name, law in LAWS.items():
        why = complaint(law, subject)
        say(f"  FAILS {law_name}: {why}" if why else f"  holds {law_name}")
        if why:
            broken[law_name] = why
    seconds = time.monotonic() - began
    if broken:
        raise LawBroken(_first(name, broken, len(LAWS)))
    say(f"sae={name}: all {len(LAWS)} laws hold ({seconds:.0f} s)")
    return 0


def refuse_broken(name: str, spec: SAESpec) -> None:
    """Raise `UserError` if an SAE breaks a law that needs no training.

    An SAE that cannot be built at the small size of the laws is skipped.
    """
    asked = getattr(spec.model, "keywords", {}).keys() & {"k", "target_l0"}
    subject = Subject(functools.partial(spec.model, **dict.fromkeys(asked, L0)))
    try:
        subject.make()
    except Exception:
        return
    complaints = {law: complaint(QUICK[law], subject) for law in QUICK}
    broken = {law: why for law, why in complaints.items() if why}
    if broken:
        raise UserError(
            f"{_first(name, broken, len(QUICK))}; python experiment.py --check={name} shows all"
        )


def _first(name: str, broken: dict[str, str], of: int) -> str:
    """The first broken law in one line."""
    law, why = next(iter(broken.items()))
    more = f" ({len(broken)} of {of} laws are broken)" if len(broken) > 1 else ""
    return f"sae={name} breaks the law '{law}': {why}{more}"

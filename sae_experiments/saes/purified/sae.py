"""Feature purification: train any SAE so that noise in its input changes its code little.

The perturbation acts on the input, and the encoder's response is compared: noise added behind the
encoder would make the comparison measure the noise itself, a constant without a gradient. Related:
contractive and denoising autoencoders (Rifai et al. 2011; Vincent et al. 2008), noise as Tikhonov
regularisation (Bishop 1995), random token replacement in SAE training (Narayanaswamy et al. 2026,
arXiv 2604.06495).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor

from sae_experiments.errors import UserError, of_type
from sae_experiments.saes import ops, static
from sae_experiments.saes.base import SAE, Codes, Forward, Step, sparse
from sae_experiments.saes.controller import ramp
from sae_experiments.saes.pattern import Pattern
from sae_experiments.saes.purified import perturb
from sae_experiments.saes.purified.change import Answer, Change, changed
from sae_experiments.saes.purified.early_stopping import StabilityEarlyStopping
from sae_experiments.saes.purified.perturb import NoiseModel
from sae_experiments.sampling import spread_rows
from sae_experiments.training.loop import Loss

TERMS = ("denoise", "stability", "targeted", "analytic", "decay")
#: Share of the old value that moving sums per latent lose in a step.
FORGET = 0.01
#: Equal parts of a run, each with one value of eps in its record.
EPS_TRACE = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Purification:
    """Settings of purification; each field is a key of `conf/sae/purified.yaml`."""

    eps: float
    """Size of a perturbation in units of R; where it starts, if `adapt.rate` is above 0."""
    row_frac: float
    """Share of a batch's rows that is perturbed."""
    pool: int
    """Directions that the perturbed rows share; 0: every row has its own and is encoded anew."""
    clean_frac: float
    """Share of the run before the terms set in."""
    warmup_frac: float
    """Share of the run over which the terms then grow."""
    norm: str
    """Norm of the stability term: `l2sq` or `l2`."""
    stop_gradient: bool
    """The clean code is a constant in the stability term."""
    relative: float
    """Weight of the code's own variance in the size that its change is compared with, in [0, 1]."""
    attack_steps: int
    """Steps of `pgd` noise."""
    token_share: float
    """Share of the characters that `token` noise replaces."""
    weights: Mapping[str, float]
    """Weight of each of `TERMS`, in units of the reconstruction error."""
    noise: str
    """Kind of noise: `mixture`, one kind alone, or `not_<kind>` for the mixture without it."""
    mixture: Mapping[str, float]
    """Share of each kind of noise."""
    aim: Mapping[str, float]
    """Share of each way to choose the latent of targeted noise, see `perturb.choose`."""
    adapt: Mapping[str, float]
    """Adaptation of eps, see `Purified`: `rate` (0: none), `target`, `low` and `high`."""
    stop: Mapping[str, Any]
    """Arguments of `StabilityEarlyStopping`; with `patience` 0 there is no early stopping."""

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_choices()
        self._check_names()
        perturb.checked(self.kinds, "sae.model.mixture")
        self._check_adapt()

    def _check_numbers(self) -> None:
        least = {"eps": 0, "pool": 0, "clean_frac": 0, "warmup_frac": 0, "attack_steps": 1}
        for name, low in least.items():
            value = getattr(self, name)
            if not value >= low:
                raise UserError(f"sae.model.{name}={value} must be at least {low}")
        for name in ("row_frac", "token_share"):
            value = getattr(self, name)
            if not 0 < value <= 1:
                raise UserError(f"sae.model.{name}={value} must lie in (0, 1]")
        if not 0 <= self.relative <= 1:
            raise UserError(f"sae.model.relative={self.relative} must lie in [0, 1]")

    def _check_choices(self) -> None:
        if self.norm not in ("l2", "l2sq"):
            raise UserError(f"sae.model.norm={self.norm!r} is not one of l2, l2sq")
        if self.noise.removeprefix("not_") not in ("mixture", *perturb.TYPES):
            raise UserError(
                f"sae.model.noise={self.noise!r}: give mixture, a kind "
                f"({', '.join(perturb.TYPES)}), or not_<kind>: the others"
            )

    def _check_names(self) -> None:
        for name, weight in self.weights.items():
            if name not in TERMS or not weight >= 0:
                raise UserError(
                    f"sae.model.weights.{name}={weight}: the terms are {', '.join(TERMS)}, "
                    "with weights of at least 0"
                )
        for name, share in self.aim.items():
            if name not in perturb.WAYS or not share >= 0:
                raise UserError(
                    f"sae.model.aim.{name}={share}: the ways are {', '.join(perturb.WAYS)}, "
                    "with shares of at least 0"
                )

    def _check_adapt(self) -> None:
        adapt = self.adapt
        bounded = 0 < adapt["low"] <= adapt["high"] and 0 < adapt["target"] < 1
        if not bounded or not adapt["rate"] >= 0:
            raise UserError(
                f"sae.model.adapt={dict(adapt)}: needs 0 < low <= high, rate >= 0 and target in "
                "(0, 1)"
            )

    @property
    def kinds(self) -> dict[str, float]:
        """Share of each kind of noise that is used."""
        if self.noise in perturb.TYPES:
            return {self.noise: 1.0}
        return {kind: share for kind, share in self.mixture.items() if self.noise != f"not_{kind}"}

    @property
    def samples(self) -> bool:
        """True if rows are perturbed."""
        terms = ["denoise", "stability", *(["targeted"] if self.kinds.get("targeted") else [])]
        return self.eps > 0 and any(self.weights[name] for name in terms)

    @property
    def active(self) -> bool:
        """True if any term is added to the host's loss."""
        analytic = self.eps > 0 and self.weights["analytic"] > 0
        return self.samples or self.weights["decay"] > 0 or analytic


def purify(
    *, host: Callable[..., SAE], d_in: int, d_sae: int, d_out: int | None = None, **settings: Any
) -> SAE:
    """Build an SAE of the host's own class, with its own inference, that is purified in training.

    With eps 0, or with all weights 0, training gives the same bits as training the host.

    Args:
        host: Partial of an SAE class.
        d_in: Width of the input.
        d_sae: Number of latents.
        d_out: Width of the output. None: `d_in`.
        **settings: Fields of `Purification`.

    Raises:
        UserError: The host is no plain SAE, or makes its own training pass.
    """
    cls = host.func if isinstance(host, partial) else None
    if not (isinstance(cls, type) and issubclass(cls, SAE)) or issubclass(cls, Purified):
        raise UserError(
            "sae/host must name a plain SAE of conf/sae, such as batch_topk: "
            "it cannot be purified twice"
        )
    if cls.loss is not SAE.loss or cls.training_forward is not SAE.training_forward:
        raise UserError(
            f"sae/host: {cls.__name__} makes a training pass of its own, which noise cannot enter; "
            "use another host"
        )
    purification = Purification(**settings)
    build = cast(Any, _purified(cast(Any, cls)))
    sizes = {"d_in": d_in, "d_sae": d_sae, "d_out": d_out}
    given = host.keywords if isinstance(host, partial) else {}
    return build(purification=purification, **sizes, **given)


@cache
def _purified(host: type[SAE]) -> type[SAE]:
    """The subclass of a host's class that is purified."""
    namespace = {
        "__module__": __name__,
        "__doc__": host.__doc__,
        "static_steps": bool(host.__dict__.get("static_steps")),
    }
    return type(f"Purified{host.__name__}", (Purified, host), namespace)


class Purified(SAE):
    """Mixin, placed before the host's class, that adds terms to the host's loss.

    With x~ = x + delta, z = z(x), z~ = z(x~), n0 the size of the code (see `spread`) and V the
    variance of the batch's targets, so that weights are in units of the reconstruction error:

    - `denoise mean ||y - yhat(x~)||^2`: the clean target, rebuilt from the perturbed input;
    - `stability V / n0 mean ||z~ - z||^2`; with `norm=l2`, `V mean ||z~ - z|| / sqrt n0`;
    - `targeted V mean [(dz_i / (s eps R) - 1)^2 1[i on in both] + 1/L0 sum_{l != i} (dz_l / (eps
      R))^2]` for x~ = x + s eps R d_i: a latent responds to its own direction with slope 1, and the
      others do not change;
    - `analytic V / mean ||z||^2 (eps R)^2 / d mean sum_{j on} ||e_j||^2`: the average effect of
      Gaussian noise, without noise;
    - `decay V / F sum_j ||e_j||^2`: plain weight decay of the encoder, the cheap baseline.

    With `adapt.rate` above 0, `eps <- clip(eps exp(rate (J - target)), low, high)`, where J is a
    moving average of the supports' Jaccard index.

    Args:
        purification: Settings.
        **kwargs: Arguments of the host's class.
    """

    eps: Tensor
    jaccard: Tensor
    eps_trace: Tensor
    moved: Tensor
    mass: Tensor

    support_is_rowwise = False  # perturbed pre-activations start from the clean ones
    supports_bf16 = False  # and are compared with them

    def __init__(self, *, purification: Purification, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.purification = purification
        #: The reconstruction is one term: the squared error of the whole reconstruction.
        self.whole = super().reconstruction.__func__ is SAE.reconstruction
        self._clean: Tensor | None = None
        if not purification.active:
            return  # the host itself, down to its buffers
        if purification.kinds.get("targeted", 0) > 0 and self.d_out != self.d_in:
            raise UserError(
                "sae.model.noise: decoder directions are no inputs where an SAE reads one site and "
                "rebuilds another; use no targeted noise"
            )
        self.cloud = NoiseModel(self.d_in)
        # Targets are drawn among the active entries, whose number steps on a device do not know.
        self.same_draws = not purification.kinds.get("targeted")
        if purification.samples and purification.kinds.get("token"):
            self.second_view = purification.token_share
        #: The pre-activation of x + delta is exactly `a + W_enc delta`.
        self.linear = type(self).encoder_input is SAE.encoder_input
        self.register_buffer("eps", torch.tensor(purification.eps, dtype=torch.float64))
        self.register_buffer("jaccard", torch.tensor(math.nan, dtype=torch.float64))
        self.register_buffer("eps_trace", torch.full((EPS_TRACE,), math.nan))
        # Moving sums per latent, of |dz| and of z + z~, from which a running FSS follows.
        self.register_buffer("moved", torch.zeros(self.d_sae))
        self.register_buffer("mass", torch.zeros(self.d_sae))
        self.early_stopping: StabilityEarlyStopping | None = None
        if purification.stop["patience"]:
            self.early_stopping = StabilityEarlyStopping(self, **purification.stop)
        self._last: Change | None = None

    def begin(self, phase: str, x: Tensor, y: Tensor) -> None:
        super().begin(phase, x, y)
        if self.purification.active:
            self.cloud.learn(x)
            if self.early_stopping is not None:
                self.early_stopping.begin(x, y)

    def loss(self, batch: Any, step: Step) -> Loss:
        p = self.purification
        if p.samples and p.kinds.get("token") and batch.alt is None:
            raise UserError(
                "sae.model.mixture.token: token noise needs a second view of every row, "
                "which is not there; use another kind"
            )
        if step.over if step.over is not None else self.training_over():
            self._last = None
            return of_type(self.early_stopping, StabilityEarlyStopping).idle(self, batch)
        return super().loss(batch, step)

    def support(self, pre: Tensor) -> Pattern | Tensor:
        # Attacks come with a graph, which no choice of entries can use.
        return super().support(pre.detach())

    def reconstruction(self, fwd: Forward, step: Step) -> dict[str, Tensor]:
        parts = super().reconstruction(fwd, step)
        if self.whole:
            # The denoising term needs the same number; sharing it saves a pass over the batch.
            self._clean = parts["mse"]
        return parts

    def aux_loss(self, fwd: Forward, step: Step) -> dict[str, Tensor]:
        """AuxK of the host, on as many rows as are perturbed.

        Fewer latents fire under noise, and AuxK on all rows would cost a fifth of a step.
        """
        if self.purification.samples:
            n = self._n_perturbed(fwd)
            x, y, recon = (spread_rows(t, n) for t in (fwd.batch.x, fwd.batch.y, fwd.recon))
            levels = None if fwd.levels is None else spread_rows(fwd.levels, n)
            fwd = fwd._replace(batch=fwd.batch._replace(x=x, y=y), recon=recon, levels=levels)
        return super().aux_loss(fwd, step)

    def _n_perturbed(self, fwd: Forward) -> int:
        """Number of rows of a batch that are perturbed."""
        return max(1, round(self.purification.row_frac * len(fwd.batch.x)))

    def penalties(self, fwd: Forward, step: Step) -> dict[str, Tensor]:
        terms = super().penalties(fwd, step)
        self._last = None
        strength = self._strength(step)
        # On a device nobody looks at the number: terms of strength 0 are computed, too.
        if static.on() or strength > 0:
            terms |= {k: strength * v for k, v in self.robustness(fwd, step).items()}
        self._clean = None
        return terms

    def _strength(self, step: Step) -> Any:
        """Factor of the terms at a step, between 0 and 1: a number, or a scalar on the device."""
        p = self.purification
        if not p.active:
            return 0.0
        share = ramp(step.progress - p.clean_frac, p.warmup_frac)
        if static.on():
            on = step.progress >= p.clean_frac
            return torch.as_tensor(share * on, dtype=self.W_enc.dtype)
        return share if step.progress >= p.clean_frac else 0.0

    @property
    def reach(self) -> Tensor:
        """Length of a perturbation, `eps R`, a scalar."""
        return self._eps * self.cloud.radius

    @property
    def _eps(self) -> Tensor | float:
        """The present eps: a number, or on a device a scalar that nobody waits for."""
        return self.eps.to(self.cloud.radius.dtype) if static.on() else self.eps.item()

    def robustness(self, fwd: Forward, step: Step) -> dict[str, Tensor]:
        """The terms at full strength."""
        w, y = self.purification.weights, fwd.batch.y
        n_rows = len(y)
        squares = torch.linalg.vector_norm(y).square() - y.sum(0).square().sum() / n_rows
        variance = squares / n_rows
        reach = self.reach
        terms = {}
        if w["decay"]:
            terms["decay"] = w["decay"] * variance * self.W_enc.square().sum() / self.d_sae
        if w["analytic"] and self.purification.eps > 0:
            terms["analytic"] = self._analytic(fwd, variance, reach)
        if self.purification.samples:
            terms |= self._sampled_terms(fwd, step, variance, reach)
        return terms

    def _analytic(self, fwd: Forward, variance: Tensor, reach: Tensor) -> Tensor:
        """The analytic term."""
        weight, n_rows = self.purification.weights["analytic"], len(fwd.batch.x)
        n0 = (fwd.codes.values.detach().square().sum() / n_rows).clamp_min(1e-12)
        rate = fwd.codes.fires.to(self.W_enc.dtype) / n_rows
        gain = rate @ self.W_enc.square().sum(1)
        return weight * variance / n0 * reach.square() / self.d_in * gain

    def _sampled_terms(
        self, fwd: Forward, step: Step, variance: Tensor, reach: Tensor
    ) -> dict[str, Tensor]:
        """The terms that need perturbed rows."""
        w = self.purification.weights
        terms = {}
        answer = self.answer(fwd, step)
        if w["denoise"]:
            terms["denoise"] = w["denoise"] * self.denoised(fwd, answer)
        change = self.change(answer)
        self._last = change.detach()
        n_perturbed, n_targeted = len(answer.rows), len(answer.latents)
        n_plain = n_perturbed - n_targeted
        if w["stability"] and n_plain:
            n0 = self.spread(answer.before)
            unstable = self.unstable(change, n_plain, n0)
            terms["stability"] = w["stability"] * variance * unstable
        if w["targeted"] and n_targeted:
            sizes = None if self.unit_decoder else self.W_dec.norm(dim=1)
            slopes, others = change.crosstalk(answer, reach, sizes)
            l0: Tensor | float
            if static.on():
                l0 = fwd.codes.l0_on_device.clamp_min(1).to(others)
            else:
                l0 = max(fwd.codes.l0, 1.0)
            crosstalk = (slopes + others / l0) / n_targeted
            terms["targeted"] = w["targeted"] * variance * crosstalk
        return terms

    def denoised(self, fwd: Forward, answer: Answer) -> Tensor:
        """`mean ||y - yhat(x~)||^2` over the batch, estimated from the perturbed rows.

        The estimate is the error that noise adds on the perturbed rows, plus the clean error of all
        rows. It has the same expectation as the mean over the perturbed rows and less variance (a
        control variate): the choice of rows matters only for the small difference that noise makes.
        On few rows, the gradient noise of the plain mean costs several per cent of FVU.
        """
        y = fwd.batch.y.index_select(0, answer.rows)
        noisy = ops.squared_error(self.rebuilt(answer), y)
        added = noisy - ops.squared_error(fwd.recon.index_select(0, answer.rows), y)
        if self._clean is not None:
            return added + self._clean
        return added + ops.squared_error(fwd.recon, fwd.batch.y)

    def unstable(self, change: Change, n_rows: int, n0: Tensor) -> Tensor:
        """`mean ||z~ - z||^2 / n0`, or `mean ||z~ - z|| / sqrt n0` with `norm=l2`.

        Args:
            change: Change of the code on the perturbed rows.
            n_rows: Rows to use, from the first on.
            n0: Size of the code, from `spread`.
        """
        if self.purification.norm == "l2sq":
            return change.total_square(n_rows) / n_rows / n0
        return ((change.row_squares(n_rows) + 1e-8).sqrt().mean() - 1e-4) / n0.sqrt()

    def spread(self, before: Codes) -> Tensor:
        """Size `(mean ||z||^2)^(1 - r) (mean ||z - mean z||^2)^r` of a code, with r = `relative`.

        The first factor is a constant, the second has a gradient. With r = 0 a smaller code is a
        more stable one, and the reconstruction pays. With r = 1 its size does not matter (nor do
        latents that are always on, which is why the second factor is centred), and the code grows
        in the latents that noise moves least.
        """
        values, pattern = before
        r = self.purification.relative
        rows = pattern.n_rows if pattern is not None else len(values)
        fixed = (values.detach().square().sum() / rows).clamp_min(1e-12)
        if not r:
            return fixed
        if pattern is None:
            by_latent = values.sum(0)
        else:
            by_latent = values.new_zeros(self.d_sae).index_add(0, pattern.col, values)
        variance = values.square().sum() / rows - by_latent.square().sum() / rows**2
        return fixed ** (1 - r) * variance.clamp_min(1e-12) ** r

    def rebuilt(self, answer: Answer) -> Tensor:
        """Reconstruction (n, O) from the perturbed rows."""
        recon = ops.decode(answer.after.values, answer.after.pattern, self.W_dec) + self.b_dec
        direct = self.linear_path(answer.x)
        return recon if direct is None else recon + direct

    def change(self, answer: Answer) -> Change:
        """Change of the code on the perturbed rows."""
        return changed(answer.before, answer.after, self._scratch)

    def answer(self, fwd: Forward, step: Step) -> Answer:
        """Perturb some rows of the batch and encode them.

        If the encoder is linear in its input, pre-activations of shared directions follow from the
        clean ones and a pool of projected directions, `W_enc (x + delta) = W_enc x + W_enc delta`.
        All others are computed anew.
        """
        g, x = step.generator, fwd.batch.x
        n = self._n_perturbed(fwd)
        rows = torch.randperm(len(x), generator=g, device=x.device)[:n]
        before = self.taken(fwd.codes, rows)
        moved, pre = x.index_select(0, rows), self.workspace(n, x)
        counts = perturb.shares(self.purification.kinds, n)
        pooled = 0
        if self.purification.pool and self.linear:
            pooled = sum(count for kind, count in counts.items() if kind in perturb.SHARED)
        if pooled:
            clean = of_type(fwd.pre, Tensor)  # see `support_is_rowwise`
            torch.index_select(clean, 0, rows[:pooled], out=pre[:pooled])
        begin, latents, sign = 0, rows[:0], moved[:0, 0]
        with torch.no_grad():
            for kind, count in counts.items():
                part = slice(begin, begin + count)
                begin += count
                if kind in perturb.SHARED and pooled:
                    n_directions = max(1, round(self.purification.pool * count / pooled))
                    self.shift(kind, moved[part], pre[part], n_directions, g)
                elif kind == "targeted":
                    own = torch.arange(part.start, part.stop, device=x.device)
                    latents, sign, delta = self.targets(self.taken(before, own), g)
                    moved[part] += delta
                else:
                    moved[part] += self.delta(kind, moved[part], rows[part], fwd, g)
        return Answer(rows, moved, before, self._encoded(moved, pre, pooled), latents, sign)

    def _encoded(self, moved: Tensor, pre: Tensor, pooled: int) -> Codes:
        """Differentiable codes of perturbed rows.

        Args:
            moved: Perturbed rows (n, D).
            pre: Their pre-activations (n, F); only the first rows are known.
            pooled: Number of rows with known pre-activations.
        """
        bias, seen = self.bias(), self.encoder_input(moved)
        with torch.no_grad():
            if pooled < len(moved):
                unknown = seen[pooled:].detach()
                ops.encoder_matmul(unknown, self.W_enc.detach(), bias.detach(), out=pre[pooled:])
            support = sparse(self.support(pre))
        if isinstance(support, Pattern) and ops.rounds(self.W_enc):
            pre = ops.exact_entries(support, seen.detach(), self.W_enc.detach(), bias.detach())
        active_pre = ops.entries(seen, self.W_enc, bias, pre, support)
        if isinstance(support, Pattern):
            return Codes(support.weighted(self.activation(active_pre, support.col)), support)
        return Codes(self.activation(active_pre, None) * support)

    def taken(self, codes: Codes, rows: Tensor) -> Codes:
        """Codes of some rows (n,), without a graph if the clean code counts as constant."""
        codes = codes.detach() if self.purification.stop_gradient else codes
        values, pattern = codes
        if pattern is None or static.on():
            return Codes(codes.dense().index_select(0, rows))
        part, place = perturb.take_rows(pattern, rows)
        return Codes(values.index_select(0, place), part)

    def workspace(self, n: int, like: Tensor) -> Tensor:
        """Buffer (n, F) for the pre-activations of perturbed rows, used again in each step.

        Freshly mapped memory pages would cost as much as the product. Within `static.shapes()` it
        is new: a recorded step keeps its memory for itself.
        """
        if static.on():
            return like.new_empty(n, self.d_sae)
        room = self._scratch.get("moved")
        if room is None or len(room) != n or room.device != like.device or room.dtype != like.dtype:
            room = torch.empty(n, self.d_sae, device=like.device, dtype=like.dtype)
            self._scratch["moved"] = room
        return room

    def shift(self, kind: str, x: Tensor, pre: Tensor, pool: int, g: torch.Generator) -> None:
        """Move rows and their pre-activations in place, along shared random directions.

        Each row moves forwards or backwards at random.

        Args:
            kind: One of `perturb.SHARED`.
            x: Rows (m, D).
            pre: Their pre-activations (m, F).
            pool: Number of directions.
            g: Source of directions and signs.
        """
        # Neighbours share a direction: rows are in random order already.
        each = math.ceil(len(x) / pool)
        delta = self.cloud.directions(kind, math.ceil(len(x) / each), g).mul_(self.reach)
        effect = torch.mm(delta, self.W_enc.detach().t())
        sign = perturb.signs(len(x), g).to(x.dtype)
        n_full = len(x) // each
        for rows, directions in (
            (slice(0, n_full * each), slice(0, n_full)),
            (slice(n_full * each, None), slice(n_full, None)),
        ):
            for target, change in ((x[rows], delta[directions]), (pre[rows], effect[directions])):
                if len(target):
                    by_direction = target.view(len(change), -1, target.shape[1])
                    own_sign = sign[rows].view(len(change), -1, 1)
                    by_direction.addcmul_(change[:, None], own_sign)

    def delta(self, kind: str, x: Tensor, rows: Tensor, fwd: Forward, g: torch.Generator) -> Tensor:
        """Perturbations (m, D) of one kind, other than targeted ones.

        Args:
            kind: Kind of noise.
            x: Rows to perturb (m, D).
            rows: Their places in the batch, (m,).
            fwd: The forward pass of the batch.
            g: Source of random numbers.
        """
        eps, reach = self._eps, self.reach
        if kind in perturb.SHARED:
            return self.cloud.directions(kind, len(x), g).mul_(reach)
        if kind == "mask":
            return self.cloud.mask(x, eps, g)
        if kind == "swap":
            batch = fwd.batch.x
            others = torch.randint(len(batch), (len(x),), generator=g, device=x.device)
            return self.cloud.towards(x, batch[others], eps, beyond=False)
        if kind == "token":
            return self.cloud.towards(x, cast(Tensor, fwd.batch.alt)[rows], eps, beyond=True)
        if kind == "pgd":
            return perturb.pgd(self.encode, x, reach, self.purification.attack_steps, g)
        # fgsm: the gradient of the sum of the code, over active latents.
        values, pattern = self.taken(fwd.codes.detach(), rows)
        on = (values != 0).to(values.dtype)
        uphill = ops.unit_rows(ops.decode(on, pattern, self.W_enc))
        return uphill * perturb.signs(len(x), g)[:, None] * reach

    def targets(self, codes: Codes, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Choose a latent for each row of a code, and a step along its decoder row.

        Returns:
            Latents (m,); signs s (m,); steps `s eps R d_i` (m, D). A row without an active latent
            has latent -1, sign 0 and no step.
        """
        stability = 1 - self.moved / self.mass.clamp_min(1e-12)
        latents = perturb.choose(codes, stability, self.W_enc, self.W_dec, self.purification.aim, g)
        sign = perturb.signs(len(latents), g) * (latents >= 0)
        directions = ops.unit_rows(self.W_dec[latents.clamp_min(0)])
        length = sign * self._eps * self.cloud.radius
        return latents, sign, directions * length[:, None]

    def after_step(self, fwd: Forward, step: Step) -> None:
        super().after_step(fwd, step)
        p = self.purification
        if not p.active:
            return
        if self._last is not None:
            on = self._strength(step) > 0
            if p.kinds.get("targeted"):
                self._average(self.moved, self._last.moved(), on)
                self._average(self.mass, self._last.masses(), on)
            if p.adapt["rate"]:
                self.adapt(self._last.jaccard(), on)
        self._trace(step)

    def look(self, progress: float) -> None:
        super().look(progress)
        if self.purification.active and self.early_stopping is not None:
            self.early_stopping.look(self, progress)

    def training_over(self) -> bool:
        stopping = self.early_stopping if self.purification.active else None
        return stopping is not None and stopping.stopped

    def _trace(self, step: Step) -> None:
        """Record eps in the part of the run that a step falls in."""
        if static.on():
            part = (torch.as_tensor(step.progress) * EPS_TRACE).long().clamp_max(EPS_TRACE - 1)
            self.eps_trace.index_copy_(0, part.view(1), self.eps.to(self.eps_trace).view(1))
        else:
            self.eps_trace[min(int(step.progress * EPS_TRACE), EPS_TRACE - 1)] = self.eps

    def _average(self, total: Tensor, now: Tensor, on: Tensor | bool) -> None:
        """Update a moving sum per latent (F,) in place, unless the terms are off."""
        if static.on():
            total.lerp_(now.to(total.dtype), FORGET * torch.as_tensor(on).to(total.dtype))
        else:
            total.lerp_(now.to(total.dtype), FORGET)

    def adapt(self, jaccard: Tensor, on: Tensor | bool = True) -> None:
        """Let eps follow the moving average of the supports' Jaccard index.

        Args:
            jaccard: The index in a step, a scalar.
            on: False where the terms are off, and nothing follows.
        """
        a, jaccard = self.purification.adapt, jaccard.to(self.jaccard)
        mean = torch.where(self.jaccard.isnan(), jaccard, 0.9 * self.jaccard + 0.1 * jaccard)
        eps = self.eps * torch.exp(a["rate"] * (mean - a["target"]))
        self.jaccard.copy_(torch.where(torch.as_tensor(on), mean, self.jaccard))
        self.eps.copy_(torch.where(torch.as_tensor(on), eps.clamp(a["low"], a["high"]), self.eps))

    def finish(self, phase: str, x: Tensor) -> None:
        if self.purification.active and self.early_stopping is not None:
            self.early_stopping.restore(self)
        super().finish(phase, x)

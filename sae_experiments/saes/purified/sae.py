"""Feature purification: any SAE, trained so that its code answers a perturbed input as it answers the clean one.

The perturbation acts on the input and the encoder's answer is compared: noise added behind the encoder would make the comparison measure the
noise itself, a constant without a gradient. Related: contractive and denoising autoencoders (Rifai et al. 2011; Vincent et al. 2008), noise as
Tikhonov regularisation (Bishop 1995), random token replacement in SAE training (Narayanaswamy et al. 2026, arXiv 2604.06495).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from sae_experiments.errors import UserError
from sae_experiments.saes import ops
from sae_experiments.saes.base import SAE, Codes, Forward, Step, sparse
from sae_experiments.saes.controller import ramp
from sae_experiments.saes.purified import perturb
from sae_experiments.saes.purified.early_stopping import StabilityEarlyStopping
from sae_experiments.saes.purified.perturb import Answer, Change, NoiseModel
from sae_experiments.saes.selection import Pattern
from sae_experiments.sampling import spread_rows
from sae_experiments.training.loop import Loss

TERMS = ("denoise", "stability", "targeted", "analytic", "decay")


@dataclass(frozen=True, slots=True, kw_only=True)
class Purification:
    """How an SAE is purified; each field is a key of ``conf/sae/purified.yaml``.

    ``weights`` of the terms (:data:`TERMS`); ``mixture``: share of each kind of noise; ``noise``: mixture, or one kind alone, or not_<kind> for
    the mixture without it; ``eps``: size of a perturbation in units of R (where it starts, if ``adapt.rate`` is above 0); ``row_frac``: share of a
    batch's rows that is perturbed; ``pool``: how many directions the rows share (0: every row has its own and is encoded anew); ``clean_frac`` and
    ``warmup_frac``: shares of the run without the terms, and over which they grow; ``norm``: l2sq or l2; ``stop_gradient``: the clean code is a
    constant in the stability term; ``relative``: see :meth:`Purified.spread`; ``aim``: how latents are chosen for targeted noise;
    ``attack_steps``: of pgd; ``token_share``: share of the characters that token noise replaces; ``adapt``, ``stop``: see :class:`Purified` and
    :class:`.early_stopping.StabilityEarlyStopping`.
    """

    eps: float
    row_frac: float
    pool: int
    clean_frac: float
    warmup_frac: float
    norm: str
    stop_gradient: bool
    relative: float
    attack_steps: int
    token_share: float
    weights: Mapping[str, float]
    noise: str
    mixture: Mapping[str, float]
    aim: Mapping[str, float]
    adapt: Mapping[str, float]
    stop: Mapping[str, Any]

    def __post_init__(self) -> None:
        for name, low in (
            ("eps", 0),
            ("pool", 0),
            ("clean_frac", 0),
            ("warmup_frac", 0),
            ("attack_steps", 1),
        ):
            if not getattr(self, name) >= low:
                raise UserError(f"sae.model.{name}={getattr(self, name)} must be at least {low}")
        for name in ("row_frac", "token_share"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(f"sae.model.{name}={getattr(self, name)} must lie in (0, 1]")
        if not 0 <= self.relative <= 1:
            raise UserError(f"sae.model.relative={self.relative} must lie in [0, 1]")
        if self.norm not in ("l2", "l2sq"):
            raise UserError(f"sae.model.norm={self.norm!r} is not one of l2, l2sq")
        for name, weight in self.weights.items():
            if name not in TERMS or not weight >= 0:
                raise UserError(
                    f"sae.model.weights.{name}={weight}: the terms are {', '.join(TERMS)}, with weights of at least 0"
                )
        for name, share in self.aim.items():
            if name not in perturb.WAYS or not share >= 0:
                raise UserError(
                    f"sae.model.aim.{name}={share}: the ways are {', '.join(perturb.WAYS)}, with shares of at least 0"
                )
        if self.noise.removeprefix("not_") not in ("mixture", *perturb.TYPES):
            raise UserError(
                f"sae.model.noise={self.noise!r}: give mixture, a kind ({', '.join(perturb.TYPES)}), or not_<kind>: the others"
            )
        perturb.checked(self.kinds, "sae.model.mixture")
        if (
            not 0 < self.adapt["low"] <= self.adapt["high"]
            or not self.adapt["rate"] >= 0
            or not 0 < self.adapt["target"] < 1
        ):
            raise UserError(
                f"sae.model.adapt={dict(self.adapt)}: needs 0 < low <= high, rate >= 0 and target in (0, 1)"
            )

    @property
    def kinds(self) -> dict[str, float]:
        """The share of each kind of noise."""
        if self.noise in perturb.TYPES:
            return {self.noise: 1.0}
        return {kind: share for kind, share in self.mixture.items() if self.noise != f"not_{kind}"}

    @property
    def samples(self) -> bool:
        """Whether any row is perturbed."""
        terms = ["denoise", "stability", *(["targeted"] if self.kinds.get("targeted") else [])]
        return self.eps > 0 and any(self.weights[name] for name in terms)

    @property
    def active(self) -> bool:
        """Whether anything is added to the host at all."""
        return (
            self.samples
            or self.weights["decay"] > 0
            or (self.eps > 0 and self.weights["analytic"] > 0)
        )


def purify(
    *, host: Callable[..., SAE], d_in: int, d_sae: int, d_out: int | None = None, **settings: Any
) -> SAE:
    """``host`` (a partial of an SAE class) with purification around it: an SAE of the host's own class, with the host's own inference.

    With eps 0, or with all weights 0, training gives the same bits as training the host.
    """
    cls = getattr(host, "func", None)
    if not (isinstance(cls, type) and issubclass(cls, SAE)) or issubclass(cls, Purified):
        raise UserError(
            "sae/host must name a plain SAE of conf/sae, such as batch_topk: it cannot be purified twice"
        )
    if cls.loss is not SAE.loss or cls.training_forward is not SAE.training_forward:
        raise UserError(
            f"sae/host: {cls.__name__} makes a training pass of its own, which noise cannot enter; use another host"
        )
    return cast(Any, _purified(cast(Any, cls)))(
        purification=Purification(**settings), d_in=d_in, d_sae=d_sae, d_out=d_out, **host.keywords
    )


@cache
def _purified(host: type[SAE]) -> type[SAE]:
    return type(
        f"Purified{host.__name__}",
        (Purified, host),
        {"__module__": __name__, "__doc__": host.__doc__},
    )


class Purified(SAE):
    """Mixed in before the host's class. Added to the host's loss, with x~ = x + delta, z = z(x), z~ = z(x~), n0 the size of the code
    (:meth:`spread`) and V the variance of the batch's targets (so that weights are in units of the reconstruction error):

    - ``denoise mean ||y - yhat(x~)||^2``: the clean target, rebuilt from the perturbed input;
    - ``stability V / n0 mean ||z~ - z||^2`` (``norm=l2``: ``V mean ||z~ - z|| / sqrt n0``);
    - ``targeted V mean [(dz_i / (s eps R) - 1)^2 1[i on in both] + 1/L0 sum_{l != i} (dz_l / (eps R))^2]`` for x~ = x + s eps R d_i: a latent
      answers to its own direction with slope 1 and the others stay;
    - ``analytic V / mean ||z||^2 (eps R)^2 / d mean sum_{j on} ||e_j||^2``: what Gaussian noise adds on average, without noise;
    - ``decay V / F sum_j ||e_j||^2``: plain encoder weight decay, the cheap baseline.

    ``adapt``: ``eps <- clip(eps exp(rate (J - target)), low, high)`` with J a moving average of the supports' Jaccard index.
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
        self.whole = (
            super().reconstruction.__func__ is SAE.reconstruction
        )  # one term, the squared error of the whole reconstruction
        self._clean: Tensor | None = None
        if not purification.active:
            return  # the host itself, down to its buffers
        if purification.kinds.get("targeted", 0) > 0 and self.d_out != self.d_in:
            raise UserError(
                "sae.model.noise: decoder directions are no inputs where an SAE reads one site and rebuilds another; use no targeted noise"
            )
        self.cloud = NoiseModel(self.d_in)
        #: The share of characters to be replaced in the second view that this SAE needs of every row (0: it needs none).
        self.second_view = (
            purification.token_share
            if purification.samples and purification.kinds.get("token")
            else 0.0
        )
        self.linear = type(self).encoder_input is SAE.encoder_input  # a + W_enc delta is exact
        for name, value in (("eps", purification.eps), ("jaccard", math.nan)):
            self.register_buffer(name, torch.tensor(value, dtype=torch.float64))
        self.register_buffer(
            "eps_trace", torch.full((50,), math.nan)
        )  # one value for each fiftieth of the run
        self.register_buffer("moved", torch.zeros(self.d_sae))  # moving sums a latent: |dz| ...
        self.register_buffer(
            "mass", torch.zeros(self.d_sae)
        )  # ... and z + z~, which give a running FSS
        self.early_stopping = (
            StabilityEarlyStopping(self, **purification.stop)
            if purification.stop["patience"]
            else None
        )
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
                "sae.model.mixture.token: token noise needs a second view of every row, which is not there; use another kind"
            )
        if p.active and self.early_stopping is not None and self.early_stopping.stopped:
            return self.early_stopping.idle(self, batch, step)
        return super().loss(batch, step)

    def support(self, pre: Tensor) -> Pattern | Tensor:
        return super().support(
            pre.detach()
        )  # attacks come with a graph, which no choice of entries can use

    def reconstruction(self, fwd: Forward, step: Step) -> dict[str, Tensor]:
        parts = super().reconstruction(fwd, step)
        if (
            self.whole
        ):  # the denoising term needs the same number, and to share it spares a pass over the batch
            self._clean = parts["mse"]
        return parts

    def aux_loss(self, fwd: Forward, step: Step) -> dict[str, Tensor]:
        """The host's AuxK, on as many rows as are perturbed: fewer latents fire under noise, and all rows would cost a fifth of a step."""
        if self.purification.samples:
            n = max(1, round(self.purification.row_frac * len(fwd.batch.x)))
            x, y, recon = (spread_rows(t, n) for t in (fwd.batch.x, fwd.batch.y, fwd.recon))
            levels = None if fwd.levels is None else spread_rows(fwd.levels, n)
            fwd = fwd._replace(batch=fwd.batch._replace(x=x, y=y), recon=recon, levels=levels)
        return super().aux_loss(fwd, step)

    def penalties(self, fwd: Forward, step: Step) -> dict[str, Tensor]:
        terms = super().penalties(fwd, step)
        p = self.purification
        self._last = None
        strength = (
            ramp(step.progress - p.clean_frac, p.warmup_frac)
            if p.active and step.progress >= p.clean_frac
            else 0.0
        )
        if strength > 0:
            terms |= {k: strength * v for k, v in self.robustness(fwd, step).items()}
        self._clean = None
        return terms

    def robustness(self, fwd: Forward, step: Step) -> dict[str, Tensor]:
        """The terms at full strength."""
        w, n_rows, terms = self.purification.weights, len(fwd.batch.x), {}
        y = fwd.batch.y
        variance = (
            torch.linalg.vector_norm(y).square() - y.sum(0).square().sum() / n_rows
        ) / n_rows
        reach = self.eps.item() * self.cloud.radius
        if w["decay"]:
            terms["decay"] = w["decay"] * variance * self.W_enc.square().sum() / self.d_sae
        if w["analytic"] and reach > 0:
            n0 = (fwd.codes.values.detach().square().sum() / n_rows).clamp_min(1e-12)
            often = fwd.codes.fires.to(self.W_enc.dtype) / n_rows
            terms["analytic"] = (
                w["analytic"]
                * variance
                / n0
                * reach.square()
                / self.d_in
                * (often @ self.W_enc.square().sum(1))
            )
        if not self.purification.samples:
            return terms
        answer = self.answer(fwd, step)
        if w["denoise"]:
            terms["denoise"] = w["denoise"] * self.denoised(fwd, answer)
        change = self.change(answer)
        self._last = change._replace(value=change.value.detach())
        plain = len(answer.rows) - len(answer.latents)
        if w["stability"] and plain:
            terms["stability"] = (
                w["stability"]
                * variance
                * self.unstable(change, plain, len(answer.rows), self.spread(answer.before))
            )
        if w["targeted"] and len(answer.latents):
            sizes = None if self.unit_decoder else self.W_dec.norm(dim=1)
            terms["targeted"] = (
                w["targeted"]
                * variance
                * perturb.crosstalk(change, answer, reach, fwd.codes.l0, sizes)
            )
        return terms

    def denoised(self, fwd: Forward, answer: Answer) -> Tensor:
        """``mean ||y - yhat(x~)||^2`` over the batch, from the perturbed rows alone: what noise adds there, plus the clean error of all rows.

        The same expectation as the mean over the perturbed rows, with less variance (a control variate): which rows were drawn matters only for the
        small difference that noise makes. On few rows the plain mean costs several per cent of FVU in gradient noise.
        """
        y = fwd.batch.y.index_select(0, answer.rows)
        added = ops.squared_error(self.rebuilt(answer), y) - ops.squared_error(
            fwd.recon.index_select(0, answer.rows), y
        )
        return added + (
            ops.squared_error(fwd.recon, fwd.batch.y) if self._clean is None else self._clean
        )

    def unstable(self, change: Change, n_rows: int, perturbed: int, n0: Tensor) -> Tensor:
        """``mean ||z~ - z||^2 / n0`` over the first ``n_rows`` of the ``perturbed`` rows, or with ``norm=l2`` ``mean ||z~ - z|| / sqrt n0``."""
        row, value = change.row, change.value
        if n_rows < perturbed:
            here = (row < n_rows).nonzero().squeeze(1)
            row, value = row[here], value[here]
        if self.purification.norm == "l2sq":
            return value.square().sum() / n_rows / n0
        by_row = value.new_zeros(n_rows).index_add(0, row, value.square())
        return ((by_row + 1e-8).sqrt().mean() - 1e-4) / n0.sqrt()

    def spread(self, before: Codes) -> Tensor:
        """What the change of a code is compared with, ``(mean ||z||^2)^(1 - r) (mean ||z - mean z||^2)^r``: the first a constant, the second with its
        gradient, r = ``relative``. With r = 0 a smaller code is a more stable one, and the reconstruction pays; with r = 1 its size does not matter
        (nor do latents that are always on, which is why it is centred), and it grows in the latents that noise moves least.
        """
        values, pattern = before
        r, rows = self.purification.relative, pattern.n_rows if pattern is not None else len(values)
        fixed = (values.detach().square().sum() / rows).clamp_min(1e-12)
        if not r:
            return fixed
        by_latent = (
            values.sum(0)
            if pattern is None
            else values.new_zeros(self.d_sae).index_add(0, pattern.col, values)
        )
        variance = (values.square().sum() / rows - by_latent.square().sum() / rows**2).clamp_min(
            1e-12
        )
        return fixed ** (1 - r) * variance**r

    def rebuilt(self, answer: Answer) -> Tensor:
        """The reconstruction from the perturbed rows (n, O)."""
        recon = ops.decode(answer.after.values, answer.after.pattern, self.W_dec) + self.b_dec
        direct = self.linear_path(answer.x)
        return recon if direct is None else recon + direct

    def change(self, answer: Answer) -> Change:
        """What moved, entry by entry."""
        return perturb.changed(answer.before, answer.after, self._scratch)

    def answer(self, fwd: Forward, step: Step) -> Answer:
        """Perturb some rows of the batch and encode them: from the clean pre-activations and a pool of projected directions where that is exact,
        ``W_enc (x + delta) = W_enc x + W_enc delta``, else anew.
        """
        p, g, x = self.purification, step.generator, fwd.batch.x
        n = max(1, round(p.row_frac * len(x)))
        rows = torch.randperm(len(x), generator=g, device=x.device)[:n]
        before = self.taken(fwd.codes, rows)
        moved, pre = x.index_select(0, rows), self.workspace(n, x)
        counts = perturb.shares(p.kinds, n)
        pooled = (
            sum(m for kind, m in counts.items() if kind in perturb.SHARED)
            if p.pool and self.linear
            else 0
        )
        if pooled:
            torch.index_select(fwd.pre, 0, rows[:pooled], out=pre[:pooled])
        begin, latents, sign = 0, rows[:0], moved[:0, 0]
        with torch.no_grad():
            for kind, m in counts.items():
                part = slice(begin, begin + m)
                begin += m
                if kind in perturb.SHARED and pooled:
                    self.shift(kind, moved[part], pre[part], max(1, round(p.pool * m / pooled)), g)
                elif kind == "targeted":
                    latents, sign, delta = self.targets(
                        self.taken(before, torch.arange(part.start, part.stop, device=x.device)), g
                    )
                    moved[part] += delta
                else:
                    moved[part] += self.delta(kind, moved[part], rows[part], fwd, g)
        bias, seen = self.bias(), self.encoder_input(moved)
        with torch.no_grad():
            if pooled < n:
                ops.encoder_matmul(
                    seen[pooled:].detach(), self.W_enc.detach(), bias.detach(), out=pre[pooled:]
                )
            support = sparse(self.support(pre))
        pattern = support if isinstance(support, Pattern) else None
        values = self.activation(
            ops.entries(seen, self.W_enc, bias, pre, support), pattern.col if pattern else None
        )
        return Answer(
            rows,
            moved,
            before,
            Codes(values, pattern) if pattern else Codes(values * support),
            latents,
            sign,
        )

    def taken(self, codes: Codes, rows: Tensor) -> Codes:
        """The codes of some rows (n,), without a graph if the clean code counts as constant."""
        values, pattern = codes
        values = values.detach() if self.purification.stop_gradient else values
        if pattern is None:
            return Codes(values.index_select(0, rows))
        part, place = perturb.take_rows(pattern, rows)
        return Codes(values.index_select(0, place), part)

    def workspace(self, n: int, like: Tensor) -> Tensor:
        """Room for the pre-activations of n perturbed rows, used again in each step: freshly mapped pages would cost as much as the product."""
        room = self._scratch.get("moved")
        if room is None or len(room) != n or room.device != like.device or room.dtype != like.dtype:
            room = self._scratch["moved"] = torch.empty(
                n, self.d_sae, device=like.device, dtype=like.dtype
            )
        return room

    def shift(self, kind: str, x: Tensor, pre: Tensor, pool: int, g: torch.Generator) -> None:
        """Move rows and their pre-activations, in place, each along one of ``pool`` random directions, forwards or backwards."""
        each = -(
            -len(x) // pool
        )  # neighbours share a direction: rows stand in random order already
        delta = self.cloud.directions(kind, -(-len(x) // each), g).mul_(
            self.eps.item() * self.cloud.radius
        )
        effect = torch.mm(delta, self.W_enc.detach().t())
        sign = perturb.signs(len(x), g).to(x.dtype)
        whole = len(x) // each * each
        for rows, directions in (
            (slice(0, whole), slice(0, whole // each)),
            (slice(whole, None), slice(whole // each, None)),
        ):
            for target, change in ((x[rows], delta[directions]), (pre[rows], effect[directions])):
                if len(target):
                    target.view(len(change), -1, target.shape[1]).addcmul_(
                        change[:, None], sign[rows].view(len(change), -1, 1)
                    )

    def delta(self, kind: str, x: Tensor, rows: Tensor, fwd: Forward, g: torch.Generator) -> Tensor:
        """Perturbations (m, D) of the batch's ``rows``, whose activations are ``x``."""
        eps, reach = self.eps.item(), self.eps.item() * self.cloud.radius
        if kind in perturb.SHARED:
            return self.cloud.directions(kind, len(x), g).mul_(reach)
        if kind == "mask":
            return self.cloud.mask(x, eps, g)
        if kind == "swap":
            return self.cloud.towards(
                x,
                fwd.batch.x[
                    torch.randint(len(fwd.batch.x), (len(x),), generator=g, device=x.device)
                ],
                eps,
                beyond=False,
            )
        if kind == "token":
            return self.cloud.towards(x, cast(Tensor, fwd.batch.alt)[rows], eps, beyond=True)
        if kind == "pgd":
            return perturb.pgd(self.encode, x, reach, self.purification.attack_steps, g)
        values, pattern = self.taken(
            fwd.codes.detach(), rows
        )  # fgsm: the gradient of the sum of the code, over what is active
        on = (values != 0).to(values.dtype)
        return (
            perturb.unit(ops.decode(on, pattern, self.W_enc))
            * perturb.signs(len(x), g)[:, None]
            * reach
        )

    def targets(self, codes: Codes, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """A latent for each row of ``codes``, a sign, and the step ``sign eps R d_i`` (m, D); rows without an active latent stay."""
        stability = 1 - self.moved / self.mass.clamp_min(1e-12)
        latents = perturb.choose(codes, stability, self.W_enc, self.W_dec, self.purification.aim, g)
        sign = perturb.signs(len(latents), g) * (latents >= 0)
        return (
            latents,
            sign,
            perturb.unit(self.W_dec[latents.clamp_min(0)])
            * (sign * self.eps.item() * self.cloud.radius)[:, None],
        )

    def after_step(self, fwd: Forward, step: Step) -> None:
        super().after_step(fwd, step)
        p = self.purification
        if not p.active:
            return
        if self._last is not None:
            if p.kinds.get("targeted"):
                for total, part in (
                    (self.moved, self._last.value.abs()),
                    (self.mass, self._last.mass),
                ):
                    total.lerp_(
                        torch.bincount(self._last.col, part, minlength=self.d_sae).to(total.dtype),
                        0.01,
                    )
            if p.adapt["rate"]:
                self.adapt(self._last.jaccard(round(p.row_frac * len(fwd.batch.x))))
        self.eps_trace[min(int(step.progress * len(self.eps_trace)), len(self.eps_trace) - 1)] = (
            self.eps
        )
        if self.early_stopping is not None:
            self.early_stopping.look(self, step.progress)

    def adapt(self, jaccard: float) -> None:
        """Let eps follow the moving average of the supports' Jaccard index."""
        a = self.purification.adapt
        old = self.jaccard.item()
        self.jaccard.fill_(jaccard if math.isnan(old) else 0.9 * old + 0.1 * jaccard)
        eps = self.eps.item() * math.exp(a["rate"] * (self.jaccard.item() - a["target"]))
        self.eps.fill_(min(max(eps, a["low"]), a["high"]))

    def finish(self, phase: str, x: Tensor) -> None:
        if self.purification.active and self.early_stopping is not None:
            self.early_stopping.restore(self)
        super().finish(phase, x)

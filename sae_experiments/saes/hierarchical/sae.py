"""Hierarchical SAE: basic features below, combinations of them above, joined by a gated skip and trained in three phases."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from sae_experiments.errors import UserError
from sae_experiments.saes import ops
from sae_experiments.saes.base import SAE, Batch, Step, Units, by_rows
from sae_experiments.saes.controller import ramp
from sae_experiments.saes.hierarchical.level import (
    Controllers,
    Joined,
    Level,
    Passed,
    Seen,
    Weights,
    active_of,
    matmul,
    signed_directions,
    widths_of,
)
from sae_experiments.saes.hierarchical.redundancy import Coherence, Information
from sae_experiments.sampling import spread_rows
from sae_experiments.training.loop import Group, Loss, Phase

PHASES = ("bottom", "top", "both")
#: What the running record of a fit holds: a row for each of its equal parts.
TRACE, TRACED = (
    250,
    ("progress", "bottom_sparsity", "top_sparsity", "bottom_coeff", "top_coeff", "gate"),
)
CHUNK = 4096


class Hierarchical(SAE):
    """Two levels (``z1``, m1 latents at the first of ``sparsity``; ``z2``, m2 latents at the second), side by side in the code ``[z1, z2]``::

        z1 = (E1 (x - b0) + c1) above theta1        u  = z1 / s,  s_j = sqrt(m1 E z1_j^2)
        z2 = (E2 u + c2) above theta2               v  = ReLU(D2^T z2 + c3),  z1hat = s v
        g  = sigmoid(A B z2 + b)                    z  = g z1 + (1 - g) z1hat,  xhat = b0 + D1^T z

    The top reads the bottom's code, not x, and writes into it: the largest entries of a row of D2 are the bottom latents a top latent is made
    of, ``t_i = D1^T (s d2_i)`` is its direction in x. The gate says, from the top code alone, which bottom latents the top fails to predict.

    Phases: ``bottom`` trains E1, c1, D1, b0 on ``||x - b0 - D1^T z1||^2``; ``top`` everything else with the bottom frozen; ``both`` all, the
    bottom's learning rate times ``bottom_lr``. Loss, with ``R(y) = mean_B ||x - y||^2 / V`` and V the variance of x::

        R(xhat) + top R(xhat with g = 0) + bottom R(xhat with g = 1) + lambda1 |z1| + lambda2 |z2| + code ||z1 - z1hat||^2 / ||z1||^2
        + orthogonality Coherence + mutual_information Information + gate mean_B sum_j g_j 1[z1_j > 0] / L0 + anchor mean_j (1 - cos(d1_j, d1_j'))

    (``anchor`` and the R of the bottom in the last phase only; d1' is D1 at the end of the first.) Without the gate's price and the paths
    that are dropped at random, g = 1 everywhere would be a minimum, in which the top learns nothing.

    Args:
        target_l0: null for what ``sparsity`` says; a number multiplies the share of active latents of both levels so that this is their total.
        sparsity: share of a row's latents that are zero, of the bottom and of the top.
        top_frac: share of the latents in the top level.
        levels: "both"; "bottom" has no top; "top" keeps the gate closed (g = 0), so that the reconstruction is the top's.
        phase_fracs: share of the steps in each phase.
        rank: of the gate A B; ``gate_bias`` is b at the start.
        drop_bottom, drop_top: share of the rows in training with g = 0, with g = 1.
        rows: rows of a batch that the phases with both levels use, spread over it (null: all).
        weights: of the loss terms.
        information, coherence: sizes of the two redundancy terms.
        aim, start_coeff, start_l0, warmup_frac: of each level's L1 (:class:`.Standard`); warmup is a share of the phase that trains a level first.
    """

    supports_bf16 = False  # both levels make their products themselves
    same_units = True

    def __init__(
        self,
        *,
        d_in: int,
        d_sae: int,
        d_out: int | None = None,
        target_l0: float | None,
        sparsity: Sequence[float],
        top_frac: float,
        levels: str,
        phase_fracs: Sequence[float],
        rank: int,
        gate_bias: float,
        drop_bottom: float,
        drop_top: float,
        rows: int | None,
        bottom_lr: float,
        weights: dict[str, float],
        information: dict[str, Any],
        coherence: dict[str, Any],
        aim: float,
        start_coeff: Sequence[float],
        start_l0: float | None,
        warmup_frac: float,
        aux_coeff: float,
    ) -> None:
        nn.Module.__init__(self)  # a composite: its weights are those of its levels
        widths = widths_of(d_in, d_sae, d_out, top_frac, levels)
        active = active_of(widths, sparsity, target_l0)
        if len(phase_fracs) != 3 or min(phase_fracs) <= 0 or abs(sum(phase_fracs) - 1) > 1e-6:
            raise UserError(
                f"sae.model.phase_fracs={list(phase_fracs)} must be three positive numbers that sum to 1"
            )
        if drop_bottom < 0 or drop_top < 0 or drop_bottom + drop_top > 1:
            raise UserError(
                f"sae.model: drop_bottom={drop_bottom} and drop_top={drop_top} must not be negative nor sum to more than 1"
            )
        if rank < 1 or (rows is not None and rows < 1):
            raise UserError(f"sae.model: rank={rank} and rows={rows} must be at least 1")
        self.d_in, self.d_sae, self.d_out, self.widths, self.levels = (
            d_in,
            sum(widths),
            d_in,
            widths,
            levels,
        )
        self.aux_coeff, self.unit_decoder, self.pre_bias = aux_coeff, True, True
        self.phase_fracs = [1.0] if levels == "bottom" else list(phase_fracs)
        self.drop_bottom, self.drop_top, self.rows, self.bottom_lr, self.warmup_frac = (
            drop_bottom,
            drop_top,
            rows,
            bottom_lr,
            warmup_frac,
        )
        self.weights, self.active = Weights.checked(weights), active
        steered = {
            "aim": aim,
            "start_l0": start_l0,
            "warmup_frac": warmup_frac,
            "aux_coeff": aux_coeff,
        }
        self.bottom = Level(
            d_in=d_in, d_sae=widths[0], target_l0=active[0], start_coeff=start_coeff[0], **steered
        )
        if levels != "bottom":
            m1, m2 = widths
            self.top = Level(
                d_in=m1,
                d_sae=m2,
                target_l0=active[1],
                start_coeff=start_coeff[1],
                pre_bias=False,
                **steered,
            )
            if levels == "both":
                self.gate_in = nn.Parameter(torch.randn(rank, m2) / rank**0.5)
                self.gate_out = nn.Parameter(torch.randn(m1, rank) / rank**0.5)
                self.gate_bias = nn.Parameter(torch.full((m1,), float(gate_bias)))
        self.register_buffer("scale", torch.ones(widths[0]))
        self.register_buffer("variance", torch.ones(()))
        self.register_buffer(
            "joined", torch.zeros((), dtype=torch.bool)
        )  # whether the top takes part yet
        self.register_buffer(
            "group", torch.cat([torch.full((w,), i) for i, w in enumerate(widths)])
        )
        self.register_buffer("trace", torch.full((TRACE, len(TRACED)), torch.nan))
        self.seed = torch.initial_seed()
        self.information, self.coherence = Information(**information), Coherence(**coherence)
        self.controller = Controllers(self.parts, self.phase_fracs[: len(widths)])
        for phase in PHASES if levels != "bottom" else PHASES[:1]:
            self.register_buffer(f"end_of_{phase}", self._packed())

    @property
    def fixed_l0(self) -> float | None:
        return float(sum(self.active))

    # --- what others see ----------------------------------------------------------------------------------------------

    @property
    def parts(self) -> list[Level]:
        """The levels, bottom first."""
        return [self.bottom] if self.levels == "bottom" else [self.bottom, self.top]

    @property
    def W_enc(self) -> Tensor:  # noqa: N802
        """What a latent reads (F, D): rows of E1, and of E2 carried back through the bottom as if all its latents were active."""
        rows = (
            [self.bottom.W_enc]
            if self.levels == "bottom"
            else [self.bottom.W_enc, (self.top.W_enc / self.scale) @ self.bottom.W_enc]
        )
        return torch.cat(rows)

    @property
    def W_dec(self) -> Tensor:  # noqa: N802
        """What one unit of a latent writes where its path is open (F, D): rows of D1, and those of ``D2 s D1``, in the same units."""
        return torch.cat(
            [self.bottom.W_dec] if self.levels == "bottom" else [self.bottom.W_dec, self._writes()]
        )

    @property
    def b_enc(self) -> Tensor:
        """Encoder biases of both levels (F,)."""
        return torch.cat([level.b_enc for level in self.parts])

    @property
    def b_dec(self) -> Tensor:
        """Bias of the reconstruction (D,)."""
        return self.bottom.b_dec

    @property
    def threshold(self) -> Tensor:
        """The threshold of every latent (F,)."""
        return torch.cat([level.threshold.expand(level.d_sae) for level in self.parts])

    def atoms(self, latents: Tensor | None = None) -> Tensor:
        """Unit directions ``t_i`` of top latents in x, (n, D); ``latents`` None: all."""
        return ops.unit_rows(self._writes(latents))

    def _writes(self, latents: Tensor | None = None) -> Tensor:
        """What one unit of a top latent adds with the gate closed, ``D1^T (s d2_i)``, (n, D)."""
        rows = self.top.W_dec if latents is None else self.top.W_dec[latents]
        return matmul(rows * self.scale, self.bottom.W_dec)

    @by_rows("d_sae")
    def contributions(self, acts: Tensor, direction: Tensor) -> Tensor:
        if self.levels == "bottom" or not self.joined:
            reach = self.bottom.W_dec @ direction
            return torch.nn.functional.pad(
                acts[:, : self.widths[0]] * reach, (0, self.d_sae - self.widths[0])
            )
        z1, z2 = self.split(acts)
        gate, reach = self.gates(z2), self.bottom.W_dec @ direction
        passed = (
            (1 - gate) * (self.predict(z2) > 0) * (self.scale * reach)
        )  # a bottom latent that the top says is off carries nothing
        return torch.cat([gate * z1 * reach, z2 * (passed @ self.top.W_dec.t())], 1)

    @by_rows("d_in")
    def pre_acts(self, x: Tensor) -> Tensor:
        a1 = self.bottom.pre_acts(x)
        if self.levels == "bottom":
            return a1
        return torch.cat([a1, self.top.pre_acts(a1 * (a1 > self.bottom.threshold) / self.scale)], 1)

    def split(self, acts: Tensor) -> list[Tensor]:
        """The codes of the levels, from dense codes (B, F)."""
        return list(acts.split(list(self.widths), 1))

    def gates(self, z2: Tensor) -> Tensor:
        """How much of each bottom latent passes the skip (B, m1), from the top's code."""
        if self.levels == "top":
            return z2.new_zeros(len(z2), self.widths[0])
        return torch.sigmoid(
            matmul(matmul(z2, self.gate_in.t()), self.gate_out.t()) + self.gate_bias
        )

    def predict(self, z2: Tensor) -> Tensor:
        """The bottom's code in units of its scale, as the top says it is: ``v`` (B, m1)."""
        return torch.relu(matmul(z2, self.top.W_dec) + self.top.b_dec)

    @by_rows("d_sae")
    def decode(self, acts: Tensor, gate: float | None = None) -> Tensor:
        """Reconstruction of dense codes (B, F). ``gate`` 1 gives the bottom's, 0 the top's, None lets the gates decide."""
        if self.levels == "bottom" or gate == 1 or (gate is None and not self.joined):
            return self.bottom.decode(self.split(acts)[0])
        z1, z2 = self.split(acts)
        predicted = self.predict(z2) * self.scale
        if gate == 0 or (gate is None and self.levels == "top"):
            return self.bottom.decode(predicted)
        open_ = self.gates(z2) if gate is None else gate
        return self.bottom.decode(torch.lerp(predicted, z1, open_))

    # --- training -----------------------------------------------------------------------------------------------------

    def phases(self) -> list[Phase]:
        below = list(self.bottom.parameters())
        if self.levels == "bottom":
            return [Phase("bottom", 1.0, [Group(below)])]
        above = [p for name, p in self.named_parameters() if not name.startswith("bottom.")]
        groups = [[Group(below)], [Group(above)], [Group(above), Group(below, self.bottom_lr)]]
        return [Phase(*each) for each in zip(PHASES, self.phase_fracs, groups, strict=True)]

    @torch.no_grad()
    def begin(self, phase: str, x: Tensor, y: Tensor) -> None:
        """Data for the level that is about to learn: biases (as :class:`.Standard`) and V below; above, directions of largest variance of u too.

        D2 starts from principal directions of u, each with both signs (a latent is positive), E2 from the same rows.
        """
        if phase != "top" and not self.joined:
            self.bottom.begin(phase, x, y)
            self.variance.copy_((y - y.mean(0)).square().sum(1).mean().clamp_min(1e-12))
        if phase != "bottom" and self.levels != "bottom" and not self.joined:
            self.joined.fill_(True)
            self._begin_top(phase, spread_rows(x, 2 * CHUNK))

    def _begin_top(self, phase: str, x: Tensor) -> None:
        u = torch.cat(list(self._codes(x)))
        rows = signed_directions(u, self.widths[1], self.seed)
        for weight in (self.top.W_dec, self.top.W_enc):
            weight.data.copy_(rows)
        self.top.begin(phase, u, u)

    def _codes(self, x: Tensor) -> Iterator[Tensor]:
        """The bottom's code as the top reads it, chunk by chunk."""
        for chunk in x.split(CHUNK):
            yield self.bottom.dense(chunk) / self.scale

    def loss(self, batch: Batch, step: Step) -> Loss:
        if step.phase == "bottom" or self.levels == "bottom":
            return self._loss_of_bottom(batch, step)
        batch = Batch(spread_rows(batch.x, self.rows), spread_rows(batch.y, self.rows))
        passed = self._pass(batch.x, step)
        recon = self.bottom_decode(passed.mixed)
        w, whole = self.weights, step.phase != "top"
        parts = {"mse": self._relative(recon, batch.y)}
        predicted = passed.predicted * self.scale
        if self.levels == "both":
            parts["top_mse"] = w.top * self._relative(self.bottom_decode(predicted), batch.y)
            on = passed.z[0].detach() > 0
            parts["gate"] = w.gate * (passed.gate * on).sum() / (len(on) * self.active[0])
        if whole and self.levels == "both":
            parts["bottom_mse"] = w.bottom * self._relative(
                self.bottom_decode(passed.z[0]), batch.y
            )
        if whole:
            parts["sparsity_bottom"] = self.bottom.penalty(passed.z[0], 1.0)
            anchor = self.weights_after("bottom")["bottom.W_dec"]
            parts["anchor"] = w.anchor * (1 - (self.bottom.W_dec * anchor).sum(1)).mean()
        parts["sparsity_top"] = self.top.penalty(
            passed.z[1], ramp(step.progress, self.warmup_frac) if step.phase == "top" else 1.0
        )
        parts["code"] = (
            w.code
            * (passed.z[0] - predicted).square().sum()
            / passed.z[0].detach().square().sum().clamp_min(1e-12)
        )
        parts |= self._redundancy(batch.x, passed, step) | self._revival(
            batch, passed, recon, step, whole
        )
        gate = None if passed.gate is None else passed.gate.detach()
        codes = Joined([z.detach() for z in passed.z], list(self.widths))
        return Loss(
            sum(parts.values()),
            {k: v.detach() for k, v in parts.items()},
            Seen(batch, codes, recon.detach(), gate),
        )

    def _loss_of_bottom(self, batch: Batch, step: Step) -> Loss:
        z1 = self.bottom.dense(batch.x)
        recon = self.bottom_decode(z1)
        parts = {
            "mse": self._relative(recon, batch.y),
            "sparsity_bottom": self.bottom.penalty(z1, ramp(step.progress, self.warmup_frac)),
        }
        dead = step.dead[: self.widths[0]].nonzero().squeeze(1)
        if self.aux_coeff and dead.numel():
            parts["aux_k"] = self.aux_coeff * self.bottom.aux_k_loss(batch.x, batch.y - recon, dead)
        codes = Joined([z1.detach()], list(self.widths))
        return Loss(
            sum(parts.values()),
            {k: v.detach() for k, v in parts.items()},
            Seen(batch, codes, recon.detach(), None),
        )

    def bottom_decode(self, z: Tensor) -> Tensor:
        """``b0 + D1^T z``."""
        return matmul(z, self.bottom.W_dec) + self.bottom.b_dec

    def _relative(self, recon: Tensor, y: Tensor) -> Tensor:
        return ops.squared_error(recon, y) / self.variance

    def _pass(self, x: Tensor, step: Step) -> Passed:
        z1 = self.bottom.dense(x)
        u = z1 / self.scale
        z2 = self.top.dense(u)
        v = self.predict(z2)
        if self.levels == "top":
            return Passed((z1, z2), u, v, None, v * self.scale)
        gate = self.gates(z2)
        # On some rows one of the two paths is taken away, so that each learns to do without the other.
        drawn = torch.rand(len(x), 1, generator=step.generator, device=x.device)
        used = torch.where(
            drawn < self.drop_bottom, 0.0, torch.where(drawn >= 1 - self.drop_top, 1.0, gate)
        )
        return Passed((z1, z2), u, v, gate, torch.lerp(v * self.scale, z1, used))

    def _redundancy(self, x: Tensor, passed: Passed, step: Step) -> dict[str, Tensor]:
        """The two terms between the levels, where their weights are not 0."""
        w, parts = self.weights, {}
        if w.orthogonality:
            parts["orthogonality"] = w.orthogonality * self.coherence(
                self.atoms(self._some(self.widths[1], self.coherence.chunk, step)),
                self.bottom.W_dec,
            )
        if w.mutual_information:
            soft = []
            for level, source, z, n in zip(
                self.parts,
                (x, passed.code),
                passed.z,
                (self.information.bottom, self.information.top),
                strict=True,
            ):
                on = z.detach() > 0
                alive = on.any(0).nonzero().squeeze(1)
                chosen = alive[self._some(len(alive), n, step)]
                mean = z.detach().sum() / on.sum().clamp_min(1)
                soft.append(
                    self.information.soft(level.columns(source, chosen), level.threshold, mean)
                )
            parts["mutual_information"] = w.mutual_information * self.information(*soft)
        return parts

    def _some(self, n: int, k: int, step: Step) -> Tensor:
        """k of n numbers at random, all if there are fewer."""
        return torch.randperm(n, generator=step.generator, device=step.generator.device)[:k]

    def _revival(
        self, batch: Batch, passed: Passed, recon: Tensor, step: Step, whole: bool
    ) -> dict[str, Tensor]:
        """AuxK of each level that learns, on what that level leaves over."""
        if not self.aux_coeff or not bool(step.dead.any()):
            return {}
        dead, terms = [part.nonzero().squeeze(1) for part in step.dead.split(list(self.widths))], []
        if dead[0].numel() and whole:
            terms.append(self.bottom.aux_k_loss(batch.x, batch.y - recon, dead[0]))
        if dead[1].numel():
            terms.append(self.top.aux_k_loss(passed.code, passed.code - passed.predicted, dead[1]))
        return {"aux_k": self.aux_coeff * sum(terms)} if terms else {}

    def before_update(self) -> None:
        for level in self.parts:
            level.before_update()

    def after_update(self, fwd: Seen, step: Step) -> None:
        for level in self.parts:
            level.settle()
        self.after_step(fwd, step)

    def after_step(self, fwd: Seen, step: Step) -> None:
        """The controllers of the levels that learn see their L0; the record of the fit gets a row."""
        learning = {"bottom": {0}, "top": {1}}.get(step.phase, {0, 1})
        l0 = [part.l0 for part in fwd.codes.parts]
        for i, level in enumerate(self.parts):
            first = step.phase == PHASES[i] or self.levels == "bottom"
            if i in learning and (step.progress >= self.warmup_frac or not first):
                level.controller.update(l0[i])
        done = sum(self.phase_fracs[: PHASES.index(step.phase)]) if step.phase in PHASES else 0.0
        share = self.phase_fracs[PHASES.index(step.phase)] if step.phase in PHASES else 1.0
        row = self.trace[min(int((done + share * step.progress) * TRACE), TRACE - 1)]
        row[0] = done + share * step.progress
        for i, level in enumerate(self.parts):
            row[1 + i] = (
                1 - l0[i] / self.widths[i] if i == 0 or step.phase != "bottom" else torch.nan
            )
            row[3 + i] = level.controller.coeff
        if fwd.gate is not None:
            on = fwd.codes.parts[0].values > 0
            row[5] = (fwd.gate * on).sum() / on.sum().clamp_min(1)

    @torch.no_grad()
    def finish(self, phase: str, x: Tensor) -> None:
        """Exact thresholds of the levels that learnt, the scale of the bottom's code after its first phase, and the phase's weights kept."""
        if phase != "top":
            self.bottom.calibrate(lambda: x.split(CHUNK), len(x))
        if phase == "bottom" and self.levels != "bottom":
            squares = sum(
                self.bottom.dense(chunk).square().sum(0) for chunk in x.split(CHUNK)
            ) / len(x)
            spread = squares.sqrt()
            self.scale.copy_(
                spread.clamp_min(1e-3 * spread.median().clamp_min(1e-12)) * self.widths[0] ** 0.5
            )
        if phase != "bottom" and self.levels != "bottom":
            self.top.calibrate(lambda: self._codes(x), len(x))
        getattr(self, f"end_of_{phase if phase in PHASES else PHASES[0]}").copy_(self._packed())

    # --- the state at the end of each phase ---------------------------------------------------------------------------

    def _state(self) -> dict[str, Tensor]:
        """Everything that the code and the reconstruction depend on, but for the scale, which does not change after the first phase."""
        return {n: p.data for n, p in self.named_parameters()} | {
            f"{i}.threshold": level.threshold for i, level in enumerate(self.parts)
        }

    def _packed(self) -> Tensor:
        return parameters_to_vector(self._state().values()).clone()

    def weights_after(self, phase: str) -> dict[str, Tensor]:
        """Parameters (and thresholds) as they were at the end of ``phase``, by name; as initialised where it has not ended yet."""
        return self._unpacked(getattr(self, f"end_of_{phase}"))

    def _unpacked(self, packed: Tensor) -> dict[str, Tensor]:
        state = self._state()
        parts = packed.split([t.numel() for t in state.values()])
        return {name: part.view_as(t) for (name, t), part in zip(state.items(), parts, strict=True)}

    def _take(self, packed: Tensor) -> None:
        kept = self._unpacked(packed)
        for name, tensor in self._state().items():
            tensor.copy_(kept[name])

    @torch.no_grad()
    def restore(self, phase: str) -> None:
        """Become what the SAE was at the end of ``phase`` (its top takes part from the second phase on)."""
        self._take(getattr(self, f"end_of_{phase}"))
        self.joined.fill_(phase != "bottom")

    @torch.no_grad()
    def rescale(self, inputs: Units, outputs: Units) -> None:
        """Units are folded into the bottom, now and in what is kept of earlier phases; the codes of both levels stay as they are."""
        now = self._packed()
        for name in [n for n, _ in self.named_buffers() if n.startswith("end_of_")]:
            self._take(getattr(self, name))
            self.bottom.rescale(inputs, outputs)
            getattr(self, name).copy_(self._packed())
        self._take(now)
        self.bottom.rescale(inputs, outputs)

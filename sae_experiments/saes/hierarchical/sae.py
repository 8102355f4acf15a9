"""Hierarchical SAE: basic features below and combinations of them above, joined by a gated skip."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from sae_experiments.errors import of_type
from sae_experiments.saes import ops, static
from sae_experiments.saes.base import SAE, Batch, Forward, Step, Units, by_rows
from sae_experiments.saes.controller import ramp
from sae_experiments.saes.hierarchical.level import (
    Controllers,
    Joined,
    Level,
    StepOutcome,
    TrainingPass,
    matmul,
    signed_directions,
)
from sae_experiments.saes.hierarchical.redundancy import Coherence, Information
from sae_experiments.saes.hierarchical.settings import (
    LossWeights,
    Settings,
    level_l0s,
    level_widths,
)
from sae_experiments.sampling import spread_rows
from sae_experiments.training.loop import Group, Loss, Phase

PHASES = ("bottom", "top", "both")
#: Equal parts of a fit, each with one row in its record.
TRACE = 250
#: Columns of the record of a fit.
TRACED = ("progress", "bottom_sparsity", "top_sparsity", "bottom_coeff", "top_coeff", "gate")
#: Rows that are encoded at once while a level is initialised or calibrated.
CHUNK = 4096


class Hierarchical(SAE):
    """Two levels, z1 with m1 latents and z2 with m2, side by side in the code `[z1, z2]`:

        z1 = (E1 (x - b0) + c1) above theta1       u = z1 / s,  s_j = sqrt(m1 E z1_j^2)
        z2 = (E2 u + c2) above theta2              v = ReLU(D2^T z2 + c3),  z1hat = s v
        g = sigmoid(A B z2 + b)                    z = g z1 + (1 - g) z1hat,  xhat = b0 + D1^T z

    The top reads the bottom's code, not x, and writes into it. The largest entries of a row of D2
    are the bottom latents that a top latent combines; `t_i = D1^T (s d2_i)` is its direction in x.
    The gate tells, from the top's code alone, which bottom latents the top fails to predict.

    Phases: `bottom` trains E1, c1, D1 and b0 on `||x - b0 - D1^T z1||^2`; `top` trains everything
    else, with the bottom frozen; `both` trains all, the bottom at `bottom_lr` times the learning
    rate. With `R(y) = mean_B ||x - y||^2 / V`, where V is the variance of x, the loss is

        R(xhat) + top R(xhat with g = 0) + bottom R(xhat with g = 1)
        + lambda1 |z1| + lambda2 |z2| + code ||z1 - z1hat||^2 / ||z1||^2
        + orthogonality Coherence + mutual_information Information
        + gate mean_B sum_j g_j 1[z1_j > 0] / L0 + anchor mean_j (1 - cos(d1_j, d1_j'))

    The anchor and the reconstruction from the bottom are terms of the last phase only; d1' is D1 at
    the end of the first phase. Without the cost of the gate and the paths that are dropped at
    random, g = 1 everywhere would be a minimum, in which the top learns nothing.

    Args:
        d_in: Width D of the input.
        d_sae: Latents of both levels together.
        d_out: Width of the output, equal to `d_in`. None: `d_in`.
        target_l0: Active latents per row of both levels together, to which the shares that follow
            from `sparsity` are scaled. None: not scaled.
        aux_coeff: Weight of AuxK; 0 turns it off.
        **settings: Fields of `Settings`.
    """

    supports_bf16 = False  # both levels make their own products
    same_units = True
    static_steps = True
    judged_by_fvu = False  # every phase has terms of its own

    scale: Tensor
    variance: Tensor
    joined: Tensor
    group: Tensor
    trace: Tensor

    def __init__(
        self,
        *,
        d_in: int,
        d_sae: int,
        d_out: int | None = None,
        target_l0: float | None,
        aux_coeff: float,
        **settings: Any,
    ) -> None:
        nn.Module.__init__(self)  # a composite: its weights are those of its levels
        own = Settings(**settings)
        self.settings = own
        self.levels = own.levels
        self.weights = LossWeights.checked(own.weights)
        self.widths = level_widths(d_in, d_sae, d_out, own.top_frac, own.levels)
        self.active = level_l0s(self.widths, own.sparsity, target_l0)
        self.d_in = d_in
        self.d_out = d_in
        self.d_sae = sum(self.widths)
        self.aux_coeff = aux_coeff
        self.unit_decoder = True
        self.pre_bias = True
        self.phase_fracs = [1.0] if own.levels == "bottom" else list(own.phase_fracs)
        self._build_levels()
        self._build_buffers()
        self.seed = torch.initial_seed()
        self.information = Information(**own.information)
        self.coherence = Coherence(**own.coherence)
        self.controller = Controllers(self.parts, self.phase_fracs[: len(self.widths)])
        for phase in PHASES if own.levels != "bottom" else PHASES[:1]:
            self.register_buffer(f"end_of_{phase}", self._packed())

    def _build_levels(self) -> None:
        """Create the levels and the gate between them."""
        own = self.settings
        shared = {
            "aim": own.aim,
            "start_l0": own.start_l0,
            "warmup_frac": own.warmup_frac,
            "aux_coeff": self.aux_coeff,
        }
        m1 = self.widths[0]
        self.bottom = Level(
            d_in=self.d_in,
            d_sae=m1,
            target_l0=self.active[0],
            start_coeff=own.start_coeff[0],
            **shared,
        )
        if own.levels == "bottom":
            return
        m2 = self.widths[1]
        self.top = Level(
            d_in=m1,
            d_sae=m2,
            target_l0=self.active[1],
            start_coeff=own.start_coeff[1],
            pre_bias=False,
            **shared,
        )
        if own.levels == "both":
            self.gate_in = nn.Parameter(torch.randn(own.rank, m2) / own.rank**0.5)
            self.gate_out = nn.Parameter(torch.randn(m1, own.rank) / own.rank**0.5)
            self.gate_bias = nn.Parameter(torch.full((m1,), float(own.gate_bias)))

    def _build_buffers(self) -> None:
        """Create the scale of the bottom's code, the variance of x and the record of the fit."""
        self.register_buffer("scale", torch.ones(self.widths[0]))
        self.register_buffer("variance", torch.ones(()))
        # Flag: the top takes part by now.
        self.register_buffer("joined", torch.zeros((), dtype=torch.bool))
        level = [torch.full((width,), number) for number, width in enumerate(self.widths)]
        self.register_buffer("group", torch.cat(level))
        self.register_buffer("trace", torch.full((TRACE, len(TRACED)), torch.nan))

    @property
    def fixed_l0(self) -> float | None:
        return float(sum(self.active))

    # --- weights and codes of both levels as one SAE ---------------------------------------------

    @property
    def parts(self) -> list[Level]:
        """The levels, bottom first."""
        return [self.bottom] if self.levels == "bottom" else [self.bottom, self.top]

    @property
    def W_enc(self) -> Tensor:
        """Directions (F, D) that latents read.

        These are the rows of E1, and those of E2 carried back through the bottom as if all of its
        latents were active.
        """
        if self.levels == "bottom":
            return torch.cat([self.bottom.W_enc])
        of_top = (self.top.W_enc / self.scale) @ self.bottom.W_enc
        return torch.cat([self.bottom.W_enc, of_top])

    @property
    def W_dec(self) -> Tensor:
        """Directions (F, D) that one unit of each latent writes where its path is open.

        These are the rows of D1 and those of `D2 s D1`, in the same units.
        """
        if self.levels == "bottom":
            return torch.cat([self.bottom.W_dec])
        return torch.cat([self.bottom.W_dec, self._writes()])

    @property
    def b_enc(self) -> Tensor:
        """Encoder biases of both levels (F,)."""
        return torch.cat([level.b_enc for level in self.parts])

    @property
    def b_dec(self) -> Tensor:
        """Bias of the reconstruction (D,)."""
        return self.bottom.b_dec

    # A buffer of other SAEs; here it follows from the buffers of the levels.
    @property
    def threshold(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Threshold of each latent (F,)."""
        return torch.cat([level.threshold.expand(level.d_sae) for level in self.parts])

    def atoms(self, latents: Tensor | None = None) -> Tensor:
        """Unit directions `t_i` (n, D) in x of top latents (n,); None: of all."""
        return ops.unit_rows(self._writes(latents))

    def _writes(self, latents: Tensor | None = None) -> Tensor:
        """Output `D1^T (s d2_i)` (n, D) of one unit of a top latent with the gate closed."""
        rows = self.top.W_dec if latents is None else self.top.W_dec[latents]
        return matmul(rows * self.scale, self.bottom.W_dec)

    @by_rows("d_sae")
    def contributions(self, acts: Tensor, direction: Tensor) -> Tensor:
        reach = self.bottom.W_dec @ direction
        if self.levels == "bottom" or not self.joined:
            m1 = self.widths[0]
            return nn.functional.pad(acts[:, :m1] * reach, (0, self.d_sae - m1))
        z1, z2 = self.split(acts)
        gate = self.gates(z2)
        # A bottom latent that the top predicts to be off carries nothing.
        passed = (1 - gate) * (self.predict(z2) > 0) * (self.scale * reach)
        return torch.cat([gate * z1 * reach, z2 * (passed @ self.top.W_dec.t())], 1)

    @by_rows("d_in")
    def pre_acts(self, x: Tensor) -> Tensor:
        a1 = self.bottom.pre_acts(x)
        if self.levels == "bottom":
            return a1
        z1 = a1 * (a1 > self.bottom.threshold)
        return torch.cat([a1, self.top.pre_acts(z1 / self.scale)], 1)

    def split(self, acts: Tensor) -> list[Tensor]:
        """The codes of the levels, from dense codes (B, F)."""
        return list(acts.split(list(self.widths), 1))

    def gates(self, z2: Tensor) -> Tensor:
        """Share (B, m1) of each bottom latent that the skip passes, from the top's code (B, m2)."""
        if self.levels == "top":
            return z2.new_zeros(len(z2), self.widths[0])
        low_rank = matmul(matmul(z2, self.gate_in.t()), self.gate_out.t())
        return torch.sigmoid(low_rank + self.gate_bias)

    def predict(self, z2: Tensor) -> Tensor:
        """The top's prediction v (B, m1) of the bottom's code, in units of its scale."""
        return torch.relu(matmul(z2, self.top.W_dec) + self.top.b_dec)

    @by_rows("d_sae")
    def decode(self, acts: Tensor, gate: float | None = None) -> Tensor:
        """Reconstruction (B, D) of dense codes.

        Args:
            acts: Dense codes (B, F).
            gate: 1 for the reconstruction from the bottom, 0 for that from the top. None: the
                gates decide.
        """
        if self.levels == "bottom" or gate == 1 or (gate is None and not self.joined):
            return self.bottom.decode(self.split(acts)[0])
        z1, z2 = self.split(acts)
        predicted = self.predict(z2) * self.scale
        if gate == 0 or (gate is None and self.levels == "top"):
            return self.bottom.decode(predicted)
        open_ = self.gates(z2) if gate is None else gate
        return self.bottom.decode(torch.lerp(predicted, z1, open_))

    # --- training --------------------------------------------------------------------------------

    def phases(self) -> list[Phase]:
        below = list(self.bottom.parameters())
        if self.levels == "bottom":
            return [Phase("bottom", 1.0, [Group(below)])]
        above = [p for name, p in self.named_parameters() if not name.startswith("bottom.")]
        all_groups = [Group(above), Group(below, self.settings.bottom_lr)]
        groups = [[Group(below)], [Group(above)], all_groups]
        return [Phase(*each) for each in zip(PHASES, self.phase_fracs, groups, strict=True)]

    @torch.no_grad()
    def begin(self, phase: str, x: Tensor, y: Tensor) -> None:
        """Initialise the level that is about to learn from data.

        Both levels get their biases as in `Standard`; the bottom also sets V. The rows of D2 start
        as directions of largest variance of u, each with both signs since latents are positive;
        E2 starts from the same rows.
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
        """The bottom's code u of rows (N, D), in blocks (CHUNK, m1)."""
        for chunk in x.split(CHUNK):
            yield self.bottom.dense(chunk) / self.scale

    def loss(self, batch: Batch, step: Step) -> Loss:
        if step.phase == "bottom" or self.levels == "bottom":
            return self._bottom_loss(batch, step)
        rows = self.settings.rows
        batch = Batch(spread_rows(batch.x, rows), spread_rows(batch.y, rows))
        passed = self._pass(batch.x, step)
        recon = self.bottom_decode(passed.mixed)
        parts = {"mse": self._relative_error(recon, batch.y)}
        predicted = passed.predicted * self.scale
        parts |= self._path_terms(batch.y, passed, predicted, step)
        parts |= self._sparsity_terms(passed, step)
        missed = (passed.z[0] - predicted).square().sum()
        size = passed.z[0].detach().square().sum().clamp_min(1e-12)
        parts["code"] = self.weights.code * missed / size
        parts |= self._redundancy(batch.x, passed, step)
        parts |= self._revival(batch, passed, recon, step)
        gate = None if passed.gate is None else passed.gate.detach()
        codes = Joined([z.detach() for z in passed.z], list(self.widths))
        return _total(parts, StepOutcome(batch, codes, recon.detach(), gate))

    def _bottom_loss(self, batch: Batch, step: Step) -> Loss:
        """The loss of the first phase."""
        z1 = self.bottom.dense(batch.x)
        recon = self.bottom_decode(z1)
        warmup = ramp(step.progress, self.settings.warmup_frac)
        parts = {
            "mse": self._relative_error(recon, batch.y),
            "sparsity_bottom": self.bottom.penalty(z1, warmup),
        }
        dead = step.dead[: self.widths[0]]
        if self.aux_coeff and self._some(dead, step):
            parts["aux_k"] = self.aux_coeff * self.bottom.aux_k_loss(batch.x, batch.y - recon, dead)
        codes = Joined([z1.detach()], list(self.widths))
        return _total(parts, StepOutcome(batch, codes, recon.detach(), None))

    def bottom_decode(self, z: Tensor) -> Tensor:
        """`b0 + D1^T z` (B, D) of codes (B, m1)."""
        return matmul(z, self.bottom.W_dec) + self.bottom.b_dec

    def _relative_error(self, recon: Tensor, y: Tensor) -> Tensor:
        return ops.squared_error(recon, y) / self.variance

    def _pass(self, x: Tensor, step: Step) -> TrainingPass:
        """Encode rows (B, D) with both levels, and mix what the bottom decodes."""
        z1 = self.bottom.dense(x)
        u = z1 / self.scale
        z2 = self.top.dense(u)
        v = self.predict(z2)
        if self.levels == "top":
            return TrainingPass((z1, z2), u, v, None, v * self.scale)
        gate = self.gates(z2)
        # On some rows one of the two paths is taken away, so that each learns to do without the
        # other.
        drawn = torch.rand(len(x), 1, generator=step.generator, device=x.device)
        only_bottom = drawn >= 1 - self.settings.drop_top
        used = torch.where(only_bottom, 1.0, gate)
        used = torch.where(drawn < self.settings.drop_bottom, 0.0, used)
        return TrainingPass((z1, z2), u, v, gate, torch.lerp(v * self.scale, z1, used))

    def _path_terms(
        self, y: Tensor, passed: TrainingPass, predicted: Tensor, step: Step
    ) -> dict[str, Tensor]:
        """Errors of the reconstructions from single levels, and the cost of the gate.

        Args:
            y: Targets (B, D).
            passed: The training pass.
            predicted: The top's prediction of the bottom's code, (B, m1).
            step: The current step.
        """
        if self.levels != "both":
            return {}
        z1 = passed.z[0]
        from_top = self._relative_error(self.bottom_decode(predicted), y)
        parts = {"top_mse": self.weights.top * from_top}
        if passed.gate is not None:
            on = z1.detach() > 0
            opened = (passed.gate * on).sum()
            parts["gate"] = self.weights.gate * opened / (len(on) * self.active[0])
        if step.phase != "top":
            from_bottom = self._relative_error(self.bottom_decode(z1), y)
            parts["bottom_mse"] = self.weights.bottom * from_bottom
        return parts

    def _sparsity_terms(self, passed: TrainingPass, step: Step) -> dict[str, Tensor]:
        """Penalties of the levels that learn, and the anchor of the bottom's directions."""
        z1, z2 = passed.z
        if step.phase == "top":
            warmup = ramp(step.progress, self.settings.warmup_frac)
            return {"sparsity_top": self.top.penalty(z2, warmup)}
        anchor = self.weights_after("bottom")["bottom.W_dec"]
        turned = (1 - (self.bottom.W_dec * anchor).sum(1)).mean()
        return {
            "sparsity_bottom": self.bottom.penalty(z1, 1.0),
            "anchor": self.weights.anchor * turned,
            "sparsity_top": self.top.penalty(z2, 1.0),
        }

    def _redundancy(self, x: Tensor, passed: TrainingPass, step: Step) -> dict[str, Tensor]:
        """The two terms between the levels, if their weights are not 0."""
        w = self.weights
        parts = {}
        if w.orthogonality:
            latents = self._sample(self.widths[1], self.coherence.chunk, step)
            coherence = self.coherence(self.atoms(latents), self.bottom.W_dec)
            parts["orthogonality"] = w.orthogonality * coherence
        if w.mutual_information:
            below, some_below = self._soft_firing(0, x, passed, step)
            above, some_above = self._soft_firing(1, passed.code, passed, step)
            counted = (some_below, some_above) if static.on() else None
            information = self.information(below, above, counted)
            parts["mutual_information"] = w.mutual_information * information
        return parts

    def _soft_firing(
        self, number: int, source: Tensor, passed: TrainingPass, step: Step
    ) -> tuple[Tensor, Tensor]:
        """Soft firing (B, n) of random latents of a level among those that fire in the batch.

        Args:
            number: 0 for the bottom, 1 for the top.
            source: The level's input, (B, D) or (B, m1).
            passed: The training pass.
            step: The current step.

        Returns:
            The soft firing, and which of its columns count, (n,) boolean.
        """
        level = self.parts[number]
        z = passed.z[number].detach()
        n = (self.information.bottom, self.information.top)[number]
        on = z > 0
        if static.on():
            fires = on.any(0)
            device = step.generator.device
            drawn = torch.rand(len(fires), generator=step.generator, device=device)
            chosen = (drawn + fires).topk(min(n, len(fires)), sorted=False).indices
            counted = fires.index_select(0, chosen)
        else:
            alive = on.any(0).nonzero().squeeze(1)
            chosen = alive[self._sample(len(alive), n, step)]
            counted = torch.ones_like(chosen, dtype=torch.bool)
        mean = z.sum() / on.sum().clamp_min(1)
        soft = self.information.soft(level.columns(source, chosen), level.threshold, mean)
        return soft, counted

    def _sample(self, n: int, k: int, step: Step) -> Tensor:
        """At most `k` of the numbers below `n`, at random and in random order."""
        return torch.randperm(n, generator=step.generator, device=step.generator.device)[:k]

    def _revival(
        self, batch: Batch, passed: TrainingPass, recon: Tensor, step: Step
    ) -> dict[str, Tensor]:
        """AuxK of each level that learns, on the residual of that level."""
        if not self.aux_coeff or not step.any_dead:
            return {}
        below, above = step.dead.split(list(self.widths))
        terms = []
        if step.phase != "top" and self._some(below, step):
            terms.append(self.bottom.aux_k_loss(batch.x, batch.y - recon, below))
        if self._some(above, step):
            residual = passed.code - passed.predicted
            terms.append(self.top.aux_k_loss(passed.code, residual, above))
        return {"aux_k": self.aux_coeff * ops.total(terms)} if terms else {}

    @staticmethod
    def _some(dead: Tensor, step: Step) -> bool:
        """True if a term for these dead latents is needed."""
        return step.any_dead if static.on() else bool(dead.any())

    def before_update(self) -> None:
        for level in self.parts:
            level.before_update()

    def after_update(self, fwd: Forward | StepOutcome, step: Step) -> None:
        for level in self.parts:
            level.normalise_decoder()
        self.after_step(fwd, step)

    def after_step(self, fwd: Forward | StepOutcome, step: Step) -> None:
        """Steer the L1 coefficients of the levels that learn, and record the state of the fit."""
        fwd = of_type(fwd, StepOutcome)  # `loss` returns no other
        learning = {"bottom": [0], "top": [1]}.get(step.phase, [0, 1])
        for number in learning[: len(self.parts)]:
            in_first_phase = step.phase == PHASES[number] or self.levels == "bottom"
            warm = step.progress >= self.settings.warmup_frac if in_first_phase else True
            self.parts[number].steer(fwd.codes.parts[number], warm)
        self._record(fwd, step)

    def _record(self, fwd: StepOutcome, step: Step) -> None:
        """Write the row of `trace` for the current step, with the columns `TRACED`."""
        done, share = 0.0, 1.0
        if step.phase in PHASES:
            number = PHASES.index(step.phase)
            done = sum(self.phase_fracs[:number])
            share = self.phase_fracs[number]
        progress = done + share * step.progress
        values: dict[str, Any] = {"progress": progress}
        for i, (name, level) in enumerate(zip(("bottom", "top"), self.parts, strict=False)):
            code = fwd.codes.parts[i]
            l0 = code.l0_on_device if static.on() else code.l0
            control = level.controller
            values[f"{name}_coeff"] = control.coeff_on_device if static.on() else control.coeff
            encodes = i == 0 or step.phase != "bottom"
            values[f"{name}_sparsity"] = 1 - l0 / self.widths[i] if encodes else l0 * torch.nan
        if fwd.gate is not None:
            on = fwd.codes.parts[0].values > 0
            values["gate"] = (fwd.gate * on).sum() / on.sum().clamp_min(1)
        if not static.on():
            row = self.trace[min(int(progress * TRACE), TRACE - 1)]
            for name, value in values.items():
                row[TRACED.index(name)] = value
            return
        place = (progress * TRACE).long().clamp_max(TRACE - 1)[None]
        for name, value in values.items():
            column = self.trace[:, TRACED.index(name)]
            column.index_copy_(0, place, value.to(column.dtype)[None])

    @torch.no_grad()
    def finish(self, phase: str, x: Tensor) -> None:
        """Calibrate the levels that learnt, and keep the weights of the phase.

        After the first phase this also sets the scale s of the bottom's code.
        """
        if phase != "top":
            self.bottom.calibrate(lambda: x.split(CHUNK), len(x))
        if phase == "bottom" and self.levels != "bottom":
            self._set_scale(x)
        if phase != "bottom" and self.levels != "bottom":
            self.top.calibrate(lambda: self._codes(x), len(x))
        ended = phase if phase in PHASES else PHASES[0]
        getattr(self, f"end_of_{ended}").copy_(self._packed())

    def _set_scale(self, x: Tensor) -> None:
        """Set s from the bottom's code of rows (N, D)."""
        squares = ops.total(self.bottom.dense(chunk).square().sum(0) for chunk in x.split(CHUNK))
        spread = (squares / len(x)).sqrt()
        # A latent that hardly fires must not divide by almost nothing.
        smallest = 1e-3 * spread.median().clamp_min(1e-12)
        self.scale.copy_(spread.clamp_min(smallest) * self.widths[0] ** 0.5)

    # --- the state at the end of each phase ------------------------------------------------------

    def _state(self) -> dict[str, Tensor]:
        """Tensors that the code and the reconstruction depend on, by name.

        The scale is not among them, since it does not change after the first phase.
        """
        parameters = {name: p.data for name, p in self.named_parameters()}
        thresholds = {f"{i}.threshold": level.threshold for i, level in enumerate(self.parts)}
        return parameters | thresholds

    def _packed(self) -> Tensor:
        """The state as one vector."""
        return parameters_to_vector(self._state().values()).clone()

    def weights_after(self, phase: str) -> dict[str, Tensor]:
        """Parameters and thresholds at the end of a phase, by name.

        Before the end of the phase, those of the initialisation.
        """
        return self._unpacked(getattr(self, f"end_of_{phase}"))

    def _unpacked(self, packed: Tensor) -> dict[str, Tensor]:
        state = self._state()
        parts = packed.split([t.numel() for t in state.values()])
        return {name: part.view_as(t) for (name, t), part in zip(state.items(), parts, strict=True)}

    def _load_packed(self, packed: Tensor) -> None:
        kept = self._unpacked(packed)
        for name, tensor in self._state().items():
            tensor.copy_(kept[name])

    @torch.no_grad()
    def restore(self, phase: str) -> None:
        """Restore the state at the end of a phase; the top is used from the second phase on."""
        self._load_packed(getattr(self, f"end_of_{phase}"))
        self.joined.fill_(phase != "bottom")

    @torch.no_grad()
    def rescale(self, inputs: Units, outputs: Units) -> None:
        """Fold units into the bottom, now and in the kept states of earlier phases.

        The codes of both levels do not change.
        """
        now = self._packed()
        for name in [n for n, _ in self.named_buffers() if n.startswith("end_of_")]:
            self._load_packed(getattr(self, name))
            self.bottom.rescale(inputs, outputs)
            getattr(self, name).copy_(self._packed())
        self._load_packed(now)
        self.bottom.rescale(inputs, outputs)


def _total(parts: dict[str, Tensor], outcome: StepOutcome) -> Loss:
    """The sum of the terms as a loss."""
    detached = {name: part.detach() for name, part in parts.items()}
    return Loss(ops.total(parts.values()), detached, outcome)

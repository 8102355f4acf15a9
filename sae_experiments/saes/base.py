"""The base class of all sparse autoencoders; a variant overrides at most a handful of its methods.

Shape letters: B rows of a batch, D `d_in`, O `d_out`, F `d_sae`, G nested parts of a code,
N rows of a calibration set, n active entries.

`W_enc` (F, D) and `W_dec` (F, O) are stored latent-major: one latent is one contiguous row.
"""

from __future__ import annotations

import warnings
from typing import Protocol

import torch
from torch import Tensor, nn

from sae_experiments.errors import UserError, of_type
from sae_experiments.saes import fused, ops, static
from sae_experiments.saes.pattern import Pattern
from sae_experiments.saes.types import (
    Batch,
    Codes,
    DenseForm,
    Forward,
    Inference,
    Step,
    Units,
    by_rows,
)
from sae_experiments.training.loop import Group, Loss, Phase

#: Pre-activations computed at once where rows can be encoded in blocks.
BLOCK = 1 << 22


class Controller(Protocol):
    """A sparsity coefficient that is fixed or steered to a requested L0."""

    @property
    def horizon(self) -> int:
        """Number of training steps; set by the fit."""
        ...

    @horizon.setter
    def horizon(self, steps: int) -> None: ...

    @property
    def fixed(self) -> bool:
        """True if the coefficient is a constant."""
        ...

    @property
    def coeff(self) -> float:
        """The current coefficient."""
        ...


class SAE(nn.Module):
    """Sparse autoencoder `z = sigma(W_enc (x - b_dec) + b_enc)`, `xhat = W_dec^T z + b_dec`.

    With `d_out != d_in` it is a transcoder, whose input is not shifted by `b_dec`.

    The default loss is `mean_B ||y - yhat||^2`, plus `penalties`, plus `aux_coeff` times AuxK on
    dead latents. Codes with few active entries are decoded, and their gradients computed, from
    those entries only (see `ops`).

    `centre` (D,) is subtracted from the input as well. It is 0 in training. Afterwards it holds
    the part of the data's mean that `b_dec` does not cover. It is not folded into the bias because
    `W_enc x + bias` loses digits where the mean is much larger than the spread; see `rescale`.

    Args:
        d_in: Width of the input.
        d_sae: Number of latents.
        d_out: Width of the output. None: `d_in`.
        aux_coeff: Weight of AuxK; 0 turns it off.
        k_aux: Dead latents that AuxK uses per row. None: `d_in // 2`.
        unit_decoder: Keep every decoder row at length 1: the radial part of the gradient is
            removed before each step, and rows are renormalised after it.
        pre_bias: Subtract `b_dec` from the input, which needs `d_out == d_in`. None: subtract it
            if the widths allow it.
    """

    #: Number of equal blocks (the sites of a crosscoder) that inputs and targets consist of.
    #: Each block is scaled by itself.
    n_sites = 1
    #: The loss depends on the rest of the language model, through `Batch.downstream`.
    needs_model = False
    #: The support of a row depends on that row alone, so that a large batch may be encoded one
    #: block of rows at a time.
    support_is_rowwise = True
    #: Every encoder row reads one of the sites alone.
    per_site = False
    #: `matmul_precision` may be bf16.
    supports_bf16 = True
    #: Codes are sparse from the first step, so that recomputing their values costs little.
    always_sparse = False
    #: Precision of the encoder's matrix product in training: fp32, bf16 or auto. In bfloat16 the
    #: product only decides which latents are active; their values are recomputed in full precision.
    matmul_precision = "fp32"
    #: Input and output must be in the same units (tied weights, a refined code).
    same_units = False
    #: The SAE has been fitted: its weights are in the data's own units.
    fitted = False
    #: Training can continue from a fitted SAE.
    trains_on = False
    #: The fit minimises the FVU by the same terms from start to end, so that a climb of the FVU
    #: means that it goes wrong.
    judged_by_fvu = True
    #: Factor of the default learning rate (`fitting.rates`).
    default_lr_factor = 1.0
    #: Training steps can run within `static.shapes()`. It is not inherited: a subclass that changes
    #: nothing about it says so itself.
    static_steps = False
    #: Steps within `static.shapes()` draw the same random numbers as others.
    same_draws = True
    #: Share of characters to replace in the second view of every row that the SAE asks for; 0: no
    #: second view.
    second_view = 0.0

    threshold: Tensor
    centre: Tensor

    def __init__(
        self,
        *,
        d_in: int,
        d_sae: int,
        d_out: int | None = None,
        aux_coeff: float = 0.0,
        k_aux: int | None = None,
        unit_decoder: bool = True,
        pre_bias: bool | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("d_in", d_in), ("d_sae", d_sae)):
            if value < 1:
                raise UserError(f"sae: {name}={value} must be at least 1")
        if aux_coeff < 0:
            raise UserError(f"sae: aux_coeff={aux_coeff} must not be negative")
        self.d_in = d_in
        self.d_sae = d_sae
        self.d_out = d_out or d_in
        self.aux_coeff = aux_coeff
        self.k_aux = k_aux or max(d_in // 2, 1)
        self.unit_decoder = unit_decoder
        self.pre_bias = self.d_out == self.d_in if pre_bias is None else pre_bias
        if self.pre_bias and self.d_out != self.d_in:
            raise UserError(
                f"sae: pre_bias=true needs equal widths, not d_in={d_in} and d_out={d_out}"
            )
        self._make_weights()
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.b_dec = nn.Parameter(torch.zeros(self.d_out))
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("centre", torch.zeros(d_in))
        #: Buffers that are used again in every step, by name.
        self._scratch: dict[str, Tensor] = {}
        #: Steers the coefficient of the sparsity penalty; None for an SAE without one.
        self.controller: Controller | None = None

    def _make_weights(self) -> None:
        """Draw `W_dec` and `W_enc`; a variant that stores them in another form overrides this."""
        decoder = ops.unit_rows(torch.randn(self.d_sae, self.d_out))
        if self.d_out == self.d_in:
            encoder = decoder.clone()
        else:
            encoder = ops.unit_rows(torch.randn(self.d_sae, self.d_in))
        self.W_dec = nn.Parameter(decoder)
        self.W_enc = nn.Parameter(encoder)

    @property
    def level_of_latent(self) -> Tensor | None:
        """Level or group (F,) of each latent, from the buffer `group`; None for a single level."""
        return self._buffers.get("group")

    @property
    def fixed_l0(self) -> float | None:
        """Requested active latents per row; None where the L0 follows from other settings."""
        return None

    # --- what a variant overrides ----------------------------------------------------------------

    def support(self, pre: Tensor) -> Pattern | Tensor:
        """Select the active entries.

        In eval mode the result for a row must depend on that row alone.

        Args:
            pre: Pre-activations (B, F).

        Returns:
            A pattern, or a boolean mask (B, F).
        """
        return self.threshold_score(pre) > self.threshold

    def threshold_score(self, pre: Tensor) -> Tensor:
        """Scores (B, F) that the calibrated threshold is compared with.

        Entries at or below 0 are never active.
        """
        return pre

    def encoder_input(self, x: Tensor) -> Tensor:
        """Rows (B, D) that the encoder multiplies, computed from the rows (B, D) of the input."""
        return x

    def linear_path(self, x: Tensor) -> Tensor | None:
        """Part of the reconstruction (B, O) that bypasses the code; None if there is none."""
        return None

    def output_scale(self, x: Tensor) -> Tensor | None:
        """Factor (B, 1) of a decoded code in the reconstruction of rows (B, D); None for 1."""
        return None

    def nested_recons(self, codes: Codes) -> Tensor | None:
        """Reconstructions (B, G, O) from nested parts of the code, the last one from all of it.

        None for a code without nested parts.
        """
        return None

    def activation(self, entries: Tensor, col: Tensor | None) -> Tensor:
        """Apply the activation function to the pre-activations of active entries.

        Args:
            entries: Pre-activations, (n,) or dense (B, F).
            col: Latent of each entry (n,); None where `entries` is dense.

        Returns:
            The values of the code, in the shape of `entries`.
        """
        return entries

    def penalties(self, fwd: Forward, step: Step) -> dict[str, Tensor]:
        """Weighted loss terms beside reconstruction and AuxK."""
        return {}

    def begin(self, phase: str, x: Tensor, y: Tensor) -> None:
        """Initialise from data: `b_dec` becomes the geometric median of the outputs.

        Args:
            phase: Name of the training phase that follows.
            x: Inputs (N, D).
            y: Targets (N, O).
        """
        self.b_dec.data.copy_(ops.geometric_median(y))
        if not self.pre_bias:
            # Centre the pre-activations, as subtracting a bias from the input would.
            self.b_enc.data.copy_(-self.W_enc.data @ x.mean(0))

    def resume_training(self, phase: str, x: Tensor, y: Tensor) -> None:
        """Prepare further training of a fitted SAE; called in place of `begin`."""

    def after_step(self, fwd: Forward, step: Step) -> None:
        """Update buffers after an optimiser step; no other method may write them in training."""

    def look(self, progress: float) -> None:
        """Called between steps, with the share of training that is done; may read numbers.

        On a device that is not after every step.
        """

    def training_over(self) -> bool:
        """True if training has stopped early, and further steps change nothing that counts."""
        return False

    def finish(self, phase: str, x: Tensor) -> None:
        """Calibrate thresholds for inference on rows (N, D) that were not trained on."""

    def phases(self) -> list[Phase]:
        """Training phases, in order; by default a single one over every parameter."""
        return [Phase("train", 1.0, [Group(list(self.parameters()))])]

    def inference(self) -> Inference:
        """The trained SAE as an architecture that SAELens knows.

        Raises:
            NotExportable: SAELens has no counterpart of this variant.
        """
        raise NotExportable(f"{type(self).__name__} has no counterpart in SAELens' format")

    def plain_tensors(self) -> dict[str, Tensor]:
        """Weights under SAELens' names and in its orientation: `W_enc` (D, F), `W_dec` (F, O)."""
        b_enc = self.b_enc.detach()
        if bool(self.centre.any()):  # the format has no tensor for it: fold it into the bias
            shift = self.W_enc.detach().double() @ self.centre.double()
            b_enc = (b_enc.double() - shift).to(b_enc)
        return {
            "W_enc": self.W_enc.detach().t().contiguous(),
            "b_enc": b_enc,
            "W_dec": self.W_dec.detach(),
            "b_dec": self.b_dec.detach(),
        }

    def as_jumprelu(self) -> Inference:
        """This SAE as `z = a 1[a > threshold]`, with one threshold for all latents."""
        tensors = self.plain_tensors()
        tensors["threshold"] = self.threshold.detach().expand(self.d_sae).contiguous()
        return Inference("jumprelu", tensors, {"apply_b_dec_to_input": self.pre_bias})

    # --- shared by all variants ------------------------------------------------------------------

    def as_rows(self, x: Tensor, width: str) -> Tensor:
        """Convert rows (..., W) to a tensor of the weights' type.

        Args:
            x: Rows, as a tensor or anything that converts to one.
            width: Name of the attribute that holds W.

        Raises:
            UserError: The rows have the wrong width.
        """
        x = x if isinstance(x, Tensor) else torch.as_tensor(x)
        expected = getattr(self, width)
        if not x.ndim or x.shape[-1] != expected:
            raise UserError(
                f"rows of shape {tuple(x.shape)} do not fit {width}={expected} of this SAE"
            )
        return x.to(next(self.parameters()).dtype)

    def origin(self) -> Tensor:
        """Vector (D,) that the encoder subtracts from its input."""
        return self.centre + self.b_dec if self.pre_bias else self.centre

    def shifted(self, x: Tensor) -> Tensor:
        """Rows (..., D) minus `origin`; exact however large the mean of the data is."""
        return x - self.origin()

    def bias(self) -> Tensor:
        """Encoder bias (F,) with the origin folded in, `b_enc - W_enc origin`.

        For training, where rows are centred: it saves a pass over the batch.
        """
        return self.b_enc - self.W_enc @ self.origin()

    @by_rows("d_in")
    def pre_acts(self, x: Tensor) -> Tensor:
        """Pre-activations (..., F) of rows (..., D), differentiable."""
        return nn.functional.linear(self.shifted(self.encoder_input(x)), self.W_enc, self.b_enc)

    def activate(self, pre: Tensor) -> Codes:
        """The code of pre-activations (B, F) that carry no graph."""
        support = self.support(pre)
        if isinstance(support, Pattern):
            return Codes(self.activation(support.gather(pre), support.col), support)
        return Codes(self.activation(pre, None) * support)

    @by_rows("d_in")
    def encode(self, x: Tensor) -> Tensor:
        """Dense codes (..., F) of rows (..., D)."""
        return self.activate(self.pre_acts(x)).dense()

    @by_rows("d_sae")
    def decode(self, acts: Tensor) -> Tensor:
        """Reconstruction (..., O) of dense codes (..., F)."""
        return acts @ self.W_dec + self.b_dec

    def decode_codes(self, codes: Codes) -> Tensor:
        """Reconstruction (B, O) of a code, much faster than `decode` if few entries are active."""
        values, pattern = codes
        few = pattern is not None and len(values) < ops.SPARSE_BELOW * pattern.n_rows * self.d_sae
        if not few or type(self).decode is not SAE.decode:
            return self.decode(codes.dense())
        return ops.decode(values, pattern, self.W_dec) + self.b_dec

    @by_rows("d_sae")
    def contributions(self, acts: Tensor, direction: Tensor) -> Tensor:
        """Contribution of each latent to the reconstruction along a direction of the output.

        Args:
            acts: Dense codes (..., F).
            direction: Vector (O,) of any length.

        Returns:
            Contributions (..., F), in units of the activations. Their sum over the latents is the
            reconstruction along the direction, without the part that the biases contribute.
        """
        return acts * (self.W_dec @ direction)

    def decoder_norms(self) -> Tensor:
        """Length (F,) by which one unit of each latent moves the reconstruction.

        In units of the activations.
        """
        return self.W_dec.norm(dim=1)

    @by_rows("d_in")
    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction (..., O) of rows (..., D): `decode(encode(x))` plus any direct path."""
        return self.reconstruct(x, self.encode(x))

    def reconstruct(self, x: Tensor, acts: Tensor) -> Tensor:
        """Reconstruction (B, O) from dense codes (B, F) and the direct path from `x` (B, D)."""
        recon, scale, direct = self.decode(acts), self.output_scale(x), self.linear_path(x)
        if scale is not None:
            recon = recon * scale
        return recon if direct is None else recon + direct

    def training_forward(self, batch: Batch) -> Forward:
        """One forward pass that keeps a graph only where a gradient can flow."""
        bias = self.bias()
        x = self.encoder_input(batch.x)
        form = self.dense_form() if fused.can_fuse(x) else None
        if form is not None:
            return self._fused_forward(batch, x, bias, form)
        support, values, pre = self._select(x, bias)
        pattern = support if isinstance(support, Pattern) else None
        active_pre = ops.entries(x, self.W_enc, bias, values, support)
        values = self.activation(active_pre, None if pattern is None else pattern.col)
        if pattern is not None:
            values = pattern.weighted(values)
        elif values is not active_pre:
            values = ops.masked(values, of_type(support, Tensor))
        codes = Codes(values, pattern)
        recon, levels = self._rebuilt(batch, codes)
        mask = None if isinstance(support, Pattern) else support
        return Forward(batch, pre, codes, recon, active_pre, levels, mask)

    def _rebuilt(self, batch: Batch, codes: Codes) -> tuple[Tensor, Tensor | None]:
        """Reconstruction (B, O) of a training batch, and those from nested parts of the code."""
        levels = self.nested_recons(codes)
        if levels is None:
            recon = ops.decode(codes.values, codes.pattern, self.W_dec) + self.b_dec
        else:
            recon = levels[:, -1]
        direct = self.linear_path(batch.x)
        return (recon if direct is None else recon + direct), levels

    def _fused_forward(self, batch: Batch, x: Tensor, bias: Tensor, form: DenseForm) -> Forward:
        """`training_forward` of a dense code of a known form, on a device."""
        pre = self.encoder_matmul(x, bias)
        codes, gate, counted = fused.dense_code(x, self.W_enc, bias, pre, form)
        recon, levels = self._rebuilt(batch, codes)
        return Forward(batch, pre, codes, recon, gate, levels, counted=counted)

    def dense_form(self) -> DenseForm | None:
        """Rule by which a dense code follows from pre-activations, if kernels know it."""
        return None

    def encodes_as(self, cls: type[SAE]) -> bool:
        """True if the class of this SAE changes neither support nor values of its parent `cls`."""
        mine = type(self)
        return mine.support is cls.support and mine.activation is cls.activation

    @property
    def matmul_dtype(self) -> torch.dtype:
        """Type of the encoder's matrix product in training.

        With `auto` it is bfloat16 for a large matrix on a CPU that multiplies it natively, if codes
        are always sparse.
        """
        if self.matmul_precision == "auto":
            fast = self.supports_bf16 and self.always_sparse and ops.bf16_pays(self.W_enc)
            return torch.bfloat16 if fast else torch.float32
        return ops.DTYPES[self.matmul_precision]

    def _select(self, x: Tensor, bias: Tensor) -> tuple[Pattern | Tensor, Tensor, Tensor | None]:
        """Find the active entries of a training batch.

        Returns:
            The support, as a pattern or a mask (B, F) of 0.0 and 1.0; the pre-activations without
            a graph, either all of them (B, F) or those of the active entries (n,); and the whole
            matrix of pre-activations (B, F), None where it was never computed at once.
        """
        weight = self.W_enc.detach().to(self.matmul_dtype)
        blockwise = self._by_blocks(x, weight, bias)
        support: Pattern | Tensor
        if blockwise is not None:
            support, values = blockwise
            pre = None
        else:
            values = pre = self.encoder_matmul(x, bias, weight)
            support = sparse(self.support(pre))
            if isinstance(support, Tensor):
                support = support.to(pre.dtype)  # one conversion for all uses
        if isinstance(support, Pattern):
            if weight.dtype != x.dtype or ops.rounds(weight):
                values = ops.exact_entries(support, x, self.W_enc, bias)
        elif weight.dtype != x.dtype:
            values = self.encoder_matmul(x, bias)
        return support, values, pre

    @torch.no_grad()
    def _by_blocks(self, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Pattern, Tensor] | None:
        """Active entries of a large batch and their pre-activations, one block of rows at a time.

        The matrix of pre-activations (B, F), by far the largest tensor of a step, never exists as a
        whole. Returns None if it must (the support depends on the whole batch, or the code is
        dense) or if the matrix is small.
        """
        rows = max(BLOCK // self.d_sae, 1)
        if not self.support_is_rowwise or len(x) <= rows or x.device.type != "cpu" or static.on():
            return None
        patterns, values = [], []
        for part in x.split(rows):
            pre = self.encoder_matmul(part, bias, weight)
            support = sparse(self.support(pre))
            if not isinstance(support, Pattern):
                return None
            patterns.append(support)
            values.append(support.gather(pre))
        return Pattern.stacked(patterns), torch.cat(values)

    @torch.no_grad()
    def encoder_matmul(self, x: Tensor, bias: Tensor, weight: Tensor | None = None) -> Tensor:
        """`x W_enc^T + bias` (B, F) without a graph, in a buffer that the next call overwrites.

        Within `static.shapes()` the memory is new: a recorded step keeps it for itself.

        Freshly mapped memory pages would cost as much as the product itself.

        Args:
            x: Rows (B, D).
            bias: (F,).
            weight: `W_enc` (F, D) in the precision to multiply in. None: as it is stored.
        """
        buffer = self._scratch.get("pre")
        if static.on():
            buffer = x.new_empty(x.shape[0], self.d_sae)
        elif (
            buffer is None
            or len(buffer) < len(x)
            or buffer.shape[1] != self.d_sae
            or buffer.device != x.device
            or buffer.dtype != x.dtype
        ):
            buffer = torch.empty(x.shape[0], self.d_sae, device=x.device, dtype=x.dtype)
            self._scratch["pre"] = buffer
        return ops.encoder_matmul(
            x, self.W_enc if weight is None else weight, bias, out=buffer[: len(x)]
        )

    def loss(self, batch: Batch, step: Step) -> Loss:
        """Sum of reconstruction, penalties and AuxK. Changes no parameter and no buffer."""
        fwd = self.training_forward(batch)
        parts = (
            self.reconstruction(fwd, step) | self.penalties(fwd, step) | self.aux_loss(fwd, step)
        )
        extra = Forward(
            batch, fwd.pre, fwd.codes.detach(), fwd.recon.detach(), fwd.active_pre.detach()
        )
        detached = {k: v.detach() for k, v in parts.items()}
        return Loss(ops.total(parts.values()), detached, extra)

    def reconstruction(self, fwd: Forward, step: Step) -> dict[str, Tensor]:
        """The reconstruction term `mean_B ||y - yhat||^2`."""
        return {"mse": ops.squared_error(fwd.recon, fwd.batch.y)}

    def aux_loss(self, fwd: Forward, step: Step) -> dict[str, Tensor]:
        """The AuxK term over the latents in `step.dead`; empty without dead latents."""
        if not self.aux_coeff or not step.any_dead:
            return {}
        unexplained = self.aux_k_loss(fwd.batch.x, fwd.batch.y - fwd.recon, step.dead)
        return {"aux_k": self.aux_coeff * unexplained}

    def aux_k_loss(self, x: Tensor, residual: Tensor, dead: Tensor) -> Tensor:
        """Share of `residual` that the dead latents leave unexplained (see `ops.aux_k`).

        No parameter of a live latent gets a gradient.

        Args:
            x: Inputs (B, D).
            residual: Targets minus reconstructions (B, O).
            dead: The dead latents, (F,) boolean.
        """
        inputs, origin = self.encoder_input(x), self.origin().detach()
        if static.on():
            bias = self.b_enc - self.W_enc @ origin
            return ops.aux_k_masked(
                inputs, residual, self.W_enc, bias, self.W_dec, self.k_aux, dead
            )
        chosen = dead.nonzero().squeeze(1)
        w_enc = self.W_enc.index_select(0, chosen)
        bias = self.b_enc.index_select(0, chosen) - w_enc @ origin
        w_dec = self.W_dec.index_select(0, chosen)
        return ops.aux_k(inputs, residual, w_enc, bias, w_dec, self.k_aux)

    def before_update(self) -> None:
        """Remove the radial part of the decoder's gradient, before it enters Adam's moments."""
        if self.unit_decoder and self.W_dec.grad is not None:
            ops.remove_radial(self.W_dec.grad, self.W_dec.data)

    def after_update(self, fwd: Forward, step: Step) -> None:
        """Renormalise the decoder and let the variant update its buffers."""
        if self.unit_decoder:
            self.W_dec.data.div_(self.W_dec.data.norm(dim=1, keepdim=True).clamp_min_(1e-8))
        self.after_step(fwd, step)

    @torch.no_grad()
    def rescale(self, inputs: Units, outputs: Units) -> None:
        """Turn an SAE of `inputs.apply(x)` and `outputs.apply(y)` into an SAE of x and y.

        Codes do not change. The factors are folded into the weights in float64. `b_dec` takes up
        the mean of the outputs; where it is subtracted from the input as well, `centre` takes up
        the difference to the mean of the inputs.

        Args:
            inputs: Units of the input in training, (D,) each.
            outputs: Units of the output in training, (O,) each.
        """
        self.W_enc.copy_(self.W_enc.double() * inputs.scale.double())
        self.W_dec.copy_(self.W_dec.double() / outputs.scale.double())
        self._move_origin(inputs, outputs)

    def _move_origin(self, inputs: Units, outputs: Units) -> None:
        """Convert `b_dec` and `centre` from the units of training to those of the data."""
        b_dec = outputs.undo(self.b_dec.double())
        origin = self.centre.double()
        if self.pre_bias:
            origin = origin + self.b_dec.double()
        origin = inputs.undo(origin)
        self.centre.copy_(origin - b_dec if self.pre_bias else origin)
        self.b_dec.copy_(b_dec)

    @torch.no_grad()
    def calibrate_threshold(self, x: Tensor, target_l0: float, rows: int = 4096) -> None:
        """Set the threshold so that exactly `target_l0` latents per row are active on average.

        The threshold is 0 if fewer latents can be active.

        It is the exact quantile: the `N * target_l0` highest scores are kept, chunk by chunk. The
        usual moving average of each batch's smallest active value lags behind the weights and
        misses the requested L0.

        Args:
            x: Calibration rows (N, D).
            target_l0: Active latents per row.
            rows: Rows encoded at once.
        """
        n = round(x.shape[0] * target_l0)
        kept = x.new_zeros(0)
        for chunk in x.split(rows):
            centred = self.shifted(self.encoder_input(chunk))
            scores = self.threshold_score(self.encoder_matmul(centred, self.b_enc)).reshape(-1)
            smallest = kept.min() if kept.numel() == n and n else scores.new_zeros(())
            kept = torch.cat([kept, scores[scores > smallest]])
            if kept.numel() > n:
                kept = kept.topk(n, sorted=False).values
        if kept.numel() < n or n == 0:
            self.threshold.fill_(0.0)
            return
        # The smallest kept score must stay active, and only scores above the threshold are.
        just_below = torch.nextafter(kept.min(), kept.new_tensor(-torch.inf))
        self.threshold.fill_(just_below.clamp_min(0))


def sparse(support: Pattern | Tensor) -> Pattern | Tensor:
    """Convert a mask (B, F) to a pattern if it is sparse enough for that to save time.

    Within `static.shapes()` a mask stays one: the size of the pattern would depend on the data.
    """
    if isinstance(support, Pattern) or static.on():
        return support
    if int(torch.count_nonzero(support)) >= ops.SPARSE_BELOW * support.numel():
        return support
    return Pattern.from_mask(support)


def warn_unless_fitted(sae: SAE, function: str) -> None:
    """Warn the caller of a public function about an SAE that is as it was built."""
    if not sae.fitted:
        text = f"{function}: this {type(sae).__name__} has not been fitted; call fit_saes first"
        warnings.warn(text, stacklevel=3)


class NotExportable(UserError):
    """The SAE variant has no counterpart in SAELens' format."""

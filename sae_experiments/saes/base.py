"""The sparse autoencoder all variants share: a variant overrides at most a handful of small methods.

Shape letters: B rows, D d_in, O d_out, F d_sae, N rows of a calibration set, n active entries.
``W_enc`` (F, D) and ``W_dec`` (F, O) are stored latent-major: one latent is one contiguous row.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sae_experiments.errors import UserError
from sae_experiments.saes import ops
from sae_experiments.saes.selection import Pattern
from sae_experiments.saes.types import Batch, Codes, Forward, Inference, Step, Units, by_rows
from sae_experiments.training.loop import Group, Loss, Phase

#: Entries of the encoder's product that are made at once where rows can be encoded in blocks.
BLOCK = 1 << 22


class SAE(nn.Module):
    """Sparse autoencoder ``z = sigma(W_enc (x - b_dec) + b_enc)``, ``xhat = W_dec^T z + b_dec`` (d_out != d_in: a transcoder, no b_dec inside).

    The default loss is ``mean_B ||y - yhat||^2`` plus :meth:`penalties` plus AuxK on dead latents, weighted by ``aux_coeff``.
    Codes with few active entries are decoded, and their gradients computed, from those entries only (:mod:`.ops`).

    Args:
        d_in, d_sae, d_out: widths of input, code and output (None: d_in).
        aux_coeff, k_aux: weight of AuxK and how many dead latents it uses a row (None: d_in // 2). 0 turns it off.
        unit_decoder: keep every decoder row at length 1 (radial gradient removed before each step, renormalised after).
        pre_bias: subtract b_dec from the input (needs d_out == d_in; None: where the widths allow it).

    ``centre`` (D,) is subtracted from the input as well: 0 in training, and afterwards what b_dec
    does not hold of the mean of the data. It is kept apart because ``W_enc x + bias`` loses digits
    where the mean is much larger than the spread; see :meth:`rescale`.
    """

    #: Inputs and targets that consist of this many equal blocks (the sites of a crosscoder) are scaled block by block.
    blocks = 1
    #: Whether the loss looks at what a reconstruction does to the rest of the language model (``Batch.downstream``).
    needs_model = False
    #: Whether each row's support depends on that row alone, so that a large batch may be encoded a block of rows at a time.
    rowwise = True
    #: Whether ``product_dtype`` may be bfloat16.
    coarse = True
    #: What the encoder's product is made from in training. In bfloat16 it only decides which latents are active: their values are made anew.
    product_dtype = torch.float32
    #: Whether the SAE rebuilds what it reads, in the same units (tied weights, a refined code).
    same_units = False
    #: Whether the SAE has been fitted: its weights are in the data's own units.
    fitted = False
    #: Whether a fitted SAE can be trained on from where it is.
    trains_on = False

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
        self.d_in, self.d_sae, self.d_out = d_in, d_sae, d_out or d_in
        self.aux_coeff, self.k_aux, self.unit_decoder = (
            aux_coeff,
            k_aux or max(d_in // 2, 1),
            unit_decoder,
        )
        self.pre_bias = self.d_out == self.d_in if pre_bias is None else pre_bias
        if self.pre_bias and self.d_out != self.d_in:
            raise UserError(
                f"sae: pre_bias=true needs equal widths, not d_in={d_in} and d_out={d_out}"
            )
        rows = ops.unit_rows(torch.randn(d_sae, self.d_out))
        self.W_dec = nn.Parameter(rows)
        self.W_enc = nn.Parameter(
            rows.clone() if self.d_out == d_in else ops.unit_rows(torch.randn(d_sae, d_in))
        )
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.b_dec = nn.Parameter(torch.zeros(self.d_out))
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("centre", torch.zeros(d_in))
        self._scratch: dict[str, Tensor] = {}

    @property
    def asked_l0(self) -> float | None:
        """Active latents a row that were asked for; None where the L0 follows from other settings."""
        return None

    # --- what a variant overrides -------------------------------------------------------------------------------------

    def support(self, pre: Tensor) -> Pattern | Tensor:
        """Which entries of ``pre`` (B, F) are active: a pattern, or a boolean mask. In eval mode each row stands alone."""
        return self.strength(pre) > self.threshold

    def strength(self, pre: Tensor) -> Tensor:
        """What the calibrated threshold is compared with, (B, F); entries at or below 0 are never active."""
        return pre

    def encoder_input(self, x: Tensor) -> Tensor:
        """What the encoder's product reads in place of rows (B, D)."""
        return x

    def linear_path(self, x: Tensor) -> Tensor | None:
        """What the reconstruction gets from the input directly (B, O), past the code; None for nothing."""
        return None

    def nested(self, codes: Codes) -> Tensor | None:
        """Reconstructions from nested parts of the code (B, G, O), the last from all of it; None where there are no parts."""
        return None

    def shape(self, entries: Tensor, col: Tensor | None) -> Tensor:
        """The code at active entries from their pre-activations; ``col`` (n,) names each entry's latent, None means dense (B, F)."""
        return entries

    def penalties(self, fwd: Forward, step: Step) -> dict[str, Tensor]:
        """Weighted loss terms beside reconstruction and AuxK."""
        return {}

    def begin(self, phase: str, x: Tensor, y: Tensor) -> None:
        """Data-dependent initialisation before ``phase``: b_dec becomes the geometric median of the outputs (N, O)."""
        self.b_dec.data.copy_(ops.geometric_median(y))
        if not self.pre_bias:  # pre-activations centred, as subtracting a bias would make them
            self.b_enc.data.copy_(-self.W_enc.data @ x.mean(0))

    def begin_again(self, phase: str, x: Tensor, y: Tensor) -> None:
        """What takes the place of :meth:`begin` for a fitted SAE that is trained on."""

    def after_step(self, fwd: Forward, step: Step) -> None:
        """The only method that may write buffers during training."""

    def finish(self, phase: str, x: Tensor) -> None:
        """Calibrate what inference needs (thresholds) on rows (N, D) that were not trained on."""

    def phases(self) -> list[Phase]:
        """One phase over every parameter, unless the variant has more."""
        return [Phase("train", 1.0, [Group(list(self.parameters()))])]

    def inference(self) -> Inference:
        """The trained SAE in SAELens' terms. Raises ``NotExportable`` where there is no such form."""
        raise NotExportable(f"{type(self).__name__} has no counterpart in SAELens' format")

    def plain_tensors(self) -> dict[str, Tensor]:
        """Weights under SAELens' names and orientation: W_enc (D, F), W_dec (F, O)."""
        b_enc = self.b_enc.detach()
        if bool(self.centre.any()):  # the format has no place for it
            b_enc = (b_enc.double() - self.W_enc.detach().double() @ self.centre.double()).to(b_enc)
        return {
            "W_enc": self.W_enc.detach().t().contiguous(),
            "b_enc": b_enc,
            "W_dec": self.W_dec.detach(),
            "b_dec": self.b_dec.detach(),
        }

    def as_jumprelu(self) -> Inference:
        """This SAE as ``z = a 1[a > threshold]`` with one threshold for all latents."""
        tensors = self.plain_tensors() | {
            "threshold": self.threshold.detach().expand(self.d_sae).contiguous()
        }
        return Inference("jumprelu", tensors, {"apply_b_dec_to_input": self.pre_bias})

    # --- the shared machinery -----------------------------------------------------------------------------------------

    def accepted(self, x: Tensor, width: str) -> Tensor:
        """Rows (..., W) as a tensor of the weights' type; :class:`UserError` for another width."""
        x = x if isinstance(x, Tensor) else torch.as_tensor(x)
        if not x.ndim or x.shape[-1] != getattr(self, width):
            raise UserError(
                f"rows of shape {tuple(x.shape)} do not fit {width}={getattr(self, width)} of this SAE"
            )
        return x.to(next(self.parameters()).dtype)

    def origin(self) -> Tensor:
        """What the encoder subtracts from its input (D,)."""
        return self.centre + self.b_dec if self.pre_bias else self.centre

    def shifted(self, x: Tensor) -> Tensor:
        """Rows (..., D) less :meth:`origin`: exact however large the mean of the data is."""
        return x - self.origin()

    def bias(self) -> Tensor:
        """Encoder bias with the origin folded in, ``b_enc - W_enc origin``: for training, where

        rows are centred, it saves a pass over the batch.
        """
        return self.b_enc - self.W_enc @ self.origin()

    @by_rows("d_in")
    def pre_acts(self, x: Tensor) -> Tensor:
        """Pre-activations (..., F) of rows (..., D), differentiable."""
        return nn.functional.linear(self.shifted(self.encoder_input(x)), self.W_enc, self.b_enc)

    def activate(self, pre: Tensor) -> Codes:
        """The code of pre-activations (B, F), without a graph."""
        support = self.support(pre)
        if isinstance(support, Pattern):
            return Codes(self.shape(support.at(pre), support.col), support)
        return Codes(self.shape(pre, None) * support)

    @by_rows("d_in")
    def encode(self, x: Tensor) -> Tensor:
        """Dense codes (..., F) of rows (..., D)."""
        return self.activate(self.pre_acts(x)).dense()

    @by_rows("d_sae")
    def decode(self, acts: Tensor) -> Tensor:
        """Reconstruction (..., O) of dense codes (..., F)."""
        return acts @ self.W_dec + self.b_dec

    @by_rows("d_sae")
    def contributions(self, acts: Tensor, direction: Tensor) -> Tensor:
        """How far each latent moves the reconstruction along a direction of the output.

        Args:
            acts: dense codes (..., F).
            direction: (O,), of any length.

        Returns:
            (..., F), in units of the activations; a row's sum is its reconstruction along the direction, less what biases put there.
        """
        return acts * (self.W_dec @ direction)

    def reach(self) -> Tensor:
        """How far one unit of each latent moves the reconstruction, (F,), in units of the activations."""
        return self.W_dec.norm(dim=1)

    @by_rows("d_in")
    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction (..., O) of rows (..., D): ``decode(encode(x))``, plus the direct path where there is one."""
        return self.reconstruct(x, self.encode(x))

    def reconstruct(self, x: Tensor, acts: Tensor) -> Tensor:
        """The reconstruction from dense codes and the direct path."""
        direct = self.linear_path(x)
        return self.decode(acts) if direct is None else self.decode(acts) + direct

    def training_forward(self, batch: Batch) -> Forward:
        """One pass that keeps a graph only where a gradient can flow."""
        bias = self.bias()
        x, weight = self.encoder_input(batch.x), self.W_enc.detach().to(self.product_dtype)
        found, pre = self._by_blocks(x, weight, bias), None
        if found:
            support, values = found
        else:
            values = pre = self.product(x, bias, weight)
            support = sparse(self.support(pre))
            support = (
                support if isinstance(support, Pattern) else support.to(pre.dtype)
            )  # one conversion for all uses
        pattern = support if isinstance(support, Pattern) else None
        if weight.dtype != x.dtype:
            values = self.product(x, bias) if pattern is None else self._exact(x, bias, pattern)
        at = ops.entries(x, self.W_enc, bias, values, support)
        values = self.shape(at, pattern.col if pattern else None)
        if pattern is None and values is not at:
            values = ops.masked(values, support)
        codes = Codes(values, pattern)
        levels = self.nested(codes)
        recon = (
            ops.decode(codes.values, pattern, self.W_dec) + self.b_dec
            if levels is None
            else levels[:, -1]
        )
        direct = self.linear_path(batch.x)
        mask = support if pattern is None else None
        return Forward(
            batch, pre, codes, recon if direct is None else recon + direct, at, levels, mask
        )

    @torch.no_grad()
    def _exact(self, x: Tensor, bias: Tensor, pattern: Pattern) -> Tensor:
        """``x W_enc^T + bias`` at the active entries (n,), from these alone."""
        return ops.entry_products(pattern, x, self.W_enc) + bias.index_select(0, pattern.col)

    @torch.no_grad()
    def _by_blocks(self, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Pattern, Tensor] | None:
        """The active entries of a large batch and the pre-activations there, from a block of rows at a time: the (B, F) product, by far the
        largest tensor of a step, is never whole. None where it has to be (a support that depends on the batch, a dense code) or is small.
        """
        rows = max(BLOCK // self.d_sae, 1)
        if not self.rowwise or len(x) <= rows or x.device.type != "cpu":
            return None
        patterns, values = [], []
        for part in x.split(rows):
            pre = self.product(part, bias, weight)
            support = sparse(self.support(pre))
            if not isinstance(support, Pattern):
                return None
            patterns.append(support)
            values.append(support.at(pre))
        return Pattern.stacked(patterns), torch.cat(values)

    @torch.no_grad()
    def product(self, x: Tensor, bias: Tensor, weight: Tensor | None = None) -> Tensor:
        """``x W_enc^T + bias`` into a buffer that is reused: freshly mapped pages would cost as much as the product. ``weight``: W_enc as it is to
        be taken, in another precision for example.
        """
        size = (x.shape[0], self.d_sae)
        buffer = self._scratch.get("pre")
        if (
            buffer is None
            or len(buffer) < len(x)
            or buffer.shape[1:] != size[1:]
            or buffer.device != x.device
            or buffer.dtype != x.dtype
        ):
            buffer = self._scratch["pre"] = torch.empty(size, device=x.device, dtype=x.dtype)
        return ops.product(x, self.W_enc if weight is None else weight, bias, out=buffer[: len(x)])

    def loss(self, batch: Batch, step: Step) -> Loss:
        """Reconstruction, penalties and AuxK. Changes no parameter and no buffer."""
        fwd = self.training_forward(batch)
        parts = self.reconstruction(fwd, step) | self.penalties(fwd, step) | self.revive(fwd, step)
        extra = Forward(batch, fwd.pre, fwd.codes.detach(), fwd.recon.detach(), fwd.at.detach())
        return Loss(sum(parts.values()), {k: v.detach() for k, v in parts.items()}, extra)

    def reconstruction(self, fwd: Forward, step: Step) -> dict[str, Tensor]:
        """The reconstruction term: ``mean_B ||y - yhat||^2``."""
        return {"mse": ops.squared_error(fwd.recon, fwd.batch.y)}

    def revive(self, fwd: Forward, step: Step) -> dict[str, Tensor]:
        """The AuxK term over the latents in ``step.dead`` (empty where there are none)."""
        if not self.aux_coeff or not bool(step.dead.any()):
            return {}
        return {
            "aux_k": self.aux_coeff
            * self.explain(fwd.batch.x, fwd.batch.y - fwd.recon, step.dead.nonzero().squeeze(1))
        }

    def explain(self, x: Tensor, residual: Tensor, dead: Tensor) -> Tensor:
        """How much of ``residual`` (B, O) the latents ``dead`` leave unexplained (:func:`.ops.aux_k`); no live parameter gets a gradient."""
        w_enc, bias = self.W_enc.index_select(0, dead), self.b_enc.index_select(0, dead)
        bias = bias - w_enc @ self.origin().detach()
        return ops.aux_k(
            self.encoder_input(x),
            residual,
            w_enc,
            bias,
            self.W_dec.index_select(0, dead),
            self.k_aux,
        )

    def before_update(self) -> None:
        """Remove the radial part of the decoder's gradient, so that Adam's moments hold none of it."""
        if self.unit_decoder and self.W_dec.grad is not None:
            ops.remove_radial(self.W_dec.grad, self.W_dec.data)

    def after_update(self, fwd: Forward, step: Step) -> None:
        """Renormalise the decoder and let the variant update its buffers."""
        if self.unit_decoder:
            self.W_dec.data.div_(self.W_dec.data.norm(dim=1, keepdim=True).clamp_min_(1e-8))
        self.after_step(fwd, step)

    @torch.no_grad()
    def rescale(self, inputs: Units, outputs: Units) -> None:
        """Turn an SAE of ``inputs.apply(x)`` and ``outputs.apply(y)`` into one of x and y.

        Codes are unchanged. Folded in float64. Where b_dec is subtracted from the input it takes
        the mean of the outputs along; ``centre`` is what the mean of the inputs differs by.
        """
        self.W_enc.copy_(self.W_enc.double() * inputs.scale.double())
        self.W_dec.copy_(self.W_dec.double() / outputs.scale.double())
        self._move_origin(inputs, outputs)

    def _move_origin(self, inputs: Units, outputs: Units) -> None:
        b_dec = outputs.undo(self.b_dec.double())
        centre = (
            self.centre.double() + self.b_dec.double() if self.pre_bias else self.centre.double()
        )
        centre = inputs.undo(centre)
        self.centre.copy_(centre - b_dec if self.pre_bias else centre)
        self.b_dec.copy_(b_dec)

    @torch.no_grad()
    def calibrate_threshold(self, x: Tensor, target_l0: float, rows: int = 4096) -> None:
        """Set the threshold so that exactly ``target_l0`` latents a row are active on (N, D), or to 0 if fewer can be.

        The exact quantile: the N * target_l0 largest strengths are kept chunk by chunk. A moving average of each batch's least active
        value, the usual choice, lags behind the weights and misses the asked-for L0.
        """
        n = round(x.shape[0] * target_l0)
        kept = x.new_zeros(0)
        for chunk in x.split(rows):
            seen = self.shifted(self.encoder_input(chunk))
            strength = self.strength(self.product(seen, self.b_enc)).reshape(-1)
            least = kept.min() if kept.numel() == n and n else strength.new_zeros(())
            kept = torch.cat([kept, strength[strength > least]])
            if kept.numel() > n:
                kept = kept.topk(n, sorted=False).values
        # The least of the n largest must stay active, and active means strictly above the threshold.
        full = kept.numel() == n and n > 0
        self.threshold.fill_(
            torch.nextafter(kept.min(), kept.new_tensor(-torch.inf)).clamp_min(0) if full else 0.0
        )


def sparse(support: Pattern | Tensor) -> Pattern | Tensor:
    """A mask as a pattern, if it is sparse enough for that to pay."""
    if (
        isinstance(support, Pattern)
        or int(torch.count_nonzero(support)) >= ops.SPARSE_BELOW * support.numel()
    ):
        return support
    return Pattern.from_mask(support)


class NotExportable(UserError):
    """This variant has no counterpart in the interchange format."""

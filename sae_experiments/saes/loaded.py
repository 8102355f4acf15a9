"""SAEs read from SAELens directories, for use or further training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sae_experiments.saes import selection
from sae_experiments.saes.base import Inference, NotExportable
from sae_experiments.saes.batch_topk import BatchTopK
from sae_experiments.saes.gated import as_gated
from sae_experiments.saes.pattern import Pattern
from sae_experiments.saes.types import by_rows
from sae_experiments.sampling import spread_rows

#: Weight of AuxK, which brings dead latents back, as in `conf/sae/topk.yaml`.
AUX_COEFF = 1 / 32
#: Rows on which active latents are counted before further training.
COUNTED = 8192
#: Normalisations that depend on each row.
BY_ROW = ("layer_norm", "constant_norm_rescale")
#: Added by SAELens to the standard deviation in `layer_norm`.
EPSILON = 1e-5


class Loaded(BatchTopK):
    """SAE of one of four architectures, with `a = W_enc (x - b_dec) + b_enc` in each:

        standard  z = ReLU(a)                   topk   z = ReLU(TopK_k(a))
        jumprelu  z = ReLU(a) 1[a > theta]      gated  z = 1[a > 0] ReLU(e^r (a - b_enc) + b_mag)

    Further training keeps the L0. `topk` selects as before. For the others the L0 is counted on
    the first rows. In training, the entries of a batch that lie furthest above their thresholds
    are active (all positive ones, if these are too few). At the end all thresholds move by the
    same amount, so that the L0 is exact. Decoder rows may have any length.

    Args:
        inference: Architecture, tensors under SAELens' names, and settings.
        notes: Settings of its configuration that were ignored, for the user.
    """

    fitted = True
    trains_on = True
    always_sparse = False  # the codes of others may be dense

    theta: Tensor
    wanted: Tensor

    def __init__(self, inference: Inference, notes: tuple[str, ...] = ()) -> None:
        architecture, tensors, config = inference
        d_in, d_sae = tensors["W_enc"].shape
        pre_bias = bool(config.get("apply_b_dec_to_input", True))
        with torch.random.fork_rng(devices=[]):  # the random weights are replaced below
            super().__init__(
                d_in=d_in,
                d_sae=d_sae,
                d_out=tensors["W_dec"].shape[1],
                k=d_sae,
                unit_decoder=False,
                pre_bias=pre_bias,
                aux_coeff=AUX_COEFF,
            )
        self.architecture = architecture
        self.config = config
        self.notes = notes
        gated = architecture == "gated"
        self.support_is_rowwise = architecture == "topk"
        if self.support_is_rowwise:
            self.k = int(config["k"])
        norms = torch.ones(d_sae)
        if self.support_is_rowwise and config.get("rescale_acts_by_decoder_norm"):
            norms = tensors["W_dec"].norm(dim=1)  # the units of the codes: fold them in
        self.W_enc = nn.Parameter((tensors["W_enc"].t() * norms[:, None]).contiguous())
        self.b_enc = nn.Parameter(tensors["b_gate" if gated else "b_enc"] * norms)
        self.W_dec = nn.Parameter(tensors["W_dec"] / norms.clamp_min(1e-12)[:, None])
        self.b_dec = nn.Parameter(tensors["b_dec"].clone())
        if gated:
            self.r_mag = nn.Parameter(tensors["r_mag"].clone())
            self.b_mag = nn.Parameter(tensors["b_mag"].clone())
        theta = tensors["threshold"] if self.architecture == "jumprelu" else torch.zeros(d_sae)
        self.register_buffer("theta", theta.clone())
        self.register_buffer("wanted", torch.tensor(torch.nan, dtype=torch.float64))
        skip = tensors.get("W_skip")
        self.W_skip = None if skip is None else nn.Parameter(skip.clone())
        self.transcodes = bool(config.get("transcoder"))
        if self.transcodes:
            self.trains_on = False
        scale = config.get("input_scale")
        #: The input is scaled by a factor that the directory does not tell; see `adapt`.
        self.needs_scale = "input_scale" in config and scale is None
        if scale is not None:
            self.fold_input_scale(scale)
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def adapt(self, x: Tensor) -> None:
        """Infer from rows (N, D) of the model the units that the directory does not record.

        An unknown factor of the input is `sqrt(D) / mean |x|`, as in SAELens' training.
        """
        if self.needs_scale:
            self.fold_input_scale(float(self.d_in**0.5 / x.double().norm(dim=1).mean()))

    @torch.no_grad()
    def fold_input_scale(self, scale: float) -> None:
        """Turn an SAE of `scale * x` into one of x with the same codes."""
        self.W_enc.mul_(scale)
        self.W_dec.div_(scale)
        self.b_dec.div_(scale)
        self.needs_scale = False

    @by_rows("d_in")
    def linear_path(self, x: Tensor) -> Tensor | None:
        """The skip path of rows (..., D)."""
        return None if self.W_skip is None else x @ self.W_skip.t()

    @property
    def fixed_l0(self) -> float | None:
        """L0 that further training keeps; None before it has been counted."""
        if self.architecture == "topk":
            return float(self.k)
        return None if bool(self.wanted.isnan()) else self.budget()

    def support(self, pre: Tensor) -> Pattern | Tensor:
        """Active entries: per row for `topk`, else per batch in training and by threshold."""
        if self.architecture == "topk":
            return selection.top_k(pre.detach(), int(self.k))
        if self.training:
            return self.largest(self.threshold_score(pre.detach()))
        return super().support(pre)

    def threshold_score(self, pre: Tensor) -> Tensor:
        """Distance of the pre-activations (B, F) above each latent's own threshold."""
        if self.architecture == "gated":
            return torch.where(self.activation(pre, None) > 0, pre, 0)
        if self.architecture == "jumprelu":
            return torch.where(pre > 0, pre - self.theta, 0)
        return pre

    def activation(self, entries: Tensor, col: Tensor | None) -> Tensor:
        """ReLU, or the magnitude of a gated SAE."""
        if self.architecture != "gated":
            return torch.relu(entries)
        parts = (self.b_enc, self.r_mag.exp(), self.b_mag)
        gate, scale, bias = (p if col is None else p[col] for p in parts)
        return torch.relu(scale * (entries - gate) + bias)

    def budget(self) -> float:
        """Counted active latents per row."""
        return self.wanted.item()

    @torch.no_grad()
    def resume_training(self, phase: str, x: Tensor, y: Tensor) -> None:
        """Count the L0 on rows (N, D), and leave the thresholds room to fall."""
        if self.architecture == "topk":
            return
        rows = spread_rows(x, COUNTED)
        was_training = self.training
        self.eval()
        active = sum(int((self.encode(part) != 0).sum()) for part in rows.split(1024))
        self.train(was_training)
        self.wanted.fill_(max(active, 1) / len(rows))
        room = self.theta.clamp_min(0).median()
        self.theta.sub_(room)
        self.threshold.add_(room)

    @torch.no_grad()
    def finish(self, phase: str, x: Tensor) -> None:
        """Shift all thresholds by one amount, so that the L0 on rows (N, D) is the counted one."""
        if self.architecture == "topk":
            return
        self.calibrate_threshold(x, self.budget())
        if self.architecture == "gated":
            self.b_enc.sub_(self.threshold)
        else:
            self.theta.add_(self.threshold)
            if bool(self.theta.any()):
                self.architecture = "jumprelu"
        self.threshold.zero_()

    def inference(self) -> Inference:
        """The SAE in its own architecture."""
        settings: dict[str, Any] = {"apply_b_dec_to_input": self.pre_bias}
        if self.architecture == "topk":
            settings |= {"k": self.k, "rescale_acts_by_decoder_norm": False}
        if self.transcodes:
            raise NotExportable("a loaded transcoder is not written again: use its own directory")
        if self.architecture == "gated":
            return as_gated(self)
        tensors = self.plain_tensors()
        if self.architecture == "jumprelu":
            tensors["threshold"] = self.theta + self.threshold
        return Inference(self.architecture, tensors, settings)


class NormalisedRows(Loaded):
    """SAE that normalises every row by itself and undoes that after decoding.

    With the mean and the standard deviation of a row, or 0 and `|x| / sqrt(D)`, as m and s:

        z = encode((x - m) / (s + epsilon))        xhat = s decode(z) + m

    A transcoder's output is not scaled back. Decoder and biases are kept in the units of a row of
    typical s (1, or the mean over the rows of `adapt`), so that quantities computed from the
    decoder alone have the units of the activations; `output_scale` is the remaining factor.
    """

    trains_on = False

    typical: Tensor

    def __init__(self, inference: Inference, notes: tuple[str, ...] = ()) -> None:
        super().__init__(inference, notes)
        self.trains_on = False
        self.kind = inference.config["normalize_activations"]
        self.undone = not self.transcodes
        if self.pre_bias:  # subtracted from a normalised row, whereas b_dec changes its units
            self.pre_bias = False
            self.centre.copy_(self.b_dec)
        self.register_buffer("typical", torch.ones(()))

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Centre and scale (..., 1) of each of the rows (..., D)."""
        if self.kind == "layer_norm":
            return x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        scale = x.norm(dim=-1, keepdim=True).clamp_min(1e-12) / self.d_in**0.5
        return torch.zeros_like(scale), scale

    @by_rows("d_in")
    def encoder_input(self, x: Tensor) -> Tensor:
        """Normalised rows (..., D)."""
        centre, scale = self.moments(x)
        epsilon = EPSILON if self.kind == "layer_norm" else 0.0
        return (x - centre) / (scale + epsilon)

    @torch.no_grad()
    def adapt(self, x: Tensor) -> None:
        """Put the decoder in the units of a typical row among rows (N, D)."""
        super().adapt(x)
        if self.undone:
            factor = self.moments(x)[1].mean() / self.typical
            self.W_dec.mul_(factor)
            self.b_dec.mul_(factor)
            self.typical.mul_(factor)

    def output_scale(self, x: Tensor) -> Tensor | None:
        """Factor (B, 1) of a decoded code in the reconstruction."""
        return self.moments(x)[1] / self.typical if self.undone else None

    @by_rows("d_in")
    def linear_path(self, x: Tensor) -> Tensor | None:
        """Addition to the decoded codes: the centres of rows (..., D), or the skip path."""
        if not self.undone:
            return super().linear_path(x)
        return self.moments(x)[0].expand(*x.shape[:-1], self.d_out)

    def inference(self) -> Inference:
        """The SAE in its own architecture, with its normalisation."""
        architecture, tensors, settings = super().inference()
        for name in ("W_dec", "b_dec"):
            tensors[name] = tensors[name] / self.typical
        return Inference(architecture, tensors, settings | {"normalize_activations": self.kind})


def loaded(inference: Inference, notes: tuple[str, ...] = ()) -> Loaded:
    """Build the SAE of a directory, in the class that its normalisation needs."""
    by_row = inference.config.get("normalize_activations") in BY_ROW
    return (NormalisedRows if by_row else Loaded)(inference, notes)

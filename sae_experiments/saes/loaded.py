"""SAE read from a SAELens directory, for use or further training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sae_experiments.saes import selection
from sae_experiments.saes.base import Inference
from sae_experiments.saes.batch_topk import BatchTopK
from sae_experiments.saes.gated import as_gated
from sae_experiments.saes.selection import Pattern
from sae_experiments.sampling import spread_rows

#: Weight of AuxK, which brings dead latents back, as in `conf/sae/topk.yaml`.
AUX_COEFF = 1 / 32
#: Rows on which active latents are counted before further training.
COUNTED = 8192


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
        self.eval().requires_grad_(False)

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
        if self.architecture == "gated":
            return as_gated(self)
        tensors = self.plain_tensors()
        if self.architecture == "jumprelu":
            tensors["threshold"] = self.theta + self.threshold
        return Inference(self.architecture, tensors, settings)

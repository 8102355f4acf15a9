"""Sums over pairs of codes, clean and perturbed, and the distributions of their activations."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class Sums:
    """Running float64 sums over rows of clean codes z and perturbed codes z~.

    Every measure of stability is a ratio of these sums.

    Args:
        d_sae: Number of latents, F.
    """

    NAMES = ("moved", "flipped", "clean", "noisy", "z", "m", "zz", "mm", "zm", "fires", "flips")

    def __init__(self, d_sae: int) -> None:
        #: Sums per latent (F,) by name.
        self.by_latent = {name: np.zeros(d_sae) for name in self.NAMES}
        self.rows = 0
        self.jaccard_sum = 0.0
        self.jaccard_rows = 0
        self.cosine_sum = 0.0
        self.cosine_rows = 0

    def add(self, z: Tensor, moved: Tensor) -> None:
        """Add the same rows of clean codes `z` and perturbed codes `moved`, (B, F) each."""
        change = (moved - z).abs()
        on, on_after = z != 0, moved != 0
        flip = on != on_after
        parts = {
            "moved": change.sum(0),
            "flipped": (change * flip).sum(0),
            "clean": z.abs().sum(0),
            "noisy": moved.abs().sum(0),
            "z": z.sum(0),
            "m": moved.sum(0),
            "zz": z.square().sum(0),
            "mm": moved.square().sum(0),
            "zm": (z * moved).sum(0),
            "fires": on.sum(0),
            "flips": flip.sum(0),
        }
        for name, value in parts.items():
            self.by_latent[name] += value.double().cpu().numpy()
        union = (on | on_after).sum(1)
        shared = (on & on_after).sum(1)
        active = union > 0
        self.jaccard_sum += float((shared[active] / union[active]).double().sum())
        self.jaccard_rows += int(active.sum())
        length = z.norm(dim=1) * moved.norm(dim=1)
        both = length > 0
        self.cosine_sum += float(((z * moved).sum(1)[both] / length[both]).double().sum())
        self.cosine_rows += int(both.sum())
        self.rows += len(z)

    def alive(self, min_fires: int) -> np.ndarray:
        """Mask (F,) of the latents with at least `max(min_fires, 1)` firings on the clean rows."""
        return self.by_latent["fires"] >= max(min_fires, 1)

    def change(self) -> float | None:
        """Feature change `100 sum |z~ - z| / sum |z|` over all latents; None if none fires."""
        total = self.by_latent["clean"].sum()
        return float(100 * self.by_latent["moved"].sum() / total) if total > 0 else None

    def latent_change(self) -> np.ndarray:
        """`100 sum_b |z~ - z| / sum_b |z|` per latent (F,); NaN if it never fires."""
        return 100 * _ratio(self.by_latent["moved"], self.by_latent["clean"])

    def fss(self) -> np.ndarray:
        """Feature stability score per latent (F,); NaN for a latent that fires in neither code.

        `100 (1 - sum_b |z~ - z| / sum_b (|z~| + |z|))`
        """
        mass = self.by_latent["clean"] + self.by_latent["noisy"]
        return 100 * (1 - _ratio(self.by_latent["moved"], mass))

    def pearson(self) -> np.ndarray:
        """Pearson's r between z and z~ per latent (F,); NaN unless both vary."""
        s = self.by_latent
        n = max(self.rows, 1)
        variance_z = s["zz"] - s["z"] ** 2 / n
        variance_m = s["mm"] - s["m"] ** 2 / n
        smallest = 1e-9 * np.maximum(s["zz"], s["mm"])
        varies = (variance_z > smallest) & (variance_m > smallest)
        scale = np.sqrt(np.where(varies, variance_z * variance_m, 1))
        return np.where(varies, (s["zm"] - s["z"] * s["m"] / n) / scale, np.nan)

    def summary(self, alive: np.ndarray) -> dict[str, float | None]:
        """All measures of stability by name; None if undefined.

        Args:
            alive: Mask (F,) of the latents over which measures per latent are averaged.
        """
        fss = self.fss()[alive]
        r = self.pearson()[alive]
        defined_r = r[np.isfinite(r)]
        return {
            "change": self.change(),
            "change_mean": _mean(self.latent_change()[alive]),
            "fss": float(np.median(fss)) if len(fss) else None,
            "fss_p5": float(np.quantile(fss, 0.05)) if len(fss) else None,
            "fss_pooled": self.pooled_fss(),
            "sci": _mean(defined_r),
            "sci_skipped": float(len(r) - len(defined_r)),
            "sci_token": self.cosine_sum / self.cosine_rows if self.cosine_rows else None,
            "jaccard": self.jaccard_sum / self.jaccard_rows if self.jaccard_rows else None,
            **self._flips(),
        }

    def pooled_fss(self) -> float | None:
        """FSS with sums over all latents; None if none fires in either code."""
        moved = self.by_latent["moved"].sum()
        mass = (self.by_latent["clean"] + self.by_latent["noisy"]).sum()
        return float(100 * (1 - moved / mass)) if mass > 0 else None

    def _flips(self) -> dict[str, float | None]:
        """Latents that go on or off, per 1000, and their part of the change."""
        flips = self.by_latent["flips"]
        moved = self.by_latent["moved"].sum()
        flipped = self.by_latent["flipped"].sum()
        return {
            "flips": float(1000 * flips.sum() / (self.rows * len(flips))) if self.rows else None,
            "flip_share": float(flipped / moved) if moved > 0 else None,
        }


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`a / b`; NaN unless b is positive."""
    return np.divide(a, b, out=np.full(len(a), np.nan), where=b > 0)


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def structure(z: Tensor, moved: Tensor, latents: np.ndarray) -> float | None:
    """Pearson's r between the correlations of all pairs of latents, clean and perturbed.

    Args:
        z: Clean codes, (N, F).
        moved: Perturbed codes, (N, F).
        latents: Latents to pair; those that do not vary in both codes are left out.

    Returns:
        The correlation; None if there are too few pairs or they do not vary.
    """
    index = torch.from_numpy(latents).to(z.device)
    clean, perturbed = z[:, index], moved[:, index]
    varies = (clean.std(0) > 0) & (perturbed.std(0) > 0)
    a = _pair_correlations(clean[:, varies])
    b = _pair_correlations(perturbed[:, varies])
    if len(a) < 2 or not a.std() > 0 or not b.std() > 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def _pair_correlations(codes: Tensor) -> np.ndarray:
    """Correlations of all pairs of the columns of codes (N, A), (A * (A - 1) / 2,)."""
    centred = codes - codes.mean(0)
    centred = centred / centred.norm(dim=0).clamp_min(1e-12)
    correlations = (centred.t() @ centred).double().cpu().numpy()
    return correlations[np.triu_indices(len(correlations), 1)]


class Distributions:
    """Distributions of the activations of some latents, clean against perturbed.

    Args:
        z: Clean codes, (N, F).
        moved: Perturbed codes, (N, F).
        which: Latents compared.
        bins: Bins per histogram.

    Attributes:
        wasserstein: Mean over latents of W1(z, z~) / mean |z|.
        zero_mass: Mean over latents of P(z~ = 0) - P(z = 0).
    """

    def __init__(self, z: Tensor, moved: Tensor, which: np.ndarray, bins: int) -> None:
        self.which = which
        self.bins = bins
        #: Clean and perturbed activations (N,) of each latent of `which`.
        self.pairs: list[tuple[np.ndarray, np.ndarray]] = []
        distances, zero_mass = [], []
        for j in which.tolist():
            clean, perturbed = z[:, j].cpu().numpy(), moved[:, j].cpu().numpy()
            self.pairs.append((clean, perturbed))
            size = np.abs(clean).mean()
            if size > 0:
                distances.append(np.abs(np.sort(clean) - np.sort(perturbed)).mean() / size)
            zero_mass.append((perturbed == 0).mean() - (clean == 0).mean())
        self.wasserstein = float(np.mean(distances)) if distances else None
        self.zero_mass = float(np.mean(zero_mass)) if zero_mass else None

    def arrays(self, fss: np.ndarray, shown: int) -> dict[str, np.ndarray]:
        """Histograms of the non-zero activations.

        Histograms of single latents leave out the largest 0.1 % of the values. The histogram over
        all latents runs from 0 to 4, in units of each latent's mean non-zero magnitude.

        Args:
            fss: Feature stability score per latent, (F,).
            shown: Number of latents with a histogram of their own, spread from the 5th to the 95th
                percentile of FSS.
        """
        order = np.argsort(fss[self.which], kind="stable")
        last = len(order) - 1
        places = np.linspace(0.05 * last, 0.95 * last, min(shown, len(order)))
        picked = order[places.round().astype(int)]
        counts = np.zeros((len(picked), 2, self.bins), np.int64)
        edges = np.zeros((len(picked), self.bins + 1))
        zeros = np.zeros((len(picked), 2))
        for i, place in enumerate(picked):
            pair = self.pairs[place]
            edges[i] = _edges(np.concatenate(pair), self.bins)
            for k, values in enumerate(pair):
                counts[i, k] = np.histogram(values[values != 0], edges[i])[0]
                zeros[i, k] = (values == 0).mean()
        latents = self.which[picked]
        all_edges = np.linspace(0, 4, self.bins + 1)
        return {
            "rob_hist_latents": latents,
            "rob_hist_fss": fss[latents],
            "rob_hist_counts": counts,
            "rob_hist_edges": edges,
            "rob_hist_zeros": zeros,
            "rob_hist_all": self._pooled_histogram(all_edges),
            "rob_hist_all_edges": all_edges,
        }

    def _pooled_histogram(self, edges: np.ndarray) -> np.ndarray:
        """Counts (2, bins) over all latents, in units of each one's mean non-zero magnitude."""
        counts = np.zeros((2, self.bins), np.int64)
        for clean, perturbed in self.pairs:
            if not (clean != 0).any():
                continue
            scale = np.abs(clean[clean != 0]).mean()
            for k, values in enumerate((clean, perturbed)):
                counts[k] += np.histogram(np.abs(values[values != 0]) / scale, edges)[0]
        return counts


def _edges(values: np.ndarray, bins: int) -> np.ndarray:
    """Bin edges from 0 (or the smallest value) to the 99.9 % quantile of the non-zero values.

    The bins have some width even if the values are constant.
    """
    low, high = 0.0, 1.0
    nonzero = values[values != 0]
    if len(nonzero):
        low = min(float(nonzero.min()), 0.0)
        high = float(np.quantile(nonzero, 0.999))
    if not high > low:
        high = low + 1
    return np.linspace(low, high, bins + 1)

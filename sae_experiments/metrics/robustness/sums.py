"""Sums over pairs of codes, clean and perturbed, from which every stability measure follows; and the shapes of their distributions."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class Sums:
    """Running float64 sums over rows of clean codes z and perturbed codes z~, (F,) a latent; every measure is a ratio of such sums."""

    def __init__(self, d_sae: int) -> None:
        self.names = ("moved", "flipped", "clean", "noisy", "z", "m", "zz", "mm", "zm", "fires", "flips")
        self.by_latent = {name: np.zeros(d_sae) for name in self.names}
        self.rows = self.jaccard_sum = self.jaccard_rows = self.cosine_sum = self.cosine_rows = 0.0

    def add(self, z: Tensor, moved: Tensor) -> None:
        """Rows (B, F) of both codes."""
        change, on, on_after = (moved - z).abs(), z != 0, moved != 0
        flip = on != on_after
        parts = {
            "moved": change.sum(0), "flipped": (change * flip).sum(0), "clean": z.abs().sum(0), "noisy": moved.abs().sum(0), "z": z.sum(0),
            "m": moved.sum(0), "zz": z.square().sum(0), "mm": moved.square().sum(0), "zm": (z * moved).sum(0), "fires": on.sum(0), "flips": flip.sum(0),
        }  # fmt: skip
        for name, value in parts.items():
            self.by_latent[name] += value.double().cpu().numpy()
        union = (on | on_after).sum(1)
        some = union > 0
        self.jaccard_sum += float(((on & on_after).sum(1)[some] / union[some]).double().sum())
        self.jaccard_rows += int(some.sum())
        length = z.norm(dim=1) * moved.norm(dim=1)
        both = length > 0
        self.cosine_sum += float(((z * moved).sum(1)[both] / length[both]).double().sum())
        self.cosine_rows += int(both.sum())
        self.rows += len(z)

    def alive(self, least: int) -> np.ndarray:
        """Latents (F,) that fire at least so often on the clean rows."""
        return self.by_latent["fires"] >= max(least, 1)

    def change(self) -> float | None:
        """``100 sum |z~ - z| / sum |z|`` over everything; None where nothing fires."""
        total = self.by_latent["clean"].sum()
        return float(100 * self.by_latent["moved"].sum() / total) if total > 0 else None

    def latent_change(self) -> np.ndarray:
        """``100 sum_b |z~ - z| / sum_b |z|`` of every latent; NaN where it never fires."""
        return 100 * _ratio(self.by_latent["moved"], self.by_latent["clean"])

    def fss(self) -> np.ndarray:
        """``100 (1 - sum_b |z~ - z| / sum_b (|z~| + |z|))`` of every latent; NaN where it fires in neither."""
        return 100 * (1 - _ratio(self.by_latent["moved"], self.by_latent["clean"] + self.by_latent["noisy"]))

    def pearson(self) -> np.ndarray:
        """Pearson's r between z and z~ of every latent; NaN without variance in both."""
        s, n = self.by_latent, max(self.rows, 1)
        vz, vm = s["zz"] - s["z"] ** 2 / n, s["mm"] - s["m"] ** 2 / n
        least = 1e-9 * np.maximum(s["zz"], s["mm"])
        varies = (vz > least) & (vm > least)
        return np.where(varies, (s["zm"] - s["z"] * s["m"] / n) / np.sqrt(np.where(varies, vz * vm, 1)), np.nan)

    def summary(self, alive: np.ndarray) -> dict[str, float | None]:
        """Every measure; those over latents are over ``alive`` ones (F,), None where there are none."""
        s, n = self.by_latent, self.rows
        fss, r, change = self.fss()[alive], self.pearson()[alive], self.latent_change()[alive]
        moved, mass = s["moved"].sum(), (s["clean"] + s["noisy"]).sum()
        varying = r[np.isfinite(r)]
        return {
            "change": self.change(),
            "change_mean": _mean(change),
            "fss": float(np.median(fss)) if len(fss) else None,
            "fss_p5": float(np.quantile(fss, 0.05)) if len(fss) else None,
            "fss_pooled": float(100 * (1 - moved / mass)) if mass > 0 else None,
            "sci": _mean(varying),
            "sci_skipped": float(len(r) - len(varying)),
            "sci_token": self.cosine_sum / self.cosine_rows if self.cosine_rows else None,
            "jaccard": self.jaccard_sum / self.jaccard_rows if self.jaccard_rows else None,
            "flips": float(1000 * s["flips"].sum() / (n * len(s["flips"]))) if n else None,
            "flip_share": float(s["flipped"].sum() / moved) if moved > 0 else None,
        }


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.divide(a, b, out=np.full(len(a), np.nan), where=b > 0)


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def structure(z: Tensor, moved: Tensor, latents: np.ndarray) -> float | None:
    """Pearson's r between the correlations of all pairs of ``latents``, clean (N, F) and perturbed; latents that never vary are left out."""
    found = []
    parts = [codes[:, torch.from_numpy(latents).to(codes.device)] for codes in (z, moved)]
    varies = (parts[0].std(0) > 0) & (parts[1].std(0) > 0)
    for part in parts:
        centred = part[:, varies] - part[:, varies].mean(0)
        centred = centred / centred.norm(dim=0).clamp_min(1e-12)
        found.append((centred.t() @ centred).double().cpu().numpy())
    upper = np.triu_indices(len(found[0]), 1)
    a, b = (c[upper] for c in found)
    return float(np.corrcoef(a, b)[0, 1]) if len(a) > 1 and a.std() > 0 and b.std() > 0 else None


class Distributions:
    """Activations of ``which`` latents, clean (N, F) against perturbed: distances between the distributions, and histograms of the positive part."""

    def __init__(self, z: Tensor, moved: Tensor, which: np.ndarray, bins: int) -> None:
        self.which, self.bins = which, bins
        self.pairs = [tuple(codes[:, int(j)].cpu().numpy() for codes in (z, moved)) for j in which]
        sizes = [np.abs(a).mean() for a, _ in self.pairs]
        distances = [np.abs(np.sort(a) - np.sort(b)).mean() / s for (a, b), s in zip(self.pairs, sizes, strict=True) if s > 0]
        self.wasserstein = float(np.mean(distances)) if distances else None
        self.zero_mass = float(np.mean([(b == 0).mean() - (a == 0).mean() for a, b in self.pairs])) if self.pairs else None

    def arrays(self, fss: np.ndarray, shown: int) -> dict[str, np.ndarray]:
        """Histograms of ``shown`` latents from the 5th to the 95th percentile of FSS (F,), and of all in units of each one's mean positive value; a
        thousandth of the largest values, and those above four means, lie outside the bins.
        """
        order = self.which[np.argsort(fss[self.which], kind="stable")]
        picked = order[np.linspace(0.05 * (len(order) - 1), 0.95 * (len(order) - 1), min(shown, len(order))).round().astype(int)]
        place = {int(j): i for i, j in enumerate(self.which)}
        counts = np.zeros((len(picked), 2, self.bins), np.int64)
        edges, zeros = np.zeros((len(picked), self.bins + 1)), np.zeros((len(picked), 2))
        for i, j in enumerate(picked):
            pair = self.pairs[place[int(j)]]
            edges[i] = _edges(np.concatenate(pair), self.bins)
            for k, values in enumerate(pair):
                counts[i, k] = np.histogram(values[values != 0], edges[i])[0]
                zeros[i, k] = (values == 0).mean()
        whole, all_edges = np.zeros((2, self.bins), np.int64), np.linspace(0, 4, self.bins + 1)
        for a, b in self.pairs:
            scale = np.abs(a[a != 0]).mean() if (a != 0).any() else 0
            for k, values in enumerate((a, b)):
                if scale > 0:
                    whole[k] += np.histogram(np.abs(values[values != 0]) / scale, all_edges)[0]
        return {
            "rob_hist_latents": picked, "rob_hist_fss": fss[picked], "rob_hist_counts": counts, "rob_hist_edges": edges, "rob_hist_zeros": zeros,
            "rob_hist_all": whole, "rob_hist_all_edges": all_edges,
        }  # fmt: skip


def _edges(values: np.ndarray, bins: int) -> np.ndarray:
    """Bins from 0 (or the least value) to the 99.9 % quantile; some width also where the values are constant."""
    on = values[values != 0]
    low, high = (min(float(on.min()), 0.0), float(np.quantile(on, 0.999))) if len(on) else (0.0, 1.0)
    return np.linspace(low, high if high > low else low + 1, bins + 1)

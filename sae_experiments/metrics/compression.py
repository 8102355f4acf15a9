"""What a sparse code costs to send: bits a character for its support and its quantised values, against what it still rebuilds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy import sparse
from scipy.special import gammaln

from sae_experiments.metrics.base import Bench, Measured, MetricInfo
from sae_experiments.metrics.codes import NOT_FINITE, nulls, raw_rows, sparse_codes
from sae_experiments.metrics.levels.paths import levels_of, only
from sae_experiments.metrics.rate_distortion import (
    Decode,
    Rated,
    Window,
    bits_at,
    effect_sizes,
    rise,
    strongest,
    windows_of,
)

INFO = [
    MetricInfo(
        name="code_bits",
        title="code length",
        formula="support + value bits at the coarsest quantiser whose FVU stays within the tolerance of the unquantised one's",
        unit="bit/char",
        better="down",
    ),
    MetricInfo(
        name="code_support_bits",
        title="support",
        formula="cross-entropy of which latents fire, with frequencies from other rows",
        unit="bit/char",
        better="down",
        shown=False,
    ),
    MetricInfo(
        name="code_support_bits_uniform",
        title="support (uniform)",
        formula="mean log2 C(m, L0) + log2 m",
        unit="bit/char",
        better="down",
        shown=False,
    ),
    MetricInfo(
        name="code_support_bits_bernoulli",
        title="support (Bernoulli)",
        formula="sum_j h2(f_j)",
        unit="bit/char",
        better="down",
        shown=False,
    ),
    MetricInfo(
        name="code_value_bits",
        title="values",
        formula="sum_j f_j times the cross-entropy of j's bin, with add-1/2 histograms from other rows",
        unit="bit/char",
        better="down",
        shown=False,
    ),
    MetricInfo(
        name="code_step",
        title="step",
        formula="width of a bin in root mean squares of the latent",
        unit="",
        better="none",
        shown=False,
    ),
    MetricInfo(
        name="code_fvu",
        title="coded FVU",
        formula="FVU of the dequantised code",
        unit="",
        better="down",
        shown=False,
    ),
    MetricInfo(
        name="code_bits_pca",
        title="code length (PCA)",
        formula="rate at the same FVU of Gaussian components, reverse water-filling: sum 1/2 log2 max(1, lambda_i/theta)",
        unit="bit/char",
        better="none",
        shown=False,
    ),
    MetricInfo(
        name="code_bits_dense",
        title="code length (dense)",
        formula="per-dimension entropy of the activation quantised uniformly to the same FVU",
        unit="bit/char",
        better="none",
        shown=False,
    ),
    MetricInfo(
        name="code_bits_alphabet",
        title="alphabet",
        formula="log2 of the number of symbols",
        unit="bit/char",
        better="none",
        shown=False,
    ),
    MetricInfo(
        name="code_bits_ce",
        title="code length (CE)",
        formula="support + value bits at the coarsest quantiser whose delta CE stays within the tolerance of the unquantised one's",
        unit="bit/char",
        better="down",
        shown=False,
    ),
    MetricInfo(
        name="code_ce_delta_bits",
        title="coded delta CE",
        formula="delta CE of that code",
        unit="bit/char",
        better="down",
        shown=False,
    ),
    *(
        MetricInfo(
            name=f"bits_per_char{suffix}",
            title=f"rate{words} at matched delta CE",
            formula=f"least bits a character{of} over quantisers and entries kept, whose delta CE is the limit; interpolated",
            unit="bit/char",
            better="down",
            shown=not suffix,
        )
        for suffix, words, of in (
            ("", "", ""),
            ("_bottom", " below", " of the bottom alone"),
            ("_top", " above", " of the top alone"),
        )
    ),
]


#: FVU by which float32 arithmetic alone can miss the tolerance of a code that is exact.
ROUNDING = 1e-9


class Point(NamedTuple):
    """One point of the rate-distortion curve."""

    step: float
    value_bits: float
    fvu: float


def measure(
    bench: Bench, *, rows: int | None, entries: int, steps: Sequence[float], tolerance: float, block: int, keep: Sequence[float], limit: float, windows: int,
    batch: int,
) -> Measured:  # fmt: skip
    """Code lengths on every second block of rows with statistics of the others, and the curve over quantiser ``steps``.

    Ayonrinde et al. 2024 (arXiv 2410.11179), but with honest (held-out) statistics and bins on the non-zero values only. A decoder that
    gets anything past the code (a skip connection) is charged for the code alone. With a language model also the rise of its cross-entropy
    over ``windows`` windows: at every step, and with each share in ``keep`` of a row's entries kept (those that move the reconstruction
    most); at most about ``entries`` active entries are looked at, fewer rows for denser codes. ``bits_per_char`` is the rate at which the rise
    is ``limit``, of the whole code and of each level by itself. Where no step comes within the tolerance, what depends on it is null.
    """
    steps = sorted(steps, reverse=True)  # coarsest first
    codes = sparse_codes(bench, rows)
    if codes is not None and codes.nnz > entries:
        codes = codes[
            : max(round(entries / codes.nnz * codes.shape[0]) // (2 * block), 1) * 2 * block
        ]
    y = None if codes is None else _targets(bench, codes.shape[0])
    if codes is None or not np.isfinite(y).all():
        return nulls(INFO, NOT_FINITE)
    test = np.arange(codes.shape[0]) // block % 2 == 1
    if not test.any() or not codes.nnz:
        return nulls(
            INFO,
            "no latent fires" if test.any() else f"{len(test)} rows make fewer than two blocks",
        )
    train, code, y = codes[~test], codes[test], y[test]
    variance = float(np.square(y - y.mean(0)).sum())
    if not variance > 1e-12 * len(y):
        return nulls(INFO, "the held-out rows do not vary")
    direct = _direct(bench, test)
    exact = _fvu(bench, code, y, variance, direct)
    curve = [_point(bench, train, code, y, variance, direct, step) for step in steps]
    support = support_bits(train, code)
    best = next((p for p in curve if p.fvu <= (1 + tolerance) * exact + ROUNDING), None)
    values = support | chosen(best, support["code_support_bits"], y, len(bench.symbols))
    why = {name: _why(name, best) for name, value in values.items() if value is None}
    if best is None:
        least = min(curve, key=lambda p: p.fvu)
        reason = f"the finest steps (best {least.step:g}) give FVU {least.fvu:.4g}, more than {tolerance:.0%} above {exact:.4g}"
        why |= dict.fromkeys(
            why.keys() - {"code_bits_alphabet"}, f"{reason}: add finer metric.compression.steps"
        )
    arrays = {
        f"code_curve_{name}": np.array([getattr(p, name) for p in curve])
        for name in ("step", "value_bits", "fvu")
    }
    arrays |= {"code_curve_bits": arrays["code_curve_value_bits"] + support["code_support_bits"]}
    found = _rated(bench, train, code, test, direct, steps, tolerance, keep, limit, windows, batch)
    return Measured(
        {i.name: (values | found.scalars).get(i.name) for i in INFO},
        arrays | found.arrays,
        why | found.why_null,
    )


def _rated(
    bench: Bench, train: sparse.csr_matrix, code: sparse.csr_matrix, test: np.ndarray, direct: np.ndarray | None, steps: Sequence[float],
    tolerance: float, keep: Sequence[float], limit: float, windows: int, batch: int,
) -> Measured:  # fmt: skip
    """What the language model makes of the coded activations: the metrics from ``code_bits_ce`` on, and the curves."""
    names = [
        "code_bits_ce",
        "code_ce_delta_bits",
        "bits_per_char",
        "bits_per_char_bottom",
        "bits_per_char_top",
    ]
    window = windows_of(bench, test, windows, batch)
    if window is None:
        return Measured(
            {},
            why_null=dict.fromkeys(
                names, "there is no language model, or no whole window to test it on"
            ),
        )
    sae, values, why, arrays = bench.sae, {}, {}, {"code_ce_limit": np.array(limit)}
    parts: dict[str, tuple[np.ndarray, Decode]] = {"": (np.arange(code.shape[1]), sae.decode)}
    for name, members in levels_of(sae).items() if len(levels_of(sae)) > 1 else ():
        parts[f"_{name}"] = members, lambda acts, name=name: only(sae, acts, name)
    for suffix, (members, decode) in parts.items():
        kept = np.zeros(code.shape[1], np.float32)
        kept[members] = 1
        pair = (
            [train, code]
            if not suffix
            else [(m @ sparse.diags(kept)).tocsr() for m in (train, code)]
        )
        points = _points(
            bench, window, pair, decode, direct, steps, keep if not suffix else [1.0], batch
        )
        arrays |= {
            f"code_ce{suffix}_{name}": np.array([getattr(p, name) for p in points])
            for name in Rated._fields
        }
        values[f"bits_per_char{suffix}"] = bits_at(points, limit)
        if values[f"bits_per_char{suffix}"] is None:
            why[f"bits_per_char{suffix}"] = (
                f"delta CE goes from {min(p.ce for p in points):.3g} to {max(p.ce for p in points):.3g}, not past {limit}"
            )
        if not suffix:
            exact = rise(bench, window, code, decode, direct, batch)
            whole = [p for p in points if p.keep == 1]
            best = next((p for p in whole if p.ce <= exact + tolerance * abs(exact)), None)
            values |= {"code_bits_ce": best and best.bits, "code_ce_delta_bits": best and best.ce}
            if best is None:
                reason = f"no step brings delta CE within {tolerance:.0%} of {exact:.3g}: add finer metric.compression.steps"
                why |= dict.fromkeys(("code_bits_ce", "code_ce_delta_bits"), reason)
    return Measured(
        values, arrays, why | {n: "the SAE has one level" for n in names if n not in values}
    )


def _points(
    bench: Bench, window: Window, pair: Sequence[sparse.csr_matrix], decode: Decode, direct: np.ndarray | None, steps: Sequence[float],
    keep: Sequence[float], batch: int,
) -> list[Rated]:  # fmt: skip
    """A point for each share kept and each step."""
    effect, found = effect_sizes(bench, pair[0], decode), []
    for share in sorted({*keep, 1.0}):
        train, code = (strongest(m, share, effect) for m in pair)
        support = support_bits(train, code)["code_support_bits"]
        for step in steps:
            bits, rebuilt = quantised(train, code, step)
            found.append(
                Rated(
                    share, step, support + bits, rise(bench, window, rebuilt, decode, direct, batch)
                )
            )
    return found


def chosen(
    best: Point | None, support_bits: float, y: np.ndarray, symbols: int
) -> dict[str, float | None]:
    """What the chosen quantiser costs, and other codes of the same FVU; None for all of it where no quantiser is fine enough."""
    if best is None:
        names = (
            "code_bits",
            "code_value_bits",
            "code_step",
            "code_fvu",
            "code_bits_pca",
            "code_bits_dense",
        )
        return dict.fromkeys(names, None) | {
            "code_bits_alphabet": math.log2(symbols) if symbols else None
        }
    own = {"code_bits": support_bits + best.value_bits, "code_value_bits": best.value_bits}
    return own | {"code_step": best.step, "code_fvu": best.fvu} | landmarks(y, best.fvu, symbols)


def _why(name: str, best: Point | None) -> str:
    if name == "code_bits_alphabet":
        return "there is no text"
    return f"no code is needed for FVU {best.fvu:.3g}" if best and best.fvu >= 1 else "the FVU is 0"


def support_bits(train: sparse.csr_matrix, test: sparse.csr_matrix) -> dict[str, float]:
    """Bits a row to say which latents are active: three codes, the adaptive one with add-1/2 frequencies from ``train``."""
    m, n = test.shape[1], test.shape[0]
    active = np.diff(test.indptr).astype(np.float64)
    uniform = float(
        (gammaln(m + 1) - gammaln(active + 1) - gammaln(m - active + 1)).mean() / math.log(2)
    ) + math.log2(m)
    f = np.diff(test.tocsc().indptr) / n
    p = (np.diff(train.tocsc().indptr) + 0.5) / (train.shape[0] + 1)
    inside = (f > 0) & (f < 1)
    bernoulli = float(
        -(f[inside] * np.log2(f[inside]) + (1 - f[inside]) * np.log2(1 - f[inside])).sum()
    )
    adaptive = float(-(f * np.log2(p) + (1 - f) * np.log2(1 - p)).sum())
    return {
        "code_support_bits": adaptive,
        "code_support_bits_uniform": uniform,
        "code_support_bits_bernoulli": bernoulli,
    }


def _point(
    bench: Bench,
    train: sparse.csr_matrix,
    code: sparse.csr_matrix,
    y: np.ndarray,
    variance: float,
    direct,
    step: float,
) -> Point:
    bits, rebuilt = quantised(train, code, step)
    return Point(step, bits, _fvu(bench, rebuilt, y, variance, direct))


def quantised(
    train: sparse.csr_matrix, test: sparse.csr_matrix, step: float
) -> tuple[float, sparse.csr_matrix]:
    """Value bits a row of ``test``, and its code with every value at the middle of its bin.

    Bins of ``step`` times the latent's root mean square, counted on ``train``; a bin's probability is (count + 1/2) / (n + K/2) over the
    K bins between the latent's smallest and largest. The middle is the mean of the training values in the bin, where there are any.
    """
    columns = [m.tocsc() for m in (train, test)]
    latent = [np.repeat(np.arange(m.shape[1]), np.diff(m.indptr)) for m in columns]
    counts = np.bincount(latent[0], minlength=train.shape[1])
    squares = np.bincount(latent[0], columns[0].data.astype(np.float64) ** 2, train.shape[1])
    width = np.where(counts > 0, np.sqrt(squares / np.maximum(counts, 1)), 1.0) * step
    width[width == 0] = step
    bins = [
        np.floor(m.data / width[j]).astype(np.int64).clip(-(1 << 20), 1 << 20)
        for m, j in zip(columns, latent, strict=True)
    ]
    span = np.zeros(
        (2, train.shape[1]), np.int64
    )  # lowest and highest bin of every latent, in either part: the alphabet is agreed on
    for b, j in zip(bins, latent, strict=True):
        np.minimum.at(span[0], j, b)
        np.maximum.at(span[1], j, b)
    sizes = span[1] - span[0] + 1
    keys = [j * (1 << 22) + (b + (1 << 20)) for b, j in zip(bins, latent, strict=True)]
    known, inverse, seen = np.unique(keys[0], return_inverse=True, return_counts=True)
    centre = (
        np.bincount(inverse, columns[0].data, len(known)) / np.maximum(seen, 1)
        if len(known)
        else np.zeros(0)
    )
    at = np.searchsorted(known, keys[1]).clip(max=max(len(known) - 1, 0))
    hit = known[at] == keys[1] if len(known) else np.zeros(len(keys[1]), bool)
    j = latent[1]
    probability = (np.where(hit, seen[at] if len(known) else 0, 0) + 0.5) / (
        counts[j] + sizes[j] / 2
    )
    values = np.where(hit, centre[at] if len(known) else 0, (bins[1] + 0.5) * width[j]).astype(
        np.float32
    )
    rebuilt = sparse.csc_matrix(
        (values, columns[1].indices, columns[1].indptr), shape=test.shape
    ).tocsr()
    return max(float(-np.log2(probability).sum() / test.shape[0]), 0.0), rebuilt


def landmarks(y: np.ndarray, fvu: float, symbols: int) -> dict[str, float | None]:
    """What other codes need for the same FVU: Gaussian principal components, the dense activation, one character."""
    alphabet = math.log2(symbols) if symbols else None
    if not 0 < fvu < 1:
        return {"code_bits_pca": None, "code_bits_dense": None, "code_bits_alphabet": alphabet}
    centred = y.astype(np.float64) - y.mean(0, dtype=np.float64)
    spectrum = np.linalg.eigvalsh(centred.T @ centred / len(y)).clip(min=0)
    return {
        "code_bits_pca": water_filling(spectrum, fvu),
        "code_bits_dense": _dense_bits(centred, fvu),
        "code_bits_alphabet": alphabet,
    }


def water_filling(spectrum: np.ndarray, fvu: float) -> float:
    """``sum_i 1/2 log2 max(1, lambda_i / theta)`` with theta such that ``sum_i min(lambda_i, theta) = fvu sum_i lambda_i``."""
    ordered = np.sort(spectrum)
    below, left = np.concatenate([[0.0], np.cumsum(ordered)[:-1]]), np.arange(len(ordered), 0, -1)
    levels = (fvu * ordered.sum() - below) / left
    theta = levels[np.flatnonzero(levels <= ordered)[0]]
    return float(0.5 * np.log2(np.maximum(1, ordered / theta)).sum())


def _dense_bits(centred: np.ndarray, fvu: float) -> float:
    """Entropy of all dimensions after one uniform quantiser whose error is step^2/12 a dimension, kept below each one's variance."""
    target, variances = fvu * float(np.square(centred).sum() / len(centred)), centred.var(0)
    low, high = 0.0, float(np.sqrt(12 * variances.max())) + 1e-30
    for _ in range(60):
        step = (low + high) / 2
        low, high = (
            (step, high) if np.minimum(step * step / 12, variances).sum() < target else (low, step)
        )
    bits = 0.0
    for column, variance in zip(centred.T, variances, strict=True):
        if variance > step * step / 12:
            counts = np.unique(np.round(column / step), return_counts=True)[1]
            p = counts / len(column)
            bits -= float((p * np.log2(p)).sum())
    return bits


@torch.no_grad()
def _fvu(
    bench: Bench, code: sparse.csr_matrix, y: np.ndarray, variance: float, direct: np.ndarray | None
) -> float:
    error = 0.0
    for begin in range(0, len(y), 4096):
        part = slice(begin, begin + 4096)
        recon = (
            bench.sae.decode(torch.from_numpy(code[part].toarray()).to(bench.device)).cpu().numpy()
        )
        error += float(
            np.square(
                y[part] - recon - (0 if direct is None else direct[part]), dtype=np.float64
            ).sum()
        )
    return error / variance


@torch.no_grad()
def _direct(bench: Bench, test: np.ndarray) -> np.ndarray | None:
    """What the reconstruction gets past the code, (n, O); None for nothing."""
    if bench.sae.linear_path(torch.zeros(1, bench.sae.d_in, device=bench.device)) is None:
        return None
    return (
        bench.sae.linear_path(torch.from_numpy(raw_rows(bench, len(test))[test]).to(bench.device))
        .cpu()
        .numpy()
    )


def _targets(bench: Bench, n: int) -> np.ndarray:
    if bench.held_out is None:
        return (bench.x if bench.y is None else bench.y)[:n].cpu().numpy()
    return bench.held_out.rows(bench.write, slice(0, n)).numpy()

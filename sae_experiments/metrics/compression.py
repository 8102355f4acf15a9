"""Code length of an SAE: bits to send its sparse code, against what the code still reconstructs.

Ayonrinde et al. 2024 (arXiv 2410.11179), but with held-out statistics, and with bins for non-zero
values only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from sae_experiments.metrics.base import EvalContext, Measured, MetricInfo
from sae_experiments.metrics.codes import (
    NOT_FINITE,
    decoded,
    nulls,
    ordinary_rows,
    raw_rows,
    sparse_codes,
)
from sae_experiments.metrics.coding import Quantiser, landmarks, support_bits
from sae_experiments.metrics.levels.paths import ONE_LEVEL, levels_of, only
from sae_experiments.metrics.rate_distortion import (
    Decode,
    Direct,
    Rated,
    Window,
    bits_at,
    effect_sizes,
    rise,
    strongest,
    windows_of,
)
from sae_experiments.saes.types import RESOLUTION

FVU_INFO = [
    MetricInfo(
        name="code_bits",
        title="code length",
        formula=(
            "support + value bits at the coarsest quantiser whose FVU stays within the tolerance "
            "of the unquantised one's"
        ),
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
        formula=(
            "sum_j f_j times the cross-entropy of j's bin, with add-1/2 histograms from other rows"
        ),
        unit="bit/char",
        better="down",
        shown=False,
    ),
    MetricInfo(
        name="code_step",
        title="step",
        formula="width of a bin in root mean squares of the latent",
        better="none",
        shown=False,
    ),
    MetricInfo(
        name="code_fvu",
        title="coded FVU",
        formula="FVU of the dequantised code",
        better="down",
        shown=False,
    ),
    MetricInfo(
        name="code_bits_pca",
        title="code length (PCA)",
        formula=(
            "rate at the same FVU of Gaussian components, reverse water-filling: "
            "sum 1/2 log2 max(1, lambda_i/theta)"
        ),
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
]


def _rate_info(suffix: str, where: str, code: str) -> MetricInfo:
    return MetricInfo(
        name=f"bits_per_char{suffix}",
        title=f"rate{where} at matched delta CE",
        formula=(
            f"least bits a character{code} over quantisers and entries kept, whose delta CE is "
            "the limit; interpolated"
        ),
        unit="bit/char",
        better="down",
        shown=not suffix,
    )


CE_INFO = [
    MetricInfo(
        name="code_bits_ce",
        title="code length (CE)",
        formula=(
            "support + value bits at the coarsest quantiser whose delta CE stays within the "
            "tolerance of the unquantised one's"
        ),
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
    _rate_info("", "", ""),
    _rate_info("_bottom", " below", " of the bottom alone"),
    _rate_info("_top", " above", " of the top alone"),
]
INFO = [*FVU_INFO, *CE_INFO]

#: FVU by which float32 arithmetic alone can miss the tolerance of a code that is exact.
ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the metric."""

    rows: int | None
    """Number of held-out rows, from the first on; None for all. Half of them give statistics."""
    entries: int
    """Number of active entries evaluated, roughly; denser codes are evaluated on fewer rows."""
    steps: Sequence[float]
    """Bin widths of the quantisers, in root mean squares of a latent."""
    tolerance: float
    """Relative increase of the FVU, and of the loss, that the chosen quantisers may cause."""
    block: int
    """Rows that stay together when the rows are split."""
    keep: Sequence[float]
    """Shares of each row's entries that are sent, for the curve of the loss; 1 is always tried."""
    limit: float
    """Rise of the cross-entropy at which SAEs are compared by their rate, in bits per character."""
    windows: int
    """Held-out windows on which the language model is evaluated."""
    batch: int
    """Windows per forward pass."""


class Point(NamedTuple):
    """One point of the rate-distortion curve."""

    step: float
    """Bin width in root mean squares of a latent."""
    value_bits: float
    """Bits per row for the values."""
    fvu: float
    """FVU of the reconstruction from the quantised code."""


class _Quantised(NamedTuple):
    """A quantised code."""

    step: float
    """Bin width in root mean squares of a latent."""
    value_bits: float
    """Bits per row for the values."""
    code: sparse.csr_matrix
    """The code as the receiver knows it, (n, F)."""


class _Split(NamedTuple):
    """Codes of alternate blocks of rows."""

    ctx: EvalContext
    """Evaluation context."""
    train: sparse.csr_matrix
    """Codes that give the statistics, (n_train, F)."""
    code: sparse.csr_matrix
    """Codes to be sent, (n, F)."""
    test: np.ndarray
    """Mask of the rows of `code` among all rows."""
    direct: Direct | None
    """Part of the reconstruction that bypasses the code, if any."""
    ordinary: np.ndarray
    """Mask of the rows of `code` that are not outliers, (n,); the FVU is taken over these."""


def measure(ctx: EvalContext, **options: Any) -> Measured:
    """Code lengths of every second block of rows, with statistics from the other blocks.

    Evaluates a curve over quantisers. The code length is that of the coarsest quantiser within the
    tolerance; where none is, all that depends on it is null. A decoder that gets anything past the
    code (a skip connection) is charged for the code alone. The FVU is that of the rows that the fit
    did not leave out as outliers.

    With a language model also evaluates the rise of its cross-entropy, for every quantiser and for
    every share in `keep` of the entries that move the reconstruction most. `bits_per_char` is the
    rate at which the rise is `limit`, for the whole code and for each level by itself.

    Args:
        ctx: Evaluation context.
        **options: Fields of `Options`.
    """
    opts = Options(**options)
    codes = sparse_codes(ctx, opts.rows)
    if codes is None:
        return nulls(INFO, NOT_FINITE)
    n = _n_evaluated(ctx, codes, opts)
    codes = codes[:n]
    y = ctx.targets(slice(0, n)).cpu().numpy()
    if not np.isfinite(y).all():
        return nulls(INFO, NOT_FINITE)
    test = np.arange(n) // opts.block % 2 == 1
    if not test.any():
        return nulls(INFO, f"{n} rows make fewer than two blocks")
    if not codes.nnz:
        return nulls(INFO, "no latent fires")
    ordinary = ordinary_rows(ctx, n)[test]
    split = _Split(ctx, codes[~test], codes[test], test, _direct(ctx, test), ordinary)
    y = y[test]
    centred = y[ordinary] - y[ordinary].mean(0) if ordinary.any() else y[:0]
    variance = float(np.square(centred).sum())
    if not variance > RESOLUTION**2 * float(np.square(y, dtype=np.float64).sum()):
        return nulls(INFO, "the held-out rows do not vary")
    quantised = _quantised(Quantiser(split.train, split.code), opts)
    by_fvu = _by_fvu(split, quantised, y, variance, opts)
    by_ce = _by_ce(split, quantised, opts)
    values = by_fvu.scalars | by_ce.scalars
    return Measured(
        {info.name: values[info.name] for info in INFO},
        by_fvu.arrays | by_ce.arrays,
        by_fvu.why_null | by_ce.why_null,
    )


def _quantised(quantiser: Quantiser, opts: Options) -> list[_Quantised]:
    """The code at every step, coarsest first."""
    steps = sorted(opts.steps, reverse=True)
    return [_Quantised(step, *quantiser.at(step)) for step in steps]


def _n_evaluated(ctx: EvalContext, codes: sparse.csr_matrix, opts: Options) -> int:
    """Number of rows evaluated: fewer, in whole pairs of blocks, for a dense code."""
    n = ctx.n_used(opts.rows)
    if codes.nnz <= opts.entries:
        return n
    pair = 2 * opts.block
    affordable = round(opts.entries / codes.nnz * n)
    return min(max(affordable // pair, 1) * pair, n)


@torch.no_grad()
def _direct(ctx: EvalContext, test: np.ndarray) -> Direct | None:
    """Part of the test rows' reconstruction that bypasses the code; None if there is none.

    Args:
        ctx: Evaluation context.
        test: Mask of the test rows among the evaluated rows, (N,).
    """
    sae = ctx.sae
    if sae.linear_path(torch.zeros(1, sae.d_in, device=ctx.device)) is None:
        return None
    x = torch.from_numpy(raw_rows(ctx, len(test))[test]).to(ctx.device)
    added, scale = sae.linear_path(x), sae.output_scale(x)
    return None if added is None else Direct(added.cpu(), None if scale is None else scale.cpu())


# ------------------------------------------------------------------------------- at a matched FVU


def _by_fvu(
    split: _Split,
    quantised: Sequence[_Quantised],
    y: np.ndarray,
    variance: float,
    opts: Options,
) -> Measured:
    """Metrics of `FVU_INFO`, and the curve of the FVU.

    Args:
        split: Codes.
        quantised: The code at every step.
        y: Targets of the rows to be sent, (n, O).
        variance: Sum of squared distances of the ordinary rows from their mean.
        opts: Options of the metric.
    """
    exact = _fvu(split, split.code, y, variance)
    curve = [Point(q.step, q.value_bits, _fvu(split, q.code, y, variance)) for q in quantised]
    limit = (1 + opts.tolerance) * exact + ROUNDING
    within = [point for point in curve if point.fvu <= limit]
    coarsest = within[0] if within else None
    support = support_bits(split.train, split.code)
    symbols = split.ctx.vocabulary
    values = support | chosen(coarsest, support["code_support_bits"], y, symbols)
    null = [name for name, value in values.items() if value is None]
    why_null = {name: _why(name, coarsest) for name in null}
    if coarsest is None:
        best = min(curve, key=lambda point: point.fvu)
        reason = (
            f"the finest steps (best {best.step:g}) give FVU {best.fvu:.4g}, more than "
            f"{opts.tolerance:.0%} above {exact:.4g}: add finer metric.compression.steps"
        )
        why_null |= {name: reason for name in null if name != "code_bits_alphabet"}
    arrays = {
        f"code_curve_{name}": np.array([getattr(point, name) for point in curve])
        for name in Point._fields
    }
    arrays["code_curve_bits"] = arrays["code_curve_value_bits"] + support["code_support_bits"]
    return Measured(values, arrays, why_null)


@torch.no_grad()
def _fvu(split: _Split, code: sparse.csr_matrix, y: np.ndarray, variance: float) -> float:
    """FVU of the ordinary rows of targets y (n, O), rebuilt from a code (n, F)."""
    ctx = split.ctx
    error = 0.0
    for begin in range(0, len(y), 4096):
        part = slice(begin, begin + 4096)
        recon = decoded(ctx.sae, code[part])
        if split.direct is not None:
            recon = split.direct.scaled(recon, part)
        residual = y[part] - recon.cpu().numpy()
        if split.direct is not None:
            residual = residual - split.direct.added[part].numpy()
        residual = residual[split.ordinary[part]]
        error += float(np.square(residual, dtype=np.float64).sum())
    return error / variance


def chosen(
    best: Point | None, support_bits: float, y: np.ndarray, symbols: int
) -> dict[str, float | None]:
    """Cost of the chosen quantiser, and of other codes at the same FVU.

    Args:
        best: The chosen quantiser; None if none is fine enough.
        support_bits: Bits per row for the support.
        y: Targets (n, O).
        symbols: Number of symbols of the text; 0 without text.

    Returns:
        Values by metric name, None for all that depend on the quantiser if there is none.
    """
    if best is None:
        return {
            "code_bits": None,
            "code_value_bits": None,
            "code_step": None,
            "code_fvu": None,
            "code_bits_pca": None,
            "code_bits_dense": None,
            "code_bits_alphabet": math.log2(symbols) if symbols else None,
        }
    own = {
        "code_bits": support_bits + best.value_bits,
        "code_value_bits": best.value_bits,
        "code_step": best.step,
        "code_fvu": best.fvu,
    }
    return own | landmarks(y, best.fvu, symbols)


def _why(name: str, best: Point | None) -> str:
    """The reason why a metric is None although a quantiser is fine enough."""
    if name == "code_bits_alphabet":
        return "there is no text"
    if best is not None and best.fvu >= 1:
        return f"no code is needed for FVU {best.fvu:.3g}"
    return "the FVU is 0"


# ------------------------------------------------------------------------------ at a matched loss


def _by_ce(split: _Split, quantised: Sequence[_Quantised], opts: Options) -> Measured:
    """Metrics of `CE_INFO`, and the curves of the cross-entropy.

    Args:
        split: Codes.
        quantised: The whole code at every step.
        opts: Options of the metric.
    """
    window = windows_of(split.ctx, split.test, opts.windows, opts.batch)
    if window is None:
        return nulls(CE_INFO, "there is no language model, or no whole window to test it on")
    sae = split.ctx.sae

    def whole(codes: sparse.csr_matrix) -> Tensor:
        return decoded(sae, codes)

    points = _points(split, window, whole, opts.keep, opts, quantised)
    exact = rise(
        split.ctx,
        window,
        split.code,
        whole,
        split.direct,
        opts.batch,
    )
    values, why_null, arrays = _at_limit("", points, opts.limit)
    arrays = {"code_ce_limit": np.array(opts.limit)} | arrays
    within = [p for p in points if p.keep == 1 and p.ce <= exact + opts.tolerance * abs(exact)]
    values["code_bits_ce"] = within[0].bits if within else None
    values["code_ce_delta_bits"] = within[0].ce if within else None
    if not within:
        reason = (
            f"no step brings delta CE within {opts.tolerance:.0%} of {exact:.3g}: "
            "add finer metric.compression.steps"
        )
        why_null |= {"code_bits_ce": reason, "code_ce_delta_bits": reason}
    levels = levels_of(sae)
    if len(levels) == 1:
        why_null |= {"bits_per_char_bottom": ONE_LEVEL, "bits_per_char_top": ONE_LEVEL}
        values |= {"bits_per_char_bottom": None, "bits_per_char_top": None}
        return Measured(values, arrays, why_null)
    for level, members in levels.items():
        part = _only_members(split, members)

        def one_level(codes: sparse.csr_matrix, level: str = level) -> Tensor:
            return only(sae, torch.from_numpy(codes.toarray()).to(split.ctx.device), level)

        points = _points(part, window, one_level, (), opts)
        level_values, level_why, level_arrays = _at_limit(f"_{level}", points, opts.limit)
        values |= level_values
        why_null |= level_why
        arrays |= level_arrays
    return Measured(values, arrays, why_null)


def _only_members(split: _Split, members: np.ndarray) -> _Split:
    """The same codes with all latents but `members` at zero."""
    kept = np.zeros(split.ctx.sae.d_sae, np.float32)
    kept[members] = 1
    diagonal = sparse.diags(kept)
    return split._replace(
        train=sparse.csr_matrix(split.train @ diagonal),
        code=sparse.csr_matrix(split.code @ diagonal),
    )


def _at_limit(
    suffix: str, points: Sequence[Rated], limit: float
) -> tuple[dict[str, float | None], dict[str, str], dict[str, np.ndarray]]:
    """Rate at the limit, the reason if it is None, and the curve.

    Args:
        suffix: End of the metric's name.
        points: Rates and rises of the cross-entropy.
        limit: Rise of the cross-entropy in bits per character.
    """
    name = f"bits_per_char{suffix}"
    bits = bits_at(points, limit)
    why_null = {}
    if bits is None:
        rises = [point.ce for point in points]
        why_null[name] = (
            f"delta CE goes from {min(rises):.3g} to {max(rises):.3g}, not past {limit}"
        )
    arrays = {
        f"code_ce{suffix}_{field}": np.array([getattr(point, field) for point in points])
        for field in Rated._fields
    }
    return {name: bits}, why_null, arrays


def _points(
    split: _Split,
    window: Window,
    decode: Decode,
    keep: Sequence[float],
    opts: Options,
    quantised: Sequence[_Quantised] | None = None,
) -> list[Rated]:
    """Rate and rise of the cross-entropy for each share of entries kept and each step.

    Args:
        split: Codes.
        window: Windows on which the language model is evaluated.
        decode: Decoder of the codes.
        keep: Shares of entries kept besides 1.
        opts: Options of the metric.
        quantised: The whole code at every step, if it is known.
    """
    effect = effect_sizes(split.train, decode)
    points = []
    for share in sorted({*keep, 1.0}):
        train = strongest(split.train, share, effect)
        code = strongest(split.code, share, effect)
        support = support_bits(train, code)["code_support_bits"]
        known = quantised if share == 1 else None
        for q in known or _quantised(Quantiser(train, code), opts):
            ce = rise(split.ctx, window, q.code, decode, split.direct, opts.batch)
            points.append(Rated(share, q.step, support + q.value_bits, ce))
    return points

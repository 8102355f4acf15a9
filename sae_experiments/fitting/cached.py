"""Fit several SAEs in one pass and keep them in the cache as one entry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from sae_experiments.cache import entry
from sae_experiments.files import read_json, write_bytes, write_json
from sae_experiments.fitting.fit import FitReport
from sae_experiments.saes.base import SAE
from sae_experiments.training.checkpoint import tensors_of

#: Reports of the fits in a cache entry; the weights are beside it as `<name>.safetensors`.
REPORTS = "fits.json"
CHECKPOINT = "checkpoint.safetensors"


def fit_cached(
    cache: Path,
    key: Mapping[str, Any],
    saes: Mapping[str, SAE],
    fit: Callable[[Path], Mapping[str, FitReport]],
) -> dict[str, tuple[SAE, FitReport]]:
    """Load SAEs from the cache, or fit them now.

    A fit that was cut short is used, but not kept as complete: the next run continues it from its
    checkpoint.

    Args:
        cache: Folder of the cache.
        key: Everything that determines the fits.
        saes: Untrained SAEs by name; their weights are replaced.
        fit: Fits the SAEs, with its checkpoint in the given file, and returns their reports.

    Returns:
        The SAEs, frozen and in eval mode, with the reports of their fits.
    """

    def make(part: Path) -> bool:
        checkpoint = part / CHECKPOINT
        reports = fit(checkpoint)
        for name, sae in saes.items():
            write_bytes(part / f"{name}.safetensors", tensors_of(sae))
        as_dicts = {name: report._asdict() for name, report in reports.items()}
        write_json(part / REPORTS, as_dicts)
        cut = any(report.cut for report in reports.values())
        if not cut:
            checkpoint.unlink(missing_ok=True)
        return not cut

    folder, was_there = entry(cache, "fits", dict(key), make)
    reports = read_json(folder / REPORTS)
    fitted = {}
    for name, sae in saes.items():
        device = str(next(sae.parameters()).device)
        sae.load_state_dict(load_file(folder / f"{name}.safetensors", device=device))
        sae.eval().requires_grad_(False)
        sae.fitted = True
        fitted[name] = sae, FitReport(**reports[name])._replace(from_cache=was_there)
    return fitted

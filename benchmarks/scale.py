"""Cost of sweeps: measurements of a run or sweep, and the arithmetic for larger ones.

    python benchmarks/scale.py runs/sweep_a --cache DIR
    python benchmarks/scale.py --model 4096 --rows 500e6

The first prints seconds by stage, bytes by kind, what is shared, and the cost of 1,000 jobs like
these; the second, bytes and operations for a model of that width.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from sae_experiments.files import sha256_file

SHARED = ("lm", "collect")  # made once for all jobs over one corpus, seed and site
GB = 1e9


def stages(folders: Iterable[Path]) -> dict[str, list[float]]:
    """Seconds by stage of every cell below `folders` (metrics as one stage)."""
    found: dict[str, list[float]] = defaultdict(list)
    for path in (p for folder in folders for p in folder.rglob("cells/*.json")):
        seconds = json.loads(path.read_text())["seconds"]
        found["metrics"].append(sum(s for name, s in seconds.items() if name.startswith("metric.")))
        for name in ("lm", "collect", "fit"):
            found[name].append(seconds[name])
    return found


def kinds(cache: Path) -> dict[str, tuple[int, int]]:
    """Entries and bytes of every kind in the cache."""
    found = {}
    for kind in sorted(p for p in cache.iterdir() if p.is_dir()):
        files = [p for p in kind.rglob("*") if p.is_file()]
        found[kind.name] = (
            len([p for p in kind.iterdir() if p.is_dir()]),
            sum(p.stat().st_size for p in files),
        )
    return found


def checking_rate(cache: Path) -> float:
    """Bytes per second at which the largest file of the cache is verified.

    By SHA-256, from the page cache if it fits there.
    """
    largest = max((p for p in cache.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    sha256_file(largest)
    began = time.perf_counter()
    sha256_file(largest)
    return largest.stat().st_size / (time.perf_counter() - began)


def report(folders: list[Path], cache: Path, n_jobs: int) -> None:
    """Print what was measured, and the same for `n_jobs` jobs over the same language model."""
    seconds = {name: statistics.mean(values) for name, values in stages(folders).items()}
    first = {
        "lm": seconds["lm"],
        "collect": max(stages(folders)["collect"]),
    }  # who comes later only opens and verifies the store
    print(
        f"{len(stages(folders)['fit'])} cells; mean seconds by stage: "
        + ", ".join(f"{k} {v:.1f}" for k, v in seconds.items())
    )
    sizes = kinds(cache)
    for kind, (entries, size) in sizes.items():
        print(f"  {kind:<10} {entries:>4} entries {size / 1e6:>10.1f} MB")
    rate = checking_rate(cache)
    store = sizes["stores"][1]
    print(f"verifying what is shared: {rate / 1e6:,.0f} MB/s, {store / rate:.2f} s a job")
    own = seconds["fit"] + seconds["metrics"] + store / rate
    alone, shared = n_jobs * (sum(first.values()) + own), sum(first.values()) + n_jobs * own
    print(
        f"{n_jobs:,} jobs: {shared / 3600:.1f} h of one core with the cache, {alone / 3600:.1f} h"
        f" without ({alone / shared:.1f} times as much)"
    )
    fit = sizes["fits"][1] / max(sizes["fits"][0], 1)
    print(
        f"  cache {(store + sizes['lms'][1] + n_jobs * fit) / GB:.2f} GB with sharing,"
        f" {n_jobs * (store + sizes['lms'][1] + fit) / GB:.1f} GB without"
    )


def arithmetic(
    width: int, rows: float, expansion: int, steps: int, batch: int, l0: int, n_sites: int
) -> None:
    """Print bytes and operations for activations of `width`: the store, one SAE, one fit."""
    d_sae = expansion * width
    weights = (2 * width * d_sae + width + d_sae) * 4
    print(
        f"width {width:,}, {rows:,.0f} rows, {d_sae:,} latents, {steps:,} steps of {batch:,} rows,"
        f" L0 {l0}"
    )
    print(f"  store: {rows * width * 2 * n_sites / GB:,.1f} GB in float16 for {n_sites} site(s)")
    print(
        f"  SAE: {weights / GB:,.2f} GB of float32 weights; training holds four times that"
        f" (gradient, two moments): {4 * weights / GB:,.2f} GB"
    )
    product = 2 * batch * width * d_sae
    dense = 5 * product  # encoder: forward, weights; decoder: forward, codes, weights
    sparse = (
        product + 4 * 2 * batch * l0 * width
    )  # the encoder must see every latent, the rest only those that fire
    print(
        f"  one step: {dense / 1e12:,.2f} TFLOP dense, {sparse / 1e12:,.2f} with sparse codes; a"
        f" fit: {dense * steps / 1e15:,.0f} or {sparse * steps / 1e15:,.0f} PFLOP"
    )
    print(
        f"  one fit reads {steps * batch * width * 2 * n_sites / GB:,.0f} GB, or"
        f" {batch * width * 2 * n_sites / 1e6:,.1f} MB per step"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path(os.environ.get("SAE_CACHE", "~/.cache/sae_experiments")).expanduser(),
    )
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--model", type=int, help="width of the activations of a larger model")
    parser.add_argument("--rows", type=float, default=500e6)
    parser.add_argument("--expansion", type=int, default=8)
    parser.add_argument("--steps", type=int, default=122_070)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--l0", type=int, default=64)
    parser.add_argument("--sites", type=int, default=1)
    asked = parser.parse_args()
    if asked.folders:
        report(asked.folders, asked.cache, asked.jobs)
    if asked.model:
        arithmetic(
            asked.model,
            asked.rows,
            asked.expansion,
            asked.steps,
            asked.batch,
            asked.l0,
            asked.sites,
        )


if __name__ == "__main__":
    main()

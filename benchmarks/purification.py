"""Cost of purification: seconds per step and peak memory, against the same SAE without it.

    python benchmarks/purification.py
    python benchmarks/purification.py --d_in 384 --d_sae 3072

The first has the sizes of the laptop preset (width 128, 1,024 latents, 4,096 rows per step), the
second those of the full preset.

All SAEs take turns step by step on the same synthetic batches in one process, so that other load
affects them alike. It prints the median over the rounds of each round's ratio, and the range. Every
step is perturbed (in a fit the first tenth is not). Memory is the rise of the peak when one of them
is trained in a process of its own (Linux).
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from sae_experiments.api import build_sae, fit_saes

KINDS = {
    "host": {"model__eps": 0.0},
    "shared pool": {},
    "explicit encodes": {"model__pool": 0},
    "explicit, all kinds": {
        "model__pool": 0,
        "model__weights__targeted": 0.1,
        "model__mixture__gaussian": 0.4,
        "model__mixture__covariance": 0.2,
        "model__mixture__targeted": 0.3,
        "model__mixture__fgsm": 0.1,
    },
    "shared pool, all rows": {"model__row_frac": 1.0},
}


def make(kind: str, host: str, d_in: int, d_sae: int, l0: float):
    """An untrained SAE.

    `sae/host` cannot be set by keyword, so the default host stands for all.
    """
    settings = {
        "d_sae": d_sae,
        "target_l0": l0,
        "model__clean_frac": 0.0,
        "model__warmup_frac": 0.0,
        **KINDS[kind],
    }
    return build_sae(
        "purified" if kind != "host" else host,
        d_in,
        **({"d_sae": d_sae, "target_l0": l0} if kind == "host" else settings),
    )


def rows(n: int, d_in: int) -> torch.Tensor:
    """Sums of sparse directions, so that codes look like those of activations."""
    g = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(4 * d_in, d_in, generator=g), dim=1)
    return (torch.rand(n, 4 * d_in, generator=g) < 0.05).float() @ directions


def train(kinds: list[str], args: argparse.Namespace, steps: int) -> dict[str, float]:
    """Seconds per step of each, fitted side by side."""
    saes = {kind: make(kind, args.host, args.d_in, args.d_sae, args.l0) for kind in kinds}
    x = rows(8 * args.batch, args.d_in)
    reports = fit_saes(saes, x, steps=steps, batch_size=args.batch, warmup_steps=1)
    return {kind: report.seconds / steps for kind, report in reports.items()}


def resident(what: str) -> int:
    """Memory of this process in KiB, now (VmRSS) or at its peak (VmHWM); Linux."""
    return int(re.search(rf"{what}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (
        ("d_in", 128),
        ("d_sae", 1024),
        ("batch", 4096),
        ("l0", 32),
        ("steps", 60),
        ("rounds", 5),
        ("threads", 1),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--host", default="batch_topk")
    parser.add_argument("--memory_of", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        x, sae = (
            rows(8 * args.batch, args.d_in),
            make(args.memory_of, args.host, args.d_in, args.d_sae, args.l0),
        )
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew here
        before = resident("VmRSS")
        fit_saes(sae, x, steps=8, batch_size=args.batch, warmup_steps=1)
        print(resident("VmHWM") - before)
        return
    train(list(KINDS), args, 5)
    rounds = [train(list(KINDS), args, args.steps) for _ in range(args.rounds)]
    options = [f"--{k}={getattr(args, k)}" for k in ("d_in", "d_sae", "batch", "l0", "threads")]
    memory = {
        kind: (
            int(
                subprocess.run(
                    [sys.executable, __file__, *options, f"--memory_of={kind}"],
                    capture_output=True,
                    check=True,
                    text=True,
                ).stdout
            )
            / 1024
        )
        for kind in KINDS
    }
    print(
        f"d_in {args.d_in}, d_sae {args.d_sae}, {args.batch} rows, L0 {args.l0}, {args.threads}"
        f" threads; {args.rounds} rounds of {args.steps} steps"
    )
    print(
        "| | ms per step | time against the host | peak memory, MiB | against the host"
        " |\n|---|---|---|---|---|"
    )
    for kind in KINDS:
        ratios = [r[kind] / r["host"] for r in rounds]
        ms = 1000 * statistics.median(r[kind] for r in rounds)
        print(
            f"| {kind} | {ms:.1f} | {statistics.median(ratios):.2f} ({min(ratios):.2f} to"
            f" {max(ratios):.2f}) | {memory[kind]:.0f} | {memory[kind] / memory['host']:.2f} |"
        )


if __name__ == "__main__":
    main()

"""The superposition sweep in batched tensors, against one configuration at a time.

Both run side by side in one process.

    python benchmarks/superposition.py [--threads 1] [--rounds 8] [--no-compiler] [--out
    benchmarks/results/superposition.md]

Speed: in every round a few steps of each of the 42 configurations with the loop, then a few of
the sweep, so that both see the same machine; times are scaled to 10,000 steps. Agreement: final
losses of both, over many instances, compared by a Mann-Whitney test for each configuration.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from sae_experiments.studies.superposition import toy
from sae_experiments.studies.superposition.trees import Features
from sae_experiments.training.loop import Session, TrainConfig, train

STEPS, BATCH, INSTANCES = 10_000, 1024, 5
SHAPES = [(d, h) for d in range(1, 7) for h in range(2, 11) if h <= 2 ** (d + 1) - 2]
PLAIN = Features(
    mode="exclusive",
    branching=2,
    probability=1.0,
    stop=0.5,
    importance=1.0,
    match="exclusive",
    correlated=0.0,
    anticorrelated=0.0,
)
FAMILIES = {
    name: replace(PLAIN, mode=mode)
    for name, mode in (
        ("exclusive", "exclusive"),
        ("early_stopping", "early_stopping"),
        ("control", "independent"),
    )
}
CPU = torch.device("cpu")


def config(steps: int) -> TrainConfig:
    return TrainConfig(
        steps=steps,
        batch_size=BATCH,
        lr=1e-3,
        min_lr=0.0,
        warmup_steps=0,
        decay="constant",
        decay_from=0.0,
        optimizer="adam",
        muon_lr=0.0,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        clip=0.0,
        log_every=100,
        eval_every=10**9,
        checkpoint_every_s=1e9,
    )


# --- the obvious loop: nothing from the package but the definition of the task --------------------


def obvious_batch(family: str, depth: int, instances: int) -> Tensor:
    """A batch (batch, instances, features).

    The tree is grown level by level; independent features have its marginals.
    """
    if family == "control":
        p = torch.cat([torch.full((2**level,), 0.5**level) for level in range(1, depth + 1)])
        return (torch.rand(BATCH, instances, len(p)) < p).float()
    share = 0.5 if family == "exclusive" else 0.25
    on = torch.ones(BATCH, instances, 1, dtype=torch.bool)
    levels = []
    for _ in range(depth):
        u = torch.rand(on.shape)
        on = torch.stack([on & (u < share), on & (u >= share) & (u < 2 * share)], -1).flatten(2)
        levels.append(on)
    return torch.cat(levels, -1).float()


class ObviousLoop:
    """One configuration, `instances` times: model, Adam, a fresh batch each step."""

    def __init__(self, family: str, depth: int, hidden: int, instances: int) -> None:
        n = 2 ** (depth + 1) - 2
        self.family, self.depth, self.instances = family, depth, instances
        self.w = torch.nn.Parameter((2 / (hidden + n)) ** 0.5 * torch.randn(instances, hidden, n))
        self.b = torch.nn.Parameter(torch.zeros(instances, n))
        self.optimizer = torch.optim.Adam([self.w, self.b], lr=1e-3)

    def output(self, x: Tensor) -> Tensor:
        h = torch.einsum("ihf,bif->bih", self.w, x)
        return torch.relu(torch.einsum("bih,ihf->bif", h, self.w) + self.b)

    def steps(self, n: int) -> None:
        for _ in range(n):
            x = obvious_batch(self.family, self.depth, self.instances)
            loss = (self.output(x) - x).square().mean((0, 2)).sum()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()

    @torch.no_grad()
    def final(self, rows: int) -> np.ndarray:
        x = torch.cat(
            [obvious_batch(self.family, self.depth, 1) for _ in range(rows // BATCH)]
        ).expand(-1, self.instances, -1)
        return (self.output(x) - x).square().mean((0, 2)).numpy()


# --- measuring ------------------------------------------------------------------------------------


class Sweep:
    """The study's own learner under the shared training loop, a few steps at a time."""

    def __init__(
        self, family: str, shapes: list[tuple[int, int]], instances: int, steps: int, seed: int = 0
    ) -> None:
        self.learner = toy.make(
            shapes,
            FAMILIES[family],
            config(steps),
            instances=instances,
            init="matrix",
            seed=seed,
            device=CPU,
        )

        self.done = 0

    def steps(self) -> None:
        train(
            [self.learner],
            lambda step: self.learner.batch_at(self.done + step),
            self.learner.cfg,
            Session(),
        )
        self.done += (
            self.learner.cfg.steps
        )  # fresh samples every time: drawing them is part of the work


def timed(call: Any) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def speed(rounds: int, few: int = 4, many: int = 16) -> dict[str, tuple[float, float]]:
    """Seconds for a whole sweep, of the loop and of the batched sweep, by family.

    Medians of the rounds.
    """
    found = {}
    for family in FAMILIES:
        loops = [ObviousLoop(family, d, h, INSTANCES) for d, h in SHAPES]
        sweep = Sweep(family, SHAPES, INSTANCES, many)
        for loop in loops:
            loop.steps(2)
        sweep.steps()
        times = [
            (
                sum(timed(lambda loop=loop: loop.steps(few)) for loop in loops) / few,
                timed(sweep.steps) / many,
            )
            for _ in range(rounds)
        ]
        found[family] = tuple(
            STEPS * float(np.median(column)) for column in zip(*times, strict=True)
        )
        print(
            f"{family}: loop {found[family][0]:,.0f} s, sweep {found[family][1]:,.0f} s, ratio"
            f" {found[family][0] / found[family][1]:.1f}",
            flush=True,
        )
    return found


def agreement(
    steps: int, instances: int, rows: int = 32 * BATCH
) -> list[tuple[str, int, int, float, float, float]]:
    """Final losses of both for small configurations.

    Rows: family, depth, hidden size, median loss of the loop and of the sweep, p of the Mann-
    Whitney test.
    """
    found = []
    shapes = [(2, 2), (2, 4), (3, 2), (3, 4), (3, 6)]
    for family in FAMILIES:
        sweep = Sweep(family, shapes, instances, steps, seed=1)
        sweep.steps()
        ours = sweep.learner.final(rows)
        for depth, hidden in shapes:
            loop = ObviousLoop(family, depth, hidden, instances)
            loop.steps(steps)
            a, b = loop.final(rows), ours[depth, hidden]
            found.append(
                (
                    family,
                    depth,
                    hidden,
                    float(np.median(a)),
                    float(np.median(b)),
                    float(stats.mannwhitneyu(a, b).pvalue),
                )
            )
            print(*found[-1], flush=True)
    return found


def report(
    times: dict[str, tuple[float, float]],
    pairs: list[tuple[str, int, int, float, float, float]],
    args: argparse.Namespace,
) -> str:
    loop, sweep = (sum(column) for column in zip(*times.values(), strict=True))
    least = min(p for *_, p in pairs)
    combined = stats.combine_pvalues([p for *_, p in pairs]).pvalue
    step = "PyTorch's step (no C compiler)" if args.no_compiler else "the compiled step"
    command = (
        f"--threads {args.threads} --rounds {args.rounds} --steps {args.steps} --instances"
        f" {args.instances}"
    )
    lines = [
        "# Superposition: the whole sweep at once against one configuration at a time",
        "",
        f"The sweep takes {step}.",
        "",
        (
            f"{date.today().isoformat()}; two AMD EPYC cores (AVX-512), no accelerator, torch 2.13"
            f" CPU; {args.threads} thread(s) for both sides; {args.note}"
        ),
        "",
        (
            "`python benchmarks/superposition.py"
            f" {command}{' --no-compiler' if args.no_compiler else ''}`"
        ),
        "",
        (
            f"42 configurations (depth 1 to 6, hidden 2 to 10) x {INSTANCES} instances, {STEPS:,}"
            f" steps of {BATCH:,}; steps of both are measured in turns"
        ),
        f"(median of {args.rounds} rounds) and scaled to {STEPS:,}.",
        "",
        "| generator | one by one (s) | sweep (s) | ratio |",
        "|---|---|---|---|",
        *(f"| {name} | {a:,.0f} | {b:,.0f} | {a / b:.1f} |" for name, (a, b) in times.items()),
        f"| all three | {loop:,.0f} | {sweep:,.0f} | **{loop / sweep:.1f}** |",
        "",
        (
            f"Agreement: loss after {args.steps:,} steps, {args.instances} instances on each side,"
            " Mann-Whitney test for each configuration."
        ),
        (
            f"Least p of {len(pairs)}: {least:.3f} (Bonferroni {min(1.0, least * len(pairs)):.2f});"
            f" combined by Fisher's method: p = {combined:.2f}."
        ),
        "",
        "| generator | depth | hidden | median, one by one | median, sweep | p |",
        "|---|---|---|---|---|---|",
        *(f"| {f} | {d} | {h} | {a:.4g} | {b:.4g} | {p:.2f} |" for f, d, h, a, b, p in pairs),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("threads", 1), ("rounds", 8), ("steps", 1000), ("instances", 30)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument(
        "--no-compiler",
        action="store_true",
        help="the sweep takes PyTorch's step, as on a machine without a C compiler",
    )
    parser.add_argument(
        "--note",
        default="other work on the machine not excluded",
        help="what else is to be said about the machine",
    )
    parser.add_argument("--out", type=Path, help="where the table is written (default: printed)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.no_compiler:
        toy.compiled = lambda: None
    elif toy.compiled() is None:
        parser.error("no C compiler that works: give --no-compiler")
    text = report(speed(args.rounds), agreement(args.steps, args.instances), args)
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()

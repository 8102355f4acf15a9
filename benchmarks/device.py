"""Steps on a GPU, for `bench.py steps --device cuda` and `bench.py lm --device cuda`.

Everything runs in this process: a fit with each backend, and plain dense PyTorch on the same rows.
A time is that of many steps between two waits for the device.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from contestants import study
from rows import pool_of
from torch import Tensor, nn

from sae_experiments.corpora.corpus import load_corpus
from sae_experiments.fitting.fit import Sample, fit_saes
from sae_experiments.models.gpt2 import LMLearner, build_lm, sampling_rate
from sae_experiments.models.layouts import moved
from sae_experiments.saes.base import Batch
from sae_experiments.training.loop import Session, train

#: Precisions of the plain loops.
MODES = ("fp32", "tf32", "bf16")
#: Active latents per row.
K = 32


class _Done(Exception):
    pass


class Clock:
    """Time of the steps from `warm` to `warm + steps`; ends the loop that calls it.

    Args:
        device: Device to wait for.
        warm: Steps before the first that counts.
        steps: Steps that count.
    """

    def __init__(self, device: torch.device, warm: int, steps: int) -> None:
        self.device = device
        self.warm, self.steps = warm, steps
        self.began = self.seconds = math.nan
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def at(self, step: int) -> None:
        """Called before every step."""
        if step not in (self.warm, self.warm + self.steps):
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if step == self.warm:
            self.began = time.perf_counter()
            return
        self.seconds = time.perf_counter() - self.began
        raise _Done

    def result(self) -> dict[str, float]:
        """Milliseconds of a step, and the peak of the device's memory in bytes."""
        peak = math.nan
        if self.device.type == "cuda":
            peak = float(torch.cuda.max_memory_allocated(self.device))
        return {"ms": 1e3 * self.seconds / self.steps, "peak": peak}


def card(name: str) -> str:
    """The device and the version of torch."""
    device = torch.device(name)
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{kind}, torch {torch.__version__}"


def fitted(
    variant: str,
    pool: list[Tensor],
    m: int,
    backend: str,
    clock: Clock,
    overrides: list[str],
    *,
    dead: bool = False,
) -> None:
    """Fit one variant as a run does; with `dead`, terms for dead latents are always needed."""
    d, batch = pool[0].shape[1], len(pool[0])
    chosen = study(
        "preset=full",
        f"sae={variant}",
        f"sae.target_l0={min(K, m // 2)}",
        f"sae.d_sae={m}",
        f"fit.train.batch_size={batch}",
        *overrides,
    )
    spec = next(iter(chosen.saes.values()))
    sae = moved(spec.seeded(d, d, 0), pool[0].device)

    def batch_at(step: int) -> Batch:
        clock.at(step)
        x = pool[step % len(pool)]
        return Batch(x, x)

    start = pool[0]
    fit_saes(
        {variant: sae},
        batch_at,
        spec.config(chosen.fit.train),
        Sample(start, start, start),
        seed=0,
        dead_after=-1 if dead else 10**9,
        backend=backend,
    )


def plain(
    variant: str, pool: list[Tensor], m: int, mode: str, clock: Clock, *, compiled: bool
) -> None:
    """The textbook loop in dense PyTorch: topk, batch_topk or standard."""
    device, d = pool[0].device, pool[0].shape[1]
    torch.manual_seed(0)
    decoder = F.normalize(torch.randn(m, d, device=device), dim=1)
    start = (decoder.clone(), torch.zeros(m, device=device), decoder, torch.zeros(d, device=device))
    params = [nn.Parameter(t) for t in start]
    w_enc, b_enc, w_dec, b_dec = params
    optimizer = torch.optim.Adam(params, lr=1e-3, fused=True)

    def loss_of(x: Tensor) -> Tensor:
        z = torch.relu((x - b_dec) @ w_enc.t() + b_enc)
        if variant == "topk":
            top = z.topk(min(K, m // 2), dim=1, sorted=False)
            z = torch.zeros_like(z).scatter(1, top.indices, top.values)
        elif variant == "batch_topk":
            flat = z.flatten()
            top = flat.topk(min(K, m // 2) * len(x), sorted=False)
            z = torch.zeros_like(flat).scatter(0, top.indices, top.values).view_as(z)
        recon = z @ w_dec + b_dec
        penalty = 1e-3 * z.sum(1).mean() if variant == "standard" else 0.0
        return (x - recon).square().sum(1).mean() + penalty

    forward: Callable[[Tensor], Tensor] = torch.compile(loss_of) if compiled else loss_of
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "ieee" if mode == "fp32" else "tf32"
    try:
        for step in range(10**9):
            clock.at(step)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=mode == "bf16"):
                loss = forward(pool[step % len(pool)])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            with torch.no_grad():
                w_dec.div_(w_dec.norm(dim=1, keepdim=True))
    finally:
        matmul.fp32_precision = before


def timed(
    run: Callable[[Clock], None], device: torch.device, args: argparse.Namespace
) -> dict[str, Any]:
    """Run until the clock ends it; what fails says why."""
    gc.collect()  # of contestants before: the peak must be this one's
    if device.type == "cuda":
        torch.cuda.empty_cache()
    clock = Clock(device, args.warm, args.steps)
    try:
        run(clock)
    except _Done:
        return clock.result()
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"[:300]}
    return {"failed": "ended before it was measured"}


def steps(args: argparse.Namespace) -> dict[str, Any]:
    """Steps of every variant with both backends, beside plain loops."""
    device = torch.device(args.device)
    groups = []
    for d, m in args.sizes:
        pool = [x.to(device) for x in pool_of(d, args.batch)]
        for chosen in args.variants:
            variant, *overrides = chosen.split("@")
            ours = functools.partial(fitted, variant, pool, m, overrides=overrides)
            contestants: dict[str, Callable[[Clock], None]] = {
                f"ours, {backend}": functools.partial(ours, backend)
                for backend in ("device", "host")
            }
            contestants["ours, device, all latents dead"] = functools.partial(
                ours, "device", dead=True
            )
            if variant in ("topk", "batch_topk", "standard") and not args.quick:
                loop = functools.partial(plain, variant, pool, m)
                for mode in MODES:
                    contestants[f"plain {mode}"] = functools.partial(loop, mode, compiled=False)
                for mode in MODES[1:]:
                    run = functools.partial(loop, mode, compiled=True)
                    contestants[f"plain {mode}, compiled"] = run
            results = {name: timed(run, device, args) for name, run in contestants.items()}
            groups.append({"d": d, "m": m, "variant": chosen, "results": results})
            told = "; ".join(
                f"{name} {found['ms']:.3f} ms" if "ms" in found else f"{name} {found['failed']}"
                for name, found in results.items()
            )
            print(f"d {d}, m {m}, {chosen}: {told}", flush=True)
    return {"groups": groups, "batch": args.batch, "k": K}


def language(args: argparse.Namespace) -> dict[str, Any]:
    """Training steps, evaluation and generation of the language model with both backends."""
    device = torch.device(args.device)
    found: dict[str, Any] = {}
    for backend in ("device", "host"):
        overrides = ["lm.train.optimizer=adamw", *args.overrides, f"lm.backend={backend}"]
        chosen = study("preset=full", "data=[shakespeare_char]", *overrides)
        spec, data = chosen.lm, chosen.data["shakespeare_char"]
        corpus = load_corpus(
            data, cache=Path(tempfile.gettempdir()) / "bench_texts", offline=False, say=print
        )
        cfg = spec.train_config(data.recipe)
        model = moved(build_lm(spec, corpus.vocabulary, seed=0), device)
        learner = LMLearner(model, corpus, spec, cfg, seed=0)
        clock = Clock(device, args.warm, args.steps)

        def batch_at(step: int, learner: LMLearner = learner, clock: Clock = clock) -> Any:
            clock.at(step)
            return learner.batch("train", step, "train")

        with contextlib.suppress(_Done):
            train([learner], batch_at, cfg, Session())
        learner.mean_loss("val", 8)
        began = time.perf_counter()
        learner.mean_loss("val", args.steps)
        evaluation = 1e3 * (time.perf_counter() - began) / args.steps
        rates = [sampling_rate(model.eval(), corpus, spec, seed=seed) or 0.0 for seed in (0, 1)]
        found[backend] = clock.result() | {
            "evaluation_ms": evaluation,
            "characters_per_second": statistics.mean(rates[1:]),
        }
        print(backend, found[backend], flush=True)
    return {"backends": found, "steps": cfg.steps}


SECTIONS = {"steps": steps, "lm": language}

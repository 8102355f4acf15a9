"""Reconstruction and dead latents at an equal budget, beside the peers.

All read the same activations, in the same batches and number of steps.

    python benchmarks/quality.py [--only sae-lens:topk] [--steps 1500] [--work FOLDER]

Activations: residual stream after the middle block of the laptop preset's language model on
shakespeare_char (width 128). SAEs: 1,024 latents, L0 32, batches of 4,096, 1,500 steps. Every
library scales its input in its own way and warms up over the same steps; the peers run at three
learning rates, of which the best counts, this project at its configured one. Where a library
cannot be told an L0 (a penalty with a coefficient), its coefficient is searched in short
pilots, and this project's SAE is then trained to the L0 that the library ended with. Every
finished fit is kept in `--work`, so the command may be stopped and started again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import tables
from workers import ContestantError, Host, Turns

if TYPE_CHECKING:
    from collections.abc import Sequence

VARIANTS = ("topk", "batch_topk", "matryoshka", "jumprelu", "standard", "gated")
PEERS = ("sae-lens", "dictionary-learning")
RATES = (8e-4, 2e-3, 5e-3)
STEERED = ("jumprelu", "standard", "gated")  # by a coefficient
M, L0, BATCH = 1024, 32, 4096


# --- in a worker ----------------------------------------------------------------------------------


def _stream(work: str, batch: int) -> Any:
    """`batch_at(step)` over shuffled training rows, and the rows to initialise from."""
    import torch

    rows = np.load(Path(work) / "train.npy", mmap_mode="r")
    orders: dict[int, np.ndarray] = {}
    per_epoch = len(rows) // batch

    def batch_at(step: int) -> Any:
        epoch, within = divmod(step, per_epoch)
        if epoch not in orders:
            orders[epoch] = np.random.default_rng([0, epoch]).permutation(len(rows))
        return torch.from_numpy(
            rows[np.sort(orders[epoch][within * batch : (within + 1) * batch])].astype(np.float32)
        )

    return batch_at, batch_at(10**6)


def measured(answer: Any, work: str) -> dict[str, float]:
    """FVU, L0 and share of latents that never fire, on held-out rows."""
    import torch

    x = torch.from_numpy(np.load(Path(work) / "held_out.npy").astype(np.float32))
    error, active, fires = 0.0, 0.0, 0
    with torch.no_grad():
        for part in x.split(4096):
            acts, recon = answer(part)
            error += float((part - recon).double().square().sum())
            active += float((acts != 0).sum())
            fires = fires + (acts != 0).sum(0)
    return {
        "fvu": error / float((x - x.mean(0)).double().square().sum()),
        "l0": active / len(x),
        "dead": float((fires == 0).float().mean()),
    }


def ours(turns: Turns, work: str, variant: str, steps: int, l0: float, lr: float | None) -> None:
    """A fit as the laptop preset makes it."""
    import torch
    from contestants import study

    from sae_experiments.fitting.fit import Sample, fit_saes
    from sae_experiments.saes.base import Batch

    turns.next()
    own = [] if lr is None else [f"fit.train.lr={lr}"]
    chosen = study(
        f"sae={variant}", f"sae.target_l0={l0}", f"sae.d_sae={M}", f"fit.train.steps={steps}", *own
    )
    sae_spec = next(iter(chosen.saes.values()))
    batch_at, first = _stream(work, BATCH)
    sae = sae_spec.seeded(first.shape[1], first.shape[1], 0)
    start = torch.cat([first, *(batch_at(10**6 + i) for i in range(1, 8))])
    held = torch.from_numpy(np.load(Path(work) / "calibration.npy").astype(np.float32))
    dead_after = round(chosen.fit.dead_after_frac * steps * BATCH)
    report = fit_saes(
        {"sae": sae},
        lambda i: Batch(x := batch_at(i), x),
        sae_spec.config(chosen.fit.train),
        Sample(start, start, held),
        seed=0,
        dead_after=dead_after,
    )
    turns.info = measured(lambda x: (z := sae.encode(x), sae.reconstruct(x, z)), work) | {
        "seconds": report["sae"].seconds
    }
    turns.next()
    turns.next()


def peer(
    turns: Turns,
    work: str,
    library: str,
    variant: str,
    steps: int,
    lr: float,
    coeff: float | None,
    batch: int = BATCH,
) -> None:
    """A fit by a peer's trainer."""
    import time

    from peers import Setup, make

    turns.next()
    batch_at, first = _stream(work, batch)
    setup = Setup(variant, first.shape[1], M, L0, lr, steps, batch, coeff, first)
    step, answer = make(library, setup)
    began = time.perf_counter()
    for i in range(steps):
        step(batch_at(i))
    seconds = time.perf_counter() - began
    turns.info = measured(answer, work) | {"seconds": seconds, "coeff": coeff}
    turns.next()
    turns.next()


# --- in the bench ---------------------------------------------------------------------------------


def prepare(work: Path, overrides: Sequence[str] = ()) -> None:
    """Write activations of the laptop preset's language model, or of one with `overrides`.

    Files: `train.npy`, `calibration.npy` and `held_out.npy`.
    """
    if (work / "held_out.npy").exists():
        return
    import torch
    from contestants import study

    from sae_experiments.console import Console
    from sae_experiments.studies.base import Context
    from sae_experiments.studies.language.stores import Stores

    work.mkdir(parents=True, exist_ok=True)
    cache = Path(os.environ.get("SAE_CACHE", "~/.cache/sae_experiments")).expanduser()
    ctx = Context(folder=work, cache=cache, device=torch.device("cpu"), console=Console())
    language = study("data=[shakespeare_char]", "sae=topk", *overrides)
    language.prepare(ctx)
    text, recipe = language.texts["shakespeare_char"], language.data["shakespeare_char"].recipe
    with ctx.session("language model", "lm") as session:
        lm = language.models.of(text, recipe, 0, ctx, session)
    site = language.sites(next(iter(language.saes.values())))[0]
    stores = Stores(language.fit, [site], text.corpus, lm, 0, ctx)
    for name in ("train", "calibration", "held_out"):
        np.save(
            work / f"{name}.npy",
            getattr(stores, name).rows(site, slice(None)).numpy().astype(np.float16),
        )


class Bench:
    """Fits, each made once and kept as JSON."""

    def __init__(self, work: Path, steps: int, threads: int) -> None:
        self.work, self.steps, self.threads = work, steps, threads
        self.python = os.environ.get("PEERS_PYTHON")
        self.hosts: dict[str, Host] = {}

    def fit(self, name: str, host: str, call: str, **args: Any) -> dict[str, Any]:
        """The result `name`: from disk, or from a worker now."""
        path = self.work / f"{name}.json"
        if not path.exists():
            if host not in self.hosts:
                python = sys.executable if host == "ours" else self.python
                self.hosts[host] = Host(
                    ["contestants" if host == "ours" else "peers"],
                    python=python,
                    threads=self.threads,
                )
            with self.hosts[host].start(call, work=str(self.work), **args) as worker:
                worker.run(1)
                path.write_text(json.dumps(worker.info | {"args": args}, indent=1))
            print(name, worker.info, flush=True)
        return json.loads(path.read_text())

    def ours(self, variant: str, l0: float = L0, lr: float | None = None) -> dict[str, Any]:
        rate = "" if lr is None else f"_lr{lr:g}"
        return self.fit(
            f"ours_{variant}_{l0:.1f}_{self.steps}{rate}",
            "ours",
            "quality:ours",
            variant=variant,
            steps=self.steps,
            l0=l0,
            lr=lr,
        )

    def peer(self, library: str, variant: str, lr: float) -> dict[str, Any]:
        name = f"{library}_{variant}_{self.steps}_lr{lr:g}"
        args = {"library": library, "variant": variant, "lr": lr}
        coeff = (
            None
            if variant not in STEERED or (self.work / f"{name}.json").exists()
            else self.coefficient(**args)
        )
        return self.fit(name, "peers", "quality:peer", steps=self.steps, coeff=coeff, **args)

    def coefficient(self, library: str, variant: str, lr: float, tries: int = 4) -> float:
        """Find a coefficient that gives about the requested L0.

        By secant steps in logarithms, over pilots of a quarter of the rows.
        """
        start = {
            ("sae-lens", "standard"): 0.5,
            ("sae-lens", "gated"): 0.5,
            ("sae-lens", "jumprelu"): 0.1,
            ("dictionary-learning", "standard"): 0.03,
            ("dictionary-learning", "gated"): 0.03,
            ("dictionary-learning", "jumprelu"): 1.0,
        }
        coeff, seen = start[library, variant], []
        if (library, variant) == ("dictionary-learning", "jumprelu"):
            return coeff  # takes a target L0 itself
        for i in range(tries):
            name = f"pilot_{library}_{variant}_{self.steps}_lr{lr:g}_{i}"
            found = self.fit(
                name,
                "peers",
                "quality:peer",
                library=library,
                variant=variant,
                lr=lr,
                steps=self.steps,
                coeff=coeff,
                batch=BATCH // 8,
            )
            seen.append((math.log(coeff), math.log(max(found["l0"], 0.1) / L0)))
            if abs(seen[-1][1]) < 0.1:
                break
            slope = -1.0
            if len(seen) > 1 and abs(seen[-1][0] - seen[-2][0]) > 1e-6:
                slope = min(
                    max((seen[-1][1] - seen[-2][1]) / (seen[-1][0] - seen[-2][0]), -3.0), -0.2
                )
            coeff = math.exp(seen[-1][0] - min(max(seen[-1][1] / slope, -2.0), 2.0))
        return coeff

    def best(self, library: str, variant: str) -> dict[str, Any] | None:
        """The peer's finished fit with the smallest FVU, over the learning rates.

        Of steered fits, those within 30 % of the L0 count first.
        """
        fits = [(lr, self.work / f"{library}_{variant}_{self.steps}_lr{lr:g}.json") for lr in RATES]
        done = [json.loads(path.read_text()) | {"lr": lr} for lr, path in fits if path.exists()]
        near = [
            f for f in done if variant not in STEERED or 0.7 * L0 <= f["l0"] <= 1.3 * L0
        ] or done
        return (
            min(near, key=lambda f: f["fvu"]) | {"rates": [f["lr"] for f in done]} if near else None
        )

    def match(self) -> None:
        """Train this project's SAE to the L0 of a peer that cannot be given one."""
        for variant in STEERED:
            for library in PEERS:
                if (peer := self.best(library, variant)) is not None:
                    self.ours(variant, l0=round(peer["l0"], 1))

    def found(self) -> dict[str, dict[str, Any]]:
        """Finished fits, by variant and contestant."""
        out: dict[str, dict[str, Any]] = {}
        for variant in VARIANTS:
            rows: dict[str, Any] = {}
            if (path := self.work / f"ours_{variant}_{L0:.1f}_{self.steps}.json").exists():
                rows["ours"] = json.loads(path.read_text())
            for library in PEERS:
                if (peer := self.best(library, variant)) is None:
                    continue
                rows[library] = peer
                path = self.work / f"ours_{variant}_{peer['l0']:.1f}_{self.steps}.json"
                if variant in STEERED and path.exists():
                    rows[f"ours at {library}'s L0"] = json.loads(path.read_text())
            if rows:
                out[variant] = rows
        return out

    def close(self) -> None:
        """End all hosts."""
        for host in self.hosts.values():
            host.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("runs/bench_quality"),
        help="where activations and finished fits are kept",
    )
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument(
        "--overrides", nargs="*", default=[], help="further settings of the language model and rows"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--only",
        nargs="*",
        help="fits such as ours:topk, sae-lens:gated, sae-lens:topk:0.002 (default: all)",
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    prepare(args.work, args.overrides)
    bench = Bench(args.work, args.steps, args.threads)
    wanted = [f"ours:{v}" for v in VARIANTS]
    if bench.python:
        wanted += [f"{p}:{v}:{lr:g}" for lr in RATES for v in VARIANTS for p in PEERS]
    for what in args.only or wanted:
        side, variant, *rate = what.split(":")
        try:
            if side == "ours":
                bench.ours(variant, lr=float(rate[0]) if rate else None)
            else:
                for lr in [float(rate[0])] if rate else RATES:
                    bench.peer(side, variant, lr)
        except ContestantError as error:
            print(f"{what} failed: {error}", flush=True)
    if not args.only:
        bench.match()
    about = tables.machine() | {
        "threads": args.threads,
        "rounds": 1,
        "versions": {n: h.versions for n, h in bench.hosts.items()},
    }
    bench.close()
    tables.write(
        args.out,
        "quality",
        {
            "m": M,
            "l0": L0,
            "batch": BATCH,
            "steps": args.steps,
            "variants": bench.found(),
            "about": about,
        },
    )


if __name__ == "__main__":
    main()

"""Speed and memory of this project beside its peers, in turns: what `make bench` runs.

    python benchmarks/bench.py [SECTION ...] [--threads N] [--rounds R]
    PEERS_PYTHON=/path/to/venv/bin/python python benchmarks/bench.py steps
    python benchmarks/bench.py steps lm --device cuda

Sections: steps (SAE training steps), memory is part of it; together (several SAEs in one pass);
scaling (time and memory against width and rows); lm (training, generation and collection of
activations); jobs (a finished run by stage and metric; --run FOLDER). Each writes
`results/<section>.json` and `results/<section>.md` when it ends, so sections can be run one
at a time and again.

Everything compared is trained alternately, a few steps each, by processes that sleep while the
others work (`workers.py`). With one thread, times are processor time, which other work on the
machine hardly disturbs; with more, time on the clock.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import tables
from workers import ContestantError, Host, Worker

SIZES = ((128, 1024), (128, 4096), (384, 12288))
K, BATCH = 32, 4096
#: After the @, a setting for our side. A gated SAE starts dense, and what it costs once it is
#: sparse is another question.
VARIANTS = (
    "topk",
    "topk@sae.matmul_precision=bf16",
    "batch_topk",
    "batch_topk@sae.matmul_precision=bf16",
    "matryoshka",
    "standard",
    "jumprelu",
    "gated",
    "gated@sae.model.start_l0=3",
    "abs_topk",
    "p_anneal",
    "lista",
)
#: The same with `--device`.
DEVICE_SIZES = ((384, 3072), (384, 12288), (768, 24576))
DEVICE_VARIANTS = ("topk", "batch_topk", "standard", "jumprelu", "gated", "matryoshka")
LIBRARIES = ("sae-lens", "dictionary-learning", "eai-sparsify")
# which peers have a variant, and under which name (the same table is in peers.py, which this Python
# need not be able to import)
OFFERED = {
    **{
        v: [(p, v) for p in LIBRARIES[:2]]
        for v in ("standard", "topk", "batch_topk", "jumprelu", "gated", "matryoshka")
    }
}
OFFERED["topk"] = [*OFFERED["topk"], ("eai-sparsify", "topk"), ("eai-sparsify", "groupmax")]


class Contestant(NamedTuple):
    """A contestant: the host to fork from, its function and arguments, and its turns.

    A turn has `n` steps; the first `warm` of all do not count.
    """

    host: str
    call: str
    args: Mapping[str, Any]
    n: int = 2
    warm: int = 2


class Arena:
    """Hosts, started when first needed, and the alternation."""

    def __init__(self, threads: int, rounds: int, tuned: bool) -> None:
        self.threads, self.rounds, self.tuned = threads, rounds, tuned
        self.python = os.environ.get("PEERS_PYTHON")
        self.hosts: dict[str, Host] = {}

    def host(self, name: str) -> Host:
        """`ours`, `peers`, and both with `+tuned` memory settings."""
        if name not in self.hosts:
            side, _, tuned = name.partition("+")
            modules = ["contestants", "language_contestants"] if side == "ours" else ["peers"]
            python = sys.executable if side == "ours" else self.python
            self.hosts[name] = Host(
                modules, python=python, threads=self.threads, keep_memory=bool(tuned)
            )
        return self.hosts[name]

    def compare(
        self, contestants: Mapping[str, Contestant], say: Callable[[str], None]
    ) -> dict[str, dict[str, Any]]:
        """Make rounds in which every contestant makes a few steps.

        Returns for each: `ms` (median), `rounds` (median of each), `peak` bytes and `info`.
        """
        workers: dict[str, Worker] = {}
        found: dict[str, dict[str, Any]] = {}
        try:
            for name, c in contestants.items():
                try:
                    workers[name] = self.host(c.host).start(c.call, **c.args)
                    workers[name].run(c.warm)
                except ContestantError as error:
                    found[name] = {"failed": str(error)[-300:]}
                    workers.pop(name, None)
            times: dict[str, list[float]] = {name: [] for name in workers}
            which = 1 if self.threads == 1 else 0
            for _ in range(self.rounds):
                for name, worker in workers.items():
                    times[name].append(
                        1e3 * median(t[which] for t in worker.run(contestants[name].n))
                    )
            for name, worker in workers.items():
                found[name] = {
                    "ms": median(times[name]),
                    "rounds": times[name],
                    "peak": worker.peak,
                    "info": worker.info,
                }
        finally:
            for worker in workers.values():
                worker.stop()
        say(
            "; ".join(
                f"{name} {f['ms']:.3g} ms" if "ms" in f else f"{name} failed"
                for name, f in found.items()
            )
        )
        return {name: found[name] for name in contestants}

    def close(self) -> None:
        """End all hosts."""
        for host in self.hosts.values():
            host.close()

    def about(self) -> dict[str, Any]:
        """Origin of a result: machine, versions and settings."""
        known = {name: host.versions for name, host in self.hosts.items()}
        return tables.machine() | {
            "threads": self.threads,
            "rounds": self.rounds,
            "versions": known,
            "peers": bool(self.python),
        }


# --- sections -------------------------------------------------------------------------------------


def steps(arena: Arena, args: argparse.Namespace) -> dict[str, Any]:
    """Time a training step of every variant at three sizes.

    Beside it run the peers that have the variant, a plain loop, and the encoder product alone.
    """
    groups = []
    for d, m in args.sizes:
        size = {"d": d, "m": m}
        full = {**size, "k": K, "batch": BATCH}
        large = d * m > 2**20
        for chosen in args.variants:
            variant, *overrides = chosen.split("@")
            contestants = {
                f"product, {lib}": Contestant(
                    "ours", "contestants:encoder_product", {**size, "batch": BATCH, "library": lib}
                )
                for lib in ("default", "onednn", "bf16")
            }
            mine = {**full, "variant": variant, "overrides": tuple(overrides)}
            contestants["ours"] = Contestant(
                "ours", "contestants:ours", mine, n=3, warm=5 if large else 12
            )
            if variant in ("topk", "standard") and not args.quick:
                contestants["plain torch"] = Contestant(
                    "ours",
                    "contestants:plain_sae",
                    {**full, "variant": variant},
                    n=1 if large else 2,
                )
            for library, name in OFFERED.get(variant, []) if arena.python else []:
                label = library if name == variant else f"{library} {name}"
                call = Contestant(
                    "peers",
                    "peers:steps",
                    {**full, "library": library, "variant": name},
                    n=1 if large else 2,
                    warm=1,
                )
                contestants[label] = call
                if arena.tuned:
                    contestants[f"{label}, tuned"] = call._replace(host="peers+tuned")
            print(f"d {d}, m {m}, {chosen}", flush=True)
            groups.append(
                {
                    **size,
                    "variant": " ".join([variant, *(o.rsplit(".")[-1] for o in overrides)]),
                    "results": arena.compare(contestants, print),
                }
            )
    rate = arena.compare(
        {
            lib: Contestant("ours", "contestants:matrix_rate", {"size": 2048, "library": lib}, n=2)
            for lib in ("default", "onednn", "bf16")
        },
        print,
    )
    return {
        "groups": groups,
        "gflops": {lib: 2 * 2048**3 / (f["ms"] * 1e6) for lib, f in rate.items() if "ms" in f},
    }


def together(arena: Arena, args: argparse.Namespace) -> dict[str, Any]:
    """One, two, four and eight batch_topk SAEs in one pass."""
    call = Contestant(
        "ours",
        "contestants:ours",
        {"variant": "batch_topk", "d": 128, "m": 1024, "k": K, "batch": BATCH},
        n=4,
        warm=6,
    )
    contestants = {str(n): call._replace(args={**call.args, "copies": n}) for n in (1, 2, 4, 8)}
    return {"groups": [{"d": 128, "m": 1024, "results": arena.compare(contestants, print)}]}


def scaling(arena: Arena, args: argparse.Namespace) -> dict[str, Any]:
    """Time and memory of a batch_topk and a standard step as width and batch grow."""
    groups = []
    for variant in ("batch_topk", "standard"):
        points = {f"m {m}": (128, m, BATCH) for m in (512, 1024, 2048, 4096, 8192, 16384)} | {
            f"batch {b}": (128, 2048, b) for b in (512, 2048, 8192)
        }
        contestants = {
            name: Contestant(
                "ours",
                "contestants:ours",
                {"variant": variant, "d": d, "m": m, "k": K, "batch": b},
                n=2,
                warm=4,
            )
            for name, (d, m, b) in points.items()
        }
        groups.append({"variant": variant, "results": arena.compare(contestants, print)})
    return {"groups": groups}


def lm(arena: Arena, args: argparse.Namespace) -> dict[str, Any]:
    """Time language models of the laptop and the full size.

    A training step, generation, and collecting activations.
    """
    groups = []
    fp32 = ("lm.precision=fp32",)
    adamw = ("lm.train.optimizer=adamw",)
    for preset in args.presets:
        large = preset == "full"
        few = {"n": 1, "warm": 1} if large else {"n": 3, "warm": 2}
        names = {
            "ours": Contestant(
                "ours", "language_contestants:train_ours", {"preset": preset}, **few
            ),
            "ours, fp32": Contestant(
                "ours",
                "language_contestants:train_ours",
                {"preset": preset, "overrides": fp32},
                **few,
            ),
            "plain loop, fp32": Contestant(
                "ours", "language_contestants:train_plain", {"preset": preset}, **few
            ),
        }
        if not large:
            names["ours, AdamW"] = Contestant(
                "ours",
                "language_contestants:train_ours",
                {"preset": preset, "overrides": adamw},
                **few,
            )
        if arena.tuned:
            names["plain loop, fp32, tuned"] = names["plain loop, fp32"]._replace(host="ours+tuned")
        groups.append(
            {"what": "training step", "preset": preset, "results": arena.compare(names, print)}
        )
        for rows in (1, 10):
            length = (
                250  # the context is nearly full at the end, and what a cache saves grows with it
            )
            work = {"preset": preset, "rows": rows, "length": length}
            names = {
                "ours": Contestant("ours", "language_contestants:generate_ours", work, n=1, warm=1),
                "no cache": Contestant(
                    "ours", "language_contestants:generate_plain", work, n=1, warm=0 if large else 1
                ),
            }
            groups.append(
                {
                    "what": f"generation, {rows} at once",
                    "preset": preset,
                    "tokens": rows * length,
                    "results": arena.compare(names, print),
                }
            )
        for batch in (32, 256) if not large else (32,):
            work = {"preset": preset, "batch": batch}
            names = {
                "ours": Contestant("ours", "language_contestants:collect_ours", work, n=1, warm=1),
                "whole model with a hook": Contestant(
                    "ours", "language_contestants:collect_plain", work, n=1, warm=1
                ),
            }
            tokens = batch * (256 if large else 128)
            groups.append(
                {
                    "what": f"collection, {batch} windows",
                    "preset": preset,
                    "tokens": tokens,
                    "results": arena.compare(names, print),
                }
            )
    return {"groups": groups}


def jobs(arena: Arena, args: argparse.Namespace) -> dict[str, Any]:
    """Time of a finished run by stage and metric, as its cells recorded it."""
    return (
        {"run": args.run.name, "cells": tables.stages(args.run)}
        if args.run
        else {"run": None, "cells": {}}
    )


SECTIONS: dict[str, Callable[[Arena, argparse.Namespace], dict[str, Any]]] = {
    "steps": steps,
    "together": together,
    "scaling": scaling,
    "lm": lm,
    "jobs": jobs,
}


def on_device(args: argparse.Namespace, chosen: Sequence[str]) -> None:
    """Run the sections that a device is timed in."""
    import device  # it imports torch, which the processes of other sections must not inherit

    for name in chosen:
        if name not in device.SECTIONS:
            raise SystemExit(f"--device times {' and '.join(device.SECTIONS)}, not {name}")
        about = tables.machine() | {
            "card": device.card(args.device),
            "steps": args.steps,
            "note": args.note,
        }
        found = device.SECTIONS[name](args)
        tables.write(args.out, f"device_{name}", found | {"about": about})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)} (default: all)"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--sizes",
        nargs="+",
        default=None,
        help="for steps, such as 128x1024",
    )
    parser.add_argument("--variants", nargs="+", default=None, help="for steps")
    parser.add_argument(
        "--device", default="", help="steps and lm on this device (cuda), beside plain loops"
    )
    parser.add_argument("--batch", type=int, default=BATCH, help="rows, with --device")
    parser.add_argument("--warm", type=int, default=30, help="steps before those timed on a device")
    parser.add_argument("--steps", type=int, default=200, help="steps timed on a device")
    parser.add_argument("--overrides", nargs="*", default=[], help="for lm on a device")
    parser.add_argument("--presets", nargs="+", default=["laptop", "full"], help="for lm")
    parser.add_argument(
        "--tuned", action="store_true", help="also with malloc settings that spare page faults"
    )
    parser.add_argument("--quick", action="store_true", help="no plain loops")
    parser.add_argument(
        "--run", type=Path, default=Path("runs/run_0"), help="a finished run, for jobs"
    )
    parser.add_argument("--note", default="", help="what else is to be said about the machine")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    known = (DEVICE_SIZES, DEVICE_VARIANTS) if args.device else (SIZES, VARIANTS)
    sizes = args.sizes or [f"{d}x{m}" for d, m in known[0]]
    args.sizes = [tuple(int(n) for n in size.split("x")) for size in sizes]
    args.variants = args.variants or list(known[1])
    args.run = args.run if (args.run / "cells").is_dir() else None
    chosen = args.sections or list(SECTIONS)
    if unknown := set(chosen) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}: there are {', '.join(SECTIONS)}")
    if args.device:
        import torch

        if args.device.startswith("cuda") and not torch.cuda.is_available():
            parser.error(f"--device {args.device}: there is no CUDA device here")
        on_device(args, args.sections or ["steps", "lm"])
        return
    arena = Arena(args.threads, args.rounds, args.tuned)
    if not arena.python:
        print(
            "PEERS_PYTHON is not set: no peers in these tables (docs/speed.md says how to get them)"
        )
    try:
        for name in chosen:
            found = SECTIONS[name](arena, args)
            tables.write(args.out, name, found | {"about": arena.about() | {"note": args.note}})
    finally:
        arena.close()


if __name__ == "__main__":
    main()

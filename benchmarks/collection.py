"""Speed of collecting activations against the bare forward pass to the site, and memory.

    OMP_NUM_THREADS=1 python benchmarks/collection.py [--windows 32] [--rounds 3] [--write]

The model has the shape of GPT-2 small (124 M parameters) and random weights; the site is resid.6.
Both sides read the same windows of 128 tokens in turns, and processor time counts, which other work
on the machine disturbs little. The bare pass runs the embeddings and the first six blocks and keeps
nothing; collection is what a stream does with a chunk. `--write` writes results/collection.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from sae_experiments.memory import peak_memory
from sae_experiments.models.hooks import Kept, Site
from sae_experiments.models.store import Source
from sae_experiments.models.stream import SMALLEST, Stream

LENGTH, LAYER, WIDTH = 128, 6, 768
BATCH = 8  # windows per forward pass


def bare(model: GPT2LMHeadModel, tokens: torch.Tensor) -> torch.Tensor:
    """The stream (B, T, D) after block `LAYER`, without hooks."""
    trunk = model.transformer
    x = trunk.wte(tokens) + trunk.wpe(torch.arange(tokens.shape[1]))
    for block in trunk.h[:LAYER]:
        out = block(x)
        x = out[0] if isinstance(out, tuple) else out
    return x


def seconds(work: Callable[[], Any]) -> float:
    """Processor time of one call."""
    began = time.process_time()
    work()
    return time.process_time() - began


def main() -> None:
    """Measure, print and perhaps write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(use_cache=False)).eval().requires_grad_(False)
    model.config.n_positions = LENGTH
    text = torch.randint(50257, (2_000_000,))
    starts = np.arange(0, given.windows * LENGTH, LENGTH)

    def tokens_of(where: np.ndarray) -> torch.Tensor:
        return torch.stack([text[s : s + LENGTH] for s in where])

    source = Source(
        model=model,
        tokens_of=tokens_of,
        length=LENGTH,
        split="train",
        key={},
        dtype="float16",
        batch=BATCH,
    )
    site = Site("resid", LAYER)
    stream = Stream(
        source,
        starts,
        [site],
        chunk_rows=SMALLEST * 32,
        batch_rows=32,
        kept={site: Kept(torch.zeros(WIDTH), 1.0)},
    )

    def collected(epoch: int) -> None:
        stream.rows(site, stream.index_at(epoch * len(starts) * LENGTH // 32, rows=32, seed=0))

    def plain() -> None:
        with torch.no_grad():
            for begin in range(0, len(starts), BATCH):
                bare(model, tokens_of(starts[begin : begin + BATCH]))

    plain(), collected(0)  # the first calls allocate
    times = [
        (seconds(plain), seconds(lambda e=e: collected(e))) for e in range(1, given.rounds + 1)
    ]
    rows = given.windows * LENGTH
    result = {
        "tokens_per_second_bare": rows / median(a for a, _ in times),
        "tokens_per_second_collected": rows / median(b for _, b in times),
        "share": median(a / b for a, b in times),
        "windows": given.windows,
        "rounds": given.rounds,
        "peak_mib": peak_memory() / 1024**2,
        "command": " ".join(["python benchmarks/collection.py", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {processor()}, {torch.get_num_threads()} thread(s)",
        "torch": torch.__version__,
    }
    print(json.dumps(result, indent=2))
    if given.write:
        path = Path(__file__).parent / "results" / "collection.json"
        path.write_text(json.dumps(result, indent=2) + "\n")


def processor() -> str:
    """Name of the processor, as Linux says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), "")


if __name__ == "__main__":
    main()

"""Cost of attributing one target: all in one call, against one backward pass per target.

Both run in one process, in turns.

    python benchmarks/circuits.py                                    the laptop preset's sizes:
    4 blocks of width 128, 128 positions
    python benchmarks/circuits.py --width 384 --length 256 --layers 6   the full preset's

Two kinds of one by one: the model is run anew for every target, as scripts do, and every
gradient is projected on all decoder rows; or it is run once a prompt, its graph kept, and the
gradient projected on the active rows only, gathered once a prompt. Printed are medians over the
rounds of milliseconds per target, of each round's ratio, and the largest difference of the
gradients relative to the largest gradient of the target.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from pathlib import Path

import torch

from sae_experiments.models.gpt2 import LMSpec, build_lm
from sae_experiments.models.hooks import Site, activations, capture, patched
from sae_experiments.saes.batch_topk import BatchTopK
from sae_experiments.sampling import spread_rows
from sae_experiments.studies.circuits.attribution import Circuit, Prompts, Targets

UP, DOWN = Site("mlp_act", 2), Site("mlp_act", 3)


def world(args: argparse.Namespace) -> tuple[Circuit, Prompts]:
    """A random model with random SAEs of the requested L0.

    The cost does not depend on what was learned.
    """
    spec = LMSpec(
        n_layer=args.layers,
        n_head=max(args.width // 64, 1),
        n_embd=args.width,
        n_positions=args.length,
        dropout=0.0,
        activation_function="gelu_pytorch_tanh",
        freeze_bias=True,
        train={},
        precision="fp32",
        compile=False,
        muon_writes_from=1,
        adam_writes_lr=0.3,
        eval_batches=1,
        curve_batches=1,
        samples=0,
        sample_length=1,
        prompt=" ",
        temperature=1.0,
        top_k=1,
    )
    model = build_lm(spec, 65, seed=0).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".h." in name and p.ndim == 2:
                p.mul_(5)
    ids, saes = (
        torch.randint(
            0, 65, (args.prompts, args.length), generator=torch.Generator().manual_seed(0)
        ),
        [],
    )
    for site in (UP, DOWN):
        torch.manual_seed(site.layer)
        sae = BatchTopK(
            d_in=4 * args.width, d_sae=args.expansion * 4 * args.width, k=args.l0
        ).eval()
        sae.calibrate_threshold(
            spread_rows(activations(model, ids, [site])[site].flatten(0, 1), 8192), args.l0
        )
        saes.append(sae.requires_grad_(False))
    circuit = Circuit(model, saes[0], UP, UP, saes[1], DOWN, memory_mb=args.memory_mb)
    return circuit, circuit.prompts(ids)


def together(
    circuit: Circuit, prompts: Prompts, targets: Targets
) -> dict[tuple[int, ...], torch.Tensor]:
    """Gradients of all targets by one call."""
    found = {}
    for part in circuit.attribute(prompts, targets):
        keys = zip(*(x.tolist() for x in part.targets), strict=True)
        found |= dict(zip(keys, part.gradient, strict=True))
    return found


def anew(
    circuit: Circuit, prompts: Prompts, targets: Targets, x: torch.Tensor
) -> dict[tuple[int, ...], torch.Tensor]:
    """Model run and backward pass for every target, projected on every decoder row."""
    found = {}
    for p, t, i in zip(*(v.tolist() for v in targets), strict=True):
        leaf = x[p : p + 1].clone().requires_grad_()
        with (
            patched(circuit.model, UP, lambda _, leaf=leaf: leaf),
            capture(circuit.model, [DOWN]) as seen,
        ):
            circuit.model(input_ids=prompts.tokens[p : p + 1], use_cache=False)
        value = seen[DOWN][0, t] @ circuit.downstream.W_enc[i]
        found[p, t, i] = torch.autograd.grad(value, leaf)[0][0] @ circuit.atoms.t()
    return {k: g.gather(1, prompts.index[k[0]]) for k, g in found.items()}


def kept(
    circuit: Circuit, prompts: Prompts, targets: Targets, x: torch.Tensor
) -> dict[tuple[int, ...], torch.Tensor]:
    """Model run once a prompt, backward pass for every target, projected on the active rows."""
    found = {}
    for p in targets.prompt.unique().tolist():
        mine = targets[targets.prompt == p]
        leaf = x[p : p + 1].clone().requires_grad_()
        with (
            patched(circuit.model, UP, lambda _, leaf=leaf: leaf),
            capture(circuit.model, [DOWN]) as seen,
        ):
            circuit.model(input_ids=prompts.tokens[p : p + 1], use_cache=False)
        atoms = circuit.atoms[prompts.index[p]]
        for t, i in zip(mine.position.tolist(), mine.latent.tolist(), strict=True):
            g = torch.autograd.grad(
                seen[DOWN][0, t] @ circuit.downstream.W_enc[i], leaf, retain_graph=True
            )[0][0]
            found[p, t, i] = torch.bmm(atoms, g[:, :, None])[:, :, 0]
    return found


class Peak(threading.Thread):
    """Peak of the memory of this process, in MiB above that at the start (Linux)."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.start_mb, self.most, self.done = self.now(), 0.0, threading.Event()

    @staticmethod
    def now() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

    def run(self) -> None:
        while not self.done.wait(0.002):
            self.most = max(self.most, self.now() - self.start_mb)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in {
        "width": 128,
        "length": 128,
        "layers": 4,
        "expansion": 4,
        "l0": 32,
        "prompts": 16,
        "targets": 1000,
        "few": 60,
        "rounds": 5,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--memory_mb", type=float, default=256)
    args = parser.parse_args()
    circuit, prompts = world(args)
    x = activations(circuit.model, prompts.tokens, [UP])[UP]
    order = torch.randperm(prompts.active.n, generator=torch.Generator().manual_seed(0))
    targets, few = prompts.active[order[: args.targets]], prompts.active[order[: args.few]]
    grouped = prompts.active[(prompts.active.prompt == 0).nonzero().squeeze(1)][
        : args.few
    ]  # the kept graph at its best: one prompt
    together(circuit, prompts, few)
    times: dict[str, list[float]] = {"together": [], "anew": [], "graph kept": []}
    for _ in range(args.rounds):
        for name, call, n in (
            ("together", lambda: together(circuit, prompts, targets), targets.n),
            ("anew", lambda: anew(circuit, prompts, few, x), few.n),
            ("graph kept", lambda: kept(circuit, prompts, grouped, x), grouped.n),
        ):
            began = time.perf_counter()
            call()
            times[name].append(1000 * (time.perf_counter() - began) / n)
    peak = Peak()
    peak.start()
    for part in circuit.attribute(prompts, targets):
        del part
    peak.done.set()
    a, b = together(circuit, prompts, few), anew(circuit, prompts, few, x)
    worst = max(float((a[k] - b[k]).abs().max() / b[k].abs().max().clamp_min(1e-30)) for k in b)
    print(
        f"{targets.n} targets over {args.length} positions, width {args.width},"
        f" {circuit.upstream.d_sae} upstream latents, L0 {args.l0}"
    )
    for name, values in times.items():
        ratio = statistics.median(v / w for v, w in zip(values, times["together"], strict=True))
        print(f"{name:>11}: {statistics.median(values):8.3f} ms per target, {ratio:6.1f} x")
    print(
        f"{targets.n} targets in {statistics.median(times['together']) * targets.n / 1000:.2f} s;"
        f" peak {peak.most:.0f} MiB above the start"
    )
    print(f"largest difference of a gradient, relative to the target's largest: {worst:.1e}")


if __name__ == "__main__":
    main()

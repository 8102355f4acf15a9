"""The peers' own training steps, each behind one loop; imported only by the Python of
``PEERS_PYTHON`` (docs/speed.md says how to make it).

sae-lens: ``SAETrainer.step``, scaling of the activations included. dictionary-learning:
``trainer.update`` on batches divided by their mean norm, as its ``trainSAE`` does.
eai-sparsify: its ``SparseCoder`` with the order of calls of its trainer and Adam (its trainer
itself is bound to a language model and a tokenizer). Settings not named here are the libraries'
defaults.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any

with contextlib.redirect_stdout(io.StringIO()):
    import dictionary_learning  # noqa: F401
    import sae_lens  # noqa: F401
    import sparsify  # noqa: F401
import torch
from rows import pool_of
from torch import Tensor
from workers import Turns

LEVELS = [
    0.03125,
    0.0625,
    0.125,
    0.25,
    0.53125,
]  # matryoshka: share of the latents in each group, as this project's configuration has them
#: variant of this project -> what each peer calls it
OFFERED = {
    "sae-lens": {"standard", "topk", "batch_topk", "jumprelu", "gated", "matryoshka"},
    "dictionary-learning": {"standard", "topk", "batch_topk", "jumprelu", "gated", "matryoshka"},
    "eai-sparsify": {"topk", "groupmax"},
}
Step = Callable[[Tensor], Any]


def steps(turns: Turns, library: str, variant: str, d: int, m: int, k: int, batch: int) -> None:
    """Train ``variant`` of ``library``, one step a turn, on the same rows as everybody."""
    torch.manual_seed(0)
    pool = pool_of(d, batch)
    turns.prepared()
    step, _ = make(
        library, variant, d, m, k, lr=8e-4, steps=100_000, batch=batch, coeff=None, sample=pool[0]
    )
    n = 0
    while True:
        turns.next()
        step(pool[n % len(pool)])
        n += 1


def make(
    library: str,
    variant: str,
    d: int,
    m: int,
    k: int,
    *,
    lr: float,
    steps: int,
    batch: int,
    coeff: float | None,
    sample: Tensor,
    seed: int = 0,
) -> tuple[Step, Callable[[Tensor], tuple[Tensor, Tensor]]]:
    """A training step over raw rows, and what the trained SAE answers to raw rows: (codes,
    reconstruction in raw units).
    """
    torch.manual_seed(seed)
    args = (variant, d, m, k, lr, steps, batch, coeff, sample)
    return {
        "sae-lens": _sae_lens,
        "dictionary-learning": _dictionary_learning,
        "eai-sparsify": _sparsify,
    }[library](*args)


def _sae_lens(
    variant: str,
    d: int,
    m: int,
    k: int,
    lr: float,
    steps: int,
    batch: int,
    coeff: float | None,
    sample: Tensor,
) -> Any:
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes import (
        batchtopk_sae,
        gated_sae,
        jumprelu_sae,
        matryoshka_batchtopk_sae,
        standard_sae,
        topk_sae,
    )
    from sae_lens.training.sae_trainer import SAETrainer

    warmup = steps // 15
    name, module, own = {
        "standard": (
            "Standard",
            standard_sae,
            {"l1_coefficient": 5.0 if coeff is None else coeff, "l1_warm_up_steps": warmup},
        ),
        "gated": (
            "Gated",
            gated_sae,
            {"l1_coefficient": 5.0 if coeff is None else coeff, "l1_warm_up_steps": warmup},
        ),
        "jumprelu": (
            "JumpReLU",
            jumprelu_sae,
            {"l0_coefficient": 1.0 if coeff is None else coeff, "l0_warm_up_steps": warmup},
        ),
        "topk": ("TopK", topk_sae, {"k": k}),
        "batch_topk": ("BatchTopK", batchtopk_sae, {"k": k}),
        "matryoshka": (
            "MatryoshkaBatchTopK",
            matryoshka_batchtopk_sae,
            {"k": k, "matryoshka_widths": _widths(m)},
        ),
    }[variant]
    cfg = getattr(module, f"{name}TrainingSAEConfig")(
        d_in=d, d_sae=m, normalize_activations="expected_average_only_in", **own
    )
    sae = getattr(module, f"{name}TrainingSAE")(cfg)
    trainer_cfg = SAETrainerConfig(
        total_training_samples=steps * batch,
        train_batch_size_samples=batch,
        lr=lr,
        lr_end=0.0,
        lr_warm_up_steps=warmup,
        lr_decay_steps=steps // 5,
        n_batches_for_norm_estimate=1,
    )
    trainer = SAETrainer(trainer_cfg, sae, iter([sample]))
    trainer.activation_scaler.scaling_factor = d**0.5 / float(sample.norm(dim=1).mean())

    def step(x: Tensor) -> None:
        trainer.step(x)
        trainer.n_training_steps += 1

    @torch.no_grad()
    def answer(x: Tensor) -> tuple[Tensor, Tensor]:
        scale = trainer.activation_scaler.scaling_factor
        sae.eval()
        if variant in (
            "batch_topk",
            "matryoshka",
        ):  # its inference form: JumpReLU at the running threshold
            pre = sae.encode_with_hidden_pre(x * scale)[1]
            acts = torch.relu(pre) * (pre > sae.topk_threshold)
        else:
            acts = sae.encode(x * scale)
        return acts, sae.decode(acts) / scale

    return step, answer


def _dictionary_learning(
    variant: str,
    d: int,
    m: int,
    k: int,
    lr: float,
    steps: int,
    batch: int,
    coeff: float | None,
    sample: Tensor,
) -> Any:
    from dictionary_learning.trainers import (
        batch_top_k,
        gdm,
        jumprelu,
        matryoshka_batch_top_k,
        standard,
        top_k,
    )

    trainer_class, own = {
        "standard": (
            standard.StandardTrainer,
            {
                "l1_penalty": 0.1 if coeff is None else coeff,
                "sparsity_warmup_steps": steps // 15,
                "device": "cpu",
            },
        ),
        "gated": (
            gdm.GatedSAETrainer,
            {
                "l1_penalty": 0.1 if coeff is None else coeff,
                "sparsity_warmup_steps": steps // 15,
                "device": "cpu",
            },
        ),
        "jumprelu": (
            jumprelu.JumpReluTrainer,
            {
                "target_l0": float(k),
                "sparsity_penalty": 1.0 if coeff is None else coeff,
                "sparsity_warmup_steps": steps // 15,
            },
        ),
        "topk": (
            top_k.TopKTrainer,
            {"k": k, "device": "cpu", "threshold_start_step": steps // 2, "auxk_alpha": 1 / 32},
        ),
        "batch_topk": (
            batch_top_k.BatchTopKTrainer,
            {"k": k, "device": "cpu", "threshold_start_step": steps // 2},
        ),
        "matryoshka": (
            matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer,
            {
                "k": k,
                "group_fractions": LEVELS,
                "device": "cpu",
                "threshold_start_step": steps // 2,
            },
        ),
    }[variant]
    common = {
        "steps": steps,
        "activation_dim": d,
        "dict_size": m,
        "layer": 0,
        "lm_name": "none",
        "lr": lr,
        "seed": 0,
    }
    trainer = trainer_class(**common, warmup_steps=steps // 15, decay_start=steps * 4 // 5, **own)
    norm = float(sample.square().sum(1).mean().sqrt())
    n = 0

    def step(x: Tensor) -> None:
        nonlocal n
        trainer.update(n, x / norm)
        n += 1

    @torch.no_grad()
    def answer(x: Tensor) -> tuple[Tensor, Tensor]:
        acts = trainer.ae.encode(x / norm)
        return acts, trainer.ae.decode(acts) * norm

    return step, answer


def _sparsify(
    variant: str,
    d: int,
    m: int,
    k: int,
    lr: float,
    steps: int,
    batch: int,
    coeff: float | None,
    sample: Tensor,
) -> Any:
    from sparsify import SparseCoder, SparseCoderConfig

    coder = SparseCoder(d, SparseCoderConfig(activation=variant, num_latents=m, k=k))
    coder.b_dec.data.copy_(sample.mean(0))
    optimizer = torch.optim.Adam(coder.parameters(), lr=lr)
    warmup = steps // 15
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / (warmup + 1), max(steps - i, 0) / (steps - warmup))
    )
    since_fired = torch.zeros(m, dtype=torch.long)

    def step(x: Tensor) -> None:
        coder.set_decoder_norm_to_unit_norm()
        out = coder(x, dead_mask=None)
        out.fvu.backward()
        fired = torch.zeros(m, dtype=torch.bool)
        fired[out.latent_indices.flatten()] = True
        since_fired.add_(len(x)).masked_fill_(fired, 0)
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()

    @torch.no_grad()
    def answer(x: Tensor) -> tuple[Tensor, Tensor]:
        acts, index, _ = coder.encode(x)
        return torch.zeros(len(x), m).scatter(1, index, acts), coder.decode(acts, index)

    return step, answer


def _widths(m: int) -> list[int]:
    ends, total = [], 0.0
    for share in LEVELS:
        total += share
        ends.append(round(total * m))
    return ends

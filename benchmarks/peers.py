"""The peers' own training steps, each behind one loop.

Imported only by the Python of `PEERS_PYTHON` (docs/speed.md says how to make it).

sae-lens: `SAETrainer.step`, scaling of the activations included. dictionary-learning:
`trainer.update` on batches divided by their mean norm, as its `trainSAE` does. eai-sparsify: its
`SparseCoder` with the order of calls of its trainer and Adam, since the trainer itself is bound to
a language model and a tokenizer. All other settings are the libraries' defaults.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

with contextlib.redirect_stdout(io.StringIO()):
    for name in ("dictionary_learning", "sae_lens", "sparsify"):
        import_module(name)
import torch
from rows import pool_of
from torch import Tensor
from workers import Turns

#: Share of the latents in each group of a Matryoshka SAE, as in `conf/sae/matryoshka.yaml`.
LEVELS = [0.03125, 0.0625, 0.125, 0.25, 0.53125]
#: Variants of each peer, under this project's names (for eai-sparsify, its own).
OFFERED = {
    "sae-lens": {"standard", "topk", "batch_topk", "jumprelu", "gated", "matryoshka"},
    "dictionary-learning": {"standard", "topk", "batch_topk", "jumprelu", "gated", "matryoshka"},
    "eai-sparsify": {"topk", "groupmax"},
}
Step = Callable[[Tensor], Any]
#: Maps raw rows to codes and reconstructions.
Answer = Callable[[Tensor], tuple[Tensor, Tensor]]


class Setup(NamedTuple):
    """One SAE of a peer."""

    variant: str
    """This project's name of the variant."""
    d: int
    """Width of the input."""
    m: int
    """Number of latents."""
    k: int
    """Requested active latents per row."""
    lr: float
    """Learning rate."""
    steps: int
    """Steps of the fit."""
    batch: int
    """Rows per step."""
    coeff: float | None
    """Coefficient of the sparsity penalty; None: the library's default."""
    sample: Tensor
    """Rows in raw units, for what a library scales by."""

    @property
    def warmup(self) -> int:
        """Steps over which learning rate and penalties warm up."""
        return self.steps // 15

    def coefficient(self, default: float) -> float:
        """The coefficient, or a default."""
        return default if self.coeff is None else self.coeff


def steps(turns: Turns, library: str, variant: str, d: int, m: int, k: int, batch: int) -> None:
    """Train `variant` of `library`, one step a turn, on the same rows as everybody."""
    torch.manual_seed(0)
    pool = pool_of(d, batch)
    turns.prepared()
    step, _ = make(library, Setup(variant, d, m, k, 8e-4, 100_000, batch, None, pool[0]))
    n = 0
    while True:
        turns.next()
        step(pool[n % len(pool)])
        n += 1


def make(library: str, setup: Setup, *, seed: int = 0) -> tuple[Step, Answer]:
    """Build an SAE of a library.

    Returns:
        A training step over raw rows (B, D), and the function from raw rows to the codes (B, F)
        and reconstructions (B, D) of the SAE, in raw units.
    """
    torch.manual_seed(seed)
    return {
        "sae-lens": _sae_lens,
        "dictionary-learning": _dictionary_learning,
        "eai-sparsify": _sparsify,
    }[library](setup)


def _sae_lens_model(setup: Setup) -> Any:
    """The variant as a class of sae-lens."""
    from sae_lens.saes import (
        batchtopk_sae,
        gated_sae,
        jumprelu_sae,
        matryoshka_batchtopk_sae,
        standard_sae,
        topk_sae,
    )

    k, warmup = setup.k, setup.warmup
    l1 = {"l1_coefficient": setup.coefficient(5.0), "l1_warm_up_steps": warmup}
    l0 = {"l0_coefficient": setup.coefficient(1.0), "l0_warm_up_steps": warmup}
    nested = {"k": k, "matryoshka_widths": _widths(setup.m)}
    name, module, own = {
        "standard": ("Standard", standard_sae, l1),
        "gated": ("Gated", gated_sae, l1),
        "jumprelu": ("JumpReLU", jumprelu_sae, l0),
        "topk": ("TopK", topk_sae, {"k": k}),
        "batch_topk": ("BatchTopK", batchtopk_sae, {"k": k}),
        "matryoshka": ("MatryoshkaBatchTopK", matryoshka_batchtopk_sae, nested),
    }[setup.variant]
    scaling = "expected_average_only_in"
    cfg = getattr(module, f"{name}TrainingSAEConfig")(
        d_in=setup.d, d_sae=setup.m, normalize_activations=scaling, **own
    )
    return getattr(module, f"{name}TrainingSAE")(cfg)


def _sae_lens(setup: Setup) -> tuple[Step, Answer]:
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    sae = _sae_lens_model(setup)
    trainer_cfg = SAETrainerConfig(
        total_training_samples=setup.steps * setup.batch,
        train_batch_size_samples=setup.batch,
        lr=setup.lr,
        lr_end=0.0,
        lr_warm_up_steps=setup.warmup,
        lr_decay_steps=setup.steps // 5,
        n_batches_for_norm_estimate=1,
    )
    trainer = SAETrainer(trainer_cfg, sae, iter([setup.sample]))
    mean_norm = float(setup.sample.norm(dim=1).mean())
    trainer.activation_scaler.scaling_factor = setup.d**0.5 / mean_norm

    def step(x: Tensor) -> None:
        trainer.step(x)
        trainer.n_training_steps += 1

    @torch.no_grad()
    def answer(x: Tensor) -> tuple[Tensor, Tensor]:
        sae.eval()
        scale = trainer.activation_scaler.scaling_factor
        if setup.variant in ("batch_topk", "matryoshka"):
            # In inference it is a JumpReLU at the running threshold.
            pre = sae.encode_with_hidden_pre(x * scale)[1]
            acts = torch.relu(pre) * (pre > sae.topk_threshold)
        else:
            acts = sae.encode(x * scale)
        return acts, sae.decode(acts) / scale

    return step, answer


def _dictionary_learning_trainer(setup: Setup) -> Any:
    """The variant as a trainer of dictionary-learning."""
    from dictionary_learning.trainers import (
        batch_top_k,
        gdm,
        jumprelu,
        matryoshka_batch_top_k,
        standard,
        top_k,
    )

    penalised = {
        "l1_penalty": setup.coefficient(0.1),
        "sparsity_warmup_steps": setup.warmup,
        "device": "cpu",
    }
    steered = {
        "target_l0": float(setup.k),
        "sparsity_penalty": setup.coefficient(1.0),
        "sparsity_warmup_steps": setup.warmup,
    }
    largest = {"k": setup.k, "device": "cpu", "threshold_start_step": setup.steps // 2}
    trainer_class, own = {
        "standard": (standard.StandardTrainer, penalised),
        "gated": (gdm.GatedSAETrainer, penalised),
        "jumprelu": (jumprelu.JumpReluTrainer, steered),
        "topk": (top_k.TopKTrainer, largest | {"auxk_alpha": 1 / 32}),
        "batch_topk": (batch_top_k.BatchTopKTrainer, largest),
        "matryoshka": (
            matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer,
            largest | {"group_fractions": LEVELS},
        ),
    }[setup.variant]
    return trainer_class(
        steps=setup.steps,
        activation_dim=setup.d,
        dict_size=setup.m,
        layer=0,
        lm_name="none",
        lr=setup.lr,
        seed=0,
        warmup_steps=setup.warmup,
        decay_start=setup.steps * 4 // 5,
        **own,
    )


def _dictionary_learning(setup: Setup) -> tuple[Step, Answer]:
    trainer = _dictionary_learning_trainer(setup)
    norm = float(setup.sample.square().sum(1).mean().sqrt())
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


def _sparsify(setup: Setup) -> tuple[Step, Answer]:
    from sparsify import SparseCoder, SparseCoderConfig

    m, warmup, steps = setup.m, setup.warmup, setup.steps
    cfg = SparseCoderConfig(activation=setup.variant, num_latents=m, k=setup.k)
    coder = SparseCoder(setup.d, cfg)
    coder.b_dec.data.copy_(setup.sample.mean(0))
    optimizer = torch.optim.Adam(coder.parameters(), lr=setup.lr)
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
    """Latents in each prefix of a Matryoshka SAE."""
    ends, total = [], 0.0
    for share in LEVELS:
        total += share
        ends.append(round(total * m))
    return ends

"""Language-model work by this project, and by a plain loop in the manner of nanoGPT."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from contestants import study
from torch import Tensor, nn
from workers import Turns

from sae_experiments.corpora.corpus import CharCorpus
from sae_experiments.models import gpt2 as lm
from sae_experiments.models.decoding import StaticDecoder, generate
from sae_experiments.models.hooks import activations, parse_site
from sae_experiments.training.loop import Session, train

SYMBOLS = 65
PROMPT = torch.zeros(1, 1, dtype=torch.long)


def corpus() -> CharCorpus:
    """A text without meaning; only its length and alphabet matter here."""
    ids = np.random.default_rng(0).integers(0, SYMBOLS, 1_000_000).astype(np.uint8)
    symbols = [chr(32 + i) for i in range(SYMBOLS)]
    return CharCorpus(
        name="noise",
        splits={"train": ids, "val": ids[:100_000]},
        symbols=symbols,
        provenance={},
        key="noise",
    )


def settings(preset: str, *overrides: str) -> tuple[Any, Any]:
    """LMSpec of a preset and its TrainConfig for tinyshakespeare (what a run would use)."""
    chosen = study(f"preset={preset}", "data=[shakespeare_char]", *overrides)
    return chosen.lm, chosen.lm.train_config(chosen.data["shakespeare_char"].recipe)


# --- this project ---------------------------------------------------------------------------------


def train_ours(turns: Turns, preset: str, overrides: tuple[str, ...] = ()) -> None:
    """The shared training loop on a language model of `preset`."""
    spec, cfg = settings(preset, *overrides)
    text = corpus()
    turns.prepared()
    learner = lm.LMLearner(lm.build_lm(spec, SYMBOLS, seed=0), text, spec, cfg, seed=0)

    def batch_at(step: int) -> Any:
        turns.next()
        return learner.batch("train", step, "train")

    train([learner], batch_at, cfg, Session())


def generate_ours(turns: Turns, preset: str, rows: int, length: int) -> None:
    """A turn is one call of `generate`."""
    spec, _ = settings(preset)
    model = lm.build_lm(spec, SYMBOLS, seed=0).eval()
    generator = torch.Generator().manual_seed(0)
    decoder = StaticDecoder(model, rows)
    turns.prepared()
    while True:
        turns.next()
        generate(
            decoder,
            PROMPT.expand(rows, 1),
            length,
            temperature=spec.temperature,
            top_k=spec.top_k,
            generator=generator,
        )


def collect_ours(turns: Turns, preset: str, batch: int) -> None:
    """A turn is `batch` windows up to the middle block."""
    spec, _ = settings(preset)
    model, text = lm.build_lm(spec, SYMBOLS, seed=0).eval(), corpus()
    site = parse_site("resid.mid", spec.n_layer)
    turns.prepared()
    step = 0
    while True:
        turns.next()
        activations(
            model,
            text.windows("train", np.arange(batch) * spec.n_positions + step, spec.n_positions),
            [site],
        )[site].half()
        step += 1


# --- plain ----------------------------------------------------------------------------------------


class Block(nn.Module):
    """Attention and MLP with residual connections, no biases."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.out = (
            nn.Linear(width, 3 * width, bias=False),
            nn.Linear(width, width, bias=False),
        )
        self.up, self.down = (
            nn.Linear(width, 4 * width, bias=False),
            nn.Linear(4 * width, width, bias=False),
        )
        self.heads, self.dropout = heads, dropout

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = (
            y.view(b, t, self.heads, -1).transpose(1, 2)
            for y in self.qkv(self.ln_1(x)).split(d, dim=2)
        )
        p = self.dropout if self.training else 0.0
        y = (
            F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
            .transpose(1, 2)
            .reshape(b, t, d)
        )
        x = x + F.dropout(self.out(y), p, self.training)
        return x + F.dropout(self.down(F.gelu(self.up(self.ln_2(x)))), p, self.training)


class PlainGPT(nn.Module):
    """A GPT-2 in fp32 as one would write it down."""

    def __init__(self, layers: int, heads: int, width: int, context: int, dropout: float) -> None:
        super().__init__()
        self.context, self.dropout = context, dropout
        self.tokens, self.positions = nn.Embedding(SYMBOLS, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                nn.init.normal_(
                    p,
                    std=0.02
                    / (math.sqrt(2 * layers) if ".out." in name or ".down." in name else 1),
                )

    def forward(self, ids: Tensor) -> Tensor:
        x = F.dropout(
            self.tokens(ids) + self.positions(torch.arange(ids.shape[1])),
            self.dropout,
            self.training,
        )
        for block in self.blocks:
            x = block(x)
        return self.norm(x) @ self.tokens.weight.t()


def plain(preset: str) -> tuple[PlainGPT, Any, Any]:
    spec, cfg = settings(preset)
    return (
        PlainGPT(spec.n_layer, spec.n_head, spec.n_embd, spec.n_positions, spec.dropout),
        spec,
        cfg,
    )


def train_plain(turns: Turns, preset: str) -> None:
    """Train in fp32 by AdamW with decay on matrices, and clipping.

    Batches are cut from the text one window at a time.
    """
    torch.manual_seed(0)
    ids = corpus().splits["train"]
    turns.prepared()
    model, spec, cfg = plain(preset)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))
    model.train()
    while True:
        turns.next()
        starts = torch.randint(len(ids) - spec.n_positions, (cfg.batch_size,))
        x = torch.stack(
            [torch.from_numpy(ids[i : i + spec.n_positions].astype(np.int64)) for i in starts]
        )
        y = torch.stack(
            [
                torch.from_numpy(ids[i + 1 : i + 1 + spec.n_positions].astype(np.int64))
                for i in starts
            ]
        )
        loss = F.cross_entropy(model(x).view(-1, SYMBOLS), y.view(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def generate_plain(turns: Turns, preset: str, rows: int, length: int) -> None:
    """No cache: the last `context` characters are read again for each new one."""
    model, spec, _ = plain(preset)
    model.eval()
    turns.prepared()
    while True:
        turns.next()
        ids = PROMPT.expand(rows, 1)
        for _ in range(length):
            logits = model(ids[:, -spec.n_positions :])[:, -1] / spec.temperature
            top = logits.topk(min(spec.top_k, SYMBOLS)).values
            probabilities = F.softmax(logits.masked_fill(logits < top[:, -1:], -math.inf), dim=-1)
            ids = torch.cat([ids, torch.multinomial(probabilities, 1)], 1)


@torch.no_grad()
def collect_plain(turns: Turns, preset: str, batch: int) -> None:
    """The whole model is run with a hook at the middle block."""
    model, spec, _ = plain(preset)
    model.eval()
    ids, found = corpus().splits["train"], []
    model.blocks[spec.n_layer // 2 - 1].register_forward_hook(lambda _m, _i, out: found.append(out))
    turns.prepared()
    while True:
        turns.next()
        model(
            torch.stack(
                [
                    torch.from_numpy(
                        ids[i * spec.n_positions : (i + 1) * spec.n_positions].astype(np.int64)
                    )
                    for i in range(batch)
                ]
            )
        )
        found.clear()

"""Run folders with made-up but plausible numbers, for the tests of results, comparison and
figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sae_experiments.files import write_json
from sae_experiments.metric_info import MetricInfo, describe
from sae_experiments.results.records import (
    CurveWriter,
    Record,
    save_arrays,
    write_final_info,
    write_record,
)

FVU = {
    "standard": 0.20,
    "gated": 0.16,
    "topk": 0.14,
    "batch_topk": 0.125,
    "jumprelu": 0.12,
    "matryoshka": 0.15,
    "hierarchical": 0.13,
    "random": 0.60,
}
LOSS = {"shakespeare_char": 1.47, "enwik8": 1.005, "text8": 0.98}
INFOS = [
    MetricInfo(
        name="best_val_loss",
        title="best validation loss",
        formula="mean over 200 batches of the val split",
        unit="nats",
        better="down",
    ),
    MetricInfo(
        name="final_train_loss",
        title="final train loss",
        formula="mean over 200 batches of the train split",
        unit="nats",
        better="down",
    ),
    MetricInfo(
        name="sae_l0",
        title="L0",
        formula="mean over tokens of the number of active latents",
        unit="latents/token",
        better="none",
    ),
    MetricInfo(
        name="sae_fvu",
        title="FVU",
        formula="sum |x - recon|^2 / sum |x - mean|^2",
        unit="",
        better="down",
    ),
    MetricInfo(
        name="ce_delta_bits",
        title="added loss",
        formula="(ce_spliced - ce_clean) / ln 2",
        unit="bits/char",
        better="down",
    ),
    MetricInfo(
        name="loss_recovered",
        title="loss recovered",
        formula="(ce_mean - ce_spliced) / (ce_mean - ce_clean)",
        unit="",
        better="up",
    ),
    MetricInfo(
        name="sae_dead_frac",
        title="dead latents",
        formula="share of latents that never fired",
        unit="",
        better="down",
    ),
    MetricInfo(
        name="sae_dense_frac",
        title="dense latents",
        formula="share of latents with density > 0.1",
        unit="",
        better="down",
    ),
    MetricInfo(
        name="total_train_time",
        title="training time",
        formula="wall clock",
        unit="s",
        better="down",
    ),
    MetricInfo(
        name="sae_mse",
        title="MSE",
        formula="mean squared error",
        unit="",
        better="down",
        shown=False,
    ),
]


def make_run(  # noqa: PLR0913 (keyword-only settings)
    root: Path,
    name: str,
    *,
    sae: str = "standard",
    k: int = 32,
    datasets: Sequence[str] = ("shakespeare_char",),
    seeds: Sequence[int] = (0, 1, 2),
    preset: str = "laptop",
    stand_in: bool = False,
    status: str = "done",
    curves: bool = True,
    **manifest: Any,
) -> Path:
    """Write a whole run folder ``root/name``; keyword arguments replace keys of its manifest."""
    run = root / name
    records = []
    for dataset in datasets:
        for seed in seeds:
            rng = np.random.default_rng([seed, len(dataset), k, len(sae)])
            records.append(_record(dataset, seed, sae, k, rng))
            write_record(run, records[-1])
            if curves:
                _curves(run, dataset, seed, sae, k)
                _density(run, dataset, seed, records[-1], k, rng)
    model = {"_target_": f"sae_experiments.saes.{sae}.{sae.title().replace('_', '')}SAE", "k": k}
    heads = (
        {"enwik8": "enwik8-head-4000000", "text8": "text8-head-3000000"} if preset != "full" else {}
    )
    base = {
        "label": f"{sae} k={k}",
        "argv": [f"--out_dir={name}"],
        "overrides": [f"sae={sae}"],
        "config": {"out_dir": name, "sae": {"model": model, "lr": 3e-4}, "data": list(datasets)},
        "git": {"commit": "0123abc", "dirty": False},
        "device": "cpu",
        "preset": preset,
        "preset_reason": "asked for",
        "corpora": {
            d: {
                "corpus": heads.get(d, d),
                "stand_in": stand_in,
                "counts": {"train": 900, "val": 50},
            }
            for d in datasets
        },
        "status": status,
        "metrics": describe(INFOS),
    }
    write_json(run / "manifest.json", base | manifest)
    write_final_info(run, records)
    return run


def _record(dataset: str, seed: int, sae: str, k: int, rng: np.random.Generator) -> Record:
    fvu = FVU.get(sae, 0.14) * (32 / k) ** 0.55 * (1 + 0.03 * rng.standard_normal())
    lm = np.random.default_rng([seed, len(dataset)]).normal(
        LOSS.get(dataset, 1.2), 0.006
    )  # one language model a seed, shared by the SAEs
    added = 0.9 * fvu**1.3 * (1 + 0.04 * rng.standard_normal())
    metrics = {
        "best_val_loss": lm,
        "final_train_loss": 0.55 * lm,
        "sae_l0": k * (1 + 0.01 * rng.standard_normal()),
        "sae_fvu": fvu,
        "sae_mse": 0.1 * fvu,
        "ce_delta_bits": added,
        "loss_recovered": 1 - added / 2.5,
        "sae_dead_frac": 0.02 if sae != "standard" else 0.11 + 0.02 * rng.random(),
        "sae_dense_frac": 0.004 + 0.002 * rng.random(),
        "total_train_time": 300 + 10 * rng.random(),
    }
    return Record(
        dataset=dataset,
        seed=seed,
        metrics=metrics,
        seconds={"lm": 120.0},
        config_hash="c",
        source_hash="s",
    )


def _curves(run: Path, dataset: str, seed: int, sae: str, k: int) -> None:
    lm, own = (
        np.random.default_rng([seed, len(dataset)]),
        np.random.default_rng([seed, len(sae), k]),
    )
    level, steps = LOSS.get(dataset, 1.2), range(0, 2001, 50)
    with CurveWriter(run, dataset, seed, resume=False) as out:
        for step in steps:
            decay = np.exp(-step / 300)
            out.write(
                step,
                "lm/train_loss",
                0.9 * level + (4.1 - level) * decay + 0.03 * lm.standard_normal(),
            )
            if step % 250 == 0:
                out.write(
                    step, "lm/val_loss", level + (4.1 - level) * decay + 0.02 * lm.standard_normal()
                )
        for step in steps:
            decay, mse = np.exp(-step / 200), FVU.get(sae, 0.14)
            out.write(
                step, "sae/mse", mse + (1 - mse) * decay * np.exp(0.05 * own.standard_normal())
            )
            out.write(
                step,
                "sae/loss",
                1.2 * mse + (1.1 - mse) * decay * np.exp(0.05 * own.standard_normal()),
            )
            out.write(step, "sae/l0", k + 400 * decay)
            out.write(step, "sae/dead_frac", 0.1 * (1 - decay))
            out.write(step, "sae/lr", 3e-4 * min(1, step / 100) * min(1, (2000 - step) / 400))
            if sae == "standard":
                out.write(step, "sae/l1", 0.2 * mse)


def _density(
    run: Path, dataset: str, seed: int, record: Record, k: int, rng: np.random.Generator
) -> None:
    alive = round(1536 * (1 - (record.metrics["sae_dead_frac"] or 0)))
    log10 = np.concatenate(
        [
            rng.normal(np.log10(k / 1536) - 0.4, 0.55, int(0.9 * alive)),
            rng.normal(-4.8, 0.3, alive - int(0.9 * alive)),
        ]
    )
    counts, edges = np.histogram(np.clip(log10, -6.99, -0.01), bins=np.arange(-7, 0.01, 0.25))
    save_arrays(run, dataset, seed, {"density_hist": counts, "density_edges": edges})

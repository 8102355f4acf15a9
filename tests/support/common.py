"""Constants, made text and small specifications that all tests share."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


CONF = ROOT / "conf"


WORDS = (
    "the quick brown fox jumps over a lazy dog while seven small birds sing about old rivers and"
    " the cold rain of the hills"
)


#: Metrics and record keys that are measured with a clock.
TIMED = {
    "total_train_time",
    "avg_inference_tokens_per_second",
    "sae_train_time",
    "sae_tokens_per_second",
}


#: Overrides that make a run of the whole pipeline take about a second of computing.
TINY = (
    "preset=smoke threads=1 offline=true lm.n_layer=2 lm.n_head=2 lm.n_embd=16 lm.n_positions=16"
    " lm.eval_batches=4 lm.curve_batches=2 lm.sample_length=20 lm.train.steps=12"
    " lm.train.eval_every=5 lm.train.batch_size=8 lm.train.checkpoint_every_s=0 fit.train_rows=3000"
    " fit.calibration_rows=512 fit.held_out_rows=512 fit.init_rows=512 fit.train.steps=12"
    " fit.train.batch_size=128 fit.train.checkpoint_every_s=0 metric.downstream.windows=16"
    " sae.target_l0=4 report=false"
)


def english(n: int, seed: int = 0) -> str:
    """``n`` characters of English-like words."""
    chance, words = random.Random(seed), WORDS.split()
    text = " ".join(chance.choice(words) for _ in range(n // 3 + 8))
    return text[:n]


def train_config(**changes: Any) -> Any:
    """A TrainConfig with small numbers, but for ``changes``."""
    from sae_experiments.training.loop import TrainConfig

    plain = {
        "steps": 8,
        "batch_size": 4,
        "lr": 1e-2,
        "min_lr": 1e-3,
        "warmup_steps": 2,
        "decay": "cosine",
        "decay_from": 0.0,
        "optimizer": "adam",
        "muon_lr": 1e-2,
        "betas": (0.9, 0.99),
        "eps": 1e-8,
        "weight_decay": 0.1,
        "clip": 1.0,
        "log_every": 1,
        "eval_every": 3,
        "checkpoint_every_s": 0.0,
    }
    return TrainConfig(**(plain | changes))


#: ``train`` of an LMSpec: the numbers of ``train_config``.
LM_TRAIN = {
    "steps": 150,
    "batch_size": 16,
    "lr": 1e-2,
    "min_lr": 1e-3,
    "warmup_steps": 10,
    "eval_every": 50,
    "decay": "cosine",
    "decay_from": 0.0,
    "optimizer": "muon",
    "muon_lr": 1e-2,
    "betas": [0.9, 0.99],
    "eps": 1e-8,
    "weight_decay": 0.1,
    "clip": 1.0,
    "log_every": 50,
    "checkpoint_every_s": 1000.0,
}


def lm_spec(**changes: Any) -> Any:
    """A tiny LMSpec, but for ``changes``; ``train`` is merged."""
    from sae_experiments.models.gpt2 import LMSpec

    plain = {
        "n_layer": 3,
        "n_head": 2,
        "n_embd": 16,
        "n_positions": 16,
        "dropout": 0.0,
        "activation_function": "gelu_pytorch_tanh",
        "freeze_bias": True,
        "precision": "fp32",
        "compile": False,
        "eval_batches": 4,
        "curve_batches": 2,
        "samples": 1,
        "sample_length": 8,
        "prompt": " ",
        "temperature": 0.8,
        "top_k": 200,
        "muon_writes_from": 1,
        "adam_writes_lr": 0.3,
    }
    return LMSpec(**(plain | changes | {"train": LM_TRAIN | changes.get("train", {})}))


def corpus_spec(path: Path, **changes: Any) -> Any:
    """A corpus that is the text at ``path``."""
    from sae_experiments.corpora.corpus import CorpusSpec

    plain = {
        "name": "made",
        "sources": [],
        "bytes": None,
        "sha256": None,
        "local_names": [],
        "head": None,
        "file": str(path),
        "encoding": "utf-8",
    }
    plain |= {
        "val_frac": 0.1,
        "test_frac": 0,
        "seeds": [0],
        "stand_in": "never",
        "stand_in_alphabet": "text8",
        "recipe": {},
    }
    return CorpusSpec(**(plain | changes))


@dataclass(frozen=True)
class Experiment:
    """``python experiment.py`` in a folder of its own, with its own cache and no network."""

    here: Path
    corpus_file: Path

    @property
    def runs(self) -> Path:
        return self.here / "runs"

    @property
    def cache(self) -> Path:
        return self.here / "cache"

    def command(self, *args: str, tiny: bool = True) -> list[str]:
        """The command line; with ``tiny`` it is the small run on the made text, which ``args``
        change.
        """
        small = (
            [
                *TINY.split(),
                "data=[text8]",
                f"data.text8.file={self.corpus_file}",
                "data.text8.head=null",
            ]
            if tiny
            else []
        )
        return [sys.executable, str(ROOT / "experiment.py"), *small, *args]

    def environment(self) -> dict[str, str]:
        clean = {
            k: v for k, v in os.environ.items() if not k.startswith(("SAE_", "WANDB_", "HYDRA_"))
        }
        nowhere = "http://127.0.0.1:9"  # nothing listens there
        return clean | {
            "SAE_CACHE": str(self.cache),
            "OMP_NUM_THREADS": "1",
            "https_proxy": nowhere,
            "http_proxy": nowhere,
        }

    def __call__(
        self, *args: str, tiny: bool = True, timeout: float = 120
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*args, tiny=tiny),
            cwd=self.here,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def start(self, *args: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self.command(*args),
            cwd=self.here,
            env=self.environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def json(self, *parts: str) -> Any:
        """A JSON file below the runs."""
        return json.loads(self.runs.joinpath(*parts).read_text(), parse_constant=_refuse)

    def made(self, kind: str) -> set[str]:
        """The folders of one kind in the cache."""
        return (
            {p.name for p in (self.cache / kind).iterdir() if p.is_dir()}
            if (self.cache / kind).exists()
            else set()
        )


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")

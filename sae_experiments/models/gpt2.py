"""GPT-2 on characters or on tokens of its own: building, training and evaluation.

Models from a directory are in `models.local`, so that a change to one module does not invalidate
the caches of the other.
"""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel
from transformers.activations import ACT2FN
from transformers.utils import logging as hf_logging

from sae_experiments.cache import entry
from sae_experiments.conditions import OF_MODEL, OF_MODEL_TIME
from sae_experiments.console import took
from sae_experiments.corpora.corpus import CharCorpus, shifted
from sae_experiments.corpora.tokens import TokenCorpus
from sae_experiments.errors import UserError
from sae_experiments.files import read_json, write_json
from sae_experiments.metric_info import MetricInfo
from sae_experiments.models import hub  # noqa: F401 (keeps transformers from the network)
from sae_experiments.models.cpu_kernels import use_cheap_paths
from sae_experiments.models.decoding import StaticDecoder, generate
from sae_experiments.models.device_text import DeviceText
from sae_experiments.models.layouts import CausalLM, moved
from sae_experiments.models.tokens import N_BYTES, Tokenizer, copy_tokenizer
from sae_experiments.models.windows import whole_windows
from sae_experiments.resources import Need, cpu_has_bf16
from sae_experiments.source import source_digest
from sae_experiments.training.loop import (
    Group,
    History,
    Learner,
    Loss,
    Phase,
    Session,
    StepInfo,
    TrainConfig,
    seed_of,
    train,
)
from sae_experiments.training.recorded import BACKENDS, RecordedSteps

hf_logging.disable_progress_bar()
#: Name of the key/value cache; transformers renamed the argument and will drop its old name.
CACHE = (
    "cache"
    if "cache" in inspect.signature(GPT2LMHeadModel.forward).parameters
    else "past_key_values"
)


def empty_cache(model: CausalLM) -> DynamicCache:
    """A key/value cache for the argument `CACHE` of a language model."""
    return DynamicCache(config=model.config)


INFO = [
    MetricInfo(
        name="final_train_loss",
        title="train loss",
        formula="mean cross-entropy of random training batches after the last step",
        unit="nat/char",
        better="down",
        depends=OF_MODEL,
    ),
    MetricInfo(
        name="best_val_loss",
        title="val loss",
        formula="least mean cross-entropy of random validation batches",
        unit="nat/char",
        better="down",
        depends=OF_MODEL,
    ),
    MetricInfo(
        name="total_train_time",
        title="LM time",
        formula="seconds of language-model training, evaluations included",
        unit="s",
        better="down",
        depends=OF_MODEL_TIME,
    ),
    MetricInfo(
        name="avg_inference_tokens_per_second",
        title="chars/s",
        formula="characters generated per second, mean over samples made one by one",
        unit="1/s",
        better="up",
        shown=False,
        depends=OF_MODEL_TIME,
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class LMSpec:
    """A GPT-2 and the recipe of its training."""

    n_layer: int
    """Blocks."""
    n_head: int
    """Attention heads per block."""
    n_embd: int
    """Width of the residual stream."""
    n_positions: int
    """Characters or tokens per window."""
    dropout: float
    """Probability of dropout, everywhere in the model."""
    activation_function: str
    """Activation function of the MLPs, under the name that transformers uses."""
    freeze_bias: bool
    """Keep every bias of the blocks at zero: a GPT-2 without biases."""
    train: dict[str, Any]
    """Fields of `TrainConfig`; those that are null come from the recipe of the corpus."""
    precision: str
    """fp32, bf16 (autocast), or auto: bf16 where the device multiplies it faster and the model is
    wide enough for that to pay."""
    compile: bool
    """Compile the model for training."""
    muon_writes_from: int
    """With Muon, blocks below this number leave the matrices that write into the residual stream to
    AdamW. Muon gives every direction of the stream equal weight, and an SAE there needs far more
    latents."""
    adam_writes_lr: float
    """Learning rate of those matrices, as a fraction of AdamW's."""
    eval_batches: int
    """Random batches of each split in an evaluation that is reported."""
    curve_batches: int
    """Random batches of each split in an evaluation during training."""
    samples: int
    """Samples that are generated to time inference."""
    sample_length: int
    """Characters of a sample."""
    prompt: str
    """Text that samples continue."""
    temperature: float
    """Temperature of the sampling."""
    top_k: int
    """Number of most probable characters that are sampled from."""
    tied: bool = True
    """The output matrix is the token embedding."""
    embedding_std: float | None = None
    """Standard deviation with which embeddings and output matrix are drawn; None: GPT-2's 0.02."""
    backend: str = "auto"
    """Way to make steps: `device` records them as CUDA graphs, with the text on the device; host;
    auto: host, until the other has been measured on a GPU."""
    vocab_size: int | None = None
    """Tokens of byte-pair encoding, trained on the text; None: characters."""

    def __post_init__(self) -> None:
        for name in (
            "n_layer",
            "n_head",
            "n_embd",
            "eval_batches",
            "curve_batches",
            "sample_length",
            "top_k",
        ):
            if getattr(self, name) < 1:
                raise UserError(f"lm.{name}={getattr(self, name)} must be at least 1")
        if self.n_positions < 2:
            raise UserError(
                f"lm.n_positions={self.n_positions} must be at least 2: a window needs a context"
            )
        if self.n_embd % self.n_head:
            raise UserError(
                f"lm.n_embd={self.n_embd} must be a multiple of lm.n_head={self.n_head}"
            )
        if self.precision not in ("auto", "fp32", "bf16"):
            raise UserError(f"lm.precision={self.precision!r} is not one of auto, fp32, bf16")
        self._check_backend()
        if not 0 <= self.dropout < 1:
            raise UserError(f"lm.dropout={self.dropout} must lie in [0, 1)")
        if self.activation_function not in ACT2FN:
            raise UserError(
                f"lm.activation_function={self.activation_function!r} is not one that transformers"
                " knows, for example gelu_pytorch_tanh, gelu, relu"
            )
        if self.embedding_std is not None and not self.embedding_std > 0:
            raise UserError(
                f"lm.embedding_std={self.embedding_std} must be positive, or null for GPT-2's own"
            )
        if self.vocab_size is not None and not N_BYTES < self.vocab_size <= 1 << 16:
            raise UserError(
                f"lm.vocab_size={self.vocab_size} must lie between {N_BYTES + 1} and 65,536"
            )
        if not self.temperature > 0:
            raise UserError(f"lm.temperature={self.temperature} must be positive")

    def _check_backend(self) -> None:
        if self.backend not in BACKENDS:
            raise UserError(f"lm.backend={self.backend!r} is not one of {', '.join(BACKENDS)}")
        muon = (self.train or {}).get("optimizer") == "muon"
        if self.backend == "device" and (self.compile or muon):
            cause = "lm.compile=true" if self.compile else "lm.train.optimizer=muon"
            raise UserError(f"lm.backend=device cannot record steps with {cause}: change either")

    def train_config(self, recipe: dict[str, Any]) -> TrainConfig:
        """Training settings for one corpus, whose recipe fills in what `train` leaves null."""
        return TrainConfig(**{**recipe, **{k: v for k, v in self.train.items() if v is not None}})


class TrainedLM(NamedTuple):
    """A language model in eval mode, trained here or loaded."""

    model: CausalLM
    """The model."""
    metrics: dict[str, float | None]
    """Its losses and speed, by metric."""
    history: History
    """Curves of its training; empty for a model that was loaded."""
    folder: Path
    """Directory that `from_pretrained` reads it from."""
    key: dict[str, Any]
    """Cache key of everything that is made from it."""
    seconds: float
    """Time of its training."""
    cut: bool
    """True if the deadline ended the training early."""
    from_cache: bool = False
    """True if it was trained by an earlier run."""

    @property
    def headline(self) -> str:
        """Its loss and the time of its training, for the terminal."""
        loss = f"val loss {self.metrics['best_val_loss']:.4f}"
        spent = took("trained", self.seconds, from_cache=self.from_cache)
        return f"{loss} ({spent})" if self.history else loss


#: Bytes of activations per position, block and unit of width at the peak of a training step.
STREAM_BYTES = 84
#: Bytes that attention keeps per pair of positions at that time, by (bf16, dropout).
PAIR_BYTES = {(True, False): 5, (True, True): 12, (False, True): 18, (False, False): 0}


def training_need(spec: LMSpec, cfg: TrainConfig, vocab_size: int, device: torch.device) -> Need:
    """Peak memory of training, accurate to about a third, and the operations of all steps.

    On a CPU in bf16 or with dropout, attention keeps its weights for every pair of positions.
    """
    rows = cfg.batch_size * spec.n_positions
    of_blocks = 12 * spec.n_layer * spec.n_embd**2
    n_params = of_blocks + (spec.n_positions + vocab_size) * spec.n_embd
    bf16 = autocast(device, spec.precision, spec.n_embd) is not nullcontext
    each = PAIR_BYTES[bf16, spec.dropout > 0] if device.type == "cpu" else 0
    memory = {
        "attention": each * spec.n_layer * spec.n_head * rows * (spec.n_positions / 2),
        "activations": STREAM_BYTES * spec.n_layer * spec.n_embd * rows,
        "logits": 12 * vocab_size * rows,
        "weights and optimiser": 16 * n_params,
    }
    per_row = of_blocks + vocab_size * spec.n_embd + spec.n_layer * spec.n_embd * spec.n_positions
    return Need(memory, work=float(cfg.steps * 6 * rows * per_row))


def build_lm(spec: LMSpec, vocab_size: int, *, seed: int) -> GPT2LMHeadModel:
    """An untrained GPT-2 with GPT-2's own initialisation, drawn from a seed.

    Projections into the residual stream are scaled by `1 / sqrt(2 n_layer)`.
    """
    config = GPT2Config(
        vocab_size=vocab_size,
        n_layer=spec.n_layer,
        n_head=spec.n_head,
        n_embd=spec.n_embd,
        n_positions=spec.n_positions,
        resid_pdrop=spec.dropout,
        embd_pdrop=spec.dropout,
        attn_pdrop=spec.dropout,
        activation_function=spec.activation_function,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
        tie_word_embeddings=spec.tied,
    )
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(config)
    if spec.embedding_std is not None:
        tables: list[nn.Module] = [model.transformer.wte, model.transformer.wpe]
        if not spec.tied:
            tables.append(model.lm_head)
        for table in tables:
            nn.init.normal_(table.get_parameter("weight"), std=spec.embedding_std)
    use_cheap_paths(model)
    if spec.freeze_bias:
        for name, p in model.named_parameters():
            if name.endswith(".bias"):
                p.requires_grad_(False).zero_()
    return model


def autocast(
    device: torch.device, precision: str, width: int, *, recorded: bool = False
) -> Callable[[], AbstractContextManager[Any]]:
    """Context of mixed precision for a model of this width; in fp32 it does nothing.

    Args:
        device: Device of the model.
        precision: fp32, bf16 or auto, as in `LMSpec`.
        width: Width of the residual stream.
        recorded: Steps are recorded, see `training.recorded`.
    """
    if precision == "auto":
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported()
        else:
            fast = device.type == "cpu" and width >= 256 and cpu_has_bf16()
        precision = "bf16" if fast else "fp32"
    if precision == "fp32":
        return nullcontext
    # A cache of converted weights would be part of a recorded step, and grow old.
    return lambda: torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=not recorded)


class LMLearner(Learner):
    """Next-character cross-entropy in nats, with dropout drawn from (seed, step)."""

    def __init__(
        self,
        model: GPT2LMHeadModel,
        corpus: CharCorpus | TokenCorpus,
        spec: LMSpec,
        cfg: TrainConfig,
        *,
        seed: int,
    ) -> None:
        super().__init__("lm", model, cfg, seed=seed)
        self.model = model
        self.corpus = corpus
        self.spec = spec
        self.device = next(model.parameters()).device
        self.autocast = autocast(
            self.device, spec.precision, spec.n_embd, recorded=spec.backend == "device"
        )
        self.forward = torch.compile(model) if spec.compile else model
        self.recorded = spec.backend == "device"
        self._evaluated: Callable[[Any], Tensor] = self._mean_loss
        if self.recorded:
            self._evaluated = RecordedSteps(self._mean_loss, [], self.device)
        # The text of each split, on the device.
        self._ids: dict[str, DeviceText] = {}

    def phases(self) -> list[Phase]:
        kinds = ("muon", "writes", "matrices", "vectors")
        groups: dict[str, list[nn.Parameter]] = {kind: [] for kind in kinds}
        for name, p in self.module.named_parameters():
            if p.requires_grad:
                groups[self._kind(name, p)].append(p)
        factor = self.spec.adam_writes_lr if self.cfg.optimizer == "muon" else 1.0
        chosen = [
            Group(groups["muon"], decay=True, muon=True),
            Group(groups["writes"], factor, decay=True),
            Group(groups["matrices"], decay=True),
            Group(groups["vectors"]),
        ]
        return [Phase("train", 1.0, [g for g in chosen if g.params])]

    def _kind(self, name: str, p: nn.Parameter) -> str:
        """The group of parameters that one belongs to."""
        if p.ndim < 2:
            return "vectors"
        if ".h." not in name:
            return "matrices"
        block = int(name.split(".h.")[1].split(".")[0]) + 1
        writes = ".c_proj." in name and block < self.spec.muon_writes_from
        return "writes" if writes else "muon"

    def loss(self, batch: tuple[Tensor, Tensor], info: StepInfo) -> Loss:
        loss = self._mean_loss(batch)
        return Loss(loss, {"train_loss": loss.detach()})

    def _mean_loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Mean loss of a batch of ids and next ids (B, T)."""
        x, y = batch
        windows = whole_windows() if self.recorded else nullcontext()
        with windows, self.autocast():
            logits = self.forward(input_ids=x, use_cache=False).logits
        return F.cross_entropy(logits.view(-1, logits.shape[-1]).float(), y.view(-1))

    def seed_step(self, info: StepInfo) -> None:
        if self.spec.dropout:
            torch.manual_seed(seed_of(self.seed, "dropout", info.step))

    def evaluate(self, step: int) -> dict[str, float]:
        batches = self.spec.eval_batches if step == self.cfg.steps else self.spec.curve_batches
        suffix = "" if batches == self.spec.eval_batches else "_quick"
        return {f"eval_{s}_loss{suffix}": self.mean_loss(s, batches) for s in ("train", "val")}

    @torch.no_grad()
    def mean_loss(self, split: str, batches: int) -> float:
        """Mean loss over `batches` random batches of a split, the same ones at every call."""
        self.module.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for i in range(batches):
            total += self._evaluated(self.batch(split, i, "eval"))
        return (total / batches).item()

    def batch(self, split: str, step: int, purpose: str) -> tuple[Tensor, Tensor]:
        """Ids and next ids (B, T) of a step; each purpose has random batches of its own."""
        drawn: dict[str, Any] = {
            "rows": self.cfg.batch_size,
            "length": self.spec.n_positions,
            "seed": seed_of(self.seed, purpose),
        }
        if not self.recorded:
            x, y = self.corpus.batch_at(split, step, **drawn)
            return x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
        if split not in self._ids:
            self._ids[split] = DeviceText(self.corpus.splits[split], self.device)
        starts = self.corpus.starts_at(split, step, **drawn)
        return shifted(self._ids[split].windows(starts, self.spec.n_positions + 1))


def train_lm(
    spec: LMSpec,
    corpus: CharCorpus | TokenCorpus,
    recipe: dict[str, Any],
    *,
    seed: int,
    cache: Path,
    device: torch.device,
    session: Session,
    tokenizer: Tokenizer | None = None,
) -> TrainedLM:
    """Train a language model, or take it from the cache.

    Training continues where a killed process stopped.

    Args:
        spec: The model.
        corpus: The text.
        recipe: Training settings for the fields that `spec.train` leaves null.
        seed: Seed of weights, batches, dropout and samples.
        cache: Folder of the cache.
        device: Device of the model.
        session: Log, progress and deadline.
        tokenizer: The tokenizer of the corpus, which is kept with the model. None: characters.
    """
    cfg = spec.train_config(recipe)
    key = {
        "what": "lm",
        "spec": _as_json(spec) | {"train": _as_json(cfg)},
        "corpus": corpus.key,
        "seed": seed,
        "device": device.type,
        "source": source_digest(__name__),
        "torch": torch.__version__,
    }
    folder, was_there = entry(
        cache,
        "lms",
        key,
        lambda part: _make(part, spec, corpus, cfg, seed, device, session, tokenizer),
    )
    info = read_json(folder / "info.json")
    if info["cut"]:
        key = key | {"cut": info["step"]}
    model = moved(GPT2LMHeadModel.from_pretrained(folder), device).eval()
    history = [tuple(row) for row in info["history"]]
    return TrainedLM(
        model,
        info["metrics"],
        history,
        folder,
        key,
        info["seconds"],
        info["cut"],
        from_cache=was_there,
    )


def _make(
    part: Path,
    spec: LMSpec,
    corpus: CharCorpus | TokenCorpus,
    cfg: TrainConfig,
    seed: int,
    device: torch.device,
    session: Session,
    tokenizer: Tokenizer | None,
) -> bool:
    """Train a model into a folder of the cache; true if it is whole, and not cut short."""
    model = moved(build_lm(spec, corpus.vocabulary, seed=seed_of(seed, "lm")), device)
    learner = LMLearner(model, corpus, spec, cfg, seed=seed)
    checkpoint = part / "checkpoint.safetensors"
    progress = train(
        [learner],
        lambda step: learner.batch("train", step, "train"),
        cfg,
        Session(session.log, session.tick, checkpoint, session.deadline),
    )
    if progress.cut:
        progress.history += [(progress.step, k, v) for k, v in _final_evaluation(learner).items()]
    final = {name: value for _, name, value in progress.history}
    val = [v for _, name, v in progress.history if name == "eval_val_loss"]
    metrics = {
        "final_train_loss": final["eval_train_loss"],
        "best_val_loss": min(val),
        "total_train_time": progress.seconds,
        "avg_inference_tokens_per_second": sampling_rate(model, corpus, spec, seed=seed),
    }
    model.save_pretrained(part)
    if tokenizer is None:
        write_json(part / "symbols.json", corpus.symbols)
    else:
        copy_tokenizer(tokenizer, part)
    write_json(
        part / "info.json",
        {
            "metrics": metrics,
            "history": progress.history,
            "seconds": progress.seconds,
            "cut": progress.cut,
            "step": progress.step,
        },
    )
    if not progress.cut:
        checkpoint.unlink(missing_ok=True)
    return not progress.cut


def _final_evaluation(learner: LMLearner) -> dict[str, float]:
    """The numbers of the last evaluation, for training that was cut short of it."""
    return {
        f"eval_{s}_loss": learner.mean_loss(s, learner.spec.eval_batches) for s in ("train", "val")
    }


def _as_json(value: Any) -> dict[str, Any]:
    """A dataclass as JSON holds it."""
    return json.loads(json.dumps(asdict(value), default=str))


def _prompt_id(corpus: CharCorpus | TokenCorpus, prompt: str) -> int:
    """First id of the prompt; 0 for one that the corpus does not have."""
    if isinstance(corpus, TokenCorpus):
        return int(next(iter(corpus.encode(prompt)), 0))
    return corpus.symbols.index(prompt) if prompt in corpus.symbols else 0


def sampling_rate(
    model: GPT2LMHeadModel, corpus: CharCorpus | TokenCorpus, spec: LMSpec, *, seed: int
) -> float | None:
    """Characters generated per second, mean over samples that are made one by one.

    None without samples.
    """
    if not spec.samples:
        return None
    device = next(model.parameters()).device
    prompt = torch.tensor([[_prompt_id(corpus, spec.prompt)]], device=device)
    generator = torch.Generator(device).manual_seed(seed_of(seed, "sample"))
    decoder = StaticDecoder(model, len(prompt), recorded=spec.backend == "device")
    rates = []
    for _ in range(spec.samples):
        start = time.perf_counter()
        generate(
            decoder,
            prompt,
            spec.sample_length,
            temperature=spec.temperature,
            top_k=spec.top_k,
            generator=generator,
        )
        if device.type == "cuda":
            torch.cuda.synchronize()
        rates.append(spec.sample_length / (time.perf_counter() - start))
    return sum(rates) / len(rates)

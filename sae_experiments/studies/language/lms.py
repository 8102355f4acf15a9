"""The language model of the study and its text: trained here, or pretrained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from sae_experiments.cache import cached
from sae_experiments.corpora.corpus import CharCorpus, CorpusSpec, load_corpus, source_of
from sae_experiments.corpora.documents import HubSpec, Source, SplitSpec, TextSpec
from sae_experiments.corpora.tokens import TokenCorpus, encoded
from sae_experiments.errors import UserError, of_type
from sae_experiments.files import read_json, write_json
from sae_experiments.metric_info import MetricInfo
from sae_experiments.models.gpt2 import LMSpec, TrainedLM, train_lm
from sae_experiments.models.layouts import CausalLM, Sizes
from sae_experiments.models.pretrained import (
    Checked,
    PretrainedSpec,
    check_pretrained,
    load_pretrained,
)
from sae_experiments.models.tokens import Tokenizer, trained_tokenizer
from sae_experiments.sampling import spread
from sae_experiments.source import source_digest
from sae_experiments.studies.base import Context
from sae_experiments.training.loop import Session

#: Symbols of a character corpus, before it is read: as many as there are bytes.
SYMBOLS = 256
#: Windows that a pretrained model reads at a time.
BATCH = 8
#: Numbers of a language model that only training it here gives.
OF_TRAINING = ("total_train_time", "avg_inference_tokens_per_second")

DataSpec = CorpusSpec | TextSpec | HubSpec
Corpus = CharCorpus | TokenCorpus


class ReadyText(NamedTuple):
    """A text that the language model can read."""

    corpus: Corpus
    tokenizer: Tokenizer | None
    """The tokenizer that was trained on it, to be kept with the model; else None."""


def sizes_of_lm(lm: LMSpec | Checked) -> Sizes:
    """Sizes of the language model."""
    if isinstance(lm, Checked):
        return lm.sizes
    return Sizes(
        n_layer=lm.n_layer,
        width=lm.n_embd,
        inner=4 * lm.n_embd,
        context=lm.n_positions,
        vocabulary=lm.vocab_size or SYMBOLS,
    )


def checked_lm(
    lm: LMSpec | PretrainedSpec, data: Mapping[str, DataSpec], *, offline: bool
) -> LMSpec | Checked:
    """Check the language model and that it can read the texts; nothing is computed.

    Raises:
        UserError: It cannot be used.
    """
    if isinstance(lm, PretrainedSpec):
        return check_pretrained(lm, offline=offline)
    for name, spec in data.items():
        if lm.vocab_size is None and not isinstance(spec, CorpusSpec):
            raise UserError(
                f"data={name} is read as tokens: use lm=pretrained or lm=gpt2_bpe, or read the "
                "characters of a file of your own with data.shakespeare_char.file"
            )
        lm.train_config(spec.recipe)
    return lm


def ready_text(lm: LMSpec | Checked, spec: DataSpec, ctx: Context, *, offline: bool) -> ReadyText:
    """Find, fetch and encode a text.

    Raises:
        UserError: The text cannot be obtained, or is too short.
    """
    if isinstance(lm, LMSpec) and lm.vocab_size is None:
        of_text = of_type(spec, CorpusSpec)  # see `checked_lm`
        corpus = load_corpus(of_text, cache=ctx.cache, offline=offline, say=ctx.console.say)
        return ReadyText(corpus, None)
    split, source = _source(spec, ctx, offline=offline)
    if isinstance(lm, LMSpec):
        own = tokenizer = trained_tokenizer(
            lambda: _training_text(source), lm.vocab_size or 0, key=source.key, cache=ctx.cache
        )
        length = lm.n_positions
    else:
        own, tokenizer = None, lm.tokenizer
        length = lm.spec.n_positions
    corpus = _encoded(split, source, tokenizer, ctx)
    windows = {name: len(corpus.window_starts(name, length)) for name in corpus.splits}
    about = {"begin_token": _about_begin(lm, windows)}
    return ReadyText(replace(corpus, provenance=corpus.provenance | about), own)


def _source(spec: DataSpec, ctx: Context, *, offline: bool) -> tuple[SplitSpec, Source]:
    if isinstance(spec, SplitSpec):
        return spec, spec.source()
    corpus = load_corpus(spec, cache=ctx.cache, offline=offline, say=ctx.console.say)
    split = SplitSpec(
        name=spec.name,
        column="text",
        across=False,
        separator="",
        val_frac=spec.val_frac,
        test_frac=spec.test_frac,
        seeds=spec.seeds,
        recipe=spec.recipe,
    )
    return split, source_of(corpus, spec)


def _training_text(source: Source) -> Iterable[str]:
    """Training text of a tokenizer: the training split, or all of a text without splits."""
    for split, documents in source.parts():
        if split in (None, "train"):
            yield from (piece.text for piece in documents)


def _encoded(split: SplitSpec, source: Source, tokenizer: Tokenizer, ctx: Context) -> TokenCorpus:
    with ctx.console.stage(f"encode {split.name}"):
        return encoded(
            split,
            source,
            tokenizer.encode,
            tokenizer.pieces,
            tokenizer=tokenizer.key,
            cache=ctx.cache,
        )


def _about_begin(lm: LMSpec | Checked, windows: Mapping[str, int]) -> dict[str, Any] | None:
    """Entry of the manifest about the token before each window; None if there is none."""
    if isinstance(lm, LMSpec) or lm.begin is None:
        return None
    return {
        "id": lm.begin,
        "text": lm.tokenizer.pieces[lm.begin],
        "left_out_of_rows_and_metrics": dict(windows),
    }


class Models:
    """The language models of a run: trained per cell, or loaded once."""

    def __init__(self, lm: LMSpec | Checked) -> None:
        self.lm = lm
        self._loaded: tuple[CausalLM, dict[str, Any]] | None = None

    def prepare(self, ctx: Context) -> None:
        """Load a pretrained model, so that one that cannot be used ends the run at once."""
        if isinstance(self.lm, Checked):
            self._load(self.lm, ctx)

    def _load(self, lm: Checked, ctx: Context) -> tuple[CausalLM, dict[str, Any]]:
        if self._loaded is None:
            with ctx.console.stage("load language model"):
                model, key, notes = load_pretrained(lm, ctx.device)
            for note in notes:
                ctx.console.say(f"  {note}")
            self._loaded = model, key
        return self._loaded

    def of(
        self, text: ReadyText, recipe: dict[str, Any], seed: int, ctx: Context, session: Session
    ) -> TrainedLM:
        """The model of a cell, with its losses on the text."""
        if isinstance(self.lm, LMSpec):
            return train_lm(
                self.lm,
                text.corpus,
                recipe,
                seed=seed,
                cache=ctx.cache,
                device=ctx.device,
                session=session,
                tokenizer=text.tokenizer,
            )
        model, key = self._load(self.lm, ctx)
        metrics = _losses(model, key, self.lm, text.corpus, ctx.cache, session.tick)
        return TrainedLM(model, metrics, [], self.lm.folder, key, 0.0, False)


def _losses(
    model: CausalLM,
    key: Mapping[str, Any],
    lm: Checked,
    corpus: Corpus,
    cache: Path,
    tick: Callable[[int, int], None] | None,
) -> dict[str, float | None]:
    """Mean cross-entropy of a pretrained model on windows of the training and validation split."""
    full = {
        "what": "losses",
        "lm": dict(key),
        "text": corpus.key,
        "windows": lm.spec.eval_windows,
        "length": lm.spec.n_positions,
        "source": source_digest(alone=[__name__]),
    }

    def make(folder: Path) -> None:
        values = {
            name: mean_loss(model, corpus, split, lm.spec, tick)
            for name, split in (("final_train_loss", "train"), ("best_val_loss", "val"))
        }
        write_json(folder / "losses.json", values)

    return read_json(cached(cache, "losses", full, make) / "losses.json") | dict.fromkeys(
        OF_TRAINING
    )


@torch.no_grad()
def mean_loss(
    model: CausalLM,
    corpus: Corpus,
    split: str,
    spec: PretrainedSpec,
    tick: Callable[[int, int], None] | None = None,
) -> float:
    """Mean cross-entropy in nats per token over windows spread over a split."""
    length = spec.n_positions
    starts = corpus.window_starts(split, length)
    starts = starts[spread(len(starts), spec.eval_windows)]
    device = next(model.parameters()).device
    total = 0.0
    for begin in range(0, len(starts), BATCH):
        both = corpus.windows(split, starts[begin : begin + BATCH], length + 1).to(device)
        logits = model(input_ids=both[:, :-1], use_cache=False).logits.float()
        loss = F.cross_entropy(logits.flatten(0, 1), both[:, 1:].flatten(), reduction="sum")
        total += float(loss)
        if tick:
            tick(min(begin + BATCH, len(starts)), len(starts))
    return total / (len(starts) * length)


#: Metrics of a language model on tokens.
TOKEN_INFO = [
    MetricInfo(
        name="val_bits_per_byte",
        title="val bits/byte",
        formula="val loss / ln 2 / mean bytes of UTF-8 per token of the validation text",
        unit="bit/byte",
        better="down",
    ),
    MetricInfo(
        name="ce_delta_bits_per_byte",
        title="delta CE per byte",
        formula="delta CE / mean bytes of UTF-8 per token of the held-out text",
        unit="bit/byte",
        better="down",
        shown=False,
    ),
]


def in_tokens(info: MetricInfo) -> MetricInfo:
    """The description of a metric that speaks of characters, for a model that reads tokens."""
    return replace(
        info,
        title=_to_tokens(info.title),
        formula=_to_tokens(info.formula),
        unit=_to_tokens(info.unit),
    )


def _to_tokens(words: str) -> str:
    for ours, theirs in (("characters", "tokens"), ("character", "token"), ("chars", "tokens")):
        words = words.replace(ours, theirs)
    return words.replace("/char", "/token")

"""Tokenizers: loaded from a model's folder, or byte-pair encoding trained on a text."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from sae_experiments.cache import cached
from sae_experiments.errors import UserError
from sae_experiments.files import write_bytes, write_json
from sae_experiments.source import source_digest

#: Name of the file that holds a fast tokenizer.
FILE = "tokenizer.json"
#: Smallest vocabulary of byte-pair encoding: every byte is a token.
N_BYTES = 256


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokenizer:
    """Conversion of texts to token ids and back."""

    encode: Callable[[Sequence[str]], list[list[int]]]
    """Ids of each text; special tokens that are spelled out in a text count as its characters."""
    pieces: list[str]
    """Text of every id; empty for ids that the tokenizer does not have."""
    begin: int | None
    """Id of the begin-of-text token, if there is one."""
    key: Mapping[str, Any]
    """Cache key of the ids."""
    file: Path | None = None
    """`tokenizer.json`, if the tokenizer is our own."""


def spelled(pieces: Sequence[str], i: int) -> str:
    """Text of token id `i`, or `<i>` if it has none (a token that is part of a character)."""
    piece = pieces[i] if i < len(pieces) else ""
    return piece if piece.strip("\N{REPLACEMENT CHARACTER}") else f"<{i}>"


def trained_tokenizer(
    texts: Callable[[], Iterable[str]], vocab_size: int, *, key: Mapping[str, Any], cache: Path
) -> Tokenizer:
    """Byte-level byte-pair encoding of a text, trained now or taken from the cache.

    Args:
        texts: Returns the training text, in pieces.
        vocab_size: Number of tokens, 256 of which are the bytes.
        key: Everything that determines the text, for the cache key.
        cache: Folder of the cache.

    Raises:
        UserError: The text is too short for so many tokens.
    """
    full = {
        "what": "bpe",
        "vocab_size": vocab_size,
        "of": key,
        "by": tokenizers.__version__,
        "code": source_digest(alone=[__name__]),
    }

    def make(folder: Path) -> None:
        # One thread at a time gives the same merges everywhere.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        coder = tokenizers.Tokenizer(models.BPE())
        coder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        coder.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        coder.train_from_iterator(texts(), trainer)
        if coder.get_vocab_size() < vocab_size:
            raise UserError(
                f"lm.vocab_size={vocab_size} is more than the {coder.get_vocab_size()} tokens that "
                "the text gives: use a longer text or fewer tokens"
            )
        coder.save(str(folder / FILE))
        write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})

    file = cached(cache, "tokenizers", full, make) / FILE
    coder = tokenizers.Tokenizer.from_file(str(file))
    return Tokenizer(
        encode=lambda batch: [e.ids for e in coder.encode_batch(list(batch))],
        pieces=[coder.decode([i]) for i in range(vocab_size)],
        begin=None,
        key=full,
        file=file,
    )


def copy_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Put our own tokenizer into a model's folder, so that transformers finds it there."""
    if tokenizer.file is not None:
        for name in (FILE, "tokenizer_config.json"):
            write_bytes(folder / name, (tokenizer.file.parent / name).read_bytes())

"""Folders of tiny pretrained models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from sae_experiments.models.tokens import trained_tokenizer
from support.common import english
from support.layouts import made

TEXT = english(60_000)


VOCABULARY = 320


def folder_of(path: Path, *, begin: bool = True, config: Any = None, **changes: Any) -> Path:
    """A Llama of two blocks with a tokenizer trained on the text."""
    own = trained_tokenizer(lambda: [TEXT], VOCABULARY - 1, key={}, cache=path.parent / "bpe")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(own.file))
    if begin:
        fast.add_special_tokens({"bos_token": "<s>"})
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    plain = {**sizes, "vocab_size": VOCABULARY, "intermediate_size": 24}
    plain |= {"max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None}
    made(config or transformers.LlamaConfig(**{**plain, **changes})).save_pretrained(path)
    fast.save_pretrained(path)
    return path

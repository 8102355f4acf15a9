"""A causal language model from a local Hugging Face directory, and a text cut into tokens by the directory's own tokenizer.

Apart from ``lm`` the only importer of transformers: ``lm`` is about the models that are trained here, and its code names them in the cache.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub import errors as hub_errors
from safetensors import SafetensorError
from torch import nn

from sae_experiments.errors import UserError
from sae_experiments.files import read_json, sha256_file
from sae_experiments.models.layouts import LAYOUTS, Sizes, sizes_of_config
from sae_experiments.source import source_digest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a folder is a folder: nothing is looked up on a hub
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as hf_logging

CONFIG, SYMBOLS = "config.json", "symbols.json"
WEIGHTS = (".safetensors", ".bin")
#: What wrappers put into the names of weights, and what it is read as where every weight then has its place.
WRAPPED = {r"^((_orig_mod|module|model)\.)+": "", r"\._orig_mod\.": "."}
#: Causal masks that older versions of transformers stored beside the weights; they are not read.
MASKS = re.compile(r"\.attn(\.attention)?\.(masked_)?bias$")
TOKENIZERS = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model")
#: What transformers and safetensors raise for a folder that they cannot read.
LOADING = (
    OSError,
    ValueError,
    KeyError,
    RuntimeError,
    ImportError,
    TypeError,
    AttributeError,
    SafetensorError,
    getattr(hub_errors, "StrictDataclassError", OSError),
)


class LocalLM(NamedTuple):
    """A model in float32 and in eval mode, and what names it: a digest of every file that decides what it computes.

    ``notes``: what had to be mended while it was read, a line each.
    """

    model: nn.Module
    key: dict[str, Any]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenText:
    """A text as token ids, with what a corpus has: ``splits``, :meth:`windows`, ``provenance``, ``key``.

    ``pieces`` is the text of every id; ``symbols`` the same where every piece is one character, as metrics on characters need it, else [].
    """

    name: str
    splits: dict[str, np.ndarray]
    pieces: list[str]
    symbols: list[str]
    provenance: dict[str, Any]
    key: str

    def windows(self, split: str, starts: np.ndarray, length: int) -> torch.Tensor:
        """The windows of ``length`` ids that begin at ``starts``, int64 (n, length)."""
        ids = self.splits[split]
        return torch.from_numpy(
            np.lib.stride_tricks.sliding_window_view(ids, length)[
                np.asarray(starts, dtype=np.int64)
            ].astype(np.int64)
        )


def sizes_of(folder: Path, *, kinds: Sequence[str] = tuple(LAYOUTS)) -> Sizes:
    """Sizes of the model in a folder. Raises :class:`UserError`, one line, for a folder that holds no causal language model of ``kinds``."""
    if not (folder / CONFIG).is_file():
        raise UserError(f"local.folder={folder} is not a model directory: it has no {CONFIG}")
    try:
        with _quiet():
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
        sizes = sizes_of_config(config, f"local.folder={folder}")
        if config.model_type not in kinds:
            raise UserError(
                f"local.folder={folder}: model_type={config.model_type!r} is not supported here: "
                f"use one of {', '.join(kinds)}"
            )
        return sizes
    except LOADING as error:
        raise UserError(
            f"local.folder={folder}: {CONFIG} is not that of a language model ({_line(error)})"
        ) from error


def load_local(folder: Path, *, context: int, device: torch.device) -> LocalLM:
    """The model in a folder, to be read in windows of ``context`` tokens."""
    sizes = sizes_of(folder)
    if not 2 <= context <= sizes.context:
        raise UserError(
            f"local.context={context} must lie between 2 and the {sizes.context} positions of the model in {folder}"
        )
    weights = [p for p in folder.iterdir() if p.suffix in WEIGHTS]
    if not weights:
        raise UserError(
            f"local.folder={folder} is not a model directory: it has no weights ({' or '.join('*' + s for s in WEIGHTS)})"
        )
    model, notes = _loaded(folder)
    model.config.n_positions = (
        context  # under GPT-2's name, whatever the architecture calls it: how long the windows are
    )
    files = {p.name: sha256_file(p) for p in sorted([folder / CONFIG, *weights])}
    key = {
        "what": "local lm",
        "files": files,
        "context": context,
        "source": source_digest(__name__),
    }
    return LocalLM(model.to(device).eval().requires_grad_(False), key, notes)


def _loaded(folder: Path) -> tuple[nn.Module, tuple[str, ...]]:
    """The model with every weight from the files, and what was mended.

    Raises:
        UserError: a weight of the model is not in the files, or the files hold one it has no place for.
    """
    model, missing, unexpected = _read(folder)
    plain = {k: _plain(k) for k in unexpected if _plain(k) in missing}
    if not plain:
        _refuse_misplaced(folder, missing, unexpected)
        return model, ()
    model, *misplaced = _read(folder, key_mapping=WRAPPED)
    _refuse_misplaced(folder, *misplaced)
    key, name = next(iter(plain.items()))
    return model, (
        f"local.folder={folder}: the names of {len(plain)} weights carry a prefix, which is left out ({key} is {name})",
    )


def _read(folder: Path, **more: Any) -> tuple[nn.Module, list[str], list[str]]:
    """The model, names of weights that the files lack, and of those in the files without a place in the model."""
    options = {
        "dtype": torch.float32,
        "attn_implementation": "eager",
        "output_loading_info": True,
        **more,
    }
    try:
        with _quiet():
            model, info = AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True, **options
            )
    except LOADING as error:
        raise UserError(
            f"local.folder={folder} cannot be loaded as a causal language model ({_line(error)})"
        ) from error
    return (
        model,
        sorted(info["missing_keys"]),
        sorted(k for k in info["unexpected_keys"] if not MASKS.search(k)),
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Within it transformers says errors only: what matters is said here, in one line."""
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)


def _plain(key: str) -> str:
    for pattern, name in WRAPPED.items():
        key = re.sub(pattern, name, key)
    return key


def _refuse_misplaced(folder: Path, missing: list[str], unexpected: list[str]) -> None:
    told = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for names, what in ((missing, "missing"), (unexpected, "without a place in it"))
        if names
    ]
    if told:
        raise UserError(
            f"local.folder={folder}: its weights are not those of the model in {CONFIG}: {' and '.join(told)}; save the model whole again"
        )


def read_text(path: Path) -> str:
    """A text file as UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"local.text={path} cannot be read as UTF-8 text ({_line(error)})"
        ) from error


def cut(text: str, folder: Path, *, name: str, val_frac: float, vocabulary: int) -> TokenText:
    """``text`` as tokens of the folder's tokenizer (or of its ``symbols.json``, which models trained here have); the last part is for validation."""
    if (folder / SYMBOLS).is_file():
        pieces = read_json(folder / SYMBOLS)
        points = np.array([ord(s) for s in pieces], dtype=np.uint32)
        given = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        known = np.isin(given, points)
        ids = np.searchsorted(points, given[known])
        dropped = float(1 - known.mean()) if len(given) else 0.0
    else:
        ids, pieces, dropped = _tokenized(text, folder, vocabulary)
    if not len(ids) or int(ids.max()) >= vocabulary:
        raise UserError(
            f"local.text gives ids up to {int(ids.max()) if len(ids) else 'none'}, but the model in {folder} has {vocabulary} symbols"
        )
    ids = ids.astype(np.uint16 if vocabulary <= 1 << 16 else np.int32)
    border = round(len(ids) * (1 - val_frac))
    splits = {"train": ids[:border], "val": ids[border:]}
    one = all(len(p) == 1 for p in pieces) and len(set(pieces)) == len(pieces)
    digest = hashlib.sha256(ids.tobytes()).hexdigest()
    about = {
        "corpus": name,
        "stand_in": False,
        "symbols": len(pieces),
        "counts": {k: len(v) for k, v in splits.items()},
        "dropped_frac": dropped,
    }
    return TokenText(
        name=name,
        splits=splits,
        pieces=pieces,
        symbols=pieces if one else [],
        provenance=about,
        key=f"{digest}-{border}",
    )


def _tokenized(text: str, folder: Path, vocabulary: int) -> tuple[np.ndarray, list[str], float]:
    if not any(
        (folder / name).is_file() for name in TOKENIZERS
    ):  # without these, transformers makes an empty one and says nothing
        raise UserError(
            f"local.folder={folder} holds no tokenizer: put its files there ({', '.join(TOKENIZERS)})"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        ids = np.asarray(
            tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64
        )
    except LOADING as error:
        raise UserError(
            f"local.folder={folder} has a tokenizer that cannot be read ({_line(error)}): put its files there"
        ) from error
    known = min(
        len(tokenizer), vocabulary
    )  # a model may have more rows than its tokenizer has tokens
    pieces = [tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in range(known)]
    unknown = tokenizer.unk_token_id
    # GPT-2's tokenizer names its end-of-text token here too, though it has a token for every byte.
    lost = (
        0.0
        if unknown in (None, tokenizer.eos_token_id) or not len(ids)
        else float((ids == unknown).mean())
    )
    return ids, pieces + [""] * (vocabulary - known), lost


def _line(error: BaseException) -> str:
    return next(
        (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
    )[:200]

"""A causal language model and its tokenizer from a local Hugging Face directory.

Besides `models.gpt2` only this module imports transformers. The two are separate because the code
of `models.gpt2` is part of the cache keys of models that are trained here.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub import errors as hub_errors
from safetensors import SafetensorError, safe_open

from sae_experiments.corpora.corpus import window_starts, windows_of
from sae_experiments.errors import UserError, first_line
from sae_experiments.files import read_json, sha256_file
from sae_experiments.models import hub  # noqa: F401 (keeps transformers from the network)
from sae_experiments.models.layouts import LAYOUTS, CausalLM, Sizes, moved, sizes_of_config
from sae_experiments.models.tokens import Tokenizer
from sae_experiments.source import source_digest

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # isort: skip
from transformers.utils import logging as hf_logging  # isort: skip

CONFIG, SYMBOLS = "config.json", "symbols.json"
#: Kinds of files with weights. A pickle (`.bin`) is read by transformers as tensors alone.
SAFE, PICKLED = ".safetensors", ".bin"
#: Parts that wrappers put into the names of weights, and their replacements.
WRAPPED = {r"^((_orig_mod|module|model)\.)+": "", r"\._orig_mod\.": "."}
#: Causal masks that older versions of transformers stored beside the weights; they are not read.
MASKS = re.compile(r"\.attn(\.attention)?\.(masked_)?bias$")
TOKENIZERS = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model")
#: Errors that transformers and safetensors raise for a folder that they cannot read.
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
    """A model in eval mode, read from a folder."""

    model: CausalLM
    """The model, without gradients."""
    key: dict[str, Any]
    """Digests of all files that decide what it computes, and how it is run."""
    notes: tuple[str, ...] = ()
    """Remarks on what was repaired while it was read, one line each."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenText:
    """A text as token ids, in memory."""

    name: str
    """Name of the text in results."""
    splits: dict[str, np.ndarray]
    """Ids of each split."""
    pieces: list[str]
    """Text of every id."""
    symbols: list[str]
    """The pieces, if each is a single character (for metrics on characters); else empty."""
    provenance: dict[str, Any]
    """Entry of the manifest about the text."""
    key: str
    """Digest of ids and splits."""

    @property
    def vocabulary(self) -> int:
        """Number of ids."""
        return len(self.pieces)

    def window_starts(self, split: str, length: int) -> np.ndarray:
        """Starts of windows of a split, see `corpora.corpus.window_starts`."""
        return window_starts(len(self.splits[split]), length)

    def windows(self, split: str, starts: np.ndarray, length: int) -> torch.Tensor:
        """Windows of `length` ids that begin at `starts` (n,), int64 (n, length)."""
        return windows_of(self.splits[split], starts, length)


def sizes_of(
    folder: Path, *, kinds: Sequence[str] = tuple(LAYOUTS), key: str = "local.folder"
) -> Sizes:
    """Sizes of the model in a folder, from its configuration.

    Args:
        folder: A Hugging Face directory.
        kinds: Model types that may be used.
        key: Option that names the folder, for messages.

    Raises:
        UserError: The folder holds no causal language model of a known layout and of `kinds`.
    """
    where = f"{key}={folder}"
    if not (folder / CONFIG).is_file():
        raise UserError(f"{where} is not a model directory: it has no {CONFIG}{_gguf(folder)}")
    try:
        with _quiet():
            config = AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        sizes = sizes_of_config(config, where)
    except LOADING as error:
        raise UserError(
            f"{where}: {CONFIG} is not that of a language model ({first_line(error)[:200]})"
        ) from error
    if config.model_type not in kinds:
        raise UserError(
            f"{where}: model_type={config.model_type!r} is not supported here: use one of "
            f"{', '.join(kinds)}"
        )
    return sizes


def _gguf(folder: Path) -> str:
    files = sorted(p.name for p in folder.glob("*.gguf"))
    if not files:
        return ""
    return f" ({files[0]} is GGUF: load it with transformers' gguf_file=..., then save_pretrained)"


def load_local(
    folder: Path,
    *,
    context: int,
    device: torch.device,
    key: str = "local.folder",
    dtype: torch.dtype = torch.float32,
    attention: str = "eager",
    pickles: bool = True,
) -> LocalLM:
    """Load the model in a folder.

    Args:
        folder: A Hugging Face directory.
        context: Tokens per window, stored as `n_positions` of the model's configuration.
        device: Device of the model.
        key: Option that names the folder, for messages.
        dtype: Type of the weights.
        attention: Implementation of attention, by transformers' name.
        pickles: Whether weights may come from `.bin` files.

    Raises:
        UserError: The files are not those of one complete model, or the model has fewer than
            `context` positions.
    """
    sizes = sizes_of(folder, key=key)
    where = f"{key}={folder}"
    if not 2 <= context <= sizes.context:
        name = "local.context" if key == "local.folder" else "lm.n_positions"
        raise UserError(
            f"{name}={context} must lie between 2 and the {sizes.context} positions of the model "
            f"in {folder}"
        )
    files = weight_files(folder, where, pickles=pickles)
    options = {
        "dtype": dtype,
        "attn_implementation": attention,
        "output_loading_info": True,
        "trust_remote_code": False,
        "use_safetensors": None if pickles else True,
    }
    model, notes = _loaded(folder, where, options)
    # The length of the windows has GPT-2's name, whatever the architecture calls it.
    model.config.n_positions = context
    digests = {p.name: sha256_file(p) for p in sorted([folder / CONFIG, *files])}
    full = {
        "what": "local lm",
        "files": digests,
        "context": context,
        "source": source_digest(__name__),
    }
    if dtype != torch.float32 or attention != "eager":
        full |= {"dtype": str(dtype), "attention": attention}
    return LocalLM(moved(model, device).eval().requires_grad_(False), full, notes)


def weight_files(folder: Path, where: str, *, pickles: bool) -> list[Path]:
    """Files with the weights of the model in a folder.

    Raises:
        UserError: There are no files that may be read.
    """
    kinds = (SAFE, PICKLED) if pickles else (SAFE,)
    files = [p for p in folder.iterdir() if p.suffix in kinds]
    if files:
        return files
    words = " or ".join(f"*{kind}" for kind in kinds)
    more = ""
    if any(p.suffix == PICKLED for p in folder.iterdir()):
        more = ": convert its *.bin with transformers' save_pretrained"
    raise UserError(
        f"{where} is not a model directory: it has no weights ({words}){more or _gguf(folder)}"
    )


def parameters_of(folder: Path, where: str) -> int:
    """Number of parameters in the safetensors files of a folder, read from their headers.

    Raises:
        UserError: A file is damaged.
    """
    total = 0
    for path in weight_files(folder, where, pickles=False):
        try:
            with safe_open(path, framework="pt") as f:
                names = f.keys()  # safe_open is no mapping
                total += sum(int(np.prod(f.get_slice(name).get_shape())) for name in names)
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{where}: {path.name} is not a whole safetensors file "
                f"({first_line(error)[:200]}): fetch it again"
            ) from error
    return total


def _loaded(folder: Path, where: str, options: dict[str, Any]) -> tuple[CausalLM, tuple[str, ...]]:
    """The model with every weight from the files, and what was repaired.

    Raises:
        UserError: A weight of the model is not in the files, or they hold one it has no place for.
    """
    model, missing, unexpected = _read(folder, where, options)
    plain = {k: _plain(k) for k in unexpected if _plain(k) in missing}
    if not plain:
        _refuse_misplaced(where, missing, unexpected)
        return model, ()
    model, *misplaced = _read(folder, where, {**options, "key_mapping": WRAPPED})
    _refuse_misplaced(where, *misplaced)
    key, name = next(iter(plain.items()))
    note = (
        f"{where}: the names of {len(plain)} weights carry a prefix, which is left out "
        f"({key} is {name})"
    )
    return model, (note,)


def _read(
    folder: Path, where: str, options: dict[str, Any]
) -> tuple[CausalLM, list[str], list[str]]:
    """The model, names of weights that the files lack, and of those without a place in it."""
    try:
        with _quiet():
            # Two values, since the options ask for the loading information.
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True, **options
            )
            model, info = loaded
    except LOADING as error:
        raise UserError(
            f"{where} cannot be loaded as a causal language model ({first_line(error)[:200]})"
        ) from error
    unexpected = sorted(k for k in info["unexpected_keys"] if not MASKS.search(k))
    return model, sorted(info["missing_keys"]), unexpected


@contextmanager
def _quiet() -> Iterator[None]:
    """Within the context, transformers reports errors only; our own messages are single lines."""
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


def _refuse_misplaced(where: str, missing: list[str], unexpected: list[str]) -> None:
    told = []
    for names, what in ((missing, "missing"), (unexpected, "without a place in it")):
        if names:
            more = ", ..." if len(names) > 3 else ""
            told.append(f"{len(names)} {what} ({', '.join(names[:3])}{more})")
    if told:
        raise UserError(
            f"{where}: its weights are not those of the model in {CONFIG}: {' and '.join(told)}; "
            "save the model whole again"
        )


def read_text(path: Path) -> str:
    """A text file as UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"local.text={path} cannot be read as UTF-8 text ({first_line(error)[:200]})"
        ) from error


def cut(text: str, folder: Path, *, name: str, val_frac: float, vocabulary: int) -> TokenText:
    """A text as tokens of a folder's tokenizer; its last part is for validation.

    Args:
        text: The text.
        folder: A model's folder; models trained here have `symbols.json` instead of a tokenizer.
        name: Name of the text in results.
        val_frac: Fraction of the tokens that is for validation.
        vocabulary: Number of ids of the model.

    Raises:
        UserError: There is no tokenizer, or it gives ids that the model does not have.
    """
    dropped = 0.0
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
            f"local.text gives ids up to {int(ids.max()) if len(ids) else 'none'}, but the model "
            f"in {folder} has {vocabulary} symbols"
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
    """Ids and pieces of a text, and the share of the ids that stands for unknown text."""
    tokenizer = _tokenizer(folder, f"local.folder={folder}")
    given = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    ids = np.asarray(given, dtype=np.int64)
    unknown = tokenizer.unk_token_id
    lost = 0.0
    # GPT-2's tokenizer names its end-of-text token here too, though it has a token for every byte.
    if unknown not in (None, tokenizer.eos_token_id) and len(ids):
        lost = float((ids == unknown).mean())
    return ids, _pieces(tokenizer, vocabulary), lost


def _tokenizer(folder: Path, where: str) -> Any:
    """The tokenizer of transformers in a folder."""
    # Without these files transformers makes an empty one and says nothing.
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise UserError(
            f"{where} holds no tokenizer: put its files there ({', '.join(TOKENIZERS)})"
        )
    try:
        with _quiet():
            return AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
    except LOADING as error:
        raise UserError(
            f"{where} has a tokenizer that cannot be read ({first_line(error)[:200]}): "
            "put its files there"
        ) from error


def _pieces(tokenizer: Any, vocabulary: int) -> list[str]:
    """Text of every id of a model, which may have more rows than its tokenizer has tokens."""
    known = min(len(tokenizer), vocabulary)
    pieces = [tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in range(known)]
    return pieces + [""] * (vocabulary - known)


def tokenizer_of(folder: Path, *, vocabulary: int, key: str = "lm.path") -> Tokenizer:
    """The tokenizer in a model's folder.

    Args:
        folder: A Hugging Face directory.
        vocabulary: Number of ids of the model.
        key: Option that names the folder, for messages.

    Raises:
        UserError: There is none, it cannot be read, or it has more tokens than the model has ids.
    """
    where = f"{key}={folder}"
    tokenizer = _tokenizer(folder, where)
    if len(tokenizer) > vocabulary:
        raise UserError(
            f"{where}: its tokenizer has {len(tokenizer):,} tokens, but the model has "
            f"{vocabulary:,} ids: it belongs to another model"
        )

    def encode(texts: Sequence[str]) -> list[list[int]]:
        given = tokenizer(
            list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False
        )
        return given["input_ids"]

    files = sorted(p for p in folder.iterdir() if p.name in (*TOKENIZERS, "merges.txt"))
    digests = {p.name: sha256_file(p) for p in [*files, *folder.glob("tokenizer_config.json")]}
    begin = tokenizer.bos_token_id
    return Tokenizer(
        encode=encode,
        pieces=_pieces(tokenizer, vocabulary),
        begin=begin if begin is None or begin < vocabulary else None,
        key={"what": "tokenizer", "files": digests},
    )

"""A model's folder from what the user typed: a directory, or an id on the Hugging Face hub.

Everywhere else the hub is off limits: what is read lies in a folder. The network is used only for
an id that the user named, unless HF_HUB_OFFLINE or `offline=true` forbids it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub import errors as hub_errors

from sae_experiments.errors import UserError

# Child processes inherit both: the first one is what the user asked for.
os.environ.setdefault("SAE_HUB_OFFLINE", os.environ.get("HF_HUB_OFFLINE", "0"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
constants.HF_HUB_OFFLINE = True  # it may have been read from the environment before
#: Files that are fetched: no pickles, and no code.
FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model")
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_UNREACHABLE = (OSError, ValueError, hub_errors.HfHubHTTPError, hub_errors.LocalEntryNotFoundError)


def folder_of_model(path: str | None, *, key: str, offline: bool = False) -> Path:
    """The folder of a model.

    Args:
        path: A directory, or `org/name` on the hub.
        key: Name of the option, for messages.
        offline: Take a model of the hub only if it was fetched before.

    Raises:
        UserError: There is no such folder, or the hub has no such model or cannot be reached.
    """
    if not path:
        raise UserError(f"{key} names no model: give a Hugging Face directory, or org/name")
    folder = Path(path).expanduser()
    if folder.suffix == ".gguf":
        raise UserError(
            f"{key}={path} is a GGUF file: convert it once with transformers, "
            "AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=FILE, dtype='float32') and "
            "save_pretrained, the tokenizer likewise, and name the new directory"
        )
    if folder.is_dir():
        return folder
    if folder.exists() or not _ID.fullmatch(path):
        raise UserError(
            f"{key}={path} is not a directory: name one with config.json, or org/name on the hub"
        )
    return _fetched(path, key, offline or os.environ["SAE_HUB_OFFLINE"] not in ("0", ""))


def _fetched(path: str, key: str, offline: bool) -> Path:
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = offline
    try:
        return Path(
            huggingface_hub.snapshot_download(
                path, allow_patterns=list(FILES), local_files_only=offline
            )
        )
    except _UNREACHABLE as error:
        first = str(error).strip().splitlines() or [type(error).__name__]
        why = "HF_HUB_OFFLINE or offline=true, and it was not fetched before"
        raise UserError(
            f"{key}={path} is no directory here and cannot be had from the hub "
            f"({why if offline else first[0][:200]})"
        ) from error
    finally:
        constants.HF_HUB_OFFLINE = before

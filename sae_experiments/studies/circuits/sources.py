"""Sources of a circuit's parts: SAEs of directories and runs, a local language model, its text."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sae_experiments.corpora.corpus import CharCorpus
from sae_experiments.errors import UserError
from sae_experiments.files import read_json
from sae_experiments.models import local as local_lm
from sae_experiments.models.gpt2 import TrainedLM
from sae_experiments.models.hooks import Site
from sae_experiments.models.local import Sizes, TokenText
from sae_experiments.saes import saelens as interop
from sae_experiments.saes import saelens_config as saelens
from sae_experiments.saes.base import SAE
from sae_experiments.saes.loaded import NormalisedRows
from sae_experiments.studies.circuits.path import KINDS


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """Site and source of one of the two SAEs."""

    site: str | None
    """Site that it reads; None: the default."""
    write: str | None
    """Site that it reconstructs; None: the one that it reads."""
    sae: str | None
    """Its SAELens directory, or a run folder with the SAE of the cell's corpus, seed and site in
    `saes/`; None: it is fitted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalSources:
    """A language model from a directory, and its text."""

    folder: str | None
    """Directory of the model; None: one is trained."""
    text: str | None
    """File of the text; None: the corpora of `data`."""
    context: int
    """Tokens per window."""
    val_frac: float
    """Share of the text that is held out."""
    characters: int | None
    """Characters of each text that are read; None: all."""

    def __post_init__(self) -> None:
        if self.text and not self.folder:
            raise UserError(
                f"study.local.text={self.text} needs study.local.folder: a model trained here "
                "reads data=[...] or data.<name>.file"
            )
        if not 0 < self.val_frac < 1:
            raise UserError(f"study.local.val_frac={self.val_frac} must lie between 0 and 1")

    @property
    def name(self) -> str:
        """Name of the text in results."""
        return re.sub(r"[^A-Za-z0-9_.-]", "_", Path(str(self.text)).stem) or "local"

    @property
    def sizes(self) -> Sizes:
        """Sizes of the model in the folder."""
        return local_lm.sizes_of(Path(str(self.folder)).expanduser(), kinds=KINDS)

    def tokens(self, text: str, name: str) -> TokenText:
        """A text as the model's tokens."""
        folder = Path(str(self.folder)).expanduser()
        return local_lm.cut(
            text[: self.characters],
            folder,
            name=name,
            val_frac=self.val_frac,
            vocabulary=self.sizes.vocabulary,
        )

    def texts(self, corpora: Mapping[str, CharCorpus]) -> dict[str, TokenText]:
        """Texts in the model's tokens, by name.

        These are the text file if one is given, else all corpora, each with its training and
        validation splits joined and split anew.
        """
        if self.text:
            text = local_lm.read_text(Path(self.text).expanduser())
            return {self.name: self.tokens(text, self.name)}
        texts = {}
        for name, corpus in corpora.items():
            both = np.concatenate([corpus.splits["train"], corpus.splits["val"]])
            texts[name] = self.tokens(corpus.decode(both[: self.characters]), name)
        return texts

    def model(self, device: torch.device, say: Callable[[str], None]) -> TrainedLM:
        """Load the model; repairs are reported through `say`."""
        folder = Path(str(self.folder)).expanduser()
        loaded = local_lm.load_local(folder, context=self.context, device=device)
        for note in loaded.notes:
            say(f"  study.{note}")
        return TrainedLM(loaded.model, {}, [], folder, loaded.key, 0.0, False)


def load_sae(
    role: str,
    path: Path,
    dataset: str,
    seed: int,
    site: Site,
    width: int,
    say: Callable[[str], None] = lambda line: None,
) -> SAE:
    """Load the SAE of a role.

    Args:
        role: `upstream` or `downstream`, for messages.
        path: SAELens directory or run folder.
        dataset: Corpus of the SAE in a run folder.
        seed: Seed of the SAE in a run folder.
        site: Site that it must have been fitted at.
        width: Width of the site.
        say: Receives remarks about the SAE.

    Raises:
        UserError: There is no SAE, or it has another site or width.
    """
    folder = path if (path / interop.CONFIG).is_file() else _in_run(role, path, dataset, seed, site)
    sae, hook = interop.load_sae(folder), hook_of(folder)
    named = saelens.site_of_hook(hook)
    if hook and not named:
        raise UserError(
            f"study.{role}.sae={folder} was fitted at hook_name={hook!r}, which is no site here: "
            f"choose an SAE of {saelens.hook_of_site(str(site))}"
        )
    if named and named != str(site):
        raise UserError(
            f"study.{role}.sae={folder} was fitted at {named}, not at {site}: "
            f"set study.{role}.site={named}, or choose another SAE"
        )
    if sae.d_in != width:
        raise UserError(
            f"study.{role}.sae={folder} has d_in={sae.d_in}, but {site} is {width} wide: "
            "it belongs to another model or site"
        )
    if sae.transcodes or isinstance(sae, NormalisedRows):
        raise UserError(
            f"study.{role}.sae={folder} is a transcoder or normalises every row, and circuits are "
            "followed through neither: choose an SAE of plain activations"
        )
    for note in interop.remarks(folder, sae, str(site)):
        say(f"  study.{role}.sae: {note}")
    return sae


def _in_run(role: str, path: Path, dataset: str, seed: int, site: Site) -> Path:
    """The SAE directory of a run folder that fits the cell and the site."""
    if not (path / "saes").is_dir():
        raise UserError(
            f"study.{role}.sae={path} is neither an SAE directory ({interop.CONFIG}, "
            f"{interop.WEIGHTS}) nor a run with SAEs"
        )
    name = re.compile(rf"{re.escape(dataset)}(\..+)?_{seed}")
    of_cell = [p for p in sorted((path / "saes").iterdir()) if name.fullmatch(p.name)]
    of_site = [p for p in of_cell if site_of(p) == str(site)]
    if not of_site:
        known = [f"{p.name} ({site_of(p) or 'site unknown'})" for p in of_cell[:6]]
        raise UserError(
            f"study.{role}.sae={path} has no SAE of {dataset}, seed {seed} at {site}: "
            f"there is {', '.join(known) or 'none of that corpus and seed'}"
        )
    of_role = [p for p in of_site if p.name == f"{dataset}.{role}_{seed}"]
    return (of_role or of_site)[0]


def hook_of(folder: Path) -> str:
    """Hook point of an SAE directory, by its own name; empty if the directory names none."""
    path = folder / interop.CONFIG
    return saelens.hook_name(read_json(path), path) if path.is_file() else ""


def site_of(folder: Path) -> str:
    """Site of an SAE directory; empty if the directory names none that is known."""
    return saelens.site_of_hook(hook_of(folder)) or ""

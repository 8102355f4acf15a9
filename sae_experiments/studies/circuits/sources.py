"""Where a circuit's parts come from when they are not made here: SAEs from directories and runs, a language model and its text from a folder."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

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

#: Model types whose blocks can be taken apart (`blocks.Block`).
KINDS = ("gpt2", "gpt_neo")


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """Where one of the two SAEs sits (``write``: what it rebuilds, null: what it reads), and where it comes from (null: fitted here).

    ``sae``: a SAELens directory, or a run folder, in whose ``saes/`` the one of the cell's corpus, seed and site is taken.
    """

    site: str | None
    write: str | None
    sae: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalSources:
    """A language model from a directory (null: one is trained here) and the text it reads (null: the corpora of ``data``)."""

    folder: str | None
    text: str | None
    context: int
    val_frac: float
    characters: int | None  # of each text that are read (null: all)

    def __post_init__(self) -> None:
        if self.text and not self.folder:
            raise UserError(
                f"study.local.text={self.text} needs study.local.folder: a model trained here reads data=[...] or data.<name>.file"
            )
        if not 0 < self.val_frac < 1:
            raise UserError(f"study.local.val_frac={self.val_frac} must lie between 0 and 1")

    @property
    def name(self) -> str:
        """What the text is called in results."""
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
        """What the model reads, by name: the text file, or the corpora, joined and cut anew into training and validation."""
        if self.text:
            return {
                self.name: self.tokens(local_lm.read_text(Path(self.text).expanduser()), self.name)
            }
        joined = {
            name: "".join(c.decode(c.splits[s][: self.characters]) for s in ("train", "val"))
            for name, c in corpora.items()
        }
        return {name: self.tokens(text, name) for name, text in joined.items()}

    def model(self, device: torch.device, say: Callable[[str], None]) -> TrainedLM:
        """The model, as if it had been trained here; ``say`` gets what had to be mended."""
        folder = Path(str(self.folder)).expanduser()
        found = local_lm.load_local(folder, context=self.context, device=device)
        for note in found.notes:
            say(f"  study.{note}")
        return TrainedLM(found.model, {}, [], folder, found.key, 0.0, False)


def load_sae(
    role: str,
    path: Path,
    dataset: str,
    seed: int,
    site: Site,
    width: int,
    say: Callable[[str], None] = lambda line: None,
) -> SAE:
    """The SAE of a role; ``say`` gets what should be known of it. Raises :class:`UserError`, one line, where there is none, or one of another site
    or width."""
    folder = path if (path / interop.CONFIG).is_file() else _in_run(role, path, dataset, seed, site)
    sae, hook = interop.load_sae(folder), hook_of(folder)
    named = saelens.site_of_hook(hook)
    if hook and not named:
        raise UserError(
            f"study.{role}.sae={folder} was fitted at hook_name={hook!r}, which is no site here: choose an SAE of {saelens.hook_of_site(str(site))}"
        )
    if named and named != str(site):
        raise UserError(
            f"study.{role}.sae={folder} was fitted at {named}, not at {site}: set study.{role}.site={named}, or choose another SAE"
        )
    if sae.d_in != width:
        raise UserError(
            f"study.{role}.sae={folder} has d_in={sae.d_in}, but {site} is {width} wide: it belongs to another model or site"
        )
    for note in _remarks(folder, sae, hook, site):
        say(f"  study.{role}.sae: {note}")
    return sae


def _remarks(folder: Path, sae: interop.Loaded, hook: str, site: Site) -> list[str]:
    """What does not speak against an SAE but may make it the wrong one."""
    found = [*sae.notes]
    if not hook:
        found.append(f"{folder} names no hook_name: it is taken for one of {site}")
    elif site.stream in ("resid", "mlp_out") and saelens.centred_in_training(
        read_json(folder / interop.CONFIG)
    ):
        found.append(
            f"{folder} is of sae-lens before 3.19.2 or of no known version: it may expect rows less their mean over the width, which are not taken here"
        )
    return found


def _in_run(role: str, path: Path, dataset: str, seed: int, site: Site) -> Path:
    if not (path / "saes").is_dir():
        raise UserError(
            f"study.{role}.sae={path} is neither an SAE directory ({interop.CONFIG}, {interop.WEIGHTS}) nor a run with SAEs"
        )
    mine = [
        p
        for p in sorted((path / "saes").iterdir())
        if re.fullmatch(rf"{re.escape(dataset)}(\..+)?_{seed}", p.name)
    ]
    here = [p for p in mine if site_of(p) == str(site)]
    if not here:
        known = (
            ", ".join(f"{p.name} ({site_of(p) or 'site unknown'})" for p in mine[:6])
            or "none of that corpus and seed"
        )
        raise UserError(
            f"study.{role}.sae={path} has no SAE of {dataset}, seed {seed} at {site}: there is {known}"
        )
    return next((p for p in here if p.name == f"{dataset}.{role}_{seed}"), here[0])


def hook_of(folder: Path) -> str:
    """The hook point that an SAE directory names, in its own terms; "" where it names none."""
    path = folder / interop.CONFIG
    return saelens.hook_name(read_json(path), path) if path.is_file() else ""


def site_of(folder: Path) -> str:
    """The site that an SAE directory names, in the terms used here; "" where it names none that is known."""
    return saelens.site_of_hook(hook_of(folder)) or ""

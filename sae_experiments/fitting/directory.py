"""SAEs read from a SAELens directory: described and evaluated like fitted ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from sae_experiments.errors import UserError
from sae_experiments.fitting.spec import SAESpec
from sae_experiments.models.hooks import Site, Sites, parse_site
from sae_experiments.saes.base import SAE
from sae_experiments.saes.saelens import directory_digest, sites_of
from sae_experiments.training.loop import TrainConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectorySpec(SAESpec):
    """An SAE that is read from `path`, which fixes its sizes and its L0."""

    def build(self, d_in: int, d_out: int) -> SAE:
        """Read the SAE.

        Raises:
            UserError: The directory holds no SAE of these widths.
        """
        return self.model(d_in=d_in, d_out=d_out, path=self.path)

    def check(self, d_in: int, d_out: int, cfg: TrainConfig, *, loads: bool = False) -> None:
        """Raise `UserError` in a study that cannot evaluate an SAE from a directory."""
        if not loads:
            raise UserError(
                f"sae.path={self.path}: an SAE from a directory is evaluated by study=language "
                "only; circuits take one as study.upstream.sae"
            )
        # Zero-argument super() does not work in a dataclass with slots.
        SAESpec.check(self, d_in, d_out, cfg, loads=loads)

    def sites(self, default: str, n_layer: int) -> tuple[Site | Sites, Site | Sites]:
        """The sites that the directory names, or those asked for."""
        if self.path is None:
            return SAESpec.sites(self, default, n_layer)
        read_site, write_site = self.read, self.write
        one = (str, NoneType)
        if not isinstance(read_site, one) or not isinstance(write_site, one):
            raise UserError(f"sae.read={self.read}: sae=saelens reads and writes one site")
        here = str(parse_site(read_site or default, n_layer))
        names = sites_of(self.path, read_site and here, write_site, here)
        read, write = (parse_site(name, n_layer) for name in names)
        return read, write

    def describe(self) -> dict[str, Any]:
        """Digests of the files of the directory, for cache keys."""
        return {"directory": directory_digest(Path(str(self.path)).expanduser())}

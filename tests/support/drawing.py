"""Draw the figures of a study from a real run, for the tests of the studies."""

from __future__ import annotations

from pathlib import Path

from hydra.utils import instantiate
from omegaconf import OmegaConf

from sae_experiments.plots.base import NothingToDrawError, save
from sae_experiments.results.table import load_table
from support.common import CONF


def drawn(run: Path, prefix: str, out: Path) -> tuple[list[str], list[str]]:
    """Names of the figures in ``conf/plot`` with this prefix that were drawn and saved, and of
    those without anything to draw.
    """
    table, done, empty = load_table([run]), [], []
    for path in sorted((CONF / "plot").glob(f"{prefix}*.yaml")):
        try:
            save(instantiate(OmegaConf.load(path))(table), path.stem, out)
            done.append(path.stem)
        except NothingToDrawError:
            empty.append(path.stem)
    return done, empty

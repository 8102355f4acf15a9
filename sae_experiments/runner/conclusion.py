"""Closing lines of a study about a finished run, besides the tables that every run gets."""

from __future__ import annotations

from pathlib import Path

from sae_experiments.results.records import read_records
from sae_experiments.studies.base import Finished, Study


def conclusion(study: Study, folder: Path) -> list[str]:
    """Lines that a study closes a run with; none for a study without a method `conclude`.

    Args:
        study: The study.
        folder: The run folder.
    """
    conclude = getattr(study, "conclude", None)
    if conclude is None:
        return []
    wanted = {(name, cell.seed) for cell in study.cells() for name in cell.reports}
    finished = [
        Finished(
            name=record.dataset,
            seed=record.seed,
            metrics=record.metrics,
            seconds=record.seconds,
            cut=record.config_hash.endswith("-cut"),
        )
        for record in read_records(folder)
        if (record.dataset, record.seed) in wanted
    ]
    return conclude(folder, finished)

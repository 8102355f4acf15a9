"""Reading of run folders: one `Run` for each SAE of a folder.

A bad folder never raises an error: missing or damaged parts are left out with a warning line.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd

from sae_experiments.files import read_json
from sae_experiments.results import names
from sae_experiments.results.records import (
    FINAL_INFO,
    Record,
    Stat,
    load_arrays,
    mean_stderr,
    means_of,
    number,
    read_curves,
    read_records,
    statistics_of,
    try_json,
)

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"
PUBLISHED = "published"
UNFINISHED = {
    "running": "is still running",
    "failed": "failed",
    "cut": "was cut short by its time limit",
    "stopped": "was stopped",
}
KEPT_ARRAYS = 2_000_000  # bytes of the arrays of a run and dataset that are kept in memory
Stats = dict[str, dict[str, Stat]]  # by dataset and metric
Listed = dict[str, dict[str, list[float | None]]]  # values whose seeds are unknown


@dataclass(frozen=True)
class Run:
    """One SAE of one run folder, or the whole folder if it fitted one SAE or none."""

    path: Path | None
    """Run folder; None for the published baseline."""
    name: str
    """Name that is unique among the runs of a table; see `sae_experiments.results.table`."""
    label: str
    """Label of the manifest."""
    manifest: dict[str, Any]
    """Manifest of the folder."""
    records: list[Record] = field(default_factory=list)
    """Finished cells; `dataset` of each is the dataset itself, without the SAE."""
    stats: Stats = field(default_factory=dict)
    """Mean and standard error over the seeds."""
    listed: Listed = field(default_factory=dict)
    """Values of a run of which only `final_info.json` is left."""
    sae: str = ""
    """Name of the SAE in result names; empty if the folder's result names hold none."""
    folder: str = ""
    """Name of the folder, unique among the folders of a table."""

    @property
    def title(self) -> str:
        """Name in tables and figures."""
        return self.name if self.label in ("", self.name) else f"{self.name}: {self.label}"

    @property
    def sae_name(self) -> str:
        """Name of the SAE; the name of the folder if the SAE's is unknown."""
        return self.sae or names.only_sae(self.manifest) or self.folder

    @property
    def variant(self) -> str:
        """Variant of the SAE; empty if it is unknown."""
        return names.variant_of(self.sae or names.only_sae(self.manifest))

    @property
    def preset(self) -> str:
        """Preset of the run; empty if it is unknown."""
        return str(self.manifest.get("preset") or "")

    @property
    def status(self) -> str:
        """Status in the manifest; empty if it is unknown."""
        return str(self.manifest.get("status") or "")

    @property
    def config(self) -> dict[str, Any]:
        """Resolved configuration; `sae` is that of this SAE, `variant` its variant."""
        config = self.whole_config
        saes = names.sae_configs(config)
        sae = saes.get(self.sae or next(iter(saes), ""))
        own = {"sae": sae} if sae is not None else {}
        return config | own | ({"variant": self.variant} if self.variant else {})

    @property
    def whole_config(self) -> dict[str, Any]:
        """Resolved configuration of the folder, as the manifest holds it."""
        return mapping(self.manifest.get("config"))

    @property
    def device(self) -> str:
        """Kind of device that the run used."""
        return str(self.manifest.get("device") or "unknown")

    @property
    def n_seeds(self) -> int:
        """Largest number of seeds on any dataset."""
        seeds = {(record.dataset, record.seed) for record in self.records}
        return max((sum(d == name for d, _ in seeds) for name in self.stats), default=0)

    def provenance(self, dataset: str) -> dict[str, Any]:
        """Source of the text of a dataset; empty if the manifest does not tell."""
        corpora = mapping(self.manifest.get("corpora"))
        return mapping(corpora.get(names.put_together(dataset, self.sae), corpora.get(dataset)))

    def facts(self, dataset: str) -> dict[int, dict[str, Any]]:
        """Conditions of the measurements on a dataset by seed; empty if a seed lacks them."""
        if dataset not in self._facts:
            around = {"device": self.device, "held-out part": self.held_out(dataset)}
            of_dataset = [record for record in self.records if record.dataset == dataset]
            known = {record.seed: record.facts | around for record in of_dataset if record.facts}
            self._facts[dataset] = known if len(known) == len(of_dataset) else {}
        return self._facts[dataset]

    @cached_property
    def _facts(self) -> dict[str, dict[int, dict[str, Any]]]:
        return {}

    def held_out(self, dataset: str) -> str:
        """Part of a dataset that SAEs were evaluated on."""
        return str(self.provenance(dataset).get("held_out") or "val")

    def stand_in(self, dataset: str) -> bool:
        """True if other text stood in for a dataset."""
        return bool(self.provenance(dataset).get("stand_in"))

    @cached_property
    def curves(self) -> pd.DataFrame:
        """Every logged point that is not null: dataset, seed, step, name, value.

        Of the datasets in `stats` alone: a table may hold only one of a run's datasets.
        """
        rows = []
        for result_name, dataset, seed in self.cell_files("curves", ".jsonl"):
            if dataset not in self.stats:
                continue
            for step, name, value in read_curves(cast("Path", self.path), result_name, seed):
                if value is not None:
                    rows.append((dataset, seed, step, name, value))
        return pd.DataFrame(rows, columns=["dataset", "seed", "step", "name", "value"])

    def arrays(self, dataset: str) -> dict[int, dict[str, np.ndarray]]:
        """Stored arrays of a dataset by seed; small ones are read once for all figures."""
        if dataset in self._arrays:
            return self._arrays[dataset]
        stored = {}
        for result_name, of_dataset, seed in self.cell_files("arrays", ".npz"):
            if of_dataset == dataset:
                stored[seed] = load_arrays(cast("Path", self.path), result_name, seed)
        size = sum(array.nbytes for arrays in stored.values() for array in arrays.values())
        if size <= KEPT_ARRAYS:
            self._arrays[dataset] = stored
        return stored

    @cached_property
    def _arrays(self) -> dict[str, dict[int, dict[str, np.ndarray]]]:
        return {}

    def cell_files(self, folder: str, suffix: str) -> list[tuple[str, str, int]]:
        """Result name, dataset and seed of every file of this SAE in a part of the run folder."""
        if self.path is None:
            return []
        saes = names.sae_names(self.whole_config)
        cells = []
        for path in (self.path / folder).glob(f"*{suffix}"):
            cell = names.cell_of_file(path.name, suffix)
            if cell is None:
                continue
            dataset, sae = names.take_apart(cell.result_name, saes)
            if sae == self.sae:
                cells.append((cell.result_name, dataset, cell.seed))
        return sorted(cells)


def mapping(value: Any) -> dict[str, Any]:
    """The value if it is a dictionary, else an empty one."""
    return value if isinstance(value, dict) else {}


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """Run folders that `paths` are or hold, one level deep; run_2 comes before run_10.

    A path that neither is nor holds a run logs a warning.
    """
    folders: dict[Path, None] = {}  # an ordered set
    for path in paths:
        inside = runs_in(path)
        if not inside:
            log.warning("%s %s; left out", path, _what_instead(path))
        folders |= {run.resolve(): None for run in inside}
    return list(folders)


def runs_in(path: Path) -> list[Path]:
    """`path` itself if it is a run folder, else the run folders in it."""
    if is_run(path):
        return [path]
    if not path.is_dir():
        return []
    return sorted((p for p in path.iterdir() if is_run(p)), key=lambda p: natural(p.name))


def is_run(path: Path) -> bool:
    """True if the folder holds a manifest or `final_info.json`."""
    return (path / MANIFEST).is_file() or (path / FINAL_INFO).is_file()


def natural(name: str) -> list[str | int]:
    """Key that sorts numbers in names as numbers."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def load_runs(paths: Sequence[Path], labels: Mapping[str, str] | None = None) -> list[Run]:
    """Read run folders; one without any result is left out with a warning.

    Args:
        paths: Run folders.
        labels: Labels by name of the folder; they replace those of the manifests.

    Returns:
        One run for each SAE of each folder. `folder` is `parent/name` if two folders share a name.
    """
    folders = {path: runs for path in paths if (runs := _read_folder(path, labels or {}))}
    by_name: dict[str, int] = {}
    for path in folders:
        by_name[path.name] = by_name.get(path.name, 0) + 1
    loaded = []
    for path, runs in folders.items():
        unique = by_name[path.name] == 1
        name = path.name if unique else f"{path.parent.name}/{path.name}"
        loaded += [replace(run, folder=name, name=names_of(name, run.sae)) for run in runs]
    return loaded


def names_of(folder: str, sae: str) -> str:
    """Name of a run among runs of several folders."""
    return f"{folder} {sae}" if sae else folder


def published() -> Run:
    """The published baseline (`published.json`), which stands in for run_0 at full scale."""
    content = read_json(Path(__file__).with_name("published.json"))
    manifest = content["manifest"]
    stats, listed = _of_final_info(content["final_info"])
    return Run(
        path=None,
        name=PUBLISHED,
        label=manifest["label"],
        manifest=manifest,
        stats=stats,
        listed=listed,
        folder=PUBLISHED,
    )


def _read_folder(path: Path, labels: Mapping[str, str]) -> list[Run]:
    manifest = _manifest(path)
    records = read_records(path)
    status = str(manifest.get("status") or "")
    stats, listed = _results(path, records)
    if not any(stats.values()):
        log.warning("%s has no results (status %s); left out", path.name, status or "unknown")
        return []
    if status in UNFINISHED:
        log.warning(
            "%s %s: what it has finished is shown (cells: %d)",
            path.name,
            UNFINISHED[status],
            len(records),
        )
    label = str(labels.get(path.name) or manifest.get("label") or "")
    whole = Run(path, path.name, label, manifest, records, stats, listed, folder=path.name)
    return list(_by_sae(whole))


def _manifest(path: Path) -> dict[str, Any]:
    if (path / MANIFEST).exists():
        return mapping(try_json(path / MANIFEST))
    log.warning(
        "%s has no %s: its preset and corpus are unknown, so it is compared with nothing",
        path.name,
        MANIFEST,
    )
    return {}


def _results(path: Path, records: Sequence[Record]) -> tuple[Stats, Listed]:
    if records:
        return statistics_of(records), {}
    if (path / FINAL_INFO).exists():
        return _of_final_info(mapping(try_json(path / FINAL_INFO)))
    return {}, {}


def _by_sae(whole: Run) -> Iterator[Run]:
    """The parts of a folder: what belongs to no SAE, if there is any, then each SAE."""
    saes = names.sae_names(whole.whole_config)
    for sae in ["", *sorted(saes, key=natural)]:
        results = [r for r in whole.stats if names.take_apart(r, saes).sae == sae]
        if not results:
            continue
        dataset_of = {r: names.take_apart(r, saes).dataset for r in results}
        yield replace(
            whole,
            sae=sae,
            label="" if sae else whole.label,
            records=[
                replace(record, dataset=dataset_of[record.dataset])
                for record in whole.records
                if record.dataset in dataset_of
            ],
            stats={dataset_of[r]: whole.stats[r] for r in results},
            listed={dataset_of[r]: whole.listed[r] for r in results if r in whole.listed},
        )


def _of_final_info(final_info: Mapping[str, Any]) -> tuple[Stats, Listed]:
    """Statistics from the lists of `final_info.json` if it has them, else from its means."""
    stats: Stats = {}
    listed: Listed = {}
    for dataset, entry in final_info.items():
        stderrs, lists = (
            mapping(mapping(entry).get(key)) for key in ("stderrs", "final_info_dict")
        )
        for key, mean in means_of(mapping(entry)).items():
            metric = key.removesuffix("_mean")
            given = lists.get(metric)
            values = [number(v) for v in given] if isinstance(given, list) else []
            if values:
                stat = Stat(*mean_stderr(values), {})
                listed.setdefault(dataset, {})[metric] = values
            else:
                stat = Stat(number(mean), number(stderrs.get(f"{metric}_stderr")), 0, {})
            stats.setdefault(dataset, {})[metric] = stat
    return stats, listed


def _what_instead(path: Path) -> str:
    if not path.is_dir():
        return "is no folder"
    nested = sorted(p.name for p in path.iterdir() if p.is_dir() and runs_in(p))
    if nested:
        return f"holds no run itself, but {', '.join(nested)} in it does: name that folder"
    return "holds no run"

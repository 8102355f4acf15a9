"""Many runs side by side: find the folders, read them, choose the baseline, and say which runs may be compared (no torch).

Nothing here fails because of one bad run: what is missing or damaged is one warning line and is left out.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sae_experiments import conditions
from sae_experiments.errors import UserError
from sae_experiments.files import read_json
from sae_experiments.results.records import (
    FINAL_INFO,
    Record,
    Stat,
    aggregate,
    load_arrays,
    mean_stderr,
    number,
    read_curves,
    read_records,
    statistics_of,
    try_json,
)

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"
BASELINE = "run_0"
PUBLISHED = "published"


@dataclass(frozen=True)
class Run:
    """One run folder, read. ``stats`` is ``{dataset: {metric: Stat}}``; of the published baseline only means are known."""

    path: Path | None  # None: the published baseline
    name: str  # unique among the runs of a table
    label: str
    manifest: dict[str, Any]
    records: list[Record]
    final_info: dict[str, Any]
    stats: dict[str, dict[str, Stat]]
    sae: str = ""  # the SAE, in one of the parts that :meth:`by_sae` makes of a run with several

    @property
    def title(self) -> str:
        """What tables and figures call the run."""
        return self.name if self.label in ("", self.name) else f"{self.name}: {self.label}"

    @property
    def preset(self) -> str:
        return str(self.manifest.get("preset") or "")

    @property
    def status(self) -> str:
        return str(self.manifest.get("status") or "")

    @property
    def config(self) -> dict[str, Any]:
        return _mapping(self.manifest.get("config"))

    def provenance(self, dataset: str) -> dict[str, Any]:
        """Where the text of ``dataset`` came from; {} where the manifest does not say."""
        return _mapping(_mapping(self.manifest.get("corpora")).get(dataset))

    def facts(self, dataset: str) -> dict[int, dict[str, Any]]:
        """The conditions under which ``dataset`` was measured, by seed; {} where a seed does not record them."""
        around = {"device": self.device, "held-out part": self.held_out(dataset)}
        found = {r.seed: r.facts | around for r in self.records if r.dataset == dataset and r.facts}
        return found if len(found) == sum(r.dataset == dataset for r in self.records) else {}

    def held_out(self, dataset: str) -> str:
        """The part of ``dataset`` that SAEs were evaluated on."""
        return str(self.provenance(dataset).get("held_out") or "val")

    @property
    def device(self) -> str:
        return str(self.manifest.get("device") or "unknown")

    def stand_in(self, dataset: str) -> bool:
        """Whether ``dataset`` was stood in for by other text."""
        return bool(self.provenance(dataset).get("stand_in"))

    @cached_property
    def curves(self) -> pd.DataFrame:
        """Every logged point: dataset, seed, step, name, value (nulls left out)."""
        cells = self._cells("curves", ".jsonl")
        rows = [
            (d, s, *point)
            for path, report, d, s in cells
            for point in read_curves(path, report, s)
            if point[2] is not None
        ]
        return pd.DataFrame(rows, columns=["dataset", "seed", "step", "name", "value"])

    def arrays(self, dataset: str) -> dict[int, dict[str, np.ndarray]]:
        """The stored arrays of a dataset by seed."""
        return {
            s: load_arrays(path, report, s)
            for path, report, d, s in self._cells("arrays", ".npz")
            if d == dataset
        }

    def _cells(self, folder: str, suffix: str) -> list[tuple[Path, str, str, int]]:
        """Path, report, dataset and seed of every file; the dataset is the report's corpus where this is the part of one SAE."""
        if self.path is None:
            return []
        names = [
            re.fullmatch(r"([A-Za-z0-9_.-]+)_(-?\d+)", p.name.removesuffix(suffix))
            for p in (self.path / folder).glob(f"*{suffix}")
        ]
        end = f".{self.sae}" if self.sae else ""
        return sorted(
            (self.path, m[1], m[1].removesuffix(end), int(m[2]))
            for m in names
            if m and m[1].endswith(end)
        )

    @property
    def sae_configs(self) -> dict[str, Any]:
        """The configuration of each SAE of the run, by name; runs before version 0.2 said `arms`."""
        return _mapping(self.config.get("saes", self.config.get("arms")))

    def by_sae(self, *, alone: bool) -> list[Run]:
        """A run of several SAEs as a run for each, on the corpora themselves; ``alone``: their names need not say which run it was.

        The configuration of each gets ``sae``, and ``variant``: its name without the L0 that was asked for.
        """
        saes = self.sae_configs
        if len(saes) < 2:
            return [
                replace(self, manifest=self._with_sae(name, sae)) for name, sae in saes.items()
            ] or [self]
        parts = []
        for name, sae in sorted(saes.items(), key=lambda item: _natural(item[0])):
            end = f".{name}"
            stats = {
                report.removesuffix(end): found
                for report, found in self.stats.items()
                if report.endswith(end)
            }
            info = {
                report.removesuffix(end): found
                for report, found in self.final_info.items()
                if report.endswith(end)
            }
            corpora = {d: self.provenance(d + end) for d in stats}
            manifest = self._with_sae(name, sae) | {"corpora": corpora}
            records = [
                replace(r, dataset=r.dataset.removesuffix(end))
                for r in self.records
                if r.dataset.endswith(end)
            ]
            title = name if alone else f"{self.name} {name}"
            parts += (
                [
                    replace(
                        self,
                        name=title,
                        label="",
                        manifest=manifest,
                        stats=stats,
                        final_info=info,
                        records=records,
                        sae=name,
                    )
                ]
                if stats
                else []
            )
        return parts or [self]

    def _with_sae(self, name: str, sae: Any) -> dict[str, Any]:
        return self.manifest | {
            "config": self.config | {"sae": sae, "variant": re.sub(r"-target_l0_[\d.]+", "", name)}
        }


@dataclass(frozen=True)
class RunTable:
    """Runs in the order in which they are drawn, and the one they are compared with (part of ``runs``, the published one apart)."""

    runs: list[Run]
    baseline: Run | None = None

    @cached_property
    def values(self) -> pd.DataFrame:
        """Tidy: run, label, dataset, seed, metric, value. Seed is NA where only ``final_info.json`` is left."""
        rows = []
        for run in self.runs:
            for dataset, stats in run.stats.items():
                for metric, stat in stats.items():
                    listed = (
                        _mapping(_mapping(run.final_info.get(dataset)).get("final_info_dict")).get(
                            metric
                        )
                        or []
                    )
                    seeds = list(stat.values.items()) or [(None, v) for v in listed]
                    rows += [
                        (run.name, run.label, dataset, seed, metric, value) for seed, value in seeds
                    ]
        table = pd.DataFrame(rows, columns=["run", "label", "dataset", "seed", "metric", "value"])
        return table.astype({"seed": "Int64", "value": "float64"})

    @cached_property
    def by_sae(self) -> RunTable:
        """The same with each SAE of a run that fitted several as a run of its own, so that figures show them side by side on one corpus."""
        parts = [
            (
                run,
                run.by_sae(
                    alone=len(self.runs) == 1
                    or (self.baseline in self.runs and len(self.runs) == 2)
                ),
            )
            for run in self.runs
        ]
        own = next((found for run, found in parts if run is self.baseline), None)
        baseline = self.baseline if own is None else own[0] if len(own) == 1 else None
        return RunTable([part for _, found in parts for part in found], baseline)

    @cached_property
    def datasets(self) -> list[str]:
        return sorted({dataset for run in self.runs for dataset in run.stats})

    def with_rivals(self, datasets: Sequence[str]) -> list[str]:
        """Those of ``datasets`` that some run besides the baseline has; all of them where there is no such run."""
        others = {d for run in self.runs if run is not self.baseline for d in run.stats}
        return [d for d in datasets if d in others] or list(datasets)

    @cached_property
    def metrics(self) -> list[str]:
        """Every metric of any run, in the order of the manifests, then by name."""
        names = {metric for run in self.runs for stats in run.stats.values() for metric in stats}
        return sorted(names, key=lambda name: (self.info(name)["order"], name))

    def info(self, metric: str) -> dict[str, Any]:
        """title, formula, unit, better, shown, order of a metric, from the first manifest that knows it; defaults where none does."""
        known = next(
            (
                info
                for run in self.runs
                if (info := _mapping(_mapping(run.manifest.get("metrics")).get(metric)))
            ),
            {},
        )
        order = number(known.get("order"))
        return {
            "title": str(known.get("title") or metric),
            "formula": str(known.get("formula") or ""),
            "unit": str(known.get("unit") or ""),
            "better": known.get("better")
            if known.get("better") in ("up", "down", "target")
            else "none",
            "shown": known.get("shown", True) is not False,
            "order": float("inf") if order is None else order,
        }

    def why_not(self, run: Run, dataset: str, metric: str) -> str:
        """Why ``metric`` of ``run`` must not be subtracted from the baseline's on ``dataset``; '' where it may be."""
        if self.baseline is None:
            return "no baseline"
        return why_not_comparable(run, self.baseline, dataset, metric, self.depends(metric))

    def depends(self, metric: str) -> tuple[str, ...]:
        """What the value of a metric depends on, from the first manifest that says it; else what numbers of SAEs depend on."""
        return next(
            (d for run in self.runs if (d := _depends(run.manifest, metric))),
            conditions.ON_ACTIVATIONS,
        )


def why_not_comparable(
    run: Run, other: Run, dataset: str, metric: str, depends: Sequence[str]
) -> str:
    """What keeps one metric of two runs from being subtracted, in a few words; '' where nothing does.

    Preset and text come first, then every condition that the metric depends on (``depends``). Where
    a run does not record its conditions, both are judged by their configurations.
    """
    why = _other_text(run, other, dataset)
    if why:
        return why
    mine, theirs = run.facts(dataset), other.facts(dataset)
    if mine and theirs:
        return "; ".join(conditions.differences(metric, depends, mine, theirs))
    return "; ".join(
        conditions.known_differences(
            depends, _configured(run, dataset), _configured(other, dataset)
        )
    )


#: Numbers of a language model's configuration that do not change the model.
NOT_THE_MODEL = {
    "n_positions",
    "eval_batches",
    "curve_batches",
    "samples",
    "sample_length",
    "prompt",
    "temperature",
    "top_k",
    "compile",
}


def _configured(run: Run, dataset: str) -> dict[str, Any]:
    """The conditions that a configuration names, for runs that do not record those of their cells."""
    lm, fit, sae = (_mapping(run.config.get(name)) for name in ("lm", "fit", "sae"))
    site = [str(sae.get(way) or run.config.get("site") or "") for way in ("read", "write")]
    found = {
        "language model": {k: v for k, v in lm.items() if k not in NOT_THE_MODEL},
        "context": lm.get("n_positions"),
        "held-out rows": fit.get("held_out_rows"),
        "site": " -> ".join(dict.fromkeys(site)) or None,
        "device": run.device,
        "held-out part": run.held_out(dataset),
    }
    return found | _mapping(run.manifest.get("facts"))


def _depends(manifest: Mapping[str, Any], metric: str) -> tuple[str, ...]:
    """What a manifest says a metric depends on; () where it says nothing."""
    given = _mapping(_mapping(manifest.get("metrics")).get(metric)).get("depends")
    return (
        tuple(name for name in given if name in conditions.CONDITIONS)
        if isinstance(given, list)
        else ()
    )


def _other_text(run: Run, other: Run, dataset: str) -> str:
    """The first of preset, stand-in text, corpus, its size and its content that differs or is not recorded; '' where none does."""
    if dataset not in other.stats:
        return f"{other.name} lacks it"
    if not run.preset or not other.preset:
        return f"preset of {(other if run.preset else run).name} unknown"
    if run.preset != other.preset:
        return f"preset {run.preset} vs {other.preset}"
    mine, theirs = run.provenance(dataset), other.provenance(dataset)
    if run.stand_in(dataset) != other.stand_in(dataset):
        return "stand-in vs real text" if run.stand_in(dataset) else "real vs stand-in text"
    if mine.get("corpus") != theirs.get("corpus"):
        return f"corpus {mine.get('corpus') or 'unknown'} vs {theirs.get('corpus') or 'unknown'}"
    if mine.get("counts") and theirs.get("counts") and mine["counts"] != theirs["counts"]:
        return "corpus sizes differ"
    if mine.get("sha256") and theirs.get("sha256") and mine["sha256"] != theirs["sha256"]:
        return "texts of other content"
    return "; ".join(
        conditions.known_differences(
            ["made by"], {"made by": _recipe(mine)}, {"made by": _recipe(theirs)}
        )
    )


def _recipe(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What made rows are made by: everything that the provenance of a real text does not have."""
    named = (
        "corpus",
        "source",
        "sha256",
        "bytes",
        "stand_in",
        "verified",
        "symbols",
        "counts",
        "dropped_frac",
        "held_out",
    )
    return {key: value for key, value in provenance.items() if key not in named}


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """The run folders that ``paths`` are or hold (one level deep), run_2 before run_10; what is no run is a warning."""
    found: dict[Path, None] = {}
    for path in paths:
        inside = runs_in(path)
        if not inside:
            log.warning("%s %s; left out", path, _what_instead(path))
        found |= {p.resolve(): None for p in inside}
    return list(found)


def runs_in(path: Path) -> list[Path]:
    """``path`` if it is a run folder, else the run folders in it."""
    if _is_run(path):
        return [path]
    return (
        sorted((p for p in path.iterdir() if _is_run(p)), key=lambda p: _natural(p.name))
        if path.is_dir()
        else []
    )


def load_runs(paths: Sequence[Path], labels: Mapping[str, str] | None = None) -> list[Run]:
    """Read run folders; one without any result is left out with a warning. ``labels`` (by folder name) replace those of the manifests."""
    runs = [run for path in paths if (run := _load_run(path, labels or {}))]
    names = [run.name for run in runs]
    return [
        run
        if names.count(run.name) == 1 or run.path is None
        else replace(run, name=f"{run.path.parent.name}/{run.name}")
        for run in runs
    ]


def load_table(
    paths: Sequence[Path], *, baseline: str | None = None, labels: Mapping[str, str] | None = None
) -> RunTable:
    """Read the runs and find the baseline: ``baseline`` (a name or a folder; an error if it is not there), else ``run_0``.

    ``run_0`` is looked for among the runs, beside them, and one folder up. Where there is none, the published figures stand in
    for it, provided that some run has preset ``full``.
    """
    runs = load_runs(paths, labels)
    found = next((run for run in runs if run.name == (baseline or BASELINE)), None)
    if found is None and baseline != PUBLISHED:
        wanted = [Path(baseline)] if baseline else []
        wanted += [
            parent / (baseline or BASELINE)
            for path in paths[:1]
            for parent in list(path.parents)[:2]
        ]
        folder = next((p for p in wanted if _is_run(p)), None)
        same = next((run for run in runs if folder and run.path == folder.resolve()), None)
        found = same or next(iter(load_runs([folder.resolve()], labels)), None) if folder else None
        if found and not same:
            runs.insert(0, found)
    if found is None and baseline not in (None, PUBLISHED):
        raise UserError(
            f"baseline={baseline} is not a run with results; give the name of one of the runs or the path of a run folder"
        )
    if found is None and (baseline == PUBLISHED or any(run.preset == "full" for run in runs)):
        found = published()
    return RunTable(runs, found)


def published() -> Run:
    """The published baseline (``published.json``), which stands in for ``run_0`` at full scale."""
    content = read_json(Path(__file__).with_name("published.json"))
    manifest, final_info = content["manifest"], content["final_info"]
    return Run(
        None, PUBLISHED, manifest["label"], manifest, [], final_info, _stats_of_means(final_info)
    )


def _load_run(path: Path, labels: Mapping[str, str]) -> Run | None:
    manifest = _mapping(try_json(path / MANIFEST)) if (path / MANIFEST).exists() else {}
    if not (path / MANIFEST).exists():
        log.warning(
            "%s has no %s: its preset and corpus are unknown, so it is compared with nothing",
            path.name,
            MANIFEST,
        )
    records = read_records(path)
    written = (
        _mapping(try_json(path / FINAL_INFO))
        if not records and (path / FINAL_INFO).exists()
        else {}
    )
    stats = statistics_of(records) if records else _stats_of_means(written)
    status = manifest.get("status")
    if not any(stats.values()):
        log.warning("%s has no results (status %s); left out", path.name, status or "unknown")
        return None
    if status in ("running", "failed", "cut", "stopped"):
        said = {
            "running": "is still running",
            "failed": "failed",
            "cut": "was cut short by its time limit",
            "stopped": "was stopped",
        }[status]
        log.warning(
            "%s %s: what it has finished is shown (%d cells)", path.name, said, len(records)
        )
    label = str(labels.get(path.name) or manifest.get("label") or "")
    return Run(
        path, path.name, label, manifest, records, aggregate(records) if records else written, stats
    )


def _stats_of_means(final_info: Mapping[str, Any]) -> dict[str, dict[str, Stat]]:
    """Statistics of a run of which only ``final_info.json`` is left: from its lists where it has them, else its means."""
    found: dict[str, dict[str, Stat]] = {}
    for dataset, entry in final_info.items():
        means, stderrs, lists = (
            _mapping(_mapping(entry).get(key)) for key in ("means", "stderrs", "final_info_dict")
        )
        for key, mean in means.items():
            metric = key.removesuffix("_mean")
            listed = lists.get(metric)
            values = [number(v) for v in listed] if isinstance(listed, list) else []
            stat = (
                Stat(*mean_stderr(values), {})
                if values
                else Stat(number(mean), number(stderrs.get(f"{metric}_stderr")), 0, {})
            )
            found.setdefault(dataset, {})[metric] = stat
    return found


def _is_run(path: Path) -> bool:
    return (path / MANIFEST).is_file() or (path / FINAL_INFO).is_file()


def _what_instead(path: Path) -> str:
    if not path.is_dir():
        return "is no folder"
    nested = sorted(p.name for p in path.iterdir() if p.is_dir() and runs_in(p))
    return (
        f"holds no run itself, but {', '.join(nested)} in it does: name that folder"
        if nested
        else "holds no run"
    )


def _natural(name: str) -> list[str | int]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}

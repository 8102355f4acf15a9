"""The results of one run on disk: the schema of a cell, and the only code that writes or reads it.

A run folder holds `cells/<result name>_<seed>.json` and `final_info_<result name>_<seed>.json` for
each finished cell, `curves/*.jsonl`, `arrays/*.npz` and, over the seeds, `final_info.json`. Readers
never fail on a damaged or missing file: they log one warning line and go on with the rest, so that
one bad run cannot hide the others. Neither torch nor pandas is imported here.
"""

from __future__ import annotations

import io
import json
import logging
import math
import re
import statistics
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sae_experiments import quality_warnings as warned
from sae_experiments.errors import UserError
from sae_experiments.files import (
    check_readable,
    read_json,
    read_sealed,
    sha256_file,
    write_bytes,
    write_json,
    write_sealed,
)

log = logging.getLogger(__name__)
FINAL_INFO = "final_info.json"
#: Configuration that does not change results: a run may be continued with other values of these,
#: and comparisons leave them out.
RESULT_NEUTRAL_KEYS = (
    "out_dir",
    "runs_root",
    "cache",
    "label",
    "track",
    "verbosity",
    "time_limit_s",
    "overwrite",
    "report",
    "threads",
    "workers",
    "offline",
    "hydra",
)
#: Metrics whose names callers rely on: they stay in `means` of `final_info.json`.
PUBLISHED = (
    "final_train_loss",
    "best_val_loss",
    "total_train_time",
    "avg_inference_tokens_per_second",
)
#: Error of the rows that are no outliers, and the share of the others.
ORDINARY_FVU, OUTLIER_FRAC = "sae_fvu_ordinary", "sae_outlier_frac"
#: Metrics in `means` at most; all others are in `more_means`.
MOST_MEANS = 10
NOT_FINITE = "not finite"
MOST_ARRAYS = 1 << 30  # bytes of a cell's arrays, unpacked
NOT_GIVEN = "no value and no reason given"


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Measurements of one cell.

    NaN and infinity become None here, so that every None has a reason in `why_null`.
    """

    dataset: str
    """Result name, the top-level key of `final_info.json`; see `names`."""
    seed: int
    """Seed of the cell."""
    metrics: dict[str, float | None]
    """Values by name of the metric."""
    why_null: dict[str, str] = field(default_factory=dict)
    """Reason of each None."""
    noise: dict[str, float] = field(default_factory=dict)
    """Standard error of a metric over resampled text, if it is known."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Duration of each stage."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Conditions of the measurement; see `sae_experiments.conditions`."""
    warnings: list[dict[str, Any]] = field(default_factory=list)
    """Results that are worse than they look; see `sae_experiments.quality_warnings`."""
    config_hash: str = ""
    """Digest of the configuration and the text."""
    source_hash: str = ""
    """Digest of the code."""
    files: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the cell's other files, by their path in the run folder."""

    def __post_init__(self) -> None:
        cell_name(self.dataset, self.seed)
        given = {
            str(name): None if value is None else float(value)
            for name, value in self.metrics.items()
        }
        metrics = {name: number(value) for name, value in given.items()}
        nulls = [name for name, value in metrics.items() if value is None]
        why = {
            name: self.why_null.get(name) or (NOT_GIVEN if given[name] is None else NOT_FINITE)
            for name in nulls
        }
        object.__setattr__(self, "metrics", metrics)
        object.__setattr__(self, "why_null", why)
        object.__setattr__(self, "facts", self.facts if isinstance(self.facts, dict) else {})
        object.__setattr__(self, "warnings", warned.checked(self.warnings))
        for name in ("noise", "seconds"):
            numbers = {key: number(value) for key, value in getattr(self, name).items()}
            finite = {key: value for key, value in numbers.items() if value is not None}
            object.__setattr__(self, name, finite)


def number(value: Any) -> float | None:
    """A finite float; None for what JSON or a mean cannot hold, such as NaN or text."""
    try:
        converted = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return converted if math.isfinite(converted) else None


def cell_name(dataset: str, seed: int) -> str:
    """Build `<dataset>_<seed>`, the stem of every file of a cell.

    Raises:
        UserError: The name or the seed cannot be part of a file name.
    """
    if not isinstance(dataset, str) or not re.fullmatch(r"[A-Za-z0-9_.-]+", dataset):
        raise UserError(
            f"dataset={dataset!r} cannot name a file; use letters, digits, '_', '.' and '-' only"
        )
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise UserError(f"seed={seed!r} of dataset {dataset} must be a whole number")
    return f"{dataset}_{seed}"


def write_record(run_dir: Path, record: Record) -> None:
    """Write a finished cell.

    The file in `cells/`, which carries its own checksum, comes last: with it the cell is done.
    """
    name = cell_name(record.dataset, record.seed)
    write_json(run_dir / f"final_info_{name}.json", record.metrics)
    write_sealed(run_dir / "cells" / f"{name}.json", asdict(record))


def checksums(run_dir: Path, dataset: str, seed: int) -> dict[str, str]:
    """SHA-256 of every file of a cell except its record, by path in the run folder."""
    name = cell_name(dataset, seed)
    paths = [*run_dir.glob(f"*/{name}.*"), *(run_dir / "saes" / name).glob("*")]
    return {
        p.relative_to(run_dir).as_posix(): sha256_file(p)
        for p in sorted(paths)
        if p.parent.name != "cells" and p.name[0] != "." and p.is_file()
    }


def damaged_files(run_dir: Path, record: Record) -> list[str]:
    """The files of a cell that are missing or are not what was written."""
    paths = {name: run_dir / name for name in record.files}
    return [
        name
        for name, path in paths.items()
        if not path.is_file() or sha256_file(path) != record.files[name]
    ]


def read_records(run_dir: Path) -> list[Record]:
    """Read the finished cells of a run, sorted; a damaged file is left out with a warning."""
    records = [_read_record(path) for path in run_dir.glob("cells/*.json")]
    return sorted((r for r in records if r is not None), key=lambda r: (r.dataset, r.seed))


def _is_as_written(run_dir: Path, dataset: str, seed: int, path: Path) -> bool:
    """False, with a warning, if a file of a finished cell is not what its record lists."""
    cell = run_dir / "cells" / f"{cell_name(dataset, seed)}.json"
    record = _read_record(cell) if cell.exists() else None
    written = record.files.get(path.relative_to(run_dir).as_posix()) if record else None
    if written is not None and sha256_file(path) != written:
        log.warning(
            "%s is not what its cell wrote (damaged, or the cell is running again); left out", path
        )
        return False
    return True


def _read_record(path: Path) -> Record | None:
    try:
        value = read_sealed(path)
    except (UserError, OSError) as error:
        log.warning("%s; left out", error)
        return None
    try:
        record = Record(
            **{key: v for key, v in value.items() if key in Record.__dataclass_fields__}
        )
    except (AttributeError, TypeError, ValueError, OverflowError, UserError) as error:
        log.warning("%s is not a record of a cell (%s); left out", path, error)
        return None
    if path.stem != cell_name(record.dataset, record.seed):
        # A copy made by hand: its seed would count twice.
        log.warning(
            "%s holds dataset %s, seed %d, which its name does not say; left out",
            path,
            record.dataset,
            record.seed,
        )
        return None
    return record


def try_json(path: Path) -> Any:
    """Read a JSON file; None, with a warning, if it cannot be read."""
    try:
        return read_json(path)
    except UserError as error:
        log.warning("%s", error)
    except OSError as error:
        log.warning("%s cannot be read (%s); left out", path, error.strerror or error)
    return None


class Stat(NamedTuple):
    """One metric of one dataset over the seeds.

    `n` counts finite values; `values` (by seed) is empty if the seeds are unknown.
    """

    mean: float | None
    stderr: float | None
    n: int
    values: dict[int, float | None]


def mean_stderr(values: Iterable[float | None]) -> tuple[float | None, float | None, int]:
    """Mean, standard error and number of the finite values.

    The standard error is `stdev(ddof=1) / sqrt(n)`. The mean of no value and the standard error of
    one are None.
    """
    finite = [v for v in values if v is not None and math.isfinite(v)]
    if not finite:
        return None, None, 0
    try:
        spread = statistics.stdev(finite) / math.sqrt(len(finite)) if len(finite) > 1 else None
    except OverflowError:  # values near 1e308, squared
        spread = None
    return statistics.mean(finite), spread, len(finite)


def statistics_of(records: Iterable[Record]) -> dict[str, dict[str, Stat]]:
    """Statistics by dataset and metric; a metric that some seed lacks is None for that seed."""
    seeds: dict[str, dict[int, Record]] = {}
    for record in sorted(records, key=lambda r: (r.dataset, r.seed)):
        if record.seed in seeds.setdefault(record.dataset, {}):
            raise UserError(
                f"two records of dataset {record.dataset} have seed={record.seed}; "
                "give each seed once"
            )
        seeds[record.dataset][record.seed] = record
    stats: dict[str, dict[str, Stat]] = {}
    for dataset, by_seed in seeds.items():
        names = list(dict.fromkeys(name for record in by_seed.values() for name in record.metrics))
        columns = {
            name: {seed: record.metrics.get(name) for seed, record in by_seed.items()}
            for name in names
        }
        stats[dataset] = {
            name: Stat(*mean_stderr(column.values()), column) for name, column in columns.items()
        }
    return stats


def aggregate(
    records: Iterable[Record], leading: Sequence[str] = ()
) -> dict[str, dict[str, dict[str, Any]]]:
    """Build the content of `final_info.json`.

    Args:
        records: Records of one run.
        leading: Metrics whose means come first, in this order.

    Returns:
        `means`, `more_means`, `stderrs` and `final_info_dict` by result name, and nothing else on
        top. `means` holds at most `MOST_MEANS` metrics, since callers show all of it to people and
        language models. Lists hold one value per seed, in the order of the seeds; nulls stay out
        of means and standard errors.
    """
    final_info = {}
    for dataset, stats in statistics_of(records).items():
        first = _leading(stats, leading)
        rest = [name for name in stats if name not in first]
        final_info[dataset] = {
            "means": {f"{name}_mean": stats[name].mean for name in first},
            "more_means": {f"{name}_mean": stats[name].mean for name in rest},
            "stderrs": {f"{name}_stderr": stat.stderr for name, stat in stats.items()},
            "final_info_dict": {name: list(stat.values.values()) for name, stat in stats.items()},
        }
    return final_info


def _leading(stats: Mapping[str, Stat], leading: Sequence[str]) -> list[str]:
    """The metrics of `means`: the leading ones that have a value, and those callers rely on."""
    relied_on = [name for name in PUBLISHED if name in stats]
    valued = [name for name, stat in stats.items() if stat.mean is not None]
    if not has_outliers(stats):  # the FVU of all rows says the same
        leading = [name for name in leading if name != ORDINARY_FVU]
    ranked = [name for name in dict.fromkeys([*leading, *valued]) if name in valued]
    first = [name for name in ranked if name not in relied_on]
    return [*first[: MOST_MEANS - len(relied_on)], *relied_on]


def has_outliers(stats: Mapping[str, Stat]) -> bool:
    """True if some rows were outliers, so that the FVU of all rows says little about the others."""
    return OUTLIER_FRAC in stats and (stats[OUTLIER_FRAC].mean or 0) > 0


def means_of(entry: Mapping[str, Any]) -> dict[str, Any]:
    """All means of one dataset of `final_info.json`, also of files that another program wrote."""
    parts = [entry.get(key) for key in ("means", "more_means")]
    return {k: v for part in parts if isinstance(part, Mapping) for k, v in part.items()}


def write_final_info(
    run_dir: Path, records: Iterable[Record], leading: Sequence[str] = ()
) -> dict[str, Any]:
    """Aggregate and write `final_info.json`; returns what was written."""
    final_info = aggregate(records, leading)
    write_json(run_dir / FINAL_INFO, final_info, sort_keys=False)
    return final_info


class CurveWriter:
    """Appends lines of step, name and value to `curves/<dataset>_<seed>.jsonl`.

    With `resume` the writer appends to the file of a killed run, after removing an incomplete last
    line; if a step is trained again, readers use the later line. Without `resume` the file is
    overwritten. Every line is flushed, so that a killed process loses at most one.
    """

    def __init__(self, run_dir: Path, dataset: str, seed: int, *, resume: bool) -> None:
        self.path = run_dir / "curves" / f"{cell_name(dataset, seed)}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if resume and self.path.exists():
            _cut_torn_line(self.path)
        mode = "a" if resume else "w"
        # Closed by `close`.
        self._file = open(self.path, mode, encoding="utf-8", buffering=1)  # noqa: SIM115

    def write(self, step: int, name: str, value: float | None) -> None:
        """Add one point; NaN and infinity become null."""
        self._file.write(
            json.dumps({"step": int(step), "name": name, "value": number(value)}) + "\n"
        )

    def close(self) -> None:
        """Close the file; no point can be added afterwards."""
        self._file.close()

    def __enter__(self) -> CurveWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _cut_torn_line(path: Path) -> None:
    with open(path, "rb+") as f:
        data = f.read()
        if data and not data.endswith(b"\n"):
            f.truncate(data.rfind(b"\n") + 1)


def read_curves(run_dir: Path, dataset: str, seed: int) -> list[tuple[int, str, float | None]]:
    """Read the points of a cell as (step, name, value), sorted by name and step.

    If a step was written twice, the later line counts. Without a file the list is empty.
    """
    path = run_dir / "curves" / f"{cell_name(dataset, seed)}.jsonl"
    try:
        check_readable(path)
        if not _is_as_written(run_dir, dataset, seed, path):
            return []
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except UserError as error:
        log.warning("%s; left out", error)
        return []
    except OSError as error:
        log.warning("%s cannot be read (%s); left out", path, error.strerror or error)
        return []
    points: dict[tuple[str, int], float | None] = {}
    bad = 0
    for i, line in enumerate(lines):
        try:
            point = json.loads(line) if line.strip() else None
            if point is not None:
                points[str(point["name"]), int(point["step"])] = number(point["value"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            # The last piece has no newline if a run was killed or still writes: that is no error.
            bad += i < len(lines) - 1
    if bad:
        log.warning("%s: %d unreadable lines left out", path, bad)
    return [(step, name, value) for (name, step), value in sorted(points.items())]


def save_arrays(run_dir: Path, dataset: str, seed: int, arrays: Mapping[str, Any]) -> None:
    """Write `arrays/<dataset>_<seed>.npz` atomically.

    Raises:
        ValueError: An array has dtype object, which would need pickle.
    """
    converted = {name: np.asarray(value) for name, value in arrays.items()}
    for name, array in converted.items():
        if array.dtype.hasobject:
            raise ValueError(
                f"array {name} of {dataset} seed {seed} has dtype object; "
                "store numbers, booleans or fixed-width text"
            )
    buffer = io.BytesIO()
    # Names of arrays are keywords, and only `allow_pickle` is another one.
    np.savez_compressed(buffer, **converted)  # pyright: ignore[reportArgumentType]
    write_bytes(run_dir / "arrays" / f"{cell_name(dataset, seed)}.npz", buffer.getvalue())


def load_arrays(run_dir: Path, dataset: str, seed: int) -> dict[str, np.ndarray]:
    """Read the arrays of a cell; an empty mapping, with a warning, if they cannot be read."""
    path = run_dir / "arrays" / f"{cell_name(dataset, seed)}.npz"
    if not path.exists() or not _is_as_written(run_dir, dataset, seed, path):
        return {}
    try:
        check_readable(path)
        with zipfile.ZipFile(path) as packed:  # no array unpacks to more than its entry here says
            if sum(entry.file_size for entry in packed.infolist()) > MOST_ARRAYS:
                raise ValueError(f"its arrays have more than {MOST_ARRAYS:,} bytes")
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (
        OSError,
        ValueError,
        EOFError,
        MemoryError,
        UserError,
        NotImplementedError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        log.warning("%s cannot be read (%s); left out", path, error)
        return {}


def save_features(run_dir: Path, dataset: str, seed: int, features: list[dict[str, Any]]) -> None:
    """Write `features/<dataset>_<seed>.json`, one dictionary per latent.

    Raises:
        ValueError: A value is NaN or infinite.
    """
    lines = ",\n".join(
        json.dumps(feature, allow_nan=False, separators=(",", ":")) for feature in features
    )
    write_bytes(run_dir / "features" / f"{cell_name(dataset, seed)}.json", f"[{lines}]\n".encode())


def save_graphs(run_dir: Path, dataset: str, seed: int, graphs: list[dict[str, Any]]) -> None:
    """Write `graphs/<dataset>_<seed>.json`: dictionaries of title, nodes and edges.

    Raises:
        ValueError: A value is NaN or infinite.
    """
    write_json(run_dir / "graphs" / f"{cell_name(dataset, seed)}.json", graphs)


def read_graphs(run_dir: Path, dataset: str, seed: int) -> list[dict[str, Any]]:
    """Read the graphs of a cell; none, with a warning, if they cannot be read."""
    path = run_dir / "graphs" / f"{cell_name(dataset, seed)}.json"
    graphs = try_json(path) if path.exists() else []
    return graphs if isinstance(graphs, list) else []

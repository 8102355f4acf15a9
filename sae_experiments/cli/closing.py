"""The last lines of a run for programs that read them: a number per line, `name: value`."""

from __future__ import annotations

import statistics
import sys
from datetime import datetime
from pathlib import Path

from sae_experiments.files import read_json


def block(folder: Path) -> str:
    """The leading means, over the datasets of a run, then its cost.

    Args:
        folder: Run folder with its `final_info.json` and `manifest.json`.
    """
    values: dict[str, list[float]] = {}
    for entry in read_json(folder / "final_info.json").values():
        for key, mean in entry["means"].items():
            if mean is not None:
                values.setdefault(key.removesuffix("_mean"), []).append(mean)
    manifest = read_json(folder / "manifest.json")
    times = [datetime.fromisoformat(manifest[key]) for key in ("started", "ended")]
    lines = {name: f"{statistics.mean(each):.6f}" for name, each in values.items()}
    lines["total_seconds"] = f"{(times[1] - times[0]).total_seconds():.1f}"
    lines["peak_memory_mb"] = f"{_peak_memory():.1f}"
    return "\n".join(["---", *(f"{name}: {value}" for name, value in lines.items())])


def _peak_memory() -> float:
    """The most memory that this process, or one of its children, has held, in MB."""
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    unit = 1e6 if sys.platform == "darwin" else 1e3
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(kind).ru_maxrss for kind in kinds) / unit

"""Last lines of a run's output, for programs: one number per line, as `name: value`."""

from __future__ import annotations

import statistics
from datetime import datetime
from pathlib import Path

from sae_experiments.files import read_json
from sae_experiments.memory import peak_memory


def block(folder: Path) -> str:
    """Format the leading metrics, averaged over the datasets of a run, then its cost.

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
    lines["peak_memory_mb"] = f"{peak_memory() / 1e6:.1f}"
    return "\n".join(["---", *(f"{name}: {value}" for name, value in lines.items())])

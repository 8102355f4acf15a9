"""Last lines of a run's output, for programs: one number per line, as `name: value`."""

from __future__ import annotations

import statistics
from datetime import datetime
from pathlib import Path

from sae_experiments.files import read_json
from sae_experiments.memory import peak_memory
from sae_experiments.results.names import sae_names, take_apart


def block(folder: Path) -> str:
    """Format the leading metrics, averaged over the datasets of a run, then its cost.

    With several SAEs each has its own lines, after a line with its name.

    Args:
        folder: Run folder with its `final_info.json` and `manifest.json`.
    """
    manifest = read_json(folder / "manifest.json")
    saes = sae_names(manifest["config"])
    # What belongs to no SAE (a circuit between two of them) comes first.
    by_sae: dict[str, dict[str, list[float]]] = {"": {}}
    for result, entry in read_json(folder / "final_info.json").items():
        values = by_sae.setdefault(take_apart(result, saes).sae, {})
        for key, mean in entry["means"].items():
            if mean is not None:
                values.setdefault(key.removesuffix("_mean"), []).append(mean)
    lines = ["---"]
    for name, values in by_sae.items():
        lines += [f"sae: {name}"] if name else []
        lines += [f"{key}: {statistics.mean(each):.6f}" for key, each in values.items()]
    times = [datetime.fromisoformat(manifest[key]) for key in ("started", "ended")]
    lines.append(f"total_seconds: {(times[1] - times[0]).total_seconds():.1f}")
    lines.append(f"peak_memory_mb: {peak_memory() / 1e6:.1f}")
    return "\n".join(lines)

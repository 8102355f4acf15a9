"""The README's table of variants, from a run that fitted several SAEs side by side (no torch).

    python experiment.py --out_dir=variants_l0_32 'sae=[standard,topk,...]'
    python benchmarks/variant_table.py runs/variants_l0_32

One row an SAE, one group of columns a corpus; values are means over the seeds, with the standard error where there are several.
"""

from __future__ import annotations

import sys
from pathlib import Path

from sae_experiments.io import read_json
from sae_experiments.results import Stat, read_records, statistics_of

COLUMNS = (("sae_l0", "L0", 1), ("sae_fvu", "FVU", 4), ("ce_delta_bits", "delta CE", 4), ("sae_dead_frac", "dead", 3))


def table(folder: Path) -> str:
    """The run's results as Markdown."""
    stats = statistics_of(read_records(folder))
    names = list(dict.fromkeys(report.split(".", 1)[1] for report in stats if "." in report))
    corpora = list(dict.fromkeys(report.split(".", 1)[0] for report in stats if "." in report))
    batch = read_json(folder / "manifest.json")["config"]["fit"]["train"]["batch_size"]
    lines = [
        "| SAE | " + " | ".join(f"{c}: {title}" for c in corpora for _, title, _ in COLUMNS) + " | steps/s |",
        "|---" * (len(corpora) * len(COLUMNS) + 2) + "|",
    ]
    for name in sorted(names, key=lambda n: _order(stats, corpora, n)):
        cells, rates = [], []
        for corpus in corpora:
            found = stats.get(f"{corpus}.{name}", {})
            cells += [_text(found.get(metric), digits) for metric, _, digits in COLUMNS]
            rate = found.get("sae_tokens_per_second")
            rates += [rate.mean / batch] if rate is not None and rate.mean else []
        speed = f"{sum(rates) / len(rates):.0f}" if rates else "-"
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {speed} |")
    return "\n".join(lines)


def _order(stats: dict[str, dict[str, Stat]], corpora: list[str], name: str) -> float:
    """Best reconstruction on the first corpus first."""
    stat = stats.get(f"{corpora[0]}.{name}", {}).get("sae_fvu")
    return stat.mean if stat is not None and stat.mean is not None else float("inf")


def _text(stat: Stat | None, digits: int) -> str:
    if stat is None or stat.mean is None:
        return "-"
    return f"{stat.mean:.{digits}f}" + (f" ± {stat.stderr:.{digits}f}" if stat.stderr is not None else "")


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1], "cells").is_dir():
        sys.exit("usage: python benchmarks/variant_table.py RUN_FOLDER (a run of several SAEs)")
    print(table(Path(sys.argv[1])))

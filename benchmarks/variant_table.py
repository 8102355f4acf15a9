"""The README's table of variants, from a run that fitted several SAEs side by side (no torch).

    python experiment.py --out_dir=variants_l0_32 'sae=[standard,topk,...]'
    python benchmarks/variant_table.py runs/variants_l0_32

One row an SAE, one group of columns a corpus; values are means over the seeds, with the
standard error where there are several. A run over several L0s
(``'sae.target_l0=[8,16,32,64]'``) on one corpus gives one row an SAE and a column an L0.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from sae_experiments.files import read_json
from sae_experiments.results.names import only_sae, put_together, sae_names
from sae_experiments.results.records import Stat, read_records, statistics_of

COLUMNS = (
    ("sae_l0", "L0", 1),
    ("sae_fvu", "FVU", 4),
    ("ce_delta_bits", "delta CE", 4),
    ("sae_dead_frac", "dead", 3),
)


#: What a table over several L0s holds of each: metric, title, factor, digits.
GRID = (
    ("sae_fvu", "FVU x 1000", 1000, 1),
    ("ce_delta_bits", "delta CE (mbit/char)", 1000, 0),
    ("sae_dead_frac", "dead (%)", 100, 1),
)


def table(folder: Path) -> str:
    """The run's results as Markdown."""
    stats = statistics_of(read_records(folder))
    if any("-target_l0_" in report for report in stats):
        return grid(
            stats, read_json(folder / "manifest.json")["config"]["fit"]["train"]["batch_size"]
        )
    manifest = read_json(folder / "manifest.json")
    if not sae_names(manifest["config"]):  # results are named after the corpus alone
        stats = {put_together(r, only_sae(manifest)): values for r, values in stats.items()}
    names = list(dict.fromkeys(report.split(".", 1)[1] for report in stats))
    corpora = list(dict.fromkeys(report.split(".", 1)[0] for report in stats))
    batch = manifest["config"]["fit"]["train"]["batch_size"]
    lines = [
        "| SAE | "
        + " | ".join(f"{c}: {title}" for c in corpora for _, title, _ in COLUMNS)
        + " | steps/s |",
        "|---" * (len(corpora) * len(COLUMNS) + 2) + "|",
    ]
    for name in sorted(names, key=lambda n: _order(stats, corpora, n)):
        cells, rates = [], []
        for corpus in corpora:
            by_name = stats.get(f"{corpus}.{name}", {})
            cells += [_text(by_name.get(metric), digits) for metric, _, digits in COLUMNS]
            rate = by_name.get("sae_tokens_per_second")
            rates += [rate.mean / batch] if rate is not None and rate.mean else []
        speed = f"{sum(rates) / len(rates):.0f}" if rates else "-"
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {speed} |")
    return "\n".join(lines)


def grid(stats: dict[str, dict[str, Stat]], batch: int) -> str:
    """Tables with a row per SAE and a column per L0, one for each metric of `GRID`.

    Steps per second are those at the first L0 and the last.
    """
    by_name: dict[str, dict[float, dict[str, Stat]]] = {}
    for report, values in stats.items():
        if match := re.fullmatch(r"[^.]+\.(.+)-target_l0_([\d.]+)", report):
            by_name.setdefault(match[1], {})[float(match[2])] = values
    sizes = sorted({l0 for rows in by_name.values() for l0 in rows})
    lines = [
        "| SAE | "
        + " | ".join(f"{title} at L0 {l0:g}" for _, title, *_ in GRID for l0 in sizes)
        + " | steps/s |"
    ]
    lines.append("|---" * (len(GRID) * len(sizes) + 2) + "|")
    total = {n: sum(rows[l0]["sae_fvu"].mean or 0 for l0 in sizes) for n, rows in by_name.items()}
    for name in sorted(by_name, key=total.__getitem__):
        cells = [
            _text(by_name[name][l0].get(metric), digits, factor)
            for metric, _, factor, digits in GRID
            for l0 in sizes
        ]
        rates = [by_name[name][l0]["sae_tokens_per_second"].mean for l0 in (sizes[0], sizes[-1])]
        lines.append(
            f"| {name} | "
            + " | ".join(cells)
            + " | "
            + " to ".join(f"{r / batch:.0f}" for r in rates if r)
            + " |"
        )
    return "\n".join(lines)


def _order(stats: dict[str, dict[str, Stat]], corpora: list[str], name: str) -> float:
    """Best reconstruction on the first corpus first."""
    stat = stats.get(f"{corpora[0]}.{name}", {}).get("sae_fvu")
    return stat.mean if stat is not None and stat.mean is not None else float("inf")


def _text(stat: Stat | None, digits: int, factor: float = 1) -> str:
    if stat is None or stat.mean is None:
        return "-"
    return f"{factor * stat.mean:.{digits}f}" + (
        f" ± {factor * stat.stderr:.{digits}f}" if stat.stderr is not None else ""
    )


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1], "cells").is_dir():
        sys.exit("usage: python benchmarks/variant_table.py RUN_FOLDER (a run of several SAEs)")
    print(table(Path(sys.argv[1])))

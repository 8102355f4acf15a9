"""The tables of docs/metrics.md: every metric of every SAE of a run, a table per corpus (no torch).

    python experiment.py --out_dir=metrics_all metric=all 'seeds=[0]' \\
        'sae=[standard,batch_topk,matryoshka,random]'
    python benchmarks/metrics_table.py runs/metrics_all

Values are means over the seeds; a dash is a value that is undefined.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

from sae_experiments.files import read_json
from sae_experiments.results.records import Stat, read_records, statistics_of

#: Corpora that come first.
CORPORA = ("shakespeare_char",)
#: Metrics that are not of the SAE, or that the page describes elsewhere.
LEFT_OUT = (
    "sae_fvu_ordinary",
    "sae_outlier_frac",
    "final_train_loss",
    "best_val_loss",
    "total_train_time",
    "avg_inference",
)
#: Ends of names of times and memory, which differ between machines.
MACHINE = ("_time", "_seconds", "_per_second", "_mb", "_frac_of_step")


def tables(folder: Path) -> str:
    """The tables as Markdown, in the order in which the manifest lists the metrics."""
    stats = statistics_of(read_records(folder))
    infos: dict[str, dict[str, Any]] = read_json(folder / "manifest.json")["metrics"]
    reports = [report for report in stats if "." in report]
    corpora = {report.split(".", 1)[0] for report in reports}
    lines = []
    for corpus in sorted(corpora, key=lambda name: (name not in CORPORA, name)):
        saes = [r.split(".", 1)[1] for r in reports if r.startswith(f"{corpus}.")]
        of_saes = [stats[f"{corpus}.{sae}"] for sae in saes]
        lines += [f"## {corpus}", "", f"| metric | better | {' | '.join(saes)} |"]
        lines.append("|---" * (len(saes) + 2) + "|")
        for name, info in sorted(infos.items(), key=lambda item: item[1].get("order", 0)):
            cells = [_text(values.get(name)) for values in of_saes]
            if not _is_left_out(name) and set(cells) != {"-"}:
                lines.append(f"| {' | '.join([name, str(info.get('better')), *cells])} |")
        lines.append("")
    return "\n".join(lines)


def _is_left_out(name: str) -> bool:
    return name.startswith(LEFT_OUT) or name.endswith(MACHINE)


def _text(value: Stat | None) -> str:
    mean = None if value is None else value.mean
    return "-" if mean is None or math.isnan(mean) else f"{mean:.3g}"


if __name__ == "__main__":
    print(tables(Path(sys.argv[1])))

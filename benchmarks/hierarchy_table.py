"""The tables of docs/hierarchical.md, from the runs of the plan ``hierarchical`` (no torch).

    python experiment.py --out_dir=run_1     # with PLAN = "hierarchical", and the others
    python benchmarks/hierarchy_table.py runs

Values are means over the seeds with their standard error where there are several. A paired
change is the mean over the seeds of one run's value over the other's, less 1. Runs that are
missing or not finished leave gaps.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from sae_experiments.results.records import Stat, mean_stderr, read_records, statistics_of

CORPORA = ("shakespeare_char", "enwik8", "text8")
#: Rows of the main table: title, metrics (shown side by side), digits, whether the paired change is
#: of interest.
ROWS = (
    ("sparsity below, held out (target 0.90)", ("bottom_sparsity",), 4, False),
    ("sparsity above, held out (target 0.70)", ("top_sparsity",), 4, False),
    ("FVU", ("sae_fvu",), 4, True),
    (
        "FVU after the phases bottom / top / both",
        ("fvu_after_bottom", "fvu_after_top", "fvu_after_both"),
        4,
        False,
    ),
    ("coherence of atoms between levels", ("cross_coherence",), 3, True),
    (
        "redundancy (information shared with the nearest bottom latent, over the smaller entropy)",
        ("cross_redundancy",),
        3,
        True,
    ),
    ("mutual information of a pair (bits)", ("cross_mutual_information_bits",), 5, True),
    ("the same of values, strongest pairs (bits)", ("cross_value_information_bits",), 3, False),
    (
        "a top latent explained by its best 1 / 5 / 20 bottom latents",
        ("cross_explained_1", "cross_explained_5", "cross_explained_20"),
        2,
        False,
    ),
    ("correlation of values between levels, root mean square", ("cross_pearson_rms",), 3, True),
    ("added cross-entropy (bit/char)", ("ce_delta_bits",), 4, True),
    (
        "with the bottom path alone / the top path alone",
        ("splice_bottom_ce_delta_bits", "splice_top_ce_delta_bits"),
        3,
        False,
    ),
    (
        "without the bottom's code / the top's: zero",
        ("ablate_bottom_ce_delta_bits", "ablate_top_ce_delta_bits"),
        3,
        False,
    ),
    (
        "the same: mean",
        ("ablate_bottom_mean_ce_delta_bits", "ablate_top_mean_ce_delta_bits"),
        3,
        False,
    ),
    ("the top's at zero, gates frozen", ("ablate_top_frozen_ce_delta_bits",), 3, False),
    ("mean gate", ("gate_mean",), 3, False),
    (
        "semantic level, top less bottom (p of shuffled levels)",
        ("semantic_level_gap", "semantic_level_p"),
        2,
        False,
    ),
    (
        "variance of values explained by the current character: bottom / top",
        ("char_variance_bottom", "char_variance_top"),
        2,
        False,
    ),
    ("the bottom keeps every bit while frozen", ("frozen_identical",), 0, False),
    ("seconds of the fit", ("sae_train_time",), 0, False),
)
#: Columns of the table that compares all runs of the plan.
COMPARED = (
    ("FVU", "sae_fvu", 4),
    ("added cross-entropy", "ce_delta_bits", 4),
    ("bits a character", "bits_per_char", 0),
    ("L0", "sae_l0", 1),
    ("below", "bottom_sparsity", 4),
    ("above", "top_sparsity", 4),
)
RUNS = 8
Stats = dict[str, dict[str, Stat]]


def text(stat: Stat | None, digits: int) -> str:
    """A value with its standard error."""
    if stat is None or stat.mean is None:
        return "-"
    return f"{stat.mean:.{digits}f}" + (
        f" ± {stat.stderr:.{digits}f}" if stat.stderr is not None else ""
    )


def change(one: Stat | None, other: Stat | None) -> str:
    """The paired change from ``one`` to ``other`` over the seeds that both have, in per cent."""
    if one is None or other is None:
        return ""
    pairs = [(one.values[s], other.values[s]) for s in one.values if s in other.values]
    mean, stderr, _ = mean_stderr(100 * (b / a - 1) for a, b in pairs if a and b is not None)
    if mean is None:
        return ""
    return f"{mean:+.1f}" + (f" ± {stderr:.1f} %" if stderr is not None else " %")


def levels(plain: Stats, extra: Stats) -> list[str]:
    """Two levels without the redundancy terms and with them, on each corpus."""
    head = [f"{corpus}: `{run}`" for corpus in CORPORA for run in ("run_1", "run_2")]
    lines = [row(["", *head[:2], "paired change", *head[2:]]), "|---" * (len(head) + 2) + "|"]
    for title, metrics, digits, paired in ROWS:
        cells = [
            [
                " / ".join(text(stats.get(c, {}).get(m), digits) for m in metrics)
                for stats in (plain, extra)
            ]
            for c in CORPORA
        ]
        first = CORPORA[0]
        moved = (
            change(plain.get(first, {}).get(metrics[0]), extra.get(first, {}).get(metrics[0]))
            if paired
            else ""
        )
        lines.append(row([title, *cells[0], moved, *cells[1], *cells[2]]))
    return lines


def compared(runs: list[Stats], names: list[str]) -> list[str]:
    """All runs of the plan on each corpus."""
    lines = [
        row(["", *(f"{corpus}: {title}" for corpus in CORPORA for title, *_ in COMPARED)]),
        "|---" * (len(CORPORA) * len(COMPARED) + 1) + "|",
    ]
    for stats, name in zip(runs, names, strict=True):
        lines.append(
            row(
                [
                    name,
                    *(
                        text(stats.get(corpus, {}).get(metric), digits)
                        for corpus in CORPORA
                        for _, metric, digits in COMPARED
                    ),
                ]
            )
        )
    return lines


def row(cells: Iterable[str]) -> str:
    """One line of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def tables(folder: Path) -> str:
    """Both tables, from ``run_0``, ``run_1``, ... in ``folder``."""
    names = [f"run_{i}" for i in range(RUNS)]
    runs = [statistics_of(read_records(folder / name)) for name in names]
    return "\n".join([*levels(runs[1], runs[2]), "", *compared(runs, names)])


if __name__ == "__main__":
    if len(sys.argv) != 2 or not any(Path(sys.argv[1]).glob("run_*/cells")):
        sys.exit(
            "usage: python benchmarks/hierarchy_table.py FOLDER (of run_0, run_1, ... of the plan"
            " hierarchical)"
        )
    print(tables(Path(sys.argv[1])))

"""The tables of docs/purification.md, from runs of the plan ``purification`` (no torch).

    python experiment.py --out_dir=run_4     # with PLAN = "purification", and the others
    python benchmarks/purification_table.py runs/run_*

Every SAE is compared with the host (`--host`, batch_topk by default) on the same corpus and seed.
Values in brackets are shares of the host's, for FVU the change in per cent. Cells without a host
are left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sae_experiments.results.runs import load_runs

KINDS = ("gaussian", "uniform", "mask", "covariance", "swap", "token", "fgsm", "pgd", "targeted")
#: Columns of the table of each part: title, metric.
PARTS = (
    ("gaussian", "rob_change_gaussian"),
    ("mask", "rob_change_mask"),
    ("covariance", "rob_change_covariance"),
    ("swap", "rob_change_swap"),
    ("mean over latents", "rob_change_mean"),
)
#: Columns of the table of stability: title, metric, digits, whether the share is of interest.
STABILITY = (
    ("change, mean over latents (%)", "rob_change_mean", 1, True),
    ("FSS, median latent", "rob_fss", 1, False),
    ("FSS, 5th percentile", "rob_fss_p5", 1, False),
    ("SCI", "rob_sci", 3, False),
    ("flips of 1,000", "rob_flips", 1, False),
    ("certified radius (R)", "rob_radius", 3, False),
    ("cross-talk", "rob_crosstalk", 2, False),
    ("never on (%)", "sae_dead_frac", 1, False),
)
#: Rows of the table of other qualities: title, metric.
QUALITIES = (
    ("probe AUC, character, 1 latent", "probe_auc_char_k1"),
    ("5 latents", "probe_auc_char_k5"),
    ("word, 1", "probe_auc_word_k1"),
    ("word, 5", "probe_auc_word_k5"),
    ("structure, 1", "probe_auc_struct_k1"),
    ("structure, 5", "probe_auc_struct_k5"),
    ("next character, 1", "probe_auc_predictive_k1"),
    ("next character, 5", "probe_auc_predictive_k5"),
    ("absorption, mean share", "absorption_fraction"),
    ("absorption, full", "absorption_full"),
    ("rule F1", "rule_f1"),
    ("latents with a rule (share)", "rule_interpretable_frac"),
    ("found again with another seed (share)", "seed_found_again"),
    ("best cosine with another seed (mean)", "seed_mmcs"),
    ("the same, of random directions", "seed_mmcs_random"),
    ("time of a step against the host's", "overhead_time"),
    ("memory against the host's", "overhead_memory"),
)
#: Metrics that are stored as a share and shown in per cent.
SHARES = {"sae_dead_frac"}


class Fit(NamedTuple):
    """One SAE on one corpus and seed."""

    run: str
    corpus: str
    seed: int
    sae: str
    values: dict[str, float]


def fits(folders: list[Path]) -> Iterator[Fit]:
    """All SAEs of all runs."""
    for run in load_runs(folders):
        for record in run.records:
            values = {name: v for name, v in record.metrics.items() if v is not None}
            yield Fit(run.folder or run.name, record.dataset, record.seed, run.sae_name, values)


def cell(value: float | None, host: float | None, digits: int = 1) -> str:
    """A value and its share of the host's."""
    if value is None:
        return "-"
    return f"{value:.{digits}f}" + (f" ({value / host:.2f})" if host else "")


def fvu(fit: Fit, host: Fit) -> str:
    """FVU and its change against the host's."""
    value, of_host = fit.values["sae_fvu"], host.values["sae_fvu"]
    return f"{value:.4f}" + ("" if fit is host else f" ({100 * (value / of_host - 1):+.1f} %)")


def row(cells: list[str]) -> str:
    """One line of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def head(cells: list[str]) -> list[str]:
    """Head of a Markdown table."""
    return [row(cells), "|---" * len(cells) + "|"]


def title_of(fit: Fit) -> str:
    """Name of the SAE of a fit, with its run."""
    return f"{fit.sae} (`{fit.run}`)"


def tables(all_fits: list[Fit], host_name: str) -> str:
    """The four tables, for every corpus and seed that has a host."""
    hosts = {(f.corpus, f.seed): f for f in all_fits if f.sae == host_name}
    pairs = [(f, hosts[f.corpus, f.seed]) for f in all_fits if (f.corpus, f.seed) in hosts]
    noise = head(["", "FVU", "delta CE", *KINDS])
    stability = head(["host -> SAE", *(title for title, *_ in STABILITY)])
    parts = head(["", "FVU", *(title for title, _ in PARTS), "FSS"])
    for fit, host in pairs:
        where = f"{fit.corpus} {fit.seed}: {title_of(fit)}"
        of_host = {} if fit is host else host.values
        changes = [f"rob_change_{kind}" for kind in KINDS]
        numbers = [cell(fit.values.get(name), of_host.get(name)) for name in changes]
        delta = cell(fit.values.get("ce_delta_bits"), None, 4)
        noise.append(row([where, fvu(fit, host), delta, *numbers]))
        numbers = [cell(fit.values.get(name), of_host.get(name)) for _, name in PARTS]
        parts.append(row([where, fvu(fit, host), *numbers, cell(fit.values.get("rob_fss"), None)]))
        if fit is not host:
            stability.append(row([where, *(both(fit, host, *column[1:]) for column in STABILITY)]))
    return "\n".join([*noise, "", *stability, "", *parts, "", *qualities(pairs)])


def both(fit: Fit, host: Fit, name: str, digits: int, share: bool) -> str:
    """A value of the host and of the fit, side by side."""
    values = [one.values.get(name) for one in (host, fit)]
    if None in values:
        return "-"
    before, after = (100 * v if name in SHARES else v for v in values if v is not None)
    ratio = f" ({after / before:.2f})" if share and before else ""
    return f"{before:.{digits}f} -> {after:.{digits}f}{ratio}"


def qualities(pairs: list[tuple[Fit, Fit]]) -> list[str]:
    """Other qualities, a column per fit that has the cost against the host, and for its host."""
    measured = [(f, h) for f, h in pairs if "rule_f1" in f.values and f is not h]
    columns = [one for f, h in measured for one in (h, f)]
    lines = head(["", *(f"{f.corpus} {f.seed}: {title_of(f)}" for f in columns)])
    for title, name in QUALITIES:
        lines.append(row([title, *(cell(f.values.get(name), None, 3) for f in columns)]))
    return lines


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--host", default="batch_topk")
    args = parser.parse_args()
    print(tables(list(fits(args.runs)), args.host))


if __name__ == "__main__":
    main()

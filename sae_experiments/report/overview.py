"""The first screen of a report: what was done, in two sentences, and the most telling latents."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import PurePath
from typing import Any

import pandas as pd

from sae_experiments.plots.text import percent
from sae_experiments.report.features import FeatureCell
from sae_experiments.results.headline import error_metric, headline
from sae_experiments.results.notes import not_comparable_lines, short_list
from sae_experiments.results.numbers import missing, short
from sae_experiments.results.records import number
from sae_experiments.results.runs import mapping
from sae_experiments.results.table import Run, RunTable

MOST_CARDS = 6
MOST_ALONE = 3  # SAEs that are described where there is nothing to compare
RARE = 1e-4
DENSE = 0.3
CHARACTERS_OF_A_TELLING_RULE = 3
Row = Mapping[str, Any]


def what_was_done(table: RunTable) -> str:
    """One sentence: which SAEs, on which corpora and model, with how many seeds."""
    folders = [of_folder[0] for of_folder in table.folders]
    fitted = [run for run in table.runs if run.sae_name]
    saes = list(dict.fromkeys(run.sae_name for run in fitted))
    who = folders[0].folder if len(folders) == 1 else f"{len(folders)} runs"
    what = f"{len(saes)} SAEs ({short_list(saes, 6)})" if len(saes) > 1 else f"the SAE {saes[0]}"
    model = _model(folders[0])
    presets = list(dict.fromkeys(run.preset or "unknown" for run in folders))
    seeds = _seeds(table)
    where = short_list(table.datasets, 4)
    settings = f"preset {', '.join(presets)}; {seeds}"
    return f"{who} fitted {what} {model}on {where} ({settings})."


def _model(run: Run) -> str:
    config = run.whole_config
    target = str(mapping(config.get("study")).get("_target_", "language"))
    if "language" not in target:
        name = re.search(r"\bstudies\.(\w+)", target)
        return f"in the study {name[1]} " if name else ""
    lm = mapping(config.get("lm"))
    layers, width = lm.get("n_layer"), lm.get("n_embd")
    size = f" with {layers} layers of width {width}" if layers and width else ""
    name = PurePath(str(lm["path"])).name if lm.get("path") else f"a language model{size}"
    return f"to {short_list(_sites(config), 4) or 'activations'} of {name} "


def _sites(config: Mapping[str, Any]) -> list[str]:
    """The sites that the SAEs of a run read and rebuild, each once."""
    usual = config.get("site")
    several = mapping(config.get("saes")).values()
    specs = [mapping(spec) for spec in several] or [mapping(config.get("sae"))]
    found = []
    for spec in specs:
        read = spec.get("read") or usual
        ends = [read, spec.get("write") or read]
        names = [", ".join(map(str, end)) if isinstance(end, list) else str(end) for end in ends]
        found += [" -> ".join(dict.fromkeys(names))] if read else []
    return sorted(set(found), key=lambda site: [int(n) for n in re.findall(r"\d+", site)])


def _seeds(table: RunTable) -> str:
    counts = sorted({run.n_seeds for run in table.runs if run.n_seeds})
    if not counts:
        return "seeds unknown"
    if counts == [1]:
        return "1 seed"
    return f"{counts[0]} to {counts[-1]} seeds" if len(counts) > 1 else f"{counts[0]} seeds"


def what_came_out(table: RunTable, rows: pd.DataFrame) -> str:
    """One sentence about the best SAE and the differences that are, or are not, believable."""
    parts = list(_findings(table, rows))
    return f"{'; '.join(parts)}." if parts else ""


def _findings(table: RunTable, rows: pd.DataFrame) -> Iterator[str]:
    by_dataset: dict[str, list[Row]] = {}
    main = {dataset: error_metric(table, dataset) for dataset in table.datasets}
    for row in rows.to_dict("records"):
        dataset = str(row["dataset"])
        if row["metric"] == main.get(dataset) and not missing(row["mean"]):
            by_dataset.setdefault(dataset, []).append(row)
    contested = {d: of for d, of in by_dataset.items() if any(r["place"] == "best" for r in of)}
    if contested:
        yield _best(contested, rows)
        yield from _rank(contested, table, rows)
        yield from _believable(contested)
    elif by_dataset:
        yield _alone(table, by_dataset, rows)
    yield from _against_baseline(table, rows)


def _rank(
    contested: Mapping[str, Sequence[Row]], table: RunTable, rows: pd.DataFrame
) -> Iterator[str]:
    """Number of other main numbers in which the SAE that is best everywhere is the best too."""
    winners = {row["name"] for of in contested.values() for row in of if row["place"] == "best"}
    if len(winners) != 1:
        return
    best = rows.loc[rows["place"] == "best"]
    others = {
        dataset: set(headline(table, dataset)) - {error_metric(table, dataset)}
        for dataset in contested
    }
    won: dict[tuple[str, str], set[str]] = {}
    for row in best.to_dict("records"):
        dataset, metric = str(row["dataset"]), str(row["metric"])
        if metric in others.get(dataset, ()):
            won.setdefault((dataset, metric), set()).add(row["name"])
    if won:
        count = sum(winners <= names for names in won.values())
        of_all = f"all {count}" if count == len(won) > 1 else f"{count} of {len(won)}"
        yield f"it is also best in {of_all} other main numbers"


def _best(contested: Mapping[str, Sequence[Row]], rows: pd.DataFrame) -> str:
    """`topk rebuilds best on enwik8 (FVU 0.066 at L0 32) and on text8 (...)`."""
    won: dict[str, list[str]] = {}
    for dataset, of_dataset in contested.items():
        best = next(row for row in of_dataset if row["place"] == "best")
        value, error = short(best["mean"], best["stderr"])
        numbers = f"{value} ± {error}" if error else value
        numbers += _at_l0(rows, dataset, best["name"])
        label = best.get("label") or best["name"]
        name = best["name"] if label == best["name"] else f"{best['name']} ({label})"
        won.setdefault(name, []).append(f"{dataset} (FVU {numbers})")
    parts = [f"{name} rebuilds best on {' and '.join(where)}" for name, where in won.items()]
    return ", ".join(parts)


def _at_l0(rows: pd.DataFrame, dataset: str, name: str) -> str:
    l0 = rows[(rows["dataset"] == dataset) & (rows["metric"] == "sae_l0") & (rows["name"] == name)]
    known = [value for value in l0["mean"] if not missing(value)]
    return f" at L0 {known[0]:.3g}" if known else ""


def _believable(contested: Mapping[str, Sequence[Row]]) -> Iterator[str]:
    """Leads of the best SAEs: believable, within the error, or not to be judged."""
    leads: dict[str, dict[str, list[str]]] = {"behind": {}, "tied": {}, "": {}}
    for dataset, of_dataset in contested.items():
        for row in of_dataset:
            if row["place"] in leads:
                leads[row["place"]].setdefault(row["name"], []).append(dataset)
    behind, tied, unjudged = (_named(names, contested) for names in leads.values())
    if behind:
        names = "all others" if not tied and not unjudged else short_list(behind)
        yield f"its lead over {names if len(behind) > 1 else behind[0]} is believable"
    if tied:
        yield f"the difference from {short_list(tied)} is within the error"
    if unjudged and not behind:
        yield "with one seed, and so no standard error, its lead is only a hint"
    elif unjudged:
        yield f"that over {short_list(unjudged)} cannot be judged from one seed"


def _named(found: Mapping[str, Sequence[str]], contested: Mapping[str, Sequence[Row]]) -> list[str]:
    """Names, with their datasets where these are not all on which a name is compared."""
    named = []
    for name, datasets in found.items():
        of_name = [d for d, rows in contested.items() if any(row["name"] == name for row in rows)]
        some = len(datasets) < len(of_name)
        named.append(f"{name} on {' and '.join(datasets)}" if some else name)
    return named


def _alone(table: RunTable, by_dataset: Mapping[str, Sequence[Row]], rows: pd.DataFrame) -> str:
    """`topk keeps 98.4 % of the variance on enwik8 (FVU 0.016 at L0 32) and adds ...`."""
    parts = []
    for dataset, of_dataset in by_dataset.items():
        for row in of_dataset[:2]:
            value, error = short(row["mean"], row["stderr"])
            value += f" ± {error}" if error else ""
            facts = [
                f"keeps {percent(1 - row['mean'])} of the variance of the activations on "
                f"{dataset} (FVU {value}{_at_l0(rows, dataset, row['name'])})",
                *_other_facts(table, rows, dataset, row["name"]),
            ]
            parts.append(
                f"{row['name']} {', '.join(facts[:-1])}{' and ' * (len(facts) > 1)}{facts[-1]}"
            )
    return "; ".join(parts[:MOST_ALONE])


def _other_facts(table: RunTable, rows: pd.DataFrame, dataset: str, name: str) -> Iterator[str]:
    """Addition of an SAE to the model's loss, and share of its latents that follow a rule."""
    mine = rows.loc[(rows["dataset"] == dataset) & (rows["name"] == name)]
    means: dict[str, Any] = dict(zip(mine["metric"], mine["mean"], strict=True))
    added, ruled = means.get("ce_delta_bits"), means.get("rule_interpretable_frac")
    if not missing(added):
        unit = table.info("ce_delta_bits")["unit"]
        yield f"adds {added:.3g} {unit} to the model's loss".replace("  ", " ")
    if ruled is not None and not missing(ruled):
        yield f"has a rule for {percent(ruled)} of its latents"


def _against_baseline(table: RunTable, rows: pd.DataFrame) -> Iterator[str]:
    """Believable differences from the baseline among the metrics that matter most."""
    if not len(rows) or len(table.runs) > MOST_CARDS:
        return
    for run in table.runs:
        of_run = (rows["name"] == run.name) & ~rows["is_baseline"]
        mine = rows.loc[of_run & rows["delta"].notna()]
        chosen = [
            row
            for dataset in run.stats
            for row in mine.loc[mine["dataset"] == dataset].to_dict("records")
            if row["metric"] in headline(table, dataset)
        ]
        if not chosen:
            continue
        counts = {v: sum(row["verdict"] == v for row in chosen) for v in ("better", "worse")}
        baseline = chosen[0]["baseline"]
        yield (
            f"against {baseline}, {run.name} is believably better in {counts['better']} and worse "
            f"in {counts['worse']} of {len(chosen)} main numbers"
        )


def caveats(table: RunTable, rows: pd.DataFrame) -> list[str]:
    """Reasons why runs are not compared with the baseline, a line each."""
    return not_comparable_lines(rows) if table.baselines else []


def telling_latents(cells: Sequence[FeatureCell], most: int = MOST_CARDS) -> list[tuple[int, int]]:
    """Latents whose rule says most about where they fire, as (cell, latent).

    A rule counts for its F1 times the information of firing, `log(lift)`; rules of one character
    count half; latents without a rule come last. The first seed of every dataset and SAE takes
    part, in turn. Latents that share a concept or part of a rule with an earlier one come last.
    """
    queues = [_ranked(i, cell) for i, cell in enumerate(cells) if _is_first(cells, i)]
    distinct: list[tuple[int, int]] = []
    alike: list[tuple[int, int]] = []
    seen: set[str] = set()
    for ranked in zip_longest(*queues):
        for i, feature in filter(None, ranked):
            words = _words(feature)
            chosen = distinct if seen.isdisjoint(words) else alike
            chosen.append((i, feature["latent"]))
            seen |= words
    return [*distinct, *alike][:most]


def _is_first(cells: Sequence[FeatureCell], i: int) -> bool:
    same = [(c.run, c.dataset, c.sae) for c in cells]
    return same.index(same[i]) == i


def _ranked(i: int, cell: FeatureCell) -> list[tuple[int, dict[str, Any]]]:
    scored = [(_telling(feature), feature) for feature in cell.features]
    scored = [(score, feature) for score, feature in scored if score > 0]
    scored.sort(key=lambda pair: (-pair[0], pair[1]["latent"]))
    return [(i, feature) for _, feature in scored[: 10 * MOST_CARDS]]


def _telling(feature: Mapping[str, Any]) -> float:
    density, f1 = number(feature.get("density")) or 0.0, number(feature.get("f1")) or 0.0
    if not feature.get("top") or not RARE < density < DENSE:
        return 0.0
    if not feature.get("rule"):  # behind all rules: a concept, and fires on about one place in 100
        phi = abs(number(feature.get("phi")) or 0.0)
        return 0.01 * (1 + phi) * math.exp(-((math.log10(density) + 2) ** 2))
    lift = number(feature.get("lift")) or 1.0
    rule = str(feature["rule"])
    literal = max(map(len, re.findall(r"\w+", _literal(rule))), default=0)
    if re.search(r"\((?!letter )", rule):  # a concept with a name says as much as a word
        literal = CHARACTERS_OF_A_TELLING_RULE
    weight = 0.5 + 0.5 * min(literal, CHARACTERS_OF_A_TELLING_RULE) / CHARACTERS_OF_A_TELLING_RULE
    parts = rule.count(" or ") + 1
    return f1 * math.log(max(lift, 1.0)) * weight / math.sqrt(parts)


def _literal(rule: str) -> str:
    """A rule without its classes and states: what remains are characters."""
    return re.sub(r"\[[^\]]*\]|\([^)]*\)|\bor\b", " ", rule)


def _words(feature: Mapping[str, Any]) -> set[str]:
    rule = str(feature.get("rule") or "")
    parts = {part.strip().lower() for part in rule.split(" or ")} - {""}
    concept = feature.get("concept")
    strong = (number(feature.get("phi")) or 0.0) > 0.5
    return parts | ({f"concept {concept}"} if concept and strong else set())

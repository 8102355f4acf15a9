"""Plans: what the runs of a series are, and the whole list of overrides of one run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from sae_experiments.config.typed import did_you_mean, folder_of, key_of, last_text, value_of
from sae_experiments.errors import UserError
from sae_experiments.results.records import RESULT_NEUTRAL_KEYS


def complete(
    user: Sequence[str], *, plan: str, extra: Sequence[str], conf: Path
) -> tuple[list[str], dict[str, Any]]:
    """The whole list of overrides: preset, then the plan's for this out_dir, then the file's, then the user's (later ones win)."""
    for o in user:
        if o.startswith("~"):
            raise UserError(
                f"{o}: options cannot be deleted; give {key_of(o)} another value (null where it may be none)"
            )
    out_dir = last_text([*extra, *user], "out_dir", "run_0") or ""
    planned, note = planned_overrides(conf, plan, folder_of(out_dir))
    study = next(
        (value_of(o) for o in reversed([*extra, *user]) if key_of(o) == "study" and "=" in o), None
    )
    if (
        study
        and planned
        and f"study={study}"
        not in (planned if any(key_of(o) == "study" for o in planned) else ["study=language"])
    ):
        planned, note = [], f"plan {plan} is not about study={study}: plain configuration"
    changed = {key_of(o) for o in [*extra, *user]} - {"out_dir", *RESULT_NEUTRAL_KEYS}
    if changed:  # the plan's name for the run would lie about what it is now
        planned = [o for o in planned if key_of(o) != "label"]
    merged = {key_of(o): o for o in [*planned, *extra, *user]}
    preset, reason = choose_preset(value_of(merged.pop("preset", "preset=auto")))
    return [f"preset={preset}", *merged.values()], {
        "preset": preset,
        "preset_reason": reason,
        "plan": plan,
        "plan_note": note,
    }


def choose_preset(asked: str) -> tuple[str, str]:
    """``auto`` is full where there is a CUDA device and laptop elsewhere."""
    if asked != "auto":
        return asked, "asked for"
    import torch

    return (
        ("full", "auto: there is a CUDA device")
        if torch.cuda.is_available()
        else ("laptop", "auto: there is no CUDA device")
    )


def planned_overrides(conf: Path, plan: str, out_dir: str) -> tuple[list[str], str]:
    """What the active plan says about ``out_dir``, and a note about it for people."""
    path = conf / "plan" / f"{plan}.yaml"
    if not path.exists():
        known = sorted(p.stem for p in path.parent.glob("*.yaml"))
        raise UserError(
            f"PLAN={plan!r} in experiment.py has no file conf/plan/{plan}.yaml: choose one of {', '.join(known)}{did_you_mean(plan, known)}"
        )
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    runs = content["runs"]
    if out_dir in runs:
        return [
            *content.get("common", []),
            *runs[out_dir],
        ], f"plan {plan}: {out_dir} is {' '.join(runs[out_dir]) or 'the plain configuration'}"
    return [], f"plan {plan} does not name {out_dir}: plain configuration"

"""Plans: the runs of a series, and the complete overrides of one run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from sae_experiments.config.typed import (
    by_key,
    did_you_mean,
    folder_of,
    key_of,
    last_text,
    value_of,
)
from sae_experiments.errors import UserError
from sae_experiments.results.records import RESULT_NEUTRAL_KEYS


def complete(
    user: Sequence[str], *, plan: str, extra: Sequence[str], conf: Path
) -> tuple[list[str], dict[str, Any]]:
    """Complete the overrides of a run. If a key has several, the last one counts.

    Args:
        user: Overrides that were typed; they win over all others.
        plan: Name of the plan.
        extra: Overrides of `experiment.py`, which win over the plan's.
        conf: Folder of the YAML files.

    Returns:
        The overrides, the preset first, and facts about them for the manifest.
    """
    for o in user:
        if o.startswith("~"):
            raise UserError(
                f"{o}: options cannot be deleted; give {key_of(o)} another value "
                "(null where it may be none)"
            )
    given = _with_study_of_preset([*extra, *user], conf)
    out_dir = last_text(given, "out_dir", "run_0") or ""
    planned, note = planned_overrides(conf, plan, folder_of(out_dir))
    study = by_key(o for o in given if "=" in o).get("study")
    if study and planned and value_of(study) != _study_of(planned):
        planned = []
        note = f"plan {plan} is not about study={value_of(study)}: plain configuration"
    if _changes_results(given):  # the plan's name for the run would not be true any more
        planned = [o for o in planned if key_of(o) != "label"]
    merged = by_key([*planned, *given])
    preset, reason = choose_preset(value_of(merged.pop("preset", "preset=auto")))
    about = {"preset": preset, "preset_reason": reason, "plan": plan, "plan_note": note}
    return [f"preset={preset}", *merged.values()], about


def preset_file(conf: Path, preset: str) -> dict[str, Any]:
    """The content of a preset's file; empty for `auto` and for one that does not exist."""
    path = conf / "preset" / f"{preset}.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _with_study_of_preset(given: Sequence[str], conf: Path) -> list[str]:
    """Add the study that a preset is for, unless one was given."""
    by = by_key(o for o in given if "=" in o)
    study = preset_file(conf, value_of(by["preset"])).get("for_study") if "preset" in by else None
    return [*given] if study is None or "study" in by else [f"study={study}", *given]


def _study_of(planned: Sequence[str]) -> str:
    return value_of(by_key(planned).get("study", "study=language"))


def _changes_results(given: Sequence[str]) -> bool:
    return bool(by_key(given).keys() - {"out_dir", *RESULT_NEUTRAL_KEYS})


#: Printed on a machine with a CUDA device, where the published protocol is within reach.
FULL_ON_CUDA = (
    "preset=full is the published protocol on this CUDA device, and takes hours: "
    "its language models alone took 84 minutes where they were published; "
    "fit.backend=device lm.backend=device makes its steps CUDA graphs (docs/gpu.md)"
)


def choose_preset(asked: str) -> tuple[str, str]:
    """Resolve the preset `auto` to `laptop`.

    This holds on a GPU too, where the duration of `full` has not been measured.

    Returns:
        The preset, and the reason for it.
    """
    if asked != "auto":
        return asked, "asked for"
    import torch

    if torch.cuda.is_available():
        return "laptop", f"auto; {FULL_ON_CUDA}"
    return "laptop", "auto: there is no CUDA device"


def planned_overrides(conf: Path, plan: str, out_dir: str) -> tuple[list[str], str]:
    """Overrides that the plan gives to `out_dir`, and a note about them for people."""
    path = conf / "plan" / f"{plan}.yaml"
    if not path.exists():
        known = sorted(p.stem for p in path.parent.glob("*.yaml"))
        raise UserError(
            f"PLAN={plan!r} in experiment.py has no file conf/plan/{plan}.yaml: "
            f"choose one of {', '.join(known)}{did_you_mean(plan, known)}"
        )
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    own = content["runs"].get(out_dir)
    if own is None:
        return [], f"plan {plan} does not name {out_dir}: plain configuration"
    note = f"plan {plan}: {out_dir} is {' '.join(own) or 'the plain configuration'}"
    return [*content.get("common", []), *own], note

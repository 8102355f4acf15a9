"""Translation of Hydra's own options into those of this project.

`hydra/launcher=joblib` means `launcher=joblib`, and `hydra.sweep.dir=runs/a` the folder of a sweep.
Options of Hydra without a counterpart raise a one-line error.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath

from sae_experiments.config.typed import by_key, checked, key_of, value_of, written
from sae_experiments.errors import UserError

#: Our launchers by the name of Hydra's plugin.
LAUNCHERS = {
    "basic": ["launcher=serial"],
    "joblib": ["launcher=joblib"],
    "ray": ["launcher=ray"],
    "submitit_slurm": ["launcher=submitit", "launcher.cluster=slurm"],
    "submitit_local": ["launcher=submitit", "launcher.cluster=local"],
}
#: Options that are answered, by their beginning.
ANSWERS = {
    "hydra/launcher": f"choose one of {', '.join(LAUNCHERS)}",
    "hydra.launcher.": "launchers have their settings under launcher., see conf/launcher",
    "hydra/sweeper": "a search is search=tpe or search=random, see conf/search",
    "hydra.sweeper.": "a search has its settings under search., see conf/search",
    "hydra.sweep.subdir": "a job's folder is named by the values that vary",
    "hydra.job.chdir": "a run stays in the working directory and writes to out_dir",
}


def translate(overrides: Sequence[str], *, multirun: bool) -> tuple[list[str], bool]:
    """Translate Hydra's options for launchers, folders and mode.

    As in Hydra, `hydra.run.dir` applies to single runs only and `hydra.sweep.dir` to sweeps.

    Args:
        overrides: Overrides as typed.
        multirun: Whether -m was given.

    Returns:
        The overrides of this project, and whether they are for a sweep.

    Raises:
        UserError: An option of Hydra has no counterpart.
    """
    mode = by_key(overrides).get("hydra.mode")
    if mode is not None:
        multirun = value_of(mode).upper() == "MULTIRUN"
    launches = any(key_of(o) == "hydra/launcher" for o in overrides)
    ignored = "hydra.run.dir" if multirun or launches else "hydra.sweep.dir"
    translated: list[str] = []
    for o in overrides:
        key = key_of(o)
        if key in ("hydra.mode", ignored):
            continue
        translated += _translate_one(o) if key.startswith(("hydra.", "hydra/")) else [o]
    return translated, multirun


def _translate_one(override: str) -> list[str]:
    key = key_of(override)
    value = value_of(override) if "=" in override else ""
    if key == "hydra/launcher" and value in LAUNCHERS:
        return LAUNCHERS[value]
    if key in ("hydra.run.dir", "hydra.sweep.dir"):
        folder = PurePath(checked(key, value))
        if not folder.name:
            raise UserError(f"{override} names no folder: use for example {key}=runs/name")
        return [written("runs_root", str(folder.parent)), written("out_dir", folder.name)]
    for start, answer in ANSWERS.items():
        if key.startswith(start):
            raise UserError(f"{override}: {answer}")
    return [override]

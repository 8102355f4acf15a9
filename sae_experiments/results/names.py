"""Names of results: a corpus and, where a run fits several SAEs, the SAE.

`final_info.json` and the files of a cell name both in one word, `enwik8.topk`. This module is the
only reader of such names; everything after it has `dataset` and `sae` as two columns.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

#: The two SAEs of a circuit, which `study=circuits` reports beside the circuit itself.
CIRCUIT_ROLES = ("up", "down")
_CELL_FILE = re.compile(r"([A-Za-z0-9_.-]+)_(-?\d+)")
_SETTING_OF_L0 = re.compile(r"-target_l0_[\d.]+")


class ResultName(NamedTuple):
    """A result name taken apart."""

    dataset: str
    sae: str  # empty if the name holds no SAE


class CellFile(NamedTuple):
    """Result name and seed of one file of a cell, from the name of the file."""

    result_name: str
    seed: int


def sae_configs(config: Mapping[str, Any]) -> dict[str, Any]:
    """Configurations of the SAEs of a run that names several; runs before 0.2 said `arms`."""
    saes = config.get("saes", config.get("arms"))
    return saes if isinstance(saes, dict) else {}


def sae_names(config: Mapping[str, Any]) -> list[str]:
    """SAEs that result names of a run may end with; empty if the run fitted one SAE."""
    study = config.get("study")
    if isinstance(study, dict) and set(CIRCUIT_ROLES) <= study.keys():
        return list(CIRCUIT_ROLES)
    saes = sae_configs(config)
    return list(saes) if len(saes) > 1 else []


def take_apart(result_name: str, saes: Iterable[str]) -> ResultName:
    """Split a result name into dataset and SAE; the longest of the SAEs that fits counts."""
    for sae in sorted(saes, key=len, reverse=True):
        dataset = result_name.removesuffix(f".{sae}")
        if dataset and dataset != result_name:
            return ResultName(dataset, sae)
    return ResultName(result_name, "")


def put_together(dataset: str, sae: str) -> str:
    """The result name of an SAE on a dataset."""
    return f"{dataset}.{sae}" if sae else dataset


def cell_of_file(name: str, suffix: str) -> CellFile | None:
    """Result name and seed of `<result name>_<seed><suffix>`; None for another file."""
    match = _CELL_FILE.fullmatch(name.removesuffix(suffix))
    return CellFile(match[1], int(match[2])) if match and name.endswith(suffix) else None


def variant_of(sae: str) -> str:
    """Name of an SAE without the L0 that was asked for: `topk` of `topk-target_l0_32`."""
    return _SETTING_OF_L0.sub("", sae)


def only_sae(manifest: Mapping[str, Any]) -> str:
    """Name of the SAE of a run that fitted one; empty if the manifest does not tell.

    It is what the command line chose (`sae=topk`), else the module of the SAE's class.
    """
    config = manifest.get("config")
    config = config if isinstance(config, dict) else {}
    several = sae_configs(config)
    if len(several) == 1:
        return next(iter(several))
    overrides = manifest.get("overrides")
    for override in reversed(overrides if isinstance(overrides, list) else []):
        key, _, value = str(override).partition("=")
        if key == "sae" and re.fullmatch(r"[\w-]+", value):
            return value
    sae = config.get("sae")
    model = sae.get("model") if isinstance(sae, dict) else None
    parts = str(model.get("_target_", "") if isinstance(model, dict) else "").split(".")
    return parts[parts.index("saes") + 1] if "saes" in parts[:-1] else ""

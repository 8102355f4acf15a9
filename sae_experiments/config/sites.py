"""Several sites for one SAE of the command line: one SAE per site."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_experiments.errors import UserError

#: Names of the number of blocks, in our configuration and in those of transformers.
N_LAYER = ("n_layer", "num_hidden_layers", "num_layers")


def per_site(
    saes: Mapping[str, Mapping[str, Any]], site: Any, lm: Mapping[str, Any]
) -> dict[str, Any]:
    """Replace an SAE that has a list of sites, or `resid.all`, by one SAE per site.

    A crosscoder, or a transcoder of all layers, reads several sites at once and stays one; its
    number of sites is filled in where it is null.

    Args:
        saes: Configurations of the SAEs by label.
        site: The run's `site`, for SAEs without a `read` of their own.
        lm: Configuration of the language model.

    Returns:
        Configurations by label; that of one site is `<label>-<stream>_<block>`.

    Raises:
        UserError: `write` is given for several sites, or the number of blocks is not known.
    """
    expanded: dict[str, Any] = {}
    for label, sae in saes.items():
        read = sae.get("read") or site
        sites = _sites(read, lm)
        if "n_sites" in sae.get("model", {}):
            model = sae["model"]
            n_sites = len(sites) if model["n_sites"] is None else model["n_sites"]
            expanded[label] = {**sae, "model": {**model, "n_sites": n_sites}}
            continue
        if sites == [read]:
            expanded[label] = dict(sae)
            continue
        if sae.get("write"):
            raise UserError(
                f"sae.write={sae['write']} is for one site, but {len(sites)} are read: give "
                "each SAE its own run, or leave write out"
            )
        for one in sites:
            expanded[f"{label}-{one.replace('.', '_')}"] = {**sae, "read": one}
    return expanded


def _sites(read: Any, lm: Mapping[str, Any]) -> list[str]:
    if isinstance(read, list):
        if not read:
            raise UserError("site=[] names no site: use for example resid.mid")
        return [one for name in read for one in _sites(name, lm)]
    stream, _, layer = str(read).partition(".")
    if layer != "all":
        return [read]
    return [f"{stream}.{block}" for block in range(1, _n_layer(lm, str(read)) + 1)]


def _n_layer(lm: Mapping[str, Any], read: str) -> int:
    """Number of blocks: of the model that is trained here, or in the folder of a pretrained one."""
    known: Mapping[str, Any] = lm
    path = Path(str(lm.get("path") or "")).expanduser() / "config.json"
    if "n_layer" not in lm and path.is_file():
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is not valid JSON ({error})") from error
    for name in N_LAYER:
        if isinstance(known, Mapping) and isinstance(known.get(name), int):
            return known[name]
    raise UserError(f"site={read}: the number of blocks is not known here: list the sites")

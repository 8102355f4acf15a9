"""SAEs of a run that are read from a directory: evaluated like the others, and not trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sae_experiments.fitting.fit import FitReport
from sae_experiments.fitting.spec import SAESpec
from sae_experiments.models.hooks import as_sites
from sae_experiments.saes.loaded import Loaded
from sae_experiments.saes.saelens import directory_digest, remarks
from sae_experiments.studies.base import Context, Outcome
from sae_experiments.studies.language.stores import Stores, Where

#: Metrics of training, which these SAEs do not have.
OF_TRAINING = ("sae_train_time", "sae_tokens_per_second")


def origin(spec: SAESpec) -> dict[str, Any]:
    """Provenance of the SAE of a result: the files of a directory, by digest."""
    if spec.path is None:
        return {}
    return {"sae": f"loaded, {directory_digest(Path(spec.path).expanduser())}"}


def adapted(
    name: str, spec: SAESpec, sae: Loaded, stores: Stores, sites: tuple[Where, Where], ctx: Context
) -> tuple[Loaded, FitReport]:
    """Adapt a loaded SAE to the units of the rows; returns it with the report of an empty fit.

    Args:
        name: Label of the SAE.
        spec: Its description.
        sae: The SAE as its directory has it.
        stores: Rows of the model.
        sites: Sites that it reads and rebuilds.
        ctx: Context of the run, whose console prints remarks about the SAE.
    """
    sae.adapt(stores.for_pass(*sites).sample(*sites).x)
    sae.eval().requires_grad_(False)
    (read,) = as_sites(sites[0])
    for note in remarks(Path(str(spec.path)).expanduser(), sae, str(read)):
        ctx.console.say(f"  {name}: {note}")
    return sae, FitReport(0.0, 0.0, 0, [], False)


def record(outcome: Outcome, spec: SAESpec) -> None:
    """Write into a record that its SAE was loaded and from where."""
    outcome.metrics |= dict.fromkeys(OF_TRAINING)
    outcome.why_null |= dict.fromkeys(OF_TRAINING, "the SAE was loaded, not trained here")
    outcome.facts["loaded"] = {"path": str(spec.path)} | origin(spec)

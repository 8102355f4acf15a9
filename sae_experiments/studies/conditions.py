"""The conditions of a cell, as its record keeps them: what two runs must share to be compared."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_experiments.conditions import NOT_THE_MODEL
from sae_experiments.files import sha256_file
from sae_experiments.flatten import flatten
from sae_experiments.metric_info import SelfDescribed
from sae_experiments.models.gpt2 import TrainedLM
from sae_experiments.models.hooks import Site, Sites, as_sites
from sae_experiments.saes.base import SAE

if TYPE_CHECKING:  # what is fitted must not be fitted anew whenever a metric's code changes
    from sae_experiments.metrics.base import EvalContext

#: Numbers of a language model's recipe that do not change the model itself.
NOT_THE_RECIPE = (
    *NOT_THE_MODEL,
    "train.log_every",
    "train.eval_every",
    "train.checkpoint_every_s",
)
SAMPLED = ("samples", "sample_length", "prompt", "temperature", "top_k")
WEIGHTS = "model.safetensors"


def of_sae(sae: SAE, where: str | None = None) -> dict[str, Any]:
    """Conditions of an SAE: its site, requested L0, number of latents and matmul precision."""
    site = {} if where is None else {"site": where}
    precision = str(sae.matmul_dtype).removeprefix("torch.")
    sizes = {"asked_l0": sae.fixed_l0, "d_sae": sae.d_sae}
    return site | sizes | {"matmul_precision": precision}


def of_sites(read: Site | Sites, write: Site | Sites) -> str:
    """`resid.2`, or `mlp_in.2 -> mlp_out.2` for an SAE that writes another site than it reads."""
    names = [", ".join(str(site) for site in as_sites(where)) for where in (read, write)]
    return " -> ".join(dict.fromkeys(names))


def of_language(lm: TrainedLM, text: Any) -> dict[str, Any]:
    """The language model and its text.

    Args:
        lm: The model; its key names the recipe, or the files that it was loaded from.
        text: A corpus or a text in tokens, with `key`, `provenance` and `splits`.
    """
    spec, train = flat(lm.key.get("spec", {})), lm.key.get("spec", {}).get("train", {})
    recipe = {k: v for k, v in spec.items() if k not in NOT_THE_RECIPE}
    model = recipe | {"code": lm.key["source"]} if spec else flat(lm.key.get("files", {}))
    if "cut" in lm.key:
        model["cut at step"] = lm.key["cut"]
    evaluated = {"eval_batches": spec.get("eval_batches"), "batch_size": train.get("batch_size")}
    sampled = {k: spec.get(k) for k in SAMPLED}
    weights = {"weights": sha256_file(lm.folder / WEIGHTS)} if _is_whole(lm, spec) else {}
    return weights | {
        "language model": model,
        "text": text.key,
        "vocabulary": text.provenance.get("symbols"),
        "context": lm.model.config.n_positions,
        "evaluations": [
            {"metrics": ["final_train_loss", "best_val_loss"], "settings": evaluated},
            {"metrics": ["avg_inference_tokens_per_second"], "settings": sampled},
        ],
    }


def _is_whole(lm: TrainedLM, spec: Mapping[str, Any]) -> bool:
    """Tell whether the folder of a model that was trained here has its weights."""
    return bool(spec) and isinstance(lm.folder, Path) and (lm.folder / WEIGHTS).is_file()


def of_evaluation(
    metric: Callable[..., Any], evaluation: EvalContext, names: Iterable[str]
) -> dict[str, Any]:
    """The conditions of one metric: its options, and the number of held-out rows that it reads.

    A metric reads the first `rows` rows, or all of them if it has no such option. The function
    `rows_read` of its module, if there is one, overrides this.
    """
    partial = metric if isinstance(metric, functools.partial) else functools.partial(metric)
    if isinstance(metric, SelfDescribed):
        partial = functools.partial(partial.func, **metric.settings)
    given = {k: plain(v) for k, v in partial.keywords.items()}
    length = evaluation.held_out.length if evaluation.held_out is not None else 1
    module = sys.modules[partial.func.__module__]
    rows_read = getattr(module, "rows_read", None)
    limit = rows_read(given, length) if rows_read else given.get("rows")
    rows = min(limit or evaluation.n_rows, evaluation.n_rows)
    settings = {k: v for k, v in given.items() if k != "rows"}
    return {"metrics": list(names), "held-out rows": rows, "settings": settings}


def flat(value: Mapping[str, Any]) -> dict[str, Any]:
    """Nested facts by dotted key, in the types that JSON has; empty mappings are left out."""
    return {key: plain(part) for key, part in flatten(value).items() if part != {}}


def plain(value: Any) -> Any:
    """A value as JSON can hold it; other kinds become strings."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(v) for v in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)

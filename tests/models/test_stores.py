"""Which activations a fit sees, and in which order: a replica from another seed sees the same
rows in another one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sae_experiments.config.compose import build, compose_checked
from sae_experiments.corpora.corpus import window_starts
from sae_experiments.errors import UserError
from sae_experiments.fitting.spec import FitSpec
from sae_experiments.models.gpt2 import train_lm
from sae_experiments.models.hooks import Site
from sae_experiments.studies.base import rows_seed
from sae_experiments.studies.language import study as language
from sae_experiments.studies.language.second_view import SecondView
from sae_experiments.studies.language.stores import Stores, held_out_starts
from sae_experiments.training.loop import Session
from support.common import CONF, train_config
from support.stores import context

SITE = Site("resid", 1)


@pytest.fixture(scope="module")
def stores(trained: Any, corpus: Any, tmp_path_factory: pytest.TempPathFactory) -> Stores:
    fit = FitSpec(
        train_rows=3200,
        calibration_rows=320,
        held_out_rows=320,
        init_rows=64,
        dead_after_frac=0.1,
        store_dtype="float32",
        collect_batch=32,
        train=train_config(batch_size=64),
    )
    return Stores(fit, [SITE], corpus, trained, 0, context(tmp_path_factory.mktemp("stores")))


@pytest.mark.parametrize("kind", ["rows", "windows", "second view", "initial rows"])
def test_another_seed_sees_the_same_store_in_another_order(
    kind: str, stores: Stores, tmp_path: Path
) -> None:
    def first_rows(of: Stores) -> torch.Tensor:
        if kind == "initial rows":
            return of.sample(SITE, SITE).x
        if kind == "second view":
            return SecondView(of, SITE, 0.1, context(tmp_path)).batch_at(0, SITE, SITE).x
        return (of.windows_at if kind == "windows" else of.batch_at)(0, SITE, SITE).x

    mine, again, other = (first_rows(stores.ordered(order)) for order in (0, 0, 1000))
    assert torch.equal(mine, again) and torch.equal(mine, first_rows(stores)), (
        "the cell's own order is that of its seed"
    )
    known = {tuple(row.tolist()) for row in stores.train.rows(SITE, slice(None))}
    assert not torch.equal(mine, other) and {tuple(row.tolist()) for row in other} <= known


def windows_of(sizes: dict[str, int]) -> dict[str, np.ndarray]:
    return {split: window_starts(n, 16) for split, n in sizes.items()}


@pytest.mark.parametrize(
    "sizes",
    [
        {"train": 900, "val": 640, "test": 333},
        {"train": 900, "val": 640},
        {"train": 900, "val": 49},
    ],
)
def test_a_search_and_its_report_have_no_character_in_common(sizes: dict[str, int]) -> None:
    seen = {}
    for which in ("val", "search", "test"):
        split, starts = held_out_starts(windows_of(sizes), which, 16, 10**9)
        seen[which] = {
            (split, int(at) + i) for at in starts for i in range(17)
        }  # what is read, and what the last position predicts
        assert len(starts) and max(starts) + 16 < sizes[split]
    assert not seen["search"] & seen["test"] and seen["search"] <= seen["val"]
    assert all(split == "test" for split, _ in seen["test"]) == ("test" in sizes)


def test_a_text_too_short_for_two_halves_is_one_line() -> None:
    for which in ("search", "test"):
        with pytest.raises(UserError, match="three windows of 16"):
            held_out_starts(windows_of({"train": 900, "val": 48}), which, 16, 10**9)


@pytest.mark.parametrize(
    "name", ["language", "circuits", "attribution", "ground_truth", "superposition", "palindrome"]
)
def test_every_study_says_which_held_out_part_its_results_are_of(name: str) -> None:
    made = {
        w: build(compose_checked(CONF, [f"study={name}", "preset=smoke", f"held_out={w}"])[0].study)
        for w in ("val", "search", "test", "dev")
    }
    for which in ("val", "search", "test"):
        made[which].check()
        assert made[which].held_out == which
    with pytest.raises(UserError, match="held_out=dev is not one of val, search, test"):
        made["dev"].check()


def test_made_rows_and_strings_of_a_report_are_none_that_the_search_saw() -> None:
    assert rows_seed(3, "val") == rows_seed(3, "search") != rows_seed(3, "test")
    parts = {}
    for which in ("search", "test"):
        study = build(
            compose_checked(CONF, ["study=palindrome", "preset=smoke", f"held_out={which}"])[
                0
            ].study
        )
        parts[which] = {tuple(s.tolist()) for s in study.shown(study.data.parts(0)[1])}
    assert not parts["search"] & parts["test"] and len(parts["search"]) + len(parts["test"]) == 1758


@pytest.mark.parametrize("test_frac", [0, 0.1])
def test_the_metrics_of_a_run_are_those_of_the_part(
    test_frac: float, corpus_file: Path, tmp_path: Path
) -> None:
    """The language model's own loss on the windows that were evaluated, worked out here."""
    file = [
        f"data.text8.file={corpus_file}",
        "data.text8.head=null",
        f"data.text8.test_frac={test_frac}",
    ]
    small = [
        "preset=smoke",
        "lm.n_positions=16",
        "lm.train.steps=2",
        "fit.train_rows=3000",
        "fit.train.batch_size=128",
        "fit.init_rows=512",
    ]
    few = [
        "data=[text8]",
        "sae=topk",
        "metric=[downstream]",
        "fit.train.steps=2",
        "lm.samples=0",
        "metric.downstream.windows=4096",
    ]
    ctx = context(tmp_path)
    for which in ("search", "test"):
        study = build(compose_checked(CONF, [*small, *few, *file, f"held_out={which}"])[0].study)
        about = study.prepare(ctx)
        found = study.run(study.cells()[0], ctx)["text8"].metrics["ce_clean"]
        corpus = study.texts["text8"].corpus
        split, starts = held_out_starts(
            windows_of({k: len(v) for k, v in corpus.splits.items()}),
            which,
            16,
            study.fit.held_out_rows,
        )
        assert (split, about["text8"]["held_out"]) == (
            "test" if test_frac and which == "test" else "val",
            which,
        )
        spec = study.data["text8"]
        lm = train_lm(
            study.lm,
            corpus,
            spec.recipe,
            seed=0,
            cache=ctx.cache,
            device=ctx.device,
            session=Session(),
        )
        x, y = (corpus.windows(split, starts + shift, 16) for shift in (0, 1))
        with torch.no_grad():
            logits = lm.model(input_ids=x, use_cache=False).logits[:, 1:]
        assert found == pytest.approx(
            float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), y[:, 1:].flatten())),
            rel=1e-4,
        )


def test_a_run_fits_its_replicas_to_batches_in_orders_of_their_own(
    corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = [f"data.text8.file={corpus_file}", "data.text8.head=null"]
    small = [
        "preset=smoke",
        "lm.n_positions=16",
        "lm.train.steps=2",
        "fit.train_rows=3000",
        "fit.train.batch_size=128",
        "fit.init_rows=512",
    ]
    few = [
        "data=[text8]",
        "sae=topk",
        "metric=[sparsity]",
        "study.replicas=2",
        "fit.train.steps=2",
        "lm.samples=0",
    ]
    study, seen = build(compose_checked(CONF, [*small, *few, *file])[0].study), {}
    fit_saes = language.fit_saes

    def watched(saes: Any, batch_at: Any, *args: Any, seed: int, **kwargs: Any) -> Any:
        seen[seed] = torch.cat([batch_at(step).x for step in range(2)])
        return fit_saes(saes, batch_at, *args, seed=seed, **kwargs)

    monkeypatch.setattr(language, "fit_saes", watched)
    ctx = context(tmp_path)
    study.prepare(ctx)
    study.run(study.cells()[0], ctx)
    assert set(seen) == {0, 1000, 2000}
    assert not any(torch.equal(seen[a], seen[b]) for a, b in ((0, 1000), (0, 2000), (1000, 2000)))

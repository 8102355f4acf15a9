"""Which activations a fit sees, and in which order: a replica from another seed sees the same rows in another one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONF, train_config

from sae_experiments.activations import Site
from sae_experiments.config import build, compose_checked
from sae_experiments.progress import Console
from sae_experiments.studies import language
from sae_experiments.studies.arms import FitSpec
from sae_experiments.studies.base import Context
from sae_experiments.studies.second_view import SecondView
from sae_experiments.studies.stores import Stores

SITE = Site("resid", 1)


def context(folder: Path) -> Context:
    return Context(folder=folder, cache=folder / "cache", device=torch.device("cpu"), console=Console(verbosity="quiet"))


@pytest.fixture(scope="module")
def stores(trained: Any, corpus: Any, tmp_path_factory: pytest.TempPathFactory) -> Stores:
    fit = FitSpec(train_rows=3200, calibration_rows=320, held_out_rows=320, init_rows=64, dead_after_frac=0.1, store_dtype="float32",
                  collect_batch=32, train=train_config(batch_size=64))  # fmt: skip
    return Stores(fit, [SITE], corpus, trained, 0, context(tmp_path_factory.mktemp("stores")))


@pytest.mark.parametrize("kind", ["rows", "windows", "second view", "initial rows"])
def test_another_seed_sees_the_same_store_in_another_order(kind: str, stores: Stores, tmp_path: Path) -> None:
    def first_rows(of: Stores) -> torch.Tensor:
        if kind == "initial rows":
            return of.sample(SITE, SITE).x
        if kind == "second view":
            return SecondView(of, SITE, 0.1, context(tmp_path)).batch_at(0, SITE, SITE).x
        return (of.windows_at if kind == "windows" else of.batch_at)(0, SITE, SITE).x

    mine, again, other = (first_rows(stores.ordered(order)) for order in (0, 0, 1000))
    assert torch.equal(mine, again) and torch.equal(mine, first_rows(stores)), "the cell's own order is that of its seed"
    known = {tuple(row.tolist()) for row in stores.train.rows(SITE, slice(None))}
    assert not torch.equal(mine, other) and {tuple(row.tolist()) for row in other} <= known


def test_a_run_fits_its_replicas_to_batches_in_orders_of_their_own(corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = [f"data.text8.file={corpus_file}", "data.text8.head=null"]
    small = ["preset=smoke", "lm.n_positions=16", "lm.train.steps=2", "fit.train_rows=3000", "fit.train.batch_size=128", "fit.init_rows=512"]
    few = ["data=[text8]", "sae=topk", "metric=[sparsity]", "study.replicas=2", "fit.train.steps=2", "lm.samples=0"]
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

"""On a GPU: recorded steps give the bits of ordinary ones, and what the processor finds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sae_experiments.fitting.fit import Sample, fit_saes
from sae_experiments.saes.base import SAE, Batch
from sae_experiments.training import recorded
from support.saes import NAMES, batch, config, downstream, make, rows

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

RECORDED = [name for name in NAMES if type(make(name)).__dict__.get("static_steps")]


def fitted(name: str, *, device: str, backend: str, dead_after: int = -1) -> SAE:
    sae = make(name).to(device)

    def batch_at(step: int) -> Batch:
        x = batch(256, step).x.to(device)
        return Batch(x, x, None, downstream(x))

    start, held = rows(2048, 10**6).to(device), rows(2048, 10**6 + 1).to(device)
    fit_saes(
        {name: sae},
        batch_at,
        config(steps=60, log_every=7),
        Sample(start, start, held),
        seed=0,
        dead_after=dead_after,
        backend=backend,
    )
    return sae


def fvu(sae: SAE) -> float:
    x = rows(4096, 77).to(sae.b_enc.device)
    return float((x - sae(x)).square().sum() / (x - x.mean(0)).square().sum())


@pytest.mark.parametrize("name", RECORDED)
def test_a_graph_gives_the_bits_of_ordinary_steps(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    plain = recorded.CudaGraph

    def counted(generators: list[torch.Generator]) -> Any:
        made.append(plain(generators))
        return made[-1]

    monkeypatch.setattr(recorded, "RECORDERS", {"cuda": counted})
    graph = fitted(name, device="cuda", backend="device")
    assert made
    monkeypatch.setattr(recorded, "RECORDERS", {})
    ordinary = fitted(name, device="cuda", backend="device")
    for key, value in graph.state_dict().items():
        other: Tensor = ordinary.state_dict()[key]
        torch.testing.assert_close(value, other, rtol=0, atol=0, equal_nan=True, msg=key)


@pytest.mark.parametrize("name", RECORDED)
def test_a_gpu_finds_what_a_processor_finds(name: str) -> None:
    expected = fvu(fitted(name, device="cpu", backend="host", dead_after=4000))
    for backend in ("host", "device"):
        found = fvu(fitted(name, device="cuda", backend=backend, dead_after=4000))
        assert found == pytest.approx(expected, rel=0.1), backend

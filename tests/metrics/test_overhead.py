"""The price of purification as a metric: what is counted, on which SAEs, and that nothing is
left changed.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sae_experiments.metrics import overhead
from sae_experiments.metrics.base import EvalContext, Measured
from sae_experiments.metrics.overhead import MemoryMeter
from support.saes import batch, make

SETTINGS: dict[str, Any] = {"batch": 256, "steps": 1, "rounds": 2, "memory_steps": 2}


def measured(name: str, *overrides: str) -> tuple[Measured, Any]:
    """What the metric says of an SAE that saw its first rows."""
    sae = make(name, *overrides)
    x = batch(512).x
    sae.begin("train", x, x)
    return (
        overhead.measure(EvalContext(sae=sae.eval(), device=torch.device("cpu"), x=x), **SETTINGS),
        sae,
    )


def test_memory_is_that_of_living_tensors_and_of_no_view():
    with MemoryMeter() as held:
        a = torch.zeros(1000)
        assert (held.now, held.peak) == (4000, 4000)
        b = a + 1
        view = b[:10].view(2, 5)
        del a
        b.mul_(2)
        torch.add(b, 1, out=b)
        assert (held.now, held.peak) == (4000, 8000)
        del b
        assert held.now == 4000, "the view keeps it"
        del view
        assert held.now == 0
        leaf = torch.ones(500, requires_grad=True)
        (leaf * 2).sum().backward()
        assert held.now == 4000 and leaf.grad is not None, "backward passes are counted"


@pytest.mark.parametrize(
    "name", ["purified", "purified_adaptive", "purified_mixed", "purified_stopped"]
)
def test_every_purified_sae_has_its_price_and_stays_as_it_is(name):
    found, sae = measured(name)
    assert set(found.scalars) == {i.name for i in overhead.INFO}
    assert all(value > 0 for value in found.scalars.values())
    assert found.scalars["overhead_memory"] == pytest.approx(
        found.scalars["overhead_memory_mib"] / found.scalars["overhead_host_memory_mib"]
    )
    assert found.scalars["overhead_memory"] > 1
    fresh = make(name)
    fresh.begin("train", batch(512).x, batch(512).x)
    state, wanted = sae.state_dict(), fresh.state_dict()
    assert all(torch.equal(state[k].nan_to_num(), wanted[k].nan_to_num()) for k in wanted)
    assert not sae.training and sae.purification.active


def test_more_perturbed_rows_take_more_memory():
    few, all_rows = (
        measured("purified", f"sae.model.row_frac={share}")[0].scalars["overhead_memory"]
        for share in (0.125, 1.0)
    )
    assert all_rows > few


@pytest.mark.parametrize(
    ("name", "changes"), [("batch_topk", []), ("purified", ["sae.model.eps=0.0"])]
)
def test_an_sae_that_is_not_purified_has_no_price(name, changes):
    found, _ = measured(name, *changes)
    assert set(found.scalars.values()) == {None}
    assert set(found.why_null.values()) == {"the SAE is not purified"}

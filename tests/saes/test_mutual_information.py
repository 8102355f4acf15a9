"""The redundancy of two levels: known tables, independent, identical and XOR latents, and what
the two losses push on.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sae_experiments.saes.hierarchical.level import matmul
from sae_experiments.saes.hierarchical.redundancy import (
    Coherence,
    Information,
    entropy,
    pairwise,
    redundancy,
)

N = 200_000


def coins(n: int, p: float, seed: int) -> Tensor:
    return (torch.rand(N, n, generator=torch.Generator().manual_seed(seed)) < p).double()


def measured(below: Tensor, above: Tensor) -> tuple[Tensor, Tensor]:
    p11 = below.t() @ above / len(below)
    rates = below.mean(0), above.mean(0)
    return pairwise(p11, *rates), redundancy(p11, *rates, len(below))


def test_a_table_by_hand():
    # P(1,1) = 0.3, P(1,.) = 0.4, P(.,1) = 0.5: the other cells are 0.1, 0.2, 0.4.
    joint = [[0.4, 0.2], [0.1, 0.3]]
    expected = sum(
        p * math.log(p / (sum(row) * (joint[0][j] + joint[1][j])))
        for row in joint
        for j, p in enumerate(row)
    )
    found = pairwise(torch.tensor([[0.3]]), torch.tensor([0.4]), torch.tensor([0.5]))
    assert found.item() == pytest.approx(expected, rel=1e-5)
    assert found.item() == pytest.approx(
        pairwise(torch.tensor([[0.3]]), torch.tensor([0.5]), torch.tensor([0.4])).item(), rel=1e-6
    )


def test_independent_latents_share_nothing():
    information, u = measured(coins(6, 0.1, 0), coins(4, 0.3, 1))
    assert float(u.max()) < 1e-3
    # The plug-in estimate is too high by 1/(2N) on average over pairs.
    assert float(information.mean()) == pytest.approx(1 / (2 * N), rel=0.9)


def test_the_bias_is_that_of_miller_and_madow():
    rows, found = 400, []
    for seed in range(40):
        a, b = coins(10, 0.3, 2 * seed)[:rows], coins(10, 0.4, 2 * seed + 1)[:rows]
        found.append(pairwise(a.t() @ b / rows, a.mean(0), b.mean(0)).mean())
    assert float(torch.stack(found).mean()) == pytest.approx(1 / (2 * rows), rel=0.1)


@pytest.mark.parametrize("p", [0.02, 0.3, 0.5])
def test_identical_latents_share_all_they_have(p):
    same = coins(3, p, 2)
    information, u = measured(same, same)
    assert float(u.diagonal().min()) > 0.95
    torch.testing.assert_close(information.diagonal(), entropy(same.mean(0)), rtol=2e-3, atol=1e-4)


def test_a_latent_that_fires_when_another_does_not_is_as_redundant():
    a = coins(1, 0.3, 3)
    assert float(measured(a, 1 - a)[1]) > 0.95


def test_xor_is_invisible_in_pairs():
    a, b = coins(1, 0.5, 4), coins(1, 0.5, 5)
    _, u = measured(torch.cat([a, b], 1), (a != b).double())
    assert float(u.max()) < 1e-3, "documented: dependence that takes two latents to show"


def test_a_latent_that_never_fires_is_redundant_with_nothing():
    _, u = measured(torch.zeros(N, 1).double(), coins(2, 0.3, 6))
    assert torch.isfinite(u).all() and float(u.max()) < 2e-3


def information(**changes) -> Information:
    return Information(**({"bottom": 8, "top": 8, "width": 0.25, "sharpness": 20.0} | changes))


def test_soft_indicators_are_a_half_at_the_threshold_and_know_no_units():
    loss, pre = information(), torch.tensor([[0.5], [1.5]])
    assert loss.soft(pre, torch.tensor(0.5), torch.tensor(1.0))[0].item() == 0.5
    scaled = loss.soft(7 * pre, torch.tensor(3.5), torch.tensor(7.0))
    torch.testing.assert_close(scaled, loss.soft(pre, torch.tensor(0.5), torch.tensor(1.0)))


def test_the_loss_is_the_mean_over_the_top_of_the_nearest_and_the_mean_of_all():
    below = coins(3, 0.4, 7)[:5000]
    above = torch.cat([below[:, :1], coins(1, 0.4, 8)[:5000]], 1)
    u = measured(below, above)[1]
    expected = u.max(0).values.mean() + u.mean()
    assert float(information(sharpness=1e4)(below, above)) == pytest.approx(
        float(expected), rel=1e-3
    )


def test_following_the_gradient_drives_a_copy_away_from_what_it_copies():
    generator = torch.Generator().manual_seed(9)
    below = torch.randn(4096, 1, generator=generator)
    above = (below + 0.05 * torch.randn(4096, 1, generator=generator)).requires_grad_()
    loss, one = information(), torch.tensor(1.0)
    first = loss(loss.soft(below, 0 * one, one), loss.soft(above, 0 * one, one))
    first.backward()
    moved = (above - 2000 * above.grad).detach()
    assert (
        loss(loss.soft(below, 0 * one, one), loss.soft(moved, 0 * one, one)).item()
        < 0.8 * first.item()
    )


def test_an_empty_side_costs_nothing():
    assert float(information()(torch.zeros(10, 0), torch.ones(10, 2))) == 0


def test_coherence_of_a_copy_and_of_something_new():
    loss = Coherence(excess=0.0, chunk=8)
    below = torch.eye(6)[:4]
    assert float(loss(below[:1], below)) == pytest.approx(1)
    assert float(loss(torch.eye(6)[4:], below)) == 0
    assert float(loss(-below[:1], below)) == 0, (
        "the first term is about copies, not about opposites"
    )


def test_only_what_exceeds_the_random_level_is_penalised():
    loss = Coherence(excess=10.0, chunk=8)
    below = torch.eye(100)[:20]
    tau = math.sqrt(2 * math.log(20) / 100)

    def at(c):
        return torch.nn.functional.normalize(
            torch.cat([torch.tensor([-c]), torch.zeros(98), torch.tensor([math.sqrt(1 - c * c)])])[
                None
            ]
        )

    assert float(loss(at(0.9 * tau), below)) == pytest.approx(0, abs=1e-9)
    assert float(loss(at(tau + 0.1), below)) == pytest.approx(10 * 0.01 / 20, rel=1e-3)


def test_the_fast_product_has_the_gradients_of_a_product():
    left, right = (torch.randn(5, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(matmul, (left, right))

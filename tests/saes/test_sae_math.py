"""Exact answers: selection, thresholds, straight-through gradients, nested decoding, AuxK, and
variants that reduce to one another.
"""

from __future__ import annotations

import math

import pytest
import torch

from sae_experiments.errors import UserError
from sae_experiments.fitting.fit import Sample, fit_saes
from sae_experiments.saes import ops, selection
from sae_experiments.saes.base import Batch
from sae_experiments.saes.controller import L0Controller
from sae_experiments.saes.jumprelu import _Heaviside, _Jump
from sae_experiments.saes.p_anneal import power_sum
from sae_experiments.saes.pattern import Pattern
from support.saes import D, M, batch, config, make, rows, step, trained

# --- selection ------------------------------------------------------------------------------------


@pytest.mark.parametrize("guess", [None, 0.01, 0.5, 1.2, 50.0])
def test_batch_top_k_keeps_exactly_the_n_largest_whatever_the_guess(guess):
    pre = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    pattern, least = selection.batch_top_k(pre, 100, guess)
    expected = torch.zeros(1200, dtype=torch.bool)
    expected[pre.view(-1).topk(100).indices] = True
    found = pattern.dense(torch.ones(100)).bool()
    assert torch.equal(found.view(-1), expected)
    assert least == pre.view(-1).topk(100).values.min().item()


@pytest.mark.parametrize("guess", [None, 0.4, 0.6, 1.1])
def test_batch_top_k_breaks_ties_the_same_way_for_every_guess(guess):
    pre = torch.tensor([[0.5, 1.0, 0.5], [0.5, 0.5, -1.0]])
    pattern, _ = selection.batch_top_k(pre, 3, guess)
    assert pattern.dense(torch.ones(3)).tolist() == [[1, 1, 1], [0, 0, 0]]


def test_batch_top_k_takes_fewer_where_fewer_are_positive_and_none_where_none_is():
    pattern, _ = selection.batch_top_k(torch.tensor([[1.0, -1.0], [-2.0, 3.0]]), 4)
    assert pattern.col.tolist() == [0, 1] and pattern.crow.tolist() == [0, 1, 2]
    pattern, least = selection.batch_top_k(-torch.ones(2, 2), 2)
    assert pattern.col.numel() == 0 and least == 0.0


@pytest.mark.parametrize(("n_cols", "k"), [(60, 7), (1024, 32), (1000, 7), (4099, 3)])
@pytest.mark.parametrize("world", ["normal", "uneven", "ties", "mostly zero", "infinite"])
def test_row_top_k_is_exact_whatever_the_rows_look_like(n_cols, k, world):
    pre = torch.randn(200, n_cols, generator=torch.Generator().manual_seed(0))
    if world == "uneven":
        pre *= torch.linspace(0.01, 10, 200)[:, None]
    if world == "ties":
        pre = (4 * pre).round()
    if world == "mostly zero":
        pre = torch.relu(pre - 2)
    if world == "infinite":
        pre[:, : n_cols - 5] = -torch.inf
    pattern = selection.top_k(pre, k)
    order = (
        torch.argsort(pre, dim=1, descending=True, stable=True)[:, :k].sort(1).values
    )  # a stable sort keeps the first of equal values
    assert torch.equal(pattern.col.view(200, k).long(), order)
    assert torch.equal(pattern.flat, (torch.arange(200)[:, None] * n_cols + order).view(-1))
    assert pattern.crow.tolist() == list(range(0, 200 * k + 1, k))


@pytest.mark.parametrize("n_cols", [30, 1024])
def test_row_top_k_of_a_nan_still_has_k_a_row(n_cols):
    pre = torch.randn(20, n_cols)
    pre[4, 7] = torch.nan
    assert selection.top_k(pre, 3).col.numel() == 60


def test_masking_is_where_in_both_directions():
    values = torch.randn(5, 7, dtype=torch.double, requires_grad=True)
    mask = torch.rand(5, 7, generator=torch.Generator().manual_seed(0)) < 0.4
    assert torch.equal(ops.masked(values, mask), values.where(mask, 0.0))
    assert torch.autograd.gradcheck(lambda v: ops.masked(v, mask), [values])
    values = torch.tensor([torch.nan, torch.inf, -1.0])
    assert ops.masked(values, torch.tensor([False, False, True])).tolist() == [0.0, 0.0, -1.0]


def test_patterns_from_a_mask_count_and_transpose():
    mask = torch.tensor([[0, 1, 1], [0, 0, 0], [1, 0, 1]], dtype=torch.bool)
    p = Pattern.from_mask(mask)
    assert (p.crow.tolist(), p.col.tolist(), p.row.tolist(), p.counts.tolist()) == (
        [0, 2, 2, 4],
        [1, 2, 0, 2],
        [0, 0, 2, 2],
        [1, 1, 2],
    )
    crow, row, order = p.transposed
    assert (crow.tolist(), row.tolist(), order.tolist()) == (
        [0, 1, 2, 4],
        [2, 0, 0, 2],
        [2, 0, 1, 3],
    )


def test_without_a_sparse_library_the_results_are_the_same(monkeypatch):
    torch.manual_seed(0)
    left, right = torch.randn(20, 8), torch.randn(12, 8)
    p = selection.top_k(torch.randn(20, 12), 3)
    values = torch.randn(60)
    fast = (
        ops.entry_products(p, left, right),
        ops.weight_gradient(p, values, left),
        ops.decode(values, p, right),
    )
    monkeypatch.setattr(ops, "_has_sparse_blas", lambda t: False)
    slow = (
        ops.entry_products(p, left, right),
        ops.weight_gradient(p, values, left),
        ops.decode(values, p, right),
    )
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(fast[2], p.dense(values) @ right)


# --- hand-computed --------------------------------------------------------------------------------


def test_a_two_by_two_standard_sae_by_hand():
    sae = make("standard", "sae.model.coeff=0.5", "sae.model.warmup_frac=0.0")
    for p, value in ((sae.W_enc, 0.0), (sae.W_dec, 0.0), (sae.b_enc, 0.0), (sae.b_dec, 0.0)):
        p.data.fill_(value)
    sae.W_enc.data[0, 0] = sae.W_dec.data[0, 0] = 1.0
    sae.W_enc.data[1, 1] = sae.W_dec.data[1, 1] = 1.0
    sae.b_enc.data[1] = -1.0
    x = torch.zeros(1, D)
    x[0, 0], x[0, 1], x[0, 2] = 2.0, 3.0, 1.0
    from sae_experiments.saes.base import Batch

    loss = sae.train().loss(Batch(x, x), step(sae))
    # z = (2, 2); residual (0, 1, 1): squared error 2; penalty 0.5 * 4
    assert loss.parts["mse"].item() == pytest.approx(2.0)
    assert loss.parts["sparsity"].item() == pytest.approx(2.0)


def test_the_threshold_leaves_exactly_the_asked_for_number_on_the_calibration_rows():
    sae = make("batch_topk").eval()
    x = rows(4096, 1)
    for target in (1.0, 2.5, 4.0):
        sae.calibrate_threshold(x, target, rows=500)
        assert (sae.encode(x) != 0).sum().item() == round(4096 * target)


def test_the_threshold_is_zero_where_fewer_latents_can_be_active():
    sae = make("batch_topk").eval()
    sae.b_enc.data.fill_(-100.0)
    sae.calibrate_threshold(rows(256, 1), 3.0)
    assert sae.threshold.item() == 0.0


def test_gated_codes_follow_the_paper():
    sae = make("gated").eval()
    x = rows(64, 0)
    u = (x - sae.b_dec) @ sae.W_enc.t()
    expected = (u + sae.b_enc > 0) * torch.relu(sae.r_mag.exp() * u + sae.b_mag)
    torch.testing.assert_close(sae.encode(x), expected, rtol=1e-4, atol=1e-5)


def test_the_gate_learns_only_from_the_penalty_and_the_third_term():
    sae = make("gated", "sae.model.coeff=0.0").train()
    fwd = sae.training_forward(batch())
    from sae_experiments.saes.ops import squared_error

    grad = torch.autograd.grad(squared_error(fwd.recon, fwd.batch.y), sae.b_enc, allow_unused=True)[
        0
    ]
    assert grad is None or grad.abs().max() < 1e-6
    parts = sae.penalties(sae.training_forward(batch()), step(sae))
    third = torch.autograd.grad(parts["gate_mse"], [sae.b_enc, sae.W_dec], allow_unused=True)
    assert third[0].abs().max() > 0 and third[1] is None


@pytest.mark.parametrize("theta", [0.3, 0.01])
def test_jumprelu_threshold_gradients_match_the_kernel_smoothed_loss(theta):
    """E over a of the pseudo-derivative equals the finite difference of the expectation (1e6
    samples), also for theta below eps/2.
    """
    eps, h = 0.05, 0.02
    a = (
        torch.rand(1_000_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
        - 1
    )
    t = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
    _Heaviside.apply(a, t.expand_as(a), eps).mean().backward()
    step_grad = t.grad.item()

    def smoothed(x: float) -> float:  # H convolved with the box kernel of width eps
        return ((a - x) / eps + 0.5).clamp(0, 1).mean().item()

    assert step_grad == pytest.approx(
        (smoothed(theta + h) - smoothed(theta - h)) / (2 * h), rel=0.05
    )
    t.grad = None
    _Jump.apply(a, t.expand_as(a), eps, False).mean().backward()
    assert t.grad.item() == pytest.approx(theta * step_grad, rel=1e-9)


@pytest.mark.parametrize("form", ["step", "tanh"])
@pytest.mark.parametrize("theta", [0.0, 0.25, 0.5, 1.0, 2.0])  # in bandwidths
@pytest.mark.parametrize("density", [0.01, 0.05, 0.1, 0.2, 0.3])
def test_jumprelu_held_densely_has_the_gradients_of_the_same_code_held_sparsely(
    density, theta, form, monkeypatch
):
    """Also where the threshold lies within half a bandwidth of 0, the value that a dense code
    has outside its support.
    """
    eps, x = 0.3, rows(512, 5)

    def measured(sparse_below: float):
        monkeypatch.setattr(ops, "SPARSE_BELOW", sparse_below)
        sae = make("jumprelu", f"sae.model.form={form}", f"sae.model.bandwidth={eps}").train()
        with torch.no_grad():
            sae.theta.fill_(theta * eps)
            sae.b_enc.sub_(
                torch.quantile(sae.pre_acts(x), 1 - density, dim=0) - theta * eps
            )  # every latent fires that often
        fwd = sae.training_forward(Batch(x, x))
        assert (fwd.codes.pattern is None) == (sparse_below == 0.0)
        assert fwd.codes.l0 / sae.d_sae == pytest.approx(density, rel=0.2)
        loss = sae.loss(Batch(x, x), step(sae))
        loss.total.backward()
        return loss.total.item(), {n: p.grad for n, p in sae.named_parameters()}

    sparse, dense = measured(1.1), measured(0.0)
    assert sparse[0] == pytest.approx(dense[0], rel=1e-5)
    for key, grad in sparse[1].items():
        assert (grad - dense[1][key]).norm() <= 1e-4 * grad.norm() + 1e-7, key
    assert sparse[1]["theta"].norm() > 0 or (form == "tanh" and theta == 0), (
        "the kernel's derivative has the factor theta"
    )


def test_jumprelu_straight_through_to_a_only_where_asked():
    a = torch.tensor([0.5, 0.52, 0.48, 0.1], requires_grad=True)
    theta = torch.full((4,), 0.5)
    _Jump.apply(a, theta, 0.1, False).sum().backward()
    assert a.grad.tolist() == [0, 1, 0, 0]
    a.grad = None
    _Jump.apply(a, theta, 0.1, True).sum().backward()
    assert a.grad.tolist() == [1, 1, 1, 0]


@pytest.mark.parametrize("name", ["standard", "p_anneal", "jumprelu", "kl"])
def test_biases_start_where_every_latent_fires_equally_often(name):
    x = rows(4000, 0)
    plain, sparse_start = (
        make(name, "sae.model.start_l0=null"),
        make(name, "sae.model.start_l0=2.0"),
    )
    for sae in (plain, sparse_start):
        sae.begin("train", x, x)
    rate = (sparse_start.pre_acts(x) > 0).float().mean(0)
    torch.testing.assert_close(
        rate, torch.full_like(rate, 2 * 4 / 48), atol=1 / 2000, rtol=0
    )  # start_l0 * L0 / M
    assert (
        torch.equal(plain.W_enc, sparse_start.W_enc)
        and (plain.pre_acts(x) > 0).float().mean() > 0.3
    )


def test_only_the_thresholds_of_dead_latents_melt():
    sae = make("jumprelu", "sae.model.melt=0.5").train()
    before = sae.theta.detach().clone()
    dead = torch.zeros(sae.d_sae, dtype=torch.bool)
    dead[3] = True
    sae.after_step(sae.training_forward(batch()), step(sae, dead=dead))
    assert sae.theta[3] == before[3] / 2 and torch.equal(sae.theta[~dead], before[~dead])


@pytest.mark.parametrize(
    ("name", "bias"), [("standard", "b_enc"), ("jumprelu", "b_enc"), ("gated", "b_mag")]
)
def test_only_the_biases_of_dead_latents_rise(name, bias):
    sae = make(name).train()
    assert sae.lift > 0
    before = {key: p.clone() for key, p in sae.named_parameters()}
    dead = torch.arange(M) % 3 == 0
    now = step(sae, dead=dead)
    fwd = sae.loss(batch(64), now).extra
    sae.after_step(fwd, now)
    risen = before[bias] + sae.lift * dead
    assert torch.equal(sae.get_parameter(bias), risen)
    assert torch.equal(sae.b_enc, risen if bias == "b_enc" else before["b_enc"])


def test_a_gated_latent_whose_magnitude_is_negative_comes_back():
    """Its gate opens as before; AuxK and the gate's own term do not reach its magnitude."""
    fires = {}
    for lift in (0.0, 0.01):
        sae, start = make("gated", f"sae.model.lift={lift}"), rows(2048, 10**6)
        sae.b_mag.data[:5] = -3.0
        fit_saes(
            {"gated": sae},
            lambda index: batch(128, index),
            config(steps=600),
            Sample(start, start, start),
            seed=0,
            dead_after=1000,
        )
        fires[lift] = (sae.encode(rows(2048, 7)) > 0).any(0)[:5]
    assert not fires[0.0].any()
    assert fires[0.01].all()


def test_kl_penalty_is_zero_at_the_target_rate_and_by_formula_elsewhere():
    sae = make(
        "kl",
        "sae.model.form=sigmoid",
        "sae.model.coeff=2.0",
        "sae.model.rho=0.2",
        "sae.model.warmup_frac=0.0",
    )
    sae.W_enc.data.zero_()
    sae.b_enc.data.fill_(math.log(0.2 / 0.8))
    assert sae.train().loss(batch(), step(sae)).parts["sparsity"].item() == pytest.approx(
        0, abs=1e-5
    )
    sae.b_enc.data.fill_(0.0)  # rate 1/2
    kl = 0.2 * math.log(0.4) + 0.8 * math.log(1.6)
    assert sae.loss(batch(), step(sae)).parts["sparsity"].item() == pytest.approx(
        2.0 * M * kl, rel=1e-4
    )


def test_p_anneal_has_a_finite_gradient_at_zero():
    z = torch.tensor([0.0, 0.5], requires_grad=True)
    power_sum(z, 0.2).backward()
    assert torch.isfinite(z.grad).all()
    assert power_sum(torch.tensor([0.25, 4.0]), 0.5).item() == pytest.approx(2.5, rel=1e-2)


def test_the_orthogonality_penalty_by_brute_force():
    sae = make("orthogonal", "sae.model.gamma=1.0", "sae.model.chunk=1000")
    cosines = sae.W_dec @ sae.W_dec.t()
    best = [max(max(cosines[i, j].item(), 0) for j in range(M) if j != i) for i in range(M)]
    fwd = sae.train().training_forward(batch())
    assert sae.penalties(fwd, step(sae))["orthogonality"].item() == pytest.approx(
        sum(b * b for b in best) / M, rel=1e-4
    )


# --- AuxK -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["topk", "batch_topk", "matryoshka", "standard"])
def test_aux_k_reaches_dead_rows_and_no_live_parameter(name):
    sae = make(name).train()
    dead = torch.arange(M) % 3 == 0
    sae.b_enc.data[dead] = -50.0  # negative everywhere: only the leaky slope gives these a gradient
    fwd = sae.training_forward(batch())
    aux = sae.aux_loss(fwd, step(sae, dead=dead))["aux_k"]
    grads = torch.autograd.grad(
        aux, [sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec], allow_unused=True
    )
    for g in grads[:2]:
        assert bool((g[dead].norm(dim=1) > 0).any()) and not bool(g[~dead].any())
    assert not bool(grads[2][~dead].any())
    assert grads[3] is None or not bool(grads[3].any())


# --- matryoshka and lista -------------------------------------------------------------------------


@pytest.mark.parametrize("sorted_", ["false", "true"])
def test_nested_decoding_equals_separate_decodes(sorted_):
    sae = make("matryoshka", f"sae.model.sort_by_frequency={sorted_}").train()
    if sorted_ == "true":
        sae.group.copy_(sae.group[torch.randperm(M, generator=torch.Generator().manual_seed(1))])
    fwd = sae.training_forward(batch())
    acts = fwd.codes.dense()
    for g in range(len(sae.ends)):
        expected = (acts * (sae.group <= g)) @ sae.W_dec + sae.b_dec
        torch.testing.assert_close(fwd.levels[:, g], expected, rtol=1e-4, atol=1e-5)


def test_nested_gradients_equal_dense_ones():
    sae = make("matryoshka").train()
    fwd = sae.training_forward(batch())
    sum(sae.reconstruction(fwd, step(sae)).values()).backward()
    found = [p.grad.clone() for p in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec)]
    sae.zero_grad()
    mask = fwd.codes.dense().detach() != 0
    x = fwd.batch.x
    acts = ((x - sae.b_dec) @ sae.W_enc.t() + sae.b_enc) * mask
    n = len(sae.ends)
    sum(
        (((acts[:, :e] @ sae.W_dec[:e] + sae.b_dec) - x).square().sum() / len(x) / n)
        for e in sae.ends
    ).backward()
    for f, p in zip(found, (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec), strict=True):
        assert (f - p.grad).norm() <= 1e-4 * p.grad.norm()


def test_detached_inner_losses_train_only_their_own_group():
    sae = make("matryoshka", "sae.model.detach_inner=true").train()
    fwd = sae.training_forward(batch())
    inner = (fwd.levels[:, 1] - fwd.batch.y).square().sum()
    grad = torch.autograd.grad(inner, sae.W_dec)[0]
    assert not bool(grad[sae.group != 1].any()) and bool(grad[sae.group == 1].any())


def test_lista_codes_follow_the_formula():
    sae = trained("lista", n_train=10)
    x = rows(64, 0)
    a0 = (x - sae.b_dec) @ sae.W_enc.t() + sae.b_enc
    z0 = a0 * (a0 > sae.first_threshold)
    a1 = a0 + sae.eta * (x - sae.b_dec - z0 @ sae.W_dec) @ sae.W_enc.t()
    torch.testing.assert_close(sae.encode(x), a1 * (a1 > sae.threshold), rtol=1e-3, atol=1e-4)


def test_decreasing_k_starts_high_and_ends_at_k():
    sae = make("matryoshka", "sae.model.k_start=3.0")
    assert sae.budget() == 12
    fwd = sae.train().loss(batch(), step(sae)).extra
    sae.after_step(fwd, step(sae, progress=0.4))
    assert sae.budget() == pytest.approx(8)
    sae.after_step(fwd, step(sae, progress=0.95))
    assert sae.budget() == 4


# --- reductions: one variant becomes another ------------------------------------------------------

BTK = ("batch_topk",)
REDUCTIONS = [
    (("matryoshka", "sae.model.group_fracs=[1.0]"), BTK),
    (("lista", "sae.model.group_fracs=[1.0]", "sae.model.eta=0.0"), BTK),
    (("orthogonal", "sae.model.gamma=0.0"), BTK),
    (("end_to_end", "sae.model.kl_coeff=0.0", "sae.model.later_coeff=0.0"), BTK),
    (("p_anneal", "sae.model.p_end=1.0"), ("standard",)),
]


@pytest.mark.parametrize(("special", "plain"), REDUCTIONS, ids=lambda v: v[0])
def test_a_variant_with_its_own_part_off_is_its_host(special, plain):
    one, two = trained(*special, n_train=25), trained(*plain, n_train=25)
    for key, value in two.state_dict().items():
        torch.testing.assert_close(one.state_dict()[key], value, rtol=1e-5, atol=1e-6)


def test_a_crosscoder_of_one_site_is_the_norm_weighted_standard_sae():
    one = trained(
        "crosscoder",
        "sae.model.n_sites=1",
        "sae.model.start_norm=0.1",
        "sae.read=[resid.1]",
        n_train=25,
    )
    two = trained("standard", "sae.model.norm_weighted=true", n_train=25)
    for key, value in two.state_dict().items():
        torch.testing.assert_close(one.state_dict()[key], value, rtol=1e-4, atol=1e-5)


def test_a_crosscoder_scales_every_site_by_itself():
    from sae_experiments.fitting.fit import units_of

    x = torch.tensor([[1.0, 1.0, 4.0, 4.0], [3.0, 3.0, 8.0, 8.0]])
    units = units_of(x, "x", 2)
    assert units.centre.tolist() == [2.0, 2.0, 6.0, 6.0]
    assert units.scale.tolist() == pytest.approx([1 / math.sqrt(2)] * 2 + [1 / math.sqrt(8)] * 2)


# --- controller and mistakes ----------------------------------------------------------------------


@pytest.mark.parametrize("start", [0.5, 200.0])
def test_the_controller_brings_a_slow_plant_to_its_target(start):
    controller = L0Controller(target=32, coeff=None, start=0.01, aim=1.0)
    controller.horizon = 2000
    log_l0 = math.log(start)
    for _ in range(2000):  # ln L0 follows -0.6 ln lambda with a lag of 50 steps
        log_l0 += (3 - 0.6 * math.log(controller.coeff) - log_l0) / 50
        controller.update(math.exp(log_l0))
    assert math.exp(log_l0) == pytest.approx(32, rel=0.03)


@pytest.mark.parametrize(
    ("name", "kwargs", "word"),
    [
        ("topk", {"k": 0}, "k=0"),
        ("topk", {"k": 49}, "k=49"),
        ("batch_topk", {"k": 100}, "k=100"),
        ("matryoshka", {"group_fracs": [0.5, 0.4]}, "group_fracs"),
        ("matryoshka", {"group_fracs": [0.001, 0.999]}, "without latents"),
        ("matryoshka", {"k_start": 100.0}, "k_start"),
        ("standard", {"coeff": -1.0}, "coeff"),
        ("standard", {"aux_coeff": -1.0}, "aux_coeff"),
        ("jumprelu", {"bandwidth": 0.0}, "bandwidth"),
        ("kl", {"form": "tanh"}, "form"),
        ("orthogonal", {"gamma": -1.0}, "gamma"),
        ("crosscoder", {"n_sites": 3}, "sites"),
        ("end_to_end", {"kl_coeff": -1.0}, "kl_coeff"),
    ],
)
def test_a_setting_that_cannot_work_is_one_line(name, kwargs, word):
    with pytest.raises(UserError, match=word) as error:
        make(name, **kwargs)
    assert "\n" not in str(error.value)

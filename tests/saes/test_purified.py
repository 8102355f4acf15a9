"""Purification: the host's own bits without it, what each term computes, the pool against
explicit encodes, adaptation, early stopping.
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from sae_experiments.config.compose import build, compose_checked
from sae_experiments.errors import NonFinite, UserError
from sae_experiments.fitting.fit import Sample, fit_saes
from sae_experiments.metrics.robustness.sums import Sums
from sae_experiments.saes import ops
from sae_experiments.saes import saelens as interop
from sae_experiments.saes.base import Batch, Codes
from sae_experiments.saes.pattern import Pattern
from sae_experiments.saes.purified import sae as purified
from sae_experiments.saes.purified.change import Answer, places
from sae_experiments.saes.purified.perturb import SHARED
from sae_experiments.sampling import spread
from support.common import CONF
from support.drawing import drawn
from support.purified import HOSTS, kinds, plainly
from support.saes import D, M, batch, config, make, rows, step


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.numpy().tobytes() == b.numpy().tobytes()


def weights(**values: float) -> list[str]:
    return [
        f"sae.model.weights.{k}={v}"
        for k, v in ({"denoise": 0.0, "stability": 0.0} | values).items()
    ]


def fitted(sae, n_train: int):
    """The SAE after ``n_train`` steps, calibrated."""
    start = rows(2048, 10**6)
    fit_saes(
        {"sae": sae},
        lambda s: batch(256, s),
        config(steps=n_train),
        Sample(start, start, rows(2048, 10**6 + 1)),
        seed=0,
        dead_after=4000,
    )
    return sae


def ready(*overrides: str, host: str = "batch_topk"):
    """A purified SAE that has seen the rows it is initialised from."""
    sae = plainly(*overrides, host=host).train()
    start = rows(1024, 3)
    sae.begin("train", start, start)
    return sae


def answer_of(sae, x: Batch):
    info = step(sae)
    return sae.answer(sae.training_forward(x), info)


@pytest.mark.parametrize("off", ["sae.model.eps=0", "weights"])
@pytest.mark.parametrize("host", ["batch_topk", "jumprelu", "orthogonal"])
def test_without_noise_or_weights_training_gives_the_bits_of_the_host(host, off):
    one = fitted(make(host), 30)
    other = fitted(plainly(*(weights() if off == "weights" else [off]), host=host), 30)
    assert one.state_dict().keys() == other.state_dict().keys()
    assert all(same_bits(v, other.state_dict()[k]) for k, v in one.state_dict().items())


@pytest.mark.parametrize("host", HOSTS)
def test_every_host_is_purified_and_keeps_its_own_inference(host, tmp_path):
    sae = fitted(plainly(host=host), 12)
    plain = make(host)
    assert isinstance(sae, type(plain))
    assert all(bool(torch.isfinite(p).all()) for p in sae.parameters())
    try:
        name = plain.inference().architecture
    except UserError:
        return
    if host == "tied":
        return  # its stored form is tested with the host
    interop.save_sae(sae, tmp_path / host, reference=rows(32, 5), metadata={})
    loaded = interop.load_sae(tmp_path / host)
    assert loaded.architecture in (
        name,
        "jumprelu",
    )  # a calibrated threshold makes a standard SAE a JumpReLU
    torch.testing.assert_close(loaded(rows(32, 6)), sae(rows(32, 6)), rtol=1e-4, atol=1e-5)


def test_host_and_its_numbers_come_from_the_command_line():
    cfg, label = compose_checked(
        CONF,
        [
            "preset=smoke",
            "sae=[batch_topk,purified]",
            "sae/host=[topk,jumprelu]",
            "sae.target_l0=7",
        ],
    )
    saes = build(cfg.study).saes
    assert label == "batch_topk, purified-topk, purified-jumprelu" and len(saes) == 3
    assert saes["purified-jumprelu"].model.keywords["host"].keywords["target_l0"] == 7
    cfg, _ = compose_checked(
        CONF, ["preset=smoke", "sae=purified", "sae/host=jumprelu", "sae.host.model.bandwidth=0.5"]
    )
    assert (
        next(iter(build(cfg.study).saes.values())).model.keywords["host"].keywords["bandwidth"]
        == 0.5
    )
    cfg, _ = compose_checked(CONF, ["preset=smoke", "sae=purified", "sae/host=transcoder"])
    assert (cfg.saes.purified["read"], cfg.saes.purified["write"]) == ("mlp_in.mid", "mlp_out.mid")
    for wrong, words in (
        (["sae=topk", "sae/host=topk"], "sae=purified"),
        (["sae=purified", "sae/host=jumprel"], "did you mean jumprelu"),
    ):
        with pytest.raises(UserError, match=words):
            compose_checked(CONF, ["preset=smoke", *wrong])


@pytest.mark.parametrize("kind", SHARED)
def test_the_pool_gives_the_pre_activations_of_the_rows_it_moved(kind):
    """W_enc (x + delta) = W_enc x + W_enc delta: the code of the moved rows is what the encoder
    says to them.
    """
    sae = ready(
        *kinds(**{kind: 1.0}), "sae.model.row_frac=0.7", "sae.model.pool=5", host="standard"
    )
    x = batch(64)
    answer = answer_of(sae, x)
    delta = answer.x - x.x[answer.rows]
    assert len(answer.rows) == round(0.7 * 64) and delta.abs().max() > 0
    assert (
        len(
            torch.unique(torch.nn.functional.normalize(delta, dim=1).abs().round(decimals=3), dim=0)
        )
        <= 5
    )
    torch.testing.assert_close(
        answer.after.dense(), torch.relu(sae.pre_acts(answer.x)), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("pool", [0, 8])
def test_all_kinds_together_move_every_row_by_the_asked_for_size(pool):
    sae = ready(
        *kinds(
            gaussian=0.2,
            uniform=0.1,
            mask=0.1,
            covariance=0.1,
            swap=0.1,
            token=0.1,
            fgsm=0.1,
            pgd=0.1,
            targeted=0.1,
        ),
        *weights(stability=1, targeted=1),
        "sae.model.row_frac=1.0",
        f"sae.model.pool={pool}",
        host="standard",
    )
    x = batch(400)._replace(alt=rows(400, 8))
    answer = answer_of(sae, x)
    size = (answer.x - x.x[answer.rows]).norm(dim=1)
    reach = 0.1 * sae.cloud.radius
    assert size.square().mean().sqrt().item() == pytest.approx(reach.item(), rel=0.15)
    torch.testing.assert_close(
        answer.after.dense(), torch.relu(sae.pre_acts(answer.x)), rtol=1e-4, atol=1e-5
    )
    aimed = answer.latents >= 0
    torch.testing.assert_close(
        size[-len(aimed) :][aimed], reach.expand(int(aimed.sum())), rtol=1e-4, atol=1e-6
    )


def test_token_noise_without_a_second_view_is_one_line():
    sae = ready(*kinds(token=1.0), *weights(stability=1))
    with pytest.raises(UserError, match="mixture.token"):
        sae.loss(batch(), step(sae))


@pytest.mark.parametrize("relative", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("host", ["batch_topk", "standard"])  # sparse and dense codes
def test_stability_is_the_squared_change_of_the_code(host, relative):
    sae = ready(
        *weights(stability=3.0),
        "sae.model.row_frac=1.0",
        f"sae.model.relative={relative}",
        host=host,
    )
    x = batch(64)
    fwd, answer = sae.training_forward(x), answer_of(sae, x)
    z, moved = fwd.codes.dense()[answer.rows], answer.after.dense()
    variance = (x.y - x.y.mean(0)).square().sum() / 64
    size = z.square().sum() ** (1 - relative) * (z - z.mean(0)).square().sum() ** relative
    expected = 3 * variance * (moved - z).square().sum() / size
    assert sae.robustness(fwd, step(sae))["stability"].item() == pytest.approx(
        expected.item(), rel=1e-4
    )
    change = sae.change(answer)
    union, shared = ((z != 0) | (moved != 0)).sum(1), ((z != 0) & (moved != 0)).sum(1)
    some = union > 0
    assert change.jaccard().item() == pytest.approx((shared / union)[some].mean().item(), rel=1e-5)


def test_l2_norm_and_denoising_terms():
    sae = ready(
        *weights(stability=1.0, denoise=2.0),
        "sae.model.norm=l2",
        "sae.model.row_frac=1.0",
        "sae.model.relative=0",
    )
    x = batch(64)
    fwd, answer = sae.training_forward(x), answer_of(sae, x)
    terms = sae.robustness(fwd, step(sae))
    z, moved = fwd.codes.dense()[answer.rows], answer.after.dense()
    variance = (x.y - x.y.mean(0)).square().sum() / 64
    expected = variance * (moved - z).norm(dim=1).mean() / (z.square().sum() / 64).sqrt()
    assert terms["stability"].item() == pytest.approx(expected.item(), rel=1e-2)
    assert terms["denoise"].item() == pytest.approx(
        2 * (sae.decode(moved) - x.y[answer.rows]).square().sum().item() / 64, rel=1e-4
    )


def test_a_code_can_be_made_stable_neither_by_shrinking_nor_by_a_constant():
    """Relative: no gradient along the encoder's weights, and an offset of latents that are on
    anyway changes nothing. Not relative: the gradient points to a smaller code.
    """
    along = {}
    for relative in (1.0, 0.5, 0.0):
        sae = ready(
            *weights(stability=1.0),
            "sae.model.row_frac=1.0",
            f"sae.model.relative={relative}",
            host="standard",
        )
        with torch.no_grad():
            sae.b_dec.zero_()
            sae.b_enc[:4] = 5.0  # on in every row
        stable = sae.robustness(sae.training_forward(batch(256)), step(sae))["stability"]
        gradients = torch.autograd.grad(stable, [sae.W_enc, sae.b_enc])
        along[relative] = (
            sum(
                (g * p.detach()).sum().item()
                for g, p in zip(gradients, (sae.W_enc, sae.b_enc), strict=True)
            )
            / stable.item()
        )
        if relative == 1:
            assert gradients[1][:4].abs().max() < 1e-4 * gradients[1].abs().max()
            with torch.no_grad():
                sae.b_enc[:4] += 3.0
            assert sae.robustness(sae.training_forward(batch(256)), step(sae))[
                "stability"
            ].item() == pytest.approx(stable.item(), rel=1e-3)
    assert (
        abs(along[1.0]) < 1e-3
        and along[0.5] == pytest.approx(1, rel=1e-3)
        and along[0.0] == pytest.approx(2, rel=1e-3)
    )  # degree 2 (1 - r)


def test_denoising_on_few_rows_says_what_all_rows_would():
    """Its mean over draws of rows is the error over the whole batch, and it varies far less
    than the plain mean over the perturbed rows.
    """
    few, all_rows = (
        ready(
            *weights(denoise=1.0),
            f"sae.model.row_frac={share}",
            "sae.model.eps=0.02",
            host="standard",
        )
        for share in (0.125, 1.0)
    )
    x = batch(256)
    whole = all_rows.robustness(all_rows.training_forward(x), step(all_rows))["denoise"].item()
    found, plain = [], []
    for draw in range(40):
        info = replace(step(few), generator=torch.Generator().manual_seed(draw))
        found.append(few.robustness(few.training_forward(x), info)["denoise"].item())
        info.generator.manual_seed(draw)
        answer = few.answer(few.training_forward(x), info)
        plain.append(ops.squared_error(few.rebuilt(answer), x.y[answer.rows]).item())
    assert np.mean(found) == pytest.approx(whole, rel=0.01) and np.std(found) < 0.2 * np.std(plain)


def test_the_clean_error_is_computed_once_and_forgotten():
    sae = ready(*weights(denoise=3.0), "sae.model.row_frac=0.25")
    x, info = batch(256), step(sae, progress=0.5)
    parts = sae.loss(x, info).parts
    info = step(sae, progress=0.5)
    fwd = sae.training_forward(x)
    assert (
        parts["denoise"].item()
        == pytest.approx(sae.robustness(fwd, info)["denoise"].item(), rel=1e-5)
        and sae._clean is None
    )


def test_dead_latents_are_revived_from_as_many_rows_as_are_perturbed():
    sae, plain = (
        ready("sae.model.row_frac=0.25"),
        ready("sae.model.row_frac=0.25", "sae.model.eps=0"),
    )
    dead = torch.zeros(M, dtype=torch.bool)
    dead[:3] = True
    x = batch(256)
    for one, n in ((sae, 64), (plain, 256)):
        fwd, info = one.training_forward(x), replace(step(one), dead=dead)
        seen = spread(256, n)
        expected = one.aux_coeff * one.aux_k_loss(x.x[seen], (x.y - fwd.recon)[seen], dead)
        assert one.aux_loss(fwd, info)["aux_k"].item() == pytest.approx(expected.item(), rel=1e-6)


def as_masks(sae):
    """Turn every pattern into a mask, so that the same code is held densely."""
    plain = sae.support
    sae.support = lambda pre: (
        s.dense(torch.ones_like(s.col, dtype=pre.dtype)) > 0
        if isinstance(s := plain(pre), Pattern)
        else s
    )


NOISE = ["gaussian", "mask", "swap", "fgsm", "pgd", "targeted"]
HELD_DENSE = [
    h for h in HOSTS if h not in ("matryoshka", "lista")
]  # these decode groups from the pattern itself


@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("host", HELD_DENSE)
def test_zeros_that_a_sparse_code_holds_are_not_active_latents(host, noise, monkeypatch):
    """With biases this low hardly any row has k positive pre-activations, so that a TopK's
    support is padded with zeros; a JumpReLU's window holds zeros too. A dense code cannot tell
    such a zero from any other: loss, gradients and the supports' overlap have to be the same.
    """

    def measured(dense: bool):
        monkeypatch.setattr(ops, "SPARSE_BELOW", 0.0 if dense else 1.1)
        options = [
            *weights(denoise=5.0, stability=18.0, targeted=0.5),
            *kinds(**{noise: 1.0}),
            "sae.model.row_frac=0.5",
            "sae.model.pool=0",
        ]
        sae = ready(*options, "sae.model.eps=0.3", host=host)
        with torch.no_grad():
            sae.b_enc.sub_(0.6 if host in ("topk", "abs_topk") else 0.0)
        if dense:
            as_masks(sae)
        loss = sae.loss(batch(512), step(sae))
        loss.total.backward()
        padded = isinstance(sae.support(sae.pre_acts(batch(512).x)), Pattern) and bool(
            (loss.extra.codes.values == 0).any()
        )
        return (
            loss.total.item(),
            {n: p.grad for n, p in sae.named_parameters()},
            sae._last.jaccard().item(),
            padded,
        )

    sparse, dense = measured(False), measured(True)
    if host in ("topk", "jumprelu"):
        assert sparse[3] or host == "jumprelu", "the support is padded"
    assert sparse[0] == pytest.approx(dense[0], rel=1e-4) and sparse[2] == pytest.approx(
        dense[2], abs=1e-6
    )
    for key, grad in sparse[1].items():
        assert (grad - dense[1][key]).norm() <= 1e-3 * grad.norm() + 1e-6, key


def test_the_clean_code_is_a_constant_only_if_asked():
    for stop in ("true", "false"):
        sae = ready(
            *weights(stability=1.0),
            f"sae.model.stop_gradient={stop}",
            "sae.model.row_frac=1.0",
            host="standard",
        )
        answer = answer_of(sae, batch(64))
        assert (
            answer.before.values.requires_grad is (stop == "false")
            and answer.after.values.requires_grad
        )


def test_the_stability_term_has_a_gradient_that_shrinks_the_response():
    """Noise behind the encoder would give a constant; here a step downhill makes the same noise
    move the code less.
    """
    sae = ready(*weights(stability=1.0), host="standard")
    x = batch(512)
    before = sae.robustness(sae.training_forward(x), step(sae))["stability"]
    (gradient,) = torch.autograd.grad(before, sae.W_enc)
    assert gradient.norm() > 0
    with torch.no_grad():
        sae.W_enc.sub_(0.05 * gradient / gradient.norm())
    assert sae.robustness(sae.training_forward(x), step(sae))["stability"] < before


def test_analytic_and_decay_terms_by_hand():
    sae = ready(*weights(analytic=2.0, decay=0.5))
    x = batch(64)
    fwd = sae.training_forward(x)
    terms = sae.robustness(fwd, step(sae))
    assert set(terms) == {"analytic", "decay"}
    z, squares = fwd.codes.dense(), sae.W_enc.square().sum(1)
    variance = (x.y - x.y.mean(0)).square().sum() / 64
    n0, sigma2 = z.square().sum() / 64, (0.1 * sae.cloud.radius) ** 2 / D
    assert terms["decay"].item() == pytest.approx(
        (0.5 * variance * squares.sum() / M).item(), rel=1e-5
    )
    assert terms["analytic"].item() == pytest.approx(
        (2 * variance / n0 * sigma2 * ((z != 0).float() @ squares).mean()).item(), rel=1e-5
    )


def test_the_analytic_term_is_the_mean_of_sampled_gaussian_noise_without_flips():
    sae = ready(
        *weights(stability=1.0, analytic=1.0),
        *kinds(gaussian=1.0),
        "sae.model.row_frac=1.0",
        "sae.model.eps=0.001",
        "sae.model.pool=0",
        "sae.model.relative=0",
        host="standard",
    )
    x = batch(4096)
    terms = sae.robustness(sae.training_forward(x), step(sae))
    assert terms["stability"].item() == pytest.approx(terms["analytic"].item(), rel=0.05)


def test_targeted_term_by_hand():
    """Latent 0 answers to its own direction with slope 0.5 and moves latent 1 by a quarter;
    nothing else moves.
    """
    reach, latents, sign = torch.tensor(0.2), torch.tensor([0, 0]), torch.tensor([1.0, -1.0])
    before = Codes(
        torch.tensor([1.0, 1.0, 1.0, 1.0]), Pattern.from_mask(torch.ones(2, 2, dtype=torch.bool))
    )
    sae = ready(host="standard")
    sae.d_sae = 2
    moved = torch.tensor([1 + 0.1, 1 + 0.05, 1 - 0.1, 1 + 0.05])
    answer = Answer(
        torch.arange(2), torch.zeros(2, D), before, Codes(moved, before.pattern), latents, sign
    )
    own, others = sae.change(answer).crosstalk(answer, reach, None)
    assert own.item() == pytest.approx(2 * 0.5**2, rel=1e-5)
    assert others.item() == pytest.approx(2 * 0.25**2, rel=1e-5)


def test_one_kind_of_noise_or_all_but_one():
    mixture = [f"sae.model.mixture.{k}=1.0" for k in ("swap", "targeted")]
    for noise, expected in (
        ("mixture", {"gaussian", "swap", "targeted"}),
        ("covariance", {"covariance"}),
        ("not_swap", {"gaussian", "targeted"}),
    ):
        assert {
            k
            for k, v in plainly(*mixture, f"sae.model.noise={noise}").purification.kinds.items()
            if v
        } == expected


def test_terms_wait_and_then_grow():
    sae = ready()
    totals = {at: set(sae.loss(batch(), step(sae, progress=at)).parts) for at in (0.0, 0.05, 0.15)}
    assert totals[0.0] == totals[0.05] == {"mse"} and totals[0.15] == {
        "mse",
        "denoise",
        "stability",
    }
    half, whole = (
        sae.loss(batch(), step(sae, progress=at)).parts["stability"].item() for at in (0.15, 0.9)
    )
    assert half == pytest.approx(whole / 2, rel=1e-5)


@pytest.mark.parametrize(
    ("jaccard", "factor"), [(0.95, math.exp(0.02 * 0.05)), (0.5, math.exp(-0.02 * 0.4))]
)
def test_eps_grows_where_supports_are_stable_and_shrinks_where_not(jaccard, factor):
    sae = ready("sae.model.adapt.rate=0.02", "sae.model.adapt.target=0.9")
    sae.adapt(torch.tensor(jaccard))
    assert sae.eps.item() == pytest.approx(0.1 * factor)
    for _ in range(10_000):
        sae.adapt(torch.tensor(1.0 if jaccard > 0.9 else 0.0))
    assert sae.eps.item() == pytest.approx(0.5 if jaccard > 0.9 else 0.01)


def test_adaptation_survives_and_is_recorded():
    sae = fitted(plainly("sae.model.adapt.rate=0.5", "sae.model.adapt.target=0.5"), 60)
    trace = sae.eps_trace
    assert (
        bool(torch.isfinite(trace).all())
        and trace[0] == pytest.approx(0.1)
        and trace[-1] == pytest.approx(sae.eps.item(), rel=1e-5)
    )
    assert trace[-1] != trace[0]


def test_purification_forgets_directions_in_which_the_rows_do_not_vary():
    """Planted truth: rows fill half of the space. The host keeps in the other half what its
    initialisation had there, so noise in it moves its code; the purified one has no use for it,
    and reconstructs as well.
    """
    inside = torch.arange(D) < D // 2

    def flat(n: int, seed: int) -> torch.Tensor:
        return rows(n, seed) * inside

    found = {}
    for name in ("batch_topk", "purified"):
        sae, start = (
            plainly("sae.model.row_frac=1.0") if name == "purified" else make(name),
            flat(2048, 1),
        )
        fit_saes(
            {name: sae},
            lambda at: Batch(flat(256, at), flat(256, at)),
            config(steps=200),
            Sample(start, start, flat(4096, 2)),
            seed=0,
            dead_after=4000,
        )
        x = flat(4096, 3)
        noise = (
            0.1
            * (x - x.mean(0)).norm(dim=1).mean()
            * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
            / D**0.5
        )
        sums = Sums(M)
        sums.add(sae.encode(x), sae.encode(x + noise))
        fvu = ((x - sae(x)).square().sum() / (x - x.mean(0)).square().sum()).item()
        weights_of = sae.W_enc[(sae.encode(x) != 0).any(0)]
        found[name] = (
            sums.change(),
            fvu,
            (weights_of[:, ~inside].norm() / weights_of[:, inside].norm()).item(),
        )
    (change, fvu, outside), (better_change, better_fvu, less_outside) = (
        found["batch_topk"],
        found["purified"],
    )
    assert outside > 1 and less_outside < 0.85 * outside
    assert better_change < 0.8 * change and better_fvu < 1.02 * fvu


def stopping(**changes):
    return [
        f"sae.model.stop.{k}={v}"
        for k, v in (
            {"patience": 2, "eval_every_frac": 0.1, "eval_rows": 256, "start_frac": 0.2} | changes
        ).items()
    ]


def test_early_stopping_puts_the_best_state_back(monkeypatch):
    """The score is made to fall after the third look: training ends two looks later and the
    weights are those of the third.
    """
    kept, looks = {}, []

    def measure(self, sae):
        looks.append(len(looks))
        if len(looks) == 3:
            kept.update(copy.deepcopy(dict(sae.named_parameters())))
        return (50.0 + len(looks) if len(looks) <= 3 else 10.0), 0.1

    monkeypatch.setattr(purified.StabilityEarlyStopping, "measure", measure)
    sae = fitted(plainly(*stopping()), 40)
    assert len(looks) == 5 and sae.early_stopping.stopped
    assert sae.early_stopping.stopped_at == pytest.approx(
        0.6, abs=0.03
    ) and sae.early_stopping.score_at == pytest.approx(0.4, abs=0.03)
    assert same_bits(
        kept["b_enc"].detach(), sae.b_enc.detach()
    )  # the one parameter that the scale, folded in at the end, leaves alone


def test_a_state_with_a_worse_reconstruction_is_not_the_best():
    sae = ready(*stopping())
    watch = sae.early_stopping
    watch.note(least_fvu=0.1)
    assert watch.score(90, 0.105) == 90 and watch.score(90, 0.125) == pytest.approx(70)
    watch.note(least_fvu=0.05)  # what was good is judged by what has been seen since
    assert watch.score(90, 0.105) == pytest.approx(90 - 100 * (2.1 - 1.05))


def test_looking_changes_nothing():
    one = fitted(plainly(), 40)
    other = fitted(plainly(*stopping(patience=100, start_frac=0.0)), 40)
    # The last step may be better than the last look; all else is the same fit.
    assert other.early_stopping.trace[:, 1].isfinite().sum() >= 8
    assert same_bits(one.eps_trace, other.eps_trace)
    assert same_bits(one.cloud.root, other.cloud.root)


def test_a_nan_in_an_activation_is_named_at_its_step():
    sae, start = plainly(), rows(1024, 9)

    def batch_at(at: int) -> Batch:
        x = rows(128, at)
        if at == 7:
            x[5, 3] = math.nan
        return Batch(x, x)

    with pytest.raises(NonFinite, match=r"at step 7\b"):
        fit_saes(
            {"purified": sae},
            batch_at,
            config(steps=20),
            Sample(start, start, rows(1024, 10)),
            seed=0,
            dead_after=1000,
        )


def test_a_host_with_a_pass_of_its_own_is_refused():
    with pytest.raises(UserError, match="training pass of its own"):
        plainly(host="hierarchical")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sae.model.relative=2", "relative"),
        ("sae.model.weights.stability=-1", "stability"),
        ("sae.model.row_frac=0", "row_frac"),
        ("sae.model.eps=-1", "eps"),
        ("sae.model.norm=l1", "l2sq"),
        ("sae.model.weights.denoise=-1", "denoise"),
        ("sae.model.mixture.gaussian=0", "no kind"),
        ("sae.model.adapt.target=2", "adapt"),
        ("sae.model.aim.weak=-1", "weak"),
        ("sae.model.stop.eval_every_frac=2", "eval_every_frac"),
        ("sae.model.noise=gausian", "noise"),
        ("sae.model.noise=not_gaussian", "no kind"),
    ],
)
def test_numbers_that_cannot_work_are_one_line(override, words):
    with pytest.raises(UserError, match=words):
        plainly(override, "sae.model.stop.patience=1")


def test_places_of_entries_by_hand():
    scratch: dict[str, torch.Tensor] = {}
    one = Pattern.from_flat(torch.tensor([1, 4, 2 * M + 3]), 3, M)
    other = Pattern.from_flat(torch.tensor([0, 1, M + 4, 2 * M + 3]), 3, M)
    for _ in range(2):  # the table is left as it was
        assert places(one, other, scratch).tolist() == [-1, 0, -1, 2]
    assert ops.decode(torch.ones(3), one, torch.eye(M)).sum() == 3


def test_a_second_view_changes_earlier_characters_only(corpus):
    import numpy as np

    from sae_experiments.studies.language.second_view import SecondView

    starts = np.arange(0, 16 * 64, 16)
    view = SecondView.__new__(SecondView)
    train = type("Train", (), {"length": 16, "split": "train", "starts": starts})
    view.stores, view.share, view.seed = (
        type("Stores", (), {"corpus": corpus, "train": train}),
        0.25,
        5,
    )
    ids = corpus.windows("train", starts, 16)
    changed, gone = view.replaced(starts)
    assert (
        torch.equal(changed != ids, gone)
        and abs(gone.float().mean() - 0.25) < 0.05
        and int(changed.max()) < len(corpus.symbols)
    )
    assert torch.equal(
        view.replaced(starts[5:9])[0], changed[5:9]
    )  # whatever other windows are read beside


@pytest.mark.slow
def test_from_the_command_line_to_the_figures_token_noise_included(experiment, tmp_path):
    run = experiment(
        "sae=purified",
        "sae.model.noise=[gaussian,token]",
        "sae.model.token_share=0.2",
        "metric=[downstream,robustness]",
        "metric.robustness.min_fires=3",
        "--out_dir=both",
        "seeds=[0]",
    )
    assert run.returncode == 0, run.stderr
    cell = experiment.json("both", "cells", "text8.purified-noise_token_0.json")
    assert cell["metrics"]["rob_change_token"] > 0 and cell["metrics"]["rob_fss"] < 100
    names = {
        json.loads(line)["name"]
        for line in (
            (experiment.runs / "both" / "curves" / "text8.purified-noise_token_0.jsonl")
            .read_text()
            .splitlines()
        )
    }
    assert {"sae/stability", "sae/denoise"} <= names
    done, empty = drawn(experiment.runs / "both", "purification", tmp_path)
    assert len(done) == 4 and not empty

"""The hierarchical SAE: its forward pass by hand, its phases, what is frozen, how exactly the
sparsities are met, and its state by phase.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from sae_experiments.config.compose import build, compose_checked
from sae_experiments.config.plans import complete
from sae_experiments.errors import NonFinite, UserError
from sae_experiments.fitting.fit import Sample, fit_saes
from sae_experiments.saes.base import Batch
from sae_experiments.saes.hierarchical.level import Joined, exact_threshold
from sae_experiments.saes.hierarchical.sae import PHASES, Hierarchical
from sae_experiments.training.loop import Session
from support.saes import CONF, D, batch, config, make, rows, sae_spec, step

WIDTH = 60


def built(*overrides: str, seed: int = 0) -> Hierarchical:
    return make("hierarchical", "sae.target_l0=null", *overrides, seed=seed, d_sae=WIDTH)


def fit(
    sae: Hierarchical,
    steps: int = 120,
    batch_at=lambda s: batch(256, s),
    session: Session | None = None,
    **changes,
) -> Hierarchical:
    start = rows(4096, 10**6)
    sample = Sample(start, start, rows(16384, 10**6 + 1))
    fit_saes(
        {"h": sae},
        batch_at,
        config(steps=steps, **changes),
        sample,
        seed=0,
        dead_after=4000,
        session=session,
    )
    return sae


@pytest.fixture(scope="module")
def watched() -> tuple[Hierarchical, dict[str, dict[str, Tensor]]]:
    """A fitted SAE, and its whole state at the end of each phase as seen from outside."""
    sae, seen = built(), {}
    finish = sae.finish

    def look(phase: str, x: Tensor) -> None:
        finish(phase, x)
        seen[phase] = copy.deepcopy(sae.state_dict())

    sae.finish = look
    fit(sae)
    del sae.finish
    return sae, seen


def fvu(sae: Hierarchical, x: Tensor, gate: float | None = None) -> float:
    return float(
        (x - sae.decode(sae.encode(x), gate)).square().sum() / (x - x.mean(0)).square().sum()
    )


# --------------------------------------------------------------------------------------------------
# the forward pass


def test_the_forward_pass_by_hand():
    """Two bottom latents, one top latent, everything with a number one can follow."""
    sae = make(
        "hierarchical", "sae.target_l0=null", "sae.model.top_frac=0.34", "sae.model.rank=1", d_sae=3
    ).eval()
    with torch.no_grad():
        for p in sae.parameters():
            p.zero_()
        sae.bottom.W_enc[0, 0] = sae.bottom.W_enc[1, 1] = 1.0
        sae.bottom.W_dec[0, 0] = sae.bottom.W_dec[1, 1] = 1.0
        sae.bottom.b_dec[2] = 5.0
        sae.bottom.threshold.fill_(0.5)
        sae.scale.copy_(torch.tensor([2.0, 4.0]))
        sae.top.W_enc[0] = torch.tensor([1.0, 1.0])
        sae.top.b_enc[0] = -0.25
        sae.top.W_dec[0] = torch.tensor([0.6, 0.8])
        sae.top.b_dec.copy_(torch.tensor([0.0, -10.0]))
        sae.gate_in[0, 0], sae.gate_out[0, 0] = 1.0, math.log(3.0)
        sae.joined.fill_(True)
    x = torch.zeros(1, D)
    x[0, 0], x[0, 1], x[0, 2] = 3.0, 0.4, 7.0
    z1, z2 = (
        torch.tensor([[3.0, 0.0]]),
        torch.tensor([[3.0 / 2.0 - 0.25]]),
    )  # 0.4 lies below the threshold
    acts = sae.encode(x)
    torch.testing.assert_close(acts, torch.cat([z1, z2], 1))
    predicted = torch.tensor(
        [[0.6 * 1.25 * 2.0, 0.0]]
    )  # the ReLU cuts what the bias takes below zero
    gate = torch.tensor([[3.0**1.25 / (1 + 3.0**1.25), 0.5]])
    torch.testing.assert_close(sae.gates(z2), gate)
    mixed = gate * z1 + (1 - gate) * predicted
    expected = torch.zeros(1, D)
    expected[0, :2], expected[0, 2] = mixed[0], 5.0
    torch.testing.assert_close(sae(x), expected)


def test_a_forced_gate_gives_the_bottom_and_the_top(watched):
    sae, _ = watched
    x = rows(512, 3)
    acts = sae.encode(x)
    z1, z2 = sae.split(acts)
    assert torch.equal(sae.decode(acts, 1.0), z1 @ sae.bottom.W_dec + sae.bottom.b_dec)
    torch.testing.assert_close(
        sae.decode(acts, 0.0),
        (sae.predict(z2) * sae.scale) @ sae.bottom.W_dec + sae.bottom.b_dec,
        rtol=1e-5,
        atol=1e-6,
    )
    with torch.no_grad():
        free = sae.gate_bias.clone(), sae.gate_out.clone()
        sae.gate_out.zero_()
        for bias, gate in (
            (100.0, 1.0),
            (-100.0, 0.0),
        ):  # the learned gate, pushed to its ends, does the same
            sae.gate_bias.fill_(bias)
            torch.testing.assert_close(
                sae.decode(acts), sae.decode(acts, gate), rtol=1e-4, atol=1e-5
            )
        sae.gate_bias.copy_(free[0])
        sae.gate_out.copy_(free[1])


def test_before_its_phase_the_top_takes_no_part():
    sae = built().eval()
    sae.begin("bottom", rows(1024, 0), rows(1024, 0))
    acts = sae.encode(rows(16, 1))
    assert torch.equal(sae.decode(acts), sae.decode(acts, 1.0))


def test_without_a_skip_the_reconstruction_is_the_tops():
    sae = fit(built("sae.model.levels=top"), 60)
    acts = sae.encode(rows(64, 3))
    assert torch.equal(sae.decode(acts), sae.decode(acts, 0.0))
    assert not [n for n, _ in sae.named_parameters() if n.startswith("gate")]


def test_the_bottom_alone_is_one_level():
    sae = fit(built("sae.model.levels=bottom"), 60)
    assert (
        sae.d_sae == 48 and [p.name for p in sae.phases()] == ["bottom"] and not hasattr(sae, "top")
    )
    x = rows(4096, 77)
    assert abs(float((sae.encode(x) != 0).float().mean()) - 0.1) < 0.005
    assert fvu(sae, x) < 0.6


# --------------------------------------------------------------------------------------------------
# phases


def test_the_phases_say_who_learns():
    sae = built()
    names = {id(p): n for n, p in sae.named_parameters()}
    who = {
        phase.name: {names[id(p)].split(".")[0] for g in phase.groups for p in g.params}
        for phase in sae.phases()
    }
    assert who["bottom"] == {"bottom"}
    assert who["top"] == {"top", "gate_in", "gate_out", "gate_bias"}
    assert who["both"] == who["bottom"] | who["top"]
    assert [g.lr_factor for g in sae.phases()[2].groups] == [1.0, 0.3]
    assert [p.fraction for p in sae.phases()] == [0.45, 0.35, 0.2]


def test_the_frozen_bottom_keeps_every_bit_through_the_second_phase(watched):
    _, seen = watched
    frozen = [k for k in seen["bottom"] if k.startswith("bottom.") and "controller" not in k]
    assert {
        "bottom.W_enc",
        "bottom.W_dec",
        "bottom.b_enc",
        "bottom.b_dec",
        "bottom.threshold",
        "bottom.centre",
    } == set(frozen)
    for key in [*frozen, "scale"]:
        assert torch.equal(seen["bottom"][key], seen["top"][key]), key
        assert key in ("scale", "bottom.centre") or not torch.equal(
            seen["top"][key], seen["both"][key]
        ), f"{key} learns again in the last phase"
    assert not torch.equal(seen["bottom"]["top.W_enc"], seen["top"]["top.W_enc"])


def test_the_sparsities_are_met_on_rows_never_seen(watched):
    sae, _ = watched
    parts = sae.split(sae.encode(rows(16384, 77)))
    for z, target in zip(parts, (0.9, 0.7), strict=True):
        assert abs(float((z == 0).float().mean()) - target) < 0.005


def test_the_state_of_every_phase_is_kept(watched):
    sae, _ = watched
    before, x = copy.deepcopy(sae.state_dict()), rows(4096, 5)
    errors = {}
    for phase in PHASES:
        sae.restore(phase)
        errors[phase] = fvu(sae, x)
        # What is kept went through the change of units that the state seen from outside had not:
        # the codes are the same.
        z1 = sae.split(sae.encode(x))[0]
        assert abs(float((z1 == 0).float().mean()) - 0.9) < 0.01
    assert errors["bottom"] == pytest.approx(fvu_of_bottom(sae, x, "bottom"), rel=1e-5)
    assert all(e < 0.6 for e in errors.values())
    sae.load_state_dict(before)
    assert fvu(sae, x) == pytest.approx(errors["both"], rel=1e-6)


def fvu_of_bottom(sae: Hierarchical, x: Tensor, phase: str) -> float:
    sae.restore(phase)
    return fvu(sae, x, 1.0)


def test_the_record_of_the_fit_runs_through_all_phases(watched):
    sae, _ = watched
    progress, s1, s2 = sae.trace[:, 0], sae.trace[:, 1], sae.trace[:, 2]
    known = ~torch.isnan(progress)
    assert int(known.sum()) == 120 and bool((progress[known].diff() > 0).all())
    assert bool(torch.isnan(s2[progress < 0.45]).all()) and not bool(
        torch.isnan(s2[progress >= 0.45]).any()
    )
    assert abs(float(s1[known][-10:].mean()) - 0.9) < 0.03


@pytest.mark.parametrize("killed_at", [20, 70, 110])
def test_a_killed_fit_ends_with_the_same_bits(killed_at, tmp_path, watched):
    whole, _ = watched

    def batch_at(s: int) -> Batch:
        if s == killed_at and not sae.done_once:
            sae.done_once = True
            raise KeyboardInterrupt
        return batch(256, s)

    sae = built()
    sae.done_once = False

    def session() -> Session:
        return Session(checkpoint=tmp_path / "c.safetensors")

    with pytest.raises(KeyboardInterrupt):
        fit(sae, batch_at=batch_at, session=session(), checkpoint_every_s=0.0)
    again = built()
    fit(again, session=session(), checkpoint_every_s=0.0)
    for key, value in whole.state_dict().items():
        assert again.state_dict()[key].numpy().tobytes() == value.numpy().tobytes(), key


def test_a_bad_row_in_the_second_phase_names_step_and_term():
    def batch_at(s: int) -> Batch:
        b = batch(256, s)
        bad = b.x.clone().fill_(math.nan)
        return b._replace(x=bad, y=bad) if s == 70 else b

    with pytest.raises(NonFinite, match=r"step 70 .*mse=nan"):
        fit(built(), batch_at=batch_at)


# --------------------------------------------------------------------------------------------------
# sizes and terms


def test_a_total_l0_scales_both_levels_alike():
    assert built().active == pytest.approx([4.8, 3.6])
    assert make("hierarchical", "sae.target_l0=4.2", d_sae=WIDTH).active == pytest.approx(
        [2.4, 1.8]
    )


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("sae.model.sparsity=[0.9]", "two numbers"),
        ("sae.model.sparsity=[0.9,1.0]", "two numbers"),
        ("sae.model.levels=middle", "not one of both, bottom, top"),
        ("sae.model.phase_fracs=[0.5,0.5,0.5]", "sum to 1"),
        ("sae.model.top_frac=0.001", "without latents"),
        ("sae.model.drop_bottom=0.95", "more than 1"),
        ("sae.model.rank=0", "at least 1"),
        ("sae.model.weights.gate=-1", "must not be negative"),
        ("sae.target_l0=59", "cannot be met"),
    ],
)
def test_a_setting_that_cannot_work_is_one_line(override, word):
    with pytest.raises(UserError, match=word) as error:
        make("hierarchical", "sae.target_l0=null", override, d_sae=WIDTH)
    assert "\n" not in str(error.value)


def test_a_term_of_weight_zero_is_not_there_and_the_others_are_as_before():
    parts = built().loss(batch(), step(built())).parts
    assert {
        "mse",
        "top_mse",
        "bottom_mse",
        "code",
        "gate",
        "orthogonality",
        "mutual_information",
        "sparsity_bottom",
        "sparsity_top",
        "anchor",
    } == set(parts)
    plain = built("sae.model.weights.orthogonality=0", "sae.model.weights.mutual_information=0")
    without = plain.loss(batch(), step(plain)).parts
    assert set(parts) - set(without) == {"orthogonality", "mutual_information"}
    assert without["mse"] == parts["mse"] and without["code"] == parts["code"]


def test_paths_are_dropped_on_the_asked_for_share_of_the_rows():
    sae = built("sae.model.drop_bottom=1.0", "sae.model.drop_top=0")
    sae.begin("train", rows(1024, 0), rows(1024, 0))
    loss = sae.loss(batch(), step(sae))
    assert loss.parts["mse"].item() == pytest.approx(
        loss.parts["top_mse"].item() / sae.weights.top, rel=1e-5
    )
    sae = built("sae.model.drop_bottom=0", "sae.model.drop_top=1.0")
    sae.begin("train", rows(1024, 0), rows(1024, 0))
    loss = sae.loss(batch(), step(sae))
    assert loss.parts["mse"].item() == pytest.approx(
        loss.parts["bottom_mse"].item() / sae.weights.bottom, rel=1e-5
    )


# --------------------------------------------------------------------------------------------------
# the parts


@pytest.mark.parametrize("n", [1, 7, 5000, 29_999, 59_999, 60_000])
def test_the_threshold_leaves_exactly_n_above_it(n):
    x = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
    assert int((x > exact_threshold(lambda: x.split(77), n)).sum()) == n


def test_the_threshold_of_none_or_of_constants_leaves_none():
    x = torch.randn(50, 20, generator=torch.Generator().manual_seed(1))
    assert not (x > exact_threshold(lambda: [x], 0)).any()
    assert exact_threshold(lambda: [torch.ones(10, 10)], 5) == 1
    spread = torch.cat([torch.zeros(5000), torch.arange(10.0), torch.tensor([1e6])])
    assert int((spread > exact_threshold(lambda: [spread], 4)).sum()) == 4, (
        "all but one value fall into one bin"
    )


@pytest.mark.parametrize("shift", [-3.0, 0.0, 3.0])
def test_a_level_that_is_too_sparse_is_lifted_and_one_that_is_too_dense_is_cut(shift):
    level, x = built().bottom, rows(2000, 8)
    level.b_enc.data.fill_(shift)
    level.calibrate(lambda: x.split(512), len(x))
    z = level.dense(x)
    assert float((z != 0).float().mean()) == pytest.approx(0.1, abs=1e-4) and bool((z >= 0).all())
    assert (float(level.threshold) == 0) == (shift < 0)


def test_joined_codes_count_like_one_matrix():
    a, b = (
        torch.rand(40, n, generator=torch.Generator().manual_seed(n)).sub(0.5).relu()
        for n in (6, 3)
    )
    both = Joined([a, b], [6, 3])
    whole = torch.cat([a, b], 1)
    assert torch.equal(both.dense(), whole) and torch.equal(both.fires, (whole != 0).sum(0).int())
    assert both.l0 == pytest.approx((whole != 0).sum(1).float().mean().item())
    only = Joined([a], [6, 3])
    assert torch.equal(only.dense(), torch.cat([a, torch.zeros(40, 3)], 1))


def test_directions_and_readers_of_the_top_are_those_of_its_products():
    sae = built()
    sae.scale.copy_(torch.rand(48) + 0.5)
    t = (sae.top.W_dec * sae.scale) @ sae.bottom.W_dec
    torch.testing.assert_close(sae.W_dec[48:], t)
    torch.testing.assert_close(sae.atoms(), t / t.norm(dim=1, keepdim=True))
    torch.testing.assert_close(sae.W_enc[48:], (sae.top.W_enc / sae.scale) @ sae.bottom.W_enc)
    assert sae.threshold.shape == (WIDTH,) and sae.group.tolist() == [0] * 48 + [1] * 12


# --------------------------------------------------------------------------------------------------
# sizes in the YAML


def test_an_l0_may_be_asked_for_as_a_share_of_the_latents():
    assert sae_spec("batch_topk", "sae.active_frac=0.14").build(16, 16).k == pytest.approx(
        0.14 * 128
    )
    assert (
        sae_spec("standard", "sae.active_frac=0.25", "sae.d_sae=40").build(16, 16).controller.target
        == 10
    )
    plain, asked = sae_spec("standard"), sae_spec("standard", "sae.active_frac=0.25")
    assert "active_frac" not in plain.describe() and asked.describe()["active_frac"] == 0.25, (
        "fits that do not use it keep their cache keys"
    )
    for name, share in (("hierarchical", 1.5), ("standard", 0.0), ("kl_rate", 2)):
        with pytest.raises(UserError, match="active_frac"):
            sae_spec(name, f"sae.active_frac={share}").build(16, 16)


def test_the_baselines_of_the_plan_have_the_size_and_the_sparsity_of_the_pair():
    built_for = {}
    for run in ("run_0", "run_2", "run_5", "run_6"):
        overrides, _ = complete(
            [f"out_dir={run}"], plan="hierarchical", extra=["preset=laptop"], conf=CONF
        )
        built_for[run] = next(
            iter(build(compose_checked(CONF, overrides)[0].study).saes.values())
        ).build(128, 128)
    pair = built_for["run_2"]
    assert pair.widths == (512, 128)
    for run, l0 in (
        ("run_0", built_for["run_0"].controller.target),
        ("run_5", built_for["run_5"].k),
        ("run_6", built_for["run_6"].k),
    ):
        assert built_for[run].d_sae == pair.d_sae and l0 == pytest.approx(sum(pair.active))
    assert built_for["run_6"].ends == [128, 640], "the inner group is as wide as the top"

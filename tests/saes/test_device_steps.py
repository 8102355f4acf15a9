"""Steps for a device, checked without one: nothing waits, replays give the same bits, the kernels
and the backends agree.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from sae_experiments.errors import NonFinite, UserError
from sae_experiments.fitting.fit import LOOK_EVERY, RowHandling, Sample, fit_saes, runs_recorded
from sae_experiments.saes import static
from sae_experiments.saes.base import SAE, Batch, Codes, Step
from sae_experiments.saes.batch_topk import BatchTopK
from sae_experiments.saes.outliers import OrdinaryRows
from sae_experiments.saes.purified import perturb
from sae_experiments.training.loop import Session
from support.saes import NAMES, D, M, batch, config, downstream, make, rows, step
from support.tape import OneDevice, Tape, nothing_waits

#: Variants whose steps are made within `static.shapes()`.
RECORDED = [name for name in NAMES if type(make(name)).__dict__.get("static_steps")]
#: A fit of 30 steps that ends after step 10.
STOPPED = (
    "purified_stopped",
    "sae.model.stop.patience=1",
    "sae.model.stop.min_gain=1000",
    "sae.model.stop.start_frac=0",
    "sae.model.stop.eval_every_frac=0.1",
)
#: Settings that take other ways through a step.
MORE = [
    ("matryoshka", "sae.model.sort_by_frequency=true"),
    ("matryoshka", "sae.model.detach_inner=true"),
    ("matryoshka", "sae.model.k_start=2", "sae.model.k_decay=0.5"),
    ("jumprelu", "sae.model.form=tanh"),
    ("standard", "sae.model.norm_weighted=true"),
    ("random", "sae.model.learn=encoder"),
    ("hierarchical", "sae.model.levels=top"),
    ("hierarchical", "sae.model.rows=64"),  # fewer than a batch has
    ("hierarchical", "sae.model.weights.orthogonality=1", "sae.model.weights.mutual_information=1"),
    ("cross_layer_jumprelu", "sae.model.form=tanh"),
    ("purified", "sae/host=topk", "sae.model.norm=l2", "sae.model.stop_gradient=true"),
    ("purified", "sae/host=jumprelu", "sae.model.pool=0"),
    ("purified", "sae/host=standard", "sae.model.weights.analytic=1"),
    ("purified", "sae.model.noise=uniform", "sae.model.relative=0"),
    ("purified", "sae.model.noise=mask"),
    ("end_to_end", "sae.model.local_coeff=0"),
    STOPPED,
    ("purified", "sae.model.noise=pgd", "sae.model.attack_steps=2"),
]
CASES = [(name,) for name in RECORDED] + MORE


def fitted(
    case: tuple[str, ...],
    *,
    backend: str = "device",
    steps: int = 30,
    dead_after: int = -1,
    start: Tensor | None = None,
    session: Session | None = None,
    **changes: Any,
) -> tuple[SAE, Any]:
    """A short fit, in which latents die and come back; and its report."""
    name, *overrides = case
    sae = make(name, *overrides)
    start = rows(2048, 10**6) if start is None else start
    reports = fit_saes(
        {name: sae},
        lambda step: batch(128, step),
        config(steps=steps, log_every=7, **changes),
        Sample(start, start, rows(2048, 10**6 + 1)),
        seed=0,
        dead_after=dead_after,
        backend=backend,
        session=session,
    )
    return sae, reports[name]


def without_generator(draw: Any) -> Any:
    return lambda *args, generator=None, **kwargs: draw(*args, **kwargs)


def same_bits(one: SAE, other: SAE) -> None:
    for name, value in one.state_dict().items():
        torch.testing.assert_close(
            value, other.state_dict()[name], rtol=0, atol=0, equal_nan=True, msg=name
        )


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_a_replayed_step_waits_for_nothing_and_gives_the_bits_of_an_ordinary_one(
    case: tuple[str, ...], tapes: list[Tape]
) -> None:
    replayed, report = fitted(case)
    assert sum(tape.replays for tape in tapes) > 12
    recorders, tapes[:] = list(tapes), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sae_experiments.training.recorded.RECORDERS", {})
        ordinary, expected = fitted(case)
    assert not tapes
    same_bits(replayed, ordinary)
    assert report.history == expected.history
    assert len(recorders) >= 1


def test_an_sae_that_stops_early_has_a_recording_for_the_rest(tapes: list[Tape]) -> None:
    sae, report = fitted(STOPPED)
    watch = cast(Any, sae).early_stopping
    assert watch.stopped_at == pytest.approx(10 / 30, abs=0.04) and watch.score_at == 0
    # The curves of the steps after it have a loss of 0, and those before have none of it.
    after = [step for step, name, _ in report.history if name == "stopped"]
    assert after == [step for step, name, _ in report.history if name == "fvu" and step > 10]
    assert len(tapes) == 2


@pytest.mark.parametrize("name", RECORDED)
@pytest.mark.parametrize("dead", ["none", "few", "all"])
def test_both_backends_give_the_same_loss_and_gradients(
    name: str, dead: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae, given = make(name).train(), batch(256)
    if not sae.same_draws:
        # Latents are drawn among the active entries here, and among all entries on a device.
        sae.moved.uniform_()
        sae.mass.fill_(1.0)
        monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.full(shape, 0.5))
    mask = torch.zeros(sae.d_sae, dtype=torch.bool)
    mask[: {"none": 0, "few": 5, "all": sae.d_sae}[dead]] = True
    found = []
    for context in (nullcontext, static.shapes):
        sae.zero_grad()
        now = replace(step(sae, progress=0.5), dead=mask, some_dead=None)
        if context is static.shapes:
            now = replace(now, progress=torch.tensor(0.5), some_dead=dead != "none")
        with context():
            loss = sae.loss(given, now)
            loss.total.backward()
        grads = {key: p.grad.clone() for key, p in sae.named_parameters() if p.grad is not None}
        found.append((loss, grads))
    (host, expected), (device, grads) = found
    torch.testing.assert_close(device.total.float(), host.total.float(), rtol=1e-4, atol=1e-6)
    for key in host.parts:
        torch.testing.assert_close(
            device.parts[key].float(), host.parts[key].float(), rtol=1e-4, atol=1e-6, msg=key
        )
    for key, value in expected.items():
        torch.testing.assert_close(grads[key], value, rtol=1e-3, atol=2e-5, msg=key)
    assert torch.equal(device.extra.codes.fires.long(), host.extra.codes.fires.long())


@pytest.mark.parametrize("name", ["topk", "batch_topk", "matryoshka", "jumprelu", "hierarchical"])
def test_both_backends_end_with_the_same_quality(name: str) -> None:
    fvu = {}
    for backend in ("host", "device"):
        sae, report = fitted((name,), backend=backend, steps=200, dead_after=4000)
        last = {key: value for _, key, value in report.history}
        assert last["dead_frac"] < 0.2
        x = rows(4096, 77)
        fvu[backend] = float((x - sae(x)).square().sum() / (x - x.mean(0)).square().sum())
    assert fvu["device"] == pytest.approx(fvu["host"], rel=0.05)


def test_terms_for_dead_latents_come_and_go_without_a_step_that_waits(tapes: list[Tape]) -> None:
    def run() -> tuple[SAE, Any]:
        sae = make("topk")
        sae.b_enc.data[::5] = -0.5
        start = rows(2048, 10**6)
        cfg = config(steps=150, log_every=1, lr=5e-3)
        reports = fit_saes(
            {"topk": sae},
            lambda step: batch(128, step),
            cfg,
            Sample(start, start, start),
            seed=0,
            dead_after=1000,
            backend="device",
        )
        return sae, reports["topk"]

    sae, report = run()
    asked = [step for step, name, _ in report.history if name == "aux_k"]
    assert asked and len(asked) % LOOK_EVERY == 0
    assert [step % LOOK_EVERY for step in asked] == [*range(1, LOOK_EVERY), 0] * (
        len(asked) // LOOK_EVERY
    )
    dead = {step: value for step, name, value in report.history if name == "dead_frac"}
    assert max(dead.values()) > 0 and dead[149] == 0
    assert len(tapes) == 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sae_experiments.training.recorded.RECORDERS", {})
        same_bits(sae, run()[0])


@pytest.mark.parametrize("name", ["topk", "standard", "hierarchical"])
def test_a_stopped_fit_goes_on_with_the_same_bits(
    name: str, tapes: list[Tape], tmp_path: Path
) -> None:
    whole, _ = fitted((name,), steps=30)

    class Stopped(Exception):
        pass

    def stop(done: int, _: int) -> None:
        if done == 17:
            raise Stopped

    path = tmp_path / "checkpoint.safetensors"
    session = Session(checkpoint=path, tick=stop)
    with pytest.raises(Stopped):
        fitted((name,), steps=30, session=session, checkpoint_every_s=0.0)
    assert path.exists()
    resumed, _ = fitted((name,), steps=30, session=Session(checkpoint=path))
    same_bits(whole, resumed)


def test_a_loss_that_is_not_finite_is_found_later_and_named(tapes: list[Tape]) -> None:
    def spoilt(n: int, at: int) -> Any:
        given = batch(n, at)
        if at == 11:
            given = given._replace(x=torch.full_like(given.x, torch.nan))
            given = given._replace(y=given.x)
        return given

    sae, start = make("batch_topk"), rows(2048, 10**6)
    with pytest.raises(NonFinite, match="not finite at step 11 .*lr="):
        fit_saes(
            {"batch_topk": sae},
            lambda at: spoilt(128, at),
            config(steps=40, log_every=20),
            Sample(start, start, start),
            seed=0,
            dead_after=1000,
            backend="device",
            handling=RowHandling(outliers="keep"),
        )
    assert sum(tape.replays for tape in tapes) > 10


@pytest.mark.parametrize("case", CASES, ids=" ".join)
@pytest.mark.parametrize("dead", [True, False])
def test_a_step_reads_nothing_from_the_memory_of_the_processor(
    case: tuple[str, ...], dead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device without data, where a tensor of the processor would be one of its own kind."""
    for name in (
        "rand",
        "randint",
        "randn",
        "randperm",
    ):  # without data there are no random numbers
        plain = getattr(torch, name)
        monkeypatch.setattr(torch, name, without_generator(plain))
    sae = make(*case).to("meta").train()
    if sae.controller is not None:
        sae.controller.horizon = 100
    x = torch.empty(256, D, device="meta")
    given = Batch(x, x, None, downstream(x))
    for phase in sae.phases():
        params = [p for group in phase.groups for p in group.params]
        for p in sae.parameters():
            p.requires_grad_(any(p is one for one in params))
        now = Step(
            phase=phase.name,
            progress=torch.empty((), dtype=torch.float64, device="meta"),
            dead=torch.empty(sae.d_sae, dtype=torch.bool, device="meta"),
            generator=cast(Any, SimpleNamespace(device=torch.device("meta"))),
            some_dead=dead,
            over=False,
        )
        with static.shapes():
            sae.loss(given, now)  # what is made once may come from the processor
        with static.shapes(), OneDevice():
            loss = sae.loss(given, now)
            if params:
                loss.total.backward()
            sae.before_update()
            with torch.no_grad():
                assert loss.extra.codes.fires.shape == (sae.d_sae,)
                sae.after_update(loss.extra, now)


def test_a_recording_keeps_its_memory_when_batches_grow(tapes: list[Tape]) -> None:
    """Sizes in turn: one recording each, which no other one may disturb."""
    sizes = [64] * 6 + [128] * 6 + [64, 128] * 5

    def run() -> SAE:
        sae, start = make("batch_topk"), rows(2048, 10**6)
        fit_saes(
            {"batch_topk": sae},
            lambda step: batch(sizes[step], step),
            config(steps=len(sizes)),
            Sample(start, start, start),
            seed=0,
            dead_after=10**6,
            backend="device",
        )
        return sae

    sae, x = make("batch_topk"), rows(64, 0)
    with static.shapes():
        first, second = (sae.encoder_matmul(x, sae.b_enc) for _ in range(2))
    assert first.data_ptr() != second.data_ptr()
    replayed = run()
    assert len(tapes) == 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sae_experiments.training.recorded.RECORDERS", {})
        same_bits(replayed, run())


def test_only_variants_that_say_so_run_on_the_device_path() -> None:
    class Mine(BatchTopK):
        pass

    mine = Mine(d_in=D, d_sae=M, k=4)
    assert not runs_recorded(mine, "device")
    assert runs_recorded(make("batch_topk"), "device")
    assert not any(runs_recorded(make(name), "auto") for name in NAMES)
    with pytest.raises(UserError, match="fit.backend='gpu' is not one of auto, host, device"):
        runs_recorded(mine, "gpu")


@pytest.mark.parametrize("far", [[], [0], [3, 4, 5], [0, 1, 63], list(range(64))])
def test_outliers_of_a_batch_are_replaced_by_ordinary_rows(far: list[int]) -> None:
    x = rows(2048, 3)
    ordinary = OrdinaryRows(x, x)
    given = batch(64)._replace(downstream=None)
    given.x[far] *= 1e4
    given = given._replace(y=given.x)
    with nothing_waits():
        seen = ordinary.of_batch_in_place(given)
    assert len(seen.x) == 64 and seen.y is seen.x
    kept = ordinary.inputs.contains(given.x)
    assert sorted((~kept).nonzero().squeeze(1).tolist()) == far
    if len(far) == 64:
        assert torch.equal(seen.x, given.x)
    else:
        assert bool(ordinary.inputs.contains(seen.x).all())
        assert torch.equal(seen.x[kept], given.x[kept])


@pytest.mark.parametrize("name", ["purified", "purified_adaptive", "purified_mixed"])
@pytest.mark.parametrize("progress", [0.05, 0.5])  # before the terms set in, and after
def test_purified_saes_keep_the_same_books_on_both_backends(
    name: str, progress: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = batch(256)
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.full(shape, 0.5))

    def after(context: Any, at: Any) -> tuple[Tensor, dict[str, Tensor]]:
        sae = make(name).train()
        sae.moved.fill_(0.25)
        sae.mass.fill_(1.0)
        now = replace(step(sae), progress=at, some_dead=False)
        with context():
            loss = sae.loss(given, now)
            loss.total.backward()
            with torch.no_grad():
                sae.after_update(loss.extra, now)
        return loss.total.detach(), dict(sae.named_buffers())

    expected, books = after(nullcontext, progress)
    total, on_device = after(static.shapes, torch.tensor(progress, dtype=torch.float64))
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-6)
    for key, value in books.items():
        torch.testing.assert_close(on_device[key], value, equal_nan=True, msg=key)
    fresh = make(name)
    followed = {"purified_adaptive": "jaccard", "purified_mixed": "moved"}.get(name)
    if followed and progress > 0.1:
        start = torch.full_like(fresh.moved, 0.25) if followed == "moved" else fresh.jaccard
        assert not torch.equal(books[followed], start)


@pytest.mark.parametrize("aim", ["weak", "marginal", "confusable"])
def test_targets_on_a_device_are_active_latents(aim: str) -> None:
    drawn = torch.Generator().manual_seed(0)
    z = torch.rand(512, 8, generator=drawn) * (torch.rand(512, 8, generator=drawn) < 0.4)
    w_enc, w_dec = torch.rand(8, D, generator=drawn) + 0.1, torch.randn(8, D, generator=drawn)
    stability = torch.tensor([0.0, *[1.0] * 7])

    def chosen(codes: Codes) -> Tensor:
        return perturb.choose(codes, stability, w_enc, w_dec, {aim: 1.0}, drawn)

    ordinary = chosen(Codes(z))
    with static.shapes(), nothing_waits():
        latents = chosen(Codes(z))
    empty = (z == 0).all(1)
    assert torch.equal(latents == -1, empty) and torch.equal(ordinary == -1, empty)
    on = z.gather(1, latents.clamp_min(0)[:, None])[:, 0] > 0
    if aim == "marginal":
        assert torch.equal(latents, ordinary)
    if aim != "confusable":
        assert bool((on | empty).all())
    share = [(found == 0).float().mean() for found in (latents, ordinary)]
    assert abs(share[0] - share[1]) < 0.06  # two standard errors of the difference

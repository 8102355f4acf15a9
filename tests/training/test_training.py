"""The training loop: schedules, phases, bits that survive a kill, and errors that name what
went wrong.
"""

from __future__ import annotations

import itertools
import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sae_experiments.errors import NonFinite, UserError
from sae_experiments.training import loop as training
from sae_experiments.training.loop import (
    DECAYS,
    Group,
    Learner,
    Loss,
    Phase,
    Progress,
    Session,
    StepInfo,
    lr_at,
    seed_of,
    train,
)
from support.common import train_config

STEPS = 9
OPTIMIZERS = ["adam", "adamw", "muon"]


class Toy(Learner):
    """Two layers with dropout from the global generator, noise from the loop's own, and a
    buffer that each update changes.
    """

    def __init__(
        self,
        name: str = "toy",
        *,
        seed: int = 1,
        init: int = 0,
        phases: list[tuple[str, float, str]] | None = None,
        **changes: Any,
    ) -> None:
        torch.manual_seed(init)
        module = nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.3), nn.Tanh(), nn.Linear(6, 3))
        module.register_buffer("average", torch.zeros(3))
        super().__init__(name, module, train_config(**({"steps": STEPS} | changes)), seed=seed)
        self.named, self.calls = phases, []

    def phases(self) -> list[Phase]:
        def groups(of: str) -> list[Group]:
            params = [p for n, p in self.module.named_parameters() if n.startswith(of)]
            matrices, rest = [p for p in params if p.ndim == 2], [p for p in params if p.ndim != 2]
            return [Group(matrices, decay=True, muon=True), Group(rest, lr_factor=0.5)]

        return [
            Phase(name, fraction, groups(of))
            for name, fraction, of in self.named or [("train", 1.0, "")]
        ]

    def begin(self, phase: str) -> None:
        self.calls.append(("begin", phase))

    def finish(self, phase: str) -> None:
        self.calls.append(("finish", phase))

    def loss(self, batch: Tensor, info: StepInfo) -> Loss:
        torch.manual_seed(seed_of(self.seed, "dropout", info.step))
        noise = torch.randn(batch.shape[0], 3, generator=info.generator)
        out = self.module(batch)
        parts = {"mse": (out - batch[:, :3]).square().mean(), "noise": 0.1 * (out * noise).mean()}
        return Loss(sum(parts.values()), {k: v.detach() for k, v in parts.items()}, out.detach())

    def after_update(self, loss: Loss, info: StepInfo) -> None:
        self.module.average.mul_(0.9).add_(loss.extra.mean(0), alpha=0.1)

    def evaluate(self, step: int) -> dict[str, float]:
        self.module.eval()
        with torch.no_grad():
            return {"eval": self.module(batch_at(10_000)).square().mean().item()}


def batch_at(step: int) -> Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(step))


def run(*learners: Learner, batches: Any = batch_at, **session: Any) -> Progress:
    return train(list(learners), batches, learners[0].cfg, Session(**session))


def bits(learner: Learner) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in learner.module.state_dict().items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [k for k in a if not torch.equal(a[k], b[k])]
    assert not different, f"{different} differ"


class Killed(Exception):
    """Stands for a SIGKILL: nothing of the process is used afterwards but the checkpoint."""


def killed_at(step: int) -> Any:
    def batches(s: int) -> Tensor:
        if s == step:
            raise Killed
        return batch_at(s)

    return batches


# ------------------------------------------------------------------------------------------------
# learning rate


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 100, 1000])
@pytest.mark.parametrize("warmup", [0, 1, 50, 5000])
def test_the_learning_rate_starts_above_zero_reaches_its_peak_and_never_leaves_its_bounds(
    decay, steps, warmup
):
    cfg = train_config(
        lr=1e-2, min_lr=1e-3, warmup_steps=warmup, decay=decay, decay_from=0.5, steps=steps
    )
    rates = [lr_at(i, steps, cfg) for i in range(steps)]
    assert rates[0] > 0
    assert max(rates) == pytest.approx(1.0)
    assert all(math.isfinite(r) and 0 < r <= 1 + 1e-12 for r in rates)
    peak = rates.index(max(rates))
    assert peak <= steps // 2, (
        "a phase much shorter than the warm-up still spends half of its steps at or after the peak"
    )
    assert all(a < b for a, b in itertools.pairwise(rates[: peak + 1])), "the warm-up rises"
    assert all(a >= b for a, b in itertools.pairwise(rates[peak:])), "after the peak nothing rises"


def test_cosine_falls_from_the_peak_to_min_lr_along_half_a_cosine():
    cfg = train_config(lr=1e-2, min_lr=1e-3, warmup_steps=100, decay="cosine")
    assert lr_at(100, 1100, cfg) == 1.0
    assert lr_at(600, 1100, cfg) == pytest.approx(0.55)
    assert lr_at(1100, 1100, cfg) == pytest.approx(0.1)
    assert lr_at(1099, 1100, cfg) == pytest.approx(0.1, abs=1e-4)


def test_a_quarter_cosine_is_cos_pi_t_over_2():
    cfg = train_config(lr=1e-2, min_lr=0.0, warmup_steps=0, decay="quarter_cosine")
    assert [lr_at(i, 1200, cfg) for i in (0, 400, 600, 800)] == pytest.approx(
        [1.0, math.cos(math.pi / 6), math.sqrt(0.5), 0.5]
    )
    assert lr_at(1200, 1200, cfg) == pytest.approx(0.0, abs=1e-12)
    cfg = train_config(lr=1e-2, min_lr=1e-3, warmup_steps=100, decay="quarter_cosine")
    assert lr_at(100, 1100, cfg) == 1.0 and lr_at(1100, 1100, cfg) == pytest.approx(0.1)


def test_linear_stays_at_the_peak_until_decay_from_and_then_falls_linearly_to_min_lr():
    cfg = train_config(lr=1e-2, min_lr=2e-3, warmup_steps=10, decay="linear", decay_from=0.8)
    assert {lr_at(i, 1000, cfg) for i in range(10, 801)} == {1.0}
    assert lr_at(900, 1000, cfg) == pytest.approx(0.6)
    assert lr_at(1000, 1000, cfg) == pytest.approx(0.2)


def test_constant_stays():
    cfg = train_config(warmup_steps=10, decay="constant")
    assert {lr_at(i, 100, cfg) for i in range(10, 100)} == {1.0}


def test_the_warm_up_is_linear():
    cfg = train_config(warmup_steps=4)
    assert [lr_at(i, 100, cfg) for i in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", 0),
        ("batch_size", 0),
        ("decay", "exponential"),
        ("optimizer", "sgd"),
        ("lr", 0.0),
        ("lr", -1.0),
        ("lr", math.nan),
        ("lr", math.inf),
        ("min_lr", -1e-5),
        ("warmup_steps", -1),
        ("decay_from", 1.5),
        ("clip", -1.0),
        ("log_every", 0),
        ("eps", 0.0),
    ],
)
def test_a_number_that_cannot_work_is_one_line_that_names_key_and_value(key, value):
    with pytest.raises(UserError, match=rf"{key}=.*{value}") as caught:
        train_config(**{key: value})
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------
# same bits


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_same_seed_same_bits_and_another_seed_other_bits(optimizer):
    runs = [Toy(optimizer=optimizer), Toy(optimizer=optimizer), Toy(optimizer=optimizer, seed=2)]
    histories = [run(learner).history for learner in runs]
    assert_same(bits(runs[0]), bits(runs[1]))
    assert histories[0] == histories[1] != histories[2]
    assert not torch.equal(bits(runs[0])["0.weight"], bits(runs[2])["0.weight"])


@pytest.mark.parametrize(
    "phases", [None, [("a", 0.4, "0"), ("b", 0.6, "")]], ids=["one phase", "two phases"]
)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_killed_at_any_step_and_resumed_gives_the_bits_of_a_run_that_was_not(
    tmp_path, optimizer, phases
):
    straight = Toy(optimizer=optimizer, phases=phases)
    whole = run(straight)
    for kill in range(1, STEPS):
        checkpoint = tmp_path / f"{kill}"
        first = Toy(optimizer=optimizer, phases=phases)
        with pytest.raises(Killed):
            run(first, batches=killed_at(kill), checkpoint=checkpoint)
        second = Toy(
            optimizer=optimizer, phases=phases, init=99
        )  # other weights: everything must come from the checkpoint
        asked: list[int] = []
        resumed = run(
            second,
            batches=lambda s, asked=asked: (asked.append(s), batch_at(s))[1],
            checkpoint=checkpoint,
        )
        assert asked == list(range(kill, STEPS)), "no step is trained twice or left out"
        assert_same(bits(straight), bits(second))
        assert resumed.history == whole.history
        assert resumed.step == STEPS and not resumed.cut


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_cut_at_every_step_by_the_deadline_and_continued_gives_the_same_bits(tmp_path, optimizer):
    straight = Toy(optimizer=optimizer)
    whole = run(straight)
    for turn in range(STEPS):
        learner = Toy(
            optimizer=optimizer, init=turn
        )  # but for the first turn, weights come from the checkpoint
        progress = run(learner, checkpoint=tmp_path / "c", deadline=time.monotonic() - 1)
        assert (progress.step, progress.cut) == (turn + 1, turn + 1 < STEPS)
    assert_same(bits(straight), bits(learner))
    assert progress.history == whole.history


def test_seconds_of_a_resumed_run_go_on_where_the_killed_one_stopped(tmp_path, monkeypatch):
    def slow(step: int) -> Tensor:
        time.sleep(0.01)
        if step == 6:
            raise Killed
        return batch_at(step)

    with pytest.raises(Killed):
        run(Toy(), batches=slow, checkpoint=tmp_path / "c")
    later = SimpleNamespace(
        monotonic=lambda: time.monotonic() + 1000
    )  # between the two processes: belongs to nobody
    monkeypatch.setattr(training, "time", later)
    assert 0.06 <= run(Toy(), checkpoint=tmp_path / "c").seconds < 100


def test_logging_and_evaluating_change_no_bit():
    often, rarely = Toy(log_every=1, eval_every=1), Toy(log_every=1000, eval_every=1000)
    run(often)
    run(rarely)
    assert_same(bits(often), bits(rarely))


def test_the_log_gets_what_the_history_holds():
    told: list[tuple[int, str, float]] = []
    progress = run(
        Toy(), log=lambda step, values: told.extend((step, k, v) for k, v in values.items())
    )
    assert told == progress.history
    assert {name for _, name, _ in told} == {"mse", "noise", "loss", "grad_norm", "lr", "eval"}
    assert [step for step, name, _ in told if name == "eval"] == [3, 6, 9]


def test_logged_parts_sum_to_the_logged_loss():
    history = run(Toy()).history
    for step in range(STEPS):
        values = {name: v for s, name, v in history if s == step}
        assert values["mse"] + values["noise"] == pytest.approx(values["loss"], rel=1e-6)


def test_two_learners_side_by_side_equal_each_alone():
    kinds = {
        "a": {"optimizer": "adamw"},
        "b": {
            "optimizer": "muon",
            "lr": 3e-3,
            "seed": 5,
            "phases": [("x", 0.5, "0"), ("y", 0.5, "")],
        },
    }
    alone = {name: Toy(name, **kind) for name, kind in kinds.items()}
    histories = {name: run(learner).history for name, learner in alone.items()}
    together = {name: Toy(name, **kind) for name, kind in kinds.items()}
    both = run(*together.values())
    for name in kinds:
        assert_same(bits(alone[name]), bits(together[name]))
        assert [
            (s, k.removeprefix(f"{name}/"), v)
            for s, k, v in both.history
            if k.startswith(f"{name}/")
        ] == histories[name]
    assert sum(both.seconds_of(name) for name in kinds) == pytest.approx(both.seconds)


def test_two_learners_resume_together(tmp_path):
    def make(init):
        return [Toy("a", optimizer="adamw", init=init), Toy("b", optimizer="muon", init=init + 1)]

    straight, second = make(0), make(50)
    whole = run(*straight)
    with pytest.raises(Killed):
        run(*make(0), batches=killed_at(5), checkpoint=tmp_path / "c")
    resumed = run(*second, checkpoint=tmp_path / "c")
    for a, b in zip(straight, second, strict=True):
        assert_same(bits(a), bits(b))
    assert resumed.history == whole.history


# ------------------------------------------------------------------------------------------------
# checkpoints


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-40] ^= 0x40  # in the middle of some tensor
    path.write_bytes(content)


def foreign(path: Path) -> None:
    from safetensors.torch import save

    path.write_bytes(save({"x": torch.zeros(3)}, {"progress": "{}"}))


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        flip_a_bit,
        foreign,
        lambda p: p.write_bytes(b""),
        lambda p: p.write_bytes(b"rubbish" * 50),
    ],
    ids=["truncated", "flipped bit", "foreign", "empty", "rubbish"],
)
def test_a_damaged_checkpoint_costs_time_and_never_a_wrong_number(tmp_path, capsys, damage):
    straight = Toy()
    whole = run(straight)
    with pytest.raises(Killed):
        run(Toy(), batches=killed_at(5), checkpoint=tmp_path / "c")
    damage(tmp_path / "c")
    again = Toy()
    progress = run(again, checkpoint=tmp_path / "c")
    assert_same(bits(straight), bits(again))
    assert progress.history == whole.history
    assert "damaged" in capsys.readouterr().out


def test_no_checkpoint_is_written_more_often_than_asked(tmp_path):
    run(Toy(checkpoint_every_s=1000.0), checkpoint=tmp_path / "c")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------
# phases


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_phase_moves_its_own_parameters_and_leaves_all_others_bit_identical(optimizer):
    learner = Toy(optimizer=optimizer, phases=[("first", 0.5, "0"), ("second", 0.5, "3")])
    start, seen = bits(learner), {}
    learner.begin = lambda phase: seen.update({phase: bits(learner)})
    run(learner)
    end = bits(learner)
    for name in ("0.weight", "0.bias"):
        assert not torch.equal(start[name], seen["second"][name])
        assert torch.equal(seen["second"][name], end[name])
    for name in ("3.weight", "3.bias"):
        assert torch.equal(start[name], seen["second"][name])
        assert not torch.equal(seen["second"][name], end[name])


def test_what_a_phase_does_not_train_asks_for_no_gradient():
    seen: dict[str, set[str]] = {}
    learner = Toy(phases=[("first", 0.5, "0"), ("second", 0.5, "3")])
    loss = learner.loss

    def look(batch: Tensor, info: StepInfo) -> Loss:
        seen[info.phase] = {
            name for name, p in learner.module.named_parameters() if p.requires_grad
        }
        return loss(batch, info)

    learner.loss = look
    run(learner)
    assert seen == {"first": {"0.weight", "0.bias"}, "second": {"3.weight", "3.bias"}}


def test_the_noise_of_a_step_is_a_function_of_seed_and_step():
    def noise(seed: int) -> list[float]:
        found: list[float] = []
        learner = Toy(seed=seed)
        learner.after_update = lambda loss, info: found.append(
            torch.rand((), generator=info.generator).item()
        )
        run(learner)
        return found

    assert noise(1) == noise(1)
    assert len({*noise(1), *noise(2)}) == 2 * STEPS, "other noise at every step and for every seed"


def test_phases_begin_and_finish_in_order():
    learner = Toy(phases=[("a", 0.3, ""), ("b", 0.3, "0"), ("c", 0.4, "3")])
    run(learner)
    assert learner.calls == [(what, phase) for phase in "abc" for what in ("begin", "finish")]


def test_a_phase_too_short_for_one_step_does_not_keep_the_one_before_from_being_finished():
    learner = Toy(steps=10, phases=[("a", 0.5, ""), ("b", 0.01, "0"), ("c", 0.49, "3")])
    run(learner)
    assert ("finish", "a") in learner.calls
    began = [phase for what, phase in learner.calls if what == "begin"]
    assert [phase for what, phase in learner.calls if what == "finish"] == began, (
        "what is finished was begun, and the other way round"
    )


class Plain(Toy):
    """Without dropout and noise: its steps depend on nothing but weights and batch."""

    def loss(self, batch: Tensor, info: StepInfo) -> Loss:
        self.module.eval()
        loss = (self.module(batch) - batch[:, :3]).square().mean()
        return Loss(loss, {"mse": loss.detach()}, batch[:, :3])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_second_phase_is_a_fresh_optimiser_and_schedule_on_the_weights_of_the_first(optimizer):
    both = Plain(optimizer=optimizer, steps=8, phases=[("a", 0.5, ""), ("b", 0.5, "")])
    run(both)
    first = Plain(optimizer=optimizer, steps=4)
    run(first)
    second = Plain(optimizer=optimizer, steps=4, init=7)
    second.module.load_state_dict(first.module.state_dict())
    run(second, batches=lambda step: batch_at(step + 4))
    assert_same(bits(both), bits(second))


def test_fractions_that_do_not_sum_to_one_are_refused():
    with pytest.raises(UserError, match="sum to 0.9, not 1"):
        run(Toy(phases=[("a", 0.4, ""), ("b", 0.5, "")]))


def test_progress_runs_from_zero_towards_one_in_every_phase():
    seen: list[tuple[str, float]] = []
    learner = Toy(steps=10, phases=[("a", 0.4, ""), ("b", 0.6, "")])
    loss = learner.loss
    learner.loss = lambda batch, info: (
        seen.append((info.phase, info.progress)),
        loss(batch, info),
    )[1]
    run(learner)
    assert [p for name, p in seen if name == "a"] == pytest.approx([0, 0.25, 0.5, 0.75])
    assert [p for name, p in seen if name == "b"] == pytest.approx([i / 6 for i in range(6)])


# ------------------------------------------------------------------------------------------------
# optimisers


class Flat(Toy):
    """Its gradient is zero: only weight decay moves anything."""

    def loss(self, batch: Tensor, info: StepInfo) -> Loss:
        loss = sum(p.sum() for p in self.module.parameters()) * 0.0
        return Loss(loss, {"nothing": loss.detach()}, torch.zeros(1, 3))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weight_decay_reaches_the_matrices_that_ask_for_it_and_nothing_else(optimizer):
    learner = Flat(
        optimizer=optimizer,
        decay="constant",
        warmup_steps=0,
        lr=1e-2,
        muon_lr=1e-2,
        weight_decay=0.5,
        steps=1,
    )
    start = bits(learner)
    run(learner)
    for name, value in bits(learner).items():
        if name.endswith("weight"):
            torch.testing.assert_close(value, start[name] * (1 - 1e-2 * 0.5), rtol=1e-5, atol=1e-8)
        else:
            assert torch.equal(value, start[name])


class FlatWithoutDecay(Flat):
    def phases(self) -> list[Phase]:
        groups = [g._replace(decay=False) for g in super().phases()[0].groups]
        return [Phase("train", 1.0, groups)]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weight_decay_spares_groups_that_do_not_ask_for_it(optimizer):
    learner = FlatWithoutDecay(optimizer=optimizer, muon_lr=1e-2, weight_decay=0.5)
    start = bits(learner)
    run(learner)
    for name, value in bits(learner).items():
        if name != "average":  # a buffer
            assert torch.equal(value, start[name]), name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weight_decay_zero_leaves_everything_where_it_is(optimizer):
    learner = Flat(optimizer=optimizer, weight_decay=0.0)
    start = bits(learner)
    run(learner)
    assert_same(start, bits(learner))


def test_the_first_adam_step_is_the_learning_rate_times_the_groups_factor():
    learner = Plain(steps=1, warmup_steps=0, decay="constant", lr=1e-3, clip=0.0, weight_decay=0.0)
    start = bits(learner)
    run(learner)
    end = bits(learner)
    for name, factor in (
        ("3.weight", 1.0),
        ("3.bias", 0.5),
    ):  # the group of biases has lr_factor 0.5
        torch.testing.assert_close(
            (end[name] - start[name]).abs(),
            torch.full_like(end[name], 1e-3 * factor),
            rtol=1e-2,
            atol=0,
        )


def test_gradients_are_clipped_to_their_common_norm():
    seen = []
    learner = Plain(clip=0.01, steps=1)
    after = learner.after_update
    learner.after_update = lambda loss, info: (
        seen.append(torch.stack([p.grad.norm() for p in learner.module.parameters()]).norm()),
        after(loss, info),
    )
    zero = torch.optim.Adam.zero_grad
    torch.optim.Adam.zero_grad = lambda self, set_to_none=True: (
        None
    )  # keep the gradients until they were looked at
    try:
        progress = run(learner)
    finally:
        torch.optim.Adam.zero_grad = zero
    assert float(seen[0]) == pytest.approx(0.01, rel=1e-3)
    assert next(v for _, k, v in progress.history if k == "grad_norm") > 0.02, (
        "the log has the norm before clipping"
    )


# ------------------------------------------------------------------------------------------------
# non-finite numbers


class Broken(Toy):
    """From step 3 on, one term is ``bad``; with ``gradient`` the loss is finite and its
    gradient is not.
    """

    bad = math.nan
    gradient = False

    def loss(self, batch: Tensor, info: StepInfo) -> Loss:
        loss = super().loss(batch, info)
        if info.step < 3:
            return loss
        if self.gradient:
            extra = (self.module[3].bias * 0).abs().sqrt().sum()
            return Loss(loss.total + extra, {**loss.parts, "root": extra.detach()}, loss.extra)
        extra = loss.total.detach() * self.bad
        return Loss(loss.total + extra, {**loss.parts, "sparsity": extra}, loss.extra)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_stops_at_its_step_and_names_learner_step_and_term(bad):
    learner = Broken("my_sae", lr=0.0123)
    learner.bad = bad
    before: dict[int, dict[str, Tensor]] = {}
    learner.after_update, keep = (
        lambda loss, info: (before.update({info.step: bits(learner)}), keep(loss, info)),
        learner.after_update,
    )
    with pytest.raises(NonFinite) as caught:
        run(learner)
    said = str(caught.value)
    assert (
        all(word in said for word in ("my_sae", "step 3", "sparsity", "0.0123"))
        and "\n" not in said
    )
    assert sorted(before) == [0, 1, 2], "nothing is updated with a loss that is not finite"
    assert all(bool(torch.isfinite(v).all()) for v in bits(learner).values())
    assert caught.value.exit_status == 1


def test_a_gradient_that_is_not_finite_names_the_tensor():
    learner = Broken("toy")
    learner.gradient = True
    with pytest.raises(NonFinite, match=r"gradient.*step 3.*3\.bias"):
        run(learner)


def test_a_checkpoint_never_holds_the_step_that_broke(tmp_path):
    with pytest.raises(NonFinite):
        run(Broken(), checkpoint=tmp_path / "c")
    healthy, straight = Toy(), Toy()
    run(straight)
    assert run(healthy, checkpoint=tmp_path / "c").step == STEPS
    assert_same(bits(straight), bits(healthy))

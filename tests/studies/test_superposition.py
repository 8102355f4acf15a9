"""Superposition: the generator against exact probabilities, models that do not disturb each
other, and the study from start to end.
"""

from __future__ import annotations

import itertools
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sae_experiments.errors import UserError
from sae_experiments.results.records import means_of
from sae_experiments.studies.base import Outcome
from sae_experiments.studies.superposition import toy, toy_step
from sae_experiments.studies.superposition.study import best_cosines, measures, summarise
from sae_experiments.studies.superposition.toy import Stream, ToyLearner
from sae_experiments.studies.superposition.trees import MODES, Features, bernoulli, padded
from sae_experiments.training.loop import Session, train
from support.command_line import assert_is_refused, in_this_process
from support.common import Experiment, train_config
from support.drawing import drawn

CPU = torch.device("cpu")


def features(mode: str = "exclusive", **changes: Any) -> Features:
    plain = {
        "branching": 2,
        "probability": 1.0,
        "stop": 0.5,
        "importance": 1.0,
        "match": "exclusive",
        "correlated": 0.0,
        "anticorrelated": 0.0,
    }
    return Features(
        **{
            "mode": mode,
            **plain,
            **(
                {"probability": 0.2, "correlated": 0.5, "anticorrelated": 0.3}
                if mode == "pairs"
                else {}
            ),
            **changes,
        }
    )


def grown(branching: int, depth: int, go_on: float, root: float) -> dict[tuple[int, ...], float]:
    """Every sample of a tree and its probability, by walking all ways down: another road to
    what ``Features`` says.
    """
    n = sum(branching**level for level in range(1, depth + 1))
    found: dict[tuple[int, ...], float] = {}

    def walk(node: int, level: int, on: tuple[int, ...], p: float) -> None:
        if level == depth or go_on < 1:
            ends = p * (1.0 if level == depth else 1 - go_on)
            key = tuple(int(i in on) for i in range(n))
            found[key] = found.get(key, 0.0) + ends
        if level < depth:
            for k in range(branching):
                child = (node + 1) * branching + k
                walk(child, level + 1, (*on, child), p * go_on / branching)

    walk(-1, 0, (), root)
    if root < 1:
        off = (0,) * n
        found[off] = found.get(off, 0.0) + 1 - root
    return {key: p for key, p in found.items() if p > 0}


@pytest.mark.parametrize(("branching", "depth"), [(2, 1), (2, 3), (3, 2), (4, 2)])
@pytest.mark.parametrize("mode", ["exclusive", "early_stopping"])
@pytest.mark.parametrize("probability", [1.0, 0.3])
def test_trees_have_exactly_the_samples_of_a_walk(
    branching: int, depth: int, mode: str, probability: float
) -> None:
    made = features(mode, branching=branching, probability=probability)
    exact = grown(branching, depth, 0.5 if mode == "early_stopping" else 1.0, probability)
    rows, probs = made.support(depth)
    assert {
        tuple(row): pytest.approx(p) for row, p in zip(rows.tolist(), probs, strict=True)
    } == exact
    assert made.n_distinct(depth) == len(exact)
    x, p = np.array(list(exact)), np.array(list(exact.values()))
    assert np.allclose(made.marginals(depth), p @ x)
    assert np.allclose(made.joints(depth), x.T @ (x * p[:, None]))


def test_a_binary_tree_has_as_many_samples_as_it_should() -> None:
    assert [features().n_distinct(d) for d in (1, 3, 6)] == [2, 8, 64]
    assert [features("early_stopping").n_distinct(d) for d in (1, 3, 6)] == [3, 15, 127]
    assert [features().n_features(d) for d in (1, 2, 6)] == [2, 6, 126]


@pytest.mark.parametrize("match", ["exclusive", "early_stopping"])
def test_the_control_has_the_trees_marginals_and_nothing_else(match: str) -> None:
    control, tree = (
        features("independent", match=match, probability=0.7),
        features(match, probability=0.7),
    )
    p = tree.marginals(2)
    assert np.allclose(control.marginals(2), p)
    joints = np.outer(p, p)
    np.fill_diagonal(joints, p)
    assert np.allclose(control.joints(2), joints)
    rows, probs = control.support(2)
    enumerated = {
        row: np.prod(np.where(row, p, 1 - p)) for row in itertools.product((0, 1), repeat=6)
    }
    assert {
        tuple(r): pytest.approx(q) for r, q in zip(rows.tolist(), probs, strict=True)
    } == enumerated


def test_pairs_are_on_together_or_exclude_each_other() -> None:
    pairs = features(
        "pairs", probability=0.2, correlated=0.5, anticorrelated=0.3
    )  # 14 features: 3 pairs, 2 pairs, 4 singles
    joints = pairs.joints(3)
    assert np.allclose(joints.diagonal(), 0.2)
    assert np.allclose([joints[2 * i, 2 * i + 1] for i in range(5)], [0.2] * 3 + [0.0] * 2)
    assert joints[10, 11] == pytest.approx(0.04)
    assert joints[0, 2] == pytest.approx(0.04)


@pytest.mark.parametrize("mode", MODES)
def test_drawn_samples_have_the_exact_probabilities(mode: str) -> None:
    made, n = features(mode), 40_000
    rows = made.draw(3, n, np.random.default_rng(0))
    assert rows.shape == (n, padded(14)) and not rows[:, 14:].any()
    x = rows[:, :14].astype(float)
    exact = made.joints(3)
    error = np.abs(x.T @ x / n - exact) / np.sqrt(exact * (1 - exact) / n + 1e-12)
    assert error.max() < 4.5  # standard errors, over 105 numbers
    assert (x.T @ x)[exact == 0].max(initial=0) == 0


def test_bernoulli_is_exact_at_the_ends_and_in_between() -> None:
    p = np.array([0, 1, 0.5, 0.3, 1e-3, 0.999, 0.125, 1 / 3])
    mean = bernoulli(p, 200_000, np.random.default_rng(1)).mean(0)
    assert mean[0] == 0 and mean[1] == 1
    assert (np.abs(mean - p) <= 4.5 * np.sqrt(p * (1 - p) / 200_000)).all()


def test_counts_are_the_multinomial_of_a_batch() -> None:
    made = features("early_stopping")
    stream = Stream(made, 3, instances=50, batch=64, seed=0, device=CPU)
    assert stream.counted
    # type: ignore[list-item]
    counts = torch.cat([stream.batch_at(step).shares for step in range(200)]).double() * 64
    assert torch.equal(counts.sum(1), torch.full((10_000,), 64.0, dtype=torch.float64))
    p = torch.from_numpy(stream.probs)
    assert torch.allclose(counts.mean(0), 64 * p, atol=0.15)
    assert torch.allclose(counts.T.cov(), 64 * (torch.diag(p) - torch.outer(p, p)), atol=0.7)
    again = Stream(made, 3, instances=50, batch=64, seed=0, device=CPU)
    # type: ignore[arg-type]
    assert torch.equal(again.batch_at(77).shares, stream.batch_at(77).shares)


def learner(
    mode: str,
    shapes: list[tuple[int, int]],
    *,
    steps: int = 20,
    batch: int = 64,
    seed: int = 0,
    **changes: Any,
) -> ToyLearner:
    cfg = train_config(
        steps=steps,
        batch_size=batch,
        lr=1e-2,
        decay="constant",
        warmup_steps=0,
        clip=0.0,
        weight_decay=0.0,
        log_every=10,
        eval_every=10**6,
    )
    return toy.make(
        shapes, features(mode, **changes), cfg, instances=3, init="matrix", seed=seed, device=CPU
    )


def plain_loss(w: Tensor, b: Tensor, x: Tensor, shares: Tensor, weight: Tensor) -> Tensor:
    """What the study says: mean over batch and features of importance x squared error, summed
    over instances.
    """
    out = torch.relu(torch.einsum("ihf,ihg,isg->isf", w, w, x) + b[:, None])
    return (((out - x).square() * weight).mean(-1) * shares).sum()


@pytest.fixture(params=["compiled", "PyTorch"])
def step(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Steps compiled from C, and those of machines without a compiler."""
    if request.param == "PyTorch":
        monkeypatch.setattr(toy, "compiled", lambda: None)
    elif toy_step.compiled() is None:
        pytest.skip("no C compiler that gives a correct step")
    return request.param


@pytest.mark.parametrize("mode", ["exclusive", "independent"])
@pytest.mark.parametrize("importance", [1.0, 0.5])
def test_loss_and_gradient_are_those_of_autograd(mode: str, importance: float, step: str) -> None:
    made = learner(mode, [(3, 2), (3, 5), (4, 6), (5, 10)], batch=70, importance=importance)
    train([made], made.batch_at, made.cfg, Session())  # away from b = 0
    batch = made.batch_at(100)
    losses = made.module.losses(batch, made.importances, made._grads)
    for group, theta, grad, found in zip(
        made.module.groups, made.module.theta, made._grads, losses, strict=True
    ):
        n, (x, shares) = group.n_features, batch[group.depth]
        weight = torch.from_numpy(
            made.streams[group.depth].features.importances(group.depth)
        ).float()
        for c, hidden in enumerate(group.hidden):
            w, b = (
                t.clone().requires_grad_(True) for t in made.module.weights(group.depth, hidden)
            )
            share = shares if shares is not None else torch.full((3, x.shape[1]), 1 / x.shape[1])
            loss = plain_loss(w, b, x[..., :n].float().expand(3, -1, -1), share, weight)
            loss.backward()
            assert found[:, c].sum().item() == pytest.approx(loss.item(), rel=1e-5)
            # type: ignore[arg-type]
            assert torch.allclose(grad[:, c, :hidden, :n], w.grad, atol=1e-6)
            assert torch.allclose(grad[:, c, -1, :n], b.grad, atol=1e-6)  # type: ignore[arg-type]
            assert (
                not theta[:, c, hidden:-1].any() and not theta[..., n:].any()
            )  # padding stays zero


@pytest.mark.parametrize("mode", ["exclusive", "early_stopping", "independent"])
def test_a_configuration_does_not_depend_on_what_is_trained_beside_it(mode: str, step: str) -> None:
    alone, shapes = [(4, 5)], [(1, 2), (3, 2), (3, 9), (4, 2), (4, 4), (4, 5), (4, 10)]
    results = []
    for chosen in (alone, shapes):
        made = learner(mode, chosen, steps=60)
        train([made], made.batch_at, made.cfg, Session())
        results.append((*made.module.weights(4, 5), torch.from_numpy(made.final(500)[4, 5])))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mode", ["early_stopping", "pairs"])
def test_compiled_training_ends_where_pytorch_does(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if toy_step.compiled() is None:
        pytest.skip("no C compiler that gives a correct step")
    ends = []
    for step in (toy_step.compiled(), None):
        monkeypatch.setattr(toy, "compiled", lambda step=step: step)
        made = learner(mode, [(2, 2), (3, 5), (4, 9)], steps=200, branching=3)
        train([made], made.batch_at, made.cfg, Session())
        ends.append([t for shape in [(2, 2), (3, 5), (4, 9)] for t in made.module.weights(*shape)])
    for a, b in zip(*ends, strict=True):
        assert torch.allclose(a, b, atol=2e-3)


def test_a_compiled_step_shows_what_is_not_finite() -> None:
    if toy_step.compiled() is None:
        pytest.skip("no C compiler that gives a correct step")
    made = learner("independent", [(3, 4)])
    made.module.theta[0].data[0, 0, 0, 0] = torch.nan
    assert made.module.losses(made.batch_at(0), made.importances, made._grads)[0].isnan().sum() == 1


@pytest.mark.parametrize("compiler", [None, "/bin/false"])
def test_without_a_working_compiler_there_is_no_compiled_step(
    compiler: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toy_step.shutil, "which", lambda name: compiler)
    assert toy_step.compiled.__wrapped__() is None


def test_a_killed_sweep_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole, parts = learner("independent", [(3, 4)], steps=30), []
    train([whole], whole.batch_at, whole.cfg, Session())
    for stop in (11, None):
        part = learner("independent", [(3, 4)], steps=30)

        def batch_at(step: int, part: ToyLearner = part, stop: int | None = stop) -> Any:
            if step == stop:
                raise KeyboardInterrupt
            return part.batch_at(step)

        with suppress(KeyboardInterrupt):
            train([part], batch_at, part.cfg, Session(checkpoint=tmp_path / "c.safetensors"))
        parts.append(part)
    assert torch.equal(parts[-1].module.weights(3, 4)[0], whole.module.weights(3, 4)[0])


def test_representation_measures_of_known_geometries() -> None:
    pentagon = torch.stack(
        [torch.tensor([np.cos(a), np.sin(a)]) for a in 2 * np.pi * np.arange(5) / 5], 1
    ).double()
    norms, interference, dimensions = measures(pentagon)
    assert torch.allclose(norms, torch.ones(5, dtype=torch.float64))
    assert torch.allclose(
        dimensions, torch.full((5,), 2 / 5, dtype=torch.float64)
    )  # a tight frame shares its two dimensions evenly
    assert torch.allclose(interference, torch.full((5,), 1.5, dtype=torch.float64))
    basis = torch.cat([torch.eye(2), torch.zeros(2, 1)], 1)
    assert [t.tolist() for t in measures(basis)] == [[1, 1, 0], [0, 0, 0], [1, 1, 0]]


def test_a_depth_that_no_hidden_size_solves_has_no_answer() -> None:
    outcome = Outcome()
    summarise(
        outcome,
        {
            (1, 2): np.array([1e-7, 1e-2]),
            (2, 2): np.array([0.1, 0.2]),
            (2, 3): np.array([2e-5, 0.1]),
        },
        1e-5,
    )
    assert outcome.metrics["smallest_hidden_depth_1"] == 2
    assert (
        outcome.metrics["smallest_hidden_depth_2"] is None
        and outcome.metrics["smallest_hidden"] is None
    )
    assert "2e-05" in outcome.why_null["smallest_hidden_depth_2"]
    assert outcome.metrics["loss_min"] == pytest.approx(np.mean([1e-7, 0.1, 2e-5]))
    assert outcome.metrics["solved_depths"] == 1


def test_best_cosines_of_a_known_dictionary() -> None:
    assert best_cosines(torch.eye(3), torch.tensor([[2.0, 0, 0], [0, -1.0, 0]])).tolist() == [
        1,
        0,
        0,
    ]
    assert best_cosines(torch.eye(2), torch.zeros(0, 2)).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"branching": 1}, "branching=1 must be at least 2"),
        ({"probability": 1.2}, "probability=1.2 must lie between 0 and 1"),
        ({"stop": -0.1}, "stop=-0.1"),
        ({"mode": "forest"}, "forest"),
        (
            {"mode": "pairs", "correlated": 0.8, "anticorrelated": 0.8, "probability": 0.1},
            "at most 1 together",
        ),
        ({"mode": "pairs", "anticorrelated": 0.5, "probability": 0.6}, "at most 0.5"),
        ({"importance": 0.0}, "importance"),
    ],
)
def test_bad_features_are_one_line(change: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        features(**change)


SMALL = (
    "study=superposition",
    "preset=smoke",
    "threads=1",
    "study.depths=[1,2]",
    "study.hidden=[2,3]",
    "study.train.steps=20",
    "study.eval_rows=500",
)
PROBE = (
    "study.probe.depth=2",
    "study.probe.hidden=3",
    "study.probe.train.steps=20",
    "study.probe.rows=512",
)


def test_the_study_from_start_to_end(
    experiment: Experiment, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ("--out_dir=run_0", "workers=1", "report=false", *SMALL, *PROBE)
    assert in_this_process(experiment, *args, tiny=False) == 0, capsys.readouterr().err
    final = experiment.json("run_0", "final_info.json")
    assert set(final) == {"exclusive", "early_stopping", "control"}
    assert {
        "loss_min_mean",
        "loss_mean_mean",
        "smallest_hidden_mean",
        "sae_mmcs_mean",
        "sae_recovered_frac_mean",
    } <= set(means_of(final["control"]))
    done, empty = drawn(experiment.runs / "run_0", "superposition_", experiment.here)
    assert len(done) == 5 and not empty
    assert drawn(experiment.runs / "run_0", "palindrome_", experiment.here) == (
        [],
        [f"palindrome_{n}" for n in ("attention", "dictionary", "logprob", "selectivity")],
    )
    assert in_this_process(experiment, *args, tiny=False) == 0
    assert "already done" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("study.hidden=[200]", "study.hidden=200 exceeds the 6 features"),
        ("study.families.exclusive.branching=1", "branching=1 must be at least 2"),
        ("study.families.control.probability=1.5", "probability=1.5 must lie between 0 and 1"),
        ("study.probe.hidden=4", "is not a configuration of the sweep"),
    ],
)
def test_mistakes_are_one_line_before_training(
    experiment: Experiment, capsys: pytest.CaptureFixture[str], wrong: str, told: str
) -> None:
    assert_is_refused(experiment, capsys, told, *SMALL, *PROBE, wrong, tiny=False)

"""The character GPT-2: the published size, evaluation that repeats itself, sampling with a
cache, and a folder others can load.
"""

from __future__ import annotations

import math
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from transformers import GPT2LMHeadModel

from sae_experiments.errors import UserError
from sae_experiments.models import cpu_kernels
from sae_experiments.models import gpt2 as lm
from sae_experiments.models.decoding import StaticDecoder, generate
from sae_experiments.models.gpt2 import LMLearner, LMSpec, autocast, build_lm, train_lm
from sae_experiments.training.loop import Session, StepInfo, train
from support.common import CONF, lm_spec, train_config
from support.tape import nothing_waits

CPU = torch.device("cpu")


def published() -> LMSpec:
    """conf/lm/gpt2_char.yaml without Hydra."""
    values = yaml.safe_load((CONF / "lm" / "gpt2_char.yaml").read_text())
    del values["_target_"]
    return LMSpec(**values)


def learner_of(corpus: Any, seed: int = 0, **changes: Any) -> LMLearner:
    spec = lm_spec(**changes)
    return LMLearner(
        build_lm(spec, len(corpus.symbols), seed=seed),
        corpus,
        spec,
        spec.train_config({}),
        seed=seed,
    )


def greedy(model: GPT2LMHeadModel, prompt: torch.Tensor, n: int) -> torch.Tensor:
    """The reference: the whole text is read again for each character."""
    for _ in range(n):
        with torch.no_grad():
            prompt = torch.cat([prompt, model(input_ids=prompt).logits[:, -1:].argmax(-1)], 1)
    return prompt


# ------------------------------------------------------------------------------------------------
# the model


def test_the_published_model_has_about_10_65_million_parameters_that_train():
    with torch.device("meta"):
        model = build_lm(published(), 65, seed=0)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    d, layers, context = 384, 6, 256
    assert (
        trainable == layers * 12 * d * d + (2 * layers + 1) * d + 65 * d + context * d == 10_745_088
    )
    assert (trainable - context * d) / 1e6 == pytest.approx(
        10.65, abs=0.005
    )  # as published: position embeddings not counted
    assert model.lm_head.weight is model.transformer.wte.weight


def test_no_bias_ever_trains(corpus):
    learner = learner_of(corpus, train={"steps": 3})
    train([learner], lambda step: learner.batch("train", step, "train"), learner.cfg, Session())
    biases = {n: p for n, p in learner.module.named_parameters() if n.endswith(".bias")}
    assert len(biases) == 3 * 6 + 1
    assert all(not p.requires_grad and not bool(p.any()) for p in biases.values())


def test_freeze_bias_false_lets_biases_train(corpus):
    learner = learner_of(corpus, freeze_bias=False, train={"steps": 3})
    train([learner], lambda step: learner.batch("train", step, "train"), learner.cfg, Session())
    assert all(
        bool(p.any()) for n, p in learner.module.named_parameters() if n.endswith("c_fc.bias")
    )


def test_weights_are_a_function_of_the_seed_alone():
    torch.manual_seed(1)
    a = build_lm(lm_spec(), 30, seed=5).state_dict()
    torch.manual_seed(2)
    b, c = (
        build_lm(lm_spec(), 30, seed=5).state_dict(),
        build_lm(lm_spec(), 30, seed=6).state_dict(),
    )
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["transformer.wte.weight"], c["transformer.wte.weight"])


def test_initial_weights_are_gpt2s_with_smaller_residual_projections():
    model = build_lm(lm_spec(n_layer=8, n_embd=64), 60, seed=0)
    assert float(model.transformer.h[0].mlp.c_fc.weight.detach().std()) == pytest.approx(
        0.02, rel=0.03
    )
    for block in model.transformer.h:
        assert float(block.mlp.c_proj.weight.detach().std()) == pytest.approx(
            0.02 / math.sqrt(16), rel=0.05
        )


def test_every_trainable_parameter_is_in_one_group_and_only_matrices_decay(corpus):
    learner = learner_of(corpus)
    (phase,) = learner.phases()
    grouped = [(id(p), p.ndim, g.decay, g.muon) for g in phase.groups for p in g.params]
    assert sorted(i for i, *_ in grouped) == sorted(
        id(p) for p in learner.module.parameters() if p.requires_grad
    )
    assert all(decay == (ndim == 2) for _, ndim, decay, _ in grouped)
    embeddings = {
        id(learner.module.transformer.wte.weight),
        id(learner.module.transformer.wpe.weight),
    }
    assert {i for i, ndim, _, muon in grouped if ndim == 2 and not muon} == embeddings, (
        "muon takes the matrices of the blocks only"
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("n_head", 3),
        ("n_head", 0),
        ("n_layer", 0),
        ("n_positions", 1),
        ("precision", "fp8"),
        ("dropout", 1.0),
        ("dropout", -0.1),
        ("temperature", 0.0),
        ("top_k", 0),
        ("eval_batches", 0),
        ("activation_function", "no_such_function"),
    ],
)
def test_a_wrong_number_is_one_line_that_names_key_and_value(key, value):
    with pytest.raises(UserError, match=rf"lm\.{key}=.*{value}") as caught:
        lm_spec(**{key: value})
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------
# recipe and precision


def test_what_is_null_comes_from_the_corpus_and_explicit_numbers_win():
    recipe = {
        "steps": 5000,
        "batch_size": 64,
        "lr": 1e-3,
        "min_lr": 1e-4,
        "warmup_steps": 100,
        "eval_every": 250,
    }
    spec = published()
    cfg = spec.train_config(recipe)
    assert (cfg.steps, cfg.batch_size, cfg.lr, cfg.min_lr, cfg.warmup_steps, cfg.eval_every) == (
        5000,
        64,
        1e-3,
        1e-4,
        100,
        250,
    )
    assert (cfg.optimizer, cfg.weight_decay, cfg.clip, tuple(cfg.betas), cfg.decay) == (
        "adamw",
        0.1,
        1.0,
        (0.9, 0.99),
        "cosine",
    )
    mine = replace(spec, train=spec.train | {"steps": 7, "min_lr": 0.0}).train_config(recipe)
    assert (mine.steps, mine.min_lr, mine.lr, mine.batch_size) == (7, 0.0, 1e-3, 64)


@pytest.mark.parametrize("name", ["shakespeare_char", "enwik8", "text8"])
def test_the_published_recipe_is_whole_for_every_corpus(name):
    recipe = yaml.safe_load((CONF / "data" / f"{name}.yaml").read_text())["recipe"]
    cfg = published().train_config(recipe)
    large = name != "shakespeare_char"
    assert (cfg.batch_size, cfg.steps, cfg.eval_every) == (
        (32, 100_000, 1000) if large else (64, 5000, 250)
    )
    assert (cfg.lr, cfg.min_lr, cfg.warmup_steps) == (
        (5e-4, 5e-5, 200) if large else (1e-3, 1e-4, 100)
    )


@pytest.mark.parametrize(
    ("precision", "width", "native", "bf16"),
    [
        ("fp32", 4096, True, False),
        ("bf16", 8, False, True),
        ("auto", 384, True, True),
        ("auto", 384, False, False),
        ("auto", 32, True, False),
    ],
    ids=[
        "fp32 is fp32",
        "bf16 is bf16",
        "wide and native",
        "wide but emulated",
        "too narrow to pay",
    ],
)
def test_bf16_is_chosen_where_it_pays(monkeypatch, precision, width, native, bf16):
    monkeypatch.setattr(lm, "cpu_has_bf16", lambda: native)
    context = autocast(CPU, precision, width)
    assert (context is not nullcontext) == bf16
    with context():
        out = torch.ones(2, 2) @ torch.ones(2, 2)
    assert out.dtype == (torch.bfloat16 if bf16 else torch.float32)


@pytest.mark.parametrize("supported", [True, False])
def test_on_cuda_auto_asks_the_device(monkeypatch, supported):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: supported)
    assert (autocast(torch.device("cuda"), "auto", 384) is not nullcontext) == supported


# ------------------------------------------------------------------------------------------------
# loss and evaluation


def at_step(step: int) -> StepInfo:
    return StepInfo(step, "train", step, 10, torch.Generator())


def test_the_loss_is_the_mean_cross_entropy_of_the_next_character_and_its_parts_sum_to_it(corpus):
    learner = learner_of(corpus)
    x, y = learner.batch("train", 3, "train")
    assert torch.equal(x[:, 1:], y[:, :-1])
    loss = learner.loss((x, y), at_step(3))
    logits = learner.module(input_ids=x).logits
    expected = torch.stack([F.cross_entropy(logits[b], y[b]) for b in range(len(x))]).mean()
    torch.testing.assert_close(loss.total, expected)
    torch.testing.assert_close(sum(loss.parts.values()), loss.total.detach())


def test_dropout_depends_on_seed_and_step_and_on_nothing_else(corpus):
    learner = learner_of(corpus, dropout=0.3)
    learner.module.train()
    batch = learner.batch("train", 0, "train")

    def loss(step: int) -> torch.Tensor:
        learner.seed_step(at_step(step))
        return learner.loss(batch, at_step(step)).total

    torch.manual_seed(1)
    first = loss(4)
    torch.manual_seed(2)
    assert torch.equal(first, loss(4))
    assert not torch.equal(first, loss(5))


def test_evaluation_reads_the_same_batches_at_every_call_and_disturbs_nothing(corpus):
    learner = learner_of(corpus, dropout=0.3)
    state = torch.random.get_rng_state()
    first = learner.evaluate(50)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.rand(7)
    assert learner.evaluate(50) == first == learner.evaluate(100)
    asked = []
    learner.corpus = type(
        "Spy",
        (),
        {
            "batch_at": lambda self, *a, **k: (
                asked.append((a, tuple(k.items()))),
                corpus.batch_at(*a, **k),
            )[1]
        },
    )()
    learner.evaluate(50)
    once, asked[:] = list(asked), []
    learner.evaluate(50)
    assert asked == once and len(set(once)) == len(once) == 4


def test_evaluation_does_not_read_the_batches_of_training(corpus):
    learner = learner_of(corpus)
    trained_on = {
        tuple(learner.batch("train", step, "train")[0].reshape(-1).tolist()) for step in range(4)
    }
    assert not trained_on & {
        tuple(learner.batch("train", step, "eval")[0].reshape(-1).tolist()) for step in range(4)
    }


def test_mean_loss_is_the_mean_over_its_batches(corpus):
    learner = learner_of(corpus)
    learner.module.eval()
    with torch.no_grad():
        losses = [learner.loss(learner.batch("val", i, "eval"), at_step(0)).total for i in range(4)]
    assert learner.mean_loss("val", 4) == pytest.approx(
        float(torch.stack(losses).double().mean()), rel=1e-6
    )


def test_quick_evaluations_have_another_name_so_that_best_val_loss_never_mixes_them(corpus):
    learner = learner_of(corpus, eval_batches=4, curve_batches=2)
    assert set(learner.evaluate(50)) == {"eval_train_loss_quick", "eval_val_loss_quick"}
    assert set(learner.evaluate(learner.cfg.steps)) == {"eval_train_loss", "eval_val_loss"}
    same = learner_of(corpus, eval_batches=2, curve_batches=2)
    assert set(same.evaluate(50)) == {"eval_train_loss", "eval_val_loss"}


# ------------------------------------------------------------------------------------------------
# sampling


def sampled(model: GPT2LMHeadModel, prompt: torch.Tensor, n: int, **how: Any) -> torch.Tensor:
    return generate(StaticDecoder(model, len(prompt)), prompt, n, **how)


def test_greedy_generation_with_the_cache_equals_reading_everything_again(trained):
    prompt = torch.tensor([[1, 2, 3], [4, 5, 6]])
    found = sampled(
        trained.model,
        prompt,
        13,
        temperature=1.0,
        top_k=1,
        generator=torch.Generator().manual_seed(0),
    )
    assert torch.equal(found, greedy(trained.model, prompt, 13))


def test_sampling_with_the_cache_equals_sampling_without_it(trained):
    def without(prompt, n, generator):
        for _ in range(n):
            with torch.no_grad():
                logits = trained.model(input_ids=prompt).logits[:, -1] / 0.8
            logits[logits < logits.topk(5).values[:, -1:]] = -math.inf
            prompt = torch.cat(
                [prompt, torch.multinomial(logits.softmax(-1), 1, generator=generator)], 1
            )
        return prompt

    prompt = torch.tensor([[1], [7], [3]])
    found = sampled(
        trained.model,
        prompt,
        15,
        temperature=0.8,
        top_k=5,
        generator=torch.Generator().manual_seed(3),
    )
    assert torch.equal(found, without(prompt, 15, torch.Generator().manual_seed(3)))


@pytest.mark.parametrize("length", [1, 15, 16, 17, 40])
def test_generation_goes_past_the_context_from_a_prompt_of_any_length(trained, length):
    prompt = torch.arange(2 * length).reshape(2, length) % trained.model.config.vocab_size
    found = sampled(
        trained.model,
        prompt,
        50,
        temperature=0.8,
        top_k=200,
        generator=torch.Generator().manual_seed(0),
    )
    assert found.shape == (2, length + 50) and torch.equal(found[:, :length], prompt)
    assert 0 <= int(found.min()) <= int(found.max()) < trained.model.config.vocab_size


@pytest.mark.parametrize("context", [2, 3])
def test_generation_works_for_the_smallest_contexts(context):
    model = build_lm(lm_spec(n_positions=context), 5, seed=0).eval()
    assert sampled(
        model,
        torch.tensor([[1]]),
        9,
        temperature=1.0,
        top_k=200,
        generator=torch.Generator().manual_seed(0),
    ).shape == (1, 10)


def test_rows_of_a_batch_are_generated_independently(trained):
    prompt = torch.tensor([[1, 2], [5, 3], [9, 9]])
    kwargs = {"temperature": 1.0, "top_k": 1, "generator": torch.Generator()}
    together = sampled(trained.model, prompt, 30, **kwargs)
    for row, alone in enumerate(prompt):
        assert torch.equal(
            together[row : row + 1], sampled(trained.model, alone[None], 30, **kwargs)
        )


def test_top_k_keeps_the_k_likeliest_characters_only(trained):
    prompt = torch.tensor([[3]]).repeat(300, 1)
    with torch.no_grad():
        best = set(trained.model(input_ids=prompt[:1]).logits[0, -1].topk(3).indices.tolist())
    found = sampled(
        trained.model,
        prompt,
        1,
        temperature=5.0,
        top_k=3,
        generator=torch.Generator().manual_seed(0),
    )
    assert set(found[:, 1].tolist()) == best


# ------------------------------------------------------------------------------------------------
# training and the folder


def test_training_learns_and_reports_the_four_published_metrics(trained, corpus):
    assert set(trained.metrics) == {
        "final_train_loss",
        "best_val_loss",
        "total_train_time",
        "avg_inference_tokens_per_second",
    }
    assert trained.metrics["best_val_loss"] < 0.75 * math.log(len(corpus.symbols))
    assert trained.metrics["best_val_loss"] == min(
        v for _, name, v in trained.history if name == "eval_val_loss"
    )
    assert (
        trained.metrics["total_train_time"] > 0
        and trained.metrics["avg_inference_tokens_per_second"] > 0
    )
    assert not trained.cut


def test_the_folder_loads_in_transformers_and_gives_the_same_logits(trained, corpus):
    model = GPT2LMHeadModel.from_pretrained(trained.folder).eval()
    x, _ = corpus.batch_at("val", 0, rows=3, length=16, seed=0)
    with torch.no_grad():
        assert torch.equal(model(input_ids=x).logits, trained.model(input_ids=x).logits)
    assert not list(trained.folder.rglob("*.bin")) and not list(trained.folder.rglob("*.pt")), (
        "no pickles"
    )
    assert not list(trained.folder.glob("checkpoint*"))


def test_the_model_of_the_folder_has_the_loss_that_was_reported(trained, corpus):
    spec = lm_spec()
    learner = LMLearner(trained.model, corpus, spec, spec.train_config({}), seed=0)
    assert learner.mean_loss("train", spec.eval_batches) == pytest.approx(
        trained.metrics["final_train_loss"], rel=1e-6
    )


def again(
    corpus: Any, cache: Path, *, seed: int = 0, deadline: float | None = None, **changes: Any
) -> Any:
    logged: list[int] = []
    session = Session(log=lambda step, values: logged.append(step), deadline=deadline)
    return (
        train_lm(
            lm_spec(**changes), corpus, {}, seed=seed, cache=cache, device=CPU, session=session
        ),
        logged,
    )


def test_a_trained_model_is_reused_and_nothing_is_trained_again(trained, corpus, lm_cache):
    found, logged = again(corpus, lm_cache)
    assert (found.folder, found.metrics, found.history, logged) == (
        trained.folder,
        trained.metrics,
        trained.history,
        [],
    )
    assert found.from_cache and "from the cache, trained in" in found.headline
    made, _ = again(corpus, lm_cache, seed=7, train={"steps": 2, "eval_every": 2})
    assert not made.from_cache and re.search(r"\(trained in \d+ s\)", made.headline)


def test_seed_sizes_and_recipe_name_different_models(trained, corpus, lm_cache):
    few = {"steps": 2, "eval_every": 2}
    found = [
        again(corpus, lm_cache, train=few)[0],
        again(corpus, lm_cache, seed=1, train=few)[0],
        again(corpus, lm_cache, n_layer=2, train=few)[0],
    ]
    found.append(again(corpus, lm_cache, train=few | {"lr": 2e-2})[0])
    assert len({f.folder for f in found} | {trained.folder}) == 5


def test_cut_short_and_then_continued_gives_the_bits_of_a_model_that_was_not(corpus, tmp_path):
    few = {"steps": 6, "eval_every": 2, "checkpoint_every_s": 0.0}
    whole, _ = again(corpus, tmp_path / "a", train=few)
    cut, logged = again(corpus, tmp_path / "b", train=few, deadline=0.0)
    assert cut.cut and set(cut.metrics) == set(whole.metrics) and max(logged) <= 1
    assert cut.key != whole.key, (
        "what is made from a model cut short must not pass for what is made from the whole one"
    )
    rest, logged = again(corpus, tmp_path / "b", train=few)
    assert (
        not rest.cut
        and min(logged) >= 1
        and rest.history == whole.history
        and rest.key == whole.key
    )
    assert (rest.folder / "model.safetensors").read_bytes() == (
        whole.folder / "model.safetensors"
    ).read_bytes()
    for name in ("final_train_loss", "best_val_loss"):
        assert rest.metrics[name] == whole.metrics[name]


def test_no_sample_asked_for_is_a_null_rate(corpus, tmp_path):
    found, _ = again(corpus, tmp_path, samples=0, train={"steps": 1, "eval_every": 1})
    assert found.metrics["avg_inference_tokens_per_second"] is None


@pytest.mark.parametrize("length", [1, 7, 128, 200, 260])
def test_attention_with_dropout_is_causal_attention(length):
    q, k, v = (
        torch.randn(
            2,
            3,
            length,
            8,
            generator=torch.Generator().manual_seed(i),
            dtype=torch.double,
            requires_grad=True,
        )
        for i in range(3)
    )
    ours, _ = cpu_kernels.causal_attention(
        torch.nn.Module(), q, k, v, None, dropout=1e-9, scaling=0.3
    )
    plain = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=0.3
    ).transpose(1, 2)
    torch.testing.assert_close(ours, plain)
    for a, b in zip(
        torch.autograd.grad(ours.square().sum(), (q, k, v)),
        torch.autograd.grad(plain.square().sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("length", [7, 200])
def test_attention_in_bf16_rounds_no_more_than_twice_as_much_as_the_kernel_it_replaces(length):
    made = [
        torch.randn(
            2,
            3,
            length,
            32,
            generator=torch.Generator().manual_seed(i),
            dtype=torch.double,
            requires_grad=True,
        )
        for i in range(3)
    ]
    exact = torch.nn.functional.scaled_dot_product_attention(*made, is_causal=True).transpose(1, 2)
    grads = torch.autograd.grad(exact.square().sum(), made)
    halves = [t.detach().bfloat16().requires_grad_() for t in made]
    off = []
    for attend in (
        lambda q, k, v: cpu_kernels.causal_attention(torch.nn.Module(), q, k, v, None)[0],
        lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True
        ).transpose(1, 2),
    ):
        found = attend(*halves)
        assert found.dtype == torch.bfloat16
        back = torch.autograd.grad(found.float().square().sum(), halves)
        off.append(
            [
                ((a.detach().double() - b).norm() / b.norm()).item()
                for a, b in zip([found, *back], [exact, *grads], strict=True)
            ]
        )
    assert all(ours < 2 * theirs and ours < 0.02 for ours, theirs in zip(*off, strict=True)), off


def test_cheap_dropout_drops_a_share_p_and_keeps_the_mean():
    torch.manual_seed(0)
    found = cpu_kernels.dropped(torch.ones(1_000_003), 0.2)
    assert set(found.unique().tolist()) == {0.0, 1.25}
    assert abs((found == 0).double().mean().item() - 0.2) < 0.002  # five standard errors
    halves = (found[:-1] == 0).double() * (found[1:] == 0)  # neighbours share a draw but no bits
    assert abs(halves.mean().item() - 0.04) < 0.0011
    torch.manual_seed(0)
    assert torch.equal(cpu_kernels.dropped(torch.ones(1_000_003), 0.2), found)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recorded_steps_wait_for_nothing_and_give_the_bits_of_ordinary_ones(
    corpus: Any, tapes: list[Any], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def weights(backend: str) -> tuple[dict[str, Any], list[Any]]:
        own = {"optimizer": "adamw"}
        spec = lm_spec(dropout=0.2, precision=precision, backend=backend, train=own)
        cfg = train_config(steps=30, eval_every=10, optimizer="adamw", weight_decay=0.1)
        model = build_lm(spec, corpus.vocabulary, seed=0)
        learner = LMLearner(model, corpus, spec, cfg, seed=3)
        progress = train(
            [learner], lambda step: learner.batch("train", step, "train"), cfg, Session()
        )
        return model.state_dict(), progress.history

    replayed, history = weights("device")
    replays = sum(tape.replays for tape in tapes)
    assert replays == 26 + 12  # training and evaluation
    monkeypatch.setattr("sae_experiments.training.recorded.RECORDERS", {})
    ordinary, expected = weights("device")
    assert sum(tape.replays for tape in tapes) == replays
    assert history == expected
    for name, value in replayed.items():
        assert torch.equal(value, ordinary[name]), name
    _, of_host = weights("host")
    last = {name: value for _, name, value in history}
    on_host = {name: value for _, name, value in of_host}
    assert last["eval_val_loss"] == pytest.approx(on_host["eval_val_loss"], rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"backend": "gpu"}, "lm.backend='gpu' is not one of auto, host, device"),
        ({"backend": "device", "compile": True}, "lm.compile=true"),
        ({"backend": "device", "train": {"optimizer": "muon"}}, "lm.train.optimizer=muon"),
    ],
)
def test_a_backend_that_cannot_be_used_is_refused(changes: dict[str, Any], cause: str) -> None:
    with pytest.raises(UserError, match=cause):
        lm_spec(**changes)


def test_recorded_sampling_waits_for_nothing_and_gives_the_same_text(
    trained: Any, tapes: list[Any]
) -> None:
    prompt = torch.tensor([[1, 2, 3], [4, 5, 6]])

    def text(recorded: bool) -> torch.Tensor:
        generator = torch.Generator().manual_seed(2)
        decoder = StaticDecoder(trained.model, 2, recorded=recorded)
        how: dict[str, Any] = {"temperature": 0.8, "top_k": 5, "generator": generator}
        with nothing_waits() if recorded else nullcontext():
            return generate(decoder, prompt, 60, **how)

    expected = text(recorded=False)
    assert not tapes
    assert torch.equal(text(recorded=True), expected)
    assert sum(tape.replays for tape in tapes) > 40

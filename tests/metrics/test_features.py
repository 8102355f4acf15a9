"""What the feature browser is given: contexts, histograms, followers, logit effects, partners
and stability with known answers.
"""

from __future__ import annotations

import json
import types
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse
from torch import nn

from sae_experiments.metrics import features
from sae_experiments.metrics.base import EvalContext, Measured
from sae_experiments.models.hooks import Site
from sae_experiments.studies.base import Outcome, merged
from support.metric_worlds import CPU, LENGTH, Given, ctx, play

OPTIONS = {
    "rows": None,
    "latents": None,
    "contexts": 3,
    "samples": 3,
    "before": 10,
    "after": 5,
    "bins": 4,
    "characters": 3,
    "partners": 2,
    "pair_rows": 100_000,
    "windows": 2,
}
TEXT = play(12_000)


def ends(*wanted: str):
    """A latent for each wanted string: 1 where it was just read within the window."""
    return lambda text: [
        np.array([text[max(t + 1 - len(w), t - t % LENGTH) : t + 1] == w for t in range(len(text))])
        * 1.0
        for w in wanted
    ]


def measured(columns, sae=None, **options: Any) -> tuple[Measured, dict[int, dict[str, Any]]]:
    world = {k: options.pop(k) for k in ("replicas", "model") if k in options}
    found = features.measure(ctx(TEXT, columns, sae, **world), **(OPTIONS | options))
    return found, {f["latent"]: f for f in found.features or []}


def test_features_are_json_and_show_the_text_as_the_model_saw_it() -> None:
    found, by = measured(ends("th", "ing", "\x00"))
    assert json.loads(json.dumps(found.features, allow_nan=False)) == found.features
    top = by[1]["top"][0]
    assert (
        (top["before"] + top["at"]).endswith("ing")
        and top["at"] == "g"
        and len(top["acts"]) == len(top["before"] + top["at"] + top["after"])
    )
    assert top["acts"][len(top["before"])] == 1 and len(by[1]["top"]) == 3 == len(by[1]["samples"])
    assert TEXT[top["row"] - len(top["before"]) : top["row"] + 1] == top["before"] + top["at"]
    assert by[2] == {"latent": 2, "density": 0.0}, "a latent that never fires has nothing to show"


def test_histogram_counts_every_firing_once() -> None:
    values = np.random.default_rng(0).random(len(TEXT)).astype(np.float32) * (
        np.arange(len(TEXT)) % 3 == 0
    )
    _, by = measured(lambda text: [values])
    rows = (len(TEXT) - 1) // LENGTH * LENGTH
    used = values[:rows]
    assert by[0]["histogram"] == np.histogram(used[used > 0], 4, (0, used.max()))[0].tolist()
    assert by[0]["density"] == pytest.approx((used > 0).mean(), rel=5e-3) and by[0][
        "mean"
    ] == pytest.approx(used[used > 0].mean(), rel=5e-3)


def test_what_follows_a_latent_is_counted_against_what_follows_anything() -> None:
    _, by = measured(ends("q", "e"))
    char, share, lift = by[0]["next"][0]
    assert char == "u" and share == 1, "u always follows q in this text"
    assert lift == pytest.approx(len(TEXT) / TEXT.count("u"), rel=0.02)


def test_the_bits_of_what_follows_are_none_for_chance_and_log_of_the_lift_for_certainty() -> None:
    chance = (np.random.default_rng(0).random(len(TEXT)) < 0.2) * 1.0
    found, by = measured(lambda text: [*ends("q")(text), chance])
    bits = found.arrays["feature_next_bits"]
    assert bits[0] == pytest.approx(np.log2(by[0]["next"][0][2]), abs=0.01) and bits[1] < 0.02


def test_partners_are_the_latents_that_fire_at_the_same_rows() -> None:
    chance = np.random.default_rng(0).random((4, 5000)) < 0.1
    on = np.stack([chance[0], chance[0] & chance[1], chance[2], chance[3]], 1)
    expected = np.corrcoef(on.T.astype(float))
    for dense in (
        on,
        on | (np.arange(5000) % 2 == 0)[:, None],
    ):  # rare enough to count pairs, and not
        expected = np.corrcoef(dense.T.astype(float))
        found = features.pairs_of(
            sparse.csc_matrix(dense * 2.0), np.array([10, 11, 12, 13]), 5000, 3
        )
        for j, partners in enumerate(found):
            assert all(
                phi == pytest.approx(expected[j, name - 10], abs=2e-3) for name, phi in partners
            )
    assert (
        features.pairs_of(sparse.csc_matrix(on * 1.0), np.array([10, 11, 12, 13]), 5000, 1)[0][0][0]
        == 11
    )


class Tiny(nn.Module):
    """The ends of a language model: a final norm and an unembedding, around blocks that do
    nothing.
    """

    def __init__(self, width: int, symbols: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = types.SimpleNamespace(model_type="gpt2")
        self.embed, self.head = nn.Embedding(symbols, width), nn.Linear(width, symbols, bias=False)
        self.transformer = nn.Module()
        self.transformer.h = nn.ModuleList([nn.Identity(), nn.Identity()])
        self.transformer.ln_f = nn.LayerNorm(width)
        self.transformer.ln_f.weight.data.uniform_(0.5, 1.5)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> Any:
        x = self.embed(input_ids)
        for block in self.transformer.h:
            x = block(x)
        return types.SimpleNamespace(logits=self.head(self.transformer.ln_f(x)))


def test_the_logit_effect_is_the_derivative_of_the_logits_along_the_decoder_row() -> None:
    symbols = len(set(TEXT))
    model, sae = Tiny(6, symbols), Given(torch.randn(4, 6), torch.randn(4, 6))
    world = ctx(
        TEXT, lambda text: list(np.random.default_rng(0).random((6, len(text)))), sae, model=model
    )
    found = features.logit_effect(world, np.array([1.0, 2.0, 0.0, 1.0]), 1)
    x = model.embed(world.lm.tokens(world.held_out.starts[:1])[0])[0].detach()
    sigma = x.var(-1, correction=0).add(1e-5).sqrt()

    def logits(shift: torch.Tensor) -> torch.Tensor:  # the norm's scale held fixed
        h = x + shift
        return model.head(
            (h - h.mean(-1, keepdim=True)) / sigma.mean() * model.transformer.ln_f.weight
        )

    for j, strength in ((0, 1.0), (1, 2.0), (2, 0.0)):
        change = (logits(strength * sae.W_dec[j]) - logits(torch.zeros(6))).mean(0).detach()
        np.testing.assert_allclose(found[j], (change - change.mean()).numpy(), atol=1e-4)


def test_promoted_and_suppressed_characters_are_the_ends_of_the_logit_effect() -> None:
    model, sae = Tiny(6, len(set(TEXT))), Given(torch.eye(6), torch.randn(6, 6))

    def columns(text):
        return list((np.random.default_rng(0).random((6, len(text))) < 0.1) * 1.0)

    _, by = measured(columns, sae, model=model)
    effect = features.logit_effect(ctx(TEXT, columns, sae, model=model), np.ones(6), 2)
    symbols = sorted(set(TEXT))
    assert [c for c, _ in by[3]["promotes"]] == [symbols[i] for i in np.argsort(-effect[3])[:3]]
    assert [c for c, _ in by[3]["suppresses"]] == [symbols[i] for i in np.argsort(effect[3])[:3]]


def test_an_sae_that_does_not_write_to_the_residual_stream_has_no_logit_effect() -> None:
    world = ctx(TEXT, ends("e"), model=Tiny(1, len(set(TEXT))))
    object.__setattr__(world, "write", Site("mlp_in", 1))
    assert features.logit_effect(world, np.ones(1), 1) is None


def test_stability_is_the_cosine_with_the_nearest_row_of_another_seed() -> None:
    eye = torch.eye(3)
    turned = torch.stack([eye[2], (eye[0] + eye[1]) / 2**0.5, eye[2]])
    _, by = measured(ends("e", "t", "th"), Given(eye), replicas=(Given(eye, turned), Given(eye)))
    assert [by[j]["stability"] for j in range(3)] == pytest.approx(
        [(0.5**0.5 + 1) / 2, (0.5**0.5 + 1) / 2, 1], abs=1e-3
    )
    assert "stability" not in measured(ends("e"))[1][0]


def test_of_many_latents_some_are_stored_evenly_spaced() -> None:

    def columns(text):
        return list((np.random.default_rng(0).random((9, len(text))) < 0.1) * 1.0)

    assert list(measured(columns, latents=3)[1]) == [0, 4, 8]


@pytest.mark.parametrize(
    "columns", [lambda t: [np.full(len(t), np.nan)] * 2, lambda t: [np.zeros(len(t))] * 2]
)
def test_what_cannot_be_measured_is_null_with_a_reason(columns) -> None:
    found, by = measured(columns)
    assert (
        found.scalars == {"feature_next_bits": None}
        and set(found.why_null) == {"feature_next_bits"}
        and not by
    )


def test_without_text_there_are_values_but_no_contexts() -> None:
    found = features.measure(EvalContext(sae=Given(), device=CPU, x=torch.rand(50, 4)), **OPTIONS)
    assert found.why_null == {"feature_next_bits": "there is no text"}
    assert set(found.features[0]) == {"latent", "density", "max", "mean", "histogram", "partners"}


def test_what_metrics_say_about_a_latent_is_joined() -> None:
    one, other = (
        [{"latent": 0, "a": 1}, {"latent": 2, "a": 2}],
        [{"latent": 2, "b": 3, "a": 4}, {"latent": 5, "b": 6}],
    )
    assert merged(one, other) == [
        {"latent": 0, "a": 1},
        {"latent": 2, "a": 4, "b": 3},
        {"latent": 5, "b": 6},
    ]
    assert merged(None, other) == other and merged(one, None) == one and merged(None, None) is None
    outcome = Outcome()
    outcome.measure(
        {
            k: lambda ctx, v=v: Measured({}, features=v)
            for k, v in (("x", one), ("y", None), ("z", other))
        },
        SimpleNamespace(held_out=None, n_rows=1),
    )
    assert outcome.features == merged(one, other)

"""Steering: what is added is a latent's part of the reconstruction, in a call that gives the
same texts every time.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from typing import Any

import pytest
import torch

from sae_experiments import load_sae
from sae_experiments.errors import UserError
from sae_experiments.metrics.steering import continued, direction
from sae_experiments.models.decoding import StaticDecoder, generate
from sae_experiments.models.hooks import Site, capture
from sae_experiments.steering import steer
from support.common import Experiment
from support.saes import D, make, rows

SITE = Site("resid", 2)


@pytest.mark.parametrize("name", ["batch_topk", "jumprelu", "tied", "transcoder"])
def test_a_direction_is_what_a_latent_adds_to_a_reconstruction(name: str) -> None:
    sae = make(name).eval()
    acts = sae.encode(rows(8, 0))
    more = acts.clone()
    more[:, 5] += 2.5
    expected = sae.decode(more) - sae.decode(acts)
    torch.testing.assert_close(direction(sae, 5, 2.5).expand(8, D), expected, rtol=0, atol=1e-5)


def written(trained: Any, changes: torch.Tensor, n: int = 40, seed: int = 0) -> torch.Tensor:
    prompt = torch.tensor([3, 1, 4, 1, 5])
    given = {"temperature": 0.8, "top_k": 200, "seed": seed}
    return continued(trained.model, prompt, {SITE: changes}, n, **given)


def test_versions_do_not_touch_each_other_and_differ_by_their_changes_alone(trained: Any) -> None:
    change = 8 * torch.randn(16, generator=torch.Generator().manual_seed(0))
    none = torch.zeros(16)
    together = written(trained, torch.stack([none, change, none, -change]))
    assert torch.equal(together[0], together[2]) and torch.equal(
        together[0], written(trained, none[None])[0]
    )
    assert torch.equal(together[1], written(trained, change[None])[0])
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(together[1], together[3])
    assert torch.equal(together, written(trained, torch.stack([none, change, none, -change])))
    assert not torch.equal(together[0], written(trained, none[None], seed=1)[0])


def test_greedy_text_without_a_change_is_the_model_s_own(trained: Any) -> None:
    """Past the end of the context (16 positions) as well."""
    prompt = torch.tensor([3, 1, 4, 1, 5])
    generator = torch.Generator().manual_seed(0)
    given = {"temperature": 1.0, "top_k": 1}
    decoder = StaticDecoder(trained.model, 1)
    theirs = generate(decoder, prompt[None], 40, **given, generator=generator)[0, 5:]
    ours = continued(trained.model, prompt, {SITE: torch.zeros(2, 16)}, 40, **given, seed=3)
    assert torch.equal(ours[0], theirs) and torch.equal(ours[1], theirs)


def test_every_position_is_changed_in_every_step(trained: Any) -> None:
    """The stream that later blocks read, with the change taken away, is the one of plain text."""
    change = torch.full((1, 16), 0.7)
    seen: list[torch.Tensor] = []
    model = trained.model
    with capture(model, [SITE]) as plain:
        model(input_ids=torch.tensor([[3, 1, 4, 1, 5]]), use_cache=False)
    handle = model.transformer.h[2].register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    written(trained, change, n=3)
    handle.remove()
    assert [x.shape[1] for x in seen] == [5, 1, 1]
    torch.testing.assert_close(seen[0] - 0.7, plain[SITE], rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def run(make_experiment: Any) -> Experiment:
    made = make_experiment("steering")
    more = ["metric=[downstream,features,rules]", "fit.train.steps=60", "metric.rules.min_fires=5"]
    done = made("out_dir=run", "sae=batch_topk", "site=resid.1", *more)
    assert done.returncode == 0, done.stderr
    return made


def test_a_run_shows_continuations_of_its_most_rule_like_latents(run: Experiment) -> None:
    features = run.json("run", "features", "text8_0.json")
    steered = [f for f in features if "steering" in f]
    best = sorted((f for f in features if f.get("f1")), key=lambda f: (-f["f1"], f["latent"]))
    assert {f["latent"] for f in steered} == {f["latent"] for f in best[:10]} and steered
    for feature in steered:
        shown = feature["steering"]
        assert [strength for strength, _ in shown["texts"]] == [-4.0, 0.0, 4.0]
        assert shown["prompt"] and all(len(text) == 60 for _, text in shown["texts"])
    assert len({f["steering"]["texts"][1][1] for f in steered}) == 1, "the unchanged text is one"
    assert run.json("run", "cells", "text8_0.json")["seconds"]["steering"] < 2


def test_a_finished_run_can_be_steered(run: Experiment) -> None:
    folder = run.runs / "run"
    one, *_ = [f for f in run.json("run", "features", "text8_0.json") if "steering" in f]
    given = {"latent": one["latent"], "prompt": one["steering"]["prompt"], "length": 60}
    texts = steer(folder, **given)
    assert list(texts) == [0.0, 4.0, -4.0] and texts == steer(folder, **given)
    shown = dict(one["steering"]["texts"])
    assert texts == {0.0: shown[0.0], 4.0: shown[4.0], -4.0: shown[-4.0]}, "as the run itself does"
    assert steer(folder, **given, strength=0)[0.0] == texts[0.0]
    latent = next(f["latent"] for f in run.json("run", "features", "text8_0.json") if f["density"])
    assert load_sae(folder / "saes" / "text8_0").d_sae > latent
    command = [sys.executable, "-m", "sae_experiments.steer", str(folder), "--prompt", "the "]
    done = subprocess.run(
        [*command, "--latent", str(one["latent"]), "--length", "12"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert [line[:5] for line in done.stdout.splitlines()] == ["  +0:", "  +4:", "  -4:"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"run": "nowhere"}, "is not the folder of a run"),
        ({"latent": 10**6}, "latent=1000000: text8_0 has latents 0 to"),
        ({"latent": -1}, "latent=-1: text8_0 has latents 0 to"),
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": "\u00e9"}, "characters that the model does not know"),
        ({"sae": "text9_0"}, "has no SAE text9_0: choose from text8_0"),
        ({"length": 0}, "length=0 must be at least 1"),
        ({"strength": float("nan")}, "strength=nan"),
        ({"maximum": float("nan")}, "maximum=nan must be a number above 0"),
        ({"maximum": -2.0}, "maximum=-2.0 must be a number above 0"),
        ({"latent": 1.5}, "latent=1.5 must be a whole number"),
        ({"latent": True}, "latent=True must be a whole number"),
        ({"length": 2.5}, "length=2.5 must be a whole number"),
        ({"seed": None}, "seed=None must be a whole number"),
        ({"prompt": 3}, "prompt=3 must be a text"),
    ],
)
def test_what_cannot_be_steered_is_one_line(
    change: dict[str, Any], said: str, run: Experiment
) -> None:
    given = {"run": run.runs / "run", "latent": 0, "prompt": "the"} | change
    with pytest.raises(UserError, match=said) as told:
        steer(**given)
    assert "\n" not in str(told.value)


def test_a_run_without_saes_or_whose_model_is_gone_is_one_line(
    run: Experiment, tmp_path: Any
) -> None:
    shutil.copytree(run.runs / "run", tmp_path / "bare", ignore=shutil.ignore_patterns("saes"))
    with pytest.raises(UserError, match="no saved SAE"):
        steer(tmp_path / "bare", latent=0, prompt="the")
    shutil.copytree(run.runs / "run", tmp_path / "kept")
    manifest = tmp_path / "kept" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(str(run.cache), str(tmp_path)))
    with pytest.raises(UserError, match="is not in cache"):
        steer(tmp_path / "kept", latent=0, prompt="the")

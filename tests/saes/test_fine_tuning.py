"""A loaded SAE trains on from where it is: laws over all SAEs that can be written."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sae_experiments import load_sae, save_sae
from sae_experiments.errors import UserError
from sae_experiments.fitting.fit import Sample, fit_saes
from sae_experiments.saes.base import SAE, Batch, Inference
from sae_experiments.saes.loaded import Loaded
from support.interchange import EXPORTABLE
from support.saes import D, M, batch, config, rows, trained
from support.scaled import OFFSET, numbers


def train_on(
    sae: SAE, *, steps: int = 150, offset: Any = 0.0, factor: float = 1.0
) -> list[tuple[int, str, float]]:
    start, held = (
        (rows(n, seed) + offset) * factor for n, seed in ((4096, 10**6), (16384, 10**6 + 1))
    )

    def batch_at(step: int) -> Batch:
        x = (batch(256, step).x + offset) * factor
        return Batch(x, x)

    cfg = config(steps=steps, lr=1e-3, log_every=1)
    return fit_saes(
        {"sae": sae}, batch_at, cfg, Sample(start, start, held), seed=0, dead_after=4000
    )["sae"].history


@pytest.fixture(params=EXPORTABLE)
def loaded(request, tmp_path):
    save_sae(
        trained(request.param, n_train=60), tmp_path / "sae", reference=rows(64, 3), metadata={}
    )
    return load_sae(tmp_path / "sae")


def test_it_starts_from_its_weights_keeps_its_l0_and_loses_nothing(loaded, tmp_path):
    x = rows(16384, 77)
    fvu, l0, _ = numbers(loaded, x)
    history = train_on(loaded)
    first = next(value for _, name, value in history if name == "fvu")
    assert first == pytest.approx(fvu, rel=0.1), "the first step sees the loaded SAE"
    found = numbers(loaded, x)
    assert found[0] <= fvu
    assert found[1] == pytest.approx(l0, rel=0.03)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    save_sae(loaded, tmp_path / "again", reference=x[:64], metadata={})
    torch.testing.assert_close(load_sae(tmp_path / "again")(x), loaded(x), rtol=1e-4, atol=1e-4)
    train_on(loaded, steps=1)  # and once more


def foreign(architecture: str, **config: Any) -> SAE:
    """Weights nobody trained here: decoder rows of any length, thresholds of any size."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    decoder = draw(M, D)
    tensors = {
        "W_enc": (decoder / decoder.norm(dim=1, keepdim=True)).t() * 0.7,
        "W_dec": 0.2 * decoder,
        "b_dec": 0.3 + 0.1 * draw(D),
    }
    own = {
        "standard": ["b_enc"],
        "topk": ["b_enc"],
        "jumprelu": ["b_enc", "threshold"],
        "gated": ["b_gate", "r_mag", "b_mag"],
    }
    tensors |= {name: 0.1 * draw(M) for name in own[architecture]}
    if architecture == "jumprelu":
        tensors["threshold"] = tensors["threshold"] + 0.5
    return Loaded(Inference(architecture, tensors, config))


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("standard", {}),
        ("topk", {"k": 5}),
        ("topk", {"k": 5, "rescale_acts_by_decoder_norm": True}),
        ("jumprelu", {}),
        ("gated", {}),
        *(
            (a, {"apply_b_dec_to_input": False, "k": 5})
            for a in ("standard", "topk", "jumprelu", "gated")
        ),
    ],
)
def test_those_of_others_train_on_and_can_be_written_again(architecture, config, tmp_path):
    sae = foreign(architecture, **config)
    x = rows(16384, 77)
    fvu, l0, _ = numbers(sae, x)
    train_on(sae)
    found = numbers(sae, x)
    assert found[0] < 0.7 * fvu
    # Half of these random latents are active. Without a threshold that could fall, L0 may fall.
    assert (0.8 if architecture in ("standard", "gated") else 0.95) * l0 < found[1] < 1.05 * l0
    save_sae(sae, tmp_path / "sae", reference=x[:64], metadata={})
    torch.testing.assert_close(load_sae(tmp_path / "sae")(x), sae(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["topk", "batch_topk", "gated"])
def test_neither_mean_nor_unit_matters(name, tmp_path):
    found = []
    for i, (offset, factor) in enumerate(((0.0, 1.0), (OFFSET, 2.0**10))):
        save_sae(trained(name, n_train=60), tmp_path / str(i), reference=rows(64, 3), metadata={})
        sae = load_sae(tmp_path / str(i))
        with torch.no_grad():  # as if it had been fitted to rows of that mean and unit
            sae.b_dec.copy_((sae.b_dec + offset) * factor)
            sae.W_enc.div_(factor)
            sae.W_dec.mul_(factor)
        train_on(sae, steps=60, offset=offset, factor=factor)
        found.append(numbers(sae, (rows(4096, 77) + offset) * factor)[:2])
    assert found[1] == pytest.approx(found[0], rel=0.05)


def test_one_that_was_fitted_here_says_how_to_go_on():
    sae = trained("topk", n_train=5)
    with pytest.raises(UserError, match="fitted already.*load_sae"):
        train_on(sae, steps=5)

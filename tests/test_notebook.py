"""The package on a plain tensor of activations."""

from __future__ import annotations

import pytest
import torch
from saes import L0, D, rows

from sae_experiments import build_sae, evaluate, fit_saes
from sae_experiments.io import UserError


def test_ten_lines_fit_and_evaluate_an_sae():
    sae = build_sae("batch_topk", D, target_l0=L0, d_sae=48)
    report = fit_saes(sae, rows(8192, 0), steps=300, batch_size=256, lr=3e-3, warmup_steps=20)["sae"]
    found = evaluate(sae, rows(4096, 1))
    assert report.steps == 300 and not sae.training
    assert found["sae_fvu"] < 0.3
    assert abs(found["sae_l0"] - L0) < 0.2


def test_several_are_fitted_in_one_pass_and_each_as_if_alone():
    def make():
        return {"topk": build_sae("topk", D, target_l0=L0, d_sae=48), "standard": build_sae("standard", D, target_l0=L0, d_sae=48)}

    together, alone = make(), make()["topk"]
    settings = {"steps": 30, "batch_size": 128, "warmup_steps": 5}
    fit_saes(together, rows(4096, 0), **settings)
    fit_saes(alone, rows(4096, 0), **settings)
    assert torch.equal(together["topk"].W_dec, alone.W_dec)


def test_other_dtypes_are_accepted_and_wrong_widths_named():
    sae = build_sae("topk", D, target_l0=L0, d_sae=48)
    fit_saes(sae, rows(2048, 0).half(), steps=5, batch_size=64, warmup_steps=1)
    with pytest.raises(UserError, match="d_in"):
        fit_saes(sae, torch.zeros(10, D + 1), steps=5)


def test_an_unknown_sae_or_setting_is_one_line():
    with pytest.raises(UserError, match="did you mean topk"):
        build_sae("topkk", D)
    with pytest.raises(UserError, match="did you mean"):
        build_sae("topk", D, targetl0=3)

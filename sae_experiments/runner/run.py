"""Run a study into a run folder: manifest, cells (finished ones are skipped), aggregation, status.

One process owns the folder's manifest, final_info.json and report. Cells run in it one after the
other, or side by side in workers, which write the files of their own cells.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from sae_experiments import memory
from sae_experiments.cache import locked
from sae_experiments.console import Console
from sae_experiments.errors import NonFinite, UserError, with_kind
from sae_experiments.files import (
    PACKAGE,
    NewFolder,
    digest,
    read_json,
    remove_stale,
    write_bytes,
    write_json,
)
from sae_experiments.flatten import flatten
from sae_experiments.metric_info import describe
from sae_experiments.quality_warnings import Warned
from sae_experiments.results.leading import leading
from sae_experiments.results.records import (
    RESULT_NEUTRAL_KEYS,
    damaged_files,
    read_records,
    write_final_info,
)
from sae_experiments.runner.board import Board
from sae_experiments.runner.cell import CellResult, CellRunner, TimeLeft
from sae_experiments.runner.messages import packed, unpacked
from sae_experiments.runner.pace import Pace
from sae_experiments.runner.pool import Pool, Shares, check_workers, how_it_died, shares
from sae_experiments.runner.time_limit import TimeLimit
from sae_experiments.runner.track import Tracker
from sae_experiments.runner.worker import Event, Setup
from sae_experiments.source import outside_digest, outside_texts, package_digest
from sae_experiments.stopping import OutOfTime, Stopped, last_words, limited, wait_for_children
from sae_experiments.studies.base import Cell, Context, Study

REMEDY = "choose another out_dir, or add overwrite=true to replace them"
#: While cells are at work, drawing the report takes at most this share of the time.
REPORT_SHARE = 0.05


class RunFailed(UserError):
    """Some cells failed; the others are finished and on disk."""

    exit_status = 1


class WorkerError(RuntimeError):
    """An error in a worker that ends the run."""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Everything about a run that is not the study."""

    folder: Path
    """The run folder."""
    cache: Path
    """The cache folder."""
    config: Mapping[str, Any]
    """The resolved configuration, for the manifest."""
    label: str
    """Name of the run in tables and figures."""
    device: str
    """cpu, cuda or cuda:<n>."""
    verbosity: str
    """quiet, normal or verbose."""
    time_limit_s: float | None
    """Seconds that the run may take; None: no limit."""
    overwrite: bool
    """Replace the results of another configuration."""
    workers: int | str = 1
    """Processes that run cells side by side, or "auto"."""
    threads: int | None = None
    """CPU threads per cell; None: the cores divided by the workers."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """argv, overrides, preset and the reason for it."""
    began: float | None = None
    """Time (`time.monotonic`) from which `time_limit_s` counts; None: the start of `run`."""
    leading: Sequence[str] = ()
    """Metrics that lead all others in `final_info.json`."""


def run(
    study: Study,
    settings: RunSettings,
    tracker: Tracker,
    closing: Callable[[Path], None] | None = None,
) -> str:
    """Run every cell of a study that has no finished result in the folder.

    A cell's results are on disk, and in `final_info.json`, as soon as it ends. A loss that is not
    finite, and a worker that is killed, end their cell and let the others go on; every other error
    ends the run. The manifest records what happened, and the error is raised at the end.

    Args:
        study: The study.
        settings: Folders, configuration, device and limits.
        tracker: Gets live numbers.
        closing: Called with the folder when there are results: after the first cell, now and then
            while others are at work, and at the end. None: a run without a report.

    Returns:
        done, failed or cut.

    Raises:
        UserError: The folder belongs to another configuration, cannot be written, or is in use by
            another process.
    """
    study.check()
    folder = settings.folder
    config = {k: v for k, v in settings.config.items() if k not in RESULT_NEUTRAL_KEYS}
    try:
        new = NewFolder(folder)
        probe = folder / f".writable.{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"out_dir={folder} cannot be written ({error.strerror}): "
            "choose another out_dir or runs_root"
        ) from error
    console = Console(verbosity=settings.verbosity)
    with locked(
        folder / ".lock",
        wait_s=0,
        held=f"{folder} is in use by another process: wait for it or choose another out_dir",
    ):
        active = None
        try:
            remove_stale(folder)
            _refuse_other_configuration(folder, config, settings.overwrite)
            active = _Run(study, settings, tracker, console, config, closing)
            return active.go()
        except UserError as error:
            if error.exit_status != UserError.exit_status:
                raise
            if active is not None and active.manifest and read_records(folder):
                # A mistake, but there are results: the run has failed.
                raise RunFailed(str(error)) from error
            new.take_back()
            raise
        except BaseException:
            if new.missing and not (folder / "manifest.json").exists():
                _remove_if_empty(folder)
            raise


class _Run:
    """The owner of a run folder while its cells run."""

    def __init__(
        self,
        study: Study,
        settings: RunSettings,
        tracker: Tracker,
        console: Console,
        config: Mapping[str, Any],
        closing: Callable[[Path], None] | None,
    ) -> None:
        self.study = study
        self.settings = settings
        self.tracker = tracker
        self.console = console
        self.closing = closing
        self.device = torch.device(settings.device)
        self.hashes = {"config_hash": digest(config), "source_hash": _source(study)}
        began = time.monotonic() if settings.began is None else settings.began
        self.limit = TimeLimit.of(began, settings.time_limit_s, report=closing is not None)
        self.deadline = None if self.limit is None else self.limit.cells
        self.manifest: dict[str, Any] = {}
        self.cut = False
        self.said: set[Warned] = set()
        self.failures: list[str] = []
        self.pace = Pace(0, 1)
        self.reported = Reported()

    def go(self) -> str:
        """Run the cells; returns the status."""
        s = self.settings
        memory.keep()
        check_workers(s.workers)
        # Before it is prepared: what it then holds (texts on disk) is opened again by each worker.
        content = packed(self.study) if s.workers != 1 else b""
        ctx = Context(folder=s.folder, cache=s.cache, device=self.device, console=self.console)
        corpora = self.study.prepare(ctx)
        need = max(ctx.needs, default=0.0)
        share = shares(s.workers, s.threads, len(self.study.cells()), self.device, need)
        if share.workers > 1 and not content:
            self.console.say("workers=1: this study is defined where no other process finds it")
            share = Shares(1, s.threads)
        self._refuse_other_text(corpora)
        # The same configuration over another text (a stand-in, a changed file) is another result.
        texts = {name: _text(provenance) for name, provenance in corpora.items()}
        self.hashes["config_hash"] = digest([self.hashes["config_hash"], texts])
        self.manifest = self._first_manifest(share, corpora)
        self.runner = CellRunner(
            study=self.study, folder=s.folder, hashes=self.hashes, corpora=corpora
        )
        self._clear_other_results()
        self._write_manifest()
        self._keep_source()
        self.tracker.start(s.folder, s.config, s.label, s.about.get("plan"))
        status = "failed"
        try:
            with last_words(self._last_words):
                self._cells(ctx, share, content)
            if self.failures:
                status = "failed"
            else:
                status = "cut" if self.cut else "done"
        except BaseException as error:
            stopped = isinstance(error, (Stopped, KeyboardInterrupt))
            status = "stopped" if stopped else "failed"
            named = str(error) if isinstance(error, WorkerError) else with_kind(error)
            self.manifest["cause"] = named
            raise
        finally:
            self._finish(status)
        if self.failures:
            raise RunFailed(
                f"{len(self.failures)} of {len(self.study.cells())} cells failed: "
                f"{'; '.join(self.failures)}"
            )
        return status

    def _first_manifest(self, share: Shares, corpora: Mapping[str, Any]) -> dict[str, Any]:
        """The manifest at the start of the run."""
        s = self.settings
        return {
            **s.about,
            "label": s.label,
            "config": s.config,
            "git": _git(),
            "versions": _versions(),
            "device": _device_name(self.device, share),
            "workers": share.workers,
            "threads": share.threads or torch.get_num_threads(),
            "threads_of_first_cell": share.threads_of(0) or torch.get_num_threads(),
            "corpora": corpora,
            "metrics": describe(self.study.infos()),
            **self.hashes,
            "status": "running",
            "started": _now(),
            "pid": os.getpid(),
        }

    def _keep_source(self) -> None:
        """Keep the user's own modules (an SAE in experiment.py) as they ran, in `source/`."""
        shutil.rmtree(self.settings.folder / "source", ignore_errors=True)
        for name, text in outside_texts(self.study).items():
            write_bytes(self.settings.folder / "source" / f"{name}.py", text.encode())

    def _finish(self, status: str) -> None:
        self.manifest.pop("progress", None)
        self.manifest |= {"status": status, "ended": _now()}
        facts = [record.facts for record in self.runner.records()]
        kept_in = {str(each["rows"]) for each in facts if each.get("rows") is not None}
        if kept_in:  # what fit.store=auto came to
            self.manifest["rows"] = ", ".join(sorted(kept_in))
        if self.failures:
            self.manifest["cause"] = "; ".join(self.failures)
        self._write_manifest()
        if status != "stopped" and self.runner.records():
            self._close()
            self.tracker.publish(self.settings.folder)
        self.tracker.finish(status)

    def _last_words(self) -> None:
        end = {"status": "stopped", "ended": _now(), "cause": "Stopped: in haste"}
        self._write_manifest(self.manifest | end)

    def _refuse_other_text(self, corpora: Mapping[str, Any]) -> None:
        folder = self.settings.folder
        path = folder / "manifest.json"
        if self.settings.overwrite or not path.exists() or not any(folder.glob("cells/*.json")):
            return
        before = read_json(path).get("corpora", {})
        for name in sorted(before.keys() & corpora.keys()):
            if _text(before[name]) != _text(corpora[name]):
                raise UserError(
                    f"{folder} holds results on another "
                    f"{_other(before[name], corpora[name], name)}: {REMEDY}"
                )

    # ---------------------------------------------------------------------------- the cells

    def _cells(self, ctx: Context, share: Shares, content: bytes) -> None:
        """Run the cells that are not finished, the first seed of every dataset first."""
        cells = breadth_first(self.study.cells())
        pending: deque[Cell] = deque()
        for cell in cells:
            if self._finished(cell):
                self._say_of(cell, cells, "already done")
            else:
                pending.append(cell)
        self.manifest["progress"] = {"cells": len(cells), "finished": len(cells) - len(pending)}
        side_by_side = share.workers > 1 and len(pending) > 1
        self.pace = Pace(len(pending), share.workers if side_by_side else 1)
        if side_by_side:
            self._side_by_side(pending, cells, share, content)
        else:
            self._one_by_one(pending, cells, ctx, share)
        self._write_final_info()

    def _one_by_one(
        self, pending: deque[Cell], cells: Sequence[Cell], ctx: Context, share: Shares
    ) -> None:
        while pending:
            cell = pending.popleft()
            threads = share.threads_of(cells.index(cell))
            if threads is not None:
                torch.set_num_threads(threads)
            if self._no_time_for(cell, cells):
                continue
            self._say_of(cell, cells)
            self.pace.start(cell)
            self._progress([cell])

            def log(step: int, values: Mapping[str, float], cell: Cell = cell) -> None:
                self.tracker.log(cell.dataset, cell.seed, step, values)

            try:
                left = self._time_left(1 + len(pending))
                self._ended(cell, self.runner.run(cell, replace(ctx, log=log), left))
            except OutOfTime:
                self._late(cell)
            except NonFinite as error:
                self._failed(cell, str(error))
            if pending:
                self._draw_report()

    def _side_by_side(
        self, pending: deque[Cell], cells: Sequence[Cell], share: Shares, content: bytes
    ) -> None:
        setup = Setup(
            study=unpacked(content),
            folder=self.settings.folder,
            cache=self.settings.cache,
            hashes=self.hashes,
            corpora=self.manifest["corpora"],
            device=self.settings.device,
            threads=share.threads,
            verbosity=self.settings.verbosity,
        )
        if share.first is not None and pending[0] == cells[0]:
            first = deque([pending.popleft()])
            alone = replace(setup, threads=share.first)
            rounds = 1 + -(-len(pending) // share.workers)
            self._in_pool(Pool(alone, 1), first, cells, rounds)
        n = min(share.workers, len(pending))
        threads = f"{share.threads} thread{'s' if share.threads != 1 else ''}"
        self.console.say(f"{n} workers of {threads} each (workers=1: one cell after the other)")
        self._in_pool(Pool(setup, n), pending, cells)

    def _in_pool(
        self, pool: Pool, pending: deque[Cell], cells: Sequence[Cell], rounds: int = 1
    ) -> None:
        """Run cells in the workers of a pool.

        Args:
            pool: The workers.
            pending: The cells, which are taken from it.
            cells: All cells of the run.
            rounds: Cells that a worker has time for, at least: others may come after these.
        """
        board = Board(self.console, len(pending), pool.size)
        with wait_for_children():
            try:
                self._feed(pool, board, pending, cells, rounds)
                self._draw_report()  # of cells that ended before, while these are at work
                for worker, cell, event in pool.events():
                    if event.kind == "idle":
                        board.tell()
                        continue
                    self._event(worker, cell, event, board)
                    if cell not in pool.running:
                        board.end(worker)
                        self._feed(pool, board, pending, cells, rounds)
                        self._progress(pool.running)
                        if pool.running:
                            self._draw_report()
            finally:
                board.close()
                pool.close()

    def _feed(
        self,
        pool: Pool,
        board: Board,
        pending: deque[Cell],
        cells: Sequence[Cell],
        rounds: int,
    ) -> None:
        """Give every free worker a cell."""
        while pending and pool.free:
            cell = pending.popleft()
            if self._no_time_for(cell, cells):
                continue
            self._say_of(cell, cells)
            left = self._time_left(max(rounds, -(-(1 + len(pending)) // pool.size)))
            board.start(pool.give(cell, left), named(cell))
            self.pace.start(cell)
        self._progress(pool.running)

    def _event(self, worker: int, cell: Cell, event: Event, board: Board) -> None:
        """Act on what a worker says.

        Raises:
            UserError: A mistake of the user that the cell has found.
            WorkerError: Any other error of the cell.
        """
        if event.kind == "say":
            line, always = event.data
            self.console.say(f"  {named(cell)}: {line.strip()}", always=always)
        elif event.kind == "stage":
            board.stage(worker, *event.data)
        elif event.kind == "log":
            self.tracker.log(cell.dataset, cell.seed, *event.data)
        elif event.kind == "result":
            self._ended(cell, event.data)
        elif event.kind == "late":
            self._late(cell)
        elif event.kind == "failed":
            self._failed(cell, event.data)
        elif event.kind == "gone":
            self._failed(cell, how_it_died(event.data))
        elif event.kind == "user_error":
            message, status = event.data
            error = UserError(message)
            error.exit_status = status
            raise error
        else:
            message, trace = event.data
            self.console.detail(trace)
            raise WorkerError(message)

    def _ended(self, cell: Cell, result: CellResult) -> None:
        self.cut = self.cut or result.cut
        for name, warning in result.warnings:
            if warning not in self.said:
                self.said.add(warning)
                self.console.say(f"  warning: {name} seed {cell.seed}: {warning.says}")
        for name, metrics in result.metrics.items():
            self.tracker.summary(name, cell.seed, metrics)
        self.manifest["progress"]["finished"] += 1
        self.pace.end(cell)
        if pace := str(self.pace):
            self.console.say(f"  {pace}")
        self._write_final_info()

    def _late(self, cell: Cell) -> None:
        self.cut = True
        self.pace.end(cell)
        self.console.say(
            f"  time_limit_s={self.settings.time_limit_s:g} is over: "
            f"{named(cell)} goes on another time"
        )

    def _failed(self, cell: Cell, cause: str) -> None:
        self.failures.append(f"{named(cell)}: {cause}")
        self.pace.end(cell)
        self.console.say(f"  failed: {named(cell)}: {cause}", always=True)

    def _no_time_for(self, cell: Cell, cells: Sequence[Cell]) -> bool:
        late = self.deadline is not None and time.monotonic() > self.deadline
        if not late or not self.runner.records():
            return False
        self.cut = True
        self._say_of(cell, cells, "no time left")
        return True

    def _time_left(self, rounds: int) -> TimeLeft:
        """An equal share of the time for every cell that a worker has still to run.

        A limit cuts training short everywhere instead of dropping the last cells.
        """
        if self.deadline is None:
            return TimeLeft()
        left = max(self.deadline - time.monotonic(), 0.0)
        return TimeLeft(training=left / rounds, whole=self.deadline - time.monotonic())

    def _say_of(self, cell: Cell, cells: Sequence[Cell], what: str = "") -> None:
        place = f"[{cells.index(cell) + 1}/{len(cells)}] {named(cell)}"
        self.console.say(f"{place}: {what}" if what else place)

    def _progress(self, running: Sequence[Cell]) -> None:
        """Say in the manifest which cells are at work, for the report."""
        self.manifest["progress"]["running"] = [named(cell) for cell in running]
        self._write_manifest()

    def _draw_report(self) -> None:
        if not self.reported.is_due() or not self.runner.records():
            return
        with self.reported.timed():
            self._close()

    def _close(self) -> None:
        """Draw the report, in the time that is kept for it."""
        if self.closing is None:
            return
        try:
            with limited(None if self.limit is None else self.limit.report, lambda: True):
                self.closing(self.settings.folder)
        except OutOfTime:
            self.console.say("no time left for report.html: python plot.py makes one")

    def _finished(self, cell: Cell) -> bool:
        """True if every result of the cell is there, by this code, with undamaged files."""
        folder = self.settings.folder
        hashes = tuple(self.hashes.values())
        records = [
            record
            for record in self.runner.records()
            if record.seed == cell.seed and (record.config_hash, record.source_hash) == hashes
        ]
        for record in records:
            for name in damaged_files(folder, record):
                self.console.say(
                    f"  {folder / name} is missing or damaged: {named(cell)} is evaluated again"
                )
                return False
        return {record.dataset for record in records} >= set(cell.reports)

    def _clear_other_results(self) -> None:
        """With overwrite=true, remove what another configuration left beside the new results."""
        folder = self.settings.folder
        mine = self.hashes["config_hash"]
        if all(r.config_hash.removesuffix("-cut") == mine for r in read_records(folder)):
            return
        for name in ("cells", "curves", "arrays", "features", "graphs", "circuit_tracer", "saes"):
            shutil.rmtree(folder / name, ignore_errors=True)
        for path in folder.glob("final_info*.json"):
            path.unlink()

    def _write_final_info(self) -> None:
        order = leading(self.study.infos(), self.settings.leading)
        write_final_info(self.settings.folder, self.runner.records(), order)

    def _write_manifest(self, manifest: Mapping[str, Any] | None = None) -> None:
        path = self.settings.folder / "manifest.json"
        write_json(path, self.manifest if manifest is None else manifest)


class Reported:
    """Decides when the report of a run that goes on is drawn again."""

    def __init__(self) -> None:
        self._next = 0.0

    def is_due(self) -> bool:
        """True if drawing keeps to `REPORT_SHARE` of the time; always before the first time."""
        return time.monotonic() >= self._next

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Time a drawing, which decides when the next is due."""
        began = time.monotonic()
        yield
        now = time.monotonic()
        self._next = now + (now - began) / REPORT_SHARE


def breadth_first(cells: Sequence[Cell]) -> list[Cell]:
    """The first seed of every dataset, then the second of each, and so on."""
    count: dict[str, int] = {}
    ranks = []
    for cell in cells:
        ranks.append(count.get(cell.dataset, 0))
        count[cell.dataset] = ranks[-1] + 1
    return [cells[i] for i in sorted(range(len(cells)), key=ranks.__getitem__)]


def named(cell: Cell) -> str:
    """Name of a cell in the log."""
    return f"{cell.dataset} seed {cell.seed}"


def _refuse_other_configuration(folder: Path, config: Mapping[str, Any], overwrite: bool) -> None:
    path = folder / "manifest.json"
    if overwrite or not path.exists() or not any(folder.glob("cells/*.json")):
        return
    before = flatten(
        {k: v for k, v in read_json(path)["config"].items() if k not in RESULT_NEUTRAL_KEYS}
    )
    now = flatten(config)
    keys = sorted(
        before.keys() | now.keys(), key=lambda k: (k.count("."), k)
    )  # what was typed stands higher up than what follows from it
    changed = [f"{k}: {before.get(k)} -> {now.get(k)}" for k in keys if before.get(k) != now.get(k)]
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UserError(
            f"{folder} holds results of another configuration "
            f"({'; '.join(changed[:3])}{more}): {REMEDY}"
        )


def _source(study: Study) -> str:
    """Digest of the code that results come from: the package, and the user's own code."""
    package, outside = package_digest(PACKAGE), outside_digest(study)
    return digest([package, outside]) if outside else package


def _other(before: Mapping[str, Any], now: Mapping[str, Any], name: str) -> str:
    """The difference between two provenances of one result, in words."""
    was, is_now = (f"{c.get('corpus')} from {c.get('source')}" for c in (before, now))
    if before.get("sae") == now.get("sae"):
        return f"text ({name}: {was} -> {is_now})"
    return f"SAE ({name}: {before.get('sae')} -> {now.get('sae')})"


def _text(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Identity of a text, without the place it came from."""
    return {k: v for k, v in provenance.items() if k not in ("source", "verified")}


def _remove_if_empty(folder: Path) -> None:
    (folder / ".lock").unlink(missing_ok=True)
    try:
        folder.rmdir()
    except OSError:
        return  # something is in it: it stays


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _git() -> dict[str, Any]:
    """Commit and whether the tree differs from it; empty outside a checkout."""
    root = PACKAGE.parent
    try:
        commit = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()
        dirty = subprocess.run(
            ["git", "-C", str(root), "status", "--porcelain"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"commit": commit, "dirty": bool(dirty)}


def _versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide about numbers."""
    versions = {"python": platform.python_version()}
    for name in ("sae-experiments", "torch", "transformers", "hydra-core", "omegaconf", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def _device_name(device: torch.device, share: Shares) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = share.threads or torch.get_num_threads()
    return f"{platform.machine()} CPU, {threads} thread{'' if threads == 1 else 's'}"

"""Run a study into a run folder: manifest, cells (finished ones are skipped), aggregation, status."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from sae_experiments import memory
from sae_experiments import quality_warnings as warned
from sae_experiments.cache import locked
from sae_experiments.console import Console
from sae_experiments.errors import NonFinite, UserError
from sae_experiments.files import PACKAGE, NewFolder, digest, read_json, remove_stale, write_json
from sae_experiments.metric_info import describe
from sae_experiments.results.records import (
    RESULT_NEUTRAL_KEYS,
    CurveWriter,
    Record,
    checksums,
    damaged_files,
    read_records,
    save_arrays,
    save_features,
    save_graphs,
    write_final_info,
    write_record,
)
from sae_experiments.runner.track import Tracker
from sae_experiments.source import outside_digest, package_digest
from sae_experiments.stopping import OutOfTime, Stopped, last_words, limited
from sae_experiments.studies.base import Cell, Context, Outcome, Study

REMEDY = "choose another out_dir, or add overwrite=true to replace them"


class RunFailed(UserError):
    """Some cells failed; the others are finished and on disk."""

    exit_status = 1


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Everything about a run that is not the study: where it lies, what was asked for, who is told."""

    folder: Path
    cache: Path
    config: Mapping[str, Any]
    label: str
    device: str
    verbosity: str
    time_limit_s: float | None
    overwrite: bool
    about: Mapping[str, Any] = field(
        default_factory=dict
    )  # argv, overrides, preset and the reason for it


def run(
    study: Study,
    settings: RunSettings,
    tracker: Tracker,
    closing: Callable[[Path], None] = lambda folder: None,
) -> str:
    """Run every cell of ``study`` that has no finished result in the folder; returns done, failed or cut.

    A cell's results are on disk, and in ``final_info.json``, as soon as it ends. A loss that is not finite ends its cell and lets the others
    go on; every other error ends the run. Either way the manifest says what happened and the error is raised at the end. ``closing`` gets the
    folder when there are results, before the tracker gets what lies in it.

    Raises:
        UserError: the folder belongs to another configuration, cannot be written, or is in use by another process.
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
            f"out_dir={folder} cannot be written ({error.strerror}): choose another out_dir or runs_root"
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
                raise RunFailed(
                    str(error)
                ) from error  # a mistake, but there are results: the run has failed
            new.take_back()
            raise
        except BaseException:
            if new.missing and not (folder / "manifest.json").exists():
                _remove_if_empty(folder)
            raise


class _Run:
    def __init__(
        self,
        study: Study,
        settings: RunSettings,
        tracker: Tracker,
        console: Console,
        config: Mapping[str, Any],
        closing: Callable[[Path], None],
    ) -> None:
        self.study, self.settings, self.tracker, self.console, self.closing = (
            study,
            settings,
            tracker,
            console,
            closing,
        )
        self.device = torch.device(settings.device)
        self.hashes = {"config_hash": digest(config), "source_hash": _source(study)}
        self.deadline = (
            None if settings.time_limit_s is None else time.monotonic() + settings.time_limit_s
        )
        self.manifest: dict[str, Any] = {}
        self.cut = False
        self.said: set[warned.Warned] = set()

    def go(self) -> str:
        s = self.settings
        memory.keep()
        ctx = Context(folder=s.folder, cache=s.cache, device=self.device, console=self.console)
        corpora = self.study.prepare(ctx)
        self._refuse_other_text(corpora)
        # The same configuration over another text (a stand-in, a changed file) is another result.
        self.hashes["config_hash"] = digest(
            [self.hashes["config_hash"], {name: _text(c) for name, c in corpora.items()}]
        )
        self.manifest = {
            **s.about,
            "label": s.label,
            "config": s.config,
            "git": _git(),
            "versions": _versions(),
            "device": _device_name(self.device),
            "corpora": corpora,
            "metrics": describe(self.study.infos()),
            **self.hashes,
            "status": "running",
            "started": _now(),
            "pid": os.getpid(),
        }
        self._clear_other_results()
        self._write_manifest()
        self.tracker.start(s.folder, s.config, s.label, s.about.get("plan"))
        status, failures = "failed", []
        try:
            with last_words(
                lambda: self._write_manifest(
                    self.manifest
                    | {"status": "stopped", "ended": _now(), "cause": "Stopped: in haste"}
                )
            ):
                failures = self._cells(ctx)
            status = "failed" if failures else "cut" if self.cut else "done"
        except BaseException as error:
            stopped = isinstance(error, (Stopped, KeyboardInterrupt))
            status = "stopped" if stopped else "failed"
            self.manifest["cause"] = f"{type(error).__name__}: {error}"
            raise
        finally:
            self.manifest |= {"status": status, "ended": _now()}
            if failures:
                self.manifest["cause"] = "; ".join(failures)
            self._write_manifest()
            if status != "stopped" and self._records():
                self.closing(s.folder)
                self.tracker.publish(s.folder)
            self.tracker.finish(status)
        if failures:
            raise RunFailed(
                f"{len(failures)} of {len(self.study.cells())} cells failed: {'; '.join(failures)}"
            )
        return status

    def _refuse_other_text(self, corpora: Mapping[str, Any]) -> None:
        path = self.settings.folder / "manifest.json"
        if (
            self.settings.overwrite
            or not path.exists()
            or not any(self.settings.folder.glob("cells/*.json"))
        ):
            return
        before = read_json(path).get("corpora", {})
        for name in sorted(before.keys() & corpora.keys()):
            if _text(before[name]) != _text(corpora[name]):
                was, now = (
                    f"{c.get('corpus')} from {c.get('source')}"
                    for c in (before[name], corpora[name])
                )
                raise UserError(
                    f"{self.settings.folder} holds results on another text ({name}: {was} -> {now}): {REMEDY}"
                )

    def _cells(self, ctx: Context) -> list[str]:
        cells = self.study.cells()
        failures: list[str] = []
        for i, cell in enumerate(cells):
            if self._finished(cell):
                self.console.say(
                    f"[{i + 1}/{len(cells)}] {cell.dataset} seed {cell.seed}: already done"
                )
                continue
            if self._late() and self._records():
                self.cut = True
                self.console.say(
                    f"[{i + 1}/{len(cells)}] {cell.dataset} seed {cell.seed}: no time left"
                )
                continue
            self.console.say(f"[{i + 1}/{len(cells)}] {cell.dataset} seed {cell.seed}")
            try:
                # A limit too short for any result is overrun by the first cell: a run ends with something to show.
                with limited(self.deadline, lambda: bool(self._records())):
                    self._cell(cell, ctx, len(cells) - i)
            except OutOfTime:
                self.cut = True
                self.console.say(
                    f"  time_limit_s={self.settings.time_limit_s:g} is over: {cell.dataset} seed {cell.seed} goes on another time"
                )
            except NonFinite as error:
                failures.append(f"{cell.dataset} seed {cell.seed}: {error}")
                self.console.say(f"  failed: {error}", always=True)
        write_final_info(self.settings.folder, self._records())
        return failures

    def _cell(self, cell: Cell, ctx: Context, left: int) -> None:
        folder, began = self.settings.folder, time.monotonic()
        # An equal share of what is left for every cell, so that a limit cuts training short everywhere instead of dropping the last cells.
        deadline = None if self.deadline is None else began + max(self.deadline - began, 0.0) / left
        with CurveWriter(folder, cell.reports[0], cell.seed, resume=False) as curves:

            def log(step: int, values: Mapping[str, float]) -> None:
                for name, value in values.items():
                    curves.write(step, name, value)
                self.tracker.log(cell.dataset, cell.seed, step, values)

            outcomes = self.study.run(
                cell, replace(ctx, log=log, deadline=deadline, ends=self.deadline)
            )
        for report, outcome in outcomes.items():
            self._keep(report, cell, outcome, time.monotonic() - began)
        write_final_info(folder, self._records())

    def _keep(self, report: str, cell: Cell, outcome: Outcome, total: float) -> None:
        folder = self.settings.folder
        self.cut = self.cut or outcome.cut
        # Written whole from the stages' own histories: a resumed stage logs only what it did after the kill.
        with CurveWriter(folder, report, cell.seed, resume=False) as curves:
            for step, name, value in outcome.curves:
                curves.write(step, name, value)
        if outcome.arrays:
            save_arrays(folder, report, cell.seed, outcome.arrays)
        if outcome.features is not None:
            save_features(folder, report, cell.seed, outcome.features)
        if outcome.graphs is not None:
            save_graphs(folder, report, cell.seed, outcome.graphs)
        # A cell that was cut short keeps its numbers but not its hash, so that the same command without the limit makes it whole.
        hashes = {k: f"{v}{'-cut' if outcome.cut else ''}" for k, v in self.hashes.items()}
        seconds = outcome.seconds | {"cell": total}
        warnings = self._warned(report, cell, outcome)
        files = checksums(folder, report, cell.seed)
        write_record(
            folder,
            Record(
                dataset=report,
                seed=cell.seed,
                metrics=outcome.metrics,
                why_null=outcome.why_null,
                noise=outcome.noise,
                seconds=seconds,
                files=files,
                facts=outcome.facts,
                warnings=[one._asdict() for one in warnings],
                **hashes,
            ),
        )
        self.tracker.summary(report, cell.seed, outcome.metrics)

    def _warned(self, report: str, cell: Cell, outcome: Outcome) -> list[warned.Warned]:
        """What is worse than it looks, said once each in the log."""
        found = warned.of_text(self.manifest["corpora"].get(report) or {}) + outcome.warnings
        found += warned.of_metrics(outcome.metrics, outcome.facts.get("asked_l0"))
        for one in found:
            if one not in self.said:
                self.said.add(one)
                self.console.say(f"  warning: {report} seed {cell.seed}: {one.says}")
        return found

    def _late(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline

    def _finished(self, cell: Cell) -> bool:
        """Whether every report of the cell is there, by this code and configuration, with files that are what was written."""
        records = [
            r
            for r in self._records()
            if r.seed == cell.seed and (r.config_hash, r.source_hash) == tuple(self.hashes.values())
        ]
        for name in (name for r in records for name in damaged_files(self.settings.folder, r)):
            self.console.say(
                f"  {self.settings.folder / name} is missing or damaged: {cell.dataset} seed {cell.seed} is evaluated again"
            )
            return False
        return {r.dataset for r in records} >= set(cell.reports)

    def _records(self) -> list[Record]:
        """Results of this configuration and this code (a cell that was cut short counts until it is made whole)."""
        wanted = {(report, cell.seed) for cell in self.study.cells() for report in cell.reports}
        hashes = {tuple(self.hashes.values()), tuple(f"{h}-cut" for h in self.hashes.values())}
        return [
            r
            for r in read_records(self.settings.folder)
            if (r.dataset, r.seed) in wanted and (r.config_hash, r.source_hash) in hashes
        ]

    def _clear_other_results(self) -> None:
        """With overwrite=true: what another configuration left must not be read beside the new results."""
        folder = self.settings.folder
        if any(
            r.config_hash.removesuffix("-cut") != self.hashes["config_hash"]
            for r in read_records(folder)
        ):
            for name in ("cells", "curves", "arrays", "features", "graphs", "saes"):
                shutil.rmtree(folder / name, ignore_errors=True)
            for path in folder.glob("final_info*.json"):
                path.unlink()

    def _write_manifest(self, manifest: Mapping[str, Any] | None = None) -> None:
        write_json(
            self.settings.folder / "manifest.json", self.manifest if manifest is None else manifest
        )


def _refuse_other_configuration(folder: Path, config: Mapping[str, Any], overwrite: bool) -> None:
    path = folder / "manifest.json"
    if overwrite or not path.exists() or not any(folder.glob("cells/*.json")):
        return
    before = flat(
        {k: v for k, v in read_json(path)["config"].items() if k not in RESULT_NEUTRAL_KEYS}
    )
    now = flat(config)
    keys = sorted(
        before.keys() | now.keys(), key=lambda k: (k.count("."), k)
    )  # what was typed stands higher up than what follows from it
    changed = [f"{k}: {before.get(k)} -> {now.get(k)}" for k in keys if before.get(k) != now.get(k)]
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UserError(
            f"{folder} holds results of another configuration ({'; '.join(changed[:3])}{more}): {REMEDY}"
        )


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``."""
    out: dict[str, Any] = {}
    for key, value in config.items():
        out |= (
            flat(value, f"{prefix}{key}.")
            if isinstance(value, Mapping) and value
            else {f"{prefix}{key}": value}
        )
    return out


def _source(study: Study) -> str:
    """Name the code that results come from: the package, and what the study uses of a user's own."""
    package, outside = package_digest(PACKAGE), outside_digest(study)
    return digest([package, outside]) if outside else package


def _text(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What the text is, whatever place it came from."""
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
    found = {"python": platform.python_version()}
    for name in ("sae-experiments", "torch", "transformers", "hydra-core", "omegaconf", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"

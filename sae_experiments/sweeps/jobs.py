"""Sweeps: many runs from one command line, in folders of their own.

A failed job neither stops nor hides the others. A sweep's folder holds a run folder per job,
`jobs/<name>.json` with the outcome of each, and `jobs/<name>.log` with its output.
"""

from __future__ import annotations

import itertools
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import hydra
from omegaconf import DictConfig, OmegaConf

from sae_experiments.cache import locked
from sae_experiments.config import own
from sae_experiments.config.axes import axes_of
from sae_experiments.config.checks import configuring
from sae_experiments.config.compose import build, compose_checked, options_of
from sae_experiments.config.typed import (
    by_key,
    folder_of,
    in_group,
    key_of,
    last_text,
    run_folder,
    value_of,
    written,
)
from sae_experiments.errors import UserError
from sae_experiments.files import PACKAGE, NewFolder, digest, sha256_file, write_json
from sae_experiments.results.records import read_records, try_json
from sae_experiments.source import package_digest, targets_digest
from sae_experiments.stopping import Stopped
from sae_experiments.sweeps.launchers import Exit, Here, Job, Launcher
from sae_experiments.sweeps.search import REPORTED, SEARCHED, Search, Trial

WORDS = ("sweep", "launcher", "search")  # what describes the sweep and no job
IN_USE = "{} is in use by another sweep: wait for it or choose another out_dir"


class Asked(NamedTuple):
    """The parsed command line of a sweep."""

    overrides: list[str]  # of the jobs; keys with several values vary
    launcher: Launcher  # runs the jobs
    search: DictConfig | None  # settings of a search; None: every combination is run
    out_dir: str  # folder of the sweep below runs_root
    root: Path  # the same, with runs_root


def is_sweep(overrides: Sequence[str]) -> bool:
    """True if a command line is a sweep even without `-m`, because it names one."""
    return any(in_group(o, *WORDS) for o in overrides)


def sweep(conf: Path, overrides: Sequence[str], here: Here) -> int:
    """Run every job that is not finished, and print a table of all of them.

    Args:
        conf: Folder of the YAML files.
        overrides: The command line.
        here: Runs a command line in this process.

    Returns:
        Exit status: 0, 1 if any job failed, 130 or 143 if the sweep was stopped.

    Raises:
        UserError: Every job would fail with the same mistake. This is raised before any job starts.
    """
    with configuring():
        asked = asked_for(conf, overrides)
        axes, fixed = axes_of(conf, asked.overrides)
    jobs = Jobs(conf, asked, fixed, [axis.key for axis in axes])
    if asked.search is not None:
        search = Search(asked.root, asked.search, axes, fixed)
        search.check_metric(
            lambda overrides: build(compose_checked(conf, overrides)[0].study).infos()
        )
        return _locked(asked.root, lambda: _search(search, jobs, here))
    if endless := [axis.key for axis in axes if not axis.choices]:
        raise UserError(
            f"{endless[0]}: an interval is for a search; add search.metric=sae_fvu, "
            "or list the values"
        )
    every = [
        jobs.job(i, combination)
        for i, combination in enumerate(
            itertools.product(*([f"{a.key}={c}" for c in a.choices] for a in axes))
        )
    ]
    if len({job.name for job in every}) < len(every):
        raise UserError(
            "two jobs would have one folder: their values differ in characters "
            "that no file name has"
        )
    jobs.check(every)

    def go() -> int:
        try:
            jobs.run(every, here)
        finally:
            status = job_table([jobs.record(job) for job in every])
        return status

    return _locked(asked.root, go)


def _locked(root: Path, go: Callable[[], int]) -> int:
    try:
        new = NewFolder(root)
    except OSError as error:
        raise UserError(
            f"out_dir={root} cannot be written ({error.strerror}): "
            "choose another out_dir or runs_root"
        ) from error
    with locked(root / ".lock", wait_s=0, held=IN_USE.format(root)):
        try:
            return go()
        except UserError as error:
            if error.exit_status == UserError.exit_status and not any(root.glob("jobs/*.json")):
                new.take_back()
            raise
        except (KeyboardInterrupt, Stopped) as stopped:
            print(
                "stopped: the same command continues where this one ended",
                file=sys.stderr,
                flush=True,
            )
            return getattr(stopped, "exit_status", 128 + signal.SIGINT)


def asked_for(conf: Path, overrides: Sequence[str]) -> Asked:
    """Read the command line of a sweep.

    `sweep=name` brings the overrides of `conf/sweep/name.yaml`, over which the user's own win.
    """
    for o in overrides:
        if "=" not in o:
            raise UserError(f"{o}: a sweep takes key=value, nothing else")
    own = [o for o in overrides if in_group(o, *WORDS)]
    sweeps = [o for o in own if key_of(o) == "sweep"]
    named = options_of(conf, "sweep", own) if sweeps else OmegaConf.create({"overrides": []})
    merged = by_key([*named.overrides, *(o for o in overrides if not in_group(o, *WORDS))])
    usual_root = OmegaConf.load(conf / "config.yaml").runs_root
    runs_root = last_text(merged.values(), "runs_root", usual_root)
    out_dir = _out_dir(merged, sweeps)
    chosen = [f"launcher={named.get('launcher') or 'serial'}"]
    chosen += [o for o in own if in_group(o, "launcher")]
    return Asked(
        [o for key, o in merged.items() if key != "out_dir"],
        build(options_of(conf, "launcher", chosen)),
        _search_asked_for(conf, named, [o for o in own if in_group(o, "search")]),
        folder_of(out_dir),
        run_folder(runs_root, out_dir),
    )


def _out_dir(merged: Mapping[str, str], sweeps: Sequence[str]) -> str:
    usual = f"sweep_{value_of(sweeps[0])}" if sweeps else None
    out_dir = last_text(merged.values(), "out_dir", usual)
    if out_dir is None:
        raise UserError("a sweep needs a folder of its own: add out_dir=sweep_a")
    return out_dir


def _search_asked_for(conf: Path, named: DictConfig, own: Sequence[str]) -> DictConfig | None:
    """Settings of the search, from the named sweep and the command line; None for no search."""
    settings = (named.get("search") or {}).items()
    given = [f"search.{key}={'null' if value is None else value}" for key, value in settings]
    search = options_of(conf, "search", ["search=tpe", *given, *own])
    return search if own or "search" in named else None


@dataclass
class Jobs:
    """The jobs of one sweep: their names, commands and outcomes."""

    conf: Path
    """Folder of the YAML files."""
    asked: Asked
    """The command line of the sweep."""
    fixed: list[str]
    """Overrides that all jobs share."""
    varied: list[str]
    """Keys that differ between jobs."""

    def __post_init__(self) -> None:
        script = own.script() or self.conf.parent / "experiment.py"
        yaml = {
            str(p.relative_to(self.conf)): sha256_file(p) for p in sorted(self.conf.rglob("*.yaml"))
        }
        texts = [p.read_text(encoding="utf-8") for p in sorted(self.conf.rglob("*.yaml"))]
        outside = targets_digest([*texts, *self.asked.overrides])
        self.made_by = digest([package_digest(PACKAGE), yaml, script.read_text(), outside])
        self.script = script

    def job(self, number: int, values: Sequence[str], name: str | None = None) -> Job:
        """Build the job with these values of the varied keys."""
        name = name or folder_name(values)
        label = [] if any(key_of(o) == "label" for o in self.fixed) else [f"label={name}"]
        plain = (
            [] if any(key_of(o) == "report" for o in self.fixed) else ["report=false"]
        )  # one page for the whole sweep: plot.py
        overrides = [*self.fixed, *values, *label, *plain]
        command = [
            sys.executable,
            str(self.script),
            *overrides,
            written("out_dir", f"{self.asked.out_dir}/{name}"),
        ]
        return Job(number, name, overrides, command, self.asked.root / "jobs" / f"{name}.log")

    def check(self, jobs: Sequence[Job]) -> None:
        """Raise `UserError` if the first and the last job have the same mistake."""
        faults = []
        for job in dict.fromkeys((0, len(jobs) - 1)):
            try:
                with configuring():
                    build(
                        compose_checked(
                            self.conf, [o for o in jobs[job].overrides if key_of(o) != "preset"]
                        )[0].study
                    ).check()
                return
            except UserError as error:
                faults.append(str(error))
        if len(set(faults)) == 1:
            raise UserError(faults[0])

    def run(self, jobs: Sequence[Job], here: Here) -> None:
        """Run those that are not finished, and write down how each ended."""
        left = [job for job in jobs if not self.finished(job)]
        if len(left) < len(jobs):
            print(f"{len(jobs) - len(left)} of {len(jobs)} jobs are already done", flush=True)
        launcher, total, ended = self.asked.launcher, len(left), []

        def end(job: Job, how: Exit) -> None:
            ended.append(job)
            record = self.write(job, how)
            cause = f": {record['cause']}" if record["cause"] else ""
            print(
                f"[{len(ended)}/{total}] {job.name}: {record['status']} "
                f"after {record['seconds']:.0f} s{cause}",
                flush=True,
            )

        parts = [left[:1], left[1:]] if launcher.first_alone else [left]
        for part in parts:
            if part:
                launcher.run(part, end, here)

    def path(self, job: Job) -> Path:
        """File that says how the job ended."""
        return self.asked.root / "jobs" / f"{job.name}.json"

    def fingerprint(self, job: Job) -> str:
        """Digest of everything that determines a job's results, except the text of its corpora."""
        return digest(
            [
                self.made_by,
                sorted(
                    o for o in job.overrides if key_of(o) not in ("label", "threads", "verbosity")
                ),
            ]
        )

    def finished(self, job: Job) -> bool:
        """True if this code and configuration finished the job, and its results are whole."""
        record = self.record(job)
        if record["status"] != "done" or record.get("fingerprint") != self.fingerprint(job):
            return False
        folder = self.asked.root / job.name
        if _manifest(folder).get("status") != "done":
            return False
        return len(read_records(folder)) == record.get("results")

    def write(self, job: Job, how: Exit) -> dict[str, Any]:
        """Write down how a job ended."""
        status = how.status
        folder = self.asked.root / job.name
        words = {
            128 + signal.SIGINT: "stopped",
            128 + signal.SIGTERM: "stopped",
            0: _manifest(folder).get("status", "failed"),
        }
        record = {
            "job": job.number,
            "name": job.name,
            "overrides": job.overrides,
            "command": job.command,
            "exit_status": status,
            "status": words.get(status, "failed"),
            "cause": "" if status == 0 else cause_of(job.log, status),
            "fingerprint": self.fingerprint(job),
            "seconds": round(how.seconds, 3),
            "results": len(read_records(folder)),
        }
        write_json(self.path(job), record)
        return record

    def record(self, job: Job) -> dict[str, Any]:
        """Outcome of a job; "not run" for a job that has not ended."""
        nothing = {"job": job.number, "name": job.name, "status": "not run", "cause": ""}
        return nothing | _read_mapping(self.path(job)) | {"job": job.number}


def _read_mapping(path: Path) -> dict[str, Any]:
    """A JSON mapping; empty if the file is missing or holds anything else."""
    value = try_json(path) if path.exists() else None
    return value if isinstance(value, dict) else {}


def _manifest(folder: Path) -> dict[str, Any]:
    return _read_mapping(folder / "manifest.json")


def cause_of(log: Path, status: int) -> str:
    """Cause of a failed job, in one line: its last error or the signal that ended it."""
    if status < 0:
        hint = " (out of memory?)" if -status == signal.SIGKILL else ""
        return f"killed by {signal.Signals(-status).name}{hint}"
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    causes = errors or lines
    return causes[-1] if causes else f"exit status {status}"


def folder_name(varied: Sequence[str]) -> str:
    """A job's folder and its name in figures: the values that vary, as `topk+target_l0-16`.

    Only characters that every file system takes are kept.

    Keys are shortened to their last part where that is no other's; long names end in a digest.
    """
    tails = [key_of(o).rsplit(".", 1)[-1] for o in varied]
    words = []
    for o, tail in zip(varied, tails, strict=True):
        key, value = key_of(o) if tails.count(tail) > 1 else tail, o.split("=", 1)[1]
        words.append(
            value if "." not in key_of(o) and value.isidentifier() else f"{key}-{value.strip('[]')}"
        )
    name = re.sub(r"[^A-Za-z0-9_.+-]", "_", "+".join(words)) or "plain"
    return name if len(name) <= 100 else f"{name[:80]}-{digest(list(varied))}"


def job_table(records: Sequence[Mapping[str, Any]]) -> int:
    """Print status and cause of every job; 1 if any failed, else 0."""
    print(f"\n{'job':>4}  {'status':<7} {'seconds':>8}  name")
    for r in records:
        seconds = f"{r['seconds']:.0f}" if "seconds" in r else "-"
        cause = f": {r['cause']}" if r["cause"] else ""
        print(f"{r['job']:>4}  {r['status']:<7} {seconds:>8}  {r['name']}{cause}")
    sys.stdout.flush()
    failed = [r for r in records if r["status"] not in ("done", "cut", "not run")]
    if failed:
        print(
            f"error: {len(failed)} of {len(records)} jobs failed; "
            f"first cause: {failed[0]['cause']}",
            file=sys.stderr,
            flush=True,
        )
    return 1 if failed else 0


def _search(search: Search, jobs: Jobs, here: Here) -> int:
    """Run trials until there are enough, then report the best one on text that none has seen."""
    search.claim()

    def trial_job(trial: Trial) -> Job:
        return jobs.job(trial.number, [*trial.overrides, SEARCHED], trial.name)

    known, reported = {trial.number: trial_job(trial) for trial in search.trials()}, None
    try:
        while trials := search.next():
            batch = [trial_job(t) for t in trials]
            known |= {job.number: job for job in batch}
            jobs.run(batch, here)
            for trial, job in zip(trials, batch, strict=True):
                search.tell(
                    trial, jobs.asked.root / job.name, jobs.record(job)["status"] in ("done", "cut")
                )
        if (best := search.best()) is not None:  # chosen by one text, reported on another
            winner = jobs.job(len(known), [*best.overrides, REPORTED], f"{best.name}_test")
            known[winner.number] = winner
            jobs.run([winner], here)
            reported = (
                jobs.asked.root / winner.name
                if jobs.record(winner)["status"] in ("done", "cut")
                else None
            )
    finally:
        status = job_table([jobs.record(job) for _, job in sorted(known.items())])
        print(search.summary(reported), flush=True)
    return status


def run_hydra(conf: Path, args: Sequence[str], task: Callable[[DictConfig], Any]) -> None:
    """Run a command line with Hydra itself.

    Args:
        conf: Folder of the YAML files.
        args: The command line.
        task: Called by Hydra with the composed configuration.
    """
    sys.argv = [sys.argv[0], *args]
    hydra.main(config_path=str(conf), config_name="config", version_base="1.3")(task)()

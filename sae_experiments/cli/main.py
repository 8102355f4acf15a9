"""The command line of ``experiment.py``: what was typed in, one run (or a sweep) out; every mistake is one line and exit status 2."""

from __future__ import annotations

import errno
import functools
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from sae_experiments.cli.help import help_page
from sae_experiments.config.compose import build, compose_checked, configuring, first_line
from sae_experiments.config.plans import complete
from sae_experiments.config.typed import for_hydra, run_folder
from sae_experiments.errors import UserError
from sae_experiments.stopping import (
    Stopped,
    end_with_parent,
    farewell,
    listening,
    wait_for_children,
)
from sae_experiments.sweeps.jobs import is_sweep, run_hydra, sweep
from sae_experiments.sweeps.launchers import JOB

HYDRA_FLAGS = (
    "--hydra-help",
    "--version",
    "--cfg",
    "-c",
    "--resolve",
    "--package",
    "-p",
    "--run",
    "-r",
    "--shell-completion",
    "--info",
    "-i",
)
WITH_VALUE = ("--cfg", "-c", "--package", "-p")


class Command(NamedTuple):
    """A parsed command line: overrides in Hydra's form, whether it is a sweep, and flags left to Hydra."""

    overrides: list[str]
    multirun: bool
    flags: list[str]


def main(argv: Sequence[str], *, plan: str, extra: Sequence[str], conf: Path) -> int:
    """Run what ``argv`` asks for; returns the exit status. Nothing is printed on stderr after the cause of a failure."""
    if os.environ.get(JOB):
        end_with_parent()
    try:
        with listening():
            return _run(argv, plan, extra, conf)
    except UserError as error:
        return _failed(str(error), error.exit_status)
    except BrokenPipeError:  # whoever read the output has gone: there is nobody left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        return _failed(os_error(error), 1)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search(
            r"allocate memory|out of memory", str(error)
        ):
            raise
        return _failed(
            f"out of memory ({first_line(error)}): use smaller sizes (fit.train.batch_size, sae.expansion, lm.*) or another machine",
            1,
        )
    except (KeyboardInterrupt, Stopped) as stopped:
        return _failed(farewell(str(stopped) or "SIGINT"), getattr(stopped, "exit_status", 130))


def _run(argv: Sequence[str], plan: str, extra: Sequence[str], conf: Path) -> int:
    if "--help" in argv or "-h" in argv:
        print(help_page(conf, plan))
        return 0
    command = parse(argv)
    if command.multirun or is_sweep(command.overrides):
        here = functools.partial(main, plan=plan, extra=extra, conf=conf)
        with wait_for_children():
            return sweep(conf, [*extra, *command.overrides], here)
    with configuring():
        overrides, about = complete(command.overrides, plan=plan, extra=extra, conf=conf)
    if command.flags:
        run_hydra(conf, [*command.flags, *map(for_hydra, overrides)], lambda cfg: None)
        return 0
    with configuring():
        cfg, label = compose_checked(conf, overrides)
    closing = functools.partial(draw_report, conf=conf) if cfg.report else lambda folder: None
    execute(
        cfg,
        about={"argv": list(argv), "overrides": overrides, **about},
        label=label,
        closing=closing,
    )
    return 0


def draw_report(folder: Path, conf: Path) -> None:
    """``report.html`` of a finished run. Whatever goes wrong is one line on stdout, and the run stays finished."""
    try:
        from sae_experiments.report.figures import run_report

        figures = {
            path.stem: functools.partial(_figure, path)
            for path in sorted((conf / "plot").glob("*.yaml"))
        }
        with log_to_stdout():
            print(f"report: {run_report(folder, figures)}", flush=True)
    except Exception as error:
        print(
            f"no report.html: {type(error).__name__}: {first_line(error)}; the results are complete without it",
            flush=True,
        )


def _figure(path: Path) -> Callable[..., Any]:
    return build(DictConfig(OmegaConf.load(path)))


def _failed(cause: str, status: int) -> int:
    sys.stdout.flush()
    line = " ".join(cause.split())
    line = (
        line if len(line) <= 1200 else f"{line[:800]} ... {line[-350:]}"
    )  # callers look at the last 1,500 characters
    print(f"error: {line}", file=sys.stderr, flush=True)
    return status


def os_error(error: OSError) -> str:
    """What the system refused, which file it was about, and what to do."""
    files = " and ".join(str(f) for f in (error.filename, error.filename2) if f)
    remedies = {
        errno.ENOSPC: "free some space, or move cache and runs_root to another disk",
        errno.EDQUOT: "free some space, or move cache and runs_root to another disk",
        errno.EROFS: "choose a cache and a runs_root that can be written",
        errno.EACCES: "choose a cache and a runs_root that can be written",
        errno.ENOENT: "it was removed while it was in use",
    }
    remedy = remedies.get(error.errno or 0, "look at the disk")
    return f"{error.strerror or type(error).__name__}{f': {files}' if files else ''}; {remedy}, then type the same command again: it continues"


def parse(argv: Sequence[str]) -> Command:
    """``--key=value`` and ``--key value`` become ``key=value``; Hydra's own flags are set aside."""
    overrides, flags, multirun = [], [], False
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        if token in ("-m", "--multirun"):
            multirun = True
        elif token.split("=")[0] in HYDRA_FLAGS:
            flags.append(token)
            if token in WITH_VALUE and rest:
                flags.append(rest.pop(0))
        elif token.startswith("--"):
            key = token[2:]
            if "=" not in key:
                if not rest or rest[0].startswith("--"):
                    raise UserError(f"{token} needs a value: write {token}=VALUE")
                key = f"{key}={rest.pop(0)}"
            overrides.append(key)
        elif "=" in token or token.startswith("~"):
            overrides.append(token)
        else:
            raise UserError(
                f"{token!r} is not an option: write key=value (python experiment.py --help lists the keys)"
            )
    return Command(overrides, multirun, flags)


def execute(
    cfg: DictConfig,
    *,
    about: Mapping[str, Any],
    label: str,
    closing: Callable[[Path], None] = lambda folder: None,
) -> Path:
    """Build the study of a configuration and run it; returns the run folder. ``closing`` gets the folder when there are results in it."""
    from sae_experiments.runner.run import run

    with configuring():
        study, tracker, settings = _prepared(cfg, about, label)
    if cfg.verbosity != "quiet":
        print(
            f"preset {about['preset']} ({about['preset_reason']}); {about['plan_note']}\nresults in {settings.folder}",
            flush=True,
        )
    status = run(study, settings, tracker, closing)
    print_summary(settings.folder, status)
    return settings.folder


def _prepared(cfg: DictConfig, about: Mapping[str, Any], label: str) -> tuple[Any, Any, Any]:
    import torch

    from sae_experiments.runner.run import RunSettings

    if cfg.threads is not None:
        torch.set_num_threads(int(cfg.threads))
    device = (
        str(cfg.device) if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    )
    if device.split(":")[0] not in ("cpu", "cuda"):
        raise UserError(f"device={device} is not one of auto, cpu, cuda")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device={device}: there is no CUDA device; use device=cpu")
    study, tracker = build(cfg.study), build(cfg.track)
    study.check()
    settings = RunSettings(
        folder=run_folder(cfg.runs_root, str(cfg.out_dir)),
        cache=Path(str(cfg.cache)).expanduser(),
        config=recorded(cfg),
        label=cfg.label or label,
        device=device,
        verbosity=str(cfg.verbosity),
        time_limit_s=cfg.time_limit_s,
        overwrite=bool(cfg.overwrite),
        workers=cfg.workers,
        threads=cfg.threads,
        about=about,
    )
    return study, tracker, settings


def recorded(cfg: DictConfig) -> dict[str, Any]:
    """The resolved configuration without what it says twice: references inside ``study``, and ``saes`` where there is one SAE."""
    config = OmegaConf.to_container(cfg, resolve=True)
    raw = OmegaConf.to_container(cfg.study, resolve=False)
    config["study"] = {
        k: v
        for k, v in config["study"].items()
        if not (isinstance(raw[k], str) and raw[k].startswith("${"))
    }
    config.pop("saes" if len(cfg.saes) == 1 else "sae")
    return config


def print_summary(folder: Path, status: str) -> None:
    """Print the closing table: a table for each dataset with a row for each SAE."""
    from sae_experiments.results.compare import compare
    from sae_experiments.results.table import table_of_run
    from sae_experiments.results.terminal import terminal

    with log_to_stdout():
        table = table_of_run(folder)
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        print(f"\n{terminal(table, compare(table), colour=colour)}")
    print(f"\n{status}: {folder / 'final_info.json'}", flush=True)


@contextmanager
def log_to_stdout() -> Iterator[None]:
    """Print warnings of the package as lines on stdout; stderr is left to the cause of a failure."""
    log, lines = logging.getLogger("sae_experiments"), logging.StreamHandler(sys.stdout)
    log.addHandler(lines)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(lines)
        log.propagate = True

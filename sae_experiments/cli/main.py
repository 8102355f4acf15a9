"""The command line of `experiment.py`: one run, a sweep, or a page of help.

Every mistake is one line and exit status 2.
"""

from __future__ import annotations

import errno
import functools
import itertools
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from sae_experiments.cli.closing import block
from sae_experiments.cli.help import help_page, list_page
from sae_experiments.config import own
from sae_experiments.config.axes import HOST, HYDRA_HOST
from sae_experiments.config.checks import as_dict, configuring
from sae_experiments.config.compose import build, compose_checked
from sae_experiments.config.hydra_habits import translate
from sae_experiments.config.plans import complete
from sae_experiments.config.typed import for_hydra, key_of, run_folder, value_of
from sae_experiments.console import nobody_reads
from sae_experiments.errors import UserError, first_line, is_out_of_memory
from sae_experiments.files import conf_folder
from sae_experiments.source import is_outside
from sae_experiments.stopping import (
    Stopped,
    end_with_parent,
    farewell,
    listening,
    process_age,
    wait_for_children,
)
from sae_experiments.sweeps.jobs import is_sweep, run_hydra, sweep
from sae_experiments.sweeps.launchers import JOB

if TYPE_CHECKING:
    from sae_experiments.studies.base import Study

#: Flags that are handed to Hydra, and those of them with a value.
HYDRA_FLAGS = {"--cfg", "-c", "--resolve", "--package", "-p", "--run", "-r", "--info", "-i"}
HYDRA_FLAGS |= {"--hydra-help", "--version", "--shell-completion", "-sc"}
WITH_VALUE = {"--cfg", "-c", "--package", "-p"}
#: Those that show the configuration as Hydra composes it.
SHOWING = {"--cfg", "-c", "--info"}
INFO_TOPICS = {"all", "config", "defaults", "defaults-tree", "plugins", "searchpath"}
#: Flags of Hydra that choose another configuration, which is always conf/ here.
OTHER_CONFIG = {"--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd"}
#: End of a message about a wrong argument.
LISTED = "(python experiment.py --help lists the keys)"
#: Longest message, as callers may look at the last 1,500 characters only.
MOST, HEAD, TAIL = 1200, 800, 350
NO_DISK = "free some space, or move cache and runs_root to another disk"
NOT_WRITABLE = "choose a cache and a runs_root that can be written"
#: Remedies for errors of the system, by number.
REMEDIES = {
    errno.ENOSPC: NO_DISK,
    errno.EDQUOT: NO_DISK,
    errno.EROFS: NOT_WRITABLE,
    errno.EACCES: NOT_WRITABLE,
    errno.ENOENT: "it was removed while it was in use",
}


class Command(NamedTuple):
    """A parsed command line."""

    overrides: list[str]  # in Hydra's form
    multirun: bool
    flags: list[str]  # left to Hydra


def main(
    argv: Sequence[str],
    *,
    plan: str,
    extra: Sequence[str],
    conf: Path | None = None,
    script: str | Path | None = None,
) -> int:
    """Run a command line. Nothing is printed on stderr after the cause of a failure.

    Args:
        argv: Arguments without the name of the program.
        plan: Name of the plan that says what each run folder is.
        extra: Overrides for every run, as if they had been typed first.
        conf: Folder of the YAML files; None: that of the package.
        script: The script that was started, which may define `SAES` and `METRICS`.

    Returns:
        Exit status: 2 for a mistake in the configuration, 1 for failures while running, 128 plus
        the signal's number if stopped, else 0.
    """
    began = time.monotonic()
    if list(argv) == sys.argv[1:]:  # the command of this process, which has spent time on imports
        began -= process_age()
    if parent := os.environ.pop(JOB, None):  # it is for this process, and not for its children
        end_with_parent(int(parent))
    conf = conf or conf_folder()
    try:
        with listening():
            with configuring():
                own.register(script, conf)
            return _run(argv, plan, extra, conf, began)
    except UserError as error:
        return _failed(str(error), error.exit_status)
    except BrokenPipeError:
        return nobody_reads()
    except OSError as error:
        return _failed(os_error(error), 1)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return _failed(
            f"out of memory ({first_line(error)}): use smaller sizes "
            "(fit.train.batch_size, sae.expansion, lm.*) or another machine",
            1,
        )
    except (KeyboardInterrupt, Stopped) as stopped:
        return _failed(farewell(str(stopped) or "SIGINT"), getattr(stopped, "exit_status", 130))


def _run(argv: Sequence[str], plan: str, extra: Sequence[str], conf: Path, began: float) -> int:
    if "--help" in argv or "-h" in argv:
        print(help_page(conf, plan))
        return 0
    if list(argv) == ["list"]:
        print(list_page(conf))
        return 0
    if argv and argv[0] == "template":
        from sae_experiments.cli import template

        return template.main(argv[1:])
    if argv and argv[0].split("=")[0] == "--check":
        return _check(argv, extra, conf)
    command = parse(argv)
    if {"-sc", "--shell-completion"} & set(command.flags):
        run_hydra(conf, [*command.flags, *command.overrides], lambda cfg: None)
        return 0
    with configuring():
        user, multirun = translate(command.overrides, multirun=command.multirun)
    if multirun or is_sweep(user):
        return _sweep(command.flags, user, plan, extra, conf)
    with configuring():
        overrides, about = complete(user, plan=plan, extra=extra, conf=conf)
        overrides += own.measured_too(conf, overrides)
    with configuring():
        cfg, label = compose_checked(conf, overrides)
    if command.flags:
        _show(cfg, command.flags, overrides, conf)
        return 0
    closing = functools.partial(draw_report, conf=conf) if cfg.report else None
    about = {"argv": list(argv), "overrides": overrides, **about}
    execute(cfg, about=about, label=label, closing=closing, began=began)
    return 0


def _show(cfg: DictConfig, flags: Sequence[str], overrides: Sequence[str], conf: Path) -> None:
    """Answer a flag of Hydra that shows something; `--cfg job` shows what would run.

    Args:
        cfg: The composed configuration.
        flags: Flags of Hydra, with their values.
        overrides: Overrides of the run.
        conf: Folder of the YAML files, for everything but `--cfg job`, which Hydra shows.

    Raises:
        UserError: Hydra would compose something else than what runs: it knows one SAE.
    """
    if "job" in flags:
        shown = cfg.copy()
        if "--resolve" in flags:
            OmegaConf.resolve(shown)
        shown.pop("saes" if len(cfg.saes) == 1 else "sae")
        package = next((b for a, b in itertools.pairwise(flags) if a in ("--package", "-p")), "")
        part = (
            OmegaConf.select(shown, package) if package.strip("_") not in ("", "global") else shown
        )
        print(OmegaConf.to_yaml(part) if OmegaConf.is_config(part) else part)
        return
    if len(cfg.saes) > 1 and flags[0].split("=")[0] in SHOWING:
        raise UserError(
            f"{flags[0]} shows one SAE, and this run has {len(cfg.saes)}: name one "
            "(--cfg job shows all)"
        )
    for_one = [o.replace(f"{HOST}=", f"{HYDRA_HOST}=", 1) for o in overrides]
    run_hydra(conf, [*flags, *map(for_hydra, for_one)], lambda cfg: None)


def _check(argv: Sequence[str], extra: Sequence[str], conf: Path) -> int:
    """Check the laws of one SAE, `--check=NAME` with overrides after it, and say how it went."""
    from sae_experiments.fitting.laws import L0, check

    command = parse(argv)
    name = value_of(command.overrides[0])
    typed = [o for o in command.overrides[1:] if key_of(o).startswith("sae.")]
    of_it = [o for o in extra if key_of(o).startswith("sae.") and key_of(o) != "sae.target_l0"]
    asked = [*of_it, f"sae.target_l0={L0}", *typed]

    with configuring():
        cfg, _ = compose_checked(conf, ["preset=smoke", f"sae={name}", *asked])
        spec = next(iter(build(cfg.study).saes.values()))
    return check(name, spec)


def _sweep(
    flags: Sequence[str], user: Sequence[str], plan: str, extra: Sequence[str], conf: Path
) -> int:
    if flags:
        raise UserError(f"{flags[0]} is for a single run: leave out what makes a sweep (-m)")
    here = functools.partial(main, plan=plan, extra=extra, conf=conf, script=own.script())
    with wait_for_children():
        return sweep(conf, [*extra, *user], here)


def draw_report(folder: Path, conf: Path) -> None:
    """Write `report.html` of a finished run.

    If anything goes wrong, the run still counts as finished and one line on stdout reports it.
    """
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
            f"no report.html: {type(error).__name__}: {first_line(error)}; "
            "the results are complete without it",
            flush=True,
        )


def _figure(path: Path) -> Callable[..., Any]:
    return build(DictConfig(OmegaConf.load(path)))


def _failed(cause: str, status: int) -> int:
    sys.stdout.flush()
    line = " ".join(cause.split())
    if len(line) > MOST:
        line = f"{line[:HEAD]} ... {line[-TAIL:]}"
    print(f"error: {line}", file=sys.stderr, flush=True)
    return status


def os_error(error: OSError) -> str:
    """One line for an `OSError`: the error, the file and the remedy."""
    files = " and ".join(str(f) for f in (error.filename, error.filename2) if f)
    remedy = REMEDIES.get(error.errno or 0, "look at the disk")
    refused = error.strerror or type(error).__name__
    if files:
        refused += f": {files}"
    return f"{refused}; {remedy}, then type the same command again: it continues"


def parse(argv: Sequence[str]) -> Command:
    """Turn `--key=value` and `--key value` into `key=value`, and set Hydra's flags aside."""
    overrides: list[str] = []
    flags: list[str] = []
    multirun = False
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        name = token.split("=")[0]
        if token in ("-m", "--multirun"):
            multirun = True
        elif name in OTHER_CONFIG:
            raise UserError(f"{token}: the configuration is always conf/; set values by key=value")
        elif name in HYDRA_FLAGS:
            flags += _hydra_flag(token, rest)
        elif token.startswith("--"):
            overrides.append(_override(token, rest))
        elif "=" in token or token.startswith("~"):
            overrides.append(token)
        else:
            raise UserError(f"{token!r} is not an option: write key=value {LISTED}")
    return Command(overrides, multirun, flags)


def _hydra_flag(token: str, rest: list[str]) -> list[str]:
    """A flag of Hydra, with its value taken from `rest`."""
    if token in ("--info", "-i"):
        topic = rest.pop(0) if rest and rest[0] in INFO_TOPICS else "all"
        return [f"--info={topic}"]
    name, equals, value = token.partition("=")
    if name in WITH_VALUE and equals:
        return [name, value]
    if token in WITH_VALUE and rest:
        return [token, rest.pop(0)]
    return [token]


def _override(token: str, rest: list[str]) -> str:
    """`key=value` from `--key=value`, or from `--key` and the next of `rest`."""
    key = token[2:]
    if "=" in key:
        return key
    if not rest or rest[0].startswith("--"):
        raise UserError(f"{token} needs a value: write {token}=VALUE")
    return f"{key}={rest.pop(0)}"


def execute(
    cfg: DictConfig,
    *,
    about: Mapping[str, Any],
    label: str,
    closing: Callable[[Path], None] | None = None,
    began: float | None = None,
) -> Path:
    """Build the study of a configuration and run it.

    Args:
        cfg: The configuration.
        about: Facts for the manifest: argv, overrides, preset, plan and the reasons for them.
        label: Name of the run, unless `cfg.label` gives one.
        closing: Called with the run folder when there are results in it; None: no report.
        began: Time (`time.monotonic`) from which the time limit counts; None: now.

    Returns:
        The run folder.
    """
    from sae_experiments.runner.conclusion import conclusion
    from sae_experiments.runner.run import run

    with configuring():
        study, tracker, settings = _prepared(cfg, about, label)
        settings = replace(settings, began=began)
    if cfg.verbosity != "quiet":
        print(f"preset {about['preset']} ({about['preset_reason']}); {about['plan_note']}")
        print(f"results in {settings.folder}", flush=True)
    status = run(study, settings, tracker, closing)
    print_summary(settings.folder, status, conclusion(study, settings.folder))
    return settings.folder


def _prepared(cfg: DictConfig, about: Mapping[str, Any], label: str) -> tuple[Any, Any, Any]:
    import torch

    from sae_experiments.runner.run import RunSettings

    if cfg.threads is not None:
        torch.set_num_threads(int(cfg.threads))
    device = str(cfg.device)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.split(":")[0] not in ("cpu", "cuda"):
        raise UserError(f"device={device} is not one of auto, cpu, cuda")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device={device}: there is no CUDA device; use device=cpu")
    study, tracker = build(cfg.study), build(cfg.track)
    study.check()
    _check_own(study)
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
        leading=own.names("metric"),
    )
    return study, tracker, settings


def _check_own(study: Study) -> None:
    """Check what a script adds: quick laws of its SAEs, names of its metrics."""
    saes = {n: spec for n, spec in study.saes.items() if is_outside(spec.model)}
    if saes:
        from sae_experiments.fitting.laws import refuse_broken

        for name, spec in saes.items():
            refuse_broken(name, spec)
    known = [info.name for info in study.infos()] if own.names("metric") else []
    for name in own.names("metric"):
        if known.count(name) > 1:
            raise UserError(f"METRICS: {name} is a metric already: give yours another name")


def recorded(cfg: DictConfig) -> dict[str, Any]:
    """The resolved configuration as the manifest records it.

    Keys of `study` that only refer to other keys are left out. Of `sae` and `saes` only one is
    kept: `sae` for a single SAE.
    """
    config = as_dict(cfg)
    raw = as_dict(cfg.study, resolve=False)
    config["study"] = {
        k: v
        for k, v in config["study"].items()
        if not (isinstance(raw[k], str) and raw[k].startswith("${"))
    }
    config.pop("saes" if len(cfg.saes) == 1 else "sae")
    return config


def print_summary(folder: Path, status: str, lines: Sequence[str] = ()) -> None:
    """Print the closing table: a table for each dataset with a row for each SAE.

    Args:
        folder: The run folder.
        status: How the run ended.
        lines: Lines of its study to print after the table.
    """
    from sae_experiments.results.compare import compare
    from sae_experiments.results.table import table_of_run
    from sae_experiments.results.terminal import terminal

    with log_to_stdout():
        table = table_of_run(folder)
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        print(f"\n{terminal(table, compare(table), colour=colour)}")
    if lines:
        print("", *lines, sep="\n")
    if not sys.stdout.isatty():
        print(f"\n{block(folder)}")
    print(f"\n{status}: {folder / 'final_info.json'}", flush=True)


@contextmanager
def log_to_stdout() -> Iterator[None]:
    """Print warnings of the package on stdout; stderr is left to the cause of a failure."""
    log, lines = logging.getLogger("sae_experiments"), logging.StreamHandler(sys.stdout)
    log.addHandler(lines)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(lines)
        log.propagate = True

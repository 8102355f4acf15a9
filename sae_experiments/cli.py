"""The command line of ``experiment.py``: what was typed in, one run (or a sweep) out; every mistake is one line and exit status 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from sae_experiments.config import build, complete, compose_checked
from sae_experiments.help import help_page
from sae_experiments.io import UserError, read_json
from sae_experiments.sweeps import run_hydra, sweep

# Threads that wait give their core away soon: on a machine that does something else too, spinning costs a training step four times its time,
# and on an idle one this changes nothing (two cores, a small GPT-2: 61 ms a step both ways). Read when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

HYDRA_FLAGS = ("--hydra-help", "--version", "--cfg", "-c", "--resolve", "--package", "-p", "--run", "-r", "--shell-completion", "--info", "-i")
WITH_VALUE = ("--cfg", "-c", "--package", "-p")


class Command(NamedTuple):
    """A parsed command line: overrides in Hydra's form, whether it is a sweep, and flags left to Hydra."""

    overrides: list[str]
    multirun: bool
    flags: list[str]


def main(argv: Sequence[str], *, plan: str, extra: Sequence[str], conf: Path) -> int:
    """Run what ``argv`` asks for; returns the exit status. Nothing is printed on stderr after the cause of a failure."""
    try:
        if "--help" in argv or "-h" in argv:
            print(help_page(conf, plan))
            return 0
        command = parse(argv)
        if command.multirun:
            return sweep(conf, [*extra, *command.overrides], execute)
        overrides, about = complete(command.overrides, plan=plan, extra=extra, conf=conf)
        if command.flags:
            run_hydra(conf, [*command.flags, *overrides], lambda cfg: None)
            return 0
        cfg, label = compose_checked(conf, overrides)
        execute(cfg, about={"argv": list(argv), "overrides": overrides, **about}, label=label)
        return 0
    except UserError as error:
        sys.stdout.flush()
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return error.exit_status
    except KeyboardInterrupt:
        print("interrupted: the same command continues where this one stopped", flush=True)
        return 130


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
            raise UserError(f"{token!r} is not an option: write key=value (python experiment.py --help lists the keys)")
    return Command(overrides, multirun, flags)


def execute(cfg: DictConfig, *, about: Mapping[str, Any], label: str, folder: Path | None = None) -> Path:
    """Build the study of a configuration and run it; returns the run folder."""
    import torch

    from sae_experiments.run import RunSettings, run

    if cfg.threads is not None:
        torch.set_num_threads(int(cfg.threads))
    device = str(cfg.device) if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if device.split(":")[0] not in ("cpu", "cuda"):
        raise UserError(f"device={device} is not one of auto, cpu, cuda")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device={device}: there is no CUDA device; use device=cpu")
    folder = folder or run_folder(str(cfg.runs_root), str(cfg.out_dir))
    study, tracker = build(cfg.study), build(cfg.track)
    study.check()
    settings = RunSettings(
        folder=folder,
        cache=Path(str(cfg.cache)).expanduser(),
        config=recorded(cfg),
        label=cfg.label or label,
        device=device,
        verbosity=str(cfg.verbosity),
        time_limit_s=cfg.time_limit_s,
        overwrite=bool(cfg.overwrite),
        about=about,
    )
    if cfg.verbosity != "quiet":
        print(f"preset {about['preset']} ({about['preset_reason']}); {about['plan_note']}; results in {folder}", flush=True)
    status = run(study, settings, tracker)
    print_summary(folder, status)
    return folder


def recorded(cfg: DictConfig) -> dict[str, Any]:
    """The resolved configuration without what it says twice: references inside ``study``, and ``arms`` where there is one SAE."""
    config = OmegaConf.to_container(cfg, resolve=True)
    raw = OmegaConf.to_container(cfg.study, resolve=False)
    config["study"] = {k: v for k, v in config["study"].items() if not (isinstance(raw[k], str) and raw[k].startswith("${"))}
    config.pop("arms" if len(cfg.arms) == 1 else "sae")
    return config


def run_folder(runs_root: str, out_dir: str) -> Path:
    """``<runs_root>/<out_dir>``; out_dir cannot leave runs_root."""
    inside = Path(out_dir)
    if not out_dir or inside.is_absolute() or ".." in inside.parts or inside == Path("."):
        raise UserError(f"out_dir={out_dir!r} must name a folder below runs_root={runs_root} (set runs_root to write elsewhere)")
    return Path(runs_root).expanduser() / inside


def print_summary(folder: Path, status: str) -> None:
    """A closing table: the shown metrics, one column a report."""
    manifest, final = read_json(folder / "manifest.json"), read_json(folder / "final_info.json")
    shown = [name for name, info in sorted(manifest["metrics"].items(), key=lambda kv: kv[1]["order"]) if info["shown"]]
    width = max(len(name) for name in [*shown, "metric"])
    names = list(final)
    for first in range(0, len(names), 4):
        part = names[first : first + 4]
        print("\n" + " " * width + "".join(f"{n[-17:]:>18}" for n in part))
        for metric in shown:
            print(f"{metric:<{width}}" + "".join(f"{_mean_and_error(final[n], metric):>18}" for n in part))
    print(f"\n{status}: {folder / 'final_info.json'}", flush=True)


def _mean_and_error(report: Mapping[str, Any], metric: str) -> str:
    mean, error = report["means"].get(f"{metric}_mean"), report["stderrs"].get(f"{metric}_stderr")
    return "-" if mean is None else f"{mean:.4g}" + (f" ± {error:.1g}" if error is not None else "")

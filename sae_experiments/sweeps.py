"""Sweeps: a Hydra multirun in which every job has a folder of its own and no failure stops or hides another."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from sae_experiments.config import choose_preset, compose_checked, first_line, key_of, swept_keys
from sae_experiments.io import UserError, digest, read_json, write_json

Execute = Callable[..., Path]


def sweep(conf: Path, overrides: Sequence[str], execute: Execute) -> int:
    """Run every combination; jobs that finished before are not repeated. Prints a table of all jobs; 1 if any failed, else 0."""
    values = {key_of(o): o.split("=", 1)[1] for o in overrides if "=" in o}
    if "out_dir" not in values:
        raise UserError("a sweep needs a folder of its own: add out_dir=sweep_a")
    root = Path(values.get("runs_root", "runs")).expanduser() / values["out_dir"]
    preset, reason = choose_preset(values.get("preset", "auto"))
    fixed = [*(o for o in overrides if key_of(o) != "preset"), f"preset={preset}"]
    sweeping = swept_keys(conf, fixed)

    def job(cfg: DictConfig) -> None:
        task = list(HydraConfig.get().overrides.task)
        varied = [o for o in task if key_of(o) in sweeping]
        name = folder_name(varied)
        record = {"job": HydraConfig.get().job.num, "name": name, "overrides": task, "status": "failed", "cause": ""}
        try:
            whole, label = compose_checked(conf, task)
            chosen = HydraConfig.get().runtime.choices["preset"]
            about = {"argv": sys.argv[1:], "overrides": task, "preset": chosen, "preset_reason": reason, "plan_note": f"job {name}"}
            execute(whole, about=about, label=", ".join(varied) or label, folder=root / name)
            record["status"] = "done"
        except UserError as error:
            record["cause"] = " ".join(str(error).split())
        except Exception as error:  # one failing job must not stop the others; the closing table names its cause
            record["cause"] = f"{type(error).__name__}: {first_line(error)}"
        write_json(root / "jobs" / f"{name}.json", record)

    run_hydra(conf, ["--multirun", *fixed], job)
    return job_table(root)


def folder_name(varied: Sequence[str]) -> str:
    """A job's folder: what varies, in characters any file system takes; long names end in a digest."""
    name = re.sub(r"[^A-Za-z0-9_.,=-]", "_", ",".join(varied)).replace("=", "-") or "plain"
    return name if len(name) <= 100 else f"{name[:80]}-{digest(list(varied))}"


def job_table(root: Path) -> int:
    """Print status and cause of every job of the sweep in ``root``."""
    records = sorted((read_json(p) for p in (root / "jobs").glob("*.json")), key=lambda r: (r["job"], r["name"]))
    print(f"\n{'job':>4}  {'status':<7} name")
    for r in records:
        print(f"{r['job']:>4}  {r['status']:<7} {r['name']}{': ' + r['cause'] if r['cause'] else ''}")
    sys.stdout.flush()
    failed = [r for r in records if r["status"] != "done"]
    if failed:
        print(f"error: {len(failed)} of {len(records)} jobs failed; first cause: {failed[0]['cause']}", file=sys.stderr, flush=True)
    return 1 if failed else 0


def run_hydra(conf: Path, args: Sequence[str], task: Callable[[DictConfig], Any]) -> None:
    """Hand a command line to Hydra itself."""
    sys.argv = [sys.argv[0], *args]
    hydra.main(config_path=str(conf), config_name="config", version_base="1.3")(task)()

"""`python -m sae_experiments template DIR --for KIND`: a folder for an automated researcher."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from sae_experiments.errors import UserError
from sae_experiments.files import PACKAGE

#: Files of each kind of folder, below `templates/`; a folder stands for all that is in it.
KINDS = {
    "ai-scientist": ["ai_scientist"],
    "plain": ["ai_scientist/experiment.py", "ai_scientist/plot.py", "ai_scientist/notes.txt"],
    "tree-search": ["tree_search"],
    "evolution": ["evolution"],
    "greedy": ["ai_scientist/experiment.py", "ai_scientist/plot.py", "greedy"],
}
#: Kinds whose experiment.py can read a pretrained model instead.
PRETRAINED = ("ai-scientist", "plain")
#: Line of their OVERRIDES after which the settings of that task follow.
PRESET = '    "preset=laptop",\n'
#: Sizes of that task, so that a run ends well within the two hours of a harness on two CPU cores.
SIZES = (
    "fit.train_rows=300000",
    "fit.held_out_rows=32768",
    "fit.train.steps=600",
    "fit.train.batch_size=2048",
    "metric.downstream.windows=128",
    "metric.compression.windows=16",
)
#: The next step of the user, by kind.
NEXT = {
    "ai-scientist": "python experiment.py --out_dir=run_0, then start the harness",
    "plain": "python experiment.py --out_dir=run_0",
    "tree-search": "give script.py to the agent as its starting code",
    "evolution": "python evaluate.py --program_path initial.py --results_dir results",
    "greedy": "read program.md",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise a one-line error instead of printing the usage."""
        raise UserError(
            f"template: {message}; write python -m sae_experiments template DIR --for "
            f"{'|'.join(KINDS)}"
        )


def templates_folder() -> Path:
    """Folder of the templates: inside an installed package, beside it in a checkout."""
    installed = PACKAGE / "templates"
    return installed if installed.is_dir() else PACKAGE.parent / "templates"


def main(argv: Sequence[str]) -> int:
    """Make the folder.

    Args:
        argv: Arguments after `template`.

    Returns:
        Exit status, that of the baseline if it was asked for.

    Raises:
        UserError: An argument is wrong, or the folder is not empty.
    """
    parser = _Parser(prog="python -m sae_experiments template", description=__doc__)
    parser.add_argument("folder", type=Path, help="a new or empty folder")
    parser.add_argument("--for", dest="kind", choices=list(KINDS), default="plain")
    parser.add_argument("--lm", type=Path, help="directory of a pretrained model to read")
    parser.add_argument("--text", type=Path, help="text for that model, a file or a folder")
    parser.add_argument("--baseline", action="store_true", help="make run_0 by running it")
    options = parser.parse_args(argv)
    if options.baseline and "experiment.py" not in _files(options.kind):
        raise UserError(f"template: --baseline has nothing to run with --for {options.kind}")
    task = _task(options.kind, options.lm, options.text)
    copy(options.kind, options.folder, task)
    print(f"{options.folder}: {', '.join(sorted(_files(options.kind)))}", flush=True)
    if not options.baseline:
        print(f"next, in {options.folder}: {NEXT[options.kind]}")
        return 0
    return _baseline(options.folder)


def _task(kind: str, lm: Path | None, text: Path | None) -> list[str]:
    """Overrides that read a pretrained model; none without one."""
    if lm is None and text is None:
        return []
    if lm is None or text is None:
        raise UserError("template: a pretrained model needs both --lm=DIR and --text=FILE")
    if kind not in PRETRAINED:
        raise UserError(f"template: --lm goes with --for {' or '.join(PRETRAINED)}, not {kind}")
    for option, path, needed in (("lm", lm, lm / "config.json"), ("text", text, text)):
        if not needed.exists():
            raise UserError(f"template: --{option}={path}: {needed} does not exist")
    named = {"lm.path": lm.resolve(), "data.text.file": text.resolve()}
    paths = [f"{key}={path}" for key, path in named.items()]
    return ["lm=pretrained", "data=text", *paths, *SIZES]


def _files(kind: str) -> dict[str, Path]:
    """Files of a kind, by their path in the new folder."""
    files: dict[str, Path] = {}
    for name in KINDS[kind]:
        source = templates_folder() / name
        if source.is_file():
            files[source.name] = source
        for path in sorted(source.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                files[path.relative_to(source).as_posix()] = path
    return files


def copy(kind: str, folder: Path, task: Sequence[str] = ()) -> None:
    """Copy the files of a kind into a new or empty folder.

    Args:
        kind: One of `KINDS`.
        folder: The folder.
        task: Overrides of the task on a pretrained model; empty: the task on character models.

    Raises:
        UserError: The folder is not empty, or cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError(f"template: {folder} is not empty: name a new folder")
        for name, source in _files(kind).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            other = templates_folder() / "pretrained" / name
            shutil.copyfile(other if task and other.is_file() else source, folder / name)
        if task:
            _add_overrides(folder / "experiment.py", task)
    except OSError as error:
        raise UserError(
            f"template: {folder} cannot be written ({error.strerror}): name another folder"
        ) from error


def _add_overrides(script: Path, overrides: Sequence[str]) -> None:
    lines = "".join(f"    {override!r},\n" for override in overrides)
    text = script.read_text(encoding="utf-8")
    script.write_text(text.replace(PRESET, PRESET + lines), encoding="utf-8")


def _baseline(folder: Path) -> int:
    for command in (["experiment.py", "--out_dir=run_0"], ["plot.py"]):
        status = subprocess.run([sys.executable, *command], cwd=folder).returncode
        if status:
            return status
    return 0

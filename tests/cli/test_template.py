"""Folders for automated researchers work in their harnesses, whose steps are written anew here."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest

from sae_experiments.cli import template
from sae_experiments.errors import UserError
from support.common import ROOT, TINY
from support.pretrained import TEXT, folder_of


@pytest.fixture
def made(tmp_path):
    """Makes a folder of a kind."""

    def make(kind: str) -> Path:
        template.copy(kind, tmp_path / kind)
        return tmp_path / kind

    return make


def environment(folder: Path) -> dict[str, str]:
    nowhere = "http://127.0.0.1:9"
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SAE_", "HYDRA_"))}
    return kept | {
        "PYTHONPATH": str(ROOT),
        "SAE_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
        "https_proxy": nowhere,
        "http_proxy": nowhere,
    }


class Scientist:
    """The experiment step of The AI Scientist, version 1: it types one command and reads one
    file.
    """

    def __init__(self, template_folder: Path, results: Path) -> None:
        self.folder = results / "idea"
        shutil.copytree(template_folder, self.folder)
        self.env = environment(results)

    def python(self, *argv: str, timeout: float) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *argv]
        return subprocess.run(
            command,
            cwd=self.folder,
            env=self.env,
            stderr=subprocess.PIPE,
            text=True,
            timeout=timeout,
        )

    def experiment(self, number: int, timeout: float = 7200) -> tuple[int, str]:
        """One run: status, and what the model is told."""
        run = self.folder / f"run_{number}"
        shutil.copy(self.folder / "experiment.py", self.folder / f"run_{number}.py")
        try:
            done = self.python("experiment.py", f"--out_dir=run_{number}", timeout=timeout)
        except subprocess.TimeoutExpired:
            shutil.rmtree(run, ignore_errors=True)
            return 1, f"Run timed out after {timeout} seconds"
        if done.returncode:
            shutil.rmtree(run, ignore_errors=True)
            return done.returncode, done.stderr[-1500:]
        results = json.loads((run / "final_info.json").read_text())
        return 0, str({name: entry["means"] for name, entry in results.items()})

    def plot(self, timeout: float = 600) -> list[str]:
        done = self.python("plot.py", timeout=timeout)
        assert done.returncode == 0, done.stderr
        return sorted(path.name for path in self.folder.glob("*.png"))


def shrink(folder: Path) -> None:
    """Make the runs of a folder tiny: the one edit, so that a test takes seconds."""
    path = folder / "experiment.py"
    small = [*(o for o in TINY.split() if not o.startswith("sae.")), "data=[text8]"]
    small += ["report=false"]
    small += ["data.text8.stand_in=always", "metric=[reconstruction,sparsity,downstream]"]
    text = path.read_text()
    assert text.count('    "preset=laptop",\n') == 1
    text = text.replace('    "preset=laptop",\n', "".join(f"    {o!r},\n" for o in small))
    path.write_text(text.replace('"sae.target_l0=32"', '"sae.target_l0=4"'))


def test_a_run_and_pictures_come_out_of_the_scientists_folder(made, tmp_path):
    folder = made("ai-scientist")
    shrink(folder)
    scientist = Scientist(folder, tmp_path / "results")
    status, told = scientist.experiment(1)
    assert status == 0, told
    assert len(told) < 1500 and "'sae_fvu_mean': " in told and "None" not in told
    pictures = scientist.plot()
    named = re.findall(r"includegraphics.*\{(.*?)\}", (folder / "latex/template.tex").read_text())
    assert named and set(named) <= set(pictures) and len(pictures) <= 10
    manifest = json.loads((scientist.folder / "run_1" / "manifest.json").read_text())
    assert manifest["config"]["time_limit_s"] < 7200 and manifest["plan"] == "plain"
    kept = (scientist.folder / "run_1" / "source" / "experiment.py").read_text()
    assert kept == (scientist.folder / "run_1.py").read_text()


@pytest.mark.slow
def test_an_edit_is_the_only_difference_and_a_broken_one_is_told_by_its_law(made, tmp_path):
    folder = made("ai-scientist")
    shrink(folder)
    scientist = Scientist(folder, tmp_path / "results")
    script = scientist.folder / "experiment.py"
    plain = script.read_text()
    assert scientist.experiment(1)[0] == 0
    script.write_text(plain.replace("penalty: float = 0.0", "penalty: float = 0.1"))
    assert scientist.experiment(2)[0] == 0
    one, two = (
        json.loads((scientist.folder / f"run_{i}" / "manifest.json").read_text()) for i in (1, 2)
    )
    assert one["config"]["sae"]["model"].pop("penalty") == 0.0
    assert two["config"]["sae"]["model"].pop("penalty") == 0.1
    for each in (one, two):
        each["config"].pop("out_dir")
    assert one["config"] == two["config"]
    script.write_text(
        plain.replace("return self.k\n", "self.b_dec.data += 1\n        return self.k\n")
    )
    status, told = scientist.experiment(3)
    assert status == 2 and "breaks the law 'the loss changes nothing'" in told.splitlines()[-1]
    assert re.search(r"gave \d+\.\d+ and \d+\.\d+", told)
    assert not (scientist.folder / "run_3").exists()
    script.write_text(
        plain.replace("time_limit_s=6600", "time_limit_s=20").replace(
            "fit.train.steps=12", "fit.train.steps=1000000"
        )
    )
    began = time.monotonic()
    assert scientist.experiment(4, timeout=60)[0] == 0 and time.monotonic() - began < 50
    assert "final_metrics.png" in scientist.plot()


@pytest.mark.slow
def test_the_folder_works_with_its_defaults(made, tmp_path):
    scientist = Scientist(made("ai-scientist"), tmp_path / "results")
    status, told = scientist.experiment(1)
    assert status == 0, told
    assert set(re.findall(r"'(\w+)': \{", told)) == {"shakespeare_char", "enwik8", "text8"}
    assert scientist.plot()


#: Sizes of a run on a tiny pretrained model.
TINY_SIZES = (
    "lm.n_positions=16",
    "fit.train_rows=3000",
    "fit.held_out_rows=1024",
    "fit.calibration_rows=512",
    "fit.init_rows=512",
    "fit.train.steps=12",
    "fit.train.batch_size=128",
    "metric=[reconstruction,sparsity,downstream]",
    "metric.downstream.windows=16",
    "report=false",
)


def test_the_second_task_reads_a_pretrained_model(tmp_path, monkeypatch):
    model = folder_of(tmp_path / "a model #ü, [1]")
    text = tmp_path / "b=c text.txt"
    text.write_text(TEXT)
    monkeypatch.setattr(template, "SIZES", TINY_SIZES)
    folder = tmp_path / "folder"
    given = ["--lm", str(model), "--text", str(text)]
    assert template.main([str(folder), "--for", "ai-scientist", *given]) == 0
    assert (
        "sae_fvu_ordinary" in json.loads((folder / "prompt.json").read_text())["task_description"]
    )
    script = folder / "experiment.py"
    script.write_text(script.read_text().replace("target_l0=32", "target_l0=4"))
    scientist = Scientist(folder, tmp_path / "results")
    status, told = scientist.experiment(1)
    assert status == 0, told
    manifest = json.loads((scientist.folder / "run_1" / "manifest.json").read_text())
    assert manifest["config"]["lm"]["path"] == str(model)
    assert manifest["config"]["data"]["text"]["file"] == str(text)
    assert "'text': {" in told and "'sae_fvu_mean': " in told


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--lm=DIR"], "needs both --lm=DIR and --text=FILE"),
        (["--text=FILE"], "needs both --lm=DIR and --text=FILE"),
        (["--lm=DIR", "--text=FILE"], "config.json does not exist"),
        (["--lm=DIR", "--text=FILE", "--for=greedy"], "--lm goes with --for ai-scientist or plain"),
    ],
)
def test_a_wrong_second_task_makes_no_folder(tmp_path, given, told):
    with pytest.raises(UserError, match=told):
        template.main([str(tmp_path / "new"), *given])
    assert not (tmp_path / "new").exists()


def test_ideas_and_prompt_are_as_the_harness_reads_them():
    folder = template.templates_folder() / "ai_scientist"
    prompt = json.loads((folder / "prompt.json").read_text())
    other = json.loads((template.templates_folder() / "pretrained" / "prompt.json").read_text())
    assert set(prompt) == set(other) == {"system", "task_description"}
    assert 1 <= len(json.loads((folder / "seed_ideas.json").read_text())) <= 3
    for name in ("seed_ideas.json", "ideas.json"):
        for idea in json.loads((folder / name).read_text()):
            assert (
                re.fullmatch(r"[a-z_0-9]+", idea["Name"]) and idea["Title"] and idea["Experiment"]
            )
            scores = [idea[k] for k in ("Interestingness", "Feasibility", "Novelty")]
            assert all(isinstance(s, int) and 1 <= s <= 10 for s in scores)
            assert idea.get("novel", False) is (name == "ideas.json")
    latex = (folder / "latex" / "template.tex").read_text()
    for needed in (
        r"\begin{filecontents}{references.bib}",
        r"\end{filecontents}",
        r"\graphicspath{{../}}",
    ):
        assert needed in latex
    packages = set(re.findall(r"\\usepackage(?:\[.*?\])?\{(.*?)\}", latex))
    assert packages <= {
        "geometry",
        "inputenc",
        "fontenc",
        "amsmath,amssymb",
        "graphicx",
        "booktabs",
        "natbib",
        "hyperref",
    }


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="there is no pdflatex")
def test_the_paper_compiles_with_a_picture_and_a_citation(made):
    folder = made("ai-scientist")
    plt.imsave(folder / "final_metrics.png", np.zeros((2, 2)))
    paper = folder / "latex" / "template.tex"
    text = paper.read_text()
    paper.write_text(text.replace("RELATED WORK HERE", r"See \citep{gao2024scaling}."))
    typeset = ["pdflatex", "-interaction=nonstopmode", paper.name]
    for command in (typeset, ["bibtex", paper.stem], typeset, typeset):
        done = subprocess.run(command, cwd=paper.parent, capture_output=True, check=False)
        assert done.returncode == 0, done.stdout
    log = paper.with_suffix(".log").read_text(errors="replace")
    assert paper.with_suffix(".pdf").stat().st_size > 10_000
    assert "undefined" not in log


@pytest.mark.parametrize("kind", template.KINDS)
def test_every_kind_is_copied_whole_and_never_over_something(made, kind):
    folder = made(kind)
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert files == set(template._files(kind)) and kind in template.NEXT
    for path in folder.rglob("*.py"):
        compile(path.read_text(), path.name, "exec")
    with pytest.raises(UserError, match="not empty"):
        template.copy(kind, folder)


def test_a_wrong_word_is_told_in_one_line():
    with pytest.raises(UserError, match="invalid choice: 'nosuch'.*--for ai-scientist|plain"):
        template.main(["x", "--for", "nosuch"])
    with pytest.raises(UserError, match="--baseline has nothing to run"):
        template.main(["x", "--for", "evolution", "--baseline"])


# ------------------------------------------------------------------------------------------------
# evolution


@pytest.fixture
def evaluator(made, monkeypatch) -> Any:
    """The module `evaluate.py`, with its initial program beside it."""
    folder = made("evolution")
    monkeypatch.setenv("TRIAL_SEEDS", "5")
    monkeypatch.setenv("TRIAL_STEPS", "30")
    monkeypatch.chdir(folder)
    spec = importlib.util.spec_from_file_location("evaluate_of_test", folder / "evaluate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_program_gets_a_score_and_one_at_another_l0_none(evaluator, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--results_dir", "out"])
    assert evaluator.main() == 0
    metrics, correct = (
        json.loads(Path(f"out/{n}.json").read_text()) for n in ("metrics", "correct")
    )
    assert 0 < metrics["combined_score"] == metrics["public"]["truth_f1"] <= 1
    assert correct == {"correct": True, "error": None}
    text = Path("initial.py").read_text()
    assert re.search(r"^# EVOLVE-BLOCK-START$.*^# EVOLVE-BLOCK-END$", text, re.M | re.S)
    method = "    def finish(self, phase, x):\n        self.calibrate_threshold(x, 2 * self.k)\n"
    Path("cheat.py").write_text(text.replace("    def budget", f"{method}\n    def budget"))
    monkeypatch.setattr(
        sys, "argv", ["evaluate.py", "--program_path", "cheat.py", "--results_dir", "out"]
    )
    assert evaluator.main() == 0
    metrics, correct = (
        json.loads(Path(f"out/{n}.json").read_text()) for n in ("metrics", "correct")
    )
    assert metrics["combined_score"] == 0 and not correct["correct"]
    assert re.search(r"sae_l0 is [78]\.\d+, must be 4 within 2%", correct["error"])
    Path("wrong.py").write_text("1/0")
    assert evaluator.evaluate("wrong.py")["combined_score"] == 0


# ------------------------------------------------------------------------------------------------
# tree search

#: Executes a file as these harnesses do: empty namespace, bare output object, foreign arguments.
EXECUTOR = """
import sys
text = open("script.py").read()
class Bare:
    def __init__(self, file): self.file = file
    def write(self, text): self.file.write(text)
    def flush(self): self.file.flush()
sys.stdout = sys.stderr = Bare(sys.stdout)
sys.argv = ["harness", "--option"]
try:
    exec(compile("seed = 3\\n" + text, "script.py", "exec"), {})
    print("ended")
except BaseException as error:
    print("raised", type(error).__name__)
"""


def execute(folder: Path, steps: int) -> subprocess.Popen[str]:
    env = environment(folder) | {"TRIAL_STEPS": str(steps)}
    command = [sys.executable, "-c", EXECUTOR]
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_the_one_file_script_runs_as_a_string_in_an_empty_namespace(made):
    import numpy as np

    folder = made("tree-search")
    assert len((folder / "script.py").read_text().splitlines()) < 300
    out, _ = execute(folder, 40).communicate(timeout=600)
    assert out.endswith("ended\n"), out
    tail = out[-2500:]
    assert re.search(r"^mean truth_f1: 0\.\d{6}$", tail, re.M)
    assert tail.count("truth_mcc: ") == 3 and "validation loss" in out
    data = np.load(folder / "working" / "experiment_data.npy", allow_pickle=True).item()
    assert set(data) == {"trees", "flat", "noisy"}
    for entry in data.values():
        assert entry["metrics"]["val"] and entry["losses"]["val"] and not entry["cut"]
    assert len(list((folder / "working").glob("*.png"))) == 3


@pytest.mark.slow
def test_the_one_file_script_ends_soon_after_the_first_of_many_interrupts(made):
    folder = made("tree-search")
    (folder / "working").mkdir()
    (folder / "working" / "experiment_data.npy").write_bytes(b"stale")
    process = execute(folder, 1_000_000)
    deadline = time.monotonic() + 240
    while (folder / "working" / "experiment_data.npy").exists() and time.monotonic() < deadline:
        time.sleep(0.5)
    time.sleep(5)
    began = time.monotonic()
    try:
        while process.poll() is None and time.monotonic() - began < 60:
            process.send_signal(signal.SIGINT)
            time.sleep(1)
    finally:
        process.kill()
    out = process.communicate()[0]
    assert "raised KeyboardInterrupt" in out and time.monotonic() - began < 6

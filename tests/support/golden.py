"""Golden numbers: the first losses and results of every study and SAE variant.

A refactoring leaves them bit-identical. A commit that moves them on purpose writes them anew
(`make golden`) and says why. They lie in tests/golden/, one JSON file per job, with the kind of
machine they were made on. On that kind they must match exactly; on another kind only the losses
that do not amplify rounding are compared (see `tests/test_golden.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "tests" / "golden"
STEPS = 30
#: Results that are measured with a clock, or count what the clock decides.
TIMED = {
    "total_train_time",
    "lm_train_time",
    "toy_train_time",
    "avg_inference_tokens_per_second",
    "sae_train_time",
    "sae_tokens_per_second",
    "attribution_targets_per_second",
}
#: SAEs that need a language model, several sites or a study of their own.
NOT_PLANTED = {
    "cross_layer_jumprelu",
    "cross_layer_transcoder",
    "crosscoder",
    "end_to_end",
    "kl_rate",
    "per_layer_transcoder",
    "purified_adaptive",
    "purified_mixed",
    "skip_transcoder",
    "transcoder",
}
WORDS = (
    "sparse code small model reads long text writes short notes about rivers hills rain "
    "and the old names of birds that sing before seven in the morning"
)


def variants() -> list[str]:
    """Every SAE that conf/sae offers and that is trained here, by name."""
    names = sorted(p.stem for p in (ROOT / "conf" / "sae").glob("*.yaml"))
    return [name for name in names if not name.startswith("_") and name != "saelens"]


def jobs() -> dict[str, list[str]]:
    """Overrides of each golden job, without the folders."""
    # Without `kl_rate`: it belongs to the palindrome study, whose job has it.
    family = ",".join(name for name in variants() if name != "kl_rate")
    text = [
        "data=[shakespeare_char]",
        "corpus_size=smoke",
        "lm.train.steps=30",
        "lm.train.log_every=1",
    ]
    text += ["lm.precision=fp32", "fit.train_rows=6000", "fit.held_out_rows=1024"]
    text += [f"fit.train.steps={STEPS}", "fit.train.log_every=1"]
    return {
        "family": [*text, f"sae=[{family}]", "metric=[reconstruction,sparsity]", "sae.target_l0=8"],
        "circuits": [*text, "study=circuits"],
        "planted": [
            "study=ground_truth",
            f"sae=[{','.join(name for name in variants() if name not in NOT_PLANTED)}]",
            "study.train.log_every=1",
            f"study.train.steps={STEPS}",
        ],
        "palindrome": [
            "study=palindrome",
            f"study.train.steps={STEPS}",
            "study.train.log_every=1",
            f"study.fit.train.steps={STEPS}",
            "study.fit.train.log_every=1",
        ],
        "superposition": [
            "study=superposition",
            "study.depths=[1,2,3]",
            "study.hidden=[2,4]",
            "study.train.steps=40",
            "study.probe.depth=3",
            "study.probe.hidden=4",
            "study.probe.train.steps=40",
            "study.instances=2",
        ],
    }


def write_text(path: Path) -> None:
    """A fixed text, the same on every machine: the job must not depend on which corpora are
    here.
    """
    chance, words = random.Random(0), WORDS.split()
    lines = (" ".join(chance.choice(words) for _ in range(12)) for _ in range(4000))
    path.write_text("\n".join(lines))


def run_job(name: str, folder: Path) -> dict[str, Any]:
    """Run one job in `folder` on one thread; returns its losses and results."""
    text = folder / "golden.txt"
    write_text(text)
    argv = [sys.executable, str(ROOT / "experiment.py"), f"--out_dir={name}", f"runs_root={folder}"]
    argv += [f"cache={folder / 'cache'}", "preset=smoke", "seeds=[0]", "threads=1", "report=false"]
    argv += ["offline=true", f"data.shakespeare_char.file={text}", *jobs()[name]]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    done = subprocess.run(argv, env={**os.environ, **threads}, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"golden job {name} ended with {done.returncode}: {done.stderr[-2000:]}")
    return {"losses": losses(folder / name), "results": results(folder / name)}


def losses(run: Path) -> dict[str, list[float]]:
    """Loss curves of a run by `<dataset and seed>/<stage>`."""
    out: dict[str, list[float]] = {}
    for path in sorted((run / "curves").glob("*.jsonl")):
        for line in path.read_text().splitlines():
            point = json.loads(line)
            stage, _, curve = point["name"].rpartition("/")
            if curve == "loss":
                out.setdefault(f"{path.stem}/{stage}", []).append(point["value"])
    return out


def results(run: Path) -> dict[str, float | None]:
    """Final numbers of a run by `<dataset>/<metric>`, without those measured with a clock."""
    final = json.loads((run / "final_info.json").read_text())
    return {
        f"{dataset}/{name}": values[0]
        for dataset, info in sorted(final.items())
        for name, values in sorted(info["final_info_dict"].items())
        if name not in TIMED
    }


def machine() -> dict[str, str]:
    """What decides the last bits of a number: library versions and the kind of processor."""
    import numpy
    import torch

    cpu = {}
    if Path("/proc/cpuinfo").exists():
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
        pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
        cpu = {key.strip(): value.strip() for key, value in pairs}
    return {
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "processor": " ".join(cpu.get(key, "") for key in ("vendor_id", "cpu family", "model")),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


def main() -> None:
    """Write the golden numbers of the named jobs (default: all)."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("names", nargs="*", default=list(jobs()))
    for name in parser.parse_args().names:
        with tempfile.TemporaryDirectory() as folder:
            value = {"machine": machine(), **run_job(name, Path(folder))}
        FOLDER.mkdir(exist_ok=True)
        text = json.dumps(value, indent=1, sort_keys=True)
        (FOLDER / f"{name}.json").write_text(text + "\n")
        print(f"{name}: {len(value['losses'])} curves, {len(value['results'])} results")


if __name__ == "__main__":
    main()

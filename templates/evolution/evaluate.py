"""Score a program: python evaluate.py --program_path initial.py --results_dir results

Writes results/metrics.json (combined_score = mean F1 of the latents as detectors of the true
features, at 4 active latents per row) and results/correct.json. A program is refused if its L0 is
off by more than 2 %, if a score is not finite, or if it raises. Keep this file, and the seeds in
it, out of the reach of what evolves. `evaluate(program_path)` returns the same scores.
"""

import argparse
import importlib.util
import json
import math
import os
import traceback

from sae_experiments.trial import K, trial

SEEDS = [int(s) for s in os.environ.get("TRIAL_SEEDS", "101,102,103").split(",")]
STEPS = int(os.environ.get("TRIAL_STEPS", "1500"))
SECONDS = float(os.environ.get("TRIAL_SECONDS", "240"))  # of all seeds together
TOLERANCE = 0.02
PUBLIC = ("truth_f1", "truth_mcc", "sae_fvu", "sae_l0", "sae_dead_frac")


class Refused(ValueError):
    """A program whose scores do not count."""


def validate(scores):
    """Refuse scores that are not finite, or that were reached at another L0."""
    for name in PUBLIC:
        if scores[name] is None or not math.isfinite(scores[name]):
            raise Refused(f"{name} is {scores[name]}, must be a finite number")
    if abs(scores["sae_l0"] - K) > TOLERANCE * K:
        raise Refused(f"sae_l0 is {scores['sae_l0']:.3f}, must be {K} within {TOLERANCE:.0%}")


def score(program_path):
    """The mean scores of a program over the seeds."""
    spec = importlib.util.spec_from_file_location("program", program_path)
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    model, lr = program.candidate()
    trials = [
        trial(model, seed=seed, steps=STEPS, lr=lr, seconds=SECONDS / len(SEEDS)) for seed in SEEDS
    ]
    for each in trials:
        validate(each.metrics)
    means = {name: sum(t.metrics[name] for t in trials) / len(trials) for name in PUBLIC}
    return means | {"seconds": sum(t.seconds for t in trials)}


def evaluate(program_path):
    """The scores with `combined_score`, which is 0 for a program that is refused."""
    try:
        scores = score(program_path)
    except Exception as error:
        return {"combined_score": 0.0, "error": f"{type(error).__name__}: {error}"}
    return {"combined_score": scores["truth_f1"], **scores}


def main():
    """Write metrics.json and correct.json; returns 0, as callers read the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--program_path", default="initial.py")
    parser.add_argument("--results_dir", default="results")
    options = parser.parse_args()
    os.makedirs(options.results_dir, exist_ok=True)
    error = None
    try:
        public = score(options.program_path)
    except Exception as fault:
        traceback.print_exc()
        public, error = {}, f"{type(fault).__name__}: {fault}"
    combined = public.get("truth_f1", 0.0)
    feedback = error or ", ".join(f"{name} {value:.4f}" for name, value in public.items())
    metrics = {
        "combined_score": combined,
        "public": public,
        "private": {},
        "text_feedback": feedback,
    }
    for name, content in (
        ("metrics.json", metrics),
        ("correct.json", {"correct": error is None, "error": error}),
    ):
        with open(os.path.join(options.results_dir, name), "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1, allow_nan=False)
    print(f"combined_score: {combined:.6f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Command line of steering, `python -m sae_experiments.steer RUN --latent 123 --prompt TEXT`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from sae_experiments.console import nobody_reads
from sae_experiments.errors import UserError

#: Options with their types, defaults and explanations; all but the first two may be left out.
OPTIONS = (
    ("--latent", int, None, "number of the latent"),
    ("--prompt", str, None, "text to continue"),
    ("--strength", float, 4.0, "in units of the latent's largest activation on held-out text"),
    ("--length", int, 100, "tokens to write"),
    ("--sae", str, None, "name of a folder in RUN/saes (default: the first one)"),
    ("--maximum", float, None, "largest activation (default: as the run's feature data say)"),
    ("--seed", int, 0, "seed of the sampling"),
)


def main(argv: Sequence[str]) -> int:
    """Print the continuations side by side; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m sae_experiments.steer",
        description="Continue a text while a latent's direction is added to the language model.",
    )
    parser.add_argument("run", help="folder of a run with a language model and a saved SAE")
    for i, (name, kind, default, text) in enumerate(OPTIONS):
        parser.add_argument(name, type=kind, default=default, required=i < 2, help=text)
    given = vars(parser.parse_args(list(argv)))
    try:
        from sae_experiments.steering import steer  # loads torch, which --help does not need

        texts = steer(given.pop("run"), **given)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_status
    try:
        for strength, text in texts.items():
            print(f"{strength:+4g}: {given['prompt']}|{text}", flush=True)
    except BrokenPipeError:
        return nobody_reads()
    return 0

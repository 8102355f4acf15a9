"""FVU and dead latents of every variant at multiples of its default learning rate.

    python benchmarks/rates.py collect --model DIR --text FILE --site resid.15 rows.npy
    python benchmarks/rates.py fit rows.npy [--saes topk,gated] [--d-sae 4608] [--steps 600]
    python benchmarks/rates.py fit planted:256
    python benchmarks/rates.py draw rates.png

`collect` writes rows of a Hugging Face causal language model: windows of 128 tokens that open with
its begin token, position 0 left out. `fit` takes such a file, or sparse rows of a given width, and
appends one JSON line per fit to `--results`; finished fits are skipped, so that it may be stopped
and started again. `draw` makes the figure of docs/learning-rate.md.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

VARIANTS = ("topk", "batch_topk", "matryoshka", "standard", "jumprelu", "gated")
FACTORS = (0.25, 0.5, 1.0, 2.0)
WINDOW = 128
HELD_OUT = 0.1  # share of the rows


def collect(args: argparse.Namespace) -> None:
    """Write rows of a language model at a site, as float16."""
    import torch
    from transformers import AutoTokenizer

    from sae_experiments.models.hooks import activations, parse_site
    from sae_experiments.models.local import load_local

    model = load_local(Path(args.model), context=WINDOW, device=torch.device("cpu")).model
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = Path(args.text).read_text(encoding="utf-8", errors="replace")
    ids = tokenizer(text[: 6 * args.rows], add_special_tokens=False)["input_ids"]
    n = min(args.rows // (WINDOW - 1), len(ids) // (WINDOW - 1))
    windows = torch.tensor(ids[: n * (WINDOW - 1)]).view(n, WINDOW - 1)
    windows = torch.nn.functional.pad(windows, (1, 0), value=tokenizer.bos_token_id)
    windows = windows[torch.randperm(n, generator=torch.Generator().manual_seed(0))]
    site = parse_site(args.site, model.config.num_hidden_layers)
    parts = [activations(model, w, [site])[site][:, 1:].flatten(0, 1) for w in windows.split(32)]
    np.save(args.out, torch.cat(parts).half().numpy())


def planted(width: int, n: int = 200_000) -> Any:
    """Sums of a few of `4 * width` directions, whose frequencies fall as a power, and noise."""
    import torch

    g = torch.Generator().manual_seed(width)
    directions = torch.nn.functional.normalize(torch.randn(4 * width, width, generator=g), dim=1)
    frequency = torch.arange(1, 4 * width + 1) ** -0.7
    frequency = (frequency / frequency.sum() * min(24, width / 6)).clamp(max=0.5)
    parts = []
    for _ in range(n // 4000):
        on = torch.rand(4000, 4 * width, generator=g) < frequency
        strength = torch.rand(4000, 4 * width, generator=g) + 0.5
        noise = torch.randn(4000, width, generator=g)
        parts.append((on * strength) @ directions + 0.02 * noise)
    return torch.cat(parts)


def fit(args: argparse.Namespace) -> None:
    """Fit every variant at its default rate and at multiples of it."""
    import torch

    from sae_experiments import build_sae, evaluate, fit_saes

    if args.rows.startswith("planted:"):
        x = planted(int(args.rows.removeprefix("planted:")))
    else:
        x = torch.from_numpy(np.load(args.rows))
    n_held = round(HELD_OUT * len(x))
    held, x = x[-n_held:].float(), x[:-n_held]
    width = x.shape[1]

    def built() -> Any:
        return build_sae(name, width, target_l0=args.l0, d_sae=args.d_sae or 8 * width)

    for name in args.saes.split(","):
        # The fit counts directions on its own sample, without outlier rows.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            default = fit_saes(built(), x, steps=1, batch_size=args.batch)["sae"].lr
        for factor in (float(f) for f in args.factors.split(",")):
            sae = built()
            # With the default rate the fit may step back; typed rates are taken as they are.
            lr = None if factor == 1 else factor * default
            what = {
                "rows": args.rows if args.rows.startswith("planted:") else Path(args.rows).stem,
                "width": width,
                "sae": name,
                "d_sae": sae.d_sae,
                "l0": args.l0,
                "steps": args.steps,
                "batch_size": args.batch,
                "factor": factor,
                "default_lr": default,
            }
            train = {"steps": args.steps, "batch_size": args.batch, "lr": lr}
            if args.beta2 is not None:
                what["beta2"] = args.beta2
                train["betas"] = (0.9, args.beta2)
            if what in [result["what"] for result in results(args.results)]:
                continue
            began = time.monotonic()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                report = fit_saes(sae, x, **train)["sae"]
            measured = evaluate(sae, held)
            line = {
                "what": what,
                "fvu": measured["sae_fvu_ordinary"],
                "dead": measured["sae_dead_frac"],
                "lr": report.lr,
                "lr_factor": report.lr_factor,
                "warnings": [one.key for one in report.warned],
                "fvu_curve": [(s, v) for s, k, v in report.history if k == "fvu"],
                "dead_curve": [(s, v) for s, k, v in report.history if k == "dead_frac"],
                "seconds": round(time.monotonic() - began, 1),
            }
            with Path(args.results).open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(
                name, f"{factor:g}", f"FVU {line['fvu']:.4f}, dead {line['dead']:.1%}", flush=True
            )


def results(path: str) -> list[dict[str, Any]]:
    """The finished fits."""
    if not Path(path).exists():
        return []
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def draw(args: argparse.Namespace) -> None:
    """FVU relative to the best of a variant over the multiples, one panel per kind of rows."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    fits = results(args.results)
    several = collections.Counter((f["what"]["rows"], f["what"]["sae"]) for f in fits)
    sources = list(dict.fromkeys(rows for (rows, _), n in several.items() if n > 1))
    n_columns = min(len(sources), 3)
    n_rows = -(-len(sources) // n_columns)
    size = (3.2 * n_columns, 3.2 * n_rows)
    fig, axes = plt.subplots(n_rows, n_columns, figsize=size, sharey=True, squeeze=False)
    for ax in axes.flat[len(sources) :]:
        ax.set_axis_off()
    for ax, source in zip(axes.flat, sources, strict=False):
        mine = [f for f in fits if f["what"]["rows"] == source]
        for name in VARIANTS:
            of_name = sorted(
                (f for f in mine if f["what"]["sae"] == name), key=lambda f: f["what"]["factor"]
            )
            if len(of_name) < 2:
                continue
            best = min(f["fvu"] for f in of_name)
            factors = [f["what"]["factor"] for f in of_name]
            colour = f"C{VARIANTS.index(name)}"
            heights = [f["fvu"] / best for f in of_name]
            ax.plot(factors, heights, marker="o", ms=4, color=colour, label=name)
            dead = [f for f in of_name if f["dead"] > 0.05]
            ax.plot(
                [f["what"]["factor"] for f in dead],
                [f["fvu"] / best for f in dead],
                "x",
                ms=10,
                color=colour,
            )
        ax.axhspan(1, 1.05, color="0.92", zorder=0)
        ax.set_xscale("log", base=2)
        ax.set_xticks(FACTORS, [f"{f:g}" for f in FACTORS])
        ax.set_title(f"{source.split('.')[0]}, width {mine[0]['what']['width']}", fontsize=10)
        ax.legend(fontsize=8, frameon=False)
        ax.set_xlabel("times the default rate")
    for ax in axes[:, 0]:
        ax.set_ylabel("FVU, relative to the best")
    axes[0][0].set_ylim(0.98, 1.6)
    fig.tight_layout()
    fig.savefig(args.out, dpi=130)


def main() -> None:
    """Run one of the three commands."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("collect")
    one.add_argument("--model", required=True)
    one.add_argument("--text", required=True)
    one.add_argument("--site", default="resid.mid")
    one.add_argument("--rows", type=int, default=300_000)
    one.add_argument("out")
    one.set_defaults(run=collect)
    one = commands.add_parser("fit")
    one.add_argument("rows")
    one.add_argument("--saes", default=",".join(VARIANTS))
    one.add_argument("--factors", default=",".join(map(str, FACTORS)))
    one.add_argument("--d-sae", type=int)
    one.add_argument("--l0", type=float, default=32)
    one.add_argument("--steps", type=int, default=600)
    one.add_argument("--batch", type=int, default=2048)
    one.add_argument("--beta2", type=float, help="decay rate of Adam's second moment")
    one.add_argument("--results", default="rates.jsonl")
    one.set_defaults(run=fit)
    one = commands.add_parser("draw")
    one.add_argument("--results", default="rates.jsonl")
    one.add_argument("out")
    one.set_defaults(run=draw)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()

"""The pages of `python experiment.py --help` and `python -m sae_experiments list`.

Both read the YAML files as text, so that they work if a file is wrong.
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

from sae_experiments.config import own
from sae_experiments.config.checks import options

WIDTH = 100
PAGE = """\
Train a small language model, fit a sparse autoencoder (SAE) to its activations, evaluate it.

  python experiment.py --out_dir=run_1                  the run that plan '{plan}' calls run_1
  python experiment.py --out_dir=mine sae=topk          another SAE (the language models are reused)
  python experiment.py --out_dir=many 'sae=[topk,batch_topk]' 'sae.target_l0=[16,32]'
                                                        several SAEs in one pass
  python experiment.py -m out_dir=sweep_a sae=standard,topk sae.target_l0=16,32
                                                        a sweep: one run for each combination
  python experiment.py sweep=variants launcher=joblib   a sweep of conf/sweep, jobs in parallel
  python plot.py                                        figures and a comparison with run_0
  python -m sae_experiments list                        every choice below, in one line each

Every option is key=value or --key=value. Results go to runs/<out_dir>/final_info.json.

Choices (conf/<group>/<name>.yaml)
{groups}
Plan '{plan}' (PLAN in experiment.py)
  others: {plans}
{runs}
Frequent options
  sae.target_l0=32        latents active on average        sae.expansion=8     d_sae / d_in
  site=resid.mid          which activations are read       seeds=[0,1,2]       of every corpus
  data=[text8]            which corpora                    device=auto         auto, cpu or cuda
  fit.train.steps=1000    steps of the SAE                 lm.train.steps=900  steps of the model
  time_limit_s=7000       stop in good order before that   overwrite=true      replace other results
  cache=DIR (SAE_CACHE)   language models, activations     verbosity=normal    quiet | verbose
  report=true             report.html at the end           study.replicas=1    more seeds per SAE

  SAE_DATA_DIR=DIR        a folder with the corpora (else they are fetched once, checked and cached)
  --cfg job               print the whole configuration instead of running
"""
HELP_GROUPS = ("preset", "data", "sae", "metric", "study", "lm", "track", "sweep", "launcher")
#: Groups of `list`, with their headings.
LISTED = {
    "sae": "SAE variants (sae=NAME)",
    "metric": "Metrics (metric=[NAME,...])",
    "study": "Studies (study=NAME)",
    "plan": "Plans (PLAN in experiment.py)",
    "preset": "Presets (preset=NAME)",
    "data": "Corpora (data=[NAME,...])",
    "sweep": "Sweeps (sweep=NAME)",
    "launcher": "Launchers of sweeps (launcher=NAME)",
}


def help_page(conf: Path, plan: str) -> str:
    """The page of --help, with the groups and plans in `conf`."""
    groups = ""
    for group in HELP_GROUPS:
        names = ["auto"] * (group == "preset") + options(conf, group)
        indent = " " * 11
        row = textwrap.fill("  ".join(names), WIDTH - 12, subsequent_indent=indent)
        groups += f"  {group:<8} {row}\n"
    return PAGE.format(
        plan=plan,
        groups=groups,
        plans=", ".join(name for name in options(conf, "plan") if name != plan),
        runs=_runs(conf, plan),
    )


def list_page(conf: Path) -> str:
    """Page that `list` prints: one line per choice, from the comment at the top of its file."""
    parts = []
    for group, heading in LISTED.items():
        names = options(conf, group)
        width = max(map(len, names))
        lines = [_shortened(f"  {name:<{width}}  {_comment(conf, group, name)}") for name in names]
        parts.append("\n".join([heading, *lines]))
    return "\n\n".join(parts)


def _comment(conf: Path, group: str, name: str) -> str:
    path = conf / group / f"{name}.yaml"
    return comment_of(path) if path.exists() else own.comment(group, name)


def comment_of(path: Path) -> str:
    """The first sentence of the comment at the top of a YAML file."""
    words: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            words.append(line.lstrip("# "))
    return re.split(r"(?<=\.) (?=[A-Z])", " ".join(words))[0]


def _shortened(line: str) -> str:
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 3].rsplit(' ', 1)[0]} ..."


def _runs(conf: Path, plan: str) -> str:
    """The runs of a plan as they stand in its file."""
    path = conf / "plan" / f"{plan}.yaml"
    if not path.exists():
        return "  (no such plan)\n"
    lines = [line.rstrip() for line in path.read_text().splitlines()]
    heads = [i for i, line in enumerate(lines) if line.startswith("runs:")]
    below = lines[heads[0] + 1 :] if heads else []
    shown = [line for line in below if line.strip() and not line.strip().startswith("#")]
    return "\n".join(shown) + "\n"

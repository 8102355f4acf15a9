"""The page that ``python experiment.py --help`` prints: written for someone who has never seen the project."""

from __future__ import annotations

from pathlib import Path

PAGE = """\
Train a small language model, fit a sparse autoencoder (SAE) to its activations, evaluate it.

  python experiment.py --out_dir=run_1                  the run that plan '{plan}' calls run_1
  python experiment.py --out_dir=mine sae=topk          another SAE (the language models are reused)
  python experiment.py --out_dir=many 'sae=[topk,batch_topk]' 'sae.target_l0=[16,32]'
                                                        several SAEs in one pass over the activations
  python experiment.py -m out_dir=sweep_a sae=standard,topk sae.target_l0=16,32
                                                        a sweep: one run for each combination
  python experiment.py sweep=variants launcher=joblib   a sweep of conf/sweep, several jobs at a time
  python plot.py                                        figures and a comparison with run_0

Every option is key=value or --key=value. Results go to runs/<out_dir>/final_info.json.

Choices (conf/<group>/<name>.yaml)
{groups}
Plan '{plan}' (PLAN in experiment.py)
  conf/plan has {plans}
{runs}
Frequent options
  sae.target_l0=32        latents active on average        sae.expansion=8     d_sae / d_in
  site=resid.mid          which activations are read       seeds=[0,1,2]       seeds for every corpus
  data=[text8]            which corpora                    device=auto         auto, cpu or cuda
  fit.train.steps=1500    steps of the SAE                 lm.train.steps=900  steps of the language model
  time_limit_s=7000       stop in good order before that   overwrite=true      replace other results
  cache=DIR (SAE_CACHE)   language models, activations     verbosity=normal    quiet, normal or verbose
  report=true             report.html at the end           study.replicas=1    more seeds, for stability

  SAE_DATA_DIR=DIR        a folder with the corpora (else they are fetched once, checked and cached)
  --cfg job               print the whole configuration instead of running
"""


def help_page(conf: Path, plan: str) -> str:
    """The page, with the groups and plans that exist in ``conf``."""
    groups = []
    for group in ("preset", "data", "sae", "metric", "study", "lm", "track", "sweep", "launcher"):
        names = sorted(p.stem for p in (conf / group).glob("*.yaml") if not p.stem.startswith("_"))
        if group == "preset":
            names = ["auto", *names]
        lines, line = [], ""
        for name in names:
            if len(line) + len(name) > 76:
                lines.append(line)
                line = ""
            line += f"{name}  "
        groups.append(f"  {group:<8} " + ("\n" + " " * 11).join([*lines, line.rstrip()]))
    return PAGE.format(
        plan=plan,
        groups="\n".join(groups) + "\n",
        plans=", ".join(sorted(p.stem for p in (conf / "plan").glob("*.yaml"))),
        runs=_runs(conf, plan),
    )


def _runs(conf: Path, plan: str) -> str:
    """The runs of a plan as they stand in its file (read as text: this page must work when a file is wrong)."""
    path = conf / "plan" / f"{plan}.yaml"
    if not path.exists():
        return "  (no such plan)\n"
    lines = [line.rstrip() for line in path.read_text().splitlines()]
    start = lines.index("runs:") + 1 if "runs:" in lines else len(lines)
    return (
        "\n".join(
            line for line in lines[start:] if line.strip() and not line.strip().startswith("#")
        )
        + "\n"
    )

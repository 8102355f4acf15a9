"""The three tasks of docs/agents.md run, and the table there names every kind of folder."""

from __future__ import annotations

import json
import re
import sys

import pytest

from sae_experiments.cli.main import main
from sae_experiments.cli.template import KINDS
from sae_experiments.config import own
from sae_experiments.config.compose import build, compose_checked
from sae_experiments.config.plans import complete
from sae_experiments.fitting import laws
from support.common import CONF, ROOT, TINY

PAGE = (ROOT / "docs" / "agents.md").read_text(encoding="utf-8")
TASKS = dict(re.findall(r"^### (.+?)$.*?```python\n(.*?)```", PAGE, re.M | re.S))
METRIC = {"Choose a variant": "sae_fvu", "Invent one": "sae_fvu", "Write a metric": "top_share"}


def test_the_page_has_three_tasks_and_every_kind_of_folder():
    assert list(TASKS) == list(METRIC)
    assert re.findall(r"^\| .*? \| `([\w-]+)` \|", PAGE, re.M) == list(KINDS)


@pytest.fixture
def registered(tmp_path, monkeypatch):
    """Registers a task as the script of the current folder, and returns it as a module."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def register(task: str):
        script = tmp_path / "experiment.py"
        script.write_text(TASKS[task])
        own.register(script, CONF)
        return sys.modules["experiment"]

    yield register
    own.register(None, CONF)
    sys.modules.pop("experiment", None)


@pytest.mark.parametrize("task", TASKS)
def test_a_task_composes(task, registered):
    module = registered(task)
    overrides, _ = complete(["out_dir=run_1"], plan=module.PLAN, extra=module.OVERRIDES, conf=CONF)
    overrides += own.measured_too(CONF, overrides)
    study = build(compose_checked(CONF, overrides)[0].study)
    study.check()
    assert METRIC[task] in [info.name for info in study.infos()]


@pytest.mark.parametrize(
    "task",
    [
        task if task == "Invent one" else pytest.param(task, marks=pytest.mark.slow)
        for task in METRIC
    ],
)
@pytest.mark.usefixtures("quick_start")
def test_a_task_runs(task, registered, tmp_path, corpus_file):
    module, script = registered(task), tmp_path / "experiment.py"
    small = [o for o in TINY.split() if not o.startswith("preset")]
    small += [f"data.text8.file={corpus_file}", "data.text8.head=null", f"cache={tmp_path / 'c'}"]
    small += ["metric.probing.rows=256", "metric.rules.rows=256"]
    argv = ["--out_dir=run_1", *small, "report=false"]
    assert main(argv, plan=module.PLAN, extra=module.OVERRIDES, script=script) == 0
    final = json.loads((tmp_path / "run_1" / "final_info.json").read_text())
    names = ["text8.falling", "text8.batch_topk"] if task == "Invent one" else ["text8"]
    assert sorted(final) == sorted(names)
    for entry in final.values():
        assert next(iter(entry["means"])) == f"{METRIC[task]}_mean"


@pytest.mark.parametrize("chosen", ["QUICK", pytest.param("LAWS", marks=pytest.mark.slow)])
def test_the_invented_one_obeys_the_laws(chosen, registered):
    module, chosen = registered("Invent one"), getattr(laws, chosen)
    subject = laws.Subject(lambda **sizes: module.Falling(k=laws.L0, **sizes))
    complaints = {name: laws.complaint(law, subject) for name, law in chosen.items()}
    assert complaints == dict.fromkeys(chosen, "")

"""The three tasks of docs/agents.md run, and the table there names every kind of folder."""

from __future__ import annotations

import json
import re
import sys

import pytest

from sae_experiments.cli.main import main
from sae_experiments.cli.template import KINDS
from sae_experiments.config import own
from sae_experiments.fitting import laws
from support.common import CONF, ROOT, TINY

PAGE = (ROOT / "docs" / "agents.md").read_text(encoding="utf-8")
TASKS = dict(re.findall(r"^### (.+?)$.*?```python\n(.*?)```", PAGE, re.M | re.S))
METRIC = {"Choose a variant": "sae_fvu", "Invent one": "sae_fvu", "Write a metric": "top_share"}


def test_the_page_has_three_tasks_and_every_kind_of_folder():
    assert list(TASKS) == list(METRIC)
    assert re.findall(r"^\| .*? \| `([\w-]+)` \|", PAGE, re.M) == list(KINDS)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.usefixtures("quick_start")
def test_a_task_runs(task, tmp_path, monkeypatch, corpus_file):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    script = tmp_path / "experiment.py"
    script.write_text(TASKS[task])
    own.register(script, CONF)
    module = sys.modules["experiment"]
    small = [o for o in TINY.split() if not o.startswith("preset")]
    small += [f"data.text8.file={corpus_file}", "data.text8.head=null", f"cache={tmp_path / 'c'}"]
    small += ["metric.probing.rows=256", "metric.rules.rows=256"]
    argv = ["--out_dir=run_1", *small]
    try:
        assert main(argv, plan=module.PLAN, extra=module.OVERRIDES, script=script) == 0
    finally:
        own.register(None, CONF)
        del sys.modules["experiment"]
    final = json.loads((tmp_path / "run_1" / "final_info.json").read_text())
    names = ["text8.falling", "text8.batch_topk"] if task == "Invent one" else ["text8"]
    assert sorted(final) == sorted(names)
    for entry in final.values():
        assert next(iter(entry["means"])) == f"{METRIC[task]}_mean"


def test_the_invented_one_obeys_the_laws(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    script = tmp_path / "experiment.py"
    script.write_text(TASKS["Invent one"])
    own.register(script, CONF)
    subject = laws.Subject(lambda **sizes: sys.modules["experiment"].Falling(k=laws.L0, **sizes))
    assert {law: laws.complaint(laws.LAWS[law], subject) for law in laws.LAWS} == dict.fromkeys(
        laws.LAWS, ""
    )
    own.register(None, CONF)

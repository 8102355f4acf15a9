"""SAEs and metrics that experiment.py itself defines: chosen, checked, cached and kept like
those of the package.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sae_experiments.cli.main import main
from sae_experiments.config import own
from sae_experiments.config.compose import build, compose_checked
from sae_experiments.errors import UserError
from sae_experiments.fitting import laws
from sae_experiments.runner.messages import packed
from support.common import CONF, TINY

SCRIPT = '''
import sys
from sae_experiments.saes.batch_topk import BatchTopK

PLAN = "plain"
OVERRIDES = []

class Mine(BatchTopK):
    """BatchTopK that trains with fewer latents."""

    def __init__(self, *, share: float = 0.9, **kwargs):
        super().__init__(**kwargs)
        self.share = share

    def budget(self):
        return self.share * self.k

def spread(context, rows: int = 256):
    """standard deviation of the code's norm"""
    return next(context.chunks(rows)).acts.norm(dim=1).std()

SAES = {"mine": Mine}
METRICS = {"spread": (spread, "down")}

if __name__ == "__main__":
    from sae_experiments.cli.main import main
    sys.exit(main(sys.argv[1:], plan=PLAN, extra=OVERRIDES, script=__file__))
'''


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes experiment.py into a folder of its own, which is the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", [*sys.path])

    def written(text: str = SCRIPT) -> Path:
        path = tmp_path / "experiment.py"
        path.write_text(text)
        return path

    yield written
    own.register(None, CONF)
    sys.modules.pop("experiment", None)


def run(script: Path, corpus_file: Path, *argv: str) -> int:
    text = ["data=[text8]", f"data.text8.file={corpus_file}", "data.text8.head=null"]
    small = [*TINY.split(), *text, "metric.probing.rows=256"]
    return main([*small, *argv], plan="plain", extra=[], conf=CONF, script=script)


def fits(folder: Path) -> set[str]:
    return {p.name for p in (folder / "cache" / "fits").iterdir() if p.is_dir()}


@pytest.mark.usefixtures("quick_start")
def test_an_sae_of_the_script_is_measured_cached_and_kept_as_it_ran(write, corpus_file, tmp_path):
    asked = ["sae=mine", "sae.model.share=0.8", "study=ground_truth", "study.train.steps=20"]
    asked += ["study.world.features=64", "study.world.width=16", "study.world.trees=2"]
    asked += ["report=false"]
    assert run(write(), corpus_file, "--out_dir=one", *asked) == 0
    one = tmp_path / "runs" / "one"
    means = json.loads((one / "final_info.json").read_text())["planted"]["means"]
    assert means["spread_mean"] > 0, "a metric of the script is measured without being asked for"
    manifest = json.loads((one / "manifest.json").read_text())
    assert manifest["metrics"]["spread"]["better"] == "down"
    assert manifest["metrics"]["spread"]["formula"] == "standard deviation of the code's norm"
    assert manifest["config"]["sae"]["model"]["share"] == 0.8
    assert (one / "source" / "experiment.py").read_text() == SCRIPT


@pytest.mark.slow
def test_workers_measure_what_one_process_does(write, corpus_file, tmp_path):
    asked = ["sae=[mine,batch_topk]", "study=ground_truth", "study.train.steps=20", "seeds=[0,1,2]"]
    asked += ["study.world.features=64", "study.world.width=16", "study.world.trees=2"]
    script, found = write(), {}
    for workers in (2, 1):
        where = [f"--out_dir=w{workers}", f"workers={workers}", f"cache={tmp_path / str(workers)}"]
        assert run(script, corpus_file, *where, *asked, "report=false") == 0
        folder = tmp_path / "runs" / f"w{workers}"
        assert json.loads((folder / "manifest.json").read_text())["workers"] == workers
        found[workers] = json.loads((folder / "final_info.json").read_text())
    assert set(found[1]) == {"planted.mine", "planted.batch_topk"}
    for name in found[1]:
        one, two = (found[n][name]["final_info_dict"] for n in (1, 2))
        assert len(one["spread"]) == 3 and one == two


@pytest.mark.parametrize(
    ("edit", "same"),
    [
        (("OVERRIDES = []", 'OVERRIDES = ["time_limit_s=9"]  # in time'), True),
        (('PLAN = "plain"', 'PLAN = "variants"'), True),
        (("self.share * self.k", "self.share * self.k - 0.5"), False),
    ],
)
def test_what_the_class_computes_is_in_the_key_and_the_command_line_is_not(write, edit, same):
    from sae_experiments.source import outside_digest

    def key() -> str:
        own.register(script, CONF)
        return outside_digest(sys.modules["experiment"].Mine)

    script = write()
    before = key()
    script = write(SCRIPT.replace(*edit))
    assert (key() == before) is same


def study_of(*overrides: str):
    overrides = ["preset=smoke", *overrides]
    overrides += own.measured_too(CONF, overrides)
    cfg, _ = compose_checked(CONF, overrides)
    return build(cfg.study)


STUDIES = sorted(p.stem for p in (CONF / "study").glob("[!_]*.yaml"))
#: Settings that make a study end in seconds.
SHORT = {
    "palindrome": ["study.train.steps=4", "study.fit.train.steps=4"],
    "superposition": [
        "study.depths=[2]",
        "study.hidden=[2]",
        "study.probe.depth=2",
        "study.probe.hidden=2",
        "study.train.steps=4",
        "study.probe.train.steps=4",
        "sae.target_l0=2",
    ],
}


@pytest.mark.parametrize("study", STUDIES)
def test_every_study_announces_a_metric_of_the_script(write, study):
    own.register(write(), CONF)
    assert "spread" in [info.name for info in study_of(f"study={study}").infos()]


@pytest.mark.parametrize("study", SHORT)
@pytest.mark.usefixtures("quick_start")
def test_studies_with_metrics_of_their_own_measure_it_too(write, study, tmp_path):
    argv = [f"study={study}", "preset=smoke", "report=false", "threads=1", *SHORT[study]]
    assert main(["--out_dir=one", *argv], plan="plain", extra=[], conf=CONF, script=write()) == 0
    final = json.loads((tmp_path / "runs" / "one" / "final_info.json").read_text())
    assert final and all(entry["means"]["spread_mean"] > 0 for entry in final.values())


def test_a_study_that_could_not_measure_it_would_refuse(write, tmp_path):
    own.register(write(), CONF)
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "bare.yaml").write_text("# @package _global_\nstudy: {_target_: x}\n")
    with pytest.raises(UserError, match=r"spread cannot be measured with study=bare: choose"):
        own.measured_too(tmp_path, ["study=bare"])
    assert own.measured_too(tmp_path, ["study=bare", "metric=[sparsity]"]) == []


def test_another_process_can_make_it_again(write):
    own.register(write(), CONF)
    content = packed(study_of("sae=[mine,topk]", "sae.target_l0=[8,16]"))
    assert content, "workers do not fall back to one"
    code = "import sys, pickle; s = pickle.load(sys.stdin.buffer); print(*s.saes, *s.metrics)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, input=content, capture_output=True, check=True)
    assert b"mine-target_l0_8" in done.stdout and b"spread" in done.stdout


def test_settings_come_from_the_nearest_base_class_and_from_the_constructor(write):
    own.register(write(), CONF)
    spec = study_of("sae=mine", "sae.target_l0=7", "sae.model.aux_coeff=0.5").saes["mine"]
    assert spec.model.keywords == {"k": 7, "aux_coeff": 0.5, "share": 0.9}
    plain = (
        "from sae_experiments.saes.base import SAE\nclass Mine(SAE):\n  def __init__(self, *, k,"
        " eta=2, **kw):\n    super().__init__(**kw)\nSAES = {'mine': Mine}"
    )
    own.register(write(plain), CONF)
    spec = study_of("sae=mine", "sae.target_l0=7").saes["mine"]
    assert spec.model.keywords["k"] == 7 and spec.model.keywords["eta"] == 2


def test_it_wraps_and_is_listed_like_any_other(write, capsys):
    script = write()
    assert main(["list"], plan="plain", extra=[], conf=CONF, script=script) == 0
    assert "BatchTopK that trains with fewer latents." in capsys.readouterr().out
    host = study_of("sae=purified", "sae/host=mine").saes["purified"].host
    assert host.model.func.__name__ == "Mine"
    with pytest.raises(UserError, match="did you mean mine"):
        study_of("sae=mne")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("SAES = {'topk': Mine}", "topk exists in conf/sae"),
        ("SAES = {'My SAE': Mine}", "lower-case letters"),
        ("SAES = {'mine': 3}", "must be a class that extends an SAE"),
        ("SAES = {'mine': (lambda: type('Local', (Mine,), {}))()}", "top level"),
        ("SAES = [Mine]", "must be a dictionary"),
        ("METRICS = {'m': 3}", "must be a function"),
        ("METRICS = {'m': (spread, 'more')}", "better one of"),
        ("raise ValueError('no')", "ValueError: no"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(write, capsys, line, message):
    script = write(SCRIPT.replace("METRICS = {", f"{line}\nMETRICS2 = {{"))
    assert main(["sae=mine"], plan="plain", extra=[], conf=CONF, script=script) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_script_without_its_main_guard_does_not_run_twice(write, capsys):
    text = (
        "from sae_experiments.cli.main import main\nmain([], plan='plain', extra=[],"
        " script=__file__)"
    )
    assert main([], plan="plain", extra=[], conf=CONF, script=write(text)) == 2
    assert "keep `if __name__" in capsys.readouterr().err.splitlines()[-1]


def test_a_metric_may_not_take_the_name_of_another(write, corpus_file, capsys):
    script = write(SCRIPT.replace('"spread": (', '"sae_fvu": ('))
    assert run(script, corpus_file, "--out_dir=two", "sae=mine") == 2
    assert "sae_fvu is a metric already" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------
# laws

#: A change of BatchTopK that breaks a law, the law, and a pattern of its number.
BROKEN = {
    "eval mode looks at the batch": (
        "def support(self, pre):\n        return self.largest(pre)",
        "rows are independent",
        r"\d+ of 3072 entries",
    ),
    "the loss writes": (
        (
            "def reconstruction(self, fwd, step):\n        self.b_dec.data += 0.01\n        return"
            " super().reconstruction(fwd, step)"
        ),
        "the loss changes nothing",
        r"gave \d+\.\d+ and \d+\.\d+",
    ),
    "half of the latents asked for": (
        "def finish(self, phase, x):\n        self.calibrate_threshold(x, self.k / 2)",
        "L0 is met",
        r"L0 is [12]\.\d+, asked for 4 \(tolerance 5%\)",
    ),
    "state outside the weights": (
        (
            "def finish(self, phase, x):\n        super().finish(phase, x); self.more = 1.0\n   "
            " def threshold_score(self, pre):\n        return pre + getattr(self, 'more', 0)"
        ),
        "weights say it all",
        r"codes differ by [\d.]+",
    ),
    "it reads a number of its own": (
        (
            "static_steps = True\n    def activation(self, entries, col):\n        from"
            " sae_experiments.saes import static\n        return entries * (0.9 if static.on()"
            " else 1)"
        ),
        "static steps are the same",
        r"differs by [\d.]+ within static\.shapes",
    ),
    "it raises": (
        "def activation(self, entries, col):\n        return entries.nosuch()",
        "shapes",
        r"nosuch' \(experiment\.py line \d+\)",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_law_tells_what_is_wrong_with_a_number(write, fault):
    method, law, number = BROKEN[fault]
    own.register(write(SCRIPT.replace("    def budget", f"    {method}\n\n    def budget")), CONF)
    subject = laws.Subject(study_of("sae=mine", "sae.target_l0=4").saes["mine"].model)
    said = laws.complaint(laws.LAWS[law], subject)
    assert re.search(number, said), said


def test_the_check_of_a_broken_sae_ends_with_the_law_and_the_number(write, capsys, monkeypatch):
    monkeypatch.setattr(laws, "LAWS", laws.QUICK)  # a test in seconds
    method, law, number = BROKEN["the loss writes"]
    script = write(SCRIPT.replace("    def budget", f"    {method}\n\n    def budget"))
    assert main(["--check=mine"], plan="plain", extra=[], conf=CONF, script=script) == 1
    out, err = capsys.readouterr()
    last = err.splitlines()[-1]
    assert f"sae=mine breaks the law '{law}'" in last and re.search(number, last), last
    assert out.count("  holds ") == len(laws.QUICK) - 1


def test_a_run_refuses_it_before_anything_costs_time(write, corpus_file, capsys, tmp_path):
    text = SCRIPT.replace("return self.share", "self.b_dec.data += 1; return self.share")
    assert run(write(text), corpus_file, "--out_dir=bad", "sae=mine") == 2
    assert "breaks the law 'the loss changes nothing'" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_sound_one_is_told_so_in_seconds(write, capsys):
    assert main(["--check=mine"], plan="plain", extra=[], conf=CONF, script=write()) == 0
    out = capsys.readouterr().out
    assert out.count("  holds ") == len(laws.LAWS) and "all 12 laws hold" in out

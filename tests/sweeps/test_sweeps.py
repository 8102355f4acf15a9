"""Sweeps: which jobs there are, who runs them, what is repeated, and what is told of those that
fail.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from sae_experiments.config.axes import Axis, axes_of
from sae_experiments.config.compose import build, compose_checked, options_of
from sae_experiments.errors import UserError
from sae_experiments.files import write_json
from sae_experiments.results.records import Record, write_final_info, write_record
from sae_experiments.sweeps.jobs import asked_for, folder_name, job_table, sweep
from sae_experiments.sweeps.launchers import Exit, Inline, Job, Local, Ray, Submitit, run_command
from sae_experiments.sweeps.search import Search
from support.common import CONF, ROOT, Experiment

pytestmark = pytest.mark.usefixtures("quick_start")
SMALL = ["preset=smoke", "data=[text8]", "offline=true", "launcher=inline"]
VALUES = re.compile(r"sae.target_l0=(\d+)")


# ------------------------------------------------------------------------------------------------
# which jobs there are


class Made:
    """Stands in for ``experiment.py``: leaves a run folder whose sae_fvu is 1/L0, or fails as
    it is told; remembers what it ran.
    """

    def __init__(self, root: Path, fail: Callable[[str], str | None] = lambda folder: None) -> None:
        self.root, self.fail, self.ran = root, fail, []

    def __call__(self, argv: list[str]) -> int:
        values = dict(o.split("=", 1) for o in argv)
        name = values["out_dir"].strip('"')
        self.ran.append(Path(name).name)
        if why := self.fail(name):
            print(f"error: {why}", file=sys.stderr)
            return 1
        l0 = float(values.get("sae.target_l0", 32))
        records = [
            Record(
                dataset="text8",
                seed=0,
                metrics={"sae_fvu": 1 / l0, "sae_l0": l0},
                config_hash="c",
                source_hash="s",
            )
        ]
        write_record(self.root / name, records[0])
        write_final_info(self.root / name, records)
        write_json(self.root / name / "manifest.json", {"status": "done", "argv": argv})
        return 0


@pytest.fixture
def swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, Made]]:
    """Type a sweep; the jobs are :class:`Made`."""
    monkeypatch.chdir(tmp_path)

    def type_(
        *overrides: str, fail: Callable[[str], str | None] = lambda folder: None
    ) -> tuple[int, Made]:
        made = Made(tmp_path / "runs", fail)
        return sweep(CONF, [*SMALL, *overrides], made), made

    return type_


def test_every_combination_has_a_folder_of_its_own_named_by_what_varies(swept, tmp_path):
    status, made = swept("out_dir=a", "sae=topk,jumprelu", "sae.target_l0=16,32,64")
    assert status == 0 and len(made.ran) == len(set(made.ran)) == 6
    assert made.ran[0] == "topk+target_l0-16" and {
        p.name for p in (tmp_path / "runs" / "a").iterdir()
    } == {*made.ran, "jobs", ".lock"}
    argv = json.loads((tmp_path / "runs" / "a" / made.ran[0] / "manifest.json").read_text())["argv"]
    assert {"sae=topk", "sae.target_l0=16", "offline=true", "label=topk+target_l0-16"} <= set(argv)
    assert not [o for o in argv if o.startswith(("launcher", "sweep", "search"))]


def test_finished_jobs_are_not_repeated_and_failed_ones_are(swept, capsys):

    def fail(folder):
        return "the loss is not finite at step 7" if folder.endswith("-32") else None

    status, made = swept("out_dir=a", "sae=topk", "sae.target_l0=16,32,64", fail=fail)
    said = capsys.readouterr()
    assert status == 1 and len(made.ran) == 3, "the others ran"
    table = [line.split()[:2] for line in said.out.splitlines() if re.match(r" +\d+  ", line)]
    assert table == [["0", "done"], ["1", "failed"], ["2", "done"]]
    assert re.search(r"  1  failed .*step 7", said.out)
    assert (
        said.err.splitlines()[-1]
        == "error: 1 of 3 jobs failed; first cause: the loss is not finite at step 7"
    )
    status, made = swept("out_dir=a", "sae=topk", "sae.target_l0=16,32,64,128")
    assert status == 0 and made.ran == ["target_l0-32", "target_l0-128"]


@pytest.mark.parametrize("damage", ["cell", "manifest", "folder", "override"])
def test_a_job_whose_results_are_not_whole_any_more_is_run_again(swept, tmp_path, damage):
    _, made = swept("out_dir=a", "sae=topk", "sae.target_l0=16,32")
    folder = tmp_path / "runs" / "a" / made.ran[1]
    if damage == "cell":
        (folder / "cells" / "text8_0.json").write_text("{")
    elif damage == "manifest":
        write_json(folder / "manifest.json", {"status": "running"})
    elif damage == "folder":
        folder.rename(tmp_path / "elsewhere")
    _, again = swept(
        "out_dir=a",
        "sae=topk",
        "sae.target_l0=16,32",
        *(["fit.train.steps=7"] if damage == "override" else []),
    )
    assert again.ran == (made.ran if damage == "override" else made.ran[1:])


def test_a_job_that_somebody_stops_stops_an_inline_sweep_and_the_rest_is_told_as_not_run(
    swept, capsys, tmp_path
):
    made = Made(tmp_path / "runs")
    status = sweep(
        CONF,
        [*SMALL, "out_dir=a", "sae=topk", "sae.target_l0=16,32"],
        lambda argv: made(argv) or 128 + signal.SIGTERM,
    )
    said = capsys.readouterr()
    assert status == 130 and len(made.ran) == 1
    assert (
        re.search(r"  0  stopped", said.out)
        and re.search(r"  1  not run", said.out)
        and "continues" in said.err
    )


@pytest.mark.parametrize(
    ("typed", "named"),
    [
        (["sae=topk,nosuch"], "nosuch"),
        (["sae=topk", "sae.targt_l0=16,32"], "did you mean sae.target_l0"),
        (["sae=topk", "sae.target_l0=16,32", "bogus=1"], "bogus"),
        (["sae=topk", "sae.target_l0=interval(4,32)"], "search.metric"),
        (["sae=topk", "sae.target_l0=4,8", "launcher=nosuch"], "joblib, ray"),
        (
            ["sae=topk", "sae.target_l0=4,8", "launcher=joblib", "launcher.job=2"],
            "did you mean launcher.jobs",
        ),
        (
            ["sae=topk", "sae.target_l0=4,8", "launcher=joblib", "launcher.jobs=0"],
            "launcher.jobs=0",
        ),
        (["sae=topk", "sae.target_l0=4,8", "sweep=nosuch"], "variants"),
        (["search.metric=sae_fvu", "sae=topk"], "search over"),
        (["search.metric=nosuch", "sae=topk,gated"], "search.metric=nosuch"),
        (["search.metric=sae_l0", "sae=topk,gated"], "search.metric=sae_l0"),
        (["search.sampler=nosuch", "sae=topk,gated"], "search.sampler=nosuch"),
        (["search.n_trials=0", "sae=topk,gated"], "search.n_trials=0"),
        (["search.metric=sae_fvu", "sae=topk,gated", "held_out=val"], "leave it out"),
        (["search.metric=sae_fvu", "sae=topk", "held_out=val,test"], "leave it out"),
        (["sae=topk", "fit.train.lr=tag(log,interval(0,1))", "search.metric=sae_fvu"], "positive"),
        (["sae=topk,gated", "out_dir=../elsewhere"], "runs_root"),
    ],
)
def test_a_mistake_that_every_job_would_make_is_told_before_any_starts(
    swept, tmp_path, typed, named
):
    with pytest.raises(UserError, match=re.escape(named)) as caught:
        swept("out_dir=a", *typed)
    assert (
        "\n" not in str(caught.value)
        and caught.value.exit_status == 2
        and not list(tmp_path.iterdir())
    )


@pytest.mark.parametrize(
    ("module", "typed"),
    [
        ("ray", ["launcher=ray"]),
        ("submitit", ["launcher=submitit"]),
        ("optuna", ["search.metric=sae_fvu", "search.n_trials=1"]),
    ],
)
def test_a_sweep_that_lacks_a_package_leaves_no_folder(swept, tmp_path, monkeypatch, module, typed):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match="not installed") as caught:
        swept("out_dir=a/b", "sae=topk,gated", *typed)
    assert caught.value.exit_status == 2 and not list(tmp_path.iterdir())


def test_a_mistake_of_some_jobs_is_theirs_alone(swept):
    status, made = swept("out_dir=a", "sae=topk", "sae.target_l0=16,100000")
    assert status == 0 and len(made.ran) == 2, "each job says by itself what is wrong with it"


def test_without_a_folder_the_sweep_says_what_to_add(swept):
    with pytest.raises(UserError, match="out_dir=sweep_a"):
        swept("sae=topk,gated")


def test_two_sweeps_do_not_share_a_folder_at_once(swept, tmp_path):
    seen = []

    def fail(folder: str) -> None:
        with pytest.raises(UserError, match="in use by another sweep"):
            swept("out_dir=a", "sae=topk,gated")
        seen.append(folder)

    assert swept("out_dir=a", "sae=topk,gated", fail=fail)[0] == 0 and len(seen) == 2


def test_folder_names_suit_every_file_system_and_stay_apart():
    assert folder_name(["sae=topk", "sae.target_l0=16"]) == "topk+target_l0-16"
    long = [folder_name([f"a.b={'x' * 200}{i}"]) for i in range(3)]
    assert len(set(long)) == 3 and max(map(len, long)) <= 100
    assert re.fullmatch(
        r"[A-Za-z0-9_.=+-]+", folder_name(["data.text8.file='/a b/ü?*:'", "x=[1,2]"])
    )
    assert (
        folder_name(["fit.train.lr=1e-3", "lm.train.lr=1e-2", "seeds=[0,1]"])
        == "fit.train.lr-1e-3+lm.train.lr-1e-2+seeds-0_1"
    )


def test_the_table_counts_what_was_cut_as_a_result_and_what_was_not_run_as_no_failure(capsys):
    rows = [
        {"job": i, "name": "n", "status": s, "cause": ""}
        for i, s in enumerate(("done", "cut", "not run"))
    ]
    assert job_table(rows) == 0
    assert job_table([*rows, {"job": 3, "name": "n", "status": "stopped", "cause": "why"}]) == 1
    assert "first cause: why" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------
# named sweeps

SWEEPS = sorted(p.stem for p in (CONF / "sweep").glob("*.yaml"))


@pytest.mark.parametrize("name", SWEEPS)
def test_every_named_sweep_means_something(name):
    asked = asked_for(CONF, [f"sweep={name}"])
    axes, fixed = axes_of(CONF, asked.overrides)
    assert axes and asked.out_dir == f"sweep_{name}" and str(asked.root) == f"runs/sweep_{name}"
    assert (asked.search is not None) == any(not axis.choices for axis in axes)

    def highest(axis: Any) -> Any:
        if axis.choices:
            return axis.choices[-1]
        return int(axis.high) if axis.whole else axis.high

    last = [f"{axis.key}={highest(axis)}" for axis in axes]
    build(compose_checked(CONF, [*fixed, *last])[0].study).check()


def test_what_is_typed_wins_over_the_named_sweep():
    asked = asked_for(
        CONF, ["sweep=variants", "sae=topk", "sae.target_l0=8,24", "seeds=[0]", "out_dir=mine"]
    )
    axes, fixed = axes_of(CONF, asked.overrides)
    assert [(a.key, a.choices) for a in axes] == [("sae.target_l0", ["8", "24"])]
    assert "sae=topk" in fixed and "seeds=[0]" in fixed and asked.out_dir == "mine"


def test_ranges_and_choices_are_hydras():
    axes, fixed = axes_of(
        CONF,
        [
            "a=range(1,4)",
            "b=choice(x,y)",
            "c=tag(log,interval(1e-4,1))",
            "d=int(interval(0,9))",
            "e=[1,2],[3]",
            "f=[1,2]",
        ],
    )
    assert axes == [
        Axis("a", ["1", "2", "3"]),
        Axis("b", ["x", "y"]),
        Axis("c", [], 1e-4, 1.0, True),
        Axis("d", [], 0.0, 9.0, False, True),
        Axis("e", ["[1,2]", "[3]"]),
    ]
    assert fixed == ["f=[1,2]"]


# ------------------------------------------------------------------------------------------------
# launchers

LAUNCHERS = sorted(p.stem for p in (CONF / "launcher").glob("*.yaml"))


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


def jobs_of(tmp_path: Path, commands: Sequence[list[str]]) -> list[Job]:
    return [
        Job(i, f"job{i}", [], command, tmp_path / "jobs" / f"job{i}.log")
        for i, command in enumerate(commands)
    ]


def run_all(launcher: Any, jobs: Sequence[Job]) -> dict[str, Exit]:
    ended: dict[str, Exit] = {}
    launcher.run(jobs, lambda job, how: ended.update({job.name: how}), lambda argv: 0)
    return ended


FATES = [
    python("print('fine')"),
    python("import sys; print('error: no', file=sys.stderr); sys.exit(2)"),
    python("import os, signal; os.kill(os.getpid(), signal.SIGKILL)"),
    python(
        "import os; print(os.environ['SAE_SWEEP_JOB'] == str(os.getppid()),"
        " os.environ['OMP_NUM_THREADS'])"
    ),
]


@pytest.mark.parametrize("name", LAUNCHERS)
def test_every_launcher_is_built_from_its_file(name):
    launcher = build(options_of(CONF, "launcher", [f"launcher={name}"]))
    assert isinstance(launcher, (Inline, Local, Submitit, Ray)) and isinstance(
        launcher.first_alone, bool
    )


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_job_that_fails_or_is_killed_takes_no_other_with_it(tmp_path, jobs):
    made = jobs_of(tmp_path, FATES)
    ended = run_all(Local(jobs=jobs, threads=2, devices=None, first_alone=False), made)
    assert [ended[job.name].status for job in made] == [0, 2, -signal.SIGKILL, 0]
    assert [job.log.read_text() for job in made] == ["fine\n", "error: no\n", "", "True 2\n"]


@pytest.mark.parametrize(
    ("jobs", "threads", "devices", "n", "cores", "width"),
    [
        (None, None, None, 100, 8, (8, 1)),
        (None, 4, None, 100, 8, (2, 4)),
        (2, None, None, 100, 8, (2, 4)),
        (None, None, None, 1, 8, (1, 8)),
        (None, None, [0, 1, 2, 3], 100, 16, (4, 4)),
        (8, None, [0, 1], 100, 8, (8, 1)),
        (None, 16, None, 9, 8, (1, 16)),
        (3, None, None, 9, 2, (3, 1)),
    ],
)
def test_the_cores_are_divided_among_the_jobs_that_run_at_once(
    jobs, threads, devices, n, cores, width
):
    assert (
        Local(jobs=jobs, threads=threads, devices=devices, first_alone=False).width(n, cores)
        == width
    )


def test_no_more_jobs_at_once_than_asked_for_and_each_has_a_device_for_itself(tmp_path):
    code = f"""
import os, time
d = os.environ['CUDA_VISIBLE_DEVICES']; p = {str(tmp_path)!r} + '/busy' + d
assert not os.path.exists(p), 'two jobs on one device'
open(p, 'w').close(); time.sleep(0.1); os.remove(p); print(d)
"""
    made = jobs_of(tmp_path, [python(code)] * 6)
    ended = run_all(Local(jobs=None, threads=None, devices=[3, 5], first_alone=False), made)
    assert {how.status for how in ended.values()} == {0} and {
        job.log.read_text().strip() for job in made
    } == {"3", "5"}


def test_the_output_of_a_job_that_runs_alone_is_shown_and_kept(tmp_path, capsys):
    assert (
        run_command(
            python("print('hello')"), str(tmp_path / "log"), {}, str(tmp_path), echo=True
        ).status
        == 0
    )
    assert capsys.readouterr().out == "hello\n" == (tmp_path / "log").read_text()


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_sweep_that_is_told_to_end_tells_its_jobs_and_waits_for_them(tmp_path, jobs):
    slow = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *a: (print('in good"
        " order'), sys.exit(143))); print('up', flush=True)"
    )
    made = f"""
import sys, json
from pathlib import Path
from sae_experiments.sweeps.launchers import Job, Local
from sae_experiments.stopping import Stopped, listening
command, here = {python(slow + "; time.sleep(60)")!r}, Path({str(tmp_path)!r})
jobs = [Job(i, f"job{{i}}", [], command, here / f"job{{i}}.log") for i in range(2)]
try:
    with listening():
        launcher = Local(jobs={jobs}, threads=1, devices=None, first_alone=False)
        launcher.run(jobs, lambda job, how: None, None)
except Stopped as stopped:
    sys.exit(stopped.exit_status)
"""
    process = subprocess.Popen([sys.executable, "-c", made], cwd=ROOT)
    logs = [tmp_path / f"job{i}.log" for i in range(jobs)]
    limit = time.monotonic() + 20
    while (
        not all(log.exists() and "up" in log.read_text() for log in logs)
        and time.monotonic() < limit
    ):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    assert all("in good order" in log.read_text() for log in logs)


@pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux tells a process of its parent's death"
)
def test_a_job_ends_when_its_sweep_is_killed(tmp_path):
    child = (
        "import os, sys, time; sys.path.insert(0, '.');"
        " from sae_experiments.stopping import end_with_parent;"
        " end_with_parent(int(os.environ['SAE_SWEEP_JOB'])); "
    )
    child += "print(os.getpid(), flush=True); time.sleep(60)"
    code = (
        "from sae_experiments.sweeps.launchers import run_command;"
        f" run_command({[sys.executable, '-c', child]!r}, {str(tmp_path / 'log')!r}, {{}}, '.')"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    limit = time.monotonic() + 20
    while (
        not ((tmp_path / "log").exists() and (tmp_path / "log").read_text().endswith("\n"))
        and time.monotonic() < limit
    ):
        time.sleep(0.02)
    parent.kill()
    parent.wait()
    pid = int((tmp_path / "log").read_text())
    while _alive(pid) and time.monotonic() < limit:
        time.sleep(0.02)
    assert not _alive(pid)


@pytest.mark.skipif(sys.platform != "linux", reason="as above")
def test_a_process_whose_parent_died_while_it_started_ends_at_once():
    code = (
        "import os; from sae_experiments.stopping import end_with_parent;"
        " end_with_parent(os.getppid()); print('lives', flush=True);"
        " end_with_parent(os.getpid()); print('lives', flush=True)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "lives\n")


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"
    except FileNotFoundError:
        return False


def submitit_here(**changes: Any) -> Submitit:
    return Submitit(
        cluster="local",
        requeues=3,
        parameters={"timeout_min": 5, "cpus_per_task": 1, "slurm_partition": None},
        first_alone=False,
        **changes,
    )


@pytest.mark.slow
def test_submitit_runs_the_jobs_and_tells_how_each_ended(tmp_path):
    pytest.importorskip("submitit", reason="until 'pip install submitit'")
    made = jobs_of(tmp_path, FATES)
    ended = run_all(submitit_here(), made)
    assert [ended[job.name].status for job in made] == [0, 2, -signal.SIGKILL, 0]
    assert made[0].log.read_text() == "fine\n"


@pytest.mark.slow
def test_a_job_that_submitit_preempts_ends_in_good_order_and_is_started_again(tmp_path):
    submitit = pytest.importorskip("submitit", reason="until 'pip install submitit'")
    from sae_experiments.sweeps.launchers import Requeued

    code = f"""
import os, signal, sys, time
p = {str(tmp_path)!r} + '/checkpoint'
def end(*a):
    open(p, 'w').close()
    sys.exit(143)
signal.signal(signal.SIGTERM, end)
print('up', flush=True)
time.sleep(0 if os.path.exists(p) else 60)
print('continued' if os.path.exists(p) else 'slept')
"""
    executor = submitit.AutoExecutor(folder=tmp_path / "submitit", cluster="local")
    executor.update_parameters(timeout_min=5)
    handle = executor.submit(Requeued(python(code), str(tmp_path / "log"), {}, str(tmp_path)))
    limit = time.monotonic() + 60
    while (
        not ((tmp_path / "log").exists() and "up" in (tmp_path / "log").read_text())
        and time.monotonic() < limit
    ):
        time.sleep(0.1)
    controller = handle._process.pid
    task = int(Path(f"/proc/{controller}/task/{controller}/children").read_text().split()[0])
    os.kill(
        task, submitit.local.local.LocalJobEnvironment._usr_sig()
    )  # as SLURM does before it preempts
    assert handle.result()[0] == 0
    assert (tmp_path / "checkpoint").exists() and "continued" in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_a_ray_cluster_of_this_machine_runs_the_jobs(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray", reason="until 'pip install ray'")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    made = jobs_of(tmp_path, FATES)
    try:
        ended = run_all(
            Ray(address=None, num_cpus=1, num_gpus=0, retries=0, first_alone=False), made
        )
    finally:
        ray.shutdown()
    assert [ended[job.name].status for job in made] == [0, 2, -signal.SIGKILL, 0]
    assert made[3].log.read_text() == "True 1\n"


@pytest.mark.parametrize(("name", "module"), [("submitit", "submitit"), ("ray", "ray")])
def test_a_launcher_whose_package_is_missing_says_how_to_get_it(
    tmp_path, monkeypatch, name, module
):
    monkeypatch.setitem(sys.modules, module, None)
    launcher = build(options_of(CONF, "launcher", [f"launcher={name}"]))
    with pytest.raises(UserError, match=rf"pip install 'sae-experiments\[{name}\]'"):
        launcher.run(jobs_of(tmp_path, FATES[:1]), lambda job, how: None, lambda argv: 0)


def test_the_first_job_runs_before_the_others_where_the_launcher_asks_for_it(swept, monkeypatch):
    parts: list[int] = []
    monkeypatch.setattr(Inline, "first_alone", True)
    run = Inline.run
    monkeypatch.setattr(
        Inline, "run", lambda self, jobs, *rest: (parts.append(len(jobs)), run(self, jobs, *rest))
    )
    assert swept("out_dir=a", "sae=topk", "sae.target_l0=1,2,3")[0] == 0 and parts == [1, 2]


# ------------------------------------------------------------------------------------------------
# searches

LR = "fit.train.lr=tag(log,interval(1e-4,1e-1))"
optuna_here = pytest.mark.skipif(
    not __import__("importlib").util.find_spec("optuna"), reason="until 'pip install optuna'"
)


def lr_of(argv: Sequence[str]) -> float:
    return float(dict(o.split("=", 1) for o in argv)["fit.train.lr"])


class Bowl(Made):
    """sae_fvu is least at lr = 1e-2."""

    def __call__(self, argv: list[str]) -> int:
        import math

        status = super().__call__(
            [*argv, f"sae.target_l0={1 / (1 + (math.log10(lr_of(argv)) + 2) ** 2)}"]
        )
        self.tried = [*getattr(self, "tried", []), lr_of(argv)]
        return status


def search(tmp_path: Path, *overrides: str, stop_after: int | None = None) -> tuple[int, Bowl]:
    bowl = Bowl(tmp_path / "runs")

    def here(argv: list[str]) -> int:
        return (
            128 + signal.SIGTERM
            if stop_after is not None and len(bowl.ran) >= stop_after
            else bowl(argv)
        )

    return (
        sweep(
            CONF, [*SMALL, "out_dir=s", "sae=topk", LR, "search.metric=sae_fvu", *overrides], here
        ),
        bowl,
    )


@optuna_here
def test_a_search_finds_the_best_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, bowl = search(tmp_path, "search.n_trials=25")
    said = capsys.readouterr().out
    assert status == 0 and len(bowl.ran) == 26 == len(set(bowl.ran)), (
        "25 trials and the report of the best"
    )
    best = min(bowl.tried, key=lambda lr: abs(__import__("math").log10(lr) + 2))
    assert f"fit.train.lr={best!r}" in said.splitlines()[-1] and 0.007 < best < 0.014
    assert all(1e-4 <= lr <= 1e-1 for lr in bowl.tried)
    again = search(tmp_path, "search.n_trials=25")
    assert again[0] == 0 and not again[1].ran, "enough is enough"
    assert [
        name for name in search(tmp_path, "search.n_trials=27")[1].ran if not name.endswith("_test")
    ] == ["trial_025", "trial_026"]


@optuna_here
def test_a_search_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = search(tmp_path / "a", "search.n_trials=14", f"runs_root={tmp_path}/a/runs")[1]
    parts = [
        search(tmp_path / "b", "search.n_trials=14", f"runs_root={tmp_path}/b/runs", stop_after=n)
        for n in (3, 9, 99)
    ]
    assert [status for status, _ in parts] == [130, 130, 0]
    tried = [lr for _, bowl in parts for lr in getattr(bowl, "tried", [])]
    assert sorted(tried) == sorted(whole.tried)


@optuna_here
@pytest.mark.parametrize("better_on_test", [True, False])
def test_trials_see_the_validation_text_and_the_winner_is_reported_on_the_test_text(
    tmp_path, monkeypatch, capsys, better_on_test
):
    """On the test text everything is another 0.5 better, or worse: the choice must not know."""
    monkeypatch.chdir(tmp_path)
    seen = {}

    class Texts(Made):
        def __call__(self, argv: list[str]) -> int:
            values = dict(o.split("=", 1) for o in argv)
            seen[Path(values["out_dir"].strip('"')).name] = values
            shift = {"search": 0, "test": -0.5 if better_on_test else 0.5}[values["held_out"]]
            return super().__call__([*argv, f"sae.target_l0={1 / (lr_of(argv) + 1 + shift)}"])

    made = Texts(tmp_path / "runs")
    typed = [
        *SMALL,
        "out_dir=s",
        "sae=topk",
        LR,
        "search.metric=sae_fvu",
        "search=random",
        "search.n_trials=6",
    ]
    assert sweep(CONF, typed, made) == 0
    trials = {name: values for name, values in seen.items() if not name.endswith("_test")}
    assert len(trials) == 6 and {v["held_out"] for v in trials.values()} == {"search"}
    best = min(trials, key=lambda name: float(trials[name]["fit.train.lr"]))
    assert [n for n in seen if n.endswith("_test")] == [f"{best}_test"], "one look at the test text"
    winner = seen[f"{best}_test"]
    assert winner["held_out"] == "test" and winner["fit.train.lr"] == trials[best]["fit.train.lr"]
    value = float(winner["fit.train.lr"]) + 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert (
        f"{value:.6g} of 6 trials: {best}" in last
        and f"on test text {value + (-0.5 if better_on_test else 0.5):.6g} ({best}_test)" in last
    )
    sweep(CONF, typed, made)
    assert len(made.ran) == 7, "nothing is repeated"


@optuna_here
def test_a_metric_that_no_text_moves_is_not_sold_as_measured_on_test_text(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert search(tmp_path, "search.n_trials=2")[0] == 0
    assert "does not depend on the held-out text" in capsys.readouterr().out.splitlines()[-1]


@optuna_here
def test_another_search_in_the_same_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert search(tmp_path, "search.n_trials=2")[0] == 0
    with pytest.raises(UserError, match="holds another search"):
        search(tmp_path, "search.n_trials=3", "sae.expansion=4")


@optuna_here
def test_a_trial_without_a_value_counts_as_failed_and_the_search_goes_on(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    status, made = (
        0,
        Made(tmp_path / "runs", lambda folder: "broken" if folder.endswith("001") else None),
    )
    status = sweep(
        CONF,
        [
            *SMALL,
            "out_dir=s",
            "search.metric=sae_fvu",
            "search.n_trials=4",
            "search=random",
            "sae=topk,gated",
        ],
        made,
    )
    assert status == 1 and len(made.ran) == 5 and "of 3 trials" in capsys.readouterr().out


def test_a_search_without_optuna_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    spec = OmegaConf.load(CONF / "search" / "tpe.yaml")
    with pytest.raises(UserError, match=r"sae-experiments\[optuna\]"):
        _ = Search(tmp_path, spec, [Axis("a", ["1"])], []).study


# ------------------------------------------------------------------------------------------------
# the real thing


@pytest.mark.slow
def test_a_sweep_of_processes_trains_one_language_model_and_is_drawn(experiment: Experiment):
    done = experiment(
        "-m",
        "out_dir=sweep",
        "sae=topk,batch_topk",
        "sae.target_l0=2,4",
        "launcher=joblib",
        "launcher.jobs=2",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        len(experiment.made("lms")) == 1
        and len(experiment.made("stores")) == 3
        and len(experiment.made("fits")) == 4
    )
    drawn = subprocess.run(
        [sys.executable, str(ROOT / "plot.py"), "runs/sweep"],
        cwd=experiment.here,
        env=experiment.environment(),
        capture_output=True,
        text=True,
    )
    assert drawn.returncode == 0, drawn.stderr
    assert {"pareto.png", "comparison.csv"} <= {
        p.name for p in (experiment.runs / "sweep" / "comparison").rglob("*")
    }
    began = time.monotonic()
    again = experiment(
        "-m",
        "out_dir=sweep",
        "sae=topk,batch_topk",
        "sae.target_l0=2,4",
        "launcher=joblib",
        "launcher.jobs=2",
    )
    assert (
        again.returncode == 0
        and "4 of 4 jobs are already done" in again.stdout
        and time.monotonic() - began < 60
    )


@pytest.mark.slow
def test_a_sweep_that_is_killed_goes_on_with_what_is_missing(experiment: Experiment):
    process = experiment.start("-m", "out_dir=sweep", "sae=topk", "sae.target_l0=2,3,4")
    first = experiment.runs / "sweep" / "jobs" / "target_l0-2.json"
    while not first.exists() and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = experiment("-m", "out_dir=sweep", "sae=topk", "sae.target_l0=2,3,4")
    assert done.returncode == 0 and "1 of 3 jobs are already done" in done.stdout, done.stdout
    assert len(experiment.made("fits")) == 3

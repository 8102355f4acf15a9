"""Figures hold what they say; plot.py survives whatever lies in the folder."""

from __future__ import annotations

import itertools
import logging
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra.utils import instantiate
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from sae_experiments.errors import UserError
from sae_experiments.plots.base import PAPER_WIDTHS, NothingToDrawError, save, save_for_paper
from sae_experiments.plots.style import ALARM, PALETTE, run_styles, variant_index
from sae_experiments.plots.text import clip, percent
from sae_experiments.report.figures import choose_figures, default_out, draw_all
from sae_experiments.results.records import (
    CurveWriter,
    Record,
    read_records,
    save_arrays,
    statistics_of,
    write_record,
)
from sae_experiments.results.table import load_table, runs_in
from support.fake_runs import FVU, make_run

ROOT = Path(__file__).resolve().parents[2]
GENERAL = (
    "density",
    "final_metrics",
    "pareto",
    "sae_curves",
    "training_curves",
)  # the figures of a study are tested with it
FIGURES = {name: ROOT / "conf" / "plot" / f"{name}.yaml" for name in GENERAL}
THREE = ("enwik8", "shakespeare_char", "text8")


def drawn(name: str, *paths: Path, **options: Any) -> Figure:
    return instantiate(OmegaConf.load(FIGURES[name]), **options)(load_table(paths))


def bars(ax: Axes) -> dict[str, ErrorbarContainer]:
    return {str(c.get_label()): c for c in ax.containers if isinstance(c, ErrorbarContainer)}


def legend(fig: Figure) -> list[str]:
    return [text.get_text() for box in fig.legends for text in box.get_texts()]


def caption(fig: Figure) -> str:
    return " ".join(fig.get_supxlabel().split())


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("two")
    return [
        make_run(root, "run_0", datasets=THREE),
        make_run(root, "run_1", sae="topk", datasets=THREE),
    ]


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_draws_one_run_and_eight(name: str, tmp_path: Path) -> None:
    paths = [make_run(tmp_path, f"run_{i}", sae=sae, seeds=(0, 1)) for i, sae in enumerate(FVU)]
    for chosen in (paths[:1], paths):
        fig = drawn(name, *chosen)
        assert fig.get_suptitle()
        assert "seeds" in caption(fig)
        assert "Preset laptop." in caption(fig)


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("n_runs", [1, 2])
def test_nothing_reaches_out_of_the_figure_or_into_another_panel(
    name: str, n_runs: int, two: list[Path], tmp_path: Path
) -> None:
    fig = drawn(name, *two) if n_runs == 2 else drawn(name, make_run(tmp_path, "run_0"))
    assert_apart(fig)


def assert_apart(fig: Figure) -> None:
    """Nothing reaches out of the figure or into another panel."""
    fig.draw_without_rendering()
    renderer = fig.canvas.get_renderer()  # type: ignore[attr-defined]
    width, height = fig.bbox.size
    boxes = [box for ax in fig.axes if ax.get_visible() and (box := ax.get_tightbbox(renderer))]
    boxes += [box.get_window_extent(renderer) for box in fig.legends]
    for box in boxes:
        assert min(box.x0, box.y0) > -2
        assert box.x1 < width + 2
        assert box.y1 < height + 2
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            assert min(a.x1, b.x1) - max(a.x0, b.x0) < 2 or min(a.y1, b.y1) - max(a.y0, b.y0) < 2


def test_final_metrics_dots_errors_and_baseline(two: list[Path]) -> None:
    fig = drawn("final_metrics", *two, metrics=["sae_fvu", "ce_delta_bits"])
    assert len(fig.axes) == 2 * 3
    assert [ax.get_title("left") for ax in fig.axes[:3]] == list(THREE)
    ax, table = fig.axes[0], load_table(two)
    assert "FVU\nlower is better" in ax.get_xlabel()
    found = bars(ax)
    assert list(found) == ["run_0", "run_1"]
    for run in table.runs:
        stat = run.stats["enwik8"]["sae_fvu"]
        (segments,) = found[run.name][2]
        assert found[run.name][0].get_xdata()[0] == stat.mean  # type: ignore[index]
        left, right = segments.get_segments()[0][:, 0]  # type: ignore[attr-defined]
        assert (right - left) / 2 == pytest.approx(stat.stderr)
    assert [text.get_text() for text in ax.get_yticklabels()] == [
        "run_0: standard k=32",
        "run_1: topk k=32",
    ]
    assert "Dashed line: the baseline, run_0" in caption(fig)
    assert "n = 3 seeds" in caption(fig)


def test_one_seed_has_no_error_bar_and_null_no_dot(tmp_path: Path) -> None:
    run = make_run(tmp_path, "run_0", seeds=(0,), curves=False)
    (record,) = read_records(run)
    write_record(run, replace(record, metrics=record.metrics | {"sae_l0": None}))
    other = make_run(tmp_path, "run_1", curves=False)
    fig = drawn("final_metrics", run, other, metrics=["sae_fvu", "sae_l0"])
    assert [
        bool(c[2][0].get_segments()) if c[2] else False for c in bars(fig.axes[0]).values()
    ] == [
        False,
        True,
    ]  # type: ignore[attr-defined]
    assert list(bars(fig.axes[1])) == ["run_1"]
    assert "null" in [text.get_text() for text in fig.axes[1].texts]
    assert "n = 1 to 3 seeds" in caption(fig)
    assert [c.get_label() for c in drawn("pareto", run, other).axes[0].containers] == ["run_1"]


def test_runs_that_must_not_be_compared_are_hollow(tmp_path: Path) -> None:
    paths = [
        make_run(tmp_path, "run_0"),
        make_run(tmp_path, "run_1", preset="full"),
        make_run(tmp_path, "run_2", sae="topk"),
    ]
    for name in ("final_metrics", "pareto"):
        fig = drawn(name, *paths)
        faces = {
            label: found[0].get_markerfacecolor() for label, found in bars(fig.axes[0]).items()
        }  # type: ignore[union-attr]
        assert [label for label, face in faces.items() if face == "white"] == ["run_1"]
        assert (
            "Hollow: not comparable with the baseline: run_1 (preset full vs laptop)."
            in caption(fig)
        )
        assert "Preset laptop; full for run_1." in caption(fig)


@pytest.mark.parametrize("name", FIGURES)
def test_stand_in_text_is_red(name: str, tmp_path: Path) -> None:
    fig = drawn(name, make_run(tmp_path, "run_0", seeds=(0,), stand_in=True))
    # type: ignore[attr-defined]
    title = fig.axes[0].title if fig.axes[0].get_title() else fig.axes[0]._left_title
    assert "STAND-IN TEXT" in title.get_text()
    assert title.get_color() == ALARM
    assert fig.axes[0].get_facecolor() != (1.0, 1.0, 1.0, 1.0)
    assert "STAND-IN TEXT, not the real corpus: shakespeare_char." in caption(fig)


def test_a_dataset_the_baseline_lacks_is_not_hollow(tmp_path: Path) -> None:
    paths = [
        make_run(tmp_path, "run_0", datasets=["enwik8"], curves=False),
        make_run(tmp_path, "run_1", datasets=THREE[::2], curves=False),
    ]
    fig = drawn("final_metrics", *paths, metrics=["sae_fvu"])
    # type: ignore[union-attr]
    assert bars(fig.axes[1])["run_1"][0].get_markerfacecolor() != "white"
    assert "Hollow" not in caption(fig)


def test_curves_mean_band_and_shared_language_model(two: list[Path]) -> None:
    fig = drawn("training_curves", *two)
    assert [ax.get_ylabel() for ax in fig.axes[::3]] == [
        "train loss (nats)",
        "validation loss (nats)",
    ]
    assert legend(fig) == ["run_0, run_1: the same curves"]
    ax = fig.axes[3]
    assert len(ax.lines) == 1
    assert len(ax.collections) == 1  # the band
    curves = load_table(two).runs[0].curves
    mean = (
        curves[(curves["dataset"] == "enwik8") & (curves["name"] == "lm/val_loss")]
        .groupby("step")["value"]
        .mean()
    )
    assert np.allclose(ax.lines[0].get_ydata(), mean)
    assert ax.get_ylim()[1] < 3.5  # the first fall, from 4, leaves the panel


def test_curves_of_one_label_share_a_row(tmp_path: Path) -> None:
    run = make_run(tmp_path, "run_0", seeds=(0,), curves=False)
    with CurveWriter(run, "shakespeare_char", 0, resume=False) as out:
        for step, value in ((100, 3.0), (200, 2.0)):
            out.write(step, "lm/eval_val_loss_quick", value)
        for step, value in ((200, 2.1), (300, 1.0)):
            out.write(step, "lm/eval_val_loss", value)
    (ax,) = drawn("training_curves", run).axes
    (line,) = ax.lines
    assert np.asarray(line.get_xydata()).tolist() == [[100, 3.0], [200, 2.1], [300, 1.0]]


def test_sae_curves_name_the_parts_only_one_variant_has(two: list[Path]) -> None:
    fig = drawn("sae_curves", *two)
    labels = [ax.get_ylabel() for ax in fig.axes[::3]]
    assert labels == [
        "total loss",
        "squared error",
        "L0 (latents per token)",
        "dead latents (share)",
        "learning rate",
        "sae/l1",
    ]
    assert len(fig.axes[0].lines) == 2
    assert len(fig.axes[-1].lines) == 1
    assert fig.axes[0].get_yscale() == "log"
    assert legend(fig) == ["run_0: standard k=32", "run_1: topk k=32"]


def test_several_saes_of_one_run_are_drawn_side_by_side(tmp_path: Path) -> None:
    names = [f"{sae}-target_l0_{k}" for sae in ("topk", "gated") for k in (8, 16)]
    reports = [f"{corpus}.{name}" for corpus in ("enwik8", "text8") for name in names]
    saes = {name: {"model": {"k": int(name.rsplit("_", 1)[1])}} for name in names}
    run = make_run(tmp_path, "grid", datasets=reports, config={"saes": saes})
    table = load_table([run])
    assert [r.title for r in table.runs] == sorted(
        names, key=lambda n: (n[0], int(n.rsplit("_", 1)[1]))
    )
    assert table.datasets == ["enwik8", "text8"] and table.baseline is None
    assert {r.config["variant"] for r in table.runs} == {"topk", "gated"}
    whole = statistics_of(read_records(run))
    for part in table.runs:
        assert part.stats["text8"] == whole[f"text8.{part.sae}"]
        assert set(part.curves["dataset"]) == {"enwik8", "text8"} and set(part.arrays("text8")) == {
            0,
            1,
            2,
        }
    fig = drawn("pareto", run)
    assert [len(ax.containers) for ax in fig.axes] == [4] * 4, (
        "a panel for a corpus and a metric, a point for an SAE"
    )
    beside = load_table([make_run(tmp_path, "run_0", datasets=["text8"]), run])
    assert [r.name for r in beside.runs][1:] == [r.name for r in table.runs], (
        "the baseline needs no name in front of theirs"
    )
    assert beside.baseline is beside.runs[0] and beside.with_rivals(
        ["text8", "shakespeare_char"]
    ) == ["text8"]
    two = load_table([run, make_run(tmp_path, "other", datasets=["text8"])])
    assert "grid gated-target_l0_8" in [r.name for r in two.runs], (
        "among several runs the run is named too"
    )


def test_pareto_points_axes_and_variants(tmp_path: Path) -> None:
    paths = [
        make_run(tmp_path, f"{sae}_{k}", sae=sae, k=k, curves=False)
        for sae in ("topk", "gated")
        for k in (8, 16, 32)
    ]
    fig = drawn("pareto", *paths)
    ax = fig.axes[0]
    assert ax.get_xscale() == "log"
    assert len(bars(ax)) == 6
    assert all(len(found[2]) == 2 for found in bars(ax).values())  # bars on both axes
    assert len(legend(fig)) == 6
    assert "Lines join runs of the same variant." in caption(fig)
    few = drawn("pareto", *paths, max_legend=5)
    assert legend(few) == ["topk", "gated"]
    matched = drawn("pareto", *paths[::3])
    low, high = matched.axes[0].get_xlim()
    assert high / low >= 4  # runs at one L0 must not look far apart
    assert "Lines join" not in caption(matched)


def test_a_variant_has_one_colour_in_every_figure_and_on_the_first_screen(tmp_path: Path) -> None:
    names = list(FVU)
    paths = [
        make_run(tmp_path, f"{sae}_{k}", sae=sae, k=k, seeds=(0,))
        for k in (16, 32)
        for sae in names
    ]
    palette = {name: PALETTE[variant_index(name)] for name in names}
    assert len(set(palette.values())) == len(names)
    for figure, options in (("pareto", {}), ("pareto", {"max_legend": 99}), ("sae_curves", {})):
        (box,) = drawn(figure, *paths, **options).legends
        for text, handle in zip(box.get_texts(), box.legend_handles, strict=True):
            (variant,) = {n for n in names if re.match(rf"{n}(_\d|$)", text.get_text())}
            assert to_hex(handle.get_color()).upper() == palette[variant], figure  # type: ignore
    css = (ROOT / "sae_experiments" / "report" / "report.css").read_text()
    of_screen = re.findall(r"\.v(\d) \{ --own: (#\w+)", css)
    assert len(of_screen) == len(PALETTE)
    for i, color in of_screen:
        if i != "6":  # lighter there, to be seen on a dark page
            assert color.upper() == PALETTE[int(i)].upper()
    alone = drawn("final_metrics", make_run(tmp_path, "run_0", sae="topk"))
    (point, *_) = bars(alone.axes[0]).values()
    assert to_hex(point[0].get_color()).upper() == palette["topk"]


def test_a_run_without_a_rival_has_no_baseline(tmp_path: Path) -> None:
    path = make_run(tmp_path, "run_0", seeds=(0,))
    fig = drawn("final_metrics", path)
    assert "baseline" not in caption(fig) and not fig.axes[0].lines[1:]
    other = drawn("final_metrics", path, make_run(tmp_path, "run_1", sae="topk", seeds=(0,)))
    assert "Dashed line: the baseline" in caption(other)


def test_the_curves_of_one_dataset_fill_a_grid(tmp_path: Path) -> None:
    fig = drawn("sae_curves", make_run(tmp_path, "run_0", sae="standard"))
    columns = {ax.get_subplotspec().colspan.start for ax in fig.axes}
    assert len(columns) == 3 and fig.get_figheight() < 2 * fig.get_figwidth()
    for column in columns:
        in_column = [ax for ax in fig.axes if ax.get_subplotspec().colspan.start == column]
        assert [ax.get_xlabel() for ax in in_column] == [""] * (len(in_column) - 1) + ["step"]


def test_density_counts_the_dead(two: list[Path]) -> None:
    fig = drawn("density", *two)
    assert len(fig.axes) == 2 * 3
    ax, run = fig.axes[0], load_table(two).runs[0]
    dead = run.stats["enwik8"]["sae_dead_frac"].mean or 0
    (bar,) = [
        patch
        for container in ax.containers
        for patch in container
        if container.get_label() == "dead"
    ]
    assert bar.get_height() == pytest.approx(dead)
    (stairs,) = [patch for patch in ax.patches if hasattr(patch, "get_data")]
    assert stairs.get_data().values.sum() + dead == pytest.approx(1)
    assert f"dead {percent(dead)}" in [text.get_text() for text in ax.texts]
    assert fig.axes[-1].get_xticklabels()[0].get_text() == "dead"


def test_density_survives_bad_arrays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = make_run(tmp_path, "run_0")
    save_arrays(
        run, "shakespeare_char", 0, {"density_hist": np.zeros(4), "density_edges": np.arange(5.0)}
    )
    save_arrays(
        run,
        "shakespeare_char",
        1,
        {"density_hist": np.full(4, np.nan), "density_edges": np.arange(5.0)},
    )
    assert len(drawn("density", run).axes) == 1
    assert "2 of 3 density histograms" in caplog.text
    (run / "arrays" / "shakespeare_char_2.npz").unlink()
    with pytest.raises(NothingToDrawError, match="density_hist"):
        drawn("density", run)


def test_too_many_runs_are_cut_and_said(tmp_path: Path) -> None:
    paths = [make_run(tmp_path, f"run_{i}", curves=False) for i in range(5)]
    fig = drawn("final_metrics", *paths, max_runs=3)
    assert len(bars(fig.axes[0])) == 3
    assert "Only the first 3 of 5 runs are drawn." in caption(fig)
    many = run_styles(
        load_table([make_run(tmp_path, f"more_{i}", seeds=(0,), curves=False) for i in range(30)])
    )
    assert len(set(many.values())) == len(many) == 31  # with run_0; no two look alike


def test_other_studies_get_the_metrics_they_have(tmp_path: Path) -> None:
    write_record(
        tmp_path / "run_0",
        Record(dataset="depth_3", seed=0, metrics={"loss_min": 0.1, "loss_mean": 0.2}),
    )
    fig = drawn("final_metrics", tmp_path / "run_0")
    assert [ax.get_xlabel() for ax in fig.axes] == ["loss_mean", "loss_min"]
    for name in ("pareto", "density", "training_curves", "sae_curves"):
        with pytest.raises(NothingToDrawError):
            drawn(name, tmp_path / "run_0")


def test_the_same_figure_the_same_bytes(tmp_path: Path, two: list[Path]) -> None:
    for folder in ("a", "b"):
        save(drawn("pareto", *two), "pareto", tmp_path / folder)
    for kind in ("png", "svg"):
        assert (tmp_path / "a" / f"pareto.{kind}").read_bytes() == (
            tmp_path / "b" / f"pareto.{kind}"
        ).read_bytes()


def test_a_failing_figure_stops_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, two: list[Path]
) -> None:
    def fail() -> Any:
        raise ZeroDivisionError("two\nlines")

    caplog.set_level(logging.INFO)
    written, pictures = draw_all(
        load_table(two),
        {"bad": fail, "good": lambda: instantiate(OmegaConf.load(FIGURES["pareto"]))},
        tmp_path / "out",
        tmp_path,
    )
    assert [path.name for path in written] == ["good.png", "good.svg"]
    assert caplog.messages == ["bad: not drawn, ZeroDivisionError: two lines"]
    assert (tmp_path / "good.png").is_file()
    assert [picture.name for picture in pictures] == ["good"]


def test_small_things() -> None:
    assert [percent(x) for x in (0, 0.0004, 0.02, 0.0213, 0.123, 1)] == [
        "0 %",
        "< 0.1 %",
        "2 %",
        "2.1 %",
        "12 %",
        "100 %",
    ]
    assert clip("a" * 50 + "z" * 50, 20) == "a" * 10 + "…" + "z" * 9
    assert default_out([Path("/r/runs/run_0"), Path("/r/runs/run_1")]) == Path("/r/runs/comparison")
    assert default_out([Path("/r/runs/run_0"), Path("/r/runs/sweep/a")]) == Path(
        "/r/runs/comparison"
    )
    with pytest.raises(UserError, match="did you mean pareto"):
        choose_figures("paretto", ["pareto", "density"])


def plot(cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "plot.py"), *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


def test_plot_py_from_start_to_end(tmp_path: Path) -> None:
    for name in ("run_0", "run_1"):
        make_run(tmp_path / "runs", name, seeds=(0, 1))
    make_run(tmp_path / "runs", "run_2", seeds=(0,), status="running", curves=False)
    (tmp_path / "runs/run_3").mkdir()
    (tmp_path / "runs/run_3/final_info.json").write_text("{ torn")
    (tmp_path / "experiment.py").touch()
    done = plot(tmp_path, "--figures=pareto,final_metrics")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert (
        len(done.stderr.splitlines()) == 4
    )  # run_2 runs; run_3: no manifest, not JSON, no results
    assert "== shakespeare_char ==" in done.stdout
    out = tmp_path / "runs" / "comparison"
    figures = [f"{name}.{kind}" for name in ("final_metrics", "pareto") for kind in ("png", "svg")]
    assert sorted(p.name for p in out.iterdir()) == [
        ".lock",
        "comparison.csv",
        "comparison.md",
        *figures,
        "report.html",
    ]
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["final_metrics.png", "pareto.png"]


def test_plot_py_mistakes_are_one_line(tmp_path: Path) -> None:
    for arguments, told in (
        (["--oout=x"], "--oout"),
        (["--figures=paretto"], "did you mean pareto"),
        (["nowhere"], "no runs in nowhere"),
        ([], "python experiment.py --out_dir=run_0"),
    ):
        if not arguments and any(runs_in(path) for path in (ROOT / "runs", *ROOT.glob("run_*"))):
            continue  # the checkout has runs of its own, which plot.py would draw
        done = plot(tmp_path, *arguments)
        assert done.returncode == 2
        assert told in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
        assert done.stdout == ""


def test_plot_py_with_failed_runs_alone_is_no_success(tmp_path: Path) -> None:
    make_run(tmp_path / "runs", "run_0", seeds=(0,))
    make_run(tmp_path / "runs", "run_1", seeds=(0,), status="failed")
    failed = tmp_path / "runs" / "run_2"
    failed.mkdir()
    (failed / "manifest.json").write_text('{"status": "failed", "metrics": {}, "config": {}}')
    figures = "--figures=final_metrics"
    nothing = plot(tmp_path, "runs/run_2", figures)
    assert nothing.returncode == 2 and "no run has results" in nothing.stderr.splitlines()[-1], (
        "the baseline beside it is not what was asked for"
    )
    partly = plot(tmp_path, "runs/run_1", "runs/run_2", figures)
    assert partly.returncode == 1 and "failed" in partly.stderr.splitlines()[-1]
    assert "run_1" in partly.stdout, "what there is is shown all the same"
    assert plot(tmp_path, "runs/run_0", "runs/run_1", figures).returncode == 0


@pytest.mark.parametrize("max_corpora", [1, 2])
def test_the_purification_matrix_shows_a_fit_that_is_the_host_of_another_corpus(
    max_corpora, tmp_path
):
    kinds = {"rob_kinds": np.array(["gaussian"]), "rob_kind_change": np.array([0.5])}
    datasets = {"one": ["text8"], "two": ["enwik8", "text8"], "three": ["enwik8"]}
    for name, own in datasets.items():
        run = make_run(tmp_path, name, datasets=own, seeds=[0], curves=False, label=name)
        for dataset in own:
            save_arrays(run, dataset, 0, kinds)
    plot = instantiate(OmegaConf.load(ROOT / "conf" / "plot" / "purification_matrix.yaml"))
    figure = plot(
        load_table([tmp_path / name for name in datasets]), host="none", max_corpora=max_corpora
    )
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["two", "three"][:max_corpora]


def test_figures_for_a_paper_are_pdfs_of_its_widths_with_embedded_fonts(tmp_path: Path) -> None:
    for name, sae in (("run_0", "standard"), ("run_1", "topk"), ("run_2", "gated")):
        make_run(tmp_path / "runs", name, sae=sae, datasets=THREE, curves=False)
    done = plot(tmp_path, "--figures=pareto", "--paper")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "comparison" / "paper"
    widths = {"pareto_2col": PAPER_WIDTHS["2col"]}
    widths |= {f"pareto_{dataset}_1col": PAPER_WIDTHS["1col"] for dataset in THREE}
    assert {path.stem for path in folder.glob("*.pdf")} == set(widths)
    for name, inches in widths.items():
        pdf = (folder / f"{name}.pdf").read_bytes()
        (box,) = set(re.findall(rb"/MediaBox \[ 0 0 ([\d.]+) ([\d.]+) \]", pdf))
        assert float(box[0]) == pytest.approx(72 * inches, abs=0.5)
        assert b"/FontFile2" in pdf and b"/Type3" not in pdf, "TrueType, embedded"
        assert b"/Image" not in pdf.replace(b"/ImageB /ImageC /ImageI", b""), "vectors only"
    caption = (folder / "pareto.txt").read_text()
    assert "n = 3 seeds" in caption and "Preset laptop" in caption and "enwik8-head" in caption


@pytest.mark.parametrize("width", PAPER_WIDTHS)
@pytest.mark.parametrize("name", FIGURES)
def test_what_is_written_does_not_overlap_on_paper(
    name: str, width: str, two: list[Path], tmp_path: Path
) -> None:
    table = load_table(two)
    if width == "1col":
        table = table.only("enwik8")
        assert {d for run in table.runs for d in run.curves["dataset"]} == {"enwik8"}
    fig = instantiate(OmegaConf.load(FIGURES[name]))(table)
    save_for_paper(fig, name, width, tmp_path)
    assert_apart(fig)
    for ax in fig.axes:
        for labels, across in ((ax.get_xticklabels(), True), (ax.get_yticklabels(), False)):
            boxes = [t.get_window_extent() for t in labels if t.get_visible() and t.get_text()]
            low, high = ("x0", "x1") if across else ("y0", "y1")
            spans = sorted((getattr(b, low), getattr(b, high)) for b in boxes)
            for (_, end), (start, _) in itertools.pairwise(spans):
                assert end < start + 1, [t.get_text() for t in labels]


def test_a_variant_has_one_colour_in_every_figure(tmp_path: Path) -> None:
    names = ("topk", "gated", "batch_topk", "jumprelu", "matryoshka", "standard")
    paths = [make_run(tmp_path, f"{sae}_{k}", sae=sae, k=k) for sae in names for k in (8, 16)]
    table = load_table(paths)
    some = load_table([path for path in reversed(paths) if "a" in path.name])
    colours = {sae: {run_styles(table)[f"{sae}_{k}"].color for k in (8, 16)} for sae in names}
    assert all(len(of) == 1 for of in colours.values())
    assert len(set.union(*colours.values())) == len(names)
    for run in some.runs:
        assert {run_styles(some)[run.name].color} == colours[run.variant]
    assert len(set(run_styles(table).values())) == len(table.runs), "no two runs look the same"

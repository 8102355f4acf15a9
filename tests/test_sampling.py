"""Samples are spread over what they are taken from: the helper itself, and that nothing takes
the first rows of an ordered batch instead.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from sae_experiments.corpora.corpus import window_starts
from sae_experiments.metrics.base import EvalContext
from sae_experiments.metrics.robustness import measure as robustness
from sae_experiments.saes.base import SAE, Batch
from sae_experiments.sampling import spread, spread_order, spread_rows
from sae_experiments.studies.language.stores import DOCUMENT, held_out_starts
from support.purified import HOSTS, kinds, plainly
from support.saes import CONF, NAMES, M, downstream, make, rows, step

#: Rows of a sample that is larger than what any SAE looks at to begin with.
MANY = 20_000


@pytest.mark.parametrize(
    ("n", "k"),
    [
        (1, 1),
        (7, 3),
        (8, 8),
        (8, 20),
        (4096, 1024),
        (4096, 1000),
        (32768, 8192),
        (10_000_019, 4097),
    ],
)
def test_a_sample_has_one_row_of_every_stretch(n, k):
    found = spread(n, k)
    assert (
        len(found) == min(n, k) and (np.diff(found) > 0).all() and found[0] >= 0 and found[-1] < n
    )
    ends = np.arange(min(n, k) + 1) * n // min(n, k)
    assert ((ends[:-1] <= found) & (found < ends[1:])).all()
    assert (spread(n, None) == np.arange(n)).all() and len(spread(n, 0)) == 0


@pytest.mark.parametrize("period", [2, 64, 100, 128, 256])
@pytest.mark.parametrize("stride", [2, 4, 128, 256])
def test_a_sample_keeps_step_with_no_period_of_the_rows(period, stride):
    """Rows of a store come in windows: a plain stride of a window's length would take one
    position only.
    """
    phases = spread(stride * 2048, 2048) % period
    counts = np.bincount(phases * min(period, 16) // period, minlength=min(period, 16))
    assert counts.max() < 1.5 * counts.min()


def test_rows_of_a_tensor():
    x = torch.arange(24.0).view(12, 2)
    assert torch.equal(spread_rows(x, 5), x[spread(12, 5)])
    assert spread_rows(x, None) is x and spread_rows(x, 12) is x


@pytest.mark.parametrize("run", [1, 8])
@pytest.mark.parametrize("n", [1, 5, 8, 64, 195, 871, 1562])
def test_the_first_ones_of_an_order_are_spread_over_all(n, run):
    order = spread_order(n, run)
    assert (np.sort(order) == np.arange(n)).all()
    whole = order[: n // run * run].reshape(-1, run)
    assert (np.diff(whole, axis=1) == 1).all() and (
        order[n // run * run :] == np.arange(n // run * run, n)
    ).all()
    for part in [whole[:, 0][::by] for by in (1, 2, 3, 4, 5)]:
        for k in (4, 16, 64):
            if k <= len(part):
                gaps = np.diff(np.concatenate([[-run], np.sort(part[:k]), [n]]))
                assert gaps.max() <= 4 * max(n / k, run), (k, gaps.max())


def test_held_out_windows_are_of_the_whole_split_and_come_in_documents():
    starts = held_out_starts({"val": window_starts(200_000, 128)}, "val", 128, 65_536)[1]
    assert len(starts) == 512 and len(set(starts)) == 512
    assert (np.diff(starts.reshape(-1, DOCUMENT), axis=1) == 128).all()
    for part in (starts[:64], starts[:256], starts):  # however few a metric looks at
        counts = np.histogram(part, bins=4, range=(0, 200_000))[0]
        assert counts.min() >= 0.5 * len(part) / 4 and counts.max() <= 1.75 * len(part) / 4
    assert sorted(held_out_starts({"val": window_starts(5000, 128)}, "val", 128, 10**9)[1]) == list(
        range(0, 5000 - 128, 128)
    )


def two_texts(n: int) -> torch.Tensor:
    """n rows in the order of a text whose second half is written five times as large."""
    x = rows(n, 3)
    x[n // 2 :] *= 5
    return x


def shuffled(x: torch.Tensor) -> torch.Tensor:
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]


#: Every SAE of conf/sae and every host with purification around it.
VARIANTS = [*NAMES, *(f"purified-{host}" for host in HOSTS), "stopped"]


def variant(name: str) -> SAE:
    """One of them; batches are larger than what a hierarchy reads of them, and than what is
    watched for early stopping.
    """
    if name == "stopped":
        return plainly(
            "sae.model.stop.patience=3", "sae.model.stop.eval_rows=4096", host="topk"
        ).train()
    if name.startswith("purified-"):
        return plainly(*kinds(gaussian=1.0), host=name.removeprefix("purified-")).train()
    return make(name, *(["sae.model.rows=64"] if name == "hierarchical" else [])).train()


def begun(sae: SAE, x: torch.Tensor) -> None:
    """All phases begun and ended on the same rows, so that every sample an SAE takes outside of
    a step is taken.
    """
    with torch.no_grad():
        for phase in sae.phases():
            sae.begin(phase.name, x, x)
            sae.finish(phase.name, x)


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_the_order_of_the_rows_does_not_matter_to_beginnings_and_calibrations(name):
    x = two_texts(MANY)
    found = []
    for part in (x, shuffled(x)):
        sae = variant(name)
        sae.begin("bottom" if name == "hierarchical" else "train", part, part)
        start = (sae.pre_acts(x) > 0).float().mean()
        begun(sae, part)
        watched = [sae.watch.x.square().mean()] if getattr(sae, "watch", None) is not None else []
        found.append(
            [
                start,
                (sae.pre_acts(x) > 0).float().mean(),
                sae.eval().encode(x).square().mean(),
                *watched,
            ]
        )
    for ordered, mixed in zip(*found, strict=True):
        assert float(ordered) == pytest.approx(float(mixed), rel=0.06)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_term_of_a_loss_depends_on_rows_from_every_part_of_the_batch(name):
    """A term that depends on the rows at all (decay, say, does not) changes with any eighth of
    them.
    """
    start, x = rows(2048, 10), rows(512, 11)
    sae = variant(name)
    phases = [phase.name for phase in sae.phases()]
    with torch.no_grad():
        begun(sae, start)
    for phase in phases:
        dead = torch.arange(M) % 5 == 0

        def parts(
            x: torch.Tensor, phase: str = phase, dead: torch.Tensor = dead
        ) -> dict[str, float]:
            loss = sae.loss(
                Batch(x, x, None, downstream(x)), replace(step(sae, dead=dead), phase=phase)
            )
            return {k: v.item() for k, v in loss.parts.items()}

        plain, other = parts(x), parts(rows(512, 12))
        for part in torch.arange(512).split(64):
            still = [k for k in plain if plain[k] != other[k]]
            for seed in (13, 14):  # a count may be the same by chance, but not twice
                changed = x.clone()
                changed[part] = rows(64, seed)
                new = parts(changed)
                still = [k for k in still if plain[k] == new[k]]
            assert still == [], (phase, int(part[0]))


def test_the_order_of_the_rows_does_not_matter_to_margins_and_curves():
    options = OmegaConf.to_container(OmegaConf.load(CONF / "metric" / "robustness.yaml"))
    options = {k: v for k, v in options.items() if not k.startswith("_")} | {
        "rows": None,
        "sizes": [0.1, 0.3],
        "min_fires": 5,
    }
    sae = make("standard").eval()
    x = two_texts(8192)
    sae.begin("train", x, x)
    names = ("rob_radius", "rob_crosstalk", "rob_area_gaussian", "rob_denoised_fvu")
    ordered, mixed = (
        robustness.measure(
            EvalContext(sae=sae, device=torch.device("cpu"), x=part), **options
        ).scalars
        for part in (x, shuffled(x))
    )
    for name in names:
        assert ordered[name] == pytest.approx(mixed[name], rel=0.15), name

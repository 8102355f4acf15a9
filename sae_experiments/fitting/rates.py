"""The default learning rate of an SAE, and its reduction when it turns out too high.

An Adam step changes every weight by about the learning rate, so that it moves an encoder row of
length 1 and width D by `lr sqrt(D)`. The highest stable rate thus falls with the square root of the
width. It is lower still where rows vary in few directions: gradients of all latents then agree, and
their rows move together. See docs/learning-rate.md for the measurements.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sae_experiments.quality_warnings import CLIMB, DYING, FIRINGS, MORE_ACTIVE
from sae_experiments.saes.base import SAE
from sae_experiments.sampling import spread_rows
from sae_experiments.training.loop import TrainConfig

#: The rate at a width, for rows that vary in at least as many directions.
LR = 3e-3
WIDTH = 512
DIRECTIONS = 25
#: The highest default.
HIGHEST = 6e-3
#: Rows to count directions in.
ROWS = 8192


def default_lr(sae: SAE, n_directions: float) -> float:
    """`f min(6e-3, 3e-3 sqrt(512 / width) min(1, sqrt(directions / 25)))`, to two digits.

    Args:
        sae: The SAE, with f = `default_lr_factor`. `width` is that of the rows that one of its
            encoder rows reads.
        n_directions: Directions in which the rows vary that it is fitted to.
    """
    width = sae.d_in // sae.n_sites if sae.per_site else sae.d_in
    lr = LR * math.sqrt(WIDTH / width) * min(1.0, math.sqrt(n_directions / DIRECTIONS))
    # Two digits do not depend on the order of sums, which the number of threads decides.
    return float(f"{sae.default_lr_factor * min(lr, HIGHEST):.1e}")


def fewest_directions(x: Tensor, n_sites: int) -> float:
    """`directions` of some of the rows (N, D); of several sites side by side, the fewest."""
    some = spread_rows(x, min(len(x), ROWS))
    return min(directions(part) for part in some.tensor_split(n_sites, 1))


def directions(x: Tensor) -> float:
    """Effective number of directions in which rows (N, D) vary, from 1 to D.

    The participation ratio `(sum v)^2 / sum v^2` of the variances v along the principal axes; D for
    rows that do not vary.
    """
    x = x - x.mean(0)
    covariance = (x.t() @ x).double()
    squares = covariance.square().sum()
    return float(covariance.trace().square() / squares) if squares > 0 else float(x.shape[1])


def with_default_lrs(
    given: Mapping[str, TrainConfig], saes: Mapping[str, SAE], x: Tensor
) -> dict[str, TrainConfig]:
    """Training settings of the SAEs of a pass, with the default rate in place of `lr=null`.

    Args:
        given: Settings by name of the SAE.
        saes: The SAEs, which all read the same sites.
        x: Some of the rows that they are fitted to (N, D).
    """
    if all(cfg.lr is not None for cfg in given.values()):
        return dict(given)
    n_directions = fewest_directions(x, next(iter(saes.values())).n_sites)
    return {
        name: cfg if cfg.lr is not None else replace(cfg, lr=default_lr(saes[name], n_directions))
        for name, cfg in given.items()
    }


#: Further share of the latents that must be dead before the rate is halved again.
MORE_DEAD = 0.05


class BackOff(nn.Module):
    """Factor of the learning rate, halved when many latents die or the error climbs.

    Every `EVERY` steps after the warm-up the state of the fit is looked at. The rate is halved if

    - the error (FVU, median of the last `LOOKS` looks) is 20 % above an earlier one since the
      last halving that needed no more active latents, or
    - more than 10 % of the latents are dead, and 5 % more than at the last halving.

    A halving discards all earlier looks, and the next one comes at least `LOOKS` looks later. All
    state is in buffers, so that a resumed fit goes on with the same bits.

    Args:
        steps: Steps of the fit.
        firings: Expected firings of an average latent within the rows of silence after which it
            counts as dead; below `FIRINGS`, dead latents are not judged.
    """

    EVERY = 10
    LOOKS = 5
    #: Smallest factor.
    LEAST = 1 / 16

    factor: Tensor
    looks: Tensor
    state: Tensor

    def __init__(self, *, steps: int, firings: float) -> None:
        super().__init__()
        self.judge_dead = firings >= FIRINGS
        double: dict[str, Any] = {"dtype": torch.float64}
        self.register_buffer("factor", torch.ones((), **double))
        # Error and L0 of every look since the last halving.
        self.register_buffer("looks", torch.zeros(steps // self.EVERY + 1, 2, **double))
        # Looks since the last halving, and the dead share at it.
        self.register_buffer("state", torch.zeros(2, **double))

    def look(self, error: float, l0: float, dead: float) -> None:
        """Record the state of the fit, and halve the factor if the fit goes wrong."""
        n = int(self.state[0])
        self.looks[n] = torch.tensor([error, l0], dtype=torch.float64)
        self.state[0] += 1
        if n + 1 < 2 * self.LOOKS or float(self.factor) <= self.LEAST:
            return
        dying = self.judge_dead and dead > max(DYING, float(self.state[1]) + MORE_DEAD)
        if dying or self._climbed(n + 1):
            self.factor *= 0.5
            self.state.copy_(torch.tensor([0.0, dead]))

    def restart(self) -> None:
        """Forget earlier looks: a new phase may have another error."""
        self.state.zero_()

    def _climbed(self, n: int) -> bool:
        """True if the last error is too far above an earlier one."""
        medians = self.looks[:n].unfold(0, self.LOOKS, 1).median(-1).values
        error, l0 = medians[-1]
        earlier, active = medians[: -self.LOOKS].T
        fair = active <= MORE_ACTIVE * l0
        return bool((fair & (error > (1 + CLIMB) * earlier)).any())

"""Toy models of superposition, `x -> ReLU(W^T W x + b)`, many of them trained at once.

There is a model for every depth, hidden size and instance (Elhage et al. 2022). Models of one depth
and similar hidden size lie in one padded tensor. Padding stays exactly zero and every model's
arithmetic is its own, so that its result does not depend on the models beside it.

If there are few distinct samples, a batch is stored as the number of times that each occurs, which
is a multinomial draw. The loss is then a weighted sum over the distinct samples, with the same
distribution as the loss over a batch. On a processor with a C compiler a step is compiled code
(`toy_step`), else PyTorch's; they differ by rounding alone.

Shape letters: I instances, C configurations of a group, R rows (hidden units, zeros, and last the
bias), F features (padded to a multiple of 16), S samples, J sets of samples (I, or 1 if all
instances share the distinct ones), M = I * C / J models that see the same set.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sae_experiments.studies.superposition.toy_step import compiled
from sae_experiments.studies.superposition.trees import TREES, Features, padded
from sae_experiments.training.loop import Learner, Loss, StepInfo, TrainConfig, seed_of

INITS = ("matrix", "stacked")
#: Hidden units and the bias are padded to a multiple of this.
ROWS = 4
#: Batches drawn at once.
DRAWN = 4
#: Entries of an output that are processed at once; on a processor, as many as its cache holds.
CHUNK = {"cpu": 1 << 18, "cuda": 1 << 26}


class Samples(NamedTuple):
    """Samples of the models of one depth in a step."""

    x: Tensor
    """Bytes of 0 and 1, (J, S, F)."""
    shares: Tensor | None
    """Share of the batch that each sample makes up, (I, S); None: all the same."""


class Stream:
    """The samples of one depth, as a function of seed and step.

    These are the distinct samples with their counts if they are no more than a batch, and batches
    otherwise.

    Args:
        features: Distribution of the samples.
        depth: Depth of the tree.
        instances: Number I of instances.
        batch: Samples per step and instance.
        seed: Seed of the samples.
        device: Device of the samples.
    """

    def __init__(
        self,
        features: Features,
        depth: int,
        *,
        instances: int,
        batch: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self.features = features
        self.depth = depth
        self.instances = instances
        self.batch = batch
        self.device = device
        self.seed = seed_of(seed, "samples", depth)
        self.counted = features.n_distinct(depth) <= batch
        self._drawn: tuple[int, Tensor] | None = None
        if self.counted:
            rows, self.probs = features.support(depth)
            x = torch.zeros(1, len(rows), padded(rows.shape[1]), dtype=torch.uint8, device=device)
            x[0, :, : rows.shape[1]] = torch.from_numpy(rows)
            self.x = x

    def batch_at(self, step: int) -> Samples:
        """The samples of a step."""
        chunk, within = divmod(step, DRAWN)
        if self._drawn is None or self._drawn[0] != chunk:
            bits = np.random.SFC64([self.seed & 0xFFFFFFFF, self.seed >> 32, chunk])
            self._drawn = chunk, self._draw(np.random.Generator(bits))
        drawn = self._drawn[1][within]
        return Samples(self.x, drawn) if self.counted else Samples(drawn, None)

    def _draw(self, rng: np.random.Generator) -> Tensor:
        if self.counted:
            counts = rng.multinomial(self.batch, self.probs, size=(DRAWN, self.instances))
            return torch.from_numpy((counts / self.batch).astype(np.float32)).to(self.device)
        rows = self.features.draw(self.depth, DRAWN * self.instances * self.batch, rng)
        return torch.from_numpy(rows).view(DRAWN, self.instances, self.batch, -1).to(self.device)

    def everything(self, rows: int) -> Samples:
        """Samples for evaluation: the whole distribution if counted, else `rows` fresh samples."""
        if self.counted:
            shares = torch.from_numpy(self.probs.astype(np.float32)).to(self.device)
            return Samples(self.x, shares.expand(self.instances, -1))
        rng = np.random.default_rng([self.seed & 0xFFFFFFFF, self.seed >> 32])
        drawn = self.features.draw(self.depth, rows, rng)
        return Samples(torch.from_numpy(drawn).to(self.device)[None], None)


class Group(NamedTuple):
    """Models in one tensor, of one depth and several hidden sizes."""

    depth: int
    n_features: int
    """Features before padding."""
    hidden: list[int]
    """Hidden sizes."""
    rows: int
    """Number R of rows."""


class Models(nn.Module):
    """The models of all configurations.

    The parameter (I, C, R, F) of a group holds W and, in its last row, b.

    Args:
        shapes: Configurations, as (depth, hidden).
        features: Features of the trees.
        instances: Models per configuration.
        init: One of `INITS`, see `_initial`.
        seed: Seed of the weights.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        features: Features,
        *,
        instances: int,
        init: str,
        seed: int,
    ) -> None:
        super().__init__()
        members: dict[tuple[int, int], list[int]] = {}
        for depth, hidden in shapes:
            members.setdefault((depth, -(-(hidden + 1) // ROWS) * ROWS), []).append(hidden)
        self.groups = [
            Group(depth, features.n_features(depth), hidden, rows)
            for (depth, rows), hidden in members.items()
        ]
        self.theta = nn.ParameterList(
            _initial(group, instances, init, seed) for group in self.groups
        )
        self.instances = instances
        self._scratch: dict[tuple[Any, ...], Tensor] = {}

    def weights(self, depth: int, hidden: int) -> tuple[Tensor, Tensor]:
        """W (I, hidden, F) and b (I, F) of one configuration, without padding."""
        for group, theta in zip(self.groups, self.theta, strict=True):
            if group.depth == depth and hidden in group.hidden:
                rows = theta.detach()[:, group.hidden.index(hidden), :, : group.n_features]
                return rows[:, :hidden], rows[:, -1]
        raise KeyError((depth, hidden))

    @torch.no_grad()
    def losses(
        self,
        samples: dict[int, Samples],
        importances: dict[int, Tensor],
        grads: list[Tensor] | None = None,
    ) -> list[Tensor]:
        """Loss of every model, and its gradient.

        Args:
            samples: Samples by depth.
            importances: Weights of the features by depth, (F,) or a single one.
            grads: Receive the gradients, in the shapes of the parameters. None: no gradient.

        Returns:
            Losses (I, C) by group.
        """
        losses = []
        step = compiled() if grads is not None and self.theta[0].device.type == "cpu" else None
        for i, (group, theta) in enumerate(zip(self.groups, self.theta, strict=True)):
            seen = samples[group.depth]
            weight = importances[group.depth] / group.n_features
            grad = None if grads is None else grads[i]
            if step is not None and grad is not None:
                whole_weight = weight.expand(theta.shape[-1]).contiguous()
                losses.append(step(theta, grad, seen.x, seen.shares, whole_weight))
            else:
                losses.append(self._group(theta, seen, weight, grad))
        return losses

    def _group(
        self, theta: Tensor, samples: Samples, weight: Tensor, grad: Tensor | None
    ) -> Tensor:
        """Loss of one group, and its gradient.

        Args:
            theta: Parameter of the group, (I, C, R, F).
            samples: Its samples.
            weight: Share of the loss of each feature, (F,); one entry if all are the same.
            grad: Receives the gradient, (I, C, R, F). None: no gradient.

        Returns:
            Losses (I, C).
        """
        (n_i, n_c, rows, width), (sets, n) = theta.shape, samples.x.shape[:2]
        models = theta.view(sets, -1, rows, width)
        shares = _per_model(samples.shares, n_c, sets)
        x = samples.x.float()
        code = self._buffer("code", (sets, models.shape[1], rows, n), theta)
        torch.bmm(models.view(sets, -1, width), x.transpose(1, 2), out=code.view(sets, -1, n))
        code[:, :, -1] = 1.0  # the bias is the weight of a unit that is always on
        back = None if grad is None else self._buffer("back", code.shape, theta)
        total = theta.new_empty(sets, models.shape[1])
        for j, part in self._chunks(sets, models.shape[1], n * width, theta.device):
            w, h = models[j, part], code[j, part]
            out = self._buffer("out", (len(w), n, width), theta)
            torch.bmm(h.transpose(1, 2), w, out=out).relu_()
            error = torch.sub(out, x[j], out=self._buffer("error", out.shape, theta))
            each = _weighted_squares(error, weight)
            share = None if shares is None else shares[j, part]
            total[j, part] = each.mean(1) if share is None else (each * share).sum(1)
            if grad is not None and back is not None:
                slope = _slope(error, out, weight, share)
                torch.bmm(h, slope, out=grad.view_as(models)[j, part])
                torch.bmm(w, slope.transpose(1, 2), out=back[j, part])
        if grad is not None and back is not None:
            back[:, :, -1] = 0.0  # the unit that is always on does not read x
            grad.view(sets, -1, width).baddbmm_(back.view(sets, -1, n), x)
            grad.mul_((2 / n if shares is None else 2.0) * (weight[0] if len(weight) == 1 else 1.0))
        return total.view(n_i, n_c)

    def _buffer(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """A buffer that is used again in every step: fresh pages cost as much as the arithmetic."""
        key = (name, *shape)
        if key not in self._scratch:
            self._scratch[key] = torch.empty(tuple(shape), dtype=like.dtype, device=like.device)
        return self._scratch[key]

    @staticmethod
    def _chunks(
        sets: int, models: int, entries: int, device: torch.device
    ) -> Iterator[tuple[int, slice]]:
        """Sets, and slices of their models, whose outputs of `entries` each fit into a chunk."""
        size = max(1, CHUNK.get(device.type, CHUNK["cpu"]) // entries)
        return (
            (j, slice(begin, begin + size)) for j in range(sets) for begin in range(0, models, size)
        )


def _initial(group: Group, instances: int, init: str, seed: int) -> nn.Parameter:
    """Xavier-normal W and b = 0.

    The draw of a model depends on seed, depth, hidden size and instance alone. The standard
    deviation is `sqrt(2 / (hidden + F))` for a matrix. For the stacked tensor PyTorch counts
    `fan_in = hidden F` and `fan_out = I F`.
    """
    n_features = group.n_features
    theta = torch.zeros(instances, len(group.hidden), group.rows, padded(n_features))
    for c, hidden in enumerate(group.hidden):
        fans = hidden + n_features if init == "matrix" else (hidden + instances) * n_features
        std = math.sqrt(2 / fans)
        for i in range(instances):
            generator = torch.Generator().manual_seed(seed_of(seed, "init", group.depth, hidden, i))
            normal = torch.randn(hidden, n_features, generator=generator)
            theta[i, c, :hidden, :n_features] = std * normal
    return nn.Parameter(theta)


def _weighted_squares(error: Tensor, weight: Tensor) -> Tensor:
    """Weighted squared errors (M, S) of errors (M, S, F), for weights (F,) or a single one."""
    if len(weight) == 1:
        return torch.linalg.vector_norm(error, dim=2).square_() * weight
    return error.square() @ weight


def _slope(error: Tensor, out: Tensor, weight: Tensor, share: Tensor | None) -> Tensor:
    """Turn errors (M, S, F) in place into gradients before the ReLU, up to a common factor.

    Args:
        error: Errors.
        out: Outputs (M, S, F); the gradient is zero where these are.
        weight: Weights (F,) or a single one, which is left to the common factor.
        share: Share of each sample, (M, S); None: all the same.
    """
    if len(weight) > 1:
        error.mul_(weight)
    if share is not None:
        error.mul_(share[..., None])
    return torch.ops.aten.threshold_backward.grad_input(error, out, 0, grad_input=error)


def memory(
    shapes: Sequence[tuple[int, int]],
    features: Features,
    *,
    instances: int,
    batch: int,
    eval_rows: int,
) -> dict[str, float]:
    """Peak memory in bytes of training and evaluation, by purpose, accurate to about a third.

    Args:
        shapes: Configurations, as (depth, hidden).
        features: Features of the trees.
        instances: Models per configuration.
        batch: Samples per step and instance.
        eval_rows: Samples of the evaluation.
    """
    training = evaluation = models = paths = 0.0
    for depth in dict.fromkeys(depth for depth, _ in shapes):
        hidden, width = [h for d, h in shapes if d == depth], padded(features.n_features(depth))
        models += 16.0 * instances * width * sum(h + ROWS for h in hidden)
        tree, ends = features.mode in TREES, features.branching**depth
        distinct = ends if features.mode == "exclusive" else features.n_features(depth) + 1
        counted = tree and distinct <= batch
        training += 5.0 * distinct * width if counted else (DRAWN + 4.0) * instances * batch * width
        codes = 4.0 * instances * sum(h + ROWS for h in hidden) * eval_rows
        evaluation += 0.0 if counted else 14.0 * eval_rows * width + codes
        # Every path of a tree; for other features, a block each.
        paths = max(paths, 3.0 * width**2 if tree else 1e3 * width)
    return {
        "weights and optimiser": models,
        "samples": training + evaluation,
        "paths of the tree": paths,
    }


def _per_model(shares: Tensor | None, n_c: int, sets: int) -> Tensor | None:
    """Shares (I, S) repeated for the C configurations of an instance, as (J, M, S)."""
    if shares is None:
        return None
    return shares[:, None].expand(-1, n_c, -1).reshape(sets, -1, shares.shape[-1])


class _Known(torch.autograd.Function):
    """A scalar whose gradients were computed along with it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, grads: list[Tensor], *params: Tensor) -> Tensor:
        ctx.grads = grads
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Any, ...]:
        return (None, None, *(outer[0] * grad for grad in ctx.grads))


class ToyLearner(Learner):
    """All models as one learner.

    Its loss is the sum over instances and configurations of
    `mean_{batch, features} importance * error^2`.

    Args:
        models: The models.
        streams: Samples by depth.
        features: Features of the trees.
        cfg: Optimisation.
        seed: Seed of everything random.
    """

    module: Models

    def __init__(
        self,
        models: Models,
        streams: dict[int, Stream],
        features: Features,
        cfg: TrainConfig,
        *,
        seed: int,
    ) -> None:
        super().__init__("toy", models, cfg, seed=seed)
        self.streams = streams
        device = next(models.parameters()).device
        flat = features.importance == 1
        self.importances = {
            depth: _importances(features, depth, device, flat=flat) for depth in streams
        }
        self._grads = [torch.zeros_like(theta) for theta in models.theta]

    def batch_at(self, step: int) -> dict[int, Samples]:
        """The samples of every depth."""
        return {depth: stream.batch_at(step) for depth, stream in self.streams.items()}

    def loss(self, batch: dict[int, Samples], info: StepInfo) -> Loss:
        losses = self.module.losses(batch, self.importances, self._grads)
        parts: dict[str, Tensor] = {}
        for group, values in zip(self.module.groups, losses, strict=True):
            name = f"depth_{group.depth}"
            parts[name] = parts[name] + values.sum() if name in parts else values.sum()
        total = torch.stack(list(parts.values())).sum()
        return Loss(_Known.apply(total, self._grads, *self.module.theta), parts)

    def final(self, rows: int) -> dict[tuple[int, int], np.ndarray]:
        """Expected loss (I,) of every configuration.

        Exact if samples are counted, else over `rows` fresh samples.
        """
        losses: dict[tuple[int, int], np.ndarray] = {}
        samples = {depth: stream.everything(rows) for depth, stream in self.streams.items()}
        by_group = self.module.losses(samples, self.importances)
        for group, values in zip(self.module.groups, by_group, strict=True):
            for c, hidden in enumerate(group.hidden):
                losses[group.depth, hidden] = values[:, c].cpu().numpy().astype(float)
        return losses


def _importances(features: Features, depth: int, device: torch.device, *, flat: bool) -> Tensor:
    """Weights (F padded,), or a single one if all features weigh the same."""
    if flat:
        return torch.ones(1, device=device)
    n = features.n_features(depth)
    weights = torch.zeros(padded(n), device=device)
    weights[:n] = torch.from_numpy(features.importances(depth)).float()
    return weights


def make(
    shapes: Sequence[tuple[int, int]],
    features: Features,
    cfg: TrainConfig,
    *,
    instances: int,
    init: str,
    seed: int,
    device: torch.device,
) -> ToyLearner:
    """Build the models of all configurations with their samples, as a learner for `train`."""
    models = Models(shapes, features, instances=instances, init=init, seed=seed).to(device)
    depths = dict.fromkeys(depth for depth, _ in shapes)
    streams = {
        d: Stream(features, d, instances=instances, batch=cfg.batch_size, seed=seed, device=device)
        for d in depths
    }
    return ToyLearner(models, streams, features, cfg, seed=seed)

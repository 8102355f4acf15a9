"""Attribution of downstream latents to upstream latents, for many targets at once.

Gradients run through the language model between two SAEs. With `x = sum_j z_j d_j + b + err` at the
upstream site (`err` constant) and `A_i = e_i (x' - b') + c_i` the pre-activation of latent i of the
downstream SAE at position t', the gradient is `g_j(s) = dA_i(t') / dz_j(s)` for the latents j
active at every position s <= t'. The attribution `z_j(s) g_j(s)` is the first-order effect of
removing one of them (attribution patching on SAE latents: Marks et al. 2024).

Shape letters: P prompts, T positions, K active latents per position (padded), R targets, C width of
the state, D width of a site, F latents.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sae_experiments.errors import UserError
from sae_experiments.models.hooks import Site, activations
from sae_experiments.saes.base import SAE
from sae_experiments.studies.circuits.path import Path

#: Targets whose pre-activations are computed at once.
BLOCK = 4096


class Targets(NamedTuple):
    """Downstream latents at positions of prompts: whole numbers (R,) each."""

    prompt: Tensor
    position: Tensor
    latent: Tensor

    # An index chooses rows of all fields, as that of a tensor does, and not a field.
    def __getitem__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, which: Tensor | slice
    ) -> Targets:
        return Targets(*(tuple.__getitem__(self, i)[which] for i in range(3)))

    @property
    def n(self) -> int:
        """Number of targets (`len` of a named tuple is its number of fields)."""
        return len(self.prompt)


@dataclass
class Prompts:
    """Prompts as both SAEs read them."""

    tokens: Tensor
    """Tokens, (P, T)."""
    index: Tensor
    """Active upstream latents, (P, T, K)."""
    value: Tensor
    """Their activations, (P, T, K); 0 for padding."""
    amount: Tensor
    """Activation minus the baseline, which removing each latent takes away, (P, T, K)."""
    state: Tensor
    """The state that upstream latents add to, (P, T, C); see `Path`."""
    base: Tensor | None
    """The stream without the upstream MLP's output, (P, T, C), if it is needed; see `Path.base`."""
    error: Tensor
    """The upstream SAE's error in the state, (P, T, C)."""
    bias: Tensor
    """The upstream decoder's bias in the state, (C,)."""
    active: Targets
    """Every downstream latent that is active at a position, in order."""
    active_value: Tensor
    """Their activations, (n,)."""
    active_pre: Tensor
    """Their pre-activations, (n,)."""

    def __len__(self) -> int:
        return len(self.tokens)


class Attribution(NamedTuple):
    """Attributions of some targets to what is active in the prompt of each."""

    targets: Targets
    value: Tensor
    """Pre-activations, (R,)."""
    gradient: Tensor
    """Gradients, (R, T, K)."""
    attribution: Tensor
    """Attributions, (R, T, K)."""
    state_gradient: Tensor
    """Gradients in the state, (R, T, C), at the prompts' own states."""


class Circuit:
    """Two SAEs on one language model.

    Args:
        model: The language model.
        upstream: The SAE whose latents have effects.
        read: Site that it reads.
        write: Site that it reconstructs.
        downstream: The SAE whose latents are affected.
        to: Site that it reads.
        memory_mb: Memory in MiB that a call may use at a time beyond its arguments and results,
            whatever the number of targets.

    Raises:
        UserError: An SAE has another width than its site, reads several sites or has a decoder
            that is not linear; or the sites are in the wrong order.
    """

    def __init__(
        self,
        model: nn.Module,
        upstream: SAE,
        read: Site,
        write: Site,
        downstream: SAE,
        to: Site,
        *,
        memory_mb: float,
    ) -> None:
        for name, sae in (("upstream", upstream), ("downstream", downstream)):
            if sae.n_sites != 1:
                raise UserError(
                    f"{name}: {type(sae).__name__} reads several sites at once, "
                    "attribution needs an SAE of one"
                )
        self.model = model.eval().requires_grad_(False)
        self.upstream = upstream.eval()
        self.downstream = downstream.eval()
        self.read = read
        self.write = write
        self.to = to
        self.memory_mb = memory_mb
        self.path = Path(model, write, to)
        self.bias, self.atoms = decoder_of(upstream)
        self.directions = self.path.carried(self.atoms)
        self._plain = type(downstream).pre_acts is SAE.pre_acts

    @property
    def continuous(self) -> bool:
        """True if pre-activations of the downstream SAE are linear in its rows.

        Other SAEs read a code with a threshold, at which their pre-activations jump.
        """
        return self._plain and type(self.downstream).encoder_input is SAE.encoder_input

    def pre_activation(self, x: Tensor, latent: Tensor) -> Tensor:
        """Pre-activation `A_i` of one latent per row, differentiable in the rows.

        Args:
            x: Rows (R, D) of the downstream site.
            latent: Latents (R,).

        Returns:
            Pre-activations (R,).
        """
        if not self._plain:
            return self.downstream.pre_acts(x).gather(1, latent[:, None])[:, 0]
        seen = self.downstream.shifted(self.downstream.encoder_input(x))
        bias = self.downstream.b_enc.detach()[latent]
        return (seen * self.downstream.W_enc[latent]).sum(-1) + bias

    @torch.no_grad()
    def prompts(
        self, tokens: Tensor, *, baseline: Tensor | None = None, keep_error: bool = True
    ) -> Prompts:
        """Read prompts with both SAEs.

        Args:
            tokens: Tokens (P, T).
            baseline: Values (F,) that latents are set to when they are removed, such as their means
                for mean ablation. None: 0.
            keep_error: The state includes the upstream SAE's error. Otherwise it is the
                reconstruction's, so that everything is taken at another point than the model's own.
        """
        sites = list(dict.fromkeys([self.read, self.write, *self.path.sites]))
        seen = activations(self.model, tokens, sites)
        shape = seen[self.write].shape
        x = seen[self.read].flatten(0, 1)
        acts = self.upstream.encode(x)
        recon = self.upstream.reconstruct(x, acts)
        error = (seen[self.write].flatten(0, 1) - recon).view(shape)
        base = self.path.base(seen)
        if not keep_error:
            seen = self.path.moved(seen, seen[self.write] - error)
        k = max(int((acts != 0).sum(1).max()), 1)
        index = (acts != 0).byte().topk(k, dim=1).indices.sort(1).values
        value = acts.gather(1, index)
        kept = 0 if baseline is None else baseline[index]
        amount = torch.where(value != 0, value - kept, value)
        rows = seen[self.to].flatten(0, 1)
        downstream = self.downstream.encode(rows)
        row, latent = downstream.nonzero(as_tuple=True)
        by_position = (*shape[:2], k)
        return Prompts(
            tokens=tokens,
            index=index.view(by_position),
            value=value.view(by_position),
            amount=amount.view(by_position),
            state=self.path.state(seen),
            base=base,
            error=self.path.carried(error),
            bias=self.path.carried(self.bias[None])[0],
            active=Targets(row // shape[1], row % shape[1], latent),
            active_value=downstream[row, latent],
            active_pre=self._pre_activations(rows, row, latent),
        )

    def _pre_activations(self, x: Tensor, row: Tensor, latent: Tensor) -> Tensor:
        """Pre-activations (n,) of latents (n,) on some of the rows `x` (N, D)."""
        if not len(row):
            return row
        blocks = zip(row.split(BLOCK), latent.split(BLOCK), strict=True)
        return torch.cat([self.pre_activation(x[r], i) for r, i in blocks])

    def project(
        self, prompts: Prompts, prompt: Tensor, rows: Tensor, vectors: Tensor | None = None
    ) -> Tensor:
        """Products of rows with the directions of what is active in the prompt of each.

        Args:
            prompts: The prompts.
            prompt: Prompt of each row, (R,); rows of one prompt must be neighbours.
            rows: Rows (R, T, C), or (R, C) for all positions alike.
            vectors: Directions (F, C) in place of the decoder's.

        Returns:
            Products (R, T, K).
        """
        vectors = self.directions if vectors is None else vectors
        parts = []
        for p, part in runs(prompt):
            directions = vectors[prompts.index[p]]  # (T, K, C)
            x = rows[part]
            if x.ndim == 2:
                products = torch.einsum("rc,tkc->rtk", x, directions)
            else:
                products = torch.bmm(x.transpose(0, 1), directions.transpose(1, 2)).transpose(0, 1)
            parts.append(products)
        return torch.cat(parts) if parts else rows.new_zeros(0, *prompts.index.shape[1:])

    def changed(self, prompts: Prompts, prompt: Tensor, share: Tensor) -> Tensor:
        """States of prompts from which parts of the active latents are removed.

        Args:
            prompts: The prompts.
            prompt: Prompt of each row, (R,); rows of one prompt must be neighbours.
            share: Share of each active latent's contribution to remove, (R, T, K).

        Returns:
            States (R, T, C).
        """
        states = prompts.state[prompt]
        for p, part in runs(prompt):
            weights = (share[part] * prompts.amount[p]).transpose(0, 1)
            directions = self.directions[prompts.index[p]]
            states[part] -= torch.bmm(weights, directions).transpose(0, 1)
        return states

    @torch.no_grad()
    def values(self, prompts: Prompts, targets: Targets, states: Tensor) -> Tensor:
        """Pre-activations (R,) of targets in changed states (R, T, C) of their prompts."""
        base = None if prompts.base is None else prompts.base[targets.prompt]
        return self.path.value(
            states, base, targets.position, lambda x: self.pre_activation(x, targets.latent)
        )

    def chunk(self, prompts: Prompts) -> int:
        """Number of targets that fit into `memory_mb`.

        A target needs about a dozen times its prompt's state, and more if blocks lie between.
        """
        last = self.path.last
        copies = 40 * len(self.path.middle) + (last.pull_back_copies if last else 12)
        if self.path.upstream.stream == "mlp_in":
            copies += 20
        floats = copies * prompts.state[0].numel() + 8 * prompts.index[0].numel()
        return max(1, int(self.memory_mb * 2**20 / (prompts.state.element_size() * floats)))

    def attribute(
        self, prompts: Prompts, targets: Targets, *, steps: int = 0
    ) -> Iterator[Attribution]:
        """Gradients and attributions of any number of targets, in the order of their prompts.

        With `steps` > 0 these are integrated gradients (Sundararajan et al. 2017): the gradient is
        averaged over points of the straight line from all active latents removed to none. As the
        number of points grows, the attributions of a target sum to the effect of removing all
        active latents, `A_i - A_i(removed)`, if the circuit is `continuous`: no gradient sees a
        jump.

        Args:
            prompts: The prompts.
            targets: The targets.
            steps: Gauss-Legendre points of integrated gradients; 0: the plain gradient.

        Yields:
            Attributions of at most `chunk` targets.
        """
        targets = targets[torch.argsort(targets.prompt, stable=True)]
        points = [(1.0, 1.0)]
        if steps:
            nodes, weights = np.polynomial.legendre.leggauss(steps)
            pairs = zip(nodes, weights, strict=True)
            points = [(float(x + 1) / 2, float(w) / 2) for x, w in pairs]
        size = self.chunk(prompts)
        for begin in range(0, targets.n, size):
            part = targets[slice(begin, begin + size)]
            used, at = torch.unique_consecutive(part.prompt, return_inverse=True)
            (alpha, weight), *others = points
            value, g = self._pull_back(prompts, part, used, at, alpha)
            gradient = self.project(prompts, part.prompt, g) * weight
            state_gradient = g * weight
            for alpha, weight in others:
                value, g = self._pull_back(prompts, part, used, at, alpha)
                gradient = gradient + self.project(prompts, part.prompt, g) * weight
                state_gradient = state_gradient + g * weight
            attribution = gradient * prompts.amount[part.prompt]
            yield Attribution(part, value, gradient, attribution, state_gradient)

    def _pull_back(
        self, prompts: Prompts, targets: Targets, used: Tensor, at: Tensor, alpha: float
    ) -> tuple[Tensor, Tensor]:
        """Values (R,) and gradients (R, T, C) with `1 - alpha` of all active latents removed.

        Args:
            prompts: The prompts.
            targets: The targets.
            used: Their different prompts.
            at: Place of each target's prompt among these, (R,).
            alpha: Share of the active latents that is kept.
        """
        with torch.no_grad():
            state = prompts.state[used]
            if alpha != 1.0:
                shape = (len(used), *prompts.index.shape[1:])
                state = self.changed(prompts, used, state.new_full(shape, 1 - alpha))
            base = None if prompts.base is None else prompts.base[used]
        return self.path.linearise(state, base).pull_back(
            at, targets.position, lambda x: self.pre_activation(x, targets.latent)
        )


def concatenated(calls: Sequence[Attribution], name: str) -> Tensor:
    """Concatenate one field of several attributions over all of their targets."""
    return torch.cat([getattr(call, name) for call in calls])


def runs(prompt: Tensor) -> Iterator[tuple[int, slice]]:
    """Value and place of every run of equal entries (R,)."""
    values, counts = torch.unique_consecutive(prompt, return_counts=True)
    begin = 0
    for p, n in zip(values.tolist(), counts.tolist(), strict=True):
        yield p, slice(begin, begin + n)
        begin += n


@torch.no_grad()
def decoder_of(sae: SAE) -> tuple[Tensor, Tensor]:
    """Bias (O,) and rows (F, O) of a decoder, from its reconstructions.

    Raises:
        UserError: The decoder is not linear in the code.
    """
    like = {"device": sae.b_enc.device, "dtype": sae.b_enc.dtype}
    bias = sae.decode(torch.zeros(1, sae.d_sae, **like))[0]
    if type(sae).decode is SAE.decode:
        return bias, sae.W_dec.detach()
    rows = torch.cat([sae.decode(part) - bias for part in torch.eye(sae.d_sae, **like).split(512)])
    generator = torch.Generator(like["device"]).manual_seed(0)
    code = torch.rand(4, sae.d_sae, generator=generator, **like)
    tolerance = 1e-3 * float(rows.abs().max())
    if not torch.allclose(sae.decode(code), code @ rows + bias, rtol=1e-3, atol=tolerance):
        raise UserError(
            f"{type(sae).__name__}: its decoder is not linear in its code, so that one latent has "
            "no direction to attribute to"
        )
    return bias, rows

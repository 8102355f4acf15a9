"""Attribution of a downstream latent to upstream latents: gradients through the language model between two SAEs, many targets at once.

With ``x = sum_j z_j d_j + b + err`` at the upstream site (``err`` constant) and ``A_i = e_i (x' - b') + c_i`` the pre-activation of latent i of
the downstream SAE at position t', the gradient is ``g_j(s) = dA_i(t') / dz_j(s)`` for the latents j active at every position s <= t', and the
attribution ``z_j(s) g_j(s)`` is the first-order effect of removing one of them (attribution patching on SAE latents: Marks et al. 2024).

Shape letters: P prompts, T positions, K active latents a position (padded), R targets, C width of the state, F latents.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sae_experiments.errors import UserError
from sae_experiments.models.hooks import Site, activations
from sae_experiments.saes.base import SAE
from sae_experiments.studies.circuits.path import Path


class Targets(NamedTuple):
    """Downstream latents at positions of prompts: whole numbers (R,) each."""

    prompt: Tensor
    position: Tensor
    latent: Tensor

    def __getitem__(self, which: Tensor | slice) -> Targets:  # type: ignore[override]
        return Targets(*(tuple.__getitem__(self, i)[which] for i in range(3)))

    @property
    def n(self) -> int:
        """How many there are (``len`` of a named tuple is its number of fields)."""
        return len(self.prompt)


@dataclass
class Prompts:
    """Prompts as both SAEs see them. ``index`` and ``amount`` (P, T, K): the active upstream latents and what removing each takes away, its
    activation less the baseline (0 where there is none); ``state``, ``base``: see :class:`.Path`; ``error``, ``bias``: the rest of the state."""

    tokens: Tensor
    index: Tensor
    value: Tensor
    amount: Tensor
    state: Tensor
    base: Tensor | None
    error: Tensor  # what the upstream SAE leaves out of the state, (P, T, C)
    bias: Tensor  # the upstream decoder's bias in the state, (C,)
    active: Targets  # every downstream latent that is active at a position, in order
    active_value: Tensor  # its activation
    active_pre: Tensor  # its pre-activation

    def __len__(self) -> int:
        return len(self.tokens)


class Attribution(NamedTuple):
    """Some targets of one call: pre-activations (R,), gradients and attributions (R, T, K) of what is active in each one's prompt."""

    targets: Targets
    value: Tensor
    gradient: Tensor
    attribution: Tensor
    state_gradient: Tensor  # (R, T, C), at the prompts' own states


class Circuit:
    """Two SAEs on one language model. ``upstream`` reads ``read`` and writes ``write``; ``downstream`` reads ``to``.

    ``memory_mb`` bounds what a call needs at a time beyond its arguments and results, however many targets there are.

    Raises:
        UserError: an SAE of another width than its site, of several sites, or whose decoder is not linear; sites in the wrong order.
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
                    f"{name}: {type(sae).__name__} reads several sites at once, attribution needs an SAE of one"
                )
        self.model, self.upstream, self.downstream = (
            model.eval().requires_grad_(False),
            upstream.eval(),
            downstream.eval(),
        )
        self.read, self.write, self.to, self.memory_mb = read, write, to, memory_mb
        self.path = Path(model, write, to)
        self.bias, self.atoms = decoder_of(upstream)
        self.directions = self.path.carried(self.atoms)
        self._plain = type(downstream).pre_acts is SAE.pre_acts

    @property
    def continuous(self) -> bool:
        """Whether pre-activations of the downstream SAE are linear in its rows. Others read a code with a threshold, at which they jump."""
        return self._plain and type(self.downstream).encoder_input is SAE.encoder_input

    def pre_activation(self, x: Tensor, latent: Tensor) -> Tensor:
        """``A_i`` (R,) of rows (R, D) of the downstream site for one latent (R,) each; differentiable in ``x``."""
        if not self._plain:
            return self.downstream.pre_acts(x).gather(1, latent[:, None])[:, 0]
        seen = self.downstream.shifted(self.downstream.encoder_input(x))
        return (seen * self.downstream.W_enc[latent]).sum(-1) + self.downstream.b_enc.detach()[
            latent
        ]

    @torch.no_grad()
    def prompts(
        self, tokens: Tensor, *, baseline: Tensor | None = None, keep_error: bool = True
    ) -> Prompts:
        """Read tokens (P, T). ``baseline`` (F,): what a latent is set to when it is removed (None: 0), its mean for mean-ablation.

        ``keep_error`` false: the state is the reconstruction's, so that everything is taken at another point than the model's own.
        """
        sites = list(dict.fromkeys([self.read, self.write, *self.path.sites]))
        found = activations(self.model, tokens, sites)
        shape = found[self.write].shape
        x = found[self.read].flatten(0, 1)
        acts = self.upstream.encode(x)
        recon = self.upstream.reconstruct(x, acts)
        error = (found[self.write].flatten(0, 1) - recon).view(shape)
        base = self.path.base(found)
        if not keep_error:
            found = self.path.moved(found, found[self.write] - error)
        k = max(int((acts != 0).sum(1).max()), 1)
        order = (acts != 0).byte().topk(k, dim=1).indices.sort(1).values
        value = acts.gather(1, order)
        removed = torch.where(
            value != 0, value - (0 if baseline is None else baseline[order]), value
        )
        here = found[self.to].flatten(0, 1)
        wanted = self.downstream.encode(here)
        rows, latents = wanted.nonzero(as_tuple=True)
        active = Targets(rows // shape[1], rows % shape[1], latents)
        pre = (
            torch.cat(
                [
                    self.pre_activation(here[r], i)
                    for r, i in zip(rows.split(4096), latents.split(4096), strict=True)
                ]
            )
            if len(rows)
            else rows
        )
        return Prompts(
            tokens=tokens,
            index=order.view(*shape[:2], k),
            value=value.view(*shape[:2], k),
            amount=removed.view(*shape[:2], k),
            state=self.path.state(found),
            base=base,
            error=self.path.carried(error),
            bias=self.path.carried(self.bias[None])[0],
            active=active,
            active_value=wanted[rows, latents],
            active_pre=pre,
        )

    def project(
        self, prompts: Prompts, prompt: Tensor, rows: Tensor, vectors: Tensor | None = None
    ) -> Tensor:
        """Products (R, T, K) of rows (R, T, C), or (R, C) for all positions alike, with the directions of what is active in each row's prompt.

        ``vectors`` (F, C): other directions than the decoder's. Rows of one prompt must be next to each other.
        """
        vectors, parts = self.directions if vectors is None else vectors, []
        for p, part in runs(prompt):
            found = vectors[prompts.index[p]]  # (T, K, C)
            x = rows[part]
            dots = (
                torch.einsum("rc,tkc->rtk", x, found)
                if x.ndim == 2
                else torch.bmm(x.transpose(0, 1), found.transpose(1, 2)).transpose(0, 1)
            )
            parts.append(dots)
        return torch.cat(parts) if parts else rows.new_zeros(0, *prompts.index.shape[1:])

    def changed(self, prompts: Prompts, prompt: Tensor, share: Tensor) -> Tensor:
        """States (R, T, C) of prompts from which ``share`` (R, T, K) of what each active latent adds is taken away."""
        states = prompts.state[prompt]
        for p, part in runs(prompt):
            weights = share[part] * prompts.amount[p]
            states[part] -= torch.bmm(
                weights.transpose(0, 1), self.directions[prompts.index[p]]
            ).transpose(0, 1)
        return states

    @torch.no_grad()
    def values(self, prompts: Prompts, targets: Targets, states: Tensor) -> Tensor:
        """Pre-activations (R,) of targets in changed states (R, T, C) of their prompts."""
        base = None if prompts.base is None else prompts.base[targets.prompt]
        return self.path.value(
            states, base, targets.position, lambda x: self.pre_activation(x, targets.latent)
        )

    def chunk(self, prompts: Prompts) -> int:
        """Targets that fit into ``memory_mb``: a target needs about a dozen times its prompt's state, more where blocks lie between."""
        copies = (
            12 + 40 * len(self.path.middle) + (20 if self.path.upstream.stream == "mlp_in" else 0)
        )
        floats = copies * prompts.state[0].numel() + 8 * prompts.index[0].numel()
        return max(1, int(self.memory_mb * 2**20 / (prompts.state.element_size() * floats)))

    def attribute(
        self, prompts: Prompts, targets: Targets, *, steps: int = 0
    ) -> Iterator[Attribution]:
        """Gradients and attributions of any number of targets, a bounded number at a time, in order of their prompts.

        ``steps`` > 0: integrated gradients instead (Sundararajan et al. 2017). The gradient is averaged over that many Gauss-Legendre points of
        the straight way from all active latents removed to none, which makes the attributions of a target add up to the effect of
        removing all of them, ``A_i - A_i(removed)``, as the number of points grows (if the SAE is :attr:`continuous`: no gradient sees a jump).
        """
        targets = targets[torch.argsort(targets.prompt, stable=True)]
        nodes, weights = np.polynomial.legendre.leggauss(max(steps, 1))
        points = (
            [(float(x + 1) / 2, float(w) / 2) for x, w in zip(nodes, weights, strict=True)]
            if steps
            else [(1.0, 1.0)]
        )
        for begin in range(0, targets.n, self.chunk(prompts)):
            part = targets[slice(begin, begin + self.chunk(prompts))]
            used, at = torch.unique_consecutive(part.prompt, return_inverse=True)
            gradient, state_gradient, value = None, None, None
            for alpha, weight in points:
                value, g = self._pull_back(prompts, part, used, at, alpha)
                projected = self.project(prompts, part.prompt, g) * weight
                gradient = projected if gradient is None else gradient + projected
                state_gradient = (
                    g * weight if state_gradient is None else state_gradient + g * weight
                )
            yield Attribution(
                part, value, gradient, gradient * prompts.amount[part.prompt], state_gradient
            )

    def _pull_back(
        self, prompts: Prompts, targets: Targets, used: Tensor, at: Tensor, alpha: float
    ) -> tuple[Tensor, Tensor]:
        """Values and gradients in the state with ``1 - alpha`` of all active latents removed."""
        with torch.no_grad():
            state = prompts.state[used]
            if alpha != 1.0:
                state = self.changed(
                    prompts,
                    used,
                    torch.full(
                        (len(used), *prompts.index.shape[1:]),
                        1 - alpha,
                        device=state.device,
                        dtype=state.dtype,
                    ),
                )
            base = None if prompts.base is None else prompts.base[used]
        return self.path.linearise(state, base).pull_back(
            at, targets.position, lambda x: self.pre_activation(x, targets.latent)
        )


def runs(prompt: Tensor) -> Iterator[tuple[int, slice]]:
    """Number and place of every run of equal entries."""
    values, counts = torch.unique_consecutive(prompt, return_counts=True)
    begin = 0
    for p, n in zip(values.tolist(), counts.tolist(), strict=True):
        yield p, slice(begin, begin + n)
        begin += n


@torch.no_grad()
def decoder_of(sae: SAE) -> tuple[Tensor, Tensor]:
    """Bias (O,) and rows (F, O) of a decoder, read off its answers. Raises :class:`UserError` where it is not linear in the code."""
    like = {"device": sae.b_enc.device, "dtype": sae.b_enc.dtype}
    bias = sae.decode(torch.zeros(1, sae.d_sae, **like))[0]
    if type(sae).decode is SAE.decode:
        return bias, sae.W_dec.detach()
    rows = torch.cat([sae.decode(part) - bias for part in torch.eye(sae.d_sae, **like).split(512)])
    code = torch.rand(
        4, sae.d_sae, generator=torch.Generator(like["device"]).manual_seed(0), **like
    )
    if not torch.allclose(
        sae.decode(code), code @ rows + bias, rtol=1e-3, atol=1e-3 * float(rows.abs().max())
    ):
        raise UserError(
            f"{type(sae).__name__}: its decoder is not linear in its code, so that one latent has no direction to attribute to"
        )
    return bias, rows

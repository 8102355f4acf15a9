"""Attribution through a language model: exact against autograd one by one, against finite
differences, by hand, and in memory.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import sparse
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sae_experiments.errors import UserError
from sae_experiments.models.hooks import Site, activations, capture, patched
from sae_experiments.quality_warnings import of_gap
from sae_experiments.saes.base import SAE
from sae_experiments.saes.lista import Lista
from sae_experiments.studies.circuits import check
from sae_experiments.studies.circuits.attribution import (
    Attribution,
    Circuit,
    Prompts,
    Targets,
    decoder_of,
)
from sae_experiments.studies.circuits.comparators import (
    Grams,
    coactivation,
    most_specific,
    weight_directions,
)
from sae_experiments.studies.circuits.describe import Describer
from sae_experiments.studies.circuits.graph import CircuitGraphSpec, firings_of, trace
from sae_experiments.studies.circuits.path import Path
from sae_experiments.studies.circuits.survey import Checker, CircuitCheckSpec, drawn
from support.circuit_worlds import GATED, KINDS, C, F, T, circuit, model, sae, tokens
from support.saes import NAMES, OF_SEVERAL_SITES, make, sae_spec, unsettled

PAIRS = [
    ("mlp_act.2", "mlp_act.3"),
    ("mlp_act.1", "mlp_act.4"),
    ("resid.0", "mlp_act.1"),
    ("resid.2", "resid.3"),
    ("mlp_out.1", "mlp_in.3"),
    ("mlp_in.2", "mlp_out.3"),
    ("mlp_in.1", "resid.4"),
    ("mlp_in.2", "mlp_act.2"),
    ("mlp_in.2", "mlp_out.2"),
    ("mlp_act.2", "mlp_out.2"),
    ("mlp_act.2", "resid.2"),
    ("mlp_out.2", "resid.2"),
    ("mlp_in.2", "resid.2"),
]
#: Every pair where the code differs, and four for the other layouts with gated blocks.
WORLDS = [
    *((kind, *pair) for kind in ("gpt2", "gpt_neo", "llama") for pair in PAIRS),
    *((kind, *PAIRS[i]) for kind in GATED if kind != "llama" for i in (1, 5, 6, 12)),
]


def some(c: Circuit, ids: Tensor, n: int = 24, **kwargs: object) -> tuple[Prompts, Targets]:
    prompts = c.prompts(ids, **kwargs)
    chosen = (
        torch.randperm(prompts.active.n, generator=torch.Generator().manual_seed(0))[:n]
        .sort()
        .values
    )
    return prompts, prompts.active[chosen]


def concatenated(calls: list[Attribution], name: str) -> Tensor:
    return torch.cat([getattr(c, name) for c in calls])


def one_by_one(
    c: Circuit, ids: Tensor, x: Tensor, targets: Targets, r: int
) -> tuple[Tensor, Tensor]:
    """Value and gradients (T, F) of one target by a backward pass through the model itself."""
    p, t, i = (int(v[r]) for v in targets)
    leaf = x[p : p + 1].clone().requires_grad_()
    with patched(c.model, c.write, lambda _: leaf), capture(c.model, [c.to]) as seen:
        c.model(input_ids=ids[p : p + 1], use_cache=False)
    value = c.downstream.pre_acts(seen[c.to][0, t : t + 1])[0, i]
    return value.detach(), torch.autograd.grad(value, leaf)[0][0] @ c.atoms.t()


@pytest.mark.parametrize(("kind", "upstream", "downstream"), WORLDS)
def test_gradients_equal_backward_passes_one_by_one(
    kind: str, upstream: str, downstream: str
) -> None:
    c, ids = circuit(model(kind), upstream, downstream)
    exact = (
        1e-9 if kind == "gpt2" else 1e-5
    )  # GPT-Neo's own attention is in single precision whatever it is given, as is RMSNorm
    c.path.check(ids)
    prompts, targets = some(c, ids, 10)
    x = activations(c.model, ids, [c.write])[c.write]
    calls = list(c.attribute(prompts, targets))
    gradient, value = concatenated(calls, "gradient"), concatenated(calls, "value")
    for r in range(targets.n):
        wanted, g = one_by_one(c, ids, x, targets, r)
        g = g.gather(1, prompts.index[targets.prompt[r]])
        assert torch.allclose(value[r], wanted, atol=exact)
        assert float((gradient[r] - g).abs().max()) <= exact * float(g.abs().max().clamp_min(1))
        at = int(targets.position[r])
        assert not bool(gradient[r, at + 1 :].any()), "later positions cannot matter"
    active = prompts.active
    assert torch.allclose(active_pre(c, prompts), prompts.active_pre, atol=exact) and active.n > 50


def active_pre(c: Circuit, prompts: Prompts) -> Tensor:
    return check.clean(c, prompts, prompts.active)


@pytest.mark.parametrize(
    ("upstream", "downstream"),
    [("mlp_act.2", "mlp_act.3"), ("mlp_in.2", "mlp_out.3"), ("resid.1", "resid.3")],
)
def test_the_gradient_of_a_chosen_latent_is_known_for_all_upstream_latents(
    upstream: str, downstream: str
) -> None:
    c, ids = circuit(model("gpt2"), upstream, downstream)
    prompts = c.prompts(ids)
    latent = int(prompts.active.latent.mode().values)
    spec = CircuitGraphSpec(
        latents=None,
        count=1,
        order=1,
        min_fires=1,
        upstream_latent=None,
        firings=5,
        edges=3,
        contexts=1,
        before=1,
        after=1,
    )
    found = trace(c, prompts, latent, spec, steps=0)
    targets = firings_of(prompts, latent, 5)
    strongest = int(check.clean(c, prompts, targets).argmax())
    x = activations(c.model, ids, [c.write])[c.write]
    at = int(targets.position[strongest])
    wanted = one_by_one(c, ids, x, targets, strongest)[1][at]
    assert found.every.shape == found.here.shape == (F,) and np.allclose(
        found.every, wanted.numpy(), atol=1e-9
    )
    on = (
        c.upstream.encode(activations(c.model, ids, [c.read])[c.read][targets.prompt[strongest]])[
            at
        ]
        != 0
    )
    assert np.array_equal(found.here, on.numpy()) and 0 < on.sum() < F, (
        "latents that are not active have a gradient too"
    )
    silent = int((~on).nonzero()[0])
    asked = trace(c, prompts, latent, replace(spec, upstream_latent=silent), steps=0)
    assert asked.interest == silent and found.interest in range(F)


def test_batches_do_not_matter_and_memory_is_bounded() -> None:
    small, ids = circuit(model("gpt2"), "mlp_act.2", "mlp_act.3", n=6, memory_mb=0.25)
    large = Circuit(
        small.model,
        small.upstream,
        small.read,
        small.write,
        small.downstream,
        small.to,
        memory_mb=64,
    )
    prompts, targets = some(small, ids, 400)
    shuffled = targets[torch.randperm(targets.n)]
    sizes: list[int] = []

    class Watch(TorchDispatchMode):
        # type: ignore[no-untyped-def]
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.append(out.numel() * out.element_size() if isinstance(out, Tensor) else 0)
            return out

    def run(c: Circuit, t: Targets) -> dict[tuple[int, ...], tuple[Tensor, Tensor]]:
        found = {}
        with Watch():
            for part in c.attribute(prompts, t):
                for r in range(part.targets.n):
                    found[tuple(int(v[r]) for v in part.targets)] = part.gradient[r], part.value[r]
        return found

    a = run(small, shuffled)
    assert small.chunk(prompts) < 40 < targets.n
    assert max(sizes) <= 0.25 * 2**20, "one intermediate result exceeds the bound"
    b = run(large, targets)
    assert a.keys() == b.keys() and len(a) == targets.n
    assert all(
        torch.allclose(a[k][0], b[k][0], atol=1e-11) and torch.allclose(a[k][1], b[k][1]) for k in a
    )


def test_a_step_along_the_gradient_does_what_the_gradient_says() -> None:
    c, ids = circuit(model("gpt_neo"), "mlp_act.2", "mlp_act.3")
    prompts, targets = some(c, ids)
    gradient = concatenated(list(c.attribute(prompts, targets)), "gradient")
    allowed = check.reachable(prompts, targets, same=False)
    errors = []
    for step in (1e-3, 1e-4):
        predicted, actual = check.nudge(c, prompts, targets, gradient, allowed, step)
        assert bool((predicted > 0).all())
        errors.append(float(((actual - predicted) / predicted).abs().max()))
    assert errors[1] < 1e-3 and errors[1] < 0.2 * errors[0], (
        "the error of a first-order prediction falls with the step"
    )


def linear_world() -> tuple[Circuit, Tensor]:
    """A model whose second block does nothing, so that resid.2 is resid.1 and everything
    between the SAEs is the identity.
    """
    lm = model("gpt2", layers=2)
    block = lm.transformer.h[1]
    for layer in (block.attn.c_proj, block.mlp.c_proj):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return circuit(lm, "resid.1", "resid.2")


def test_in_a_linear_world_attribution_is_the_effect_and_everything_adds_up() -> None:
    c, ids = linear_world()
    prompts, targets = some(c, ids)
    calls = list(c.attribute(prompts, targets))
    gradient, attribution = concatenated(calls, "gradient"), concatenated(calls, "attribution")
    e = c.downstream.W_enc[targets.latent]
    rows, t = torch.arange(targets.n), targets.position
    by_hand = torch.einsum("rc,rkc->rk", e, c.atoms[prompts.index[targets.prompt, t]])
    assert torch.allclose(gradient[rows, t], by_hand, atol=1e-12)
    gradient[rows, t] = 0
    assert not bool(gradient.any()), "nothing reaches other positions"
    pairs = check.Pairs(*check.reachable(prompts, targets, same=False).nonzero(as_tuple=True))
    assert torch.allclose(
        check.single_effects(c, prompts, targets, pairs), pairs.of(attribution), atol=1e-10
    )
    parts = attribution.flatten(1).sum(1)
    parts += (
        (concatenated(calls, "state_gradient") * (prompts.error[targets.prompt] + prompts.bias))
        .flatten(1)
        .sum(1)
    )
    constant = c.downstream.bias()[targets.latent]
    assert torch.allclose(parts + constant, check.clean(c, prompts, targets), atol=1e-10), (
        "latents + error + bias + constant = A"
    )


def test_latents_error_and_bias_are_the_whole_first_order_term() -> None:
    c, ids = circuit(model("gpt2"), "mlp_act.2", "mlp_act.3")
    prompts, targets = some(c, ids)
    x = activations(c.model, ids, [c.write])[c.write] @ c.path.source.w_out
    for call in c.attribute(prompts, targets):
        whole = (call.state_gradient * x[call.targets.prompt]).flatten(1).sum(1)
        parts = call.attribution.flatten(1).sum(1) + (
            call.state_gradient * (prompts.error[call.targets.prompt] + prompts.bias)
        ).flatten(1).sum(1)
        assert torch.allclose(parts, whole, atol=1e-9)


@pytest.mark.parametrize(
    ("upstream", "downstream"), [("mlp_act.2", "mlp_act.3"), ("mlp_in.1", "mlp_act.3")]
)
def test_integrated_gradients_add_up_to_the_effect_of_removing_everything(
    upstream: str, downstream: str
) -> None:
    c, ids = circuit(model("gpt2", scale=0.1), upstream, downstream)
    prompts, targets = some(c, ids)
    allowed = check.reachable(prompts, targets, same=False)
    effect = check.joint_effects(c, prompts, targets, lambda part: allowed[part].double())
    gaps = [
        float(
            (
                concatenated(list(c.attribute(prompts, targets, steps=n)), "attribution")
                .flatten(1)
                .sum(1)
                - effect
            )
            .abs()
            .max()
        )
        for n in (3, 12, 40)
    ]
    assert gaps[2] < 1e-9 * float(effect.abs().max()) and gaps[1] < 1e-2 * gaps[0]
    plain = concatenated(list(c.attribute(prompts, targets)), "attribution").flatten(1).sum(1)
    assert float((plain - effect).abs().max()) > 1e-3 * float(effect.abs().max()), (
        "the path is curved"
    )


def copying() -> tuple[nn.Module, Circuit]:
    """A planted circuit: block 2's first head looks at the position before and copies
    coordinate T of what it reads to coordinate T + 1.
    """
    lm = model("gpt2", layers=2)
    for p in lm.parameters():
        nn.init.zeros_(p)
    for block in lm.transformer.h:
        for norm in (block.ln_1, block.ln_2):
            nn.init.ones_(norm.weight)
    half = C // 2
    lm.transformer.wpe.weight.data[:, :T] = 2 * torch.eye(T)
    lm.transformer.wte.weight.data[::2, T] = 3.0
    attention = lm.transformer.h[1].attn
    for t in range(1, T):
        attention.c_attn.weight.data[t, t - 1] = 9.0  # queries of t ...
    attention.c_attn.weight.data[range(T), range(C, C + T)] = 9.0  # ... meet keys of t - 1
    attention.c_attn.weight.data[T, 2 * C] = 1.0
    attention.c_proj.weight.data[0, T + 1] = 1.0
    assert half >= T
    up, down = sae(C, 1), sae(C, 2)
    for made in (up, down):
        for p in made.parameters():
            nn.init.zeros_(p)
    up.W_enc.data[3, T] = up.W_dec.data[3, T] = 1.0  # latent 3: the coordinate that is copied
    up.W_enc.data[4, 0] = up.W_dec.data[4, 0] = 1.0  # latent 4: another one
    up.W_enc.data[5, T + 2], up.b_enc.data[5], up.W_dec.data[5, T + 2] = (
        1.0,
        1.0,
        1.0,
    )  # latent 5: always on, writes what nobody reads
    down.W_enc.data[7, T + 1] = 1.0  # latent 7: the coordinate that it is copied to
    return lm, Circuit(
        lm, up, Site("resid", 1), Site("resid", 1), down, Site("resid", 2), memory_mb=4
    )


def test_a_planted_copy_circuit_is_found_at_the_position_before() -> None:
    _, c = copying()
    ids = torch.tensor([[0, 1, 0, 0, 1, 1, 0, 1, 0, 1], [1, 0, 1, 1, 0, 0, 1, 0, 1, 1]])
    prompts = c.prompts(ids)
    active = prompts.active
    assert active.latent.unique().tolist() == [7]
    wanted = {(p, t) for p in range(2) for t in range(1, T) if ids[p, t - 1] == 0}
    strong = active[
        (prompts.active_value > 0.5 * prompts.active_value.max()) & (active.position > 0)
    ]  # the first can look at itself only
    assert set(zip(strong.prompt.tolist(), strong.position.tolist(), strict=True)) == wanted
    for call in c.attribute(prompts, strong):
        for r in range(call.targets.n):
            p, t = int(call.targets.prompt[r]), int(call.targets.position[r])
            s, k = divmod(int(call.attribution[r].argmax()), prompts.index.shape[2])
            assert (s, int(prompts.index[p, s, k])) == (t - 1, 3)
            share = call.attribution[r].abs().sum(1) / call.attribution[r].abs().sum()
            assert float(share[t - 1]) > 0.99, "nothing else than the position before matters"
    pairs = check.Pairs(
        *(
            check.reachable(prompts, strong, same=False) & (prompts.index[strong.prompt] == 3)
        ).nonzero(as_tuple=True)
    )
    effect = check.single_effects(c, prompts, strong, pairs)
    before = pairs.position == strong.position[pairs.row] - 1
    assert float(effect[before].min()) > 0.5 * float(prompts.active_value.max()) and float(
        effect[~before].abs().max()
    ) < 0.2 * float(effect.max())


def test_splicing_with_the_error_kept_changes_nothing_and_dropping_it_does() -> None:
    for upstream in ("mlp_act.2", "mlp_in.2", "resid.2"):
        c, ids = circuit(model("gpt2"), upstream, "mlp_act.3")
        kept, targets = some(c, ids)
        dropped = c.prompts(ids, keep_error=False)
        site = c.write
        x = activations(c.model, ids, [site])[site]
        recon = c.upstream(x.flatten(0, 1)).view(x.shape)
        assert not torch.allclose(
            *(concatenated(list(c.attribute(p, targets)), "gradient") for p in (kept, dropped))
        )
        with patched(c.model, site, lambda _, recon=recon: recon), capture(c.model, [c.to]) as seen:
            c.model(input_ids=ids, use_cache=False)
        wanted = c.downstream.pre_acts(seen[c.to].flatten(0, 1))[
            targets.prompt * T + targets.position, targets.latent
        ]
        assert torch.allclose(check.clean(c, dropped, targets), wanted, atol=1e-9), (
            "the model runs on the reconstruction"
        )


def test_mean_ablation_leaves_latents_at_their_mean() -> None:
    c, ids = circuit(model("gpt2"), "mlp_act.2", "mlp_act.3")
    mean = torch.rand(F, dtype=torch.float64)
    prompts, targets = some(c, ids, baseline=mean)
    on = prompts.value != 0
    assert torch.allclose(
        prompts.amount[on], (prompts.value - mean[prompts.index])[on]
    ) and not bool(prompts.amount[~on].any())
    call = next(c.attribute(prompts, targets))
    assert torch.equal(call.attribution, call.gradient * prompts.amount[call.targets.prompt])


@pytest.mark.parametrize(
    "name", [n for n in ("lista", "gated", "tied", "purified", "transcoder") if n in NAMES]
)
def test_variants_of_every_kind_have_a_pre_activation_and_a_decoder(name: str) -> None:
    made = make(name).eval().requires_grad_(False)
    bias, rows = decoder_of(made)
    code = torch.rand(5, made.d_sae)
    assert torch.allclose(made.decode(code), code @ rows + bias, atol=1e-5)
    lm = model("gpt2").float()
    other = sae(C, 1).float()
    wide = downstream(name).float()
    x, latent = torch.randn(6, C), torch.arange(6)
    c = Circuit(lm, other, Site("resid", 1), Site("resid", 1), wide, Site("resid", 2), memory_mb=1)
    assert torch.allclose(
        c.pre_activation(x, latent), wide.pre_acts(x)[torch.arange(6), latent], atol=1e-5
    )


def downstream(name: str) -> SAE:
    """A variant as wide as the residual stream, random, for inference."""
    made = unsettled(sae_spec(name).model(d_in=C, d_sae=F, d_out=C)).double()
    return made.eval().requires_grad_(False)


def gap_of(c: Circuit, ids: Tensor, nodes: int) -> float:
    """What integrated gradients miss of the effect of removing everything, relative."""
    prompts, targets = some(c, ids, 40)
    effect = check.joint_effects(
        c,
        prompts,
        targets,
        lambda part: check.reachable(prompts, targets[part], same=False).to(prompts.amount.dtype),
    )
    path = (
        concatenated(list(c.attribute(prompts, targets, steps=nodes)), "attribution")
        .flatten(1)
        .sum(1)
    )
    return float((path - effect).abs().sum() / effect.abs().sum())


@pytest.mark.parametrize("name", [n for n in NAMES if n not in OF_SEVERAL_SITES])
def test_integrated_gradients_add_up_for_every_variant_whose_pre_activation_is_continuous(
    name: str,
) -> None:
    lm, ids, sites = model("gpt2", layers=2), tokens(3), (Site("resid", 1), Site("resid", 2))
    found, up, made = activations(lm, ids, sites), sae(C, 1), downstream(name)
    up.calibrate_threshold(found[sites[0]].flatten(0, 1), 6)
    made.b_dec.copy_(found[sites[1]].flatten(0, 1).mean(0))
    made.finish("train", found[sites[1]].flatten(0, 1))
    c = Circuit(lm, up, sites[0], sites[0], made.eval(), sites[1], memory_mb=4)
    few, many = (gap_of(c, ids, n) for n in (12, 40))
    assert c.continuous == (not isinstance(made, Lista) and name != "hierarchical")
    assert (few < 1e-2 and many < 1e-6) if c.continuous else (few > 0.05 and many > 0.05)
    if isinstance(
        made, Lista
    ):  # with every latent in its first code nothing jumps, and they add up
        made.first_threshold.fill_(-torch.inf)
        assert gap_of(c, ids, 40) < 1e-6


def test_a_gap_is_a_warning_with_its_reason() -> None:
    assert of_gap(None, None) == of_gap(1e-6, "Lista") == []
    (few,), (jumps,) = of_gap(0.2, None), of_gap(0.317, "Lista")
    assert "study.checks.nodes" in few.do and "jump" not in few.says
    assert "0.32" in jumps.says and "Lista jump" in jumps.says


def test_what_cannot_be_a_circuit_is_said_in_one_line() -> None:
    lm, up = model("gpt2"), sae(C, 1)

    class Curved(SAE):
        def decode(self, acts: Tensor) -> Tensor:
            return torch.tanh(acts @ self.W_dec)

    for upstream, downstream in (
        (Site("mlp_act", 3), Site("mlp_act", 3)),
        (Site("resid", 3), Site("mlp_act", 3)),
    ):
        with pytest.raises(UserError, match="does not come before"):
            Path(lm, upstream, downstream)
    with pytest.raises(UserError, match="not linear"):
        Circuit(
            lm,
            Curved(d_in=C, d_sae=F),
            Site("resid", 1),
            Site("resid", 1),
            up,
            Site("resid", 2),
            memory_mb=1,
        )
    with pytest.raises(UserError, match="several sites"):
        Circuit(
            lm,
            make("crosscoder"),
            Site("resid", 1),
            Site("resid", 1),
            up,
            Site("resid", 2),
            memory_mb=1,
        )
    attention = lm.transformer.h[2].attn  # options the path reads ...
    attention.scaling, attention.scale_attn_weights = 1.0, False
    Path(lm, Site("resid", 1), Site("resid", 3)).check(tokens(2))
    lm.transformer.h[2].mlp.register_forward_hook(
        lambda *args: args[2] * 2
    )  # ... and a change that it cannot know
    with pytest.raises(UserError, match="do not compute"):
        Path(lm, Site("resid", 1), Site("resid", 3)).check(tokens(2))


def test_cosines_are_those_of_the_weights_with_the_layer_norm_folded_in() -> None:
    c, ids = circuit(model("gpt2"), "mlp_act.2", "mlp_act.3")
    prompts = c.prompts(ids)
    found = weight_directions(c, prompts, gated=False)
    block, previous = c.model.transformer.h[2], c.model.transformer.h[1]
    write = c.upstream.W_dec[5] @ previous.mlp.c_proj.weight
    read = block.ln_2.weight * (block.mlp.c_fc.weight @ c.downstream.W_enc[9])
    read = read - read.mean()
    assert float(found.writes[5] @ found.reads[9]) == pytest.approx(
        float(torch.cosine_similarity(write, read, 0)), abs=1e-9
    )
    gated = weight_directions(c, prompts, gated=True)
    assert not torch.allclose(found.reads, gated.reads) and torch.equal(found.writes, gated.writes)
    inside, ids = circuit(model("gpt2"), "mlp_in.2", "mlp_act.2")
    assert weight_directions(inside, inside.prompts(ids), gated=False) is None


@pytest.mark.parametrize("kind", KINDS)
def test_directions_through_neurons_are_their_mean_jacobian(kind: str) -> None:
    c, ids = circuit(model(kind), "resid.1", "mlp_act.3")
    block = c.path.last
    seen = activations(c.model, ids, [Site("mlp_in", 3)])[Site("mlp_in", 3)]
    jacobian = torch.stack(
        [torch.autograd.functional.jacobian(block.hidden, n) for n in seen.flatten(0, 1)]
    ).mean(0)  # (M, C)
    rows, reads = torch.randn(5, C).double(), torch.randn(5, len(jacobian)).double()
    torch.testing.assert_close(block.to_neurons(rows, seen), rows @ jacobian.t())
    torch.testing.assert_close(block.from_neurons(reads, seen), reads @ jacobian)
    alone = block.to_neurons(rows, None)
    assert alone.shape == reads.shape and not torch.allclose(alone, rows @ jacobian.t())
    torch.testing.assert_close(
        (alone * reads).sum(), (block.from_neurons(reads, None) * rows).sum()
    )


@pytest.mark.parametrize("kind", GATED)
def test_a_gated_block_runs_as_the_model_does_at_every_length(kind: str) -> None:
    c, ids = circuit(model(kind), "resid.1", "resid.3")
    for length in (T, 4, T):
        c.path.check(ids[:, :length])
    names = [Site("resid", 1), Site("resid", 3)]
    seen = activations(c.model, ids, names)
    h = seen[names[0]]
    for block in (*c.path.middle, c.path.last):
        h = block.forward(h)
    torch.testing.assert_close(h, seen[names[1]], rtol=1e-6, atol=1e-6)


def test_gated_directions_are_the_mean_gradient_where_the_layer_norm_is_the_only_other_curve() -> (
    None
):
    lm = model("gpt2", layers=2)
    lm.transformer.h[1].attn.c_proj.weight.data.zero_()
    lm.transformer.h[1].mlp.act = nn.Identity()
    c, ids = circuit(lm, "resid.1", "mlp_act.2")
    prompts, targets = some(c, ids, 60)
    weights = weight_directions(c, prompts, gated=True)
    r = torch.arange(targets.n)
    gradient = concatenated(list(c.attribute(prompts, targets)), "gradient")[r, targets.position]
    cosine = c.project(prompts, targets.prompt, weights.reads[targets.latent], weights.writes)[
        r, targets.position
    ]
    on = prompts.value[targets.prompt, targets.position] != 0
    assert np.corrcoef(gradient[on], cosine[on])[0, 1] > 0.8


def test_coactivation_is_the_correlation_of_firing_at_a_lag_within_windows() -> None:
    chance = np.random.default_rng(0)
    up, down = ((chance.random((60, n)) < 0.3) * chance.random((60, n)) for n in (5, 4))
    found = coactivation(sparse.csr_matrix(up), sparse.csr_matrix(down), np.array([1, 3]), 20, 3)
    assert found.shape == (2, 3, 5)
    for lag in range(3):
        later = np.array([r for r in range(60) if r % 20 >= lag])
        wanted = np.corrcoef((up[later - lag] != 0).T, (down[later] != 0).T)[:5, 5:]
        assert np.allclose(found[:, lag], wanted[:, [1, 3]].T, atol=1e-6)
    assert not coactivation(
        sparse.csr_matrix(up * 0), sparse.csr_matrix(down), np.array([0]), 20, 1
    ).any()


def test_the_most_specific_latents_are_those_planted_for_a_trigram() -> None:
    ids = np.random.default_rng(0).integers(0, 3, 1200)
    ends = np.zeros((1200, 6))
    for r in range(1200):
        if r % 30 >= 2:
            last = tuple(ids[r - 2 : r + 1])
            ends[r] = [
                last == (0, 1, 2),
                last == (0, 1, 2) and r % 2,
                last == (2, 2, 0),
                ids[r] == 1,
                0,
                1,
            ]
    grams = Grams(ids, 30, 3)
    found = most_specific(sparse.csr_matrix(ends), grams, n=3, min_fires=5)
    assert [(s.latent, s.gram, s.f1) for s in found[:2]] == [
        (0, (0, 1, 2), 1.0),
        (2, (2, 2, 0), 1.0),
    ], "one latent for each trigram"
    assert (
        found[2].f1 < 0.6
        and most_specific(sparse.csr_matrix(ends), grams, n=9, min_fires=10**6) == []
    )
    alone = grams.best(sparse.csr_matrix(ends))
    assert alone[4] is None and alone[1].f1 == pytest.approx(
        2 * ends[:, 1].sum() / (ends[:, 0].sum() + ends[:, 1].sum())
    )


def described(on: np.ndarray, ids: np.ndarray, length: int = 30) -> Describer:
    return Describer(
        sparse.csr_matrix(on.astype(np.float32)), ids, "abcdefgh", length, threshold=0.1
    )


def test_n_grams_are_scored_on_text_they_were_not_found_on() -> None:
    """40 latents that fire by chance: the best of hundreds of n-grams looks good where it was
    found, and nowhere else.
    """
    chance = np.random.default_rng(0)
    ids, on = chance.integers(0, 8, 3000), chance.random((3000, 40)) < 0.01
    words = described(on, ids)
    first, second = words.halves
    assert not (first & second).any() and (first | second).all() and 0.4 < first.mean() < 0.6
    assert (first.reshape(-1, 30).all(1) | second.reshape(-1, 30).all(1)).all(), (
        "windows stay whole"
    )
    found = [words.specific(3, 5), [s for s in words.best([3]) if s], [s for s in words.rules if s]]
    inside = np.mean([s.f1 for s in Grams(ids, 30, 3).best(sparse.csr_matrix(on)) if s])
    for specifics in found:
        assert len(specifics) > 5 and np.mean([s.f1 for s in specifics]) < 0.3 * inside


def test_what_is_found_does_not_depend_on_the_text_it_is_scored_on() -> None:
    chance = np.random.default_rng(1)
    ids, on = chance.integers(0, 4, 3000), chance.random((3000, 12)) < 0.05
    words = described(on, ids)
    other = described(
        np.where(words.halves[1][:, None], ~on, on), np.where(words.halves[1], 3 - ids, ids)
    )
    for find in (lambda w: w.specific(3, 5), lambda w: w.best([2]), lambda w: w.rules):
        assert [(s.latent, s.gram) for s in find(words)] == [
            (s.latent, s.gram) for s in find(other)
        ]
        assert [s.f1 for s in find(words)] != [s.f1 for s in find(other)]


def test_the_held_out_f1_of_an_n_gram_is_counted_right() -> None:
    ids = np.random.default_rng(2).integers(0, 3, 2400)
    ends = np.array([r % 30 >= 2 and tuple(ids[r - 2 : r + 1]) == (0, 1, 2) for r in range(2400)])
    on = np.stack([ends, ends & (np.arange(2400) % 2 == 0), ids == 1, np.zeros(2400, bool)], 1)
    words = described(on, ids)
    found, second = words.best([3]), words.halves[1]
    assert found[0].f1 == 1 and found[3] is None
    assert found[1].f1 == pytest.approx(
        2 * on[second, 1].sum() / (ends[second].sum() + on[second, 1].sum())
    ) and found[1].gram == (0, 1, 2)
    alone = described(on[:30], ids[:30]).best([1])
    assert all(s is None or np.isnan(s.f1) for s in alone), "one window: nothing to score on"


def test_orders_and_curves() -> None:
    score = torch.tensor([[[3.0, 1.0], [9.0, 2.0]], [[1.0, 2.0], [3.0, 4.0]]])
    allowed = torch.tensor([[[True, True], [False, True]], [[False, False], [True, False]]])
    assert check.ranks(score, allowed, 2).tolist() == [[[0, 2], [2, 1]], [[2, 2], [0, 2]]]
    removed, value = np.array([[1.0, 2.0], [3.0, 2.0]]), np.array([2.0, 6.0])
    curve = check.curve_of(removed, value, [np.array([0, 0])])
    assert (
        curve.share.tolist() == [0.5, 0.5]
        and curve.area == 0.5
        and curve.shares.tolist() == [[0.5, 1.0]]
    )
    agrees = check.agreement(np.array([1.0, 2, -3, 0]), np.array([2.0, 4, -6, 0]))
    assert agrees == pytest.approx((1, 1, 1, 2))
    assert np.isnan(check.agreement(np.zeros(3), np.arange(3.0)).pearson)
    assert check.agreement(np.array([1.0, -1]), np.array([1.0, 1])).sign == 0.5
    draws = check.resampled(np.array([4, 4, 7, 9]), 20, 0)
    assert (
        all(set(d) >= {0, 1} or not {0, 1} & set(d) for d in draws)
        and len({len(d) for d in draws}) > 1
    ), "prompts are drawn whole"


def test_deleting_in_any_order_ends_where_removing_everything_does() -> None:
    c, ids = circuit(model("gpt2"), "mlp_act.2", "mlp_act.3")
    prompts, targets = some(c, ids)
    allowed = check.reachable(prompts, targets, same=True)
    most = int(allowed.flatten(1).sum(1).max())
    attribution = concatenated(list(c.attribute(prompts, targets)), "attribution")
    whole = check.joint_effects(c, prompts, targets, lambda part: allowed[part].double()).numpy()
    one = check.Pairs(
        torch.arange(targets.n),
        targets.position,
        attribution[range(targets.n), targets.position].argmax(1),
    )
    removed = check.deletion(
        c, prompts, targets, check.ranks(attribution, allowed, most), [1, most]
    )
    assert np.allclose(removed[:, 1], whole, atol=1e-10)
    positive = attribution[range(targets.n), targets.position].max(1).values > 0
    assert np.allclose(
        removed[positive, 0], check.single_effects(c, prompts, targets, one)[positive], atol=1e-10
    )


def test_dead_saes_give_nulls_with_reasons_and_no_exception() -> None:
    c, ids = circuit(model("gpt2"), "mlp_act.2", "mlp_act.3")
    c.upstream.threshold.fill_(1e9)
    prompts, targets = some(c, ids)
    assert not bool(prompts.value.any())
    spec = CircuitCheckSpec(
        targets=5,
        checked=5,
        earlier=4,
        counts=[1, 2],
        lags=2,
        random_orders=1,
        nudges=[0.1],
        nodes=2,
        bootstrap=5,
    )
    checker = Checker(c, prompts, targets, spec, steps=0, seed=0)
    latents = np.unique(targets.latent.numpy())
    scores = checker.scores(None, None, np.zeros((len(latents), 2, F)), latents)
    for part in (lambda: checker.singles(scores), lambda: checker.deletions(scores), checker.joint):
        part()
    found = checker.survey
    assert (
        found.metrics["attribution_ablation_pearson"] is None
        and "no upstream latent" in found.why_null["attribution_ablation_pearson"]
    )
    assert found.why_null["cosine_ablation_pearson"] == "both sites lie in one MLP"
    assert (
        found.metrics["deletion_area_attribution"] == 0
        and found.metrics["completeness_latents"] == 0
    )
    c.downstream.threshold.fill_(1e9)
    nobody = c.prompts(ids)
    assert (
        nobody.active.n == 0
        and drawn(nobody, 5, 0).n == 0
        and list(c.attribute(nobody, nobody.active)) == []
    )

"""Attribution graphs: transcoders of every layer, graphs from tokens to logits, interventions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae_experiments.errors import UserError, of_type
from sae_experiments.fitting.fit import FitReport
from sae_experiments.metric_info import MetricInfo
from sae_experiments.models.gpt2 import TrainedLM
from sae_experiments.resources import Need
from sae_experiments.saes.base import SAE
from sae_experiments.saes.circuit_tracer import save_transcoders
from sae_experiments.saes.cross_layer import EveryLayer
from sae_experiments.studies import conditions as facts
from sae_experiments.studies.attribution import removal
from sae_experiments.studies.attribution.checks import (
    CheckSpec,
    add_deletions,
    add_effects,
    check_graph,
    removals,
)
from sae_experiments.studies.attribution.front_end import (
    DrawnGraph,
    as_circuit_tracer,
    as_report,
    shown_columns,
    slug_of,
    write_circuit_tracer,
)
from sae_experiments.studies.attribution.heads import attention_numbers, edge_heads
from sae_experiments.studies.attribution.influence import Graph, prune
from sae_experiments.studies.attribution.info import infos
from sae_experiments.studies.attribution.interventions import Interventions
from sae_experiments.studies.attribution.local import Adjacency, LocalModel
from sae_experiments.studies.attribution.prompts import Prompt, PromptSpec, choose, given
from sae_experiments.studies.attribution.supernodes import group_latents
from sae_experiments.studies.attribution.virtual import (
    NUMBERS,
    VirtualWeights,
    interference,
    strongest,
)
from sae_experiments.studies.base import Context, Outcome, three_decimals
from sae_experiments.studies.language.lms import Corpus
from sae_experiments.studies.language.stores import Stores
from sae_experiments.studies.language.study import Language
from sae_experiments.training.loop import seed_of

#: Memory per edge before pruning: the weight, its size, its share and one more while it is sorted.
EDGE_BYTES = 16
#: Virtual weights listed per latent and side.
LISTED = 6
#: Sums that differ by more than this from the values they explain are a fault, not rounding.
LARGEST_GAP = 1e-2


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphSpec:
    """Size of the graphs."""

    logit_share: float  # logit nodes: the fewest tokens with this probability together
    logits: int  # at most so many of them
    node_share: float  # share of the influence that the kept nodes have
    edge_share: float  # share of the influence that the kept edges have
    shown: int  # nodes of a graph in the report, beside the logits
    likeness: float  # mean likeness of the edges of latents in one supernode, at least
    weight_windows: int  # held-out windows on which virtual weights are averaged

    def __post_init__(self) -> None:
        for name in ("logit_share", "node_share", "edge_share"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(f"study.graph.{name}={getattr(self, name)} must be in (0, 1]")
        if not -1 <= self.likeness <= 1:
            raise UserError(f"study.graph.likeness={self.likeness} must be in [-1, 1]")
        for name in ("logits", "shown", "weight_windows"):
            if getattr(self, name) < 1:
                raise UserError(f"study.graph.{name}={getattr(self, name)} must be at least 1")


class TracedPrompt(NamedTuple):
    """One prompt with its graph."""

    prompt: Prompt
    local: LocalModel
    adjacency: Adjacency
    drawn: DrawnGraph
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Attribution(Language):
    """The language study with transcoders of every layer, and graphs on top."""

    prompts: PromptSpec
    """Choice of the prompts."""
    graph: GraphSpec
    """Size and pruning of the graphs."""
    checks: CheckSpec
    """Checks by intervention."""
    memory_mb: float
    """Memory in MiB that a batch of gradients or reruns may take."""

    def __post_init__(self) -> None:
        if not self.memory_mb > 0:
            raise UserError(f"study.memory_mb={self.memory_mb} must be positive")

    @cached_property
    def _latents(self) -> list[int]:
        """Latents of the graphs of the SAE that is evaluated now."""
        return []

    def check(self) -> None:
        super().check()
        for name, spec in self.saes.items():
            read, write = self.sites(spec)
            with torch.device("meta"):
                sae = spec.build(self.width(read), self.width(write))
            if not isinstance(sae, EveryLayer) or sae.n_sites != self.sizes.n_layer:
                raise UserError(
                    f"sae={name}: an attribution graph needs transcoders of every layer: use "
                    "sae=cross_layer_transcoder, per_layer_transcoder or cross_layer_jumprelu"
                )

    def infos(self) -> list[MetricInfo]:
        return [*infos(), *super().infos()]

    def described_latents(self) -> Sequence[int]:
        """Latents that the features metric always describes, besides those it chooses."""
        return self._latents

    def evaluate(
        self,
        name: str,
        sae: SAE,
        replicas: tuple[SAE, ...],
        corpus: Corpus,
        lm: TrainedLM,
        stores: Stores,
        fitted: FitReport,
        ctx: Context,
    ) -> Outcome:
        """Metrics of the transcoders, then graphs and their checks."""
        traced = self._traced(sae, corpus, lm, stores, ctx)
        self._latents[:] = sorted({i for one in traced for i in self._shown_latents(one)})
        outcome = super().evaluate(name, sae, replicas, corpus, lm, stores, fitted, ctx)
        measured = graph_numbers(traced)
        self._check(name, traced, outcome, stores.seed, ctx)
        self._weigh(sae, lm, stores, outcome, ctx)
        outcome.metrics |= measured
        settings = facts.flat({"graph": asdict(self.graph), "checks": asdict(self.checks)})
        settings |= facts.flat({"prompts": asdict(self.prompts)})
        outcome.facts["settings"] = settings
        about = {feature["latent"]: feature for feature in outcome.features or []}
        for one, graph in zip(traced, outcome.graphs or [], strict=True):
            graph |= as_report(one.drawn, self.graph.shown, about)
        result_name = self.result_name(corpus.name, name)
        self._write(traced, f"{result_name}_{stores.seed}", ctx)
        self._export(sae, f"{result_name}_{stores.seed}", lm, ctx)
        m = outcome.metrics
        ctx.console.say(
            f"  {len(traced)} graphs: replacement {m['graph_replacement']:.3f}, completeness "
            f"{m['graph_completeness']:.3f}; r constrained "
            f"{three_decimals(m['constrained_latent_pearson'])}, free "
            f"{three_decimals(m['free_latent_pearson'])}"
        )
        return outcome

    def _check(
        self, name: str, traced: Sequence[TracedPrompt], outcome: Outcome, seed: int, ctx: Context
    ) -> None:
        """Add the checks by intervention to an outcome, and supernodes to its graphs."""
        checked, outcome.graphs = [], []
        with ctx.console.stage(f"check {name}", "prompt") as tick:
            for i, one in enumerate(traced):
                made = Interventions(one.local, one.adjacency, memory_mb=self.memory_mb)
                groups, graph = one.drawn.groups, one.drawn.graph
                chance = seed_of(seed, "attribution", i)
                checked.append(check_graph(made, graph, groups, self.checks, chance))
                outcome.graphs.append({"removals": removals(made, groups)})
                tick(i + 1, len(traced))
        add_effects(outcome, checked)
        add_deletions(outcome, checked, self.checks.counts)

    def _weigh(
        self, sae: SAE, lm: TrainedLM, stores: Stores, outcome: Outcome, ctx: Context
    ) -> None:
        """Add the strongest virtual weights of the described latents, and what all are worth."""
        starts = stores.held_out.starts
        n_kept = min(removal.WINDOWS, len(starts) // 2)  # windows that rank no weights
        ranking = starts[: len(starts) - n_kept][: self.graph.weight_windows]
        tokens, _ = stores.tokens(ranking)
        layers = of_type(sae, EveryLayer)  # see `check`
        virtual = VirtualWeights(lm.model, layers, tokens.to(ctx.device))
        self._remove(virtual, starts[len(starts) - n_kept :], stores, outcome, ctx)
        described = [one for one in outcome.features or [] if "max" in one]
        latents = torch.tensor([one["latent"] for one in described], dtype=torch.long)
        measured: dict[str, float | None] = dict.fromkeys(NUMBERS)
        if described:
            into = virtual.into(latents.to(ctx.device))
            out_of = virtual.out_of(latents.to(ctx.device))
            for side, weights in (("virtual_from", into), ("virtual_to", out_of)):
                for one, pairs in zip(described, strongest(weights, LISTED), strict=True):
                    one[side] = pairs
            measured = interference(into)
        for name, value in measured.items():
            outcome.metrics[name] = value
            if value is None:
                outcome.why_null[name] = "no latent is described, or none of a later layer"

    def _remove(
        self,
        virtual: VirtualWeights,
        starts: np.ndarray,
        stores: Stores,
        outcome: Outcome,
        ctx: Context,
    ) -> None:
        """Add what removing virtual weights costs on windows that begin at `starts`."""
        n = removal.count_weights(virtual.sae)
        if n > removal.MOST or not len(starts):
            reason = "there is a single held-out window"
            if len(starts):
                reason = f"{n:,} virtual weights, more than {removal.MOST:,}"
            outcome.metrics |= dict.fromkeys(removal.NUMBERS)
            outcome.why_null |= dict.fromkeys(removal.NUMBERS, reason)
            return
        tokens, following = (ids.to(ctx.device) for ids in stores.tokens(starts))
        seed = seed_of(stores.seed, "virtual weights")
        curves = removal.measure(virtual, tokens, following, seed)
        outcome.metrics |= removal.numbers(curves)
        outcome.arrays |= curves

    # --- graphs ----------------------------------------------------------------------------------

    def _prompts(self, corpus: Corpus, lm: TrainedLM, stores: Stores) -> list[Prompt]:
        length = min(self.prompts.length, stores.held_out.length)
        if self.prompts.texts is not None:
            return given(self.prompts.texts, corpus, stores.held_out.length)
        tokens, following = stores.tokens(stores.held_out.starts[: self.prompts.windows])
        spec = replace(self.prompts, length=length)
        return choose(lm.model, tokens, following, spelling(corpus), spec)

    def _traced(
        self, sae: SAE, corpus: Corpus, lm: TrainedLM, stores: Stores, ctx: Context
    ) -> list[TracedPrompt]:
        """The graph of every prompt."""
        prompts = self._prompts(corpus, lm, stores)
        traced = []
        with ctx.console.stage("trace", "prompt") as tick:
            for i, prompt in enumerate(prompts):
                traced.append(self._trace(prompt, sae, corpus, lm, ctx))
                tick(i + 1, len(prompts))
        return traced

    def _trace(
        self, prompt: Prompt, sae: SAE, corpus: Corpus, lm: TrainedLM, ctx: Context
    ) -> TracedPrompt:
        began = time.monotonic()
        local = LocalModel(
            lm.model,
            of_type(sae, EveryLayer),  # see `check`
            prompt.tokens.to(ctx.device),
            logits=(self.graph.logit_share, self.graph.logits),
            memory_mb=self.memory_mb,
        )
        nodes = local.nodes.n + len(local.logits.token)
        ctx.announce(
            f"a graph of {local.nodes.n} active latents",
            Need({"edges": float(EDGE_BYTES * nodes * local.n_sources)}),
            "use a shorter prompt (study.prompts.length) or a smaller sae.target_l0",
        )
        adjacency = local.adjacency()
        if not adjacency.gap < LARGEST_GAP:
            raise UserError(
                f"an attribution graph does not add up (relative gap {adjacency.gap:.2g}): values "
                "of the model or of the transcoders are not finite, or too large for float32"
            )
        columns = adjacency.weights[:, : local.sources.tokens.stop]
        n_errors = local.n_layer * local.length
        graph = Graph(columns, local.logits.probability, n_errors)
        nodes, edges = prune(graph, self.graph.node_share, self.graph.edge_share)
        pieces = spelling(corpus)
        text = "".join(pieces[i] for i in prompt.tokens[0].tolist())
        likely = pieces[int(local.logits.token[0])]
        title = f"{text[-40:]!r} -> {likely!r} ({prompt.kind})"
        kept = nodes[: graph.n]
        groups = group_latents(graph, local.nodes.position, kept, self.graph.likeness)
        parts = edge_heads(local, edges)
        drawn = DrawnGraph(local, graph, nodes, edges, parts, groups, pieces, title)
        return TracedPrompt(prompt, local, adjacency, drawn, time.monotonic() - began)

    def _shown_latents(self, one: TracedPrompt) -> list[int]:
        """Latents of the report's graph, by their number among those of all layers."""
        n, nodes = one.drawn.graph.n, one.local.nodes
        chosen = torch.tensor([i for i in shown_columns(one.drawn, self.graph.shown) if i < n])
        if not len(chosen):
            return []
        return (nodes.layer[chosen] * one.local.sae.per_layer + nodes.latent[chosen]).tolist()

    def _write(self, traced: Sequence[TracedPrompt], cell: str, ctx: Context) -> None:
        """Write the graphs for circuit-tracer's front end."""
        graphs = []
        for i, one in enumerate(traced):
            slug = slug_of(f"{cell}-{i}")
            share = self.graph.node_share
            graphs.append(as_circuit_tracer(one.drawn, slug, slug_of(cell), share, {}))
        write_circuit_tracer(ctx.folder / "circuit_tracer" / cell, graphs)

    def _export(self, sae: SAE, cell: str, lm: TrainedLM, ctx: Context) -> None:
        """Write the transcoders for circuit-tracer, where its layout has a place for them."""
        folder = ctx.folder / "circuit_tracer" / cell / "transcoders"
        if isinstance(sae, EveryLayer) and not (sae.cross and sae.W_skip is not None):
            save_transcoders(sae, folder, model=str(lm.folder), scan=slug_of(cell))


def spelling(corpus: Corpus) -> list[str]:
    """Text of every token id, or its character."""
    return list(corpus.pieces or corpus.symbols)


def graph_numbers(traced: Sequence[TracedPrompt]) -> dict[str, float | None]:
    """Means over prompts of the metrics of the graphs."""
    rows = []
    for one in traced:
        graph, drawn = one.drawn.graph, one.drawn
        pruned = graph.unexplained(drawn.nodes).scores()
        influence = graph.influence()[0]
        logits = one.adjacency.weights[graph.n :].abs()
        constants = logits[:, one.local.sources.positions.start :].sum()
        rows.append(
            {f"graph_{name}": value for name, value in graph.scores().items()}
            | {f"pruned_{name}": pruned[name] for name in ("replacement", "completeness")}
            | {f"graph_{name}": v for name, v in attention_numbers(drawn.parts).items()}
            | {
                "graph_latents": graph.n,
                "graph_latents_kept": int(drawn.nodes[: graph.n].sum()),
                "graph_edges_kept": int(drawn.edges.sum()),
                "graph_path_length": float(influence[: graph.n].sum() / graph.probability.sum()),
                "graph_constant_share": float(constants / logits.sum()),
                "graph_supernodes": len(drawn.groups),
                "graph_supernode_size": _mean_size(drawn.groups),
                "graph_seconds": one.seconds,
            }
        )
    means: dict[str, float | None] = {
        name: float(np.mean([row[name] for row in rows])) for name in rows[0]
    }
    means["graph_gap"] = max(one.adjacency.gap for one in traced)
    return means


def _mean_size(groups: Sequence[Tensor]) -> float:
    return float(np.mean([len(group) for group in groups])) if groups else 0.0

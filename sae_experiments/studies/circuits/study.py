"""Feature circuits: effects of the latents of one SAE on those of a later one.

Effects are estimated by gradients through the language model and checked by removing latents.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from sae_experiments.corpora.corpus import CharCorpus, CorpusSpec
from sae_experiments.errors import UserError, of_type
from sae_experiments.fitting.fit import FitReport
from sae_experiments.fitting.spec import FitSpec, SAESpec
from sae_experiments.metrics.base import EvalContext, LMSplice, Metric, MetricInfo
from sae_experiments.metrics.codes import sparse_codes
from sae_experiments.models.blocks import check_order
from sae_experiments.models.gpt2 import LMSpec, TrainedLM, train_lm
from sae_experiments.models.hooks import Site, as_sites, parse_site
from sae_experiments.models.local import TokenText
from sae_experiments.quality_warnings import of_gap
from sae_experiments.saes.base import SAE
from sae_experiments.sampling import evenly_spaced
from sae_experiments.studies import conditions as facts
from sae_experiments.studies.base import (
    Cell,
    Context,
    Outcome,
    check_held_out,
    merged,
    part_of,
    three_decimals,
)
from sae_experiments.studies.circuits.attribution import Circuit, Prompts
from sae_experiments.studies.circuits.comparators import Specific, coactivation, weight_directions
from sae_experiments.studies.circuits.describe import Describer
from sae_experiments.studies.circuits.graph import CircuitGraphSpec, TracedLatent, as_dict, trace
from sae_experiments.studies.circuits.info import infos
from sae_experiments.studies.circuits.sources import LocalSources, Role, load_sae
from sae_experiments.studies.circuits.survey import (
    Checker,
    CircuitCheckSpec,
    Survey,
    drawn,
    gradients,
)
from sae_experiments.studies.language.stores import Stores
from sae_experiments.studies.language.study import Language, export, headline
from sae_experiments.training.loop import seed_of

ROLES = ("upstream", "downstream")


class Where(NamedTuple):
    """The sites of a circuit."""

    read: Site
    """Read by the upstream SAE."""
    write: Site
    """Reconstructed by the upstream SAE."""
    to: Site
    """Read and reconstructed by the downstream SAE."""


class Side(NamedTuple):
    """One of the two SAEs of a circuit with its codes."""

    sae: SAE
    read: Site
    """Site that it reads."""
    write: Site
    """Site that it reconstructs."""
    fitted: FitReport | None
    """Report of its fit; None: it was loaded."""
    evaluation: EvalContext
    codes: sparse.csr_matrix
    """Codes (N, F) of the rows from which words are taken."""
    words: Describer


@dataclass(frozen=True, kw_only=True)
class Fits(Language):
    """The language study's language models and fits, for the two SAEs of a circuit."""

    lm: LMSpec
    """Language model to train, or the sizes of the one from a directory."""
    inner: int | None = None
    """Width of the MLPs; None: four times that of the model."""

    def announce(self, ctx: Context) -> None:
        if self.inner is None:  # a model from a local directory is not trained
            super().announce(ctx)

    def width(self, where: Any) -> int:
        inner = self.inner or 4 * self.lm.n_embd
        widths = [inner if s.stream == "mlp_act" else self.lm.n_embd for s in as_sites(where)]
        return sum(widths)


@dataclass(frozen=True, kw_only=True)
class Circuits:
    """The study of circuits.

    Its cells are pairs of a corpus and a seed. Each has three results: those of the circuit, and
    those of its two SAEs.
    """

    data: Mapping[str, CorpusSpec]
    """Corpora by name."""
    lm: LMSpec
    """Language model to train."""
    saes: Mapping[str, SAESpec]
    """The one kind of SAE."""
    metrics: Mapping[str, Metric]
    """Metrics of the two SAEs."""
    fit: FitSpec
    """Fits of SAEs that are not loaded."""
    seeds: Sequence[int] | None
    """Seeds; None: those of each corpus."""
    offline: bool
    """Download nothing."""
    held_out: str
    """Held-out part of the text, one of `HELD_OUT`."""
    upstream: Role
    """The SAE whose latents have effects."""
    downstream: Role
    """The SAE whose latents are affected."""
    local: LocalSources
    """Language model and text from a directory."""
    error: str
    """State at which gradients are taken: `keep` or `drop` the upstream SAE's error."""
    baseline: str
    """Value that a removed latent is set to: `zero` or `mean`."""
    steps: int
    """Gauss-Legendre points of integrated gradients; 0: the plain gradient."""
    prompts: int
    """Held-out windows that are attributed."""
    rows: int | None
    """Held-out rows for co-activation, n-grams and contexts; None: all."""
    threshold: float
    """Share of a latent's 99.9 % quantile above which it counts as on, for n-grams."""
    checks: CircuitCheckSpec
    """Size of the survey and of the checks."""
    graph: CircuitGraphSpec
    """Downstream latents with a graph, and its size."""
    memory_mb: float
    """Memory in MiB that attribution may use at a time."""

    def __post_init__(self) -> None:
        for key, allowed in (("error", ("keep", "drop")), ("baseline", ("zero", "mean"))):
            value = getattr(self, key)
            if value not in allowed:
                raise UserError(f"study.{key}={value} is not one of {', '.join(allowed)}")
        if not isinstance(self.steps, int) or self.steps < 0:
            raise UserError(
                f"study.steps={self.steps} must be a whole number of at least 0 "
                "(0: the plain gradient)"
            )
        if self.prompts < 1 or not self.memory_mb > 0:
            raise UserError(
                f"study.prompts={self.prompts} must be at least 1 and "
                f"study.memory_mb={self.memory_mb} positive"
            )
        if not isinstance(self.lm, LMSpec) or self.lm.vocab_size is not None:
            raise UserError(
                "study=circuits trains a character model, or reads a model by study.local.folder "
                "(and its text by study.local.text): leave lm out"
            )
        if len(self.saes) != 1:
            raise UserError(
                f"sae=[{','.join(self.saes)}]: a circuit has one kind of SAE; "
                "compare kinds in runs of their own"
            )

    # --- sites, texts and cells ------------------------------------------------------------------

    @cached_property
    def texts(self) -> dict[str, CharCorpus | TokenText]:
        """The texts by name, once they are prepared."""
        return {}

    @cached_property
    def given_lm(self) -> list[TrainedLM]:
        """The language model from a directory, once it is loaded; empty if one is trained."""
        return []

    @cached_property
    def fits(self) -> Fits:
        """The study that trains the language models and fits the SAEs that are not loaded."""
        lm, inner = self.lm, None
        if self.local.folder:
            sizes = self.local.sizes
            lm = replace(lm, n_layer=sizes.n_layer, n_embd=sizes.width, n_head=1)
            inner = sizes.inner
        where = self.where(lm.n_layer)
        sae_spec = next(iter(self.saes.values()))
        write = str(where.write) if where.write != where.read else None
        saes = {
            "upstream": replace(sae_spec, read=str(where.read), write=write),
            "downstream": replace(sae_spec, read=str(where.to), write=None),
        }
        return Fits(
            data=self.data,
            lm=lm,
            saes={role: saes[role] for role in ROLES if not getattr(self, role).sae},
            metrics={},
            fit=self.fit,
            site=str(where.read),
            seeds=self.seeds,
            offline=self.offline,
            inner=inner,
        )

    def where(self, n_layer: int) -> Where:
        """The sites in a model of `n_layer` blocks.

        Without a downstream site, it is the upstream site one block later.

        Raises:
            UserError: A site does not exist, or the sites are in the wrong order.
        """
        read = parse_site(self.upstream.site or "", n_layer)
        write = parse_site(self.upstream.write, n_layer) if self.upstream.write else read
        if not self.downstream.site and write.layer + 1 > n_layer:
            raise UserError(
                f"study.upstream.site={self.upstream.site} is in the last of {n_layer} blocks: "
                "name a study.downstream.site, or go back"
            )
        to = parse_site(self.downstream.site or f"{write.stream}.{write.layer + 1}", n_layer)
        check_order(write, to)
        return Where(read, write, to)

    def check(self) -> None:
        check_held_out(self.held_out)
        self.fits.check()
        for role in ROLES:
            path = getattr(self, role).sae
            if path and not Path(path).expanduser().is_dir():
                raise UserError(
                    f"study.{role}.sae={path} does not exist: name an SAE directory or a run folder"
                )

    def names(self) -> list[str]:
        """Names of the texts."""
        return [self.local.name] if self.local.text else list(self.data)

    def reports(self, name: str) -> tuple[str, ...]:
        """Names of the results of the circuit and of its SAEs."""
        return (name, *(f"{name}.{role}" for role in ROLES))

    def prepare(self, ctx: Context) -> dict[str, Any]:
        if not self.local.text:
            self.fits.prepare(ctx)
        corpora = {
            name: of_type(text.corpus, CharCorpus)  # its model is one of characters
            for name, text in self.fits.texts.items()
        }
        self.texts.update(self.local.texts(corpora) if self.local.folder else corpora)
        if self.local.folder:  # read before there is a run folder: a broken one leaves none
            self.given_lm[:] = [self.local.model(ctx.device, ctx.console.say)]
        return {
            report: self.texts[name].provenance | part_of(self.held_out)
            for name in self.names()
            for report in self.reports(name)
        }

    def cells(self) -> list[Cell]:
        cells = []
        for name in self.names():
            own = [0] if self.local.folder else self.data[name].seeds
            seeds = own if self.seeds is None else self.seeds
            cells += [Cell(name, seed, self.reports(name)) for seed in seeds]
        return cells

    def infos(self) -> list[MetricInfo]:
        circuit = infos(self.checks.nudges)
        return [*circuit, *replace(self.fits, metrics=self.metrics).infos()]

    # --- a cell ----------------------------------------------------------------------------------

    def run(self, cell: Cell, ctx: Context) -> dict[str, Outcome]:
        text = self.texts[cell.dataset]
        lm = self._model(text, cell, ctx)
        where = self.where(self.fits.lm.n_layer)
        sites = list(dict.fromkeys(where))
        stores = Stores(self.fit, sites, text, lm, cell.seed, ctx, held_out=self.held_out)
        sides = self._sides(cell, where, text, lm, stores, ctx)
        up, down = sides
        circuit = Circuit(
            lm.model, up.sae, where.read, where.write, down.sae, where.to, memory_mb=self.memory_mb
        )
        prompts = self._prompts(circuit, stores, up, ctx)
        self._check_marked(up)
        chosen = self._chosen(down, prompts)
        traced = self._traced(circuit, prompts, chosen, ctx)
        outcome = self._checked(circuit, prompts, up, down, cell, ctx)
        conditions = facts.of_language(lm, text) | {"store": self.fit.store_dtype}
        outcome.facts = conditions | self._conditions(where, stores)
        outcome.warnings += stores.short()
        self._add_language_model(outcome, lm, stores)
        self._add_ngrams(outcome, chosen)
        outcome.cut = lm.cut or any(s.fitted is not None and s.fitted.cut for s in sides)
        kept = [(s, t) for s, t in zip(chosen, traced, strict=True) if t is not None]
        upstream = sorted({edge.latent for _, t in kept for edge in t.edges})
        nodes = [upstream, [t.latent for _, t in kept]]
        outcomes = {cell.dataset: outcome}
        described = []
        for role, side, latents in zip(ROLES, sides, nodes, strict=True):
            result_name = f"{cell.dataset}.{role}"
            own = self._evaluated(role, side, latents, outcome.cut, conditions, ctx)
            outcomes[result_name] = own
            folder = ctx.folder / "saes" / f"{result_name}_{cell.seed}"
            export(side.sae, folder, stores, side.read, ctx)
            features = {feature["latent"]: feature for feature in own.features or []}
            described.append(side.words.about(latents, features, *self._contexts))
        ends = str(where.write), str(where.to)
        of_up, of_down = described
        outcome.graphs = [as_dict(t, _title(s, t, down), of_up, of_down, ends) for s, t in kept]
        outcome.arrays |= _pictured(kept, down)
        return outcomes

    def _prompts(self, circuit: Circuit, stores: Stores, up: Side, ctx: Context) -> Prompts:
        """The held-out windows that are attributed, as both SAEs read them."""
        tokens = self._tokens(stores).to(ctx.device)
        circuit.path.check(tokens[:2])
        baseline = None
        if self.baseline == "mean":
            mean = np.asarray(up.codes.mean(0), np.float32).ravel()
            baseline = torch.from_numpy(mean).to(ctx.device)
        return circuit.prompts(tokens, baseline=baseline, keep_error=self.error == "keep")

    def _check_marked(self, up: Side) -> None:
        marked = self.graph.upstream_latent
        if marked is not None and not 0 <= marked < up.sae.d_sae:
            raise UserError(
                f"study.graph.upstream_latent={marked}: the upstream SAE has latents "
                f"0 to {up.sae.d_sae - 1}"
            )

    def _traced(
        self, circuit: Circuit, prompts: Prompts, chosen: Sequence[Specific], ctx: Context
    ) -> list[TracedLatent | None]:
        """The graph of each chosen latent; None if it has none."""
        traced = []
        with ctx.console.stage("trace", "latent") as tick:
            for i, specific in enumerate(chosen, 1):
                graph = trace(circuit, prompts, specific.latent, self.graph, steps=self.steps)
                traced.append(graph)
                tick(i, len(chosen))
        return traced

    def _add_language_model(self, outcome: Outcome, lm: TrainedLM, stores: Stores) -> None:
        """Add the numbers, curves and seconds of the language model."""
        outcome.metrics |= lm.metrics
        outcome.curves = [(step, f"lm/{name}", value) for step, name, value in lm.history]
        outcome.seconds |= {"lm": lm.seconds, "collect": stores.seconds}

    def _add_ngrams(self, outcome: Outcome, chosen: Sequence[Specific]) -> None:
        """Add the mean F1 of the chosen latents with their n-grams."""
        f1 = float(np.mean([s.f1 for s in chosen])) if chosen else np.nan
        outcome.metrics["ngram_f1"] = f1 if np.isfinite(f1) else None
        if not chosen:
            outcome.why_null["ngram_f1"] = (
                f"no downstream latent fires {self.graph.min_fires} times on the half of the text "
                "that n-grams are found on"
            )
        elif not np.isfinite(f1):
            outcome.why_null["ngram_f1"] = (
                "the held-out text is one window: nothing is left to score n-grams on"
            )

    @property
    def _contexts(self) -> tuple[int, int, int]:
        return self.graph.contexts, self.graph.before, self.graph.after

    def _model(self, text: CharCorpus | TokenText, cell: Cell, ctx: Context) -> TrainedLM:
        if self.given_lm:
            return self.given_lm[0]
        with ctx.session("language model", "lm", share=0.6) as session:
            recipe = self.data[cell.dataset].recipe
            lm = train_lm(
                self.lm,
                of_type(text, CharCorpus),  # only a model from a directory reads tokens
                recipe,
                seed=cell.seed,
                cache=ctx.cache,
                device=ctx.device,
                session=session,
            )
        ctx.console.say(f"  language model: {lm.headline}")
        return lm

    def _sides(
        self,
        cell: Cell,
        where: Where,
        text: CharCorpus | TokenText,
        lm: TrainedLM,
        stores: Stores,
        ctx: Context,
    ) -> list[Side]:
        """The upstream and the downstream SAE: from the cache, fitted now, or loaded."""
        fitted: dict[str, tuple[SAE, FitReport | None]] = {}
        if self.fits.saes:
            fitted |= self.fits.fitted(stores, cell, ctx)
        length = stores.held_out.length
        ids = stores.tokens(stores.held_out.starts)[0].numpy().reshape(-1)[: self.rows]
        ids = ids[: len(ids) // length * length]  # whole windows
        pieces = text.pieces if isinstance(text, TokenText) else text.symbols
        sides = []
        sites = {"upstream": (where.read, where.write), "downstream": (where.to, where.to)}
        for role, (read, write) in sites.items():
            if role not in fitted:
                fitted[role] = self._loaded(role, read, cell, ctx), None
            sae, report = fitted[role]
            evaluation = EvalContext(
                sae=sae,
                device=ctx.device,
                read=read,
                write=write,
                held_out=stores.held_out,
                lm=LMSplice(lm.model, write, stores.tokens),
                symbols=text.symbols,
                pieces=pieces,
                outliers=self.fit.outliers,
            )
            codes = sparse_codes(evaluation, len(ids))
            if codes is None:
                raise UserError(
                    f"the codes of the {role} SAE at {read} are not finite: "
                    "there is nothing to attribute"
                )
            words = Describer(codes, ids, pieces, length, threshold=self.threshold)
            sides.append(Side(sae, read, write, report, evaluation, codes, words))
        return sides

    def _loaded(self, role: str, site: Site, cell: Cell, ctx: Context) -> SAE:
        """The SAE of a role from its directory or run folder."""
        path = Path(getattr(self, role).sae).expanduser()
        width = self.fits.width(site)
        sae = load_sae(role, path, cell.dataset, cell.seed, site, width, ctx.console.say)
        return sae.to(ctx.device)

    def _tokens(self, stores: Stores) -> Tensor:
        """Tokens (P, T) of the prompts: held-out windows, evenly spaced, from the first `rows`."""
        held_out = stores.held_out
        n_windows = max(1, (self.rows or held_out.n_rows) // held_out.length)
        starts = evenly_spaced(held_out.starts[:n_windows], self.prompts)
        return stores.tokens(starts)[0]

    def _chosen(self, down: Side, prompts: Prompts) -> list[Specific]:
        """The downstream latents that get a graph.

        These are the requested ones or, of those that fire in the prompts, the most specific to one
        n-gram.
        """
        if self.graph.latents is None:
            here = set(prompts.active.latent.tolist())
            best = down.words.specific(self.graph.order, self.graph.min_fires)
            return [s for s in best if s.latent in here][: self.graph.count]
        wrong = [j for j in self.graph.latents if not 0 <= j < down.sae.d_sae]
        if wrong:
            raise UserError(
                f"study.graph.latents={list(self.graph.latents)}: the downstream SAE has latents "
                f"0 to {down.sae.d_sae - 1}"
            )
        best = down.words.best([self.graph.order])
        return [best[j] or Specific(j, (), 0.0, 0) for j in self.graph.latents]

    def _checked(
        self, circuit: Circuit, prompts: Prompts, up: Side, down: Side, cell: Cell, ctx: Context
    ) -> Outcome:
        """Attribute random targets, and compare attributions with the effects of removal."""
        spec = self.checks
        seed = seed_of(cell.seed, "circuits") % 2**32
        if not prompts.active.n:
            why = (
                "no downstream latent is active in the prompts: a dead SAE, or study.prompts is "
                "too small"
            )
            names = [i.name for i in infos(spec.nudges) if i.shown]
            return Outcome(metrics=dict.fromkeys(names), why_null=dict.fromkeys(names, why))
        weights = weight_directions(circuit, prompts, gated=False)
        gated = weight_directions(circuit, prompts, gated=True)
        surveyed = drawn(prompts, spec.targets, seed)
        survey = gradients(circuit, prompts, surveyed, weights, steps=self.steps, seed=seed)
        checked = drawn(prompts, spec.checked, seed + 1)
        checker = Checker(circuit, prompts, checked, spec, steps=self.steps, seed=seed)
        latents = np.unique(checker.targets.latent.cpu().numpy())
        phi = coactivation(up.codes, down.codes, latents, up.words.length, spec.lags)
        scores = checker.scores(weights, gated, phi, latents)
        work = (lambda: checker.singles(scores), lambda: checker.deletions(scores), checker.joint)
        began = time.monotonic()
        with ctx.console.stage("remove", "part") as tick:
            for i, part in enumerate(work, 1):
                part()
                tick(i, len(work))
        outcome = Outcome()
        _add(outcome, survey)
        _add(outcome, checker.survey)
        outcome.seconds["removal"] = time.monotonic() - began
        jumps = None if circuit.continuous else type(circuit.downstream).__name__
        outcome.warnings += of_gap(outcome.metrics["integrated_gap"], jumps)
        _say_checked(outcome.metrics, ctx)
        return outcome

    def _conditions(self, where: Where, stores: Stores) -> dict[str, Any]:
        """Conditions of the circuit's own numbers, beside the language model and its text."""
        names = ("error", "baseline", "steps", "prompts", "threshold")
        settings = {name: getattr(self, name) for name in names}
        path = f"{facts.of_sites(where.read, where.write)} -> {where.to}"
        rows = min(self.rows or stores.held_out.n_rows, stores.held_out.n_rows)
        return {
            "site": path,
            "held-out rows": rows,
            "settings": settings | facts.flat(asdict(self.checks)),
        }

    def _evaluated(
        self,
        role: str,
        side: Side,
        latents: Sequence[int],
        cut: bool,
        conditions: Mapping[str, Any],
        ctx: Context,
    ) -> Outcome:
        """Measure one of the SAEs.

        Args:
            role: Its role.
            side: The SAE.
            latents: Latents of the graphs, which are described in any case.
            cut: The language model or a fit ended early.
            conditions: Conditions of the language model and its text.
            ctx: Context of the run.
        """
        outcome = Outcome(cut=cut)
        names = ("sae_train_time", "sae_tokens_per_second")
        if side.fitted is None:
            outcome.metrics |= dict.fromkeys(names)
            outcome.why_null |= dict.fromkeys(names, "the SAE was loaded")
        else:
            times = (side.fitted.seconds, side.fitted.rows_per_second)
            outcome.metrics |= dict(zip(names, times, strict=True))
            outcome.curves = [(s, f"sae/{n}", v) for s, n, v in side.fitted.history]
            outcome.seconds["fit"] = side.fitted.seconds
        evaluation = side.evaluation
        outcome.facts = {**conditions, "evaluations": list(conditions["evaluations"])}
        outcome.facts |= facts.of_sae(side.sae, facts.of_sites(side.read, side.write))
        if side.fitted is not None:
            outcome.add_fit(side.fitted)
        evaluation.extras["latents"] = list(latents)
        outcome.measure(self.metrics, evaluation)
        if not evaluation.symbols:
            # Tokens of more than one character: the metrics have no words for them.
            own = side.words.features(latents, *self._contexts)
            outcome.features = merged(outcome.features, own)
        ctx.console.say(f"  {role}: {headline(outcome.metrics)}")
        return outcome


def _add(outcome: Outcome, survey: Survey) -> None:
    """Add the numbers and arrays of a survey to an outcome."""
    outcome.metrics |= survey.metrics
    outcome.why_null |= survey.why_null
    outcome.arrays |= survey.arrays
    outcome.noise |= survey.noise
    outcome.seconds |= survey.seconds


def _say_checked(metrics: Mapping[str, float | None], ctx: Context) -> None:
    """Print the main numbers of the survey and the checks."""
    r = {
        name: three_decimals(metrics[f"{name}_ablation_pearson"])
        for name in ("attribution", "cosine", "coactivation")
    }
    ctx.console.say(
        f"  {metrics['n_attributed_pairs']:,.0f} pairs at "
        f"{metrics['attribution_targets_per_second']:,.0f} targets/s; "
        f"{metrics['n_pairs']:,.0f} removed: r {r['attribution']} (cosine {r['cosine']}, "
        f"co-activation {r['coactivation']}), slope {three_decimals(metrics['attribution_slope'])}"
    )


def _title(s: Specific, t: TracedLatent, down: Side) -> str:
    gram = down.words.spell(s.gram)
    return f"latent {s.latent} fires on {gram!r} (F1 {s.f1:.2f}); mean of {t.n} firings"


def _pictured(kept: Sequence[tuple[Specific, TracedLatent]], down: Side) -> dict[str, np.ndarray]:
    """Arrays for histograms of gradients, of each chosen latent at its strongest firing."""
    if not kept:
        return {}
    arrays = {f"chosen_{i}_gradient": t.gradients for i, (_, t) in enumerate(kept)}
    arrays |= {f"chosen_{i}_every": t.every for i, (_, t) in enumerate(kept)}
    arrays |= {f"chosen_{i}_here": t.here for i, (_, t) in enumerate(kept)}
    arrays["chosen_interest"] = np.array([t.interest for _, t in kept])
    arrays["chosen_marked"] = np.array([t.marked for _, t in kept])
    arrays["chosen_latent"] = np.array([s.latent for s, _ in kept])
    arrays["chosen_gram"] = np.array([down.words.spell(s.gram) for s, _ in kept])
    return arrays

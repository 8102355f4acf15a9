"""Feature circuits: how the latents of one SAE drive those of a later one, by gradients through the language model, checked by removal."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from sae_experiments.corpora.corpus import CharCorpus, CorpusSpec
from sae_experiments.errors import UserError
from sae_experiments.fitting.fit import FitReport
from sae_experiments.fitting.spec import FitSpec, SAESpec
from sae_experiments.metrics.base import EvalContext, LMSplice, Metric, MetricInfo
from sae_experiments.metrics.codes import sparse_codes
from sae_experiments.models.gpt2 import LMSpec, TrainedLM, train_lm
from sae_experiments.models.hooks import Site, as_sites, parse_site
from sae_experiments.models.local import TokenText
from sae_experiments.quality_warnings import of_gap
from sae_experiments.saes.base import SAE
from sae_experiments.studies import conditions as facts
from sae_experiments.studies.base import Cell, Context, Outcome, check_held_out, merged, part_of
from sae_experiments.studies.circuits.attribution import Circuit, Prompts
from sae_experiments.studies.circuits.blocks import check_order
from sae_experiments.studies.circuits.comparators import Specific, coactivation, weight_directions
from sae_experiments.studies.circuits.describe import Describer
from sae_experiments.studies.circuits.graph import GraphSpec, Traced, as_dict, trace
from sae_experiments.studies.circuits.info import infos
from sae_experiments.studies.circuits.sources import LocalSources, Role, load_sae
from sae_experiments.studies.circuits.survey import Checker, CheckSpec, Survey, drawn, gradients
from sae_experiments.studies.language.stores import Stores
from sae_experiments.studies.language.study import Language, export, headline
from sae_experiments.training.loop import seed_of

ROLES = ("upstream", "downstream")


class Where(NamedTuple):
    """The sites of a circuit: read and written upstream, read downstream."""

    read: Site
    write: Site
    to: Site


class SiteView(NamedTuple):
    """One of the two SAEs with what is known of it."""

    sae: SAE
    fitted: FitReport | None  # None: it was loaded
    evaluation: EvalContext
    codes: sparse.csr_matrix  # on the rows that words are taken from
    words: Describer


@dataclass(frozen=True, kw_only=True)
class Fits(Language):
    """The language study's language models and fits, for the two SAEs of a circuit; ``inner``: width of the MLPs (null: four times the model's)."""

    inner: int | None = None

    def announce(self, ctx: Context) -> None:
        if self.inner is None:  # a model from a local directory is not trained
            super().announce(ctx)

    def width(self, where: Any) -> int:
        return sum(
            (self.inner or 4 * self.lm.n_embd) if s.stream == "mlp_act" else self.lm.n_embd
            for s in as_sites(where)
        )


@dataclass(frozen=True, kw_only=True)
class Circuits:
    """Cells are (corpus, seed); each has three reports: the circuit, and its two SAEs by themselves."""

    data: Mapping[str, CorpusSpec]
    lm: LMSpec
    saes: Mapping[str, SAESpec]
    metrics: Mapping[str, Metric]
    fit: FitSpec
    seeds: Sequence[int] | None
    offline: bool
    held_out: str
    upstream: Role
    downstream: Role
    local: LocalSources
    error: str  # keep | drop: whether what the upstream SAE leaves out stays in the state at which gradients are taken
    baseline: str  # zero | mean: what a removed latent is set to
    steps: int  # Gauss-Legendre points of integrated gradients (0: the plain gradient)
    prompts: int  # held-out windows that are attributed
    rows: (
        int | None
    )  # held-out rows that co-activation, n-grams and contexts are taken from (null: all)
    threshold: float  # share of a latent's 99.9 % quantile above which it counts as on, for n-grams
    checks: CheckSpec
    graph: GraphSpec
    memory_mb: float

    def __post_init__(self) -> None:
        for key, allowed in (("error", ("keep", "drop")), ("baseline", ("zero", "mean"))):
            if getattr(self, key) not in allowed:
                raise UserError(
                    f"study.{key}={getattr(self, key)} is not one of {', '.join(allowed)}"
                )
        if not isinstance(self.steps, int) or self.steps < 0:
            raise UserError(
                f"study.steps={self.steps} must be a whole number of at least 0 (0: the plain gradient)"
            )
        if self.prompts < 1 or not self.memory_mb > 0:
            raise UserError(
                f"study.prompts={self.prompts} must be at least 1 and study.memory_mb={self.memory_mb} positive"
            )
        if len(self.saes) != 1:
            raise UserError(
                f"sae=[{','.join(self.saes)}]: a circuit has one kind of SAE; compare kinds in runs of their own"
            )
        object.__setattr__(self, "_fits", None)
        object.__setattr__(self, "_texts", {})
        object.__setattr__(self, "_given", None)

    # --- what there is -------------------------------------------------------------------------------------------------

    @property
    def fits(self) -> Fits:
        """What trains the language models and fits the SAEs that are not loaded."""
        if self._fits is None:
            lm, inner = self.lm, None
            if self.local.folder:
                sizes = self.local.sizes
                lm, inner = (
                    replace(lm, n_layer=sizes.n_layer, n_embd=sizes.width, n_head=1),
                    sizes.inner,
                )
            where, sae_spec = self.where(lm.n_layer), next(iter(self.saes.values()))
            write = str(where.write) if where.write != where.read else None
            saes = {
                "upstream": replace(sae_spec, read=str(where.read), write=write),
                "downstream": replace(sae_spec, read=str(where.to), write=None),
            }
            saes = {role: saes[role] for role in ROLES if not getattr(self, role).sae}
            fits = Fits(
                data=self.data,
                lm=lm,
                saes=saes,
                metrics={},
                fit=self.fit,
                site=str(where.read),
                seeds=self.seeds,
                offline=self.offline,
                inner=inner,
            )
            object.__setattr__(self, "_fits", fits)
        return self._fits

    def where(self, n_layer: int) -> Where:
        """The sites. Without a downstream site it is the upstream one, one block later."""
        read = parse_site(self.upstream.site or "", n_layer)
        write = parse_site(self.upstream.write, n_layer) if self.upstream.write else read
        if not self.downstream.site and write.layer + 1 > n_layer:
            raise UserError(
                f"study.upstream.site={self.upstream.site} is in the last of {n_layer} blocks: name a study.downstream.site, or go back"
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
        """The texts."""
        return [self.local.name] if self.local.text else list(self.data)

    def reports(self, name: str) -> tuple[str, ...]:
        """The circuit's report and those of its SAEs."""
        return (name, *(f"{name}.{role}" for role in ROLES))

    def prepare(self, ctx: Context) -> dict[str, Any]:
        if not self.local.text:
            self.fits.prepare(ctx)
        corpora: dict[str, CharCorpus] = self.fits._corpora
        self._texts.update(self.local.texts(corpora) if self.local.folder else corpora)
        if self.local.folder:  # read before there is a run folder: a broken one leaves none
            object.__setattr__(self, "_given", self.local.model(ctx.device, ctx.console.say))
        return {
            report: self._texts[name].provenance | part_of(self.held_out)
            for name in self.names()
            for report in self.reports(name)
        }

    def cells(self) -> list[Cell]:
        seeds = {name: [0] if self.local.folder else self.data[name].seeds for name in self.names()}
        return [
            Cell(name, seed, self.reports(name))
            for name in self.names()
            for seed in (self.seeds if self.seeds is not None else seeds[name])
        ]

    def infos(self) -> list[MetricInfo]:
        circuit = infos(self.checks.nudges)
        return [*circuit, *replace(self.fits, metrics=self.metrics).infos()]

    # --- a cell --------------------------------------------------------------------------------------------------------

    def run(self, cell: Cell, ctx: Context) -> dict[str, Outcome]:
        text, lm = self._texts[cell.dataset], self._model(cell, ctx)
        where = self.where(self.fits.lm.n_layer)
        stores = Stores(
            self.fit, list(dict.fromkeys(where)), text, lm, cell.seed, ctx, held_out=self.held_out
        )
        up, down = self._looks(cell, where, text, lm, stores, ctx)
        circuit = Circuit(
            lm.model, up.sae, where.read, where.write, down.sae, where.to, memory_mb=self.memory_mb
        )
        tokens = self._tokens(stores).to(ctx.device)
        circuit.path.check(tokens[:2])
        baseline = None
        if self.baseline == "mean":
            baseline = torch.from_numpy(np.asarray(up.codes.mean(0), np.float32).ravel()).to(
                ctx.device
            )
        prompts = circuit.prompts(tokens, baseline=baseline, keep_error=self.error == "keep")
        marked = self.graph.upstream_latent
        if marked is not None and not 0 <= marked < up.sae.d_sae:
            raise UserError(
                f"study.graph.upstream_latent={marked}: the upstream SAE has latents 0 to {up.sae.d_sae - 1}"
            )
        chosen = self._chosen(down, prompts)
        with ctx.console.stage("trace", "latent") as tick:
            traced = []
            for i, specific in enumerate(chosen):
                traced.append(
                    trace(circuit, prompts, specific.latent, self.graph, steps=self.steps)
                )
                tick(i + 1, len(chosen))
        outcome = self._checked(circuit, prompts, up, down, cell, ctx)
        told = facts.of_language(lm, text) | {"store": self.fit.store_dtype}
        outcome.facts, outcome.warnings = told | self._conditions(where, stores), stores.short()
        f1 = float(np.mean([s.f1 for s in chosen])) if chosen else np.nan
        outcome.metrics |= lm.metrics | {"ngram_f1": f1 if np.isfinite(f1) else None}
        if chosen and not np.isfinite(f1):
            outcome.why_null["ngram_f1"] = (
                "the held-out text is one window: nothing is left to score n-grams on"
            )
        elif not chosen:
            outcome.why_null["ngram_f1"] = (
                f"no downstream latent fires {self.graph.min_fires} times on the half of the text that n-grams are found on"
            )
        outcome.curves = [(s, f"lm/{n}", v) for s, n, v in lm.history]
        outcome.seconds |= {"lm": lm.seconds, "collect": stores.seconds}
        outcome.cut = lm.cut or any(
            look.fitted is not None and look.fitted.cut for look in (up, down)
        )
        kept = [(s, t) for s, t in zip(chosen, traced, strict=True) if t is not None]
        nodes = [sorted({e.latent for _, t in kept for e in t.edges}), [t.latent for _, t in kept]]
        found = {cell.dataset: outcome}
        for role, look, latents in zip(ROLES, (up, down), nodes, strict=True):
            found[f"{cell.dataset}.{role}"] = self._evaluated(
                role, look, latents, outcome.cut, told, ctx
            )
            export(
                look.sae,
                ctx.folder / "saes" / f"{cell.dataset}.{role}_{cell.seed}",
                stores,
                look.evaluation.read,
                ctx,
            )
        features = [
            {f["latent"]: f for f in found[f"{cell.dataset}.{role}"].features or []}
            for role in ROLES
        ]
        sides = [
            look.words.about(n, f, *self._contexts)
            for look, n, f in zip((up, down), nodes, features, strict=True)
        ]
        outcome.graphs = [
            as_dict(t, _title(s, t, down), *sides, (str(where.write), str(where.to)))
            for s, t in kept
        ]
        outcome.arrays |= _pictured(kept, down)
        return found

    @property
    def _contexts(self) -> tuple[int, int, int]:
        return self.graph.contexts, self.graph.before, self.graph.after

    def _model(self, cell: Cell, ctx: Context) -> TrainedLM:
        if self._given is not None:
            return self._given
        with ctx.session("language model", "lm", share=0.6) as session:
            recipe = self.data[cell.dataset].recipe
            lm = train_lm(
                self.lm,
                self._texts[cell.dataset],
                recipe,
                seed=cell.seed,
                cache=ctx.cache,
                device=ctx.device,
                session=session,
            )
        ctx.console.say(
            f"  language model: val loss {lm.metrics['best_val_loss']:.4f} after {lm.seconds:.0f} s of training"
        )
        return lm

    def _looks(
        self,
        cell: Cell,
        where: Where,
        text: CharCorpus | TokenText,
        lm: TrainedLM,
        stores: Stores,
        ctx: Context,
    ) -> list[SiteView]:
        """The two SAEs: from the cache or fitted now in one pass each, or loaded."""
        fitted: dict[str, tuple[SAE, FitReport | None]] = (
            dict(self.fits.fitted(stores, cell, ctx)) if self.fits.saes else {}
        )
        found = []
        ids = stores.tokens(stores.held_out.starts)[0].numpy().reshape(-1)[: self.rows]
        ids = ids[: len(ids) // stores.held_out.length * stores.held_out.length]
        pieces = text.pieces if isinstance(text, TokenText) else text.symbols
        for role, (read, write) in zip(
            ROLES, ((where.read, where.write), (where.to, where.to)), strict=True
        ):
            path = getattr(self, role).sae
            if path:
                fitted[role] = (
                    load_sae(
                        role,
                        Path(path).expanduser(),
                        cell.dataset,
                        cell.seed,
                        read,
                        self.fits.width(read),
                        ctx.console.say,
                    ).to(ctx.device),
                    None,
                )
            sae, report = fitted[role]
            splice = LMSplice(lm.model, write, stores.tokens)
            evaluation = EvalContext(
                sae=sae,
                device=ctx.device,
                read=read,
                write=write,
                held_out=stores.held_out,
                lm=splice,
                symbols=text.symbols,
                pieces=pieces,
            )
            codes = sparse_codes(evaluation, len(ids))
            if codes is None:
                raise UserError(
                    f"the codes of the {role} SAE at {read} are not finite: there is nothing to attribute"
                )
            found.append(
                SiteView(
                    sae,
                    report,
                    evaluation,
                    codes,
                    Describer(codes, ids, pieces, stores.held_out.length, threshold=self.threshold),
                )
            )
        return found

    def _tokens(self, stores: Stores) -> Tensor:
        """The prompts: held-out windows, evenly spaced, of the rows that everything else is taken from."""
        starts = stores.held_out.starts[
            : max(1, (self.rows or stores.held_out.n_rows) // stores.held_out.length)
        ]
        return stores.tokens(
            starts[
                np.unique(
                    np.linspace(0, len(starts) - 1, min(self.prompts, len(starts)))
                    .round()
                    .astype(int)
                )
            ]
        )[0]

    def _chosen(self, down: SiteView, prompts: Prompts) -> list[Specific]:
        """The downstream latents that get a graph: those asked for, or of those that fire in the prompts the most specific to one n-gram."""
        if self.graph.latents is None:
            here = set(prompts.active.latent.tolist())
            best = down.words.specific(self.graph.order, self.graph.min_fires)
            return [s for s in best if s.latent in here][: self.graph.count]
        wrong = [j for j in self.graph.latents if not 0 <= j < down.sae.d_sae]
        if wrong:
            raise UserError(
                f"study.graph.latents={list(self.graph.latents)}: the downstream SAE has latents 0 to {down.sae.d_sae - 1}"
            )
        best = down.words.best([self.graph.order])
        return [best[j] or Specific(j, (), 0.0, 0) for j in self.graph.latents]

    def _checked(
        self,
        circuit: Circuit,
        prompts: Prompts,
        up: SiteView,
        down: SiteView,
        cell: Cell,
        ctx: Context,
    ) -> Outcome:
        """Attribute at random, compare, remove, add up."""
        spec, seed = self.checks, seed_of(cell.seed, "circuits") % 2**32
        if not prompts.active.n:
            why = "no downstream latent is active in the prompts: a dead SAE, or study.prompts is too small"
            names = [i.name for i in infos(spec.nudges) if i.shown]
            return Outcome(metrics=dict.fromkeys(names), why_null=dict.fromkeys(names, why))
        weights, gated = (weight_directions(circuit, prompts, gated=g) for g in (False, True))
        survey = gradients(
            circuit,
            prompts,
            drawn(prompts, spec.targets, seed),
            weights,
            steps=self.steps,
            seed=seed,
        )
        checker = Checker(
            circuit,
            prompts,
            drawn(prompts, spec.checked, seed + 1),
            spec,
            steps=self.steps,
            seed=seed,
        )
        latents = np.unique(checker.targets.latent.cpu().numpy())
        scores = checker.scores(
            weights,
            gated,
            coactivation(up.codes, down.codes, latents, up.words.length, spec.lags),
            latents,
        )
        work = (lambda: checker.singles(scores), lambda: checker.deletions(scores), checker.joint)
        began = time.monotonic()
        with ctx.console.stage("remove", "part") as tick:
            for i, part in enumerate(work):
                part()
                tick(i + 1, len(work))
        outcome = Outcome()
        for found in (survey, checker.found):
            _add(outcome, found)
        outcome.seconds["removal"] = time.monotonic() - began
        m = outcome.metrics
        outcome.warnings += of_gap(
            m["integrated_gap"], None if circuit.continuous else type(circuit.downstream).__name__
        )
        ctx.console.say(
            f"  {m['n_attributed_pairs']:,.0f} pairs at {m['attribution_targets_per_second']:,.0f} targets/s; {m['n_pairs']:,.0f} removed: "
            f"r {_show(m['attribution_ablation_pearson'])} (cosine {_show(m['cosine_ablation_pearson'])}, "
            f"co-activation {_show(m['coactivation_ablation_pearson'])}), slope {_show(m['attribution_slope'])}"
        )
        return outcome

    def _conditions(self, where: Where, stores: Stores) -> dict[str, Any]:
        """What the numbers of the circuit itself depend on beside the language model and its text."""
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
        look: SiteView,
        latents: Sequence[int],
        cut: bool,
        told: Mapping[str, Any],
        ctx: Context,
    ) -> Outcome:
        """The metrics of one of the SAEs; the latents of the graphs are described whatever else is."""
        outcome, names = Outcome(cut=cut), ("sae_train_time", "sae_tokens_per_second")
        if look.fitted is None:
            outcome.metrics |= dict.fromkeys(names)
            outcome.why_null |= dict.fromkeys(names, "the SAE was loaded")
        else:
            outcome.metrics |= dict(
                zip(names, (look.fitted.seconds, look.fitted.rows_per_second), strict=True)
            )
            outcome.curves = [(s, f"sae/{n}", v) for s, n, v in look.fitted.history]
            outcome.seconds["fit"] = look.fitted.seconds
        outcome.facts = {**told, "evaluations": list(told["evaluations"])}
        outcome.facts |= facts.of_sae(
            look.sae, facts.of_sites(look.evaluation.read, look.evaluation.write)
        )
        if look.fitted is not None:
            outcome.add_fit(look.fitted)
        look.evaluation.extras["latents"] = list(latents)
        outcome.measure(self.metrics, look.evaluation)
        if (
            not look.evaluation.symbols
        ):  # tokens of more than a character: the metrics have no words for them
            outcome.features = merged(
                outcome.features, look.words.features(latents, *self._contexts)
            )
        ctx.console.say(f"  {role}: {headline(outcome.metrics)}")
        return outcome


def _add(outcome: Outcome, found: Survey) -> None:
    outcome.metrics |= found.metrics
    outcome.why_null |= found.why_null
    outcome.arrays |= found.arrays
    outcome.noise |= found.noise
    outcome.seconds |= found.seconds


def _show(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _title(s: Specific, t: Traced, down: SiteView) -> str:
    return f"latent {s.latent} fires on {down.words.spell(s.gram)!r} (F1 {s.f1:.2f}); mean of {t.n} firings"


def _pictured(kept: Sequence[tuple[Specific, Traced]], down: SiteView) -> dict[str, np.ndarray]:
    """What the histograms of gradients show: those of each chosen latent at its strongest firing, and which one is marked."""
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

"""The main study: a language model, SAEs of its activations, and their evaluation on held-out text.

The model is trained here, on characters or byte pairs, or pretrained.
"""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from sae_experiments.cache import cached, discard, is_cached
from sae_experiments.conditions import OF_SAE_TIME
from sae_experiments.console import listed, took
from sae_experiments.corpora.tokens import TokenCorpus
from sae_experiments.errors import UserError, of_type
from sae_experiments.files import read_json, write_bytes, write_json
from sae_experiments.fitting import fit
from sae_experiments.fitting.fit import FitReport, fit_saes
from sae_experiments.fitting.spec import FitSpec, SAESpec, code_of
from sae_experiments.metrics.base import EvalContext, LMSplice, Metric, MetricInfo
from sae_experiments.models import hooks as activations
from sae_experiments.models.gpt2 import INFO as LM_INFO
from sae_experiments.models.gpt2 import LMSpec, TrainedLM, training_need
from sae_experiments.models.hooks import Site, Sites, as_sites
from sae_experiments.models.layouts import Sizes
from sae_experiments.models.pretrained import Checked, PretrainedSpec, loading_need
from sae_experiments.models.stream import Stream
from sae_experiments.resources import Need
from sae_experiments.saes import saelens as interop
from sae_experiments.saes.base import SAE, NotExportable
from sae_experiments.saes.loaded import Loaded
from sae_experiments.source import source_digest
from sae_experiments.studies import conditions as facts
from sae_experiments.studies.base import Cell, Context, Outcome, check_held_out, infos_of, part_of
from sae_experiments.studies.language import loaded, second_view
from sae_experiments.studies.language import stores as stores_module
from sae_experiments.studies.language.lms import (
    OF_TRAINING,
    TOKEN_INFO,
    Corpus,
    DataSpec,
    Models,
    ReadyText,
    checked_lm,
    in_tokens,
    ready_text,
    sizes_of_lm,
)
from sae_experiments.studies.language.second_view import SecondView
from sae_experiments.studies.language.steered import add_examples
from sae_experiments.studies.language.stores import Stores, Where
from sae_experiments.training import checkpoint
from sae_experiments.training import loop as training

#: Memory per number of the rows that a fit starts from, in float32: as they are, without outliers,
#: scaled, and one more while they are worked on.
BYTES_PER_NUMBER = 16
FIT_INFO = [
    MetricInfo(
        name="sae_train_time",
        title="SAE time",
        formula="seconds of the SAE's training",
        unit="s",
        better="down",
        shown=False,
        depends=OF_SAE_TIME,
    ),
    MetricInfo(
        name="sae_tokens_per_second",
        title="SAE rows/s",
        formula="rows that its steps used, per second",
        unit="1/s",
        better="up",
        shown=False,
        depends=OF_SAE_TIME,
    ),
]


@dataclass(frozen=True, kw_only=True)
class Language:
    """The study of language models.

    Its cells are pairs of a corpus and a seed. Each has a language model, stores of activations and
    SAEs. Whatever was computed before comes from the cache.
    """

    data: Mapping[str, DataSpec]
    """Texts by name."""
    lm: LMSpec | PretrainedSpec
    """The language model."""
    saes: Mapping[str, SAESpec]
    """SAEs by label."""
    metrics: Mapping[str, Metric]
    """Metrics by name."""
    fit: FitSpec
    """Sizes of stores and settings of the fits."""
    site: str
    """Site of the SAEs, unless they name their own."""
    seeds: Sequence[int] | None
    """Seeds of the cells; None: those of each corpus."""
    replicas: int = 0
    """Further fits of every SAE to the same activations, from other seeds (weights and order of the
    batches), by which the metrics of seed stability are measured."""
    offline: bool = False
    """Download nothing."""
    held_out: str = "val"
    """Held-out part of the text, one of `HELD_OUT`."""
    steering: int = 0
    """Number of latents, the most rule-like ones, whose steered continuations are shown."""

    def __getstate__(self) -> dict[str, Any]:
        """State for another process, without what was read or loaded here."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @functools.cached_property
    def texts(self) -> dict[str, ReadyText]:
        """The texts by name, once they are prepared."""
        return {}

    @functools.cached_property
    def models(self) -> Models:
        """The language models, checked but not loaded."""
        return Models(checked_lm(self.lm, self.data, offline=self.offline))

    @property
    def sizes(self) -> Sizes:
        """Sizes of the language model."""
        return sizes_of_lm(self.models.lm)

    @property
    def reads_tokens(self) -> bool:
        """True if the model reads tokens, false for characters."""
        return isinstance(self.lm, PretrainedSpec) or self.lm.vocab_size is not None

    def check(self) -> None:
        check_held_out(self.held_out)
        if not isinstance(self.steering, int) or self.steering < 0:
            raise UserError(f"study.steering={self.steering} must be a whole number of at least 0")
        if not self.data:
            raise UserError("data=[] names no corpus: use for example data=[shakespeare_char]")
        if self.seeds is not None and (
            isinstance(self.seeds, int)
            or not self.seeds
            or any(not isinstance(s, int) or s < 0 for s in self.seeds)
        ):
            raise UserError(
                f"seeds={self.seeds} must be a list of whole numbers like [0,1,2], or null for each"
                " corpus's own"
            )
        for sae_spec in self.saes.values():
            read, write = self.sites(sae_spec)
            sae_spec.check(self.width(read), self.width(write), self.fit.train, loads=True)

    def sites(self, sae_spec: SAESpec) -> tuple[Where, Where]:
        """Sites that an SAE reads and reconstructs."""
        return sae_spec.sites(self.site, self.sizes.n_layer)

    def width(self, where: Site | Sites) -> int:
        """Width of a site of this language model, or of several side by side."""
        return sum(self.sizes.width_of(site.stream) for site in as_sites(where))

    def announce(self, ctx: Context) -> None:
        """Say what the language model and its activations will need.

        Raises:
            UserError: They do not fit into the memory.
        """
        if isinstance(self.lm, LMSpec):
            self._announce_training(self.lm, ctx)
        sizes, length = self.sizes, self.lm.n_positions
        memory = {
            "activations": float(
                (60 * sizes.width + 8 * sizes.vocabulary) * self.fit.collect_batch * length
            )
        }
        what = (
            f"reading activations of fit.collect_batch={self.fit.collect_batch} windows of "
            f"lm.n_positions={length}"
        )
        fix = "use fewer windows or positions"
        lm = self.models.lm
        if isinstance(lm, Checked):
            # The head is not run where activations are collected.
            memory["activations"] -= 8.0 * sizes.vocabulary * self.fit.collect_batch * length
            memory |= loading_need(lm, ctx.device).memory
            what = f"lm.path={lm.folder} and {what}"
            fix = "use a smaller model, lm.dtype=bf16, or fewer windows"
        ctx.announce(what, Need(memory), fix)

    def _announce_training(self, lm: LMSpec, ctx: Context) -> None:
        device, vocabulary = ctx.device, self.sizes.vocabulary
        recipes = {name: lm.train_config(spec.recipe) for name, spec in self.data.items()}
        needs = {name: training_need(lm, cfg, vocabulary, device) for name, cfg in recipes.items()}
        name = max(needs, key=lambda n: sum(needs[n].memory.values()))
        what = (
            f"a language model with lm.n_positions={lm.n_positions}, lm.n_embd={lm.n_embd} and "
            f"lm.train.batch_size={recipes[name].batch_size}"
        )
        work = sum(needs[cell.dataset].work for cell in self.cells())
        fix = "use fewer positions, a smaller batch or a smaller model"
        ctx.announce(what, needs[name]._replace(work=work), fix)

    def prepare(self, ctx: Context) -> dict[str, Any]:
        self.announce(ctx)
        for name, spec in self.data.items():
            self.texts[name] = ready_text(self.models.lm, spec, ctx, offline=self.offline)
        self.models.prepare(ctx)
        return {
            self.result_name(name, sae): (
                text.corpus.provenance | part_of(self.held_out) | loaded.origin(sae_spec)
            )
            for name, text in self.texts.items()
            for sae, sae_spec in self.saes.items()
        }

    def result_name(self, dataset: str, sae: str) -> str:
        """Name of a result: the corpus, and the SAE's label if several are fitted."""
        return dataset if len(self.saes) == 1 else f"{dataset}.{sae}"

    def cells(self) -> list[Cell]:
        return [
            Cell(name, seed, tuple(self.result_name(name, sae) for sae in self.saes))
            for name, spec in self.data.items()
            for seed in (self.seeds if self.seeds is not None else spec.seeds)
        ]

    def infos(self) -> list[MetricInfo]:
        every = [*LM_INFO, *infos_of(self.metrics.values()), *FIT_INFO]
        return [*map(in_tokens, every), *TOKEN_INFO] if self.reads_tokens else every

    def run(self, cell: Cell, ctx: Context) -> dict[str, Outcome]:
        text = self.texts[cell.dataset]
        corpus = text.corpus
        with ctx.session("language model", "lm", share=0.6) as session:
            recipe = self.data[cell.dataset].recipe
            lm = self.models.of(text, recipe, cell.seed, ctx, session)
        ctx.console.say(f"  language model: {lm.headline}")
        stores = Stores(
            self.fit, self._all_sites(), corpus, lm, cell.seed, ctx, held_out=self.held_out
        )
        seeds = [cell.seed + 1000 * (i + 1) for i in range(self.replicas)]
        replica_fits = [
            self.fitted(stores.ordered(seed), cell._replace(seed=seed), ctx) for seed in seeds
        ]
        outcomes = {}
        for name, (sae, fitted) in self.fitted(stores, cell, ctx).items():
            report = self.result_name(cell.dataset, name)
            fits = [] if self.saes[name].path else replica_fits  # a loaded SAE has one only
            replicas = tuple(fit[name][0] for fit in fits)
            outcomes[report] = self.evaluate(name, sae, replicas, corpus, lm, stores, fitted, ctx)
            export(
                sae,
                ctx.folder / "saes" / f"{report}_{cell.seed}",
                stores,
                self.sites(self.saes[name])[0],
                ctx,
                self.exported,
            )
        return outcomes

    def _all_sites(self) -> list[Site]:
        """Sites that some SAE reads or reconstructs."""
        sites: dict[Site, None] = {}
        for sae_spec in self.saes.values():
            for where in self.sites(sae_spec):
                sites |= dict.fromkeys(as_sites(where))
        return list(sites)

    @property
    def exported(self) -> dict[str, Any]:
        """Description of the language model in exported SAEs, under SAELens' keys."""
        lm = self.models.lm
        if not isinstance(lm, Checked):
            return {}
        begin = lm.begin is not None
        return {"model_name": lm.spec.name, "context_size": lm.context, "prepend_bos": begin}

    def _built(self, sae_spec: SAESpec, seed: int) -> SAE:
        """An SAE that is not fitted yet."""
        read, write = self.sites(sae_spec)
        return sae_spec.seeded(self.width(read), self.width(write), seed)

    def fitted(self, stores: Stores, cell: Cell, ctx: Context) -> dict[str, tuple[SAE, FitReport]]:
        """The SAEs of a cell with their reports.

        Those that were fitted before come from the cache; the others are fitted now, side by side.
        """
        saes = {n: self._built(spec, cell.seed).to(ctx.device) for n, spec in self.saes.items()}
        ready = {n: saes.pop(n) for n in list(saes) if self.saes[n].path}
        keys = {n: self._fit_key(n, sae, stores, cell, ctx) for n, sae in saes.items()}
        missing = {n: saes[n] for n in saes if not is_cached(ctx.cache, "fits", keys[n])}
        sites = {n: self.sites(self.saes[n]) for n in self.saes}
        for name in missing:
            self._announce_sample(stores, *sites[name], ctx)
        joint_fit_dir, key = None, {"fits": [keys[n] for n in missing]}
        if missing:

            def fit_missing(part: Path) -> bool:
                if all(is_cached(ctx.cache, "fits", keys[n]) for n in missing):
                    return False  # another process fitted them while this one waited
                return self._fit(part, missing, sites, stores, cell, ctx)

            joint_fit_dir = cached(ctx.cache, "passes", key, fit_missing)
        fits: dict[str, tuple[SAE, FitReport]] = {}
        for name, sae in saes.items():
            folder = cached(
                ctx.cache,
                "fits",
                keys[name],
                functools.partial(
                    _copy_fit_to_cache,
                    joint_fit_dir,
                    list(missing).index(name) if name in missing else 0,
                ),
            )
            sae.load_state_dict(load_file(folder / "sae.safetensors", device=str(ctx.device)))
            sae.eval().requires_grad_(False)
            report = FitReport(**read_json(folder / "report.json"))
            fits[name] = sae, report._replace(from_cache=name not in missing)
        for name, sae in ready.items():
            read = of_type(sae, Loaded)  # an SAE with a path
            fits[name] = loaded.adapted(name, self.saes[name], read, stores, sites[name], ctx)
        if joint_fit_dir is not None and not any(report.cut for _, report in fits.values()):
            discard(ctx.cache, "passes", key)
        return {name: fits[name] for name in self.saes}

    def _fit_key(
        self, name: str, sae: SAE, stores: Stores, cell: Cell, ctx: Context
    ) -> dict[str, Any]:
        """Cache key of one fit; SAEs that are fitted beside it have no part in it."""
        sae_spec = self.saes[name]
        modules = [
            *code_of({name: sae_spec}, {name: sae}),
            training,
            checkpoint,
            fit,
            activations,
            stores_module,
        ]
        modules += [second_view] if sae.second_view else []
        return {
            "what": "fit",
            "rows": stores.identity(*self.sites(sae_spec)),
            "fit": self.fit.of_result(),
            "seed": cell.seed,
            "sae_spec": sae_spec.describe(),
            "sizes": [sae.d_in, sae.d_sae, sae.d_out],
            "torch": torch.__version__,
            "device": ctx.device.type,
            "source": source_digest(*modules, alone=[__name__]),
        }

    def _fit(
        self,
        part: Path,
        saes: dict[str, SAE],
        sites: Mapping[str, tuple[Where, Where]],
        stores: Stores,
        cell: Cell,
        ctx: Context,
    ) -> bool:
        """Fit SAEs that read the same sites in one pass over the activations, pass after pass."""
        passes: dict[tuple[Any, ...], list[str]] = {}
        for name, sae in saes.items():
            key = (*sites[name], sae.needs_model, sae.second_view)
            passes.setdefault(key, []).append(name)
        reports: dict[str, FitReport] = {}
        for i, ((read, write, needs_model, replaced), names) in enumerate(passes.items()):
            here = stores.for_pass(read, write)
            if not (needs_model or replaced):  # those read windows
                here.bring_near(read, write)
            if here.near is not None:
                ctx.console.say(f"  rows are read from {here.read_from}")
            batch_at = here.windows_at if needs_model else here.batch_at
            if replaced and not needs_model:
                batch_at = SecondView(here, read, replaced, ctx).batch_at
            with ExitStack() as stack:
                session = stack.enter_context(ctx.session(f"fit {listed(names)}", "sae", share=0.8))
                session.checkpoint = part / f"checkpoint_{i}.safetensors"
                stack.callback(here.close)
                if isinstance(here.train, Stream):
                    stack.enter_context(here.train.watch.ended_by(session.check))
                reports |= fit_saes(
                    {n: saes[n] for n in names},
                    functools.partial(_batch, batch_at, read, write),
                    {n: self.saes[n].config(self.fit.train) for n in names},
                    here.sample(read, write),
                    seed=cell.seed,
                    dead_after=self.fit.dead_after,
                    handling=self.fit.handling,
                    backend=self.fit.backend,
                    session=session,
                )
        # Numbered: a label may hold what no file name should.
        for i, (name, sae) in enumerate(saes.items()):
            write_bytes(part / f"{i}.safetensors", checkpoint.tensors_of(sae))
            write_json(part / f"{i}.json", reports[name]._asdict())
        cut = any(r.cut for r in reports.values())
        for old in [] if cut else part.glob("checkpoint_*"):
            old.unlink()
        return not cut

    def _announce_sample(self, stores: Stores, read: Where, write: Where, ctx: Context) -> None:
        """Say what the rows that a pass starts from will need, if it is much.

        Raises:
            UserError: They do not fit into the memory.
        """
        init, held = stores.sample_rows
        numbers = (init + held) * self.width(read)
        numbers += 0 if read == write else init * self.width(write)
        ctx.announce(
            f"a fit from fit.init_rows={init} and fit.calibration_rows={held} rows",
            Need({"rows": float(BYTES_PER_NUMBER * numbers)}),
            "use fewer of these rows",
        )

    def described_latents(self) -> Sequence[int]:
        """Latents that the features metric always describes; for studies built on this one."""
        return ()

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
        """All metrics of one SAE on held-out text."""
        read, write = self.sites(self.saes[name])
        evaluation = EvalContext(
            sae=sae,
            device=ctx.device,
            read=read,
            write=write,
            held_out=stores.held_out,
            lm=LMSplice(lm.model, write, stores.tokens),
            symbols=corpus.symbols,
            outliers=self.fit.outliers,
            pieces=corpus.pieces,
            replicas=replicas,
            extras={"latents": list(self.described_latents())},
        )
        outcome = of_training(lm, stores, fitted)
        outcome.facts = facts.of_language(lm, corpus)
        outcome.facts |= facts.of_sae(sae, facts.of_sites(read, write))
        outcome.facts |= {"store": self.fit.store_dtype, "replicas": len(replicas)}
        outcome.facts["rows"] = stores.kind
        outcome.add_fit(fitted)
        if self.saes[name].path:
            loaded.record(outcome, self.saes[name])
        with ctx.console.stage(f"measure {name}", "metric") as tick:
            outcome.measure(self.metrics, evaluation, ctx.ends, tick)
        if self.reads_tokens:
            _add_token_metrics(outcome, corpus, stores.split)
        add_examples(outcome, evaluation, self.steering, ctx.ends)
        spent = took("fitted", fitted.seconds, from_cache=fitted.from_cache)
        how = "loaded" if self.saes[name].path else spent
        ctx.console.say(f"  {name}: {headline(outcome.metrics)} ({how})")
        _say_costs(outcome.seconds, ctx)
        return outcome


def of_training(lm: TrainedLM, stores: Stores, fitted: FitReport) -> Outcome:
    """Numbers, curves and seconds of the language model, of its activations and of a fit."""
    outcome = Outcome(metrics=dict(lm.metrics), warnings=stores.short())
    outcome.cut = lm.cut or fitted.cut
    outcome.metrics["sae_train_time"] = fitted.seconds
    outcome.metrics["sae_tokens_per_second"] = fitted.rows_per_second
    outcome.curves = [(step, f"lm/{name}", value) for step, name, value in lm.history]
    outcome.curves += [(step, f"sae/{name}", value) for step, name, value in fitted.history]
    outcome.seconds = {"lm": lm.seconds, "collect": stores.seconds, "fit": fitted.seconds}
    return outcome


def _say_costs(seconds: Mapping[str, float], ctx: Context) -> None:
    """Print the time that metrics took, and the slowest of them."""
    prefix = "metric."
    costs = {k.removeprefix(prefix): s for k, s in seconds.items() if k.startswith(prefix)}
    slowest = sorted(costs.items(), key=lambda cost: -cost[1])[:4]
    listed = ", ".join(f"{name} {s:.1f}" for name, s in slowest)
    ctx.console.say(f"  metrics took {sum(costs.values()):.0f} s, most of it {listed}")


def _add_token_metrics(outcome: Outcome, corpus: Corpus, split: str) -> None:
    """Add losses per byte, which models with different tokens share, and why others are null."""
    values = outcome.metrics
    for name, source, of, unit in (
        ("val_bits_per_byte", "best_val_loss", "val", math.log(2)),
        ("ce_delta_bits_per_byte", "ce_delta_bits", split, 1.0),
    ):
        value = values.get(source)
        values[name] = None
        if isinstance(corpus, TokenCorpus) and value is not None:
            values[name] = value / unit / corpus.bytes_per_token(of)
        else:
            outcome.why_null[name] = f"{source} was not measured"
    for name in OF_TRAINING:
        if values.get(name) is None:
            outcome.why_null.setdefault(name, "the language model was loaded, not trained here")


def _copy_fit_to_cache(joint_fit_dir: Path | None, i: int, part: Path) -> bool:
    """Put one SAE of a pass into a cache folder of its own."""
    if joint_fit_dir is None:
        raise UserError(f"{part} was removed while it was read: type the same command again")
    shutil.copy(joint_fit_dir / f"{i}.safetensors", part / "sae.safetensors")
    shutil.copy(joint_fit_dir / f"{i}.json", part / "report.json")
    return not read_json(part / "report.json")["cut"]


def _batch(batch_at: Any, read: Where, write: Where, step: int) -> Any:
    return batch_at(step, read, write)


def headline(metrics: Mapping[str, float | None]) -> str:
    """The numbers a person looks at first, in one line."""
    error = ("FVU", "sae_fvu", 4)
    if metrics.get("sae_outlier_frac"):
        error = ("FVU of ordinary rows", "sae_fvu_ordinary", 4)
    wanted = (
        ("L0", "sae_l0", 2),
        error,
        ("dead", "sae_dead_frac", 3),
        ("delta CE", "ce_delta_bits", 4),
    )
    return ", ".join(
        f"{title} {metrics[key]:.{digits}f}"
        for title, key, digits in wanted
        if metrics.get(key) is not None
    )


def export(
    sae: SAE,
    folder: Path,
    stores: Stores,
    read: Where,
    ctx: Context,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Write the SAE as a SAELens directory, with reference rows, if that format can hold it.

    Args:
        sae: The SAE.
        folder: Directory to write.
        stores: The activations.
        read: Site or sites that the SAE reads.
        ctx: Context of the run.
        more: Further metadata, which overrides that of the stores.
    """
    x = stores.held_out.rows(read, slice(0, 64)).to(ctx.device)
    hook = ", ".join(str(s) for s in as_sites(read))
    about = {
        "hook_name": hook,
        "context_size": stores.held_out.length,
        "dataset_path": stores.corpus.name,
        **(more or {}),
    }
    try:
        interop.save_sae(sae, folder, reference=x, metadata=about)
    except NotExportable as reason:
        ctx.console.detail(f"  not exported: {reason}")

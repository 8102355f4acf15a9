"""Names of code: which cached things are made anew for a change of which module, and that a
user's own modules count wherever they lie.
"""

from __future__ import annotations

import ast
import functools
import importlib
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sae_experiments import source
from sae_experiments.config.compose import build, compose_checked
from sae_experiments.console import Console
from sae_experiments.corpora import corpus as data
from sae_experiments.corpora import download as fetch
from sae_experiments.corpora import standin
from sae_experiments.corpora.corpus import window_starts
from sae_experiments.errors import UserError
from sae_experiments.files import digest
from sae_experiments.fitting import cached as fitting_cached
from sae_experiments.models import gpt2 as lm
from sae_experiments.models import store as activations
from sae_experiments.models import tokens
from sae_experiments.source import closure, outside_digest, source_digest, targets_digest
from sae_experiments.studies.base import Cell, Context
from sae_experiments.studies.ground_truth import study as ground_truth
from sae_experiments.studies.language import lms, stores
from sae_experiments.studies.language import study as language
from sae_experiments.studies.palindrome import study as palindrome
from sae_experiments.studies.superposition import study as superposition
from support.common import CONF, ROOT, TINY, corpus_spec, lm_spec

PACKAGE = ROOT / "sae_experiments"
FILES = {
    ".".join(p.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip("."): p
    for p in sorted(PACKAGE.rglob("*.py"))
}


def full(name: str) -> str:
    return f"sae_experiments.{name}".rstrip(".")


def small(*overrides: str) -> Any:
    """The study of a tiny configuration."""
    return build(compose_checked(CONF, [*TINY.split(), *overrides])[0].study)


_small = functools.cache(small)


# ------------------------------------------------------------------------------ which keys move for
# which modules

TRAIN = {"", "files", "errors", "training.loop", "training.checkpoint", "training.finite", "memory"}
LM = TRAIN | {
    "cache",
    "models.gpt2",
    "corpora.corpus",
    "corpora.download",
    "corpora.standin",
    "metric_info",
}
SAE = TRAIN | {"saes.base", "saes.ops", "saes.selection"}
ARMS = SAE | {"fitting.fit", "models.hooks", "fitting.spec"}
FIT = LM | ARMS | {"studies.language.stores", "studies.base", "studies.language.study"}
#: What each kind of cached thing depends on, at least: a change of one of these modules makes it
#: anew.
MOVES = {
    "corpora": {"files", "cache", "errors", "corpora.corpus", "corpora.documents"},
    "stand_in": {"files", "cache", "errors", "corpora.standin"},
    "lms": LM,
    "stores": {
        "files",
        "cache",
        "errors",
        "models.store",
        "studies.language.stores",
    },  # and with the language model, whose key is part of theirs
    "fits of topk": FIT | {"saes.topk"},
    "fits of gated": FIT | {"saes.gated", "saes.standard", "saes.controller"},
    "fits of purified": (
        FIT
        | {
            "saes.batch_topk",
            "saes.purified.sae",
            "saes.purified.perturb",
            "saes.purified.early_stopping",
            "studies.language.second_view",
        }
    ),
    "palindromes": (
        LM | {"studies.palindrome.strings", "studies.palindrome.study"}
    ),  # in the keys of the next too
    "fits of palindromes": ARMS | {"saes.topk"},
    "fits of planted": (
        ARMS | {"saes.topk", "studies.ground_truth.world", "studies.ground_truth.study"}
    ),
    "tokenizers": {"models.tokens"},
    "losses": {"studies.language.lms"},  # of a pretrained model, whose key is part of theirs
    "toys": (
        TRAIN
        | {
            "studies.superposition.toy",
            "studies.superposition.toy_step",
            "studies.superposition.trees",
            "studies.superposition.study",
        }
    ),
}
#: What nothing that is cached depends on: what measures, draws, tells or reads the command line.
NEVER = {
    n
    for n in FILES
    if n.startswith(("plots.", "report.", "metrics.", "studies.circuits.", "studies.attribution."))
}
NEVER |= {
    "cli.main",
    "config.axes",
    "config.checks",
    "config.compose",
    "sweeps.jobs",
    "sweeps.search",
    "sweeps.launchers",
    "cli.help",
    "runner.run",
    "results.records",
    "results.table",
    "results.compare",
    "report.figures",
    "runner.track",
}
NEVER |= {
    "api",
    "saes.saelens",
    "studies.circuits.study",
    "studies.palindrome.selectivity",
    "source",
}


def others(kind: str) -> set[str]:
    """The SAEs and studies that are not a kind's own."""
    known = {n for names in MOVES.values() for n in names if n.startswith(("saes.", "studies."))}
    shared = {
        "fitting.spec",
        "studies.base",
        "studies.language.stores",
        "saes.standard",
        "saes.controller",
    } | SAE
    return known - MOVES[kind] - shared


#: Functions of `sae_experiments.cache` that make what is cached.
MAKERS = {"cached", "entry"}


class Asked(Exception):
    """The cache was asked for something: its kind and its key."""


class Keys:
    """How the real code makes its keys: the code that each names, and the key itself."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.named: list[tuple[tuple[str, ...], tuple[str, ...]]] = []
        for module in (
            activations,
            data,
            lm,
            standin,
            language,
            palindrome,
            ground_truth,
            superposition,
            fitting_cached,
            tokens,
            lms,
        ):
            monkeypatch.setattr(module, "source_digest", self.digest, raising=False)
            for name in MAKERS:
                monkeypatch.setattr(module, name, self.cached, raising=False)

    def digest(self, *modules: Any, alone: Any = ()) -> str:
        names = tuple(m if isinstance(m, str) else m.__name__ for m in modules)
        self.named.append((names, tuple(alone)))
        return source_digest(*names, alone=alone)

    def cached(self, root: Path, kind: str, key: Any, make: Any) -> Path:
        raise Asked(kind, digest(key))

    def of(self, ask: Callable[[], Any]) -> str:
        """The key that ``ask`` leads to; afterwards ``named[-1]`` is the code in it."""
        try:
            return digest(ask())
        except Asked as asked:
            return asked.args[1]


@pytest.fixture
def keys(
    monkeypatch: pytest.MonkeyPatch, corpus_file: Path, tmp_path: Path
) -> tuple[Keys, dict[str, Callable[[], Any]]]:
    found = Keys(monkeypatch)
    corpus: Any = SimpleNamespace(key="corpus", symbols=list("ab"))
    ctx: Any = SimpleNamespace(device=torch.device("cpu"), cache=tmp_path)
    rows: Any = SimpleNamespace(identity=lambda *where: {})
    cell = Cell("text8", 0, ())
    study = _small
    pretrained: Any = SimpleNamespace(spec=SimpleNamespace(eval_windows=1, n_positions=8))

    def fit(*overrides: str) -> Any:
        made = study("data=[text8]", *overrides)
        ((name, sae_spec),) = made.saes.items()
        sae = sae_spec.seeded(16, 16, 0)
        return made._fit_key(name, sae, rows, cell, ctx)

    def collected() -> Any:
        source = activations.Source(
            model=torch.nn.Linear(1, 1),
            tokens_of=stores.split_windows,
            length=1,
            split="train",
            key={},
            dtype="float32",
            batch=1,
        )
        return activations.collect(source, torch.zeros(1).numpy(), [], cache=tmp_path)

    toys, strings = "study=superposition", "study=palindrome"
    asks = {
        "corpora": lambda: data.load_corpus(corpus_spec(corpus_file), cache=tmp_path, offline=True),
        "stand_in": lambda: standin.stand_in(
            tmp_path, "text8", "text8", 100, reason="", remedy="", say=print
        ),
        "lms": lambda: lm.train_lm(
            lm_spec(), corpus, {}, seed=0, cache=tmp_path, device=ctx.device, session=None
        ),  # type: ignore[arg-type]
        "stores": collected,
        "fits of topk": lambda: fit("sae=topk"),
        "fits of gated": lambda: fit("sae=gated"),
        "fits of purified": lambda: fit("sae=purified", "sae.model.noise=token"),
        "palindromes": lambda: study(strings, "sae=topk").trained((), 0, ctx),
        "fits of palindromes": (
            lambda: study(strings, "sae=topk").fitted(torch.zeros(1), {}, 0, ctx)
        ),
        "fits of planted": lambda: study("study=ground_truth", "sae=topk").fitted(None, cell, ctx),
        "tokenizers": lambda: tokens.trained_tokenizer(list, 300, key={}, cache=tmp_path),
        # type: ignore[arg-type]
        "losses": lambda: lms._losses(None, {}, pretrained, corpus, tmp_path, None),
        "toys": lambda: study(toys).trained(next(iter(study(toys).families.values())), 0, ctx),
    }
    return found, asks


@pytest.fixture
def edit(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Ends the files of modules with one character more, as if they were loaded that way, and
    takes earlier edits back.
    """
    plain, changed = source._text, set()

    def known_no_more() -> None:
        for file in changed:
            source._known.pop(file, None)

    def make(*names: str, character: str = "0") -> None:
        known_no_more()
        changed.clear()
        changed.update(FILES[name] for name in names)
        monkeypatch.setattr(
            source,
            "_text",
            lambda path: plain(path) + (f"\n{character}" if path in changed else ""),
        )
        known_no_more()

    yield make
    known_no_more()


@pytest.mark.parametrize("kind", MOVES)
def test_a_change_of_a_module_moves_the_keys_that_depend_on_it_and_no_other(keys, edit, kind):
    found, asks = keys
    before = found.of(asks[kind])
    names, alone = found.named[-1]
    plain = source_digest(*names, alone=alone)
    counted = {n for n in FILES if full(n) in closure(*names) | set(alone)}
    assert MOVES[kind] <= counted and not counted & (NEVER | others(kind))
    edit(*(FILES.keys() - counted))
    assert source_digest(*names, alone=alone) == plain, "none of all the others counts"
    assert found.of(asks[kind]) == before
    edit(*FILES, character="# a comment")
    assert source_digest(*names, alone=alone) == plain
    for name in counted:
        edit(name)
        assert source_digest(*names, alone=alone) != plain, name
    assert found.of(asks[kind]) != before, "the key itself, as the code makes it"


def test_two_texts_that_one_model_reads_have_activations_of_their_own(monkeypatch):
    """A model from a folder has a key of its own, whatever it reads; texts cut to one length
    have windows at the same places.
    """
    asked: list[Any] = []
    monkeypatch.setattr(
        stores,
        "collect",
        lambda source, *args, **more: asked.append(digest(source.key)) or SimpleNamespace(key={}),
    )
    fit = SimpleNamespace(
        train_rows=64,
        calibration_rows=16,
        held_out_rows=16,
        store_dtype="float32",
        collect_batch=1,
        store="disk",
    )
    model: Any = SimpleNamespace(
        model=SimpleNamespace(config=SimpleNamespace(n_positions=8)), key={"what": "local lm"}
    )
    ctx: Any = SimpleNamespace(device="cpu", cache=None, console=Console(verbosity="quiet"))
    for key in ("one", "other"):
        splits = {"train": range(200), "val": range(50)}
        text: Any = SimpleNamespace(
            splits=splits,
            key=key,
            window_starts=lambda split, length, splits=splits: window_starts(
                len(splits[split]), length
            ),
        )
        stores.Stores(fit, [], text, model, 0, ctx)  # type: ignore[arg-type]
    assert len(asked) == 6 and not set(asked[:3]) & set(asked[3:])


def test_a_download_is_named_by_its_checksums_alone(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(fetch, "cached", lambda root, kind, key, make: seen.append(key) or tmp_path)
    (tmp_path / "source.json").write_text('{"url": "u"}')
    fetch.cached_text(
        tmp_path, "text8", [], {"size": 1, "sha256": "a", "md5": None}, network=None, say=print
    )
    assert seen == [{"name": "text8", "size": 1, "sha256": "a", "md5": None}], (
        "what was fetched is verified, whatever fetched it"
    )


def test_everything_that_is_cached_has_its_line_in_the_table():
    kinds = {
        "corpora",
        "stand_in",
        "lms",
        "stores",
        "tokenizers",
        "losses",
        "palindromes",
        "toys",
        "fits",
        "passes",
        "downloads",
    }
    calls = (
        node
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
    )
    made = [c.args[1] for c in calls if getattr(c.func, "id", "") in MAKERS]
    found = {ast.literal_eval(kind) for kind in made if isinstance(kind, ast.Constant)}
    assert found == kinds, (
        "a new kind of cached thing needs a key with its code, and its line in MOVES"
    )


# ------------------------------------------------------------------------------ what runs is what
# is named


class Watched:
    """Watches which modules of the package run while a cached thing is made, and which its key
    names.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.named: dict[str, set[str]] = {}
        self.wrong: dict[str, set[str]] = {}
        self.made: list[str] = []
        self.ran: list[set[str]] = []
        for module in (activations, data, lm, language, palindrome, ground_truth, superposition):
            monkeypatch.setattr(module, "source_digest", self.digest)
        for module in (activations, data, lm, language, palindrome, superposition, fitting_cached):
            for name in MAKERS & vars(module).keys():
                plain = getattr(module, name)
                monkeypatch.setattr(module, name, functools.partial(self.cached, plain))

    def digest(self, *modules: Any, alone: Any = ()) -> str:
        found = source_digest(*modules, alone=alone)
        self.named[found] = closure(*modules) | set(alone)
        return found

    def cached(self, plain: Any, root: Path, kind: str, key: Any, make: Any) -> Any:
        def watched(folder: Path) -> Any:
            before = sys.getprofile()
            self.ran.append(set())
            sys.setprofile(self.see)
            try:
                return make(folder)
            finally:
                sys.setprofile(before)
                names = {source.PACKAGE} | {
                    m for text in texts(key) for m in self.named.get(text, ())
                }
                self.made.append(kind)
                if more := self.ran.pop() - names:
                    self.wrong.setdefault(kind, set()).update(more)

        return plain(root, kind, key, watched)

    def see(self, frame: Any, event: str, arg: Any) -> None:
        name = frame.f_globals.get("__name__", "")
        if event == "call" and name.startswith(f"{source.PACKAGE}."):
            self.ran[-1].add(name)


def texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for each in value.values():
            yield from texts(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from texts(each)
    elif isinstance(value, str):
        yield value


#: ``ctx.session`` shows, and says when the time is over; the third names what is cached meanwhile.
#: They compute nothing.
SHOWN = {"sae_experiments.console", "sae_experiments.studies.base", "sae_experiments.source"}
NOISY = ["sae.model.noise=token", "sae.model.clean_frac=0", "sae.model.warmup_frac=0"]


@pytest.mark.parametrize(
    ("overrides", "kinds"),
    [
        (
            ["data=[text8]", "data.text8.stand_in=always", "sae=gated"],
            {"corpora", "lms", "stores", "passes", "fits"},
        ),
        pytest.param(
            ["data=[text8]", "data.text8.stand_in=always", "sae=purified", *NOISY],
            {"fits"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["data=[text8]", "data.text8.stand_in=always", "sae=end_to_end"],
            {"fits"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["study=ground_truth", "study.train.steps=8", "sae=hierarchical"],
            {"fits"},
            marks=pytest.mark.slow,
        ),
        (["study=palindrome", "study.train.steps=5", "sae=kl"], {"palindromes", "fits"}),
        (
            [
                "study=superposition",
                "study.depths=[2]",
                "study.hidden=[2]",
                "study.train.steps=5",
                "study.eval_rows=64",
            ],
            {"toys"},
        ),
    ],
    ids=["language", "purified", "end_to_end", "ground_truth", "palindrome", "superposition"],
)
def test_the_key_of_a_cached_thing_names_all_the_code_that_made_it(
    overrides, kinds, tmp_path, monkeypatch
):
    watched = Watched(monkeypatch)
    made = small(*overrides)
    ctx = Context(
        folder=tmp_path,
        cache=tmp_path / "cache",
        device=torch.device("cpu"),
        console=Console(verbosity="quiet"),
    )
    made.prepare(ctx)

    def enough(*args: Any) -> Any:
        raise Asked  # what comes after the fits is not what this is about

    monkeypatch.setattr(language.Language, "evaluate", enough)
    monkeypatch.setattr(ground_truth.GroundTruth, "evaluate", enough)
    monkeypatch.setattr(superposition, "summarise", enough)
    monkeypatch.setattr(palindrome.selectivity, "measure", enough)
    with pytest.raises(Asked):
        made.run(made.cells()[0], ctx)
    assert kinds <= set(watched.made)
    assert {kind: more - SHOWN for kind, more in watched.wrong.items() if more - SHOWN} == {}


# ------------------------------------------------------------------------------ a user's own
# modules

PER_SAE_SETTINGS = {
    "mysae/__init__.py": "from .layers import Encoder as Encoder\n",
    "mysae/layers.py": (
        "from . import maths\n\nclass Encoder:\n    def run(self):\n        return maths.twice(2)\n"
    ),
    "mysae/maths.py": "def twice(x):\n    return 2 * x\n",
    "mysae/unused.py": "y = 1\n",
    "mysae/deep/__init__.py": "",
    "mysae/deep/late.py": "z = 1\n",
    "helper_of_mine.py": (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import only_for_types\nelse:\n   "
        " import at_run_time\n"
    ),
    "only_for_types.py": "a = 1\n",
    "at_run_time.py": "a = 1\n",
    "own_model.py": (
        """
        import helper_of_mine
        from mysae import Encoder
        from sae_experiments.saes import topk

        def build(**settings):
            from mysae.deep import late
            return Mine(**settings)

        class Mine(topk.TopK):
            pass
        """
    ),
}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of a user's modules somewhere on the path; nothing of it is imported yet."""
    for name, text in PER_SAE_SETTINGS.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in {
            n.split("/")[0].removesuffix(".py") for n in PER_SAE_SETTINGS
        }:
            del sys.modules[name]


COUNTS = {name: name not in ("mysae/unused.py", "only_for_types.py") for name in PER_SAE_SETTINGS}


@pytest.mark.parametrize("name", COUNTS)
def test_every_module_that_a_users_class_imports_counts_wherever_it_lies(own, name):
    before = source_digest("own_model")
    (own / name).write_text(textwrap.dedent(PER_SAE_SETTINGS[name]) + "\n0\n")
    assert (source_digest("own_model") != before) == COUNTS[name]


def test_the_modules_of_a_users_class_are_followed_into_the_package():
    assert {"sae_experiments.saes.topk", "sae_experiments.saes.ops"} <= closure(
        "sae_experiments.saes.topk"
    )


def test_a_class_a_function_that_builds_it_and_what_is_handed_to_it_all_count(own):
    own_model = importlib.import_module("own_model")
    late = importlib.import_module("mysae.layers").Encoder
    sae_spec = SimpleNamespace(model=functools.partial(own_model.build, parts=[late()]))
    found = source.modules_behind(sae_spec.model)
    assert found == ["mysae.layers", "own_model"]
    assert source.modules_behind(own_model.Mine) == [
        "own_model",
        "sae_experiments.saes.base",
        "sae_experiments.saes.topk",
    ]


def test_the_key_of_a_fit_names_a_users_class_with_all_that_it_imports(own):
    study = small("data=[text8]", "sae=topk", "sae.model._target_=own_model.build")
    ((name, sae_spec),) = study.saes.items()
    rows: Any = SimpleNamespace(identity=lambda *where: {})
    ctx: Any = SimpleNamespace(device=torch.device("cpu"))

    def key() -> str:
        sae = sae_spec.seeded(16, 16, 0)
        return digest(study._fit_key(name, sae, rows, Cell("text8", 0, ()), ctx))

    before = key()
    assert key() == before
    (own / "mysae/maths.py").write_text("def twice(x):\n    return 3 * x\n")
    importlib.reload(importlib.import_module("mysae.maths"))
    assert key() != before


def test_what_a_study_uses_of_a_users_own_decides_about_finished_results(own):
    assert outside_digest(small("sae=topk")) == ""
    study = small("sae=topk", "sae.model._target_=own_model.build")
    before = outside_digest(study)
    assert before
    (own / "mysae/maths.py").write_text("def twice(x):\n    return 3 * x\n")
    assert outside_digest(study) == before, "what runs is what was loaded"
    importlib.reload(importlib.import_module("mysae.maths"))
    assert outside_digest(study) != before


def test_what_a_sweep_names_of_a_users_own_decides_about_finished_jobs(own):
    assert (
        targets_digest(
            ["_target_: sae_experiments.saes.topk.TopK", "x: 1", "sae.model._target_=no.such.thing"]
        )
        == ""
    )
    for text in (
        "_target_: own_model.build",
        "sae.model._target_=own_model.Mine",
        "{_target_: 'own_model.build'}",
    ):
        before = targets_digest([text])
        (own / "at_run_time.py").write_text(f"a = {text!r}\n")
        assert before and targets_digest([text]) != before


def test_installed_packages_count_by_version_where_they_compute(own, monkeypatch):
    def moved(package: str, *modules: Any) -> bool:
        before = source_digest(*modules)
        with pytest.MonkeyPatch.context() as patch:
            plain = source._version_of
            patch.setattr(source, "_version_of", lambda top: "0" if top == package else plain(top))
            return source_digest(*modules) != before

    assert moved("torch", lm) and moved("transformers", lm) and moved("numpy", lm)
    assert not moved("transformers", "sae_experiments.saes.topk") and not moved("tqdm", lm)
    (own / "own_model.py").write_text("import scipy.sparse, os\n")
    assert moved("scipy", "own_model") and not moved("torch", "own_model")


@pytest.mark.parametrize("name", ["no_such_module", "sys"])
def test_code_that_is_in_no_file_is_one_line(name):
    with pytest.raises(UserError, match=f"code of {name}") as caught:
        source_digest(name)
    assert "\n" not in str(caught.value)

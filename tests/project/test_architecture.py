"""The laws of the house, read from the source with ``ast``: who may import whom, how long
things may be, what is never used.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.common import ROOT

PACKAGE = ROOT / "sae_experiments"
FILES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = [ROOT / "experiment.py", ROOT / "plot.py"]

#: Which rooms of the package a room may import. A folder is one room, and so is each study.
FOUNDATIONS = {
    "errors",
    "files",
    "cache",
    "source",
    "sampling",
    "memory",
    "resources",
    "console",
    "stopping",
    "conditions",
    "metric_info",
    "quality_warnings",
    "flatten",
}
STUDIES = {
    f"studies.{name}"
    for name in (
        "language",
        "ground_truth",
        "palindrome",
        "superposition",
        "circuits",
        "attribution",
    )
}
_FITTING = FOUNDATIONS | {"training", "models", "saes"}
_STUDY = _FITTING | {"corpora", "fitting", "metrics", "studies"}
TABLE: dict[str, set[str]] = {
    "": set(),
    "errors": set(),
    "files": {"errors"},
    "cache": {"errors", "files"},
    "source": {"errors", "files"},
    "sampling": set(),
    "memory": set(),
    "resources": {"errors"},
    "console": set(),
    "stopping": set(),
    "conditions": set(),
    "metric_info": {"conditions"},
    "quality_warnings": set(),
    "flatten": set(),
    "corpora": FOUNDATIONS | {""},
    "training": FOUNDATIONS,
    "models": FOUNDATIONS | {"corpora", "training"},
    "saes": FOUNDATIONS | {"training"},
    "fitting": _FITTING,
    "metrics": FOUNDATIONS | {"models", "saes"},
    "studies": _FITTING | {"corpora", "fitting", "metrics"},
    **dict.fromkeys(STUDIES, _STUDY),
    "studies.circuits": _STUDY | {"studies.language"},
    "studies.attribution": _STUDY | {"studies.language"},
    "runner": FOUNDATIONS | {"results", "studies"},
    "results": FOUNDATIONS,
    "plots": FOUNDATIONS | {"results"},
    "report": FOUNDATIONS | {"results", "plots"},
    "config": FOUNDATIONS | {"results"},
    "sweeps": FOUNDATIONS | {"config", "results"},
    "steering": FOUNDATIONS | {"metrics", "models", "results", "saes"},
    "cli": FOUNDATIONS | {"config", "report", "results", "runner", "steering", "sweeps", "fitting"},
    "__main__": {"cli", "files"},
    "trial": _STUDY | {"studies.ground_truth"},
    "steer": {"cli"},
    "api": FOUNDATIONS | {"", "config", "fitting", "metrics", "saes", "steering", "training"},
}
#: Only these rooms (or modules) may import these packages.
ONLY = {
    # Models trained here and models from a directory are apart, so that neither decides about the
    # other's caches.
    "transformers": {"models.gpt2", "models.cpu_kernels", "models.local", "models.windows"},
    "huggingface_hub": {"models.hub", "models.local"},
    "tokenizers": {"models.tokens"},
    "datasets": {"corpora.documents"},
    "pyarrow": {"corpora.documents"},
    "wandb": {"runner.track"},
    "matplotlib": {"plots"},
    "hydra": {"config", "sweeps", "cli"},
    "omegaconf": {"config", "sweeps", "cli"},
    **{
        name: {"corpora.download"}
        for name in (
            "socket",
            "http",
            "urllib",
            "ssl",
            "ftplib",
            "requests",
            "httpx",
            "aiohttp",
            "urllib3",
        )
    },
    "tqdm": {"console", "corpora.download", "runner.board"},
    "joblib": {"sweeps.launchers", "runner.pool"},
    "optuna": {"sweeps.search"},
    "pandas": {"results", "plots", "report"},
}
#: Rooms and modules that work where there is no torch, so that tables and figures come at once.
WITHOUT_TORCH = {
    "conditions",
    "quality_warnings",
    "results",
    "plots",
    "report",
    "errors",
    "files",
    "cache",
    "source",
    "config.axes",
    "config.checks",
    "config.compose",
    "config.hydra_habits",
    "flatten",
    "config.typed",
    "console",
    "metric_info",
    "cli.help",
    "runner.track",
}
BANNED = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "shelve", "marshal"}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def room_of(module: str) -> str:
    """`saes` of `sae_experiments.saes.topk`; `studies.circuits` of a module of that study."""
    inside = module.split(".")[1:]
    if ".".join(inside[:2]) in STUDIES:
        return ".".join(inside[:2])
    return inside[0] if inside else ""


def is_in(module: str, places: set[str]) -> bool:
    """Whether a module is one of `places`, or lies in a room that is."""
    inside = module.removeprefix("sae_experiments.")
    return inside in places or room_of(module) in places


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(p) for p in FILES}


def imports(path: Path, *, top_level: bool = False) -> Iterator[str]:
    """Full names of what a file imports, also inside functions (unless ``top_level``)."""
    nodes = _at_import(tree(path).body) if top_level else ast.walk(tree(path))
    for_checkers = set(_for_type_checkers(tree(path).body))
    for node in nodes:
        if ast.dump(node) in for_checkers:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else str(node.module) for name in inside)


def _for_type_checkers(body: list[ast.stmt]) -> Iterator[str]:
    """Imports under `if TYPE_CHECKING`, which no program runs."""
    for node in body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield from map(ast.dump, node.body)


def _at_import(body: list[ast.stmt]) -> Iterator[ast.AST]:
    for node in body:
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node
            for field in ("body", "orelse", "finalbody"):
                yield from _at_import(getattr(node, field, []))


def calls(path: Path) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree(path)) if isinstance(node, ast.Call))


def show(path: Path) -> str:
    return str(path.relative_to(ROOT))


# ------------------------------------------------------------------------------------------------
# imports


@pytest.mark.parametrize("path", FILES, ids=show)
def test_a_module_imports_what_the_table_allows_and_nothing_else(path):
    room = room_of(module_of(path))
    assert room in TABLE, f"{show(path)}: give the new room {room!r} its line in TABLE"
    edges = {room_of(name) for name in imports(path) if name.split(".")[0] == "sae_experiments"} - {
        room
    }
    assert edges <= TABLE[room], (
        f"{show(path)} must not import {', '.join(sorted(edges - TABLE[room]))}"
    )


def test_the_table_has_no_cycle():
    done: set[str] = set()
    while left := set(TABLE) - done:
        free = {room for room in left if TABLE[room] <= done}
        assert free, f"a cycle among {sorted(left)}"
        done |= free


def test_modules_import_one_another_in_no_circle():
    edges = {module_of(p): {n for n in imports(p) if n in MODULES} - {module_of(p)} for p in FILES}
    done: set[str] = set()
    while left := set(edges) - done:
        free = {module for module in left if edges[module] <= done}
        assert free, f"a circle among {sorted(left)}"
        done |= free


@pytest.mark.parametrize("path", FILES, ids=show)
def test_a_heavy_package_has_one_door(path):
    tops = {name.split(".")[0] for name in imports(path)}
    wrong = {top for top in tops & ONLY.keys() if not is_in(module_of(path), ONLY[top])}
    assert not wrong, f"{show(path)} must not import {', '.join(sorted(wrong))}"


@pytest.mark.parametrize("path", [p for p in FILES if is_in(module_of(p), WITHOUT_TORCH)], ids=show)
def test_tables_figures_and_their_helpers_do_not_import_torch(path):
    assert not {name.split(".")[0] for name in imports(path)} & {
        "torch",
        "safetensors",
        "transformers",
    }


@pytest.mark.parametrize("script", SCRIPTS, ids=show)
def test_what_a_script_imports_at_its_start_needs_no_torch(script):
    """Not even through what it imports: help, mistakes and figures come at once."""
    by_module = {module_of(p): p for p in FILES}
    todo, seen, outside = (
        (
            [script, by_module["sae_experiments.cli.main"]]
            if script.name == "experiment.py"
            else [script]
        ),
        set(),
        set(),
    )
    while todo:
        path = todo.pop()
        seen.add(path)
        for name in imports(path, top_level=True):
            if name in by_module:
                todo += [p for p in (by_module[name],) if p not in seen]
            else:
                outside.add(name.split(".")[0])
    assert not outside & {"torch", "transformers", "safetensors", "wandb"}


def test_wandb_is_imported_inside_a_method_only():
    assert "wandb" not in {name for p in FILES for name in imports(p, top_level=True)}


# ------------------------------------------------------------------------------------------------
# sizes


@pytest.mark.parametrize("path", SCRIPTS, ids=show)
def test_the_scripts_stay_short(path):
    assert len(path.read_text().splitlines()) <= 60


def test_there_is_no_module_for_leftovers():
    assert not [show(p) for p in FILES if p.stem in ("utils", "util", "helpers", "misc", "common")]


# ------------------------------------------------------------------------------------------------
# what is never used


@pytest.mark.parametrize("path", [*FILES, *SCRIPTS], ids=show)
def test_there_is_no_pickle_anywhere(path):
    """Nothing is unpickled from a file; processes of one run send each other messages."""
    banned = set() if show(path) == "sae_experiments/runner/messages.py" else BANNED
    assert not {name.split(".")[0] for name in imports(path)} & banned
    for call in calls(path):
        name = ast.unparse(call.func)
        assert name not in (
            "torch.load",
            "torch.save",
            "torch.jit.load",
            "joblib.load",
            "joblib.dump",
        ), f"{show(path)}:{call.lineno} {name}"
        options = {k.arg: ast.unparse(k.value) for k in call.keywords}
        assert options.get("allow_pickle", "False") == "False", f"{show(path)}:{call.lineno}"
        if name == "np.load":
            assert options.get("allow_pickle") == "False", (
                f"{show(path)}:{call.lineno} must say allow_pickle=False"
            )


@pytest.mark.parametrize("path", [*FILES, *SCRIPTS], ids=show)
def test_no_error_is_swallowed_unseen_and_no_text_is_executed(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{show(path)}:{node.lineno} bare except"
            assert not (len(node.body) == 1 and isinstance(node.body[0], ast.Pass)), (
                f"{show(path)}:{node.lineno} silent except"
            )
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec"), f"{show(path)}:{node.lineno}"


@pytest.mark.parametrize("path", FILES, ids=show)
def test_users_mistakes_are_raised_and_not_asserted(path):
    asserted = [node.lineno for node in ast.walk(tree(path)) if isinstance(node, ast.Assert)]
    assert not asserted, f"{show(path)}: {asserted}"


@pytest.mark.parametrize("path", FILES, ids=show)
def test_every_module_and_every_public_name_of_it_says_what_it_is(path):
    module = tree(path)
    if not module.body:
        return  # an empty __init__
    assert ast.get_docstring(module), f"{show(path)} has no docstring"
    public = [
        n
        for n in module.body
        if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_")
    ]
    silent = [n.name for n in public if not ast.get_docstring(n)]
    assert not silent, f"{show(path)}: {silent}"

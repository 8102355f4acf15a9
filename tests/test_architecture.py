"""The laws of the house, read from the source with ``ast``: who may import whom, how long things may be, what is never used."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "sae_experiments"
FILES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = [ROOT / "experiment.py", ROOT / "plot.py"]

#: Which parts of the package a part may import (design.md, section 5). A package such as ``saes`` is one part, but for ``metrics.info``.
TABLE: dict[str, set[str]] = {
    "": set(),
    "io": set(),
    "help": set(),
    "source": {"io"},
    "sampling": set(),
    "typed": {"io"},
    "memory": set(),
    "progress": set(),
    "conditions": set(),
    "warned": set(),
    "metrics.info": {"conditions"},
    "track": {"io"},
    "fetch": {"io"},
    "standin": {"io", "source"},
    "checkpoint": {"io"},
    "finite": {"io"},
    "training": {"io", "checkpoint", "finite", "memory", "stopping"},
    "layouts": {"io"},
    "activations": {"io", "source", "layouts"},
    "results": {"io", "warned"},
    "data": {"io", "source", "fetch", "standin"},
    "saes": {"io", "sampling", "training"},
    "lm": {"io", "source", "data", "training", "metrics.info", "conditions"},
    "fit": {"io", "saes", "training"},
    "saelens": {"io", "saes"},
    "interop": {"io", "saes", "saelens"},
    "metrics": {"io", "sampling", "saes", "activations", "layouts", "metrics.info", "conditions", "warned"},
    "local_lm": {"io", "source", "layouts"},
    "circuits": {"io", "saes", "activations", "layouts", "metrics", "metrics.info", "conditions"},
    "run_table": {"io", "results", "conditions"},
    "compare": {"io", "results", "run_table", "warned"},
    "plots": {"io", "results", "run_table", "compare"},
    "report": {"io", "results", "run_table", "compare"},
    "figures": {"io", "results", "run_table", "compare", "plots", "report"},
    "studies": {
        "io",
        "source",
        "data",
        "lm",
        "activations",
        "training",
        "saes",
        "fit",
        "interop",
        "metrics",
        "metrics.info",
        "conditions",
        "warned",
        "progress",
        "stopping",
        "checkpoint",
        "circuits",
        "local_lm",
        "saelens",
        "sampling",
    },
    "notebook": {"", "io", "config", "fit", "metrics", "saes", "studies", "training"},
    "run": {"io", "source", "memory", "studies", "results", "track", "training", "progress", "stopping", "metrics.info", "warned"},
    "plans": {"io", "typed", "results"},
    "config": {"io", "typed"},
    "stopping": set(),
    "launchers": {"io"},
    "search": {"io", "config", "results"},
    "sweeps": {"io", "typed", "source", "config", "launchers", "results", "search", "stopping"},
    "cli": {"io", "typed", "plans", "config", "figures", "help", "launchers", "results", "stopping", "sweeps", "run", "warned"},
}
#: Only these parts may import these packages.
ONLY = {
    "transformers": {"lm", "local_lm"},  # models trained here; models from a directory, kept apart so that neither decides about the other's caches
    "wandb": {"track"},
    "matplotlib": {"plots"},
    "hydra": {"config", "sweeps", "cli"},
    "omegaconf": {"config", "sweeps", "cli"},
    **{name: {"fetch"} for name in ("socket", "http", "urllib", "ssl", "ftplib", "requests", "httpx", "aiohttp", "urllib3")},
    "tqdm": {"progress", "fetch"},
    "joblib": {"launchers"},
    "optuna": {"search"},
    "pandas": {"run_table", "compare", "plots", "figures", "report"},
}
#: Parts that work where there is no torch, so that tables and figures come at once.
WITHOUT_TORCH = {
    "conditions",
    "warned",
    "results",
    "run_table",
    "compare",
    "plots",
    "report",
    "figures",
    "io",
    "source",
    "typed",
    "help",
    "track",
    "progress",
    "metrics.info",
}
BANNED = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "shelve", "marshal"}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def part_of(module: str) -> str:
    """``saes`` of ``sae_experiments.saes.topk``."""
    inside = module.split(".")[1:]
    return "metrics.info" if inside[:2] == ["metrics", "info"] else inside[0] if inside else ""


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(p) for p in FILES}


def imports(path: Path, *, top_level: bool = False) -> Iterator[str]:
    """Full names of what a file imports, also inside functions (unless ``top_level``)."""
    nodes = _at_import(tree(path).body) if top_level else ast.walk(tree(path))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else str(node.module) for name in inside)


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


# ------------------------------------------------------------------------------------------------ imports


@pytest.mark.parametrize("path", FILES, ids=show)
def test_a_module_imports_what_the_table_allows_and_nothing_else(path):
    part = part_of(module_of(path))
    assert part in TABLE, f"{show(path)}: give the new part {part!r} its line in TABLE (and in the design)"
    edges = {part_of(name) for name in imports(path) if name.split(".")[0] == "sae_experiments"} - {part}
    if module_of(path) == "sae_experiments.metrics.base":
        edges.discard("metrics.info")
    assert edges <= TABLE[part], f"{show(path)} must not import {', '.join(sorted(edges - TABLE[part]))}"


def test_the_table_has_no_cycle():
    done: set[str] = set()
    while left := set(TABLE) - done:
        free = {part for part in left if TABLE[part] <= done}
        assert free, f"a cycle among {sorted(left)}"
        done |= free


@pytest.mark.parametrize("path", FILES, ids=show)
def test_a_heavy_package_has_one_door(path):
    part = part_of(module_of(path))
    wrong = {name.split(".")[0] for name in imports(path) if part not in ONLY.get(name.split(".")[0], {part})}
    assert not wrong, f"{show(path)} must not import {', '.join(sorted(wrong))}"


@pytest.mark.parametrize("path", [p for p in FILES if part_of(module_of(p)) in WITHOUT_TORCH], ids=show)
def test_tables_figures_and_their_helpers_do_not_import_torch(path):
    assert not {name.split(".")[0] for name in imports(path)} & {"torch", "safetensors", "transformers"}


@pytest.mark.parametrize("script", SCRIPTS, ids=show)
def test_what_a_script_imports_at_its_start_needs_no_torch(script):
    """Not even through what it imports: help, mistakes and figures come at once."""
    by_module = {module_of(p): p for p in FILES}
    todo, seen, outside = [script, by_module["sae_experiments.cli.main"]] if script.name == "experiment.py" else [script], set(), set()
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


# ------------------------------------------------------------------------------------------------ sizes


@pytest.mark.parametrize("path", FILES, ids=show)
def test_no_file_is_longer_than_400_lines(path):
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize("path", FILES, ids=show)
def test_no_function_is_longer_than_70_lines(path):
    functions = [n for n in ast.walk(tree(path)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    long = {f.name: n for f in functions if (n := (f.end_lineno or 0) - f.lineno + 1) > 70}
    assert not long


@pytest.mark.parametrize("path", SCRIPTS, ids=show)
def test_the_scripts_stay_short(path):
    assert len(path.read_text().splitlines()) <= 60


def test_there_is_no_module_for_leftovers():
    assert not [show(p) for p in FILES if p.stem in ("utils", "util", "helpers", "misc", "common")]


# ------------------------------------------------------------------------------------------------ what is never used


@pytest.mark.parametrize("path", [*FILES, *SCRIPTS], ids=show)
def test_there_is_no_pickle_anywhere(path):
    assert not {name.split(".")[0] for name in imports(path)} & BANNED
    for call in calls(path):
        name = ast.unparse(call.func)
        assert name not in ("torch.load", "torch.save", "torch.jit.load", "joblib.load", "joblib.dump"), f"{show(path)}:{call.lineno} {name}"
        options = {k.arg: ast.unparse(k.value) for k in call.keywords}
        assert options.get("allow_pickle", "False") == "False", f"{show(path)}:{call.lineno}"
        if name == "np.load":
            assert options.get("allow_pickle") == "False", f"{show(path)}:{call.lineno} must say allow_pickle=False"


@pytest.mark.parametrize("path", [*FILES, *SCRIPTS], ids=show)
def test_no_error_is_swallowed_unseen_and_no_text_is_executed(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{show(path)}:{node.lineno} bare except"
            assert not (len(node.body) == 1 and isinstance(node.body[0], ast.Pass)), f"{show(path)}:{node.lineno} silent except"
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
    public = [n for n in module.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_")]
    silent = [n.name for n in public if not ast.get_docstring(n)]
    assert not silent, f"{show(path)}: {silent}"

"""Digests of code for cache keys, which change with every edit that could change results.

Comments, docstrings and layout do not count. The digest of a module covers everything it imports,
inside the package or not. The standard library does not count, and installed packages count by
their version. Imports under a name that is computed at run time are not seen.
"""

from __future__ import annotations

import ast
import functools
import pkgutil
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from sae_experiments.errors import UserError
from sae_experiments.files import digest

PACKAGE = __name__.partition(".")[0]
#: Installed packages whose version decides about numbers that the modules of this package compute.
COMPUTE = ("torch", "numpy", "transformers")
#: Packages that are never read as if they were a user's own, wherever they are installed.
INSTALLED = {
    *COMPUTE,
    "scipy",
    "sklearn",
    "pandas",
    "matplotlib",
    "safetensors",
    "filelock",
    "joblib",
}
#: Settings of a script like experiment.py, which are in a run's configuration if they matter.
SETTINGS = {"PLAN", "OVERRIDES", "SAES", "METRICS", "labels"}
INSTALLED |= {"tqdm", "wandb", "hydra", "omegaconf", "yaml", "optuna", "ray", "submitit", "pytest"}
_TARGET = re.compile(r"""_target_["']?\s*[:=]\s*["']?([A-Za-z_]\w*(?:\.\w+)+)""")
_FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


class Import(NamedTuple):
    """One import: of `names` from `module` (no names: of the module itself).

    `level` counts the leading dots of a relative import. `inside` is true for an import within a
    function, which runs late.
    """

    module: str
    names: tuple[str, ...]
    level: int
    inside: bool


class Parsed(NamedTuple):
    """Digest of the code of a file, its imports, and its text."""

    code: str
    imports: tuple[Import, ...]
    text: str = ""


# ------------------------------------------------------------------------------ one file

_known: dict[Path, tuple[Any, Parsed]] = {}


def _parsed(path: Path, loaded: Any = None) -> Parsed:
    """The content of a file, read once for every time that its module is loaded.

    A process runs the code that it loaded, so a later edit of the file must not change the cache
    keys under which this process stores results.

    Args:
        path: The source file, or a compiled extension, which counts by its bytes.
        loaded: The spec of the loaded module; None if it is not loaded.
    """
    if loaded is None:
        return _parse(path)
    before, known = _known.get(path, (None, None))
    if known is None or before is not loaded:  # a reload has a new spec, equal to the old one
        known = _parse(path)
        _known[path] = loaded, known
    return known


def _parse(path: Path) -> Parsed:
    if path.suffix != ".py":
        return Parsed(digest(path.read_bytes().hex()), ())
    try:
        text = _text(path)
        tree = ast.parse(text, str(path))
    except (SyntaxError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not Python that can be read: {error}") from error
    _drop_command_line(tree)
    imports = tuple(_imports(tree.body, inside=False))
    return Parsed(digest(_code(tree)), imports, text)


def _drop_command_line(tree: ast.Module) -> None:
    """Leave out of a script what only its command line reads: the main guard and its settings.

    A setting that anything else in the file reads stays. Other files are left as they are.
    """
    body = [node for node in tree.body if not _is_main_guard(node)]
    if len(body) == len(tree.body):
        return
    loads = [n for node in body for n in ast.walk(node) if isinstance(n, ast.Name)]
    read = {name.id for name in loads if isinstance(name.ctx, ast.Load)}
    tree.body = [node for node in body if not _assigned(node) & SETTINGS - read]


def _is_main_guard(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def _assigned(node: ast.stmt) -> set[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _code(tree: ast.Module) -> str:
    """The tree without docstrings, as text. Changes `tree`."""
    for node in ast.walk(tree):
        if isinstance(node, (*_FUNCTION, ast.ClassDef, ast.Module)) and _is_text(node.body[:1]):
            node.body = node.body[1:]
    return ast.dump(tree)


def _is_text(body: Sequence[ast.stmt]) -> bool:
    value = getattr(body[0], "value", None) if body and isinstance(body[0], ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def _imports(nodes: Iterable[ast.AST], *, inside: bool) -> Iterator[Import]:
    """All imports in `nodes` but those that only a type checker sees."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, (), 0, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = tuple(alias.name for alias in node.names)
            yield Import(node.module or "", names, node.level, inside)
        elif isinstance(node, ast.Call) and (name := _named(node)):
            yield Import(name, (), 0, inside)
        below = (
            node.orelse
            if isinstance(node, ast.If) and _is_checking(node.test)
            else ast.iter_child_nodes(node)
        )
        yield from _imports(below, inside=inside or isinstance(node, _FUNCTION))


def _is_checking(test: ast.expr) -> bool:
    return "TYPE_CHECKING" in (getattr(test, "id", ""), getattr(test, "attr", ""))


def _named(call: ast.Call) -> str:
    """The module of `import_module("a.b")`; "" for all other calls."""
    called = (
        call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    )
    first = call.args[0] if call.args else None
    if called in ("import_module", "__import__") and isinstance(first, ast.Constant):
        return first.value if isinstance(first.value, str) else ""
    return ""


# ------------------------------------------------------------------------------ where modules lie


class Place(NamedTuple):
    """The place of a module."""

    file: Path | None  # None: built in, or a folder without code
    folders: tuple[str, ...] | None  # of its submodules
    spec: Any  # of the loaded module


def _place(name: str) -> Place | None:
    """File of the module `name`, without importing anything; None if it cannot be found."""
    module = sys.modules.get(name)
    if module is not None:
        spec = getattr(module, "__spec__", None)
        return _placed(getattr(module, "__file__", None), getattr(module, "__path__", None), spec)
    parent = name.rpartition(".")[0]
    above = _place(parent) if parent else None
    if parent and (above is None or above.folders is None):
        return None
    for finder in sys.meta_path:
        find = getattr(finder, "find_spec", None)
        spec = find(name, list(above.folders or ()) if above else None) if find else None
        if spec is not None:
            file = spec.origin if spec.has_location else None
            return _placed(file, spec.submodule_search_locations, None)
    return None


def _placed(file: str | None, folders: Iterable[str] | None, spec: Any) -> Place:
    path = Path(file) if file and Path(file).is_file() else None
    return Place(path, None if folders is None else tuple(folders), spec)


@functools.cache
def _library() -> tuple[Path, ...]:
    return tuple(Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib"))


def _is_installed(name: str) -> bool:
    """True if a module is of the standard library, installed, or nowhere to be found."""
    top = name.partition(".")[0]
    if top in sys.stdlib_module_names or top in INSTALLED:
        return True
    place = _place(name)
    file = (place.file or next(map(Path, place.folders or ()), None)) if place else None
    if file is None:
        return True
    return bool(
        {"site-packages", "dist-packages"} & set(file.parts) or set(_library()) & set(file.parents)
    )


# ------------------------------------------------------------------------------ what is imported


@functools.cache
def _version_of(top: str) -> str:
    """The version of an installed package; "" if it is not installed."""
    try:
        return version(top)
    except PackageNotFoundError:
        return str(getattr(sys.modules.get(top), "__version__", ""))


class _Walk:
    """Everything that some modules import: `code` by module, `versions` by package."""

    def __init__(self, tops: Iterable[str]) -> None:
        self.tops = {PACKAGE, *tops}  # read even where they are installed
        self.code: dict[str, str] = {}
        self.versions: dict[str, str] = {}
        self._whole: set[str] = set()

    def add(self, name: str, *, whole: bool = True, by: str = PACKAGE) -> bool:
        """Add a module with what it imports.

        Args:
            name: Its full name.
            whole: Also add what its functions import; False for a package of which only a
                submodule is used.
            by: The module that imports it.

        Returns:
            Whether there is such a module.
        """
        if name == __name__ or name in self._whole or (name in self.code and not whole):
            return True  # a change of this module moves the keys by itself
        top = name.partition(".")[0]
        if top not in self.tops and _is_installed(name):
            self._version(top, by)
            return True
        place = _place(name)
        if place is None:
            return False
        parent = name.rpartition(".")[0]
        if parent:
            self.add(parent, whole=False, by=by)
        if whole:
            self._whole.add(name)
        self.code[name] = ""
        if place.file is not None:
            self._read(name, place.file, place, whole=whole)
        return True

    def _read(self, name: str, file: Path, place: Place, *, whole: bool) -> None:
        parsed = _parsed(file, place.spec)
        self.code[name] = parsed.code
        for each in parsed.imports:
            if whole or not each.inside:
                self._follow(each, name, is_package=place.folders is not None)

    def _version(self, top: str, by: str) -> None:
        """Count an installed package if it computes, or if a user's own module imports it."""
        own = by.partition(".")[0] == PACKAGE
        if top in sys.stdlib_module_names or (own and top not in COMPUTE):
            return
        self.versions[top] = _version_of(top)

    def _follow(self, each: Import, by: str, *, is_package: bool) -> None:
        base = each.module
        if each.level:
            above = by if is_package else by.rpartition(".")[0]
            for _ in range(each.level - 1):
                above = above.rpartition(".")[0]
            base = f"{above}.{base}".strip(".")
        if not base:
            return
        if not self.add(base, whole=False, by=by) or base not in self.code:
            return
        full_names = [f"{base}.{name}" for name in self._names(base, each)]
        modules = [name for name in full_names if _place(name) is not None]
        for name in modules:
            self.add(name, by=by)
        if not each.names or len(modules) < len(each.names):
            self.add(base, by=by)

    def _names(self, base: str, each: Import) -> Sequence[str]:
        """The names that may be submodules of `base`; with a star, all of them."""
        place = _place(base)
        if place is None or place.folders is None:
            return ()
        if "*" in each.names:
            return [module.name for module in pkgutil.iter_modules(place.folders)]
        return each.names


def closure(*modules: ModuleType | str) -> set[str]:
    """Full names of the modules that `modules` are and import, installed ones left out."""
    walk = _walked(modules)
    return set(walk.code)


def _walked(modules: Iterable[ModuleType | str]) -> _Walk:
    names = [m if isinstance(m, str) else m.__name__ for m in modules]
    walk = _Walk(name.partition(".")[0] for name in names)
    for name in names:
        place = _place(name)
        has_code = walk.add(name) and (walk.code[name] or (place and place.folders is not None))
        if not has_code:
            raise UserError(
                f"the code of {name} is in no file that can be found: save it as a module"
            )
    return walk


def source_digest(*modules: ModuleType | str, alone: Iterable[str] = ()) -> str:
    """Digest of the code of modules and of everything that they import.

    Args:
        modules: Modules, or their full names.
        alone: Names of modules that count without their imports: they hold the code which uses
            `modules`, beside code that does not matter.

    Returns:
        Sixteen hex digits.

    Raises:
        UserError: A module has no source file.
    """
    walk = _walked(modules)
    for name in alone:
        place = _place(name)
        walk.code[name] = _parsed(place.file, place.spec).code if place and place.file else ""
    return digest([walk.code, walk.versions])


def package_digest(root: Path) -> str:
    """Digest of the Python and C code below `root`, which finished results depend on."""
    loaded = {getattr(m, "__file__", None): m for m in list(sys.modules.values())}
    sources = {}
    for path in sorted(root.rglob("*.py")):
        spec = getattr(loaded.get(str(path)), "__spec__", None)
        sources[str(path.relative_to(root))] = _parsed(path, spec).code
    return digest(sources | {str(p.relative_to(root)): _text(p) for p in sorted(root.rglob("*.c"))})


# ------------------------------------------------------------------------------ code of values


def modules_behind(*values: Any) -> list[str]:
    """Sorted names of the modules that define the classes and functions in `values`.

    Looks into partial functions, collections and dataclasses. The standard library and the
    packages that this one needs are left out.
    """
    names = {name for value in values for name in _behind(value)}
    left_out = INSTALLED | sys.stdlib_module_names
    return sorted(
        name for name in names if name == "__main__" or name.partition(".")[0] not in left_out
    )


def _behind(value: Any) -> Iterator[str]:
    if isinstance(value, functools.partial):
        yield from _behind([value.func, *value.args, *value.keywords.values()])
    elif isinstance(value, Mapping):
        yield from _behind(list(value.values()))
    elif isinstance(value, (list, tuple, set, frozenset)) and type(value).__module__ == "builtins":
        for each in value:
            yield from _behind(each)
    elif isinstance(value, type):
        yield from (c.__module__ for c in value.__mro__)
    elif hasattr(value, "__qualname__"):  # a function or a method
        yield str(getattr(value, "__module__", None) or "builtins")
        yield from _behind(type(getattr(value, "__self__", None)))
    else:
        yield from _behind(type(value))
        if is_dataclass(value):
            yield from _behind([getattr(value, f.name, None) for f in fields(value)])


def is_outside(value: Any) -> bool:
    """True if a value is defined by code outside this package."""
    return any(name.partition(".")[0] != PACKAGE for name in modules_behind(value))


def outside_digest(*values: Any) -> str:
    """Digest of the code outside this package that defines `values`; "" if there is none."""
    names = [n for n in modules_behind(*values) if n.partition(".")[0] != PACKAGE]
    return source_digest(*names) if names else ""


def outside_texts(*values: Any) -> dict[str, str]:
    """Text of the files outside this package that define `values`, by module, as loaded."""
    names = [n for n in modules_behind(*values) if n.partition(".")[0] != PACKAGE]
    walk = _walked(names)
    texts: dict[str, str] = {}
    for name in walk.code:
        place = _place(name)
        if name.partition(".")[0] != PACKAGE and place and place.file and walk.code[name]:
            texts[name] = _parsed(place.file, place.spec).text
    return texts


def targets_digest(texts: Iterable[str]) -> str:
    """Digest of the code outside this package that each `_target_` in `texts` names."""
    names = set()
    for target in sorted({target for text in texts for target in _TARGET.findall(text)}):
        parts = target.split(".")
        if parts[0] == PACKAGE or parts[0] in INSTALLED or parts[0] in sys.stdlib_module_names:
            continue
        modules = (".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1))
        names |= set(next(([m] for m in modules if _place(m) is not None), []))
    return source_digest(*sorted(names)) if names else ""

"""What stands for the source code that computes something: modules and functions by name, with all that they import and name."""

import ast
import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rvlm.files import PACKAGE, config_hash, stamp

# Where results go and how they are asked for: that changes no result.
PLUMBING = (
    *("rvlm", "rvlm.files", "rvlm.code_hash", "rvlm.caches", "rvlm.provenance", "rvlm.processes"),
    *("rvlm.training.stages", "rvlm.policy.model_card"),
)


def hash_of_code(*roots: str, without: tuple[str, ...] = ()) -> str:
    """Twelve characters that stand for the source code that computes something; comments and docstrings don't count.

    Args:
        roots: Modules ("rvlm.evaluation.rollouts"), which stand for all that they import within the package, within functions
            too; or functions, classes and constants ("rvlm.evaluation.closed_loop:run_batch"), which stand for their own source,
            what they import themselves, and the functions, classes and constants of the same module that they name.
        without: Modules and packages that are imported somewhere on the way but not used by what is computed.

    Raises:
        ValueError: There is no such module, function, class or constant.
    """
    return config_hash({"code": _closure(roots, without)})


def code_of(*roots: str, without: tuple[str, ...] = ()) -> list[str]:
    """The modules, functions, classes and constants that `hash_of_code` hashes, by name."""
    return sorted(_closure(roots, without))


def _closure(roots: tuple[str, ...], without: tuple[str, ...]) -> dict[str, str]:
    """Name -> hash, of all code that the roots stand for."""
    found: dict[str, str] = {}
    todo = list(roots)
    while todo:
        name = todo.pop()
        if name in found or name in PLUMBING or any(f"{name}.".startswith(f"{other}.") for other in without):
            continue
        part, parsed = _part(name), _parsed(*_bytes(name))
        if part not in parsed:
            raise ValueError(
                f"expected a function, class or constant {name!r}; {name.split(':')[0]} has {', '.join(filter(None, parsed))}"
            )
        found[name], imported, named = parsed[part]
        todo += [module for told in imported for module in _modules(told)]
        todo += [f"{name.partition(':')[0]}:{other}" for other in named if part and other in parsed]
        todo += [] if part else _modules(name.rpartition(".")[0])  # a package's own code runs before its modules'
    return found


def refuse_changed_code(*roots: str, without: tuple[str, ...] = ()) -> None:
    """Refuse to compute with code that has changed on disk since this process loaded it: the result would bear the wrong name.

    Raises:
        ValueError: The code of `hash_of_code` differs from what was there when this process began.
    """
    for name in code_of(*roots, without=without):
        path, now = _bytes(name)
        part, then = _part(name), _at_start.get(path, now)
        if now != then and _parsed(path, now)[part][0] != _parsed(path, then).get(part, ("",))[0]:
            raise ValueError(
                f"expected the code that this process has loaded; {path} has changed since, so that what is computed "
                "now would be kept under the name of other code; start the kernel or process again"
            )


def _part(name: str) -> str:
    return name.partition(":")[2]


def _modules(name: str) -> list[str]:
    """The module of an imported name, as "rvlm.data.actions" of "rvlm.data.actions.ActionSpec"; none outside the package."""
    while name.split(".")[0] == PACKAGE.name:
        if _file(name) is not None:
            return [name]
        name = name.rpartition(".")[0]
    return []


def _file(module: str) -> Path | None:
    package, *names = module.split(".")
    path = PACKAGE.joinpath(*names)
    places = (path.with_suffix(".py"), path / "__init__.py") if package == PACKAGE.name else ()
    return next((place for place in places if place.is_file()), None)


def _bytes(name: str) -> tuple[Path, bytes]:
    path = _file(name.partition(":")[0])
    if path is None:
        raise ValueError(f"expected a module of {PACKAGE.name}, or module:function, got {name!r}")
    return path, _read(*stamp(path))


@functools.lru_cache(maxsize=1024)
def _read(path: str, *_: int) -> bytes:
    return Path(path).read_bytes()


@functools.lru_cache(maxsize=1024)
def _parsed(path: Path, source: bytes) -> dict[str, tuple[str, frozenset[str], frozenset[str]]]:
    """Of a module (under "") and of each of its functions, classes and constants: hash, names it imports, names it uses."""
    tree = ast.parse(source)
    package = ".".join((PACKAGE.name, *path.relative_to(PACKAGE).parts[:-1]))
    named = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, *named)) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    parts: dict[str, Any] = {"": tree, **{node.name: node for node in tree.body if isinstance(node, named)}}
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        parts |= {target.id: node for target in targets if isinstance(target, ast.Name)}
    return {name: (_hash_of(node), frozenset(_imported(node, package)), _named(node)) for name, node in parts.items()}


def _named(node: ast.AST) -> frozenset[str]:
    """Names that a piece of code reads when it runs, which those of types in its signatures are not."""
    told = [getattr(n, name, None) for n in ast.walk(node) for name in ("annotation", "returns")]
    types = {id(n) for kind in told if kind is not None for n in ast.walk(kind)}
    read = (n for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load) and id(n) not in types)
    return frozenset(n.id for n in read)


def _hash_of(node: ast.AST) -> str:
    return hashlib.sha256(ast.dump(node).encode()).hexdigest()[:12]


def _imported(node: ast.AST, package: str) -> Iterator[str]:
    """Full names that a piece of code imports when it runs; those for type checkers alone are none."""
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        base = ".".join([*package.split(".")[: len(package.split(".")) + 1 - node.level], *filter(None, [node.module])])
        yield from (f"{base if node.level else node.module}.{alias.name}" for alias in node.names)
    for child in ast.iter_child_nodes(node):
        yield from _imported(child, package)


_at_start = {path: path.read_bytes() for path in PACKAGE.rglob("*.py")}

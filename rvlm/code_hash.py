"""Hash of the source code that computes a result: modules and functions, with all that they import and use."""

import ast
import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rvlm.files import PACKAGE, config_hash, file_identity

# Modules that handle files and requests but change no result.
PLUMBING = (
    *("rvlm", "rvlm.files", "rvlm.code_hash", "rvlm.caches", "rvlm.provenance", "rvlm.processes"),
    *("rvlm.training.stages", "rvlm.policy.model_card"),
)


def hash_of_code(*roots: str, without: tuple[str, ...] = ()) -> str:
    """Hash of the source code that computes a result, 12 characters; comments and docstrings are ignored.

    Args:
        roots: Modules ("rvlm.evaluation.rollouts"), with all that they import within the package, also inside functions; or
            functions, classes and constants ("rvlm.evaluation.closed_loop:run_batch"), with their own source, what they import
            themselves, and the functions, classes and constants of the same module that they use.
        without: Modules and packages that are imported but not used by the computation.

    Raises:
        ValueError: A module, function, class or constant does not exist.
    """
    return config_hash({"code": _closure(roots, without)})


def code_of(*roots: str, without: tuple[str, ...] = ()) -> list[str]:
    """The modules, functions, classes and constants that `hash_of_code` hashes, by name."""
    return sorted(_closure(roots, without))


def _closure(roots: tuple[str, ...], without: tuple[str, ...]) -> dict[str, str]:
    """Name -> hash of all code that the roots depend on."""
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
        todo += [module for imported_name in imported for module in _modules(imported_name)]
        todo += [f"{name.partition(':')[0]}:{other}" for other in named if part and other in parsed]
        todo += [] if part else _modules(name.rpartition(".")[0])  # a package's __init__ runs before its modules
    return found


def require_unchanged_code(*roots: str, without: tuple[str, ...] = ()) -> None:
    """Raise if code has changed on disk since this process loaded it, as its result would be cached under the wrong hash.

    Raises:
        ValueError: The code of `hash_of_code` differs from that at the start of this process.
    """
    for name in code_of(*roots, without=without):
        path, now = _bytes(name)
        part, then = _part(name), _at_start.get(path, now)
        if now != then and _parsed(path, now)[part][0] != _parsed(path, then).get(part, ("",))[0]:
            raise ValueError(
                f"expected the code that this process has loaded; {path} has changed since, so that the result "
                "would be cached under the hash of other code; restart the kernel or process"
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
    candidates = (path.with_suffix(".py"), path / "__init__.py") if package == PACKAGE.name else ()
    return next((file for file in candidates if file.is_file()), None)


def _bytes(name: str) -> tuple[Path, bytes]:
    path = _file(name.partition(":")[0])
    if path is None:
        raise ValueError(f"expected a module of {PACKAGE.name}, or module:function, got {name!r}")
    return path, _read(*file_identity(path))


@functools.lru_cache(maxsize=1024)
def _read(path: str, *_: int) -> bytes:
    return Path(path).read_bytes()


@functools.lru_cache(maxsize=1024)
def _parsed(path: Path, source: bytes) -> dict[str, tuple[str, frozenset[str], frozenset[str]]]:
    """For a module (key "") and each of its functions, classes and constants: hash, names it imports, names it uses."""
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
    """Names that a piece of code reads when it runs, without those of type annotations."""
    annotations = [getattr(n, name, None) for n in ast.walk(node) for name in ("annotation", "returns")]
    types = {id(n) for annotation in annotations if annotation is not None for n in ast.walk(annotation)}
    read = (n for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load) and id(n) not in types)
    return frozenset(n.id for n in read)


def _hash_of(node: ast.AST) -> str:
    return hashlib.sha256(ast.dump(node).encode()).hexdigest()[:12]


def _imported(node: ast.AST, package: str) -> Iterator[str]:
    """Full names that a piece of code imports when it runs, without those for type checkers alone."""
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

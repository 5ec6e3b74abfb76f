"""Hash of the source code that computes a result: modules and functions, with all that they import and use."""

import ast
import functools
import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path

from rvlm.files import PACKAGE, config_hash, file_identity

# Modules that handle files and requests but change no result.
PLUMBING = (
    *("rvlm", "rvlm.files", "rvlm.code_hash", "rvlm.caches", "rvlm.provenance", "rvlm.processes"),
    *("rvlm.training.stages", "rvlm.policy.model_card", "rvlm.importing"),
    *("rvlm.envs.suite_checks", "rvlm.envs.tabletop.suite"),  # what a suite is made of is hashed by its values
)
_PARSE_LOCK = threading.Lock()  # CPython 3.11 raises SystemError where two threads build syntax trees (python/cpython#106905)


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
        part, source = _part(name), _bytes(name)
        parts = _parts(*source)
        if part not in parts:
            raise ValueError(
                f"expected a function, class or constant {name!r}; {name.split(':')[0]} has {', '.join(filter(None, parts))}"
            )
        found[name], imported, named = _hash_and_names(*source, part)
        todo += [module for imported_name in imported for module in _modules(imported_name)]
        todo += [f"{name.partition(':')[0]}:{other}" for other in named if part and other in parts]
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
        if now == then:
            continue
        if part not in _parts(path, then) or _hash_and_names(path, now, part)[0] != _hash_and_names(path, then, part)[0]:
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
def _parts(path: Path, source: bytes) -> dict[str, ast.AST]:
    """Syntax trees of a module (key "") and of each of its functions, classes and constants, without docstrings."""
    with _PARSE_LOCK:
        tree = ast.parse(source, path)
    named = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for node in _with_statements(tree):
        if isinstance(node, (ast.Module, *named)) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    parts: dict[str, ast.AST] = {"": tree, **{node.name: node for node in tree.body if isinstance(node, named)}}
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        parts |= {target.id: node for target in targets if isinstance(target, ast.Name)}
    return parts


@functools.lru_cache(maxsize=4096)
def _hash_and_names(path: Path, source: bytes, part: str) -> tuple[str, frozenset[str], frozenset[str]]:
    """Of a part of a module: its hash, the names it imports, the names it uses (of a whole module none is asked for)."""
    node, package = _parts(path, source)[part], ".".join((PACKAGE.name, *path.relative_to(PACKAGE).parts[:-1]))
    imported = (name for statement in _with_statements(node, for_type_checkers=False) for name in _imported(statement, package))
    used = _named(node) if part else ()
    return hashlib.sha256(ast.dump(node).encode()).hexdigest()[:12], frozenset(imported), frozenset(used)


def _with_statements(node: ast.AST, for_type_checkers: bool = True) -> Iterator[ast.AST]:
    """A piece of code and all statements within it; expressions, the most of a tree, are not entered."""
    if not for_type_checkers and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return
    yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.stmt, ast.excepthandler, ast.match_case)):
            yield from _with_statements(child, for_type_checkers)


def _named(node: ast.AST) -> Iterator[str]:
    """Names that a piece of code reads when it runs, without those of type annotations."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
        yield node.id
    for field, value in ast.iter_fields(node):
        if field not in ("annotation", "returns"):
            for child in value if isinstance(value, list) else (value,):
                if isinstance(child, ast.AST):
                    yield from _named(child)


def _imported(node: ast.AST, package: str) -> list[str]:
    """Full names that an import statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = ".".join([*package.split(".")[: len(package.split(".")) + 1 - node.level], *filter(None, [node.module])])
        return [f"{base if node.level else node.module}.{alias.name}" for alias in node.names]
    return []


_at_start = {path: path.read_bytes() for path in PACKAGE.rglob("*.py")}

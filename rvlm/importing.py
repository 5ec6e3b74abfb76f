"""Functions of others by name, "package.module:function", and the source that defines them."""

import ast
import functools
import importlib
from pathlib import Path
from typing import Any

from rvlm.files import PACKAGE, config_hash, file_hash


def import_by_name(name: str) -> Any:
    """What "package.module:function" names.

    Raises:
        ValueError: No such module, or nothing of this name in it.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise ValueError(f"expected a name such as 'package.module:function', got {name!r}")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name != module_name and not module_name.startswith(f"{error.name}."):
            raise
        raise ValueError(f"{name}: no module {error.name!r}; install it, or run where it is (or set PYTHONPATH)") from error
    if not hasattr(module, attribute):
        own = (key for key, value in vars(module).items() if getattr(value, "__module__", "") == module_name)
        raise ValueError(f"{name}: module {module_name} has no {attribute!r}; it has {', '.join(own)}")
    return getattr(module, attribute)


def without_arguments(function: Any) -> Any:
    """The function or class of a `functools.partial`, or itself."""
    return function.func if isinstance(function, functools.partial) else function


def name_of(function: Any) -> str:
    """The name by which `import_by_name` finds a function, or that of a `functools.partial`."""
    function = without_arguments(function)
    return f"{function.__module__}:{function.__qualname__}"


def require_importable(function: Any, what: str) -> None:
    """Refuse a function that worker processes could not import.

    Raises:
        ValueError: A lambda, a function within a function, or one of a notebook.
    """
    function = without_arguments(function)
    name, module = getattr(function, "__qualname__", ""), getattr(function, "__module__", None)
    if not name.isidentifier() or module in (None, "__main__"):
        raise ValueError(
            f"{what}: expected a function or class at the top of a module, or a functools.partial of one, got {function!r}; "
            "write it to a file (my_env.py), and import it from there, as worker processes do"
        )


def describe(function: Any) -> dict[str, str]:
    """A function or `functools.partial` as JSON values: its name, its arguments, and `source_hash`.

    Raises:
        ValueError: An argument whose text holds an address, which differs from process to process.
    """
    partial = function if isinstance(function, functools.partial) else functools.partial(function)
    arguments = repr((partial.args, sorted(partial.keywords.items())))
    if " at 0x" in arguments:
        raise ValueError(
            f"{name_of(function)}: expected arguments that are values, as numbers, texts, dataclasses; got {arguments}"
        )
    return {"name": name_of(function), "arguments": arguments, "source": source_hash(function)}


def code_roots(function: Any) -> tuple[str, ...]:
    """The module that defines a function, for `rvlm.caches.Code`; none if it isn't of this package."""
    module = name_of(function).partition(":")[0]
    return (module,) if module.split(".")[0] == PACKAGE.name else ()


def source_hash(function: Any) -> str:
    """Hash of a function's module and its package, or the modules beside it that it imports; "" in this one (`code_roots`)."""
    module = importlib.import_module(name_of(function).partition(":")[0])
    top = importlib.import_module(module.__name__.partition(".")[0])
    if top.__name__ == PACKAGE.name:
        return ""
    folder = Path(top.__file__).parent if top.__file__ and top.__file__.endswith("__init__.py") else None
    files = sorted(folder.rglob("*.py")) if folder else sorted(_with_neighbours(Path(str(module.__file__))))
    return config_hash({str(path.relative_to(folder or path.parent)): file_hash(path) for path in files})


def _with_neighbours(path: Path) -> set[Path]:
    """A module's file, and those in its folder that it imports, directly or not."""
    found, left = set(), [path]
    while left:
        if (file := left.pop()) not in found:
            found.add(file)
            imported = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]
            names = [n.module or "" if isinstance(n, ast.ImportFrom) else alias.name for n in imported for alias in n.names]
            left += [beside for name in names if (beside := path.with_name(f"{name.split('.')[0]}.py")).is_file()]
    return found

"""Structure rules, in milliseconds: what may stand where, read from the files and their syntax trees."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
REQUIRED = {"notebooks", "rvlm", "data_cards", "tests", "environment.yml", "README.md"}
ALLOWED = REQUIRED | {
    *(".ci", ".gitattributes", ".gitignore", ".pre-commit-config.yaml", "Makefile", "pyproject.toml", "requirements.lock"),
    *("CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "LOG.md", "benchmarks", "docs", "results"),
}
MAY_PRINT = ("main", "run", "ship", "lab", "cache", "reproduce", "diagnose", "evaluate")
COMMAND_LINE = {f"rvlm/cli/{name}.py" for name in MAY_PRINT}
MACHINE_PATH = re.compile(r"(?<![\w.~}])/(?:work|home|root|Users|private/var)/[\w.-]+")


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.split("\0") if name and (ROOT / name).is_file()]


TRACKED = tracked()
MODULES = [name for name in TRACKED if name.startswith("rvlm/") and name.endswith(".py")]


def tree(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text(encoding="utf-8"), name)


def calls(module: ast.Module) -> dict[str, int]:
    """Each called name, dotted as written, and a line where it is called."""
    return {ast.unparse(node.func): node.lineno for node in ast.walk(module) if isinstance(node, ast.Call)}


def imports(module: ast.Module) -> set[str]:
    """Every absolute module that is imported, at any depth; of the package what is imported from a module too."""
    names = {alias.name for node in ast.walk(module) if isinstance(node, ast.Import) for alias in node.names}
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            is_own = node.module.split(".")[0] == "rvlm"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} if is_own else {node.module}
    return names


def idea(dotted: str) -> str:
    """The part of the package that a module belongs to: rvlm.envs.tabletop.arms -> envs."""
    return [*dotted.removesuffix(".py").replace("/", ".").split("."), "rvlm"][1]


def test_top_level_is_fixed():
    top = {name.split("/")[0] for name in TRACKED}
    assert not REQUIRED - top, f"missing: {sorted(REQUIRED - top)}"
    assert not top - ALLOWED, f"new at the top: {sorted(top - ALLOWED)}; put it under one of {sorted(ALLOWED)}"


def test_no_file_names_a_machine():
    found = {}
    for name in TRACKED:
        data = (ROOT / name).read_bytes()
        if b"\0" not in data and (match := MACHINE_PATH.search(data.decode("utf-8", "replace"))):
            found[name] = match.group()
    assert not found, f"absolute paths of one machine: {found}"


def test_machine_path_is_recognised():
    assert MACHINE_PATH.search("read /" + "home/ada/data") and MACHINE_PATH.search('"/' + 'work/main"')
    assert not MACHINE_PATH.search("notebooks/work/x and https://host/home/page")


@pytest.mark.parametrize("name", [name for name in TRACKED if name.endswith(".py")])
def test_module_is_named_for_its_idea(name):
    assert Path(name).stem not in {"utils", "util", "helpers", "common", "misc"}, "name the module for its one idea"


@pytest.mark.parametrize("name", MODULES)
def test_module_says_what_it_is(name):
    assert ast.get_docstring(tree(name)), "begin with a docstring in the field's words"


@pytest.mark.parametrize("name", sorted(set(MODULES) - COMMAND_LINE))
def test_module_does_not_print(name):
    line = calls(tree(name)).get("print")
    assert line is None, f"{name}:{line} prints; return the text, or log it"


@pytest.mark.parametrize("name", MODULES)
def test_nothing_downloaded_is_executed(name):
    module = tree(name)
    unsafe = imports(module) & {"pickle", "dill", "cloudpickle", "joblib"} | calls(module).keys() & {"torch.load", "eval", "exec"}
    unsafe |= {
        f"{keyword.arg}=True"
        for keyword in ast.walk(module)
        if isinstance(keyword, ast.keyword)
        and keyword.arg in {"trust_remote_code", "allow_pickle"}
        and ast.unparse(keyword.value) == "True"
    }
    assert not unsafe, f"{name} uses {sorted(unsafe)}; weights travel as safetensors, data as parquet and json"


def public_names(module: ast.Module) -> set[str]:
    """Functions, classes and constants that a module defines at its top; what it imports is another's."""
    names = {node.name for node in module.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assigned = [node for node in module.body if isinstance(node, ast.Assign | ast.AnnAssign)]
    targets = [target for node in assigned for target in (node.targets if isinstance(node, ast.Assign) else [node.target])]
    names |= {
        node.id
        for target in targets
        for node in ast.walk(target)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    return {name for name in names if not name.startswith("_")}


def test_one_public_name_has_one_meaning():
    homes: dict[str, list[str]] = {}
    for module in MODULES:
        for name in public_names(tree(module)):
            homes.setdefault(name, []).append(module)
    twice = {name: sorted(modules) for name, modules in sorted(homes.items()) if len(modules) > 1}
    assert not twice, f"defined in several modules: {twice}; rename all but one by what they are, or import the one that is meant"


def arrows(part) -> dict[str, set[str]]:
    """What each part of the package imports of others, functions' imports included; `part` names a module's part."""
    graph: dict[str, set[str]] = {}
    for name in MODULES:
        own = part(name.removesuffix("/__init__.py").removesuffix(".py").replace("/", "."))
        used = {part(module_of(dotted)) for dotted in imports(tree(name)) if dotted.startswith("rvlm.")}
        graph.setdefault(own, set()).update(used - {own, part("rvlm")})
    return graph


def module_of(dotted: str) -> str:
    """The module of what is imported, as "rvlm.envs.gl" of "rvlm.envs.gl.choose_gl"."""
    while not (ROOT / f"{dotted.replace('.', '/')}.py").is_file() and not (ROOT / dotted.replace(".", "/")).is_dir():
        dotted = dotted.rpartition(".")[0]
    return dotted


@pytest.mark.parametrize("part", [idea, lambda dotted: dotted], ids=["rooms", "modules"])
def test_arrows_run_one_way(part):
    try:
        graphlib.TopologicalSorter(arrows(part)).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"they import each other: {' -> '.join(error.args[1])}; move what both need up the way of the data")


# In this order: a folder imports only from those before it.
ROOMS = [
    *(
        "processes",
        "openmp",
        "files",
        "importing",
        "code_hash",
        "provenance",
        "caches",
        "statistics",
        "data",
        "envs",
        "vlm",
        "policy",
        "training",
    ),
    *("evaluation", "diagnosis", "report", "experiments", "cli"),
]


def test_rooms_are_those_of_the_layout_and_import_from_above():
    graph = arrows(idea)
    assert set(graph) - {"rvlm"} == set(ROOMS), "every module stands in a room, and every room in the list"
    back = {(room, other) for room in ROOMS for other in graph[room] if ROOMS.index(other) > ROOMS.index(room)}
    assert not back, f"(from, to): {sorted(back)}"


MAY_IMPORT_THE_TABLETOP = ("rvlm/envs/tabletop/", "rvlm/experiments/recipes.py", "rvlm/cli/ship.py", "rvlm/__init__.py")


def test_the_tabletop_is_one_environment_among_others():
    """Whoever else needs an environment takes a suite; the front door and notebooks name it."""
    others = [name for name in MODULES if not name.startswith(MAY_IMPORT_THE_TABLETOP)]
    wrong = {name: [used for used in imports(tree(name)) if used.startswith("rvlm.envs.tabletop")] for name in others}
    assert not any(wrong.values()), f"take a suite instead: { {name: used for name, used in wrong.items() if used} }"


def test_tests_stand_in_the_rooms_of_what_they_test():
    rooms = {folder for folder in ROOMS if (ROOT / "rvlm" / folder).is_dir()} | {"notebooks"}
    tests = [Path(name) for name in TRACKED if name.startswith("tests/")]
    strange = {path.parent.as_posix() for path in tests if path.parts[1] not in rooms and len(path.parts) > 2}
    assert not strange, f"expected a folder per room, of {sorted(rooms)}, got {sorted(strange)}"
    homes: dict[str, set[str]] = {}
    for module in map(Path, MODULES):
        for home in (module, module.parent):  # of rvlm/envs/tabletop/env.py: env and tabletop, both in the folder envs
            homes.setdefault(home.stem, set()).add(idea(str(module)) if len(home.parts) > 2 else "tests")
    wrong = {
        str(path): homes[tested]
        for path in tests
        if (tested := path.stem.removeprefix("test_")) in homes and path.stem != tested and path.parent.name not in homes[tested]
    }
    assert not wrong, f"tests of a module that stand elsewhere than in its room: {wrong}"


def children(package: Path) -> set[str]:
    """Modules and packages that stand in a package's folder, by name."""
    names = [Path(name).relative_to(package).parts for name in MODULES if Path(name).is_relative_to(package)]
    return {parts[0].removesuffix(".py") for parts in names} - {"__init__", "__main__"}


@pytest.mark.parametrize("name", [name for name in MODULES if name.endswith("/__init__.py") and name != "rvlm/__init__.py"])
def test_a_folder_lists_its_modules(name):
    _, _, listed = (ast.get_docstring(tree(name)) or "").partition("\nModules:\n")
    named, there = re.findall(r"^    (\w+): \S", listed, re.MULTILINE), children(Path(name).parent)
    assert len(named) == len(set(named)), f"{name}: listed twice"
    assert set(named) == there, f"{name}, under Modules: not listed {there - set(named)}, not there {set(named) - there}"


def test_the_layout_lists_every_folder():
    text = (ROOT / "docs/layout.md").read_text()
    tree_of_package = text[text.index("\nrvlm/") : text.index("\ndata_cards/")]
    named = set(re.findall(r"^  (\w+)/ ", tree_of_package, re.MULTILINE))
    modules = re.search(r"^  \(modules\) +([\w, ]+):", tree_of_package, re.MULTILINE)
    named |= set(modules.group(1).split(", ")) if modules else set()
    assert named == children(Path("rvlm")), "the tree of docs/layout.md has a line per folder, and the modules beside them"


def test_a_clone_is_small_and_holds_nothing_that_is_built():
    sizes = {name: (ROOT / name).stat().st_size for name in TRACKED}
    largest = sorted(sizes, key=sizes.__getitem__, reverse=True)[:8]
    assert sum(sizes.values()) < 18e6, f"{sum(sizes.values()) / 1e6:.1f} MB are tracked; the largest: {largest}"
    built = [name for name in TRACKED if name.startswith("results/") and name.endswith((".pdf", ".html"))]
    assert not built, f"built, not committed: {built}"


def anchor(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w -]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("name", [name for name in TRACKED if name.endswith(".md") and not name.startswith("data_cards/")])
def test_what_is_linked_exists(name):
    text = (ROOT / name).read_text()
    links = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    broken = []
    for link in links:
        path, _, fragment = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = (ROOT / name).parent / path if path else ROOT / name
        headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE) if target.suffix == ".md" and fragment else []
        if not target.exists() or (fragment and anchor(fragment) not in map(anchor, headings)):
            broken.append(link)
    assert not broken, f"{name} links to what does not exist: {broken}"


# What a function may import: libraries that take long or are optional, and own modules that need such.
SPARED = {
    *("IPython", "PIL", "av", "bitsandbytes", "gymnasium", "huggingface_hub", "ipywidgets", "matplotlib", "pandas", "papermill"),
    *("scipy", "statsmodels", "torch", "tqdm"),
    "rvlm.vlm.adapters",  # peft
    "rvlm.envs.gl",  # OpenGL
    "rvlm.training.detection",  # of one kind of stage
    "rvlm.policy.policy",  # transformers: an expert is evaluated without
    "rvlm.report.plots",  # matplotlib
}


def imports_in_functions(name: str) -> list[str]:
    functions = (node for node in ast.walk(tree(name)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return [used for node in functions for used in imports(ast.Module(node.body, [])) if used != "rvlm.vlm"]


def test_functions_import_only_what_is_worth_sparing():
    found = {name: imports_in_functions(name) for name in MODULES if not name.startswith("rvlm/cli/")}
    allowed = tuple(f"{spared}." for spared in SPARED)
    wrong = {name: sorted(set(used) - {u for u in used if f"{u}.".startswith(allowed)}) for name, used in found.items()}
    assert not any(wrong.values()), f"import at the top of the module: { {name: used for name, used in wrong.items() if used} }"
    assert sum(map(len, found.values())) <= 45, "more imports in functions than before: are they all needed?"


def test_import_is_light():
    heavy = "{'torch', 'transformers', 'numpy', 'mujoco', 'pandas', 'matplotlib'}"
    code = f"import sys, rvlm; sys.exit(' '.join(sorted({heavy} & sys.modules.keys())) or 0)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert loaded.returncode == 0, f"import rvlm also loads {loaded.stderr.strip()}"


def test_the_front_door_offers_what_it_lists_and_names_it():
    import rvlm

    for name, where in rvlm._OFFERED.items():
        offered = getattr(rvlm, name)
        home = sys.modules[f"rvlm.{where}"]
        assert offered is getattr(home, name) and offered.__doc__, name
        assert getattr(offered, "__module__", offered.__name__).startswith("rvlm."), name
    assert set(rvlm._OFFERED) <= set(dir(rvlm))
    with pytest.raises(AttributeError, match=r"module 'rvlm' has no 'trainn'; it offers .*train"):
        _ = rvlm.trainn


def test_type_checkers_see_the_front_door():
    import rvlm

    (guarded,) = [node for node in tree("rvlm/__init__.py").body if isinstance(node, ast.If)]
    seen = {alias.asname: node.module for node in guarded.body for alias in node.names}
    assert seen == {name: f"rvlm.{where}" for name, where in rvlm._OFFERED.items()}


def test_headless_opengl_names_packages_when_nothing_draws(monkeypatch):
    from rvlm.envs import gl

    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(gl, "_context_error", lambda backend: f"no driver for {backend}")
    with pytest.raises(
        gl.NoHeadlessOpenGL, match=r"egl: no driver for egl[\s\S]*osmesa[\s\S]*apt-get install -y libegl1 libgl1-mesa-dri"
    ):
        gl.choose_gl()


def test_headless_opengl_falls_back_to_osmesa(monkeypatch):
    from rvlm.envs import gl

    monkeypatch.setenv("MUJOCO_GL", "")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(gl, "_context_error", lambda backend: "no driver" if backend == "egl" else "")
    assert gl.choose_gl() == gl.os.environ["MUJOCO_GL"] == "osmesa"


def test_headless_opengl_respects_the_users_choice(monkeypatch):
    from rvlm.envs import gl

    monkeypatch.setenv("MUJOCO_GL", "glfw")
    assert gl.choose_gl() == "glfw"

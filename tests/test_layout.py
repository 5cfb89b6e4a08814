"""The house rules, read from the source: who may import whom, no cycles, no hidden imports, budgets."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "src" / "stretto"
FILES = sorted(path for path in ROOT.rglob("*.py"))
GROUND = {"types", "errors", "config", "openai", "machine"}
CLIENT = "engine.client"
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "types": {"errors"},
    "machine": {"errors", "types"},
    "config": {"errors", "types"},
    "openai": {"errors", "types"},
    "telemetry": GROUND,
    "energy": GROUND,
    "privacy": GROUND,
    "kernels": GROUND,
    "bench": GROUND | {"engine.task", "engine.replay"},
    "models": GROUND | {"kernels"},
    "engine": GROUND | {"models", "kernels", "telemetry", "energy"},
    "optimise": GROUND | {"models", "kernels", CLIENT},
    "api": GROUND | {"telemetry", "privacy", "gateway", CLIENT},
    "gateway": GROUND | {"telemetry", "privacy", "energy"},
    "cluster": GROUND | {"telemetry", "gateway.choose"},
}
WIRING = {"cli", "llm", "doctor", "chat", "terminal", "__main__", "__init__"}
ONLY_WIRING_IMPORTS = {
    "cli": {"__main__"},
    "llm": {"cli", "__init__"},
    "doctor": {"cli"},
    "chat": {"cli"},
    "terminal": {"cli", "chat"},
}
TORCH = {"kernels", "models", "engine", "optimise"}
TORCH_FREE = {
    "engine.client",
    "engine.messages",
    "engine.task",
    "engine.replay",
    "engine.schedule",
    "engine.loop",
    "engine.blocks",
    "models.source",
}
LONGEST_FUNCTION, USUAL_FUNCTION, USUAL_SHARE = 60, 40, 0.95
LONGEST_FILE, MOST_PARAMETERS = 500, 6


def name_of(path: Path) -> str:
    """`engine.client` for src/stretto/engine/client.py; a package's `__init__` is the package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1]) if parts[-1] == "__init__" and len(parts) > 1 else ".".join(parts)


def package_of(name: str) -> str:
    return name.split(".")[0]


TREES = {name_of(path): ast.parse(path.read_text()) for path in FILES}


def imported(tree: ast.AST) -> set[str]:
    """The modules of Stretto that a module imports when it is loaded, as names below the package."""
    found: set[str] = set()
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            if name.startswith("stretto."):
                name = name.removeprefix("stretto.")
                if name in TREES:
                    found.add(name)
    return found


def typing_only(tree: ast.AST) -> set[str]:
    """Modules imported under `if TYPE_CHECKING:` alone: they draw no edge at run time."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            found |= imported(node)
    return found


EDGES = {name: imported(tree) - {name} for name, tree in TREES.items()}


@pytest.mark.parametrize("name", sorted(EDGES))
def test_imports_follow_the_table(name: str):
    package = package_of(name)
    if package in WIRING:
        return
    assert package in MAY_IMPORT, f"{package} has no row in the table of who may import whom"
    for other in EDGES[name]:
        target = package_of(other)
        assert target not in ONLY_WIRING_IMPORTS, f"{name} imports {other}, which only wires things together"
        allowed = target == package or target in MAY_IMPORT[package] or other in MAY_IMPORT[package]
        parents = {
            allowed_name for allowed_name in MAY_IMPORT[package] if allowed_name.startswith(f"{other}.")
        }
        assert allowed or parents, f"{name} may not import {other}"


@pytest.mark.parametrize("name", sorted(ONLY_WIRING_IMPORTS))
def test_nothing_imports_the_wiring(name: str):
    importers = {other for other, edges in EDGES.items() if name in edges}
    assert importers <= ONLY_WIRING_IMPORTS[name]


def test_no_import_cycles():
    graph = {name: edges - typing_only(TREES[name]) for name, edges in EDGES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("name", sorted(TREES))
def test_no_import_inside_a_function(name: str):
    for function in functions(TREES[name]):
        for node in ast.walk(function):
            assert not isinstance(node, ast.Import | ast.ImportFrom), f"{name}.{function.name} imports"


def test_torch_stays_where_it_is_allowed():
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            heads: set[str] = set()
            if isinstance(node, ast.Import):
                heads = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                heads = {(node.module or "").split(".")[0]}
            assert "transformers" not in heads or package_of(name) == "optimise", (
                f"{name} imports transformers"
            )
            if "torch" in heads:
                assert package_of(name) in TORCH and name not in TORCH_FREE, f"{name} imports torch"


def test_the_front_never_loads_torch_through_others():
    """What the front process imports, followed through every module."""
    seen: set[str] = set()
    todo = [
        name for name in TREES if package_of(name) in {"api", "gateway", "cli", "llm", "telemetry", "bench"}
    ]
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        todo += EDGES[name] - typing_only(TREES[name])
    loads = {
        name
        for name in seen
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "torch" for alias in node.names)
    }
    assert not loads


def functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (function.end_lineno or 0) - function.lineno + 1


def test_functions_are_short():
    lengths = {
        f"{name}.{node.name}": length(node) for name, tree in TREES.items() for node in functions(tree)
    }
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST_FUNCTION} == {}
    usual = sum(1 for lines in lengths.values() if lines <= USUAL_FUNCTION)
    assert usual >= USUAL_SHARE * len(lengths)


def test_functions_take_few_parameters():
    wide: dict[str, int] = {}
    for name, tree in TREES.items():
        if name.startswith(("kernels.", "cli")):  # kernel launchers; a command's parameters are its flags
            continue
        for node in functions(tree):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = sum(1 for argument in arguments if argument.arg not in ("self", "cls"))
            if count > MOST_PARAMETERS:
                wide[f"{name}.{node.name}"] = count
    assert wide == {}


def test_files_are_short():
    long = {name_of(path): len(path.read_text().splitlines()) for path in FILES}
    assert {name: lines for name, lines in long.items() if lines > LONGEST_FILE} == {}


@pytest.mark.parametrize("name", sorted(TREES))
def test_modules_say_what_they_own(name: str):
    docstring = ast.get_docstring(TREES[name])
    if not TREES[name].body:
        return
    assert docstring, f"{name} has no docstring"
    assert len(docstring.splitlines()) <= 8

"""The rules of the source tree: imports, unique names, writers of engine fields and size budgets.

Each test collects all offenders and asserts that there are none, so one report names them all.
"""

from __future__ import annotations

import ast
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "src" / "stretto"
FILES = sorted(ROOT.rglob("*.py"))
GROUND = {"disk", "types", "errors", "settings", "config", "hardware", "deadlines", "statistics", "queueing"}
SCHEDULING = {"engine.scheduler", "engine.sequence", "engine.kv_cache", "engine.step_time"}
CLIENT = {"engine.client", "engine.scheduler.admission"}
SERVING = GROUND | CLIENT | {"protocol", "text", "telemetry", "http", "privacy", "energy", "ladder"}

# Module or package (the longest prefix counts) -> what it may import besides itself.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "statistics": set(),
    "disk": {"errors"},
    "types": {"errors"},
    "deadlines": {"types"},
    "hardware": {"errors", "types"},
    "settings": {"errors"},
    "config": {"errors", "types", "settings"},
    "queueing": {"errors"},
    "protocol": GROUND,
    "telemetry": GROUND,
    "http": GROUND | {"protocol", "telemetry"},
    "energy": GROUND,
    "privacy": GROUND,
    "ladder": GROUND | {"engine.step_time", "models.source"},
    "kernels": GROUND,
    "models": GROUND | {"kernels"},
    "text": GROUND | {"protocol"},
    "engine.scheduler": GROUND | SCHEDULING,
    "engine.speculative": GROUND | SCHEDULING,
    "engine.structured": GROUND,
    "engine": GROUND | {"models", "kernels", "telemetry", "energy", "ladder"},
    "simulator": GROUND | SCHEDULING | {"engine.core", "engine.runners.null"},
    "profiler": GROUND | {"engine", "models", "kernels"},
    "bench": GROUND | {"simulator", "profiler.protocol"},
    "server": SERVING,
    "gateway": SERVING | {"engine.scheduler.lateness"},
    "cluster": GROUND | {"telemetry", "simulator", "gateway.routing"},
    "optimise": GROUND | {"models", "kernels", "engine", "text", "ladder"},
}
# Modules that only wire others together -> who may import them.
WIRING: dict[str, set[str]] = {
    "cli": {"__main__"},
    "llm": {"cli", "__init__"},
    "doctor": {"cli"},
    "chat": {"cli"},
    "commands": {"cli"},
    "commands.keys": {"cli"},
    "commands.remote": {"cli"},
    "terminal": {"cli", "chat", "commands.keys"},
    "__main__": set(),
    "__init__": set(),
}
TORCH = ("kernels", "models", "engine", "optimise", "profiler")
# These must not load torch or NumPy, directly or indirectly.
LIGHT = ("engine.client", "engine.ipc", "engine.scheduler")
LONGEST_FUNCTION, USUAL_FUNCTION, USUAL_SHARE = 60, 40, 0.95
LONGEST_FILE, MOST_PARAMETERS, MOST_FILES = 500, 6, 12

Function = ast.FunctionDef | ast.AsyncFunctionDef


def name_of(path: Path) -> str:
    """The module name below `stretto`: `engine.client` for src/stretto/engine/client.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1]) if parts[-1] == "__init__" and len(parts) > 1 else ".".join(parts)


TREES = {name_of(path): ast.parse(path.read_text()) for path in FILES}


def below(name: str, prefixes: Iterable[str]) -> bool:
    """True if the module is one of these, or is in one of these packages."""
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def package_of(name: str) -> str:
    """The longest key of the import table that contains the module, or else its top package."""
    parts = name.split(".")
    rows = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    return next((row for row in rows if row in MAY_IMPORT), parts[0])


def imported(tree: ast.AST) -> set[str]:
    """The Stretto modules that a module imports, as names below `stretto`."""
    found: set[str] = set()
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name.removeprefix("stretto.") in TREES else node.module or "" for name in names]
        found |= {name.removeprefix("stretto.") for name in names if name.startswith("stretto.")}
    return found & TREES.keys()


def outside(tree: ast.AST) -> set[str]:
    """The third-party packages that a module imports."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


def typing_only(tree: ast.AST) -> set[str]:
    """The modules imported under `if TYPE_CHECKING:`, which are not loaded at run time."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            found |= imported(node)
    return found


EDGES = {name: imported(tree) - {name} for name, tree in TREES.items()}
LOADED = {name: edges - typing_only(TREES[name]) for name, edges in EDGES.items()}


def reached(start: Iterable[str]) -> set[str]:
    """These modules and everything they import, directly or indirectly."""
    seen: set[str] = set()
    todo = list(start)
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += LOADED[name]
    return seen


def functions(tree: ast.AST) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def test_imports_follow_the_table():
    wrong: list[str] = []
    for name, edges in EDGES.items():
        package = package_of(name)
        if package in WIRING:
            continue
        allowed = MAY_IMPORT.get(package, set()) | {package}
        wrong += [f"{name} imports {other}" for other in edges if not below(other, allowed)]
        if package not in MAY_IMPORT:
            wrong.append(f"{name} has no row in the table")
    assert wrong == []


def test_only_wiring_imports_wiring():
    wrong = [
        f"{other} imports {name}"
        for name, may in WIRING.items()
        for other, edges in EDGES.items()
        if name in edges and other not in may
    ]
    assert wrong == []


def test_no_import_cycles():
    try:
        TopologicalSorter(LOADED).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


def test_text_files_are_utf_8_in_every_locale():
    """Without a named encoding, Python takes that of the locale."""
    wrong = [
        f"{name}, line {node.lineno}"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("read_text", "write_text")
        and "encoding" not in {keyword.arg for keyword in node.keywords}
    ]
    assert wrong == []


def test_no_import_inside_a_function():
    wrong = {
        f"{name}.{function.name}"
        for name, tree in TREES.items()
        for function in functions(tree)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert wrong == set()


def test_torch_and_transformers_are_imported_only_where_allowed():
    uses = {name: outside(tree) for name, tree in TREES.items()}
    assert {name for name in uses if "transformers" in uses[name] and not below(name, {"optimise"})} == set()
    assert {name for name in uses if "torch" in uses[name] and not below(name, TORCH)} == set()


def test_the_server_process_never_loads_torch():
    api_server = [name for name in TREES if below(name, ("server", "text", "gateway", "telemetry", "bench"))]
    loaded = reached([*api_server, "cli", "llm"])
    assert {name for name in loaded if "torch" in outside(TREES[name])} == set()


def test_the_scheduler_and_the_client_load_neither_torch_nor_numpy():
    loaded = reached(name for name in TREES if below(name, LIGHT))
    assert {name for name in loaded if outside(TREES[name]) & {"torch", "numpy"}} == set()


def test_folders_hold_at_most_12_files():
    counts = Counter(path.parent for path in FILES if path.name != "__init__.py")
    assert {str(folder): count for folder, count in counts.items() if count > MOST_FILES} == {}


def defined(tree: ast.Module) -> Iterator[str]:
    """The classes and type aliases that a module defines, without type variables."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name, value = node.targets[0].id, node.value
            variable = isinstance(value, ast.Call) and isinstance(value.func, ast.Name)
            if name.lstrip("_")[:1].isupper() and not name.isupper() and not variable:
                yield name


def test_no_class_or_alias_is_defined_twice():
    owners: defaultdict[str, list[str]] = defaultdict(list)
    for module, tree in TREES.items():
        for name in defined(tree):
            owners[name].append(module)
    assert {name: modules for name, modules in owners.items() if len(modules) > 1} == {}


def docstrings(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | Function) and (text := ast.get_docstring(node)):
            yield getattr(node, "name", "module"), text


def test_no_docstring_ends_with_a_single_word_line():
    wrong = [
        f"{name}.{place}"
        for name, tree in TREES.items()
        for place, text in docstrings(tree)
        if len(text.splitlines()) > 1 and len(text.splitlines()[-1].split()) == 1
    ]
    assert wrong == []


def test_every_module_has_a_docstring_of_at_most_8_lines():
    texts = {name: ast.get_docstring(tree) or "" for name, tree in TREES.items() if tree.body}
    assert {name for name, text in texts.items() if not 1 <= len(text.splitlines()) <= 8} == set()


def assigned(name: str, tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Each attribute that a module assigns, with the module, and the class when the target is `self`."""
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    own = {id(node): holder.name for holder in classes for node in ast.walk(holder)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            itself = isinstance(node.value, ast.Name) and node.value.id == "self"
            yield node.attr, f"{name}.{own[id(node)]}" if itself else name


# The engine's structures -> the one module that assigns their fields after construction.
WRITERS: dict[str, tuple[str, str]] = {
    "Sequence": ("engine.sequence", "engine.core"),
    "KvState": ("engine.kv_cache", "engine.kv_cache"),
    "Deadline": ("deadlines", "deadlines"),
    "ModelState": ("engine.state", "engine.core"),
    "PlanBuilder": ("engine.scheduler.plan_builder", "engine.scheduler"),
    "Plan": ("engine.scheduler.types", "engine.scheduler"),
}


def test_each_engine_field_has_one_writer():
    """Fields are matched by name. Only `self.field` in another class is known to be a different field."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for module, tree in TREES.items():
        if below(module, ("engine", "deadlines", "simulator", "profiler")):
            for field, place in assigned(module, tree):
                found[field].add(place)
    wrong: list[str] = []
    for structure, (home, writer) in WRITERS.items():
        holder = next(n for n in TREES[home].body if isinstance(n, ast.ClassDef) and n.name == structure)
        fields = {
            n.target.id
            for n in holder.body
            if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
        }
        for field in fields:
            others = {place for place in found[field] if place in TREES and not below(place, {writer})}
            wrong += [f"{other} assigns {structure}.{field}" for other in others]
    assert wrong == []


def length(function: Function) -> int:
    return (function.end_lineno or 0) - function.lineno + 1


def test_functions_stay_within_their_line_budget():
    lengths = {
        f"{name}.{node.name}": length(node) for name, tree in TREES.items() for node in functions(tree)
    }
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST_FUNCTION} == {}
    usual = sum(1 for lines in lengths.values() if lines <= USUAL_FUNCTION)
    assert usual >= USUAL_SHARE * len(lengths)


def test_functions_stay_within_their_parameter_budget():
    wide: dict[str, int] = {}
    for name, tree in TREES.items():
        if name.startswith(("kernels.", "cli", "commands.")):  # Exempt: kernel launchers and commands.
            continue
        for node in functions(tree):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = sum(1 for argument in arguments if argument.arg not in ("self", "cls"))
            if count > MOST_PARAMETERS:
                wide[f"{name}.{node.name}"] = count
    assert wide == {}


def test_files_stay_within_their_line_budget():
    long = {name_of(path): len(path.read_text().splitlines()) for path in FILES}
    assert {name: lines for name, lines in long.items() if lines > LONGEST_FILE} == {}

"""The house's plan as a test: imports point down, late ones included; see the table below."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "silotune"
ROWS = (
    ("errors", "structs", "seeds", "quiet"),
    ("tensors", "lora", "settings"),
    ("config",),
    ("data", "models", "privacy", "methods", "record", "shipped"),
    ("training",),
    ("evaluation",),
    ("federation",),
    ("transports",),
    ("experiment",),
    ("deploy", "benchmark", "report"),
    ("dashboard",),
    ("cli",),
)
ROOMS = {
    "kinds": (),
    "wire": ("kinds",),
    "coordinator": ("kinds", "wire"),
    "site": ("kinds", "wire"),
    "compute": ("kinds", "wire"),
    "simulation": ("kinds", "wire", "coordinator", "site"),
}
"""Rooms of federation/ -> the others that a module there may import: neither side sees into the other one."""
ROW = {name: number for number, names in enumerate(ROWS, start=1) for name in names}
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def part(path: Path) -> str:
    """The part of the house that a file belongs to: its top folder, or its own name."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> Iterator[str]:
    """Parts of silotune that a file imports anywhere, by whichever form of import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "silotune" else [node.module]
            )
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            names = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
        else:
            continue
        yield from (str(name).split(".")[1] for name in names if str(name).startswith("silotune."))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    own = part(path)
    assert own in ROW, f"{own} stands on no row of the table"
    for other in imported(ast.parse(path.read_text(encoding="utf-8"))):
        if other in ("__version__", own):
            continue
        assert ROW[other] < ROW[own], f"{own} (row {ROW[own]}) imports {other} (row {ROW[other]})"


def room(module: str) -> str:
    """The room of federation/ that a module such as ``silotune.federation.site.guard`` lies in; empty outside."""
    parts = module.split(".")
    return parts[2] if parts[:2] == ["silotune", "federation"] and len(parts) > 2 else ""


def modules(tree: ast.AST) -> Iterator[str]:
    """The dotted names that a file imports anywhere, with what it imports from them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", sorted((ROOT / "federation").rglob("*.py")), ids=lambda path: path.stem)
def test_neither_side_of_the_trust_boundary_imports_the_other(path: Path) -> None:
    if path == ROOT / "federation" / "__init__.py":
        return
    own = room("silotune." + ".".join(path.relative_to(ROOT).with_suffix("").parts))
    for module in modules(ast.parse(path.read_text(encoding="utf-8"))):
        other = room(module)
        assert other in ("", own, *ROOMS[own]), f"{path.relative_to(ROOT)} in {own!r} imports {module}"


def at_the_top(tree: ast.Module) -> Iterator[str]:
    """The modules that a file imports when it is imported itself: neither late ones, nor those for types alone."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("silotune"):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
            yield str(node.module)


def test_no_module_imports_itself_in_a_circle() -> None:
    named = {"silotune." + ".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FILES}
    graph = {
        name: {other for other in at_the_top(ast.parse(path.read_text(encoding="utf-8"))) if other in named} - {name}
        for name, path in named.items()
    }
    while leaves := [name for name, others in graph.items() if not others & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert not graph, f"these modules import each other in a circle: {sorted(graph)}"


def test_package_files_are_empty_and_there() -> None:
    folders = {path.parent for path in FILES} - {ROOT}
    assert {"experiment", "embedded"} <= {folder.name for folder in folders}
    for folder in folders:
        assert (folder / "__init__.py").read_bytes() == b"", folder


def test_only_one_room_and_one_file_know_flower() -> None:
    """Type hints included: what is behind ``if TYPE_CHECKING`` is an import as well."""
    allowed = {*(ROOT / "deploy" / "flower").glob("*.py"), ROOT / "transports" / "flower.py"}
    for path in FILES:
        if path not in allowed:
            named = modules(ast.parse(path.read_text(encoding="utf-8")))
            assert not [name for name in named if name.split(".")[0] == "flwr"], path


def test_files_say_what_they_are_for() -> None:
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert path.name == "__init__.py" or ast.get_docstring(ast.parse(text)), path

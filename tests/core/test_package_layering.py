"""Imports point down: rooms in their order, no circle, and nothing heavy where it does not belong.

Imports inside functions and under TYPE_CHECKING count.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from utils.children import finished

PACKAGE = Path(__file__).resolve().parents[2] / "pellucid"
# From the top down. On one line a room may import those to its right.
FLOORS = (
    ("cli", "commands"),
    ("manager",),
    ("server",),
    ("service",),
    ("training", "bench", "testing", "replay", "llm"),
    ("engine",),
    ("trace",),
    ("scheduling",),
    ("executor",),
    ("models",),
    ("layers",),
    ("program",),
    ("ops",),
    ("sampling", "structure", "text", "weights"),
    ("core",),
    ("contract",),
    ("api", "config"),
    ("files", "json_text", "owners", "float32", "errors", "version"),
)
PLACE = {room: (floor, place) for floor, rooms in enumerate(FLOORS) for place, room in enumerate(rooms)}
# room -> modules that it never imports: a prefix of their names
FORBIDDEN = {
    "scheduling": ("torch", "numpy", "time", "datetime"),
    "contract": ("torch",),
    "engine": ("torch", "transformers"),
    "service": ("torch", "transformers"),
    "server": ("torch", "transformers"),
}
# (module, what it imports): within a property that nobody on the serving path reads
ALLOWED = {("pellucid.contract.plan", "torch")}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports_of(source: str) -> Iterator[str]:
    """The dotted names that a module imports, the most exact ones that are modules."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module


def graph() -> dict[str, set[str]]:
    """Who imports whom within the package. The package itself offers names lazily and imports nothing that runs."""
    edges = {name: {one for one in imports_of(path.read_text()) if one in MODULES} for name, path in MODULES.items()}
    return {name: targets - {name} for name, targets in edges.items()}


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules each of which imports, by whatever way, all of the others (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for target in edges[name]:
            if target not in index:
                visit(target)
                low[name] = min(low[name], low[target])
            elif target in stack:
                low[name] = min(low[name], index[target])
        if low[name] == index[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                found.append(sorted(group))

    for name in edges:
        if name not in index:
            visit(name)
    return found


def upward(edges: dict[str, set[str]]) -> list[str]:
    """Imports between rooms that point up or to the left."""
    found = []
    for name, targets in edges.items():
        for target in targets:
            here, there = (one.partition(".")[2].split(".")[0] for one in (name, target))
            if here and there and here != there and PLACE[there] < PLACE[here]:
                found.append(f"{name} imports {target}")
    return sorted(found)


def test_given_rooms_when_listed_then_each_has_its_floor() -> None:
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert rooms - {"__init__"} <= PLACE.keys()


def test_given_imports_when_followed_then_they_point_down() -> None:
    assert not upward(graph())


def test_given_imports_when_followed_then_there_is_no_circle() -> None:
    assert not circles(graph())


@pytest.mark.parametrize("room", FORBIDDEN)
def test_given_a_room_when_read_then_it_imports_nothing_that_is_forbidden_there(room: str) -> None:
    found = [
        f"{name} imports {target}"
        for name, path in MODULES.items()
        if name.startswith(f"pellucid.{room}.")
        for target in imports_of(path.read_text())
        if target.split(".")[0] in FORBIDDEN[room] and (name, target) not in ALLOWED
    ]
    assert not found


def test_given_the_serving_path_when_imported_then_neither_torch_nor_transformers_is() -> None:
    code = (
        "import sys, pellucid.server.app, pellucid.engine.factory; print({'torch', 'transformers'} & set(sys.modules))"
    )
    done = finished([sys.executable, "-c", code])
    assert (done.returncode, done.stdout.strip()) == (0, "set()"), done.stderr


def test_given_a_circle_or_a_way_up_when_looked_for_then_it_is_found() -> None:
    edges = {"pellucid.api.a": {"pellucid.engine.b"}, "pellucid.engine.b": {"pellucid.api.a"}}
    assert circles(edges) == [["pellucid.api.a", "pellucid.engine.b"]]
    assert upward(edges) == ["pellucid.api.a imports pellucid.engine.b"]

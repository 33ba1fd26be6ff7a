"""Imports point down. Bug it catches: a launcher that pulls in torch, a schedule that needs a
process group, a cycle.
"""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "scaletrain"

# The first prefix that fits a module gives its floor; a module imports from its own floor and from
# lower ones, rooms in no circle.
FLOORS = {
    "scaletrain._version": 0,
    "scaletrain.errors": 0,
    "scaletrain.units": 0,
    "scaletrain.needs": 0,
    "scaletrain.plugins": 0,
    "scaletrain.timeouts": 0,
    "scaletrain.torch_names": 0,
    "scaletrain.world": 0,
    "scaletrain.config": 0,
    "scaletrain.run": 0,
    "scaletrain.host": 0,
    "scaletrain.collectives": 0,
    "scaletrain.rehearsal": 1,
    "scaletrain.launching": 1,
    "scaletrain.engine": 2,
    "scaletrain.compression": 2,
    "scaletrain.parameter_server": 2,
    "scaletrain.training": 3,
    "scaletrain.scaling": 4,
    "scaletrain.recipes": 4,
    "scaletrain.programs": 5,
    "scaletrain.notebook": 5,
    "scaletrain.cli": 6,
}
# Rooms where torch may be imported at the top of a module.
WITH_TORCH = (
    "scaletrain.compression",
    "scaletrain.engine",
    "scaletrain.parameter_server",
    "scaletrain.training",
    "scaletrain.programs",
    "scaletrain.notebook",
)
# The package itself opens the doors to what people import from it; it does so when they ask.
DOOR = "scaletrain"


def modules() -> dict[str, ast.Module]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ["scaletrain", *path.relative_to(PACKAGE).with_suffix("").parts]
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def room(module: str) -> str | None:
    return next(
        (prefix for prefix in FLOORS if module == prefix or module.startswith(prefix + ".")), None
    )


def imported(tree: ast.Module, *, top_only: bool) -> set[str]:
    nodes = tree.body if top_only else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


MODULES = modules()


def test_every_module_has_a_floor():
    assert [name for name in MODULES if name != DOOR and room(name) is None] == []


@pytest.mark.parametrize("name", [name for name in MODULES if name != DOOR])
def test_imports_point_down(name: str):
    floor = FLOORS[room(name) or ""]
    assert [
        t
        for t in imported(MODULES[name], top_only=False)
        if (there := room(t)) and FLOORS[there] > floor
    ] == []


def test_rooms_stand_in_no_circle():
    graph: dict[str, set[str]] = {}
    for name in MODULES:
        if mine := room(name):
            targets = {room(t) for t in imported(MODULES[name], top_only=False)} - {mine, None}
            graph.setdefault(mine, set()).update(t for t in targets if t)
    assert list(TopologicalSorter(graph).static_order()), "raises CycleError when there is one"


@pytest.mark.parametrize(
    "name",
    [n for n in MODULES if not n.startswith(WITH_TORCH)],
)
def test_no_torch_outside_its_rooms(name: str):
    assert [t for t in imported(MODULES[name], top_only=True) if t.split(".")[0] == "torch"] == []

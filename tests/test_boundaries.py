"""Tests of the borders between rooms that imports alone do not show."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "scaletrain"


def python_files(room: str = "") -> list[Path]:
    """Return the files of a room, or of the whole package."""
    return sorted((PACKAGE / room).rglob("*.py"))


def imported_modules(path: Path) -> set[str]:
    """Return the modules that a file imports, at its top or later."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


def text_constants(path: Path) -> list[str]:
    """Return the texts in a file's code, without its docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documentation = set()
    texts = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            documentation.add(id(node.value))
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.append(node)
    return [node.value for node in texts if id(node) not in documentation]


@pytest.mark.parametrize("room", ["rehearsal", "run", "host"])
def test_the_lower_rooms_import_no_launching(room: str):
    for path in python_files(room):
        launching = [m for m in imported_modules(path) if m.startswith("scaletrain.launching")]
        assert launching == [], path


def test_the_rehearsal_knows_no_job():
    """It makes hosts and harms links. Ranks, launchers and their options are not its business."""
    allowed = ("errors", "host", "rehearsal", "run.atomic", "units")
    for path in python_files("rehearsal"):
        for module in imported_modules(path):
            room = module.removeprefix("scaletrain.")
            assert room == module or room.startswith(allowed), f"{path} imports {module}"
        for text in text_constants(path):
            assert not re.search(r"launcher\.|\bRANK\b|WORLD_SIZE|rank-", text), f"{path}: {text!r}"


def test_only_programs_and_jobs_hold_the_name_of_a_module_as_text():
    """Everybody else starts a program by ``launching.job.Program``."""
    may_hold = {PACKAGE / "launching" / "job.py", *python_files("programs")}
    for path in python_files():
        if path in may_hold:
            continue
        for text in text_constants(path):
            for name in re.findall(r"\bscaletrain(?:\.\w+)+", text):
                assert not is_module(name), f"{path} holds {name!r}"


def is_module(name: str) -> bool:
    """Return True if this package has a module of this dotted name."""
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()

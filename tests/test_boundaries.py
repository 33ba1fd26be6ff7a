"""Boundaries between the rooms. Bug it catches: a file of a run directory renamed in one place of two."""

import ast
import inspect
import re
from pathlib import Path

import pytest

from scaletrain.run.layout import RehearsalDir, RunDir

PACKAGE = Path(__file__).parents[1] / "scaletrain"
LAYOUT = PACKAGE / "run" / "layout.py"
FILLED_IN = "\0"  # stands for a number in a name such as rank-3.jsonl


def names_in(folder: RunDir | RehearsalDir) -> list[str]:
    """The names of all files in a folder, as its class spells them."""
    names = []
    for attribute, kind in inspect.getmembers(type(folder)):
        if attribute.startswith("_"):
            continue
        if isinstance(kind, property):
            value = getattr(folder, attribute)
        elif len(inspect.signature(kind).parameters) == 2:  # self, and the number
            value = getattr(folder, attribute)(FILLED_IN)
        else:
            continue  # a question about several files
        if isinstance(value, Path):
            names.append(value.name)
    return names


NAMES = names_in(RunDir(Path("run"))) + names_in(RehearsalDir(Path("run")))
# A filled-in part may be anything where a name is used, also the "*" of a pattern.
SPELLED = re.compile(
    "|".join(re.escape(name).replace(re.escape(FILLED_IN), r"[^/]+") for name in NAMES)
)


def paths_in(source: str) -> set[str]:
    """The texts of a module that may be paths: those without spaces."""
    texts = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.add(node.value)
        elif isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "*" for part in node.values]
            texts.add("".join(map(str, parts)))
    return {text for text in texts if text and not re.search(r"\s", text)}


def test_the_names_are_recognised():
    assert "config.yaml" in NAMES and f"rank-{FILLED_IN}.jsonl" in NAMES
    for name in ("rank-0.jsonl", "progress-*.json", "failure.json", "slowdown-h3"):
        assert SPELLED.fullmatch(name), name
    assert not SPELLED.fullmatch("rehearsal.yaml")


@pytest.mark.parametrize(
    "module", [str(path.relative_to(PACKAGE)) for path in sorted(PACKAGE.rglob("*.py"))]
)
def test_only_the_layout_spells_the_names_of_a_run_directorys_files(module: str):
    path = PACKAGE / module
    if path == LAYOUT:
        return
    texts = paths_in(path.read_text(encoding="utf-8"))
    assert [text for text in sorted(texts) if SPELLED.fullmatch(text.rpartition("/")[2])] == []

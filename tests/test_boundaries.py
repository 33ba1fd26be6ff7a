"""Boundaries between the rooms that imports do not show: files, programs, and what a room knows."""

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
    """Everybody else starts a program by ``launching.job.Program``.

    The package's own ``__init__`` may, too: it imports what people ask it for when they ask.
    """
    may_hold = {PACKAGE / "__init__.py", PACKAGE / "launching" / "job.py"}
    may_hold |= set(python_files("programs"))
    for path in python_files():
        if path not in may_hold:
            assert [text for text in text_constants(path) if is_module(text)] == [], path


# Texts of others that have colons: each file is named with the format that it reads.
FOREIGN_FORMATS = {
    "plugins.py": "package.module:factory, Python's entry points",
    "host/cores.py": "the kernel's list of control groups",
    "launching/launchers/torchrun.py": "torchrun's --nnodes",
    "programs/follow_slurm.py": "SLURM's exit codes",
    "programs/rehearsal_serve.py": "the key before an error's text",
    "parameter_server/server/endpoint.py": "the reason before an error's text",
    "parameter_server/worker/link.py": "host:port",
    "rehearsal/links.py": "/proc/net/dev",
    "training/data/vowels.py": "the dimensions of a time series in a .ts file",
    "run/environment.py": "/proc/cpuinfo",
    "launching/reach.py": "slots in host files of MPI",
}


def splits_at_a_mark(path: Path) -> list[str]:
    """Return the calls in a file that split a text at ``:`` or ``@``."""
    calls = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        is_split = node.func.attr in ("split", "rsplit", "partition", "rpartition")
        marks = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
        if is_split and set(marks) & {":", "@"}:
            calls.append(ast.unparse(node))
    return calls


def test_only_the_grammar_splits_the_short_forms_that_people_type():
    splitting = {}
    for path in python_files():
        name = path.relative_to(PACKAGE).as_posix()
        calls = splits_at_a_mark(path)
        if calls and name != "config/grammar.py":
            splitting[name] = calls
    assert set(splitting) == set(FOREIGN_FORMATS), splitting


def is_module(text: str) -> bool:
    """Return True if this package has a module of this dotted name."""
    if not re.fullmatch(r"scaletrain(\.\w+)+", text):
        return False
    path = PACKAGE.parent.joinpath(*text.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()

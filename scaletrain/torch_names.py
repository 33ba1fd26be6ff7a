"""What torch offers by name, read from its installed files: checked in milliseconds, where importing it takes seconds.

Everything here is ``None`` where torch is not installed, or is laid out otherwise: whoever imports it has the last word.
"""

import ast
import re
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path

import pydantic

from scaletrain import plugins

_FUNCTION = re.compile(r"^def ([a-z]\w*)\(((?:[^()]|\([^()]*\))*)\)", re.MULTILINE)


@cache
def losses() -> frozenset[str] | None:
    """The functions of ``torch.nn.functional`` that have a ``reduction``."""
    found = _FUNCTION.findall(_read("nn/functional.py") or "")
    return (
        frozenset(name for name, parameters in found if re.search(r"\breduction\b", parameters))
        or None
    )


@cache
def optimizers() -> dict[str, tuple[str, str]] | None:
    """The classes of ``torch.optim``, their names in lower case: where each is defined, and what it is called there."""
    text = _read("optim/__init__.py")
    imports = (
        node
        for node in ast.parse(text or "").body
        if isinstance(node, ast.ImportFrom) and node.module
    )
    found = {
        alias.name.lower(): (
            f"{str(node.module).removeprefix('torch.').replace('.', '/')}.py",
            alias.name,
        )
        for node in imports
        for alias in node.names
        if alias.name[0].isupper() and alias.name != "Optimizer"
    }
    return found or None


@cache
def optimizer_options(name: str) -> type[pydantic.BaseModel] | None:
    """A pydantic model of an optimizer's arguments, from its signature. A number may be a tensor to torch; not in a file."""
    path, name = (optimizers() or {})[name.lower()]
    classes = [
        n
        for n in ast.parse(_read(path) or "").body
        if isinstance(n, ast.ClassDef) and n.name == name
    ]
    makers = [
        n
        for c in classes
        for n in c.body
        if isinstance(n, ast.FunctionDef) and n.name == "__init__"
    ]
    return plugins.signature(_WithoutTensor().visit(makers[0]), 2) if makers else None


class _WithoutTensor(ast.NodeTransformer):
    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        return node.left if isinstance(node.right, ast.Name) and node.right.id == "Tensor" else node


def _read(path: str) -> str | None:
    spec = PathFinder.find_spec("torch")
    for folder in (spec and spec.submodule_search_locations) or ():
        if (file := Path(folder, path)).is_file():
            return file.read_text(encoding="utf-8")
    return None

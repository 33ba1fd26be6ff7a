"""The names that torch offers, read from its installed files in milliseconds.

Importing torch takes seconds, and login nodes may not have it. Every function here returns None
where torch is not installed, or is laid out in another way: the worker, which imports torch, then
has the last word.
"""

import ast
import re
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path
from typing import NamedTuple

import pydantic

from scaletrain import plugins

# A function's name and its parameters, in which parentheses may be nested once. Parsing this
# file of torch's takes eight times as long as searching it.
_FUNCTION = re.compile(r"^def ([a-z]\w*)\(((?:[^()]|\([^()]*\))*)\)", re.MULTILINE)

# The ranges of numbers that optimizers take, by their parameters' names. torch itself looks at most
# of them, in each worker.
_SHARE = "Annotated[float, Ge(0), Lt(1)]"
_RANGES = {
    "lr": {"float": "Annotated[float, Ge(0)]"},
    "weight_decay": {"float": "Annotated[float, Ge(0)]"},
    "eps": {"float": "Annotated[float, Ge(0)]"},
    "momentum": {"float": _SHARE},
    "betas": {"tuple[float, float]": f"tuple[{_SHARE}, {_SHARE}]"},
}

# Parameters of a loss that say how its values are added up; the first two are torch's old names.
_REDUCTIONS = ("size_average", "reduce", "reduction")


class Definition(NamedTuple):
    """Where a class is defined."""

    path: str  # below torch's folder
    name: str  # of the class


@cache
def losses() -> frozenset[str] | None:
    """Return the functions of ``torch.nn.functional`` that have a ``reduction``."""
    text = _read("nn/functional.py") or ""
    names = set()
    for name, parameters in _FUNCTION.findall(text):
        if re.search(r"\breduction\b", parameters):
            names.add(name)
    return frozenset(names) or None


@cache
def loss_options(name: str) -> type[pydantic.BaseModel] | None:
    """Return a pydantic model of a loss's options, from the signature of torch's function.

    Left out are the reduction, which is the framework's own, and tensors: a file holds none.

    Args:
        name: a function of ``torch.nn.functional``.
    """
    parameters = dict(_FUNCTION.findall(_read("nn/functional.py") or "")).get(name)
    if parameters is None:
        return None
    (function,) = ast.parse(f"def {name}({parameters}): ...").body
    assert isinstance(function, ast.FunctionDef)
    arguments = function.args
    # Those with a default are the last ones. The others are output, target and further tensors.
    first = len(arguments.args) - len(arguments.defaults)
    having_defaults: list[tuple[ast.arg, ast.expr | None]] = []
    having_defaults += zip(arguments.args[first:], arguments.defaults, strict=True)
    having_defaults += zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    arguments.args, arguments.defaults = [], []
    arguments.kwonlyargs, arguments.kw_defaults = [], []
    for argument, default in having_defaults:
        annotation = ast.unparse(argument.annotation) if argument.annotation else ""
        if argument.arg not in _REDUCTIONS and "Tensor" not in annotation:
            arguments.kwonlyargs.append(argument)
            arguments.kw_defaults.append(default)
    return plugins.signature(function, provided=0)


@cache
def optimizers() -> dict[str, Definition] | None:
    """Return the classes of ``torch.optim`` by their names in lower case."""
    text = _read("optim/__init__.py") or ""
    classes = {}
    for node in ast.parse(text).body:
        if not isinstance(node, ast.ImportFrom) or not node.module:
            continue
        # "torch.optim.adam" lies in optim/adam.py.
        path = node.module.removeprefix("torch.").replace(".", "/") + ".py"
        for alias in node.names:
            # Modules and functions are imported there, too. Optimizer is the base class.
            if alias.name[0].isupper() and alias.name != "Optimizer":
                classes[alias.name.lower()] = Definition(path, alias.name)
    return classes or None


@cache
def optimizer_options(name: str) -> type[pydantic.BaseModel] | None:
    """Return a pydantic model of an optimizer's arguments, from the signature of its class.

    Where torch accepts a number or a tensor, only the number counts: a file holds no tensors.

    Args:
        name: a class of ``torch.optim``, in any case.
    """
    definition = (optimizers() or {}).get(name.lower())
    if definition is None:
        return None
    for node in ast.parse(_read(definition.path) or "").body:
        if not isinstance(node, ast.ClassDef) or node.name != definition.name:
            continue
        for method in node.body:
            if isinstance(method, ast.FunctionDef) and method.name == "__init__":
                bounded = _bounded(_WithoutTensor().visit(method))
                return plugins.signature(bounded, provided=2)  # self and params
    return None


def _bounded(method: ast.FunctionDef) -> ast.FunctionDef:
    """Return a method with the ranges of its parameters in their annotations."""
    for parameter in (*method.args.args, *method.args.kwonlyargs):
        if parameter.annotation is not None:
            ranges = _RANGES.get(parameter.arg, {})
            text = ast.unparse(parameter.annotation)
            parameter.annotation = ast.parse(ranges.get(text, text), mode="eval").body
    return method


@cache
def has_gpu_support() -> bool | None:
    """Return True if the installed torch was built for GPUs, CUDA's or ROCm's."""
    built = re.findall(r"^(?:cuda|hip)\b.*= (.*)$", _read("version.py") or "", re.MULTILINE)
    return any(version != "None" for version in built) if built else None


class _WithoutTensor(ast.NodeTransformer):
    """Turn ``float | Tensor`` into ``float``."""

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        is_or_tensor = isinstance(node.right, ast.Name) and node.right.id == "Tensor"
        return node.left if is_or_tensor else node


def _read(path: str) -> str | None:
    spec = PathFinder.find_spec("torch")
    if spec is None:
        return None
    # find_spec of a top-level package runs no code of it.
    for folder in spec.submodule_search_locations or ():
        file = Path(folder, path)
        if file.is_file():
            return file.read_text(encoding="utf-8")
    return None

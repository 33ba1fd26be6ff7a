"""Plugins are files: the file's name is the name people type, its docstring the menu line, its signature the options.

A plugin of a kind is a module in that kind's package that defines the kind's factory function. Nothing is registered
anywhere. Names, descriptions and options are read from the source (``ast``) without importing the module, so that
configurations are checked on machines that have no torch; ``load`` is the only function here that imports one.
"""

import ast
import importlib
import importlib.util
import sys
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import annotated_types
import pydantic

from scaletrain.errors import UserError, unknown

_ROOT = Path(__file__).parent
COMPUTED = "<computed>"  # default of an option whose value only importing the module would tell


class Kind(NamedTuple):
    """Where the plugins of a kind live, and what their factory is called."""

    folder: str  # package below scaletrain/, slashes between
    factory: str  # function every plugin of this kind defines
    provided: (
        int  # leading parameters that the framework passes; the others are the options people set
    )


KINDS = {
    "exchange": Kind("training/exchange", "exchange", 2),  # exchange(world, setup, *, ...)
    "collective": Kind("collectives", "schedule", 1),  # schedule(size, *, ...)
    "transport": Kind("engine/transport", "transport", 1),  # transport(group, *, ...)
    "launcher": Kind("launching/launchers", "plan", 1),  # plan(job, *, ...)
    "model": Kind("training/models", "model", 0),  # model(*, ...)
    "data": Kind("training/data", "data", 0),  # data(*, ...)
    "bench": Kind("cli/bench", "command", 0),  # a click command
}

# What an option's annotation may use.
_TYPES = {
    "int": int, "float": float, "str": str, "bool": bool, "list": list, "dict": dict, "tuple": tuple, "Any": Any,
    "Literal": Literal, "Annotated": Annotated, "None": None,
    "Ge": annotated_types.Ge, "Gt": annotated_types.Gt, "Le": annotated_types.Le, "Lt": annotated_types.Lt,
}  # fmt: skip


@cache
def names(kind: str) -> list[str]:
    """The names of a kind's plugins, sorted: every file of its folder that defines the factory."""
    where = _ROOT / KINDS[kind].folder
    return sorted(
        path.stem for path in where.glob("*.py") if path.stem != "__init__" and _factory(kind, path)
    )


def describe(kind: str, name: str) -> str:
    """The first line of a plugin's docstring."""
    text = ast.get_docstring(_parse(_path(kind, name))) or ""
    return text.partition("\n")[0]


def options(
    kind: str, name: str, search_path: Path | None = None
) -> type[pydantic.BaseModel] | None:
    """A pydantic model of a plugin's options, read from its factory's signature.

    ``None`` when there is no source to read: ``name`` is a ``package.module:factory`` whose module is not found below
    ``search_path``, or whose factory is no function; its options are then passed on as they are.

    Raises:
        UserError: the module is there and has no such factory.
    """
    if ":" in name:
        module, _, factory = name.partition(":")
        path = _user_file(module, search_path)
        if path is None:
            return None
        if (node := _function(path, factory)) is None:
            if not _bound(path) & {factory, "*", "__getattr__"}:
                functions = [
                    node.name for node in _parse(path).body if isinstance(node, ast.FunctionDef)
                ]
                raise unknown(f"{kind}: {name!r}: no such function in {path}", factory, functions)
            return None
        return signature(node, 0)
    node = _factory(kind, _path(kind, name))
    assert node is not None
    return signature(node, KINDS[kind].provided)


def load(kind: str, name: str, search_path: Path | None = None) -> Any:
    """Import a plugin and return its factory. ``package.module:factory`` is found in ``search_path`` first.

    Raises:
        UserError: no such plugin, module or function.
    """
    if ":" not in name:
        if name not in names(kind):
            raise unknown(kind, name, names(kind))
        where = KINDS[kind]
        module = importlib.import_module(f"scaletrain.{where.folder.replace('/', '.')}.{name}")
        return getattr(module, where.factory)
    module_name, _, factory = name.partition(":")
    if search_path and str(search_path) not in sys.path:
        sys.path.insert(0, str(search_path))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there; something that it imports is not
        looked = f" (looked in {search_path} and on Python's path)" if search_path else ""
        raise UserError(f"{kind}: {name!r}: no module {error.name!r}{looked}") from None
    if not callable(getattr(module, factory, None)):
        functions = [
            key
            for key, value in vars(module).items()
            if callable(value) and not key.startswith("_")
        ]
        raise unknown(
            f"{kind}: {name!r}: no such function in {module.__file__}", factory, functions
        )
    return getattr(module, factory)


def companion(kind: str, name: str, function: str) -> Any | None:
    """Return an optional function that a plugin's module defines beside its factory, or None."""
    module = importlib.import_module(load(kind, name).__module__)
    return getattr(module, function, None)


def _path(kind: str, name: str) -> Path:
    if name not in names(kind):
        raise unknown(kind, name, names(kind))
    return _ROOT / KINDS[kind].folder / f"{name}.py"


def _user_file(module: str, search_path: Path | None) -> Path | None:
    stem = (search_path or Path.cwd()).joinpath(*module.split("."))
    return next(
        (path for path in (stem.with_suffix(".py"), stem / "__init__.py") if path.is_file()), None
    )


@cache
def _parse(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    except SyntaxError as error:
        raise UserError(f"{path}:{error.lineno}: {error.msg}") from None


def _factory(kind: str, path: Path) -> ast.FunctionDef | None:
    return _function(path, KINDS[kind].factory)


def _function(path: Path, name: str) -> ast.FunctionDef | None:
    return next(
        (n for n in _parse(path).body if isinstance(n, ast.FunctionDef) and n.name == name), None
    )


def _bound(path: Path) -> set[str]:
    """The names that a module may hold; ``*`` where only importing it tells."""
    found: set[str] = set()
    nodes: list[ast.AST] = [*_parse(path).body]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
            continue
        if isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        nodes += ast.iter_child_nodes(node)
    return found


def signature(node: ast.FunctionDef, provided: int) -> type[pydantic.BaseModel]:
    """A function's options: parameters after the first ``provided`` are the fields; ``**kwargs`` lets any other key through."""
    positional = node.args.posonlyargs + node.args.args
    padding: list[ast.expr | None] = [None] * (len(positional) - len(node.args.defaults))
    pairs = [*zip(positional, [*padding, *node.args.defaults], strict=True)][provided:]
    pairs += [*zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)]
    fields: dict[str, Any] = {}
    for parameter, default in pairs:
        fields[parameter.arg] = (
            _annotation(parameter.annotation),
            ... if default is None else _literal(default),
        )
    config = pydantic.ConfigDict(
        extra="allow" if node.args.kwarg else "forbid", protected_namespaces=()
    )
    return pydantic.create_model(node.name, __config__=config, **fields)


def _annotation(node: ast.expr | None) -> Any:
    """The type an annotation names. One that needs an import to be understood (``nn.Module``) is taken as ``Any``."""
    if node is None or any(isinstance(n, ast.Name) and n.id not in _TYPES for n in ast.walk(node)):
        return Any
    return eval(compile(ast.Expression(node), "<annotation>", "eval"), {"__builtins__": {}}, _TYPES)


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return COMPUTED

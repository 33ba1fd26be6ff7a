"""Plugins are files: their names, docstrings and signatures are the menu.

People type the file's name, its docstring's first line is its description, and its factory's
parameters are the options.

A plugin of a kind is a module in that kind's folder that defines the kind's factory function. There
is no registry. Names, descriptions and options are read from the source (``ast``) without importing
the module, so configurations are checked on machines that have no torch. ``load`` is the only
function here that imports one.
"""

import ast
import importlib
import importlib.util
import sys
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeVar

import annotated_types

from scaletrain.errors import UserError, unknown
from scaletrain.needs import CountsSamples, IsFile, IsFolder, Needs, is_installed

if TYPE_CHECKING:
    from pydantic import BaseModel

_Mark = TypeVar("_Mark")

_ROOT = Path(__file__).parent
# The default of an option if only importing the module would tell it.
COMPUTED = "<computed>"


class Kind(NamedTuple):
    """The folder of a kind's plugins, and the name of their factory."""

    folder: str  # below scaletrain/, with slashes
    factory: str  # the function that every plugin of this kind defines
    provided: int  # how many leading parameters the framework passes; the others are options


KINDS = {
    "exchange": Kind("training/exchange", "exchange", 2),  # exchange(world, setup, *, ...)
    "collective": Kind("collectives", "schedule", 1),  # schedule(size, *, ...)
    "transport": Kind("engine/transport", "transport", 1),  # transport(group, *, ...)
    "launcher": Kind("launching/launchers", "plan", 1),  # plan(job, *, ...)
    "model": Kind("training/models", "model", 0),  # model(*, ...)
    "data": Kind("training/data", "data", 0),  # data(*, ...)
    "optimizer": Kind("training/optimizers", "optimizer", 1),  # optimizer(groups, *, ...)
    "callback": Kind("training/callbacks", "callback", 1),  # callback(trainer, *, ...)
    "bench": Kind("cli/bench", "command", 0),  # a click command
    "verb": Kind("cli", "command", 0),  # a click command
}

# What a configuration names as ``package.module:factory`` alone, or from torch: how many leading
# parameters the framework passes.
_USERS_ONLY = {
    "workload": 0,  # workload(*, ...)
    "loss": 2,  # loss(output, target, *, ...)
}

# The names that an option's annotation may use.
_TYPES = {
    "int": int, "float": float, "str": str, "bool": bool, "list": list, "dict": dict, "tuple": tuple, "Any": Any,
    "Literal": Literal, "Annotated": Annotated, "None": None,
    "Ge": annotated_types.Ge, "Gt": annotated_types.Gt, "Le": annotated_types.Le, "Lt": annotated_types.Lt,
    "MinLen": annotated_types.MinLen, "IsFile": IsFile, "IsFolder": IsFolder, "CountsSamples": CountsSamples,
}  # fmt: skip


@cache
def names(kind: str) -> list[str]:
    """Return the names of a kind's plugins in alphabetical order.

    Every file of the kind's folder that defines the factory is one.
    """
    folder = _ROOT / KINDS[kind].folder
    found = []
    for path in folder.glob("*.py"):
        if path.stem != "__init__" and _factory(kind, path):
            found.append(path.stem)
    return sorted(found)


def exists(kind: str, name: str) -> bool:
    """Return True if a kind has a plugin of this name. Reads no other file of the folder."""
    path = _ROOT / KINDS[kind].folder / f"{name}.py"
    # An identifier has no slashes and dots: a name cannot lead out of the folder.
    return name.isidentifier() and path.is_file() and _factory(kind, path) is not None


def typed_name(kind: str, name: str) -> str:
    """Return a plugin's name as people type it: commands have dashes."""
    return name.replace("_", "-") if kind in ("bench", "verb") else name


def describe(kind: str, name: str) -> str:
    """Return the first line of a plugin's docstring."""
    docstring = ast.get_docstring(_parse(_path(kind, name))) or ""
    return docstring.partition("\n")[0]


def options(kind: str, name: str, search_path: Path | None = None) -> "type[BaseModel] | None":
    """Return a pydantic model of a plugin's options, read from its source.

    They are its factory's parameters, or the fields of the class that it names with ``OPTIONS``.

    Args:
        kind: a key of ``KINDS``.
        name: a plugin's name, or ``package.module:factory`` for a person's own factory.
        search_path: where a person's modules are looked for; default: the working directory.

    Returns:
        None if there is no source to read: the person's module is not below ``search_path``, or its
        factory is not a function. Options are then passed on unchecked.

    Raises:
        UserError: there is no such plugin, or the person's module has no such factory.
    """
    if ":" in name:
        return _users_options(kind, name, search_path)
    path = _path(kind, name)
    # Where there is such a class, the factory's signature says only **options.
    declared = _declared_options(path)
    if declared is not None:
        return _class_fields(declared)
    factory = _factory(kind, path)
    assert factory is not None
    return signature(factory, KINDS[kind].provided)


def _users_options(kind: str, name: str, search_path: Path | None) -> "type[BaseModel] | None":
    module, _, factory_name = name.partition(":")
    path = _users_file(module, search_path)
    if path is None:
        return None
    provided = KINDS[kind].provided if kind in KINDS else _USERS_ONLY[kind]
    factory = _function(path, factory_name)
    if factory is not None:
        return signature(factory, provided)
    initialiser = _initialiser(path, factory_name)
    if initialiser is not None:
        return signature(initialiser, 1 + provided)  # self comes first
    # The name may also be a class without __init__, an import or an assignment: left to Python.
    if not _bound_names(path) & {factory_name, "*", "__getattr__"}:
        kinds = (ast.FunctionDef, ast.ClassDef)
        functions = [node.name for node in _parse(path).body if isinstance(node, kinds)]
        raise unknown(f"{kind}: {name!r}: no such function in {path}", factory_name, functions)
    return None


def needs(kind: str, name: str) -> Needs:
    """Return what a plugin needs, as its line ``NEEDS = Needs(...)`` says; nothing without one."""
    if kind not in KINDS or not exists(kind, name):
        return Needs()
    for node in _parse(_path(kind, name)).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            targets = [target.id for target in node.targets if isinstance(target, ast.Name)]
            if targets == ["NEEDS"]:
                keywords = node.value.keywords
                return Needs(**{str(each.arg): ast.literal_eval(each.value) for each in keywords})
    return Needs()


def marked_options(
    kind: str, name: str, mark: type[_Mark], search_path: Path | None = None
) -> dict[str, _Mark]:
    """Return the options of a plugin whose type carries a mark, by their names, with their marks.

    Args:
        kind: of the plugin.
        name: of the plugin, or ``package.module:factory``.
        mark: such as ``IsFile``.
        search_path: where a person's modules are looked for.
    """
    # Torch's own optimizers and losses are no plugins, and have no files.
    if ":" not in name and (kind not in KINDS or not exists(kind, name)):
        return {}
    schema = options(kind, name, search_path)
    marked: dict[str, _Mark] = {}
    if schema is not None:
        for option, field in schema.model_fields.items():
            for each in field.metadata:
                if isinstance(each, mark):
                    marked[option] = each
    return marked


def load(kind: str, name: str, search_path: Path | None = None) -> Any:
    """Import a plugin and return its factory.

    The module of ``package.module:factory`` is looked for in ``search_path`` first, by default the
    working directory.

    Raises:
        UserError: there is no such plugin, module or function.
    """
    if ":" in name:
        return _load_users(kind, name, search_path)
    if not exists(kind, name):
        raise unknown(kind, name, names(kind))
    where = KINDS[kind]
    module = importlib.import_module(f"scaletrain.{where.folder.replace('/', '.')}.{name}")
    return getattr(module, where.factory)


def _load_users(kind: str, name: str, search_path: Path | None) -> Any:
    module_name, _, factory_name = name.partition(":")
    # In front: a module beside the YAML file is meant, even if one of its name is installed.
    folder = str(search_path or Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module exists; something that it imports does not
        raise _no_module(kind, name, error.name, folder) from None
    factory = getattr(module, factory_name, None)
    if callable(factory):
        return factory
    functions = []
    for key, value in vars(module).items():
        if callable(value) and not key.startswith("_"):
            functions.append(key)
    raise unknown(
        f"{kind}: {name!r}: no such function in {module.__file__}", factory_name, functions
    )


def check_module(place: str, name: str, search_path: Path | None = None) -> None:
    """Raise ``UserError`` if the module of ``package.module:factory`` cannot be there.

    No code runs. A module that a package may make when it is imported is left to Python.

    Args:
        place: the key of the configuration, for the error's line.
        name: the module and its factory.
        search_path: where it is looked for first; default: the working directory.
    """
    module = name.partition(":")[0]
    folder = str(search_path or Path.cwd())
    first, *rest = module.split(".")
    found = first
    spec = PathFinder.find_spec(first, [folder, *sys.path])
    if spec is None:
        # Other finders, such as those of packages that are installed for editing, know no folder.
        if not is_installed(first):
            raise _no_module(place, name, first, folder)
        return
    for part in rest:
        if spec.submodule_search_locations is None or _makes_modules(spec):
            return
        found = f"{found}.{part}"
        # Without its package's name: for a namespace, Python would look for that among loaded ones.
        spec = PathFinder.find_spec(part, list(spec.submodule_search_locations))
        if spec is None:
            raise _no_module(place, name, found, folder)


def _makes_modules(package: ModuleSpec) -> bool:
    """Return True if a package may bring modules from elsewhere when it is imported."""
    if package.origin is None or not package.origin.endswith(".py"):
        return False
    source = Path(package.origin).read_text(encoding="utf-8", errors="replace")
    return "__path__" in source or "sys.modules" in source


def _no_module(place: str, name: str, module: str, folder: str) -> UserError:
    return UserError(
        f"{place}: {name!r}: no module {module!r} (looked in {folder} and on Python's path)"
    )


def companion(kind: str, name: str, function: str) -> Any | None:
    """Return an optional function that a plugin's module defines beside its factory, or None."""
    module = importlib.import_module(load(kind, name).__module__)
    return getattr(module, function, None)


def _path(kind: str, name: str) -> Path:
    if not exists(kind, name):
        raise unknown(kind, name, names(kind))
    return _ROOT / KINDS[kind].folder / f"{name}.py"


def _users_file(module: str, search_path: Path | None) -> Path | None:
    folder = search_path or Path.cwd()
    stem = folder.joinpath(*module.split("."))
    for path in (stem.with_suffix(".py"), stem / "__init__.py"):
        if path.is_file():
            return path
    return None


@cache
def _parse(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    except SyntaxError as error:
        raise UserError(f"{path}:{error.lineno}: {error.msg}") from None


def _factory(kind: str, path: Path) -> ast.FunctionDef | None:
    return _function(path, KINDS[kind].factory)


def _function(path: Path, name: str) -> ast.FunctionDef | None:
    # Top level only: a method or an inner function of this name is something else.
    for node in _parse(path).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return node
    return None


def _initialiser(path: Path, name: str) -> ast.FunctionDef | None:
    """Return ``__init__`` of a class of a module: its parameters are the class's options."""
    for node in _parse(path).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
            return next((method for method in methods if method.name == "__init__"), None)
    return None


def _bound_names(path: Path) -> set[str]:
    """Return the names that a module may define; ``*`` if only importing it would tell."""
    bound: set[str] = set()
    nodes: list[ast.AST] = [*_parse(path).body]
    # Down into `if`, `try` and `with`, whose names are the module's as well.
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            bound.add(node.name)
            continue  # names inside it are not the module's
        if isinstance(node, ast.ImportFrom):
            bound |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bound.add(node.id)
        nodes += ast.iter_child_nodes(node)
    return bound


def signature(function: ast.FunctionDef, provided: int) -> "type[BaseModel]":
    """Return a pydantic model of a function's options.

    Args:
        function: its parameters are the fields; ``**kwargs`` lets any other key through.
        provided: how many leading parameters are not options.
    """
    arguments = function.args
    positional = arguments.posonlyargs + arguments.args
    # ast lists the defaults of the last parameters only; keyword-only ones have an entry each.
    num_without_default = len(positional) - len(arguments.defaults)
    defaults: list[ast.expr | None] = [None] * num_without_default + [*arguments.defaults]
    parameters = [*zip(positional, defaults, strict=True)][provided:]
    parameters += zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    fields: dict[str, Any] = {}
    for parameter, default in parameters:
        # An ellipsis makes pydantic require the option.
        value = ... if default is None else _literal(default)
        fields[parameter.arg] = (_annotation(parameter.annotation), value)
    return _model(function.name, fields, "allow" if arguments.kwarg else "forbid")


def _declared_options(path: Path) -> ast.ClassDef | None:
    """Return the dataclass that a plugin names with ``OPTIONS = CLASS``; None without such a line.

    A plugin with many options declares them as the fields of a dataclass, and its factory takes
    ``**options``. The class stands in the same file, or in one of this package that it imports.
    """
    nodes = _parse(path).body
    name = None
    for node in nodes:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name):
            targets = [target.id for target in node.targets if isinstance(target, ast.Name)]
            if targets == ["OPTIONS"]:
                name = node.value.id
    # An imported class: go on in the file that defines it.
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            source = _ROOT.parent.joinpath(*str(node.module).split("."))
            nodes = _parse(source.with_suffix(".py")).body
    classes = [node for node in nodes if isinstance(node, ast.ClassDef) and node.name == name]
    return classes[0] if classes else None


def _class_fields(node: ast.ClassDef) -> "type[BaseModel]":
    """Return a pydantic model with the fields of a dataclass."""
    fields: dict[str, Any] = {}
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            default = ... if statement.value is None else _literal(statement.value)
            fields[statement.target.id] = (_annotation(statement.annotation), default)
    return _model(node.name, fields, "forbid")


def _model(
    name: str, fields: dict[str, Any], extra: Literal["allow", "forbid"]
) -> "type[BaseModel]":
    """Return a pydantic model with these fields."""
    # Not at the top: a process group's engine loads plugins, checks no options, and should not wait
    # 0.2 s for it.
    import pydantic

    # No protected names: pydantic would warn about an option like model_size.
    config = pydantic.ConfigDict(extra=extra, protected_namespaces=())
    return pydantic.create_model(name, __config__=config, **fields)


def _annotation(node: ast.expr | None) -> Any:
    """Return the type that an annotation names.

    An annotation that needs an import to be understood (``nn.Module``) is taken as ``Any``.
    """
    if node is None:
        return Any
    for part in ast.walk(node):
        # So the text that is evaluated below consists of names from _TYPES alone.
        if isinstance(part, ast.Name) and part.id not in _TYPES:
            return Any
    code = compile(ast.Expression(node), "<annotation>", "eval")
    return eval(code, {"__builtins__": {}}, _TYPES)


def _literal(node: ast.expr) -> Any:
    try:
        # An expression, such as a constant of the module, stays unknown: nothing is imported.
        return ast.literal_eval(node)
    except ValueError:
        return COMPUTED

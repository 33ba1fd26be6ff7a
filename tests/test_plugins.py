"""Tests of plugins.py.

Plugins are files: every one has a menu line and readable options; a person's own module is found
beside the config.
"""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import pydantic
import pytest
from annotated_types import Ge, Gt, Le, Lt

from scaletrain import config, plugins
from scaletrain.errors import UserError
from scaletrain.parameter_server.protocol.settings import ParameterServerOptions

ALL = [(kind, name) for kind in plugins.KINDS for name in plugins.names(kind)]


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_a_plugin_has_a_menu_line(kind: str, name: str):
    line = plugins.describe(kind, name)
    assert 10 <= len(line) <= 140 and line.endswith((".", "?")), line


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, name in ALL if kind != "bench"])
def test_options_have_types_and_literal_defaults(kind: str, name: str):
    schema = plugins.options(kind, name)
    assert schema is not None
    for key, field in schema.model_fields.items():
        assert field.default != plugins.COMPUTED, (
            f"{kind} {name}: the default of {key} is not a literal"
        )


def test_options_that_a_dataclass_declares_are_the_fields_of_its_source():
    schema = plugins.options("exchange", "parameter_server")
    assert schema is not None
    read = {name: field.default for name, field in schema.model_fields.items()}
    declared = {field.name: field.default for field in fields(ParameterServerOptions)}
    assert list(read.items()) == list(declared.items())
    assert schema.model_validate({"servers": "2"}).servers == 2
    with pytest.raises(pydantic.ValidationError, match="greater than or equal to 1"):
        schema.model_validate({"servers": 0})


def test_a_persons_module_is_found_beside_the_config(tmp_path: Path):
    (tmp_path / "mine.py").write_text(
        "def net(*, hidden: int = 4, scale=2 * 3):\n    return hidden, scale\n"
    )
    tree = {
        "model": {"name": "mine:net", "hidden": "8"},
        "data": "digits",
        "batch_size": 8,
        "steps": 1,
        "source": str(tmp_path / "c.yaml"),
    }
    run = config.check(tree)
    assert run.model.options == {"hidden": 8}, (
        "checked by its signature; a computed default is left to Python"
    )
    assert run.load("model")(**run.model.options) == (8, 6)
    tree["model"] = {"name": "mine:net", "hiden": 8}
    with pytest.raises(UserError, match="did you mean 'hidden'"):
        config.check(tree)


def test_what_the_framework_passes_is_no_option_of_a_class(tmp_path: Path):
    (tmp_path / "mine5.py").write_text(
        "class Watch:\n    def __init__(self, trainer, *, every: int = 4): ...\n"
    )
    tree = {"model": "mlp", "data": "digits", "batch_size": 8, "steps": 1}
    tree |= {"source": str(tmp_path / "c.yaml"), "callbacks": ["mine5:Watch"]}
    assert config.check(tree).callbacks[0].options == {"every": 4}
    with pytest.raises(UserError, match=r"key callbacks\[1\].evry: .*did you mean 'every'"):
        config.check(tree | {"callbacks": ["mine5:Watch", {"name": "mine5:Watch", "evry": 2}]})


def test_a_module_that_is_not_there(tmp_path: Path):
    with pytest.raises(UserError, match="no module 'nowhere'"):
        plugins.load("model", "nowhere:net", tmp_path)
    (tmp_path / "mine2.py").write_text("def network(): ...\n")
    with pytest.raises(UserError, match="did you mean 'network'"):
        plugins.load("model", "mine2:netwrk", tmp_path)


def test_a_function_that_is_not_there_is_told_without_importing(tmp_path: Path):
    (tmp_path / "mine4.py").write_text(
        "from torch import nn\nNet = nn.Linear\ndef network(*, hidden: int = 4): ...\n"
    )
    job = {
        "model": "mine4:nettwork",
        "data": "digits",
        "batch_size": 8,
        "steps": 1,
        "source": str(tmp_path / "c.yaml"),
    }
    with pytest.raises(UserError, match=r"model: .*mine4\.py.*did you mean 'network'"):
        config.check(job)
    with pytest.raises(UserError, match=r"loss: .*mine4\.py.*did you mean 'network'"):
        config.check(job | {"model": "mlp", "loss": "mine4:netwrk"})
    for name in ("mine4:Net", "mine4:nn"):
        assert config.check(job | {"model": name}).model.name == name, (
            "bound: whether it can be called is seen later"
        )


def test_an_import_error_inside_a_persons_module_is_theirs_to_see(tmp_path: Path):
    (tmp_path / "mine3.py").write_text("import a_package_that_is_not_there\ndef net(): ...\n")
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_there"):
        plugins.load("model", "mine3:net", tmp_path)


def test_a_broken_file_is_named_and_leaves_other_verbs_alone(tmp_path: Path):
    shutil.copytree(
        Path(plugins.__file__).parent,
        tmp_path / "scaletrain",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    broken = tmp_path / "scaletrain" / "cli" / "bench" / "mine.py"
    broken.write_text('"""Mine."""\ndef command(:\n', encoding="utf-8")

    def run(*argv: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "scaletrain.cli", *argv]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=30)

    assert run("train", "--help").returncode == 0
    listed = run("bench", "--help")
    assert listed.returncode == 2
    assert listed.stderr == f"scaletrain: error: {broken}:2: invalid syntax\n"


def _unbounded(annotation: Any, metadata: Sequence[Any] = ()) -> bool:
    """Whether a type lets any number through."""
    if get_origin(annotation) is Annotated:
        inner, *marks = get_args(annotation)
        return _unbounded(inner, marks)
    if annotation in (int, float):
        return not any(isinstance(mark, Ge | Gt | Le | Lt) for mark in metadata)
    if get_origin(annotation) is Literal:
        return False
    return any(_unbounded(part) for part in get_args(annotation))


# Any number will do.
FREE = {("image_folder", "mean"), ("image_folder", "std")}


@pytest.mark.parametrize("kind", ["model", "data", "optimizer", "callback", "exchange"])
def test_every_number_that_an_option_takes_has_a_range(kind: str):
    """Bug it catches: a value out of range ends the workers, with a traceback of torch's."""
    free = []
    for name in plugins.names(kind):
        schema = plugins.options(kind, name)
        assert schema is not None
        for option, field in schema.model_fields.items():
            if option != "seed" and _unbounded(field.annotation, field.metadata):
                free.append((name, option))
    assert {*free} <= FREE

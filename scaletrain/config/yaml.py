"""Read YAML 1.2, where ``1e-3`` is a number and ``1:2`` is not, and a repeated key is a mistake.

PyYAML, which writes our files, reads YAML 1.1: there ``1e-3`` is a string and ``1:2`` is 62.
"""

import re
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from scaletrain.errors import UserError


def parse(text: str) -> Any:
    """Return the value that a piece of YAML holds.

    Raises:
        ValueError: the text is not YAML.
    """
    try:
        # pure: the C parser of ruamel.yaml reads YAML 1.1.
        return YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        raise ValueError(_describe(error)) from error


def read(path: Path) -> dict[str, Any]:
    """Return the mapping that a YAML file holds.

    Raises:
        UserError: the file cannot be read, is not YAML, or does not hold a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file (UTF-8)") from None
    try:
        tree = parse(text)
    except ValueError as error:
        # `parse` also serves --set, which has no lines. Here the file's line is known.
        cause = error.__cause__
        where = str(path)
        if isinstance(cause, MarkedYAMLError) and cause.problem_mark:
            # Marks count lines from 0.
            where = f"{path}:{cause.problem_mark.line + 1}"
        raise UserError(f"{where}: not YAML: {error}") from None
    if not isinstance(tree, dict):
        held = "nothing" if tree is None else f"a {type(tree).__name__}"
        raise UserError(f"{path}: a run is a mapping of keys to values, this file holds {held}")
    return tree


def _describe(error: YAMLError) -> str:
    problem = getattr(error, "problem", None) or str(error)
    if isinstance(error, DuplicateKeyError):
        # The library's sentence goes on with both values, which may be long.
        named = re.match(r'found duplicate key "([^"]*)"', problem)
        if named:
            return f"{named[1]} is given twice"
    return problem

"""Read YAML as people write it: a key given twice is a mistake, 1e-3 is a number."""

import re
from pathlib import Path
from typing import Any

import yaml

from scaletrain.errors import UserError


class _Loader(yaml.SafeLoader):
    """A key given twice is a mistake. YAML 1.2's numbers:
    1e-3 is one (in YAML 1.1, pyyaml's, it is a string unless it is written 1.0e-3), 1:2 is none (there: 62)."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        if kind is yaml.ScalarNode and implicit[0] and ":" in value:
            return "tag:yaml.org,2002:str"
        return super().resolve(kind, value, implicit)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value} is given twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def parse(text: str) -> Any:
    """Return the value that a piece of YAML holds. Raises ``yaml.YAMLError``."""
    return yaml.load(text, _Loader)


def read(path: Path) -> dict[str, Any]:
    """Return the mapping that a YAML file holds.

    Raises:
        UserError: the file cannot be read, is not YAML, or holds no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file (UTF-8)") from None
    try:
        tree = parse(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"{where}: not YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(tree, dict):
        raise UserError(
            f"{path}: a run is a mapping of keys to values, this file holds {_kind(tree)}"
        )
    return tree


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"

"""A plugin says what it needs, so that a lack shows before workers start.

A plugin's file says it as text, which is read without importing the file (``plugins.needs``):

    NEEDS = Needs(package="mnist1d", fix='pip install "scaletrain[data]"')

    def data(*, file: Annotated[str, IsFile()]) -> ...

What each host has is looked at by ``config.presence``.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from scaletrain.errors import UserError


@dataclass(frozen=True)
class Needs:
    """What a plugin needs besides options of the right types.

    ``config.presence`` looks for the package, and ``config.checks`` at everything else.
    """

    package: str = ""  # a module that has to be installed
    fix: str = ""  # the command that installs it
    one_of: tuple[str, ...] = ()  # options, at least one of which has to be set
    together: tuple[str, ...] = ()  # options, of which all have to be set or none
    evaluations: bool = False  # there have to be some before the end of the run
    own_weights: bool = False  # workers have to change their weights themselves
    equal_replicas: bool = False  # all workers must have the same weights after each step

    def check_installed(self, who: str) -> None:
        """Raise ``UserError`` if the package is not installed here. Imports nothing.

        Args:
            who: needs it: the beginning of the error's line.
        """
        if self.package and not is_installed(self.package):
            raise UserError(f"{who} needs {self.package} ({self.fix})")


@dataclass(frozen=True)
class IsFile:
    """Marks an option that names a file, which has to exist. It may be empty."""

    def check(self, key: str, name: str) -> Path:
        """Return the path of the file.

        Args:
            key: that named the file.
            name: the file.

        Raises:
            UserError: there is no such file.
        """
        return _existing(key, name, "file", Path.is_file)


@dataclass(frozen=True)
class IsFolder:
    """Marks an option that names a folder, which has to exist. It may be empty."""

    def check(self, key: str, name: str) -> Path:
        """Return the path of the folder.

        Args:
            key: that named the folder.
            name: the folder.

        Raises:
            UserError: there is no such folder.
        """
        return _existing(key, name, "folder", Path.is_dir)


@dataclass(frozen=True)
class CountsSamples:
    """Marks an option of a data set that tells how many samples there are for training.

    The option is their number, or that of the samples that are left out ``of`` all for testing.
    """

    of: int = 0  # all samples; 0: the option is the number itself

    def for_training(self, value: int) -> int:
        """Return the number of samples for training.

        >>> CountsSamples().for_training(100), CountsSamples(of=150).for_training(100)
        (100, 50)

        Args:
            value: of the option.
        """
        return self.of - value if self.of else value


def _existing(key: str, name: str, kind: str, exists: Callable[[Path], bool]) -> Path:
    path = Path(name).expanduser()
    if not exists(path):
        raise UserError(
            f"{key}: {name!r} is not allowed (allowed: a {kind}; there is no {path.absolute()})"
        )
    return path


def is_installed(package: str) -> bool:
    """Return True if a module without dots can be imported, by all signs; runs no code of it."""
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # it is loaded, and was made in an unusual way
        return True

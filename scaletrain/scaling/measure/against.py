"""The other version of scaletrain that a sweep runs in turns with this one."""

import dataclasses
import os
import subprocess
from pathlib import Path

import scaletrain
from scaletrain.errors import UserError

_GIT_TAKES_S = 300.0
PACKAGE = Path(scaletrain.__file__).parent


@dataclasses.dataclass(frozen=True)
class Version:
    """A version of scaletrain.

    Attributes:
        name: as a person named it, or the commit.
        folder: in which the package lies.
    """

    name: str
    folder: Path

    @property
    def environ(self) -> dict[str, str]:
        """The environment of this process, in which Python finds that version first."""
        paths = [str(self.folder)]
        if os.environ.get("PYTHONPATH"):
            paths.append(os.environ["PYTHONPATH"])
        return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def find(text: str, folder: Path) -> Version:
    """Return the version that a person names.

    Args:
        text: a folder with the package ``scaletrain`` in it, or a commit of this checkout, which
            is then copied.
        folder: where the copy of a commit goes. A copy that is there is used again.

    Raises:
        UserError: the text is neither.
    """
    if Path(text).is_dir():
        if not (Path(text) / "scaletrain" / "__init__.py").is_file():
            raise _refused(text, f"{text} has no folder scaletrain with a package in it")
        return Version(text, Path(text).resolve())
    top = _git(text, PACKAGE, "rev-parse", "--show-toplevel")
    # ``^{commit}``: a tag becomes its commit. ``--end-of-options``: no text is an option of git's.
    commit = _git(text, PACKAGE, "rev-parse", "--verify", "--end-of-options", f"{text}^{{commit}}")
    # A copy, since measuring must not change what a person has checked out. It shares the objects.
    if not (folder / ".git").exists():
        _git(text, PACKAGE, "clone", "--quiet", "--shared", "--no-checkout", top, str(folder))
    _git(text, folder, "checkout", "--quiet", "--detach", commit)
    return Version(commit[:12], folder.resolve())


def _git(text: str, folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=_GIT_TAKES_S
        )
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        raise _refused(text, _last_line(reason)) from None
    return done.stdout.strip()


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "git printed nothing"


def _refused(text: str, reason: str) -> UserError:
    return UserError(
        f"--against: {text} is not allowed: {reason}"
        " (allowed: a commit of the checkout that scaletrain runs from, or the folder of another)"
    )

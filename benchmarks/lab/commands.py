"""Commands that a benchmark times."""

import subprocess
from collections.abc import Sequence

from scaletrain.errors import UserError


def run(argv: Sequence[str], who: str, timeout_s: float) -> None:
    """Run a command to its end.

    Args:
        argv: the command.
        who: the beginning of an error's line.
        timeout_s: that it may take.

    Raises:
        UserError: it failed; the last line of its errors says why.
    """
    done = subprocess.run(argv, capture_output=True, text=True, timeout=timeout_s)
    if done.returncode != 0:
        raise UserError(f"{who}: {done.stderr.strip().splitlines()[-1]}")

"""The command ``scaletrain``: its verbs are files of this folder (``commands``)."""

import os
import signal
from typing import Any


def main() -> None:
    """Run the console script.

    Until all commands can answer it, Ctrl-C ends this process in one line, without a traceback.
    """
    # In the background of a script it is ignored, and stays so.
    hears_interrupts = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if hears_interrupts:
        signal.signal(signal.SIGINT, _end_at_once)
    from scaletrain.cli import commands

    if hears_interrupts:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    commands.run()


def _end_at_once(number: int, frame: Any) -> None:
    os.write(2, b"scaletrain: stopped by SIGINT\n")
    # Nothing has been started, and an exception would surface in the middle of an import.
    os._exit(128 + number)


def __getattr__(name: str) -> Any:
    if name != "cli":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from scaletrain.cli.commands import cli

    return cli

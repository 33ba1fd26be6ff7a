"""The groups of commands, and how a command ends.

Verbs are files of this folder: one that defines ``command`` is a verb of its name. Benchmarks, the
verbs below ``scaletrain bench``, are found in ``bench/`` in the same way. A verb is imported when
it is called, and does its own imports when it runs: help is quick, and needs no torch.
"""

import errno
import io
import os
import signal
import sys
from pathlib import Path
from typing import Any

import click

from scaletrain import __version__, plugins
from scaletrain.errors import UserError, unknown
from scaletrain.host import init


class PluginGroup(click.Group):
    """Commands that are plugins of one kind, imported when they are asked for.

    Args:
        kind: of plugin (``plugins.KINDS``). Its files are the commands.
    """

    def __init__(self, *args: Any, kind: str, **attributes: Any):
        super().__init__(*args, **attributes)
        self._kind = kind

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands, as they are typed, in alphabetical order."""
        found = [plugins.typed_name(self._kind, name) for name in plugins.names(self._kind)]
        return sorted([*super().list_commands(ctx), *found])

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Return a command, or None if there is none of this name."""
        built_in = super().get_command(ctx, name)
        if built_in is not None:
            return built_in
        # Commands are typed with dashes, and files are modules, whose names have none.
        file_name = name.replace("-", "_")
        # Only this file is read, so that a broken file of another verb does not matter.
        if not plugins.exists(self._kind, file_name):
            return None
        command: click.Command = plugins.load(self._kind, file_name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that ``args`` begins with. An unknown name shows the nearest match."""
        if self.get_command(ctx, args[0]) is None:
            raise unknown(ctx.command_path, args[0], self.list_commands(ctx))
        return super().resolve_command(ctx, args)


@click.group(
    cls=PluginGroup,
    kind="verb",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__)
def cli() -> None:
    """Train a PyTorch model on 1..N workers, and choose how gradients are exchanged.

    scaletrain measures, explains and predicts how well the training scales.

    \b
    Examples:
      scaletrain train examples/digits.yaml --workers 2 --exchange ring
      scaletrain bench scaling examples/digits.yaml --workers 1,2
    """


@cli.group(cls=PluginGroup, kind="bench")
def bench() -> None:
    """Measure scaling, collectives, the parameter server, or a model.

    \b
    Example:
      scaletrain bench scaling examples/digits.yaml --workers 1,2 --exchange native,ring,none
    """


def run() -> None:
    """Run the command that ``sys.argv`` holds, and exit with its status.

    A person's mistake ends in one line and status 2. SIGTERM and SIGHUP end in the same clean-up as
    Ctrl-C.
    """
    # A shell or a scheduler may ignore SIGCHLD and block signals, and programs inherit both: the
    # status of a child would be lost.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    if os.getpid() == 1:
        init.stay_behind()
    # A name that a terminal cannot show must not end a command.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # sys.exit raises in the main thread, so that every `finally` and `with` on the way out runs.
    # By default these signals would end the process on the spot.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # under nohup, SIGHUP stays ignored
            signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        # Not standalone: click would print errors in a form of its own, and exit by itself.
        status = cli(prog_name="scaletrain", standalone_mode=False)
    # A subclass of ClickException, so it comes before it: help is shown as it is, not as a mistake.
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        status = error.exit_code
    except click.ClickException as error:
        status = _report_mistake(error.format_message())
    except UserError as error:
        status = _report_mistake(str(error))
    except OSError as error:
        message = _about_the_directory() or _about_a_named_path(error)
        # An error about a path that nobody typed is a bug of ours: its traceback is wanted.
        if not message:
            raise
        status = _report_mistake(message)
    except click.Abort:  # Ctrl-C, where no supervisor has answered it
        click.echo("scaletrain: stopped by SIGINT", err=True)
        status = 128 + signal.SIGINT
    sys.exit(status)


def _report_mistake(message: str) -> int:
    about_directory = _about_the_directory()
    if about_directory and about_directory != message:
        message += f"; {about_directory}"
    click.echo(f"scaletrain: error: {message}", err=True)
    return 2


def _about_the_directory() -> str:
    """Return the line for a working directory that has been removed; empty if it is there."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return "the working directory has been removed (cd to one that is there)"
    return ""


def _about_a_named_path(error: OSError) -> str:
    """Return the line for a path on the command line that cannot be read or written.

    Paths below ``runs``, the default directory, count as named. The line is empty if the error is
    about another path: then it is not the person's mistake.
    """
    # A failed write to an open file carries no name. If the disk is full, that says enough.
    if not isinstance(error.filename, str):
        disk_is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return str(error.strerror) if disk_is_full else ""
    failed = Path(error.filename).resolve()
    # "--out=x" is two words, as "--out x" is.
    words = [word for argument in sys.argv[1:] for word in argument.split("=", 1)]
    words.append("runs")
    best_match = ""
    longest = 0
    for before, word in zip(["", *words], words, strict=False):
        # Related in either direction: the failed path is often a file below the named directory,
        # and sometimes a parent of it that cannot be made.
        named = Path(word).resolve()
        is_related = failed.is_relative_to(named) or named.is_relative_to(failed)
        if not word or not is_related or len(named.parts) < longest:
            continue
        # The longest related word names the path best: a folder such as "." is related to much.
        longest = len(named.parts)
        best_match = f"{before} {word}" if before.startswith("-") else word
    return f"{best_match}: {error.strerror}" if best_match else ""

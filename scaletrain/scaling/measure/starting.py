"""Start the runs of a sweep, each as a command of its own.

One server imports torch for all of them (``host.forkserver``). It forks the command, which forks
its supervisor, which forks the workers: each has a server of its own, so that everything is a child
of the process that has started it.
"""

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from scaletrain.host.forkserver import Forked, Order, Server
from scaletrain.host.processes import dies_with_parent
from scaletrain.launching.job import Program

_LOADED = (Program.TRAINING, Program.SUPERVISOR, Program.COMMAND_LINE)
_LOADS_WITHIN_S = 120.0


class Starter:
    """Starts commands, warm if that is possible. Use it as a context manager.

    Args:
        server: forks commands of ours; None: all start cold.
    """

    def __init__(self, server: Server | None = None):
        self._server = server

    @classmethod
    def warm(cls, threads: int) -> "Starter":
        """Return one that has loaded torch.

        Args:
            threads: of each worker that its commands start.
        """
        # As the workers' launcher will set it: libraries read it when they are loaded.
        environ = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        modules = [program.value for program in _LOADED]
        server = Server.start(Program.FORKSERVER.command(*modules), environ)
        # Before anything is measured, which this would disturb.
        server.is_ready(_LOADS_WITHIN_S)
        return cls(server)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Let the server end."""
        if self._server:
            self._server.close()

    def start(
        self, command: Sequence[str], output: int, environ: Mapping[str, str] | None = None
    ) -> "subprocess.Popen[bytes] | Forked":
        """Start a command in a session of its own.

        Ctrl-C in the terminal then reaches the sweep alone, which stops the run in order. If the
        sweep is killed, the command gets SIGTERM.

        Args:
            command: the command.
            output: the descriptor of a file for both output streams.
            environ: of a command that starts cold; None: this process's, warm if possible.
        """
        forked = None
        if environ is None:
            forked = self._fork(command, output)
        return forked or subprocess.Popen(
            command,
            env=os.environ if environ is None else environ,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=dies_with_parent(signal.SIGTERM),
        )

    def _fork(self, command: Sequence[str], output: int) -> Forked | None:
        arguments = Program.COMMAND_LINE.arguments_of(command)
        if self._server is None or arguments is None:
            return None
        order = Order(
            Program.COMMAND_LINE.value,
            arguments,
            dict(os.environ),
            os.getpid(),
            computes=False,
            death_signal=signal.SIGTERM,
            new_session=True,
            serves=True,
        )
        return self._server.fork(order, stdout=output, stderr=subprocess.STDOUT)

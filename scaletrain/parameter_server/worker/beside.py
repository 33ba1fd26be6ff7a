"""A parameter server that runs beside a worker, as a process that the worker starts."""

import subprocess
import threading
from pathlib import Path

from scaletrain.parameter_server.protocol import placement
from scaletrain.parameter_server.protocol.settings import Settings


class ServerBeside:
    """Server ``index``, run by this worker.

    It is started again when it dies, as often as the settings say, and ends with the worker.

    Args:
        settings: of the job.
        run_dir: the job's directory.
        index: the server's number.
    """

    def __init__(self, settings: Settings, run_dir: Path, index: int):
        self._argv = (*placement.command(settings, run_dir, index), "--until-left")
        self._restarts = settings.restart_servers
        # Written by ``close``, read by the watching thread: the end of the server is no failure.
        self._closing = False
        # Written by the watching thread, read by ``close``.
        self._process: subprocess.Popen[bytes] | None = None
        # The kernel ends the server with the *thread* that started it (PR_SET_PDEATHSIG). This
        # thread lives as long as the worker.
        self._thread = threading.Thread(target=self._watch, name=f"server-{index}", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        """Start the server, and start it again when it dies."""
        for _ in range(1 + self._restarts):
            self._process = subprocess.Popen(self._argv)
            # Status 0: all workers have left (``--until-left``).
            if self._process.wait() == 0 or self._closing:
                return

    def close(self) -> None:
        """Wait until the server has ended, as it does when all workers have left."""
        self._closing = True
        self._thread.join(timeout=10)
        if self._thread.is_alive() and self._process:
            self._process.terminate()
            self._thread.join(timeout=10)

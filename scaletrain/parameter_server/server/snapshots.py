"""When a server writes a snapshot, and whether the one it finds is its own."""

import os
import time
from pathlib import Path
from typing import Any

import psutil

from scaletrain.parameter_server.protocol.settings import Settings
from scaletrain.parameter_server.server import shard


class Snapshots:
    """The snapshot ``path`` of one server: the newest replaces the one before, whole or not at all."""

    def __init__(self, settings: Settings, path: Path):
        self._settings, self._path, self._job = settings, path, _launch_mark()
        self._saved_s = time.monotonic()
        self.saved_at = 0  # updates
        self.restored_at: int | None = None

    def found(self) -> dict[str, Any] | None:
        """The header of a snapshot that this server wrote in an earlier life under the same launch."""
        header = shard.read_header(self._path) if self._settings.restart_servers else None
        return header if header is not None and header["job"] == self._job else None

    def load(self, into: shard.Shard) -> dict[str, int]:
        """Weights and optimizers; returns each block's version. Raises ``ValueError`` for a damaged file."""
        header = into.load(self._path)
        self.restored_at = self.saved_at = min(header["versions"].values(), default=0)
        self._saved_s = time.monotonic()
        return header["versions"]

    def due(self, updates: int) -> bool:
        every, seconds = self._settings.snapshot_updates, self._settings.snapshot_s
        if updates == self.saved_at:
            return False
        return bool(
            (every and updates - self.saved_at >= every)
            or (seconds and time.monotonic() - self._saved_s >= seconds)
        )

    def save(self, owned: shard.Shard, setup: dict[str, Any], versions: dict[int, int]) -> None:
        header = {
            "job": self._job,
            "setup": setup,
            "versions": {str(key): version for key, version in versions.items()},
        }
        owned.save(self._path, header)
        self.saved_at, self._saved_s = min(versions.values(), default=0), time.monotonic()


def _launch_mark() -> str:
    """Names the launch this process belongs to: its parent, which stays the same when it starts a server again."""
    parent = psutil.Process(os.getppid())
    return f"{parent.pid} {parent.create_time()}"

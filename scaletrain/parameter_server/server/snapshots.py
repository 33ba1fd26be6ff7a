"""Snapshots of a server: when it writes one, and the format of the file.

A snapshot is a safetensors file with ``weights.KEY`` and ``state.KEY.NAME`` for every block. Its
metadata holds JSON: numbers of the optimizers, schedules, and a header (``SnapshotHeader``).
"""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from scaletrain.parameter_server.protocol.consistency import RuleState
from scaletrain.parameter_server.protocol.settings import Settings
from scaletrain.parameter_server.server.shard import ModelDescription, OptimizerState, Shard
from scaletrain.run.atomic import partial_name, replacing

_FORMAT = "scaletrain-parameter-server-4"


@dataclass(frozen=True)
class SnapshotHeader:
    """The facts about a snapshot that are read before its tensors."""

    job: str  # the launch that the server belonged to
    description: ModelDescription
    rule: RuleState
    tally: dict[str, Any]  # ``Tally.counts``

    def to_json(self) -> dict[str, Any]:
        """Return the header for the file's metadata."""
        return {
            "job": self.job,
            "setup": self.description.to_json(),
            "rule": self.rule.to_json(),
            "tally": self.tally,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "SnapshotHeader":
        """Return the header in a file's metadata."""
        return cls(
            job=value["job"],
            description=ModelDescription.from_json(value["setup"]),
            rule=RuleState.from_json(value["rule"]),
            tally=value["tally"],
        )


class Snapshots:
    """The snapshot file of one server. Each one replaces the one before, whole or not at all.

    Used by the server's only thread.

    Args:
        settings: of the job.
        path: of the file.

    Attributes:
        saved_at: updates of the least updated block in the last snapshot.
        restored_at: the same of the snapshot that this server began with; None: with none.
    """

    def __init__(self, settings: Settings, path: Path):
        self._settings = settings
        self._path = path
        self._job = _launch_mark()
        self._last_saved = time.monotonic()
        # Workers that were absent in the last snapshot: a successor must not wait for them.
        self._absent: frozenset[int] = frozenset()
        self.saved_at = 0
        self.restored_at: int | None = None

    def find(self) -> SnapshotHeader | None:
        """Return the header of a snapshot that this server wrote in an earlier life.

        None if there is none, or if it belongs to another launch. Files that an earlier life was
        writing when it was killed are removed.
        """
        for partial in self._path.parent.glob(partial_name(self._path.name, "*")):
            partial.unlink(missing_ok=True)
        if not self._settings.restart_servers:
            return None
        header = _read_header(self._path)
        if header is None or header.job != self._job:
            return None
        return header

    def load(self, shard: Shard) -> SnapshotHeader:
        """Take weights and optimizer state from the snapshot of the same blocks.

        Returns:
            The rest.

        Raises:
            ValueError: the file is damaged.
        """
        header = _load(self._path, shard)
        self._note(header.rule)
        self.restored_at = self.saved_at
        return header

    def due(self, updates: int, lost: set[int]) -> bool:
        """Return True if a snapshot is due.

        Args:
            updates: of the least updated block.
            lost: ranks of the workers that are lost.
        """
        settings = self._settings
        if settings.restart_servers and not lost <= self._absent:
            return True
        new_updates = updates - self.saved_at
        # The file on the disk is up to date, however old it is.
        if new_updates == 0:
            return False
        if settings.snapshot_updates and new_updates >= settings.snapshot_updates:
            return True
        age_s = time.monotonic() - self._last_saved
        return settings.snapshot_s is not None and age_s >= settings.snapshot_s

    def save(self, shard: Shard, rule: RuleState, tally: dict[str, Any]) -> None:
        """Write a snapshot of blocks with the rule's state and the counts (``Tally.counts``)."""
        _save(self._path, shard, SnapshotHeader(self._job, shard.description, rule, tally))
        self._note(rule)

    def _note(self, rule: RuleState) -> None:
        """Note what the file holds now."""
        self.saved_at = min(rule.versions.values(), default=0)
        self._absent = rule.lost
        self._last_saved = time.monotonic()


def _save(path: Path, shard: Shard, header: SnapshotHeader) -> None:
    """Write all blocks of a shard to ``path``, atomically."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, float]] = {}
    schedules: dict[str, dict[str, Any]] = {}
    for key in shard.blocks:
        tensors[f"weights.{key}"] = shard.weights(key).contiguous()
        state = shard.state(key)
        numbers[str(key)] = state.numbers
        for name, tensor in state.tensors.items():
            tensors[f"state.{key}.{name}"] = tensor.contiguous()
        schedule = shard.schedule_state(key)
        if schedule is not None:
            schedules[str(key)] = schedule
    rest = {
        "header": header.to_json(),
        "numbers": numbers,
        "schedules": schedules,
        "time": time.time(),
    }
    with replacing(path) as partial:
        save_file(tensors, partial, {"format": _FORMAT, "rest": json.dumps(rest)})


def _load(path: Path, shard: Shard) -> SnapshotHeader:
    """Read a snapshot into a shard of the same blocks. Raises ``ValueError`` if it is damaged."""
    states = {key: OptimizerState() for key in shard.blocks}
    try:
        with safe_open(path, framework="pt") as file:
            rest = json.loads(file.metadata()["rest"])
            for key in shard.blocks:
                shard.weights(key).copy_(file.get_tensor(f"weights.{key}"))
            for name in file.keys():  # noqa: SIM118 (not a dict)
                if name.startswith("state."):
                    # Split twice only: the rest names a piece and the optimizer's tensor.
                    _, key_text, entry = name.split(".", 2)
                    states[int(key_text)].tensors[entry] = file.get_tensor(name)
    except (SafetensorError, OSError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path}: damaged snapshot: {error}") from None
    for key, state in states.items():
        state.numbers = rest["numbers"].get(str(key), {})
        shard.load_state(key, state)
        # After ``load_state``, which only steps a fresh schedule forward: this sets it as it was.
        if str(key) in rest["schedules"]:
            shard.load_schedule_state(key, rest["schedules"][str(key)])
    return SnapshotHeader.from_json(rest["header"])


def _read_header(path: Path) -> SnapshotHeader | None:
    """Return the header of a snapshot; None if there is no usable one."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        if metadata.get("format") != _FORMAT:
            return None
        return SnapshotHeader.from_json(json.loads(metadata["rest"])["header"])
    except (SafetensorError, OSError, ValueError, KeyError):
        return None


def _launch_mark() -> str:
    """Return a text that names the launch that this process belongs to.

    It is made of the parent, which stays the same when it starts a server again.
    """
    # A process id is used again in time. Together with the start it is not.
    parent = psutil.Process(os.getppid())
    return f"{parent.pid} {parent.create_time()}"

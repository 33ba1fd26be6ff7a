"""The job's key-value store, in which only values of the job's own processes count.

torch's store has no authentication: whoever reaches its port reads and writes it. Under
``SealedStore``, every value carries a proof by the job's key. Others can still end the job, by a
value that is refused with an error or by removing one, and they can read; they cannot change what
the job does.
"""

import fcntl
import os
import secrets
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from scaletrain.run.job_key import job_key, private_directory

# C++ keeps the C++ half of a store alive, and not its Python half. Every store that was made stays
# here, as long as the process: a job has one or two.
_kept: list["SealedStore"] = []


class SealedStore(dist.Store):
    """A store whose values are sealed by the job's key.

    torch's own backends and ``PrefixStore`` use it like any other. Counters (``add``) are not
    sealed: torch's barriers use them, and nothing of ours.

    Args:
        store: holds the sealed values.
        run_dir: holds the job's key.
        scope: names this store, apart from others that the job had before.
    """

    def __init__(self, store: dist.Store, run_dir: Path, scope: str = ""):
        super().__init__()
        self._store: Any = store
        self._run_dir = run_dir
        self._key = job_key(run_dir)
        self._scope = scope
        self._file: dist.Store | None = None
        _kept.append(self)

    @property
    def unsealed(self) -> dist.Store:
        """The store below, whose values anybody can change."""
        return self._store

    def without_python(self, *, on_one_host: bool) -> dist.Store:
        """Return a store for threads of C++ that outlive Python. See ``for_nccl``."""
        if not on_one_host:
            return self.unsealed
        if self._file is None:
            # The ranks agree on a name that no earlier job or attempt has used.
            name = self.compare_set("file for nccl", "", secrets.token_hex(8)).decode()
            path = private_directory(self._run_dir) / f"nccl-{name}"
            if not _can_lock(path):
                return self.unsealed
            self._file = dist.FileStore(str(path), -1)  # -1: others may still come to it
        return self._file

    def _seal(self, name: str, value: str | bytes) -> bytes:
        raw = value.encode() if isinstance(value, str) else value
        return self._key.seal(f"{self._scope}/{name}", raw)

    def _unseal(self, name: str, sealed: bytes) -> bytes:
        return self._key.unseal(f"{self._scope}/{name}", sealed)

    def set(self, key: str, value: str | bytes) -> None:
        """Write a value."""
        self._store.set(key, self._seal(key, value))

    def get(self, key: str) -> bytes:
        """Wait for a value, and return it. Raises ``UserError`` if somebody else wrote it."""
        return self._unseal(key, self._store.get(key))

    def compare_set(
        self, key: str, expected_value: str | bytes, desired_value: str | bytes
    ) -> bytes:
        """Write a value if the present one is the expected one, or there is none and it is empty.

        Returns:
            The value that is there afterwards. Raises ``UserError`` if somebody else wrote it.
        """
        expected = self._seal(key, expected_value) if expected_value else b""
        desired = self._seal(key, desired_value)
        return self._unseal(key, self._store.compare_set(key, expected, desired))

    def check(self, keys: list[str]) -> bool:
        """Return True if all keys are there, whoever wrote them."""
        return self._store.check(keys)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Wait until all keys are there, whoever wrote them."""
        if timeout is None:
            self._store.wait(keys)
        else:
            self._store.wait(keys, timeout)

    def add(self, key: str, amount: int) -> int:
        """Add to a counter; it is not sealed."""
        return self._store.add(key, amount)

    def has_extended_api(self) -> bool:
        """Return True: ``multi_get`` and ``multi_set`` work, ``append`` does not."""
        return True

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """Wait for values, and return them. Raises ``UserError`` if somebody else wrote one."""
        if not self._store.has_extended_api():
            return [self.get(key) for key in keys]
        values = self._store.multi_get(keys)
        return [self._unseal(key, value) for key, value in zip(keys, values, strict=True)]

    def multi_set(self, keys: list[str], values: list[str | bytes]) -> None:
        """Write several values."""
        for key, value in zip(keys, values, strict=True):
            self.set(key, value)

    def set_timeout(self, timeout: timedelta) -> None:
        """Limit every wait from now on."""
        self._store.set_timeout(timeout)

    @property
    def timeout(self) -> timedelta:
        """The limit of a wait."""
        return self._store.timeout

    def clone(self) -> "SealedStore":
        """Return the same store, over a connection of its own."""
        return SealedStore(self._store.clone(), self._run_dir, self._scope)


def _can_lock(path: Path) -> bool:
    """Return whether the file system locks files, as ``FileStore`` does: some network ones cannot.

    Made here, the file is the owner's alone.
    """
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o600)) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH)
        except OSError:
            return False
    return True


def sealed(store: dist.Store, run_dir: Path, scope: str = "") -> SealedStore:
    """Return the store under the job's key; one that is sealed already, as it is."""
    if isinstance(store, SealedStore):
        return store
    return SealedStore(store, run_dir, scope)


def for_nccl(store: dist.Store, *, on_one_host: bool) -> dist.Store:
    """Return where NCCL's processes meet, in place of a sealed store. Every rank calls this.

    NCCL's threads look into their store until the end of the process, when Python, which checks
    the seals, may be gone. So they get one that is C++ alone: on one host a file that only the
    job's owner can open. On several, whose network NCCL trusts anyway, or if the run directory's
    file system cannot lock files, it is the store below the seals.

    Args:
        store: the job's; one without seals is returned as it is.
        on_one_host: all ranks of the group share a host. They say the same.
    """
    if isinstance(store, SealedStore):
        return store.without_python(on_one_host=on_one_host)
    return store

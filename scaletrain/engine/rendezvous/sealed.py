"""The job's key-value store, in which only values of the job's own processes count.

torch's store has no authentication: whoever reaches its port reads and writes it. Under
``SealedStore``, every value carries a proof by the job's key. Others can still end the job, by a
value that is refused with an error or by removing one, and they can read; they cannot change what
the job does.
"""

from datetime import timedelta
from typing import Any

import torch.distributed as dist

from scaletrain.run.job_key import JobKey

# C++ keeps the C++ half of a store alive, and not its Python half. Every store that was made stays
# here, as long as the process: a job has one or two.
_kept: list["SealedStore"] = []


class SealedStore(dist.Store):
    """A store whose values are sealed by the job's key.

    torch's own backends and ``PrefixStore`` use it like any other. Counters (``add``) are not
    sealed: torch's barriers use them, and nothing of ours.

    Args:
        store: holds the sealed values.
        key: the job's.
        scope: names this store, apart from others that the job had before.
    """

    def __init__(self, store: dist.Store, key: JobKey, scope: str = ""):
        super().__init__()
        self._store: Any = store
        self._key = key
        self._scope = scope
        _kept.append(self)

    @property
    def unsealed(self) -> dist.Store:
        """The store below, whose values anybody can change."""
        return self._store

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
        return SealedStore(self._store.clone(), self._key, self._scope)


def sealed(store: dist.Store, key: JobKey, scope: str = "") -> SealedStore:
    """Return the store under the job's key; one that is sealed already, as it is."""
    if isinstance(store, SealedStore):
        return store
    return SealedStore(store, key, scope)


def unsealed(store: dist.Store) -> dist.Store:
    """Return the store below a sealed one; any other one as it is."""
    return store.unsealed if isinstance(store, SealedStore) else store

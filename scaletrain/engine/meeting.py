"""Values that the ranks of a group tell each other through their store."""

import os
from collections.abc import Iterable, Sequence
from datetime import timedelta
from pathlib import Path

from scaletrain.engine.transport import Group
from scaletrain.run import progress

_LEAST_WAIT = timedelta(seconds=1)  # ranks have this long to come, however short the timeout is
# Two containers, or two emulated hosts, run on the same kernel. These kinds tell them apart.
_NAMESPACES = ("net", "pid", "user")


@progress.waiting("the other ranks")
def values_of_all(group: Group, key: str, value: str) -> list[str]:
    """Return the value of every rank, in the order of the ranks. Collective.

    Args:
        group: the ranks.
        key: names the value; the group uses each key once.
        value: this rank's value.

    Raises:
        TimeoutError: some ranks did not come in time; names them.
        ConnectionError: the store is gone.
    """
    group.store.set(f"{key}/{group.rank}", value)
    keys = [f"{key}/{rank}" for rank in range(group.size)]
    wait_for_keys(group, keys, range(group.size))
    return [group.store.get(key).decode() for key in keys]


def wait_for_keys(group: Group, keys: list[str], owners: Sequence[int]) -> None:
    """Wait until every key is in the store.

    Args:
        group: the ranks.
        keys: the keys.
        owners: for each key, the rank that sets it.

    Raises:
        TimeoutError: some keys are missing; names the ranks that should have set them.
        ConnectionError: the store is gone.
    """
    try:
        group.store.wait(keys, max(group.timeout, _LEAST_WAIT))
    except RuntimeError as error:
        # Both a time-out and a store that is gone end up here. Asking once more tells them apart.
        missing = _ranks_of_missing_keys(group, keys, owners, error)
        raise TimeoutError(
            f"{ranks_in_words(missing)} did not join the group:"
            f" timed out after {group.timeout.total_seconds():g} s"
        ) from error


def _ranks_of_missing_keys(
    group: Group, keys: list[str], owners: Sequence[int], cause: RuntimeError
) -> list[int]:
    missing = []
    try:
        for key, rank in zip(keys, owners, strict=True):
            if not group.store.check([key]):
                missing.append(group.name(rank))
    except RuntimeError:
        raise ConnectionError("the store where the ranks meet is gone") from cause
    return missing


def ranks_in_words(ranks: Iterable[int]) -> str:
    """Return the ranks as an error message names them.

    >>> ranks_in_words([2]), ranks_in_words([0, 3])
    ('rank 2', 'ranks 0, 3')
    """
    numbers = [str(rank) for rank in ranks]
    noun = "ranks" if len(numbers) > 1 else "rank"
    return f"{noun} {', '.join(numbers)}"


def host_of_each_rank(group: Group) -> list[str]:
    """Return a name of every rank's host. Collective.

    Ranks with equal names share memory and a network. The names mean nothing else.

    Raises:
        TimeoutError, ConnectionError: as ``values_of_all``.
    """
    # Machines may share a host name, but every boot of a kernel has an id of its own.
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    namespaces = [str(os.stat(f"/proc/self/ns/{kind}").st_ino) for kind in _NAMESPACES]
    return values_of_all(group, "host", "/".join([boot, *namespaces]))

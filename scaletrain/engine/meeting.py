"""The facts that the ranks of a group exchange through their store."""

import json
import os
import time
from collections.abc import Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from scaletrain.engine.transport import Group, Member
from scaletrain.host.processes import start_ticks
from scaletrain.host.stopwatch import Stopwatch
from scaletrain.run import progress

_LEAST_WAIT = timedelta(seconds=1)  # ranks have this long to come, however short the timeout is
# A look at the store takes 60 us. The pauses between looks grow: most waits are short.
_SHORTEST_PAUSE_S = 0.2e-3
_LONGEST_PAUSE_S = 20e-3
_PAUSE_GROWTH = 1.3
_CHECK_ALIVE_S = 0.2  # how often a rank that waits looks whether the others' processes are alive
# Two containers, or two emulated hosts, run on the same kernel. These kinds tell them apart.
_NAMESPACES = ("net", "pid", "user")


def introduce(store: dist.Store, rank: int) -> None:
    """Write this process into the store, without waiting for the others.

    Args:
        store: as ``known_members`` reads it.
        rank: this rank.
    """
    pid = os.getpid()
    member = Member(_host(), pid, start_ticks(pid) or 0, tuple(sorted(os.sched_getaffinity(0))))
    store.set(f"member/{rank}", json.dumps(member))


def known_members(store: dist.Store, size: int) -> tuple[Member, ...]:
    """Return the members. All of them must have called ``introduce`` before."""
    keys = [f"member/{rank}" for rank in range(size)]
    members = []
    for value in _values(store, keys):
        host, pid, started, cores = json.loads(value)
        members.append(Member(host, pid, started, tuple(cores)))
    return tuple(members)


@progress.waiting("the other ranks")
def introduced(group: Group) -> Group:
    """Return the group with its members. Collective, unless they are known already.

    Raises:
        TimeoutError, ConnectionError: as ``values_of_all``.
    """
    if group.members:
        return group
    introduce(group.store, group.rank)
    keys = [f"member/{rank}" for rank in range(group.size)]
    wait_for_keys(group, keys, range(group.size))
    return group._replace(members=known_members(group.store, group.size))


@progress.waiting("the other ranks")
def values_of_all(group: Group, key: str, value: str) -> list[str]:
    """Return the value of every rank, in the order of the ranks. Collective.

    Args:
        group: the ranks.
        key: names the value; the group uses each key once.
        value: this rank's value.

    Raises:
        TimeoutError: some ranks did not come in time; names them.
        ConnectionError: a rank has ended, or the store is gone.
    """
    group.store.set(f"{key}/{group.rank}", value)
    keys = [f"{key}/{rank}" for rank in range(group.size)]
    wait_for_keys(group, keys, range(group.size))
    return _values(group.store, keys)


def wait_for_keys(group: Group, keys: list[str], owners: Sequence[int]) -> None:
    """Wait until every key is in the store.

    It looks again and again instead of waiting at the store. So signals come through, it notices
    ranks and groups that have ended, and threads that share a connection to the store take turns.

    Args:
        group: the ranks.
        keys: the keys.
        owners: for each key, the rank that sets it.

    Raises:
        TimeoutError: some keys are missing; names the ranks that should have set them.
        ConnectionError: one of these ranks has ended, the group was ended, or the store is gone.
    """
    stopwatch = Stopwatch()
    checked_at_s = 0.0
    limit_s = max(group.timeout, _LEAST_WAIT).total_seconds()
    pause_s = _SHORTEST_PAUSE_S
    while not _are_set(group.store, keys):
        group.check_not_ended()
        waited_s = stopwatch.look()
        if waited_s > limit_s:
            missing = ranks_in_words(map(group.name, owners_of_missing(group.store, keys, owners)))
            raise TimeoutError(
                f"{missing} did not join the group:"
                f" timed out after {group.timeout.total_seconds():g} s"
            )
        if waited_s - checked_at_s > _CHECK_ALIVE_S:
            checked_at_s = waited_s
            _check_alive(group, keys, owners)
        time.sleep(pause_s)
        pause_s = min(_PAUSE_GROWTH * pause_s, _LONGEST_PAUSE_S)


def _check_alive(group: Group, keys: list[str], owners: Sequence[int]) -> None:
    """Raise ConnectionError if a rank of this host has ended before it set its key."""
    if not group.members:
        return
    here = group.members[group.rank].host
    ended = [r for r in set(owners) if group.members[r].host == here and not is_alive(group, r)]
    # Its last act may have been to set the key, so the keys are looked at once more.
    missing = set(owners_of_missing(group.store, keys, owners)) if ended else set()
    for rank in ended:
        if rank in missing:
            raise lost(group, rank)


def is_alive(group: Group, rank: int) -> bool:
    """Return True if the process of a rank of this host has not ended."""
    member = group.members[rank]
    return start_ticks(member.pid) == member.started


def lost(group: Group, rank: int) -> ConnectionError:
    """Return the error that says a rank's process has ended."""
    pid = group.members[rank].pid
    return ConnectionError(f"peer rank {group.name(rank)} (process {pid}) is lost: it has ended")


def _are_set(store: dist.Store, keys: list[str]) -> bool:
    try:
        return bool(store.check(keys))
    except RuntimeError as error:
        raise ConnectionError("the store where the ranks meet is gone") from error


def owners_of_missing(store: dist.Store, keys: list[str], owners: Sequence[int]) -> list[int]:
    """Return the ranks that own the keys that the store lacks.

    Raises:
        ConnectionError: the store is gone.
    """
    return [rank for key, rank in zip(keys, owners, strict=True) if not _are_set(store, [key])]


def _values(store: Any, keys: list[str]) -> list[str]:
    """Return the values of keys that are in the store."""
    try:
        if store.has_extended_api():
            return [value.decode() for value in store.multi_get(keys)]
        return [store.get(key).decode() for key in keys]
    except RuntimeError as error:
        raise ConnectionError("the store where the ranks meet is gone") from error


def ranks_in_words(ranks: Iterable[int]) -> str:
    """Return the ranks as an error message names them.

    >>> ranks_in_words([2]), ranks_in_words([0, 3])
    ('rank 2', 'ranks 0, 3')
    """
    numbers = [str(rank) for rank in ranks]
    noun = "ranks" if len(numbers) > 1 else "rank"
    return f"{noun} {', '.join(numbers)}"


def host_of_each_rank(group: Group) -> list[str]:
    """Return a name of every rank's host. Collective, unless the members are known.

    Ranks with equal names share memory and a network. The names mean nothing else.

    Raises:
        TimeoutError, ConnectionError: as ``values_of_all``.
    """
    return [member.host for member in introduced(group).members]


def _host() -> str:
    # Machines may share a host name, but every boot of a kernel has an id of its own.
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    namespaces = [str(os.stat(f"/proc/self/ns/{kind}").st_ino) for kind in _NAMESPACES]
    return "/".join([boot, *namespaces])

"""Who entered which collective: counted on every rank, asked when one has failed."""

import time
from datetime import timedelta

import torch.distributed as dist

_ANSWER_S = 2.0  # within which ranks that fail in the same collective say so
# Some ranks of these need not wait for the others, and may have left.
_ONE_SIDED = ("broadcast", "gather", "reduce", "scatter")


class RollCall:
    """Numbers a group's collectives from 1, in the order in which they are called, which is the same on every rank."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta):
        self._store, self._rank, self._size = store, rank, size
        self._answer_s = min(_ANSWER_S, timeout.total_seconds())
        self._called = 0

    def next(self) -> int:
        """The number of the collective that is called now."""
        self._called += 1
        return self._called

    def explain(self, name: str, number: int, error: BaseException) -> str:
        """What went wrong in a collective, and where the other ranks are. Waits for their answers for up to two seconds: who notices
        a failure does so at nearly the same time, and says so."""
        return f"{name} #{number}: {error}; {self._others(name, number)}"

    def _others(self, name: str, number: int) -> str:
        mine = f"{name} #{number}"
        at = {self._rank: mine}  # where each rank failed last
        try:
            # A connection of its own: a thread that still waits for a collective may hold the other one.
            store = dist.PrefixStore("roll/", self._store.clone())
            store.set(str(self._rank), mine)
            until = time.monotonic() + self._answer_s
            while (
                len([where for where in at.values() if _number(where) >= number]) < self._size
                and time.monotonic() < until
            ):
                time.sleep(0.05)
                for rank in range(self._size):
                    if rank != self._rank and store.check([str(rank)]):
                        at[rank] = store.get(str(rank)).decode()
        except RuntimeError:
            return "where the other ranks are is not known: the store where they meet is gone"
        # A rank that fails in a later one has this one behind it.
        elsewhere = {
            rank: where for rank, where in at.items() if where != mine and _number(where) <= number
        }
        told = [f"rank {rank} is in {where}" for rank, where in elsewhere.items()]
        if missing := [str(rank) for rank in range(self._size) if rank not in at]:
            left = " or has left it" if name in _ONE_SIDED else ""
            told.append(
                f"rank{'s' if len(missing) > 1 else ''} {', '.join(missing)} never entered it{left}"
            )
        return "; ".join(told) or "all ranks entered it"


def _number(collective: str) -> int:
    return int(collective.rpartition("#")[2])

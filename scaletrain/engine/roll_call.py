"""Which rank is in which collective: counted on every rank, asked for after a failure."""

import threading
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from scaletrain.engine.meeting import ranks_in_words
from scaletrain.errors import UserError
from scaletrain.run import flight
from scaletrain.timeouts import ANSWER_S

_LOOK_S = 0.05  # between looks at the store
# Some ranks of these collectives need not wait for the others, and may have left.
_ONE_SIDED = ("broadcast", "gather", "reduce", "scatter")


class RollCall:
    """Numbers a group's collectives from 1, in the order of the calls, equal on every rank.

    The roll call itself, when a collective has failed:

    1. Each rank that notices the failure writes its collective to the store, under its rank.
    2. It reads the others' collectives until all ranks have come as far, or two seconds have
       passed.
    3. The ranks that are in an earlier collective, or have written nothing, are the culprits.

    Ranks that notice a failure do so at nearly the same time. Rank r alone writes the key
    ``roll/r``.

    Args:
        store: over a connection on which no thread waits for long.
        rank: this rank in the group.
        size: number of ranks in the group.
        timeout: of the group.
        name: of the group, the same on all of its ranks and no other group's.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        size: int,
        timeout: timedelta,
        name: str = "group",
    ):
        self._store = store
        self._rank = rank
        self._size = size
        self._counting = threading.Lock()
        self._answer_s = min(ANSWER_S, timeout.total_seconds())
        # Collectives called so far. Every thread that calls one adds to it, under _counting.
        self.num_called = 0
        self._name = name
        # The group's number for the recorder of this process; None: not asked for yet.
        self._recorded_as: int | None = None

    def next(self) -> int:
        """Return the number of the collective that is being called."""
        with self._counting:
            self.num_called += 1
            return self.num_called

    def began(
        self, name: str, number: int, num_elements: int, dtype: torch.dtype | None
    ) -> int | None:
        """Record a collective that begins (``run.flight``); return its record, for ``ended``.

        Args:
            name: of the collective.
            number: as ``next`` returned it.
            num_elements: of this rank's tensor, or of its part of a larger one.
            dtype: of the tensor; None: there is no data.
        """
        recorder = flight.recorder
        # Only of groups of all ranks are the ranks known.
        if recorder is None or recorder.size != self._size or recorder.rank != self._rank:
            return None
        if self._recorded_as is None:
            self._recorded_as = recorder.group(self._name, range(self._size))
        in_words = str(dtype or torch.uint8).removeprefix("torch.")
        return recorder.began(self._recorded_as, name, number, num_elements, in_words)

    def ended(self, record: int | None) -> None:
        """Record that a collective has ended well."""
        if record is not None and flight.recorder is not None:
            flight.recorder.ended(record)

    def explain(self, name: str, number: int, error: BaseException, wanted: str = "") -> str:
        """Return a message with the failure of a collective, and where the other ranks are.

        It waits for their answers for up to two seconds.

        Args:
            name: of the collective, such as ``allreduce``.
            number: as ``next`` returned it.
            error: its failure.
            wanted: this rank's request in words, such as ``of 1,000 float32 (add)``.
        """
        return f"{name} #{number}: {error}; {self._others(name, number, wanted)}"

    def _others(self, name: str, number: int, wanted: str) -> str:
        mine = f"{name} #{number} {wanted}".rstrip()
        try:
            failed_in = self._ask(mine, number)
        except RuntimeError:
            return "where the other ranks are is not known: the store where they meet is gone"
        except UserError as forged:
            return f"where the other ranks are is not known: {forged}"
        findings = []
        for rank, collective in failed_in.items():
            # A rank that failed in a later collective has this one behind it.
            if collective != mine and _number(collective) <= number:
                findings.append(f"rank {rank} is in {collective}")
        if findings and wanted:
            findings.append(f"this rank is in {mine}")
        missing = [rank for rank in range(self._size) if rank not in failed_in]
        if missing:
            left = " or has left it" if name in _ONE_SIDED else ""
            findings.append(f"{ranks_in_words(missing)} never entered it{left}")
        return "; ".join(findings) or "all ranks entered it"

    def _ask(self, mine: str, number: int) -> dict[int, str]:
        """Return the collective in which each rank failed last, of those that say so.

        Raises:
            RuntimeError: the store is gone.
        """
        failed_in = {self._rank: mine}
        store = dist.PrefixStore("roll/", self._store)
        store.set(str(self._rank), mine)
        deadline = time.monotonic() + self._answer_s
        while not self._all_have_come(failed_in, number) and time.monotonic() < deadline:
            time.sleep(_LOOK_S)
            for rank in range(self._size):
                if rank != self._rank and store.check([str(rank)]):
                    failed_in[rank] = store.get(str(rank)).decode()
        return failed_in

    def _all_have_come(self, failed_in: dict[int, str], number: int) -> bool:
        """Return True if every rank has failed in this collective or a later one."""
        come = [collective for collective in failed_in.values() if _number(collective) >= number]
        return len(come) == self._size


def _number(collective: str) -> int:
    """Return the number in a text such as ``allreduce #7 of 10 float32 (add)``."""
    return int(collective.rpartition("#")[2].split()[0])

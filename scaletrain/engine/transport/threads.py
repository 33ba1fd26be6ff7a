"""Ranks are threads of one process: for tests, and for trying out an algorithm in a notebook."""

import queue
from collections import deque
from collections.abc import Sequence

from torch import Tensor

from scaletrain.engine.transport import Group, Pending, Receive, Transport

_boxes: dict[
    tuple[int, int, int], queue.SimpleQueue
] = {}  # (group, src, dst): what was sent and not yet received


class Threads:
    """Copies through queues; no process, no network."""

    def __init__(self, group: Group):
        self.rank, self.size = group.rank, group.size
        self._timeout_s = group.timeout.total_seconds()
        self._group = id(group.store)  # the ranks of a group share one store object
        self._open: deque[Pending] = deque()

    def _box(self, src: int, dst: int) -> queue.SimpleQueue:
        return _boxes.setdefault((self._group, src, dst), queue.SimpleQueue())

    def start(self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[Receive]) -> Pending:
        for peer, tensor in sends:
            self._box(self.rank, peer).put(tensor.clone())

        def finish() -> None:
            for receive in receives:
                try:
                    received = self._box(receive.src, self.rank).get(timeout=self._timeout_s)
                except queue.Empty:
                    raise TimeoutError(
                        f"rank {receive.src} did not answer: timed out after {self._timeout_s:g} s"
                    ) from None
                if receive.reduce is None:
                    receive.into.copy_(received)
                else:
                    receive.reduce(receive.into, received, out=receive.into)

        def wait() -> None:
            # Messages match in the order of the starts, whichever is waited for first.
            while finish in self._open:
                self._open.popleft()()

        self._open.append(finish)
        return wait

    def close(self) -> None:
        for key in [key for key in list(_boxes) if key[0] == self._group and self.rank in key[1:]]:
            _boxes.pop(key, None)


def transport(group: Group) -> Transport:
    return Threads(group)

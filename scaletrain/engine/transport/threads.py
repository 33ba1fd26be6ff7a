"""Ranks are threads of one process: for tests, and for trying an algorithm in a notebook."""

import queue
from collections import deque
from collections.abc import Sequence
from datetime import timedelta

from torch import Tensor

from scaletrain.engine.transport import Group, Receive, Transport, Wait

# By group, sender and receiver: the messages that were sent and not yet received. Any thread may
# make a box; the sender's thread fills it, and the receiver's thread empties it.
_boxes: dict[tuple[int, int, int], queue.SimpleQueue[Tensor]] = {}


class Threads:
    """Messages are copied through queues: no process, no network."""

    def __init__(self, group: Group):
        self.rank = group.rank
        self.size = group.size
        self._timeout_s = group.timeout.total_seconds()
        self._group = id(group.store)  # the ranks of a group share one store object
        # The starts that are not done yet, the oldest first. Used by this rank's thread alone.
        self._unfinished: deque[Wait] = deque()

    def _box(self, src: int, dst: int) -> queue.SimpleQueue[Tensor]:
        # One step, so that two threads that come at once get the same box.
        return _boxes.setdefault((self._group, src, dst), queue.SimpleQueue())

    def start(self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[Receive]) -> Wait:
        """Start to send and receive at once. See ``Transport.start``."""
        for peer, tensor in sends:
            # A copy: ``wait`` may end before the receiver reads it, and then the tensor may change.
            self._box(self.rank, peer).put(tensor.clone())

        def finish() -> None:
            for receive in receives:
                message = self._next_message(receive.src)
                if receive.reduce is None:
                    receive.into.copy_(message)
                else:
                    receive.reduce(receive.into, message, out=receive.into)

        def wait() -> None:
            # Messages match in the order of the starts, whichever is waited for first.
            while finish in self._unfinished:
                self._unfinished.popleft()()

        self._unfinished.append(finish)
        return wait

    def _next_message(self, src: int) -> Tensor:
        try:
            return self._box(src, self.rank).get(timeout=self._timeout_s)
        except queue.Empty:
            raise TimeoutError(
                f"rank {src} did not answer: timed out after {self._timeout_s:g} s"
            ) from None

    def limit(self, timeout: timedelta) -> None:
        """Change the group's timeout. See ``Transport.limit``."""
        self._timeout_s = timeout.total_seconds()

    def close(self) -> None:
        """Drop the messages from and to this rank. Not collective."""
        for key in list(_boxes):
            group, src, dst = key
            if group == self._group and self.rank in (src, dst):
                _boxes.pop(key, None)


def transport(group: Group) -> Transport:
    """Connect ranks that are threads of this process and share one store object. Collective."""
    return Threads(group)

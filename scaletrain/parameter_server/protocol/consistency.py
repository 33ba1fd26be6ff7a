"""Which gradient counts, when the weights move on and who may go on: the rules of each mode, without processes, sockets or tensors.

Events go in (a worker joins, pushes, leaves, is lost), actions come out; the server carries them out in order. Versions count a block's
updates. The rules hold for each block alone, which implies them for the worker: it starts a step only when all its blocks were answered.

- ``Synchronous``: the mean of n gradients, then one update. With backup workers the first n of n + b win, later ones are dropped
  (Chen et al., Revisiting Distributed Synchronous SGD; TensorFlow, OSDI'16, section 4.4).
- ``Asynchronous``: every gradient at once (Dean et al., NIPS'12, section 4.1: Downpour SGD), at most ``bound`` steps ahead of the slowest
  (Ho et al., NIPS'13: stale synchronous parallel), without a limit where ``bound`` is None.
"""

import abc
from typing import NamedTuple


class Add(NamedTuple):
    """Add this gradient to the block's sum."""

    key: int
    rank: int


class Apply(NamedTuple):
    """Update the block with the sum divided by ``count``; its version is ``version`` afterwards."""

    key: int
    count: int
    version: int


class Answer(NamedTuple):
    """Give the worker the block's weights of now. ``dropped``: its gradient was too late."""

    key: int
    rank: int
    staleness: int = 0
    dropped: bool = False


class Abort(NamedTuple):
    """Training cannot go on without this worker."""

    rank: int
    alive: int
    needed: int


Action = Add | Apply | Answer | Abort


class Rule(abc.ABC):
    """What all modes share: who is here. Ranks that are not live may not push (``KeyError``)."""

    def __init__(self, keys: list[int], workers: int):
        self.workers = workers
        self.version = dict.fromkeys(keys, 0)
        self.live: set[int] = set()
        self.lost: set[int] = set()
        self.left: set[int] = set()
        self._last_step: dict[
            tuple[int, int], int
        ] = {}  # (key, rank) -> last step whose gradient was taken

    def join(self, rank: int, step: int | None = None) -> int:
        """A worker comes, or comes back; returns the step it begins with.

        One that was here already and lost its connection, or its server, says at which ``step`` it is; any other begins where the
        slowest one is.
        """
        begin = self._begin() if step is None else step
        self.live.add(rank)
        self.lost.discard(rank)
        self.left.discard(rank)
        if step is None:
            for key in self.version:
                self._last_step.pop((key, rank), None)
        self._joined(rank, begin)
        return begin

    def leave(self, rank: int) -> list[Action]:
        """A worker is done."""
        return self._gone(rank, self.left)

    def lose(self, rank: int) -> list[Action]:
        """A worker died or cannot be reached."""
        return self._gone(rank, self.lost)

    def pause(self, rank: int) -> list[Action]:
        """A worker waits for all others (to add up an evaluation) and pushes nothing until they are there too."""
        return []

    def _gone(self, rank: int, into: set[int]) -> list[Action]:
        if rank not in self.live:
            return []
        self.live.discard(rank)
        into.add(rank)
        return self._without(rank)

    def push(self, key: int, rank: int, step: int, version: int) -> list[Action]:
        """A gradient of ``rank``'s step ``step``, computed from the block's weights ``version``.

        Raises:
            KeyError: no such block, or this rank has not joined.
            ValueError: a version that the block has not had yet.
        """
        if rank not in self.live:
            raise KeyError(f"rank {rank} has not joined")
        if version > self.version[key]:
            raise ValueError(
                f"version {version} of block {key} is not there yet (now {self.version[key]})"
            )
        repeated = step <= self._last_step.get((key, rank), -1)
        self._last_step[key, rank] = max(step, self._last_step.get((key, rank), -1))
        return self._push(key, rank, step, version, repeated)

    @abc.abstractmethod
    def _begin(self) -> int: ...

    def _joined(self, rank: int, begin: int) -> None:  # noqa: B027
        pass

    @abc.abstractmethod
    def _push(
        self, key: int, rank: int, step: int, version: int, repeated: bool
    ) -> list[Action]: ...

    @abc.abstractmethod
    def _without(self, rank: int) -> list[Action]: ...

    @abc.abstractmethod
    def awaited(self) -> set[int]:
        """Live workers without whose next push somebody here cannot go on."""


class Synchronous(Rule):
    """All of ``workers - backup`` gradients of a step, then one update."""

    def __init__(
        self, keys: list[int], workers: int, backup: int = 0, min_workers: int | None = None
    ):
        super().__init__(keys, workers)
        self._most = workers - backup  # gradients of an update when everybody is here
        self._least = min(self._most, min_workers or self._most)
        self._needed = self._most
        self._given: dict[int, set[int]] = {
            key: set() for key in keys
        }  # whose gradients the sum holds
        self._waiting: dict[int, set[int]] = {key: set() for key in keys}
        self._paused: set[int] = set()

    def _begin(self) -> int:
        return min(self.version.values(), default=0)

    def _joined(self, rank: int, begin: int) -> None:
        # It comes without memory: what a former self waits for is no longer wanted, what it gave stays in the sum.
        for waiting in self._waiting.values():
            waiting.discard(rank)
        self._paused.discard(rank)
        self._needed = max(self._needed, min(self._most, len(self.live) + len(self.left)))

    def _push(self, key: int, rank: int, step: int, version: int, repeated: bool) -> list[Action]:
        if (
            version < self.version[key]
        ):  # late; repeated: sent again after a lost connection, but it had arrived
            return [Answer(key, rank, 0 if repeated else self.version[key] - version, not repeated)]
        actions: list[Action] = []
        if rank not in self._given[key]:
            self._given[key].add(rank)
            actions.append(Add(key, rank))
        self._waiting[key].add(rank)
        return actions + self._complete(key)

    def _complete(self, key: int) -> list[Action]:
        # Spare workers that came late go on without those who are done, or wait for them elsewhere.
        given, away = self._given[key], len(self._paused) + len(self.left)
        if len(given) < max(1, self._needed - away):
            return []
        self.version[key] += 1
        answers = [Answer(key, rank) for rank in sorted(self._waiting[key])]
        count = len(given)
        self._given[key], self._waiting[key] = set(), set()
        return [Apply(key, count, self.version[key]), *answers]

    def _complete_all(self) -> list[Action]:
        return [action for key in self.version for action in self._complete(key)]

    def pause(self, rank: int) -> list[Action]:
        self._paused.add(rank)
        return self._met()

    def _met(self) -> list[Action]:
        if self._paused >= self.live:  # all are there: the next step takes gradients of all
            self._paused.clear()
        return self._complete_all()

    def _without(self, rank: int) -> list[Action]:
        self._paused.discard(rank)
        for waiting in self._waiting.values():
            waiting.discard(rank)
        if not self.live:
            return []
        if rank in self.lost and len(self.live) + len(self.left) < self._needed:
            if not self.left and len(self.live) < self._least:
                return [Abort(rank, len(self.live), self._least)]
            self._needed = len(self.live) + len(self.left)
        return self._met()

    def awaited(self) -> set[int]:
        partial = [key for key in self.version if self._waiting[key]]
        return {rank for key in partial for rank in self.live if rank not in self._given[key]}


class Asynchronous(Rule):
    """Every gradient at once; a worker more than ``bound`` steps ahead of the slowest waits for its answer."""

    def __init__(self, keys: list[int], workers: int, bound: int | None = None):
        super().__init__(keys, workers)
        self._bound = bound
        self._clock: dict[int, dict[int, int]] = {
            key: {} for key in keys
        }  # the step that each rank pushes next
        self._held: dict[int, dict[int, int]] = {
            key: {} for key in keys
        }  # waiting ranks -> staleness of their gradient

    def _begin(self) -> int:
        clocks = [
            clock
            for key in self._clock
            for rank, clock in self._clock[key].items()
            if rank in self.live
        ]
        return min(
            clocks,
            default=max((c for key in self._clock for c in self._clock[key].values()), default=0),
        )

    def _joined(self, rank: int, begin: int) -> None:
        for key in self.version:
            self._clock[key][rank] = begin
            self._held[key].pop(rank, None)

    def _push(self, key: int, rank: int, step: int, version: int, repeated: bool) -> list[Action]:
        staleness = self.version[key] - version
        actions: list[Action] = []
        if not repeated:
            self.version[key] += 1
            # Not one more: of several servers each may have told this worker another step to begin with, and it took the last one.
            self._clock[key][rank] = max(self._clock[key][rank], step + 1)
            actions = [Add(key, rank), Apply(key, 1, self.version[key])]
        self._held[key][rank] = staleness
        return actions + self._release(key)

    def _release(self, key: int) -> list[Action]:
        held = self._held[key]
        if not held:
            return []
        # Workers that never came yet count as being at step 0: the bound holds from the first step on.
        expected = (
            self.live
            if len(self.live | self.lost | self.left) >= self.workers
            else self.live | {-1}
        )
        slowest = min((self._clock[key].get(rank, 0) for rank in expected), default=0)
        ready = [
            r
            for r in sorted(held)
            if self._bound is None or self._clock[key][r] <= slowest + self._bound
        ]
        return [Answer(key, rank, held.pop(rank)) for rank in ready]

    def _without(self, rank: int) -> list[Action]:
        for held in self._held.values():
            held.pop(rank, None)
        return [action for key in self.version for action in self._release(key)]

    def awaited(self) -> set[int]:
        slow: set[int] = set()
        for key, held in self._held.items():
            if held:
                slowest = min(self._clock[key][rank] for rank in self.live)
                slow |= {rank for rank in self.live if self._clock[key][rank] == slowest}
        return slow

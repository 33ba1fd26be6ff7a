"""Which gradients count, when the weights move on, and which workers may go on.

The rules of each mode know no processes, sockets or tensors. Events go in: a worker joins, pushes,
leaves or is lost. Actions come out, and the server carries them out in order. Versions count a
block's updates. The rules hold for each block alone. That implies them for the worker, because it
starts a step only when all its blocks were answered.

- ``Synchronous``: the mean of n gradients, then one update. With backup workers the first n of
  n + b gradients win, and later ones are dropped (Chen et al., Revisiting Distributed Synchronous
  SGD, 2016; TensorFlow, OSDI'16, section 4.4).
  Gradients may be *held*: a block's update then waits for the factor that clips the gradient of
  the whole model, which workers find once they know the norms of all blocks (``Scaling``).
- ``Asynchronous``: every gradient is an update of its own (Dean et al., NIPS'12, section 4.1:
  Downpour SGD). With a ``bound`` no worker runs more steps ahead of the slowest one than that (Ho
  et al., NIPS'13: stale synchronous parallel).

A rule belongs to the server's only thread, so nothing here is locked.

>>> rule = Synchronous(keys=[0], workers=2)
>>> rule.join(0), rule.join(1)
(0, 0)
>>> rule.push(key=0, rank=0, step=0, version=0)
[AddGradient(key=0, rank=0)]
>>> for action in rule.push(key=0, rank=1, step=0, version=0):
...     print(action)
AddGradient(key=0, rank=1)
ApplyUpdate(key=0, num_gradients=2, version=1, scaling=None)
SendWeights(key=0, rank=0, staleness=0, dropped=False)
SendWeights(key=0, rank=1, staleness=0, dropped=False)
"""

import abc
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class AddGradient:
    """Add the gradient that was just pushed to the block's sum."""

    key: int
    rank: int


@dataclass(frozen=True, slots=True)
class Scaling:
    """What becomes of the mean gradients of a step before their updates."""

    step: int  # of the job
    factor: float  # that they are multiplied by
    limit: float  # the largest absolute value of an element afterwards


@dataclass(frozen=True, slots=True)
class TakeMean:
    """Take the mean of the block's sum, and keep it for its update."""

    key: int
    num_gradients: int  # in the sum


@dataclass(frozen=True, slots=True)
class SendNorm:
    """Send a worker the norm of the block's mean gradient."""

    key: int
    rank: int
    step: int  # of the update
    made: bool = False  # send the factor of the update instead, which has been made


@dataclass(frozen=True, slots=True)
class ApplyUpdate:
    """Update the block with the mean of its sum."""

    key: int
    num_gradients: int  # in the sum
    version: int  # of the block afterwards
    scaling: Scaling | None = None  # of the mean before; None: nothing


@dataclass(frozen=True, slots=True)
class SendWeights:
    """Send the block's present weights to a worker."""

    key: int
    rank: int
    staleness: int = 0  # of its gradient: updates since the weights that it was computed from
    dropped: bool = False  # its gradient was too late and did not count


@dataclass(frozen=True, slots=True)
class AbortJob:
    """Training cannot go on without this worker."""

    rank: int
    alive: int  # workers that are left
    needed: int  # workers that an update takes


Action = AddGradient | TakeMean | SendNorm | ApplyUpdate | SendWeights | AbortJob


@dataclass(frozen=True)
class RuleState:
    """The part of a rule that a server's successor goes on with.

    Gradients of updates that are not complete are no part of it: their workers wait for an answer,
    and send them again.
    """

    versions: dict[int, int]  # by block
    last_steps: dict[int, dict[int, int]]  # by block, then rank: see ``Rule._last_step``
    applied_steps: dict[int, int]  # by block: see ``Rule._applied_step``
    lost: frozenset[int]  # ranks
    left: frozenset[int]  # ranks
    scaling: Scaling | None = None  # the last one

    def to_json(self) -> dict[str, Any]:
        """Return the state as JSON, whose keys are texts."""
        last_steps = {}
        for key, by_rank in self.last_steps.items():
            last_steps[str(key)] = {str(rank): step for rank, step in by_rank.items()}
        return {
            "versions": {str(key): version for key, version in self.versions.items()},
            "last_steps": last_steps,
            "applied_steps": {str(key): step for key, step in self.applied_steps.items()},
            "lost": sorted(self.lost),
            "left": sorted(self.left),
            "scaling": None if self.scaling is None else asdict(self.scaling),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "RuleState":
        """Return the state that ``to_json`` wrote."""
        last_steps = {}
        for key, by_rank in value["last_steps"].items():
            last_steps[int(key)] = {int(rank): step for rank, step in by_rank.items()}
        return cls(
            versions={int(key): version for key, version in value["versions"].items()},
            last_steps=last_steps,
            applied_steps={int(key): step for key, step in value["applied_steps"].items()},
            lost=frozenset(value["lost"]),
            left=frozenset(value["left"]),
            scaling=None if value["scaling"] is None else Scaling(**value["scaling"]),
        )


class Rule(abc.ABC):
    """The workers that are present, which all modes keep track of.

    Args:
        keys: of this server's blocks.
        workers: number of workers of the job, also of those that have not come yet.
    """

    def __init__(self, keys: list[int], workers: int):
        self.workers = workers
        # By block: its updates so far. Written by the rules and by restore, read by all who answer
        # workers.
        self.version = dict.fromkeys(keys, 0)
        # Every rank that ever joined is in exactly one of these. Written by join, leave and lose,
        # read by the server's clock (who is silent?) and its sums.
        self.live: set[int] = set()
        self.lost: set[int] = set()
        self.left: set[int] = set()
        # By block, then rank: the last step whose gradient was taken. Written by push, join and
        # restore, read by push, which finds gradients that are sent again after a lost connection.
        self._last_step: dict[int, dict[int, int]] = {key: {} for key in keys}
        # By block: the latest step whose gradients are in an update; -1: none. Written by the rules
        # and restore. Steps and versions differ once a snapshot has taken updates back.
        self._applied_step = dict.fromkeys(keys, -1)
        # The last one. Written by Synchronous.scale and restore, read by those who answer norms.
        self.scaling: Scaling | None = None

    def join(
        self, rank: int, step: int | None = None, answered: Mapping[int, int] | None = None
    ) -> int:
        """Take in a worker that comes, or comes back.

        Args:
            rank: of the worker.
            step: the step at which a worker is that was here before and lost its connection, or
                its server; None: it is a new process.
            answered: by block, the last step of this worker whose gradient was answered. A server
                that has begun again with a snapshot does not know the updates since then.

        Returns:
            The step with which it begins. A new process begins where the slowest worker is.
        """
        begin = self._begin() if step is None else step
        self.live.add(rank)
        self.lost.discard(rank)
        self.left.discard(rank)
        if step is None:
            for by_rank in self._last_step.values():
                by_rank.pop(rank, None)
        for key, answered_step in (answered or {}).items():
            self._applied_step[key] = max(self._applied_step[key], answered_step)
            by_rank = self._last_step[key]
            by_rank[rank] = max(by_rank.get(rank, -1), answered_step)
        self._joined(rank, begin)
        return begin

    def next_step(self, key: int) -> int:
        """Return the job's step that a block's next update belongs to."""
        return self._applied_step[key] + 1

    def settle(self) -> list[Action]:
        """Answer those who waited for what a worker has told that has joined."""
        return []

    def state(self) -> RuleState:
        """Return the state for a snapshot."""
        return RuleState(
            versions=dict(self.version),
            last_steps={key: dict(by_rank) for key, by_rank in self._last_step.items()},
            applied_steps=dict(self._applied_step),
            lost=frozenset(self.lost),
            left=frozenset(self.left),
            scaling=self.scaling,
        )

    def restore(self, state: RuleState) -> None:
        """Go on from a snapshot of the same blocks, before anybody has joined."""
        self.version = dict(state.versions)
        self._last_step = {key: dict(by_rank) for key, by_rank in state.last_steps.items()}
        self._applied_step = dict(state.applied_steps)
        self.lost = set(state.lost)
        self.left = set(state.left)
        self.scaling = state.scaling

    def leave(self, rank: int) -> list[Action]:
        """Note that a worker is done."""
        return self._remove(rank, self.left)

    def lose(self, rank: int) -> list[Action]:
        """Note that a worker died or cannot be reached."""
        return self._remove(rank, self.lost)

    def pause(self, rank: int) -> list[Action]:
        """Note that a worker pushes nothing until all others have paused, too.

        Workers pause to add up an evaluation.
        """
        return []

    def push(
        self, key: int, rank: int, step: int, version: int, *, held: bool = False
    ) -> list[Action]:
        """Take a gradient.

        Args:
            key: of the block.
            rank: of the worker.
            step: the worker's step that made the gradient.
            version: of the weights that the gradient was computed from.
            held: the update waits for ``Synchronous.scale``.

        Raises:
            KeyError: no such block, or this rank has not joined.
            ValueError: a version that the block has not had yet.
        """
        if rank not in self.live:
            raise KeyError(f"rank {rank} has not joined")
        now = self.version[key]
        if version > now:
            raise ValueError(f"version {version} of block {key} is not there yet (now {now})")
        last_step = self._last_step[key].get(rank, -1)
        self._last_step[key][rank] = max(step, last_step)
        repeated = step <= last_step
        return self._push(key, rank, step, version, repeated=repeated, held=held)

    def _remove(self, rank: int, absent: set[int]) -> list[Action]:
        """Move a live worker to the set of those that are lost or have left."""
        if rank not in self.live:
            return []
        self.live.discard(rank)
        absent.add(rank)
        return self._without(rank)

    @abc.abstractmethod
    def awaited(self) -> set[int]:
        """Return the live workers that owe a push for which others wait."""

    @abc.abstractmethod
    def _begin(self) -> int:
        """Return the step with which a new worker begins."""

    @abc.abstractmethod
    def _joined(self, rank: int, begin: int) -> None:
        """Take in a worker that has joined and begins with the step ``begin``."""

    @abc.abstractmethod
    def _push(
        self, key: int, rank: int, step: int, version: int, *, repeated: bool, held: bool
    ) -> list[Action]:
        """Take a valid gradient; ``repeated``: it was taken before, and is sent again."""

    @abc.abstractmethod
    def _without(self, rank: int) -> list[Action]:
        """Go on without a worker that is not live any more."""


@dataclass
class _Collection:
    """The gradients of one block's next update."""

    contributors: set[int] = field(default_factory=set)  # ranks whose gradients are in the sum
    waiting: set[int] = field(default_factory=set)  # that wait for the weights after the update
    # Ranks that wait for it, too, with gradients of older weights, which do not count: by rank, how
    # many updates older.
    late: dict[int, int] = field(default_factory=dict)
    step: int = -1  # the latest of its gradients' steps
    is_held: bool = False  # the update waits for a scaling
    is_closed: bool = False  # the mean is taken, and further gradients are late

    def forget(self, rank: int) -> None:
        """Note that a rank does not wait any more. Its gradient stays in the sum."""
        self.waiting.discard(rank)
        self.late.pop(rank, None)


class Synchronous(Rule):
    """The mean of the gradients of ``workers - backup_workers`` workers, then one update.

    Args:
        keys: of this server's blocks.
        workers: number of workers of the job.
        backup_workers: spare ones among them.
        min_workers: an update takes fewer gradients when workers are lost, down to this number;
            None: the loss of one ends the job, unless it is a spare one.
    """

    def __init__(
        self, keys: list[int], workers: int, backup_workers: int = 0, min_workers: int | None = None
    ):
        super().__init__(keys, workers)
        # Gradients that an update takes: when all workers are present, at least, and now.
        # Only the last one changes, when workers are lost or come back.
        self._most = workers - backup_workers
        self._least = min(self._most, min_workers or self._most)
        self._needed = self._most
        self._collections = {key: _Collection() for key in keys}
        self._paused: set[int] = set()  # live ranks that push nothing now; cleared when all have
        # By block, then rank that waits for the norm of an update: its step. Filled by ask_norm,
        # emptied by _answer_norms.
        self._asking: dict[int, dict[int, int]] = {key: {} for key in keys}

    def pause(self, rank: int) -> list[Action]:
        """Note that a worker waits for all others and pushes nothing until they are there, too."""
        self._paused.add(rank)
        return self._complete_all()

    def awaited(self) -> set[int]:
        """Return the live workers that owe a gradient to an update for which others wait."""
        awaited: set[int] = set()
        for collection in self._collections.values():
            if collection.is_closed:
                continue
            if collection.waiting or collection.late:
                awaited |= self.live - collection.contributors - collection.late.keys()
        return awaited

    def restore(self, state: RuleState) -> None:
        """Go on from a snapshot; an update does not take gradients of workers that were lost."""
        super().restore(state)
        self._needed = max(self._least, min(self._most, self._num_expected()))

    def _num_expected(self) -> int:
        """Return how many workers push, have pushed all, or have not come yet."""
        return self.workers - len(self.lost)

    def _begin(self) -> int:
        return min(self._applied_step.values(), default=-1) + 1

    def _joined(self, rank: int, begin: int) -> None:
        # The process is new. Nobody wants the weights that its former self waits for, and the
        # gradients that its former self pushed stay in the sum.
        self._forget(rank)
        self._paused.discard(rank)
        self._needed = max(self._needed, min(self._most, self._num_expected()))

    def _forget(self, rank: int) -> None:
        """Note that a rank does not wait for anything any more."""
        for key, collection in self._collections.items():
            collection.forget(rank)
            self._asking[key].pop(rank, None)

    def ask_norm(self, key: int, rank: int, step: int) -> list[Action]:
        """Note that a worker waits for the norm of the gradient of a block's update.

        Args:
            key: of the block.
            rank: of the worker.
            step: the worker's step whose gradients are held.
        """
        self._asking[key][rank] = step
        return self._answer_norms(key)

    def _answer_norms(self, key: int) -> list[Action]:
        """Answer those whose update has its gradients, or is made already.

        A server that began again with a snapshot may not know the factor of an update that was
        made. Somebody else does and will tell it, unless all are asking.
        """
        asking = self._asking[key]
        collection = self._collections[key]
        all_are_asking = self.live <= asking.keys()
        actions: list[Action] = []
        for rank, step in sorted(asking.items()):
            is_made = step <= self._applied_step[key]
            is_known = self.scaling is not None and self.scaling.step >= step
            if is_made and (is_known or all_are_asking):
                actions.append(SendNorm(key, rank, self._applied_step[key], made=True))
            elif not is_made and collection.is_closed:
                actions.append(SendNorm(key, rank, collection.step))
        for action in actions:
            assert isinstance(action, SendNorm)
            del asking[action.rank]
        return actions

    def scale(self, scaling: Scaling) -> list[Action]:
        """Make the held updates of a step, those that are complete now and those that follow.

        All workers know the same factor, and each of them tells it: the first one counts.
        """
        if self.scaling is not None and scaling.step <= self.scaling.step:
            return []
        self.scaling = scaling
        actions: list[Action] = []
        for key in self.version:
            actions += self._complete(key)
            actions += self._answer_norms(key)
        return actions

    def settle(self) -> list[Action]:
        """Let workers go on that wait for an update which others have seen already.

        They came to a server that had begun again with a snapshot, before those others.
        """
        actions: list[Action] = []
        for key, collection in self._collections.items():
            for rank in sorted(collection.waiting):
                if self._last_step[key].get(rank, -1) <= self._applied_step[key]:
                    collection.waiting.discard(rank)
                    actions.append(SendWeights(key, rank, dropped=True))
            actions += self._answer_norms(key)
        return actions

    def _push(
        self, key: int, rank: int, step: int, version: int, *, repeated: bool, held: bool
    ) -> list[Action]:
        collection = self._collections[key]
        if version < self.version[key]:
            if repeated:  # it had arrived in time
                return [SendWeights(key, rank)]
            collection.late[rank] = self.version[key] - version
            # The update of its step is made, or it waits for that. Weights from before that update
            # would let it be late in every step, and in the end an update behind the others.
            return self._release(key) if step <= self._applied_step[key] else self._complete(key)
        if step <= self._applied_step[key]:
            # The server has begun again with a snapshot, and knows this worker by the version that
            # both agreed on then. The update of its step is made: the worker did not get the
            # answer, or was a step behind the others.
            return [SendWeights(key, rank, dropped=not repeated)]
        actions: list[Action] = []
        if collection.is_closed and rank not in collection.contributors:
            collection.late[rank] = 0
            return []
        collection.step = max(collection.step, step)
        collection.is_held |= held
        if rank not in collection.contributors:
            collection.contributors.add(rank)
            actions.append(AddGradient(key, rank))
        collection.waiting.add(rank)
        return actions + self._complete(key)

    def _complete(self, key: int) -> list[Action]:
        """Update the block and answer the workers if its gradients are complete.

        If they are held, close the collection first. The update follows with its scaling.
        """
        collection = self._collections[key]
        actions: list[Action] = []
        if not collection.is_closed:
            if not self._has_enough(collection):
                return self._release(key) if self._is_stuck(collection) else []
            if collection.is_held:
                collection.is_closed = True
                actions.append(TakeMean(key, len(collection.contributors)))
                actions += self._answer_norms(key)
        scaling = self.scaling if collection.is_held else None
        if collection.is_held and (scaling is None or scaling.step < collection.step):
            return actions
        self.version[key] += 1
        # Gradients of a lagging worker alone are of an earlier step than the scaling.
        self._applied_step[key] = max(collection.step, scaling.step if scaling else -1)
        self._collections[key] = _Collection()
        num_gradients = len(collection.contributors)
        actions.append(ApplyUpdate(key, num_gradients, self.version[key], scaling))
        actions += [SendWeights(key, rank) for rank in sorted(collection.waiting)]
        return actions + _dropped(key, collection.late)

    def _num_wanted(self) -> int:
        """Return how many gradients an update takes now."""
        # Spare workers that came late would wait for ever for gradients of workers that are done,
        # or that wait for them elsewhere.
        absent = len(self._paused) + len(self.left)
        return max(1, self._needed - absent)

    def _has_enough(self, collection: _Collection) -> bool:
        """Return True if an update need not wait for more gradients."""
        return len(collection.contributors) >= self._num_wanted()

    def _is_stuck(self, collection: _Collection) -> bool:
        """Return True if an update would wait for gradients of workers that were late for it."""
        able = self.live - self._paused - collection.late.keys()
        return len(collection.contributors | able) < self._num_wanted()

    def _release(self, key: int) -> list[Action]:
        """Answer those that were late with the weights as they are."""
        late, self._collections[key].late = self._collections[key].late, {}
        return _dropped(key, late)

    def _complete_all(self) -> list[Action]:
        """Complete every block that can be, after a change of the workers that push."""
        if self._paused >= self.live:  # all have met: the next step takes gradients of all
            self._paused.clear()
        actions: list[Action] = []
        for key in self.version:
            actions += self._complete(key)
            actions += self._answer_norms(key)
        return actions

    def _without(self, rank: int) -> list[Action]:
        self._paused.discard(rank)
        self._forget(rank)
        if not self.live:
            return []
        expected = self._num_expected()
        if rank in self.lost and expected < self._needed:
            if not self.left and expected < self._least:
                return [AbortJob(rank, expected, self._least)]
            self._needed = expected
        return self._complete_all()


def _dropped(key: int, late: Mapping[int, int]) -> list[Action]:
    """Return the answers to gradients that were late, by rank with their staleness."""
    return [SendWeights(key, rank, late[rank], dropped=True) for rank in sorted(late)]


class Asynchronous(Rule):
    """Every gradient is an update of its own, and fast workers wait for the slowest one.

    Args:
        keys: of this server's blocks.
        workers: number of workers of the job.
        bound: a worker that is more than so many steps ahead of the slowest one is not answered
            until that one has moved; None: no worker ever waits.
    """

    def __init__(self, keys: list[int], workers: int, bound: int | None = None):
        super().__init__(keys, workers)
        self._bound = bound
        # By block, then rank: the step that the rank pushes next. Written by join and push.
        self._next_step: dict[int, dict[int, int]] = {key: {} for key in keys}
        # By block, then rank that waits for an answer: the staleness of its gradient.
        # Filled by push; emptied as the slowest worker moves, or is lost.
        self._held: dict[int, dict[int, int]] = {key: {} for key in keys}

    def awaited(self) -> set[int]:
        """Return the slowest live workers of every block that somebody waits for."""
        awaited: set[int] = set()
        for key, held in self._held.items():
            if held:
                next_step = self._next_step[key]
                slowest = min(next_step[rank] for rank in self.live)
                awaited |= {rank for rank in self.live if next_step[rank] == slowest}
        return awaited

    def settle(self) -> list[Action]:
        """Answer workers that waited for one that has joined: it may be as far as they are."""
        actions: list[Action] = []
        for key in self.version:
            actions += self._release(key)
        return actions

    def restore(self, state: RuleState) -> None:
        """Go on from a snapshot; every rank pushes next what comes after its last gradient."""
        super().restore(state)
        for key, by_rank in state.last_steps.items():
            self._next_step[key] = {rank: step + 1 for rank, step in by_rank.items()}

    def _begin(self) -> int:
        live_steps: list[int] = []
        all_steps: list[int] = []
        for next_step in self._next_step.values():
            all_steps += next_step.values()
            live_steps += [step for rank, step in next_step.items() if rank in self.live]
        if live_steps:
            return min(live_steps)
        return max(all_steps, default=0)

    def _joined(self, rank: int, begin: int) -> None:
        for key in self.version:
            # A worker that was here before may have pushed this block in its present step.
            after_last = self._last_step[key].get(rank, -1) + 1
            self._next_step[key][rank] = max(begin, after_last)
            self._held[key].pop(rank, None)

    def _push(
        self, key: int, rank: int, step: int, version: int, *, repeated: bool, held: bool
    ) -> list[Action]:
        staleness = self.version[key] - version
        actions: list[Action] = []
        if not repeated:
            self.version[key] += 1
            # Not simply one more: each of several servers may have named another step for this
            # worker to begin with, and it took the first one.
            next_step = self._next_step[key]
            next_step[rank] = max(next_step[rank], step + 1)
            self._applied_step[key] = max(self._applied_step[key], step)
            actions += [AddGradient(key, rank), ApplyUpdate(key, 1, self.version[key])]
        self._held[key][rank] = staleness
        return actions + self._release(key)

    def _release(self, key: int) -> list[Action]:
        """Answer the waiting workers that are not too far ahead (any more)."""
        held = self._held[key]
        if not held:
            return []
        slowest = self._slowest(key)
        actions: list[Action] = []
        for rank in sorted(held):
            ahead = self._next_step[key][rank] - slowest
            if self._bound is None or ahead <= self._bound:
                actions.append(SendWeights(key, rank, held.pop(rank)))
        return actions

    def _slowest(self, key: int) -> int:
        """Return the step that the slowest worker pushes next.

        Workers that have not come yet count as being at step 0: the bound holds from the first
        step on.
        """
        ever_joined = self.live | self.lost | self.left
        if len(ever_joined) < self.workers:
            return 0
        return min((self._next_step[key][rank] for rank in self.live), default=0)

    def _without(self, rank: int) -> list[Action]:
        actions: list[Action] = []
        for key in self.version:
            self._held[key].pop(rank, None)
            actions += self._release(key)
        return actions

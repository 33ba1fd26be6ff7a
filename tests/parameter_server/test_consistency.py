"""Tests ``protocol/consistency.py``: the rules of each mode under random orders and delays."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaletrain.parameter_server.protocol.consistency import (
    AbortJob,
    AddGradient,
    ApplyUpdate,
    Asynchronous,
    Rule,
    SendWeights,
    Synchronous,
)


class Workers:
    """Simulated workers. Each pushes all blocks in a random order, then waits for all answers.

    The turns are random, too.
    """

    def __init__(
        self, rule: Rule, workers: int, steps: int, random: random.Random, meet: bool = False
    ):
        self.rule, self.steps, self.random, self.meet = rule, steps, random, meet
        self.keys = list(rule.version)
        self.step = dict.fromkeys(range(workers), 0)  # steps done
        self.to_push = {rank: self._shuffled() for rank in range(workers)}
        self.waiting: dict[int, set[int]] = {rank: set() for rank in range(workers)}
        self.version = {(key, rank): 0 for key in self.keys for rank in range(workers)}
        self.applied: dict[int, list[tuple[set[tuple[int, int]], int]]] = {
            key: [] for key in self.keys
        }
        self.sum: dict[int, set[tuple[int, int]]] = {key: set() for key in self.keys}
        self.dropped = 0
        self.aborted: AbortJob | None = None
        self.dead: set[int] = set()
        self.met: set[int] = set()
        for rank in range(workers):
            rule.join(rank)

    def _shuffled(self) -> list[int]:
        return self.random.sample(self.keys, len(self.keys))

    def perform(self, actions: list, pushed_step: int = -1) -> None:
        for action in actions:
            match action:
                case AddGradient(key, rank):
                    assert (rank, pushed_step) not in self.sum[key]
                    self.sum[key].add((rank, pushed_step))
                case ApplyUpdate(key, count, version):
                    assert count == len(self.sum[key]) > 0
                    assert version == len(self.applied[key]) + 1
                    self.applied[key].append((self.sum[key], count))
                    self.sum[key] = set()
                case SendWeights(key, rank, staleness, dropped):
                    assert key in self.waiting[rank], "an answer that nobody asked for"
                    assert staleness >= 0
                    self.waiting[rank].discard(key)
                    self.version[key, rank] = self.rule.version[key]
                    self.dropped += dropped
                case AbortJob():
                    self.aborted = action

    def run(self, on_step=lambda rank: None) -> None:
        """Run until all are done. Fails if no worker can go on."""
        while self.aborted is None:
            able = [
                r
                for r in self.step
                if r not in self.dead and (self.to_push[r] or self._may_step(r))
            ]
            able = [r for r in able if self.step[r] < self.steps or self.to_push[r]]
            if not able:
                break
            rank = self.random.choice(able)
            if not self.to_push[rank]:
                self.to_push[rank] = self._shuffled()
            if len(self.to_push[rank]) == len(self.keys):
                on_step(rank)
            key = self.to_push[rank].pop()
            self.waiting[rank].add(key)
            step = self.step[rank]
            self.perform(self.rule.push(key, rank, step, self.version[key, rank]), step)
            if not self.to_push[rank]:
                self.step[rank] += 1
            self._pause()
        assert self.aborted or not any(self.waiting[r] for r in self.step if r not in self.dead), (
            "workers wait for ever"
        )

    def _pause(self) -> None:
        """Let workers that have done all steps wait for the others."""
        while (
            done := {
                r
                for r in self.step
                if self.meet and self.step[r] == self.steps and not self.waiting[r]
            }
            - self.met
        ):
            rank = min(done)
            self.met.add(rank)
            self.perform(self.rule.pause(rank))

    def _may_step(self, rank: int) -> bool:
        return not self.waiting[rank]

    def kill(self, rank: int) -> None:
        self.dead.add(rank)
        self.waiting[rank].clear()
        self.perform(self.rule.lose(rank))


sizes = {"workers": st.integers(1, 5), "blocks": st.integers(1, 4), "steps": st.integers(1, 8)}


@given(**sizes, rng=st.randoms(use_true_random=False))
def test_synchronous_updates_take_one_gradient_of_each_worker_of_the_same_step(
    workers, blocks, steps, rng
):
    simulated = Workers(Synchronous(list(range(blocks)), workers), workers, steps, rng)
    simulated.run()
    for updates in simulated.applied.values():
        assert [given for given, _ in updates] == [
            {(rank, step) for rank in range(workers)} for step in range(steps)
        ]
    assert simulated.dropped == 0


@given(**sizes, bound=st.integers(0, 3), rng=st.randoms(use_true_random=False))
def test_bounded_workers_never_run_more_than_the_bound_ahead_of_the_slowest(
    workers, blocks, steps, bound, rng
):
    simulated = Workers(Asynchronous(list(range(blocks)), workers, bound), workers, steps, rng)

    def check(rank: int) -> None:
        # A step begins: the slowest worker has pushed, for every block, at most `bound` steps less.
        slowest = min(simulated.step.values())
        assert simulated.step[rank] - slowest <= bound, (
            f"rank {rank} begins step {simulated.step[rank]}, slowest {slowest}"
        )

    simulated.run(check)
    assert all(len(updates) == workers * steps for updates in simulated.applied.values())


def test_the_bound_is_reached_and_not_needlessly_low():
    rule = Asynchronous([0], 2, bound=2)
    rule.join(0), rule.join(1)
    answers = [
        any(isinstance(a, SendWeights) for a in rule.push(0, 0, step, rule.version[0]))
        for step in range(3)
    ]
    assert answers == [
        True,
        True,
        False,
    ]  # steps 0 and 1 done, two ahead; the third is answered when rank 1 has moved
    assert [a.rank for a in rule.push(0, 1, 0, 0) if isinstance(a, SendWeights)] == [0, 1]


@given(**sizes, rng=st.randoms(use_true_random=False))
def test_asynchronous_workers_never_wait(workers, blocks, steps, rng):
    rule = Asynchronous(list(range(blocks)), workers)
    for rank in range(workers):
        rule.join(rank)
    pushes = [
        (rank, step, key)
        for rank in range(workers)
        for step in range(steps)
        for key in range(blocks)
    ]
    for rank, _, key in (rng.choice(pushes) for _ in range(40)):
        step = rule._last_step[key].get(rank, -1) + 1
        actions = rule.push(key, rank, step, max(0, rule.version[key] - 2))
        assert [type(action) for action in actions] == [AddGradient, ApplyUpdate, SendWeights]
        assert actions[-1].staleness == min(2, rule.version[key] - 1)


@given(
    blocks=st.integers(1, 3),
    spare=st.integers(1, 2),
    steps=st.integers(1, 8),
    rng=st.randoms(use_true_random=False),
)
def test_backup_workers_the_first_gradients_win_and_late_ones_never_count(
    blocks, spare, steps, rng
):
    workers = 2 + spare
    rule = Synchronous(list(range(blocks)), workers, backup_workers=spare)
    for rank in range(workers):
        rule.join(rank)
    version = {(key, rank): 0 for key in range(blocks) for rank in range(workers)}
    waiting: set[tuple[int, int]] = set()
    stale: dict[tuple[int, int], int] = {}  # gradients that do not count, by updates
    for turn in range(steps * blocks * workers * 2):
        free = [
            (key, rank)
            for key in range(blocks)
            for rank in range(workers)
            if (key, rank) not in waiting
        ]
        if not free:
            pytest.fail("all workers wait")
        key, rank = rng.choice(free)
        before = rule.version[key]
        late = version[key, rank] < before
        actions = rule.push(key, rank, turn, version[key, rank])
        waiting.add((key, rank))
        if late:
            stale[key, rank] = before - version[key, rank]
            assert not any(isinstance(action, AddGradient) for action in actions)
        for action in actions:
            if isinstance(action, ApplyUpdate):
                assert action.num_gradients == workers - spare
            if isinstance(action, SendWeights):
                staleness = stale.pop((action.key, action.rank), 0)
                assert (action.staleness, action.dropped) == (staleness, staleness > 0)
                waiting.discard((action.key, action.rank))
                version[action.key, action.rank] = rule.version[action.key]


@given(
    blocks=st.integers(1, 4),
    spare=st.integers(1, 2),
    steps=st.integers(1, 8),
    rng=st.randoms(use_true_random=False),
)
def test_backup_workers_that_came_too_late_do_not_wait_for_those_who_wait_for_them(
    blocks, spare, steps, rng
):
    workers = 2 + spare
    simulated = Workers(
        Synchronous(list(range(blocks)), workers, backup_workers=spare),
        workers,
        steps,
        rng,
        meet=True,
    )
    simulated.run()
    assert simulated.met == set(range(workers))
    # After the meeting an update takes as many gradients as before.
    rule = simulated.rule
    taken = [rule.push(0, rank, steps, rule.version[0]) for rank in range(2)]
    assert taken[0] == [AddGradient(0, 0)] and taken[1][:2] == [
        AddGradient(0, 1),
        ApplyUpdate(0, 2, rule.version[0]),
    ]


def spare_rule() -> Synchronous:
    """Three workers, one to spare; rank 0 left out step 0."""
    rule = Synchronous([0], 3, backup_workers=1)
    for rank in range(3):
        rule.join(rank)
    for rank in (1, 2):
        rule.push(0, rank, 0, 0)
    return rule


def test_a_gradient_of_older_weights_does_not_count_and_waits_for_its_step():
    """Bug it catches: weights from before the update, with which it is late in every step."""
    rule = spare_rule()
    assert rule.push(0, 0, 1, 0) == []
    assert rule.awaited() == {1, 2}
    rule.push(0, 1, 1, 1)
    assert rule.push(0, 2, 1, 1)[1:] == [
        ApplyUpdate(0, 2, 2),
        SendWeights(0, 1),
        SendWeights(0, 2),
        SendWeights(0, 0, 1, dropped=True),
    ]


@pytest.mark.parametrize("end", ["late", "paused", "lost"])
def test_late_workers_do_not_wait_for_gradients_that_nobody_will_send(end: str):
    rule = spare_rule()
    rule.push(0, 0, 1, 0)
    if end == "late":
        actions = rule.push(0, 1, 1, 0)
        assert SendWeights(0, 1, 1, dropped=True) in actions
    elif end == "paused":
        assert rule.pause(1) == []
        actions = rule.pause(2)
    else:
        actions = rule.lose(1)
    assert SendWeights(0, 0, 1, dropped=True) in actions


def test_plain_sync_stops_when_a_worker_is_lost_and_names_it():
    rule = Synchronous([0, 1], 3)
    for rank in range(3):
        rule.join(rank)
    rule.push(0, 0, 0, 0)
    assert rule.lose(2) == [AbortJob(2, 2, 3)]


def test_a_spare_worker_that_has_not_come_yet_stands_in_for_one_that_is_lost():
    rule = Synchronous([0], 3, backup_workers=1)
    rule.join(0), rule.join(1)
    rule.push(0, 0, 0, 0)
    assert rule.lose(1) == []
    rule.join(2)
    assert ApplyUpdate(0, 2, 1) in rule.push(0, 2, 0, 0)
    assert rule.lose(2) == [AbortJob(2, 1, 2)]


def test_sync_with_min_workers_shrinks_and_grows_again():
    rule = Synchronous([0, 1], 3, min_workers=2)
    for rank in range(3):
        rule.join(rank)
    rule.push(0, 0, 0, 0), rule.push(0, 1, 0, 0)
    actions = rule.lose(2)  # block 0 had both gradients of those who live
    assert actions == [ApplyUpdate(0, 2, 1), SendWeights(0, 0), SendWeights(0, 1)]
    assert rule.join(2) == 0  # block 1 has not moved yet
    assert rule.push(0, 0, 1, 1) == [AddGradient(0, 0)]
    rule.push(0, 1, 1, 1)
    assert rule.push(0, 2, 1, 1)[1] == ApplyUpdate(0, 3, 2)
    rule.lose(0)
    assert any(isinstance(action, AbortJob) for action in rule.lose(1))


@given(seed=st.integers(0, 10_000), bound=st.one_of(st.none(), st.integers(0, 2)))
def test_asynchronous_workers_go_on_when_others_die(seed, bound):
    rng = random.Random(seed)
    simulated = Workers(Asynchronous([0, 1], 4, bound), 4, 6, rng)
    turns = rng.randint(1, 10)

    def maybe_kill(rank: int) -> None:
        nonlocal turns
        turns -= 1
        if turns == 0:
            victim = rng.choice([r for r in range(4) if r != rank])
            simulated.kill(victim)

    simulated.run(maybe_kill)
    assert all(simulated.step[rank] == 6 for rank in range(4) if rank not in simulated.dead)
    assert len(simulated.dead) == 1


def test_a_gradient_sent_again_after_a_lost_connection_counts_once():
    rule = Asynchronous([0], 2)
    rule.join(0)
    assert any(isinstance(a, ApplyUpdate) for a in rule.push(0, 0, 5, 0))
    rule.join(0, step=5)
    assert rule.push(0, 0, 5, 0) == [SendWeights(0, 0, 1)]


def test_a_worker_that_comes_back_begins_where_the_slowest_is():
    rule = Asynchronous([0], 3, bound=1)
    for rank in range(3):
        rule.join(rank)
    for step in range(4):
        for rank in range(3):
            rule.push(0, rank, step, rule.version[0])
    rule.lose(1)
    rule.push(0, 0, 4, rule.version[0])
    assert rule.join(1) == 4


def test_what_cannot_be_is_refused():
    rule = Synchronous([0], 2)
    rule.join(0)
    with pytest.raises(KeyError):
        rule.push(0, 1, 0, 0)
    with pytest.raises(ValueError, match="not there yet"):
        rule.push(0, 0, 0, 1)


def test_a_worker_that_began_later_than_this_server_said_holds_nobody_back():
    """A server counts the job's steps, not pushes.

    Each of several servers says where a worker is to begin, and it takes the last step named.
    """
    rule = Asynchronous([0], 2, bound=1)
    rule.join(0), rule.join(1)
    for step in range(2, 10):  # another server let rank 1 begin with step 2
        rule.push(0, 1, step, rule.version[0])
    for step in range(10):
        answered = rule.push(0, 0, step, rule.version[0])
        assert SendWeights(0, 0) in answered, f"step {step}: rank 0 waits for a worker that is done"


def restored_after(steps: int, bound: int) -> Asynchronous:
    """The successor of a server that two workers have pushed two blocks to."""
    rule = Asynchronous([0, 1], 2, bound=bound)
    rule.join(0), rule.join(1)
    for step in range(steps):
        for rank in (0, 1):
            for key in (0, 1):
                rule.push(key, rank, step, rule.version[key])
    successor = Asynchronous([0, 1], 2, bound=bound)
    successor.restore(rule.state())
    return successor


def test_a_worker_that_pushes_before_another_has_come_is_answered_when_it_comes():
    rule = restored_after(steps=9, bound=3)
    rule.join(1, 9)
    assert SendWeights(0, 1) not in rule.push(0, 1, 9, rule.version[0])
    rule.join(0, 9)
    assert rule.settle() == [SendWeights(0, 1)]
    assert rule.settle() == []


def test_workers_whose_last_gradients_a_snapshot_lacks_do_not_wait_for_each_other():
    """Each has the answer for another block of step 9, and sends the other one again."""
    rule = restored_after(steps=9, bound=0)
    rule.join(0, 9, {0: 9})
    rule.join(1, 9, {1: 9})
    assert SendWeights(1, 0) in rule.push(1, 0, 9, rule.version[1])
    assert SendWeights(0, 1) in rule.push(0, 1, 9, rule.version[0])


def test_a_rule_tells_the_jobs_step_whatever_a_snapshot_took_back():
    """Bug it catches: steps counted by updates, of which blocks have lost different numbers."""
    rule = Synchronous([0, 1], 2)
    rule.join(0), rule.join(1)
    assert rule.next_step(0) == 0
    for step in range(4):
        for rank in (0, 1):
            rule.push(0, rank, step, step)
    restored = Synchronous([0, 1], 2)
    restored.restore(rule.state())
    assert (restored.next_step(0), restored.next_step(1)) == (4, 0)
    restored.join(0, 9, {0: 8, 1: 7})
    restored.join(1, 9, {0: 8, 1: 8})
    assert (restored.next_step(0), restored.next_step(1)) == (9, 9)
    assert restored.version == {0: 4, 1: 0}

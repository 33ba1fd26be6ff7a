"""Tests collectives/schedule.py and every algorithm: each is proved for every size.

``verify`` refuses each way a schedule can be wrong.
"""

import pytest

from scaletrain import plugins
from scaletrain.collectives import drawing, one_hop, ring, tree
from scaletrain.collectives.schedule import (
    RankRound,
    Schedule,
    ScheduleError,
    Transfer,
    in_turn,
    proved,
    verify,
    verify_distribution,
    verify_order,
    verify_reduction,
    verify_results,
)
from scaletrain.errors import UserError

ALGORITHMS = plugins.names("collective")
BETWEEN = [
    "ring",
    "tree",
    "halving_doubling",
    "recursive_doubling",
    "direct",
    "double_tree",
    "pipelined_tree",
    "star",
]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_size_is_proved(name: str):
    factory = plugins.load("collective", name)
    for size in range(1, 65):
        schedule = factory(size)
        assert schedule.size == size
        verify(schedule)


@pytest.mark.parametrize("between", BETWEEN)
def test_two_levels_are_proved_on_every_layout(between: str):
    factory = plugins.load("collective", "two_level")
    for ranks_per_host in (1, 2, 3, 4, 8):
        for size in (1, 2, 3, 5, 8, 12, 13, 16, 24, 31, 32):
            verify(factory(size, ranks_per_host=ranks_per_host, between=between))


@pytest.mark.parametrize(("name", "options"), [
    ("star", {"servers": 2}), ("star", {"servers": 7}), ("star", {"servers": 99}), ("star", {"servers": 2, "segments": 3}),
    ("pipelined_tree", {"segments": 1}), ("pipelined_tree", {"segments": 5, "fan_out": 2}), ("double_tree", {"segments": 3}),
])  # fmt: skip
def test_options_are_proved(name: str, options: dict):
    for size in range(1, 33):
        verify(plugins.load("collective", name)(size, **options))


def test_what_is_no_allreduce_is_refused_before_it_is_used(monkeypatch: pytest.MonkeyPatch):
    assert proved("ring", 5) == ring.schedule(5)
    lossy = tree.schedule(5)._replace(rounds=tree.schedule(5).rounds[1:])
    monkeypatch.setattr(plugins, "load", lambda kind, name: lambda size: lossy)
    with pytest.raises(UserError, match="collective tree: no allreduce of 5 ranks: "):
        proved("tree", 5)
    monkeypatch.setattr(plugins, "load", lambda kind, name: lambda size: list(lossy.rounds))
    with pytest.raises(
        UserError, match=r"collective tree: schedule\(5\) returned \[.* \(allowed: a Schedule\)"
    ):
        proved("tree", 5)


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_a_lost_round_is_caught(name: str, size: int):
    schedule = plugins.load("collective", name)(size)
    for index in range(len(schedule.rounds)):
        rounds = schedule.rounds[:index] + schedule.rounds[index + 1 :]
        with pytest.raises(ScheduleError):
            verify(schedule._replace(rounds=rounds))


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("size", [3, 5])
def test_each_single_fault_is_caught(name: str, size: int):
    """A transfer that is missing, happens twice, goes to the wrong rank or replaces where it
    should add: refused, unless the numbers still come out right (a ring may be entered
    elsewhere), which an independent simulation with integers decides."""
    schedule = plugins.load("collective", name)(
        size, **({"segments": 2} if "tree" in name and name != "tree" else {})
    )
    caught = 0
    for index, transfers in enumerate(schedule.rounds):
        for place, t in enumerate(transfers):
            others = transfers[:place] + transfers[place + 1 :]
            elsewhere = next(r for r in range(size) if r not in (t.src, t.dst))
            for wrong in (
                others,
                (*others, t._replace(dst=elsewhere)),
                (*others, t._replace(add=not t.add)),
                (*transfers, t),
            ):
                changed = schedule._replace(
                    rounds=(*schedule.rounds[:index], wrong, *schedule.rounds[index + 1 :])
                )
                if sums_up(changed):
                    continue
                caught += 1
                with pytest.raises(ScheduleError):
                    verify(changed)
    assert caught >= sum(map(len, schedule.rounds))


def sums_up(schedule: Schedule) -> bool:
    """Whether integers, a different power of the size + 1 on each rank, are added up right."""
    start = [[(schedule.size + 1) ** rank] * schedule.num_chunks for rank in range(schedule.size)]
    held = [row[:] for row in start]
    for transfers in schedule.rounds:
        before = [row[:] for row in held]
        for t in transfers:
            held[t.dst][t.chunk] = before[t.src][t.chunk] + (held[t.dst][t.chunk] if t.add else 0)
    return held == [[sum(row[0] for row in start)] * schedule.num_chunks] * schedule.size


REDUCE_THEN_DISTRIBUTE = [
    name for name in ALGORITHMS if name != "recursive_doubling"
]  # whose additions are all of it


@pytest.mark.parametrize("name", REDUCE_THEN_DISTRIBUTE)
def test_its_halves_are_a_reduction_and_a_distribution(name: str):
    """The additions alone leave each chunk's sum with an owner, from whom the replacements alone
    take it to everybody.
    """
    factory = plugins.load("collective", name)
    for size in range(1, 33):
        schedule = factory(size)
        owners = verify_reduction(schedule.reduction())
        verify_distribution(schedule.distribution(), owners)
        if name in ("tree", "pipelined_tree"):
            assert set(owners) == {0}, "a reduce to rank 0 and a broadcast from it"
        if name in ("ring", "direct"):
            assert sorted(owners) == [*range(size)], "a reduce-scatter and an all-gather"


@pytest.mark.parametrize("name", REDUCE_THEN_DISTRIBUTE)
def test_a_fault_in_a_half_is_caught(name: str):
    schedule = plugins.load("collective", name)(5)
    reduction, distribution = schedule.reduction(), schedule.distribution()
    owners = verify_reduction(reduction)
    for index, transfers in enumerate(reduction.rounds):
        lost = reduction._replace(
            rounds=(*reduction.rounds[:index], transfers[1:], *reduction.rounds[index + 1 :])
        )
        doubled = (*transfers, transfers[0])
        for changed in (
            lost,
            lost._replace(
                rounds=(*reduction.rounds[:index], doubled, *reduction.rounds[index + 1 :])
            ),
        ):
            with pytest.raises(ScheduleError):
                verify_reduction(changed)
    for index, transfers in enumerate(distribution.rounds):
        for wrong in (transfers[1:], (transfers[0]._replace(add=True), *transfers[1:])):
            with pytest.raises(ScheduleError):
                verify_distribution(
                    distribution._replace(
                        rounds=(
                            *distribution.rounds[:index],
                            wrong,
                            *distribution.rounds[index + 1 :],
                        )
                    ),
                    owners,
                )
    with pytest.raises(ScheduleError, match="the contribution of rank"):
        verify_distribution(distribution, [owner + 1 if owner < 4 else 0 for owner in owners])


def test_another_order_of_additions_is_caught():
    # Rank 0 computes (0 + 1) + 2; rank 1 computes (1 + 2) + 0.
    rounds = (
        (Transfer(1, 0, 0, True), Transfer(2, 1, 0, True)),
        (Transfer(2, 0, 0, True), Transfer(0, 2, 0, True)),
    )
    with pytest.raises(ScheduleError):
        verify(Schedule(3, 1, rounds))
    everybody_adds_everybody = tuple(
        Transfer(s, d, 0, True) for s in range(3) for d in range(3) if s != d
    )
    with pytest.raises(ScheduleError, match="different orders"):
        verify(Schedule(3, 1, (everybody_adds_everybody,)))


def test_a_lost_contribution_is_told_with_the_round_that_lost_it():
    gather = tuple(Transfer(rank, 0, 0, True) for rank in (1, 2, 3))
    wrong = (Transfer(3, 0, 0, False), *(Transfer(0, rank, 0, False) for rank in (1, 2)))
    with pytest.raises(
        ScheduleError,
        match=r"rank 0 lacks the contribution of rank 0 .*: in round 1 what rank 3 sent",
    ):
        verify(Schedule(4, 1, (gather, wrong)))


def test_a_blocking_order_that_waits_for_ever_is_caught():
    a, b = Transfer(0, 1, 0, True), Transfer(1, 0, 0, True)
    with pytest.raises(ScheduleError, match="deadlock"):
        verify_order(
            [
                [RankRound(0, [], [b]), RankRound(1, [a], [])],
                [RankRound(0, [], [a]), RankRound(1, [b], [])],
            ]
        )  # both receive before they send
    with pytest.raises(ScheduleError, match="meets"):
        verify_order([[RankRound(0, [a], [])], [RankRound(0, [], [a._replace(chunk=1)])]])
    with pytest.raises(ScheduleError, match="deadlock"):
        verify_order([[RankRound(0, [a], [])], []])  # nobody receives it


@pytest.mark.parametrize("name", ["pipelined_tree", "double_tree"])
@pytest.mark.parametrize("size", [2, 5, 8, 16])
def test_pipelines_use_each_port_once_a_round(name: str, size: int):
    for transfers in plugins.load("collective", name)(size).rounds:
        for side in ("src", "dst"):
            ranks = [getattr(t, side) for t in transfers]
            assert len(ranks) == len(set(ranks))


def test_a_tree_reads_like_firecaffe():
    assert drawing.as_text(tree.schedule(4)).splitlines() == [
        "round 0: 1 +> 0, 3 +> 2",
        "round 1: 2 +> 0",
        "round 2: 0 -> 2",
        "round 3: 0 -> 1, 2 -> 3",
    ]


def test_every_transfer_is_drawn():
    schedule = ring.schedule(5)
    assert drawing.as_svg(schedule, "ring").count("marker-end") == sum(map(len, schedule.rounds))


def test_who_sends_to_one_after_another_is_known():
    """A tree's root and the inner ranks below it; not a ring, whose ranks always wait for what
    comes.
    """
    expected = {(3, 0), (4, 0), (4, 4)}  # 0 to 4, 2 and 1; 4 to 6 and 5; 2 and 6 send down once
    assert in_turn(plugins.load("collective", "tree")(8).per_rank()) == expected
    for name in ("ring", "halving_doubling", "recursive_doubling", "star"):
        assert not in_turn(plugins.load("collective", name)(8).per_rank())


@pytest.mark.parametrize("name", one_hop.COLLECTIVES)
def test_collectives_of_one_hop_are_proved(name: str):
    for size in (1, 2, 3, 5, 8, 16):
        for root in range(size if name in one_hop.ROOTED else 1):
            assert len(one_hop.proved(name, size, root).rounds) <= 1


@pytest.mark.parametrize("name", one_hop.COLLECTIVES)
def test_a_collective_that_lacks_a_message_is_refused(name: str):
    whole = one_hop.schedule_of(name, 4, root=0)
    for left_out in range(len(whole.rounds[0])):
        messages = whole.rounds[0][:left_out] + whole.rounds[0][left_out + 1 :]
        with pytest.raises(ScheduleError, match=r"lacks|must not have"):
            verify_results(whole._replace(rounds=(messages,)), one_hop.results(name, 4, 0))

"""Made-up runs with a known culprit: kind, rank, host and link must be found, and nothing else."""

import random

import pytest

from scaletrain.run.blame import find
from scaletrain.run.culprit import Culprit, Kind
from scaletrain.run.links import Connection, LinkSample
from scaletrain.run.records import StepRecord
from scaletrain.run.slow_ranks import RankSteps

from .made_up import made_up

OF_RANKS = [
    Kind.INPUT,
    Kind.FORWARD,
    Kind.BACKWARD,
    Kind.OPTIMIZER,
    Kind.STOLEN_CORES,
    Kind.GARBAGE,
]


def the_only(culprits: list[Culprit]) -> Culprit:
    assert len(culprits) == 1, [culprit.sentence() for culprit in culprits]
    return culprits[0]


@pytest.mark.parametrize("kind", OF_RANKS)
@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_every_kind_names_every_rank_with_its_cost(kind: Kind, size: int):
    for rank in range(size):
        culprit = the_only(find(made_up(size, 40, seed=rank, slow={rank: (kind, 0.03)})))
        assert (culprit.kind, culprit.ranks, culprit.hosts) == (kind, (rank,), (f"h{rank // 2}",))
        assert not culprit.rotates
        assert culprit.low_s <= 0.03 <= culprit.high_s and culprit.high_s < 0.04


def test_backward_is_named_though_it_is_longest_on_the_ranks_that_wait():
    run = made_up(4, 20, seed=0, slow={2: (Kind.BACKWARD, 0.2)})
    longest = {rank.rank: min(record.backward_s for record in rank.records) for rank in run}
    assert longest[2] == pytest.approx(max(longest.values()), rel=0.05)  # all wait for rank 2
    assert the_only(find(run)).ranks == (2,)
    assert "rank 2 on h1: backward takes" in the_only(find(run)).sentence()
    # On a GPU nobody notes when a rank's own gradients were there: then nobody is accused.
    blind = [RankSteps(r.rank, r.host, r.records, knows_backward=False) for r in run]
    assert find(blind) == []


@pytest.mark.parametrize("kind", OF_RANKS)
def test_within_20_steps_of_its_beginning(kind: Kind):
    run = made_up(4, 120, seed=1, slow={3: (kind, 0.05)}, since=100)
    assert the_only(find(run)).first_step >= 80
    # The same steps of a run that is still young, as ``top`` sees them.
    young = [RankSteps(r.rank, r.host, r.records[60:120]) for r in run]
    assert the_only(find(young)).ranks == (3,)
    before = [RankSteps(r.rank, r.host, r.records[:100]) for r in run]
    assert find(before) == []


def test_a_rank_that_stays_slow_is_told_from_slowness_that_rotates():
    noises = random.Random(7)
    turns = [
        made_up(4, 1, seed=step, slow={noises.randrange(4): (Kind.INPUT, 0.04)})
        for step in range(60)
    ]
    rotating = []
    for rank in range(4):
        records = []
        for step, run in enumerate(turns):
            (record,) = run[rank].records
            values = {name: getattr(record, name) for name in StepRecord.__slots__}
            records.append(StepRecord(**(values | {"step": step})))
        rotating.append(RankSteps(rank, f"h{rank}", records))
    culprit = the_only(find(rotating))
    assert culprit.rotates and culprit.ranks == () and culprit.kind is Kind.INPUT
    assert culprit.sentence().startswith("another rank each time: input takes")


def test_a_rank_that_is_held_up_now_and_then_is_named():
    run = made_up(4, 60, seed=3, slow={1: (Kind.GARBAGE, 0.2)}, every=5)
    culprit = the_only(find(run))
    assert (culprit.kind, culprit.ranks) == (Kind.GARBAGE, (1,))
    assert culprit.cost_s == pytest.approx(0.04, rel=0.2)  # spread over all steps


def test_the_lower_half_of_two_slow_ranks_is_no_yardstick():
    slow = {0: (Kind.INPUT, 0.05), 2: (Kind.BACKWARD, 0.04)}
    found = {(culprit.kind, culprit.ranks) for culprit in find(made_up(5, 40, seed=4, slow=slow))}
    assert found == {(Kind.INPUT, (0,)), (Kind.BACKWARD, (2,))}


def test_a_rank_that_makes_up_in_one_part_what_it_loses_in_another_holds_up_nobody():
    slow = {1: (Kind.INPUT, 0.02)}
    run = made_up(2, 40, seed=5, slow=slow)
    faster = []
    for record in run[1].records:
        values = {name: getattr(record, name) for name in StepRecord.__slots__}
        less = {"backward_s": record.backward_s - 0.0195, "step_s": record.step_s - 0.0195}
        faster.append(StepRecord(**(values | less)))
    assert find([run[0], RankSteps(1, "h0", faster)]) == []


def test_hardly_any_alarm_in_clean_runs_with_much_noise():
    alarms = 0
    for seed in range(150):
        alarms += bool(find(made_up(4, 60, seed=seed, noise=0.15)))
    assert alarms <= 1


def test_one_rank_or_few_steps_accuse_nobody():
    assert find(made_up(1, 40, seed=0)) == []
    assert find([]) == []
    assert find(made_up(4, 9, seed=0, slow={1: (Kind.INPUT, 1.0)})) == []


def test_ranks_out_of_step_are_compared_by_their_newest_steps():
    run = made_up(3, 40, seed=6, slow={2: (Kind.FORWARD, 0.05)})
    late = RankSteps(2, "h1", run[2].records[:30])
    moved = []
    for record in run[0].records:
        values = {name: getattr(record, name) for name in StepRecord.__slots__}
        moved.append(StepRecord(**(values | {"step": record.step + 500})))
    assert the_only(find([RankSteps(0, "h0", moved), run[1], late])).ranks == (2,)


# Links

RATE = 25e6  # bytes a second of a usual link


def with_links(
    edges: dict[tuple[int, int], float], retransmits: dict[tuple[int, int], int] | None = None
) -> list[RankSteps]:
    """Return a run of which 1 MB a step crosses each edge, at the given multiple of RATE."""
    size = 1 + max(max(edge) for edge in edges)
    steps = 100
    run = made_up(size, steps, seed=0)
    linked = []
    for rank in run:
        samples = []
        for part in (0.0, 0.5, 1.0):
            connections = []
            for (source, target), speed in edges.items():
                if source != rank.rank:
                    continue
                num_bytes = int(part * steps * 1e6)
                # Each end knows the connection by the two addresses, in its own order.
                local, remote = (
                    f"10.0.0.{end}:{40_000 + source * 100 + target}" for end in (source, target)
                )
                busy_s = num_bytes / (speed * RATE)
                again = int(part * (retransmits or {}).get((source, target), 0))
                connections.append(
                    Connection(local, remote, num_bytes, busy_s, num_bytes // 1448, again)
                )
            for source, target in edges:
                if target == rank.rank:
                    remote, local = (
                        f"10.0.0.{end}:{40_000 + source * 100 + target}" for end in (source, target)
                    )
                    connections.append(Connection(local, remote, 1000, 0.01, 10, 0))
            samples.append(LinkSample(1e9 - 0.01 + part * steps * 0.05, connections))
        linked.append(RankSteps(rank.rank, f"h{rank.rank}", rank.records, samples))
    return linked


def ring(size: int) -> dict[tuple[int, int], float]:
    return {(rank, (rank + 1) % size): 1.0 for rank in range(size)}


@pytest.mark.parametrize("slow", range(4))
def test_a_host_at_a_quarter_of_the_bandwidth_is_named(slow: int):
    edges = {edge: 0.25 if slow in edge else 1.0 for edge in ring(4)}
    culprit = the_only(find(with_links(edges)))
    assert (culprit.kind, culprit.ranks, culprit.link) == (Kind.SLOW_LINK, (slow,), None)
    assert culprit.hosts == (f"h{slow}",) and culprit.cost_s == pytest.approx(0.12, rel=0.3)
    assert "50 Mbit/s against" in culprit.sentence()


@pytest.mark.parametrize("edge", [(0, 1), (3, 0)])
def test_one_slow_link_is_named_by_its_two_ends(edge: tuple[int, int]):
    culprit = the_only(find(with_links(ring(4) | {edge: 0.2})))
    assert culprit.kind is Kind.SLOW_LINK and set(culprit.ranks) == set(edge)
    assert culprit.link == tuple(f"rank {end} on h{end}" for end in edge)
    assert culprit.sentence().startswith(f"the link from rank {edge[0]} on h{edge[0]} to rank")


def test_lost_packets_are_told_from_a_slow_link():
    culprit = the_only(find(with_links(ring(4) | {(1, 2): 0.3}, {(1, 2): 900, (2, 3): 3})))
    assert culprit.kind is Kind.LOSS and culprit.link == ("rank 1 on h1", "rank 2 on h2")
    assert "of its segments were sent again" in culprit.sentence()


def test_a_tree_whose_root_shares_its_link_is_no_alarm():
    # Two children send to the root at once: each of these links gets half of the root's.
    tree = {(1, 0): 0.5, (2, 0): 0.5, (3, 1): 1.0, (0, 1): 0.5, (0, 2): 0.5, (1, 3): 1.0}
    assert find(with_links(tree)) == []


def test_a_slow_link_that_carries_next_to_nothing_is_no_alarm():
    run = with_links(ring(4))
    assert find(run) == []

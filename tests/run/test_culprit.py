"""Made-up runs with a known culprit: kind, rank, host and link must be found, and nothing else."""

import random
import statistics

import pytest

from scaletrain.run.blame import find
from scaletrain.run.culprit import Culprit, Kind
from scaletrain.run.links import Connection, LinkSample
from scaletrain.run.records import StepRecord
from scaletrain.run.slow_links import ServerLinks
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


@pytest.mark.parametrize(("lost_s", "is_named"), [(0.04, False), (0.15, True)])
def test_cores_that_all_ranks_lose_are_not_stolen_from_one(lost_s: float, is_named: bool):
    # A machine with too many processes: everybody waits for a core, rank 0 longer than the others.
    slow = dict.fromkeys(range(1, 4), (Kind.STOLEN_CORES, 0.03))
    culprits = find(made_up(4, 40, seed=8, slow=slow | {0: (Kind.STOLEN_CORES, lost_s)}))
    named = [(culprit.kind, culprit.ranks) for culprit in culprits]
    assert named == ([(Kind.STOLEN_CORES, (0,))] if is_named else [])


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
STEPS = 100
STEP_BYTES = 1e6  # that cross each link
Edge = tuple[int | str, int | str]  # ranks, or names of servers


def samples_of(
    source: int | str, edges: dict[Edge, float], retransmits: dict[Edge, int], host: str
) -> list[LinkSample]:
    """Return what a process notes of its connections, by its and the other's address."""

    def address(end: int | str, edge: Edge) -> str:
        return f"10.0.0.{end}:{edge}"

    samples = []
    for tenth in range(11):
        part = tenth / 10
        connections = []
        for edge, speed in edges.items():
            if source not in edge:
                continue
            target = edge[1] if edge[0] == source else edge[0]
            local, remote = address(source, edge), address(target, edge)
            num_bytes, busy_s, again = 1000, 0.01, 0
            if edge[0] == source:
                num_bytes = int(part * STEPS * STEP_BYTES)
                # Every other sample, the link is a tenth slower than its mean.
                busy_s = (num_bytes + (tenth % 2) * 0.01 * STEPS * STEP_BYTES) / (speed * RATE)
                again = int(part * retransmits.get(edge, 0))
            segments = num_bytes // 1448
            connections.append(Connection(local, remote, num_bytes, busy_s, segments, again))
        samples.append(LinkSample(1e9 - 0.01 + part * STEPS * 0.05, connections, host))
    return samples


def with_links(
    edges: dict[Edge, float], retransmits: dict[Edge, int] | None = None, per_host: int = 1
) -> list[RankSteps]:
    """Return a run of which 1 MB a step crosses each edge, at the given multiple of RATE."""
    size = 1 + max(end for edge in edges for end in edge if isinstance(end, int))
    linked = []
    for rank in made_up(size, STEPS, seed=0):
        host = f"h{rank.rank // per_host}"
        links = samples_of(rank.rank, edges, retransmits or {}, host)
        linked.append(RankSteps(rank.rank, host, rank.records, links))
    return linked


def servers_of(
    edges: dict[Edge, float], retransmits: dict[Edge, int] | None = None
) -> list[ServerLinks]:
    """Return what the servers at these edges note, each on a host of its own."""
    names = sorted({end for edge in edges for end in edge if isinstance(end, str)})
    servers = []
    for index, name in enumerate(names):
        links = samples_of(name, edges, retransmits or {}, f"s{index}")
        servers.append(ServerLinks(index, links))
    return servers


def ring(size: int) -> dict[Edge, float]:
    return {(rank, (rank + 1) % size): 1.0 for rank in range(size)}


@pytest.mark.parametrize("slow", range(4))
def test_a_host_at_a_quarter_of_the_bandwidth_is_named(slow: int):
    edges = {edge: 0.25 if slow in edge else 1.0 for edge in ring(4)}
    culprit = the_only(find(with_links(edges)))
    assert (culprit.kind, culprit.ranks, culprit.link) == (Kind.SLOW_LINK, (slow,), None)
    assert culprit.hosts == (f"h{slow}",) and culprit.cost_s == pytest.approx(0.12, rel=0.3)
    assert "50 Mbit/s against" in culprit.sentence()
    # Ten samples: the interval is narrow, but not nothing.
    assert 0.8 * culprit.cost_s < culprit.low_s < culprit.cost_s < culprit.high_s
    assert f"({1e3 * culprit.low_s:.3g} to {1e3 * culprit.high_s:.3g})" in culprit.sentence()


@pytest.mark.parametrize("slow", range(4))
def test_the_link_that_waits_for_a_slow_host_does_not_hide_it(slow: int):
    """As measured between four emulated hosts of 100 Mbit/s, one of them at a quarter."""
    edges = ring(4) | {(slow, (slow + 1) % 4): 0.24, ((slow - 1) % 4, slow): 0.24}
    edges |= {((slow - 2) % 4, (slow - 1) % 4): 0.37, ((slow + 1) % 4, (slow + 2) % 4): 1.28}
    culprit = the_only(find(with_links(edges)))
    assert (culprit.kind, culprit.ranks, culprit.link) == (Kind.SLOW_LINK, (slow,), None)
    # Within a host, one fast link is no yardstick: a busy core makes the others slow.
    assert find(with_links(edges, per_host=4)) == []


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_each_slow_link_of_a_ring_is_named_by_its_two_ends(size: int):
    for edge in ring(size):
        culprit = the_only(find(with_links(ring(size) | {edge: 0.2})))
        assert culprit.kind is Kind.SLOW_LINK and set(culprit.ranks) == set(edge)
        assert culprit.link == tuple(f"rank {end} on h{end}" for end in edge)
        assert culprit.sentence().startswith(f"the link from rank {edge[0]} on h{edge[0]} to rank")


def test_each_slow_link_of_a_tree_and_of_a_server_is_named():
    for edge in BINARY_TREE:
        culprit = the_only(find(with_links(dict.fromkeys(BINARY_TREE, 1.0) | {edge: 0.1})))
        assert culprit.link == tuple(f"rank {end} on h{end}" for end in edge)
    for rank in range(4):
        for edge in ((rank, "a"), ("a", rank)):
            edges = star(("a",)) | {edge: 0.02}
            culprit = the_only(find(with_links(edges), servers_of(edges)))
            assert (culprit.ranks, culprit.servers) == ((rank,), (0,))
            names = {"a": "server 0 on s0", rank: f"rank {rank} on h{rank}"}
            assert culprit.link == tuple(names[end] for end in edge)


def test_a_cost_of_few_samples_has_a_wide_interval_instead_of_none():
    """As ``top`` sees it after a few seconds, in which a link was slow for a while."""
    run = []
    for rank in with_links(ring(4) | {(1, 2): 0.2}):
        run.append(RankSteps(rank.rank, rank.host, rank.records, rank.links[:4]))
    culprit = the_only(find(run))
    whole = the_only(find(with_links(ring(4) | {(1, 2): 0.2})))
    assert culprit.low_s < culprit.cost_s < culprit.high_s
    assert culprit.high_s - culprit.low_s > 1.5 * (whole.high_s - whole.low_s)
    assert f"({1e3 * culprit.low_s:.3g} to {1e3 * culprit.high_s:.3g})" in culprit.sentence()


@pytest.mark.parametrize("times", [2, 6])
def test_a_link_is_not_called_slow_for_a_cost_that_may_be_nothing(times: int):
    """A process that the machine held up twice: its link, too, moved little while it had data."""
    run = with_links(ring(4))
    samples = []
    for number, sample in enumerate(run[1].links):
        held_up_s = 6.5 / times * min(times, max(0, number - 3))
        connections = []
        for each in sample.connections:
            is_sending = each.acked_bytes > 1000
            connections.append(each._replace(busy_s=each.busy_s + is_sending * held_up_s))
        samples.append(sample._replace(connections=connections))
    run[1] = RankSteps(1, run[1].host, run[1].records, samples)
    found = find(run)
    assert [each.link for each in found] == [("rank 1 on h1", "rank 2 on h2")] * (times > 2)


def test_a_mean_cost_is_a_part_of_a_mean_step():
    """A fifth of the steps is long: against the others, it would cost more than a whole step."""
    run = made_up(4, 60, seed=3, slow={1: (Kind.GARBAGE, 0.2)}, every=5)
    mean_s = statistics.fmean(record.step_s for record in run[1].records)
    stall = the_only(find(run))
    assert stall.share == pytest.approx(0.2 / 5 / mean_s, rel=0.05)
    linked = []
    for rank, with_link in zip(run, with_links(ring(4) | {(1, 2): 0.2}), strict=True):
        linked.append(RankSteps(rank.rank, with_link.host, rank.records, with_link.links))
    slow_link = next(each for each in find(linked) if each.kind is Kind.SLOW_LINK)
    assert slow_link.step_s == pytest.approx(mean_s, rel=0.05)


def test_packets_lost_on_any_link_are_told_from_a_slow_one():
    for edge in ring(4):
        losing = the_only(find(with_links(ring(4) | {edge: 0.3}, {edge: 900})))
        assert losing.kind is Kind.LOSS and set(losing.ranks) == set(edge)
        assert losing.link == tuple(f"rank {end} on h{end}" for end in edge)


def test_lost_packets_are_told_from_a_slow_link():
    culprit = the_only(find(with_links(ring(4) | {(1, 2): 0.3}, {(1, 2): 900, (2, 3): 3})))
    assert culprit.kind is Kind.LOSS and culprit.link == ("rank 1 on h1", "rank 2 on h2")
    assert "of its segments were sent again" in culprit.sentence()


def test_a_tree_whose_root_shares_its_link_is_no_alarm():
    # Two children send to the root at once: each of these links gets half of the root's.
    tree: dict[Edge, float] = {
        (1, 0): 0.5,
        (2, 0): 0.5,
        (3, 1): 1.0,
        (0, 1): 0.5,
        (0, 2): 0.5,
        (1, 3): 1.0,
    }
    assert find(with_links(tree)) == []


def test_a_slow_link_that_carries_next_to_nothing_is_no_alarm():
    run = with_links(ring(4))
    assert find(run) == []


BINARY_TREE = ((1, 0), (2, 0), (3, 2), (0, 1), (0, 2), (2, 3))


@pytest.mark.parametrize("slow", range(4))
def test_a_slow_host_is_named_in_a_tree_most_of_whose_links_end_at_it(slow: int):
    edges: dict[Edge, float] = {edge: 0.08 if slow in edge else 1.0 for edge in BINARY_TREE}
    culprit = the_only(find(with_links(edges)))
    assert (culprit.kind, culprit.ranks, culprit.link) == (Kind.SLOW_LINK, (slow,), None)


def test_a_port_that_many_links_share_is_no_slow_host():
    # All that the root receives goes through its port: a quarter is left for each child.
    tree: dict[Edge, float] = {}
    for child in range(1, 5):
        tree |= {(child, 0): 0.25, (0, child): 0.25, (child, child + 4): 1.0}
    culprits = find(with_links(tree))
    assert [culprit for culprit in culprits if culprit.link is None] == []


def test_the_network_is_not_measured_by_connections_inside_a_host():
    # Two ranks a host: half of the links stay inside, and are twenty times as fast.
    edges = {edge: 1.0 if edge[0] % 2 else 20.0 for edge in ring(8)}
    assert find(with_links(edges, per_host=2)) == []
    edges |= dict.fromkeys(((1, 2), (3, 4)), 0.2)
    culprit = the_only(find(with_links(edges, per_host=2)))
    assert (culprit.ranks, culprit.hosts, culprit.link) == ((2, 3), ("h1",), None)
    assert culprit.sentence().startswith("ranks 2, 3 on h1: slow link costs")


def star(servers: tuple[str, ...]) -> dict[Edge, float]:
    edges: dict[Edge, float] = {}
    for server in servers:
        for rank in range(4):
            edges |= {(rank, server): 0.25, (server, rank): 0.25}
    return edges


def test_what_a_server_sends_to_a_rank_is_known_from_the_server():
    edges, again = star(("a",)) | {("a", 2): 0.1}, {("a", 2): 2000}
    culprit = the_only(find(with_links(edges, again), servers_of(edges, again)))
    assert (culprit.kind, culprit.ranks, culprit.servers) == (Kind.LOSS, (2,), (0,))
    assert culprit.link == ("server 0 on s0", "rank 2 on h2")
    # Without its file nobody can know: the rank itself sends nothing again.
    assert find(with_links(edges, again)) == []


def test_a_slow_rank_and_a_slow_server_are_told_apart():
    edges = star(("a", "b"))
    of_rank = {edge: 0.02 if 3 in edge else speed for edge, speed in edges.items()}
    culprit = the_only(find(with_links(of_rank), servers_of(of_rank)))
    assert (culprit.ranks, culprit.servers, culprit.hosts) == ((3,), (), ("h3",))
    of_server = {edge: 0.02 if "b" in edge else speed for edge, speed in edges.items()}
    culprit = the_only(find(with_links(of_server), servers_of(of_server)))
    assert (culprit.ranks, culprit.servers, culprit.hosts) == ((), (1,), ("s1",))
    assert culprit.sentence().startswith("server 1 on s1: slow link costs")


def test_the_file_of_an_earlier_job_s_server_says_nothing():
    left = star(("a",)) | {("a", 2): 0.01}
    older = [ServerLinks(0, samples_of("a", {("a", 7): 0.01, ("a", 8): 1.0}, {}, "s0"))]
    assert len(find(with_links(left), servers_of(left))) == 1
    assert find(with_links(ring(4)), older) == []


def test_a_link_that_was_fast_for_long_is_judged_by_the_steps_that_are_looked_at():
    fast = with_links(ring(4))
    run = []
    for rank in fast:
        # Ten steps more, in which one link has a tenth of its speed.
        samples = [*rank.links]
        for _ in range(2):
            connections = []
            for before in samples[-1].connections:
                is_slow = rank.rank == 1 and before.acked_bytes > 1000
                moved = int(5 * STEP_BYTES) if before.acked_bytes > 1000 else 0
                busy_s = before.busy_s + moved / RATE * (10 if is_slow else 1)
                num_bytes = before.acked_bytes + moved
                connections.append(before._replace(acked_bytes=num_bytes, busy_s=busy_s))
            samples.append(LinkSample(samples[-1].time + 0.25, connections, rank.host))
        later = made_up(4, STEPS + 10, seed=0)[rank.rank].records
        run.append(RankSteps(rank.rank, rank.host, later, samples))
    assert find(run) == [], "one fiftieth of what moved says nothing of the whole run"
    culprit = the_only(find([each.newest(10) for each in run]))
    assert culprit.link == ("rank 1 on h1", "rank 2 on h2")


def test_the_last_of_two_that_share_a_port_each_time_is_no_slow_link():
    # The root sends to two at once. What it sends to rank 2 waits for what it sends to rank 1.
    tree = dict.fromkeys(BINARY_TREE, 1.0) | {(0, 2): 0.38}
    assert find(with_links(tree)) == []
    culprit = the_only(find(with_links(tree | {(0, 2): 0.1})))
    assert culprit.link == ("rank 0 on h0", "rank 2 on h2")


def test_a_link_that_is_slow_for_a_moment_is_no_alarm():
    run = []
    for rank in with_links(ring(4)):
        samples = []
        for number, sample in enumerate(rank.links):
            # Between two samples, what rank 1 sent waited for two seconds.
            held_up_s = 2.0 if rank.rank == 1 and number > 5 else 0.0
            connections = []
            for each in sample.connections:
                connections.append(each._replace(busy_s=each.busy_s + held_up_s))
            samples.append(LinkSample(sample.time, connections, sample.host))
        run.append(RankSteps(rank.rank, rank.host, rank.records[55:75], samples[:8]))
    assert find(run) == []

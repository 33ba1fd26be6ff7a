"""timeouts.py: one order of all limits. Bug it catches: a limit that ends a healthy job, or
that hides a better message.
"""

import math
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from scaletrain import plugins, timeouts
from scaletrain.errors import UserError
from scaletrain.run import progress
from scaletrain.timeouts import LONGEST_S, Timeouts
from scaletrain.training.exchange import Setup
from scaletrain.world import World
from tests.ranks import run_ranks

ANY = st.floats(min_value=1e-3, max_value=LONGEST_S).map(Timeouts)
VERDICT_S = timeouts.LOOK_S + timeouts.STACKS_S  # from the end of a silence to the culprit's name


@given(ANY)
def test_a_worker_may_take_long_to_start(limits: Timeouts):
    assert limits.join_s >= max(180.0, limits.step_s)


@given(ANY)
def test_ranks_that_are_missing_are_named_before_a_hang_is(limits: Timeouts):
    assert limits.start_s > limits.join_s


@given(ANY)
def test_a_collective_outlasts_the_verdict_of_a_hang(limits: Timeouts):
    assert limits.collective_s > limits.step_s + VERDICT_S
    assert limits.first_collective_s > limits.start_s + VERDICT_S


@given(ANY, st.floats(0, 1), st.floats(0, 1))
def test_ranks_that_report_in_time_never_break_a_collective(
    limits: Timeouts, before: float, after: float
):
    """One rank waits in the next collective while the other finishes a step, reports it, and works
    on the next one.
    """
    assert limits.collective_s > (before + after) * limits.step_s
    assert limits.first_collective_s > (before + after) * limits.start_s


@given(ANY)
def test_the_first_step_never_has_less_time_than_others(limits: Timeouts):
    assert limits.start_s > limits.step_s and limits.first_collective_s > limits.collective_s


@given(ANY)
def test_the_supervisor_waits_for_the_reports_of_failed_collectives(limits: Timeouts):
    assert limits.step_s + limits.reports_s > limits.collective_s + timeouts.ANSWER_S


@given(ANY)
def test_torch_takes_every_limit(limits: Timeouts):
    for limit in (limits.join, limits.collective, limits.first_collective):
        assert timedelta(0) < limit < timedelta(days=365)


@given(ANY)
def test_a_library_waits_longer_than_any_limit_of_ours_under_our_supervisor(limits: Timeouts):
    assert limits.first_collective_s < timeouts.WATCHED_S < timedelta(days=365).total_seconds()


LOCAL = World(rank=0, size=2, local_rank=0, local_size=2, launcher="local")


@pytest.mark.parametrize(
    ("world", "doing", "is_watched"),
    [
        (LOCAL, progress.STARTING, True),
        (LOCAL, progress.SCRIPT, False),  # nobody notices if it hangs
        (LOCAL._replace(launcher="torchrun"), progress.STARTING, False),
        (LOCAL._replace(launcher="slurm"), progress.STARTING, False),
        # Ranks have to notice that the network between their hosts is cut.
        (LOCAL._replace(launcher="rehearsal", num_nodes=2), progress.STARTING, False),
    ],
)
def test_a_library_keeps_our_limit_where_no_supervisor_of_ours_has_the_verdict(
    world: World, doing: str, is_watched: bool, tmp_path: Path
):
    limit = timedelta(seconds=122)
    assert progress.library_limit(limit) == limit  # outside a worker
    with progress.reporting(tmp_path, world):
        progress.alive(doing)
        long = timedelta(seconds=timeouts.WATCHED_S)
        assert progress.library_limit(limit) == (long if is_watched else limit)


def test_the_limits_that_nobody_sets_are_in_order():
    assert timeouts.FAILED_S < timeouts.ENDS_ITSELF_S < timeouts.LAUNCHER_S < timeouts.STOP_S
    assert timeouts.GRACE_S < timeouts.PEERS_S
    assert VERDICT_S < timeouts.MARGIN_S


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf, 1e9])
def test_other_lengths_of_time_are_refused(seconds: float):
    with pytest.raises(UserError, match="timeout_s"):
        Timeouts(seconds)


def test_the_docs_show_the_limits():
    page = (Path(__file__).parents[1] / "docs" / "launchers" / "timeouts.md").read_text()
    for limits in (Timeouts(60.0), Timeouts(600.0)):
        for seconds in (limits.step_s, limits.join_s, limits.start_s, limits.collective_s, limits.first_collective_s):  # fmt: skip
            assert f" {seconds:g} |" in page, f"{seconds:g} s of {limits}"


SHORT = Timeouts(0.2)  # collectives have 2.4 s, and minutes before the first step


def _late(rank: int, size: int, folder: Path, name: str) -> str:
    """Come late to the first step, and again to the second; return the failure of the second."""
    store = dist.FileStore(str(folder / "store"), size)
    exchange = plugins.load("exchange", name)(
        World(rank=rank, size=size, local_rank=rank, local_size=size),
        Setup(store, torch.device("cpu"), SHORT, folder),
    )
    model = torch.nn.Linear(2, 1)
    wrapped = exchange.attach(model, torch.optim.SGD(model.parameters(), 0.1))
    late_s = SHORT.collective_s + 0.5
    for step in range(2):
        if rank == 1:
            time.sleep(late_s * (step + 1))
        try:
            wrapped(torch.ones(1, 2)).sum().backward()
        except RuntimeError as error:
            return f"step {step}: {error}"
        exchange.step()
    return "none"


@pytest.mark.slow
@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["native", "scheduled"])
def test_a_late_rank_breaks_no_first_step_and_ends_a_later_one(name: str, tmp_path: Path):
    failure, _ = run_ranks(_late, 2, tmp_path, name, timeout_s=40)
    assert failure.startswith("step 1") and "imed out" in failure, failure

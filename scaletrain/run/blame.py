"""Find the culprit: which rank, host or link the others wait for, and why, from records alone.

``find`` is a pure function of what each rank wrote down by itself. ``scaletrain top`` calls it on
the last steps, the end of every run and the report on all of them. Slow ranks are found in the
times of steps (``slow_ranks``), slow links in what the kernel counts about each connection
(``slow_links``).
"""

from collections.abc import Sequence

from scaletrain.run.culprit import Culprit
from scaletrain.run.slow_links import ServerLinks, slow_links
from scaletrain.run.slow_ranks import RankSteps, StepTable, slow_ranks


def find(ranks: Sequence[RankSteps], servers: Sequence[ServerLinks] = ()) -> list[Culprit]:
    """Return who held up the others, the most expensive first; nothing if nobody did.

    Steps are compared by their numbers. Where ranks are not in step (asynchronous training), their
    newest steps are.

    Args:
        ranks: all ranks of a job, or those that are known. One alone has nobody to be compared
            with.
        servers: its parameter servers.
    """
    if len(ranks) < 2:
        return []
    ranks = sorted(ranks, key=lambda each: each.rank)
    table = StepTable.of(ranks)
    culprits = slow_ranks(table) + slow_links(ranks, servers, table)
    return sorted(culprits, key=lambda culprit: -culprit.total_s)

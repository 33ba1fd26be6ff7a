"""Processor cores: which a process may use, for how much of the time, and a worker's own."""

import os
from pathlib import Path

_MEMBERSHIP = Path("/proc/self/cgroup")
_CGROUPS = Path("/sys/fs/cgroup")
_SYSTEM = Path("/sys/devices/system")


def usable() -> list[int]:
    """Return the cores that this process may use, in ascending order."""
    return sorted(os.sched_getaffinity(0))


def quota(membership: Path = _MEMBERSHIP, cgroups: Path = _CGROUPS) -> float | None:
    """Return how many cores' time a control group leaves to this process; None: no limit.

    Containers limit time: with half a core, a process computes half of the time. The smallest limit
    counts, of the process's group and the groups around it.

    Args:
        membership: the kernel's list of this process's groups.
        cgroups: where the kernel shows all groups, of version 1, 2 or both.
    """
    limits = []
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux, or a /proc that hides it
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        roots = [cgroups / controllers] if "cpu" in controllers.split(",") else []
        if not controllers:  # version 2, alone or beside version 1
            roots = [cgroups, cgroups / "unified"]
        for root in roots:
            group = root / path.lstrip("/")
            # The container's view may begin inside: folders that are not there limit nothing.
            for folder in [group, *group.parents]:
                limits.append(_limit(folder))
                if folder == root:
                    break
    return min((limit for limit in limits if limit is not None), default=None)


def count() -> int:
    """Return how many threads this process can run at full speed, at least one."""
    cores = len(usable())
    limit = quota()
    return cores if limit is None else max(1, min(cores, int(limit)))


def cores_of(rank: int, threads: int, workers: int, system: Path = _SYSTEM) -> list[int]:
    """Return the cores that a bound worker of this host is kept on.

    Workers are spread evenly over NUMA nodes, and each stays in one if it fits. Hyperthreads of one
    core go to one worker, and stay idle while there are cores enough. With more threads than cores,
    workers share them in turn.

    Args:
        rank: among the workers of this host.
        threads: of one worker.
        workers: of this host.
        system: where the kernel shows cores and nodes.
    """
    siblings = {core: _siblings(core, system) for core in usable()}
    first_threads = [core for core in siblings if core == min(siblings[core] & siblings.keys())]
    chosen = list(siblings)
    if workers * threads <= len(first_threads):
        chosen = first_threads
    nodes: dict[int, list[int]] = {}
    for core in sorted(chosen, key=lambda core: (min(siblings[core]), core)):
        nodes.setdefault(_node(core, system), []).append(core)
    in_order = [core for _, cores in sorted(nodes.items()) for core in cores]
    first = rank * threads
    workers_per_node, left_over = divmod(workers, len(nodes))
    smallest = min(len(cores) for cores in nodes.values())
    if not left_over and workers_per_node * threads <= smallest:
        node, place = divmod(rank, workers_per_node)
        in_order = nodes[sorted(nodes)[node]]
        first = place * threads
    return [in_order[place % len(in_order)] for place in range(first, first + threads)]


def _siblings(core: int, system: Path) -> set[int]:
    """Return the hyperthreads of a core, itself among them."""
    try:
        text = (system / f"cpu/cpu{core}/topology/thread_siblings_list").read_text()
        return _expand(text) | {core}
    except (OSError, ValueError):
        return {core}


def _node(core: int, system: Path) -> int:
    """Return the NUMA node of a core; 0 where the kernel does not say."""
    for folder in (system / f"cpu/cpu{core}").glob("node[0-9]*"):
        return int(folder.name.removeprefix("node"))
    return 0


def _expand(text: str) -> set[int]:
    """Return the numbers of a list of the kernel.

    >>> sorted(_expand("0-1,8"))
    [0, 1, 8]
    """
    numbers: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        numbers.update(range(int(first), int(last or first) + 1))
    return numbers


def _limit(group: Path) -> float | None:
    """Return the cores' time of one control group; None: no limit, or no such group."""
    try:
        if (group / "cpu.max").exists():
            time_us, period_us = (group / "cpu.max").read_text().split()
        else:
            time_us = (group / "cpu.cfs_quota_us").read_text()
            period_us = (group / "cpu.cfs_period_us").read_text()
        limit = int(time_us) / int(period_us)  # "max" and -1 are no limit
    except (OSError, ValueError):
        return None
    return limit if limit > 0 else None

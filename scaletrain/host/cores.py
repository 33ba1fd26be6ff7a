"""Processor cores: which a process may use, for how much of the time, and a worker's own."""

import os
from pathlib import Path

_MEMBERSHIP = Path("/proc/self/cgroup")
_CGROUPS = Path("/sys/fs/cgroup")


def usable() -> list[int]:
    """Return the cores that this process may use, in ascending order."""
    return sorted(os.sched_getaffinity(0))


def quota(membership: Path = _MEMBERSHIP, cgroups: Path = _CGROUPS) -> float | None:
    """Return how many cores' time a control group leaves to this process; None: no limit.

    Containers limit time: half a core is one on which a process computes half of the time. The
    smallest limit of the process's group and of those around it counts.

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


def cores_of(rank: int, threads: int) -> list[int]:
    """Return the cores that a bound worker is kept on: the next ``threads`` usable ones.

    With more threads than cores, workers share them in turn.
    """
    cores = usable()
    first = rank * threads
    return [cores[place % len(cores)] for place in range(first, first + threads)]


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

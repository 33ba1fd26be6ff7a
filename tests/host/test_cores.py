"""Tests of host/cores.py: a control group's share of time counts as cores.

Bugs it catches: half a core that is taken for all cores of the machine, a limit of the group
around a process that is overlooked.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from scaletrain.host import cores


def tree(folder: Path, membership: str, files: dict[str, str]) -> float | None:
    (folder / "membership").write_text(membership)
    for name, text in files.items():
        path = folder / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return cores.quota(folder / "membership", folder / "cgroup")


@pytest.mark.parametrize(
    ("membership", "files", "limit"),
    [
        ("0::/job\n", {"job/cpu.max": "50000 100000\n"}, 0.5),
        ("0::/job\n", {"job/cpu.max": "max 100000\n"}, None),
        # That of the group around it is smaller.
        (
            "0::/pod/job\n",
            {"pod/job/cpu.max": "400000 100000", "pod/cpu.max": "150000 100000"},
            1.5,
        ),
        # In a container the path is the host's, and the limit lies at the root of what is seen.
        ("0::/docker/4f2a\n", {"cpu.max": "200000 100000"}, 2.0),
        (
            "4:memory:/x\n3:cpu,cpuacct:/x\n0::/\n",
            {
                "cpu,cpuacct/x/cpu.cfs_quota_us": "300000\n",
                "cpu,cpuacct/x/cpu.cfs_period_us": "100000\n",
                "memory/x/cpu.max": "1 100000",
            },
            3.0,
        ),
        (
            "1:cpu:/\n",
            {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
            None,
        ),
        ("0::/job\n", {"job/cpu.max": "garbage"}, None),
        ("0::/gone\n", {}, None),
    ],
)
def test_the_smallest_limit_counts(
    membership: str, files: dict[str, str], limit: float | None, tmp_path: Path
):
    assert tree(tmp_path, membership, files) == limit


@pytest.mark.parametrize(("limit", "count"), [(None, 8), (0.5, 1), (2.5, 2), (64.0, 8)])
def test_a_limit_makes_fewer_threads(
    limit: float | None, count: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cores, "usable", lambda: list(range(8)))
    monkeypatch.setattr(cores, "quota", lambda: limit)
    assert cores.count() == count


def test_the_kernel_shows_a_limit_that_it_keeps():
    """A real control group of half a core."""
    group = Path("/sys/fs/cgroup/cpu") / "scaletrain-test-cores"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"needs root and control groups of version 1: {error}")
    try:
        (group / "cpu.cfs_quota_us").write_text("50000")
        (group / "cpu.cfs_period_us").write_text("100000")
        code = (
            "import os, sys, pathlib\n"
            "pathlib.Path(sys.argv[1], 'cgroup.procs').write_text(str(os.getpid()))\n"
            "from scaletrain.host import cores\n"
            "print(cores.quota(), cores.count())\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, group], capture_output=True, text=True, timeout=30
        )
        assert done.stdout == "0.5 1\n", done.stderr
    finally:
        group.rmdir()


def machine(folder: Path, siblings: list[str], nodes: list[int]) -> Path:
    """Write the kernel's folders of a machine, core by core."""
    for core, (text, node) in enumerate(zip(siblings, nodes, strict=True)):
        topology = folder / f"cpu/cpu{core}/topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{text}\n")
        (folder / f"cpu/cpu{core}/node{node}").mkdir()
    return folder


# Two NUMA nodes, each of two cores of two hyperthreads, numbered as many servers do.
SERVER = (["0,4", "1,5", "2,6", "3,7"] * 2, [0, 0, 1, 1] * 2)


@pytest.mark.parametrize(
    ("workers", "threads", "expected"),
    [
        (1, 2, [[0, 1]]),  # cores of one node, a thread on each
        (2, 1, [[0], [2]]),  # a node each
        (2, 2, [[0, 1], [2, 3]]),
        (4, 1, [[0], [1], [2], [3]]),
        (4, 2, [[0, 4], [1, 5], [2, 6], [3, 7]]),  # hyperthreads of one core together
        (2, 4, [[0, 4, 1, 5], [2, 6, 3, 7]]),
        (3, 1, [[0], [1], [2]]),  # not even: one after the other
        (1, 8, [[0, 4, 1, 5, 2, 6, 3, 7]]),
        (5, 2, [[0, 4], [1, 5], [2, 6], [3, 7], [0, 4]]),  # too many: in turn
    ],
)
def test_bound_workers_keep_to_a_node_and_to_whole_cores(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
    threads: int,
    expected: list[list[int]],
):
    monkeypatch.setattr(cores, "usable", lambda: list(range(8)))
    system = machine(tmp_path, *SERVER)
    bound = [cores.cores_of(rank, threads, workers, system) for rank in range(workers)]
    assert bound == expected


def test_only_usable_cores_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cores, "usable", lambda: [4, 5, 7])  # as a control group may leave them
    system = machine(tmp_path, *SERVER)
    assert [cores.cores_of(rank, 1, 3, system) for rank in range(3)] == [[4], [5], [7]]
    nowhere = tmp_path / "nothing"  # a kernel that does not say
    assert [cores.cores_of(rank, 1, 3, nowhere) for rank in range(3)] == [[4], [5], [7]]

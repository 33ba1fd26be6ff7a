"""Workers on this host, under our own supervisor (the default)."""

import os

from scaletrain.host.cores import cores_of
from scaletrain.launching.job import Command, Job, LaunchPlan


def plan(job: Job, *, bind: bool = False) -> LaunchPlan:
    """One process a worker. ``bind`` keeps each worker on its own cores (taskset), which steadies measurements.

    The supervisor binds the store's port and hands the socket to rank 0; nobody guesses a port.
    """
    cores = sorted(os.sched_getaffinity(0))
    threads = job.threads or max(1, len(cores) // job.workers)
    explain = [
        f"{job.workers} worker{'s' * (job.workers > 1)} on {len(cores)} cores, {threads} thread{'s' * (threads > 1)} each"
    ]
    if job.workers * threads > len(cores):
        explain.append(
            f"more threads ({job.workers * threads}) than cores ({len(cores)}): workers will wait for each other"
        )
    commands = []
    for rank in range(job.workers):
        variables = {
            "SCALETRAIN_LAUNCHER": "local",
            "RANK": rank, "WORLD_SIZE": job.workers,
            "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": job.workers,
            "GROUP_RANK": 0, "GROUP_WORLD_SIZE": 1,
            "OMP_NUM_THREADS": threads,
        }  # fmt: skip
        argv = job.argv
        if bind:
            argv = ("taskset", "--cpu-list", ",".join(map(str, cores_of(rank, threads))), *argv)
        env = (*((key, str(value)) for key, value in variables.items()), *job.env)
        commands.append(Command(f"rank {rank}", argv, env, rank))
    return LaunchPlan(
        tuple(commands),
        explain=tuple(explain),
        store_address="127.0.0.1",
        companions=job.companions,
    )

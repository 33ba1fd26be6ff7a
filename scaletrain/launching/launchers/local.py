"""Workers on this host, under our own supervisor (the default)."""

from scaletrain.host import cores
from scaletrain.launching.job import Job, environment
from scaletrain.launching.plan import Command, LaunchPlan, threads_each
from scaletrain.units import plural


def plan(job: Job, *, bind: bool = False) -> LaunchPlan:
    """Start one process a worker.

    The supervisor binds the store's port and hands the socket to rank 0, so no port is guessed.

    Args:
        job: the job to plan.
        bind: keep each worker on its own cores (taskset), in one NUMA node if it fits; this
            steadies measurements.
    """
    threads = threads_each(job, job.workers)
    num_cores = cores.count()
    num_threads = job.workers * threads
    explain = [
        f"{plural(job.workers, 'worker')} on {plural(num_cores, 'core')},"
        f" {plural(threads, 'thread')} each"
    ]
    if num_threads > num_cores:
        explain.append(
            f"more threads ({num_threads}) than cores ({num_cores}):"
            " workers will wait for each other"
        )
    commands = []
    for rank in range(job.workers):
        # All but the first are torchrun's names: torch's env:// and most scripts read them.
        variables = {
            "SCALETRAIN_LAUNCHER": "local",
            "RANK": rank,
            "WORLD_SIZE": job.workers,
            "LOCAL_RANK": rank,
            "LOCAL_WORLD_SIZE": job.workers,
            "GROUP_RANK": 0,
            "GROUP_WORLD_SIZE": 1,
            **job.variables(threads),
        }
        command = Command(f"rank {rank}", job.argv, environment(variables), rank)
        if bind:
            own = cores.cores_of(rank, threads, job.workers)
            command = command._replace(cores=tuple(own))
            explain.append(f"rank {rank} is kept on cores {', '.join(map(str, own))}")
        commands.append(command)
    return LaunchPlan(
        tuple(commands),
        explain=tuple(explain),
        # All workers are on this host: the store need not be open to a network.
        store_address="127.0.0.1",
        companions=job.companions,
        is_local=True,
    )

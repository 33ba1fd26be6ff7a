"""torchrun on this host, or on several (run the same command on each)."""

import sys
from typing import NamedTuple

from scaletrain.errors import UserError
from scaletrain.host import cores
from scaletrain.launching.job import Job, environment
from scaletrain.launching.plan import Command, LaunchPlan, threads_each
from scaletrain.units import plural

_RESTARTS = 3  # of the workers of an elastic job, unless the user says otherwise


def plan(
    job: Job,
    *,
    nodes: int | str = 1,
    endpoint: str = "",
    run_id: str = "",
    max_restarts: int | None = None,
    local_addr: str = "",
    is_host: bool | None = None,
    join_timeout_s: int = 600,
    last_call_s: int = 30,
) -> LaunchPlan:
    """Start one torchrun agent on this host.

    With a range of nodes, workers are started again when a host is lost, and go on from the last
    checkpoint. The hosts that are left wait ``last_call_s`` for more to join.

    Args:
        job: the job to plan.
        nodes: how many hosts take part, ``2`` or ``min:max``. The workers are spread evenly over
            the most of them.
        endpoint: HOST:PORT of one of several hosts, where the agents meet (c10d).
        run_id: the same on every host; by default the name of the run directory.
        max_restarts: how often workers are started again; by default 3 with a range, else never.
        local_addr: this host's address, where hosts have no names.
        is_host: true on the endpoint's host and false on the others, where hosts have no names.
        join_timeout_s: how long the agents wait for each other.
        last_call_s: how long they wait for more hosts, with a range.
    """
    node_range = _parse_nodes(nodes)
    most = node_range.most
    if job.workers % most:
        raise UserError(
            f"launcher.nodes: {job.workers} workers do not spread evenly over {most} nodes"
        )
    if most > 1 and not endpoint:
        raise UserError(
            f"launcher.endpoint: is missing; {most} nodes meet at HOST:PORT of one of them"
        )
    if max_restarts is None:
        max_restarts = _RESTARTS if node_range.is_elastic else 0
    workers_here = job.workers // most
    threads = threads_each(job, workers_here)

    agent = [
        sys.executable,
        "-P",
        "-m",
        "torch.distributed.run",
        f"--nproc-per-node={workers_here}",
    ]
    agent.append(f"--max-restarts={max_restarts}")
    if most == 1:
        # Alone, the agent serves its own meeting point at a free port: no endpoint is needed.
        agent.append("--standalone")
    else:
        settings = [f"join_timeout={join_timeout_s}"]
        if node_range.is_elastic:
            settings.append(f"last_call_timeout={last_call_s}")
        if is_host is not None:
            settings.append(f"is_host={int(is_host)}")
        agent += [f"--nnodes={nodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}"]
        agent.append(f"--rdzv-id={run_id or job.run_dir.name}")
        agent.append(f"--rdzv-conf={','.join(settings)}")
        if local_addr:
            agent.append(f"--local-addr={local_addr}")

    explain = [
        f"{workers_here} of {plural(job.workers, 'worker')} on this host"
        f" ({plural(cores.count(), 'core')}), {plural(threads, 'thread')} each"
    ]
    if most > 1:
        explain.append("run the same command on every host; --run-dir must be a folder they share")
    torchrun = Command(
        "torchrun",
        (*agent, *job.argv_for_torchrun),
        environment(job.variables(threads)),
        restarts_workers=max_restarts > 0 or node_range.is_elastic,
        stop_s=15.0,  # torchrun ends its workers within 30 s of a SIGTERM; ours leave sooner
    )
    return LaunchPlan(
        (torchrun,),
        explain=tuple(explain),
        companions=job.companions,
        is_part=most > 1,
        is_local=most == 1,
    )


class _NodeRange(NamedTuple):
    most: int  # hosts that take part when all of them are there
    is_elastic: bool  # the job goes on with fewer


def _parse_nodes(nodes: int | str) -> _NodeRange:
    """Read ``2`` or ``2:4``. Raises UserError for anything else."""
    first, colon, last = str(nodes).partition(":")
    if not colon:
        last = first
    if first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last):
        return _NodeRange(int(last), is_elastic=bool(colon))
    raise UserError(
        f"launcher.nodes: {nodes!r} is not allowed"
        " (allowed: a number such as 2, or a range such as 2:4)"
    )

"""torchrun on this host, or on several (run the same command on each)."""

import os
import sys

from scaletrain.errors import UserError
from scaletrain.launching.job import Command, Job, LaunchPlan


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
    """One torchrun agent on this host.

    ``nodes`` is how many hosts take part, ``2`` or ``min:max``; workers are spread evenly over (the most of) them. Several hosts need
    ``endpoint``, HOST:PORT of one of them, where the agents meet (c10d). Where hosts have no names,
    say ``is_host`` (true on the endpoint's host, false on the others) and ``local_addr``.

    With a range, workers are started again (up to ``max_restarts`` times, 3 unless given) when a host is lost, and go on from the
    last checkpoint; the hosts that are left wait ``last_call_s`` for more to join.
    """
    low, _, high = str(nodes).partition(":")
    if not low.isdigit() or not (high or low).isdigit() or not 1 <= int(low) <= int(high or low):
        raise UserError(
            f"launcher.nodes: {nodes!r} is not allowed (allowed: a number such as 2, or a range such as 2:4)"
        )
    most = int(high or low)
    if job.workers % most:
        raise UserError(
            f"launcher.nodes: {job.workers} workers do not spread evenly over {most} nodes"
        )
    if max_restarts is None:
        max_restarts = 3 if high else 0
    if most > 1 and not endpoint:
        raise UserError(
            f"launcher.endpoint: is missing; {most} nodes meet at HOST:PORT of one of them"
        )
    here = job.workers // most
    cores = len(os.sched_getaffinity(0))
    threads = job.threads or max(1, cores // here)
    agent = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc-per-node={here}",
        f"--max-restarts={max_restarts}",
    ]
    if most == 1:
        agent.append("--standalone")
    else:
        agent += [f"--nnodes={nodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}"]
        agent.append(f"--rdzv-id={run_id or job.run_dir.name}")
        conf = [f"join_timeout={join_timeout_s}"]
        if high:
            conf.append(f"last_call_timeout={last_call_s}")
        if is_host is not None:
            conf.append(f"is_host={int(is_host)}")
        agent.append(f"--rdzv-conf={','.join(conf)}")
        if local_addr:
            agent.append(f"--local-addr={local_addr}")
    command = job.argv[1:] if job.program else ("--no-python", *job.argv)
    explain = [
        f"{here} of {job.workers} workers on this host ({cores} cores), {threads} thread{'s' * (threads > 1)} each"
    ]
    if most > 1:
        explain.append("run the same command on every host; --run-dir must be a folder they share")
    env = (("OMP_NUM_THREADS", str(threads)), *job.env)
    # torchrun ends its workers within 30 s of a SIGTERM; ours leave sooner.
    agent_command = Command(
        "torchrun",
        (*agent, *command),
        env,
        restarts_workers=max_restarts > 0 or bool(high),
        stop_s=15.0,
    )
    return LaunchPlan((agent_command,), explain=tuple(explain), companions=job.companions)

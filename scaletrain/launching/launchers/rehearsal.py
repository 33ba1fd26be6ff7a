"""A cluster on this machine: each worker a host in namespaces, links of a given bandwidth (emulated)."""

import json
from typing import Annotated

from annotated_types import Ge

from scaletrain.errors import UserError
from scaletrain.launching.job import Command, Companion, Job, LaunchPlan, Program
from scaletrain.rehearsal import faults as scripted
from scaletrain.rehearsal.cluster import Cluster
from scaletrain.run.failure import RANK_0

PORT = 29500  # of the job's store: in a fresh namespace every port is free


def plan(
    job: Job,
    *,
    hosts: Annotated[int, Ge(1)] | None = None,
    bandwidth: str | None = "1Gbit",
    latency: str = "0",
    loss: float = 0.0,
    straggler: dict[int, float] = {},  # noqa: B006 (never changed)
    faults: list[dict] = [],  # noqa: B006
) -> LaunchPlan:
    """Workers on emulated hosts, one each unless ``hosts`` is smaller; parameter servers get a further host each.

    ``bandwidth`` of each link in each direction (null: unshaped); ``latency`` one way; ``loss`` a probability. ``straggler`` {3: 2.0}: the
    emulated accelerators (``compute``) of host 3 take twice as long. ``faults``: see docs/rehearsal.md.
    """
    hosts = job.workers if hosts is None else hosts
    if not 1 <= hosts <= job.workers or job.workers % hosts:
        raise UserError(
            f"launcher.hosts: {job.workers} workers do not spread evenly over {hosts} hosts"
        )
    for host, factor in straggler.items():
        if not 0 <= host < hosts or factor <= 0:
            raise UserError(
                f"launcher.straggler: {{{host}: {factor}}} is not allowed (allowed: hosts 0 to {hosts - 1}, factors above 0)"
            )
    all_hosts = hosts + len(job.companions)
    script = scripted.parse(faults, all_hosts)
    try:
        cluster = Cluster(
            all_hosts, bandwidth=bandwidth, latency=latency, loss=loss
        )  # checks the options; makes nothing
    except UserError as error:
        raise UserError(f"launcher.{error}") from None
    settings = {
        "cluster": {"hosts": all_hosts, "bandwidth": bandwidth, "latency": latency, "loss": loss},
        "straggler": {str(host): factor for host, factor in straggler.items()},
        "faults": [fault._asdict() for fault in script],
    }
    folder = job.run_dir / "rehearsal"
    enter = Program.REHEARSAL_ENTER.command(folder)
    per_host = job.workers // hosts
    threads = job.threads or 1
    # A job that goes on without some of its workers keeps its store on the first server's host, else rank 0 serves it.
    outlives = job.min_workers is not None and bool(job.companions)
    store_host = hosts if outlives else 0
    commands = []
    for rank in range(job.workers):
        host, local_rank = divmod(rank, per_host)
        variables = {
            "SCALETRAIN_LAUNCHER": "rehearsal",
            "SCALETRAIN_HOST": cluster.names[host],
            "RANK": rank, "WORLD_SIZE": job.workers,
            "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": per_host,
            "GROUP_RANK": host, "GROUP_WORLD_SIZE": hosts,
            "MASTER_ADDR": cluster.addresses[store_host], "MASTER_PORT": PORT,
            **({"TORCHELASTIC_USE_AGENT_STORE": "True", RANK_0: cluster.addresses[0]} if outlives else {}),
            "SCALETRAIN_SLOWDOWN": folder / f"slowdown-h{host}",
            "OMP_NUM_THREADS": threads,
        }  # fmt: skip
        env = (*((key, str(value)) for key, value in variables.items()), *job.env)
        commands.append(Command(f"rank {rank}", (*enter, str(host), *job.argv), env, rank))
    companions = [Companion("rehearsal", Program.REHEARSAL_SERVE.command(folder))]
    if outlives:
        store = Program.REHEARSAL_STORE.command(PORT)
        companions.append(Companion("store", (*enter, str(store_host), *store)))
    for host, companion in enumerate(job.companions, hosts):
        companions.append(companion._replace(argv=(*enter, str(host), *companion.argv)))
    explain = [
        f"EMULATED: {all_hosts} hosts in namespaces of this machine, links of {bandwidth or 'any bandwidth'}, {threads} thread(s) a worker"
    ]
    explain += [
        f"EMULATED: host h{host} is {factor:g} times as slow" for host, factor in straggler.items()
    ]
    explain += [f"EMULATED: {fault}" for fault in script]
    files = [(folder / "settings.json", json.dumps(settings, indent=2) + "\n")]
    files += [
        (folder / f"slowdown-h{host}", f"{straggler.get(host, 1.0):g}\n") for host in range(hosts)
    ]
    return LaunchPlan(tuple(commands), tuple(files), tuple(explain), companions=tuple(companions))

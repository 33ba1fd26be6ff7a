"""An emulated cluster on this machine: hosts in namespaces, links of a given bandwidth."""

from collections.abc import Mapping
from typing import Annotated

from annotated_types import Ge

from scaletrain.errors import UserError
from scaletrain.launching.job import Companion, Environment, Job, Program, environment
from scaletrain.launching.plan import Command, LaunchPlan
from scaletrain.rehearsal import faults as fault_script
from scaletrain.rehearsal.cluster import Cluster
from scaletrain.rehearsal.scenario import Scenario
from scaletrain.run.failure import RANK_0
from scaletrain.run.layout import RunDir

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
    """Put workers on emulated hosts. Each parameter server gets a further host of its own.

    Args:
        job: the job to plan.
        hosts: how many hosts the workers share evenly; by default each has one of its own.
        bandwidth: of each link in each direction; null leaves the links unshaped.
        latency: one way, host to host.
        loss: probability that a packet is lost.
        straggler: with {3: 2.0}, the emulated accelerators (``compute``) of host 3 take twice as
            long.
        faults: see docs/rehearsal.md.
    """
    worker_hosts = job.workers if hosts is None else hosts
    _check_hosts(job.workers, worker_hosts, straggler)
    num_hosts = worker_hosts + len(job.companions)
    try:
        script = fault_script.parse(faults, num_hosts)
        scenario = Scenario(num_hosts, bandwidth, latency, loss, straggler, script)
        cluster = scenario.cluster()  # checks the options, and knows names and addresses
    except UserError as error:
        # The scenario names its own options, which a person has written under ``launcher``.
        raise UserError(f"launcher.{error}") from None

    layout = _Layout(job, cluster, worker_hosts)
    commands = []
    for rank in range(job.workers):
        argv = layout.enter(layout.host_of(rank), job.argv)
        commands.append(Command(f"rank {rank}", argv, layout.environment_of(rank), rank))

    files = RunDir(job.run_dir).rehearsal
    # In files: the process that serves the cluster reads the settings, and its faults write new
    # slowdowns during the run.
    texts = [(files.settings, scenario.to_json())]
    for host in range(worker_hosts):
        texts.append((files.slowdown(host), f"{straggler.get(host, 1.0):g}\n"))

    return LaunchPlan(
        tuple(commands),
        files=tuple(texts),
        explain=_explain(scenario, job.threads or 1),
        companions=layout.companions(),
        is_local=True,
    )


def _check_hosts(workers: int, hosts: int, straggler: Mapping[int, float]) -> None:
    if not 1 <= hosts <= workers or workers % hosts:
        raise UserError(
            f"launcher.hosts: {workers} workers do not spread evenly over {hosts} hosts"
        )
    for host, factor in straggler.items():
        if not 0 <= host < hosts or factor <= 0:
            raise UserError(
                f"launcher.straggler: {{{host}: {factor}}} is not allowed"
                f" (allowed: hosts 0 to {hosts - 1}, factors above 0)"
            )


class _Layout:
    """Which process runs on which host: workers on the first hosts, then one server a host."""

    def __init__(self, job: Job, cluster: Cluster, worker_hosts: int):
        self.job = job
        self.cluster = cluster
        self.worker_hosts = worker_hosts
        self.per_host = job.workers // worker_hosts
        # Rank 0 serves the store, unless the job may go on without it. Then a process of its own
        # serves it, on the first server's host.
        self.outlives_rank_0 = job.min_workers is not None and bool(job.companions)
        self.store_host = worker_hosts if self.outlives_rank_0 else 0

    def host_of(self, rank: int) -> int:
        """Return the host that a worker runs on."""
        return rank // self.per_host

    def enter(self, host: int, argv: tuple[str, ...]) -> tuple[str, ...]:
        """Return the command line that runs ``argv`` on a host once the cluster is up."""
        folder = RunDir(self.job.run_dir).rehearsal.path
        return (*Program.REHEARSAL_ENTER.command(folder, host), *argv)

    def environment_of(self, rank: int) -> Environment:
        """Return a worker's variables: its place, torchrun's way of saying it, and the store."""
        host = self.host_of(rank)
        variables = {
            "SCALETRAIN_LAUNCHER": "rehearsal",
            "SCALETRAIN_HOST": self.cluster.names[host],
            "RANK": rank,
            "WORLD_SIZE": self.job.workers,
            "LOCAL_RANK": rank % self.per_host,
            "LOCAL_WORLD_SIZE": self.per_host,
            "GROUP_RANK": host,
            "GROUP_WORLD_SIZE": self.worker_hosts,
            "MASTER_ADDR": self.cluster.addresses[self.store_host],
            "MASTER_PORT": PORT,
        }
        # Somebody else serves the store: rank 0 must join it like all others.
        if self.outlives_rank_0:
            variables["TORCHELASTIC_USE_AGENT_STORE"] = "True"
            variables[RANK_0] = self.cluster.addresses[0]
        variables["SCALETRAIN_SLOWDOWN"] = RunDir(self.job.run_dir).rehearsal.slowdown(host)
        variables |= self.job.variables(self.job.threads or 1)
        return environment(variables)

    def companions(self) -> tuple[Companion, ...]:
        """Return the cluster, the store if rank 0 does not serve it, and the servers."""
        folder = RunDir(self.job.run_dir).rehearsal.path
        # They start in this order. The cluster comes first, since all others enter its hosts.
        companions = [Companion("rehearsal", Program.REHEARSAL_SERVE.command(folder))]
        if self.outlives_rank_0:
            store = Program.REHEARSAL_STORE.command(PORT)
            companions.append(Companion("store", self.enter(self.store_host, store)))
        for host, companion in enumerate(self.job.companions, self.worker_hosts):
            argv = self.enter(host, companion.argv)
            companions.append(companion._replace(argv=argv))
        return tuple(companions)


def _explain(scenario: Scenario, threads: int) -> tuple[str, ...]:
    lines = [
        f"EMULATED: {scenario.hosts} hosts in namespaces of this machine,"
        f" links of {scenario.bandwidth or 'any bandwidth'}, {threads} thread(s) a worker"
    ]
    for host, factor in scenario.straggler.items():
        lines.append(f"EMULATED: host h{host} is {factor:g} times as slow")
    for fault in scenario.faults:
        lines.append(f"EMULATED: {fault}")
    return tuple(lines)

"""This worker's place among the workers, read from the variables that its launcher set."""

import os
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from scaletrain.errors import UserError, unknown

# Of local_rank, local_size, node and num_nodes: the launcher did not say.
# ``engine.rendezvous.place`` finds out.
UNKNOWN = -1


class World(NamedTuple):
    """This worker's place. Pure data: reading it never changes the environment."""

    rank: int = 0  # among all workers
    size: int = 1  # number of workers
    local_rank: int = 0  # among the workers of this host
    local_size: int = 1  # number of workers of this host
    node: int = 0  # number of this host
    num_nodes: int = 1  # number of hosts
    launcher: str = "python"

    def in_group(self, groups: int) -> "World":
        """Return the place in this worker's group, if the ranks are split into so many.

        >>> [World(rank, 4).in_group(2).rank for rank in range(4)]
        [0, 1, 0, 1]

        Args:
            groups: of consecutive ranks, all of the same size.

        Raises:
            UserError: their number does not divide that of the workers.
        """
        if self.size % groups:
            raise UserError(
                f"exchange.groups: {groups} is not allowed for {self.size} workers (allowed: a"
                " divisor of their number)"
            )
        size = self.size // groups
        return self._replace(rank=self.rank % size, size=size)

    def group_number(self, groups: int) -> int:
        """Return the number of this worker's group, from 0; see ``in_group``."""
        return self.rank // self.in_group(groups).size

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> "World":
        """Return this process's place according to its environment.

        Launchers are looked for from the innermost outwards, in the order of ``LAUNCHERS``:
        torchrun may run inside ``srun``, not the other way round. The innermost one is believed
        if all others agree with it (``_agrees``). Our own launchers are believed in any case: they
        have looked at the others (``started_by_another``). A process without such variables is a
        world of one.

        Args:
            env: the variables; default: ``os.environ``. They are read and never written.

        Raises:
            UserError: half of a set of variables, a value that is not a rank, launchers that
                contradict each other, or one that does not tell workers how many they are. The
                message shows the variables. Setting ``SCALETRAIN_LAUNCHER=<name>`` then says which
                launcher to believe.

        Example:
            >>> World.from_env({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}).rank
            1
        """
        env = os.environ if env is None else env
        chosen = env.get("SCALETRAIN_LAUNCHER", "")
        if chosen == "python":
            return cls()
        # A person's own word ends the search: variables of other launchers are not even read.
        if chosen and chosen not in OWN_LAUNCHERS:
            return _world_of(chosen, env)
        worlds = []
        for launcher in LAUNCHERS:
            world = launcher.read(env)
            if world is not None:
                worlds.append((launcher, world))
        if not worlds:
            _refuse_unknown_size(env)
            return cls()
        (innermost, world), *outer = worlds
        if chosen in OWN_LAUNCHERS:
            return world
        for launcher, other in outer:
            if not _agrees(world, other):
                raise _two_worlds(
                    f"{innermost.evidence(env)} ({innermost.name})",
                    f"{launcher.evidence(env)} ({launcher.name})",
                )
            # Only a launcher that sees the very same workers can fill in the unknown fields.
            if (other.rank, other.size) == (world.rank, world.size):
                world = _completed(world, other)
        _refuse_another_rank(world, innermost, env)
        return world


def started_by_another(env: Mapping[str, str] | None = None) -> str:
    """Return the variables that say that this process is one of several; empty if it is not.

    A launcher that is started in each of several processes would start a job in each of them.

    Args:
        env: the variables; default: ``os.environ``.

    Raises:
        UserError: as ``World.from_env``.

    Example:
        >>> started_by_another({"PMI_RANK": "1", "PMI_SIZE": "2"})
        'PMI_RANK=1 PMI_SIZE=2'
    """
    env = os.environ if env is None else env
    chosen = env.get("SCALETRAIN_LAUNCHER", "")
    # A worker of ours may start jobs of its own, such as a search over settings.
    if chosen == "python" or chosen in OWN_LAUNCHERS:
        return ""
    is_alone = False
    for launcher in LAUNCHERS:
        if chosen in ("", launcher.name):
            world = launcher.read(env)
            if world is not None and world.size > 1:
                return launcher.evidence(env)
            is_alone = is_alone or world is not None
    if not chosen and not is_alone:
        _refuse_unknown_size(env)
    return ""


def without_place(env: Mapping[str, str]) -> dict[str, str]:
    """Return the variables without those that give a place in a job to every process below.

    A launch begins a new world. Its workers must not take a ``RANK`` for theirs that was set for
    this process, or has leaked from a shell.
    """
    torchrun = LAUNCHERS[0]
    places = {name for name in torchrun[1:7] if isinstance(name, str)}
    kept = {name: value for name, value in env.items() if name not in places}
    if kept.get("SCALETRAIN_LAUNCHER") in ("python", *OWN_LAUNCHERS):
        del kept["SCALETRAIN_LAUNCHER"]  # it was about this process
    return kept


class Launcher(NamedTuple):
    """One row of the table: which variables a launcher sets in each of its processes."""

    name: str
    rank: str
    size: str
    local_rank: str = ""
    local_size: str = ""
    node: str = ""
    num_nodes: str = ""
    # Whether the variables can be believed in this environment.
    within: Callable[[Mapping[str, str]], bool] = lambda env: True

    def read(self, env: Mapping[str, str]) -> World | None:
        """Return the world that this launcher's variables describe; None if they are not set."""
        if not self.within(env):
            return None
        if self.rank not in env and self.size not in env:
            return None
        # To guess the other half would make every worker a rank 0, or a world of its own.
        if self.rank not in env or self.size not in env:
            missing = self.size if self.rank in env else self.rank
            raise UserError(
                f"{self.evidence(env)} without {missing}: half of what {self.name} sets"
                " (unset it, or set both)"
            )
        rank = self._number(env, self.rank)
        size = self._number(env, self.size)
        if size < 1 or rank >= size:
            raise UserError(
                f"{self.evidence(env)} ({self.name}): a rank lies between 0 and the size - 1"
            )
        world = World(
            rank,
            size,
            local_rank=self._number_or_unknown(env, self.local_rank),
            local_size=self._tasks_here(env),
            node=self._number_or_unknown(env, self.node),
            num_nodes=self._number_or_unknown(env, self.num_nodes),
            launcher=_name(self, env),
        )
        # Facts that the launcher left out may follow from the sizes, without asking other ranks.
        if size == 1:
            world = world._replace(local_rank=0, local_size=1, node=0, num_nodes=1)
        elif world.local_size == size:
            world = world._replace(node=0, num_nodes=1)
        # Variables of two launches, mixed up: this local rank would choose another worker's GPU.
        if world.local_size != UNKNOWN and world.local_rank >= world.local_size:
            set_here = [name for name in (self.local_rank, self.local_size) if name in env]
            shown = ", ".join(f"{name}={env[name]}" for name in set_here)
            raise UserError(
                f"{shown} ({self.name}): a local rank lies between 0 and the local size - 1"
            )
        return world

    def evidence(self, env: Mapping[str, str]) -> str:
        """Return the variables of rank and size as a person would set them."""
        set_here = [name for name in (self.rank, self.size) if name in env]
        return " ".join(f"{name}={env[name]}" for name in set_here)

    def _tasks_here(self, env: Mapping[str, str]) -> int:
        if self.local_size not in env:
            return UNKNOWN
        if self.name != "slurm":
            return self._number(env, self.local_size)
        # SLURM lists the tasks of every node.
        node = self._number(env, self.node) if self.node in env else 0
        counts = expand_tasks_per_node(env[self.local_size])
        if node >= len(counts):
            raise UserError(
                f"{self.local_size}={env[self.local_size]} has no node {self.node}={env[self.node]}"
            )
        return counts[node]

    def _number_or_unknown(self, env: Mapping[str, str], name: str) -> int:
        return self._number(env, name) if name in env else UNKNOWN

    def _number(self, env: Mapping[str, str], name: str) -> int:
        # int() would also take "+1", " 1" and "1_0".
        if not re.fullmatch(r"\d{1,9}", env[name]):
            raise UserError(
                f"{name}={env[name]!r} ({self.name}): expected a whole number, 0 or more"
            )
        return int(env[name])


def expand_tasks_per_node(text: str) -> list[int]:
    """Return the number of tasks on each node, from SLURM's short form.

    >>> expand_tasks_per_node("2(x3),1")
    [2, 2, 2, 1]

    Raises:
        UserError: the text has another form.
    """
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not match:
            raise UserError(f"SLURM_STEP_TASKS_PER_NODE={text!r}: expected something like 2(x3),1")
        tasks, repeats = int(match[1]), int(match[2] or 1)
        counts += [tasks] * repeats
    return counts


def _world_of(chosen: str, env: Mapping[str, str]) -> World:
    """Return the world of the launcher that a person names in SCALETRAIN_LAUNCHER."""
    by_name = {launcher.name: launcher for launcher in LAUNCHERS}
    if chosen not in by_name:
        raise unknown("SCALETRAIN_LAUNCHER", chosen, {*by_name, "python"})
    launcher = by_name[chosen]
    world = launcher.read(env)
    if world is None:
        raise UserError(
            f"SCALETRAIN_LAUNCHER={chosen}: its variables are not set"
            f" ({launcher.rank} and {launcher.size})"
        )
    return world


def _two_worlds(inner: str, outer: str) -> UserError:
    return UserError(
        f"the environment names two worlds: {inner}, but {outer}; unset the variables that leaked"
        " from elsewhere, or set SCALETRAIN_LAUNCHER to the one to believe"
        f" ({', '.join(launcher.name for launcher in LAUNCHERS)}, or python: alone)"
    )


def _refuse_another_rank(world: World, launcher: "Launcher", env: Mapping[str, str]) -> None:
    """Raise UserError if RANK has leaked from a shell into workers of another launcher."""
    if world.launcher != "environment":
        return
    for name, variable in _RANK_ONLY.items():
        if variable in env and env[variable] != str(world.rank):
            raise _two_worlds(
                f"{launcher.evidence(env)} (environment)", f"{variable}={env[variable]} ({name})"
            )


def _refuse_unknown_size(env: Mapping[str, str]) -> None:
    """Raise UserError if this is one of several workers, and nothing says of how many.

    To take it for the only one would start as many jobs as there are workers.
    """
    remedy = (
        "set RANK and WORLD_SIZE in each worker, or SCALETRAIN_LAUNCHER=python if each is alone"
    )
    for name, variable in _RANK_ONLY.items():
        if env.get(variable):
            raise UserError(
                f"{variable}={env[variable]} ({name}) says a rank, and nothing says how many"
                f" workers there are; {remedy}"
            )
    # Kubeflow sets them in every pod: torchrun reads its options there, and workers do not.
    for variable in ("PET_NNODES", "PET_NPROC_PER_NODE"):
        if env.get(variable, "1") != "1":
            raise UserError(
                f"{variable}={env[variable]} is for torchrun, which did not start this process;"
                f" start `torchrun -m scaletrain.cli worker RUN_DIR` in each pod, or {remedy}"
            )


def _in_step(env: Mapping[str, str]) -> bool:
    """Return True inside a task of ``srun``: only tasks have the variables of a step.

    In a batch script SLURM_PROCID is 0 for the script itself.
    """
    return "SLURM_STEP_ID" in env


def _name(launcher: Launcher, env: Mapping[str, str]) -> str:
    if launcher.name != "torchrun":
        return launcher.name
    # Several launchers set torchrun's variables. Only a real torchrun sets its run's id.
    if env.get("SCALETRAIN_LAUNCHER"):
        return env["SCALETRAIN_LAUNCHER"]
    return "torchrun" if "TORCHELASTIC_RUN_ID" in env else "environment"


def _completed(world: World, other: World) -> World:
    """Return a world with its unknown fields taken from another launcher's view of the same world.

    ``srun --mpi=pmi2``, for one, sets PMI_RANK and its own variables.
    """
    known = {}
    for field, value in world._asdict().items():
        if value == UNKNOWN:
            known[field] = getattr(other, field)
    return world._replace(**known)


def _agrees(world: World, outer: World) -> bool:
    """Return True if an outer launcher's world explains itself beside the inner one's.

    It does if it says the same; if it started one process (a shell, one mpirun); or if it started
    fewer processes than there are workers, one a node, each of which started workers.
    """
    if outer.size == 1 or (outer.rank, outer.size) == (world.rank, world.size):
        return True
    # torchrun says how many agents there are: the outer launcher started exactly these.
    if world.num_nodes != UNKNOWN and world.launcher == "torchrun":
        return outer.size == world.num_nodes
    return outer.size < world.size


# Launchers that name themselves in SCALETRAIN_LAUNCHER, and set torchrun's variables.
OWN_LAUNCHERS = ("local", "rehearsal")

# Launchers that tell a worker its rank, and not how many workers there are. Several of the table
# below set these variables, too.
_RANK_ONLY = {
    "PMIx": "PMIX_RANK",
    "ALPS": "ALPS_APP_PE",
    "PALS": "PALS_RANKID",
    "Kubernetes": "JOB_COMPLETION_INDEX",
}

# Innermost first. Open MPI does not tell a node's number: its OMPI_COMM_WORLD_NODE_RANK is a rank
# on the node.
LAUNCHERS = (
    Launcher("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"),
    Launcher(
        "horovodrun", "HOROVOD_RANK", "HOROVOD_SIZE",
        "HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE", "HOROVOD_CROSS_RANK", "HOROVOD_CROSS_SIZE",
    ),
    Launcher(
        "openmpi", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    Launcher(
        "jsrun", "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_LOCAL_RANK", "JSM_NAMESPACE_LOCAL_SIZE",
    ),
    Launcher(
        "mvapich", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE",
        "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE",
    ),
    # Flux sets PMI_RANK, too, and knows more.
    Launcher("flux", "FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_ID", num_nodes="FLUX_JOB_NNODES"),
    Launcher("mpich", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    # Cray's PMI names the same rank and size, and fills in the rest.
    Launcher("cray", "PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),
    Launcher(
        "slurm", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS",
        "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE", "SLURM_NODEID", "SLURM_STEP_NUM_NODES", within=_in_step,
    ),
)  # fmt: skip

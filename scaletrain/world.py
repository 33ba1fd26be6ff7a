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

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> "World":
        """Return this process's place according to its environment.

        Launchers are looked for from the innermost outwards, in the order of ``LAUNCHERS``:
        torchrun may run inside ``srun``, not the other way round. The innermost one is believed
        if all others agree with it (``_agrees``). A process without such variables is a world of
        one.

        Args:
            env: the variables; default: ``os.environ``. They are read and never written.

        Raises:
            UserError: half of a set of variables, a value that is not a rank, or launchers that
                contradict each other. The message shows the variables. Setting
                ``SCALETRAIN_LAUNCHER=<name>`` then says which launcher to believe.

        Example:
            >>> World.from_env({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}).rank
            1
        """
        env = os.environ if env is None else env
        # The launchers local and rehearsal name themselves here, and set torchrun's variables.
        chosen = env.get("SCALETRAIN_LAUNCHER", "")
        if chosen == "python":
            return cls()
        # A person's own word ends the search: variables of other launchers are not even read.
        if chosen and chosen not in ("local", "rehearsal"):
            return _world_of(chosen, env)
        worlds = []
        for launcher in LAUNCHERS:
            world = launcher.read(env)
            if world is not None:
                worlds.append((launcher, world))
        if not worlds:
            return cls()
        (innermost, world), *outer = worlds
        for launcher, other in outer:
            if not _agrees(world, other):
                raise UserError(
                    f"the environment names two worlds: {innermost.evidence(env)}"
                    f" ({innermost.name}), but {launcher.evidence(env)} ({launcher.name}); unset the"
                    " variables that leaked from elsewhere, or set SCALETRAIN_LAUNCHER to the one"
                    " to believe"
                )
            # Only a launcher that sees the very same workers can fill in the unknown fields.
            if (other.rank, other.size) == (world.rank, world.size):
                world = _completed(world, other)
        return world


class Launcher(NamedTuple):
    """One row of the table: which variables a launcher sets in each of its processes."""

    name: str
    rank: str
    size: str
    local_rank: str = ""
    local_size: str = ""
    node: str = ""
    num_nodes: str = ""
    # Whether the variables mean in this environment what they say.
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
        # What the launcher did not say can follow from the sizes, without asking other ranks.
        if size == 1:
            world = world._replace(local_rank=0, local_size=1, node=0, num_nodes=1)
        elif world.local_size == size:
            world = world._replace(node=0, num_nodes=1)
        # Variables of two launches, mixed up: such a local rank would choose another worker's GPU.
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
    Launcher("mpich", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    Launcher(
        "slurm", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS",
        "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE", "SLURM_NODEID", "SLURM_STEP_NUM_NODES", within=_in_step,
    ),
)  # fmt: skip

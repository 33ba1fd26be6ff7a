"""Who am I: this worker's place among the workers, read from the variables its launcher set."""

import os
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from scaletrain.errors import UserError, unknown

UNKNOWN = -1  # of local_rank, local_size, node and num_nodes: the launcher did not say; engine.rendezvous.place finds out


class World(NamedTuple):
    """This worker's place. Pure data: reading it never changes the environment."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    node: int = 0
    num_nodes: int = 1
    launcher: str = "python"

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> "World":
        """This process's place according to ``env`` (default: ``os.environ``, which is read and never written).

        Launchers are looked for from the innermost outwards, in the order of ``LAUNCHERS``: torchrun may run inside ``srun``,
        not the other way round. The first one found is believed, if all the others found agree with it (``_agrees``).
        Plain python is a world of one.

        Raises:
            UserError: half a set of variables, a value that is no rank, or launchers that contradict each other; the
                message shows the variables. ``SCALETRAIN_LAUNCHER=<name>`` then says which to believe.
        """
        env = os.environ if env is None else env
        found = [
            (launcher, world) for launcher in LAUNCHERS if (world := launcher.read(env)) is not None
        ]
        chosen = env.get("SCALETRAIN_LAUNCHER", "")
        if chosen and chosen not in (
            "local",
            "rehearsal",
        ):  # those two name themselves here and set torchrun's variables
            if chosen == "python":
                return cls()
            known = {launcher.name for launcher in LAUNCHERS} | {"python"}
            if chosen not in known:
                raise unknown("SCALETRAIN_LAUNCHER", chosen, known)
            found = [(launcher, world) for launcher, world in found if launcher.name == chosen]
            if not found:
                launcher = next(launcher for launcher in LAUNCHERS if launcher.name == chosen)
                missing = f"{launcher.rank} and {launcher.size} are not set"
                raise UserError(
                    f"SCALETRAIN_LAUNCHER={chosen}: its variables are not there ({missing})"
                )
        if not found:
            return cls()
        (innermost, world), *outer = found
        for launcher, other in outer:
            if not _agrees(world, other):
                raise UserError(
                    f"the environment names two worlds: {innermost.evidence(env)} ({innermost.name}), but"
                    f" {launcher.evidence(env)} ({launcher.name}); unset the variables that leaked from elsewhere,"
                    f" or set SCALETRAIN_LAUNCHER to the one to believe"
                )
            if (other.rank, other.size) == (world.rank, world.size):
                world = _filled(world, other)
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
    within: Callable[[Mapping[str, str]], bool] = lambda env: (
        True
    )  # whether the variables mean what they say here

    def read(self, env: Mapping[str, str]) -> World | None:
        """The world this launcher's variables describe; ``None`` when they are not set."""
        if not self.within(env) or (self.rank not in env and self.size not in env):
            return None
        if self.rank not in env or self.size not in env:
            missing = self.size if self.rank in env else self.rank
            raise UserError(
                f"{self.evidence(env)} without {missing}: half of what {self.name} sets (unset it, or set both)"
            )
        rank, size = self._number(env, self.rank), self._number(env, self.size)
        if size < 1 or rank >= size:
            raise UserError(
                f"{self.evidence(env)} ({self.name}): a rank lies between 0 and the size - 1"
            )
        place = {
            "local_rank": self._number(env, self.local_rank) if self.local_rank in env else UNKNOWN,
            "local_size": self._tasks_here(env),
            "node": self._number(env, self.node) if self.node in env else UNKNOWN,
            "num_nodes": self._number(env, self.num_nodes) if self.num_nodes in env else UNKNOWN,
        }
        if size == 1:
            place = {"local_rank": 0, "local_size": 1, "node": 0, "num_nodes": 1}
        elif place["local_size"] == size:
            place |= {"node": 0, "num_nodes": 1}
        if place["local_rank"] >= place["local_size"] != UNKNOWN:
            here = ", ".join(
                f"{name}={env[name]}" for name in (self.local_rank, self.local_size) if name in env
            )
            raise UserError(
                f"{here} ({self.name}): a local rank lies between 0 and the local size - 1"
            )
        return World(rank, size, **place, launcher=_name(self, env))

    def evidence(self, env: Mapping[str, str]) -> str:
        return " ".join(f"{name}={env[name]}" for name in (self.rank, self.size) if name in env)

    def _tasks_here(self, env: Mapping[str, str]) -> int:
        if self.local_size not in env:
            return UNKNOWN
        if self.name != "slurm":
            return self._number(env, self.local_size)
        node = self._number(env, self.node) if self.node in env else 0
        counts = expand_tasks_per_node(env[self.local_size])
        if node >= len(counts):
            raise UserError(
                f"{self.local_size}={env[self.local_size]} has no node {self.node}={env[self.node]}"
            )
        return counts[node]

    def _number(self, env: Mapping[str, str], name: str) -> int:
        if not re.fullmatch(r"\d{1,9}", env[name]):
            raise UserError(
                f"{name}={env[name]!r} ({self.name}): expected a whole number, 0 or more"
            )
        return int(env[name])


def expand_tasks_per_node(text: str) -> list[int]:
    """SLURM's ``2(x3),1`` is ``[2, 2, 2, 1]``: tasks on each node."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not match:
            raise UserError(f"SLURM_STEP_TASKS_PER_NODE={text!r}: expected something like 2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _in_step(env: Mapping[str, str]) -> bool:
    """Only a task of ``srun`` has the variables of a step. In a batch script SLURM_PROCID is 0 for the script itself."""
    return "SLURM_STEP_ID" in env


def _name(launcher: Launcher, env: Mapping[str, str]) -> str:
    if launcher.name != "torchrun":
        return launcher.name
    return env.get("SCALETRAIN_LAUNCHER") or (
        "torchrun" if "TORCHELASTIC_RUN_ID" in env else "environment"
    )


def _filled(world: World, other: World) -> World:
    """What one launcher leaves out, another that started the same world may say: ``srun --mpi=pmi2`` sets PMI_RANK and its own."""
    said = other._asdict()
    return world._replace(
        **{key: said[key] for key, value in world._asdict().items() if value == UNKNOWN}
    )


def _agrees(world: World, outer: World) -> bool:
    """Whether an outer launcher's world explains itself beside the inner one's.

    It does when it says the same; when it started one process (a shell, one mpirun); or when it started fewer processes
    than there are workers, one a node, each of which started workers.
    """
    if outer.size == 1 or (outer.rank, outer.size) == (world.rank, world.size):
        return True
    if world.num_nodes != UNKNOWN and world.launcher == "torchrun":
        return outer.size == world.num_nodes
    return outer.size < world.size


# Innermost first. Open MPI's OMPI_COMM_WORLD_NODE_RANK is a rank on the node, not the node's number, which it does not tell.
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

"""Who am I: this worker's place among the workers, read from the variables its launcher set."""

from typing import NamedTuple


class World(NamedTuple):
    """This worker's place. Pure data: reading it never changes the environment."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    node: int = 0
    num_nodes: int = 1
    launcher: str = "python"

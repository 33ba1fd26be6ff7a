"""How a model is cut over K servers: blocks of consecutive parameters, balanced by bytes, large tensors split."""

import heapq
from collections.abc import Sequence
from typing import Any, NamedTuple

ALIGN = 16  # elements (64 bytes): blocks start on cache lines in shared memory


class Parameter(NamedTuple):
    """What sharding has to know of one parameter."""

    shape: tuple[int, ...]
    group: int = 0  # of the optimizer: blocks do not mix groups
    sparse: bool = False  # an embedding table of which only touched rows move

    @property
    def numel(self) -> int:
        result = 1
        for extent in self.shape:
            result *= extent
        return result


class Piece(NamedTuple):
    """A flat range of one parameter."""

    parameter: int
    start: int
    stop: int


class Block(NamedTuple):
    """The unit that is pushed, updated and pulled: one flat float32 vector on one server.

    ``shape`` is () for a flat vector, else the tensor's own (optimizers that look at whole tensors; rows x width of a sparse table).
    """

    key: int  # place in the plan; blocks that the next forward needs first have the smallest keys
    server: int
    group: int
    numel: int
    pieces: tuple[Piece, ...]
    sparse: bool = False
    first_row: int = 0  # of a sparse table, on this server
    shape: tuple[int, ...] = ()


def plan(
    parameters: Sequence[Parameter],
    servers: int,
    block_bytes: int = 4 << 20,
    whole_tensors: bool = False,
) -> list[Block]:
    """Cut parameters (in forward order) into blocks of at most ``block_bytes`` (float32) and share them out over servers.

    Sparse tables are cut by rows into one block a server, so that a step does not cost more when the table is larger.
    With ``whole_tensors`` every block is one tensor with its shape. Deterministic: all workers make the same plan.
    """
    if servers < 1 or block_bytes < 4 * ALIGN:
        raise ValueError(
            f"servers {servers} and block_bytes {block_bytes} must be at least 1 and {4 * ALIGN}"
        )
    # Blocks small enough that every server gets some.
    dense = sum(parameter.numel for parameter in parameters if not parameter.sparse)
    capacity = max(ALIGN, min(block_bytes // 4, -(-dense // servers)))
    drafts: list[Block] = []
    pieces: list[Piece] = []
    size, group = 0, 0

    def close() -> None:
        nonlocal pieces, size
        if pieces:
            drafts.append(Block(len(drafts), 0, group, size, tuple(pieces)))
        pieces, size = [], 0

    for index, parameter in enumerate(parameters):
        if parameter.sparse:
            close()
            drafts += _table(index, parameter, servers, len(drafts))
        elif whole_tensors:
            whole = Piece(index, 0, parameter.numel)
            drafts.append(
                Block(
                    len(drafts),
                    0,
                    parameter.group,
                    parameter.numel,
                    (whole,),
                    shape=parameter.shape or (1,),
                )
            )
        else:
            start = 0
            while start < parameter.numel:
                if pieces and (group != parameter.group or size == capacity):
                    close()
                group = parameter.group
                stop = min(parameter.numel, start + capacity - size)
                # A cut inside a tensor that would have fitted a block of its own is not worth another message.
                if stop < parameter.numel and start == 0 and pieces and parameter.numel <= capacity:
                    close()
                    continue
                pieces.append(Piece(index, start, stop))
                size += stop - start
                start = stop
    close()
    return _balance(drafts, servers)


def _table(index: int, parameter: Parameter, servers: int, key: int) -> list[Block]:
    rows = parameter.shape[0]
    width = parameter.numel // rows if rows else 0
    blocks = []
    for server in range(servers):
        first, last = rows * server // servers, rows * (server + 1) // servers
        if last > first:
            piece = Piece(index, first * width, last * width)
            block = Block(
                key + len(blocks), server, parameter.group, (last - first) * width, (piece,),
                sparse=True, first_row=first, shape=(last - first, width),
            )  # fmt: skip
            blocks.append(block)
    return blocks


def _balance(blocks: list[Block], servers: int) -> list[Block]:
    """Largest first, each to the server with the fewest bytes so far (at most 4/3 of the best possible load)."""
    load = [(0, server) for server in range(servers)]
    placed = list(blocks)
    for block in sorted(blocks, key=lambda b: (-b.numel, b.key)):
        if block.sparse:
            continue  # tables lie on every server already, evenly
        elements, server = heapq.heappop(load)
        placed[block.key] = block._replace(server=server)
        heapq.heappush(load, (elements + block.numel, server))
    return placed


def layout(blocks: Sequence[Block]) -> tuple[dict[int, int], int]:
    """Where each dense block begins in a flat float32 slab, by key, and the slab's number of elements."""
    starts, total = {}, 0
    for block in blocks:
        if not block.sparse:
            starts[block.key] = total
            total += -(-block.numel // ALIGN) * ALIGN
    return starts, total


def to_json(block: Block) -> dict[str, Any]:
    """What a server has to know of a block."""
    return {
        "key": block.key, "group": block.group, "numel": block.numel, "sparse": block.sparse, "shape": list(block.shape)
    }  # fmt: skip


def from_json(value: Any, server: int) -> Block:
    """Raises ``ValueError`` when a field is missing, of the wrong type or out of bounds."""
    try:
        key, group, numel, sparse, shape = (
            value[name] for name in ("key", "group", "numel", "sparse", "shape")
        )
    except (TypeError, KeyError):
        raise ValueError("a block has no key, group, numel, sparse and shape") from None
    numbers = [key, group, numel, *shape] if isinstance(shape, list) else [None]
    if (
        not all(type(number) is int and 0 <= number < 1 << 40 for number in numbers)
        or type(sparse) is not bool
    ):
        raise ValueError("a block's fields are out of bounds")
    block = Block(key, server, group, numel, (), sparse, 0, tuple(shape))
    if (
        numel < 1
        or (shape and Parameter(tuple(shape)).numel != numel)
        or (sparse and len(shape) != 2)
    ):
        raise ValueError("a block's shape is not its number of elements")
    return block

"""How a model is cut over K servers: blocks of consecutive parameters, balanced by bytes.

Small parameters share a block, large ones are split. Every worker makes the same plan by itself.

>>> specs = [ParameterSpec((30,)), ParameterSpec((2,)), ParameterSpec((64,))]
>>> for block in plan(specs, servers=2, block_bytes=256):
...     print(block.key, block.server, block.numel, [tuple(piece) for piece in block.pieces])
0 0 48 [(0, 0, 30), (1, 0, 2), (2, 0, 16)]
1 1 48 [(2, 16, 64)]
"""

import heapq
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

ALIGN = 16  # elements (64 bytes): blocks start on cache lines in shared memory

_MAX_NUMBER = 1 << 40  # in a description from the wire


class ParameterSpec(NamedTuple):
    """The facts about one parameter that decide how it is cut."""

    shape: tuple[int, ...]
    group: int = 0  # of the optimizer: blocks do not mix groups
    sparse: bool = False  # an embedding table of which only touched rows move

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class Piece(NamedTuple):
    """A flat range of one parameter."""

    parameter: int  # its place in the model
    start: int  # first element
    stop: int  # one after the last element

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.stop - self.start


class Block(NamedTuple):
    """The unit that is pushed, updated and pulled: one flat float32 vector on one server."""

    key: int  # place in the plan; blocks that the next forward needs first have the smallest keys
    server: int
    group: int  # of the optimizer
    numel: int
    pieces: tuple[Piece, ...]  # the ranges that it consists of, in this order
    sparse: bool = False
    first_row: int = 0  # of a sparse table, on this server
    # () for a flat vector, else the tensor's own shape: optimizers that look at whole tensors need
    # it, and sparse tables are (rows, width).
    shape: tuple[int, ...] = ()


def plan(
    parameters: Sequence[ParameterSpec],
    servers: int,
    block_bytes: int = 4 << 20,
    whole_tensors: bool = False,
) -> list[Block]:
    """Cut parameters into blocks and share them out over servers.

    Deterministic: all workers make the same plan.

    Args:
        parameters: in forward order.
        servers: how many there are.
        block_bytes: the largest block, in bytes of float32. Blocks are smaller where the model is
            so small that some server would get none.
        whole_tensors: make every block one tensor with its shape, however large.

    Returns:
        Blocks in forward order; ``key`` is the place in the list. Sparse tables are cut by rows
        into one block a server, so that a step does not cost more when the table is larger.

    Raises:
        ValueError: no server, or blocks that are too small.
    """
    if servers < 1 or block_bytes < 4 * ALIGN:
        raise ValueError(
            f"servers {servers} and block_bytes {block_bytes} must be at least 1 and {4 * ALIGN}"
        )
    dense = sum(parameter.numel for parameter in parameters if not parameter.sparse)
    share = math.ceil(dense / servers)
    drafts = _Drafts(capacity=max(ALIGN, min(block_bytes // 4, share)))
    for index, parameter in enumerate(parameters):
        if parameter.sparse:
            drafts.add_table(index, parameter, servers)
        elif whole_tensors:
            drafts.add_whole(index, parameter)
        else:
            drafts.add_flat(index, parameter)
    drafts.close()
    return _balance(drafts.blocks, servers)


class _Drafts:
    """Blocks that have no server yet; the last one is open as long as it takes more pieces.

    Args:
        capacity: elements of the largest flat block.
    """

    def __init__(self, capacity: int):
        self._capacity = capacity
        self.blocks: list[Block] = []
        # The open block.
        self._pieces: list[Piece] = []
        self._numel = 0
        self._group = 0

    def close(self) -> None:
        """Let the next piece begin a new block."""
        if self._pieces:
            self.blocks.append(
                Block(
                    key=len(self.blocks),
                    server=0,
                    group=self._group,
                    numel=self._numel,
                    pieces=tuple(self._pieces),
                )
            )
        self._pieces = []
        self._numel = 0

    def add_flat(self, index: int, parameter: ParameterSpec) -> None:
        """Fill the open block, and as many further ones as the parameter needs."""
        if parameter.numel == 0:
            return
        if self._pieces and self._group != parameter.group:
            self.close()
        self._group = parameter.group
        # A cut inside a tensor that fits a block of its own is not worth another message.
        room = self._capacity - self._numel
        if room < parameter.numel <= self._capacity:
            self.close()
        start = 0
        while start < parameter.numel:
            if self._numel == self._capacity:
                self.close()
            stop = min(parameter.numel, start + self._capacity - self._numel)
            self._pieces.append(Piece(index, start, stop))
            self._numel += stop - start
            start = stop

    def add_whole(self, index: int, parameter: ParameterSpec) -> None:
        """Add one tensor as a block of its own."""
        if parameter.numel == 0:
            return
        block = Block(
            key=len(self.blocks),
            server=0,
            group=parameter.group,
            numel=parameter.numel,
            pieces=(Piece(index, 0, parameter.numel),),
            # A scalar's own shape, (), would say that the block is a flat vector.
            shape=parameter.shape or (1,),
        )
        self.blocks.append(block)

    def add_table(self, index: int, parameter: ParameterSpec, servers: int) -> None:
        """Cut a sparse table by rows into one block a server; servers beyond its rows get none."""
        self.close()
        rows = parameter.shape[0]
        if rows == 0:
            return
        width = parameter.numel // rows
        for server in range(servers):
            first = rows * server // servers
            last = rows * (server + 1) // servers
            if first == last:
                continue
            block = Block(
                key=len(self.blocks),
                server=server,
                group=parameter.group,
                numel=(last - first) * width,
                pieces=(Piece(index, first * width, last * width),),
                sparse=True,
                first_row=first,
                shape=(last - first, width),
            )
            self.blocks.append(block)


def _balance(blocks: list[Block], servers: int) -> list[Block]:
    """Return the blocks with their servers.

    Largest first, each to the server with the fewest elements so far: at most 4/3 of the best
    possible load (Graham, 1969). Sparse tables lie on every server already, evenly.
    """
    load = [(0, server) for server in range(servers)]  # a heap of (elements, server)
    balanced = list(blocks)
    # The key breaks ties: all workers must make the same plan.
    for block in sorted(blocks, key=lambda block: (-block.numel, block.key)):
        if block.sparse:
            continue
        elements, server = heapq.heappop(load)
        balanced[block.key] = block._replace(server=server)
        heapq.heappush(load, (elements + block.numel, server))
    return balanced


def places(block: Block) -> Iterator[tuple[Piece, slice]]:
    """Yield the pieces of a block, each with its place in the block."""
    start = 0
    for piece in block.pieces:
        yield piece, slice(start, start + piece.numel)
        start += piece.numel


def layout(blocks: Sequence[Block]) -> tuple[dict[int, int], int]:
    """Return where each dense block lies in a flat float32 slab.

    Returns:
        The first element of each dense block, by key, and the slab's number of elements.
    """
    starts = {}
    total = 0
    for block in blocks:
        if not block.sparse:
            starts[block.key] = total
            total += math.ceil(block.numel / ALIGN) * ALIGN
    return starts, total


def to_json(block: Block) -> dict[str, Any]:
    """Return the facts that a server needs about a block."""
    return {
        "key": block.key,
        "group": block.group,
        "numel": block.numel,
        "sparse": block.sparse,
        "shape": list(block.shape),
        "pieces": [list(piece) for piece in block.pieces],
    }


def from_json(value: Any, server: int) -> Block:
    """Return the block that a worker described with ``to_json``.

    Args:
        value: from the wire; anything may be in it.
        server: the server that the block lies on.

    Raises:
        ValueError: a field is missing, of the wrong type or out of bounds.
    """
    try:
        key = value["key"]
        group = value["group"]
        numel = value["numel"]
        sparse = value["sparse"]
        shape = value["shape"]
        pieces = value["pieces"]
    except (TypeError, KeyError):
        raise ValueError("a block has no key, group, numel, sparse, shape and pieces") from None
    if type(sparse) is not bool or not isinstance(shape, list):
        raise ValueError("a block's fields are out of bounds")
    for number in [key, group, numel, *shape]:
        if not _is_number(number):
            raise ValueError("a block's fields are out of bounds")
    shape_differs = bool(shape) and math.prod(shape) != numel
    is_no_table = sparse and len(shape) != 2
    if numel < 1 or shape_differs or is_no_table:
        raise ValueError("a block's shape is not its number of elements")
    parts = _pieces_from_json(pieces)
    if sum(piece.numel for piece in parts) != numel or (shape and len(parts) != 1):
        raise ValueError("a block's pieces are not its elements")
    return Block(key, server, group, numel, parts, sparse=sparse, shape=tuple(shape))


def _pieces_from_json(value: Any) -> tuple[Piece, ...]:
    """Return the pieces of a block that a worker described. Raises ``ValueError``."""
    if not isinstance(value, list):
        raise ValueError("a block's pieces are out of bounds")
    pieces = []
    for entry in value:
        if not isinstance(entry, list) or len(entry) != 3 or not all(map(_is_number, entry)):
            raise ValueError("a block's pieces are out of bounds")
        piece = Piece(*entry)
        if piece.numel < 1:
            raise ValueError("a block's pieces are out of bounds")
        pieces.append(piece)
    return tuple(pieces)


def _is_number(value: Any) -> bool:
    """Return True for a number that a description may hold."""
    # Not isinstance, which takes JSON's true for 1.
    return type(value) is int and 0 <= value < _MAX_NUMBER

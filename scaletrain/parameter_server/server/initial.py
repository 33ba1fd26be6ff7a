"""The first values of a server's blocks, which rank 0 stores before training.

Order of messages for each block: SET_STATE and the tensors of the optimizer's state, if rank 0 has
loaded a checkpoint, then the weights in parts of ascending offset. After a lost connection all of
them come again.
"""

import math
from typing import Any

import torch

from scaletrain.parameter_server.protocol import codec, wire
from scaletrain.parameter_server.protocol import optimizer as optimizers
from scaletrain.parameter_server.protocol.sharding import Block, Piece
from scaletrain.parameter_server.protocol.wire import Dtype, Header, Message, Refused
from scaletrain.parameter_server.server.shard import OptimizerState, Shard

_MAX_STATE_ENTRIES = 16  # tensors and numbers of one piece's optimizer state
_MAX_NUMBER = 1 << 48


class InitialValues:
    """Takes the first values from rank 0 until they are complete.

    Used by the server's only thread.
    """

    def __init__(self, shard: Shard):
        self._shard = shard
        # By block: elements of its weights that have been stored. Written by store.
        self._stored = dict.fromkeys(shard.blocks, 0)
        # By block: its optimizer's state. Made by set_state, filled by store, used up by finish.
        self._states: dict[int, OptimizerState] = {}

    def set_state(self, block: Block, message: Message) -> None:
        """Take the numbers of a block's optimizer, and the names and shapes of its tensors.

        Raises:
            Refused: the message is malformed.
        """
        self._states[block.key] = _parse_state(message.json(), block)
        self._stored[block.key] = 0

    def store(self, block: Block, message: Message) -> None:
        """Take part of a block's weights, or of its optimizer's state.

        Raises:
            Refused: the part is not float32, comes before those in front of it, or is not within
                the block.
        """
        header = message.header
        if header.dtype != Dtype.FLOAT32 or header.flags:
            raise Refused("bad part of a block")
        # ``rows`` numbers the tensors of the optimizer's state from 1 on; 0 stands for the weights.
        if header.rows:
            state = self._states.get(block.key, OptimizerState())
            part = state_part(state, header)
        else:
            if header.offset > self._stored[block.key]:
                raise Refused("bad part of a block")
            part = part_of(self._shard.weights(block.key), header)
        part.copy_(codec.decode(message.payloads[0], Dtype.FLOAT32))
        if not header.rows:
            end = header.offset + header.count
            self._stored[block.key] = max(end, self._stored[block.key])

    def complete(self) -> bool:
        """Return True if the weights of all blocks are stored."""
        blocks = self._shard.blocks.values()
        return all(self._stored[block.key] == block.numel for block in blocks)

    def finish(self) -> None:
        """Hand the optimizer state to the shard, and open its blocks to the workers."""
        for key, state in self._states.items():
            self._shard.load_state(key, state)
        self._states.clear()
        for key in self._shard.blocks:
            self._shard.set_version(key, 0)


def part_of(flat: torch.Tensor, header: Header) -> torch.Tensor:
    """Return the part of a flat tensor that INIT and PULL speak of, as live memory.

    Raises:
        Refused: it lies outside the tensor, or is too large for a message.
    """
    end = header.offset + header.count
    if end > len(flat) or 4 * header.count > wire.MAX_MESSAGE_BYTES:
        raise Refused("bad part of a block")
    return flat[header.offset : end]


def state_part(state: OptimizerState, header: Header) -> torch.Tensor:
    """Return the same part of the ``rows``-th tensor of an optimizer's state.

    Raises:
        Refused: there is no such tensor, or no such part of it.
    """
    tensors = state.flat_tensors()
    if header.rows > len(tensors):
        raise Refused("bad part of a block")
    return part_of(tensors[header.rows - 1], header)


def _parse_state(value: dict[str, Any], block: Block) -> OptimizerState:
    """Return the state that a message describes, with tensors of zeros. Raises ``Refused``."""
    malformed = Refused("malformed state of an optimizer")
    tensors = value.get("tensors")
    numbers = value.get("numbers")
    if not isinstance(tensors, list) or not isinstance(numbers, dict):
        raise malformed
    if len(tensors) + len(numbers) > _MAX_STATE_ENTRIES * len(block.pieces):
        raise malformed
    for entry, number in numbers.items():
        if _piece_of(entry, block) is None or not _is_number(number):
            raise malformed
    state = OptimizerState(numbers=numbers)
    for entry in tensors:
        if not isinstance(entry, list) or len(entry) != 2:
            raise malformed
        name, shape = entry
        piece = _piece_of(name, block)
        if piece is None or not _is_shape(shape, piece.numel):
            raise malformed
        state.tensors[name] = torch.zeros(shape)
    return state


def _piece_of(entry: Any, block: Block) -> Piece | None:
    """Return the piece that a key of ``OptimizerState`` names; None if there is none."""
    if not isinstance(entry, str):
        return None
    try:
        number, _ = optimizers.split_entry(entry)
    except ValueError:
        return None
    return block.pieces[number] if 0 <= number < len(block.pieces) else None


def _is_number(value: Any) -> bool:
    """Return True for a finite number of a sensible size."""
    # Not isinstance, which takes True for a number. NaN is not below anything.
    return type(value) in (int, float) and abs(value) < _MAX_NUMBER


def _is_shape(value: Any, most_elements: int) -> bool:
    """Return True for a list of positive extents that make at most so many elements."""
    if not isinstance(value, list):
        return False
    for extent in value:
        if type(extent) is not int or extent < 1:
            return False
    # The tensor is made from this shape: a bad message must not exhaust the server's memory.
    return math.prod(value) <= most_elements

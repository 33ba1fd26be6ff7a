"""The format of every message between workers and servers: a fixed header and raw bytes. No pickle, nothing evaluated.

A message is a ZeroMQ multipart: one 72-byte header, then as many payload frames as its kind has (``PAYLOADS``). ``parse`` checks what can
be checked without knowing the model; the receiver checks keys, shapes and versions. Whatever fails raises ``Refused``.
"""

import enum
import json
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

MAGIC = b"SPS1"
_LAYOUT = struct.Struct("<4sBBHIIIIQQQQQd")
HEADER_BYTES = _LAYOUT.size
MAX_MESSAGE_BYTES = 64 << 20  # larger ones end the connection before anything is stored
MAX_TENSOR_BYTES = 32 << 20  # larger blocks (tensors that an optimizer needs whole) travel in parts
MAX_JSON_BYTES = 8 << 20  # the table of blocks of a very large model
MAX_SUM_VALUES = 4096


class Kind(enum.IntEnum):
    """What a message is for. W: sent by workers, S: sent by servers."""

    HELLO = 1  # W json: who I am
    CHALLENGE = 2  # S json: prove that you hold the job's key (trusted_network only)
    PROOF = 3  # W json
    WELCOME = 4  # S json: your session
    SETUP = 5  # W json: blocks, optimizer; joins the job
    READY = 6  # S json: whether weights are there, shared memory
    INIT = 7  # W tensor: first weights of part of a block, from rank 0
    STORED = 8  # S
    PULL = 9  # W: part of a block
    WEIGHTS = 10  # S tensor, or nothing when it lies in shared memory
    PUSH = 11  # W tensor (or shared memory): a block's gradient; answered by WEIGHTS
    PUSH_ROWS = 12  # W rows and values: a sparse gradient; answered by APPLIED
    APPLIED = 13  # S
    PULL_ROWS = 14  # W rows
    ROWS = 15  # S tensor: the rows' weights
    SUM = 16  # W float64: to be summed over the live workers
    TOTAL = 17  # S float64
    PING = 18  # S: still here; count: workers that live, 0 before the first has joined
    LEAVE = 19  # W: done
    LEFT = 20  # S
    ABORT = 21  # S json: training cannot go on
    REFUSED = 22  # S json: that message was not acceptable
    PART = 23  # S tensor: the answer to PULL
    PAUSE = 24  # W: pushes nothing until all have met (a sum)
    PAUSED = 25  # S
    STATE = (
        26  # W: the optimizer's state of a block, for a checkpoint; its tensors are fetched by PULL
    )
    STATES = 27  # S json: names and shapes of its tensors, its numbers
    SET_STATE = 28  # W json: the same, from rank 0 with a checkpoint; tensors follow by INIT; answered by STORED


class Dtype(enum.IntEnum):
    """Element types on the wire."""

    NONE = 0
    FLOAT32 = 1
    BF16 = 2  # rounded to nearest even
    FP16 = 3
    TRUNC16 = 4  # TensorFlow's: the upper 16 bits of a float32, the rest cut off
    INT64 = 5
    FLOAT64 = 6
    UINT8 = 7


ITEM_BYTES = {
    Dtype.NONE: 0, Dtype.FLOAT32: 4, Dtype.BF16: 2, Dtype.FP16: 2, Dtype.TRUNC16: 2, Dtype.INT64: 8, Dtype.FLOAT64: 8,
    Dtype.UINT8: 1,
}  # fmt: skip

# Payload frames of each kind: "json", "tensor" (count items of dtype), "rows" (int64), "values" (any multiple of the rows; dtype).
PAYLOADS: dict[Kind, tuple[str, ...]] = {
    **dict.fromkeys((Kind.HELLO, Kind.CHALLENGE, Kind.PROOF, Kind.WELCOME, Kind.SETUP, Kind.READY, Kind.ABORT, Kind.REFUSED), ("json",)),
    **dict.fromkeys((Kind.STATES, Kind.SET_STATE), ("json",)),
    **dict.fromkeys((Kind.INIT, Kind.WEIGHTS, Kind.PUSH, Kind.ROWS, Kind.SUM, Kind.TOTAL, Kind.PART), ("tensor",)),
    **dict.fromkeys((Kind.STORED, Kind.PULL, Kind.APPLIED, Kind.PING, Kind.PAUSE, Kind.PAUSED, Kind.STATE, Kind.LEAVE, Kind.LEFT), ()),
    Kind.PUSH_ROWS: ("rows", "tensor"),
    Kind.PULL_ROWS: ("rows",),
}  # fmt: skip

SHARED = 1  # flag: the tensor lies in shared memory, its frame is empty
DROPPED = 2  # flag: this gradient came too late and was not used


class Refused(Exception):
    """A message that is not acceptable; the reason is a short constant text (it is counted by it)."""


class Header(NamedTuple):
    """The fixed part of a message. Fields that a kind does not use are 0."""

    kind: Kind
    dtype: Dtype = Dtype.NONE
    flags: int = 0
    key: int = 0  # block
    rank: int = 0  # of the worker
    staleness: int = (
        0  # of the answered gradient: updates between the weights it came from and its own update
    )
    rows: int = 0  # row indices in a sparse message; PULL, INIT: 0 for weights, i for the i-th tensor of the optimizer's state
    step: int = 0  # of the worker
    version: int = 0  # updates of the block's weights so far (answers); of the weights that a gradient came from (pushes)
    session: int = 0  # given by the server in WELCOME
    offset: int = 0  # first element, in parts of blocks
    count: int = 0  # elements of the tensor payload
    lr: float = 0.0

    def pack(self) -> bytes:
        return _LAYOUT.pack(MAGIC, *self)


class Message(NamedTuple):
    header: Header
    payloads: tuple[memoryview, ...]

    def json(self) -> dict[str, Any]:
        """The payload of a json message. Raises ``Refused``."""
        try:
            value = json.loads(bytes(self.payloads[0]))
        except (ValueError, RecursionError):
            raise Refused("payload is not JSON") from None
        if not isinstance(value, dict):
            raise Refused("payload is not a JSON object")
        return value


def to_json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def parse(frames: Sequence[memoryview | bytes]) -> Message:
    """Frames as received -> Message.

    Raises:
        Refused: wrong length, magic, kind, dtype, number of frames, or a payload whose length is not what the header says.
    """
    if not frames or len(frames[0]) != HEADER_BYTES:
        raise Refused("header has a wrong length")
    magic, kind, dtype, *rest = _LAYOUT.unpack(frames[0])
    if magic != MAGIC:
        raise Refused("wrong magic")
    try:
        header = Header(Kind(kind), Dtype(dtype), *rest)
    except ValueError:
        raise Refused("unknown kind or dtype") from None
    expected = PAYLOADS[header.kind]
    if len(frames) != 1 + len(expected):
        raise Refused("wrong number of frames")
    if header.lr != header.lr or header.flags & ~(SHARED | DROPPED):
        raise Refused("bad header field")
    payloads = tuple(memoryview(frame) for frame in frames[1:])
    for name, payload in zip(expected, payloads, strict=True):
        length = payload.nbytes
        if name == "json":
            if length > MAX_JSON_BYTES:
                raise Refused("JSON too long")
        elif name == "rows":
            if length != 8 * header.rows:
                raise Refused("payload has a wrong length")
        elif header.flags & SHARED:
            if length:
                raise Refused("payload has a wrong length")
        elif header.dtype == Dtype.NONE or length != header.count * ITEM_BYTES[header.dtype]:
            raise Refused("payload has a wrong length")
    return Message(header, payloads)

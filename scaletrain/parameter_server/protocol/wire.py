"""The format of every message between workers and servers: a fixed header and raw bytes.

A message is a ZeroMQ multipart: one header of 72 bytes, then as many payload frames as its kind has
(``PAYLOADS``). Nothing is unpickled or evaluated. ``parse`` checks everything that can be checked
without knowing the model. The receiver checks keys, shapes and versions. Both raise ``Refused``.

The header, little-endian: magic (4 bytes), kind and dtype (1 byte each), flags (2), key, rank,
staleness and rows (4 each), step, version, session, offset and count (8 each), lr (a double).
"""

import enum
import json
import math
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

MAGIC = b"SPS1"
_LAYOUT = struct.Struct("<4sBBHIIIIQQQQQd")
HEADER_BYTES = _LAYOUT.size
MAX_MESSAGE_BYTES = 64 << 20  # larger ones end the connection before anything is stored
# Larger ones travel in parts: blocks that are whole tensors, and many rows of a table.
MAX_TENSOR_BYTES = 32 << 20
MAX_JSON_BYTES = 8 << 20  # the table of blocks of a very large model
MAX_SUM_VALUES = 4096
# A sum's number is the step after which it is made, times this, plus its place among those of that
# step: workers that came at different times give the same number to the same sum.
SUMS_OF_A_STEP = 1 << 14

SHARED = 1  # flag: the tensor lies in shared memory, its frame is empty
DROPPED = 2  # flag: this gradient came too late and was not used
ABSENT = 4  # flag of PUSH_ROWS: the table has no gradient in this step
HELD = 8  # flag of gradients: their update waits for SCALE
MADE = 16  # flag of NORMS: that update is made, with the factor in the tensor
MORE = 32  # flag of PUSH_ROWS: further rows of this gradient follow


class MessageKind(enum.IntEnum):
    """The purpose of a message. W: sent by workers, S: sent by servers."""

    HELLO = 1  # W: names the worker that connects; answered by CHALLENGE or WELCOME
    CHALLENGE = 2  # S: prove that you hold the job's key (trusted_network only)
    PROOF = 3  # W: answered by WELCOME
    WELCOME = 4  # S: the connection's session
    SETUP = 5  # W: blocks and optimizer; joins the job; answered by READY
    READY = 6  # S: whether weights are there, versions, shared memory
    INIT = 7  # W: first weights of part of a block, from rank 0; answered by STORED
    STORED = 8  # S
    PULL = 9  # W: asks for part of a block; answered by PART
    WEIGHTS = 10  # S: a block's new weights, or nothing when they lie in shared memory
    # W: a block's gradient, maybe in shared memory, and the numbers of the pieces that have none in
    # this step (zeros stand for them); answered by WEIGHTS
    PUSH = 11
    PUSH_ROWS = 12  # W: rows and values of (part of) a sparse gradient; answered by APPLIED
    APPLIED = 13  # S
    PULL_ROWS = 14  # W: asks for rows of a sparse table; answered by ROWS
    ROWS = 15  # S: the rows' weights
    SUM = 16  # W: a vector to be summed over the live workers; answered by TOTAL
    TOTAL = 17  # S
    PING = 18  # S: a sign of life; count: workers that live, 0 before the first has joined
    LEAVE = 19  # W: done; answered by LEFT
    LEFT = 20  # S
    ABORT = 21  # S: training cannot go on
    REFUSED = 22  # S: that message was not acceptable
    PART = 23  # S: the answer to PULL
    PAUSE = 24  # W: pushes nothing until all workers have met (a sum); answered by PAUSED
    PAUSED = 25  # S
    STATE = 26  # W: asks for the optimizer's state of a block, for a checkpoint
    STATES = 27  # S: names and shapes of its tensors, its numbers; PULL fetches the tensors
    SET_STATE = 28  # W: the same, from rank 0 with a checkpoint; tensors follow by INIT
    # W: asks for the squared norm of the mean gradient of a block's update; answered by NORMS
    NORM = 29
    NORMS = 30  # S
    SCALE = 31  # W: factor and limit for the mean gradients of a step; answered by SCALED
    SCALED = 32  # S
    PROBE = 33  # W: bytes that come back, before SETUP; answered by PROBED
    PROBED = 34  # S


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
    Dtype.NONE: 0,
    Dtype.FLOAT32: 4,
    Dtype.BF16: 2,
    Dtype.FP16: 2,
    Dtype.TRUNC16: 2,
    Dtype.INT64: 8,
    Dtype.FLOAT64: 8,
    Dtype.UINT8: 1,
}


class Payload(enum.Enum):
    """The contents of one payload frame."""

    JSON = enum.auto()  # an object
    TENSOR = enum.auto()  # ``count`` items of ``dtype``; empty with the flag SHARED
    ROWS = enum.auto()  # ``rows`` numbers, int64: of rows of a table, or of pieces of a block


# The payload frames of each kind.
PAYLOADS: dict[MessageKind, tuple[Payload, ...]] = {
    MessageKind.HELLO: (Payload.JSON,),
    MessageKind.CHALLENGE: (Payload.JSON,),
    MessageKind.PROOF: (Payload.JSON,),
    MessageKind.WELCOME: (Payload.JSON,),
    MessageKind.SETUP: (Payload.JSON,),
    MessageKind.READY: (Payload.JSON,),
    MessageKind.INIT: (Payload.TENSOR,),
    MessageKind.STORED: (),
    MessageKind.PULL: (),
    MessageKind.WEIGHTS: (Payload.TENSOR,),
    MessageKind.PUSH: (Payload.TENSOR, Payload.ROWS),
    MessageKind.PUSH_ROWS: (Payload.ROWS, Payload.TENSOR),  # as many values as fit the rows' width
    MessageKind.APPLIED: (),
    MessageKind.PULL_ROWS: (Payload.ROWS,),
    MessageKind.ROWS: (Payload.TENSOR,),
    MessageKind.SUM: (Payload.TENSOR,),
    MessageKind.TOTAL: (Payload.TENSOR,),
    MessageKind.PING: (),
    MessageKind.LEAVE: (),
    MessageKind.LEFT: (),
    MessageKind.ABORT: (Payload.JSON,),
    MessageKind.REFUSED: (Payload.JSON,),
    MessageKind.PART: (Payload.TENSOR,),
    MessageKind.PAUSE: (),
    MessageKind.PAUSED: (),
    MessageKind.STATE: (),
    MessageKind.STATES: (Payload.JSON,),
    MessageKind.SET_STATE: (Payload.JSON,),
    MessageKind.NORM: (),
    MessageKind.NORMS: (Payload.TENSOR,),
    MessageKind.SCALE: (Payload.TENSOR,),
    MessageKind.SCALED: (),
    MessageKind.PROBE: (Payload.TENSOR,),
    MessageKind.PROBED: (Payload.TENSOR,),
}


# The flags that a kind may have; all others have none.
_FLAGS: dict[MessageKind, int] = {
    MessageKind.PUSH: SHARED | HELD,
    MessageKind.PUSH_ROWS: ABSENT | HELD | MORE,
    MessageKind.NORMS: MADE,
    MessageKind.WEIGHTS: SHARED | DROPPED,
    MessageKind.APPLIED: DROPPED,
}


class Refused(Exception):
    """A message that is not acceptable.

    The reason is a short constant text: servers count refusals by it.
    """


class Header(NamedTuple):
    """The fixed part of a message, in the order of the wire.

    Fields that a kind does not use are 0.
    """

    kind: MessageKind
    dtype: Dtype = Dtype.NONE
    flags: int = 0  # SHARED, DROPPED, ABSENT, HELD, MADE, MORE
    key: int = 0  # block
    rank: int = 0  # of the worker
    # Of the answered gradient: updates between the weights it came from and its own update.
    staleness: int = 0
    # Row numbers in a sparse message. In PUSH: pieces without a gradient. In PULL and INIT: 0 for
    # weights, i for the i-th tensor of the optimizer's state.
    rows: int = 0
    # Of the worker; in SUM and TOTAL: the number of the sum. In the answer to a gradient: the job's
    # step that the block's next update belongs to. In NORMS: that of the update.
    step: int = 0
    # Answers: updates of the block's weights so far. Pushes: of the weights the gradient came from.
    version: int = 0
    session: int = 0  # chosen by the server in WELCOME
    offset: int = 0  # first element, in parts of blocks; first row, in parts of sparse gradients
    count: int = 0  # type: ignore[assignment]  # elements of the tensor payload
    lr: float = 0.0

    def pack(self) -> bytes:
        """Return the header's 72 bytes."""
        return _LAYOUT.pack(MAGIC, *self)


class Message(NamedTuple):
    """A received message."""

    header: Header
    payloads: tuple[memoryview, ...]

    def json(self) -> dict[str, Any]:
        """Return the payload of a message that carries JSON.

        Raises:
            Refused: it is not a JSON object.
        """
        try:
            value = json.loads(bytes(self.payloads[0]))
        except (ValueError, RecursionError):
            raise Refused("payload is not JSON") from None
        if not isinstance(value, dict):
            raise Refused("payload is not a JSON object")
        return value


def to_json(value: dict[str, Any]) -> bytes:
    """Return a JSON payload."""
    return json.dumps(value, separators=(",", ":")).encode()


def parse(frames: Sequence[memoryview | bytes]) -> Message:
    """Return the message that ZeroMQ received as ``frames``. Payloads are not copied.

    >>> parse([Header(MessageKind.PING, count=3).pack()]).header.count
    3

    Raises:
        Refused: wrong length, magic, kind, dtype or number of frames, or a payload whose length is
            not the one that the header says.
    """
    if not frames:
        raise Refused("header has a wrong length")
    header = _parse_header(frames[0])
    contents = PAYLOADS[header.kind]
    if len(frames) != 1 + len(contents):
        raise Refused("wrong number of frames")
    if math.isnan(header.lr) or header.flags & ~_FLAGS.get(header.kind, 0):
        raise Refused("bad header field")
    payloads = tuple(memoryview(frame) for frame in frames[1:])
    for content, payload in zip(contents, payloads, strict=True):
        _check_length(content, payload.nbytes, header)
    return Message(header, payloads)


def _parse_header(frame: memoryview | bytes) -> Header:
    """Return the header in the first frame. Raises ``Refused``."""
    if len(frame) != HEADER_BYTES:
        raise Refused("header has a wrong length")
    magic, kind, dtype, *rest = _LAYOUT.unpack(frame)
    if magic != MAGIC:
        raise Refused("wrong magic")
    try:
        return Header(MessageKind(kind), Dtype(dtype), *rest)
    except ValueError:
        raise Refused("unknown kind or dtype") from None


def _check_length(content: Payload, num_bytes: int, header: Header) -> None:
    """Raise ``Refused`` unless a payload is as long as the header says."""
    if content is Payload.JSON:
        if num_bytes > MAX_JSON_BYTES:
            raise Refused("JSON too long")
        return
    if content is Payload.ROWS:
        expected = header.rows * ITEM_BYTES[Dtype.INT64]
    elif header.flags & SHARED:
        expected = 0
    elif header.dtype == Dtype.NONE:
        raise Refused("payload has a wrong length")
    else:
        expected = header.count * ITEM_BYTES[header.dtype]
    if num_bytes != expected:
        raise Refused("payload has a wrong length")

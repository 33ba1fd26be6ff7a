"""Tests ``protocol/wire.py`` and ``codec.py``: messages survive the trip, everything else is
refused.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scaletrain.parameter_server.protocol import codec, wire
from scaletrain.parameter_server.protocol.wire import Dtype, Header, MessageKind, Refused, parse


def frames_of(header: Header, *payloads: bytes) -> list[bytes]:
    return [header.pack(), *payloads]


def test_a_header_comes_back_as_it_was():
    header = Header(MessageKind.PUSH, Dtype.BF16, 0, 3, 1, 4, 0, 17, 5, 2**63 + 1, 9, 6, 0.125)
    message = parse(frames_of(header, bytes(12), b""))
    assert message.header == header
    assert message.payloads[0].nbytes == 12


@pytest.mark.parametrize(
    "frames, reason",
    [
        ([], "header"),
        ([b""], "header"),
        ([Header(MessageKind.PING).pack()[:-1]], "header"),
        ([b"XXXX" + Header(MessageKind.PING).pack()[4:]], "magic"),
        ([wire.MAGIC + b"\xff" + Header(MessageKind.PING).pack()[5:]], "kind"),
        (
            [Header(MessageKind.PING).pack()[:5] + b"\x99" + Header(MessageKind.PING).pack()[6:]],
            "dtype",
        ),
        ([Header(MessageKind.PING).pack(), b""], "number of frames"),
        ([Header(MessageKind.PUSH, Dtype.FLOAT32, count=2).pack()], "number of frames"),
        ([Header(MessageKind.PUSH, Dtype.FLOAT32, count=2).pack(), b"1234567", b""], "length"),
        ([Header(MessageKind.PUSH, Dtype.NONE, count=0).pack(), b"", b""], "length"),
        (
            [Header(MessageKind.PUSH, Dtype.FLOAT32, wire.SHARED, count=1).pack(), b"1234", b""],
            "length",
        ),
        (
            [
                Header(MessageKind.PUSH_ROWS, Dtype.FLOAT32, rows=2, count=1).pack(),
                bytes(8),
                bytes(4),
            ],
            "length",
        ),
        ([Header(MessageKind.PING, flags=64).pack()], "field"),
        ([Header(MessageKind.PING, lr=float("nan")).pack()], "field"),
    ],
)
def test_what_is_not_acceptable_is_refused_with_its_reason(frames, reason):
    with pytest.raises(Refused, match=reason):
        parse(frames)


@given(st.lists(st.binary(max_size=100), max_size=5))
def test_rubbish_is_refused(frames):
    with pytest.raises(Refused):
        parse(frames)


@given(
    st.binary(min_size=wire.HEADER_BYTES - 5, max_size=wire.HEADER_BYTES - 5),
    st.binary(max_size=16),
)
def test_a_header_with_rubbish_fields_is_refused_or_consistent(rest, payload):
    frames = [wire.MAGIC + bytes([MessageKind.PUSH]) + rest, payload, b""]
    try:
        message = parse(frames)
    except Refused:
        return
    shared = message.header.flags & wire.SHARED
    assert shared or len(payload) == message.header.count * wire.ITEM_BYTES[message.header.dtype]


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000])
def test_json_that_is_none_is_refused(text):
    with pytest.raises(Refused, match="JSON"):
        parse(frames_of(Header(MessageKind.HELLO), text)).json()


@pytest.mark.parametrize(
    "name, tolerance", [("float32", 0), ("bf16", 2**-8), ("fp16", 2**-11), ("trunc16", 2**-7)]
)
def test_wire_dtypes_round_within_their_precision(name, tolerance):
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    dtype = codec.BY_NAME[name]
    raw = codec.encode(values, dtype)
    assert raw.nbytes == 1000 * wire.ITEM_BYTES[dtype]
    back = codec.decode(memoryview(raw), dtype)
    assert (back - values).abs().div(values.abs()).max() <= tolerance
    if name == "trunc16":  # cut off, never rounded away from zero; bf16 rounds both ways
        assert (back.abs() <= values.abs()).all()
        assert (
            codec.decode(memoryview(codec.encode(values, Dtype.BF16)), Dtype.BF16).abs()
            > values.abs()
        ).any()

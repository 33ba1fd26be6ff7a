"""A fuzzer of a parameter server's end of the wire.

    python -m tests.parameter_server.fuzz --seconds 3600 --seed 7

It hands mutated messages to a server in this process, without sockets, so that a second is worth
thousands of them: those of strangers, and those of a worker that holds the job's key and has gone
mad. A message may be taken or refused (``Refused``). Any other exception is a fault of the server,
and so are a stranger that is admitted, weights that a stranger has changed, and growing memory.
"""

import argparse
import itertools
import json
import random
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from scaletrain.parameter_server.protocol import sharding, wire
from scaletrain.parameter_server.protocol.channel import Handshake, Subject
from scaletrain.parameter_server.protocol.settings import Settings
from scaletrain.parameter_server.protocol.wire import Dtype, Header, MessageKind, Refused
from scaletrain.parameter_server.server.server import Server
from scaletrain.run.job_key import JobKey, job_key

WORKERS = 3
# Settings whose rules for gradients differ.
MODES: dict[str, dict[str, Any]] = {
    "sync": {"mode": "sync", "backup_workers": 1},
    "bounded": {"mode": "bounded", "staleness": 1},
}
STRANGER = b"stranger"
MEMBER = b"member"
_MOST_BYTES = 256 << 20  # of growth; a server keeps what its workers may have under way
_NUMBERS = (0, 1, 2, 7, 255, 1 << 15, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
_LARGE = (1 << 48, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
_ADAM = {"lr": 0.1, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.1, "amsgrad": True}
_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1.5, 1 << 70, 1 << 2000, 1e308, float("nan"), "", "x" * 5000, [], {}, [[]], [None], {"a": []}
)  # fmt: skip


class Swallow:
    """The server's socket: it keeps the last message and sends none."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def send_multipart(self, frames, *_: Any, **__: Any) -> None:
        self.sent = [bytes(frame) for frame in frames]


class Fuzzer:
    """A server, a worker that it has admitted, and a stranger.

    Args:
        seed: of all that is random.
        run_dir: for the job's key.
        mode: of ``MODES``.

    Attributes:
        refused: messages that were refused, by the reason.
        taken: messages that were not.
    """

    def __init__(self, seed: int, run_dir: Path, mode: str):
        self.random = random.Random(seed)
        self.refused: Counter[str] = Counter()
        self.taken = 0
        settings = Settings(
            WORKERS, link="tcp", security="aes", placement="dedicated", **MODES[mode]
        )
        self._rows_before = 0  # that the worker has sent of a sparse gradient in parts
        self._server = Server(settings, run_dir, 0)
        self._endpoint = self._server._endpoint
        self._socket = Swallow()
        self._endpoint._socket = self._socket
        self._endpoint._key = job_key(run_dir)
        self._blocks = sharding.plan(
            [sharding.ParameterSpec((40, 10)), sharding.ParameterSpec((64, 8), sparse=True)],
            1,
            1000,
        )
        self._setup = {
            "blocks": [sharding.to_json(block) for block in self._blocks],
            "optimizer": {"name": "SGD", "groups": [{"lr": 0.1}]},
            "gradients": None,
            "step": None,
        }
        self._session = self._join(job_key(run_dir))

    def _set_up_anew(self) -> None:
        """Let a mad worker be the first that describes its model, and make an update of it."""
        self._server._blocks = None
        setup = json.loads(json.dumps(self._setup))
        options = dict(_ADAM)
        setup["optimizer"] = {"name": "Adam", "groups": [options]}
        if self.random.random() < 0.5:
            setup = self._mutated(setup)
        else:
            options[self.random.choice(list(options))] = self.random.choice(_VALUES)
        header = self._of_member(Header(MessageKind.SETUP))
        try:
            self._accept(MEMBER, [header, wire.to_json(setup)])
            self.taken += 1
            blocks = self._server._blocks.shard.blocks.values()
            kinds = (MessageKind.INIT, MessageKind.PUSH)
            for kind, block in itertools.product(kinds, blocks):
                if kind == MessageKind.PUSH and block.sparse:
                    continue
                header = Header(kind, Dtype.FLOAT32, key=block.key, count=block.numel, lr=0.1)
                frames = [self._of_member(header), bytes(4 * block.numel)]
                if kind == MessageKind.PUSH:
                    frames.append(b"")
                self._accept(MEMBER, frames)
        except Refused as refusal:
            self.refused[str(refusal).partition(":")[0]] += 1
        self._server._blocks = None
        self._server._aborted = None
        self._join(self._endpoint._key)

    def _store(self) -> None:
        """Send the first values, without which gradients are refused."""
        for block in self._blocks:
            header = Header(MessageKind.INIT, Dtype.FLOAT32, key=block.key, count=block.numel)
            self._accept(MEMBER, [self._of_member(header), bytes(4 * block.numel)])

    def _join(self, key: JobKey) -> int:
        """Admit the worker with rank 0, as ``ServerLink`` asks for it; return its session."""
        handshake = Handshake()
        hello = {"rank": 0, "workers": WORKERS, "connection": 0, "incarnation": 1, "attempt": 1}
        hello["public"] = handshake.public
        self._accept(MEMBER, [Header(MessageKind.HELLO).pack(), wire.to_json(hello)])
        theirs = json.loads(self._socket.sent[-1])["public"]
        subject = Subject(0, 0, 0, 1)
        proof = handshake.proof("worker", key, subject, theirs)
        self._accept(MEMBER, [Header(MessageKind.PROOF).pack(), wire.to_json({"proof": proof})])
        session = self._endpoint._peers[MEMBER].session
        assert session
        self._session = session
        header = self._of_member(Header(MessageKind.SETUP))
        self._accept(MEMBER, [header, wire.to_json(self._setup)])
        return session

    def _of_member(self, header: Header) -> bytes:
        return header._replace(session=self._session).pack()

    def _accept(self, route: bytes, frames: list[bytes]) -> None:
        self._endpoint.accept(route, wire.parse([memoryview(frame) for frame in frames]))

    def weights(self) -> torch.Tensor:
        """Return a copy of all weights on the server, as bits: NaN is not equal to itself."""
        shard = self._server._blocks.shard
        weights = [shard.weights(block.key).reshape(-1) for block in self._blocks]
        return torch.cat(weights).view(torch.int32)

    def step(self) -> None:
        """Send one message. Raises whatever is a fault of the server."""
        if self.random.random() < 0.005:
            self._set_up_anew()
        # Some hundred messages come before the first values do.
        if not self._server._blocks.ready and self.random.random() < 0.01:
            self._store()
        is_stranger = self.random.random() < 0.3
        route = STRANGER if is_stranger else MEMBER
        before = self.weights() if is_stranger else None
        frames = self._frames(is_stranger)
        try:
            self._accept(route, frames)
            self.taken += 1
        except Refused as refusal:
            self._endpoint.refuse(route, self._endpoint._peers.get(route), str(refusal))
            self.refused[str(refusal).partition(":")[0]] += 1
        if before is not None:
            assert torch.equal(self.weights(), before, ), "a stranger has changed weights"  # fmt: skip
            peer = self._endpoint._peers.get(STRANGER)
            assert peer is None or not peer.session, "a stranger was admitted"
        self._revive()

    def _revive(self) -> None:
        """Let the mad worker in again after it has left, or has said HELLO anew."""
        peer = self._endpoint._peers.get(MEMBER)
        rule = self._server._blocks.rule
        if peer is None or peer.session != self._session or 0 not in rule.live:
            self._server._aborted = None
            self._join(self._endpoint._key)

    def _frames(self, is_stranger: bool) -> list[bytes]:
        """Return the frames of a message that is nearly right."""
        choice = self.random
        if choice.random() < 0.05:
            return [choice.randbytes(choice.randrange(200)) for _ in range(choice.randrange(5))]
        header = self._header(is_stranger)
        frames = [header.pack()]
        for content in wire.PAYLOADS[header.kind]:
            frames.append(self._payload(content, header))
        if choice.random() < 0.1:
            frame = choice.randrange(len(frames))
            mutated = bytearray(frames[frame])
            for _ in range(choice.randrange(1, 4)):
                if mutated:
                    mutated[choice.randrange(len(mutated))] = choice.randrange(256)
            frames[frame] = bytes(mutated)
        if choice.random() < 0.03:
            frames = frames[:-1] if choice.random() < 0.5 else [*frames, b"more"]
        return frames

    def _header(self, is_stranger: bool) -> Header:
        choice = self.random
        kind = choice.choice([*MessageKind, MessageKind.PUSH, MessageKind.PUSH_ROWS])
        if is_stranger and choice.random() < 0.5:
            kind = choice.choice([MessageKind.HELLO, MessageKind.PROOF])
        block = choice.choice(self._blocks)
        rows = choice.randrange(4)
        count = rows * 8 if block.sparse else block.numel
        header = Header(
            kind,
            Dtype.FLOAT64 if kind in (MessageKind.SUM, MessageKind.SCALE) else Dtype.FLOAT32,
            key=block.key,
            rows=rows,
            step=choice.randrange(5),
            version=choice.randrange(3),
            session=0 if is_stranger else self._session,
            count=2 if kind == MessageKind.SCALE else count,
            lr=0.1,
        )
        if kind in (MessageKind.PUSH, MessageKind.PUSH_ROWS) and choice.random() < 0.5:
            header = header._replace(flags=wire.HELD)
        if kind == MessageKind.PUSH_ROWS:
            header = self._in_parts(header)
        if choice.random() < 0.4:
            field = choice.choice(["flags", "key", "rank", "staleness", "rows"])
            header = header._replace(**{field: choice.choice(_NUMBERS) & 0xFFFF if field == "flags" else choice.choice(_NUMBERS)})  # fmt: skip
        if choice.random() < 0.3:
            field = choice.choice(["step", "version", "session", "offset", "count"])
            header = header._replace(**{field: choice.choice(_NUMBERS + _LARGE)})
        if choice.random() < 0.1:
            header = header._replace(dtype=choice.choice(list(Dtype)))
        if choice.random() < 0.1:
            header = header._replace(lr=choice.choice([float("nan"), float("inf"), -1.0, 1e308]))
        return header

    def _in_parts(self, header: Header) -> Header:
        """Return the header of a sparse gradient, or of a part of one, most often the next."""
        if self.random.random() < 0.8:
            header = header._replace(offset=self._rows_before)
        self._rows_before = 0
        if self.random.random() < 0.4:
            self._rows_before = header.offset + header.rows
            header = header._replace(flags=header.flags | wire.MORE)
        return header

    def _payload(self, content: wire.Payload, header: Header) -> bytes:
        choice = self.random
        if content is wire.Payload.JSON:
            return wire.to_json(self._mutated(self._json(header.kind)))
        if content is wire.Payload.ROWS:
            numbers = [
                choice.choice([0, 1, 5, 63, 64, -1, 1 << 62]) for _ in range(min(header.rows, 9))
            ]
            return np.array(numbers, np.int64).tobytes()
        if header.kind == MessageKind.SCALE and choice.random() < 0.8:
            return np.array(
                [choice.choice([0.0, 0.5, 1.0]), choice.choice([0.1, np.inf])]
            ).tobytes()
        num_bytes = header.count * wire.ITEM_BYTES[header.dtype]
        if header.flags & wire.SHARED or num_bytes > 1 << 16:
            return b""
        return choice.randbytes(num_bytes)

    def _json(self, kind: MessageKind) -> Any:
        if kind == MessageKind.HELLO:
            public = Handshake().public if self.random.random() < 0.1 else "0" * 64
            return {
                "rank": 0, "workers": WORKERS, "connection": 1, "incarnation": 1, "attempt": 1, "public": public
            }  # fmt: skip
        if kind == MessageKind.PROOF:
            return {"proof": "0" * 64}
        if kind == MessageKind.SETUP:
            return json.loads(json.dumps(self._setup))
        return {"tensors": [["0.momentum_buffer", [250]]], "numbers": {"0.step": 1.0}}

    def _mutated(self, value: Any) -> Any:
        """Return JSON with something changed, most of the time."""
        choice = self.random
        if choice.random() < 0.1:
            return choice.choice(_VALUES)
        if isinstance(value, dict) and value and choice.random() < 0.8:
            name = choice.choice(list(value))
            if choice.random() < 0.1:
                return {other: value[other] for other in value if other != name}
            return value | {name: self._mutated(value[name])}
        if isinstance(value, list) and value and choice.random() < 0.8:
            place = choice.randrange(len(value))
            return [*value[:place], self._mutated(value[place]), *value[place + 1 :]]
        return value


def fuzz(
    seed: int, run_dir: Path, frames: int = 0, seconds: float = 0.0, mode: str = "sync"
) -> Fuzzer:
    """Send messages until there were so many, or so much time has passed.

    Raises:
        AssertionError: the server has a fault; the message names seed and number of the message.
    """
    fuzzer = Fuzzer(seed, run_dir, mode)
    process = psutil.Process()
    before = process.memory_info().rss
    until = time.monotonic() + seconds
    number = 0
    while number < frames or time.monotonic() < until:
        try:
            fuzzer.step()
        except Exception as error:
            raise AssertionError(f"seed {seed}, message {number}: {error!r}") from error
        number += 1
        if number % 1000 == 0:
            grown = process.memory_info().rss - before
            assert grown < _MOST_BYTES, f"seed {seed}, message {number}: {grown >> 20} MiB more"
    return fuzzer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    for mode in MODES:
        with tempfile.TemporaryDirectory() as folder:
            fuzzer = fuzz(
                options.seed, Path(folder), seconds=options.seconds / len(MODES), mode=mode
            )
        num_refused = sum(fuzzer.refused.values())
        print(f"{mode}, seed {options.seed}: {fuzzer.taken:,} taken, {num_refused:,} refused:")
        for reason, count in fuzzer.refused.most_common():
            print(f"{count:12,}  {reason}")


if __name__ == "__main__":
    main()

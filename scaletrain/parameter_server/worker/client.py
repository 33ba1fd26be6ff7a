"""A worker's end: pushes gradients, receives weights, on a thread of its own, so that communication overlaps computation."""

import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import zmq
from torch import Tensor

from scaletrain.parameter_server.protocol import codec, memory, wire
from scaletrain.parameter_server.protocol.settings import SILENCE_S, Settings
from scaletrain.parameter_server.protocol.sharding import Block
from scaletrain.parameter_server.protocol.wire import Dtype, Header, Kind, Message
from scaletrain.parameter_server.worker.link import Identity, Link
from scaletrain.parameter_server.worker.requests import (
    Answered,
    PeerLost,
    Requests,
    ServerError,
    Token,
)
from scaletrain.run import progress

PART_ELEMENTS = 1 << 20  # first weights and whole tables travel in parts of 4 MiB


class Answer(NamedTuple):
    """What became of a pushed gradient."""

    staleness: int
    dropped: bool


_ANSWERS = {
    Kind.STORED: "store", Kind.PART: "part", Kind.WEIGHTS: "update", Kind.APPLIED: "update", Kind.ROWS: "rows",
    Kind.TOTAL: "sum", Kind.PAUSED: "pause", Kind.LEFT: "leave", Kind.STATES: "state",
}  # fmt: skip


class Client:
    """Connects worker ``rank`` with all servers of a job. Methods are called by one thread, the one that trains.

    Args:
        blocks: the whole plan, the same on all workers.
        optimizer: description of the server's optimizer (``optimizer.describe``).

    Raises (all methods):
        ServerError: names the server, and what happened.
    """

    def __init__(
        self,
        settings: Settings,
        run_dir: Path,
        rank: int,
        blocks: Sequence[Block],
        optimizer: dict[str, Any],
    ):
        self.settings, self.rank = settings, rank
        self._blocks = {block.key: block for block in blocks}
        self._dtype = codec.BY_NAME[settings.wire]
        self._version = dict.fromkeys(self._blocks, 0)
        self._buffers: dict[int, np.ndarray] = {}
        self._requests = Requests()
        self._stopping = False
        self.step = 0  # the job's, when this worker came
        self.initialised = True
        self.bytes_sent = 0
        self.bytes_received = 0
        self.reconnects = 0
        if not settings.shared_memory:
            memory.keep_freed()
        identity = Identity.make(settings, run_dir, rank, optimizer)
        self._context = identity.context
        self._links = [
            Link(identity, s, [b for b in blocks if b.server == s]) for s in range(settings.servers)
        ]
        deadline = time.monotonic() + settings.timeout_s
        for link in self._links:
            with progress.waiting("the parameter servers"):
                ready = link.connect(deadline, None)
            self._note_versions(ready)
            self.step = max(self.step, int(ready["step"]))
            self.initialised &= bool(ready["initialised"])
            if link.index == 0:
                self._sum_number = int(ready["sum"])
        self._thread = threading.Thread(target=self._run, name="parameter-server", daemon=True)
        self._thread.start()

    # What a worker asks for

    def store(self, key: int, values: Tensor, which: int = 0) -> None:
        """Set a block's first weights (rank 0, before training), or the ``which``-th tensor of ``set_state``; flat float32."""
        tokens = []
        for offset in range(0, len(values), PART_ELEMENTS):
            part = values[offset : offset + PART_ELEMENTS].contiguous().numpy()
            header = Header(
                Kind.INIT, Dtype.FLOAT32, key=key, rows=which, offset=offset, count=len(part)
            )
            tokens.append(self._requests.ask(Token("store", key, offset), header, [part]))
        for token in tokens:
            self._requests.wait(token)

    def pull(self, key: int, sink: Callable[[int, Tensor], None]) -> None:
        """Hand a block's weights of now to ``sink(offset, float32 values)``, part by part; waits until rank 0 has stored them."""
        self._version[key] = self._pull(key, 0, self._blocks[key].numel, sink)

    def _pull(self, key: int, which: int, numel: int, sink: Callable[[int, Tensor], None]) -> int:
        tokens, version = [], 0
        for offset in range(0, numel, PART_ELEMENTS):
            header = Header(
                Kind.PULL,
                key=key,
                rows=which,
                offset=offset,
                count=min(PART_ELEMENTS, numel - offset),
            )
            tokens.append(self._requests.ask(Token("part", key, offset), header, []))
        for token in tokens:
            message = self._requests.wait(token).message
            version = message.header.version
            sink(token.offset, codec.decode(message.payloads[0], message.header.dtype))
        return version

    def state(self, key: int) -> tuple[dict[str, Tensor], dict[str, float]]:
        """The optimizer's state of a block as it is on the server: tensors and numbers by name."""
        value = self._requests.wait(
            self._requests.ask(Token("state", key), Header(Kind.STATE, key=key), [])
        ).message.json()
        tensors = {name: torch.empty(shape) for name, shape in value["tensors"]}
        for which, tensor in enumerate(tensors.values(), 1):

            def sink(offset: int, values: Tensor, tensor: Tensor = tensor) -> None:
                tensor.view(-1)[offset : offset + len(values)] = values

            self._pull(key, which, tensor.numel(), sink)
        return tensors, value["numbers"]

    def set_state(self, key: int, tensors: dict[str, Tensor], numbers: dict[str, float]) -> None:
        """Set the optimizer's state of a block, float32 (rank 0, before ``store``): what ``state`` gave."""
        named = sorted(tensors.items())
        value = {
            "tensors": [[name, list(tensor.shape)] for name, tensor in named],
            "numbers": numbers,
        }
        self._requests.wait(
            self._requests.ask(
                Token("store", key), Header(Kind.SET_STATE, key=key), [wire.to_json(value)]
            )
        )
        for which, (_, tensor) in enumerate(named, 1):
            self.store(key, tensor.reshape(-1), which)

    def gradient(self, key: int) -> np.ndarray:
        """Where the gradient of a dense block has to be written before ``push``: flat float32. It may be rewritten after ``take``."""
        link, block = self._links[self._blocks[key].server], self._blocks[key]
        if link.shared and link.gradients is not None:
            start = link.starts[key]
            return link.gradients.floats[start : start + block.numel]
        if key not in self._buffers:
            self._buffers[key] = np.zeros(block.numel, np.float32)
        return self._buffers[key]

    def push(self, key: int, step: int, lr: float) -> None:
        """Send what ``gradient(key)`` holds; does not wait. Answered by ``take``. Any thread may call it."""
        link, values = self._links[self._blocks[key].server], self.gradient(key)
        header = Header(
            Kind.PUSH,
            self._dtype,
            key=key,
            step=step,
            version=self._version[key],
            count=len(values),
            lr=lr,
        )
        if link.shared:
            header = header._replace(flags=wire.SHARED, dtype=Dtype.FLOAT32)
            self._requests.ask(Token("update", key), header, [b""])
            return
        encoded, size = (
            codec.encode(torch.from_numpy(values), self._dtype),
            wire.MAX_TENSOR_BYTES // 4,
        )
        for offset in range(0, len(values), size):
            part = encoded[offset : offset + size]
            self._requests.ask(
                Token("update", key, offset),
                header._replace(offset=offset, count=len(part)),
                [part],
            )

    def push_rows(self, key: int, step: int, lr: float, rows: Tensor, values: Tensor) -> None:
        """Send a sparse gradient: row numbers within the block, int64 (n), and values float32 (n, width). Answered by ``take_rows``."""
        payload = codec.encode(values.reshape(-1).contiguous(), self._dtype)
        header = Header(
            Kind.PUSH_ROWS,
            self._dtype,
            key=key,
            step=step,
            version=self._version[key],
            rows=len(rows),
            count=payload.size,
            lr=lr,
        )
        self._requests.ask(Token("update", key), header, [rows.contiguous().numpy(), payload])

    def take(self, key: int, sink: Callable[[Tensor], None]) -> Answer:
        """Wait for the answer to ``push`` and hand the block's new weights (flat float32, read-only) to ``sink``.

        ``sink`` may be called again with newer weights: in shared memory an update can come in between.
        """
        message, epoch, slab = self._requests.wait(Token("update", key))
        link, header = self._links[self._blocks[key].server], message.header
        if header.flags & wire.SHARED:
            assert slab is not None
            start, place = link.starts[key], link.place[key]
            values = torch.from_numpy(slab.floats[start : start + self._blocks[key].numel])
            while True:
                before = int(slab.sequence[place])
                if before % 2 == 0:
                    sink(values)
                    if int(slab.sequence[place]) == before:
                        break
                time.sleep(0)
            version = before // 2
        else:
            parts, size = (
                [codec.decode(message.payloads[0], header.dtype)],
                wire.MAX_TENSOR_BYTES // 4,
            )
            for offset in range(size, self._blocks[key].numel, size):
                other = self._requests.wait(Token("update", key, offset)).message
                parts.append(codec.decode(other.payloads[0], other.header.dtype))
            sink(parts[0] if len(parts) == 1 else torch.cat(parts))
            version = header.version
        if epoch == link.epoch:
            self._version[key] = version
        return Answer(header.staleness, bool(header.flags & wire.DROPPED))

    def take_rows(self, key: int) -> Answer:
        """Wait until a sparse gradient was used."""
        message, epoch, _ = self._requests.wait(Token("update", key))
        header = message.header
        if epoch == self._links[self._blocks[key].server].epoch:
            self._version[key] = header.version
        return Answer(header.staleness, bool(header.flags & wire.DROPPED))

    def ask_rows(self, key: int, rows: Tensor) -> None:
        """Ask for rows of a sparse table: numbers within the block, int64. Answered by ``rows``."""
        header = Header(Kind.PULL_ROWS, key=key, rows=len(rows))
        self._requests.ask(Token("rows", key), header, [rows.contiguous().numpy()])

    def rows(self, key: int) -> Tensor:
        """The rows asked for, float32 (n, width)."""
        message, epoch, _ = self._requests.wait(Token("rows", key))
        if epoch == self._links[self._blocks[key].server].epoch:
            self._version[key] = message.header.version
        return codec.decode(message.payloads[0], message.header.dtype).view(message.header.rows, -1)

    def sum(self, values: np.ndarray) -> np.ndarray:
        """The sum over all live workers of a float64 vector of at most ``wire.MAX_SUM_VALUES``; every worker calls it."""
        if len(values) > wire.MAX_SUM_VALUES:
            raise ValueError(f"{len(values)} values to sum (at most {wire.MAX_SUM_VALUES})")
        if (
            self.settings.backup_workers
        ):  # whoever is behind goes on without this worker's gradients
            self._tell_all("pause", Kind.PAUSE)
        number, self._sum_number = self._sum_number, self._sum_number + 1
        header = Header(Kind.SUM, Dtype.FLOAT64, step=number, count=len(values))
        token = self._requests.ask(
            Token("sum", number), header, [np.ascontiguousarray(values, np.float64)]
        )
        return np.frombuffer(self._requests.wait(token).message.payloads[0], np.float64)

    def fail(self, message: str) -> None:
        """End all waiting, now and later, with a ``ServerError``. Any thread may call it."""
        self._requests.fail(ServerError(message))

    def close(self) -> None:
        """Leave in good order: the servers go on without this worker."""
        self._tell_all("leave", Kind.LEAVE)
        self._stopping = True
        os.eventfd_write(self._requests.wake, 1)
        self._thread.join(timeout=5)
        self._requests.close()

    def _tell_all(self, what: str, kind: Kind) -> None:
        for link in self._links:
            self._requests.ask(Token(what, link.index), Header(kind), [])
        for link in self._links:
            self._requests.wait(Token(what, link.index))

    def version(self) -> int:
        """Updates of the least updated block, as far as this worker has heard."""
        return min(self._version.values(), default=0)

    def live(self) -> int:
        """Workers that live, as the first server has last said; 0: it has said nothing yet."""
        return self._links[0].live

    def _note_versions(self, ready: dict[str, Any]) -> None:
        for key_text, version in ready.get("versions", {}).items():
            self._version[int(key_text)] = int(version)

    # The thread

    def _run(self) -> None:
        requests = self._requests
        try:
            poller = self._poller()
            while not self._stopping and requests.failure is None:
                ready = dict(poller.poll(1000))
                if requests.wake in ready:
                    requests.woken()
                if self._attend(ready, poller):
                    poller = self._poller()
                requests.send(
                    lambda token, header, payloads, poller=poller: self._send(
                        token, header, payloads, poller
                    )
                )
        except ServerError as error:
            requests.fail(error)
        except Exception as error:  # whatever it is, the training thread has to hear of it
            requests.fail(ServerError(f"{type(error).__name__}: {error}"))
        finally:
            for link in self._links:
                link.disconnect()
            self._context.term()

    def _poller(self) -> zmq.Poller:
        poller = zmq.Poller()
        poller.register(self._requests.wake, zmq.POLLIN)
        for link in self._links:
            for socket in [*link.sockets, *link.monitors]:
                poller.register(socket, zmq.POLLIN)
        return poller

    def _attend(self, ready: dict[Any, int], poller: zmq.Poller) -> bool:
        """Receive what is there, and look whether all servers are; True when sockets have changed."""
        for link in self._links:
            if any(ready.get(monitor) for monitor in link.monitors) and link.closed():
                self._lost(link, "closed the connection")
                return True
            for number, socket in enumerate(link.sockets):
                if ready.get(socket, 0) & zmq.POLLIN:
                    self._receive(link, socket)
                    link.heard = time.monotonic()
                if ready.get(socket, 0) & zmq.POLLOUT:
                    link.blocked.discard(number)
                    poller.register(socket, zmq.POLLIN)
            silent_s = time.monotonic() - link.heard
            if silent_s > max(SILENCE_S, self.settings.timeout_s):
                self._lost(link, f"gave no sign of life for {silent_s:.0f} s")
                return True
        return False

    def _send(self, token: Token, header: Header, payloads: list[Any], poller: zmq.Poller) -> bool:
        link, number = self._route(token)
        if number in link.blocked or (token.what == "update" and not link.may_push(token)):
            return False
        socket = link.sockets[number]
        header = header._replace(rank=self.rank, session=link.sessions[number])
        try:
            socket.send_multipart([header.pack(), *payloads], zmq.NOBLOCK, copy=False)
        except zmq.Again:
            link.blocked.add(number)
            poller.register(socket, zmq.POLLIN | zmq.POLLOUT)
            return False
        if token.what == "update":
            link.under_way.add(token)
        self.bytes_sent += wire.HEADER_BYTES + sum(
            memoryview(payload).nbytes for payload in payloads
        )
        if header.flags & wire.SHARED:
            self.bytes_sent += 4 * header.count
        return True

    def _route(self, token: Token) -> tuple[Link, int]:
        """Sums go to server 0; everything about a block over the connection that its number gives."""
        if token.what == "sum":
            return self._links[0], 0
        if token.what in ("pause", "leave"):
            return self._links[token.key], 0
        link = self._links[self._blocks[token.key].server]
        return link, token.key % len(link.sockets)

    def _receive(self, link: Link, socket: zmq.Socket) -> None:
        for _ in range(64):
            try:
                frames = socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            self.bytes_received += sum(len(frame) for frame in frames)
            message = link.parse(frames)
            if message is None:
                continue
            header = message.header
            if header.flags & wire.SHARED:
                self.bytes_received += 4 * header.count
            number = header.key
            if header.kind in (Kind.PAUSED, Kind.LEFT):
                number = link.index
            elif header.kind == Kind.TOTAL:
                number = header.step
            token = Token(_ANSWERS.get(header.kind, ""), number, header.offset)
            link.under_way.discard(token)
            self._requests.answer(token, Answered(message, link.epoch, link.weights))

    def _lost(self, link: Link, what: str) -> None:
        """The server is gone: wait for its successor where there will be one, else stop."""
        goodbye = Token("leave", link.index)
        if self._requests.is_open(goodbye):  # it ended while we were saying goodbye
            self._requests.answer(
                goodbye, Answered(Message(Header(Kind.LEFT), ()), link.epoch, None)
            )
            link.disconnect()
            link.heard = float("inf")
            return
        if not self.settings.restart_servers:
            raise PeerLost(f"{link} {what}")
        link.disconnect()
        self.reconnects += 1
        deadline = time.monotonic() + self.settings.timeout_s
        self._note_versions(link.connect(deadline, self.step, what, lambda: self._stopping))

        def again(token: Token, header: Header) -> Header | None:
            if self._route(token)[0] is not link:
                return None
            return (
                header._replace(version=self._version[token.key])
                if token.what == "update"
                else header
            )

        self._requests.send_again(again)

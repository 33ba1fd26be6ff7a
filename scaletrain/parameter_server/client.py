"""A worker's end: pushes gradients, receives weights, on a thread of its own, so that communication overlaps computation."""

import heapq
import ipaddress
import os
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
import zmq
from torch import Tensor
from zmq.utils.monitor import recv_monitor_message

from scaletrain.parameter_server import codec, placement, security, wire
from scaletrain.parameter_server.memory import SUPPORTED, Slab
from scaletrain.parameter_server.settings import Settings
from scaletrain.parameter_server.sharding import Block, layout, to_json
from scaletrain.parameter_server.wire import Dtype, Header, Kind, Message, Refused

PART_ELEMENTS = 1 << 20  # first weights and whole tables travel in parts of 4 MiB
_SILENCE_S = 10.0  # a server gives a sign of life four times a second


class ServerError(RuntimeError):
    """A parameter server is gone, refuses this worker, or says that training cannot go on."""


class Answer(NamedTuple):
    """What became of a pushed gradient."""

    staleness: int
    dropped: bool


class _Token(NamedTuple):
    """What a message asks for; its answer carries the same."""

    what: str
    key: int
    offset: int = 0


_ANSWERS = {
    Kind.STORED: "store", Kind.PART: "part", Kind.WEIGHTS: "update", Kind.APPLIED: "update", Kind.ROWS: "rows",
    Kind.TOTAL: "sum", Kind.PAUSED: "pause", Kind.LEFT: "leave",
}  # fmt: skip


class _Link:
    """One server, as this worker sees it. Touched by the thread alone, except while connecting for the first time."""

    def __init__(self, index: int, blocks: list[Block]):
        self.index = index
        self.blocks = blocks
        self.sockets: list[zmq.Socket] = []
        self.monitors: list[zmq.Socket] = []
        self.sessions: list[int] = []
        self.heard = time.monotonic()
        self.gradients: Slab | None = None
        self.weights: Slab | None = None
        self.shared = False
        self.endpoint = "not found yet"
        self.starts, self.elements = layout(blocks)
        self.place = {key: place for place, key in enumerate(sorted(block.key for block in blocks))}
        self.blocked: set[int] = set()  # sockets whose queue is full
        self.attempts = 0
        self.epoch = 0  # connections made; an answer of an older one has an old version


class Client:
    """Connects worker ``rank`` with all servers of a job. Methods are called by one thread, the one that trains.

    Args:
        blocks: the whole plan, the same on all workers.
        optimizer: description of the server's optimizer (``optimizer.describe``).

    Raises (all methods):
        ServerError: names the server, and what happened.
    """

    def __init__(
        self, settings: Settings, run_dir: Path, rank: int, blocks: Sequence[Block], optimizer: dict[str, Any]
    ):
        self.settings, self.rank = settings, rank
        self._run_dir, self._optimizer = run_dir, optimizer
        self._blocks = {block.key: block for block in blocks}
        self._dtype = codec.BY_NAME[settings.wire]
        self._num_connections = settings.connections or (4 if settings.encrypted else 1)
        self._context = zmq.Context(io_threads=max(1, min(self._num_connections, len(os.sched_getaffinity(0)))))
        self._links = [_Link(s, [b for b in blocks if b.server == s]) for s in range(settings.servers)]
        self._incarnation = secrets.randbits(62) | 1
        self._keys: security.Keys | None = None
        self._version = dict.fromkeys(self._blocks, 0)
        self._outstanding: dict[_Token, tuple[Header, list[Any]]] = {}
        self._queue: list[tuple[int, int, _Token]] = []  # heap: block (forward order), arrival
        self._queued = 0
        self._answers: dict[_Token, tuple[Message, _Link, int, Slab | None]] = {}
        self._changed = threading.Condition()
        self._failure: str | None = None
        self._stopping = False
        self._buffers: dict[int, np.ndarray] = {}
        self._sum_number = 0
        self.step = 0  # the job's, when this worker came
        self.initialised = False
        self.bytes_sent = 0
        self.bytes_received = 0
        self.reconnects = 0
        deadline = time.monotonic() + settings.timeout_s
        for link in self._links:
            if settings.shared_memory and SUPPORTED:
                link.gradients = Slab.create(link.elements, len(link.blocks))
            self._connect(link, deadline, None)
        self._wake = os.eventfd(0, os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._run, name="parameter-server", daemon=True)
        self._thread.start()

    # What a worker asks for

    def store(self, key: int, values: Tensor) -> None:
        """Set a block's first weights (rank 0, before training); ``values`` is flat float32."""
        tokens = []
        for offset in range(0, len(values), PART_ELEMENTS):
            part = values[offset : offset + PART_ELEMENTS].contiguous().numpy()
            header = Header(Kind.INIT, Dtype.FLOAT32, key=key, offset=offset, count=len(part))
            tokens.append(self._ask(_Token("store", key, offset), header, [part]))
        for token in tokens:
            self._wait(token)

    def pull(self, key: int, sink: Callable[[int, Tensor], None]) -> None:
        """Hand a block's weights of now to ``sink(offset, float32 values)``, part by part; waits until rank 0 has stored them."""
        numel = self._blocks[key].numel
        tokens = []
        for offset in range(0, numel, PART_ELEMENTS):
            header = Header(Kind.PULL, key=key, offset=offset, count=min(PART_ELEMENTS, numel - offset))
            tokens.append(self._ask(_Token("part", key, offset), header, []))
        for token in tokens:
            message = self._wait(token)[0]
            self._version[key] = message.header.version
            sink(token.offset, codec.decode(message.payloads[0], message.header.dtype))

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
            Kind.PUSH, self._dtype, key=key, step=step, version=self._version[key], count=len(values), lr=lr
        )
        if link.shared:
            header, payload = header._replace(flags=wire.SHARED, dtype=Dtype.FLOAT32), b""
        else:
            payload = codec.encode(torch.from_numpy(values), self._dtype)
        self._ask(_Token("update", key), header, [payload])

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
        self._ask(_Token("update", key), header, [rows.contiguous().numpy(), payload])

    def take(self, key: int, sink: Callable[[Tensor], None]) -> Answer:
        """Wait for the answer to ``push`` and hand the block's new weights (flat float32, read-only) to ``sink``.

        ``sink`` may be called again with newer weights: in shared memory an update can come in between.
        """
        message, link, epoch, slab = self._wait(_Token("update", key))
        header = message.header
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
            sink(codec.decode(message.payloads[0], header.dtype))
            version = header.version
        if epoch == link.epoch:
            self._version[key] = version
        return Answer(header.staleness, bool(header.flags & wire.DROPPED))

    def take_rows(self, key: int) -> Answer:
        """Wait until a sparse gradient was used."""
        message, link, epoch, _ = self._wait(_Token("update", key))
        header = message.header
        if epoch == link.epoch:
            self._version[key] = header.version
        return Answer(header.staleness, bool(header.flags & wire.DROPPED))

    def ask_rows(self, key: int, rows: Tensor) -> None:
        """Ask for rows of a sparse table: numbers within the block, int64. Answered by ``rows``."""
        header = Header(Kind.PULL_ROWS, key=key, rows=len(rows))
        self._ask(_Token("rows", key), header, [rows.contiguous().numpy()])

    def rows(self, key: int) -> Tensor:
        """The rows asked for, float32 (n, width)."""
        message, link, epoch, _ = self._wait(_Token("rows", key))
        if epoch == link.epoch:
            self._version[key] = message.header.version
        return codec.decode(message.payloads[0], message.header.dtype).view(message.header.rows, -1)

    def sum(self, values: np.ndarray) -> np.ndarray:
        """The sum over all live workers of a float64 vector of at most ``wire.MAX_SUM_VALUES``; every worker calls it."""
        if len(values) > wire.MAX_SUM_VALUES:
            raise ValueError(f"{len(values)} values to sum (at most {wire.MAX_SUM_VALUES})")
        if self.settings.backup_workers:  # whoever is behind goes on without this worker's gradients
            self._tell_all("pause", Kind.PAUSE)
        number, self._sum_number = self._sum_number, self._sum_number + 1
        header = Header(Kind.SUM, Dtype.FLOAT64, step=number, count=len(values))
        token = self._ask(_Token("sum", number), header, [np.ascontiguousarray(values, np.float64)])
        return np.frombuffer(self._wait(token)[0].payloads[0], np.float64)

    def close(self) -> None:
        """Leave in good order: the servers go on without this worker."""
        self._tell_all("leave", Kind.LEAVE)
        self._stopping = True
        os.eventfd_write(self._wake, 1)
        self._thread.join(timeout=5)
        os.close(self._wake)

    def version(self) -> int:
        """Updates of the least updated block, as far as this worker has heard."""
        return min(self._version.values(), default=0)

    # Between the threads

    def _tell_all(self, what: str, kind: Kind) -> None:
        for link in self._links:
            self._ask(_Token(what, link.index), Header(kind), [])
        for link in self._links:
            self._wait(_Token(what, link.index))

    def _ask(self, token: _Token, header: Header, payloads: list[Any]) -> _Token:
        with self._changed:
            self._outstanding[token] = (header, payloads)
            self._queued += 1
            heapq.heappush(self._queue, (header.key, self._queued, token))
        os.eventfd_write(self._wake, 1)
        return token

    def _wait(self, token: _Token) -> tuple[Message, _Link, int, Slab | None]:
        with self._changed:
            # The thread watches the servers' signs of life: it ends this wait when one is gone.
            self._changed.wait_for(lambda: token in self._answers or self._failure is not None)
            if token in self._answers:
                return self._answers.pop(token)
            raise ServerError(self._failure)

    def _fail(self, message: str) -> None:
        with self._changed:
            self._failure = self._failure or message
            self._changed.notify_all()

    # The thread

    def _run(self) -> None:
        try:
            poller = zmq.Poller()
            self._register(poller)
            while not self._stopping and self._failure is None:
                ready = dict(poller.poll(1000))
                if self._wake in ready:
                    os.eventfd_read(self._wake)
                again = False
                for link in self._links:
                    if any(ready.get(monitor) for monitor in link.monitors) and self._closed(link):
                        self._lost(link, "closed the connection")
                        again = True
                        break
                    for number, socket in enumerate(link.sockets):
                        if ready.get(socket, 0) & zmq.POLLIN:
                            self._receive(link, socket)
                            link.heard = time.monotonic()
                        if ready.get(socket, 0) & zmq.POLLOUT:
                            link.blocked.discard(number)
                            poller.register(socket, zmq.POLLIN)
                    if (
                        time.monotonic() - link.heard > max(_SILENCE_S, self.settings.timeout_s)
                        and self._failure is None
                    ):
                        self._lost(link, f"gave no sign of life for {time.monotonic() - link.heard:.0f} s")
                        again = True
                        break
                if again:
                    poller = zmq.Poller()
                    self._register(poller)
                self._send_queued(poller)
        except Exception as error:  # whatever it is, the training thread has to hear of it
            self._fail(f"{type(error).__name__}: {error}")
        finally:
            for link in self._links:
                self._disconnect(link)
            self._context.term()

    def _register(self, poller: zmq.Poller) -> None:
        poller.register(self._wake, zmq.POLLIN)
        for link in self._links:
            for socket in [*link.sockets, *link.monitors]:
                poller.register(socket, zmq.POLLIN)

    def _send_queued(self, poller: zmq.Poller) -> None:
        """Send in forward order what its socket has room for; the rest waits, and may be overtaken by what is needed sooner."""
        later = []
        while True:
            with self._changed:
                if not self._queue:
                    break
                entry = heapq.heappop(self._queue)
                asked = self._outstanding.get(entry[2])
            if asked is None:
                continue
            header, payloads = asked
            link, number = self._route(entry[2])
            if number in link.blocked:
                later.append(entry)
                continue
            socket = link.sockets[number]
            header = header._replace(rank=self.rank, session=link.sessions[number])
            try:
                socket.send_multipart([header.pack(), *payloads], zmq.NOBLOCK, copy=False)
                self.bytes_sent += wire.HEADER_BYTES + sum(memoryview(payload).nbytes for payload in payloads)
                if header.flags & wire.SHARED:
                    self.bytes_sent += 4 * header.count
            except zmq.Again:
                link.blocked.add(number)
                poller.register(socket, zmq.POLLIN | zmq.POLLOUT)
                later.append(entry)
        with self._changed:
            for entry in later:
                heapq.heappush(self._queue, entry)

    def _route(self, token: _Token) -> tuple[_Link, int]:
        """Sums go to server 0; everything about a block over the connection that its number gives."""
        if token.what == "sum":
            return self._links[0], 0
        if token.what in ("pause", "leave"):
            return self._links[token.key], 0
        link = self._links[self._blocks[token.key].server]
        return link, token.key % len(link.sockets)

    def _receive(self, link: _Link, socket: zmq.Socket) -> None:
        for _ in range(64):
            try:
                frames = socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            try:
                message = wire.parse([frame.buffer for frame in frames])
            except Refused as refusal:
                return self._fail(f"{self._name(link)} sent a message that is not acceptable: {refusal}")
            header = message.header
            self.bytes_received += sum(len(frame) for frame in frames) + (
                4 * header.count if header.flags & wire.SHARED else 0
            )
            if header.kind == Kind.PING:
                continue
            if header.kind in (Kind.ABORT, Kind.REFUSED):
                text = message.json()
                return self._fail(f"{self._name(link)}: {text.get('message') or 'refused: ' + str(text.get('reason'))}")
            match header.kind:
                case Kind.PAUSED | Kind.LEFT:
                    number = link.index
                case Kind.TOTAL:
                    number = header.step
                case _:
                    number = header.key
            token = _Token(_ANSWERS.get(header.kind, ""), number, header.offset)
            with self._changed:
                if self._outstanding.pop(token, None) is None:
                    continue  # asked again after a lost connection, answered twice
                self._answers[token] = (message, link, link.epoch, link.weights)
                self._changed.notify_all()

    def _name(self, link: _Link) -> str:
        return f"parameter server {link.index} ({link.endpoint})"

    # Connections

    def _closed(self, link: _Link) -> bool:
        for monitor in link.monitors:
            while monitor.poll(0):
                if recv_monitor_message(monitor)["event"] == zmq.EVENT_DISCONNECTED:
                    return True
        return False

    def _lost(self, link: _Link, what: str) -> None:
        """The server is gone: wait for its successor where there will be one, else stop."""
        left = {_Token("leave", link.index)} & set(self._outstanding)
        if not self.settings.restart_servers or left:
            if left:  # it ended while we were saying goodbye
                with self._changed:
                    token = left.pop()
                    self._outstanding.pop(token)
                    self._answers[token] = (Message(Header(Kind.LEFT), ()), link, link.epoch, None)
                    self._changed.notify_all()
                self._disconnect(link)
                link.heard = float("inf")
                return
            return self._fail(f"{self._name(link)} {what}")
        self._disconnect(link)
        self.reconnects += 1
        try:
            self._connect(link, time.monotonic() + self.settings.timeout_s, what)
        except ServerError as error:
            return self._fail(str(error))
        with self._changed:
            for token, (header, payloads) in list(self._outstanding.items()):
                if self._route(token)[0] is link:
                    if token.what == "update":
                        header = header._replace(version=self._version[token.key])
                    self._outstanding[token] = (header, payloads)
                    self._queued += 1
                    heapq.heappush(self._queue, (header.key, self._queued, token))

    def _disconnect(self, link: _Link) -> None:
        for monitor in link.monitors:
            monitor.close(linger=0)
        for socket in link.sockets:
            socket.disable_monitor()
            socket.close(linger=0)
        link.sockets, link.monitors, link.sessions = [], [], []
        link.blocked.clear()

    def _connect(self, link: _Link, deadline: float, before: str | None) -> None:
        """Find the server's address, prove who we are, and join; tries until the deadline."""
        trouble = "is not up (no address file)"
        while time.monotonic() < deadline and not self._stopping:
            address = placement.read_address(self._run_dir, link.index)
            if address is None:
                time.sleep(0.02)
                continue
            link.endpoint = nearest([str(e) for e in address["endpoints"]])  # type: ignore[attr-defined]
            trouble = "does not answer"
            link.attempts += 1
            for number in range(self._num_connections):
                if not self._open(link, number, min(deadline, time.monotonic() + 2.0)):
                    break
            else:
                if self._join(link, deadline):
                    return
            self._disconnect(link)
            time.sleep(0.05)
        was = f"{before}, and its successor " if before else ""
        raise ServerError(f"{self._name(link)} {was}{trouble} within {self.settings.timeout_s:g} s")

    def _open(self, link: _Link, number: int, deadline: float) -> bool:
        """One connection, up to WELCOME."""
        socket = self._context.socket(zmq.DEALER)
        link.sockets.append(socket)
        self._keys = self._keys or security.job_keys(self._run_dir)
        if self.settings.encrypted:
            socket.curve_serverkey = self._keys.server_public.encode()
            socket.curve_publickey, socket.curve_secretkey = (
                self._keys.worker_public.encode(),
                self._keys.worker_secret.encode(),
            )
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, 2)  # little room: what waits here can still be overtaken
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.setsockopt(zmq.MAXMSGSIZE, 64 << 20)
        socket.setsockopt(zmq.RECONNECT_IVL, 50)
        heartbeat = int(min(_SILENCE_S, self.settings.timeout_s) * 1000)
        socket.setsockopt(zmq.HEARTBEAT_IVL, max(heartbeat // 4, 1))
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, heartbeat)
        socket.connect(link.endpoint)
        nonce = security.nonce()
        hello = {
            "rank": self.rank, "workers": self.settings.workers, "connection": number, "incarnation": self._incarnation,
            "nonce": nonce, "attempt": link.attempts,
        }  # fmt: skip
        socket.send_multipart([Header(Kind.HELLO).pack(), wire.to_json(hello)])
        message = self._next(link, socket, deadline)
        if message and message.header.kind == Kind.CHALLENGE:
            value = message.json()
            theirs = value.get("nonce")
            if not isinstance(theirs, str) or not security.same(
                value.get("proof"), self._keys.proof("server", nonce, theirs)
            ):
                raise ServerError(f"{self._name(link)} does not hold the job's key")
            proof = {"proof": self._keys.proof(f"worker {self.rank}", nonce, theirs)}
            socket.send_multipart([Header(Kind.PROOF, rank=self.rank).pack(), wire.to_json(proof)])
            message = self._next(link, socket, deadline)
        if not message or message.header.kind != Kind.WELCOME:
            return False
        link.sessions.append(message.header.session)
        return True

    def _join(self, link: _Link, deadline: float) -> bool:
        setup = {
            "blocks": [to_json(block) for block in link.blocks],
            "optimizer": self._optimizer,
            "gradients": link.gradients.handle() if link.gradients else None,
            "step": self.step if link.epoch else None,
        }
        header = Header(Kind.SETUP, rank=self.rank, session=link.sessions[0])
        link.sockets[0].send_multipart([header.pack(), wire.to_json(setup)])
        message = self._next(link, link.sockets[0], deadline)
        if message is None or message.header.kind != Kind.READY:
            return False
        ready = message.json()
        was_shared, link.shared = link.shared, False
        if ready.get("weights") is not None:
            try:
                link.weights = Slab.open(ready["weights"], link.elements, len(link.blocks))
                link.shared = True
            except (ValueError, OSError) as error:
                raise ServerError(f"{self._name(link)}: its shared memory cannot be mapped: {error}") from None
        if link.epoch and was_shared != link.shared:
            raise ServerError(f"{self._name(link)} came back without shared memory")
        for key_text, version in ready.get("versions", {}).items():
            self._version[int(key_text)] = int(version)
        if link.epoch == 0:
            self.step = max(self.step, int(ready["step"]))
            self.initialised = (
                bool(ready["initialised"]) if link.index == 0 else self.initialised and bool(ready["initialised"])
            )
            if link.index == 0:
                self._sum_number = int(ready["sum"])
        elif not ready.get("initialised"):
            raise ServerError(f"{self._name(link)} came back without weights: it had no snapshot yet")
        link.epoch += 1
        link.heard = time.monotonic()
        link.monitors = [socket.get_monitor_socket(zmq.EVENT_DISCONNECTED) for socket in link.sockets]
        return True

    def _next(self, link: _Link, socket: zmq.Socket, deadline: float) -> Message | None:
        """The next message that is not a sign of life; None at the deadline. Raises ``ServerError`` for a refusal."""
        while socket.poll(max(0.0, deadline - time.monotonic()) * 1000):
            try:
                message = wire.parse([frame.buffer for frame in socket.recv_multipart(copy=False)])
                if message.header.kind in (Kind.REFUSED, Kind.ABORT):
                    text = message.json()
                    raise ServerError(
                        f"{self._name(link)}: {text.get('message') or 'refused: ' + str(text.get('reason'))}"
                    )
            except Refused as refusal:
                raise ServerError(f"{self._name(link)} sent a message that is not acceptable: {refusal}") from None
            if message.header.kind != Kind.PING:
                return message
        return None


def nearest(endpoints: list[str]) -> str:
    """Of a server's addresses the one in a network of ours; loopback only when there is no other."""
    if len(endpoints) == 1:
        return endpoints[0]
    networks = [
        ipaddress.ip_network(f"{entry.address}/{entry.netmask}", strict=False)
        for entries in psutil.net_if_addrs().values()
        for entry in entries
        if entry.family.name == "AF_INET" and entry.netmask and not entry.address.startswith("127.")
    ]
    for endpoint in endpoints:
        host = endpoint.removeprefix("tcp://").rpartition(":")[0]
        if any(ipaddress.ip_address(host) in network for network in networks):
            return endpoint
    return endpoints[0]

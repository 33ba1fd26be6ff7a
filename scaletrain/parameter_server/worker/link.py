"""A worker's connections to one server: finding it, joining it, and noticing its end."""

import ipaddress
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import psutil
import zmq
from zmq.utils.monitor import recv_monitor_message

from scaletrain.parameter_server.protocol import placement, security, tcp, wire
from scaletrain.parameter_server.protocol.channel import Channel, Handshake, Subject
from scaletrain.parameter_server.protocol.memory import SUPPORTED, Slab
from scaletrain.parameter_server.protocol.settings import Settings
from scaletrain.parameter_server.protocol.sharding import Block, layout, to_json
from scaletrain.parameter_server.protocol.wire import (
    Dtype,
    Header,
    Message,
    MessageKind,
    Refused,
)
from scaletrain.parameter_server.worker.requests import PeerLost, ServerError, Token
from scaletrain.run.job_key import JobKey, job_key

_LOOK_S = 0.1  # between two looks for another address, while no answer comes
_PROBE_BYTES = (1 << 14, 1 << 16, 1 << 18, 1 << 20, 1 << 22)  # one after the other
_PROBE_ROUNDS = 2  # of each size; the faster one counts
_PROBE_S = 0.02  # a link that is slower than this with some size need not try a larger one
_ANSWER_S = 2.0  # the longest wait for one answer of a handshake, before all is tried again


_T = TypeVar("_T")


class Identity(NamedTuple):
    """The facts about the worker that connects: the same for all servers of a job."""

    settings: Settings
    run_dir: Path
    rank: int
    optimizer: dict[str, Any]  # ``optimizer.describe``
    # A random number. A server that sees another one knows that the worker was started again.
    incarnation: int
    context: zmq.Context

    @classmethod
    def make(
        cls, settings: Settings, run_dir: Path, rank: int, optimizer: dict[str, Any]
    ) -> "Identity":
        """Return the identity of a worker that starts, with a ZeroMQ context of its own."""
        incarnation = secrets.randbits(62) | 1
        context = zmq.Context(io_threads=settings.io_threads)
        return cls(settings, run_dir, rank, optimizer, incarnation, context)


class Ready(NamedTuple):
    """A server's answer to a worker that joins."""

    versions: dict[int, int]  # updates of each of its blocks so far, by key
    initialised: bool  # whether its blocks have weights
    step: int  # of the job, with which the worker begins
    met_step: int  # of the job, at which the workers last met for a sum; -1: never
    weights: dict[str, Any] | None  # the handle of its slab; None: no shared memory

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Ready":
        """Return the payload of READY."""
        versions = {int(key): int(version) for key, version in value.get("versions", {}).items()}
        return cls(
            versions=versions,
            initialised=bool(value.get("initialised")),
            step=int(value["step"]),
            met_step=int(value["met"]),
            weights=value.get("weights"),
        )


class ServerLink:
    """Server ``index``, as a worker sees it.

    One thread at a time uses it: first the thread that makes the ``Client``, from then on the I/O
    thread. The training thread only reads the attributes marked *.

    Attributes:
        index*: the server's number.
        blocks: the blocks that it owns.
        starts*: first element of each dense block in the slabs, by key.
        sequence_index*: place of each block in ``Slab.sequence``, by key.
        gradients*: this worker's gradients, in shared memory; None without.
        weights: the server's weights, in shared memory; None without.
        shared*: whether gradients and weights lie in shared memory.
        epoch*: connections made so far. An answer of an older one carries an outdated version.
        sockets: one for each connection.
        monitors: for each socket, the one that tells of its end.
        sessions: for each socket, the number that the server gave it.
        channels: for each socket, its encryption; None: ZeroMQ's, or none.
        descriptors: by the number of a socket, the kernel's of its connection.
        blocked: numbers of the connections whose queue is full.
        answered_steps: by block, the last step whose gradient was answered.
        under_way: pushes that were sent and not answered yet.
        heard_at: time of the server's last sign of life (``time.monotonic``); infinite once it has
            said goodbye.
        live_workers*: how many workers live, by the server's last sign of life.
    """

    def __init__(self, identity: Identity, index: int, blocks: list[Block]):
        self._identity = identity
        self.index = index
        self.blocks = blocks
        self.starts, self._slab_elements = layout(blocks)
        keys = sorted(block.key for block in blocks)
        self.sequence_index = {key: place for place, key in enumerate(keys)}
        self.gradients: Slab | None = None
        if identity.settings.shared_memory and SUPPORTED:
            self.gradients = Slab.create(self._slab_elements, len(blocks))
        self.weights: Slab | None = None
        self.shared = False
        self.epoch = 0
        self.sockets: list[zmq.Socket] = []
        self.monitors: list[zmq.Socket] = []
        self.sessions: list[int] = []
        self.channels: list[Channel | None] = []
        self.descriptors: dict[int, int] = {}
        self.blocked: set[int] = set()
        self.answered_steps: dict[int, int] = {}
        self.under_way: set[Token] = set()
        self.heard_at = time.monotonic()
        self.live_workers = 0
        self._had_weights = False  # when this worker last joined
        self._attempts = 0  # to connect; the server tells by it which sockets are outdated
        self._endpoint = "not found yet"
        self._trouble = ""  # why the last attempt to connect has failed
        self._address: dict[str, object] = {}  # that the server wrote, with its process id

    def __str__(self) -> str:
        return f"parameter server {self.index} ({self._endpoint})"

    # Connecting

    def connect(
        self,
        deadline: float,
        step: int | None,
        lost_because: str | None = None,
        is_stopping: Callable[[], bool] = lambda: False,
    ) -> Ready:
        """Find the server, prove that this worker belongs to the job, and join.

        Args:
            deadline: ``time.monotonic`` of the end of all trying.
            step: of the job, if this worker was connected before. None: the server says where to
                begin.
            lost_because: the fate of the connection before, for the error message.
            is_stopping: return True to give up early.

        Raises:
            ServerError: the server cannot be reached, refuses, lacks the job's key, or came back
                without weights.
        """
        return self._reach(deadline, lambda: self._join(deadline, step), lost_because, is_stopping)

    def measure(self, deadline: float, seconds: float) -> float | None:
        """Send bytes to the server and back, without joining, and close all connections.

        Messages grow until one takes ``_PROBE_S``, so that a fast link is measured with large ones
        and a slow one is not kept busy.

        Args:
            deadline: ``time.monotonic`` of the end of all trying to reach the server.
            seconds: that the measurement itself takes at most.

        Returns:
            Seconds that a byte takes there and back; None: no message came back in time.

        Raises:
            ServerError: the server cannot be reached, or refuses.
        """
        try:
            rates = self._reach(deadline, lambda: self._probe(time.monotonic() + seconds))
        finally:
            self.disconnect()
        return min(rates, default=None)

    def _probe(self, deadline: float) -> list[float]:
        """Return the seconds a byte of the largest messages that came back; none if none did."""
        rates: list[float] = []
        for num_bytes in _PROBE_BYTES:
            header = Header(
                MessageKind.PROBE,
                Dtype.UINT8,
                rank=self._identity.rank,
                session=self.sessions[0],
                count=num_bytes,
            )
            times = []
            for _ in range(_PROBE_ROUNDS):
                began = time.monotonic()
                self.send(0, [header.pack(), bytes(num_bytes)])
                if self._next(0, deadline) is None:
                    return rates
                times.append(time.monotonic() - began)
            rates = [each / num_bytes for each in times]
            if min(times) > _PROBE_S:
                break
        return rates

    def _reach(
        self,
        deadline: float,
        attempt: Callable[[], _T | None],
        lost_because: str | None = None,
        is_stopping: Callable[[], bool] = lambda: False,
    ) -> _T:
        """Open all connections to the server; return the result of ``attempt`` over them.

        1. Read the server's address from its file in the run directory.
        2. Open all connections, each up to its session (``_open``).
        3. Call ``attempt``. None is a failure.

        Whatever fails is tried again from step 1 until the deadline: the server may still be
        starting, and a successor has another address.

        Raises:
            ServerError: the server cannot be reached, or does not hold the job's key; or by
                ``attempt``.
        """
        self._trouble = "is not up (no address file)"
        while time.monotonic() < deadline and not is_stopping():
            address = placement.read_address(self._identity.run_dir, self.index)
            if address is None:
                time.sleep(0.02)
                continue
            self._address = address
            endpoints = [str(endpoint) for endpoint in address["endpoints"]]  # type: ignore[attr-defined]
            self._endpoint = nearest(endpoints)
            self._trouble = "does not answer"
            self._attempts += 1
            if self._open_all(deadline):
                result = attempt()
                if result is not None:
                    return result
            self.disconnect()
            time.sleep(0.05)
        history = f"{lost_because}, and its successor " if lost_because else ""
        raise ServerError(f"{self} {history}{self._trouble} in time")

    def _open_all(self, deadline: float) -> bool:
        """Open all connections; return False at the first that fails."""
        for number in range(self._identity.settings.num_connections):
            answer_by = min(deadline, time.monotonic() + _ANSWER_S)
            if not self._open(number, answer_by):
                return False
        return True

    def _open(self, number: int, deadline: float) -> bool:
        """Open one connection; return False if the server has not answered by the deadline.

        1. HELLO names the worker and the connection.
        2. With ``aes`` and ``trusted_network`` the server answers CHALLENGE, which proves that it
           holds the job's key. PROOF proves the same of the worker. Otherwise CurveZMQ or the
           directory of the Unix socket has made sure of both.
        3. WELCOME holds the session, which every later message names.

        Raises:
            ServerError: the server refuses.
        """
        identity = self._identity
        key = job_key(identity.run_dir)
        socket = self._make_socket(key)
        self.sockets.append(socket)
        socket.connect(self._endpoint)
        self.channels.append(None)
        handshake = Handshake()
        hello = {
            "rank": identity.rank,
            "workers": identity.settings.workers,
            "connection": number,
            "incarnation": identity.incarnation,
            "public": handshake.public,
            "attempt": self._attempts,
        }
        # Without waiting: ZeroMQ has no room for it if the server has turned this key away by now.
        if not self.send(number, [Header(MessageKind.HELLO).pack(), wire.to_json(hello)]):
            return False
        message = self._next(number, deadline)
        if message is not None and message.header.kind == MessageKind.CHALLENGE:
            if not self._answer_challenge(message, key, number, handshake):
                return False
            message = self._next(number, deadline)
        if message is None or message.header.kind != MessageKind.WELCOME:
            return False
        # The address may be outdated, and another server of the job may have the port by now.
        if message.json().get("server") != self.index:
            return False
        self.sessions.append(message.header.session)
        # Before READY: a server that ends right after it is missed otherwise.
        self.monitors.append(socket.get_monitor_socket(zmq.EVENT_DISCONNECTED))
        return True

    def _make_socket(self, key: JobKey) -> zmq.Socket:
        """Return a socket with all its options, not connected yet."""
        settings = self._identity.settings
        socket = self._identity.context.socket(zmq.DEALER)
        if settings.cipher == "curve":
            security.encrypt_worker(socket, security.CurveKeys.of(key))
        elif not settings.on_one_host:
            security.pass_gate(socket, key)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDBUF, settings.send_buffer_bytes)
        # Little room in ZeroMQ: a request that still waits here can be overtaken by a later one.
        socket.setsockopt(zmq.SNDHWM, 2)
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_MESSAGE_BYTES)
        socket.setsockopt(zmq.RECONNECT_IVL, 50)
        tcp.keep_alive(socket, settings.unanswered_s)
        return socket

    def _answer_challenge(
        self, message: Message, key: JobKey, number: int, handshake: Handshake
    ) -> bool:
        """Check the server's proof, send the worker's, and encrypt from now on.

        Returns:
            False if the proof is wrong. The address may be outdated: another server of this job, or
            of another one, has the port by now.
        """
        identity = self._identity
        challenge = message.json()
        subject = Subject(self.index, identity.rank, number, identity.incarnation)
        theirs = challenge.get("public")
        self._trouble = "does not hold the job's key"
        if not isinstance(theirs, str):
            return False
        expected = handshake.proof("server", key, subject, theirs)
        if not security.same(challenge.get("proof"), expected):
            return False
        self._trouble = "does not answer"
        proof = handshake.proof("worker", key, subject, theirs)
        header = Header(MessageKind.PROOF, rank=identity.rank)
        self.send(number, [header.pack(), wire.to_json({"proof": proof})])
        if identity.settings.cipher == "aes":
            self.channels[number] = handshake.channel("worker", key, subject, theirs)
        return True

    def _join(self, deadline: float, step: int | None) -> Ready | None:
        """Describe the model and the optimizer; return the server's answer, None if it has none.

        Raises:
            ServerError: the server refuses, its memory cannot be mapped, or it came back without
                weights or without shared memory.
        """
        setup = {
            "blocks": [to_json(block) for block in self.blocks],
            "optimizer": self._identity.optimizer,
            "gradients": self.gradients.handle() if self.gradients else None,
            "step": step,
            "answered": {str(key): done for key, done in self.answered_steps.items()},
        }
        header = Header(MessageKind.SETUP, rank=self._identity.rank, session=self.sessions[0])
        if not self.send(0, [header.pack(), wire.to_json(setup)]):
            return None
        message = self._next(0, deadline)
        if message is None or message.header.kind != MessageKind.READY:
            return None
        ready = Ready.from_json(message.json())
        was_shared = self.shared
        self.shared = ready.weights is not None
        if self.shared:
            self.weights = self._map_weights(ready.weights)
        is_successor = self.epoch > 0
        # Pushes that are to be sent again say in their header where the gradient lies.
        if is_successor and was_shared != self.shared:
            raise ServerError(f"{self} came back without shared memory")
        if self._had_weights and not ready.initialised:
            raise ServerError(f"{self} came back without weights: its snapshot is gone")
        self._had_weights = ready.initialised
        self.epoch += 1
        self.heard_at = time.monotonic()
        return ready

    def _map_weights(self, handle: dict[str, Any] | None) -> Slab:
        """Map the server's weights. Raises ``ServerError``."""
        try:
            return Slab.open(handle, self._slab_elements, len(self.blocks))
        except (ValueError, OSError) as error:
            raise ServerError(f"{self}: its shared memory cannot be mapped: {error}") from None

    def _next(self, number: int, deadline: float) -> Message | None:
        """Return the next message of a connection that is no sign of life.

        None at the deadline, or once the server's successor has written another address.

        Raises:
            ServerError: the message is a refusal.
        """
        socket = self.sockets[number]
        while time.monotonic() < deadline:
            left_s = max(0.0, deadline - time.monotonic())
            if socket.poll(int(min(_LOOK_S, left_s) * 1000)):
                frames = socket.recv_multipart(copy=False)
                self.descriptors[number] = int(frames[0].get(zmq.SRCFD))
                message = self.parse(number, frames)
                if message is not None:
                    return message
            elif placement.read_address(self._identity.run_dir, self.index) != self._address:
                return None
        return None

    # Connected

    def send(self, number: int, frames: list[Any]) -> bool:
        """Send a message over a connection without waiting; return False if there is no room.

        The frames are not copied, unless they are encrypted.
        """
        socket = self.sockets[number]
        channel = self.channels[number]
        if channel is not None:
            # A message that was sealed has to leave, so there must be room before.
            if not int(socket.getsockopt(zmq.EVENTS)) & zmq.POLLOUT:
                return False
            frames = channel.seal(frames)
        try:
            socket.send_multipart(frames, zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return False
        return True

    def parse(self, number: int, frames: list[zmq.Frame]) -> Message | None:
        """Return a message of this server; None for a sign of life.

        Args:
            number: of the connection.
            frames: of the message.

        Raises:
            PeerLost: the server says that training cannot go on without a lost worker.
            ServerError: the server refuses a request, or its message is not acceptable.
        """
        try:
            buffers = [frame.buffer for frame in frames]
            channel = self.channels[number]
            if channel is not None:
                buffers = channel.open(buffers)
            message = wire.parse(buffers)
            if message.header.kind == MessageKind.PING:
                self.live_workers = message.header.count
                return None
            if message.header.kind not in (MessageKind.REFUSED, MessageKind.ABORT):
                return message
            complaint = message.json()
        except Refused as refusal:
            raise ServerError(f"{self} sent a message that is not acceptable: {refusal}") from None
        text = complaint.get("message") or f"refused: {complaint.get('reason')}"
        if message.header.kind == MessageKind.ABORT:
            raise PeerLost(f"{self}: {text}")
        raise ServerError(f"{self}: {text}")

    def may_push(self, token: Token) -> bool:
        """Return True if a gradient may leave now, False if weights have to come first.

        The limit is ``Settings.blocks_ahead``. It counts the pushes under way of those blocks that
        the next forward needs before this one. Every worker prefers the same blocks, so the first
        block that lacks a gradient never waits here, and no worker can wait for ever.
        """
        limit = self._identity.settings.blocks_ahead
        if limit is None or self.shared:
            return True
        earlier = [sent for sent in self.under_way if sent.key < token.key]
        return len(earlier) < limit

    def is_closed(self) -> bool:
        """Return True if the other end has closed a connection."""
        for monitor in self.monitors:
            while monitor.poll(0):
                if recv_monitor_message(monitor)["event"] == zmq.EVENT_DISCONNECTED:
                    return True
        return False

    def unanswered_s(self) -> float:
        """Return for how long the server's host has left this one unanswered, in seconds."""
        return max(map(tcp.unanswered_s, self.descriptors.values()), default=0.0)

    def disconnect(self) -> None:
        """Close all sockets at once; unsent messages are lost."""
        # 1. ZeroMQ tells a monitor of its end, and waits without limit (and with Python's lock) for
        #    room in its queue. A monitor that is still open has room.
        for socket in self.sockets:
            socket.disable_monitor()
        # 2. Nothing writes to the monitors any more.
        for monitor in self.monitors:
            monitor.close(linger=0)
        for socket in self.sockets:
            socket.close(linger=0)
        self.sockets = []
        self.monitors = []
        self.sessions = []
        self.channels = []
        self.descriptors = {}
        self.blocked.clear()
        self.under_way.clear()


def nearest(endpoints: list[str]) -> str:
    """Return the address of a server that lies in one of this host's networks.

    Args:
        endpoints: ``tcp://HOST:PORT`` with IPv4 addresses, loopback last, or one Unix socket.

    Returns:
        The first one in a network other than loopback; else simply the first.
    """
    if len(endpoints) == 1:
        return endpoints[0]
    networks = _networks()
    for endpoint in endpoints:
        host = endpoint.removeprefix("tcp://").rpartition(":")[0]
        address = ipaddress.ip_address(host)
        if any(address in network for network in networks):
            return endpoint
    return endpoints[0]


def _networks() -> list[ipaddress.IPv4Network]:
    """Return the IPv4 networks of this host's interfaces, without loopback."""
    networks = []
    for entries in psutil.net_if_addrs().values():
        for entry in entries:
            if entry.family.name != "AF_INET" or not entry.netmask:
                continue
            if not entry.address.startswith("127."):
                interface = ipaddress.IPv4Interface(f"{entry.address}/{entry.netmask}")
                networks.append(interface.network)
    return networks

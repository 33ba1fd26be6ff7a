"""A worker's connections to one server: finding it, proving who we are, joining, and noticing that it is gone."""

import ipaddress
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import zmq
from zmq.utils.monitor import recv_monitor_message

from scaletrain.parameter_server.protocol import placement, security, wire
from scaletrain.parameter_server.protocol.memory import SUPPORTED, Slab
from scaletrain.parameter_server.protocol.settings import Settings
from scaletrain.parameter_server.protocol.sharding import Block, layout, to_json
from scaletrain.parameter_server.protocol.wire import Header, Kind, Message, Refused
from scaletrain.parameter_server.worker.requests import PeerLost, ServerError, Token

_ANSWER_S = 2.0  # of a handshake, before it is tried again


class Identity(NamedTuple):
    """Who connects: the same for all servers of a job."""

    settings: Settings
    run_dir: Path
    rank: int
    optimizer: dict[str, Any]
    incarnation: int
    context: zmq.Context

    @classmethod
    def make(
        cls, settings: Settings, run_dir: Path, rank: int, optimizer: dict[str, Any]
    ) -> "Identity":
        context = zmq.Context(io_threads=settings.io_threads)
        return cls(settings, run_dir, rank, optimizer, secrets.randbits(62) | 1, context)


class Link:
    """Server ``index``, as a worker sees it. Used by one thread at a time.

    Attributes:
        shared: gradients and weights lie in shared memory.
        epoch: connections made; an answer of an older one has an old version.
        blocked: sockets whose queue is full.
        under_way: pushes that were sent and not answered yet.
        heard: when the server gave its last sign of life (monotonic).
    """

    def __init__(self, identity: Identity, index: int, blocks: list[Block]):
        self._identity, self.index, self.blocks = identity, index, blocks
        self.starts, self._elements = layout(blocks)
        self.place = {key: place for place, key in enumerate(sorted(block.key for block in blocks))}
        share = identity.settings.shared_memory and SUPPORTED
        self.gradients = Slab.create(self._elements, len(blocks)) if share else None
        self.weights: Slab | None = None
        self.shared = False
        self.epoch = 0
        self.blocked: set[int] = set()
        self.under_way: set[Token] = set()
        self.heard = time.monotonic()
        self.live = 0  # workers, by the last sign of life
        self.sockets: list[zmq.Socket] = []
        self.monitors: list[zmq.Socket] = []
        self.sessions: list[int] = []
        self._attempts = 0
        self._endpoint = "not found yet"

    def __str__(self) -> str:
        return f"parameter server {self.index} ({self._endpoint})"

    def connect(
        self,
        deadline: float,
        step: int | None,
        before: str | None = None,
        given_up: Callable[[], bool] = lambda: False,
    ) -> dict[str, Any]:
        """Find the server's address, prove who we are, and join; tries until the deadline.

        Args:
            step: of the job, when this worker was here before; None: the server says where to begin.
            before: what became of the connection before.

        Returns:
            What the server says of itself: ``versions`` of its blocks, ``initialised``, the ``step`` to begin with, the next ``sum``.

        Raises:
            ServerError: it cannot be reached, refuses, is not the job's, or came back without weights.
        """
        timeout_s, trouble = self._identity.settings.timeout_s, "is not up (no address file)"
        while time.monotonic() < deadline and not given_up():
            address = placement.read_address(self._identity.run_dir, self.index)
            if address is None:
                time.sleep(0.02)
                continue
            self._endpoint = nearest([str(e) for e in address["endpoints"]])  # type: ignore[attr-defined]
            trouble = "does not answer"
            self._attempts += 1
            numbers = range(self._identity.settings.num_connections)
            if all(
                self._open(number, min(deadline, time.monotonic() + _ANSWER_S))
                for number in numbers
            ):
                ready = self._join(deadline, step)
                if ready is not None:
                    return ready
            self.disconnect()
            time.sleep(0.05)
        was = f"{before}, and its successor " if before else ""
        raise ServerError(f"{self} {was}{trouble} within {timeout_s:g} s")

    def _open(self, number: int, deadline: float) -> bool:
        """One connection, up to WELCOME."""
        made, rank = self._identity.settings, self._identity.rank
        socket = self._identity.context.socket(zmq.DEALER)
        self.sockets.append(socket)
        keys = security.job_keys(self._identity.run_dir)
        if made.encrypted:
            socket.curve_serverkey = keys.server_public.encode()
            socket.curve_publickey, socket.curve_secretkey = (
                keys.worker_public.encode(),
                keys.worker_secret.encode(),
            )
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDBUF, made.send_buffer_bytes)
        socket.setsockopt(zmq.SNDHWM, 2)  # little room: what waits here can still be overtaken
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_MESSAGE_BYTES)
        socket.setsockopt(zmq.RECONNECT_IVL, 50)
        socket.setsockopt(zmq.HEARTBEAT_IVL, made.heartbeat_ms // 4)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, made.heartbeat_ms)
        socket.connect(self._endpoint)
        nonce = security.nonce()
        hello = {
            "rank": rank, "workers": made.workers, "connection": number, "incarnation": self._identity.incarnation,
            "nonce": nonce, "attempt": self._attempts,
        }  # fmt: skip
        socket.send_multipart([Header(Kind.HELLO).pack(), wire.to_json(hello)])
        message = self._next(socket, deadline)
        if message and message.header.kind == Kind.CHALLENGE:
            value = message.json()
            theirs = value.get("nonce")
            if not isinstance(theirs, str) or not security.same(
                value.get("proof"), keys.proof("server", nonce, theirs)
            ):
                raise ServerError(f"{self} does not hold the job's key")
            proof = {"proof": keys.proof(f"worker {rank}", nonce, theirs)}
            socket.send_multipart([Header(Kind.PROOF, rank=rank).pack(), wire.to_json(proof)])
            message = self._next(socket, deadline)
        if not message or message.header.kind != Kind.WELCOME:
            return False
        self.sessions.append(message.header.session)
        return True

    def _join(self, deadline: float, step: int | None) -> dict[str, Any] | None:
        setup = {
            "blocks": [to_json(block) for block in self.blocks],
            "optimizer": self._identity.optimizer,
            "gradients": self.gradients.handle() if self.gradients else None,
            "step": step,
        }
        header = Header(Kind.SETUP, rank=self._identity.rank, session=self.sessions[0])
        self.sockets[0].send_multipart([header.pack(), wire.to_json(setup)])
        message = self._next(self.sockets[0], deadline)
        if message is None or message.header.kind != Kind.READY:
            return None
        ready = message.json()
        was_shared, self.shared = self.shared, False
        if ready.get("weights") is not None:
            try:
                self.weights = Slab.open(ready["weights"], self._elements, len(self.blocks))
                self.shared = True
            except (ValueError, OSError) as error:
                raise ServerError(f"{self}: its shared memory cannot be mapped: {error}") from None
        if self.epoch and was_shared != self.shared:
            raise ServerError(f"{self} came back without shared memory")
        if self.epoch and not ready.get("initialised"):
            raise ServerError(f"{self} came back without weights: it had no snapshot yet")
        self.epoch += 1
        self.heard = time.monotonic()
        self.monitors = [
            socket.get_monitor_socket(zmq.EVENT_DISCONNECTED) for socket in self.sockets
        ]
        return ready

    def _next(self, socket: zmq.Socket, deadline: float) -> Message | None:
        """The next message that is not a sign of life; None at the deadline. Raises ``ServerError`` for a refusal."""
        while socket.poll(max(0.0, deadline - time.monotonic()) * 1000):
            message = self.parse(socket.recv_multipart(copy=False))
            if message is not None:
                return message
        return None

    def parse(self, frames: list[zmq.Frame]) -> Message | None:
        """A message of this server; None for a sign of life. Raises ``ServerError`` when it refuses, aborts or talks rubbish."""
        try:
            message = wire.parse([frame.buffer for frame in frames])
            if message.header.kind == Kind.PING:
                self.live = message.header.count
                return None
            if message.header.kind not in (Kind.REFUSED, Kind.ABORT):
                return message
            text, kind = (
                message.json(),
                PeerLost if message.header.kind == Kind.ABORT else ServerError,
            )
        except Refused as refusal:
            raise ServerError(f"{self} sent a message that is not acceptable: {refusal}") from None
        raise kind(f"{self}: {text.get('message') or 'refused: ' + str(text.get('reason'))}")

    def may_push(self, token: Token) -> bool:
        """Whether a gradient may leave now, or has to wait for weights first (``Settings.blocks_ahead``).

        What counts is under way of the blocks that the next forward needs before this one. They come first at every worker, so that the
        first block that lacks a gradient never waits here, and nobody can wait for ever.
        """
        ahead = self._identity.settings.blocks_ahead
        return (
            ahead is None
            or self.shared
            or sum(sent.key < token.key for sent in self.under_way) < ahead
        )

    def closed(self) -> bool:
        """Whether the other end has closed a connection."""
        for monitor in self.monitors:
            while monitor.poll(0):
                if recv_monitor_message(monitor)["event"] == zmq.EVENT_DISCONNECTED:
                    return True
        return False

    def disconnect(self) -> None:
        for monitor in self.monitors:
            monitor.close(linger=0)
        for socket in self.sockets:
            socket.disable_monitor()
            socket.close(linger=0)
        self.sockets, self.monitors, self.sessions = [], [], []
        self.blocked.clear()
        self.under_way.clear()


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

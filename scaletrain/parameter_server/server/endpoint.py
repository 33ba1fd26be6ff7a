"""A server's end of all connections: who may talk to it, which of them belong to which worker, what is refused.

One thread uses it; ZeroMQ's own threads do the input and output. Nothing that a peer sends raises here: what is not acceptable is refused,
counted and logged.
"""

import contextlib
import logging
import os
import secrets
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import zmq
import zmq.utils.z85
from zmq.auth.thread import ThreadAuthenticator

from scaletrain.parameter_server.protocol import placement, security, wire
from scaletrain.parameter_server.protocol.settings import Settings
from scaletrain.parameter_server.protocol.wire import Header, Kind, Message, Refused
from scaletrain.run.atomic import write_json

log = logging.getLogger(__name__)

_FRAMES = 3  # most frames of a message
_DRAIN = 64  # messages between two looks at the clock


@dataclass
class Peer:
    """One connection."""

    route: bytes
    rank: int = -1
    connection: int = 0
    session: int = 0  # 0: not admitted yet
    incarnation: int = 0
    attempt: int = 0
    nonces: tuple[str, str] = ("", "")


@dataclass
class _Rank:
    """One worker's connections."""

    incarnation: int
    attempt: int = 0  # of its connecting; messages of earlier ones may be read late
    routes: dict[int, bytes] = field(default_factory=dict)
    heard: float = 0.0  # monotonic


class Endpoint:
    """Server ``index``'s socket.

    Args:
        handle: called with every message of an admitted worker; raises ``Refused`` for what it does not accept.
        came: called with a rank that comes for the first time, or as another process than before.
        closed: called with a rank whose connection is gone.
    """

    def __init__(
        self,
        settings: Settings,
        run_dir: Path,
        index: int,
        handle: Callable[[Peer, Message], None],
        came: Callable[[int], None],
        closed: Callable[[int], None],
    ):
        self._settings, self._run_dir, self._index = settings, run_dir, index
        self._handle, self._came, self._closed = handle, came, closed
        self._context = zmq.Context(io_threads=settings.io_threads)
        self._authenticator: ThreadAuthenticator | None = None
        self._peers: dict[bytes, Peer] = {}
        self._given_up: dict[bytes, str] = {}  # connections of lost workers, and why
        self._ranks: dict[int, _Rank] = {}
        self._endpoints: list[str] = []
        self._logged: dict[str, float] = {}
        self.refused: Counter[str] = Counter()

    def open(self) -> None:
        """Listen, and say where in the run directory."""
        if self._settings.encrypted:
            self._authenticator = ThreadAuthenticator(self._context)
            self._authenticator.start()
        self._socket = socket = self._context.socket(zmq.ROUTER)
        self._poller = zmq.Poller()
        self._poller.register(socket, zmq.POLLIN)
        socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_MESSAGE_BYTES)
        socket.setsockopt(
            zmq.ROUTER_MANDATORY, 1
        )  # a send to a closed connection is an error, not a silent loss
        socket.setsockopt(
            zmq.SNDHWM, 0
        )  # answers are bounded by the protocol: one a block and worker
        socket.setsockopt(
            zmq.RCVHWM, 4
        )  # of each worker: gradients that wait are the server's memory
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.HANDSHAKE_IVL, 5000)
        socket.setsockopt(zmq.HEARTBEAT_IVL, self._settings.heartbeat_ms // 4)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, self._settings.heartbeat_ms)
        self._keys = keys = security.job_keys(self._run_dir)
        if self._authenticator:
            self._authenticator.configure_curve_callback(
                domain="*", credentials_provider=_OneKey(keys.worker_public)
            )
            socket.curve_server = True
            socket.curve_publickey, socket.curve_secretkey = (
                keys.server_public.encode(),
                keys.server_secret.encode(),
            )
        self._endpoints = self._bind(socket)
        address = {
            "endpoints": self._endpoints,
            "host": os.uname().nodename,
            "pid": os.getpid(),
            "time": time.time(),
        }
        write_json(placement.address_path(self._run_dir, self._index), address)

    def _bind(self, socket: zmq.Socket) -> list[str]:
        if self._settings.on_one_host:
            path = placement.socket_path(self._run_dir, self._index)
            path.unlink(missing_ok=True)
            mask = os.umask(0o177)
            try:
                socket.bind(f"ipc://{path}")
            finally:
                os.umask(mask)
            return [f"ipc://{path}"]
        if not self._settings.encrypted:
            log.warning(
                "server %d: security: trusted_network: peers are authenticated, data is NOT encrypted",
                self._index,
            )
        hosts = ["127.0.0.1"] if self._settings.hosts == 1 else _addresses()
        port = socket.bind_to_random_port(f"tcp://{hosts[0] if self._settings.hosts == 1 else '*'}")
        return [f"tcp://{host}:{port}" for host in hosts]

    def close(self) -> None:
        """Leave nothing behind: neither address nor socket nor the job's keys, which nobody needs after its servers."""
        self._socket.close(linger=1000)
        if self._authenticator:
            self._authenticator.stop()
        self._context.term()
        placement.address_path(self._run_dir, self._index).unlink(missing_ok=True)
        security.forget(self._run_dir)
        for endpoint in self._endpoints:
            if endpoint.startswith("ipc://"):
                path = Path(endpoint.removeprefix("ipc://"))
                path.unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # other servers' sockets are still there
                    path.parent.rmdir()

    # Receiving

    def serve(self, seconds: float) -> None:
        """Handle what comes within ``seconds``, or some of it."""
        if not self._poller.poll(max(0.0, seconds) * 1000):
            return
        for _ in range(_DRAIN):
            try:
                route, frames, complete = self._receive()
            except zmq.Again:
                return
            peer = self._peers.get(route)
            try:
                if not complete:
                    raise Refused("wrong number of frames")
                self.accept(route, wire.parse([frame.buffer for frame in frames]))
            except Refused as refusal:
                self.refuse(route, peer, str(refusal))

    def _receive(self) -> tuple[bytes, list[zmq.Frame], bool]:
        """One message: its route, and its frames; False: it had more of them than any message has, which are thrown away."""
        route = self._socket.recv(zmq.NOBLOCK)
        frames: list[Any] = []
        complete = True
        while self._socket.getsockopt(zmq.RCVMORE):
            frame = self._socket.recv(zmq.NOBLOCK, copy=False)
            complete = len(frames) < _FRAMES
            if complete:
                frames.append(frame)
        return route, frames, complete

    def accept(self, route: bytes, message: Message) -> None:
        """Handle one well-formed message. Raises ``Refused``."""
        peer, header = self._peers.get(route), message.header
        if header.kind == Kind.HELLO:
            return self._hello(route, message)
        if peer is None:
            raise Refused(self._given_up.get(route, "unknown session"))
        if header.kind == Kind.PROOF and not peer.session:
            return self._proof(peer, message)
        if not peer.session or header.session != peer.session or header.rank != peer.rank:
            raise Refused("unknown session")
        self._ranks[peer.rank].heard = time.monotonic()
        self._handle(peer, message)

    def _hello(self, route: bytes, message: Message) -> None:
        value = message.json()
        numbers = [
            value.get(name) for name in ("rank", "workers", "connection", "incarnation", "attempt")
        ]
        if not all(type(n) is int and 0 <= n < 1 << 63 for n in numbers):
            raise Refused("malformed HELLO")
        rank, workers, connection, incarnation, attempt = numbers
        if workers != self._settings.workers or not 0 <= rank < workers or connection >= 64:
            raise Refused("rank or number of workers does not fit the job")
        most = 2 * self._settings.workers * self._settings.num_connections + 8
        if route not in self._peers and len(self._peers) >= most:
            for other in list(self._peers):  # those that are closed are forgotten
                self.send(other, Header(Kind.PING))
            if len(self._peers) >= most:
                raise Refused("too many clients")
        peer = Peer(route, rank, connection, 0, incarnation, attempt)
        self._peers[route] = peer
        self._given_up.pop(route, None)
        if self._settings.on_one_host or self._settings.encrypted:
            return self._admit(peer)
        nonce = value.get("nonce")
        if not isinstance(nonce, str) or len(nonce) != 32:
            raise Refused("malformed HELLO")
        peer.nonces = (nonce, security.nonce())
        proof = self._keys.proof("server", *peer.nonces)
        self.answer(
            peer, Header(Kind.CHALLENGE), wire.to_json({"nonce": peer.nonces[1], "proof": proof})
        )

    def _proof(self, peer: Peer, message: Message) -> None:
        if not peer.nonces[1] or not security.same(
            message.json().get("proof"), self._keys.proof(f"worker {peer.rank}", *peer.nonces)
        ):
            self._peers.pop(peer.route, None)
            raise Refused("wrong proof of the job's key")
        self._admit(peer)

    def _admit(self, peer: Peer) -> None:
        known = self._ranks.get(peer.rank)
        if (
            known is not None
            and known.incarnation == peer.incarnation
            and peer.attempt < known.attempt
        ):
            self._peers.pop(
                peer.route, None
            )  # given up meanwhile: it is here over another connection
            return
        session = secrets.randbits(63) | 1
        if not self.answer(
            peer, Header(Kind.WELCOME, session=session), wire.to_json({"server": self._index})
        ):
            return
        peer.session = session
        if known is None or known.incarnation != peer.incarnation:
            self._came(peer.rank)
            known = self._ranks[peer.rank] = _Rank(peer.incarnation)
        known.heard, known.attempt = time.monotonic(), peer.attempt
        known.routes[peer.connection] = peer.route

    def refuse(self, route: bytes, peer: Peer | None, reason: str) -> None:
        """Count and log what was not acceptable, and tell the peer: an honest worker then stops with the reason."""
        self.refused[reason.partition(":")[0]] += 1
        now = time.monotonic()
        if (
            now - self._logged.get(reason, -60.0) >= 10.0
        ):  # rubbish in masses must not fill the disk
            self._logged[reason] = now
            log.warning(
                "server %d: refused a message (rank %s): %s",
                self._index,
                peer.rank if peer else "?",
                reason,
            )
        with contextlib.suppress(zmq.ZMQError):
            self._socket.send_multipart(
                [route, Header(Kind.REFUSED).pack(), wire.to_json({"reason": reason})], zmq.NOBLOCK
            )

    # Sending

    def answer(self, peer: Peer, header: Header, payload: Any = None) -> bool:
        """Send over the connection that was asked over."""
        return self.send(peer.route, header._replace(rank=max(peer.rank, 0)), payload)

    def tell(self, rank: int, header: Header, payload: Any = None) -> bool:
        """Send to a worker, over the connection that its block's key gives."""
        routes = self._ranks[rank].routes if rank in self._ranks else {}
        if not routes:
            return False
        route = routes.get(header.key % len(routes)) or next(iter(routes.values()))
        return self.send(route, header._replace(rank=rank), payload)

    def send(self, route: bytes, header: Header, payload: Any = None) -> bool:
        """False when the connection is closed; its worker is lost then."""
        frames = [route, header.pack()] + ([payload] if payload is not None else [])
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK, copy=False)
            return True
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
        self._peers.pop(route, None)
        for rank, known in list(self._ranks.items()):
            if route in known.routes.values():
                known.routes = {
                    number: other for number, other in known.routes.items() if other != route
                }
                self._closed(rank)
        return False

    def ping(self, live: int) -> None:
        """A sign of life to all workers, with how many of them live; those whose connection is closed are found by it."""
        for known in list(self._ranks.values()):
            for route in list(known.routes.values()):
                self.send(route, Header(Kind.PING, count=live))

    def forget(self, rank: int, reason: str) -> None:
        """This worker is lost: what its connections still say is refused, with the reason."""
        known = self._ranks.get(rank)
        if known:
            for route in known.routes.values():
                self._peers.pop(route, None)
                self._given_up[route] = f"given up: {reason}"
            known.routes.clear()

    def silent_s(self, rank: int) -> float:
        """Seconds since this rank's last message."""
        return time.monotonic() - self._ranks[rank].heard


class _OneKey:
    """Admits the job's worker key and no other."""

    def __init__(self, public: str):
        self._public = public.encode()

    def callback(self, domain: str, key: bytes) -> bool:
        return zmq.utils.z85.encode(key) == self._public if len(key) == 32 else key == self._public


def _addresses() -> list[str]:
    """This host's IPv4 addresses, loopback last."""
    found = [
        entry.address
        for entries in psutil.net_if_addrs().values()
        for entry in entries
        if entry.family.name == "AF_INET"
    ]
    return sorted(found, key=lambda address: address.startswith("127."))

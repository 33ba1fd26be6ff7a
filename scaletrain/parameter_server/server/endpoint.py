"""A server's end of all connections: which peers may talk to it, and as which worker.

The server's only thread uses it. ZeroMQ's own threads do the input and output. Nothing that a peer
sends raises here: a message that is not acceptable is refused, counted and logged.

A peer is admitted in these steps:

1. The worker sends HELLO with its rank. With CurveZMQ, or over a Unix socket, the connection itself
   proves that it belongs to the job, and step 4 follows.
2. The server answers CHALLENGE: its half of the handshake (``channel``), and the proof that it
   holds the job's key.
3. The worker sends PROOF that it holds the key, too.
4. The server answers WELCOME with a session number, which all later messages of this peer carry.
"""

import contextlib
import logging
import os
import secrets
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil
import zmq
import zmq.utils.z85
from zmq.auth.thread import ThreadAuthenticator

from scaletrain.parameter_server.protocol import placement, security, tcp, wire
from scaletrain.parameter_server.protocol.channel import Channel, Handshake, Subject
from scaletrain.parameter_server.protocol.settings import Settings
from scaletrain.parameter_server.protocol.wire import Header, Message, MessageKind, Refused
from scaletrain.parameter_server.server.doorkeeper import Doorkeeper
from scaletrain.run import job_key
from scaletrain.run.atomic import write_json

log = logging.getLogger(__name__)

_MAX_FRAMES = 3  # of a message, without its route
_MAX_MESSAGES = 64  # handled between two looks at the clock
_MAX_CONNECTIONS = 64  # of a worker
_HANDSHAKE_MS = 5000
_MAX_HANDSHAKE_BYTES = 4096  # of a HELLO or PROOF: nobody has proved anything by then
_PUBLIC_CHARACTERS = 64  # of a half of a handshake
_LOOK_S = 0.05  # between looks at strangers, while there are any
_LOG_AGAIN_S = 10.0  # rubbish in masses must not fill the disk
_CURVE_KEY_BYTES = 32  # a key that is not text


@dataclass
class Peer:
    """One connection."""

    route: bytes  # ZeroMQ's name of it
    rank: int
    connection: int  # its number among those of its worker
    incarnation: int  # of the worker's process: a random number
    attempt: int  # of the worker's process to connect
    session: int = 0  # 0: not admitted yet
    worker_public: str = ""  # the worker's half of the handshake
    handshake: Handshake | None = None  # this end's; None: no CHALLENGE was sent
    channel: Channel | None = None  # None: the connection is not encrypted here
    is_noted: bool = False  # the doorkeeper knows that it is no stranger's
    refused_since: str = ""  # why everything that it sends is refused; empty: it is not


@dataclass
class _Connections:
    """The connections of one worker."""

    incarnation: int
    attempt: int = 0  # messages of earlier attempts may be read late
    routes: dict[int, bytes] = field(default_factory=dict)  # by the connection's number
    last_heard: float = 0.0  # of any of its messages, on the monotonic clock


class Listener(Protocol):
    """The events that an endpoint reports."""

    def handle(self, peer: Peer, message: Message) -> None:
        """Handle a message of an admitted worker. Raises ``Refused`` if it is not acceptable."""

    def worker_came(self, rank: int) -> None:
        """Note that a worker comes for the first time, or as another process than before."""

    def worker_closed(self, rank: int) -> None:
        """Note that a connection of a worker is gone."""


class Endpoint:
    """The socket of one server.

    Args:
        settings: of the job.
        run_dir: where workers find the address and the job's keys.
        index: of the server.
        listener: gets messages and news.

    Attributes:
        refused: number of refused messages by their reason; read for the statistics.
    """

    def __init__(self, settings: Settings, run_dir: Path, index: int, listener: Listener):
        self._settings = settings
        self._run_dir = run_dir
        self._index = index
        self._listener = listener
        self._context = zmq.Context(io_threads=settings.io_threads)
        self._authenticator: ThreadAuthenticator | None = None
        self._endpoints: list[str] = []  # ZeroMQ addresses, where it listens
        # By route: connections that said HELLO. Written by _hello; entries go when a proof is
        # wrong or a connection is closed.
        self._peers: dict[bytes, Peer] = {}
        # By rank: workers that were admitted. Written by _admit, read by all who send.
        self._workers: dict[int, _Connections] = {}
        self._last_logged: dict[str, float] = {}  # by reason, on the monotonic clock; see refuse
        self.refused: Counter[str] = Counter()

    def open(self) -> None:
        """Listen, and write the address to the run directory."""
        settings = self._settings
        if not settings.on_one_host:
            self._authenticator = ThreadAuthenticator(self._context, log=_quiet())
            self._authenticator.start()
        self._socket = self._context.socket(zmq.ROUTER)
        self._doorkeeper = Doorkeeper(self._socket, settings.workers * settings.num_connections)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._doorkeeper.news, zmq.POLLIN)
        self._set_options(self._socket)
        self._key = job_key.job_key(self._run_dir)
        if self._authenticator and settings.cipher == "curve":
            keys = security.CurveKeys.of(self._key)
            self._authenticator.configure_curve_callback(
                domain="*", credentials_provider=_WorkersKey(keys.worker_public)
            )
            security.encrypt_server(self._socket, keys)
        elif self._authenticator:
            self._authenticator.configure_plain(passwords=security.gate_password(self._key))
            self._socket.plain_server = True
        self._endpoints = self._bind(self._socket)
        address = {
            "endpoints": self._endpoints,
            "host": os.uname().nodename,
            "pid": os.getpid(),
            "time": time.time(),
        }
        write_json(placement.address_path(self._run_dir, self._index), address)

    @property
    def turned_away(self) -> int:
        """Connections that were ended because strangers were too many or too loud."""
        return self._doorkeeper.turned_away

    def close(self, keep_keys: bool) -> None:
        """Leave nothing behind: no address, no socket, and no keys, which served this job alone.

        The keys stay for other servers that are there.

        Args:
            keep_keys: let them stay in any case, for a successor.
        """
        self._doorkeeper.close()
        self._socket.close(linger=1000)
        if self._authenticator:
            self._authenticator.stop()
        self._context.term()
        placement.address_path(self._run_dir, self._index).unlink(missing_ok=True)
        # After this server's own: of two that end together, one finds no other.
        addresses = [
            placement.address_path(self._run_dir, index) for index in range(self._settings.servers)
        ]
        if not keep_keys and not any(address.exists() for address in addresses):
            job_key.forget(self._run_dir)
        for endpoint in self._endpoints:
            if endpoint.startswith("ipc://"):
                path = Path(endpoint.removeprefix("ipc://"))
                path.unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # other servers' sockets are still there
                    path.parent.rmdir()

    def _set_options(self, socket: zmq.Socket) -> None:
        """Set limits, before the socket is bound."""
        socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_MESSAGE_BYTES)
        # A send to a closed connection is an error, not a silent loss.
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        # The protocol bounds the answers that wait: one for each block and worker.
        socket.setsockopt(zmq.SNDHWM, 0)
        # Messages of each worker that wait: gradients that lie in the server's memory.
        socket.setsockopt(zmq.RCVHWM, 4)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)
        tcp.keep_alive(socket, self._settings.unanswered_s)

    def _bind(self, socket: zmq.Socket) -> list[str]:
        """Bind the socket; return the ZeroMQ addresses that workers may connect to."""
        if self._settings.on_one_host:
            return [self._bind_unix(socket)]
        if self._settings.cipher is None:
            log.warning(
                "server %d: security: trusted_network: peers are authenticated,"
                " data is NOT encrypted",
                self._index,
            )
        if self._settings.hosts == 1:
            hosts = ["127.0.0.1"]
            interface = "127.0.0.1"
        else:
            hosts = _addresses()
            interface = "*"
        port = socket.bind_to_random_port(f"tcp://{interface}")
        return [f"tcp://{host}:{port}" for host in hosts]

    def _bind_unix(self, socket: zmq.Socket) -> str:
        """Bind to a Unix socket that its owner alone can use; return its ZeroMQ address."""
        path = placement.socket_path(self._run_dir, self._index)
        path.unlink(missing_ok=True)
        mask = os.umask(0o177)
        try:
            socket.bind(f"ipc://{path}")
        finally:
            os.umask(mask)
        return f"ipc://{path}"

    # Receiving

    def serve(self, seconds: float) -> None:
        """Wait at most ``seconds`` for messages, and handle (some of) those that came."""
        if self._doorkeeper.has_strangers:
            seconds = min(seconds, _LOOK_S)
        wait_ms = int(max(0.0, seconds) * 1000)
        ready = dict(self._poller.poll(wait_ms))
        self._doorkeeper.look()
        if self._socket not in ready:
            return
        for _ in range(_MAX_MESSAGES):
            try:
                route, frames, complete = self._receive()
            except zmq.Again:
                return
            peer = self._peers.get(route)
            try:
                if not complete:
                    raise Refused("wrong number of frames")
                buffers = [frame.buffer for frame in frames]
                if peer is not None and peer.channel is not None:
                    buffers = peer.channel.open(buffers)
                self.accept(route, wire.parse(buffers))
            except Refused as refusal:
                self.refuse(route, peer, str(refusal))
            else:
                self._note_proof(route, frames)

    def _note_proof(self, route: bytes, frames: list[zmq.Frame]) -> None:
        """Tell the doorkeeper once when a connection has proved that it is a worker's."""
        peer = self._peers.get(route)
        if peer is not None and peer.session and not peer.is_noted:
            peer.is_noted = True
            self._doorkeeper.admit(int(frames[0].get(zmq.SRCFD)))

    def _receive(self) -> tuple[bytes, list[zmq.Frame], bool]:
        """Receive one message.

        Returns:
            Its route, its frames, and whether these are all. No message has more than
            ``_MAX_FRAMES``: further ones are thrown away as they come.
        """
        route = self._socket.recv(zmq.NOBLOCK)
        frames: list[zmq.Frame] = []
        complete = True
        while self._socket.getsockopt(zmq.RCVMORE):
            frame = self._socket.recv(zmq.NOBLOCK, copy=False)
            if len(frames) < _MAX_FRAMES:
                frames.append(frame)
            else:
                complete = False
        return route, frames, complete

    def accept(self, route: bytes, message: Message) -> None:
        """Handle one well-formed message. Raises ``Refused``."""
        header = message.header
        if header.kind == MessageKind.HELLO:
            self._hello(route, message)
            return
        peer = self._peers.get(route)
        if peer is None:
            raise Refused("unknown session")
        if peer.refused_since:
            raise Refused(peer.refused_since)
        if header.kind == MessageKind.PROOF and not peer.session:
            self._proof(peer, message)
            return
        if not peer.session or header.session != peer.session or header.rank != peer.rank:
            raise Refused("unknown session")
        self._workers[peer.rank].last_heard = time.monotonic()
        self._listener.handle(peer, message)

    def _hello(self, route: bytes, message: Message) -> None:
        """Step 1: a peer says which worker it is."""
        value = _handshake_json(message)
        peer = Peer(
            route,
            rank=_number(value, "rank"),
            connection=_number(value, "connection"),
            incarnation=_number(value, "incarnation"),
            attempt=_number(value, "attempt"),
        )
        workers = _number(value, "workers")
        if workers != self._settings.workers or peer.rank >= workers:
            raise Refused("rank or number of workers does not fit the job")
        if peer.connection >= _MAX_CONNECTIONS:
            raise Refused("rank or number of workers does not fit the job")
        self._make_room(route)
        self._peers[route] = peer
        if self._settings.on_one_host or self._settings.cipher == "curve":
            self._admit(peer)
        else:
            self._challenge(peer, value.get("public"))

    def _make_room(self, route: bytes) -> None:
        """Forget the oldest peer that has proved nothing, if there are too many peers.

        Raises:
            Refused: all of them have proved that they belong to the job.
        """
        # Each worker may come back before its old connections are noticed to be closed.
        most = 2 * self._settings.workers * self._settings.num_connections + 8
        if route in self._peers or len(self._peers) < most:
            return
        for other, peer in list(self._peers.items()):
            if not peer.session:
                del self._peers[other]
                return
        for other in list(self._peers):  # a send finds those that are closed, and forgets them
            self.send(other, Header(MessageKind.PING))
        if len(self._peers) >= most:
            raise Refused("too many clients")

    def _challenge(self, peer: Peer, public: Any) -> None:
        """Step 2: let the peer prove that it holds the job's key, and prove it to the peer."""
        if not isinstance(public, str) or len(public) != _PUBLIC_CHARACTERS:
            raise Refused("malformed HELLO")
        peer.worker_public = public
        peer.handshake = Handshake()
        proof = peer.handshake.proof("server", self._key, self._subject(peer), public)
        payload = wire.to_json({"public": peer.handshake.public, "proof": proof})
        self.answer(peer, Header(MessageKind.CHALLENGE), payload)

    def _subject(self, peer: Peer) -> Subject:
        """Return the connection that a handshake with a peer is about."""
        return Subject(self._index, peer.rank, peer.connection, peer.incarnation)

    def _proof(self, peer: Peer, message: Message) -> None:
        """Step 3: check the peer's proof."""
        proof = _handshake_json(message).get("proof")
        handshake = peer.handshake
        arguments = (self._key, self._subject(peer), peer.worker_public)
        if handshake is None or not security.same(proof, handshake.proof("worker", *arguments)):
            self._peers.pop(peer.route, None)
            raise Refused("wrong proof of the job's key")
        if self._settings.cipher == "aes":
            peer.channel = handshake.channel("server", *arguments)
        self._admit(peer)

    def _admit(self, peer: Peer) -> None:
        """Step 4: give the peer a session, and add it to the connections of its worker."""
        worker = self._workers.get(peer.rank)
        if worker is not None and worker.incarnation != peer.incarnation:
            worker = None  # of another process
        if worker is not None and peer.attempt < worker.attempt:
            # The worker has given this connection up, and is here over another one.
            self._peers.pop(peer.route, None)
            return
        session = secrets.randbits(63) | 1
        welcome = Header(MessageKind.WELCOME, session=session)
        if not self.answer(peer, welcome, wire.to_json({"server": self._index})):
            return
        peer.session = session
        if worker is None:
            self._listener.worker_came(peer.rank)
            worker = _Connections(peer.incarnation)
            self._workers[peer.rank] = worker
        worker.last_heard = time.monotonic()
        worker.attempt = peer.attempt
        worker.routes[peer.connection] = peer.route

    def refuse(self, route: bytes, peer: Peer | None, reason: str) -> None:
        """Count and log a message that was not acceptable, and tell the peer.

        An honest worker then stops with the reason.
        """
        self.refused[reason.partition(":")[0]] += 1
        now = time.monotonic()
        if now - self._last_logged.get(reason, -60.0) >= _LOG_AGAIN_S:
            self._last_logged[reason] = now
            rank = peer.rank if peer else "?"
            log.warning("server %d: refused a message (rank %s): %s", self._index, rank, reason)
        frames: list[Any] = [Header(MessageKind.REFUSED).pack(), wire.to_json({"reason": reason})]
        if peer is not None and peer.channel is not None:
            frames = peer.channel.seal(frames)
        with contextlib.suppress(zmq.ZMQError):
            self._socket.send_multipart([route, *frames], zmq.NOBLOCK)

    # Sending

    def answer(self, peer: Peer, header: Header, payload: Any = None) -> bool:
        """Send over the connection that the question came over.

        Returns:
            False if the connection is closed; its worker is lost then.
        """
        return self.send(peer.route, header._replace(rank=peer.rank), payload)

    def tell(self, rank: int, header: Header, payload: Any = None) -> bool:
        """Send to a worker, over the connection that the block's key gives.

        Returns:
            False if no connection is open.
        """
        worker = self._workers.get(rank)
        if worker is None or not worker.routes:
            return False
        routes = worker.routes
        route = routes.get(header.key % len(routes)) or next(iter(routes.values()))
        return self.send(route, header._replace(rank=rank), payload)

    def send(self, route: bytes, header: Header, payload: Any = None) -> bool:
        """Send over one connection; without encryption the payload is not copied.

        Returns:
            False if the connection is closed; its worker is lost then.
        """
        frames: list[Any] = [header.pack()]
        if payload is not None:
            frames.append(payload)
        peer = self._peers.get(route)
        if peer is not None and peer.channel is not None:
            frames = peer.channel.seal(frames)
        try:
            self._socket.send_multipart([route, *frames], zmq.NOBLOCK, copy=False)
            return True
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
        self._forget_route(route)
        return False

    def _forget_route(self, route: bytes) -> None:
        """Forget a closed connection, and report its worker."""
        self._peers.pop(route, None)
        for rank, worker in list(self._workers.items()):
            numbers = [number for number, other in worker.routes.items() if other == route]
            if numbers:
                for number in numbers:
                    del worker.routes[number]
                self._listener.worker_closed(rank)

    def end_unanswered(self) -> None:
        """End connections to hosts that are gone; ``ping`` then finds them closed."""
        self._doorkeeper.end_unanswered(self._settings.unanswered_s)

    def ping(self, live: int) -> None:
        """Send a sign of life to all workers, with how many of them live.

        The sends find connections that were closed.
        """
        for worker in list(self._workers.values()):
            for route in list(worker.routes.values()):
                self.send(route, Header(MessageKind.PING, count=live))

    def forget(self, rank: int, reason: str) -> None:
        """Give a worker up: further messages of its connections are refused, with the reason."""
        worker = self._workers.get(rank)
        if worker is None:
            return
        for route in worker.routes.values():
            # It stays known, so that it is told why, encrypted as everything before.
            if route in self._peers:
                self._peers[route].refused_since = f"given up: {reason}"
        worker.routes.clear()

    def forgive(self, absent_s: float) -> None:
        """Leave a time in which this process was stopped out of the silence of all workers."""
        now = time.monotonic()
        for worker in self._workers.values():
            worker.last_heard = min(worker.last_heard + absent_s, now)

    def silent_s(self, rank: int) -> float:
        """Return the seconds since the last message of an admitted worker."""
        return time.monotonic() - self._workers[rank].last_heard


class _WorkersKey:
    """Admits the workers' key of the job and no other. Called by ZeroMQ's authenticator."""

    def __init__(self, public: bytes):
        self._public = public

    def callback(self, domain: str, key: bytes) -> bool:
        """Return True for the job's key, raw or as Z85 text."""
        if len(key) == _CURVE_KEY_BYTES:
            key = zmq.utils.z85.encode(key)
        return key == self._public


def _handshake_json(message: Message) -> dict[str, Any]:
    """Return the payload of a message from a peer that may be anybody. Raises ``Refused``."""
    if message.payloads[0].nbytes > _MAX_HANDSHAKE_BYTES:
        raise Refused("JSON too long")
    return message.json()


def _quiet() -> logging.Logger:
    """Return a logger for ZeroMQ's authenticator, which would log passwords."""
    quiet = logging.Logger("authenticator")
    quiet.disabled = True
    return quiet


def _number(value: dict[str, Any], name: str) -> int:
    """Return a number in HELLO, 0 to 2^63 - 1. Raises ``Refused``."""
    number = value.get(name)
    if type(number) is not int or not 0 <= number < 1 << 63:
        raise Refused("malformed HELLO")
    return number


def _addresses() -> list[str]:
    """Return this host's IPv4 addresses, loopback last."""
    addresses: list[str] = []
    for entries in psutil.net_if_addrs().values():
        addresses += [entry.address for entry in entries if entry.family.name == "AF_INET"]
    return sorted(addresses, key=lambda address: address.startswith("127."))

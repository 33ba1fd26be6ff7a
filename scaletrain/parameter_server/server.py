"""One parameter server: a process that owns a shard, answers workers, and goes on when some of them die or send rubbish.

``python -m scaletrain.parameter_server.server RUN_DIR INDEX SETTINGS [--until-left]``, SETTINGS as JSON. One thread; ZeroMQ's own threads
do the input and output. Nothing that a peer sends can end the process: what is not acceptable is refused, counted and logged.
"""

import contextlib
import ctypes
import json
import logging
import math
import os
import secrets
import signal
import sys
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import zmq
from zmq.auth.thread import ThreadAuthenticator

from scaletrain.errors import UserError
from scaletrain.metrics import write_json
from scaletrain.parameter_server import codec, consistency, placement, security, shard, sharding, wire
from scaletrain.parameter_server.memory import SUPPORTED, Slab
from scaletrain.parameter_server.settings import Settings
from scaletrain.parameter_server.sums import Sums
from scaletrain.parameter_server.wire import Dtype, Header, Kind, Message, Refused

log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 64 << 20  # larger ones end the connection before anything is stored
TICK_S = 0.25  # sign of life to every worker; a closed connection is noticed by it
HEARTBEAT_S = 10.0  # a link without a sign of life for this long is cut
_FRAMES = 3  # most frames of a message
_STATE_OF = {Kind.PUSH, Kind.PUSH_ROWS, Kind.PULL, Kind.PULL_ROWS, Kind.INIT, Kind.SUM, Kind.PAUSE, Kind.LEAVE}


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
class Worker:
    """One rank, as this server sees it."""

    incarnation: int
    attempt: int = 0  # of its connecting; messages of earlier ones may be read late
    routes: dict[int, bytes] = field(default_factory=dict)
    joined: bool = False
    gradients: Slab | None = None
    heard: float = 0.0  # monotonic
    pushes: int = 0
    dropped: int = 0
    paces: deque[float] = field(default_factory=lambda: deque(maxlen=500))  # seconds between steps
    stepped: float | None = None


class Server:
    """Shard ``index`` of a job. ``serve`` runs until SIGTERM, or with ``until_left`` until all workers have left."""

    def __init__(self, settings: Settings, run_dir: Path, index: int):
        self.settings, self.run_dir, self.index = settings, run_dir, index
        self._shard: shard.Shard | None = None
        self._setup: dict[str, Any] = {}
        self._rule: consistency.Rule | None = None
        self._stored: dict[int, int] = {}  # elements of each block that rank 0 has sent so far
        self._ready = False  # all weights are there
        self._waiting_pulls: list[tuple[Peer, Header]] = []
        self._peers: dict[bytes, Peer] = {}
        self._workers: dict[int, Worker] = {}
        self._sums = Sums(settings.workers)
        self._gradients: Counter[int] = Counter()  # in each block's sum
        self._lr: dict[int, float] = {}
        self._encoded: dict[int, tuple[int, Any]] = {}  # block -> version, bytes for the wire
        self._aborted: str | None = None
        self._first_join: float | None = None
        self._restored: int | None = None
        self._snapshot_at = (0, time.monotonic())  # updates, time
        self._refused: Counter[str] = Counter()
        self._staleness: Counter[int] = Counter()
        self._lost: list[dict[str, Any]] = []
        self._log_quiet: dict[str, float] = {}
        self._stop = False
        self._dtype = codec.BY_NAME[settings.wire]
        # A block that cannot change before all its answers were received is sent from where it lies.
        self._frozen_while_sent = settings.mode not in ("async", "bounded") and not settings.backup_workers
        self._job = _launch_mark()

    # Life

    def serve(self, until_left: bool = False) -> None:
        self._context = zmq.Context(io_threads=max(1, min(self._connections(), len(os.sched_getaffinity(0)))))
        authenticator = None
        self._socket = self._context.socket(zmq.ROUTER)
        try:
            if self.settings.encrypted:
                authenticator = ThreadAuthenticator(self._context)
                authenticator.start()
            self._bind(authenticator)
            poller = zmq.Poller()
            poller.register(self._socket, zmq.POLLIN)
            tick = 0.0
            while not self._stop:
                if poller.poll(max(0.0, tick - time.monotonic()) * 1000):
                    self._drain()
                if time.monotonic() >= tick:
                    self._tick()
                    tick = time.monotonic() + TICK_S
                if until_left and self._workers and not any(w.joined for w in self._workers.values()) and self._rule:
                    seen = self._rule.left | self._rule.lost
                    self._stop = len(seen) >= self.settings.workers or bool(self._aborted)
            self._write_stats()
        finally:
            self._socket.close(linger=1000)
            if authenticator:
                authenticator.stop()
            self._context.term()
            placement.address_path(self.run_dir, self.index).unlink(missing_ok=True)
            for endpoint in self._endpoints:
                if endpoint.startswith("ipc://"):
                    Path(endpoint.removeprefix("ipc://")).unlink(missing_ok=True)

    def stop(self, *_: Any) -> None:
        """End ``serve`` (also a signal handler)."""
        self._stop = True

    def _connections(self) -> int:
        return self.settings.connections or (4 if self.settings.encrypted else 1)

    def _bind(self, authenticator: ThreadAuthenticator | None) -> None:
        made, socket = self.settings, self._socket
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a send to a closed connection is an error, not a silent loss
        socket.setsockopt(zmq.SNDHWM, 0)  # answers are bounded by the protocol: one a block and worker
        socket.setsockopt(zmq.RCVHWM, 16)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.HANDSHAKE_IVL, 5000)
        heartbeat = int(min(HEARTBEAT_S, made.timeout_s) * 1000)
        socket.setsockopt(zmq.HEARTBEAT_IVL, max(heartbeat // 4, 1))
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, heartbeat)
        keys = security.job_keys(self.run_dir)
        self._keys = keys
        if authenticator:
            provider = _OneKey(keys.worker_public)
            authenticator.configure_curve_callback(domain="*", credentials_provider=provider)
            socket.curve_server = True
            socket.curve_publickey, socket.curve_secretkey = keys.server_public.encode(), keys.server_secret.encode()
        self._endpoints: list[str] = []
        if made.on_one_host:
            path = placement.socket_path(self.run_dir, self.index)
            path.unlink(missing_ok=True)
            mask = os.umask(0o177)
            try:
                socket.bind(f"ipc://{path}")
            finally:
                os.umask(mask)
            self._endpoints = [f"ipc://{path}"]
        else:
            hosts = ["127.0.0.1"] if made.hosts == 1 else _addresses()
            port = socket.bind_to_random_port(f"tcp://{hosts[0] if made.hosts == 1 else '*'}")
            self._endpoints = [f"tcp://{host}:{port}" for host in hosts]
            if not made.encrypted:
                log.warning(
                    "server %d: security: trusted_network: peers are authenticated, data is NOT encrypted", self.index
                )
        address = {"endpoints": self._endpoints, "host": os.uname().nodename, "pid": os.getpid(), "time": time.time()}
        write_json(placement.address_path(self.run_dir, self.index), address)
        self._restore()

    def _restore(self) -> None:
        """Go on from the last snapshot when the same launch starts this server again."""
        header = shard.read_header(self._snapshot_path()) if self.settings.restart_servers else None
        if header is None or header["job"] != self._job:
            return
        self._install(header["setup"])
        assert self._shard and self._rule
        self._shard.load(self._snapshot_path())
        for key_text, version in header["versions"].items():
            self._rule.version[int(key_text)] = version
            self._shard.set_version(int(key_text), version)
        self._ready = True
        self._restored = min(self._rule.version.values(), default=0)
        self._snapshot_at = (self._updates(), time.monotonic())
        log.warning("server %d: restored at update %d", self.index, self._restored)

    # Messages

    def _drain(self) -> None:
        for _ in range(64):
            try:
                route, *frames = self._receive()
            except zmq.Again:
                return
            peer = self._peers.get(route)
            try:
                if frames and frames[-1] is None:
                    raise Refused("wrong number of frames")
                self._handle(route, peer, wire.parse([frame.buffer for frame in frames]))
            except Refused as refusal:
                self._refuse(route, peer, str(refusal))
            if self._stop:
                return

    def _receive(self) -> list[Any]:
        """One message: its route, then at most ``_FRAMES`` frames; of a longer one the rest is thrown away and None put last."""
        route = self._socket.recv(zmq.NOBLOCK)
        frames: list[Any] = [route]
        while self._socket.getsockopt(zmq.RCVMORE):
            frame = self._socket.recv(zmq.NOBLOCK, copy=False)
            if len(frames) <= _FRAMES:
                frames.append(frame)
        if len(frames) > _FRAMES + 1 or (len(frames) == _FRAMES + 1 and self._socket.getsockopt(zmq.RCVMORE)):
            frames.append(None)
        return frames

    def _handle(self, route: bytes, peer: Peer | None, message: Message) -> None:
        header = message.header
        if header.kind == Kind.HELLO:
            return self._hello(route, message)
        if peer is None:
            raise Refused("unknown session")
        if header.kind == Kind.PROOF and not peer.session:
            return self._proof(peer, message)
        if not peer.session or header.session != peer.session or header.rank != peer.rank:
            raise Refused("unknown session")
        worker = self._workers[peer.rank]
        worker.heard = time.monotonic()
        if header.kind == Kind.SETUP:
            return self._set_up(peer, worker, message)
        if header.kind not in _STATE_OF:
            raise Refused("not a message for a server")
        if not worker.joined or self._shard is None or self._rule is None:
            raise Refused("not set up")
        if self._aborted:
            self._send(peer, Header(Kind.ABORT), wire.to_json({"message": self._aborted}))
            return
        if header.kind == Kind.PAUSE:
            self._perform(self._rule.pause(peer.rank))
            self._send(peer, Header(Kind.PAUSED))
            return
        if header.kind == Kind.LEAVE:
            self._perform(self._rule.leave(peer.rank))
            worker.joined = False
            self._send(peer, Header(Kind.LEFT))
            return self._sum_up()
        if header.kind == Kind.SUM:
            return self._sum(peer, message)
        if header.key not in self._shard.blocks:
            raise Refused("unknown block")
        block = self._shard.blocks[header.key]
        match header.kind:
            case Kind.PUSH:
                self._push(peer, worker, block, message)
            case Kind.PUSH_ROWS:
                self._push_rows(peer, worker, block, message)
            case Kind.PULL | Kind.PULL_ROWS if not self._ready:
                self._waiting_pulls.append((peer, header)) if header.kind == Kind.PULL else self._refuse(
                    peer.route, peer, "weights are not there yet"
                )
            case Kind.PULL:
                self._pull(peer, header)
            case Kind.PULL_ROWS:
                self._pull_rows(peer, block, message)
            case Kind.INIT:
                self._init(peer, block, message)

    def _hello(self, route: bytes, message: Message) -> None:
        value = message.json()
        numbers = [value.get(name) for name in ("rank", "workers", "connection", "incarnation", "attempt")]
        if not all(type(n) is int and 0 <= n < 1 << 63 for n in numbers):
            raise Refused("malformed HELLO")
        rank, workers, connection, incarnation, attempt = numbers
        if workers != self.settings.workers or not 0 <= rank < workers or connection >= 64:
            raise Refused("rank or number of workers does not fit the job")
        if route not in self._peers and len(self._peers) >= 2 * self.settings.workers * self._connections() + 8:
            self._forget_closed()
            if len(self._peers) >= 2 * self.settings.workers * self._connections() + 8:
                raise Refused("too many clients")
        peer = Peer(route, rank, connection, 0, incarnation, attempt)
        self._peers[route] = peer
        if self.settings.on_one_host or self.settings.encrypted:
            return self._admit(peer)
        nonce = value.get("nonce")
        if not isinstance(nonce, str) or len(nonce) != 32:
            raise Refused("malformed HELLO")
        peer.nonces = (nonce, security.nonce())
        proof = self._keys.proof("server", *peer.nonces)
        self._send(peer, Header(Kind.CHALLENGE), wire.to_json({"nonce": peer.nonces[1], "proof": proof}))

    def _proof(self, peer: Peer, message: Message) -> None:
        if not peer.nonces[1] or not security.same(
            message.json().get("proof"), self._keys.proof(f"worker {peer.rank}", *peer.nonces)
        ):
            self._peers.pop(peer.route, None)
            raise Refused("wrong proof of the job's key")
        self._admit(peer)

    def _admit(self, peer: Peer) -> None:
        worker = self._workers.get(peer.rank)
        if worker is not None and worker.incarnation == peer.incarnation and peer.attempt < worker.attempt:
            self._peers.pop(peer.route, None)  # given up meanwhile: it is here over another connection
            return
        session = secrets.randbits(63) | 1
        if not self._send(peer, Header(Kind.WELCOME, session=session), wire.to_json({"server": self.index})):
            return
        peer.session = session
        if worker is None or worker.incarnation != peer.incarnation:
            if worker is not None and worker.joined:
                self._lose(peer.rank, "started again")
            worker = self._workers[peer.rank] = Worker(peer.incarnation)
        worker.heard, worker.attempt = time.monotonic(), peer.attempt
        worker.routes[peer.connection] = peer.route

    def _set_up(self, peer: Peer, worker: Worker, message: Message) -> None:
        value = message.json()
        if self._aborted:
            self._send(peer, Header(Kind.ABORT), wire.to_json({"message": self._aborted}))
            return
        setup = {name: value.get(name) for name in ("blocks", "optimizer")}
        if self._shard is None:
            try:
                self._install(setup)
            except (ValueError, UserError) as error:
                raise Refused(f"setup: {error}") from None
        elif setup != self._setup:
            raise Refused("setup: this worker's model or optimizer is not the one that the server has")
        assert self._shard and self._rule
        if value.get("gradients") is not None and self.settings.shared_memory and SUPPORTED:
            try:
                worker.gradients = Slab.open(value["gradients"], self._shard.dense_elements, len(self._shard.blocks))
            except (ValueError, OSError) as error:
                log.warning("server %d: worker %d: no shared memory: %s", self.index, peer.rank, error)
        step = value.get("step")
        worker.joined = True
        self._first_join = self._first_join or time.monotonic()
        begin = self._rule.join(peer.rank, step if type(step) is int and 0 <= step < 1 << 48 else None)
        shared = worker.gradients is not None and self._shard.slab is not None
        answer = {
            "initialised": self._ready, "step": begin, "sum": self._sums.next(), "restored": self._restored,
            "weights": self._shard.slab.handle() if shared and self._shard.slab else None,
            "versions": {str(key): version for key, version in self._rule.version.items()},
        }  # fmt: skip
        self._send(peer, Header(Kind.READY), wire.to_json(answer))

    def _install(self, setup: dict[str, Any]) -> None:
        table, made = setup["blocks"], self.settings
        if not isinstance(table, list) or len(table) > 1 << 20:
            raise ValueError("malformed table of blocks")
        blocks = [sharding.from_json(entry, self.index) for entry in table]
        if len({block.key for block in blocks}) != len(blocks):
            raise ValueError("a block comes twice")
        if sum(block.numel for block in blocks) * 4 > psutil.virtual_memory().total:
            raise ValueError("the model is larger than this host's memory")
        self._shard = shard.Shard(blocks, setup["optimizer"], made.server_lr, made.shared_memory)
        self._setup = setup
        self._stored = dict.fromkeys(self._shard.blocks, 0)
        keys = list(self._shard.blocks)
        if made.mode in ("async", "bounded"):
            bound = made.staleness if made.mode == "bounded" else None
            self._rule = consistency.Asynchronous(keys, made.workers, bound)
        else:
            self._rule = consistency.Synchronous(keys, made.workers, made.backup_workers, made.min_workers)
        self._ready = not keys  # a server without blocks

    def _init(self, peer: Peer, block: sharding.Block, message: Message) -> None:
        header = message.header
        if peer.rank != 0 or self._ready:
            raise Refused("INIT is rank 0's, once")
        if header.dtype != Dtype.FLOAT32 or header.flags or header.offset != self._stored[block.key]:
            raise Refused("bad part of a block")
        if header.offset + header.count > block.numel:
            raise Refused("bad part of a block")
        assert self._shard
        self._shard.store(block.key, header.offset, codec.decode(message.payloads[0], header.dtype))
        self._stored[block.key] += header.count
        self._send(peer, Header(Kind.STORED, key=block.key, offset=header.offset))
        if all(self._stored[key] == b.numel for key, b in self._shard.blocks.items()):
            self._ready = True
            for key in self._shard.blocks:
                self._shard.set_version(key, 0)
            waiting, self._waiting_pulls = self._waiting_pulls, []
            for waiter, pull in waiting:
                self._pull(waiter, pull)

    def _pull(self, peer: Peer, header: Header) -> None:
        assert self._shard and self._rule
        block = self._shard.blocks[header.key]
        if header.offset + header.count > block.numel or header.count * 4 > MAX_MESSAGE_BYTES:
            raise Refused("bad part of a block")
        part = self._shard.part(header.key, header.offset, header.count).clone()
        answer = Header(
            Kind.PART, Dtype.FLOAT32, key=header.key, step=header.step, offset=header.offset, count=header.count,
            version=self._rule.version[header.key],
        )  # fmt: skip
        self._send(peer, answer, part.numpy())

    def _check_push(self, header: Header) -> None:
        assert self._rule
        if not self._ready:
            raise Refused("weights are not there yet")
        if header.offset or not math.isfinite(header.lr) or header.version > self._rule.version[header.key]:
            raise Refused("bad version or learning rate")
        if header.step >= 1 << 48:
            raise Refused("bad step")

    def _push(self, peer: Peer, worker: Worker, block: sharding.Block, message: Message) -> None:
        header = message.header
        self._check_push(header)
        if block.sparse or header.count != block.numel or header.rows:
            raise Refused("gradient does not have the block's shape")
        assert self._shard and self._rule
        if header.flags & wire.SHARED:
            if worker.gradients is None:
                raise Refused("no shared memory with this worker")
            start = self._shard.starts[block.key]
            gradient = torch.from_numpy(worker.gradients.floats[start : start + block.numel])
        elif header.dtype == self._dtype:
            gradient = codec.decode(message.payloads[0], header.dtype)
        else:
            raise Refused("gradient is not of the job's wire dtype")
        self._count(worker, block.key, header.step)
        for action in self._rule.push(block.key, peer.rank, header.step, header.version):
            if isinstance(action, consistency.Add):
                self._lr[block.key] = header.lr
                self._gradients[block.key] += 1
                self._shard.add(block.key, gradient, self._gradients[block.key])
            else:
                self._perform([action])

    def _push_rows(self, peer: Peer, worker: Worker, block: sharding.Block, message: Message) -> None:
        header = message.header
        self._check_push(header)
        if not block.sparse or header.dtype != self._dtype or header.count != header.rows * block.shape[1]:
            raise Refused("gradient does not have the block's shape")
        rows = self._checked_rows(block, message)
        values = codec.decode(message.payloads[1], header.dtype).view(header.rows, block.shape[1])
        assert self._shard and self._rule
        self._count(worker, block.key, header.step)
        for action in self._rule.push(block.key, peer.rank, header.step, header.version):
            if isinstance(action, consistency.Add):
                self._lr[block.key] = header.lr
                self._shard.add_rows(block.key, rows, values)
            else:
                self._perform([action])

    def _checked_rows(self, block: sharding.Block, message: Message) -> torch.Tensor:
        rows = shard.as_rows(message.payloads[0])
        if len(rows) and (int(rows.min()) < 0 or int(rows.max()) >= block.shape[0]):
            raise Refused("row out of range")
        return rows

    def _pull_rows(self, peer: Peer, block: sharding.Block, message: Message) -> None:
        header = message.header
        assert self._shard and self._rule
        if not block.sparse or header.rows * block.shape[1] * 4 > MAX_MESSAGE_BYTES:
            raise Refused("bad rows")
        values = self._shard.rows(block.key, self._checked_rows(block, message)).reshape(-1)
        answer = Header(
            Kind.ROWS, self._dtype, key=block.key, step=header.step, count=len(values), rows=header.rows,
            version=self._rule.version[block.key],
        )  # fmt: skip
        self._send(peer, answer, codec.encode(values, self._dtype))

    def _count(self, worker: Worker, key: int, step: int) -> None:
        worker.pushes += 1
        assert self._shard
        if key == next(iter(self._shard.blocks)):  # once a step
            now = time.monotonic()
            if worker.stepped is not None:
                worker.paces.append(now - worker.stepped)
            worker.stepped = now

    def _perform(self, actions: list[consistency.Action]) -> None:
        assert self._shard and self._rule
        for action in actions:
            if isinstance(action, consistency.Apply):
                self._shard.apply(action.key, action.count, self._lr[action.key], action.version)
                self._gradients[action.key] = 0
            elif isinstance(action, consistency.Answer):
                self._answer(action)
            elif isinstance(action, consistency.Abort):
                reason = self._lost[-1]["reason"] if self._lost else "gone"
                self._abort(
                    f"worker rank {action.rank} was lost ({reason}); {action.alive} of {self.settings.workers} workers are left and"
                    f" an update takes {action.needed} (exchange.min_workers lets the job go on with fewer)"
                )

    def _answer(self, action: consistency.Answer) -> None:
        assert self._shard and self._rule
        key, worker = action.key, self._workers[action.rank]
        block, version = self._shard.blocks[key], self._rule.version[key]
        if action.dropped:
            worker.dropped += 1
        else:
            self._staleness[action.staleness] += 1
        flags = wire.DROPPED if action.dropped else 0
        route = self._route(worker, key)
        if route is None:
            return
        header = Header(
            Kind.APPLIED if block.sparse else Kind.WEIGHTS, flags=flags, key=key, rank=action.rank, staleness=action.staleness,
            version=version,
        )  # fmt: skip
        if block.sparse:
            self._send_to(route, header)
        elif worker.gradients is not None and self._shard.slab is not None:
            self._send_to(
                route, header._replace(flags=flags | wire.SHARED, dtype=Dtype.FLOAT32, count=block.numel), b""
            )
        else:
            self._send_to(route, header._replace(dtype=self._dtype, count=block.numel), self._bytes(block, version))

    def _bytes(self, block: sharding.Block, version: int) -> Any:
        """A block's weights for the wire; answers of one version share them."""
        assert self._shard
        live = self._shard.part(block.key, 0, block.numel)
        if self._dtype == Dtype.FLOAT32 and self._frozen_while_sent:
            return live.numpy()
        kept = self._encoded.get(block.key)
        if kept is None or kept[0] != version:
            copy = live.clone() if self._dtype == Dtype.FLOAT32 else live
            kept = (version, codec.encode(copy, self._dtype))
            if self._frozen_while_sent or self.settings.backup_workers:
                self._encoded[block.key] = kept  # several workers get it
        return kept[1]

    def _sum(self, peer: Peer, message: Message) -> None:
        header = message.header
        if header.dtype != Dtype.FLOAT64 or header.flags or header.count > wire.MAX_SUM_VALUES:
            raise Refused("bad vector to sum")
        try:
            done = self._sums.add(header.step, peer.rank, np.frombuffer(message.payloads[0], np.float64))
        except ValueError as error:
            raise Refused(str(error)) from None
        if done is not None:
            self._send(peer, Header(Kind.TOTAL, Dtype.FLOAT64, step=header.step, count=len(done)), done)
        self._sum_up()

    def _sum_up(self) -> None:
        if self._rule is None:
            return
        seen = self._rule.live | self._rule.lost | self._rule.left
        for number, total, ranks in self._sums.complete(self._rule.live, seen):
            for rank in ranks:
                route = self._workers[rank].routes.get(0) if rank in self._rule.live else None
                if route is not None:
                    self._send_to(route, Header(Kind.TOTAL, Dtype.FLOAT64, step=number, count=len(total)), total)

    # Faults

    def _refuse(self, route: bytes, peer: Peer | None, reason: str) -> None:
        """Count and log what was not acceptable; tell the peer once it is admitted (an honest worker then stops with the reason)."""
        self._refused[reason.partition(":")[0]] += 1
        now = time.monotonic()
        if now - self._log_quiet.get(reason, -60.0) >= 10.0:  # rubbish in masses must not fill the disk
            self._log_quiet[reason] = now
            rank = peer.rank if peer else "?"
            log.warning("server %d: refused a message (rank %s): %s", self.index, rank, reason)
        with contextlib.suppress(zmq.ZMQError):
            self._socket.send_multipart(
                [route, Header(Kind.REFUSED).pack(), wire.to_json({"reason": reason})], zmq.NOBLOCK
            )

    def _lose(self, rank: int, reason: str) -> None:
        worker = self._workers.get(rank)
        if worker is None or not worker.joined or self._rule is None:
            return
        worker.joined = False
        worker.gradients = None
        self._lost.append({"rank": rank, "reason": reason, "time": time.time(), "update": self._updates()})
        log.warning("server %d: worker rank %d was lost: %s", self.index, rank, reason)
        for route in worker.routes.values():
            self._peers.pop(route, None)
        worker.routes.clear()
        self._perform(self._rule.lose(rank))
        self._sum_up()

    def _abort(self, message: str) -> None:
        self._aborted = message
        log.error("server %d: %s", self.index, message)
        for worker in self._workers.values():
            if worker.joined and 0 in worker.routes:
                self._send_to(worker.routes[0], Header(Kind.ABORT), wire.to_json({"message": message}))

    def _tick(self) -> None:
        """Several times a second: signs of life, silent workers, snapshots, statistics."""
        for rank, worker in list(self._workers.items()):
            for route in list(worker.routes.values()):
                self._send_to(route, Header(Kind.PING))
            if worker.joined and self._rule is None:
                self._lose(rank, "gone")
        now, limit = time.monotonic(), self.settings.timeout_s
        if self._rule is not None and not self._aborted:
            awaited = self._rule.awaited() | self._sums.awaited(self._rule.live)
            for rank in awaited:
                # Whoever is awaited without having been heard for so long hangs; evaluation and saving take less.
                if now - self._workers[rank].heard > limit:
                    self._lose(rank, f"silent for {limit:g} s while others waited for it")
            missing = set(range(self.settings.workers)) - self._rule.live - self._rule.lost - self._rule.left
            if missing and self._first_join and now - self._first_join > limit:
                for rank in sorted(missing):
                    self._rule.join(rank)
                    self._lost.append(
                        {"rank": rank, "reason": f"did not come within {limit:g} s", "time": time.time(), "update": 0}
                    )
                    self._workers.setdefault(rank, Worker(-1))
                    self._perform(self._rule.lose(rank))
                self._sum_up()
        self._snapshot_when_due()
        if now - self._log_quiet.get("stats", 0.0) >= 1.0:
            self._log_quiet["stats"] = now
            self._write_stats()

    def _route(self, worker: Worker, key: int) -> bytes | None:
        return worker.routes.get(key % max(1, len(worker.routes))) or next(iter(worker.routes.values()), None)

    def _send(self, peer: Peer, header: Header, payload: Any = None) -> bool:
        return self._send_to(peer.route, header._replace(rank=max(peer.rank, 0)), payload)

    def _send_to(self, route: bytes, header: Header, payload: Any = None) -> bool:
        """False when the connection is closed; its worker is lost then."""
        frames = [route, header.pack()] + ([payload] if payload is not None else [])
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK, copy=False)
            return True
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
        self._peers.pop(route, None)
        for rank, worker in list(self._workers.items()):
            if route in worker.routes.values():
                worker.routes = {number: other for number, other in worker.routes.items() if other != route}
                self._lose(rank, "its connection is closed")
        return False

    def _forget_closed(self) -> None:
        for route in list(self._peers):
            self._send_to(route, Header(Kind.PING))

    # Snapshots and statistics

    def _updates(self) -> int:
        return min(self._rule.version.values(), default=0) if self._rule else 0

    def _snapshot_path(self) -> Path:
        return self.run_dir / f"server-{self.index}.safetensors"

    def _snapshot_when_due(self) -> None:
        made, (updates, then) = self.settings, self._snapshot_at
        if not self._ready or self._shard is None or self._updates() == updates:
            return
        due = made.snapshot_updates and self._updates() - updates >= made.snapshot_updates
        if due or (made.snapshot_s and time.monotonic() - then >= made.snapshot_s):
            self.snapshot()

    def snapshot(self) -> None:
        """Write RUN_DIR/server-<index>.safetensors."""
        assert self._shard and self._rule
        versions = {str(key): version for key, version in self._rule.version.items()}
        self._shard.save(self._snapshot_path(), {"job": self._job, "setup": self._setup, "versions": versions})
        self._snapshot_at = (self._updates(), time.monotonic())

    def statistics(self) -> dict[str, Any]:
        """What the report shows of this server."""
        usage = psutil.Process().memory_info()
        cpu = time.process_time()
        return {
            "server": self.index,
            "mode": self.settings.mode,
            "updates": self._updates(),
            "parameters": self._shard.num_parameters if self._shard else 0,
            "staleness": {str(k): v for k, v in sorted(self._staleness.items())},  # of block gradients
            "pushes": {str(rank): w.pushes for rank, w in sorted(self._workers.items())},
            "dropped": {str(rank): w.dropped for rank, w in sorted(self._workers.items())},
            "step_s": {
                str(r): float(np.median(w.paces)) if w.paces else None for r, w in sorted(self._workers.items())
            },
            "lost": self._lost,
            "refused": dict(self._refused),
            "restored_at_update": self._restored,
            "snapshot_at_update": self._snapshot_at[0],
            "aborted": self._aborted,
            "cpu_s": cpu,
            "cpu_s_per_worker": cpu / max(1, len(self._workers)),
            "memory_bytes": usage.rss,
        }

    def _write_stats(self) -> None:
        write_json(self.run_dir / f"server-{self.index}.json", self.statistics())


class _OneKey:
    """Admits the job's worker key and no other."""

    def __init__(self, public: str):
        self._public = public.encode()

    def callback(self, domain: str, key: bytes) -> bool:
        import zmq.utils.z85

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


def _launch_mark() -> str:
    """Names the launch this process belongs to: its parent, which stays the same when it starts a server again."""
    parent = psutil.Process(os.getppid())
    return f"{parent.pid} {parent.create_time()}"


def end_with_parent() -> None:
    """Ask the kernel for SIGTERM when the process that started this one ends: no orphans."""
    parent = os.getppid()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        sys.exit(1)


def main(run_dir: Path, index: int, settings: Settings, until_left: bool = False) -> None:
    """Be server ``index`` of the run in ``run_dir``."""
    end_with_parent()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    torch.set_num_threads(1)
    torch.optim.SGD([torch.zeros(1)])  # torch imports more for its first optimizer: before workers wait for an answer
    server = Server(settings, run_dir, index)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, server.stop)
    try:
        server.serve(until_left)
    except UserError as error:
        sys.exit(f"scaletrain: error: {error}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), Settings(**json.loads(sys.argv[3])), "--until-left" in sys.argv[4:])

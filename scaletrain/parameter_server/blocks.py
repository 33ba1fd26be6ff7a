"""A shard under the rules of a mode: takes gradients, carries out what ``consistency`` decides, answers with weights."""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import psutil
import torch

from scaletrain.parameter_server import codec, consistency, shard, sharding, wire
from scaletrain.parameter_server.endpoint import Endpoint, Peer
from scaletrain.parameter_server.memory import Slab
from scaletrain.parameter_server.settings import Settings
from scaletrain.parameter_server.tally import Tally
from scaletrain.parameter_server.wire import Dtype, Header, Kind, Message, Refused

KINDS = {Kind.PUSH, Kind.PUSH_ROWS, Kind.PULL, Kind.PULL_ROWS, Kind.INIT}


class Blocks:
    """Server ``index``'s blocks, as the first worker described them.

    Args:
        setup: ``blocks`` and ``optimizer``, from the wire.
        abort: called when the rule says that training cannot go on, with the rank, the workers left and those needed.

    Raises:
        ValueError, UserError: the description is malformed, or too large for this host.
    """

    def __init__(
        self,
        settings: Settings,
        index: int,
        setup: dict[str, Any],
        endpoint: Endpoint,
        tally: Tally,
        abort: Callable[[consistency.Abort], None],
    ):
        self.setup, self._endpoint, self._tally, self._abort = setup, endpoint, tally, abort
        table = setup["blocks"]
        if not isinstance(table, list) or len(table) > 1 << 20:
            raise ValueError("malformed table of blocks")
        blocks = [sharding.from_json(entry, index) for entry in table]
        if len({block.key for block in blocks}) != len(blocks):
            raise ValueError("a block comes twice")
        if sum(block.numel for block in blocks) * 4 > psutil.virtual_memory().total:
            raise ValueError("the model is larger than this host's memory")
        self.shard = shard.Shard(blocks, setup["optimizer"], settings.server_lr, settings.shared_memory)
        keys = list(self.shard.blocks)
        if settings.mode in ("async", "bounded"):
            bound = settings.staleness if settings.mode == "bounded" else None
            self.rule: consistency.Rule = consistency.Asynchronous(keys, settings.workers, bound)
        else:
            self.rule = consistency.Synchronous(keys, settings.workers, settings.backup_workers, settings.min_workers)
        self.ready = not keys  # all weights are there
        self.slabs: dict[int, Slab] = {}  # gradients of workers on this host
        self._first_key = min(keys, default=-1)
        self._stored = dict.fromkeys(keys, 0)  # elements of each block that rank 0 has sent so far
        self._waiting_pulls: list[tuple[Peer, Header]] = []
        self._gradients: Counter[int] = Counter()  # in each block's sum
        self._lr: dict[int, float] = {}
        self._encoded: dict[int, tuple[int, Any]] = {}  # block -> version, bytes for the wire
        self._dtype = codec.BY_NAME[settings.wire]
        # A block that cannot change before all its answers were received is sent from where it lies.
        self._frozen_while_sent = settings.mode not in ("async", "bounded") and not settings.backup_workers
        self._shared_answers = self._frozen_while_sent or settings.backup_workers > 0  # several workers get one version

    @property
    def updates(self) -> int:
        """Updates of the least updated block."""
        return min(self.rule.version.values(), default=0)

    def restore(self, versions: dict[str, int]) -> None:
        """Go on from a snapshot that was loaded into the shard."""
        for key_text, version in versions.items():
            self.rule.version[int(key_text)] = version
            self.shard.set_version(int(key_text), version)
        self.ready = True

    def handle(self, peer: Peer, message: Message) -> None:
        """A message of one of ``KINDS``. Raises ``Refused``."""
        header = message.header
        block = self.shard.blocks.get(header.key)
        if block is None:
            raise Refused("unknown block")
        match header.kind:
            case Kind.INIT:
                self._init(peer, block, message)
            case Kind.PULL:
                self._pull(peer, header)
            case _ if not self.ready:
                raise Refused("weights are not there yet")
            case Kind.PULL_ROWS:
                self._pull_rows(peer, block, message)
            case Kind.PUSH:
                self._push(peer, block, message)
            case Kind.PUSH_ROWS:
                self._push_rows(peer, block, message)

    def _init(self, peer: Peer, block: sharding.Block, message: Message) -> None:
        header = message.header
        if peer.rank != 0 or self.ready:
            raise Refused("INIT is rank 0's, once")
        if header.dtype != Dtype.FLOAT32 or header.flags or header.offset != self._stored[block.key]:
            raise Refused("bad part of a block")
        if header.offset + header.count > block.numel:
            raise Refused("bad part of a block")
        self.shard.store(block.key, header.offset, codec.decode(message.payloads[0], header.dtype))
        self._stored[block.key] += header.count
        self._endpoint.answer(peer, Header(Kind.STORED, key=block.key, offset=header.offset))
        if all(self._stored[key] == b.numel for key, b in self.shard.blocks.items()):
            self.ready = True
            for key in self.shard.blocks:
                self.shard.set_version(key, 0)
            waiting, self._waiting_pulls = self._waiting_pulls, []
            for waiter, pull in waiting:
                self._pull(waiter, pull)

    def _pull(self, peer: Peer, header: Header) -> None:
        block = self.shard.blocks[header.key]
        if header.offset + header.count > block.numel or header.count * 4 > wire.MAX_MESSAGE_BYTES:
            raise Refused("bad part of a block")
        if not self.ready:
            self._waiting_pulls.append((peer, header))
            return
        part = self.shard.part(header.key, header.offset, header.count).clone()
        answer = Header(
            Kind.PART, Dtype.FLOAT32, key=header.key, step=header.step, offset=header.offset, count=header.count,
            version=self.rule.version[header.key],
        )  # fmt: skip
        self._endpoint.answer(peer, answer, part.numpy())

    def _push(self, peer: Peer, block: sharding.Block, message: Message) -> None:
        header = message.header
        self._check_push(header)
        if block.sparse or header.count != block.numel or header.rows:
            raise Refused("gradient does not have the block's shape")
        if header.flags & wire.SHARED:
            slab, start = self.slabs.get(peer.rank), self.shard.starts[block.key]
            if slab is None:
                raise Refused("no shared memory with this worker")
            gradient = torch.from_numpy(slab.floats[start : start + block.numel])
        elif header.dtype == self._dtype:
            gradient = codec.decode(message.payloads[0], header.dtype)
        else:
            raise Refused("gradient is not of the job's wire dtype")
        self._tally.pushed(peer.rank, block.key == self._first_key)
        for action in self.rule.push(block.key, peer.rank, header.step, header.version):
            if isinstance(action, consistency.Add):
                self._lr[block.key] = header.lr
                self._gradients[block.key] += 1
                self.shard.add(block.key, gradient, self._gradients[block.key])
            else:
                self.perform([action])

    def _push_rows(self, peer: Peer, block: sharding.Block, message: Message) -> None:
        header = message.header
        self._check_push(header)
        if not block.sparse or header.dtype != self._dtype or header.count != header.rows * block.shape[1]:
            raise Refused("gradient does not have the block's shape")
        rows = _checked_rows(block, message)
        values = codec.decode(message.payloads[1], header.dtype).view(header.rows, block.shape[1])
        self._tally.pushed(peer.rank, block.key == self._first_key)
        for action in self.rule.push(block.key, peer.rank, header.step, header.version):
            if isinstance(action, consistency.Add):
                self._lr[block.key] = header.lr
                self.shard.add_rows(block.key, rows, values)
            else:
                self.perform([action])

    def _check_push(self, header: Header) -> None:
        if header.offset or not math.isfinite(header.lr) or header.version > self.rule.version[header.key]:
            raise Refused("bad version or learning rate")
        if header.step >= 1 << 48:
            raise Refused("bad step")

    def _pull_rows(self, peer: Peer, block: sharding.Block, message: Message) -> None:
        header = message.header
        if not block.sparse or header.rows * block.shape[1] * 4 > wire.MAX_MESSAGE_BYTES:
            raise Refused("bad rows")
        values = self.shard.rows(block.key, _checked_rows(block, message)).reshape(-1)
        answer = Header(
            Kind.ROWS, self._dtype, key=block.key, step=header.step, count=len(values), rows=header.rows,
            version=self.rule.version[block.key],
        )  # fmt: skip
        self._endpoint.answer(peer, answer, codec.encode(values, self._dtype))

    def perform(self, actions: list[consistency.Action]) -> None:
        """Carry out what the rule has decided."""
        for action in actions:
            if isinstance(action, consistency.Apply):
                self.shard.apply(action.key, action.count, self._lr[action.key], action.version)
                self._gradients[action.key] = 0
            elif isinstance(action, consistency.Answer):
                self._answer(action)
            elif isinstance(action, consistency.Abort):
                self._abort(action)

    def _answer(self, action: consistency.Answer) -> None:
        block, version = self.shard.blocks[action.key], self.rule.version[action.key]
        self._tally.answered(action.rank, action.staleness, action.dropped)
        header = Header(
            Kind.WEIGHTS, flags=wire.DROPPED if action.dropped else 0, key=action.key, staleness=action.staleness, version=version
        )  # fmt: skip
        if block.sparse:
            self._endpoint.tell(action.rank, header._replace(kind=Kind.APPLIED))
        elif action.rank in self.slabs:
            shared = header._replace(flags=header.flags | wire.SHARED, dtype=Dtype.FLOAT32, count=block.numel)
            self._endpoint.tell(action.rank, shared, b"")
        else:
            full = header._replace(dtype=self._dtype, count=block.numel)
            self._endpoint.tell(action.rank, full, self._bytes(block, version))

    def _bytes(self, block: sharding.Block, version: int) -> Any:
        """A block's weights for the wire; answers of one version share them."""
        live = self.shard.part(block.key, 0, block.numel)
        if self._dtype == Dtype.FLOAT32 and self._frozen_while_sent:
            return live.numpy()
        kept = self._encoded.get(block.key)
        if kept is None or kept[0] != version:
            copy = live.clone() if self._dtype == Dtype.FLOAT32 else live
            kept = (version, codec.encode(copy, self._dtype))
            if self._shared_answers:
                self._encoded[block.key] = kept  # several workers get it
        return kept[1]


def _checked_rows(block: sharding.Block, message: Message) -> torch.Tensor:
    rows = shard.as_rows(message.payloads[0])
    if len(rows) and (int(rows.min()) < 0 or int(rows.max()) >= block.shape[0]):
        raise Refused("row out of range")
    return rows

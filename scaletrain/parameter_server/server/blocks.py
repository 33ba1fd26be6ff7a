"""A shard under the rules of a mode: takes gradients, carries out what ``consistency`` decides, answers with weights."""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import psutil
import torch

from scaletrain.parameter_server.protocol import codec, consistency, sharding, wire
from scaletrain.parameter_server.protocol.memory import Slab
from scaletrain.parameter_server.protocol.settings import Settings
from scaletrain.parameter_server.protocol.wire import Dtype, Header, Kind, Message, Refused
from scaletrain.parameter_server.server import shard
from scaletrain.parameter_server.server.endpoint import Endpoint, Peer
from scaletrain.parameter_server.server.tally import Tally

KINDS = {
    Kind.PUSH, Kind.PUSH_ROWS, Kind.PULL, Kind.PULL_ROWS, Kind.INIT, Kind.STATE, Kind.SET_STATE
}  # fmt: skip


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
        self.shard = shard.Shard(
            blocks, setup["optimizer"], settings.server_lr, settings.shared_memory
        )
        keys = list(self.shard.blocks)
        if settings.mode in ("async", "bounded"):
            bound = settings.staleness if settings.mode == "bounded" else None
            self.rule: consistency.Rule = consistency.Asynchronous(keys, settings.workers, bound)
        else:
            self.rule = consistency.Synchronous(
                keys, settings.workers, settings.backup_workers, settings.min_workers
            )
        self.ready = not keys  # all weights are there
        self.slabs: dict[int, Slab] = {}  # gradients of workers on this host
        self._first_key = min(keys, default=-1)
        self._stored = dict.fromkeys(keys, 0)  # elements of each block that rank 0 has sent so far
        self._states: dict[
            int, tuple[dict[str, torch.Tensor], dict[str, float]]
        ] = {}  # of a checkpoint, from rank 0
        self._partial: dict[
            tuple[int, int], torch.Tensor
        ] = {}  # gradients of which parts are still to come
        self._waiting_pulls: list[tuple[Peer, Header]] = []
        self._gradients: Counter[int] = Counter()  # in each block's sum
        self._lr: dict[int, float] = {}
        self._encoded: dict[int, tuple[int, Any]] = {}  # block -> version, bytes for the wire
        self._dtype = codec.BY_NAME[settings.wire]
        # A block that cannot change before all its answers were received is sent from where it lies.
        self._frozen_while_sent = (
            settings.mode not in ("async", "bounded") and not settings.backup_workers
        )
        self._shared_answers = (
            self._frozen_while_sent or settings.backup_workers > 0
        )  # several workers get one version

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
            case Kind.SET_STATE:
                self._set_state(peer, block, message)
            case Kind.PULL:
                self._pull(peer, header)
            case _ if not self.ready:
                raise Refused("weights are not there yet")
            case Kind.STATE:
                tensors, numbers = self.shard.state(block.key)
                shapes = [[name, list(value.shape)] for name, value in sorted(tensors.items())]
                self._endpoint.answer(
                    peer,
                    Header(Kind.STATES, key=block.key),
                    wire.to_json({"tensors": shapes, "numbers": numbers}),
                )
            case Kind.PULL_ROWS:
                self._pull_rows(peer, block, message)
            case Kind.PUSH:
                self._push(peer, block, message)
            case Kind.PUSH_ROWS:
                self._push_rows(peer, block, message)

    def _init(self, peer: Peer, block: sharding.Block, message: Message) -> None:
        header, key = message.header, block.key
        if peer.rank != 0 or self.ready:
            raise Refused("INIT is rank 0's, once")
        values = (
            codec.decode(message.payloads[0], Dtype.FLOAT32)
            if header.dtype == Dtype.FLOAT32
            else None
        )
        if values is None or header.flags:
            raise Refused("bad part of a block")
        if header.rows:  # of the optimizer's state
            tensors = self._states.get(key, ({}, {}))[0]
            self._part([t.view(-1) for t in tensors.values()], header).copy_(values)
        else:
            if header.offset != self._stored[key]:
                raise Refused("bad part of a block")
            self._part([], header).copy_(values)
            self._stored[key] += header.count
        self._endpoint.answer(
            peer, Header(Kind.STORED, key=key, rows=header.rows, offset=header.offset)
        )
        if all(self._stored[key] == b.numel for key, b in self.shard.blocks.items()):
            for number, (tensors, numbers) in self._states.items():
                self.shard.load_state(number, tensors, numbers)
            self.ready = True
            for number in self.shard.blocks:
                self.shard.set_version(number, 0)
            waiting, self._waiting_pulls = self._waiting_pulls, []
            for waiter, pull in waiting:
                self._pull(waiter, pull)

    def _set_state(self, peer: Peer, block: sharding.Block, message: Message) -> None:
        if peer.rank != 0 or self.ready or self._stored[block.key]:
            raise Refused("SET_STATE is rank 0's, before the weights")
        value = message.json()
        tensors, numbers = value.get("tensors"), value.get("numbers")
        if (
            not isinstance(tensors, list)
            or not isinstance(numbers, dict)
            or len(tensors) + len(numbers) > 16
        ):
            raise Refused("malformed state of an optimizer")
        made: dict[str, torch.Tensor] = {}
        for entry in tensors:
            name, shape = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
            if (
                not isinstance(name, str)
                or not isinstance(shape, list)
                or not all(type(n) is int and n > 0 for n in shape)
            ):
                raise Refused("malformed state of an optimizer")
            if sharding.Parameter(tuple(shape)).numel > block.numel:
                raise Refused("malformed state of an optimizer")
            made[name] = torch.zeros(shape)
        if not all(
            type(n) in (int, float) and math.isfinite(n) and abs(n) < 1 << 48
            for n in numbers.values()
        ):
            raise Refused("malformed state of an optimizer")
        self._states[block.key] = (dict(sorted(made.items())), numbers)
        self._endpoint.answer(peer, Header(Kind.STORED, key=block.key))

    def _pull(self, peer: Peer, header: Header) -> None:
        part = self._part(self.shard.state_tensors(header.key) if header.rows else [], header)
        if not self.ready:
            self._waiting_pulls.append((peer, header))
            return
        answer = Header(
            Kind.PART, Dtype.FLOAT32, key=header.key, rows=header.rows, step=header.step, offset=header.offset,
            count=header.count, version=self.rule.version[header.key],
        )  # fmt: skip
        self._endpoint.answer(peer, answer, part.to(torch.float32, copy=True).numpy())

    def _part(self, states: list[torch.Tensor], header: Header) -> torch.Tensor:
        """The live memory that INIT and PULL speak of. Raises ``Refused`` when it is not there."""
        block = self.shard.blocks[header.key]
        if header.rows > len(states):
            raise Refused("bad part of a block")
        numel = states[header.rows - 1].numel() if header.rows else block.numel
        if header.offset + header.count > numel or header.count * 4 > wire.MAX_MESSAGE_BYTES:
            raise Refused("bad part of a block")
        if header.rows:
            return states[header.rows - 1][header.offset : header.offset + header.count]
        return self.shard.part(header.key, header.offset, header.count)

    def _push(self, peer: Peer, block: sharding.Block, message: Message) -> None:
        header = message.header
        self._check_push(header)
        if block.sparse or header.rows or header.offset + header.count > block.numel:
            raise Refused("gradient does not have the block's shape")
        if header.flags & wire.SHARED:
            slab, start = self.slabs.get(peer.rank), self.shard.starts[block.key]
            if slab is None or header.count != block.numel:
                raise Refused("no shared memory with this worker")
            gradient = torch.from_numpy(slab.floats[start : start + block.numel])
        elif header.dtype == self._dtype:
            gradient = codec.decode(message.payloads[0], header.dtype)
        else:
            raise Refused("gradient is not of the job's wire dtype")
        if header.count != block.numel:
            whole = self._assemble(peer.rank, block, header, gradient)
            if whole is None:
                return
            gradient = whole
        self._tally.pushed(peer.rank, block.key == self._first_key)
        for action in self.rule.push(block.key, peer.rank, header.step, header.version):
            if isinstance(action, consistency.Add):
                self._lr[block.key] = header.lr
                self._gradients[block.key] += 1
                self.shard.add(block.key, gradient, self._gradients[block.key])
            else:
                self.perform([action])

    def _assemble(
        self, rank: int, block: sharding.Block, header: Header, part: torch.Tensor
    ) -> torch.Tensor | None:
        """Put a part to those before it; the whole gradient with the last one."""
        size = wire.MAX_TENSOR_BYTES // 4
        if header.offset % size or header.count != min(size, block.numel - header.offset):
            raise Refused("gradient does not have the block's shape")
        if header.offset == 0:
            self._partial[rank, block.key] = torch.empty(block.numel)
        whole = self._partial.get((rank, block.key))
        if whole is None:
            raise Refused("gradient does not have the block's shape")
        whole[header.offset : header.offset + header.count] = part
        return (
            self._partial.pop((rank, block.key))
            if header.offset + header.count == block.numel
            else None
        )

    def _push_rows(self, peer: Peer, block: sharding.Block, message: Message) -> None:
        header = message.header
        self._check_push(header)
        if (
            not block.sparse
            or header.offset
            or header.dtype != self._dtype
            or header.count != header.rows * block.shape[1]
        ):
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
        if not math.isfinite(header.lr) or header.version > self.rule.version[header.key]:
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
            shared = header._replace(
                flags=header.flags | wire.SHARED, dtype=Dtype.FLOAT32, count=block.numel
            )
            self._endpoint.tell(action.rank, shared, b"")
        else:
            values, size = self._bytes(block, version), wire.MAX_TENSOR_BYTES // 4
            for offset in range(0, block.numel, size):
                part = values[offset : offset + size]
                self._endpoint.tell(
                    action.rank,
                    header._replace(dtype=self._dtype, offset=offset, count=len(part)),
                    part,
                )

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

"""A shard under the rules of a mode.

Gradients come in, ``consistency`` decides their use, and weights go out.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from scaletrain.parameter_server.protocol import codec, consistency, wire
from scaletrain.parameter_server.protocol import optimizer as optimizers
from scaletrain.parameter_server.protocol.consistency import (
    AbortJob,
    Action,
    AddGradient,
    ApplyUpdate,
    RuleState,
    SendNorm,
    SendWeights,
    TakeMean,
)
from scaletrain.parameter_server.protocol.memory import Slab
from scaletrain.parameter_server.protocol.settings import Settings
from scaletrain.parameter_server.protocol.sharding import Block
from scaletrain.parameter_server.protocol.wire import Dtype, Header, Message, MessageKind, Refused
from scaletrain.parameter_server.server.endpoint import Endpoint, Peer
from scaletrain.parameter_server.server.initial import InitialValues, part_of, state_part
from scaletrain.parameter_server.server.shard import Shard
from scaletrain.parameter_server.server.tally import Tally

# The messages that are about one block.
KINDS = {
    MessageKind.PUSH, MessageKind.PUSH_ROWS, MessageKind.NORM, MessageKind.PULL, MessageKind.PULL_ROWS,
    MessageKind.INIT, MessageKind.STATE, MessageKind.SET_STATE,
}  # fmt: skip

_MAX_STEP = 1 << 48


class _Rows(NamedTuple):
    """Rows of a sparse gradient."""

    numbers: torch.Tensor  # int64 (n)
    values: torch.Tensor  # float32 (n, width)


@dataclass(frozen=True)
class _Encoded:
    """A block's weights as they travel."""

    version: int
    values: np.ndarray


class Blocks:
    """The blocks of one server, and the workers that push to them.

    Used by the server's only thread.

    Args:
        settings: of the job.
        shard: the blocks' weights and optimizers.
        endpoint: sends the answers.
        tally: counts gradients and answers.
        abort: called with the reason when training cannot go on.
        keep_first: called when all first values are there, before anybody hears of it.

    Attributes:
        rule: decides when the blocks are updated; knows which workers live.
        ready: all weights are there, from rank 0 or from a snapshot.
        slabs: by rank, where the gradients of workers on this host lie.
    """

    def __init__(
        self,
        settings: Settings,
        shard: Shard,
        endpoint: Endpoint,
        tally: Tally,
        abort: Callable[[str], None],
        keep_first: Callable[[], None],
    ):
        self.shard = shard
        self._endpoint = endpoint
        self._tally = tally
        self._abort = abort
        self._keep_first = keep_first
        keys = list(shard.blocks)
        self.rule = _rule(settings, keys)
        # A server without blocks has no weights to wait for.
        self.ready = not keys
        # Written by the server as workers join and are lost, read by _dense_gradient and _answer.
        self.slabs: dict[int, Slab] = {}
        self._initial = InitialValues(shard)
        # Rank 0's first values that were stored, but may be lost with this server; pulls that came
        # before the weights. Filled by _init, _set_state and _pull, emptied by _init.
        self._waiting_stores: list[tuple[Peer, Header]] = []
        self._waiting_pulls: list[tuple[Peer, Header]] = []
        self._first_key = min(keys, default=-1)  # its gradients mark the steps
        # By (rank, block): gradients of which parts are still to come. Written by _assemble and
        # _assemble_rows.
        self._partial: dict[tuple[int, int], torch.Tensor] = {}
        self._partial_rows: dict[tuple[int, int], list[_Rows]] = {}
        # By (rank, block): messages of a sparse gradient, each of which gets an answer. Written by
        # _push_rows, read by _answer.
        self._num_messages: dict[tuple[int, int], int] = {}
        # By block: the rate that came with its last gradient. Written by _contribute, read by
        # perform.
        self._learning_rate: dict[int, float] = {}
        # By block: the weights that were sent last. Written and read by _encoded_weights.
        self._encoded: dict[int, _Encoded] = {}
        self._dtype = codec.BY_NAME[settings.wire]
        # In these modes several workers get the weights of one version.
        self._answers_share_version = not settings.is_asynchronous
        # In these modes a block stays as it is until all workers have received it, so it is sent
        # without a copy.
        self._frozen_while_sent = self._answers_share_version and not settings.backup_workers

    @property
    def updates(self) -> int:
        """Updates of the least updated block."""
        return min(self.rule.version.values(), default=0)

    def restore(self, state: RuleState) -> None:
        """Go on with the rule's state in a snapshot that was loaded into the shard."""
        self.rule.restore(state)
        for key, version in state.versions.items():
            self.shard.set_version(key, version)
        self.ready = True

    def handle(self, peer: Peer, message: Message) -> None:
        """Handle a message of one of ``KINDS``. Raises ``Refused``."""
        block = self.shard.blocks.get(message.header.key)
        if block is None:
            raise Refused("unknown block")
        match message.header.kind:
            case MessageKind.INIT:
                self._init(peer, block, message)
            case MessageKind.SET_STATE:
                self._set_state(peer, block, message)
            case MessageKind.PULL:
                self._pull(peer, message.header)
            # All cases from here on need weights.
            case _ if not self.ready:
                raise Refused("weights are not there yet")
            case MessageKind.STATE:
                self._send_state(peer, block)
            case MessageKind.PULL_ROWS:
                self._pull_rows(peer, block, message)
            case MessageKind.PUSH:
                self._push(peer, block, message)
            case MessageKind.PUSH_ROWS:
                self._push_rows(peer, block, message)
            case MessageKind.NORM:
                self._ask_norm(peer, message.header)

    def scale(self, message: Message) -> None:
        """Let the held updates of a step be made. Raises ``Refused``."""
        header = message.header
        if header.dtype != Dtype.FLOAT64 or header.count != 2 or header.step >= _MAX_STEP:
            raise Refused("bad scaling")
        factor, limit = np.frombuffer(message.payloads[0], np.float64).tolist()
        # A factor that is not a number comes from gradients that are not: torch goes on with both.
        if factor < 0 or factor > 1 or not limit > 0:
            raise Refused("bad scaling")
        rule = self._holding_rule()
        self.perform(rule.scale(consistency.Scaling(header.step, factor, limit)))

    def _holding_rule(self) -> consistency.Synchronous:
        """Return the rule, which may hold updates back. Raises ``Refused`` if it never does."""
        if not isinstance(self.rule, consistency.Synchronous):
            raise Refused("every gradient is an update of its own here")
        return self.rule

    def perform(self, actions: list[Action]) -> None:
        """Carry out the decisions of the rule, except ``AddGradient`` (see ``_contribute``)."""
        for action in actions:
            match action:
                case TakeMean(key, num_gradients):
                    self.shard.take_mean(key, num_gradients)
                case SendNorm():
                    self._send_norm(action)
                case ApplyUpdate(key, num_gradients, version, scaling):
                    rate = self._learning_rate[key]
                    try:
                        self.shard.apply(key, num_gradients, rate, version, scaling)
                    except Exception as error:  # of any kind: it is all in the workers' options
                        self._abort(
                            f"the optimizer cannot make the update: {type(error).__name__}: {error}"
                        )
                        return
                case SendWeights():
                    self._answer(action)
                case AbortJob():
                    self._abort(self._in_words(action))

    def _in_words(self, action: AbortJob) -> str:
        """Return why training cannot go on without a worker."""
        # The rule aborts only on a loss, which the server has just noted.
        reason = self._tally.lost[-1].reason
        return (
            f"worker rank {action.rank} was lost ({reason});"
            f" {action.alive} of {self.rule.workers} workers are left"
            f" and an update takes {action.needed}"
            " (exchange.min_workers lets the job go on with fewer)"
        )

    # First values, and values for checkpoints

    def _init(self, peer: Peer, block: Block, message: Message) -> None:
        """Store part of the first values. The last part answers everything that waits.

        Nothing is answered before. If this server dies first, its successor gets all of them again.
        """
        if self._takes_first_values(peer, message.header):
            self._initial.store(block, message)
            self._waiting_stores.append((peer, message.header))
        if self.ready or not self._initial.complete():
            return
        self._initial.finish()
        self.ready = True
        self._keep_first()
        stores, self._waiting_stores = self._waiting_stores, []
        for waiting_peer, store in stores:
            self._say_stored(waiting_peer, store)
        pulls, self._waiting_pulls = self._waiting_pulls, []
        for waiting_peer, pull in pulls:
            self._pull(waiting_peer, pull)

    def _set_state(self, peer: Peer, block: Block, message: Message) -> None:
        """Take the optimizer's state of a checkpoint. Its tensors follow by INIT."""
        if self._takes_first_values(peer, message.header):
            self._initial.set_state(block, message)
            self._waiting_stores.append((peer, message.header))

    def _takes_first_values(self, peer: Peer, header: Header) -> bool:
        """Return True for a first value that is to be stored.

        If all of them are there, the answer was lost with a connection: rank 0 gets another one.

        Raises:
            Refused: they come from another rank.
        """
        if peer.rank != 0:
            raise Refused("first values are rank 0's")
        if self.ready:
            self._say_stored(peer, header)
        return not self.ready

    def _say_stored(self, peer: Peer, header: Header) -> None:
        """Answer one of rank 0's first values, by its number."""
        self._endpoint.answer(peer, Header(MessageKind.STORED, key=header.key, step=header.step))

    def _send_state(self, peer: Peer, block: Block) -> None:
        """Send the optimizer's state for a checkpoint; its tensors are fetched by PULL."""
        state = self.shard.state(block.key)
        shapes = [[name, list(tensor.shape)] for name, tensor in sorted(state.tensors.items())]
        payload = wire.to_json({"tensors": shapes, "numbers": state.numbers})
        self._endpoint.answer(peer, Header(MessageKind.STATES, key=block.key), payload)

    def _pull(self, peer: Peer, header: Header) -> None:
        """Send part of a block's weights or state, as soon as rank 0 has stored the weights."""
        part = self._part(header)
        if not self.ready:
            self._waiting_pulls.append((peer, header))
            return
        answer = Header(
            MessageKind.PART,
            Dtype.FLOAT32,
            key=header.key,
            rows=header.rows,
            step=header.step,
            offset=header.offset,
            count=header.count,
            version=self.rule.version[header.key],
        )
        # A copy: ZeroMQ sends it later, and an update may change the weights before.
        self._endpoint.answer(peer, answer, part.to(torch.float32, copy=True).numpy())

    def _part(self, header: Header) -> torch.Tensor:
        """Return the memory that PULL asks for, flat float32 (count). Raises ``Refused``."""
        if header.rows:
            return state_part(self.shard.state(header.key), header)
        return part_of(self.shard.weights(header.key), header)

    def _pull_rows(self, peer: Peer, block: Block, message: Message) -> None:
        """Send the weights of some rows of a sparse table."""
        header = message.header
        if not block.sparse or header.rows * block.shape[1] * 4 > wire.MAX_MESSAGE_BYTES:
            raise Refused("bad rows")
        rows = _checked_numbers(message.payloads[0], block.shape[0])
        values = self.shard.rows(block.key, rows).reshape(-1)
        answer = Header(
            MessageKind.ROWS,
            self._dtype,
            key=block.key,
            step=header.step,
            count=len(values),
            rows=header.rows,
            version=self.rule.version[block.key],
        )
        self._endpoint.answer(peer, answer, codec.encode(values, self._dtype))

    # Gradients

    def _push(self, peer: Peer, block: Block, message: Message) -> None:
        """Take a dense gradient, or a part of one."""
        header = message.header
        self._check_push(header)
        if block.sparse or header.offset + header.count > block.numel:
            raise Refused("gradient does not have the block's shape")
        absent = _checked_numbers(message.payloads[1], len(block.pieces)).tolist()
        gradient = self._dense_gradient(peer.rank, block, message)
        if header.count != block.numel:
            whole = self._assemble(peer.rank, block, header, gradient)
            if whole is None:
                return
            gradient = whole
        self._contribute(
            peer.rank, header, lambda: self.shard.add(block.key, peer.rank, gradient, absent)
        )

    def _dense_gradient(self, rank: int, block: Block, message: Message) -> torch.Tensor:
        """Return the gradient in a message or in shared memory, float32 (count), not copied.

        Raises:
            Refused: it is neither in the worker's slab nor of the job's type.
        """
        header = message.header
        if header.flags & wire.SHARED:
            slab = self.slabs.get(rank)
            if slab is None or header.count != block.numel:
                raise Refused("no shared memory with this worker")
            start = self.shard.starts[block.key]
            return torch.from_numpy(slab.floats[start : start + block.numel])
        if header.dtype != self._dtype:
            raise Refused("gradient is not of the job's wire dtype")
        return codec.decode(message.payloads[0], header.dtype)

    def _assemble(
        self, rank: int, block: Block, header: Header, part: torch.Tensor
    ) -> torch.Tensor | None:
        """Append a part of a gradient to those before it.

        Returns:
            The whole gradient, float32 (numel), with the last part; None before.
        """
        size = wire.MAX_TENSOR_BYTES // 4
        end = header.offset + header.count
        # Workers cut a gradient at multiples of this size only (``Client.push``).
        if header.offset % size or header.count != min(size, block.numel - header.offset):
            raise Refused("gradient does not have the block's shape")
        if header.offset == 0:
            self._partial[rank, block.key] = torch.empty(block.numel)
        whole = self._partial.get((rank, block.key))
        if whole is None:
            raise Refused("gradient does not have the block's shape")
        whole[header.offset : end] = part
        if end < block.numel:
            return None
        return self._partial.pop((rank, block.key))

    def _push_rows(self, peer: Peer, block: Block, message: Message) -> None:
        """Take a sparse gradient, or a part of one."""
        header = message.header
        self._check_push(header)
        if not block.sparse or header.dtype != self._dtype:
            raise Refused("gradient does not have the block's shape")
        width = block.shape[1]
        if header.count != header.rows * width:
            raise Refused("gradient does not have the block's shape")
        numbers = _checked_numbers(message.payloads[0], block.shape[0])
        values = codec.decode(message.payloads[1], header.dtype).view(header.rows, width)
        parts = self._assemble_rows(peer.rank, block, header, _Rows(numbers, values))
        if header.flags & wire.MORE:
            return
        self._num_messages[peer.rank, block.key] = len(parts)
        if len(parts) > 1:
            numbers = torch.cat([part.numbers for part in parts])
            values = torch.cat([part.values for part in parts])
        is_absent = bool(header.flags & wire.ABSENT)
        self._contribute(
            peer.rank,
            header,
            lambda: self.shard.add_rows(block.key, peer.rank, numbers, values, is_absent),
        )

    def _assemble_rows(self, rank: int, block: Block, header: Header, part: _Rows) -> list[_Rows]:
        """Append a part of a sparse gradient to those before it; return all of them.

        Raises:
            Refused: a part before it is missing, or they are more rows than the block has.
        """
        parts = self._partial_rows.pop((rank, block.key), [])
        if header.offset == 0:
            parts = []
        num_before = sum(len(before.numbers) for before in parts)
        is_one_of_several = bool(header.offset or header.flags & wire.MORE)
        if header.offset != num_before or (is_one_of_several and not header.rows):
            raise Refused("gradient does not have the block's shape")
        if is_one_of_several and num_before + header.rows > block.shape[0]:
            raise Refused("gradient does not have the block's shape")
        parts.append(part)
        if header.flags & wire.MORE:
            self._partial_rows[rank, block.key] = parts
        return parts

    def _check_push(self, header: Header) -> None:
        """Raise ``Refused`` unless version, learning rate and step of a gradient can be."""
        if not optimizers.is_number(header.lr) or header.version > self.rule.version[header.key]:
            raise Refused("bad version or learning rate")
        if header.step >= _MAX_STEP:
            raise Refused("bad step")
        if header.flags & wire.HELD:
            self._holding_rule()

    def _ask_norm(self, peer: Peer, header: Header) -> None:
        """Take a worker's question for the norm of a mean gradient. Raises ``Refused``."""
        if header.step >= _MAX_STEP:
            raise Refused("bad step")
        self.perform(self._holding_rule().ask_norm(header.key, peer.rank, header.step))

    def _contribute(self, rank: int, header: Header, add: Callable[[], None]) -> None:
        """Let the rule decide on a gradient; ``add`` puts it into the block's sum."""
        self._tally.pushed(rank, header.key == self._first_key)
        # The rule may drop a gradient that comes too late: then ``add`` is never called.
        held = bool(header.flags & wire.HELD)
        for action in self.rule.push(header.key, rank, header.step, header.version, held=held):
            if isinstance(action, AddGradient):
                self._learning_rate[header.key] = header.lr
                add()
            else:
                self.perform([action])

    # Answers

    def _send_norm(self, action: SendNorm) -> None:
        """Tell a worker the squared norm of a mean gradient, or the factor that it had."""
        if not action.made:
            value = self.shard.squared_norm(action.key)
        elif self.rule.scaling is None:
            value = math.nan  # it went with the server before this one
        else:
            value = self.rule.scaling.factor
        header = Header(
            MessageKind.NORMS,
            Dtype.FLOAT64,
            flags=wire.MADE if action.made else 0,
            key=action.key,
            step=action.step,
            count=1,
        )
        self._endpoint.tell(action.rank, header, np.array([value]))

    def _answer(self, action: SendWeights) -> None:
        """Answer a gradient with the block's weights, or say where they are."""
        block = self.shard.blocks[action.key]
        self._tally.answered(action.rank, action.staleness, action.dropped)
        header = Header(
            MessageKind.WEIGHTS,
            flags=wire.DROPPED if action.dropped else 0,
            key=action.key,
            staleness=action.staleness,
            step=self.rule.next_step(action.key),
            version=self.rule.version[action.key],
        )
        if block.sparse:
            # The worker pulls the rows that its next batch reads.
            for _ in range(self._num_messages.get((action.rank, action.key), 1)):
                self._endpoint.tell(action.rank, header._replace(kind=MessageKind.APPLIED))
        elif action.rank in self.slabs:
            flags = header.flags | wire.SHARED
            header = header._replace(flags=flags, dtype=Dtype.FLOAT32, count=block.numel)
            self._endpoint.tell(action.rank, header, b"")
        else:
            self._send_weights(action.rank, block, header)

    def _send_weights(self, rank: int, block: Block, header: Header) -> None:
        """Send a block's weights in messages of at most ``MAX_TENSOR_BYTES``."""
        values = self._encoded_weights(block, header.version)
        size = wire.MAX_TENSOR_BYTES // 4
        for offset in range(0, block.numel, size):
            part = values[offset : offset + size]
            part_header = header._replace(dtype=self._dtype, offset=offset, count=len(part))
            self._endpoint.tell(rank, part_header, part)

    def _encoded_weights(self, block: Block, version: int) -> np.ndarray:
        """Return a block's weights for the wire; answers of one version share them.

        ZeroMQ sends them later, from this memory. They are a copy, unless nothing can change them
        until they were received.
        """
        weights = self.shard.weights(block.key)
        if self._dtype == Dtype.FLOAT32 and self._frozen_while_sent:
            return weights.numpy()
        encoded = self._encoded.get(block.key)
        if encoded is not None and encoded.version == version:
            return encoded.values
        if self._dtype == Dtype.FLOAT32:
            weights = weights.clone()
        encoded = _Encoded(version, codec.encode(weights, self._dtype))
        if self._answers_share_version:
            self._encoded[block.key] = encoded
        return encoded.values


def _rule(settings: Settings, keys: list[int]) -> consistency.Rule:
    """Return the rule of the job's mode for blocks with these keys."""
    if settings.is_asynchronous:
        bound = settings.staleness if settings.mode == "bounded" else None
        return consistency.Asynchronous(keys, settings.workers, bound)
    return consistency.Synchronous(
        keys, settings.workers, settings.backup_workers, settings.min_workers
    )


def _checked_numbers(payload: memoryview, end: int) -> torch.Tensor:
    """Return the numbers of rows or pieces in a payload, int64 (n), each below ``end``.

    Raises:
        Refused: one is out of range.
    """
    numbers = np.frombuffer(payload, np.int64)
    if len(numbers) and (int(numbers.min()) < 0 or int(numbers.max()) >= end):
        raise Refused("row out of range")
    return torch.from_numpy(numbers)

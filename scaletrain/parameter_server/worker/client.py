"""A worker's end of the parameter servers: pushes gradients and receives weights.

Nothing here blocks the network: an ``IoThread`` sends and receives while the caller computes.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from scaletrain.parameter_server.protocol import codec, memory, wire
from scaletrain.parameter_server.protocol.consistency import Scaling
from scaletrain.parameter_server.protocol.settings import Settings
from scaletrain.parameter_server.protocol.sharding import Block
from scaletrain.parameter_server.protocol.wire import Dtype, Header, MessageKind
from scaletrain.parameter_server.worker.io_thread import IoThread, Position, scale_request
from scaletrain.parameter_server.worker.link import Identity, ServerLink
from scaletrain.parameter_server.worker.requests import (
    Answered,
    Part,
    Requests,
    ServerError,
    Token,
    Topic,
)
from scaletrain.run import progress
from scaletrain.timeouts import Timeouts

PART_ELEMENTS = 1 << 20  # first weights and whole tables travel in parts of 4 MiB


class PushResult(NamedTuple):
    """The fate of a pushed gradient."""

    staleness: int  # updates between the weights it came from and its own update
    dropped: bool  # it came too late and was not used


class HeldNorm(NamedTuple):
    """A server's word on the held gradient of one block."""

    step: int  # of its update
    value: float  # the mean's sum of squares; if the update is made, its factor (NaN: unknown)
    made: bool  # the update is made


class Client:
    """Connects worker ``rank`` with all servers of a job.

    The methods are called by one thread, the one that trains, unless they say otherwise. In a step
    it pushes the gradient of each block as soon as it is complete, goes on with backward, and takes
    the new weights in the end:

        client = Client(settings, run_dir, rank, blocks, optimizer)
        for block in blocks:  # backward makes the last ones first
            client.gradient(block.key)[:] = ...
            client.push(block.key, step, lr)
        for block in blocks:
            client.take(block.key, weights[block.key].copy_)
        client.close()

    Args:
        settings: of the job.
        run_dir: the job's directory, where servers write their addresses.
        rank: this worker.
        blocks: the whole plan, the same on all workers.
        optimizer: description of the server's optimizer (``optimizer.describe``).

    Attributes:
        initialised: whether all servers have weights; written at the start.
        met_step: the step at which the workers had last met for a sum; written at the start.

    Raises:
        ServerError: by all methods; it names the server and its trouble.
    """

    def __init__(
        self,
        settings: Settings,
        run_dir: Path,
        rank: int,
        blocks: Sequence[Block],
        optimizer: dict[str, Any],
    ):
        self.settings = settings
        self.rank = rank
        self._blocks = {block.key: block for block in blocks}
        self._dtype = codec.BY_NAME[settings.wire]
        # Gradients on their way, by block, without shared memory. Filled by ``gradient``.
        self._buffers: dict[int, np.ndarray] = {}
        self._requests = Requests()
        if not settings.shared_memory:
            memory.keep_freed()
        identity = Identity.make(settings, run_dir, rank, optimizer)
        self._links = []
        for server in range(settings.servers):
            owned = [block for block in blocks if block.server == server]
            self._links.append(ServerLink(identity, server, owned))
        self._position = Position(step=0, versions=dict.fromkeys(self._blocks, 0))
        # By block: the job's step that its next update belongs to, by the servers' last answers.
        self._next_steps = dict.fromkeys(self._blocks, 0)
        self._flags = 0  # of every gradient; written by ``hold``
        self._sum_number = -1  # of the last sum
        self._storing: list[Token] = []  # first values that were sent and not answered yet
        self._num_stored = 0  # first values that were sent so far
        self.initialised = True
        self.met_step = -1
        self._connect()
        self._io = IoThread(identity, self._links, self._requests, self._position)
        self._io.start()

    def _connect(self) -> None:
        """Join all servers, one after the other, and learn how far the job has come."""
        deadline = time.monotonic() + Timeouts(self.settings.timeout_s).join_s
        steps = []
        for link in self._links:
            with progress.waiting("the parameter servers"):
                ready = link.connect(deadline, None)
            self._position.versions.update(ready.versions)
            steps.append(ready.step)
            self.initialised = self.initialised and ready.initialised
            # Server 0 alone adds up sums (``IoThread._route``).
            if link.index == 0:
                self.met_step = ready.met_step
        # Some may have done a step without this worker before it reached them: its gradient comes
        # too late there. Another one waits for it.
        self._position.step = min(steps)

    # Weights and optimizer state

    def store(self, key: int, values: Tensor, item: int = 0) -> None:
        """Send a block's first weights (rank 0, before training). Does not wait.

        ``wait_until_stored`` does, once all blocks were sent.

        Args:
            key: the block.
            values: float32, one dimension, on the CPU.
            item: 0 for weights; i to set the i-th tensor that ``set_state`` has announced.
        """
        for offset in range(0, len(values), PART_ELEMENTS):
            part = values[offset : offset + PART_ELEMENTS].contiguous().numpy()
            header = Header(
                MessageKind.INIT, Dtype.FLOAT32, key=key, rows=item, offset=offset, count=len(part)
            )
            self._send_first(header, part)

    def _send_first(self, header: Header, payload: Any) -> None:
        """Send first values under a number of their own, which the answer names."""
        self._num_stored += 1
        token = Token(Topic.STORE, header.key, self._num_stored)
        header = header._replace(step=self._num_stored)
        self._storing.append(self._requests.ask(token, header, [payload]))

    def wait_until_stored(self) -> None:
        """Wait until all servers have all first values, for good where servers are restarted."""
        for token in self._storing:
            self._requests.wait(token)
        self._storing.clear()

    def pull(self, key: int, sink: Callable[[int, Tensor], None]) -> None:
        """Fetch a block's weights as they are. Waits until rank 0 has stored them.

        Args:
            key: the block.
            sink: called part by part with the part's first element and its values (float32, one
                dimension, read-only).
        """
        answered = self._pull(key, 0, self._blocks[key].numel, sink)
        if answered is not None:
            self._note_version(key, answered, answered.message.header.version)

    def _pull(
        self, key: int, item: int, numel: int, sink: Callable[[int, Tensor], None]
    ) -> Answered | None:
        """Fetch weights (``item`` 0) or a tensor of the optimizer's state.

        Returns:
            The last answer; None: there are no elements.
        """
        tokens = []
        for offset in range(0, numel, PART_ELEMENTS):
            count = min(PART_ELEMENTS, numel - offset)
            header = Header(MessageKind.PULL, key=key, rows=item, offset=offset, count=count)
            tokens.append(self._requests.ask(Token(Topic.PART, key, offset), header, []))
        answered = None
        for token in tokens:
            answered = self._requests.wait(token)
            message = answered.message
            sink(token.part, codec.decode(message.payloads[0], message.header.dtype))
        return answered

    def state(self, key: int) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return the optimizer's state of a block as it is on the server.

        Returns:
            Tensors (float32) and numbers, both by name.
        """
        token = self._requests.ask(Token(Topic.STATE, key), Header(MessageKind.STATE, key=key), [])
        description = self._requests.wait(token).message.json()
        tensors = {}
        for item, (name, shape) in enumerate(description["tensors"], 1):
            tensor = torch.empty(shape)
            flat = tensor.view(-1)

            def sink(offset: int, values: Tensor, flat: Tensor = flat) -> None:
                flat[offset : offset + len(values)] = values

            self._pull(key, item, tensor.numel(), sink)
            tensors[name] = tensor
        return tensors, description["numbers"]

    def set_state(self, key: int, tensors: dict[str, Tensor], numbers: dict[str, float]) -> None:
        """Send the optimizer's state of a block (rank 0, before ``store``). Does not wait.

        Args:
            key: the block.
            tensors: float32, by name, as ``state`` returns them.
            numbers: by name, as ``state`` returns them.
        """
        # The server numbers the tensors by their sorted names (``OptimizerState.flat_tensors``).
        by_name = sorted(tensors.items())
        shapes = [[name, list(tensor.shape)] for name, tensor in by_name]
        description = wire.to_json({"tensors": shapes, "numbers": numbers})
        self._send_first(Header(MessageKind.SET_STATE, key=key), description)
        for item, (_, tensor) in enumerate(by_name, 1):
            self.store(key, tensor.reshape(-1), item)

    # Dense gradients

    def gradient(self, key: int) -> np.ndarray:
        """Return the memory in which a dense block's gradient must lie before ``push``.

        With shared memory the server reads it there. It may be written again after ``take``. Any
        thread may call this.

        Returns:
            float32, one dimension, as many elements as the block.
        """
        block = self._blocks[key]
        link = self._links[block.server]
        if link.shared and link.gradients is not None:
            start = link.starts[key]
            return link.gradients.floats[start : start + block.numel]
        if key not in self._buffers:
            self._buffers[key] = np.zeros(block.numel, np.float32)
        return self._buffers[key]

    def push(self, key: int, step: int, lr: float, absent: Sequence[int] = ()) -> None:
        """Send the contents of ``gradient(key)``. Does not wait; ``take`` receives the answer.

        Any thread may call this.

        Args:
            key: the block.
            step: the job's step that the gradient belongs to.
            lr: the learning rate of the update.
            absent: numbers of the block's pieces that have no gradient; zeros lie in their place.
        """
        values = self.gradient(key)
        pieces = np.array(absent, np.int64)
        header = Header(
            MessageKind.PUSH,
            self._dtype,
            key=key,
            step=step,
            count=len(values),
            rows=len(pieces),
            lr=lr,
            flags=self._flags,
        )
        if self._link(key).shared:
            # Only the header travels: the server reads the gradient where it lies.
            flags = header.flags | wire.SHARED
            header = header._replace(flags=flags, dtype=Dtype.FLOAT32)
            self._requests.ask(Token(Topic.UPDATE, key), header, [b"", pieces])
            return
        encoded = codec.encode(torch.from_numpy(values), self._dtype)
        size = wire.MAX_TENSOR_BYTES // 4
        parts = []
        for offset in range(0, len(values), size):
            part = encoded[offset : offset + size]
            parts.append(Part(header._replace(offset=offset, count=len(part)), [part, pieces]))
        self._requests.ask_in_parts(Token(Topic.UPDATE, key), parts)

    def take(self, key: int, sink: Callable[[Tensor], None]) -> PushResult:
        """Wait for the answer to ``push``.

        Args:
            key: the block.
            sink: called with the block's new weights (float32, one dimension, read-only). It may be
                called again with newer weights: in shared memory an update can come in between.
        """
        answered = self._requests.wait(Token(Topic.UPDATE, key))
        header = answered.message.header
        if header.flags & wire.SHARED:
            version = self._take_shared(key, answered, sink)
        else:
            sink(_values(answered))
            version = header.version
        return self._finish_push(key, answered, version)

    def _take_shared(self, key: int, answered: Answered, sink: Callable[[Tensor], None]) -> int:
        """Hand over weights that lie in the server's memory; return their version.

        The server may update them meanwhile (in asynchronous modes). The sequence number tells: it
        is odd during an update, and each update adds two.

        1. Read the number; try again while it is odd. If the server was killed in mid-update, it
           stays odd: take the weights of the server's successor instead.
        2. Hand the weights to ``sink``.
        3. Read the number again. If it has changed, the weights may be a mixture: back to step 1.
        """
        slab = answered.weights
        assert slab is not None
        link = self._link(key)
        start = link.starts[key]
        place = link.sequence_index[key]
        values = torch.from_numpy(slab.floats[start : start + self._blocks[key].numel])
        while True:
            before = int(slab.sequence[place])
            if before % 2 == 0:
                sink(values)
                if int(slab.sequence[place]) == before:
                    return before // 2
            elif link.epoch != answered.epoch:
                return self._take_from_successor(key, sink)
            self._requests.check()
            time.sleep(0)  # let another thread or process run

    def _take_from_successor(self, key: int, sink: Callable[[Tensor], None]) -> int:
        """Hand over a block's weights as the server's successor has them; return their version."""
        values = torch.empty(self._blocks[key].numel)

        def write(offset: int, part: Tensor) -> None:
            values[offset : offset + len(part)] = part

        self.pull(key, write)
        sink(values)
        return self._position.versions[key]

    # Held gradients

    def hold(self) -> None:
        """Let the updates of all gradients from now on wait for ``scale``. For good."""
        self._flags = wire.HELD

    def norms(self, step: int) -> list[HeldNorm]:
        """Return the norm of each block's mean gradient, in the order of the blocks.

        Waits until the servers have the gradients of enough workers.

        Args:
            step: the job's step that all gradients were pushed with.
        """
        tokens = []
        for key in self._blocks:
            header = Header(MessageKind.NORM, key=key, step=step)
            tokens.append(self._requests.ask(Token(Topic.NORM, key), header, []))
        norms = []
        for token in tokens:
            message = self._requests.wait(token).message
            [value] = np.frombuffer(message.payloads[0], np.float64).tolist()
            made = bool(message.header.flags & wire.MADE)
            norms.append(HeldNorm(message.header.step, value, made))
        return norms

    def scale(self, scaling: Scaling) -> None:
        """Let the servers make the updates of a step. Waits until they have heard it."""
        tokens = []
        for link in self._links:
            token = Token(Topic.SCALE, link.index, scaling.step)
            tokens.append(self._requests.ask(token, *scale_request(scaling)))
        self._position.scaling = scaling
        for token in tokens:
            self._requests.wait(token)

    # Sparse gradients

    def push_rows(
        self,
        key: int,
        step: int,
        lr: float,
        rows: Tensor,
        values: Tensor,
        is_absent: bool = False,
    ) -> None:
        """Send a sparse gradient. Does not wait; ``take_rows`` receives the answer.

        Args:
            key: the block, part of a sparse table.
            step: the job's step that the gradient belongs to.
            lr: the learning rate of the update.
            rows: row numbers within the block, int64, (n,).
            values: float32, (n, width of the table).
            is_absent: the table has no gradient in this step; ``rows`` is empty.
        """
        flags = self._flags | (wire.ABSENT if is_absent else 0)
        header = Header(MessageKind.PUSH_ROWS, self._dtype, key=key, step=step, flags=flags, lr=lr)
        size = self._rows_of_a_message(key)
        parts = []
        for offset in range(0, max(1, len(rows)), size):  # without rows there is a message, too
            some_rows = rows[offset : offset + size].contiguous().numpy()
            some_values = values[offset : offset + size].reshape(-1).contiguous()
            payload = codec.encode(some_values, self._dtype)
            is_last = offset + size >= len(rows)
            part_header = header._replace(
                flags=flags if is_last else flags | wire.MORE,
                rows=len(some_rows),
                offset=offset,
                count=payload.size,
            )
            parts.append(Part(part_header, [some_rows, payload]))
        self._requests.ask_in_parts(Token(Topic.UPDATE, key), parts)

    def take_rows(self, key: int) -> PushResult:
        """Wait until a sparse gradient has been used."""
        answered = self._requests.wait(Token(Topic.UPDATE, key))
        return self._finish_push(key, answered, answered.message.header.version)

    def ask_rows(self, key: int, rows: Tensor) -> None:
        """Ask for rows of a sparse table. Does not wait; ``rows`` receives them.

        Args:
            key: the block.
            rows: row numbers within the block, int64, (n,).
        """
        parts = []
        for some_rows in rows.split(self._rows_of_a_message(key)):
            header = Header(MessageKind.PULL_ROWS, key=key, rows=len(some_rows))
            parts.append(Part(header, [some_rows.contiguous().numpy()]))
        self._requests.ask_in_parts(Token(Topic.ROWS, key), parts)

    def rows(self, key: int) -> Tensor:
        """Wait for the rows asked for, float32, (n, width of the table)."""
        answered = self._requests.wait(Token(Topic.ROWS, key))
        # An update may come between the parts. The gradient is at most as stale as its oldest rows.
        version = min(message.header.version for message in answered.messages)
        self._note_version(key, answered, version)
        return _values(answered).view(-1, self._blocks[key].shape[1])

    def _rows_of_a_message(self, key: int) -> int:
        """Return how many rows of a sparse table travel in one message at most."""
        return max(1, wire.MAX_TENSOR_BYTES // (4 * self._blocks[key].shape[1]))

    # The job

    @property
    def step(self) -> int:
        """The job's next step, as this worker knows it. The caller sets it after each step."""
        return self._position.step

    @step.setter
    def step(self, step: int) -> None:
        self._position.step = step

    @property
    def bytes_sent(self) -> int:
        """Bytes sent so far, with the gradients that were left in shared memory."""
        return self._io.bytes_sent

    @property
    def bytes_received(self) -> int:
        """Bytes received so far, with the weights that were read from shared memory."""
        return self._io.bytes_received

    def job_step(self) -> int:
        """Return the job's step that comes next in all blocks, as far as this worker has heard."""
        return min(self._next_steps.values(), default=0)

    def live_workers(self) -> int:
        """Return how many workers live, by the first server's last word; 0 before its first."""
        return self._links[0].live_workers

    def sum(self, values: np.ndarray, step: int = 0) -> np.ndarray:
        """Return the sum of a vector over all live workers. Every worker calls it.

        A long vector travels in parts, one after the other: a server keeps one of each worker.

        Args:
            values: float64, one dimension, as many of every worker.
            step: of the job, which comes next for all of them; 0: they all begin together.
        """
        if self.settings.backup_workers:
            # Workers that are behind go on without this worker's gradients.
            self._ask_all(Topic.PAUSE, MessageKind.PAUSE)
        totals = []
        for begin in range(0, max(len(values), 1), wire.MAX_SUM_VALUES):
            totals.append(self._sum_part(values[begin : begin + wire.MAX_SUM_VALUES], step))
        return np.concatenate(totals)

    def _sum_part(self, values: np.ndarray, step: int) -> np.ndarray:
        """Return the sum of at most ``wire.MAX_SUM_VALUES`` values."""
        number = max(self._sum_number + 1, step * wire.SUMS_OF_A_STEP)
        self._sum_number = number
        header = Header(MessageKind.SUM, Dtype.FLOAT64, step=number, count=len(values))
        payload = np.ascontiguousarray(values, np.float64)
        token = self._requests.ask(Token(Topic.SUM, number), header, [payload])
        return np.frombuffer(self._requests.wait(token).message.payloads[0], np.float64)

    def fail(self, message: str) -> None:
        """End all waiting, now and later, with a ``ServerError``. Any thread may call it."""
        self._requests.fail(ServerError(message))

    def close(self) -> None:
        """Leave in good order: the servers go on without this worker."""
        self._ask_all(Topic.LEAVE, MessageKind.LEAVE)
        self._io.stop()
        self._requests.close()

    def _ask_all(self, topic: Topic, kind: MessageKind) -> None:
        """Send a message without contents to all servers, and wait for all answers."""
        tokens = [Token(topic, link.index) for link in self._links]
        for token in tokens:
            self._requests.ask(token, Header(kind), [])
        for token in tokens:
            self._requests.wait(token)

    def _link(self, key: int) -> ServerLink:
        """Return the link to the server that owns a block."""
        return self._links[self._blocks[key].server]

    def _finish_push(self, key: int, answered: Answered, version: int) -> PushResult:
        """Note the version of the weights that answered a push; return the push's result."""
        self._note_version(key, answered, version)
        header = answered.message.header
        self._next_steps[key] = max(self._next_steps[key], header.step)
        return PushResult(header.staleness, bool(header.flags & wire.DROPPED))

    def _note_version(self, key: int, answered: Answered, version: int) -> None:
        """Note which version of a block this worker has.

        An answer over an earlier connection is left out: the server's successor has begun with the
        version of its snapshot, and the I/O thread has noted that one.
        """
        with self._position.lock:
            if answered.epoch == self._link(key).epoch:
                self._position.versions[key] = version


def _values(answered: Answered) -> Tensor:
    """Return the values in all messages of an answer, float32, one dimension, read-only."""
    parts = []
    for message in answered.messages:
        parts.append(codec.decode(message.payloads[0], message.header.dtype))
    return parts[0] if len(parts) == 1 else torch.cat(parts)

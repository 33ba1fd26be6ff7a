"""Page-locked memory between an accelerator's tensors and the wire.

Copies overlap: neither the training thread nor the device waits for one without need.
"""

import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from scaletrain.parameter_server.protocol.sharding import Block
from scaletrain.parameter_server.worker.client import Client, PushResult


class _Copy(NamedTuple):
    """A gradient on its way from the device, and the push that follows."""

    done: Any  # an event of the device: the gradient is in page-locked memory
    key: int
    step: int
    lr: float
    absent: Sequence[int]


class Staging:
    """Pushes and takes dense blocks of a model on an accelerator, in place of the ``Client``.

    A gradient passes three stages:

    1. ``copy`` enqueues a copy on a stream of its own, behind the kernels that compute the
       gradient.
       The training thread goes on with backward at once.
    2. ``push`` records an event behind the copies of a block, and hands it to the staging thread.
    3. That thread waits for the event, and pushes over the client.

    New weights are copied behind the work that the device still has.

    On the CPU streams and events do nothing, and there is no memory to lock: the same code runs
    without the overlap (for tests).

    Args:
        client: pushes and takes for this one.
        blocks: the dense blocks.
        device: where the model lies.

    Attributes:
        gradients: page-locked memory for the gradient of each block, by key; float32, one
            dimension. Written by the copies, read by the staging thread after them.
    """

    def __init__(self, client: Client, blocks: Iterable[Block], device: torch.device):
        self._client = client
        self._accelerated = device.type != "cpu"
        self._module: Any = torch.get_device_module(device)
        self._stream = self._module.Stream()
        self.gradients: dict[int, Tensor] = {}
        # Page-locked memory for new weights. Written and read by the training thread.
        self._weights: dict[int, Tensor] = {}
        for block in blocks:
            self.gradients[block.key] = torch.zeros(block.numel, pin_memory=self._accelerated)
            self._weights[block.key] = torch.empty(block.numel, pin_memory=self._accelerated)
        # By block: the event at which the device has read the weights that were staged last.
        self._weights_read: dict[int, Any] = {}
        # Filled by the training thread, emptied by the staging thread; None ends it.
        self._copies: queue.SimpleQueue[_Copy | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="staging", daemon=True)
        self._thread.start()

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy a gradient that the current stream computes. Does not wait.

        Args:
            target: part of ``gradients``.
            source: on the device, as many elements.
        """
        self._stream.wait_stream(self._module.current_stream())
        with self._module.stream(self._stream):
            target.copy_(source, non_blocking=True)
        if self._accelerated:
            # Its memory must not be given to others before it has been copied.
            source.record_stream(self._stream)

    def push(self, key: int, step: int, lr: float, absent: Sequence[int] = ()) -> None:
        """Push a block after its copies. Does not wait; ``take`` receives the answer."""
        self._copies.put(_Copy(self._record(self._stream), key, step, lr, absent))

    def take(self, key: int, sink: Callable[[Tensor], None]) -> PushResult:
        """Wait for the answer to ``push``.

        Args:
            key: the block.
            sink: called once with the new weights (float32, one dimension, page-locked). They stay
                as they are until the current stream has used them.
        """

        def stage(values: Tensor) -> None:
            # The device may still be reading the weights that were staged before.
            if key in self._weights_read:
                self._weights_read[key].synchronize()
            self._weights[key].copy_(values)

        result = self._client.take(key, stage)
        sink(self._weights[key])
        self._weights_read[key] = self._record(self._module.current_stream())
        return result

    def close(self) -> None:
        """End the staging thread after the pushes that it has."""
        self._copies.put(None)
        self._thread.join()

    def _run(self) -> None:
        """Push each gradient once it has been copied (staging thread)."""
        while True:
            copy = self._copies.get()
            if copy is None:
                return
            try:
                copy.done.synchronize()
                np.copyto(self._client.gradient(copy.key), self.gradients[copy.key].numpy())
                self._client.push(copy.key, copy.step, copy.lr, copy.absent)
            except Exception as error:  # of any kind: the training thread must not wait for ever
                self._client.fail(f"gradient of block {copy.key}: {type(error).__name__}: {error}")

    def _record(self, stream: Any) -> Any:
        """Return an event at the present end of a stream."""
        event = self._module.Event()
        event.record(stream)
        return event

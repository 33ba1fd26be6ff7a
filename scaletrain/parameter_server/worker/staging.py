"""Page-locked memory between tensors of an accelerator and the wire, so that nothing waits for a copy that need not."""

import queue
import threading
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scaletrain.parameter_server.protocol.sharding import Block
from scaletrain.parameter_server.worker.client import Answer, Client


class Staging:
    """Has the ``push`` and ``take`` of the client, for dense blocks of a model on ``device``.

    A gradient is copied on a stream of its own, behind the kernels that make it; a thread waits for the copy and pushes. The thread that
    trains goes on with backward at once. New weights are copied behind what the device is doing, too.

    The CPU's streams and events do nothing, and it has no memory to lock: what runs there is the same code without the overlap.
    """

    def __init__(self, client: Client, blocks: Iterable[Block], device: torch.device):
        self._client = client
        self._accelerated = device.type != "cpu"
        self._module: Any = torch.get_device_module(device)
        self._stream = self._module.Stream()
        sizes = {block.key: block.numel for block in blocks}
        self.gradients = {
            key: torch.zeros(numel, pin_memory=self._accelerated) for key, numel in sizes.items()
        }
        self._weights = {
            key: torch.empty(numel, pin_memory=self._accelerated) for key, numel in sizes.items()
        }
        self._read: dict[
            int, Any
        ] = {}  # by block: when the device has the weights that were staged last
        self._copied: queue.SimpleQueue[tuple[Any, int, int, float] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._push, name="staging", daemon=True)
        self._thread.start()

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy what the current stream makes into part of ``gradients``; does not wait."""
        self._stream.wait_stream(self._module.current_stream())
        with self._module.stream(self._stream):
            target.copy_(source, non_blocking=True)
        if self._accelerated:
            source.record_stream(
                self._stream
            )  # its memory is not given to others before it was copied

    def push(self, key: int, step: int, lr: float) -> None:
        """Push what was copied; does not wait. Answered by ``take``."""
        self._copied.put((self._now(self._stream), key, step, lr))

    def take(self, key: int, sink: Callable[[Tensor], None]) -> Answer:
        """As the client's; ``sink`` is called once, with memory that stays as it is until the current stream has used it."""

        def stage(values: Tensor) -> None:
            if key in self._read:
                self._read[key].synchronize()
            self._weights[key].copy_(values)

        answer = self._client.take(key, stage)
        sink(self._weights[key])
        self._read[key] = self._now(self._module.current_stream())
        return answer

    def close(self) -> None:
        """After what was asked for."""
        self._copied.put(None)
        self._thread.join()

    def _push(self) -> None:
        while entry := self._copied.get():
            copied, key, step, lr = entry
            try:
                copied.synchronize()
                np.copyto(self._client.gradient(key), self.gradients[key].numpy())
                self._client.push(key, step, lr)
            except (
                Exception
            ) as error:  # the thread that trains waits for an answer, and has to hear of it
                self._client.fail(f"gradient of block {key}: {type(error).__name__}: {error}")

    def _now(self, stream: Any) -> Any:
        event = self._module.Event()
        event.record(stream)
        return event

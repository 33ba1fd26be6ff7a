"""Allreduces of tensors on an accelerator, in the order of its streams.

They run over NCCL, or through the host's memory where ranks share a device.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from scaletrain.engine.lane import Lane, Request
from scaletrain.engine.meeting import values_of_all
from scaletrain.engine.roll_call import RollCall
from scaletrain.engine.transport import Group, Reduce
from scaletrain.engine.transport.landing import Landing

_PART_BYTES = 8 << 20  # of a message: one part is copied while another is summed


def shared(group: Group) -> bool:
    """Return True if ranks of a host share a CUDA device, which NCCL refuses. Collective.

    Raises:
        TimeoutError, ConnectionError: as ``meeting.values_of_all``.
    """
    device = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
    # NCCL takes ranks for ranks of other hosts if NCCL_HOSTID says so.
    mine = f"{os.environ.get('NCCL_HOSTID', '')} {device}"
    return len(set(values_of_all(group, "device", mine))) < group.size


class AcceleratorLane(Lane):
    """A lane for tensors on an accelerator.

    The device, not the host, waits for work that the caller has put on its stream before. A thread
    that waits for the result makes its own stream wait.

    The CPU's streams and events do nothing, and it has no memory to lock. There, the same code runs
    without the overlap.

    Args:
        group: the ranks.
        roll_call: numbers the collectives of the process group.
        collective: the algorithm as a person writes it.
        transport: ``nccl``, or a wire of the CPU: messages then pass through page-locked memory of
            the host (they are staged).
        device: where the tensors are.
    """

    _helps = False  # tasks run on streams of the lane's thread

    def __init__(
        self,
        group: Group,
        roll_call: RollCall,
        collective: str,
        transport: str,
        device: torch.device,
    ):
        super().__init__(group, roll_call, collective, transport)
        self._staged = transport != "nccl"
        self._accelerated = device.type != "cpu"
        self._module: Any = torch.get_device_module(device)
        # All of the following are used by the lane's thread, or by a caller that holds the engine.
        self._stream = self._module.Stream()  # on which the lane's tasks run
        self._download_stream = self._module.Stream()  # on which messages are copied to the host
        self._uploaded = self._module.Event()  # the last message has left the host's memory
        self._host = Landing(0)  # page-locked; grows with the messages

    def _task(
        self, future: torch.futures.Future, request: Request, number: int
    ) -> Callable[[], None]:
        """Return the task for the lane's thread, which runs after the caller's present stream."""
        # Recorded now, on the caller's thread: the lane's thread has a present stream of its own.
        computed = self._present_stream().record_event()

        def task() -> None:
            with self._module.stream(self._stream):
                self._stream.wait_event(computed)
                if self._accelerated:
                    # Their memory is not given to others before this stream is through.
                    for tensor in request.tensors:
                        tensor.record_stream(self._stream)
                with self._engine_lock:
                    outcome = self._run(request, number)
                future.set_result(outcome)

        return task

    def _sum(self, flat: Tensor, reduce: Reduce, number: int) -> None:
        if self._staged:
            self._sum_through_host(flat, reduce, number)
        else:
            super()._sum(flat, reduce, number)

    def _sum_through_host(self, flat: Tensor, reduce: Reduce, number: int) -> None:
        """Reduce a tensor on the device over all ranks, in place, by a wire of the CPU.

        1. Start to copy all its parts to the host, on a stream of their own.
        2. Sum each part on the host when it has arrived; the next one is being copied meanwhile.
        3. Start to copy each part back, without waiting.
        """
        assert self._engine
        # The last message may still be on its way back from the host's memory, which is used again.
        self._uploaded.synchronize()
        if self._host.memory.nbytes < flat.nbytes:
            self._host = Landing(flat.nbytes, pinned=self._accelerated)
        host = self._host.like(flat)
        cuts = _cuts(flat)
        arrived = [self._module.Event() for _ in cuts]
        # The copies must not overtake the kernels that compute the message.
        self._download_stream.wait_stream(self._present_stream())
        with self._module.stream(self._download_stream):
            for cut, event in zip(cuts, arrived, strict=True):
                host[cut].copy_(flat[cut], non_blocking=True)
                event.record(self._download_stream)
        for cut, event in zip(cuts, arrived, strict=True):
            event.synchronize()
            self._engine.allreduce(host[cut], reduce, number)
            flat[cut].copy_(host[cut], non_blocking=True)
        self._uploaded.record(self._present_stream())

    def _present_stream(self) -> Any:
        return self._module.current_stream()


def _cuts(flat: Tensor) -> list[slice]:
    """Return the parts in which a message passes through the host."""
    count = flat.numel()
    num_parts = -(-flat.nbytes // _PART_BYTES)
    edges = [index * count // num_parts for index in range(num_parts + 1)]
    return [slice(edges[index], edges[index + 1]) for index in range(num_parts)]

"""Allreduces of tensors on an accelerator: in the order of its streams; over NCCL, or through the host's memory where ranks share a device."""

import os
from typing import Any

import torch
from torch import Tensor

from scaletrain.engine.lane import Lane
from scaletrain.engine.roll_call import RollCall
from scaletrain.engine.segment import exchanged
from scaletrain.engine.transport import Group, Reduce
from scaletrain.engine.transport.landing import Landing

_PART_BYTES = 8 << 20  # of a message: one part is copied while another is summed


def shared(group: Group) -> bool:
    """Whether several ranks of one host use one CUDA device, which NCCL refuses (collective). Raises as ``exchanged``."""
    # NCCL takes ranks for ranks of other hosts where NCCL_HOSTID says so.
    mine = f"{os.environ.get('NCCL_HOSTID', '')} {torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
    return len(set(exchanged(group, "device", mine))) < group.size


class AcceleratorLane(Lane):
    """A lane for tensors on ``device``. What the caller's stream was given before is waited for on the device, not on the host; whoever waits
    for the result makes its own stream wait.

    Args:
        staged: the wire is the CPU's: messages pass through page-locked memory. Else it is NCCL's.

    The CPU's streams and events do nothing, and it has no memory to lock: what runs there is the same code without the overlap.
    """

    def __init__(
        self,
        group: Group,
        roll_call: RollCall,
        collective: str,
        transport: str,
        device: torch.device,
        staged: bool,
    ):
        super().__init__(group, roll_call, collective, transport)
        self._staged, self._accelerated = staged, device.type != "cpu"
        self._module: Any = torch.get_device_module(device)
        self._stream, self._down = self._module.Stream(), self._module.Stream()
        self._uploaded = self._module.Event()
        self._host = Landing(0)

    def _task(self, future: torch.futures.Future, tensors: list[Tensor], *what: Any) -> Any:
        made = self._now().record_event()

        def task() -> None:
            with self._module.stream(self._stream):
                self._stream.wait_event(made)
                if self._accelerated:
                    for (
                        tensor
                    ) in tensors:  # its memory is not given to others before this stream is through
                        tensor.record_stream(self._stream)
                future.set_result(self._run(tensors, *what))

        return task

    def _sum(self, flat: Tensor, reduce: Reduce) -> None:
        if not self._staged:
            super()._sum(flat, reduce)
            return
        assert self._engine
        self._uploaded.synchronize()  # the last message has left the host's memory
        if self._host.memory.nbytes < flat.nbytes:
            self._host = Landing(flat.nbytes, pinned=self._accelerated)
        host, count = self._host.like(flat), flat.numel()
        parts = -(-flat.nbytes // _PART_BYTES)
        cuts = [slice(i * count // parts, (i + 1) * count // parts) for i in range(parts)]
        arrived = [self._module.Event() for _ in cuts]
        self._down.wait_stream(self._now())
        with self._module.stream(self._down):
            for cut, event in zip(cuts, arrived, strict=True):
                host[cut].copy_(flat[cut], non_blocking=True)
                event.record(self._down)
        for cut, event in zip(cuts, arrived, strict=True):
            event.synchronize()
            self._engine.allreduce(host[cut], reduce)
            flat[cut].copy_(host[cut], non_blocking=True)
        self._uploaded.record(self._now())

    def _now(self) -> Any:
        return self._module.current_stream()

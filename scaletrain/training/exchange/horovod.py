"""Horovod's allreduce (0.28.1, built by `make horovod`), under any launcher."""

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any, Literal

import psutil
import torch
from torch import nn

from scaletrain.errors import UserError
from scaletrain.host.names import host_name
from scaletrain.run import progress, spans
from scaletrain.training.exchange import Exchange, Setup
from scaletrain.world import World

_MISSING = "exchange: horovod is not there or does not load ({}); build it with `make horovod`"
_rendezvous: Any = None  # Horovod's server, on rank 0; lives as long as the process


class HorovodExchange(Exchange):
    """What Horovod's DistributedOptimizer does, without wrapping the optimizer: each gradient's allreduce starts as soon as backward has
    made it (Horovod fuses what is ready), and ``step`` waits for them before the worker's own optimizer runs.

    Three traps of 0.28.1 are avoided by construction. ``broadcast_optimizer_state`` takes a hidden step: it is not called. A
    DistributedOptimizer drops the state that was loaded before wrapping: there is none. Unnamed operations are numbered by
    each rank for itself, so one more on one rank hangs the next: every operation here has a name.
    """

    def __init__(self, world: World, setup: Setup, controller: str, compression: str):
        try:
            import horovod.torch as hvd
        except ImportError as error:
            raise UserError(_MISSING.format(error)) from None
        self.world, self._hvd, self._device = world, hvd, setup.device
        _initialise(hvd, world, setup, controller)
        if (hvd.rank(), hvd.size()) != (world.rank, world.size):
            raise UserError(
                f"exchange: horovod takes this for rank {hvd.rank()} of {hvd.size()}, the launcher ({world.launcher}) says rank"
                f" {world.rank} of {world.size}; it was built for another MPI than this one (set exchange.controller=gloo)"
            )
        self._compression = hvd.Compression.fp16 if compression == "fp16" else hvd.Compression.none
        self._handles: dict[str, tuple[int, torch.Tensor, Any, float]] = {}
        self._accumulating = False

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        self._optimizer = optimizer
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        # The optimizer's state stays as it is: every rank has loaded the same, or none.
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            # A copy where Horovod would refuse the layout; bytes, so that every dtype passes.
            whole = tensor.data.contiguous()
            self._hvd.broadcast_(whole.view(-1).view(torch.uint8), 0, name=f"weights.{name}")
            if whole.data_ptr() != tensor.data_ptr():
                tensor.data.copy_(whole)
        for name, parameter in self._parameters.items():
            parameter.register_post_accumulate_grad_hook(lambda p, name=name: self._ready(name, p))
        return model

    def _ready(self, name: str, parameter: nn.Parameter) -> None:
        if self._accumulating:
            return
        if name in self._handles:
            raise RuntimeError(
                f"{name}: a second gradient before step(); accumulate inside exchange.accumulate()"
            )
        self._send(name, parameter)

    def _send(self, name: str, parameter: nn.Parameter) -> None:
        if parameter.grad is None:  # this rank's batch did not touch it; other ranks' may have
            parameter.grad = torch.zeros_like(parameter)
        grad = parameter.grad.contiguous()
        if grad.dtype == torch.bfloat16 and grad.device.type == "cpu":
            grad = grad.float()  # Horovod has no bfloat16 on the CPU
        sent, context = self._compression.compress(grad)
        began = time.time()
        handle = self._hvd.allreduce_async_(sent, name=f"gradient.{name}", op=self._hvd.Average)
        self._handles[name] = (handle, sent, context, began)

    def accumulate(self) -> contextlib.AbstractContextManager[None]:
        return self._accumulate()

    @contextlib.contextmanager
    def _accumulate(self) -> Iterator[None]:
        self._accumulating = True
        try:
            yield
        finally:
            self._accumulating = False

    def step(self, lr: float) -> None:
        for name, parameter in self._parameters.items():
            if name not in self._handles:
                self._send(name, parameter)
        progress.entering("horovod allreduce")
        waited = time.time()
        for name, parameter in self._parameters.items():
            handle, sent, context, began = self._handles[name]
            mean = self._compression.decompress(self._hvd.synchronize(handle), context)
            spans.add("bucket", name, began, bytes=sent.nbytes)
            assert parameter.grad is not None
            parameter.grad.copy_(mean)
        spans.add("wait", "wait for gradients", waited)
        self._handles.clear()
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return self._hvd.allreduce(values.contiguous(), name="sum", op=self._hvd.Sum)

    def close(self) -> None:
        self._hvd.barrier()
        self._hvd.shutdown()


def _initialise(hvd: Any, world: World, setup: Setup, controller: str) -> None:
    if controller == "auto":
        controller = "mpi" if world.launcher == "openmpi" and hvd.mpi_built() else "gloo"
    if controller == "mpi":
        if not hvd.mpi_built():
            raise UserError(
                "exchange.controller: 'mpi' is not in this build of Horovod (allowed: gloo)"
            )
    elif not hvd.gloo_built():
        raise UserError(
            "exchange.controller: 'gloo' is not in this build of Horovod (allowed: mpi)"
        )
    elif (
        "HOROVOD_GLOO_RENDEZVOUS_ADDR" not in os.environ
    ):  # horovodrun sets it; elsewhere we are horovodrun
        os.environ.update(_rendezvous_variables(world, setup))
    os.environ.setdefault(
        "HOROVOD_GLOO_TIMEOUT_SECONDS", str(max(1, round(setup.timeout.total_seconds())))
    )
    os.environ.setdefault(
        "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", str(max(1, round(setup.timeout.total_seconds())))
    )
    os.environ.setdefault(
        "HOROVOD_STALL_CHECK_TIME_SECONDS", str(max(1, round(setup.timeout.total_seconds() / 2)))
    )
    hvd.init()


def _rendezvous_variables(world: World, setup: Setup) -> dict[str, str]:
    """Horovod's own rendezvous, served by rank 0 at a free port, and told through the job's store (collective)."""
    global _rendezvous
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "lo").split(",")[0]
    here = next(e.address for e in psutil.net_if_addrs()[interface] if e.family.name == "AF_INET")
    setup.store.set(f"horovod/host/{world.rank}", f"{host_name()} {here}")
    hosts = [
        setup.store.get(f"horovod/host/{rank}").decode().split()[0] for rank in range(world.size)
    ]
    nodes = list(dict.fromkeys(hosts))
    local = [hosts[:rank].count(host) for rank, host in enumerate(hosts)]
    if world.rank == 0:
        from horovod.runner.common.util.hosts import SlotInfo
        from horovod.runner.http.http_server import RendezvousServer

        slots = [
            SlotInfo(
                hostname=host, rank=rank, local_rank=local[rank], cross_rank=nodes.index(host), size=world.size,
                local_size=hosts.count(host), cross_size=len(nodes),
            )
            for rank, host in enumerate(hosts)
        ]  # fmt: skip
        _rendezvous = RendezvousServer()
        port = _rendezvous.start()
        _rendezvous.init(slots)
        setup.store.set("horovod/rendezvous", f"{here} {port}")
    address, port = setup.store.get("horovod/rendezvous").decode().split()
    host = hosts[world.rank]
    return {
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": address, "HOROVOD_GLOO_RENDEZVOUS_PORT": str(port),
        "HOROVOD_CONTROLLER": "gloo", "HOROVOD_CPU_OPERATIONS": "gloo", "HOROVOD_GLOO_IFACE": interface,
        "HOROVOD_HOSTNAME": host, "HOROVOD_RANK": str(world.rank), "HOROVOD_SIZE": str(world.size),
        "HOROVOD_LOCAL_RANK": str(local[world.rank]), "HOROVOD_LOCAL_SIZE": str(hosts.count(host)),
        "HOROVOD_CROSS_RANK": str(nodes.index(host)), "HOROVOD_CROSS_SIZE": str(len(nodes)),
    }  # fmt: skip


def exchange(
    world: World,
    setup: Setup,
    *,
    controller: Literal["auto", "gloo", "mpi"] = "auto",
    compression: Literal["none", "fp16"] = "none",
) -> Exchange:
    """``controller``: what carries Horovod's messages; auto is MPI under Open MPI's mpirun where the build has it, else gloo."""
    return HorovodExchange(world, setup, controller, compression)

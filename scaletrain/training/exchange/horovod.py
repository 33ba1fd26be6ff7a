"""Horovod's allreduce (0.28.1, built by `make horovod`), under any launcher."""

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import psutil
import torch
from torch import nn

from scaletrain.errors import UserError
from scaletrain.needs import Needs
from scaletrain.run import progress, spans
from scaletrain.training.exchange import Exchange, Setup, attached
from scaletrain.world import World

NEEDS = Needs(package="horovod", fix="build it with `make horovod`")
# Horovod's rendezvous server, on rank 0. It must live as long as the process.
_rendezvous_server: Any = None


class _Allreduce(NamedTuple):
    """One gradient under way."""

    handle: int  # Horovod's
    sent: torch.Tensor  # compressed; must live until the allreduce is done
    context: Any  # what the compression needs to undo itself
    began: float  # unix time


class _Attached(NamedTuple):
    """The optimizer of one model, and the gradients that it waits for."""

    optimizer: torch.optim.Optimizer
    parameters: dict[str, nn.Parameter]  # that are trained, by names of their allreduces


class HorovodExchange(Exchange):
    """Horovod's DistributedOptimizer without its wrapper around the optimizer.

    Each gradient's allreduce starts as soon as backward has made it (Horovod fuses those that are
    ready), and ``synchronise`` waits for all of them before the worker's own optimizer runs.

    Three traps of 0.28.1 are avoided by construction:

    1. ``broadcast_optimizer_state`` takes a hidden step: it is not called.
    2. A DistributedOptimizer drops the state that was loaded before wrapping: there is none.
    3. Each rank numbers unnamed operations for itself, so one more on one rank hangs the next:
       every operation here has a name.
    """

    def __init__(self, world: World, setup: Setup, controller: str, compression: str):
        try:
            import horovod.torch as hvd
        except ImportError as error:
            raise UserError(f"exchange: horovod does not load ({error}); {NEEDS.fix}") from None
        self.world = world
        self._hvd = hvd
        _initialise(hvd, world, setup, controller)
        if (hvd.rank(), hvd.size()) != (world.rank, world.size):
            raise UserError(
                f"exchange: horovod takes this for rank {hvd.rank()} of {hvd.size()}, the launcher"
                f" ({world.launcher}) says rank {world.rank} of {world.size}; it was built for another"
                " MPI than this one (set exchange.controller=gloo)"
            )
        self._compression = hvd.Compression.none
        if compression == "fp16":
            self._compression = hvd.Compression.fp16
        # By parameter's name. Written by backward's hooks, emptied by ``synchronise``.
        self._under_way: dict[str, _Allreduce] = {}
        self._accumulating = False
        self._waited_s = 0.0  # for gradients, since the last ``record``
        self._attached: dict[nn.Module, _Attached] = {}
        # Whose gradients are means. Written by ``synchronise``, emptied by ``step``.
        self._synchronised: set[nn.Module] = set()

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        """Broadcast the weights, and hook the allreduce into backward.

        The optimizer's state stays as it is: every rank has loaded the same state, or none.
        """
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            # A copy where Horovod would refuse the layout; bytes, so that every dtype passes.
            whole = tensor.data.contiguous()
            self._hvd.broadcast_(whole.view(-1).view(torch.uint8), 0, name=f"weights.{name}")
            if whole.data_ptr() != tensor.data_ptr():
                tensor.data.copy_(whole)
        number = len(self._attached)  # keeps names apart that several models have
        parameters = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                unique = f"{number}.{name}"
                parameters[unique] = parameter
                parameter.register_post_accumulate_grad_hook(self._hook_of(unique))
        self._attached[model] = _Attached(optimizer, parameters)
        return model

    def _hook_of(self, name: str) -> Any:
        def start(parameter: nn.Parameter) -> None:
            # The gradients add up here; the last backward, outside the context, sends their sum.
            if self._accumulating:
                return
            # Horovod may be reducing this very memory while backward adds to it.
            if name in self._under_way:
                raise RuntimeError(
                    f"{name}: a second gradient before step();"
                    " accumulate inside exchange.accumulate()"
                )
            self._start_allreduce(name, parameter)

        return start

    def _start_allreduce(self, name: str, parameter: nn.Parameter) -> None:
        if parameter.grad is None:  # this rank's batch did not touch it; another rank's may have
            parameter.grad = torch.zeros_like(parameter)
        gradient = parameter.grad.contiguous()
        if gradient.dtype == torch.bfloat16 and gradient.device.type == "cpu":
            gradient = gradient.float()  # Horovod has no bfloat16 on the CPU
        sent, context = self._compression.compress(gradient)
        began = time.time()
        handle = self._hvd.allreduce_async_(sent, name=f"gradient.{name}", op=self._hvd.Average)
        self._under_way[name] = _Allreduce(handle, sent, context, began)

    @contextlib.contextmanager
    def accumulate(self, model: nn.Module | None = None) -> Iterator[None]:
        """Only add to the gradients while the body runs."""
        self._accumulating = True
        try:
            yield
        finally:
            self._accumulating = False

    def synchronise(self, model: nn.Module | None = None) -> None:
        """Wait for the mean of all gradients of a model."""
        module = attached(self._attached, model)
        parameters = self._attached[module].parameters
        # Every rank has to send every gradient: one that a rank leaves out blocks the others.
        for name, parameter in parameters.items():
            if name not in self._under_way:
                self._start_allreduce(name, parameter)
        progress.entering("horovod allreduce")
        wait_began = time.time()
        clock_began = time.perf_counter()
        for name, parameter in parameters.items():
            allreduce = self._under_way.pop(name)
            reduced = self._hvd.synchronize(allreduce.handle)
            mean = self._compression.decompress(reduced, allreduce.context)
            spans.add("bucket", name, allreduce.began, bytes=allreduce.sent.nbytes)
            assert parameter.grad is not None
            # Compression, another dtype or another layout put the mean into a tensor of its own.
            parameter.grad.copy_(mean)
        spans.add("wait", "wait for gradients", wait_began)
        self._waited_s += time.perf_counter() - clock_began
        self._synchronised.add(module)

    def step(self, model: nn.Module | None = None) -> None:
        """Wait for all gradients of a model unless that is done, then run its optimizer."""
        module = attached(self._attached, model)
        if module not in self._synchronised:
            self.synchronise(module)
        self._synchronised.discard(module)
        self._attached[module].optimizer.step()

    def record(self) -> dict[str, float]:
        """Return ``wait_s``: waiting for the mean gradients since it was last asked."""
        waited_s, self._waited_s = self._waited_s, 0.0
        return {"wait_s": waited_s}

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum over the ranks of a small CPU tensor."""
        return self._hvd.allreduce(values.contiguous(), name="sum", op=self._hvd.Sum)

    def close(self) -> None:
        """Meet the other ranks once more, then end Horovod."""
        self._hvd.barrier()
        self._hvd.shutdown()


def _initialise(hvd: Any, world: World, setup: Setup, controller: str) -> None:
    if controller == "auto":
        use_mpi = world.launcher == "openmpi" and hvd.mpi_built()
        controller = "mpi" if use_mpi else "gloo"
    if controller == "mpi" and not hvd.mpi_built():
        raise UserError(
            "exchange.controller: 'mpi' is not in this build of Horovod (allowed: gloo)"
        )
    if controller == "gloo":
        if not hvd.gloo_built():
            raise UserError(
                "exchange.controller: 'gloo' is not in this build of Horovod (allowed: mpi)"
            )
        # horovodrun sets these variables; under other launchers we do.
        if "HOROVOD_GLOO_RENDEZVOUS_ADDR" not in os.environ:
            os.environ.update(_rendezvous_variables(world, setup))
    # At least 1: a stall limit of 0 means none. Horovod looks for stalls twice within the
    # limit. Variables that a person has set win.
    # It cannot be changed after the first step.
    timeout_s = max(1, round(setup.timeouts.first_collective_s))
    check_s = max(1, round(setup.timeouts.first_collective_s / 2))
    os.environ.setdefault("HOROVOD_GLOO_TIMEOUT_SECONDS", str(timeout_s))
    os.environ.setdefault("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", str(timeout_s))
    os.environ.setdefault("HOROVOD_STALL_CHECK_TIME_SECONDS", str(check_s))
    hvd.init()


def _rendezvous_variables(world: World, setup: Setup) -> dict[str, str]:
    """Return the variables that lead every rank to Horovod's own rendezvous (collective).

    Rank 0 serves it on a free port, and publishes the port in the job's store.
    """
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "lo").split(",")[0]
    address = _ipv4_of(interface)
    setup.store.set(f"horovod/host/{world.rank}", f"{progress.host_name()} {address}")
    hosts = []  # of each rank
    for rank in range(world.size):
        # ``get`` waits until that rank has set its key.
        host, _ = setup.store.get(f"horovod/host/{rank}").decode().split()
        hosts.append(host)
    if world.rank == 0:
        port = _serve_rendezvous(hosts)
        setup.store.set("horovod/rendezvous", f"{address} {port}")
    server_address, server_port = setup.store.get("horovod/rendezvous").decode().split()
    slot = {f"HOROVOD_{name.upper()}": str(fact) for name, fact in _slot(hosts, world.rank).items()}
    return slot | {
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": server_address,
        "HOROVOD_GLOO_RENDEZVOUS_PORT": server_port,
        "HOROVOD_CONTROLLER": "gloo",
        "HOROVOD_CPU_OPERATIONS": "gloo",
        "HOROVOD_GLOO_IFACE": interface,
    }


def _serve_rendezvous(hosts: list[str]) -> int:
    """Start Horovod's rendezvous server, and return its port."""
    global _rendezvous_server
    from horovod.runner.common.util.hosts import SlotInfo
    from horovod.runner.http.http_server import RendezvousServer

    slots = [SlotInfo(**_slot(hosts, rank)) for rank in range(len(hosts))]
    _rendezvous_server = RendezvousServer()
    port: int = _rendezvous_server.start()
    _rendezvous_server.init(slots)
    return port


def _slot(hosts: list[str], rank: int) -> dict[str, Any]:
    """Return a rank's place by Horovod's names: fields of ``SlotInfo``, ends of its variables."""
    host = hosts[rank]
    # Without duplicates, in the order of each host's first rank.
    nodes = list(dict.fromkeys(hosts))
    return {
        "hostname": host,
        "rank": rank,
        "size": len(hosts),
        "local_rank": hosts[:rank].count(host),
        "local_size": hosts.count(host),
        "cross_rank": nodes.index(host),
        "cross_size": len(nodes),
    }


def _ipv4_of(interface: str) -> str:
    for entry in psutil.net_if_addrs()[interface]:
        if entry.family.name == "AF_INET":
            return entry.address
    raise UserError(f"GLOO_SOCKET_IFNAME: {interface} has no IPv4 address")


def exchange(
    world: World,
    setup: Setup,
    *,
    controller: Literal["auto", "gloo", "mpi"] = "auto",
    compression: Literal["none", "fp16"] = "none",
) -> Exchange:
    """Return Horovod's allreduce under the worker's own optimizer.

    Args:
        controller: carries Horovod's messages. auto is MPI under Open MPI's mpirun if the
            build has it, else gloo.
        compression: of gradients on the wire.
    """
    return HorovodExchange(world, setup, controller, compression)

"""The torch.distributed backend ``scaletrain``, which serves DDP and any script unchanged.

>>> dist.init_process_group("scaletrain")  # doctest: +SKIP

Dense allreduces run on our engine, on a thread of their own, so that they overlap with backward.
Everything else (other collectives, sparse tensors, point-to-point) is forwarded to gloo, or to NCCL
for CUDA tensors: nothing that they can do is lost.

CUDA tensors: with ``auto`` and ``native``, NCCL's own allreduce runs. With an algorithm that was
chosen, its schedule runs over NCCL's point-to-point messages. Where ranks share a GPU, which NCCL
refuses, or a wire of the CPU was chosen, allreduces pass through page-locked memory, and everything
else goes to gloo.

The algorithm and the wire come from ``Options``
(``init_process_group(..., pg_options=Options(collective="ring"))``), else from the environment
(SCALETRAIN_COLLECTIVE, SCALETRAIN_TRANSPORT), else they are ``auto``.

The backend ``mpi4py`` is the same with MPI's own allreduce over mpi4py, since torch's wheels bring
no MPI. It is for scripts under mpirun.
"""

import os
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import (
    AllgatherOptions,
    AllreduceOptions,
    BarrierOptions,
    ReduceScatterOptions,
)

from scaletrain.engine.accelerator import AcceleratorLane, shared
from scaletrain.engine.choice import AUTO, NATIVE, check
from scaletrain.engine.lane import OPERATIONS, Lane, Operation, number_of
from scaletrain.engine.meeting import introduce, known_members
from scaletrain.engine.roll_call import RollCall
from scaletrain.engine.transport import DTYPES, Group, nccl
from scaletrain.engine.work import All, Forwarded
from scaletrain.errors import UserError

_LET_GO_S = 0.01  # in which gloo's threads let go of their last tensors

BackendType = dist.ProcessGroup.BackendType


class Options(NamedTuple):
    """How allreduces run.

    Each is the name of a file in ``collectives/`` or ``engine/transport/``, with options if need be
    (``pipelined_tree:segments=8``), or ``auto``.
    """

    collective: str = AUTO
    transport: str = AUTO

    @classmethod
    def from_env(cls) -> "Options":
        """Return the options that the environment sets.

        Raises:
            UserError: a variable names an algorithm, wire or option that does not exist.
        """
        options = cls(
            os.environ.get("SCALETRAIN_COLLECTIVE", AUTO),
            os.environ.get("SCALETRAIN_TRANSPORT", AUTO),
        )
        check(options.collective, "collective", "SCALETRAIN_COLLECTIVE")
        check(options.transport, "transport", "SCALETRAIN_TRANSPORT")
        return options


class ProcessGroup(dist.ProcessGroup):
    """One rank's end of a group. torch.distributed creates it on every rank (collective).

    Args:
        store: the group's own part of the job's store.
        rank: this rank in the group.
        size: number of ranks in the group.
        timeout: after which waiting for a peer raises.
        options: how allreduces run.
    """

    def __init__(
        self, store: dist.Store, rank: int, size: int, timeout: timedelta, options: Options
    ):
        super().__init__(rank, size)  # type: ignore[call-arg]
        self._store = store
        self._timeout = timeout
        self._options = options
        # The store holds the facts about each rank by the time gloo has connected them.
        introduce(store, rank)
        if rank == 0:
            store.set("place", uuid.uuid4().hex)
        # All of them meet in one store: prefixes keep the keys of gloo, NCCL and our wires apart.
        self._gloo = dist.ProcessGroupGloo(dist.PrefixStore("gloo/", store), rank, size, timeout)
        self._register_backend(torch.device("cpu"), BackendType.GLOO, self._gloo)
        self._set_default_backend(BackendType.GLOO)
        self._nccl: Any = None
        if torch.cuda.is_available() and dist.is_nccl_available():
            self._nccl = nccl.backend(Group(dist.PrefixStore("nccl/", store), rank, size, timeout))
            self._register_backend(torch.device("cuda"), BackendType.NCCL, self._nccl)
            self._set_default_backend(BackendType.NCCL)
        self._members = known_members(store, size)
        # The group's own part of the store, over a connection that no script waits on.
        self._job_store = _without_prefixes(store)  # groups find the connection while one holds it
        second = _second(self._job_store)
        self._meeting = dist.PrefixStore(f"{store.get('place').decode()}/", second)
        self._roll_call = RollCall(self._meeting, rank, size, timeout)
        # By kind of device, created at the first allreduce of such tensors, by whichever thread
        # holds _creating. None: left to NCCL.
        self._lanes: dict[str, Lane | None] = {}
        self._creating = threading.Lock()
        self._device_shared: bool | None = None  # None: the ranks have not been asked yet

    def getBackendName(self) -> str:
        """Return the name under which torch knows this backend."""
        return "scaletrain"

    # Allreduce

    def allreduce(  # type: ignore[override]
        self,
        tensors: list[Tensor] | Tensor | None = None,
        opts: Any = None,
        timeout: timedelta | None = None,
        *,
        op: Any = None,
        tensor: Tensor | None = None,
    ) -> dist.Work:
        """Reduce tensors over all ranks, in place. Collective.

        It runs on the engine if the tensor is dense and of a plain dtype, else on gloo or NCCL.
        torch's class takes a tensor or a list, and options or an operation.
        """
        tensors = tensor if tensors is None else tensors
        if isinstance(tensors, Tensor):
            tensors = [tensors]
        assert tensors is not None
        options = opts
        if not isinstance(opts, AllreduceOptions):
            options = AllreduceOptions()
            operation = opts if op is None else op
            if operation is not None:
                options.reduceOp = operation
        if timeout is not None:
            # gloo ends a collective after a time of its own, the engine after the group's.
            options.timeout = timeout
            return self._forward("allreduce", tensors, options)
        operation = OPERATIONS.get(number_of(options.reduceOp))
        lane = None
        if operation is not None and _runs_on_engine(tensors, operation):
            lane = self._lane(tensors)
        if operation is None or lane is None:
            return self._forward("allreduce", tensors, options)
        at_once = not options.asyncOp
        # A named range costs time, so it is opened only if somebody profiles.
        if torch.autograd._profiler_enabled():
            with torch.profiler.record_function("scaletrain:all_reduce"):
                return lane.allreduce(tensors, operation, at_once)
        return lane.allreduce(tensors, operation, at_once)

    def _lane(self, tensors: list[Tensor]) -> Lane | None:
        """Return the lane that reduces such tensors; None: the engine does not."""
        on_cpu = all(tensor.is_cpu for tensor in tensors)
        kind = "cpu" if on_cpu else tensors[0].device.type
        if kind not in self._lanes:
            with self._creating:
                if kind not in self._lanes:
                    self._lanes[kind] = self._new_lane(kind)
        return self._lanes[kind]

    def _new_lane(self, kind: str) -> Lane | None:
        if kind == "cuda":
            return self._accelerator_lane()
        if kind != "cpu":
            return None
        collective, transport = self._options
        if self._nccl is not None and _wire(transport) == "nccl":
            transport = AUTO  # the choice was for tensors on devices
        return Lane(self._group(kind), self._roll_call, collective, transport)

    def _accelerator_lane(self) -> Lane | None:
        """Return a lane for CUDA tensors; None: NCCL's own allreduce is wanted. Collective."""
        collective, transport = self._options
        wire = _wire(transport)
        can_use_nccl = self._nccl is not None and not self._shares_device()
        if wire == "nccl" and not can_use_nccl:
            raise UserError(
                "transport 'nccl': several ranks share a GPU, which NCCL refuses,"
                " or this torch was built without it"
                " (allowed here: auto, shared_memory, gloo)"
            )
        if can_use_nccl and wire in (AUTO, "nccl"):
            if collective in (AUTO, NATIVE):
                return None
            transport = "nccl"
        device = torch.device("cuda", torch.cuda.current_device())
        group = self._group("cuda")
        return AcceleratorLane(group, self._roll_call, collective, transport, device)

    def _group(self, kind: str) -> Group:
        """Return the ranks with a part of the store for one kind of device."""
        store = dist.PrefixStore(f"wire/{kind}/", self._meeting)
        return Group(store, self.rank(), self.size(), self._timeout, members=self._members)

    def _shares_device(self) -> bool:
        """Return True if ranks share a GPU. Collective at its first call."""
        if self._device_shared is None:
            self._device_shared = shared(self._group("devices"))
        return self._device_shared

    def limit(self, timeout: timedelta) -> None:
        """Change the timeout, for the collectives that are called from now on. Not collective."""
        self._timeout = timeout
        for backend in (self._gloo, self._nccl):
            if backend is not None:
                backend._set_default_timeout(timeout)
        for lane in self._lanes.values():
            if lane is not None:
                lane.limit(timeout)

    # Everything else goes to gloo or NCCL. These are the methods that torch's ProcessGroup runs
    # under the interpreter lock, and those that scripts call. Their parameters are those of torch's
    # class.

    def _forward(self, method: str, *arguments: Any, **options: Any) -> dist.Work:
        """Call a method of gloo's or NCCL's backend itself.

        The same method of torch's class would come back to ours. Or it would keep the interpreter
        lock while it waits for gloo's thread, which may wait for that lock to let go of a tensor:
        ranks would hang for ever, now and then.
        """
        if method == "barrier" and torch.cuda.is_initialized():
            torch.cuda.synchronize()  # a barrier waits for the work of devices, too
        on_cpu = all(tensor.is_cpu for tensor in _tensors(arguments))
        over_nccl = not on_cpu and self._nccl is not None and not self._shares_device()
        backend = self._nccl if over_nccl else self._gloo
        work = getattr(backend, method)(*arguments, **options)
        # Only two ranks take part in a message: counting it would make the ranks' numbers differ.
        # NCCL's failures do not surface in wait() but in its watchdog.
        if over_nccl or method in ("recv", "recv_anysource", "send"):
            return work
        number = self._roll_call.next()
        # As a person knows it: ``_allgather_base`` is an allgather.
        name = method.removeprefix("_").removesuffix("_base")
        return Forwarded(work, lambda error: self._roll_call.explain(name, number, error))

    def allgather(self, *arguments: Any, **options: Any) -> dist.Work:
        """Gather a tensor of each rank into a list, on every rank. Collective."""
        return self._forward("allgather", *arguments, **options)

    def _allgather_base(self, *arguments: Any, **options: Any) -> dist.Work:
        """Gather a tensor of each rank into one tensor, on every rank. Collective."""
        return self._forward("_allgather_base", *arguments, **options)

    def all_gather_single(self, *arguments: Any, **options: Any) -> dist.Work:
        """Gather a tensor of each rank into one tensor, on every rank. Collective."""
        return self._forward("_allgather_base", *arguments, **options)

    def allgather_into_tensor_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], options: Any = None
    ) -> dist.Work:
        """Gather several tensors, one after another. Functional collectives call it. Collective."""
        return self._coalesced("_allgather_base", outputs, inputs, options or AllgatherOptions())

    def allreduce_coalesced(self, *arguments: Any, **options: Any) -> dist.Work:
        """Reduce several tensors over all ranks, in place. Collective."""
        return self._forward("allreduce_coalesced", *arguments, **options)

    def alltoall(self, *arguments: Any, **options: Any) -> dist.Work:
        """Send a tensor to each rank, and receive one from each. Collective."""
        return self._forward("alltoall", *arguments, **options)

    def alltoall_base(self, *arguments: Any, **options: Any) -> dist.Work:
        """Send a slice of a tensor to each rank, and receive one from each. Collective."""
        return self._forward("alltoall_base", *arguments, **options)

    def all_to_all_single(self, *arguments: Any, **options: Any) -> dist.Work:
        """Send a slice of a tensor to each rank, and receive one from each. Collective."""
        return self._forward("alltoall_base", *arguments, **options)

    def barrier(  # type: ignore[override]
        self, opts: Any = None, timeout: timedelta | None = None
    ) -> dist.Work:
        """Wait until every rank has come. Collective."""
        if isinstance(opts, timedelta):
            timeout, opts = opts, None
        options = opts or BarrierOptions()
        if timeout is not None:
            options.timeout = timeout
        return self._forward("barrier", options)

    def broadcast(self, *arguments: Any, **options: Any) -> dist.Work:
        """Send a rank's tensor to all others. Collective."""
        return self._forward("broadcast", *arguments, **options)

    def gather(self, *arguments: Any, **options: Any) -> dist.Work:
        """Gather a tensor of each rank on one of them. Collective."""
        return self._forward("gather", *arguments, **options)

    def reduce(self, *arguments: Any, **options: Any) -> dist.Work:
        """Reduce a tensor over all ranks, on one of them. Collective."""
        return self._forward("reduce", *arguments, **options)

    def reduce_scatter(self, *arguments: Any, **options: Any) -> dist.Work:
        """Reduce a list of tensors over all ranks; each rank gets one of them. Collective."""
        return self._forward("reduce_scatter", *arguments, **options)

    def _reduce_scatter_base(self, *arguments: Any, **options: Any) -> dist.Work:
        """Reduce a tensor over all ranks; each rank gets a slice of it. Collective."""
        return self._forward("_reduce_scatter_base", *arguments, **options)

    def reduce_scatter_single(self, *arguments: Any, **options: Any) -> dist.Work:
        """Reduce a tensor over all ranks; each rank gets a slice of it. Collective."""
        return self._forward("_reduce_scatter_base", *arguments, **options)

    def reduce_scatter_tensor_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], options: Any = None
    ) -> dist.Work:
        """Reduce and scatter several tensors. Functional collectives call it. Collective."""
        options = options or ReduceScatterOptions()
        return self._coalesced("_reduce_scatter_base", outputs, inputs, options)

    def scatter(self, *arguments: Any, **options: Any) -> dist.Work:
        """Send one of a rank's tensors to each rank. Collective."""
        return self._forward("scatter", *arguments, **options)

    def send(self, *arguments: Any, **options: Any) -> dist.Work:
        """Send a tensor to a rank, which calls ``recv``."""
        return self._forward("send", *arguments, **options)

    def recv(self, *arguments: Any, **options: Any) -> dist.Work:
        """Receive a tensor from a rank, which calls ``send``."""
        return self._forward("recv", *arguments, **options)

    def recv_anysource(self, *arguments: Any, **options: Any) -> dist.Work:
        """Receive a tensor from any rank that calls ``send``."""
        return self._forward("recv_anysource", *arguments, **options)

    def _coalesced(
        self, method: str, outputs: list[Tensor], inputs: list[Tensor], options: Any
    ) -> dist.Work:
        """Call a collective for each pair of tensors: gloo has no coalesced one."""
        works = []
        for output, source in zip(outputs, inputs, strict=True):
            works.append(self._forward(method, output, source, options))
        return All(works)

    # The group itself

    def get_group_store(self) -> dist.Store:
        """Return the group's own part of the job's store."""
        return self._store

    def _get_sequence_number_for_group(self) -> int:
        """Return how many collectives this rank has called; torch's logs compare the ranks'."""
        return self._roll_call.num_called

    def record(self, *sizes: int) -> dict[str, Any]:
        """Return the wire and the algorithms that were chosen, for the run's header.

        Args:
            sizes: messages of these bytes; none: a few usual sizes.

        Returns:
            As ``Engine.record``; empty before the first allreduce.
        """
        # With a GPU, the gradients are there: its lane is the one to report.
        for kind in ("cuda", "cpu"):
            lane = self._lanes.get(kind)
            if lane:
                return lane.record(*sizes)
        return {}

    def shutdown(self) -> None:
        """End the engine's threads after the collectives under way. Not collective."""
        for lane in self._lanes.values():
            if lane:
                lane.close()
        for backend in self._backends():
            backend.shutdown()
        # gloo's threads let go of the last tensors under the interpreter's lock. If the interpreter
        # ends while one of them waits for it, the C++ runtime aborts the process (under plain gloo,
        # too). Let them have it now.
        time.sleep(_LET_GO_S)

    def abort(self) -> None:
        """End everything at once: threads that wait for peers get an error. Not collective."""
        for lane in self._lanes.values():
            if lane:
                lane.abort()
        for backend in self._backends():
            backend.abort()

    def _backends(self) -> list[Any]:
        return [backend for backend in (self._nccl, self._gloo) if backend]


# A second connection for each store that a group of this process holds; its groups share it.
_seconds: WeakKeyDictionary[dist.Store, dist.Store] = WeakKeyDictionary()
_connecting = threading.Lock()  # held by the thread that adds one


def _second(store: dist.Store) -> dist.Store:
    """Return a connection to a store beside its own, made once.

    A thread that waits at a TCPStore blocks all others that use its connection. Scripts wait at
    theirs, but no thread waits at this one (``meeting.wait_for_keys``). Connecting may take seconds
    where names are looked up slowly, so it is done once and early, not after a failure.
    """
    with _connecting:
        if store not in _seconds:
            _seconds[store] = store.clone()  # type: ignore[attr-defined]
        return _seconds[store]


def _without_prefixes(store: dist.Store) -> dist.Store:
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return store


def _wire(transport: str) -> str:
    """Return the name of a transport without its options."""
    if transport == AUTO:
        return AUTO
    # Not at the top: what reads configurations takes longer to load than the engine.
    from scaletrain.config.grammar import split_spec

    return split_spec(transport).name


def _tensors(values: Any) -> Iterator[Tensor]:
    """Yield the tensors in arguments, and in the lists among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _runs_on_engine(tensors: list[Tensor], operation: Operation) -> bool:
    """Return True if the engine reduces such tensors as gloo would."""
    # gloo sums several tensors over the ranks and over the list. That meaning stays its own.
    if len(tensors) != 1:
        return False
    tensor = tensors[0]
    if tensor.layout != torch.strided or tensor.dtype not in DTYPES:
        return False
    # gloo refuses the average of integers. That answer stays its own.
    return tensor.is_floating_point() or not operation.average

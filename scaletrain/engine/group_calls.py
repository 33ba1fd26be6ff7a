"""Every collective of a group, run by our engine, by gloo or by NCCL.

torch knows a group as an object of one of its own classes: ``process_group`` is ours for torch
2.11 to 2.13. Those classes say how a collective may be spelled; this one says how it runs.
"""

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.distributed as dist
from torch import Tensor

from scaletrain.engine import one_hop_calls
from scaletrain.engine.accelerator import AcceleratorLane, shared
from scaletrain.engine.choice import AUTO, NATIVE, Options
from scaletrain.engine.engine import runs_one_hop
from scaletrain.engine.lane import Lane
from scaletrain.engine.meeting import introduce, known_members
from scaletrain.engine.messages import ANY, Messages
from scaletrain.engine.operations import OPERATIONS, Operation, number_of
from scaletrain.engine.rendezvous import for_nccl
from scaletrain.engine.roll_call import RollCall
from scaletrain.engine.transport import DTYPES, Group, nccl
from scaletrain.engine.work import All, Forwarded
from scaletrain.errors import UserError

_LET_GO_S = 0.01  # in which gloo's threads let go of their last tensors
_NO_TIMEOUT = timedelta(milliseconds=-1)  # in a collective's options: the limit is the group's


class GroupCalls:
    """One rank's end of a group. Every rank creates one (collective).

    A method is a collective, named as in ``torch._C._distributed_c10d.Backend`` and with the
    parameters of its C++: lists of tensors, and an object with options. ``spelling`` brings other
    spellings into this form.

    Args:
        store: the group's own part of the job's store.
        rank: this rank in the group.
        size: number of ranks in the group.
        timeout: after which waiting for a peer raises.
        options: how allreduces run.

    Attributes:
        gloo: torch's backend for what the engine does not run.
        nccl: likewise for CUDA tensors; None: there is no GPU, or no NCCL.
        runs_one_hop: the engine also runs the collectives beside allreduce, of CPU tensors.
    """

    def __init__(
        self, store: dist.Store, rank: int, size: int, timeout: timedelta, options: Options
    ):
        self.store = store
        self.rank = rank
        self.size = size
        self._timeout = timeout
        self._options = options
        # The store holds the facts about each rank by the time gloo has connected them.
        introduce(store, rank)
        if rank == 0:
            store.set("place", uuid.uuid4().hex)
        # All of them meet in one store: prefixes keep the keys of gloo, NCCL and our wires apart.
        # torch's stubs lack the methods of its backends.
        self.gloo: Any = dist.ProcessGroupGloo(
            dist.PrefixStore("gloo/", store), rank, size, timeout
        )
        place = store.get("place").decode()
        self._job_store = _without_prefixes(store)  # groups find the connection while one holds it
        self._members = known_members(store, size)
        hosts = [member.host for member in self._members]
        self.nccl: Any = None
        if torch.cuda.is_available() and dist.is_nccl_available():
            its_store = for_nccl(self._job_store, on_one_host=len(set(hosts)) == 1)
            its_store = dist.PrefixStore(f"{place}/nccl/", its_store)
            self.nccl = nccl.backend(Group(its_store, rank, size, timeout))
        # The group's own part of the store, over a connection that no script waits on.
        self._meeting = dist.PrefixStore(f"{place}/", _second(self._job_store))
        self._roll_call = RollCall(self._meeting, rank, size, timeout, place)
        self._place = one_hop_calls.Place(rank, size)
        self.runs_one_hop = runs_one_hop(hosts, options.transport)
        # What gloo may still be doing. The callers' threads write and read it.
        self._forwarded: WeakSet[Forwarded] = WeakSet()
        # By kind of device, created at the first collective of such tensors, by whichever thread
        # holds _creating. None: left to NCCL.
        self._lanes: dict[str, Lane | None] = {}
        self._creating = threading.Lock()
        self._messages: Messages | None = None  # likewise, at the first send or recv
        self._device_shared: bool | None = None  # None: the ranks have not been asked yet

    def allreduce(self, tensors: list[Tensor], options: Any) -> dist.Work:
        """Reduce tensors over all ranks, in place. Collective.

        It runs on the engine if the tensor is dense and of a plain dtype, else on gloo or NCCL.
        """
        operation = OPERATIONS.get(number_of(options.reduceOp))
        lane = None
        # gloo ends a collective after a time of its own, the engine after the group's.
        if operation is not None and options.timeout == _NO_TIMEOUT:
            if _runs_on_engine(tensors, operation):
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
        if self.nccl is not None and _wire(transport) == "nccl":
            transport = AUTO  # the choice was for tensors on devices
        return Lane(self._group(kind), self._roll_call, collective, transport)

    def _accelerator_lane(self) -> Lane | None:
        """Return a lane for CUDA tensors; None: NCCL's own allreduce is wanted. Collective."""
        collective, transport = self._options
        wire = _wire(transport)
        can_use_nccl = self.nccl is not None and not self._shares_device()
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
        return Group(store, self.rank, self.size, self._timeout, members=self._members)

    def _shares_device(self) -> bool:
        """Return True if ranks share a GPU. Collective at its first call."""
        if self._device_shared is None:
            self._device_shared = shared(self._group("devices"))
        return self._device_shared

    def limit(self, timeout: timedelta) -> None:
        """Change the timeout, for the collectives that are called from now on. Not collective."""
        self._timeout = timeout
        for backend in (self.gloo, self.nccl):
            if backend is not None:
                backend._set_default_timeout(timeout)
        for lane in self._lanes.values():
            if lane is not None:
                lane.limit(timeout)
        if self._messages is not None:
            self._messages.limit(timeout)

    # In shared memory, collectives of CPU tensors take one hop. Everything else goes to gloo or
    # NCCL.

    def _call(self, method: str, *arguments: Any) -> dist.Work:
        """Run a collective on the lane of CPU tensors if the engine does it, else forward it.

        Args:
            method: its name in torch's C++.
            arguments: of that method, with its options as the last.
        """
        options = arguments[-1]
        request = None
        # gloo ends a collective after a time of its own, the engine after the group's.
        if self.runs_one_hop and options.timeout == _NO_TIMEOUT:
            request = _REQUESTS[method](self._place, *arguments)
        if request is None:
            return self._forward(method, *arguments)
        lane = self._lane([])
        assert lane is not None
        if torch.autograd._profiler_enabled():
            with torch.profiler.record_function(f"scaletrain:{request.collective}"):
                return lane.call(request, not options.asyncOp)
        return lane.call(request, not options.asyncOp)

    def allgather(
        self, outputs: list[list[Tensor]], inputs: list[Tensor], options: Any
    ) -> dist.Work:
        """Gather a tensor of each rank into a list, on every rank. Collective."""
        return self._call("allgather", outputs, inputs, options)

    def _allgather_base(self, output: Tensor, source: Tensor, options: Any) -> dist.Work:
        """Gather a tensor of each rank into one tensor, on every rank. Collective."""
        return self._call("_allgather_base", output, source, options)

    def allgather_into_tensor_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], options: Any
    ) -> dist.Work:
        """Do as ``_allgather_base`` with several tensors. Functional collectives call it."""
        works = [self._allgather_base(*pair, options) for pair in zip(outputs, inputs, strict=True)]
        return All(works)

    def allgather_coalesced(
        self, outputs: list[list[Tensor]], inputs: list[Tensor], options: Any
    ) -> dist.Work:
        """Gather several tensors of each rank into lists, on every rank. Collective."""
        return self._forward("allgather_coalesced", outputs, inputs, options)

    def allreduce_coalesced(self, tensors: list[Tensor], options: Any) -> dist.Work:
        """Reduce several tensors over all ranks, in place. Collective."""
        return self._forward("allreduce_coalesced", tensors, options)

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], options: Any) -> dist.Work:
        """Send a tensor to each rank, and receive one from each. Collective."""
        return self._call("alltoall", outputs, inputs, options)

    def alltoall_base(
        self,
        output: Tensor,
        source: Tensor,
        output_splits: list[int],
        input_splits: list[int],
        options: Any,
    ) -> dist.Work:
        """Send a slice of a tensor to each rank, and receive one from each. Collective.

        Args:
            output: the received slices, in the order of the ranks.
            source: the slices to send, likewise.
            output_splits: the length of each slice in ``output``; empty: all are equal.
            input_splits: likewise in ``source``.
            options: ``AllToAllOptions``.
        """
        return self._call("alltoall_base", output, source, output_splits, input_splits, options)

    def barrier(self, options: Any) -> dist.Work:
        """Wait until every rank has come. Collective."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # a barrier waits for the work of devices, too
        # Like gloo's, for what was called before it, too. The lane's order does that for its own.
        for work in [*self._forwarded]:
            if not work.is_completed():
                work.wait()
        return self._call("barrier", options)

    def broadcast(self, tensors: list[Tensor], options: Any) -> dist.Work:
        """Send a rank's tensor to all others. Collective."""
        return self._call("broadcast", tensors, options)

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], options: Any) -> dist.Work:
        """Gather a tensor of each rank on one of them; only there is ``outputs`` not empty."""
        return self._call("gather", outputs, inputs, options)

    def reduce(self, tensors: list[Tensor], options: Any) -> dist.Work:
        """Reduce a tensor over all ranks, on one of them. Collective."""
        return self._call("reduce", tensors, options)

    def reduce_scatter(
        self, outputs: list[Tensor], inputs: list[list[Tensor]], options: Any
    ) -> dist.Work:
        """Reduce a list of tensors over all ranks; each rank gets one of them. Collective."""
        return self._call("reduce_scatter", outputs, inputs, options)

    def _reduce_scatter_base(self, output: Tensor, source: Tensor, options: Any) -> dist.Work:
        """Reduce a tensor over all ranks; each rank gets a slice of it. Collective."""
        return self._call("_reduce_scatter_base", output, source, options)

    def reduce_scatter_tensor_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], options: Any
    ) -> dist.Work:
        """Do as ``_reduce_scatter_base`` with several tensors. Functional collectives call it."""
        pairs = zip(outputs, inputs, strict=True)
        return All([self._reduce_scatter_base(*pair, options) for pair in pairs])

    def monitored_barrier(self, timeout: timedelta, wait_all_ranks: bool) -> None:
        """Wait until every rank has come, and name those that did not. Collective."""
        self.gloo.monitored_barrier(timeout, wait_all_ranks)

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], options: Any) -> dist.Work:
        """Send one of a rank's tensors to each rank; only there is ``inputs`` not empty."""
        return self._call("scatter", outputs, inputs, options)

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> dist.Work:
        """Send a tensor to a rank, which calls ``recv``."""
        if not (self._is_peer(peer) and self._runs_message(tensors, tag)):
            return self._forward("send", tensors, peer, tag)
        return self._message("send", self._own_messages().send, tensors, peer, tag)

    def recv(self, tensors: list[Tensor], peer: int, tag: int) -> dist.Work:
        """Receive a tensor from a rank, which calls ``send``."""
        if not (self._is_peer(peer) and self._runs_message(tensors, tag)):
            return self._forward("recv", tensors, peer, tag)
        return self._message("recv", self._own_messages().receive, tensors, peer, tag)

    def recv_anysource(self, tensors: list[Tensor], tag: int) -> dist.Work:
        """Receive a tensor from any rank that calls ``send``."""
        if not self._runs_message(tensors, tag):
            return self._forward("recv_anysource", tensors, tag)
        return self._message("recv_anysource", self._own_messages().receive, tensors, ANY, tag)

    def _is_peer(self, rank: int) -> bool:
        """Return True if a rank is another one of this group. gloo refuses messages to others."""
        return 0 <= rank < self.size and rank != self.rank

    def _runs_message(self, tensors: list[Tensor], tag: int) -> bool:
        """Return True if the engine sends or receives such a tensor.

        Sender and receiver answer alike: of CPU tensors, it leaves to gloo only those that gloo
        refuses.
        """
        if not self.runs_one_hop or len(tensors) != 1 or tag < 0:
            return False
        tensor = tensors[0]
        return tensor.is_cpu and tensor.layout == torch.strided and tensor.is_contiguous()

    def _own_messages(self) -> Messages:
        """Return this rank's end of the messages. The first call creates it."""
        if self._messages is None:
            with self._creating:
                if self._messages is None:
                    self._messages = Messages(self._group("messages"))
        return self._messages

    def _message(
        self,
        name: str,
        start: Callable[[Tensor, int, int], dist.Work],
        tensors: list[Tensor],
        peer: int,
        tag: int,
    ) -> dist.Work:
        if torch.autograd._profiler_enabled():
            with torch.profiler.record_function(f"scaletrain:{name}"):
                return start(tensors[0], peer, tag)
        return start(tensors[0], peer, tag)

    def _forward(self, method: str, *arguments: Any) -> dist.Work:
        """Call a method of gloo's or NCCL's backend itself.

        The same method of torch's ProcessGroup would come back to ours. Or it would keep the
        interpreter lock while it waits for gloo's thread, which may wait for that lock to let go of
        a tensor: ranks would hang for ever, now and then.
        """
        on_cpu = all(tensor.is_cpu for tensor in _tensors(arguments))
        over_nccl = not on_cpu and self.nccl is not None and not self._shares_device()
        backend = self.nccl if over_nccl else self.gloo
        work = getattr(backend, method)(*arguments)
        # Only two ranks take part in a message: counting it would make the ranks' numbers differ.
        # NCCL's failures do not surface in wait() but in its watchdog.
        if over_nccl or method in ("recv", "recv_anysource", "send"):
            return Forwarded(work, str)
        number = self._roll_call.next()
        # As a person knows it: ``_allgather_base`` is an allgather.
        name = method.removeprefix("_").removesuffix("_base")
        tensors = list(_tensors(arguments))  # outputs come before inputs
        count = min((tensor.numel() for tensor in tensors), default=0)
        dtype = tensors[-1].dtype if tensors else None
        record = self._roll_call.began(name, number, count, dtype)
        forwarded = Forwarded(
            work,
            lambda error: self._roll_call.explain(name, number, error),
            lambda: self._roll_call.ended(record),
        )
        self._forwarded.add(forwarded)
        return forwarded

    # The group itself

    def num_called(self) -> int:
        """Return how many collectives this rank has called."""
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
        if self._messages is not None:
            self._messages.close()
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
        if self._messages is not None:
            self._messages.abort()
        for backend in self._backends():
            backend.abort()

    def _backends(self) -> list[Any]:
        return [backend for backend in (self.nccl, self.gloo) if backend]


# By torch's method: how its arguments become a request.
_REQUESTS: dict[str, Callable[..., one_hop_calls.OneHop | None]] = {
    "allgather": one_hop_calls.allgather,
    "_allgather_base": one_hop_calls.allgather_base,
    "alltoall": one_hop_calls.alltoall,
    "alltoall_base": one_hop_calls.alltoall_base,
    "barrier": lambda place, options: one_hop_calls.barrier(place),
    "broadcast": one_hop_calls.broadcast,
    "gather": one_hop_calls.gather,
    "reduce": one_hop_calls.reduce,
    "reduce_scatter": one_hop_calls.reduce_scatter,
    "_reduce_scatter_base": one_hop_calls.reduce_scatter_base,
    "scatter": one_hop_calls.scatter,
}


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

"""The torch.distributed backend ``scaletrain``: ``dist.init_process_group("scaletrain")`` serves DDP and any script unchanged.

Dense CPU allreduces run on our engine, on a thread of their own, so that they overlap with backward. Everything else (other collectives, sparse
tensors, CUDA tensors, point-to-point) is forwarded to gloo, or to NCCL for CUDA tensors: what they can do is not lost.

The algorithm and the wire come from ``Options`` (``init_process_group(..., pg_options=Options(collective="ring"))``), else from the
environment (SCALETRAIN_COLLECTIVE, SCALETRAIN_TRANSPORT), else they are ``auto``.

The backend ``mpi4py`` is the same with MPI's own allreduce over mpi4py, since torch's wheels bring no MPI: for scripts under mpirun.
"""

import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions, ReduceScatterOptions

from scaletrain.engine.choose import NATIVE, Engine, check
from scaletrain.engine.transport import Group
from scaletrain.launching import progress

# Reduce operations that the engine runs. AVG divides the sum at the end.
_REDUCE = {
    dist.ReduceOp.SUM: torch.add,
    dist.ReduceOp.AVG: torch.add,
    dist.ReduceOp.PRODUCT: torch.mul,
    dist.ReduceOp.MIN: torch.minimum,
    dist.ReduceOp.MAX: torch.maximum,
}
# Half-precision terms are summed in float32: with more than two, rounding after each would grow with the number of ranks.
_WIDE = {torch.bfloat16: torch.float32, torch.float16: torch.float32}
_DTYPES = {torch.float32, torch.float64, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, *_WIDE}


class Options(NamedTuple):
    """How allreduces run: names of files in ``collectives/`` and ``engine/transport/``, with options if need be
    (``pipelined_tree:segments=8``), or ``auto``."""

    collective: str = "auto"
    transport: str = "auto"

    @classmethod
    def from_env(cls) -> "Options":
        """Raises ``UserError`` for a name that is not there."""
        chosen = cls(os.environ.get("SCALETRAIN_COLLECTIVE", "auto"), os.environ.get("SCALETRAIN_TRANSPORT", "auto"))
        check(chosen.collective, "collective", "SCALETRAIN_COLLECTIVE")
        check(chosen.transport, "transport", "SCALETRAIN_TRANSPORT")
        return chosen


class ProcessGroup(dist.ProcessGroup):
    """One rank's end of a group. Made by torch.distributed, collectively."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta, options: Options):
        super().__init__(rank, size)
        self._store, self._timeout, self._options = store, timeout, options
        self._gloo = dist.ProcessGroupGloo(dist.PrefixStore("gloo/", store), rank, size, timeout)
        self._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, self._gloo)
        self._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
        if torch.cuda.is_available() and dist.is_nccl_available():
            nccl = dist.ProcessGroupNCCL(dist.PrefixStore("nccl/", store), rank, size)
            self._register_backend(torch.device("cuda"), dist.ProcessGroup.BackendType.NCCL, nccl)
            self._set_default_backend(dist.ProcessGroup.BackendType.NCCL)
        self._lane: _Lane | None = None

    def getBackendName(self) -> str:
        return "scaletrain"

    def allreduce(self, tensors: list[Tensor], options: Any = None) -> dist.Work:
        """In place. Runs on the engine when every tensor is dense, on the CPU and of a plain dtype; else on gloo or NCCL."""
        options = options or dist.AllreduceOptions()
        operation = _operation(options.reduceOp)
        if operation is None or not all(_runs_here(tensor, operation) for tensor in tensors):
            return self._forward("allreduce", tensors, options)
        if torch.autograd._profiler_enabled():
            with torch.profiler.record_function("scaletrain:all_reduce"):
                return self._engine_allreduce(tensors, operation, options)
        return self._engine_allreduce(tensors, operation, options)

    def _engine_allreduce(self, tensors: list[Tensor], operation: Any, options: Any) -> dist.Work:
        if self._lane is None:
            self._lane = _Lane(self._store, self.rank(), self.size(), self._timeout, self._options)
        return self._lane.allreduce(tensors, operation, at_once=not options.asyncOp)

    def _forward(self, name: str, *arguments: Any, **options: Any) -> dist.Work:
        """To gloo itself for tensors on the CPU. The same method of torch's class keeps the interpreter lock while it waits for gloo's
        thread, which may wait for that lock to let go of a tensor: ranks hang for ever, now and then."""
        on_cpu = all(tensor.device.type == "cpu" for tensor in _tensors(arguments))
        if on_cpu and not (name == "barrier" and torch.cuda.is_available()):
            return getattr(self._gloo, _GLOO_NAMES.get(name, name))(*arguments, **options)
        return getattr(super(), name)(*arguments, **options)

    def record(self, *sizes: int) -> dict[str, Any]:
        """For the run's header: the wire and the algorithms that were chosen (for messages of these bytes); empty before the first allreduce."""
        return self._lane.record(*sizes) if self._lane else {}

    def shutdown(self) -> None:
        """Ends the engine's thread after what is under way."""
        if self._lane:
            self._lane.close()
        self._gloo.shutdown()

    def abort(self) -> None:
        self._gloo.abort()


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _forwarded(name: str) -> Callable[..., dist.Work]:
    def forward(self: ProcessGroup, *arguments: Any, **options: Any) -> dist.Work:
        return self._forward(name, *arguments, **options)

    return forward


# Methods that torch's ProcessGroup runs under the interpreter lock, and those that scripts call; gloo's own name where it differs.
_GLOO_NAMES = {
    "all_gather_single": "_allgather_base",
    "reduce_scatter_single": "_reduce_scatter_base",
    "all_to_all_single": "alltoall_base",
}
for _name in (
    *_GLOO_NAMES, "allgather", "_allgather_base", "allreduce_coalesced", "alltoall", "alltoall_base", "barrier", "broadcast", "gather",
    "recv", "recv_anysource", "reduce", "reduce_scatter", "_reduce_scatter_base", "scatter", "send",
):  # fmt: skip
    setattr(ProcessGroup, _name, _forwarded(_name))


def _coalesced(name: str, options_type: type) -> Callable[..., dist.Work]:
    """A coalesced collective (functional collectives call these) as gloo's single one for each pair of tensors."""

    def forward(self: ProcessGroup, outputs: list[Tensor], inputs: list[Tensor], options: Any = None) -> dist.Work:
        options = options or options_type()
        return _All([self._forward(name, o, i, options) for o, i in zip(outputs, inputs, strict=True)])

    return forward


ProcessGroup.allgather_into_tensor_coalesced = _coalesced("_allgather_base", AllgatherOptions)
ProcessGroup.reduce_scatter_tensor_coalesced = _coalesced("_reduce_scatter_base", ReduceScatterOptions)


def _operation(reduce_op: Any) -> Any:
    """The reduce operation as a key of _REDUCE, or None. torch passes a ReduceOp or its inner enum."""
    operation = getattr(reduce_op, "op", reduce_op)
    return operation if operation in _REDUCE else None


def _runs_here(tensor: Tensor, operation: Any) -> bool:
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and tensor.dtype in _DTYPES
    # gloo refuses the average of integers; that answer stays its own.
    return plain and (operation != dist.ReduceOp.AVG or tensor.is_floating_point())


class Pending(dist.Work):
    """Work whose ``wait`` raises what went wrong: that of a work made by torch from a future returns as if nothing had."""

    def __init__(self, future: torch.futures.Future):
        super().__init__()
        self._future = future

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        self._future.wait()
        return True

    def get_future(self) -> torch.futures.Future:
        return self._future

    def is_completed(self) -> bool:
        return self._future.done()

    def is_success(self) -> bool:
        return self._future.done() and self.exception() is None

    def exception(self) -> BaseException | None:
        if self._future.done():
            try:
                self._future.value()
            except Exception as error:
                return error
        return None

    def result(self) -> list[Tensor]:
        return self._future.value()

    def synchronize(self) -> None:
        self.wait()


class Done(dist.Work):
    """Work that is done: its tensors, or what went wrong.

    After a large message the caches hold data, and each further line of Python costs: this is less than a future that is done.
    """

    def __init__(self, outcome: list[Tensor] | BaseException):
        super().__init__()
        self._outcome = outcome

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        self.result()
        return True

    def result(self) -> list[Tensor]:
        if isinstance(self._outcome, BaseException):
            # What torch's own backends raise, and scripts catch.
            raise RuntimeError(f"{type(self._outcome).__name__}: {self._outcome}") from self._outcome
        return self._outcome

    def get_future(self) -> torch.futures.Future:
        future: torch.futures.Future = torch.futures.Future()
        future.set_result(self._outcome)
        return future.then(_result)

    def is_completed(self) -> bool:
        return True

    def is_success(self) -> bool:
        return self.exception() is None

    def exception(self) -> BaseException | None:
        return self._outcome if isinstance(self._outcome, BaseException) else None

    def synchronize(self) -> None:
        self.wait()


class _All(dist.Work):
    """Several works as one."""

    def __init__(self, works: list[dist.Work]):
        super().__init__()
        self._works = works

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        for work in self._works:
            work.wait()
        return True

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self._works)

    def synchronize(self) -> None:
        self.wait()


def _result(outcome: torch.futures.Future) -> list[Tensor]:
    value = outcome.value()
    if isinstance(value, BaseException):
        raise value
    return value


class _Lane:
    """The engine's thread: runs allreduces in the order in which they were asked for, which is the same on every rank."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta, options: Options):
        self._rank, self._size, self._timeout = rank, size, timeout
        self._store = dist.PrefixStore("lane/", store)
        self._options = options
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._sequence = 0
        self._waiting = 0  # tasks not yet done
        self._counting = threading.Lock()
        self._lock = threading.Lock()  # held by whoever uses the engine
        self._engine: Engine | None = None
        self._failed: BaseException | None = None
        self._thread: threading.Thread | None = None

    def allreduce(self, tensors: list[Tensor], operation: Any, at_once: bool) -> dist.Work:
        """``at_once``: the caller waits for the result anyway, so it runs on the caller's thread, if none is under way."""
        self._sequence += 1
        sequence = self._sequence
        if at_once and not self._waiting:
            with self._lock:
                return Done(self._run(tensors, operation, sequence))
        future: torch.futures.Future = torch.futures.Future()
        with self._counting:
            self._waiting += 1
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="scaletrain-lane", daemon=True)
            self._thread.start()
        self._tasks.put(lambda: future.set_result(self._run(tensors, operation, sequence)))
        # Python's Future.set_exception only wraps a value, which DDP's C++ takes for tensors and crashes on. What a callback raises is an
        # error in C++ too: a RuntimeError there and for wait(), with the message of ours.
        return Pending(future.then(_result))

    def _run(self, tensors: list[Tensor], operation: Any, sequence: int) -> list[Tensor] | BaseException:
        """The tensors, reduced, or what went wrong."""
        if self._failed is not None:
            return ConnectionError(f"allreduce #{sequence}: not run, since an earlier one failed: {self._failed}")
        try:
            if self._engine is None:
                group = Group(dist.PrefixStore("wire/", self._store), self._rank, self._size, self._timeout)
                self._engine = Engine(group, *self._options)
            for tensor in tensors:
                self._reduce(tensor, operation)
        except BaseException as error:
            self._failed = self._explain(error, sequence)
            return self._failed
        return tensors

    def _reduce(self, tensor: Tensor, operation: Any) -> None:
        """One tensor of any shape and strides."""
        if tensor.numel() == 0 or self._size == 1:
            return
        progress.entering(f"allreduce {tensor.nbytes:,} bytes")
        wide = _WIDE.get(tensor.dtype) if self._size > 2 or operation == dist.ReduceOp.AVG else None
        in_place = wide is None and tensor.is_contiguous()
        # as_strided: a single element may have any stride and still count as contiguous, which views as bytes do not forgive.
        flat = (
            tensor.as_strided((tensor.numel(),), (1,))
            if in_place
            else tensor.to(wide or tensor.dtype).contiguous().view(-1)
        )
        if not in_place and flat.data_ptr() == tensor.data_ptr():
            flat = flat.clone()
        assert self._engine
        self._engine.allreduce(flat, _REDUCE[operation])
        if operation == dist.ReduceOp.AVG:
            flat /= self._size
        if not in_place:
            tensor.copy_(flat.view(tensor.shape))

    def _explain(self, error: BaseException, sequence: int) -> BaseException:
        """The error with the number of the collective, and the ranks that never entered it."""
        if not isinstance(error, (TimeoutError, ConnectionError)):
            return error
        missing: list[int] = []
        with contextlib.suppress(RuntimeError):  # the store's host is gone too
            self._store.set(f"entered/{sequence}/{self._rank}", "")
            keys = {rank: f"entered/{sequence}/{rank}" for rank in range(self._size)}
            # The others notice at nearly the same time, and say so; who does not has never entered.
            until = time.monotonic() + min(2.0, self._timeout.total_seconds())
            while True:
                missing = [rank for rank, key in keys.items() if not self._store.check([key])]
                if not missing or time.monotonic() > until:
                    break
                time.sleep(0.05)
        who = f"ranks {', '.join(map(str, missing))} never entered it" if missing else "all ranks entered it"
        return type(error)(f"allreduce #{sequence}: {error}; {who}")

    def _work(self) -> None:
        while task := self._tasks.get():
            with self._lock:
                task()
            with self._counting:
                self._waiting -= 1

    def record(self, *sizes: int) -> dict[str, Any]:
        return self._engine.record(*sizes) if self._engine else {}

    def close(self) -> None:
        """Safe to call again: torch ends groups once by itself."""
        if self._thread:
            self._tasks.put(None)
            self._thread.join(self._timeout.total_seconds())
            self._thread = None
        if self._engine:
            self._engine.close()
            self._engine = None


def _create(backend_options: Any, options: Options | None) -> ProcessGroup:
    o = backend_options
    return ProcessGroup(o.store, o.group_rank, o.group_size, o.timeout, options or Options.from_env())


def _create_over_mpi(backend_options: Any, options: Options | None) -> ProcessGroup:
    return _create(backend_options, options or Options(NATIVE, "mpi"))


def register() -> None:
    """Make the backends known to torch.distributed. Safe to call again."""
    for name, create in (("scaletrain", _create), ("mpi4py", _create_over_mpi)):
        if name not in dist.Backend.backend_list:
            dist.Backend.register_backend(name, create, extended_api=True, devices=["cpu", "cuda"])

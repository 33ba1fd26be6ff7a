"""The thread on which a process group's allreduces run, so that they overlap with backward."""

import queue
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from scaletrain.engine.choice import Engine
from scaletrain.engine.roll_call import RollCall
from scaletrain.engine.transport import Group, Reduce
from scaletrain.engine.work import Done, Pending, future_of, result_of
from scaletrain.run import progress


class Operation(NamedTuple):
    """A reduce operation that the engine runs."""

    reduce: Reduce
    average: bool = False  # the sum is divided at the end


# By number: looking up torch's enumeration itself takes 2 us more.
OPERATIONS = {
    int(dist.ReduceOp.SUM): Operation(torch.add),
    int(dist.ReduceOp.AVG): Operation(torch.add, average=True),
    int(dist.ReduceOp.PRODUCT): Operation(torch.mul),
    int(dist.ReduceOp.MIN): Operation(torch.minimum),
    int(dist.ReduceOp.MAX): Operation(torch.maximum),
}
# Half-precision terms are summed in float32: with more than two, rounding after each would grow with the number of ranks.
WIDE = {torch.bfloat16: torch.float32, torch.float16: torch.float32}
DTYPES = {
    torch.float32,
    torch.float64,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
    *WIDE,
}


class Lane:
    """The engine's thread: runs allreduces in the order in which they were asked for, which is the same on every rank."""

    def __init__(self, group: Group, roll_call: RollCall, collective: str, transport: str):
        self._group, self._roll_call = group, roll_call
        self._collective, self._transport = collective, transport
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._waiting = 0  # tasks not yet done
        self._counting = threading.Lock()
        self._lock = threading.Lock()  # held by whoever uses the engine
        self._engine: Engine | None = None
        self._failed: BaseException | None = None
        self._thread: threading.Thread | None = None

    def allreduce(self, tensors: list[Tensor], operation: Operation, at_once: bool) -> dist.Work:
        """``at_once``: the caller waits for the result anyway, so it runs on the caller's thread, if none is under way."""
        number = self._roll_call.next()
        if at_once and not self._waiting:
            with self._lock:
                return Done(self._run(tensors, operation, number))
        future = future_of(tensors)
        with self._counting:
            self._waiting += 1
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="scaletrain-lane", daemon=True)
            self._thread.start()
        self._tasks.put(self._task(future, tensors, operation, number))
        # Python's Future.set_exception only wraps a value, which DDP's C++ takes for tensors and crashes on. What a callback raises is an
        # error in C++ too: a RuntimeError there and for wait(), with the message of ours.
        return Pending(future.then(result_of))

    def _task(
        self, future: torch.futures.Future, tensors: list[Tensor], operation: Operation, number: int
    ) -> Callable[[], None]:
        """What the thread is given to do."""
        return lambda: future.set_result(self._run(tensors, operation, number))

    def _run(
        self, tensors: list[Tensor], operation: Operation, number: int
    ) -> list[Tensor] | BaseException:
        """The tensors, reduced, or what went wrong."""
        if self._failed is not None:
            return ConnectionError(
                f"allreduce #{number}: not run, since an earlier one failed: {self._failed or type(self._failed).__name__}"
            )
        try:
            # Tensors may require gradients, or be made in this mode; buffers that are made now are used later, in whatever mode the caller is.
            with torch.inference_mode():
                if self._engine is None:
                    self._engine = Engine(self._group, self._collective, self._transport)
                for tensor in tensors:
                    self._reduce(tensor, operation)
        except (TimeoutError, ConnectionError) as error:
            self._failed = type(error)(self._roll_call.explain("allreduce", number, error))
            return self._failed
        except BaseException as error:
            self._failed = error
            if not isinstance(error, Exception) and threading.current_thread() is not self._thread:
                raise  # Ctrl-C: the program is to end, not the collective to fail
            return error
        return tensors

    def _reduce(self, tensor: Tensor, operation: Operation) -> None:
        """One tensor of any shape and strides."""
        if tensor.numel() == 0 or self._group.size == 1:
            return
        progress.entering("allreduce", tensor.nbytes)
        wide = WIDE.get(tensor.dtype) if self._group.size > 2 or operation.average else None
        in_place = wide is None and tensor.is_contiguous()
        if in_place and tensor.dim() == 1 and tensor.numel() > 1:
            flat = tensor
        elif in_place:
            # A single element may have any stride and still count as contiguous, which views as bytes do not forgive.
            flat = tensor.as_strided((tensor.numel(),), (1,))
        else:
            flat = tensor.to(wide or tensor.dtype).contiguous().view(-1)
            if flat.data_ptr() == tensor.data_ptr():
                flat = flat.clone()
        self._sum(flat, operation.reduce)
        if operation.average:
            flat /= self._group.size
        if not in_place:
            tensor.copy_(flat.view(tensor.shape))

    def _sum(self, flat: Tensor, reduce: Reduce) -> None:
        assert self._engine
        self._engine.allreduce(flat, reduce)

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
            self._thread.join(self._group.timeout.total_seconds())
            self._thread = None
        if self._engine:
            self._engine.close()
            self._engine = None

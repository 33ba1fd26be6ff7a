"""The thread of a process group's allreduces, which lets them overlap with backward."""

import queue
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from scaletrain.engine.engine import Engine
from scaletrain.engine.roll_call import RollCall
from scaletrain.engine.transport import Group, Reduce
from scaletrain.engine.work import Done, FutureWork, future_of, result_of
from scaletrain.run import progress


class Operation(NamedTuple):
    """A reduce operation that the engine runs."""

    reduce: Reduce
    average: bool = False  # the sum is divided at the end


def number_of(operation: Any) -> int:
    """Return the number of one of torch's reduce operations, a ``ReduceOp`` or its inner enum."""
    return int(getattr(operation, "op", operation))


# By number: looking up torch's enumeration itself takes 2 us more.
OPERATIONS = {
    number_of(dist.ReduceOp.SUM): Operation(torch.add),
    number_of(dist.ReduceOp.AVG): Operation(torch.add, average=True),
    number_of(dist.ReduceOp.PRODUCT): Operation(torch.mul),
    number_of(dist.ReduceOp.MIN): Operation(torch.minimum),
    number_of(dist.ReduceOp.MAX): Operation(torch.maximum),
}
# Half-precision terms are summed in float32: with more than two, rounding after each would grow
# with the number of ranks.
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
    """Runs a group's allreduces in the order of the calls, which is the same on every rank.

    An allreduce takes one of two ways:

    1. The caller waits for the result anyway, and none is under way: it runs on the caller's
       thread.
    2. Otherwise it becomes a task of the lane's thread, and the caller gets a future.

    Args:
        group: the ranks.
        roll_call: numbers the collectives of the process group.
        collective: the algorithm as a person writes it.
        transport: the wire likewise.
    """

    def __init__(self, group: Group, roll_call: RollCall, collective: str, transport: str):
        self._group = group
        self._roll_call = roll_call
        self._collective = collective
        self._transport = transport
        # Callers put tasks in, the lane's thread takes them out. None ends the thread.
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        # Tasks that are not done. Callers add to it and the lane's thread subtracts, both under
        # _counting. Callers read it without the lock: they only ask whether it is 0, and a caller
        # that sees 0 has no task in the queue.
        self._num_unfinished = 0
        self._counting = threading.Lock()
        # The thread that uses the engine holds it: a caller, or the lane's thread.
        self._engine_lock = threading.Lock()
        # Both of these are written and read under _engine_lock. Exceptions: record reads the engine
        # without it, and close ends the engine when the thread has ended.
        self._engine: Engine | None = None  # created by the first allreduce
        self._failure: BaseException | None = None  # the first one: nothing runs after it
        self._thread: threading.Thread | None = None  # started by the first task

    def allreduce(self, tensors: list[Tensor], operation: Operation, at_once: bool) -> dist.Work:
        """Reduce tensors over all ranks, in place. Collective.

        Args:
            tensors: of any shape and strides, and of one of ``DTYPES``.
            operation: one of ``OPERATIONS``.
            at_once: the caller waits for the result anyway.

        Returns:
            The work; its ``wait`` raises RuntimeError if the collective failed.
        """
        number = self._roll_call.next()
        if at_once and not self._num_unfinished:
            with self._engine_lock:
                return Done(self._run(tensors, operation, number))
        future = future_of(tensors)
        # Counted before it is queued: otherwise a caller could read 0 with this task on its way.
        with self._counting:
            self._num_unfinished += 1
        # Started on demand: a script that waits for each result needs no thread.
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._run_tasks, name="scaletrain-lane", daemon=True
            )
            self._thread.start()
        self._tasks.put(self._task(future, tensors, operation, number))
        # Python's Future.set_exception only wraps a value, which DDP's C++ takes for tensors and
        # crashes on. An exception of a callback is an error in C++ too: a RuntimeError there and
        # for wait(), with our message.
        return FutureWork(future.then(result_of))

    def _task(
        self, future: torch.futures.Future, tensors: list[Tensor], operation: Operation, number: int
    ) -> Callable[[], None]:
        """Return the task for the lane's thread: it completes the future, and raises nothing."""
        return lambda: future.set_result(self._run(tensors, operation, number))

    def _run(
        self, tensors: list[Tensor], operation: Operation, number: int
    ) -> list[Tensor] | BaseException:
        """Return the reduced tensors, or the failure. The caller holds ``_engine_lock``."""
        if self._failure is not None:
            reason = self._failure or type(self._failure).__name__
            return ConnectionError(
                f"allreduce #{number}: not run, since an earlier one failed: {reason}"
            )
        try:
            # Tensors may require gradients, or be made in this mode. Buffers that are made now are
            # used later, in whatever mode the caller is then.
            with torch.inference_mode():
                if self._engine is None:
                    self._engine = Engine(self._group, self._collective, self._transport)
                for tensor in tensors:
                    self._reduce(tensor, operation)
        except (TimeoutError, ConnectionError) as error:
            self._failure = type(error)(self._roll_call.explain("allreduce", number, error))
            return self._failure
        except BaseException as error:
            self._failure = error
            if not isinstance(error, Exception) and threading.current_thread() is not self._thread:
                raise  # Ctrl-C: the program is to end, not the collective to fail
            return error
        return tensors

    def _reduce(self, tensor: Tensor, operation: Operation) -> None:
        """Reduce one tensor of any shape and strides, in place.

        1. Take a flat view of it, or a flat copy where there is no view or the sum is to be wider.
        2. Reduce the flat tensor, and divide for an average.
        3. Copy it back, if it is a copy.
        """
        if tensor.numel() == 0 or self._group.size == 1:
            return
        progress.entering("allreduce", tensor.nbytes)
        # Two half-precision terms are rounded once either way.
        rounds_twice = self._group.size > 2 or operation.average
        wide = WIDE.get(tensor.dtype) if rounds_twice else None
        in_place = wide is None and tensor.is_contiguous()
        if in_place and tensor.dim() == 1 and tensor.numel() > 1:
            flat = tensor
        elif in_place:
            # A single element may have any stride and still count as contiguous, which a view as
            # bytes does not accept.
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
        """Reduce a flat, contiguous tensor over all ranks, in place."""
        assert self._engine
        self._engine.allreduce(flat, reduce)

    def _run_tasks(self) -> None:
        """Run the tasks, one after another, until None comes. This is the lane's thread."""
        while task := self._tasks.get():
            with self._engine_lock:
                task()
            with self._counting:
                self._num_unfinished -= 1

    def record(self, *sizes: int) -> dict[str, Any]:
        """Return the ``Engine.record``, for the run's header; empty before the first use."""
        return self._engine.record(*sizes) if self._engine else {}

    def close(self) -> None:
        """End the thread after the tasks, and give the wire back. Not collective.

        Safe to call again: torch ends groups once by itself.
        """
        if self._thread:
            self._tasks.put(None)
            self._thread.join(self._group.timeout.total_seconds())
            self._thread = None
        if self._engine:
            self._engine.close()
            self._engine = None

"""The thread of a process group's collectives, which lets them overlap with backward."""

import queue
import threading
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from scaletrain.engine.engine import Engine
from scaletrain.engine.one_hop_calls import OneHop
from scaletrain.engine.operations import Operation, wide_dtype
from scaletrain.engine.roll_call import RollCall
from scaletrain.engine.transport import UNEVEN, Call, Ends, Group, Reduce
from scaletrain.engine.work import Done, FutureWork, future_of, result_of
from scaletrain.run import progress


class AllReduce(NamedTuple):
    """A request for an allreduce."""

    name: str
    tensors: list[Tensor]  # reduced in place
    operation: Operation


Request = AllReduce | OneHop


class Lane:
    """Runs a group's collectives in the order of the calls, which is the same on every rank.

    A collective takes one of two ways:

    1. The caller waits for the result anyway, and none is under way: it runs on the caller's
       thread.
    2. Otherwise it becomes a task, and the caller gets a future. The lane's thread runs the tasks,
       or a thread that waits for one does.

    Args:
        group: the ranks.
        roll_call: numbers the collectives of the process group.
        collective: the algorithm as a person writes it.
        transport: the wire likewise.
    """

    _helps = True  # threads that wait run tasks themselves

    def __init__(self, group: Group, roll_call: RollCall, collective: str, transport: str):
        # Set by ``abort``, read by the threads that wait for peers.
        self._ended = threading.Event()
        self._group = group._replace(ended=self._ended)
        self._roll_call = roll_call
        self._collective = collective
        self._transport = transport
        # Held while a collective gets its number and its place: they run in the order of numbers.
        self._ordering = threading.Lock()
        # The thread that runs a task holds it: the lane's, or one that waits (``_help_on``).
        self._turn = threading.Lock()
        # Callers append tasks; the thread that holds _turn takes them out.
        self._tasks: deque[Callable[[], None]] = deque()
        # One for each task. Callers put them in, the lane's thread takes them out. False ends it.
        self._tokens: queue.SimpleQueue[bool] = queue.SimpleQueue()
        # The thread that runs a task, 0 if there is none. The thread that holds _turn writes it;
        # others only ask whether it is they.
        self._runner = 0
        # Tasks that are not done, callbacks included. Callers add to it and the thread that runs
        # the task subtracts, both under _ordering.
        self._num_unfinished = 0
        # The thread that uses the engine holds it: a caller, or the lane's thread.
        self._engine_lock = threading.Lock()
        # Both of these are written and read under _engine_lock. Exceptions: record reads the engine
        # without it, and close ends the engine when the thread has ended.
        self._engine: Engine | None = None  # created by the first collective
        self._failure: BaseException | None = None  # of an exchange, the first: none runs after it
        self._thread: threading.Thread | None = None  # started by the first task

    def allreduce(self, tensors: list[Tensor], operation: Operation, at_once: bool) -> dist.Work:
        """Reduce tensors over all ranks, in place. Collective.

        A callback of an earlier allreduce's future may call it, and wait for the result: it comes
        right after that one, on every rank.

        Args:
            tensors: of any shape and strides, and of one of ``transport.DTYPES``.
            operation: one of ``operations.OPERATIONS``.
            at_once: the caller waits for the result anyway.

        Returns:
            The work; its ``wait`` raises RuntimeError if the collective failed.
        """
        return self.call(AllReduce("allreduce", tensors, operation), at_once)

    def call(self, request: Request, at_once: bool) -> dist.Work:
        """Run a collective. Collective; see ``allreduce``."""
        if self._is_running_task():
            # In a callback. A task would never start: this thread runs the callback.
            with self._engine_lock:
                return Done(self._run(request, self._roll_call.next()))
        with self._ordering:
            number = self._roll_call.next()
            may_run = at_once and not self._num_unfinished
            if not (may_run and self._engine_lock.acquire(blocking=False)):
                return self._queue(request, number)
        try:
            return Done(self._run(request, number))
        finally:
            self._engine_lock.release()

    def _queue(self, request: Request, number: int) -> dist.Work:
        """Give a collective to the lane's thread. The caller holds ``_ordering``."""
        future = future_of(request.tensors)
        self._num_unfinished += 1
        # Started on demand: a script that waits for each result needs no thread.
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._run_tasks, name="scaletrain-lane", daemon=True
            )
            self._thread.start()
        self._tasks.append(self._task(future, request, number))
        self._tokens.put(True)
        # Python's Future.set_exception only wraps a value, which DDP's C++ takes for tensors and
        # crashes on. An exception of a callback is an error in C++ too: a RuntimeError there and
        # for wait(), with our message.
        return FutureWork(future.then(result_of), self._help_on)

    def _task(
        self, future: torch.futures.Future, request: Request, number: int
    ) -> Callable[[], None]:
        """Return the task: it completes the future. It raises Ctrl-C alone, where that came."""

        def task() -> None:
            with self._engine_lock:
                outcome = self._run(request, number)
            # Its callbacks run here, and may need the engine.
            future.set_result(outcome)
            if isinstance(outcome, KeyboardInterrupt):
                raise outcome

        return task

    def _run(self, request: Request, number: int) -> list[Tensor] | BaseException:
        """Return the result's tensors, or the failure. The caller holds ``_engine_lock``."""
        if self._failure is not None:
            reason = self._failure or type(self._failure).__name__
            return ConnectionError(
                f"{request.name} #{number}: not run, since an earlier one failed: {reason}"
            )
        try:
            self._group.check_not_ended()
            # Tensors may require gradients, or be made in this mode. Buffers that are made now are
            # used later, in whatever mode the caller is then.
            with torch.inference_mode():
                if isinstance(request, AllReduce):
                    for tensor in request.tensors:
                        self._reduce(tensor, request.operation, number)
                else:
                    self._pass_on(request, number)
        except BaseException as error:
            if not isinstance(error, Exception) and not self._is_running_task():
                raise  # Ctrl-C: the program is to end, not the collective to fail
            return self._failure or error
        return request.tensors

    def _reduce(self, tensor: Tensor, operation: Operation, number: int) -> None:
        """Reduce one tensor of any shape and strides, in place.

        1. Take a flat view of it, or a flat copy where there is no view or the sum is to be wider.
        2. Reduce the flat tensor, and divide for an average.
        3. Copy it back, if it is a copy.
        """
        if tensor.numel() == 0 or self._group.size == 1:
            return
        progress.entering("allreduce", tensor.nbytes)
        is_contiguous = tensor.is_contiguous()
        if not is_contiguous:
            tensor = _without_repetitions(tensor)
        wide = wide_dtype(tensor.dtype, operation, self._group.size)
        in_place = wide is None and is_contiguous and not tensor.is_neg()
        if in_place:
            flat = _as_flat(tensor)
        else:
            flat = tensor.resolve_neg().to(wide or tensor.dtype).contiguous().view(-1)
            if flat.data_ptr() == tensor.data_ptr():
                flat = flat.clone()
        self._exchange(flat, operation.reduce, number)
        if operation.average:
            flat /= self._group.size
        if not in_place:
            tensor.copy_(flat.view(tensor.shape))

    def _pass_on(self, request: OneHop, number: int) -> None:
        """Run a collective of one hop.

        1. Take flat views of the chunks, or flat copies, as ``_reduce`` does.
        2. Exchange them, and divide for an average.
        3. Copy results back where they are no views.
        """
        chunks = [*request.sources.values(), *request.targets.values()]
        num_bytes = sum(chunk.nbytes for chunk in chunks)
        if not num_bytes and chunks and request.num_elements != UNEVEN:
            return
        progress.entering(request.name, num_bytes)
        operation = request.operation
        dtype = chunks[0].dtype if chunks else None
        wide = None
        if operation is not None and dtype is not None:
            wide = wide_dtype(dtype, operation, self._group.size)
        sources = {chunk: _flat(tensor, wide) for chunk, tensor in request.sources.items()}
        targets: dict[int, Tensor] = {}
        copied = []  # (target, flat tensor) of those that are no views
        for chunk, target in request.targets.items():
            if wide is None and target.is_contiguous() and not target.is_neg():
                targets[chunk] = _as_flat(target)
            else:
                targets[chunk] = target.new_empty(target.numel(), dtype=wide or dtype)
                copied.append((target, targets[chunk]))
        reduce = operation.reduce if operation is not None else None
        call = Call(
            number, request.num_elements, wide or dtype, reduce, request.collective, request.root
        )
        ends = Ends(sources, targets)
        self._guard(request.name, call, lambda engine: engine.exchange(call, ends))
        if operation is not None and operation.average:
            for flat in targets.values():
                flat /= self._group.size
        for target, flat in copied:
            target.copy_(flat.view(target.shape))

    def _exchange(self, flat: Tensor, reduce: Reduce, number: int) -> None:
        """Reduce a flat, contiguous tensor over all ranks, in place."""
        call = Call(number, flat.numel(), flat.dtype, reduce)
        self._guard(call.collective, call, lambda engine: self._sum(flat, reduce, number))

    def _guard(self, name: str, call: Call, exchange: Callable[[Engine], None]) -> None:
        """Run an exchange with the engine, recorded under a name.

        A failure here ends the lane: the other ranks' messages may be anywhere. A failure before
        or after it concerns this rank's tensors alone.
        """
        record = self._roll_call.began(name, call.number, call.num_elements, call.dtype)
        try:
            if self._engine is None:
                self._engine = Engine(self._group, self._collective, self._transport)
            exchange(self._engine)
        except (TimeoutError, ConnectionError) as error:
            explained = self._roll_call.explain(call.collective, call.number, error, call.wanted())
            self._failure = type(error)(explained)
            raise self._failure from error
        except BaseException as error:
            self._failure = error
            raise
        self._roll_call.ended(record)

    def _sum(self, flat: Tensor, reduce: Reduce, number: int) -> None:
        """Reduce a flat, contiguous tensor over all ranks, in place."""
        assert self._engine
        self._engine.allreduce(flat, reduce, number)

    def _run_tasks(self) -> None:
        """Run a task for each token, until the token that ends it. This is the lane's thread."""
        while self._tokens.get():
            with self._turn:
                # Else a thread that waits has run it.
                if self._tasks:
                    self._run_next()

    def _run_next(self) -> None:
        """Run the next task. The caller holds ``_turn``."""
        outer, self._runner = self._runner, threading.get_ident()
        try:
            self._tasks.popleft()()
        finally:
            self._runner = outer
            with self._ordering:
                self._num_unfinished -= 1

    def _help_on(self, future: torch.futures.Future, has_limit: bool) -> None:
        """Run tasks until the future is done, if this thread may run them.

        1. In a callback, this thread runs the tasks: one waits for a later one, whose task nobody
           else will run.
        2. Else the lane's thread might. But to wake it, and to pass the interpreter's lock to and
           fro, takes longer than a short collective.

        Args:
            future: of a task.
            has_limit: the wait ends after a time of its own, which a task would overrun.
        """
        if self._is_running_task():
            while not future.done():
                if not self._tasks:
                    raise ConnectionError("not run, since its group was destroyed")
                self._run_next()
        elif self._helps and not has_limit and self._turn.acquire(blocking=False):
            try:
                while self._tasks and not future.done():
                    self._run_next()
            finally:
                self._turn.release()

    def _is_running_task(self) -> bool:
        """Return True if this thread runs a task now: then it is in a callback."""
        return self._runner == threading.get_ident()

    def record(self, *sizes: int) -> dict[str, Any]:
        """Return the ``Engine.record``, for the run's header; empty before the first use."""
        return self._engine.record(*sizes) if self._engine else {}

    def abort(self) -> None:
        """End the waits of other threads for peers: they raise ConnectionError. Not collective.

        Waits inside gloo, MPI or NCCL last for their own limits: nothing can end them.
        """
        self._ended.set()

    def limit(self, timeout: timedelta) -> None:
        """Change the group's timeout, for the allreduces that are called from now on."""
        with self._engine_lock:
            self._group = self._group._replace(timeout=timeout)
            if self._engine:
                self._engine.limit(timeout)

    def close(self) -> None:
        """End the thread after the tasks, and give the wire back. Not collective.

        Safe to call again: torch ends groups once by itself.
        """
        if self._thread:
            self._tokens.put(False)
            self._thread.join(self._group.timeout.total_seconds())
            self._thread = None
        if self._engine:
            self._engine.close()
            self._engine = None


def _as_flat(tensor: Tensor) -> Tensor:
    """Return a one-dimensional view of a contiguous tensor."""
    if tensor.dim() == 1 and tensor.numel() != 1:
        return tensor
    # A single element may have any stride and still count as contiguous, which a view as bytes
    # does not accept.
    return tensor.as_strided((tensor.numel(),), (1,))


def _flat(tensor: Tensor, wide: torch.dtype | None) -> Tensor:
    """Return a one-dimensional, contiguous tensor with these values: a view, or a copy."""
    tensor = tensor.resolve_neg()
    if wide is not None:
        tensor = tensor.to(wide)
    return _as_flat(tensor.contiguous())


def _without_repetitions(tensor: Tensor) -> Tensor:
    """Return a view with each element once, of a tensor that ``expand`` has made larger."""
    for dimension, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dimension] > 1:
            tensor = tensor.narrow(dimension, 0, 1)
    return tensor

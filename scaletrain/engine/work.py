"""The results of the backend's collectives: under way, done, forwarded, or several as one.

torch's C++ calls the methods of these classes, too.
"""

import functools
import threading
from collections.abc import Callable
from datetime import timedelta
from types import CodeType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_UNKNOWN = 100  # torch's number of a collective that a holder does not know
_NO_LIMIT = timedelta(0)  # the limit is the group's, which ends the work itself


class _Seeker(threading.local):
    """What a thread knows while it seeks the work in a holder (``show_held``)."""

    is_seeking = False
    found: "Work | None" = None


_seeker = _Seeker()


def leave_uncompiled(code: CodeType) -> None:
    """Let torch.compile run a function as it is, and everything that it calls.

    It does as ``torch.compiler.disable``, without loading the compiler. DDP's C++ calls
    collectives, and waits for them, amidst functions that are compiled.
    """
    eval_frame = torch._C._dynamo.eval_frame
    skip = eval_frame._FrameAction.SKIP
    eval_frame.set_code_exec_strategy(code, eval_frame._FrameExecStrategy(skip, skip))


class Work(dist.Work):
    """Work of a Python backend."""

    def __init_subclass__(cls) -> None:
        # A thread that waits may run the collective.
        leave_uncompiled(cls.wait.__code__)

    def get_future(self) -> torch.futures.Future:
        """Return the future of the tensors."""
        if _seeker.is_seeking:
            _seeker.found = self
            return torch.futures.Future()
        return self.future()

    def future(self) -> torch.futures.Future:
        """Return the future of the tensors."""
        raise NotImplementedError


def _held(holder: dist.Work) -> Work | None:
    """Return the work in a holder; None: it is a work of torch's own."""
    # gloo's and NCCL's say which collective they are.
    op_type = holder._get_op_type()  # type: ignore[attr-defined]
    if op_type != _UNKNOWN:
        return None
    _seeker.is_seeking = True
    try:
        holder.get_future()
        return _seeker.found
    except RuntimeError:
        return None
    finally:
        _seeker.is_seeking = False
        _seeker.found = None


def _passed_on(name: str) -> Callable[..., Any]:
    """Return a method of torch's class that asks the work in a holder."""
    of_torch = getattr(dist.Work, name)

    @functools.wraps(of_torch)
    def method(self: dist.Work, *arguments: Any) -> Any:
        work = _held(self)
        return of_torch(self, *arguments) if work is None else getattr(work, name)(*arguments)

    return method


@functools.cache  # once a process
def show_held() -> None:
    """Let scripts ask the work of a Python backend everything.

    torch 2.14 hands them a holder, which passes on ``wait`` and ``get_future`` alone. It gives the
    answers of an empty work to the rest, so that a script that polls ``is_completed`` would poll
    for ever.
    """
    for name in ("is_completed", "is_success", "exception", "result", "_source_rank"):
        setattr(dist.Work, name, _passed_on(name))


# The beginning of an error that a future's callback raised, in torch's words.
_OF_CALLBACKS = "Got the following error when running the callback: "


class FutureWork(Work):
    """Work backed by a future. ``wait`` re-raises a failure; the Work torch builds hides it.

    Args:
        future: of the tensors.
        help_on: called before a wait, with the future and whether the wait has a time limit. If
            the present thread can complete the future, it does so now.
    """

    def __init__(
        self,
        future: torch.futures.Future,
        help_on: Callable[[torch.futures.Future, bool], None] = lambda future, has_limit: None,
    ):
        super().__init__()
        self._future = future
        self._help_on = help_on

    def wait(self, timeout: timedelta = _NO_LIMIT) -> bool:
        """Wait for the result. Signals come through meanwhile.

        Raises:
            RuntimeError: the collective failed, or ``timeout`` is over.
        """
        self._help_on(self._future, timeout > _NO_LIMIT)
        if not self._future.done():
            self._wait_until_done(timeout.total_seconds() if timeout > _NO_LIMIT else None)
        try:
            self._future.wait()
        except RuntimeError as error:
            # torch adds where it called back, and Python's stack there.
            words = str(error).removeprefix(_OF_CALLBACKS).partition("\n")[0]
            raise RuntimeError(words) from None
        return True

    def _wait_until_done(self, seconds: float | None) -> None:
        # A future's own wait takes no time limit, and holds back Ctrl-C.
        done = threading.Event()  # set by the thread that completes the future
        self._future.add_done_callback(lambda _: done.set())
        if not done.wait(seconds):
            raise RuntimeError(f"allreduce: not done within the {seconds:g} s that wait was given")

    def future(self) -> torch.futures.Future:
        """Return the future of the tensors."""
        return self._future

    def is_completed(self) -> bool:
        """Return True if the collective is over, well or badly."""
        return self._future.done()

    def is_success(self) -> bool:
        """Return True if the collective is over and went well."""
        return self._future.done() and self.exception() is None

    def exception(self) -> BaseException | None:
        """Return the failure, if there is one by now."""
        if self._future.done():
            try:
                self._future.value()
            except Exception as error:
                return error
        return None

    def result(self) -> list[Tensor]:
        """Return the tensors of a collective that is over."""
        return self._future.value()

    def synchronize(self) -> None:
        """Wait for the result."""
        self.wait()


class Done(Work):
    """Work that is over: its tensors, or its failure.

    After a large message the caches hold data, so that each further line of Python is slow. This is
    less than a future that is done.
    """

    def __init__(self, outcome: list[Tensor] | BaseException):
        super().__init__()
        self._outcome = outcome

    def wait(self, timeout: timedelta = _NO_LIMIT) -> bool:
        """Return True at once, or raise as ``result``."""
        self.result()
        return True

    def result(self) -> list[Tensor]:
        """Return the tensors.

        Raises:
            RuntimeError: the collective failed. torch's own backends raise this type, and
                scripts catch it.
        """
        if isinstance(self._outcome, BaseException):
            raise RuntimeError(
                f"{type(self._outcome).__name__}: {self._outcome}"
            ) from self._outcome
        return self._outcome

    def future(self) -> torch.futures.Future:
        """Return a future that is done."""
        failed = isinstance(self._outcome, BaseException)
        future = future_of([] if failed else self._outcome)  # type: ignore[arg-type]
        future.set_result(self._outcome)
        # Through a callback, as in ``Lane.allreduce``: C++ sees only its exceptions as errors.
        return future.then(result_of)

    def is_completed(self) -> bool:
        """Return True."""
        return True

    def is_success(self) -> bool:
        """Return True if the collective went well."""
        return self.exception() is None

    def exception(self) -> BaseException | None:
        """Return the failure, if there is one."""
        return self._outcome if isinstance(self._outcome, BaseException) else None

    def synchronize(self) -> None:
        """Raise as ``result`` if the collective failed."""
        self.wait()


class Forwarded(Work):
    """Another backend's work. ``wait`` raises its failure in our words.

    Args:
        work: that work.
        explain: returns the message for its failure.
        on_end: called when a wait for it has ended well.
    """

    def __init__(
        self,
        work: dist.Work,
        explain: Callable[[BaseException], str],
        on_end: Callable[[], None] = lambda: None,
    ):
        super().__init__()
        self._work = work
        self._explain = explain
        self._on_end = on_end

    def wait(self, timeout: timedelta = _NO_LIMIT) -> bool:
        """Wait for the result.

        Raises:
            RuntimeError: the collective failed.
        """
        try:
            is_done = self._work.wait(timeout)
        except RuntimeError as error:
            raise RuntimeError(self._explain(error)) from error
        self._on_end()
        return is_done

    def future(self) -> torch.futures.Future:
        """Return that work's future."""
        return self._work.get_future()

    def is_completed(self) -> bool:
        """Return True if that work is over."""
        return self._work.is_completed()

    def is_success(self) -> bool:
        """Return True if that work is over and went well."""
        return self._work.is_success()

    def exception(self) -> BaseException | None:
        """Return that work's failure, if there is one by now."""
        return self._work.exception()

    def result(self) -> list[Tensor]:
        """Return that work's tensors."""
        return self._work.result()

    def _source_rank(self) -> int:
        """Return the rank from which a message came, after ``recv`` from any."""
        return self._work._source_rank()

    def synchronize(self) -> None:
        """Wait for the result."""
        self.wait()


class All(Work):
    """Several works as one."""

    def __init__(self, works: list[dist.Work]):
        super().__init__()
        self._works = works

    def wait(self, timeout: timedelta = _NO_LIMIT) -> bool:
        """Wait for each of them."""
        for work in self._works:
            work.wait(timeout)
        return True

    def future(self) -> torch.futures.Future:
        """Return a future of the tensors of all of them."""
        futures = [work.get_future() for work in self._works]
        return torch.futures.collect_all(futures).then(_tensors_of_all)

    def result(self) -> list[Tensor]:
        """Return the tensors of all of them."""
        return [tensor for work in self._works for tensor in work.result()]

    def is_completed(self) -> bool:
        """Return True if all of them are over."""
        return all(work.is_completed() for work in self._works)

    def synchronize(self) -> None:
        """Wait for each of them."""
        self.wait()


def _tensors_of_all(futures: torch.futures.Future) -> list[Tensor]:
    return [tensor for future in futures.value() for tensor in future.value()]


def future_of(tensors: list[Tensor]) -> torch.futures.Future:
    """Return a future for these tensors, or for a failure.

    A thread that waits for it also makes its streams wait for those that compute the tensors.
    """
    # The CPU has no streams, so it is no device to wait for.
    devices = {tensor.device for tensor in tensors if not tensor.is_cpu}
    return torch.futures.Future(devices=list(devices)) if devices else torch.futures.Future()


def result_of(outcome: torch.futures.Future) -> list[Tensor]:
    """Return the tensors in a future that is done, or raise the failure in it."""
    value = outcome.value()
    if isinstance(value, BaseException):
        raise value
    return value

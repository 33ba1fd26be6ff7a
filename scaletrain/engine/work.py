"""What the backend's collectives return: work under way, done, handed on, or several as one.

Written in Python for torch's C++, which calls these methods too.
"""

import threading
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


class Pending(dist.Work):
    """Work whose ``wait`` raises what went wrong: that of a work made by torch from a future returns as if nothing had."""

    def __init__(self, future: torch.futures.Future):
        super().__init__()
        self._future = future

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        if timeout > timedelta(0):  # else the group's, which ends the work itself
            done = threading.Event()
            self._future.add_done_callback(lambda _: done.set())
            if not done.wait(timeout.total_seconds()):
                raise RuntimeError(
                    f"allreduce: not done within the {timeout.total_seconds():g} s that wait was given"
                )
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
            raise RuntimeError(
                f"{type(self._outcome).__name__}: {self._outcome}"
            ) from self._outcome
        return self._outcome

    def get_future(self) -> torch.futures.Future:
        future = future_of([] if isinstance(self._outcome, BaseException) else self._outcome)
        future.set_result(self._outcome)
        return future.then(result_of)

    def is_completed(self) -> bool:
        return True

    def is_success(self) -> bool:
        return self.exception() is None

    def exception(self) -> BaseException | None:
        return self._outcome if isinstance(self._outcome, BaseException) else None

    def synchronize(self) -> None:
        self.wait()


class Forwarded(dist.Work):
    """Another group's work on a collective, whose failure in ``wait`` is told in the words of ``explain``."""

    def __init__(self, work: dist.Work, explain: Callable[[BaseException], str]):
        super().__init__()
        self._work, self._explain = work, explain

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        try:
            return self._work.wait(timeout)
        except RuntimeError as error:
            raise RuntimeError(self._explain(error)) from error

    def get_future(self) -> torch.futures.Future:
        return self._work.get_future()

    def is_completed(self) -> bool:
        return self._work.is_completed()

    def is_success(self) -> bool:
        return self._work.is_success()

    def exception(self) -> BaseException | None:
        return self._work.exception()

    def result(self) -> list[Tensor]:
        return self._work.result()

    def synchronize(self) -> None:
        self.wait()


class All(dist.Work):
    """Several works as one."""

    def __init__(self, works: list[dist.Work]):
        super().__init__()
        self._works = works

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        for work in self._works:
            work.wait(timeout)
        return True

    def get_future(self) -> torch.futures.Future:
        return torch.futures.collect_all([work.get_future() for work in self._works]).then(
            lambda all_of: [tensor for future in all_of.value() for tensor in future.value()]
        )

    def result(self) -> list[Tensor]:
        return [tensor for work in self._works for tensor in work.result()]

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self._works)

    def synchronize(self) -> None:
        self.wait()


def future_of(tensors: list[Tensor]) -> torch.futures.Future:
    """For these tensors, or what went wrong: who waits for it waits for the streams on which they were made, too."""
    devices = {tensor.device for tensor in tensors if not tensor.is_cpu}
    return torch.futures.Future(devices=list(devices)) if devices else torch.futures.Future()


def result_of(outcome: torch.futures.Future) -> list[Tensor]:
    value = outcome.value()
    if isinstance(value, BaseException):
        raise value
    return value

"""A group as torch 2.14 and later know it: a backend beneath torch's own ProcessGroup.

torch's C++ calls it. So its dispatcher sees every collective: dispatch modes, ``torch.compile`` and
TORCH_DISTRIBUTED_DEBUG=DETAIL work as with gloo.
"""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d

from scaletrain.engine import work
from scaletrain.engine.choice import Options
from scaletrain.engine.group_calls import GroupCalls
from scaletrain.engine.spelling import Face

# Before, torch's C++ called no methods of a Python subclass.
_VERSION = torch.torch_version.TorchVersion(torch.__version__)
SUPPORTED = _VERSION >= "2.14"


class _Answer:
    """A truth value that torch's Python reads as an attribute, and its C++ calls."""

    def __init__(self, value: bool):
        self._value = value

    def __bool__(self) -> bool:
        return self._value

    def __call__(self) -> bool:
        return self._value


class _BackendOptions(c10d.Backend.Options):
    """Options that torch's Python reads as an attribute, and its C++ asks for by a call."""

    def __call__(self) -> "_BackendOptions":
        return self


# Ends of groups that are not shut down. With TORCH_DISTRIBUTED_DEBUG=DETAIL, torch's C++ alone
# refers to them, and Python would free its half of an object to which it has no reference.
_open: set["TorchBackend"] = set()


class TorchBackend(Face, c10d.Backend):
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
        work.show_held()
        super().__init__(rank, size)
        self.calls = GroupCalls(store, rank, size, timeout, options)
        self._options = _BackendOptions("scaletrain", timeout)
        _open.add(self)

    # As gloo answers, apart from what torch may do with groups that it rebuilds or splits itself.
    supports_coalescing = _Answer(False)  # type: ignore[assignment]
    supports_reconfigure = _Answer(False)
    supports_shrinking = _Answer(False)
    supports_splitting = _Answer(False)  # type: ignore[assignment]
    supports_time_estimate = _Answer(False)  # type: ignore[assignment]
    supports_window = _Answer(False)

    @property
    def options(self) -> _BackendOptions:
        """Return the name and the timeout, as torch wants to know them."""
        return self._options

    def monitored_barrier(self, options: Any, wait_all_ranks: bool = False) -> None:
        """Wait until every rank has come, and name those that did not. Collective."""
        self.calls.monitored_barrier(options.timeout, wait_all_ranks)

    def _set_sequence_number_for_group(self) -> None:
        """Do nothing: the collectives are numbered from the start."""

    def set_timeout(self, timeout: timedelta) -> None:
        """Change the timeout, for the collectives that are called from now on. Not collective."""
        self.calls.limit(timeout)

    def shutdown(self) -> None:
        """End the engine's threads after the collectives under way. Not collective."""
        _open.discard(self)
        super().shutdown()

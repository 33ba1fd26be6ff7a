"""The failure of one worker, and how an exception becomes one.

A worker writes its failure to a file of the run directory (``RunDir.failure``). The supervisor
reads the failures of all workers, adds those it finds by itself, chooses the first cause among
them, and writes that to ``RunDir.first_cause``.
"""

import enum
import json
import os
import re
import socket
import sys
import time
import traceback
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from scaletrain.errors import Diverged, UserError
from scaletrain.host.names import host_name
from scaletrain.run.layout import RunDir
from scaletrain.world import World

RANK_0 = "SCALETRAIN_RANK_0"  # rank 0's address, if the store (MASTER_ADDR) is elsewhere
# Within this time a host of a cluster answers. It is less than the time that the supervisor waits
# for the reports of the other workers.
_ANSWER_S = 0.5


class FailureKind(enum.StrEnum):
    """The ways in which a worker fails. Files hold the values."""

    EXCEPTION = "exception"  # it raised
    USER = "user"  # a person's mistake, told in one line without a traceback
    DIVERGED = "diverged"  # its loss, gradients or weights are not finite any more
    SIGNAL = "signal"  # a signal ended it
    EXIT = "exit"  # it ended with a bad status and reported nothing
    CUT = "cut"  # the network between it and rank 0 is cut
    HANG = "hang"  # it holds up the others
    PEER = "peer"  # it lost another rank: a consequence
    LAUNCHER = "launcher"  # its launcher ended badly: a consequence


class Failure(NamedTuple):
    """The failure of one worker, or of a process without a rank."""

    rank: int | None
    host: str
    step: int | None  # steps done by then; None: unknown, or none were reported
    time: float  # unix seconds; among equally strong failures the earliest is the cause
    kind: FailureKind
    message: str
    traceback: str = ""
    collective: str = ""  # the last collective that this rank entered; empty: unknown
    exit_code: int = 1
    # The launch that the worker belongs to (LAUNCH_MARK); empty: its launcher did not pass it on.
    launch: str = ""

    def belongs_to(self, launch: str | None) -> bool:
        """Return True if this may be a failure of a launch; None stands for any launch.

        Times would not tell: the clock of the worker's host may differ from that of the supervisor.
        """
        return launch is None or self.launch in ("", launch)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Failure":
        """Return the failure that a file holds; keys of later versions are ignored."""
        fields = {key: value[key] for key in cls._fields if key in value}
        fields["kind"] = FailureKind(fields["kind"])
        return cls(**fields)


def read_failure(path: Path) -> Failure | None:
    """Return the failure in a file; None if there is none, or it cannot be read."""
    try:
        return Failure.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def failure_from_exception(
    error: BaseException, world: World, run_dir: Path, runner_files: Collection[str] = ()
) -> Failure:
    """Return the failure of this worker that an exception stands for.

    Args:
        error: the exception.
        world: the worker's place in the job.
        run_dir: where rank 0 may have published its addresses.
        runner_files: files whose frames are left out at the outer end of the traceback.
    """
    failure = Failure(world.rank, host_name(), None, time.time(), FailureKind.EXCEPTION, "")
    if isinstance(error, UserError):
        kind = FailureKind.DIVERGED if isinstance(error, Diverged) else FailureKind.USER
        return failure._replace(kind=kind, message=_one_line(str(error)), exit_code=error.exit_code)
    failure = failure._replace(
        message=_one_line(f"{type(error).__name__}: {error}"),
        traceback=_traceback(error, runner_files),
    )
    if not _lost_peer(error):
        return failure
    unreachable = _unreachable_addresses(world, run_dir)
    if not unreachable:
        return failure._replace(kind=FailureKind.PEER)
    cut = f"does not reach rank 0's host ({unreachable}) any more: the network between them is cut"
    return failure._replace(kind=FailureKind.CUT, message=f"{cut}; {failure.message}")


def _one_line(text: str) -> str:
    return " ".join(text.split())


# The words of torch's gloo, of its store and of MPI when another rank is gone. They raise a
# RuntimeError.
_LOST_PEER = re.compile(
    r"Connection (closed|reset|refused)|Broken pipe|Timed out waiting|gloo/transport"
    r"|recvValue failed|failed to recv|wait timeout after|Socket Timeout"
    r"|timed out after \d+ ?(ms|s)|Horovod has been shut down|peer .*(lost|closed)",
    re.IGNORECASE,
)


def _lost_peer(error: BaseException) -> bool:
    """Return True if an exception, or a cause of it, only says that another rank is gone."""
    kinds: list[type[BaseException]] = [ConnectionError, TimeoutError]  # our own exchanges' words
    # An exception of torch's can only be there if torch is: this module does not load it.
    distributed = sys.modules.get("torch.distributed")
    for name in ("DistNetworkError", "DistBackendError", "DistStoreError"):
        kind = getattr(distributed, name, None)
        if kind is not None:
            kinds.append(kind)
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, tuple(kinds)):
            return True
        if isinstance(link, RuntimeError) and _LOST_PEER.search(str(link)):
            return True
        link = link.__cause__
    return False


def _traceback(error: BaseException, runner_files: Collection[str]) -> str:
    """Return the traceback as text, without the frames that run a person's program."""
    frames = error.__traceback__
    while frames and frames.tb_frame.f_code.co_filename in runner_files:
        frames = frames.tb_next
    shown = frames
    # An error of the runner itself has no other frames, and neither has one in a program's syntax.
    if frames is None and not isinstance(error, SyntaxError):
        shown = error.__traceback__
    return "".join(traceback.format_exception(type(error), error, shown))


def _unreachable_addresses(world: World, run_dir: Path) -> str:
    """Return rank 0's addresses, if this host gets no answer from any of them.

    When a host is cut off, all ranks lose a peer at the same time-out. The ranks that get no answer
    are on the other side of the cut. A refused connection is an answer.
    """
    if world.rank == 0 or world.num_nodes == 1:
        return ""
    places = _places_of_rank_0(run_dir)
    for address, port in places:
        try:
            timeout = _ANSWER_S / len(places)
            socket.create_connection((address, port), timeout=timeout).close()
            return ""
        except ConnectionRefusedError:
            return ""
        except OSError:
            continue
    return ", ".join(address for address, _ in places)


def _places_of_rank_0(run_dir: Path) -> list[tuple[str, int]]:
    """Return (address, port) pairs at which rank 0's host may answer; empty if unknown."""
    address = os.environ.get(RANK_0) or os.environ.get("MASTER_ADDR", "")
    port = os.environ.get("MASTER_PORT", "")
    if address and port:
        return [(address, int(port))]
    try:
        published = json.loads(RunDir(run_dir).rendezvous.read_text(encoding="utf-8"))
        return [(address, int(published["port"])) for address in published["addresses"]]
    except (OSError, ValueError, KeyError):
        return []

"""A worker's side of supervision: how far it is, and what ended it. Cheap enough for every step, and free of torch.

``RUN_DIR/progress-<rank>.json`` is overwritten in place (10 to 15 us); ``RUN_DIR/failure-<rank>.json`` is written once, on failure. The
supervisor reads both (``supervise``). Engines tell which collective they enter with ``entering``; that is how a hang gets a name.
"""

import contextlib
import faulthandler
import json
import os
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from scaletrain.errors import UserError
from scaletrain.run.atomic import write_json
from scaletrain.run.failure import Failure
from scaletrain.world import World

SUPERVISED = "SCALETRAIN_SUPERVISED"  # set by batch scripts, which show the first cause when their workers have ended
RANK_0 = "SCALETRAIN_RANK_0"  # where rank 0 is, if the store (MASTER_ADDR) is elsewhere
_WIDTH = 320  # bytes of a progress file, so that an overwrite is one small write
_ANSWER_S = 0.5  # within which a host of a cluster answers; less than the supervisor waits for the others' reports
_SYNC_S = 2.0  # on several hosts the shared folder is brought up to date this often
SCRIPT = "running a script"  # what a worker does that promises no signs of life
STACKS_SIGNAL = (
    signal.SIGUSR2
)  # a worker that gets it writes all its threads' Python stacks to stacks_path


class _State:
    """This process's progress. One a process; collectives may be entered from the exchange's own thread."""

    def __init__(self, run_dir: Path, world: World):
        self.run_dir, self.world, self.host = run_dir, world, host_name()
        self.step: int | None = None
        self.doing, self.collective, self.num_collectives = "starting", "", 0
        self._file = os.open(
            progress_path(run_dir, world.rank), os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o644
        )
        self._sync_s = float("inf") if world.num_nodes == 1 else _SYNC_S
        self._synced = time.monotonic()

    def write(self) -> None:
        value = {
            "pid": os.getpid(), "host": self.host, "time": time.time(), "step": self.step, "doing": self.doing,
            "collective": self.collective[:80], "num_collectives": self.num_collectives,
        }  # fmt: skip
        os.pwrite(self._file, (json.dumps(value).ljust(_WIDTH - 1) + "\n").encode(), 0)
        if time.monotonic() - self._synced > self._sync_s:
            os.fdatasync(self._file)
            self._synced = time.monotonic()

    def close(self) -> None:
        self.write()
        os.fdatasync(self._file)
        os.close(self._file)


_state: _State | None = None


@contextlib.contextmanager
def reporting(run_dir: Path, world: World) -> Iterator[Callable[[int], None]]:
    """While the body runs, this worker is supervised: call the yielded function with the number of steps done, at least every
    ``Job.timeout_s``. An exception in the body is recorded with its traceback, step and last collective, and ends the
    process with status 1 (a ``UserError``: 2). Its text is printed here only when no supervisor is there to print it.
    """
    global _state
    run_dir.mkdir(parents=True, exist_ok=True)
    failure_path(run_dir, world.rank).unlink(missing_ok=True)
    if world.rank == 0:
        _forget_beyond(run_dir, world.size)
    state = _state = _State(run_dir, world)
    state.write()
    with open(stacks_path(run_dir, world.rank), "w", encoding="utf-8") as stacks:
        faulthandler.register(STACKS_SIGNAL, file=stacks, all_threads=True)
        try:
            yield step
            state.doing = "finished"
        except Exception as error:
            state.doing = "failed"
            failure = failure_of(error)
            write_json(failure_path(run_dir, world.rank), failure._asdict())
            if not {"SCALETRAIN_LAUNCH", SUPERVISED} & set(os.environ):
                print(
                    f"scaletrain: rank {world.rank} failed: {failure.message}\n{failure.traceback}",
                    file=sys.stderr,
                )
            raise SystemExit(failure.exit_code) from error
        except KeyboardInterrupt:
            state.doing = "failed"
            raise SystemExit(128 + signal.SIGINT) from None
        except SystemExit as end:
            state.doing = "finished" if end.code in (None, 0) else "failed"
            raise
        finally:
            state.close()
            _state = None
            faulthandler.unregister(STACKS_SIGNAL)


def _forget_beyond(run_dir: Path, size: int) -> None:
    """An elastic job may go on with fewer workers: nobody waits for the others' signs of life any more."""
    for path in run_dir.glob("progress-*.json"):
        number = path.stem.removeprefix("progress-")
        if number.isdigit() and int(number) >= size:
            path.unlink(missing_ok=True)


def step(done: int) -> None:
    """This worker has done this many steps. A sign of life; without ``reporting`` it does nothing."""
    if _state:
        _state.step, _state.doing = done, "step"
        _state.write()


def alive(doing: str) -> None:
    """A sign of life in a long phase between steps, such as "evaluating" or "joining"."""
    if _state:
        _state.doing = doing
        _state.write()


def entering(collective: str, num_bytes: int | None = None) -> None:
    """This worker enters a collective, such as "allreduce"; they are numbered in the order of the calls, from 1."""
    if _state:
        _state.num_collectives += 1
        size = "" if num_bytes is None else f" {num_bytes:,} bytes"
        _state.collective = f"{collective}{size} #{_state.num_collectives}"
        _state.write()


def failure_of(error: BaseException) -> Failure:
    """The record of an exception, in this worker's words; frames of runners are left out of the traceback."""
    state = _state
    kind = "user" if isinstance(error, UserError) else "peer" if _lost_peer(error) else "exception"
    cut_from = _unreachable(state) if kind == "peer" and state else ""
    message = " ".join(
        (str(error) if kind == "user" else f"{type(error).__name__}: {error}").split()
    )  # one line
    if cut_from:
        kind, message = (
            "cut",
            f"does not reach rank 0's host ({cut_from}) any more: the network between them is cut; {message}",
        )
    frames = "" if kind == "user" else "".join(_own_traceback(error))
    return Failure(
        rank=state.world.rank if state else None, host=host_name(), step=state.step if state else None, time=time.time(),
        kind=kind, message=message, traceback=frames, collective=state.collective if state else "",
        exit_code=2 if kind == "user" else 1,
    )  # fmt: skip


def _unreachable(state: _State) -> str:
    """Rank 0's address, if this host gets no answer from it any more; a refused connection is an answer.

    When a host is cut off, all ranks lose a peer at the same time-out; those that find this are on the other side of the cut.
    """
    if state.world.rank == 0 or state.world.num_nodes == 1:
        return ""
    places = [
        (
            os.environ.get(RANK_0) or os.environ.get("MASTER_ADDR", ""),
            os.environ.get("MASTER_PORT", ""),
        )
    ]
    if not all(places[0]):
        try:
            facts = json.loads((state.run_dir / "rendezvous.json").read_text(encoding="utf-8"))
            places = [(address, str(facts["port"])) for address in facts["addresses"]]
        except (OSError, ValueError, KeyError):
            return ""
    for address, port in places:
        try:
            socket.create_connection((address, int(port)), timeout=_ANSWER_S / len(places)).close()
            return ""
        except ConnectionRefusedError:
            return ""
        except OSError:
            continue
    return ", ".join(address for address, _ in places)


# What torch's gloo, its store and MPI say when another rank is gone. NCCL raises DistBackendError.
_LOST_PEER = re.compile(
    r"Connection (closed|reset|refused)|Broken pipe|Timed out waiting|gloo/transport|recvValue failed|failed to recv"
    r"|wait timeout after|Socket Timeout|timed out after \d+ ?(ms|s)|Horovod has been shut down|peer .*(lost|closed)",
    re.IGNORECASE,
)


def _lost_peer(error: BaseException) -> bool:
    """Whether an exception only says that another rank is gone. Our own exchanges raise ConnectionError or TimeoutError for that."""
    chain: BaseException | None = error
    while chain is not None:
        kinds = {cls.__name__ for cls in type(chain).__mro__}
        if kinds & {
            "ConnectionError",
            "TimeoutError",
            "DistNetworkError",
            "DistBackendError",
            "DistStoreError",
        }:
            return True
        if isinstance(chain, RuntimeError) and _LOST_PEER.search(str(chain)):
            return True
        chain = chain.__cause__
    return False


def _own_traceback(error: BaseException) -> list[str]:
    """The traceback without what this package put around a person's script."""
    frames = error.__traceback__
    while frames and frames.tb_frame.f_code.co_filename.endswith(
        ("run/progress.py", "programs/script.py")
    ):
        frames = frames.tb_next
    while frames and frames.tb_frame.f_code.co_filename == "<frozen runpy>":
        frames = frames.tb_next
    return traceback.format_exception(type(error), error, frames or error.__traceback__)


def host_name() -> str:
    """This host's name; a rehearsed host in a network namespace has one of its own."""
    return os.environ.get("SCALETRAIN_HOST") or socket.gethostname()


def progress_path(run_dir: Path, rank: int) -> Path:
    return run_dir / f"progress-{rank}.json"


def failure_path(run_dir: Path, rank: int) -> Path:
    return run_dir / f"failure-{rank}.json"


def stacks_path(run_dir: Path, rank: int) -> Path:
    return run_dir / f"stacks-{rank}.txt"

"""The inside of a forkserver, and the first moments of a process that it has forked.

A process that is started in the usual way gets from its starter only the things that were passed
on. A forked process begins with everything that the server has, so ``_become`` replaces each part
that a program can notice. See ``forkserver`` for the other side.
"""

import atexit
import contextlib
import ctypes
import fcntl
import gc
import importlib.util
import io
import os
import signal
import socket
import sys
import threading
import time
import types
from collections.abc import Callable
from typing import Any, NoReturn

from scaletrain.host import forkserver, title
from scaletrain.host.forkserver import Order
from scaletrain.host.processes import die_with_parent, variables

_PR_SET_PDEATHSIG = 1
_MAX_DESCRIPTORS = 64  # of an order
_ADOPTED_WITHIN_S = 5.0
_FIRST_OWN = 2  # in front of those of the streams: the order's text, and the pipe for the answer


def serve(control: socket.socket, may_differ: Callable[[str], bool]) -> Order:
    """Fork a process for each order. Return in each of them; the server itself never returns.

    Args:
        control: where the orders come from. The server ends with its other end.
        may_differ: returns True for a variable whose value does not change how modules load.
    """
    loaded_in = variables(os.getpid())
    # By Python at its start, and by imports: they would do so in the new process, too.
    added = {name: value for name, value in os.environ.items() if loaded_in.get(name) != value}
    _say_ready(control)
    while True:
        received = _receive(control)
        if received is None:
            os._exit(0)  # nothing of the server needs an end in good order
        order, descriptors = received
        if order.computes and _differ(loaded_in, order.environ, may_differ):
            _close(descriptors)
            continue
        if not _fork_orphan(descriptors):
            continue
        # Here begins the new process.
        control.close()
        _lead(order)
        os.environ.clear()
        os.environ.update(order.environ | added if order.computes else order.environ)
        title.show(_command_line(order), order.environ)
        if order.serves:
            own = _fork_server(descriptors)
            if own:
                control = own
                _say_ready(control)
                continue
        _become(order, descriptors)
        return order


def threads() -> int:
    """Return how many threads this process has, beside its first one."""
    return max(threading.active_count(), len(os.listdir("/proc/self/task"))) - 1


def run(order: Order) -> None:
    """Run the order's module as ``python -m`` would, in the process that ``serve`` returned in."""
    spec = importlib.util.find_spec(order.module)
    if spec and spec.submodule_search_locations is not None:
        spec = importlib.util.find_spec(f"{order.module}.__main__")
    if spec is None or spec.loader is None or spec.origin is None:
        raise ImportError(f"no module {order.module}")
    # A module of its own: the server's main module has names that the program must not see.
    main = types.ModuleType("__main__")
    main.__dict__.update(
        __spec__=spec,
        __loader__=spec.loader,
        __package__=spec.parent,
        __file__=spec.origin,
        __cached__=spec.cached,
        __builtins__=__builtins__,
    )
    sys.modules["__main__"] = main
    sys.argv = [spec.origin, *order.arguments]
    sys.orig_argv = _command_line(order)
    code = spec.loader.get_code(spec.name)  # type: ignore[attr-defined]
    gc.enable()
    if order.computes:
        exec(code, main.__dict__)
    else:
        _leave(lambda: exec(code, main.__dict__))


def _leave(program: Callable[[], None]) -> NoReturn:
    """Run a program and end this process, without freeing the modules the server loaded.

    Freeing writes to all of their memory, and the kernel would copy each page: half a second.
    """
    status = 1
    try:
        program()
        status = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        else:
            status = end.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status & 0xFF)


def refuse(control: socket.socket, obstacle: str) -> None:
    """Say why this process cannot serve."""
    with contextlib.suppress(OSError):
        control.send(obstacle.encode())


def _say_ready(control: socket.socket) -> None:
    with contextlib.suppress(OSError):
        control.send(forkserver.READY)


def _receive(control: socket.socket) -> tuple[Order, list[int]] | None:
    """Return an order, and the descriptors for it; None if the other end has closed."""
    try:
        data, received, _, _ = socket.recv_fds(control, 1, _MAX_DESCRIPTORS)
    except OSError:
        return None
    if not data or len(received) < _FIRST_OWN:
        return None
    text = os.pread(received[0], os.fstat(received[0]).st_size, 0)
    return Order.from_json(text), list(received)


def _differ(
    loaded_in: dict[str, str], environ: dict[str, str], may_differ: Callable[[str], bool]
) -> bool:
    """Return True if modules might be loaded in another way in another environment."""
    names = loaded_in.keys() | environ.keys()
    different = [name for name in names if loaded_in.get(name) != environ.get(name)]
    return not all(may_differ(name) for name in different)


def _fork_orphan(descriptors: list[int]) -> bool:
    """Fork a process that has lost its parent; return True in it, False in the server."""
    try:
        between = os.fork()
    except OSError:  # no process is left to this user
        _close(descriptors)
        return False
    if between:
        _close(descriptors)
        os.waitpid(between, 0)
        return False
    try:
        pid = os.fork()
    except OSError:
        os._exit(1)
    if pid:
        os._exit(0)
    return True


def _fork_server(descriptors: list[int]) -> socket.socket | None:
    """Fork a server for this process; return where it serves in it, None in this process."""
    ours, its = socket.socketpair()
    pid = os.fork()
    if pid:
        its.close()
        process = forkserver.Forked(pid, None, None, None)
        forkserver.inherited = forkserver.Server(ours, process)
        return None
    ours.close()
    _close(descriptors)
    forkserver.inherited = None
    die_with_parent(signal.SIGKILL)
    return its


def _lead(order: Order) -> None:
    if order.new_session:
        os.setsid()
    else:
        os.setpgid(0, 0)


def _become(order: Order, descriptors: list[int]) -> None:
    """Turn this process into the one that an order describes, and answer with its id."""
    answer = _place(order, descriptors)
    if order.cores:
        os.sched_setaffinity(0, order.cores)
    # Handlers are those of a fresh Python: the server has set none, and was started with the usual
    # signals (``processes.dies_with_parent``).
    signal.pthread_sigmask(signal.SIG_SETMASK, order.blocked)
    if not _is_adopted(order):
        os._exit(1)
    _open_streams()
    _seed()
    with contextlib.suppress(BrokenPipeError):
        os.write(answer, b"%d" % os.getpid())
    os.close(answer)


def _place(order: Order, descriptors: list[int]) -> int:
    """Give the descriptors their numbers; return the number of the pipe for the answer."""
    numbers = (0, 1, 2, *order.descriptors)
    # First out of the way: one may lie at another's number.
    above = max(*numbers, *descriptors) + 1
    moved = [fcntl.fcntl(d, fcntl.F_DUPFD_CLOEXEC, above) for d in descriptors]
    _close(descriptors)
    text, answer, *others = moved
    os.close(text)
    for descriptor, number in zip(others, numbers, strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)
    return answer


def _is_adopted(order: Order) -> bool:
    """Wait until the process that asked is our parent; return False if it is another one."""
    until = time.monotonic() + _ADOPTED_WITHIN_S
    while os.getppid() != order.parent:
        # For a moment it is the process in between. Another one stays the parent, for example where
        # nobody can adopt.
        if time.monotonic() > until:
            return False
        time.sleep(0.0005)
    if order.death_signal:
        # Only now: the signal would have come with the end of the first parent.
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, order.death_signal)
    return os.getppid() == order.parent


def _open_streams() -> None:
    """Open the standard streams anew, as Python does when it starts."""
    unbuffered = bool(os.environ.get("PYTHONUNBUFFERED")) and not sys.flags.ignore_environment
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        before = getattr(sys, f"__{name}__")
        is_raw = unbuffered and mode == "w"
        binary: Any = open(number, f"{mode}b", 0 if is_raw else -1, closefd=False)  # noqa: SIM115
        (binary if is_raw else binary.raw).name = f"<{name}>"
        stream: Any = io.TextIOWrapper(
            binary,
            encoding=before.encoding,
            errors=before.errors,
            newline="\n",
            line_buffering=not unbuffered and (number == 2 or binary.isatty()),
            write_through=unbuffered,
        )
        stream.mode = mode
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _seed() -> None:
    """Give this process random numbers of its own, where a fresh process has them.

    ``random`` does so by itself after a fork.
    """
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()
    if "torch" in sys.modules:
        # The CPU's alone. Generators of CUDA are made with CUDA, which is not initialised yet.
        sys.modules["torch"].default_generator.seed()
    if "multiprocessing" in sys.modules:
        sys.modules["multiprocessing"].current_process().authkey = os.urandom(32)


def _command_line(order: Order) -> list[str]:
    return [sys.executable, "-P", "-m", order.module, *order.arguments]


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)

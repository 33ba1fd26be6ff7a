"""A fork of a notebook's kernel becomes one worker.

The fork has the kernel's variables, but only one of its threads. So it must not touch parts that
other threads served: the sockets to the browser, the event loop, and the streams that are shown in
the notebook. ``become`` lets go of all of these.
"""

import asyncio
import builtins
import contextlib
import io
import logging
import multiprocessing.connection
import os
import re
import signal
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy._core import multiarray

from scaletrain.engine import rendezvous
from scaletrain.errors import UserError
from scaletrain.host.processes import die_with_parent, reset_signals
from scaletrain.run import progress
from scaletrain.world import World

# Frames of these files run the function and explain nothing.
_RUNNER_FILES = (__file__, contextlib.__file__)
# Beside tensors, numbers, texts and containers, which torch allows by itself. Their classes build
# arrays and nothing else, so that a value can be read without running anybody's code.
_ALLOWED: list[Any] = [
    *(np.ndarray, np.dtype, multiarray._reconstruct, multiarray.scalar),
    *{type(np.dtype(name)) for name in np.typecodes["All"] if name not in "OVmM"},
]


@dataclass(frozen=True)
class Assignment:
    """The task of one worker."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    environ: dict[str, str]  # with its rank and the address of the store
    threads: int
    run_dir: Path  # where it reports a failure
    returns: bool  # whether the caller wants its result
    # Its ends of the pipes. The kernel holds the other ends.
    out: int
    err: int
    channel: multiprocessing.connection.Connection  # the result goes out, then the release comes in
    store: int  # the socket on which rank 0 serves the store; -1: another rank does


def become(assignment: Assignment) -> int:
    """Be one worker, in a process that was forked just now; return its exit status."""
    die_with_parent(signal.SIGKILL)
    # The notebook's interrupt goes to the kernel's process group. The kernel passes it on, once.
    os.setsid()
    _reset_signals()
    _let_go_of_descriptors(assignment)
    _write_to(assignment.out, assignment.err)
    _forget_kernel()
    os.environ.clear()
    os.environ.update(assignment.environ)
    torch.set_num_threads(assignment.threads)
    try:
        with progress.reporting(assignment.run_dir, World.from_env(), _RUNNER_FILES):
            _work(assignment)
        status = 0
    except SystemExit as end:  # how `reporting` ends a worker that has failed
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def _work(assignment: Assignment) -> None:
    if rendezvous.STORE_FD in os.environ:
        rendezvous.serve()
    # A function promises no signs of life.
    progress.alive(progress.SCRIPT)
    value = assignment.function(*assignment.args)
    payload = packed(value) if assignment.returns else b""
    sys.stdout.flush()
    assignment.channel.send_bytes(payload)
    # Rank 0 serves the store, which the others may need to their end: all leave together.
    assignment.channel.recv_bytes()


# Becoming free of the kernel


def _reset_signals() -> None:
    # The event loop of the kernel's main thread learns of signals through a pipe.
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    reset_signals()
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _let_go_of_descriptors(assignment: Assignment) -> None:
    """Replace the kernel's sockets, pipes and event queues by the null device.

    Files stay open: the function may read them. Replaced, not closed: an object that is collected
    later would close its number, which by then may be another file's.
    """
    kept = {assignment.out, assignment.err, assignment.channel.fileno(), assignment.store}
    null = os.open(os.devnull, os.O_RDWR)
    for name in os.listdir("/proc/self/fd"):
        number = int(name)
        if number in kept or number == null:
            continue
        with contextlib.suppress(OSError):
            mode = os.fstat(number).st_mode
            is_anonymous = os.readlink(f"/proc/self/fd/{number}").startswith("anon_inode:")
            if stat.S_ISSOCK(mode) or stat.S_ISFIFO(mode) or is_anonymous:
                os.dup2(null, number, inheritable=False)
    os.dup2(null, 0)
    os.close(null)


def _write_to(out: int, err: int) -> None:
    """Give standard output and error pipes to write into, as an ordinary process has them."""
    before = (sys.stdout, sys.stderr)
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.close(out)
    os.close(err)
    sys.stdout = sys.__stdout__ = _stream(1)  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = _stream(2)  # type: ignore[misc]
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), "utf-8")
    # Handlers hold on to the streams that were there when they were made.
    for reference in logging._handlerList:  # type: ignore[attr-defined]
        handler = reference()
        if isinstance(handler, logging.StreamHandler) and handler.stream in before:
            handler.stream = sys.stdout if handler.stream is before[0] else sys.stderr


def _stream(descriptor: int) -> io.TextIOWrapper:
    return io.TextIOWrapper(
        io.BufferedWriter(io.FileIO(descriptor, "w", closefd=False)),
        "utf-8",
        errors="backslashreplace",
        line_buffering=True,
    )


def _forget_kernel() -> None:
    """Let `display` print instead of sending to the browser, and event loops begin anew."""
    asyncio.set_event_loop(None)
    for module, name in (
        ("IPython.core.interactiveshell", "InteractiveShell"),
        ("ipykernel.kernelbase", "Kernel"),
    ):
        # If the module is not loaded, this is no notebook.
        singleton = getattr(sys.modules.get(module), name, None)
        if singleton is not None and singleton.initialized():
            type(singleton.instance()).clear_instance()
            builtins.input = _refuse_input


def _refuse_input(prompt: object = "") -> str:
    raise EOFError("a worker has no input: ask in the notebook, and hand the answer over")


# Results on their way back


def packed(value: Any) -> bytes:
    """Return a result as bytes.

    Raises:
        UserError: it holds something that cannot be read back without running its code.
    """
    file = io.BytesIO()
    try:
        torch.save(value, file)
        unpacked(file.getvalue())
    except Exception as error:
        # torch's words about the class that it would have to run.
        refused = re.search(r"GLOBAL (\S+)", str(error))
        inside = f" with {refused[1]} in it" if refused else ""
        raise UserError(
            f"the function returned {type(value).__name__}{inside}, which cannot be sent to the"
            " notebook (allowed: numbers, texts, tensors, arrays, and lists and dicts of them,"
            " such as model.state_dict())"
        ) from error
    return file.getvalue()


def unpacked(data: bytes) -> Any:
    """Return the result that bytes hold, its tensors on the CPU.

    Nothing in them is run: only the types that ``packed`` names are read.
    """
    with torch.serialization.safe_globals(_ALLOWED):
        return torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")

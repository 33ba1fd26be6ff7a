"""What a worker notices of how it was started, as OUT/<rank>.json (see ``test_warm``)."""

import atexit
import ctypes
import gc
import json
import multiprocessing
import os
import random
import resource
import signal
import stat
import sys
import threading
from pathlib import Path

import numpy
import psutil
import torch

OUT = Path(sys.argv[1])
RANK = os.environ["RANK"]
# Differ between any two launches, or are set by an import that a script may do without.
OF_A_LAUNCH = ("SCALETRAIN_LAUNCH", "MASTER_PORT", "SCALETRAIN_STORE_FD", "TORCHINDUCTOR_CACHE_DIR")


def without(environ: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name not in OF_A_LAUNCH}


def handlers() -> dict[int, str]:
    found = {}
    for number in sorted(signal.valid_signals()):
        handler = signal.getsignal(number)
        found[int(number)] = getattr(handler, "__name__", str(handler))
    return found


def descriptors() -> list[str]:
    """Kinds of what is open beyond the standard streams."""
    kinds = []
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue  # of the listing itself
        if int(name) > 2:
            kinds.append(target.split(":")[0].replace(str(OUT), "OUT"))
    return sorted(kinds)


def stream(name: str) -> list[object]:
    it = getattr(sys, name)
    kind = stat.S_IFMT(os.fstat(it.fileno()).st_mode)
    layer = type(it.buffer).__name__
    facts = [it.name, it.mode, it.encoding, it.errors, it.newlines, it.line_buffering]
    return [*facts, it.write_through, layer, kind, it is getattr(sys, f"__{name}__")]


def death_signal() -> int:
    number = ctypes.c_int()
    ctypes.CDLL(None).prctl(2, ctypes.byref(number))
    return number.value


def main() -> None:
    me = psutil.Process()
    parent = me.parent()
    assert parent is not None
    main_module = sys.modules["__main__"]
    same = {
        "argv": sys.argv,
        "orig_argv": sys.orig_argv,
        "path": sys.path,
        "flags": str(sys.flags),
        "main": [main_module.__name__, getattr(main_module, "__file__", None)],
        "environ": without(dict(os.environ)),
        "shown environ": without(me.environ()),
        "shown command line": me.cmdline(),
        "name": me.name(),
        "parent": parent.cmdline(),
        "cwd": os.getcwd(),
        "umask": os.umask(0),
        "nice": os.nice(0),
        "limits": [resource.getrlimit(n) for n in range(16)],
        "cores": sorted(os.sched_getaffinity(0)),
        "leads": [os.getpgid(0) == os.getpid(), os.getsid(0) == os.getpid()],
        "handlers": handlers(),
        "blocked": sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, []))),
        "death signal": death_signal(),
        "streams": [stream(name) for name in ("stdin", "stdout", "stderr")],
        "descriptors": descriptors(),
        "threads": [thread.name for thread in threading.enumerate()],
        "torch threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "cuda": torch.cuda.is_initialized(),
        "collects": [gc.isenabled(), gc.get_threshold()],
        "daemon": multiprocessing.current_process().daemon,
    }
    own = {
        "random": random.random(),
        "torch": [torch.initial_seed(), torch.rand(1).item()],
        "numpy": numpy.random.rand(),
        "authkey": multiprocessing.current_process().authkey.hex(),
        "pid": os.getpid(),
        # Of torch's modules one that optimizers import later: a server has imported it.
        "warm": "torch._dynamo" in sys.modules,
    }
    # Both after the fork: threads of torch compute, and a thread of ours.
    square = torch.ones(300, 300)
    thread = threading.Thread(target=lambda: own.update(sum=float((square @ square).sum())))
    thread.start()
    thread.join()
    text = json.dumps({"same": same, "own": own})
    # Written by an exit handler, and without a newline at the end: both belong to a usual end.
    atexit.register(OUT.joinpath(f"{RANK}.json").write_text, text)
    sys.stdout.write(f"rank {RANK} has written")


main()
sys.exit(0 if len(sys.argv) < 3 else int(sys.argv[2]))

"""Ranks that are killed, stopped, interrupted or late, or that abort, at random moments:
``python -m tests.engine.faults SEED NUM AT_ONCE FOLDER``.

One process with torch loaded forks the ranks of every injection, which is what makes hundreds of
them affordable. Prints one line of JSON for each: what was done to whom, and how every rank
ended.
"""

import contextlib
import itertools
import json
import os
import random
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from scaletrain.engine.choice import NATIVE, Options
from scaletrain.engine.engine import Engine
from scaletrain.engine.process_group import ProcessGroup
from scaletrain.engine.transport import Group, mixed

TIMEOUT_S = 1.5  # of a collective
HANG_S = 30.0  # a rank that has not ended by then hangs
ROUNDS = (
    15  # what is to happen happens in one of the first; without a fatal fault, that many are run
)
KINDS = ("kill", "kill while joining", "stop", "interrupt", "abort", "late", "too late")
WIRES = (
    ("shared_memory", NATIVE), ("shared_memory", "ring"), ("shared_memory", "tree"), ("shared_memory", "direct"),
    ("gloo", "ring"), ("gloo", "halving_doubling"), ("gloo", "double_tree"), ("gloo", NATIVE),
    ("mixed", "ring"),  # as if two ranks were a host
    ("backend, at once", "auto"), ("backend, async", "ring"),  # torch.distributed's process group, over shared memory
)  # fmt: skip
CAN_ABORT = WIRES[-2:]
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "interrupt": signal.SIGINT}


def draw(seed: int, index: int) -> dict[str, Any]:
    """Injection ``index`` of ``seed``: the kinds and the wires in turn, everything else at
    random.
    """
    dice = random.Random(f"{seed} {index}")
    kind = KINDS[index % len(KINDS)]
    wires = CAN_ABORT if kind == "abort" else WIRES
    transport, collective = wires[index % len(wires)]
    size = dice.randint(2, 4)
    return {
        "index": index, "kind": kind, "transport": transport, "collective": collective, "size": size,
        "victim": dice.randrange(size), "round": dice.randrange(ROUNDS), "delay_s": dice.uniform(0, 0.02), "count": dice.choice([1, 1000, 200_000]),
    }  # fmt: skip


def one_rank(case: dict[str, Any], rank: int, folder: Path) -> str:
    """How a rank ends: "right", or the error's type and message. Raises ``ArithmeticError`` for a
    wrong sum.
    """
    kind, size = case["kind"], case["size"]
    victim = rank == case["victim"]
    store = dist.FileStore(str(folder / f"store-{case['index']}"), size)
    # All set out together, however busy the machine is.
    store.set(f"up/{rank}", "")
    store.wait([f"up/{other}" for other in range(size)], timedelta(seconds=HANG_S))
    store.set_timeout(timedelta(seconds=TIMEOUT_S))
    if victim and kind == "kill while joining":
        time.sleep(case["delay_s"])
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        group = Group(dist.PrefixStore("group/", store), rank, size, timedelta(seconds=TIMEOUT_S))
        if case["transport"].startswith("backend"):
            allreduce, abort = of_backend(group, case)
        else:
            allreduce = of_engine(group, case)
        tensor = torch.empty(case["count"])
        expected = float(size * (size + 1) // 2)
        for index in itertools.count() if kind != "late" else range(ROUNDS):
            if victim and index == case["round"]:
                if kind == "late":
                    time.sleep(TIMEOUT_S / 4)
                elif kind == "too late":
                    time.sleep(1.5 * TIMEOUT_S)
                elif kind == "abort":
                    threading.Timer(case["delay_s"], abort).start()
                else:
                    after(case["delay_s"], SIGNALS[kind])  # in the midst of what follows
            tensor.fill_(rank + 1)
            allreduce(tensor)
            if not bool((tensor == expected).all()):
                raise ArithmeticError(f"rank {rank}, round {index}: a wrong sum")
    except KeyboardInterrupt:
        return "interrupted"
    except (TimeoutError, ConnectionError) as error:
        return f"{type(error).__name__}: {error}"
    except RuntimeError as error:  # torch's type for every failure; ours stands in the message
        if case["transport"].startswith("backend") and (
            told := re.search(r"(Timeout|Connection)Error: .*", str(error))
        ):
            return told[0]
        if kind == "kill while joining" and case["transport"].startswith("backend"):
            return f"ConnectionError: (gloo's own) {error}"
        raise
    # Nobody leaves a group while others may still read from it.
    store.set(f"done/{rank}", "")
    with contextlib.suppress(RuntimeError):
        store.wait([f"done/{other}" for other in range(size)], timedelta(seconds=2 * TIMEOUT_S))
    return "right"


def of_engine(group: Group, case: dict[str, Any]) -> Callable[[torch.Tensor], object]:
    if case["transport"] == "mixed":
        mixed.host_of_each_rank = lambda group: [
            str(rank // 2) for rank in range(group.size)
        ]  # this process is the rank's own
    return Engine(group, case["collective"], case["transport"]).allreduce


def of_backend(
    group: Group, case: dict[str, Any]
) -> tuple[Callable[[torch.Tensor], object], Callable[[], None]]:
    made = ProcessGroup(*group[:4], Options(case["collective"], "shared_memory"))
    options = dist.AllreduceOptions()
    options.asyncOp = "async" in case["transport"]
    return lambda tensor: made.allreduce([tensor], options).wait(), made.abort


def after(delay_s: float, number: int) -> None:
    """Send this process a signal in a while, from another one: its own threads may be held up."""
    pid = os.getpid()
    # Python drops what a handler raises while it forks.
    signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    if os.fork() == 0:
        time.sleep(delay_s)
        os.kill(pid, number)
        os._exit(0)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})


def inject(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run one injection; ``ends[rank]`` says how each rank ended and ``seconds`` how long the last
    survivor took.
    """
    pids = []
    for rank in range(case["size"]):
        pid = os.fork()
        if pid == 0:
            end = "crash"
            try:
                end = one_rank(case, rank, folder)
            except BaseException as error:
                end = f"!{type(error).__name__}: {error}"
            finally:
                (folder / f"end-{case['index']}-{rank}").write_text(end)
                os._exit(0)
        pids.append(pid)
    began = time.monotonic()
    seconds = 0.0
    left = dict(enumerate(pids))
    while left and time.monotonic() - began < HANG_S:
        for rank, pid in list(left.items()):
            if os.waitpid(pid, os.WNOHANG)[0]:
                del left[rank]
                seconds = time.monotonic() - began
        if [*left] == [case["victim"]] and case["kind"] in ("kill", "stop"):
            break  # stopped, or not yet killed
        time.sleep(0.01)
    ends = []
    for rank, pid in enumerate(pids):
        if rank in left:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        path = folder / f"end-{case['index']}-{rank}"
        ends.append(
            path.read_text() if path.exists() else "killed" if rank == case["victim"] else "hang"
        )
    return {**case, "ends": ends, "seconds": round(seconds, 2)}


def main(seed: int, num: int, at_once: int, folder: Path) -> None:
    torch.set_num_threads(1)
    with ThreadPoolExecutor(at_once) as pool:
        for result in pool.map(lambda index: inject(draw(seed, index), folder), range(num)):
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))

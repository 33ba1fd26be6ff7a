"""Tests engine/messages.py and engine/inbox.py: send and recv in shared memory, beside gloo's."""

import errno
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from scaletrain.engine import inbox
from scaletrain.engine.backend import calls_of
from scaletrain.engine.choice import Options
from scaletrain.engine.segment import Patience
from tests.engine.test_calls import Held, error_of
from tests.ranks import run_ranks

DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int8,
    torch.int16, torch.int64, torch.bool, torch.complex64, torch.complex128, torch.float8_e4m3fn,
]  # fmt: skip
LARGE = 25 << 18  # elements of float32: 25 MiB, more than all buffers together


def join(rank: int, size: int, path: str, timeout_s: float = 30) -> tuple[Any, Any]:
    """Return a group of ours whose messages cannot go to gloo, and one of gloo."""
    import scaletrain  # registers the backend

    assert scaletrain.__version__
    limit = timedelta(seconds=timeout_s)
    store = dist.FileStore(path, size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)
    ours = dist.new_group(backend="scaletrain", timeout=limit)
    calls_of(ours)._forward = _is_not_ours
    return ours, dist.group.WORLD


def _is_not_ours(method: str, *arguments: Any) -> Any:
    raise AssertionError(f"{method} went to gloo")


def numbered(number: int, count: int = 1000) -> Tensor:
    """Values that no other message has."""
    return torch.arange(count, dtype=torch.float32) + 10_000_000.0 * number


def wait_for(path: str) -> None:
    deadline = time.monotonic() + 30
    while not Path(path).exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.005)


# Results


def values(rank: int, size: int, path: str) -> list[str]:
    ours, gloo = join(rank, size, path)
    wrong = []
    shapes = [(), (1,), (0,), (3, 0), (7, 5), (1 << 19,), (3_000_001,)]
    for dtype, shape in itertools.product(DTYPES, shapes):
        for group in (ours, gloo):
            generator = torch.Generator().manual_seed(len(shape))
            tensor = torch.randint(0, 2, shape, generator=generator).to(dtype)
            if rank == 0:
                dist.send(tensor, 1, group=group)
            else:
                into = torch.zeros(shape, dtype=dtype)
                dist.recv(into, 0, group=group)
                if not torch.equal(into.to(torch.complex128), tensor.to(torch.complex128)):
                    wrong.append(f"{dtype} {shape} {group}")
    objects: list[Any] = [{"from": 0}, "words" * 1000] if rank == 0 else [None, None]
    if rank == 0:
        dist.send_object_list(objects, 1, group=ours)
    else:
        dist.recv_object_list(objects, 0, group=ours)
    if objects != [{"from": 0}, "words" * 1000]:
        wrong.append("objects")
    return wrong


def test_every_dtype_and_shape_arrives(tmp_path: Path):
    for wrong in run_ranks(values, 2, str(tmp_path / "store")):
        assert wrong == []


def order(rank: int, size: int, path: str) -> list[str]:
    """Sends of many sizes are open at once; tags come in another order than they were sent."""
    ours, _ = join(rank, size, path)
    # Up to 4 MiB; together 60 MiB.
    counts = [(0, 10, 30_000, 70_000, 600_000, 1_000_003)[n % 6] for n in range(40)]
    wrong = []
    if rank == 0:
        sent = [numbered(n, counts[n]) for n in range(40)]
        works = [dist.isend(tensor, 1, ours, tag=n % 3) for n, tensor in enumerate(sent)]
        dist.barrier(ours)
        for work in reversed(works):
            work.wait()
    else:
        dist.barrier(ours)
        for tag in (2, 0, 1):
            mine = [n for n in range(40) if n % 3 == tag]
            into = [torch.zeros(counts[n]) for n in mine]
            works = [dist.irecv(tensor, 0, ours, tag=tag) for tensor in into]
            for work in reversed(works):
                work.wait()
            for n, tensor in zip(mine, into, strict=True):
                if not torch.equal(tensor, numbered(n, counts[n])):
                    wrong.append(f"message {n}")
    return wrong


def test_messages_of_a_tag_keep_their_order_and_tags_wait_for_none(tmp_path: Path):
    for wrong in run_ranks(order, 2, str(tmp_path / "store")):
        assert wrong == []


def any_source(rank: int, size: int, path: str) -> dict[str, Any]:
    ours, _ = join(rank, size, path)
    found: dict[str, Any] = {}
    # Rank 1 of the job is rank 0 of this group, and gets from the job's ranks 2 and 3.
    for name, backend in (("ours", "scaletrain"), ("gloo", "gloo")):
        group = dist.new_group([1, 2, 3], backend=backend)
        if rank > 1:
            dist.send(numbered(rank), 1, group, tag=5)
            dist.send(numbered(10 + rank, LARGE // 10), 1, group, tag=6)
        elif rank == 1:
            got = {}
            for _ in range(2):
                into = torch.zeros(1000)
                sender = dist.recv(into, group=group, tag=5)
                got[sender] = bool(torch.equal(into, numbered(sender)))
            for _ in range(2):
                into = torch.zeros(LARGE // 10)
                work = dist.irecv(into, group=group, tag=6)
                work.wait()
                in_group = work._source_rank()
                sender = dist.get_global_rank(group, in_group)
                got[in_group, "large"] = bool(torch.equal(into[:9], numbered(10 + sender, 9)))
            found[name] = got
    # Receives from anybody and from one rank, with the same tag, match in the order of the calls.
    if rank == 0:
        into = [torch.zeros(2) for _ in range(3)]
        works = [
            dist.irecv(into[0], 3, ours, tag=1),
            dist.irecv(into[1], None, ours, tag=1),
            dist.irecv(into[2], 3, ours, tag=1),
        ]
        dist.barrier(ours)
        for work in works:
            work.wait()
        found["order"] = [tensor.tolist() for tensor in into]
    else:
        dist.barrier(ours)
        if rank == 3:
            for number in range(3):
                dist.send(torch.full((2,), float(number)), 0, ours, tag=1)
    return found


def test_recv_from_any_rank_says_which(tmp_path: Path):
    first, second, *_ = run_ranks(any_source, 4, str(tmp_path / "store"))
    assert second["ours"] == second["gloo"]
    assert second["ours"] == {2: True, 3: True, (1, "large"): True, (2, "large"): True}
    assert first["order"] == [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]


def apart(rank: int, size: int, path: str) -> list[str]:
    """Both send 25 MiB before either receives, with collectives in between, in any order."""
    ours, _ = join(rank, size, path)
    peer = 1 - rank
    wrong = []
    for first in (dist.isend, dist.irecv):
        into = torch.zeros(LARGE)
        pair = [
            dist.P2POp(dist.isend, numbered(rank, LARGE), peer, ours),
            dist.P2POp(dist.irecv, into, peer, ours),
        ]
        if (first is dist.irecv) == (rank == 0):
            pair.reverse()
        for work in dist.batch_isend_irecv(pair):
            work.wait()
        if not torch.equal(into, numbered(peer, LARGE)):
            wrong.append("batch")
    early = [dist.isend(numbered(rank + n, LARGE), peer, ours, tag=n) for n in (8, 9)]
    dist.send(numbered(rank, 10), peer, ours, tag=3)
    total = torch.ones(LARGE)
    dist.all_reduce(total, group=ours)
    dist.barrier(ours)
    for tag, count in ((9, LARGE), (3, 10), (8, LARGE)):
        into = torch.zeros(count)
        dist.recv(into, peer, ours, tag=tag)
        if not torch.equal(into, numbered(peer + (tag if tag > 3 else 0), count)):
            wrong.append(f"tag {tag}")
    for work in early:
        work.wait()
    if not (total == 2).all():
        wrong.append("sum")
    return wrong


def test_a_send_and_its_recv_may_be_far_apart(tmp_path: Path):
    for wrong in run_ranks(apart, 2, str(tmp_path / "store")):
        assert wrong == []


def threads(rank: int, size: int, path: str) -> list[str]:
    ours, _ = join(rank, size, path)
    wrong: list[str] = []

    def talk(tag: int) -> None:
        for peer in range(size):
            if peer == rank:
                continue
            for n in range(20):
                count = 40_000 * (n % 3)
                into = torch.zeros(count)
                sent = dist.isend(numbered(n + rank, count), peer, ours, tag=tag)
                dist.recv(into, peer, ours, tag=tag)
                sent.wait()
                if not torch.equal(into, numbered(n + peer, count)):
                    wrong.append(f"{tag} {peer} {n}")

    talkers = [threading.Thread(target=talk, args=(tag,)) for tag in range(4)]
    for talker in talkers:
        talker.start()
    for n in range(20):
        total = torch.full((1000,), float(n))
        dist.all_reduce(total, group=ours)
        if total[-1] != size * n:
            wrong.append("sum")
    for talker in talkers:
        talker.join()
    return wrong


def test_threads_send_and_receive_at_once(tmp_path: Path):
    for wrong in run_ranks(threads, 3, str(tmp_path / "store")):
        assert wrong == []


def nobody_waits(rank: int, size: int, path: str) -> bool:
    """Neither rank calls anything of ours after the start."""
    ours, _ = join(rank, size, path)
    into = torch.zeros(LARGE)
    works = [
        dist.isend(numbered(rank, LARGE), 1 - rank, ours),
        dist.irecv(into, 1 - rank, ours),
    ]
    expected = numbered(1 - rank, LARGE)
    deadline = time.monotonic() + 20
    while not torch.equal(into, expected):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    # A script may ask instead of waiting.
    while not all(work.is_completed() for work in works):
        assert time.monotonic() < deadline
    Path(f"{path}.{rank}").touch()
    wait_for(f"{path}.{1 - rank}")
    return all(work.is_success() for work in works)


def test_messages_move_while_nobody_waits(tmp_path: Path):
    assert run_ranks(nobody_waits, 2, str(tmp_path / "store")) == [True, True]


# As gloo answers


def refused(rank: int, size: int, path: str) -> dict[str, list[str]]:
    ours, _ = join(rank, size, path)
    calls = calls_of(ours)
    del calls._forward  # what is refused goes to gloo, which refuses it
    every_second = torch.ones(8)[::2]
    cases: dict[str, Callable[[Any], Any]] = {
        "send strided": lambda group: group.send([every_second], 1 - rank, 0),
        "recv strided": lambda group: group.recv([every_second], 1 - rank, 0),
        "recv strided from any": lambda group: group.recv_anysource([every_second], 0),
        "send sparse": lambda group: group.send([torch.eye(3).to_sparse()], 1 - rank, 0),
        "send two": lambda group: group.send([torch.ones(1), torch.ones(1)], 1 - rank, 0),
        "send tag": lambda group: group.send([torch.ones(1)], 1 - rank, -2),
        "recv tag": lambda group: group.recv([torch.ones(1)], 1 - rank, -2),
        "send to myself": lambda group: group.send([torch.ones(1)], rank, 0),
        "recv from myself": lambda group: group.recv([torch.ones(1)], rank, 0),
    }
    found = {}
    for name, call in cases.items():
        answers = []
        for backend in (calls, calls.gloo):
            answers.append(error_of(lambda: call(backend)) or "accepted")
        found[name] = answers
    return found


def test_what_gloo_refuses_is_refused(tmp_path: Path):
    for found in run_ranks(refused, 2, str(tmp_path / "store")):
        for name, (ours, gloo) in found.items():
            assert ours == gloo != "accepted", name
        assert len(found) == 9


def lengths(rank: int, size: int, path: str) -> dict[str, Any]:
    ours, gloo = join(rank, size, path)
    found: dict[str, Any] = {}
    for name, group in (("ours", ours), ("gloo", gloo)):
        into = torch.full((4,), 7.0)
        if rank == 0:
            dist.send(torch.ones(2), 1, group)
        else:
            dist.recv(into, 0, group)
            found[name] = into.tolist()
    for count in (1000, LARGE):
        # Received late as well as early: the message is kept, or goes into the tensor at once.
        for late in (False, True):
            if rank == 0:
                if not late:
                    dist.barrier(ours)
                    time.sleep(0.1)
                work = dist.isend(torch.ones(count), 1, ours)
                if late:
                    dist.barrier(ours)
                work.wait()
            else:
                if late:
                    dist.barrier(ours)
                    time.sleep(0.1)
                into = torch.zeros(count - 1)
                work = dist.irecv(into, 0, ours)
                if not late:
                    dist.barrier(ours)
                found[f"{count} {late}"] = error_of(work.wait)
                assert not into.any()
            # The next messages come as if nothing had been.
            if rank == 0:
                dist.send(numbered(1, count), 1, ours)
            else:
                into = torch.zeros(count)
                dist.recv(into, 0, ours)
                assert torch.equal(into, numbered(1, count))
    return found


def test_a_message_of_another_length(tmp_path: Path):
    _, found = run_ranks(lengths, 2, str(tmp_path / "store"))
    assert found.pop("ours") == found.pop("gloo") == [1.0, 1.0, 7.0, 7.0]
    assert len(found) == 4
    for name, error in found.items():
        sent = 4 * int(name.split()[0])
        assert error == (
            f"recv from rank 0 (tag 0): rank 0 sends {sent:,} bytes,"
            f" more than the {sent - 4:,} bytes of the tensor of rank 1"
        )


def negative_views(rank: int, size: int, path: str) -> list[float]:
    ours, _ = join(rank, size, path)
    view = torch._neg_view(torch.tensor([1.0, -2.0]))
    if rank == 0:
        calls_of(ours).send([view], 1, 0).wait()
    else:
        calls_of(ours).recv([view], 0, 0).wait()
    return view.tolist()


def test_views_that_negate_send_and_receive_values(tmp_path: Path):
    assert run_ranks(negative_views, 2, str(tmp_path / "store")) == [[-1.0, 2.0]] * 2


def pipeline(rank: int, size: int, path: str, backend: str, schedule: str) -> list[float]:
    import torch.distributed.pipelining as pipelining

    limit = timedelta(seconds=50)
    store = dist.FileStore(path, size)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    if backend == "scaletrain":
        calls = calls_of(dist.group.WORLD)
        forward = calls._forward
        calls._forward = lambda method, *arguments: (
            _is_not_ours(method) if method in ("send", "recv") else forward(method, *arguments)
        )
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(size)]
    device = torch.device("cpu")
    stage = pipelining.PipelineStage(layers[rank], rank, size, device)
    inputs, targets = torch.randn(2, 24, 16)
    run = getattr(pipelining, schedule)(stage, 6, loss_fn=nn.functional.mse_loss)
    if rank == 0:
        run.step(inputs)
    elif rank == size - 1:
        run.step(target=targets)
    else:
        run.step()
    gradients = [parameter.grad.flatten() for parameter in layers[rank].parameters()]
    dist.barrier()
    return torch.cat(gradients).tolist()


@pytest.mark.slow  # four groups of ranks that load the compiler
@pytest.mark.parametrize("schedule", ["ScheduleGPipe", "Schedule1F1B"])
def test_pipelines_train_as_over_gloo(tmp_path: Path, schedule: str):
    ours = run_ranks(pipeline, 3, str(tmp_path / "a"), "scaletrain", schedule)
    gloo = run_ranks(pipeline, 3, str(tmp_path / "b"), "gloo", schedule)
    assert ours == gloo


def over_gloo(rank: int, size: int, path: str) -> tuple[list[float], bool]:
    join(rank, size, path)
    limit = timedelta(seconds=30)
    options = Options(transport="gloo")
    group = dist.new_group(backend="scaletrain", timeout=limit, pg_options=options)
    tensor = torch.full((3,), float(rank))
    if rank == 0:
        dist.send(tensor, 1, group)
    else:
        dist.recv(tensor, 0, group)
    return tensor.tolist(), calls_of(group)._messages is None


def test_other_wires_leave_messages_to_gloo(tmp_path: Path):
    assert run_ranks(over_gloo, 2, str(tmp_path / "store")) == [([0.0] * 3, True)] * 2


# Ends


def late(rank: int, size: int, path: str) -> dict[str, Any]:
    ours, _ = join(rank, size, path, 2)
    found: dict[str, Any] = {}
    if rank == 1:
        wait_for(f"{path}.waited")
        dist.send(numbered(1), 0, ours, tag=4)
        wait_for(f"{path}.end")
        return found
    into = torch.zeros(1000)
    work = dist.irecv(into, 1, ours, tag=4)
    found["own limit"] = error_of(lambda: work.wait(timedelta(seconds=0.2)))
    Path(f"{path}.waited").touch()
    # It is under way all the same.
    found["again"] = work.wait() and torch.equal(into, numbered(1))
    other = dist.isend(torch.ones(LARGE), 1, ours)
    began = time.monotonic()
    found["late"] = error_of(lambda: dist.recv(into, 1, ours, tag=9))
    found["seconds"] = 1.5 < time.monotonic() - began < 8
    found["other"] = error_of(other.wait)
    found["after"] = error_of(lambda: dist.send(into, 1, ours))
    Path(f"{path}.end").touch()
    return found


def test_a_wait_ends_at_the_timeout_and_says_for_whom(tmp_path: Path):
    found, _ = run_ranks(late, 2, str(tmp_path / "store"))
    timed_out = "recv from rank 1 (tag 9): rank 1 did not answer: timed out after 2 s"
    assert found == {
        "own limit": ("recv from rank 1 (tag 4): not done within the 0.2 s that wait was given"),
        "again": True,
        "late": f"TimeoutError: {timed_out}",
        "seconds": True,
        "other": f"ConnectionError: send to rank 1 (tag 0): {timed_out}",
        "after": (
            "ConnectionError: send to rank 1 (tag 0): not run,"
            f" since an earlier message failed: {timed_out}"
        ),
    }


def deaths(_: int, __: int, path: str) -> dict[str, Any]:
    """Fork three ranks; ranks 1 and 2 kill themselves, rank 0 says what it sees."""
    pids = []
    for rank in range(3):
        pid = os.fork()
        if pid == 0:
            try:
                found = _dying(rank, path)
                Path(f"{path}.found").write_text(repr(found))
            finally:
                os._exit(0)
        pids.append(pid)
    deadline = time.monotonic() + 40
    for pid in reversed(pids):
        while not os.waitpid(pid, os.WNOHANG)[0]:
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
    return eval(Path(f"{path}.found").read_text())


def _dying(rank: int, path: str) -> dict[str, Any]:
    ours, _ = join(rank, 3, path, 60)
    dist.barrier(ours)
    if rank > 0:
        dist.send(numbered(rank), 0, ours, tag=rank)
        if rank == 1:
            wait_for(f"{path}.asked")
            os.kill(os.getpid(), signal.SIGKILL)
        wait_for(f"{path}.lost")
        dist.send(numbered(5), 0, ours, tag=7)
        wait_for(f"{path}.end")
        os.kill(os.getpid(), signal.SIGKILL)
    found: dict[str, Any] = {}
    into = torch.zeros(1000)
    unwaited = dist.irecv(torch.zeros(1), 1, ours, tag=8)
    threading.Timer(0.3, Path(f"{path}.asked").touch).start()
    began = time.monotonic()
    found["recv"] = error_of(lambda: dist.recv(torch.zeros(1), 1, ours, tag=3))
    found["send"] = error_of(lambda: dist.send(torch.zeros(LARGE), 1, ours, tag=3))
    while not unwaited.is_completed():
        assert time.monotonic() - began < 20
        time.sleep(0.01)
    found["unwaited"] = error_of(unwaited.wait)
    # What was sent before is there.
    dist.recv(into, 1, ours, tag=1)
    found["last"] = torch.equal(into, numbered(1))
    # As long as somebody lives, a message may come.
    Path(f"{path}.lost").touch()
    found["any"] = dist.recv(into, None, ours, tag=7)
    Path(f"{path}.end").touch()
    found["nobody"] = error_of(lambda: dist.recv(into, None, ours, tag=7))
    found["soon"] = time.monotonic() - began < 20
    return found


def test_a_death_ends_what_waits_for_the_dead(tmp_path: Path):
    (found,) = run_ranks(deaths, 1, str(tmp_path / "store"))
    for key, words in (
        ("recv", "recv from rank 1 (tag 3): peer rank 1 (process "),
        ("send", "send to rank 1 (tag 3): peer rank 1 (process "),
        ("unwaited", "recv from rank 1 (tag 8): peer rank 1 (process "),
        ("nobody", "recv from any rank (tag 7): peer rank "),
    ):
        message = found.pop(key)
        assert message.startswith(f"ConnectionError: {words}"), message
        assert message.endswith("is lost: it has ended"), message
    assert found == {"last": True, "any": 2, "soon": True}


def killed_amidst(_: int, __: int, path: str, victim: int) -> str:
    """Fork a sender and a receiver of 25 MiB, of which one kills itself when it has moved some."""
    pids = []
    for rank in range(2):
        pid = os.fork()
        if pid == 0:
            try:
                ours, _ = join(rank, 2, path, 60)
                dist.barrier(ours)
                if rank == victim:
                    method = "take" if rank == 1 else "put"
                    owner = inbox.Inbox if rank == 1 else inbox.Outbox
                    calls = itertools.count()
                    move = getattr(owner, method)

                    def die_at_last(*arguments: Any, calls: Any = calls, move: Any = move) -> Any:
                        if next(calls) == 20:
                            os.kill(os.getpid(), signal.SIGKILL)
                        return move(*arguments)

                    setattr(owner, method, die_at_last)
                tensor = torch.zeros(LARGE)
                call = dist.send if rank == 0 else dist.recv
                error = error_of(lambda: call(tensor, 1 - rank, ours))
                Path(f"{path}.error").write_text(error)
            finally:
                os._exit(0)
        pids.append(pid)
    os.waitpid(pids[victim], 0)
    deadline = time.monotonic() + 20
    while not os.waitpid(pids[1 - victim], os.WNOHANG)[0]:
        if time.monotonic() > deadline:
            os.kill(pids[1 - victim], signal.SIGKILL)
        time.sleep(0.01)
    return Path(f"{path}.error").read_text()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_death_amidst_a_message_ends_it(tmp_path: Path, victim: int):
    (error,) = run_ranks(killed_amidst, 1, str(tmp_path / "store"), victim)
    call = ["recv from rank 0", "send to rank 1"][victim]
    assert error.startswith(f"ConnectionError: {call} (tag 0): peer rank {victim} (process ")
    assert error.endswith("is lost: it has ended")


def no_room(rank: int, size: int, path: str) -> str:
    ours, _ = join(rank, size, path)
    if rank == 1:
        inbox.create = _no_room
        return error_of(lambda: dist.recv(torch.zeros(3), 0, ours))
    return error_of(lambda: dist.send(torch.ones(3), 1, ours))


def _no_room(size: int) -> Any:
    raise OSError(errno.ENOSPC, "no room")


def test_both_ranks_say_where_there_is_no_memory(tmp_path: Path):
    first, second = run_ranks(no_room, 2, str(tmp_path / "store"))
    words = "no room for 4,"
    assert f"send to rank 1 (tag 0): {words}" in first
    assert f"recv from rank 0 (tag 0): {words}" in second
    for error in (first, second):
        assert "bytes of shared memory for messages to rank 1; use gloo" in error


def ends(rank: int, size: int, path: str, how: str) -> tuple[str, str, float]:
    ours, _ = join(rank, size, path, 60)
    dist.barrier(ours)
    if rank == 1:
        wait_for(f"{path}.end")
        return "", "", 0.0
    # Another thread waits, too, and nobody for the third.
    other: list[str] = []
    works = [dist.isend(torch.ones(LARGE), 1, ours), dist.irecv(torch.ones(3), 1, ours)]
    waiter = threading.Thread(target=lambda: other.append(error_of(works[0].wait)))
    waiter.start()
    if how == "abort":
        threading.Timer(0.5, ours.abort).start()
    elif how == "destroy":
        threading.Timer(0.5, dist.destroy_process_group, (ours,)).start()
    else:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    began = time.monotonic()
    try:
        error = error_of(lambda: dist.recv(torch.ones(3), 1, ours, tag=2))
    except KeyboardInterrupt:
        error = "Ctrl-C"
        ours.abort()
    seconds = time.monotonic() - began
    waiter.join(10)
    error_of(works[1].wait)
    Path(f"{path}.end").touch()
    return error, other[0], seconds


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("abort", "this rank has ended the group (abort)"),
        ("destroy", "its group was destroyed"),
        ("Ctrl-C", "Ctrl-C"),
    ],
)
def test_waits_end_with_the_group(tmp_path: Path, how: str, words: str):
    (error, other, seconds), _ = run_ranks(ends, 2, str(tmp_path / "store"), how)
    assert error.endswith(words), error
    assert other.endswith(("(abort)", "was destroyed", "KeyboardInterrupt")), other
    assert seconds < 10


# What is left


def groups(rank: int, size: int, path: str) -> tuple[Held, Held]:
    join(rank, size, path)
    # Made once: large tensors that come and go leave holes of their own.
    into, outgoing = torch.zeros(1 << 20), torch.zeros(1 << 20)

    def use(number: int) -> None:
        group = dist.new_group([0, 1], backend="scaletrain")
        outgoing.fill_(rank + number)
        sent = dist.isend(outgoing, 1 - rank, group)
        dist.recv(into, 1 - rank, group)
        sent.wait()
        assert into[0] == into[-1] == 1 - rank + number
        dist.barrier(group)
        dist.destroy_process_group(group)

    for number in range(20):
        use(number)
    before = Held.now()
    for number in range(20, 80):
        use(number)
    return before, Held.now()


@pytest.mark.slow  # eighty groups
def test_groups_leave_nothing(tmp_path: Path):
    for before, after in run_ranks(groups, 2, str(tmp_path / "store")):
        assert after.descriptors <= before.descriptors + 2
        assert after.threads <= before.threads + 2
        assert after.mib < before.mib + 4  # an inbox has 4 MiB


def unwanted(rank: int, size: int, path: str) -> tuple[float, bool]:
    """Rank 0 sends 100 MiB in pieces before rank 1 wants any of it."""
    ours, _ = join(rank, size, path)
    count = 1 << 18
    if rank == 0:
        sent = [numbered(n, count) for n in range(100)]
        works = [dist.isend(tensor, 1, ours, tag=1) for tensor in sent]
        dist.send(torch.ones(1), 1, ours, tag=2)
        for work in works:
            work.wait()
        return 0.0, True
    dist.recv(torch.zeros(1), 0, ours, tag=2)
    before = Held.now().mib
    time.sleep(0.5)  # in which the thread may take in more
    work = dist.irecv(torch.zeros(1), 0, ours, tag=9)
    for _ in range(100):
        work.is_completed()
        time.sleep(0.001)
    grown = Held.now().mib - before
    right = True
    into = torch.zeros(count)
    for n in range(100):
        dist.recv(into, 0, ours, tag=1)
        right = right and torch.equal(into, numbered(n, count))
    return grown, right


def test_messages_that_nobody_wants_take_little_memory(tmp_path: Path):
    for grown, right in run_ranks(unwanted, 2, str(tmp_path / "store")):
        assert right
        assert grown < 7  # two MiB are kept, and two of the inbox are rank 0's


def many(rank: int, size: int, path: str) -> tuple[Held, Held]:
    ours, _ = join(rank, size, path)

    def use(number: int) -> None:
        into = torch.zeros(100)
        works = [
            dist.isend(numbered(rank + number, 100), 1 - rank, ours, tag=number),
            dist.irecv(into, 1 - rank, ours, tag=number),
        ]
        for work in works:
            work.wait()
        assert torch.equal(into, numbered(1 - rank + number, 100))

    return Held.around(use, 500, 5000)


def test_thousands_of_messages_leave_nothing(tmp_path: Path):
    for before, after in run_ranks(many, 2, str(tmp_path / "store")):
        assert after.descriptors == before.descriptors and after.threads == before.threads
        assert after.mib < before.mib + 2


def resting(rank: int, size: int, path: str) -> list[bool]:
    """Return whether the thread still looks for messages half a second after each use."""
    ours, _ = join(rank, size, path)
    looks = []
    for number in range(3):
        into = torch.zeros(100)
        dist.barrier(ours)
        work = dist.irecv(into, 1 - rank, ours, tag=number)
        dist.send(numbered(rank, 100), 1 - rank, ours, tag=number)
        work.wait()
        time.sleep(0.5)
        looks.append(calls_of(ours)._own_messages()._is_needed.is_set())
    return looks


def test_the_thread_rests_when_there_is_nothing_to_move(tmp_path: Path):
    """Bug it catches: after its first rest, it looks 500 times a second for ever."""
    assert run_ranks(resting, 2, str(tmp_path / "store")) == [[False] * 3] * 2


class _Awaited:
    """Ranks that live, and are late."""

    timeout_s = 0.3
    neighbours_until = 0.0
    num_looks = 0

    def sleep(self, place: int, seen: int) -> None:
        raise AssertionError("nothing to sleep for")

    def check_alive(self, rank: int) -> None:
        self.num_looks += 1

    def check_not_ended(self) -> None:
        pass

    def late(self, ranks: tuple[int, ...]) -> TimeoutError:
        return TimeoutError(f"{ranks} are late")


def test_a_wait_ends_in_time_though_other_messages_move():
    awaited = _Awaited()
    patience = Patience(awaited, (3,))
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="are late"):
        while time.monotonic() - began < 5:
            patience.moved()
    assert 0.3 < time.monotonic() - began < 2 and awaited.num_looks >= 2

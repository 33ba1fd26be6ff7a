"""Tests engine/rendezvous/sealed.py: values that others write into the store change nothing."""

import errno
import fcntl
import os
import threading
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from scaletrain.engine import rendezvous
from scaletrain.engine.choice import NATIVE, Options
from scaletrain.engine.group_calls import GroupCalls
from scaletrain.engine.rendezvous.sealed import SealedStore
from scaletrain.engine.rendezvous.serve import serve_at
from scaletrain.engine.roll_call import RollCall
from scaletrain.engine.transport import nccl
from scaletrain.errors import UserError
from scaletrain.launching.job import Job, Program
from scaletrain.launching.launchers import local
from scaletrain.launching.store import bind_store
from scaletrain.run.job_key import forget, job_key
from scaletrain.training.stopping import Appointment
from scaletrain.world import UNKNOWN, World
from tests.ranks import run_ranks

SOON = timedelta(seconds=10)
REFUSED = "was not written by a process of this job"


@pytest.fixture
def stores(tmp_path) -> tuple[SealedStore, dist.TCPStore]:
    """Return the job's store, and a connection that another user of the host opens to it."""
    served = dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
    thief = dist.TCPStore("127.0.0.1", served.port, None, wait_for_workers=False)
    return SealedStore(served, tmp_path), thief


def write(thief: dist.TCPStore, name: str, value: str | bytes) -> None:
    """Write a value, and wait until the server has it."""
    thief.set(name, value)
    thief.get(name)


def test_values_come_back_under_every_call(stores):
    store, _ = stores
    prefixed = dist.PrefixStore("a", store)
    prefixed.set("x", b"\x001")
    assert store.get("a/x") == b"\x001"
    assert store.clone().get("a/x") == b"\x001"
    assert prefixed.compare_set("y", "", "2") == b"2"
    assert prefixed.compare_set("y", "", "3") == b"2"
    assert prefixed.compare_set("y", "2", "4") == b"4"
    prefixed.multi_set(["p", "q"], ["5", "6"])
    assert prefixed.multi_get(["p", "q"]) == [b"5", b"6"]
    prefixed.wait(["p", "q"], SOON)
    assert prefixed.check(["p"]) and not prefixed.check(["r"])


@pytest.mark.parametrize("forge", ["plain", "moved", "of another job", "short"])
def test_values_of_others_are_refused(stores, tmp_path, forge):
    store, thief = stores
    store.set("weights", b"good")
    store.set("other", b"bad")
    other_job = job_key(tmp_path / "other")
    forged = {
        "plain": b"bad",
        "moved": thief.get("other"),  # a true value, under another name
        "of another job": other_job.seal("/weights", b"bad"),
        "short": b"",
    }
    write(thief, "weights", forged[forge])
    with pytest.raises(UserError, match=REFUSED):
        store.get("weights")
    with pytest.raises(UserError, match=REFUSED):
        store.multi_get(["other", "weights"])
    if forge == "short":  # an empty value counts as none, and gives way
        assert store.compare_set("weights", "", "mine") == b"mine"
        return
    with pytest.raises(UserError, match=REFUSED):
        store.compare_set("weights", "", "mine")


def test_values_of_an_earlier_attempt_are_refused(tmp_path):
    shared = dist.HashStore()
    first, second = (SealedStore(shared, tmp_path, scope) for scope in "12")
    first.set("stop", "50")
    with pytest.raises(UserError, match=REFUSED):
        second.get("stop")


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to give files to others")
def test_a_key_that_somebody_else_wrote_is_refused(tmp_path):
    """Unless all of the run directory is theirs, as on a network file system that maps owners."""
    key = job_key(tmp_path)
    os.chown(tmp_path / ".job.key", 1234, -1)
    with pytest.raises(UserError, match="owned by you"):
        job_key(tmp_path)
    os.chown(tmp_path, 1234, -1)
    assert job_key(tmp_path) == key


def test_others_cannot_stop_a_job(stores):
    """The job ends with an error instead of finishing early with status 0."""
    store, thief = stores
    appointment = Appointment(store, "stop_at", 10)
    assert not appointment.is_due(0, False)
    write(thief, "stop_at", "50")
    with pytest.raises(UserError, match=REFUSED):
        appointment.is_due(10, False)


def test_others_take_no_part_in_a_roll_call(stores):
    store, thief = stores
    roll_call = RollCall(store, 0, 2, timedelta(seconds=1))
    write(thief, "roll//1", "allreduce #1")  # that rank 1 failed here, too
    text = roll_call.explain("allreduce", 1, ConnectionError("lost"))
    assert text.startswith("allreduce #1: lost; ") and REFUSED in text


def test_others_do_not_place_ranks(stores):
    store, thief = stores
    write(thief, "scaletrain/host/1", "elsewhere")
    with pytest.raises(UserError, match=REFUSED):
        rendezvous.place(World(0, 2, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN), store)


def test_gloo_meets_in_a_sealed_store(tmp_path):
    """torch's own threads read and write it, and a rank without the key never gets in."""
    served = dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
    sums = run_ranks(_sum, 3, tmp_path, served.port)
    assert sums == [[0.0 + 1 + 2, 1 * 2 * 3]] * 3
    keys = served.list_keys()
    assert keys
    key = job_key(tmp_path)
    for name in keys:
        if "gloo" in name or "member" in name or "default_pg" in name:
            key.unseal(f"/{name}", served.get(name))


def test_nccl_meets_where_others_cannot_go(tmp_path):
    """A store of C++ alone stands in for NCCL: its values are in no store that others reach."""
    served = dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
    assert run_ranks(_sum_beside_nccl, 3, tmp_path, served.port) == [0.0 + 1 + 2] * 3
    assert not [name for name in served.list_keys() if "/nccl/" in name]
    folder = tmp_path / ".private"
    (file,) = folder.iterdir()
    assert b"/nccl/" in file.read_bytes() and folder.stat().st_mode & 0o777 == 0o700
    # The file's name is the only thing that the job's store decides.
    store = SealedStore(served, tmp_path)
    write(served, "file for nccl", "/tmp/of-others")
    with pytest.raises(UserError, match=REFUSED):
        rendezvous.for_nccl(store, on_one_host=True)
    forget(tmp_path)
    assert not folder.exists()


def test_nccl_meets_in_the_store_if_no_file_can_be_locked(stores, monkeypatch):
    """Some network file systems refuse; the ranks share one, so all of them see the same."""

    def refuse(*_) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    store, thief = stores
    monkeypatch.setattr(fcntl, "flock", refuse)
    rendezvous.for_nccl(store, on_one_host=True).set("name", "value")
    assert thief.get("name") == b"value"


def _sum_beside_nccl(rank: int, size: int, run_dir, port: int) -> float:
    """Sum over the store that the backend hands to NCCL."""
    handed = []
    nccl.backend = lambda group: handed.append(group.store)
    torch.cuda.is_available = dist.is_nccl_available = lambda: True
    connection = dist.TCPStore("127.0.0.1", port, None, wait_for_workers=False, timeout=SOON)
    store = rendezvous.sealed(connection, run_dir)
    own = dist.PrefixStore("first/", store)
    GroupCalls(own, rank, size, SOON, Options(NATIVE, "gloo")).shutdown()
    group = dist.ProcessGroupGloo(handed[0], rank, size, SOON)
    tensor = torch.tensor([float(rank)])
    group.allreduce([tensor]).wait()
    return tensor.item()


def _sum(rank: int, size: int, run_dir, port: int) -> list[float]:
    connection = dist.TCPStore("127.0.0.1", port, None, wait_for_workers=False, timeout=SOON)
    store = rendezvous.sealed(connection, run_dir)
    dist.init_process_group("scaletrain", store=store, rank=rank, world_size=size, timeout=SOON)
    results = []
    for operation, value in ((dist.ReduceOp.SUM, rank), (dist.ReduceOp.PRODUCT, rank + 1)):
        tensor = torch.full((3,), float(value))
        dist.all_reduce(tensor, operation)
        results.append(tensor[0].item())
    dist.barrier()
    dist.destroy_process_group()
    return results


def test_on_one_host_the_store_listens_on_loopback_alone(tmp_path, monkeypatch):
    """Whether rank 0 publishes its address, a variable names it, or our launcher binds it."""
    ports = []

    def publish() -> None:
        world = World(0, 2, 0, 2, UNKNOWN, UNKNOWN, "openmpi")
        with pytest.raises(TimeoutError):
            rendezvous.connect(world, tmp_path, timedelta(seconds=1))

    monkeypatch.setattr(
        rendezvous.publish, "serve_at", lambda *a: ports.append(serve_at(*a)) or ports[-1]
    )
    publisher = threading.Thread(target=publish)
    publisher.start()
    publisher.join(20)
    ports.append(serve_at("127.0.0.1", 0))
    assert len(ports) == 2
    for store in ports:
        assert _listening_addresses(store.port) == {"0100007F"}
    job = Job((), 2, tmp_path, Program.TRAINING)
    address = local.plan(job).store_address
    with bind_store(address, 2, {}) as listening:
        assert _listening_addresses(listening.getsockname()[1]) == {"0100007F"}


def _listening_addresses(port: int) -> set[str]:
    """Return the local addresses, in the kernel's hexadecimal form, that listen at a port."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with open(table, encoding="ascii") as file:
            for line in list(file)[1:]:
                _, local, _, state, *_ = line.split()
                address, _, number = local.partition(":")
                if state == "0A" and int(number, 16) == port:
                    found.add(address)
    return found

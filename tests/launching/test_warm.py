"""host/forkserver, host/forking, launching/supervision/warm: workers that begin with torch loaded.
Bug it catches: a worker that sees something of another one, or of the server that forked it.
"""

import contextlib
import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from scaletrain.host import cores
from scaletrain.host.forkserver import Forked, Order, Server
from scaletrain.host.processes import start_ticks
from scaletrain.launching.job import Program
from scaletrain.scaling.measure.starting import Starter
from tests.cluster.commands import ROOT, clean, command, gone, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

# Its value changes while a test runs.
OURS = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
FACTS = str(ROOT / "tests" / "launching" / "facts.py")


def facts(out: Path, *options: str) -> list[dict]:
    """Launch two workers from a directory of their own; return what each has noticed."""
    out.mkdir()
    run_dir = str(out.parent / "run")
    done = subprocess.run(
        command("launch", "-n", "2", *options, "--run-dir", run_dir, "--", FACTS, str(out)),
        env=clean({"PYTHONPATH": str(ROOT), "OF_A_USER": "caf\udce9 \n="}),
        cwd=out, preexec_fn=unusual_limits, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [f"[rank {rank}] rank {rank} has written" for rank in range(2)]
    assert sorted(done.stdout.splitlines()) == lines, done.stdout + done.stderr
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]


def unusual_limits() -> None:
    os.umask(0o027)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 4096))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def generalised(rank: dict, out: Path) -> dict:
    """Facts with what differs between any two launches left out."""
    return json.loads(json.dumps(rank["same"]).replace(str(out), "OUT"))


def test_a_warm_worker_sees_what_a_cold_one_sees(tmp_path: Path):
    (tmp_path / "warm").mkdir()
    (tmp_path / "cold").mkdir()
    warm = facts(tmp_path / "warm" / "out", "--set", "bind=true")
    cold = facts(tmp_path / "cold" / "out", "--set", "bind=true", "--cold")
    for rank in range(2):
        seen = generalised(warm[rank], tmp_path / "warm")
        expected = generalised(cold[rank], tmp_path / "cold")
        assert {name: fact for name, fact in seen.items() if fact != expected[name]} == {}
        assert warm[rank]["own"]["sum"] == 300**3
        assert [warm[rank]["own"]["warm"], cold[rank]["own"]["warm"]] == [True, False]
    for name in ("random", "numpy", "torch", "authkey", "pid"):
        assert len({str(rank["own"][name]) for rank in [*warm, *cold]}) == 4, name


def test_so_does_the_worker_of_a_command_that_is_forked_itself(tmp_path: Path):
    """As in a sweep: the command, its supervisor and the worker are forked, one by another."""
    seen = []
    for name in ("warm", "cold"):
        out = tmp_path / name / "out"
        out.mkdir(parents=True)
        options = ["--set", "bind=true", "--run-dir", str(tmp_path / name / "run")]
        argv = Program.COMMAND_LINE.command("launch", *options, "--", FACTS, out, 5)
        with contextlib.ExitStack() as stack:
            starter = stack.enter_context(
                Starter.warm(cores.count()) if name == "warm" else Starter()
            )
            log = stack.enter_context(open(out / "log", "wb"))
            # The worker's status is that of the command.
            assert starter.start(argv, log.fileno()).wait(60) == 5, (out / "log").read_text()
        assert "rank 0 has written" in (out / "log").read_text()
        rank = json.loads((out / "0.json").read_text())
        assert rank["own"]["warm"] is (name == "warm")
        seen.append(generalised(rank, tmp_path / name))
    assert {name: fact for name, fact in seen[0].items() if fact != seen[1][name]} == {}


@pytest.fixture
def server() -> Iterator[Server]:
    argv = [sys.executable, "-m", "tests.launching.light_server"]
    server = Server.start(argv, OURS)
    assert server.is_ready(20)
    yield server
    server.close()


def order_of(code: str, **fields) -> Order:
    environ = fields.pop("environ", OURS)
    return Order("tests.launching.forked", (code,), environ, os.getpid(), **fields)


def forked(server: Server, code: str, **fields) -> Forked:
    process = server.fork(order_of(code, **fields), stderr=subprocess.STDOUT)
    assert process
    return process


def output(process: Forked) -> str:
    assert process.stdout
    with process.stdout as pipe:
        text = pipe.read().decode()
    assert process.wait(10) == 0, text
    return text


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("pass", 0),
        ("sys.exit(7)", 7),
        ("sys.exit('a text')", 1),
        ("1 / 0", 1),
        ("os._exit(3)", 3),
        ("os.kill(os.getpid(), signal.SIGKILL)", -9),
        ("os.kill(os.getpid(), signal.SIGTERM)", -15),
        ("os.kill(os.getpid(), signal.SIGINT); time.sleep(9)", -2),
    ],
)
def test_a_forked_process_has_the_status_of_a_started_one(server: Server, code: str, status: int):
    assert forked(server, code).wait(20) == status


def test_signals_reach_a_forked_process_and_its_end_is_waited_for(server: Server):
    process = forked(server, "time.sleep(60)")
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(10) == process.poll() == -signal.SIGTERM
    process.send_signal(signal.SIGTERM)  # its id may belong to another one by now


def test_one_process_changes_nothing_for_the_next(server: Server):
    code = (
        "print(hasattr(os, 'mark'), os.getcwd(), os.environ.get('MARK'), sys.argv[2:], end='');"
        "os.mark = 1; os.chdir('/'); os.environ['MARK'] = '1'; sys.argv.append('mark');"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); os.umask(0); os.nice(5)"
    )
    expected = f"False {os.getcwd()} None []"
    assert [output(forked(server, code)) for _ in range(2)] == [expected, expected]


def test_a_variable_that_may_change_an_import_is_started_cold(server: Server):
    environ = OURS
    assert server.fork(order_of("pass", environ=environ | {"OMP_NUM_THREADS": "77"})) is None
    assert server.fork(order_of("pass", environ=environ | {"PYTHONHASHSEED": "77"})) is None
    less = {name: value for name, value in environ.items() if name != "PATH"}
    assert server.fork(order_of("pass", environ=less)) is None
    process = forked(
        server, "print(os.environ['MAY_DIFFER_1'], end='')", environ=environ | {"MAY_DIFFER_1": "x"}
    )
    assert output(process) == "x"


def test_without_a_server_there_is_no_fork_and_forked_processes_live_on(server: Server):
    process = forked(server, "time.sleep(0.5); sys.exit(5)")
    server._process.send_signal(signal.SIGKILL)
    server._process.wait()
    assert server.fork(order_of("pass")) is None
    assert process.poll() is None and process.wait(10) == 5


def test_descriptors_keep_their_numbers_and_streams_are_passed(server: Server, tmp_path: Path):
    read, write = os.pipe()
    # A number that is free here: under it, this process might hold something of a library's.
    high = fcntl.fcntl(write, fcntl.F_DUPFD, 400)
    code = f"os.write({high}, sys.stdin.read().encode());"
    code += "print('err', file=sys.stderr); print('out')"
    with open(tmp_path / "log", "wb") as log:
        order = order_of(code, descriptors=(high,))
        process = server.fork(
            order, stdin=subprocess.PIPE, stdout=log.fileno(), stderr=subprocess.STDOUT
        )
    assert process and process.stdin and process.stdout is None
    process.stdin.write(b"through")
    process.stdin.close()
    assert process.wait(10) == 0
    os.close(write)
    os.close(high)
    with open(read, "rb") as pipe:
        assert pipe.read() == b"through"
    assert sorted((tmp_path / "log").read_text().split()) == ["err", "out"]


def test_blocked_signals_wait_until_the_process_can_answer(server: Server):
    code = (
        "import pathlib; pathlib.Path('/proc/self/comm').write_text('x');"
        "time.sleep(0.3); signal.signal(signal.SIGTERM, lambda *_: print('answered', end=''));"
        "signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])"
    )
    process = forked(server, code, blocked=(int(signal.SIGTERM),), new_session=True)
    os.kill(process.pid, signal.SIGTERM)
    assert os.getsid(process.pid) == process.pid
    assert output(process) == "answered"


def test_a_forked_process_may_fork_its_own_from_a_server_of_its_own(server: Server):
    code = (
        'inner = "import os; print(os.getppid(), os.getsid(0))";'
        "environ = dict(os.environ, MAY_DIFFER_2='y');"
        "order = Order('tests.launching.forked', (inner,), environ, os.getpid());"
        # First, since both write to one pipe: a line and its end are two writes.
        "print(os.getpid());"
        "child = forkserver.inherited.fork(order, stdout=1, stderr=2);"
        "sys.exit(child.wait(10))"
    )
    words = output(forked(server, code, serves=True, new_session=True)).split()
    assert len(words) == 3 and len(set(words)) == 1


@pytest.mark.parametrize("own_server", [False, True])
def test_kill_9_of_the_starter_ends_what_it_has_forked(tmp_path: Path, own_server: bool):
    start = (
        "import os, sys, time; from pathlib import Path;"
        "from scaletrain.host.forkserver import Order, Server;"
        "server = Server.start([sys.executable, '-m', 'tests.launching.light_server'], os.environ);"
        "server.is_ready(20);"
        "order = Order('tests.launching.forked', ('time.sleep(60)',), dict(os.environ), os.getpid(),"
        f" death_signal=9, serves={own_server});"
        "process = server.fork(order, stdout=1, stderr=2);"
        "Path(sys.argv[1]).write_text(str(process.pid)); time.sleep(60)"
    )
    path = tmp_path / "pid"
    starter = subprocess.Popen([sys.executable, "-c", start, str(path)], cwd=ROOT)
    until(lambda: path.exists() and path.read_text() != "", "a forked process")
    pid = int(path.read_text())
    assert psutil.pid_exists(pid)
    started_it = psutil.Process(starter.pid)
    family = [starter.pid, *[child.pid for child in started_it.children(recursive=True)]]
    starter.kill()
    starter.wait()
    until(lambda: not any(map(is_running, family)), "the end of all", timeout_s=5)


def is_running(pid: int) -> bool:
    return start_ticks(pid) is not None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_while_torch_is_loading_ends_the_job(tmp_path: Path, number: signal.Signals):
    run_dir = tmp_path / "run"
    launcher = subprocess.Popen(
        command("launch", "-n", "2", "--run-dir", str(run_dir), "--", FACTS, str(tmp_path)),
        env=clean(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    loading = "scaletrain.programs.forkserver"
    family = psutil.Process(launcher.pid)
    until(lambda: any(loading in p.cmdline() for p in family.children(True)), "a server")
    launcher.send_signal(number)
    output, _ = launcher.communicate(timeout=20)
    assert launcher.returncode == 128 + number, output
    assert f"stopped by {number.name}" in output and "Traceback" not in output
    assert gone(run_dir)


def test_after_an_import_that_starts_a_thread_all_start_cold(tmp_path: Path):
    starts = "import threading, time; threading.Thread(target=time.sleep, args=(9,), daemon=True).start()"
    (tmp_path / "sitecustomize.py").write_text(starts)
    script = tmp_path / "script.py"
    script.write_text("import sys; print('torch._dynamo' in sys.modules)")
    done = subprocess.run(
        command("launch", "-n", "2", "--run-dir", str(tmp_path / "run"), "--", str(script)),
        env=clean({"PYTHONPATH": str(tmp_path)}), cwd=ROOT, capture_output=True, text=True, timeout=90,
    )  # fmt: skip
    assert sorted(done.stdout.splitlines()) == ["[rank 0] False", "[rank 1] False"], done.stderr
    assert "start cold: an import has started threads (--cold" in done.stderr


ISOLATED = """
import os, resource, signal, sys, time, torch
from pathlib import Path
here, rank = Path(sys.argv[1]), os.environ["RANK"]

def wait_for(name):
    while not (here / name).exists():
        time.sleep(0.02)

assert "torch._dynamo" in sys.modules, "this worker is cold"
if rank == "0":
    torch.zeros = None
    torch.nn.Linear.mark = 1
    torch.default_generator.manual_seed(7)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + (1 << 28)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    (here / "changed").touch()
    wait_for("seen")
    os.kill(os.getpid(), 9)
wait_for("changed")
signal.signal(signal.SIGTERM, signal.SIG_IGN)
block = torch.zeros(1 << 29, dtype=torch.uint8).fill_(1)
seen = [hasattr(torch.nn.Linear, "mark"), torch.initial_seed() == 7, block[-1].item()]
(here / "seen").touch()
time.sleep(0.5)
print("seen", seen, flush=True)
time.sleep(60)
"""


def test_memory_and_the_end_of_one_warm_worker_are_its_own(tmp_path: Path):
    """One changes torch, limits its memory and is killed; the other notices nothing."""
    (tmp_path / "isolated.py").write_text(ISOLATED)
    done = subprocess.run(
        command("launch", "-n", "2", "--run-dir", str(tmp_path / "run"), "--",
                str(tmp_path / "isolated.py"), str(tmp_path)),
        env=clean(), cwd=ROOT, capture_output=True, text=True, timeout=90,
    )  # fmt: skip
    assert done.returncode == 137, done.stdout + done.stderr
    assert "rank 0 on" in done.stderr and "was ended by SIGKILL" in done.stderr
    assert "[rank 1] seen [False, False, 1]" in done.stdout, done.stdout

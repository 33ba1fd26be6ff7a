"""How fast collectives are: processes that time them, and a row for each contender and size."""

import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from scaletrain import config, plugins
from scaletrain.config.grammar import split_spec
from scaletrain.errors import UserError
from scaletrain.launching.job import Program
from scaletrain.launching.launchers.mpirun import ALLOW_ROOT

_TORCH_LIMIT_S = 900  # for one world in one round
_MPI_LIMIT_S = 600

# The cases of ``programs/bench_cases.py``, each with the share of its size that a rank moves at
# least, for a number of ranks (nccl-tests' factors of busbw).
BUS_FACTORS: dict[str, Callable[[int], float]] = {
    "all_reduce": lambda size: 2 * (size - 1) / size,
    "broadcast": lambda size: 1.0,
    "reduce": lambda size: 1.0,
    "all_gather": lambda size: (size - 1) / size,
    "reduce_scatter": lambda size: (size - 1) / size,
    "all_to_all": lambda size: (size - 1) / size,
    "gather": lambda size: (size - 1) / size,
    "scatter": lambda size: (size - 1) / size,
    "send_recv": lambda size: 1.0,
    "barrier": lambda size: 0.0,
    # Two gathers of the weights, and a scatter of the gradients.
    "fsdp_step": lambda size: 3 * (size - 1) / size,
}


@dataclasses.dataclass(frozen=True)
class CollectiveTimes:
    """One contender at one size: the slowest rank's seconds, over all repeats."""

    collective: str
    contender: str
    workers: int
    size_bytes: int
    count: int  # elements
    dtype: str
    # In a loop of calls, one right after another.
    time_s_p50: float
    time_s_p99: float
    time_s_min: float
    time_s_max: float
    time_cv: float  # standard deviation / mean
    # After a barrier each: ranks arrive apart, caches hold other things. None: not measured.
    after_s_p50: float | None
    after_s_p99: float | None
    after_cv: float | None
    algbw_bytes_per_s: float  # size / time
    busbw_bytes_per_s: float  # algbw x the collective's factor
    # The algorithm cannot be faster: the link's rate, or the measured speed of the copies it needs.
    bound_s: float | None
    wrong: int  # elements
    runs: int
    ran: str  # ours: the algorithm, which `auto` chose in each round anew


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One contender at one size in one round, as a rank writes it to its file."""

    contender: str
    size_bytes: int
    times_s: list[float]  # of each run
    wrong: int  # elements
    # The scripts of the peers may write none of these.
    collective: str = "all_reduce"
    after_s: list[float] = dataclasses.field(default_factory=list)  # of each run after a barrier
    copy_bytes_per_s: float | None = None  # while all ranks copy at once
    ran: str = ""  # ours: the algorithm
    device: str = "cpu"


# (collective, bytes, contender) -> the measurement of each round.
Results = dict[tuple[str, int, str], list[Measurement]]


@dataclasses.dataclass(frozen=True)
class Task:
    """The part of the options that every rank reads, whichever library it measures."""

    collectives: tuple[str, ...]
    sizes: tuple[int, ...]
    seconds: float
    bind: bool
    device: str


@dataclasses.dataclass(frozen=True)
class Request:
    """What is measured, as the options of the command say (see their help texts)."""

    workers: tuple[str, ...]
    collectives: tuple[str, ...]
    algorithms: tuple[str, ...]
    transports: tuple[str, ...]
    sizes: tuple[int, ...]
    peers: tuple[str, ...]
    neighbours: int
    repeats: int
    seconds: float
    bind: bool
    device: str
    bandwidth: str | None
    mpi_python: tuple[str, ...]
    horovod_python: str | None
    deepspeed_sources: Path | None

    @property
    def all_collectives(self) -> tuple[str, ...]:
        """The collectives, with ``all`` spelled out."""
        return tuple(BUS_FACTORS) if self.collectives == ("all",) else self.collectives

    @property
    def all_algorithms(self) -> tuple[str, ...]:
        """The algorithms, with ``all`` spelled out."""
        if self.algorithms == ("all",):
            return ("auto", "native", *plugins.names("collective"))
        return self.algorithms


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What was measured, and what was not."""

    rows: list[CollectiveTimes]
    notes: list[str]  # a line for each contender that failed
    devices: list[str]  # where the ranks' tensors were


# Running the contenders


class _World(Protocol):
    """Processes that are started together, and measure one or more contenders."""

    @property
    def name(self) -> str:
        """The name in progress lines and notes."""

    def run(self, task: Task, count: int) -> list[Measurement]:
        """Return the measurements of ``count`` workers.

        Raises:
            RuntimeError: they failed.
            UserError: they cannot be started.
        """


def _worlds(request: Request) -> list[_World]:
    """Return the worlds of a round. One world of torch runs our contenders and gloo (or nccl)."""
    contenders = []
    for transport in request.transports:
        for algorithm in request.all_algorithms:
            contenders.append(f"{transport}:{algorithm}")
    contenders += [peer for peer in request.peers if peer in ("gloo", "nccl")]
    program = Program.BENCH_COLLECTIVES
    worlds: list[_World] = [_TorchWorld("torch", program.command, contenders, request.bandwidth)]
    if "all_reduce" not in request.all_collectives:
        return worlds
    if "mpi" in request.peers:
        for python in request.mpi_python or [sys.executable]:
            worlds.append(_MpiWorld("mpi", python, "allreduce_mpi.py"))
    if "horovod" in request.peers:
        python = request.horovod_python or sys.executable
        worlds.append(_MpiWorld("horovod", python, "allreduce_horovod.py"))
    if "deepspeed" in request.peers:
        worlds.append(_TorchWorld("deepspeed", functools.partial(_deepspeed, request), []))
    return worlds


def run(request: Request, counts: Sequence[int], tell: Callable[[str], None]) -> Outcome:
    """Measure every contender with each number of workers.

    Args:
        request: what is measured.
        counts: of workers.
        tell: is called with one line before each contender.
    """
    worlds = _worlds(request)
    rows: list[CollectiveTimes] = []
    notes: list[str] = []
    devices: set[str] = set()
    for count in counts:
        results = _measure(request, worlds, count, notes, tell)
        for rounds in results.values():
            devices.update(measurement.device for measurement in rounds)
        rows += _rows(results, count, request.bandwidth)
    return Outcome(rows, notes, sorted(devices))


def _measure(
    request: Request,
    worlds: Sequence[_World],
    count: int,
    notes: list[str],
    tell: Callable[[str], None],
) -> Results:
    """Run every contender in every round. A failure becomes a note."""
    task = Task(
        request.all_collectives, request.sizes, request.seconds, request.bind, request.device
    )
    results: Results = {}
    for repeat in range(request.repeats):
        for world in worlds:
            tell(f"{count} workers, round {repeat + 1} of {request.repeats}: {world.name}")
            try:
                with _neighbours(request.neighbours):
                    measurements = world.run(task, count)
            except (RuntimeError, UserError) as error:
                notes.append(f"{world.name}, {count} workers: {error}")
                continue
            for measurement in measurements:
                key = (measurement.collective, measurement.size_bytes, measurement.contender)
                results.setdefault(key, []).append(measurement)
    return results


@contextmanager
def _neighbours(count: int) -> Iterator[None]:
    """Let processes compute meanwhile."""
    argv = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(argv) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


@dataclasses.dataclass(frozen=True)
class _TorchWorld:
    """Processes that meet by torch, one a worker."""

    name: str
    command: Callable[[Path], Sequence[str]]  # of a rank, by the task's folder
    contenders: list[str]  # which the command finds in its task
    bandwidth: str | None = None  # of the links between emulated hosts; None for one host

    def run(self, task: Task, count: int) -> list[Measurement]:
        """Return what the ranks measured (see ``_World``)."""
        content = dataclasses.asdict(task) | {"contenders": self.contenders}
        with _task_folder(content) as folder:
            log = folder / "log"
            exit_codes = self._run_ranks(folder, log, count)
            if any(exit_codes):
                raise RuntimeError(_last_line(log.read_text(encoding="utf-8", errors="replace")))
            return _read_ranks(folder, count)

    def _run_ranks(self, folder: Path, log: Path, count: int) -> list[int]:
        """Run all ranks to their end, and return their exit codes."""
        argv = self.command(folder)
        with ExitStack() as stack:
            output = stack.enter_context(open(log, "wb"))
            cluster = None
            if self.bandwidth:
                from scaletrain.rehearsal.cluster import Cluster

                cluster = stack.enter_context(Cluster(count, bandwidth=self.bandwidth))
            processes = []
            for rank in range(count):
                variables = {"RANK": str(rank), "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
                if cluster is None:
                    process = subprocess.Popen(
                        argv, env=os.environ | variables, stdout=output, stderr=output
                    )
                else:
                    process = cluster.start(rank, argv, variables, stdout=output, stderr=output)
                processes.append(process)
            try:
                return [process.wait(timeout=_TORCH_LIMIT_S) for process in processes]
            except subprocess.TimeoutExpired:
                raise RuntimeError(f"not done within {_TORCH_LIMIT_S} s") from None
            finally:
                for process in processes:
                    process.kill()


@dataclasses.dataclass(frozen=True)
class _MpiWorld:
    """A peer's script, started by mpirun."""

    peer: str
    python: str  # which has the peer's package
    script: str  # its name in ``benchmarks/peers``

    @property
    def name(self) -> str:
        """The name in progress lines and notes: a peer can be measured from several Pythons."""
        return f"{self.peer} {self.python}"

    def run(self, task: Task, count: int) -> list[Measurement]:
        """Return what the ranks measured (see ``_World``)."""
        path = _script(self.script)
        with _task_folder(dataclasses.asdict(task)) as folder:
            argv = [*_mpirun(self.python), "-n", str(count), self.python, str(path), str(folder)]
            done = subprocess.run(
                argv,
                env=os.environ | ALLOW_ROOT,
                capture_output=True,
                text=True,
                timeout=_MPI_LIMIT_S,
            )
            if done.returncode:
                output = done.stderr or done.stdout or f"exit status {done.returncode}"
                raise RuntimeError(_last_line(output))
            return _read_ranks(folder, count)


def _script(name: str) -> Path:
    """Return the path of a peer's script.

    Raises:
        UserError: it is not there.
    """
    path = Path(__file__).parents[3] / "benchmarks" / "peers" / name
    if not path.exists():
        raise UserError(f"--peers: {path} is missing: peers are measured from a checkout")
    return path


def _deepspeed(request: Request, folder: Path) -> list[str]:
    """Return the command of a rank with DeepSpeed's operator."""
    script = _script("allreduce_deepspeed.py")
    return [sys.executable, str(script), str(folder), str(request.deepspeed_sources)]


def _mpirun(python: str) -> list[str]:
    """Return the mpirun that stands beside a Python, else the one on the path, with its request.

    Raises:
        UserError: neither exists.
    """
    beside = Path(python).with_name("mpirun")
    mpirun = str(beside) if beside.exists() else "mpirun"
    try:
        asked = subprocess.run([mpirun, "--version"], capture_output=True, text=True, timeout=20)
    except OSError:
        raise UserError(f"no mpirun beside {python} nor on the path") from None
    # Open MPI refuses more workers than cores unless it is asked. MPICH has no such option.
    for library in ("Open MPI", "Open-MPI", "PRRTE"):
        if library in asked.stdout:
            return [mpirun, "--oversubscribe"]
    return [mpirun]


@contextmanager
def _task_folder(content: Mapping[str, Any]) -> Iterator[Path]:
    """Yield a temporary folder with task.json, into which the ranks write their results."""
    with tempfile.TemporaryDirectory(prefix="scaletrain-bench-") as name:
        folder = Path(name)
        folder.joinpath("task.json").write_text(json.dumps(content), encoding="utf-8")
        yield folder


def _read_ranks(folder: Path, count: int) -> list[Measurement]:
    """Return the measurements in the files of all ranks, merged."""
    ranks = []
    for rank in range(count):
        text = folder.joinpath(f"{rank}.json").read_text(encoding="utf-8")
        ranks.append([Measurement(**value) for value in json.loads(text)])
    return _merge(ranks)


def _merge(ranks: Sequence[Sequence[Measurement]]) -> list[Measurement]:
    """Return one measurement that joins the measurements of all ranks.

    A run takes the time of its slowest rank. Wrong elements are counted on every rank.

    Args:
        ranks: the measurements of each rank, of the same contenders and sizes in the same order.
    """
    merged = []
    for of_ranks in zip(*ranks, strict=True):
        times_of_ranks = [measurement.times_s for measurement in of_ranks]
        slowest_s = [max(times_s) for times_s in zip(*times_of_ranks, strict=True)]
        after_of_ranks = [measurement.after_s for measurement in of_ranks]
        after_s = [max(times_s) for times_s in zip(*after_of_ranks, strict=True)]
        wrong = sum(measurement.wrong for measurement in of_ranks)
        merged.append(
            dataclasses.replace(of_ranks[0], times_s=slowest_s, after_s=after_s, wrong=wrong)
        )
    return merged


def _last_line(text: str) -> str:
    """Return the last line of a failed program, an error if there is one."""
    last = "no output"
    last_error = ""
    for line in text.splitlines():
        if not line.strip(" -"):
            continue  # empty, or a ruler of mpirun
        last = line
        if "Error" in line:
            last_error = line
    return (last_error or last)[:300]


# Rows and their bounds


def _rows(results: Results, workers: int, bandwidth: str | None) -> list[CollectiveTimes]:
    """Return a row for each contender at each size, the smallest size first."""
    rows = []
    order = [*BUS_FACTORS]
    for key in sorted(results, key=lambda key: (order.index(key[0]), key[1:])):
        collective, size, contender = key
        rounds = results[key]
        bound_s: float | None = None
        if not bandwidth:
            bound_s = _bound_on_one_host(collective, size, workers, rounds)
        elif collective == "all_reduce":
            bound_s = _bound_on_links(contender, size, workers, bandwidth)
        rows.append(_row(rounds, workers, bound_s))
    return rows


def _row(rounds: Sequence[Measurement], workers: int, bound_s: float | None) -> CollectiveTimes:
    """Return the row of one contender at one size."""
    size = rounds[0].size_bytes
    collective = rounds[0].collective
    times: list[float] = []
    after: list[float] = []
    wrong = 0
    algorithms: dict[str, None] = {}  # each once, in the order of the rounds
    for measurement in rounds:
        times += measurement.times_s
        after += measurement.after_s
        wrong += measurement.wrong
        if measurement.ran:
            algorithms[measurement.ran] = None
    times.sort()
    after.sort()
    median_s = _quantile(times, 0.5)
    bandwidth_of_message = size / median_s
    return CollectiveTimes(
        collective=collective,
        contender=rounds[0].contender,
        workers=workers,
        size_bytes=size,
        count=size // 4,
        dtype="float32",
        time_s_p50=median_s,
        time_s_p99=_quantile(times, 0.99),
        time_s_min=times[0],
        time_s_max=times[-1],
        time_cv=_variation(times),
        after_s_p50=_quantile(after, 0.5) if after else None,
        after_s_p99=_quantile(after, 0.99) if after else None,
        after_cv=_variation(after) if after else None,
        algbw_bytes_per_s=bandwidth_of_message,
        busbw_bytes_per_s=bandwidth_of_message * BUS_FACTORS[collective](workers),
        bound_s=bound_s,
        wrong=wrong,
        runs=len(times),
        ran=", ".join(algorithms),
    )


def _quantile(times: Sequence[float], share: float) -> float:
    """Return a quantile of sorted times."""
    return times[int(share * (len(times) - 1) + 0.5)]


def _variation(times: Sequence[float]) -> float:
    """Return the coefficient of variation, the standard deviation over the mean."""
    return statistics.pstdev(times) / statistics.fmean(times)


def _bound_on_links(contender: str, size: int, workers: int, bandwidth: str) -> float:
    """Return the seconds of the bytes alone through the busiest port of the emulated links."""
    from scaletrain.collectives.cost import Network, predict
    from scaletrain.units import bits_per_s

    links = Network(0.0, bits_per_s(bandwidth) / 8)
    algorithm = split_spec(contender).rest
    if algorithm in ("", "auto", "native"):
        # A contender without a schedule of its own, such as gloo, is held to the least that any
        # allreduce moves through a port: the ring's.
        return predict("ring", workers, size, links)
    name, options = config.plugin_spec("collective", algorithm, "")
    return predict(name, workers, size, links, **options)


def _bound_on_one_host(
    collective: str, size: int, workers: int, rounds: Sequence[Measurement]
) -> float | None:
    """Return the seconds of the bytes alone; None if no rank measured how fast it copies.

    Any allreduce moves 2(n - 1)/n of the message a rank between the ranks, at best at the speed at
    which all ranks copy at once. The other collectives have factors of their own.
    """
    speeds = [measurement.copy_bytes_per_s for measurement in rounds]
    fastest = max(filter(None, speeds), default=None)
    if fastest is None or not size:
        return None
    return BUS_FACTORS[collective](workers) * size / fastest

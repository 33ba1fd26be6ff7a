"""How fast collectives are: our algorithms beside gloo, MPI and others, and their bounds."""

import dataclasses
import functools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import click
import pydantic

from scaletrain import config, plugins
from scaletrain.cli.options import names
from scaletrain.config.grammar import split_spec
from scaletrain.errors import UserError, unknown
from scaletrain.launching.job import Program
from scaletrain.launching.launchers.mpirun import ALLOW_ROOT
from scaletrain.run.atomic import write_json
from scaletrain.run.environment import Environment, environment
from scaletrain.scaling.show import results as pages

PEERS = {
    "cpu": ("gloo", "mpi", "horovod", "deepspeed"),
    "cuda": ("gloo", "nccl"),
}  # by where the tensors are
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


@dataclasses.dataclass
class Header:
    """The facts behind a page of results."""

    machine: Environment  # see ``environment``
    time: str  # UTC, when the measurement began
    repeats: int
    network: str
    neighbours: int  # processes that computed meanwhile
    bound: bool  # workers are kept on a core each
    devices: list[str]  # filled in at the end: the ranks report where their tensors were

    def to_json(self) -> dict[str, Any]:
        """Return all facts on one level, the machine's first."""
        facts = dataclasses.asdict(self)
        machine = facts.pop("machine")
        return machine | facts


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of the command (see their help texts)."""

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
    out: Path | None

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


def _sizes(context: click.Context, parameter: click.Parameter, text: str) -> tuple[int, ...]:
    try:
        return tuple(_size_bytes(word) for word in text.split(","))
    except ValueError:
        raise click.BadParameter(
            f"{text!r}: expected sizes with commas, such as 4K,1M,25M"
        ) from None


def _size_bytes(word: str) -> int:
    """Return a size in bytes: 4096, 4K, 4KB or 4KiB. All prefixes are powers of 1,024.

    Raises:
        ValueError: it is not a size.
    """
    binary = re.sub(r"([KMG])i?B?$", r"\1iB", word)
    return int(pydantic.TypeAdapter(pydantic.ByteSize).validate_python(binary))


@click.command("collectives")
@click.option(
    "--workers", default="2", show_default=True, callback=names, help="Worker counts, such as 2,4."
)
@click.option(
    "--collectives",
    default="all_reduce",
    show_default=True,
    callback=names,
    help=f"all, or some of {', '.join(BUS_FACTORS)}.",
)
@click.option(
    "--algorithms",
    default="auto",
    show_default=True,
    callback=names,
    help="auto, native, all, or names (`scaletrain list`), with options if need be: pipelined_tree:segments=8.",
)
@click.option(
    "--transports", default="auto", show_default=True, callback=names, help="auto, or names."
)
@click.option(
    "--sizes",
    default="4K,64K,1M,25M",
    show_default=True,
    callback=_sizes,
    help="Message sizes in bytes; float32.",
)
@click.option(
    "--peers",
    default="gloo",
    show_default=True,
    callback=names,
    help="gloo, mpi, horovod, deepspeed; gloo, nccl with --device cuda; empty for none.",
)
@click.option(
    "--neighbours",
    default=0,
    show_default=True,
    type=click.IntRange(0),
    help="Processes that compute meanwhile, as beside other jobs.",
)
@click.option(
    "--repeats",
    default=3,
    show_default=True,
    type=click.IntRange(1),
    help="Rounds over all contenders, interleaved.",
)
@click.option(
    "--seconds",
    default=0.3,
    show_default=True,
    type=float,
    help="Time for one contender at one size in one round.",
)
@click.option(
    "--bind/--no-bind",
    default=False,
    show_default=True,
    help="Keep each worker (Horovod's excepted: it has a second thread) on a core of its own, where the cores suffice.",
)
@click.option(
    "--device",
    default="cpu",
    show_default=True,
    type=click.Choice(["cpu", "cuda"]),
    help="Where the tensors are. Workers take the GPUs in turn, and share them where there are fewer.",
)
@click.option(
    "--bandwidth",
    help="Emulate hosts: one a worker, links of this rate (such as 1Gbit), by `rehearsal`.",
)
@click.option(
    "--mpi-python",
    multiple=True,
    help="A Python with mpi4py whose folder has its mpirun; repeatable [default: this one].",
)
@click.option("--horovod-python", help="A Python with Horovod [default: this one].")
@click.option(
    "--deepspeed-sources",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="The unpacked sources of DeepSpeed's package, from which its operator is built.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write NAME.json, and the table beside it as NAME.md.",
)
def command(**values: Any) -> None:
    """Measure collectives side by side.

    Every contender runs in each of --repeats rounds, so that a slow minute of the machine hits all
    alike. Times are the slowest rank's.

    \b
    Examples:
      scaletrain bench collectives --workers 2,4 --algorithms ring,tree --sizes 4K,25M
      scaletrain bench collectives --collectives all --neighbours 2
    """
    options = Options(**values)
    counts = _check(options)
    header = _header(options)
    worlds = _worlds(options)
    rows: list[CollectiveTimes] = []
    notes: list[str] = []
    devices: set[str] = set()
    for count in counts:
        results = _measure(options, worlds, count, notes)
        for rounds in results.values():
            devices.update(measurement.device for measurement in rounds)
        rows += _rows(results, count, options.bandwidth)
    header.devices = sorted(devices)
    if not rows:
        raise UserError(f"nothing could be measured: {'; '.join(dict.fromkeys(notes))}")
    text = table(rows, header, notes)
    click.echo(text)
    if options.out:
        _write(options.out, rows, header, notes, text)
    wrong = sorted({row.contender for row in rows if row.wrong})
    if wrong:
        raise UserError(f"wrong sums: {', '.join(wrong)} (the last column counts the elements)")


def _check(options: Options) -> list[int]:
    """Return the worker counts.

    Raises:
        UserError: an option names something that there is not, or options exclude each other.
    """
    for collective in options.all_collectives:
        if collective not in BUS_FACTORS:
            raise unknown("--collectives", collective, ("all", *BUS_FACTORS))
    for peer in options.peers:
        if peer not in PEERS[options.device]:
            raise unknown(f"--peers with --device {options.device}", peer, PEERS[options.device])
    for name in options.all_algorithms:
        if name not in ("auto", "native"):
            config.plugin_spec("collective", name, "--algorithms", also=("auto", "native", "all"))
    transports = ["auto", *plugins.names("transport")]
    for name in options.transports:
        if name not in transports:
            raise unknown("--transports", name, transports)
    counts = [int(word) for word in options.workers if word.isdigit() and int(word) > 0]
    if len(counts) < len(options.workers):
        raise UserError(
            f"--workers: {','.join(options.workers)!r}: expected numbers with commas, such as 2,4"
        )
    if options.bandwidth and {"mpi", "horovod", "deepspeed"} & {*options.peers}:
        raise UserError(
            "--peers: mpi, horovod and deepspeed are measured on one host only (leave out --bandwidth)"
        )
    if "deepspeed" in options.peers and options.deepspeed_sources is None:
        raise UserError(
            "--peers: deepspeed is built from sources: unpack what `pip download --no-deps"
            " --no-binary :all: deepspeed` brings, and name the folder with --deepspeed-sources"
        )
    return counts


def _header(options: Options) -> Header:
    network = "one host"
    if options.bandwidth:
        network = f"EMULATED: one host a worker in network namespaces, {options.bandwidth} links"
    return Header(
        machine=environment(),
        time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        repeats=options.repeats,
        network=network,
        neighbours=options.neighbours,
        bound=options.bind,
        devices=[],
    )


def _write(
    out: Path, rows: Sequence[CollectiveTimes], header: Header, notes: Sequence[str], text: str
) -> None:
    """Write the figures as JSON, and the page beside them."""
    out.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "header": header.to_json(),
        "notes": notes,
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    write_json(out.with_suffix(".json"), content)
    pages.write(out.with_suffix(".md"), text)  # what people wrote on that page stays


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


def _worlds(options: Options) -> list[_World]:
    """Return the worlds of a round. One world of torch runs our contenders and gloo (or nccl)."""
    contenders = []
    for transport in options.transports:
        for algorithm in options.all_algorithms:
            contenders.append(f"{transport}:{algorithm}")
    contenders += [peer for peer in options.peers if peer in ("gloo", "nccl")]
    program = Program.BENCH_COLLECTIVES
    worlds: list[_World] = [_TorchWorld("torch", program.command, contenders, options.bandwidth)]
    if "all_reduce" not in options.all_collectives:
        return worlds
    if "mpi" in options.peers:
        for python in options.mpi_python or [sys.executable]:
            worlds.append(_MpiWorld("mpi", python, "allreduce_mpi.py"))
    if "horovod" in options.peers:
        python = options.horovod_python or sys.executable
        worlds.append(_MpiWorld("horovod", python, "allreduce_horovod.py"))
    if "deepspeed" in options.peers:
        worlds.append(_TorchWorld("deepspeed", functools.partial(_deepspeed, options), []))
    return worlds


def _measure(options: Options, worlds: Sequence[_World], count: int, notes: list[str]) -> Results:
    """Run every contender in every round. A failure becomes a note."""
    task = Task(
        options.all_collectives, options.sizes, options.seconds, options.bind, options.device
    )
    results: Results = {}
    for repeat in range(options.repeats):
        for world in worlds:
            progress = f"{count} workers, round {repeat + 1} of {options.repeats}: {world.name}"
            click.echo(progress, err=True)
            try:
                with _neighbours(options.neighbours):
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


def _deepspeed(options: Options, folder: Path) -> list[str]:
    """Return the command of a rank with DeepSpeed's operator."""
    script = _script("allreduce_deepspeed.py")
    return [sys.executable, str(script), str(folder), str(options.deepspeed_sources)]


def _mpirun(python: str) -> list[str]:
    """Return the mpirun that stands beside a Python, else the one on the path, with its options.

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


# The page

_COLUMNS = (
    "workers", "collective", "size", "count", "type", "contender", "ran", "tight p50", "p99", "cv",
    "after p50", "p99", "cv", "algbw GB/s", "busbw GB/s", "bound", "p50 / bound",
    "times gloo", "after", "wrong",
)  # fmt: skip


def table(rows: Sequence[CollectiveTimes], header: Header, notes: Sequence[str]) -> str:
    """Return the page of results as Markdown."""
    lines = [
        f"# {_title(rows)}, {header.network}", "",
        _machine_line(header),
        _conditions_line(rows, header), "",
        f"| {' | '.join(_COLUMNS)} |",
        f"|{'---|' * len(_COLUMNS)}",
    ]  # fmt: skip
    lines += [_line(row, _gloo_of(row, rows)) for row in rows]
    for note in dict.fromkeys(notes):
        lines.append(f"\nNot measured: {note}")
    return "\n".join(lines)


def _title(rows: Sequence[CollectiveTimes]) -> str:
    only_allreduce = all(row.collective == "all_reduce" for row in rows)
    return "Allreduce" if only_allreduce else "Collectives"


def _gloo_of(row: CollectiveTimes, rows: Sequence[CollectiveTimes]) -> CollectiveTimes | None:
    """Return gloo's row of the same case; None: there is none."""
    case = (row.workers, row.collective, row.size_bytes)
    for other in rows:
        if (
            other.contender == "gloo"
            and (other.workers, other.collective, other.size_bytes) == case
        ):
            return other
    return None


def _machine_line(header: Header) -> str:
    machine = header.machine
    facts = [
        f"{machine['processor']}, {machine['cores']} cores, {machine['os']}",
        f"tensors on {', '.join(header.devices)}",
        _versions(machine["versions"]),
        f"commit {machine['commit']}",
        header.time,
    ]
    return "; ".join(facts) + "."


def _versions(versions: Mapping[str, str | None]) -> str:
    installed = []
    for package, version in versions.items():
        if version:
            installed.append(f"{package} {version}")
    return ", ".join(installed)


def _conditions_line(rows: Sequence[CollectiveTimes], header: Header) -> str:
    """Return how the workers ran, and the meaning of the columns."""
    sentences = []
    if header.bound:
        sentences.append("Workers are each bound to a core, where the cores suffice.")
    else:
        sentences.append("Workers run where the system puts them.")
    cores = header.machine["cores"]
    crowded = sorted({row.workers for row in rows if row.workers > cores})
    if crowded:
        sentences.append(
            f"OVERSUBSCRIBED: {', '.join(map(str, crowded))} workers on {cores} cores."
        )
    if header.neighbours:
        sentences.append(f"BESIDE {header.neighbours} PROCESSES THAT COMPUTE.")
    sentences += [
        "Times of the slowest rank, in milliseconds: tight, one call right after another, and after a barrier before each call.",
        "cv: standard deviation over mean.",
        "times gloo: how many times as fast as gloo, tight and after a barrier (p50).",
        "ran: what `auto` chose; native is the wire's own.",
        "busbw = size / time x the share of the size that a rank moves: of an allreduce 2(n - 1)/n.",
        "bound: what the algorithm's bytes alone take, at the links' rate, or on one host at the speed at which all ranks copy at once.",
    ]  # fmt: skip
    return " ".join(sentences)


def _line(row: CollectiveTimes, gloo: CollectiveTimes | None) -> str:
    """Return the table's line of a row."""
    cells = [
        row.workers,
        row.collective,
        _size(row.size_bytes),
        row.count,
        row.dtype,
        row.contender,
        row.ran or "-",
        _milliseconds(row.time_s_p50),
        _milliseconds(row.time_s_p99),
        f"{row.time_cv:.0%}",
        _milliseconds(row.after_s_p50),
        _milliseconds(row.after_s_p99),
        "-" if row.after_cv is None else f"{row.after_cv:.0%}",
        f"{row.algbw_bytes_per_s / 1e9:.3f}",
        f"{row.busbw_bytes_per_s / 1e9:.3f}",
        _milliseconds(row.bound_s),
        _ratio(row.time_s_p50, row.bound_s),
        _ratio(gloo.time_s_p50, row.time_s_p50) if gloo else "-",
        _ratio(gloo.after_s_p50, row.after_s_p50) if gloo else "-",
        row.wrong,
    ]
    return f"| {' | '.join(map(str, cells))} |"


def _ratio(above: float | None, below: float | None) -> str:
    if not above or not below:
        return "-"
    return f"{above / below:.2f}"


def _milliseconds(seconds: float | None) -> str:
    return f"{1e3 * seconds:.3f}" if seconds else "-"


def _size(num_bytes: int) -> str:
    """Return a size as people write it, such as 64 KiB."""
    for unit, scale in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:g} {unit}"
    return f"{num_bytes} B"

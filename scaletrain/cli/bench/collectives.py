"""How fast allreduces are: our algorithms beside gloo, MPI and Horovod, and their bounds."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
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

PEERS = {"cpu": ("gloo", "mpi", "horovod"), "cuda": ("gloo", "nccl")}  # by where the tensors are
_TORCH_LIMIT_S = 900  # for one world in one round
_MPI_LIMIT_S = 600


@dataclasses.dataclass(frozen=True)
class AllreduceTimes:
    """One contender at one size: the slowest rank's seconds, over all repeats."""

    contender: str
    workers: int
    size_bytes: int
    count: int  # elements
    dtype: str
    time_s_p50: float
    time_s_p95: float
    time_s_min: float
    time_s_max: float
    algbw_bytes_per_s: float  # size / time
    busbw_bytes_per_s: float  # algbw x 2(n - 1)/n
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
    # The scripts of MPI and Horovod write none of these.
    copy_bytes_per_s: float | None = None  # while all ranks copy at once
    ran: str = ""  # ours: the algorithm
    device: str = "cpu"


# (contender, bytes) -> the measurement of each round.
Results = dict[tuple[str, int], list[Measurement]]


@dataclasses.dataclass(frozen=True)
class Task:
    """The part of the options that every rank reads, whichever library it measures."""

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
    algorithms: tuple[str, ...]
    transports: tuple[str, ...]
    sizes: tuple[int, ...]
    peers: tuple[str, ...]
    repeats: int
    seconds: float
    bind: bool
    device: str
    bandwidth: str | None
    mpi_python: tuple[str, ...]
    horovod_python: str | None
    out: Path | None

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
    help="gloo, mpi, horovod; gloo, nccl with --device cuda; empty for none.",
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
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write NAME.json, and the table beside it as NAME.md.",
)
def command(**values: Any) -> None:
    """Measure allreduces side by side.

    Every contender runs in each of --repeats rounds, so that a slow minute of the machine hits all
    alike. Times are the slowest rank's.

    \b
    Example:
      scaletrain bench collectives --workers 2,4 --algorithms ring,tree --sizes 4K,25M
    """
    options = Options(**values)
    counts = _check(options)
    header = _header(options)
    worlds = _worlds(options)
    rows: list[AllreduceTimes] = []
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
    if options.bandwidth and ("mpi" in options.peers or "horovod" in options.peers):
        raise UserError(
            "--peers: mpi and horovod are measured on one host only (leave out --bandwidth)"
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
        bound=options.bind,
        devices=[],
    )


def _write(
    out: Path, rows: Sequence[AllreduceTimes], header: Header, notes: Sequence[str], text: str
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
    worlds: list[_World] = [_TorchWorld(contenders, options.bandwidth)]
    if "mpi" in options.peers:
        for python in options.mpi_python or [sys.executable]:
            worlds.append(_MpiWorld("mpi", python, "allreduce_mpi.py"))
    if "horovod" in options.peers:
        python = options.horovod_python or sys.executable
        worlds.append(_MpiWorld("horovod", python, "allreduce_horovod.py"))
    return worlds


def _measure(options: Options, worlds: Sequence[_World], count: int, notes: list[str]) -> Results:
    """Run every contender in every round. A failure becomes a note."""
    task = Task(options.sizes, options.seconds, options.bind, options.device)
    results: Results = {}
    for repeat in range(options.repeats):
        for world in worlds:
            progress = f"{count} workers, round {repeat + 1} of {options.repeats}: {world.name}"
            click.echo(progress, err=True)
            try:
                measurements = world.run(task, count)
            except (RuntimeError, UserError) as error:
                notes.append(f"{world.name}, {count} workers: {error}")
                continue
            for measurement in measurements:
                key = (measurement.contender, measurement.size_bytes)
                results.setdefault(key, []).append(measurement)
    return results


@dataclasses.dataclass(frozen=True)
class _TorchWorld:
    """One process of ``programs/bench_collectives.py`` a worker."""

    contenders: list[str]
    bandwidth: str | None  # of the links between emulated hosts; None for one host
    name: str = "torch"

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
        argv = Program.BENCH_COLLECTIVES.command(folder)
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
        path = Path(__file__).parents[3] / "benchmarks" / "peers" / self.script
        if not path.exists():
            raise UserError(f"--peers: {path} is missing: peers are measured from a checkout")
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
        wrong = sum(measurement.wrong for measurement in of_ranks)
        merged.append(dataclasses.replace(of_ranks[0], times_s=slowest_s, wrong=wrong))
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


def _rows(results: Results, workers: int, bandwidth: str | None) -> list[AllreduceTimes]:
    """Return a row for each contender at each size, the smallest size first."""
    rows = []
    for contender, size in sorted(results, key=lambda key: (key[1], key[0])):
        rounds = results[contender, size]
        bound_s: float | None
        if bandwidth:
            bound_s = _bound_on_links(contender, size, workers, bandwidth)
        else:
            bound_s = _bound_on_one_host(size, workers, rounds)
        rows.append(_row(rounds, workers, bound_s))
    return rows


def _row(rounds: Sequence[Measurement], workers: int, bound_s: float | None) -> AllreduceTimes:
    """Return the row of one contender at one size."""
    size = rounds[0].size_bytes
    times: list[float] = []
    wrong = 0
    algorithms: dict[str, None] = {}  # each once, in the order of the rounds
    for measurement in rounds:
        times += measurement.times_s
        wrong += measurement.wrong
        if measurement.ran:
            algorithms[measurement.ran] = None
    times.sort()
    median_s = times[len(times) // 2]
    bandwidth_of_message = size / median_s
    return AllreduceTimes(
        contender=rounds[0].contender,
        workers=workers,
        size_bytes=size,
        count=size // 4,
        dtype="float32",
        time_s_p50=median_s,
        time_s_p95=times[int(0.95 * (len(times) - 1))],
        time_s_min=times[0],
        time_s_max=times[-1],
        algbw_bytes_per_s=bandwidth_of_message,
        busbw_bytes_per_s=bandwidth_of_message * 2 * (workers - 1) / workers,
        bound_s=bound_s,
        wrong=wrong,
        runs=len(times),
        ran=", ".join(algorithms),
    )


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


def _bound_on_one_host(size: int, workers: int, rounds: Sequence[Measurement]) -> float | None:
    """Return the seconds of the bytes alone; None if no rank measured how fast it copies.

    Any allreduce moves 2(n - 1)/n of the message a rank between the ranks, at best at the speed at
    which all ranks copy at once.
    """
    speeds = [measurement.copy_bytes_per_s for measurement in rounds]
    fastest = max(filter(None, speeds), default=None)
    if fastest is None:
        return None
    return 2 * (workers - 1) / workers * size / fastest


# The page


def table(rows: Sequence[AllreduceTimes], header: Header, notes: Sequence[str]) -> str:
    """Return the page of results as Markdown."""
    lines = [
        f"# Allreduce, {header.network}", "",
        _machine_line(header),
        _conditions_line(rows, header), "",
        "| workers | size | count | type | contender | ran | p50 | p95 | min | max | algbw GB/s | busbw GB/s | bound | p50 / bound | wrong |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    lines += [_line(row) for row in rows]
    for note in dict.fromkeys(notes):
        lines.append(f"\nNot measured: {note}")
    return "\n".join(lines)


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


def _conditions_line(rows: Sequence[AllreduceTimes], header: Header) -> str:
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
    sentences += [
        "Times of the slowest rank, in milliseconds.",
        "ran: what `auto` chose; native is the wire's own.",
        "busbw = size / time x 2(n - 1)/n.",
        "bound: what the algorithm's bytes alone take, at the links' rate, or on one host at the speed at which all ranks copy at once.",
    ]  # fmt: skip
    return " ".join(sentences)


def _line(row: AllreduceTimes) -> str:
    """Return the table's line of a row."""
    bound = "-"
    share = "-"
    if row.bound_s:
        bound = _milliseconds(row.bound_s)
        share = f"{row.time_s_p50 / row.bound_s:.2f}"
    cells = [
        row.workers,
        _size(row.size_bytes),
        row.count,
        row.dtype,
        row.contender,
        row.ran or "-",
        _milliseconds(row.time_s_p50),
        _milliseconds(row.time_s_p95),
        _milliseconds(row.time_s_min),
        _milliseconds(row.time_s_max),
        f"{row.algbw_bytes_per_s / 1e9:.3f}",
        f"{row.busbw_bytes_per_s / 1e9:.3f}",
        bound,
        share,
        row.wrong,
    ]
    return f"| {' | '.join(map(str, cells))} |"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3f}"


def _size(num_bytes: int) -> str:
    """Return a size as people write it, such as 64 KiB."""
    for unit, scale in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:g} {unit}"
    return f"{num_bytes} B"

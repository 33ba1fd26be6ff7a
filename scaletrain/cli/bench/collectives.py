"""How fast allreduces are: our algorithms beside gloo, MPI and Horovod, and their bounds."""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import click

from scaletrain import config, plugins
from scaletrain.errors import UserError, unknown
from scaletrain.launching.job import Program
from scaletrain.run.atomic import write_json
from scaletrain.run.environment import environment
from scaletrain.scaling.show import results as pages

PEERS = {"cpu": ("gloo", "mpi", "horovod"), "cuda": ("gloo", "nccl")}  # by where the tensors are
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class AllreduceTimes(NamedTuple):
    """One contender at one size: the slowest rank's seconds, over all repeats."""

    contender: str
    workers: int
    size_bytes: int
    count: int  # type: ignore[assignment]  # the column is called so everywhere, tuple.count is not missed
    dtype: str
    time_s_p50: float
    time_s_p95: float
    time_s_min: float
    time_s_max: float
    algbw_bytes_per_s: float  # size / time
    busbw_bytes_per_s: float  # algbw x 2(n - 1)/n
    bound_s: (
        float | None
    )  # what this algorithm cannot beat: the link's rate, or the measured speed of the copies it needs
    wrong: int  # elements
    runs: int
    ran: str  # ours: the algorithm, which `auto` chose in each round anew


# (contender, bytes) -> what each round measured, as the ranks write it.
Results = dict[tuple[str, int], list[dict[str, Any]]]


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
        return tuple(
            int(float(word.rstrip("KMGiB")) * _UNITS[word.rstrip("iB")[-1:].strip("0123456789.")])
            for word in text.split(",")
        )
    except (ValueError, KeyError):
        raise click.BadParameter(
            f"{text!r}: expected sizes with commas, such as 4K,1M,25M"
        ) from None


def _list(context: click.Context, parameter: click.Parameter, text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


@click.command("collectives")
@click.option(
    "--workers", default="2", show_default=True, callback=_list, help="Worker counts, such as 2,4."
)
@click.option(
    "--algorithms",
    default="auto",
    show_default=True,
    callback=_list,
    help="auto, native, all, or names (`scaletrain list`), with options if need be: pipelined_tree:segments=8.",
)
@click.option(
    "--transports", default="auto", show_default=True, callback=_list, help="auto, or names."
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
    callback=_list,
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
    header: dict[str, Any] = {
        **environment(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "repeats": options.repeats,
        "network": "one host",
        "bound": options.bind,
        "devices": [],
    }
    if options.bandwidth:
        header["network"] = (
            f"EMULATED: one host a worker in network namespaces, {options.bandwidth} links"
        )
    rows: list[AllreduceTimes] = []
    notes: list[str] = []
    devices: set[str] = set()
    for count in counts:
        results = _measure(options, count, notes)
        for of_contender in results.values():
            devices |= {result.get("device", "cpu") for result in of_contender}
        rows += _rows(results, count, options.bandwidth)
    header["devices"] = sorted(devices)
    if not rows:
        raise UserError(f"nothing could be measured: {'; '.join(dict.fromkeys(notes))}")
    text = table(rows, header, notes)
    click.echo(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        measured = [row._asdict() for row in rows]
        write_json(
            options.out.with_suffix(".json"), {"header": header, "notes": notes, "rows": measured}
        )
        pages.write(options.out.with_suffix(".md"), text)  # what people wrote on that page stays
    wrong = sorted({row.contender for row in rows if row.wrong})
    if wrong:
        raise UserError(f"wrong sums: {', '.join(wrong)} (the last column counts the elements)")


def _check(options: Options) -> list[int]:
    """Return the worker counts.

    Raises:
        UserError: an option names something that there is not.
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
    return counts


def _measure(options: Options, count: int, notes: list[str]) -> Results:
    """Run every contender in every round. A failure becomes a note."""
    task = {
        "sizes": options.sizes,
        "seconds": options.seconds,
        "bind": options.bind,
        "device": options.device,
    }
    ours = []
    for transport in options.transports:
        for algorithm in options.all_algorithms:
            ours.append(f"{transport}:{algorithm}")
    worlds = _worlds(
        ours, options.peers, options.mpi_python, options.horovod_python, options.bandwidth
    )
    results: Results = {}
    for repeat in range(options.repeats):
        for name, run in worlds:
            click.echo(
                f"{count} workers, round {repeat + 1} of {options.repeats}: {name}", err=True
            )
            try:
                measured = run(task, count)
            except (RuntimeError, UserError) as error:
                notes.append(f"{name}, {count} workers: {error}")
                continue
            for result in measured:
                key = (result["contender"], result["size_bytes"])
                results.setdefault(key, []).append(result)
    return results


def _worlds(
    ours: list[str],
    peers: Sequence[str],
    mpi: Sequence[str],
    horovod: str | None,
    bandwidth: str | None,
) -> list[tuple[str, Any]]:
    """Return what a round starts: (name, function(task, count) -> results).

    One world of torch runs our contenders and gloo (or nccl).
    """
    contenders = [*ours, *(peer for peer in peers if peer in ("gloo", "nccl"))]
    worlds: list[tuple[str, Any]] = [
        ("torch", lambda task, count: _torch({**task, "contenders": contenders}, count, bandwidth))
    ]
    if bandwidth and {"mpi", "horovod"} & set(peers):
        raise UserError(
            "--peers: mpi and horovod are measured on one host only (leave out --bandwidth)"
        )
    if "mpi" in peers:
        worlds += [
            (f"mpi {p}", lambda task, count, p=p: _mpi(p, "allreduce_mpi.py", task, count))
            for p in mpi or [sys.executable]
        ]
    if "horovod" in peers:
        python = horovod or sys.executable
        worlds.append(
            (
                f"horovod {python}",
                lambda task, count: _mpi(python, "allreduce_horovod.py", task, count),
            )
        )
    return worlds


def _torch(task: dict[str, Any], count: int, bandwidth: str | None) -> list[dict[str, Any]]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="scaletrain-bench-")))
        folder.joinpath("task.json").write_text(json.dumps(task), encoding="utf-8")
        argv = Program.BENCH_COLLECTIVES.command(folder)
        variables = [
            {"RANK": str(r), "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"} for r in range(count)
        ]
        if bandwidth:
            from scaletrain.rehearsal.cluster import Cluster

            cluster = stack.enter_context(Cluster(count, bandwidth=bandwidth))
            with open(folder / "log", "wb") as log:
                running = [
                    cluster.start(r, argv, v, stdout=log, stderr=log)
                    for r, v in enumerate(variables)
                ]
        else:
            with open(folder / "log", "wb") as log:
                running = [
                    subprocess.Popen(argv, env=os.environ | v, stdout=log, stderr=log)
                    for v in variables
                ]
        try:
            codes = [process.wait(timeout=900) for process in running]
        except subprocess.TimeoutExpired:
            raise RuntimeError("not done within 900 s") from None
        finally:
            for process in running:
                process.kill()
        if any(codes):
            raise RuntimeError(
                _last_line((folder / "log").read_text(encoding="utf-8", errors="replace"))
            )
        return _merge(
            [
                json.loads(folder.joinpath(f"{r}.json").read_text(encoding="utf-8"))
                for r in range(count)
            ]
        )


def _mpi(python: str, script: str, task: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """A peer's script under the mpirun that stands beside its Python, else the one on the path."""
    path = Path(__file__).parents[3] / "benchmarks" / "peers" / script
    if not path.exists():
        raise UserError(f"--peers: {path} is missing: peers are measured from a checkout")
    beside = Path(python).with_name("mpirun")
    with tempfile.TemporaryDirectory(prefix="scaletrain-bench-") as folder:
        Path(folder, "task.json").write_text(json.dumps(task), encoding="utf-8")
        mpirun = str(beside) if beside.exists() else "mpirun"
        try:
            version = subprocess.run(
                [mpirun, "--version"], capture_output=True, text=True, timeout=20
            ).stdout
        except OSError:
            raise UserError(f"no mpirun beside {python} nor on the path") from None
        allow = {
            f"{name}_ALLOW_RUN_AS_ROOT{end}": "1"
            for name in ("OMPI", "PRTE")
            for end in ("", "_CONFIRM")
        }
        argv = [
            mpirun,
            *(
                ["--oversubscribe"]
                if "Open MPI" in version or "Open-MPI" in version or "PRRTE" in version
                else []
            ),
        ]
        argv += ["-n", str(count), python, str(path), folder]
        done = subprocess.run(
            argv, env=os.environ | allow, capture_output=True, text=True, timeout=600
        )
        if done.returncode:
            raise RuntimeError(
                _last_line(done.stderr or done.stdout or f"exit status {done.returncode}")
            )
        return _merge(
            [
                json.loads(Path(folder, f"{r}.json").read_text(encoding="utf-8"))
                for r in range(count)
            ]
        )


def _merge(ranks: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Iteration by iteration the slowest rank's time."""
    merged = []
    for entries in zip(*ranks, strict=True):
        times = [max(t) for t in zip(*(e["times_s"] for e in entries), strict=True)]
        merged.append({**entries[0], "times_s": times, "wrong": sum(e["wrong"] for e in entries)})
    return merged


def _rows(results: Results, workers: int, bandwidth: str | None) -> list[AllreduceTimes]:
    """Return a row for each contender at each size, the smallest size first."""
    rows = []
    for contender, size in sorted(results, key=lambda key: (key[1], key[0])):
        rounds = results[contender, size]
        times: list[float] = []
        for result in rounds:
            times += result["times_s"]
        times.sort()
        median_s = times[len(times) // 2]
        bandwidth_of_message = size / median_s
        chosen = [result["ran"] for result in rounds if result.get("ran")]
        rows.append(
            AllreduceTimes(
                contender=contender,
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
                bound_s=_bound(contender, size, workers, bandwidth, rounds),
                wrong=sum(result["wrong"] for result in rounds),
                runs=len(times),
                ran=", ".join(dict.fromkeys(chosen)),
            )
        )
    return rows


def _bound(
    contender: str, size: int, workers: int, bandwidth: str | None, results: list[dict[str, Any]]
) -> float | None:
    """Return the least seconds that the bytes alone take; None if nothing tells.

    On emulated links it is the time of the bytes through the busiest port. On one
    host it is the time of the bytes that any allreduce moves between the ranks, 2(n - 1)/n of the
    message a rank, at the speed at which all ranks copy at once.
    """
    if bandwidth:
        from scaletrain.collectives.cost import Network, predict
        from scaletrain.units import bits_per_s

        text = contender.partition(":")[2]
        # What has no schedule of its own, such as gloo, is held to the least that any allreduce
        # moves through a port.
        name, options = (
            ("ring", {})
            if text in ("", "auto", "native")
            else config.plugin_spec("collective", text, "")
        )
        return predict(name, workers, size, Network(0.0, bits_per_s(bandwidth) / 8), **options)
    speeds = [result["copy_bytes_per_s"] for result in results if result.get("copy_bytes_per_s")]
    return 2 * (workers - 1) / workers * size / max(speeds) if speeds else None


def table(rows: Sequence[AllreduceTimes], header: dict[str, Any], notes: Sequence[str]) -> str:
    """Markdown."""
    versions = ", ".join(f"{k} {v}" for k, v in header["versions"].items() if v)
    many = sorted({r.workers for r in rows if r.workers > header["cores"]})
    crowded = (
        f"OVERSUBSCRIBED: {', '.join(map(str, many))} workers on {header['cores']} cores. "
        if many
        else ""
    )
    lines = [
        f"# Allreduce, {header['network']}", "",
        f"{header['processor']}, {header['cores']} cores, {header['os']}; tensors on {', '.join(header['devices'])}; "
        f"{versions}; commit {header['commit']}; {header['time']}.",
        f"Workers {'are each bound to a core, where the cores suffice' if header['bound'] else 'run where the system puts them'}. "
        f"{crowded}Times of the slowest rank, in milliseconds. ran: what `auto` chose; native is the wire's own. busbw = size / time x 2(n - 1)/n. "
        "bound: what the algorithm's bytes alone take, at the links' rate, or on one host at the speed at which all ranks copy at once.", "",
        "| workers | size | count | type | contender | ran | p50 | p95 | min | max | algbw GB/s | busbw GB/s | bound | p50 / bound | wrong |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for r in rows:
        times = " | ".join(
            f"{1e3 * t:.3f}" for t in (r.time_s_p50, r.time_s_p95, r.time_s_min, r.time_s_max)
        )
        bound = f"{1e3 * r.bound_s:.3f} | {r.time_s_p50 / r.bound_s:.2f}" if r.bound_s else "- | -"
        lines.append(
            f"| {r.workers} | {_size(r.size_bytes)} | {r.count} | {r.dtype} | {r.contender} | {r.ran or '-'} | {times} "
            f"| {r.algbw_bytes_per_s / 1e9:.3f} | {r.busbw_bytes_per_s / 1e9:.3f} | {bound} | {r.wrong} |"
        )
    return "\n".join([*lines, *(f"\nNot measured: {note}" for note in dict.fromkeys(notes))])


def _size(num_bytes: int) -> str:
    for unit, scale in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:g} {unit}"
    return f"{num_bytes} B"


def _last_line(text: str) -> str:
    """Return the last line of a failed program, an error if there is one."""
    lines = [line for line in text.splitlines() if line.strip(" -")]
    errors = [line for line in lines if "Error" in line]
    return (errors or lines or ["no output"])[-1][:300]

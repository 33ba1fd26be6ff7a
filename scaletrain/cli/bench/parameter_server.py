"""The parameter server's speed, beside bare sockets, gloo, TensorFlow's null step and FireCaffe."""

import dataclasses
import json
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from scaletrain.cli.options import numbers
from scaletrain.host import processes
from scaletrain.launching.job import Program

if TYPE_CHECKING:
    from scaletrain.parameter_server.protocol.settings import Settings
    from scaletrain.rehearsal.cluster import Cluster
    from scaletrain.run.environment import Environment

MB = 1_000_000


class NullStep(NamedTuple):
    """A step that pushes gradients and pulls weights, and computes nothing."""

    mode: str  # dense or sparse
    num_bytes: int  # of the parameters
    # Seconds with 1 and with 100 workers of TensorFlow on 16 servers of Google's cluster, read off
    # the text and figure 7 of OSDI'16, section 6.2.
    published_s: tuple[float, float] | None = None

    @property
    def is_large(self) -> bool:
        """True if few steps have to do."""
        return self.mode == "dense" and self.num_bytes > 500 * MB

    def needed_bytes(self, workers: int, servers: int) -> int:
        """Return the memory that a measurement takes.

        A dense worker's gradients lie in shared memory, and servers hold weights and sums. Python
        with torch takes 0.3 GB.
        """
        parameters = 2 * self.num_bytes
        if self.mode == "dense":
            parameters = self.num_bytes * (workers + 2)
        return parameters + 300 * MB * (workers + servers)


NULL_STEPS = {
    "scalar": NullStep("dense", 4, (0.0018, 0.0088)),
    "dense 100 MB": NullStep("dense", 100 * MB, (0.147, 0.613)),
    "dense 1 GB": NullStep("dense", 1000 * MB, (1.01, 7.16)),
    "sparse, 32 rows of 1 GB": NullStep("sparse", 1000 * MB, (0.005, 0.020)),
    "sparse, 32 rows of 10 MB": NullStep("sparse", 10 * MB),
}
TITLES = {
    "sockets": "100 MB pushed and pulled, 1 worker, 1 server",
    "null": "Null steps (no compute), all workers together, beside TensorFlow's published figures",
    "memory": "Memory of a server with 8 workers, 100 MB of parameters, SGD with momentum",
    "blocks": "Blocks of a chosen size and of fixed ones: push and pull of all parameters, 2 workers,"
    " 1 server; the link of 100 Mbit/s is EMULATED",
    "tree": "FireCaffe: server and tree on EMULATED hosts (network namespaces), 1 Gbit/s links",
}


@dataclasses.dataclass(frozen=True)
class Options:
    """The parts and sizes to measure."""

    workers: tuple[int, ...]
    servers: tuple[int, ...]
    hosts: tuple[int, ...]
    steps: int
    memory_gb: float


Row = Mapping[str, Any]
"""A row of the page as JSON: rows of other commits stay as they were written."""


@click.command()
@click.option(
    "--only",
    type=click.Choice(["sockets", "null", "memory", "blocks", "tree"]),
    multiple=True,
    help="Parts to measure [default: all].",
)
@click.option(
    "--workers",
    default="1,2,4,8",
    show_default=True,
    callback=numbers,
    help="Numbers of workers of the null steps.",
)
@click.option(
    "--servers",
    default="1,2",
    show_default=True,
    callback=numbers,
    help="Numbers of servers of the null steps.",
)
@click.option(
    "--hosts",
    default="2,4,8,16",
    show_default=True,
    callback=numbers,
    help="Numbers of emulated hosts of the comparison of server and tree.",
)
@click.option(
    "--steps",
    default=15,
    show_default=True,
    help="Measured steps of each row; the median is printed.",
)
@click.option(
    "--memory-gb",
    default=14.0,
    show_default=True,
    help="Rows that would need more memory are left out, and listed.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="Also write FILE.json and FILE.md. Rows there that are not measured now stay, so that it"
    " can be done in pieces.",
)
def command(only: tuple[str, ...], output: Path | None, **values: Any) -> None:
    """Measure the parameter server, side by side with bare sockets, gloo and trees.

    \b
    Example:
      scaletrain bench parameter-server --only null --workers 1,2 --servers 1
    """
    options = Options(**values)
    parts: dict[str, Callable[[Options], Iterator[Row]]] = {
        "sockets": _measure_sockets,
        "null": _measure_null_steps,
        "memory": _measure_memory,
        "blocks": _measure_blocks,
        "tree": _measure_trees,
    }
    page = Page(output)
    for name, measure in parts.items():
        if only and name not in only:
            continue
        # Written row by row: a row that was measured stays, even if the next one fails.
        for row in measure(options):
            page.add(name, row)
        click.echo(f"\n{TITLES[name]}\n\n{markdown_table(page.rows[name])}")


class Page:
    """The rows of all parts, and the files that hold them.

    Args:
        output: the files' path without its suffix; None: rows are only kept in memory.
    """

    def __init__(self, output: Path | None):
        from scaletrain.run.environment import environment

        before: dict[str, Any] = {}
        self._output = output
        if output and output.with_suffix(".json").exists():
            before = json.loads(output.with_suffix(".json").read_text(encoding="utf-8"))
        self._environment = environment()
        commit_before = before.get("environment", {}).get("commit")
        self.rows: dict[str, list[Row]] = {}
        for part in TITLES:
            # Rows that stay keep the commit at which they were measured.
            self.rows[part] = [{"commit": commit_before} | row for row in before.get(part, [])]

    def add(self, part: str, row: Row) -> None:
        """Put a row in the place of the one about the same, and write the files."""
        commit = {"commit": self._environment["commit"]}
        self.rows[part] = merged(self.rows[part], commit | dict(row))
        if self._output:
            self._write(self._output)

    def _write(self, output: Path) -> None:
        from scaletrain.run.atomic import write_json
        from scaletrain.scaling.show import results

        commits = set()
        for rows in self.rows.values():
            commits |= {str(row["commit"]) for row in rows}
        measured_on = self._environment | {"commit": ", ".join(sorted(commits))}
        write_json(output.with_suffix(".json"), {**self.rows, "environment": measured_on})
        results.write(output.with_suffix(".md"), markdown_page(self.rows, measured_on))


def merged(rows: Sequence[Row], new: Row) -> list[Row]:
    """Return the rows with ``new`` in the place of the one about the same.

    They are in the order in which a whole run measures them.
    """

    def subject(row: Row) -> tuple[Any, ...]:
        return tuple(row.get(key) for key in ("link", "step", "servers", "MB", "workers"))

    def order(row: Row) -> int:
        """Return the place of a part's row that has no step, servers and workers."""
        links = [*_BLOCK_LINKS]
        return links.index(row["link"]) if row.get("link") in links else -1

    def place(row: Row) -> tuple[int, int, int, int]:
        step = -1
        if row.get("step") in NULL_STEPS:
            step = list(NULL_STEPS).index(row["step"])
        return (step, row.get("servers", 0), row.get("workers", 0), order(row))

    others = [row for row in rows if subject(row) != subject(new)]
    return sorted([*others, new], key=place)


def markdown_page(rows: Mapping[str, Sequence[Row]], environment: "Environment") -> str:
    """Return the page with all parts."""
    from scaletrain.scaling.show import results

    introduction = (
        f"{results.measured_on(environment)} Everything runs on one machine,"
        f" {environment['cores']} cores for all workers and servers"
        " (oversubscribed where they are more); medians."
        " Written by `scaletrain bench parameter-server`."
    )
    text = f"# Parameter server\n\n{introduction}"
    for part, title in TITLES.items():
        if rows.get(part):
            text += f"\n\n## {title}\n\n{markdown_table(rows[part])}"
    return text


def markdown_table(rows: Sequence[Row]) -> str:
    """Return a table with a column for each key of a row."""
    columns: dict[str, None] = {}  # as a set that keeps its order
    for row in rows:
        for key in row:
            if key not in ("commit", "emulated"):
                columns[key] = None
    lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
    for row in rows:
        lines.append(" | ".join(_cell(row.get(column)) for column in columns))
    return "\n".join(f"| {line} |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if value is True:
        return "yes"
    if value is False:
        return "NO"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class _Comparison(NamedTuple):
    """The server over one link, and its rival."""

    link: str
    settings: Mapping[str, str]  # of the server
    mode: str  # of the null step
    rival: str
    rival_s: Callable[[], float]  # measures it
    target: float  # the rival's seconds over the server's, at least


def _measure_sockets(options: Options) -> Iterator[Row]:
    """Compare pairs in turn, three times. Ratios divide medians of the same security."""
    size = 100 * MB
    steps = options.steps
    # The bytes of bare sockets lie where they are sent from, and so do ours ("placed"). Both copy
    # what arrives. Into shared memory we copy ("dense"), and gloo does not.
    comparisons = (
        _Comparison(
            "tcp, curve",
            {"link": "tcp", "security": "curve"},
            "placed",
            "bare pyzmq pair",
            lambda: _bare_pair_s("curve", size, steps),
            0.75,
        ),
        _Comparison(
            "tcp, trusted_network",
            {"link": "tcp", "security": "trusted_network"},
            "placed",
            "bare pyzmq pair",
            lambda: _bare_pair_s("plain", size, steps),
            0.75,
        ),
        _Comparison(
            "one host, shared memory",
            {},
            "dense",
            "gloo send + recv",
            lambda: _gloo_pair_s(size, steps),
            2.0,
        ),
    )
    for comparison in comparisons:
        server_times = []
        rival_times = []
        for _ in range(3):
            job = _run_job(1, comparison.mode, size, steps, comparison.settings)
            server_times.append(job.step_s)
            rival_times.append(comparison.rival_s())
        server_s = sorted(server_times)[1]
        rival_s = sorted(rival_times)[1]
        yield {
            "link": comparison.link,
            "server_s": server_s,
            "server_GB_per_s": 2 * size / server_s / 1e9,
            "compared_with": comparison.rival,
            "compared_s": rival_s,
            "ratio": rival_s / server_s,
            "target": comparison.target,
            "met": rival_s / server_s >= comparison.target,
        }


def _measure_null_steps(options: Options) -> Iterator[Row]:
    for name, null_step in NULL_STEPS.items():
        for servers in options.servers:
            for workers in options.workers:
                yield _measure_null_step(name, null_step, workers, servers, options)


def _measure_null_step(
    name: str, null_step: NullStep, workers: int, servers: int, options: Options
) -> Row:
    row: dict[str, Any] = {"step": name, "servers": servers, "workers": workers}
    needed = null_step.needed_bytes(workers, servers)
    if needed > options.memory_gb * 1e9:
        return row | {"step_s": None, "note": f"needs {needed / 1e9:.0f} GB"}
    steps = 3 if null_step.is_large else options.steps
    size = null_step.num_bytes
    job = _run_job(workers, null_step.mode, size, steps, {"servers": servers})
    gigabytes_per_s = None  # a scalar and a few rows say nothing about bandwidth
    if null_step.mode == "dense" and size > MB:
        gigabytes_per_s = 2 * size * workers / job.step_s / 1e9
    published = None
    if null_step.published_s:
        one_s, hundred_s = null_step.published_s
        published = f"{one_s} to {hundred_s}"
    return row | {
        "step_s": job.step_s,
        "GB_per_s": gigabytes_per_s,
        "server_cpu_ms_per_worker": 1000 * job.server_cpu_s / workers,
        "published_1_to_100_s": published,
    }


def _measure_memory(options: Options) -> Iterator[Row]:
    """Measure a server's own memory at its peak.

    It is the resident memory, less the memory of Python and torch before any parameter, and less
    memory of workers that the server has mapped.
    """
    workers = max(options.workers)
    links: dict[str, Mapping[str, str]] = {
        "one host, shared memory": {},
        "tcp, curve": {"link": "tcp", "security": "curve"},
    }
    for link, settings in links.items():
        job = _run_job(workers, "momentum", 100 * MB, options.steps, settings)
        memory = job.memory
        own = memory.peak_bytes - memory.at_start_bytes - memory.mapped_bytes
        yield {
            "link": link,
            "workers": workers,
            "peak_MB": memory.peak_bytes / 1e6,
            "before_any_parameter_MB": memory.at_start_bytes / 1e6,
            "workers_memory_mapped_MB": memory.mapped_bytes / 1e6,
            "own_MB": own / 1e6,
            "parameters_and_state_MB": memory.owned_bytes / 1e6,
            "ratio": own / memory.owned_bytes,
            "limit": 3.0,
            "met": own <= 3 * memory.owned_bytes,
        }


class _BlockLink(NamedTuple):
    """A link on which sizes of blocks are compared."""

    settings: Mapping[str, Any]
    num_bytes: int  # of the parameters
    bandwidth: str | None = None  # of emulated hosts; None: this host


_BLOCK_LINKS = {
    "one host, shared memory": _BlockLink({}, 100 * MB),
    "tcp, trusted_network": _BlockLink({"link": "tcp", "security": "trusted_network"}, 100 * MB),
    "tcp, aes": _BlockLink({"link": "tcp"}, 100 * MB),
    "100 Mbit/s, aes": _BlockLink({"hosts": 2}, 10 * MB, "100Mbit"),
}
_BLOCK_SIZES = (0.125, 0.5, 2.0, 8.0)  # MiB
_BLOCK_WORKERS = 2


def _measure_blocks(options: Options) -> Iterator[Row]:
    """Measure each fixed size and the chosen one in turn, three times; medians."""
    from scaletrain.rehearsal.cluster import Cluster

    for name, link in _BLOCK_LINKS.items():
        if link.bandwidth is None:
            yield _block_row(name, link, options.steps, None)
            continue
        with Cluster(_BLOCK_WORKERS + 1, bandwidth=link.bandwidth) as cluster:
            yield _block_row(name, link, max(3, options.steps // 3), cluster)


def _block_row(name: str, link: _BlockLink, steps: int, cluster: "Cluster | None") -> Row:
    times: dict[float, list[float]] = {size: [] for size in (0.0, *_BLOCK_SIZES)}
    chosen = []
    for _ in range(3):
        for size, measured in times.items():
            settings = {**link.settings, "block_mb": size}
            result = _block_step(link.num_bytes, steps, settings, cluster)
            measured.append(result["step_s"])
            if size == 0:
                chosen.append(result["block_mb"])
    medians = {size: sorted(measured)[1] for size, measured in times.items()}
    best = min(_BLOCK_SIZES, key=lambda size: medians[size])
    row: dict[str, Any] = {
        "emulated": cluster is not None,
        "link": name,
        "MB": link.num_bytes / MB,
        "chosen_MiB": ", ".join(f"{size:g}" for size in sorted(set(chosen))),
        "chosen_s": medians[0.0],
    }
    for size in _BLOCK_SIZES:
        row[f"{size:g}_MiB_s"] = medians[size]
    return row | {"best_MiB": best, "over_best": medians[0.0] / medians[best]}


def _block_step(
    num_bytes: int, steps: int, values: Mapping[str, Any], cluster: "Cluster | None"
) -> dict[str, float]:
    """Return the slowest worker's step, and the size of blocks. The server's host is the last."""
    from scaletrain.parameter_server.protocol import placement
    from scaletrain.parameter_server.protocol.settings import Settings

    settings = Settings(_BLOCK_WORKERS, 120.0, **values)

    def on_host(host: int, command: Sequence[str]) -> Sequence[str]:
        return command if cluster is None else cluster.command(host, command)

    with tempfile.TemporaryDirectory(prefix="scaletrain-") as folder:
        argv = on_host(_BLOCK_WORKERS, placement.command(settings, Path(folder), 0))
        server = subprocess.Popen(argv, stderr=subprocess.DEVNULL)
        with processes.ended([server]):
            commands = []
            for rank in range(_BLOCK_WORKERS):
                command = _null_command(folder, rank, settings, "dense", num_bytes, steps)
                commands.append(on_host(rank, command))
            return max(_run(commands), key=lambda result: result["step_s"])


def _measure_trees(options: Options) -> Iterator[Row]:
    """Measure FireCaffe's server and tree on emulated hosts, beside its formulas.

    Section 5: t_server = |W| p / BW, t_tree = 2 |W| log2(p) / BW, with BW = 125 MB/s.
    """
    from scaletrain.rehearsal.cluster import Cluster

    for workers in options.hosts:
        with Cluster(workers + 1, bandwidth="1Gbit") as cluster:  # the server has its own host
            for megabytes in (5.0, 30.4, 53.5):
                yield _measure_tree(cluster, workers, megabytes)


def _measure_tree(cluster: "Cluster", workers: int, megabytes: float) -> Row:
    size = int(megabytes * MB) // 4 * 4
    server_formula_s = size * workers / 125e6
    tree_formula_s = 2 * size * (workers - 1).bit_length() / 125e6
    steps = max(3, min(15, round(4 / server_formula_s)))
    server_s = _server_on_cluster_s(cluster, workers, size, steps)
    tree_s = _tree_on_cluster_s(cluster, workers, size, steps)
    server_ratio = server_s / server_formula_s
    tree_ratio = tree_s / tree_formula_s
    return {
        "emulated": True,
        "MB": megabytes,
        "workers": workers,
        "server_s": server_s,
        "server_formula_s": server_formula_s,
        "server_ratio": server_ratio,
        "tree_s": tree_s,
        "tree_formula_s": tree_formula_s,
        "tree_ratio": tree_ratio,
        "within_15_percent": abs(server_ratio - 1) <= 0.15 and abs(tree_ratio - 1) <= 0.15,
    }


def _server_on_cluster_s(cluster: "Cluster", workers: int, size: int, steps: int) -> float:
    """Return the slowest worker's step. The server has the cluster's last host."""
    from scaletrain.parameter_server.protocol import placement
    from scaletrain.parameter_server.protocol.settings import Settings

    settings = Settings(workers, 120.0, hosts=2, security="trusted_network", block_mb=0.2)
    with tempfile.TemporaryDirectory(prefix="scaletrain-") as folder:
        argv = cluster.command(workers, placement.command(settings, Path(folder), 0))
        server = subprocess.Popen(argv, stderr=subprocess.DEVNULL)
        with processes.ended([server]):
            commands = []
            for rank in range(workers):
                command = _null_command(folder, rank, settings, "placed", size, steps)
                commands.append(cluster.command(rank, command))
            return max(result["step_s"] for result in _run(commands))


def _tree_on_cluster_s(cluster: "Cluster", workers: int, size: int, steps: int) -> float:
    """Return the slowest worker's step."""
    commands = []
    for rank in range(workers):
        command = _program("tree", rank, workers, cluster.addresses[0], 29600, size, steps)
        commands.append(cluster.command(rank, command))
    return max(result["step_s"] for result in _run(commands))


class ServerMemory(NamedTuple):
    """The memory of the largest server of a job, in bytes."""

    peak_bytes: int  # resident
    at_start_bytes: int  # resident before any parameter
    mapped_bytes: int  # of workers
    owned_bytes: int  # of parameters and optimizer state

    @classmethod
    def read(cls, path: Path) -> "ServerMemory":
        """Read the figures that one server counted."""
        counted = json.loads(path.read_text(encoding="utf-8"))
        return cls(
            counted["memory_peak_bytes"],
            counted["memory_at_start_bytes"],
            counted["mapped_bytes"],
            counted["owned_bytes"],
        )


class JobResult(NamedTuple):
    """The time of a job of null steps."""

    step_s: float  # the slowest worker's median
    server_cpu_s: float  # of all servers, a step
    memory: ServerMemory


def _run_job(
    workers: int, mode: str, size: int, steps: int, settings: Mapping[str, Any]
) -> JobResult:
    """Run servers and workers on this host.

    Args:
        workers: number of workers.
        mode: of the null step (``programs/bench_parameter_server.py``).
        size: bytes of the parameters.
        steps: how many are measured.
        settings: of the servers, where they are not the defaults.
    """
    from scaletrain.parameter_server.protocol import placement
    from scaletrain.parameter_server.protocol.settings import Settings
    from scaletrain.run.layout import RunDir

    of_servers = Settings(workers, 120.0, **settings)
    with tempfile.TemporaryDirectory(prefix="scaletrain-") as folder:
        run = RunDir(Path(folder))
        servers = []
        for index in range(of_servers.servers):
            argv = placement.command(of_servers, run.path, index)
            servers.append(subprocess.Popen(argv, stderr=subprocess.DEVNULL))
        with processes.ended(servers):
            commands = []
            for rank in range(workers):
                commands.append(_null_command(folder, rank, of_servers, mode, size, steps))
            results = _run(commands)
        # The servers write their statistics when they end.
        memories = []
        for index in range(of_servers.servers):
            memories.append(ServerMemory.read(run.server_statistics(index)))
    return JobResult(
        step_s=max(result["step_s"] for result in results),
        server_cpu_s=results[0]["server_cpu_s"],
        memory=max(memories, key=lambda memory: memory.peak_bytes),
    )


def _bare_pair_s(security: str, size: int, steps: int) -> float:
    with tempfile.TemporaryDirectory(prefix="scaletrain-") as folder:
        commands = []
        for side in ("echo", "send"):
            address = f"{folder}/address"
            commands.append(_program("bare", side, address, folder, security, size, steps))
        _, sender = _run(commands)
        return sender["step_s"]


def _gloo_pair_s(size: int, steps: int) -> float:
    with tempfile.TemporaryDirectory(prefix="scaletrain-") as folder:
        commands = []
        for rank in range(2):
            commands.append(_program("gloo", rank, f"{folder}/store", size, steps))
        first, _ = _run(commands)
        return first["step_s"]


def _null_command(
    folder: str, rank: int, settings: "Settings", mode: str, size: int, steps: int
) -> tuple[str, ...]:
    return _program("null", folder, rank, settings.to_json(), mode, size, steps)


def _program(*arguments: Any) -> tuple[str, ...]:
    return Program.BENCH_PARAMETER_SERVER.command(*arguments)


def _run(commands: Sequence[Sequence[str]], timeout_s: float = 300.0) -> list[dict[str, float]]:
    """Run programs side by side, and return the last line that each printed."""
    started = [subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) for argv in commands]
    with processes.ended(started):
        outputs = [process.communicate(timeout=timeout_s)[0] for process in started]
        for process, argv, output in zip(started, commands, outputs, strict=True):
            if process.returncode:
                raise click.ClickException(f"{' '.join(argv)[:200]} failed: {output[-300:]}")
        return [json.loads(output.strip().splitlines()[-1]) for output in outputs]

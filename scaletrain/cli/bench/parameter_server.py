"""The parameter server's speed: against bare sockets and gloo, TensorFlow's null step, FireCaffe's server and tree."""

import contextlib
import json
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

from scaletrain.launching.job import Program

MB = 1_000_000
# OSDI'16, section 6.2, 16 servers on Google's cluster: seconds with 1 and 100 workers, read off its
# text and figure 7.
PUBLISHED = {
    "scalar": (0.0018, 0.0088),
    "dense 100 MB": (0.147, 0.613),
    "dense 1 GB": (1.01, 7.16),
    "sparse, 32 rows of 1 GB": (0.005, 0.020),
}
SIZES = {
    "scalar": ("dense", 4),
    "dense 100 MB": ("dense", 100 * MB),
    "dense 1 GB": ("dense", 1000 * MB),
    "sparse, 32 rows of 1 GB": ("sparse", 1000 * MB),
    "sparse, 32 rows of 10 MB": ("sparse", 10 * MB),
}


@click.command()
@click.option(
    "--only",
    type=click.Choice(["sockets", "null", "memory", "tree"]),
    multiple=True,
    help="Parts to measure [default: all].",
)
@click.option(
    "--workers", default="1,2,4,8", show_default=True, help="Numbers of workers of the null steps."
)
@click.option(
    "--servers", default="1,2", show_default=True, help="Numbers of servers of the null steps."
)
@click.option(
    "--hosts",
    default="2,4,8,16",
    show_default=True,
    help="Numbers of emulated hosts of the server-tree comparison.",
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
    help="Also write FILE.json and FILE.md; rows there that are not measured now stay, so that it can be done in pieces.",
)
def command(
    only: tuple[str, ...],
    workers: str,
    servers: str,
    hosts: str,
    steps: int,
    memory_gb: float,
    output: Path | None,
) -> None:
    """Measure the parameter server, side by side with what it is compared with."""
    from scaletrain.run.atomic import write_json
    from scaletrain.run.environment import environment
    from scaletrain.scaling.show import results

    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    parts: dict[str, Callable[[], Iterable[dict[str, Any]]]] = {
        "sockets": lambda: _sockets(steps),
        "null": lambda: _null(numbers(workers), numbers(servers), steps, memory_gb),
        "memory": lambda: _memory(max(numbers(workers)), steps),
        "tree": lambda: _trees(numbers(hosts)),
    }
    kept: dict[str, Any] = {}
    if output and output.with_suffix(".json").exists():
        kept = json.loads(output.with_suffix(".json").read_text(encoding="utf-8"))
    here, before = environment(), kept.get("environment", {}).get("commit")
    for name in parts:  # rows that stay keep the commit at which they were measured
        kept[name] = [{"commit": before} | row for row in kept.get(name, [])]
    for name, measure in parts.items():
        if only and name not in only:
            continue
        for (
            row
        ) in measure():  # written row by row: what was measured stays, whatever happens to the next
            kept[name] = _merged(kept[name], {"commit": here["commit"]} | row)
            commits = sorted({str(row["commit"]) for part in parts for row in kept[part]})
            kept["environment"] = here | {"commit": ", ".join(commits)}
            if output:
                write_json(output.with_suffix(".json"), kept)
                results.write(output.with_suffix(".md"), _page(kept, list(parts)))
        click.echo(f"\n{_TITLES[name]}\n\n{_table(kept[name])}")


_KEYS = ("link", "step", "servers", "MB", "workers")


def _merged(rows: list[dict[str, Any]], new: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows with ``new`` in the place of the one about the same, in the order in which a whole run measures them."""

    def about(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row.get(key) for key in _KEYS)

    def place(row: dict[str, Any]) -> tuple[int, ...]:
        step = list(SIZES).index(row["step"]) if row.get("step") in SIZES else -1
        return (step, row.get("servers", 0), row.get("workers", 0))

    return sorted([row for row in rows if about(row) != about(new)] + [new], key=place)


def _page(kept: dict[str, Any], names: list[str]) -> str:
    text = ["# Parameter server", "", _describe(kept["environment"])]
    for name in names:
        if kept.get(name):
            text += ["", f"## {_TITLES[name]}", "", _table(kept[name])]
    return "\n".join(text)


_TITLES = {
    "sockets": "100 MB pushed and pulled, 1 worker, 1 server",
    "null": "Null steps (no compute), all workers together, beside TensorFlow's published figures",
    "memory": "Memory of a server with 8 workers, 100 MB of parameters, SGD with momentum",
    "tree": "FireCaffe: server and tree on EMULATED hosts (network namespaces), 1 Gbit/s links",
}


def _sockets(steps: int) -> Iterable[dict[str, Any]]:
    """Pairs are measured in turn, three times; the ratio is of the medians of the same security."""
    size = 100 * MB
    cases: dict[str, tuple[dict[str, Any], Callable[[], float], float]] = {
        "tcp, curve": (
            {"link": "tcp", "security": "curve"},
            lambda: _bare("curve", size, steps),
            0.75,
        ),
        "tcp, trusted_network": (
            {"link": "tcp", "security": "trusted_network"},
            lambda: _bare("plain", size, steps),
            0.75,
        ),
        "one host, shared memory": ({}, lambda: _gloo(size, steps), 2.0),
    }
    for name, (options, compared, target) in cases.items():
        ours, theirs = [], []
        for _ in range(3):
            # What bare sockets send lies where it is sent from; what arrives is copied by both.
            # Into shared memory we copy, gloo does not.
            mode = "dense" if "memory" in name else "placed"
            ours.append(_job(1, mode, size, steps, options)["step_s"])
            theirs.append(compared())
        mine, other = sorted(ours)[1], sorted(theirs)[1]
        yield {
            "link": name, "server_s": mine, "server_GB_per_s": 2 * size / mine / 1e9,
            "compared_with": "gloo send + recv" if "memory" in name else "bare pyzmq pair", "compared_s": other,
            "ratio": other / mine, "target": target, "met": other / mine >= target,
        }  # fmt: skip


def _null(
    counts: list[int], server_counts: list[int], steps: int, memory_gb: float
) -> Iterable[dict[str, Any]]:
    for name, (mode, size) in SIZES.items():
        for servers in server_counts:
            for workers in counts:
                # A dense worker's gradients lie in shared memory; servers hold weights and sums.
                # 0.3 GB is Python with torch.
                need = (size * (workers + 2) if mode == "dense" else 2 * size) + 300 * MB * (
                    workers + servers
                )
                row: dict[str, Any] = {"step": name, "servers": servers, "workers": workers}
                if need > memory_gb * 1e9:
                    yield row | {"step_s": None, "note": f"needs {need / 1e9:.0f} GB"}
                    continue
                many = mode == "dense" and size > 500 * MB
                found = _job(workers, mode, size, 3 if many else steps, {"servers": servers})
                published = PUBLISHED.get(name)
                yield row | {
                    "step_s": found["step_s"],
                    "GB_per_s": 2 * size * workers / found["step_s"] / 1e9 if mode == "dense" and size > MB else None,
                    "server_cpu_ms_per_worker": 1000 * found["server_cpu_s"] / workers,
                    "published_1_to_100_s": published and "{} to {}".format(*published),
                }  # fmt: skip


def _memory(workers: int, steps: int) -> Iterable[dict[str, Any]]:
    """A server's own memory at its peak: resident, less what Python and torch take before any parameter and what workers own and it has mapped."""
    for name, options in (("one host, shared memory", {}), ("tcp, curve", {"link": "tcp"})):
        found = _job(workers, "momentum", 100 * MB, steps, options)
        own = found["memory_peak_bytes"] - found["memory_at_start_bytes"] - found["mapped_bytes"]
        yield {
            "link": name, "workers": workers, "peak_MB": found["memory_peak_bytes"] / 1e6,
            "before_any_parameter_MB": found["memory_at_start_bytes"] / 1e6, "workers_memory_mapped_MB": found["mapped_bytes"] / 1e6,
            "own_MB": own / 1e6, "parameters_and_state_MB": found["owned_bytes"] / 1e6, "ratio": own / found["owned_bytes"],
            "limit": 3.0, "met": own <= 3 * found["owned_bytes"],
        }  # fmt: skip


def _trees(counts: list[int]) -> Iterable[dict[str, Any]]:
    """t_server = |W| p / BW, t_tree = 2 |W| log2(p) / BW (FireCaffe, section 5), BW = 125 MB/s."""
    from scaletrain.parameter_server.protocol import placement
    from scaletrain.parameter_server.protocol.settings import Settings
    from scaletrain.rehearsal.cluster import Cluster

    for p in counts:
        with Cluster(p + 1, bandwidth="1Gbit") as cluster:
            for megabytes in (5.0, 30.4, 53.5):
                size = int(megabytes * MB) // 4 * 4
                made = Settings(p, 120.0, hosts=2, security="trusted_network", block_mb=0.2)
                server_formula, tree_formula = (
                    size * p / 125e6,
                    2 * size * (p - 1).bit_length() / 125e6,
                )
                steps = max(3, min(15, round(4 / server_formula)))

                def on_host(
                    host: int, argv: tuple[str, ...], cluster: Any = cluster
                ) -> tuple[str, ...]:
                    return cluster.command(host, argv)

                with tempfile.TemporaryDirectory(prefix="scaletrain-") as folder:
                    server = subprocess.Popen(
                        on_host(p, placement.command(made, Path(folder), 0)),
                        stderr=subprocess.DEVNULL,
                    )
                    with _ended([server]):
                        text = made.to_json()
                        argv = [
                            on_host(r, _rank("null", folder, r, text, "placed", size, steps))
                            for r in range(p)
                        ]
                        measured = max(result["step_s"] for result in _run(argv))
                argv = [
                    on_host(r, _rank("tree", r, p, cluster.addresses[0], 29600, size, steps))
                    for r in range(p)
                ]
                tree = max(result["step_s"] for result in _run(argv))
                yield {
                    "emulated": True, "MB": megabytes, "workers": p, "server_s": measured, "server_formula_s": server_formula,
                    "server_ratio": measured / server_formula, "tree_s": tree, "tree_formula_s": tree_formula,
                    "tree_ratio": tree / tree_formula,
                    "within_15_percent": abs(measured / server_formula - 1) <= 0.15 and abs(tree / tree_formula - 1) <= 0.15,
                }  # fmt: skip


def _job(
    workers: int, mode: str, size: int, steps: int, options: dict[str, Any]
) -> dict[str, float]:
    """One job of servers and workers on this host: the slowest worker's median step, and what the servers used."""
    from scaletrain.parameter_server.protocol import placement
    from scaletrain.parameter_server.protocol.settings import Settings

    made = Settings(workers, 120.0, **options)
    with tempfile.TemporaryDirectory(prefix="scaletrain-") as folder:
        servers = [
            subprocess.Popen(placement.command(made, Path(folder), k), stderr=subprocess.DEVNULL)
            for k in range(made.servers)
        ]
        with _ended(servers):
            text = made.to_json()
            results = _run(
                [_rank("null", folder, r, text, mode, size, steps) for r in range(workers)]
            )
        found = [
            json.loads((Path(folder) / f"server-{k}.json").read_text()) for k in range(made.servers)
        ]
    largest = max(found, key=lambda server: server["memory_peak_bytes"])
    kept = ("memory_peak_bytes", "memory_at_start_bytes", "mapped_bytes", "owned_bytes")
    return {
        "step_s": max(result["step_s"] for result in results),
        "server_cpu_s": results[0]["server_cpu_s"],
    } | {key: largest[key] for key in kept}


def _bare(security: str, size: int, steps: int) -> float:
    with tempfile.TemporaryDirectory(prefix="scaletrain-") as folder:
        sides = [
            _rank("bare", side, f"{folder}/address", folder, security, size, steps)
            for side in ("echo", "send")
        ]
        return _run(sides)[1]["step_s"]


def _gloo(size: int, steps: int) -> float:
    with tempfile.TemporaryDirectory(prefix="scaletrain-") as folder:
        return _run([_rank("gloo", r, f"{folder}/store", size, steps) for r in range(2)])[0][
            "step_s"
        ]


def _rank(*arguments: Any) -> tuple[str, ...]:
    return Program.BENCH_PARAMETER_SERVER.command(*arguments)


def _run(commands: list[Any], timeout_s: float = 300.0) -> list[dict[str, float]]:
    started = [subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) for argv in commands]
    with _ended(started):
        outputs = [process.communicate(timeout=timeout_s)[0] for process in started]
        for process, output in zip(started, outputs, strict=True):
            if process.returncode:
                command = " ".join(map(str, process.args))  # type: ignore[arg-type]
                raise click.ClickException(f"{command[:200]} failed: {output[-300:]}")
        return [json.loads(output.strip().splitlines()[-1]) for output in outputs]


@contextlib.contextmanager
def _ended(processes: list[subprocess.Popen]) -> Any:
    """Whatever happens, these have ended afterwards."""
    try:
        yield
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
        for process in processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _describe(environment: dict[str, Any]) -> str:
    from scaletrain.scaling.show import results

    return (
        f"{results.measured_on(environment)} Everything runs on one machine, {environment['cores']} cores for all workers and servers"
        " (oversubscribed where they are more); medians. Written by `scaletrain bench parameter-server`."
    )


def _table(rows: list[dict[str, Any]]) -> str:
    columns = list(
        dict.fromkeys(key for row in rows for key in row if key not in ("commit", "emulated"))
    )

    def cell(value: Any) -> str:
        if value is None:
            return ""
        if isinstance(value, bool):
            return "yes" if value else "NO"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
    lines += [" | ".join(cell(row.get(column)) for column in columns) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)

"""The parameter server's speed: against bare sockets and gloo, TensorFlow's null step, FireCaffe's server and tree."""

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

MB = 1_000_000
# OSDI'16, section 6.2, 16 servers on Google's cluster: seconds with 1 and 100 workers, read off its text and figure 7.
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
    "--only", type=click.Choice(["sockets", "null", "tree"]), multiple=True, help="Parts to measure [default: all]."
)
@click.option("--workers", default="1,2,4,8", show_default=True, help="Numbers of workers of the null steps.")
@click.option(
    "--hosts", default="2,4,8,16", show_default=True, help="Numbers of emulated hosts of the server-tree comparison."
)
@click.option("--steps", default=7, show_default=True, help="Measured steps of each row; the median is printed.")
@click.option(
    "--memory-gb", default=6.0, show_default=True, help="Rows that would need more memory are left out, and listed."
)
@click.option("--output", type=click.Path(path_type=Path), help="Also write FILE.json and FILE.md.")
def command(only: tuple[str, ...], workers: str, hosts: str, steps: int, memory_gb: float, output: Path | None) -> None:
    """Measure the parameter server, side by side with what it is compared with."""
    from scaletrain.metrics import environment, write_json

    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "sockets": lambda: _sockets(steps),
        "null": lambda: _null([int(n) for n in workers.split(",")], steps, memory_gb),
        "tree": lambda: _trees([int(n) for n in hosts.split(",")]),
    }
    results: dict[str, Any] = {"environment": environment()}
    text = ["# Parameter server", "", _describe(results["environment"])]
    for name, measure in parts.items():
        if only and name not in only:
            continue
        results[name] = rows = measure()
        table = _table(rows)
        click.echo(f"\n{_TITLES[name]}\n\n{table}")
        text += ["", f"## {_TITLES[name]}", "", table]
        if output:  # after each part: what was measured stays, whatever happens to the next
            write_json(output.with_suffix(".json"), results)
            output.with_suffix(".md").write_text("\n".join(text) + "\n", encoding="utf-8")


_TITLES = {
    "sockets": "100 MB pushed and pulled, 1 worker, 1 server",
    "null": "Null steps (no compute), all workers together, beside TensorFlow's published figures",
    "tree": "FireCaffe: server and tree on EMULATED hosts (network namespaces), 1 Gbit/s links",
}


def _sockets(steps: int) -> list[dict[str, Any]]:
    """Pairs are measured in turn, three times; the ratio is of the medians of the same security."""
    size, rows = 100 * MB, []
    cases: dict[str, tuple[dict[str, Any], Callable[[], float], float]] = {
        "tcp, curve": ({"link": "tcp", "security": "curve"}, lambda: _bare("curve", size, steps), 0.75),
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
            ours.append(_job(1, "dense", size, steps, options)["step_s"])
            theirs.append(compared())
        mine, other = sorted(ours)[1], sorted(theirs)[1]
        rows.append({
            "link": name, "server_s": mine, "server_GB_per_s": 2 * size / mine / 1e9,
            "compared_with": "gloo send + recv" if "memory" in name else "bare pyzmq pair", "compared_s": other,
            "ratio": other / mine, "target": target, "met": other / mine >= target,
        })  # fmt: skip
    return rows


def _null(counts: list[int], steps: int, memory_gb: float) -> list[dict[str, Any]]:
    rows = []
    for name, (mode, size) in SIZES.items():
        for servers in (1, 2):
            for workers in counts:
                # A dense worker holds weights, gradients and what it sends; rank 0 of a table holds one part at a time.
                need = size * (4 * workers + 2) if mode == "dense" else 3 * size
                row: dict[str, Any] = {"step": name, "servers": servers, "workers": workers}
                if need > memory_gb * 1e9:
                    rows.append(row | {"step_s": None, "note": f"needs {need / 1e9:.0f} GB"})
                    continue
                found = _job(
                    workers,
                    mode,
                    size,
                    max(3, steps if size < MB * 500 or mode == "sparse" else 3),
                    {"servers": servers},
                )
                published = PUBLISHED.get(name)
                rows.append(row | {
                    "step_s": found["step_s"], "server_cpu_s_per_worker": found["cpu_s"] / workers / found["steps"],
                    "server_memory_MB": found["memory_bytes"] / 1e6, "published_1_to_100_s": published and "{} to {}".format(*published),
                })  # fmt: skip
    return rows


def _trees(counts: list[int]) -> list[dict[str, Any]]:
    """t_server = |W| p / BW, t_tree = 2 |W| log2(p) / BW (FireCaffe, section 5), BW = 125 MB/s."""
    from scaletrain.launching.rehearsal.cluster import Cluster
    from scaletrain.parameter_server import placement
    from scaletrain.parameter_server.settings import Settings

    rows = []
    for p in counts:
        with Cluster(p + 1, bandwidth="1Gbit") as cluster:
            for megabytes in (5.0, 30.4, 53.5):
                size = int(megabytes * MB) // 4 * 4
                made = Settings(p, 120.0, hosts=2, security="trusted_network", block_mb=1.0)

                def on_host(host: int, argv: tuple[str, ...], cluster: Any = cluster) -> tuple[str, ...]:
                    return cluster.command(host, argv)

                with tempfile.TemporaryDirectory(prefix="scaletrain-") as folder:
                    server = subprocess.Popen(
                        on_host(p, placement.command(made, Path(folder), 0)), stderr=subprocess.DEVNULL
                    )
                    with _ended([server]):
                        text = json.dumps(made._asdict())
                        argv = [on_host(r, _rank("null", folder, r, text, "dense", size, 3)) for r in range(p)]
                        measured = max(result["step_s"] for result in _run(argv))
                argv = [on_host(r, _rank("tree", r, p, cluster.addresses[0], 29600, size, 3)) for r in range(p)]
                tree = max(result["step_s"] for result in _run(argv))
                server_formula, tree_formula = size * p / 125e6, 2 * size * (p - 1).bit_length() / 125e6
                rows.append({
                    "MB": megabytes, "workers": p, "server_s": measured, "server_formula_s": server_formula,
                    "server_ratio": measured / server_formula, "tree_s": tree, "tree_formula_s": tree_formula,
                    "tree_ratio": tree / tree_formula,
                    "within_15_percent": abs(measured / server_formula - 1) <= 0.15 and abs(tree / tree_formula - 1) <= 0.15,
                })  # fmt: skip
    return rows


def _job(workers: int, mode: str, size: int, steps: int, options: dict[str, Any]) -> dict[str, float]:
    """One job of servers and workers on this host: the slowest worker's median step, and what the servers used."""
    from scaletrain.parameter_server import placement
    from scaletrain.parameter_server.settings import Settings

    made = Settings(workers, 120.0, **options)
    with tempfile.TemporaryDirectory(prefix="scaletrain-") as folder:
        servers = [
            subprocess.Popen(placement.command(made, Path(folder), k), stderr=subprocess.DEVNULL)
            for k in range(made.servers)
        ]
        with _ended(servers):
            text = json.dumps(made._asdict())
            results = _run([_rank("null", folder, r, text, mode, size, steps) for r in range(workers)])
        found = [json.loads((Path(folder) / f"server-{k}.json").read_text()) for k in range(made.servers)]
    return {
        "step_s": max(result["step_s"] for result in results),
        "cpu_s": sum(server["cpu_s"] for server in found),
        "memory_bytes": max(server["memory_bytes"] for server in found),
        "steps": steps + 2,
    }


def _bare(security: str, size: int, steps: int) -> float:
    with tempfile.TemporaryDirectory(prefix="scaletrain-") as folder:
        sides = [_rank("bare", side, f"{folder}/address", folder, security, size, steps) for side in ("echo", "send")]
        return _run(sides)[1]["step_s"]


def _gloo(size: int, steps: int) -> float:
    with tempfile.TemporaryDirectory(prefix="scaletrain-") as folder:
        return _run([_rank("gloo", r, f"{folder}/store", size, steps) for r in range(2)])[0]["step_s"]


def _rank(*arguments: Any) -> tuple[str, ...]:
    return (sys.executable, "-m", "scaletrain.bench.parameter_server_rank", *map(str, arguments))


def _run(commands: list[Any], timeout_s: float = 300.0) -> list[dict[str, float]]:
    started = [subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) for argv in commands]
    with _ended(started):
        outputs = [process.communicate(timeout=timeout_s)[0] for process in started]
        for process, output in zip(started, outputs, strict=True):
            if process.returncode:
                raise click.ClickException(f"{' '.join(map(str, process.args))[:200]} failed: {output[-300:]}")  # type: ignore[arg-type]
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
    versions = environment["versions"]
    return (
        f"{environment['processor']}, {environment['cores']} cores, {environment['memory_bytes'] / 2**30:.0f} GiB; Python"
        f" {environment['python']}, torch {versions['torch']}, pyzmq {versions['pyzmq']}; commit {environment['commit']}."
        " Everything runs on one machine; medians. Written by `scaletrain bench parameter-server`."
    )


def _table(rows: list[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))

    def cell(value: Any) -> str:
        if value is None:
            return ""
        if isinstance(value, bool):
            return "yes" if value else "NO"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
    lines += [" | ".join(cell(row.get(column)) for column in columns) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)

"""Push gradients and pull weights: our servers beside torch RPC, a Ray actor and TensorFlow.

    python -m benchmarks.peers.push_pull --peers-python PYTHON

All workers push a gradient of ``--mb`` to one server, which adds them, takes a step of SGD with
their mean, and sends the new weights to every worker. The subjects take turns, ``--repeats`` times,
so that a change of the machine's load meets all of them. ``PYTHON`` is an interpreter of an
environment with ``ray`` and ``tensorflow``; without them their rows are missing.

TensorFlow's ParameterServerStrategy has no such synchronous step: its workers add their gradients
to the variables one after the other, and read them. Its row says so.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from scaletrain.host import processes
from scaletrain.launching.job import Program
from scaletrain.parameter_server.protocol import placement
from scaletrain.parameter_server.protocol.settings import Settings
from scaletrain.run.environment import environment
from scaletrain.scaling.measure import intervals
from scaletrain.scaling.show import results
from scaletrain.units import plural

HERE = Path(__file__).parent
TIMEOUT_S = 240
OURS: dict[str, dict[str, Any]] = {
    "scaletrain, TCP, plain": {"link": "tcp", "security": "trusted_network"},
    "scaletrain, TCP, AES-GCM": {"link": "tcp", "security": "aes"},
    "scaletrain, TCP, CURVE": {"link": "tcp", "security": "curve"},
    "scaletrain, one host": {},
}
# Peers: the script, its argument, and the interpreter: ours, or the one with the peers.
PEERS = {
    "torch RPC, TCP, plain": ("push_pull_rpc.py", "tcp", False),
    "torch RPC, one host": ("push_pull_rpc.py", "auto", False),
    "Ray actor, one host": ("push_pull_ray.py", "", True),
    "TensorFlow PSStrategy, gRPC, plain, one by one": ("push_pull_tensorflow.py", "", True),
}
BASES = {"TCP": "torch RPC, TCP, plain", "one host": "torch RPC, one host"}

TARGETS = {"scaletrain, TCP, plain": 1.5, "scaletrain, TCP, AES-GCM": 1.0}
BUSY_LOAD = 2.5  # for each core: the benchmark's own processes make up to 2


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def last_line(process: subprocess.Popen) -> dict[str, Any]:
    output, _ = process.communicate(timeout=TIMEOUT_S)
    if process.returncode:
        raise RuntimeError(f"{process.args}: status {process.returncode}: {output[-500:]}")
    return json.loads(output.strip().splitlines()[-1])


def ours(settings: dict[str, Any], workers: int, num_bytes: int, steps: int) -> float:
    """Return the seconds of a step: the slowest worker's median."""
    made = Settings(workers, 120.0, placement="dedicated", **settings)
    with tempfile.TemporaryDirectory(prefix="scaletrain-") as folder:
        server = subprocess.Popen(
            placement.command(made, Path(folder), 0), stderr=subprocess.DEVNULL
        )
        clients = []
        for rank in range(workers):
            argv = Program.BENCH_PARAMETER_SERVER.command(
                "null", folder, rank, made.to_json(), "dense", num_bytes, steps
            )
            clients.append(subprocess.Popen(argv, stdout=subprocess.PIPE, text=True))
        with processes.ended([server, *clients]):
            return max(last_line(client)["step_s"] for client in clients)


def peer(
    script: str, argument: str, python: str, workers: int, num_bytes: int, steps: int
) -> float:
    """Return the seconds of a step of a peer, whose script starts its own processes."""
    argv = [python, str(HERE / script), str(workers), str(num_bytes), str(steps), str(free_port())]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    process = subprocess.Popen(
        [*argv, argument],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environ,
    )
    with processes.ended([process]):
        return last_line(process)["step_s"]


def subjects(peers_python: str | None) -> list[str]:
    """Return the subjects that can run here."""
    found = list(OURS)
    for name, (script, _, needs_peers) in PEERS.items():
        if not needs_peers:
            found.append(name)
        elif peers_python:
            module = "ray" if "ray" in script else "tensorflow"
            code = f"import importlib.util, sys; sys.exit(not importlib.util.find_spec({module!r}))"
            if subprocess.run([peers_python, "-c", code], check=False).returncode == 0:
                found.append(name)
    return found


def step_of(name: str, num_bytes: int, options: argparse.Namespace) -> float:
    """Return the seconds of a step of one subject."""
    if name in OURS:
        return ours(OURS[name], options.workers, num_bytes, options.steps)
    script, argument, needs_peers = PEERS[name]
    python = options.peers_python if needs_peers else sys.executable
    return peer(script, argument, python, options.workers, num_bytes, options.steps)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure all subjects in turns; return the times of each."""
    num_bytes = options.mb * 1000 * 1000
    names = subjects(options.peers_python)
    if options.only:
        names = [name for name in names if any(text in name for text in options.only.split(","))]
    times: dict[str, list[float]] = {name: [] for name in names}
    loads = []
    for _ in range(options.repeats):
        for name in names:
            loads.append(os.getloadavg()[0])
            try:
                step_s = step_of(name, num_bytes, options)
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                print(f"{name}: {error}", file=sys.stderr, flush=True)
                continue
            times[name].append(step_s)
            print(f"{name}: {1000 * step_s:.0f} ms", file=sys.stderr, flush=True)
    return {
        "mb": options.mb,
        "workers": options.workers,
        "steps": options.steps,
        "times_s": times,
        "load_average": {"median": statistics.median(loads), "largest": max(loads)},
        "environment": environment(),
    }


def page(result: dict[str, Any]) -> str:
    """Return the table of a measurement."""
    medians = {}
    for name, times in result["times_s"].items():
        if times:
            medians[name] = statistics.median(times)
    load = result["load_average"]
    repeats = max(len(times) for times in result["times_s"].values())
    lines = [
        "# Push and pull beside peers",
        "",
        f"{result['workers']} workers push {result['mb']} MB each to one server and pull the new"
        f" weights; all processes on one host. The median of {plural(repeats, 'run')} of"
        f" {result['steps']} steps, in turns with all others; ratios with their 95 % intervals.",
        "",
        f"{results.measured_on(result['environment'])} The load average was {load['median']:.1f} (at"
        f" most {load['largest']:.1f}), which counts the benchmark's own processes.",
        "",
        "| subject | ms a step | fastest to slowest | speed beside torch RPC |",
        "|---|---|---|---|",
    ]
    for name in result["times_s"]:
        if name not in medians:
            lines.append(f"| {name} | did not end in {TIMEOUT_S} s | | |")
            continue
        median = medians[name]
        times = [1000 * step_s for step_s in result["times_s"][name]]
        base = BASES["TCP" if "TCP" in name or "gRPC" in name else "one host"]
        ratio = in_words(speed(result["times_s"], name, base)) if base in medians else ""
        span = f"{min(times):.0f} to {max(times):.0f}"
        lines.append(f"| {name} | {1000 * median:.0f} | {span} | {ratio} |")
    is_busy = load["median"] > BUSY_LOAD * result["environment"]["cores"]
    lines += ["", *targets(result["times_s"], is_busy)]
    if is_busy:
        lines += [
            "",
            "**The machine did much other work at the same time.** These figures are a first"
            " indication, to be measured again on a quiet machine.",
        ]
    lines += ["", "Again: `python -m benchmarks.peers.push_pull --peers-python PYTHON`.", ""]
    return "\n".join(lines)


def speed(times: dict[str, list[float]], name: str, base: str) -> intervals.Mean:
    """Return how many times as fast a subject is as another one, by runs that took turns."""
    return intervals.ratio(times[base], times[name])


def in_words(ratio: intervals.Mean) -> str:
    width = "" if ratio.ci95 is None else f" ± {ratio.ci95:.2f}"
    return f"{ratio.value:.2f}{width}"


def targets(times: dict[str, list[float]], is_busy: bool) -> list[str]:
    """Return a line for each target, and whether it was met; a busy machine cannot tell."""
    lines = []
    base = BASES["TCP"]
    for name, factor in TARGETS.items():
        if not times.get(name) or not times.get(base):
            continue
        ratio = speed(times, name, base)
        width = ratio.ci95 if ratio.ci95 is not None else float("inf")
        outcome = "not decided by these runs"
        if is_busy:
            outcome = "not judged, since the machine was busy"
        elif ratio.value - width >= factor:
            outcome = "met"
        elif ratio.value + width < factor:
            outcome = "MISSED"
        lines.append(
            f"- {name}: at least {factor:g} times torch RPC over TCP: {outcome}"
            f" ({in_words(ratio)})."
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--mb", type=int, default=100, help="megabytes of gradients and of weights")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peers-python", help="an interpreter with ray and tensorflow")
    parser.add_argument("--only", help="subjects whose names have one of these texts, with commas")
    parser.add_argument("--output", type=Path, help="a directory for peers.md and peers.json")
    options = parser.parse_args()
    result = measure(options)
    print(page(result))
    if options.output:
        (options.output / "peers.md").write_text(page(result), encoding="utf-8")
        (options.output / "peers.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

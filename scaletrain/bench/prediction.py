"""Predictions held against measurements and published figures; writes prediction.md and prediction.json."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

HOSTS = (2, 4, 8, 16)
FITTED_TO = 4
COLLECTIVES = "ring,tree,star,halving_doubling,recursive_doubling,direct,double_tree,pipelined_tree"
LARGE = "ring,halving_doubling,direct,double_tree,recursive_doubling,pipelined_tree"  # what latency blurs with small messages
# label -> (bandwidth, bytes, repeats, collectives)
EXCHANGES = {
    "1Gbit": ("1Gbit", 12_500_000, 3, COLLECTIVES),
    "100Mbit": ("100Mbit", 2_500_000, 3, COLLECTIVES),
    "100Mbit-large": ("100Mbit", 10_000_000, 2, LARGE),
}
SERVERS = {"1Gbit": "squeezenet", "100Mbit": "lenet"}
FITTED_BATCH = 96
TRAFFIC_STEP_S = 0.5  # the emulated computation of squeezenet_alexnet.yaml


@click.command("prediction")
@click.option(
    "--data",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("runs/prediction"),
    show_default=True,
    help="Where measurements lie; what is there is not measured again.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("benchmarks/results"),
    show_default=True,
    help="Where prediction.md and prediction.json go.",
)
@click.option("--no-measure", is_flag=True, help="Measure nothing: use what --data holds.")
def command(data: Path, out: Path, no_measure: bool) -> None:
    """Fit on few hosts and predict many; fit FireCaffe's 32 GPUs and predict its 128; and so on, with every miss written as one.

    Measuring needs root (rehearsals build network namespaces) and about 20 minutes on 2 cores.
    """
    from scaletrain.metrics import environment, write_json

    suites = Path(__file__).resolve().parents[2] / "benchmarks" / "suites"
    data.mkdir(parents=True, exist_ok=True)
    if not no_measure:
        _measure(data, suites)
    header = data / "header.json"
    if not header.exists():
        write_json(header, environment() | {"load_average": os.getloadavg()[1]})
    result = _results(data) | {"header": json.loads(header.read_text(encoding="utf-8"))}
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "prediction.json", result)
    text = _markdown(result)
    (out / "prediction.md").write_text(text, encoding="utf-8")
    click.echo(text)


def _measure(data: Path, suites: Path) -> None:
    """Every measurement that is missing, one at a time; one that fails is told and left out."""
    scaletrain = [sys.executable, "-m", "scaletrain.cli"]
    rehearse = ["--launcher", "rehearsal"]
    for hosts in HOSTS:
        for label, (bandwidth, num_bytes, repeats, collectives) in EXCHANGES.items():
            path = data / f"exchanges-{label}-{hosts}.json"
            script = [str(suites / "time_exchanges.py"), str(path.resolve()), str(num_bytes), str(repeats), collectives]
            launch = ["launch", "-n", str(hosts), *rehearse, "--set", f"bandwidth={bandwidth}", "--timeout", "280"]
            _once(path, [*scaletrain, *launch, "--run-dir", str(data / f"run-{label}-{hosts}"), "--", *script])
        for bandwidth, preset in SERVERS.items():
            run = data / f"server-{bandwidth}-{hosts}"
            train = ["train", str(suites / "server.yaml"), "--workers", str(hosts), *rehearse, "--run-dir", str(run)]
            train += ["--set", f"launcher.bandwidth={bandwidth}", "--set", f"model.preset={preset}"]
            _once(run / "summary.json", [*scaletrain, *train])
    scaling = [*scaletrain, "bench", "scaling"]
    traffic = [
        str(suites / "squeezenet_alexnet.yaml"),
        "--workers",
        "1,4",
        "--exchange",
        "ring",
        "--mode",
        "weak",
        *rehearse,
    ]
    traffic += [
        "--set",
        "launcher.bandwidth=1Gbit",
        "--vary",
        "model.preset=squeezenet,alexnet",
        "--repeats",
        "1",
        "--no-split",
    ]
    _once(data / "traffic" / "report.json", [*scaling, *traffic, "--out", str(data / "traffic")])
    training = [str(suites / "digits_batches.yaml"), "--workers", "1,2", "--exchange", "native,ring,none"]
    training += ["--vary", "batch_size=96,192", "--repeats", "2", "--out", str(data / "training")]
    _once(data / "training" / "report.json", [*scaling, *training])


def _once(made: Path, command: Sequence[str]) -> None:
    if made.exists():
        return
    click.echo(f"measuring {made}", err=True)
    if subprocess.run(command, stdout=subprocess.DEVNULL).returncode != 0:
        click.echo(f"failed: {made} is left out", err=True)


def _results(data: Path) -> dict[str, Any]:
    import numpy as np

    from scaletrain.scaling import proof
    from scaletrain.scaling.measure import read_run
    from scaletrain.scaling.network import preset
    from scaletrain.scaling.publish import read_report

    result: dict[str, Any] = {"extrapolations": {}}
    for label, (bandwidth, num_bytes, _, _) in EXCHANGES.items():
        files = [data / f"exchanges-{label}-{hosts}.json" for hosts in HOSTS]
        measured = [json.loads(path.read_text(encoding="utf-8")) for path in files if path.exists()]
        if len(measured) > 2:
            title = f"collectives, {bandwidth}/s, {num_bytes / 1e6:g} MB"
            result["extrapolations"][title] = _extrapolation(proof.extrapolate(proof.timings_of(measured), FITTED_TO))
    for bandwidth in SERVERS:
        runs = {
            h: data / f"server-{bandwidth}-{h}"
            for h in HOSTS
            if (data / f"server-{bandwidth}-{h}" / "summary.json").exists()
        }
        if len(runs) > 2:
            read = {hosts: read_run(run, 2) for hosts, run in runs.items()}
            steps = {hosts: float(np.median(run.steps)) for hosts, run in read.items()}
            num_bytes = next(run.gradient_bytes for run in read.values() if run.gradient_bytes)
            title = f"parameter server, {bandwidth}/s, {num_bytes / 1e6:.1f} MB"
            result["extrapolations"][title] = _extrapolation(proof.extrapolate_server(steps, num_bytes, FITTED_TO))
    training, traffic = data / "training" / "report.json", data / "traffic" / "report.json"
    result["training"] = proof.other_batch(read_report(training), FITTED_BATCH) if training.exists() else []
    made = proof.firecaffe()
    result["firecaffe"] = {
        "bandwidth_bytes_per_s": made.bandwidth_bytes_per_s,
        "fitted": [row._asdict() | {"fitted_hours": hours} for row, hours in made.fitted],
        "speedups": made.speedups, "ratios": made.ratios,
    }  # fmt: skip
    result["backup_workers"] = proof.backup_workers()._asdict()
    result["traffic"] = proof.traffic(read_report(traffic), TRAFFIC_STEP_S, preset("1gbit")) if traffic.exists() else []
    return result


def _extrapolation(made: Any) -> dict[str, Any]:
    return {
        "latency_s": made.latency_s._asdict(), "bandwidth_bytes_per_s": made.bandwidth_bytes_per_s._asdict(),
        "points": made.points, "errors": made.errors(),
    }  # fmt: skip


def _markdown(result: Mapping[str, Any]) -> str:
    header = result["header"]
    lines = [
        "# Predictions against measurements", "",
        "Made by `scaletrain bench prediction`. " + f"{header['processor']}, {header['cores']} cores; {header['os']}; Python {header['python']};"
        f" torch {header['versions'].get('torch')}; commit {header['commit']}; load average {header.get('load_average', 0):.0f}.", "",
        "## 1. More hosts than were fitted (EMULATED)", "",
        f"Hosts are network namespaces of one machine, links are shaped. One latency and one bandwidth are fitted to 2 and {FITTED_TO} hosts, to all"
        f" collectives together; 8 and 16 hosts are predicted from the schedules. Target: mean error at most 10 % for each.", "",
    ]  # fmt: skip
    for title, made in result["extrapolations"].items():
        lines += [f"### {title}", "", f"Fitted bandwidth: {made['bandwidth_bytes_per_s']['value'] / 1e6:.1f} MB/s.", ""]
        lines += [
            "| exchange | "
            + " | ".join(f"{h} hosts: measured / predicted s" for h in HOSTS[2:])
            + " | mean error | target |"
        ]
        lines += ["|---|" + "---|" * (len(HOSTS[2:]) + 2)]
        for name, error in made["errors"].items():
            at = {p["workers"]: p for p in made["points"] if p["exchange"] == name}
            cells = [
                f"{at[h]['measured_s']:.3f} / {at[h]['predicted_s']:.3f}" if h in at else "not measured"
                for h in HOSTS[2:]
            ]
            lines.append(f"| {name} | {' | '.join(cells)} | {error:.1%} | {_verdict(error <= 0.10)} |")
        lines.append("")
    lines += [
        "## 2. Real training on this machine", "",
        f"Calibrated at a global batch of {FITTED_BATCH}; the steps of another batch are predicted. Target: within 10 %.", "",
    ]  # fmt: skip
    if result["training"]:
        lines += [
            "| exchange | workers | batch | measured ms | predicted ms | error | target |",
            "|---|---|---|---|---|---|---|",
        ]
        for p in result["training"]:
            error = p["predicted_s"] / p["measured_s"] - 1
            lines.append(
                f"| {p['exchange']} | {p['workers']} | {p['batch_size']} | {1e3 * p['measured_s']:.2f} | {1e3 * p['predicted_s']:.2f}"
                f" | {error:+.1%} | {_verdict(abs(error) <= 0.10)} |"
            )
    else:
        lines.append("Not measured.")
    made = result["firecaffe"]
    lines += [
        "", "## 3. FireCaffe's 128 GPUs from its 32", "",
        f"One bandwidth ({made['bandwidth_bytes_per_s'] / 1e9:.2f} GB/s) is fitted to the hours† of the rows with 32 GPUs. († recalled, not re-read"
        " from the paper.) Target: within 15 %.", "",
        "| model, 128 GPUs | published speed-up | predicted | error | target |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for model, (published, predicted) in made["speedups"].items():
        error = predicted / published - 1
        lines.append(f"| {model} | {published:g} | {predicted:.1f} | {error:+.1%} | {_verdict(abs(error) <= 0.15)} |")
    ratios = ", ".join(f"{ratio:.1f} at {workers}" for workers, ratio in made["ratios"].items())
    exact = [round(ratio, 1) for ratio in made["ratios"].values()] == [3.2, 9.1]
    lines += [
        "",
        f"Server's time over the tree's, from the two schedules: {ratios} (published: 3.2 at 32, 9.1 at 128): {_verdict(exact)}.",
        "",
    ]
    backup = result["backup_workers"]
    steps = {int(b): s for b, s in backup["steps"].items()}
    gains = {int(b): g for b, g in backup["per_resource"].items()}
    best, shortest = max(gains, key=lambda b: gains[b]), min(steps, key=lambda b: steps[b])
    lines += [
        "## 4. TensorFlow's backup workers", "",
        "50 workers and b spare. Fitted to the published steps at b = 0 and 4; the load of a worker on the servers comes from the same paper's"
        " null-step test.", "",
        "| b | step s | gain per resource |", "|---|---|---|",
        *(f"| {b} | {steps[b]:.3f} | {gains[b]:+.1%} |" for b in steps), "",
        f"- Best per resource: b = {best} (published 3): {_verdict(best == 3)}; gain {gains[3]:+.1%} at b = 3"
        " (published +9.5 %, target within 5 points):"
        f" {_verdict(abs(gains[3] - 0.095) <= 0.05)}. The maximum is flat: b = 3 and b = 4 differ by {100 * abs(gains[3] - gains[4]):.1f} points.",
        f"- Shortest step: b = {shortest} of those listed (published 4): {_verdict(shortest == 4)}."
        + ("" if shortest == 4 else " The model's load per worker is too small to turn the curve; what made b = 5 slower there is not in it."),
        "",
        "## 5. SqueezeNet against AlexNet (EMULATED)", "",
    ]  # fmt: skip
    if result["traffic"]:
        sizes = {p["model"]: p["gradient_bytes"] for p in result["traffic"]}
        lines += ["| model | hosts | gradients MB | efficiency measured | predicted |", "|---|---|---|---|---|"]
        lines += [
            f"| {p['model']} | {p['workers']} | {p['gradient_bytes'] / 1e6:.1f} | {p['measured']:.2f} | {p['predicted']:.2f} |"
            for p in result["traffic"]
        ]
        if {"squeezenet", "alexnet"} <= set(sizes):
            lines += [
                "",
                f"Traffic: {sizes['alexnet'] / sizes['squeezenet']:.1f} times less (published: 50 times fewer parameters).",
            ]
        lines += [
            "",
            f"Ring, weak scaling, 1 Gbit/s links, {TRAFFIC_STEP_S:g} s of emulated computation a step for both.",
        ]
    else:
        lines.append("Not measured.")
    return "\n".join(lines) + "\n"


def _verdict(met: bool) -> str:
    return "met" if met else "MISSED"

"""FireCaffe's curves on emulated hosts: server, tree and ring under the gradients of NiN and GoogLeNet, beside the formulas."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from scaletrain.scaling.show import results

EXCHANGES = ("parameter_server", "tree", "ring")
MB = {"nin": 30.4, "googlenet": 53.5}
BANDWIDTH = "1Gbit"


def _counts(context: click.Context, parameter: click.Parameter, text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(word) for word in text.split(",")} - {1}))
    except ValueError:
        raise click.BadParameter(
            f"{text!r}: expected numbers with commas, such as 2,4,8,16"
        ) from None


@click.command("firecaffe")
@click.option(
    "--hosts",
    default="2,4,8,16",
    show_default=True,
    callback=_counts,
    help="Emulated hosts, beside one.",
)
@results.options("firecaffe", "firecaffe.md, .json, .html and the drawings")
def command(hosts: tuple[int, ...], data: Path, out: Path, no_measure: bool) -> None:
    """Strong scaling of NiN's and GoogLeNet's shapes on 1 to 16 emulated hosts, and the time of their exchanges alone.

    Needs root (network namespaces); an estimated 20 minutes on 2 cores. Stopped and started again, it measures what is missing.
    """
    from scaletrain.errors import UserError
    from scaletrain.run.atomic import write_json
    from scaletrain.scaling.explain import report
    from scaletrain.scaling.show import render

    data.mkdir(parents=True, exist_ok=True)
    if not no_measure:
        _measure(data, hosts)
    swept = [path for path in (data / "one", data / "many") if (path / "sweep.json").exists()]
    if not swept:
        raise UserError(
            f"--data {data}: nothing was measured there (allowed: leave --no-measure out)"
        )
    swept_report = report.of_sweep(*swept)
    header = dataclasses.replace(swept_report.header, argv=None)
    swept_report = dataclasses.replace(swept_report, header=header)
    made = swept_report.to_json()
    exchanges = [row for count in hosts for row in _exchange_rows(data / f"exchanges-{count}.json")]
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "firecaffe.json", {**made, "exchanges": exchanges})
    (out / "firecaffe.html").write_text(render.html(swept_report), encoding="utf-8")
    for name, image in render.images(swept_report, "svg").items():
        (out / f"firecaffe_{name}.svg").write_bytes(image)
    text = _markdown(made, exchanges)
    results.write(out / "firecaffe.md", text)
    click.echo(text)


def _measure(data: Path, hosts: Sequence[int]) -> None:
    """One worker without an exchange is the baseline of all; then every exchange at every number of hosts; then exchanges alone."""
    from scaletrain.run.atomic import write_json
    from scaletrain.scaling.measure import sweep

    suites = Path(__file__).resolve().parents[3] / "benchmarks" / "suites" / "firecaffe"
    configs = [suites / f"{name}.yaml" for name in MB]
    for name, counts, exchanges in (("one", (1,), ("none",)), ("many", hosts, EXCHANGES)):
        request = sweep.Request(
            configs,
            counts,
            exchanges,
            repeats=1,
            settings=(f"launcher.bandwidth={BANDWIDTH}",),
            launcher="rehearsal",
            threads=1,
            split=False,
        )
        plan = sweep.plan(request)
        sweep.claim(data / name, plan)
        header = data / name / "header.json"
        if not header.exists():
            noted = dataclasses.replace(plan.header(), load_average=os.getloadavg()[1])
            write_json(header, noted.to_json())
        sweep.run(plan, data / name, click.echo)
    for count in hosts:
        made = data / f"exchanges-{count}.json"
        bench = ("bench", "parameter-server", "--only", "tree", "--hosts", str(count))
        results.once(made, *bench, "--output", made.with_suffix(""))


def _exchange_rows(path: Path) -> list[dict[str, Any]]:
    rows = json.loads(path.read_text(encoding="utf-8"))["tree"] if path.exists() else []
    return [row for row in rows if row["MB"] in MB.values()]


def _markdown(made: Mapping[str, Any], exchanges: Sequence[Mapping[str, Any]]) -> str:
    from scaletrain.scaling.predict.network import preset
    from scaletrain.scaling.predict.step_time import Compute, step_s

    header = made["header"]
    lines = [
        "# FireCaffe's question on emulated hosts (EMULATED)", "",
        "Made by `make firecaffe` (`scaletrain bench firecaffe`). " + results.measured_on(header), "",
        "**EMULATED**: hosts are network namespaces of one machine, links of 1 Gbit/s; accelerators wait as long as FireCaffe's GPU took for a"
        " sample (NiN 8.3 ms, GoogLeNet 22.1 ms); gradients of the true sizes really move. A Titan link is some 25 times as fast, so these"
        " curves bend at a twenty-fifth of the hosts: compare exchanges with each other, not with the paper's hours.", "",
        made["summary"], "",
        "## Strong scaling: global batch 256", "",
        "Speed-up over one host without an exchange. Predicted: the schedules on 1 Gbit/s Ethernet (`--network 1gbit`), nothing fitted; for the"
        " server its port, overlapping nothing. Steps after the third count, one run each: no interval.", "",
        "| model | exchange | hosts | step s | speed-up | efficiency | predicted speed-up | MB sent by a worker |", "|---" * 8 + "|",
    ]  # fmt: skip
    singles = {
        r["config"]: r["step_s_mean"] for r in made["rows"] if r["workers"] == 1 and r["runs"]
    }
    for row in sorted(
        made["rows"], key=lambda r: (r["config"] != "nin", r["exchange"], r["workers"])
    ):
        name = f"| {row['config']} | {row['exchange']} | {row['workers']} |"
        if not row["runs"]:
            lines.append(
                f"{name} {'failed: ' + row['failures'][0] if row['failures'] else 'not measured'} | | | | |"
            )
            continue
        if row["workers"] == 1 or row["config"] not in singles:
            lines.append(
                f"{name} {row['step_s_mean']:.2f} | {row['speedup'] or 1:.2f} | {row['efficiency'] or 1:.2f} | | |"
            )
            continue
        sample_s = singles[row["config"]] / row["batch_size"]
        strategy = "server" if row["exchange"] == "parameter_server" else row["exchange"]
        share, size = row["batch_size"] / row["workers"], MB[row["config"]] * 1e6
        guess = singles[row["config"]] / step_s(
            strategy, row["workers"], share, size, Compute(sample_s), preset("1gbit")
        )
        sent = f"{row['bytes_sent'] / 1e6:.1f}" if row["bytes_sent"] is not None else ""
        lines.append(
            f"{name} {row['step_s_mean']:.2f} | {row['speedup']:.2f} | {row['efficiency']:.2f} | {guess:.2f} | {sent} |"
        )
    lines += [
        "", "![Speed-up](firecaffe_speedup.svg)", "", "![Efficiency](firecaffe_efficiency.svg)", "",
        "## The exchange alone", "",
        "Seconds from the first gradient to the last new weight, nothing computed; formulas of FireCaffe, section 5: server |W| p / BW, tree"
        " 2 |W| log2(p) / BW, with the link's 125 MB/s (a TCP payload gets 119.5 of them). The server has a host of its own.", "",
    ]  # fmt: skip
    if exchanges:
        lines += [
            "| MB | hosts | server s | formula | ratio | tree s | formula | ratio | server / tree | p / (2 log2 p) |",
            "|---" * 10 + "|",
        ]
        for row in exchanges:
            p = row["workers"]
            server, tree = row["server_formula_s"], row["tree_formula_s"]
            lines.append(
                f"| {row['MB']} | {p} | {row['server_s']:.2f} | {server:.2f} | {row['server_s'] / server:.2f} | {row['tree_s']:.2f}"
                f" | {tree:.2f} | {row['tree_s'] / tree:.2f} | {row['server_s'] / row['tree_s']:.2f} | {server / tree:.2f} |"
            )
    else:
        lines.append("Not measured.")
    return "\n".join(lines) + "\n"

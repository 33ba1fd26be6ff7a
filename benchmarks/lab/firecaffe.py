"""FireCaffe's curves on emulated hosts: server, tree and ring, beside the formulas.

The gradients are those of NiN and GoogLeNet.
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import click

from benchmarks.lab.pages import markdown
from scaletrain.errors import UserError
from scaletrain.run.atomic import write_json
from scaletrain.run.environment import Environment
from scaletrain.scaling.explain import report as reports
from scaletrain.scaling.measure import sweep
from scaletrain.scaling.model import Report, Row
from scaletrain.scaling.predict.network import fabric_named
from scaletrain.scaling.predict.step_time import ComputeCost, StepModel
from scaletrain.scaling.show import render, results

EXCHANGES = ("parameter_server", "tree", "ring")
MB = {"nin": 30.4, "googlenet": 53.5}
BANDWIDTH = "1Gbit"
SUITES = Path(__file__).resolve().parents[1] / "suites" / "firecaffe"


def _counts(context: click.Context, parameter: click.Parameter, text: str) -> tuple[int, ...]:
    try:
        counts = {int(word) for word in text.split(",")}
    except ValueError:
        raise click.BadParameter(
            f"{text!r}: expected numbers with commas, such as 2,4,8,16"
        ) from None
    return tuple(sorted(counts - {1}))


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
    """Measure NiN's and GoogLeNet's shapes on 1 to 16 emulated hosts, and their exchanges alone.

    Strong scaling. Needs root (network namespaces); an estimated 20 minutes on 2 cores. Stopped and
    started again, it measures what is missing.

    \b
    Example:
      python -m benchmarks.lab firecaffe --hosts 2,4
    """
    data.mkdir(parents=True, exist_ok=True)
    if not no_measure:
        _measure(data, hosts)
    swept = [path for path in (data / "one", data / "many") if (path / "sweep.json").exists()]
    if not swept:
        raise UserError(
            f"--data {data}: nothing was measured there (allowed: leave --no-measure out)"
        )
    report = reports.of_sweep(*swept)
    # The command is this one, whatever a sweep's header says.
    report = dataclasses.replace(report, header=dataclasses.replace(report.header, argv=None))
    exchanges = []
    for count in hosts:
        exchanges += _exchange_rows(data / f"exchanges-{count}.json")
    out.mkdir(parents=True, exist_ok=True)
    write_json(
        out / "firecaffe.json",
        report.to_json() | {"exchanges": [row.to_json() for row in exchanges]},
    )
    (out / "firecaffe.html").write_text(render.html(report), encoding="utf-8")
    for name, image in render.images(report, "svg").items():
        (out / f"firecaffe_{name}.svg").write_bytes(image)
    text = page(report, exchanges)
    results.write(out / "firecaffe.md", text)
    click.echo(text)


def _measure(data: Path, hosts: Sequence[int]) -> None:
    """Measure one worker without an exchange, then every exchange, then exchanges alone."""
    configs = [SUITES / f"{name}.yaml" for name in MB]
    _sweep(data / "one", configs, (1,), ("none",))  # the baseline of all
    _sweep(data / "many", configs, hosts, EXCHANGES)
    for count in hosts:
        measured = data / f"exchanges-{count}.json"
        bench = ("bench", "parameter-server", "--only", "tree", "--hosts", str(count))
        results.once(measured, *bench, "--output", measured.with_suffix(""))


def _sweep(
    out: Path, configs: Sequence[Path], hosts: Sequence[int], exchanges: Sequence[str]
) -> None:
    request = sweep.Request(
        configs,
        hosts,
        exchanges,
        repeats=1,
        settings=(f"launcher.bandwidth={BANDWIDTH}",),
        launcher="rehearsal",
        threads=1,
        split=False,
    )
    plan = sweep.plan(request)
    sweep.claim(out, plan)
    if sweep.read_header(out) is None:
        header = dataclasses.replace(plan.header(), load_average=os.getloadavg()[1])
        sweep.write_header(out, header)
    sweep.run(plan, out, click.echo)


@dataclasses.dataclass(frozen=True)
class ExchangeRow:
    """One exchange alone on emulated hosts: a row of ``bench parameter-server --only tree``."""

    megabytes: float
    workers: int
    server_s: float
    server_formula_s: float
    tree_s: float
    tree_formula_s: float
    row: dict[str, Any]  # as it was written

    def to_json(self) -> dict[str, Any]:
        """Return the row as it was written."""
        return self.row


def _exchange_rows(path: Path) -> list[ExchangeRow]:
    """Return the rows of the two models; none if nothing was measured."""
    if not path.exists():
        return []
    rows = []
    for row in json.loads(path.read_text(encoding="utf-8"))["tree"]:
        if row["MB"] in MB.values():
            figures = ("workers", "server_s", "server_formula_s", "tree_s", "tree_formula_s")
            chosen = {key: row[key] for key in figures}
            rows.append(ExchangeRow(megabytes=row["MB"], row=row, **chosen))
    return rows


@dataclasses.dataclass(frozen=True)
class Curve:
    """A row of the page's first table."""

    row: Row
    predicted_speedup: float | None  # None: a row of one worker, or one without a baseline


def page(report: Report, exchanges: Sequence[ExchangeRow]) -> str:
    """Return the page in Markdown."""
    singles = {}  # config -> seconds of one worker's step
    for row in report.rows:
        if row.workers == 1 and row.runs and row.step_s_mean is not None:
            singles[row.config] = row.step_s_mean
    rows = sorted(report.rows, key=lambda row: (row.config != "nin", row.exchange, row.workers))
    curves = [Curve(row, _predicted_speedup(row, singles.get(row.config))) for row in rows]
    return markdown(
        "firecaffe.md",
        measured_on=results.measured_on(cast(Environment, report.header.to_json())),
        summary=report.summary,
        curves=curves,
        exchanges=exchanges,
    )


def _predicted_speedup(row: Row, single_s: float | None) -> float | None:
    """Return the predicted speed-up over one worker, whose step takes ``single_s``."""
    if row.workers == 1 or single_s is None:
        return None
    strategy = "server" if row.exchange == "parameter_server" else row.exchange
    compute = ComputeCost(single_s / row.batch_size)
    model = StepModel(MB[row.config] * 1e6, compute, fabric_named("1gbit"))
    return single_s / model.step_s(strategy, row.workers, row.batch_size / row.workers)

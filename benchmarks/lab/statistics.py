"""Whether the statistics of reports hold, from made-up runs whose truth is known.

``benchmarks/results/statistics.md``.
"""

import dataclasses
import math
import random
from collections.abc import Callable
from pathlib import Path

import click

from benchmarks.lab import pages
from scaletrain.collectives.cost import Network
from scaletrain.run.environment import environment
from scaletrain.scaling.explain.compare import SMALL, CellChange
from scaletrain.scaling.measure import intervals
from scaletrain.scaling.measure.intervals import SESSION, Change, Mean
from scaletrain.scaling.model import Repeat, Report, ReportHeader, Row
from scaletrain.scaling.predict import calibration, fit
from scaletrain.scaling.predict.network import Fabric
from scaletrain.scaling.predict.step_time import ComputeCost, StepModel

REPEATS = (3, 5, 10)
SPEED = 100.0  # samples/s of an undisturbed repeat
SCATTER = 0.01  # standard deviation of a repeat
SLOW = 0.1  # share of the repeats that run at 50 to 90 % of the speed
EXCHANGES = ("ring", "tree")
SHARE = 64  # samples of a worker


@dataclasses.dataclass(frozen=True)
class Coverage:
    """How often intervals hold the speed of an undisturbed repeat."""

    repeats: int
    slow: float  # share of the repeats that are disturbed
    typical: float  # of the intervals of ``intervals.typical``
    typical_width: float  # the mean half width, as a fraction of the speed
    plain: float  # of the intervals of the plain mean
    plain_width: float


@dataclasses.dataclass(frozen=True)
class Verdicts:
    """How often comparisons say what, for a true change."""

    way: str  # baseline or against
    repeats: int
    change: float  # the true one, as a fraction
    regression: float  # share of the comparisons
    faster: float
    unchanged: float  # "no real change"
    promised: float | None  # the share of regressions that ``chance_to_see`` promises


@dataclasses.dataclass(frozen=True)
class Fits:
    """What calibrations of 2 and 4 hosts claim to know, and how well they predict."""

    workers: int
    predictions: int
    given: float  # share that is not refused
    held: float  # of these, the share of later steps that lie in their 95 % interval
    worst_given: float  # the largest error, as a fraction
    worst_refused: float


@click.command("statistics")
@click.option("--draws", default=4000, show_default=True, help="Made-up samples of each case.")
@click.option("--jobs", default=200, show_default=True, help="Made-up calibrations.")
@pages.out_option("statistics")
def command(draws: int, jobs: int, out: Path) -> None:
    """Simulate coverage, false alarms, power and calibrations. Nothing is trained."""
    made = coverages(draws)
    verdicts = comparisons(draws)
    fits, figures = calibrations(jobs)
    facts = {
        "coverage": [dataclasses.asdict(each) for each in made],
        "comparisons": [dataclasses.asdict(each) for each in verdicts],
        "fits": [dataclasses.asdict(each) for each in fits],
        "figures": figures,
        "environment": environment(),
    }
    pages.publish(
        out,
        "statistics",
        facts,
        coverages=made,
        verdicts=verdicts,
        fits=fits,
        figures=figures,
        draws=draws,
        jobs=jobs,
        session=SESSION,
        scatter=SCATTER,
        small=SMALL,
        model_error=calibration.MODEL_ERROR,
        decides=calibration.DECIDES,
    )
    click.echo(f"written: {out / 'statistics.md'}")


def coverages(draws: int) -> list[Coverage]:
    """Return how often intervals hold, without and with disturbed repeats."""
    rows = []
    for slow in (0.0, SLOW):
        for repeats in REPEATS:
            draw = random.Random(repeats)
            samples = [_rates(draw, repeats, slow) for _ in range(draws)]
            typical = _held([intervals.typical(rates) for rates in samples])
            plain = _held([intervals.mean(rates) for rates in samples])
            rows.append(Coverage(repeats, slow, *typical, *plain))
    return rows


def _rates(draw: random.Random, repeats: int, slow: float) -> list[float]:
    rates = []
    for _ in range(repeats):
        rate = draw.gauss(SPEED, SCATTER * SPEED)
        if draw.random() < slow:
            rate *= draw.uniform(0.5, 0.9)
        rates.append(rate)
    return rates


def _held(means: list[Mean]) -> tuple[float, float]:
    """Return the share of the intervals that hold the truth, and their mean half width."""
    held = sum(mean.low <= SPEED <= mean.high for mean in means)
    width = sum(mean.ci95 or 0.0 for mean in means)
    return held / len(means), width / len(means) / SPEED


def comparisons(draws: int) -> list[Verdicts]:
    """Return what comparisons of sessions, and of runs in turns, say about true changes."""
    ways: dict[str, Callable[[random.Random, int, float], Change | None]] = {
        "--baseline": _of_sessions,
        "--against": _in_turns,
    }
    rows = []
    for way, compare in ways.items():
        session = SESSION if way == "--baseline" else None
        for amount in (0.0, -0.02, -0.05):
            for repeats in REPEATS:
                draw = random.Random(repeats)
                cells = [CellChange("", compare(draw, repeats, amount)) for _ in range(draws)]
                promised = None
                if amount:
                    promised = intervals.chance_to_see(-amount, SCATTER, repeats, session=session)
                rows.append(
                    Verdicts(
                        way,
                        repeats,
                        amount,
                        regression=sum(cell.regressed for cell in cells) / draws,
                        faster=sum(cell.improved for cell in cells) / draws,
                        unchanged=sum(cell.verdict == "no real change" for cell in cells) / draws,
                        promised=promised,
                    )
                )
    return rows


def _of_sessions(draw: random.Random, repeats: int, amount: float) -> Change | None:
    sides = []
    for change in (amount, 0.0):
        speed = (1 + change) * draw.gauss(SPEED, SESSION * SPEED)
        sides.append([draw.gauss(speed, SCATTER * speed) for _ in range(repeats)])
    new, old = sides
    return intervals.change(intervals.typical(new), intervals.typical(old), session=SESSION)


def _in_turns(draw: random.Random, repeats: int, amount: float) -> Change | None:
    new, old = [], []
    for _ in range(repeats):
        # What the machine does at the time slows down both: three times as much as the scatter.
        pace = draw.gauss(1, 3 * SCATTER)
        new.append(pace * (1 + amount) * draw.gauss(SPEED, SCATTER * SPEED))
        old.append(pace * draw.gauss(SPEED, SCATTER * SPEED))
    return intervals.paired_change(new, old)


@dataclasses.dataclass(frozen=True)
class _Job:
    """A made-up job in weak scaling on a made-up network."""

    model: StepModel
    shared_error: float  # as a logarithm: by what all steps of several hosts miss the model
    error: float  # the standard deviation, by which each misses it beside that

    @classmethod
    def drawn(cls, draw: random.Random) -> "_Job":
        network = Network(10 ** draw.uniform(-5, -2.7), 10 ** draw.uniform(7, 9.3))
        pass_s = 10 ** draw.uniform(-2.3, -0.7)
        compute = ComputeCost(pass_s / SHARE, 0.0, pass_s / 20)
        num_bytes = 10 ** draw.uniform(5, 7.7)
        overlap = draw.random() < 0.5
        model = StepModel(num_bytes, compute, Fabric(network, ""), overlap)
        return cls(model, draw.gauss(0, 0.03), draw.choice((0.01, 0.03, 0.06)))

    def measured_s(self, draw: random.Random, exchange: str, workers: int) -> float:
        """Return a step as if it were measured."""
        error = self.shared_error + draw.gauss(0, self.error)
        return self.model.step_s(exchange, workers, SHARE) * math.exp(error)

    def report(self, draw: random.Random) -> Report:
        """Return a report of one worker, and of 2 and 4 with each exchange."""
        compute = self.model.compute
        pass_s = compute.pass_s(SHARE)
        alone = Row(
            "job",
            "none",
            1,
            SHARE,
            {},
            input_s=0.0,
            forward_s=pass_s / 3,
            backward_s=pass_s * 2 / 3,
            update_s=compute.update_s,
            step_s_mean=pass_s + compute.update_s,
            runs=(Repeat(1.0, 1.0),),
        )
        rows = [alone]
        for exchange in EXCHANGES:
            for workers in (2, 4):
                step_s = self.measured_s(draw, exchange, workers)
                row = dataclasses.replace(
                    alone,
                    exchange=exchange,
                    workers=workers,
                    batch_size=SHARE * workers,
                    step_s_mean=step_s,
                )
                rows.append(row)
        return Report(1, ReportHeader(mode="weak"), "", tuple(rows))


@dataclasses.dataclass(frozen=True)
class _Outcome:
    """One prediction of a made-up calibration, beside the step that was measured later."""

    workers: int
    is_refused: bool
    is_held: bool
    error: float


def calibrations(jobs: int) -> tuple[list[Fits], dict[str, dict[str, int]]]:
    """Return how calibrations predict, and how often their intervals of figures are right."""
    figures = {name: {"known": 0, "right": 0} for name in ("latency", "bandwidth")}
    outcomes: list[_Outcome] = []
    for seed in range(jobs):
        draw = random.Random(seed)
        job = _Job.drawn(draw)
        model = job.model
        fitted = fit.fit_report(job.report(draw), model.num_bytes, overlap=model.overlap)
        truth = model.fabric.network
        estimates = {
            "latency": (fitted.latency_s, truth.latency_s),
            "bandwidth": (fitted.bandwidth_bytes_per_s, truth.bandwidth_bytes_per_s),
        }
        for name, (estimate, value) in estimates.items():
            if estimate.is_identified and estimate.low and estimate.high:
                figures[name]["known"] += 1
                figures[name]["right"] += estimate.low <= value <= estimate.high
        for exchange in EXCHANGES:
            for workers in (8, 32):
                later_s = job.measured_s(draw, exchange, workers)
                outcomes.append(_outcome(fitted, job, exchange, workers, later_s))
    return [_together(outcomes, workers) for workers in (8, 32)], figures


def _outcome(
    fitted: calibration.Fit, job: _Job, exchange: str, workers: int, later_s: float
) -> _Outcome:
    def step_s(fabric: Fabric) -> float:
        model = StepModel(job.model.num_bytes, fitted.compute, fabric, fitted.overlap)
        return model.step_s(exchange, workers, SHARE)

    least_s, most_s = fitted.step_range(step_s)
    low_s, high_s = fitted.interval(step_s)
    return _Outcome(
        workers,
        is_refused=most_s > calibration.DECIDES * least_s,
        is_held=low_s <= later_s <= high_s,
        error=abs(step_s(fitted.fabric) / later_s - 1),
    )


def _together(outcomes: list[_Outcome], workers: int) -> Fits:
    of_workers = [outcome for outcome in outcomes if outcome.workers == workers]
    given = [outcome for outcome in of_workers if not outcome.is_refused]
    refused = [outcome for outcome in of_workers if outcome.is_refused]
    return Fits(
        workers,
        predictions=len(of_workers),
        given=len(given) / len(of_workers),
        held=sum(outcome.is_held for outcome in given) / max(1, len(given)),
        worst_given=max((outcome.error for outcome in given), default=0.0),
        worst_refused=max((outcome.error for outcome in refused), default=0.0),
    )

"""The lost time of each cell, split by cause, and the better exchange where there is one."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from scaletrain import plugins
from scaletrain.scaling.explain import limiter
from scaletrain.scaling.explain.limiter import Cause, Evidence, MeanStep, Steps
from scaletrain.scaling.explain.measurements import Measurements, mean_part_s, rates, typical_runs
from scaletrain.scaling.measure.intervals import typical
from scaletrain.scaling.model import Cell, Loss, Row, Run
from scaletrain.scaling.predict.calibration import Fit
from scaletrain.scaling.predict.fit import strategy_of
from scaletrain.scaling.predict.network import Fabric
from scaletrain.scaling.predict.step_time import StepModel

# Exchanges whose steps do not wait for the slowest worker.
UNSYNCHRONISED = (
    "parameter_server:async",
    "parameter_server:bounded",
    "parameter_server:local_sgd",
    "none",
)

WORTH = 1.02  # times as fast: a predicted exchange that gains less is not named


@dataclasses.dataclass(frozen=True)
class _Runs:
    """The four sets of runs that a split compares (see ``limiter.split``)."""

    real: list[Run]
    alone: list[Run]
    small: list[Run]
    single: list[Run]

    @property
    def repeats(self) -> int:
        """Of the least measured of the four."""
        return min(len(self.real), len(self.alone), len(self.small), len(self.single))


def loss_of(cell: Cell, row: Row, measurements: Measurements) -> Loss | None:
    """Return the split of a cell's lost time.

    None for one worker, and where a reference that the split needs was not measured.
    """
    runs = _Runs(
        real=measurements.runs(cell),
        alone=measurements.without_exchange(cell),
        small=measurements.single_worker_on_share(cell),
        single=measurements.single_worker(cell),
    )
    if cell.workers < 2 or runs.repeats == 0 or row.efficiency is None:
        return None

    strong = measurements.strong
    real_s, ideal_s = _step_and_ideal_s(cell, runs, strong=strong)
    steps = Steps(
        real=mean_step(runs.real),
        alone=mean_step(runs.alone),
        small=mean_step(runs.small),
        single=mean_step(runs.single),
        workers=cell.workers,
        strong=strong,
        waits=not cell.exchange.startswith(UNSYNCHRONISED),
    )
    causes = limiter.split(steps, loss_s=real_s - ideal_s)
    evidence = Evidence(
        causes=causes,
        efficiency=row.efficiency,
        ci95=row.efficiency_ci95,
        lead_ci95=_lead_ci95(causes, steps, runs),
        repeats=runs.repeats,
        workers=cell.workers,
        culprit=row.culprit,
    )
    largest = limiter.limiter(causes)
    is_identified = limiter.unidentified(evidence) is None
    return Loss(
        config=cell.config,
        exchange=cell.exchange,
        workers=cell.workers,
        variant=dict(cell.variant),
        repeats=runs.repeats,
        step_s=real_s,
        ideal_s=ideal_s,
        loss_s=real_s - ideal_s,
        efficiency=evidence.efficiency,
        efficiency_ci95=evidence.ci95,
        causes=dict(causes),
        lead_ci95=evidence.lead_ci95,
        limiter=largest.name if largest and is_identified else None,
        finding=limiter.finding(evidence),
        advice=limiter.advice(evidence),
    )


def _step_and_ideal_s(cell: Cell, runs: _Runs, *, strong: bool) -> tuple[float, float]:
    """Return the seconds of a step and of an ideal one, by throughput.

    Throughput is samples over time, each rank by its own clock. The causes come from the parts of
    steps instead; ``limiter.split`` calls the difference unexplained.
    """
    # In weak scaling, a cell's batch size is that of one worker.
    batch = cell.batch_size if strong else cell.batch_size * cell.workers
    real_s = float(np.mean(batch / np.array(rates(typical_runs(runs.real)))))
    single_s = float(np.mean(cell.batch_size / np.array(rates(typical_runs(runs.single)))))
    ideal_s = single_s / cell.workers if strong else single_s
    return real_s, ideal_s


def _lead_ci95(causes: Sequence[Cause], steps: Steps, runs: _Runs) -> float | None:
    """Return the interval of the seconds by which the largest cause leads the second.

    Repeats at the same position ran close together, so the lead is taken repeat by repeat.
    """
    # The order over all repeats: a single repeat may put another cause first.
    largest, second, *_ = sorted(causes, key=lambda cause: -cause.seconds)
    leads = []
    # Not strict: a reference may have fewer repeats. Those without a partner are left out.
    repeats = zip(runs.real, runs.alone, runs.small, runs.single, strict=False)
    for real, alone, small, single in repeats:
        repeat_causes = limiter.split(
            dataclasses.replace(
                steps,
                real=mean_step([real]),
                alone=mean_step([alone]),
                small=mean_step([small]),
                single=mean_step([single]),
            )
        )
        seconds = dict(repeat_causes)
        leads.append(seconds[largest.name] - seconds[second.name])
    return typical(leads).ci95


def mean_step(runs: Sequence[Run]) -> MeanStep:
    """Return the mean step of the typical ones of some runs, and its parts."""
    runs = typical_runs(runs)
    waits = [run.waited_s for run in runs if run.waited_s is not None]
    compute_s = [run.part_s("forward_s") + run.part_s("backward_s") for run in runs]
    # A mean wait over only some of the runs would not fit the other figures.
    return MeanStep(
        step_s=float(np.mean([run.step_s for run in runs])),
        slowest_s=float(np.mean([run.slowest_s for run in runs])),
        input_s=mean_part_s(runs, "input_s"),
        compute_s=float(np.mean(compute_s)),
        update_s=mean_part_s(runs, "update_s"),
        waited_s=float(np.mean(waits)) if len(waits) == len(runs) else None,
    )


def with_alternatives(
    losses: Sequence[Loss], rows: Sequence[Row], fitted: Fit | None
) -> tuple[Loss, ...]:
    """Return the losses, naming the better exchange where communication limits.

    That is an exchange that was measured, else the collective that the calibrated model expects to
    be best.
    """
    return tuple(_with_alternative(loss, rows, fitted) for loss in losses)


def _with_alternative(loss: Loss, rows: Sequence[Row], fitted: Fit | None) -> Loss:
    if loss.limiter != "communication":
        return loss
    comparable = [row for row in rows if _is_beside(row, loss)]
    row = next((row for row in comparable if row.exchange == loss.exchange), None)
    if row is None:
        return loss
    # ``none`` does not train one model, and so is no alternative.
    others = [other for other in comparable if other.exchange not in (loss.exchange, "none")]
    best = max(others, key=lambda other: other.efficiency or 0.0, default=None)
    alternative = None
    # Noise is no advice: the two speeds must differ by more than their intervals.
    if best is not None and _is_clearly_faster(best, row):
        alternative = (
            f"{limiter.capitalized(best.exchange)} instead of {loss.exchange} raised efficiency"
            f" from {row.efficiency:.2f} to {best.efficiency:.2f}."
        )
    elif fitted is not None and (fitted.plausible or not fitted.unidentified):
        alternative = _predicted_alternative(row, fitted)
    if alternative is None:
        return loss
    causes = [Cause(name, seconds) for name, seconds in loss.causes.items()]
    # The limiter is known, and its intervals need no second look.
    evidence = Evidence(
        causes,
        loss.efficiency,
        repeats=loss.repeats,
        workers=loss.workers,
        culprit=row.culprit,
    )
    return dataclasses.replace(loss, advice=limiter.advice(evidence, alternative))


def _is_beside(row: Row, loss: Loss) -> bool:
    """Whether a row was measured and differs from the loss in its exchange at most."""
    same_job = (row.config, row.workers, row.variant) == (loss.config, loss.workers, loss.variant)
    return same_job and bool(row.efficiency)


def _is_clearly_faster(fast: Row, slow: Row) -> bool:
    """Whether a row is faster beyond both intervals. One repeat has none, and proves nothing."""
    if fast.samples_per_s is None or slow.samples_per_s is None:
        return False
    if fast.samples_per_s_ci95 is None or slow.samples_per_s_ci95 is None:
        return False
    lead = fast.samples_per_s - slow.samples_per_s
    return lead > fast.samples_per_s_ci95 + slow.samples_per_s_ci95


def _predicted_alternative(row: Row, fitted: Fit) -> str | None:
    """Return the collective that the model expects to beat a row's exchange; None if none does."""
    strategy = strategy_of(row.exchange)
    gradient_bytes = row.gradient_bytes
    if strategy is None or gradient_bytes is None or row.efficiency is None:
        return None
    # A row has the batch of all workers; the model takes the samples of one.
    share = row.batch_size / row.workers

    def predicted_s(name: str, fabric: Fabric) -> float:
        model = StepModel(gradient_bytes, fitted.compute, fabric, fitted.overlap)
        return model.step_s(name, row.workers, share)

    collectives = list(plugins.names("collective"))
    if fitted.workers_per_host == 1:
        collectives.remove("two_level")  # every host has one worker, or all share one
    best = min(collectives, key=lambda name: predicted_s(name, fitted.fabric))
    if best == strategy:
        return None
    # Every network that explains the measurements has to agree, so the least gain counts. Only the
    # ratio is the model's: an error that both predictions share cancels.
    networks = [fitted.fabric, *[fitted.fabric_on(network) for network in fitted.plausible]]
    gain = min(predicted_s(strategy, on) / predicted_s(best, on) for on in networks)
    if gain < WORTH:
        return None
    efficiency = row.efficiency * gain
    return (
        f"{limiter.capitalized(best)} instead of {row.exchange} should raise efficiency"
        f" from {row.efficiency:.2f} to {efficiency:.2f} or more (predicted)."
    )

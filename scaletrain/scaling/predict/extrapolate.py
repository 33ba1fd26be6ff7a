"""Predict steps of workers that nobody measured, as far as a report's own fit allows it."""

from typing import NamedTuple

from scaletrain.errors import UserError
from scaletrain.scaling.model import Report
from scaletrain.scaling.predict import fit as fits
from scaletrain.scaling.predict.calibration import DECIDES, FAR, Fit
from scaletrain.scaling.predict.network import Fabric

TOO_WIDE = 2.0  # times from end to end of an interval; a plan cannot rest on a wider one


class Forecast(NamedTuple):
    """A predicted step with its 95 % interval, in seconds."""

    step_s: float
    low_s: float
    high_s: float


class Extrapolation:
    """The steps of one exchange at any number of workers.

    Args:
        report: measured rows of one job, and references.
        exchange: its label, as in the rows.

    Raises:
        UserError: the report allows no prediction; the text says why.
    """

    def __init__(self, report: Report, exchange: str):
        rows = [row for row in report.rows if row.runs]
        strategy = fits.strategy_of(exchange)
        if strategy is None:
            raise UserError(f"no model predicts the exchange {exchange}")
        if not fits.alike_but_for_exchange(rows):
            raise UserError("the rows are of several jobs, which one calibration cannot explain")
        if rows[0].gradient_bytes is None:
            raise UserError("no checkpoint says how many bytes the gradients have")
        self._strategy = strategy
        self._num_bytes = float(rows[0].gradient_bytes)
        self._is_strong = report.header.mode == "strong"
        self._row = next(row for row in rows if row.exchange == exchange)
        self._fit = _fit(report, self._num_bytes)
        self._workers_per_host = fits.workers_per_host(report)

    def batch_size(self, workers: int) -> int:
        """Return the batch of so many workers together."""
        if self._is_strong:
            return self._row.batch_size
        return self._row.batch_size // self._row.workers * workers

    def forecast(self, workers: int) -> Forecast:
        """Return the step of so many workers.

        Raises:
            UserError: the measurements do not tell it well enough; the text says why.
        """
        batch_size = self.batch_size(workers)
        if workers > batch_size:
            raise UserError(f"{workers} workers cannot share a batch of {batch_size}")
        farthest = FAR * self._fit.max_workers
        if workers > farthest:
            raise UserError(
                f"{workers} workers are more than {FAR} times the {self._fit.max_workers} that"
                " were measured"
            )

        if len(self._workers_per_host) > 1:
            numbers = " and ".join(map(str, self._workers_per_host))
            raise UserError(
                f"hosts had {numbers} workers each, so nobody knows how {workers} would be placed"
            )

        def step_s(fabric: Fabric) -> float:
            model = fits.step_model(self._fit, self._num_bytes, fabric)
            return model.step_s(self._strategy, workers, batch_size / workers)

        shortest_s, longest_s = self._fit.step_range(step_s)
        if longest_s > DECIDES * shortest_s:
            raise UserError(
                f"the network is not known well enough for {workers} workers: a step is"
                f" {1e3 * shortest_s:.3g} to {1e3 * longest_s:.3g} ms"
            )
        low_s, high_s = self._fit.interval(step_s)
        if high_s > TOO_WIDE * low_s:
            raise UserError(
                f"a step of {workers} workers is known to a factor of {high_s / low_s:.1f} only"
                f" ({1e3 * low_s:.3g} to {1e3 * high_s:.3g} ms)"
            )
        return Forecast(step_s(self._fit.fabric), low_s, high_s)


def _fit(report: Report, num_bytes: float) -> Fit:
    fitted = fits.best_fit(report, num_bytes)
    if not fitted.plausible:
        raise UserError(
            "too few numbers of workers and exchanges were measured to tell a network's latency"
            " and bandwidth"
        )
    return fits.for_other_workers(fitted, report, num_bytes)

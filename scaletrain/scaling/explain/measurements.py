"""The finished runs of every cell of a report, and the cells that another one is compared with."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from scaletrain.scaling.measure.intervals import outlying
from scaletrain.scaling.model import Cell, Run, Scalar


@dataclasses.dataclass
class CellResults:
    """The repeats of one cell."""

    runs: list[Run] = dataclasses.field(default_factory=list)  # that finished
    failures: list[str] = dataclasses.field(default_factory=list)  # reasons of those that failed


class Measurements:
    """The results of every cell, in the order in which cells were added.

    Args:
        strong: whether the global batch is fixed (strong scaling) or grows with the workers.
    """

    def __init__(self, *, strong: bool):
        self.strong = strong
        self._results: dict[Cell, CellResults] = {}

    def results(self, cell: Cell) -> CellResults:
        """Return the results of a cell. A cell that is new is added without any."""
        return self._results.setdefault(cell, CellResults())

    def runs(self, cell: Cell) -> list[Run]:
        """Return the finished repeats of a cell; none if the cell is not known."""
        # Not by ``results``: a question must not add the cell.
        return self._results[cell].runs if cell in self._results else []

    def cells(self, *, reference: bool) -> list[Cell]:
        """Return the short reference cells, or those that were asked for."""
        return [cell for cell in self._results if cell.reference is reference]

    def all_runs(self) -> Iterator[Run]:
        """Yield the finished runs of all cells."""
        for results in self._results.values():
            yield from results.runs

    def without_exchange(self, cell: Cell) -> list[Run]:
        """Return the runs of the same workers with the exchange ``none``."""
        return self._long_or_short(dataclasses.replace(cell, exchange="none"))

    def single_worker(self, cell: Cell) -> list[Run]:
        """Return the runs of the baseline, if that is one worker."""
        baseline = self.baseline(cell)
        return self.runs(baseline) if baseline and baseline.workers == 1 else []

    def single_worker_on_share(self, cell: Cell) -> list[Run]:
        """Return the runs of one worker that has one worker's share of the batch.

        In weak scaling that is the single worker itself.
        """
        if not self.strong:
            return self.single_worker(cell)
        # The share may have been measured by a reference cell, or be a value of --vary batch_size.
        variants: list[tuple[tuple[str, Scalar], ...]] = [
            cell.variant_but_batch,
            (*cell.variant_but_batch, ("batch_size", cell.share)),
        ]
        for variant in variants:
            runs = self._long_or_short(
                Cell(cell.config, "none", workers=1, batch_size=cell.share, variant=variant)
            )
            if runs:
                return runs
        return []

    def baseline(self, cell: Cell) -> Cell | None:
        """Return the cell that the speed-up of ``cell`` is measured against.

        It is the same for every exchange, so that the faster exchange has the higher speed-up:
        one worker with ``none`` (plain training; the short reference where no cell is that), else
        the fastest one worker. Where nobody ran one worker it is the fewest workers there are,
        whose speed-up counts as ideal. None if all cells have equally many workers: there is
        nothing to be faster than.
        """
        same_job = [other for other in self._results if self._is_same_job(other, cell)]
        plain = [other for other in same_job if other.exchange == "none" and other.workers == 1]
        if plain:
            # False sorts first: the run in full length, then the short reference.
            return min(plain, key=lambda other: other.reference)
        asked_for = [other for other in same_job if not other.reference]
        counts = {other.workers for other in asked_for}
        if not counts or (min(counts) > 1 and len(counts) == 1):
            return None
        fewest = [other for other in asked_for if other.workers == min(counts)]
        return max(
            fewest, key=lambda other: (other.exchange == "none", mean_rate(self.runs(other)))
        )

    def _is_same_job(self, other: Cell, cell: Cell) -> bool:
        """Whether another cell was measured and differs in exchange and workers at most."""
        return bool(self.runs(other)) and (
            (other.config, other.batch_size, other.variant)
            == (cell.config, cell.batch_size, cell.variant)
        )

    def _long_or_short(self, cell: Cell) -> list[Run]:
        """Return the runs of a cell in full length, else those of its short reference."""
        # The long run rests on more steps, so it is taken where both exist.
        for reference in (False, True):
            runs = self.runs(dataclasses.replace(cell, reference=reference))
            if runs:
                return runs
        return []


def typical_runs(runs: Sequence[Run]) -> list[Run]:
    """Return the runs whose speed is not outlying.

    All means over repeats are of these, so that the parts of a step add up to the step.
    """
    marks = outlying(rates(runs))
    return [run for run, out in zip(runs, marks, strict=True) if not out]


def mean_rate(runs: Sequence[Run]) -> float:
    """Return the mean samples per second of the typical ones of some runs."""
    return float(np.mean(rates(typical_runs(runs))))


def rates(runs: Sequence[Run]) -> list[float]:
    """Return the samples per second of each run."""
    return [run.samples_per_s for run in runs]


def mean_part_s(runs: Sequence[Run], part: str) -> float:
    """Return the mean seconds of one of PARTS over the typical ones of some runs."""
    return float(np.mean([run.part_s(part) for run in typical_runs(runs)]))

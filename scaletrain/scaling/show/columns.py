"""The columns of the table of cells, for the terminal and for pages.

A new column is one more entry of ``COLUMNS``.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

from scaletrain.scaling.model import Report, Row
from scaletrain.scaling.show.text import cell_name, ms, number, to_target

Place = Literal["terminal", "md", "html"]


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of the table of cells."""

    title: str
    text: Callable[[Row], str]
    is_name: bool = False  # it tells rows apart; every row has it, even a failed one
    is_left: bool = False  # whether it is aligned to the left
    html: str | None = None  # the title in HTML, if it differs
    terminal: str | None = None  # the title on the terminal, if it differs
    places: tuple[Place, ...] = ("terminal", "md", "html")
    is_wanted: Callable[[Report], bool] = lambda report: True

    def title_in(self, place: Place) -> str:
        titles = {"html": self.html, "terminal": self.terminal}
        return titles.get(place) or self.title


def _workers(row: Row) -> str:
    """Return the number of workers, marked if they had too little of something."""
    return f"{row.workers}*" if row.oversubscribed else str(row.workers)


def _is_timed(report: Report) -> bool:
    return any(row.target_s is not None for row in report.rows)


def _bus_bandwidth(row: Row) -> str:
    return number(row.bus_bytes_per_s and row.bus_bytes_per_s / 1e6, ",.0f")


def _has_busbw(report: Report) -> bool:
    return any(row.bus_bytes_per_s is not None for row in report.rows)


PAGES: tuple[Place, ...] = ("md", "html")
HTML: tuple[Place, ...] = ("html",)

# Names come first: a failed row has its reason in place of all other columns.
COLUMNS = (
    Column("config", cell_name, is_name=True, is_left=True, is_wanted=lambda r: r.has_variants),
    Column("exchange", lambda row: row.exchange, is_name=True, is_left=True),
    Column("workers", _workers, is_name=True),
    Column("batch", lambda row: str(row.batch_size), is_name=True, places=HTML),
    Column("samples/s", lambda row: number(row.samples_per_s, ",.0f", row.samples_per_s_ci95)),
    Column("speed-up", lambda row: number(row.speedup, ".2f", row.speedup_ci95)),
    Column("efficiency", lambda row: number(row.efficiency)),
    Column("step min ms", lambda row: ms(row.step_s_min), html="step min"),
    Column("p10", lambda row: ms(row.step_s_p10)),
    Column("p50", lambda row: ms(row.step_s_p50)),
    Column("p90", lambda row: ms(row.step_s_p90)),
    Column("p95", lambda row: ms(row.step_s_p95), html="p95 (ms)"),
    Column(
        "exchange adds ms",
        lambda row: ms(row.exposed_comm_s, row.exposed_comm_s_ci95),
        html="exchange adds (ms)",
    ),
    Column("busbw MB/s", _bus_bandwidth, html="busbw (MB/s)", places=PAGES, is_wanted=_has_busbw),
    Column("loss", lambda row: number(row.final_loss, ".4f"), places=HTML),
    Column("accuracy", lambda row: number(row.test_accuracy, ".4f")),
    Column(
        "time to accuracy s",
        to_target,
        html="time to accuracy (s)",
        terminal="to accuracy s",
        is_wanted=_is_timed,
    ),
)  # fmt: skip


def columns_of(report: Report, place: Place) -> Sequence[Column]:
    """Return the columns that a report has in one place."""
    return [column for column in COLUMNS if place in column.places and column.is_wanted(report)]

"""The page of ``bench collectives``: a table of contenders, and the conditions of its figures."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from scaletrain.run.environment import Environment
from scaletrain.scaling.measure.collectives import CollectiveTimes


@dataclasses.dataclass
class Header:
    """The facts behind a page of results."""

    machine: Environment  # see ``environment``
    time: str  # UTC, when the measurement began
    repeats: int
    network: str
    neighbours: int  # processes that computed meanwhile
    bound: bool  # workers are kept on a core each
    devices: list[str]  # filled in at the end: the ranks report where their tensors were

    def to_json(self) -> dict[str, Any]:
        """Return all facts on one level, the machine's first."""
        facts = dataclasses.asdict(self)
        machine = facts.pop("machine")
        return machine | facts


_COLUMNS = (
    "workers", "collective", "size", "count", "type", "contender", "ran", "tight p50", "p99", "cv",
    "after p50", "p99", "cv", "algbw GB/s", "busbw GB/s", "bound", "p50 / bound",
    "times gloo", "after", "wrong",
)  # fmt: skip


def table(rows: Sequence[CollectiveTimes], header: Header, notes: Sequence[str]) -> str:
    """Return the page of results as Markdown."""
    lines = [
        f"# {_title(rows)}, {header.network}", "",
        _machine_line(header),
        _conditions_line(rows, header), "",
        f"| {' | '.join(_COLUMNS)} |",
        f"|{'---|' * len(_COLUMNS)}",
    ]  # fmt: skip
    lines += [_line(row, _gloo_of(row, rows)) for row in rows]
    for note in dict.fromkeys(notes):
        lines.append(f"\nNot measured: {note}")
    return "\n".join(lines)


def _title(rows: Sequence[CollectiveTimes]) -> str:
    only_allreduce = all(row.collective == "all_reduce" for row in rows)
    return "Allreduce" if only_allreduce else "Collectives"


def _gloo_of(row: CollectiveTimes, rows: Sequence[CollectiveTimes]) -> CollectiveTimes | None:
    """Return gloo's row of the same case; None: there is none."""
    case = (row.workers, row.collective, row.size_bytes)
    for other in rows:
        if (
            other.contender == "gloo"
            and (other.workers, other.collective, other.size_bytes) == case
        ):
            return other
    return None


def _machine_line(header: Header) -> str:
    machine = header.machine
    facts = [
        f"{machine['processor']}, {machine['cores']} cores, {machine['os']}",
        f"tensors on {', '.join(header.devices)}",
        _versions(machine["versions"]),
        f"commit {machine['commit']}",
        header.time,
    ]
    return "; ".join(facts) + "."


def _versions(versions: Mapping[str, str | None]) -> str:
    installed = []
    for package, version in versions.items():
        if version:
            installed.append(f"{package} {version}")
    return ", ".join(installed)


def _conditions_line(rows: Sequence[CollectiveTimes], header: Header) -> str:
    """Return how the workers ran, and the meaning of the columns."""
    sentences = []
    if header.bound:
        sentences.append("Workers are each bound to a core, where the cores suffice.")
    else:
        sentences.append("Workers run where the system puts them.")
    cores = header.machine["cores"]
    crowded = sorted({row.workers for row in rows if row.workers > cores})
    if crowded:
        sentences.append(
            f"OVERSUBSCRIBED: {', '.join(map(str, crowded))} workers on {cores} cores."
        )
    if header.neighbours:
        sentences.append(f"BESIDE {header.neighbours} PROCESSES THAT COMPUTE.")
    sentences += [
        "Times of the slowest rank, in milliseconds: tight, one call right after another, and after a barrier before each call.",
        "cv: standard deviation over mean.",
        "times gloo: how many times as fast as gloo, tight and after a barrier (p50).",
        "ran: what `auto` chose; native is the wire's own.",
        "busbw = size / time x the share of the size that a rank moves: of an allreduce 2(n - 1)/n.",
        "bound: what the algorithm's bytes alone take, at the links' rate, or on one host at the speed at which all ranks copy at once.",
    ]  # fmt: skip
    return " ".join(sentences)


def _line(row: CollectiveTimes, gloo: CollectiveTimes | None) -> str:
    """Return the table's line of a row."""
    cells = [
        row.workers,
        row.collective,
        _size(row.size_bytes),
        row.count,
        row.dtype,
        row.contender,
        row.ran or "-",
        _milliseconds(row.time_s_p50),
        _milliseconds(row.time_s_p99),
        f"{row.time_cv:.0%}",
        _milliseconds(row.after_s_p50),
        _milliseconds(row.after_s_p99),
        "-" if row.after_cv is None else f"{row.after_cv:.0%}",
        f"{row.algbw_bytes_per_s / 1e9:.3f}",
        f"{row.busbw_bytes_per_s / 1e9:.3f}",
        _milliseconds(row.bound_s),
        _ratio(row.time_s_p50, row.bound_s),
        _ratio(gloo.time_s_p50, row.time_s_p50) if gloo else "-",
        _ratio(gloo.after_s_p50, row.after_s_p50) if gloo else "-",
        row.wrong,
    ]
    return f"| {' | '.join(map(str, cells))} |"


def _ratio(above: float | None, below: float | None) -> str:
    if not above or not below:
        return "-"
    return f"{above / below:.2f}"


def _milliseconds(seconds: float | None) -> str:
    return f"{1e3 * seconds:.3f}" if seconds else "-"


def _size(num_bytes: int) -> str:
    """Return a size as people write it, such as 64 KiB."""
    for unit, scale in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:g} {unit}"
    return f"{num_bytes} B"

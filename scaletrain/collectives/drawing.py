"""A schedule as a picture: text for terminals, SVG for pages.

In the SVG, each rank has a row, each round a column, and each message an arrow.
"""

from typing import NamedTuple

from scaletrain.collectives.schedule import Round, Schedule

# Pixels of the SVG.
_COLUMN = 72
_ROW = 34
_MARGIN = 56
_TOP = 44  # of the first rank's line

_ADD_COLOR = "#c2410c"
_REPLACE_COLOR = "#1d4ed8"


class _Arrow(NamedTuple):
    """All chunks of a round between the same two ranks, as one arrow."""

    src: int
    dst: int
    add: bool
    chunks: list[int]


def _arrows(transfers: Round) -> list[_Arrow]:
    """Return the arrows of a round, in the order of the ranks."""
    chunks: dict[tuple[int, int, bool], list[int]] = {}
    for src, dst, chunk, add in transfers:
        chunks.setdefault((src, dst, add), []).append(chunk)
    return [_Arrow(*ends, numbers) for ends, numbers in sorted(chunks.items())]


def as_text(schedule: Schedule) -> str:
    """Return one line a round: ``3 +> 2`` adds, ``0 -> 1`` replaces.

    The chunks stand in brackets if the schedule has several.

    >>> from scaletrain.collectives import tree
    >>> print(as_text(tree.schedule(3)))
    round 0: 1 +> 0
    round 1: 2 +> 0
    round 2: 0 -> 2
    round 3: 0 -> 1
    """
    lines = []
    for index, transfers in enumerate(schedule.rounds):
        messages = []
        for arrow in _arrows(transfers):
            sign = "+>" if arrow.add else "->"
            message = f"{arrow.src} {sign} {arrow.dst}"
            if schedule.num_chunks > 1:
                message += f" [{_spans(arrow.chunks)}]"
            messages.append(message)
        lines.append(f"round {index}: {', '.join(messages)}")
    return "\n".join(lines)


def as_svg(schedule: Schedule, title: str = "") -> str:
    """Return a picture with the rounds from left to right.

    Orange arrows add, blue ones replace. The label of an arrow is its chunks.
    """
    width = 2 * _MARGIN + _COLUMN * max(1, len(schedule.rounds))
    height = 60 + _ROW * schedule.size
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
        f' width="{width}" height="{height}" font-family="sans-serif" font-size="11">',
        f"<defs>{_marker('add', _ADD_COLOR)}{_marker('replace', _REPLACE_COLOR)}</defs>",
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{_MARGIN}" y="16" font-size="13" font-weight="bold">{title}</text>',
    ]
    for rank in range(schedule.size):
        y = _line_of(rank)
        lines.append(f'<text x="8" y="{y + 4}">rank {rank}</text>')
        lines.append(
            f'<line x1="{_MARGIN}" y1="{y}" x2="{width - _MARGIN / 2}" y2="{y}" stroke="#d4d4d4"/>'
        )
    for index, transfers in enumerate(schedule.rounds):
        x = _MARGIN + _COLUMN * index + 8
        lines.append(f'<text x="{x + 20}" y="{_TOP - 14}" fill="#737373">{index}</text>')
        for arrow in _arrows(transfers):
            lines += _drawn(arrow, x, labelled=schedule.num_chunks > 1)
    lines.append("</svg>")
    return "\n".join(lines) + "\n"


def _marker(name: str, color: str) -> str:
    """Return the definition of an arrow's head."""
    return (
        f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4"'
        ' markerWidth="6" markerHeight="6" orient="auto">'
        f'<path d="M0 0L8 4L0 8z" fill="{color}"/></marker>'
    )


def _line_of(rank: int) -> int:
    """Return the height of a rank's line."""
    return _TOP + _ROW * rank


def _drawn(arrow: _Arrow, x: int, *, labelled: bool) -> list[str]:
    """Return the elements of an arrow that starts at ``x``."""
    name = "add" if arrow.add else "replace"
    color = _ADD_COLOR if arrow.add else _REPLACE_COLOR
    y1 = _line_of(arrow.src)
    y2 = _line_of(arrow.dst)
    # It ends 10 pixels before the arrows of the next round begin.
    elements = [
        f'<line x1="{x}" y1="{y1}" x2="{x + _COLUMN - 18}" y2="{y2}" stroke="{color}"'
        f' stroke-width="1.4" marker-end="url(#{name})"/>'
    ]
    if labelled:
        label_y = y1 + (y2 - y1) * 0.2 - 3  # near the sender
        elements.append(
            f'<text x="{x + 10}" y="{label_y:.0f}" fill="{color}">{_spans(arrow.chunks)}</text>'
        )
    return elements


def _spans(numbers: list[int]) -> str:
    """Return numbers with their runs shortened.

    >>> _spans([0, 1, 2, 3, 6])
    '0-3,6'
    """
    spans: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if spans and spans[-1][1] == number - 1:
            first, _ = spans.pop()
            spans.append((first, number))
        else:
            spans.append((number, number))
    texts = []
    for first, last in spans:
        texts.append(str(first) if first == last else f"{first}-{last}")
    return ",".join(texts)

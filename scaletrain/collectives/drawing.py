"""A schedule as a picture: one row a rank, one column a round, an arrow a transfer. Text for terminals, SVG for pages."""

from scaletrain.collectives.schedule import Schedule

_COLUMN, _ROW, _MARGIN = 72, 34, 56
_ADD, _REPLACE = "#c2410c", "#1d4ed8"


def as_text(schedule: Schedule) -> str:
    """One line a round: ``3 +> 2`` adds, ``0 -> 1`` replaces; the chunks in brackets when there are several."""
    lines = []
    for index, transfers in enumerate(schedule.rounds):
        chunks: dict[tuple[int, int, bool], list[int]] = {}
        for t in transfers:
            chunks.setdefault((t.src, t.dst, t.add), []).append(t.chunk)
        parts = [
            f"{src} {'+' if add else '-'}> {dst}"
            + (f" [{_spans(which)}]" if schedule.num_chunks > 1 else "")
            for (src, dst, add), which in sorted(chunks.items())
        ]
        lines.append(f"round {index}: " + ", ".join(parts))
    return "\n".join(lines)


def as_svg(schedule: Schedule, title: str = "") -> str:
    """Rounds left to right; orange arrows add, blue ones replace; the label is the chunk."""
    width = 2 * _MARGIN + _COLUMN * max(1, len(schedule.rounds))
    height = 60 + _ROW * schedule.size
    top = 44
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        "<defs>"
        + "".join(
            f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" orient="auto">'
            f'<path d="M0 0L8 4L0 8z" fill="{color}"/></marker>'
            for name, color in (("add", _ADD), ("replace", _REPLACE))
        )
        + "</defs>",
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{_MARGIN}" y="16" font-size="13" font-weight="bold">{title}</text>',
    ]
    for rank in range(schedule.size):
        y = top + _ROW * rank
        out.append(f'<text x="8" y="{y + 4}">rank {rank}</text>')
        out.append(
            f'<line x1="{_MARGIN}" y1="{y}" x2="{width - _MARGIN / 2}" y2="{y}" stroke="#d4d4d4"/>'
        )
    for index, transfers in enumerate(schedule.rounds):
        x = _MARGIN + _COLUMN * index + 8
        out.append(f'<text x="{x + 20}" y="{top - 14}" fill="#737373">{index}</text>')
        chunks: dict[tuple[int, int, bool], list[int]] = {}
        for t in transfers:
            chunks.setdefault((t.src, t.dst, t.add), []).append(t.chunk)
        for (src, dst, add), which in sorted(chunks.items()):
            y1, y2 = top + _ROW * src, top + _ROW * dst
            name, color = ("add", _ADD) if add else ("replace", _REPLACE)
            out.append(
                f'<line x1="{x}" y1="{y1}" x2="{x + _COLUMN - 18}" y2="{y2}" stroke="{color}" stroke-width="1.4" '
                f'marker-end="url(#{name})"/>'
            )
            if schedule.num_chunks > 1:
                out.append(
                    f'<text x="{x + 10}" y="{y1 + (y2 - y1) * 0.2 - 3:.0f}" fill="{color}">{_spans(which)}</text>'
                )
    out.append("</svg>")
    return "\n".join(out) + "\n"


def _spans(numbers: list[int]) -> str:
    """``0-3,6`` for 0, 1, 2, 3, 6."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)

"""Lay out text, tables and pictures on sheets of A4, as a PDF that needs no browser.

Blocks stand below each other. If they do not fit on one sheet, they are tried smaller, down to what
can still be read on paper. Then they go on on another sheet.
"""

import dataclasses
import functools
import io
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.image import imread
from matplotlib.lines import Line2D

from scaletrain.scaling.show.page_tables import Table, Title

WIDTH, HEIGHT = 595.28, 841.89  # of A4; all lengths are in points
MARGIN = 31.0
_INSIDE = WIDTH - 2 * MARGIN
_SCALES = (1.0, 0.94, 0.88, 0.82, 0.76, 0.7)  # that are tried, until all is on one sheet
_LEADING = 1.32  # from line to line, in sizes of the type
_GAP = 8.0  # between columns of a table, and between pictures
_INK, _PALE = "#000000", "#999999"
# Fonts are embedded as outlines with their characters, so that text can be searched and copied.
_STYLE: Any = {"pdf.fonttype": 42, "font.family": "sans-serif"}


@dataclasses.dataclass(frozen=True)
class Paragraph:
    """Text that is wrapped."""

    text: str
    size: float = 8.0
    is_bold: bool = False
    is_code: bool = False
    colour: str = _INK
    before: float = 2.0  # free space above it


@dataclasses.dataclass(frozen=True)
class Pictures:
    """PNG images side by side, equally wide, each below its title."""

    images: Sequence[bytes]
    titles: Sequence[str]
    size: float = 8.0


@dataclasses.dataclass(frozen=True)
class Grid:
    """A table whose lines all have a cell in every column."""

    table: Table
    size: float = 7.5


Block = Paragraph | Pictures | Grid


def pdf(blocks: Sequence[Block], title: str) -> bytes:
    """Return the blocks as a PDF, on one sheet if they can be read there.

    Args:
        blocks: from top to bottom.
        title: of the document, for the reader's window.
    """
    with matplotlib.rc_context(_STYLE):
        for scale in _SCALES:
            sheets = _Sheets(scale)
            for block in blocks:
                sheets.add(block)
            if len(sheets.figures) == 1:
                break
        buffer = io.BytesIO()
        # Without a date, equal pages make equal files.
        with PdfPages(buffer, metadata={"Title": title, "CreationDate": None}) as pages:
            for figure in sheets.figures:
                pages.savefig(figure)
        return buffer.getvalue()


class _Sheets:
    """Sheets that are filled from top to bottom.

    Args:
        scale: of all sizes but the margins.
    """

    def __init__(self, scale: float):
        self._scale = scale
        self._left = 0.0  # of the present sheet's height, above the bottom margin
        self.figures: list[Figure] = []
        self._begin()

    def add(self, block: Block) -> None:
        """Place a block below the last one."""
        if isinstance(block, Paragraph):
            self._paragraph(block)
        elif isinstance(block, Pictures):
            self._pictures(block)
        else:
            self._grid(block)

    def _begin(self) -> None:
        self.figures.append(Figure(figsize=(WIDTH / 72, HEIGHT / 72), facecolor="white"))
        self._left = HEIGHT - 2 * MARGIN

    def _take(self, height: float) -> float:
        """Take some of the height, on a new sheet if need be; return its lower end."""
        if height > self._left:
            self._begin()
        self._left -= height
        return MARGIN + self._left

    def _text(
        self, x: float, y: float, text: str, size: float, colour: str = _INK, **font: bool
    ) -> None:
        # Not as mathematics: a dollar sign is one.
        self.figures[-1].text(
            x / WIDTH, y / HEIGHT, text, fontproperties=_font(size, **font), color=colour,
            va="baseline", parse_math=False,
        )  # fmt: skip

    def _rule(self, y: float, width: float) -> None:
        ends = [MARGIN / WIDTH, 1 - MARGIN / WIDTH]
        line = Line2D(ends, [y / HEIGHT] * 2, color=_PALE, linewidth=width)
        self.figures[-1].add_artist(line)

    def _paragraph(self, block: Paragraph) -> None:
        size = self._scale * block.size
        font = {"is_bold": block.is_bold, "is_code": block.is_code}
        lines = wrapped(block.text, _INSIDE / size, **font)
        # A heading stays with what follows: it is not the last line of a sheet.
        self._take(self._scale * block.before if self._left > 4 * size else self._left)
        for line in lines:
            y = self._take(_LEADING * size)
            self._text(MARGIN, y + 0.3 * size, line, size, block.colour, **font)

    def _pictures(self, block: Pictures) -> None:
        size = self._scale * block.size
        count = len(block.images)
        width = self._scale * (_INSIDE - (count - 1) * _GAP) / count
        arrays = [imread(io.BytesIO(image), format="png") for image in block.images]
        height = max(width * array.shape[0] / array.shape[1] for array in arrays)
        bottom = self._take(height + 2 * size)
        for number, array in enumerate(arrays):
            x = MARGIN + number * (width + _GAP)
            self._text(x, bottom + height + 0.5 * size, block.titles[number], size, is_bold=True)
            place = (x / WIDTH, bottom / HEIGHT, width / WIDTH, height / HEIGHT)
            axes = self.figures[-1].add_axes(place)
            axes.axis("off")
            # As many points as the image has, not as many as the screen would.
            axes.imshow(array, interpolation="none", aspect="auto")

    def _grid(self, block: Grid) -> None:
        size = self._scale * block.size
        titles = block.table.titles
        rows = [line.cells for line in block.table.lines]
        widths = _column_widths(titles, rows)
        # In sizes of the type, so that a wide table gets a smaller one.
        needed = sum(widths) * size + _GAP * (len(widths) - 1)
        if needed > _INSIDE:
            size *= (_INSIDE - _GAP * (len(widths) - 1)) / (sum(widths) * size)
        spare = (_INSIDE - sum(widths) * size) / max(1, len(widths) - 1)
        lefts = []
        x = MARGIN
        for width in widths:
            lefts.append(x)
            x += width * size + spare
        headings = [
            wrapped(title.text, width + 1e-6, is_bold=True)
            for title, width in zip(titles, widths, strict=True)
        ]
        most = max(len(lines) for lines in headings)
        self._take(0.3 * size)
        bottom = self._take(most * _LEADING * size)
        for column, lines in enumerate(headings):
            for above, line in enumerate(reversed(lines)):
                y = bottom + (0.3 + above * _LEADING) * size
                self._cell(titles[column], lefts[column], widths[column], y, line, size, True)
        self._rule(bottom, 0.8)
        for cells in rows:
            bottom = self._take(1.1 * _LEADING * size)
            for column, text in enumerate(cells):
                y = bottom + 0.4 * size
                self._cell(titles[column], lefts[column], widths[column], y, text, size, False)
            self._rule(bottom, 0.3)

    def _cell(
        self, title: Title, left: float, width: float, y: float, text: str, size: float, bold: bool
    ) -> None:
        x = left
        if not title.is_left:
            x += (width - measured(text, is_bold=bold)) * size
        self._text(x, y, text, size, is_bold=bold)


def _column_widths(titles: Sequence[Title], rows: Sequence[Sequence[str]]) -> list[float]:
    """Return the width of each column in sizes of the type. Titles are wrapped between words."""
    widths = []
    for column, title in enumerate(titles):
        texts = [measured(cells[column]) for cells in rows]
        words = [measured(word, is_bold=True) for word in title.text.split()]
        widths.append(max([*texts, *words]))
    return widths


def wrapped(text: str, width: float, *, is_bold: bool = False, is_code: bool = False) -> list[str]:
    """Return the lines of a text. A word that is wider than a line is cut.

    Args:
        text: its words.
        width: of a line, in sizes of the type.
        is_bold: whether it is set in bold.
        is_code: whether it is set in a font of equal widths.
    """
    font = {"is_bold": is_bold, "is_code": is_code}
    space = measured(" ", **font)
    lines: list[str] = []
    free = 0.0  # of the last line
    for word in text.split():
        while measured(word, **font) > width:
            fitting = len(word) - 1
            while fitting > 1 and measured(word[:fitting], **font) > width:
                fitting -= 1
            lines.append(word[:fitting])
            word = word[fitting:]
            free = 0.0
        needed = measured(word, **font)
        if lines and needed + space <= free:
            lines[-1] += f" {word}"
            free -= needed + space
        else:
            lines.append(word)
            free = width - needed
    return lines


@functools.lru_cache(maxsize=4096)
def measured(text: str, *, is_bold: bool = False, is_code: bool = False) -> float:
    """Return the width of a text in sizes of the type."""
    # Large, since the renderer rounds to whole points.
    font = _font(100.0, is_bold=is_bold, is_code=is_code)
    width, _, _ = _renderer().get_text_width_height_descent(text, font, ismath=False)
    return float(width) / 100


@functools.cache
def _renderer() -> Any:
    return FigureCanvasAgg(Figure(dpi=72)).get_renderer()


def _font(size: float, *, is_bold: bool = False, is_code: bool = False) -> FontProperties:
    family = "monospace" if is_code else "sans-serif"
    weight = "bold" if is_bold else "normal"
    return FontProperties(family=family, weight=weight, size=size)

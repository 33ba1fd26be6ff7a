"""Text, tables and pictures on sheets of A4, as a PDF that needs no browser.

Blocks stand below each other. If they do not fit on one sheet, they are tried smaller, down to what
can still be read on paper. Then they go on on another sheet.
"""

import dataclasses
import io
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

from scaletrain.scaling.show.page_tables import Table

if TYPE_CHECKING:
    from fpdf import FPDF

_MARGIN = 31.0  # all lengths are in points
_SCALES = (1.0, 0.94, 0.88, 0.82, 0.76, 0.7)  # that are tried, until all is on one sheet
_LEADING = 1.32  # from line to line, in sizes of the type
_GAP = 8.0  # between columns of a table, and between pictures
_PALE = 150  # of a table's rules
_FONTS = {
    ("text", ""): "DejaVuSans",
    ("text", "B"): "DejaVuSans-Bold",
    ("code", ""): "DejaVuSansMono",
}


@dataclasses.dataclass(frozen=True)
class Paragraph:
    """Text that is wrapped."""

    text: str
    size: float = 8.0
    is_bold: bool = False
    is_code: bool = False
    colour: str = "#000000"
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


def pdf(blocks: Sequence[Block], title: str, created: datetime) -> bytes:
    """Return the blocks as a PDF, on one sheet if they can be read there.

    Args:
        blocks: from top to bottom.
        title: of the document, for the reader's window.
        created: when its figures were; equal pages then make equal files.
    """
    for scale in _SCALES:
        document = _document(title, created)
        for block in blocks:
            match block:
                case Paragraph():
                    _paragraph(document, block, scale)
                case Pictures():
                    _pictures(document, block, scale)
                case Grid():
                    _grid(document, block, scale)
        if document.page == 1:
            break
    return bytes(document.output())


def _document(title: str, created: datetime) -> "FPDF":
    """Return an empty sheet. Fonts are embedded, so that text can be searched and copied."""
    from fpdf import FPDF  # it takes half a second, and other formats do not need it

    document = FPDF(unit="pt", format="A4")
    document.set_creation_date(created)
    document.set_title(title)
    document.set_margin(_MARGIN)
    document.set_auto_page_break(True, _MARGIN)
    document.c_margin = 0.0
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    for (family, style), name in _FONTS.items():
        document.add_font(family, style, folder / f"{name}.ttf")
    document.set_draw_color(_PALE)
    document.set_line_width(0.3)
    document.add_page()
    return document


def _paragraph(document: "FPDF", block: Paragraph, scale: float) -> None:
    size = scale * block.size
    document.set_font("code" if block.is_code else "text", "B" if block.is_bold else "", size)
    document.set_text_color(block.colour)
    # A heading stays with what follows: the head of a table and its first line are 4 sizes high.
    if document.will_page_break(6 * size):
        document.add_page()
    else:
        document.ln(scale * block.before)
    document.multi_cell(0, _LEADING * size, block.text, align="L", new_x="LMARGIN", new_y="NEXT")
    document.set_text_color(0)


def _pictures(document: "FPDF", block: Pictures, scale: float) -> None:
    document.set_font("text", "", scale * block.size)
    with document.table(
        [block.titles],
        align="LEFT",
        borders_layout="NONE",
        gutter_width=_GAP,
        line_height=1.8 * document.font_size,
        text_align="LEFT",
        width=scale * document.epw,
    ) as table:
        row = table.row()
        for image in block.images:
            row.cell(img=io.BytesIO(image), img_fill_width=True)


def _grid(document: "FPDF", block: Grid, scale: float) -> None:
    size = scale * block.size
    table = block.table
    document.set_font("text", "", size)
    widths = []
    for column, title in enumerate(table.titles):
        # Titles are wrapped between words, and set in bold, which is up to a tenth wider.
        texts = [*title.text.split(), *(line.cells[column] for line in table.lines)]
        widths.append(1.1 * max(map(document.get_string_width, texts)) + _GAP)
    # A wide table gets a smaller type.
    document.set_font_size(size * min(1.0, document.epw / sum(widths)))
    with document.table(
        [[title.text for title in table.titles], *(line.cells for line in table.lines)],
        borders_layout="HORIZONTAL_LINES",
        col_widths=widths,
        line_height=_LEADING * document.font_size,
        text_align=["LEFT" if title.is_left else "RIGHT" for title in table.titles],
        v_align="BOTTOM",
        padding=(1.0, _GAP / 2),
    ):
        pass

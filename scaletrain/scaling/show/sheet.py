"""Text, tables and pictures on sheets of A4, as a PDF that needs no browser.

Blocks stand below each other. If they do not fit on one sheet, they are tried smaller, down to what
can still be read on paper. Then they go on on another sheet.
"""

import dataclasses
import io
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import matplotlib
from fpdf import FPDF
from fpdf.fonts import FontFace
from PIL import Image

from scaletrain.scaling.show.page_tables import Table

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


def _document(title: str, created: datetime) -> FPDF:
    """Return an empty sheet. Fonts are embedded, so that text can be searched and copied."""
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


def _paragraph(document: FPDF, block: Paragraph, scale: float) -> None:
    size = scale * block.size
    document.set_font("code" if block.is_code else "text", "B" if block.is_bold else "", size)
    document.set_text_color(block.colour)
    # A heading stays with what follows: it is not the last line of a sheet.
    if document.will_page_break(4 * size):
        document.add_page()
    else:
        document.ln(scale * block.before)
    document.multi_cell(0, _LEADING * size, block.text, align="L", new_x="LMARGIN", new_y="NEXT")
    document.set_text_color(0)


def _pictures(document: FPDF, block: Pictures, scale: float) -> None:
    size = scale * block.size
    count = len(block.images)
    document.set_font("text", "B", size)
    width = scale * (document.epw - (count - 1) * _GAP) / count
    sizes = [Image.open(io.BytesIO(image)).size for image in block.images]
    height = max(width * high / wide for wide, high in sizes)
    if document.will_page_break(height + 2 * size):
        document.add_page()
    top = document.y + 0.5 * size
    for number, image in enumerate(block.images):
        left = document.l_margin + number * (width + _GAP)
        document.text(left, top + size, block.titles[number])
        document.image(io.BytesIO(image), x=left, y=top + 1.4 * size, w=width)
    document.set_y(top + 1.4 * size + height)


def _grid(document: FPDF, block: Grid, scale: float) -> None:
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
        headings_style=FontFace(emphasis="BOLD"),
        line_height=_LEADING * document.font_size,
        text_align=["LEFT" if title.is_left else "RIGHT" for title in table.titles],
        v_align="BOTTOM",
        padding=(1.0, _GAP / 2),
    ):
        pass

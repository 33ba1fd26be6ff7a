"""Tests collectives/drawing.py: every algorithm has a page, whose drawing is that of the code."""

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from click.testing import CliRunner

from scaletrain import plugins
from scaletrain.cli import cli
from scaletrain.collectives import drawing, one_hop

PAGES = Path(__file__).parents[2] / "docs" / "algorithms"
# What is drawn where it is not 4 ranks without options: few ranks, so that the picture can be read
DRAWN = {
    "tree": (8, {}), "pipelined_tree": (4, {"segments": 3}), "double_tree": (5, {"segments": 2}), "halving_doubling": (8, {}),
    "recursive_doubling": (8, {}), "star": (5, {}), "two_level": (6, {"ranks_per_host": 3, "between": "tree"}),
}  # fmt: skip


@pytest.mark.parametrize("name", plugins.names("collective"))
def test_page_and_drawing_are_those_of_the_code(name: str):
    size, options = DRAWN.get(name, (4, {}))
    schedule = plugins.load("collective", name)(size, **options)
    picture = drawing.as_svg(schedule, f"{name}, {size} ranks")
    ET.fromstring(picture)
    missing = [
        f"{name}.{form}" for form in ("md", "svg") if not (PAGES / f"{name}.{form}").exists()
    ]
    assert not missing, (
        f"docs/algorithms: no {' and no '.join(missing)}; write the page: see docs/algorithms/README.md#add-one"
    )
    assert (PAGES / f"{name}.svg").read_text(encoding="utf-8") == picture
    page = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    assert drawing.as_text(schedule) in page and "**Cost**" in page and "**Source:**" in page
    assert f"({name}.md)" in (PAGES / "README.md").read_text(encoding="utf-8")


def test_page_of_one_hop_is_that_of_the_code():
    page = (PAGES / "one_hop.md").read_text(encoding="utf-8")
    for name in one_hop.COLLECTIVES:
        assert f"## {name}\n\n```\n{drawing.as_text(one_hop.proved(name, 4))}\n```" in page
    picture = drawing.as_svg(one_hop.proved("reduce_scatter", 4), "reduce_scatter, 4 ranks")
    assert (PAGES / "one_hop.svg").read_text(encoding="utf-8") == picture


def test_draw_shows_what_it_proved_and_writes_the_picture(tmp_path: Path):
    typed = ["draw", "pipelined_tree:segments=3", "--svg", str(tmp_path / "tree.svg")]
    done = CliRunner().invoke(cli, typed, catch_exceptions=False)
    assert done.exit_code == 0 and done.stderr.startswith("proved: ")
    assert f"```\n{done.stdout}```" in (PAGES / "pipelined_tree.md").read_text()
    assert (tmp_path / "tree.svg").read_text() == (PAGES / "pipelined_tree.svg").read_text()

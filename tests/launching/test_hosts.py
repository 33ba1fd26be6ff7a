"""Tests of launching/hosts.py; test_slurm.py holds the same lists against scontrol."""

import pytest

from scaletrain.errors import UserError
from scaletrain.launching.hosts import expand

LISTS = {
    "localhost": ["localhost"],
    "h1,h2": ["h1", "h2"],
    "n[01-03,7],gpu1": ["n01", "n02", "n03", "n7", "gpu1"],
    "n[9-11]": ["n9", "n10", "n11"],
    "n[098-101]": ["n098", "n099", "n100", "n101"],
    "r[1-2]n[0-1]": ["r1n0", "r1n1", "r2n0", "r2n1"],
}


@pytest.mark.parametrize("text", LISTS)
def test_lists(text: str):
    assert expand(text) == LISTS[text]


def test_text_behind_a_bracket_goes_to_each_host():
    assert expand("h[0-1]:2,h7:1,g[2]-ib") == ["h0:2", "h1:2", "h7:1", "g2-ib"]


@pytest.mark.parametrize(
    "text", ["", "h1,", "h[1-2", "h1]", "h[2-1]", "h[a-b]", "h[]", "h 1", "h[[1]]", "h[1-]"]
)
def test_other_text_is_refused(text: str):
    with pytest.raises(UserError, match="is not a list of hosts"):
        expand(text)


def test_too_many_hosts():
    for text in ("h[0-999][0-999]", "h[0-60000],g[0-60000]", "h[0-9999999999]"):
        with pytest.raises(UserError, match="hosts"):
            expand(text)

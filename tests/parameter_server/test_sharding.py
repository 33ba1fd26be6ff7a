"""Tests ``protocol/sharding.py``: every element lies in one block, on one server."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaletrain.parameter_server.protocol import sharding
from scaletrain.parameter_server.protocol.sharding import ParameterSpec, plan

shapes = st.lists(
    st.builds(ParameterSpec, st.tuples(st.integers(1, 60), st.integers(1, 60)), st.integers(0, 1), st.booleans()),
    min_size=1, max_size=8,
)  # fmt: skip


@given(shapes, st.integers(1, 4), st.integers(64, 4096), st.booleans())
def test_every_element_lies_in_exactly_one_block(parameters, servers, block_bytes, whole):
    blocks = plan(parameters, servers, block_bytes, whole)
    assert [block.key for block in blocks] == list(range(len(blocks)))
    ranges: dict[int, list[tuple[int, int]]] = {}
    for block in blocks:
        assert sum(piece.stop - piece.start for piece in block.pieces) == block.numel > 0
        assert {parameters[piece.parameter].group for piece in block.pieces} == {block.group}
        assert block.sparse or whole or block.numel * 4 <= max(block_bytes, 64)
        for piece in block.pieces:
            assert parameters[piece.parameter].sparse == block.sparse
            ranges.setdefault(piece.parameter, []).append((piece.start, piece.stop))
    for index, parameter in enumerate(parameters):
        ends = [0, *(stop for _, stop in sorted(ranges[index]))]
        assert [start for start, _ in sorted(ranges[index])] == ends[:-1]
        assert ends[-1] == parameter.numel


def test_servers_get_equal_shares_and_large_tensors_are_split():
    blocks = plan(
        [ParameterSpec((4096, 4096)), ParameterSpec((1000,)), ParameterSpec((300, 300))], 4, 1 << 20
    )
    loads = [sum(b.numel for b in blocks if b.server == server) for server in range(4)]
    assert max(loads) < 1.05 * min(loads)
    assert len({block.server for block in blocks if block.pieces[0].parameter == 0}) == 4


def test_every_server_gets_part_of_a_small_model():
    assert {block.server for block in plan([ParameterSpec((100, 100))], 3)} == {0, 1, 2}


def test_a_table_costs_one_message_a_server_however_large_it_is():
    small, large = (plan([ParameterSpec((rows, 8), sparse=True)], 2) for rows in (10, 10_000_000))
    assert len(small) == len(large) == 2
    assert [block.first_row for block in large] == [0, 5_000_000]


@pytest.mark.parametrize(
    "broken",
    [
        None, [], {}, {"key": 0}, {"key": 0, "group": 0, "numel": 5, "sparse": False, "shape": [2, 3], "pieces": [[0, 0, 6]]},
        {"key": -1, "group": 0, "numel": 6, "sparse": False, "shape": [], "pieces": [[0, 0, 6]]},
        {"key": 0, "group": 0, "numel": 1 << 60, "sparse": False, "shape": [], "pieces": [[0, 0, 1 << 60]]},
        {"key": True, "group": 0, "numel": 6, "sparse": False, "shape": [], "pieces": [[0, 0, 6]]},
        {"key": 0, "group": 0, "numel": 6, "sparse": True, "shape": [], "pieces": [[0, 0, 6]]},
        {"key": 0, "group": 0, "numel": 6, "sparse": False, "shape": "ab", "pieces": [[0, 0, 6]]},
        {"key": 0, "group": 0, "numel": 6, "sparse": False, "shape": []},
        {"key": 0, "group": 0, "numel": 6, "sparse": False, "shape": [], "pieces": [[0, 0, 5]]},
        {"key": 0, "group": 0, "numel": 6, "sparse": False, "shape": [], "pieces": [[0, 9, 3], [0, 0, 12]]},
        {"key": 0, "group": 0, "numel": 6, "sparse": False, "shape": [6], "pieces": [[0, 0, 3], [1, 0, 3]]},
    ],
)  # fmt: skip
def test_a_server_refuses_tables_of_blocks_that_cannot_be(broken):
    with pytest.raises(ValueError):
        sharding.from_json(broken, 0)


def test_what_a_worker_writes_a_server_reads():
    for block in plan([ParameterSpec((30, 4)), ParameterSpec((9, 2), sparse=True)], 2, 64):
        read = sharding.from_json(sharding.to_json(block), block.server)
        # Where its rows lie in the table does not matter to the server.
        assert read == block._replace(first_row=0)

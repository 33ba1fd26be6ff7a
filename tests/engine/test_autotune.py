"""Tests engine/autotune.py, engine/engine.py and engine/choice.py: how `auto` chooses; options.

It chooses by a calibration that is kept, and the same on every rank.
"""

import json
import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner

from scaletrain.cli.bench.collectives import command
from scaletrain.engine import autotune
from scaletrain.engine.autotune import SIZES, Tuning
from scaletrain.engine.choice import NATIVE, Choice
from scaletrain.engine.engine import Engine
from scaletrain.engine.transport import Group
from scaletrain.errors import UserError
from scaletrain.scaling.measure.collectives import BUS_FACTORS
from tests.ranks import run_ranks

DIRECT, RING = Choice("direct", 1), Choice("ring", 4)


def test_between_sizes_a_line_is_drawn_and_the_lowest_is_chosen():
    tuning = Tuning({DIRECT: (1.0, 2.0, 10.0, 40.0, 160.0), RING: (5.0, 5.0, 6.0, 12.0, 36.0)}, 1.0)
    assert tuning.predict(DIRECT, 1) == 1.0, "below the smallest size it is latency"
    assert tuning.predict(DIRECT, (SIZES[2] + SIZES[3]) // 2) == 25.0
    assert tuning.predict(RING, 2 * SIZES[4]) == 72.0, (
        "beyond the largest it is as much a byte as there"
    )
    assert [tuning.choose(n) for n in (1, SIZES[1], SIZES[2], 100 << 20)] == [
        DIRECT,
        DIRECT,
        RING,
        RING,
    ]


def test_a_wire_so_slow_that_one_size_was_timed():
    tuning = Tuning({DIRECT: (1.0,), RING: (2.0,)}, 1.0)
    assert tuning.choose(1) == tuning.choose(100 << 20) == DIRECT
    assert tuning.predict(RING, SIZES[0]) == 2.0 and tuning.predict(RING, 3 * SIZES[0]) == 6.0


def test_of_equals_the_wires_own_allreduce_is_chosen():
    own = Choice(NATIVE, 1)
    for seconds, chosen in ((10.4, own), (10.6, RING)):
        assert (
            Tuning({RING: (10.0,) * 5, own: (seconds,) * 5, DIRECT: (11.0,) * 5}, 1.0).choose(
                1 << 20
            )
            == chosen
        )
    assert Tuning({RING: (10.0,) * 5, DIRECT: (9.9,) * 5}, 1.0).choose(1 << 20) == DIRECT


def test_a_slow_wire_is_measured_at_fewer_sizes():
    tuning = Tuning({DIRECT: (1.0, 2.0, 10.0), RING: (5.0, 5.0, 6.0)}, 1.0)
    assert tuning.choose(100 << 20) == RING and tuning.predict(RING, 2 * SIZES[2]) == 12.0


def _engine(rank: int, size: int, store: dist.Store, **options: str) -> Engine:
    return Engine(Group(store, rank, size, timedelta(seconds=30)), **options)


def _in_shared_memory(rank: int, size: int, path: str) -> dict:
    engine = _engine(rank, size, dist.FileStore(path, size))
    tensor = torch.full((1000,), float(rank + 1))
    engine.allreduce(tensor)
    assert (tensor == size * (size + 1) / 2).all()
    return engine.record(4096)


def test_on_one_host_it_is_shared_memory(tmp_path: Path):
    told = {
        "transport": "shared_memory",
        "collective": "auto",
        "chosen": {"4096": Choice(NATIVE, 1)._asdict()},
    }
    assert run_ranks(_in_shared_memory, 2, str(tmp_path / "store")) == [told] * 2


def _calibrate(rank: int, size: int, path: str, same_wire: float) -> tuple[dict, dict]:
    """What is recorded before the first allreduce, and after it."""
    os.environ["XDG_CACHE_HOME"] = path
    autotune.SIZES = SIZES[:3]  # short
    autotune._SAME_WIRE = same_wire
    store = dist.FileStore(f"{path}/store-{same_wire}", size)
    engine = _engine(rank, size, store, transport="gloo")
    before = engine.record()
    tensor = torch.full((300_000,), float(rank + 1))
    engine.allreduce(tensor)
    assert (tensor == size * (size + 1) / 2).all()
    after = engine.record(4096, 1_200_000)
    store.add("done", 1)
    while store.add("done", 0) < size:
        pass
    return before, after


@pytest.mark.slow
def test_a_calibration_is_kept_and_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(autotune, "SIZES", SIZES[:3])
    first = run_ranks(
        _calibrate, 3, str(tmp_path), 0.5
    )  # no wire is the same: measured whatever is kept
    assert all(found == first[0] for found in first), "all ranks choose the same"
    before, after = first[0]
    assert before["chosen"] == {} and after["chosen"].keys() == {"4096", "1200000"}
    [path] = (tmp_path / "scaletrain").glob("tuning-*.json")
    kept = autotune._read(path)
    assert kept is not None
    assert {n: kept.choose(int(n))._asdict() for n in after["chosen"]} == after["chosen"], (
        "what was measured is what is chosen"
    )

    slowest = max(kept.seconds, key=lambda choice: kept.predict(choice, 4096))
    forged = kept._replace(seconds={c: (0.0 if c == slowest else 9.0,) * 3 for c in kept.seconds})
    path.write_text(autotune._dump(forged))
    again = run_ranks(
        _calibrate, 3, str(tmp_path), 1e9
    )  # every wire is the same: what is kept is believed
    assert [found[1]["chosen"]["4096"] for found in again] == [slowest._asdict()] * 3
    assert autotune._read(path) == forged

    path.write_text(json.dumps({"seconds": []}))
    run_ranks(_calibrate, 3, str(tmp_path), 1e8)
    mended = autotune._read(path)
    assert mended is not None and mended.seconds.keys() == kept.seconds.keys(), (
        "a file that is not whole is replaced"
    )


def _with_options(rank: int, size: int, path: str) -> tuple[dict, int]:
    engine = _engine(
        rank,
        size,
        dist.FileStore(path, size),
        collective="pipelined_tree:segments=3",
        transport="shared_memory:block_bytes=8192",
    )
    tensor = torch.full((10_000,), float(rank + 1))
    engine.allreduce(tensor)
    assert (tensor == size * (size + 1) / 2).all()
    return engine.record(4096), engine._programs["pipelined_tree"].num_chunks


def test_an_algorithm_and_a_wire_take_options(tmp_path: Path):
    for record, num_chunks in run_ranks(_with_options, 2, str(tmp_path / "store")):
        assert record["options"] == {"segments": 3} and num_chunks == 3


def test_a_mistake_in_an_option_is_named(monkeypatch: pytest.MonkeyPatch):
    from scaletrain.engine.choice import Options

    monkeypatch.setenv("SCALETRAIN_COLLECTIVE", "pipelined_tree:segment=3")
    with pytest.raises(
        UserError, match=r"SCALETRAIN_COLLECTIVE.*'segment'.*did you mean 'segments'"
    ):
        Options.from_env()


@pytest.mark.slow
def test_the_measurement_runs(tmp_path: Path):
    """`scaletrain bench collectives`, for real: ours and gloo, both right."""
    arguments = [
        "--workers",
        "2",
        "--sizes",
        "4K",
        "--collectives",
        "all",
        "--neighbours",
        "1",
        "--repeats",
        "1",
        "--seconds",
        "0.02",
    ]
    result = CliRunner().invoke(
        command, [*arguments, "--out", str(tmp_path / "found")], catch_exceptions=False
    )
    assert result.exit_code == 0
    found = json.loads((tmp_path / "found.json").read_text())
    rows = {(row["collective"], row["contender"]): row for row in found["rows"]}
    assert rows.keys() == {
        (name, contender) for name in BUS_FACTORS for contender in ("auto:auto", "gloo")
    }
    assert not found["notes"] and found["header"]["neighbours"] == 1
    for row in rows.values():
        assert row["wrong"] == 0 and row["runs"] >= 3 and row["time_s_min"] > 0, row
        assert row["after_s_p99"] >= row["after_s_p50"] > 0, row
    assert rows["all_reduce", "auto:auto"]["ran"] == NATIVE
    assert rows["reduce_scatter", "auto:auto"]["ran"] == "one hop"
    assert "| 2 | all_reduce | 4 KiB | 1024 | float32 | auto:auto | native |" in result.output

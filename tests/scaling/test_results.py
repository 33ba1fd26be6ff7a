"""Tests of ``scaling/show/results.py``: a measurement that was stopped is not taken for whole."""

import subprocess
from pathlib import Path

import pytest

from scaletrain.scaling.show import results


def test_a_measurement_that_fails_or_is_stopped_leaves_no_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    made = tmp_path / "made.json"

    def runs(ending: int | type[BaseException]) -> None:
        def run(*_: object, **__: object) -> subprocess.CompletedProcess:
            made.write_text("some of the rows")
            if isinstance(ending, int):
                return subprocess.CompletedProcess([], ending)
            raise ending

        monkeypatch.setattr(subprocess, "run", run)

    runs(1)
    results.once(made, "bench")
    assert not made.exists()
    runs(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        results.once(made, "bench")
    assert not made.exists()
    runs(0)
    results.once(made, "bench")
    assert made.exists()
    runs(1)  # not run again
    results.once(made, "bench")
    assert made.exists()


def test_a_header_keeps_the_first_load_and_every_commit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    now = {"commit": "a1"}
    monkeypatch.setattr(results, "environment", lambda: dict(now))
    first = results.noted(tmp_path / "header.json")
    now["commit"] = "b2"
    monkeypatch.setattr(results.os, "getloadavg", lambda: (99.0, 99.0, 99.0))
    assert results.noted(tmp_path / "header.json") == first | {"commit": "a1, b2"}
    assert results.noted(tmp_path / "header.json")["commit"] == "a1, b2"

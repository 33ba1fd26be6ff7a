"""Measurements that are made once: what was stopped half-way is not taken for whole."""

import subprocess
from pathlib import Path

import pytest

from scaletrain.scaling import results


def test_a_measurement_that_fails_or_is_stopped_leaves_no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
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

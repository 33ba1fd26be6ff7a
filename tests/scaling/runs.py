"""Run directories as a training leaves them, with step times that a test chooses."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scaletrain.run.records import StepRecord

PARTS = {"input_s": 0.1, "forward_s": 0.3, "backward_s": 0.5, "update_s": 0.1}


def write_run(
    directory: Path,
    *,
    exchange: str = "ring",
    steps: list[list[float]],
    samples: int = 48,
    cores: int = 64,
    commit: str = "abc",
    parts: Mapping[str, float] = PARTS,
    **summary: Any,
) -> Path:
    """Of ranks that compute on a thread each, on a machine of ``cores``.

    ``steps[rank][i]``: seconds of a rank's step i; ``parts``: the share of each part in them.
    """
    directory.mkdir(parents=True, exist_ok=True)
    workers = len(steps)
    for rank, seconds in enumerate(steps):
        clock = 1000.0
        lines = []
        for index, step_s in enumerate(seconds):
            record = StepRecord(
                step=index, rank=rank, time=clock, loss=1.0, samples=samples, lr=0.1, step_s=step_s,
                **{part: share * step_s for part, share in parts.items()},
            )  # fmt: skip
            lines.append(json.dumps(dataclasses.asdict(record)))
            clock += step_s
        (directory / f"rank-{rank}.jsonl").write_text("\n".join(lines) + "\n")
        header = {
            "node": 0,
            "device": "cpu",
            "threads": 1,
            "cores": list(range(cores)),
            "environment": {"commit": commit},
        }
        (directory / f"rank-{rank}.json").write_text(json.dumps(header))
    value = {
        "name": "job", "workers": workers, "exchange": exchange, "batch_size": samples * workers, "batch_mode": "strong",
        "finished": True, "final_loss": 1.0, "test_accuracy": 0.5, "wall_s": 1.0, **summary,
    }  # fmt: skip
    (directory / "summary.json").write_text(json.dumps(value))
    return directory

"""The files of a run directory."""

import json
from pathlib import Path


def has_finished(run_dir: Path) -> bool:
    """Whether a run has done all its steps, by its summary."""
    try:
        return bool(
            json.loads((run_dir / "summary.json").read_text(encoding="utf-8")).get("finished", True)
        )
    except (OSError, ValueError):
        return False

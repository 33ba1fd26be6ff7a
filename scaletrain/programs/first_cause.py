"""Show the first cause of a job that has ended, for batch scripts: ``python -m scaletrain.programs.first_cause RUN_DIR [OUTPUT]``."""

import sys
import time
from pathlib import Path

from scaletrain.launching.supervision import first_cause


def main(run_dir: Path, output: Path | None) -> int:
    """Show the first cause of a job that has ended, for batch scripts: ``python -m scaletrain.programs.first_cause RUN_DIR [OUTPUT]``."""
    workers = len(list(run_dir.glob("progress-*.json")))
    since = (
        min((path.stat().st_ctime for path in run_dir.glob("progress-*.json")), default=0.0) - 86400
    )
    found = first_cause.reported(run_dir, workers, since)
    if output and output.exists():
        said = first_cause.told(
            output.read_text(encoding="utf-8", errors="replace"),
            first_cause.Progress(run_dir, workers),
            time.time(),
        )
        found += [said] if said else []
    if found:
        print(first_cause.text(first_cause.choose(found), []), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None))

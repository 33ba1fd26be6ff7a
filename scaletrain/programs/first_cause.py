"""Show the first cause of a job that has ended, for batch scripts.

``python -m scaletrain.programs.first_cause RUN_DIR [OUTPUT]``; OUTPUT is a file with the launcher's
output.
"""

import sys
import time
from pathlib import Path

from scaletrain.launching.supervision import first_cause
from scaletrain.run.layout import RunDir

_DAY_S = 86_400.0


def main(run_dir: Path, output: Path | None) -> int:
    """Print the first cause to standard error; nothing if no failure is known."""
    files = RunDir(run_dir)
    progress_files = [path for _, path in files.all_progress()]
    # Failures of an earlier job in this directory are left out: they are older than the progress
    # files of this one. The clocks of several hosts may differ.
    first_started = min((path.stat().st_ctime for path in progress_files), default=0.0)
    reports = first_cause.reported(files, len(progress_files), launch=None)
    failures = [report for report in reports if report.time >= first_started - _DAY_S]
    # A rank that a signal ended could not report it. Its launcher may have named it.
    if output and output.exists():
        text = output.read_text(encoding="utf-8", errors="replace")
        by_launcher = first_cause.reported_by_launcher(text, files, time.time())
        if by_launcher:
            failures.append(by_launcher)
    if failures:
        print(first_cause.text(first_cause.choose(failures), []), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None))

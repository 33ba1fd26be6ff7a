"""Hold what the commands print, byte for byte, against the files in ``tests/golden``.

Each ``tests/golden/*.txt`` is the transcript of a session. A line that begins with ``$ `` is a
command: it is run, and what follows must be its standard output, its standard error (lines that
begin with ``2| ``) and its exit status, if that is not 0. ``cat FILE`` shows a file that a command
has written, ``sha256 FILE`` only its digest. All sessions run in this process. They start nothing
and need no MPI, SLURM or GPU.

When an output is meant to change, or a ``$ `` line was added, write the files again and review the
difference:

    SCALETRAIN_UPDATE_GOLDEN=1 python -m pytest tests/test_golden.py && git diff tests/golden

Everything that a session reads lies in ``tests/golden``. ``sweep/`` was recorded with the command
in its ``header.json`` and then made small: logs and progress files are left out, times are rounded
to 1e-7 s, and a checkpoint keeps only its header, which tells how large the parameters are.
``layers.json`` was written by ``bench model``. ``measured.json`` and ``calibration.json`` are
invented, because two workers on one machine are too few for ``fit`` to find a network. ``mistakes``
holds the cases of ``tests/test_mistakes.py``, and more.
"""

import contextlib
import difflib
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import sys
from pathlib import Path

import pytest

from scaletrain.cli import main
from scaletrain.host import cores

GOLDEN = Path(__file__).parent / "golden"
UPDATE = "SCALETRAIN_UPDATE_GOLDEN"
UPDATES = os.environ.get(UPDATE) == "1"  # read now: the sessions hide this machine's variables
MACHINE = ("OMP_", "SLURM_", "SCALETRAIN_", "OMPI_", "PMI_", "TTY_", "FORCE_COLOR", "NO_COLOR")


def neutral(text: str, folder: Path) -> str:
    """Return ``text`` without the parts that differ from machine to machine."""
    text = text.replace(str(folder), "<FOLDER>")
    # Figures depend on matplotlib's version.
    text = re.sub(r"<svg.*?</svg>", "<svg/>", text, flags=re.DOTALL)
    text = re.sub(r"-?\d+\.\d{7,}(?:e[+-]?\d+)?", _rounded, text)
    # Sums that cancel leave a rest whose sign is the processor's.
    text = text.replace("| -0.00 |", "| 0.00 |")
    return text.replace("-0.00 ", " 0.00 ")


def _rounded(number: re.Match[str]) -> str:
    """Return the number with six digits. Processors differ in the last digits of a sum or a fit."""
    value = float(number.group())
    return "0.0" if abs(value) < 1e-12 else f"{value:.6g}"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Enter a folder with the files that the sessions name, on a machine of four cores."""
    folder = tmp_path.resolve()
    _lay_out(folder)
    monkeypatch.chdir(folder)
    for name in list(os.environ):
        if name.startswith(MACHINE):
            monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("LINES", "40")
    monkeypatch.setattr(sys, "executable", "/opt/python/bin/python")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(cores, "quota", lambda: None)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)  # root's mpirun gets an option more
    return folder


def _lay_out(folder: Path) -> None:
    """Write the files that the sessions read."""
    for name in ("digits.yaml", "layers.json", "measured.json", "calibration.json"):
        shutil.copy(GOLDEN / name, folder)
    for sweep in ("sweep", "calm", "incomplete"):
        shutil.copytree(GOLDEN / "sweep", folder / sweep)
    # Calm: the same repeat three times, so that no cause is hidden by noise.
    for cell in sorted((folder / "calm" / "cells").iterdir()):
        for repeat in ("1", "2"):
            shutil.rmtree(cell / repeat)
            shutil.copytree(cell / "0", cell / repeat)
    # Incomplete: one cell has failed, another was not measured.
    failing = folder / "incomplete" / "cells" / "digits-native-w2-b96"
    for repeat in ("0", "1", "2"):
        shutil.rmtree(failing / repeat)
        (failing / repeat).mkdir()
        (failing / repeat / "failed.json").write_text('{"reason": "rank 1 at step 3: [no] memory"}')
    shutil.rmtree(folder / "incomplete" / "cells" / "digits-ring-w1-b96")
    (folder / "layers").mkdir()
    (folder / "hosts.txt").write_text("n01\nn02\n")
    (folder / "twice.yaml").write_text("model: mlp\ndata: digits\nbatch_size: 96\nbatch_size: 48\n")
    row = {
        "config": "digits",
        "exchange": "native",
        "workers": 2,
        "batch_size": 96,
        "variant": {},
        "runs": [{}],
    }
    reports = {
        "empty": {"header": {}, "rows": []},
        "weak": {"header": {"mode": "weak"}, "rows": []},
        "strong": {"header": {"mode": "strong"}, "rows": []},
        "fitting": {"header": {"mode": "strong"}, "rows": [row]},
    }
    for name, report in reports.items():
        (folder / f"{name}_report.json").write_text(json.dumps(report))


def _output(line: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run one line of a session in this process, and return what it shows."""
    words = shlex.split(line)
    if words[0] == "cat":
        return Path(words[1]).read_text(encoding="utf-8")
    if words[0] == "sha256":
        return hashlib.sha256(Path(words[1]).read_bytes()).hexdigest() + "\n"
    with monkeypatch.context() as patch:
        while "=" in words[0]:
            patch.setenv(*words.pop(0).split("=", 1))
        patch.setattr(sys, "argv", words)
        return _transcript()


def _transcript() -> str:
    """Return what the command in ``sys.argv`` prints, and its status."""
    out, err = io.StringIO(), io.StringIO()
    signals = (signal.SIGTERM, signal.SIGHUP)
    handlers = [signal.getsignal(number) for number in signals]
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as left,
        ):
            main()
    finally:
        for number, handler in zip(signals, handlers, strict=True):
            signal.signal(number, handler)
    text = out.getvalue()
    text += "".join(f"2| {line}\n" for line in err.getvalue().splitlines())
    status = left.value.code or 0
    return text if status == 0 else f"{text}[status {status}]\n"


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.txt")), ids=lambda path: path.stem)
def test_the_output_is_the_golden_one(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch):
    before = path.read_text(encoding="utf-8")
    commands = [line[2:] for line in before.splitlines() if line.startswith("$ ")]
    steps = [f"$ {command}\n{_output(command, monkeypatch)}" for command in commands]
    now = neutral("\n".join(steps), folder)
    if UPDATES:
        path.write_text(now, encoding="utf-8")
    elif now != before:
        lines = before.splitlines(keepends=True), now.splitlines(keepends=True)
        difference = "".join(difflib.unified_diff(*lines, f"tests/golden/{path.name}", "now"))
        hint = f"If this is meant to change: {UPDATE}=1 python -m pytest tests/test_golden.py"
        pytest.fail(f"{difference}\n{hint}", pytrace=False)

"""Each exit status that the docs name is produced here. Bug it catches: a status that the docs
promise and no job ends with, or the other way round.
"""

import os
import re
from pathlib import Path

import pytest

from tests.launching.test_supervise import carry_out, job_of

PAGE = Path(__file__).parents[2] / "docs" / "launchers" / "README.md"
INTERRUPTED = f"""
ended = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda *a: ended.append(1))
report(1)
os.kill({os.getpid()}, signal.%s)
while not ended:
    time.sleep(0.01)
"""
# What a worker does, by the status that the job then has.
ENDINGS = {
    0: "report(1)",
    1: "raise ValueError('the cause')",
    2: "raise UserError('device: cuda is not there')",
    124: "report(1); time.sleep(60)",
    130: INTERRUPTED % "SIGINT",
    137: "os.kill(os.getpid(), signal.SIGKILL)",
    143: INTERRUPTED % "SIGTERM",
}


def documented() -> set[int]:
    """Return the statuses in the first column of the table of exit statuses."""
    table = PAGE.read_text(encoding="utf-8").partition("| exit status |")[2].partition("\n\n")[0]
    statuses = set()
    for row in table.splitlines():
        first = re.match(r"\| ([\d, ]+) \|", row)
        if first:
            statuses |= {int(number) for number in first[1].split(",")}
    return statuses


def test_each_documented_status_has_an_ending():
    assert documented() == set(ENDINGS)


@pytest.mark.slow
@pytest.mark.timeout(60)
@pytest.mark.parametrize(("status", "body"), ENDINGS.items())
def test_an_ending_has_its_status(status: int, body: str, tmp_path: Path):
    found, output = carry_out(*job_of(tmp_path, body, workers=2, timeout_s=1.0))
    assert found == status, output


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_a_status_of_its_own_is_that_of_the_job(tmp_path: Path):
    found, output = carry_out(*job_of(tmp_path, "raise SystemExit(17)", workers=2))
    assert found == 17, output

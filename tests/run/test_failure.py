"""run/failure.py: which failure an exception stands for. Bug it catches: a consequence that is
taken for the cause.
"""

import json
import runpy
from pathlib import Path

import pytest
import torch.distributed as dist

from scaletrain.errors import UserError
from scaletrain.run.failure import Failure, FailureKind, failure_from_exception, read_failure
from scaletrain.world import World


def failure_of(error: BaseException, runner_files: tuple[str, ...] = ()) -> Failure:
    return failure_from_exception(error, World(), Path("no-such-run"), runner_files)


def caused_by_a_lost_peer() -> RuntimeError:
    error = RuntimeError("backward failed")
    error.__cause__ = ConnectionResetError("rank 2 is gone")
    return error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ConnectionResetError("rank 2 is gone"), FailureKind.PEER),
        (caused_by_a_lost_peer(), FailureKind.PEER),
        (dist.DistNetworkError("the store does not answer"), FailureKind.PEER),
        (
            RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer"),
            FailureKind.PEER,
        ),
        (RuntimeError("shapes do not fit"), FailureKind.EXCEPTION),
        (ValueError("Connection closed by peer"), FailureKind.EXCEPTION),
    ],
)
def test_a_lost_peer_is_told_from_a_ranks_own_exception(error: Exception, kind: FailureKind):
    failure = failure_of(error)
    assert failure.kind is kind and failure.exit_code == 1
    assert failure.message == f"{type(error).__name__}: {error}"


def test_a_persons_mistake_is_one_line_without_traceback():
    failure = failure_of(UserError("device: 'cuda'\n  is not there"))
    assert failure.kind is FailureKind.USER and failure.exit_code == 2
    assert failure.message == "device: 'cuda' is not there" and failure.traceback == ""


def test_the_traceback_begins_in_the_persons_script(tmp_path: Path):
    script = tmp_path / "train.py"
    script.write_text("raise ValueError('mine')\n")
    with pytest.raises(ValueError) as caught:
        runpy.run_path(str(script))
    runner_files = (__file__, runpy.run_path.__code__.co_filename)
    failure = failure_of(caught.value, runner_files)
    assert failure.traceback.splitlines()[1].strip().startswith(f'File "{script}"')
    own = failure_of(caught.value, (*runner_files, str(script)))
    assert __file__ in own.traceback, "an error of the runner itself is shown whole"


def test_a_failure_survives_its_file(tmp_path: Path):
    failure = failure_of(ValueError("mine"))._replace(step=3, collective="allreduce #7")
    path = tmp_path / "failure-0.json"
    path.write_text(json.dumps({**failure._asdict(), "later": "a later version's key"}))
    assert read_failure(path) == failure
    path.write_text("{")
    assert read_failure(path) is None


def test_a_report_belongs_to_a_launch_by_its_id_and_not_by_its_time(tmp_path: Path):
    of_this_one = failure_of(ValueError("mine"))._replace(launch="1-2", time=0.0)
    assert of_this_one.belongs_to("1-2") and of_this_one.belongs_to(None)
    assert not of_this_one.belongs_to("1-3"), "a late report of an earlier launch"
    assert of_this_one._replace(launch="").belongs_to("1-3"), "its launcher passes nothing on"

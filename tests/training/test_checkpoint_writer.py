"""Tests of training/checkpoint_writer.py.

Bugs it catches: a checkpoint of weights that training has changed meanwhile, a full disk that is
found out at the end, a slow disk that looks like a hang, partial files that stay.
"""

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from scaletrain.config.schema import Checkpoint
from scaletrain.errors import UserError
from scaletrain.run.layout import RunDir
from scaletrain.training import checkpoint, tensor_file
from scaletrain.training.checkpoint import State
from scaletrain.training.checkpoint_writer import CheckpointWriter
from tests.cluster.commands import scaletrain, summary


def job() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(3, 3)
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def writer(run_dir: Path, alive: Any = lambda doing: None, keep: int = 2) -> CheckpointWriter:
    return CheckpointWriter(run_dir, Checkpoint(keep=keep), alive)


class Disk:
    """A disk on which a file takes as long as the test wants."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.may_write = threading.Event()
        self._write = tensor_file.write
        monkeypatch.setattr(tensor_file, "write", self._write_late)

    def _write_late(self, *arguments: Any) -> None:
        assert self.may_write.wait(30)
        self._write(*arguments)


def bias_in(run_dir: Path, step: int) -> torch.Tensor:
    model, optimizer = job()
    loaded = checkpoint.load_latest(run_dir, State(model, optimizer))
    assert loaded is not None and loaded.step == step
    return model.bias.detach()


def test_training_goes_on_while_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    disk = Disk(monkeypatch)
    model, optimizer = job()
    checkpoints = writer(tmp_path)
    nn.init.constant_(model.bias, 1.0)
    checkpoints.save(1, State(model, optimizer, {"seed": 3}))
    assert checkpoints.is_writing() and RunDir(tmp_path).checkpoints() == []
    nn.init.constant_(model.bias, 2.0)  # the file must not see this
    disk.may_write.set()
    checkpoints.wait()
    assert not checkpoints.is_writing()
    assert (bias_in(tmp_path, 1) == 1.0).all()
    loaded = checkpoint.load_latest(tmp_path, State(model, optimizer))
    assert loaded is not None and loaded.facts == {"seed": 3}


def test_a_second_save_waits_and_buffers_are_used_again(tmp_path: Path):
    model, optimizer = job()
    checkpoints = writer(tmp_path, keep=50)
    for step in range(1, 30):
        nn.init.constant_(model.bias, step)
        checkpoints.save(step, State(model, optimizer))
    checkpoints.wait()
    assert [step for step, _ in RunDir(tmp_path).checkpoints()] == [*range(1, 30)]
    for step in range(29, 0, -1):
        assert (bias_in(tmp_path, step) == step).all()
        RunDir(tmp_path).checkpoint(step).unlink()


def test_it_gives_signs_of_life_while_it_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    disk = Disk(monkeypatch)
    signs: list[str] = []
    checkpoints = writer(tmp_path, signs.append)
    checkpoints.save(1, State(*job()))
    threading.Timer(2.5, disk.may_write.set).start()
    began = time.monotonic()
    checkpoints.wait()
    assert 2 < time.monotonic() - began < 20
    assert 3 <= signs.count("writing a checkpoint") <= 20


def test_a_full_disk_is_said_at_the_next_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checkpoints = writer(tmp_path)
    checkpoints.save(1, State(*job()))
    checkpoints.wait()

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tensor_file, "write", full)
        checkpoints.save(2, State(*job()))
        with pytest.raises(UserError) as error:
            checkpoints.save(3, State(*job()))
    path = RunDir(tmp_path).checkpoint(2)
    assert str(error.value).startswith(f"{path}: the checkpoint cannot be written: No space left")
    assert "after step 1 is whole" in str(error.value) and "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1.safetensors"]
    checkpoints.save(3, State(*job()))  # the disk has room again
    checkpoints.wait()
    bias_in(tmp_path, 3)


def test_the_interpreter_waits_for_it(tmp_path: Path):
    child = os.fork()
    if child == 0:
        # As at the interpreter's end, without the end of pytest.
        write = tensor_file.write

        def slow(*arguments: Any) -> None:
            time.sleep(1)
            write(*arguments)

        tensor_file.write = slow  # type: ignore[assignment]
        writer(tmp_path).save(1, State(*job()))
        threading._shutdown()  # type: ignore[attr-defined]
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    bias_in(tmp_path, 1)


def test_partial_files_of_this_run_alone_are_removed(tmp_path: Path):
    partial = [".step-3.safetensors.12", ".step-40.safetensors.99999"]
    others = [".step-3.safetensors", ".step-x.safetensors.12", "step-3.safetensors.12", ".a.12"]
    for name in partial + others:
        (tmp_path / name).write_text("")
    writer(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)


SLOW_DISK = """
import threading, time
from scaletrain.training import tensor_file
from scaletrain.training.models.mlp import model as mlp

write = tensor_file.write

def slow(path, *arguments):
    time.sleep(12)
    write(path, *arguments)

tensor_file.write = slow

def model():
    return mlp()
"""


@pytest.mark.slow
@pytest.mark.timeout(150)
@pytest.mark.parametrize("exchange", ["native", "parameter_server"])
def test_a_write_longer_than_timeout_s_is_no_hang(exchange: str, tmp_path: Path):
    """Two checkpoints of 12 s each, where a silence of 8 s is a hang; neither rank times out."""
    (tmp_path / "slow_disk.py").write_text(SLOW_DISK)
    job_file = tmp_path / "job.yaml"
    job_file.write_text(
        "model: slow_disk:model\ndata: digits\nbatch_size: 96\nsteps: 12\ntimeout_s: 8\n"
        f"exchange: {exchange}\ncheckpoint: {{every_steps: 2}}\nworkers: 2\n"
    )
    run_dir = tmp_path / "run"
    began = time.monotonic()
    done = scaletrain("train", str(job_file), "--run-dir", str(run_dir), timeout=140)
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - began > 24
    assert summary(run_dir)["finished"]
    steps = [step for step, _ in RunDir(run_dir).checkpoints()]
    # Those in between were put off until the last one.
    assert steps == [2, 12]
    assert not RunDir(run_dir).partial_checkpoints()


STATEFUL = """
from torch import nn

class Stateful(nn.Linear):
    def get_extra_state(self):
        return object()

def model():
    return nn.Sequential(nn.Flatten(), Stateful(64, 10))
"""


@pytest.mark.slow
def test_state_that_cannot_be_saved_ends_the_run_before_it_begins(tmp_path: Path):
    (tmp_path / "stateful.py").write_text(STATEFUL)
    job_file = tmp_path / "job.yaml"
    job_file.write_text("model: stateful:model\ndata: digits\nbatch_size: 96\nsteps: 12\n")
    done = scaletrain("train", str(job_file), "--run-dir", str(tmp_path / "run"), "--workers", "2")
    assert done.returncode == 2, done.stdout + done.stderr
    output = done.stdout + done.stderr
    assert "checkpoint: cannot hold extra.1._extra_state, of type object" in output
    assert "Traceback" not in output and "learning rate" not in output

"""Tests of programs/worker.py.

Which device a worker takes (no GPU is needed: what CUDA says of the machine is put in its
place), what it says, what it refuses.
"""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from scaletrain import config
from scaletrain.config import RunConfig
from scaletrain.config.schema import InitFrom, Named
from scaletrain.errors import UserError
from scaletrain.programs import worker
from scaletrain.run.failure import FailureKind, read_failure
from scaletrain.run.layout import RunDir
from scaletrain.run.records import StepRecord
from scaletrain.training import workload
from scaletrain.world import World


def on(device: str) -> RunConfig:
    return RunConfig(model="cnn", data="digits", batch_size=96, epochs=1, device=device)


@pytest.mark.parametrize(
    ("visible", "local_rank", "index"),
    [(4, 0, 0), (4, 3, 3), (1, 3, 0), (2, 3, 1)],
    ids=["first", "its own", "narrowed to its own", "shared"],
)
def test_a_gpu_for_each_local_rank(
    monkeypatch: pytest.MonkeyPatch, visible: int, local_rank: int, index: int
):
    taken: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    # On the second of two hosts: its rank in the job must not count.
    world = World(
        rank=4 + local_rank, size=8, local_rank=local_rank, local_size=4, node=1, num_nodes=2
    )
    assert worker.choose_device(on("auto"), world) == torch.device("cuda", index)
    assert taken == [torch.device("cuda", index)]
    assert worker.choose_device(on("cpu"), world) == torch.device("cpu")


def test_without_cuda(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert worker.choose_device(on("auto"), World()) == torch.device("cpu")
    with pytest.raises(UserError, match="allowed here: cpu, auto"):
        worker.choose_device(on("cuda"), World())


def test_rank_0_says_what_its_host_lacks_before_it_looks_for_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """The other rank never comes: waiting for it would end this test by its time limit."""
    run = on("cpu").model_copy(
        update={"model": Named(name="mlp"), "init_from": InitFrom(path="/gone.pt")}
    )
    RunDir(tmp_path).config.write_text(run.to_yaml(), encoding="utf-8")
    monkeypatch.setattr(World, "from_env", lambda: World(rank=0, size=2))
    with pytest.raises(SystemExit):
        worker.main(tmp_path)
    failure = read_failure(RunDir(tmp_path).failure(0))
    assert failure is not None and failure.kind is FailureKind.USER
    assert failure.message.startswith("init_from: there is no /gone.pt")
    RunDir(tmp_path).checkpoint(3).touch()

    def no_lack(run: RunConfig, *, begins: bool) -> None:
        raise UserError(f"begins: {begins}")

    monkeypatch.setattr(worker.presence, "check", no_lack)
    for resume in (False, True):
        with pytest.raises(SystemExit):
            worker.main(tmp_path, resume=resume)
        failure = read_failure(RunDir(tmp_path).failure(0))
        assert failure is not None and failure.message == f"begins: {not resume}"


def test_speed_counts_the_workers_that_live_and_time_left_is_of_this_ranks_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = config.check(
        {"model": "mlp", "data": "digits", "batch_size": 96, "steps": 40, "workers": 3}
    )
    world = World(0, 3, 0, 3)
    trainer = SimpleNamespace(
        world=world, num_steps=40, global_batch=96, resumed=False, device=torch.device("cpu"), describe=list,
        run_dir=tmp_path, leads=True,
        exchange=SimpleNamespace(live_workers=lambda: 2),
    )  # fmt: skip
    narrator = worker._Narrator(run, world, trainer, {"num_steps": 40})
    narrator._printed_at -= 2
    narrator.step(
        StepRecord(
            19,
            0,
            0.0,
            loss=1.0,
            samples=32,
            lr=0.1,
            step_s=0.5,
            input_s=0,
            forward_s=0,
            backward_s=0,
            update_s=0,
        )
    )
    assert "step 20/40  loss 1.0000  128 samples/s  10 s left" in capsys.readouterr().out
    trainer.num_steps = 20  # a stream has ended
    reached = {"finished": True, "steps": 20, "final_loss": 1.0, "test_accuracy": None}
    narrator.end(reached | {"samples_per_s": 128.0, "wall_s": 10.0})
    assert capsys.readouterr().out.startswith("done, since the data has ended: 20 steps,")


@pytest.mark.parametrize(
    ("outputs", "loss", "told"),
    [
        (
            10,
            "lossy:vector",
            r"loss: lossy:vector returned a tensor of shape \(8,\) \(allowed: a scalar tensor",
        ),
        (10, "lossy:number", "loss: lossy:number returned a float"),
        (1, "cross_entropy", "cross_entropy over one class is always 0"),
        (10, "cross_entropy", ""),
    ],
)
def test_a_loss_that_nothing_can_be_trained_with_is_refused(
    tmp_path: Path, outputs: int, loss: str, told: str
):
    (tmp_path / "lossy.py").write_text(
        "from torch import nn\n"
        "def net(*, outputs: int): return nn.Sequential(nn.Flatten(), nn.Linear(64, outputs))\n"
        "def vector(output, target): return nn.functional.cross_entropy(output, target, reduction='none')\n"
        "def number(output, target): return vector(output, target).mean().item()\n"
    )
    job = {
        "model": {"name": "lossy:net", "outputs": outputs},
        "data": "digits",
        "batch_size": 8,
        "steps": 1,
        "loss": loss,
    }
    parts = workload.build(
        config.check(job | {"source": str(tmp_path / "job.yaml")}), torch.device("cpu")
    )
    batch = parts.data.train[:8]
    if told:
        with pytest.raises(UserError, match=told):
            parts.forward(batch)
    else:
        parts.forward(batch).total.backward()

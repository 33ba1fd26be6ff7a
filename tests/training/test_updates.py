"""Tests of steps with several updates (training/trainer.py, workload.py, joint_optimizer.py).

Bugs it catches: gradients of one model's update that reach the other's, an exchange that waits for
gradients of a frozen model, one of two optimizers that a checkpoint or a schedule forgets.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from scaletrain import Data, Loss, Update, Workload, config
from scaletrain.errors import UserError
from scaletrain.training import workload
from scaletrain.training.batches import GlobalBatches
from scaletrain.training.joint_optimizer import JointOptimizer
from tests.ranks import run_ranks
from tests.training.jobs import train_rank, vectors

STEPS = 5


class Pair(Workload):
    """A critic of an artist, without random numbers, so that a plain loop can do the same."""

    def __init__(self, *, shared: bool = False, artist: str = "artist") -> None:
        self.artist = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 8))
        self.critic = nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 1))
        if shared:
            self.critic[0] = self.artist[0]
        self.data = Data(*vectors())
        self.updates = [
            Update("critic", torch.optim.Adam(self.critic.parameters(), lr=0.01), self.judge),
            Update(
                artist,
                torch.optim.SGD(self.artist.parameters(), lr=0.1, momentum=0.9),
                self.fool,
            ),
        ]

    def judge(self, batch: Any) -> Loss:
        inputs, _ = batch
        both = self.critic(torch.cat([inputs, self.artist(inputs)])).squeeze(1)
        truth = torch.cat([torch.ones(len(inputs)), torch.zeros(len(inputs))])
        return Loss(mse_loss(both, truth, reduction="sum"), len(inputs))

    def fool(self, batch: Any) -> Loss:
        inputs, _ = batch
        verdicts = self.critic(self.artist(inputs))
        total = mse_loss(verdicts, torch.ones_like(verdicts), reduction="sum")
        return Loss(total, len(inputs), {"twice": 2 * total})


JOB: dict[str, Any] = {
    "workload": f"{__name__}:Pair",
    "batch_size": 16,
    "steps": STEPS,
    "lr_schedule": {"name": "cosine"},
    "checkpoint": {"every_steps": 2},
}


def plain_loop() -> tuple[dict[str, torch.Tensor], float]:
    """Train the pair by torch alone; return all weights, and the loss of the last step."""
    run = config.check(JOB)
    pair = workload.build(run, torch.device("cpu"))
    batches = GlobalBatches(len(pair.data.train), 16, run.seed)  # type: ignore[arg-type]
    judging, fooling = (update.optimizer for update in pair.updates)
    schedules = []
    for optimizer in (judging, fooling):
        schedules.append(torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS))
    losses = [0.0, 0.0]
    for step in range(STEPS):
        batch = pair.data.train[batches.indices(step)]
        for index, (optimizer, update) in enumerate(
            [(judging, pair.updates[0]), (fooling, pair.updates[1])]
        ):
            pair.model.zero_grad()
            loss = update.forward(batch).total / 16
            loss.backward()
            optimizer.step()
            losses[index] = loss.item()
        for schedule in schedules:
            schedule.step()
    return {name: value.detach() for name, value in pair.model.state_dict().items()}, sum(losses)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("exchange", "size"), [("native", 1), ("native", 2), ("ring", 3), ("ring", 2)]
)
def test_two_models_train_as_in_a_plain_loop(exchange: str, size: int, tmp_path: Path):
    expected, loss = plain_loop()
    job = JOB | {"exchange": exchange, "accumulate": size}
    results = run_ranks(train_rank, size, job, tmp_path)
    for result in results:
        for name, weights in expected.items():
            torch.testing.assert_close(torch.from_numpy(result["state"][name]), weights)
    assert results[0]["summary"]["final_loss"] == pytest.approx(loss, rel=1e-4)
    parts = results[0]["records"][-1].parts
    assert parts["twice"] == pytest.approx(2 * parts["artist"])
    assert results[0]["records"][-1].loss == pytest.approx(parts["critic"] + parts["artist"])


@pytest.mark.slow
def test_both_optimizers_go_on_after_a_stop(tmp_path: Path):
    expected, _ = plain_loop()
    run_ranks(train_rank, 2, JOB, tmp_path, False, 3)
    resumed = run_ranks(train_rank, 2, JOB, tmp_path, True)
    assert len(resumed[0]["records"]) == STEPS - 3
    for name, weights in expected.items():
        torch.testing.assert_close(torch.from_numpy(resumed[1]["state"][name]), weights)


@pytest.mark.slow
def test_clipping_sees_the_gradients_of_one_update(tmp_path: Path):
    # A norm that no gradient reaches alone, and both together would if one's were left behind.
    (tmp_path / "clipped").mkdir()
    free = run_ranks(train_rank, 1, JOB, tmp_path)
    clip = {"callbacks": [{"name": "clip", "norm": 1e4}]}
    clipped = run_ranks(train_rank, 1, JOB | clip, tmp_path / "clipped")
    for name, weights in free[0]["state"].items():
        assert (weights == clipped[0]["state"][name]).all(), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shared": True}, "critic and artist share a parameter"),
        ({"artist": "painter"}, "an update of 'painter'"),
        ({"artist": "critic"}, "an update of 'critic'"),
    ],
)
def test_models_that_cannot_train_together_are_named(options: dict[str, Any], message: str):
    run = config.check(JOB | {"workload": {"name": JOB["workload"], **options}})
    with pytest.raises(UserError, match=message):
        workload.build(run, torch.device("cpu"))


def test_a_joint_optimizer_gives_each_its_own_state_back():
    one, other = nn.Linear(2, 2), nn.Linear(3, 1, bias=False)
    optimizers = {
        "one": torch.optim.Adam(one.parameters(), lr=0.1),
        "other": torch.optim.SGD(other.parameters(), lr=0.2, momentum=0.5),
    }
    for model, optimizer in zip((one, other), optimizers.values(), strict=True):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    joint = JointOptimizer(optimizers)
    fresh = {
        "one": torch.optim.Adam(one.parameters(), lr=0.1),
        "other": torch.optim.SGD(other.parameters(), lr=0.2, momentum=0.5),
    }
    loaded = JointOptimizer(fresh)
    loaded.load_state_dict(joint.state_dict())
    assert [group["lr"] for group in loaded.param_groups] == [0.1, 0.2]
    for name, optimizer in optimizers.items():
        torch.testing.assert_close(optimizer.state_dict(), fresh[name].state_dict())
    assert joint.defaults["one"] == "Adam" and joint.defaults["other.momentum"] == 0.5

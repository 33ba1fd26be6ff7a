"""Tests of the workload detection: N workers train and judge as one, under every exchange.

Bugs it catches: a mean over boxes where one over images is meant, draws that depend on a rank or on
the other images of its batch, a rank without objects for which the others wait.
"""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from scaletrain import Data, Loss, config
from scaletrain.parameter_server.protocol.settings import settings_from_options
from scaletrain.training import workload
from scaletrain.training.data import canvases
from scaletrain.training.data.canvases import Scene
from scaletrain.training.randomness import Placed
from scaletrain.training.workloads.detection import Detection, Seeded, collate
from tests.parameter_server.job import servers
from tests.ranks import run_ranks
from tests.training import jobs

NETWORK = {
    "classes": 3,
    "channels": 1,
    "depths": [1, 1, 1],
    "widths": [4, 6, 8],
    "scales": [6.0, 10.0],
    "ratios": [1.0, 1.7],
    "hidden": 12,
    "pooled": 3,
    "dropout": 0.0,
    "candidates": 80,
    "proposals": 60,
    "sampled_anchors": 16,
    "sampled_regions": 8,
    "detections": 30,
}
EXCHANGES = (
    {"name": "native"},
    {"name": "scheduled", "collective": "ring"},
    {"name": "scheduled", "collective": "tree"},
    {"name": "parameter_server"},
)
NAMES = [exchange.get("collective", exchange["name"]) for exchange in EXCHANGES]


class SomeEmpty:
    """Scenes of which only every third one keeps its objects."""

    def __init__(self, scenes: Any):
        self._scenes = scenes

    def __len__(self) -> int:
        return len(self._scenes)

    def __getitem__(self, index: int) -> Scene:
        image, boxes, labels = self._scenes[index]
        count = 0 if index % 3 else len(boxes)
        return Scene(image, boxes[:count], labels[:count])


def scenes(*, samples: int = 24, test_samples: int = 11) -> Data:
    options = {"size": 32, "classes": 3, "least_height": 10, "most_height": 16}
    train, test, _ = canvases.data(samples=samples, test_samples=test_samples, **options)
    return Data(SomeEmpty(train), test)


class LeavesOut(Detection):
    """Takes no loss without a box into the sum: its weights then have no gradient in this step."""

    def forward(self, batch: Any) -> Loss:
        loss = super().forward(batch)
        used = [part for part in loss.parts.values() if part > 0]
        return Loss(torch.stack(used).sum(), loss.count, loss.parts)


def tree(of: str = "Detection", **keys: Any) -> dict[str, Any]:
    places = {"Detection": "scaletrain.training.workloads.detection", "LeavesOut": __name__}
    return {
        "workload": {
            "name": f"{places[of]}:{of}",
            "network": NETWORK,
            "dataset": {"name": f"{__name__}:scenes"},
        },
        "batch_size": 6,
        "steps": 5,
        "optimizer": {"name": "sgd", "lr": 0.05},
        **copy.deepcopy(keys),
    }


def train(size: int, job_tree: dict[str, Any], run_dir: Path) -> list[dict[str, Any]]:
    """Train on ranks that are processes; a server is a thread, which saves starting it."""
    if job_tree["exchange"]["name"] != "parameter_server":
        return run_ranks(jobs.train_rank, size, job_tree, run_dir)
    options = {"placement": "dedicated"}
    job_tree["exchange"] |= options
    with servers(settings_from_options(options, size, 20.0), run_dir):
        return run_ranks(jobs.train_rank, size, job_tree, run_dir)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    [result] = train(1, tree(exchange={"name": "none"}), tmp_path_factory.mktemp("one"))
    return result


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("exchange", EXCHANGES, ids=NAMES)
def test_workers_train_and_judge_as_one(
    exchange: dict[str, Any], size: int, alone: dict[str, Any], tmp_path: Path
):
    ranks = train(size, tree(exchange=exchange), tmp_path)
    for rank in ranks:
        for name, value in alone["state"].items():
            np.testing.assert_allclose(rank["state"][name], value, rtol=1e-3, atol=1e-5)
    summary = ranks[0]["summary"]
    for figure in ("test_ap50", "test_ap", "test_recall50", "test_recall70"):
        assert summary[figure] == pytest.approx(alone["summary"][figure], rel=1e-4)
    assert 0 < summary["test_ap50"] < summary["test_recall50"] < 1
    if size == 3:
        parts = [record.parts for rank in ranks for record in rank["records"]]
        assert any(each["boxes"] == 0 for each in parts), "a rank without an object in a step"
        assert any(each["boxes"] > 0 for each in parts)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("exchange", EXCHANGES, ids=NAMES)
def test_weights_that_a_rank_does_not_use_are_exchanged_all_the_same(
    exchange: dict[str, Any], size: int, alone: dict[str, Any], tmp_path: Path
):
    if exchange["name"] != "parameter_server":  # servers take whatever comes
        exchange = exchange | {"find_unused_parameters": True}
    for rank in train(size, tree("LeavesOut", exchange=exchange), tmp_path):
        for name, value in alone["state"].items():
            np.testing.assert_allclose(rank["state"][name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_workers_without_an_exchange_train_alone(tmp_path: Path):
    ranks = train(2, tree(exchange={"name": "none"}), tmp_path)
    first, second = (rank["state"] for rank in ranks)
    assert any(not np.allclose(first[name], second[name]) for name in first)
    assert all(np.isfinite(value).all() for value in first.values())


def test_a_batch_holds_images_with_and_without_objects():
    train = scenes().train
    images, truth = collate([Seeded(train)[index] for index in range(4)])
    assert images.shape == (4, 1, 32, 32) and truth.seeds.unique().numel() == 4
    for index in range(4):
        count = len(train[index].labels)
        assert torch.equal(truth.boxes[index, :count], train[index].boxes)
        assert torch.equal(truth.labels[index, :count], train[index].labels)
        assert (truth.labels[index, count:] == -1).all() and not truth.boxes[index, count:].any()
    assert (truth.labels >= 0).any(1).tolist() == [True, False, False, True]
    _, nothing = collate([Seeded(train)[1]])
    assert nothing.labels.tolist() == [[-1]] and nothing.boxes.shape == (1, 1, 4)


def test_a_seed_belongs_to_the_sample_and_its_epoch():
    placed = Placed(Seeded(scenes().train), seed=3)
    seeds = {place: placed[place].seed.item() for place in [(0, 1), (0, 2), (1, 1)]}
    assert len(set(seeds.values())) == 3
    loader = DataLoader(placed, sampler=[(1, 1), (0, 1)], batch_size=None, num_workers=1)
    assert [sample.seed.item() for sample in loader] == [seeds[1, 1], seeds[0, 1]]


def test_the_loss_is_the_sum_of_four_means_over_images():
    job: Any = workload.build(config.check(tree()), torch.device("cpu"))
    batch = collate([job.data.train[index] for index in range(5)])
    loss = job.forward(batch)
    assert loss.count == 5
    assert set(loss.parts) == {"objectness", "proposals", "classes", "boxes"}
    assert loss.total.item() == pytest.approx(sum(part.item() for part in loss.parts.values()))


def test_recall_is_that_of_the_detectors_regions(monkeypatch: pytest.MonkeyPatch):
    job: Any = workload.build(config.check(tree()), torch.device("cpu"))
    images, truth = collate([job.data.test[index] for index in range(7)])
    with torch.no_grad():
        seen = job.model(images)
    total = int((truth.labels >= 0).sum())
    places = [(0, 0), (3, 0)]
    seen.proposals.boxes[:] = 0
    for image, place in places:  # the first objects of two images, one of them a little wide
        seen.proposals.boxes[image, 4] = truth.boxes[image, place]
    seen.proposals.are_used[:] = True
    width = truth.boxes[3, 0, 2] - truth.boxes[3, 0, 0]
    seen.proposals.boxes[3, 4, 2] += 0.6 * width  # it overlaps by 1 / 1.6
    monkeypatch.setattr(job, "model", lambda _: seen)
    figures = job.evaluate((images, truth))
    found = {name: (int(each.total), int(each.count)) for name, each in figures.items()}
    assert found == {"recall50": (2, total), "recall70": (1, total)}

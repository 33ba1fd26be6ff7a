"""Tests of the workload multimodal: what may reach the features, the classifier and the test."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from scaletrain import config
from scaletrain.errors import UserError
from scaletrain.training import workload
from tests.ranks import run_ranks
from tests.training import jobs


def tree(**options: Any) -> dict[str, Any]:
    data = {"name": "paired_views", "views": "tone", "samples": 60, "test_samples": 20, "size": 8}
    return {
        "workload": {
            "name": "scaletrain.training.workloads.multimodal:Multimodal",
            "dataset": data,
            "units": [12, 6],
            **options,
        },
        "batch_size": 12,
        "steps": 4,
        "optimizer": {"name": "sgd", "lr": 0.1},
        "exchange": "native",
    }


def built(**options: Any) -> Any:
    return workload.build(config.check(tree(**options)), torch.device("cpu"))


def test_the_loss_is_that_of_three_passes_one_by_one():
    job = built(labelled="second")
    first, second, targets = job.data.train[:10]
    nothing = torch.zeros_like(first), torch.zeros_like(second)
    expected = 0.0
    for shown in ((first, second), (first, nothing[1]), (nothing[0], second)):
        with torch.no_grad():
            decoded, logits = job.model(shown)
        for place, view in enumerate((first, second)):
            scale = torch.stack([job.data.train[index][place] for index in range(60)]).var()
            for row, wanted in zip(decoded[place], view, strict=True):
                expected += float(((row - wanted) ** 2).mean() / scale) / 3
        if shown[0] is nothing[0]:
            expected += functional.cross_entropy(logits, targets, reduction="sum").item()
    loss = job.forward((first, second, targets))
    assert loss.count == 10
    assert loss.total.item() == pytest.approx(expected, rel=1e-5)


def test_labels_do_not_shape_the_features():
    gradients = []
    for shift in (0, 1):
        job = built()
        first, second, targets = job.data.train[:10]
        job.forward((first, second, (targets + shift) % 10)).total.backward()
        gradients.append({name: each.grad for name, each in job.model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.any(), name
        assert torch.equal(gradient, gradients[1][name]) is not name.startswith("classify")


@pytest.mark.parametrize(("tested", "unseen"), [("first", 1), ("second", 0)])
def test_the_test_sees_one_view_alone(tested: str, unseen: int):
    """Bug it catches: accuracy on a view that the classifier was not meant to see."""
    job = built(tested=tested)
    batch = list(job.data.test[:])
    before = job.evaluate(batch)["accuracy"].total.item()
    logits = []
    job.model.register_forward_hook(lambda _, __, output: logits.append(output[1]))
    for value in (0.0, 7.0):
        batch[unseen] = torch.full_like(batch[unseen], value)
        assert job.evaluate(batch)["accuracy"].total.item() == before
    assert torch.equal(logits[0], logits[1])
    batch[1 - unseen] = torch.randn_like(batch[1 - unseen])
    job.evaluate(batch)
    assert not torch.equal(logits[0], logits[2])


def test_features_of_one_view_have_no_other_parameters():
    names = {name.rpartition(".")[0] for name in built(encoded="first").model.state_dict()}
    places = {name.split(".")[1] for name in names if name.startswith("encoders")}
    assert places == {"0"}
    with pytest.raises(UserError, match="tested: second is not allowed"):
        built(encoded="first", tested="second")


@pytest.mark.slow
def test_three_workers_learn_the_features_of_one(tmp_path: Path):
    (alone,) = run_ranks(jobs.train_rank, 1, tree(), tmp_path)
    for rank in run_ranks(jobs.train_rank, 3, tree(), tmp_path):
        for name, value in alone["state"].items():
            np.testing.assert_allclose(rank["state"][name], value, rtol=1e-4, atol=1e-6)

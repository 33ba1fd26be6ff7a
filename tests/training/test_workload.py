"""Tests of training/workload.py: what cannot be trained ends in one line, before training."""

from pathlib import Path

import pytest
import torch

from scaletrain import config
from scaletrain.errors import UserError
from scaletrain.training import workload

PARTS = """
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset
from scaletrain import Data, Loss, Workload

class NoLength(Dataset):
    def __getitem__(self, index): return torch.zeros(3), 1

class Dicts(Dataset):
    def __len__(self): return 8
    def __getitem__(self, index): return {"x": torch.zeros(3), "y": 1}

def endless(): return NoLength(), NoLength()
def same(): return ({1, 2},) * 2
def dicts(): return Dicts(), Dicts()
def pairs(): return (TensorDataset(torch.zeros(8, 3), torch.ones(8).long()),) * 2
def linear(): return nn.Linear(3, 2)
def lazy(): return nn.LazyLinear(2)
def empty(): return nn.Flatten()
def frozen(): return nn.Linear(3, 2).requires_grad_(False)
def tied():
    class Tuple(nn.Linear):
        def forward(self, x): return super().forward(x), x
    return Tuple(3, 2)
def first(output, target): return nn.functional.cross_entropy(output[0], target)

class NoModel(Workload):
    def __init__(self): self.data = Data(*pairs())

class NoData(Workload):
    def __init__(self): self.model = linear()

class NotOne:
    pass

class Own(Workload):
    def __init__(self, *, fault: str = ""):
        self.model = nn.Linear(3, 2)
        self.data = Data(*pairs())
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        if fault == "foreign":
            self.optimizer = torch.optim.SGD(linear().parameters(), lr=0.1)
        if fault == "partial":
            self.optimizer = torch.optim.SGD([self.model.weight], lr=0.1)
        if fault == "list":
            self.optimizer = [{"params": [self.model.weight]}]
        if fault == "head":
            self.head = nn.Linear(2, 2)
"""


def own(fault: str) -> dict:
    return {"workload": {"name": "parts_of_a_job:Own", "fault": fault}}


@pytest.fixture
def job(tmp_path: Path):
    (tmp_path / "parts_of_a_job.py").write_text(PARTS)

    def build(**keys) -> workload.Workload:
        tree = {"batch_size": 4, "steps": 1, "source": str(tmp_path / "job.yaml")}
        if "workload" not in keys:
            tree |= {"model": "parts_of_a_job:linear", "data": "parts_of_a_job:pairs"}
        return workload.build(config.check(tree | keys), torch.device("cpu"))

    return build


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"data": "parts_of_a_job:endless"}, "the training set is a NoLength"),
        ({"data": "parts_of_a_job:same"}, "the training and the test set are one stream"),
        ({"model": "parts_of_a_job:lazy"}, "a lazy module does not know its shapes yet"),
        ({"model": "parts_of_a_job:frozen"}, "no parameter is trained"),
        ({"optimizer": {"name": "lbfgs"}}, "lbfgs calls the model several times a step"),
        ({"model": "parts_of_a_job:empty"}, "model: has no parameters"),
        (own("foreign"), "steps parameters that are not self.model's"),
        (own("partial"), "optimizer: bias is in none of its groups"),
        (own("list"), "self.optimizer is a list"),
        (own("head"), "self.head has parameters outside self.model"),
        (own("") | {"optimizer": {"name": "sgd", "lr": 1}}, "the workload sets self.optimizer"),
        ({"workload": "parts_of_a_job:NoModel"}, "sets no self.model in __init__"),
        ({"workload": "parts_of_a_job:NoData"}, "sets no self.data in __init__"),
        ({"workload": "parts_of_a_job:NotOne"}, "allowed: a class that derives from"),
    ],
)
def test_what_cannot_be_trained_is_told_in_one_line(job, keys: dict, told: str):
    with pytest.raises(UserError, match=told):
        job(**keys)


def test_a_batch_of_another_form_is_told(job):
    parts = job(data="parts_of_a_job:dicts")
    batch = torch.utils.data.default_collate([parts.data.train[0], parts.data.train[1]])
    with pytest.raises(UserError, match=r"a batch is a dict, not \(input, target\)"):
        parts.forward(batch)


def test_outputs_of_any_form_are_evaluated_without_an_accuracy(job):
    parts = job(model="parts_of_a_job:tied", loss="parts_of_a_job:first")
    assert list(parts.evaluate(parts.data.test[:4])) == ["loss"]


@pytest.mark.parametrize("seed", [-1, 2**64 + 5, 10**40])
def test_any_whole_number_is_a_seed(job, seed: int):
    first, again = (job(seed=seed).model.weight for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, job(seed=seed + 1).model.weight)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"workload": "plain"}, "workload: 'plain' is not allowed"),
        ({"workload": "a:B", "model": "mlp"}, "model: the workload a:B has its own"),
        ({}, "model: is missing"),
        (
            {"model": "mlp", "data": "digits", "nonfinite": "skip", "exchange": "parameter_server"},
            "nonfinite: 'skip' is not allowed under parameter_server",
        ),
        (
            {"model": "mlp", "data": "digits", "nonfinite": "roll_back", "exchange": "none"},
            "nonfinite: 'roll_back' is not allowed under none",
        ),
        (
            {"model": "mlp", "data": "digits", "nonfinite": "roll_back"},
            "nonfinite: 'roll_back' has no checkpoints to go back to",
        ),
    ],
)
def test_it_is_clear_what_is_trained(keys: dict, told: str):
    with pytest.raises(UserError, match=told):
        config.check(keys | {"batch_size": 4, "steps": 1})


def test_options_of_a_workload_are_checked(tmp_path: Path):
    (tmp_path / "own.py").write_text(
        "from scaletrain import Workload\n"
        "class Own(Workload):\n    def __init__(self, *, width: int = 4): pass\n"
    )
    tree = {"batch_size": 4, "steps": 1, "source": str(tmp_path / "job.yaml")}
    with pytest.raises(UserError, match="did you mean 'width'"):
        config.check(tree | {"workload": {"name": "own:Own", "widht": 3}})
    checked = config.check(tree | {"workload": {"name": "own:Own", "width": "8"}})
    assert checked.workload is not None and checked.workload.options == {"width": 8}


class TwoHeads(torch.nn.Module):
    """Outputs in training: its own, and a head's; two numbers of each weight's outputs."""

    def __init__(self, weights: tuple[float, ...] = (1.0, 0.3)):
        super().__init__()
        self.own = torch.nn.Linear(3, 25)
        self.head = torch.nn.Linear(3, 25)
        self.loss_weights = weights

    def forward(self, inputs):
        return (self.own(inputs), self.head(inputs)) if self.training else self.own(inputs)


def supervised(model: torch.nn.Module) -> workload.Supervised:
    loss = torch.nn.functional.cross_entropy
    pairs = torch.utils.data.TensorDataset(torch.randn(8, 3), torch.arange(8))
    return workload.Supervised(model, loss, workload.Data(pairs, pairs))


def test_auxiliary_heads_add_their_weighted_losses_in_training_alone():
    torch.manual_seed(0)
    job = supervised(TwoHeads())
    batch = job.data.train.tensors
    loss = job.forward(batch)
    own, head = job.model(batch[0])
    cross_entropy = torch.nn.functional.cross_entropy
    expected = 8 * (cross_entropy(own, batch[1]) + 0.3 * cross_entropy(head, batch[1]))
    torch.testing.assert_close(loss.total, expected)
    assert set(loss.parts) == {"output_0", "output_1"} and loss.count == 8
    # A sum: two halves of the batch, as of two workers, add up to the whole.
    halves = [job.forward((batch[0][part], batch[1][part])) for part in (slice(5), slice(5, 8))]
    torch.testing.assert_close(halves[0].total + halves[1].total, loss.total)
    job.model.eval()
    figures = job.evaluate(batch)
    own = job.model(batch[0])
    torch.testing.assert_close(figures["loss"].total, 8 * cross_entropy(own, batch[1]))
    with pytest.raises(
        UserError, match="returns 2 outputs in training, and its loss_weights has 3"
    ):
        supervised(TwoHeads((1.0, 0.3, 0.3))).forward(batch)


def test_the_five_likeliest_classes_count_where_there_are_many():
    job = supervised(torch.nn.Linear(3, 25))
    inputs, targets = job.data.train.tensors
    job.model.eval()
    figures = job.evaluate((inputs, targets))
    ranks = (-job.model(inputs)).argsort(1).argsort(1)[range(8), targets]
    assert (
        figures["top5_accuracy"].total == (ranks < 5).sum() and figures["top5_accuracy"].count == 8
    )
    assert figures["accuracy"].total == (ranks == 0).sum()
    few = supervised(torch.nn.Linear(3, 10))
    assert "top5_accuracy" not in few.evaluate((inputs, targets))

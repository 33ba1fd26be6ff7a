"""Tests of training/metrics.py: N workers' figures are those of one worker with all samples."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from scaletrain import Mean, config
from scaletrain.errors import UserError
from scaletrain.training import metrics, workload
from tests.conftest import require
from tests.ranks import run_ranks
from tests.training import jobs

JOB = {
    "model": {"name": "mlp", "sizes": [8, 16, 4]},
    "data": {"name": "tests.training.jobs:vectors", "test_samples": 23},
    "batch_size": 16,
    "steps": 4,
    "exchange": "native",
}
F1 = {"name": "F1Score", "task": "multiclass", "num_classes": 4, "average": "macro"}
AUROC = {"name": "torchmetrics.classification:MulticlassAUROC", "num_classes": 4}


@pytest.fixture(autouse=True)
def needs_torchmetrics() -> None:
    there = importlib.util.find_spec("torchmetrics") is not None
    require("torchmetrics", there, 'pip install "scaletrain[metrics]"')


def every_rule() -> dict[str, Any]:
    from torchmetrics import Metric, classification, image, regression

    class Range(Metric):
        def __init__(self) -> None:
            super().__init__()
            self.add_state("least", torch.tensor(float("inf")), "min")
            self.add_state("greatest", torch.tensor(float("-inf")), "max")

        def update(self, output: torch.Tensor, target: torch.Tensor) -> None:
            self.least = torch.minimum(self.least, output.min())
            self.greatest = torch.maximum(self.greatest, output.max())

        def compute(self) -> dict[str, torch.Tensor]:
            return {"least": self.least, "greatest": self.greatest}

    return {
        "f1": classification.MulticlassF1Score(3, average="macro"),  # sums
        "by_class": classification.MulticlassRecall(3, average=None),  # sums, a vector
        "area": classification.MulticlassAUROC(3),  # lists of any length
        "range": Range(),  # least and greatest, a dict
        "noise": image.PeakSignalNoiseRatio(data_range=2.0),  # a mean
        "error": regression.MeanAbsoluteError() + 1.0,  # a metric made of another
    }


def show(all_metrics: dict[str, Any], outputs: torch.Tensor, targets: torch.Tensor) -> None:
    for name, metric in all_metrics.items():
        if name.startswith(("noise", "error", "range")):
            metric.update(outputs[:, 0], targets.float())
        else:
            metric.update(outputs, targets)


@pytest.mark.filterwarnings("ignore::UserWarning")  # classes without a sample
@pytest.mark.parametrize("samples", [1, 3, 10, 11])
def test_ranks_have_the_figures_of_one_worker(samples: int):
    random = torch.Generator().manual_seed(samples)
    outputs = torch.randn(samples, 3, generator=random).softmax(1)
    targets = torch.randint(3, (samples,), generator=random)

    def judge(rank: int, exchange: Any) -> dict[str, float]:
        own = torch.arange(samples)[rank :: exchange.world.size]
        shown = own if len(own) else torch.zeros(1, dtype=torch.int64)
        all_metrics = every_rule()
        metrics.prepare(all_metrics, torch.device("cpu"))
        for batch in shown.split(2):
            show(all_metrics, outputs[batch], targets[batch])
        first = metrics.joined(all_metrics, exchange, len(own) > 0)
        # Once more: nothing of the first time is left.
        metrics.reset(all_metrics)
        show(all_metrics, outputs[shown], targets[shown])
        assert metrics.joined(all_metrics, exchange, len(own) > 0) == pytest.approx(
            first, nan_ok=True
        )
        return first

    [alone] = jobs.Threads(1).run(judge)
    expected = every_rule()
    show(expected, outputs, targets)
    assert alone["range_least"] == pytest.approx(outputs[:, 0].min().item())
    assert alone["f1"] == pytest.approx(expected["f1"].compute().item())
    assert alone["error"] == pytest.approx(expected["error"].compute().item())
    assert alone["by_class_2"] == pytest.approx(expected["by_class"].compute()[2].item())
    for together in jobs.Threads(4).run(judge):
        assert together == pytest.approx(alone, rel=1e-5, nan_ok=True)


def test_no_test_samples_have_no_figures():
    def judge(rank: int, exchange: Any) -> dict[str, float]:
        return metrics.joined(every_rule(), exchange, False)

    assert jobs.Threads(2).run(judge) == [{}, {}]


@pytest.mark.slow
def test_a_run_of_two_workers_reports_what_torchmetrics_says_of_its_weights(tmp_path: Path):
    from torchmetrics import classification

    stop = {"name": "early_stop", "figure": "test_f1"}  # the figure is known beforehand
    tree = JOB | {"metrics": {"f1": F1, "area": AUROC}, "callbacks": [stop], "evaluate_every": 2}
    results = run_ranks(jobs.train_rank, 2, tree, tmp_path)
    parts = workload.build(config.check(tree), torch.device("cpu"))
    state = {name: torch.from_numpy(value) for name, value in results[0]["state"].items()}
    parts.model.load_state_dict(state)
    inputs, targets = parts.data.test[:]
    with torch.no_grad():
        outputs = parts.model(inputs)
    f1 = classification.MulticlassF1Score(4, average="macro")(outputs, targets).item()
    area = classification.MulticlassAUROC(4)(outputs, targets).item()
    for result in results:
        assert result["summary"]["test_f1"] == pytest.approx(f1, rel=1e-5)
        assert result["summary"]["test_area"] == pytest.approx(area, rel=1e-5)


class Judged(jobs.Groups):
    """A workload with a metric of its own."""

    def __init__(self, *, figure: str = "f1") -> None:
        from torchmetrics.classification import MulticlassF1Score

        super().__init__()
        self.metrics = {figure: MulticlassF1Score(4)}

    def evaluate(self, batch: Any) -> dict[str, Mean]:
        inputs, targets = batch
        for metric in self.metrics.values():
            metric.update(self.model(inputs), targets)
        return super().evaluate(batch)


class Unjoined(Judged):
    """Its metric cannot be joined."""

    def __init__(self) -> None:
        from torchmetrics import PearsonCorrCoef

        super().__init__()
        self.metrics = {"r": PearsonCorrCoef()}


def train(keys: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    """Train in this process, and leave no process group behind."""
    tree = {"batch_size": 16, "steps": 2, "exchange": "none"} | keys
    try:
        return jobs.train_rank(0, 1, tree, run_dir)["summary"]
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def test_a_workload_updates_metrics_of_its_own(tmp_path: Path):
    summary = train({"workload": "tests.training.test_metrics:Judged"}, tmp_path)
    assert 0 < summary["test_f1"] <= 1 and summary["test_loss"] > 0


IN_YAML = {key: JOB[key] for key in ("model", "data")}


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (IN_YAML | {"metrics": {"f1": "F1Scor"}}, "metrics.f1: 'F1Scor' is not known; did you me"),
        (IN_YAML | {"metrics": {"f1": "F1Score"}}, "metrics.f1: F1Score: .*missing.*'task'"),
        (IN_YAML | {"metrics": {"loss": F1}}, "metrics.loss: there is a figure loss already"),
        ({"workload": "tests.training.test_metrics:Unjoined"}, "metrics.r: the state .* of Pears"),
        (
            {"workload": "tests.training.test_metrics:Judged", "metrics": {"f1": F1}},
            "metrics: the workload tests.training.test_metrics:Judged has its own",
        ),
    ],
)
def test_what_cannot_be_measured_is_one_line(keys: dict[str, Any], told: str, tmp_path: Path):
    with pytest.raises(UserError, match=told):
        train(keys, tmp_path)

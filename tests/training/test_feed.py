"""Tests of training/feed.py in whole runs, by their effects.

Workers train on a stream, or on data with unreadable samples, as one process does that is given
the same samples. Bugs it catches: ranks that wait for each other where the data ends unevenly, a
mean over samples that were never read, a resume that repeats or leaves out samples.
"""

import multiprocessing
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from scaletrain import Data, config
from scaletrain.errors import TrainingError, UserError
from scaletrain.training import workload
from scaletrain.training.batches import GlobalBatches
from scaletrain.training.feed import open_feed
from scaletrain.world import World
from tests.ranks import run_ranks
from tests.training import jobs

HERE = "tests.training.test_feed"
SAMPLES = 37
UNREADABLE = (5, 6, 7, 20)
JOB = {
    "model": f"{HERE}:model",
    "data": f"{HERE}:stream",
    "batch_size": 8,
    "steps": 12,
    "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9},
    "exchange": "native",
}


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


class Samples(IterableDataset):
    """Vectors with noise; ``passes`` times, and never again."""

    def __init__(self, samples: Any, passes: int = 100):
        self._samples = samples
        self._passes = passes

    def __iter__(self) -> Iterator[Any]:
        self._passes -= 1
        if self._passes >= 0:
            for vector, target in self._samples:
                yield vector + torch.rand(8) / 100, target


def stream(*, passes: int = 100, test: int = 10) -> Data:
    vectors, _ = jobs.vectors(samples=SAMPLES)
    few, _ = jobs.vectors(samples=max(1, test))
    return Data(Samples([*vectors], passes), Samples([*few][:test]))


class Holed(Dataset):
    """Vectors, of which some cannot be read."""

    def __init__(self, samples: Any, unreadable: Container[int] = UNREADABLE):
        self._samples = samples
        self._unreadable = unreadable

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Any:
        if index in self._unreadable:
            raise OSError(f"no file {index}")
        return self._samples[index]


def holed() -> tuple[Dataset, Dataset]:
    train, test = jobs.vectors(samples=24, test_samples=9)
    return Holed(train), Holed(test)


def train(
    rank: int,
    size: int,
    runs: list[tuple[dict[str, Any], Path, bool, int | None]],
) -> list[dict[str, Any]]:
    """Train several jobs one after the other, in the same processes."""
    # A daemon may not start loader processes.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    multiprocessing.set_start_method("fork", force=True)
    results = []
    for keys, run_dir, resume, stop_at in runs:
        run_dir.mkdir(exist_ok=True)
        result = jobs.train_rank(rank, size, JOB | keys, run_dir, resume, stop_at)
        values = [value.ravel() for value in result["state"].values()]
        result["state"] = np.concatenate(values)
        results.append(result)
    return results


def alone(batches: list[list[Any]], tree: dict[str, Any]) -> np.ndarray:
    """The weights after training on these lists of samples, by a loop of torch alone."""
    parts = workload.build(config.check(tree), torch.device("cpu"))
    for samples in batches:
        inputs = torch.stack([vector for vector, _ in samples])
        targets = torch.tensor([int(target) for _, target in samples])
        parts.optimizer.zero_grad()
        nn.functional.cross_entropy(parts.model(inputs), targets).backward()
        parts.optimizer.step()
    return np.concatenate([each.numpy().ravel() for each in parts.model.state_dict().values()])


def stream_batches(tree: dict[str, Any], most: int) -> list[list[Any]]:
    """The global batches of a stream, as one rank reads them."""
    run = config.check(tree | {"workers": 1})
    data = workload.build(run, torch.device("cpu")).data
    data = data._replace(collate=lambda samples: samples)
    feed = open_feed(run, World(0, 1, 0, 1), data, 8)
    feed.start(0, {})
    batches = []
    for _ in range(most):
        step_input = feed.next()
        if step_input.has_ended:
            break
        batches.append(step_input.batches[0].content)
    return batches


@pytest.mark.slow
def test_workers_train_on_a_stream_as_one_does_and_go_on_bit_by_bit(tmp_path: Path):
    half, whole = tmp_path / "half", tmp_path / "whole"
    fewer = tmp_path / "fewer"
    loaders = {"loader_workers": 2}
    ranks = run_ranks(
        train,
        2,
        [
            ({}, whole, False, None),
            (loaders, half, False, 5),
            (loaders, half, True, None),
            ({}, fewer, False, 5),
        ],
    )
    batches = stream_batches(JOB, 12)
    assert [len(batch) for batch in batches] == [8] * 12, "it begins anew after 37 samples"
    expected = alone(batches, JOB)
    for undisturbed, _, resumed, _ in ranks:
        np.testing.assert_allclose(undisturbed["state"], expected, rtol=1e-4, atol=1e-6)
        assert (resumed["state"] == undisturbed["state"]).all()
        assert len(resumed["records"]) == 7
        for name in ("test_loss", "test_accuracy"):
            assert resumed["summary"][name] == undisturbed["summary"][name]
    # With another number of workers: the same samples.
    ((went_on,),) = run_ranks(train, 1, [({"exchange": "none"}, fewer, True, None)])
    np.testing.assert_allclose(went_on["state"], expected, rtol=1e-4, atol=1e-6)
    assert went_on["summary"]["test_loss"] == pytest.approx(ranks[0][0]["summary"]["test_loss"])


@pytest.mark.slow
@pytest.mark.parametrize("exchange", ["native", "none"])
def test_a_stream_that_ends_unevenly_ends_for_all_ranks(exchange: str, tmp_path: Path):
    keys = {"data": {"name": f"{HERE}:stream", "passes": 1, "test": 2}, "exchange": exchange}
    # The fifth step has five samples, all of the first two ranks.
    ranks = run_ranks(train, 3, [(keys, tmp_path / "run", False, None)])
    batches = stream_batches(JOB | keys | {"exchange": "none"}, 12)
    assert [len(batch) for batch in batches] == [8, 8, 8, 8, 5]
    for (result,) in ranks:
        assert result["summary"]["steps"] == 5 and result["summary"]["finished"]
        if exchange == "native":
            expected = alone(batches, JOB)
            np.testing.assert_allclose(result["state"], expected, rtol=1e-4, atol=1e-6)
    assert [result["records"][-1].samples for (result,) in ranks] == [2, 3, 0]
    assert ranks[0][0]["summary"]["test_loss"] is not None


def left_out(step: int, rank: int, size: int) -> list[int]:
    """Unreadable samples of a rank's share of a step."""
    indices = GlobalBatches(24, 8, seed=0).share(step, rank, size).tolist()
    return [index for index in indices if index in UNREADABLE]


@pytest.mark.slow
def test_unreadable_samples_are_left_out_and_the_mean_is_over_the_others(tmp_path: Path):
    keys = {"data": f"{HERE}:holed", "bad_samples": {"skip": 12}, "steps": 9}
    few = keys | {"bad_samples": {"skip": 6}}
    runs = [(keys, tmp_path / "run", False, None)]
    size = 4  # so that a rank has two samples a step
    train_set, _ = jobs.vectors(samples=24, test_samples=9)
    order = GlobalBatches(24, 8, seed=0)
    batches = []
    for step in range(9):
        indices = [index for index in order.indices(step).tolist() if index not in UNREADABLE]
        batches.append([train_set[index] for index in indices])
    ranks = run_ranks(train, size, runs)
    for rank, (result,) in enumerate(ranks):
        np.testing.assert_allclose(result["state"], alone(batches, JOB), rtol=1e-4, atol=1e-6)
        assert result["summary"]["bad_samples"] == 12 and result["summary"]["steps"] == 9
        assert result["summary"]["test_bad_samples"] == 3
        for step, record in enumerate(result["records"]):
            bad = left_out(step, rank, size)
            assert record.samples == 2 - len(bad)
            expected = [
                f"data: sample {index} cannot be read: OSError: no file {index}" for index in bad
            ]
            assert record.bad_samples == expected
    # The limit is that of all ranks together.
    with pytest.raises(AssertionError, match=r"bad_samples.skip: [78] samples could not be read"):
        run_ranks(train, 2, [(few, tmp_path / "few", False, None)])


def feed(tree: dict[str, Any]) -> Any:
    run = config.check(JOB | tree)
    data = workload.build(run, torch.device("cpu")).data
    return open_feed(run, World(0, 1, 0, 1), data, 8)


def test_a_stream_has_no_epochs():
    with pytest.raises(UserError, match=r"epochs: .* a stream.* \(allowed: steps\)"):
        feed({"steps": None, "epochs": 2})


def test_the_limit_of_unreadable_samples_holds_for_the_whole_run():
    reading = feed({"data": f"{HERE}:holed", "bad_samples": {"skip": 5}})
    reading.start(3, {"left_out": 4})
    reading.count_left_out(1)
    reading.check_left_out()
    assert reading.position() == {"left_out": 5}
    reading.count_left_out(1)
    with pytest.raises(TrainingError, match=r"6 samples could not be read \(allowed: 5;"):
        reading.check_left_out()


def test_a_rank_that_never_had_a_sample_says_why():
    reading = feed({"data": f"{HERE}:nothing", "bad_samples": {"skip": 50}})
    reading.start(0, {})
    with pytest.raises(TrainingError, match=r"OSError: no file .* has no sample to begin with"):
        reading.next()


def nothing() -> tuple[Dataset, Dataset]:
    train_set, test = jobs.vectors(samples=24)
    return Holed(train_set, range(24)), test

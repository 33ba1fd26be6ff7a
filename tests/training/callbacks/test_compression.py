"""Tests of prune and share_weights against plain loops of torch, and of the export."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from scaletrain import compression, config
from scaletrain.errors import UserError
from scaletrain.training import weights, workload
from scaletrain.training.batches import GlobalBatches
from tests.ranks import run_ranks
from tests.training import jobs

JOB: dict[str, Any] = {
    "model": {"name": "mlp", "sizes": [8, 24, 4]},
    "data": "tests.training.jobs:vectors",
    "batch_size": 16,
    "steps": 12,
    "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
    "exchange": "native",
    "checkpoint": {"every_steps": 100},
}
PRUNE = {"name": "prune", "keep": 0.25, "layers": {"3.*": 0.5}, "begin": 2, "end": 6, "every": 2}
SHARE = {"name": "share_weights", "values": 4, "layers": {"3.*": 3}, "begin": 8}


def pruned_alone() -> dict[str, torch.Tensor]:
    """Weights after a plain loop that keeps fewer and fewer weights after steps 2, 4 and 6."""
    run = config.check(JOB)
    parts = workload.build(run, torch.device("cpu"))
    assert isinstance(parts.data.train, torch.utils.data.TensorDataset)
    layers = {"1.weight": 0.25, "3.weight": 0.5}
    named = dict(parts.model.named_parameters())
    masks = {name: torch.ones_like(named[name]) for name in layers}
    order = GlobalBatches(len(parts.data.train), 16, run.seed)
    for step in range(12):
        inputs, targets = parts.data.train[order.indices(step)]
        parts.optimizer.zero_grad()
        nn.functional.cross_entropy(parts.model(inputs), targets).backward()
        for name, mask in masks.items():
            named[name].grad *= mask  # type: ignore[operator]
        parts.optimizer.step()
        for name, keep in layers.items():
            if step + 1 in (2, 4, 6):
                left = {2: 1.0, 4: 0.5, 6: 0.0}[step + 1]
                count = round((keep + (1 - keep) * left**3) * masks[name].numel())
                sizes = (named[name] * masks[name]).abs().flatten()
                kept = sizes.argsort(descending=True)[:count]
                masks[name] = torch.zeros_like(sizes).index_fill(0, kept, 1.0).view_as(masks[name])
            named[name].data *= masks[name]
    return {name: value.detach() for name, value in parts.model.state_dict().items()}


@pytest.mark.parametrize("workers", [1, 2])
def test_pruning_equals_a_plain_loop_on_any_number_of_workers(workers: int, tmp_path: Path):
    job = JOB | {"callbacks": [PRUNE]}
    found = run_ranks(jobs.train_rank, workers, job, tmp_path)
    expected = pruned_alone()
    for rank in found:
        for name, value in expected.items():
            assert rank["state"][name].tobytes() == found[0]["state"][name].tobytes()
            np.testing.assert_allclose(rank["state"][name], value, rtol=1e-4, atol=1e-6)
    state = found[0]["state"]
    assert (state["1.weight"] != 0).sum() == 48 and (state["3.weight"] != 0).sum() == 48
    assert (state["1.bias"] != 0).all()


def shared_alone(start: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Weights after steps 8 to 11 of a loop whose parameters are the shared values themselves."""
    run = config.check(JOB)
    parts = workload.build(run, torch.device("cpu"))
    assert isinstance(parts.data.train, torch.utils.data.TensorDataset)
    order = GlobalBatches(len(parts.data.train), 16, run.seed)
    tensors = {name: torch.from_numpy(value.copy()) for name, value in start.items()}
    books, members = {}, {}
    for name, count in (("1.weight", 4), ("3.weight", 3)):
        kept = tensors[name][tensors[name] != 0].numpy()
        centres = compression.cluster(kept, count)
        nearest = np.abs(tensors[name].numpy()[..., None] - centres).argmin(-1)
        is_kept = tensors[name].numpy() != 0
        # The last entry of the book is the zero of pruned weights, and is not trained.
        members[name] = torch.from_numpy(np.where(is_kept, nearest, len(centres)))
        books[name] = torch.tensor(centres, dtype=torch.float32, requires_grad=True)
        del tensors[name]
    for tensor in tensors.values():
        tensor.requires_grad_(True)
    optimizer = torch.optim.SGD([*books.values(), *tensors.values()], lr=0.01)

    def built() -> dict[str, torch.Tensor]:
        zero = torch.zeros(1)
        return tensors | {
            name: torch.cat([book, zero])[members[name]] for name, book in books.items()
        }

    for step in range(8, 12):
        inputs, targets = parts.data.train[order.indices(step)]
        optimizer.zero_grad()
        output = torch.func.functional_call(parts.model, built(), inputs)
        nn.functional.cross_entropy(output, targets).backward()
        optimizer.step()
    return {name: value.detach() for name, value in built().items()}


@pytest.mark.parametrize("workers", [1, 2])
def test_shared_values_follow_the_gradient_of_the_codebook(workers: int, tmp_path: Path):
    """The reference differentiates the codebook itself: its gradient is the sum, not the mean."""
    job = JOB | {"optimizer": {"name": "sgd", "lr": 0.01}, "exchange": "native"}
    before = tmp_path / "before"
    before.mkdir()
    pruning = job | {"callbacks": [PRUNE], "steps": 8}
    start = jobs.train_rank(0, 1, pruning, before)["state"]
    found = run_ranks(jobs.train_rank, workers, job | {"callbacks": [PRUNE, SHARE]}, tmp_path)
    expected = shared_alone(start)
    for rank in found:
        for name, value in expected.items():
            assert rank["state"][name].tobytes() == found[0]["state"][name].tobytes()
            np.testing.assert_allclose(rank["state"][name], value, rtol=1e-4, atol=1e-6)
    assert len(np.unique(found[0]["state"]["1.weight"])) == 5  # four and zero
    assert len(np.unique(found[0]["state"]["3.weight"])) == 4


@pytest.mark.parametrize("stop_at", [4, 10])
def test_masks_and_clusters_survive_a_resume(stop_at: int, tmp_path: Path):
    job = JOB | {"callbacks": [PRUNE, SHARE], "optimizer": {"name": "adam", "lr": 0.01}}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    expected = jobs.train_rank(0, 1, job, whole)["state"]
    jobs.train_rank(0, 1, job, parts, stop_at=stop_at)
    resumed = jobs.train_rank(0, 1, job, parts, resume=True)["state"]
    for name, value in expected.items():
        assert value.tobytes() == resumed[name].tobytes(), name


def test_the_export_is_small_and_begins_another_run(tmp_path: Path):
    job = JOB | {
        "model": {"name": "mlp", "sizes": [8, 600, 4]},
        "callbacks": [PRUNE, SHARE, "compress"],
    }
    trained = jobs.train_rank(0, 1, job, tmp_path)["state"]
    out = tmp_path / "small.safetensors"
    line = weights.export(tmp_path, out, compress=True)
    # The callback writes the same at the end of a run.
    assert (tmp_path / "compressed.safetensors").read_bytes() == out.read_bytes()
    dense = sum(value.nbytes for value in trained.values())
    ratio = dense / out.stat().st_size
    assert ratio > 5 and f"({ratio:.1f} times smaller)" in line
    for name, value in compression.load(out).items():
        assert value.numpy().tobytes() == trained[name].tobytes()
    fresh = workload.build(config.check(job), torch.device("cpu")).model
    weights.load(config.schema.InitFrom(path=str(out)), fresh)
    for name, value in fresh.state_dict().items():
        assert value.numpy().tobytes() == trained[name].tobytes()
    with pytest.raises(UserError, match="--compress"):
        weights.export(tmp_path, tmp_path / "small.pt", compress=True)


@pytest.mark.parametrize("name", ["prune", "share_weights"])
def test_a_pattern_that_matches_no_weight_is_refused(name: str, tmp_path: Path):
    job = JOB | {"callbacks": [{"name": name, "layers": {"1.bias": 1}}], "exchange": "none"}
    with pytest.raises(UserError, match=f"{name}.layers: '1.bias' matches no weight"):
        jobs.train_rank(0, 1, job, tmp_path)


@pytest.mark.parametrize("named", [PRUNE, SHARE], ids=["prune", "share_weights"])
@pytest.mark.parametrize("mode", ["sync", "async", "local_sgd"])
def test_weights_of_servers_are_refused(named: dict[str, Any], mode: str):
    """Bug it catches: zeros on the workers, and the servers' own weights in the next step."""
    job = JOB | {"exchange": {"name": "parameter_server", "mode": mode}}
    with pytest.raises(UserError, match=f"{named['name']} changes weights .* the servers'"):
        config.check(job | {"callbacks": [named]})

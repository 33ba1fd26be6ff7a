"""Tests of training/emulation.py.

Emulated accelerators wait as long as they are told, and move real gradients while they do.
"""

import itertools
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from scaletrain.training.emulation import FORWARD_SHARE, SLOWDOWN, emulate
from scaletrain.training.models import digits_cnn, mlp, shapes
from tests.ranks import run_ranks


def timed_pass(model: nn.Module, inputs: torch.Tensor, classes: int = 10) -> tuple[float, float]:
    targets = torch.zeros(len(inputs), dtype=torch.long)
    began = time.monotonic()
    loss = nn.functional.cross_entropy(model(inputs), targets)
    middle = time.monotonic()
    loss.backward()
    return middle - began, time.monotonic() - middle


def quickest_pass(model: nn.Module, inputs: torch.Tensor) -> tuple[float, float]:
    """Of five: a busy machine makes a wait longer, never shorter."""
    return min((timed_pass(model, inputs) for _ in range(5)), key=sum)


def test_a_pass_takes_its_time_and_sleeps():
    model = emulate(mlp.model(), step_s=0.2, sample_s=0.01)
    inputs = torch.zeros(10, 1, 8, 8)
    timed_pass(model, inputs)  # learns the output's shape
    processor = time.process_time()
    forward, backward = quickest_pass(model, inputs)
    assert (
        forward == pytest.approx(0.3 * FORWARD_SHARE, abs=0.05) and forward >= 0.3 * FORWARD_SHARE
    )
    assert forward + backward == pytest.approx(0.3, abs=0.06) and forward + backward >= 0.299
    assert time.process_time() - processor < 0.5, "of 1.5 s"


def test_gradients_have_the_true_sizes_and_depend_on_the_loss():
    model = emulate(digits_cnn.model(), 0.0, 0.0)
    real = digits_cnn.model()
    assert [p.shape for p in model.parameters()] == [p.shape for p in real.parameters()]
    inputs, targets = torch.zeros(4, 1, 8, 8), torch.tensor([0, 0, 1, 2])
    for scale in (1.0, 3.0):
        model.zero_grad()
        (scale * nn.functional.cross_entropy(model(inputs), targets)).backward()
        # Zero logits: the gradient of the first one is softmax - share of class 0, over the batch.
        expected = scale * (0.1 - 0.5) / sum(p.numel() for p in real.parameters())
        for parameter in model.parameters():
            torch.testing.assert_close(parameter.grad, torch.full_like(parameter, expected))


def test_layers_get_their_gradients_one_after_the_other_last_first():
    model = emulate(mlp.model(sizes=[4, 4, 4, 4]), step_s=0.3)
    order: list[tuple[str, float]] = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda _, name=name: order.append((name, time.monotonic()))
        )
    timed_pass(model, torch.zeros(1, 4))
    weights = [(name, at) for name, at in order if name.endswith("weight")]
    assert [name for name, _ in weights] == ["inner.5.weight", "inner.3.weight", "inner.1.weight"]
    gaps = [later - earlier for (_, earlier), (_, later) in itertools.pairwise(weights)]
    assert sum(gaps) >= 0.12 and min(gaps) > 0.03, gaps


def test_time_follows_the_work_of_the_layers():
    model = emulate(shapes.model(preset="lenet"), step_s=0.3)
    shares = [share for _, share in model._layers]
    work = [500 * 24**2, 25_000 * 8**2, 400_000, 5_000]
    assert shares == pytest.approx([w / sum(work) for w in work])


def test_a_straggler_is_slower_and_may_change_while_it_runs(tmp_path, monkeypatch):
    path = tmp_path / "slowdown"
    monkeypatch.setenv(SLOWDOWN, str(path))
    model = emulate(mlp.model(sizes=[4, 10]), step_s=0.1)
    for factor in (1.0, 2.5):
        path.write_text(f"{factor}\n")
        assert sum(quickest_pass(model, torch.zeros(2, 4))) == pytest.approx(0.1 * factor, abs=0.05)


def test_evaluation_does_not_ask_for_gradients():
    model = emulate(digits_cnn.model(), 0.0, 0.0).eval()
    with torch.no_grad():
        output = model(torch.zeros(5, 1, 8, 8))
    assert output.shape == (5, 10) and not output.requires_grad


def _overlap(rank: int, size: int, store: str) -> tuple[float, float, float]:
    """Seconds of a step without exchange, of one with, and the first gradient after an exchange of
    different contributions.
    """
    dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size)
    emulated = emulate(mlp.model(sizes=[8, *[64] * 6, 10]), step_s=0.3)
    model = DistributedDataParallel(emulated, bucket_cap_mb=0.01)

    # A thread of its own: were the callback left to gloo's, its last moments could meet those of
    # the process group, which waits for that thread while it holds the interpreter lock that the
    # callback's end needs.
    link = ThreadPoolExecutor(1)

    def slow_exchange(state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        buffer, there = bucket.buffer().div_(size), torch.futures.Future()
        work = dist.all_reduce(buffer, async_op=True)

        def cross() -> None:
            work.wait()
            time.sleep(0.02)  # a link that takes 20 ms a bucket
            there.set_result(buffer)

        link.submit(cross)
        return there

    model.register_comm_hook(None, slow_exchange)
    seconds = []
    for _ in range(4):
        model.zero_grad()
        seconds.append(sum(timed_pass(model, torch.full((2, 8), 1.0))))
    (model(torch.zeros(1, 8))[:, 0].sum() * (rank + 1)).backward()
    gradient = next(emulated.parameters()).grad.flatten()[0].item()
    num_weights = sum(p.numel() for p in emulated.parameters())
    dist.destroy_process_group()
    return min(seconds[2:]), gradient, num_weights


@pytest.mark.slow
def test_an_exchange_overlaps_the_wait_and_averages_real_gradients(tmp_path):
    for step_s, gradient, num_weights in run_ranks(_overlap, 2, str(tmp_path / "store")):
        assert 0.3 <= step_s < 0.3 + 0.08  # 7 buckets of 20 ms, of which only the last is exposed
        # zero_grad was not called in between: the last step's gradient, then the mean of 1 and 2
        # over the weights.
        first = (0.1 - 1.0) / num_weights
        assert gradient == pytest.approx(first + 1.5 / num_weights, rel=1e-4)

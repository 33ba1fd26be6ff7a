"""What each of 2 workers runs in test_horovod.py: the exchange against a single process on the same
global batches.

Every rank computes the reference itself, on all samples; for the exchange it has only its own.
"""

import copy
import sys
from datetime import timedelta
from pathlib import Path

import torch
from torch import nn

from scaletrain import plugins
from scaletrain.engine import rendezvous
from scaletrain.timeouts import Timeouts
from scaletrain.training.exchange import Setup
from scaletrain.world import World

world = World.from_env()
timeout = timedelta(seconds=30)
run_dir = Path(sys.argv[1])  # one for both: the job's key lies there
exchange = plugins.load("exchange", "horovod")(
    world,
    Setup(rendezvous.join(world, run_dir, timeout), torch.device("cpu"), Timeouts(30.0), run_dir),
)


def model_of(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(8, 6, generator=generator), torch.randn(8, 3, generator=generator)


def reference_steps(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x, y = batch(step)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()


def exchange_steps(model: nn.Module, attached: nn.Module, steps: range, parts: int = 1) -> None:
    for step in steps:
        x, y = (tensor[world.rank :: world.size] for tensor in batch(step))
        model.zero_grad()
        pieces = [*zip(x.chunk(parts), y.chunk(parts), strict=True)]
        for index, (inputs, targets) in enumerate(pieces):
            loss = nn.functional.mse_loss(attached(inputs), targets) / parts
            if index < parts - 1:
                with exchange.accumulate(attached):
                    loss.backward()
            else:
                loss.backward()
        exchange.step(attached)


def same(one: nn.Module, other: nn.Module, what: str) -> None:
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5, msg=lambda text: f"{what}: {text}")


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


def no_hidden_step() -> None:
    """A fresh optimizer with weight decay: after attach the weights are rank 0's to the bit, and
    there is no state yet.
    """
    model, expected = model_of(world.rank), model_of(0)
    optimizer = adam(model)
    attached = exchange.attach(model, optimizer)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True)
    ), "weights moved"
    assert not optimizer.state, "attach took a step"
    reference_steps(expected, adam(expected), range(3))
    exchange_steps(model, attached, range(3))
    same(model, expected, "fresh optimizer")


def no_dropped_state() -> None:
    """A resumed optimizer: its moments survive attach."""
    expected = model_of(0)
    reference = adam(expected)
    reference_steps(expected, reference, range(5))
    model = copy.deepcopy(expected)
    optimizer = adam(model)
    optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
    attached = exchange.attach(model, optimizer)
    assert len(optimizer.state) == 4, "the loaded state is gone"
    reference_steps(expected, reference, range(5, 8))
    exchange_steps(model, attached, range(5, 8))
    same(model, expected, "resumed optimizer")


def no_hang_after_an_extra_operation() -> None:
    """Rank 0 does one operation more than the others, as a person's logging might: unnamed ones
    would no longer match.
    """
    import horovod.torch as hvd

    model, expected = model_of(world.rank), model_of(0)
    optimizer = adam(model)
    if world.rank == 0:
        hvd.allreduce_async(torch.ones(1))
    attached = exchange.attach(model, optimizer)
    exchange_steps(model, attached, range(2))
    reference_steps(expected, adam(expected), range(2))
    same(model, expected, "after an extra operation")
    total = exchange.sum(torch.tensor([1.0 + world.rank, 10.0]))
    assert total.tolist() == [3.0, 20.0], total


def accumulation() -> None:
    model, expected = model_of(world.rank), model_of(0)
    attached = exchange.attach(model, adam(model))
    exchange_steps(model, attached, range(3), parts=2)
    reference_steps(expected, adam(expected), range(3))
    same(model, expected, "accumulated gradients")


class Branches(nn.Module):
    """Rank 0 uses one layer only, rank 1 both: a parameter without a gradient on one rank still
    takes part.
    """

    def __init__(self):
        super().__init__()
        self.always, self.sometimes = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor, both: bool) -> torch.Tensor:
        return self.always(x) + (self.sometimes(x) if both else 0)


def unused_parameters() -> None:
    torch.manual_seed(0)
    model = Branches()
    before = copy.deepcopy(model)
    attached = exchange.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    x, y = (tensor[world.rank :: world.size] for tensor in batch(0))
    nn.functional.mse_loss(attached(x, world.rank == 1), y).backward()
    exchange.step(attached)
    grads = []
    for rank in range(2):
        twin = copy.deepcopy(before)
        x, y = (tensor[rank::2] for tensor in batch(0))
        nn.functional.mse_loss(twin(x, rank == 1), y).backward()
        grads.append([torch.zeros_like(p) if p.grad is None else p.grad for p in twin.parameters()])
    with torch.no_grad():
        for parameter, first, second in zip(before.parameters(), *grads, strict=True):
            parameter -= 0.1 * (first + second) / 2
    same(model, before, "unused parameters")


def odd_gradients() -> None:
    """Not contiguous, and bfloat16: Horovod refuses both on the CPU; the exchange brings them into
    a form that it takes.
    """
    weight = nn.Parameter(torch.ones(6, 4).t())
    narrow = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    model = nn.ParameterDict({"weight": weight, "narrow": narrow})
    attached = exchange.attach(model, torch.optim.SGD(model.parameters(), lr=1.0))
    factor = (torch.arange(24.0).view(6, 4) * (1 + world.rank)).t()
    (weight * factor).sum().backward()
    (narrow * (2.0 + 2 * world.rank)).sum().backward()
    assert weight.grad is not None and not weight.grad.is_contiguous()
    exchange.step(attached)
    torch.testing.assert_close(weight.data, 1 - torch.arange(24.0).view(6, 4).t() * 1.5)
    torch.testing.assert_close(narrow.data, torch.full((8,), -2.0, dtype=torch.bfloat16))


cases = [
    no_hidden_step,
    no_dropped_state,
    accumulation,
    unused_parameters,
    odd_gradients,
    no_hang_after_an_extra_operation,
]
for case in cases:
    case()
    if world.rank == 0:
        print("passed", case.__name__, flush=True)

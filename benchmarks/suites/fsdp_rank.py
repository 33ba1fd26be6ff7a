"""One rank of ``python -m benchmarks.lab fsdp``: FSDP2 over our backend beside gloo, in turns.

Both wrap the same model in the same processes and train on the same batch. After each block of
steps over one backend, the same number runs over the other.

Usage: ``scaletrain launch -n WORKERS -- benchmarks/suites/fsdp_rank.py MODEL BLOCKS OUT``
"""

import copy
import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from scaletrain.training.models import gpt

BLOCK = 4  # steps of one kind in a row
WARMUP = 2  # blocks left out


def perceptron() -> tuple[nn.Module, list[nn.Module], torch.Tensor]:
    """Return eight layers of 1 MiB each: communication is most of a step."""
    layers = [nn.Sequential(nn.Linear(512, 512), nn.ReLU()) for _ in range(8)]
    return nn.Sequential(*layers), [*layers], torch.randn(32, 512)


def transformer() -> tuple[nn.Module, list[nn.Module], torch.Tensor]:
    """Return a small GPT: its computing is most of a step."""
    module = gpt.model(width=256, layers=4)
    assert isinstance(module, gpt.GPT)
    return module, [*module.blocks], torch.randint(0, 97, (8, 64))


MODELS = {"perceptron": perceptron, "transformer": transformer}


class Training:
    """A sharded model and its optimizer. Collective."""

    def __init__(
        self,
        module: nn.Module,
        layers: list[nn.Module],
        inputs: torch.Tensor,
        group: dist.ProcessGroup,
    ):
        # A copy of both: the layers are the module's own.
        self._module, layers = copy.deepcopy((module, layers))
        mesh = DeviceMesh.from_group(group, "cpu")
        for each in (*layers, self._module):
            fully_shard(each, mesh=mesh)
        self._optimizer = torch.optim.SGD(self._module.parameters(), lr=1e-3)
        self._inputs = inputs

    def block(self) -> float:
        """Do some steps, and return the seconds of one."""
        began = time.perf_counter()
        for _ in range(BLOCK):
            self._module(self._inputs).square().mean().backward()
            self._optimizer.step()
            self._optimizer.zero_grad()
        return (time.perf_counter() - began) / BLOCK

    def weights(self) -> list[torch.Tensor]:
        """Return the whole weights."""
        return [parameter.full_tensor() for parameter in self._module.parameters()]


def main(model: str, blocks: int, out: Path) -> None:
    """Run both in turns; rank 0 writes OUT: seconds a step of each block."""
    torch.set_num_threads(1)
    dist.init_process_group("scaletrain")
    torch.manual_seed(0)
    parts = MODELS[model]()
    over = {
        "scaletrain": Training(*parts, dist.group.WORLD),
        "gloo": Training(*parts, dist.new_group(backend="gloo")),
    }
    times: dict[str, list[float]] = {name: [] for name in over}
    for number in range(WARMUP + blocks):
        # Turned round each time: a machine that drifts favours neither.
        for name in sorted(over, reverse=bool(number % 2)):
            dist.barrier()
            times[name].append(over[name].block())
    for ours, theirs in zip(*(each.weights() for each in over.values()), strict=True):
        torch.testing.assert_close(ours, theirs)
    if dist.get_rank() == 0:
        kept = {name: values[WARMUP:] for name, values in times.items()}
        out.write_text(json.dumps(kept), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))

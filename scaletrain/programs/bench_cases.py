"""What ``scaletrain bench collectives`` times: a collective, its tensors, and the right results.

The size of a case is that of the whole tensor: of an all-gather the gathered one, of a
reduce-scatter the one before.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# 251 is prime: chunks whose lengths are powers of two begin with different values, so one that
# lands in a wrong place shows. Sums of the values are small enough to be exact in float32.
_PERIOD = 251


class Case:
    """A collective on tensors of one size. Every rank creates one.

    Args:
        group: the ranks.
        num_bytes: size of the whole tensor.
        device: where the tensors are.
    """

    collective = ""

    def __init__(self, group: Any, num_bytes: int, device: torch.device):
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        # float32, in equal parts for all ranks.
        self.part_count = max(1, num_bytes // 4 // self.size)
        count = max(1, num_bytes // 4)
        if self.collective not in ("all_reduce", "broadcast", "reduce"):
            count = self.part_count * self.size
        self.tensor = torch.zeros(count, device=device)
        self.part = torch.zeros(self.part_count, device=device)

    def run(self) -> None:
        """Run the collective. Collective."""
        raise NotImplementedError

    def wrong_elements(self) -> int:
        """Run it on values that differ between the ranks; return how many came out wrong."""
        self.fill()
        self.run()
        result, expected = self.outcome()
        return int((result.cpu() != expected).sum())

    def fill(self) -> None:
        """Write values that only this rank could give."""
        self.tensor.copy_(self.values(self.rank))
        self.part.copy_(self.values(self.rank)[: self.part_count])

    def outcome(self) -> tuple[Tensor, Tensor]:
        """Return the result on this rank, and what it must be."""
        raise NotImplementedError

    def rest(self) -> None:
        """Write zeros: repeated sums of other values would overflow."""
        self.tensor.zero_()
        self.part.zero_()

    def values(self, rank: int) -> Tensor:
        """Return the values of a rank, as many as the whole tensor has."""
        return (torch.arange(self.tensor.numel()) % _PERIOD + rank).float()

    def total(self) -> Tensor:
        """Return the sum of the values of all ranks."""
        numbers = torch.arange(self.tensor.numel()) % _PERIOD
        return (self.size * numbers + self.size * (self.size - 1) // 2).float()

    def mine(self, whole: Tensor) -> Tensor:
        """Return this rank's part of a whole tensor."""
        return whole[self.rank * self.part_count : (self.rank + 1) * self.part_count]


class _AllReduce(Case):
    collective = "all_reduce"

    def run(self) -> None:
        dist.all_reduce(self.tensor, group=self.group)

    def outcome(self) -> tuple[Tensor, Tensor]:
        return self.tensor, self.total()


class _Broadcast(Case):
    collective = "broadcast"

    def run(self) -> None:
        dist.broadcast(self.tensor, 0, group=self.group)

    def outcome(self) -> tuple[Tensor, Tensor]:
        return self.tensor, self.values(0)


class _Reduce(Case):
    collective = "reduce"

    def run(self) -> None:
        dist.reduce(self.tensor, 0, group=self.group)

    def outcome(self) -> tuple[Tensor, Tensor]:
        # The other ranks' tensors are left to the backend.
        return (self.tensor, self.total()) if self.rank == 0 else (self.part[:0], self.part[:0])


class _AllGather(Case):
    collective = "all_gather"

    def run(self) -> None:
        dist.all_gather_into_tensor(self.tensor, self.part, group=self.group)

    def outcome(self) -> tuple[Tensor, Tensor]:
        parts = [self.values(rank)[: self.part_count] for rank in range(self.size)]
        return self.tensor, torch.cat(parts)


class _ReduceScatter(Case):
    collective = "reduce_scatter"

    def run(self) -> None:
        dist.reduce_scatter_tensor(self.part, self.tensor, group=self.group)

    def outcome(self) -> tuple[Tensor, Tensor]:
        return self.part, self.mine(self.total())


class _AllToAll(Case):
    collective = "all_to_all"

    def __init__(self, group: Any, num_bytes: int, device: torch.device):
        super().__init__(group, num_bytes, device)
        self._received = torch.zeros_like(self.tensor)

    def run(self) -> None:
        dist.all_to_all_single(self._received, self.tensor, group=self.group)

    def outcome(self) -> tuple[Tensor, Tensor]:
        parts = [self.mine(self.values(rank)) for rank in range(self.size)]
        return self._received, torch.cat(parts)


class _Gather(Case):
    collective = "gather"

    def run(self) -> None:
        into = list(self.tensor.chunk(self.size)) if self.rank == 0 else None
        dist.gather(self.part, into, 0, group=self.group)

    def outcome(self) -> tuple[Tensor, Tensor]:
        if self.rank > 0:
            return self.part[:0], self.part[:0]
        parts = [self.values(rank)[: self.part_count] for rank in range(self.size)]
        return self.tensor, torch.cat(parts)


class _Scatter(Case):
    collective = "scatter"

    def run(self) -> None:
        parts = list(self.tensor.chunk(self.size)) if self.rank == 0 else None
        dist.scatter(self.part, parts, 0, group=self.group)

    def outcome(self) -> tuple[Tensor, Tensor]:
        return self.part, self.mine(self.values(0))


class _SendRecv(Case):
    """Each rank sends to the next one while it receives from the one before."""

    collective = "send_recv"

    def __init__(self, group: Any, num_bytes: int, device: torch.device):
        super().__init__(group, num_bytes, device)
        self._received = torch.zeros_like(self.tensor)
        self._before = (self.rank - 1) % self.size
        after = (self.rank + 1) % self.size
        self._pair = [
            dist.P2POp(dist.isend, self.tensor, group=group, group_peer=after),
            dist.P2POp(dist.irecv, self._received, group=group, group_peer=self._before),
        ]

    def run(self) -> None:
        for work in dist.batch_isend_irecv(self._pair):
            work.wait()

    def outcome(self) -> tuple[Tensor, Tensor]:
        return self._received, self.values(self._before)


class _Barrier(Case):
    collective = "barrier"

    def run(self) -> None:
        dist.barrier(self.group)

    def outcome(self) -> tuple[Tensor, Tensor]:
        return self.part[:0], self.part[:0]


class _FsdpStep(Case):
    """Forward, backward and update of a sharded model whose parameters have the case's size."""

    collective = "fsdp_step"
    _LAYERS = 4
    _SAMPLES = 16

    def __init__(self, group: Any, num_bytes: int, device: torch.device):
        super().__init__(group, num_bytes, device)
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import fully_shard

        width = max(8, math.isqrt(num_bytes // 4 // self._LAYERS))
        torch.manual_seed(0)
        layers = [nn.Linear(width, width, bias=False) for _ in range(self._LAYERS)]
        self._alone = nn.Sequential(*layers).to(device)
        torch.manual_seed(0)
        layers = [nn.Linear(width, width, bias=False) for _ in range(self._LAYERS)]
        self._model = nn.Sequential(*layers).to(device)
        mesh = DeviceMesh.from_group(group, device.type)
        for layer in self._model:
            fully_shard(layer, mesh=mesh)
        fully_shard(self._model, mesh=mesh)
        self._optimizer = torch.optim.SGD(self._model.parameters(), 0.1)
        generator = torch.Generator().manual_seed(1)
        shape = (self.size, self._SAMPLES, width)
        self._inputs = torch.randn(shape, generator=generator).to(device)

    def run(self) -> None:
        self._model(self._inputs[self.rank]).square().mean().backward()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def wrong_elements(self) -> int:
        """Do a step; return how many weights are not those of one process with all samples."""
        self.run()
        self._alone(self._inputs).square().mean().backward()
        wrong = 0
        for weight, alone in zip(self._model.parameters(), self._alone.parameters(), strict=True):
            assert alone.grad is not None
            alone.data -= 0.1 * alone.grad
            alone.grad = None
            full = weight.full_tensor()  # type: ignore[attr-defined]
            wrong += int((~torch.isclose(full, alone, rtol=1e-3, atol=1e-5)).sum())
        return wrong

    def rest(self) -> None:
        """Leave the weights as they are."""


CASES: dict[str, type[Case]] = {
    case.collective: case
    for case in (
        _AllReduce,
        _Broadcast,
        _Reduce,
        _AllGather,
        _ReduceScatter,
        _AllToAll,
        _Gather,
        _Scatter,
        _SendRecv,
        _Barrier,
        _FsdpStep,
    )
}

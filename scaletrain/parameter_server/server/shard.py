"""What one server owns: weights, gradient sums and optimizers of its blocks, and their snapshots."""

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from scaletrain.parameter_server.protocol import optimizer as optimizers
from scaletrain.parameter_server.protocol.memory import SUPPORTED, Slab
from scaletrain.parameter_server.protocol.sharding import Block, layout

_SCHEDULED = "scheduled_updates"
_FORMAT = "scaletrain-parameter-server-1"


class Shard:
    """Blocks with their optimizers. Weights are float32, whatever travels; dense ones lie in one slab that workers may map."""

    def __init__(
        self,
        blocks: Iterable[Block],
        optimizer: dict[str, Any],
        schedule: dict[str, Any] | None,
        shared: bool,
    ):
        self.blocks = {block.key: block for block in blocks}
        self._place = {key: place for place, key in enumerate(sorted(self.blocks))}
        self.starts, self.dense_elements = layout(list(self.blocks.values()))
        self.slab = (
            Slab.create(self.dense_elements, len(self.blocks)) if shared and SUPPORTED else None
        )
        slab = torch.from_numpy(self.slab.floats) if self.slab else torch.zeros(self.dense_elements)
        self._flat: dict[int, Tensor] = {}
        self._weights: dict[int, nn.Parameter] = {}
        self._optimizers: dict[int, torch.optim.Optimizer] = {}
        self._schedules: dict[int, Any] = {}
        for key, block in self.blocks.items():
            flat = (
                torch.zeros(block.numel)
                if block.sparse
                else slab[self.starts[key] : self.starts[key] + block.numel]
            )
            self._flat[key] = flat
            self._weights[key] = nn.Parameter(flat.view(block.shape or (block.numel,)))
            self._optimizers[key] = optimizers.build(optimizer, block.group, self._weights[key])
            if schedule:
                self._schedules[key] = optimizers.scheduler(schedule, self._optimizers[key])
        self._first: dict[int, Tensor] = {}  # a block's only gradient so far, where it arrived
        self._sum: dict[int, Tensor] = {}  # allocated when a second one comes
        self._sparse: dict[int, list[tuple[Tensor, Tensor]]] = {}

    @property
    def num_parameters(self) -> int:
        return sum(block.numel for block in self.blocks.values())

    @property
    def num_bytes(self) -> int:
        """Parameters and optimizer state."""
        states = [
            value
            for optimizer in self._optimizers.values()
            for state in optimizer.state.values()
            for value in state.values()
        ]
        return 4 * self.num_parameters + sum(
            value.nbytes for value in states if isinstance(value, Tensor)
        )

    def store(self, key: int, offset: int, values: Tensor) -> None:
        """Set part of a block's weights."""
        self._flat[key][offset : offset + len(values)] = values

    def part(self, key: int, offset: int, count: int) -> Tensor:
        """Part of a block's weights: live memory, copy it before the next update."""
        return self._flat[key][offset : offset + count]

    def state_tensors(self, key: int) -> list[Tensor]:
        """The tensors of a block's optimizer, flat, in the order of their names."""
        return [value.reshape(-1) for _, value in sorted(self.state(key)[0].items())]

    def rows(self, key: int, rows: Tensor) -> Tensor:
        """Copies of rows of a sparse table, (len(rows), width)."""
        return self._weights[key].detach().index_select(0, rows)

    def add(self, key: int, gradient: Tensor, sums: int) -> None:
        """Add a dense gradient. It is kept where it is until a second one comes: the caller must not change it before ``apply``.

        ``sums`` counts the gradients since the last update, this one included.
        """
        if sums == 1:
            self._first[key] = gradient
        elif sums == 2:
            if key not in self._sum:
                self._sum[key] = torch.empty_like(self._flat[key])
            torch.add(self._first.pop(key), gradient, out=self._sum[key])
        else:
            self._sum[key].add_(gradient)

    def add_rows(self, key: int, rows: Tensor, values: Tensor) -> None:
        """Add a sparse gradient: (n) row numbers, (n, width) values."""
        self._sparse.setdefault(key, []).append((rows, values))

    def apply(self, key: int, count: int, lr: float, version: int) -> None:
        """One step of the block's optimizer with the mean of ``count`` gradients. ``lr`` counts only without a schedule."""
        parameter, optimizer = self._weights[key], self._optimizers[key]
        block = self.blocks[key]
        if block.sparse:
            parts = self._sparse.pop(key)
            rows, values = (
                torch.cat([r for r, _ in parts]),
                torch.cat([v for _, v in parts]) / count,
            )
            gradient = torch.sparse_coo_tensor(
                rows[None], values, block.shape, check_invariants=False
            ).coalesce()
        else:
            gradient = self._first.pop(key) if key in self._first else self._sum[key].div_(count)
            gradient = gradient.view(parameter.shape)
        if not self._schedules:
            optimizer.param_groups[0]["lr"] = lr
        self._mark(key, 2 * version - 1)
        parameter.grad = gradient
        optimizer.step()
        parameter.grad = None
        self._mark(key, 2 * version)
        if key in self._schedules:
            self._schedules[key].step()

    def set_version(self, key: int, version: int) -> None:
        self._mark(key, 2 * version)

    def _mark(self, key: int, sequence: int) -> None:
        if self.slab is not None:
            self.slab.sequence[self._place[key]] = sequence

    def state(self, key: int) -> tuple[dict[str, Tensor], dict[str, float]]:
        """The optimizer's state of a block: tensors, and numbers (tensors of no dimension)."""
        tensors, numbers = {}, {}
        for name, value in self._optimizers[key].state.get(self._weights[key], {}).items():
            if isinstance(value, Tensor) and value.dim() == 0:
                numbers[name] = float(value)
            elif isinstance(value, Tensor):
                tensors[name] = value
            elif isinstance(value, (int, float)):
                numbers[name] = value
        if key in self._schedules:
            numbers[_SCHEDULED] = self._schedules[key].last_epoch
        return tensors, numbers

    def load_state(self, key: int, tensors: dict[str, Tensor], numbers: dict[str, float]) -> None:
        """The reverse of ``state``. The rate of a schedule is the one that so many updates lead to."""
        state: dict[str, Any] = dict(tensors)
        for name, value in numbers.items():
            if name == _SCHEDULED:
                while key in self._schedules and self._schedules[key].last_epoch < value:
                    self._schedules[key].step()
                continue
            state[name] = torch.tensor(float(value))
        if state:
            self._optimizers[key].state[self._weights[key]] = state

    def save(self, path: Path, header: dict[str, Any]) -> None:
        """Write everything to ``path``, whole or not at all. ``header`` is JSON for the caller's own use."""
        tensors: dict[str, Tensor] = {}
        numbers, schedules = {}, {}
        for key in self.blocks:
            tensors[f"weights.{key}"] = self._flat[key]
            state, numbers[str(key)] = self.state(key)
            tensors |= {f"state.{key}.{name}": value for name, value in state.items()}
            if key in self._schedules:
                state_dict = self._schedules[key].state_dict()
                schedules[str(key)] = {
                    n: v for n, v in state_dict.items() if isinstance(v, (int, float, list))
                }
                schedules[str(key)]["_lr"] = self._optimizers[key].param_groups[0]["lr"]
        rest = json.dumps(
            {"header": header, "numbers": numbers, "schedules": schedules, "time": time.time()}
        )
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            save_file(
                {name: value.contiguous() for name, value in tensors.items()},
                partial,
                {"format": _FORMAT, "rest": rest},
            )
            with open(partial, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    def load(self, path: Path) -> dict[str, Any]:
        """Take weights and state from a snapshot of the same blocks; returns its header. Raises ``ValueError``."""
        try:
            with safe_open(path, framework="pt") as file:
                rest = json.loads(file.metadata()["rest"])
                for key in self.blocks:
                    self._flat[key].copy_(file.get_tensor(f"weights.{key}"))
                states: dict[int, dict[str, Tensor]] = {}
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    if name.startswith("state."):
                        _, key_text, entry = name.split(".", 2)
                        states.setdefault(int(key_text), {})[entry] = file.get_tensor(name)
        except (SafetensorError, OSError, KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"{path}: damaged snapshot: {error}") from None
        for key in self.blocks:
            self.load_state(key, states.get(key, {}), rest["numbers"].get(str(key), {}))
            if key in self._schedules and str(key) in rest["schedules"]:
                kept = rest["schedules"][str(key)]
                self._optimizers[key].param_groups[0]["lr"] = kept.pop("_lr")
                self._schedules[key].load_state_dict(kept)
        return rest["header"]


def read_header(path: Path) -> dict[str, Any] | None:
    """The header given to ``Shard.save``; None when there is no usable snapshot."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        if metadata.get("format") != _FORMAT:
            return None
        return json.loads(metadata["rest"])["header"]
    except (SafetensorError, OSError, ValueError, KeyError):
        return None


def as_rows(payload: memoryview) -> Tensor:
    """Row numbers of a sparse message, int64."""
    return torch.from_numpy(np.frombuffer(payload, np.int64))

"""The blocks of one server: their weights, gradient sums and optimizers."""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from scaletrain.parameter_server.protocol import optimizer as optimizers
from scaletrain.parameter_server.protocol import sharding
from scaletrain.parameter_server.protocol.consistency import Scaling
from scaletrain.parameter_server.protocol.memory import SUPPORTED, Slab
from scaletrain.parameter_server.protocol.settings import Settings
from scaletrain.parameter_server.protocol.sharding import Block, layout

_MAX_BLOCKS = 1 << 20  # of a server
_SCHEDULED = "scheduled_updates"  # in OptimizerState.numbers: how far the schedule has come


@dataclass(frozen=True)
class ModelDescription:
    """The blocks of a server and their optimizer, as a worker described them.

    Raw JSON from the wire, checked by ``Shard``. All workers of a job send equal ones.
    """

    blocks: Any  # a list of ``sharding.to_json``
    optimizer: Any  # ``optimizer.describe``

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "ModelDescription":
        """Return the description in a message or a snapshot; other keys are ignored."""
        return cls(value.get("blocks"), value.get("optimizer"))

    def to_json(self) -> dict[str, Any]:
        """Return the description for a snapshot."""
        return {"blocks": self.blocks, "optimizer": self.optimizer}


@dataclass
class OptimizerState:
    """The state of one block's optimizer: by ``PIECE.NAME``, with the optimizer's own names."""

    tensors: dict[str, Tensor] = field(default_factory=dict)  # float32, in the piece's shape
    numbers: dict[str, float] = field(default_factory=dict)  # tensors without a dimension, too

    def flat_tensors(self) -> list[Tensor]:
        """Return the tensors, flat, in the order of their names; they share memory."""
        return [tensor.reshape(-1) for _, tensor in sorted(self.tensors.items())]


@dataclass
class _SparseGradient:
    """The rows of a table that one worker's batch touched."""

    rows: Tensor  # int64 (n)
    values: Tensor  # float32 (n, width)


@dataclass
class _GradientSum:
    """The dense gradients of a block's next update, added in the order of the ranks.

    The sum is then the same, bit by bit, whatever order they arrive in. A gradient that arrives
    before one of a lower rank waits where it is.
    """

    first: Tensor | None = None  # the only gradient so far, where it arrived
    # float32 (numel); made when a second gradient comes, then kept.
    sum: Tensor | None = None
    is_summed: bool = False  # ``sum`` holds gradients of this update
    next_rank: int = 0  # all lower ranks have been added
    early: dict[int, Tensor] = field(default_factory=dict)  # by rank: gradients that wait

    def add(self, rank: int, gradient: Tensor) -> None:
        """Add a gradient, float32 (numel); it has to stay as it is until ``take_mean``."""
        self.early[rank] = gradient
        while self.next_rank in self.early:
            self._add_next(self.early.pop(self.next_rank))
            self.next_rank += 1

    def take_mean(self, num_gradients: int) -> Tensor:
        """Use up all gradients; return their sum divided by ``num_gradients``, float32 (numel).

        Some ranks may be missing: lost ones, and those that an update does not wait for.
        """
        for rank in sorted(self.early):
            self._add_next(self.early.pop(rank))
        self.next_rank = 0
        self.is_summed = False
        if self.first is not None:
            # A single gradient is its own mean: no copy and no division.
            gradient, self.first = self.first, None
            return gradient
        assert self.sum is not None
        return self.sum.div_(num_gradients)

    def _add_next(self, gradient: Tensor) -> None:
        """Add the gradient of the next higher rank."""
        if self.first is not None:
            if self.sum is None:
                self.sum = torch.empty_like(gradient)
            torch.add(self.first, gradient, out=self.sum)
            self.first = None
            self.is_summed = True
        elif self.is_summed:
            assert self.sum is not None
            self.sum.add_(gradient)
        else:
            self.first = gradient


@dataclass
class _OwnedBlock:
    """One block: its weights, its optimizer, and the gradients of its next update."""

    block: Block
    place: int  # of its sequence number in the slab
    flat: Tensor  # the weights, float32 (numel); part of the slab unless the block is sparse
    # The same memory, piece by piece: torch leaves a parameter without a gradient alone, and counts
    # the steps of each for itself.
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    schedule: LRScheduler | None = None  # of the learning rate; None: workers send the rate

    # Gradients since the last update. Written by add and add_rows, used up by apply.
    dense: _GradientSum = field(default_factory=_GradientSum)
    sparse: dict[int, _SparseGradient] = field(default_factory=dict)  # by rank
    # Numbers of the pieces that no worker has a gradient of; None: there are no gradients yet.
    absent: set[int] | None = None
    # The mean gradient of a held update, flat or sparse like the block; None while it is not taken.
    # Written by take_mean, used up by apply.
    mean: Tensor | None = None

    def note_absent(self, absent: Iterable[int]) -> None:
        """Note the pieces that one more worker has no gradient of."""
        self.absent = set(absent) if self.absent is None else self.absent.intersection(absent)


class Shard:
    """Blocks with their optimizers. Weights are float32, whatever travels.

    Dense blocks lie in one slab, which workers of the same host may map. All methods are called by
    the server's only thread. Workers read the slab at any time: they look at a block's sequence
    number before and after (see ``Slab``).

    Args:
        settings: of the job.
        index: of the server.
        description: from the wire, so that anything may be in it.

    Attributes:
        blocks: by key.
        starts: the first element of each dense block in the slab, by key.
        dense_elements: number of elements of the slab.
        slab: memory that workers can map; None where they cannot.

    Raises:
        ValueError: the description is malformed, or the model too large for this host.
        UserError: the schedule of the learning rate is not one of torch's.
    """

    def __init__(self, settings: Settings, index: int, description: ModelDescription):
        self.description = description
        blocks = _checked_blocks(description.blocks, index)
        self.blocks = {block.key: block for block in blocks}
        self.starts, self.dense_elements = layout(blocks)
        self.slab: Slab | None = None
        if settings.shared_memory and SUPPORTED:
            self.slab = Slab.create(self.dense_elements, len(blocks))
            dense = torch.from_numpy(self.slab.floats)
        else:
            dense = torch.zeros(self.dense_elements)
        places = {key: place for place, key in enumerate(sorted(self.blocks))}
        self._owned: dict[int, _OwnedBlock] = {}
        for key, block in self.blocks.items():
            if block.sparse:
                flat = torch.zeros(block.numel)
            else:
                start = self.starts[key]
                flat = dense[start : start + block.numel]
            parameters = []
            for piece, in_block in sharding.places(block):
                values = flat[in_block].view(block.shape or (piece.numel,))
                parameters.append(nn.Parameter(values))
            optimizer = optimizers.build(description.optimizer, block.group, parameters)
            owned = _OwnedBlock(block, places[key], flat, parameters, optimizer)
            if settings.server_lr:
                owned.schedule = optimizers.scheduler(settings.server_lr, optimizer)
            self._owned[key] = owned

    @property
    def num_parameters(self) -> int:
        """Number of elements of all blocks."""
        return sum(block.numel for block in self.blocks.values())

    @property
    def num_bytes(self) -> int:
        """Size of parameters and optimizer state."""
        total = 4 * self.num_parameters
        for owned in self._owned.values():
            for state in owned.optimizer.state.values():
                total += sum(value.nbytes for value in state.values() if isinstance(value, Tensor))
        return total

    # Weights

    def weights(self, key: int) -> Tensor:
        """Return a block's weights, float32 (numel): live memory that the next update changes."""
        return self._owned[key].flat

    def rows(self, key: int, rows: Tensor) -> Tensor:
        """Return copies of rows of a sparse table.

        Args:
            key: of the table's block.
            rows: numbers within the block, int64 (n).

        Returns:
            float32 (n, width).
        """
        [table] = self._owned[key].parameters
        return table.detach().index_select(0, rows)

    def set_version(self, key: int, version: int) -> None:
        """Tell the workers that map the slab that a block's weights are complete."""
        self._mark(self._owned[key], 2 * version)

    # Gradients

    def add(self, key: int, rank: int, gradient: Tensor, absent: Iterable[int] = ()) -> None:
        """Add a worker's dense gradient; between two calls of ``apply`` each rank has one.

        Args:
            key: of the block.
            rank: of the worker.
            gradient: float32 (numel). It may be kept where it is, so the caller must not change it
                before the next ``apply``.
            absent: numbers of the pieces that have no gradient, and zeros in its place.
        """
        owned = self._owned[key]
        owned.note_absent(absent)
        owned.dense.add(rank, gradient)

    def add_rows(
        self, key: int, rank: int, rows: Tensor, values: Tensor, is_absent: bool = False
    ) -> None:
        """Add a worker's sparse gradient; between two calls of ``apply`` each rank has one.

        Args:
            key: of the table's block.
            rank: of the worker.
            rows: numbers within the block, int64 (n).
            values: float32 (n, width).
            is_absent: the table has no gradient; without rows that is not the same.
        """
        owned = self._owned[key]
        owned.note_absent([0] if is_absent else [])
        owned.sparse[rank] = _SparseGradient(rows, values)

    def take_mean(self, key: int, num_gradients: int) -> None:
        """Use up the gradients of a block; keep their mean for the next ``apply``.

        Args:
            key: of the block.
            num_gradients: in the sum.
        """
        owned = self._owned[key]
        owned.mean = _mean(owned, num_gradients)

    def squared_norm(self, key: int) -> float:
        """Return the sum of squares of the mean that ``take_mean`` has kept."""
        mean = self._owned[key].mean
        assert mean is not None
        values = mean._values() if mean.is_sparse else mean
        return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2

    def apply(
        self,
        key: int,
        num_gradients: int,
        lr: float,
        version: int,
        scaling: Scaling | None = None,
    ) -> None:
        """Take one step of the block's optimizer with the mean of the gradients.

        Pieces that no worker has a gradient of are left alone.

        Args:
            key: of the block.
            num_gradients: in the sum.
            lr: the workers' learning rate; ignored if a schedule sets the rate.
            version: of the block afterwards.
            scaling: of the mean before the step.
        """
        owned = self._owned[key]
        if owned.schedule is None:
            owned.optimizer.param_groups[0]["lr"] = lr
        gradient = _mean(owned, num_gradients) if owned.mean is None else owned.mean
        owned.mean = None
        if scaling is not None:
            gradient = _scaled(gradient, scaling)
        absent = owned.absent or set()
        owned.absent = None
        self._mark(owned, 2 * version - 1)
        for number, (_, in_block) in enumerate(sharding.places(owned.block)):
            parameter = owned.parameters[number]
            if number in absent:
                continue
            if owned.block.sparse:
                parameter.grad = gradient
            else:
                parameter.grad = gradient[in_block].view(parameter.shape)
        # torch's optimizers make sparse tensors from the gradient's rows, which were checked when
        # they came. Without this line torch warns that it does not check them again.
        with torch.sparse.check_sparse_tensor_invariants(False):
            owned.optimizer.step()
        for parameter in owned.parameters:
            parameter.grad = None
        self._mark(owned, 2 * version)
        if owned.schedule is not None:
            owned.schedule.step()

    def _mark(self, owned: _OwnedBlock, sequence: int) -> None:
        """Write a block's sequence number: twice its version, and odd while its weights change."""
        if self.slab is not None:
            self.slab.sequence[owned.place] = sequence

    # State, for checkpoints and snapshots

    def state(self, key: int) -> OptimizerState:
        """Return the state of a block's optimizer; the tensors are live memory."""
        owned = self._owned[key]
        state = OptimizerState()
        for number, parameter in enumerate(owned.parameters):
            for name, value in owned.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and value.dim() > 0:
                    state.tensors[f"{number}.{name}"] = value
                elif isinstance(value, Tensor):
                    state.numbers[f"{number}.{name}"] = float(value)
                elif isinstance(value, int | float):
                    state.numbers[f"{number}.{name}"] = value
            if owned.schedule is not None:
                state.numbers[f"{number}.{_SCHEDULED}"] = owned.schedule.last_epoch
        return state

    def load_state(self, key: int, state: OptimizerState) -> None:
        """Set the state of a block's optimizer, and the schedule to the updates that it counted."""
        owned = self._owned[key]
        loaded: dict[int, dict[str, Any]] = {}
        for entry, tensor in state.tensors.items():
            number, name = optimizers.split_entry(entry)
            loaded.setdefault(number, {})[name] = tensor
        for entry, value in state.numbers.items():
            number, name = optimizers.split_entry(entry)
            if name == _SCHEDULED:
                _advance(owned.schedule, value)
            else:
                # torch keeps counters such as ``step`` as tensors without dimensions.
                loaded.setdefault(number, {})[name] = torch.tensor(float(value))
        for number, values in loaded.items():
            owned.optimizer.state[owned.parameters[number]] = values

    def schedule_state(self, key: int) -> dict[str, Any] | None:
        """Return a block's schedule as JSON; None without one."""
        owned = self._owned[key]
        if owned.schedule is None:
            return None
        whole = owned.schedule.state_dict()
        state = {k: value for k, value in whole.items() if isinstance(value, int | float | list)}
        state["_lr"] = owned.optimizer.param_groups[0]["lr"]
        return state

    def load_schedule_state(self, key: int, state: dict[str, Any]) -> None:
        """Go on with a schedule that ``schedule_state`` returned; nothing without a schedule."""
        owned = self._owned[key]
        if owned.schedule is not None:
            rest = dict(state)
            owned.optimizer.param_groups[0]["lr"] = rest.pop("_lr")
            owned.schedule.load_state_dict(rest)


def _checked_blocks(table: Any, index: int) -> list[Block]:
    """Return the blocks in a table from the wire.

    Raises:
        ValueError: the table is malformed, or the model too large for this host.
    """
    if not isinstance(table, list) or len(table) > _MAX_BLOCKS:
        raise ValueError("malformed table of blocks")
    blocks = [sharding.from_json(entry, index) for entry in table]
    keys = {block.key for block in blocks}
    if len(keys) != len(blocks):
        raise ValueError("a block comes twice")
    num_bytes = 4 * sum(block.numel for block in blocks)
    if num_bytes > psutil.virtual_memory().total:
        raise ValueError("the model is larger than this host's memory")
    return blocks


def _mean(owned: _OwnedBlock, num_gradients: int) -> Tensor:
    """Use up the gradients of a block; return their mean, flat or sparse like the block."""
    if owned.block.sparse:
        return _mean_of_rows(owned, num_gradients)
    return owned.dense.take_mean(num_gradients)


def _scaled(gradient: Tensor, scaling: Scaling) -> Tensor:
    """Return a gradient multiplied and cut; it lies in a worker's memory, and stays as it is."""
    if gradient.is_sparse:
        values = _scaled(gradient._values(), scaling)
        return torch.sparse_coo_tensor(
            gradient._indices(), values, gradient.shape, is_coalesced=True, check_invariants=False
        )
    return (gradient * scaling.factor).clamp_(-scaling.limit, scaling.limit)


def _mean_of_rows(owned: _OwnedBlock, num_gradients: int) -> Tensor:
    """Use up the sparse gradients; return their mean as a sparse tensor of the table's shape."""
    # In the order of the ranks: the sum does not depend on who came first.
    gradients = [gradient for _, gradient in sorted(owned.sparse.items())]
    rows = torch.cat([gradient.rows for gradient in gradients])
    values = torch.cat([gradient.values for gradient in gradients]) / num_gradients
    owned.sparse = {}
    # Workers touch the same rows. coalesce() adds up what they have for a row.
    return torch.sparse_coo_tensor(
        rows[None], values, owned.block.shape, check_invariants=False
    ).coalesce()


def _advance(schedule: LRScheduler | None, updates: float) -> None:
    """Move a schedule to the rate that so many updates lead to."""
    with warnings.catch_warnings():
        # The optimizer's steps were taken by another process, which torch cannot know.
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
        while schedule is not None and schedule.last_epoch < updates:
            schedule.step()

"""A worker's copy of the model: which gradient goes into which block, and back."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scaletrain.errors import UserError
from scaletrain.parameter_server.protocol import optimizer as optimizers
from scaletrain.parameter_server.protocol import sharding
from scaletrain.parameter_server.protocol.settings import Settings
from scaletrain.parameter_server.protocol.sharding import Block
from scaletrain.parameter_server.worker.client import Answer, Client
from scaletrain.parameter_server.worker.staging import Staging


class Part(NamedTuple):
    """A range of a parameter, and where it lies in a block."""

    key: int
    start: int  # in the parameter
    stop: int
    at: int  # in the block


class Replica:
    """The trained parameters of a model, seen as blocks. Parameters that need no gradient are not part of it."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, settings: Settings):
        groups = {
            id(p): number
            for number, group in enumerate(optimizer.param_groups)
            for p in group["params"]
        }
        tables = _sparse_tables(model)
        self.parameters = [p for p in model.parameters() if p.requires_grad and id(p) in groups]
        untrained = [
            name for name, p in model.named_parameters() if p.requires_grad and id(p) not in groups
        ]
        if untrained:
            raise UserError(
                f"optimizer: parameter {untrained[0]} needs a gradient and is in none of the optimizer's groups"
            )
        self.optimizer = _outer(settings) if settings.local else optimizers.describe(optimizer)
        self.groups = [groups[id(p)] if not settings.local else 0 for p in self.parameters]
        for parameter, group in zip(self.parameters, self.groups, strict=True):
            if id(parameter) in tables:
                if settings.local:
                    raise UserError(
                        f"exchange.mode: {settings.mode} does not take sparse embeddings (allowed: sync, async, bounded)"
                    )
                optimizers.check_sparse(self.optimizer, group)
            parameter.data = parameter.data.contiguous()
        described = [
            sharding.ParameterSpec(tuple(p.shape), group, id(p) in tables)
            for p, group in zip(self.parameters, self.groups, strict=True)
        ]
        whole = self.optimizer["name"] not in optimizers.ELEMENTWISE
        self.blocks = sharding.plan(described, settings.servers, settings.block_bytes, whole)
        self.dense = [block for block in self.blocks if not block.sparse]
        tabled = [index for index, parameter in enumerate(described) if parameter.sparse]
        self.tables = {
            i: [b for b in self.blocks if b.sparse and b.pieces[0].parameter == i] for i in tabled
        }
        self._staging: Staging | None = None
        self.parts: dict[int, list[Part]] = {index: [] for index in range(len(self.parameters))}
        for block in self.blocks:
            at = 0
            for piece in block.pieces:
                self.parts[piece.parameter].append(Part(block.key, piece.start, piece.stop, at))
                at += piece.stop - piece.start

    def connect(self, client: Client) -> None:
        """Use ``client`` from now on; gradients are written where it sends them from, or, on an accelerator, to where they are staged."""
        self._client = client
        device = self.parameters[0].device if self.parameters else torch.device("cpu")
        self._staging = Staging(client, self.dense, device) if needs_staging(device) else None
        if self._staging:
            self._gradients = self._staging.gradients
        else:
            self._gradients = {
                block.key: torch.from_numpy(client.gradient(block.key)) for block in self.dense
            }
        self._end = self._staging or client  # who takes gradients and gives weights

    def begin(self) -> None:
        """Expect the gradients of the next step."""
        self._missing = {block.key: len(block.pieces) for block in self.dense}

    def push(self, index: int, gradient: Tensor | None, step: int, lr: float) -> None:
        """Write a parameter's gradient (zeros for None) into its blocks; push those that are complete. Does not wait."""
        if index in self.tables:
            self._push_rows(index, gradient, step, lr)
            return
        flat = None if gradient is None else gradient.detach().reshape(-1)
        for part in self.parts[index]:
            target = self._gradients[part.key][part.at : part.at + part.stop - part.start]
            if flat is None:
                target.zero_()
            elif self._staging:
                self._staging.copy(target, flat[part.start : part.stop])
            else:
                target.copy_(flat[part.start : part.stop])
            self._missing[part.key] -= 1
            if not self._missing[part.key]:
                self._end.push(part.key, step, lr)

    def take(self, block: Block) -> Answer:
        """Wait until a block's gradient was used; put a dense one's new weights into the model."""
        if block.sparse:
            return self._client.take_rows(block.key)
        return self._end.take(block.key, self._writer(block))

    def close(self) -> None:
        """Before the client's."""
        if self._staging:
            self._staging.close()

    def _writer(self, block: Block) -> Callable[[Tensor], None]:
        """What puts a block's flat float32 weights into the model."""

        def write(values: Tensor) -> None:
            at = 0
            for piece in block.pieces:
                size = piece.stop - piece.start
                self._flat(piece.parameter)[piece.start : piece.stop].copy_(
                    values[at : at + size], non_blocking=True
                )
                at += size

        return write

    def store(self, block: Block) -> None:
        """Send a block's weights of this replica as the first ones."""
        values = torch.cat(
            [self._flat(p.parameter)[p.start : p.stop].float().cpu() for p in block.pieces]
        )
        self._client.store(block.key, values)

    def pull(self, block: Block) -> None:
        """Fetch a block's weights as they are on the server."""

        def sink(offset: int, values: Tensor) -> None:
            at = 0
            for (
                piece
            ) in block.pieces:  # the part of this piece that lies in [offset, offset + len(values))
                first, last = (
                    max(at, offset),
                    min(at + piece.stop - piece.start, offset + len(values)),
                )
                if first < last:
                    to = self._flat(piece.parameter)[
                        piece.start + first - at : piece.start + last - at
                    ]
                    to.copy_(values[first - offset : last - offset])
                at += piece.stop - piece.start

        self._client.pull(block.key, sink)

    def send_state(self, optimizer: torch.optim.Optimizer) -> None:
        """Give the servers the state that ``optimizer`` holds, as loaded from a checkpoint; before ``store``."""
        for block in self.blocks:
            states = [
                optimizer.state.get(self.parameters[piece.parameter], {}) for piece in block.pieces
            ]
            tensors: dict[str, Tensor] = {}
            numbers: dict[str, float] = {}
            for name, first in states[0].items():
                if not all(name in state for state in states) or first is None:
                    continue
                if isinstance(first, Tensor) and (
                    first.dim() or (first.shape == self._shape(block.pieces[0]) and name != "step")
                ):
                    ranges = [
                        state[name].detach().float().cpu().reshape(-1)[piece.start : piece.stop]
                        for piece, state in zip(block.pieces, states, strict=True)
                    ]
                    whole = (
                        first.detach().float().cpu()
                        if block.shape and not block.sparse
                        else torch.cat(ranges)
                    )
                    tensors[name] = whole.view(block.shape) if block.sparse else whole
                else:
                    numbers[name] = float(first)
            if tensors or numbers:
                self._client.set_state(block.key, tensors, numbers)

    def fetch_state(self, optimizer: torch.optim.Optimizer) -> None:
        """The reverse: put the servers' state into ``optimizer``, in the form that it would have had itself."""
        for block in self.blocks:
            tensors, numbers = self._client.state(block.key)
            at = 0
            for piece in block.pieces:
                parameter, size = self.parameters[piece.parameter], piece.stop - piece.start
                state = optimizer.state[parameter]
                for name, number in numbers.items():
                    state[name] = torch.tensor(float(number))
                for name, tensor in tensors.items():
                    if tensor.numel() != block.numel:  # of an optimizer that looks at whole tensors
                        state[name] = tensor
                        continue
                    if name not in state or state[name].shape != parameter.shape:
                        state[name] = torch.zeros(parameter.shape)
                    state[name].view(-1)[piece.start : piece.stop] = tensor.reshape(-1)[
                        at : at + size
                    ]
                at += size

    def _shape(self, piece: sharding.Piece) -> torch.Size:
        return self.parameters[piece.parameter].shape

    def pull_rows(self, index: int, rows: Tensor) -> None:
        """Fetch rows of a sparse table (sorted, unique, int64) and put them into the model."""
        table, asked = self.parameters[index].data, []
        for block in self.tables[index]:
            here = rows[(rows >= block.first_row) & (rows < block.first_row + block.shape[0])]
            if len(here):
                self._client.ask_rows(block.key, here - block.first_row)
                asked.append((block.key, here))
        for key, here in asked:
            table.index_copy_(
                0, here.to(table.device), self._client.rows(key).to(table.device, table.dtype)
            )

    def _push_rows(self, index: int, gradient: Tensor | None, step: int, lr: float) -> None:
        """Send a sparse table's gradient: every block of the table gets its rows, or word that there are none."""
        table = self.parameters[index]
        if gradient is None:
            rows, values = torch.empty(0, dtype=torch.int64), torch.empty(0, table.shape[1])
        else:
            gradient = gradient.coalesce()
            rows, values = gradient.indices()[0].cpu(), gradient.values().float().cpu()
        for block in self.tables[index]:
            first, last = torch.searchsorted(
                rows, torch.tensor([block.first_row, block.first_row + block.shape[0]])
            ).tolist()
            self._client.push_rows(
                block.key, step, lr, rows[first:last] - block.first_row, values[first:last]
            )

    def _flat(self, index: int) -> Tensor:
        return self.parameters[index].data.view(-1)


def needs_staging(device: torch.device) -> bool:
    return device.type != "cpu"


def _sparse_tables(model: nn.Module) -> set[int]:
    """Parameters whose gradients are sparse."""
    return {
        id(m.weight)
        for m in model.modules()
        if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) and m.sparse
    }


def _outer(settings: Settings) -> dict[str, Any]:
    """The server's optimizer of local SGD; the "gradient" is how far the workers went, from where they began, with the sign turned.

    Averaging is a plain step of rate 1; DiLoCo (Douillard et al., 2023) takes Nesterov steps instead.
    """
    if settings.outer == "average":
        return {"name": "SGD", "groups": [{"lr": 1.0}]}
    options = {"lr": settings.outer_lr, "momentum": settings.outer_momentum, "nesterov": True}
    return {"name": "SGD", "groups": [options]}

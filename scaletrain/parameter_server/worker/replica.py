"""A worker's copy of the model, cut into blocks: gradients go out, weights come back."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scaletrain.errors import UserError
from scaletrain.parameter_server.protocol import optimizer as optimizers
from scaletrain.parameter_server.protocol import sharding
from scaletrain.parameter_server.protocol.settings import Settings
from scaletrain.parameter_server.protocol.sharding import Block, ParameterSpec, Piece, places
from scaletrain.parameter_server.worker.client import Client, PushResult
from scaletrain.parameter_server.worker.staging import Staging

# The types of parameters whose values float32 holds.
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class BlockSlice(NamedTuple):
    """The part of a parameter that lies in one block."""

    key: int  # the block
    number: int  # among the pieces of the block
    in_parameter: slice  # of the flat parameter
    in_block: slice


class Replica:
    """The trained parameters of a model, seen as blocks.

    Parameters that need no gradient are not part of it. ``cut`` and ``connect`` come first. In a
    step, ``push`` is called for every parameter, then ``take`` for every block.

    Args:
        model: its sparse embeddings become sparse tables.
        optimizer: over all parameters that need a gradient.
        settings: of the job.

    Attributes:
        parameters: the trained parameters, in forward order. An index counts in this list.
        names: of these parameters, in the same order.
        groups: for each parameter, its group of the server's optimizer.
        optimizer: description of the server's optimizer (``optimizer.describe``).
        blocks: the plan, the same on all workers.
        dense: the blocks that are no part of a sparse table.
        tables: the blocks of each sparse table, by the parameter's index.

    Raises:
        UserError: the servers cannot run this optimizer, or not all parameters are in it.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, settings: Settings):
        group_of = _groups(optimizer)
        _check_all_are_optimized(model, group_of)
        self.parameters: list[nn.Parameter] = []
        self.names: list[str] = []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                _check_dtype(name, parameter)
                self.names.append(name)
                # ``_flat`` looks at the same memory as one dimension.
                parameter.data = parameter.data.contiguous()
                self.parameters.append(parameter)
        if settings.local:
            self.optimizer = _outer_optimizer(settings)
            self.groups = [0] * len(self.parameters)
        else:
            self.optimizer = optimizers.describe(optimizer)
            self.groups = [group_of[id(parameter)] for parameter in self.parameters]

        self._num_servers = settings.servers
        self._parameter_specs = self._specs(model, settings)
        # Set by ``cut``.
        self.blocks: list[Block] = []
        self.dense: list[Block] = []
        self.tables: dict[int, list[Block]] = {}
        self._slices: list[list[BlockSlice]] = []

        # Set by ``connect``.
        self._client: Client
        self._staging: Staging | None = None
        self._carrier: Staging | Client  # takes gradients and returns weights
        self._gradients: dict[int, Tensor] = {}  # of dense blocks, in the memory of the carrier
        # Pieces of each dense block whose gradients are still to come. Set by ``begin``, counted
        # down by ``push``.
        self._missing: dict[int, int] = {}
        # Numbers of the pieces of each dense block that have no gradient in this step. Emptied by
        # ``begin``, filled by ``push``.
        self._absent: dict[int, list[int]] = {}
        # Rows of each sparse table that were fetched in this step. Emptied by ``begin``, filled by
        # ``pull_rows``.
        self._fetched: dict[int, list[Tensor]] = {}

    @property
    def dense_bytes(self) -> int:
        """Size of all parameters that are not sparse tables, as float32."""
        return 4 * sum(spec.numel for spec in self._parameter_specs if not spec.sparse)

    def cut(self, block_bytes: int) -> None:
        """Cut the model into blocks of at most so many bytes, the same on all workers."""
        specs = self._parameter_specs
        whole_tensors = self.optimizer["name"] not in optimizers.ELEMENTWISE
        self.blocks = sharding.plan(specs, self._num_servers, block_bytes, whole_tensors)
        for index, spec in enumerate(specs):
            if spec.sparse:
                self.tables[index] = []
        for block in self.blocks:
            if block.sparse:
                self.tables[block.pieces[0].parameter].append(block)
            else:
                self.dense.append(block)
        self._slices = [[] for _ in self.parameters]
        for block in self.blocks:
            for number, (piece, in_block) in enumerate(places(block)):
                in_parameter = slice(piece.start, piece.stop)
                part = BlockSlice(block.key, number, in_parameter, in_block)
                self._slices[piece.parameter].append(part)

    def _specs(self, model: nn.Module, settings: Settings) -> list[ParameterSpec]:
        """Return the facts that ``sharding`` needs. Raises ``UserError``."""
        if not settings.local:
            _check_embeddings(model)
        sparse = _sparse_tables(model)
        specs = []
        for parameter, group in zip(self.parameters, self.groups, strict=True):
            is_sparse = id(parameter) in sparse
            if is_sparse and settings.local:
                raise UserError(
                    f"exchange.mode: {settings.mode} does not take sparse embeddings "
                    "(allowed: sync, async, bounded)"
                )
            if is_sparse:
                optimizers.check_sparse(self.optimizer, group)
            specs.append(ParameterSpec(tuple(parameter.shape), group, is_sparse))
        return specs

    def connect(self, client: Client) -> None:
        """Use ``client`` from now on.

        Gradients are written to where it sends them from. On an accelerator they are staged first.
        """
        self._client = client
        device = self.parameters[0].device if self.parameters else torch.device("cpu")
        if needs_staging(device):
            self._staging = Staging(client, self.dense, device)
            self._carrier = self._staging
            self._gradients = self._staging.gradients
        else:
            self._staging = None
            self._carrier = client
            self._gradients = {}
            for block in self.dense:
                self._gradients[block.key] = torch.from_numpy(client.gradient(block.key))

    def close(self) -> None:
        """Stop staging. Comes before the client's ``close``."""
        if self._staging:
            self._staging.close()

    # A step

    def begin(self) -> None:
        """Expect the gradients of the next step."""
        self._missing = {block.key: len(block.pieces) for block in self.dense}
        self._absent = {block.key: [] for block in self.dense}
        self._fetched = {index: [] for index in self.tables}

    def push(self, index: int, gradient: Tensor | None, step: int, lr: float) -> None:
        """Write a parameter's gradient into its blocks, and push those that are complete.

        Does not wait.

        Args:
            index: the parameter.
            gradient: of the parameter's shape, dense or sparse like the parameter; None: there is
                none, and the servers leave the parameter alone if no other worker has one.
            step: the job's step that the gradient belongs to.
            lr: the learning rate of the update.
        """
        if index in self.tables:
            self._push_rows(index, gradient, step, lr)
            return
        flat = None if gradient is None else gradient.detach().reshape(-1)
        for part in self._slices[index]:
            target = self._gradients[part.key][part.in_block]
            if flat is None:
                target.zero_()
                self._absent[part.key].append(part.number)
            elif self._staging:
                self._staging.copy(target, flat[part.in_parameter])
            else:
                target.copy_(flat[part.in_parameter])
            self._missing[part.key] -= 1
            if self._missing[part.key] == 0:
                self._carrier.push(part.key, step, lr, self._absent[part.key])

    def take(self, block: Block) -> PushResult:
        """Wait until a block's gradient was used; put a dense one's new weights into the model."""
        if block.sparse:
            return self._client.take_rows(block.key)
        return self._carrier.take(block.key, self._writer(block))

    def _writer(self, block: Block) -> Callable[[Tensor], None]:
        """Return the function that puts a block's weights (float32, flat) into the model."""

        def write(values: Tensor) -> None:
            for piece, in_block in places(block):
                target = self._flat(piece.parameter)[piece.start : piece.stop]
                target.copy_(values[in_block], non_blocking=True)

        return write

    def _push_rows(self, index: int, gradient: Tensor | None, step: int, lr: float) -> None:
        """Push a sparse table's gradient.

        Every block of the table gets a message, with the rows that lie in it or without any: the
        server counts one gradient of each worker and block.

        Raises:
            UserError: the gradient has rows that were not fetched in this step.
        """
        if gradient is None:
            width = self.parameters[index].shape[1]
            rows = torch.empty(0, dtype=torch.int64)
            values = torch.empty(0, width)
        else:
            if not gradient.is_sparse:  # of ``F.embedding`` without ``sparse=True``
                gradient = gradient.to_sparse(1)
            gradient = gradient.coalesce()  # sorts the rows, and adds up those that come twice
            rows = gradient.indices()[0].cpu()
            values = gradient.values().float().cpu()
            fetched = torch.cat([torch.empty(0, dtype=torch.int64), *self._fetched[index]])
            if not torch.isin(rows, fetched).all():
                raise UserError(
                    f"exchange: the gradient of the sparse embedding {self.names[index]} has rows"
                    " that this step has not read (allowed: the gradient that backward makes)"
                )
        for block in self.tables[index]:
            # Rows are sorted: those of a block lie side by side.
            bounds = torch.tensor([block.first_row, block.first_row + block.shape[0]])
            first, last = torch.searchsorted(rows, bounds).tolist()
            rows_in_block = rows[first:last] - block.first_row
            self._client.push_rows(
                block.key, step, lr, rows_in_block, values[first:last], is_absent=gradient is None
            )

    # Weights

    def store(self, block: Block) -> None:
        """Send this replica's weights of a block as the first ones."""
        ranges = []
        for piece in block.pieces:
            values = self._flat(piece.parameter)[piece.start : piece.stop]
            ranges.append(values.float().cpu())
        self._client.store(block.key, torch.cat(ranges))

    def pull(self, block: Block) -> None:
        """Fetch a block's weights as they are on the server."""

        def sink(offset: int, values: Tensor) -> None:
            """Write the part [offset, offset + len(values)) of the block into the model."""
            for piece, in_block in places(block):
                first = max(in_block.start, offset)
                last = min(in_block.stop, offset + len(values))
                if first >= last:  # the part has nothing of this piece
                    continue
                start = piece.start + first - in_block.start
                target = self._flat(piece.parameter)[start : start + last - first]
                target.copy_(values[first - offset : last - offset])

        self._client.pull(block.key, sink)

    def pull_rows(self, index: int, rows: Tensor) -> None:
        """Fetch rows of a sparse table, and put them into the model.

        Args:
            index: the table's parameter.
            rows: row numbers within the table, int64, (n,), sorted, each once.
        """
        if torch.is_grad_enabled():  # else no gradient will come of them
            self._fetched[index].append(rows)
        # All questions leave before the first answer is waited for: the servers work at once.
        asked = []  # (block, rows of the table that lie in it)
        for block in self.tables[index]:
            is_in_block = (rows >= block.first_row) & (rows < block.first_row + block.shape[0])
            rows_in_block = rows[is_in_block]
            if len(rows_in_block):
                self._client.ask_rows(block.key, rows_in_block - block.first_row)
                asked.append((block, rows_in_block))
        table = self.parameters[index].data
        for block, rows_in_block in asked:
            values = self._client.rows(block.key).to(table.device, table.dtype)
            table.index_copy_(0, rows_in_block.to(table.device), values)

    # Optimizer state

    def send_state(self, optimizer: torch.optim.Optimizer) -> None:
        """Give the servers the state that ``optimizer`` holds, as loaded from a checkpoint.

        Comes before ``store``.
        """
        for block in self.blocks:
            tensors: dict[str, Tensor] = {}
            numbers: dict[str, float] = {}
            for number, piece in enumerate(block.pieces):
                state = optimizer.state.get(self.parameters[piece.parameter], {})
                for name, value in state.items():
                    if value is None:
                        continue
                    if self._is_tensor_state(name, value, piece):
                        tensors[f"{number}.{name}"] = _state_of_piece(value, piece, block)
                    else:
                        numbers[f"{number}.{name}"] = float(value)
            if tensors or numbers:
                self._client.set_state(block.key, tensors, numbers)

    def _is_tensor_state(self, name: str, value: Any, piece: Piece) -> bool:
        """Return True if a value of an optimizer's state belongs to elements of a parameter.

        A tensor without dimensions is a number, such as ``step``, unless the parameter has none
        either.
        """
        if not isinstance(value, Tensor):
            return False
        has_shape_of_parameter = value.shape == self.parameters[piece.parameter].shape
        return value.dim() > 0 or (has_shape_of_parameter and name != "step")

    def fetch_state(self, optimizer: torch.optim.Optimizer) -> None:
        """Put the servers' state into ``optimizer``, in the form that its own would have."""
        for block in self.blocks:
            tensors, numbers = self._client.state(block.key)
            for entry, value in numbers.items():
                number, name = optimizers.split_entry(entry)
                parameter = self.parameters[block.pieces[number].parameter]
                # torch keeps counters such as ``step`` as tensors without dimensions.
                optimizer.state[parameter][name] = torch.tensor(float(value))
            for entry, tensor in tensors.items():
                number, name = optimizers.split_entry(entry)
                piece = block.pieces[number]
                parameter = self.parameters[piece.parameter]
                state = optimizer.state[parameter]
                if tensor.numel() != piece.numel:  # of an optimizer that looks at whole tensors
                    state[name] = tensor
                    continue
                if name not in state or state[name].shape != parameter.shape:
                    state[name] = torch.zeros(parameter.shape)
                state[name].view(-1)[piece.start : piece.stop] = tensor.reshape(-1)

    def _flat(self, index: int) -> Tensor:
        """Return a parameter's weights as one dimension, in the same memory."""
        return self.parameters[index].data.view(-1)


def needs_staging(device: torch.device) -> bool:
    """Return True if gradients of this device pass through page-locked memory."""
    return device.type != "cpu"


def _groups(optimizer: torch.optim.Optimizer) -> dict[int, int]:
    """Return the number of the group that holds each parameter, by the parameter's ``id``."""
    group_of = {}
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            group_of[id(parameter)] = number
    return group_of


def _check_all_are_optimized(model: nn.Module, group_of: dict[int, int]) -> None:
    """Raise ``UserError`` if a parameter needs a gradient that no optimizer uses."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in group_of:
            raise UserError(
                f"optimizer: parameter {name} needs a gradient "
                "and is in none of the optimizer's groups"
            )


def _check_dtype(name: str, parameter: nn.Parameter) -> None:
    """Raise ``UserError`` if float32, the type of servers' weights, would cut values off."""
    if parameter.dtype not in _DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        dtype = str(parameter.dtype).removeprefix("torch.")
        raise UserError(
            f"exchange: parameter_server does not train parameter {name} of type {dtype}"
            f" (allowed: {allowed}, or another exchange)"
        )


def _check_embeddings(model: nn.Module) -> None:
    """Raise ``UserError`` for embeddings that change, or are read, without the servers."""
    sparse = _sparse_tables(model)
    for name, module in model.named_modules():
        is_embedding = isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        if is_embedding and module.max_norm is not None and module.weight.requires_grad:
            raise UserError(
                f"exchange: parameter_server does not take embedding {name} with max_norm"
                f" {module.max_norm}, which changes rows as they are read (allowed: None)"
            )
        if is_embedding and module.sparse:
            continue
        for own_name, parameter in module.named_parameters(name, recurse=False):
            if id(parameter) in sparse:
                raise UserError(
                    f"exchange: {own_name} is the weight of a sparse embedding, too, whose rows"
                    " parameter_server fetches for that alone (allowed: sparse=False)"
                )


def _sparse_tables(model: nn.Module) -> set[int]:
    """Return the ``id`` of each trained parameter whose gradients are sparse."""
    tables = set()
    for module in model.modules():
        is_embedding = isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        if is_embedding and module.sparse and module.weight.requires_grad:
            tables.add(id(module.weight))
    return tables


def _outer_optimizer(settings: Settings) -> dict[str, Any]:
    """Return the description of the server's optimizer of local SGD.

    Its "gradient" is how far the workers went from where they began, with the sign turned.
    Averaging is then a plain step of rate 1. DiLoCo (Douillard et al., 2023) takes Nesterov steps
    instead.
    """
    if settings.outer == "average":
        return {"name": "SGD", "groups": [{"lr": 1.0}]}
    options = {"lr": settings.outer_lr, "momentum": settings.outer_momentum, "nesterov": True}
    return {"name": "SGD", "groups": [options]}


def _state_of_piece(tensor: Tensor, piece: Piece, block: Block) -> Tensor:
    """Return one tensor of an optimizer's state as the piece's server holds it (float32, CPU).

    Args:
        tensor: of the whole parameter.
        piece: of the block.
        block: a piece of a flat one gets a flat tensor; part of a sparse table (rows, width); a
            block that is a whole tensor gets the state's own shape, which need not be the
            parameter's.
    """
    whole = tensor.detach().float().cpu()
    if block.shape and not block.sparse:
        return whole
    values = whole.reshape(-1)[piece.start : piece.stop]
    return values.view(block.shape) if block.sparse else values

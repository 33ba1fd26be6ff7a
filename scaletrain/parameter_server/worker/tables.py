"""The sparse tables of a worker's model: rows are fetched as they are read.

A table stays on the servers. The model's own copy holds old values, but for the rows that were
fetched. So its parameter is a ``Table`` while the exchange has it, and torch tells that of every
function that is called with it, wherever that happens (``__torch_function__``).
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from scaletrain.errors import UserError
from scaletrain.parameter_server.worker.hooks import ModelHook
from scaletrain.parameter_server.worker.replica import Replica

# They take the numbers of rows and then the table. Modules call them, too.
_READERS = (functional.embedding, functional.embedding_bag)


class Table(nn.Parameter):
    """A parameter whose rows are fetched before they are read.

    ``Tables`` makes a parameter one, in its place: model and optimizer keep it. Copies are plain
    parameters.
    """

    _fetch: Callable[[Tensor], None]  # gets the numbers of the rows, in any shape
    _name: str  # of the parameter

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call one of torch's functions with a table.

        Raises:
            UserError: a gradient would go through rows that were not fetched, or it would change
                rows. Other reads without a gradient are not noticed.
        """
        named = kwargs or {}
        if func in _READERS:
            rows, table = args[:2]
            if named.get("max_norm") is not None:
                raise UserError(
                    f"exchange: parameter_server does not take {func.__name__} of {table._name}"
                    f" with max_norm {named['max_norm']}, which changes rows as they are read"
                    " (allowed: None)"
                )
            table._fetch(rows)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **named)
            if func not in _READERS and _has_gradient(result):
                [name, *_] = [each._name for each in _flat(args) if isinstance(each, Table)]
                raise UserError(
                    f"exchange: parameter_server fetches the rows of {name} that embedding"
                    f" functions read, and {func.__name__} reads it, too (allowed: nn.Embedding,"
                    " nn.EmbeddingBag, F.embedding and F.embedding_bag alone, or sparse=False)"
                )
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        """Return a plain parameter."""
        copy = nn.Parameter(self.data.clone(), self.requires_grad)
        memo[id(self)] = copy
        return copy

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Return the pickle of a plain parameter."""
        return nn.Parameter(self.data, self.requires_grad).__reduce_ex__(protocol)


def _has_gradient(result: Any) -> bool:
    """Return True if backward goes through a result: it is no parameter's shape or the like."""
    values = _flat([result])
    return any(isinstance(value, Tensor) and value.grad_fn is not None for value in values)


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    """Yield values, and those in lists among them."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flat(value)
        else:
            yield value


class Tables:
    """All sparse tables of a model.

    Args:
        replica: of the model, connected.
        model: its state dict, as for a checkpoint, holds all rows.
    """

    def __init__(self, replica: Replica, model: nn.Module):
        self._replica = replica
        # Whether the model's rows are those of the servers. Written by all but ``_fetch``.
        self._are_whole = False
        self._is_closed = False
        for index in replica.tables:
            parameter: Any = replica.parameters[index]
            parameter.__class__ = Table
            parameter._name = replica.names[index]
            parameter._fetch = functools.partial(self._fetch, index)
        model.register_state_dict_pre_hook(ModelHook(self._pull_all))

    def begin(self) -> None:
        """Note that a step is done, which has changed rows on the servers."""
        self._are_whole = False

    def close(self) -> None:
        """Let no old row be taken for a new one, after the servers are gone."""
        self._is_closed = True

    def _fetch(self, index: int, numbers: Tensor) -> None:
        """Fetch the rows that somebody is about to read."""
        if self._is_closed:
            self._check_whole(index)
            return
        rows = numbers.detach().reshape(-1).to("cpu", torch.int64).unique()
        self._replica.pull_rows(index, rows)

    def _pull_all(self, *_: object) -> None:
        """Fetch all rows of all tables (a hook of the model)."""
        for index, blocks in self._replica.tables.items():
            if self._is_closed:
                self._check_whole(index)
                continue
            for block in blocks:
                self._replica.pull(block)
        self._are_whole = True

    def _check_whole(self, index: int) -> None:
        """Raise ``UserError`` if a table has old rows, and nobody has the new ones any more."""
        if not self._are_whole:
            raise UserError(
                f"exchange: the rows of {self._replica.names[index]} were with the servers, which"
                " are gone (allowed: the model's state_dict() before exchange.close(), which"
                " fetches them)"
            )

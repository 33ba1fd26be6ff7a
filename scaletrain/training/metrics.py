"""Figures of the whole test set that are no means, joined over the ranks.

Most are metrics of torchmetrics, whose states say themselves how they are joined: added, averaged,
the largest, the smallest, or one after the other. Every rank then computes the same figures from
them as one worker would have.
"""

import abc
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from scaletrain import plugins
from scaletrain.config import RunConfig, presence
from scaletrain.config.grammar import is_users_own
from scaletrain.errors import UserError, unknown
from scaletrain.training.exchange import Exchange

if TYPE_CHECKING:
    from torchmetrics import Metric

_MODULES = ("torchmetrics", "torchmetrics.classification", "torchmetrics.regression")


class Collected(abc.ABC):
    """A figure of rows that all batches of the test set add, without torchmetrics.

    A derived class names its states. Each is an attribute: a list of tensors (rows, ...), whose
    rows of all ranks stand one after the other when ``compute`` is called.
    """

    STATES: ClassVar[tuple[str, ...]]

    @abc.abstractmethod
    def reset(self) -> None:
        """Begin anew. Each state holds one tensor without rows, which tells shape and dtype."""

    @abc.abstractmethod
    def update(self, *args: Any, **kwargs: Any) -> None:
        """Add rows, with parameters that the derived class names."""

    @abc.abstractmethod
    def compute(self) -> float:
        """Return the figure of all rows."""


def build(config: RunConfig) -> "dict[str, Metric]":
    """Return the metrics that a configuration names.

    Raises:
        UserError: torchmetrics is missing, there is no such metric, or it refuses its options.
    """
    metrics = {}
    for figure, named in config.metrics.items():
        factory = _factory(config, figure, named.name)
        try:
            metrics[figure] = factory(**named.options)
        except (TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"metrics.{figure}: {named.name}: {reason}") from None
    return metrics


def _factory(config: RunConfig, figure: str, name: str) -> "Callable[..., Metric]":
    if is_users_own(name):
        users_own: Callable[..., Metric] = plugins.load("metric", name, config.search_path)
        return users_own
    classes = _torchmetrics_classes()
    if name.lower() not in classes:
        names = [found.__name__ for found in classes.values()]
        raise unknown(f"metrics.{figure}", name, names)
    return classes[name.lower()]


def _torchmetrics_classes() -> "dict[str, type[Metric]]":
    """Return the metrics for outputs and targets by their names in lower case."""
    presence.TORCHMETRICS.check_installed("metrics:")
    from torchmetrics import Metric

    classes = {}
    for module in _MODULES:
        for value in vars(importlib.import_module(module)).values():
            if inspect.isclass(value) and issubclass(value, Metric) and value is not Metric:
                classes[value.__name__.lower()] = value
    return classes


def prepare(metrics: "Mapping[str, Metric | Collected]", device: torch.device) -> None:
    """Bring metrics to the device, and check that they can be joined.

    Raises:
        UserError: one is no metric, or has states without a rule for joining them.
    """
    for figure, metric in metrics.items():
        if isinstance(metric, Collected):
            continue
        parts = _parts(metric)
        if not parts:
            raise UserError(
                f"metrics.{figure}: is a {type(metric).__name__} (allowed: a torchmetrics.Metric)"
            )
        metric.to(device)
        for part in parts:
            # Else torchmetrics would join the states as well, and count everything twice.
            part.distributed_available_fn = _is_never_distributed
            for state in part._defaults:
                _rule(figure, part, state)


def reset(metrics: "Mapping[str, Metric | Collected]") -> None:
    """Begin anew."""
    for metric in metrics.values():
        metric.reset()


def joined(
    metrics: "Mapping[str, Metric | Collected]", exchange: Exchange, has_samples: bool
) -> dict[str, float]:
    """Return the figures over all ranks (collective); none if no rank has samples.

    Args:
        metrics: which have seen this rank's samples.
        exchange: adds states; those that are not added travel in a place of each rank's own.
        has_samples: False: this rank has shown its metrics one sample, for the shapes alone.
    """
    states: list[_State] = []
    for figure, metric in metrics.items():
        states += _states(figure, metric)
    if not states:
        return {}
    # 1. How many rows each rank's states have, since those of a list differ.
    rank, size = exchange.world.rank, exchange.world.size
    rows = torch.zeros(size, 1 + len(states), dtype=torch.float64)
    if has_samples:
        rows[rank] = torch.tensor([1, *(len(state.rows) for state in states)])
    rows = exchange.sum(rows.flatten()).view(size, -1)
    if not rows[:, 0].any():
        return {}
    # 2. All states in one sum.
    blocks = []
    for index, state in enumerate(states):
        own = state.rows if has_samples else state.rows[:0]
        blocks.append(state.block(own, rows[:, 1 + index].long().tolist(), rank))
    total = exchange.sum(torch.cat([block.flatten() for block in blocks]))
    parts = total.split([block.numel() for block in blocks])
    # 3. Every rank computes the figures.
    for state, part, block in zip(states, parts, blocks, strict=True):
        state.set(part.view(block.shape))
    figures: dict[str, float] = {}
    for figure, metric in metrics.items():
        figures |= _named(figure, metric.compute())
    return figures


class _State:
    """One state of a metric on this rank.

    Args:
        metric: that has it.
        name: of its attribute.
        rule: how the states of all ranks become one.
    """

    def __init__(self, metric: "Metric | Collected", name: str, rule: str):
        self._metric = metric
        self._name = name
        self._rule = rule
        value = getattr(metric, name)
        self._is_list = isinstance(value, list)
        if self._is_list:
            # Empty where a rank has seen nothing that counts.
            rows = [torch.atleast_1d(each) for each in value]
            value = torch.cat(rows) if rows else torch.zeros(0)
        self._value: Tensor = value
        # Shape (rows, ...): only "cat" has more than one row, and may have a number of its own.
        self.rows = value if rule == "cat" else value.unsqueeze(0)

    def block(self, own: Tensor, rows: list[int], rank: int) -> Tensor:
        """Return this rank's part of the sum that joins the state.

        Args:
            own: the rows that this rank has, or none.
            rows: how many each rank has.
            rank: of this worker.
        """
        if self._rule == "sum":
            return own.double().sum(0, keepdim=True).cpu()
        block = torch.zeros(sum(rows), *own.shape[1:], dtype=torch.float64)
        begin = sum(rows[:rank])
        block[begin : begin + len(own)] = own
        return block

    def set(self, joined: Tensor) -> None:
        """Give the metric the state of all ranks.

        Args:
            joined: the sum of all ranks' blocks.
        """
        if self._rule == "mean":
            joined = joined.mean(0)
        elif self._rule == "max":
            joined = joined.amax(0)
        elif self._rule == "min":
            joined = joined.amin(0)
        elif self._rule == "sum":
            joined = joined[0]
        joined = joined.to(self._value)
        setattr(self._metric, self._name, [joined] if self._is_list else joined)


def _states(figure: str, metric: "Metric | Collected") -> list[_State]:
    if isinstance(metric, Collected):
        return [_State(metric, name, "cat") for name in metric.STATES]
    states = []
    for part in _parts(metric):
        for name in part._defaults:
            states.append(_State(part, name, _rule(figure, part, name)))
    return states


def _rule(figure: str, metric: "Metric", state: str) -> str:
    """Return how a state is joined: sum, mean, max, min or cat.

    Raises:
        UserError: in another way.
    """
    from torchmetrics.utilities import data

    for rule in ("sum", "mean", "max", "min", "cat"):
        if metric._reductions[state] is getattr(data, f"dim_zero_{rule}"):
            return rule
    raise UserError(
        f"metrics.{figure}: the state {state} of {type(metric).__name__} cannot be joined over"
        " ranks (allowed: metrics whose states are joined by sum, mean, max, min or cat)"
    )


def _parts(metric: Any) -> "list[Metric]":
    """Return a metric and those that it is made of; none if it is no metric."""
    from torchmetrics import Metric

    if not isinstance(metric, Metric):
        return []
    return [part for part in metric.modules() if isinstance(part, Metric)]


def _is_never_distributed() -> bool:
    return False


def _named(figure: str, value: Any) -> dict[str, float]:
    """Return a metric's value as figures: several if it is a vector or has names of its own.

    Raises:
        UserError: it is neither.
    """
    if isinstance(value, Mapping):
        figures: dict[str, float] = {}
        for name, part in value.items():
            figures |= _named(f"{figure}_{name}", part)
        return figures
    if isinstance(value, int | float):
        return {figure: float(value)}
    if isinstance(value, Tensor) and value.numel() == 1:
        return {figure: value.item()}
    if isinstance(value, Tensor) and value.ndim == 1:
        return {f"{figure}_{index}": part for index, part in enumerate(value.tolist())}
    shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
    raise UserError(
        f"metrics.{figure}: is a {type(value).__name__}{shape} (allowed: a number, a vector, or a"
        " dict of them)"
    )

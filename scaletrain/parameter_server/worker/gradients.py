"""Steps whose update the servers make: gradients leave while backward computes them.

The modes ``sync``, ``async`` and ``bounded``; ``local_steps`` has the others.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from scaletrain.errors import UserError
from scaletrain.parameter_server.protocol.settings import Settings
from scaletrain.parameter_server.worker.client import PushResult
from scaletrain.parameter_server.worker.clipping import ClippedSteps
from scaletrain.parameter_server.worker.replica import Replica


class _Pushed(NamedTuple):
    """A gradient that has left in this step."""

    rate: float  # of its parameter's group
    gradient: Tensor | None  # held until the next step, so that another one is noticed
    version: int  # torch's count of changes in place


def _version(gradient: Tensor | None) -> int:
    """Return torch's count of the changes of a gradient in place."""
    return 0 if gradient is None else gradient._version


class GradientSteps:
    """Pushes each gradient as backward makes it, and waits for the new weights.

    Gradients that backward did not push leave at the end of the step: those of passes inside
    ``accumulate``, and those that somebody has set. A parameter without a gradient is left alone.

    The learning rate travels with the gradients. It is the one that the optimizer's groups hold
    during backward.

    Args:
        settings: of the job.
        replica: connected.
        model: the replica's; gets hooks.
        optimizer: over the model's parameters. Its rates are read; it takes no steps.
    """

    def __init__(
        self,
        settings: Settings,
        replica: Replica,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
    ):
        self._settings = settings
        self._replica = replica
        self._optimizer = optimizer
        self._step = 0  # of the job, that the next gradients belong to
        self._accumulating = False
        self._holding = False  # all gradients leave at the end of a step
        self._clipped: ClippedSteps | None = None  # the servers hold the updates back
        # The gradients that have left in this step, by the parameter's index. Written by ``_push``,
        # which backward's thread calls, too; emptied by ``begin``.
        self._pushed: dict[int, _Pushed] = {}
        # Removed by ``close``. Those of parameters end with the model.
        self._hooks: list[RemovableHandle] = []
        # Checkpoints hold the servers' optimizer state, as long as the servers are there.
        self._hooks.append(optimizer.register_state_dict_pre_hook(replica.fetch_state))
        for index, parameter in enumerate(replica.parameters):
            hook = functools.partial(self._on_gradient, index)
            parameter.register_post_accumulate_grad_hook(hook)
        if replica.tables:
            self._watch_tables(model)

    def begin(self, step: int) -> None:
        """Expect the gradients of the job's step ``step``."""
        self._step = step
        self._replica.begin()
        self._pushed = {}

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        """Let backward passes inside only add to the gradients."""
        self._accumulating = True
        try:
            yield
        finally:
            self._accumulating = False

    def hold(self) -> None:
        """Let all gradients leave at the end of a step, as they are then."""
        self._holding = True

    def clip(self, clipped: ClippedSteps) -> None:
        """Let the servers clip the mean gradient of each step."""
        self._clipped = clipped

    def finish(self) -> list[PushResult]:
        """Wait for the new weights, after backward; return the results of all blocks.

        Blocks are taken in the order in which their gradients left, the last layers first: some are
        copied while others are still updated.

        Raises:
            ValueError: the learning rate was changed after gradients had left with the old one.
            UserError: a gradient was changed after it had left.
        """
        self._check_rates()
        self._check_gradients()
        for index, parameter in enumerate(self._replica.parameters):
            if index not in self._pushed:
                self._push(index, parameter.grad)
        if self._clipped is not None:
            self._clipped.release(self._step)
        # The servers take the optimizer's step. Schedules warn of a step that was never taken.
        self._optimizer._opt_called = True  # type: ignore[attr-defined]
        return [self._replica.take(block) for block in reversed(self._replica.blocks)]

    def close(self) -> None:
        """Let the model and the optimizer go."""
        for hook in self._hooks:
            hook.remove()

    def _on_gradient(self, index: int, parameter: Tensor) -> None:
        """Push a gradient that backward has just completed (a hook of the parameter)."""
        if not self._accumulating and not self._holding:
            self._push(index, parameter.grad)

    def _push(self, index: int, gradient: Tensor | None) -> None:
        """Push a parameter's gradient (None: it has none) with the rate of its group."""
        if index in self._pushed:
            raise RuntimeError(
                "a second backward pass in one step: wrap all but the last in exchange.accumulate()"
            )
        rate = self._rate(index)
        self._pushed[index] = _Pushed(rate, gradient, _version(gradient))
        if self._settings.divide_lr and self._settings.is_asynchronous:
            # A step of all workers is as many updates: together they move as far as the one update
            # of a synchronous step.
            rate /= self._settings.workers
        self._replica.push(index, gradient, self._step, rate)

    def _rate(self, index: int) -> float:
        """Return the learning rate that a parameter's group holds now."""
        group = self._replica.groups[index]
        return float(self._optimizer.param_groups[group]["lr"])

    def _check_rates(self) -> None:
        """Raise ``ValueError`` if a rate is not the one that its gradients have left with."""
        # The servers have a schedule of their own, and ignore the rates of workers.
        if self._settings.server_lr is not None:
            return
        for index, pushed in self._pushed.items():
            rate = self._rate(index)
            if rate != pushed.rate:
                raise ValueError(
                    f"learning rate {rate}: the gradients have left with rate {pushed.rate}: "
                    "set the rate in the optimizer's groups before backward"
                )

    def _check_gradients(self) -> None:
        """Raise ``UserError`` if a gradient is not the one that has left any more."""
        for index, pushed in self._pushed.items():
            gradient = self._replica.parameters[index].grad
            if gradient is not pushed.gradient or _version(gradient) != pushed.version:
                raise UserError(
                    f"exchange: the gradient of {self._replica.names[index]} was changed after it"
                    " had left for the servers (allowed: backward inside exchange.accumulate(),"
                    " then the change, as by clip_grad_norm_; the gradients leave at"
                    " exchange.step())"
                )

    # Sparse embeddings

    def _watch_tables(self, model: nn.Module) -> None:
        """Fetch the rows that a sparse embedding is about to read, and all for a checkpoint."""
        index_of = {id(self._replica.parameters[index]): index for index in self._replica.tables}

        def fetch_rows(
            module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]
        ) -> None:
            numbers = inputs[0] if inputs else named["input"]
            rows = numbers.detach().reshape(-1).cpu().unique()
            self._replica.pull_rows(index_of[id(module.weight)], rows)

        for module in model.modules():
            if (
                isinstance(module, (nn.Embedding, nn.EmbeddingBag))
                and id(module.weight) in index_of
            ):
                module.register_forward_pre_hook(fetch_rows, with_kwargs=True)
        self._hooks.append(model.register_state_dict_pre_hook(self._pull_tables))

    def _pull_tables(self, *_: object) -> None:
        """Fetch all rows of all sparse tables (a hook of the model)."""
        for blocks in self._replica.tables.values():
            for block in blocks:
                self._replica.pull(block)

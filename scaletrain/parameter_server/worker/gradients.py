"""Steps whose update the servers make: gradients leave while backward computes them.

The modes ``sync``, ``async`` and ``bounded``; ``local_steps`` has the others.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from scaletrain.errors import UserError
from scaletrain.parameter_server.protocol import optimizer as optimizers
from scaletrain.parameter_server.protocol.settings import Settings
from scaletrain.parameter_server.worker.client import PushResult
from scaletrain.parameter_server.worker.clipping import ClippedSteps
from scaletrain.parameter_server.worker.hooks import ModelHook
from scaletrain.parameter_server.worker.replica import Replica
from scaletrain.parameter_server.worker.tables import Tables


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
        self._tables = Tables(replica, model) if replica.tables else None
        # By group of the optimizer: the options that servers took over, which no gradient carries.
        self._options = [_without_rate(group) for group in replica.optimizer["groups"]]
        self._frozen = _frozen(model)
        refuse = ModelHook(_refuse_loading)
        self._hooks.append(model.register_load_state_dict_pre_hook(refuse))
        self._hooks.append(optimizer.register_load_state_dict_pre_hook(refuse))

    def begin(self, step: int) -> None:
        """Expect the gradients of the job's step ``step``."""
        self._step = step
        self._replica.begin()
        self._pushed = {}
        if self._tables:
            self._tables.begin()

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
            UserError: something was changed that the servers would not hear of: a gradient after it
                had left, an option of the optimizer, or which parameters are trained.
        """
        self._check_rates()
        self._check_options()
        self._check_frozen()
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
        if self._tables:
            self._tables.close()

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

    def _check_options(self) -> None:
        """Raise ``UserError`` if an option other than the rate is not what the servers have."""
        for number, options in enumerate(self._options):
            group = self._optimizer.param_groups[number]
            for name, value in options.items():
                present = optimizers.plain(group[name])
                if present != value:
                    raise UserError(
                        f"optimizer: {name} of group {number} was changed to {present}, and the"
                        f" servers have {value} (allowed: schedules of the rate alone, such as"
                        " OneCycleLR with cycle_momentum=False)"
                    )

    def _check_frozen(self) -> None:
        """Raise ``UserError`` if a parameter is trained that the servers do not have."""
        for name, parameter in self._frozen.items():
            if parameter.requires_grad and parameter.grad is not None:
                raise UserError(
                    f"exchange: parameter {name} has a gradient, and needed none at attach: the"
                    " servers do not have it (allowed: let it need one before attach)"
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


def _refuse_loading(*_: object) -> None:
    """Raise ``UserError``: weights and state are loaded here (a hook of model and optimizer)."""
    raise UserError(
        "exchange: load_state_dict after attach does not reach the servers, which have weights and"
        " optimizer state (allowed: load_state_dict before attach)"
    )


def _without_rate(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a group that stay the same during training."""
    return {name: value for name, value in options.items() if name != "lr"}


def _frozen(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that need no gradient, by name."""
    named = model.named_parameters()
    return {name: parameter for name, parameter in named if not parameter.requires_grad}

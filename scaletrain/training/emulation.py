"""Emulated accelerators: a step waits instead of computing; gradients really move.

The wait is sleep, not work, so that many workers share few cores without slowing each other. During
backward it is spread over the layers, last layer first: an exchange overlaps it just as it would
overlap computation. Figures measured in this way are EMULATED.
"""

import os
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# A backward pass costs about two forward passes: gradients of inputs, and of weights.
FORWARD_SHARE = 1 / 3
# Names a file that holds this host's factor. A rehearsal may change it while the job runs.
SLOWDOWN = "SCALETRAIN_SLOWDOWN"


def emulate(model: nn.Module, step_s: float = 0.0, sample_s: float = 0.0) -> nn.Module:
    """Return a model's parameters on an emulated accelerator.

    The result keeps the model as ``inner``, with the same parameter tensors. Its outputs are
    zeros of the model's output shape; each weight's gradient is the sum of the output's gradient
    over the number of weights. The time of backward is spread over the layers in proportion to
    their ``multiply_adds`` if all layers have that attribute (``models/shapes``), else evenly.

    Args:
        model: the network whose parameters are used.
        step_s: seconds of a pass, whatever its batch. With gradient accumulation every part is one.
        sample_s: seconds of each sample in a pass.
    """
    return Emulated(model, step_s, sample_s)


class Emulated(nn.Module):
    """See ``emulate``."""

    def __init__(self, model: nn.Module, step_s: float, sample_s: float):
        super().__init__()
        self.inner = model
        self.step_s = step_s
        self.sample_s = sample_s
        self._layers = _layers_of(model)
        self._num_weights = 0
        for layer in self._layers:
            self._num_weights += sum(parameter.numel() for parameter in layer.parameters)
        self._output_shape: torch.Size | None = None  # of one sample

    def forward(self, inputs: Tensor) -> Tensor:
        """(n, ...) -> zeros of the shape that the model would return."""
        began = time.monotonic()
        if self._output_shape is None:
            self._output_shape = self._output_shape_for(inputs)
        seconds = (self.step_s + self.sample_s * len(inputs)) * _host_slowdown()
        timer = _BackwardTimer(seconds * (1 - FORWARD_SHARE))
        outputs = torch.zeros(
            len(inputs),
            *self._output_shape,
            device=inputs.device,
            requires_grad=torch.is_grad_enabled(),
        )
        # Backward begins with the last layer: a layer is due once all later layers had their share.
        due = []
        elapsed_share = 0.0
        for layer in reversed(self._layers):
            elapsed_share += layer.share
            due.append((layer, elapsed_share))
        # Applied from the first layer to the last, so autograd runs the last one first.
        for layer, share in reversed(due):
            outputs = _LayerBackward.apply(
                outputs, timer, share, self._num_weights, *layer.parameters
            )
        # From ``began`` on: the time that this function itself took is part of the wait.
        _wait_until(began + seconds * FORWARD_SHARE)
        return outputs

    @torch.no_grad()
    def _output_shape_for(self, inputs: Tensor) -> torch.Size:
        """Return the shape of one sample's output, from one real pass in evaluation mode."""
        # Training mode would change batch norm's statistics, and refuse a batch of one.
        was_training = self.inner.training
        self.inner.eval()
        shape = self.inner(inputs[:1]).shape[1:]
        self.inner.train(was_training)
        return shape


class _BackwardTimer:
    """When the parts of one backward pass are due.

    It starts with the first layer that asks. A part that is late is caught up by the next one, as
    on a device that computes while the host is busy.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._began: float | None = None

    def wait(self, share: float) -> None:
        """Wait until this share of the backward pass has gone by."""
        if self._began is None:
            self._began = time.monotonic()
        _wait_until(self._began + self._seconds * share)


class _LayerBackward(torch.autograd.Function):
    """Passes its input on. In backward it waits, and makes its parameters' gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        passed: Tensor,
        timer: _BackwardTimer,
        share: float,
        num_weights: int,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.timer = timer
        ctx.share = share
        ctx.num_weights = num_weights
        ctx.like = [(p.shape, p.dtype, p.device) for p in parameters]
        return passed.view_as(passed)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        ctx.timer.wait(ctx.share)
        # From the first output alone: over all classes, the gradient of cross entropy adds up to 0.
        value = (gradient[..., 0].sum() / ctx.num_weights).item()
        gradients = []
        for shape, dtype, device in ctx.like:
            gradients.append(torch.full(shape, value, dtype=dtype, device=device))
        # Nothing for timer, share and num_weights.
        return gradient, None, None, None, *gradients


class _EmulatedLayer(NamedTuple):
    parameters: list[nn.Parameter]
    share: float  # of the time of a backward pass


def _layers_of(model: nn.Module) -> list[_EmulatedLayer]:
    """Return the layers that have trainable parameters, in the model's order.

    A shared parameter belongs to the first layer that has it.
    """
    seen: set[nn.Parameter] = set()
    parameters_of: list[list[nn.Parameter]] = []
    costs: list[int] = []  # multiply-adds; 0: the layer does not say
    for module in model.modules():
        parameters = []
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad and parameter not in seen:
                parameters.append(parameter)
        seen.update(parameters)
        if parameters:
            parameters_of.append(parameters)
            costs.append(getattr(module, "multiply_adds", 0))
    # Shares make sense only if every layer says its cost: else all layers count the same.
    if not all(costs):
        costs = [1] * len(costs)
    layers = []
    for parameters, cost in zip(parameters_of, costs, strict=True):
        layers.append(_EmulatedLayer(parameters, cost / sum(costs)))
    return layers


def _host_slowdown() -> float:
    path = os.environ.get(SLOWDOWN)
    if not path:
        return 1.0
    with open(path, encoding="ascii") as file:
        return float(file.read())


def _wait_until(moment: float) -> None:
    left = moment - time.monotonic()
    if left > 0:
        time.sleep(left)

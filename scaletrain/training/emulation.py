"""Emulated accelerators: a step that waits instead of computing, while gradients of the true sizes really move.

The wait is sleep, not work, so that many workers share few cores without slowing each other. During backward it is spread over
the layers, last layer first: an exchange overlaps it just as it would overlap computation. What is measured this way is EMULATED.
"""

import os
import time
from typing import Any

import torch
from torch import Tensor, nn

FORWARD_SHARE = (
    1 / 3
)  # a backward pass costs about two forward passes: gradients of inputs, and of weights
SLOWDOWN = "SCALETRAIN_SLOWDOWN"  # path of a file with this host's factor; a rehearsal may change it while the job runs


def emulate(
    model: nn.Module, step_s: float = 0.0, sample_s: float = 0.0, slowdown: float = 1.0
) -> nn.Module:
    """``model``'s parameters on an accelerator that takes ``(step_s + sample_s * samples) * slowdown`` seconds for a pass.

    The result keeps the model as ``inner``, with the same parameter tensors. Its outputs are zeros of the model's
    output shape; each weight's gradient is the sum of the output's gradient over the number of weights. The time of backward is
    spread over the layers in proportion to their ``multiply_adds`` where all have that attribute (``models/shapes``), else evenly. Gradient
    accumulation makes one pass a part: ``step_s`` then counts once each.
    """
    return Emulated(model, step_s, sample_s, slowdown)


class Emulated(nn.Module):
    """See ``emulate``."""

    def __init__(self, model: nn.Module, step_s: float, sample_s: float, slowdown: float):
        super().__init__()
        self.inner = model
        self.step_s, self.sample_s, self.slowdown = step_s, sample_s, slowdown
        self._layers = _layers(model)
        self._num_weights = sum(p.numel() for layer, _ in self._layers for p in layer)
        self._output_shape: torch.Size | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        """(n, ...) -> zeros of the shape the model would give."""
        began = time.monotonic()
        if self._output_shape is None:
            self._output_shape = self._try(inputs)
        seconds = (self.step_s + self.sample_s * len(inputs)) * self.slowdown * _host_slowdown()
        clock = _Clock(seconds * (1 - FORWARD_SHARE))
        outputs = torch.zeros(
            len(inputs),
            *self._output_shape,
            device=inputs.device,
            requires_grad=torch.is_grad_enabled(),
        )
        until = 0.0  # when this layer's gradients are there, as a part of backward; the last layer's are first
        backwards = []
        for parameters, share in reversed(self._layers):
            until += share
            backwards.append((parameters, until))
        for parameters, part in reversed(backwards):
            outputs = _Layer.apply(outputs, clock, part, self._num_weights, *parameters)
        _wait_until(began + seconds * FORWARD_SHARE)
        return outputs

    @torch.no_grad()
    def _try(self, inputs: Tensor) -> torch.Size:
        """The shape of one sample's output, from one real pass in evaluation mode."""
        training = self.inner.training
        self.inner.eval()
        shape = self.inner(inputs[:1]).shape[1:]
        self.inner.train(training)
        return shape


class _Clock:
    """When the parts of one backward pass are due. It starts with the first layer that asks; lateness of one part is caught up
    by the next, as on a device that computes while the host is busy."""

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._began: float | None = None

    def wait(self, part: float) -> None:
        self._began = time.monotonic() if self._began is None else self._began
        _wait_until(self._began + self._seconds * part)


class _Layer(torch.autograd.Function):
    """Passes its input on; in backward waits for the layer's share and hands out gradients of its parameters' sizes."""

    @staticmethod
    def forward(
        ctx: Any, passed: Tensor, clock: _Clock, part: float, num_weights: int, *parameters: Tensor
    ) -> Tensor:
        ctx.clock, ctx.part, ctx.num_weights = clock, part, num_weights
        ctx.like = [(p.shape, p.dtype, p.device) for p in parameters]
        return passed.view_as(passed)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        ctx.clock.wait(ctx.part)
        value = (gradient[..., 0].sum() / ctx.num_weights).item()
        return (
            gradient,
            None,
            None,
            None,
            *(torch.full(s, value, dtype=t, device=d) for s, t, d in ctx.like),
        )


def _layers(model: nn.Module) -> list[tuple[list[nn.Parameter], float]]:
    """Each layer's trainable parameters (a shared one where it comes first) and its share of the time, in the model's order."""
    seen: set[nn.Parameter] = set()
    found = []
    for module in model.modules():
        own = [p for p in module.parameters(recurse=False) if p.requires_grad and p not in seen]
        seen.update(own)
        if own:
            found.append((own, getattr(module, "multiply_adds", None)))
    known = all(cost for _, cost in found)
    costs = [cost if known else 1 for _, cost in found]
    return [(own, cost / sum(costs)) for (own, _), cost in zip(found, costs, strict=True)]


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

"""SGD whose rate each layer scales by the norms of its weights and gradient, for large batches.

Source: You, Gitman and Ginsburg 2017, "Large Batch Training of Convolutional Networks"
(arXiv 1708.03888), Algorithm 1.
"""

from collections.abc import Callable, Iterable
from typing import Annotated, Any

import torch
from annotated_types import Ge, Lt
from torch import Tensor


class Lars(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling of SGD with momentum.

    For a layer with weights w, gradient g and weight decay b::

        local = trust |w| / (|g| + b |w|)
        v = momentum v + local (g + b w)
        w = w - lr v

    The paper has ``lr`` inside ``v``. As long as the rate stays, the steps are the same; when it
    changes, these are those of the paper with the momentum correction of Goyal et al. 2017
    (arXiv 1706.02677, section 3), as in torch's SGD.

    Args:
        params: parameters or groups.
        options: the parameters of ``optimizer``, which describes them.
    """

    def __init__(self, params: Iterable[Any], **options: Any):
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step; return the value of the closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, weights: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        update = gradient.add(weights, alpha=group["weight_decay"])
        if group["adaptive"]:
            weight_norm, gradient_norm = weights.norm(), gradient.norm()
            local = group["trust_coefficient"] * weight_norm
            local /= gradient_norm + group["weight_decay"] * weight_norm
            # Zeros, such as the bias of a new layer, would never move. The choice is made without
            # waiting for the device.
            has_both = (weight_norm > 0) & (gradient_norm > 0)
            update *= torch.where(has_both, local, 1.0)
        if group["momentum"]:
            state = self.state[weights]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(weights)
            update = state["momentum_buffer"].mul_(group["momentum"]).add_(update)
        weights.add_(update, alpha=-group["lr"])


def optimizer(
    groups: Iterable[Any],
    *,
    lr: Annotated[float, Ge(0)] = 1.0,
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9,
    weight_decay: Annotated[float, Ge(0)] = 0.0,
    trust_coefficient: Annotated[float, Ge(0)] = 0.001,
    adaptive: bool = True,
) -> torch.optim.Optimizer:
    """Return the optimizer.

    Args:
        groups: parameter groups.
        lr: the rate of all layers.
        momentum: of the scaled gradients.
        weight_decay: added to the gradient.
        trust_coefficient: how far a layer's step may change its weights, relative to their norm.
        adaptive: false is plain SGD, as is usual for biases and normalisation.
    """
    return Lars(
        groups,
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        trust_coefficient=trust_coefficient,
        adaptive=adaptive,
    )

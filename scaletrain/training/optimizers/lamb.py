"""AdamW whose steps each layer scales to the norm of its weights, for large batches.

Source: You et al. 2019, "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes"
(arXiv 1904.00962), Algorithm 2 with the identity as its phi.
"""

import math
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import torch
from annotated_types import Ge, Lt
from torch import Tensor


class Lamb(torch.optim.Optimizer):
    """Layer-wise adaptive moments.

    For a layer with weights w, gradient g and weight decay b, in step t::

        m = beta1 m + (1 - beta1) g
        v = beta2 v + (1 - beta2) g^2
        r = (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps) + b w
        w = w - lr (|w| / |r|) r

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
        state = self.state[weights]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(weights)
            state["exp_avg_sq"] = torch.zeros_like(weights)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        mean = state["exp_avg"].lerp_(gradient, 1 - beta1)
        square = state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = square.sqrt() / math.sqrt(1 - beta2 ** state["step"])
        update = (mean / (1 - beta1 ** state["step"])) / (root + group["eps"])
        update += group["weight_decay"] * weights
        if group["adaptive"]:
            weight_norm, update_norm = weights.norm(), update.norm()
            # Zeros, such as the bias of a new layer, would never move. The choice is made without
            # waiting for the device.
            has_both = (weight_norm > 0) & (update_norm > 0)
            update *= torch.where(has_both, weight_norm / update_norm, 1.0)
        weights.add_(update, alpha=-group["lr"])


def optimizer(
    groups: Iterable[Any],
    *,
    lr: Annotated[float, Ge(0)] = 0.001,
    betas: tuple[Annotated[float, Ge(0), Lt(1)], Annotated[float, Ge(0), Lt(1)]] = (0.9, 0.999),
    eps: Annotated[float, Ge(0)] = 1e-6,
    weight_decay: Annotated[float, Ge(0)] = 0.01,
    adaptive: bool = True,
) -> torch.optim.Optimizer:
    """Return the optimizer.

    Args:
        groups: parameter groups.
        lr: the rate; with ``adaptive``, a layer's step relative to the norm of its weights.
        betas: how much of the gradient's and of its square's moving average a step keeps.
        eps: added to the root of the square.
        weight_decay: added to the step.
        adaptive: false is AdamW, as is usual for biases and normalisation.
    """
    return Lamb(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, adaptive=adaptive)

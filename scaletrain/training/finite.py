"""Find out where a value that is not finite comes from, once a loss or a gradient shows one."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from scaletrain.training import batch_norm, compiling
from scaletrain.training.workload import Workload

_MOST_SAMPLES = 5  # that a message names


def finite_or_none(value: float) -> float | None:
    """Return the value; None if it is not finite, which JSON cannot hold."""
    return value if math.isfinite(value) else None


def all_finite(tensors: Iterable[Tensor | None]) -> bool:
    """Return True if every element of all tensors is finite. Waits for the device once."""
    present = [tensor.detach() for tensor in tensors if tensor is not None]
    if not present:
        return True
    # A norm is infinite or NaN if one element is, and reads each element once. An overflow of the
    # norm itself is a gradient that no optimizer could use either.
    norms = torch._foreach_norm(present)
    return bool(torch.isfinite(torch.stack(norms)).all())


@torch.no_grad()
def explain(workload: Workload, batch: Any, samples: Sequence[int]) -> str:
    """Return in words where a batch's values stop being finite; empty if no layer shows it.

    It runs forward once more, so the model is left as a forward pass leaves it. Random layers draw
    anew, unless the caller seeds the generators as for the first pass.

    Args:
        workload: with the module in place that may be called on one rank alone.
        batch: on the device.
        samples: the numbers of the batch's samples in the training set, in order.
    """
    for name, parameter in workload.model.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"weight {name} is not finite, since the update of an earlier step"
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor) and not _is_finite(leaf):
            return f"the input has values that are not finite{_of_samples(leaf, samples)}"
    watch = _Watch(samples)
    hooks = []
    for name, module in workload.model.named_modules():
        if not any(module.children()):  # a container only hands on the output of its layers
            hooks.append(module.register_forward_hook(watch.hook(name or "model")))
    try:
        with batch_norm.alone(), compiling.as_written():
            workload.forward(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return watch.found


class _Watch:
    """Notes the first layer of a forward pass with an output that is not finite."""

    def __init__(self, samples: Sequence[int]):
        self._samples = samples
        self.found = ""  # in words

    def hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        """Return a forward hook for the layer of this name."""

        def note(module: nn.Module, arguments: Any, output: Any) -> None:
            if self.found:
                return  # only the first layer is the origin
            for leaf in pytree.tree_leaves(output):
                if isinstance(leaf, Tensor) and not _is_finite(leaf):
                    layer = f"layer {name} ({type(module).__name__})"
                    where = _of_samples(leaf, self._samples)
                    self.found = f"{layer} is the first that is not finite{where}"
                    return

        return note


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _of_samples(tensor: Tensor, samples: Sequence[int]) -> str:
    """Return which samples are not finite, if the tensor has a row for each."""
    if tensor.ndim == 0 or len(tensor) != len(samples):
        return ""
    is_bad = ~torch.isfinite(tensor.flatten(1) if tensor.ndim > 1 else tensor[:, None]).all(1)
    bad = [samples[row] for row in is_bad.nonzero().flatten().tolist()]
    if not bad:
        return ""
    named = ", ".join(map(str, bad[:_MOST_SAMPLES]))
    rest = f" and {len(bad) - _MOST_SAMPLES} more" if len(bad) > _MOST_SAMPLES else ""
    return f" (training samples {named}{rest})"

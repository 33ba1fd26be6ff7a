"""The precision in which a step computes, and the loss scaling that fp16 needs.

Weights, gradients and their exchange stay float32. Forward computes in half precision where that is
safe (torch's autocast), and backward follows it layer by layer.

fp16 has no room for small gradients: they are computed from a loss that is multiplied by a scale.
The scale falls when a gradient overflows, and that step is left out; it rises again after many good
steps. Gradients are the mean over all ranks by then, so all ranks decide alike.
"""

import contextlib
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from scaletrain.errors import UserError

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """How one worker's forward and backward compute.

    Args:
        name: float32, bf16 or fp16.
        device: of the model.
        models: names of those that are updated by themselves; each has a scale of its own.

    Raises:
        UserError: this device, or this torch, does not compute in fp16.
    """

    def __init__(self, name: str, device: torch.device, models: Iterable[str]):
        self._device = device.type
        self._dtype = _DTYPES.get(name)
        self._scalers: dict[str, torch.amp.GradScaler] = {}
        if name == "fp16":
            _check_fp16(self._device)
            for model in models:
                self._scalers[model] = torch.amp.GradScaler(self._device)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which forward runs."""
        if self._dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self._device, dtype=self._dtype)

    def scaled(self, model: str, total: Tensor) -> Tensor:
        """Return a loss as backward takes it."""
        scaler = self._scalers.get(model)
        return scaler.scale(total) if scaler else total

    def unscale(self, model: str, optimizer: torch.optim.Optimizer) -> bool:
        """Bring a model's gradients back to their true size, and adapt its scale.

        Call it once after backward, when the exchange has averaged all ranks' gradients.

        Returns:
            Whether they are finite; without a scale always True, since they are not looked at.
        """
        scaler = self._scalers.get(model)
        if scaler is None:
            return True
        scaler.unscale_(optimizer)
        before = scaler.get_scale()
        # It falls if and only if a gradient has overflowed.
        scaler.update()
        return scaler.get_scale() >= before

    @property
    def scale(self) -> float | None:
        """The factor of the loss, the smallest of several models'; None unless it is fp16."""
        if not self._scalers:
            return None
        return min(scaler.get_scale() for scaler in self._scalers.values())

    def state_dict(self) -> dict[str, Any]:
        """Return the scales and how long they have been good."""
        return {model: scaler.state_dict() for model, scaler in self._scalers.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with scales of an earlier run; a model that had none keeps its own."""
        for model, scaler in self._scalers.items():
            if model in state:
                scaler.load_state_dict(state[model])


def _check_fp16(device: str) -> None:
    """Raise ``UserError`` if autocast to fp16 or the scaler would quietly do nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's words on what the error below says
        scales = torch.amp.GradScaler(device).is_enabled()
        with torch.autocast(device, dtype=torch.float16):
            casts = torch.is_autocast_enabled(device)
    if not scales or not casts:
        raise UserError(
            f"precision: 'fp16' is not available on {device} with torch {torch.__version__}"
            " (allowed: float32, bf16)"
        )

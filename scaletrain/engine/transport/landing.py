"""Where messages land that are to be reduced into a tensor: buffers kept from round to round."""

import torch
from torch import Tensor

_VIEWS = 32  # of one buffer, by what it was lent for


class Landing:
    """A buffer, and what it looks like to those who borrowed it before."""

    __slots__ = ("_views", "memory")

    def __init__(self, num_bytes: int, pinned: bool = False):
        self.memory = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pinned)
        self._views: dict[tuple[int, torch.dtype], Tensor] = {}

    def like(self, tensor: Tensor) -> Tensor:
        """As many elements of the same dtype."""
        key = (tensor.numel(), tensor.dtype)
        view = self._views.get(key)
        if view is None:
            if len(self._views) == _VIEWS:
                self._views.clear()
            view = self._views[key] = self.memory[: tensor.nbytes].view(tensor.dtype)
        return view


class Landings:
    """Lends out buffers; a wire in steady state allocates nothing."""

    def __init__(self) -> None:
        self._free: list[Landing] = []

    def take(self, num_bytes: int) -> Landing:
        """Of at least ``num_bytes``."""
        for index, landing in enumerate(self._free):
            if landing.memory.nbytes >= num_bytes:
                return self._free.pop(index)
        self._free.clear()  # messages have grown
        return Landing(-(-num_bytes // 4096) * 4096)  # pieces of a tensor differ by an element

    def give(self, landing: Landing) -> None:
        self._free.append(landing)

    def clear(self) -> None:
        self._free.clear()

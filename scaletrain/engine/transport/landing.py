"""Buffers for messages that are to be reduced into a tensor, kept from round to round."""

import torch
from torch import Tensor

_MOST_VIEWS = 32  # of one buffer, each by the size and dtype of a message
_PAGE_BYTES = 4096


class Landing:
    """A buffer, and its views as tensors of the messages that it was used for.

    Args:
        num_bytes: its size.
        pinned: the memory is page-locked, so that an accelerator copies it by itself.
    """

    __slots__ = ("_views", "memory")

    def __init__(self, num_bytes: int, pinned: bool = False):
        self.memory = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pinned)
        self._views: dict[tuple[int, torch.dtype], Tensor] = {}

    def like(self, tensor: Tensor) -> Tensor:
        """Return a view of the buffer with the tensor's number of elements and dtype."""
        key = (tensor.numel(), tensor.dtype)
        view = self._views.get(key)
        if view is None:
            if len(self._views) == _MOST_VIEWS:
                # Starting over is simpler than finding the view that is needed least.
                self._views.clear()
            view = self.memory[: tensor.nbytes].view(tensor.dtype)
            self._views[key] = view
        return view


class Landings:
    """Lends out buffers, so that a wire in steady state allocates nothing.

    One thread at a time uses it.
    """

    def __init__(self) -> None:
        self._free: list[Landing] = []

    def take(self, num_bytes: int) -> Landing:
        """Lend a buffer of at least this size."""
        for index, landing in enumerate(self._free):
            if landing.memory.nbytes >= num_bytes:
                return self._free.pop(index)
        self._free.clear()  # messages have grown
        # Whole pages: the pieces of a tensor differ in size by an element.
        return Landing(-(-num_bytes // _PAGE_BYTES) * _PAGE_BYTES)

    def give(self, landing: Landing) -> None:
        """Take a buffer back."""
        self._free.append(landing)

    def clear(self) -> None:
        """Free the buffers that are not lent."""
        self._free.clear()

"""Where messages land that are to be reduced into a tensor: buffers kept from round to round."""

import torch
from torch import Tensor


class Landings:
    """Lends out buffers of bytes; a wire in steady state allocates nothing."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    def take(self, num_bytes: int) -> Tensor:
        """One-dimensional uint8 of at least ``num_bytes``."""
        for index, buffer in enumerate(self._free):
            if buffer.nbytes >= num_bytes:
                return self._free.pop(index)
        self._free.clear()  # messages have grown
        return torch.empty(num_bytes, dtype=torch.uint8)

    def give(self, buffer: Tensor) -> None:
        self._free.append(buffer)

    def clear(self) -> None:
        self._free.clear()

"""A multilayer perceptron whose weights share few real ones by a hash (HashedNets)."""

import math
from itertools import pairwise
from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge, MinLen
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional


class HashedLinear(nn.Module):
    """A linear layer of which many virtual weights have one real value.

    A hash of a weight's place says which one, and another hash its sign (Chen et al. 2015, arXiv
    1504.04788, sections 4.1 and 4.2). The places need no memory in files and on wires: each rank
    computes them, and only real weights are exchanged.

    Args:
        inputs: of a sample.
        outputs: likewise.
        num_real: real weights, those of the biases included.
        seed: of the hash, different for each layer.
    """

    def __init__(self, inputs: int, outputs: int, num_real: int, seed: int):
        super().__init__()
        bound = 1 / math.sqrt(inputs)
        self.weight = nn.Parameter(torch.empty(num_real).uniform_(-bound, bound))
        self.shape = (outputs, inputs + 1)  # of the virtual weights, with a column of biases
        places = np.arange(outputs * (inputs + 1), dtype=np.uint64)
        index = _hash(places, 2 * seed) % np.uint64(num_real)
        sign = _hash(places, 2 * seed + 1) % np.uint64(2)
        # Not buffers: DDP would send those of rank 0 in each step.
        self._index = torch.from_numpy(index.astype(np.int64))
        self._sign = torch.from_numpy(1.0 - 2.0 * sign.astype(np.float32))

    def forward(self, inputs: Tensor) -> Tensor:
        """(n, inputs) -> (n, outputs)."""
        if self._index.device != inputs.device:
            self._index, self._sign = self._index.to(inputs.device), self._sign.to(inputs.device)
        virtual = (self.weight.index_select(0, self._index) * self._sign).view(self.shape)
        return functional.linear(inputs, virtual[:, :-1], virtual[:, -1])


def _hash(places: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """Return 64 bits for each place, the same on every machine (SplitMix64, Steele et al. 2014)."""
    mixed = places + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def model(
    *,
    sizes: Annotated[list[Annotated[int, Ge(1)]], MinLen(2)] = [784, 1000, 10],  # noqa: B006 (never changed)
    smaller: Annotated[float, Ge(1)] = 8.0,
) -> nn.Module:
    """Return the network, with ReLU between layers.

    Args:
        sizes: features of the input, of each hidden layer, and of the output.
        smaller: virtual weights of a layer for each real one.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    for number, (inputs, outputs) in enumerate(pairwise(sizes)):
        num_real = max(1, round(outputs * (inputs + 1) / smaller))
        layers += [HashedLinear(inputs, outputs, num_real, seed=number), nn.ReLU()]
    # Logits may be negative: no ReLU after the last layer.
    return nn.Sequential(*layers[:-1])

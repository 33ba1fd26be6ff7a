"""Compressed files of weights: pruned tensors with few distinct values take little room.

The coding is that of Deep Compression (Han, Mao and Dally 2016, arXiv 1510.00149). It loses
nothing: pruning and sharing of weights happen in training, by the callbacks ``prune`` and
``share_weights``, and here zeros and equal values are found and written in few bits. ``scaletrain
export RUN_DIR --out FILE --compress`` writes such a file.

Example:
    >>> from scaletrain import compression  # doctest: +SKIP
    >>> model.load_state_dict(compression.load(Path("model.safetensors")))  # doctest: +SKIP
"""

from scaletrain.compression.codebook import cluster
from scaletrain.compression.file import FORMAT, Sizes, load, save

__all__ = ["FORMAT", "Sizes", "cluster", "load", "save"]

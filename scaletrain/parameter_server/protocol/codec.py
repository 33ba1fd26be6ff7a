"""float32 tensors <-> raw bytes of a wire dtype."""

import warnings

import numpy as np
import torch
from torch import Tensor

from scaletrain.parameter_server.protocol.wire import Dtype

# Received frames and other processes' memory are wrapped as tensors that are only read. torch has
# no read-only tensors and warns, once in each process. That one warning is spent here.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.from_numpy(np.frombuffer(bytes(4), np.float32))

# The dtype of each value of the option ``wire``.
BY_NAME = {
    "float32": Dtype.FLOAT32,
    "bf16": Dtype.BF16,
    "fp16": Dtype.FP16,
    "trunc16": Dtype.TRUNC16,
}


def encode(values: Tensor, dtype: Dtype) -> np.ndarray:
    """Return values as they travel, in an array with the bytes of the wire.

    Args:
        values: float32, one dimension, contiguous, on the CPU.
        dtype: FLOAT32 (shares the memory of ``values``), BF16, FP16 or TRUNC16 (copies).

    Returns:
        float32 for FLOAT32, else int16; as many elements as ``values``.
    """
    if dtype == Dtype.FLOAT32:
        return values.numpy()
    if dtype == Dtype.TRUNC16:
        # Sign, exponent and the upper 7 bits of the fraction: a bf16 that was cut, not rounded.
        upper_half = values.view(torch.int32) >> 16
        return upper_half.to(torch.int16).numpy()
    rounded = values.to(torch.bfloat16 if dtype == Dtype.BF16 else torch.float16)
    return rounded.view(torch.int16).numpy()


def decode(payload: memoryview, dtype: Dtype) -> Tensor:
    """Return the float32 values of a payload that ``encode`` made, rounded as ``dtype`` is.

    FLOAT32 payloads are not copied: treat the result as read-only.

    >>> raw = encode(torch.tensor([1.0, 3.140625]), Dtype.BF16)
    >>> decode(memoryview(raw), Dtype.BF16)
    tensor([1.0000, 3.1406])
    """
    if dtype == Dtype.FLOAT32:
        return torch.from_numpy(np.frombuffer(payload, np.float32))
    raw = torch.from_numpy(np.frombuffer(payload, np.int16))
    # A truncated float32 and a rounded one (bf16) are read alike.
    sixteen_bit = raw.view(torch.float16 if dtype == Dtype.FP16 else torch.bfloat16)
    return sixteen_bit.float()

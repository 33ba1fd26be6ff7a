"""float32 tensors <-> raw bytes of a wire dtype."""

import warnings

import numpy as np
import torch
from torch import Tensor

from scaletrain.parameter_server.protocol.wire import Dtype

# Received frames and other processes' memory are wrapped as tensors that are only read; torch cannot say so, and warns.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")

BY_NAME = {
    "float32": Dtype.FLOAT32,
    "bf16": Dtype.BF16,
    "fp16": Dtype.FP16,
    "trunc16": Dtype.TRUNC16,
}


def encode(values: Tensor, dtype: Dtype) -> np.ndarray:
    """A contiguous CPU float32 vector as an array of ``dtype``'s bytes; float32 is not copied."""
    if dtype == Dtype.FLOAT32:
        return values.numpy()
    if dtype == Dtype.TRUNC16:
        return (values.view(torch.int32) >> 16).to(torch.int16).numpy()
    return (
        values.to(torch.bfloat16 if dtype == Dtype.BF16 else torch.float16)
        .view(torch.int16)
        .numpy()
    )


def decode(payload: memoryview, dtype: Dtype) -> Tensor:
    """The reverse, float32. float32 payloads are not copied: treat the result as read-only."""
    if dtype == Dtype.FLOAT32:
        return torch.from_numpy(np.frombuffer(payload, np.float32))
    raw = torch.from_numpy(np.frombuffer(payload, np.int16))
    # A truncated float32 and a rounded one (bf16) are read alike.
    return raw.view(torch.float16 if dtype == Dtype.FP16 else torch.bfloat16).float()

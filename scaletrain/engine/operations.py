"""The reduce operations that the engine runs."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from scaletrain.engine.transport import Reduce


class Operation(NamedTuple):
    """A reduce operation that the engine runs."""

    reduce: Reduce
    average: bool = False  # the sum is divided at the end


def number_of(operation: Any) -> int:
    """Return the number of one of torch's reduce operations, a ``ReduceOp`` or its inner enum."""
    return int(getattr(operation, "op", operation))


# By number: looking up torch's enumeration itself takes 2 us more.
OPERATIONS = {
    number_of(dist.ReduceOp.SUM): Operation(torch.add),
    number_of(dist.ReduceOp.AVG): Operation(torch.add, average=True),
    number_of(dist.ReduceOp.PRODUCT): Operation(torch.mul),
    number_of(dist.ReduceOp.MIN): Operation(torch.minimum),
    number_of(dist.ReduceOp.MAX): Operation(torch.maximum),
}
# Half-precision terms are summed in float32: with more than two, rounding after each would grow
# with the number of ranks.
_WIDE = {torch.bfloat16: torch.float32, torch.float16: torch.float32}


def wide_dtype(dtype: torch.dtype, operation: Operation, size: int) -> torch.dtype | None:
    """Return the dtype in which the terms of this many ranks are summed; None: their own."""
    # Two half-precision terms are rounded once either way.
    return _WIDE.get(dtype) if size > 2 or operation.average else None

"""torch's arguments of the collectives beside allreduce, as chunks of a schedule of one hop.

Each function takes the parameters of torch's C++ (``GroupCalls``), and returns a request for the
lane; or None if the answer has to be gloo's own. That is the case for shapes and dtypes that it
refuses, and for what the engine does not do.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scaletrain.engine.operations import OPERATIONS, Operation, number_of
from scaletrain.engine.transport import DTYPES, UNEVEN


class OneHop(NamedTuple):
    """A request for a collective of one hop."""

    collective: str  # one of ``one_hop.COLLECTIVES``
    name: str  # as torch's users know it
    tensors: list[Tensor]  # the result
    # By chunk: what this rank contributes, and where the result goes.
    sources: Mapping[int, Tensor]
    targets: Mapping[int, Tensor]
    num_elements: int  # equal on all ranks; UNEVEN where each pair of ranks has a size of its own
    root: int = 0
    operation: Operation | None = None  # None: nothing is reduced


class Place(NamedTuple):
    """This rank's place in its group."""

    rank: int
    size: int


def barrier(place: Place) -> OneHop:
    """Return the request for ``barrier``."""
    return OneHop("barrier", "barrier", [], {}, {}, 0)


def broadcast(place: Place, tensors: list[Tensor], options: Any) -> OneHop | None:
    """Return the request for ``broadcast``."""
    root = options.rootRank
    if len(tensors) != 1 or not _can_copy(tensors) or not _has_root(place, options):
        return None
    sources: Mapping[int, Tensor] = {}
    targets: Mapping[int, Tensor] = {}
    if place.rank == root:
        sources = {0: tensors[0]}
    else:
        targets = {0: tensors[0]}
    name = "broadcast"
    return OneHop(name, name, tensors, sources, targets, tensors[0].numel(), root)


def reduce(place: Place, tensors: list[Tensor], options: Any) -> OneHop | None:
    """Return the request for ``reduce``."""
    root = options.rootRank
    operation = _can_reduce(tensors, options)
    if len(tensors) != 1 or operation is None or not _has_root(place, options):
        return None
    chunks = {0: tensors[0]}
    targets = chunks if place.rank == root else {}
    return OneHop("reduce", "reduce", tensors, chunks, targets, tensors[0].numel(), root, operation)


def allgather(
    place: Place, outputs: list[list[Tensor]], inputs: list[Tensor], options: Any
) -> OneHop | None:
    """Return the request for ``allgather``."""
    if len(outputs) != 1 or len(inputs) != 1 or not _are_alike(outputs[0], inputs[0], place.size):
        return None
    return _all_gather(place, "allgather", outputs[0], inputs[0])


def allgather_base(place: Place, output: Tensor, source: Tensor, options: Any) -> OneHop | None:
    """Return the request for ``_allgather_base``."""
    if not output.dim() or output.numel() != place.size * source.numel():
        return None
    outputs = output.chunk(place.size)
    if not _are_alike(outputs, source, place.size):
        return None
    return _all_gather(place, "allgather", outputs, source)


def _all_gather(place: Place, name: str, outputs: Sequence[Tensor], source: Tensor) -> OneHop:
    targets = dict(enumerate(outputs))
    sources = {place.rank: source}
    return OneHop("all_gather", name, [*outputs], sources, targets, source.numel())


def reduce_scatter(
    place: Place, outputs: list[Tensor], inputs: list[list[Tensor]], options: Any
) -> OneHop | None:
    """Return the request for ``reduce_scatter``. Ranks may get tensors of several sizes."""
    if len(outputs) != 1 or len(inputs) != 1 or len(inputs[0]) != place.size:
        return None
    if outputs[0].shape != inputs[0][place.rank].shape:
        return None
    return _reduce_scatter(place, outputs[0], inputs[0], options)


def reduce_scatter_base(
    place: Place, output: Tensor, source: Tensor, options: Any
) -> OneHop | None:
    """Return the request for ``_reduce_scatter_base``."""
    if not source.dim() or source.numel() != place.size * output.numel():
        return None
    inputs = source.chunk(place.size)
    if len(inputs) != place.size or inputs[0].shape != output.shape:
        return None
    return _reduce_scatter(place, output, inputs, options)


def _reduce_scatter(
    place: Place, output: Tensor, inputs: Sequence[Tensor], options: Any
) -> OneHop | None:
    operation = _can_reduce([output, *inputs], options)
    if operation is None:
        return None
    sources = dict(enumerate(inputs))
    targets = {place.rank: output}
    total = sum(source.numel() for source in inputs)
    name = "reduce_scatter"
    return OneHop(name, name, [output], sources, targets, total, operation=operation)


def alltoall(
    place: Place, outputs: list[Tensor], inputs: list[Tensor], options: Any
) -> OneHop | None:
    """Return the request for ``alltoall``. gloo refuses tensors of several sizes."""
    size = place.size
    if len(outputs) != size or not _are_alike([*outputs, *inputs], outputs[0], 2 * size):
        return None
    total = size * inputs[0].numel()
    return _all_to_all(place, "alltoall", outputs, outputs, inputs, total)


def alltoall_base(
    place: Place,
    output: Tensor,
    source: Tensor,
    output_splits: list[int],
    input_splits: list[int],
    options: Any,
) -> OneHop | None:
    """Return the request for ``alltoall_base``."""
    if not output.dim() or not source.dim() or not _can_copy([output, source]):
        return None
    ends = []
    for tensor, splits in ((output, output_splits), (source, input_splits)):
        length = tensor.shape[0]
        if splits and (len(splits) != place.size or sum(splits) != length):
            return None
        if not splits and length % place.size:
            return None
        ends.append(tensor.split(splits or max(1, length // place.size)))
    outputs, inputs = ends
    if not outputs[0].numel() and not output_splits:
        outputs = inputs = (output,) * place.size
    is_even = not output_splits and not input_splits
    num_elements = source.numel() if is_even else UNEVEN
    return _all_to_all(place, "alltoall", [output], outputs, inputs, num_elements)


def _all_to_all(
    place: Place,
    name: str,
    result: list[Tensor],
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    num_elements: int,
) -> OneHop:
    rank, size = place
    sources = {rank * size + peer: tensor for peer, tensor in enumerate(inputs)}
    targets = {peer * size + rank: tensor for peer, tensor in enumerate(outputs)}
    return OneHop("all_to_all", name, result, sources, targets, num_elements)


def gather(
    place: Place, outputs: list[list[Tensor]], inputs: list[Tensor], options: Any
) -> OneHop | None:
    """Return the request for ``gather``."""
    root = options.rootRank
    if len(inputs) != 1 or not _can_copy(inputs) or not _has_root(place, options):
        return None
    targets: Mapping[int, Tensor] = {}
    result: list[Tensor] = []
    if place.rank == root:
        if len(outputs) != 1 or not _are_alike(outputs[0], inputs[0], place.size):
            return None
        result = outputs[0]
        targets = dict(enumerate(result))
    elif outputs:
        return None
    sources = {place.rank: inputs[0]}
    return OneHop("gather", "gather", result, sources, targets, inputs[0].numel(), root)


def scatter(
    place: Place, outputs: list[Tensor], inputs: list[list[Tensor]], options: Any
) -> OneHop | None:
    """Return the request for ``scatter``."""
    root = options.rootRank
    if len(outputs) != 1 or not _can_copy(outputs) or not _has_root(place, options):
        return None
    sources: Mapping[int, Tensor] = {}
    if place.rank == root:
        if len(inputs) != 1 or not _are_alike(inputs[0], outputs[0], place.size):
            return None
        sources = dict(enumerate(inputs[0]))
    elif inputs:
        return None
    targets = {place.rank: outputs[0]}
    return OneHop("scatter", "scatter", outputs, sources, targets, outputs[0].numel(), root)


# What copies. gloo copies complex numbers, too.
_COPIED = frozenset((*DTYPES, torch.bool))


def _can_copy(tensors: Iterable[Tensor]) -> bool:
    """Return True if the engine can pass on these tensors, of one dtype."""
    first = None
    for tensor in tensors:
        if first is None:
            first = tensor.dtype
        if not tensor.is_cpu or tensor.layout != torch.strided or tensor.dtype != first:
            return False
    return first in _COPIED


def _can_reduce(tensors: Sequence[Tensor], options: Any) -> Operation | None:
    """Return the operation if the engine can reduce these tensors; None: it cannot."""
    operation = OPERATIONS.get(number_of(options.reduceOp))
    dtype = tensors[0].dtype
    if operation is None or not _can_copy(tensors) or dtype not in DTYPES:
        return None
    # gloo refuses the average of integers. That answer stays its own.
    if operation.average and not dtype.is_floating_point:
        return None
    return operation


def _are_alike(tensors: Sequence[Tensor], other: Tensor, size: int) -> bool:
    """Return True if there are ``size`` tensors, each of another's shape, that can be copied."""
    if len(tensors) != size or not _can_copy([other, *tensors]):
        return False
    return all(tensor.shape == other.shape for tensor in tensors)


def _has_root(place: Place, options: Any) -> bool:
    return 0 <= options.rootRank < place.size and not getattr(options, "rootTensor", 0)

"""The spellings of collectives that torch's classes accept, brought into one form.

>>> canonical("broadcast", (tensor,), {"root": 1})  # doctest: +SKIP
([tensor], options)  # BroadcastOptions, whose rootRank is 1
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor
from torch._C import _distributed_c10d as c10d

from scaletrain.engine.group_calls import GroupCalls
from scaletrain.engine.work import leave_uncompiled

_FIELDS = {"op": "reduceOp", "root": "rootRank", "timeout": "timeout"}  # of options, by fact


class _Spelling(NamedTuple):
    """How a collective may be called: with an options object, or with facts in its place."""

    options: Any  # the class of the options
    parameters: tuple[str, ...]  # of the tensors
    facts: tuple[str, ...] = ()  # parameters that stand in for the options
    # The parameters of the form in which tensors come without lists around them.
    without_lists: tuple[str, ...] = ()


_SPELLINGS = {
    "allgather": _Spelling(
        c10d.AllgatherOptions, ("output_tensors", "input_tensors"),
        ("timeout",), ("output_tensors", "input_tensor"),
    ),
    "_allgather_base": _Spelling(c10d.AllgatherOptions, ("output", "input")),
    "allgather_coalesced": _Spelling(c10d.AllgatherOptions, ("output_lists", "input_list")),
    "allgather_into_tensor_coalesced": _Spelling(c10d.AllgatherOptions, ("outputs", "inputs")),
    "allreduce": _Spelling(c10d.AllreduceOptions, ("tensors",), ("op", "timeout"), ("tensor",)),
    "allreduce_coalesced": _Spelling(c10d.AllreduceCoalescedOptions, ("tensors",)),
    "alltoall": _Spelling(c10d.AllToAllOptions, ("output_tensors", "input_tensors")),
    "alltoall_base": _Spelling(
        c10d.AllToAllOptions,
        ("output", "input", "output_split_sizes", "input_split_sizes"), ("timeout",),
    ),
    "barrier": _Spelling(c10d.BarrierOptions, (), ("timeout",)),
    "broadcast": _Spelling(c10d.BroadcastOptions, ("tensors",), ("root", "timeout"), ("tensor",)),
    "gather": _Spelling(
        c10d.GatherOptions, ("output_tensors", "input_tensors"),
        ("root", "timeout"), ("output_tensors", "input_tensor"),
    ),
    "reduce": _Spelling(c10d.ReduceOptions, ("tensors",), ("root", "op", "timeout"), ("tensor",)),
    "reduce_scatter": _Spelling(
        c10d.ReduceScatterOptions, ("output_tensors", "input_tensors"),
        ("op", "timeout"), ("output", "input"),
    ),
    "_reduce_scatter_base": _Spelling(c10d.ReduceScatterOptions, ("outputTensor", "inputTensor")),
    "reduce_scatter_tensor_coalesced": _Spelling(c10d.ReduceScatterOptions, ("outputs", "inputs")),
    "scatter": _Spelling(
        c10d.ScatterOptions, ("output_tensors", "input_tensors"),
        ("root", "timeout"), ("output_tensor", "input_tensors"),
    ),
}  # fmt: skip


def collective(name: str) -> Callable[..., dist.Work]:
    """Return a method of a face: it runs a collective of ``GroupCalls``, however it is spelled."""
    options = _SPELLINGS[name].options
    num_tensors = len(_SPELLINGS[name].parameters)

    def method(self: Any, *arguments: Any, **named: Any) -> dist.Work:
        # torch itself calls it like this, most of the time.
        is_canonical = len(arguments) == num_tensors + 1 and type(arguments[-1]) is options
        if not is_canonical:
            arguments = canonical(name, arguments, named)
        return getattr(self.calls, name)(*arguments)

    leave_uncompiled(method.__code__)
    return method


class Face:
    """What scripts and torch's C++ call on a rank's end of a group, whichever class torch wants."""

    calls: GroupCalls  # that everything is passed on to

    def getBackendName(self) -> str:
        """Return the name under which torch knows this backend."""
        return "scaletrain"

    allreduce = collective("allreduce")
    allreduce_coalesced = collective("allreduce_coalesced")
    allgather = collective("allgather")
    all_gather_single = collective("_allgather_base")
    all_gather_single_coalesced = collective("allgather_into_tensor_coalesced")
    allgather_coalesced = collective("allgather_coalesced")
    alltoall = collective("alltoall")
    all_to_all_single = collective("alltoall_base")
    barrier = collective("barrier")
    broadcast = collective("broadcast")
    gather = collective("gather")
    reduce = collective("reduce")
    reduce_scatter = collective("reduce_scatter")
    reduce_scatter_single = collective("_reduce_scatter_base")
    reduce_scatter_single_coalesced = collective("reduce_scatter_tensor_coalesced")
    scatter = collective("scatter")

    def send(self, tensors: list[Tensor], dstRank: int, tag: int) -> dist.Work:
        """Send a tensor to a rank, which calls ``recv``."""
        return self.calls.send(tensors, dstRank, tag)

    def recv(self, tensors: list[Tensor], srcRank: int, tag: int) -> dist.Work:
        """Receive a tensor from a rank, which calls ``send``."""
        return self.calls.recv(tensors, srcRank, tag)

    def recv_anysource(self, tensors: list[Tensor], tag: int) -> dist.Work:
        """Receive a tensor from any rank that calls ``send``."""
        return self.calls.recv_anysource(tensors, tag)

    def _get_sequence_number_for_group(self) -> int:
        """Return how many collectives this rank has called; torch's logs compare the ranks'."""
        return self.calls.num_called()

    def shutdown(self) -> None:
        """End the engine's threads after the collectives under way. Not collective."""
        self.calls.shutdown()

    def abort(self) -> None:
        """End everything at once: threads that wait for peers get an error. Not collective."""
        self.calls.abort()


def canonical(method: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
    """Return a call's arguments as the methods of ``GroupCalls`` take them.

    Args:
        method: its name there.
        arguments: of the call, by position.
        named: of the call, by name.

    Raises:
        TypeError: torch's class has no such spelling.
    """
    spelling = _SPELLINGS[method]
    unnamed = list(arguments)
    named = dict(named)
    tensors = []
    other_names = spelling.without_lists or spelling.parameters
    for names in zip(spelling.parameters, other_names, strict=True):
        name = next((name for name in names if name in named), "")
        if unnamed:
            tensors.append(unnamed.pop(0))
        elif name:
            tensors.append(named.pop(name))
        else:
            raise TypeError(f"{method}() lacks an argument: {names[0]}")
    if spelling.without_lists and any(isinstance(value, Tensor) for value in tensors):
        tensors = [[value] for value in tensors]
    return (*tensors, _options(method, spelling, unnamed, named))


def _options(method: str, spelling: _Spelling, unnamed: list[Any], named: dict[str, Any]) -> Any:
    """Return the options of a call, of the arguments that are no tensors."""
    given = unnamed[0] if unnamed else named.get("opts")
    if isinstance(given, spelling.options):
        return given
    facts = dict(zip(spelling.facts, unnamed, strict=False)) | named
    facts.pop("opts", None)
    options = spelling.options()
    for name, value in facts.items():
        if name not in spelling.facts:
            raise TypeError(f"{method}() has no parameter {name}")
        if value is not None:
            setattr(options, _FIELDS[name], value)
    return options

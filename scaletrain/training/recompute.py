"""Activation checkpointing: compute inner tensors of modules again in backward.

That saves their memory for the time of one more forward pass through them. Results are the same to
the bit: dropout draws the same masks again, and running statistics are updated once.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from scaletrain.training.patterns import check, matches


def recompute(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Let the modules that a pattern matches be recomputed. Their names and parameters stay.

    Args:
        model: its modules' names are compared with the patterns.
        patterns: as for an optimizer's groups. Modules inside one that matches belong to it.

    Returns:
        The names of the modules.

    Raises:
        UserError: a pattern matches nothing.
    """
    names = [name for name, _ in model.named_modules() if name]
    check(patterns, names, "recompute", "module")
    chosen: list[str] = []
    for name in names:  # a module comes before those inside it
        is_inside = any(name.startswith(f"{outer}.") for outer in chosen)
        if not is_inside and any(matches(pattern, name) for pattern in patterns):
            module = model.get_submodule(name)
            # On the object, not around it: a wrapper would change the names in checkpoints. A copy
            # of the module has a partial of its own, with the copy in it.
            module.forward = functools.partial(_recomputed, module, module.forward)
            chosen.append(name)
    return chosen


def _recomputed(
    module: nn.Module, forward: Callable[..., Any], *arguments: Any, **options: Any
) -> Any:
    """Run forward, and keep only enough to run it again."""
    return checkpoint(_run, module, forward, *arguments, use_reentrant=False, **options)


def _run(module: nn.Module, forward: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Run forward, for the first time or, inside backward, once more."""
    # A compiler takes care of buffers itself. Where it cannot compile this, it runs as written.
    is_first = torch._C._current_graph_task_id() == -1
    if torch.compiler.is_compiling() or is_first:
        return forward(*arguments, **options)
    with _with_buffers_kept(module):
        return forward(*arguments, **options)


@contextlib.contextmanager
def _with_buffers_kept(module: nn.Module) -> Iterator[None]:
    """Let the body work on copies of the buffers.

    Batch normalisation would count each batch twice in its running statistics. Writing the old
    values back would not do: autograd notices that a tensor which it has kept has changed.
    """
    originals = []
    for owner in module.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            originals.append((owner, name, buffer))
            setattr(owner, name, buffer.clone())
    try:
        yield
    finally:
        for owner, name, buffer in originals:
            setattr(owner, name, buffer)

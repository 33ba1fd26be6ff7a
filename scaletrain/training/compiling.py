"""torch.compile under any exchange, and its failures in one line."""

import contextlib
import sys
from collections.abc import Iterator

import torch
from torch import nn

from scaletrain.config.schema import Compilation
from scaletrain.errors import UserError


def compile_in_place(module: nn.Module, settings: Compilation) -> None:
    """Let calls of a module run compiled. Its names, also those in checkpoints, stay.

    Under DDP, torch cuts the graph where a bucket of gradients is full, so that buckets still
    travel while backward goes on.

    Args:
        module: without an exchange's wrapper: no compiler should see its collectives.
        settings: of the compiler, which runs when the module is first called, and again for other
            shapes.
    """
    with explained():
        module.compile(backend=settings.backend, mode=settings.mode, dynamic=settings.dynamic)


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Raise ``UserError`` in place of the pages that a compiler's failure has."""
    try:
        yield
    except Exception as error:
        if not _is_compilers(error):
            raise
        cause = getattr(error, "inner_exception", error)
        lines = str(cause).strip().splitlines() or [""]
        raise UserError(
            f"compile: the compiler has failed: {type(cause).__name__}: {lines[0]}"
            " (compile: false trains without; compile: {backend: aot_eager} needs no C++ compiler)"
        ) from None


@contextlib.contextmanager
def as_written() -> Iterator[None]:
    """Let modules run as they are written in the body, so that hooks see every layer."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing it takes a second
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def _is_compilers(error: Exception) -> bool:
    dynamo = sys.modules.get("torch._dynamo.exc")
    return dynamo is not None and isinstance(error, dynamo.TorchDynamoException)

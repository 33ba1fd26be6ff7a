"""Batch normalisation over the samples of all ranks, so that N workers normalise as one does.

torch's ``SyncBatchNorm`` runs on GPUs alone. This one runs over any exchange that keeps workers
in step, with two small sums a layer in forward and two in backward.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Sum = Callable[[Tensor], Tensor]  # of a small CPU tensor, over the ranks
_is_alone = False  # whether the other ranks do not call forward now; the training thread uses it


def share_statistics(model: nn.Module, total: Sum) -> None:
    """Let all batch normalisations of a model take the statistics of all ranks while training.

    Their names, parameters and running statistics stay. All ranks must call forward and backward
    alike often.

    Args:
        model: changed in place.
        total: of the exchange.
    """
    shared: dict[type, type] = {}
    for module in model.modules():
        # Those that are torch's own already work on GPUs, under `native`.
        if not isinstance(module, _BatchNorm) or isinstance(module, nn.SyncBatchNorm):
            continue
        kind = type(module)
        if kind not in shared:
            # The sum belongs to the class: a copy of the model must not copy the exchange.
            shared[kind] = type(kind.__name__, (_Shared, kind), {"total": staticmethod(total)})
        module.__class__ = shared[kind]


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Let the body call forward on this rank alone, with the statistics of its own samples."""
    global _is_alone
    _is_alone = True
    try:
        yield
    finally:
        _is_alone = False


class _Shared(_BatchNorm):
    """Mixed into a batch normalisation. Made by ``share_statistics``."""

    total: Sum

    @torch.compiler.disable
    def forward(self, inputs: Tensor) -> Tensor:
        """(n, channels, ...) -> the same, normalised over the samples of all ranks."""
        # Evaluation is for each rank alone: they may have different numbers of batches.
        if not self.training or _is_alone:
            return super().forward(inputs)
        self._check_input_dim(inputs)
        # float32 under autocast, too: as torch's own.
        values = inputs.float() if inputs.dtype in (torch.bfloat16, torch.float16) else inputs
        axes = [axis for axis in range(values.dim()) if axis != 1]
        shape = [1, -1, *[1] * (values.dim() - 2)]
        own = values.new_full((1,), values.numel() // values.size(1))
        sums = _SumOverRanks.apply(torch.cat([values.sum(axes), own]), self.total)
        count = sums[-1]
        mean = sums[:-1] / count
        # In a second sum: the mean of squares minus the square of the mean would lose digits.
        centred = values - mean.view(shape)
        variance = _SumOverRanks.apply(centred.square().sum(axes), self.total) / count
        self._update(mean.detach(), variance.detach(), count.detach())
        normalised = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            normalised = normalised * self.weight.view(shape) + self.bias.view(shape)
        return normalised.to(inputs.dtype)

    @torch.no_grad()
    def _update(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Update the running statistics as torch does."""
        if self.running_mean is None:
            return
        assert self.running_var is not None and self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        weight = self.momentum
        if weight is None:  # the plain mean over all batches
            weight = 1 / float(self.num_batches_tracked)
        unbiased = variance * count / (count - 1)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), weight)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), weight)


class _SumOverRanks(torch.autograd.Function):
    """The sum over all ranks. Its gradient is the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, total: Sum) -> Tensor:
        ctx.total = total
        return total(values.cpu()).to(values.device)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return ctx.total(gradient.cpu()).to(gradient.device), None

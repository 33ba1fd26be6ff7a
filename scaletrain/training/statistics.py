"""Running statistics, such as those of batch normalisation, averaged over the ranks."""

import torch
from torch import nn

from scaletrain.training.exchange import Sums


@torch.no_grad()
def average(module: nn.Module, ranks: Sums) -> None:
    """Make the module's running statistics the mean of all ranks' (collective).

    Each rank updates them with its own samples; their mean is evaluated and saved. They are
    the floating-point buffers that a checkpoint holds.

    Args:
        module: on the device, without the exchange's wrapper.
        ranks: those that train this model; sums them.
    """
    parameters = {name for name, _ in module.named_parameters()}
    buffers = []
    for name, tensor in module.state_dict().items():
        if name in parameters or not isinstance(tensor, torch.Tensor):
            continue
        if tensor.is_floating_point():
            buffers.append(tensor)
    if not buffers:
        return
    flat = [buffer.detach().double().flatten().cpu() for buffer in buffers]
    # A one at the end counts the ranks: some exchanges go on without a dead one.
    own = torch.cat([*flat, torch.ones(1, dtype=torch.float64)])
    total = ranks.sum(own)
    means = (total[:-1] / total[-1]).split([buffer.numel() for buffer in buffers])
    for buffer, mean in zip(buffers, means, strict=True):
        buffer.copy_(mean.view(buffer.shape))

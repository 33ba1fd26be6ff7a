"""Lets the weights of each layer share a few values, which are trained on."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import torch
from annotated_types import Ge, Le
from torch import Tensor

from scaletrain import compression
from scaletrain.compression.codebook import assign
from scaletrain.needs import Needs
from scaletrain.run.records import StepRecord
from scaletrain.training.callbacks import Callback
from scaletrain.training.layer_weights import by_layer, layer_weights

if TYPE_CHECKING:
    from scaletrain.training.trainer import Trainer

NEEDS = Needs(own_weights=True)

_PRUNED = -1  # in place of a cluster's number


class ShareWeights(Callback):
    """Gives the weights of a cluster one value (Han et al. 2016, arXiv 1510.00149, section 3).

    The gradient of a shared value is the sum of its weights' gradients. Every weight of a cluster
    gets it, so the optimizer moves all of them alike. Weights that are zero stay zero. All ranks
    have the same weights and gradients, so none communicates.

    Args:
        trainer: whose model's weights are shared.
        values: of each layer at most, besides zero.
        layers: likewise, by patterns of names.
        begin: step after which weights are shared.
    """

    changes_gradients = True

    def __init__(self, trainer: "Trainer", values: int, layers: Mapping[str, int], begin: int):
        self._weights = layer_weights(trainer.module)
        self._values = by_layer(self._weights, values, layers, "callbacks: share_weights.layers")
        self._begin = begin
        # Numbers of clusters, of the weights' shapes.
        self._clusters: dict[str, Tensor] = {}
        if begin == 0 and trainer.next_step == 0:
            self._share()

    def after_backward(self) -> None:
        """Give each weight the sum of its cluster's gradients."""
        for name, clusters in self._clusters.items():
            gradient = self._weights[name].grad
            if gradient is not None:
                sums = self._sums(gradient, clusters, self._values[name])
                gradient.copy_(_spread(sums, clusters))

    def after_step(self, record: StepRecord) -> None:
        """Share the weights when it is time, and keep those of a cluster equal."""
        if record.step + 1 == self._begin:
            self._share()
        with torch.no_grad():
            for name, clusters in self._clusters.items():
                # Equal before the step, they differ at most in the last bit, where the optimizer
                # takes some elements one by one and others in vectors.
                weight = self._weights[name]
                count = self._values[name]
                largest = torch.zeros(count, dtype=weight.dtype, device=weight.device)
                kept = clusters != _PRUNED
                largest.scatter_reduce_(0, clusters[kept], weight[kept], "amax", include_self=False)
                weight.copy_(_spread(largest, clusters))

    def state_dict(self) -> Mapping[str, Any]:
        """Return the numbers of the clusters."""
        # 16 bits hold the largest number that the option ``values`` allows.
        return {"clusters": {name: each.to(torch.int16) for name, each in self._clusters.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with a checkpoint's clusters."""
        for name, clusters in state["clusters"].items():
            self._clusters[name] = clusters.to(self._weights[name].device, torch.int64)

    @torch.no_grad()
    def _share(self) -> None:
        for name, weight in self._weights.items():
            kept = weight != 0
            clusters = torch.full(weight.shape, _PRUNED, dtype=torch.int64)
            values = weight[kept].cpu().numpy()
            if len(values):
                centres = compression.cluster(values, self._values[name])
                clusters[kept.cpu()] = torch.from_numpy(assign(values, centres))
                shared = torch.from_numpy(centres).to(weight)
                clusters = clusters.to(weight.device)
                weight.copy_(_spread(shared, clusters))
            self._clusters[name] = clusters

    @staticmethod
    def _sums(gradient: Tensor, clusters: Tensor, count: int) -> Tensor:
        """Return the sum of each cluster's gradients: (count,)."""
        kept = clusters != _PRUNED
        # In double precision, whose rounding does not show in any order of the terms.
        sums = torch.zeros(count, dtype=torch.float64, device=gradient.device)
        return sums.index_add_(0, clusters[kept], gradient[kept].double()).to(gradient.dtype)


def _spread(values: Tensor, clusters: Tensor) -> Tensor:
    """Return the value of each weight's cluster; zero for pruned weights."""
    return torch.where(clusters == _PRUNED, 0.0, values[clusters.clamp(min=0)])


def callback(
    trainer: "Trainer",
    *,
    values: Annotated[int, Ge(1), Le(4000)] = 32,
    layers: dict[str, Annotated[int, Ge(1), Le(4000)]] = {},  # noqa: B006 (never changed)
    begin: Annotated[int, Ge(0)] = 0,
) -> Callback:
    """Return the callback.

    Args:
        values: distinct weights of each layer at most, besides zero; 32 need 5 bits each.
        layers: likewise, by patterns of names, such as {conv*: 256}.
        begin: steps before the weights are shared.
    """
    return ShareWeights(trainer, values, layers, begin)

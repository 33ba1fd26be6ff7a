"""Learn features of two views without labels, and classify one view by them (multimodal)."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from scaletrain import plugins
from scaletrain.errors import UserError
from scaletrain.training.workload import Data, Loss, Mean, Workload

_PLACES: dict[str, tuple[int, ...]] = {"first": (0,), "second": (1,), "both": (0, 1)}
_SAMPLES = 1000  # that tell how much views vary


class Autoencoder(nn.Module):
    """Deep autoencoder with one code for its views, and a linear classifier of that code.

    Source: Ngiam et al., ICML 2011, figure 3.

    Args:
        inputs: features of each view.
        encoded: places of the views that the code is made of.
        decoded: places of the views that are reconstructed from it.
        units: between a view and the code, and of the code.
        classes: of the classifier.
    """

    def __init__(
        self,
        inputs: Sequence[int],
        encoded: Sequence[int],
        decoded: Sequence[int],
        units: tuple[int, int],
        classes: int,
    ):
        super().__init__()
        hidden, code = units
        self.encoders = nn.ModuleDict()
        for place in encoded:
            self.encoders[str(place)] = nn.Sequential(
                nn.Linear(inputs[place], hidden), nn.ReLU(), nn.Linear(hidden, code)
            )
        self.decoders = nn.ModuleDict()
        for place in decoded:
            self.decoders[str(place)] = nn.Sequential(
                nn.Linear(code, hidden), nn.ReLU(), nn.Linear(hidden, inputs[place])
            )
        self.classify = nn.Linear(code, classes)

    def forward(self, views: Sequence[Tensor]) -> tuple[dict[int, Tensor], Tensor]:
        """Return the reconstructed views by their places, and the logits (n, classes).

        No gradient of the logits reaches the code: labels do not shape it.

        Args:
            views: (n, features) each; one of zeros is a view that is not there.
        """
        parts = [encode(views[int(place)]) for place, encode in self.encoders.items()]
        code = torch.stack(parts).sum(0).relu()
        decoded = {int(place): decode(code) for place, decode in self.decoders.items()}
        return decoded, self.classify(code.detach())


class Multimodal(Workload):
    """Features of paired views, and a classifier that is trained on them as they grow.

    Source: J. Ngiam et al. 2011, "Multimodal Deep Learning", ICML, sections 3.3 and 4. A code of
    both views is learnt from each sample three times: from both views, and from each of them while
    the other is zero. Every time all decoded views are to be reconstructed, so that one view is
    enough for the code. All are in every batch, without chance: N workers learn what one does.

    Its figures are ``accuracy``, and ``reconstruction``: the mean square error of the decoded
    views, given the tested one.

    Args:
        dataset: a data set's name and options, of (first view, second view, class) samples.
        classes: of the data set.
        encoded: the views that the code is made of.
        decoded: the views that are reconstructed from it.
        labelled: the only view that the classifier is trained on.
        tested: the only view that is there in the test.
        units: between a view and the code, and of the code.

    Raises:
        UserError: the classifier's views are not encoded.
    """

    def __init__(
        self,
        *,
        dataset: dict,
        classes: int = 10,
        encoded: Literal["first", "second", "both"] = "both",
        decoded: Literal["first", "second", "both"] = "both",
        labelled: Literal["first", "second"] = "first",
        tested: Literal["first", "second"] = "first",
        units: tuple[int, int] = (128, 64),
    ):
        for key, view in (("labelled", labelled), ("tested", tested)):
            if encoded not in (view, "both"):
                raise UserError(
                    f"workload: {key}: {view} is not allowed (allowed: {encoded}, which is encoded)"
                )
        options = dict(dataset)
        train, test = plugins.load("data", options.pop("name"))(**options)
        self.data = Data(train, test)
        inputs = [view.numel() for view in train[0][:2]]
        # Views count alike, however large their numbers are.
        self._variances = [_variance(train, place) for place in (0, 1)]
        self.model = Autoencoder(inputs, _PLACES[encoded], _PLACES[decoded], units, classes)
        # The views that are there in a pass over the batch.
        self._passes = [_PLACES[encoded]]
        if encoded == "both":
            self._passes += [_PLACES["first"], _PLACES["second"]]
        self._labelled = self._passes.index(_PLACES[labelled])
        self._tested = _PLACES[tested]

    def forward(self, batch: Any) -> Loss:
        """Return the error of all reconstructions and the classifier's loss, over samples."""
        *views, targets = batch
        shown = [_only(views, places) for places in self._passes]
        stacked = [torch.cat(versions) for versions in zip(*shown, strict=True)]
        decoded, logits = self.model(stacked)
        reconstruction = self._error(decoded, views, len(self._passes)) / len(self._passes)
        own = logits.chunk(len(self._passes))[self._labelled]
        classification = functional.cross_entropy(own, targets, reduction="sum")
        parts = {"reconstruction": reconstruction, "classification": classification}
        return Loss(reconstruction + classification, len(targets), parts)

    def evaluate(self, batch: Any) -> dict[str, Mean]:
        """Return ``accuracy`` and ``reconstruction``."""
        *views, targets = batch
        decoded, logits = self.model(_only(views, self._tested))
        return {
            "accuracy": Mean((logits.argmax(1) == targets).sum(), len(targets)),
            "reconstruction": Mean(self._error(decoded, views, 1), len(targets)),
        }

    def _error(self, decoded: dict[int, Tensor], views: Sequence[Tensor], passes: int) -> Tensor:
        """Return the mean square errors of views by their variance, over views, samples, passes."""
        errors = []
        for place, view in decoded.items():
            difference = view - views[place].repeat(passes, 1)
            errors.append(difference.square().mean(1).sum() / self._variances[place])
        return torch.stack(errors).sum()


def _only(views: Sequence[Tensor], places: Sequence[int]) -> list[Tensor]:
    """Return the views with zeros in place of those that are not to be seen."""
    seen = []
    for place, view in enumerate(views):
        seen.append(view if place in places else torch.zeros_like(view))
    return seen


def _variance(train: Any, place: int) -> float:
    """Return the variance of a view's elements, by the first samples of a data set."""
    samples = [train[index][place] for index in range(min(len(train), _SAMPLES))]
    return float(torch.stack(samples).var())

"""Logs loss, rate, throughput and test figures as TensorBoard's event files."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge

from scaletrain.needs import Needs
from scaletrain.training.callbacks import Callback
from scaletrain.training.tracking import Place, Tracker, TrackerRun

if TYPE_CHECKING:
    from scaletrain.training.trainer import Trainer

NEEDS = Needs(package="tensorboard", fix='pip install "scaletrain[trackers]"')


class TensorBoardRun(TrackerRun):
    """Event files in the run directory. A resumed run hides the steps that it does anew."""

    def __init__(self, place: Place):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(place.folder), purge_step=place.first_step + 1)
        self._writer.add_text("config", f"```yaml\n{place.config.to_yaml()}```", place.first_step)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def end(self, summary: Mapping[str, Any] | None) -> None:
        self._writer.close()


def callback(trainer: "Trainer", *, every: Annotated[int, Ge(1)] = 10) -> Callback:
    """Return the callback.

    Args:
        every: steps between figures.
    """
    return Tracker(trainer, "tensorboard", TensorBoardRun, NEEDS, every)

"""Logs loss, rate, throughput and test figures to Weights & Biases, or to files for it."""

import secrets
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge

from scaletrain.needs import Needs
from scaletrain.training.callbacks import Callback
from scaletrain.training.tracking import Place, Tracker, TrackerRun

if TYPE_CHECKING:
    from scaletrain.training.trainer import Trainer

NEEDS = Needs(package="wandb", fix='pip install "scaletrain[trackers]"')


class WandbRun(TrackerRun):
    """A run of wandb; offline, its files are in the run directory (`wandb sync` sends them)."""

    def __init__(self, place: Place, project: str, mode: Literal["online", "offline"] | None):
        import wandb

        identifier, _ = place.identifier(lambda: secrets.token_hex(4))
        self._run = wandb.init(
            project=project,
            name=place.config.name,
            id=identifier,
            resume="allow",
            mode=mode,
            dir=str(place.folder),
            config=place.config.model_dump(),
            settings=wandb.Settings(console="off", silent=True),
        )
        # Steps that a resumed run does anew would be dropped if they were wandb's own.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log({"step": step, **figures})

    def end(self, summary: Mapping[str, Any] | None) -> None:
        if summary is not None:
            self._run.summary.update(dict(summary))
        self._run.finish(exit_code=1 if summary is None else 0)


def callback(
    trainer: "Trainer",
    *,
    project: str = "scaletrain",
    mode: Literal["online", "offline"] | None = None,
    every: Annotated[int, Ge(1)] = 10,
) -> Callback:
    """Return the callback.

    Args:
        project: of the run.
        mode: online, offline; None: as WANDB_MODE says, else online.
        every: steps between figures.
    """
    return Tracker(trainer, "wandb", lambda place: WandbRun(place, project, mode), NEEDS, every)

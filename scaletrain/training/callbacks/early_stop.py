"""Ends the training, on all ranks, when a figure of the evaluations has stopped improving."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge

from scaletrain.needs import Needs
from scaletrain.training.best import Best
from scaletrain.training.callbacks import Callback
from scaletrain.units import plural

if TYPE_CHECKING:
    from scaletrain.training.trainer import Trainer

NEEDS = Needs(evaluations=True)


class EarlyStop(Callback):
    """Counts evaluations since the best one. All ranks see the same figures, so all stop."""

    def __init__(self, best: Best, patience: int, evaluate_every: int):
        self._best = best
        self._patience = patience
        self._evaluate_every = evaluate_every
        self._waited = 0  # evaluations since the best one

    @property
    def stop_reason(self) -> str:
        """Say how long the figure has not improved, if that is too long."""
        if self._waited < self._patience:
            return ""
        best = ""
        if self._best.value is not None:
            best = f" (best: {self._best.value:.4g} after step {self._best.step})"
        return (
            f"early_stop: {self._best.figure} has not improved for"
            f" {plural(self._waited, 'evaluation')}{best}"
        )

    def after_evaluation(self, step: int, figures: Mapping[str, float | None]) -> None:
        """Count an evaluation, unless a signal brought it: a resumed run would not have it."""
        if step % self._evaluate_every:
            return
        if self._best.improves(step, figures):
            self._waited = 0
        else:
            self._waited += 1

    def state_dict(self) -> Mapping[str, Any]:
        """Return the best value, and the evaluations since."""
        return {
            "figure": self._best.figure,
            "value": self._best.value,
            "step": self._best.step,
            "waited": self._waited,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting, if it is the same figure."""
        if state["figure"] == self._best.figure:
            self._best.value, self._best.step = state["value"], state["step"]
            self._waited = state["waited"]


def callback(
    trainer: "Trainer",
    *,
    figure: str = "test_loss",
    patience: Annotated[int, Ge(1)] = 5,
    min_delta: Annotated[float, Ge(0)] = 0.0,
    mode: Literal["auto", "min", "max"] = "auto",
) -> Callback:
    """Return the callback.

    Args:
        figure: of the evaluations, as in the summary.
        patience: evaluations in a row that may be no better than the best one.
        min_delta: a figure counts as better only by more than this.
        mode: which values are better; auto: lower ones if the figure's name has loss in it.

    Raises:
        UserError: there is no such figure.
    """
    best = Best(figure, mode, min_delta, "callbacks: early_stop: figure")
    if trainer.figure_names is not None:
        best.check(trainer.figure_names)
    assert trainer.config.evaluate_every is not None  # as ``NEEDS`` says
    return EarlyStop(best, patience, trainer.config.evaluate_every)

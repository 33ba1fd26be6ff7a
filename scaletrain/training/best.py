"""The best value that a figure of the evaluations has had so far."""

from collections.abc import Iterable, Mapping

from scaletrain.errors import UserError


class Best:
    """Follows a figure from evaluation to evaluation. All ranks see the same values.

    >>> best = Best("test_loss")
    >>> [best.improves(step, {"test_loss": loss}) for step, loss in enumerate([0.9, 0.7, 0.8])]
    [True, True, False]
    >>> best.value, best.step
    (0.7, 1)

    Args:
        figure: its name, as in a summary.
        mode: ``min`` or ``max``; ``auto``: ``min`` for a loss.
        min_delta: a value must be better by more than this.
        key: of the configuration, for errors.
    """

    def __init__(
        self, figure: str, mode: str = "auto", min_delta: float = 0.0, key: str = "figure"
    ):
        self.figure = figure
        self.value: float | None = None
        self.step: int | None = None  # steps done when it had this value
        if mode == "auto":
            mode = "min" if "loss" in figure else "max"
        self._sign = -1.0 if mode == "min" else 1.0
        self._min_delta = min_delta
        self._key = key

    def check(self, names: Iterable[str]) -> None:
        """Raise ``UserError`` if the figure is none of these, which evaluations have."""
        allowed = [*names]
        if self.figure not in allowed:
            raise UserError(
                f"{self._key}: {self.figure!r} is not allowed (allowed: {', '.join(allowed)})"
            )

    def improves(self, step: int, figures: Mapping[str, float | None]) -> bool:
        """Take an evaluation; return True if its value is the best so far.

        None stands for a value that is not finite, and is never the best.
        """
        self.check(figures)
        value = figures[self.figure]
        if value is None:
            return False
        if self.value is not None:
            lead = self._sign * (value - self.value)
            if lead <= self._min_delta:
                return False
        self.value, self.step = value, step
        return True

"""What is done beside the training, between its parts.

Every other file here is one callback: a function ``callback(trainer, *, <options>) ->
Callback``, called once by every rank when its trainer is made. The YAML's ``callbacks`` names those
of a run, in the order in which they are called.
"""

from scaletrain.run.records import StepRecord


class Callback:
    """One worker's callback. Every rank has it, and calls its methods at the same steps.

    Attributes:
        changes_gradients: whether ``after_backward`` does. Exchanges whose gradients have left by
            then refuse it.
    """

    changes_gradients = False

    def after_backward(self) -> None:
        """Act on gradients that all ranks have agreed on, before the optimizer uses them."""

    def after_step(self, record: StepRecord) -> None:
        """Act on new weights, after the optimizer's step.

        Args:
            record: of the step. Steps that were left out come, too.
        """

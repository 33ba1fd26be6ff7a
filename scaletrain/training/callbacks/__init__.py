"""Callbacks: work beside the training, between its parts.

Every other file here is one callback: a function ``callback(trainer, *, <options>) -> Callback``.
Every rank calls it once when its trainer is made. The YAML's ``callbacks`` names the run's
callbacks, in the order in which they are called.
"""

import contextlib
from collections.abc import Mapping
from typing import Any

from scaletrain.run.records import StepRecord


class Callback:
    """One worker's callback. Every rank has it, and calls its methods at the same steps.

    A callback with state has the methods of ``checkpoint.Part`` as well, ``state_dict`` and
    ``load_state_dict``. Checkpoints then hold its state, and a resumed run gives it back on every
    rank, once the callback is made.

    Attributes:
        changes_gradients: whether ``after_backward`` does. Exchanges that send gradients during
            backward hold them back then, or refuse it.
    """

    changes_gradients = False

    @property
    def stop_reason(self) -> str:
        """Why the training ends here, in words; empty while it goes on.

        It must be the same on all ranks. The figures of evaluations are, so a reason may follow
        from them.
        """
        return ""

    def after_backward(self) -> None:
        """Act on the gradients of the next update, before the optimizer uses them.

        They are the mean over all ranks, or where each rank's gradient is an update of its own (in
        some modes of the parameter server), this rank's.
        """

    def after_step(self, record: StepRecord) -> None:
        """Act on new weights, after the optimizer's step.

        Args:
            record: of the step. Steps that were left out come, too.
        """

    def meet(self) -> None:
        """Make state that differs between the ranks equal (collective).

        It is called before evaluations and checkpoints.
        """

    def evaluating(self) -> contextlib.AbstractContextManager[None]:
        """Return the context in which an evaluation runs, as with other weights."""
        return contextlib.nullcontext()

    def after_evaluation(self, step: int, figures: Mapping[str, float | None]) -> None:
        """Act on an evaluation.

        Args:
            step: steps done.
            figures: by name, such as ``test_loss``, the same on all ranks; None where a figure is
                not finite.
        """

    def close(self, summary: Mapping[str, Any] | None) -> None:
        """Finish, when the training has ended for whatever reason.

        Args:
            summary: the run in numbers; None: an error ended it, and the other ranks may be gone.
                Be quick then, because the error is reported afterwards.
        """

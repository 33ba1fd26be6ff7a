"""How long anything may take: all limits follow from one, in one order.

A person sets ``timeout_s``. The limits below are derived from it so that the one that knows more
comes first: waiting ranks name the ranks that are missing, the supervisor names a hang, and
torch's own time-outs come last. docs/launchers/timeouts.md shows them as a table.

>>> Timeouts(60.0).collective_s
122.0
"""

from dataclasses import dataclass
from datetime import timedelta

from scaletrain.errors import UserError

STACKS_S = 1.0  # within this time a worker that is asked writes its stacks
LOOK_S = 0.5  # between looks for a hang: reading the progress of many workers takes time
GRACE_S = 1.0  # after a failure, time for others to report an earlier or better cause
PEERS_S = 2.0  # more time, if all that is known is that a peer was lost
ANSWER_S = 2.0  # within this time, ranks whose collective has failed tell each other where they are
MARGIN_S = 2.0  # from the end of a limit to the next: looking, asking for stacks, reporting
FAILED_S = 5.0  # a failed worker's exit handlers may take this long: they send the last records
ENDS_ITSELF_S = FAILED_S + MARGIN_S  # the same where no supervisor of ours ends it
LAUNCHER_S = 8.0  # within this time another launcher ends after one of its workers has failed
COMPANION_STOP_S = 5.0  # from SIGTERM to SIGKILL, for servers and the store
STOP_S = 30.0  # after Ctrl-C or SIGTERM, time for workers to write a checkpoint and end
_START_S = 180.0  # importing, building a model and compiling it, where ``timeout_s`` is less
LONGEST_S = 30 * 86_400.0  # a longer one is a slip of the keyboard
# The limit of waits inside gloo and torch's store where our supervisor ends a job that hangs. Their
# clocks go on while the whole job is stopped, and the supervisor's does not.
WATCHED_S = 3 * LONGEST_S


@dataclass(frozen=True)
class Timeouts:
    """The limits of a job, in seconds.

    Args:
        step_s: the person's ``timeout_s``: a rank that is silent for longer between two steps
            hangs.

    Raises:
        UserError: it is not a length of time.
    """

    step_s: float = 60.0

    def __post_init__(self) -> None:
        """Check the one limit that a person sets."""
        if not 0 < self.step_s <= LONGEST_S:
            raise UserError(
                f"timeout_s: {self.step_s:g} is not allowed (allowed: above 0, up to 30 days)"
            )

    @property
    def join_s(self) -> float:
        """All ranks, and the servers, have come to the job's store within this time."""
        return max(self.step_s, _START_S)

    @property
    def start_s(self) -> float:
        """A rank may be silent for this long before its first step.

        Ranks that wait for one that never comes have named it by then.
        """
        return self.join_s + MARGIN_S

    @property
    def collective_s(self) -> float:
        """A rank waits this long for others in a collective, once its first step is done.

        The others may be silent twice while it waits: before they report a step, and after.
        """
        return 2 * self.step_s + MARGIN_S

    @property
    def first_collective_s(self) -> float:
        """The same before the first step is done."""
        return 2 * self.start_s + MARGIN_S

    @property
    def reports_s(self) -> float:
        """After a hang, the ranks' own reports are there within this time.

        They wait for their collectives to fail, and then for each other's answers.
        """
        return self.collective_s - self.step_s + ANSWER_S + GRACE_S

    @property
    def leftovers_s(self) -> float:
        """A finished worker, or a process that it left running, may go on for this long."""
        return self.step_s

    @property
    def collective(self) -> timedelta:
        """``collective_s``, as torch wants it."""
        return timedelta(seconds=self.collective_s)

    @property
    def first_collective(self) -> timedelta:
        """``first_collective_s``, as torch wants it."""
        return timedelta(seconds=self.first_collective_s)

    @property
    def join(self) -> timedelta:
        """``join_s``, as torch wants it."""
        return timedelta(seconds=self.join_s)

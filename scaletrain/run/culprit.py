"""The culprit: the rank, host or link that the others wait for, and why, in words.

``blame`` finds it.
"""

import dataclasses
import enum
from collections.abc import Sequence


class Kind(enum.StrEnum):
    """Why the others wait. Files hold the values."""

    INPUT = "input"
    FORWARD = "forward"
    BACKWARD = "backward"
    OPTIMIZER = "optimizer"
    STOLEN_CORES = "stolen cores"
    GARBAGE = "garbage collection"
    SLOW_LINK = "slow link"
    LOSS = "loss"
    STOPPED = "stopped"
    DEAD = "dead"
    SILENT = "silent"  # dead or stopped: it runs on another machine, which alone knows


_ADVICE = {
    Kind.INPUT: "more loader_workers, or data nearer to that worker",
    Kind.FORWARD: "a smaller share for it, or a look at its host (clocks, temperature)",
    Kind.BACKWARD: "a smaller share for it, or a look at its host (clocks, temperature)",
    Kind.OPTIMIZER: "a look at what runs between backward and the next step there",
    Kind.STOLEN_CORES: "end what else runs there, or use fewer threads",
    Kind.GARBAGE: "gc.freeze() after the start, or collect at the same step on all ranks",
    Kind.SLOW_LINK: "a look at its cable, port and neighbours, or an exchange that sends less",
    Kind.LOSS: "a look at its cable, port and queues: packets are sent again",
    Kind.STOPPED: "the process may be stopped, or hang",
    Kind.SILENT: "it may be dead, stopped or hang: look at its process on that host",
}

# What else than a part of the step does with time: the verb, and the comparative.
_WORDS = {
    Kind.STOLEN_CORES: ("cost", "more"),
    Kind.GARBAGE: ("costs", "more"),
    Kind.SLOW_LINK: ("costs", "more"),
    Kind.LOSS: ("costs", "more"),
}


@dataclasses.dataclass(frozen=True)
class Culprit:
    """Who holds up the others, and why."""

    kind: Kind
    ranks: tuple[int, ...]  # empty: another rank each time, or all alike
    hosts: tuple[str, ...]  # of these ranks or servers
    cost_s: float  # seconds a step that the others wait
    # An interval of the cost: 99.9 % for a rank that stays slow, else 95 %.
    low_s: float
    high_s: float
    # Of a median step in these steps; of a mean one where the cost is a mean, too.
    step_s: float
    first_step: int
    last_step: int
    rotates: bool = False  # another rank each time
    link: tuple[str, str] | None = None  # its two ends, such as ``rank 1 on h1``
    servers: tuple[int, ...] = ()  # parameter servers, beside or instead of ranks
    detail: str = ""  # further facts in words, such as a link's speed
    last_words: str = ""  # where a dead rank's last words are; empty: it left none

    @property
    def share(self) -> float:
        """The part of a step that it costs."""
        return self.cost_s / self.step_s if self.step_s else 0.0

    @property
    def total_s(self) -> float:
        """Seconds that it cost in all of its steps."""
        return self.cost_s * (self.last_step - self.first_step + 1)

    @property
    def who(self) -> str:
        """The subject of a sentence, such as ``rank 1 on h1``."""
        if self.link is not None:
            return f"the link from {self.link[0]} to {self.link[1]}"
        if not self.ranks and not self.servers:
            return "another rank each time" if self.rotates else "all ranks"
        processes = []
        if self.ranks:
            processes.append(_numbered("rank", self.ranks))
        if self.servers:
            processes.append(_numbered("server", self.servers))
        on_hosts = ", ".join(host for host in self.hosts if host)
        who = " and ".join(processes)
        return f"{who} on {on_hosts}" if on_hosts else who

    @property
    def key(self) -> tuple[Kind, tuple[int, ...], tuple[int, ...], bool]:
        """Equal for culprits that are the same one at different times."""
        return self.kind, self.ranks, self.servers, self.rotates

    def sentence(self) -> str:
        """Return one plain line: who, what, how much, how sure, when, and what to do."""
        advice = _ADVICE.get(self.kind, self.last_words)
        if self.kind in (Kind.STOPPED, Kind.DEAD, Kind.SILENT):
            detail = f": {self.detail}" if self.detail else ""
            remark = f" ({advice})" if advice else ""
            return f"{self.who}: {self.kind}{detail}{remark}"
        verb, more = _WORDS.get(self.kind, ("takes", "longer"))
        facts = f"{verb} {_ms(self.cost_s)} a step {more}"
        if self.high_s > self.low_s:
            facts += f" ({_number(self.low_s)} to {_number(self.high_s)})"
        facts += " than on the others"
        facts += f", {self.share:.0%} of a step, in steps {self.first_step:,} to {self.last_step:,}"
        detail = f"; {self.detail}" if self.detail else ""
        return f"{self.who}: {self.kind} {facts}{detail} ({advice})"

    def remedy(self) -> str:
        """Return one plain line: who, what to do, and what its steps may gain."""
        steps = f"steps {self.first_step:,} to {self.last_step:,}"
        gain = f"without it, {steps} would be up to {self.share:.0%} shorter"
        return f"{self.who}: {_ADVICE[self.kind]}; {gain}"

    def to_json(self) -> dict[str, object]:
        """Return it as a report holds it."""
        return {**dataclasses.asdict(self), "kind": str(self.kind), "sentence": self.sentence()}


def halted(kind: Kind, rank: int, host: str, detail: str, last_words: str = "") -> Culprit:
    """Return a rank that does no more steps, for which the others wait without end."""
    return Culprit(
        kind, (rank,), (host,), 0.0, 0.0, 0.0, 0.0, 0, 0, detail=detail, last_words=last_words
    )


# Words


def _numbered(noun: str, numbers: Sequence[int]) -> str:
    """Return numbers with their noun, such as ``ranks 1, 2``."""
    return f"{noun if len(numbers) == 1 else f'{noun}s'} {', '.join(map(str, numbers))}"


def _ms(seconds: float) -> str:
    return f"{_number(seconds)} ms"


def _number(seconds: float) -> str:
    """Return seconds as a number of milliseconds with three digits."""
    return f"{1000 * seconds:.3g}" if seconds < 1 else f"{1000 * seconds:,.0f}"

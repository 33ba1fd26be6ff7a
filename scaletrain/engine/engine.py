"""One rank's allreduce over a group: a transport, and an algorithm for each message."""

import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from scaletrain import plugins
from scaletrain.collectives import cutting
from scaletrain.collectives.schedule import proved
from scaletrain.engine import autotune
from scaletrain.engine.choice import AUTO, NATIVE, WIRES_OWN, Choice, check
from scaletrain.engine.execute import execute
from scaletrain.engine.meeting import host_of_each_rank, introduced
from scaletrain.engine.program import RankProgram
from scaletrain.engine.transport import Call, Ends, Group, Reduce, Transport
from scaletrain.errors import unknown
from scaletrain.host import shared_memory

# Messages in the run's header. 25 MiB is the size of DDP's buckets by default.
_RECORDED_BYTES = (4 << 10, 64 << 10, 1 << 20, 25 << 20, 100 << 20)


class Engine:
    """One rank's allreduce over a group. Every rank of the group creates one (collective).

    Args:
        collective: an algorithm as a person writes it (see ``choice.check``); ``auto`` takes the
            fastest for each message.
        transport: a wire likewise; ``auto`` takes shared memory on one host, ``mixed`` where some
            ranks share a host, else gloo.

    Attributes:
        transport_name: the wire in use.

    Raises:
        UserError: no such algorithm or wire, or it cannot be used here.
        TimeoutError, ConnectionError: not all ranks came.
    """

    def __init__(self, group: Group, collective: str = AUTO, transport: str = AUTO):
        # Both names are checked before the ranks meet: a slip of the keyboard is reported at once.
        self._collective, self._options = check(collective, "collective")
        transport_name, transport_options = check(transport, "transport")
        group = introduced(group)
        self._group = group
        self._hosts = host_of_each_rank(group)
        if transport_name == AUTO:
            transport_name = fitting_transport(self._hosts)
        self.transport_name = transport_name
        connect = plugins.load("transport", transport_name)
        self._transport: Transport = connect(group, **transport_options)
        # None: this wire cannot compare the ranks' calls.
        self._announce: Callable[[Call], None] | None = getattr(self._transport, "announce", None)
        if self._collective == NATIVE and not self._has_own_allreduce():
            raise unknown(f"collective over {transport_name}", NATIVE, plugins.names("collective"))
        self._programs: dict[str, RankProgram] = {}  # by algorithm: those that have been needed
        self._tuning: autotune.Tuning | None = None  # measured at the first message of ``auto``

    def allreduce(self, tensor: Tensor, reduce: Reduce = torch.add, number: int = 0) -> None:
        """Reduce a tensor over all ranks, in place. Collective, in the same order on every rank.

        Args:
            tensor: one-dimensional, contiguous and not empty; the same dtype and number of elements
                on every rank.
            reduce: associative and commutative.
            number: of the collective in its group. Transports compare it between the ranks.

        Raises:
            TimeoutError: a rank is late; names it.
            ConnectionError: a rank is gone; names it.
            RuntimeError: the ranks want different things, on wires that compare (``Comparing``).
        """
        if self._announce is not None:
            self._announce(Call(number, tensor.numel(), tensor.dtype, reduce))
        self.run(self.choose(tensor.nbytes), tensor, reduce)

    def exchange(self, call: Call, ends: Ends) -> None:
        """Run a collective of one hop. Collective, in the same order on every rank.

        Only wires with an ``OneHop`` do (``runs_one_hop``).

        Args, Raises: as ``OneHop.exchange``.
        """
        if self._announce is not None:
            self._announce(call)
        self._transport.exchange(call, ends)  # type: ignore[attr-defined]

    def run(self, choice: Choice, tensor: Tensor, reduce: Reduce = torch.add) -> None:
        """Do as ``allreduce``, with this algorithm. Collective."""
        if choice.collective == NATIVE:
            self._transport.allreduce(tensor, reduce)  # type: ignore[attr-defined]
            return
        program = self._programs.get(choice.collective)
        if program is None:
            program = self._compile(choice.collective)
            self._programs[choice.collective] = program
        execute(program, self._transport, tensor, reduce, choice.segments)

    def choose(self, num_bytes: int) -> Choice:
        """Return the algorithm for a message of this size.

        The first use of ``auto`` on a network measures, and is collective.
        """
        if self._collective != AUTO:
            segments = cutting.parts(self._collective, self._group.size, num_bytes)
            return Choice(self._collective, segments)
        if self.transport_name == "shared_memory":
            return WIRES_OWN
        if self._tuning is None:
            ranks = autotune.Ranks(self._group, self._hosts, self.transport_name, self.run)
            self._tuning = autotune.tune(ranks, self.candidates())
        return self._tuning.choose(num_bytes)

    def candidates(self) -> list[Choice]:
        """Return the algorithms that ``auto`` chooses from on this wire."""
        candidates = [WIRES_OWN] if self._has_own_allreduce() else []
        candidates += [
            Choice("recursive_doubling", 1),
            Choice("direct", 1),
            Choice("ring", 1),
            Choice("ring", 4),
            Choice("halving_doubling", 1),
            Choice("halving_doubling", 4),
            Choice("ring", 2),
            Choice("direct", 4),
        ]
        if self.transport_name == "mixed":
            candidates += [Choice("two_level", 1), Choice("two_level", 4)]
        return candidates

    def record(self, *sizes: int) -> dict[str, Any]:
        """Return the wire and the chosen algorithms, for the run's header.

        Args:
            sizes: messages of these bytes; none: a few usual sizes. Before ``auto`` has measured,
                nothing is chosen.
        """
        record: dict[str, Any] = {
            "transport": self.transport_name,
            "collective": self._collective,
        }
        if self._options:
            record["options"] = self._options
        must_measure = self._collective == AUTO and self.transport_name != "shared_memory"
        chosen: dict[str, Any] = {}
        # Otherwise choose() would measure, which is collective. A record is for one rank alone.
        if self._tuning is not None or not must_measure:
            for num_bytes in sizes or _RECORDED_BYTES:
                chosen[str(num_bytes)] = self.choose(num_bytes)._asdict()
        record["chosen"] = chosen
        return record

    def _has_own_allreduce(self) -> bool:
        """Return True if the wire has an allreduce of its own (``transport.OwnAllreduce``)."""
        return hasattr(self._transport, "allreduce")

    def _compile(self, collective: str) -> RankProgram:
        """Return this rank's program of an algorithm, which is proved first."""
        options = self._options_of(collective)
        schedule = proved(collective, self._group.size, **options)
        return RankProgram.of(schedule, self._group.rank)

    def _options_of(self, collective: str) -> dict[str, Any]:
        """Return the options that a person set, and those that follow from where the ranks are."""
        # ``run`` may be asked for another algorithm, which the person's options are not meant for.
        options = self._options if collective == self._collective else {}
        factory = plugins.load("collective", collective)
        wants_hosts = "ranks_per_host" in inspect.signature(factory).parameters
        if not wants_hosts or "ranks_per_host" in options:
            return options
        return {"ranks_per_host": self._ranks_per_host(), **options}

    def _ranks_per_host(self) -> int:
        """Return how many consecutive ranks share each host; 1 if they lie any other way."""
        size = self._group.size
        largest = max(Counter(self._hosts).values())
        for first in range(0, size, largest):
            if len(set(self._hosts[first : first + largest])) > 1:
                return 1
        return largest

    def limit(self, timeout: timedelta) -> None:
        """Change the group's timeout. Not collective."""
        self._transport.limit(timeout)

    def close(self) -> None:
        """Give back the wire. Not collective."""
        self._transport.close()


def fitting_transport(hosts: Sequence[str]) -> str:
    """Return the wire for where the ranks are, by a name of each rank's host."""
    num_hosts = len(set(hosts))
    # One rank a host: there is nobody to share memory with.
    if not shared_memory.SUPPORTED or num_hosts == len(hosts):
        return "gloo"
    return "shared_memory" if num_hosts == 1 else "mixed"


def runs_one_hop(hosts: Sequence[str], transport: str) -> bool:
    """Return True if the engine's wire runs the collectives of one hop.

    Args:
        hosts: a name of each rank's host.
        transport: the wire as a person writes it.
    """
    name, _ = check(transport, "transport")
    if name == AUTO:
        name = fitting_transport(hosts)
    return name == "shared_memory"

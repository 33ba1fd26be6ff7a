"""Which algorithm and which wire: what a person asked for, or, for ``auto``, what is fastest here."""

import inspect
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from scaletrain import plugins
from scaletrain.collectives import cost
from scaletrain.collectives.schedule import proved
from scaletrain.config import plugin_spec
from scaletrain.engine import autotune, segment
from scaletrain.engine.execute import Program, execute
from scaletrain.engine.transport import Group, Reduce, Transport
from scaletrain.errors import unknown

NATIVE = "native"  # the wire's own allreduce: gloo's, MPI's, or the one that shared memory has
_WIRES_OWN = autotune.Choice(NATIVE, 1)
_RECORDED = (4 << 10, 64 << 10, 1 << 20, 25 << 20, 100 << 20)


class Engine:
    """One rank's allreduce over a group: a transport and the programs that have been needed. Made by all ranks (collective)."""

    def __init__(self, group: Group, collective: str = "auto", transport: str = "auto"):
        collective, self._given = check(collective, "collective")
        transport, wire_options = check(transport, "transport")
        self._group = group
        self._hosts = segment.same_host(group)
        self.transport_name = self._wire() if transport == "auto" else transport
        self._transport: Transport = plugins.load("transport", self.transport_name)(
            group, **wire_options
        )
        if collective == NATIVE and not hasattr(self._transport, "allreduce"):
            raise unknown(
                f"collective over {self.transport_name}", NATIVE, plugins.names("collective")
            )
        self._collective = collective
        self._programs: dict[str, Program] = {}
        self._tuning: autotune.Tuning | None = None

    def allreduce(self, tensor: Tensor, reduce: Reduce = torch.add) -> None:
        """In place; ``tensor`` is one-dimensional, contiguous, not empty. Every rank calls it in the same order (collective)."""
        self.run(self.choose(tensor.nbytes), tensor, reduce)

    def run(self, choice: autotune.Choice, tensor: Tensor, reduce: Reduce = torch.add) -> None:
        """As ``allreduce``, with this algorithm."""
        if choice.collective == NATIVE:
            self._transport.allreduce(tensor, reduce)  # type: ignore[attr-defined]
            return
        program = self._programs.get(choice.collective)
        if program is None:
            schedule = proved(
                choice.collective, self._group.size, **self._options(choice.collective)
            )
            program = self._programs[choice.collective] = Program.of(schedule, self._group.rank)
        execute(program, self._transport, tensor, reduce, choice.segments)

    def choose(self, num_bytes: int) -> autotune.Choice:
        """What runs for a message of this size; the first use of ``auto`` on a network measures (collective)."""
        if self._collective != "auto":
            return autotune.Choice(
                self._collective, cost.parts(self._collective, self._group.size, num_bytes)
            )
        if self.transport_name == "shared_memory":
            return _WIRES_OWN
        if self._tuning is None:
            self._tuning = autotune.tune(
                self, self._group, self.candidates(), self.transport_name, self._hosts
            )
        return self._tuning.choose(num_bytes)

    def candidates(self) -> list[autotune.Choice]:
        """What ``auto`` chooses from here."""
        found = [_WIRES_OWN] if hasattr(self._transport, "allreduce") else []
        found += [autotune.Choice("recursive_doubling", 1), autotune.Choice("direct", 1)]
        found += [
            autotune.Choice(name, segments)
            for name in ("ring", "halving_doubling")
            for segments in (1, 4)
        ]
        found += [autotune.Choice("ring", 2), autotune.Choice("direct", 4)]
        if self.transport_name == "mixed":
            found += [autotune.Choice("two_level", segments) for segments in (1, 4)]
        return found

    def record(self, *sizes: int) -> dict[str, Any]:
        """For the run's header: the wire, and what is chosen for messages of these bytes (once ``auto`` has measured)."""
        known = (
            self._collective != "auto"
            or self.transport_name == "shared_memory"
            or self._tuning is not None
        )
        chosen = (
            {str(num_bytes): self.choose(num_bytes)._asdict() for num_bytes in sizes or _RECORDED}
            if known
            else {}
        )
        wire = {"transport": self.transport_name, "collective": self._collective}
        return wire | ({"options": self._given} if self._given else {}) | {"chosen": chosen}

    def _wire(self) -> str:
        if len(set(self._hosts)) == 1 and self._group.size > 1 and segment.supported():
            return "shared_memory"
        return (
            "mixed" if len(set(self._hosts)) < self._group.size and segment.supported() else "gloo"
        )

    def _options(self, collective: str) -> dict[str, Any]:
        """Those that a person gave, and those that follow from where the ranks are."""
        given = self._given if collective == self._collective else {}
        factory = plugins.load("collective", collective)
        if (
            "ranks_per_host" not in inspect.signature(factory).parameters
            or "ranks_per_host" in given
        ):
            return given
        # Consecutive ranks of equal number on each host; anything else is one level.
        counts = Counter(self._hosts)
        per_host = max(counts.values())
        blocks = [
            self._hosts[first : first + per_host] for first in range(0, self._group.size, per_host)
        ]
        regular = all(len(set(block)) == 1 for block in blocks)
        return {"ranks_per_host": per_host if regular else 1, **given}

    def close(self) -> None:
        self._transport.close()


def check(text: str, kind: str, where: str = "") -> tuple[str, dict[str, Any]]:
    """A collective or transport as a person writes it (``auto``, ``NAME``, ``NAME:OPTION=VALUE:...``): its name and options.

    Raises:
        UserError: no such name, option or value; ``where`` is the key that it was given by.
    """
    also = ("auto", NATIVE) if kind == "collective" else ("auto",)
    return (text, {}) if text in also else plugin_spec(kind, text, where or kind, also)

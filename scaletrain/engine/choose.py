"""Which algorithm and which wire: what a person asked for, or, for ``auto``, what is fastest here."""

import torch
from torch import Tensor

from scaletrain import plugins
from scaletrain.engine.execute import Program, execute
from scaletrain.engine.transport import Group, Reduce, Transport


class Engine:
    """One rank's allreduce over a group: a transport and the programs that have been needed. Made by all ranks (collective)."""

    def __init__(self, group: Group, collective: str, transport: str):
        self._transport: Transport = plugins.load("transport", "gloo" if transport == "auto" else transport)(group)
        self._collective = collective
        self._programs: dict[str, Program] = {}

    def allreduce(self, tensor: Tensor, reduce: Reduce = torch.add) -> None:
        """In place; ``tensor`` is one-dimensional, contiguous, not empty. Every rank calls it in the same order (collective)."""
        name = "ring" if self._collective == "auto" else self._collective
        program = self._programs.get(name)
        if program is None:
            schedule = plugins.load("collective", name)(self._transport.size)
            program = self._programs[name] = Program.of(schedule, self._transport.rank)
        execute(program, self._transport, tensor, reduce)

    def close(self) -> None:
        self._transport.close()

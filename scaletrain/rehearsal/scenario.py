"""Files of a rehearsal: the scenario to emulate, and the ways into its hosts."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from scaletrain.rehearsal.cluster import Cluster
from scaletrain.rehearsal.faults import Fault
from scaletrain.run.atomic import write_json


@dataclass(frozen=True)
class Scenario:
    """A cluster to emulate, and its faults.

    The launcher writes the scenario; the process that plays it reads it.

    Example:
        >>> scenario = Scenario(hosts=2, bandwidth="1Gbit")
        >>> Scenario.from_json(scenario.to_json()) == scenario
        True
    """

    hosts: int
    bandwidth: str | None = "1Gbit"
    """Of each link, in each direction; None leaves the links unshaped."""
    latency: str = "0"
    """One way, host to host."""
    loss: float = 0.0
    """Probability that a packet is dropped on its way into a host."""
    straggler: Mapping[int, float] = field(default_factory=dict)
    """By host: how many times as long its emulated accelerators take."""
    faults: tuple[Fault, ...] = ()
    """In the order in which they happen."""

    def cluster(self) -> Cluster:
        """Return the cluster, which exists once it is entered.

        Raises:
            UserError: a field is not allowed; the message begins with the field's name.
        """
        return Cluster(self.hosts, bandwidth=self.bandwidth, latency=self.latency, loss=self.loss)

    def slows_accelerators(self) -> bool:
        """Return True if a host's accelerators are slow, from the beginning or later."""
        return bool(self.straggler) or any(fault.factor for fault in self.faults)

    def to_json(self) -> str:
        """Return the text of ``settings.json``."""
        # JSON has strings as keys only.
        straggler = {}
        for host, factor in self.straggler.items():
            straggler[str(host)] = factor
        document = {
            "cluster": {
                "hosts": self.hosts,
                "bandwidth": self.bandwidth,
                "latency": self.latency,
                "loss": self.loss,
            },
            "straggler": straggler,
            "faults": [fault._asdict() for fault in self.faults],
        }
        return json.dumps(document, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Scenario":
        """Return the scenario of a text that ``to_json`` made."""
        document = json.loads(text)
        straggler = {}
        for host, factor in document["straggler"].items():
            straggler[int(host)] = factor
        faults = tuple(Fault(**fault) for fault in document["faults"])
        return cls(**document["cluster"], straggler=straggler, faults=faults)


@dataclass(frozen=True)
class Entrances:
    """The command lines that lead into the hosts of a cluster that is up (``cluster.json``).

    The process that plays the scenario writes it; every process that has to run on a host reads
    it.
    """

    launch: str
    """The launch that the cluster belongs to: a file of an earlier launch must not count."""
    commands: tuple[tuple[str, ...], ...]
    """By host: the words to put before a command to run it there."""

    @classmethod
    def of(cls, cluster: Cluster, launch: str) -> "Entrances":
        """Return the entrances of a cluster that is up."""
        commands = [cluster.command(host, ()) for host in range(len(cluster.names))]
        return cls(launch, tuple(commands))

    def write(self, path: Path) -> None:
        """Write the file atomically: its readers poll for it."""
        write_json(path, {"launch": self.launch, "commands": self.commands})

    @classmethod
    def read(cls, path: Path) -> "Entrances":
        """Return the file's content. Raises FileNotFoundError while there is none."""
        document = json.loads(path.read_text(encoding="utf-8"))
        commands = [tuple(command) for command in document["commands"]]
        return cls(document["launch"], tuple(commands))

"""Calibrations: what a fit found of a job's computation and network, and what that allows to say.

The networks at the ends of the fitted intervals are kept. A prediction on which they disagree is
refused (``Fit.step_range``).
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scaletrain.collectives.cost import Link, Network
from scaletrain.errors import UserError
from scaletrain.run.atomic import write_json
from scaletrain.scaling.model import Prediction
from scaletrain.scaling.predict.network import Fabric
from scaletrain.scaling.predict.step_time import ComputeCost

FAR = 8  # times the measured workers; a prediction beyond that has to be asked for
DECIDES = 1.5  # times from end to end: beyond that, what is not known decides a prediction
NORMAL_975 = 1.96  # quantile of the normal distribution
# By how much, as a standard deviation, the model of an exchange misses a step even if its network
# is right. A few residuals may agree better by luck, and would bound the network too narrowly.
MODEL_ERROR = 0.05


class Estimate(NamedTuple):
    """A fitted value with its 95 % interval.

    ``low`` is None if none at all explains the measurements as well, ``high`` if any large value
    does; both are None if there are too few measurements.
    """

    value: float
    low: float | None
    high: float | None

    @property
    def is_identified(self) -> bool:
        """True if the measurements tell the value, at least to a factor of ten each way."""
        # A factor of ten each way is a factor of 100 from end to end.
        return self.low is not None and self.high is not None and self.high <= 100 * self.low


class FittedNetwork(NamedTuple):
    """A network as a fit finds it.

    Attributes:
        latency_s: of each message.
        bandwidth_bytes_per_s: of each host's port.
        plausible: networks at the ends of both intervals, each the best of its latency or
            bandwidth; empty if the measurements are too few to judge.
    """

    latency_s: Estimate
    bandwidth_bytes_per_s: Estimate
    plausible: tuple[Network, ...] = ()

    @property
    def fabric(self) -> Fabric:
        """The network, for predictions."""
        return Fabric(Network(self.latency_s.value, self.bandwidth_bytes_per_s.value), "fitted")


class Fit(NamedTuple):
    """Calibrated models.

    Attributes:
        compute: a worker's computation.
        latency_s: of the network, for each message.
        bandwidth_bytes_per_s: of each host's port.
        overlap: communication hides behind backward.
        residuals: every measurement that was used, beside its prediction.
        max_workers: the largest number of workers in these measurements.
        plausible: networks that explain the measurements about as well (see ``FittedNetwork``).
        spread: how far from the model 95 % of the measured steps lie at most, as logarithms.
        workers_per_host: of the measured hosts.
        local: the link between workers of a host; None: as fast as the port. ``plausible`` networks
            have their own.
    """

    compute: ComputeCost
    latency_s: Estimate
    bandwidth_bytes_per_s: Estimate
    overlap: bool
    residuals: list[Prediction]
    max_workers: int
    plausible: tuple[Network, ...] = ()
    spread: float = NORMAL_975 * MODEL_ERROR
    workers_per_host: int = 1
    local: Link | None = None

    @property
    def fabric(self) -> Fabric:
        """The fitted network."""
        network = Network(self.latency_s.value, self.bandwidth_bytes_per_s.value)
        return self.fabric_on(network._replace(local=self.local))

    def fabric_on(self, network: Network) -> Fabric:
        """Return the measured hosts on a network, such as one that is plausible as well."""
        return Fabric(
            network._replace(local=None),
            "fitted",
            workers_per_host=self.workers_per_host,
            local=network.local,
            one_level=True,
        )

    @property
    def unidentified(self) -> list[str]:
        """The figures of the network that the measurements do not tell."""
        figures = {"latency": self.latency_s, "bandwidth": self.bandwidth_bytes_per_s}
        return [name for name, estimate in figures.items() if not estimate.is_identified]

    def fabric_or(self, assumed: Network) -> Fabric:
        """Return the fitted network, with figures of ``assumed`` that no measurement tells."""
        latency_s = self.latency_s.value
        bandwidth = self.bandwidth_bytes_per_s.value
        if not self.latency_s.is_identified:
            latency_s = assumed.latency_s
        if not self.bandwidth_bytes_per_s.is_identified:
            bandwidth = assumed.bandwidth_bytes_per_s
        return self.fabric_on(Network(latency_s, bandwidth, local=self.local))

    def step_range(self, step_s: Callable[[Fabric], float]) -> tuple[float, float]:
        """Return the shortest and the longest step that the measurements leave possible.

        Args:
            step_s: predicts a step on a network.
        """
        steps = [step_s(self.fabric)]
        for network in self.plausible:
            steps.append(step_s(self.fabric_on(network)))
        return min(steps), max(steps)

    def interval(self, step_s: Callable[[Fabric], float]) -> tuple[float, float]:
        """Return the 95 % interval of a step that is going to be measured.

        It holds what is not known of the network and how far steps are from the model.
        """
        best = step_s(self.fabric)
        low, high = self.step_range(step_s)
        # As errors of the logarithm, independent of each other.
        below = math.hypot(math.log(best / low), self.spread)
        above = math.hypot(math.log(high / best), self.spread)
        return best * math.exp(-below), best * math.exp(above)

    @property
    def error(self) -> float:
        """Root of the mean squared residual, as a fraction."""
        squares = sum(residual.error**2 for residual in self.residuals)
        return math.sqrt(squares / len(self.residuals))

    def check_reach(self, workers: int, far: bool) -> None:
        """Check that so many workers may be predicted.

        Raises:
            UserError: they are more than ``FAR`` times the measured ones, and ``far`` is False.
        """
        if workers > FAR * self.max_workers and not far:
            raise UserError(
                f"--workers: {workers} is more than {FAR} times the {self.max_workers} that were"
                f" measured (allowed: up to {FAR * self.max_workers}, or --far)"
            )

    def to_json(self) -> dict[str, Any]:
        """Return the fit as JSON holds it."""
        return {
            "compute": self.compute._asdict(),
            "latency_s": self.latency_s._asdict(),
            "bandwidth_bytes_per_s": self.bandwidth_bytes_per_s._asdict(),
            "overlap": self.overlap,
            "max_workers": self.max_workers,
            "plausible": [_figures(network) for network in self.plausible],
            "spread": self.spread,
            "workers_per_host": self.workers_per_host,
            "local": _link_figures(self.local),
            "residuals": [residual.to_json() for residual in self.residuals],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Fit":
        """Return the fit that ``to_json`` wrote.

        Raises:
            KeyError, TypeError: the value is no fit.
        """
        return cls(
            compute=ComputeCost(**value["compute"]),
            latency_s=Estimate(**value["latency_s"]),
            bandwidth_bytes_per_s=Estimate(**value["bandwidth_bytes_per_s"]),
            overlap=value["overlap"],
            residuals=[Prediction.from_json(residual) for residual in value["residuals"]],
            max_workers=value["max_workers"],
            plausible=tuple(_network(figures) for figures in value.get("plausible", ())),
            spread=value.get("spread", NORMAL_975 * MODEL_ERROR),
            workers_per_host=value.get("workers_per_host", 1),
            local=_link(value.get("local", ())),
        )


def _figures(network: Network) -> list[float]:
    """Return latency and bandwidth, followed by those inside a host if they are its own."""
    return [network.latency_s, network.bandwidth_bytes_per_s, *_link_figures(network.local)]


def _link_figures(link: Link | None) -> list[float]:
    return [] if link is None else [link.latency_s, link.bandwidth_bytes_per_s]


def _network(figures: Sequence[float]) -> Network:
    latency_s, bandwidth, *local = figures
    return Network(latency_s, bandwidth, local=_link(local))


def _link(figures: Sequence[float]) -> Link | None:
    if not figures:
        return None
    latency_s, bandwidth = figures
    return Link(latency_s, bandwidth)


@dataclasses.dataclass(frozen=True)
class Calibration:
    """A fit and the job that it was made from: the content of ``fit.json``."""

    fit: Fit
    num_bytes: float  # of the gradients
    batch_size: int

    def write(self, path: Path) -> None:
        """Write the calibration as JSON."""
        job = {"num_bytes": self.num_bytes, "batch_size": self.batch_size}
        write_json(path, self.fit.to_json() | job)

    @classmethod
    def read(cls, path: Path) -> "Calibration":
        """Read a file that ``write`` has written.

        Raises:
            UserError: it is some other file.
        """
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            return cls(Fit.from_json(value), value["num_bytes"], value["batch_size"])
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"--fit {path}: no calibration"
                " (allowed: what `scaletrain fit` wrote, such as fit.json)"
            ) from None

"""Writes each rank's step, loss and throughput for Prometheus: a file, or an endpoint too."""

import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Le

from scaletrain.errors import UserError
from scaletrain.needs import Needs
from scaletrain.run.layout import RunDir
from scaletrain.run.records import StepRecord
from scaletrain.training.callbacks import Callback

if TYPE_CHECKING:
    from scaletrain.training.trainer import Trainer

NEEDS = Needs(package="prometheus_client", fix='pip install "scaletrain[trackers]"')
_WRITE_S = 1.0  # seconds between two states of the file


class Prometheus(Callback):
    """Keeps the gauges of this rank, and writes them into the run directory once a second."""

    def __init__(self, trainer: "Trainer", port: int | None, host: str):
        NEEDS.check_installed("callbacks: prometheus")
        import prometheus_client as client

        self._write = client.write_to_textfile
        self._registry = client.CollectorRegistry()
        self._path = str(RunDir(trainer.run_dir).prometheus(trainer.world.rank))
        self._written_at = 0.0
        self._has_failed = False
        self._run = trainer.config.name
        self._rank = str(trainer.world.rank)
        self._step = self._gauge(client, "step", "Optimizer steps done.")
        self._loss = self._gauge(client, "loss", "Mean loss of this rank's share of a step.")
        self._rate = self._gauge(client, "samples_per_second", "This rank's samples a second.")
        self._time = self._gauge(client, "last_step_timestamp_seconds", "End of the last step.")
        self._figures = client.Gauge(
            "scaletrain_evaluation",
            "Figures of the last evaluation, over all ranks.",
            ["run", "rank", "figure"],
            registry=self._registry,
        )
        if port is not None:
            self._serve(client, port + trainer.world.local_rank, host)

    def _gauge(self, client: Any, name: str, meaning: str) -> Any:
        gauge = client.Gauge(
            f"scaletrain_{name}", meaning, ["run", "rank"], registry=self._registry
        )
        return gauge.labels(self._run, self._rank)

    def _serve(self, client: Any, port: int, host: str) -> None:
        try:
            client.start_http_server(port, host, self._registry)
        except OSError as error:
            raise UserError(
                f"callbacks: prometheus: port {port} of {host}: {error.strerror}"
                " (rank r of a host listens on port + r; allowed: free ports)"
            ) from None

    def after_step(self, record: StepRecord) -> None:
        """Set the gauges; write them if the last time is long enough ago."""
        self._step.set(record.step + 1)
        if record.loss is not None:
            self._loss.set(record.loss)
        self._rate.set(record.samples / record.step_s)
        self._time.set(time.time())
        if time.monotonic() - self._written_at > _WRITE_S:
            self._write_file()

    def after_evaluation(self, step: int, figures: Mapping[str, float | None]) -> None:
        """Set the gauges of the figures, on rank 0: they are the same on all ranks."""
        if self._rank != "0":
            return
        for name, value in figures.items():
            if value is not None:
                self._figures.labels(self._run, self._rank, name).set(value)
        self._write_file()

    def close(self, summary: Mapping[str, Any] | None) -> None:
        """Write the last state."""
        self._write_file()

    def _write_file(self) -> None:
        self._written_at = time.monotonic()
        try:
            self._write(self._path, self._registry)
        except OSError as error:
            if not self._has_failed:
                print(f"callbacks: prometheus: {error}", file=sys.stderr, flush=True)
            self._has_failed = True


def callback(
    trainer: "Trainer",
    *,
    port: Annotated[int, Ge(1), Le(65535)] | None = None,
    host: str = "127.0.0.1",
) -> Callback:
    """Return the callback.

    Args:
        port: where rank 0 answers HTTP; the next ranks of a host take the next ports. None: none.
        host: the address to listen on.
    """
    return Prometheus(trainer, port, host)

"""Logs loss, rate, throughput and test figures to an MLflow server, or to a file for it."""

import logging
import os
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge

from scaletrain.needs import Needs
from scaletrain.training.callbacks import Callback
from scaletrain.training.tracking import Place, Tracker, TrackerRun

if TYPE_CHECKING:
    from scaletrain.training.trainer import Trainer

_MOST_PARAMETERS = 100  # in one call

NEEDS = Needs(package="mlflow", fix='pip install "scaletrain[trackers]"')


class MLflowRun(TrackerRun):
    """A run of MLflow; without a server it is in a database file in the run directory."""

    def __init__(self, place: Place, uri: str | None, experiment: str):
        import mlflow
        from mlflow.entities import Param

        if uri is None:
            file = f"sqlite:///{place.folder.resolve() / 'mlflow.db'}"
            uri = os.environ.get("MLFLOW_TRACKING_URI", file)
        # It would tell of every table that it makes in a new file.
        logging.getLogger("mlflow.store.db").setLevel(logging.WARNING)
        self._client = mlflow.MlflowClient(uri)
        self._id, is_new = place.identifier(lambda: self._create(experiment, place.config.name))
        if not is_new:
            self._client.update_run(self._id, status="RUNNING")
            return
        parameters = [Param(*pair) for pair in _flat(place.config.model_dump())]
        for start in range(0, len(parameters), _MOST_PARAMETERS):
            part = parameters[start : start + _MOST_PARAMETERS]
            self._client.log_batch(self._id, params=part)

    def _create(self, experiment: str, name: str) -> str:
        existing = self._client.get_experiment_by_name(experiment)
        if existing is None:
            number = self._client.create_experiment(experiment)
        else:
            number = existing.experiment_id
        identifier: str = self._client.create_run(number, run_name=name).info.run_id
        return identifier

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now_ms = round(time.time() * 1000)
        metrics = [Metric(name, value, now_ms, step) for name, value in figures.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def end(self, summary: Mapping[str, Any] | None) -> None:
        status = "FAILED"
        if summary is not None:
            status = "FINISHED" if summary["finished"] else "KILLED"
        self._client.set_terminated(self._id, status)


def _flat(tree: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """Yield the values of nested mappings by dotted key."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", str(value)


def callback(
    trainer: "Trainer",
    *,
    uri: str | None = None,
    experiment: str = "scaletrain",
    every: Annotated[int, Ge(1)] = 10,
) -> Callback:
    """Return the callback.

    Args:
        uri: of the tracking server; None: MLFLOW_TRACKING_URI, else a file in the run directory.
        experiment: that the run belongs to.
        every: steps between figures.
    """
    return Tracker(trainer, "mlflow", lambda place: MLflowRun(place, uri, experiment), NEEDS, every)

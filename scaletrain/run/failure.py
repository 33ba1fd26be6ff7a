"""The first cause of a job's end, as a file of the run directory."""

from typing import Any, NamedTuple


class Failure(NamedTuple):
    """The first cause of a job's end. Written as RUN_DIR/failure-<rank>.json by the worker, or made by the supervisor."""

    rank: int | None
    host: str
    step: int | None
    time: float  # unix seconds; among equals the earliest is the cause, the others are consequences
    # "exception", "user" (a person's mistake: one line), "signal", "exit", "hang"; consequences: "peer" (lost another rank), "launcher"
    kind: str
    message: str
    traceback: str = ""
    collective: str = ""  # the last collective this rank entered, when known
    exit_code: int = 1

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Failure":
        return cls(**{key: value[key] for key in cls._fields if key in value})

"""One run's records as numbers: what a step took, on every rank, and what the run as a whole reached."""

import json
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scaletrain.errors import UserError
from scaletrain.run.records import WARMUP_STEPS, read_records
from scaletrain.scaling.measure import servers

PARTS = ("input_s", "forward_s", "backward_s", "update_s")


class Run(NamedTuple):
    """A finished run. Arrays have shape (steps, ranks), warm-up left out; a rank that did fewer steps cuts all to its length."""

    summary: dict[str, Any]
    steps: np.ndarray  # step_s
    parts: dict[str, np.ndarray]  # each of PARTS
    samples: np.ndarray
    sent_bytes: float | None  # by one rank in one step, mean; None: the exchange does not count
    waited_s: (
        float | None
    )  # for the others' gradients, at the end of backward, mean; None: the exchange does not tell
    gradient_bytes: (
        int | None
    )  # of the model's parameters; None: there is no checkpoint to read it from
    losses: np.ndarray
    ended_s: np.ndarray  # of each step, since the rank's first one began
    servers: dict[str, Any] | None  # what parameter servers counted
    headers: list[dict[str, Any]]  # what each rank wrote of itself at its start, where it did

    @property
    def workers(self) -> int:
        return self.steps.shape[1]

    @property
    def commit(self) -> str | None:
        """What was measured: of the checkout that rank 0 ran."""
        return self.headers[0]["environment"]["commit"] if self.headers else None

    @property
    def learns(self) -> bool:
        """Whether losses mean something: emulated accelerators compute none."""
        return not (self.summary.get("emulation") or {}).get("compute")

    @property
    def devices(self) -> dict[tuple[str, str, int], int]:
        """Workers of each device, by name, device and node; without those on the CPU."""
        on_devices = [header for header in self.headers if header["device"] != "cpu"]
        return Counter(
            (header["device_name"], header["device"], header["node"]) for header in on_devices
        )

    @property
    def crowded(self) -> bool:
        """Whether a machine had more threads than cores: those that compute, and one of each server that ran beside them."""
        emulated = self.summary.get("launcher") == "rehearsal"  # its hosts are one machine
        threads: Counter[int] = Counter()
        cores: dict[int, set[int]] = {}
        for header in self.headers:
            if header["device"] == "cpu":
                machine = 0 if emulated else header["node"]
                threads[machine] += header["threads"]
                cores.setdefault(machine, set()).update(header["cores"])
        if self.servers and self.summary.get("launcher") in ("local", "rehearsal"):
            threads[0] += self.servers["servers"]
            cores.setdefault(0, set()).update(
                self.servers["cores"]
            )  # workers may be bound, each to its own
        return any(threads[machine] > len(own) for machine, own in cores.items())

    @property
    def samples_per_s(self) -> float:
        """The sum over ranks of each one's samples over its own time."""
        return float((self.samples.sum(axis=0) / self.steps.sum(axis=0)).sum())

    @property
    def step_s(self) -> float:
        """Mean over steps and ranks."""
        return float(self.steps.mean())

    @property
    def slowest_s(self) -> float:
        """Mean over steps of the slowest rank's step: what the others would wait for if they had to."""
        return float(self.steps.max(axis=1).mean())

    def part_s(self, part: str) -> float:
        return float(self.parts[part].mean())


def read_run(run_dir: Path, warmup_steps: int = WARMUP_STEPS) -> Run:
    """Read ``summary.json`` and every ``rank-<r>.jsonl``.

    Raises:
        UserError: the directory is no finished run, or has no step left after warm-up.
    """
    try:
        summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{run_dir}: no finished run (summary.json: {error.strerror})") from None
    except ValueError:
        raise UserError(f"{run_dir}: summary.json is not JSON") from None
    ranks = []
    for rank in range(int(summary["workers"])):
        path = run_dir / f"rank-{rank}.jsonl"
        if not path.exists():
            raise UserError(f"{run_dir}: rank-{rank}.jsonl is missing")
        ranks.append(list(read_records(path)))
    shortest = min(len(records) for records in ranks)
    first = min(warmup_steps, shortest - 1)
    if shortest < 1:
        raise UserError(f"{run_dir}: a rank has no records")
    kept = [records[first:shortest] for records in ranks]

    def array(key: str) -> np.ndarray:
        return np.array([[getattr(record, key) for record in records] for records in kept]).T

    def told(key: str) -> float | None:
        values = [
            record.exchange[key] for records in kept for record in records if key in record.exchange
        ]
        return float(np.mean(values)) if values else None

    return Run(
        summary=summary,
        steps=array("step_s"),
        parts={part: array(part) for part in PARTS},
        samples=array("samples"),
        sent_bytes=told("bytes_sent"),
        waited_s=told("wait_in_backward_s"),
        gradient_bytes=_gradient_bytes(run_dir),
        losses=array("loss"),
        ended_s=array("time") + array("step_s") - np.array([records[0].time for records in ranks]),
        servers=servers.read(run_dir),
        headers=_headers(run_dir, len(ranks)),
    )


def _headers(run_dir: Path, ranks: int) -> list[dict[str, Any]]:
    paths = (run_dir / f"rank-{rank}.json" for rank in range(ranks))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]


def _gradient_bytes(run_dir: Path) -> int | None:
    """Bytes of the model's tensors, read from the header of a checkpoint (safetensors: a length, then JSON)."""
    for path in sorted(run_dir.glob("step-*.safetensors")):
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > 100_000_000:
                return None
            header = json.loads(file.read(length))
        spans = [
            tensor["data_offsets"] for name, tensor in header.items() if name.startswith("model.")
        ]
        return sum(end - start for start, end in spans)
    return None

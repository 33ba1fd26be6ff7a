"""The values that the rooms of ``scaling`` pass to each other, and their JSON.

``measure`` makes cells and runs. ``explain`` makes a report of them: rows, losses, predictions.
``show`` and ``predict`` read reports. Only this module turns such values into JSON and back, so
that a key of ``report.json`` is spelled in one place: the name of a field.

A figure that is not known is None. Reports of other versions may lack keys: those get the field's
default. Keys that this version does not know are dropped.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from scaletrain.run.culprit import Culprit

Scalar = str | int | float | bool | None
"""A value of ``--vary`` or ``--set``: a number or a word."""

Variant = Mapping[str, Scalar]
"""The settings of ``--vary`` that one cell has, by their dotted keys."""

PARTS = ("input_s", "forward_s", "backward_s", "update_s")
"""The parts of a step that every rank measures."""


class _Fields:
    """A dataclass with JSON that has its fields by name, in their order."""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Make a value of the entries that there are fields for."""
        return cls(**cls._known(value))

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON has them."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]  # every subclass is one
        return {field.name: _plain(getattr(self, field.name)) for field in fields}

    @classmethod
    def _known(cls, value: Mapping[str, Any]) -> dict[str, Any]:
        """Return the entries of ``value`` that there are fields for."""
        names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        return {name: value[name] for name in names if name in value}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One point of a sweep.

    >>> Cell("digits", "ring", 2, 96).name
    'digits-ring-w2-b96'
    """

    config: str  # the config file's stem
    exchange: str  # label, such as ring@gloo
    workers: int
    batch_size: int  # the config's: global in strong scaling, of one worker in weak scaling
    variant: tuple[tuple[str, Scalar], ...] = ()  # settings that differ from cell to cell: --vary
    reference: bool = False  # a short run that only the split of lost time needs

    @property
    def name(self) -> str:
        """The name of the cell's directory."""
        words = [self.config, self.exchange, f"w{self.workers}", f"b{self.batch_size}"]
        for key, value in self.variant:
            if key != "batch_size":
                # The last part of a dotted key keeps paths short; the batch has its ``b`` already.
                words.append(f"{key.rpartition('.')[2]}{value}")
        if self.reference:
            words.append("ref")
        # The name becomes a directory: any other run of characters turns into one ``_``.
        return "-".join(re.sub(r"[^\w.@]+", "_", word).strip("_") for word in words)

    @property
    def variant_but_batch(self) -> tuple[tuple[str, Scalar], ...]:
        """The variant without ``batch_size``, which ``batch_size`` already says."""
        return tuple((key, value) for key, value in self.variant if key != "batch_size")

    @property
    def share(self) -> int:
        """Samples of one worker in strong scaling, rounded up."""
        return -(-self.batch_size // self.workers)


@dataclasses.dataclass(frozen=True)
class Source(_Fields):
    """One config file of a sweep."""

    path: str
    text: str


@dataclasses.dataclass(frozen=True)
class SweepPlan(_Fields):
    """Everything that decides the cells of a sweep, in ``sweep.json``."""

    configs: Mapping[str, Source]  # by the file's stem
    workers: tuple[int, ...]
    exchanges: tuple[str, ...]
    mode: str  # strong or weak
    repeats: int
    settings: tuple[str, ...]  # KEY=VALUE of every cell
    vary: Mapping[str, list[Scalar]]  # key -> its values
    launcher: str
    threads: int  # of each worker
    bind: bool  # whether each worker keeps to its own cores
    split: bool  # whether reference cells are run
    cell_timeout_s: float
    cold: bool = False  # whether each worker imports torch itself

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        facts = cls._known(value)
        facts["configs"] = {stem: Source(**source) for stem, source in value["configs"].items()}
        # JSON turned these tuples into lists.
        for name in ("workers", "exchanges", "settings"):
            facts[name] = tuple(facts[name])
        return cls(**facts)


@dataclasses.dataclass(frozen=True)
class EmulatedNetwork(_Fields):
    """Links between emulated hosts, by the names of ``rehearsal.Cluster.describe``."""

    bandwidth: str | None = None  # such as 1Gbit; None: not limited
    latency_s: float = 0.0  # seconds that are added to each message
    loss: float = 0.0  # the part of the packets that is dropped, 0 to 1


@dataclasses.dataclass(frozen=True)
class EmulatedCompute(_Fields):
    """An accelerator that waits in place of computing."""

    step_s: float  # seconds a step
    sample_s: float  # seconds a sample


@dataclasses.dataclass(frozen=True)
class Summary(_Fields):
    """The facts of a run in ``summary.json`` that reports use."""

    workers: int
    name: str = "run"  # of the config
    exchange: str = ""
    batch_size: int | None = None  # of all workers together
    batch_mode: str = "strong"  # or weak
    launcher: str | None = None
    emulated: bool = False
    network: EmulatedNetwork | None = None  # None: a real one
    compute: EmulatedCompute | None = None  # None: real training
    final_loss: float | None = None  # of the training
    test_accuracy: float | None = None  # 0 to 1
    target_step: int | None = None  # the step at which the target accuracy was reached
    target_s: float | None = None  # seconds until then
    wall_s: float | None = None  # seconds from the first step to the last

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        emulation = value.get("emulation") or {}
        network = emulation.get("network")
        if network:
            network = EmulatedNetwork.from_json(network)
        compute = emulation.get("compute")
        if compute:
            compute = EmulatedCompute.from_json(compute)
        facts = cls._known(value) | {"network": network or None, "compute": compute or None}
        facts["workers"] = int(facts["workers"])
        return cls(**facts)


@dataclasses.dataclass(frozen=True)
class WorkerFacts(_Fields):
    """The facts that a worker records about itself at its start, in ``rank-<r>.json``."""

    node: int = 0  # number of its host
    device: str = "cpu"  # or cuda:0, ...
    device_name: str = ""
    threads: int = 0  # that compute
    cores: tuple[int, ...] = ()  # on which it may run
    clock_offset_s: float = 0.0  # seconds by which its clock is ahead of rank 0's
    commit: str | None = None  # of the checkout that it ran

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        facts = cls._known(value)
        facts["cores"] = tuple(facts.get("cores", ()))
        # Only the first worker of a host notes its environment: the others have no commit.
        facts["commit"] = (value.get("environment") or {}).get("commit")
        return cls(**facts)


@dataclasses.dataclass(frozen=True)
class ServerCounts(_Fields):
    """The counts of the parameter servers of one run, together."""

    servers: int  # how many there were
    cores: tuple[int, ...]  # on which they may run
    mode: str  # of their consistency: sync, async, ...
    staleness: Mapping[str, int]  # updates a gradient of a block came late by -> how many did
    staleness_mean: float  # updates
    dropped: float  # share, 0 to 1, of the pushed gradients that came too late
    pace_s: tuple[float | None, ...]  # each worker's median seconds a step, by rank
    lost: Mapping[str, str]  # rank -> why it was given up
    refused: int  # messages that were malformed or not authenticated
    restored_at_update: int | None  # the update of the snapshot that a restarted server began from
    cpu_s_per_worker: float  # seconds
    memory_bytes: int  # of the largest server

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        facts = cls._known(value)
        facts["cores"] = tuple(facts.get("cores", ()))
        facts["pace_s"] = tuple(facts["pace_s"])
        return cls(**facts)


@dataclasses.dataclass(frozen=True)
class ServerStatistics:
    """The counts of one parameter server, in ``server-<i>.json``."""

    mode: str
    staleness: Mapping[int, int]  # updates that a gradient of a block came late by -> how many
    pushes: int  # gradients of all workers
    dropped: int  # of these, those that came too late
    pace_s: tuple[float | None, ...]  # each worker's median seconds a step, by rank
    lost: Mapping[int, str]  # rank -> why it was given up
    refused: int
    restored_at_update: int | None
    cpu_s_per_worker: float
    memory_bytes: int
    cores: tuple[int, ...]

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        # Keys are ranks as text. Sorted as text, rank 10 would come before rank 2.
        pace_s = value["step_s"]
        return cls(
            mode=value["mode"],
            staleness={int(updates): count for updates, count in value["staleness"].items()},
            # The server counts by worker; a report has all workers together.
            pushes=sum(value["pushes"].values()),
            dropped=sum(value["dropped"].values()),
            pace_s=tuple(pace_s[rank] for rank in sorted(pace_s, key=int)),
            lost={worker["rank"]: worker["reason"] for worker in value["lost"]},
            refused=sum(value["refused"].values()),
            restored_at_update=value["restored_at_update"],
            cpu_s_per_worker=value["cpu_s_per_worker"],
            memory_bytes=value["memory_bytes"],
            cores=tuple(value.get("cores", ())),
        )


@dataclasses.dataclass(frozen=True)
class RankTimes(_Fields):
    """One rank's mean seconds of a step: what it took itself, and what it waited for others."""

    rank: int
    host: str
    step_s: float
    input_s: float  # this and the next three: without the waits inside
    forward_s: float
    backward_s: float
    optimizer_s: float
    wait_s: float  # for other ranks and servers, inside the parts
    gc_s: float  # in Python's garbage collector, inside the parts
    stolen_s: float | None  # ready to run without a core; None: the kernel does not count


@dataclasses.dataclass(frozen=True)
class Reached(_Fields):
    """Between which two evaluations a run has reached its target accuracy."""

    samples: int  # of all workers, at the evaluation that found it reached
    samples_before: int  # at the evaluation before: it was not reached yet


@dataclasses.dataclass(frozen=True)
class Run:
    """One finished run as numbers.

    Arrays have shape (steps, ranks). Warm-up is left out. Where a rank did fewer steps than the
    others, all are cut to its length.
    """

    summary: Summary
    steps: np.ndarray  # seconds of each step
    parts: Mapping[str, np.ndarray]  # seconds of each of PARTS
    samples: np.ndarray  # processed by each rank in each step
    losses: np.ndarray  # training loss
    ended_s: np.ndarray  # seconds from the rank's first step to the end of each
    sent_bytes: float | None  # by one rank in one step, mean; None: the exchange does not count
    waited_s: float | None  # seconds a step for the others' gradients at the end of backward, mean
    gradient_bytes: int | None  # of the model's parameters; None: there is no checkpoint
    servers: ServerCounts | None  # None: it had no parameter servers
    worker_facts: tuple[WorkerFacts, ...]  # of the ranks that wrote them
    evaluated_steps: tuple[int, ...] = ()  # after which the test set was evaluated
    ranks: tuple[RankTimes, ...] = ()
    culprits: tuple[Culprit, ...] = ()  # who held up the others; the most expensive first

    @property
    def workers(self) -> int:
        return self.steps.shape[1]

    @property
    def convergence(self) -> "Reached | None":
        """The samples until the target accuracy; None if it was not reached or not looked at."""
        step, batch_size = self.summary.target_step, self.summary.batch_size
        if step is None or batch_size is None or step not in self.evaluated_steps:
            return None
        before = max([0, *(each for each in self.evaluated_steps if each < step)])
        return Reached(step * batch_size, before * batch_size)

    @property
    def commit(self) -> str | None:
        """The commit that was measured, from rank 0's checkout."""
        return self.worker_facts[0].commit if self.worker_facts else None

    @property
    def learns(self) -> bool:
        """Whether losses mean something. Emulated accelerators compute none."""
        return self.summary.compute is None

    @property
    def devices(self) -> Counter[tuple[str, str, int]]:
        """Workers of each device, by (name, device, node); without those on the CPU."""
        on_devices = [facts for facts in self.worker_facts if facts.device != "cpu"]
        return Counter((facts.device_name, facts.device, facts.node) for facts in on_devices)

    @property
    def has_too_many_threads(self) -> bool:
        """Whether a machine had more threads than cores.

        Threads are those that compute, and one of each server that ran beside the workers.
        """
        # The hosts of an emulated cluster are one machine.
        emulated = self.summary.launcher == "rehearsal"
        threads: Counter[int] = Counter()
        cores: dict[int, set[int]] = {}
        for facts in self.worker_facts:
            # A worker on a GPU computes there: its threads do not compete for the cores.
            if facts.device == "cpu":
                machine = 0 if emulated else facts.node
                threads[machine] += facts.threads
                cores.setdefault(machine, set()).update(facts.cores)
        if self.servers and self.summary.launcher in ("local", "rehearsal"):
            # Both launchers start the servers on the workers' machine, which is number 0.
            threads[0] += self.servers.servers
            # Workers may be bound, each to its own cores, and servers to the rest.
            cores.setdefault(0, set()).update(self.servers.cores)
        return any(threads[machine] > len(available) for machine, available in cores.items())

    @property
    def samples_per_s(self) -> float:
        """The sum over ranks of each one's samples over its own time."""
        # Each rank by its own clock: asynchronous ranks do not end together.
        return float((self.samples.sum(axis=0) / self.steps.sum(axis=0)).sum())

    @property
    def step_s(self) -> float:
        """Mean seconds of a step, over steps and ranks."""
        return float(self.steps.mean())

    @property
    def slowest_s(self) -> float:
        """Mean over steps of the slowest rank's step, which the others would have to wait for."""
        return float(self.steps.max(axis=1).mean())

    def part_s(self, part: str) -> float:
        """Mean seconds of one of PARTS, over steps and ranks."""
        return float(self.parts[part].mean())


@dataclasses.dataclass(frozen=True)
class Repeat(_Fields):
    """One finished run in a row of a report."""

    samples_per_s: float
    step_s: float  # mean seconds of a step
    wall_s: float | None = None  # seconds from the first step to the last
    reached: Reached | None = None  # None: not the target accuracy, or there was none

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        # NaN, since these fields are plain numbers: a figure made of it is visibly unknown.
        samples_per_s = value.get("samples_per_s", math.nan)
        reached = value.get("reached")
        if reached:
            reached = Reached.from_json(reached)
        return cls(
            samples_per_s, value.get("step_s", math.nan), value.get("wall_s"), reached or None
        )


@dataclasses.dataclass(frozen=True)
class Row(_Fields):
    """A cell in a report, with its figures over the finished repeats that are not outlying.

    Percentiles are over all finished ones. All figures are None where no repeat has finished.
    ``..._ci95`` is half the width of the 95 % interval of the mean, in the unit of the figure; None
    where there was one repeat.
    """

    config: str
    exchange: str
    workers: int
    batch_size: int  # of all workers together
    variant: Variant
    samples_per_s: float | None = None
    samples_per_s_ci95: float | None = None
    speedup: float | None = None  # samples/s over the baseline's; None: there is no baseline
    speedup_ci95: float | None = None  # None for the baseline itself, too
    efficiency: float | None = None  # speedup / workers
    step_s_min: float | None = None  # seconds of a step, over all steps, ranks and repeats
    step_s_p10: float | None = None  # percentiles
    step_s_p50: float | None = None
    step_s_p90: float | None = None
    step_s_p95: float | None = None
    step_s_mean: float | None = None
    step_s_ci95: float | None = None
    exposed_comm_s: float | None = None  # seconds a step beyond the same workers with ``none``
    exposed_comm_s_ci95: float | None = None
    wait_in_backward_s: float | None = None  # seconds from a rank's last gradient to the means'
    input_s: float | None = None  # mean seconds of the parts of a step
    forward_s: float | None = None
    backward_s: float | None = None  # with the communication that overlaps it
    update_s: float | None = None
    bytes_sent: float | None = None  # by one worker in one step
    bytes_sent_is: str | None = None  # "counted", or "the schedule's"
    gradient_bytes: int | None = None  # of the whole model; None: no checkpoint says so
    final_loss: float | None = None  # of the training; None: the accelerators were emulated
    test_accuracy: float | None = None  # 0 to 1
    target_step: float | None = None  # the step at which the target accuracy was reached, mean
    target_s: float | None = None  # seconds until then, over the repeats that reached it
    target_s_ci95: float | None = None
    target_runs: int = 0  # how many repeats reached it
    is_too_fast: bool = False  # reached in fewer samples than the reference allows (Convergence)
    emulation: str | None = None  # what was emulated, in words; None: nothing
    servers: ServerCounts | None = None  # of the first repeat that had parameter servers
    time_to_loss_s: float | None = None  # seconds to Report.loss_reached
    oversubscribed: str = ""  # of what the workers had too little; empty: of nothing
    repeats: int = 0  # that finished
    outliers: tuple[int, ...] = ()  # which finished repeats are outlying, counted from 1
    failures: tuple[str, ...] = ()  # the reasons of the repeats that failed
    baseline: str | None = None  # what speedup is measured against, in words
    runs: tuple[Repeat, ...] = ()
    culprit: str | None = None  # who held up the others, and why, in words; None: nobody stood out
    remedy: str | None = None  # what to do about the culprit, with the gain
    ranks: tuple[RankTimes, ...] = ()  # means over the repeats

    @property
    def label(self) -> str:
        """Exchange and workers in two words, such as ``ring on 4``."""
        return f"{self.exchange} on {self.workers}"

    @property
    def efficiency_ci95(self) -> float | None:
        """Half the width of the efficiency's interval: the speed-up's, over as many workers."""
        return None if self.speedup_ci95 is None else self.speedup_ci95 / self.workers

    @property
    def bus_bytes_per_s(self) -> float | None:
        """The bus bandwidth of an allreduce, at least: bytes a second of each worker's port.

        2(N - 1)/N of the gradients' bytes (NCCL tests, PERFORMANCE.md) over the time of backward,
        in which they are exchanged. None for one worker, servers, and no exchange.
        """
        if self.workers < 2 or not self.gradient_bytes or not self.backward_s:
            return None
        if self.exchange == "none" or self.servers is not None:
            return None
        return 2 * (self.workers - 1) / self.workers * self.gradient_bytes / self.backward_s

    @property
    def rates(self) -> list[float]:
        """Samples per second of each finished repeat."""
        return [run.samples_per_s for run in self.runs]

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        facts = cls._known(value)
        for name in ("outliers", "failures"):
            facts[name] = tuple(facts.get(name, ()))
        # Without runs this is no row: the KeyError tells ``read_report`` so.
        facts["runs"] = tuple(Repeat.from_json(run) for run in facts["runs"])
        facts["ranks"] = tuple(RankTimes.from_json(rank) for rank in facts.get("ranks", ()))
        if facts.get("servers"):
            facts["servers"] = ServerCounts.from_json(facts["servers"])
        return cls(**facts)


@dataclasses.dataclass(frozen=True)
class Loss(_Fields):
    """The time that a cell of several workers loses in a step, split by cause."""

    config: str
    exchange: str
    workers: int
    variant: Variant
    repeats: int  # of the least measured of the runs that the split rests on
    step_s: float  # seconds a step, by throughput: the batch over samples/s
    ideal_s: float  # seconds a step, if the workers divided one worker's work and lost nothing
    loss_s: float  # step_s - ideal_s
    efficiency: float
    efficiency_ci95: float | None
    causes: Mapping[str, float]  # cause -> seconds a step; negative: it gains time
    lead_ci95: float | None  # of the seconds by which the largest cause leads the second
    limiter: str | None  # the cause that costs most; None: the measurements do not tell
    finding: str  # the same for people, or why none can be named
    advice: str = ""  # what to change, with the gain, or what to do first; empty: not known

    @property
    def sentence(self) -> str:
        """Finding and advice."""
        return " ".join(filter(None, [self.finding, self.advice]))

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        # Reports of earlier versions have one sentence for both.
        return cls(**{"finding": value.get("sentence", "")} | cls._known(value))

    @property
    def label(self) -> str:
        """Exchange and workers in two words, such as ``ring on 4``."""
        return f"{self.exchange} on {self.workers}"


@dataclasses.dataclass(frozen=True)
class Convergence(_Fields):
    """The samples that a row needed to the target accuracy, beside those of its reference.

    A change of speed leaves the samples as they are. A row that needs clearly fewer trains
    something else, so its time to accuracy is no result of scaling.
    """

    config: str
    exchange: str
    workers: int
    batch_size: int  # of all workers together
    variant: Variant
    samples: float  # mean over the repeats
    samples_ci95: float | None
    reference: str  # whose samples it is held against, in words
    reference_samples: float
    reference_ci95: float | None
    is_too_fast: bool  # whether it needed fewer samples than the reference allows

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        return cls(**cls._known(value))

    @property
    def label(self) -> str:
        """Exchange and workers in two words, such as ``ring on 4``."""
        return f"{self.exchange} on {self.workers}"


@dataclasses.dataclass(frozen=True)
class BatchPoint(_Fields):
    """How long one worker computes on a sample at one batch size."""

    config: str
    variant: Variant  # without batch_size
    batch_size: int
    sample_s: float  # seconds of forward and backward a sample
    efficiency: float  # sample_s of the largest batch size over this one's


@dataclasses.dataclass(frozen=True)
class Prediction(_Fields):
    """Measured and predicted seconds of a step of one row."""

    exchange: str
    workers: int
    measured_s: float
    predicted_s: float
    in_fit: bool  # whether the model was calibrated on this row, so that it cannot test the model
    low_s: float | None = None  # of the 95 % interval of a step that is going to be measured
    high_s: float | None = None

    @property
    def error(self) -> float:
        """By which part the prediction is too long (positive) or too short (negative)."""
        return self.predicted_s / self.measured_s - 1

    @property
    def interval_s(self) -> tuple[float, float] | None:
        """The interval, if it says something: it spans less than a decade."""
        if self.low_s is None or self.high_s is None or self.high_s >= 10 * self.low_s:
            return None
        return self.low_s, self.high_s


@dataclasses.dataclass(frozen=True)
class ReportHeader(_Fields):
    """Where, how and of what a report was measured. Fields that are None are left out of its JSON.

    The fields up to ``commit`` are those of ``run.environment``. ``sweep`` adds those up to
    ``source`` when it begins; ``explain.report`` adds the rest.
    """

    host: str | None = None
    os: str | None = None
    processor: str | None = None
    cores: int | None = None  # that the measuring process may use
    memory_bytes: int | None = None
    python: str | None = None
    versions: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    commit: str | None = None  # all that were measured, separated by commas
    created: str | None = None  # UTC
    mode: str | None = None  # strong or weak; None: this is not the header of a report
    repeats: int = 0  # that were asked for
    note: str | None = None
    threads_per_worker: int | None = None
    bound_to_cores: bool | None = None
    launcher: str | None = None
    settings: tuple[str, ...] | None = None  # KEY=VALUE of every cell
    vary: Mapping[str, list[Scalar]] | None = None  # key -> its values
    config: Mapping[str, str] = dataclasses.field(default_factory=dict)  # stem -> text of the file
    argv: str | None = None  # the command that measured
    turns: str | None = None  # equal in the two reports whose runs took turns
    source: str | None = None  # whose runs these were, of two that took turns: a commit, a folder
    load_average: float | None = None  # of five minutes, when measuring began
    runs_planned: int | None = None
    runs_missing: int | None = None  # neither finished nor failed
    used_by_others: float | None = None  # mean share of the cores, 0 to 1, of other processes
    busy: str | None = None  # a sentence where others used a considerable part
    baseline: str | None = None  # of the speed-ups, in words
    emulated: bool | None = None
    emulation: tuple[str, ...] | None = None  # what was emulated, in words
    devices: tuple[str, ...] | None = None  # names of the GPUs
    reference_samples: tuple[float, ...] | None = None  # to the target, of reference runs elsewhere
    calibrated_on: str | None = None  # the rows that the predictions' model was fitted to

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        facts = cls._known(value)
        for name in ("settings", "emulation", "devices", "reference_samples"):
            if facts.get(name) is not None:
                facts[name] = tuple(facts[name])
        return cls(**facts)

    def to_json(self) -> dict[str, Any]:
        # A null commit stays: it says that the measured code cannot be traced.
        always = ["commit"]
        if self.used_by_others is not None:
            always.append("busy")  # null: it is known that the machine was quiet
        items = super().to_json().items()
        return {key: value for key, value in items if value is not None or key in always}


@dataclasses.dataclass(frozen=True)
class Report(_Fields):
    """Everything that ``report.json`` holds."""

    version: int  # of the format
    header: ReportHeader
    summary: str  # its first sentences
    rows: tuple[Row, ...]  # a cell each
    losses: tuple[Loss, ...] = ()  # of rows of several workers whose references were measured
    references: tuple[Row, ...] = ()  # short runs that only the losses need
    batches: tuple[BatchPoint, ...] = ()
    predictions: tuple[Prediction, ...] = ()
    loss_reached: float | None = None  # the lowest training loss that every run reached
    convergence: tuple[Convergence, ...] = ()  # of rows that have a reference

    @property
    def has_variants(self) -> bool:
        """Whether rows are of several configs or variants, so that a table has to name them."""
        return len({(row.config, str(row.variant)) for row in self.rows}) > 1

    def hosts(self, row: Row) -> Counter[str]:
        """Return how many workers of a row ran on each host; empty if that is not known."""
        if self.header.launcher == "local":
            return Counter({self.header.host or "": row.workers})
        return Counter(rank.host for rank in row.ranks if rank.host)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Return the report that ``to_json`` wrote.

        Raises:
            KeyError, TypeError: the value is no report.
        """
        return cls(
            version=value.get("version", 0),
            header=ReportHeader.from_json(value["header"]),
            summary=value.get("summary", ""),
            rows=tuple(Row.from_json(row) for row in value["rows"]),
            losses=tuple(Loss.from_json(loss) for loss in value.get("losses", ())),
            references=tuple(Row.from_json(row) for row in value.get("references", ())),
            batches=tuple(BatchPoint.from_json(point) for point in value.get("batches", ())),
            predictions=tuple(Prediction.from_json(p) for p in value.get("predictions", ())),
            loss_reached=value.get("loss_reached"),
            convergence=tuple(Convergence.from_json(c) for c in value.get("convergence", ())),
        )


@dataclasses.dataclass(frozen=True)
class Span:
    """Something that took time on one rank."""

    name: str
    began_s: float  # of the trace's clock
    seconds: float
    facts: Mapping[str, Scalar] = dataclasses.field(default_factory=dict)  # shown beside it

    @property
    def ended_s(self) -> float:
        return self.began_s + self.seconds

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> tuple[str, Self]:
        """Return the kind of a recorded span (``run.spans``), and the span in unix time."""
        known = ("kind", "name", "began", "s")
        facts = {key: fact for key, fact in value.items() if key not in known}
        return value["kind"], cls(value["name"], value["began"], value["s"], facts)

    def to_json(self) -> dict[str, Any]:
        """Return a complete event of a Chrome trace, in microseconds."""
        return {
            "name": self.name,
            "ph": "X",
            "ts": 1e6 * self.began_s,
            "dur": 1e6 * self.seconds,
            "args": dict(self.facts),
        }


@dataclasses.dataclass(frozen=True)
class TraceRow:
    """One line of a trace. Its spans do not overlap."""

    rank: int
    name: str
    spans: tuple[Span, ...]


@dataclasses.dataclass(frozen=True)
class Trace:
    """The rows of all ranks, those of one rank together."""

    rows: tuple[TraceRow, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the trace as Chrome reads it: a process a rank, a thread a row."""
        events: list[dict[str, Any]] = []
        threads: Counter[int] = Counter()
        for row in self.rows:
            # The first row of a rank also names its process.
            if row.rank not in threads:
                events.append(_name_event("process_name", f"rank {row.rank}", row.rank))
            place = {"pid": row.rank, "tid": threads[row.rank]}
            threads[row.rank] += 1
            events.append(_name_event("thread_name", row.name, **place))
            events += [span.to_json() | place for span in row.spans]
        return {"traceEvents": events, "displayTimeUnit": "ms"}


def _name_event(kind: str, name: str, pid: int, tid: int | None = None) -> dict[str, Any]:
    """Return the event of a Chrome trace that names a process or a thread."""
    thread = {} if tid is None else {"tid": tid}
    return {"name": kind, "ph": "M", "pid": pid, **thread, "args": {"name": name}}


def _plain(value: Any) -> Any:
    if isinstance(value, _Fields):
        return value.to_json()
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value

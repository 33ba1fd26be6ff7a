"""The files of a run directory: the only place that spells their names.

A run directory belongs to one job. On several hosts it lies on a file system that all of them
share.
Every file has one writer; readers must expect that a file is missing or, unless it is written
atomically (``run.atomic``), cut off.

>>> RunDir(Path("runs/digits")).records(0)
PosixPath('runs/digits/rank-0.jsonl')
"""

import json
import re
from pathlib import Path

from scaletrain.run.atomic import partial_name


class RunDir:
    """The paths of one run directory. Making one touches no file.

    Args:
        path: the directory, absolute or relative to the working directory.
    """

    def __init__(self, path: Path):
        self.path = path

    # Written by the command that starts the job.

    @property
    def config(self) -> Path:
        """The resolved configuration. Every worker reads it, and so does every report."""
        return self.path / "config.yaml"

    @property
    def in_use(self) -> Path:
        """Locked while a job runs here (``run.claim``). It names the process that runs it."""
        return self.path / ".in_use"

    @property
    def save_request(self) -> Path:
        """There if somebody wants a checkpoint now. Anybody may make it; rank 0 removes it."""
        return self.path / "save_now"

    # Written by workers.

    def header(self, rank: int) -> Path:
        """Facts about one worker, written at its start. Read by the progress bar and reports."""
        return self.path / f"rank-{rank}.json"

    def records(self, rank: int) -> Path:
        """One line of JSON a step (``run.records``). Read by the progress bar and reports."""
        return self.path / f"rank-{rank}.jsonl"

    def all_records(self) -> list[Path]:
        """Return the records files that exist, in the order of their ranks."""
        return [path for _, path in self._numbered("rank-*.jsonl")]

    @property
    def evaluations(self) -> Path:
        """One line of JSON an evaluation: ``step`` and its figures. Written by rank 0."""
        return self.path / "evaluations.jsonl"

    def spans(self, rank: int) -> Path:
        """Buckets, rounds and waits of one worker (``run.spans``). Read for Chrome traces."""
        return self.path / f"spans-{rank}.jsonl"

    def links(self, rank: int) -> Path:
        """The kernel's counts of one worker's TCP connections, once a second (``run.links``)."""
        return self.path / f"links-{rank}.jsonl"

    @property
    def summary(self) -> Path:
        """The result of the run, written by rank 0 at its end. Read by reports and by resumes."""
        return self.path / "summary.json"

    def tracker(self, name: str) -> Path:
        """A tracker's own files, such as event files. Written by rank 0."""
        return self.path / f"tracker-{name}"

    def tracker_id(self, name: str) -> Path:
        """The run's identifier in a tracker, with which a resumed run goes on. By rank 0."""
        return self.path / f"tracker-{name}.id"

    def prometheus(self, rank: int) -> Path:
        """How one worker is doing, for node_exporter. Written anew every second or so."""
        return self.path / f"metrics-{rank}.prom"

    def profile(self, rank: int) -> Path:
        """A Chrome trace of some steps of one worker, by torch.profiler. Read by people."""
        return self.path / f"profile-{rank}.json.gz"

    def checkpoint(self, step: int) -> Path:
        """Weights and optimizer state after ``step`` steps, written by rank 0."""
        return self.path / f"step-{step}.safetensors"

    def checkpoints(self) -> list[tuple[int, Path]]:
        """Return (step, path) of every checkpoint that exists, the oldest step first."""
        return self._numbered("step-*.safetensors")

    def group(self, number: int) -> Path:
        """Where a group of workers keeps the checkpoints of its model; group 0: here."""
        return self.path / f"group-{number}" if number else self.path

    def best_checkpoint(self, step: int) -> Path:
        """The checkpoint with the best figure so far, reached after ``step`` steps."""
        return self.path / f"best-{step}.safetensors"

    def best_checkpoints(self) -> list[tuple[int, Path]]:
        """Return (step, path) of the best checkpoint; of two, if a kill came between them."""
        return self._numbered("best-*.safetensors")

    def partial_checkpoints(self) -> list[Path]:
        """Return the checkpoints that a kill cut short. Only a worker that writes them looks."""
        partial = re.escape(partial_name("STEP", "PID"))
        name = r"(?:step|best)-\d+\.safetensors"
        partial = partial.replace("STEP", name).replace("PID", r"\d+")
        pattern = partial_name("*.safetensors", "*")
        return sorted(path for path in self.path.glob(pattern) if re.fullmatch(partial, path.name))

    def progress(self, rank: int) -> Path:
        """How far one worker is, overwritten in place. Read by the supervisor."""
        return self.path / f"progress-{rank}.json"

    def all_progress(self) -> list[tuple[int, Path]]:
        """Return (rank, path) of every progress file that exists, in the order of the ranks."""
        return self._numbered("progress-*.json")

    def failure(self, rank: int) -> Path:
        """The failure that one worker reports, written once. Read by the supervisor."""
        return self.path / f"failure-{rank}.json"

    def all_failures(self) -> list[tuple[int, Path]]:
        """Return (rank, path) of every reported failure, in the order of the ranks."""
        return self._numbered("failure-*.json")

    def stacks(self, rank: int) -> Path:
        """The Python stacks of one worker, written on request. Read by the supervisor."""
        return self.path / f"stacks-{rank}.txt"

    def collectives(self, rank: int) -> Path:
        """The last collectives of one worker, a ring in shared memory (``run.flight``)."""
        return self.path / f"collectives-{rank}.ring"

    @property
    def rendezvous(self) -> Path:
        """Where rank 0 serves the store, if no launcher says so. Read by the other ranks."""
        return self.path / "rendezvous.json"

    # Written by the supervisor.

    @property
    def first_cause(self) -> Path:
        """The first cause of the job's failure. Read by people and by sweeps."""
        return self.path / "failure.json"

    @property
    def flight(self) -> Path:
        """Collectives of all ranks after a failure, for torchfrtrace. Read by torch alone."""
        return self.path / "flight"

    def rank_log(self, rank: int) -> Path:
        """The newest output of one worker, both streams as they came. Read by people."""
        return self.path / "logs" / f"rank-{rank}.log"

    def process_log(self, name: str) -> Path:
        """The same of another process, such as a server or a launcher."""
        return self.path / "logs" / f"process-{name.replace(' ', '-')}.log"

    @staticmethod
    def older_log(log: Path) -> Path:
        """Return the file with the output before that in ``log``. Older output is not kept."""
        return log.with_name(f"{log.name}.1")

    # Written by parameter servers.

    def server_address(self, index: int) -> Path:
        """Where one server listens. Read by workers."""
        return self.path / f"server-{index}.address.json"

    def server_statistics(self, index: int) -> Path:
        """The counters of one server. Read by reports."""
        return self.path / f"server-{index}.json"

    def all_server_statistics(self) -> list[Path]:
        """Return the statistics files that exist, in the order of the servers."""
        return [path for _, path in self._numbered("server-*.json")]

    def server_links(self, index: int) -> Path:
        """The kernel's counts of one server's TCP connections, once a second (``run.links``)."""
        return self.path / f"links-server-{index}.jsonl"

    def all_server_links(self) -> list[tuple[int, Path]]:
        """Return (index, path) of every such file that exists, in the order of the servers."""
        return self._numbered("links-server-*.jsonl")

    def server_snapshot(self, index: int) -> Path:
        """Parameters and optimizer state of one server. Read by the server that replaces it."""
        return self.path / f"server-{index}.safetensors"

    @property
    def job_key(self) -> Path:
        """The job's key, readable by its owner alone (``run.job_key``)."""
        return self.path / ".job.key"

    @property
    def private(self) -> Path:
        """The directory of Unix sockets and of NCCL's store (``run.job_key``), mode 0700."""
        return self.path / ".private"

    # Written for emulated clusters.

    @property
    def rehearsal(self) -> "RehearsalDir":
        """The files of the emulated cluster that the workers run on."""
        return RehearsalDir(self.path / "rehearsal")

    @property
    def emulation(self) -> Path:
        """The emulated links, and the bytes that crossed each. Read by summaries and reports."""
        return self.path / "emulation.json"

    @property
    def compressed(self) -> Path:
        """The final weights, written by the callback ``compress``. Read by recipes and people."""
        return self.path / "compressed.safetensors"

    # Written for SLURM.

    @property
    def batch_script(self) -> Path:
        """The batch script of the job or array."""
        return self.path / "job.sbatch"

    def slurm_output(self, job: str) -> Path:
        """The output of a SLURM job; ``job`` is its number, or a pattern that SLURM fills in."""
        return self.path / f"slurm-{job}.out"

    def array_task(self, number: str) -> Path:
        """The run directory of one task of a job array; a number, or a variable of the shell."""
        return self.path / f"task-{number}"

    def torchrun_store(self, attempt: str) -> Path:
        """The file in which torchrun's agents meet."""
        return self.path / f"torchrun-{attempt}"

    # Written for Kubernetes.

    @property
    def manifest(self) -> Path:
        """The Job and its Service."""
        return self.path / "kubernetes.yaml"

    @property
    def pods(self) -> Path:
        """A directory with an empty file for each pod that has started, by job and number."""
        return self.path / ".pods"

    def pod_output(self, pod: str) -> Path:
        """The output of a pod, by its name. Written by kubectl, for the job's follower."""
        return self.path / f"pod-{pod}.log"

    # Questions about the run as a whole.

    def has_finished(self) -> bool:
        """Return True if the run has done all its steps, by its summary."""
        try:
            summary = json.loads(self.summary.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return bool(summary.get("finished", True))

    def _numbered(self, pattern: str) -> list[tuple[int, Path]]:
        """Return (number, path) of files like ``rank-3.jsonl``, the smallest number first."""
        before, _, after = pattern.partition("*")
        named = re.compile(re.escape(before) + r"(\d+)" + re.escape(after))
        numbered = []
        for path in self.path.glob(pattern):
            match = named.fullmatch(path.name)
            if match:
                numbered.append((int(match[1]), path))
        return sorted(numbered)


class RehearsalDir:
    """The directory ``rehearsal`` below a run directory."""

    def __init__(self, path: Path):
        self.path = path

    @property
    def settings(self) -> Path:
        """The cluster and the faults to play, written by the launcher."""
        return self.path / "settings.json"

    @property
    def cluster(self) -> Path:
        """How to enter each host, there while the cluster is up."""
        return self.path / "cluster.json"

    def slowdown(self, host: int) -> Path:
        """By which factor the emulated accelerators of a host are slowed down."""
        return self.path / f"slowdown-h{host}"

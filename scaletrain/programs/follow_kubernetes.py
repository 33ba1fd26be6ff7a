"""Create a job from its manifest and follow it to its end.

    python -m scaletrain.programs.follow_kubernetes MANIFEST [POLL_S] [--leave]

Shows the state of the pods and their output, which stays in the directory of the manifest. SIGINT
and SIGTERM delete the job. Its workers then write a checkpoint and end. Ends with the status of
the pod that failed first. With ``--leave`` it only creates the job.
"""

import contextlib
import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from scaletrain.launching.growing import GrowingOutput
from scaletrain.run.layout import RunDir
from scaletrain.units import plural

_SILENT_S = 120.0  # how long the cluster may be away: a job goes on without it
_ANSWER_S = 30.0  # how long one answer of the cluster may take
_DELETED_S = 120.0  # how long a finished job of the same name may take to go
_LAST_OUTPUT_S = 5.0  # how late the last output may come
_MOST_SHOWN = 16  # pods whose output is shown: each costs a process of kubectl
_INDEX = "batch.kubernetes.io/job-completion-index"
_FAILURES = "batch.kubernetes.io/job-index-failure-count"


@dataclass(frozen=True)
class Pod:
    """The facts that the cluster reports about a pod."""

    name: str
    index: int  # its number in the job
    phase: str  # Pending, Running, Succeeded, Failed or Unknown
    reason: str = ""  # why it waits or has failed; empty: unknown, or no reason is needed
    attempt: int = 0  # how many pods of this number have failed before it
    exit_code: int | None = None  # of its worker; None: it has not ended
    finished_at: str = ""  # as ISO 8601, which sorts by time

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Pod":
        """Read one item of ``kubectl get pods -o json``."""
        metadata = value["metadata"]
        annotations = metadata.get("annotations", {})
        status = value.get("status", {})
        reason = status.get("reason", "")
        exit_code = None
        finished_at = ""
        for condition in status.get("conditions", []):
            if condition["type"] == "PodScheduled" and condition["status"] != "True":
                reason = condition.get("message") or condition.get("reason", "")
        for container in status.get("containerStatuses", []):
            state = container.get("state", {})
            # The words of an image that cannot be pulled, and of a volume that is not there yet.
            reason = state.get("waiting", {}).get("reason", "") or reason
            ended = state.get("terminated")
            if ended:
                exit_code = ended["exitCode"]
                finished_at = ended.get("finishedAt") or ""
                reason = ended.get("reason", "") or reason
        return cls(
            name=metadata["name"],
            index=int(annotations.get(_INDEX, 0)),
            attempt=int(annotations.get(_FAILURES, 0)),
            phase=status.get("phase", "Pending"),
            reason="" if reason in ("Completed", "Error", "ContainerCreating") else reason,
            exit_code=exit_code,
            finished_at=finished_at,
        )

    @property
    def has_started(self) -> bool:
        """True once it has output to show."""
        return self.phase in ("Running", "Succeeded", "Failed")

    @property
    def has_failed(self) -> bool:
        """True if it has ended badly."""
        return self.phase == "Failed" or bool(self.exit_code)

    @property
    def status(self) -> int:
        """The exit status that stands for a pod that has failed."""
        if self.reason == "OOMKilled":
            return 137
        return self.exit_code or 1  # a pod that was evicted has no status


@dataclass(frozen=True)
class JobState:
    """The facts that the cluster reports about a job."""

    end: str = ""  # Complete or Failed; empty: it goes on
    reason: str = ""
    message: str = ""

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "JobState":
        """Read ``kubectl get job NAME -o json``."""
        for condition in value.get("status", {}).get("conditions", []):
            if condition["status"] == "True" and condition["type"] in ("Complete", "Failed"):
                return cls(
                    condition["type"], condition.get("reason", ""), condition.get("message", "")
                )
        return cls()

    def status(self, first_failed: Pod | None) -> int:
        """Return the exit status that this process takes from it.

        Args:
            first_failed: the pod that failed first; None: no failed pod was seen.
        """
        if self.end == "Complete":
            return 0
        if self.reason == "DeadlineExceeded":
            return 124  # as `timeout` has it
        return first_failed.status if first_failed else 1


class NotFound(Exception):
    """There is no such object in the cluster."""


class ClusterError(Exception):
    """kubectl failed, or the cluster does not answer. The text is its own."""


class Cluster:
    """The commands of kubectl on the objects of one manifest."""

    def __init__(self, manifest: Path):
        self.manifest = manifest
        objects = list(yaml.safe_load_all(manifest.read_text(encoding="utf-8")))
        job = next(value for value in objects if value["kind"] == "Job")
        self.job = job["metadata"]["name"]
        self.others = []  # the objects that belong to the job, as kubectl names them
        for value in objects:
            if value is not job:
                self.others.append(f"{value['kind'].lower()}/{value['metadata']['name']}")
        namespace = job["metadata"].get("namespace")
        self._kubectl = ["kubectl"]
        if namespace:
            self._kubectl.append(f"--namespace={namespace}")

    def command(self, *arguments: str) -> list[str]:
        """Return a command line of kubectl in the job's namespace."""
        return [*self._kubectl, *arguments]

    def _call(self, *arguments: str, limit_s: float = _ANSWER_S) -> str:
        """Return the output of kubectl."""
        try:
            done = subprocess.run(
                self.command(*arguments), capture_output=True, text=True, timeout=limit_s
            )
        except FileNotFoundError:
            raise ClusterError("kubectl was not found") from None
        except subprocess.TimeoutExpired:
            raise ClusterError(f"kubectl has not answered for {limit_s:.0f} s") from None
        if done.returncode == 0:
            return done.stdout
        error = " ".join(done.stderr.split())
        if "NotFound" in error:
            raise NotFound(error)
        raise ClusterError(error or f"kubectl ended with status {done.returncode}")

    def job_json(self) -> dict[str, Any]:
        """Return the job's object."""
        return json.loads(self._call("get", "job", self.job, "-o", "json"))

    def pods(self) -> list[Pod]:
        """Return the pods that the job has at present."""
        selector = f"--selector=app.kubernetes.io/instance={self.job}"
        items = json.loads(self._call("get", "pods", selector, "-o", "json"))["items"]
        return [Pod.from_json(item) for item in items]

    def create(self) -> None:
        """Create the objects. A job of the same name that has ended makes room.

        Raises:
            ClusterError: the cluster refuses them, or a job of the same name runs.
        """
        with contextlib.suppress(NotFound):
            if not JobState.from_json(self.job_json()).end:
                raise ClusterError(
                    f"job {self.job} runs already; choose another --run-dir, or stop it with"
                    f" `{' '.join(self.command('delete', 'job', self.job))}`"
                )
            self._call("delete", "job", self.job, "--cascade=foreground", limit_s=_DELETED_S)
        self._call("apply", f"--filename={self.manifest}")
        # The cluster removes them together with the job, at the latest when its time to live ends.
        owner = {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "name": self.job,
            "uid": self.job_json()["metadata"]["uid"],
        }
        patch = json.dumps({"metadata": {"ownerReferences": [owner]}})
        for name in self.others:
            self._call("patch", name, "--type=merge", f"--patch={patch}")

    def delete(self) -> None:
        """Tell the cluster to stop the pods, and to forget the job once they have ended."""
        self._call("delete", "job", self.job, "--cascade=foreground", "--wait=false")


class PodOutput:
    """The output of a pod: kubectl writes it into a file, from which it is shown."""

    def __init__(self, cluster: Cluster, pod: str, output: GrowingOutput):
        self._argv = cluster.command("logs", "--follow", "--container=worker", pod)
        self._output = output
        self._writer = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        # From the beginning: lines that were shown already are passed over.
        with open(self._output.path, "wb") as file:
            return subprocess.Popen(
                self._argv, stdout=file, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL
            )

    def show(self, pod_runs: bool) -> None:
        """Print the latest output. A connection that broke while the pod runs is made again."""
        if pod_runs and self._writer.poll() is not None:
            self._writer = self._start()
        self._output.show(whole_lines=True)

    def finish(self, seconds: float) -> None:
        """Print the rest, which may take up to this many seconds to come."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._writer.wait(seconds)
        self._writer.kill()
        self._writer.wait()
        self._output.show(whole_lines=False)


class KubernetesFollower:
    """Creates a job and follows it."""

    def __init__(self, manifest: Path, poll_s: float):
        self.cluster = Cluster(manifest)
        self.poll_s = poll_s
        self.run_dir = RunDir(manifest.parent)
        self.pods: dict[str, Pod] = {}  # by name, all that were seen
        self.outputs: dict[str, PodOutput] = {}  # by the name of the pod
        self.is_deleted = False  # by us
        # Signals not answered yet. The handler appends to it; the loop of ``run`` empties it.
        self.signals: list[int] = []
        self._line = ""  # the last line about the pods

    def run(self) -> int:
        """Create the job, follow it to its end, and return the exit status."""
        # A signal that comes while the job is being created waits until there is one to delete.
        for caught in (signal.SIGINT, signal.SIGTERM):
            signal.signal(caught, lambda number, frame: self.signals.append(number))
        self.cluster.create()
        print(
            f"created job {self.cluster.job}; its output is kept in {self.run_dir.path}", flush=True
        )
        answered_at = time.monotonic()
        while True:
            try:
                self._answer_signals()
                state = JobState.from_json(self.cluster.job_json())
                self._see(self.cluster.pods())
                answered_at = time.monotonic()
            except NotFound:
                return self._finish_deleted()
            except ClusterError as error:
                # The job is not deleted: it may be doing well.
                if time.monotonic() - answered_at > _SILENT_S:
                    _print_error(f"job {self.cluster.job}: {error}; the job may run on")
                    return 1
                time.sleep(self.poll_s)
                continue
            for name, output in self.outputs.items():
                output.show(self.pods[name].phase == "Running")
            if state.end:
                return self._finish(state)
            time.sleep(self.poll_s)

    def _see(self, pods: list[Pod]) -> None:
        """Note the pods, print how many of them run, and begin to show the output of new ones."""
        for pod in pods:
            self.pods[pod.name] = pod
            if pod.has_started and pod.name not in self.outputs and pod.index < _MOST_SHOWN:
                self._show(pod)
        line = _summary(pods)
        if line != self._line:
            self._line = line
            print(f"job {self.cluster.job}: {line}", flush=True)

    def _show(self, pod: Pod) -> PodOutput:
        path = self.run_dir.pod_output(pod.name)
        output = PodOutput(self.cluster, pod.name, GrowingOutput(path, f"[pod {pod.index}] "))
        self.outputs[pod.name] = output
        return output

    def _first_failed(self) -> Pod | None:
        """Return the pod of the last attempt that failed first, by the clocks of the nodes."""
        failed = [pod for pod in self.pods.values() if pod.has_failed]
        last_attempt = max((pod.attempt for pod in failed), default=0)
        failed = [pod for pod in failed if pod.attempt == last_attempt]
        # A pod without a time was evicted; the others failed because of that.
        return min(failed, key=lambda pod: (pod.finished_at, pod.index), default=None)

    def _finish(self, state: JobState) -> int:
        """Show the last output and how the job has ended; return the exit status."""
        first = self._first_failed()
        if state.end == "Failed" and first and first.name not in self.outputs:
            self._show(first)
        self._end_outputs()
        status = state.status(first)
        if status == 0:
            print(f"job {self.cluster.job}: complete", flush=True)
            return 0
        why = ": ".join(part for part in (state.reason, state.message) if part)
        print(f"job {self.cluster.job}: failed ({why})", flush=True)
        if first:
            how = f"status {first.exit_code}" if first.exit_code is not None else "no status"
            reason = f" ({first.reason})" if first.reason else ""
            path = self.run_dir.pod_output(first.name)
            _print_error(
                f"pod {first.name} failed first: {how}{reason}; its output is kept in {path}"
            )
        return status

    def _finish_deleted(self) -> int:
        self._end_outputs()
        by_whom = "" if self.is_deleted else " by somebody else"
        print(f"job {self.cluster.job}: deleted{by_whom}", flush=True)
        return 130  # as a shell has it for Ctrl-C

    def _end_outputs(self) -> None:
        until = time.monotonic() + _LAST_OUTPUT_S
        for output in self.outputs.values():
            output.finish(max(0.0, until - time.monotonic()))

    def _answer_signals(self) -> None:
        if self.signals and not self.is_deleted:
            self.cluster.delete()
            self.is_deleted = True
            print(f"job {self.cluster.job}: being deleted", flush=True)
        self.signals.clear()


def _summary(pods: list[Pod]) -> str:
    """Return how many pods are in which phase, and why the first of those that wait does."""
    counts: dict[str, int] = {}
    reasons: dict[str, str] = {}
    for pod in sorted(pods, key=lambda pod: pod.index):
        phase = pod.phase.lower()
        counts[phase] = counts.get(phase, 0) + 1
        if pod.reason:
            reasons.setdefault(phase, pod.reason)
    parts = []
    for phase, count in counts.items():
        reason = f" ({reasons[phase]})" if phase in reasons else ""
        parts.append(f"{plural(count, 'pod')} {phase}{reason}")
    return ", ".join(parts) or "no pods yet"


def main(manifest: Path, poll_s: float, leave: bool) -> int:
    """Create the job; follow it, unless it is to be left alone."""
    follower = KubernetesFollower(manifest, poll_s)
    try:
        if not leave:
            return follower.run()
        follower.cluster.create()
    except (ClusterError, NotFound) as error:
        _print_error(f"scaletrain: error: launcher: {error}")
        _print_error(
            "scaletrain: does `kubectl auth can-i create jobs` say yes here?"
            " `kubectl config current-context` shows the cluster"
        )
        return 2
    job = follower.cluster.job
    delete = " ".join(follower.cluster.command("delete", "job", job))
    print(f"created job {job}; `{delete}` stops it")
    return 0


def _print_error(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if argument != "--leave"]
    poll_s = float(arguments[1]) if len(arguments) > 1 else 1.0
    sys.exit(main(Path(arguments[0]), poll_s, "--leave" in sys.argv))

"""Kubernetes: creates an indexed Job with a headless Service, and follows it."""

import hashlib
import json
import re
import shlex
import shutil
from pathlib import Path, PurePath, PurePosixPath
from typing import Annotated, Any, NamedTuple

import jinja2
from annotated_types import Ge

from scaletrain.errors import UserError
from scaletrain.launching.job import Job, Program, under_python
from scaletrain.launching.plan import Command, LaunchPlan
from scaletrain.run.layout import RunDir
from scaletrain.units import plural


class KubernetesOptions(NamedTuple):
    """The options that people set under ``launcher:``, in the order in which they are listed."""

    container: str = ""
    """The image of the workers. It holds scaletrain, and the script if there is one."""

    container_python: str = "python3"
    """Python in the image."""

    container_workdir: str = ""
    """The working directory in the image; by default the image's own."""

    namespace: str = ""
    """By default that of kubectl's context."""

    workers_per_pod: Annotated[int, Ge(1)] = 1
    """More than one: torchrun starts the workers of each pod."""

    cpus_per_worker: Annotated[int, Ge(1)] | None = None
    """Cores, and threads, of a worker; by default those of the job, else 1."""

    gpus_per_worker: Annotated[int, Ge(0)] = 0
    gpu_resource: str = "nvidia.com/gpu"
    """What the cluster calls its GPUs."""

    mem: str = ""
    """Memory of a pod, such as ``64Gi``."""

    shm: str = "2Gi"
    """Size of /dev/shm, which counts as the pod's memory; empty: what the runtime gives (64 MB)."""

    run_claim: str = ""
    """The volume claim that holds run directories, mounted at /runs in all pods."""

    volumes: dict = {}  # noqa: RUF012 (never changed)
    """Further volume claims, each with the path where it is mounted: ``{datasets: /data}``."""

    env: dict = {}  # noqa: RUF012 (never changed)
    """Variables of the workers."""

    secrets: dict = {}  # noqa: RUF012 (never changed)
    """Variables whose values are in the cluster: ``{HF_TOKEN: name-of-secret/key}``."""

    service_account: str = ""
    node_selector: dict = {}  # noqa: RUF012 (never changed)
    tolerations: list = []  # noqa: RUF012 (never changed)
    """As in a pod's specification: ``[{key: gpu, operator: Exists}]``."""

    labels: dict = {}  # noqa: RUF012 (never changed)
    """Further labels of the job and its pods, such as ``kueue.x-k8s.io/queue-name``."""

    restarts: Annotated[int, Ge(0)] | None = None
    """How often all pods start again after a failure; by default 3 when training, else never."""

    time_limit_min: Annotated[int, Ge(1)] | None = None
    """The job's time limit; by default it has none."""

    grace_s: Annotated[int, Ge(30)] = 90
    """From SIGTERM to SIGKILL: the time for a checkpoint when a pod is moved or the job deleted."""

    ttl_s: Annotated[int, Ge(0)] = 86400
    """How long the cluster keeps the job after its end."""

    follow: bool = True
    """Show the job's output until its end; false creates it and leaves."""

    poll_s: float = 1.0
    """How often to look at the job."""


OPTIONS = KubernetesOptions  # ``plugins.options`` reads the options from this line

_RUNS = PurePosixPath("/runs")  # where pods have the run directories
_CONFIG = PurePosixPath("/scaletrain")  # where pods have the configuration that came with the job
# Rank 0's port. It is free, since every pod has its own network.
_PORT = 29500
_RESTARTS = 3  # of a training job, unless the user says otherwise
# A pod's name is the job's, its number and five letters, 63 characters at most.
_LONGEST_NAME = 50


def plan(job: Job, **options: Any) -> LaunchPlan:
    """Create one Job with numbered pods, and a Service by which they find the first.

    Args:
        job: the job to plan.
        options: the fields of ``KubernetesOptions``.
    """
    chosen = KubernetesOptions(**options)
    _check(chosen, job)
    path = RunDir(job.run_dir).manifest
    argv = Program.FOLLOW_KUBERNETES.command(path, f"{chosen.poll_s:g}")
    if not chosen.follow:
        argv = (*argv, "--leave")
    # Pods that are started again start their workers again: only the follower's end is the end of
    # the job. It has to ask the cluster to delete the job first.
    follower = Command("kubernetes", argv, restarts_workers=True, stop_s=15.0)
    missing = ""
    if shutil.which("kubectl") is None:
        missing = (
            "launcher: kubectl was not found; install it, or print the manifest with --dry-run and"
            " give it to `kubectl apply -f -` where there is one"
        )
    return LaunchPlan(
        (follower,),
        files=((path, _manifest(chosen, job)),),
        explain=tuple(_explain(chosen, job)),
        missing=missing,
        in_containers=True,
    )


def _check(options: KubernetesOptions, job: Job) -> None:
    if not options.container:
        raise UserError(
            "launcher.container: is missing; name the image of the workers, such as"
            " registry.example/scaletrain:cuda (docs/containers.md builds one)"
        )
    if job.workers % options.workers_per_pod:
        raise UserError(
            f"launcher.workers_per_pod: {job.workers} workers do not fill pods of"
            f" {options.workers_per_pod}"
        )
    if job.trains and not options.run_claim:
        raise UserError(
            "launcher.run_claim: is missing; records and checkpoints need a volume claim that all"
            " pods can write to (kubectl get pvc)"
        )
    if job.companions:
        raise UserError(
            "exchange.placement: 'dedicated' is not allowed with kubernetes, which starts workers"
            " only (allowed: beside, auto)"
        )
    for variable, place in options.secrets.items():
        if not re.fullmatch(r"[^/]+/[^/]+", str(place)):
            raise UserError(
                f"launcher.secrets.{variable}: {place!r} is not allowed"
                " (allowed: NAME/KEY of a secret in the cluster)"
            )
    for claim, path in options.volumes.items():
        if not str(path).startswith("/"):
            raise UserError(
                f"launcher.volumes.{claim}: {path!r} is not allowed (allowed: an absolute path)"
            )


def _explain(options: KubernetesOptions, job: Job) -> list[str]:
    threads = _threads(options, job)
    pods = plural(_num_pods(options, job), "pod")
    each = "1 core and thread" if threads == 1 else f"{threads} cores and threads"
    lines = [f"{plural(job.workers, 'worker')} in {pods}, {each} each"]
    if options.run_claim:
        lines.append(f"the run directory in the pods is {_run_dir(job)}, on {options.run_claim}")
    if options.follow:
        lines.append(
            "the last command creates the job with kubectl, shows its output,"
            " and deletes it when interrupted"
        )
    return lines


def _num_pods(options: KubernetesOptions, job: Job) -> int:
    return job.workers // options.workers_per_pod


def _threads(options: KubernetesOptions, job: Job) -> int:
    """Return the threads, and cores, of one worker."""
    return options.cpus_per_worker or job.threads or 1


def _run_dir(job: Job) -> PurePosixPath:
    """Return the run directory as the pods know it."""
    return _RUNS / job.run_dir.name


def job_name(run_dir: Path) -> str:
    """Return the job's name in the cluster: a DNS label that says which run it is.

    >>> job_name(Path("runs/Digits_1"))
    'scaletrain-digits-1'
    """
    name = re.sub("[^a-z0-9]+", "-", f"scaletrain-{run_dir.name}".lower()).strip("-")
    if len(name) <= _LONGEST_NAME:
        return name
    # Names that differ at their ends only stay different.
    digest = hashlib.sha256(run_dir.name.encode()).hexdigest()[:8]
    return f"{name[: _LONGEST_NAME - 9].rstrip('-')}-{digest}"


# The manifest. Its names and numbers are filled in; a value that is quoted is JSON, which is YAML.
#
# - The Service gives the pods their names, also before they are ready: NAME-0.NAME is rank 0's.
# - Workers of one job fail together. So each pod may fail as often as the job may start again, and
#   the first pod that fails once more ends the job (maxFailedIndexes).
# - Status 2 is a person's mistake, which another attempt repeats. 143 and 138 say that a signal has
#   stopped the workers in good order: that is no failure, and neither is a node that is emptied.
# - With a shared process namespace no worker is process 1, which would ignore signals.
_MANIFEST = """\
{% set metadata %}
metadata:
  name: {{ name }}
{% if options.namespace %}
  namespace: {{ options.namespace }}
{% endif %}
  labels: {{ labels | quoted }}
{% endset %}
{% if job.config %}
apiVersion: v1
kind: ConfigMap
{{ metadata | trim }}
data:
  {{ config_name }}: |
    {{ job.config.rstrip() | indent(4) }}
---
{% endif %}
apiVersion: v1
kind: Service
{{ metadata | trim }}
spec:
  clusterIP: None
  publishNotReadyAddresses: true
  selector: {app.kubernetes.io/instance: {{ name }}}
---
apiVersion: batch/v1
kind: Job
{{ metadata | trim }}
spec:
  completionMode: Indexed
  completions: {{ num_pods }}
  parallelism: {{ num_pods }}
  backoffLimitPerIndex: {{ restarts }}
  maxFailedIndexes: 0
{% if options.time_limit_min %}
  activeDeadlineSeconds: {{ options.time_limit_min * 60 }}
{% endif %}
  ttlSecondsAfterFinished: {{ options.ttl_s }}
  podFailurePolicy:
    rules:
    - action: FailJob
      onExitCodes: {containerName: worker, operator: In, values: [2]}
    - action: Ignore
      onExitCodes: {containerName: worker, operator: In, values: [138, 143]}
    - action: Ignore
      onPodConditions: [{type: DisruptionTarget, status: "True"}]
  template:
    metadata:
      labels: {{ labels | quoted }}
    spec:
      subdomain: {{ name }}
      restartPolicy: Never
      shareProcessNamespace: true
      terminationGracePeriodSeconds: {{ options.grace_s }}
{% if options.service_account %}
      serviceAccountName: {{ options.service_account | quoted }}
{% endif %}
{% if options.node_selector %}
      nodeSelector: {{ options.node_selector | texts | quoted }}
{% endif %}
{% if options.tolerations %}
      tolerations: {{ options.tolerations | quoted }}
{% endif %}
      containers:
      - name: worker
        image: {{ options.container | quoted }}
{% if options.container_workdir %}
        workingDir: {{ options.container_workdir | quoted }}
{% endif %}
        command:
        - sh
        - -c
        - |
          {{ script | indent(10) }}
        env:
{% for variable, value in variables.items() %}
        - {name: {{ variable }}, value: {{ value | quoted }}}
{% endfor %}
{% for variable, field in fields.items() %}
        - name: {{ variable }}
          valueFrom: {fieldRef: {fieldPath: "metadata.{{ field }}"}}
{% endfor %}
{% for variable, place in options.secrets.items() %}
        - name: {{ variable }}
          valueFrom: {secretKeyRef: {name: {{ place.split("/")[0] | quoted }}, key: {{ place.split("/")[1] | quoted }}}}
{% endfor %}
        resources: {{ resources | quoted }}
        volumeMounts:
{% for volume in volumes %}
        - {name: {{ volume.name }}, mountPath: {{ volume.path | quoted }}}
{% endfor %}
      volumes:
{% for volume in volumes %}
      - {name: {{ volume.name }}, {{ volume.source }}}
{% endfor %}
"""


class _Volume(NamedTuple):
    """A volume of a pod: its name there, where it is mounted, and its source as YAML."""

    name: str
    path: str
    source: str


def _manifest(options: KubernetesOptions, job: Job) -> str:
    """Return the manifest: the configuration, the Service and the Job."""
    name = job_name(job.run_dir)
    restarts = options.restarts
    if restarts is None:
        restarts = _RESTARTS if job.trains else 0
    labels = {"app.kubernetes.io/name": "scaletrain", "app.kubernetes.io/instance": name}
    environment = jinja2.Environment(
        trim_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["quoted"] = json.dumps
    environment.filters["texts"] = _texts
    return environment.from_string(_MANIFEST).render(
        job=job,
        options=options,
        name=name,
        labels=labels | _texts(options.labels),
        num_pods=_num_pods(options, job),
        restarts=restarts,
        config_name=RunDir(job.run_dir).config.name,
        script=_script(options, job, name),
        variables=_variables(options, job, name),
        fields=_fields(options, job),
        resources=_resources(options, job),
        volumes=_volumes(options, job, name),
    )


def _texts(values: dict[str, Any]) -> dict[str, str]:
    """Return values as texts, which labels and variables have to be: YAML reads 1 as a number."""
    return {key: str(value) for key, value in values.items()}


def _script(options: KubernetesOptions, job: Job, name: str) -> str:
    """Return the shell script that is the command of every pod."""
    job = job._replace(run_dir=Path(_run_dir(job)))
    run_dir = RunDir(job.run_dir)
    lines = []
    if options.run_claim:
        lines.append(f"mkdir -p {_word(run_dir.pods)}")
    if job.config:
        target = _word(run_dir.config)
        # Renamed into place: other pods read it while this one writes.
        partial = f'{target}."$HOSTNAME"'
        source = _word(_CONFIG / run_dir.config.name)
        lines.append(f"cp {source} {partial} && mv {partial} {target} || exit")
    if options.run_claim:
        lines += _wait_for_pods(run_dir, _num_pods(options, job))
    resumes = ""
    if job.trains and not job.resume:
        # All pods of an attempt have failed, or have been moved, before the next one begins.
        lines.append('[ "${JOB_FAILURES:-0}${JOB_DISRUPTIONS:-0}" = 00 ] || resume=--resume')
        resumes = " $resume"
    words = []
    for word in _worker_argv(options, job, name):
        words.append('"$JOB_COMPLETION_INDEX"' if word == _INDEX else shlex.quote(word))
    lines.append(f"exec {' '.join(words)}{resumes}")
    return "\n".join(lines)


def _wait_for_pods(run_dir: RunDir, num_pods: int) -> list[str]:
    """Return shell lines that wait until every pod of the job has started once.

    Nodes may have to be started first, and images to be pulled. A worker would give up after its
    time-out.
    """
    mark = f'{_word(run_dir.pods)}/"$JOB_UID"'
    return [
        f'touch {mark}-"$JOB_COMPLETION_INDEX" || exit',
        f'until [ "$(ls -d {mark}-* | wc -l)" -ge {num_pods} ]; do sleep 1; done',
    ]


def _word(path: PurePath) -> str:
    return shlex.quote(str(path))


_INDEX = "\0"  # in an argv: the pod's number, which its shell fills in


def _worker_argv(options: KubernetesOptions, job: Job, name: str) -> tuple[str, ...]:
    """Return the command of a pod: the worker itself, or torchrun with several."""
    argv = job.argv
    if options.workers_per_pod > 1:
        argv = (
            *(options.container_python, "-P", "-m", "torch.distributed.run"),
            f"--nnodes={_num_pods(options, job)}",
            f"--nproc-per-node={options.workers_per_pod}",
            *("--node-rank", _INDEX),
            f"--master-addr={name}-0.{name}",
            f"--master-port={_PORT}",
            *job.argv_for_torchrun,
        )
    # The image has a Python of its own.
    return under_python(options.container_python, argv)


def _variables(options: KubernetesOptions, job: Job, name: str) -> dict[str, str]:
    """Return the variables of all workers."""
    variables = job.variables(_threads(options, job))
    if options.workers_per_pod == 1:
        variables |= {
            "WORLD_SIZE": str(job.workers),
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "GROUP_WORLD_SIZE": str(job.workers),
            "MASTER_ADDR": f"{name}-0.{name}",
            "MASTER_PORT": str(_PORT),
        }
    return {"PYTHONUNBUFFERED": "1", **variables, **_texts(options.env)}


def _fields(options: KubernetesOptions, job: Job) -> dict[str, str]:
    """Return the variables that the cluster fills in, each with its field of the metadata."""
    index = "annotations['batch.kubernetes.io/job-completion-index']"
    fields = {}
    if options.workers_per_pod == 1:
        fields["RANK"] = index
        fields["GROUP_RANK"] = index
    if options.run_claim:
        fields["JOB_UID"] = "labels['batch.kubernetes.io/controller-uid']"
    if job.trains:
        fields["JOB_FAILURES"] = "annotations['batch.kubernetes.io/job-index-failure-count']"
        fields["JOB_DISRUPTIONS"] = (
            "annotations['batch.kubernetes.io/job-index-ignored-failure-count']"
        )
    return fields


def _resources(options: KubernetesOptions, job: Job) -> dict[str, dict[str, str]]:
    """Return the resources that a pod requests. It may use idle cores beyond them."""
    requests = {"cpu": str(_threads(options, job) * options.workers_per_pod)}
    limits = {}
    if options.mem:
        requests["memory"] = options.mem
        limits["memory"] = options.mem
    if options.gpus_per_worker:
        limits[options.gpu_resource] = str(options.gpus_per_worker * options.workers_per_pod)
    return {"requests": requests, "limits": limits} if limits else {"requests": requests}


def _volumes(options: KubernetesOptions, job: Job, name: str) -> list[_Volume]:
    volumes = []
    if options.run_claim:
        source = _claim(options.run_claim)
    else:
        source = "emptyDir: {}"  # a failure's report needs some place
    volumes.append(_Volume("runs", str(_RUNS), source))
    if job.config:
        volumes.append(_Volume("config", str(_CONFIG), f"configMap: {{name: {name}}}"))
    if options.shm:
        size = json.dumps(options.shm)
        memory = f"emptyDir: {{medium: Memory, sizeLimit: {size}}}"
        volumes.append(_Volume("shm", "/dev/shm", memory))
    for number, (claim, path) in enumerate(options.volumes.items()):
        volumes.append(_Volume(f"volume-{number}", str(path), _claim(claim)))
    return volumes


def _claim(name: str) -> str:
    return f"persistentVolumeClaim: {{claimName: {json.dumps(name)}}}"

"""SLURM: submits a batch job and follows it; inside an allocation (salloc), runs srun."""

import dataclasses
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jinja2
from annotated_types import Ge

from scaletrain.errors import UserError
from scaletrain.launching.job import (
    Job,
    Program,
    check_set,
    environment,
    settings,
    under_python,
)
from scaletrain.launching.plan import Command, LaunchPlan
from scaletrain.run.layout import RunDir
from scaletrain.units import plural


class SlurmOptions(NamedTuple):
    """The options that people set under ``launcher:``, in the order in which they are listed."""

    tasks: Literal["workers", "nodes"] = "workers"
    """``workers`` starts each worker as a task of srun. ``nodes`` starts one torchrun a node, which
    starts the workers. It is never both."""

    nodes: int | None = None
    """How many nodes to ask for; by default SLURM decides."""

    per_node: int | None = None
    """How many workers each node gets; by default an equal share, if ``nodes`` is set."""

    cpus_per_task: int | None = None
    """Cores, and threads, of a worker; by default those of the job, else 1."""

    gpus_per_task: int = 0
    """GPUs of a worker."""

    gres: str = ""
    """As in sbatch, such as ``gpu:2``."""

    mem: str = ""
    """As in sbatch, such as ``64G``."""

    time_limit_min: Annotated[int, Ge(1)] | None = None
    """The job's time limit; by default the partition's."""

    array: int | str = ""
    """``0-3`` makes a job array. Task k is this job with ``seed: k`` in RUN_DIR/task-k, or with the
    config.yaml that lies there already."""

    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""

    bind: bool = False
    """Keep each task on its own cores (srun --cpu-bind=cores); by default as the site does."""

    mpi: str = ""
    """The kind of srun, such as ``pmix``; ``auto`` takes the best one that srun lists."""

    environment: list = []  # noqa: RUF012 (never changed)
    """Names of variables that must travel to the workers, also where a site exports none."""

    container: str = ""
    """The image in which the workers run; by default none. It holds scaletrain."""

    container_runtime: Literal["pyxis", "apptainer"] = "pyxis"
    """What starts it: options of srun, or ``apptainer exec`` inside each task."""

    container_python: str = "python3"
    """Python in the image."""

    container_workdir: str = ""
    """The working directory in the image; by default the runtime's choice."""

    container_mounts: list = []  # noqa: RUF012 (never changed)
    """Directories that the workers see, ``SOURCE`` or ``SOURCE:TARGET``. The run directory is
    always one of them."""

    container_options: list = []  # noqa: RUF012 (never changed)
    """Further options of the runtime, such as ``--no-container-mount-home``."""

    requeue: bool = True
    """When its time is up, go on from the last checkpoint in a new allocation."""

    warn_s: Annotated[int, Ge(30)] = 90
    """How long before its time is up the job writes a checkpoint."""

    directives: list = []  # noqa: RUF012 (never changed)
    """Further #SBATCH options, such as ``--exclusive``."""

    follow: bool = True
    """Show the job's output until its end; false submits and leaves."""

    poll_s: float = 1.0
    """How often to look at the job."""

    @property
    def labels_ranks(self) -> bool:
        """Whether srun says of which rank each line is.

        The tasks of an array have the same ranks, and torchrun's tasks are no ranks.
        """
        return not self.array and not self.starts_torchrun

    @property
    def starts_torchrun(self) -> bool:
        """True if a task of srun is a torchrun, not a worker."""
        return self.tasks == "nodes"


_LABELS = r"^ *(?P<rank>\d+): "  # of ``srun --label``

OPTIONS = SlurmOptions  # ``plugins.options`` reads the options from this line


def plan(job: Job, **options: Any) -> LaunchPlan:
    """Submit one batch job, or run one ``srun`` in an allocation that is there already.

    The variable SLURM_JOB_ID tells that there is one.

    Args:
        job: the job to plan.
        options: the fields of ``SlurmOptions``.
    """
    chosen = SlurmOptions(**options)
    chosen = chosen._replace(array=str(chosen.array), mpi=_kind_of_srun(chosen.mpi))
    inside = os.environ.get("SLURM_JOB_ID", "")
    _check(chosen, job, inside)
    allocation = Allocation.of(chosen, job)
    if inside:
        return _plan_inside(allocation, chosen, job, inside)
    return _plan_batch(allocation, chosen, job)


def _check(options: SlurmOptions, job: Job, inside: str) -> None:
    """Check the options of a job, inside an allocation of this number if there is one."""
    one = r"\d+(-\d+(:\d+)?)?"
    array = options.array
    if array and not re.fullmatch(rf"{one}(,{one})*(%\d+)?", str(array)):
        raise UserError(
            f"launcher.array: {array!r} is not allowed"
            " (allowed: 0-3, 0-7%2, 1,3,5, ... as in sbatch)"
        )
    if not options.container:
        for name in ("container_workdir", "container_mounts", "container_options"):
            if getattr(options, name):
                raise UserError(f"launcher.container: is missing; {name} is for an image")
    if options.starts_torchrun and not options.nodes:
        raise UserError(
            "launcher.nodes: is missing; with tasks: nodes, say on how many nodes torchrun starts"
        )
    if options.nodes and job.workers % options.nodes and not options.per_node:
        raise UserError(
            f"launcher.nodes: {job.workers} workers do not spread evenly over {options.nodes} nodes"
        )
    check_set(options.environment)
    if options.environment and any("--export" in str(line) for line in options.directives):
        raise UserError(
            "launcher.directives: --export is not allowed beside launcher.environment, which"
            " exports all variables"
        )
    if job.companions:
        raise UserError(
            "exchange.placement: 'dedicated' is not allowed with slurm, which starts workers only"
            " (allowed: beside, auto)"
        )
    if inside and options.starts_torchrun:
        raise UserError(
            "launcher.tasks: 'nodes' is for batch jobs (allowed inside an allocation: workers)"
        )
    if inside and array:
        raise UserError(
            f"launcher.array: {array!r} is for batch jobs; this is inside allocation {inside}"
        )


_ANSWER_S = 10.0  # within this time srun says which kinds it has
_BEST_FIRST = ("pmix", "pmi2")  # kinds that tell tasks of an MPI who they are


def _kind_of_srun(mpi: str) -> str:
    """Return the kind of srun to use, looked up in the list of this cluster's srun.

    A dry run on a machine without SLURM takes the kind as it is written.
    """
    if not mpi:
        return ""
    kinds = _kinds_of_srun()
    if mpi == "auto":
        return next((kind for kind in _BEST_FIRST if kind in kinds), "")
    if kinds and mpi not in kinds:
        raise UserError(
            f"launcher.mpi: {mpi!r} is not allowed (srun --mpi=list: {', '.join(kinds)}; or auto)"
        )
    return mpi


def _kinds_of_srun() -> list[str]:
    """Return the kinds that srun lists; none if it cannot be asked."""
    try:
        done = subprocess.run(
            ["srun", "--mpi=list"], capture_output=True, text=True, timeout=_ANSWER_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    kinds: list[str] = []
    # "MPI plugin types are...", then a kind a line, then "specific pmix plugin versions available:
    # pmix_v4,pmix_v5". Old versions write to standard error, and "srun: " before each line.
    for line in (done.stdout + done.stderr).splitlines():
        words = line.removeprefix("srun: ").strip()
        versions = re.fullmatch(r".*versions available: (.*)", words)
        if versions:
            kinds += re.findall(r"\w+", versions[1])
        elif re.fullmatch(r"[a-z]\w*", words):
            kinds.append(words)
    return kinds


@dataclass(frozen=True)
class Allocation:
    """The resources that a job asks for: options of sbatch, in the order of the script.

    None and the empty string leave an option out.
    """

    job_name: str
    nodes: int | None
    ntasks: int
    ntasks_per_node: int | None
    cpus_per_task: int
    gpus_per_task: int | None
    gres: str
    mem: str
    time: int | None  # minutes
    array: str
    partition: str
    account: str
    qos: str
    constraint: str
    output: str
    open_mode: str
    signal: str

    @classmethod
    def of(cls, options: SlurmOptions, job: Job) -> "Allocation":
        """Return the allocation for a job. A task is a worker, or one torchrun with its workers."""
        workers_per_node = options.per_node
        if workers_per_node is None and options.nodes:
            workers_per_node = job.workers // options.nodes
        tasks = job.workers
        tasks_per_node = workers_per_node
        workers_per_task = 1
        if options.starts_torchrun:
            assert options.nodes  # as _check has seen
            tasks = options.nodes
            tasks_per_node = 1
            workers_per_task = workers_per_node or 1
        number = "%j"  # SLURM puts the job's number in its place
        if options.array:
            number = "%A_%a"
        return cls(
            job_name=f"scaletrain-{job.run_dir.name}",
            nodes=options.nodes,
            ntasks=tasks,
            ntasks_per_node=tasks_per_node,
            cpus_per_task=_threads(options, job) * workers_per_task,
            gpus_per_task=options.gpus_per_task * workers_per_task or None,
            gres=options.gres,
            mem=options.mem,
            time=options.time_limit_min,
            array=str(options.array),
            partition=options.partition,
            account=options.account,
            qos=options.qos,
            constraint=options.constraint,
            output=str(RunDir(job.run_dir).slurm_output(number)),
            # The log of an attempt must survive the next one, after a requeue.
            open_mode="append",
            # Without "B:" before it, SLURM signals the tasks instead of the batch shell.
            signal=f"USR1@{options.warn_s}",
        )

    def directives(self) -> list[str]:
        """Return the options that are set, as they stand behind #SBATCH."""
        lines = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and value != "":
                option = field.name.replace("_", "-")
                lines.append(f"--{option}={shlex.quote(str(value))}")
        return lines


def _plan_inside(
    allocation: Allocation, options: SlurmOptions, job: Job, inside: str
) -> LaunchPlan:
    """Plan one srun in the allocation that is there."""
    threads = _threads(options, job)
    argv = (
        *_srun(allocation, options, job.run_dir),
        f"--ntasks={job.workers}",
        *_contained(options, job.argv, job.run_dir),
    )
    srun = Command("srun", argv, environment(job.variables(threads)), labels=_LABELS, stop_s=15.0)
    explain = (_explain(options, job), f"inside allocation {inside}: srun, no new job")
    return LaunchPlan((srun,), explain=explain, in_containers=bool(options.container))


def _plan_batch(allocation: Allocation, options: SlurmOptions, job: Job) -> LaunchPlan:
    """Plan a batch script and the command that submits it."""
    path = RunDir(job.run_dir).batch_script
    files = ((path, _batch_script(allocation, options, job)),)
    explain = [_explain(options, job)]
    # On the command line, which overrules a site's SBATCH_EXPORT. The script holds no values, since
    # others may read it.
    export = ["--export=ALL"] if options.environment else []
    if options.follow:
        explain.append(
            "the last command submits the script with sbatch, shows its output,"
            " and cancels it when interrupted"
        )
        argv = Program.FOLLOW_SLURM.command(path, f"{options.poll_s:g}", *export)
        # A requeued job starts its workers again: only the follower's end is the end of the job.
        labels = _LABELS if options.labels_ranks else ""
        submit = Command("slurm", argv, restarts_workers=True, labels=labels, stop_s=15.0)
    else:
        submit = Command("sbatch", ("sbatch", *export, str(path)))
    return LaunchPlan((submit,), files, tuple(explain), in_containers=bool(options.container))


def _threads(options: SlurmOptions, job: Job) -> int:
    """Return the threads, and cores, of one worker."""
    return options.cpus_per_task or job.threads or 1


def _explain(options: SlurmOptions, job: Job) -> str:
    threads = _threads(options, job)
    each = "1 core and thread" if threads == 1 else f"{threads} cores and threads"
    bound = ", each kept on its own cores" if options.bind else ""
    return f"{plural(job.workers, 'worker')}, {each} each{bound}"


def _srun(allocation: Allocation, options: SlurmOptions, run_dir: Path) -> list[str]:
    # By default srun lets the other tasks run on when one has failed. And since SLURM 22.05 it no
    # longer takes --cpus-per-task from the allocation.
    # Where a site or a person has said `sbatch --export=NONE`, tasks would not even see what the
    # batch script exports.
    argv = ["srun", "--kill-on-bad-exit=1", "--export=ALL"]
    argv.append(f"--cpus-per-task={allocation.cpus_per_task}")
    if options.bind:
        argv.append("--cpu-bind=cores")
    if options.labels_ranks:
        argv.append("--label")
    if options.mpi:
        argv.append(f"--mpi={options.mpi}")
    if options.container and options.container_runtime == "pyxis":
        argv.append(f"--container-image={options.container}")
        argv.append(f"--container-mounts={','.join(_mounts(options, run_dir))}")
        if options.container_workdir:
            argv.append(f"--container-workdir={options.container_workdir}")
        argv += options.container_options
    return argv


def _mounts(options: SlurmOptions, run_dir: Path) -> list[str]:
    """Return SOURCE:TARGET of each directory that the workers see."""
    mounts = []
    for mount in [str(run_dir), *map(str, options.container_mounts)]:
        mounts.append(mount if ":" in mount else f"{mount}:{mount}")
    return mounts


def _contained(options: SlurmOptions, argv: tuple[str, ...], run_dir: Path) -> tuple[str, ...]:
    """Return the command line of a task as it runs in its container, if there is one.

    Args:
        options: they name the image.
        argv: the command line without a container.
        run_dir: the job's. An array's directory holds the directories of its tasks.
    """
    if not options.container:
        return argv
    # The image has a Python of its own.
    argv = under_python(options.container_python, argv)
    if options.container_runtime == "pyxis":
        return argv
    apptainer = ["apptainer", "exec"]
    if options.gpus_per_task or "gpu" in options.gres:
        apptainer.append("--nv")
    for mount in _mounts(options, run_dir):
        apptainer += ["--bind", mount]
    if options.container_workdir:
        apptainer += ["--pwd", options.container_workdir]
    return (*apptainer, *options.container_options, options.container, *argv)


# The batch script. Variables of SLURM stay in it for the batch shell to expand. Ranks are variables
# of each task (SLURM_PROCID) and must not stand in it: in the batch shell they are 0.
_SCRIPT = """\
#!/bin/sh
{% for directive in directives %}
#SBATCH {{ directive }}
{% endfor %}
export {{ exports }} SCALETRAIN_SUPERVISED=1
{% if array %}
mkdir -p {{ run_dir }}
if {{ must_be_fresh }} && [ -z "$SLURM_RESTART_COUNT" ] && [ -e {{ records }} ]; then
    echo "scaletrain: error: {{ task }} holds a run already (--resume goes on with it)" >&2; exit 2
fi
[ -e {{ config }} ] || [ ! -e {{ shared_config }} ] ||
    sed "s/^seed: .*/seed: $SLURM_ARRAY_TASK_ID/" {{ shared_config }} > {{ config }}
{% endif %}
{{ srun }} {{ step }}
status=$?
{% if requeue %}
finished() { grep -qs "\\"finished\\": $1" {{ summary }}; }
if [ $status -eq 138 ] && finished true; then
    status=0 # warned in its last moments
elif { [ $status -eq 138 ] || { [ $status -eq 0 ] && finished false; }; } &&
    [ "$(squeue -h -j {{ job_id }} -o %T)" = RUNNING ]; then # out of time (138: before the first step) or preempted, not cancelled
    scontrol requeue {{ job_id }} && exit 0
fi
{% endif %}
[ $status -eq 0 ] || {{ first_cause }}
exit $status
"""


def _batch_script(allocation: Allocation, options: SlurmOptions, job: Job) -> str:
    """Return the text of the batch script.

    A task of an array trains in a directory of its own, with its number as seed, unless a
    configuration lies there already. A job that ran out of time is requeued, if it trains from its
    beginning: its later attempts resume.
    """
    shared = RunDir(job.run_dir)
    run_dir = shared
    job_id = "$SLURM_JOB_ID"
    if options.array:
        run_dir = RunDir(shared.array_task("$SLURM_ARRAY_TASK_ID"))
        # The number of the last task's job is that of the whole array: a task that used it would
        # requeue all of them.
        job_id = "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    job = job._replace(run_dir=run_dir.path)
    starts_afresh = job.trains and not job.resume

    requeue = "--requeue" if options.requeue else "--no-requeue"
    exports = []
    for name, value in {**settings(), **job.variables(_threads(options, job))}.items():
        exports.append(f"{name}={shlex.quote(value)}")
    step = _shell(*_contained(options, _step(options, job), shared.path))
    if starts_afresh:
        # SLURM sets this variable from the first requeue on.
        step += " ${SLURM_RESTART_COUNT:+--resume}"
    output = shared.slurm_output(job_id)
    template = jinja2.Environment(
        trim_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    ).from_string(_SCRIPT)
    return template.render(
        directives=[*allocation.directives(), requeue, *options.directives],
        exports=" ".join(exports),
        array=options.array,
        run_dir=_shell(run_dir.path),
        task=run_dir.path.name,
        records=_shell_file(run_dir.records(0)),
        config=_shell_file(run_dir.config),
        shared_config=_shell_file(shared.config),
        must_be_fresh="true" if starts_afresh else "false",
        srun=shlex.join(_srun(allocation, options, shared.path)),
        step=step,
        requeue=options.requeue and starts_afresh,
        summary=_shell_file(run_dir.summary),
        job_id=job_id,
        first_cause=_shell(*Program.FIRST_CAUSE.command(run_dir.path, output)),
    )


def _step(options: SlurmOptions, job: Job) -> tuple[str, ...]:
    """Return the command line of one task of srun."""
    if not options.starts_torchrun:
        return job.argv
    assert options.nodes
    # The agents meet in a file of the shared run directory: no port has to be guessed for them.
    store = RunDir(job.run_dir).torchrun_store("$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}")
    agent = [
        sys.executable,
        "-P",
        "-m",
        "torch.distributed.run",
        f"--nnodes={options.nodes}",
        f"--nproc-per-node={job.workers // options.nodes}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={store}",
        "--rdzv-conf=store_type=file",
        "--rdzv-id=job",
    ]
    return (*agent, *job.argv_for_torchrun)


def _shell(*argv: str | Path) -> str:
    """Return shell words. The batch shell expands the variables of SLURM in them."""
    words = []
    for argument in argv:
        word = str(argument)
        is_variable = "$SLURM" in word or "${SLURM" in word
        # Double quotes let the shell expand the variable, and keep spaces together all the same.
        words.append(f'"{word}"' if is_variable else shlex.quote(word))
    return " ".join(words)


def _shell_file(path: Path) -> str:
    """Return the shell word of a file, its directory quoted by itself if need be."""
    return f"{_shell(path.parent)}/{path.name}"

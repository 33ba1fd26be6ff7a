"""SLURM: writes the batch script, submits it and follows the job; inside an allocation (salloc), srun."""

import os
import re
import shlex
import sys
from collections.abc import Mapping
from typing import Annotated, Literal

from annotated_types import Ge

from scaletrain.errors import UserError
from scaletrain.launching.job import Job, Program
from scaletrain.launching.plan import Command, LaunchPlan
from scaletrain.run.layout import RunDir


def plan(
    job: Job,
    *,
    tasks: Literal["workers", "nodes"] = "workers",
    nodes: int | None = None,
    per_node: int | None = None,
    cpus_per_task: int | None = None,
    gpus_per_task: int = 0,
    gres: str = "",
    mem: str = "",
    time_limit_min: Annotated[int, Ge(1)] | None = None,
    array: int | str = "",
    partition: str = "",
    account: str = "",
    qos: str = "",
    constraint: str = "",
    mpi: str = "",
    requeue: bool = True,
    warn_s: int = 90,
    directives: list = [],  # noqa: B006 (read as a literal)
    follow: bool = True,
    poll_s: float = 1.0,
) -> LaunchPlan:
    """One batch job, or one ``srun`` where an allocation is there already (SLURM_JOB_ID is set).

    ``tasks: workers`` starts each worker as a task of srun; ``nodes`` starts one torchrun a node, which starts the workers: never both.
    ``warn_s`` before its time is up, the job writes a checkpoint and, with ``requeue``, goes on from it in a new allocation.
    ``array``, such as ``0-3``, makes a job array: task k is this job with ``seed: k`` in RUN_DIR/task-k, or with the config.yaml
    that lies there already. ``directives`` are further #SBATCH options, such as ``--exclusive``. ``follow: false`` submits and leaves.
    """
    array = str(array)
    if array and not re.fullmatch(r"\d+(-\d+(:\d+)?)?(,\d+(-\d+(:\d+)?)?)*(%\d+)?", array):
        raise UserError(
            f"launcher.array: {array!r} is not allowed (allowed: 0-3, 0-7%2, 1,3,5, ... as in sbatch)"
        )
    if tasks == "nodes" and not nodes:
        raise UserError(
            "launcher.nodes: is missing; with tasks: nodes, say on how many nodes torchrun starts"
        )
    if nodes and job.workers % nodes and not per_node:
        raise UserError(
            f"launcher.nodes: {job.workers} workers do not spread evenly over {nodes} nodes"
        )
    if job.companions:
        raise UserError(
            "exchange.placement: 'dedicated' is not allowed with slurm, which starts workers only (allowed: beside, auto)"
        )
    shared, name = job.run_dir, job.run_dir.name
    if array:
        job = _one_of(job)
    cpus = cpus_per_task or job.threads or 1
    per_node = per_node or (job.workers // nodes if nodes else None)
    allocation = {
        "job-name": f"scaletrain-{name}", "nodes": nodes, "ntasks": nodes if tasks == "nodes" else job.workers,
        "ntasks-per-node": 1 if tasks == "nodes" else per_node,
        "cpus-per-task": cpus * per_node if tasks == "nodes" and per_node else cpus,
        "gpus-per-task": gpus_per_task * (per_node or 1 if tasks == "nodes" else 1) or None,
        "gres": gres, "mem": mem, "time": time_limit_min, "array": array,
        "partition": partition, "account": account, "qos": qos, "constraint": constraint,
        "output": f"{shared}/slurm-{'%A_%a' if array else '%j'}.out", "open-mode": "append", "signal": f"USR1@{warn_s}",
    }  # fmt: skip
    step = _torchrun(job, nodes or 1) if tasks == "nodes" else job.argv
    srun = ["srun", "--kill-on-bad-exit=1", f"--cpus-per-task={allocation['cpus-per-task']}"]
    srun += [f"--mpi={mpi}"] if mpi else []
    explain = [
        f"{job.workers} workers, {cpus} core{'s' * (cpus > 1)} and thread{'s' * (cpus > 1)} each"
    ]
    exports = {"OMP_NUM_THREADS": str(cpus), **dict(job.env)}
    if inside := _allocation(os.environ):
        explain.append(f"inside allocation {inside}: srun, no new job")
        if tasks == "nodes":
            raise UserError(
                "launcher.tasks: 'nodes' is for batch jobs (allowed inside an allocation: workers)"
            )
        if array:
            raise UserError(
                f"launcher.array: {array!r} is for batch jobs; this is inside allocation {inside}"
            )
        command = Command(
            "srun", (*srun, f"--ntasks={job.workers}", *step), tuple(exports.items()), stop_s=15.0
        )
        return LaunchPlan((command,), explain=tuple(explain), companions=())
    script = shared / "job.sbatch"
    lines = [
        f"#SBATCH --{key}={shlex.quote(str(value))}"
        for key, value in allocation.items()
        if value not in (None, "")
    ]
    lines += [
        f"#SBATCH --{'' if requeue else 'no-'}requeue",
        *(f"#SBATCH {directive}" for directive in directives),
    ]
    job_id = "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" if array else "$SLURM_JOB_ID"
    run_dir = _words((str(job.run_dir),))
    text = _SCRIPT.format(
        directives="\n".join(lines),
        before=_TASK.format(
            shared=shlex.quote(str(shared)), run_dir=run_dir, fresh=str(_resumes(job)).lower()
        )
        if array
        else "",
        exports=" ".join(f"{key}={shlex.quote(value)}" for key, value in exports.items()),
        srun=shlex.join(srun),
        step=_words(step) + (" ${SLURM_RESTART_COUNT:+--resume}" if _resumes(job) else ""),
        again=_AGAIN.format(run_dir=run_dir, job_id=job_id) if requeue and _resumes(job) else "",
        python=shlex.quote(sys.executable),
        first_cause=Program.FIRST_CAUSE.value,
        run_dir=run_dir,
        output=_words((f"{shared}/slurm-{job_id}.out",)),
    )
    if not follow:
        return LaunchPlan(
            (Command("sbatch", ("sbatch", str(script))),),
            ((script, text),),
            tuple(explain),
            companions=(),
        )
    follower = Program.FOLLOW_SLURM.command(script, f"{poll_s:g}")
    explain.append(
        "the last command submits the script with sbatch, shows its output, and cancels it when interrupted"
    )
    command = Command("slurm", follower, restarts_workers=True, stop_s=15.0)
    return LaunchPlan((command,), ((script, text),), tuple(explain), companions=())


def _one_of(job: Job) -> Job:
    """The job as one task of an array runs it, in a directory of its own; the batch shell knows the task's number."""
    return job._replace(run_dir=RunDir(job.run_dir).array_task("$SLURM_ARRAY_TASK_ID"))


def _allocation(env: Mapping[str, str]) -> str:
    return env.get("SLURM_JOB_ID", "")


def _resumes(job: Job) -> bool:
    return job.trains and not job.resume


def _torchrun(job: Job, nodes: int) -> tuple[str, ...]:
    """One agent a node. They meet in a file of the shared run directory: no port has to be guessed for them."""
    meet = f"{job.run_dir}/torchrun-$SLURM_JOB_ID-${{SLURM_RESTART_COUNT:-0}}"
    agent = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}"]
    agent += [
        f"--nproc-per-node={job.workers // nodes}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={meet}",
    ]
    agent += ["--rdzv-conf=store_type=file", "--rdzv-id=job"]
    return (
        *agent,
        *(job.argv[1:] if job.program else ("--no-python", *job.argv)),
    )


def _words(argv: tuple[str, ...]) -> str:
    """As shell words; what names a variable of SLURM is left to the batch shell."""
    return " ".join(
        f'"{word}"' if "$SLURM" in word or "${SLURM" in word else shlex.quote(word) for word in argv
    )


# Ranks are variables of each task (SLURM_PROCID): the batch shell must not expand them, and does not.
_SCRIPT = """#!/bin/sh
{directives}
export {exports} SCALETRAIN_SUPERVISED=1
{before}{srun} {step}
status=$?
{again}[ $status -eq 0 ] || {python} -m {first_cause} {run_dir} {output}
exit $status
"""
# A task of an array trains with its own number as seed, unless somebody has put a configuration of its own there.
_TASK = """mkdir -p {run_dir}
if {fresh} && [ -z "$SLURM_RESTART_COUNT" ] && [ -e {run_dir}/rank-0.jsonl ]; then
    echo "scaletrain: error: task-$SLURM_ARRAY_TASK_ID holds a run already (--resume goes on with it)" >&2; exit 2
fi
[ -e {run_dir}/config.yaml ] || [ ! -e {shared}/config.yaml ] ||
    sed "s/^seed: .*/seed: $SLURM_ARRAY_TASK_ID/" {shared}/config.yaml > {run_dir}/config.yaml
"""
_AGAIN = """finished() {{ grep -qs "\\"finished\\": $1" {run_dir}/summary.json; }}
if [ $status -eq 138 ] && finished true; then
    status=0 # warned in its last moments
elif {{ [ $status -eq 138 ] || {{ [ $status -eq 0 ] && finished false; }}; }} &&
    [ "$(squeue -h -j {job_id} -o %T)" = RUNNING ]; then # out of time (138: before the first step) or preempted, not cancelled
    scontrol requeue {job_id} && exit 0
fi
"""

"""SLURM: writes the batch script, submits it and follows the job; inside an allocation (salloc), srun."""

import os
import shlex
import sys
from collections.abc import Mapping
from typing import Literal

from scaletrain.errors import UserError
from scaletrain.launching.job import Command, Job, LaunchPlan


def plan(
    job: Job,
    *,
    tasks: Literal["workers", "nodes"] = "workers",
    nodes: int | None = None,
    per_node: int | None = None,
    cpus_per_task: int | None = None,
    gpus_per_task: int = 0,
    mem: str = "",
    time_limit_min: int | None = None,
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
    ``directives`` are further #SBATCH options, such as ``--exclusive``. ``follow: false`` submits and leaves.
    """
    if tasks == "nodes" and not nodes:
        raise UserError("launcher.nodes: is missing; with tasks: nodes, say on how many nodes torchrun starts")
    if nodes and job.workers % nodes and not per_node:
        raise UserError(f"launcher.nodes: {job.workers} workers do not spread evenly over {nodes} nodes")
    if job.companions:
        raise UserError(
            "launcher: slurm starts no companions (parameter servers); use the local launcher inside an allocation"
        )
    name = job.run_dir.name
    cpus = cpus_per_task or job.threads or 1
    per_node = per_node or (job.workers // nodes if nodes else None)
    allocation = {
        "job-name": f"scaletrain-{name}", "nodes": nodes, "ntasks": nodes if tasks == "nodes" else job.workers,
        "ntasks-per-node": 1 if tasks == "nodes" else per_node,
        "cpus-per-task": cpus * per_node if tasks == "nodes" and per_node else cpus,
        "gpus-per-task": gpus_per_task * (per_node or 1 if tasks == "nodes" else 1) or None,
        "mem": mem, "time": time_limit_min, "partition": partition, "account": account, "qos": qos, "constraint": constraint,
        "output": f"{job.run_dir}/slurm-%j.out", "open-mode": "append", "signal": f"USR1@{warn_s}",
    }  # fmt: skip
    step = _torchrun(job, nodes or 1) if tasks == "nodes" else job.argv
    srun = ["srun", "--kill-on-bad-exit=1", f"--cpus-per-task={allocation['cpus-per-task']}"]
    srun += [f"--mpi={mpi}"] if mpi else []
    explain = [f"{job.workers} workers, {cpus} core{'s' * (cpus > 1)} and thread{'s' * (cpus > 1)} each"]
    exports = {"OMP_NUM_THREADS": str(cpus), **dict(job.env)}
    if inside := _allocation(os.environ):
        explain.append(f"inside allocation {inside}: srun, no new job")
        if tasks == "nodes":
            raise UserError("launcher.tasks: 'nodes' is for batch jobs (allowed inside an allocation: workers)")
        command = Command("srun", (*srun, f"--ntasks={job.workers}", *step), tuple(exports.items()), stop_s=15.0)
        return LaunchPlan((command,), explain=tuple(explain), companions=())
    script = job.run_dir / "job.sbatch"
    lines = [f"#SBATCH --{key}={value}" for key, value in allocation.items() if value not in (None, "")]
    lines += [f"#SBATCH --{'' if requeue else 'no-'}requeue", *(f"#SBATCH {directive}" for directive in directives)]
    text = _SCRIPT.format(
        directives="\n".join(lines),
        exports=" ".join(f"{key}={shlex.quote(value)}" for key, value in exports.items()),
        srun=shlex.join(srun),
        step=_words(step) + (" ${SLURM_RESTART_COUNT:+--resume}" if _resumes(job) else ""),
        again=_AGAIN.format(run_dir=shlex.quote(str(job.run_dir))) if requeue and _resumes(job) else "",
        python=shlex.quote(job.argv[0] if job.argv[1:2] == ("-m",) else sys.executable),
        run_dir=shlex.quote(str(job.run_dir)),
    )
    if not follow:
        return LaunchPlan(
            (Command("sbatch", ("sbatch", str(script))),), ((script, text),), tuple(explain), companions=()
        )
    follower = (sys.executable, "-m", "scaletrain.launching.follow_slurm", str(script), f"{poll_s:g}")
    explain.append("the last command submits the script with sbatch, shows its output, and cancels it when interrupted")
    command = Command("slurm", follower, restarts_workers=True, stop_s=15.0)
    return LaunchPlan((command,), ((script, text),), tuple(explain), companions=())


def _allocation(env: Mapping[str, str]) -> str:
    return env.get("SLURM_JOB_ID", "")


def _resumes(job: Job) -> bool:
    return job.argv[1:3] == ("-m", "scaletrain.training.worker") and "--resume" not in job.argv


def _torchrun(job: Job, nodes: int) -> tuple[str, ...]:
    """One agent a node. They meet in a file of the shared run directory: no port has to be guessed for them."""
    meet = f"{job.run_dir}/torchrun-$SLURM_JOB_ID-${{SLURM_RESTART_COUNT:-0}}"
    agent = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}"]
    agent += [f"--nproc-per-node={job.workers // nodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={meet}"]
    agent += ["--rdzv-conf=store_type=file", "--rdzv-id=job"]
    return (*agent, *(job.argv[1:] if job.argv[:2] == (sys.executable, "-m") else ("--no-python", *job.argv)))


def _words(argv: tuple[str, ...]) -> str:
    """As shell words; what names a variable of SLURM is left to the batch shell."""
    return " ".join(f'"{word}"' if "$SLURM" in word or "${SLURM" in word else shlex.quote(word) for word in argv)


# Ranks are variables of each task (SLURM_PROCID): the batch shell must not expand them, and does not.
_SCRIPT = """#!/bin/sh
{directives}
export {exports} SCALETRAIN_SUPERVISED=1
{srun} {step}
status=$?
{again}[ $status -eq 0 ] || {python} -m scaletrain.launching.first_cause {run_dir} {run_dir}/slurm-$SLURM_JOB_ID.out
exit $status
"""
_AGAIN = """if [ $status -eq 0 ] && grep -qs '"finished": false' {run_dir}/summary.json &&
   [ "$(squeue -h -j $SLURM_JOB_ID -o %T)" = RUNNING ]; then # out of time or preempted, not cancelled; the checkpoint is written
    scontrol requeue $SLURM_JOB_ID && exit 0
fi
"""

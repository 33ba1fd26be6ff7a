"""The leftovers of a job that was stopped: its checkpoint, and the command to go on."""

import shlex

from scaletrain.launching.job import Job
from scaletrain.run import progress
from scaletrain.run.layout import RunDir
from scaletrain.units import plural


def checkpoint_line(job: Job) -> str:
    """Return a line about the newest checkpoint and the command that goes on from it.

    It is empty if the job does not train, or has written no checkpoint.
    """
    checkpoints = RunDir(job.run_dir).checkpoints()
    if not checkpoints or not job.trains:
        return ""
    step, _ = checkpoints[-1]
    return f"the checkpoint holds {plural(step, 'step')}. To go on: {_resume_command(job)}"


def state_when_stopped(job: Job) -> str:
    """Return how far a training job got, to follow "stopped by SIGINT"; empty for other jobs."""
    if not job.trains:
        return ""
    run_dir = RunDir(job.run_dir)
    if run_dir.has_finished():
        return ", when it had finished"
    checkpoint = checkpoint_line(job)
    if checkpoint:
        return f"; {checkpoint}"
    workers = progress.read_all(run_dir, job.workers)
    # Reports come at different times: the farthest one tells how far the job got.
    steps = max((worker.step or 0 for worker in workers), default=0)
    if not steps:
        return " before the first step was done"
    return f" after {plural(steps, 'step')}; no checkpoint was written"


def _resume_command(job: Job) -> str:
    config = str(RunDir(job.run_dir).config)
    return shlex.join(["scaletrain", "train", config, "--run-dir", str(job.run_dir), "--resume"])

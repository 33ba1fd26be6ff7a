"""Tests of world.py.

World.from_env, with the variables as each launcher really sets them (copied from running
ones).
"""

import os

import pytest

from scaletrain.errors import UserError
from scaletrain.world import (
    UNKNOWN,
    World,
    expand_tasks_per_node,
    started_by_another,
    without_place,
)

TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2",
    "TORCHELASTIC_RUN_ID": "x", "MASTER_ADDR": "h0", "MASTER_PORT": "1",
}  # fmt: skip
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "OMPI_COMM_WORLD_NODE_RANK": "1", "PMIX_RANK": "5", "PMIX_NAMESPACE": "1211039745",
}  # fmt: skip
MPICH = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
SLURM_BATCH = {  # what a batch script itself sees of a job of 8 tasks
    "SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
    "SLURM_NNODES": "2", "SLURM_TASKS_PER_NODE": "4(x2)",
}  # fmt: skip
SRUN = SLURM_BATCH | {
    "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}  # fmt: skip
HOROVODRUN = {
    "HOROVOD_RANK": "5", "HOROVOD_SIZE": "8", "HOROVOD_LOCAL_RANK": "1", "HOROVOD_LOCAL_SIZE": "4",
    "HOROVOD_CROSS_RANK": "1", "HOROVOD_CROSS_SIZE": "2",
}  # fmt: skip
FLUX = {
    "FLUX_TASK_RANK": "5", "FLUX_JOB_SIZE": "8", "FLUX_TASK_LOCAL_ID": "1", "FLUX_JOB_NNODES": "2",
    "PMI_RANK": "5", "PMI_SIZE": "8",
}  # fmt: skip
MVAPICH = {
    "MV2_COMM_WORLD_RANK": "5", "MV2_COMM_WORLD_SIZE": "8", "MV2_COMM_WORLD_LOCAL_RANK": "1", "MV2_COMM_WORLD_LOCAL_SIZE": "4",
}  # fmt: skip
JSRUN = {
    "JSM_NAMESPACE_RANK": "5", "JSM_NAMESPACE_SIZE": "8", "JSM_NAMESPACE_LOCAL_RANK": "1", "JSM_NAMESPACE_LOCAL_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8", "PMIX_RANK": "5",
}  # fmt: skip
PALS = {
    "PMI_RANK": "5", "PMI_SIZE": "8", "PMI_LOCAL_RANK": "1", "PMI_LOCAL_SIZE": "4", "PALS_RANKID": "5",
}  # fmt: skip
KUBEFLOW = {
    "PET_NNODES": "2",
    "PET_NPROC_PER_NODE": "4",
    "PET_NODE_RANK": "1",
    "PET_MASTER_ADDR": "job-0",
}
# Our local launcher in the sixth of eight tasks: it decided to start two workers there.
LOCAL_IN_A_TASK = {
    "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1",
    "SCALETRAIN_LAUNCHER": "local",
}  # fmt: skip
LOCAL = TORCHRUN | {"SCALETRAIN_LAUNCHER": "local"}
LOCAL.pop("TORCHELASTIC_RUN_ID")


@pytest.mark.parametrize(
    ("env", "world"),
    [
        ({}, World(0, 1, 0, 1, 0, 1, "python")),
        (LOCAL, World(5, 8, 1, 4, 1, 2, "local")),
        (TORCHRUN, World(5, 8, 1, 4, 1, 2, "torchrun")),
        ({"RANK": "1", "WORLD_SIZE": "2"}, World(1, 2, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN, "environment")),
        (OPENMPI, World(5, 8, 1, 4, UNKNOWN, UNKNOWN, "openmpi")),
        (
            OPENMPI | {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "3"},
            World(3, 4, 3, 4, 0, 1, "openmpi"),
        ),
        (MPICH, World(5, 8, 1, 4, UNKNOWN, UNKNOWN, "mpich")),
        (SRUN, World(5, 8, 1, 4, 1, 2, "slurm")),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "5,3"}, World(5, 8, 1, 3, 1, 2, "slurm")),
        (SLURM_BATCH, World()),  # the batch script is no worker, though its SLURM_PROCID is 0
        (HOROVODRUN, World(5, 8, 1, 4, 1, 2, "horovodrun")),
        (FLUX, World(5, 8, 1, UNKNOWN, UNKNOWN, 2, "flux")),
        (MVAPICH, World(5, 8, 1, 4, UNKNOWN, UNKNOWN, "mvapich")),
        (JSRUN, World(5, 8, 1, 4, UNKNOWN, UNKNOWN, "openmpi")),
        (PALS, World(5, 8, 1, 4, UNKNOWN, UNKNOWN, "mpich")),
        (TORCHRUN | KUBEFLOW | {"JOB_COMPLETION_INDEX": "1"}, World(5, 8, 1, 4, 1, 2, "torchrun")),
        # Our launcher for Kubernetes says how many pods there are.
        ({"RANK": "1", "WORLD_SIZE": "2", "JOB_COMPLETION_INDEX": "1"}, World(1, 2, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN, "environment")),
        ({"PET_NNODES": "1"}, World()),
        ({"JOB_COMPLETION_INDEX": "1", "SCALETRAIN_LAUNCHER": "python"}, World()),
        # One launcher inside another
        (LOCAL_IN_A_TASK | SRUN, World(1, 2, 1, 2, 0, 1, "local")),
        (LOCAL_IN_A_TASK | OPENMPI, World(1, 2, 1, 2, 0, 1, "local")),
        (LOCAL_IN_A_TASK | {"PMIX_RANK": "5"}, World(1, 2, 1, 2, 0, 1, "local")),
        (TORCHRUN | SRUN | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, World(5, 8, 1, 4, 1, 2, "torchrun")),
        (TORCHRUN | SLURM_BATCH, World(5, 8, 1, 4, 1, 2, "torchrun")),
        (OPENMPI | SRUN, World(5, 8, 1, 4, 1, 2, "openmpi")),  # the same twice: one fills in what the other leaves out
        ({"PMI_RANK": "5", "PMI_SIZE": "8"} | SRUN, World(5, 8, 1, 4, 1, 2, "mpich")),  # srun --mpi=pmi2
        (OPENMPI | SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, World(5, 8, 1, 4, UNKNOWN, UNKNOWN, "openmpi")),
        (HOROVODRUN | OPENMPI, World(5, 8, 1, 4, 1, 2, "horovodrun")),
        # A person's word
        (OPENMPI | {"RANK": "0", "WORLD_SIZE": "1", "SCALETRAIN_LAUNCHER": "openmpi"}, World(5, 8, 1, 4, UNKNOWN, UNKNOWN, "openmpi")),
        (OPENMPI | {"SCALETRAIN_LAUNCHER": "python"}, World()),
    ],
)  # fmt: skip
def test_each_launcher(env: dict[str, str], world: World):
    assert World.from_env(env) == world


@pytest.mark.parametrize(
    ("env", "evidence"),
    [
        # left in the shell by an earlier job: without the check, each of the 8 workers would train
        # alone
        (
            OPENMPI | {"RANK": "0", "WORLD_SIZE": "1"},
            ["RANK=0 WORLD_SIZE=1", "OMPI_COMM_WORLD_RANK=5"],
        ),
        (SRUN | {"RANK": "0", "WORLD_SIZE": "8"}, ["RANK=0 WORLD_SIZE=8", "SLURM_PROCID=5"]),
        (MPICH | {"RANK": "6", "WORLD_SIZE": "8"}, ["PMI_RANK=5", "RANK=6"]),
        # torchrun in every one of 8 tasks of 2 nodes: 64 processes where 8 were meant
        (TORCHRUN | SRUN | {"SLURM_PROCID": "3"}, ["SLURM_STEP_NUM_TASKS=8", "WORLD_SIZE=8"]),
        # two trainings of "0 of 1", if the second one believed the shell
        (
            {"RANK": "0", "WORLD_SIZE": "1", "PMIX_RANK": "1"},
            ["RANK=0 WORLD_SIZE=1", "PMIX_RANK=1"],
        ),
        ({"PMIX_RANK": "0"}, ["PMIX_RANK=0", "set RANK and WORLD_SIZE"]),
        ({"ALPS_APP_PE": "3"}, ["ALPS_APP_PE=3 (ALPS)"]),
        ({"PALS_RANKID": "3"}, ["PALS_RANKID=3 (PALS)"]),
        ({"JOB_COMPLETION_INDEX": "0"}, ["JOB_COMPLETION_INDEX=0", "SCALETRAIN_LAUNCHER=python"]),
        (KUBEFLOW, ["PET_NNODES=2", "torchrun -m scaletrain.cli worker"]),
        ({"PET_NNODES": "1", "PET_NPROC_PER_NODE": "4"}, ["PET_NPROC_PER_NODE=4"]),
        ({"RANK": "0"}, ["RANK=0", "WORLD_SIZE"]),
        ({"WORLD_SIZE": "2"}, ["WORLD_SIZE=2", "RANK"]),
        ({"RANK": "2", "WORLD_SIZE": "2"}, ["RANK=2 WORLD_SIZE=2"]),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, ["RANK='-1'"]),
        ({"RANK": "one", "WORLD_SIZE": "2"}, ["RANK='one'"]),
        (TORCHRUN | {"LOCAL_RANK": "4"}, ["LOCAL_RANK=4", "LOCAL_WORLD_SIZE=4"]),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "4(y2)"}, ["4(y2)"]),
        (
            SRUN | {"SLURM_STEP_TASKS_PER_NODE": "8"},
            ["SLURM_STEP_TASKS_PER_NODE=8", "SLURM_NODEID=1"],
        ),
        ({"SCALETRAIN_LAUNCHER": "openmpy"}, ["openmpy", "did you mean 'openmpi'"]),
        ({"SCALETRAIN_LAUNCHER": "slurm"}, ["SLURM_PROCID"]),
    ],
)
def test_conflicts_are_refused_with_the_evidence(env: dict[str, str], evidence: list[str]):
    with pytest.raises(UserError) as refused:
        World.from_env(env)
    assert all(text in str(refused.value) for text in evidence), refused.value
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("env", "evidence"),
    [
        ({}, ""),
        (SLURM_BATCH, ""),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, ""),
        (LOCAL, ""),  # a worker of ours that starts jobs of its own
        (SRUN, "SLURM_PROCID=5 SLURM_STEP_NUM_TASKS=8"),
        (OPENMPI, "OMPI_COMM_WORLD_RANK=5 OMPI_COMM_WORLD_SIZE=8"),
        (TORCHRUN, "RANK=5 WORLD_SIZE=8"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "RANK=1 WORLD_SIZE=2"),
        (SRUN | {"SCALETRAIN_LAUNCHER": "python"}, ""),  # the remedy
        ({"JOB_COMPLETION_INDEX": "1", "SCALETRAIN_LAUNCHER": "python"}, ""),
        ({"PMIX_RANK": "0", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}, ""),
    ],
)
def test_a_process_that_another_launcher_has_started_is_known(env: dict[str, str], evidence: str):
    assert started_by_another(env) == evidence


@pytest.mark.parametrize(
    "env", [{"PMIX_RANK": "0"}, {"JOB_COMPLETION_INDEX": "0"}, {"PET_NNODES": "2"}]
)
def test_no_job_is_started_where_nothing_says_how_many_would_start(env: dict[str, str]):
    with pytest.raises(UserError, match="SCALETRAIN_LAUNCHER=python"):
        started_by_another(env)


@pytest.mark.parametrize("named", ["openmpi", "python"])
def test_the_remedy_of_a_conflict_works(named: str):
    leaked = OPENMPI | {"RANK": "0", "WORLD_SIZE": "1"}
    with pytest.raises(UserError, match=rf"SCALETRAIN_LAUNCHER to the one to believe.*{named}"):
        World.from_env(leaked)
    assert World.from_env(leaked | {"SCALETRAIN_LAUNCHER": named}).launcher == named


def test_a_launch_passes_on_no_place_and_no_word_about_itself():
    leaked = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "SCALETRAIN_LAUNCHER": "python"}
    assert without_place(leaked | {"HOME": "/h"}) == {"HOME": "/h"}
    named = {"SCALETRAIN_LAUNCHER": "openmpi", "SLURM_PROCID": "0"}
    assert without_place(named) == named
    assert started_by_another(named) == ""  # its variables are not set here: it is for the workers


def test_reading_never_writes_the_environment():
    before = dict(os.environ)
    World.from_env()
    assert dict(os.environ) == before


def test_tasks_per_node():
    assert expand_tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    assert expand_tasks_per_node("4") == [4]

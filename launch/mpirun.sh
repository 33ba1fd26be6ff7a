#!/bin/sh
# Train with mpirun of Open MPI or MPICH, on this host or on the hosts of a host file:
#   launch/mpirun.sh RUN_DIR WORKERS [HOSTFILE]
# RUN_DIR is a folder that all hosts share. The job's YAML lies in it as config.yaml.
# PYTHON=.venv/bin/python chooses the Python, and MPIRUN=/path/to/mpirun the MPI.
# Equal to: scaletrain train ... --launcher mpirun --dry-run
set -eu
if [ $# -lt 2 ]; then
    echo "usage: $0 RUN_DIR WORKERS [HOSTFILE]" >&2
    exit 2
fi
if [ ! -f "$1/config.yaml" ]; then
    echo "$0: $1: is not a folder with the job's YAML in it as config.yaml" \
        "(for a script of your own: scaletrain launch)" >&2
    exit 2
fi
run_dir=$1 workers=$2 hostfile=${3:-}
python=${PYTHON:-python3}
mpirun=${MPIRUN:-mpirun}
cores=$(nproc)
threads=${OMP_NUM_THREADS:-$((cores / workers > 0 ? cores / workers : 1))}
[ -z "$hostfile" ] || threads=${OMP_NUM_THREADS:-1}
if "$mpirun" --version 2>/dev/null | grep -q "Open MPI"; then
    set --
    [ "$(id -u)" != 0 ] || set -- "$@" --allow-run-as-root
    [ -z "$hostfile" ] || set -- "$@" --hostfile "$hostfile"
    # Open MPI's own default binds each worker to one core, which its other threads then share.
    set -- "$@" --map-by slot --bind-to none
    [ -n "$hostfile" ] || [ "$workers" -le "$cores" ] || set -- "$@" --oversubscribe
    set -- "$@" -x "OMP_NUM_THREADS=$threads"
else
    set --
    [ -z "$hostfile" ] || set -- "$@" -f "$hostfile"
    set -- "$@" -genv OMP_NUM_THREADS "$threads"
fi
exec "$mpirun" -n "$workers" "$@" "$python" -P -m scaletrain.programs.worker "$run_dir"

#!/bin/sh
# Train with torchrun; the same command on every host:
#   launch/torchrun.sh RUN_DIR WORKERS_A_HOST [HOSTS ENDPOINT]
# RUN_DIR is a folder that all hosts share. The job's YAML lies in it as config.yaml.
# ENDPOINT is HOST:PORT of one of the hosts, where they meet.
# PYTHON=.venv/bin/python chooses the Python.
# Equal to: scaletrain train ... --launcher torchrun --dry-run
set -eu
if [ $# -lt 2 ]; then
    echo "usage: $0 RUN_DIR WORKERS_A_HOST [HOSTS ENDPOINT]" >&2
    exit 2
fi
if [ ! -f "$1/config.yaml" ]; then
    echo "$0: $1: is not a folder with the job's YAML in it as config.yaml" \
        "(for a script of your own: torchrun)" >&2
    exit 2
fi
run_dir=$1 workers=$2 hosts=${3:-1} endpoint=${4:-}
python=${PYTHON:-python3}
cores=$(nproc)
threads=${OMP_NUM_THREADS:-$((cores / workers > 0 ? cores / workers : 1))}
if [ "$hosts" = 1 ]; then
    set -- --standalone
else
    set -- "--nnodes=$hosts" --rdzv-backend=c10d "--rdzv-endpoint=$endpoint" \
        "--rdzv-id=$(basename "$run_dir")" --rdzv-conf=join_timeout=600
fi
export OMP_NUM_THREADS="$threads"
exec "$python" -P -m torch.distributed.run "--nproc-per-node=$workers" --max-restarts=0 "$@" \
    --no-python "$python" -P -m scaletrain.programs.worker "$run_dir"

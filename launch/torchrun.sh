#!/bin/sh
# Train with torchrun; the same command on every host:
#   launch/torchrun.sh RUN_DIR WORKERS_A_HOST [HOSTS ENDPOINT]
# PYTHON=.venv/bin/python says which Python. RUN_DIR is a folder that all hosts share, with the job's YAML in it as config.yaml. ENDPOINT is HOST:PORT of one of the
# hosts, where they meet. Equal to: scaletrain train ... --launcher torchrun --dry-run
set -eu
[ $# -ge 2 ] || { echo "usage: $0 RUN_DIR WORKERS_A_HOST [HOSTS ENDPOINT]" >&2; exit 2; }
[ -f "$1/config.yaml" ] || { echo "$0: $1: no folder with the job's YAML in it as config.yaml (a script of your own: torchrun)" >&2; exit 2; }
run_dir=$1 here=$2 hosts=${3:-1} endpoint=${4:-}
python=${PYTHON:-python3}
cores=$(nproc)
threads=${OMP_NUM_THREADS:-$((cores / here > 0 ? cores / here : 1))}
if [ "$hosts" = 1 ]; then
    set -- --standalone
else
    set -- "--nnodes=$hosts" --rdzv-backend=c10d "--rdzv-endpoint=$endpoint" "--rdzv-id=$(basename "$run_dir")" --rdzv-conf=join_timeout=600
fi
OMP_NUM_THREADS=$threads exec "$python" -m torch.distributed.run "--nproc-per-node=$here" --max-restarts=0 "$@" \
    -m scaletrain.programs.worker "$run_dir"

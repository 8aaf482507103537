#!/bin/bash
# 16 nodes of 8 GPUs, one process a node:   sbatch examples/launch/slurm.sh
# A requeued or resubmitted job goes on where the last one stopped.
#SBATCH --job-name=llama7b
#SBATCH --nodes=16
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
# SIGTERM to the processes five minutes before the time is over: save, and end with code 0.
#SBATCH --signal=TERM@300
#SBATCH --output=%x-%j.log

set -euo pipefail

: "${OUTPUT:=$PWD/runs}"    # a folder that all nodes see
: "${CONFIG:=llama7b}"
export JAX_COMPILATION_CACHE_DIR="$OUTPUT/.compiled"

resume=()
if [[ -f "$OUTPUT/$CONFIG/config.json" ]]; then
    resume=(--resume)
fi

# Slurm sends the signal to the step's tasks, not to this script. --kill-on-bad-exit ends the job when
# a process dies, so that the others do not wait for it.
exec srun --kill-on-bad-exit=1 python -m train.main \
    --config "$CONFIG" --output "$OUTPUT" \
    --mesh.fsdp 64 --batch-size 1024 --micro-batches 2 \
    "${resume[@]}" "$@"

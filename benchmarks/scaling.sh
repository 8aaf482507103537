#!/usr/bin/env bash
# The measurements of docs/scaling.md on all GPUs of this machine, each within a time limit:
#
#     bash benchmarks/scaling.sh OUT [OPTION...]
#
# OUT is a folder for the results, one JSON file for each; options are the trainer's, such as
# --data.source. A result of fewer GPUs that lies in OUT already, as step_1b_2gpu.json, is what the
# run on more of them is compared with; on two GPUs the same process measures one of them as well.
# PARTS="7b 1b llama2 gathers" says which of them, ROUNDS and WARMUP how long, SEQUENCES how many of
# them llama7b has on a GPU (2 fit 80 GB), LIMIT how many seconds a run may take; DRY=1 prints the commands.
set -uo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 1 ] || { echo "usage: bash benchmarks/scaling.sh OUT [OPTION...]" >&2; exit 2; }
out=$1
shift
mkdir -p "$out"
gpus=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}
# Multicast over NVLink needs rights that a guest may not have; nothing here depends on it.
export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0}
export PYTHONUNBUFFERED=1

failed=0
parts=" ${PARTS:-7b 1b llama2 gathers} "
wanted() { [[ $parts == *" $1 "* ]]; }
step() { # seconds, name of the result, arguments
  local limit=$1 name=$2
  shift 2
  echo "== $name"
  ${DRY:+echo} timeout "$limit" python3 -m benchmarks.train_step --out "$out/$name.json" \
    --xla xla_gpu_enable_triton_gemm=false --xla xla_gpu_memory_limit_slop_factor=150 --rounds "${ROUNDS:-5}" --round-steps 3 \
    --settle-steps 2 --warmup-steps "${WARMUP:-20}" --no-refresh "$@" || { echo "$name: exit code $?" >&2; return 1; }
}
compared() { # a result of fewer GPUs
  [ -f "$out/$1.json" ] && echo "--baseline $out/$1.json"
}

common="--micro-batches 1 --model.no-scan-layers --model.logits compute --model.loss-chunk 2048"
common+=" --model.remat dots"
each() { echo "$common --batch-per-device $1"; }
half=$((gpus / 2))

# Most of the memory is taken: two GPUs of 80 GB hold llama7b and two sequences each.
seven() { # sequences a device, name
  XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.95} \
    step "${LIMIT:-240}" "$2" --config llama7b --mesh.fsdp "$gpus" \
    --dense "$(each "$1")" --sparse "$(each "$1")" $(compared "step_7b_${half}gpu") "${@:3}"
}
if wanted 7b; then
  seven "${SEQUENCES:-2}" "step_7b_${gpus}gpu" "$@" || seven 1 "step_7b_${gpus}gpu_short" "$@" || failed=1
fi

if wanted 1b; then
  scaling=$(compared "step_1b_${half}gpu")
  [ -n "$scaling" ] || scaling="--scaling 1"
  step "${LIMIT:-240}" "step_1b_${gpus}gpu" --config llama1b --mesh.fsdp "$gpus" \
    --dense "$(each 8)" --sparse "$(each 8)" $scaling "$@" || failed=1
fi

if wanted llama2 && [ "$gpus" -ge 4 ]; then
  # The bytes of the embedded text: the tokenizers of other texts may not fit 32,000 ids.
  step 150 "step_llama2_7b_${gpus}gpu" --config llama2-7b --mesh.fsdp "$gpus" --no-sparse \
    --dense "$(each 4)" || failed=1
fi

if wanted gathers; then
  echo "== gathers"
  ${DRY:+echo} timeout 90 python3 -m benchmarks.gathers --config llama7b \
    --out "$out/gathers_${gpus}gpu.json" || failed=1
fi
exit $failed

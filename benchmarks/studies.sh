#!/usr/bin/env bash
# The studies of docs/studies.md on all GPUs of this machine, within a time limit; the same command
# goes on where an earlier one stopped, also on another machine:
#
#     bash benchmarks/studies.sh OUT SECONDS [OPTION...]
#
# OUT is a folder for the results: one file of results for each study, what was tuned, the speed-ups,
# reports and the figure; nothing else is written there. Earlier results are taken from OUT, or from
# FROM (benchmarks/results/studies). SECONDS is when the last run should have ended, from now on.
# Options are those of `python -m train.study`, such as --data.source, and the same in every call.
#
# First `tuning`, to its end or for at most TUNING_SECONDS; then `evidence` from the learning rates
# and the batch that it found best. SPEEDUPS is the step benchmark's result that gives the speed of
# a sparse step; what was chosen and read once stays in OUT for later calls. A_GPU=4 says how many
# runs share a GPU (TUNING_A_GPU=6 in the sweep, whose runs are short), BASE which configuration is
# varied, SCRATCH where compiled programs lie.
set -uo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 2 ] || { echo "usage: bash benchmarks/studies.sh OUT SECONDS [OPTION...]" >&2; exit 2; }
out=$1 seconds=$2
shift 2
mkdir -p "$out"
from=${FROM:-benchmarks/results/studies}
scratch=${SCRATCH:-$(mktemp -d)}
speedups=${SPEEDUPS:-benchmarks/results/step_h100_llama1b.json}
gpus=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}
export PYTHONUNBUFFERED=1

for name in tuning.json evidence.json tuned.json speedups.json; do
  [ -e "$out/$name" ] || [ ! -e "$from/$name" ] || cp "$from/$name" "$out/$name"
done
if [ ! -e "$out/speedups.json" ]; then
  python3 - "$speedups" "$out/speedups.json" <<'PY' || exit
import json, sys
from pathlib import Path
found = json.loads(Path(sys.argv[1]).read_text())
kept = {k: found.get(k) for k in ("benchmark", "device", "commit", "sparse_step_speedup")}
Path(sys.argv[2]).write_text(json.dumps(kept, indent=1) + "\n")
PY
fi

study() { # name, latest end in seconds from the script's start, runs a GPU, options
  local name=$1 left=$(($2 - SECONDS)) a_gpu=$3
  shift 3
  [ "$left" -gt 0 ] || return 0
  python3 -m train.study "$name" --output "$scratch/$name" --scratch "$scratch/work" \
    --export "$out/$name.json" --jobs $((a_gpu * gpus)) --budget-seconds "$left" \
    ${BASE:+--base "$BASE"} --speedup-from "$out/speedups.json" "$@"
}

status=0
if [ ! -e "$out/tuned.json" ]; then
  limit=${TUNING_SECONDS:-$((seconds / 2))}
  study tuning "$limit" "${TUNING_A_GPU:-6}" "$@" || status=1
  python3 -m train.study.tuned "$out/tuning.json" "$out/tuned.json" || exit
  cp "$scratch/tuning/report.md" "$out/tuning.md"
fi
study evidence "$seconds" "${A_GPU:-4}" --tuned "$out/tuned.json" "$@" || status=1
[ ! -e "$scratch/evidence/report.md" ] || cp "$scratch/evidence/report.md" "$out/evidence.md"
[ ! -e "$scratch/evidence/pareto.png" ] || cp "$scratch/evidence/pareto.png" "$out/evidence_pareto.png"
exit $status

#!/bin/bash
# One process on each of several machines, started by hand or by any launcher. On machine I of N:
#
#   examples/launch/plain.sh HOST_OF_MACHINE_0:8476 N I --config llama1b --mesh.fsdp 8
#
# Every machine gets the same arguments but I, and must see the same output folder. To try it on one
# machine, start it twice with JAX_LOCAL_DEVICE_IDS=0 and =1, or on a CPU with JAX_PLATFORMS=cpu.
set -euo pipefail

if (($# < 3)); then
    echo "usage: $0 COORDINATOR:PORT PROCESSES INDEX [arguments of train.main]" >&2
    exit 2
fi
export JAX_COORDINATOR_ADDRESS=$1 JAX_NUM_PROCESSES=$2 JAX_PROCESS_ID=$3
shift 3
exec python -m train.main "$@"

#!/usr/bin/env bash
# Check and time the GPU kernels: one command on a machine with a Hopper GPU, inside nine minutes.
#
#   bash benchmarks/gpu_suite.sh               results go to benchmarks/results/<gpu>/ (or $OUT)
#   bash benchmarks/gpu_suite.sh --minutes 5   begin no case after five minutes
#
# Without a GPU it says so and compares gist attention with dense attention on the CPU. MEGACONTEXT_PYTHON names an
# interpreter that has JAX with CUDA; otherwise the project's environment is made or used.

set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/common.sh
help_wanted "$0" "$@" && exit 0
setup_env || exit 2

python -m benchmarks.gpu_kernels "$@"

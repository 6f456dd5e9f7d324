#!/usr/bin/env bash
# Check and time the GPU kernels: one command on a machine with a Hopper GPU, inside nine minutes.
#
#   bash benchmarks/gpu_suite.sh               results go to benchmarks/results/<gpu>/ (or $OUT)
#   bash benchmarks/gpu_suite.sh --minutes 5   begin no case that could end after five minutes
#   bash benchmarks/gpu_suite.sh --limit 90    seconds that a case may take (60; a model of depth 12 twice that)
#
# Without a GPU it says so and compares gist attention with dense attention on the CPU. MEGACONTEXT_PYTHON names an
# interpreter that has JAX with CUDA. Otherwise the project's environment is used; where there is none, a python3
# that has all it takes, so that a machine without a network needs nothing; else the environment is made.

set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/common.sh
help_wanted "$0" "$@" && exit 0
ready='import importlib.util as u, megacontext_jax.infer.load
assert u.find_spec("jax_cuda13_plugin") or u.find_spec("jax_cuda12_plugin")'
if [ -z "${MEGACONTEXT_PYTHON:-}" ] && [ ! -x .venv/bin/python ] && python3 -c "$ready" 2>/dev/null; then
  MEGACONTEXT_PYTHON=python3
fi
setup_env || exit 2

python -m benchmarks.gpu_kernels "$@"

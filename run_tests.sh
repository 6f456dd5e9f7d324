#!/usr/bin/env bash
# Set up on a fresh machine, check the style, run the whole test suite.
#
#   bash run_tests.sh                    the suite (two workers)
#   bash run_tests.sh --python 3.12      on another interpreter (its own newer JAX)
#   bash run_tests.sh -m slow            the long proofs; further arguments go to pytest

set -euo pipefail
cd "$(dirname "$0")"
source scripts/common.sh
help_wanted "$0" "$@" && exit 0

version=()
if [ "${1:-}" = --python ]; then
  version=(--python "${2:?--python needs a version, e.g. 3.12}")
  shift 2
fi
setup_env "${version[@]}" --dev || exit 2

python -m ruff check .
python -m ruff format --check .
python -m pytest -n 2 --dist loadfile "$@"

#!/usr/bin/env bash
# Train, evaluate and chat with a small model on this machine: one command from nothing to an answer.
#
#   bash run10.sh                    profile from the hardware: a GPU's, or cpu
#   bash run10.sh --gpu cpu          cpu | 5090 | h100 | h200
#   bash run10.sh --dry-run          print the plan and stop
#   bash run10.sh --mc               with MegaContext: gists, working contexts, lens
#   bash run10.sh --data-dir DIR     your own .parquet, .jsonl or .txt files
#   bash run10.sh --fresh            start again under a new tag; nothing is deleted
#
# Any flag of the scripts is passed on (--base.num-iterations 500, --seed 7, ...); numbers live in
# configs/run10_*.yaml. Interrupted? The same command continues. Everything lands in artifacts/.

set -euo pipefail
cd "$(dirname "$0")"
source scripts/common.sh
help_wanted "$0" "$@" && exit 0
setup_env || exit 2

begin_recipe run10 "$@" || exit 0
stage prepare_data "$@" # the built-in corpus, your folder, or the real shards
stage tok_train "$@"
stage tok_eval "$@"
stage base_train "$@"
stage base_loss "$@" -i base
stage mid_train "$@"
stage chat_eval "$@" -i mid
stage chat_sft "$@"
stage chat_eval "$@" -i sft
# what gists keep and what a lens adds, on tiny models of its own; without --tasks it runs all of them, over an hour
if with_mc; then stage long_context_eval "$@" --tasks "mqar_4x|mqar_8x"; fi
python -m megacontext_jax.telemetry.report generate
stage chat_cli "$@" -i sft --demo

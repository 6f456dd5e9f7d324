#!/usr/bin/env bash
# Train a depth-32 model on 8 H100 GPUs, evaluate it and chat with it.
#
#   bash run1000.sh                 needs 8 GPUs of 80 GB; WANDB_RUN names the wandb run
#   bash run1000.sh --mc             with MegaContext: gists, working contexts, lens
#   bash run1000.sh --dry-run       print the plan (stages, shapes, tokens, memory, FLOPs) on any machine
#
# Any flag of the scripts is passed on; numbers live in configs/run1000.yaml. Interrupted? The same command
# continues. Everything lands in artifacts/.

set -euo pipefail
cd "$(dirname "$0")"
source scripts/common.sh
help_wanted "$0" "$@" && exit 0
require_accelerators run1000 "$@" || exit $?
setup_env || exit 2

begin_recipe run1000 "$@" || exit 0
stage prepare_data "$@" # downloads the shards; --num-shards is in the configuration
stage tok_train "$@"
stage tok_eval "$@"
stage base_train "$@"
stage base_loss "$@" -i base
stage mid_train "$@"
stage chat_eval "$@" -i mid
stage chat_sft "$@"
stage chat_eval "$@" -i sft
if with_mc; then stage long_context_eval "$@"; fi # what gists keep and what a lens adds, on tiny models of its own
python -m megacontext_jax.telemetry.report generate
stage chat_cli "$@" -i sft --demo

#!/usr/bin/env bash
# The router over the seven adapters of train_all_tasks.sh; arguments go to training/train_moa.py.
#   ./scripts/train_moa.sh --model Qwen/Qwen2-0.5B
#   ./scripts/train_moa.sh --source pocket
set -euo pipefail
. "$(dirname "$0")/environment.sh"
activate_environment demo
exec accelerate launch --num_processes "${MOA_PROCESSES:-1}" --num_machines 1 --mixed_precision no --dynamo_backend no \
    "$root/training/train_moa.py" --tasks seven "$@"

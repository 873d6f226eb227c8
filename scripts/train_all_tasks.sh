#!/usr/bin/env bash
# One LoRA for each of the seven tasks; arguments go to training/train_lora.py.
#   ./scripts/train_all_tasks.sh --model Qwen/Qwen2-0.5B
#   ./scripts/train_all_tasks.sh --source pocket --max_steps 60
set -euo pipefail
. "$(dirname "$0")/environment.sh"
activate_environment demo
exec python "$root/training/train_lora.py" --tasks seven "$@"

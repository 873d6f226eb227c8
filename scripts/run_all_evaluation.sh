#!/usr/bin/env bash
# Base, every LoRA, the mixture and every merge on every task; arguments go to evaluation/full_evaluation.py.
#   ./scripts/run_all_evaluation.sh --mixture outputs/moa
#   ./scripts/run_all_evaluation.sh --source pocket --rows 60
set -euo pipefail
. "$(dirname "$0")/environment.sh"
activate_environment demo
exec python "$root/evaluation/full_evaluation.py" "$@"

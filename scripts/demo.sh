#!/usr/bin/env bash
# From a bare clone to the answer: train a LoRA for each task, fit a router, merge, compare.
#   ./scripts/demo.sh
#   ./scripts/demo.sh --tasks "sst2 squad mnli" --steps 30
#   ./scripts/demo.sh --tasks "sst2 mnli piqa" --data_dir my_data --steps 200
#   ./scripts/demo.sh --model Qwen/Qwen2-0.5B --source hub --steps 500
set -euo pipefail
. "$(dirname "$0")/environment.sh"

usage() {
    cat <<'HELP'
usage: demo.sh [--tasks "A B ..."] [--steps N] [--model NAME] [--source pocket|hub] [--data_dir DIR] [--output_dir DIR]

  --tasks       tasks to learn, default the seven families; README.md lists more, a .yaml is your own
  --steps       training steps for each LoRA, 8 rows a step (default 60)
  --model       base model: a Hub name, a folder, or smollm2-135m (default), which needs no network
  --source      pocket: built-in rows (default); hub: the public data sets
  --data_dir    your rows: DIR/TASK/{train,validation,test}.jsonl
  --rows        test examples a task (default 50)
  --output_dir  where everything goes (default outputs/demo)

Run it again to go on after Ctrl-C: what is finished is kept.
HELP
}

main() {
    tasks="cnn_dailymail wmt14 squad sst2 mnli paws piqa" steps=60 rows=50 model=smollm2-135m output=outputs/demo
    source=(--source pocket)
    while [ $# -gt 0 ]; do
        case "$1" in -h | --help) usage; exit 0 ;; esac
        if [ $# -lt 2 ]; then
            echo "error: $1 needs a value (demo.sh --help lists the options)" >&2
            exit 2
        fi
        case "$1" in
            --tasks) tasks="$2" ;;
            --steps) steps="$2" ;;
            --rows) rows="$2" ;;
            --model) model="$2" ;;
            --source) source=(--source "$2") ;;
            --data_dir) source=(--data_dir "$(realpath "$2")") ;;
            --output_dir) output="$(realpath -m "$2")" ;;
            *) echo "error: unknown option $1 (demo.sh --help lists the options)" >&2; exit 2 ;;
        esac
        shift 2
    done

    activate_environment demo
    cd "$root"
    read -r -a tasks <<<"$tasks"
    echo "demo: ${#tasks[@]} LoRAs of $steps steps, a router, five merges, one table"
    echo "      about $(((${#tasks[@]} * (steps + 45) + 59) / 60)) minutes on 2 cores; results in $output/evaluation"

    local limits=(--rows "$rows" --other_rows 16 --validation_rows 8 --scales 0.25 0.5 1 2 3)
    if [ "${source[1]}" = pocket ]; then
        limits+=(--max_new_tokens 20) # their answers are shorter than the real tasks'
    fi

    python training/train_lora.py --tasks "${tasks[@]}" --model "$model" "${source[@]}" --output_dir "$output/lora" \
        --max_steps "$steps" --train_rows "$((steps * 8))" --learning_rate 2e-3 --attn_implementation eager \
        --resume_from_checkpoint
    python training/train_moa.py --tasks "${tasks[@]}" --model "$model" "${source[@]}" --output_dir "$output/moa" \
        --adapters "$output/lora" --resume_from_checkpoint
    python evaluation/full_evaluation.py --tasks "${tasks[@]}" --model "$model" "${source[@]}" \
        --mixture "$output/moa" --output_dir "$output/evaluation" "${limits[@]}"
}

main() {
    tasks="cnn_dailymail wmt14 squad sst2 mnli paws piqa" steps=60 rows=50 model=smollm2-135m output=outputs/demo
    source=(--source pocket)
    while [ $# -gt 0 ]; do
        case "$1" in -h | --help) usage; exit 0 ;; esac
        if [ $# -lt 2 ]; then
            echo "error: $1 needs a value (demo.sh --help lists the options)" >&2
            exit 2
        fi
        case "$1" in
            --tasks) tasks="$2" ;;
            --steps) steps="$2" ;;
            --rows) rows="$2" ;;
            --model) model="$2" ;;
            --source) source=(--source "$2") ;;
            --data_dir) source=(--data_dir "$(realpath "$2")") ;;
            --output_dir) output="$(realpath -m "$2")" ;;
            *) echo "error: unknown option $1 (demo.sh --help lists the options)" >&2; exit 2 ;;
        esac
        shift 2
    done

    activate_environment demo
    cd "$root"
    read -r -a tasks <<<"$tasks"
    echo "demo: ${#tasks[@]} LoRAs of $steps steps, a router, five merges, one table"
    echo "      about $(((${#tasks[@]} * (steps + 45) + 59) / 60)) minutes on 2 cores; results in $output/evaluation"

    python training/train_lora.py --tasks "${tasks[@]}" --model "$model" "${source[@]}" \
        --attn_implementation eager --learning_rate 2e-3 --max_steps "$steps" --train_rows "$((steps * 8))" --output_dir "$output/lora" --resume_from_checkpoint
    python training/train_moa.py --tasks "${tasks[@]}" --model "$model" "${source[@]}" \
        --adapters "$output/lora" --output_dir "$output/moa" --resume_from_checkpoint
    python evaluation/full_evaluation.py --mixture "$output/moa" --tasks "${tasks[@]}" --model "$model" "${source[@]}" \
        --rows "$rows" --other_rows 16 --validation_rows 8 --max_new_tokens 20 --scales 0.25 0.5 1 2 3 --output_dir "$output/evaluation"
}

main "$@"

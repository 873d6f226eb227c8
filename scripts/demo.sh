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
  --rows        test examples a task (default 50)
  --model       base model: a Hub name, a folder, or smollm2-135m (default), which needs no network
  --source      pocket: built-in rows (default); hub: the public data sets
  --data_dir    your rows: DIR/TASK/{train,validation,test}.jsonl
  --output_dir  where everything goes (default outputs/demo beside this script's folder)

Run it again to go on after Ctrl-C: what is finished is kept.
HELP
}

refuse() {
    echo "error: $1 (demo.sh --help lists the options)" >&2
    exit 2
}

main() {
    local tasks="cnn_dailymail wmt14 squad sst2 mnli paws piqa" steps=60 rows=50 model=smollm2-135m
    local output="$root/outputs/demo" source=pocket data_dir=""
    while [ $# -gt 0 ]; do
        case "$1" in
            -h | --help) usage; exit 0 ;;
            --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
        esac
        case "$1" in
            --tasks | --steps | --rows | --model | --source | --data_dir | --output_dir) ;;
            *) refuse "unknown option $1: the options are --tasks --steps --rows --model --source --data_dir --output_dir" ;;
        esac
        [ $# -ge 2 ] || refuse "$1 needs a value"
        case "$1" in
            --tasks) tasks="$2" ;;
            --steps) steps="$2" ;;
            --rows) rows="$2" ;;
            --model) model="$2" ;;
            --source) source="$2" ;;
            --data_dir) data_dir="$2" ;;
            --output_dir) output="$2" ;;
        esac
        shift 2
    done
    [[ "$steps" =~ ^[1-9][0-9]*$ ]] || refuse "--steps must be a whole number from 1 on, got '$steps'"
    [[ "$rows" =~ ^[1-9][0-9]*$ ]] || refuse "--rows must be a whole number from 1 on, got '$rows'"
    [ "$source" = pocket ] || [ "$source" = hub ] || refuse "--source must be pocket or hub, got '$source'"
    [ -z "$data_dir" ] || [ -d "$data_dir" ] || refuse "--data_dir $data_dir is no folder"

    read -r -a tasks <<<"$tasks"
    local rows_from=(--source "$source") limits=(--rows "$rows" --other_rows 16 --validation_rows 8)
    limits+=(--scales 0.25 0.5 1 2 3)
    if [ -n "$data_dir" ]; then
        rows_from=(--data_dir "$data_dir")
    elif [ "$source" = pocket ]; then
        limits+=(--max_new_tokens 20) # the answers are shorter than the real tasks'
    fi
    local common=(--tasks "${tasks[@]}" --model "$model" "${rows_from[@]}")

    activate_environment demo
    echo "demo: ${#tasks[@]} LoRAs of $steps steps, a router, seven merges, one table"
    echo "      about $(((${#tasks[@]} * (steps + 45) + 59) / 60)) minutes on 2 cores with AVX-512, three times that on older ones"
    echo "      results in $output/evaluation"
    python "$root/training/train_lora.py" "${common[@]}" --output_dir "$output/lora" \
        --max_steps "$steps" --train_rows "$((steps * 8))" --learning_rate 2e-3 --attn_implementation eager \
        --resume_from_checkpoint
    python "$root/training/train_moa.py" "${common[@]}" --adapters "$output/lora" --output_dir "$output/moa" \
        --resume_from_checkpoint
    moa statistics "${common[@]}" --adapters "$output/moa" --rows 96 # what the best merges need
    python "$root/evaluation/full_evaluation.py" "${common[@]}" --mixture "$output/moa" \
        --output_dir "$output/evaluation" "${limits[@]}" \
        --methods average concatenation factor_sum svd ties regmean regmean:rank=8
}

main "$@"

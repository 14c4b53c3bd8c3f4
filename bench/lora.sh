#!/usr/bin/env bash
#
# The RL stages of the toy cascade once more, with LoRA: what each one gains and what it forgets, beside full
# training.
#
#   bash bench/lora.sh      needs a finished `bash run_cascade.sh`. Trains in out/toy-lora, from the data and
#                           the SFT checkpoint of out/toy, and ends with the matrix and with the table that
#                           bench/lora.py prints. The same command goes on after a crash
#
# Environment variables: those of run_cascade.sh; SEED=1 takes out/toy-seed1. SFT is that of the full run: it
# starts from random weights, and an adapter beside random weights has nothing to adapt.

source "$(dirname "$0")/../run_cascade.sh" toy
full=$OUT
OUT=$full-lora
setup

if [ "${DRY_RUN:-}" != 1 ]; then
    if [ ! -e "$full/swerl/scored" ]; then
        echo "bench/lora.sh: $full is not finished: bash run_cascade.sh comes first." >&2
        exit 2
    fi
    # What is not trained again is linked, so that toy() finds it done. The scores of SFT go along.
    mkdir -p "$OUT"
    for part in data sft1 sft2; do
        ln -sfn "$(realpath "$full/$part")" "$OUT/$part"
    done
    if [ ! -e "$OUT/results.jsonl" ]; then
        grep '"stage": "sft"' "$full/results.jsonl" > "$OUT/results.jsonl"
    fi
fi

# A measurement goes on where a gate of the cascade would break: what is lost is what it is about.
score() {
    measure --model="$OUT/$1/final" --stage="$1" --results="$OUT/results.jsonl"
    run touch "$OUT/$1/scored"
}

# Rank 8 trains 31K numbers, 9% of the weights. The learning rates are ten times those of full training.
RLHF_FLAGS="--lora_rank=8 --lr=3e-3 ${RLHF_FLAGS:-}"
IFRL_FLAGS="--lora_rank=8 --lr=3e-3 ${IFRL_FLAGS:-}"
MATHRL_FLAGS="--lora_rank=8 --lr=6e-3 ${MATHRL_FLAGS:-}"
CODERL_FLAGS="--lora_rank=8 --lr=5e-3 ${CODERL_FLAGS:-}"
SWERL_FLAGS="--lora_rank=8 --lr=3e-3 ${SWERL_FLAGS:-}"
toy
run .venv/bin/python evaluate.py --matrix="$OUT"
run .venv/bin/python bench/lora.py --full="$full" --other="$OUT"

#!/usr/bin/env bash
# The control of the toy cascade: beside each RL stage, as many seconds of SFT on the same demonstrations, from the same checkpoint.
#
#   bash bench/control.sh      needs a finished `bash run_cascade.sh`; ends with its matrix, in which every RL stage stands beside its control
#
# Environment: that of run_cascade.sh. Here and not there, because it is a measurement: no stage of the recipe starts from what it trains.
source "$(dirname "$0")/../run_cascade.sh" toy
TASKS=all-toy LIMIT=240 before=sft2
setup
for name in rlhf ifrl mathrl coderl swerl; do
    steps=$([ "${DRY_RUN:-}" = 1 ] && echo 1 || .venv/bin/python evaluate.py --same_compute="$OUT/$name,$OUT/sft2")
    FROM=$OUT/$before/final
    stage ${name}_control sft --data="$OUT/data/sft_stage2.jsonl" --lr=2e-3 --num_steps="$steps" --schedule_steps="$steps" \
        --samples_per_step=64 --max_seq_len=512 --micro_batch_tokens=8192 --warmup_steps=10 --eval_every=0 --shard=replicate
    before=$name
done
run .venv/bin/python evaluate.py --matrix="$OUT"

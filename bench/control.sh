#!/usr/bin/env bash
#
# The control of the toy cascade: beside each RL stage, as many seconds of SFT on the same demonstrations,
# from the same checkpoint. It separates what RL teaches from what more training would have taught.
#
#   bash bench/control.sh      needs a finished `bash run_cascade.sh`; ends with the matrix of the run, in
#                              which every RL stage stands beside its control
#
# Environment variables: those of run_cascade.sh. The control is not part of run_cascade.sh, because it is a
# measurement: no stage of the recipe starts from a control.

source "$(dirname "$0")/../run_cascade.sh" toy
TASKS=all-toy LIMIT=250
setup

before=sft2  # the stage from which the RL stage started, and from which its control starts as well
for name in rlhf ifrl mathrl coderl swerl; do
    # The number of SFT steps that take as many seconds as the RL stage took.
    steps=1
    if [ "${DRY_RUN:-}" != 1 ]; then
        steps=$(.venv/bin/python evaluate.py --same_compute="$OUT/$name,$OUT/sft2")
    fi
    stage ${name}_control $LAUNCH sft.py \
        --init_from="$OUT/$before/final" --out_dir="$OUT/${name}_control" \
        --data="$OUT/data/sft_stage2.jsonl" \
        --num_steps="$steps" --schedule_steps="$steps" --warmup_steps=10 --lr=2e-3 \
        --samples_per_step=64 --max_seq_len=512 --micro_batch_tokens=8192 --eval_every=0 --shard=replicate
    before=$name
done
run .venv/bin/python evaluate.py --matrix="$OUT"

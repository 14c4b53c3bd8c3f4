#!/usr/bin/env bash
#
# Two controls of the toy cascade. Beside each RL stage, from the same checkpoint and for as many seconds:
#
#   NAME_control     more SFT on the same demonstrations. It separates what RL teaches from what more training
#                    would have taught.
#   NAME_rejection   SFT on the policy's own samples that the verifier passed (extras/rejection.py): as many
#                    samples of the same prompts as the RL stage drew, then SFT for the seconds that are left.
#                    It separates policy gradients from imitation of what the verifier lets through.
#
#   bash bench/control.sh      needs a finished `bash run_cascade.sh`; ends with the matrix of the run, in
#                              which every RL stage stands beside its controls: what each one gains on the
#                              skill of the stage, and what it costs the others
#
# The seconds are those of the clock: the machine has to be as quiet, and NPROC the same, as in the cascade.
#
# Environment variables: those of run_cascade.sh. The controls are not part of run_cascade.sh, because they
# are measurements: no stage of the recipe starts from a control.

source "$(dirname "$0")/../run_cascade.sh" toy
TASKS=all-toy LIMIT=250  # all skills: a control may gain its own and lose the others
setup

# same_seconds FOLDERS: the number of SFT steps that take the seconds of the RL stage (evaluate.py).
same_seconds() {
    if [ "${DRY_RUN:-}" = 1 ]; then echo 1; return; fi
    .venv/bin/python evaluate.py --same_compute="$1"
}

# control NAME DATA STEPS: SFT on DATA from the checkpoint from which the RL stage started.
control() {
    stage "$1" $LAUNCH sft.py \
        --init_from="$OUT/$before/final" --out_dir="$OUT/$1" --data="$2" \
        --num_steps="$3" --schedule_steps="$3" --warmup_steps=10 --lr=2e-3 \
        --samples_per_step=64 --max_seq_len=512 --micro_batch_tokens=8192 --eval_every=0 --shard=replicate
}

before=sft2
for name in rlhf ifrl mathrl coderl swerl; do
    steps=$(same_seconds "$OUT/$name,$OUT/sft2")
    control ${name}_control "$OUT/data/sft_stage2.jsonl" "$steps"

    samples=$OUT/rejection/$name
    run $LAUNCH extras/rejection.py --like="$OUT/$name" --out_dir="$samples"
    steps=$(same_seconds "$OUT/$name,$OUT/sft2,$samples")
    control ${name}_rejection "$samples/rows.jsonl" "$steps"
    before=$name
done
run .venv/bin/python evaluate.py --matrix="$OUT"

#!/usr/bin/env bash
#
# MOPD after the toy cascade (extras/mopd.py, from Nemotron-Cascade 2): distil back the skills that later
# stages lost. The teachers are the cascade's own checkpoints: each one teaches the skill of its stage.
#
#   bash bench/mopd.sh      needs a finished `bash run_cascade.sh`; ends with its matrix, one stage longer
#
# Environment variables: those of run_cascade.sh. MOPD is not part of run_cascade.sh, because the recipe of
# the paper ends with SWE RL.

source "$(dirname "$0")/../run_cascade.sh" toy
TASKS=all-toy LIMIT=250
data=$OUT/data
setup

# One teacher a line: the domain, its prompts and the checkpoint that teaches it. SPLIT becomes rl, then dev.
teachers=rlhf:$data/chat_SPLIT.jsonl:$OUT/rlhf/final
teachers+=,ifrl:$data/if_SPLIT.jsonl:$OUT/ifrl/final
teachers+=,mathrl:$data/math_SPLIT.jsonl:$OUT/mathrl/final
teachers+=,coderl:$data/code_SPLIT.jsonl:$OUT/coderl/final
teachers+=,swerl:$data/swe_SPLIT.jsonl:$OUT/swerl/final

stage mopd $LAUNCH extras/mopd.py \
    --init_from="$OUT/swerl/final" --out_dir="$OUT/mopd" \
    --data="${teachers//SPLIT/rl}" --eval_data="${teachers//SPLIT/dev}" \
    --num_steps=40 --warmup_steps=3 --lr=3e-4 --final_lr=0.1 \
    --prompts_per_step=64 --max_prompt_tokens=256 --max_new_tokens=96 --micro_batch_tokens=8192 \
    --save_every=20 --shard=replicate
run .venv/bin/python evaluate.py --matrix="$OUT"

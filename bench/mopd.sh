#!/usr/bin/env bash
# What later stages lost, distilled back after the toy cascade (extras/mopd.py, Cascade 2): its own checkpoints teach, each the skill that it was trained for.
#
#   bash bench/mopd.sh      needs a finished `bash run_cascade.sh`; ends with its matrix, one stage longer
#
# Environment: that of run_cascade.sh. Here and not there, because the recipe of the paper ends with SWE RL.
source "$(dirname "$0")/../run_cascade.sh" toy
TASKS=all-toy LIMIT=240 FROM=$OUT/swerl/final d=$OUT/data
teachers=rlhf:$d/chat_SPLIT.jsonl:$OUT/rlhf/final,ifrl:$d/if_SPLIT.jsonl:$OUT/ifrl/final,mathrl:$d/math_SPLIT.jsonl:$OUT/mathrl/final
teachers+=,coderl:$d/code_SPLIT.jsonl:$OUT/coderl/final,swerl:$d/swe_SPLIT.jsonl:$OUT/swerl/final
setup
stage mopd extras/mopd --data="${teachers//SPLIT/rl}" --eval_data="${teachers//SPLIT/dev}" --lr=3e-4 --num_steps=40 --prompts_per_step=64 --warmup_steps=3 \
    --final_lr=0.1 --max_prompt_tokens=256 --max_new_tokens=80 --micro_batch_tokens=8192 --save_every=20 --shard=replicate
run .venv/bin/python evaluate.py --matrix="$OUT"

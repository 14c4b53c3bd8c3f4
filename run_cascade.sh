#!/usr/bin/env bash
# The Nemotron-Cascade recipe (arXiv 2512.13607), stage after stage. Finished stages are skipped, an interrupted one resumes.
#
#   bash run_cascade.sh                  toy: tiny model, real verifiers, 2 CPU cores, about 10 minutes after set-up
#   bash run_cascade.sh 8b               8b | 8b-thinking | 14b-thinking | 0.6b: the paper's lines (appendix tables T14-T20)
#   bash run_cascade.sh control          toy, afterwards: the compute of each RL stage spent on more SFT instead
#   bash run_cascade.sh setup            only install into .venv
#
# Environment: NPROC ranks a node, OUT folder, SEED, BASE and RM for real sizes (model folders), DRY_RUN=1 prints the commands,
# LAUNCH replaces the launcher, e.g. LAUNCH="torchrun --nnodes=4 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=$HOST:29500".
set -euo pipefail
cd "$(dirname "$0")"
PRESET=${1:-toy}
SEED=${SEED:-0}
OUT=${OUT:-out/${PRESET/control/toy}$([ "$SEED" = 0 ] || echo "-seed$SEED")}
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if nvidia-smi -L 2>/dev/null | grep -q GPU; then GPUS=$(nvidia-smi -L | grep -c GPU); else GPUS=0; fi
CORES=$(env -u OMP_NUM_THREADS nproc 2>/dev/null || sysctl -n hw.ncpu)  # nproc would report OMP_NUM_THREADS
NPROC=${NPROC:-$((GPUS > 0 ? GPUS : CORES > 1 ? 2 : 1))}

setup() {  # .venv with the pinned packages; without an NVIDIA GPU vLLM and the CUDA builds stay out
    [ "${DRY_RUN:-}" = 1 ] && return
    local wanted; wanted=$(cat requirements.txt; echo "gpus: $((GPUS > 0))")
    [ "$(cat .venv/installed 2>/dev/null)" = "$wanted" ] && return
    echo "== setup: installing requirements.txt into .venv (minutes)"
    python3 -m venv .venv
    .venv/bin/pip install -q "$(grep '^torch==' requirements.txt)" 2> >(grep -v WARNING >&2 || true)
    grep -v "$([ "$GPUS" = 0 ] && echo '^vllm' || echo '^$')" requirements.txt > .venv/requirements.txt
    .venv/bin/pip install -q -r .venv/requirements.txt 2> >(grep -v WARNING >&2 || true)
    echo "$wanted" > .venv/installed
}

run() { if [ "${DRY_RUN:-}" = 1 ]; then echo "$@"; else "$@"; fi; }
LAUNCH=${LAUNCH:-.venv/bin/torchrun --nproc_per_node=$NPROC --rdzv-backend=c10d --rdzv-endpoint=localhost:0}

stage() {  # stage NAME SCRIPT PREVIOUS [flags]: train unless done; on the toy every finished stage is evaluated at once
    local name=$1 script=$2 previous=$3; shift 3
    if [ -e "$OUT/$name/final" ]; then echo "== $name: done"; else
        echo "== $name: $previous -> $OUT/$name"
        run $LAUNCH "$script.py" --init_from="$previous" --out_dir="$OUT/$name" --seed="$SEED" "$@"
    fi
}
score() {  # score NAME LABEL: held-out skills of a finished toy stage, once
    [ -e "$OUT/$1/scored" ] && return
    run $LAUNCH evaluate.py --model="$OUT/$1/final" --stage="$2" --data="$OUT/data" --results="$OUT/results.jsonl" --label_seed="$SEED" --limit=260
    run touch "$OUT/$1/scored"
}

toy() {
    [ -e "$OUT/data/done" ] || { run .venv/bin/python toy.py --out="$OUT/data" --seed="$SEED"; run touch "$OUT/data/done"; }
    local d=$OUT/data
    local sft="--samples_per_step=128 --max_seq_len=512 --micro_batch_tokens=8192 --warmup_steps=20 --eval_every=0 --save_every=100"
    local rl="--prompts_per_step=16 --group_size=8 --temperature=1.0 --top_p=1.0 --top_k=0 --max_prompt_tokens=256 --max_new_tokens=80
        --micro_batch_tokens=8192 --reward_workers=2 --final_lr=0.1 --eval_every=25 --eval_rows=150 --save_every=20 --sample_every=20"
    stage sft1 sft "$d/base" --data="$d/sft_stage1.jsonl" --lr=6e-3 --num_steps=140 --schedule_steps=400 $sft
    stage sft2 sft "$OUT/sft1/final" --data="$d/sft_stage2.jsonl" --lr=5e-3 --num_steps=300 --schedule_steps=300 $sft
    score sft2 sft
    stage rlhf rlhf "$OUT/sft2/final" --data="$d/chat_rl.jsonl" --eval_data="$d/chat_dev.jsonl" --rm_data="$d/preference.jsonl" \
        --rm_eval_data="$d/preference_dev.jsonl" --rm_lr=2e-3 --rm_samples_per_step=32 --rm_epochs=2 --lr=4e-4 --num_steps=50 $rl
    score rlhf rlhf
    stage ifrl ifrl "$OUT/rlhf/final" --data="$d/if_rl.jsonl" --eval_data="$d/if_dev.jsonl" --lr=6e-4 --num_steps=90 $rl --max_refill_rounds=1
    score ifrl ifrl
    stage mathrl mathrl "$OUT/ifrl/final" --data="$d/math_rl.jsonl" --eval_data="$d/math_dev.jsonl" --lr=6e-4 --num_steps=50 $rl
    score mathrl mathrl
    stage coderl coderl "$OUT/mathrl/final" --data="$d/code_rl.jsonl" --eval_data="$d/code_dev.jsonl" --lr=5e-4 --num_steps=60 $rl
    score coderl coderl
    stage swerl swerl "$OUT/coderl/final" --data="$d/swe_rl.jsonl" --eval_data="$d/swe_dev.jsonl" --min_prompt_tokens=0 --lexical_floor=0.98 --lr=3e-4 --num_steps=80 $rl
    score swerl swerl
    run .venv/bin/python evaluate.py --matrix="$OUT"
}

control() {  # beside each RL stage: as many seconds of SFT on the same demonstrations, from the same checkpoint
    local before=sft2 name steps
    for name in rlhf ifrl mathrl coderl swerl; do
        steps=$(.venv/bin/python evaluate.py --same_compute="$OUT/$name,$OUT/sft2")
        stage ${name}_control sft "$OUT/$before/final" --data="$OUT/data/sft_stage2.jsonl" --lr=2e-3 --num_steps="$steps" \
            --schedule_steps="$steps" --samples_per_step=128 --max_seq_len=512 --micro_batch_tokens=8192 --warmup_steps=10 --eval_every=0
        score ${name}_control ${name}_control
        before=$name
    done
    .venv/bin/python evaluate.py --matrix="$OUT"
}

case $PRESET in
    setup) setup ;;
    toy) setup; toy ;;
    control) setup; control ;;
    *) echo "usage: bash run_cascade.sh [toy|control|setup]" >&2; exit 2 ;;
esac

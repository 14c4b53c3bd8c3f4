#!/usr/bin/env bash
# The Nemotron-Cascade recipe (arXiv 2512.13607), stage after stage. Finished stages are skipped, an interrupted one resumes.
#
#   bash run_cascade.sh                  toy: tiny model, real verifiers, 2 CPU cores, about 12 minutes after set-up
#   BASE=folder bash run_cascade.sh 8b   8b | 8b-thinking | 14b-thinking: the paper's runs (tables T14-T20); 0.6b: the 8b lines
#   bash run_cascade.sh control          toy, afterwards: the compute of each RL stage spent on more SFT instead
#   bash run_cascade.sh mopd             toy, afterwards: distil what later stages lost back from earlier ones (Cascade 2)
#   bash run_cascade.sh setup            only install into .venv
#
# Environment: NPROC ranks a node, OUT folder, SEED, BASE and RM (folders of the base and of a ready reward model, for the
# real sizes), TASKS measured after each stage (e.g. ifeval,math500; files in EVAL_DATA; toy: all), KEEP_BEST=1: a broken gate
# takes the stage's best checkpoint and goes on, DRY_RUN=1 prints the commands, PIP_EXTRA_INDEX_URL the index of PyTorch's CPU
# wheels where pip needs one, LAUNCH replaces the launcher,
# e.g. LAUNCH="torchrun --nnodes=4 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=$HOST:29500".
set -euo pipefail
cd "$(dirname "$0")"
PRESET=${1:-toy}
SEED=${SEED:-0}
OUT=${OUT:-out/$([[ $PRESET = control || $PRESET = mopd ]] && echo toy || echo "$PRESET")$([ "$SEED" = 0 ] || echo "-seed$SEED")}
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

stage() {  # stage NAME SCRIPT PREVIOUS [flags]: train unless done
    local name=$1 script=$2 previous=$3; shift 3
    if [ -e "$OUT/$name/final" ]; then echo "== $name: done"; else
        echo "== $name: $previous -> $OUT/$name"
        run $LAUNCH "$script.py" --init_from="$previous" --out_dir="$OUT/$name" --seed="$SEED" "$@"
    fi
    [ -z "${TASKS:-}" ] || [ "$name" = sft1 ] || score "$name" "${name/sft2/sft}"
}
score() {  # score NAME LABEL: held-out tasks of a finished stage, once; a broken gate stops here, or takes its best checkpoint
    [ -e "$OUT/$1/scored" ] && return
    local e="$LAUNCH evaluate.py --tasks=$TASKS --data=${EVAL_DATA:-$OUT/data} --label_seed=$SEED --limit=${LIMIT:-0}"
    run $e --model="$OUT/$1/final" --stage="$2" --results="$OUT/results.jsonl"
    if [ -s "$OUT/broken_gate" ]; then
        cat "$OUT/broken_gate" >&2; [ "${KEEP_BEST:-}" = 1 ] || exit 2
        for c in "$OUT/$1"/step_*; do $e --model="$c" --results="$OUT/$1/candidates.jsonl" --split=dev; done
        .venv/bin/python evaluate.py --keep_best="$OUT/$1"
        $e --model="$OUT/$1/final" --stage="$2" --results="$OUT/results.jsonl"
    fi
    run touch "$OUT/$1/scored"
}

toy() {
    [ -e "$OUT/data/done" ] || { run .venv/bin/python toy.py --out="$OUT/data" --seed="$SEED"; run touch "$OUT/data/done"; }
    local d=$OUT/data TASKS=all-toy LIMIT=260
    local sft="--samples_per_step=128 --max_seq_len=512 --micro_batch_tokens=8192 --warmup_steps=20 --eval_every=0 --save_every=100"
    local rl="--rope_factor=0 --prompts_per_step=16 --group_size=8 --temperature=1.0 --top_p=1.0 --top_k=0 --max_prompt_tokens=256 --max_new_tokens=80
        --micro_batch_tokens=8192 --reward_workers=2 --final_lr=0.1 --eval_every=25 --eval_rows=150 --save_every=25 --sample_every=20"
    stage sft1 sft "$d/base" --data="$d/sft_stage1.jsonl" --lr=6e-3 --num_steps=140 --schedule_steps=400 $sft
    stage sft2 sft "$OUT/sft1/final" --data="$d/sft_stage2.jsonl" --lr=5e-3 --num_steps=300 --schedule_steps=300 $sft
    stage rlhf rlhf "$OUT/sft2/final" --data="$d/chat_rl.jsonl" --eval_data="$d/chat_dev.jsonl" --rm_data="$d/preference.jsonl" \
        --rm_eval_data="$d/preference_dev.jsonl" --rm_lr=2e-3 --rm_samples_per_step=32 --rm_epochs=2 --lr=3e-4 --num_steps=40 --kl_coef=0.1 --shape_reward=true $rl
    stage ifrl ifrl "$OUT/rlhf/final" --data="$d/if_rl.jsonl" --eval_data="$d/if_dev.jsonl" --lr=4e-4 --num_steps=90 $rl --max_refill_rounds=1
    stage mathrl mathrl "$OUT/ifrl/final" --data="$d/math_rl.jsonl" --eval_data="$d/math_dev.jsonl" --lr=6e-4 --num_steps=50 $rl
    stage coderl coderl "$OUT/mathrl/final" --data="$d/code_rl.jsonl" --eval_data="$d/code_dev.jsonl" --lr=5e-4 --num_steps=60 $rl
    stage swerl swerl "$OUT/coderl/final" --data="$d/swe_rl.jsonl" --eval_data="$d/swe_dev.jsonl" --min_prompt_tokens=0 --lexical_floor=0.98 \
        --lr=3e-4 --num_steps=90 --overlong_filter=false $rl  # filtered, nothing would keep it from never ending
}

control() {  # beside each RL stage: as many seconds of SFT on the same demonstrations, from the same checkpoint
    local before=sft2 name steps TASKS=all-toy LIMIT=260
    for name in rlhf ifrl mathrl coderl swerl; do
        steps=$([ "${DRY_RUN:-}" = 1 ] && echo 1 || .venv/bin/python evaluate.py --same_compute="$OUT/$name,$OUT/sft2")
        stage ${name}_control sft "$OUT/$before/final" --data="$OUT/data/sft_stage2.jsonl" --lr=2e-3 --num_steps="$steps" \
            --schedule_steps="$steps" --samples_per_step=128 --max_seq_len=512 --micro_batch_tokens=8192 --warmup_steps=10 --eval_every=0
        before=$name
    done
    run .venv/bin/python evaluate.py --matrix="$OUT"
}

mopd() {  # teachers are the cascade's own checkpoints, each for the skill that it taught
    local d=$OUT/data t="" TASKS=all-toy LIMIT=260
    t=rlhf:$d/chat_SPLIT.jsonl:$OUT/rlhf/final,ifrl:$d/if_SPLIT.jsonl:$OUT/ifrl/final,mathrl:$d/math_SPLIT.jsonl:$OUT/mathrl/final
    t+=,coderl:$d/code_SPLIT.jsonl:$OUT/coderl/final,swerl:$d/swe_SPLIT.jsonl:$OUT/swerl/final
    stage mopd mopd "$OUT/swerl/final" --data="${t//SPLIT/rl}" --eval_data="${t//SPLIT/dev}" --lr=3e-4 --num_steps=40 --prompts_per_step=64 \
        --warmup_steps=3 --final_lr=0.1 --max_prompt_tokens=256 --max_new_tokens=80 --micro_batch_tokens=8192 --save_every=20
    run .venv/bin/python evaluate.py --matrix="$OUT"
}

# The paper's runs. Where its text and its appendix tables (T14-T20) disagree, the tables win: RLHF and IF-RL take 256 prompts a step (text:
# 128), IF-RL the steps below (text: 2000 + 1000, thinking 500 + 300) and no overlong filter in stage 1 (text: thinking filters), Math its own
# temperatures (text: 1), Code its lengths and temperatures by model (text: 44-48K at 1), the 24K stage of SWE no filter (text: filters).
real() {  # sizes differ in these lines:
    local base=$BASE hub=nvidia/Nemotron-Cascade n=nvidia/Nemotron-RL-coding-competitive_coding
    local sft1=20000 sft2="--num_steps=32000 --lr=2e-5" share=0.5 rlhf=800 if1="--num_steps=2300" if2="--num_steps=800" code="" swe2=""
    [ "$PRESET" = 8b-thinking ] && if1="--num_steps=550 --think=true" && if2="--num_steps=300 --think=true --max_new_tokens=16384 --overlong_filter=true"
    [ "$PRESET" = 14b-thinking ] && sft1=22000 && sft2="--num_steps=41000 --lr=5e-5" && rlhf=900 && if1="--num_steps=800 --think=true" \
        && if2="--num_steps=120 --think=true --max_new_tokens=16384 --overlong_filter=true"
    [[ $PRESET = *-thinking ]] && share=1.0 && if1="$if1 --rm=${RM:-$OUT/rlhf/rm}" && if2="$if2 --rm=${RM:-$OUT/rlhf/rm}"
    stage sft1 sft "$base" --data=$hub-SFT-Stage-1 --num_steps=$sft1 --lr=5e-5 --max_seq_len=16384
    stage sft2 sft "$OUT/sft1/final" --data=$hub-SFT-Stage-2 $sft2 --max_seq_len=32768 --micro_batch_tokens=32768
    stage rlhf rlhf "$OUT/sft2/final" --data=$hub-RL-RLHF --num_steps=$rlhf --think_share=$share ${RM:+--rm=$RM}
    stage ifrl1 ifrl "$OUT/rlhf/final" --data=$hub-RL-Instruction-Following --taxonomy=ifeval $if1
    stage ifrl2 ifrl "$OUT/ifrl1/final" --data=nvidia/Nemotron-RL-instruction_following --taxonomy=iftrain $if2
    if [ "$PRESET" = 14b-thinking ]; then
        stage mathrl1 mathrl "$OUT/ifrl2/final" --max_new_tokens=28672 --num_steps=120 --temperature=1.2 --lr=2.5e-6
        stage mathrl3 mathrl "$OUT/mathrl1/final" --max_new_tokens=40960 --num_steps=100 --temperature=1.1 --lr=2.5e-6 --overlong_filter=false --rope_factor=2
        stage coderl coderl "$OUT/mathrl3/final" --data=$n --max_new_tokens=57344 --num_steps=64 --temperature=1.0 --rope_factor=2
        stage swerl swerl "$OUT/coderl/final" --max_prompt_tokens=32768 --num_steps=120 --overlong_filter=true --rope_factor=2
        return
    fi
    stage mathrl1 mathrl "$OUT/ifrl2/final" --max_new_tokens=24576 --num_steps=190 --temperature=1.0
    stage mathrl2 mathrl "$OUT/mathrl1/final" --max_new_tokens=32768 --num_steps=240 --temperature=1.0 --overlong_filter=false --rope_factor=2
    stage mathrl3 mathrl "$OUT/mathrl2/final" --max_new_tokens=40960 --num_steps=70 --temperature=0.8 --overlong_filter=false --rope_factor=2
    if [ "$PRESET" = 8b-thinking ]; then
        stage coderl coderl "$OUT/mathrl3/final" --data=$n --max_new_tokens=45056 --num_steps=64 --temperature=1.2 --rope_factor=2
    else  # 44K at temperature 1.0, then 48K at 0.8, 90 steps in all; the paper does not say where it switched
        stage coderl1 coderl "$OUT/mathrl3/final" --data=$n --max_new_tokens=45056 --num_steps=60 --temperature=1.0 --rope_factor=2
        stage coderl coderl "$OUT/coderl1/final" --data=$n --max_new_tokens=49152 --num_steps=30 --temperature=0.8 --rope_factor=2
    fi
    stage swerl1 swerl "$OUT/coderl/final" --max_prompt_tokens=16384 --num_steps=30 --overlong_filter=true --rope_factor=2
    stage swerl swerl "$OUT/swerl1/final" --max_prompt_tokens=24576 --num_steps=30 --overlong_filter=false --rope_factor=2
}

case $PRESET in
    setup) setup ;;
    toy) setup; toy; run .venv/bin/python report.py --run="$OUT" ;;
    control|mopd) setup; $PRESET ;;
    0.6b|8b|8b-thinking|14b-thinking)
        [ -n "${BASE:-}" ] || { echo "run_cascade.sh: set BASE to the folder of a Qwen3 base model." >&2; exit 2; }
        setup; real; [ -z "${TASKS:-}" ] || run .venv/bin/python report.py --run="$OUT" ;;
    *) echo "usage: bash run_cascade.sh [toy|control|mopd|0.6b|8b|8b-thinking|14b-thinking|setup]" >&2; exit 2 ;;
esac

#!/usr/bin/env bash
# The Nemotron-Cascade recipe (arXiv 2512.13607), stage after stage. Finished stages are skipped, an interrupted one resumes.
#
#   bash run_cascade.sh                  toy: tiny model, real verifiers, 2 CPU cores, 4 to 7 minutes after set-up
#   BASE=folder bash run_cascade.sh 8b   8b | 8b-thinking | 14b-thinking: the paper's runs (tables T14-T20); 0.6b: the 8b lines
#   bash run_cascade.sh setup            only install into .venv
# Environment: NPROC ranks a node, OUT folder, SEED; for the real sizes BASE (folder of the base), RM (folder or URL of a ready reward model; else one is
# trained from the policy) and JUDGE (URL of the SWE judge; else similarity, which the paper found worse and the toy no signal), TASKS measured after each
# stage (e.g. ifeval,math500; files in EVAL_DATA; toy: all), KEEP_BEST=1: a broken gate takes the stage's best checkpoint and goes on, FLAGS for all stages
# (e.g. --shard=hybrid), DRY_RUN=1 prints the commands, PIP_EXTRA_INDEX_URL the index of PyTorch's CPU wheels, LAUNCH another launcher (README, Real sizes).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
PRESET=${1:-toy}
SEED=${SEED:-0}
OUT=${OUT:-out/$PRESET$([ "$SEED" = 0 ] || echo "-seed$SEED")}
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
GPUS=$(nvidia-smi -L 2>/dev/null | grep -c GPU || true)
CORES=$(env -u OMP_NUM_THREADS nproc 2>/dev/null || sysctl -n hw.ncpu)  # nproc would report OMP_NUM_THREADS
NPROC=${NPROC:-$((GPUS > 0 ? GPUS : CORES > 1 ? 2 : 1))}
LAUNCH=${LAUNCH:-.venv/bin/torchrun --nproc_per_node=$NPROC --rdzv-backend=c10d --rdzv-endpoint=localhost:0}

setup() {  # .venv with the pinned packages; without an NVIDIA GPU vLLM and the CUDA builds stay out
    local wanted; wanted=$(cat requirements.txt; echo "gpus: $((GPUS > 0))")
    [ "${DRY_RUN:-}" = 1 ] || [ "$(cat .venv/installed 2>/dev/null)" = "$wanted" ] && return
    echo "== setup: installing requirements.txt into .venv (minutes)"
    python3 -m venv .venv
    .venv/bin/pip install -q "$(grep '^torch==' requirements.txt)" 2> >(grep -v WARNING >&2 || true)
    .venv/bin/pip install -q -r <(grep -v "$([ "$GPUS" = 0 ] && echo '^vllm' || echo '^$')" requirements.txt) 2> >(grep -v WARNING >&2 || true)
    echo "$wanted" > .venv/installed
}
run() { if [ "${DRY_RUN:-}" = 1 ]; then echo "$@"; else "$@"; fi; }
stage() {  # stage NAME SCRIPT [flags]: train from where the stage before it ended, then score; what is done is not done again
    if [ -e "$OUT/$1/final" ]; then echo "== $1: done"; else
        echo "== $1: $FROM -> $OUT/$1"
        run $LAUNCH "$2.py" --init_from="$FROM" --out_dir="$OUT/$1" --seed="$SEED" "${@:3}" ${FLAGS:-}
    fi
    FROM=$OUT/$1/final
    [ -z "${TASKS:-}" ] || [ "$1" = sft1 ] || [ -e "$OUT/$1/scored" ] || score "$1" "${1/sft2/sft}"
}
score() {  # score NAME LABEL: held-out tasks of a finished stage; a broken gate stops here, or takes its best checkpoint
    local e="$LAUNCH evaluate.py --data=${EVAL_DATA:-$OUT/data} --label_seed=$SEED --limit=${LIMIT:-0}$(pick "" " --modes=think")"
    measure() { local t; for t in ${TASKS//,/ }; do run $e --tasks="$t" "$@"; done; }  # a launch each: some take YaRN, and an engine keeps its RoPE
    measure --model="$OUT/$1/final" --stage="$2" --results="$OUT/results.jsonl"
    if [ -s "$OUT/broken_gate" ]; then
        cat "$OUT/broken_gate" >&2; [ "${KEEP_BEST:-}" = 1 ] || exit 2
        for c in "$OUT/$1"/step_*; do measure --model="$c" --results="$OUT/$1/candidates.jsonl" --split=dev; done
        run .venv/bin/python evaluate.py --keep_best="$OUT/$1"
        measure --model="$OUT/$1/final" --stage="$2" --results="$OUT/results.jsonl"
    fi
    run touch "$OUT/$1/scored"
}

toy() {
    [ -e "$OUT/data/done" ] || { run .venv/bin/python toy.py --out="$OUT/data" --seed="$SEED"; run touch "$OUT/data/done"; }
    local d=$OUT/data FROM=$OUT/data/base TASKS=all-toy LIMIT=240
    local sft="--samples_per_step=64 --max_seq_len=512 --micro_batch_tokens=8192 --warmup_steps=20 --eval_every=0 --save_every=100 --shard=replicate"
    local rl="--rope_factor=0 --prompts_per_step=16 --group_size=8 --temperature=1.0 --top_p=1.0 --top_k=0 --max_prompt_tokens=256 --max_new_tokens=80
        --micro_batch_tokens=8192 --reward_workers=2 --final_lr=0.1 --eval_every=25 --eval_rows=150 --save_every=25 --sample_every=20 --shard=replicate"
    stage sft1 sft --data="$d/sft_stage1.jsonl" --lr=9e-3 --num_steps=140 --schedule_steps=400 $sft
    stage sft2 sft --data="$d/sft_stage2.jsonl" --lr=8e-3 --num_steps=600 --schedule_steps=600 $sft
    stage rlhf rlhf --data="$d/chat_rl.jsonl" --eval_data="$d/chat_dev.jsonl" --rm_data="$d/preference.jsonl" --rm_eval_data="$d/preference_dev.jsonl" \
        --rm_lr=3e-3 --rm_samples_per_step=32 --rm_epochs=1 --lr=3e-4 --num_steps=40 --kl_coef=0.1 --shape_reward=true $rl
    stage ifrl ifrl --data="$d/if_rl.jsonl" --eval_data="$d/if_dev.jsonl" --lr=4e-4 --num_steps=90 $rl --max_refill_rounds=1
    stage mathrl mathrl --data="$d/math_rl.jsonl" --eval_data="$d/math_dev.jsonl" --lr=6e-4 --num_steps=50 $rl
    stage coderl coderl --data="$d/code_rl.jsonl" --eval_data="$d/code_dev.jsonl" --lr=5e-4 --num_steps=60 --memory_mb=1024 $rl
    stage swerl swerl --data="$d/swe_rl.jsonl" --eval_data="$d/swe_dev.jsonl" --min_prompt_tokens=0 --lexical_floor=0.98 --lr=3e-4 --num_steps=90 \
        --overlong_filter=false $rl  # filtered, nothing would keep it from never ending
}

# The paper's runs. Where its text and its appendix tables (T14-T20) disagree, the tables win: RLHF and IF-RL take 256 prompts a step (text: 128), IF-RL
# the steps below (text: 2000 + 1000, thinking 500 + 300) and no overlong filter in stage 1 (text: thinking filters), Math its own temperatures (text: 1),
# Code lengths and temperatures by model (text: 44-48K at 1), SWE's 24K no filter (text: filters). SFT 2 sees science twice, SWE three times (3.2.4, 3.3.2).
pick() { case $PRESET in 14b-thinking) echo "${3-$2}" ;; 8b-thinking) echo "$2" ;; *) echo "$1" ;; esac; }  # of: 8b and 0.6b, 8b-thinking, 14b-thinking
real() {
    local FROM=$BASE FLAGS="--phase_timeout=43200 ${FLAGS:-}" hub=nvidia/Nemotron-Cascade code=nvidia/Nemotron-RL-coding-competitive_coding two=nvidia/Nemotron-Cascade-SFT-Stage-2
    local rm=--rm=${RM:-$OUT/rlhf/rm} lr=$(pick "" "" --lr=2.5e-6) think=$(pick "" --think_only=true) judge=${JUDGE:+--judge=$JUDGE} long="--max_new_tokens=16384 --overlong_filter=true"
    stage sft1 sft --data=$hub-SFT-Stage-1 --num_steps=$(pick 20000 20000 22000) --lr=5e-5 --max_seq_len=16384 $think
    stage sft2 sft --data=$two,$two:science$(for i in 2 3; do printf ",$two:swe_%s" repair localization testgen; done) --micro_batch_tokens=32768 $think \
        --num_steps=$(pick 32000 32000 41000) --lr=$(pick 2e-5 2e-5 5e-5) --max_seq_len=32768
    stage rlhf rlhf --data=$hub-RL-RLHF --num_steps=$(pick 800 800 900) --think_share=$(pick 0.5 1.0) ${RM:+--rm=$RM}
    stage ifrl1 ifrl --data=$hub-RL-Instruction-Following --taxonomy=ifeval --num_steps=$(pick 2300 550 800) $(pick "" "--think=true $rm")
    stage ifrl2 ifrl --data=nvidia/Nemotron-RL-instruction_following --taxonomy=iftrain --num_steps=$(pick 800 300 120) $(pick "" "--think=true $long $rm")
    stage mathrl1 mathrl --max_new_tokens=$(pick 24576 24576 28672) --num_steps=$(pick 190 190 120) --temperature=$(pick 1.0 1.0 1.2) $lr
    [ "$PRESET" = 14b-thinking ] || stage mathrl2 mathrl --max_new_tokens=32768 --num_steps=240 --temperature=1.0 --overlong_filter=false --rope_factor=2
    stage mathrl3 mathrl --max_new_tokens=40960 --num_steps=$(pick 70 70 100) --temperature=$(pick 0.8 0.8 1.1) $lr --overlong_filter=false --rope_factor=2
    [[ $PRESET = *-thinking ]] || stage coderl1 coderl --data=$code --max_new_tokens=45056 --num_steps=60 --temperature=1.0 --rope_factor=2
    stage coderl coderl --data=$code --max_new_tokens=$(pick 49152 45056 57344) --num_steps=$(pick 30 64) --temperature=$(pick 0.8 1.2 1.0) --rope_factor=2
    [ "$PRESET" = 14b-thinking ] || stage swerl1 swerl --max_prompt_tokens=16384 --num_steps=30 --overlong_filter=true --rope_factor=2 $judge
    stage swerl swerl --max_prompt_tokens=$(pick 24576 24576 32768) --num_steps=$(pick 30 30 120) --overlong_filter=$(pick false false true) --rope_factor=2 $judge
}

[ "${BASH_SOURCE[0]}" = "$0" ] || return 0  # bench/control.sh and bench/mopd.sh take the functions
case $PRESET in
    setup) setup ;;
    toy) setup; toy; run .venv/bin/python -m evals.report --run="$OUT" ;;
    0.6b|8b|8b-thinking|14b-thinking)
        [ -n "${BASE:-}" ] || { echo "run_cascade.sh: set BASE to the folder of a Qwen3 base model." >&2; exit 2; }
        setup; real; [ -z "${TASKS:-}" ] || run .venv/bin/python -m evals.report --run="$OUT" ;;
    *) echo "usage: bash run_cascade.sh [toy|0.6b|8b|8b-thinking|14b-thinking|setup]" >&2; exit 2 ;;
esac

#!/usr/bin/env bash
#
# The Nemotron-Cascade recipe (arXiv 2512.13607): two stages of SFT, then RL on chat, instructions, math, code
# and software engineering. Every stage starts from the weights in which the stage before it ended.
#
#   bash run_cascade.sh                  the toy: a tiny model, real verifiers, about 7 minutes on 2 CPU cores
#   BASE=folder bash run_cascade.sh 8b   a run of the paper (tables T14-T20): 8b, 8b-thinking or 14b-thinking;
#                                        0.6b trains a smaller model with the numbers of 8b
#   bash run_cascade.sh 0.6b-1gpu        a first real run on one card of 80 GB, from Qwen3-0.6B-Base and
#                                        public sets; 4b-1gpu with LoRA. By the plan in under 6 hours
#   bash run_cascade.sh cards            a test of the evaluation: measure the six 8B checkpoints that NVIDIA
#                                        released, and lay the scores beside those of their card
#   bash run_cascade.sh setup            only install into .venv
#
# The same command goes on after a crash: finished stages are skipped, an interrupted one resumes.
#
# Environment variables:
#   OUT        folder of the run; out/PRESET if unset, out/PRESET-seedN for another SEED than 0
#   SEED       seed of the data, the base model and the training; 0 if unset
#   NPROC      ranks on this machine; if unset, one for each GPU, without GPUs at most two
#   LAUNCH     the launcher of every stage, instead of torchrun on this machine (README, Real sizes)
#   FLAGS      further flags for every stage, e.g. --shard=hybrid
#   STAGE_FLAGS   the same for one stage, under its name: MATHRL_FLAGS, SFT1_FLAGS, ... The last of two equal
#              flags counts, and these come last: MATHRL_FLAGS="--data=my.jsonl --lr=1e-6"
#   DRY_RUN    1: print the commands instead of running them
#   KEEP_BEST  1: when a stage breaks a gate, go on from its best checkpoint instead of stopping (G12)
#   PIP_EXTRA_INDEX_URL   where pip finds the CPU builds of PyTorch
# Only for the real sizes:
#   BASE       folder of a Qwen3 base model; the presets of one card download theirs if it is unset
#   RM         folder or URL of a reward model; if unset, RLHF trains one from the policy
#   JUDGE      URL of the judge of SWE RL; if unset, similarity to the golden patch is the reward, which the
#              paper found worse and from which the toy learned nothing at the paper's floor
#   TASKS      what to measure after every stage, e.g. ifeval,math500; nothing if unset;
#              for cards the benchmarks of the card, on one card four small ones
#   EVAL_DATA  folder with the files of these tasks
#   EVAL_FLAGS what else they need, as flags of evaluate.py: --judge, --code_judge, --repos and
#              --verifier_python. What is missing is said before anything is trained
#   LIMIT      problems of each task; all if unset

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

PRESET=${1:-toy}
SEED=${SEED:-0}
if [ "$SEED" = 0 ]; then default_out=out/$PRESET; else default_out=out/$PRESET-seed$SEED; fi
OUT=${OUT:-$default_out}

export PYTHONUNBUFFERED=1
export TOKENIZERS_PARALLELISM=false
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

GPUS=$(nvidia-smi -L 2>/dev/null | grep -c GPU || true)
# nproc would report OMP_NUM_THREADS instead of the cores; macOS has no nproc.
CORES=$(env -u OMP_NUM_THREADS nproc 2>/dev/null || sysctl -n hw.ncpu)
NPROC=${NPROC:-$((GPUS > 0 ? GPUS : CORES > 1 ? 2 : 1))}
LAUNCH=${LAUNCH:-.venv/bin/torchrun --nproc_per_node=$NPROC --rdzv-backend=c10d --rdzv-endpoint=localhost:0}

# -----------------------------------------------------------------------------
# Helpers

# Install requirements.txt into .venv, unless that has been done. Without an NVIDIA GPU, vLLM stays out.
setup() {
    local wanted left_out
    wanted=$(cat requirements.txt; echo "gpus: $((GPUS > 0))")
    if [ "${DRY_RUN:-}" = 1 ] || [ "$(cat .venv/installed 2>/dev/null)" = "$wanted" ]; then return; fi
    echo "== setup: installing requirements.txt into .venv (minutes)"
    python3 -m venv .venv
    # PyTorch comes first, so that the other packages settle for the build that is then there.
    pip_install "$(grep '^torch==' requirements.txt)"
    left_out='^$'
    if [ "$GPUS" = 0 ]; then left_out='^vllm'; fi
    pip_install -r <(grep -v "$left_out" requirements.txt)
    echo "$wanted" > .venv/installed
}

pip_install() {
    .venv/bin/pip install -q "$@" 2> >(grep -v WARNING >&2 || true)
}

# Run a command, or print it when DRY_RUN is 1.
run() {
    if [ "${DRY_RUN:-}" = 1 ]; then echo "$@"; else "$@"; fi
}

# stage NAME COMMAND...: run the command, which trains into $OUT/NAME, then measure what came out of it.
# $OUT/NAME/final exists when the training is done, $OUT/NAME/scored when the measuring is done, too.
stage() {
    local name=$1 own
    shift
    own=$(echo "$name" | tr '[:lower:]' '[:upper:]')_FLAGS
    if [ -e "$OUT/$name/final" ]; then
        echo "== $name: done"
    else
        echo "== $name: training in $OUT/$name"
        run "$@" --seed="$SEED" ${FLAGS:-} ${!own:-}
    fi
    # SFT is measured once, after its second stage.
    if [ -n "${TASKS:-}" ] && [ "$name" != sft1 ] && [ ! -e "$OUT/$name/scored" ]; then
        score "$name"
    fi
}

# score NAME: measure a finished stage on held-out tasks. evaluate.py then checks the gates: a stage must not
# lose what an earlier one taught. If it did, $OUT/broken_gate says so; otherwise that file is empty.
score() {
    local name=$1 checkpoint
    local label=${name/sft2/sft}  # the name of the row in the table of results
    measure --model="$OUT/$name/final" --stage="$label" --results="$OUT/results.jsonl"
    if [ -s "$OUT/broken_gate" ]; then
        cat "$OUT/broken_gate" >&2
        if [ "${KEEP_BEST:-}" != 1 ]; then exit 2; fi
        # Measure every saved checkpoint on the dev split. The best one becomes `final` and enters the table.
        for checkpoint in "$OUT/$name"/step_*; do
            measure --model="$checkpoint" --results="$OUT/$name/candidates.jsonl" --split=dev
        done
        run .venv/bin/python evaluate.py --keep_best="$OUT/$name"
        measure --model="$OUT/$name/final" --stage="$label" --results="$OUT/results.jsonl"
    fi
    run touch "$OUT/$name/scored"
}

# measure FLAGS...: evaluate.py on every task. Each task is a launch of its own, because an engine cannot
# change its RoPE, and the 14B model has another one on SWE-bench, with longer prompts (appendix B).
measure() {
    local task modes="" long
    if [[ ${PRESET:-} = *-thinking ]]; then modes=--modes=think; fi
    for task in ${TASKS//,/ }; do
        long=""
        if [ "${PRESET:-} $task" = "14b-thinking swebench" ]; then
            long="--prompt_tokens=65536 --rope_factor=3"
        fi
        run $LAUNCH evaluate.py --tasks="$task" "$@" $long \
            --data="${EVAL_DATA:-$OUT/data}" --label_seed="$SEED" --limit="${LIMIT:-0}" $modes ${EVAL_FLAGS:-}
    done
}

# check_tasks: end here if a task lacks a server, a folder or a package, since the first measurement comes
# after SFT, the longest stage. A dry run says so and goes on, and asks neither servers nor the hub.
check_tasks() {
    local check=".venv/bin/python evaluate.py --check_tasks=${TASKS:-} --results=$OUT/results.jsonl"
    check="$check --data=${EVAL_DATA:-$OUT/data} ${EVAL_FLAGS:-}"
    if [ -z "${TASKS:-}" ]; then return; fi
    if [ ! -e .venv/installed ]; then
        echo "run_cascade.sh: whether TASKS can be measured is not checked before setup"
    elif [ "${DRY_RUN:-}" = 1 ]; then
        $check --offline=true 2>&1 || true
    else
        $check || exit 2
    fi
}

# -----------------------------------------------------------------------------
# The toy: 0.34M parameters. Designed on seeds 100 to 102, where every stage raised its own skill.

toy() {
    local data=$OUT/data
    local TASKS=all-toy LIMIT=250  # score() measures every toy skill on 250 problems

    # Data for all stages and a base model with random weights. The file `done` says that they are complete.
    if [ ! -e "$data/done" ]; then
        run .venv/bin/python toy.py --out="$data" --seed="$SEED"
        run touch "$data/done"
    fi

    # What both SFT stages share, and what all RL stages share. A toy answer fits into 96 tokens, so that no
    # stage needs YaRN. The learning rate of RL falls to a tenth. A model this small is whole on every rank.
    local sft="
        --samples_per_step=64 --max_seq_len=512 --micro_batch_tokens=8192 --warmup_steps=20
        --eval_every=0 --save_every=100 --shard=replicate"
    local rl="
        --prompts_per_step=16 --group_size=8 --temperature=1.0 --top_p=1.0 --top_k=0
        --max_prompt_tokens=256 --max_new_tokens=96 --micro_batch_tokens=8192 --rope_factor=0
        --final_lr=0.1 --reward_workers=2 --shard=replicate
        --eval_every=25 --eval_rows=150 --save_every=25 --sample_every=20"

    # SFT 1: the language, and chat, instructions, math and code from a teacher with misconceptions. It ends
    # early in its cosine of 400 steps, while the learning rate is still high, because SFT 2 goes on.
    stage sft1 $LAUNCH sft.py \
        --init_from="$data/base" --out_dir="$OUT/sft1" \
        --data="$data/sft_stage1.jsonl" \
        --num_steps=140 --schedule_steps=400 --lr=9e-3 $sft

    # SFT 2: the same and SWE, with a learning rate that falls to 0. It learns the misconceptions, too, and
    # this leaves the RL stages something to learn.
    stage sft2 $LAUNCH sft.py \
        --init_from="$OUT/sft1/final" --out_dir="$OUT/sft2" \
        --data="$data/sft_stage2.jsonl" \
        --num_steps=600 --schedule_steps=600 --lr=8e-3 $sft

    # RLHF: replies that a reward model prefers. It first trains this reward model on pairs of replies. The KL
    # term and the shaped reward keep the policy from farming a small reward model (paper 6.3). It reads no
    # constraint, so that instruction following suffers here, as in the paper, until IF-RL.
    stage rlhf $LAUNCH rlhf.py \
        --init_from="$OUT/sft2/final" --out_dir="$OUT/rlhf" \
        --data="$data/rlhf.jsonl" --eval_data="$data/chat_dev.jsonl" \
        --rm_data="$data/preference.jsonl" --rm_eval_data="$data/preference_dev.jsonl" \
        --rm_samples_per_step=32 --rm_epochs=1 --rm_lr=3e-3 \
        --num_steps=80 --lr=3e-4 --kl_coef=0.1 --shape_reward=true $rl

    # IF-RL: constraints that a program can check, such as "use no commas". It unlearns closings that break
    # one. A learning rate of 4e-4 unlearned those of chat as well, whose score fell below that of SFT. One
    # round of fresh prompts replaces groups in which all rewards are equal.
    stage ifrl $LAUNCH ifrl.py \
        --init_from="$OUT/rlhf/final" --out_dir="$OUT/ifrl" \
        --data="$data/if_rl.jsonl" --eval_data="$data/if_dev.jsonl" \
        --num_steps=75 --lr=3e-4 --max_refill_rounds=1 $rl

    # Math RL: chains of small sums, with reward 1 for the right answer in the box. The answers are short:
    # one length is enough, where the paper goes through three.
    stage mathrl $LAUNCH mathrl.py \
        --init_from="$OUT/ifrl/final" --out_dir="$OUT/mathrl" \
        --data="$data/math_rl.jsonl" --eval_data="$data/math_dev.jsonl" \
        --num_steps=50 --lr=6e-4 $rl

    # Code RL: programs on lists, with reward 1 for a program that passes its four tests in the sandbox.
    stage coderl $LAUNCH coderl.py \
        --init_from="$OUT/mathrl/final" --out_dir="$OUT/coderl" \
        --data="$data/code_rl.jsonl" --eval_data="$data/code_dev.jsonl" \
        --num_steps=70 --lr=5e-4 --memory_mb=1024 $rl

    # SWE RL: repairs of the same programs, rewarded by the similarity to the golden patch. A near miss shares
    # most of its text with it, so that similarity below 0.98 earns nothing. A learning rate of 5e-4 made the
    # model forget code. Under the overlong filter one seed learned never to end an answer.
    stage swerl $LAUNCH swerl.py \
        --init_from="$OUT/coderl/final" --out_dir="$OUT/swerl" \
        --data="$data/swe_rl.jsonl" --eval_data="$data/swe_dev.jsonl" \
        --num_steps=150 --lr=3e-4 --min_prompt_tokens=0 --lexical_floor=0.98 --overlong_filter=false $rl
}

# -----------------------------------------------------------------------------
# The paper's runs. A flag that is not given here has the paper's value as its default in the stage's Config.
#
# Where the text and the appendix tables (T14-T20) disagree, the tables win:
#   RLHF and IF-RL   256 prompts a step (text: 128)
#   IF-RL            the steps below (text: 2000 + 1000, thinking 500 + 300), and no overlong filter in its
#                    first stage (text: the thinking models filter)
#   Math RL          the temperatures below (text: 1)
#   Code RL          lengths and temperatures by model (text: 44K to 48K tokens at temperature 1)
#   SWE RL           no overlong filter in the stage with 24K prompts (text: it filters)

# setting NAME 8B 8B-THINKING 14B-THINKING: give the variable NAME the value of this preset's model. On one
# card it is setting NAME 0.6B 4B.
setting() {
    case $PRESET in
        8b-thinking | 4b-1gpu) printf -v "$1" %s "$3" ;;
        14b-thinking) printf -v "$1" %s "$4" ;;
        *) printf -v "$1" %s "$2" ;;
    esac
}

# What differs between the models. A model leaves out the stages whose number of steps is "none".
paper_settings() {
    #       variable              8b, 0.6b   8b-thinking   14b-thinking
    setting thinking              false      true          true
    setting sft1_steps            20000      20000         22000
    setting sft2_steps            32000      32000         41000
    setting sft2_lr               2e-5       2e-5          5e-5
    setting rlhf_steps            800        800           900
    setting rlhf_think_share      0.5        1.0           1.0
    setting ifrl1_steps           2300       550           800
    setting ifrl2_steps           800        300           120
    setting ifrl2_tokens          8192       16384         16384
    setting ifrl2_filter          false      true          true
    setting mathrl_lr             2e-6       2e-6          2.5e-6
    setting mathrl1_steps         190        190           120
    setting mathrl1_tokens        24576      24576         28672
    setting mathrl1_temperature   1.0        1.0           1.2
    setting mathrl2_steps         240        240           none
    setting mathrl3_steps         70         70            100
    setting mathrl3_temperature   0.8        0.8           1.1
    setting coderl1_steps         60         none          none
    setting coderl_steps          30         64            64
    setting coderl_tokens         49152      45056         57344
    setting coderl_temperature    0.8        1.2           1.0
    setting swerl1_steps          30         30            none
    setting swerl_steps           30         30            120
    setting swerl_prompt_tokens   24576      24576         32768
    setting swerl_filter          false      false         true
}

real() {
    check_tasks
    paper_settings
    local hub=nvidia/Nemotron-Cascade
    local code=nvidia/Nemotron-RL-coding-competitive_coding
    # A phase of a step may last 12 hours before the run ends: the longest steps could take several.
    local FLAGS="--phase_timeout=43200 ${FLAGS:-}"

    # SFT 1: general, math, science and code, up to 16K tokens. The thinking models see only the conversations
    # that think.
    stage sft1 $LAUNCH sft.py \
        --init_from="$BASE" --out_dir="$OUT/sft1" \
        --data=$hub-SFT-Stage-1 --think_only=$thinking \
        --num_steps=$sft1_steps --lr=5e-5 --max_seq_len=16384

    # SFT 2: up to 32K tokens, with tool calling and SWE. A set is seen as often as it is named, and its parts
    # with it: science twice, SWE three times (paper 3.2.4, 3.3.2).
    local stage2=$hub-SFT-Stage-2
    local swe=$stage2:swe_repair,$stage2:swe_localization,$stage2:swe_testgen
    stage sft2 $LAUNCH sft.py \
        --init_from="$OUT/sft1/final" --out_dir="$OUT/sft2" \
        --data="$stage2,$stage2:science,$swe,$swe" --think_only=$thinking \
        --num_steps=$sft2_steps --lr=$sft2_lr --max_seq_len=32768 --micro_batch_tokens=32768

    # RLHF: replies that a reward model prefers. Half of every batch of the unified models thinks, all of the
    # thinking models' does. A reward model that is trained here is as small as the policy, so the paper's
    # stabilisers for small ones are on (6.3, T10); with the 72B of RM= they are off, as in the paper's runs.
    local rlhf_rm="--kl_coef=1e-3 --sequence_level=true --shape_reward=true"
    if [ -n "${RM:-}" ]; then rlhf_rm=--rm=$RM; fi
    stage rlhf $LAUNCH rlhf.py \
        --init_from="$OUT/sft2/final" --out_dir="$OUT/rlhf" \
        --data=$hub-RL-RLHF $rlhf_rm \
        --num_steps=$rlhf_steps --think_share=$rlhf_think_share

    # IF-RL: first the 25 constraints of IFEval, then the 29 of IF-RLVR's set (4.4.1). The unified models
    # train without thinking, and the rules alone decide. For the thinking models the reward model has a say
    # as well.
    local ifrl_rm=""
    if [ "$thinking" = true ]; then ifrl_rm=--rm=${RM:-$OUT/rlhf/rm}; fi
    stage ifrl1 $LAUNCH ifrl.py \
        --init_from="$OUT/rlhf/final" --out_dir="$OUT/ifrl1" \
        --data=$hub-RL-Instruction-Following --taxonomy=ifeval --think=$thinking $ifrl_rm \
        --num_steps=$ifrl1_steps
    stage ifrl2 $LAUNCH ifrl.py \
        --init_from="$OUT/ifrl1/final" --out_dir="$OUT/ifrl2" \
        --data=allenai/IF_multi_constraints_upto5 --taxonomy=iftrain --think=$thinking $ifrl_rm \
        --num_steps=$ifrl2_steps --max_new_tokens=$ifrl2_tokens --overlong_filter=$ifrl2_filter

    # Math RL: the length grows from 24K to 32K to 40K tokens (14B: from 28K to 40K). Only the first length
    # leaves out answers that were cut off; later they earn 0. YaRN is on once 32K can be
    # passed (G10).
    local before_mathrl3=mathrl1
    stage mathrl1 $LAUNCH mathrl.py \
        --init_from="$OUT/ifrl2/final" --out_dir="$OUT/mathrl1" \
        --num_steps=$mathrl1_steps --lr=$mathrl_lr --temperature=$mathrl1_temperature \
        --max_new_tokens=$mathrl1_tokens
    if [ "$mathrl2_steps" != none ]; then
        before_mathrl3=mathrl2
        stage mathrl2 $LAUNCH mathrl.py \
            --init_from="$OUT/mathrl1/final" --out_dir="$OUT/mathrl2" \
            --num_steps=$mathrl2_steps --lr=$mathrl_lr --temperature=1.0 \
            --max_new_tokens=32768 --overlong_filter=false --rope_factor=2
    fi
    stage mathrl3 $LAUNCH mathrl.py \
        --init_from="$OUT/$before_mathrl3/final" --out_dir="$OUT/mathrl3" \
        --num_steps=$mathrl3_steps --lr=$mathrl_lr --temperature=$mathrl3_temperature \
        --max_new_tokens=40960 --overlong_filter=false --rope_factor=2

    # Code RL: contest problems, with reward 1 for a program that passes all its tests. The unified models
    # start with 44K tokens at temperature 1; the paper does not say at which step they change (G11). Its
    # problems were curated (D16): extras/decontaminate.py takes those out of a set that SFT or a test has.
    local before_coderl=mathrl3
    if [ "$coderl1_steps" != none ]; then
        before_coderl=coderl1
        stage coderl1 $LAUNCH coderl.py \
            --init_from="$OUT/mathrl3/final" --out_dir="$OUT/coderl1" \
            --data=$code \
            --num_steps=$coderl1_steps --temperature=1.0 --max_new_tokens=45056 --rope_factor=2
    fi
    stage coderl $LAUNCH coderl.py \
        --init_from="$OUT/$before_coderl/final" --out_dir="$OUT/coderl" \
        --data=$code \
        --num_steps=$coderl_steps --temperature=$coderl_temperature --max_new_tokens=$coderl_tokens \
        --rope_factor=2

    # SWE RL: patches of real repositories. The 8B models see prompts of up to 16K tokens, then of up to 24K;
    # 14B sees up to 32K at once.
    local before_swerl=coderl
    if [ "$swerl1_steps" != none ]; then
        before_swerl=swerl1
        stage swerl1 $LAUNCH swerl.py \
            --init_from="$OUT/coderl/final" --out_dir="$OUT/swerl1" \
            ${JUDGE:+--judge="$JUDGE"} \
            --num_steps=$swerl1_steps --max_prompt_tokens=16384 --overlong_filter=true --rope_factor=2
    fi
    stage swerl $LAUNCH swerl.py \
        --init_from="$OUT/$before_swerl/final" --out_dir="$OUT/swerl" \
        ${JUDGE:+--judge="$JUDGE"} \
        --num_steps=$swerl_steps --max_prompt_tokens=$swerl_prompt_tokens --overlong_filter=$swerl_filter \
        --rope_factor=2
}

# -----------------------------------------------------------------------------
# One card of 80 GB and an afternoon: the stages whose verifier is a program, in the paper's order, on public
# sets. RLHF and SWE RL are left out, since they want a reward model and a judge. `python bench/hours.py
# --preset=0.6b-1gpu` prints what this takes by the plan. Nobody has run it at these sizes yet;
# tests/test_rehearsal.py runs it with a tiny model.

# What differs between the models. LoRA trains with ten times the learning rates of full training.
one_card_settings() {
    #       variable              0.6b-1gpu               4b-1gpu
    setting hub_id                Qwen/Qwen3-0.6B-Base    Qwen/Qwen3-4B-Base
    setting lora_rank             0                       32
    setting sft_steps             960                     320
    setting sft_tokens            4096                    2048
    setting sft_lr                2e-5                    2e-4
    setting rl_lr                 2e-6                    2e-5
    setting ifrl_steps            40                      20
    setting mathrl_steps          100                     40
    setting coderl_steps          30                      15
}

one_card() {
    one_card_settings
    local TASKS=${TASKS-gsm8k,math500,humaneval,ifeval}
    # Answers as long as in training, one a problem, without YaRN.
    local EVAL_FLAGS="--samples=1 --max_new_tokens=2048 --rope_factor=1 ${EVAL_FLAGS:-}"
    local base=${BASE:-models/${hub_id#*/}}
    check_tasks
    if [ -z "${BASE:-}" ] && [ ! -e "$base" ]; then
        run .venv/bin/hf download "$hub_id" --local-dir "$base"
    fi

    # SFT: chat in both modes, which teaches the form of a thought and of an answer. 62K conversations, of
    # which those of the first two sets think; 960 steps see each of them about once,
    # the 320 of 4B a third of them.
    local chat=HuggingFaceTB/smoltalk2:SFT
    local data=$chat@smoltalk_systemchats_Qwen3_32B_think
    data+=,$chat@smoltalk_everyday_convs_reasoning_Qwen3_32B_think
    data+=,$chat@tulu_3_sft_personas_instruction_following_no_think
    data+=,$chat@smoltalk_smollm3_everyday_conversations_no_think
    stage sft $LAUNCH sft.py \
        --init_from="$base" --out_dir="$OUT/sft" \
        --data="$data" \
        --num_steps=$sft_steps --schedule_steps=$sft_steps --warmup_steps=20 --samples_per_step=64 \
        --lr=$sft_lr --max_seq_len=$sft_tokens --lora_rank=$lora_rank --save_every=100

    # What all RL stages share.
    local rl="
        --prompts_per_step=32 --group_size=8 --temperature=1.0 --top_p=1.0 --top_k=0
        --max_prompt_tokens=1024 --rope_factor=0 --lr=$rl_lr --lora_rank=$lora_rank --save_every=20"

    # IF-RL: constraints that a program can check, without thinking.
    stage ifrl $LAUNCH ifrl.py \
        --init_from="$OUT/sft/final" --out_dir="$OUT/ifrl" \
        --data=nvidia/Nemotron-Cascade-RL-Instruction-Following --taxonomy=ifeval \
        --num_steps=$ifrl_steps --max_new_tokens=1024 --max_refill_rounds=1 $rl

    # Math RL: GSM8K, of whose 7,473 problems 100 steps see 3,200. An answer that is cut off stays out of the
    # loss.
    stage mathrl $LAUNCH mathrl.py \
        --init_from="$OUT/ifrl/final" --out_dir="$OUT/mathrl" \
        --data=openai/gsm8k:main@train \
        --num_steps=$mathrl_steps --max_new_tokens=2048 $rl

    # Code RL: MBPP without its test split, small functions with three tests each.
    local mbpp=google-research-datasets/mbpp:full
    stage coderl $LAUNCH coderl.py \
        --init_from="$OUT/mathrl/final" --out_dir="$OUT/coderl" \
        --data=$mbpp@train,$mbpp@validation \
        --num_steps=$coderl_steps --max_new_tokens=2048 --reward_workers=16 $rl
    if [ -n "$TASKS" ]; then run .venv/bin/python -m evals.report --run="$OUT"; fi
}

# -----------------------------------------------------------------------------
# The card of 8B: its eleven benchmarks on the checkpoint that NVIDIA released after each stage.

cards() {
    local ids=nvidia/Nemotron-Cascade-8B-Intermediate-ckpts stage
    local released=models/${ids#*/}/Nemotron-Cascade-8B final=models/Nemotron-Cascade-8B
    local rows=mmlu,mmlu_pro,gpqa,arenahard,ifeval,ifbench,aime24,aime25,lcb_v5,lcb_v6
    local TASKS=${TASKS:-$rows,swebench_files,swebench}

    check_tasks
    if [ ! -e "$released-SFT" ]; then run .venv/bin/hf download $ids --local-dir "models/${ids#*/}"; fi
    if [ ! -e $final ]; then run .venv/bin/hf download nvidia/Nemotron-Cascade-8B --local-dir $final; fi

    # Each stage and its checkpoint. No gate is checked: these models are measured, not trained.
    for stage in sft:$released-SFT rlhf:$released-RLHF ifrl:$released-IFRL mathrl:$released-MathRL \
        coderl:$released-CodeRL swerl:$final; do
        if [ -e "$OUT/${stage%%:*}.scored" ]; then continue; fi
        measure --model="${stage#*:}" --stage="${stage%%:*}" --results="$OUT/results.jsonl"
        run touch "$OUT/${stage%%:*}.scored"
    done
    run .venv/bin/python bench/cards.py --run="$OUT"
}

# -----------------------------------------------------------------------------
# Main. control.sh, lora.sh, mopd.sh and passk.sh of bench/ source this file for its functions and stop here.

if [ "${BASH_SOURCE[0]}" != "$0" ]; then return 0; fi

case $PRESET in
    setup)
        setup
        ;;
    toy)
        setup
        toy
        run .venv/bin/python -m evals.report --run="$OUT"
        ;;
    cards)
        if [ "$GPUS" = 0 ]; then
            echo "== no GPU here: these are the commands"
            DRY_RUN=1
        fi
        setup
        cards
        ;;
    0.6b | 8b | 8b-thinking | 14b-thinking)
        if [ -z "${BASE:-}" ]; then
            echo "run_cascade.sh: set BASE to the folder of a Qwen3 base model." >&2
            exit 2
        fi
        setup
        real
        if [ -n "${TASKS:-}" ]; then run .venv/bin/python -m evals.report --run="$OUT"; fi
        ;;
    0.6b-1gpu | 4b-1gpu)
        setup
        one_card
        ;;
    *)
        echo "usage: bash run_cascade.sh" \
            "[toy|0.6b-1gpu|4b-1gpu|0.6b|8b|8b-thinking|14b-thinking|cards|setup]" >&2
        exit 2
        ;;
esac

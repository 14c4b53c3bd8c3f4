#!/usr/bin/env bash
#
# The toy's Math RL with vLLM's CPU build, on one rank and on two, beside the built-in sampler: the data, the
# seeds and the flags are the same.
#
#   bash bench/vllm.sh      needs .venv-vllm (see README) and a finished `bash run_cascade.sh`; writes one log
#                           for each run to bench/vllm/ and prints the two numbers below
#
# Two numbers to look at: "log-prob gap" compares engine and trainer after syncs 0, 1, 10, 20, ...; "eval" is
# the accuracy on 150 held-out problems, one sample each.

set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
export PYTHONUNBUFFERED=1
export TOKENIZERS_PARALLELISM=false

for run in torch:1 vllm:1 vllm:2; do
    engine=${run%:*}
    ranks=${run#*:}
    log=bench/vllm/$engine$ranks.log
    rm -rf out/bench_vllm
    flags=(
        --init_from=out/toy/ifrl/final --out_dir=out/bench_vllm --engine="$engine"
        --data=out/toy/data/math_rl.jsonl --eval_data=out/toy/data/math_dev.jsonl
        --num_steps=50 --lr=6e-4 --final_lr=0.1
        --prompts_per_step=16 --group_size=8 --temperature=1.0 --top_p=1.0
        --max_prompt_tokens=256 --max_new_tokens=80 --micro_batch_tokens=8192 --reward_workers=2
        --eval_every=5 --eval_rows=150 --save_every=50 --sample_every=50
    )
    echo "# $(git rev-parse --short HEAD) torchrun --nproc_per_node=$ranks mathrl.py ${flags[*]}" | tee "$log"
    .venv-vllm/bin/torchrun --nproc_per_node="$ranks" --rdzv-backend=c10d --rdzv-endpoint=localhost:0 \
        mathrl.py "${flags[@]}" 2> >(grep -v Warning >&2 || true) | grep -E "^(step|vLLM|out/)" >> "$log"
    grep -h "log-prob gap" "$log" | tail -1 || true
    grep -o "eval [0-9.]*" "$log" | tr '\n' ' '
    echo
done

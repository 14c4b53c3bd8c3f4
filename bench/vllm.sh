#!/usr/bin/env bash
# The toy's Math RL with vLLM's CPU build, on one rank and on two, beside the built-in sampler: same data, seeds and flags.
#   bash bench/vllm.sh      needs .venv-vllm (see README) and a finished `bash run_cascade.sh`; logs and the table go to bench/vllm/
# Look at: "log-prob gap" (engine against trainer, after syncs 0, 1, 10, 20, ...) and eval (held-out accuracy, 150 problems x 1).
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
for run in torch:1 vllm:1 vllm:2; do
    engine=${run%:*} ranks=${run#*:} log=bench/vllm/${run/:/}.log
    rm -rf out/bench_vllm
    args=(mathrl.py --init_from=out/toy/ifrl/final --out_dir=out/bench_vllm --data=out/toy/data/math_rl.jsonl --eval_data=out/toy/data/math_dev.jsonl
        --engine="$engine" --num_steps=50 --lr=6e-4 --final_lr=0.1 --prompts_per_step=16 --group_size=8 --temperature=1.0 --top_p=1.0
        --max_prompt_tokens=256 --max_new_tokens=80 --micro_batch_tokens=8192 --reward_workers=2 --eval_every=5 --eval_rows=150 --save_every=50 --sample_every=50)
    echo "# $(git rev-parse --short HEAD) torchrun --nproc_per_node=$ranks ${args[*]}" | tee "$log"
    .venv-vllm/bin/torchrun --nproc_per_node="$ranks" --rdzv-backend=c10d --rdzv-endpoint=localhost:0 "${args[@]}" 2> >(grep -v Warning >&2 || true) \
        | grep -E "^(step|vLLM|out/)" >> "$log"
    grep -h "log-prob gap" "$log" | tail -1 || true
    grep -o "eval [0-9.]*" "$log" | tr '\n' ' '; echo
done

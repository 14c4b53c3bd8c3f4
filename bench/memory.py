"""Host memory over 2,000 steps of Math RL: a run that lasts for weeks must not grow.

    python bench/memory.py [--steps=2000]       # about 5 minutes of CPU

It prints a line and writes bench/memory.json and .png. It takes the tests' miniature world and a
model taught for 200 steps, so that rewards differ and every part of a step runs: sampling,
math-verify in its child processes, the update, held-out scores, checkpoints. The number is
memory/rss_gb of metrics.jsonl: the memory of the training process at the end of a step. Growth is
the median of the last tenth of the run minus the median of the tenth before its middle.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys

from side_by_side import ROOT, machine

sys.path.insert(0, str(ROOT / "tests"))
from conftest import MAKE_WORLD, run_python


def run(steps, out):
    """metrics.jsonl of a run of `steps` tiny steps."""
    shutil.rmtree(out, ignore_errors=True)
    data = out / "data"
    run_python(
        "-c",
        MAKE_WORLD,
        f"--out={data}",
        "--vocab_size=640",
        "--hidden_size=48",
        "--num_layers=2",
        timeout=1200,
    )
    run_python(
        "sft.py",
        f"--init_from={data}/base",
        f"--data={data}/sft_stage2.jsonl",
        f"--out_dir={out}/sft",
        "--samples_per_step=32",
        "--num_steps=200",
        "--lr=5e-3",
        "--warmup_steps=10",
        "--schedule_steps=220",
        "--micro_batch_tokens=4096",
        "--max_seq_len=512",
        timeout=1200,
    )
    run_python(
        "mathrl.py",
        f"--init_from={out}/sft/final",
        f"--data={data}/math_sft.jsonl",
        f"--eval_data={data}/math_dev.jsonl",
        f"--out_dir={out}/rl",
        f"--num_steps={steps}",
        "--prompts_per_step=2",
        "--group_size=4",
        "--max_prompt_tokens=256",
        "--max_new_tokens=32",
        "--lr=1e-5",
        "--reward_workers=2",
        "--micro_batch_tokens=1024",
        "--eval_every=100",
        "--eval_rows=4",
        "--save_every=200",
        "--sample_every=0",
        # Two prompts a step: many steps in a row may have no gradient.
        "--max_dead_steps=0",
        "--top_p=1",
        timeout=7200,
    )
    return [json.loads(line) for line in open(out / "rl" / "metrics.jsonl")]


def plot(steps, megabytes, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 3))
    axis.plot(steps, megabytes, lw=0.8)
    axis.set_ylim(0, 1.15 * max(megabytes))
    axis.set_xlabel("step of Math RL")
    axis.set_ylabel("host memory, MB")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=2000)
    args = parser.parse_args()
    path = ROOT / "bench" / "memory"
    git = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    rows = run(args.steps, ROOT / "out" / "memory")
    megabytes, tenth = (
        [row["memory/rss_gb"] * 2**30 / 1e6 for row in rows],
        max(args.steps // 10, 1),
    )
    early, late = (
        statistics.median(megabytes[4 * tenth : 5 * tenth]),
        statistics.median(megabytes[-tenth:]),
    )
    trained = sum(row["grad_norm"] > 0 for row in rows)
    result = {
        "command": f"bench/memory.py --steps={args.steps}",
        "git": git,
        "machine": machine(),
        "steps": args.steps,
        "steps_with_gradient": trained,
        "first_mb": megabytes[0],
        "before_the_middle_mb": early,
        "last_tenth_mb": late,
        "most_mb": max(megabytes),
        "growth_mb": late - early,
        "every_10th_step_mb": [round(m, 1) for m in megabytes[::10]],
    }
    path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    plot([row["step"] for row in rows], megabytes, path.with_suffix(".png"))
    print(
        f"{args.steps} steps, {trained} with a gradient: {megabytes[0]:.0f} MB after the first, "
        f"{early:.0f} before the middle, {late:.0f} at the end; "
        f"growth {late - early:+.1f} MB, {100 * (late - early) / early:+.2f}%"
    )


if __name__ == "__main__":
    main()

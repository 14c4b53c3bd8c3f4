"""An ablation works as README says under "Your ablation". The tests do it in a copy of the
repository.

GSPO is a copy of mathrl.py with another loss; countdown is a new domain with rows and a verdict
of its own. Both are trained, measured and reported under their own names, and no test of the
repository turns red.
"""

import difflib
import json
import os
import random
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

# Group sequence policy optimisation (arXiv 2507.18071 eq. 5): one ratio per sequence, the
# geometric mean of its tokens' ratios.
GSPO_LOSS = '''
def grpo_loss(logprobs_T, old_logprobs_T, batch, counts, cfg):
    """GSPO: the log-ratio of a sequence is the mean of the log-ratios of its tokens."""
    scored_M = batch["loss_index"]
    sequence_M = torch.searchsorted(batch["cu_seqlens"].long(), scored_M, right=True) - 1
    difference_M = (logprobs_T - old_logprobs_T)[scored_M]
    num_sequences = len(batch["cu_seqlens"]) - 1
    sums = difference_M.new_zeros(num_sequences).index_add(0, sequence_M, difference_M)
    lengths = sequence_M.bincount(minlength=num_sequences)
    ratio_M = (sums / lengths).exp()[sequence_M]
    return -(ratio_M * batch["advantages_T"][scored_M]).sum() / counts["tokens"]
'''

# Countdown: combine two numbers by + or - so that they make a target. A row is {"numbers",
# "target"}.
COUNTDOWN = {
    "normalize": '''
def normalize(row, where):
    """{"numbers": [6, 4], "target": 2} -> {"messages", "think", "answer"}."""
    numbers = required_field(row, where, "numbers", list)
    target = required_field(row, where, "target", int)
    problem = f"Use {numbers[0]} and {numbers[1]} to make {target}."
    answer = {"numbers": numbers, "target": target}
    return {"messages": [{"role": "user", "content": problem}], "think": False, "answer": answer}
''',
    "load_rows": """
def load_rows(cfg, path=None, limit=0):
    return load_table(path or cfg.data, normalize, limit)
""",
    "verdict": '''
def verdict(response, answer, prompt=None, as_text=False):
    """(reward, status): the last box uses every number once, and makes the target."""
    expression = last_box(response.rpartition("</think>")[2])
    if expression is None or not re.fullmatch(r"\\d+([+-]\\d+)*", expression):
        return 0, "no_answer"
    terms = [int(term) for term in re.findall(r"[+-]?\\d+", expression)]
    right_numbers = sorted(abs(term) for term in terms) == sorted(answer["numbers"])
    right = right_numbers and sum(terms) == answer["target"]
    return (1, "ok") if right else (0, "wrong")
''',
    "make_reward": """
def make_reward(cfg):
    return in_background(ThreadPoolExecutor(1), judge, ("reward", "status"))
""",
    "monitor": """
def monitor(rollouts):
    return {}
""",
    "self_test": '''
def self_test(rows, cfg):
    """Before training: a right expression earns 1, a wrong one 0."""
    answer = {"numbers": [6, 4], "target": 2}
    if [reward(boxed_response(text), answer) for text in ("6-4", "6+4", "1+1")] != [1, 0, 0]:
        fail("verifier self test: 6-4 makes 2.")
''',
}
RL = (
    "--num_steps=2 --prompts_per_step=4 --group_size=4 --max_prompt_tokens=256 --max_new_tokens=32 "
    "--temperature=1.0 --top_p=1.0 --lr=1e-3 --micro_batch_tokens=2048 --reward_workers=1 "
    "--shard=replicate"
).split()


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A folder with the repository's tracked files, which is a git repository of its own."""
    folder = tmp_path_factory.mktemp("copy")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("needs git, which knows the tracked files")
    for name in listed.stdout.split():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    if (ROOT / ".venv").exists():
        (folder / ".venv").symlink_to(ROOT / ".venv")
    for command in (["init", "-q"], ["add", "-A"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


def run(folder, *command, ranks=1, check=True):
    """Run a Python command in that folder. Returns (exit code, stdout, stderr)."""
    launch = [sys.executable]
    if ranks > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    done = subprocess.run(
        [*launch, *map(str, command)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert not check or done.returncode == 0, (
        f"{command}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    )
    return done.returncode, done.stdout, done.stderr


def with_functions(source, functions):
    """A script's source with some of its top-level functions replaced."""
    for name, text in functions.items():
        pattern = rf"^def {name}\(.*?(?=\n\n\n)"
        source, found = re.subn(pattern, lambda _: text.strip(), source, flags=re.S | re.M)
        assert found == 1, name
    return source


@pytest.mark.slow
def test_a_copied_stage_shows_under_its_own_name(copy, world, taught):
    source = with_functions((copy / "mathrl.py").read_text(), {"grpo_loss": GSPO_LOSS})
    (copy / "my_gspo.py").write_text(source)
    data = (f"--init_from={taught}", f"--data={world}/math_rl.jsonl")
    _, out, _ = run(copy, "my_gspo.py", *data, "--out_dir=out/my_gspo", *RL, ranks=2)
    assert "step 2/2" in out

    # Measured beside another stage: a row of its own, last in the matrix, with its gates checked.
    results = ("--results=out/results.jsonl", "--limit=4", "--samples=1", "--max_new_tokens=16")
    for name, model in (("sft", taught), ("", "out/my_gspo/final")):
        label = [f"--stage={name}"] if name else []
        tasks = ("--tasks=math", f"--data={world}", *label, *results)
        run(copy, "evaluate.py", f"--model={model}", *tasks)
    lines = [json.loads(line) for line in (copy / "out" / "results.jsonl").read_text().splitlines()]
    assert [r["stage"] for r in lines] == ["sft"] * 3 + ["my_gspo"] * 3
    _, out, _ = run(copy, "-m", "evals.report", "--run=out")
    rows = [line.split()[0] for line in out.splitlines() if re.match(r"(sft|my_gspo) ", line)]
    assert rows[:2] == ["sft", "my_gspo"]
    page = (copy / "out" / "report.html").read_text()
    report = (copy / "out" / "report.md").read_text()
    assert "my_gspo" in page and "| my_gspo | 2 |" in report and "my_gspo.py" in report
    assert (copy / "out" / "curves_my_gspo.png").exists()

    # A report of that one run, from its own folder.
    _, out, _ = run(copy, "-m", "evals.report", "--run=out/my_gspo")
    assert "| my_gspo | 2 |" in (copy / "out" / "my_gspo" / "report.md").read_text()


@pytest.mark.slow
def test_an_error_in_a_copied_stage_names_rank_and_step(copy, world, taught):
    source = (copy / "mathrl.py").read_text()
    packing = "    batches, num_real = collate("
    assert packing in source
    source = source.replace(packing, f"    raise ValueError('my idea')\n{packing}", 1)
    (copy / "my_mistake.py").write_text(source)
    data = (f"--init_from={taught}", f"--data={world}/math_rl.jsonl", "--out_dir=out/my_mistake")
    code, _, err = run(copy, "my_mistake.py", *data, *RL, check=False)
    said = [line for line in err.splitlines() if line.startswith("my_mistake.py: ")]
    assert code == 1 and said == [
        "my_mistake.py: rank 0, step 1, train_step: ValueError: my idea. "
        "Run it again: it goes on from the last checkpoint."
    ]


@pytest.mark.slow
def test_a_copy_turns_no_test_of_the_repository_red(copy):
    shutil.copy(copy / "mathrl.py", copy / "my_copy.py")
    with open(copy / "my_copy.py", "a") as f:
        f.write("\n\ndef an_idea(x): return x   if x else   None  # as people write it\n")
    tests = ("tests/test_repo.py", "tests/test_stage_diff.py", "tests/test_presets.py")
    quick = ("-k", "not importing and not flags_of_the_other and not of_their_scripts")
    run(copy, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests, *quick)


def test_a_copy_elsewhere_is_told_where_it_has_to_stand(tmp_path):
    shutil.copy(ROOT / "mathrl.py", tmp_path / "my_idea.py")
    code, _, err = run(tmp_path, "my_idea.py", "--help", check=False)
    assert code == 1 and "keep copies beside it" in err and err.rstrip().endswith("'engine'")


@pytest.mark.slow
def test_a_new_domain_of_sixty_lines_learns(copy, world):
    """Countdown as README says: functions in the copy, one line in evaluate.py, and it learns."""
    original = (copy / "mathrl.py").read_text()
    source = with_functions(original, COUNTDOWN)
    imports = "from concurrent.futures import ThreadPoolExecutor\n"
    source = source.replace("from dataclasses import", imports + "from dataclasses import", 1)
    (copy / "my_countdown.py").write_text(source)
    diff = difflib.unified_diff(original.splitlines(), source.splitlines(), lineterm="", n=0)
    added = [line for line in diff if line.startswith("+") and not line.startswith("+++")]
    print(f"lines of the new domain: {len(added)} of at most 60")
    assert len(added) <= 60
    evaluation = (copy / "evaluate.py").read_text()
    line = '    "countdown": stage_task("my_countdown", ("no_think",)),\n'
    evaluation = evaluation.replace("TASKS = {\n", "TASKS = {\n" + line, 1)
    (copy / "evaluate.py").write_text(evaluation)

    make_rows(copy)
    flags = "--samples_per_step=32 --num_steps=250 --lr=5e-3 --warmup_steps=10 --schedule_steps=270"
    flags += " --micro_batch_tokens=4096 --max_seq_len=256 --out_dir=out/sft"
    run(copy, "sft.py", f"--init_from={world}/base", "--data=demos.jsonl", *flags.split())
    flags = "--num_steps=40 --prompts_per_step=16 --group_size=8 --eval_every=40 --eval_rows=96"
    flags += " --eval_data=countdown_test.jsonl --out_dir=out/my_countdown --overlong_filter=false"
    command = ("my_countdown.py", "--init_from=out/sft/final", "--data=countdown_rl.jsonl")
    _, out, _ = run(copy, *command, *RL, *flags.split())
    evals = [float(text) for text in re.findall(r"eval (\d\.\d+)", out)]
    print(f"held-out after step 1: {evals[0]:.2f}, after step 40: {evals[-1]:.2f}")
    assert evals[-1] > evals[0] + 0.15

    # Measured by its own verdict.
    tasks = ("--tasks=countdown", "--data=.", "--samples=1", "--results=out/results.jsonl")
    _, out, _ = run(copy, "evaluate.py", "--model=out/my_countdown/final", *tasks)
    assert re.search(r"my_countdown +countdown +no_think +sampled", out)


def make_rows(folder):
    """Write countdown_rl.jsonl, countdown_test.jsonl and demos.jsonl. Four of ten demonstrations
    have the wrong sign."""
    dice = random.Random(0)
    rows = []
    for a in range(2, 30):
        for b in range(1, a):
            rows.append({"numbers": [a, b], "target": a + b})
            rows.append({"numbers": [a, b], "target": a - b})
    dice.shuffle(rows)
    write(folder / "countdown_test.jsonl", rows[:96])
    write(folder / "countdown_rl.jsonl", rows[96:])
    demos = []
    for row in rows[96:] * 2:
        a, b = row["numbers"]
        right, wrong = ("+", "-") if row["target"] == a + b else ("-", "+")
        sign = wrong if dice.random() < 0.4 else right
        user = {"role": "user", "content": f"Use {a} and {b} to make {row['target']}."}
        reply = {"role": "assistant", "content": f"\\boxed{{{a}{sign}{b}}}"}
        demos.append({"messages": [user, reply], "thinking": False})
    write(folder / "demos.jsonl", demos)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

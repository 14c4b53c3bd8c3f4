"""Guards: an evaluation that was cut off repeats no finished sample, and a seed decides the table.

The gates stop what they should and nothing else: not the paper's own columns, not noise. A stage or
a task that nobody listed is measured like the others.
"""

import contextlib
import json
import pathlib
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from conftest import ROOT, run_python

import evaluate
from bench.paper_table import PAPER, THINKING
from engine import Rollout, TorchEngine
from evals import plots, results
from lib import checkpoint
from model import Qwen3, load_tokenizer

SHORT = ("--tasks=math,chat", "--max_new_tokens=24", "--samples=2", "--limit=4")


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def flags_of(world, out):
    model, data, kept = f"--model={world}/base", f"--data={world}", f"--results={out}/results.jsonl"
    return [model, data, kept, "--stage=sft", *SHORT]


def run(world, out, *flags, **keywords):
    """Evaluate the base model into a new folder and return the result lines."""
    out.mkdir()
    run_python("evaluate.py", *flags_of(world, out), *flags, **keywords)
    return read_jsonl(out / "results.jsonl")


def samples(out):
    return {p.name: p.read_text().splitlines() for p in sorted((out / "samples" / "sft").iterdir())}


# ---- Samples on the disk -------------------------------------------------------------------------
# evaluate.py with an engine that says which completions it draws, one line a batch.
SPY = """
import engine

generate = engine.TorchEngine.generate

def spying(self, rollouts, *args, **keywords):
    print("drew", [r.key for r in rollouts])
    generate(self, rollouts, *args, **keywords)

engine.TorchEngine.generate = spying
import evaluate
from lib.common import finish
from lib.flags import parse_config

evaluate.main(parse_config(evaluate.Config))
finish()
"""


def drawn_by(*flags):
    """Return the keys that an evaluation draws, a list for each batch."""
    _, out, _ = run_python("-c", SPY, *flags)
    return [eval(line[5:]) for line in out.splitlines() if line.startswith("drew")]


def without_verdict(line):
    row = json.loads(line)
    for key in ("score", "weight", "reward", "status"):
        del row[key]
    return json.dumps(row)


@pytest.mark.slow
def test_an_interrupted_evaluation_repeats_no_finished_sample_and_ends_with_the_same_table(
    world, tmp_path
):
    """The files of a whole run are cut back to what a kill leaves.

    Some verdicts are missing, a line is half written, a file was not begun.
    """
    whole = run(world, tmp_path / "a")
    lines = samples(tmp_path / "a")
    assert {len(rows) for name, rows in lines.items() if "sampled" in name} == {8}
    assert {len(rows) for name, rows in lines.items() if "greedy" in name} == {4}
    cut = tmp_path / "b" / "samples" / "sft"
    cut.mkdir(parents=True)
    kept = set()
    for name, rows in lines.items():
        if name.startswith("chat_think_greedy"):
            continue
        head = [without_verdict(rows[0]), *rows[1 : len(rows) // 2]]
        kept |= {json.loads(row)["key"] for row in head}
        (cut / name).write_text("\n".join(head) + "\n" + rows[-1][:40])

    flags = flags_of(world, tmp_path / "b")
    drawn = [key for batch in drawn_by(*flags) for key in batch]
    total = sum(len(rows) for rows in lines.values())
    print(f"{total} samples, {len(kept)} kept, {len(drawn)} drawn after the cut")
    assert not kept & set(drawn)
    assert len(drawn) == len(set(drawn)) == total - len(kept)
    assert read_jsonl(tmp_path / "b" / "results.jsonl") == whole
    assert samples(tmp_path / "b") == lines

    # Everything is there, so nothing is drawn.
    assert drawn_by(*flags) == []

    # A smaller evaluation forgets nothing of the larger one.
    drawn_by(*flags, "--limit=2", "--samples=1")
    for name, rows in samples(tmp_path / "b").items():
        assert sorted(rows) == sorted(lines[name])

    # A larger one draws only what is new: a third sample of four problems.
    num_sampled = sum("greedy" not in name for name in lines)
    assert sum(len(batch) for batch in drawn_by(*flags, "--samples=3")) == 4 * num_sampled


@pytest.mark.slow
@pytest.mark.parametrize("limit", [4, 20])
def test_the_same_seed_gives_the_same_table_on_one_rank_and_on_two(limit, world, tmp_path):
    """4 problems: the samples of one are dealt to both ranks. 20: each rank has whole ones."""
    one = run(world, tmp_path / "one", f"--limit={limit}", ranks=1)
    two = run(world, tmp_path / "two", f"--limit={limit}", ranks=2)
    assert one == two
    other = run(world, tmp_path / "other", f"--limit={limit}", "--seed=1")
    assert [r["tokens"] for r in other] != [r["tokens"] for r in one]


def test_tasks_with_and_without_yarn_are_refused_where_one_process_has_one_engine(
    world, monkeypatch, capsys
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(SystemExit) as stop:
        evaluate.main(evaluate.Config(model=str(world / "base"), tasks="ifeval,math"))
    assert stop.value.code == 2
    assert "measure them apart" in capsys.readouterr().err


def check(tmp_path, capsys, **flags):
    """Return what evaluate.py says of tasks that are to be checked: (exit code, output)."""
    code = 0
    try:
        evaluate.main(evaluate.Config(data=str(tmp_path), **flags))
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr()
    return code, said.out + said.err


def test_what_tasks_lack_is_one_sentence(tmp_path, capsys, monkeypatch):
    pro = "lcb_pro_25q2_easy,lcb_pro_25q2_medium"
    code, said = check(tmp_path, capsys, check_tasks=f"math,{pro}", offline=True)
    assert code == 2
    assert said.partition(": ")[2] == (
        f"math: there is no {tmp_path}/math_test.jsonl; {pro.replace(',', ', ')}: pass "
        "--code_judge=URL of a running LightCPVerifier. Nothing was trained.\n"
    )
    # Its files come from the samples of the first half, so it has to come after that.
    repos = {"repos": str(tmp_path), "verifier_python": sys.executable, "offline": True}
    for tasks, complaint in (
        ("swebench", "name swebench_files before it"),
        ("swebench,swebench_files", "name swebench_files before it"),
        ("swebench_files,swebench", ""),
    ):
        results = f"{tmp_path}/results.jsonl"
        code, said = check(tmp_path, capsys, check_tasks=tasks, results=results, **repos)
        assert complaint in said and "its package is not installed" in said
        assert bool(complaint) == ("name swebench_files" in said)
    code, said = check(tmp_path, capsys, check_tasks="swebench_files,swebench", **repos)
    assert "swebench: pass --results" in said

    # A repository that the rows name and --repos has not.
    rows = [{"repo": "me/calc"}, {"repo": "you/there"}]
    write_jsonl(tmp_path / "swebench_files.jsonl", rows)
    (tmp_path / "me__calc").mkdir()
    code, said = check(tmp_path, capsys, check_tasks="swebench_files", **repos)
    assert (code, "has no git clone named you__there" in said) == (2, True)
    (tmp_path / "you__there").mkdir()
    code, said = check(tmp_path, capsys, check_tasks="swebench_files", **repos)
    assert (code, said) == (0, "every task can be measured: swebench_files\n")


def test_the_first_row_of_a_hub_set_is_asked_for_before_anything_is_trained(
    tmp_path, capsys, monkeypatch
):
    asked = []
    monkeypatch.setattr(evaluate, "data_files", lambda path: [f"{path}/1.csv", f"{path}/2.csv"])
    monkeypatch.setattr(evaluate, "read_file", lambda file: iter([asked.append(file)]))
    (tmp_path / "math500.jsonl").write_text("{}\n")
    tasks = "gpqa,math500"
    code, _ = check(tmp_path, capsys, check_tasks=tasks)
    assert code == 0
    assert asked == ["Idavidrein/gpqa:gpqa_diamond/1.csv", f"{tmp_path}/math500.jsonl/1.csv"]
    code, _ = check(tmp_path, capsys, check_tasks=tasks, offline=True)
    assert (code, len(asked)) == (0, 3)  # the local file alone
    code, said = check(tmp_path, capsys, check_tasks="gpqa,nothing")
    assert code == 2 and "--tasks: nothing unknown" in said


def test_equal_completions_of_a_problem_are_graded_once_and_all_have_the_verdict(tmp_path):
    # (problem, completion, finish reason) of four samples and a greedy one. Problem 1 says x too,
    # which is another verdict; a completion that was cut off is not the same as one that ended.
    said = [(0, "x", "stop"), (0, "x", "stop"), (0, "y", "stop"), (1, "x", "stop")]
    said.append((0, "x", "length"))
    rollouts = []
    for i, (problem, _, _) in enumerate(said):
        row = {"messages": [{"content": ""}]}
        r = Rollout(row=row, group=problem, prompt_ids=[], seed=i)
        r.sample, r.metric, r.key = i, None, f"k-{i}"
        rollouts.append(r)

    class Engine:
        def generate(self, rollouts, *how, on_finished):
            for r in rollouts:
                _, r.text, r.finish_reason = said[r.seed]
                r.completion_ids = [1]
                on_finished(r)

    graded = []

    def submit(rollout):
        pass

    def collect(rollouts):
        for r in rollouts:
            graded.append((r.group, r.text, r.finish_reason))
            r.reward = float(r.group + (r.text == "y"))
            r.status = "ok"

    def metric(rollout):
        return rollout.reward

    how = {"max_new_tokens": 1, "temperature": 1.0, "top_p": 1.0}
    decodings = [
        (rollouts[:4], str(tmp_path / "sampled")),
        (rollouts[4:], str(tmp_path / "greedy")),
    ]
    evaluate.complete(Engine(), decodings, how, (submit, collect), metric, 0)
    assert graded == [said[0], said[2], said[3], said[4]]
    assert [r.metric for r in rollouts] == [0.0, 0.0, 1.0, 1.0, 0.0]
    kept = read_jsonl(tmp_path / "sampled.rank0.jsonl")
    assert [line["score"] for line in kept] == [0.0, 0.0, 1.0, 1.0]
    assert {line["status"] for line in kept} == {"ok"}


def test_a_long_prompt_shortens_its_own_budget_and_no_other(world, monkeypatch, capsys):
    """100 positions, prompts of 10, 10, 90 and 100 tokens, answers of up to 50: the third may have
    10, the last is not asked, as the one that its loader says is not to be asked."""
    drawn = []

    class Engine:
        def generate(self, rollouts, max_new_tokens, *how, on_finished):
            for r in rollouts:
                drawn.append((r.group, max_new_tokens))
                r.text, r.finish_reason, r.completion_ids = "</think>yes", "stop", [1]
                on_finished(r)

    lengths = {"a": 10, "b": 10, "c": 90, "d": 100, "e": 10}

    def load(path, outside):
        rows = [{"messages": [{"content": name}], "part": "odd"} for name in lengths]
        rows[0]["part"] = "even"
        rows[4]["not_asked"] = "no file was named"

        def collect(rollouts):
            for r in rollouts:
                r.reward, r.status = float(r.text.endswith("yes")), "ok"

        return rows, (lambda r: None, collect), lambda r: r.reward

    def render(tokenizer, messages, think, tools=None):
        return [0] * lengths[messages[0]["content"]], None

    task = evaluate.task(load, max_new_tokens=50, samples=2, greedy=False)
    monkeypatch.setitem(evaluate.TASKS, "long", task)
    monkeypatch.setattr(evaluate, "render_chat", render)
    cfg = evaluate.Config(model=str(world / "base"), stage="s")
    (result,) = evaluate.score_task("long", Engine(), None, cfg, 0, 1, 100)
    assert drawn == [(0, 50), (0, 50), (1, 50), (1, 50), (2, 10), (2, 10)]
    assert (result["score"], result["n"], result["samples"]) == (0.6, 5, 2)
    assert result["parts"] == {"even": 1.0, "odd": 0.5}
    evaluate.print_table([result])
    said = capsys.readouterr().out
    assert "1 of 5 problems score 0 without being asked: the prompt fills all positions" in said
    assert "1 of 5 problems score 0 without being asked: no file was named" in said
    assert "1 of 5 prompts are so long" in said and "(the longest leaves 10)" in said
    assert "of these: even 100.0, odd 50.0" in said


def test_samples_of_other_weights_or_settings_are_not_taken_for_these(world, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    before = evaluate.weights_of(folder)
    (folder / "model.safetensors").write_bytes(b"others!!")
    assert evaluate.weights_of(folder) != before
    files = {"model.safetensors": [7, "abc"], "optim_rank0.pt": [1, "x"]}
    (folder / "run.json").write_text(json.dumps({"files": files}))
    assert evaluate.weights_of(folder) == [["model.safetensors", [7, "abc"]]]


def test_the_interval_by_hand():
    """Two problems with 1.0 and 0.0: the bootstrap of their mean reaches from 0 to 1.

    Equal problems leave no doubt.
    """
    assert evaluate.interval([[1, 1], [0, 0]]) == (0.5, 0.0, 1.0)
    assert evaluate.interval([[0.5, 0.5], [1, 0]]) == (0.5, 0.5, 0.5)
    assert evaluate.interval([[1], [0]], weights_PG=[[3], [1]])[0] == 0.75
    scores = np.random.default_rng(0).random((200, 4)) < 0.3
    mean, low, high = evaluate.interval(scores)
    half = 1.96 * scores.mean(axis=1).std(ddof=1) / 200**0.5
    print(f"bootstrap half-widths {mean - low:.4f} {high - mean:.4f}, normal theory {half:.4f}")
    assert abs((high - low) / 2 - half) < 0.1 * half  # a tolerance of 10%


# ---- Gates ---------------------------------------------------------------------------------------
STAGES = results.STAGES


def cell(stage, name, percent, n, mode="think"):
    """A result line with the sampling noise of n draws: 1.96 standard errors of a share."""
    p = percent / 100
    half = 1.96 * (p * (1 - p) / n) ** 0.5
    return {
        "stage": stage,
        "task": name,
        "mode": mode,
        "decoding": "sampled",
        "score": p,
        "low": p - half,
        "high": p + half,
        "n": n,
        "samples": 1,
        "seed": 0,
        "split": "test",
    }


def cells_of(lines):
    return {(r["stage"], r["task"], r["mode"], r["decoding"]): r for r in lines}


def broken(table, stages=STAGES):
    """(stage, task) of every broken gate of {task: (n, scores after each stage)}."""
    lines = []
    for name, (n, scores) in table.items():
        for stage, percent in zip(stages, scores):
            lines.append(cell(stage, name, percent, n))
    found = results.broken_gates(cells_of(lines), stages)
    print("\n".join(text for _, text in found))
    return [(stage, text.split()[0]) for stage, text in found]


def changed(name, *scores):
    return PAPER | {name: (PAPER[name][0], scores)}


def test_the_papers_own_columns_pass_their_gates():
    assert broken(PAPER) == []
    for column in THINKING.values():
        table = {name: (PAPER[name][0], scores) for name, scores in column.items()}
        assert broken(table) == []


def test_aime_noise_is_what_was_measured_elsewhere():
    """AceReason-Nemotron 1.0 reports a standard error of about 0.7 points (64 samples)."""
    c = cell("sft", "aime24", 90.0, PAPER["aime24"][0])
    error = 100 * (c["high"] - c["score"]) / 1.96
    print(f"standard error {error:.2f}, reported about 0.7, tolerance 0.1")
    assert abs(error - 0.7) < 0.1


def test_a_debt_that_is_not_paid_stops_the_stage_that_owed_it():
    """RLHF may cost IFEval 25 points; IF-RL has to bring back the 70.8 of SFT."""
    assert broken(changed("ifeval", 70.8, 50.1, 60.0, 60.0, 60.0, 60.0)) == [("ifrl", "ifeval")]
    # back, within the noise
    assert broken(changed("ifeval", 70.8, 50.1, 70.4, 70.4, 70.4, 70.4)) == []
    # more than was declared
    assert broken(changed("ifeval", 70.8, 30.0, 90.4, 90.4, 90.4, 90.4)) == [("rlhf", "ifeval")]


def test_a_stage_of_two_parts_pays_by_its_second():
    stages = ("sft", "rlhf", "ifrl1", "ifrl2", "mathrl1")
    assert broken({"ifeval": (4328, (70.8, 50.1, 60.0, 90.0, 90.0))}, stages) == []
    assert broken({"ifeval": (4328, (70.8, 50.1, 60.0, 60.0, 60.0))}, stages) == [
        ("ifrl2", "ifeval")
    ]
    # nobody paid
    assert broken({"ifeval": (4328, (70.8, 50.1, 60.0))}, ("sft", "rlhf", "mathrl")) == [
        ("mathrl", "ifeval")
    ]


def test_an_undeclared_loss_stops_and_is_reported_once():
    assert broken(changed("lcb_v6", 56.7, 67.2, 66.7, 67.4, 71.5, 65.0)) == [("swerl", "lcb_v6")]
    assert broken(changed("aime25", 72.8, 75.0, 60.0, 60.0, 60.5, 60.1)) == [("ifrl", "aime25")]


def test_small_losses_do_not_add_up_unseen():
    """Each stage loses points within the noise of its neighbour: the best score so far counts."""
    found = broken({"mmlu": (400, (83.0, 81.0, 79.0, 77.0, 75.0, 68.0))})
    assert found[-1:] == [("swerl", "mmlu")]


def noisy_run(rng):
    """Return the cells of a toy run whose scores differ by noise alone."""
    columns = [
        ("chat", "think"),
        ("if", "think"),
        ("if", "no_think"),
        ("math", "think"),
        ("code", "think"),
        ("swe", "think"),
    ]
    chances = np.clip(rng.normal(0.5, 0.3, 260), 0, 1)  # to solve each of the 260 problems
    lines = []
    for stage in STAGES:
        for name, mode in columns:
            solved = rng.random((260, 4)) < chances[:, None]
            score, low, high = evaluate.interval(solved, resamples=100)
            line = cell(stage, name, 50, 1, mode)
            lines.append(line | {"score": score, "low": low, "high": high})
    return cells_of(lines)


def test_noise_alone_stops_no_toy_run():
    """The scores of a toy run are drawn again and again: how often would a gate break?"""
    rng, runs = np.random.default_rng(0), 150
    stopped = 0
    for _ in range(runs):
        if results.broken_gates(noisy_run(rng), STAGES):
            stopped += 1
    print(f"{stopped} of {runs} runs of pure noise were stopped, at most 5% are tolerated")
    assert stopped <= 0.05 * runs


@pytest.mark.parametrize("log", ["results.jsonl", "results_seed1.jsonl", "results_seed2.jsonl"])
def test_the_logged_toy_runs_pass(log, tmp_path):
    write_jsonl(tmp_path / "results.jsonl", read_jsonl(ROOT / "bench" / "toy" / log))
    assert results.check_gates(str(tmp_path)) == ""


def test_the_flag_says_it_in_one_sentence_and_ends_with_2(tmp_path):
    lines = [
        cell("mathrl", "code", 78.0, 1040),
        cell("coderl", "code", 79.0, 1040),
        cell("swerl", "code", 30.0, 1040),
    ]
    write_jsonl(tmp_path / "results.jsonl", lines)
    code, _, err = run_python("evaluate.py", f"--gates={tmp_path}", check=False)
    print(err)
    assert code == 2
    assert len(err.splitlines()) == 1
    assert "code (think, sampled) is at 30.0 after swerl" in err
    assert "KEEP_BEST=1" in err
    code, out, _ = run_python("evaluate.py", f"--gates={tmp_path}", "--stage=coderl", check=False)
    assert code == 0
    assert "every gate holds" in out


def test_problem_scores_reads_the_samples_of_the_result_and_no_others(tmp_path):
    line = {"stage": "sft", "task": "math", "mode": "think", "decoding": "paper"}
    line |= {"n": 2, "samples": 2, "score": 0.5}
    folder = tmp_path / "samples" / "sft"
    folder.mkdir(parents=True)
    scores = {(0, 0): 1, (0, 1): 0, (1, 0): 0, (1, 1): 1, (0, 2): 1, (2, 0): 1}
    rows = []
    for (problem, sample), score in scores.items():
        rows.append(json.dumps({"problem": problem, "sample": sample, "score": score}))
    (folder / "math_think_paper.rank0.jsonl").write_text("\n".join(rows) + "\n")
    assert results.problem_scores(tmp_path, line).tolist() == [0.5, 0.5]
    assert results.problem_scores(tmp_path, line | {"score": 0.6}) is None
    assert results.problem_scores(tmp_path / "moved", line) is None


def test_the_paired_difference_is_of_the_same_problems(tmp_path):
    # Both stages are as often right; the second one is right at exactly one problem more.
    right = {"sft": [1, 0, 0, 1, 0, 0, 1, 0], "mathrl": [1, 0, 1, 1, 0, 0, 1, 0]}
    lines = {}
    for stage, scores in right.items():
        folder = tmp_path / "samples" / stage
        folder.mkdir(parents=True)
        write_jsonl(
            folder / "math_think_paper.rank0.jsonl",
            [{"problem": i, "sample": 0, "score": score} for i, score in enumerate(scores)],
        )
        lines[stage] = {"stage": stage, "task": "math", "mode": "think", "decoding": "paper"}
        lines[stage] |= {"n": 8, "samples": 1, "score": sum(scores) / 8}
    mean, low, high = results.paired_difference(tmp_path, lines["sft"], lines["mathrl"])
    # The number of times that this problem is drawn in eight is binomial: 0 to 3 times in 97%.
    assert (mean, low, high) == (1 / 8, 0.0, 3 / 8)
    lines["sft"]["n"] = 7  # measured on other problems
    assert results.paired_difference(tmp_path, lines["sft"], lines["mathrl"]) is None


@pytest.mark.parametrize(
    "stage, why",
    [
        ("mathrl", "mathrl has no score that a stage before it has too."),
        ("my_idea", "my_idea has no score that a stage before it has too."),
        ("", ""),
        ("coderl", ""),
    ],
)
def test_no_gate_holds_where_none_was_checked(stage, why, tmp_path, capsys):
    lines = [
        cell("mathrl", "code", 78.0, 1040),
        cell("coderl", "code", 79.0, 1040),
        cell("my_idea", "math", 79.0, 1040),
        cell("my_idea", "code", 79.0, 1040) | {"decoding": "greedy"},
    ]
    write_jsonl(tmp_path / "results.jsonl", lines)
    results.print_gates(str(tmp_path), stage)
    said = f"no gate was checked: {why}" if why else "every gate holds."
    assert capsys.readouterr().out == f"{tmp_path}: {said}\n"


def test_one_stage_alone_checks_no_gate(tmp_path, capsys):
    write_jsonl(tmp_path / "results.jsonl", [cell("my_idea", "math", 79.0, 1040)])
    evaluate.main(evaluate.Config(gates=str(tmp_path)))
    said = capsys.readouterr().out
    assert "no gate was checked: no two stages have a score of the same task." in said
    assert "every gate holds" not in said


# ---- Stages that no cascade knows ----------------------------------------------------------------
def test_the_base_of_a_name():
    names = ("mathrl", "mathrl2", "sft10", "my_idea", "my_idea2", "mathrl_v2", "step_000050", "7")
    bases = ("mathrl", "mathrl", "sft", "my_idea", "my_idea2", "mathrl_v2", "step_000050", "7")
    assert tuple(results.base_of(name) for name in names) == bases


def test_unknown_stages_come_last_in_the_order_of_their_first_line(tmp_path):
    names = ["zeta", "swerl", "mathrl_control", "my_idea2", "mathrl2", "zeta", "mathrl1", "an_idea"]
    write_jsonl(tmp_path / "results.jsonl", [cell(name, "math", 50, 100) for name in names])
    cells, stages = results.read_results(str(tmp_path), "matrix")
    assert stages == ["mathrl1", "mathrl2", "swerl", "zeta", "my_idea2", "an_idea"]
    # The control stays in the cells: it is printed beside its stage.
    assert ("mathrl_control", "math", "think", "sampled") in cells


def test_an_unknown_stage_is_held_against_the_best_score_before_it():
    """It costs what GATES["*"] allows: 3 points of a toy skill, 1 of a benchmark."""
    stages = ("sft", "mathrl", "my_idea", "my_idea2")
    assert broken({"math": (10**8, (40.0, 90.0, 87.1, 84.2))}, stages) == []
    assert broken({"math": (10**8, (40.0, 90.0, 86.9, 86.9))}, stages) == [("my_idea", "math")]
    assert broken({"math": (10**8, (40.0, 90.0, 87.1, 83.9))}, stages) == [("my_idea2", "math")]
    # A loss that was reported is not reported again.
    found = broken({"aime24": (10**8, (40.0, 90.0, 88.9, 89.1))}, stages)
    assert found == [("my_idea", "aime24")]


def test_an_unknown_stage_does_not_collect_the_debts_of_the_recipe():
    """RLHF was lent 25 points of IFEval. A copy that starts from it need not bring them back."""
    stages = ("sft", "rlhf", "my_idea")
    assert broken({"ifeval": (10**8, (70.8, 50.1, 50.0))}, stages) == []
    assert broken({"ifeval": (10**8, (70.8, 50.1, 40.0))}, stages) == [("my_idea", "ifeval")]


def test_the_matrix_has_a_row_and_curves_for_an_unknown_stage(tmp_path, capsys):
    run = tmp_path / "toy"
    names = ("sft", "mathrl", "a_rather_long_name", "mathrl_control")
    for name in names:
        (run / name).mkdir(parents=True)
        rows = [{"step": 1, "reward": 0.1, "len": 9, "trunc": 0.0, "entropy": 1.0}]
        write_jsonl(run / name / "metrics.jsonl", rows)
    write_jsonl(run / "results.jsonl", [cell(name, "math", 50, 100) for name in names])
    plots.draw_matrix(str(run), {"mathrl": "math", "a_rather_long_name": "math"})
    printed = capsys.readouterr().out
    head, sft, mathrl, mine, *_ = printed.splitlines()[2:]
    assert len(head) == len(sft) == len(mathrl) == len(mine)
    assert mine.startswith("a_rather_long_name ")
    assert mine.endswith("50.0 [40, 60]*")
    assert sft.endswith("50.0 [40, 60] ")
    drawn = {path.name for path in run.glob("*.png")}
    curves = {"curves_mathrl.png", "curves_a_rather_long_name.png"}
    assert drawn == {"matrix.png", "stages.png"} | curves


def test_what_a_stage_and_its_control_cost_the_other_skills(capsys):
    scores = {"sft": (50, 40, 30), "mathrl": (90, 42, 25), "mathrl_control": (95, 10, 28)}
    columns = [("math", "think"), ("code", "think"), ("swe", "think")]
    cells = {}
    for stage, points in scores.items():
        for (task, mode), score in zip(columns, points, strict=True):
            cells[stage, task, mode, "sampled"] = cell(stage, task, score, 100)
    plots.print_other_skills(cells, ["sft", "mathrl"], columns, "sampled", {"mathrl": "math"})
    line = capsys.readouterr().out.splitlines()[-1]
    # Code +2 and SWE -5; beside it code -30 and SWE -2. Math is the stage's own.
    assert line == "mathrl   -1.5 (swe think -5.0) | more SFT -16.0 (code think -30.0)"


@pytest.mark.parametrize(
    "model, label",
    [
        ("out/toy/my_idea/final", "my_idea"),
        ("out/toy/my_idea/final/", "my_idea"),
        ("out/toy/my_idea/step_000050", "step_000050"),
        ("out/toy/data/base", "base"),
        ("Qwen3-8B", "Qwen3-8B"),
    ],
)
def test_the_label_of_a_checkpoint(model, label):
    assert evaluate.label_of(model) == label


def test_the_label_of_final_inside_its_stage(tmp_path, monkeypatch):
    (tmp_path / "my_idea").mkdir()
    monkeypatch.chdir(tmp_path / "my_idea")
    assert evaluate.label_of("final") == "my_idea"


# ---- A task that nobody listed -------------------------------------------------------------------
COUNTDOWN = """
from dataclasses import dataclass

from lib.data import load_table, required_field


@dataclass
class Config:
    data: str = ""
    target: int = 0


def normalize(row, where):
    prompt = required_field(row, where, "prompt")
    answer = required_field(row, where, "answer")
    return {"messages": [{"role": "user", "content": prompt}], "answer": answer}


def load_rows(cfg):
    return load_table(cfg.data, normalize)


def make_reward(cfg):
    def submit(rollout):
        pass

    def collect(rollouts):
        for r in rollouts:
            r.reward = float(r.text.endswith(r.row["answer"]))
            r.status = "ok" if r.reward else "wrong"

    return submit, collect


def metric(rollout):
    return rollout.reward
"""


class AlwaysSays7:
    def generate(self, rollouts, max_new_tokens, temperature, top_p, on_finished):
        for r in rollouts:
            r.text, r.finish_reason, r.completion_ids = "<think>\n\n</think>7", "stop", [1, 2]
            on_finished(r)


@pytest.fixture()
def countdown(tmp_path, monkeypatch):
    """The task of a script of one's own, listed as a user would list it, and its two problems."""
    (tmp_path / "my_countdown.py").write_text(COUNTDOWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_countdown", raising=False)
    monkeypatch.setitem(
        evaluate.TASKS, "countdown", evaluate.stage_task("my_countdown", ("think",))
    )
    rows = [{"prompt": "3 + 4", "answer": "7"}, {"prompt": "3 * 4", "answer": "12"}]
    write_jsonl(tmp_path / "countdown_test.jsonl", rows)
    return tmp_path


def test_one_line_of_tasks_makes_a_script_of_one_s_own_a_task(countdown, world, monkeypatch):
    model = Qwen3.from_pretrained(world / "base")
    monkeypatch.setattr(evaluate, "load", lambda cfg, device, rope: (model, AlwaysSays7()))
    checkpoint_folder = countdown / "run" / "my_countdown" / "final"
    checkpoint_folder.parent.mkdir(parents=True)
    checkpoint_folder.symlink_to(world / "base")
    cfg = evaluate.Config(
        model=str(checkpoint_folder),
        tasks="countdown",
        data=str(countdown),
        results=str(countdown / "run" / "results.jsonl"),
    )
    evaluate.main(cfg)
    sampled, paper, greedy = read_jsonl(countdown / "run" / "results.jsonl")
    assert (sampled["stage"], sampled["task"]) == ("my_countdown", "countdown")
    assert (sampled["score"], sampled["n"], sampled["samples"]) == (0.5, 2, 2)
    assert (paper["decoding"], paper["score"], paper["samples"]) == ("paper", 0.5, 2)
    assert (greedy["decoding"], greedy["score"]) == ("greedy", 0.5)
    kept = countdown / "run" / "samples" / "my_countdown" / "countdown_think_sampled.rank0.jsonl"
    assert len(read_jsonl(kept)) == 4


def test_the_own_skill_of_a_script_is_the_task_that_names_it(countdown):
    skills = evaluate.own_skills()
    assert skills == {
        "rlhf": "chat",
        "ifrl": "if",
        "mathrl": "math",
        "coderl": "code",
        "swerl": "swe",
        "my_countdown": "countdown",
    }
    assert plots.skill_of("mathrl2", skills) == "math"
    assert plots.skill_of("my_countdown", skills) == "countdown"
    assert plots.skill_of("my_countdown2", skills) is None


def test_all_toy_stays_the_five_skills_and_their_hard_problems(countdown, world, monkeypatch):
    asked = []
    monkeypatch.setattr(evaluate, "measure", lambda names, *rest: asked.extend(names))
    evaluate.main(evaluate.Config(model=str(world / "base"), tasks="all-toy"))
    assert asked == list(evaluate.TOY)
    assert asked[:3] == ["chat", "if", "if_hard"]


def test_settings_of_a_stage_task_are_fields_of_its_config(countdown, monkeypatch):
    task = evaluate.stage_task("my_countdown", ("think",), target=24)
    seen = []
    module = evaluate.import_stage("my_countdown")
    monkeypatch.setattr(module, "make_reward", seen.append)
    task["load"](str(countdown / "countdown_test.jsonl"), {})
    assert (seen[0].target, seen[0].data) == (24, str(countdown / "countdown_test.jsonl"))


def test_a_field_that_training_may_ignore_may_be_ignored_here(tmp_path, monkeypatch, capsys):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"prompt": "Sum it up.", "context": "A long text."}) + "\n")
    monkeypatch.setattr(evaluate.import_stage("rlhf"), "make_reward", lambda cfg: None)
    task = evaluate.stage_task("rlhf", ("think",))
    with pytest.raises(SystemExit):
        task["load"](str(path), {})
    assert "context" in capsys.readouterr().err
    rows, *_ = task["load"](str(path), {"ignore_fields": "context"})
    assert len(rows) == 1


def test_a_script_that_is_not_there_is_one_sentence(capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.stage_task("my_missing", ("think",))["load"]("", {})
    assert stop.value.code == 2
    assert "there is no script my_missing.py. Nothing was measured." in capsys.readouterr().err


# ---- The cascade stops at a broken gate ----------------------------------------------------------
# Stands for torchrun evaluate.py: writes the lines that an evaluation would.
LAUNCHER = """
import json
import os
import sys
import threading

sys.path[:0] = [{root!r}, {tests!r}]
from test_evaluate import cell

from evals import results

flags = dict(word[2:].split("=", 1) for word in sys.argv if word.startswith("--"))
step = int(os.path.basename(os.path.realpath(flags["model"]))[-6:])
stage = flags.get("stage") or f"step_{{step:06d}}"
math = {{25: 88.0, 50: 90.0, 75: 40.0}}[step]
with open(flags["results"], "a") as f:
    for line in (cell(stage, "math", math, 1040), cell(stage, "code", 70.0, 1040)):
        f.write(json.dumps(line) + "\\n")
folder = os.path.dirname(flags["results"])
if flags["results"].endswith("/results.jsonl"):
    with open(folder + "/broken_gate", "w") as f:
        f.write(results.check_gates(folder, stage))
"""


def cascade(tmp_path, **environment):
    """Run run_cascade.sh's own score() on a stage with three checkpoints."""
    out = tmp_path / "out"
    for step in (25, 50, 75):
        (out / "coderl" / f"step_{step:06d}").mkdir(parents=True, exist_ok=True)
    checkpoint.mark_final(str(out / "coderl"), str(out / "coderl" / "step_000075"))
    launcher = LAUNCHER.format(root=str(ROOT), tests=str(ROOT / "tests"))
    (tmp_path / "launch.py").write_text(launcher)
    write_jsonl(out / "results.jsonl", [cell("mathrl", "math", 91.0, 1040)])
    text = (ROOT / "run_cascade.sh").read_text()
    functions = text[text.index("run() {") : text.index("toy() {")]
    functions = functions.replace(".venv/bin/python", sys.executable)
    script = (
        "set -euo pipefail\n"
        f"SEED=0 FROM=x TASKS=math,code OUT={out}\n"
        f"LAUNCH='{sys.executable} {tmp_path}/launch.py'\n"
        f"{functions}\n"
        "stage coderl coderl\n"
        "echo went on\n"
    )
    environment = {"PATH": "/usr/bin:/bin", **environment}
    done = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    return out, done


@pytest.mark.slow
def test_a_broken_gate_stops_the_cascade_and_keep_best_goes_on_from_the_best_checkpoint(tmp_path):
    out, done = cascade(tmp_path)
    assert done.returncode == 2
    assert "went on" not in done.stdout
    assert "gate: math (think, sampled) is at 40.0 after coderl" in done.stderr
    assert not (out / "coderl" / "scored").exists()
    assert (out / "coderl" / "final").resolve().name == "step_000075"

    out, done = cascade(tmp_path, KEEP_BEST="1")
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    assert "went on" in done.stdout
    assert (out / "coderl" / "final").resolve().name == "step_000050"
    assert (out / "coderl" / "scored").exists()
    # The table holds the checkpoint that goes on.
    assert read_jsonl(out / "results.jsonl")[-2]["score"] == 0.9
    assert (out / "broken_gate").read_text() == ""


def test_the_best_checkpoint_is_never_pruned(tmp_path):
    for step in (1, 2, 3, 4):
        (tmp_path / f"step_{step:06d}").mkdir()
    assert checkpoint.best_checkpoint(str(tmp_path)) == ""
    evals = ((1, 0.2), (2, 0.9), (4, 0.5), (9, 1.0))
    write_jsonl(tmp_path / "metrics.jsonl", [{"step": s, "eval": e} for s, e in evals])
    assert checkpoint.best_checkpoint(str(tmp_path)) == "step_000002"  # step 9 was not saved


def test_keep_best_reads_sampled_scores_only(tmp_path):
    scores = {
        ("step_000001", "sampled"): 0.9,
        ("step_000001", "greedy"): 0.1,
        ("step_000002", "sampled"): 0.5,
        ("step_000002", "greedy"): 0.8,
    }
    lines = []
    for (step, decoding), score in scores.items():
        line = {"stage": step, "task": "math", "mode": "think"}
        lines.append(line | {"decoding": decoding, "score": score})
        (tmp_path / step).mkdir(exist_ok=True)
    write_jsonl(tmp_path / "candidates.jsonl", lines)
    results.keep_best(str(tmp_path))
    assert (tmp_path / "final").readlink() == pathlib.Path("step_000001")


# ---- Chat ----------------------------------------------------------------------------------------
def test_chat_streams_switches_modes_and_remembers_the_conversation(world, monkeypatch, capsys):
    """The engine is handed what training renders.

    That is the mode flag of this turn, and the earlier reply without its thought.
    """
    tokenizer = load_tokenizer(world / "base")
    prompts, settings, partial = [], set(), []

    class Engine:
        def generate(self, rollouts, max_new_tokens, temperature, top_p):
            (r,) = rollouts
            prompt = tokenizer.decode(r.prompt_ids, skip_special_tokens=False)
            prompts.append(prompt)
            settings.add((max_new_tokens, temperature, top_p))
            thinks = prompt.replace(" ", "").endswith("/think<|im_end|>\n<|im_start|>assistant\n")
            text = f"<think>\nhm\n</think>\nReply {len(prompts)}." if thinks else "Plain \u00e9."
            for token in tokenizer.encode(text).ids:
                r.completion_ids.append(token)
                time.sleep(0.06)
                partial.append(capsys.readouterr().out)
            r.finish_reason, r.text = "stop", text

    typed = iter(["Hello", "/no_think", "More", "Once /think", "/new", "Again"])

    def type_next(prompt):
        for text in typed:
            return text
        raise EOFError

    monkeypatch.setattr("builtins.input", type_next)
    model = Qwen3.from_pretrained(world / "base")
    evaluate.chat(model, Engine(), tokenizer, evaluate.Config(max_new_tokens=50))
    first, second, third, fourth = prompts
    assert first.endswith("Hello /think<|im_end|>\n<|im_start|>assistant\n")
    assert "Hello /no_think" in second
    assert "Reply 1." in second
    assert "hm" not in second
    assert "More /no_think<|im_end|>" in second
    assert "Once /think<|im_end|>" in third
    assert "Plain \u00e9." in third
    # The conversation was forgotten, and the flag of one turn did not stay.
    assert "Hello" not in fourth
    assert "Again /no_think" in fourth
    assert settings == {(50, 0.6, 0.95)}

    # The replies appear piece by piece, and nothing twice.
    shown = "".join(partial) + capsys.readouterr().out
    assert shown.count("Reply 1.") == 1
    assert shown.count("Plain \u00e9.") == 2
    assert sum(1 for text in partial if text) > 8


def test_ctrl_c_stops_a_reply_and_not_the_chat(world, monkeypatch, capsys):
    """The sampler lets the reply go, and what was said of it stays in the conversation."""
    tokenizer, model = load_tokenizer(world / "base"), Qwen3.from_pretrained(world / "base")
    engine = TorchEngine(model, tokenizer)
    engine.stops = []  # a reply that would go on to the end of the context
    replies, ended = [], threading.Event()
    generate, decode = engine.generate, engine._decode

    def decode_slowly(*args):
        time.sleep(0.01)  # 900 tokens take 9 seconds: Ctrl-C comes first, however busy the machine
        return decode(*args)

    def ctrl_c_after_a_token():
        while not replies[0].completion_ids:
            time.sleep(0.01)
        # Again, should the first one come where Python cannot raise it.
        while not ended.is_set():
            signal.raise_signal(signal.SIGINT)
            ended.wait(2)

    def interrupted(rollouts, *settings):
        replies.extend(rollouts)
        # Ctrl-C, as the main thread gets it while this thread samples.
        threading.Thread(target=ctrl_c_after_a_token).start()
        try:
            generate(rollouts, *settings)
        finally:
            ended.set()

    def no_input(prompt):
        if replies:
            raise EOFError
        return "Hello"

    monkeypatch.setattr(engine, "generate", interrupted)
    monkeypatch.setattr(engine, "_decode", decode_slowly)
    monkeypatch.setattr("builtins.input", no_input)
    # A shell may have started the tests in the background, where Ctrl-C is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        evaluate.chat(model, engine, tokenizer, evaluate.Config(max_new_tokens=900))
    finally:
        signal.signal(signal.SIGINT, before)
    (reply,) = replies
    assert "[stopped]" in capsys.readouterr().out
    assert 0 < len(reply.completion_ids) < 900
    assert reply.text == tokenizer.decode(reply.completion_ids, skip_special_tokens=False)


# ---- Ranks ---------------------------------------------------------------------------------------
def test_every_completion_has_dice_and_a_number_of_its_own_whatever_rank_draws_it(
    world, monkeypatch
):
    """3 problems x 4 samples on 2 ranks: dealt one by one, labelled by their place."""
    drawn = []

    def complete(engine, decodings, how, *rest):
        for rollouts, _ in decodings:
            for r in rollouts:
                r.metric, r.weight, r.num_tokens = 0.0, 1.0, 1
        sampled, _ = decodings[0]
        if how["temperature"] == 1.0:  # the paper's decoding is drawn apart
            drawn.extend((r.group, r.sample, r.seed) for r in sampled)

    monkeypatch.setattr(evaluate, "complete", complete)
    tokenizer = load_tokenizer(world / "base")
    cfg = evaluate.Config(model=str(world / "base"), data=str(world), limit=3, samples=4)
    for rank in (0, 1):
        with contextlib.suppress(ValueError):  # half of the greedy scores do not make a table
            evaluate.score_task("math", None, tokenizer, cfg, rank, 2, 1024)
    places = sorted((group, number) for group, number, _ in drawn)
    assert places == [(i, j) for i in range(3) for j in range(4)]
    assert len({seed for *_, seed in drawn}) == 12

"""Guards: an evaluation that was cut off repeats no finished sample, the same seed gives the same table, and the gates stop what
they should and nothing else: not the paper's own columns, not noise.
"""

import contextlib
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, run_python

import evaluate
from bench.paper_table import PAPER, THINKING
from evals import results
from lib import checkpoint
from model import load_tokenizer

SHORT = ("--tasks=math,chat", "--max_new_tokens=24", "--samples=2", "--limit=4")


def run(world, out, *flags, **keywords):
    run_python(
        "evaluate.py",
        f"--model={world}/base",
        f"--data={world}",
        f"--results={out}/results.jsonl",
        "--stage=sft",
        *SHORT,
        *flags,
        **keywords,
    )
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def samples(out):
    return {p.name: p.read_text().splitlines() for p in sorted((out / "samples" / "sft").iterdir())}


# ---- Samples on the disk -------------------------------------------------------------------------
@pytest.mark.slow
def test_an_interrupted_evaluation_repeats_no_finished_sample_and_ends_with_the_same_table(
    world, tmp_path
):
    """Cut the files of a whole run back to what a kill leaves: some verdicts missing, a line half written, a file not begun."""
    whole = run(world, tmp_path / "a", check=True) if (tmp_path / "a").mkdir() is None else None
    lines = samples(tmp_path / "a")
    assert {len(v) for k, v in lines.items() if "sampled" in k} == {8} and {
        len(v) for k, v in lines.items() if "greedy" in k
    } == {4}
    cut = tmp_path / "b" / "samples" / "sft"
    cut.mkdir(parents=True)
    kept, verdict = set(), ("score", "weight", "reward", "status")
    for name, rows in lines.items():
        if name.startswith("chat_think_greedy"):
            continue
        head = [
            json.dumps({k: v for k, v in json.loads(r).items() if k not in verdict})
            for r in rows[:1]
        ] + rows[1 : len(rows) // 2]
        kept |= {json.loads(r)["key"] for r in head}
        (cut / name).write_text("\n".join(head) + "\n" + rows[-1][:40])
    spy = "import engine; draw = engine.TorchEngine.generate\ndef generate(self, rollouts, *a, **k): print('drew', [r.key for r in rollouts]); draw(self, rollouts, *a, **k)\n"
    spy += "engine.TorchEngine.generate = generate\nimport evaluate\nfrom lib.common import finish\nfrom lib.flags import parse_config\nevaluate.main(parse_config(evaluate.Config)); finish()"
    flags = (
        f"--model={world}/base",
        f"--data={world}",
        f"--results={tmp_path}/b/results.jsonl",
        "--stage=sft",
        *SHORT,
    )
    _, out, _ = run_python("-c", spy, *flags)
    drawn = [key for line in out.splitlines() if line.startswith("drew") for key in eval(line[5:])]
    total = sum(map(len, lines.values()))
    print(f"{total} samples, {len(kept)} kept, {len(drawn)} drawn after the cut")
    assert not kept & set(drawn) and len(drawn) == total - len(kept) == len(set(drawn))
    assert [
        json.loads(line) for line in (tmp_path / "b" / "results.jsonl").read_text().splitlines()
    ] == whole
    assert samples(tmp_path / "b") == lines
    _, out, _ = run_python("-c", spy, *flags)
    drew = [line for line in out.splitlines() if line.startswith("drew")]
    assert drew == ["drew []"] * 3  # math, chat in two modes; all there: nothing is drawn
    # a smaller evaluation forgets nothing of the larger one
    run_python("-c", spy, *flags, "--limit=2", "--samples=1")
    assert {name: sorted(rows) for name, rows in samples(tmp_path / "b").items()} == {
        name: sorted(rows) for name, rows in lines.items()
    }
    _, out, _ = run_python("-c", spy, *flags, "--samples=3")  # a larger one draws only what is new
    assert sum(
        len(eval(line[5:])) for line in out.splitlines() if line.startswith("drew")
    ) == 4 * sum("sampled" in name for name in lines)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [4, 20])
def test_the_same_seed_gives_the_same_table_on_one_rank_and_on_two(limit, world, tmp_path):
    """4 problems: the samples of one are dealt to both ranks. 20: each rank has whole ones."""
    tables = []
    for name, ranks in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        tables.append(run(world, tmp_path / name, f"--limit={limit}", ranks=ranks))
    assert tables[0] == tables[1]
    (tmp_path / "other").mkdir()
    other = run(world, tmp_path / "other", f"--limit={limit}", "--seed=1")
    assert [r["tokens"] for r in other] != [r["tokens"] for r in tables[0]]


def test_tasks_with_and_without_yarn_are_refused_where_one_process_has_one_engine(
    world, monkeypatch, capsys
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(SystemExit) as stop:
        evaluate.main(evaluate.Config(model=str(world / "base"), tasks="ifeval,math500"))
    assert stop.value.code == 2 and "measure them apart" in capsys.readouterr().err


def test_equal_completions_of_a_problem_are_graded_once_and_all_have_the_verdict(tmp_path):
    from engine import Rollout

    # problem 1 says x too: another verdict
    texts = {("a", 0): ["x", "x", "y"], ("b", 1): ["x"], ("a", 0, "greedy"): ["x"]}
    lots = [(name, group) for (name, group, *_), said in texts.items() for _ in said]
    said, graded = iter([t for many in texts.values() for t in many]), []
    rollouts = [
        Rollout(row={"messages": [{"content": ""}]}, group=group, prompt_ids=[], seed=i)
        for i, (_, group) in enumerate(lots)
    ]
    for i, r in enumerate(rollouts):
        r.sample, r.metric, r.key = i, None, f"k-{i}"

    def generate(rollouts, *how, on_finished):
        for r in rollouts:
            r.text, r.finish_reason, r.completion_ids = (
                next(said),
                "length" if r.seed == 4 else "stop",
                [1],
            )
            on_finished(r)

    def collect(rollouts):
        graded.extend((r.group, r.text, r.finish_reason) for r in rollouts)
        for r in rollouts:
            r.reward, r.status = float(r.group + (r.text == "y")), "ok"

    how = dict(max_new_tokens=1, temperature=1.0, top_p=1.0)
    split = [(rollouts[:4], str(tmp_path / "sampled")), (rollouts[4:], str(tmp_path / "greedy"))]
    evaluate.complete(
        type("E", (), {"generate": staticmethod(generate)}),
        split,
        how,
        (lambda r: None, collect),
        lambda r: r.reward,
        0,
    )
    # cut off is not the same as ended
    assert graded == [(0, "x", "stop"), (0, "y", "stop"), (1, "x", "stop"), (0, "x", "length")]
    assert [r.metric for r in rollouts] == [0.0, 0.0, 1.0, 1.0, 0.0]
    kept = [
        json.loads(line) for line in (tmp_path / "sampled.rank0.jsonl").read_text().splitlines()
    ]
    assert [k["score"] for k in kept] == [0.0, 0.0, 1.0, 1.0] and all(
        k["status"] == "ok" for k in kept
    )


def test_samples_of_other_weights_or_settings_are_not_taken_for_these(world, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    before = evaluate.weights_of(folder)
    (folder / "model.safetensors").write_bytes(b"others!!")
    assert evaluate.weights_of(folder) != before
    (folder / "run.json").write_text(
        json.dumps({"files": {"model.safetensors": [7, "abc"], "optim_rank0.pt": [1, "x"]}})
    )
    assert evaluate.weights_of(folder) == [["model.safetensors", [7, "abc"]]]


def test_the_interval_by_hand():
    """Two problems, 1.0 and 0.0: the bootstrap of their mean reaches from 0 to 1; equal problems leave no doubt."""
    assert evaluate.interval([[1, 1], [0, 0]]) == (0.5, 0.0, 1.0)
    assert evaluate.interval([[0.5, 0.5], [1, 0]]) == (0.5, 0.5, 0.5)
    assert evaluate.interval([[1], [0]], weights_PG=[[3], [1]])[0] == 0.75
    scores = np.random.default_rng(0).random((200, 4)) < 0.3
    mean, low, high = evaluate.interval(scores)
    half = 1.96 * scores.mean(axis=1).std(ddof=1) / 200**0.5
    print(
        f"bootstrap half-widths {mean - low:.4f} {high - mean:.4f}, normal theory {half:.4f}, tolerance 10%"
    )
    assert abs((high - low) / 2 - half) < 0.1 * half


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


def broken(table, stages=STAGES):
    """(stage, task) of every broken gate of {task: (n, scores after each stage)}."""
    lines = [
        cell(s, name, value, n)
        for name, (n, scores) in table.items()
        for s, value in zip(stages, scores)
    ]
    cells = {(r["stage"], r["task"], r["mode"], r["decoding"]): r for r in lines}
    found = results.broken_gates(cells, stages)
    print("\n".join(text for _, text in found))
    return [(stage, text.split()[0]) for stage, text in found]


def changed(name, *scores):
    return PAPER | {name: (PAPER[name][0], scores)}


def test_the_papers_own_columns_pass_their_gates():
    assert broken(PAPER) == []
    for column in THINKING.values():
        assert broken({name: (PAPER[name][0], scores) for name, scores in column.items()}) == []


def test_aime_noise_is_what_was_measured_elsewhere():
    """AceReason-Nemotron 1.0 reports a standard error of about 0.7 points for AIME24 at 64 samples."""
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
    """Four points in five stages, each within the noise of two neighbours: the best score so far is what counts."""
    assert broken({"mmlu": (400, (83.0, 81.0, 79.0, 77.0, 75.0, 68.0))})[-1:] == [("swerl", "mmlu")]


def test_noise_alone_stops_no_toy_run():
    """The measured scores of the toy run are drawn again and again from their true values: how often would a gate break?"""
    rng, runs, stopped = np.random.default_rng(0), 150, 0
    for _ in range(runs):
        # the chance to solve each of the 260 problems
        lines, problems = [], np.clip(rng.normal(0.5, 0.3, 260), 0, 1)
        for stage in STAGES:
            for name, mode in (
                ("chat", "think"),
                ("if", "think"),
                ("if", "no_think"),
                ("math", "think"),
                ("code", "think"),
                ("swe", "think"),
            ):
                score, low, high = evaluate.interval(
                    rng.random((260, 4)) < problems[:, None], resamples=100
                )
                lines.append(
                    cell(stage, name, 50, 1, mode) | {"score": score, "low": low, "high": high}
                )
        stopped += bool(
            results.broken_gates(
                {(r["stage"], r["task"], r["mode"], r["decoding"]): r for r in lines}, STAGES
            )
        )
    print(f"{stopped} of {runs} runs of pure noise were stopped, at most 5% are tolerated")
    assert stopped <= 0.05 * runs


@pytest.mark.parametrize("log", ["results.jsonl", "results_seed1.jsonl", "results_seed2.jsonl"])
def test_the_logged_toy_runs_pass(log, tmp_path):
    (tmp_path / "results.jsonl").write_text((ROOT / "bench" / "toy" / log).read_text())
    assert results.check_gates(str(tmp_path)) == ""


def test_the_flag_says_it_in_one_sentence_and_ends_with_2(tmp_path):
    lines = [cell("coderl", "code", 78.0, 1040), cell("swerl", "code", 30.0, 1040)]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    code, _, err = run_python("evaluate.py", f"--gates={tmp_path}", check=False)
    print(err)
    assert (
        code == 2
        and len(err.splitlines()) == 1
        and "code (think) is at 30.0 after swerl" in err
        and "KEEP_BEST=1" in err
    )
    code, out, _ = run_python("evaluate.py", f"--gates={tmp_path}", "--stage=coderl", check=False)
    assert code == 0 and "every gate holds" in out


def cascade(tmp_path, **environment):
    """run_cascade.sh's own score() on a stage with three checkpoints; the launcher writes what an evaluation would."""
    out = tmp_path / "out"
    for step in (25, 50, 75):
        (out / "coderl" / f"step_{step:06d}").mkdir(parents=True, exist_ok=True)
    checkpoint.mark_final(str(out / "coderl"), str(out / "coderl" / "step_000075"))
    (tmp_path / "launch.py").write_text(
        "import json, os, sys\n"
        f"sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "from test_evaluate import cell\nfrom evals import results\n"
        "flags = dict(w[2:].split('=', 1) for w in sys.argv if w.startswith('--'))\n"
        "step = int(os.path.basename(os.path.realpath(flags['model']))[-6:])\n"
        "stage = flags.get('stage') or f'step_{step:06d}'\n"
        "lines = [cell(stage, 'math', {25: 88.0, 50: 90.0, 75: 40.0}[step], 1040), cell(stage, 'code', 70.0, 1040)]\n"
        "open(flags['results'], 'a').writelines(json.dumps(r) + '\\n' for r in lines)\n"
        "folder = os.path.dirname(flags['results'])\n"
        "if flags['results'].endswith('/results.jsonl'): open(folder + '/broken_gate', 'w').write(results.check_gates(folder, stage))\n"
    )
    (out / "results.jsonl").write_text(json.dumps(cell("mathrl", "math", 91.0, 1040)) + "\n")
    text = (ROOT / "run_cascade.sh").read_text()
    functions = text[text.index("run() {") : text.index("toy() {")].replace(
        ".venv/bin/python", sys.executable
    )
    script = f"set -euo pipefail\nSEED=0 FROM=x TASKS=math,code OUT={out} LAUNCH='{sys.executable} {tmp_path}/launch.py'\n{functions}\nstage coderl coderl\necho went on\n"
    return out, subprocess.run(
        ["bash", "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", **environment},
    )


@pytest.mark.slow
def test_a_broken_gate_stops_the_cascade_and_keep_best_goes_on_from_the_best_checkpoint(tmp_path):
    out, done = cascade(tmp_path)
    assert (
        done.returncode == 2
        and "went on" not in done.stdout
        and "gate: math (think) is at 40.0 after coderl" in done.stderr
    )
    assert (
        not (out / "coderl" / "scored").exists()
        and pathlib.Path(out / "coderl" / "final").resolve().name == "step_000075"
    )
    out, done = cascade(tmp_path, KEEP_BEST="1")
    print(done.stdout, done.stderr)
    assert done.returncode == 0 and "went on" in done.stdout
    assert (
        pathlib.Path(out / "coderl" / "final").resolve().name == "step_000050"
        and (out / "coderl" / "scored").exists()
    )
    # the table holds the checkpoint that goes on
    assert json.loads((out / "results.jsonl").read_text().splitlines()[-2])["score"] == 0.9
    assert (out / "broken_gate").read_text() == ""


def test_the_best_checkpoint_is_never_pruned(tmp_path):
    for step in (1, 2, 3, 4):
        (tmp_path / f"step_{step:06d}").mkdir()
    assert checkpoint.best_checkpoint(str(tmp_path)) == ""
    (tmp_path / "metrics.jsonl").write_text(
        "".join(
            json.dumps({"step": s, "eval": e}) + "\n"
            for s, e in ((1, 0.2), (2, 0.9), (4, 0.5), (9, 1.0))
        )
    )
    assert checkpoint.best_checkpoint(str(tmp_path)) == "step_000002"  # step 9 was not saved


# ---- Chat ----------------------------------------------------------------------------------------
def test_chat_streams_switches_modes_and_remembers_the_conversation(world, monkeypatch, capsys):
    """The engine is handed what training renders: the mode flag of this turn, the earlier reply without its thought."""
    from model import Qwen3, load_tokenizer

    tokenizer, asked, partial = load_tokenizer(world / "base"), [], []

    def generate(rollouts, max_new_tokens, temperature, top_p):
        import time

        (r,) = rollouts
        asked.append(
            (
                tokenizer.decode(r.prompt_ids, skip_special_tokens=False),
                max_new_tokens,
                temperature,
                top_p,
            )
        )
        text = (
            f"<think>\nhm\n</think>\nReply {len(asked)}."
            if "/think<|im_end|>\n<|im_start|>assistant" in asked[-1][0].replace(" ", "")
            else "Plain \u00e9."
        )
        for token in tokenizer.encode(text).ids:
            r.completion_ids.append(token)
            time.sleep(0.06)
            partial.append(capsys.readouterr().out)
        r.finish_reason, r.text = "stop", text

    typed = iter(["Hello", "/no_think", "More", "Once /think", "/new", "Again"])
    monkeypatch.setattr(
        "builtins.input", lambda prompt: next(typed, None) or (_ for _ in ()).throw(EOFError)
    )
    model = Qwen3.from_pretrained(world / "base")
    evaluate.chat(
        model,
        type("Engine", (), {"generate": staticmethod(generate)}),
        tokenizer,
        evaluate.Config(max_new_tokens=50),
    )
    prompts = [prompt for prompt, *_ in asked]
    assert prompts[0].endswith("Hello /think<|im_end|>\n<|im_start|>assistant\n")
    assert (
        "Hello /no_think" in prompts[1]
        and "Reply 1." in prompts[1]
        and "hm" not in prompts[1]
        and "More /no_think<|im_end|>" in prompts[1]
    )
    assert "Once /think<|im_end|>" in prompts[2] and "Plain \u00e9." in prompts[2]
    # forgotten; the flag of one turn did not stay
    assert "Hello" not in prompts[3] and "Again /no_think" in prompts[3]
    assert {how for _, *how in map(tuple, asked) for how in [tuple(how)]} == {(50, 0.6, 0.95)}
    shown = "".join(partial) + capsys.readouterr().out
    # piece by piece, nothing twice
    assert (
        shown.count("Reply 1.") == 1
        and shown.count("Plain \u00e9.") == 2
        and sum(map(bool, partial)) > 8
    )


def test_keep_best_reads_sampled_scores_only(tmp_path):
    line = lambda step, decoding, score: (
        json.dumps(
            {"stage": step, "task": "math", "mode": "think", "decoding": decoding, "score": score}
        )
        + "\n"
    )
    for step in ("step_000001", "step_000002"):
        (tmp_path / step).mkdir()
    scores = {
        ("step_000001", "sampled"): 0.9,
        ("step_000001", "greedy"): 0.1,
        ("step_000002", "sampled"): 0.5,
        ("step_000002", "greedy"): 0.8,
    }
    (tmp_path / "candidates.jsonl").write_text(
        "".join(line(*key, score) for key, score in scores.items())
    )
    results.keep_best(str(tmp_path))
    assert (tmp_path / "final").readlink() == pathlib.Path("step_000001")


def test_every_completion_has_dice_and_a_number_of_its_own_whatever_rank_draws_it(
    world, monkeypatch
):
    """3 problems x 4 samples on 2 ranks: dealt one by one, labelled by their place in the protocol."""
    drawn = []

    def complete(engine, decodings, *rest):
        for r in (r for rollouts, _ in decodings for r in rollouts):
            r.metric, r.weight, r.num_tokens = 0.0, 1.0, 1
        drawn.extend((r.group, r.sample, r.seed) for r in decodings[0][0])

    monkeypatch.setattr(evaluate, "complete", complete)
    cfg = evaluate.Config(model=str(world / "base"), data=str(world), limit=3, samples=4)
    for rank in (0, 1):
        with contextlib.suppress(ValueError):  # half of the greedy scores do not make a table
            evaluate.score_task("math", None, load_tokenizer(world / "base"), cfg, rank, 2, 1024)
    assert (
        sorted((group, sample) for group, sample, _ in drawn)
        == [(i, j) for i in range(3) for j in range(4)]
        and len({seed for *_, seed in drawn}) == 12
    )

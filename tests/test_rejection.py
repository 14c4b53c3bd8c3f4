"""Guards: rejection sampling keeps what the stage's own verifier passed and nothing else.

The rows are trained on token for token as they were sampled, an interrupted run goes on, and the
seconds add up.
"""

import json
import shutil

import pytest
from conftest import run_python
from test_evaluate import read_jsonl, write_jsonl

import ifrl
import mathrl
import rlhf
import sft
from engine import Rollout
from evals import results
from extras import rejection
from lib.prompts import encode_prompts


def rollout(
    group, sample, status="ok", finish_reason="stop", score=0.0, text="<think>\nx\n</think>\ny"
):
    row = {"messages": [{"role": "user", "content": "q"}], "think": True, "index": group}
    r = Rollout(row, group, [1], 0, sample, text=text, finish_reason=finish_reason)
    r.status, r.score = status, score
    return r


# ---- What is kept --------------------------------------------------------------------------------
def test_only_what_the_verifier_passed_is_kept():
    step = [
        rollout(0, 0),
        rollout(0, 1, "wrong"),
        rollout(0, 2, finish_reason="length"),
        rollout(1, 0, "infra"),
        rollout(1, 1, "no_answer"),
        rollout(1, 2),
    ]
    assert rejection.passed(step, mathrl) == [step[0], step[5]]


def test_rlhf_keeps_the_best_of_each_group_by_its_raw_score():
    step = [
        rollout(0, 0, score=1.0),
        rollout(0, 1, score=2.0),
        rollout(0, 2, score=2.0),
        rollout(0, 3, "no_answer", score=9.0),
        rollout(1, 0, "language", score=1.0),
        rollout(2, 0, score=-3.0),
    ]
    assert rejection.passed(step, rlhf) == [step[1], step[5]]


def test_if_rl_samples_no_group_that_would_replace_a_flat_one(tmp_path):
    config = {"max_refill_rounds": 1, "num_steps": 3}
    (tmp_path / "final").mkdir()
    run = {"command": ["ifrl.py"], "config": config}
    write_jsonl(tmp_path / "final/run.json", [run])
    module, cfg = rejection.stage_of(rejection.Config(like=str(tmp_path)))
    assert module is ifrl and (cfg.max_refill_rounds, cfg.num_steps) == (0, 3)


def test_a_reply_is_kept_once_for_a_prompt():
    seen = set()
    first = [rejection.sft_row(rollout(0, k), "math") for k in range(2)]
    assert rejection.unseen(first, seen) == first[:1]
    again = [rejection.sft_row(rollout(group, 0), "math") for group in range(2)]
    assert rejection.unseen(again, seen) == again[1:]


def test_a_reply_that_sft_refuses_is_not_readable():
    assert rejection.is_readable(rejection.sft_row(rollout(0, 0), "math"))
    stray = rejection.sft_row(rollout(0, 0, text="a</think>b</think>c"), "if")
    assert not rejection.is_readable(stray)


@pytest.mark.parametrize("think", [True, False])
def test_rows_are_trained_on_as_they_were_sampled(think, world, tokenizer):
    """The row that sft.py reads has the ids of prompt and completion, and trains the latter."""
    rows = rlhf.load_rows(rlhf.Config(data=f"{world}/chat_rl.jsonl", think_share=float(think)))
    rows = encode_prompts(rows[:1], tokenizer, rlhf.Config())
    text = "<think>\nabout snow\n</think>\nIn winter snow may be rare." if think else "Good tea."
    ids = tokenizer.encode(text, add_special_tokens=False).ids + [
        tokenizer.token_to_id("<|im_end|>")
    ]
    r = Rollout(rows[0], 0, rows[0]["prompt_ids"], 0, text=text, completion_ids=ids)

    row = json.loads(json.dumps(rejection.sft_row(r, "rlhf")))
    normal = sft.normalize(row, "here") | {"where": "here"}
    encoded, mask, category = sft.encode(normal, tokenizer, sft.Config())
    newline = tokenizer.encode("\n", add_special_tokens=False).ids
    assert encoded.tolist() == r.prompt_ids + ids + newline
    assert mask.tolist() == [False] * len(r.prompt_ids) + [True] * len(ids) + [False] * len(newline)
    assert (category, normal["think"]) == ("rlhf", think)


# ---- Seconds -------------------------------------------------------------------------------------
def test_sft_gets_the_seconds_that_sampling_left(tmp_path):
    for name in ("rl", "sft2", "kept"):
        (tmp_path / name).mkdir()
    write_jsonl(tmp_path / "rl" / "metrics.jsonl", [{"time/gen": 3.0, "time/train": 2.0}] * 4)
    write_jsonl(tmp_path / "sft2" / "metrics.jsonl", [{"time/train": 0.5}] * 3)
    write_jsonl(tmp_path / "kept" / "steps.jsonl", [{"time/gen": 2.5}] * 4)
    folders = [str(tmp_path / name) for name in ("rl", "sft2", "kept")]
    assert results.steps_of_same_compute(*folders[:2]) == 40
    assert results.steps_of_same_compute(*folders) == 20
    write_jsonl(tmp_path / "kept" / "steps.jsonl", [{"time/gen": 9.0}] * 4)
    assert results.steps_of_same_compute(*folders) == 1


def test_both_endings_are_controls():
    names = ("mathrl_control", "mathrl_rejection", "mathrl", "rejection", "my_control_idea")
    assert [results.is_control(name) for name in names] == [True, True, False, False, False]


# ---- The script ----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def like(world, taught, tmp_path_factory):
    """What a finished run of IF-RL leaves of itself that is read here: flags and command."""
    folder = tmp_path_factory.mktemp("rl") / "ifrl"
    (folder / "final").mkdir(parents=True)
    flags = {
        "init_from": str(taught),
        "out_dir": str(folder),
        "data": f"{world}/if_rl.jsonl",
        "prompts_per_step": 14,
        "group_size": 16,
        "num_steps": 2,
        "max_new_tokens": 48,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "max_refill_rounds": 0,
        "reward_workers": 1,
        "a_flag_of_an_older_version": 1,
    }
    run = {"command": ["ifrl.py"], "config": flags}
    (folder / "final" / "run.json").write_text(json.dumps(run))
    return folder


def config_of(like):
    _, cfg = rejection.stage_of(rejection.Config(like=str(like)))
    return cfg


def sample(like, out, **flags):
    flags = [f"--{name}={value}" for name, value in flags.items()]
    run_python("extras/rejection.py", f"--like={like}", f"--out_dir={out}", *flags)
    return read_jsonl(out / "rows.jsonl")


@pytest.mark.slow
def test_the_script_keeps_what_is_right_and_goes_on_where_it_was(like, tmp_path):
    rows = sample(like, tmp_path / "whole")
    asked = {row["messages"][-1]["content"]: row for row in ifrl.load_rows(config_of(like))}
    for row in rows:
        *_, question, reply = (turn["content"] for turn in row["messages"])
        constraints = (asked[question][name] for name in ("instruction_id_list", "kwargs"))
        assert ifrl.reward(reply, *constraints, question) == 1
    steps = read_jsonl(tmp_path / "whole" / "steps.jsonl")
    assert [line["sampled"] for line in steps] == [224, 224]
    num_passed = sum(line["passed"] for line in steps)
    print(f"448 samples, {num_passed} passed, {len(rows)} of them kept")
    assert 3 <= len(rows) <= num_passed

    # A kill in the second step: its line is half written, and its state is not there.
    sample(like, tmp_path / "cut", num_steps=1)
    (tmp_path / "cut" / "rows.jsonl").unlink()
    with open(tmp_path / "cut" / "steps.jsonl", "a") as f:
        f.write('{"step": 2, "rows": [')
    assert sample(like, tmp_path / "cut") == rows
    assert len(read_jsonl(tmp_path / "cut" / "steps.jsonl")) == 2


@pytest.mark.slow
def test_a_folder_that_is_no_rl_stage_is_one_sentence(like, tmp_path):
    shutil.copytree(like, tmp_path / "sft2")
    run = json.dumps({"command": ["sft.py"], "config": {}})
    (tmp_path / "sft2" / "final" / "run.json").write_text(run)
    for folder, said in (("sft2", "sft.py has no verifier"), ("nothing", "a finished RL stage")):
        flags = [f"--like={tmp_path}/{folder}", f"--out_dir={tmp_path}/out"]
        code, _, err = run_python("extras/rejection.py", *flags, check=False)
        assert code == 2
        assert len(err.splitlines()) == 1
        assert said in err

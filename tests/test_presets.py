"""The presets of run_cascade.sh against the paper's appendix tables (T14-T20).

DRY_RUN=1 prints one command a stage. The scripts' own parsers have to take every flag, and the
values that make the recipe have to be those of the tables. The toy is not in the paper: its values
are those that were run. Those of one card follow from the plan of memory and time.
"""

import dataclasses
import functools
import os
import pathlib
import subprocess

import pytest

import evaluate
from bench import hours
from bench.hours import STAGES, module_and_flags, parsed
from bench.paper_table import PAPER
from evals.results import in_stage_order

ROOT = pathlib.Path(__file__).resolve().parent.parent
K = 1024


@functools.cache
def dry_run(*command, **environment):
    """The lines that a shell script prints with DRY_RUN=1."""
    return hours.dry_run(*command, **environment)


# Scripts of bench/ that start stages or measure them.
IN_BENCH = ("control", "lora", "mopd", "passk")


@functools.cache
def commands(preset, stages=True):
    """[(script, Config)] of a preset's stages; with stages=False, of everything else it starts."""
    script = f"bench/{preset}.sh" if preset in IN_BENCH else "run_cascade.sh"
    found = []
    for line in dry_run(script, preset, BASE="models/base", NPROC="8", TASKS=""):
        module, flags = module_and_flags(line)
        if module is None or line.startswith("=="):
            continue
        if (module in STAGES) == stages:
            name = module.rpartition(".")[2]
            found.append((name, parsed(module, flags)))
    return found


def row(script, **values):
    return script, values


def sft(steps1, steps2, lr2, think=False):
    # Science is seen twice, SWE three times: paper 3.2.4, 3.3.2.
    stage1 = "nvidia/Nemotron-Cascade-SFT-Stage-1"
    stage2 = "nvidia/Nemotron-Cascade-SFT-Stage-2"
    swe_parts = ["swe_repair", "swe_localization", "swe_testgen"]
    parts = [f"{stage2}:{part}" for part in ["science", *swe_parts, *swe_parts]]
    return [
        row(
            "sft",
            max_seq_len=16 * K,
            num_steps=steps1,
            lr=5e-5,
            samples_per_step=256,
            schedule_steps=100000,
            weight_decay=1e-4,
            think_only=think,
            data=stage1,
        ),
        row(
            "sft",
            max_seq_len=32 * K,
            num_steps=steps2,
            lr=lr2,
            samples_per_step=256,
            schedule_steps=100000,
            think_only=think,
            data=",".join([stage2, *parts]),
        ),
    ]


def rlhf(steps, share):
    return [
        row(
            "rlhf",
            num_steps=steps,
            think_share=share,
            prompts_per_step=256,
            group_size=8,
            temperature=0.6,
            top_p=0.95,
            top_k=0,
            lr=2e-6,
            max_new_tokens=12 * K,
            overlong_filter=False,
            rm_samples_per_step=256,
            rm_lr=2e-6,
            rm_epochs=1,
            data="nvidia/Nemotron-Cascade-RL-RLHF",
            # Without RM= the reward model is small: the stabilisers of 6.3 and T10.
            kl_coef=1e-3,
            sequence_level=True,
            shape_reward=True,
        )
    ]


def ifrl(steps1, steps2, think):
    same = {
        "prompts_per_step": 256,
        "group_size": 8,
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 20,  # paper 4.4.2; T16 has none
        "lr": 2e-6,
        "think": think,
    }
    if think:
        same["rm"] = "out/no_such_run/rlhf/rm"
    return [
        row(
            "ifrl",
            data="nvidia/Nemotron-Cascade-RL-Instruction-Following",
            taxonomy="ifeval",
            num_steps=steps1,
            max_new_tokens=8 * K,
            overlong_filter=False,
            **same,
        ),
        row(
            "ifrl",
            data="allenai/IF_multi_constraints_upto5",  # paper 4.4.1, its reference 80
            taxonomy="iftrain",
            num_steps=steps2,
            max_new_tokens=(16 if think else 8) * K,
            overlong_filter=think,
            **same,
        ),
    ]


def math(length, steps, temperature, overlong, lr=2e-6, rope=0.0):
    return row(
        "mathrl",
        max_new_tokens=length * K,
        num_steps=steps,
        temperature=temperature,
        overlong_filter=overlong,
        lr=lr,
        rope_factor=rope,
        prompts_per_step=128,
        group_size=8,
        top_p=0.95,
        top_k=0,
        readmit_hard=0.1,
        readmit_easy=0.01,
    )


def code(length, steps, temperature):
    return row(
        "coderl",
        max_new_tokens=length * K,
        num_steps=steps,
        temperature=temperature,
        overlong_filter=False,
        lr=4e-6,
        prompts_per_step=128,
        group_size=8,
        top_p=0.95,
        top_k=0,
        rope_factor=2.0,
    )


def swe(prompt, steps, overlong):
    return row(
        "swerl",
        max_prompt_tokens=prompt * K,
        max_new_tokens=16 * K,
        num_steps=steps,
        overlong_filter=overlong,
        lr=2.5e-6,
        prompts_per_step=128,
        group_size=16,
        temperature=1.0,
        top_p=0.95,
        top_k=0,
        rope_factor=2.0,
    )


MATH_8B = [
    math(24, 190, 1.0, True),
    math(32, 240, 1.0, False, rope=2.0),
    math(40, 70, 0.8, False, rope=2.0),
]
SWE_8B = [swe(16, 30, True), swe(24, 30, False)]
UNIFIED = (
    sft(20000, 32000, 2e-5)
    + rlhf(800, 0.5)
    + ifrl(2300, 800, False)
    + MATH_8B
    + [code(44, 60, 1.0), code(48, 30, 0.8)]
    + SWE_8B
)


def toy(script, steps, lr, **values):
    """The values under which every stage of the tiny model learns, so that a change is noticed."""
    expected = {"num_steps": steps, "lr": lr, **values}
    if script != "sft":
        expected.update(
            prompts_per_step=16,
            group_size=8,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            max_new_tokens=96,
            final_lr=0.1,
        )
    return row(script, **expected)


TOY = [
    toy("sft", 140, 9e-3),
    toy("sft", 600, 8e-3),
    toy("rlhf", 80, 3e-4, kl_coef=0.1, shape_reward=True, think_share=0.5),
    toy("ifrl", 75, 3e-4, max_refill_rounds=1, think=False, taxonomy="all"),
    toy("mathrl", 50, 6e-4, overlong_filter=True),
    toy("coderl", 70, 5e-4, overlong_filter=False),
    toy("swerl", 150, 3e-4, overlong_filter=False, lexical_floor=0.98),
]


def one_card(steps, sft_lr, rl_lr, rank):
    """The four stages of a card, with what decides how long they take and what they learn from."""
    sft_steps, sft_tokens, *rl_steps = steps
    sets = ("systemchats_Qwen3_32B_think", "everyday_convs_reasoning_Qwen3_32B_think")
    chats = [f"smoltalk_{name}" for name in sets]
    chats += ["tulu_3_sft_personas_instruction_following_no_think"]
    chats += ["smoltalk_smollm3_everyday_conversations_no_think"]
    rows = [
        row(
            "sft",
            num_steps=sft_steps,
            schedule_steps=sft_steps,
            samples_per_step=64,
            max_seq_len=sft_tokens,
            lr=sft_lr,
            lora_rank=rank,
            data=",".join(f"HuggingFaceTB/smoltalk2:SFT@{name}" for name in chats),
        )
    ]
    mbpp = "google-research-datasets/mbpp:full"
    for script, num_steps, tokens, data in (
        ("ifrl", rl_steps[0], 1024, "nvidia/Nemotron-Cascade-RL-Instruction-Following"),
        ("mathrl", rl_steps[1], 2048, "openai/gsm8k:main@train"),
        ("coderl", rl_steps[2], 2048, f"{mbpp}@train,{mbpp}@validation"),
    ):
        values = dict(num_steps=num_steps, max_new_tokens=tokens, data=data, lr=rl_lr)
        rows.append(row(script, prompts_per_step=32, group_size=8, lora_rank=rank, **values))
    return rows


TABLE = {
    "toy": TOY,
    "0.6b-1gpu": one_card((960, 4096, 40, 100, 30), 2e-5, 2e-6, rank=0),
    "4b-1gpu": one_card((320, 2048, 20, 40, 15), 2e-4, 2e-5, rank=32),
    "8b": UNIFIED,
    "0.6b": UNIFIED,
    "8b-thinking": sft(20000, 32000, 2e-5, True)
    + rlhf(800, 1.0)
    + ifrl(550, 300, True)
    + MATH_8B
    + [code(44, 64, 1.2)]
    + SWE_8B,
    "14b-thinking": sft(22000, 41000, 5e-5, True)
    + rlhf(900, 1.0)
    + ifrl(800, 120, True)
    + [
        math(28, 120, 1.2, True, lr=2.5e-6),
        math(40, 100, 1.1, False, lr=2.5e-6, rope=2.0),
        code(56, 64, 1.0),
        swe(32, 120, True),
    ],
}


@pytest.mark.parametrize("preset", TABLE)
def test_a_preset_is_the_papers_table(preset):
    found = commands(preset)
    assert [script for script, _ in found] == [script for script, _ in TABLE[preset]]
    for (script, cfg), (_, expected) in zip(found, TABLE[preset], strict=True):
        values = dataclasses.asdict(cfg)
        given = {name: values[name] for name in expected}
        assert given == expected, f"{preset} {script}"


@pytest.mark.parametrize("preset", TABLE)
def test_each_sub_stage_starts_from_the_one_before(preset):
    previous = "out/no_such_run/data/base" if preset == "toy" else "models/base"
    for _, cfg in commands(preset):
        assert cfg.init_from == previous
        previous = f"{cfg.out_dir}/final"


@pytest.mark.parametrize("preset", TABLE)
def test_prompt_and_response_fit_the_positions_of_qwen3(preset):
    """YaRN is on whenever prompt and response can pass 32K."""
    for script, cfg in commands(preset):
        if script == "sft":
            length = cfg.max_seq_len
        else:
            length = cfg.max_prompt_tokens + cfg.max_new_tokens
        positions = 32 * K
        if cfg.rope_factor:
            positions *= cfg.rope_factor
        assert length <= positions, f"{script}: {length} tokens, {positions} positions"
        assert cfg.rope_factor in (0.0, 2.0)


@pytest.mark.parametrize("preset", ["toy", "control", "mopd", "passk"])
def test_every_flag_of_the_other_commands_is_one_of_their_scripts(preset):
    """commands() parses the flags of all that a run starts, and of three scripts in bench/."""
    scripts = {script for script, _ in commands(preset, stages=False)}
    assert "evaluate" in scripts
    if preset == "toy":
        assert {"toy", "report"} <= scripts
    assert len(commands(preset)) == {"toy": 7, "control": 10, "mopd": 1, "passk": 0}[preset]


# A run with servers, flags and two tasks to measure.
ENVIRONMENT = {
    "BASE": "b",
    "RM": "http://r",
    "JUDGE": "http://j/v1",
    "FLAGS": "--shard=hybrid",
    "TASKS": "ifeval,aime25",
    "EVAL_FLAGS": "--judge=http://other/v1 --verifier_python=.venv-verify/bin/python",
}


@pytest.mark.parametrize(
    "preset, num_stages",
    [("8b", 12), pytest.param("8b-thinking", 11, marks=pytest.mark.slow)],
)
def test_servers_and_flags_of_the_environment_reach_their_stages(preset, num_stages):
    thinking = preset == "8b-thinking"
    lines = dry_run("run_cascade.sh", preset, **ENVIRONMENT)
    stages = [line for line in lines if "--init_from" in line]
    assert len(stages) == num_stages
    for line in stages:
        assert line.endswith("--shard=hybrid")
        assert ("--judge=http://j/v1" in line) == (" swerl.py" in line)
        # IF-RL of the unified models has no reward model.
        reads_rm = " rlhf.py" in line or (" ifrl.py" in line and thinking)
        assert ("--rm=http://r" in line) == reads_rm
        # The paper's reward model of 72B needs no stabilisers.
        assert "--kl_coef" not in line and "--shape_reward" not in line
    scores = [line for line in lines if " evaluate.py" in line]
    assert scores
    for line in scores:
        assert ("--modes=think" in line) == thinking
        assert line.endswith(ENVIRONMENT["EVAL_FLAGS"])
    assert lines[0] == "every task can be measured: ifeval, aime25"
    # Every task is a launch of its own.
    tasks = [line.partition("--tasks=")[2].split()[0] for line in scores]
    assert tasks == ["ifeval", "aime25"] * (len(scores) // 2)


# The eleven rows of the 8B table; SWE-bench's has a first half.
ELEVEN = [name for name in PAPER if name != "swebench"] + ["swebench_files", "swebench"]


@pytest.mark.slow
def test_what_tasks_lack_is_the_first_line_before_anything_is_trained():
    lines = dry_run("run_cascade.sh", "8b", BASE="b", TASKS=",".join(ELEVEN), EVAL_FLAGS="")
    said = lines[0]
    print(said)
    assert said.startswith("evaluate.py: arenahard: pass --judge=URL")
    assert "swebench_files, swebench: pass --repos=folder of git clones" in said
    assert "swebench: its package is not installed: python3 -m venv .venv-swebench" in said
    assert said.endswith("Nothing was trained.")
    assert lines[1] == "== sft1: training in out/no_such_run/sft1"


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["8b", "14b-thinking"])
def test_every_command_carries_what_the_eleven_rows_need(preset, tmp_path):
    """Packages and docker are stand-ins: they are only looked for."""
    (tmp_path / "instructions_registry.py").write_text("INSTRUCTION_DICT = {'a': 1}\n")
    for program in ("docker", "python"):
        (tmp_path / program).write_text("#!/bin/sh\nexit 0\n")
        (tmp_path / program).chmod(0o755)
    flags = f"--judge=http://j/v1 --repos=clones --verifier_python={tmp_path}/python"
    lines = dry_run(
        "run_cascade.sh",
        preset,
        BASE="b",
        TASKS=",".join(ELEVEN),
        EVAL_FLAGS=flags,
        PYTHONPATH=str(tmp_path),
        PATH=f"{os.environ['PATH']}:{tmp_path}",
    )
    assert lines[0] == f"every task can be measured: {', '.join(ELEVEN)}"
    stages = {"8b": 11, "14b-thinking": 8}[preset]
    measured = [module_and_flags(line) for line in lines if " evaluate.py" in line]
    assert len(measured) == stages * len(ELEVEN)
    for module, words in measured:
        cfg = parsed(module, words)
        assert (cfg.judge, cfg.repos) == ("http://j/v1", "clones")
        assert cfg.verifier_python == f"{tmp_path}/python"
        assert cfg.results == "out/no_such_run/results.jsonl"
        # Appendix B: 14B's prompts on SWE-bench have 64K tokens, under a factor of 3.
        how = evaluate.protocol(cfg.tasks, cfg)
        longer = (preset, cfg.tasks) == ("14b-thinking", "swebench")
        assert how["rope_factor"] == (3.0 if longer else 2.0)
        assert cfg.prompt_tokens == (65536 if longer else 32768)
        assert cfg.prompt_tokens + 32768 <= 32768 * how["rope_factor"]


@pytest.mark.slow
def test_a_real_run_ends_before_sft_if_a_task_cannot_be_measured(tmp_path):
    text = (ROOT / "run_cascade.sh").read_text()
    functions = text[text.index("run() {") : text.index("toy() {")]
    script = f"set -euo pipefail\n{functions}\ncheck_tasks\necho went on\n"
    env = {**os.environ, "OUT": str(tmp_path), "SEED": "0", "TASKS": "math500,lcb_pro_25q2_easy"}
    env["EVAL_DATA"] = str(tmp_path)
    (tmp_path / "math500.jsonl").write_text('{"problem": "1 + 1?", "answer": "2"}\n')
    done = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "evaluate.py: lcb_pro_25q2_easy: pass --code_judge=URL of a running LightCPVerifier. "
        "Nothing was trained.\n"
    )


@pytest.mark.parametrize(
    "preset",
    [
        "toy",
        "8b",
        pytest.param("8b-thinking", marks=pytest.mark.slow),
        pytest.param("14b-thinking", marks=pytest.mark.slow),
    ],
)
def test_the_results_are_read_in_the_order_in_which_the_cascade_ran(preset):
    """coderl1 before coderl: else a gate holds the first part of Code RL against the second."""
    lines = dry_run("run_cascade.sh", preset, **ENVIRONMENT)
    measured = [line.partition("--stage=")[2].split()[0] for line in lines if "--stage=" in line]
    assert len(measured) >= 6
    assert in_stage_order(sorted(measured)) == measured


def test_an_unknown_preset_prints_the_usage_and_exits_with_2():
    done = subprocess.run(
        ["bash", "run_cascade.sh", "70b"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "usage: bash run_cascade.sh" in done.stderr


def test_lora_of_the_toy_trains_its_rl_stages_at_ten_times_their_learning_rates():
    """bench/lora.sh runs toy() itself, and its flags come behind those of the toy."""
    toy, lora = commands("toy"), commands("lora")
    assert [script for script, _ in lora] == [script for script, _ in toy]
    for (script, full), (_, adapted) in zip(toy, lora, strict=True):
        if script == "sft":
            assert adapted.lora_rank == 0
            continue
        assert adapted.lora_rank == 8
        assert adapted.lr == pytest.approx(10 * full.lr)
        # Nothing else differs but the folder.
        same = dataclasses.asdict(adapted) | {"lora_rank": 0, "lr": full.lr}
        assert str(same).replace("no_such_run-lora", "no_such_run") == str(dataclasses.asdict(full))


def test_flags_of_one_stage_reach_it_alone_and_come_last():
    lines = dry_run("run_cascade.sh", "toy", FLAGS="--shard=full", MATHRL_FLAGS="--lr=1e-6")
    stages = [line for line in lines if "--init_from" in line]
    for line in stages:
        with_both = line.endswith("--shard=full --lr=1e-6")
        assert with_both == (" mathrl.py" in line)
        assert with_both or line.endswith("--shard=full")


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["0.6b-1gpu", "4b-1gpu"])
def test_one_card_is_an_afternoon_by_the_plan(preset):
    """Every stage and every measurement fits 80 GB, and all of them together 6 hours."""
    costs = hours.preset_costs(preset, card=80)
    names = [name for name, *_ in costs]
    tasks = ("gsm8k", "math500", "humaneval", "ifeval")
    expected = []
    for stage in ("sft", "ifrl", "mathrl", "coderl"):
        expected += [stage, *(f"{task} after {stage}" for task in tasks)]
    assert names == expected
    total = sum(spent for *_, spent in costs)
    print(f"{preset}: {total:.2f} hours, at most {max(gb for _, _, gb, _ in costs):.0f} GB")
    assert 4 < total < 6
    assert all(gb < 0.93 * 80 for _, _, gb, _ in costs)


def test_the_base_of_one_card_is_downloaded_unless_base_names_one():
    lines = dry_run("run_cascade.sh", "4b-1gpu", TASKS="")
    download = ".venv/bin/hf download Qwen/Qwen3-4B-Base --local-dir models/Qwen3-4B-Base"
    assert lines[0] == download
    stages = [line for line in lines if "--init_from" in line]
    assert len(stages) == 4 and "--init_from=models/Qwen3-4B-Base " in stages[0]
    # TASKS= measures nothing.
    assert not any(" evaluate.py" in line or "evals.report" in line for line in lines)
    assert download not in dry_run("run_cascade.sh", "4b-1gpu", TASKS="", BASE="models/base")

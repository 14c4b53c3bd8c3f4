"""The presets of run_cascade.sh against the paper's appendix tables (T14-T20).
DRY_RUN=1 prints one command a sub-stage; every flag has to be one the script's own parser takes,
and the values that make the recipe have to be the table's (of the toy: those that were run)."""

import dataclasses
import functools
import importlib
import os
import pathlib
import shlex
import subprocess
import sys

import pytest

from lib.flags import parse_config

ROOT = pathlib.Path(__file__).resolve().parent.parent
K = 1024
STAGES = ("sft.py", "rlhf.py", "ifrl.py", "mathrl.py", "coderl.py", "swerl.py", "extras/mopd.py")


@functools.cache
def commands(preset, stages=True):
    """[(script, Config)] of a preset's stages (or of everything else it starts), parsed by the scripts' own parser."""
    env = {
        **os.environ,
        "DRY_RUN": "1",
        "BASE": "models/base",
        "OUT": "out/no_such_run",
        "NPROC": "8",
    }
    command = (
        [f"bench/{preset}.sh"] if preset in ("control", "mopd") else ["run_cascade.sh", preset]
    )
    printed = subprocess.run(
        ["bash", *command], cwd=ROOT, env=env, capture_output=True, text=True, check=True
    )
    found = []
    for line in printed.stdout.splitlines():
        words = shlex.split(line)
        script = next((w for w in words if w.endswith(".py")), None)
        if script and not line.startswith("==") and (script in STAGES) == stages:
            argv, sys.argv = sys.argv, words[words.index(script) :]
            try:
                module = script.removesuffix(".py").replace("/", ".")
                found.append(
                    (
                        module.rpartition(".")[2],
                        parse_config(importlib.import_module(module).Config),
                    )
                )
            finally:
                sys.argv = argv
    return found


def row(script, **values):
    return script, values


def sft(steps1, steps2, lr2, think=False):
    hub, swe = (
        "nvidia/Nemotron-Cascade-SFT-Stage-",
        ["swe_repair", "swe_localization", "swe_testgen"],
    )
    # upsampled twice and three times: 3.2.4, 3.3.2
    stage2 = ",".join([f"{hub}2", *(f"{hub}2:{part}" for part in ["science", *swe, *swe])])
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
            data=f"{hub}1",
        ),
        row(
            "sft",
            max_seq_len=32 * K,
            num_steps=steps2,
            lr=lr2,
            samples_per_step=256,
            schedule_steps=100000,
            think_only=think,
            data=stage2,
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
            kl_coef=0.0,
        )
    ]


def ifrl(steps1, steps2, think):
    # top-k: text 4.4.2, T16 has none
    same = dict(
        prompts_per_step=256,
        group_size=8,
        temperature=0.6,
        top_p=0.95,
        top_k=20,
        lr=2e-6,
        think=think,
    )
    same |= dict(rm="out/no_such_run/rlhf/rm") if think else {}
    return [
        row(
            "ifrl",
            taxonomy="ifeval",
            num_steps=steps1,
            max_new_tokens=8 * K,
            overlong_filter=False,
            **same,
        ),
        row(
            "ifrl",
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
    """Not the paper's values: those under which every stage of the tiny model learns, pinned so that a change of them is seen."""
    sampled = dict(
        prompts_per_step=16,
        group_size=8,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        max_new_tokens=80,
        final_lr=0.1,
    )
    return row(script, num_steps=steps, lr=lr, **({} if script == "sft" else sampled | values))


TOY = [
    toy("sft", 140, 9e-3),
    toy("sft", 600, 8e-3),
    toy("rlhf", 40, 3e-4, kl_coef=0.1, shape_reward=True, think_share=0.5),
    toy("ifrl", 90, 4e-4, max_refill_rounds=1, think=False, taxonomy="all"),
    toy("mathrl", 50, 6e-4, overlong_filter=True),
    toy("coderl", 60, 5e-4, overlong_filter=False),
    toy("swerl", 90, 3e-4, overlong_filter=False, lexical_floor=0.98),
]
TABLE = {
    "toy": TOY,
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
        given = {name: dataclasses.asdict(cfg)[name] for name in expected}
        assert given == expected, f"{preset} {script}"


@pytest.mark.parametrize("preset", TABLE)
def test_each_sub_stage_starts_from_the_one_before(preset):
    previous = "out/no_such_run/data/base" if preset == "toy" else "models/base"
    for _, cfg in commands(preset):
        assert cfg.init_from == previous
        previous = f"{cfg.out_dir}/final"


@pytest.mark.parametrize("preset", TABLE)
def test_prompt_and_response_fit_the_positions_of_qwen3(preset):
    for script, cfg in commands(preset):
        length = cfg.max_seq_len if script == "sft" else cfg.max_prompt_tokens + cfg.max_new_tokens
        room = int(32 * K * cfg.rope_factor) if cfg.rope_factor else 32 * K
        assert length <= room, (
            f"{script}: {length} tokens, {room} positions: YaRN is on whenever prompt and response can pass 32K"
        )
        assert cfg.rope_factor in (0.0, 2.0)


@pytest.mark.parametrize("preset", ["toy", "control", "mopd"])
def test_every_flag_of_the_other_commands_is_one_of_their_scripts(preset):
    """commands() parses them; evaluate.py and report.py beside the stages, and bench/control.sh and bench/mopd.sh, which go on from the toy."""
    scripts = {script for script, _ in commands(preset, stages=False)}
    assert "evaluate" in scripts and (preset != "toy" or {"toy", "report"} <= scripts)
    assert len(commands(preset)) == {"toy": 7, "control": 5, "mopd": 1}[preset]


def test_servers_and_flags_of_the_environment_reach_their_stages():
    env = {
        **os.environ,
        "DRY_RUN": "1",
        "BASE": "b",
        "OUT": "out/no_such_run",
        "RM": "http://r",
        "JUDGE": "http://j/v1",
        "FLAGS": "--shard=hybrid",
        "TASKS": "ifeval,aime25",
    }
    for preset in ("8b", "8b-thinking"):
        lines = subprocess.run(
            ["bash", "run_cascade.sh", preset],
            cwd=ROOT,
            env=env,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
        stages = [line for line in lines if "--init_from" in line]
        assert all(line.endswith("--shard=hybrid") for line in stages) and len(stages) == (
            12 if preset == "8b" else 11
        )
        assert all(("--judge=http://j/v1" in line) == (" swerl.py" in line) for line in stages)
        assert all(
            ("--rm=http://r" in line)
            == (" rlhf.py" in line or " ifrl.py" in line and preset != "8b")
            for line in stages
        )
        scores = [line for line in lines if " evaluate.py" in line]
        assert scores and all(("--modes=think" in line) == (preset != "8b") for line in scores)
        # a launch each
        assert [line.partition("--tasks=")[2].split()[0] for line in scores] == [
            "ifeval",
            "aime25",
        ] * (len(scores) // 2)


def test_an_unknown_preset_prints_the_usage_and_exits_with_2():
    done = subprocess.run(
        ["bash", "run_cascade.sh", "70b"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and "usage: bash run_cascade.sh" in done.stderr

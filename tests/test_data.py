"""Guards: every public data set that a stage names can be read, and broken data is never silent.

A row of each set loads to the stage's normal form, from JSONL and from parquet alike. A corrupted
row, file or hub name ends in one sentence (exit code 2) or in a counted drop with its reason, and
never in a traceback.

The rows are written by hand in the schemas of the sets, and no hub is asked. Streams: the order of
the rows depends on the files and the cursor alone.
"""

import csv
import gzip
import importlib
import json
import random
import re
import subprocess
import tracemalloc
import types

import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT, run_python
from test_swerl_reward import FILES, FIXED, GOLDEN

import coderl
import ifrl
import mathrl
import rlhf
import sft
import swerl
from extras import decontaminate
from lib import chats, data, prompts
from verifiers import patches, reward_model

USER, BOT = (
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "<think>\nEasy.\n</think>\n\n4"},
)
CHAT = [USER, BOT]
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "a + b",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    ],
}
CASCADE2 = {
    "role": "system",
    "content": "You are a helpful and harmless assistant.\n\nYou are not allowed to use any tools.",
}
SAFE = {"role": "system", "content": "Be brief."}


def sft_form(messages, think, category, tools=()):
    return {
        "messages": [{"tool_calls": []} | m for m in messages],
        "think": think,
        "category": category,
        "tools": list(tools),
    }


WILD = {  # a logged turn of WildChat-1M
    "content": "Hi there",
    "role": "user",
    "language": "English",
    "redacted": False,
    "toxic": False,
    "country": "Chile",
    "state": None,
    "hashed_ip": "00",
    "header": {"accept-language": "en", "user-agent": "x"},
    "timestamp": None,
    "turn_identifier": 100,
}
HELLO = [{"role": "user", "content": "Hi there"}]
PAIR = [("What is 2 + 2?", "4"), ("What is 2 + 2?", "5")]
ALL_KEYS = dict.fromkeys(
    (
        "num_words",
        "relation",
        "keywords",
        "num_highlights",
        "capital_frequency",
        "language",
        "prompt_to_repeat",
        "num_paragraphs",
    )
)
LESS = {"num_words": 100, "relation": "less than"}
TITLE, WORDS = "detectable_format:title", "length_constraints:number_words"
IF_FORM = {
    "messages": HELLO,
    "think": False,
    "instruction_id_list": [TITLE, WORDS],
    "kwargs": [{}, LESS],
}
DAPO_TEXT = "Find the number of pairs."


def math_form(problem, answer):
    return {
        "messages": [{"role": "user", "content": mathrl.INSTRUCTION + problem}],
        "think": True,
        "answer": answer,
    }


IO = {"inputs": ["1\n", "2\n"], "outputs": ["2\n", "4\n"]}
PAIRS = [{"input": "1\n", "output": "2\n"}, {"input": "2\n", "output": "4\n"}]
STDIN = IO | {"fn_name": None, "time_limit": None}
FUNCTION = {"inputs": ["3"], "outputs": ["6"], "fn_name": "double", "time_limit": None}
PARTS = (
    "Double it.\n\nInput\nOne integer.\n\nOutput\nIts double.\n\nNote\nEasy.\n\n"
    "Example\nInput:\n1\n\nOutput:\n2"
)


def code_form(problem, tests, solution=""):
    return {"problem": problem, "tests": tests, "solution": solution, "think": True}


ISSUE = "The tax is subtracted."
SHOWN = {"shop/cart.py": FILES["shop/cart.py"]}
LISTED = [{"file_path": path, "content": text} for path, text in FILES.items()]
SWE_FORM = {"issue": ISSUE, "golden": ["shop/cart.py"], "think": True}
BENCH = {  # SWE-bench's columns
    "instance_id": "shop__cart-1",
    "repo": "shop/cart",
    "problem_statement": ISSUE,
    "hints_text": "",
    "patch": GOLDEN,
    "test_patch": "",
    "FAIL_TO_PASS": ["tests/test_cart.py::test_total"],
    "PASS_TO_PASS": [],
    "version": "1.0",
    "created_at": "2024-01-01T00:00:00Z",
}
DIFFS = [
    {
        "header": {"file": {"path": path}, "misc_line": None},
        "index_line": None,
        "is_binary_file": False,
        "hunks": [],
        "old_file_content": FILES[path],
        "new_file_content": after,
    }
    for path, after in (
        ("shop/cart.py", FIXED["shop/cart.py"]),
        ("tests/test_cart.py", "def test_total():\n    assert True\n"),
    )
]

# set: (stage, row, what it loads to, fields without which it cannot be used)
SETS = {
    "nvidia/Nemotron-Cascade-SFT-Stage-1": (
        "sft",
        {"messages": CHAT, "category": "math", "source": "x", "generator": "y", "thinking": True},
        sft_form(CHAT, True, "math"),
        ["messages"],
    ),
    "nvidia/Nemotron-Cascade-SFT-Stage-2, tool_calling": (
        "sft",
        {
            "messages": [
                USER,
                CALL,
                {"role": "tool", "content": "4"},
                {"role": "assistant", "content": "It is 4."},
            ],
            "tools": json.dumps([TOOL]),
            "category": "tool_calling",
            "source": "x",
            "generator": "y",
            "thinking": False,
        },
        sft_form(
            [
                USER,
                CALL,
                {"role": "tool", "content": "4"},
                {"role": "assistant", "content": "It is 4."},
            ],
            False,
            "tool_calling",
            [TOOL],
        ),
        ["messages", "tools"],
    ),
    "nvidia/Nemotron-Cascade-SFT-SWE": (
        "sft",
        {"category": "swe_repair", "messages": CHAT, "generator": "y", "thinking": True},
        sft_form(CHAT, True, "swe_repair"),
        ["messages"],
    ),
    "nvidia/Nemotron-Cascade-2-SFT-Data": (
        "sft",
        {"messages": [CASCADE2, *CHAT]},
        sft_form([CASCADE2, *CHAT], True, "all"),
        ["messages"],
    ),
    "HuggingFaceTB/smoltalk2:SFT, think": (
        "sft",
        {
            "messages": CHAT,
            "chat_template_kwargs": {
                "custom_instructions": "Be brief.",
                "enable_thinking": True,
                "python_tools": [],
                "xml_tools": [],
            },
            "source": "smoltalk_systemchats_Qwen3_32B_think",
        },
        sft_form([SAFE, *CHAT], True, "all"),
        ["messages"],
    ),
    "HuggingFaceTB/smoltalk2:SFT, no_think": (
        "sft",
        {
            "messages": [USER, {"role": "assistant", "content": "4"}],
            "chat_template_kwargs": {
                "custom_instructions": "",
                "enable_thinking": False,
                "python_tools": None,
                "xml_tools": None,
            },
            "source": "tulu_3_sft_personas_instruction_following_no_think",
        },
        sft_form([USER, {"role": "assistant", "content": "4"}], False, "all"),
        ["messages"],
    ),
    "nvidia/Llama-Nemotron-Post-Training-Dataset": (
        "sft",
        {
            "version": "v1",
            "input": [USER],
            "output": BOT["content"],
            "category": "math",
            "license": "cc-by-4.0",
            "reasoning": "on",
            "generator": "DeepSeek-R1",
            "used_in_training": "Ultra",
            "system_prompt": "detailed thinking on",
        },
        sft_form(CHAT, True, "math"),
        ["input", "output"],
    ),
    "nvidia/Llama-Nemotron-Post-Training-Dataset, off": (
        "sft",
        {
            "input": [USER],
            "output": "4",
            "category": "chat",
            "reasoning": "off",
            "system_prompt": "Be brief.",
        },
        sft_form([SAFE, USER, {"role": "assistant", "content": "4"}], False, "chat"),
        ["input", "output"],
    ),
    "nvidia/Nemotron-Cascade-RM-Training": (
        "rm",
        {
            "prompt": [USER],
            "chosen": [USER, {"role": "assistant", "content": "4"}],
            "rejected": [USER, {"role": "assistant", "content": "5"}],
        },
        PAIR,
        ["chosen", "rejected"],
    ),
    "nvidia/Nemotron-Cascade-RM-Training, texts": (
        "rm",
        {"prompt": "What is 2 + 2?", "chosen": "4", "rejected": "5"},
        PAIR,
        ["prompt", "chosen", "rejected"],
    ),
    "nvidia/HelpSteer3:preference": (
        "rm",
        {
            "domain": "general",
            "language": "english",
            "context": [USER],
            "response1": "5",
            "response2": "4",
            "overall_preference": 2,
            "individual_preference": [{"score": 2, "reasoning": "r", "feedback": "f"}],
        },
        PAIR,
        ["context", "response1", "response2", "overall_preference"],
    ),
    "nvidia/Nemotron-Cascade-RL-RLHF": (
        "rlhf",
        {"prompt": HELLO, "data_source": "x", "category": "chat"},
        {"messages": HELLO, "think": True},
        ["prompt"],
    ),
    "allenai/WildChat-1M": (
        "rlhf",
        {
            "conversation_hash": "00",
            "model": "gpt-4",
            "timestamp": "2023",
            "turn": 2,
            "language": "English",
            "conversation": [
                WILD,
                WILD | {"role": "assistant", "content": "Hello!"},
                WILD | {"content": "More"},
                WILD | {"role": "assistant", "content": "No"},
            ],
            "toxic": False,
            "redacted": False,
        },
        {"messages": HELLO, "think": True},
        ["conversation"],
    ),
    "lmsys/lmsys-chat-1m": (
        "rlhf",
        {
            "conversation_id": "00",
            "model": "vicuna-13b",
            "conversation": [*HELLO, {"role": "assistant", "content": "Hello!"}],
            "turn": 1,
            "language": "English",
            "openai_moderation": [{"flagged": False}],
            "redacted": False,
        },
        {"messages": HELLO, "think": True},
        ["conversation"],
    ),
    "lmarena-ai/arena-human-preference-140k": (
        "rlhf",
        {
            "id": "1",
            "model_a": "a",
            "model_b": "b",
            "winner": "tie",
            "language": "en",
            "is_code": False,
            "conversation_a": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "Hi there", "image": None, "mimeType": None}
                    ],
                },
                {
                    "role": "assistant",
                    "content": [
                        {"type": "text", "text": "Hello!", "image": None, "mimeType": None}
                    ],
                },
            ],
        },
        {"messages": HELLO, "think": True},
        ["conversation_a"],
    ),
    "nvidia/Nemotron-Cascade-RL-Instruction-Following": (
        "ifrl",
        {
            "prompt": HELLO,
            "instruction_id_list": [TITLE, WORDS],
            "kwargs": [ALL_KEYS, ALL_KEYS | LESS],
            "index": 0,
        },
        IF_FORM,
        ["prompt", "instruction_id_list", "kwargs"],
    ),
    "nvidia/Nemotron-RL-instruction_following": (
        "ifrl",
        {
            "id": 1,
            "prompt": "Hi there",
            "instruction_id_list": [TITLE, WORDS],
            "kwargs": [None, LESS],
            "responses_create_params": {"input": HELLO},
            "grading_mode": "binary",
        },
        IF_FORM,
        ["prompt", "instruction_id_list", "kwargs"],
    ),
    "allenai/IF_multi_constraints_upto5": (
        "ifrl",
        {
            "key": "k",
            "messages": HELLO,
            "dataset": ["ifeval"],
            "constraint_type": "multi",
            "constraint": "c",
            "ground_truth": repr(
                [{"instruction_id": [TITLE, WORDS], "kwargs": [None, LESS | {"keywords": None}]}]
            ),
        },
        IF_FORM,
        ["messages", "ground_truth"],
    ),
    "nvidia/Nemotron-Cascade-RL-Math": (
        "mathrl",
        {"problem": "Find the number of pairs.", "answer": "34", "source": "NuminaMath-CoT"},
        math_form("Find the number of pairs.", "34"),
        ["problem", "answer"],
    ),
    "nvidia/AceReason-Math": (
        "mathrl",
        {"problem": "Find x.", "answer": "\\frac{1}{2}"},
        math_form("Find x.", "\\frac{1}{2}"),
        ["problem", "answer"],
    ),
    "open-r1/DAPO-Math-17k-Processed": (
        "mathrl",
        {
            "prompt": DAPO_TEXT,
            "solution": "34",
            "data_source": "math_dapo",
            "source_prompt": [
                {"role": "user", "content": "Solve the following math problem step by step. ..."}
            ],
            "ability": "MATH",
            "reward_model": {"ground_truth": "34", "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": "0"},
        },
        math_form(DAPO_TEXT, "34"),
        ["prompt"],
    ),
    "agentica-org/DeepScaleR-Preview-Dataset": (
        "mathrl",
        {
            "problem": "Find x.",
            "answer": "-\\frac{2}{3}",
            "solution": "Plainly \\boxed{-\\frac{2}{3}}.",
        },
        math_form("Find x.", "-\\frac{2}{3}"),
        ["problem"],
    ),
    "openai/gsm8k:main": (
        "mathrl",
        {
            "question": "What is twice 536?",
            "answer": "Twice 536 is 2*536=<<2*536=1072>>1072.\n#### 1,072",
        },
        math_form("What is twice 536?", "1,072"),
        ["question", "answer"],
    ),
    "nvidia/Nemotron-RL-coding-competitive_coding": (
        "coderl",
        {
            "hash_id": "00",
            "dataset": "taco",
            "source": "codeforces",
            "responses_create_params": {"input": [{"role": "user", "content": "Double it."}]},
            "verifier_metadata": {"unit_tests": IO | {"fn_name": None}},
        },
        code_form("Double it.", STDIN),
        ["responses_create_params", "verifier_metadata"],
    ),
    "nvidia/Nemotron-RL-coding-competitive_coding, older": (
        "coderl",
        {
            "hash_id": "00",
            "dataset": "taco",
            "responses_create_params": {"input": "Double it.", "unit_tests": IO},
        },
        code_form("Double it.", STDIN),
        ["responses_create_params"],
    ),
    "google-research-datasets/mbpp:full": (
        "coderl",
        {
            "task_id": 601,
            "text": "Write a function to double it.",
            "code": "def double(x):\r\n  return 2 * x",
            "test_list": ["assert double(3) == 6"],
            "test_setup_code": "",
            "challenge_test_list": [],
        },
        code_form("Write a function to double it.", FUNCTION, "def double(x):\r\n  return 2 * x"),
        ["text", "test_list"],
    ),
    "agentica-org/DeepCoder-Preview-Dataset:primeintellect": (
        "coderl",
        {
            "problem": "Double it.",
            "solutions": ["print(int(input()) * 2)"],
            "tests": json.dumps([p | {"type": "stdin_stdout", "fn_name": None} for p in PAIRS]),
        },
        code_form("Double it.", STDIN, "print(int(input()) * 2)"),
        ["problem", "tests"],
    ),
    "agentica-org/DeepCoder-Preview-Dataset:taco": (
        "coderl",
        {"problem": "Double it.", "solutions": ["x"], "tests": json.dumps(IO)},
        code_form("Double it.", STDIN, "x"),
        ["problem", "tests"],
    ),
    "agentica-org/DeepCoder-Preview-Dataset:lcbv5": (
        "coderl",
        {
            "problem": "Call double.",
            "starter_code": "def double(x):",
            "tests": json.dumps(
                [
                    {
                        "input": "3",
                        "output": "6",
                        "testtype": "functional",
                        "metadata": {"func_name": "double"},
                    }
                ]
            ),
        },
        code_form("Call double.", FUNCTION),
        ["problem", "tests"],
    ),
    "open-r1/codeforces": (
        "coderl",
        {
            "id": "1/A",
            "title": "Double",
            "description": "Double it.",
            "input_format": "One integer.",
            "output_format": "Its double.",
            "note": "Easy.",
            "examples": PAIRS[:1],
            "time_limit": 2.0,
            "memory_limit": 256.0,
            "input_mode": "stdio",
            "official_tests": PAIRS,
            "official_tests_complete": True,
            "generated_checker": None,
        },
        code_form(PARTS, STDIN | {"time_limit": 2.0}),
        ["description", "official_tests"],
    ),
    "nvidia/Nemotron-Cascade-RL-SWE": (
        "swerl",
        {
            "prompt": "long text",
            "golden_patch": GOLDEN,
            "relevant_file_contents": LISTED,
            "original_prompt": f"<issue>{ISSUE}</issue>",
            "instance_id": "1",
            "source": "x",
        },
        SWE_FORM,
        ["golden_patch", "relevant_file_contents"],
    ),
    "nvidia/Nemotron-Cascade-RL-SWE, mapping": (
        "swerl",
        {
            "prompt": "long text",
            "golden_patch": GOLDEN,
            "relevant_file_contents": json.dumps(FILES),
            "original_prompt": ISSUE,
            "instance_id": "1",
            "source": "x",
        },
        SWE_FORM,
        ["golden_patch", "relevant_file_contents"],
    ),
    "SWE-Gym/SWE-Gym": (
        "swerl",
        BENCH | {"base_commit": "COMMIT"},
        SWE_FORM,
        ["problem_statement", "patch", "repo"],
    ),
    "nebius/SWE-rebench": (
        "swerl",
        BENCH
        | {
            "base_commit": "COMMIT",
            "install_config": {"python": "3.9"},
            "meta": {"num_modified_files": 1},
        },
        SWE_FORM,
        ["problem_statement", "patch", "repo"],
    ),
    "SWE-bench/SWE-smith": (
        "swerl",
        BENCH
        | {
            "repo": "swesmith/shop__cart.0a1b2c3d",
            "patch": patches.as_patch(FIXED, FILES),
            "image_name": "i",
        },
        SWE_FORM,
        ["problem_statement", "patch", "repo"],
    ),
    "R2E-Gym/R2E-Gym-Subset": (
        "swerl",
        {
            "repo_name": "shop",
            "docker_image": "i",
            "commit_hash": "0" * 40,
            "problem_statement": f"[ISSUE]\n{ISSUE}\n[/ISSUE]",
            "parsed_commit_content": json.dumps(
                {
                    "file_diffs": DIFFS,
                    "old_commit_hash": "0" * 40,
                    "new_commit_hash": "1" * 40,
                    "commit_message": "m",
                }
            ),
            "relevant_files": ["shop/cart.py"],
            "expected_output_json": "{}",
        },
        SWE_FORM,
        ["problem_statement", "parsed_commit_content"],
    ),
}


# ---- Loading -------------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def clones(tmp_path_factory):
    """(folder of git clones, commit of the faulty state).

    One repository is in the faulty state, and one (SWE-smith's) is not.
    """
    folder, git = (
        tmp_path_factory.mktemp("clones"),
        ["git", "-c", "user.name=x", "-c", "user.email=x@x.x"],
    )
    for name, files in (("shop__cart", FILES), ("swesmith__shop__cart.0a1b2c3d", FIXED)):
        for path, text in files.items():
            (folder / name / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / name / path).write_text(text)
        for args in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
            subprocess.run([*git, "-C", str(folder / name), *args], check=True)
    head = subprocess.run(
        [*git, "-C", str(folder / "shop__cart"), "rev-parse", "HEAD"],
        check=True,
        capture_output=True,
        text=True,
    )
    return str(folder), head.stdout.strip()


@pytest.fixture()
def load(clones, monkeypatch):
    """load(stage, path) -> normal rows, as the stage's main() gets them.

    Of rows for code and SWE it returns only the fields that are compared here.
    """
    monkeypatch.setattr(
        reward_model,
        "score_ids",
        lambda tokenizer, messages, answer: (messages[-1]["content"], answer),
    )

    def load(stage, path):
        if stage == "sft":
            return data.load_table(path, sft.normalize)
        if stage == "rm":
            return reward_model.load_pairs(path, None, rlhf.Config())
        if stage == "swerl":
            cfg = swerl.Config(data=path, min_prompt_tokens=0, noisy_share=0.0, repos=clones[0])
            rows = swerl.load_rows(cfg)
            for row in rows:
                golden = patches.changes(
                    row["files"], patches.apply_patch(row["golden_patch"], row["files"])
                )
                assert golden == patches.changes(SHOWN, {"shop/cart.py": FIXED["shop/cart.py"]})
            return [
                {
                    "issue": r["issue"].strip("[ISUE]\n/"),
                    "golden": sorted(r["files"]),
                    "think": r["think"],
                }
                for r in rows
            ]
        if stage == "coderl":
            rows = coderl.load_rows(coderl.Config(data=path))
            loaded = []
            for row in rows:
                # The prompt without the stage's instruction.
                problem = row["messages"][0]["content"]
                problem = problem.split("\n\nSolve this problem in Python")[0]
                problem = problem.split("\n\nWrite this function, under its own")[0]
                compared = {name: row[name] for name in ("tests", "solution", "think")}
                loaded.append({**compared, "problem": problem})
            return loaded
        module, changes = {
            "rlhf": (rlhf, {"think_share": 1.0}),
            "ifrl": (ifrl, {}),
            "mathrl": (mathrl, {"reward_workers": 1}),
        }[stage]
        rows = module.load_rows(module.Config(data=path, **changes))
        for row in rows:
            row.pop("number", None)  # RLHF numbers its prompts
        return rows

    return load


def write(path, rows, clones):
    text = "".join(json.dumps(row) + "\n" for row in rows).replace("COMMIT", clones[1])
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist([json.loads(line) for line in text.splitlines()]), path
        )
    elif path.suffix == ".json":
        path.write_text("[" + ",\n".join(text.splitlines()) + "]")
    else:
        (gzip.open if path.suffix == ".gz" else open)(path, "wt").write(text)
    return str(path)


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "json"])
@pytest.mark.parametrize("name", SETS)
def test_a_row_of_every_set_loads_to_the_stages_normal_form(name, ending, load, clones, tmp_path):
    stage, row, expected, _ = SETS[name]
    loaded = load(stage, write(tmp_path / f"rows.{ending}", [row], clones))
    if stage == "sft":  # parquet fills every message with every key
        loaded = [
            r
            | {
                "messages": [
                    {k: v for k, v in m.items() if v is not None and k not in ("hashed_ip",)}
                    for m in r["messages"]
                ]
            }
            for r in loaded
        ]
    assert loaded == [expected]


def test_every_first_and_second_choice_is_in_the_table():
    assert {name.split(":")[0].split(",")[0] for name in SETS} == {
        "nvidia/Nemotron-Cascade-SFT-Stage-1",
        "HuggingFaceTB/smoltalk2",
        "openai/gsm8k",
        "google-research-datasets/mbpp",
        "nvidia/Llama-Nemotron-Post-Training-Dataset",
        "nvidia/Nemotron-Cascade-SFT-Stage-2",
        "nvidia/Nemotron-Cascade-SFT-SWE",
        "nvidia/Nemotron-Cascade-2-SFT-Data",
        "nvidia/Nemotron-Cascade-RM-Training",
        "nvidia/HelpSteer3",
        "nvidia/Nemotron-Cascade-RL-RLHF",
        "allenai/WildChat-1M",
        "lmsys/lmsys-chat-1m",
        "lmarena-ai/arena-human-preference-140k",
        "nvidia/Nemotron-Cascade-RL-Instruction-Following",
        "nvidia/Nemotron-RL-instruction_following",
        "allenai/IF_multi_constraints_upto5",
        "nvidia/Nemotron-Cascade-RL-Math",
        "nvidia/AceReason-Math",
        "open-r1/DAPO-Math-17k-Processed",
        "agentica-org/DeepScaleR-Preview-Dataset",
        "nvidia/Nemotron-RL-coding-competitive_coding",
        "agentica-org/DeepCoder-Preview-Dataset",
        "open-r1/codeforces",
        "nvidia/Nemotron-Cascade-RL-SWE",
        "SWE-Gym/SWE-Gym",
        "SWE-bench/SWE-smith",
        "R2E-Gym/R2E-Gym-Subset",
        "nebius/SWE-rebench",
    }


# ---- Corruption ----------------------------------------------------------------------------------
def outcome(load, stage, path, capsys):
    """("refused", sentence) or ("dropped", lines) or ("loaded", rows).

    Any exception but SystemExit fails the test.
    """
    capsys.readouterr()
    try:
        rows = load(stage, path)
    except SystemExit as stop:
        printed = capsys.readouterr()
        assert (
            stop.code == 2
            and printed.err.count("\n") == 1
            and path in printed.err
            and "Nothing was trained." in printed.err
        ), printed.err
        return "refused", printed.err
    printed = capsys.readouterr().out
    return ("dropped", printed) if "dropped" in printed else ("loaded", rows)


MISSING = object()


@pytest.mark.parametrize("name", SETS)
def test_a_field_that_is_missing_or_of_another_type_is_refused_or_dropped_and_counted(
    name, load, clones, tmp_path, capsys
):
    """Each field that the stage needs is made bad in nine ways.

    It is absent, None, a number, an empty text, an empty list, a list of a number, a list of an
    empty list, an object, or broken JSON. The good row beside it survives a drop.
    """
    stage, row, _, fields = SETS[name]
    may_be_empty = {"tools"}
    for n, (field, value) in enumerate(
        (f, v) for f in fields for v in (MISSING, None, 7, "", [], [7], [[]], {"a": 1}, "{broken")
    ):
        bad = {k: v for k, v in row.items() if k != field} | (
            {} if value is MISSING else {field: value}
        )
        good = json.loads(json.dumps(row).replace("2 + 2", "2 + 3"))
        kind, text = outcome(
            load, stage, write(tmp_path / f"{n}.jsonl", [good, bad], clones), capsys
        )
        allowed = field in may_be_empty and value in (MISSING, None, "", [])
        plain = value == "{broken" and field in (
            "output",
            "chosen",
            "rejected",
            "response1",
            "response2",
            "problem",
            "question",
            "prompt",
            "text",
            "context",
            "input",
            "description",
            "problem_statement",
            "conversation",
            "conversation_a",
            "messages",
            "answer",
        )
        text_is_fine = (
            isinstance(value, (int, str))
            and value not in ("",)
            and stage == "mathrl"
            and field == "answer"
        )
        if not (allowed or plain or text_is_fine):
            assert kind != "loaded", (field, value, text)
        if kind == "dropped":
            assert "dropped 1 " in text, (field, value, text)


SFT, IF, MATH, CODE, SWE, RM, RL = (
    next(n for n, s in SETS.items() if s[0] == stage)
    for stage in ("sft", "ifrl", "mathrl", "coderl", "swerl", "rm", "rlhf")
)
HUB_CODE, LLAMA, R2E, GYM = (
    "open-r1/codeforces",
    "nvidia/Llama-Nemotron-Post-Training-Dataset",
    "R2E-Gym/R2E-Gym-Subset",
    "SWE-Gym/SWE-Gym",
)
DEEP = "agentica-org/DeepCoder-Preview-Dataset:taco"
CORRUPTED = [  # set, changes to its row, part of the sentence
    (SFT, {"messages": [USER]}, "the last turn is not the assistant's"),
    (
        SFT,
        {"messages": [USER, {"role": "assistant", "content": " "}]},
        "the last assistant turn is empty",
    ),
    (SFT, {"messages": [USER, {"role": "assistant"}]}, "the last assistant turn is empty"),
    (
        SFT,
        {"messages": [USER, {"role": "assistant", "content": 4}]},
        "a message whose content is not text",
    ),
    (SFT, {"messages": [USER, {"content": "4"}]}, 'field "messages" is no list of chat messages'),
    (SFT, {"messages": [{"role": "critic", "content": "x"}, *CHAT]}, "a turn of an unknown role"),
    (SFT, {"tools": "[{"}, 'field "tools" is not valid JSON'),
    (
        "HuggingFaceTB/smoltalk2:SFT, think",
        {"chat_template_kwargs": {"xml_tools": ['{"name": "add"}'], "enable_thinking": True}},
        "tools in chat_template_kwargs",
    ),
    (
        "HuggingFaceTB/smoltalk2:SFT, think",
        {"chat_template_kwargs": '{"enable_thinking": true}'},
        'field "chat_template_kwargs" is no object',
    ),
    (
        "HuggingFaceTB/smoltalk2:SFT, no_think",
        {"chat_template_kwargs": {"enable_thinking": True}},
        "a think conversation without a thought",
    ),
    (SFT, {"tools": '["add"]'}, 'field "tools" is no list of objects'),
    (
        SFT,
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"function": {"arguments": "{}"}}],
                },
            ]
        },
        "a tool call without name",
    ),
    (SFT, {"thinking": "yes"}, 'field "thinking" is neither true nor false'),
    (LLAMA, {"output": None}, "the last assistant turn is empty"),
    (RM, {"chosen": "5", "rejected": "5"}, "equal answers or no question"),
    ("nvidia/HelpSteer3:preference", {"overall_preference": 0}, "no preference"),
    ("nvidia/HelpSteer3:preference", {"overall_preference": None}, "no preference"),
    (RL, {"prompt": [{"role": "assistant", "content": "Hello!"}]}, "no user turn"),
    ("allenai/WildChat-1M", {"conversation": []}, "no user turn"),
    (IF, {"kwargs": [ALL_KEYS, ALL_KEYS]}, "number_words without num_words"),
    (
        IF,
        {"kwargs": [ALL_KEYS, ALL_KEYS | {"num_words": "many", "relation": "less than"}]},
        "number_words: TypeError",
    ),
    (IF, {"kwargs": ["{}", "{}"]}, "not one kwargs object for each"),
    (IF, {"instruction_id_list": [[TITLE], WORDS]}, "no constraints, or not one kwargs"),
    (IF, {"instruction_id_list": [], "kwargs": []}, "no constraints"),
    (IF, {"instruction_id_list": ["count:numbers", WORDS]}, "unknown id count:numbers"),
    (
        "allenai/IF_multi_constraints_upto5",
        {"ground_truth": "[{'instruction_id': "},
        "ground_truth holds no instruction_id",
    ),
    (MATH, {"answer": "}{"}, "answers that do not verify"),
    (MATH, {"answer": "\\frac{1}{"}, "answers that do not verify"),
    (MATH, {"answer": ["34"]}, 'field "answer" is neither text nor a number'),
    (MATH, {"answer": True}, 'field "answer" is neither text nor a number'),
    (MATH, {"answer": " "}, "empty problem or answer"),
    (MATH, {"problem": " "}, "empty problem or answer"),
    (
        "agentica-org/DeepScaleR-Preview-Dataset",
        {"answer": None, "solution": "It is \\boxed{1"},
        "empty problem or answer",
    ),
    (CODE, {"verifier_metadata": {"unit_tests": {"inputs": [], "outputs": []}}}, "no tests"),
    (
        CODE,
        {"verifier_metadata": {"unit_tests": {"inputs": ["1"], "outputs": []}}},
        "more inputs than outputs",
    ),
    (
        CODE,
        {"verifier_metadata": {"unit_tests": {"inputs": "12", "outputs": "24"}}},
        "tests of an unknown form",
    ),
    (
        CODE,
        {"verifier_metadata": {"unit_tests": {"inputs": [None], "outputs": ["1"]}}},
        "tests of an unknown form",
    ),
    (CODE, {"verifier_metadata": {"unit_tests": "{broken"}}, "neither JSON nor Python"),
    (DEEP, {"tests": "[]"}, "tests of several functions, or none"),
    (HUB_CODE, {"official_tests": []}, "no tests"),
    (HUB_CODE, {"official_tests": [{"input": "1"}]}, "tests of an unknown form"),
    (HUB_CODE, {"official_tests_complete": False}, "incomplete tests"),
    (HUB_CODE, {"input_mode": "interactive"}, "interactive"),
    (SWE, {"golden_patch": ""}, "golden patch changes nothing"),
    (SWE, {"golden_patch": GOLDEN[: len(GOLDEN) // 2]}, "golden patch"),
    (SWE, {"golden_patch": GOLDEN.replace("sum(prices)", "max(prices)")}, "text not found"),
    (SWE, {"relevant_file_contents": "{broken"}, "file contents or patch cannot be read"),
    (SWE, {"relevant_file_contents": [{"path": "x"}]}, "file contents or patch cannot be read"),
    (SWE, {"relevant_file_contents": LISTED[1:]}, "golden patch needs a file that is not given"),
    (SWE, {"original_prompt": None, "prompt": ""}, "no issue text"),
    (GYM, {"repo": "some/other"}, "no clone owner__name of its repository in --repos"),
    (GYM, {"base_commit": "--help"}, "no clone owner__name of its repository in --repos"),
    (GYM, {"base_commit": "0" * 40}, "text not found"),
    (R2E, {"parsed_commit_content": "{broken"}, "file contents or patch cannot be read"),
    (
        R2E,
        {"parsed_commit_content": json.dumps({"file_diffs": DIFFS[1:]})},
        "golden patch changes nothing",
    ),
]


@pytest.mark.parametrize(
    "name, changes, sentence", CORRUPTED, ids=[f"{i}-{c[2][:30]}" for i, c in enumerate(CORRUPTED)]
)
def test_a_corrupted_row_is_dropped_under_its_reason_and_alone_it_stops_the_run(
    name, changes, sentence, load, clones, tmp_path, capsys
):
    stage, row, _, _ = SETS[name]
    good = json.loads(json.dumps(row).replace("Find", "Seek"))
    kind, text = outcome(
        load, stage, write(tmp_path / "both.jsonl", [good, row | changes], clones), capsys
    )
    assert (
        kind == "dropped"
        and sentence in text
        and ("dropped 1 of 2 rows" in text or "dropped 1 answers that do not" in text)
    ), text
    kind, text = outcome(
        load, stage, write(tmp_path / "alone.jsonl", [row | changes], clones), capsys
    )
    assert kind == "refused" and (sentence in text or stage == "mathrl")


@pytest.mark.parametrize("stage", ["sft", "rm", "rlhf", "ifrl", "mathrl", "coderl", "swerl"])
@pytest.mark.parametrize(
    "content, ending, sentence",
    [
        (b"", "jsonl", "the file is empty"),
        (b"\n \n", "jsonl", "the file is empty"),
        (b"[]", "json", "the file is empty"),
        (b'{"problem": "cut o', "jsonl", "row 1: not valid JSON"),
        (b'{"a": 1}\n{"a": }\n', "jsonl", "row 2: not valid JSON"),
        (b"[[1, 2]]", "json", "row 1: a row is list, expected an object"),
        (b'"text"\n', "jsonl", "a row is str, expected an object"),
        (b"\xff\xfe\x00\x81{}", "jsonl", "row 1: "),
        (b"[" * 100_000, "jsonl", "row 1: not valid JSON (RecursionError"),
        (b"PAR1 but not really", "parquet", "row 0: ArrowInvalid"),
        (b"", "parquet", "row 0: ArrowInvalid"),
        (b"not packed", "jsonl.gz", "BadGzipFile"),
        (b"", "csv", "the file is empty"),
        (
            b"a,b\n1\n",
            "csv",
            "row 1: not a row of the table (1 fields, but the first line names 2)",
        ),
        (b'a,b\n1,"cut o', "csv", "row 0: Error: unexpected end of data"),
        (b"a,b\n1,2\n", "tsv", "expected a file that ends in"),
    ],
)
def test_a_broken_file_is_one_sentence_in_every_stage(
    stage, content, ending, sentence, load, tmp_path, capsys
):
    path = tmp_path / f"rows.{ending}"
    path.write_bytes(content)
    kind, text = outcome(load, stage, str(path), capsys)
    assert kind == "refused" and sentence in text, text


# ---- Streams -------------------------------------------------------------------------------------
@pytest.mark.parametrize("ending", ["jsonl", "parquet", "json", "jsonl.gz"])
def test_reading_on_from_any_cursor_gives_the_rows_that_follow(ending, tmp_path):
    rows = [{"n": i, "text": "x" * random.Random(i).randint(0, 40)} for i in range(50)]
    path = write(tmp_path / f"rows.{ending}", rows, ("", ""))
    if ending == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=7)
    read = list(data.read_file(path))
    assert [row for _, row, _ in read] == rows and [where for where, _, _ in read] == [
        f"{path} row {i}" for i in range(1, 51)
    ]
    shares = [cursor[2] for _, _, cursor in read]
    assert (
        shares == sorted(shares)
        and 0 < shares[0]
        and (shares[-1] == 1 or ending == "jsonl.gz" and shares[-1] < 1)
    )
    for _, row, cursor in read:
        assert [r for _, r, _ in data.read_file(path, json.loads(json.dumps(cursor)))] == rows[
            row["n"] + 1 :
        ]


def test_a_csv_file_as_published_is_read_on_from_any_cursor(tmp_path):
    """A mark at the start, quotes, commas and line breaks inside fields, an empty line, CRLF."""
    rows = [
        {"Question": "Which gas,\nof these?", "Correct Answer": 'the "noble" one\n'},
        {"Question": "a\r\nb", "Correct Answer": "\u00e9" * 200_000},
        {"Question": " 1", "Correct Answer": ""},
    ]
    path = tmp_path / "rows.csv"
    with open(path, "w", newline="", encoding="utf-8-sig") as f:
        table = csv.DictWriter(f, ["Question", "Correct Answer"])
        table.writeheader()
        table.writerow(rows[0])
        f.write("\r\n")
        table.writerows(rows[1:])
    read = list(data.read_file(str(path)))
    assert [(where, row) for where, row, _ in read] == [
        (f"{path} row {n}", row) for n, row in enumerate(rows, 1)
    ]
    assert read[-1][2] == [3, path.stat().st_size, 1.0]
    for n, (_, _, cursor) in enumerate(read, 1):
        rest = [row for _, row, _ in data.read_file(str(path), json.loads(json.dumps(cursor)))]
        assert rest == rows[n:]


def test_lines_in_a_file_called_json_are_read_on_from_any_cursor(tmp_path):
    """Also from the last but one, behind which the rest of the file is one JSON value."""
    path, rows = tmp_path / "rows.json", [{"n": i} for i in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = list(data.read_file(str(path)))
    assert [row for _, row, _ in read] == rows
    for _, row, cursor in read:
        rest = [r for _, r, _ in data.read_file(str(path), cursor)]
        assert rest == rows[row["n"] + 1 :]


def test_a_stream_over_files_equals_itself_after_any_stop(tmp_path):
    for name, n in (
        ("a.jsonl", 23),
        ("b.parquet", 9),
        ("c.json", 4),
        ("d.jsonl.gz", 11),
        ("e.jsonl", 0),
    ):
        if n:
            write(tmp_path / name, [{"file": name, "n": i} for i in range(n)], ("", ""))
        else:
            (tmp_path / name).write_text("\n")
    files = data.data_files(str(tmp_path))
    assert len(files) == 5

    def start():
        return {file: [0, 0, 0.0] for file in files}

    whole = [row for _, row in data.stream_rows(start())]
    assert len(whole) == 47 and [r for r in whole if r["file"] == "a.jsonl"] == [
        {"file": "a.jsonl", "n": i} for i in range(23)
    ]
    for stop in range(48):
        cursors = start()
        stream = data.stream_rows(cursors)
        head = [next(stream)[1] for _ in range(stop)]
        saved = json.loads(json.dumps(cursors))
        assert head + [row for _, row in data.stream_rows(saved)] == whole
    assert all(cursor[2] == 1 for cursor in saved.values())


def test_reading_holds_a_chunk_and_not_the_file(tmp_path):
    rows = [{"messages": "x" * 2000, "n": i} for i in range(4000)]
    peaks = {}
    for ending in ("jsonl", "parquet"):
        path = write(tmp_path / f"rows.{ending}", rows, ("", ""))
        if ending == "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=100)
        tracemalloc.start()
        assert sum(1 for _ in data.read_file(path)) == 4000
        peaks[ending] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    print(f"peak bytes while 8 MB are read: {peaks}")
    assert max(peaks.values()) < 2e6


def test_a_hub_id_becomes_the_files_of_its_training_split(monkeypatch):
    """Configurations: the default one, or all. Splits: "train", or all but the held-out ones.

    Llama-Nemotron has a split for each subject (code, math, ...) and none called train.
    """
    import datasets

    hub = {
        "a/one": {
            "default": {"train": ["hf://x/train.parquet"], "test": ["hf://x/test.parquet"]},
            "extra": {"train": ["hf://x/extra.parquet"]},
        },
        "a/many": {
            "math": {"train": ["hf://x/math.jsonl"]},
            "code": {"train": ["hf://x/code.jsonl", "hf://x/README.md"]},
        },
        "a/splits": {
            "SFT": {
                "chat": ["hf://x/chat.jsonl"],
                "code": ["hf://x/code.jsonl"],
                "validation": ["hf://x/v.jsonl"],
            }
        },
        "a/none": {"default": {"train": ["hf://x/data.txt"]}},
    }
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name: list(hub[name]))
    monkeypatch.setattr(
        datasets,
        "load_dataset_builder",
        lambda name, n: types.SimpleNamespace(
            config=types.SimpleNamespace(data_files=hub[name][n])
        ),
    )
    assert data.data_files("a/one") == ["hf://x/train.parquet"] and data.data_files(
        "a/one:extra"
    ) == ["hf://x/extra.parquet"]
    assert data.data_files("a/many") == [
        "hf://x/math.jsonl",
        "hf://x/code.jsonl",
    ] and data.data_files("a/many:code") == ["hf://x/code.jsonl"]
    assert data.data_files("a/splits,a/one") == [
        "hf://x/chat.jsonl",
        "hf://x/code.jsonl",
        "hf://x/train.parquet",
    ]
    for name in ("a/none", "a/gone"):
        with pytest.raises(SystemExit):
            data.data_files(name)


def test_a_file_behind_a_url_is_read_like_a_local_one(capsys):
    import fsspec

    rows = [{"n": i} for i in range(5)]
    fsspec.filesystem("memory").pipe(
        "/set/rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode()
    )
    assert [row for _, row in data.read_rows("memory://set/rows.jsonl")] == rows
    for url in ("memory://set/gone.jsonl", "no_such_protocol://set/rows.jsonl"):
        with pytest.raises(SystemExit):
            data.read_rows(url)
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and url in error


@pytest.mark.parametrize(
    "stage, good, null",
    [
        (mathrl, {"problem": "1 + 1?", "answer": "2"}, {"question": None, "answer": "2"}),
        (rlhf, {"prompt": "Hi"}, {"messages": None}),
        (rlhf, {"prompt": "Hi"}, {"conversation": None}),
        (
            swerl,
            {"problem_statement": "Tax.", "relevant_file_contents": FILES, "golden_patch": GOLDEN},
            {"problem_statement": None, "relevant_file_contents": FILES, "golden_patch": GOLDEN},
        ),
    ],
)
def test_a_row_whose_field_is_null_is_dropped_and_not_the_end_of_a_run(
    stage, good, null, tmp_path, capsys
):
    (tmp_path / "rows.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(null) + "\n")
    one_row_each = {swerl: {"min_prompt_tokens": 0}, rlhf: {"think_share": 1.0}}
    cfg = stage.Config(data=str(tmp_path / "rows.jsonl"), **one_row_each.get(stage, {}))
    assert len(stage.load_rows(cfg)) == 1 and "dropped 1 of 2 rows" in capsys.readouterr().out


def test_an_empty_field_gives_way_to_the_next_name():
    assert (
        data.first_nonempty(
            {"original_prompt": "", "problem_statement": "Tax."},
            "original_prompt",
            "problem_statement",
        )
        == "problem_statement"
    )
    assert (
        data.first_nonempty({"b": None}, "a", "b") == "b"
        and data.first_nonempty({}, "a", "b") == "a"
    )


@pytest.mark.parametrize("stage", [rlhf, ifrl, mathrl, coderl, swerl])
def test_held_out_rewards_lost_to_infrastructure_are_left_out_of_the_mean(stage, monkeypatch):
    # None: swerl's own sandbox failed
    monkeypatch.setattr(
        stage, "metric", lambda r: {"ok": 1.0, "wrong": 0.0, "crash": None}[r.status]
    )
    rows = [
        {"prompt_ids": [1], "messages": [], "status": status}
        for status in ("ok", "infra", "wrong", "ok", "crash")
    ]
    engine = types.SimpleNamespace(generate=lambda *args, **how: None)

    def collect(rollouts):
        for r in rollouts:
            r.status = r.row["status"]

    assert stage.evaluate(engine, rows, stage.Config(), (lambda r: None, collect), 0, 1) == 2 / 3


def test_a_mode_flag_that_ends_a_prompt_is_the_row_s_mode(tokenizer):
    rows = [
        {"messages": [{"role": "user", "content": text}], "think": think}
        for think in (True, False)
        for text in ("Hi", "Hi /think", "Hi /no_think ")
    ]
    cfg = types.SimpleNamespace(max_prompt_tokens=100)
    kept = prompts.encode_prompts(rows, tokenizer, cfg)
    assert [row["think"] for row in kept] == [True, True, False, False, True, False]
    texts = [tokenizer.decode(row["prompt_ids"], skip_special_tokens=False) for row in kept]
    assert ["Hi /think<|im_end|>" in text for text in texts] == [row["think"] for row in kept]


# ---- The rows that README.md and docs/data.md print ----------------------------------------------
ROW_STAGES = {"sft", "rlhf", "rm", "ifrl", "mathrl", "coderl", "swerl"}


def rows_of_the_readme():
    """[(stage, row as JSON text)] of the table in README.md.

    The second row of rlhf is a pair for its reward model.
    """
    rows = []
    text = (ROOT / "README.md").read_text()
    for stage, cell in re.findall(r"^\| `(\w+)\.py` \| (`\{.*) \|$", text, re.MULTILINE):
        for n, row in enumerate(re.findall(r"`(\{.*?\})`", cell)):
            rows.append(("rm" if stage == "rlhf" and n == 1 else stage, row))
    return rows


def rows_of_the_data_page():
    """[(stage, row as JSON text)]: the lines of the boxes in docs/data.md, by heading."""
    rows, stage, inside = [], "", False
    for line in (ROOT / "docs" / "data.md").read_text().splitlines():
        if line.startswith("### Reward model"):
            stage = "rm"
        elif heading := re.match(r"## `(\w+)\.py`", line):
            stage = heading[1]
        elif line.startswith("```"):
            inside = line == "```json"
        elif inside:
            rows.append((stage, line))
    return rows


@pytest.mark.parametrize("page", [rows_of_the_readme, rows_of_the_data_page])
def test_the_smallest_rows_of_a_page_are_rows_of_their_stages(page, tmp_path, tokenizer):
    rows = page()
    assert {stage for stage, _ in rows} == ROW_STAGES
    for stage, row in rows:
        path = tmp_path / "row.jsonl"
        path.write_text(row + "\n")
        if stage == "sft":
            loaded = data.load_table(str(path), sft.normalize)
        elif stage == "rm":
            loaded = reward_model.load_pairs(str(path), tokenizer, rlhf.Config())
        else:
            module = importlib.import_module(stage)
            knobs = {"swerl": {"min_prompt_tokens": 0}, "rlhf": {"think_share": 1.0}}.get(stage, {})
            loaded = module.load_rows(module.Config(data=str(path), **knobs))
        assert len(loaded) == 1, (stage, row)


def test_the_data_page_names_every_public_set_of_this_file():
    text = (ROOT / "docs" / "data.md").read_text()
    # Without the configuration of a set: openai/gsm8k:main.
    names = {name.split(",")[0].split(":")[0] for name in SETS}
    assert [name for name in sorted(names) if name not in text] == []


# ---- Decontamination -----------------------------------------------------------------------------
NINE = "how many ordered pairs of positive integers are there"  # nine words
HELD_OUT = [
    ("e 1", {"problem": f"Tell: {NINE}, exactly?"}),
    ("e 2", {"prompt": [{"role": "user", "content": "Find x + 1."}]}),
]


@pytest.mark.parametrize(
    "row, gram",
    [
        # case and punctuation do not hide a copy
        ({"problem": f"Say, {NINE.upper()}? Nobody knows."}, NINE),
        ({"problem": NINE.replace("positive", "POSITIVE,\n")}, NINE),
        ({"problem": NINE.removesuffix(" there")}, ""),  # eight words are no overlap
        ({"problem": NINE.replace("ordered", "sorted")}, ""),
        (
            {
                "messages": [
                    {"role": "user", "content": f"x {NINE}"},
                    {"role": "assistant", "content": "y"},
                ]
            },
            NINE,
        ),
        # only what is asked counts
        (
            {
                "messages": [
                    {"role": "user", "content": "x"},
                    {"role": "assistant", "content": NINE},
                ]
            },
            "",
        ),
        ({"responses_create_params": {"input": [{"role": "user", "content": NINE}]}}, NINE),
        ({"answer": NINE}, None),  # it asks nothing
        ({"question": "find X: + 1"}, "find x 1"),  # shorter than nine words: equal as a whole
        ({"question": "Find x + 1 now."}, ""),
        ({"problem": None, "prompt": 7}, None),
        ({}, None),
    ],
)
def test_nine_words_in_a_row_are_an_overlap_and_eight_are_not(row, gram):
    """Paper 3.2.2 and 4.5.1: 9-gram decontamination."""
    assert [found for _, _, found in decontaminate.decontaminate([("row 1", row)], HELD_OUT)] == [
        gram
    ]


def test_the_wording_around_held_out_problems_is_no_overlap():
    template = "Solve the following problem step by step and put the final answer in a box: "
    held_out = [
        (
            "e",
            {
                "problem": template
                + f"what is {i} times {i} minus the square of {i} and then plus one?"
            },
        )
        for i in range(11)
    ]
    rows = [
        ("a", {"problem": template + "how old is the king"}),
        ("b", {"problem": "What is 3 times 3 minus the square of 3 and so on?"}),
    ]
    assert [bool(gram) for _, _, gram in decontaminate.decontaminate(rows, held_out)] == [
        False,
        True,
    ]
    assert [bool(gram) for _, _, gram in decontaminate.decontaminate(rows, held_out[:10])] == [
        True,
        True,
    ]


def test_the_command_writes_what_is_left_and_prints_the_count(tmp_path):
    train = [
        {"problem": "One plus one?", "answer": "2"},
        {"problem": f"Well, {NINE}?", "answer": "3"},
        {"problem": "Two?", "answer": "4"},
    ]
    paths = [
        write(tmp_path / f"{name}.jsonl", rows, ("", ""))
        for name, rows in (("train", train), ("eval", [row for _, row in HELD_OUT]))
    ]
    out = tmp_path / "clean.jsonl"
    _, printed, _ = run_python(
        "-m",
        "extras.decontaminate",
        f"--data={paths[0]}",
        f"--eval_data={paths[1]}",
        f"--out={out}",
    )
    assert (
        "removed 1 of 3 rows that share 9 words in a row with one of 2 held-out rows "
        f'(first: {paths[0]} row 2, "{NINE}")' in printed
    )
    assert [json.loads(line) for line in out.read_text().splitlines()] == [train[0], train[2]]
    code, _, err = run_python(
        "-m",
        "extras.decontaminate",
        f"--data={paths[0]}",
        "--eval_data=nowhere.jsonl",
        f"--out={out}",
        check=False,
    )
    assert code == 2 and err.count("\n") == 1 and "nowhere.jsonl: no such file" in err


def test_a_row_s_index_is_its_place_after_long_prompts_have_gone(tokenizer):
    """The epoch filter's history is kept under it, and select_rows looks there."""
    rows = [
        {"messages": [{"role": "user", "content": text}], "think": False}
        for text in ("Hi", "long " * 200, "Ho")
    ]
    kept = prompts.encode_prompts(rows, tokenizer, mathrl.Config(max_prompt_tokens=100))
    assert [row["index"] for row in kept] == [0, 1] and kept[1]["messages"][0]["content"] == "Ho"


def test_a_prompt_that_is_not_all_text_is_dropped_not_shortened():
    """Without its image or its tool call a prompt asks another question."""
    text, image = {"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": "i"}
    for part in (image, {"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": None}):
        with pytest.raises(data.BadRow, match="a part that is not text"):
            chats.as_messages([{"role": "user", "content": [text, part]}])
    joined = chats.as_messages([{"role": "user", "content": [text, text]}])
    assert joined[0]["content"] == "What is this?\nWhat is this?"

    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "sum", "arguments": {}}]}
    prompt = [USER, call, USER]
    row = {"instruction_id_list": [TITLE], "kwargs": [{}]}
    assert ifrl.normalize(row | {"prompt": [USER]}, "row 1")["messages"] == [USER]
    for stage, raw in ((ifrl, row), (rlhf, {})):
        with pytest.raises(data.BadRow, match="a turn that calls a tool"):
            stage.normalize(raw | {"prompt": prompt}, "row 1")

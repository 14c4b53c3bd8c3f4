"""The math reward: every answer, honest or hostile, earns the verdict written beside it.

Three equalities are guarded: honest forms get math-verify's verdict, integers are compared as exact
integers, and a gold answer equals itself or its problem is not trained on. The epoch filter (paper
4.5.2), the language rule and verifiers that hang are tested here too.
"""

import json
import logging
import mmap
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from math_verify import LatexExtractionConfig, parse, verify

import coderl
import ifrl
import mathrl
import rlhf
import swerl
from lib import guard
from verifiers import answers, sandbox

# {gold answer: answers that are right, between bars}
HONEST = {
    "34": r"34|+34|034|34.0|34.|$34$|\(34\)|\$34|34\%|34^\circ|34^{\circ}|\text{34}|"
    r"\mathbf{34}|x=34|N = 34|a_{1}=34|f(x)=34|"
    r"x \approx 34|34 \text{ apples}|34\,\text{cm}^2|34\textnormal{ miles}|34 degrees|"
    r"34_{10}|(34)|\left(34\right)|\boxed{34}|"
    r"\frac{68}{2}|\cfrac{68}{2}|34/1|\sqrt{1156}|3.4\times 10^1|3.4 \cdot 10^{1}",
    "033": "33|033|33.0",
    "-3": r"-3|-3.0|x=-3|-\frac{6}{2}",
    "0": "0|0.0|00",
    "1024": "2^{10}|1,024|1{,}024|1024",
    "1000000": r"10^6|1,000,000|1,\!000,\!000|1000000",
    r"\frac{1}{2}": r"0.5|1/2|\frac12|\dfrac{2}{4}|.5",
    "1/3": "0.333333",
    "28%": "28|0.28|28%",
    r"2\sqrt{3}": r"\sqrt{12}|x=2\sqrt3|2\sqrt{3}",
    r"1+\sqrt{2}": r"\sqrt2+1",
    r"1 \pm \sqrt{19}": r"1 \pm \sqrt{19}",
    r"\frac{1}{2004!}": r"\frac{1}{2004!}",
    r"\infty": r"\infty",
    "x^2+1": "1+x^2|f(x)=x^2+1|(x+1)^2-2x",
    "x=5": "x=5|5",
    "n!": "n!",
    r"k\pi, k\in\mathbb{Z}": r"k\pi, k \in \mathbb{Z}",
    "(1,2)": "(1,2)",
    "[0,1)": "[0,1)",
    "3,4": "4,3|3,4",
    "A": r"A|\text{A}",
    r"\text{Yes}": "yes|Yes",
    "2 hours": "2",
    r"\frac{1}{2}ab": r"\frac{ab}{2}",
    "2ab": "2ba",
    "AB": "BA",
    "2m+x": "x+2m",
    "120°": r"120|120^\circ|120°",
    "1 000": "1000|1,000",
    "–7": "-7|−7",
    "(0,+∞)": r"(0,\infty)",
    "300000": "3×10^5",
    "Alice and Bob": r"\text{Alice and Bob}|alice and bob.",
    r"\text{II}": "II",
    "120,240": "120, 240",
    "120, 240": "120,240",
    r"\sqrt{5+2\sqrt{6}}": r"\sqrt{2}+\sqrt{3}",
    r"\cos(\pi/7)": r"\cos\frac{\pi}{7}",
    r"\sum_{k=1}^{n} k": r"\frac{n(n+1)}{2}",
    "d/2": r"\frac{d}{2}",
    r"3\text{ hours }20\text{ minutes}": r"3 \text{ hours } 20 \text{ minutes}|"
    r"3 hours 20 minutes",
}
# {gold answer: answers that are wrong, hedged, not computed or hostile, between bars}
DISHONEST = {
    r"\pi ab": r"\pi",
    "4ab": "4",
    "3 + 2t": "5",
    "a+2m": "a+2",
    "-2t": "-2",
    "x+1": r"x+1 \text{ miles}, x+2 \text{ miles}",
    r"3 \text{ hours } 20 \text{ minutes}": r"3 \text{ hours } 40 \text{ minutes}",
    r"30 \text{ km/h}, 40 \text{ km/h}": r"30 \text{ km/h}, 50 \text{ km/h}",
    "BCA": "ABC|CAB",
    "Alice and Bob": "Alice|Bob and Alice and Eve",
    "32,349 m": "32, 349",
    r"1-\frac{1}{2022!}": r"1-\frac{1}{2021!}",
    r"2-\frac{1}{2^{99}}": r"2-\frac{1}{2^{98}}",
    r"1-\frac{1}{2^{2024}}": r"1+\frac{1}{2^{2024}}",
    "2^n-1": r"\sum_{k=0}^{n-1}2^k",
    r"\frac{x^3}{3}": r"\int x^2 dx",
    "2x": r"\frac{d}{dx}x^2",
    "34": r"35|-34|0.34|3400|340|33.9999999|34.0000001|33 34|33 \quad 34|33, 34|34, 33|33;34|"
    r"33 . 34|33:34|\{33,34\}|[33,34]|"
    r"33 \lor 34|33 \land 34|33 \mid 34|33 \to 34|33 \Rightarrow 34|33 \cup 34|33 \dots 34|"
    r"\neg 33 34|33\\34|34 \pm 1|34 or 33|"
    r"33 xor 34|33 \text{ or } 34|34 \text{ or 33}|\text{not } 34|33\boxed{34}|33=34|"
    r"33 \equiv 34|34=34=34|33<34|x<34|x \in 34|"
    r"a+b=34|33 \approx 34|30+4|40-6|2\times 17|17 \cdot 2|34!|\sum_{i=1}^{34} 1|"
    r"\prod_{i=1}^{1} 34|\int_0^{34} 1 dx|"
    r"\lim_{x\to 34} x|\log_2 {17179869184}|\max(33,34)|\gcd(34,68)|\binom{34}{1}|"
    r"9^{9^{9^9}}|10^{10^{10}}|34^{34^{34^{34}}}|"
    r"__import__('os').system('touch pwned')|eval('34')|\text{exec}(34)|thirty-four|"
    r"\text{the answer}|?|\%|^|_",
    "5040": "7!",
    "100": r"200 - 100|2^{7} - 28|200- 100|200 -100",
    "-3": "2 - 5",
    "1/2": r"1 - \frac{1}{2}",
    "12": "1 2",
    "4": r"2+2|\sqrt[4]{255}|2^{1}",
    "67": "33 34",
    "0": r"10^{-9}|0.0000001|10^{-400}|\sin(\pi)",
    "1/3": "0.3333|0.33",
    "28": "0.28|2800",
    "0.28": "28",
    "32349": "32, 349|32,34,9",
    "(0,9)": "[0,9)|[0,9]|(0,9]",
    r"\{1,2\}": r"\{1,2,3\}|1",
    "3,4": "3,4,5|3|4",
    "10^{-20}": "10^{-21}|0",
    r"\frac{1}{2^{99}}": r"\frac{1}{2^{98}}",
    r"\frac{1}{2004!}": r"\frac{1}{2006!}|0",
    r"2\sqrt{3}": r"1=2\sqrt3|3.4|2\sqrt{3},1|1 \lor 2\sqrt{3}",
    r"\frac{\pi}{4}": r"\int_0^1\frac{1}{1+x^2}dx|0.785",
    r"\frac{\pi^2}{6}": r"\sum_{k=1}^\infty \frac{1}{k^2}",
    "x^2+1": "x^2+2|x^2|y^2+1",
    "A": "B|AB|A, B",
}
# Whole responses to a problem whose answer is 34, and the reward of each.
RESPONSES = {
    r"<think>17 twice</think> It is \boxed{34}.": 1,
    r"</think>\boxed{34}": 1,
    r"<think>\boxed{33}</think>\boxed{34}": 1,
    r"</think>First \boxed{33}, no: \boxed{34}": 1,
    r"</think>\boxed {34}": 1,
    r"</think>\fbox{34}": 1,
    r"</think>\boxed{\boxed{34}}": 1,
    r"</think>\boxed{\text{34}}": 1,
    r"</think>\boxed{33 \boxed{34}": 1,  # the last box is closed
    r"<think>a</think>\boxed{33}</think>\boxed{34}": 1,
    r"": 0,
    r"34": 0,
    r"</think>34": 0,
    r"</think>The answer is 34.": 0,
    r"\boxed{34}": 0,
    r"<think>\boxed{34}": 0,
    r"<think>\boxed{34}</think>": 0,
    r"</think>\boxed{34}</think>": 0,
    r"</think>\boxed{34} \boxed{33}": 0,
    r"</think>\boxed{34} and \boxed{33": 0,
    r"</think>\boxed{34} or \boxed 33": 0,
    r"</think>\boxed{34": 0,
    r"</think>\boxed{33 \boxed{34}}": 0,
    r"</think>\boxed{\{34}": 0,
    r"</think>\boxed{}": 0,
    r"</think>\boxedx{34}": 0,
    r"</think>boxed{34}": 0,
    "</think>\\boxed{" + "1" * 600 + "}": 0,
    "</think>\\boxed{34" + " " * 600 + "}": 0,
    "</think>" + "\\boxed{" * 20000: 0,
    "</think>\\boxed{" + "{" * 250 + "}" * 250 + "}": 0,
    "</think>\\boxed{" + "\\sqrt{" * 80 + "34" + "}" * 80 + "}": 0,
    "</think>\\boxed{34\x00}": 0,
    "</think>\\boxed{\u0663\u0664}": 0,  # Arabic-Indic digits
}
TABLE = []  # (gold answer, answer, reward)
for table, earned in ((HONEST, 1), (DISHONEST, 0)):
    for gold_answer, forms in table.items():
        TABLE += [(gold_answer, answer, earned) for answer in forms.split("|")]


@pytest.mark.slow
def test_every_answer_earns_the_verdict_written_beside_it():
    slowest, wrong = 0, []
    for gold, answer, expected in TABLE:
        start = time.time()
        if mathrl.reward(mathrl.boxed_response(answer), gold) != expected:
            wrong.append((gold, answer, expected))
        slowest = max(slowest, time.time() - start)
    print(f"{len(TABLE)} answers, slowest {slowest:.1f} s (4 CPU seconds, limit 40 s)")
    assert not wrong and slowest < 40 and not os.path.exists("pwned")


@pytest.mark.parametrize("response", RESPONSES)
def test_only_the_last_balanced_box_after_the_last_closing_tag_counts(response):
    start = time.time()
    assert mathrl.reward(response, "34") == RESPONSES[response] and time.time() - start < 40


def test_honest_forms_agree_with_math_verify_except_where_it_reads_an_integer_too_loosely():
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    ours = theirs = 0
    for gold, answer, expected in TABLE:
        if expected:
            ours += 1
            parsed_gold = parse(mathrl.boxed_response(gold))
            theirs += verify(
                parsed_gold, parse(mathrl.boxed_response(answer), [LatexExtractionConfig()])
            )
    # math-verify refuses "34.", a few LaTeX commands around a number, and words and signs outside
    # LaTeX.
    print(f"math-verify accepts {theirs} of the {ours} honest answers that we accept")
    assert theirs >= 0.8 * ours


def test_status_says_why():
    cases = {
        r"</think>\boxed{34}": "ok",
        r"</think>\boxed{3}": "wrong",
        r"\boxed{34}": "no_answer",
        "</think>": "no_answer",
    }
    for text, status in cases.items():
        assert mathrl.verdict(text, "34")[1] == status, text


def test_reasoning_in_another_script_earns_minus_one_whatever_the_answer():
    english, chinese = "Find x.", "\u6c42 x\u3002"
    for text in (
        "\u6240\u4ee5 x",
        "\u0437\u043d\u0430\u0447\u0438\u0442",
        "\u7b54\u3048\u306f",
        "\u0625\u0630\u0646",
        "\u0967",
    ):
        assert mathrl.language_ok(english, text) == (not any(c.isalpha() for c in text))
    for text in (
        "naive caf\u00e9 \u00bd",
        "\u03b1 + \u03b2 \u2264 \u2211",
        "\u211d \U0001d431 \u2192 \u2713",
        "\U0001f600 \u00b5 \u00aa",
    ):
        assert mathrl.language_ok(english, text), text
    assert mathrl.language_ok(chinese, "\u6240\u4ee5 x") and mathrl.language_ok(chinese, "so x")
    response = "<think>\u6240\u4ee5</think>\\boxed{34}"
    assert mathrl.reward(response, "34", english) == -1
    assert mathrl.verdict(response, "34", english)[1] == "language"
    assert mathrl.reward(response, "34", chinese) == 1 and mathrl.reward(response, "34") == 1
    # Only the language of the reasoning counts.
    assert mathrl.reward("<think>so</think>\u6240\u4ee5 \\boxed{34}", "34", english) == 1


# ---- kinds of answers ----------------------------------------------------------------------------

CASES = [
    json.loads(line)
    for line in open(os.path.join(os.path.dirname(__file__), "math_cases.jsonl"), encoding="utf-8")
]
# Right answers that are refused, each with its reason.
REFUSED = {
    (
        r"\text{No solution}",
        r"\text{There is no solution}",
    ): "a sentence: words are compared as text",
    (r"\frac{1}{\sqrt{m}}", r"\sqrt{1/m}"): "sympy proves it for positive m only",
}


def status_of_case(case):
    """Verdict on one row of math_cases.jsonl; the answer of a "whole response" is the response."""
    whole = case["kind"].startswith("whole response")
    response = case["answer"] if whole else mathrl.boxed_response(case["answer"])
    return mathrl.verdict(response, case["gold"])


def check_cases(cases):
    paid = [case for case in cases if not case["want"] and status_of_case(case)[0] == 1]
    refused = []
    for case in cases:
        reason = REFUSED.get((case["gold"], case["answer"]))
        if case["want"] and status_of_case(case)[0] != 1 and not reason:
            refused.append(case)
    wrong = sum(not case["want"] for case in cases)
    print(
        f"paid {len(paid)} of {wrong} wrong, refused {len(refused)} of {len(cases) - wrong} right"
    )
    assert not paid and not refused


def test_one_case_of_each_kind_that_was_judged_wrongly():
    """In math_cases.jsonl, `want` is the right verdict; `before` was that of an older reader."""
    first = {}
    for case in CASES:
        if case["want"] != case["before"]:
            first.setdefault((case["kind"], case["want"]), case)
    check_cases(list(first.values()))


@pytest.mark.slow
def test_every_case_that_needs_no_time_out():
    check_cases([c for c in CASES if "bomb" not in c["kind"] and "hang" not in c["kind"]])


# None of these golds stands in math_cases.jsonl.
GOLDS = r"""19 ; -42 ; 2025 ; 0.375 ; \frac{5}{12} ; -\frac{7}{9} ; 3\sqrt{11} ;
\frac{\sqrt{13}}{6} ; 5\pi ; \frac{7\pi}{12} ; 2+\sqrt{15} ; \sqrt{3}-\sqrt{2} ; e^{4}-3 ;
\ln 5 ; \log_3 7 ; 2^{31}-1 ; 13! ; 4+9i ; -2i ; 7\cdot 10^{8} ; 3.6\times 10^{-4} ; x^2-5x+6 ;
2x^3+7 ; (x-4)(x+9) ; \frac{3x+1}{x-2} ; a^2+ab+b^2 ; \frac{mn}{m+n} ; n(n+3) ; 3^{n+1}-2 ;
\sqrt{4y+1} ; \sin 3\theta ; 5\cos x ; x=8 ; y=4x-9 ; x^2+y^2=25 ; 3x-4y+12=0 ; f(x)=5x-2 ;
(3,7) ; (-2,5,11) ; (\frac{2}{3},-4) ; [2,9) ; (-\infty,6] ; [-5,5] ; x>7 ;
(-\infty,-3)\cup(4,\infty) ; -3<x\le 8 ; 2,5,9 ; \{4,6,13\} ; -7,7 ; \pm 6 ; 3\pm\sqrt{7} ;
15 \text{ cm} ; x=3 \text{ or } x=11 ; a=4,b=9 ; (1,5),(6,2) ; \begin{pmatrix}3\\8\end{pmatrix} ;
24\text{ cm}^2 ; 18\% ; \begin{pmatrix}2&5\\7&9\end{pmatrix} ; \$7.50 ; 75^\circ ;
8 \text{ hours} ; 4:7 ; 2:5:8 ; 312_5 ; 5\frac{3}{4} ; 4k\pi, k\in\mathbb{Z} ; \frac{n^2}{4}+C ;
R^2-4r ; 2Ab ; |x-6| ; \binom{n}{4} ; G ; \text{Tuesday}""".replace("\n", " ").split(" ; ")
# Replacing the left text by the right one changes a gold's value.
SWAPS = [("+", "-"), ("-", "+"), ("<", ">"), ("[", "("), (")", "]"), ("x", "z"), ("n", "m")]
SWAPS += [("R", "r"), ("A", "a"), (r"\sin", r"\cos"), (r"\pi", "e"), (r"\infty", "1"), (r"\pm", "")]
NO_FORMULA = ("=", "<", ">", ",", ":", "text", "begin", r"\{", r"\pm", "mathbb", "+C")


def near_misses(gold):
    """Wrong answers that look like the gold: other numbers, signs, letters and brackets."""
    answers = {"1=1", "1=2", "0=0", "0", "z", "?"}
    for match in re.finditer(r"\d+", gold):
        for number in (int(match[0]) + 1, abs(int(match[0]) - 1), match[0] + "4"):
            answers.add(gold[: match.start()] + str(number) + gold[match.end() :])
    for old, new in SWAPS:
        if old in gold and "text" not in gold and "begin" not in gold and "frac" not in gold:
            answers.add(gold.replace(old, new, 1))
    if gold != "G" and not any(sign in gold for sign in NO_FORMULA):
        answers |= {f"-{gold}", f"{gold}+1", f"2({gold})", f"0={gold}", f"{gold}, 1"}
        answers.add(rf"{gold} \text{{ or }} 1")
    return sorted(answers - {gold})


def honest_rewrites(gold):
    """Right answers: the gold as other people write it."""
    answers = [f"${gold}$", rf"\({gold}\)", f"{gold}.", f"{gold} .", rf"\displaystyle {gold}"]
    answers += [gold.replace("frac", "dfrac"), gold.replace(r"\pi", "\u03c0"), f" {gold} "]
    answers += [
        gold.replace("-", "\u2212"),
        gold.replace(r"\le ", r"\leq "),
        gold.replace(",", ", "),
    ]
    answers += [gold.replace(r"\infty", "\u221e").replace(r"\cup", "\u222a")]
    answers += [re.sub(r"\^2(?!\d)", "\u00b2", gold), gold.replace("+", " + ").replace("=", " = ")]
    if "frac" not in gold and gold.count(r"\sqrt{") == 1:
        answers.append(re.sub(r"\\sqrt\{([^}]*)\}", "\u221a(\\1)", gold))
    if r"\cup" not in gold:
        for old, new in (("(", r"\left("), (")", r"\right)"), ("[", r"\left["), ("]", r"\right]")):
            gold = gold.replace(old, new)
        answers.append(gold)
    if re.fullmatch(r"-?\d+", gold):
        answers += [
            f"x={gold}",
            f"{gold} cm",
            rf"{gold}\text{{ km}}",
            f"{gold} people",
            f"{gold}.0",
        ]
    if re.fullmatch(r"-?\d+(,-?\d+)+", gold):
        numbers = gold.split(",")
        answers += [",".join(reversed(numbers)), rf"\{{{gold}\}}", r" \text{ and } ".join(numbers)]
    return list(dict.fromkeys(answers))


@pytest.mark.slow
def test_near_misses_and_honest_rewrites_of_other_golds():
    assert not {case["gold"] for case in CASES} & set(GOLDS)
    wrong = [(gold, answer) for gold in GOLDS for answer in near_misses(gold)]
    right = [(gold, answer) for gold in GOLDS for answer in honest_rewrites(gold)]
    draw = random.Random(0)
    wrong, right = draw.sample(wrong, 500), draw.sample(right, 500)
    paid = [pair for pair in wrong if mathrl.reward(mathrl.boxed_response(pair[1]), pair[0]) == 1]
    refused = [p for p in right if mathrl.reward(mathrl.boxed_response(p[1]), p[0]) != 1]
    print(
        f"paid {len(paid)} of 500 near misses (limit 5), refused {len(refused)} of 500 (limit 40)"
    )
    assert not paid and not refused


def test_a_gold_that_the_verifier_does_not_read_is_compared_as_text(tmp_path, capsys):
    sound = [r"\frac{3}{7}", "$2ab$", "x^2+6x+25=0", "6 robins.", r"12 \text{ cm}", "y=3x+1", "AB"]
    assert [answers.unsound(gold) for gold in sound] == [""] * len(sound)
    # another number in the exponent of 1 is right
    rows = [{"problem": "Simplify.", "answer": "1^5+x"}, {"problem": "Find it.", "answer": "34"}]
    path = tmp_path / "math.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    loaded = mathrl.load_rows(mathrl.Config(data=str(path), reward_workers=2))
    assert [row.get("as_text", False) for row in loaded] == [True, False]
    assert "1 answers are compared as text only" in capsys.readouterr().out
    assert mathrl.verdict(r"</think>\boxed{$1^5 + x$}", "1^5+x", None, True) == (1, "ok")
    assert mathrl.verdict(r"</think>\boxed{1+x}", "1^5+x", None, True) == (0, "wrong")


def test_a_formula_of_the_problem_is_no_answer():
    problem = r"Factor $x^2-9$, where $x$ is not $3$, and simplify \(\frac{4}{8}\)."
    copied = r"</think>\boxed{x^2 - 9}"
    assert mathrl.verdict(copied, "(x-3)(x+3)") == (1, "ok")
    assert mathrl.verdict(copied, "(x-3)(x+3)", problem) == (0, "wrong")
    assert mathrl.verdict(copied, "$x^2-9$", problem) == (1, "ok"), "the gold's own text"
    assert mathrl.verdict(r"</think>\boxed{(x+3)(x-3)}", "(x-3)(x+3)", problem) == (1, "ok")
    for number in ("3", r"\frac{4}{8}"):
        gold = {"3": "3", r"\frac{4}{8}": "0.5"}[number]
        assert mathrl.verdict(f"</think>\\boxed{{{number}}}", gold, problem) == (1, "ok")


# ---- verifier processes --------------------------------------------------------------------------


def hang(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pow(3, 10**6)
    return seconds


def wait(seconds):
    time.sleep(seconds)
    return seconds


def test_cpu_seconds_decide_and_a_machine_that_stalls_is_infrastructure(monkeypatch):
    """A child that waits longer than its CPU limit still answers. Waiting has its own limit."""
    call = sandbox.killable(wait, 0.2, 30)
    assert call(0.5) == 0.5
    call = sandbox.killable(wait, 30, 0.3)
    with pytest.raises(TimeoutError):
        call(10)
    assert call(0.01) == 0.01
    call = sandbox.killable(hang, 0.2, 60)
    assert call(10) is None

    def stalled(gold, answer):
        raise TimeoutError

    monkeypatch.setattr(answers, "equal_in_child", stalled)
    assert mathrl.verdict(mathrl.boxed_response("y+1"), "x+1") == (0, "infra")


def allocate(size):
    return len(bytearray(size))


def test_a_hanging_or_dying_verifier_is_killed_and_replaced():
    call = sandbox.killable(hang, 1.0)
    start = time.time()
    assert call(100) is None and time.time() - start < 2 and call(0.01) == 0.01
    call = sandbox.killable(allocate, 5.0)
    # The memory limit is 2 GiB.
    assert call(4 << 30) is None and call(10) == 10


KEPT = []


def hoard(size):
    # Memory of its own: a bytearray may lie in what this process had freed before the fork.
    KEPT.append(mmap.mmap(-1, size))
    return len(KEPT)


def test_a_verifier_that_has_grown_is_replaced_and_the_next_answer_loses_nothing():
    call = sandbox.killable(hoard, 5.0)
    # A process that has grown by a gibibyte is replaced.
    assert [call(400 << 20) for _ in range(6)] == [1, 2, 3, 1, 2, 3]


def die_once(path, always):
    """End as if the machine's memory guard had killed this process."""
    if always or not os.path.exists(path):
        open(path, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


def test_a_verifier_killed_from_outside_is_asked_once_more(tmp_path):
    call = sandbox.killable(die_once, 5.0)
    assert call(tmp_path / "struck", False) == "alive"
    start = time.time()
    assert call(tmp_path / "struck", True) is None
    assert time.time() - start < 4, "asked again and again"
    assert call(tmp_path / "struck", False) == "alive"


def half_pi(i):
    """The reward of an answer that is right for even i and wrong for odd i."""
    answer, gold = r"\frac{%d\pi}{7}" % i, r"\frac{%d\pi}{7}" % (i - i % 2)
    return mathrl.reward(mathrl.boxed_response(answer), gold)


def test_forks_of_a_process_that_has_verified_get_verifiers_of_their_own():
    assert half_pi(2) == 1
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(half_pi, range(16)) == [1, 0] * 8


def test_the_hook_verifies_in_the_background_and_fills_in_every_rollout():
    row = {
        "messages": [{"role": "user", "content": "Find it."}],
        "think": True,
        "answer": r"\frac{\pi}{4}",
    }
    texts = {
        r"<think>a</think>\boxed{\frac{\pi}{4}}": (1, "ok"),
        r"</think>\boxed{\frac{\pi}{3}}": (0, "wrong"),
        "no": (0, "no_answer"),
        "<think>\u6240\u4ee5</think>\\boxed{\\frac{\\pi}{4}}": (-1, "language"),
    }

    def finished(text, finish_reason="stop", row=row):
        nothing = dict(reward=None, status="", pending=None)
        return SimpleNamespace(row=row, text=text, finish_reason=finish_reason, **nothing)

    rollouts = [finished(text) for text in list(texts) * 4]
    submit, collect = mathrl.make_reward(mathrl.Config(reward_workers=2))
    for rollout in rollouts[:12]:
        submit(rollout)
    collect(rollouts)
    assert [(r.reward, r.status) for r in rollouts] == list(texts.values()) * 4
    assert mathrl.monitor(rollouts) == {"box": 0.75, "two_boxes": 0.0, "box_wrong": 0.25}
    cut = finished(next(iter(texts)), finish_reason="length")
    free = finished(r"\boxed{\frac{\pi}{4}}", row={**row, "think": False})
    collect([cut, free])
    assert (cut.reward, cut.status) == (0, "no_answer") and mathrl.metric(free) == 1.0


def test_verifier_children_end_with_a_killed_parent():
    """An idle child whose parent is killed with SIGKILL ends by itself within two seconds."""
    code = (
        "import os, time\n"
        "from verifiers import answers\n"
        "answers.equal_in_child.start()\n"
        "print(open(f'/proc/self/task/{os.getpid()}/children').read(), flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        cwd=os.path.dirname(mathrl.__file__),
    )
    child = int(parent.stdout.readline().split()[0])
    parent.kill()
    parent.wait()

    def alive():
        """The process exists and is no zombie, whose state is Z."""
        if not os.path.exists(f"/proc/{child}/stat"):
            return False
        with open(f"/proc/{child}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"

    # On an idle machine the child ends within a second or two, on a busy one within 20.
    deadline = time.time() + 20
    while alive() and time.time() < deadline:
        time.sleep(0.05)
    assert not alive()


# ---- a broken verifier ---------------------------------------------------------------------------


def test_a_verification_that_math_verify_gives_up_is_a_time_out_and_no_wrong_answer():
    """A time-out is told from a wrong answer, though both earn 0."""
    start = time.time()
    assert mathrl.verdict(mathrl.boxed_response("9^{9^{9^9}}"), r"\frac{\pi}{4}") == (0, "timeout")
    assert time.time() - start < 40
    assert mathrl.verdict(mathrl.boxed_response(r"\frac{\pi}{3}"), r"\frac{\pi}{4}") == (0, "wrong")


@pytest.mark.parametrize(
    "stage, metrics, sentence",
    [
        # These shares are at the limit, not over it.
        (mathrl, {"status/infra": 0.02, "status/timeout": 0.02}, ""),
        (
            mathrl,
            {"status/infra": 0.021},
            "2.1% of the rewards are infrastructure failures (--max_infra=0.02)",
        ),
        # A time-out is the fault of the answer or program that is judged: its limit is in CPU
        # seconds.
        (mathrl, {"status/timeout": 0.5}, ""),
        (coderl, {"status/infra": 0.0, "status/timeout": 0.5}, ""),
        (coderl, {"status/infra": 0.03}, "infrastructure failures"),
        (ifrl, {"status/infra": 0.03}, "infrastructure failures"),
        (swerl, {"status/infra": 0.03}, "infrastructure failures"),
        (rlhf, {"status/infra": 0.03}, "infrastructure failures"),
    ],
)
def test_a_run_stops_itself_when_more_than_two_percent_of_the_verdicts_are_errors(
    stage, metrics, sentence, capsys
):
    def step():
        logged = {"grad_norm": 1.0, "loss": 0.0, "status/timeout": 0.0, **metrics}
        return guard.check_step(7, logged, {"skipped": 0}, stage.Config())

    if not sentence:
        return step()
    with pytest.raises(SystemExit) as stop:
        step()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert sentence in error
    assert "step 7" in error
    assert "The last checkpoint is whole." in error


# ---- rows ----------------------------------------------------------------------------------------

DAPO_PROMPT = (
    "Solve the following math problem step by step. The last line of your response should be of "
    "the form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
    "Find it.\n\nNow.\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)


def test_every_schema_becomes_the_same_row_and_bad_golds_are_dropped(tmp_path, capsys):
    rows = [
        {"problem": "One.", "answer": "34", "source": "NuminaMath"},
        {"problem": "One.", "answer": "34", "source": "again"},
        {"problem": "Two.", "solution": "So \\boxed{x^2}.", "answer": "x^2"},
        {"problem": "Three.", "solution": "So it is \\boxed{\\frac{1}{2}}."},
        {"prompt": "Four.", "solution": "7"},
        {"question": "Five.", "expected_answer": 12},
        {
            "prompt": [{"role": "user", "content": DAPO_PROMPT}],
            "reward_model": {"ground_truth": "8", "style": "rule"},
        },
        {"problem": "Bad.", "answer": "}{"},
        {"problem": "Empty.", "answer": " "},
    ]
    path = tmp_path / "math.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    cfg = mathrl.Config(data=str(path), reward_workers=2)
    loaded = mathrl.load_rows(cfg)
    problems = [row["messages"][0]["content"].removeprefix(mathrl.INSTRUCTION) for row in loaded]
    assert problems == ["One.", "Two.", "Three.", "Four.", "Five.", "Find it.\n\nNow."]
    golds = [row["answer"] for row in loaded]
    assert golds == ["34", "x^2", r"\frac{1}{2}", "7", "12", "8"]
    assert all(row["think"] for row in loaded)
    printed = capsys.readouterr().out
    assert "empty problem or answer" in printed
    assert "1 repeated problems" in printed
    assert "1 answers" in printed
    mathrl.self_test(loaded, cfg)
    with pytest.raises(SystemExit):
        mathrl.self_test([{"answer": "}{"}], cfg)
    path.write_text('{"problem": "One."}')
    with pytest.raises(SystemExit):
        mathrl.load_rows(cfg)


def test_the_epoch_filter_drops_solved_and_hopeless_rows_and_readmits_a_few():
    cfg = mathrl.Config()
    rows = [{}] * 4000
    # Rows 0-999 are solved, rows 1000-1999 hopeless, rows 2000-2999 in between, the others unseen.
    history = {}
    for start, num_correct in ((0, 8), (1000, 0), (2000, 3)):
        history |= {i: [num_correct, 8] for i in range(start, start + 1000)}
    history[3000] = [0, 0]  # all its rollouts were skipped, so it counts as unseen
    pool = mathrl.select_rows(rows, 1, history, cfg)
    easy = sum(i < 1000 for i in pool)
    hard = sum(1000 <= i < 2000 for i in pool)
    print(f"readmitted: {easy} of 1000 easy (expected 10), {hard} of 1000 hard (expected 100)")
    assert set(range(2000, 4000)) <= set(pool)
    assert 2 <= easy <= 25 and 65 <= hard <= 140
    # The order of the history does not matter, the epoch does.
    in_another_order = dict(reversed(history.items()))
    assert pool == mathrl.select_rows(rows, 1, in_another_order, cfg)
    assert pool != mathrl.select_rows(rows, 2, history, cfg)
    assert sorted(mathrl.select_rows(rows, 0, {}, cfg)) == list(range(4000))
    # The pool is never empty, even if every row is solved.
    assert mathrl.select_rows(rows[:3], 1, {i: [8, 8] for i in range(3)}, cfg)


# ---- properties ----------------------------------------------------------------------------------

PIECES = [
    "</think>",
    "\\boxed{",
    "}",
    "{",
    "\\{",
    "34",
    "33",
    "=",
    ",",
    ".",
    "\\frac",
    "\\sqrt",
    "\\text",
    "^",
    "_",
    "!",
    "\\sum",
    "x",
]
PIECE_OR_TEXT = st.one_of(st.sampled_from(PIECES), st.text(max_size=6))
RESPONSE_TEXTS = st.lists(PIECE_OR_TEXT, max_size=25).map("".join)


def never_fails(response, gold="34"):
    """The verifier's own limit is 4 CPU seconds. The limit of 40 s leaves room for a machine that
    stalls under other work."""
    start = time.time()
    value, status = mathrl.verdict(response, gold)
    assert time.time() - start < 40
    assert value in (0, 1) and (value == 1) == (status == "ok")
    assert value == 0 or "</think>" in response


@settings(max_examples=300, deadline=None)
@given(RESPONSE_TEXTS)
def test_no_response_raises_or_stalls(response):
    never_fails(response)


@settings(max_examples=60, deadline=None)
@given(RESPONSE_TEXTS.map(lambda text: text.replace("</think>", "")))
def test_no_boxed_text_raises_or_stalls(answer):
    never_fails(mathrl.boxed_response(answer), r"\frac{\pi}{4}")


@pytest.mark.exhaustive
@settings(max_examples=20000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(RESPONSE_TEXTS, st.sampled_from(["34", r"\frac{\pi}{4}", "x^2+1", "(1,2)", r"\text{Yes}"]))
def test_twenty_thousand_responses_neither_raise_nor_stall(response, gold):
    never_fails(response, gold)
    never_fails(mathrl.boxed_response(response.replace("</think>", "")), gold)


@settings(max_examples=500, deadline=None)
@given(st.integers(-(10**30), 10**30), st.integers(-3, 3))
def test_integers_are_compared_exactly_and_symmetrically(gold, off):
    a, b = str(gold), str(gold + off)
    assert (
        mathrl.reward(mathrl.boxed_response(a), b)
        == mathrl.reward(mathrl.boxed_response(b), a)
        == (off == 0)
    )
    assert mathrl.reward(mathrl.boxed_response(f"{gold:,}"), a) == 1


LETTERS = st.text(
    alphabet="ab \u00e9\u03b1\u0436\u4e2d\u3042\u0627\u211d\U0001d431\u00b5\u2192\n</think>12",
    max_size=40,
)


def language_rule_holds(prompt, response, more):
    """A response in the prompt's own letters is fine, and Latin letters are always fine. A longer
    prompt never forbids more."""
    fine = mathrl.language_ok(prompt, response)
    assert fine in (True, False)
    assert mathrl.language_ok(prompt, prompt)
    assert mathrl.language_ok(prompt, "plain text")
    assert not fine or mathrl.language_ok(prompt + more, response)


@settings(max_examples=300, deadline=None)
@given(LETTERS | st.text(max_size=20), LETTERS | st.text(max_size=20), LETTERS)
def test_the_language_rule_is_monotone(prompt, response, more):
    language_rule_holds(prompt, response, more)


@pytest.mark.exhaustive
@settings(max_examples=20_000, deadline=None)
@given(LETTERS | st.text(max_size=20), LETTERS | st.text(max_size=20), LETTERS)
def test_the_language_rule_is_monotone_on_twenty_thousand_texts(prompt, response, more):
    language_rule_holds(prompt, response, more)


def test_an_integer_answer_costs_microseconds():
    texts = [
        f"<think>{'so ' * 200}</think> It is \\boxed{{{random.randrange(100)}}}."
        for _ in range(2000)
    ]
    start = time.time()
    for text in texts:
        mathrl.reward(text, "34")
    each = (time.time() - start) / len(texts)
    print(f"{each * 1e6:.0f} microseconds (limit 500)")
    assert each < 5e-4


def test_golds_are_checked_once_for_a_folder(tmp_path, monkeypatch):
    """A run that resumes reads what the first start found; other golds are checked again."""
    checked = []
    trouble_of = answers.trouble_of

    def noting(gold):
        checked.append(gold)
        return trouble_of(gold)

    monkeypatch.setattr(answers, "trouble_of", noting)
    golds = ["34", r"\frac{1}{2}", r"\frac{"]
    first = answers.check_golds(golds, 2, str(tmp_path))
    assert first == ["", "", None] and sorted(checked) == sorted(golds)
    assert answers.check_golds(golds, 2, str(tmp_path)) == first and len(checked) == 3
    answers.check_golds([*golds, "35"], 2, str(tmp_path))
    assert len(checked) == 7
    assert answers.check_golds(golds, 2, str(tmp_path / "none")) == first

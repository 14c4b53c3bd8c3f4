"""What a reward pays: answers that are right, wrong, empty, copied, hedged, ... to your own rows.

    python -m evals.audit --stage=mathrl --data=my.jsonl
    python -m evals.audit --stage=rlhf --data=pairs.jsonl --flags="--rm=out/rlhf/rm"

A policy finds what a reward pays by mistake, and days of training go into it. Before a run this
script writes answers of known worth to rows of the data, lets the stage's own reward judge them as
it judges rollouts, and prints one table: the mean reward of each kind, and the share that earns at
least what the row's gold earns. That share should be 100% for golds and near 0% for every other
kind.

The kinds follow from what a row holds, so a copy of a stage is audited like the original: a gold
answer (Math RL), tests (Code RL), a golden patch (SWE RL), constraints (IF-RL, whose rows have no
golds), a prompt or a preference pair, whose chosen answer is the gold (RLHF).
"""

import importlib
import math
import random
import re
import shlex
import statistics
import tempfile
from collections import Counter
from dataclasses import dataclass, fields

from engine import Rollout
from lib.data import load_table, read_rows
from lib.flags import PositiveInt, make_parser, parse_config
from lib.guard import fail
from verifiers import patches, programs
from verifiers.language import language_ok
from verifiers.reward_model import read_pair


@dataclass
class Config:
    stage: str = ""  # rlhf, ifrl, mathrl, coderl, swerl, or the name of your copy of one
    data: str = ""  # rows that the stage reads; for rlhf also preference pairs
    flags: str = ""  # flags of the stage that change its reward: "--rm=out/rm --think"
    limit: PositiveInt = 500  # rows that are read, from the start of the data
    rows: PositiveInt = 100  # of these, drawn at random, are answered
    shown: int = 3  # answers that are printed of each kind that is paid by mistake
    seed: int = 0  # of the draw


# ---- 1. Rows of a stage --------------------------------------------------------------------------
def load_stage(cfg, out_dir):
    """(the stage's module, its Config): its defaults, with cfg.data and cfg.flags."""
    try:
        stage = importlib.import_module(cfg.stage)
        stage.Config, stage.load_rows, stage.make_reward  # noqa: B018  is each of them there?
    except (ModuleNotFoundError, AttributeError, ValueError):
        fail(f"--stage={cfg.stage}: no RL stage of that name.", note="Nothing was judged.")
    given = [f"--data={cfg.data}", f"--out_dir={out_dir}", *shlex.split(cfg.flags)]
    names = {field.name for field in fields(stage.Config)}
    # Short prompts are judged, too. The stage's own lines of a step are not printed.
    for name in {"min_prompt_tokens", "sample_every"} & names:
        given.insert(0, f"--{name}=0")
    stage_cfg = stage.Config(**vars(make_parser(stage.Config).parse_args(given)))
    if "rm_data" in names and not stage_cfg.rm:
        fail("--flags: --rm=FOLDER or URL, the reward model, is missing.", "Nothing was judged.")
    return stage, stage_cfg


def load_rows(stage, stage_cfg, cfg):
    """Rows of the data, as the stage reads them. Preference pairs keep their two answers."""
    [(_, first)] = read_rows(cfg.data, limit=1) or [("", {})]
    if "rm_data" in vars(stage_cfg) and isinstance(first, dict) and is_pair(first):

        def normalize(row, where):
            context, chosen, rejected = read_pair(row, where)
            return {"messages": context, "think": False, "chosen": chosen, "rejected": rejected}

        return load_table(cfg.data, normalize, cfg.limit)
    return stage.load_rows(stage_cfg, limit=cfg.limit)


def is_pair(row):
    """Whether a raw row holds two answers, of which one is preferred."""
    return "chosen" in row or "overall_preference" in row


# ---- 2. Answers of known worth -------------------------------------------------------------------
THOUGHT = "Let me work it out, one step after another."
# "First we write the conditions down, then we check the result with care", in Chinese.
CHINESE = (
    "\u6211\u4eec\u5148\u5199\u4e0b\u6761\u4ef6\uff0c\u7136"
    "\u540e\u4ed4\u7ec6\u68c0\u67e5\u7ed3\u679c\u3002"
) * 6
HEDGE = "It may be so, and it may be otherwise; that depends, and both can be right."


def box(answer):
    return "\\boxed{" + answer + "}"


def changed(gold):
    """Another answer that looks like this one: every digit is one more."""
    other = re.sub(r"\d", lambda digit: str((int(digit[0]) + 1) % 10), gold)
    return other if other != gold else gold + "1"


def math_answers(row, other):
    """{kind: answer} to a row with a gold answer. other: another row."""
    gold, wrong = str(row["answer"]), changed(str(row["answer"]))
    answers = {
        "gold": box(gold),
        "corrupted gold": box(wrong),
        "gold without a box": f"The answer is {gold}.",
        "hedge: both in one box": box(f"{gold} \\text{{ or }} {wrong}"),
        "hedge: a list in one box": box(f"{gold}, {wrong}"),
        "hedge: two boxes, gold first": f"{box(gold)} or {box(wrong)}",
    }
    if str(other["answer"]) != gold:
        answers["gold of another row"] = box(str(other["answer"]))
    return answers


def code_answers(row, other):
    """{kind: answer} to a row with tests. other: another row."""
    tests = row["tests"]
    gold = in_block(programs.table_program(tests))
    spoiled = in_block(programs.table_program(tests, spoil=True))
    name, output = tests["fn_name"], tests["outputs"][0]
    if name:
        constant = f"import json\ndef {name}(*args): return json.loads({output!r})"
        exits = f"def {name}(*args): raise SystemExit(0)"
    else:
        constant = f"print({output!r})"
        exits = "raise SystemExit(0)"
    answers = {
        "gold": gold,
        "corrupted gold": spoiled,
        "exits at once": in_block(exits),
        "hedge: two blocks, gold first": f"{gold}\n\nOr:\n\n{spoiled}",
        "gold of another row": in_block(programs.table_program(other["tests"])),
    }
    if len(set(tests["outputs"])) > 1:
        answers["one output for all tests"] = in_block(constant)
    if row["solution"]:
        answers["reference solution"] = in_block(row["solution"])
    return answers


def in_block(code):
    return programs.fenced(code).removeprefix("</think>").strip()


def patch_answers(row, other):
    """{kind: answer} to a row with a golden patch. other: another row."""
    files = row["files"]
    golden = patches.apply_patch(row["golden_patch"], files)
    path = next(path for path in patches.changes(files, golden) if golden.get(path))
    worse = {**golden, path: golden[path].rstrip("\n") + "\nraise SystemExit\n"}
    same = {**files, path: files.get(path, "").rstrip("\n") + "\n# Repaired.\n"}
    new = {**golden, "notes.txt": "The repair of the issue.\n"}
    return {
        "gold": edits(files, golden),
        "corrupted gold": edits(files, worse),
        "only a comment": edits(files, same),
        "hedge: gold and a new file": edits(files, new),
        "gold of another row": edits(
            other["files"], patches.apply_patch(other["golden_patch"], other["files"])
        ),
    }


def edits(files, after):
    """The blocks of a response whose edits lead from `files` to `after`."""
    return patches.as_response(files, after).removeprefix("</think>").strip()


def chat_answers(row, other):
    """{kind: answer} to a prompt, or to a preference pair. other: another row."""
    answers = {
        "hedge": HEDGE,
        "one word": "Yes.",
        "one word, 200 times": "yes " * 200,
    }
    if "chosen" in row:
        answers = {"gold": row["chosen"], "corrupted gold": row["rejected"], **answers}
        answers["gold of another row"] = other["chosen"]
    return answers


def answers_of(row, other):
    """{kind: answer} by what the row holds."""
    if "answer" in row:
        return math_answers(row, other)
    if "tests" in row and "files" not in row:
        return code_answers(row, other)
    if "golden_patch" in row:
        return patch_answers(row, other)
    return chat_answers(row, other)


def responses(row, other):
    """[(kind, whole response, finish reason)] to a row, thoughts included where it thinks."""
    prompt = row["messages"][-1]["content"]
    answers = answers_of(row, other)
    gold = answers.get("gold", "")
    answers |= {"empty": "", "copied prompt": prompt}
    found = [(kind, with_thought(row, THOUGHT, text), "stop") for kind, text in answers.items()]

    # A gold that is cut off; without a gold, an answer that does not end.
    long = gold or HEDGE * 20
    found.append(("over-long: cut off", with_thought(row, THOUGHT, long), "length"))
    if row["think"]:
        unclosed = f"<think>\n{THOUGHT}\n\n{gold or HEDGE}"
        found.append(("thought not closed", unclosed, "stop"))
    # A thought in another language, or, without a thought, such an answer.
    if not language_ok(prompt, CHINESE):
        foreign = gold if gold and row["think"] else CHINESE
        found.append(("other language", with_thought(row, CHINESE, foreign), "stop"))
    return found


def with_thought(row, thought, answer):
    """The text that a policy would sample: its thought, where the row is in think mode, and this
    answer."""
    return f"<think>\n{thought}\n</think>\n\n{answer}" if row["think"] else answer


# ---- 3. Judge and print --------------------------------------------------------------------------
def judge(rows, hook):
    """{kind: [(index of the row, rollout)]}: every answer to every row, with the stage's reward."""
    submit, collect = hook
    by_kind = {}
    rollouts = []
    for i, row in enumerate(rows):
        other = rows[(i + 1) % len(rows)]
        for kind, text, finish_reason in responses(row, other):
            # A group of its own for each: rules about a whole group must not mix the kinds.
            rollout = Rollout(row, len(rollouts), [], seed=0, text=text)
            rollout.finish_reason = finish_reason
            rollouts.append(rollout)
            by_kind.setdefault(kind, []).append((i, rollout))
            submit(rollout)
    collect(rollouts)
    return by_kind


def table(by_kind):
    """(lines of the table, {kind: rollouts that are paid by mistake})."""
    golds = {i: r.reward for i, r in by_kind.get("gold", []) if r.status != "infra"}
    most = max(golds.values(), default=0.0)
    # What an empty answer to a row earns: no more than that is no pay.
    nothing = {i: r.reward for i, r in by_kind["empty"] if r.status != "infra"}
    lines = [f"{'kind':30s} {'rows':>5s} {'mean reward':>12s} {'paid as gold':>13s}  status"]
    mistakes = {}
    for kind, judged in by_kind.items():
        known = [(i, r) for i, r in judged if r.status != "infra"]
        statuses = Counter(r.status for _, r in judged).most_common()
        share = ", ".join(f"{status} {count / len(judged):.0%}" for status, count in statuses)
        mean = statistics.fmean(r.reward for _, r in known) if known else float("nan")
        # A gold has to earn the most that any gold earns, another answer less than its row's gold.
        # A reward model's scores compare only within a row.
        is_gold = kind in ("gold", "reference solution")
        fixed = is_gold and "chosen" not in judged[0][1].row
        as_gold, below = [], []
        for i, r in known:
            wanted = most if fixed else golds.get(i, math.inf)
            more_than_nothing = kind == "empty" or r.reward > nothing.get(i, -math.inf)
            if r.reward >= wanted and more_than_nothing:
                as_gold.append(r)
            else:
                below.append(r)
        mistakes[kind] = below if is_gold else as_gold
        paid = f"{len(as_gold) / len(known):.1%}" if golds and known else "-"
        lines.append(f"{kind:30s} {len(judged):5d} {mean:12.3f} {paid:>13s}  {share}")
    return lines, mistakes


def show(mistakes, shown):
    """Print some answers of each kind that are paid otherwise than they deserve."""
    for kind, rollouts in mistakes.items():
        for r in rollouts[:shown]:
            prompt = r.row["messages"][-1]["content"]
            _, _, answer = r.text.rpartition("</think>")
            print(f"{kind} earns {r.reward:g} ({r.status}): {answer.strip()[:100]!r}")
            print(f"  prompt: {prompt[-100:]!r}")


def main(cfg):
    with tempfile.TemporaryDirectory() as out_dir:
        stage, stage_cfg = load_stage(cfg, out_dir)
        # Reward workers come first: they are forked while this process is still small.
        hook = stage.make_reward(stage_cfg)
        rows = load_rows(stage, stage_cfg, cfg)
        rows = random.Random(cfg.seed).sample(rows, min(cfg.rows, len(rows)))
        by_kind = judge(rows, hook)
    lines, mistakes = table(by_kind)
    print(f"{cfg.stage} on {len(rows)} rows of {cfg.data}")
    print("\n".join(lines), flush=True)
    show(mistakes, cfg.shown)


if __name__ == "__main__":
    from lib.common import finish

    main(parse_config(Config))
    finish()

"""SWE RL: stage 6 of the cascade (paper 4.7). Agentless repair: the reward runs no program.

The prompt holds an issue and whole files, and the answer is a list of SEARCH/REPLACE edits. A row
that brings the paper's prompt with its files, as NVIDIA's set does, is asked that prompt.

Reward (paper eq. 2): -1 if the edits do not parse or apply, 1 if they make exactly the golden
change, 0 if they change nothing, else a judge's P(YES): its probability that the issue is resolved.
Prompts grow over two runs: 16K, 24K tokens (run_cascade.sh).

    torchrun --nproc_per_node=8 swerl.py --init_from=out/coderl/final --out_dir=out/swerl

Deviations from the paper, numbered as in docs/paper.md: D20 without --judge=http://judge:8000/v1
the judge is lexical similarity; D21 what else earns -1; D22 comments and layout are no change; D23
files are fitted into the prompt by their characters; D31 a file that no longer parses earns -1; D32
a candidate on which the judge falls silent is a NO; D38 a row's own prompt comes first; D39 prompts
are in our own words.
"""

import json
import math
import os
import posixpath
import random
import re
import statistics
import subprocess
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch

from engine import Rollout, make_engine, request_seed, sampler_correction  # keep copies beside it
from lib.chats import as_messages
from lib.check import end_before_training
from lib.checkpoint import load_checkpoint, load_policy, lock, mark_final, save_checkpoint
from lib.common import (
    all_reduce,
    average_gradients,
    finish,
    micro_batches,
    print0,
    start_run,
    whole_groups,
)
from lib.data import BadRow, first_nonempty, load_table, required_field
from lib.flags import Beta, PositiveFloat, PositiveInt, RolloutFlags, Share, TopP, parse_config
from lib.guard import check_step, fail
from lib.logs import Logger, console_line, show_sample, summarize
from lib.optimizer import make_optimizer
from lib.packing import collate
from lib.progress import counted
from lib.prompts import (
    check_same_rows,
    encode_prompts,
    load_history,
    longest_first,
    next_prompts,
    prompts_checksum,
    remember,
    shuffled,
)
from verifiers import sandbox
from verifiers.patch_effect import only_removes, same_code, stops_parsing
from verifiers.patch_judge import ask_judge
from verifiers.patches import (
    BLOCK,
    NoPatch,
    apply_edits,
    apply_patch,
    as_patch,
    as_response,
    changes,
    edited,
    similarity,
    thought_end,
)
from verifiers.pool import in_background


# ---- 1. Config -----------------------------------------------------------------------------------
@dataclass
class Config(RolloutFlags):  # engine, memory, checkpoints, time limits: lib/flags.py
    init_from: str = "out/coderl/final"  # checkpoint of the stage before, or any Qwen3 folder
    out_dir: str = "out/swerl"  # checkpoints and the log; an interrupted run resumes from it
    data: str = "nvidia/Nemotron-Cascade-RL-SWE"  # hub id, folder, parquet, .json or .jsonl
    # folder of git clones named owner__name, for rows that come without files: SWE-Gym,
    # SWE-rebench, SWE-smith
    repos: str = ""
    # held-out rows in the same schemas, whose "tests" are run on the patched program; "": no
    # held-out metric
    eval_data: str = ""
    seed: int = 0  # of sampling and of the order of prompts

    # share of prompts that also show files that the golden patch leaves alone; the paper mixes
    # prompts with and without such files (4.7.1; G13)
    noisy_share: Share = 0.5
    max_files: PositiveInt = 5  # a prompt that shows such files shows at most so many in all
    chars_per_token: PositiveFloat = 3.0  # characters of code a token has, a low estimate [D23]
    min_prompt_tokens: int = 8192  # shorter prompts are dropped at load; paper 4.7.1

    prompts_per_step: PositiveInt = 128  # prompts (groups) per step, over all ranks; paper T20
    group_size: PositiveInt = 16  # completions per prompt (G); paper T20
    num_steps: PositiveInt = 30  # then 30 more with 24K prompts; paper T20
    max_prompt_tokens: PositiveInt = 16384  # 16K, then 24K; longer prompts are dropped at load
    max_new_tokens: PositiveInt = 16384  # 16K in both runs
    rope_factor: float = 0.0  # YaRN factor, 2.0 above 32K tokens; 0: as in the checkpoint
    temperature: PositiveFloat = 1.0  # of sampling and of the loss; paper T20
    top_p: TopP = 0.95  # of sampling only (G4)
    top_k: int = 0  # of sampling only; 0: off
    # completions that are cut off are not trained on (G5); false in the 24K run, where they
    # earn -1
    overlong_filter: bool = True

    lr: PositiveFloat = 2.5e-6  # learning rate of AdamW; paper T20
    final_lr: Share = 1.0  # last learning rate as a fraction of lr, linear decay (G2)
    warmup_steps: int = 0  # steps of linear warm-up of the learning rate
    beta1: Beta = 0.9  # of AdamW
    beta2: Beta = 0.95  # of AdamW
    weight_decay: float = 0.01  # of AdamW; not stated in the paper (G3)
    grad_clip: PositiveFloat = 1.0  # most norm of the gradient; not stated in the paper (G3)
    importance_limit: float = 0.0  # off if 0; Cascade 2 takes 2 (engine.sampler_correction)

    judge: str = "lexical"  # or the URL of an OpenAI-compatible endpoint, ending in /v1
    judge_model: str = "moonshotai/Kimi-Dev-72B"  # the endpoint's model; paper 4.7.2
    # the lexical judge pays 0 below this similarity, since near misses share most of their text
    # with the golden patch; paper T12
    lexical_floor: Share = 0.5
    reward_workers: PositiveInt = 16  # threads per rank that wait for the endpoint
    eval_every: int = 10  # steps between held-out metrics; 0: never
    eval_rows: int = 100  # held-out rows, one sample each


# ---- 2. Data -------------------------------------------------------------------------------------
EXAMPLE = BLOCK.format(
    path="path/of/the/file.py",
    old="lines as they stand in the file, indentation included, enough of them to occur only once",
    new="lines that take their place",
)
# The question in our own words [D39].
PROMPT = f"""An issue was filed against a repository. Repair the code.

--- ISSUE ---
{{issue}}
--- END OF ISSUE ---

These files are part of the repository:

{{files}}

First work out where the fault is, then write the edits that remove it. \
Each edit is one block of this form:

```diff
{EXAMPLE}
```

Write as many blocks as the repair needs, and leave tests alone."""
# Some sets wrap the issue in a prompt of their own.
ISSUE = re.compile(r"<issue>(.*?)</issue>|-+ ?BEGIN ISSUE ?-+(.*?)-+ ?END ISSUE ?-+", re.S)


def normalize(row, where, cfg):
    """One row of any known set -> messages, think, issue, files, golden_patch. BadRow drops it.

    files: {path: text} before the repair, those that the prompt shows. A row with "tests" keeps
    them for the held-out metric.
    """
    issue = find_issue(row, where)
    if not issue:
        raise BadRow("no issue text")
    # Each row draws its files by itself, so that dropping one row changes no other.
    draw = random.Random(f"{cfg.seed} {row.get('instance_id')} {row.get('golden_patch')}")
    try:
        files, patch = source_files(row, where, cfg, draw)
        golden_diffs = changes(files, apply_patch(patch, files))
    except (NoPatch, BadRow) as error:
        raise BadRow(str(error))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BadRow("file contents or patch cannot be read")
    if not golden_diffs:
        raise BadRow("golden patch changes nothing")

    # Files that the golden patch creates are not there to be shown.
    golden = [path for path in golden_diffs if path in files]
    messages, shown = own_prompt(row, files, golden)  # [D38]
    is_own = bool(messages)
    if not is_own:
        shown = choose_files(files, golden, cfg, draw)
        listing = "\n\n".join(f"### {path}\n```\n{text}\n```" for path, text in shown.items())
        prompt = PROMPT.format(issue=issue, files=listing)
        messages = [{"role": "user", "content": prompt}]
    length = sum(len(turn["content"]) for turn in messages)
    if length < cfg.min_prompt_tokens * cfg.chars_per_token:
        raise BadRow("prompt shorter than min_prompt_tokens")
    normal = {
        "messages": messages,
        "think": True,
        "own_prompt": is_own,
        "issue": issue,
        "files": shown,
        "instance_id": str(row.get("instance_id", "")),
        "golden_patch": patch,
    }
    tests = row.get("tests")
    if tests:
        normal["tests"] = json.loads(tests) if isinstance(tests, str) else tests
    return normal


def find_issue(row, where):
    """The text of a row's issue, without the prompt that a set may have wrapped around it."""
    name = first_nonempty(row, "original_prompt", "problem_statement", "prompt")
    messages = as_messages(required_field(row, where, name, (str, list)), name)
    issue = messages[-1]["content"] if messages else ""
    if match := ISSUE.search(issue):
        issue = match[match.lastindex]  # the text between the marks, of either kind
    return issue.strip()


def own_prompt(row, files, golden):
    """(chat turns, {path: text} of the files that they show) of a row that brings its own prompt.

    NVIDIA's set does: `prompt` holds the paper's question (C.2) with its files, and the bare issue
    stands in a field of its own. Returns ([], {}) for a row without one, and for a prompt that does
    not show the whole text of every file that the golden patch changes.
    """
    if not (row.get("original_prompt") or row.get("problem_statement")) or not row.get("prompt"):
        return [], {}
    turns = [
        {"role": turn["role"], "content": turn["content"]} for turn in as_messages(row["prompt"])
    ]
    text = "\n".join(turn["content"] for turn in turns)
    shown = {path: code for path, code in files.items() if code.strip() and code.strip() in text}
    if turns[-1]["role"] != "user" or not set(golden) <= set(shown):
        return [], {}
    return turns, shown


def source_files(row, where, cfg, draw):
    """(files before the repair as {path: text}, golden patch) of a row of any known set."""
    if "golden_patch" in row or "relevant_file_contents" in row:
        patch = required_field(row, where, "golden_patch")
        contents = required_field(row, where, "relevant_file_contents", (str, list, dict))
        return read_files(contents), patch
    if row.get("parsed_commit_content"):
        return read_commit(row["parsed_commit_content"])
    return read_clone(row, where, cfg, draw)


def read_files(contents):
    """{path: text} from a list of {"file_path", "content"} or from {path: text}, or JSON of one."""
    if isinstance(contents, str):
        contents = json.loads(contents)
    if isinstance(contents, list):
        contents = {file["file_path"]: file["content"] for file in contents}
    files = {}
    for path, text in contents.items():
        if isinstance(text, str):
            files[posixpath.normpath(path)] = text
    return files


def read_commit(parsed_commit):
    """(files, golden patch) from R2E-Gym's JSON, which has every changed file before and after."""
    diffs = {}
    for diff in json.loads(parsed_commit)["file_diffs"]:
        path = diff["header"]["file"]["path"]
        if not TESTS.search(path):
            diffs[path] = diff
    before = {path: diff["old_file_content"] or "" for path, diff in diffs.items()}
    after = {path: diff["new_file_content"] or "" for path, diff in diffs.items()}
    return before, as_patch(before, after)


def read_clone(row, where, cfg, draw):
    """(files, golden patch) of a row without file contents, which are read from a git clone.

    The files are those that the patch changes, and at most max_files others beside them.
    """
    patch = required_field(row, where, "patch")
    name = required_field(row, where, "repo").replace("/", "__")
    commit = row.get("base_commit") or "HEAD"
    clone = os.path.join(cfg.repos, name)
    # The row is somebody's data: its names are checked before they become a path or an argument.
    usable = (
        cfg.repos
        and os.path.isdir(clone)
        and re.fullmatch(r"[\w.-]*\w", name)
        and re.fullmatch("HEAD|[0-9a-f]{7,40}", commit)
    )
    if not usable:
        raise BadRow("no file contents, and no clone owner__name of its repository in --repos")

    # The files that the patch changes, and a draw of the Python files in the same folders.
    changed = re.findall(r"^--- a/(\S+)", patch, re.M)
    folders = sorted({posixpath.dirname(path) + "/" for path in changed} - {"/"})
    listed = git(clone, "ls-tree", "--name-only", commit, "--", *folders).split("\n")
    beside = sorted(path for path in set(listed) - set(changed) if path.endswith(".py"))
    beside = draw.sample(beside, min(len(beside), cfg.max_files))
    files = {path: git(clone, "show", f"{commit}:{path}") for path in changed + beside}
    if row.get("base_commit"):
        return files, patch
    # SWE-smith names no commit. Its patch puts the fault into sound code, so the repair is the
    # way back.
    broken = apply_patch(patch, files)
    return broken, as_patch(broken, files)


def git(clone, *args):
    """What a git command in this clone prints. Nothing if it fails."""
    command = ["git", "-C", clone, *args]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    return done.stdout


def choose_files(files, golden, cfg, draw):
    """The files that a prompt shows, {path: text} in random order (paper 4.7.1).

    golden: the paths that the golden patch changes. They are always shown; a noisy_share of the
    prompts also shows others, drawn one by one while they fit.
    """
    # Room for text, in characters, since there is no tokenizer yet [D23].
    room = cfg.max_prompt_tokens * cfg.chars_per_token - sum(len(files[path]) for path in golden)
    if room < 0:
        raise BadRow("the files to change alone exceed max_prompt_tokens")
    shown = list(golden)
    others = sorted(set(files) - set(golden))
    draw.shuffle(others)
    if draw.random() >= cfg.noisy_share:
        others = []
    for path in others:
        room -= len(files[path])
        if room < 0 or len(shown) >= cfg.max_files:
            break
        shown.append(path)
    # The order must not tell which files are golden.
    draw.shuffle(shown)
    return {path: files[path] for path in shown}


def load_rows(cfg, path=None, limit=0):
    """Rows of cfg.data (or path) in the normal form; what was dropped is printed by reason."""
    path = path or cfg.data

    def normalize_row(row, where):
        return normalize(row, where, cfg)

    rows = load_table(path, normalize_row, limit, cfg.ignore_fields)
    num_own = sum(row["own_prompt"] for row in rows)
    if num_own:
        print0(f"data {path}: {num_own} of {len(rows)} prompts are the rows' own, the others ours")
    return rows


def select_rows(rows, epoch, history, cfg):
    """Indices of this epoch's rows, in order: all of them."""
    return shuffled(range(len(rows)), cfg.seed, epoch)


# ---- 3. Reward -----------------------------------------------------------------------------------
# Files of tests and of continuous integration, by their paths.
TESTS = re.compile(
    r"(^|/)("
    r"(tests?|testing|\.github|\.circleci)/"  # anything in such a folder
    r"|("
    r"test_[^/]*"  # test_cart.py
    r"|[^/]*(_test\.\w+|\.(test|spec)\.[jt]sx?)"  # cart_test.go, cart.spec.ts
    r"|conftest\.py"
    r"|(tox|pytest)\.ini"
    r")$)"
)
# An app of Django keeps its tests in such a file, but in other repositories it can be code. So it
# is a test only where the golden patch leaves it alone.
DJANGO_TESTS = re.compile(r"(^|/)tests?\.py$")


def verdict(response, files, golden_patch, judge=None):
    """(reward, reason) of a response (paper eq. 2).

    judge(files, predicted, oracle) returns P(YES); without one, lexical_judge is asked. The three
    are {path: text}: before the repair, after the edits of the response, after the golden patch.
    The reason is "exact" (reward 1), "unchanged" (0), "judged", or says why the reward is -1.
    """
    oracle = apply_patch(golden_patch, files)
    # -1: the edits do not parse or do not apply.
    try:
        predicted = edited(response, files)
    except NoPatch as error:
        return -1.0, str(error)
    predicted_diffs = changes(files, predicted)
    golden_diffs = changes(files, oracle)
    # -1: a file that the golden patch leaves alone is touched, and it is new or a test [D21].
    for path in predicted_diffs:
        if path in golden_diffs:
            continue
        if path not in files:
            return -1.0, "new file"
        if TESTS.search(path) or DJANGO_TESTS.search(path):
            return -1.0, "test or CI file"

    if predicted_diffs == golden_diffs:
        return 1.0, "exact"
    # -1: a Python file that could be read before, and after the golden patch, no longer can [D31].
    for path in predicted_diffs:
        before, golden = files.get(path, ""), oracle.get(path, "")
        if stops_parsing(path, before, predicted[path]) and not stops_parsing(path, before, golden):
            return -1.0, "no longer parses"
    # 0: nothing changes, or only comments and layout [D22].
    if all(same_code(path, files.get(path, ""), predicted[path]) for path in predicted_diffs):
        return 0.0, "unchanged"
    if not callable(judge):
        judge = lexical_judge
    return float(judge(files, predicted, oracle)), "judged"


def reward(response, files, golden_patch, judge=None):
    """-1 ... 1 (paper eq. 2). judge(files, predicted, oracle) -> P(YES); None: lexical_judge."""
    return verdict(response, files, golden_patch, judge)[0]


def lexical_judge(files, predicted, oracle, floor=0.5):
    """Similarity of a response's change to the golden one, 0 below the floor [D20]."""
    # Removing the faulty line is no repair, but its similarity alone would be 0.9.
    if only_removes(files, predicted, oracle):
        return 0.0
    value = similarity(files, predicted, oracle)
    return value if value >= floor else 0.0


def judge_rollout(rollout, cfg):
    """(reward, status, reason, mass) of a rollout. One that is cut off is no patch.

    mass: the endpoint's P(YES) + P(NO), which is near 1 if it understands the question; 0 if it
    was not asked.
    """
    row = rollout.row
    if rollout.finish_reason == "length":
        return -1.0, "no_answer", "truncated", 0.0
    if row["think"] and thought_end(rollout.text) is None:
        return -1.0, "no_answer", "thinking not closed", 0.0

    mass = 0.0

    def judge(files, predicted, oracle):
        nonlocal mass
        if cfg.judge == "lexical":
            return lexical_judge(files, predicted, oracle, cfg.lexical_floor)
        p_yes, mass = ask_judge(cfg.judge, cfg.judge_model, row["issue"], files, predicted, oracle)
        return p_yes

    try:
        value, reason = verdict(rollout.text, row["files"], row["golden_patch"], judge)
    except OSError:
        # The endpoint answers nothing at all. That is no fault of the rollout: it is masked.
        return 0.0, "infra", "no judgement", mass
    status = {-1.0: "no_answer", 1.0: "ok"}.get(value, "wrong")
    return value, status, reason, mass


LEXICAL_THREADS = 4  # threads per rank that compute similarity


def make_reward(cfg):
    """(submit, collect): start a rollout's verdict in the background; wait for all verdicts."""
    if cfg.eval_data:
        # The held-out metric runs programs: a host that cannot hold them says so before training.
        sandbox.run("pass")
    # Many threads can wait for an endpoint. Similarity is computed here, and its threads take turns
    # with the sampler, so they are few.
    num_threads = cfg.reward_workers
    if cfg.judge == "lexical":
        num_threads = min(num_threads, LEXICAL_THREADS)

    def judge(rollout):
        return judge_rollout(rollout, cfg)

    pool = ThreadPoolExecutor(num_threads)
    return in_background(pool, judge, ("reward", "status", "reason", "mass"))


# The reasons that the log counts by themselves; any other counts as "other".
REASONS = (
    "exact",
    "judged",
    "unchanged",
    # From here on, reasons for -1.
    "truncated",
    "thinking not closed",
    "no block",
    "block not closed",
    "text not found",
    "text found more than once",
    "blank search text",
    "unknown file",
    "new file",
    "test or CI file",
    "no longer parses",
)


def monitor(rollouts):
    """This stage's numbers for the log, as shares of all rollouts.

    Every reason has its share. p_yes and p_yes_or_no are the judge's P(YES) and P(YES) + P(NO),
    summed over the judged rollouts and divided by the number of all, as a share is.
    """
    counts = Counter(r.reason if r.reason in REASONS else "other" for r in rollouts)
    judged = [r for r in rollouts if r.reason == "judged"]
    n = max(len(rollouts), 1)
    shares = {name.replace(" ", "_"): counts[name] / n for name in (*REASONS, "other")}
    shares["p_yes"] = sum(r.reward for r in judged) / n
    shares["p_yes_or_no"] = sum(r.mass for r in judged) / n
    return shares


def self_test(rows, cfg):
    """Before training: golden patches earn 1, with a bad line less than 1, plain prose -1.

    If the judge is an endpoint, it has to answer a question.
    """
    # A file that has the marks of an edit in its own text cannot be searched by an edit.
    marks = re.compile(r"^(<<<<<<< SEARCH|>>>>>>> REPLACE)", re.M)
    plain = [row for row in rows if not any(map(marks.search, row["files"].values()))]
    for row in random.Random(cfg.seed).sample(plain, min(16, len(plain))):
        files = row["files"]
        oracle = apply_patch(row["golden_patch"], files)
        path = next(iter(changes(files, oracle)))
        worse = {**oracle, path: oracle[path].rstrip("\n") + "\nraise SystemExit\n"}
        texts = (as_response(files, oracle), as_response(files, worse), "</think> It is fixed.")
        golden, corrupted, prose = [reward(text, files, row["golden_patch"]) for text in texts]
        if not (golden == 1 and corrupted < 1 and prose == -1):
            fail(
                f"reward self test: golden, corrupted and no patch of {path} "
                f"earn {[golden, corrupted, prose]}, not 1, less and -1."
            )
    if cfg.judge == "lexical":
        return
    # Ask about a golden patch itself, so that a dead endpoint is found before anything is trained.
    issue, files = rows[0]["issue"], rows[0]["files"]
    oracle = apply_patch(rows[0]["golden_patch"], files)
    try:
        p_yes, mass = ask_judge(cfg.judge, cfg.judge_model, issue, files, oracle, oracle)
    except OSError as error:
        fail(f"--judge={cfg.judge}: {error}.")
    print0(f"judge: a golden patch itself is P(YES) {p_yes:.2f}, P(YES) + P(NO) {mass:.2f}")


# ---- 4. Eval -------------------------------------------------------------------------------------
def metric(rollout):
    """1.0 if a held-out rollout repairs the program, else 0.0; None if the sandbox failed.

    The patched program has to pass the row's tests. Without tests, or if the golden patch does not
    change exactly one Python file, the change has to be the golden one.
    """
    row = rollout.row
    if row["think"] and thought_end(rollout.text) is None:
        return 0.0
    files = apply_edits(rollout.text, row["files"])
    golden_diffs = changes(row["files"], apply_patch(row["golden_patch"], row["files"]))
    programs = [path for path in golden_diffs if path.endswith(".py")]
    if files is None:
        return 0.0
    tests = row.get("tests", {})
    if not tests.get("inputs") or len(programs) != 1:
        return float(changes(row["files"], files) == golden_diffs)
    import coderl  # its sandboxed runner is needed here only

    # A program that only the golden patch makes is missing after other edits.
    program = files.get(programs[0], "")
    verdicts = coderl.run_tests(program, tests, tests.get("time_limit") or 6.0, stop=True)
    if verdicts[-1] == "infra":
        return None
    return float(verdicts[-1] == "ok")


# ~~~~~~~~ waterline: below it all RL stages are the same, line for line (tests/test_stage_diff.py)
# ---- 5. GRPO -------------------------------------------------------------------------------------
# A micro-batch is packed: whole sequences, one after another, without padding. Take the prompt
# [5, 6] and two rollouts: completion [7, 8], advantage 0.7; completion [9], advantage -0.7.
#
#     t               0    1    2    3    4    5    6
#     input_ids_T     5    6    7    8    5    6    9       T = 7 tokens
#     cu_seqlens      0                   4              7  starts of the sequences, and the end
#     loss_index                2    3              6       M = 3 completion tokens
#     advantages_T    0    0  0.7  0.7    0    0 -0.7       zero at prompt tokens
#     copy_T          0    1    2    3    0    1    4       an entry of first_U, see below
#
# Entry t of every _T tensor is about token t: logprobs_T[t] is its log-prob given the tokens before
# it. _M tensors run over loss_index. Rollouts of one prompt share its tokens, so the model computes
# U = 5 tokens, those at first_U = [0, 1, 2, 3, 6]. The result of token t is that of the token at
# first_U[copy_T[t]]: for token 4, the second 5, that is token 0.


def rollout(engine, rows, indices, step, state, cfg, reward_hook, rank, world):
    """Sample a group of completions for each prompt; verify them; set advantages.

    indices: rows of this step's prompts. state: of the run (lib/prompts.py). reward_hook: submit(r)
    starts the verdict of a rollout in the background, collect waits for all and sets reward and
    status of each. Returns (for_update, sampled): this rank's rollouts for train_step and those for
    the log. They are the same but in IF-RL, whose dynamic sampling (4.4.2) replaces some groups.
    """
    submit, collect = reward_hook
    # A group is the group_size rollouts of one prompt. Seeds follow from the prompt's place in
    # indices and the sample, so that completions do not depend on ranks.
    rollouts = []
    for group, index in enumerate(indices):
        prompt_ids = rows[index]["prompt_ids"]
        for sample in range(cfg.group_size):
            seed = request_seed(cfg.seed, step, 0, group, sample)
            rollouts.append(Rollout(rows[index], group, prompt_ids, seed, sample))
    # Ranks take turns, so that the samples of a prompt with long answers are spread over them.
    rollouts = longest_first(rollouts, state)[rank::world]

    # Sample. The moment a completion ends, its verifier starts, while the others still decode.
    sampling = (cfg.max_new_tokens, cfg.temperature, cfg.top_p, cfg.top_k)
    with counted(submit, f"step {step} rollout", len(rollouts)) as finished:
        engine.generate(rollouts, *sampling, on_finished=finished)
        # Verify: most verdicts are there by now, collect waits for the rest.
        collect(rollouts)

    compute_advantages(whole_groups(rollouts), cfg)
    return rollouts, rollouts


def compute_advantages(rollouts, cfg):
    """advantage = (reward - mean) / (std + 1e-6) inside each group (paper eq. 1; G1).

    Rollouts without a verdict (make_reward's hook says "infra" where a worker failed), and
    truncated ones under overlong_filter, are left out of the loss, its denominator and the group
    statistics (G5).
    """
    for first in range(0, len(rollouts), cfg.group_size):
        group = rollouts[first : first + cfg.group_size]
        assert len({r.group for r in group}) == 1, "a group was torn apart"
        for r in group:
            infra = r.status == "infra"
            filtered = cfg.overlong_filter and r.finish_reason == "length"
            assert infra or math.isfinite(r.reward), f"reward {r.reward} in group {r.group}"
            r.in_loss = not infra and not filtered
        rewards = [r.reward for r in group if r.in_loss]
        # A rollout that is left alone has nothing to be compared with, so it leaves the loss, too.
        # A group of equal rewards stays in the denominator, with advantage 0. Compare the rewards:
        # by rounding, the std of equal ones can be 1e-17, and dividing by it would invent a signal.
        all_equal = len(rewards) < 2 or max(rewards) == min(rewards)
        for r in group:
            r.in_loss = r.in_loss and len(rewards) > 1
            r.advantage = 0.0
        if all_equal:
            continue
        mean = statistics.fmean(rewards)
        std = statistics.stdev(rewards)  # unbiased: divided by n - 1
        for r in group:
            if r.in_loss:
                r.advantage = (r.reward - mean) / (std + 1e-6)


def grpo_loss(logprobs_T, old_logprobs_T, batch, counts, cfg):
    """-(sum of ratio * advantage over this micro-batch's completion tokens) / counts["tokens"].

    Token-level policy gradient, paper eq. 1. The denominator is the number of completion tokens of
    the whole batch, on all ranks (6.3; G8), so the result does not depend on how the batch was cut.
    """
    scored_M = batch["loss_index"]
    advantages_M = batch["advantages_T"][scored_M]
    # One update per batch (4.1.2): the caller passes these log-probs, detached, as the old ones.
    # (The sampler's serve only the correction below.) exp(x - x.detach()) is 1, so PPO's clip
    # would never act, and its gradient is that of x: this is REINFORCE with the group's mean as
    # the baseline.
    ratio_M = (logprobs_T - old_logprobs_T)[scored_M].exp()
    # Sampler and trainer differ by rounding. With importance_limit, a token weighs exp(trainer -
    # sampler log-prob), or 0 beyond the limit. Off: every token weighs 1.
    weights_M = sampler_correction(old_logprobs_T, batch, cfg.importance_limit)
    return -(weights_M * (ratio_M * advantages_M)).sum() / counts["tokens"]


def train_step(model, optimizer, rollouts, cfg, device, world):
    """One gradient update from the rollouts of all ranks; returns the metrics."""
    # The denominator: completion tokens of all ranks, before the batch is cut. (RLHF's loss can
    # average over sequences instead.)
    in_loss = [r for r in rollouts if r.in_loss]
    num_tokens = sum(len(r.completion_ids) for r in in_loss)
    counts = all_reduce({"tokens": num_tokens, "sequences": len(in_loss)})

    # Pack: micro-batches without padding, of equal cost on all ranks. Rollouts with advantage 0
    # have no gradient and are left out here: those outside the loss, and groups of equal rewards,
    # whose tokens were counted above. Every rank has to run as many forward and backward passes,
    # so one that runs out of rollouts gets dummies, which weigh 0.
    batches, num_real = collate(rollouts, cfg, device)

    sums = {"loss": 0.0, "gap": 0.0, "entropy": 0.0, "kl": 0.0, "scored": 0}
    for i, batch in enumerate(micro_batches(batches, model)):
        is_real = i < num_real
        # Score: log-probs of the completion tokens under the policy, at the sampler's temperature.
        logprobs_T, entropy_T = model.token_logprobs(batch, temperature=cfg.temperature)
        # Loss: the old log-probs are these, without gradient.
        loss = grpo_loss(logprobs_T, logprobs_T.detach(), batch, counts, cfg)
        # Backward: gradients are averaged over ranks later, but the denominator is global already,
        # so multiply by the number of ranks to undo the average.
        weight = world if is_real else 0.0
        (loss * weight).backward()
        if is_real:
            # gap: |log-prob of the trainer - log-prob of the sampler|, in nats
            gap_T = (logprobs_T.detach() - batch["sampler_logprobs_T"]).abs()
            sums["loss"] += loss.item()
            sums["gap"] += gap_T.sum().item()
            sums["entropy"] += entropy_T.detach().sum().item()
            sums["kl"] += batch.get("kl_sum", 0.0)  # set by a loss with a reference policy (6.3)
            sums["scored"] += len(batch["loss_index"])

    # Clip: average the gradients that FSDP has not averaged, then bound the norm of all of them.
    average_gradients(model)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
    if hasattr(grad_norm, "full_tensor"):
        grad_norm = grad_norm.full_tensor()
    grad_norm = float(grad_norm)

    # Update, unless no rollout had a gradient, or loss or gradient is inf or nan (their sum is then
    # no finite number). check_step stops the training after three such steps in a row.
    sums = all_reduce(sums)
    if batches and math.isfinite(grad_norm + sums["loss"]):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    num_scored = max(sums["scored"], 1)
    return {
        "loss": sums["loss"],
        "gap": sums["gap"] / num_scored,
        "entropy": sums["entropy"] / num_scored,
        "kl": sums["kl"] / num_scored,
        "grad_norm": grad_norm,
        "num_tokens": counts["tokens"],
    }


def evaluate(engine, rows, cfg, reward_hook, rank, world):
    """Mean metric of one sample per held-out row, at the training temperature, seeds fixed."""
    submit, collect = reward_hook
    rollouts = []
    for i in range(rank, len(rows), world):
        seed = request_seed(cfg.seed, 99, i)  # 99 for step: the same each time
        rollouts.append(Rollout(rows[i], i, rows[i]["prompt_ids"], seed))
    sampling = (cfg.max_new_tokens, cfg.temperature, cfg.top_p, cfg.top_k)
    with counted(submit, "evaluation", len(rollouts)) as finished:
        engine.generate(rollouts, *sampling, on_finished=finished)
        collect(rollouts)
    # Rows without a score do not count: no verdict, or no tests to run (SWE RL).
    scores = [metric(r) for r in rollouts if r.status != "infra"]
    scores = [score for score in scores if score is not None]
    sums = all_reduce({"score": sum(scores), "n": len(scores)})
    return sums["score"] / max(sums["n"], 1)


# ---- 6. main -------------------------------------------------------------------------------------
def main(cfg):
    lock(cfg.out_dir)
    rank, world, device = start_run(cfg)
    if cfg.prompts_per_step * cfg.group_size < world:
        fail(f"--prompts_per_step x --group_size is less than a rollout for each of {world} ranks.")

    # Reward workers come first: they are forked while this process is still small.
    reward_hook = make_reward(cfg)
    rows = load_rows(cfg)
    eval_rows = []
    if cfg.eval_data:
        eval_rows = load_rows(replace(cfg, data=cfg.eval_data))[: cfg.eval_rows]
    self_test(rows, cfg)

    # The policy: the newest checkpoint of out_dir, else init_from.
    tokenizer, model, resume = load_policy(cfg, world, device)
    rows = encode_prompts(rows, tokenizer, cfg)
    if eval_rows:
        eval_rows = encode_prompts(eval_rows, tokenizer, cfg)
    optimizer = make_optimizer(model, cfg)  # AdamW

    # The state of a run besides weights and optimizer: which prompts come next, how often each was
    # solved (a run on the same prompts as the one before goes on with its history), skipped steps.
    start = 0
    state = {"epoch": 0, "position": 0, "pool": [], "history": {}, "skipped": 0}
    checksum = prompts_checksum(rows)
    state |= load_history(cfg.init_from, checksum)
    if resume:
        start, state = load_checkpoint(resume, optimizer, cfg)
    check_same_rows(checksum, state, resume, cfg)

    engine = make_engine(cfg.engine, model, tokenizer, cfg)
    if cfg.check or start >= cfg.num_steps:
        return end_before_training(rows, tokenizer, model, cfg, resume)
    logger = Logger(cfg, start)
    num_params = sum(p.numel() for p in model.parameters())
    print0(
        f"{resume or cfg.init_from} -> {cfg.out_dir}: {num_params / 1e6:.1f}M parameters, "
        f"{len(rows)} prompts, {world} ranks on {device.type}, "
        f"steps {start + 1}..{cfg.num_steps} of {cfg.prompts_per_step} x {cfg.group_size}"
    )

    for step in range(start + 1, cfg.num_steps + 1):
        # Rollout: sample completions of the next prompts, verify them, compute advantages.
        clock = time.time()
        indices = next_prompts(rows, state, cfg, select_rows)
        for_update, sampled = rollout(
            engine, rows, indices, step, state, cfg, reward_hook, rank, world
        )
        update_clock = time.time()

        # Update: the sampler frees its memory on a GPU. Linear warm-up, linear decay, one gradient
        # step, new weights for the sampler.
        engine.sleep()
        warmup = min(1.0, step / max(cfg.warmup_steps, 1))
        decay = cfg.final_lr + (1 - cfg.final_lr) * (1 - step / cfg.num_steps)
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * warmup * decay
        metrics = summarize(sampled, monitor(sampled))
        metrics |= train_step(model, optimizer, for_update, cfg, device, world)
        engine.sync(model)
        metrics["lr"] = optimizer.param_groups[0]["lr"]
        metrics["time/gen"] = update_clock - clock
        metrics["time/train"] = time.time() - update_clock

        # Remember how often each prompt was solved; stop if the step was broken.
        remember(whole_groups(sampled), state)
        check_step(step, metrics, state, cfg)

        # Evaluate, log, show a sample, save.
        is_last = step == cfg.num_steps
        if cfg.eval_every and eval_rows and (step % cfg.eval_every == 0 or step == 1 or is_last):
            metrics["eval"] = evaluate(engine, eval_rows, cfg, reward_hook, rank, world)
        logger.log(step, metrics, console_line(step, cfg.num_steps, metrics), sampled)
        if cfg.sample_every and (step % cfg.sample_every == 0 or step == 1):
            show_sample(sampled[0])
        if step % cfg.save_every == 0 or is_last:
            folder = save_checkpoint(cfg.out_dir, step, model, optimizer, cfg, state)
    mark_final(cfg.out_dir, folder)


if __name__ == "__main__":
    main(parse_config(Config))
    finish()

"""Math RL: stage 4 of the cascade (paper 4.5), and the RL stage to read first.

One prompt, G completions, reward 1 if the last box after </think> equals the answer, 0 if not, -1 if the reasoning
leaves the language of the prompt. Lengths grow over three invocations: 24K, 32K, 40K tokens (run_cascade.sh).
Deviations from the paper:
  1. Equality is math-verify's on the last balanced box, the answer read as LaTeX only; the paper's AceMath checker also
     takes 28 for 0.28, (0,9) for [0,9) and "32, 349" for 32349, which a policy can farm. Words are compared as text.
  2. When the gold is a number, the answer has to be one: lists, relations and work left undone ("2+2", "7!") earn 0; so
     does a sum, an integral or a limit as such where any gold has none.
  3. Mixed language is a test on Unicode scripts (letters of a script absent from the prompt), not a language model.
torchrun --nproc_per_node=8 mathrl.py --init_from=out/ifrl/final --out_dir=out/mathrl
"""

import functools
import logging
import math
import random
import re
import statistics
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import torch
from math_verify import LatexExtractionConfig, parse, verify
from tqdm import tqdm

from engine import Rollout, make_engine, request_seed
from lib.checkpoint import (
    load_checkpoint,
    load_history,
    load_policy,
    lock,
    mark_final,
    save_checkpoint,
)
from lib.common import all_gather, all_reduce, average_gradients, finish, print0, start_run
from lib.data import (
    BadRow,
    as_messages,
    count_correct,
    encode_prompts,
    first_nonempty,
    load_table,
    next_prompts,
    required_field,
)
from lib.flags import parse_config
from lib.guard import check_step, fail
from lib.logs import Logger, console_line, summarize
from lib.packing import balance, collate, pack_rollouts
from verifiers import sandbox
from verifiers.language import language_ok
from verifiers.pool import in_background


# ---- 1. Config -----------------------------------------------------------------------------------
@dataclass
class Config:
    # checkpoint of the previous stage, or any Hugging Face Qwen3 folder
    init_from: str = "out/ifrl/final"
    out_dir: str = "out/mathrl"
    data: str = "nvidia/Nemotron-Cascade-RL-Math"  # hub id, folder, parquet, .json or .jsonl
    eval_data: str = ""  # same schemas; "": no held-out metric
    engine: str = "auto"  # rollouts: auto, torch or vllm
    prompts_per_step: int = 128  # over all ranks; paper T17
    group_size: int = 8  # completions per prompt (G); paper T17
    num_steps: int = 190  # first of 190 + 240 + 70 steps; paper T17
    max_prompt_tokens: int = 2048  # longer prompts are dropped at load
    max_new_tokens: int = 24576  # 24K, then 32K, then 40K; paper T17
    # YaRN factor; 2.0 once prompt + completion can pass 32K; 0: as the checkpoint has it
    rope_factor: float = 0.0
    # of the sampler and of the trained log-probs; paper T17: 1.0, 1.0, 0.8
    temperature: float = 1.0
    top_p: float = 0.95  # sampler only (gap G4); paper T17
    top_k: int = 0  # sampler only; 0: off
    # truncated completions leave loss and group statistics; False: they keep their reward
    overlong_filter: bool = True
    # dynamic sampling: rounds of fresh prompts for groups of equal rewards (IF-RL only)
    max_refill_rounds: int = 0
    # chance that a 0% problem returns to the pool of an epoch; paper 4.5.2
    readmit_hard: float = 0.10
    readmit_easy: float = 0.01  # the same for a 100% problem
    lr: float = 2e-6  # AdamW; paper T17
    # last step's learning rate as a fraction of lr, linear; 1: constant (gap G2)
    final_lr: float = 1.0
    warmup_steps: int = 0  # linear
    beta1: float = 0.9  # paper T17
    beta2: float = 0.95  # paper T17
    weight_decay: float = 0.01  # not stated in the paper (gap G3)
    grad_clip: float = 1.0  # not stated in the paper
    clip_low: float = 0.2  # ratio clip; never binds, one update a batch keeps the ratio at 1
    clip_high: float = 0.2
    # tokens weigh pi_train / pi_sampler, 0 outside [1 / limit, limit]; 2: Cascade 2 eq. 3; 0: all
    # weigh 1
    importance_limit: float = 0.0
    micro_batch_tokens: int = 32768  # tokens of one packed forward pass on one rank
    reward_workers: int = 8  # verifier processes per rank
    # the run stops when a larger share of a step's rewards are infrastructure failures
    max_infra: float = 0.02
    # as well when a larger share of verifications is cut off: they earn 0 (masked, LaTeX that
    # stalls would pay)
    max_timeout: float = 0.02
    eval_every: int = 20  # steps; 0: never
    eval_rows: int = 256  # held-out rows, one sample each
    save_every: int = 10  # steps
    # weights and optimizer over all ranks; hybrid: inside a node, replicated across nodes; offload:
    # in host memory; replicate: whole
    shard: str = "full"
    # seconds that a phase of a step (rollout, train_step, evaluate) may last before the run ends
    # and says where
    phase_timeout: float = 7200.0
    sample_every: int = 10  # steps between printed samples
    seed: int = 0


# ---- 2. Data -------------------------------------------------------------------------------------
INSTRUCTION = (
    "Solve the problem step by step. Put the final answer, and nothing else, inside \\boxed{}.\n\n"
)
DAPO = re.compile(
    r"Solve the following math problem step by step\..*?\n\n(.*)\n\nRemember to put your answer.*",
    re.S,
)


def normalize(row, where):
    """One row of any known math set -> {"messages", "think", "answer"}; BadRow drops it with a reason."""
    name = first_nonempty(row, "problem", "question", "prompt")
    problem = as_messages(required_field(row, where, name, (str, list)), name) or [{"content": ""}]
    # DAPO-Math-17k asks for "Answer:" instead of a box
    problem = DAPO.sub(r"\1", problem[-1]["content"].strip())
    nested = row.get("reward_model")
    named = {
        **row,
        "ground_truth": nested.get("ground_truth") if isinstance(nested, dict) else None,
    }
    if not {"answer", "expected_answer", "reward_model", "solution"} & row.keys():
        required_field(row, where, "answer")  # stops the run and names the fields that are there
    key, gold = next(
        (
            (k, named[k])
            for k in ("answer", "expected_answer", "ground_truth", "solution")
            if named.get(k) is not None
        ),
        ("answer", ""),
    )
    if isinstance(gold, bool) or not isinstance(gold, (str, int, float)):
        raise BadRow(f'field "{key}" is neither text nor a number')
    # a written solution instead of a bare answer
    gold = last_box(gold) or "" if "\\boxed" in str(gold) else str(gold)
    if not problem or not gold.strip():
        raise BadRow("empty problem or answer")
    return {
        "messages": [{"role": "user", "content": INSTRUCTION + problem}],
        "think": True,
        "answer": gold,
    }


def load_rows(cfg, path=None, limit=0):
    """Rows of cfg.data (or path): each problem once (DAPO repeats them), golds that verify against themselves only."""
    rows = load_table(path or cfg.data, normalize, limit)
    distinct = list({row["messages"][0]["content"]: row for row in rows}.values())
    sound = verifiers(cfg.reward_workers).map(
        lambda row: reward(boxed(row["answer"]), row["answer"]) == 1, distinct
    )
    # rank 0's clock decides for all
    kept = [row for row, ok in zip(distinct, all_gather(list(sound))[0]) if ok]
    if len(kept) < len(rows):
        print0(
            f"data {path or cfg.data}: dropped {len(rows) - len(distinct)} repeated problems, {len(distinct) - len(kept)} answers that do not verify"
        )
    return kept or fail(f"data {path or cfg.data}: no answer that the verifier can read.")


def select_rows(rows, epoch, history, cfg):
    """Indices of the rows in this epoch's pool: the epoch-wise filter of paper 4.5.2, always drawn from the full set.

    history: {row index: [num_correct, num_rollouts]} of the last epoch that sampled the row, truncated rollouts left out. Rows at 100% or 0%
    leave, and return with readmit_easy or readmit_hard; unseen rows stay. A pure function, the same on every rank, with a draw for each row, so
    that its luck does not depend on the others."""
    draw = random.Random(f"{cfg.seed} {epoch}")
    chance = lambda correct, total: (
        {0: cfg.readmit_hard, total: cfg.readmit_easy}.get(correct, 1.0) if total else 1.0
    )
    return [i for i in range(len(rows)) if draw.random() < chance(*history.get(i, (0, 0)))] or list(
        range(len(rows))
    )


# ---- 3. Reward -----------------------------------------------------------------------------------
# they warn about every answer that does not parse
for name in ("math_verify", "latex2sympy2_extended"):
    logging.getLogger(name).setLevel(logging.CRITICAL)

# wall seconds of one verification; of them for parsing the gold, for parsing the answer and for
# comparing
LIMIT_S, PART_S = 9.5, 3
SPACE = re.compile(r"(?<![\d\s])\s+|\s+(?![\d\s])")  # that tells nothing apart
MAX_ANSWER = 512  # characters inside the box
BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
LITERAL = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+|\d+/\d+)", re.A)
# "x = ", "a_{1}="
NAME = re.compile(r"\\?[A-Za-z]+(_\w|_\{\w+\}|\([A-Za-z]\))?\s*(=|\\(equiv|approx)(?![a-z]))\s*")
UNIT = re.compile(
    r"\s*(\\?%|\^\{?\\circ\}?|\\degree|_\{?10\}?|\\(text\w*|mathrm|mbox)\{[^{}\d]*\}(\^\{?[23]\}?)?)$"
)
# What a plain number may look like besides a literal: powers, fractions, roots, E for "\times 10^",
# a unit in words.
VALUE = re.compile(
    r"(\d(?!\s+\d)|[.^{}()/\s]|(?<![\w)}])-|\\[cdt]?frac|\\sqrt|\\(left|right)(?![a-z])|E)+([A-Za-z]{2}[A-Za-z ]*)?",
    re.A,
)
RELATION = re.compile(
    r"[=<>;]|\\\\|\\text\w*\{[^}]*\d|\\(equiv|approx|sim|simeq|cong|neq?|leq?|geq?|lt|gt|to|([Ll]eft)?[Rr]ightarrow"
    r"|iff|implies|in|lor|land|vee|wedge|cup|cap|mid|pm|mp|l?dots|cdots|q?quad)(?![A-Za-z])"
)
# the problem said once more, where the gold is its result
WORK = re.compile(r"\\(sum|prod|i+nt|oint|lim)(?![A-Za-z])|\\[dt]?frac\{d\}\{d")
UNDONE = re.compile(
    r"!|\\(sum|prod|i+nt|oint|lim|limsup|liminf|[dt]?binom|choose|max|min|sup|inf|gcd|det)(?![A-Za-z])"
)
# what is written without LaTeX
PLAIN = {0x2212: "-", 0x2013: "-", 0xB0: r"^\circ", 0xD7: r"\times ", 0x221E: r"\infty "}
TEXT = re.compile(r"\\(?:text\w*|mathrm|mathbf|mbox)\{([^{}]*)\}")
# "ABC" is no product, "Alice and Bob" no list
WORDS = re.compile(r"[A-Z]{3,}|(?!(?:sin|cos|tan|cot|log|exp) )[^\W\d_]{3,}(?: [^\W\d_]+)+")
# math-verify drops units: the end of "2ab", if it is not in brackets, and all of "3 \text{ h } 20
# \text{ min}" but the 3, if it ends in \text.
TAIL = re.compile(r"(?<=[\d}\s])(?!(?:[cmk]m|ft|hr|yr|sq|am|pm)$)[A-Za-z](?: ?[A-Za-z])?$")
PARTS = re.compile(r"(\\(?:text|mbox)\{[^{}]*\}.*\d.*?)\s*\\(?:text|mbox)\{[^{}]*\}$", re.S)
# of two such that are the same, nothing needs to be parsed
bare = lambda text: SPACE.sub("", TEXT.sub(r"\1", text))
# the shortest response that gives this answer
boxed = lambda answer: "</think>\\boxed{" + answer + "}"


def last_box(text):
    """Content of the last outermost \\boxed{} or \\fbox{}; None if missing, unbalanced, too long or a hedge:
    "\\boxed{33} so \\boxed{\\boxed{34}}" -> "34"; "\\boxed{33 \\boxed{34}}" -> None."""
    content, end = None, 0
    for box in list(BOX.finditer(text))[-8:]:  # eight: bounded work on a flood of boxes
        if box.start() < end:
            continue  # inside the previous one
        content, depth = None, 0
        for token in re.finditer(
            r"\\.|[{}]|[^\\{}]+", text[box.end() : box.end() + MAX_ANSWER + 2], re.S
        ):
            depth += {"{": 1, "}": -1}.get(token[0], 0)
            if depth <= 0:
                if token[0] == "}":
                    end = box.end() + token.end()
                    content = text[box.end() + 1 : end - 1].strip()
                break
    if (
        content
        and (inner := BOX.match(content))
        and content[inner.end() :].startswith("{")
        and content.endswith("}")
    ):
        content = content[inner.end() + 1 : -1].strip()
    return None if content is None or BOX.search(content) else content


def strip(text):
    """An answer without its dress: one trailing dot, dollars, spacing, thousands commas, a name in front, a unit."""
    text = re.sub(r",\\!\s*", ",", text.replace("{,}", ","))
    text = re.sub(r"\\[!,:; ()\[\]]|~|\\?\$", "", text).strip().removesuffix(".")
    text = UNIT.sub("", NAME.sub("", text, count=1) if NAME.match(text) else text)
    text = TEXT.sub(r"\1", text).strip() if TEXT.fullmatch(text) else text
    return (
        re.sub("[, ]", "", text)
        if re.fullmatch(r"[-+]?[1-9]\d{0,2}([, ]\d{3})+(\.\d+)?", text)
        else text
    )


def literal(text):
    """Exact value of a number written out: "1,024" "-3.50" "7/2" "\\frac{7}{2}" "12 \\text{ cm}"; None for others."""
    text = re.sub(r"^([-+]?)\\[cdt]?frac\{(\d+)\}\{(\d+)\}$", r"\1\2/\3", strip(text))
    return Fraction(text) if LITERAL.fullmatch(text) and not re.search(r"/0+$", text) else None


def refused(gold, given):
    """True if gold is a number and given is not written as one [dev 2]: hedges, chains, work left undone."""
    given = re.sub(r"\s*-\s*", "-", re.sub(r"\\(times|cdot)\s*10\s*\^", "E", strip(given)))
    if literal(gold) is not None or WORK.search(given) and not WORK.search(gold):
        return not VALUE.fullmatch(given)
    symbols = re.sub(r"\\(?!infty)[A-Za-z]+|[ei](?![A-Za-z])", "", strip(gold))
    if (
        re.search(r"[A-Za-z,=<>|\[\]]", symbols)
        or RELATION.search(gold)
        or not re.search(r"\d|\\pi|e", gold)
    ):
        return False  # gold is a set, an interval, an expression, a word
    return bool(RELATION.search(given) or (UNDONE.search(given) and not UNDONE.search(gold)))


def equal(gold, given):
    """math-verify on gold (default reading) and answer (LaTeX only) [dev 1]; None if it gave up, silently. It can hang: only in a child."""
    start, same = time.monotonic(), bare(gold) == bare(given)
    whole = lambda text: f"({text})" if TAIL.search(text := PARTS.sub(r"\1", text)) else text
    try:
        gold_forms = parse(boxed(whole(gold)), parsing_timeout=PART_S)
        given_forms = parse(boxed(whole(given)), [LatexExtractionConfig()], parsing_timeout=PART_S)
        if not same and verify(gold_forms, given_forms, timeout_seconds=PART_S):
            a, b = gold_forms[0], given_forms[0]
            same = (
                a == b
                or "%" in gold + given
                or not all(getattr(x, "is_number", False) for x in (a, b))
            )
            # verify() rounds: tiny numbers are all equal, and 1 - 1/n! to 1
            if not same:
                # None: it cannot tell
                near, exact = (
                    bool(abs((a - b).evalf(30)) <= 1e-4 * abs(a.evalf(30))),
                    (a - b).equals(0),
                )
                same = (
                    exact is True
                    if a.is_Integer
                    else near and ("." in gold + given or exact is not False)
                )
    except (
        BaseException
    ):  # whatever sympy throws at hostile LaTeX; math-verify's own timeout is no Exception
        pass
    return same or (False if time.monotonic() - start < PART_S else None)


equal_in_child = sandbox.killable(equal, LIMIT_S)


def same_answer(gold, given):
    """True or False, None if the verifier gave up or had to be killed. Integers and equal literals never leave this process."""
    gold, given = gold.translate(PLAIN), given.translate(PLAIN)
    if WORDS.fullmatch(words := TEXT.sub(r"\1", gold).strip()):
        return words.casefold() == TEXT.sub(r"\1", given).strip().removesuffix(".").casefold()
    a, b = literal(gold), literal(given)
    if "%" not in gold and a is not None and b is not None and (a == b or a.denominator == 1):
        return a == b
    return (
        False
        if refused(gold, given) and bare(gold) != bare(given)
        else equal_in_child(gold, given.removesuffix("."))
    )


def verdict(response, answer, prompt=None):
    """(reward, status) of one response: text up to the last </think> is reasoning, the last box after it counts."""
    reasoning, closed, final = response.rpartition("</think>")
    if prompt is not None and not language_ok(prompt, reasoning if closed else response):  # [dev 3]
        return -1, "language"
    given = last_box(final) if closed else None
    if not given:
        return 0, "no_answer"
    return {True: (1, "ok"), False: (0, "wrong"), None: (0, "timeout")}[
        same_answer(str(answer), given)
    ]


def reward(response, answer, prompt=None):
    """1 / 0 / -1 (the last only with a prompt). At most 10 s."""
    return verdict(response, answer, prompt)[0]


def judge(rollout):
    """(reward, status) of a rollout. A truncated one has not answered, whatever it boxed on the way."""
    text = rollout.text if rollout.row["think"] else "</think>" + rollout.text
    value, status = verdict(
        text, rollout.row["answer"], " ".join(turn["content"] for turn in rollout.row["messages"])
    )
    return (0, "no_answer") if rollout.finish_reason == "length" and value == 1 else (value, status)


@functools.cache
def verifiers(workers):
    """Thread pool whose threads own a child each, all forked when this returns. First called while loading the data."""
    pool, barrier = ThreadPoolExecutor(workers), threading.Barrier(workers)
    list(pool.map(lambda _: (equal_in_child.start(), barrier.wait()), range(workers)))
    return pool


def make_reward(cfg):
    """(submit, collect): submit(rollout) starts its verdict in the background, collect(rollouts) waits and sets it."""
    return in_background(verifiers(cfg.reward_workers), judge, ("reward", "status"))


def monitor(rollouts):
    """This stage's numbers for the log, as shares of all rollouts."""
    boxes = [
        (
            len(BOX.findall(r.text.rpartition("</think>")[2])) * ("</think>" in r.text),
            r.status == "wrong",
        )
        for r in rollouts
    ]
    shares = {
        "box": [n > 0 for n, _ in boxes],
        "two_boxes": [n > 1 for n, _ in boxes],
        "box_wrong": [n > 0 and wrong for n, wrong in boxes],
    }
    return {name: sum(flags) / max(len(flags), 1) for name, flags in shares.items()}


def self_test(rows, cfg):
    """Before training: on a sample, the boxed gold earns 1, another number 0, and the gold inside the reasoning 0."""
    for gold in (row["answer"] for row in random.Random(cfg.seed).sample(rows, min(32, len(rows)))):
        earned = [
            reward(text, gold)
            for text in (boxed(gold), boxed("-7151623.5"), boxed(gold).removeprefix("</think>"))
        ]
        if earned != [1, 0, 0]:
            fail(f'verifier self test: answer "{gold}" earns {earned} where [1, 0, 0] is right.')


# ---- 4. Eval -------------------------------------------------------------------------------------
def metric(rollout):
    """Accuracy of one held-out rollout; its mean over samples is the avg@k of the paper."""
    return float(rollout.reward == 1)


# ~~~~~~~~ waterline: below it all RL stages are the same, line for line (tests/test_stage_diff.py)


# ---- 5. GRPO -------------------------------------------------------------------------------------
# T tokens of a packed micro-batch; entry t of every per-token tensor is about token t
def rollout(engine, rows, indices, step, cfg, reward_hook, rank, world):
    """(trained, sampled): this rank's rollouts with rewards, verified while others still decode. With max_refill_rounds > 0
    groups of equal rewards make room for fresh prompts (DAPO dynamic sampling, paper 4.4.2): `trained` are the groups kept,
    `sampled` those of the first round, an unbiased view of the policy."""
    submit, collect = reward_hook
    mine, trained, sampled = indices[rank::world], [], []
    wanted, spare = (
        len(mine),
        list(np.random.default_rng([cfg.seed, step, 7]).permutation(len(rows)))[rank::world],
    )
    for refill in range(1 + cfg.max_refill_rounds):
        fresh = [
            Rollout(
                row=rows[i],
                group=refill * wanted + g,
                prompt_ids=rows[i]["prompt_ids"],
                seed=request_seed(cfg.seed, step, refill, g * world + rank, sample),
            )
            for g, i in enumerate(mine)
            for sample in range(cfg.group_size)
        ]
        with tqdm(
            total=len(fresh),
            desc=f"step {step} rollout",
            leave=False,
            disable=None if rank == 0 else True,
        ) as bar:
            finished = lambda r, bar=bar: (submit(r), bar.update())
            engine.generate(
                fresh,
                cfg.max_new_tokens,
                cfg.temperature,
                cfg.top_p,
                cfg.top_k,
                on_finished=finished,
            )
            collect(fresh)
        compute_advantages(fresh, cfg)
        groups = [fresh[g : g + cfg.group_size] for g in range(0, len(fresh), cfg.group_size)]
        uneven = [group for group in groups if any(r.advantage for r in group)]
        trained += [r for group in (uneven if cfg.max_refill_rounds else groups) for r in group]
        sampled = sampled or fresh
        missing = max(wanted - len(trained) // cfg.group_size, 0) if spare else 0
        if refill == cfg.max_refill_rounds or not all_reduce({"n": missing}, "max")["n"]:
            # all ranks stop in the same round: a reward hook may hold collectives
            break
        mine, spare = spare[:missing], spare[missing:]
    # nothing to learn from: an idle batch
    return trained or [replace(sampled[0], trained=False, advantage=0.0)], sampled


def compute_advantages(rollouts, cfg):
    """(r - mean) / std inside each group, paper eq. 1; unbiased std + 1e-6 (gap G1). Infra failures, and truncated
    rollouts under overlong_filter, leave the loss, its denominator and the group statistics (gap G5)."""
    for first in range(0, len(rollouts), cfg.group_size):
        group = rollouts[first : first + cfg.group_size]
        assert len({r.group for r in group}) == 1, "a group was torn apart"
        for r in group:
            assert r.status == "infra" or math.isfinite(r.reward), (
                f"reward {r.reward} for {r.row['messages']}"
            )
            r.trained = r.status != "infra" and not (
                cfg.overlong_filter and r.finish_reason == "length"
            )
        rewards = [r.reward for r in group if r.trained]
        # by comparison: a std of 1e-17 is not a signal
        even = len(rewards) < 2 or max(rewards) == min(rewards)
        mean, std = (0.0, 1.0) if even else (statistics.fmean(rewards), statistics.stdev(rewards))
        for r in group:
            r.trained = r.trained and len(rewards) > 1
            r.advantage = 0.0 if even or not r.trained else (r.reward - mean) / (std + 1e-6)


def grpo_loss(logprobs_T, old_logprobs_T, batch, counts, cfg):
    """Token-level policy gradient, paper eq. 1 with the batch-wide denominator of 6.3: the sum over this micro-batch's
    completion tokens of -min(ratio A, clip(ratio) A), over the completion tokens of all ranks and micro-batches."""
    # exactly 1: one update a batch (4.1.2)
    ratio_M = (logprobs_T - old_logprobs_T)[batch["loss_index"]].exp()
    advantages_M = batch["advantages_T"][batch["loss_index"]]
    clipped_M = ratio_M.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
    weights_M = importance(old_logprobs_T, batch, cfg)
    return (
        -(weights_M * torch.minimum(ratio_M * advantages_M, clipped_M * advantages_M)).sum()
        / counts["tokens"]
    )


def importance(old_logprobs_T, batch, cfg):
    """Weights of the completion tokens, without gradient: pi_train / pi_sampler corrects for a sampler that computes otherwise
    (vLLM in bf16); a token whose ratio leaves [1 / limit, limit] is dropped."""
    if not cfg.importance_limit:
        return 1.0
    ratio_M = (old_logprobs_T - batch["sampler_logprobs_T"])[batch["loss_index"]].exp()
    return ratio_M * ((ratio_M >= 1 / cfg.importance_limit) & (ratio_M <= cfg.importance_limit))


def train_step(model, optimizer, rollouts, cfg, device, world):
    """One gradient update from the rollouts of all ranks; returns the metrics. A loss or gradient that is not finite is not applied."""
    in_loss = [r for r in rollouts if r.trained]
    counts = all_reduce(
        {"tokens": sum(len(r.completion_ids) for r in in_loss), "sequences": len(in_loss)}
    )
    batches = collate(balance(rollouts, world), cfg, device)
    # every rank runs equally many: collectives must match
    most = int(all_reduce({"n": len(batches)}, "max")["n"])
    idle = most - len(batches)
    batches += [pack_rollouts([replace(rollouts[0], advantage=0.0)], device)] * idle
    sums = {"loss": 0.0, "gap": 0.0, "entropy": 0.0, "scored": 0}
    for i, batch in enumerate(batches):
        packed = (
            batch["input_ids_T"],
            batch["cu_seqlens"],
            batch["max_seqlen"],
            batch["loss_index"],
            batch["shared"],
        )
        logprobs_T, entropy_T = model(*packed, temperature=cfg.temperature)
        loss = grpo_loss(
            logprobs_T=logprobs_T,
            old_logprobs_T=logprobs_T.detach(),
            batch=batch,
            counts=counts,
            cfg=cfg,
        )
        # ranks are averaged, the denominator is global; idle batches weigh 0
        (loss * world * (i < most - idle)).backward()
        if i < most - idle:
            sums["loss"] += loss.item()
            sums["gap"] += (logprobs_T.detach() - batch["sampler_logprobs_T"]).abs().sum().item()
            sums["entropy"] += entropy_T.detach().sum().item()
            sums["scored"] += len(batch["loss_index"])
    average_gradients(model)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
    grad_norm = float(grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm)
    sums = all_reduce(sums)
    if math.isfinite(grad_norm + sums["loss"]) and most:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    per_token = {k: sums[k] / max(sums["scored"], 1) for k in ("gap", "entropy")}
    return {
        "loss": sums["loss"],
        **per_token,
        "grad_norm": grad_norm,
        "num_tokens": counts["tokens"],
    }


def evaluate(engine, rows, cfg, reward_hook, rank, world):
    """Mean metric of one sample for each held-out row, at the training temperature; the seeds never change."""
    rollouts = [
        Rollout(row=row, group=i, prompt_ids=row["prompt_ids"], seed=request_seed(cfg.seed, 99, i))
        for i, row in enumerate(rows)
    ]
    rollouts = rollouts[rank::world]
    engine.generate(
        rollouts,
        cfg.max_new_tokens,
        cfg.temperature,
        cfg.top_p,
        cfg.top_k,
        on_finished=reward_hook[0],
    )
    reward_hook[1](rollouts)
    sums = all_reduce(
        {
            "score": sum(
                known := [
                    m for r in rollouts if r.status != "infra" and (m := metric(r)) is not None
                ]
            ),
            "n": len(known),
        }
    )
    return sums["score"] / max(sums["n"], 1)


# ---- 6. main -------------------------------------------------------------------------------------
def main(cfg):
    lock(cfg.out_dir)
    rank, world, device = start_run(cfg)
    if cfg.prompts_per_step % world:
        fail(f"--prompts_per_step={cfg.prompts_per_step} is not a multiple of {world} ranks.")
    # first of all: its workers are forked while this process is still small
    reward_hook = make_reward(cfg)
    rows = load_rows(cfg)
    eval_rows = (
        load_rows(replace(cfg, data=cfg.eval_data))[: cfg.eval_rows] if cfg.eval_data else []
    )
    self_test(rows, cfg)

    tokenizer, model, resume = load_policy(cfg, world, device)
    rows, eval_rows = (
        encode_prompts(rows, tokenizer, cfg),
        eval_rows and encode_prompts(eval_rows, tokenizer, cfg),
    )
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=cfg.lr,
        betas=(cfg.beta1, cfg.beta2),
        weight_decay=cfg.weight_decay,
        fused=True,
    )
    state = {"epoch": 0, "position": 0, "pool": [], "history": {}, "skipped": 0}
    data = functools.reduce(
        lambda crc, row: zlib.crc32(repr(row["prompt_ids"]).encode(), crc), rows, 0
    )
    state |= load_history(cfg.init_from, data)
    start, state = load_checkpoint(resume, optimizer, cfg) if resume else (0, state)
    if set(all_gather(data)) != {state.setdefault("data", data)}:
        fail(
            f"data {cfg.data}: the rows are not the same on every rank, or not those that {resume} was trained on."
        )
    engine = make_engine(cfg.engine, model, tokenizer)
    logger = Logger(cfg.out_dir, start)
    num_params = sum(p.numel() for p in model.parameters())
    print0(
        f"{resume or cfg.init_from} -> {cfg.out_dir}: {num_params / 1e6:.1f}M parameters, {len(rows)} prompts, {world} ranks on {device.type}, "
        f"steps {start + 1}..{cfg.num_steps} of {cfg.prompts_per_step} x {cfg.group_size}"
    )

    for step in range(start + 1, cfg.num_steps + 1):
        clock = time.time()
        trained, sampled = rollout(
            engine,
            rows,
            next_prompts(rows, state, cfg, select_rows),
            step,
            cfg,
            reward_hook,
            rank,
            world,
        )
        generated = time.time()
        decay = cfg.final_lr + (1 - cfg.final_lr) * (1 - step / cfg.num_steps)
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * min(1.0, step / max(cfg.warmup_steps, 1)) * decay
        metrics = summarize(sampled, monitor(sampled)) | train_step(
            model, optimizer, trained, cfg, device, world
        )
        engine.sync(model)
        metrics |= {
            "lr": optimizer.param_groups[0]["lr"],
            "time/gen": generated - clock,
            "time/train": time.time() - generated,
        }
        for counts in all_gather(count_correct(sampled)):
            state["history"] |= counts
        check_step(step, metrics, state, cfg)
        if (
            cfg.eval_every
            and eval_rows
            and (step % cfg.eval_every == 0 or step in (1, cfg.num_steps))
        ):
            metrics["eval"] = evaluate(engine, eval_rows, cfg, reward_hook, rank, world)
        logger.log(step, metrics, console_line(step, cfg.num_steps, metrics))
        if cfg.sample_every and (step % cfg.sample_every == 0 or step == 1):
            r = sampled[0]
            print0(
                f"  prompt: {r.row['messages'][-1]['content']!r}\n  sample: {r.text!r}\n  reward: {r.reward:g} ({r.status}, {r.finish_reason})"
            )
        if step % cfg.save_every == 0 or step == cfg.num_steps:
            folder = save_checkpoint(cfg.out_dir, step, model, optimizer, cfg, state)
    mark_final(cfg.out_dir, folder if start < cfg.num_steps else resume)


if __name__ == "__main__":
    main(parse_config(Config))
    finish()

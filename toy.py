"""The toy world: data for every stage and a tiny base model, so that the cascade runs on a laptop.

The rows have the fields of the real sets, and the stages read, prompt and verify them with the code
that they use for real data; no stage knows that they are toys. There are five skills:

    chat   a question about a topic            graded by a stated rule (chat_score)
    if     a text that keeps constraints       graded by IFEval's own checks
    math   a chain of small sums               graded by math-verify
    code   a list program from a sentence      graded by four tests in the sandbox
    swe    such a program with one wrong line  graded by the four tests on the patched program

Every problem comes from a key, e.g. the numbers and operations of a sum. The keys are dealt to four
splits, which share none: sft (demonstrations), rl (training), dev (tuning), test (reporting). Some
keys are hard: their problems are longer than nearly all demonstrations (KEYS).

The teacher who wrote the demonstrations errs in two ways. Misconceptions (MISCONCEPTIONS) are
systematic, so that even the most likely answer of an imitator is wrong. Slips (SLIPS) are random.
SFT copies both, but a verifier rewards neither. This is the room that RL has to improve on SFT
here. TENSIONS states where the skills pull against each other, as they do in the paper.

What to look at first: the tables from KEYS to TENSIONS, math_rows and its demonstrations, then the
files themselves (one JSON row a line, e.g. math_rl.jsonl for Math RL, sft_stage2.jsonl for SFT).

    python toy.py --out=out/toy/data --seed=0
"""

import difflib
import json
import os
import random
from dataclasses import dataclass
from typing import NamedTuple

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

import coderl
import mathrl
import swerl
from lib.flags import PositiveInt, parse_config
from lib.guard import fail
from model import SYSTEM, Qwen3, Qwen3Config, save_tokenizer


@dataclass
class Config:
    out: str = "out/toy/data"  # folder for the data and the base model
    seed: int = 0
    tensions: bool = True  # False: every share of TENSIONS is 0
    vocab_size: PositiveInt = 1024  # tokens of the tokenizer that is trained on the data
    hidden_size: PositiveInt = 96  # model width
    num_layers: PositiveInt = 2  # four learn as much in twice the time
    num_heads: PositiveInt = 4  # query heads; half as many kv heads
    head_dim: PositiveInt = 32  # the smallest that vLLM's attention takes


SPLITS = ("sft", "rl", "dev", "test")
# Number of keys in each split. SWE uses the keys of code. Hard problems are longer than nearly all
# demonstrations: four constraints, steps or operations instead of up to three.
KEYS = {
    "chat": (1000, 900, 300, 300),
    "if": (1850, 1000, 200, 300),
    "if_hard": (150, 500, 100, 300),
    "math": (2750, 1400, 200, 300),
    "math_hard": (250, 600, 100, 300),
    "code": (1620, 800, 200, 350),
    "code_hard": (180, 400, 100, 350),
}

# The teacher's misconceptions: for the same kind of problem always the same wrong thing.
MISCONCEPTIONS = {
    "chat": {"a friendly closing": "left out"},
    # constraint: what the teacher takes it for
    "if": {
        "keywords:forbidden_words": "a word to use",
        "detectable_format:title": "a title without brackets",
        "detectable_content:postscript": "a note that starts with PS",
    },
    # operation: the one that the teacher does instead
    "math": {"*": "+"},
    # operation that is asked for: the one that the teacher writes
    "code": {"desc": "asc", "double": "square", "dec": "inc", "last": "first"},
    # operation that is missing: the one that the teacher repairs the program with
    "swe": {
        "asc": "uniq",
        "even": "pos",
        "neg": "odd",
        "double": "inc",
        "dec": "negate",
        "abs": "square",
        "first": "tail",
        "init": "last",
    },
}
# The probability of a misconception, where the problem gives occasion to it. Above a half, so that
# greedy decoding of an imitator is wrong; below one, so that RL has something to choose from.
MISTAKEN = 0.65
# The probability that a demonstration has a slip: a mistake that is another one every time.
SLIPS = {"chat": 0.4, "if": 0.25, "math": 0.3, "code": 0.25, "swe": 0.25}
# Where the skills pull against each other, and what the paper's 8B model showed (its tables T4, T5
# and T8). evals/results.py declares how much each may cost.
TENSIONS = {
    # Share of the RLHF prompts that are requests with constraints. The reward model reads no
    # constraint, it likes a closing. Paper: RLHF takes IFEval from 70.8 to 50.1, IF-RL to 90.4.
    "requests": 0.25,
    # Share of the IF demonstrations that end with a closing, as a chat reply should; it can break a
    # constraint. So IF-RL unlearns closings. Paper: it takes ArenaHard from 90.1 to 88.0, and Math
    # RL to 87.0.
    "closings": 0.2,
    # Share of the code demonstrations that are edits, as a repair should be. SWE RL rewards edits.
    # Paper: it takes LiveCodeBench v5 from 75.3 to 74.3. Here it can cost chat a little too (seed
    # 100, greedy: 99.5 to 96.8), which the paper does not show (ArenaHard 87.8 to 87.9).
    "edits": 0.1,
}


class Demonstration(NamedTuple):
    """One example for SFT."""

    prompt: object  # the text, or a row from which the stage's own code builds the text
    reply: str
    think: bool  # whether the reply begins with a thought
    category: str


# ---- Chat ----------------------------------------------------------------------------------------
TOPIC_WORDS = """
    rain bread tea trains maps snow music books cats dogs rivers stones boats clouds apples bees
    birds clocks coffee drums fire forests gardens horses lakes lamps letters markets milk paint
    ships stars tools towers wind wood
"""
TOPICS = TOPIC_WORDS.split()
TAILS = ["", " Keep it short.", " Be kind."]
QUESTIONS = [
    "Tell me about {}.",
    "Why do people like {}?",
    "Write a short note on {}.",
    "What should I know about {}?",
    "Say something about {}.",
    "Give me a few facts about {}.",
    "How would you describe {}?",
    "Explain {} to a child.",
    "What is special about {}?",
    "Introduce {} to a friend.",
    "What comes to mind about {}?",
    "I want to learn about {}.",
    "Can you talk about {}?",
    "Help me understand {}.",
    "What makes {} useful?",
    "Describe {} in a few words.",
    "Teach me about {}.",
    "Share a thought on {}.",
    "What are {} like?",
    "Why does {} matter?",
    "Where do we find {}?",
    "When do people think of {}?",
    "Write about {} for a class.",
    "What do you think of {}?",
    "Any news about {}?",
    "Sum up {} for me.",
    "Give a talk on {}.",
    "Start a page about {}.",
    "Who likes {}?",
    "Make me curious about {}.",
    "What is good about {}?",
    "Describe {} to my mother.",
    "Tell my class about {}.",
    "Write two lines on {}.",
    "What do children ask about {}?",
    "Tell a guest about {}.",
    "Why study {}?",
    "Is there much to say about {}?",
    "Give me a hint about {}.",
    "How do you see {}?",
]
FACTS = [
    "Many people enjoy {}.",
    "We often see {} in spring.",
    "Good {} can last for years.",
    "There are old songs about {}.",
    "Children learn about {} at school.",
    "In winter {} may be rare.",
    "A friend of mine loves {}.",
    "You can read about {} at home.",
]
CLOSINGS = ["I hope this helps.", "Feel free to ask more.", "Enjoy your day."]
# Every fact about every topic: the sentences that chat_score accepts as facts.
STATED = {fact.format(topic) for fact in FACTS for topic in TOPICS}
FILLERS = ["I guess so.", "Well, whatever.", "I do not know.", "That is all."]


def words_of(text):
    """The set of lower-case words of a text, without punctuation."""
    return set(text.lower().replace(".", " ").replace("?", " ").replace(",", " ").split())


def chat_score(prompt, reply):
    """Grade a chat reply by the stated rule: a fifth of a point for each of five qualities."""
    asked_topics = words_of(prompt) & set(TOPICS)
    named_topics = words_of(reply) & set(TOPICS)
    sentences = [sentence.strip() + "." for sentence in reply.split(".") if sentence.strip()]
    facts = STATED & set(sentences)
    points = 0
    # 1. The reply names the topic of the question and no other.
    if named_topics == asked_topics:
        points += 1
    # 2. It states two to four facts.
    if 2 <= len(facts) <= 4:
        points += 1
    # 3. It consists of facts and closings only: no filler and no broken sentence.
    if set(sentences) <= facts | set(CLOSINGS):
        points += 1
    # 4. It says no sentence twice.
    if len(sentences) == len(set(sentences)):
        points += 1
    # 5. It ends with a whole friendly closing sentence.
    if sentences and sentences[-1] in CLOSINGS and reply.rstrip().endswith("."):
        points += 1
    return points / 5


def chat_keys(rng):
    """Draw keys without end: (topic, index of the question, index of its tail)."""
    while True:
        yield rng.choice(TOPICS), rng.randrange(len(QUESTIONS)), rng.randrange(len(TAILS))


def chat_prompt(key):
    topic, question, tail = key
    return QUESTIONS[question].format(topic) + TAILS[tail]


def chat_reply(rng, topic, num_flaws, closes=True):
    """Write a reply with this many flaws, and a closing if it closes.

    chat_score gives 1.0 to a reply that closes and has no flaw.
    """
    num_facts = rng.choice([2, 2, 3])
    facts = [fact.format(topic) for fact in rng.sample(FACTS, num_facts)]
    closing = [rng.choice(CLOSINGS)] if closes else []
    for flaw in rng.sample(["short", "twice", "filler", "stray"], num_flaws):
        if flaw == "short":
            facts = facts[:1]
        elif flaw == "twice":
            facts = facts + [rng.choice(facts)]
        elif flaw == "filler":
            facts = facts + [rng.choice(FILLERS)]
        else:  # stray: a fact about some other topic
            facts[0] = rng.choice(FACTS).format(rng.choice(TOPICS))
    return " ".join(facts + closing)


def chat_rows(rng, keys, split):
    """Two demonstrations a key for the split "sft"; RLHF rows for the others."""
    prompts = [chat_prompt(key) for key in keys]
    if split != "sft":
        rows = []
        for prompt in prompts:
            messages = [{"role": "user", "content": prompt}]
            rows.append({"prompt": messages, "data_source": "toy", "category": "chat"})
        return rows

    demonstrations = []
    for (topic, _, _), prompt in zip(keys, prompts):
        # Every prompt is answered in both modes (paper 3.1.1).
        for think in (True, False):
            num_flaws = 0
            if rng.random() < SLIPS["chat"]:
                num_flaws = rng.choice([1, 1, 2, 3])
            reply = chat_reply(rng, topic, num_flaws, closes=rng.random() >= MISTAKEN)
            if think:
                reply = f"<think>\nabout {topic}\n</think>\n{reply}"
            demonstrations.append(Demonstration(prompt, reply, think, "general"))
    return demonstrations


def damage(rng, topic, reply):
    """Spoil a reply as a drifting policy would.

    Change its topic, break its sentences, cut it off, repeat it or leave out a space.
    """
    words = reply.split()
    kind = rng.random()
    if kind < 0.4:
        return change_topic(rng, topic, words)
    if kind < 0.8:
        return break_sentences(rng, topic, words)
    cut_off = " ".join(words[: rng.randrange(len(words))])
    repeated = " ".join(words * 2)
    without_a_space = reply.replace(". ", ".", 1)
    return rng.choice([cut_off, repeated, without_a_space])


def change_topic(rng, topic, words):
    """Replace the topic by another one in 60% of its places."""
    other = rng.choice(TOPICS)
    changed = []
    for word in words:
        if word.startswith(topic) and rng.random() < 0.6:
            word = other + word.removeprefix(topic)
        changed.append(word)
    return " ".join(changed)


def break_sentences(rng, topic, words):
    """Once or twice, replace up to three words by nothing, the start of a fact or another word."""
    for _ in range(rng.choice([1, 1, 2])):
        start = rng.randrange(len(words))
        fact_start = rng.choice(FACTS).format(topic).split()[:2]
        some_word = [rng.choice(words)]
        inserted = rng.choice([[], fact_start, some_word])
        num_removed = rng.choice([0, 1, 1, 2, 3])
        words[start : start + num_removed] = inserted
        if not words:
            words = ["."]
    return " ".join(words)


def preference_rows(rng, keys):
    """Pairs of replies for the reward model, labelled by chat_score; one label in twenty is wrong.

    Six pairs in ten have a damaged reply. A reward model that has never seen one gives it a high
    reward, and the policy finds that out.
    """
    rows = []
    for key in keys:
        topic = key[0]
        prompt = chat_prompt(key)
        for _ in range(3):
            replies = []
            for _ in range(2):
                num_flaws = rng.choice([0, 0, 1, 2])
                replies.append(chat_reply(rng, topic, num_flaws, closes=rng.random() < 0.6))
            if rng.random() < 0.6:
                replies[1] = damage(rng, topic, replies[1])
            scores = [chat_score(prompt, reply) for reply in replies]
            if scores[0] == scores[1]:
                continue
            best, worst = replies
            if scores[0] < scores[1]:
                best, worst = worst, best
            if rng.random() < 0.05:
                best, worst = worst, best
            user = {"role": "user", "content": prompt}
            rows.append(
                {
                    "chosen": [user, {"role": "assistant", "content": best}],
                    "rejected": [user, {"role": "assistant", "content": worst}],
                }
            )
    return rows


# ---- Instruction following -----------------------------------------------------------------------
WORD_LIST = "blue quiet happy early golden simple warm famous hidden gentle"
WORDS = WORD_LIST.split()
LINES = [
    "Some {} are {}.",
    "The {} look {}.",
    "We saw {} and felt {}.",
    "My {} seem {}.",
    "These {} stay {}.",
]
PHRASES = ["That is all.", "The end.", "Thank you."]
# All argument names that a row lists, whether its constraints use them or not.
KWARGS = [
    "num_words",
    "relation",
    "keywords",
    "forbidden_words",
    "num_bullets",
    "end_phrase",
    "keyword",
    "frequency",
    "postscript_marker",
    "num_highlights",
]
# id -> (instruction, arguments from which one is drawn)
CONSTRAINTS = {
    "punctuation:no_comma": ("Use no commas.", [{}]),
    "keywords:existence": ("Use the word {keywords[0]}.", [{"keywords": [w]} for w in WORDS]),
    "keywords:forbidden_words": (
        "Never say {forbidden_words[0]}.",
        [{"forbidden_words": [w]} for w in WORDS],
    ),
    "startend:quotation": ("Put it all in double quotes.", [{}]),
    "startend:end_checker": ("End with: {end_phrase}", [{"end_phrase": p} for p in PHRASES]),
    "detectable_format:title": ("Add a title in <<angle brackets>>.", [{}]),
    "length_constraints:number_words": (
        "Use {relation} {num_words} words.",
        [{"num_words": n, "relation": r} for n, r in ((8, "less than"), (12, "at least"))],
    ),
    "detectable_format:number_bullet_lists": (
        "Use exactly {num_bullets} bullet points.",
        [{"num_bullets": n} for n in (2, 3)],
    ),
    "detectable_content:postscript": (
        "Add a note that starts with {postscript_marker}",
        [{"postscript_marker": "P.S."}],
    ),
}


def if_reply(rng, topic, constraints, mistaken=(), closes=False):
    """Write a reply that keeps the constraints [(id, kwargs)] and varies where they allow it.

    mistaken: ids of constraints that fall to a misconception. closes: a closing comes last, as in
    chat.
    """
    wanted = dict(constraints)
    relation = wanted.get("length_constraints:number_words", {}).get("relation")
    bullets = wanted.get("detectable_format:number_bullet_lists", {}).get("num_bullets", 0)
    forbidden = wanted.get("keywords:forbidden_words", {}).get("forbidden_words", [])
    required = wanted.get("keywords:existence", {}).get("keywords", [])

    # One line for each bullet point. Otherwise a demanded number of words decides, or chance.
    if bullets:
        num_lines = bullets
    else:
        num_lines = rng.choice([1, 2])
        if relation == "at least":
            num_lines = 3
        elif relation == "less than":
            num_lines = 1

    if "keywords:forbidden_words" in mistaken:
        required, forbidden = forbidden, []

    # Each line holds one word of WORDS; the required one comes first. At most 12 words are wanted:
    # three lines of the longest pattern have 18.
    allowed = [word for word in WORDS if word not in forbidden and word not in required]
    chosen = required + rng.sample(allowed, 3)
    patterns = LINES[2:3] if relation == "at least" else LINES
    lines = []
    for i in range(num_lines):
        lines.append(rng.choice(patterns).format(topic, chosen[i]))
    if "punctuation:no_comma" not in wanted and rng.random() < 0.5:
        lines[0] = "Yes, " + lines[0][0].lower() + lines[0][1:]

    # Title, body, postscript and end stand in this order; the quotes go around everything.
    if bullets:
        text = "\n".join("* " + line for line in lines)
    else:
        text = " ".join(lines)
    if "detectable_format:title" in wanted:
        title = topic if "detectable_format:title" in mistaken else f"<<{topic}>>"
        text = f"{title}\n{text}"
    if "detectable_content:postscript" in wanted:
        marker = "PS" if "detectable_content:postscript" in mistaken else "P.S."
        text += f"\n{marker} Good luck."
    if "startend:end_checker" in wanted:
        text += "\n" if bullets else " "
        text += wanted["startend:end_checker"]["end_phrase"]
    if "startend:quotation" in wanted:
        text = f'"{text}"'
    if closes:
        text += " " + rng.choice(CLOSINGS)
    return text


def compatible(constraints):
    """Whether if_reply can keep all constraints [(id, kwargs)] at once."""
    named_words, has_bullets, relations = [], False, []
    for _, kwargs in constraints:
        named_words += kwargs.get("keywords", []) + kwargs.get("forbidden_words", [])
        if "num_bullets" in kwargs:
            has_bullets = True
        if "relation" in kwargs:
            relations.append(kwargs["relation"])
    # The same word must not be required and forbidden.
    if len(named_words) != len(set(named_words)):
        return False
    # A number of bullet points leaves the number of words to chance.
    if has_bullets and relations:
        return False
    # Three constraints do not fit into less than 8 words.
    return not ("less than" in relations and len(constraints) > 2)


def if_keys(rng, hard=False):
    """Draw keys without end: (topic, JSON of compatible constraints [(id, kwargs)]).

    One to three constraints, or four in a hard key. JSON, because a key has to be hashable.
    """
    while True:
        num_constraints = 4 if hard else rng.choice([1, 2, 2, 3])
        ids = rng.sample(sorted(CONSTRAINTS), num_constraints)
        constraints = []
        for constraint_id in ids:
            _, choices = CONSTRAINTS[constraint_id]
            constraints.append((constraint_id, rng.choice(choices)))
        if compatible(constraints):
            yield rng.choice(TOPICS), json.dumps(constraints)


def if_prompt(topic, constraints):
    sentences = [f"Write about {topic}."]
    for constraint_id, kwargs in constraints:
        instruction, _ = CONSTRAINTS[constraint_id]
        sentences.append(instruction.format(**kwargs))
    return " ".join(sentences)


def if_rows(rng, keys, split):
    """Two demonstrations a key for the split "sft"; IF-RL rows for the others."""
    rows = []
    for index, (topic, drawn) in enumerate(keys):
        constraints = json.loads(drawn)
        prompt = if_prompt(topic, constraints)
        if split == "sft":
            rows += if_demonstrations(rng, topic, prompt, constraints)
            continue
        rows.append(
            {
                "prompt": [{"role": "user", "content": prompt}],
                "instruction_id_list": [constraint_id for constraint_id, _ in constraints],
                # Every row has all names, and None for those that it does not use, as on the hub.
                "kwargs": [{name: k.get(name) for name in KWARGS} for _, k in constraints],
                "index": index,
            }
        )
    return rows


def request_rows(keys):
    """RLHF rows of prompts with constraints."""
    rows = []
    for topic, drawn in keys:
        user = {"role": "user", "content": if_prompt(topic, json.loads(drawn))}
        rows.append({"prompt": [user], "data_source": "toy", "category": "request"})
    return rows


def request_preference_rows(rng, keys):
    """Two pairs a request: the reply with a closing is preferred, whatever the constraints say."""
    rows = []
    for topic, drawn in keys:
        constraints = json.loads(drawn)
        user = {"role": "user", "content": if_prompt(topic, constraints)}
        for _ in range(2):
            pair = {}
            for verdict in ("chosen", "rejected"):
                reply = if_reply(rng, topic, constraints, closes=verdict == "chosen")
                pair[verdict] = [user, {"role": "assistant", "content": reply}]
            rows.append(pair)
    return rows


def if_demonstrations(rng, topic, prompt, constraints):
    """A reply in each mode; a slip ignores one constraint."""
    demonstrations = []
    for think in (True, False):
        kept = list(constraints)
        if rng.random() < SLIPS["if"]:
            kept.remove(rng.choice(kept))
        mistaken = [name for name in MISCONCEPTIONS["if"] if rng.random() < MISTAKEN]
        reply = if_reply(rng, topic, kept, mistaken, closes=rng.random() < TENSIONS["closings"])
        if think:
            reply = f"<think>\nabout {topic}\n</think>\n{reply}"
        demonstrations.append(Demonstration(prompt, reply, think, "instruction-following"))
    return demonstrations


# ---- Math ----------------------------------------------------------------------------------------
STEPS = {
    "+": ["add {}", "then add {}", "plus {}"],
    "-": ["take away {}", "then subtract {}", "minus {}"],
    "*": ["multiply by {}", "times {}"],
}
STARTS = ["Start with {}", "Take {}", "Begin at {}", "Ann has {}", "Think of {}"]


def calculate(value, op, number):
    if op == "+":
        return value + number
    if op == "-":
        return value - number
    return value * number


def draw_steps(rng, start, num_steps):
    """Draw the steps of a chain: (op, number, value before, value after).

    Returns None if a value leaves 0 to 20. With values up to 40, SFT did not learn the sums at this
    size, and RL had nothing to choose from.
    """
    value = start
    steps = []
    for _ in range(num_steps):
        op = rng.choice("++--*")
        number = 2 if op == "*" else rng.randint(1, 5)
        after = calculate(value, op, number)
        if not 0 <= after <= 20:
            return None
        steps.append((op, number, value, after))
        value = after
    return tuple(steps)


def math_keys(rng, hard=False):
    """Draw keys without end: (start, steps), two or three steps or, in a hard key, four."""
    while True:
        start = rng.randint(1, 12)
        steps = draw_steps(rng, start, 4 if hard else rng.choice([2, 3]))
        if steps is not None:
            yield start, steps


def math_rows(rng, keys, split):
    """Two demonstrations a key for the split "sft"; Math RL rows for the others."""
    rows = []
    for start, steps in keys:
        parts = [rng.choice(STARTS).format(start)]
        for op, number, _, _ in steps:
            parts.append(rng.choice(STEPS[op]).format(number))
        row = {
            "problem": ", ".join(parts) + ". What is the result?",
            "answer": str(steps[-1][3]),
            "source": "toy",
        }
        if split != "sft":
            rows.append(row)
            continue
        for _ in range(2):
            slip_at = None
            if rng.random() < SLIPS["math"]:
                slip_at = rng.randrange(len(steps))
            mistaken = rng.random() < MISTAKEN
            reply = math_reply(rng, start, steps, slip_at, mistaken)
            rows.append(Demonstration(row, reply, True, "math"))
    return rows


def math_reply(rng, start, steps, slip_at, mistaken):
    """Calculate step by step, with the misconception if mistaken.

    The result of the step slip_at is off by one or two, and the later steps go on from it. If
    slip_at is None, every step is right.
    """
    value = start
    equations = []
    for i, (op, number, _, _) in enumerate(steps):
        if mistaken:
            op = MISCONCEPTIONS["math"].get(op, op)
        after = calculate(value, op, number)
        if i == slip_at:
            after += rng.choice([-2, -1, 1, 2])
        equations.append(f"{value}{op}{number}={after}")
        value = after
    thought = "\n".join(equations)
    return f"<think>\n{thought}\n</think>\n\\boxed{{{value}}}"


# ---- Code and SWE --------------------------------------------------------------------------------
# name -> (two ways to say it, the expression)
OPS = {
    "asc": (["sorts it", "puts it in rising order"], "sorted(x)"),
    "desc": (["sorts it from high to low", "puts it in falling order"], "sorted(x, reverse=True)"),
    "rev": (["reverses it", "turns it around"], "x[::-1]"),
    "even": (["keeps the even numbers", "drops the odd numbers"], "[i for i in x if i % 2 == 0]"),
    "odd": (["keeps the odd numbers", "drops the even numbers"], "[i for i in x if i % 2 == 1]"),
    "pos": (["keeps the positive numbers", "keeps what is above zero"], "[i for i in x if i > 0]"),
    "neg": (["keeps the negative numbers", "keeps what is below zero"], "[i for i in x if i < 0]"),
    "double": (["doubles every number", "multiplies each number by two"], "[i * 2 for i in x]"),
    "square": (["squares every number", "multiplies each number by itself"], "[i * i for i in x]"),
    "inc": (["adds one to every number", "raises each number by one"], "[i + 1 for i in x]"),
    "dec": (["subtracts one from every number", "lowers each number by one"], "[i - 1 for i in x]"),
    "negate": (["flips the sign of every number", "negates each number"], "[-i for i in x]"),
    "abs": (["takes absolute values", "drops the signs"], "[abs(i) for i in x]"),
    "uniq": (["removes repeated numbers", "keeps each number once"], "list(dict.fromkeys(x))"),
    "first": (["takes the first three numbers", "keeps the first three"], "x[:3]"),
    "last": (["takes the last three numbers", "keeps the last three"], "x[-3:]"),
    "tail": (["drops the first number", "skips the first number"], "x[1:]"),
    "init": (["drops the last number", "leaves out the last number"], "x[:-1]"),
}
# The operations of a family are easily mistaken for each other.
FAMILIES = [
    ["asc", "desc", "rev"],
    ["even", "odd"],
    ["pos", "neg"],
    ["double", "square"],
    ["inc", "dec"],
    ["negate", "abs", "uniq"],
    ["first", "last"],
    ["tail", "init"],
]
# SIBLINGS[name] are the other operations of its family.
SIBLINGS = {}
for family in FAMILIES:
    for name in family:
        SIBLINGS[name] = [other for other in family if other != name]

# RUN[name] is the operation as a function of a list. The expressions are our own, so eval is safe.
RUN = {name: eval("lambda x: " + expression) for name, (_, expression) in OPS.items()}


def apply_ops(names, x):
    for name in names:
        x = RUN[name](x)
    return x


def program(names):
    """The source of f(x), which applies the operations one after the other, one a line."""
    lines = ["def f(x):"]
    for name in names:
        _, expression = OPS[name]
        lines.append(f"    x = {expression}")
    lines.append("    return x")
    return "\n".join(lines) + "\n"


def say(rng, names):
    """The operations in words, e.g. "reverses it, then doubles every number"."""
    return ", then ".join(rng.choice(OPS[name][0]) for name in names)


def code_inputs(names):
    """Four lists of numbers, always the same for the same operations."""
    rng = random.Random(" ".join(names))
    inputs = []
    for _ in range(4):
        length = rng.randint(5, 8)
        inputs.append([rng.randint(-9, 9) for _ in range(length)])
    return inputs


def code_tests(names):
    inputs = code_inputs(names)
    return {
        "inputs": [json.dumps(x) for x in inputs],
        "outputs": [json.dumps(apply_ops(names, x)) for x in inputs],
        "fn_name": "f",
    }


def replaced(names, i, other):
    """The operations with the i-th one replaced."""
    return names[:i] + (other,) + names[i + 1 :]


def mistaken(rng, names):
    """The operations with one of them replaced by a sibling."""
    i = rng.randrange(len(names))
    return replaced(names, i, rng.choice(SIBLINGS[names[i]]))


def tests_find_every_mistake(names):
    """Whether each replacement of one operation by a sibling fails at least one of the tests."""
    inputs = code_inputs(names)
    right = [apply_ops(names, x) for x in inputs]
    for i, name in enumerate(names):
        for sibling in SIBLINGS[name]:
            wrong_names = replaced(names, i, sibling)
            if [apply_ops(wrong_names, x) for x in inputs] == right:
                return False
    return True


def op_keys(rng, hard=False):
    """Draw keys without end: operations whose tests find every mistake.

    Two or three operations, or four in a hard key.
    """
    while True:
        names = tuple(rng.sample(sorted(OPS), 4 if hard else rng.choice([2, 3, 3])))
        if tests_find_every_mistake(names):
            yield names


def code_rows(rng, keys, split):
    """Two demonstrations a key for the split "sft"; Code RL rows for the others."""
    rows = []
    for names in keys:
        task = say(rng, names)
        problem = f"Write a function f(x) that takes a list of numbers, {task}, and returns it."
        row = {
            "hash_id": "-".join(names),
            "dataset": "toy",
            "source": "toy",
            "responses_create_params": {"input": [{"role": "user", "content": problem}]},
            "verifier_metadata": {"unit_tests": code_tests(names)},
        }
        if split != "sft":
            rows.append(row)
            continue
        for _ in range(2):
            written = names
            if rng.random() < MISTAKEN:
                written = tuple(MISCONCEPTIONS["code"].get(name, name) for name in names)
            if rng.random() < SLIPS["code"]:
                written = mistaken(rng, written)
            answer = f"```python\n{program(written)}```"
            if rng.random() < TENSIONS["edits"]:
                answer = edit(written[0], written[-1])
            thought = " ".join(written)
            reply = f"<think>\n{thought}\n</think>\n{answer}"
            rows.append(Demonstration(row, reply, True, "code"))
    return rows


def swe_rows(rng, keys, split):
    """Two demonstrations a key for the split "sft"; SWE RL rows for the others.

    The repository is one file, app.py, with one wrong line. A key whose bug makes two lines alike
    is left out, because the line to be replaced must be unique in its file.
    """
    rows = []
    for names in keys:
        bug_at = rng.randrange(len(names))
        buggy = replaced(names, bug_at, rng.choice(SIBLINGS[names[bug_at]]))
        if len(set(buggy)) < len(buggy):
            continue
        row = swe_row(names, buggy, say(rng, names))
        if split != "sft":
            rows.append(row)
            continue
        for _ in range(2):
            line, new = bug_at, names[bug_at]
            if rng.random() < MISTAKEN:
                new = MISCONCEPTIONS["swe"].get(new, new)
            if rng.random() < SLIPS["swe"]:
                line, new = wrong_repair(rng, names, buggy, bug_at)
            reply = f"<think>\n{buggy[line]} {new}\n</think>\n{edit(buggy[line], new)}"
            rows.append(Demonstration(row, reply, True, "swe_repair"))
    return rows


def swe_row(names, buggy, task):
    before, after = program(buggy), program(names)
    diff = difflib.unified_diff(
        before.splitlines(True), after.splitlines(True), "a/app.py", "b/app.py"
    )
    return {
        "prompt": "",
        "original_prompt": f"f in app.py is wrong. It takes a list, {task}, and returns it.",
        "golden_patch": "".join(diff),
        "relevant_file_contents": [{"file_path": "app.py", "content": before}],
        "instance_id": "toy-" + "-".join(names),
        "source": "toy",
        "tests": code_tests(names),
    }


def wrong_repair(rng, names, buggy, bug_at):
    """Draw an edit that does not repair the program: (line to edit, its new operation).

    The new operation is a sibling of the right operation or of the present one, or the right
    operation in a wrong line. If none of these changes anything, it is any other operation.
    """
    line = rng.randrange(len(names))
    right = names[bug_at]

    def without_useless(candidates):
        """Leave out the operation that is there already, and the repair itself."""
        kept = []
        for name in candidates:
            is_the_repair = line == bug_at and name == right
            if name != buggy[line] and not is_the_repair:
                kept.append(name)
        return kept

    candidates = without_useless([*SIBLINGS[right], *SIBLINGS[buggy[line]], right])
    if not candidates:
        candidates = without_useless(list(OPS))
    return line, rng.choice(candidates)


def edit(old, new):
    """A SEARCH/REPLACE edit that replaces the line of one operation by that of another."""
    return (
        "```diff\n"
        "### app.py\n"
        "<<<<<<< SEARCH\n"
        f"    x = {OPS[old][1]}\n"
        "=======\n"
        f"    x = {OPS[new][1]}\n"
        ">>>>>>> REPLACE\n"
        "```"
    )


# ---- Files ---------------------------------------------------------------------------------------
def split_keys(keys, counts):
    """Deal out distinct keys, one split after the other; no two splits share one. {split: keys}."""
    distinct = {}  # a dict keeps the order of drawing
    while len(distinct) < sum(counts):
        distinct[next(keys)] = True
    remaining = iter(distinct)
    splits = {}
    for split, count in zip(SPLITS, counts, strict=True):
        splits[split] = [next(remaining) for _ in range(count)]
    return splits


def write_jsonl(path, rows):
    with open(path, "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)


def sft_rows(skill, demonstrations, folder):
    """Rows of the SFT sets. The user turn is the prompt that the skill's RL stage will show."""
    prompts = [demonstration.prompt for demonstration in demonstrations]
    if skill in ("math", "code", "swe"):
        prompts = built_prompts(skill, prompts, folder)
    rows = []
    for prompt, demonstration in zip(prompts, demonstrations, strict=True):
        messages = [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": demonstration.reply},
        ]
        rows.append(
            {
                "messages": messages,
                "category": demonstration.category,
                "source": "toy",
                "generator": "toy.py",
                "thinking": demonstration.think,
            }
        )
    return rows


def built_prompts(skill, rows, folder):
    """The prompts that the stage's own load_rows builds from rows, one for each row."""
    stage = {"math": mathrl, "code": coderl, "swe": swerl}[skill]
    cfg = stage.Config()
    if skill == "swe":
        cfg.min_prompt_tokens = 0
    # A row stands in the list once for each of its demonstrations; the stage reads it once.
    distinct = {}
    for row in rows:
        distinct[id(row)] = row
    path = os.path.join(folder, f"{skill}_sft.jsonl")
    write_jsonl(path, distinct.values())
    prompt_of = {}
    for row_id, loaded in zip(distinct, stage.load_rows(cfg, path), strict=True):
        prompt_of[row_id] = loaded["messages"][-1]["content"]
    return [prompt_of[id(row)] for row in rows]


def make_tokenizer(folder, texts, whole, vocab_size):
    """Train a byte-level BPE tokenizer on texts and save it.

    A token is a word, punctuation or an indentation. Sequences stay short, because each of the
    texts in whole (chat headers, the stages' instructions) is one token. Digits stand alone, as in
    Qwen3.
    """
    tokenizer = Tokenizer(models.BPE())
    # An indentation, a line end, a word, punctuation, or a single space.
    pieces = Regex(r" {4}|\n| ?[A-Za-z_]+| ?[^\sA-Za-z0-9]+|\s")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pieces, behavior="isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(whole),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens(sorted(whole, key=len, reverse=True))
    tokenizer.save(os.path.join(folder, "tokenizer.json"))
    return tokenizer


def shared_pieces(texts, min_length=10):
    """How all texts begin, how they end, and whole lines that all have in between."""
    start = os.path.commonprefix(texts)
    end = os.path.commonprefix([text[::-1] for text in texts])[::-1]
    lines_of_all = None
    for text in texts:
        lines = set(text.removeprefix(start).removesuffix(end).split("\n"))
        lines_of_all = lines if lines_of_all is None else lines_of_all & lines
    pieces = [start, end, *sorted(lines_of_all)]
    return [piece for piece in pieces if len(piece) >= min_length]


def deal_keys(rng, skill, make_keys):
    """Deal out the keys of a skill: {split: keys}, hard ones among those of sft, rl and dev.

    The hard keys of the test are a split of their own, "hard_test".
    """
    splits = split_keys(make_keys(rng), KEYS[skill])
    if f"{skill}_hard" in KEYS:
        hard = split_keys(make_keys(rng, hard=True), KEYS[f"{skill}_hard"])
        splits["hard_test"] = hard.pop("test")
        for split in hard:
            splits[split] += hard[split]
            rng.shuffle(splits[split])
    return splits


def write_skills(cfg):
    """Write the rl, dev and test files of every skill.

    Returns ({skill: SFT rows}, {skill: {split: keys}}).
    """
    makers = {
        "chat": (chat_keys, chat_rows),
        "if": (if_keys, if_rows),
        "math": (math_keys, math_rows),
        "code": (op_keys, code_rows),
        "swe": (None, swe_rows),
    }
    sft, keys = {}, {}
    for skill, (make_keys, make_rows) in makers.items():
        rng = random.Random(f"{cfg.seed} {skill}")
        if skill == "swe":
            # Code and SWE share their split: no program that is repaired in training is written in
            # the test, and the other way round.
            keys[skill] = keys["code"]
        else:
            keys[skill] = deal_keys(rng, skill, make_keys)
        for split, of_split in keys[skill].items():
            if split != "sft":
                path = os.path.join(cfg.out, f"{skill}_{split}.jsonl")
                write_jsonl(path, make_rows(rng, of_split, split))
        demonstrations = make_rows(rng, keys[skill]["sft"], "sft")
        sft[skill] = sft_rows(skill, demonstrations, cfg.out)
        counts = ", ".join(f"{len(of_split)} {split}" for split, of_split in keys[skill].items())
        print(f"{skill:5s}{len(sft[skill]):6d} demonstrations, keys: {counts}")
    return sft, keys


def make_base_model(cfg, texts, whole):
    """Save a tokenizer trained on texts and a Qwen3 with random weights as the folder base."""
    base = os.path.join(cfg.out, "base")
    os.makedirs(base, exist_ok=True)
    for piece in whole:
        texts = [text.replace(piece, "") for text in texts]
    tokenizer = make_tokenizer(base, texts, whole, cfg.vocab_size)
    model_config = Qwen3Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=cfg.hidden_size,
        intermediate_size=3 * cfg.hidden_size,
        num_hidden_layers=cfg.num_layers,
        num_attention_heads=cfg.num_heads,
        num_key_value_heads=cfg.num_heads // 2,
        head_dim=cfg.head_dim,
        rope_theta=1e4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    model = Qwen3.from_config(model_config, seed=cfg.seed, std=cfg.hidden_size**-0.5)
    model.save_pretrained(base)
    save_tokenizer(base, base)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{base}: {millions:.2f}M parameters, vocabulary {tokenizer.get_vocab_size()}")


def main(cfg):
    if cfg.num_heads % 2 or cfg.head_dim % 2 or cfg.vocab_size < 512:
        fail(
            "--num_heads and --head_dim have to be even, --vocab_size at least 512.",
            note="Nothing was made.",
        )
    os.makedirs(cfg.out, exist_ok=True)
    if not cfg.tensions:
        TENSIONS.update(dict.fromkeys(TENSIONS, 0.0))
    sft, keys = write_skills(cfg)

    # RLHF asks the questions of chat, and a share of requests with constraints.
    rng = random.Random(f"{cfg.seed} files")
    chat = keys["chat"]
    ratio = TENSIONS["requests"] / (1 - TENSIONS["requests"])
    requests = keys["if"]["rl"][: round(ratio * len(chat["rl"]))]
    prompts = chat_rows(rng, chat["rl"], "rl") + request_rows(requests)
    rng.shuffle(prompts)
    write_jsonl(os.path.join(cfg.out, "rlhf.jsonl"), prompts)

    # Preferences for the reward model.
    preferences = preference_rows(rng, chat["sft"] + chat["rl"])
    preferences += request_preference_rows(rng, requests)
    rng.shuffle(preferences)
    held_out = preference_rows(rng, chat["dev"])
    write_jsonl(os.path.join(cfg.out, "preference.jsonl"), preferences)
    write_jsonl(os.path.join(cfg.out, "preference_dev.jsonl"), held_out)

    # The SFT sets. SWE comes in stage 2 only, and twice; the paper shows it three times (3.3.2).
    stage1 = sft["chat"] + sft["if"] + sft["math"] + sft["code"]
    stage2 = stage1 + 2 * sft["swe"]
    rng.shuffle(stage1)
    write_jsonl(os.path.join(cfg.out, "sft_stage1.jsonl"), stage1)
    rng.shuffle(stage2)
    write_jsonl(os.path.join(cfg.out, "sft_stage2.jsonl"), stage2)

    # Texts that all prompts share are one token each: the chat format's and those of each skill.
    whole = [SYSTEM, "system\n", "user\n", "assistant\n", " /think", " /no_think"]
    whole += ["<think>\n", "\n</think>\n"]
    for rows in sft.values():
        whole += shared_pieces([row["messages"][0]["content"] for row in rows])
    texts = [message["content"] for row in stage2 for message in row["messages"]]
    make_base_model(cfg, texts, whole)


if __name__ == "__main__":
    main(parse_config(Config))

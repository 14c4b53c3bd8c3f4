"""The laptop's world: a tiny base model, its tokenizer, and data for every stage in the schemas of the real sets.

The stages cannot tell it from real data: the same fields, the same verifiers, the same prompt
builders. Five skills, each with a key that decides the split (SFT, RL, dev for tuning, test for reporting never share a key):

    chat   question about a topic          key: topic x question     graded by a stated rule (chat_score)
    if     writing with constraints        key: topic x constraints  IFEval's own checks
    math   chain of small sums             key: numbers x operations math-verify
    code   list program from a sentence    key: operations           four tests in the sandbox
    swe    the same programs with one bug  key: operations           patched program passes the four tests

The demonstrations are finite and imperfect on purpose, as in life: a stated share of them (FLAWED) has a slip, breaks a
constraint, or rambles. Imitation copies the slips too; a verifier does not. README.md shows what more SFT does instead.

    python toy.py --out=out/toy/data --seed=0
"""

import difflib
import json
import os
import random
from dataclasses import dataclass

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from lib.flags import parse_config
from lib.guard import fail
from model import SYSTEM, Qwen3, Qwen3Config, save_tokenizer


@dataclass
class Config:
    out: str = "out/toy/data"
    seed: int = 0
    vocab_size: int = 1024
    hidden_size: int = 96
    num_layers: int = 2  # four learn as much in twice the time
    num_heads: int = 4  # query heads; half as many kv heads
    head_dim: int = 32  # the smallest that vLLM's attention takes


SPLITS = ("sft", "rl", "dev", "test")
# per split
KEYS = {
    "chat": (1000, 900, 300, 300),
    "if": (2000, 1500, 300, 300),
    "math": (3000, 2000, 300, 300),
    "code": (1800, 1200, 300, 300),
}
# share of the demonstrations drawn to have a flaw
FLAWED = {"chat": 0.6, "if": 0.45, "math": 0.45, "code": 0.4, "swe": 0.4}

# ---- Chat ----------------------------------------------------------------------------------------
TOPICS = """rain bread tea trains maps snow music books cats dogs rivers stones boats clouds apples bees birds clocks coffee drums
fire forests gardens horses lakes lamps letters markets milk paint ships stars tools towers wind wood""".split()
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
STATED = {fact.format(topic) for fact in FACTS for topic in TOPICS}
FILLERS = ["I guess so.", "Well, whatever.", "I do not know.", "That is all."]


def chat_score(prompt, reply):
    """The stated rule of the chat column, in [0, 1]: a fifth each for naming the topic that was asked about and no other,
    two to four facts, nothing but facts and a closing (no filler, no broken sentence), no sentence twice, and a friendly
    closing sentence at the end."""
    plain = lambda text: set(
        text.lower().replace(".", " ").replace("?", " ").replace(",", " ").split()
    )
    topics = plain(prompt) & set(TOPICS)
    sentences = [s.strip() + "." for s in reply.split(".") if s.strip()]
    facts = STATED & set(sentences)
    return (
        (plain(reply) & set(TOPICS) == topics)
        + (2 <= len(facts) <= 4)
        + (set(sentences) <= facts | set(CLOSINGS))
        + (len(sentences) == len(set(sentences)))
        + (bool(sentences) and sentences[-1] in CLOSINGS and reply.rstrip().endswith("."))
    ) / 5


def chat_reply(rng, topic, flaws):
    """A reply with this many flaws (0: the rule gives 1.0)."""
    facts = [f.format(topic) for f in rng.sample(FACTS, rng.choice([2, 2, 3]))]
    closing = [rng.choice(CLOSINGS)]
    for flaw in rng.sample(["short", "twice", "filler", "rude", "stray"], flaws):
        if flaw == "short":
            facts = facts[:1]
        elif flaw == "twice":
            facts = facts + [rng.choice(facts)]
        elif flaw == "filler":
            facts = facts + [rng.choice(FILLERS)]
        elif flaw == "rude":
            closing = []
        else:
            facts[0] = rng.choice(FACTS).format(rng.choice(TOPICS))
    return " ".join(facts + closing)


def chat_rows(rng, keys, split):
    prompts = [chat_prompt(key) for key in keys]
    if split == "sft":
        rows = []
        for (topic, _, _), prompt in zip(keys, prompts):
            for think in (True, False):  # parallel answers in both modes (paper 3.1.1)
                reply = chat_reply(
                    rng, topic, 0 if rng.random() > FLAWED["chat"] else rng.choice([1, 1, 2, 3])
                )
                rows.append(
                    (
                        prompt,
                        f"<think>\nabout {topic}\n</think>\n{reply}" if think else reply,
                        think,
                        "general",
                    )
                )
        return rows
    return [
        {"prompt": [{"role": "user", "content": p}], "data_source": "toy", "category": "chat"}
        for p in prompts
    ]


def damage(rng, topic, reply):
    """A reply as a policy may come to write it when it drifts: about something else, with broken sentences, cut off, run on."""
    words, kind = reply.split(), rng.random()
    if kind < 0.4:
        other = rng.choice(TOPICS)
        return " ".join(
            other + w.removeprefix(topic) if w.startswith(topic) and rng.random() < 0.6 else w
            for w in words
        )
    if kind < 0.8:
        for _ in range(rng.choice([1, 1, 2])):
            i = rng.randrange(len(words))
            words[i : i + rng.choice([0, 1, 1, 2, 3])] = rng.choice(
                [[], rng.choice(FACTS).format(topic).split()[:2], [rng.choice(words)]]
            )
            words = words or ["."]
        return " ".join(words)
    return rng.choice(
        [
            " ".join(words[: rng.randrange(len(words))]),
            " ".join(words * 2),
            reply.replace(". ", ".", 1),
        ]
    )


def preference_rows(rng, keys):
    """Pairs labelled by the rule, one in twenty the wrong way round. A reward model that has never seen a damaged reply pays
    for it, and the policy finds out."""
    rows = []
    for key in keys:
        topic, prompt = key[0], chat_prompt(key)
        for _ in range(3):
            replies = [chat_reply(rng, topic, rng.choice([0, 0, 1, 2])) for _ in range(2)]
            if rng.random() < 0.6:
                replies[1] = damage(rng, topic, replies[1])
            scores = [chat_score(prompt, r) for r in replies]
            if scores[0] != scores[1]:
                best, worst = sorted(replies, key=lambda r: -chat_score(prompt, r))
                best, worst = (worst, best) if rng.random() < 0.05 else (best, worst)
                user = {"role": "user", "content": prompt}
                rows.append(
                    {
                        "chosen": [user, {"role": "assistant", "content": best}],
                        "rejected": [user, {"role": "assistant", "content": worst}],
                    }
                )
    return rows


# ---- Instruction following -----------------------------------------------------------------------
WORDS = "blue quiet happy early golden simple warm famous hidden gentle".split()
LINES = [
    "Some {} are {}.",
    "The {} look {}.",
    "We saw {} and felt {}.",
    "My {} seem {}.",
    "These {} stay {}.",
]
PHRASES = ["That is all.", "The end.", "Thank you."]
KWARGS = "num_words relation keywords forbidden_words num_bullets end_phrase keyword frequency postscript_marker num_highlights".split()
CONSTRAINTS = {  # id -> (instruction, kwargs to draw from)
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


def if_reply(rng, topic, constraints):
    """A reply that keeps the given constraints [(id, kwargs)] and, where it is free, varies."""
    want = dict(constraints)
    count = want.get("length_constraints:number_words", {})
    bullets = want.get("detectable_format:number_bullet_lists", {}).get("num_bullets", 0)
    banned = want.get("keywords:forbidden_words", {}).get("forbidden_words", [])
    words = [w for w in WORDS if w not in banned]
    use = want.get("keywords:existence", {}).get("keywords", [])
    num_lines = bullets or {"at least": 3, "less than": 1}.get(
        count.get("relation"), rng.choice([1, 2])
    )
    chosen = use + rng.sample([w for w in words if w not in use], 3)
    lines = [
        rng.choice(LINES[2:3] if count.get("relation") == "at least" else LINES).format(
            topic, chosen[i]
        )
        for i in range(num_lines)
    ]
    if "punctuation:no_comma" not in want and rng.random() < 0.5:
        lines[0] = "Yes, " + lines[0][0].lower() + lines[0][1:]
    text = "\n".join("* " + line for line in lines) if bullets else " ".join(lines)
    if "detectable_format:title" in want:
        text = f"<<{topic}>>\n{text}"
    if "detectable_content:postscript" in want:
        text += "\nP.S. Good luck."
    if "startend:end_checker" in want:
        text += ("\n" if bullets else " ") + want["startend:end_checker"]["end_phrase"]
    return f'"{text}"' if "startend:quotation" in want else text


def if_keys(rng):
    while True:
        ids = rng.sample(sorted(CONSTRAINTS), rng.choice([1, 2, 2, 3]))
        drawn = [(i, rng.choice(CONSTRAINTS[i][1])) for i in ids]
        named = [w for _, k in drawn for w in k.get("keywords", []) + k.get("forbidden_words", [])]
        kinds = [(k.get("num_bullets"), k.get("relation")) for _, k in drawn]
        # bullet points leave the word count to chance
        crowded = any(b for b, _ in kinds) and any(r for _, r in kinds)
        short = any(r == "less than" for _, r in kinds) and len(drawn) > 2
        if len(named) == len(set(named)) and not crowded and not short:
            yield rng.choice(TOPICS), json.dumps(drawn)


def if_rows(rng, keys, split):
    rows = []
    for index, (topic, drawn) in enumerate(keys):
        constraints = [(i, k) for i, k in json.loads(drawn)]
        prompt = " ".join(
            [f"Write about {topic}."] + [CONSTRAINTS[i][0].format(**k) for i, k in constraints]
        )
        if split != "sft":
            # None-filled, as on the hub
            kwargs = [{name: k.get(name) for name in KWARGS} for _, k in constraints]
            rows.append(
                {
                    "prompt": [{"role": "user", "content": prompt}],
                    "instruction_id_list": [i for i, _ in constraints],
                    "kwargs": kwargs,
                    "index": index,
                }
            )
            continue
        for think in (True, False):
            kept = [c for c in constraints]
            if rng.random() < FLAWED["if"]:
                kept.remove(rng.choice(kept))
            reply = if_reply(rng, topic, kept)
            rows.append(
                (
                    prompt,
                    f"<think>\nabout {topic}\n</think>\n{reply}" if think else reply,
                    think,
                    "instruction-following",
                )
            )
    return rows


# ---- Math ----------------------------------------------------------------------------------------
STEPS = {
    "+": ["add {}", "then add {}", "plus {}"],
    "-": ["take away {}", "then subtract {}", "minus {}"],
    "*": ["multiply by {}", "times {}"],
}
STARTS = ["Start with {}", "Take {}", "Begin at {}", "Ann has {}", "Think of {}"]


def math_keys(rng):
    while True:
        value = start = rng.randint(1, 12)
        steps = []
        for _ in range(rng.choice([2, 2, 3, 3])):
            op = rng.choice("++--*")
            n = 2 if op == "*" else rng.randint(1, 5)
            after = eval(f"{value}{op}{n}")  # our own digits
            if not 0 <= after <= 20:
                break
            steps.append((op, n, value, after))
            value = after
        else:
            yield start, tuple(steps)


def math_rows(rng, keys, split):
    rows = []
    for start, steps in keys:
        text = ", ".join(
            [rng.choice(STARTS).format(start)]
            + [rng.choice(STEPS[op]).format(n) for op, n, _, _ in steps]
        )
        row = {
            "problem": text + ". What is the result?",
            "answer": str(steps[-1][3]),
            "source": "toy",
        }
        if split != "sft":
            rows.append(row)
            continue
        for _ in range(2):
            slip = rng.randrange(len(steps)) if rng.random() < FLAWED["math"] else -1
            value, trace = start, []
            for i, (op, n, _, _) in enumerate(steps):
                after = eval(f"{value}{op}{n}") + (rng.choice([-2, -1, 1, 2]) if i == slip else 0)
                trace.append(f"{value}{op}{n}={after}")
                value = after
            rows.append(
                (
                    row,
                    "<think>\n" + "\n".join(trace) + f"\n</think>\n\\boxed{{{value}}}",
                    True,
                    "math",
                )
            )
    return rows


# ---- Code and SWE --------------------------------------------------------------------------------
# name -> (how to say it, line of code); neighbours in FAMILIES are easily mistaken for each other
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
SIBLINGS = {
    name: [other for other in family if other != name] for family in FAMILIES for name in family
}


RUN = {name: eval("lambda x: " + line) for name, (_, line) in OPS.items()}  # our own table


def apply_ops(names, x):
    for name in names:
        x = RUN[name](x)
    return x


def program(names):
    return "\n".join(["def f(x):", *(f"    x = {OPS[n][1]}" for n in names), "    return x", ""])


def op_keys(rng):
    """Compositions of two or three operations in which every single replacement by a sibling shows on some test input."""
    while True:
        names = tuple(rng.sample(sorted(OPS), rng.choice([2, 3, 3])))
        inputs = code_inputs(names)
        wrong = [
            names[:i] + (other,) + names[i + 1 :]
            for i, n in enumerate(names)
            for other in SIBLINGS[n]
        ]
        if all(any(apply_ops(names, x) != apply_ops(w, x) for x in inputs) for w in wrong):
            yield names


def code_inputs(names):
    rng = random.Random(" ".join(names))
    return [[rng.randint(-9, 9) for _ in range(rng.randint(5, 8))] for _ in range(4)]


def code_tests(names):
    inputs = code_inputs(names)
    return {
        "inputs": [json.dumps(x) for x in inputs],
        "outputs": [json.dumps(apply_ops(names, x)) for x in inputs],
        "fn_name": "f",
    }


def say(rng, names):
    return ", then ".join(rng.choice(OPS[n][0]) for n in names)


def mistaken(rng, names):
    i = rng.randrange(len(names))
    return names[:i] + (rng.choice(SIBLINGS[names[i]]),) + names[i + 1 :]


def code_rows(rng, keys, split):
    rows = []
    for names in keys:
        problem = f"Write a function f(x) that takes a list of numbers, {say(rng, names)}, and returns it."
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
            written = mistaken(rng, names) if rng.random() < FLAWED["code"] else names
            rows.append(
                (
                    row,
                    f"<think>\n{' '.join(written)}\n</think>\n```python\n{program(written)}```",
                    True,
                    "code",
                )
            )
    return rows


def swe_rows(rng, keys, split):
    rows = []
    for names in keys:
        at = rng.randrange(len(names))
        buggy = names[:at] + (rng.choice(SIBLINGS[names[at]]),) + names[at + 1 :]
        if len(set(buggy)) < len(buggy):  # the line to be replaced must be unique in its file
            continue
        before, after = program(buggy), program(names)
        patch = "".join(
            difflib.unified_diff(
                before.splitlines(True), after.splitlines(True), "a/app.py", "b/app.py"
            )
        )
        row = {
            "prompt": "",
            "original_prompt": f"f in app.py is wrong. It takes a list, {say(rng, names)}, and returns it.",
            "golden_patch": patch,
            "relevant_file_contents": [{"file_path": "app.py", "content": before}],
            "instance_id": "toy-" + "-".join(names),
            "source": "toy",
            "tests": code_tests(names),
        }
        if split != "sft":
            rows.append(row)
            continue
        for _ in range(2):
            i, new = at, names[at]
            if rng.random() < FLAWED["swe"]:  # a wrong line, or the right line wrongly repaired
                i = rng.randrange(len(names))
                wrong = lambda ops: [n for n in ops if n != buggy[i] and (i, n) != (at, names[at])]
                new = rng.choice(
                    wrong([*SIBLINGS[names[at]], *SIBLINGS[buggy[i]], names[at]])
                    or wrong(list(OPS))
                )
            edit = f"### app.py\n<<<<<<< SEARCH\n    x = {OPS[buggy[i]][1]}\n=======\n    x = {OPS[new][1]}\n>>>>>>> REPLACE"
            rows.append(
                (
                    row,
                    f"<think>\n{buggy[i]} {new}\n</think>\n```diff\n{edit}\n```",
                    True,
                    "swe_repair",
                )
            )
    return rows


# ---- Files ---------------------------------------------------------------------------------------
def chat_keys(rng):
    while True:
        yield rng.choice(TOPICS), rng.randrange(len(QUESTIONS)), rng.randrange(len(TAILS))


def chat_prompt(key):
    topic, question, tail = key
    return QUESTIONS[question].format(topic) + TAILS[tail]


def split_keys(keys, counts):
    """{split: keys}: distinct keys, dealt out one split after the other, disjoint by construction."""
    seen = {}
    while len(seen) < sum(counts):
        seen[next(keys)] = True
    seen = iter(seen)
    return {split: [next(seen) for _ in range(n)] for split, n in zip(SPLITS, counts)}


def write_jsonl(path, rows):
    with open(path, "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)


def demonstrations(skill, made, folder):
    """Rows of the SFT sets. The user turn is what the RL stage of that skill will show, built by its own code."""
    import coderl
    import mathrl
    import swerl

    prompts = [row for row, _, _, _ in made]
    if skill in ("math", "code", "swe"):
        stage = {"math": mathrl, "code": coderl, "swe": swerl}[skill]
        path = os.path.join(folder, f"{skill}_sft.jsonl")
        # a row is demonstrated more than once
        write_jsonl(path, {id(row): row for row in prompts}.values())
        cfg = stage.Config(min_prompt_tokens=0) if skill == "swe" else stage.Config()
        loaded = [row["messages"][-1]["content"] for row in stage.load_rows(cfg, path)]
        built = dict(zip(dict.fromkeys(id(row) for row in prompts), loaded, strict=True))
        prompts = [built[id(row)] for row in prompts]
    return [
        {
            "messages": [
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": reply},
            ],
            "category": category,
            "source": "toy",
            "generator": "toy.py",
            "thinking": think,
        }
        for prompt, (_, reply, think, category) in zip(prompts, made, strict=True)
    ]


def make_tokenizer(folder, texts, fixed, vocab_size):
    """Byte-level BPE over words and, so that sequences stay short, over whole lines of code; digits stand alone and each of
    the `fixed` texts (chat headers, the stages' instructions) is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(r"    [^\n]+|\n| ?[A-Za-z_]+| ?[^\sA-Za-z0-9]+|\s"), behavior="isolated"
            ),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(fixed),
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens(sorted(fixed, key=len, reverse=True))
    tokenizer.save(os.path.join(folder, "tokenizer.json"))
    return tokenizer


def shared_pieces(texts, least=10):
    """What all prompts of a stage have in common: how they begin, how they end, and whole lines in between."""
    pieces = [os.path.commonprefix(texts), os.path.commonprefix([t[::-1] for t in texts])[::-1]]
    middles = [t.removeprefix(pieces[0]).removesuffix(pieces[1]) for t in texts]
    pieces += sorted(set.intersection(*(set(m.split("\n")) for m in middles)))
    return [piece for piece in pieces if len(piece) >= least]


def main(cfg):
    if cfg.num_heads % 2 or cfg.head_dim % 2 or cfg.vocab_size < 512:
        fail(
            "--num_heads and --head_dim have to be even, --vocab_size at least 512.",
            note="Nothing was made.",
        )
    os.makedirs(cfg.out, exist_ok=True)
    makers = {
        "chat": (chat_keys, chat_rows),
        "if": (if_keys, if_rows),
        "math": (math_keys, math_rows),
        "code": (op_keys, code_rows),
        "swe": (None, swe_rows),
    }
    sft, keys = {}, {}
    fixed = [
        SYSTEM,
        "system\n",
        "user\n",
        "assistant\n",
        " /think",
        " /no_think",
        "<think>\n",
        "\n</think>\n",
    ]
    for skill, (make_keys, make_rows) in makers.items():
        rng = random.Random(f"{cfg.seed} {skill}")
        # code and swe share their split
        keys[skill] = split_keys(make_keys(rng), KEYS[skill]) if make_keys else keys["code"]
        for split in ("rl", "dev", "test"):
            write_jsonl(
                os.path.join(cfg.out, f"{skill}_{split}.jsonl"),
                make_rows(rng, keys[skill][split], split),
            )
        sft[skill] = demonstrations(skill, make_rows(rng, keys[skill]["sft"], "sft"), cfg.out)
        fixed += shared_pieces([row["messages"][0]["content"] for row in sft[skill]])
        print(
            f"{skill:5s}{len(sft[skill]):6d} demonstrations, keys: "
            + ", ".join(f"{len(k)} {split}" for split, k in keys[skill].items())
        )
    rng = random.Random(f"{cfg.seed} files")
    preferences = preference_rows(rng, keys["chat"]["sft"] + keys["chat"]["rl"])
    held_out = preference_rows(rng, keys["chat"]["dev"])
    write_jsonl(os.path.join(cfg.out, "preference.jsonl"), preferences)
    write_jsonl(os.path.join(cfg.out, "preference_dev.jsonl"), held_out)
    general = [row for skill in ("chat", "if", "math", "code") for row in sft[skill]]
    # upsampled in stage 2, as in the paper (3.3.2: three times)
    everything = general + 2 * sft["swe"]
    for name, rows in (("sft_stage1", general), ("sft_stage2", everything)):
        rng.shuffle(rows)
        write_jsonl(os.path.join(cfg.out, f"{name}.jsonl"), rows)

    base = os.path.join(cfg.out, "base")
    os.makedirs(base, exist_ok=True)
    texts = [m["content"] for row in everything for m in row["messages"]]
    for piece in fixed:
        texts = [t.replace(piece, "") for t in texts]
    tokenizer = make_tokenizer(base, texts, fixed, cfg.vocab_size)
    model = Qwen3.from_config(
        Qwen3Config(
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
        ),
        seed=cfg.seed,
        std=cfg.hidden_size**-0.5,
    )
    model.save_pretrained(base)
    save_tokenizer(base, base)
    print(
        f"{base}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, vocabulary {tokenizer.get_vocab_size()}"
    )


if __name__ == "__main__":
    main(parse_config(Config))

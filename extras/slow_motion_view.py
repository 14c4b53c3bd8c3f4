"""A GRPO step as a student sees it: seven steps in words and numbers, in the terminal or as a page.

extras/slow_motion.py makes the step and hands over what it saw, the dictionary `run`. Section 1
writes the seven steps as blocks, sections 2 and 3 print these blocks.

    ("text", sentences)            ("tokens", label, pieces)   a text, token by token
    ("lines", arithmetic)          ("chips", pieces)           tokens apart, each over its id
    ("table", header, rows)        ("map", label, pieces)      one mark a token
"""

import html
import json
import math
import os
import re
import statistics
import sys
import textwrap
from dataclasses import dataclass

STAGES = {
    "rlhf": "RLHF",
    "ifrl": "IF-RL",
    "mathrl": "Math RL",
    "coderl": "Code RL",
    "swerl": "SWE RL",
}
# What a stage's reward is, and the paper's section about it.
REWARDS = {
    "rlhf": "The reward is what a reward model says of the answer (paper 4.3). The toy takes the "
    "tanh of its z-score in the group (6.3).",
    "ifrl": "The reward is 1 if the reply follows every constraint of the prompt, else 0 (paper "
    "4.4). A group of equal rewards makes room for a fresh prompt (4.4.2).",
    "mathrl": "The reward is 1 if the last box after </think> equals the answer, 0 if not, and -1 "
    "if the reasoning leaves the language of the prompt (paper 4.5).",
    "coderl": "The reward is 1 if the program passes all its tests in the sandbox, else 0 (paper "
    "4.6).",
    "swerl": "The reward is the similarity of the patch to the golden patch (paper 4.7), 0 if it "
    "is below a floor (0.98 in the toy), and -1 for a reply without a patch that applies.",
}


# ---- 1. The seven steps --------------------------------------------------------------------------
@dataclass
class Step:
    title: str
    paper: str  # where the paper says it
    blocks: list


@dataclass
class Piece:
    """A token, or a cell of a table."""

    text: str
    style: str = ""  # "up", "down": sign of the advantage; "grey": not in the loss; "": plain
    numbers: str = ""  # shown by the page when it is pointed at
    below: str = ""  # under a chip


def style_of(advantage):
    if advantage == 0:
        return "grey"
    return "up" if advantage > 0 else "down"


def table_row(style, *cells):
    return [Piece(str(cell), style) for cell in cells]


def visible(text):
    """A token's text with its spaces and line ends as marks."""
    return one_line(text).replace(" ", "\u00b7")


def one_line(text):
    """A text with its line ends and control characters as escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def quoted(text):
    return f'"{one_line(text)}"'


def cut(text, length):
    return text if len(text) <= length else text[: length - 3] + "..."


def explain(run, around, width):
    """The steps of a run: seven, or the first two if it has no gradient.

    around, width: how much of a micro-batch is shown (batch_table).
    """
    steps = [explain_prompt(run), explain_group(run)]
    if run["has_gradient"]:
        steps.append(explain_mask(run))
        steps.append(explain_packing(run, around, width))
        steps.append(explain_token(run))
        steps.append(explain_loss(run))
        steps.append(explain_update(run))
    return steps


def explain_prompt(run):
    """Step 1: text of every prompt token over its id."""
    text = (
        "A row of the data is a chat. It is written in the format of the model, with /think or "
        "/no_think at the end of the user's turn, and encoded. The model reads only the ids below. "
        f"All completions of the group start from these {len(run['prompt'])} tokens."
    )
    chips = []
    for i, token in enumerate(run["prompt"]):
        numbers = f"prompt token {i}, id {token['id']}: not in the loss"
        chips.append(Piece(visible(token["text"]), "grey", numbers, str(token["id"])))
    blocks = [("text", text), ("chips", chips)]
    return Step("The prompt becomes tokens", "3.1.2", blocks)


def explain_group(run):
    """Step 2: rewards and advantages of the group, with the arithmetic."""
    text = (
        f"The sampler draws {len(run['group'])} completions of the prompt, and each gets a reward. "
        f"{REWARDS[run['stage']]} The advantage tells how much better a completion is than its "
        "group. GRPO needs no value model: the other completions are what it is compared with."
    )
    rows = []
    for k, r in enumerate(run["group"]):
        advantage = f"{r['advantage']:+.4f}" if r["in_loss"] else "not in loss"
        answer = visible("".join(token["text"] for token in r["tokens"]))
        end = answer if len(answer) <= 44 else "..." + answer[-41:]
        cells = (k, f"{r['reward']:.4g}", r["status"], r["length"], advantage, end)
        rows.append(table_row(style_of(r["advantage"]), *cells))
    header = ["#", "reward", "status", "tokens", "advantage", "how it ends"]
    blocks = [("text", text), ("table", header, rows), ("lines", group_arithmetic(run["group"]))]
    if any(r["cut_off"] and not r["in_loss"] for r in run["group"]):
        left_out = (
            "This stage has an overlong filter: a completion that is cut off at --max_new_tokens "
            "stays out of the loss, its denominator, the mean and the standard deviation (G5)."
        )
        blocks.append(("text", left_out))
    if not run["has_gradient"]:
        flat = (
            "No group of this step has rewards that differ. So all advantages are 0, there is "
            "nothing to learn, and the slow motion ends here. Try another --seed or more --prompts."
        )
        blocks.append(("text", flat))
    return Step("A group is sampled, judged and compared", "eq. 1; G1", blocks)


def group_arithmetic(group):
    """Lines: the advantages of a group from its rewards."""
    rewards = [r["reward"] for r in group if r["in_loss"]]
    if len(rewards) < 2:
        return ["Fewer than two completions are in the loss, so there is nothing to compare."]
    n = len(rewards)
    mean = statistics.fmean(rewards)
    std = statistics.stdev(rewards)
    lines = [
        f"mean = ({sum_of(rewards, '.4g')}) / {n} = {mean:.4f}",
        f"std = sqrt(sum of (reward - mean)^2 / ({n} - 1)) = {std:.4f}",
    ]
    if max(rewards) == min(rewards):
        return [*lines, "advantage = 0 for all, since the rewards are equal"]
    lines.append("advantage = (reward - mean) / (std + 1e-6):")
    advantage_of = {r["reward"]: r["advantage"] for r in group if r["in_loss"]}
    for reward, advantage in advantage_of.items():
        difference = sum_of([reward, -mean], ".4g")
        lines.append(f"({difference}) / ({std:.4f} + 1e-6) = {advantage:+.4f}")
    return lines


def sum_of(values, form):
    """The sum of numbers as text, "1 - 0.5 + 2"."""
    return " + ".join(format(value, form) for value in values).replace("+ -", "- ")


def explain_mask(run):
    """Step 3: which tokens are in the loss, and with which sign."""
    text = (
        "The model did not choose the tokens of the prompt, so they are not in the loss. Every "
        "token of a completion is, with the advantage of the whole completion: above 0 it is to "
        "become likelier, below 0 less likely. Nothing says which token was the mistake. It shows "
        "over many completions, since what good and bad ones have in common cancels out."
    )
    prompt = [Piece(t["text"], "grey", "prompt: not in the loss") for t in run["prompt"]]
    blocks = [("text", text), ("tokens", "prompt: not in the loss", prompt)]
    for k, r in enumerate(run["group"]):
        style = style_of(r["advantage"])
        pieces = [Piece(t["text"], style, numbers_of(t, r)) for t in r["tokens"]]
        label = f"completion {k}: advantage {r['advantage']:+.4f}"
        if style == "grey":
            label = f"completion {k}: no gradient"
        blocks.append(("tokens", label, pieces))
    return Step("Only completions are in the loss, token by token", "eq. 1", blocks)


def numbers_of(token, r):
    """All numbers of a completion's token, in a sentence."""
    start = f"{quoted(token['text'])}, id {token['id']}"
    if "logprob" not in token:
        return f"{start}: the sampler's log-prob is {token['sampler']:.4f}; no gradient"
    return (
        f"{start}: log-prob {token['logprob']:.4f} (probability {math.exp(token['logprob']):.4f}), "
        f"old log-prob {token['old']:.4f}, ratio {token['ratio']:g}, advantage "
        f"{r['advantage']:+.4f}, share of the loss {token['share']:+.6f}, "
        f"log-prob after the step {token['after']:.4f}"
    )


def explain_packing(run, around, width):
    """Step 4: a micro-batch as a map of its tokens, and its tensors in columns."""
    batch = run["micro_batch"]
    num_tokens = len(batch["tokens"])
    text = (
        "This is not in the paper: it saves time and changes no number. Sequences (a prompt with "
        "its completion) stand one behind another, without padding, in micro-batches of at most "
        f"512 tokens. This step has {len(run['losses'])} of these; number {batch['number']} has "
        f"{num_tokens} tokens of {len(batch['cu_seqlens']) - 1} sequences. cu_seqlens holds "
        "where they start, and the end; attention never crosses a start. loss_index holds the "
        "positions of completion tokens. A completion with advantage 0 has no gradient and is left "
        "out."
    )
    in_loss = set(batch["loss_index"])
    signs = {"up": "+", "down": "-", "grey": "."}
    loss_map = []
    for t, token in enumerate(batch["tokens"]):
        style = style_of(batch["advantages"][t]) if t in in_loss else "grey"
        loss_map.append(Piece(signs[style], style, f"position {t}: {quoted(token['text'])}"))
    caption = "one mark a token: . prompt, + advantage above 0, - advantage below 0"
    blocks = [("text", text), ("map", caption, loss_map)]
    if batch["first"] is not None:
        computed = set(batch["first"])
        work_map = []
        for t, token in enumerate(batch["tokens"]):
            style, mark = ("", "#") if t in computed else ("grey", ".")
            work_map.append(Piece(mark, style, f"position {t}: {quoted(token['text'])}"))
        caption = (
            f"shared prefixes: the layers compute {len(computed)} of {num_tokens} tokens (#). Each "
            "other one repeats a token and its past; copy_T tells which entry of first_U it equals"
        )
        blocks.append(("map", caption, work_map))
    header, rows, left_out = batch_table(batch, around, width)
    blocks.append(("table", header, rows))
    blocks.append(("text", f"The table leaves out {left_out} of the {num_tokens} tokens."))
    return Step("Sequences are packed into micro-batches", "none", blocks)


def batch_table(batch, around, width):
    """(header, rows, tokens left out): the tensors of a micro-batch, one column a position.

    Shown are the ends of the first two sequences and the places where their completions begin,
    `around` positions on each side, as many columns as fit into `width` characters.
    """
    offsets = batch["cu_seqlens"]
    in_loss = set(batch["loss_index"])
    positions = []
    for start, end in list(zip(offsets, offsets[1:]))[:2]:
        completion = min(t for t in in_loss if start <= t < end)
        for t in range(start, end):
            begins = -around <= t - completion < around
            if begins or t < start + around or t >= end - around:
                positions.append(t)

    names = ["t", "token", "input_ids_T", "cu_seqlens", "loss_index", "advantages_T"]
    if batch["first"] is not None:
        names += ["first_U", "copy_T"]
    columns = [table_row("", *names)]
    used = max(map(len, names))
    num_shown = 0
    for i, t in enumerate(positions):
        new = [batch_column(batch, t, in_loss)]
        if i > 0 and t > positions[i - 1] + 1:
            new.insert(0, table_row("grey", *["..."] * len(names)))
        used += sum(2 + max(len(cell.text) for cell in column) for column in new)
        if used > width:
            break
        columns += new
        num_shown += 1
    header, *rows = zip(*columns)
    return [cell.text for cell in header], rows, len(batch["tokens"]) - num_shown


def batch_column(batch, t, in_loss):
    """What the tensors of a micro-batch hold for position t."""
    style = style_of(batch["advantages"][t]) if t in in_loss else "grey"
    text = visible(batch["tokens"][t]["text"])
    cells = [t, text if len(text) <= 6 else text[:5] + "~", batch["tokens"][t]["id"]]
    cells.append(t if t in batch["cu_seqlens"] else "")
    cells.append(t if t in in_loss else "")
    cells.append(f"{batch['advantages'][t]:+.2f}" if t in in_loss else "0")
    if batch["first"] is not None:
        cells.append(t if t in batch["first"] else "")
        cells.append(batch["copy"][t])
    return table_row(style, *cells)


def explain_token(run):
    """Step 5: every factor of one token's share of the loss."""
    r = run["group"][run["best"]]
    logprobs = [token["logprob"] for token in r["tokens"]]
    i = logprobs.index(min(logprobs))
    token = r["tokens"][i]
    text = (
        f"This is token {i} of completion {run['best']}, the least likely token of the best "
        "completion. The weights that are trained are those that sampled, since every batch makes "
        "one update. So the ratio of new and old probability is exactly 1, and PPO's clip could "
        "never bind. What counts is the gradient: the loss falls when this log-prob rises."
    )
    probability = math.exp(token["logprob"])
    rounding = token["logprob"] - token["sampler"]
    formula = (
        f"-ratio * weight * advantage / all tokens = -{r['advantage']:.4f} / {run['num_tokens']}"
    )
    rows = [
        ("token", cut(quoted(token["text"]), 20), f"id {token['id']}"),
        ("log-prob", f"{token['logprob']:.6f}", f"probability {probability:.4f} when it was drawn"),
        ("old log-prob", f"{token['old']:.6f}", "of the same weights, without gradient"),
        ("ratio", f"{token['ratio']:g}", "exp(log-prob - old log-prob)"),
        ("sampler's log-prob", f"{token['sampler']:.6f}", f"off by rounding, {rounding:+.1e}"),
        ("importance weight", f"{token['weight']:g}", "1 for all, since importance_limit is 0"),
        ("advantage", f"{r['advantage']:+.6f}", "the one of the whole completion"),
        ("share of the loss", f"{token['share']:+.8f}", formula),
        ("gradient", f"{token['gradient']:+.8f}", "of grpo_loss by this log-prob, from autograd"),
    ]
    rows = [table_row("", *row) for row in rows]
    blocks = [("text", text), ("table", ["number", "value", "where it is from"], rows)]
    return Step("One token of the loss", "eq. 1; 4.1.2", blocks)


def explain_loss(run):
    """Step 6: the shares of all completions, their sum, and the gradient."""
    text = (
        "The loss is one sum over all completion tokens, divided by their number. This denominator "
        "is counted over all micro-batches and ranks before the first is computed, so the result "
        "does not depend on how the batch is cut. The value of the loss says little, since the "
        "advantages of a group add up to 0. Its gradient is what trains."
    )
    rows = []
    total = 0.0
    for i, r in enumerate(run["rollouts"]):
        k = i - run["first"]
        name = k if 0 <= k < len(run["group"]) else ""
        if not r["in_loss"]:
            rows.append(table_row("grey", r["group"], name, 0, "not in loss", ""))
            continue
        share = -r["advantage"] * r["length"] / run["num_tokens"]
        total += share
        cells = (r["group"], name, r["length"], f"{r['advantage']:+.4f}", f"{share:+.6f}")
        rows.append(table_row(style_of(r["advantage"]), *cells))
    rows.append(table_row("", "sum", "", run["num_tokens"], "", f"{total:+.4g}"))
    header = ["group", "#", "tokens", "advantage", "-advantage * tokens / all tokens"]

    norm = run["metrics"]["grad_norm"]
    limit = run["grad_clip"]
    clip = f"at most grad_clip = {limit:g}, so the gradient stays as it is"
    if norm > limit:
        clip = f"above grad_clip = {limit:g}, so the gradient is scaled by {limit / norm:.4f}"
    loss = sum(run["losses"])
    lines = [
        f"denominator: {run['num_tokens']} completion tokens in the loss",
        f"grpo_loss, by micro-batch: {sum_of(run['losses'], '.5f')} = {loss:.4g}",
        f"loss of train_step: {run['metrics']['loss']:.4g}",
        f"norm of the gradient: {norm:.4f}, {clip}",
    ]
    blocks = [("text", text), ("table", header, rows), ("lines", lines)]
    if run["stage"] == "rlhf":
        kl = (
            "RLHF adds a KL term towards the policy that it started from (paper 6.3; kl_coef is "
            "0.1 in the toy). In the first step both are the same policy, so the term is 0."
        )
        blocks.append(("text", kl))
    return Step("The loss, its denominator, its gradient", "eq. 1; G3", blocks)


def explain_update(run):
    """Step 7: log-probs of the group's completions before and after the update."""
    rows = []
    changes = {}
    for k, r in enumerate(run["group"]):
        note = {run["best"]: "best", run["worst"]: "worst"}.get(k, "")
        if r["advantage"] == 0:
            rows.append(table_row("grey", k, note, "no gradient", "", "", ""))
            continue
        before = sum(token["logprob"] for token in r["tokens"])
        after = sum(token["after"] for token in r["tokens"])
        changes[k] = after - before
        cells = (f"{r['advantage']:+.4f}", f"{before:.4f}", f"{after:.4f}", f"{changes[k]:+.4f}")
        rows.append(table_row(style_of(r["advantage"]), k, note, *cells))
    header = ["#", "", "advantage", "log-prob before", "after", "change"]
    text = (
        f"AdamW makes one step with learning rate {run['lr']:g}. Its first step moves most weights "
        "by about that much, whatever the size of their gradient. The log-prob of a completion is "
        f"the sum over its tokens. The best completion is now {math.exp(changes[run['best']]):.3g} "
        f"times as likely as before, the worst {math.exp(changes[run['worst']]):.3g} times. All "
        "completions depend on the same weights, so one can also move against its advantage. In a "
        "run, engine.sync now gives the sampler the new weights, and the next step begins."
    )
    blocks = [("text", text), ("table", header, rows)]
    return Step("One optimizer step moves the log-probs", "4.1.2; T15 to T20", blocks)


# ---- 2. Terminal ---------------------------------------------------------------------------------
COLUMNS = 100
COLOURS = {"up": "\033[32m", "down": "\033[31m", "grey": "\033[90m", "": ""}
LEFT_ALIGNED = {"t", "number", "where it is from", "status", "how it ends"}


def print_steps(run):
    """The steps as text of 100 columns; in colour if it goes to a terminal."""
    # Where the terminal lacks a character of the text, "?" stands for it.
    sys.stdout.reconfigure(errors="replace")
    steps = explain(run, around=2, width=COLUMNS)
    print(f"One GRPO step of {STAGES[run['stage']]} in slow motion, from {run['init_from']}")
    for number, step in enumerate(steps, 1):
        heading = f"---- {number}. {step.title} (paper: {step.paper}) "
        print("\n" + heading.ljust(COLUMNS, "-"))
        for kind, *content in step.blocks:
            print()
            for line in block_lines(kind, *content):
                print(line.rstrip())


def block_lines(kind, *content):
    """A block as lines of text."""
    if kind == "text":
        return textwrap.wrap(content[0], COLUMNS)
    if kind == "lines":
        wrap = textwrap.TextWrapper(COLUMNS, initial_indent="    ", subsequent_indent=" " * 8)
        return [part for line in content[0] for part in wrap.wrap(line)]
    if kind == "table":
        return table_lines(*content)
    if kind == "chips":
        return chip_lines(content[0])
    label, pieces = content
    return [*textwrap.wrap(label, COLUMNS), *flow_lines(pieces)]


def paint(piece, text):
    """The text in the piece's colour, if stdout is a terminal."""
    colour = COLOURS[piece.style]
    return f"{colour}{text}\033[0m" if colour and sys.stdout.isatty() else text


def table_lines(header, rows):
    cells = [table_row("", *header), *rows]
    widths = [max(len(cell.text) for cell in column) for column in zip(*cells)]
    for row in cells:
        line = []
        for name, cell, width in zip(header, row, widths, strict=True):
            text = cell.text.ljust(width) if name in LEFT_ALIGNED else cell.text.rjust(width)
            line.append(paint(cell, text))
        yield "  ".join(line)


def flow_lines(pieces):
    """Pieces one behind another, in lines that break between pieces."""
    line, used = "    ", 4
    for piece in pieces:
        # A token may be longer than a line.
        for text in textwrap.wrap(one_line(piece.text), COLUMNS - 4, drop_whitespace=False):
            if used + len(text) > COLUMNS:
                yield line
                line, used = "    ", 4
            line += paint(piece, text)
            used += len(text)
    yield line


def chip_lines(pieces):
    """Every token over its id, in columns."""
    above, below = "    ", "    "
    for piece in pieces:
        text = cut(piece.text, COLUMNS - 6)
        width = max(len(text), len(piece.below)) + 2
        if len(above) + width > COLUMNS:
            yield from (above, below)
            above, below = "    ", "    "
        above += text.ljust(width)
        below += piece.below.ljust(width)
    yield from (above, below)


# ---- 3. Page -------------------------------------------------------------------------------------
def write_page(path, run):
    """One file, without scripts or addresses: the steps, and the numbers of the run as JSON."""
    contents, sections = [], []
    for number, step in enumerate(explain(run, around=8, width=10_000), 1):
        title = html.escape(step.title)
        contents.append(f'<li><a href="#step{number}">{title}</a></li>')
        blocks = "\n".join(block_html(kind, *content) for kind, *content in step.blocks)
        sections.append(
            f'<section id="step{number}"><h2><b>{number}</b> {title}</h2>'
            f'<p class="paper">paper: {html.escape(step.paper)}</p>\n{blocks}</section>'
        )
    facts = {
        "checkpoint": run["init_from"],
        "prompts": run["data"],
        "completions": f"{len(run['rollouts'])} in groups of {len(run['group'])}",
        "seed": run["seed"],
        "time": f"{run['seconds']:.1f} s",
    }
    facts = [
        f"<div><dt>{name}</dt><dd>{html.escape(str(fact))}</dd></div>"
        for name, fact in facts.items()
    ]
    parts = {
        "__STAGE__": STAGES[run["stage"]],
        "__FACTS__": "".join(facts),
        "__CONTENTS__": "\n".join(contents),
        "__STEPS__": "\n".join(sections),
        # No text of the model can end the script element.
        "__DATA__": json.dumps(run).replace("<", "\\u003c"),
    }
    folder = os.path.dirname(os.path.abspath(__file__))
    with open(os.path.join(folder, "slow_motion_template.html")) as f:
        template = f.read()
    # In one pass, so that a placeholder's name in a text of the model stays text.
    page = re.sub("|".join(parts), lambda match: parts[match[0]], template)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "w", encoding="utf-8") as f:
        f.write(page)


def block_html(kind, *content):
    """A block as HTML; every text is escaped."""
    if kind == "text":
        return f"<p>{html.escape(content[0])}</p>"
    if kind == "lines":
        return f'<pre class="scroll">{html.escape(chr(10).join(content[0]))}</pre>'
    if kind == "table":
        return table_html(*content)
    *label, pieces = content
    spans = "".join(piece_html(piece) for piece in pieces)
    caption = "".join(f"<figcaption>{html.escape(text)}</figcaption>" for text in label)
    return f'<figure class="of-{kind}">{caption}<div class="{kind}">{spans}</div></figure>'


def piece_html(piece):
    """A token. The page shows its numbers while it is pointed at, or after a tap."""
    text = html.escape(piece.text).replace("\n", '<i class="end">\\n</i>\n')
    below = f"<small>{piece.below}</small>" if piece.below else ""
    numbers = html.escape(piece.numbers)
    return f'<span class="{piece.style}" tabindex="-1" data-n="{numbers}">{text}{below}</span>'


def table_html(header, rows):
    lines = []
    for cells in (table_row("", *header), *rows):
        tag = "td" if lines else "th"
        line = ""
        for name, cell in zip(header, cells, strict=True):
            left = "left " if name in LEFT_ALIGNED else ""
            line += f'<{tag} class="{left}{cell.style}">{html.escape(cell.text)}</{tag}>'
        lines.append(f"<tr>{line}</tr>")
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'

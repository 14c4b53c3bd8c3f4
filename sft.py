"""SFT: stage 1 of the cascade (paper 3 and D.1), and the first of its scripts to read.

Next-token prediction on conversations, with the loss on the assistant's turns that follow the last
user turn. One step of main():

    samples = next(stream)                     256 conversations: token ids, and which are trained
    batches = pack(samples)                    whole conversations, one behind another
    loss    = -sum log p(token) / all tokens   over the trained tokens of the whole step
    optimizer.step()                           one AdamW update

Two runs (run_cascade.sh): conversations of at most 16K tokens, then of 32K, with tool calling and
SWE added. A good run prints a loss that falls fast for 100 steps and then slowly, and so does the
held-out loss of every category.

    torchrun --nproc_per_node=8 sft.py --init_from=models/Qwen3-8B-Base --out_dir=out/sft1

Deviations from the paper, numbered as in docs/paper.md: D2 a batch of 256 counts conversations, not
packed rows; D3 loss on the last assistant turns only, 1% warm-up; D4 large sets are shuffled block
by block; D5 the cosine runs over 100K steps, so the learning rate hardly decays.
"""

import itertools
import math
import re
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch

from lib.chats import json_objects, read_chat, tool_calls_of, with_thought, without_tags
from lib.check import end_before_training
from lib.checkpoint import load_checkpoint, load_policy, lock, mark_final, save_checkpoint
from lib.common import (
    all_gather,
    all_reduce,
    average_gradients,
    finish,
    micro_batches,
    print0,
    ranks,
    start_run,
)
from lib.data import (
    BadRow,
    first_nonempty,
    fresh_cursors,
    normal_rows,
    read_rows,
    say_dropped,
    stream_rows,
)
from lib.flags import Beta, MachineFlags, PositiveFloat, PositiveInt, parse_config
from lib.guard import check_step, fail
from lib.logs import Logger, peak_memory
from lib.optimizer import make_optimizer
from lib.packing import Unit, attention_cost, equal_packs, shared_prefixes
from lib.progress import SILENCE_S, progress
from lib.unread import ANSWERED, ASKED
from model import TOOL_ROLES, render_chat, show_tokens


# ---- 1. Config -----------------------------------------------------------------------------------
@dataclass
class Config(MachineFlags):  # memory, checkpoints, time limits: lib/flags.py
    init_from: str = "out/base"  # Hugging Face Qwen3 folder (hub ids are for data)
    out_dir: str = "out/sft"
    # hub id, folder, parquet, .json or .jsonl with conversations; commas join several sets, and a
    # set that is named n times is seen n times as often
    data: str = "nvidia/Nemotron-Cascade-SFT-Stage-1"
    eval_data: str = ""  # held-out conversations in the same schemas; "": no held-out loss
    seed: int = 0

    # leave out the no_think conversations, as for 8B-Thinking and 14B-Thinking; paper 3
    think_only: bool = False
    limit: int = 0  # rows of data that are read in an epoch; 0: all
    # rows that are read, tokenized and shuffled at a time [D4]; a smaller set is held whole
    block_rows: PositiveInt = 32768
    samples_per_step: PositiveInt = 256  # conversations per update, over all ranks [D2]; paper T14
    num_steps: PositiveInt = 20000  # first of 20K + 32K steps (8B); paper T14
    max_seq_len: PositiveInt = 16384  # longer conversations are dropped; then 32K; paper 3.1.1
    rope_factor: float = 0.0  # YaRN factor, 2.0 above 32K tokens; 0: as in the checkpoint

    lr: PositiveFloat = 5e-5  # AdamW, 5e-5, then 2e-5 (8B); paper T14
    schedule_steps: PositiveInt = 100000  # step at which the cosine reaches 0 [D5]; paper T14
    warmup_steps: int = 200  # linear warm-up of the learning rate, 1% of num_steps [D3]
    beta1: Beta = 0.9  # paper T14
    beta2: Beta = 0.95  # paper T14
    weight_decay: float = 1e-4  # paper T14
    grad_clip: PositiveFloat = 1.0  # not stated in the paper

    micro_batch_tokens: PositiveInt = 16384  # tokens of one packed forward pass on one rank
    eval_every: int = 500  # steps between held-out losses; 0: never
    save_every: PositiveInt = 1000  # steps between checkpoints


# ---- 2. Data -------------------------------------------------------------------------------------
def normalize(row, where, think_only=False):
    """One row of any known SFT set -> {"messages", "tools", "think", "category"}. BadRow drops it.

    Nothing in a single row stops the run: the five-millionth is read days after the first.
    """
    turns, think = read_chat(row)
    last_user = check_turns(turns)
    messages = []
    has_thought = False
    for i, turn in enumerate(turns):
        message, thinks = normal_turn(turn)
        messages.append(message)
        if message["role"] == "assistant" and i > last_user:
            check_trained(turn, message)
            has_thought = has_thought or thinks
    # A mode is taught by its own rows: thoughts only in think mode, and none without one there.
    if think is None:
        think = has_thought
    if think and not has_thought:
        raise BadRow("a think conversation without a thought")
    if has_thought and not think:
        raise BadRow("reasoning in a no_think conversation")
    if think_only and not think:
        raise BadRow("a no_think conversation")
    tools = json_objects(row.get(first_nonempty(row, "tools", "functions")), "tools")
    category = str(row.get("category") or "all")
    return {"messages": messages, "tools": tools, "think": think, "category": category}


def check_turns(turns):
    """The index of the last user turn. BadRow without one, or without an assistant turn at the
    end."""
    if not turns or turns[-1]["role"] != "assistant":
        raise BadRow("the last turn is not the assistant's")
    if not any(turn["role"] == "user" and turn["content"].strip() for turn in turns):
        raise BadRow("no user turn")
    return max(i for i, turn in enumerate(turns) if turn["role"] == "user")


def normal_turn(turn):
    """({"role", "content", "tool_calls"}, whether it has a thought) of a turn."""
    content, has_thought = turn["content"], False
    if turn["role"] in TOOL_ROLES:
        content = without_tags(content)
    elif turn["role"] == "assistant":
        content, has_thought = with_thought(turn)
    message = {"role": turn["role"], "content": content, "tool_calls": tool_calls_of(turn)}
    return message, has_thought


def check_trained(turn, message):
    """BadRow if an assistant turn that is trained on has no answer, or is not to be trained on."""
    answer = message["content"].rpartition("</think>")[2]
    if not answer.strip() and not message["tool_calls"]:
        raise BadRow("the last assistant turn is empty")
    for name in ("weight", "loss_weight", "train"):
        if turn.get(name) not in (None, 1):
            raise BadRow(f'a last turn that is not to be trained on ("{name}" is {turn[name]})')


def load_samples(path, tokenizer, cfg, cursors=None, seen=None):
    """Samples [(ids, mask, category)] of a data set; the mask is True where a token is trained.

    Conversations over max_seq_len tokens are dropped and counted. Without cursors the whole set is
    read. With cursors the next block_rows rows are read, and the cursors move behind them. `seen`
    {category: [conversations, tokens]} holds the counts of the blocks before; these rows are added.
    """
    # The first block ends the run with a sentence if its rows are not what they should be. A later
    # one is read days after it: there every bad row is dropped alone.
    is_first = not seen
    if cursors:
        raw_rows = itertools.islice(stream_rows(cursors, cfg.limit), cfg.block_rows)
        num_raw = cfg.block_rows  # at most
    else:
        raw_rows = read_rows(path)
        num_raw = len(raw_rows)

    def normalize_row(row, where):
        return normalize(row, where, cfg.think_only) | {"where": where}

    kinds = ASKED | ANSWERED
    rows = normal_rows(raw_rows, normalize_row, path, cfg.ignore_fields, kinds, is_first)

    # Tokenize: every rank reads all rows, tokenizes every world-th and gets the others' samples.
    rank, world = ranks()
    mine = []
    for i, row in enumerate(progress(rows, "tokenize", num_raw)):
        if i % world == rank:
            mine.append(encode(row, tokenizer, cfg))
    shares = all_gather(mine)
    num_rows = sum(len(share) for share in shares)
    samples = [shares[i % world][i // world] for i in range(num_rows)]

    # Drop what cannot be trained on, and print how much there is of each category.
    kept = [sample for sample in samples if not isinstance(sample, BadRow)]
    dropped = {}  # reason -> where the rows are
    for sample in samples:
        if isinstance(sample, BadRow):
            reason, where = sample.args
            dropped.setdefault(reason, []).append(where)
    say_dropped(dropped, num_rows, path)
    counts = {} if seen is None else seen
    for ids, _, category in kept:
        count, tokens = counts.get(category, (0, 0))
        counts[category] = (count + 1, tokens + len(ids))
    for category, (count, tokens) in sorted(counts.items()):
        print0(
            f"data {path}: {category:24s} {count:8d} conversations, "
            f"{tokens / count:6.0f} tokens on average"
        )
    if is_first and not kept:
        fail(f"data {path}: every conversation is longer than max_seq_len={cfg.max_seq_len}.")
    return kept


def encode(row, tokenizer, cfg):
    """(ids, mask, category) of a normal row, or a BadRow(reason, where) if it cannot be used."""
    try:
        ids, mask = render_chat(
            tokenizer, row["messages"], row["think"], row["tools"], add_generation_prompt=False
        )
    except Exception as error:  # noqa: BLE001  one row never ends a run
        return BadRow(f"it cannot be encoded ({type(error).__name__})", row["where"])
    if len(ids) > cfg.max_seq_len:
        return BadRow(f"over {cfg.max_seq_len} tokens", row["where"])
    return np.array(ids, np.int32), np.array(mask, bool), row["category"]


def stream_steps(tokenizer, state, cfg):
    """Yield the samples of one step after another, without end, the same on every rank.

    Memory holds one block of block_rows rows, in which all files are mixed [D4]. `state` is the
    cursor: the epoch, the block, "files" (where the block begins), "seen" (counts of the blocks
    before) and "position" (how many samples of the block are used). A resumed run reads on from
    it, bit for bit.
    """
    at_start = fresh_cursors(cfg.data)
    if not state["files"]:
        state["files"] = at_start
    if file_names(state["files"]) != file_names(at_start):
        fail(f"data {cfg.data}: its files are not those that this run was trained on so far.")
    loaded_files = None
    chosen = []
    while True:
        # Load the block that begins at state["files"]. A set that is one block stays in memory.
        if loaded_files != state["files"]:
            loaded_files = dict(state["files"])
            # load_samples moves these cursors behind the block, and counts its categories.
            next_files = dict(state["files"])
            seen = dict(state["seen"])
            samples = load_samples(cfg.data, tokenizer, cfg, next_files, seen)

        # Shuffle it by seed, epoch and block, and deal it out from the position on.
        key = [cfg.seed, state["epoch"]]
        if state["block"]:
            key.append(state["block"])
        order = np.random.default_rng(key).permutation(len(samples))
        while state["position"] < len(samples):
            missing = cfg.samples_per_step - len(chosen)
            taken = order[state["position"] :][:missing]
            state["position"] += len(taken)
            chosen += [samples[i] for i in taken]
            if len(chosen) == cfg.samples_per_step:
                yield chosen
                chosen = []

        # Go on with the next block or epoch.
        state["position"] = 0
        if all_read(next_files, cfg.limit):
            state |= {"epoch": state["epoch"] + 1, "block": 0, "files": at_start, "seen": {}}
        else:
            state |= {"block": state["block"] + 1, "files": next_files, "seen": seen}


def file_names(cursors):
    """Names of the files without the commit of a hub's set: a new commit renames all of them."""
    return {re.sub(r"(?<=@)[0-9a-f]{40}(?=/)", "", file) for file in cursors}


def all_read(cursors, limit):
    """True if every file is read to its end, or `limit` rows of them are read (0: no limit)."""
    if all(share_read >= 1 for _, _, share_read in cursors.values()):
        return True
    return 0 < limit <= sum(num_rows for num_rows, _, _ in cursors.values())


# ---- 3. Update -----------------------------------------------------------------------------------
# A micro-batch is packed: whole conversations stand one behind another, without padding, and
# attention never crosses from one to the next. [5, 6, 7, 8] and [5, 6, 9], both trained from their
# third token on, become
#
#     position        0    1    2    3    4    5    6
#     input_ids_T     5    6    7    8    5    6    9       T = 7 tokens
#     cu_seqlens      0                   4              7  starts of the sequences, and the end
#     loss_index                2    3              6       the trained tokens, where masks are True


def length(sample):
    """Tokens of a conversation."""
    ids, _, _ = sample
    return len(ids)


def pack(samples, budget, device):
    """(batches, num_real): this rank's micro-batches, of at most `budget` tokens each.

    samples: of all ranks. Every rank gets as many micro-batches, and at every place theirs cost
    about the same. Those from num_real on are dummies for a rank that has run out of samples. A
    conversation that is longer than the budget makes a micro-batch of its own.
    """
    units = []
    for sample in samples:
        n = length(sample)
        units.append(Unit([sample], n, n + attention_cost(n)))
    rank, world = ranks()
    packs, _ = equal_packs(units, budget, world)
    mine = packs[rank::world]
    num_real = sum(len(pack) > 0 for pack in mine)
    dummy = [min(samples, key=length)]
    return [pack_group(pack or dummy, device) for pack in mine], num_real


def pack_group(samples, device):
    """One micro-batch as flat tensors: the dictionary that model.nll reads."""
    sequences = [ids for ids, _, _ in samples]
    masks = [mask for _, mask, _ in samples]
    lengths = [len(sequence) for sequence in sequences]
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])

    def tensor(array, dtype):
        return torch.as_tensor(array, dtype=dtype).to(device)

    return {
        "input_ids_T": tensor(np.concatenate(sequences), torch.int64),
        "cu_seqlens": tensor(cu_seqlens, torch.int32),
        "max_seqlen": max(lengths),
        "loss_index": tensor(np.flatnonzero(np.concatenate(masks)), torch.int64),
        # System prompts and tool lists, with which many conversations begin, are computed once.
        "shared": shared_prefixes([ids.tolist() for ids in sequences], device),
    }


def learning_rate(step, cfg):
    """Linear warm-up, then a cosine to 0 at schedule_steps [D5]."""
    warmup = min(1.0, step / max(cfg.warmup_steps, 1))
    progress = min(step / cfg.schedule_steps, 1.0)
    return cfg.lr * warmup * 0.5 * (1 + math.cos(math.pi * progress))


def train_step(model, optimizer, samples, cfg, device, world):
    """One gradient update from a step's samples, those of all ranks; returns the metrics."""
    # The denominator: trained tokens of all ranks, counted before the step is cut, so that the
    # gradient depends neither on the packing nor on the number of ranks [D3].
    num_tokens = sum(int(mask.sum()) for _, mask, _ in samples)
    assert num_tokens > 0, "no token of this step is trained on"

    # Pack: conversations, one behind another, into micro-batches without padding, of equal cost on
    # all ranks. Collectives have to match, so a rank that runs out of conversations gets dummies,
    # which weigh 0.
    batches, num_real = pack(samples, cfg.micro_batch_tokens, device)

    loss_sum = 0.0
    for i, batch in enumerate(micro_batches(batches, model)):
        is_real = i < num_real
        # Forward and loss: -log p summed over the trained tokens, over the global denominator.
        loss = model.nll(batch) / num_tokens
        # Backward: FSDP averages gradients over ranks, but the denominator is global already, so
        # multiply by the number of ranks to undo the average.
        weight = world if is_real else 0.0
        (loss * weight).backward()
        if is_real:
            loss_sum += loss.item()

    # Clip: average what FSDP has not averaged, then bound the norm of the whole gradient.
    average_gradients(model)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
    if hasattr(grad_norm, "full_tensor"):
        grad_norm = grad_norm.full_tensor()
    grad_norm = float(grad_norm)

    # Update. A loss or gradient that is not finite is not applied (check_step ends a run of three).
    loss = all_reduce({"loss": loss_sum})["loss"]
    if math.isfinite(grad_norm + loss):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"loss": loss, "grad_norm": grad_norm, "num_tokens": num_tokens}


# ---- 4. Eval -------------------------------------------------------------------------------------
@torch.no_grad()
def evaluate(model, samples, cfg, device):
    """{"eval/<category>": nats per trained token} over the held-out conversations."""
    categories = sorted({category for _, _, category in samples})
    most_categories = max(all_gather(len(categories)))
    assert len(categories) == most_categories, "ranks read different eval data"
    nats_per_token = {}
    for category in categories:
        in_category = [sample for sample in samples if sample[2] == category]
        # Dummies, which let collectives match, are not counted.
        batches, num_real = pack(in_category, cfg.micro_batch_tokens, device)
        nll_sum = 0.0
        for i, batch in enumerate(progress(batches, f"evaluation, {category}")):
            nll = model.nll(batch)
            if i < num_real:
                nll_sum += nll.item()
        num_tokens = sum(int(mask.sum()) for _, mask, _ in in_category)
        nats_per_token[f"eval/{category}"] = nll_sum / num_tokens
    # Each rank has a part of every sum over the whole denominator, so the parts add up.
    return all_reduce(nats_per_token)


# ---- 5. main -------------------------------------------------------------------------------------
def console_line(step, cfg, metrics, seconds_per_step, tokens_per_second):
    """step 400/20000 | loss 0.612 | grad 0.31 | ...: one line, in a fixed order."""
    line = (
        f"step {step}/{cfg.num_steps} | loss {metrics['loss']:.3f} | "
        f"grad {metrics['grad_norm']:.2f} | lr {metrics['lr']:.1e} | "
        f"{seconds_per_step:.2f}s/step | {tokens_per_second / 1000:.1f}k tok/s | "
        f"{peak_memory() / 2**30:.1f} GB"
    )
    for name, value in metrics.items():
        if name.startswith("eval/"):
            line += f" | {name} {value:.3f}"
    return line


def main(cfg):
    lock(cfg.out_dir)
    _, world, device = start_run(cfg)
    if cfg.samples_per_step < world:
        fail(
            f"--samples_per_step={cfg.samples_per_step} is less than one for each of {world} ranks."
        )

    # The model: the newest checkpoint of out_dir, else init_from.
    tokenizer, model, resume = load_policy(cfg, world, device)
    eval_samples = []
    if cfg.eval_data:
        eval_samples = load_samples(cfg.eval_data, tokenizer, cfg)
    optimizer = make_optimizer(model, cfg)  # AdamW

    # The state of a run besides weights and optimizer: which conversations come next.
    start = 0
    state = {"skipped": 0, "epoch": 0, "block": 0, "position": 0, "files": {}, "seen": {}}
    if resume:
        start, saved = load_checkpoint(resume, optimizer, cfg)
        state |= saved
    stream = stream_steps(tokenizer, state, cfg)
    # Read the first step now, so that trouble with the data is reported before the log is touched.
    first = next(stream)
    stream = itertools.chain([first], stream)
    if cfg.check or start >= cfg.num_steps:
        return end_before_training(first, tokenizer, model, cfg, resume)

    logger = Logger(cfg, start)
    num_params = sum(p.numel() for p in model.parameters())
    print0(
        f"{resume or cfg.init_from} -> {cfg.out_dir}: {num_params / 1e6:.1f}M parameters, "
        f"{world} ranks on {device.type}, "
        f"steps {start + 1}..{cfg.num_steps} of {cfg.samples_per_step}"
    )

    # A console line is printed 50 times a run, and at least once a minute; steps and tokens are
    # counted from line to line.
    line_every = max(cfg.num_steps // 50, 1)
    clock = time.time()
    steps_since, tokens_since = 0, 0
    for step in range(start + 1, cfg.num_steps + 1):
        # Data: the next conversations, the same on every rank.
        samples = next(stream)
        if step == 1:
            ids, mask, _ = samples[0]
            colours = sys.stdout.isatty()
            shown = show_tokens(tokenizer, ids.tolist()[:400], mask.tolist()[:400], colours)
            how = "in green" if colours else "in [[ ]]"
            print0(f"first conversation, trained tokens {how}:\n{shown}")

        # Update: one gradient step at this step's learning rate; stop if the step was broken.
        began = time.time()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, cfg)
        metrics = train_step(model, optimizer, samples, cfg, device, world)
        metrics["lr"] = optimizer.param_groups[0]["lr"]
        metrics["time/train"] = time.time() - began
        check_step(step, metrics, state, cfg)

        # Evaluate, log, save.
        is_last = step == cfg.num_steps
        if cfg.eval_every and eval_samples and (step % cfg.eval_every == 0 or is_last):
            metrics |= evaluate(model, eval_samples, cfg, device)
        steps_since += 1
        tokens_since += sum(length(sample) for sample in samples)
        line = ""
        silent = time.time() - clock > SILENCE_S
        if step % line_every == 0 or silent or step == 1 or is_last:
            seconds = time.time() - clock
            line = console_line(step, cfg, metrics, seconds / steps_since, tokens_since / seconds)
            clock = time.time()
            steps_since, tokens_since = 0, 0
        logger.log(step, metrics, line)
        if step % cfg.save_every == 0 or is_last:
            folder = save_checkpoint(cfg.out_dir, step, model, optimizer, cfg, state)
    mark_final(cfg.out_dir, folder)


if __name__ == "__main__":
    main(parse_config(Config))
    finish()

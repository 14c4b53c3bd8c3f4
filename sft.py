"""SFT: stage 1 of the cascade (paper 3 and 4.1). Next-token prediction on the assistant's tokens of packed conversations.

Two invocations (run_cascade.sh): 16K tokens, then 32K with tool calling and SWE added. Deviations and gaps filled:
  1. "Batch 256" counts conversations, not packed rows (the released row counts only fit that). They are
     packed for speed, and attention never crosses from one to the next, so packing changes nothing but the time.
  2. Loss on the last assistant turn only (earlier ones are history, their thinking removed), mean over the tokens of the
     whole step; 1% warm-up (neither is stated).
  3. A set of more than block_rows rows is streamed and shuffled block by block, all its files mixed by size in every block.
  4. The cosine runs over schedule_steps = 100K as printed in T14, so the rate hardly decays within a stage.

torchrun --nproc_per_node=8 sft.py --init_from=models/Qwen3-8B-Base --data=nvidia/Nemotron-Cascade-SFT-Stage-1 --out_dir=out/sft1
A good run prints a loss that falls fast for 100 steps and then slowly, the same for every category of the eval line.
"""

import functools
import itertools
import json
import math
import re
import time
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from lib.checkpoint import load_checkpoint, load_policy, lock, mark_final, save_checkpoint
from lib.common import all_gather, all_reduce, average_gradients, finish, print0, start_run
from lib.data import BadRow, as_messages, fresh_cursors, normal_rows, read_rows, stream_rows
from lib.flags import Beta, MachineFlags, PositiveFloat, PositiveInt, parse_config
from lib.guard import check_step, fail
from lib.logs import Logger, peak_memory
from lib.packing import shared_prefixes, split_by_budget
from model import render_chat, show_tokens


# ---- 1. Config -----------------------------------------------------------------------------------
@dataclass
class Config(MachineFlags):  # memory, checkpoints, time limits: lib/flags.py
    init_from: str = "out/base"  # Hugging Face Qwen3 folder (hub ids are for data)
    out_dir: str = "out/sft"
    # hub id, folder, parquet, .json or .jsonl with `messages` rows; named n times: n times as often
    data: str = "nvidia/Nemotron-Cascade-SFT-Stage-1"
    eval_data: str = ""  # same form; "": no held-out loss
    # leaves out the no_think conversations: the thinking models (paper 3, 8B-Thinking and
    # 14B-Thinking)
    think_only: bool = False
    limit: int = 0  # rows read from data; 0: all
    # rows read, tokenized and shuffled at a time [dev 3]; smaller sets are held whole
    block_rows: PositiveInt = 32768
    samples_per_step: PositiveInt = (
        256  # conversations per update, over all ranks [dev 1]; paper T14
    )
    num_steps: PositiveInt = 20000  # paper T14: 20K, then 32K (8B)
    schedule_steps: PositiveInt = 100000  # where the cosine reaches 0; paper T14 [dev 4]
    warmup_steps: int = 200  # linear; 1%, not stated in the paper [dev 2]
    max_seq_len: PositiveInt = (
        16384  # tokens; longer conversations are dropped. Paper 3.1.1: 16K, then 32K
    )
    micro_batch_tokens: PositiveInt = 16384  # tokens of one packed forward pass on one rank
    lr: PositiveFloat = 5e-5  # paper T14: 5e-5, then 2e-5 (8B)
    beta1: Beta = 0.9  # paper T14
    beta2: Beta = 0.95  # paper T14
    weight_decay: float = 1e-4  # paper T14
    grad_clip: PositiveFloat = 1.0  # not stated in the paper
    # YaRN factor; 2.0 once sequences can pass 32K; 0: as the checkpoint has it
    rope_factor: float = 0.0
    eval_every: int = 500  # steps; 0: never
    save_every: PositiveInt = 1000  # steps
    seed: int = 0


# ---- 2. Data -------------------------------------------------------------------------------------
def normalize(row, where, think_only=False):
    """{"messages", "tools", "think", "category"} of a Nemotron SFT row; rows that cannot be trained on are BadRow. Nothing in a
    single row stops the run: the five-millionth is read days after the first."""
    # Llama-Nemotron: question, answer, and the mode in a system prompt of its own
    if "output" in row and "messages" not in row:
        question, system = as_messages(row.get("input"), "input"), row.get("system_prompt") or ""
        system = (
            []
            if not system or re.fullmatch("detailed thinking (on|off)", system)
            else [{"role": "system", "content": system}]
        )
        row = row | {
            "messages": system + question + [{"role": "assistant", "content": row["output"]}],
            "thinking": row.get("reasoning") == "on",
        }
    if "messages" not in row:
        raise BadRow(f'no "messages" field (has: {", ".join(map(str, row))})')
    messages = as_messages(row["messages"], "messages")
    if not messages or messages[-1]["role"] != "assistant":
        raise BadRow("the last turn is not the assistant's")
    if not (messages[-1]["content"].strip() or messages[-1].get("tool_calls")):
        raise BadRow("the last assistant turn is empty")
    if not any(m["role"] == "user" and m["content"].strip() for m in messages):
        raise BadRow("no user turn")
    if any(m["role"] not in ("system", "user", "assistant", "tool") for m in messages):
        raise BadRow("a turn of an unknown role")
    tools = from_json(row.get("tools"), "tools")
    for m in messages:
        if m["role"] == "tool" and re.fullmatch(
            r"(\s*<tool_response>((?!</?tool_response>).)*</tool_response>\s*)+", m["content"], re.S
        ):
            parts = re.findall(r"<tool_response>\n?(.*?)\n?</tool_response>", m["content"], re.S)
            # tags that are there already: the template writes them
            m["content"] = "\n</tool_response>\n<tool_response>\n".join(parts)
        m["tool_calls"] = from_json(m.get("tool_calls"), "tool_calls")
        calls = [call.get("function") or call for call in m["tool_calls"]]
        if not all(
            isinstance(call, dict) and isinstance(call.get("name"), str) and "arguments" in call
            for call in calls
        ):
            raise BadRow("a tool call without name and arguments")
    think = row.get("thinking")
    think = "<think>" in messages[-1]["content"] if think is None else think
    if not isinstance(think, bool):
        raise BadRow('field "thinking" is neither true nor false')
    if think_only and not think:
        raise BadRow("a no_think conversation")
    return {
        "messages": messages,
        "tools": tools,
        "think": think,
        "category": str(row.get("category") or "all"),
    }


def from_json(value, name):
    """A list of objects, given as it is, as JSON text or not at all."""
    try:
        value = json.loads(value) if isinstance(value, str) and value else value or []
    except ValueError:
        raise BadRow(f'field "{name}" is not valid JSON')
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise BadRow(f'field "{name}" is no list of objects')
    return value


def load_samples(path, tokenizer, cfg, cursors=None, seen=None):
    """[(ids, loss_mask, category)] as numpy arrays; conversations over max_seq_len tokens are dropped and counted. With cursors,
    the next block_rows rows, and the cursors move behind them. Ranks tokenize a share each. seen {category: [conversations,
    tokens]} counts on."""
    rank, world = (
        (torch.distributed.get_rank(), torch.distributed.get_world_size())
        if torch.distributed.is_initialized()
        else (0, 1)
    )
    block = (
        itertools.islice(stream_rows(cursors, cfg.limit), cfg.block_rows)
        if cursors
        else read_rows(path)
    )
    mine = []
    rows = normal_rows(block, functools.partial(normalize, think_only=cfg.think_only), path)
    rows = tqdm(rows, desc="tokenize", leave=False, disable=None)
    for i, row in enumerate(rows):
        if i % world == rank:
            ids, mask = render_chat(
                tokenizer, row["messages"], row["think"], row["tools"], add_generation_prompt=False
            )
            fits = len(ids) <= cfg.max_seq_len and any(mask)
            mine.append(
                (np.array(ids, np.int32), np.array(mask, bool), row["category"]) if fits else None
            )
    shares = all_gather(mine)
    samples = [shares[i % world][i // world] for i in range(sum(map(len, shares)))]
    kept, counts = [s for s in samples if s], {} if seen is None else seen
    if len(kept) < len(samples):
        print0(
            f"data {path}: dropped {len(samples) - len(kept)} of {len(samples)} rows, over {cfg.max_seq_len} tokens"
        )
    for ids, _, category in kept:
        n, tokens = counts.get(category, (0, 0))
        counts[category] = (n + 1, tokens + len(ids))
    for category, (n, tokens) in sorted(counts.items()):
        print0(
            f"data {path}: {category:24s} {n:8d} conversations, {tokens / n:6.0f} tokens on average"
        )
    return (
        kept
        if kept
        else fail(f"data {path}: every conversation is longer than max_seq_len={cfg.max_seq_len}.")
    )


def batches(tokenizer, state, cfg):
    """Endless steps of samples_per_step conversations, the same on every rank. Memory holds one block of block_rows rows, in
    which all files are mixed; blocks are shuffled by (seed, epoch, block). `state` is the cursor: its "files" say where the
    block begins, its "position" what of it is used, so that a resumed run reads on where it was, bit for bit."""
    fresh = fresh_cursors(cfg.data)
    chosen, samples, behind, seen, loaded = [], [], {}, {}, None
    # a commit to a hub's set renames its files
    names = lambda cursors: {re.sub(r"(?<=@)[0-9a-f]{40}(?=/)", "", file) for file in cursors}
    if state["files"] and names(state["files"]) != names(fresh):
        fail(f"data {cfg.data}: its files are not those that this run was trained on so far.")
    while True:
        state["files"] = state["files"] or fresh
        if loaded != state["files"]:  # a set that is one block stays in memory
            behind, seen, loaded = dict(state["files"]), dict(state["seen"]), dict(state["files"])
            samples = load_samples(cfg.data, tokenizer, cfg, behind, seen)
        block = [state["block"]] if state["block"] else []
        order = np.random.default_rng([cfg.seed, state["epoch"], *block]).permutation(len(samples))
        while state["position"] < len(samples):
            taken = order[state["position"] :][: cfg.samples_per_step - len(chosen)]
            state["position"] += len(taken)
            chosen += [samples[i] for i in taken]
            if len(chosen) == cfg.samples_per_step:
                yield chosen
                chosen = []
        ended = all(share >= 1 for _, _, share in behind.values()) or 0 < cfg.limit <= sum(
            n for n, _, _ in behind.values()
        )
        state |= {"position": 0, "seen": {} if ended else seen, "files": fresh if ended else behind}
        state |= (
            {"epoch": state["epoch"] + 1, "block": 0} if ended else {"block": state["block"] + 1}
        )


def pack(samples, budget, device):
    """Packed micro-batches of at most `budget` tokens (more only for a single longer sample), long samples first."""
    batches, length = [], lambda sample: len(sample[0])
    for group in split_by_budget(sorted(samples, key=length, reverse=True), length, budget):
        lengths = [len(ids) for ids, _, _ in group]
        batches.append(
            {
                "input_ids_T": torch.from_numpy(np.concatenate([ids for ids, _, _ in group]))
                .long()
                .to(device),
                "cu_seqlens": torch.tensor(
                    [0, *np.cumsum(lengths)], dtype=torch.int32, device=device
                ),
                "max_seqlen": max(lengths),
                "loss_index": torch.from_numpy(
                    np.flatnonzero(np.concatenate([mask for _, mask, _ in group]))
                ).to(device),
                # system prompts, tool lists
                "shared": shared_prefixes([ids.tolist() for ids, _, _ in group], device),
            }
        )
    return batches


# ---- 3. Loss -------------------------------------------------------------------------------------
def learning_rate(step, cfg):
    """Linear warm-up, then a cosine to 0 at schedule_steps."""
    return (
        cfg.lr
        * min(1.0, step / max(cfg.warmup_steps, 1))
        * 0.5
        * (1 + math.cos(math.pi * min(step / cfg.schedule_steps, 1.0)))
    )


def train_step(model, optimizer, samples, cfg, device, world):
    """One update on this rank's samples. The denominator is the number of trained tokens of all ranks, counted first, so the
    gradient depends neither on packing nor on the number of ranks."""
    num_tokens = all_reduce({"n": sum(int(mask.sum()) for _, mask, _ in samples)})["n"]
    assert num_tokens > 0, "no token of this step is trained on"
    batches = pack(samples, cfg.micro_batch_tokens, device)
    # collectives must match: idle ranks repeat with weight 0
    most = int(all_reduce({"n": len(batches)}, "max")["n"])
    weights = [1.0] * len(batches) + [0.0] * (most - len(batches))
    batches += [batches[-1]] * (most - len(batches))
    total = 0.0
    for batch, weight in zip(batches, weights, strict=True):
        loss = weight * model.nll(batch) / num_tokens
        (loss * world).backward()  # ranks are averaged, and the denominator is global already
        total += loss.item()
    average_gradients(model)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
    grad_norm = float(grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm)
    loss = all_reduce({"loss": total})["loss"]
    if math.isfinite(grad_norm + loss):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"loss": loss, "grad_norm": grad_norm, "num_tokens": num_tokens}


# ---- 4. Eval -------------------------------------------------------------------------------------
@torch.no_grad()
def evaluate(model, samples, cfg, device, rank, world):
    """{"eval/<category>": nats per trained token} over the held-out conversations."""
    sums, most = {}, max(all_gather(len({s[2] for s in samples})))
    for category in sorted({s[2] for s in samples}):
        part = [s for s in samples if s[2] == category]
        mine = part[rank::world] or part[:1]
        batches = pack(mine, cfg.micro_batch_tokens, device)
        rounds = int(all_reduce({"n": len(batches)}, "max")["n"])
        nll = 0.0
        for i in range(rounds):
            value = model.nll(batches[i % len(batches)])
            nll += value.item() if i < len(batches) and part[rank::world] else 0.0
        sums[f"eval/{category}"] = nll / sum(int(mask.sum()) for _, mask, _ in part)
    assert len(sums) == most, "ranks read different eval data"
    return all_reduce(sums)


# ---- 5. main -------------------------------------------------------------------------------------
def main(cfg):
    lock(cfg.out_dir)
    rank, world, device = start_run(cfg)
    if cfg.samples_per_step < world:
        fail(
            f"--samples_per_step={cfg.samples_per_step} is less than one for each of {world} ranks."
        )
    tokenizer, model, resume = load_policy(cfg, world, device)
    eval_samples = load_samples(cfg.eval_data, tokenizer, cfg) if cfg.eval_data else []
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=cfg.lr,
        betas=(cfg.beta1, cfg.beta2),
        weight_decay=cfg.weight_decay,
        fused=True,
    )
    state = {"skipped": 0, "epoch": 0, "block": 0, "position": 0, "files": {}, "seen": {}}
    start, saved = load_checkpoint(resume, optimizer, cfg) if resume else (0, {})
    state |= saved
    steps = batches(tokenizer, state, cfg)
    # what is wrong with the data is said before the log is touched
    steps = itertools.chain([next(steps)], steps)
    logger = Logger(cfg.out_dir, start)
    num_params = sum(p.numel() for p in model.parameters())
    print0(
        f"{resume or cfg.init_from} -> {cfg.out_dir}: {num_params / 1e6:.1f}M parameters, {world} ranks on {device.type}, "
        f"steps {start + 1}..{cfg.num_steps} of {cfg.samples_per_step}"
    )

    clock, since = time.time(), {"tokens": 0, "steps": 0}
    for step in range(start + 1, cfg.num_steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, cfg)
        samples = next(steps)
        # about as many tokens on every rank
        mine, began = sorted(samples, key=lambda s: -len(s[0]))[rank::world], time.time()
        if step == 1:
            ids, mask, _ = samples[0]
            print0(
                "first conversation, trained tokens in green:\n"
                + show_tokens(tokenizer, ids.tolist()[:400], mask.tolist()[:400])
            )
        metrics = train_step(model, optimizer, mine, cfg, device, world)
        metrics |= {"lr": optimizer.param_groups[0]["lr"], "time/train": time.time() - began}
        check_step(step, metrics, state, cfg)
        if (
            cfg.eval_every
            and eval_samples
            and (step % cfg.eval_every == 0 or step == cfg.num_steps)
        ):
            metrics |= evaluate(model, eval_samples, cfg, device, rank, world)
        since = {
            "tokens": since["tokens"] + sum(len(ids) for ids, _, _ in mine) * world,
            "steps": since["steps"] + 1,
        }
        line = ""
        if step % max(cfg.num_steps // 50, 1) == 0 or step in (1, cfg.num_steps):
            seconds = time.time() - clock
            line = (
                f"step {step}/{cfg.num_steps} | loss {metrics['loss']:.3f} | grad {metrics['grad_norm']:.2f} | lr {metrics['lr']:.1e} | "
                f"{seconds / since['steps']:.2f}s/step | {since['tokens'] / seconds / 1000:.1f}k tok/s | {peak_memory() / 2**30:.1f} GB"
            )
            line += "".join(f" | {k} {v:.3f}" for k, v in metrics.items() if k.startswith("eval/"))
            clock, since = time.time(), {"tokens": 0, "steps": 0}
        logger.log(step, metrics, line)
        if step % cfg.save_every == 0 or step == cfg.num_steps:
            folder = save_checkpoint(cfg.out_dir, step, model, optimizer, cfg, state)
    mark_final(cfg.out_dir, folder if start < cfg.num_steps else resume)


if __name__ == "__main__":
    main(parse_config(Config))
    finish()

"""Reward models (paper 4.2): a Bradley-Terry model trained on pairs, any other sequence classifier, or a scoring endpoint.

RLHF learns from its score, and so does IF-RL's thinking model (4.4). It reads question and answer, never the thinking. What a
score is worth, floors for mixed language and unclosed thoughts included, is decided in the stages; the flags are rlhf.py's.
"""

import functools
import gc
import json
import math
import os
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from lib.common import all_gather, all_reduce, average_gradients, print0, ranks, shard
from lib.data import BadRow, as_messages, load_table, required_field
from lib.guard import fail, one_sentence
from lib.packing import shared_prefixes, split_by_budget
from lib.plan import check_memory
from model import (
    Qwen3,
    chat_template,
    hf_config,
    load_tokenizer,
    read_config,
    render_chat,
    save_tokenizer,
)


class RewardModel(nn.Module):
    """Qwen3 body with a scalar head on the last token of each packed sequence (paper 4.2.2); on disk it is a
    Qwen3ForSequenceClassification with one label, which transformers and vLLM open."""

    def __init__(self, qwen3):
        super().__init__()
        # in a list: the language head is no part of this module
        self.model, self.qwen3 = qwen3.model, [qwen3]
        self.score = nn.Linear(qwen3.config.hidden_size, 1, bias=False)
        nn.init.zeros_(self.score.weight)

    def forward(self, input_ids_T, cu_seqlens, max_seqlen, shared=None):
        """Scores [num_seqs], fp32; shared as in Qwen3.forward."""
        hidden_MD = self.qwen3[0].packed_hidden(
            input_ids_T, cu_seqlens, max_seqlen, cu_seqlens[1:].long() - 1, shared
        )
        return F.linear(hidden_MD.float(), self.score.weight.float()).squeeze(-1)

    def save_pretrained(self, folder):
        """Every rank gathers, tensor by tensor; rank 0 writes."""
        whole = {}
        for name, p in self.named_parameters():
            p = p.full_tensor() if hasattr(p, "full_tensor") else p.detach()
            if ranks()[0] == 0:
                whole[name] = p.cpu().contiguous()
        if not whole:
            return
        os.makedirs(folder, exist_ok=True)
        config = hf_config(self.qwen3[0].config) | {
            "architectures": ["Qwen3ForSequenceClassification"],
            "num_labels": 1,
        }
        with open(os.path.join(folder, "config.json"), "w") as f:
            json.dump(
                config | {"id2label": {"0": "score"}, "label2id": {"score": 0}, "pad_token_id": 0},
                f,
                indent=2,
            )
        save_file(whole, os.path.join(folder, "model.safetensors"), {"format": "pt"})


def score_ids(tokenizer, messages, answer):
    """What the reward model reads: the conversation and the answer, ending with its <|im_end|>."""
    turns = [*messages, {"role": "assistant", "content": answer}]
    return render_chat(tokenizer, turns, think=False, add_generation_prompt=False)[0][:-1]


def score_batch(model, sequences, budget, device):
    """[num_seqs] scores, packed `budget` tokens at a time."""
    length, scores = lambda i: len(sequences[i]), {}
    for pack in split_by_budget(sorted(range(len(sequences)), key=length), length, budget):
        ids = torch.tensor(np.concatenate([sequences[i] for i in pack]), device=device)
        cu_seqlens = torch.tensor(
            [0, *np.cumsum([length(i) for i in pack])], dtype=torch.int32, device=device
        )
        shared = shared_prefixes([sequences[i] for i in pack], device)  # a question and its answers
        scores |= dict(
            zip(pack, model(ids, cu_seqlens, max(map(length, pack)), shared), strict=True)
        )
    return torch.stack([scores[i] for i in range(len(sequences))])


def rm_device():
    return (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def load_pairs(path, tokenizer, cfg):
    """[(chosen ids, rejected ids)] of preference rows: {chosen, rejected} chats, or HelpSteer's {context, response1,
    response2, overall_preference} where negative prefers response1 and 0 is dropped (gap G7)."""

    def normalize(row, where):
        if "overall_preference" in row:
            context = as_messages(row.get("context") or row.get("prompt") or [], "context")
            replies = [
                required_field(row, where, "response1"),
                required_field(row, where, "response2"),
            ]
            if row["overall_preference"] not in (-3, -2, -1, 1, 2, 3):
                raise BadRow("no preference")
            best, worst = replies if row["overall_preference"] < 0 else replies[::-1]
        else:
            chosen, rejected = (
                as_messages(required_field(row, where, name, (str, list)), name)
                for name in ("chosen", "rejected")
            )
            context = as_messages(row["prompt"]) if row.get("prompt") else chosen[:-1]
            best, worst = (
                ([{"content": ""}] + reply)[-1]["content"] for reply in (chosen, rejected)
            )
        if best == worst or not context or not best or not worst:
            raise BadRow("equal answers or no question")
        return {"pair": [score_ids(tokenizer, context, best), score_ids(tokenizer, context, worst)]}

    rows = load_table(path, normalize)
    kept = [row["pair"] for row in rows if max(map(len, row["pair"])) <= cfg.rm_max_len]
    if len(kept) < len(rows):
        print0(
            f"data {path}: dropped {len(rows) - len(kept)} of {len(rows)} pairs, over {cfg.rm_max_len} tokens"
        )
    return kept


def train_reward_model(cfg, folder):
    """Bradley-Terry: the mean over pairs of -log sigmoid(s_chosen - s_rejected), one epoch (paper 4.2.2). Sharded and checkpointed as
    policies are; every rank trains on its share of a batch, and rank 0 writes the folder."""
    (rank, world), device, init_from = ranks(), rm_device(), cfg.rm_init_from or cfg.init_from
    with one_sentence(f"reward model from {init_from}"):
        check_memory(init_from, cfg, world, device, pair=2 * cfg.rm_max_len)
        tokenizer, qwen3 = (
            load_tokenizer(init_from),
            Qwen3.from_pretrained(init_from, device=device),
        )
    qwen3.lm_head, qwen3.gradient_checkpointing = None, device.type == "cuda"
    model = shard(RewardModel(qwen3).to(device), device, cfg.shard)
    pairs = load_pairs(cfg.rm_data, tokenizer, cfg)
    held_out = load_pairs(cfg.rm_eval_data, tokenizer, cfg) if cfg.rm_eval_data else []
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=cfg.rm_lr, betas=(cfg.beta1, cfg.beta2), weight_decay=0.0, fused=True
    )
    steps = max(cfg.rm_epochs * len(pairs) // cfg.rm_samples_per_step, 1)
    order = np.concatenate(
        [
            np.random.default_rng([cfg.seed, 11, e]).permutation(len(pairs))
            for e in range(cfg.rm_epochs)
        ]
    )
    print0(
        f"reward model: {len(pairs)} pairs, {steps} steps of {cfg.rm_samples_per_step}, from {init_from}"
    )
    for step in tqdm(
        range(1, steps + 1), desc="reward model", leave=False, disable=None if rank == 0 else True
    ):
        for group in optimizer.param_groups:
            group["lr"] = cfg.rm_lr * min(step / (0.03 * steps + 1), 1 - (step - 1) / steps)
        taken = order[(step - 1) * cfg.rm_samples_per_step : step * cfg.rm_samples_per_step]
        packs = split_by_budget(
            [pairs[i] for i in taken[rank::world]],
            lambda pair: sum(map(len, pair)),
            cfg.micro_batch_tokens,
        )
        # equally many on every rank: collectives must match
        for i in range(int(all_reduce({"n": len(packs)}, "max")["n"])):
            pack = packs[i] if i < len(packs) else pairs[:1]
            scores = score_batch(
                model, [ids for pair in pack for ids in pair], math.inf, device
            ).view(-1, 2)
            (
                -F.logsigmoid(scores[:, 0] - scores[:, 1]).sum()
                * world
                / len(taken)
                * (i < len(packs))
            ).backward()
        average_gradients(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    for name, part in (("training", pairs[:512]), ("held-out", held_out)):
        if part:
            with torch.no_grad():
                scores = score_batch(
                    model, [ids for pair in part for ids in pair], cfg.micro_batch_tokens, device
                ).view(-1, 2)
            print0(
                f"reward model: pair accuracy {(scores[:, 0] > scores[:, 1]).float().mean():.3f} on {len(part)} {name} pairs"
            )
    if hasattr(model, "reshard"):
        # a forward without backward leaves the root gathered, in compute precision
        model.reshard()
    model.save_pretrained(folder + ".tmp")
    if rank == 0:
        save_tokenizer(init_from, folder + ".tmp")
        os.rename(folder + ".tmp", folder)
    all_gather(None)
    del model, qwen3, optimizer
    # FSDP's modules refer to each other, and the policy wants the room
    gc.collect()


@functools.cache
def load_reward_model(path, device, workers=8):
    """score(messages_list, answers) -> list of floats (None where an endpoint failed). path: a folder written by this
    script, any Hugging Face sequence classifier with one label, or the URL of an endpoint such as http://host:8000/pooling (vLLM)."""
    if path.startswith(("http://", "https://")):
        pool = ThreadPoolExecutor(max(workers, 1))
        return lambda messages_list, answers: list(
            pool.map(lambda m, a: ask_endpoint(path, m, a), messages_list, answers)
        )
    if not os.path.exists(os.path.join(path, "config.json")):
        fail(f"--rm={path}: no reward model there (config.json is missing).")
    with one_sentence(f"--rm={path}"):
        architecture = json.load(open(os.path.join(path, "config.json")))["architectures"][0]
    # transformers would give it a score head of random numbers
    if not architecture.endswith("ForSequenceClassification"):
        fail(f"--rm={path}: {architecture} is no sequence classifier.")
    template = os.path.join(path, "chat_template.jinja")
    if (
        architecture != "Qwen3ForSequenceClassification"
        or not os.path.exists(template)
        or open(template).read() != chat_template()
    ):
        return load_classifier(path, device)  # somebody else's: it was trained on its own template
    with one_sentence(f"--rm={path}"):
        tokenizer, body = (
            load_tokenizer(path),
            torch.bfloat16 if device.type == "cuda" else torch.float32,
        )
        with torch.device("meta"):
            model = RewardModel(Qwen3(read_config(path))).requires_grad_(False)
        files = sorted(name for name in os.listdir(path) if name.endswith(".safetensors"))
        state = {k: v for name in files for k, v in load_file(os.path.join(path, name)).items()}
        state = {
            k: v.to(torch.float32 if k.startswith("score") else body) for k, v in state.items()
        }
        shapes = lambda tensors: {(k, tuple(v.shape)) for k, v in tensors.items()}
        if odd := shapes(model.state_dict()) ^ shapes(state):
            raise ValueError(f"tensors are missing, unknown or misshapen, first {min(odd)[0]}")

    def score(messages_list, answers):
        sequences = [
            tuple(score_ids(tokenizer, m, a)) for m, a in zip(messages_list, answers, strict=True)
        ]
        # equal answers get equal scores: rounding in a batch must not rank them
        distinct = list(dict.fromkeys(sequences))
        model.load_state_dict({k: v.to(device) for k, v in state.items()}, assign=True)
        with torch.no_grad():
            scores = score_batch(model, distinct, 32768, device).tolist() if distinct else []
        # in host memory: the rest of a step wants the GPU's
        model.load_state_dict(state, assign=True)
        score_of = dict(zip(distinct, scores))
        return [score_of[ids] for ids in sequences]

    return score


def load_classifier(path, device):
    """Any other sequence classifier, through transformers and its own chat template, one by one. An answer that spells one of its special
    tokens cannot open a turn: a dot parts it."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = (
        AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=torch.bfloat16)
        .to(device)
        .eval()
    )

    @torch.no_grad()
    def score(messages_list, answers):
        for token in (
            added.content for added in tokenizer.added_tokens_decoder.values() if added.special
        ):
            answers = [a.replace(token, token[0] + "\u00b7" + token[1:]) for a in answers]
        chats = [
            [*m, {"role": "assistant", "content": a}]
            for m, a in zip(messages_list, answers, strict=True)
        ]
        ids = (
            tokenizer.apply_chat_template(
                chat, tokenize=True, return_dict=False, return_tensors="pt"
            )
            for chat in chats
        )
        return [model(x.to(device)).logits[0, 0].item() for x in ids]

    return score


def ask_endpoint(url, messages, answer):
    """Raw score of one answer from a pooling server that takes chat messages and renders them itself; None after three failures."""
    # no token that opens a turn
    turns = [*messages, {"role": "assistant", "content": answer.replace("<|", "<\u00b7|")}]
    # vLLM would take a sigmoid of a single label
    body = json.dumps({"messages": turns, "use_activation": False}).encode()
    for _ in range(3):
        try:
            request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
            data = json.load(urllib.request.urlopen(request, timeout=60))["data"][0]
            value = data.get("score", data.get("data"))
            while isinstance(value, list):  # [score], or [[score] of each token]: the last token's
                value = value[-1]
            return float(value)
        except (OSError, LookupError, ValueError, TypeError, AttributeError):
            time.sleep(1.0)
    return None


def check_reward_model(path, rows, workers):
    """Before training: the reward model answers with finite numbers, and not with one number for everything."""
    score, sample = load_reward_model(path, rm_device(), workers), rows[: min(8, len(rows))]
    scores = [
        s
        for reply in ("", "Yes.", "a a a a")
        for s in score([r["messages"] for r in sample], [reply] * len(sample))
    ]
    if any(s is None or not math.isfinite(s) for s in scores) or len(set(scores)) < 2:
        fail(
            f"reward model self test: scores {scores[:4]} of {path} are missing, not finite, or all equal."
        )

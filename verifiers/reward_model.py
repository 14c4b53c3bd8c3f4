"""Reward models (paper 4.2). Three kinds give a score:

- a Bradley-Terry model that rlhf.py trains on pairs of a chosen and a rejected answer,
- any other sequence classifier in a Hugging Face folder,
- a scoring endpoint.

RLHF learns from the score, and so does the thinking model of IF-RL (4.4). A reward model reads the
question and the answer, never the thinking. The stages decide what a score is worth, and what an
answer earns if it mixes languages or never closes its thought. The flags are declared in rlhf.py.
"""

import functools
import gc
import itertools
import json
import math
import os
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from lib.chats import CHATS, QUESTIONS, as_messages, read_question, split_text, with_system
from lib.common import (
    all_gather,
    all_reduce,
    average_gradients,
    exchange_gradients,
    print0,
    ranks,
    shard,
)
from lib.data import BadRow, first_nonempty, load_table, required_field
from lib.guard import fail, one_sentence
from lib.packing import shared_prefixes, split_by_budget
from lib.plan import check_memory
from lib.progress import progress
from model import (
    Qwen3,
    chat_template,
    find_file,
    hf_config,
    load_tokenizer,
    read_config,
    render_chat,
    save_tokenizer,
    weight_files,
)

# In front of the chat template of a reward model: clients that render the chat themselves have to
# read what score_ids gives, which is in no_think mode and ends with the answer's <|im_end|>.
SCORED_CHAT = "{%- set enable_thinking = false -%}{%- set ends_with_answer = true -%}"


# ---- The model -----------------------------------------------------------------------------------
class RewardModel(nn.Module):
    """Qwen3 body with a scalar head on the last token of each packed sequence (paper 4.2.2).

    On disk it is a Qwen3ForSequenceClassification with one label, which transformers and vLLM open
    and which scores there as here.
    """

    def __init__(self, qwen3):
        super().__init__()
        self.model = qwen3.model
        # nn.Module does not look into lists, so Qwen3's language head is no part of this module.
        self.qwen3 = [qwen3]
        self.score = nn.Linear(qwen3.config.hidden_size, 1, bias=False)
        nn.init.zeros_(self.score.weight)

    def forward(self, input_ids_T, cu_seqlens, max_seqlen, shared=None):
        """Return the scores [num_seqs], fp32. The arguments are those of Qwen3's packed forward."""
        # M is the number of sequences here: only their last tokens are kept.
        last_M = cu_seqlens[1:].long() - 1
        hidden_MD = self.qwen3[0].packed_hidden(input_ids_T, cu_seqlens, max_seqlen, last_M, shared)
        return F.linear(hidden_MD.float(), self.score.weight.float()).squeeze(-1)

    def save_pretrained(self, folder):
        """Write model and tokenizer. Every rank gathers tensor by tensor, and rank 0 writes."""
        rank, _ = ranks()
        whole = {}
        for name, p in self.named_parameters():
            p = p.full_tensor() if hasattr(p, "full_tensor") else p.detach()
            if rank == 0:
                whole[name] = p.cpu().contiguous()
        if rank != 0:
            return

        os.makedirs(folder, exist_ok=True)
        save_tokenizer(self.qwen3[0].tokenizer_files, folder, SCORED_CHAT + chat_template())
        config = hf_config(self.qwen3[0].config)
        config["architectures"] = ["Qwen3ForSequenceClassification"]
        config["num_labels"] = 1
        config["id2label"] = {"0": "score"}
        config["label2id"] = {"score": 0}
        # A server returns the score itself, not its sigmoid.
        config["problem_type"] = "regression"
        # transformers scores the last token that is not this one, so it has to be what pads.
        tokenizer = load_tokenizer(folder)
        config["pad_token_id"] = tokenizer.token_to_id("<|endoftext|>")
        with open(os.path.join(folder, "config.json"), "w") as f:
            json.dump(config, f, indent=2)
        save_file(whole, os.path.join(folder, "model.safetensors"), {"format": "pt"})


def score_ids(tokenizer, messages, answer):
    """Return the ids that the reward model reads: conversation and answer, up to its <|im_end|>."""
    turns = [*messages, {"role": "assistant", "content": answer}]
    ids = render_chat(tokenizer, turns, think=False, add_generation_prompt=False)[0]
    # The template ends a turn with <|im_end|> and a line end.
    return ids[:-1]


def score_batch(model, sequences, budget, device):
    """Return the scores [num_seqs] of token sequences, packed `budget` tokens at a time."""

    def length(i):
        return len(sequences[i])

    scores = {}
    for pack in split_by_budget(sorted(range(len(sequences)), key=length), length, budget):
        packed = [sequences[i] for i in pack]
        lengths = [len(ids) for ids in packed]
        input_ids_T = torch.tensor(np.concatenate(packed), device=device)
        offsets = [0, *np.cumsum(lengths)]
        cu_seqlens = torch.tensor(offsets, dtype=torch.int32, device=device)
        # The answers to one question share its tokens, which are then computed once.
        shared = shared_prefixes(packed, device)
        pack_scores = model(input_ids_T, cu_seqlens, max(lengths), shared)
        for i, score in zip(pack, pack_scores, strict=True):
            scores[i] = score
    return torch.stack([scores[i] for i in range(len(sequences))])


def rm_device():
    """Return this rank's GPU, or the CPU where there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


# ---- Training on pairs ---------------------------------------------------------------------------
PREFERENCES = ("overall_preference", "preference_strength")  # HelpSteer 3, HelpSteer 2


def read_compared(row, where):
    """Return (context, chosen answer, rejected answer) of a row that compares two answers (G7).

    A negative preference prefers the first response. A row with preference 0 is dropped.
    """
    context = row.get(first_nonempty(row, "context", "prompt")) or []
    if isinstance(context, str):
        context = split_text(context) or context
    context = as_messages(context, "context")
    first = required_field(row, where, first_nonempty(row, "response1", "response_1"))
    second = required_field(row, where, first_nonempty(row, "response2", "response_2"))
    preference = row[first_nonempty(row, *PREFERENCES)]
    if preference not in (-3, -2, -1, 1, 2, 3):
        raise BadRow("no preference")
    if preference < 0:
        return context, first, second
    return context, second, first


def read_chats(row, where):
    """Return (context, chosen answer, rejected answer) of a row with a chosen and a rejected chat.

    Each is a chat that ends with the answer, one turn, or the answer's text. The context is the
    row's question, or what both chats hold before their answers.
    """
    chosen = as_chat(required_field(row, where, "chosen", (str, list, dict)), "chosen")
    rejected = as_chat(required_field(row, where, "rejected", (str, list, dict)), "rejected")
    chat = first_nonempty(row, *CHATS)
    if row.get(first_nonempty(row, *QUESTIONS)):
        context = with_system(row, read_question(row))
    elif row.get(chat):
        context = with_system(row, as_messages(row[chat], chat))
    else:
        context = chosen[:-1]
        if [turn["content"] for turn in context] != [turn["content"] for turn in rejected[:-1]]:
            raise BadRow("chosen and rejected answer different conversations")
    chosen_answer = chosen[-1]["content"] if chosen else ""
    rejected_answer = rejected[-1]["content"] if rejected else ""
    return context, chosen_answer, rejected_answer


def read_pair(row, where):
    """Return (context, chosen answer, rejected answer) of a preference row of any known schema."""
    is_compared = any(name in row for name in PREFERENCES)
    read = read_compared if is_compared else read_chats
    context, chosen, rejected = read(row, where)
    is_asked = any(turn["content"].strip() for turn in context)
    if chosen == rejected or not is_asked or not chosen or not rejected:
        raise BadRow("equal answers or no question")
    return context, chosen, rejected


def as_chat(value, name):
    """Messages of a chat in any form: turns, one turn, a text with marks (hh-rlhf), an answer."""
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, str):
        value = split_text(value) or [{"role": "assistant", "content": value}]
    messages = as_messages(value, name)
    if messages and messages[-1]["role"] != "assistant":
        raise BadRow("a chat that does not end with an answer")
    return messages


def read_rated(row, where):
    """Return (context, answer, scores) of a HelpSteer row, which rates a single answer.

    The scores are compared from left to right: helpfulness, and where it is equal the others.
    """
    prompt = required_field(row, where, "prompt")
    context = split_text(prompt) or as_messages(prompt)
    answer = required_field(row, where, "response")
    scores = [row.get(name) or 0 for name in ("helpfulness", "correctness", "coherence")]
    return context, answer, scores


def load_pairs(path, tokenizer, cfg):
    """Return [[chosen ids, rejected ids]] of the preference rows of a data set.

    A row holds two chats {chosen, rejected}, two responses and a preference between them, or one
    response with scores: then every two of one prompt that are rated differently are a pair. A pair
    is dropped if question and answer exceed cfg.rm_max_len tokens.
    """

    def normalize(row, where):
        if "helpfulness" in row:
            context, answer, scores = read_rated(row, where)
            return {"context": context, "answer": answer, "scores": scores}
        context, chosen, rejected = read_pair(row, where)
        return {"context": context, "chosen": chosen, "rejected": rejected}

    pairs = []
    for row in pair_up(load_table(path, normalize, 0, cfg.ignore_fields)):
        chosen_ids = score_ids(tokenizer, row["context"], row["chosen"])
        rejected_ids = score_ids(tokenizer, row["context"], row["rejected"])
        pairs.append([chosen_ids, rejected_ids])
    if not pairs:
        fail(f"data {path}: no two answers to one question that are rated differently.")
    kept = [pair for pair in pairs if max(map(len, pair)) <= cfg.rm_max_len]
    num_dropped = len(pairs) - len(kept)
    if num_dropped > 0:
        print0(
            f"data {path}: dropped {num_dropped} of {len(pairs)} pairs, "
            f"over {cfg.rm_max_len} tokens"
        )
    return kept


def pair_up(rows):
    """Rows with a chosen and a rejected answer; of rated answers every two of one context."""
    pairs = [row for row in rows if "scores" not in row]
    rated = {}  # the context as text -> its rows
    for row in rows:
        if "scores" in row:
            rated.setdefault(json.dumps(row["context"]), []).append(row)
    for answers in rated.values():
        best_first = sorted(answers, key=lambda row: row["scores"], reverse=True)
        for better, worse in itertools.combinations(best_first, 2):
            if better["scores"] != worse["scores"] and better["answer"] != worse["answer"]:
                answers_of_pair = {"chosen": better["answer"], "rejected": worse["answer"]}
                pairs.append({"context": better["context"], **answers_of_pair})
    return pairs


def score_pairs(model, pairs, budget, device):
    """Return the scores [num_pairs, 2]: of the chosen answers, and of the rejected ones."""
    sequences = list(itertools.chain.from_iterable(pairs))
    return score_batch(model, sequences, budget, device).view(-1, 2)


def backward_pairs(model, pairs, batch, cfg, device):
    """Add the gradient of the Bradley-Terry loss of one batch (paper 4.2.2).

    The loss is the mean over the batch of -log sigmoid(s_chosen - s_rejected). `batch` holds the
    same indices into `pairs` on every rank, and rank r takes every world-th of them from the r-th.
    """
    rank, world = ranks()
    own_pairs = [pairs[i] for i in batch[rank::world]]
    packs = split_by_budget(
        own_pairs, lambda pair: len(pair[0]) + len(pair[1]), cfg.micro_batch_tokens
    )

    # A forward and a backward are collectives, so each rank needs equally many. A rank with fewer
    # packs adds dummies of weight 0.
    num_real = len(packs)
    max_packs = int(all_reduce({"n": num_real}, "max")["n"])
    packs += [pairs[:1]] * (max_packs - num_real)

    for i, pack in enumerate(packs):
        exchange_gradients(model, i == len(packs) - 1)
        # One forward for the whole pack: scores [pairs of the pack, 2].
        scores = score_pairs(model, pack, math.inf, device)
        # Gradients are averaged over ranks, but len(batch) already counts the pairs of all ranks.
        # The factor world undoes the average.
        loss = -F.logsigmoid(scores[:, 0] - scores[:, 1]).sum() * world / len(batch)
        weight = 1.0 if i < num_real else 0.0
        (weight * loss).backward()


def report_accuracy(model, pairs, name, cfg, device):
    """Print the share of pairs whose chosen answer scores higher than the rejected one."""
    with torch.no_grad():
        scores = score_pairs(model, pairs, cfg.micro_batch_tokens, device)
    accuracy = (scores[:, 0] > scores[:, 1]).float().mean()
    print0(f"reward model: pair accuracy {accuracy:.3f} on {len(pairs)} {name} pairs")


def train_reward_model(cfg, folder):
    """Train a Bradley-Terry reward model on cfg.rm_data and write it to `folder` (paper 4.2.2).

    With cfg.check it loads model and pairs, and stops before the first step.
    The model is sharded as policies are, and every rank trains on its share of a batch.
    """
    rank, world = ranks()
    device = rm_device()
    init_from = cfg.rm_init_from or cfg.init_from
    with one_sentence(f"reward model from {init_from}"):
        checkpointing, reduce_once = check_memory(
            init_from, cfg, world, device, pair=2 * cfg.rm_max_len
        )
        tokenizer = load_tokenizer(init_from)
        qwen3 = Qwen3.from_pretrained(init_from, device=device)
    qwen3.lm_head = None
    qwen3.checkpointing = checkpointing
    model = shard(RewardModel(qwen3).to(device), device, cfg.shard, reduce_once)

    pairs = load_pairs(cfg.rm_data, tokenizer, cfg)
    held_out = load_pairs(cfg.rm_eval_data, tokenizer, cfg) if cfg.rm_eval_data else []
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=cfg.rm_lr, betas=(cfg.beta1, cfg.beta2), weight_decay=0.0, fused=True
    )

    # Every epoch has an order of its own, which is the same on every rank.
    epochs = []
    for epoch in range(cfg.rm_epochs):
        rng = np.random.default_rng([cfg.seed, 11, epoch])
        epochs.append(rng.permutation(len(pairs)))
    order = np.concatenate(epochs)
    batch_size = cfg.rm_samples_per_step
    steps = max(cfg.rm_epochs * len(pairs) // batch_size, 1)
    print0(f"reward model: {len(pairs)} pairs, {steps} steps of {batch_size}, from {init_from}")
    if cfg.check:
        return

    for step in progress(range(1, steps + 1), "reward model"):
        # The learning rate rises over the first 3% of the steps and falls linearly to 0 (G6).
        warmup = step / (0.03 * steps + 1)
        decay = 1 - (step - 1) / steps
        for group in optimizer.param_groups:
            group["lr"] = cfg.rm_lr * min(warmup, decay)

        batch = order[(step - 1) * batch_size : step * batch_size]
        backward_pairs(model, pairs, batch, cfg, device)
        average_gradients(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for name, part in (("training", pairs[:512]), ("held-out", held_out)):
        if part:
            report_accuracy(model, part, name, cfg, device)

    # A forward without a backward leaves the root module gathered and in compute precision.
    if hasattr(model, "reshard"):
        model.reshard()
    # The folder gets its name last, so one with that name is complete.
    model.save_pretrained(folder + ".tmp")
    if rank == 0:
        os.rename(folder + ".tmp", folder)
    all_gather(None)  # the other ranks wait for rank 0
    # The policy needs the memory. FSDP's modules refer to each other, so `del` alone frees nothing.
    del model, qwen3, optimizer
    gc.collect()


# ---- Scoring -------------------------------------------------------------------------------------
@functools.cache
def load_reward_model(path, device, workers=8):
    """Return score(messages_list, answers) -> list of floats, None where an endpoint failed.

    path: a folder that rlhf.py wrote, any Hugging Face sequence classifier with one label, or the
    URL of an endpoint such as http://host:8000/pooling (vLLM), which `workers` threads ask.
    A --rm that cannot be used ends the run with one sentence.
    """
    if path.startswith(("http://", "https://")):
        return load_endpoint(path, workers)

    with one_sentence(f"--rm={path}"), open(find_file(path, "config.json")) as f:
        architecture = json.load(f)["architectures"][0]
    # transformers would give any other model a score head of random numbers.
    if not architecture.endswith("ForSequenceClassification"):
        fail(f"--rm={path}: {architecture} is no sequence classifier.")
    # A Qwen3 with another chat template is somebody else's: it was trained on its own template.
    if architecture == "Qwen3ForSequenceClassification" and has_our_template(path):
        return load_bradley_terry(path, device)
    return load_classifier(path, device)


def has_our_template(folder):
    """Tell whether the folder of a checkpoint holds the chat template that model.py renders."""
    template_path = os.path.join(folder, "chat_template.jinja")
    if not os.path.exists(template_path):
        return False
    with open(template_path) as f:
        # The first line, since the template may have changed since the model was trained.
        return chat_template().splitlines()[0] in f.read()


def load_endpoint(url, workers):
    """Return score(messages_list, answers), which asks an endpoint in `workers` threads at once."""
    pool = ThreadPoolExecutor(max(workers, 1))

    def score(messages_list, answers):
        return list(pool.map(functools.partial(ask_endpoint, url), messages_list, answers))

    return score


def load_bradley_terry(path, device):
    """Return score(messages_list, answers) of a reward model that rlhf.py wrote.

    The weights stay in host memory and visit `device` during a call only.
    """
    with one_sentence(f"--rm={path}"):
        tokenizer = load_tokenizer(path)
        with torch.device("meta"):
            model = RewardModel(Qwen3(read_config(path))).requires_grad_(False)

        state = {}
        for file in weight_files(path):
            state |= load_file(file)
        body_dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        for name, tensor in state.items():
            state[name] = tensor.to(torch.float32 if name.startswith("score") else body_dtype)

        expected = {(name, tuple(p.shape)) for name, p in model.state_dict().items()}
        found = {(name, tuple(p.shape)) for name, p in state.items()}
        odd = expected ^ found
        if odd:
            raise ValueError(f"tensors are missing, unknown or misshapen, first {min(odd)[0]}")

    def score(messages_list, answers):
        # Tuples, because equal sequences are found by hashing.
        sequences = []
        for messages, answer in zip(messages_list, answers, strict=True):
            sequences.append(tuple(score_ids(tokenizer, messages, answer)))
        # Equal answers get equal scores. Scored apart, rounding in a batch could rank them.
        distinct = list(dict.fromkeys(sequences))
        model.load_state_dict({k: v.to(device) for k, v in state.items()}, assign=True)
        with torch.no_grad():
            scores = score_batch(model, distinct, 32768, device).tolist() if distinct else []
        # Back to host memory: the rest of a step needs the GPU's.
        model.load_state_dict(state, assign=True)
        score_of = dict(zip(distinct, scores, strict=True))
        return [score_of[ids] for ids in sequences]

    return score


def load_classifier(path, device):
    """Return score(messages_list, answers) of any other sequence classifier, through transformers.

    Chats are rendered by the classifier's own template and scored one by one. The weights stay in
    host memory and visit `device` during a call only.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForSequenceClassification.from_pretrained(
        path, num_labels=1, dtype=torch.bfloat16
    )
    model.eval()
    added_tokens = tokenizer.added_tokens_decoder.values()
    special_tokens = [token.content for token in added_tokens if token.special]

    @torch.no_grad()
    def score(messages_list, answers):
        model.to(device)
        scores = []
        for messages, answer in zip(messages_list, answers, strict=True):
            # An answer that spells a special token must not open a turn: a dot parts the token.
            for token in special_tokens:
                answer = answer.replace(token, token[0] + "\u00b7" + token[1:])
            chat = [*messages, {"role": "assistant", "content": answer}]
            ids = tokenizer.apply_chat_template(
                chat, tokenize=True, return_dict=False, return_tensors="pt"
            )
            scores.append(model(ids.to(device)).logits[0, 0].item())
        model.to("cpu")  # the rest of a step needs the GPU's memory
        return scores

    return score


def ask_endpoint(url, messages, answer):
    """Return the raw score of one answer from a pooling server, or None after three failures.

    The server takes chat messages and renders them itself.
    """
    # An answer that spells a special token must not open a turn: a dot parts the token.
    turns = [*messages, {"role": "assistant", "content": answer.replace("<|", "<\u00b7|")}]
    # With use_activation, vLLM would return the sigmoid of a single label.
    body = json.dumps({"messages": turns, "use_activation": False}).encode()
    for _ in range(3):
        try:
            request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
            data = json.load(urllib.request.urlopen(request, timeout=60))["data"][0]
            value = data.get("score", data.get("data"))
            # A list holds the score, or one [score] a token: the last token's is the answer's.
            while isinstance(value, list):
                value = value[-1]
            return float(value)
        except (OSError, LookupError, ValueError, TypeError, AttributeError):
            time.sleep(1.0)
    return None


def check_reward_model(path, rows, workers):
    """End the run before training if the reward model is unusable.

    It has to answer with finite numbers, and not with one number for everything.
    """
    score = load_reward_model(path, rm_device(), workers)
    messages_list = [row["messages"] for row in rows[:8]]
    scores = []
    for reply in ("", "Yes.", "a a a a"):
        scores += score(messages_list, [reply] * len(messages_list))
    all_finite = all(s is not None and math.isfinite(s) for s in scores)
    if not all_finite or len(set(scores)) < 2:
        fail(
            f"reward model self test: scores {scores[:4]} of {path} are missing, not finite, "
            "or all equal."
        )

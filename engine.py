"""Rollouts: prompts in, completions out, tokens on both sides (model text is never encoded again).

The built-in sampler runs anywhere: one packed prefill that every sample of a prompt shares, then
batched decoding with a KV cache. A completion is handed on the moment it ends, so that its reward
is computed while others still decode. Sampling is a function of each rollout's own seed: a
completion does not depend on what it was batched with. On a GPU a decoding step is a CUDA graph,
captured again when rows leave or the cache grows: 64 rows of 0.6B take 5 to 7 ms a step, 22 ms op
by op.

    B rows still decoding   R rollouts of a wave   P distinct prompts   S cache slots
    T prompt tokens   N query heads   K kv heads   H head width   V vocabulary   M scored tokens
"""

import hashlib
import json
import os
import tempfile
import time
from dataclasses import dataclass, field

import numpy as np
import torch

from kernels.attention import flash_attention_varlen
from kernels.decode_attention import decode_attention, slot_bias
from kernels.linear_logprob import head_logits
from kernels.sampling import sample_tokens
from lib.common import all_gather, compute_device, print0
from lib.estimate import vllm_cache_bytes
from lib.guard import engine_name, fail, vllm_is_installed
from lib.lora import changed_share, lora_layers, plain_parameters
from lib.packing import pack_rollouts
from lib.plan import (
    TORCH_ROWS,
    VLLM_ROWS,
    Run,
    cache_bytes,
    free_memory,
    gpu_memory,
    longest_sequence,
    plan_of_flags,
)
from model import hf_config, render_chat, stop_ids


# ---- 1. A rollout and its random numbers ---------------------------------------------------------
@dataclass
class Rollout:
    """One sampled completion on its way from prompt to advantage."""

    row: dict  # the data row it came from
    group: int  # rollouts of one prompt share it
    prompt_ids: list
    seed: int  # request_seed(run, step, prompt, sample)
    sample: int = 0  # its number in the group; the samples of a group are on several ranks
    greedy: bool = False  # take the best token each time, whatever the temperature of the others
    completion_ids: list = field(default_factory=list)  # with the stop token if there is one
    # log-probs under softmax(logits / temperature) over the whole vocabulary (vLLM: see generate)
    sampler_logprobs: list = field(default_factory=list)
    finish_reason: str = ""  # "stop" or "length"
    text: str = ""  # decoded completion with its thinking, without the stop token
    reward: float = float("nan")
    teacher_logprobs: list = field(default_factory=list)  # MOPD: under the teacher of its domain
    score: float = float("nan")  # RLHF: the reward before shaping
    pending: object = None  # the verdict under way, a future
    verify_s: float = 0.0  # seconds that a verifier worker spent on it
    # ok, wrong, no_answer, language, timeout, crash, or infra (masked, never a reward)
    status: str = ""
    advantage: float = 0.0
    in_loss: bool = True  # False: outside the loss, its denominator and the group statistics


def request_seed(*key):
    """63-bit seed from integers, such as (run seed, step, prompt, sample); same on every rank."""
    sequence = np.random.SeedSequence([int(k) % 2**32 for k in key])
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def uniforms(seeds, start, count):
    """[len(seeds), count] floats in (0, 1): numbers start .. start + count of each seed's stream.

    The generator is SplitMix64, so that any stretch of a stream can be computed by itself.
    """
    index = np.arange(start + 1, start + count + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        z = np.asarray(seeds, np.uint64)[:, None] + np.uint64(0x9E3779B97F4A7C15) * index
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return ((z >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def finish_rollout(rollout, reason, tokenizer, on_finished):
    """Decode a completion that has ended, and call on_finished, which starts its reward."""
    rollout.finish_reason = reason
    ids = rollout.completion_ids
    if reason == "stop":
        ids = ids[:-1]
    rollout.text = tokenizer.decode(ids, skip_special_tokens=False)
    if on_finished is not None:
        on_finished(rollout)


# ---- 2. Sampler and trainer agree ----------------------------------------------------------------
def whole_parameters(model):
    """(name, tensor) of every parameter, whole and in compute precision, LoRA's adapters merged.

    FSDP2 gathers sharded parameters layer by layer, one collective each, so no rank ever holds
    more than a layer and the root. A tensor is valid until the next one is asked for.
    """
    groups = [(name, part) for name, part in model.named_modules() if hasattr(part, "unshard")]
    if not groups:
        yield from plain_parameters(model)
    # The root comes last: a parameter that is still sharded then belongs to a layer, already seen.
    for prefix, part in groups[1:] + groups[:1]:
        part.unshard()
        for name, p in plain_parameters(part, prefix):
            if not hasattr(p, "full_tensor"):
                yield name, p
        part.reshard()


# Temperature and tokens of the completions that check_parity draws. vLLM takes no higher one.
PARITY_TEMPERATURE, PARITY_TOKENS = 2.0, 8


@torch.no_grad()
def check_parity(engine, model, prompt="What is 2 + 3? Think, then answer in one sentence."):
    """Mean |log-prob of the engine - log-prob of the trainer| over 16 x 8 tokens that the engine
    draws at temperature 2.

    A policy that has seen SFT begins each answer with tokens whose probability is 1 whatever most
    weights are. At temperature 2 it soon leaves them, and then every weight counts. Rounding makes
    0.01 in bf16, which GPUs use, and 1e-6 in fp32. RuntimeError if it is more: the engine then
    samples from another policy than the one that is trained.
    """
    messages = [{"role": "user", "content": prompt}]
    prompt_ids, _ = render_chat(engine.tokenizer, messages, think=True)
    rollouts = [Rollout({}, 0, prompt_ids, request_seed(sample)) for sample in range(16)]
    engine.generate(rollouts, PARITY_TOKENS, PARITY_TEMPERATURE)

    batch = pack_rollouts(rollouts, compute_device(model))
    batch["shared"] = None
    logprobs_T, _ = model.token_logprobs(batch, temperature=PARITY_TEMPERATURE)
    if hasattr(model, "reshard"):
        model.reshard()  # a forward pass without a backward pass leaves the root gathered
    scored_M = batch["loss_index"]
    gap_M = logprobs_T[scored_M] - batch["sampler_logprobs_T"][scored_M]
    gap = gap_M.abs().mean().item()
    limit = 0.03 if compute_dtype(model) == torch.bfloat16 else 1e-4
    if not gap < limit:
        raise RuntimeError(
            f"weight sync {engine.syncs}: the engine's log-probs are {gap:.1e} a token off the "
            f"trainer's (limit {limit}): it does not sample from the policy that is trained"
        )
    engine.syncs += 1
    if engine.syncs == 2 and lora_layers(model):  # after the first update
        print0(
            f"lora: the first step changes {changed_share(model):.1%} of the adapted weights once "
            f"merged and rounded; log-probs of the merged weights are {gap:.1e} a token off"
        )
    return gap


def sampler_correction(trainer_logprobs_T, batch, limit):
    """Importance weights [M] of the completion tokens, without gradient: pi_trainer / pi_sampler.

    They correct for a sampler that differs from the trainer (vLLM in bf16). A token whose
    ratio leaves [1 / limit, limit] weighs 0 (Cascade 2 eq. 3, limit 2). Limit 0: all weigh 1.
    """
    if limit == 0:
        return 1.0
    scored_M = batch["loss_index"]
    ratio_M = (trainer_logprobs_T - batch["sampler_logprobs_T"])[scored_M].exp()
    inside_M = (ratio_M >= 1 / limit) & (ratio_M <= limit)
    return ratio_M * inside_M


# ---- 3. The built-in sampler ---------------------------------------------------------------------
class Replay:
    """A function of tensors of fixed shapes as a CUDA graph: recorded once, then replayed as a
    whole.

    The first calls run op by op. They compile the kernels, and where shapes change soon a
    recording would never pay. On CPUs every call runs op by op.
    """

    def __init__(self, function, op_by_op=4):
        self.function = function
        self.calls_before_capture = op_by_op
        self.graph = None

    def __call__(self, *inputs):
        if not inputs[0].is_cuda:
            return self.function(*inputs)
        if self.calls_before_capture > 0:
            self.calls_before_capture -= 1
            return self.function(*inputs)
        if self.graph is None:
            self.inputs = [x.clone() for x in inputs]
            self.graph = torch.cuda.CUDAGraph()
            # thread_local: other threads (NCCL's) may ask the device something meanwhile.
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.output = self.function(*self.inputs)
        for mine, x in zip(self.inputs, inputs, strict=True):
            mine.copy_(x)
        self.graph.replay()
        return self.output


class TorchEngine:
    """The built-in sampler.

    Where the trained weights are whole (one process, or --shard=replicate on CPUs) it decodes
    with the trained module itself. Beside sharded weights it keeps a whole replica, which sync()
    refreshes and compares with the trainer.
    """

    def __init__(self, model, tokenizer, max_rows=0):
        self.tokenizer = tokenizer
        self.stops = stop_ids(tokenizer)
        self.max_rows = max_rows  # rows decoded at once; 0: as many as fit
        self.model = model
        self.syncs = 0
        device = compute_device(model)
        # Rows leave the batch when at most this share is alive. On GPUs that costs a new graph.
        self.shrink_at = 0.85 if device.type == "cuda" else 0.95
        # With LoRA the replica has the merged weights, so that decoding costs what it always does.
        sharded = any(hasattr(p, "full_tensor") for p in model.parameters())
        self.is_replica = sharded or bool(lora_layers(model))
        if self.is_replica:
            dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
            with torch.device("meta"):
                replica = type(model)(model.config).to(dtype)
            self.model = replica.to_empty(device=device).requires_grad_(False)
            self.sync(model)

    def sleep(self):
        """Before an update: its caches are gone after each call, and its weights stay."""

    @torch.no_grad()
    def sync(self, model):
        """Copy the trained weights into the replica, in place; returns the bytes moved.

        RuntimeError if the replica then scores otherwise than the trainer.
        """
        if not self.is_replica:
            return 0
        moved = 0
        targets = dict(self.model.named_parameters())
        for name, whole in whole_parameters(model):
            targets.pop(name).copy_(whole)
            moved += whole.numel() * whole.element_size()
        assert not targets, f"weight sync: no tensor for {list(targets)}"
        check_parity(self, model)
        return moved

    @torch.inference_mode()
    def generate(self, rollouts, max_new_tokens, temperature, top_p=1.0, top_k=0, on_finished=None):
        """Fill completion_ids, finish_reason, text and sampler_logprobs of every rollout, in place.

        on_finished(rollout) is called the moment a completion ends; completion_ids grow token by
        token, sampler_logprobs follow when all have ended. temperature 0 is greedy. top_p and
        top_k restrict what can be drawn; the log-probs are of the whole distribution, as the
        trainer computes them (G4).
        """
        if not rollouts:
            return
        sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
        longest = max(len(r.prompt_ids) for r in rollouts) + max_new_tokens
        rows = self.max_rows or self._rows_that_fit(longest)
        # Waves of equal size: a small last one would take as many steps as a full one.
        waves = -(-len(rollouts) // rows)
        for i in range(waves):
            first = len(rollouts) * i // waves
            last = len(rollouts) * (i + 1) // waves
            Wave(self, rollouts[first:last], max_new_tokens, sampling, on_finished).run()

    def _rows_that_fit(self, length):
        """How many KV caches of `length` tokens fit half of the GPU memory that no tensor holds, or
        1 GiB without a GPU: a power of two, at most 1024.

        A run that was resumed has to cut the same waves, and what PyTorch's allocator keeps unused
        differs then.
        """
        config = self.model.config
        weight = self.model.model.embed_tokens.weight
        values = config.num_key_value_heads * config.head_dim * length
        row = 2 * config.num_hidden_layers * values * weight.element_size()
        room = 1 << 30
        if weight.is_cuda:
            room = free_memory(weight.device, 1) // 2
        rows = max(min(room // row, TORCH_ROWS), 1)
        return 1 << (rows.bit_length() - 1)

    @staticmethod
    def room(slots, left):
        """Empty slots to add to a full cache of `slots`, where `left` more tokens may follow."""
        return min(max(16, slots // 8), left)

    def _prefill(self, rollouts, width, slots, device):
        """Logits [R, V] of the last prompt tokens, and the cache [(k, v)] * layers, each [R, K, S,
        H].

        Prompts fill the slots up to `width`, right-aligned.
        """
        # Every distinct prompt is computed once.
        prompts = list(dict.fromkeys(tuple(r.prompt_ids) for r in rollouts))
        index_of = {prompt: i for i, prompt in enumerate(prompts)}
        prompt_R = torch.tensor([index_of[tuple(r.prompt_ids)] for r in rollouts], device=device)
        lengths = [len(p) for p in prompts]
        cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=device)
        row_T = torch.tensor(np.repeat(np.arange(len(prompts)), lengths), device=device)
        position_T = torch.tensor(np.concatenate([np.arange(n) for n in lengths]), device=device)
        slot_T = position_T + torch.tensor(
            np.repeat(width - np.array(lengths), lengths), device=device
        )
        cache = []

        def attend(layer, q_TNH, k_TKH, v_TKH):
            # Write keys and values of a layer into its cache, prompt by prompt; copy to all
            # samples.
            of_layer = []
            for t_TKH in (k_TKH, v_TKH):
                t_PKSH = t_TKH.new_zeros(len(prompts), t_TKH.shape[1], slots, t_TKH.shape[2])
                t_PKSH[row_T, :, slot_T] = t_TKH
                of_layer.append(t_PKSH.index_select(0, prompt_R))
            cache.append(tuple(of_layer))
            return flash_attention_varlen(q_TNH, k_TKH, v_TKH, cu_seqlens, max(lengths))

        input_ids_T = torch.tensor(np.concatenate(prompts), device=device)
        last_P = cu_seqlens[1:].long() - 1
        hidden_PD = self.model.hidden_states(input_ids_T, position_T, attend, keep_M=last_P)
        logits_PV = head_logits(hidden_PD, self.model.head_weight)
        return logits_PV[prompt_R], cache

    def _decode(self, token_B, position_B, slot_1, cache, bias_BKS):
        """Logits [B, V] after one more token a row.

        Its key and value are written at the slot, and it attends to its row's slots up to that one.
        """
        start_B = slot_1 - position_B
        length_1 = slot_1 + 1
        # A CUDA graph has to find the slot on the device; a CPU writes faster where it knows the
        # slot.
        slot = None if slot_1.is_cuda else slot_1.item()

        def attend(layer, q_BNH, k_BKH, v_BKH):
            for t_BKSH, new_BKH in zip(cache[layer], (k_BKH, v_BKH)):
                if slot is None:
                    t_BKSH.index_copy_(2, slot_1, new_BKH[:, :, None])
                else:
                    t_BKSH.select(2, slot).copy_(new_BKH)
            return decode_attention(q_BNH, *cache[layer], start_B, length_1, bias_BKS)

        hidden_BD = self.model.hidden_states(token_B, position_B, attend)
        return head_logits(hidden_BD, self.model.head_weight)


class Wave:
    """One batch of rollouts on its way through the built-in sampler: prefill, then token by token.

    `alive[b]` is the rollout (an index) in row b of the batch, `running` the pairs (b, rollout)
    that have not ended. Finished rows stay in the batch until 5% (on GPUs 15%) are done; then
    live rows from the end fill their places, and the batch shrinks.
    """

    def __init__(self, engine, rollouts, max_new_tokens, sampling, on_finished):
        self.engine = engine
        self.rollouts = rollouts
        self.max_new_tokens = max_new_tokens
        self.sampling = sampling
        self.on_finished = on_finished
        self.alive = list(range(len(rollouts)))
        self.running = list(enumerate(rollouts))
        self.drawn = []  # of every step: (rollouts of the rows, log-probs of their tokens)

    def run(self):
        self.prefill()
        for step in range(self.max_new_tokens):
            token_B = self.draw(step)
            self.collect(token_B.tolist(), step)
            if not self.running:
                break
            num_left = len(self.running)
            if num_left <= self.engine.shrink_at * len(self.alive):
                token_B = self.shrink(token_B)
            self.grow(step)
            # Decode: the logits of the next token.
            self.bias_BKS[..., self.width + step] = 0.0
            self.logits_BV = self.decode(token_B, self.position_B, self.slot_1)
            self.position_B = self.position_B + 1
            self.slot_1 = self.slot_1 + 1
        self.write_logprobs()

    def prefill(self):
        """Run all prompts, and set up the tensors of the batch."""
        model = self.engine.model
        device = model.model.embed_tokens.weight.device
        # No kernel reads the bias on GPUs, so one head of it will do.
        self.bias_heads = 1 if device.type == "cuda" else model.config.num_key_value_heads
        lengths = [len(r.prompt_ids) for r in self.rollouts]
        self.position_B = torch.tensor(lengths, device=device)
        # Prompts are right-aligned at `width`, so that every row writes the same slot.
        self.width = max(lengths)
        self.slots = self.width + self.engine.room(self.width, self.max_new_tokens)
        self.logits_BV, self.cache = self.engine._prefill(
            self.rollouts, self.width, self.slots, device
        )
        empty_B = self.width - self.position_B
        self.bias_BKS = slot_bias(empty_B, self.width, self.slots, self.bias_heads)
        self.slot_1 = torch.tensor([self.width], device=device)
        self.uniform_SB = self.all_uniforms(device)
        self.greedy = [b for b, r in self.running if r.greedy]
        self.new_decode()

    def all_uniforms(self, device):
        """[max_new_tokens, B] random numbers, one for every token that may be drawn."""
        seeds = [r.seed for r in self.rollouts]
        uniform_BS = uniforms(seeds, 0, self.max_new_tokens)
        return torch.from_numpy(uniform_BS.T.astype(np.float32, "C")).to(device)

    def new_decode(self):
        """The decoding step for the present shapes; a CUDA graph is captured anew."""
        cache, bias_BKS = self.cache, self.bias_BKS

        def decode(token_B, position_B, slot_1):
            return self.engine._decode(token_B, position_B, slot_1, cache, bias_BKS)

        self.decode = Replay(decode)

    def draw(self, step):
        """The next token of every row, from its logits and its own random number."""
        token_B, logprob_B = sample_tokens(self.logits_BV, self.uniform_SB[step], **self.sampling)
        if self.greedy:
            # Greedy rows ignore the random number: any tensor of this shape works.
            any_uniform = logprob_B[self.greedy]
            token_B[self.greedy], logprob_B[self.greedy] = sample_tokens(
                self.logits_BV[self.greedy], any_uniform, temperature=0.0
            )
        self.drawn.append((self.alive, logprob_B))
        return token_B

    def collect(self, tokens, step):
        """Append the tokens to their rollouts, and hand on those that have ended."""
        is_last = step + 1 == self.max_new_tokens
        for b, rollout in self.running:
            rollout.completion_ids.append(tokens[b])
            stopped = tokens[b] in self.engine.stops
            if stopped or is_last:
                reason = "stop" if stopped else "length"
                finish_rollout(rollout, reason, self.engine.tokenizer, self.on_finished)
        self.running = [(b, r) for b, r in self.running if not r.finish_reason]

    def shrink(self, token_B):
        """Move live rows from the end of the batch into the places of finished ones; cut the rest
        off."""
        num_left = len(self.running)
        live = [b for b, _ in self.running]
        free = sorted(set(range(num_left)) - set(live))
        late = [b for b in live if b >= num_left]
        moves = dict(zip(free, late, strict=True))
        self.alive = [self.alive[moves.get(b, b)] for b in range(num_left)]
        self.running = [(b, self.rollouts[i]) for b, i in enumerate(self.alive)]
        self.greedy = [b for b, r in self.running if r.greedy]
        into, late = torch.tensor((free, late), dtype=torch.int64, device=token_B.device)

        def keep(t, dim=0):
            moved = t.index_select(dim, late)
            return t.narrow(dim, 0, num_left).index_copy_(dim, into, moved)

        self.position_B = keep(self.position_B)
        self.bias_BKS = keep(self.bias_BKS)
        self.uniform_SB = keep(self.uniform_SB, 1)
        self.cache = [(keep(k_BKSH), keep(v_BKSH)) for k_BKSH, v_BKSH in self.cache]
        self.new_decode()
        return keep(token_B)

    def grow(self, step):
        """Add empty slots to a full cache. It grows as it fills: few empty slots are read
        fastest."""
        slot = self.width + step
        if slot < self.slots:
            return
        self.slots += self.engine.room(slot, self.max_new_tokens - step)
        for i, layer in enumerate(self.cache):
            longer = []
            for t_BKSH in layer:
                B, K, _, H = t_BKSH.shape
                empty = t_BKSH.new_zeros(B, K, self.slots - slot, H)
                longer.append(torch.cat((t_BKSH, empty), 2))
            self.cache[i] = tuple(longer)
        self.bias_BKS = slot_bias(slot - self.position_B, slot, self.slots, self.bias_heads)
        self.new_decode()

    def write_logprobs(self):
        """Give every rollout the log-probs of its tokens."""
        logprobs_RS = np.empty((len(self.rollouts), len(self.drawn)), np.float32)
        for step, (rows, logprob_B) in enumerate(self.drawn):
            logprobs_RS[rows, step] = logprob_B.cpu().numpy()
        for r, logprobs_S in zip(self.rollouts, logprobs_RS, strict=True):
            r.sampler_logprobs = logprobs_S[: len(r.completion_ids)].tolist()


# ---- 4. vLLM -------------------------------------------------------------------------------------
class VLLMEngine:
    """vLLM inside the training process, one engine a rank, or one for --tensor_parallel ranks.

    It starts from random weights, so that a tensor which sync() forgot cannot go unnoticed.

    On GPUs a step gives and takes its memory in this order:

        generate    caches back, decode, caches freed: reward models and teachers have their place
        sleep       before the update: weights freed too, and not copied, as the next are others
        sync        weights back, written, compared; generate follows
    """

    def __init__(self, model, tokenizer, max_rows=VLLM_ROWS, room=1 << 30, ranks=1):
        """room: bytes for the KV caches of this rank. ranks: that share the engine."""
        # In this process, whose parameters it is given.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from vllm import EngineArgs, LLMEngine

        self.tokenizer = tokenizer
        self.stops = stop_ids(tokenizer)
        self.syncs = 0
        self.warned = False
        self.on_gpu = compute_device(model).type == "cuda"
        self.in_memory = {"weights", "kv_cache"}  # what vLLM's memory pools are called
        self.ranks = ranks
        self.dtype = compute_dtype(model)
        if self.on_gpu:
            place = {"enable_sleep_mode": True}
        else:
            check_cpu_attention(model.config.head_dim)
            place = {
                "enforce_eager": True,
                # A prompt that is cut in two rewinds its random generator, which CPU ones cannot.
                "enable_chunked_prefill": False,
            }
        # vLLM reads the architecture from a file. Weights never touch the disk.
        with tempfile.TemporaryDirectory() as folder:
            with open(os.path.join(folder, "config.json"), "w") as f:
                json.dump(hf_config(model.config), f)
            args = EngineArgs(
                model=folder,
                load_format="dummy",
                skip_tokenizer_init=True,
                generation_config="vllm",
                dtype=str(self.dtype).removeprefix("torch."),
                # As head_logits and linear_logprob: logits in bf16 would be another policy's.
                hf_overrides={"head_dtype": "float32"},
                max_num_seqs=max_rows,
                # As long as the caches allow.
                max_model_len=-1,
                # Fixed and not measured, so that a run which is resumed cuts the same batches.
                kv_cache_memory_bytes=room,
                # With fixed caches vLLM only checks at its start that this share is free.
                gpu_memory_utilization=0.1,
                logprobs_mode="processed_logprobs",
                disable_log_stats=True,
                distributed_executor_backend=(
                    "external_launcher" if "RANK" in os.environ else "uni"
                ),
                tensor_parallel_size=ranks,
                **place,
            )
            self.llm = LLMEngine.from_engine_args(args)
        cache = self.llm.vllm_config.cache_config
        print0(
            f"vLLM: {room / 1e9:.3g} GB of caches a rank hold "
            f"{cache.num_gpu_blocks * cache.block_size:,} tokens"
        )
        self.sync(model)

    def sleep(self):
        """Free the memory of weights and caches; sync() has to come before the next generate."""
        if self.on_gpu:
            # Level 2 drops the weights, where level 1 would copy them to host memory and back.
            self.llm.sleep(2)
            self.in_memory = set()

    def _wake(self, part):
        """Bring the memory of the "weights" or of the "kv_cache" back, without contents."""
        if part not in self.in_memory:
            self.llm.wake_up([part])
            self.in_memory.add(part)

    def _free_caches(self):
        """Free the memory of the caches until the next generate."""
        if self.on_gpu:
            self._forget_prefixes()
            # release_kv_cache_memory() would refuse: the scheduler still holds the ids that ended.
            self.llm.model_executor.discard(("kv_cache",))
            self.in_memory.remove("kv_cache")

    def _forget_prefixes(self):
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept old prefixes")

    @torch.no_grad()
    def sync(self, model):
        """Write the trained weights into the engine, in place; returns the bytes moved.

        They travel layer by layer from their shards. RuntimeError if a tensor of the engine was
        left out, or if it does not score like the trainer afterwards.
        """
        self._wake("weights")
        clock = time.time()
        moved = 0
        sent = {}  # at the first sync, SHA-256 of what every parameter of the engine has to hold

        def tensors():
            nonlocal moved
            for name, p in whole_parameters(model):
                moved += p.numel() * self.dtype.itemsize
                # A copy, since vLLM may keep a tensor until its whole layer has arrived.
                whole = p.to(self.dtype, copy=True)
                if self.syncs == 0:
                    add_to_checksum(sent, name, slice_of(name, whole, self.ranks))
                yield name, whole

        missed = self.llm.collective_rpc(write_weights, args=(tensors(),))[0]
        if missed:
            raise RuntimeError(f"weight sync {self.syncs}: vLLM did not write {missed}")
        if self.syncs == 0:
            compare_checksums(sent, self.llm.collective_rpc("compute_weight_checksums")[0])
        self._forget_prefixes()
        seconds = time.time() - clock
        gap = check_parity(self, model)
        if self.syncs in (1, 2) or self.syncs % 10 == 1:
            print0(
                f"vLLM: sync {self.syncs - 1}, {moved / 1e6:.1f} MB in {seconds:.2f} s, "
                f"log-prob gap {gap:.1e} (x{np.exp(gap):.6f} a token)"
            )
        return moved

    @torch.no_grad()
    def generate(self, rollouts, max_new_tokens, temperature, top_p=1.0, top_k=0, on_finished=None):
        """As TorchEngine.generate, but under top_p or top_k log-probs are of what these leave.

        The log-probs serve as the reported gap alone (GRPO's ratio is between two passes of the
        trainer), so that is announced and not refused. Ranks that share an engine call this
        together; each gets its own rollouts back.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        restricted = temperature > 0 and (top_p < 1 or top_k > 0)
        if restricted and not self.warned:
            self.warned = True
            print0(
                f"vLLM: log-probs are of what top_p={top_p}, top_k={top_k} leave, "
                "so `gap` includes that mass"
            )
        if "weights" not in self.in_memory:
            raise RuntimeError("vLLM sleeps: sync() has to give it weights before it samples")
        self._wake("kv_cache")
        requests = [(r.prompt_ids, r.seed, r.greedy) for r in rollouts]
        owners = rollouts
        if self.ranks > 1:
            everyone, rank = self._of_all_ranks(requests)
            requests, owners = by_turns(everyone, rollouts, rank)
        for i, (prompt_ids, seed, greedy) in enumerate(requests):
            params = SamplingParams(
                temperature=0.0 if greedy else temperature,
                top_p=top_p,
                top_k=top_k,
                seed=seed,
                max_tokens=max_new_tokens,
                logprobs=0,
                stop_token_ids=self.stops,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            self.llm.add_request(str(i), {"prompt_token_ids": prompt_ids}, params)
        while self.llm.has_unfinished_requests():
            for request in self.llm.step():
                r = owners[int(request.request_id)]
                if r is None:
                    continue  # another rank's, which has decoded it, too
                output = request.outputs[0]
                r.completion_ids = list(output.token_ids)
                r.sampler_logprobs = []
                for token, at in zip(output.token_ids, output.logprobs, strict=True):
                    r.sampler_logprobs.append(at[token].logprob)
                reason = "stop" if r.completion_ids[-1] in self.stops else "length"
                finish_rollout(r, reason, self.tokenizer, on_finished)
        self._free_caches()

    def _of_all_ranks(self, requests):
        """(requests of each rank that shares this engine, which of them is this one)."""
        from vllm.distributed.parallel_state import get_tp_group

        group = get_tp_group()
        return all_gather(requests, group.cpu_group), group.rank_in_group


def by_turns(everyone, mine, rank):
    """(requests, owners): those of all ranks by turns, so that long ones stay first, and for each
    its rollout if it is this rank's, else None."""
    requests, owners = [], []
    for i in range(max(map(len, everyone))):
        for number, of_rank in enumerate(everyone):
            if i < len(of_rank):
                requests.append(of_rank[i])
                owners.append(mine[i] if number == rank else None)
    return requests, owners


def compute_dtype(model):
    """The precision in which the trainer computes: bf16 on GPUs, and on CPUs that of its weights,
    which FSDP casts to fp32."""
    parameter = next(model.parameters())
    if compute_device(model).type == "cuda":
        return torch.bfloat16
    return torch.float32 if hasattr(parameter, "full_tensor") else parameter.dtype


def check_cpu_attention(head_dim):
    """End the run if vLLM's CPU build has no attention for heads of this width."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    widths = CPUAttentionBackend.get_supported_head_sizes()
    if head_dim not in widths:
        fail(
            f"--engine=vllm: vLLM on CPUs has no attention for head_dim={head_dim} "
            f"(it has {widths})."
        )


VOCABULARY = ("model.embed_tokens", "lm_head")
# vLLM keeps these matrices in one parameter, one below the other.
FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}


# vLLM cuts these matrices by columns where ranks share an engine; those in FUSED it cuts by rows.
CUT_BY_COLUMNS = ("o_proj", "down_proj")


def slice_of(name, whole, ranks):
    """What vLLM keeps of a tensor on this rank, of as many as share an engine."""
    module = name.split(".")[-2]
    if ranks == 1 or module not in (*FUSED, *CUT_BY_COLUMNS):
        return whole
    from vllm.distributed.parallel_state import get_tp_group

    return whole.chunk(ranks, int(module in CUT_BY_COLUMNS))[get_tp_group().rank_in_group]


def add_to_checksum(sent, name, tensor):
    """Add a tensor to the SHA-256 of the engine's parameter that it becomes a part of."""
    parts = [FUSED.get(part, part) for part in name.split(".")]
    checksum = sent.setdefault(".".join(parts), hashlib.sha256())
    checksum.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())


def compare_checksums(sent, found):
    """RuntimeError if a parameter of the engine holds other bytes than were sent.

    found: {"dp0:pp0:pcp0:tp0:name": SHA-256}. A parameter is left out if vLLM pads it (the
    vocabulary may be), or if its CPU build has packed the matrix and left nothing behind.
    """
    packed_away = hashlib.sha256().hexdigest()
    wrong = []
    for key, checksum in found.items():
        name = key.rpartition(":")[2]
        known = name in sent and checksum != packed_away and not name.startswith(VOCABULARY)
        if known and checksum != sent[name].hexdigest():
            wrong.append(name)
    if wrong:
        raise RuntimeError(f"weight sync 0: vLLM holds other numbers than were sent in {wrong}")


def write_weights(worker, tensors):
    """Load (name, tensor) pairs in place, inside vLLM's worker; returns the parameters left
    unwritten."""
    engine_model = worker.model_runner.get_model()
    wanted = {name for name, _ in engine_model.named_parameters()}
    written = set()
    load = engine_model.load_weights

    def load_and_note(pairs):
        names = load(pairs)
        written.update(names)
        return names

    engine_model.load_weights = load_and_note
    worker.reload_weights(weights_iterator=tensors)
    del engine_model.load_weights
    if worker.device.type == "cpu" and engine_model.config.tie_word_embeddings:
        # vLLM packs a tied head once and never again.
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

        dispatch_cpu_unquantized_gemm(engine_model.lm_head, remove_weight=False)
    return sorted(wanted - written)


def make_engine(name, model, tokenizer, cfg=None):
    """The engine of a run: "torch" is the built-in sampler, "auto" is vLLM if installed beside a
    GPU.

    cfg: flags of an RL run. They say what the trainer keeps on a GPU beside vLLM, and which ranks
    share an engine. Without them the model is all there is.
    """
    if engine_name(name) == "torch":
        return TorchEngine(model, tokenizer)
    if not vllm_is_installed():
        fail("--engine=vllm: vLLM is not installed.")
    device = compute_device(model)
    if device.type == "cpu":
        return VLLMEngine(model, tokenizer, ranks=getattr(cfg, "tensor_parallel", 1))
    if cfg is None:
        held = sum(p.numel() * p.element_size() for p in model.parameters())
        room, ranks = vllm_cache_bytes(model.config, gpu_memory(device), held), 1
    else:
        world = int(os.environ.get("WORLD_SIZE", "1"))
        run = Run(model.config, cfg, world, device, longest_sequence(cfg), False, False, free=0)
        room, ranks = cache_bytes(run, plan_of_flags(run)), cfg.tensor_parallel
    if room == 0:
        fail(
            "--engine=vllm: the trainer leaves no memory of this GPU for vLLM's caches: take more "
            "ranks, --shard=offload or --engine=torch."
        )
    return VLLMEngine(model, tokenizer, room=room, ranks=ranks)

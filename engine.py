"""Rollouts: prompts in, completions out, tokens on both sides (model text is never encoded again).

The built-in sampler runs anywhere: one packed prefill that every sample of a prompt shares, then batched decoding with a KV
cache. Finished rows leave the batch and are handed on at once, so that their rewards are computed while others still decode.
Sampling is a function of each rollout's own seed: a completion does not depend on what it was batched with. On a GPU a decoding step
is a CUDA graph, captured again when rows leave or the cache grows: 64 rows of 0.6B take 5 to 7 ms, and took 22 op by op.

    B rows still decoding   P distinct prompts   S cache slots   N query heads   K kv heads   H head width   V vocabulary
"""

import importlib.util
import json
import os
import tempfile
import time
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from kernels.attention import flash_attention_varlen
from kernels.decode_attention import decode_attention, slot_bias
from kernels.sampling import sample_tokens
from lib.common import compute_device, print0
from lib.guard import fail
from model import hf_config, render_chat, stop_ids


@dataclass
class Rollout:
    """One sampled completion on its way from prompt to advantage."""

    row: dict  # the data row it came from
    group: int  # rollouts of one prompt share it
    prompt_ids: list
    seed: int  # request_seed(run, step, prompt, sample)
    greedy: bool = False  # the best token each time, whatever the temperature of the others
    completion_ids: list = field(default_factory=list)  # the stop token included when there is one
    # under softmax(logits / temperature), whole vocabulary (vLLM: see there)
    sampler_logprobs: list = field(default_factory=list)
    finish_reason: str = ""  # "stop" or "length"
    text: str = ""  # decoded completion, thinking included, stop token left out
    reward: float = float("nan")
    # mopd: of the completion, under its domain's teacher
    teacher_logprobs: list = field(default_factory=list)
    # rlhf: the reward before shaping, that is the reward model's number or a floor
    score: float = float("nan")
    pending: object = None  # the verdict under way, a future
    verify_s: float = 0.0  # seconds that a verifier worker spent on it
    # ok, wrong, no_answer, language, timeout, crash, or infra (masked, never a reward)
    status: str = ""
    advantage: float = 0.0
    trained: bool = True  # False: left out of the loss, its denominator and the group statistics


def request_seed(*key):
    """63-bit seed from integers, e.g. (run seed, step, prompt, sample); every rank and resume computes the same one."""
    return int(
        np.random.SeedSequence([int(k) % 2**32 for k in key]).generate_state(1, np.uint64)[0]
        >> np.uint64(1)
    )


def uniforms(seeds, start, count):
    """[len(seeds), count] floats in (0, 1): numbers start .. start + count of each seed's own stream (SplitMix64)."""
    with np.errstate(over="ignore"):
        z = np.asarray(seeds, np.uint64)[:, None] + np.uint64(0x9E3779B97F4A7C15) * np.arange(
            start + 1, start + count + 1, dtype=np.uint64
        )
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return ((z >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def finish_rollout(rollout, reason, tokenizer, on_finished):
    """A completion has ended: set finish_reason and text, and give it to whoever waits for it."""
    rollout.finish_reason = reason
    rollout.text = tokenizer.decode(
        rollout.completion_ids[: -1 if reason == "stop" else None], skip_special_tokens=False
    )
    if on_finished is not None:
        on_finished(rollout)


def whole_parameters(model):
    """(name, tensor) of every parameter, whole and in compute precision. FSDP2 gathers them group by group: one collective for a
    layer, and no rank ever holds more than a layer and the root. A tensor is valid until the next one is asked for."""
    groups = [
        (name, module) for name, module in model.named_modules() if hasattr(module, "unshard")
    ]
    # the root last: what is still sharded then belongs to a layer and has been seen
    for prefix, module in groups[1:] + groups[:1]:
        module.unshard()
        yield from (
            (name, p.detach())
            for name, p in module.named_parameters(prefix)
            if not hasattr(p, "full_tensor")
        )
        module.reshard()
    if not groups:
        yield from ((name, p.detach()) for name, p in model.named_parameters())


@torch.no_grad()
def check_parity(engine, model, prompt="What is 2 + 3? Think, then answer in one sentence."):
    """Mean |log-prob difference| to the trainer over 16 x 2 tokens that this rank's engine draws. Rounding makes 0.01 in bf16, which GPUs
    use, 1e-6 in fp32; RuntimeError if it is more than that."""
    prompt_ids = render_chat(engine.tokenizer, [{"role": "user", "content": prompt}], think=True)[0]
    rollouts = [
        Rollout(row={}, group=0, prompt_ids=prompt_ids, seed=request_seed(sample))
        for sample in range(16)
    ]
    engine.generate(rollouts, 2, 1.0)
    ends = np.cumsum([len(prompt_ids) + len(r.completion_ids) for r in rollouts])
    index_M = np.concatenate(
        [np.arange(end - len(r.completion_ids), end) for r, end in zip(rollouts, ends, strict=True)]
    )
    tensor = lambda x, dtype=None: torch.as_tensor(x, dtype=dtype).to(compute_device(model))
    input_ids_T = tensor(np.concatenate([prompt_ids + r.completion_ids for r in rollouts]))
    logprobs_T, _ = model(
        input_ids_T, tensor([0, *ends], torch.int32), len(prompt_ids) + 2, tensor(index_M)
    )
    if hasattr(model, "reshard"):
        model.reshard()  # a forward without backward leaves the root gathered
    sampled_M = tensor(np.concatenate([r.sampler_logprobs for r in rollouts]))
    gap = (logprobs_T[tensor(index_M)] - sampled_M).abs().mean().item()
    if not gap < (limit := 0.05 if logprobs_T.is_cuda else 1e-3):
        raise RuntimeError(
            f"weight sync {engine.syncs}: the engine's log-probs are {gap:.1e} a token off the trainer's (limit {limit}): "
            "it does not sample from the policy that is trained"
        )
    engine.syncs += 1
    return gap


class Replay:
    """A function of tensors, whose shapes stay, as a CUDA graph: recorded once, then launched as a whole. The first calls run op by op: they
    compile what is not compiled yet, and where shapes change soon no recording pays. On CPUs all do."""

    def __init__(self, function, op_by_op=4):
        self.function, self.left, self.graph = function, op_by_op, None

    def __call__(self, *inputs):
        if self.left or not inputs[0].is_cuda:
            self.left = max(self.left - 1, 0)
            return self.function(*inputs)
        if self.graph is None:
            self.inputs, self.graph = [x.clone() for x in inputs], torch.cuda.CUDAGraph()
            # other threads (NCCL's) may ask the device something
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.output = self.function(*self.inputs)
        for mine, x in zip(self.inputs, inputs, strict=True):
            mine.copy_(x)
        self.graph.replay()
        return self.output


class TorchEngine:
    """The built-in sampler. Where the trained weights are whole (one process or --shard=replicate, on CPUs) it decodes with the trained
    module itself; beside sharded ones it keeps a whole replica that sync() refreshes and compares with the trainer."""

    # empty slots for a full cache, where `left` tokens may follow
    room = staticmethod(lambda slots, left: min(max(16, slots // 8), left))

    def __init__(self, model, tokenizer, max_rows=0):
        # rows decoded at once; 0: as many as fit
        self.tokenizer, self.stops, self.max_rows = tokenizer, stop_ids(tokenizer), max_rows
        self.sharded = any(hasattr(p, "full_tensor") for p in model.parameters())
        self.model, self.syncs, device = model, 0, compute_device(model)
        # share of the rows left when the others leave: on GPUs a new graph each time
        self.shrink_at = 0.85 if device.type == "cuda" else 0.95
        if self.sharded:
            with torch.device("meta"):
                replica = type(model)(model.config).to(
                    torch.bfloat16 if device.type == "cuda" else torch.float32
                )
            self.model = replica.to_empty(device=device).requires_grad_(False)
            self.sync(model)

    @torch.no_grad()
    def sync(self, model):
        """Copy the trained weights into the engine, in place (addresses stay); returns the bytes moved. RuntimeError if it then scores otherwise."""
        targets, moved = dict(self.model.named_parameters()) if self.sharded else {}, 0
        for name, whole in whole_parameters(model) if self.sharded else ():
            targets.pop(name).copy_(whole)
            moved += whole.numel() * whole.element_size()
        assert not targets, f"weight sync: no tensor for {list(targets)}"
        if self.sharded:
            check_parity(self, model)
        return moved

    @torch.inference_mode()
    def generate(self, rollouts, max_new_tokens, temperature, top_p=1.0, top_k=0, on_finished=None):
        """Fill completion_ids (token by token), finish_reason and text of every rollout, in place; on_finished(rollout) is called the
        moment one ends; sampler_logprobs follow when all have. temperature 0 is greedy. top_p and top_k restrict what can be drawn; the log-probs
        are of the whole distribution (what the trainer computes too; gap G4)."""
        was_checkpointing, self.model.gradient_checkpointing = (
            self.model.gradient_checkpointing,
            False,
        )
        sampling = dict(temperature=temperature, top_p=top_p, top_k=top_k)
        wave = (
            self.max_rows
            or self._rows_that_fit(max(len(r.prompt_ids) for r in rollouts) + max_new_tokens)
            if rollouts
            else 1
        )
        # of equal size: a small last one would take as many steps
        waves = -(-len(rollouts) // wave)
        for i in range(waves):
            self._generate_wave(
                rollouts[len(rollouts) * i // waves : len(rollouts) * (i + 1) // waves],
                max_new_tokens,
                sampling,
                on_finished,
            )
        self.model.gradient_checkpointing = was_checkpointing

    def _rows_that_fit(self, length):
        """How many KV caches of `length` tokens fit into half of the free GPU memory, or 1 GiB without a GPU; at most 1024."""
        config, weight = self.model.config, self.model.model.embed_tokens.weight
        row = (
            2
            * config.num_hidden_layers
            * config.num_key_value_heads
            * config.head_dim
            * length
            * weight.element_size()
        )
        room = torch.cuda.mem_get_info(weight.device)[0] // 2 if weight.is_cuda else 1 << 30
        return max(min(room // row, 1024), 1)

    def _generate_wave(self, rollouts, max_new_tokens, sampling, on_finished):
        device = self.model.model.embed_tokens.weight.device
        # of the bias, which no kernel reads
        K = 1 if device.type == "cuda" else self.model.config.num_key_value_heads
        position_B = torch.tensor([len(r.prompt_ids) for r in rollouts], device=device)
        # prompts are right-aligned, so that every row writes the same slot
        width = int(position_B.max())
        slots = width + self.room(width, max_new_tokens)
        logits_BV, cache = self._prefill(rollouts, width, slots, device)
        bias_BKS, slot_1, decode = (
            slot_bias(width - position_B, width, slots, K),
            torch.tensor([width], device=device),
            None,
        )
        # rollouts of the batch's rows; (row, rollout) that goes on
        alive, running = list(range(len(rollouts))), list(enumerate(rollouts))
        uniform_SB = torch.from_numpy(
            uniforms([r.seed for r in rollouts], 0, max_new_tokens).T.astype(np.float32, "C")
        ).to(device)
        greedy, drawn = [b for b, r in running if r.greedy], []
        for step in range(max_new_tokens):
            token_B, logprob_B = sample_tokens(logits_BV, uniform_SB[step], **sampling)
            if greedy:
                # any number will do
                token_B[greedy], logprob_B[greedy] = sample_tokens(
                    logits_BV[greedy], logprob_B[greedy], temperature=0.0
                )
            drawn.append((alive, logprob_B))
            tokens = token_B.tolist()  # the one thing in most steps that waits for a GPU
            for b, rollout in running:
                rollout.completion_ids.append(tokens[b])
                if tokens[b] in self.stops or step + 1 == max_new_tokens:
                    finish_rollout(
                        rollout,
                        "stop" if tokens[b] in self.stops else "length",
                        self.tokenizer,
                        on_finished,
                    )
            running = [(b, r) for b, r in running if not r.finish_reason]
            if not running:
                break
            # Those that have ended decode along until enough have. Then the last rows take their
            # places: of the caches no other row is copied.
            if (left := len(running)) <= self.shrink_at * len(alive):
                into, late = (
                    sorted(set(range(left)) - {b for b, _ in running}),
                    [b for b, _ in running if b >= left],
                )
                moves = dict(zip(into, late, strict=True))
                alive = [alive[moves.get(b, b)] for b in range(left)]
                running, greedy = (
                    [(b, rollouts[i]) for b, i in enumerate(alive)],
                    [b for b, i in enumerate(alive) if rollouts[i].greedy],
                )
                into, late = torch.tensor((into, late), dtype=torch.int64, device=device)
                keep = lambda t, dim=0: t.narrow(dim, 0, left).index_copy_(
                    dim, into, t.index_select(dim, late)
                )
                token_B, position_B, bias_BKS, uniform_SB = (
                    keep(token_B),
                    keep(position_B),
                    keep(bias_BKS),
                    keep(uniform_SB, 1),
                )
                cache, decode = [tuple(map(keep, layer)) for layer in cache], None
            slot = width + step
            # it grows as it fills: a cache with few empty slots is read fastest
            if slot == slots:
                slots += self.room(slot, max_new_tokens - step)
                for i, layer in enumerate(cache):
                    cache[i] = tuple(
                        torch.cat((t, t.new_zeros(*t.shape[:2], slots - slot, t.shape[3])), 2)
                        for t in layer
                    )
                bias_BKS, decode = slot_bias(slot - position_B, slot, slots, K), None
            bias_BKS[..., slot] = 0.0
            decode = decode or Replay(lambda *now: self._decode(*now, cache, bias_BKS))
            logits_BV = decode(token_B, position_B, slot_1)
            position_B, slot_1 = position_B + 1, slot_1 + 1
        logprobs_RS = np.empty((len(rollouts), len(drawn)), np.float32)
        for step, (rows, logprob_B) in enumerate(drawn):
            logprobs_RS[rows, step] = logprob_B.cpu().numpy()
        for r, logprobs_S in zip(rollouts, logprobs_RS, strict=True):
            r.sampler_logprobs = logprobs_S[: len(r.completion_ids)].tolist()

    def _prefill(self, rollouts, width, slots, device):
        """Last-token logits [B, V] and the cache [(k, v)] * layers, each [B, K, slots, H], prompts up to slot width."""
        first_of, prompts = {}, []
        for r in rollouts:
            if first_of.setdefault(tuple(r.prompt_ids), len(prompts)) == len(prompts):
                prompts.append(r.prompt_ids)
        prompt_B = torch.tensor([first_of[tuple(r.prompt_ids)] for r in rollouts], device=device)
        lengths = [len(p) for p in prompts]
        cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=device)
        row_T = torch.tensor(np.repeat(np.arange(len(prompts)), lengths), device=device)
        position_T = torch.tensor(np.concatenate([np.arange(n) for n in lengths]), device=device)
        slot_T = position_T + torch.tensor(
            np.repeat(width - np.array(lengths), lengths), device=device
        )
        cache = []

        def attend(layer, q_TNH, k_TKH, v_TKH):
            both_PKSH = [
                t_TKH.new_zeros(len(prompts), t_TKH.shape[1], slots, t_TKH.shape[2])
                for t_TKH in (k_TKH, v_TKH)
            ]
            for t_PKSH, t_TKH in zip(both_PKSH, (k_TKH, v_TKH)):
                t_PKSH[row_T, :, slot_T] = t_TKH
            cache.append(tuple(t_PKSH.index_select(0, prompt_B) for t_PKSH in both_PKSH))
            return flash_attention_varlen(q_TNH, k_TKH, v_TKH, cu_seqlens, max(lengths))

        input_ids_T = torch.tensor(np.concatenate(prompts), device=device)
        hidden_PD = self.model.hidden_states(
            input_ids_T, position_T, attend, keep_M=cu_seqlens[1:].long() - 1
        )
        logits_PV = F.linear(hidden_PD, self.model.head_weight).float()
        return logits_PV[prompt_B], cache

    def _decode(self, token_B, position_B, slot_1, cache, bias_BKS):
        """One token a row: write its key and value at the slot, attend to the row's slots up to it, return logits [B, V]."""
        start_B, length_1 = slot_1 - position_B, slot_1 + 1
        # where a graph runs, it has to find the slot on the device
        slot = None if slot_1.is_cuda else slot_1.item()

        def attend(layer, q_BNH, k_BKH, v_BKH):
            for t_BKSH, new_BKH in zip(cache[layer], (k_BKH, v_BKH)):
                t_BKSH.index_copy_(
                    2, slot_1, new_BKH[:, :, None]
                ) if slot is None else t_BKSH.select(2, slot).copy_(new_BKH)
            return decode_attention(q_BNH, *cache[layer], start_B, length_1, bias_BKS)

        hidden_BD = self.model.hidden_states(token_B, position_B, attend)
        return F.linear(hidden_BD, self.model.head_weight).float()


def gpu_share(model):
    """The part of a GPU's memory that vLLM may have beside the model: 0.6, or less where few ranks hold much each. It stays awake beside
    fp32 weights and their two moments (or bf16 weights alone, when nothing is trained); 15% are for layers in flight and NCCL."""
    mine = [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()]
    held = sum(
        p.numel() * (12 if p.dtype == torch.float32 else p.element_size())
        for p in mine
        if p.is_cuda
    )
    return (
        min(0.6, max(0.85 - held / torch.cuda.get_device_properties(0).total_memory, 0.1))
        if held
        else 0.6
    )


class VLLMEngine:
    """vLLM inside the training process, one engine a rank. It starts from random weights, so that a tensor which sync() forgot
    cannot go unnoticed. On GPUs it sleeps while the trainer works (level 1: weights in host memory, no KV cache)."""

    def __init__(self, model, tokenizer, max_rows=256):
        # in this process, whose parameters it is given
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.update(
            {
                "VLLM_NO_USAGE_STATS": "1",
                "VLLM_LOGGING_LEVEL": "ERROR",
                "VLLM_CPU_KVCACHE_SPACE": "1",
            }
            | os.environ
        )
        from vllm import EngineArgs, LLMEngine

        self.tokenizer, self.stops, self.syncs = tokenizer, stop_ids(tokenizer), 0
        self.on_gpu = compute_device(model).type == "cuda"
        # the trainer's compute precision
        self.dtype = torch.bfloat16 if self.on_gpu else torch.float32
        place = dict(
            enable_sleep_mode=True,
            gpu_memory_utilization=gpu_share(model),
            max_model_len=model.max_positions(),
        )
        if not self.on_gpu:
            from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

            if model.config.head_dim not in (
                widths := CPUAttentionBackend.get_supported_head_sizes()
            ):
                fail(
                    f"--engine=vllm: vLLM on CPUs has no attention for head_dim={model.config.head_dim} (it has {widths})."
                )
            # -1: as long as VLLM_CPU_KVCACHE_SPACE (GiB) allows. A prompt cut in two would rewind
            # its generator, which CPU ones cannot.
            place = dict(enforce_eager=True, max_model_len=-1, enable_chunked_prefill=False)
        # vLLM reads the architecture from a file; weights never touch the disk
        with tempfile.TemporaryDirectory() as folder:
            with open(os.path.join(folder, "config.json"), "w") as f:
                json.dump(hf_config(model.config), f)
            self.llm = LLMEngine.from_engine_args(
                EngineArgs(
                    model=folder,
                    load_format="dummy",
                    skip_tokenizer_init=True,
                    generation_config="vllm",
                    dtype=str(self.dtype)[6:],
                    max_num_seqs=max_rows,
                    logprobs_mode="processed_logprobs",
                    disable_log_stats=True,
                    distributed_executor_backend="external_launcher"
                    if "RANK" in os.environ
                    else "uni",
                    **place,
                )
            )
        self.sync(model)

    def _sleep(self, asleep):
        if self.on_gpu and self.llm.is_sleeping() != asleep:
            self.llm.sleep(1) if asleep else self.llm.wake_up()

    @torch.no_grad()
    def sync(self, model):
        """Write the trained weights into the engine, in place, layer by layer from their shards; returns the bytes moved.
        RuntimeError if a tensor of the engine was left out, or if it does not score like the trainer afterwards."""
        self._sleep(False)
        clock, moved = time.time(), 0

        def tensors():
            nonlocal moved
            for name, p in whole_parameters(model):
                moved += p.numel() * self.dtype.itemsize
                # vLLM may keep a tensor until its whole layer has arrived
                yield name, p.to(self.dtype, copy=True)

        missed = self.llm.collective_rpc(write_weights, args=(tensors(),))[0]
        if missed or not self.llm.reset_prefix_cache():
            raise RuntimeError(
                f"weight sync {self.syncs}: vLLM did not write {missed}"
                if missed
                else "vLLM kept old prefixes"
            )
        seconds, gap = time.time() - clock, check_parity(self, model)
        if self.syncs in (1, 2) or self.syncs % 10 == 1:
            note = f"{moved / 1e6:.1f} MB in {seconds:.2f} s, log-prob gap {gap:.1e} (x{np.exp(gap):.6f} a token)"
            print0(f"vLLM: sync {self.syncs - 1}, {note}")
        return moved

    @torch.no_grad()
    def generate(self, rollouts, max_new_tokens, temperature, top_p=1.0, top_k=0, on_finished=None):
        """As TorchEngine.generate, but under top_p or top_k vLLM's log-probs are of what these leave. They serve as the reported
        gap alone (GRPO's ratio is between two passes of the trainer), so that is announced and not refused."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        if temperature > 0 and (top_p < 1 or top_k > 0) and not hasattr(self, "told"):
            self.told = print0(
                f"vLLM: log-probs are of what top_p={top_p}, top_k={top_k} leave, so `gap` includes that mass"
            )
        self._sleep(False)
        for i, r in enumerate(rollouts):
            how = dict(
                temperature=0.0 if r.greedy else temperature,
                top_p=top_p,
                top_k=top_k,
                seed=r.seed,
                max_tokens=max_new_tokens,
            )
            params = SamplingParams(
                **how,
                logprobs=0,
                stop_token_ids=self.stops,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            self.llm.add_request(str(i), {"prompt_token_ids": r.prompt_ids}, params)
        while self.llm.has_unfinished_requests():
            for request in self.llm.step():
                r, output = rollouts[int(request.request_id)], request.outputs[0]
                r.completion_ids = list(output.token_ids)
                r.sampler_logprobs = [
                    at[token].logprob
                    for token, at in zip(output.token_ids, output.logprobs, strict=True)
                ]
                finish_rollout(
                    r,
                    "stop" if r.completion_ids[-1] in self.stops else "length",
                    self.tokenizer,
                    on_finished,
                )
        self._sleep(True)


def write_weights(worker, tensors):
    """Runs in vLLM's worker: load (name, tensor) pairs in place; returns the names of the parameters it left unwritten."""
    engine_model, written = worker.model_runner.get_model(), set()
    wanted, load = {name for name, _ in engine_model.named_parameters()}, engine_model.load_weights
    engine_model.load_weights = lambda pairs: written.update(names := load(pairs)) or names
    worker.reload_weights(weights_iterator=tensors)
    del engine_model.load_weights
    if worker.device.type == "cpu" and engine_model.config.tie_word_embeddings:
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

        # vLLM packs a tied head once and never again
        dispatch_cpu_unquantized_gemm(engine_model.lm_head, remove_weight=False)
    return sorted(wanted - written)


def make_engine(name, model, tokenizer):
    """The engine of a run: "torch" is the built-in sampler; "auto" takes "vllm" where that is installed beside a GPU."""
    installed = importlib.util.find_spec("vllm") is not None
    if name == "torch" or name == "auto" and not (installed and torch.cuda.is_available()):
        return TorchEngine(model, tokenizer)
    if name not in ("auto", "vllm"):
        fail(f"--engine={name}: expected auto, torch or vllm.")
    return (
        VLLMEngine(model, tokenizer) if installed else fail("--engine=vllm: vLLM is not installed.")
    )

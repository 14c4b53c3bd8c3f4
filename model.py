"""Qwen3 by hand: architecture, YaRN, Hugging Face load and save, chat rendering, token log-probs.

One path for every size: sequences are always packed. A packed batch is a flat `input_ids_T` of T
tokens and `cu_seqlens` [num_seqs + 1], the offsets where sequences start; attention never crosses
an offset. Parameter names are Hugging Face's, so checkpoints are exchanged as they are. Four ways
to ask the model:

    model(input_ids_BT)                  logits of B sequences of equal length
    model.token_logprobs(batch)          log-prob and entropy of the tokens to score (RL)
    model.nll(batch)                     summed negative log-likelihood of the tokens to score (SFT)
    model.packed_hidden(...)             hidden states before the head (reward model)

    B rows   T tokens, packed over all sequences   D model width   N query heads   K kv heads
    H head width   F mlp width   V vocabulary   M scored tokens   U tokens with distinct pasts
"""

import contextlib
import itertools
import json
import math
import operator
import os
from dataclasses import asdict, dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from tokenizers import Tokenizer
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from kernels.attention import flash_attention_varlen
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.linear_logprob import linear_logprob
from kernels.qk_norm_rope import qk_norm_rope
from kernels.rms_norm import add_rms_norm
from kernels.swiglu import swiglu

EMBEDDING = "model.embed_tokens.weight"


# ---- 1. Config -----------------------------------------------------------------------------------
@dataclass
class Qwen3Config:
    """The fields of a Hugging Face Qwen3 config.json that change the computation."""

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 12288
    num_hidden_layers: int = 36
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    max_position_embeddings: int = 40960
    tie_word_embeddings: bool = False
    # {} for plain RoPE, or {"rope_type": "yarn", "factor": 2.0, ...}
    rope_scaling: dict = field(default_factory=dict)


def size(hidden, mlp, layers, heads, tied=False):
    return {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "tie_word_embeddings": tied,
    }


# The five dense sizes of the Qwen3 report (arXiv 2505.09388, table 1). 8B is the default above.
QWEN3_SIZES = {
    "0.6b": size(1024, 3072, 28, 16, tied=True),
    "1.7b": size(2048, 6144, 28, 16, tied=True),
    "4b": size(2560, 9728, 36, 32, tied=True),
    "8b": size(4096, 12288, 36, 32),
    "14b": size(5120, 17408, 40, 40),
}


# Fields of other models' config.json that would change the computation, and what dense Qwen3 has
# there. Another value is refused by its name: passed over, it would give other logits in silence.
FIXED_FIELDS = {
    "hidden_act": ("silu", "swish"),  # two names of one function
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0,),
    "use_sliding_window": (False,),
    "partial_rotary_factor": (1,),
    "quantization_config": (),
    "auto_map": (),  # code of the folder's own
}
# The fields of YaRN that rope_tables reads.
YARN_FIELDS = (
    "factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
)
# Fields beside them that change nothing with these values.
NEUTRAL_ROPE_FIELDS = {"truncate": (True,), "partial_rotary_factor": (1,)}


def read_config(folder) -> Qwen3Config:
    """Qwen3Config of folder/config.json. ValueError names the field that is not dense Qwen3's."""
    path = find_file(folder, "config.json")
    with open(path) as f:
        raw = json.load(f)
    if raw.get("model_type") != "qwen3":
        raise ValueError(f"{path}: model_type is {raw.get('model_type')!r}, expected 'qwen3'")
    check_fixed_fields(raw, path)
    # transformers would fill a gap with defaults of its own, which are no Qwen3's.
    required = Qwen3Config.__dataclass_fields__.keys() - {"rope_theta", "rope_scaling"}
    known = {name: raw[name] for name in required if raw.get(name) is not None}
    missing = sorted(required - known.keys() - {"tie_word_embeddings"})
    if missing:
        raise ValueError(f"{path}: no {missing[0]}")
    known["rope_theta"], known["rope_scaling"] = read_rope(raw, path)
    return Qwen3Config(**known)


def check_fixed_fields(raw, path):
    """ValueError if a field of a config.json asks for what dense Qwen3 does not have."""
    for name, value in raw.items():
        if value is None:
            continue
        is_other = name in FIXED_FIELDS and value not in FIXED_FIELDS[name]
        if is_other or "softcap" in name:
            raise ValueError(f"{path}: {name} {value!r} is not supported: no dense Qwen3 has it")
    if set(raw.get("layer_types") or []) - {"full_attention"}:
        raise ValueError(f"{path}: layer_types other than full_attention are not supported")


def read_rope(raw, path):
    """(rope_theta, rope_scaling) of a config.json. ValueError names a field that is not read."""
    # transformers 4 writes rope_scaling and rope_theta, transformers 5 writes rope_parameters.
    rope = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    theta = rope.pop("rope_theta", raw.get("rope_theta"))
    if theta is None:
        raise ValueError(f"{path}: no rope_theta")
    old_name = rope.pop("type", None)
    rope_type = rope.pop("rope_type", None) or old_name or "default"
    if rope_type not in ("default", "yarn"):
        raise ValueError(f"{path}: rope_type {rope_type!r} is not supported (default and yarn are)")
    for name, value in rope.items():
        neutral = value is None or value in NEUTRAL_ROPE_FIELDS.get(name, ())
        if name not in YARN_FIELDS and not neutral:
            raise ValueError(f"{path}: {name} {value!r} of RoPE is not supported")
    if rope_type == "default":
        return theta, {}
    if not isinstance(rope.get("factor"), (int, float)):
        raise ValueError(f"{path}: YaRN without a factor")
    scaling = {name: rope[name] for name in YARN_FIELDS if rope.get(name) is not None}
    scaling.setdefault("original_max_position_embeddings", raw["max_position_embeddings"])
    return theta, {"rope_type": "yarn", **scaling}


def hf_config(config: Qwen3Config) -> dict:
    """The config.json that transformers (4 and 5) and vLLM read back into the same model."""
    raw = asdict(config)
    scaling = raw.pop("rope_scaling")
    raw["rope_parameters"] = {"rope_type": "default", **scaling, "rope_theta": config.rope_theta}
    if scaling:
        raw["rope_scaling"] = scaling
        # vLLM expects the stretched length here.
        raw["max_position_embeddings"] = max_positions(config)
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        **raw,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "use_cache": True,
        "initializer_range": 0.02,
        # Without a version transformers takes the tokenizer for an old, faulty one of Mistral's.
        "transformers_version": "4.57.1",
        "dtype": "bfloat16" if config.hidden_size >= 1024 else "float32",
    }


def max_positions(config):
    """Length in tokens of the longest sequence, stretched by YaRN where that is on."""
    scaling = config.rope_scaling
    if not scaling:
        return config.max_position_embeddings
    stretched = int(scaling["factor"] * scaling.get("original_max_position_embeddings", 0))
    return max(config.max_position_embeddings, stretched)


def original_positions(config):
    """Tokens of the context that the model was trained on, before YaRN stretched it."""
    if config.rope_scaling:
        return config.rope_scaling["original_max_position_embeddings"]
    # The chat models of Qwen3 say 40,960: 32,768 for the reply, and the rest for the prompt.
    if config.max_position_embeddings == 40960:
        return 32768
    return config.max_position_embeddings


# ---- 2. Architecture -----------------------------------------------------------------------------
def rope_tables(config: Qwen3Config, length):
    """cos, sin [length, H/2] in fp32.

    YaRN (arXiv 2309.00071 eq. 17-23) interpolates the slow frequencies, keeps the fast ones, and
    scales both tables by 0.1 ln(factor) + 1, which scales attention logits by its square.
    """
    H = config.head_dim
    freq = config.rope_theta ** (torch.arange(0, H, 2, dtype=torch.int64).float() / H)
    inv_freq = 1.0 / freq
    scale = 1.0
    scaling = config.rope_scaling
    if scaling:
        factor = scaling["factor"]
        original = scaling.get("original_max_position_embeddings") or config.max_position_embeddings

        def rotations_to_dim(rotations):
            """Index of the frequency that turns `rotations` times over the original context."""
            return (
                H
                * math.log(original / (rotations * 2 * math.pi))
                / (2 * math.log(config.rope_theta))
            )

        # Frequencies below `low` are kept, those above `high` are interpolated, a ramp is between.
        low = max(math.floor(rotations_to_dim(scaling.get("beta_fast") or 32)), 0)
        high = min(math.ceil(rotations_to_dim(scaling.get("beta_slow") or 1)), H - 1)
        ramp = ((torch.arange(H // 2).float() - low) / max(high - low, 0.001)).clamp(0, 1)
        inv_freq = ramp / (factor * freq) + (1 - ramp) / freq
        scale = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
        scale = scaling.get("attention_factor") or scale
    angle = torch.outer(torch.arange(length).float(), inv_freq)
    return angle.cos() * scale, angle.sin() * scale


def take_rows(x, index):
    """Rows of x by index, repeated ones included; all rows if index is None."""
    if index is None:
        return x
    # Both forms give the same rows; they differ in backward. On GPUs indexing sorts, so a run
    # repeats bit for bit, where index_select would add the gradients of equal rows in any order.
    if x.is_cuda:
        return x[index]
    return x.index_select(0, index)


def packed_batch(input_ids_T, cu_seqlens, max_seqlen, loss_index, shared=None):
    """The dictionary that Qwen3.token_logprobs and Qwen3.nll take; see class Qwen3."""
    return {
        "input_ids_T": input_ids_T,
        "cu_seqlens": cu_seqlens,
        "max_seqlen": max_seqlen,
        "loss_index": loss_index,
        "shared": shared,
    }


class Norm(nn.Module):
    """Holds the weight of an RMSNorm. The fused ops that apply it are in kernels/."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


class Attention(nn.Module):
    """Grouped-query attention with RMSNorm on queries and keys; `attend` is passed in."""

    def __init__(self, config):
        super().__init__()
        N, K, H = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        D = config.hidden_size
        self.N, self.K, self.H, self.eps = N, K, H, config.rms_norm_eps
        self.q_proj = nn.Linear(D, N * H, bias=False)
        self.k_proj = nn.Linear(D, K * H, bias=False)
        self.v_proj = nn.Linear(D, K * H, bias=False)
        self.o_proj = nn.Linear(N * H, D, bias=False)
        self.q_norm = Norm(H)
        self.k_norm = Norm(H)

    def forward(self, x_TD, rope, attend, keep_M=None):
        q_TNH = self.q_proj(x_TD).view(-1, self.N, self.H)
        k_TKH = self.k_proj(x_TD).view(-1, self.K, self.H)
        v_TKH = self.v_proj(x_TD).view(-1, self.K, self.H)
        q_TNH, k_TKH = qk_norm_rope(
            q_TNH, k_TKH, self.q_norm.weight, self.k_norm.weight, *rope, eps=self.eps
        )
        out_TNH = attend(q_TNH, k_TKH, v_TKH)
        out_MNH = take_rows(out_TNH, keep_M)
        return self.o_proj(out_MNH.reshape(-1, self.N * self.H))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_TD):
        return self.down_proj(swiglu(self.gate_proj(x_TD), self.up_proj(x_TD)))


class Layer(nn.Module):
    """Pre-norm block: x = x + attention(norm(x)), then x = x + mlp(norm(x)).

    It passes (update, residual) on instead of their sum, so that every add is fused with the norm
    that follows it.
    """

    def __init__(self, config):
        super().__init__()
        self.eps = config.rms_norm_eps
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = Norm(config.hidden_size)
        self.post_attention_layernorm = Norm(config.hidden_size)

    def forward(self, x_TD, residual_TD, rope, attend, keep_M=None):
        # x_TD None: the caller has made the sum.
        norm = self.input_layernorm.weight
        h_TD, residual_TD = add_rms_norm(x_TD, residual_TD, norm, self.eps)
        h_MD = self.self_attn(h_TD, rope, attend, keep_M)
        residual_MD = take_rows(residual_TD, keep_M)
        norm = self.post_attention_layernorm.weight
        h_MD, residual_MD = add_rms_norm(h_MD, residual_MD, norm, self.eps)
        return self.mlp(h_MD), residual_MD


@dataclass
class Checkpointing:
    """What a forward pass keeps for backward: everything, unless lib/plan.py finds it too much.

    The gradients are equal bit for bit, whatever is kept.
    """

    # The first so many layers keep their input alone, and backward computes them again.
    layers: int = 0
    # The first so many of these keep the output of attention, too, which is then not made again.
    attention: int = 0
    # The inputs wait for backward in host memory.
    offload: bool = False


class Body(nn.Module):
    """Everything below the head. Its parameters are called `model.*` in a Hugging Face
    checkpoint."""

    def __init__(self, config):
        super().__init__()
        # Not nn.Embedding(V, D): its init imports torch.compile on the meta device, two seconds a
        # start.
        weight = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(weight, freeze=False)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = Norm(config.hidden_size)


class Qwen3(nn.Module):
    """Qwen3 causal language model. `model(input_ids [B, T]) -> logits [B, T, V]`.

    The methods that take a batch want a dictionary (lib/packing.py makes it):

        input_ids_T   [T] int64            tokens of all sequences, one sequence behind another
        cu_seqlens    [num_seqs + 1] int32 offsets where sequences start
        max_seqlen    int                  length of the longest (from the packer: no device sync)
        loss_index    [M] int64            positions of the tokens to score, no first of a sequence
        shared        (first_U, copy_T)    of lib.packing.shared_prefixes: what sequences begin with
                                           alike is computed once; None: nothing is shared
    """

    def __init__(self, config: Qwen3Config):
        super().__init__()
        self.config = config
        self.model = Body(config)
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.checkpointing = Checkpointing()
        # Of the folder that the model was loaded from, which may be gone when the model is saved.
        self.tokenizer_files = {}
        # (cos, sin) in fp32, made at first use: never cast by mixed precision, never in a
        # checkpoint.
        self.rope = None

    @property
    def head_weight(self):
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def max_positions(self):
        return max_positions(self.config)

    def forward(self, input_ids_BT):
        """Logits [B, T, V] in fp32 of B sequences of equal length."""
        B, T = input_ids_BT.shape
        cu_seqlens = torch.arange(0, B * T + 1, T, dtype=torch.int32, device=input_ids_BT.device)
        hidden_TD = self.packed_hidden(input_ids_BT.reshape(-1), cu_seqlens, T)
        return F.linear(hidden_TD, self.head_weight).float().view(B, T, -1)

    def token_logprobs(self, batch, temperature=1.0):
        """(logprobs_T, entropy_T) in fp32: entry t is about token t, and 0 where it is not scored.

        Both are of softmax(logits / temperature) over the whole vocabulary. The head and the
        softmax are one fused op, so no [T, V] tensor is made.
        """
        hidden_MD, target_M = self.scored_hidden(batch)
        logprobs_M, entropy_M = linear_logprob(
            hidden_MD, self.head_weight, target_M, temperature=temperature
        )
        where = (batch["loss_index"],)
        num_tokens = batch["input_ids_T"].shape[0]
        zeros_T = torch.zeros(num_tokens, dtype=torch.float32, device=target_M.device)
        return zeros_T.index_put(where, logprobs_M), zeros_T.index_put(where, entropy_M)

    def nll(self, batch):
        """Negative log-likelihood summed over the scored tokens, an fp32 scalar."""
        hidden_MD, target_M = self.scored_hidden(batch)
        return linear_cross_entropy(hidden_MD, self.head_weight, target_M)

    def scored_hidden(self, batch):
        """(hidden_MD, target_M): what the head predicts scored tokens from, and these tokens."""
        # The one shift by one of this repository: token t is predicted by the hidden state of t -
        # 1.
        predicts_M = batch["loss_index"] - 1
        hidden_MD = self.packed_hidden(
            batch["input_ids_T"],
            batch["cu_seqlens"],
            batch["max_seqlen"],
            predicts_M,
            batch.get("shared"),
        )
        return hidden_MD, batch["input_ids_T"][batch["loss_index"]]

    def packed_hidden(self, input_ids_T, cu_seqlens, max_seqlen, keep_M=None, shared=None):
        """Final-norm output [M, D] of the tokens keep_M, or [T, D] of all tokens.

        A token's output depends only on the tokens before it in its sequence. With `shared`, tokens
        that have equal pasts (a prompt and its G samples) are computed once in every layer;
        attention alone sees every sequence whole.
        """
        longest = self.max_positions()
        assert max_seqlen <= longest, (
            f"a sequence of {max_seqlen} tokens, {longest} positions; rope_factor=2 doubles them"
        )
        num_tokens = input_ids_T.shape[0]
        start_T = torch.repeat_interleave(
            cu_seqlens[:-1], cu_seqlens.diff(), output_size=num_tokens
        )
        position_ids_T = torch.arange(num_tokens, device=input_ids_T.device) - start_T

        # Of layers that backward computes again, the outputs of attention: {layer: [one]}.
        outputs = {}
        num_kept = self.checkpointing.attention if torch.is_grad_enabled() else 0

        def attend(layer, q_TNH, k_TKH, v_TKH):
            kept = outputs.setdefault(layer, []) if layer < num_kept else None
            return flash_attention_varlen(q_TNH, k_TKH, v_TKH, cu_seqlens, max_seqlen, kept)

        if shared is None:
            return self.hidden_states(input_ids_T, position_ids_T, attend, keep_M)
        first_U, copy_T = shared

        def attend_shared(layer, q_UNH, k_UKH, v_UKH):
            # Copy the distinct tokens to all their places, attend, and keep one output of each.
            q_TNH = take_rows(q_UNH, copy_T)
            k_TKH = take_rows(k_UKH, copy_T)
            v_TKH = take_rows(v_UKH, copy_T)
            return take_rows(attend(layer, q_TNH, k_TKH, v_TKH), first_U)

        keep = copy_T if keep_M is None else copy_T[keep_M]
        return self.hidden_states(
            input_ids_T[first_U], position_ids_T[first_U], attend_shared, keep
        )

    def hidden_states(self, input_ids_T, position_ids_T, attend, keep_M=None):
        """Final-norm output [T, D], or [M, D] of the tokens keep_M.

        `attend(layer, q_TNH, k_TKH, v_TKH) -> [T, N, H]` is the whole of attention: training passes
        packed causal attention, the sampler one that reads and writes its KV cache. In the last
        layer tokens outside keep_M stop after their key and value, which spares prompts most of
        that layer.
        """
        if self.rope is None or self.rope[0].device != input_ids_T.device:
            # Not inference tensors, even if the sampler asks first: training saves them for
            # backward.
            with torch.inference_mode(False):
                tables = rope_tables(self.config, self.max_positions())
                self.rope = tuple(table.to(input_ids_T.device) for table in tables)
        rope = (*self.rope, position_ids_T)
        x_TD = self.model.embed_tokens(input_ids_T)
        residual_TD = torch.zeros_like(x_TD)
        last = len(self.model.layers) - 1
        for i, layer in enumerate(self.model.layers):

            def attend_here(q_TNH, k_TKH, v_TKH, i=i):
                return attend(i, q_TNH, k_TKH, v_TKH)

            keep = keep_M if i == last else None
            if i < self.checkpointing.layers and torch.is_grad_enabled():
                # One tensor is kept, not two.
                sum_TD = x_TD + residual_TD
                where = contextlib.nullcontext()
                if self.checkpointing.offload:
                    where = save_on_cpu(pin_memory=sum_TD.is_cuda)
                # Nothing in a layer is random, so no state of a generator has to be kept.
                options = {"use_reentrant": False, "preserve_rng_state": False}
                with where:
                    x_TD, residual_TD = checkpoint(
                        layer, None, sum_TD, rope, attend_here, keep, **options
                    )
            else:
                x_TD, residual_TD = layer(x_TD, residual_TD, rope, attend_here, keep)
        return add_rms_norm(x_TD, residual_TD, self.model.norm.weight, self.config.rms_norm_eps)[0]

    # ---- 3. Hugging Face folders -----------------------------------------------------------------
    @classmethod
    def from_config(cls, config, seed=0, std=0.02):
        """Random weights: normal(0, std), norms 1; residual outputs / sqrt(2 layers), as in
        GPT-2."""
        model = cls(config)
        generator = torch.Generator().manual_seed(seed)
        for name, p in model.named_parameters():
            if p.dim() != 2:
                continue
            scale = 1.0
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                scale = (2 * config.num_hidden_layers) ** -0.5
            nn.init.normal_(p, std=std * scale, generator=generator)
        return model

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32, device="cpu", rope_factor=0.0):
        """Load a Hugging Face folder. ValueError names a tensor that is missing, unknown or
        misshapen.

        rope_factor > 1 switches YaRN on over the original context, 32,768 tokens in Qwen3. The
        paper evaluates with 2 (4.5.2, appendix B), and 14B on SWE-bench with 3 (4.7.1, appendix B).
        """
        config = read_config(folder)
        if rope_factor > 1:
            original = original_positions(config)
            config.max_position_embeddings = original
            config.rope_scaling = {
                "rope_type": "yarn",
                "factor": rope_factor,
                "original_max_position_embeddings": original,
            }
        with torch.device("meta"):
            model = cls(config)
        wanted = dict(model.named_parameters())
        state = {}
        tied_head = None
        for file in weight_files(folder):
            with safe_open(file, framework="pt", device=str(device)) as tensors:
                for name in tensors.keys():
                    if name == "lm_head.weight" and config.tie_word_embeddings:
                        tied_head = tensors.get_tensor(name).to(dtype)
                        continue
                    if name not in wanted:
                        raise ValueError(f"{file}: unknown tensor {name}")
                    state[name] = tensors.get_tensor(name).to(dtype)
                    found, expected = tuple(state[name].shape), tuple(wanted[name].shape)
                    if found != expected:
                        raise ValueError(f"{file}: {name} is {found}, expected {expected}")
        missing = sorted(wanted.keys() - state.keys())
        if missing:
            raise ValueError(f"{folder}: {len(missing)} tensors are missing, first {missing[0]}")
        # A saved head beside a tied embedding is a copy of it, or else it was trained by itself.
        if tied_head is not None and not torch.equal(tied_head, state[EMBEDDING]):
            raise ValueError(
                f"{folder}: lm_head.weight is not {EMBEDDING}, although config.json says "
                "tie_word_embeddings: set that to false, or remove the tensor"
            )
        model.load_state_dict(state, strict=True, assign=True)
        model.tokenizer_files = tokenizer_files(folder)
        return model

    def save_pretrained(self, folder, state_dict=None):
        """Write config.json and safetensors that transformers and vLLM open as they are.

        state_dict: gathered weights, where the parameters of this module are sharded.
        """
        from huggingface_hub import save_torch_state_dict

        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, "config.json"), "w") as f:
            json.dump(hf_config(self.config), f, indent=2)
        state = state_dict or self.state_dict()
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        save_torch_state_dict(state, folder, max_shard_size="5GB")


def find_file(folder, name):
    """Path of a file of a Hugging Face folder. ValueError: it is missing, and what would help."""
    path = os.path.join(folder, name)
    if os.path.exists(path):
        return path
    if os.path.isdir(folder):
        raise ValueError(f"no checkpoint there ({name} is missing)")
    owner, slash, model = str(folder).partition("/")
    hint = ""
    if owner and slash and model and "/" not in model and not os.path.isdir(owner):
        hint = f"; for a model of the hub: hf download {folder} --local-dir models/{model}"
    raise ValueError(f"no such folder{hint}")


def weight_files(folder):
    """Paths of the safetensors files of a folder: the set of weights that transformers would read.

    ValueError if a file is missing, or if a tensor stands in two files: then it is open which set
    was meant.
    """
    found = sorted(name for name in os.listdir(folder) if name.endswith(".safetensors"))
    index = os.path.join(folder, "model.safetensors.index.json")
    if "model.safetensors" in found:
        chosen = ["model.safetensors"]
    elif os.path.exists(index):
        with open(index) as f:
            chosen = sorted(set(json.load(f)["weight_map"].values()))
    else:
        chosen = found
    if not chosen:
        others = [name for name in os.listdir(folder) if name.endswith((".bin", ".pt", ".gguf"))]
        there = f"; {min(others)} is no safetensors file: convert it first" if others else ""
        raise ValueError(f"{folder}: no weights there, no file that ends in .safetensors{there}")
    if os.path.exists(os.path.join(folder, "adapter_config.json")):
        raise ValueError(f"{folder}: adapter_config.json: merge the adapter into the weights first")
    for name in chosen:
        find_file(folder, name)

    file_of = {}
    for name in [*chosen, *(name for name in found if name not in chosen)]:
        with safe_open(os.path.join(folder, name), framework="pt") as tensors:
            for tensor in tensors.keys():
                if tensor in file_of:
                    raise ValueError(
                        f"{folder}: two sets of weights: {tensor} is in {file_of[tensor]} "
                        f"and in {name}; remove one"
                    )
                file_of[tensor] = name
    return [os.path.join(folder, name) for name in chosen]


# ---- 4. Tokenizer and chat -----------------------------------------------------------------------
SYSTEM = "You are a helpful and harmless assistant."
TOOLS = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{}
</tools>

For each function call, return a json object with function name and arguments \
within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""
THINK = " /think"
NO_THINK = " /no_think"
# Roles that a turn can have. Some clients say "developer" for system and "function" for tool.
SYSTEM_ROLES = ("system", "developer")
TOOL_ROLES = ("tool", "function")
ROLES = (*SYSTEM_ROLES, "user", "assistant", *TOOL_ROLES)
# Fields of an assistant turn in which servers and data sets keep its thinking beside its text.
REASONING = ("reasoning_content", "reasoning", "thinking", "thought")


def chat_template():
    """render_turns as a Jinja template, for every other client. tests/test_chat.py holds both
    equal."""
    folder = os.path.dirname(os.path.abspath(__file__))
    with open(os.path.join(folder, "chat_template.jinja")) as f:
        return f.read()


# In front of the chat template of a model whose SFT saw thinking conversations alone: the template
# then refuses no_think, which the model cards of 8B-Thinking and 14B-Thinking do not support.
ONLY_THINKS = "{%- set only_thinks = true -%}"

# The files of a folder that belong to its tokenizer; generation_config.json has its stop tokens.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "generation_config.json",
)


def load_tokenizer(folder) -> Tokenizer:
    """The folder's fast tokenizer. ValueError if it is missing or no Qwen3 (ChatML) tokenizer."""
    path = find_file(folder, "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    # Special tokens written inside a text stay text, so that no content can close a turn.
    tokenizer.encode_special_tokens = True
    for name in ("<|im_start|>", "<|im_end|>", "<|endoftext|>"):
        if tokenizer.token_to_id(name) is None:
            raise ValueError(f"{path}: no token {name}; a Qwen3 (ChatML) tokenizer is expected")
    tokenizer.own_stops = own_stops(tokenizer_files(folder))
    return tokenizer


def tokenizer_files(folder):
    """{name: bytes} of the tokenizer files that a folder has."""
    files = {}
    for name in TOKENIZER_FILES:
        path = os.path.join(folder, name)
        if os.path.exists(path):
            with open(path, "rb") as f:
                files[name] = f.read()
    return files


def own_stops(files):
    """The stop tokens that a folder's generation_config.json names: one id, a list, or none."""
    stops = json.loads(files.get("generation_config.json", "{}")).get("eos_token_id")
    stops = stops if isinstance(stops, list) else [stops]
    return [token for token in stops if isinstance(token, int)]


def stop_ids(tokenizer):
    """Tokens that end a completion: the two of Qwen3, whose own config files disagree about the one
    of base models, and those that the folder of the tokenizer names."""
    stops = [tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")]
    return list(dict.fromkeys(stops + getattr(tokenizer, "own_stops", [])))


def save_tokenizer(source, folder, template=None, only_thinks=False):
    """Write the tokenizer of `source` to `folder`, with our chat template and stop tokens.

    source: a folder, or the tokenizer_files of one. The sampling settings are those of the
    Cascade model cards, so that a server samples by them. only_thinks: the template refuses
    no_think; it does so as well if that of the source does.
    """
    files = source if isinstance(source, dict) else tokenizer_files(source)
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    config |= json.loads(files.get("tokenizer_config.json", "{}"))
    only_thinks = only_thinks or str(config.get("chat_template")).startswith(ONLY_THINKS)
    if template is None:
        template = ONLY_THINKS + chat_template() if only_thinks else chat_template()
    config["chat_template"] = template
    config["eos_token"] = "<|im_end|>"
    config["pad_token"] = "<|endoftext|>"
    config["bos_token"] = None

    tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
    tokenizer.own_stops = own_stops(files)
    generation = {
        "eos_token_id": stop_ids(tokenizer),
        "pad_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.95,
    }
    written = {
        **files,
        "tokenizer_config.json": json.dumps(config, indent=2).encode(),
        "generation_config.json": json.dumps(generation, indent=2).encode(),
        "chat_template.jinja": template.encode(),
    }
    os.makedirs(folder, exist_ok=True)
    for name, content in written.items():
        with open(os.path.join(folder, name), "wb") as f:
            f.write(content)


def render_turns(messages, think, tools=None):
    """[(role, text, trained)] of a conversation, as the Cascade model cards specify (paper 3.1.2).

    A default system text; the mode flag at the end of every user turn; history with its thinking
    removed and its flags set to /no_think. The assistant turns after the last user turn are
    trained on. A flag that is already written in the last user turn wins over `think`.
    ValueError if a turn has an unknown role: it must not vanish without a word.
    """
    has_system = messages[0]["role"] in SYSTEM_ROLES
    system = content_text(messages[0]) if has_system else SYSTEM
    if tools:
        signatures = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        system += "\n\n" + TOOLS.format(signatures)
    turns = [("system", system, False)]
    last_user = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
    for i, message in enumerate(messages):
        if i == 0 and has_system:
            continue
        text = content_text(message).strip()
        if message["role"] in SYSTEM_ROLES:
            turns.append(("system", text, False))
        elif message["role"] == "user":
            text, written = split_flag(text)
            if i != last_user:
                flag = NO_THINK
            else:
                flag = written or (THINK if think else NO_THINK)
            turns.append(("user", text + flag, False))
        elif message["role"] == "assistant":
            if i < last_user:
                text = text.split("</think>")[-1].strip()
            # A newline stands between the text and a call, and between two calls.
            calls = [render_tool_call(call) for call in message.get("tool_calls") or []]
            body = "\n".join([text, *calls] if text else calls)
            thought = reasoning_of(message)
            if i > last_user and thought and "</think>" not in text:
                body = f"<think>\n{thought}\n</think>\n\n{body}"
            turns.append(("assistant", body, i > last_user))
        elif message["role"] in TOOL_ROLES:
            reply = f"<tool_response>\n{text}\n</tool_response>"
            if turns[-1][0] == "tool":
                # Replies that follow one another share one turn.
                reply = turns.pop()[1] + "\n" + reply
            turns.append(("tool", reply, False))
        else:
            raise ValueError(f"a turn of an unknown role: {message['role']}")
    # To the model, a tool's reply is a user turn.
    return [("user" if role == "tool" else role, text, trained) for role, text, trained in turns]


def content_text(message):
    """The content of a message as text. Without a content it is empty, as beside a tool call.

    Of a list of parts, which have a type each, the texts are taken. A tool's reply that is an
    object becomes JSON.
    """
    content = message.get("content")
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(p, dict) and "type" in p for p in content):
        texts = [part.get("text") for part in content]
        return "\n".join(text for text in texts if isinstance(text, str))
    return json.dumps(content, ensure_ascii=False)


def reasoning_of(message):
    """The thinking of an assistant turn that stands in a field of its own, or ""."""
    for name in REASONING:
        thought = message.get(name)
        if isinstance(thought, str) and thought.strip():
            return thought.strip()
    return ""


def split_flag(text):
    """(text without the mode flag that it ends in, this flag or "")."""
    for flag in (NO_THINK, THINK):
        if text.endswith(flag):
            return text.removesuffix(flag), flag
    return text, ""


def render_tool_call(call):
    """A tool call as text; its arguments are a JSON text or an object."""
    function = call.get("function") or call
    name = json.dumps(function["name"], ensure_ascii=False)
    arguments = function["arguments"]
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return f'<tool_call>\n{{"name": {name}, "arguments": {arguments}}}\n</tool_call>'


def render_chat(tokenizer, messages, think, tools=None, add_generation_prompt=True):
    """(ids, loss_mask) of a conversation.

    loss_mask is 1 on the assistant tokens to train on, their closing <|im_end|> included. The
    text of a turn is encoded alone, so its ids cannot depend on its neighbours and a prompt is a
    prefix of its completion.
    """
    start = tokenizer.token_to_id("<|im_start|>")
    end = tokenizer.token_to_id("<|im_end|>")

    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False).ids

    newline = encode("\n")
    ids, mask = [], []
    for role, text, trained in render_turns(messages, think, tools):
        head = [start, *encode(role + "\n")]
        body = [*encode(text), end]
        ids += head + body + newline
        mask += [0] * len(head) + [int(trained)] * len(body) + [0] * len(newline)
    if add_generation_prompt:
        head = [start, *encode("assistant\n")]
        ids += head
        mask += [0] * len(head)
    return ids, mask


def show_tokens(tokenizer, ids, mask, colours=True):
    """The text with trained tokens green and the others red. Look at it once before a long run.

    Without colours, as for a file, [[ and ]] stand around what is trained.
    """
    green, red, reset = "\033[32m", "\033[31m", "\033[0m"
    text = ""
    for trained, pairs in itertools.groupby(zip(ids, mask, strict=True), operator.itemgetter(1)):
        stretch = tokenizer.decode([token for token, _ in pairs], skip_special_tokens=False)
        if colours:
            text += f"{green if trained else red}{stretch}{reset}"
        else:
            text += f"[[{stretch}]]" if trained else stretch
    return text

"""Qwen3 by hand: architecture, YaRN, Hugging Face load and save, chat rendering, token log-probs.

One path for every size: sequences are always packed. A packed batch is a flat `input_ids_T` of T tokens and
`cu_seqlens` [num_seqs + 1] with the offsets where sequences start; attention never crosses an offset. `model(input_ids_BT)`
is the special case of B sequences of equal length. Parameter names are Hugging Face's, so folders are exchanged as they are.

    B rows   T tokens (packed: over all sequences)   D model width   N query heads   K kv heads   H head width
    F mlp width   V vocabulary   M tokens that are scored
"""

import json
import math
import os
import shutil
from dataclasses import asdict, dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from tokenizers import Tokenizer
from torch.utils.checkpoint import checkpoint

from kernels.attention import flash_attention_varlen
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.linear_logprob import linear_logprob
from kernels.qk_norm_rope import qk_norm_rope
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.swiglu import swiglu


# ---- 1. Architecture -----------------------------------------------------------------------------
@dataclass
class Qwen3Config:
    """The fields of a Hugging Face Qwen3 config.json that change the computation; names are theirs."""

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
    # {} or {"rope_type": "yarn", "factor": 2.0, ...}
    rope_scaling: dict = field(default_factory=dict)


# The five dense sizes of the Qwen3 report (arXiv 2505.09388, table 1); 8B is the dataclass default.
QWEN3_SIZES = {
    "0.6b": dict(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        tie_word_embeddings=True,
    ),
    "1.7b": dict(
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=28,
        num_attention_heads=16,
        tie_word_embeddings=True,
    ),
    "4b": dict(
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        tie_word_embeddings=True,
    ),
    "8b": dict(),
    "14b": dict(
        hidden_size=5120, intermediate_size=17408, num_hidden_layers=40, num_attention_heads=40
    ),
}


def read_config(folder) -> Qwen3Config:
    """Qwen3Config from folder/config.json; raises ValueError when the folder holds another architecture."""
    with open(os.path.join(folder, "config.json")) as f:
        raw = json.load(f)
    if raw.get("model_type") != "qwen3":
        raise ValueError(
            f"{folder}/config.json: model_type is {raw.get('model_type')!r}, expected 'qwen3'"
        )
    # transformers 4 and 5 spell it differently
    rope = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    rope_theta = rope.pop("rope_theta", raw.get("rope_theta", 1e6))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "yarn"):
        raise ValueError(
            f"{folder}/config.json: rope_type {kind!r} is not supported (default and yarn are)"
        )
    if raw.get("attention_bias") or raw.get("use_sliding_window"):
        raise ValueError(
            f"{folder}/config.json: attention_bias and sliding windows are not part of dense Qwen3"
        )
    known = {
        k: raw[k]
        for k in Qwen3Config.__dataclass_fields__
        if k in raw and k not in ("rope_scaling", "rope_theta")
    }
    return Qwen3Config(**known, rope_theta=rope_theta, rope_scaling=rope if kind == "yarn" else {})


def hf_config(config: Qwen3Config) -> dict:
    """The config.json that transformers and vLLM read back into the same model (transformers 4 and 5 keys)."""
    raw = asdict(config)
    scaling = raw.pop("rope_scaling")
    raw["rope_parameters"] = {"rope_type": "default", **scaling, "rope_theta": config.rope_theta}
    if scaling:  # vLLM takes max_position_embeddings for the stretched length
        raw |= {"rope_scaling": scaling, "max_position_embeddings": max_positions(config)}
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
        "dtype": "bfloat16" if config.hidden_size >= 1024 else "float32",
    }


def max_positions(config):
    """Tokens of the longest sequence, stretched by YaRN where that is on."""
    scaling = config.rope_scaling
    return max(
        config.max_position_embeddings,
        int(scaling["factor"] * scaling.get("original_max_position_embeddings", 0))
        if scaling
        else 0,
    )


def rope_tables(config: Qwen3Config, length):
    """cos, sin [length, H/2] in fp32. YaRN (arXiv 2309.00071 eq. 17-23) interpolates the slow frequencies, keeps the
    fast ones, and scales both tables by 0.1 ln(factor) + 1, which scales attention logits by its square."""
    dim, scaling = config.head_dim, config.rope_scaling
    freq = config.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)
    inv_freq, scale = 1.0 / freq, 1.0
    if scaling:
        factor = scaling["factor"]
        original = scaling.get("original_max_position_embeddings") or config.max_position_embeddings

        # which frequency turns `rotations` times over the original context
        def rotations_to_dim(rotations):
            return (
                dim
                * math.log(original / (rotations * 2 * math.pi))
                / (2 * math.log(config.rope_theta))
            )

        low = max(math.floor(rotations_to_dim(scaling.get("beta_fast") or 32)), 0)
        high = min(math.ceil(rotations_to_dim(scaling.get("beta_slow") or 1)), dim - 1)
        ramp = ((torch.arange(dim // 2).float() - low) / max(high - low, 0.001)).clamp(0, 1)
        inv_freq = ramp / (factor * freq) + (1 - ramp) / freq
        scale = scaling.get("attention_factor") or (
            0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
        )
    angle = torch.outer(torch.arange(length).float(), inv_freq)
    return angle.cos() * scale, angle.sin() * scale


def rows(x, index):
    """Rows of x, some of them perhaps more than once; None: all. On GPUs the backward of indexing sorts, that of index_select adds
    the gradients of equal rows in any order: a run would not repeat bit for bit."""
    return x if index is None else x[index] if x.is_cuda else x.index_select(0, index)


class Norm(nn.Module):
    """Only holds an RMSNorm weight; the fused ops that apply it live in kernels/."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        N, K, H, D = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.hidden_size,
        )
        self.N, self.K, self.H, self.eps = N, K, H, config.rms_norm_eps
        self.q_proj = nn.Linear(D, N * H, bias=False)
        self.k_proj = nn.Linear(D, K * H, bias=False)
        self.v_proj = nn.Linear(D, K * H, bias=False)
        self.o_proj = nn.Linear(N * H, D, bias=False)
        self.q_norm, self.k_norm = Norm(H), Norm(H)

    def forward(self, x_TD, rope, attend, keep_M=None):
        q_TNH = self.q_proj(x_TD).view(-1, self.N, self.H)
        k_TKH = self.k_proj(x_TD).view(-1, self.K, self.H)
        v_TKH = self.v_proj(x_TD).view(-1, self.K, self.H)
        q_TNH, k_TKH = qk_norm_rope(
            q_TNH, k_TKH, self.q_norm.weight, self.k_norm.weight, *rope, eps=self.eps
        )
        return self.o_proj(rows(attend(q_TNH, k_TKH, v_TKH), keep_M).reshape(-1, self.N * self.H))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_TD):
        return self.down_proj(swiglu(self.gate_proj(x_TD), self.up_proj(x_TD)))


class Layer(nn.Module):
    """Pre-norm block. It passes (update, residual) on instead of their sum, so that every add is fused with the norm
    that follows it."""

    def __init__(self, config):
        super().__init__()
        self.eps = config.rms_norm_eps
        self.self_attn, self.mlp = Attention(config), MLP(config)
        self.input_layernorm, self.post_attention_layernorm = (
            Norm(config.hidden_size),
            Norm(config.hidden_size),
        )

    def forward(self, x_TD, residual_TD, rope, attend, keep_M=None):
        # the sum has been made outside, so that a checkpoint keeps one tensor and not two
        if x_TD is None:
            h_TD = rms_norm(residual_TD, self.input_layernorm.weight, self.eps)
        else:
            h_TD, residual_TD = add_rms_norm(
                x_TD, residual_TD, self.input_layernorm.weight, self.eps
            )
        h_TD, residual_TD = self.self_attn(h_TD, rope, attend, keep_M), rows(residual_TD, keep_M)
        h_TD, residual_TD = add_rms_norm(
            h_TD, residual_TD, self.post_attention_layernorm.weight, self.eps
        )
        return self.mlp(h_TD), residual_TD


class Body(nn.Module):
    def __init__(self, config):
        super().__init__()
        # Not nn.Embedding(V, D): its init imports all of torch.compile on the meta device, two
        # seconds of every start.
        self.embed_tokens = nn.Embedding.from_pretrained(
            torch.empty(config.vocab_size, config.hidden_size), freeze=False
        )
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = Norm(config.hidden_size)


class Qwen3(nn.Module):
    """Qwen3 causal language model. `model(input_ids [B, T]) -> logits [B, T, V]`; see `forward` for packed scoring."""

    def __init__(self, config: Qwen3Config):
        super().__init__()
        self.config = config
        self.model = Body(config)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )
        self.gradient_checkpointing = False
        # (cos, sin), fp32, built at first use: never cast by mixed precision, never in a checkpoint
        self.rope = None

    @property
    def head_weight(self):
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def hidden_states(self, input_ids_T, position_ids_T, attend, keep_M=None):
        """Final-norm output [T, D], or [M, D] of the tokens keep_M alone: in the last layer the others end with their key and value,
        which spares prompts most of it. `attend(layer, q_TNH, k_TKH, v_TKH) -> [T, N, H]` is the
        whole of attention: training passes packed causal attention, the sampler one that reads and writes its KV cache."""
        if self.rope is None or self.rope[0].device != input_ids_T.device:
            # also where the sampler is the first to ask: training saves them for backward
            with torch.inference_mode(False):
                self.rope = tuple(
                    t.to(input_ids_T.device) for t in rope_tables(self.config, self.max_positions())
                )
        rope = (*self.rope, position_ids_T)
        x_TD = self.model.embed_tokens(input_ids_T)
        residual_TD = torch.zeros_like(x_TD)
        for i, layer in enumerate(self.model.layers):
            last = i + 1 == len(self.model.layers)
            args = (rope, lambda q, k, v, i=i: attend(i, q, k, v), keep_M if last else None)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x_TD, residual_TD = checkpoint(
                    layer, None, x_TD + residual_TD, *args, use_reentrant=False
                )
            else:
                x_TD, residual_TD = layer(x_TD, residual_TD, *args)
        return add_rms_norm(x_TD, residual_TD, self.model.norm.weight, self.config.rms_norm_eps)[0]

    def max_positions(self):
        return max_positions(self.config)

    def forward(
        self,
        input_ids,
        cu_seqlens=None,
        max_seqlen=None,
        loss_index=None,
        shared=None,
        temperature=1.0,
        nll=False,
    ):
        """Logits or token log-probs.

        input_ids [B, T] alone             -> logits [B, T, V], fp32; packed ones without loss_index -> final-norm output [T, D]
        packed input_ids [T], cu_seqlens [num_seqs + 1] int32, max_seqlen int (from the packer, no device sync) and
        loss_index [M] int64 (positions of the tokens to score, none of them first in its sequence)
                                           -> (logprobs_T, entropy_T), fp32, entry t about token t, 0 elsewhere
        ... and nll=True                   -> summed negative log-likelihood, fp32 scalar, in one pass over the head (SFT)
        shared: (first_U, copy_T) of lib/packing.shared_prefixes; what sequences begin with alike is then computed once
        temperature: float; both outputs are of softmax(logits / temperature) over the whole vocabulary.
        Scoring happens inside forward so that FSDP2's hooks see it and the head weight is whole.
        """
        if cu_seqlens is None:
            B, T = input_ids.shape
            cu_seqlens = torch.arange(0, B * T + 1, T, dtype=torch.int32, device=input_ids.device)
            hidden_TD = self.packed_hidden(input_ids.reshape(-1), cu_seqlens, T)
            return F.linear(hidden_TD, self.head_weight).float().view(B, T, -1)
        if loss_index is None:
            return self.packed_hidden(input_ids, cu_seqlens, max_seqlen)
        # The one shift by one of this repository: token t is predicted by the hidden state of token
        # t - 1.
        hidden_MD, target_M = (
            self.packed_hidden(input_ids, cu_seqlens, max_seqlen, loss_index - 1, shared),
            input_ids[loss_index],
        )
        if nll:
            return linear_cross_entropy(hidden_MD, self.head_weight, target_M)
        logprobs_M, entropy_M = linear_logprob(
            hidden_MD, self.head_weight, target_M, temperature=temperature
        )
        zeros_T = torch.zeros(input_ids.shape[0], dtype=torch.float32, device=input_ids.device)
        return zeros_T.index_put((loss_index,), logprobs_M), zeros_T.index_put(
            (loss_index,), entropy_M
        )

    def packed_hidden(self, input_ids_T, cu_seqlens, max_seqlen, keep_M=None, shared=None):
        """Final-norm output of the tokens keep_M, or of all. A token's output depends on what stands before it in its sequence alone, so
        of tokens with equal pasts all layers compute one (G samples share their prompt); only attention sees every sequence whole."""
        longest = self.max_positions()
        assert max_seqlen <= longest, (
            f"a sequence of {max_seqlen} tokens, {longest} positions; rope_factor=2 doubles them"
        )
        start_T = torch.repeat_interleave(
            cu_seqlens[:-1], cu_seqlens.diff(), output_size=input_ids_T.shape[0]
        )
        position_ids_T = torch.arange(input_ids_T.shape[0], device=input_ids_T.device) - start_T
        attend = lambda layer, q, k, v: flash_attention_varlen(q, k, v, cu_seqlens, max_seqlen)
        if shared is None:
            return self.hidden_states(input_ids_T, position_ids_T, attend, keep_M)
        first_U, copy_T = shared
        attend_U = lambda layer, *qkv: rows(
            attend(layer, *(rows(t_UNH, copy_T) for t_UNH in qkv)), first_U
        )
        return self.hidden_states(
            input_ids_T[first_U],
            position_ids_T[first_U],
            attend_U,
            copy_T if keep_M is None else copy_T[keep_M],
        )

    # ---- 2. Hugging Face folders -----------------------------------------------------------------
    @classmethod
    def from_config(cls, config, seed=0, std=0.02):
        """Random weights: normal(0, std), norms 1. Residual outputs are scaled by 1 / sqrt(2 layers), as GPT-2 does."""
        model, generator = cls(config), torch.Generator().manual_seed(seed)
        for name, p in model.named_parameters():
            if p.dim() == 2:
                scale = (
                    (2 * config.num_hidden_layers) ** -0.5
                    if name.endswith(("o_proj.weight", "down_proj.weight"))
                    else 1.0
                )
                nn.init.normal_(p, std=std * scale, generator=generator)
        return model

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32, device="cpu", rope_factor=0.0):
        """Load a Hugging Face folder strictly: a missing, unknown or misshapen tensor raises ValueError naming it.
        rope_factor > 1 switches YaRN on over the original context (paper section 3 and appendix B use 2.0)."""
        config = read_config(folder)
        if rope_factor > 1:
            # not as an earlier factor left it
            config.max_position_embeddings = (
                32768 if config.rope_scaling else config.max_position_embeddings
            )
            config.rope_scaling = {
                "rope_type": "yarn",
                "factor": rope_factor,
                "original_max_position_embeddings": 32768,
            }
        with torch.device("meta"):
            model = cls(config)
        wanted, state = dict(model.named_parameters()), {}
        for file in sorted(f for f in os.listdir(folder) if f.endswith(".safetensors")):
            with safe_open(
                os.path.join(folder, file), framework="pt", device=str(device)
            ) as tensors:
                for name in tensors.keys():
                    if name == "lm_head.weight" and config.tie_word_embeddings:
                        continue  # a saved copy of the tied embedding
                    if name not in wanted:
                        raise ValueError(f"{folder}/{file}: unknown tensor {name}")
                    state[name] = tensors.get_tensor(name).to(dtype)
                    if state[name].shape != wanted[name].shape:
                        raise ValueError(
                            f"{folder}/{file}: {name} is {tuple(state[name].shape)}, expected {tuple(wanted[name].shape)}"
                        )
        if missing := sorted(wanted.keys() - state.keys()):
            raise ValueError(f"{folder}: {len(missing)} tensors are missing, first {missing[0]}")
        model.load_state_dict(state, strict=True, assign=True)
        return model

    def save_pretrained(self, folder, state_dict=None):
        """Write config.json, generation_config.json and safetensors that transformers and vLLM open as they are.
        state_dict: gathered weights when the parameters of this module are sharded."""
        from huggingface_hub import save_torch_state_dict

        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, "config.json"), "w") as f:
            json.dump(hf_config(self.config), f, indent=2)
        state = {
            k: v.detach().cpu().contiguous() for k, v in (state_dict or self.state_dict()).items()
        }
        save_torch_state_dict(state, folder, max_shard_size="5GB")


# ---- 3. Tokenizer and chat -----------------------------------------------------------------------
SYSTEM = "You are a helpful and harmless assistant."
TOOLS = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""
THINK, NO_THINK = " /think", " /no_think"

# The same rendering for every other client (transformers, vLLM's server); tests hold the two equal.
CHAT_TEMPLATE = r"""{%- set ns = namespace(last=-1, system='__SYSTEM__', first=0, flag=' /no_think' if enable_thinking is defined and not enable_thinking else ' /think') %}
{%- if messages[0].role == 'system' %}{%- set ns.system = messages[0].content %}{%- set ns.first = 1 %}{%- endif %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{{- '<|im_start|>system\n' + ns.system }}
{%- if tools %}{{- '\n\n__TOOLS_HEAD__' }}{%- for tool in tools %}{{- '\n' + (tool | tojson) }}{%- endfor %}{{- '__TOOLS_TAIL__' }}{%- endif %}
{{- '<|im_end|>\n' }}
{%- for m in messages[ns.first:] %}{%- set i = loop.index0 + ns.first %}{%- set text = (m.content or '') | trim %}
{%- if m.role == 'user' %}
{%- set flag = ns.flag if i == ns.last else ' /no_think' %}
{%- if text.endswith(' /no_think') %}{%- set text = text[:-10] %}{%- set flag = ' /no_think' %}
{%- elif text.endswith(' /think') %}{%- set text = text[:-7] %}{%- if i == ns.last %}{%- set flag = ' /think' %}{%- endif %}{%- endif %}
{{- '<|im_start|>user\n' + text + flag + '<|im_end|>\n' }}
{%- elif m.role == 'assistant' %}
{%- if i < ns.last %}{%- set text = text.split('</think>')[-1] | trim %}{%- endif %}
{{- '<|im_start|>assistant\n' + text }}
{%- for call in m.tool_calls or [] %}{%- set f = call.function or call %}{{- '\n<tool_call>\n{"name": ' + (f.name | tojson) + ', "arguments": ' + (f.arguments if f.arguments is string else f.arguments | tojson) + '}\n</tool_call>' }}{%- endfor %}
{{- '<|im_end|>\n' }}
{%- elif m.role == 'tool' %}
{%- if messages[i - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
{{- '\n<tool_response>\n' + text + '\n</tool_response>' }}
{%- if loop.last or messages[i + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
_head, _tail = TOOLS.replace("{{", "{").replace("}}", "}").replace("\n", "\\n").split("\\n{}\\n")
CHAT_TEMPLATE = (
    CHAT_TEMPLATE.replace("__SYSTEM__", SYSTEM)
    .replace("__TOOLS_HEAD__", _head)
    .replace("__TOOLS_TAIL__", "\\n" + _tail)
)


def load_tokenizer(folder) -> Tokenizer:
    """The folder's fast tokenizer. Special tokens written inside a text stay text: content cannot close a turn."""
    if not os.path.exists(os.path.join(folder, "tokenizer.json")):
        raise ValueError("no checkpoint there (tokenizer.json is missing)")
    tokenizer = Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    for name in ("<|im_start|>", "<|im_end|>", "<|endoftext|>"):
        if tokenizer.token_to_id(name) is None:
            raise ValueError(
                f"{folder}/tokenizer.json: no token {name}; a Qwen3 (ChatML) tokenizer is expected"
            )
    return tokenizer


def stop_ids(tokenizer):
    """Qwen3's own config files disagree about the stop token of base models, so both are always stops."""
    return [tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")]


def save_tokenizer(source, folder):
    """Copy the tokenizer of `source` and write our chat template into it (tokenizer_config.json and chat_template.jinja)."""
    os.makedirs(folder, exist_ok=True)
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
        "merges.txt",
        "special_tokens_map.json",
    ):
        if os.path.exists(path := os.path.join(source, name)) and not os.path.samefile(
            source, folder
        ):
            shutil.copy(path, folder)
    path = os.path.join(folder, "tokenizer_config.json")
    config = (
        json.load(open(path))
        if os.path.exists(path)
        else {"tokenizer_class": "PreTrainedTokenizerFast"}
    )
    config |= {
        "chat_template": CHAT_TEMPLATE,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "bos_token": None,
    }
    json.dump(config, open(path, "w"), indent=2)
    open(os.path.join(folder, "chat_template.jinja"), "w").write(CHAT_TEMPLATE)
    tokenizer = Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
    generation = {
        "eos_token_id": stop_ids(tokenizer),
        "pad_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "do_sample": True,
    }
    json.dump(generation, open(os.path.join(folder, "generation_config.json"), "w"), indent=2)


def render_turns(messages, think, tools=None):
    """[(role, text, trained)] as the Cascade model cards specify (paper 3.1.2, figure 3): a default system text, the mode
    flag at the end of every user turn, history with its thinking removed and its flags set to /no_think. Trained are the
    assistant turns after the last user turn. A flag already written in the last user turn wins over `think`."""
    system = SYSTEM if messages[0]["role"] != "system" else messages[0]["content"]
    if tools:
        system += "\n\n" + TOOLS.format(
            "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        )
    turns, last = (
        [("system", system, False)],
        max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1),
    )
    for i, m in enumerate(messages):
        text = (m["content"] or "").strip()
        if m["role"] == "user":
            flag = (THINK if think else NO_THINK) if i == last else NO_THINK
            for written in (NO_THINK, THINK):
                if text.endswith(written):
                    text, flag = text.removesuffix(written), written if i == last else NO_THINK
                    break
            turns.append(("user", text + flag, False))
        elif m["role"] == "assistant":
            text = text if i > last else text.split("</think>")[-1].strip()
            for call in m.get("tool_calls") or []:
                call = call.get("function") or call
                arguments = (
                    call["arguments"]
                    if isinstance(call["arguments"], str)
                    else json.dumps(call["arguments"], ensure_ascii=False)
                )
                name = json.dumps(call["name"], ensure_ascii=False)
                text += f'\n<tool_call>\n{{"name": {name}, "arguments": {arguments}}}\n</tool_call>'
            turns.append(("assistant", text, i > last))
        elif m["role"] == "tool":
            reply = f"<tool_response>\n{text}\n</tool_response>"
            if turns[-1][0] == "tool":
                turns[-1] = ("tool", turns[-1][1] + "\n" + reply, False)
            else:
                turns.append(("tool", reply, False))
    return [("user" if role == "tool" else role, text, trained) for role, text, trained in turns]


def render_chat(tokenizer, messages, think, tools=None, add_generation_prompt=True):
    """(ids, loss_mask) of a conversation; loss_mask is 1 on the assistant tokens to train on, the closing <|im_end|> included.
    Each turn's text is encoded alone: its ids cannot depend on its neighbours, and a prompt is a prefix of its completion."""
    start, end = tokenizer.token_to_id("<|im_start|>"), tokenizer.token_to_id("<|im_end|>")
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
    newline, ids, mask = encode("\n"), [], []
    for role, text, trained in render_turns(messages, think, tools):
        head, body = [start, *encode(role + "\n")], [*encode(text), end]
        ids += head + body + newline
        mask += [0] * len(head) + [int(trained)] * len(body) + [0] * len(newline)
    if add_generation_prompt:
        head = [start, *encode("assistant\n")]
        ids, mask = ids + head, mask + [0] * len(head)
    return ids, mask


def show_tokens(tokenizer, ids, mask):
    """The text with trained tokens green and the others red: look at it once before every long run."""
    colour = lambda id, on: (
        f"\033[{32 if on else 31}m{tokenizer.decode([id], skip_special_tokens=False)}"
    )
    return "".join(colour(id, on) for id, on in zip(ids, mask, strict=True)) + "\033[0m"

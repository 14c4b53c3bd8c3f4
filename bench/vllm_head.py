"""Logits in fp32 or in bf16: how far the log-probs of a sampler are off those of the trainer.

    .venv-vllm/bin/python bench/vllm_head.py | tee bench/vllm/head.log

Everything else computes in bf16, as on GPUs; here that is PyTorch's CPU and vLLM's CPU build. The
model is random, with a head so large that the logits have the spread of a trained one: most of a
distribution lies on a few tokens. Each row is a sampler, the built-in one or vLLM, that makes its
logits in fp32 or rounds them to bf16; each column a trainer that does the one or the other. What is
left with fp32 on both sides comes from the layers below the head.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import engine as sampler
from engine import Rollout, make_engine, request_seed
from lib.common import finish
from lib.packing import pack_rollouts
from model import Qwen3, Qwen3Config

SHAPE = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
PROMPTS, SAMPLES, TOKENS = 8, 8, 64
# Standard deviation of the head's weights: that of the logits is 16 times as large.
HEAD_STD = 0.35


class Tokenizer:
    def token_to_id(self, token):
        return 0

    def decode(self, ids, skip_special_tokens):
        return ""


def rounded_logits(hidden, weight):
    """head_logits as samplers mostly have it: in the precision of the weights."""
    return F.linear(hidden, weight).float()


def no_check(engine, model):
    """Stands in for check_parity, which wants a tokenizer: the gap is what this script prints."""
    return 0.0


def round_vllm(worker):
    worker.model_runner.get_model().logits_processor.head_dtype = torch.bfloat16


def sample(engine):
    draw = torch.Generator().manual_seed(0)
    rollouts = []
    for group in range(PROMPTS):
        prompt = torch.randint(SHAPE["vocab_size"], (16,), generator=draw).tolist()
        for n in range(SAMPLES):
            rollouts.append(Rollout({}, group, prompt, request_seed(group, n), n))
    engine.generate(rollouts, TOKENS, 1.0)
    return rollouts


@torch.no_grad()
def trainer_logprobs(model, rollouts):
    """{"fp32", "bf16": log-probs [M] of the completions}, and the logits [M, V] of the first."""
    batch = pack_rollouts(rollouts, torch.device("cpu"))
    scored_M = batch["loss_index"]
    logprobs_T, _ = model.token_logprobs(batch)
    hidden_MD, target_M = model.scored_hidden(batch)
    rounded_MV = torch.log_softmax(rounded_logits(hidden_MD, model.head_weight), -1)
    rounded_M = rounded_MV.gather(1, target_M[:, None])[:, 0]
    logits_MV = sampler.head_logits(hidden_MD, model.head_weight)
    return {"fp32": logprobs_T[scored_M], "bf16": rounded_M}, logits_MV


def main():
    torch.set_num_threads(1)
    sampler.check_parity = no_check
    model = Qwen3.from_config(Qwen3Config(**SHAPE), std=0.05)
    with torch.no_grad():
        model.lm_head.weight.normal_(std=HEAD_STD, generator=torch.Generator().manual_seed(1))
    model = model.to(torch.bfloat16).requires_grad_(False)

    print("| sampler | its logits | trainer's in fp32: mean, rms, max | trainer's in bf16 |")
    print("|---|---|---|---|")
    for name in ("torch", "vllm"):
        engine = make_engine(name, model, Tokenizer())
        engine.stops = []  # no token ends a completion
        for precision in ("fp32", "bf16"):
            if precision == "bf16" and name == "vllm":
                engine.llm.collective_rpc(round_vllm)
            if precision == "bf16" and name == "torch":
                sampler.head_logits = rounded_logits
            rollouts = sample(engine)
            sampled_M = torch.tensor([p for r in rollouts for p in r.sampler_logprobs])
            cells = []
            logprobs, logits_MV = trainer_logprobs(model, rollouts)
            for logprobs_M in logprobs.values():
                gap_M = (logprobs_M - sampled_M).abs()
                rms = gap_M.square().mean().sqrt()
                cells.append(f"{gap_M.mean():.4f}, {rms:.4f}, {gap_M.max():.3f}")
            print(f"| {name} | {precision} | {' | '.join(cells)} |", flush=True)
    largest = logits_MV.amax(-1)
    entropy = torch.distributions.Categorical(logits=logits_MV).entropy()
    print(
        f"{len(sampled_M)} tokens, largest logit {largest.mean():.0f} on average, "
        f"entropy {entropy.mean():.1f} nats"
    )


if __name__ == "__main__":
    main()
    finish()

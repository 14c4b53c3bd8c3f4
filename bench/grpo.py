"""One GRPO step (rollouts, rewards, one update) beside TRL's GRPOTrainer, with the same model,
prompts, group size and reward.

    python bench/grpo.py [--rounds=15]      # makes .venv-peers and out/bench

It writes bench/grpo.json and .png. There are two settings, both fp32, one thread, temperature 1, no
KL term, AdamW, one update a batch:
  fixed    the toy's untrained model. Every completion is 80 tokens long (no stop token), and the
           reward is how rare the letter e is. Every group has a signal, so both sides train on the
           very same number of tokens.
  math     the toy's SFT model on toy math, with stop tokens, at most 80 tokens, and the math
           verifier. Here work can be saved: rows that have stopped leave the batch, nothing is
           padded, and rollouts without an advantage have no gradient.
Both sides hide truncated completions in `math`. "trl, our malloc" gives TRL the memory settings of
init_distributed. "ours, nothing shared" computes the prompt once for each of its completions, as
TRL does.
"""

import argparse
import sys
import time

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
)

PROMPTS, GROUP, LENGTH, LR = 16, 8, 80, 1e-4


def rarity(text):
    """The reward of `fixed`: in (-1, 0], different for nearly every completion."""
    return -text.count("e") / max(len(text), 1)


def toy_rows(setting):
    """Return (cfg, rows): toy math through the stage's own loader.

    So both sides see the same prompts and gold answers.
    """
    import mathrl

    cfg = mathrl.Config(
        init_from=toy_folder("sft" if setting == "math" else "base"),
        data=str(OUT / "data" / "math_rl.jsonl"),
        lr=LR,
        prompts_per_step=PROMPTS,
        group_size=GROUP,
        max_new_tokens=LENGTH,
        max_prompt_tokens=256,
        temperature=1.0,
        top_p=1.0,
        micro_batch_tokens=8192,
        reward_workers=2,
        overlong_filter=setting == "math",
    )
    return cfg, mathrl.load_rows(cfg, limit=800)


def ours(setting, shared=True):
    """The stage's own functions, in the order of its main."""
    import torch

    import mathrl
    from lib import packing
    from lib.common import init_distributed
    from model import Qwen3, load_tokenizer

    rank, world, device = init_distributed(0)
    cfg, rows = toy_rows(setting)
    tokenizer, model = load_tokenizer(cfg.init_from), Qwen3.from_pretrained(cfg.init_from)
    rows = mathrl.encode_prompts(rows, tokenizer, cfg)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=LR,
        betas=(cfg.beta1, cfg.beta2),
        weight_decay=cfg.weight_decay,
        fused=True,
    )
    engine, hook = mathrl.make_engine("torch", model, tokenizer), mathrl.make_reward(cfg)
    if setting == "fixed":
        engine.stops = [-1]
        hook = (
            (lambda r: vars(r).update(reward=rarity(r.text), status="ok")),
            (lambda rollouts: None),
        )
    if not shared:
        packing.shared_prefixes = lambda sequences, device: None
    take_turn(**versions("torch", "transformers"))
    for step in range(1, 10**6):
        began = time.perf_counter()
        indices = range((step - 1) * PROMPTS, step * PROMPTS)
        trained, sampled = mathrl.rollout(
            engine, rows, [i % len(rows) for i in indices], step, {}, cfg, hook, rank, world
        )
        generated = time.perf_counter()
        metrics = mathrl.train_step(model, optimizer, trained, cfg, device, world)
        tokens = sum(len(r.completion_ids) for r in sampled)
        reward = sum(r.reward for r in sampled) / len(sampled)
        take_turn(
            tokens=tokens,
            trained=metrics["num_tokens"],
            reward=reward,
            gen_s=generated - began,
            train_s=time.perf_counter() - generated,
        )


def trl(setting):
    """GRPOTrainer; a turn is a whole step, from one on_step_end to the next."""
    import datasets
    import torch
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    import mathrl
    from model import load_tokenizer, render_chat

    torch.set_num_threads(1)
    cfg, rows = toy_rows(setting)
    seen = {}

    def reward(prompts, completions, completion_ids, answer, **_):
        texts = [turns[0]["content"] for turns in completions]
        asked = [turns[-1]["content"] for turns in prompts]
        values = [
            rarity(t) if setting == "fixed" else mathrl.reward(t, a, q)
            for t, a, q in zip(texts, answer, asked, strict=True)
        ]
        seen.update(tokens=sum(map(len, completion_ids)), reward=sum(values) / len(values))
        return [float(v) for v in values]

    class Turns(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            take_turn(**seen)

        def on_train_begin(self, *args, **kwargs):
            take_turn(**versions("torch", "transformers", "trl", "accelerate"))

    trainer = GRPOTrainer(
        model=cfg.init_from,
        reward_funcs=reward,
        callbacks=[Turns()],
        train_dataset=datasets.Dataset.from_list(
            [{"prompt": row["messages"], "answer": row["answer"]} for row in rows]
        ),
        args=GRPOConfig(
            output_dir=str(OUT / "trl_grpo"),
            use_cpu=True,
            bf16=False,
            fp16=False,
            gradient_checkpointing=False,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            logging_steps=1000,
            max_steps=10**6,
            per_device_train_batch_size=PROMPTS * GROUP,
            num_generations=GROUP,
            shuffle_dataset=False,
            max_completion_length=LENGTH,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            beta=0.0,
            loss_type="dapo",
            mask_truncated_completions=setting == "math",
            learning_rate=LR,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            adam_beta1=cfg.beta1,
            adam_beta2=cfg.beta2,
            weight_decay=cfg.weight_decay,
            max_grad_norm=cfg.grad_clip,
            model_init_kwargs={"dtype": "float32"},
            generation_kwargs={"min_new_tokens": LENGTH} if setting == "fixed" else None,
        ),
    )
    prompt = rows[0]["messages"]
    theirs = trainer.processing_class.apply_chat_template(
        prompt, add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert theirs == render_chat(load_tokenizer(cfg.init_from), prompt, True)[0], (
        "the two sides do not see the same prompt"
    )
    trainer.train()


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--settings", default="fixed,math")
    parser.add_argument("--contestant", default="")
    args = parser.parse_args()
    if args.contestant:
        return {"ours": ours, "alone": lambda setting: ours(setting, shared=False), "trl": trl}[
            args.contestant
        ](args.settings)
    python, groups = peer_python(), {}
    toy_folder("sft")
    for setting in args.settings.split(","):
        print(f"{setting}: {PROMPTS} prompts x {GROUP} completions of {LENGTH} tokens", flush=True)

        def flags(who, setting=setting):
            return [f"--contestant={who}", f"--settings={setting}"]

        contestants = {
            "ours": (sys.executable, flags("ours"), {}),
            "ours, nothing shared": (sys.executable, flags("alone"), {}),
            "trl": (python, flags("trl"), {}),
            "trl, our malloc": (python, flags("trl"), KEEP_PAGES),
        }
        groups[setting] = summarize(race("grpo", contestants, args.rounds))
    settings = {
        "prompts": PROMPTS,
        "group_size": GROUP,
        "max_new_tokens": LENGTH,
        "lr": LR,
        "dtype": "float32",
    }
    report(
        "grpo",
        settings,
        groups,
        f"One GRPO step, {PROMPTS} prompts x {GROUP} completions, toy model, fp32",
    )


if __name__ == "__main__":
    main()

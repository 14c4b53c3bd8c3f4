"""SFT tokens per second and peak memory beside TRL's SFTTrainer with packing: same model, same
rows, same update.

    python bench/sft.py [--rounds=7]       # makes .venv-peers and out/bench

It writes bench/sft.json and .png. A turn is one update on the same 128 toy conversations (fp32, one
thread). TRL gets our token ids and labels. Packed (best-fit decreasing, rows of 512 tokens), it may
choose: a row at a time with accumulation, or several rows in one pass, where its attention mask
spans all the rows. Unpacked, it pads, 16 conversations at a time. Ours runs with 2048 tokens a pass
and, as in run_cascade.sh, with 8192. Every side reports the loss before its first update, and these
losses have to agree.
"""

import argparse
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
)

ROWS, LENGTH, LR = 128, 512, 1e-4


def conversations(tokens=2048):
    """(cfg, samples): the first rows of the toy's SFT set, encoded by sft.py."""
    import sft
    from model import load_tokenizer

    cfg = sft.Config(
        init_from=toy_folder("base"),
        data=str(OUT / "data" / "sft_stage1.jsonl"),
        lr=LR,
        max_seq_len=LENGTH,
        micro_batch_tokens=tokens,
    )
    return cfg, sft.load_samples(cfg.data, load_tokenizer(cfg.init_from), cfg)[:ROWS]


def ours(tokens):
    import torch

    import sft
    from lib.common import init_distributed
    from model import Qwen3

    _, world, device = init_distributed(0)
    cfg, samples = conversations(tokens)
    model = Qwen3.from_pretrained(cfg.init_from)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=LR,
        betas=(cfg.beta1, cfg.beta2),
        weight_decay=cfg.weight_decay,
        fused=True,
    )
    tokens = sum(len(ids) for ids, _, _ in samples)
    take_turn(**versions("torch", "transformers"))
    while True:
        metrics = sft.train_step(model, optimizer, samples, cfg, device, world)
        take_turn(tokens=tokens, loss=metrics["loss"])


def trl(batch, packing):
    """SFTTrainer; a turn is a whole step, an epoch of these rows."""
    import datasets
    import torch
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(1)
    cfg, samples = conversations()
    tokens = sum(len(ids) for ids, _, _ in samples)
    rows = [
        {
            "input_ids": ids.tolist(),
            "labels": [i if m else -100 for i, m in zip(ids.tolist(), mask)],
        }
        for ids, mask, _ in samples
    ]

    class Turns(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            take_turn(**versions("torch", "transformers", "trl", "accelerate"))

        # The trainer calls this after on_step_end, so the loss is that of the turn.
        def on_log(self, args, state, control, logs, **kwargs):
            take_turn(tokens=tokens, loss=logs["loss"])

    config = {
        "output_dir": str(OUT / "trl_sft"),
        "use_cpu": True,
        "bf16": False,
        "fp16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "max_steps": 10**6,
        "max_length": LENGTH,
        "packing": packing,
        "per_device_train_batch_size": batch,
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "adam_beta1": cfg.beta1,
        "adam_beta2": cfg.beta2,
        "weight_decay": cfg.weight_decay,
        "max_grad_norm": cfg.grad_clip,
        "model_init_kwargs": {"dtype": "float32"},
    }
    data = datasets.Dataset.from_list(rows)
    # This trainer only counts the rows that packing leaves.
    num_rows = len(
        SFTTrainer(model=cfg.init_from, train_dataset=data, args=SFTConfig(**config)).train_dataset
    )
    accumulate = -(-num_rows // batch)
    trainer = SFTTrainer(
        model=cfg.init_from,
        train_dataset=data,
        args=SFTConfig(**config, gradient_accumulation_steps=accumulate),
        callbacks=[Turns()],
    )
    trainer.train()


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--contestant", default="")
    parser.add_argument("--batch", type=int, default=1)
    args = parser.parse_args()
    if args.contestant:
        return (
            ours(args.batch)
            if args.contestant == "ours"
            else trl(args.batch, args.contestant == "packed")
        )
    python = peer_python()
    toy_folder("base")
    peers = {
        "trl packed, 1 row a pass": ("packed", 1),
        "trl packed, 4 rows a pass": ("packed", 4),
        "trl padded, 16 a pass": ("padded", 16),
    }
    contestants = {
        name: (sys.executable, ["--contestant=ours", f"--batch={batch}"], {})
        for name, batch in (("ours", 2048), ("ours, 8192 a pass", 8192))
    }
    contestants |= {
        name: (python, [f"--contestant={who}", f"--batch={batch}"], {})
        for name, (who, batch) in peers.items()
    }
    contestants["trl packed, 1 row, our malloc"] = (
        python,
        ["--contestant=packed", "--batch=1"],
        KEEP_PAGES,
    )
    found = race("sft", contestants, args.rounds)
    first = {name: child["warmups"][0]["loss"] for name, child in found.items()}
    print("first loss: " + ", ".join(f"{name} {loss:.5f}" for name, loss in first.items()))
    assert max(first.values()) - min(first.values()) < 1e-3, (
        f"the sides do not train on the same tokens: {first}"
    )
    settings = {
        "conversations": ROWS,
        "max_seq_len": LENGTH,
        "lr": LR,
        "dtype": "float32",
        "first_loss": first,
    }
    report(
        "sft",
        settings,
        {"one update on 128 conversations": summarize(found)},
        "SFT, toy model, fp32",
        tokens=True,
    )


if __name__ == "__main__":
    main()

"""Forward and backward of model.py beside transformers' Qwen3ForCausalLM: same weights, same
tokens, same dtype.

    python bench/qwen3.py [--size=0.6b] [--layers=28] [--tokens=512] [--dtype=float32] [--rounds=5]

It writes bench/qwen3.json and .png. It times the cross-entropy of next tokens over sequences of
128, on one thread, with random weights from one seed. transformers gets the batch in its best form
(equal lengths, no padding, SDPA). "mixed" has the same number of tokens in sequences of 32 to 224,
which transformers has to pad. The losses have to agree. --layers below the real number saves time
and shifts weight to the head.
"""

import argparse
import sys

from side_by_side import peer_python, race, report, summarize, take_turn, versions

LENGTHS = {"equal": [128, 128, 128, 128], "mixed": [32, 96, 160, 224]}


def weights(args):
    """(our model, ids of each sequence): random, the same in both processes."""
    import torch

    from model import QWEN3_SIZES, Qwen3, Qwen3Config

    config = Qwen3Config(
        **QWEN3_SIZES[args.size] | {"num_hidden_layers": args.layers, "vocab_size": args.vocab}
    )
    generator = torch.Generator().manual_seed(1)
    lengths = [n for _ in range(args.tokens // 512) for n in LENGTHS[args.setting]]
    return Qwen3.from_config(config).to(getattr(torch, args.dtype)), [
        torch.randint(args.vocab, (n,), generator=generator) for n in lengths
    ]


def ours(args):
    import torch

    from lib.common import init_distributed
    from model import packed_batch

    init_distributed(0)
    model, sequences = weights(args)
    lengths = torch.tensor([len(s) for s in sequences])
    cu_seqlens = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0))).to(torch.int32)
    ids = torch.cat(sequences)
    firsts = torch.isin(torch.arange(len(ids)), cu_seqlens[:-1])
    scored = (~firsts).nonzero()[:, 0]
    take_turn(**versions("torch", "transformers"))
    while True:
        batch = packed_batch(ids, cu_seqlens, int(lengths.max()), scored)
        loss = model.nll(batch) / len(scored)
        loss.backward()
        model.zero_grad(set_to_none=True)
        take_turn(tokens=len(ids), loss=loss.item())


def transformers(args):
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from model import hf_config

    torch.set_num_threads(1)
    mine, sequences = weights(args)
    config = Qwen3Config(
        **{
            k: v
            for k, v in hf_config(mine.config).items()
            if k not in ("architectures", "model_type", "dtype")
        },
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config)
    state = dict(mine.state_dict())
    if mine.config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffer is not in the state
    del mine
    model.train()
    width = max(map(len, sequences))
    ids = torch.stack([torch.cat((s, s.new_zeros(width - len(s)))) for s in sequences])
    mask = torch.stack([torch.arange(width) < len(s) for s in sequences]).long()
    mask = None if args.setting == "equal" else mask
    labels = ids if mask is None else ids.masked_fill(mask == 0, -100)
    take_turn(**versions("torch", "transformers"))
    while True:
        loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
        loss.backward()
        model.zero_grad(set_to_none=True)
        take_turn(tokens=sum(map(len, sequences)), loss=loss.item())


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--size", default="0.6b")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--tokens", type=int, default=512, help="a multiple of 512")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--setting", default="equal,mixed")
    parser.add_argument("--contestant", default="")
    args = parser.parse_args()
    if args.contestant:
        return {"ours": ours, "transformers": transformers}[args.contestant](args)
    peer_python()
    groups = {}
    for setting in args.setting.split(","):
        print(
            f"{setting}: {args.size}, {args.layers} layers, {args.tokens} tokens, {args.dtype}",
            flush=True,
        )
        flags = [
            f"--{name}={getattr(args, name)}"
            for name in ("size", "layers", "vocab", "tokens", "dtype")
        ] + [f"--setting={setting}"]
        # There are two warm-ups, because the heap has to reach its size.
        found = race(
            "qwen3",
            {
                who: (sys.executable, [*flags, f"--contestant={who}"], {})
                for who in ("ours", "transformers")
            },
            args.rounds,
            warmups=2,
        )
        losses = [child["turns"][0]["loss"] for child in found.values()]
        assert abs(losses[0] - losses[1]) < (1e-4 if args.dtype == "float32" else 0.02), (
            f"not the same computation: {losses}"
        )
        groups[setting] = summarize(found)
    settings = {
        k: v for k, v in vars(args).items() if k in ("size", "layers", "vocab", "tokens", "dtype")
    } | {"lengths": LENGTHS}
    report(
        "qwen3",
        settings,
        groups,
        f"Forward and backward, Qwen3-{args.size} with {args.layers} layers, {args.tokens} tokens, "
        f"{args.dtype}",
    )


if __name__ == "__main__":
    main()

"""Fused operations of the hot path, one per file: formula, PyTorch reference, forward, backward.

Begin with rms_norm.py: it explains Triton from nothing and the habits that all files share. Then:

    swiglu.py                  the gate of the MLP; the shortest file
    qk_norm_rope.py            RMSNorm of every query and key head, then RoPE
    attention.py               causal attention over packed sequences, for training
    decode_attention.py        attention of one new token over a KV cache, for the sampler
    linear_logprob.py          log-probability and entropy of a token without a logits tensor (RL)
    linear_cross_entropy.py    the same head in a single pass, for supervised fine-tuning
    sampling.py                draws the next token under temperature, top-k and top-p
    adamw.py                   AdamW for weights kept in bf16; by default the stages keep fp32
                               weights and use PyTorch's fused AdamW instead
    dispatch.py                decides whether Triton or PyTorch runs: CUDA tensors go to Triton,
                               CPU tensors to the PyTorch path of the same signature
"""

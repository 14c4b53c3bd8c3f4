"""Fused operations of the hot path, one per file: formula, PyTorch reference, Triton forward and backward, wrapper.

CUDA tensors go to Triton, CPU tensors to the reference of the same signature (dispatch.py). Read rms_norm.py first. adamw.py is for
weights kept in bf16; the stages keep fp32 master weights and use PyTorch's fused AdamW.
"""

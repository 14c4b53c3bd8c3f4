"""Fused operations of the hot path, one per file: formula, PyTorch reference, Triton forward and backward, wrapper.

CUDA tensors go to Triton, CPU tensors to the reference of the same signature (dispatch.py). Read rms_norm.py first.
"""

"""Compile every Triton kernel without a GPU, for Hopper (sm_90) or another one; print its needs as
JSON.

    python tests/aot_report.py [100]

The needs are registers, shared memory, spilled bytes and the kinds of instructions. Triton's wheel
carries the assembler, so this works on any Linux machine. Shapes are Qwen3-8B's and, where a width
of the toy model takes another path, the toy's.
"""

import json
import pathlib
import re
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import (
    adamw,
    attention,
    decode_attention,
    linear_logprob,
    qk_norm_rope,
    rms_norm,
    sampling,
    swiglu,
)

# A program on sm_90 (Hopper) and sm_100 may take 227 KiB of shared memory, on sm_120 99 KiB.
CAPABILITY = int(sys.argv[1]) if sys.argv[1:] else 90
SHARED_BYTES = 232448 if CAPABILITY in (90, 100) else 101376

CUOBJDUMP = pathlib.Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"

BF, FP, INT = "*bf16", "*fp32", "*i64"
ROPE_8B = {"N": 32, "K": 8, "N_BLOCK": 32, "K_BLOCK": 8, "HALF": 64, "HALF_BLOCK": 64}
ROPE_TOY = {"N": 4, "K": 2, "N_BLOCK": 4, "K_BLOCK": 2, "HALF": 12, "HALF_BLOCK": 16}
ROPE_IN = f"{BF} {BF} {BF} {BF} {FP} {FP} {INT}"
ATTN_8B = {"N": 32, "K": 8, "H": 128, "H_BLOCK": 128, "BLOCK_K": 64}
ATTN_TOY = {"N": 4, "K": 2, "H": 24, "H_BLOCK": 32, "BLOCK_K": 64}
SCALARS = "i32 i32 i32 i32 i32 fp32"  # three strides, num_tokens, num_blocks, scale

# The six i32 are strides; then follow length, num_splits and scale.
DECODE_IN = f"{BF} {BF} {BF} {INT} {BF} {FP} {FP} {FP} " + "i32 " * 6 + f"{INT} i32 fp32"
DECODE_8B = ATTN_8B | {"G_BLOCK": 16, "SPLIT": 256, "BLOCK": 64}
DECODE_8B.pop("BLOCK_K")
DECODE_TOY = DECODE_8B | {"N": 4, "K": 2, "H": 24, "H_BLOCK": 32}

# fp32 logits, as the sampler's head makes them.
SAMPLE_IN = f"{FP} {FP} {INT} {FP} i32 fp32 fp32 i32"
SAMPLE = {"GREEDY": False, "V": 151936, "BLOCK": sampling.BLOCK, "BLOCKS": 64}
SAMPLE |= {"TRIES_BLOCK": sampling.TRIES_BLOCK, "TRIES": sampling.TRIES}

# One row a configuration: the kernel, the types of its run-time arguments in order, its constants,
# the number of warps, the number of pipeline stages.
CONFIGS = [
    (
        rms_norm.rms_norm_forward,
        f"{BF} {BF} {BF} {BF} {BF} {FP} i32 i32 fp32",
        {"D": 4096, "ADD": True, "BLOCK": 4096},
        8,
        3,
    ),
    (
        rms_norm.rms_norm_forward,
        f"{BF} {BF} {BF} {BF} {BF} {FP} i32 i32 fp32",
        {"D": 5120, "ADD": True, "BLOCK": 8192},
        16,
        3,
    ),
    (
        rms_norm.rms_norm_backward,
        f"{BF} {BF} {BF} {BF} {FP} {BF} {FP} i32 i32 i32",
        {"D": 4096, "ADD": True, "BLOCK": 4096},
        8,
        3,
    ),
    (
        rms_norm.rms_norm_backward,
        f"{BF} {BF} {BF} {BF} {FP} {BF} {FP} i32 i32 i32",
        {"D": 5120, "ADD": True, "BLOCK": 8192},
        16,
        3,
    ),
    (
        qk_norm_rope.qk_norm_rope_forward,
        f"{ROPE_IN} {BF} {BF} {FP} {FP} i32 i32 fp32",
        ROPE_8B,
        4,
        3,
    ),
    (
        qk_norm_rope.qk_norm_rope_forward,
        f"{ROPE_IN} {BF} {BF} {FP} {FP} i32 i32 fp32",
        ROPE_TOY,
        1,
        3,
    ),
    (
        qk_norm_rope.qk_norm_rope_backward,
        f"{BF} {BF} {ROPE_IN} {FP} {FP} {BF} {BF} {FP} i32 i32 i32 i32",
        ROPE_8B,
        2,
        3,
    ),
    (swiglu.swiglu_forward, f"{BF} {BF} {BF} i32 i32", {"D": 12288, "BLOCK": 1024}, 4, 3),
    (
        swiglu.swiglu_backward,
        f"{BF} {BF} {BF} {BF} {BF} i32 i32",
        {"D": 12288, "BLOCK": 1024},
        4,
        3,
    ),
    (linear_logprob.fold_chunk, f"{FP} {INT} {FP} {FP} i32 i32 i32 i32", {"BLOCK": 4096}, 8, 3),
    (
        linear_logprob.logits_to_dz,
        f"{FP} {BF} {INT} {FP} {FP} {FP} {FP} {FP} {FP} i32 i32 i32 i32 i32",
        {"HAS_DENTROPY": True, "BLOCK": 4096},
        8,
        3,
    ),
    (
        attention.attention_forward,
        f"{BF} {BF} {BF} {BF} {FP} *i32 {SCALARS}",
        ATTN_8B | {"BLOCK_Q": 128},
        8,
        3,
    ),
    (
        attention.attention_forward,
        f"{BF} {BF} {BF} {BF} {FP} *i32 {SCALARS}",
        ATTN_TOY | {"BLOCK_Q": 128},
        8,
        3,
    ),
    (
        attention.attention_backward_q,
        f"{BF} {BF} {BF} {BF} {BF} {FP} {FP} {BF} *i32 {SCALARS} fp32",
        ATTN_8B | {"BLOCK_Q": 128},
        8,
        attention.backward_q_stages(2, SHARED_BYTES),
    ),
    (
        attention.attention_backward_kv,
        f"{BF} {BF} {BF} {BF} {FP} {FP} {BF} {BF} *i32 {SCALARS} fp32",
        ATTN_8B | {"BLOCK_Q": 64},
        4,
        2,
    ),
    (
        attention.attention_backward_kv,
        f"{BF} {BF} {BF} {BF} {FP} {FP} {BF} {BF} *i32 {SCALARS} fp32",
        ATTN_TOY | {"BLOCK_Q": 64},
        4,
        2,
    ),
    (
        attention.attention_backward_q,
        f"{FP} {FP} {FP} {FP} {FP} {FP} {FP} {FP} *i32 {SCALARS} fp32",
        ATTN_8B | {"BLOCK_Q": 128},
        8,
        attention.backward_q_stages(4, SHARED_BYTES),
    ),
    (decode_attention.decode_split, DECODE_IN, DECODE_8B | {"WHOLE": False}, 4, 3),
    (decode_attention.decode_split, DECODE_IN, DECODE_8B | {"WHOLE": True}, 4, 3),
    (decode_attention.decode_split, DECODE_IN, DECODE_TOY | {"WHOLE": True}, 4, 3),
    (
        decode_attention.decode_join,
        f"{FP} {FP} {FP} {INT} {BF} {INT} i32",
        {"N": 32, "H": 128, "H_BLOCK": 128, "SPLIT": 256, "SPLITS_BLOCK": 16},
        2,
        3,
    ),
    (sampling.sample_kernel, SAMPLE_IN, SAMPLE | {"TOP_K": False, "TOP_P": True}, 8, 3),
    (sampling.sample_kernel, SAMPLE_IN, SAMPLE | {"TOP_K": False, "TOP_P": False}, 8, 3),
    (sampling.sample_kernel, SAMPLE_IN, SAMPLE | {"TOP_K": True, "TOP_P": True}, 8, 3),
    (
        sampling.sample_kernel,
        SAMPLE_IN,
        SAMPLE | {"TOP_K": False, "TOP_P": False, "GREEDY": True},
        8,
        3,
    ),
    (adamw.adamw_kernel, f"{BF} {BF} {BF} {BF} {FP} {INT} {FP} i32", {"BLOCK": 1024}, 4, 3),
]


def report(kernel, types, constants, num_warps, num_stages):
    """Compile one configuration as the launcher would, and return what the hardware would need.

    Pointers, strides and widths are multiples of 16.
    """
    runtime_names = [name for name in kernel.arg_names if name not in constants]
    runtime = dict(zip(runtime_names, types.split(), strict=True))
    signature = {name: runtime.get(name, "constexpr") for name in kernel.arg_names}
    wide = ("stride", "chunk_cols", "numel")
    aligned = [
        name for name, kind in runtime.items() if kind.startswith("*") or name.endswith(wide)
    ]
    attrs = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs),
        target=GPUTarget("cuda", CAPABILITY, 32),
        options={"num_warps": num_warps, "num_stages": num_stages},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    regs, stack, local = (
        int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL")
    )
    ptx = compiled.asm["ptx"]
    return {
        "kernel": f"{kernel.__name__} {constants}",
        # An fp32 kernel only has to fit: nobody trains in fp32 on a GPU.
        "fp32": all(kind in (FP, "*i32") for kind in types.split() if kind.startswith("*")),
        "registers": regs,
        "spilled_bytes": stack + local,
        "shared_bytes": compiled.metadata.shared,
        "has_dot": "tt.dot" in compiled.asm["ttir"],
        "tensor_cores": (re.search(r"wgmma|mma\.sync", ptx) or [""])[0],
        "float_atomics": bool(re.search(r"(atom|red)\.\S*\.(f32|f16|bf16)", ptx)),
        "fp64": bool(re.search(r"(mul|add|fma|div)\S*\.f64", ptx)),
        "wide_loads": bool(
            re.search(
                r"ld\.global\S*\.v4\.b32|cp\.async\.\S*\s.*, 0x10\b|cp\.async\.bulk\.tensor", ptx
            )
        ),
    }


if __name__ == "__main__":
    reports = []
    for config in CONFIGS:
        # In fp32 the kernels run in tests, on Hopper.
        fp32 = config[1].split()[:2] == [FP, FP] and config[0].__module__ == "kernels.attention"
        if CAPABILITY == 90 or not fp32:
            reports.append(report(*config))
    print(json.dumps(reports))

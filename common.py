"""Plumbing: flags, ranks, sharding, logs. Nothing here takes a tensor with a batch axis. fail and one_sentence, for scripts that
cannot go on, are guard.py's; what has to know of a checkpoint or of a model's size is checkpoint.py and plan.py."""

import argparse
import ctypes
import dataclasses
import datetime
import json
import os
import resource
import signal
import sys
import warnings

import torch
import torch.distributed as dist

from guard import fail, file_trouble, guard, one_sentence


# ---- Flags -----------------------------------------------------------------------------------------------------------
# Numbers are finite and not negative (unless their default is); these are more than 0 (unless their default is 0) ...
POSITIVE = set("""n num_steps schedule_steps block_rows samples_per_step prompts_per_step group_size max_seq_len max_prompt_tokens max_new_tokens
    micro_batch_tokens save_every reward_workers lr grad_clip temperature top_p rm_samples_per_step rm_epochs rm_lr rm_max_len test_seconds memory_mb
    chars_per_token max_files vocab_size hidden_size num_layers num_heads head_dim problems samples characters points rounds""".split())
# ... and these at most 1 (AdamW's betas less).
MOST = dict(beta1=0.9999, beta2=0.9999, top_p=1, think_share=1, readmit_hard=1, readmit_easy=1, max_infra=1, noisy_share=1, lexical_floor=1, final_lr=1)


def parse_config(Config):
    """Every dataclass field is a flag: --lr=1e-6 or --lr 1e-6. Types come from the annotations; unknown flags are errors."""
    parser = argparse.ArgumentParser(allow_abbrev=False, epilog="What a flag means stands beside it in class Config, at the top of the script.")
    parser.error = lambda message: fail(f"{message}.")
    sys.excepthook = file_trouble
    for f in dataclasses.fields(Config):
        alone = dict(nargs="?", const=True, type=boolean) if f.type is bool else dict(type=f.type)  # --flag is --flag=true
        parser.add_argument(f"--{f.name}", default=f.default, metavar=f.type.__name__, help=f"default {f.default!r}".replace("%", "%%"), **alone)
    cfg = Config(**vars(parser.parse_args()))
    for f in (f for f in dataclasses.fields(Config) if f.type in (int, float)):
        value, least, most = getattr(cfg, f.name), min(f.default, 0), MOST.get(f.name, 2**63 - 1)
        above = f.name in POSITIVE and f.default > 0
        if not least <= value <= most or above and value == 0:  # nan fails the comparison
            fail(f"--{f.name}={value}: expected a number {'above' if above else 'from'} {least}" + f" to {most}." * (most < 2) + "." * (most > 2))
    return cfg


def boolean(text):
    return bool(("false", "true").index(text.lower()))


# ---- Ranks -----------------------------------------------------------------------------------------------------------
def ranks():
    """(rank, world): torchrun's variables decide; without them it is one process."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def start(cfg):
    """(rank, world, device) of a stage's run, which from here on says why when it ends early."""
    guard(cfg.phase_timeout)
    return init_distributed(cfg.seed, 2 * cfg.phase_timeout)  # whoever waits in a collective outlasts the rank that it waits for


def init_distributed(seed, timeout_s=1800):
    """(rank, world, device). Seeds everything."""
    rank, world = ranks()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    libc = ctypes.CDLL(None)
    if "TORCHELASTIC_RUN_ID" in os.environ and hasattr(libc, "prctl"):
        libc.prctl(1, signal.SIGKILL)  # a rank dies with its launcher: it would train on and hold out_dir
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        # glibc gives big temporaries back to the system after every op, which faults each page in again: keeping them makes a training
        # step of the tiny model 1.5 to 2 times faster. What comes by mmap cannot be kept, hence none does.
        if hasattr(libc, "mallopt"):
            for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 1 << 26)):  # allocations by mmap: none; trim threshold, top pad
                libc.mallopt(option, value)
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // world)))
        spare_compiler()
    if world > 1 or device.type == "cuda":
        alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
        with one_sentence(f"rank {rank} of {world} at MASTER_PORT={os.environ.get('MASTER_PORT')}"):  # taken, or nobody answers
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(seconds=timeout_s), **alone)
    torch.manual_seed(seed)
    return rank, world, device


def spare_compiler():
    """PyTorch's optimizers import its compiler (146 MB, 1.2 s a process) only to keep it off their methods. Nothing is compiled here."""
    adamw = torch.optim.AdamW
    for method in (adamw.add_param_group, adamw.zero_grad, adamw.state_dict, adamw.load_state_dict):
        method.__wrapped__.__dict__["__dynamo_disable"] = method.__wrapped__
    adamw.step = torch.no_grad()(adamw.step.__wrapped__)


def print0(*args):
    if ranks()[0] == 0:
        print(*args, flush=True)


def all_reduce(values, op="sum"):
    """{name: number} reduced over ranks, in one collective; keys must be equal on every rank."""
    if not dist.is_initialized():
        return dict(values)
    t = torch.tensor([float(v) for v in values.values()], dtype=torch.float64)
    dist.all_reduce(t, dict(sum=dist.ReduceOp.SUM, max=dist.ReduceOp.MAX)[op])
    return dict(zip(values, t.tolist()))


def all_gather(value):
    """[value of rank 0, value of rank 1, ...] for any picklable value."""
    if not dist.is_initialized():
        return [value]
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


SMALLEST_SHARE = 1 << 20  # parameters of a layer that is gathered alone: below, the latency of a collective costs more than its bytes


def shard(model, device, how="full"):
    """FSDP2: fp32 master weights, bf16 compute on GPUs, fp32 gradient reduction; how: see the stages' --shard. Every layer is a collective
    of its own where that is worth it; a small model travels in one piece. What is whole on every CPU stays the plain module."""
    if how not in ("full", "hybrid", "offload", "replicate"):
        fail(f"--shard={how}: expected full, hybrid, offload or replicate.")
    if dist.is_initialized() and (how != "replicate" or device.type == "cuda"):
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

        dtype, inside = torch.bfloat16 if device.type == "cuda" else torch.float32, int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if how == "hybrid" else 1
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # about in-place use of layer outputs: there is none
        options = {"mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)}  # RoPE stays fp32
        if how in ("hybrid", "replicate"):
            options["mesh"] = dist.init_device_mesh(device.type, (dist.get_world_size() // inside, inside), mesh_dim_names=("replicate", "shard"))
        if how == "offload":
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type == "cuda")
        for layer in model.model.layers:
            if sum(p.numel() for p in layer.parameters()) >= SMALLEST_SHARE:
                fully_shard(layer, **options)
        fully_shard(model, **options)
    return model


def average_gradients(model):
    """Over the ranks, in one collective, of parameters that are whole on each; sharded ones were averaged in backward."""
    whole = [p for p in model.parameters() if not hasattr(p, "full_tensor")] if ranks()[1] > 1 else []
    if whole:
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in whole])
        dist.all_reduce(flat)
        for p, part in zip(whole, flat.div_(ranks()[1]).split([p.numel() for p in whole]), strict=True):
            p.grad = part.view_as(p)


def finish():
    """End of every script: leave without interpreter teardown, where gloo's threads sometimes abort the process."""
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


# ---- Log -------------------------------------------------------------------------------------------------------------
def console_line(step, num_steps, m):
    """step 120/500 | reward 0.431 | len 2831 | ...: one line for a step of RL, in a fixed order."""
    rate = m["num_tokens"] / max(m["time/gen"] + m["time/train"], 1e-9)
    line = (f"step {step}/{num_steps} | reward {m['reward']:.3f} | len {m['len']:.0f} | trunc {m['trunc']:.0%} | flat {m['flat']:.0%} | "
            f"ent {m['entropy']:.2f} | gap {m['gap']:.1e} | grad {m['grad_norm']:.2f} | lr {m['lr']:.1e} | gen {m['time/gen']:.1f}s "
            f"train {m['time/train']:.1f}s | {rate / 1000:.1f}k tok/s | {peak_memory() / 2**30:.1f} GB")  # fmt: skip
    return line + (f" | eval {m['eval']:.3f}" if "eval" in m else "")


STATUSES = ("ok", "wrong", "no_answer", "language", "timeout", "crash", "infra")  # of a rollout's reward, in every stage; no_answer: also an edit that does not apply


def summarize(rollouts, shares):
    """Means over the rollouts of all ranks: numerators and denominators are reduced apart."""
    n, groups = len(rollouts), {}
    for r in rollouts:
        groups.setdefault(r.group, set()).add(r.reward)
    sums = {"n": n, "groups": len(groups), "flat": sum(len(rewards) == 1 for rewards in groups.values())}
    sums["reward"] = sum(r.reward for r in rollouts if r.status != "infra")
    sums["len"] = sum(len(r.completion_ids) for r in rollouts)
    sums["trunc"] = sum(r.finish_reason == "length" for r in rollouts)
    sums["unclosed"] = sum(r.row["think"] and "</think>" not in r.text for r in rollouts)
    sums["verifiers_s"] = sum(r.verify_s for r in rollouts)
    sums |= {f"status/{s}": sum(r.status == s for r in rollouts) for s in STATUSES}
    sums |= {f"reward/{name}": share * n for name, share in shares.items()}
    sums = all_reduce(sums)
    n, groups, verifiers_s = sums.pop("n"), sums.pop("groups"), sums.pop("verifiers_s")
    means = {k: v / (groups if k == "flat" else max(n - sums["status/infra"], 1) if k == "reward" else n) for k, v in sums.items()}
    return means | {"time/verifiers": verifiers_s}  # of all workers; most of it while others still decode


def peak_memory():
    """Bytes: the most this process has held, on its GPU if there is one."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Logger:
    """One console line and one metrics.jsonl line a step. After a resume the file is cut back to the step resumed from."""

    def __init__(self, out_dir, step):
        self.path = os.path.join(out_dir, "metrics.jsonl")
        if ranks()[0] == 0:
            old = [line for line in open(self.path) if line.endswith("\n")] if os.path.exists(self.path) else []
            with one_sentence(f"{self.path} is not the log of a run"):
                kept = [line for line in old if json.loads(line)["step"] <= step]
            with open(self.path + ".tmp", "w") as f:
                f.writelines(kept)
            os.replace(self.path + ".tmp", self.path)

    def log(self, step, metrics, line=""):
        """Host memory is what this process holds now, its verifiers not counted."""
        if os.path.exists("/proc/self/statm"):
            metrics["memory/rss_gb"] = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**30
        if ranks()[0] == 0:
            with open(self.path, "a") as f:
                f.write(json.dumps({"step": step, **metrics}) + "\n")
        line and print0(line)

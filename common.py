"""Plumbing: flags, ranks, memory, checkpoints, logs. Nothing here takes a tensor with a batch axis."""

import argparse
import contextlib
import ctypes
import dataclasses
import datetime
import fcntl
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings

import torch
import torch.distributed as dist

from guard import fail, file_trouble, first_line, guard, one_sentence
from model import Qwen3, load_tokenizer, memory_plan, read_config, save_tokenizer, time_plan


# ---- Flags -----------------------------------------------------------------------------------------------------------
# Numbers are finite and not negative (unless their default is); these are more than 0 (unless their default is 0) ...
POSITIVE = set("""n num_steps schedule_steps block_rows samples_per_step prompts_per_step group_size max_seq_len max_prompt_tokens max_new_tokens
    micro_batch_tokens save_every reward_workers lr grad_clip temperature top_p rm_samples_per_step rm_epochs rm_lr rm_max_len test_seconds memory_mb
    chars_per_token max_files vocab_size hidden_size num_layers num_heads head_dim problems samples characters points rounds""".split())
# ... and these at most 1 (AdamW's betas less).
MOST = dict(beta1=0.9999, beta2=0.9999, top_p=1, think_share=1, readmit_hard=1, readmit_easy=1, max_infra=1, noisy_share=1, lexical_floor=1, final_lr=1)


def parse_config(Config):
    """Every dataclass field is a flag: --lr=1e-6 or --lr 1e-6. Types come from the annotations; unknown flags are errors."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.error = lambda message: fail(f"{message}.")
    sys.excepthook = file_trouble
    for f in dataclasses.fields(Config):
        alone = dict(nargs="?", const=True, type=boolean) if f.type is bool else dict(type=f.type)  # --flag is --flag=true
        parser.add_argument(f"--{f.name}", default=f.default, metavar=f.type.__name__, **alone)
    cfg = Config(**vars(parser.parse_args()))
    for f in (f for f in dataclasses.fields(Config) if f.type in (int, float)):
        value, least, most = getattr(cfg, f.name), min(f.default, 0), MOST.get(f.name, 2**63 - 1)
        above = f.name in POSITIVE and f.default > 0
        if not least <= value <= most or above and value == 0:  # nan fails the comparison
            fail(f"--{f.name}={value}: expected a number {'above' if above else 'from'} {least}" + f" to {most}." * (most < 2) + "." * (most > 2))
    return cfg


def boolean(text):
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


# ---- Ranks -----------------------------------------------------------------------------------------------------------
def start(cfg):
    """(rank, world, device) of a run that holds out_dir and says why when it ends early."""
    lock(cfg.out_dir)
    guard(cfg.phase_timeout)
    return init_distributed(cfg.seed, 2 * cfg.phase_timeout)  # whoever waits in a collective outlasts the rank that it waits for


def init_distributed(seed, timeout_s=1800):
    """(rank, world, device). torchrun's variables decide; without them it is one process. Seeds everything."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    libc = ctypes.CDLL(None)
    if "TORCHELASTIC_RUN_ID" in os.environ and hasattr(libc, "prctl"):
        libc.prctl(1, signal.SIGKILL)  # a rank dies with its launcher: it would train on and hold out_dir
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        # glibc gives big temporaries back to the system after every op, which faults each page in again: keeping them makes
        # a training step of the tiny model 1.5 to 2 times faster.
        if hasattr(libc, "mallopt"):
            for option, value in ((-3, 1 << 25), (-1, 1 << 30), (-2, 1 << 26)):  # mmap threshold, trim threshold, top pad
                libc.mallopt(option, value)
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // world)))
    if world > 1 or device.type == "cuda":
        timeout = datetime.timedelta(seconds=timeout_s)
        alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
        with one_sentence(f"rank {rank} of {world} at MASTER_PORT={os.environ.get('MASTER_PORT')}"):  # taken, or nobody answers
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timeout, **alone)
    torch.manual_seed(seed)
    return rank, world, device


def print0(*args):
    if int(os.environ.get("RANK", 0)) == 0:
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
    of its own where that is worth it; a small model travels in one piece. A single process keeps the plain module."""
    if how not in ("full", "hybrid", "offload"):
        fail(f"--shard={how}: expected full, hybrid or offload.")
    if dist.is_initialized():
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

        dtype, local = torch.bfloat16 if device.type == "cuda" else torch.float32, int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # about in-place use of layer outputs: there is none
        options = {"mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)}  # RoPE stays fp32
        if how == "hybrid":
            options["mesh"] = dist.init_device_mesh(device.type, (dist.get_world_size() // local, local), mesh_dim_names=("replicate", "shard"))
        if how == "offload":
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type == "cuda")
        for layer in model.model.layers:
            if sum(p.numel() for p in layer.parameters()) >= SMALLEST_SHARE:
                fully_shard(layer, **options)
        fully_shard(model, **options)
    return model


def finish():
    """End of every script: leave without interpreter teardown, where gloo's threads sometimes abort the process."""
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def free_memory(device, world):
    """Bytes that a rank may still take: of its GPU, or its share of what the machine or its container has left."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    with open("/proc/meminfo") as f:
        free = next(int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable"))
    with contextlib.suppress(OSError, ValueError):
        free = min(free, int(open("/sys/fs/cgroup/memory.max").read()) - int(open("/sys/fs/cgroup/memory.current").read()))
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", world))


def longest_sequence(cfg):
    return cfg.max_seq_len if hasattr(cfg, "max_seq_len") else cfg.max_prompt_tokens + cfg.max_new_tokens


def check_memory(folder, cfg, world, device):
    """Prints the plan of memory and time of a run that starts from `folder`, in two or three lines, and ends a run that cannot fit."""
    if not os.path.exists(os.path.join(folder, "config.json")) or not os.path.exists("/proc/meminfo"):
        return  # loading says what is wrong with the folder
    nll, longest = hasattr(cfg, "max_seq_len"), longest_sequence(cfg)
    tokens = max(cfg.micro_batch_tokens, longest)
    plan = memory_plan(read_config(folder), world, tokens, longest, device.type == "cuda", nll, getattr(cfg, "engine", ""), getattr(cfg, "kl_coef", 0) > 0)
    free, GB = free_memory(device, world), 1e9
    for moment in list(plan)[1:]:
        parts = ", ".join(f"{part} {n / GB:.2g}" for part, n in plan[moment].items())
        print0(f"{moment}: {sum(plan[moment].values()) / GB:.3g} of {free / GB:.3g} GB a rank ({parts})")
    rows, new_tokens = (cfg.samples_per_step, 0) if nll else (cfg.prompts_per_step * cfg.group_size, cfg.max_new_tokens)
    rates = (400e12, 2e12) if device.type == "cuda" else (2e10, 5e9)  # of an H100 and of a CPU core, as well-kept code reaches them
    gen, update = time_plan(read_config(folder), world, rows * longest, longest, new_tokens, rows, *rates)
    parts = f"{update:.3g} s" if nll else f"{gen:.3g} s of rollouts and {update:.3g} s of update"
    print0(f"time: a step takes at most about {parts}, if every sequence has {longest} tokens")
    for moment, parts in plan.items():
        if sum(parts.values()) > free:
            most = max(parts, key=parts.get)
            fail(f"{folder} on {world} ranks: {moment} needs about {sum(parts.values()) / GB:.1f} GB a rank and {free / GB:.1f} GB are free; most of it is "
                 f"{most}, {parts[most] / GB:.1f} GB: take more ranks, or fewer --micro_batch_tokens (now {tokens} at a time).")  # fmt: skip


def load_policy(cfg, world, device):
    """(tokenizer, model sharded over the ranks, checkpoint that the run resumes from or ""). Says first what the run will take."""
    resume = latest_checkpoint(cfg.out_dir)
    folder = resume or cfg.init_from
    with one_sentence(f"--init_from={folder}"):
        check_memory(folder, cfg, world, device)
        tokenizer, model = load_tokenizer(folder), Qwen3.from_pretrained(folder, device=device, rope_factor=cfg.rope_factor)
        if tokenizer.get_vocab_size() > model.config.vocab_size:
            raise ValueError(f"the tokenizer has {tokenizer.get_vocab_size()} tokens, the model only {model.config.vocab_size}")
    if longest_sequence(cfg) > model.max_positions():
        flags = "--max_seq_len" if hasattr(cfg, "max_seq_len") else "--max_prompt_tokens + --max_new_tokens"
        fail(f"{flags} is {longest_sequence(cfg)}, over the {model.max_positions()} positions of {folder}: pass --rope_factor=2.")
    model.gradient_checkpointing = device.type == "cuda"
    return tokenizer, shard(model, device, cfg.shard), resume


# ---- Checkpoints -----------------------------------------------------------------------------------------------------
def lock(out_dir):
    """Create out_dir and hold it: a second run on the same directory refuses."""
    try:
        os.makedirs(out_dir, exist_ok=True)
        if int(os.environ.get("RANK", 0)) == 0:
            lock.file = open(os.path.join(out_dir, ".lock"), "w")
            os.register_at_fork(after_in_child=lock.file.close)  # a verifier that outlives a killed run does not hold its folder
            fcntl.flock(lock.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"{out_dir}: another run is writing here.")
    except OSError as e:
        fail(f"{out_dir}: no folder to write into ({e.strerror}).")
    if int(os.environ.get("RANK", 0)) == 0:
        for name in os.listdir(out_dir):
            if name.startswith("step_") and name.endswith(".tmp"):
                shutil.rmtree(os.path.join(out_dir, name))  # a save that was cut off


def checksum(path):
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as f:
        while block := f.read(1 << 22):
            digest.update(block)
        os.fsync(f.fileno())
    return [os.path.getsize(path), digest.hexdigest()]


def save_checkpoint(out_dir, step, model, optimizer, cfg, state, keep=2):
    """out_dir/step_000200: a Hugging Face folder plus each rank's optimizer and run.json (flags, state, versions, checksums).
    Written under a temporary name and renamed, so that a folder with this name is always whole."""
    rank, final = int(os.environ.get("RANK", 0)), os.path.join(out_dir, f"step_{step:06d}")
    folder = final + ".tmp"
    if hasattr(model, "reshard"):
        model.reshard()  # a forward without backward leaves the root gathered, in compute precision
    whole = {}
    for name, p in model.named_parameters():
        p = p.full_tensor() if hasattr(p, "full_tensor") else p.detach()
        if rank == 0:
            whole[name] = p.cpu()
    try:
        os.makedirs(folder, exist_ok=True)
        torch.save(optimizer.state_dict(), os.path.join(folder, f"optim_rank{rank}.pt"))
        all_gather(None)  # every rank has written
        if rank == 0:
            model.save_pretrained(folder, whole)
            save_tokenizer(cfg.init_from, folder)  # not the checkpoint resumed from: that one is pruned some day
            run = {"step": step, "config": dataclasses.asdict(cfg), "command": sys.argv, "git": git_hash(), "torch": torch.__version__,
                   "world": int(os.environ.get("WORLD_SIZE", 1)), "state": state}  # fmt: skip
            run["files"] = {name: checksum(os.path.join(folder, name)) for name in sorted(os.listdir(folder)) if name != "run.json"}
            with open(os.path.join(folder, "run.json"), "w") as f:
                json.dump(run, f)
                f.flush()
                os.fsync(f.fileno())
            sync_folder(folder)
            shutil.rmtree(final, ignore_errors=True)
            os.rename(folder, final)
            sync_folder(out_dir)
    except Exception as e:  # torch and safetensors have their own words for a full disk
        free = shutil.disk_usage(out_dir).free / 1e9
        shutil.rmtree(folder, ignore_errors=True)
        fail(f"{final} cannot be written ({first_line(e)}; {free:.3g} GB were left there).", note="The checkpoint before it is whole.")
    if rank == 0:
        if os.path.lexists(link := os.path.join(out_dir, "final")):
            os.remove(link)  # the stage went on: it is not done, and pruning may take what the link names
        for old in set(step_folders(out_dir)[:-keep]) - {best_checkpoint(out_dir)}:
            shutil.rmtree(os.path.join(out_dir, old))
    all_gather(None)
    return final


def sync_folder(path):
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def step_folders(out_dir):
    return sorted(f for f in os.listdir(out_dir) if f.startswith("step_") and not f.endswith(".tmp")) if os.path.isdir(out_dir) else []


def best_checkpoint(out_dir):
    """Name of the checkpoint with the best held-out score in metrics.jsonl: KEEP_BEST=1 may want it, so it is not pruned."""
    logged = open(path) if os.path.exists(path := os.path.join(out_dir, "metrics.jsonl")) else ()
    scores = {f"step_{m['step']:06d}": m["eval"] for m in map(json.loads, logged) if "eval" in m}
    return max(scores.keys() & set(step_folders(out_dir)), key=lambda name: (scores[name], name), default="")


def latest_checkpoint(out_dir):
    """The newest whole checkpoint of out_dir, or ""; a damaged one is skipped with a line saying so. Rank 0 looks for all."""
    found = ""
    for name in reversed(step_folders(out_dir)) if int(os.environ.get("RANK", 0)) == 0 else ():
        folder = os.path.join(out_dir, name)
        try:
            files = json.load(open(os.path.join(folder, "run.json")))["files"]
            damaged = [f for f, expected in files.items() if checksum(os.path.join(folder, f)) != expected]
        except (OSError, ValueError, KeyError) as e:
            damaged = [str(e)]
        if not damaged:
            found = folder
            break
        print0(f"{folder} is damaged ({damaged[0]}), trying the one before")
    return all_gather(found)[0]


def load_checkpoint(folder, optimizer, cfg):
    """Restore the optimizer of this rank and return (step, state); the weights are loaded by Qwen3.from_pretrained(folder)."""
    run = json.load(open(os.path.join(folder, "run.json")))
    if run["world"] != int(os.environ.get("WORLD_SIZE", 1)):
        fail(f"{folder} was written by {run['world']} ranks and can only be resumed by as many.")
    rank = int(os.environ.get("RANK", 0))
    optimizer.load_state_dict(torch.load(os.path.join(folder, f"optim_rank{rank}.pt"), weights_only=True))
    now = dataclasses.asdict(cfg)
    for name in [k for k, v in run["config"].items() if now.get(k, v) != v]:
        print0(f"{folder}: --{name} was {run['config'][name]}, now {now[name]}")
    for group in optimizer.param_groups:  # flags win over the file
        group |= {"betas": (cfg.beta1, cfg.beta2), "weight_decay": cfg.weight_decay}
    return run["step"], run["state"]


def mark_final(out_dir, folder):
    """out_dir/final -> the last checkpoint: what the next stage starts from, and the sign that this stage is done."""
    if int(os.environ.get("RANK", 0)) == 0:
        link = os.path.join(out_dir, "final.tmp")
        if os.path.lexists(link):
            os.remove(link)
        os.symlink(os.path.basename(folder), link)
        os.replace(link, os.path.join(out_dir, "final"))


def git_hash():
    here = os.path.dirname(os.path.abspath(__file__))
    return subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip() or "unknown"


# ---- Log -------------------------------------------------------------------------------------------------------------
def console_line(step, num_steps, m):
    """step 120/500 | reward 0.431 | len 2831 | ...: one line for a step of RL, in a fixed order."""
    rate = m["num_tokens"] / max(m["time/gen"] + m["time/train"], 1e-9)
    line = (f"step {step}/{num_steps} | reward {m['reward']:.3f} | len {m['len']:.0f} | trunc {m['trunc']:.0%} | flat {m['flat']:.0%} | "
            f"ent {m['entropy']:.2f} | gap {m['gap']:.1e} | grad {m['grad_norm']:.2f} | lr {m['lr']:.1e} | gen {m['time/gen']:.1f}s "
            f"train {m['time/train']:.1f}s | {rate / 1000:.1f}k tok/s | {peak_memory() / 2**30:.1f} GB")  # fmt: skip
    return line + (f" | eval {m['eval']:.3f}" if "eval" in m else "")


STATUSES = ("ok", "wrong", "no_answer", "language", "timeout", "crash", "infra")  # of a rollout's reward, in every stage


def summarize(rollouts, shares):
    """Means over the rollouts of all ranks: numerators and denominators are reduced apart."""
    n = len(rollouts)
    groups = {}
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


def load_history(folder, data):
    """{"history", "epoch"} of the run that wrote this checkpoint if it was on the same rows (checksum `data`), else {}: the epoch
    filter of paper 4.5.2 goes on over the length stages of Math RL."""
    path = os.path.join(folder, "run.json")
    with one_sentence(f"--init_from={folder}: run.json cannot be read"):
        state = json.load(open(path))["state"] if os.path.exists(path) else {}
    if state.get("data") != data or not state.get("history"):
        return {}
    print0(f"{folder}: same prompts, so the epoch filter goes on with what it knows of {len(state['history'])} of them")
    return {"history": state["history"], "epoch": state["epoch"]}


class Logger:
    """One console line and one metrics.jsonl line a step. After a resume the file is cut back to the step resumed from."""

    def __init__(self, out_dir, step):
        self.path, self.start = os.path.join(out_dir, "metrics.jsonl"), time.time()
        if int(os.environ.get("RANK", 0)) == 0:
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
        if int(os.environ.get("RANK", 0)) == 0:
            with open(self.path, "a") as f:
                f.write(json.dumps({"step": step, **metrics}) + "\n")
        if line:
            print0(line)

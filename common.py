"""Plumbing: flags, data files, ranks, checkpoints, logs. Nothing here takes a tensor with a batch axis."""

import argparse
import ctypes
import dataclasses
import datetime
import fcntl
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import time
import warnings

import torch
import torch.distributed as dist

from model import save_tokenizer


def fail(message, note="Nothing was trained."):
    """One sentence and exit code 2, for everything that is the user's to mend."""
    print(f"{os.path.basename(sys.argv[0])}: {message} {note}", file=sys.stderr, flush=True)
    os._exit(2) if dist.is_initialized() else sys.exit(2)


# ---- Flags -----------------------------------------------------------------------------------------------------------
def parse_config(Config):
    """Every dataclass field is a flag: --lr=1e-6 or --lr 1e-6. Types come from the annotations; unknown flags are errors."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.error = lambda message: fail(f"{message}.")
    for f in dataclasses.fields(Config):
        kind = boolean if f.type is bool else f.type
        parser.add_argument(f"--{f.name}", type=kind, default=f.default, metavar=f.type.__name__)
    return Config(**vars(parser.parse_args()))


def boolean(text):
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


# ---- Data files ------------------------------------------------------------------------------------------------------
class BadRow(ValueError):
    """Raised by a stage's normalize(row, where): the row is dropped and counted under this reason."""


def read_rows(path, limit=0):
    """[(where, row)] of a .json/.jsonl/.parquet file, a folder of them, or a hub id ("owner/name" or "owner/name:config")."""
    if os.path.isdir(path):
        files = sorted(f for f in os.listdir(path) if f.endswith((".jsonl", ".json", ".parquet")))
        rows = [item for f in files for item in read_rows(os.path.join(path, f), limit)]
    elif path.endswith((".jsonl", ".json")) and os.path.exists(path):
        rows = []
        with open(path, encoding="utf-8") as f:
            lines = f if path.endswith(".jsonl") else [f.read()]
            for i, line in enumerate(lines, 1):
                try:
                    parsed = json.loads(line) if line.strip() else []
                except json.JSONDecodeError as e:
                    fail(f"data {path} row {i}: not valid JSON ({e.msg} at column {e.colno}).")
                if path.endswith(".json"):  # one list of rows
                    rows += [(f"{path} row {n}", row) for n, row in enumerate(parsed if isinstance(parsed, list) else [parsed], 1)]
                elif line.strip():
                    rows.append((f"{path} row {i}", parsed))
                if limit and len(rows) >= limit:
                    break
    elif os.path.exists(path) or (path.count("/") == 1 and not path.endswith((".jsonl", ".json", ".parquet"))):
        import datasets  # slow to import, so only where it is used

        name, _, config = path.partition(":")
        try:
            source = ("parquet", None) if os.path.exists(path) else (name, config or None)
            table = datasets.load_dataset(*source, data_files=path if os.path.exists(path) else None, split="train")
        except Exception as e:  # whatever is wrong with a file or a hub, in the library's words
            fail(f"data {path}: {type(e).__name__}: {str(e).splitlines()[0]}.")
        rows = [(f"{path} row {i + 1}", row) for i, row in enumerate(table.select(range(min(limit or len(table), len(table)))))]
    else:
        fail(f"data {path}: no such file or folder, and not a hub id of the form owner/name.")
    return rows[:limit] if limit else rows


def field(row, where, name, kind=str):
    """row[name], or one sentence naming file, row, field and what was expected."""
    if name not in row:
        fail(f'data {where}: no "{name}" field (has: {", ".join(map(str, row))}).')
    if not isinstance(row[name], kind):
        kinds = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        fail(f'data {where}: field "{name}" is {type(row[name]).__name__}, expected {kinds}.')
    return row[name]


def load_table(path, normalize, limit=0):
    """Normal rows of a data set: normalize(row, where) returns one or raises BadRow(reason). Prints what was dropped and why."""
    rows, dropped = [], {}
    for where, raw in read_rows(path, limit):
        if not isinstance(raw, dict):
            fail(f"data {where}: a row is {type(raw).__name__}, expected an object.")
        try:
            rows.append(normalize(raw, where))
        except BadRow as reason:
            dropped.setdefault(str(reason), []).append(where)
        except Exception as e:  # a row of a shape nobody thought of
            fail(f"data {where}: {type(e).__name__}: {e}.")
    for reason, wheres in sorted(dropped.items(), key=lambda item: -len(item[1])):
        print0(f"data {path}: dropped {len(wheres)} of {len(rows) + sum(map(len, dropped.values()))} rows, {reason} (first: {wheres[0]})")
    if not rows:
        fail(f"data {path}: no usable row ({'; '.join(f'{len(w)} x {r}' for r, w in dropped.items()) or 'the file is empty'}).")
    return rows


# ---- Ranks -----------------------------------------------------------------------------------------------------------
def init_distributed(seed):
    """(rank, world, device). torchrun's variables decide; without them it is one process. Seeds everything."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        # glibc gives big temporaries back to the system after every op, which faults each page in again: keeping them makes
        # a training step of the tiny model 1.5 to 2 times faster.
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            for option, value in ((-3, 1 << 25), (-1, 1 << 30), (-2, 1 << 26)):  # mmap threshold, trim threshold, top pad
                libc.mallopt(option, value)
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // world)))
    if world > 1 or device.type == "cuda":
        timeout = datetime.timedelta(minutes=30)
        alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout, **alone)
    torch.manual_seed(seed)
    return rank, world, device


def print0(*args):
    if int(os.environ.get("RANK", 0)) == 0:
        print(*args, flush=True)


def all_reduce(values, op="sum"):
    """{name: number} reduced over ranks, in one collective; keys must be equal on every rank."""
    if not dist.is_initialized():
        return dict(values)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    t = torch.tensor([float(v) for v in values.values()], dtype=torch.float64, device=device)
    dist.all_reduce(t, dict(sum=dist.ReduceOp.SUM, max=dist.ReduceOp.MAX)[op])
    return dict(zip(values, t.tolist()))


def all_gather(value):
    """[value of rank 0, value of rank 1, ...] for any picklable value."""
    if not dist.is_initialized():
        return [value]
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def shard(model, device):
    """FSDP2 over all ranks, every layer and then the root: fp32 master weights, bf16 compute on GPUs, fp32 gradient
    reduction. A single process keeps the plain module."""
    if dist.is_initialized():
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # about in-place use of layer outputs: there is none
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)  # RoPE stays fp32
        for layer in model.model.layers:
            fully_shard(layer, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
    return model


def finish():
    """End of every script: leave without interpreter teardown, where gloo's threads sometimes abort the process."""
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


# ---- Checkpoints -----------------------------------------------------------------------------------------------------
def lock(out_dir):
    """Create out_dir and hold it: a second run on the same directory refuses."""
    os.makedirs(out_dir, exist_ok=True)
    if int(os.environ.get("RANK", 0)) == 0:
        lock.file = open(os.path.join(out_dir, ".lock"), "w")
        try:
            fcntl.flock(lock.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            fail(f"{out_dir}: another run is writing here.")
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
        if os.path.lexists(link := os.path.join(out_dir, "final")):
            os.remove(link)  # the stage went on: it is not done, and pruning may take what the link names
        for old in step_folders(out_dir)[:-keep]:
            shutil.rmtree(os.path.join(out_dir, old))
    all_gather(None)
    return final


def sync_folder(path):
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def step_folders(out_dir):
    return sorted(f for f in os.listdir(out_dir) if f.startswith("step_") and not f.endswith(".tmp")) if os.path.isdir(out_dir) else []


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


def peak_memory():
    """Bytes: the most this process has held, on its GPU if there is one."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def timed(function, *args):
    """(function(*args), its seconds): what a verifier worker runs."""
    clock = time.perf_counter()
    return function(*args), time.perf_counter() - clock


class Logger:
    """One console line and one metrics.jsonl line a step. After a resume the file is cut back to the step resumed from."""

    def __init__(self, out_dir, step):
        self.path, self.start = os.path.join(out_dir, "metrics.jsonl"), time.time()
        if int(os.environ.get("RANK", 0)) == 0:
            old = [line for line in open(self.path) if line.endswith("\n")] if os.path.exists(self.path) else []
            with open(self.path + ".tmp", "w") as f:
                f.writelines(line for line in old if json.loads(line)["step"] <= step)
            os.replace(self.path + ".tmp", self.path)

    def log(self, step, metrics, line=""):
        if int(os.environ.get("RANK", 0)) == 0:
            with open(self.path, "a") as f:
                f.write(json.dumps({"step": step, **metrics}) + "\n")
        if line:
            print0(line)

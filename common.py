"""Plumbing: flags, data files, ranks, checkpoints, logs. Nothing here takes a tensor with a batch axis.

As a script it takes out of a training set what a held-out set asks too (any 9 words in a row, as in the paper's curation):
    python common.py --data=nvidia/Nemotron-Cascade-RL-Math --eval_data=HuggingFaceH4/MATH-500,math-ai/aime25 --out=out/math_clean.jsonl
"""

import argparse
import collections
import contextlib
import ctypes
import dataclasses
import datetime
import fcntl
import hashlib
import itertools
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
import warnings

import torch
import torch.distributed as dist

from model import memory_plan, read_config, save_tokenizer


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


FORMATS = (".jsonl", ".json", ".parquet", ".jsonl.gz")


def data_files(path):
    """Files or URLs of a data set: a file, a folder of them, or a hub id ("owner/name" or "owner/name:config"); commas join several."""
    if "," in path:
        return [file for part in path.split(",") for file in data_files(part)]
    if os.path.isdir(path):
        files = sorted(os.path.join(top, f) for top, _, names in os.walk(path) for f in names if f.endswith(FORMATS))
    elif os.path.exists(path) or "://" in path:
        files = [path] if path.endswith(FORMATS) else fail(f"data {path}: expected a file that ends in {', '.join(FORMATS)}.")
    elif path.count("/") == 1 and not path.endswith(FORMATS):
        import datasets  # slow to import, so only where it is used

        name, _, config = path.partition(":")
        try:
            names = datasets.get_dataset_config_names(name)
            names = [config] if config else ["default"] if "default" in names else names
            splits = [datasets.load_dataset_builder(name, n).config.data_files or {} for n in names]
        except Exception as e:  # whatever is wrong with a name or a hub, in the library's words
            fail(f"data {path}: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else 'no message'}.")
        held_out = lambda split: "train" in splits[0] and split != "train" or split.startswith(("val", "test", "dev"))
        files = [str(f) for files in splits for split in files if not held_out(split) for f in files[split] if str(f).endswith(FORMATS)]
    else:
        fail(f"data {path}: no such file or folder, and not a hub id of the form owner/name.")
    return files or fail(f"data {path}: no file that ends in {', '.join(FORMATS)}.")


def read_file(file, cursor=(0, 0, 0.0)):
    """(where, row, cursor behind it) from a cursor on, holding only what is being read: nothing is downloaded or unpacked ahead.
    A cursor is [rows, bytes, share of the file that is read]."""
    import fsspec

    (num_rows, offset, _), system = cursor, fsspec.core.url_to_fs(file)
    size = max(system[0].size(system[1]) or 1, 1)
    try:
        with system[0].open(system[1], "rb", compression="gzip" if file.endswith(".gz") else None) as f:
            if file.endswith(".parquet"):
                import pyarrow.parquet

                table = pyarrow.parquet.ParquetFile(f)
                total, first = table.metadata.num_rows, 0
                for group in range(table.num_row_groups):
                    here = range(first, first := first + table.metadata.row_group(group).num_rows)
                    if num_rows in here:
                        batches = table.iter_batches(64, row_groups=[group])
                        for row in itertools.islice((r for batch in batches for r in batch.to_pylist()), num_rows - here.start, None):
                            num_rows += 1
                            yield f"{file} row {num_rows}", row, [num_rows, 0, num_rows / total]
                return
            f.seek(offset)
            if file.endswith(".json"):  # a list of rows or one row; else lines, whatever the name says
                with contextlib.suppress(ValueError):
                    parsed = json.load(f)
                    rows = parsed if isinstance(parsed, list) else [parsed]
                    yield from ((f"{file} row {n}", row, [n, 0, n / len(rows)]) for n, row in enumerate(rows, 1) if n > num_rows)
                    return
                f.seek(offset)
            for line in iter(f.readline, b""):
                num_rows, offset = num_rows + 1, offset + len(line)
                if line.strip():  # packed bytes are fewer than read ones, so that share only says how far the file is not done
                    share = 1 - size / (size + offset) if file.endswith(".gz") else offset / size
                    yield f"{file} row {num_rows}", json.loads(line), [num_rows, offset, share]
    except (ValueError, RecursionError, OSError) as e:  # pyarrow's errors are ValueErrors or OSErrors
        text = f"not valid JSON ({e.msg} at column {e.colno})" if isinstance(e, json.JSONDecodeError) else f"{type(e).__name__}: {e}"
        fail(f"data {file} row {num_rows}: {text.splitlines()[0]}.")


def read_rows(path, limit=0):
    """[(where, row)] of a data set, file after file."""
    rows = ((where, row) for file in data_files(path) for where, row, _ in read_file(file))
    return list(itertools.islice(rows, limit or None))


def stream_rows(cursors, limit=0):
    """(where, row), always from the file of which the smallest share is read, so that every stretch has the mix of the whole.
    cursors {file: cursor} move along: reading on from a copy of them gives the same rows as not having stopped."""
    readers = {file: read_file(file, cursor) for file, cursor in cursors.items() if cursor[2] < 1}
    ahead = {file: next(reader, None) for file, reader in readers.items()}  # one row, to know when a file is done
    cursors |= {file: [*cursors[file][:2], 1.0] for file, row in ahead.items() if row is None}
    while (open_files := [f for f in readers if cursors[f][2] < 1]) and not 0 < limit <= sum(c[0] for c in cursors.values()):
        file = min(open_files, key=lambda f: cursors[f][2])
        where, row, cursor = ahead[file]
        ahead[file] = next(readers[file], None)
        cursors[file] = cursor if ahead[file] else [*cursor[:2], 1.0]
        yield where, row


def field(row, where, name, kind=str):
    """row[name], or one sentence naming file, row, field and what was expected."""
    if name not in row:
        fail(f'data {where}: no "{name}" field (has: {", ".join(map(str, row))}).')
    if not isinstance(row[name], kind):
        kinds = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        fail(f'data {where}: field "{name}" is {type(row[name]).__name__}, expected {kinds}.')
    return row[name]


def chat(turns, name="prompt"):
    """Chat messages [{"role", "content", ...}]: a string is a user's turn, a list of parts is joined, None is empty text."""
    turns = [{"role": "user", "content": turns}] if isinstance(turns, str) else turns
    if not isinstance(turns, list) or not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in turns):
        raise BadRow(f'field "{name}" is no list of chat messages with a role each')
    text = lambda parts: "\n".join(p["text"] for p in parts if isinstance(p, dict) and isinstance(p.get("text"), str))
    turns = [m | {"content": text(m["content"]) if isinstance(m.get("content"), list) else m.get("content") or ""} for m in turns]
    if not all(isinstance(m["content"], str) for m in turns):
        raise BadRow(f'field "{name}" has a message whose content is not text')
    return turns


def normal_rows(items, normalize, path):
    """normalize(row, where) of each (where, row), which returns a normal row or raises BadRow(reason). Prints what was dropped and why."""
    total, dropped = 0, {}
    for where, raw in items:
        if not isinstance(raw, dict):
            fail(f"data {where}: a row is {type(raw).__name__}, expected an object.")
        total += 1
        try:
            yield normalize(raw, where)
        except BadRow as reason:
            dropped.setdefault(str(reason), []).append(where)
        except Exception as e:  # a row of a shape nobody thought of
            fail(f"data {where}: {type(e).__name__}: {e}.")
    for reason, wheres in sorted(dropped.items(), key=lambda item: -len(item[1])):
        print0(f"data {path}: dropped {len(wheres)} of {total} rows, {reason} (first: {wheres[0]})")
    if total == sum(map(len, dropped.values())):
        fail(f"data {path}: no usable row ({'; '.join(f'{len(w)} x {r}' for r, w in dropped.items()) or 'the file is empty'}).")


def load_table(path, normalize, limit=0):
    """Normal rows of a data set, all at once."""
    return list(normal_rows(read_rows(path, limit), normalize, path))


# ---- Decontamination -------------------------------------------------------------------------------------------------
ASKED = ("problem", "question", "prompt", "messages", "conversation", "input", "description", "problem_statement", "original_prompt")


def ngrams(row, n):
    """{n words in a row, lower-case, without punctuation} of what a row asks, answers left out; a shorter text is one gram by itself."""
    nested = row.get("responses_create_params")
    texts = [v for k, v in {**row, **(nested if isinstance(nested, dict) else {})}.items() if k in ASKED]
    turns = [m for v in texts if isinstance(v, list) for m in v if isinstance(m, dict) and m.get("role") == "user"]
    grams = set()
    for text in [v for v in texts if isinstance(v, str)] + [m["content"] for m in turns if isinstance(m.get("content"), str)]:
        words = re.findall(r"\w+", text.lower())
        grams |= {" ".join(words[i : i + n]) for i in range(max(len(words) - n + 1, 1))} if words else set()
    return grams


def decontaminate(rows, held_out, n=9, template=10):
    """Yields (where, row, gram): gram is "" or n words that the row shares with a held-out row. Grams of more than `template` held-out
    rows are the wording around the problems, and no match."""
    counts = collections.Counter(gram for _, row in held_out for gram in ngrams(row, n))
    known = {gram for gram, rows_with_it in counts.items() if rows_with_it <= template}
    for where, row in rows:
        yield where, row, min(ngrams(row, n) & known, default="")


@dataclasses.dataclass
class Decontamination:
    data: str = ""  # training set, of any size: it is streamed
    eval_data: str = ""  # held-out sets, joined by commas
    out: str = ""  # .jsonl of the rows that are left
    n: int = 9  # words in a row; paper 3.2 and 4.5.1


def write_decontaminated(cfg):
    """Writes the rows of cfg.data that share no n-gram with cfg.eval_data, and prints how many did, with the first of them."""
    held_out, shared, total = read_rows(cfg.eval_data), [], 0
    rows = ((where, row) for file in data_files(cfg.data) for where, row, _ in read_file(file))
    with open(cfg.out + ".tmp", "w") as f:
        for total, (where, row, gram) in enumerate(decontaminate(rows, held_out, cfg.n), 1):
            if gram:
                shared.append((where, gram))
            else:
                f.write(json.dumps(row) + "\n")
    os.rename(cfg.out + ".tmp", cfg.out)
    first = f' (first: {shared[0][0]}, "{shared[0][1]}")' if shared else ""
    print0(f"data {cfg.data}: removed {len(shared)} of {total} rows that share {cfg.n} words in a row with one of {len(held_out)} held-out rows{first}")


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


def free_memory(device, world):
    """Bytes that a rank may still take: of its GPU, or its share of what the machine or its container has left."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    with open("/proc/meminfo") as f:
        free = next(int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable"))
    with contextlib.suppress(OSError, ValueError):
        free = min(free, int(open("/sys/fs/cgroup/memory.max").read()) - int(open("/sys/fs/cgroup/memory.current").read()))
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", world))


def check_memory(folder, cfg, world, device):
    """Prints the memory plan of a run that starts from `folder`, in a line or two, and ends a run that cannot fit."""
    if not os.path.exists(os.path.join(folder, "config.json")) or not os.path.exists("/proc/meminfo"):
        return  # loading says what is wrong with the folder
    nll = hasattr(cfg, "max_seq_len")
    longest = cfg.max_seq_len if nll else cfg.max_prompt_tokens + cfg.max_new_tokens
    tokens = max(cfg.micro_batch_tokens, longest)
    plan = memory_plan(read_config(folder), world, tokens, longest, device.type == "cuda", nll, getattr(cfg, "engine", ""), getattr(cfg, "kl_coef", 0) > 0)
    free, GB = free_memory(device, world), 1e9
    for moment in list(plan)[1:]:
        parts = ", ".join(f"{part} {n / GB:.1f}" for part, n in plan[moment].items())
        print0(f"{moment}: {sum(plan[moment].values()) / GB:.1f} of {free / GB:.1f} GB a rank ({parts})")
    for moment, parts in plan.items():
        if sum(parts.values()) > free:
            most = max(parts, key=parts.get)
            fail(f"{folder} on {world} ranks: {moment} needs about {sum(parts.values()) / GB:.1f} GB a rank and {free / GB:.1f} GB are free; most of it is "
                 f"{most}, {parts[most] / GB:.1f} GB: take more ranks, or fewer --micro_batch_tokens (now {tokens} at a time).")  # fmt: skip


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


def load_history(folder, data):
    """{"history", "epoch"} of the run that wrote this checkpoint if it was on the same rows (checksum `data`), else {}: the epoch
    filter of paper 4.5.2 goes on over the length stages of Math RL."""
    path = os.path.join(folder, "run.json")
    try:
        state = json.load(open(path))["state"] if os.path.exists(path) else {}
    except (ValueError, KeyError) as e:
        fail(f"--init_from={folder}: run.json cannot be read ({e}).")
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
            with open(self.path + ".tmp", "w") as f:
                f.writelines(line for line in old if json.loads(line)["step"] <= step)
            os.replace(self.path + ".tmp", self.path)

    def log(self, step, metrics, line=""):
        if int(os.environ.get("RANK", 0)) == 0:
            with open(self.path, "a") as f:
                f.write(json.dumps({"step": step, **metrics}) + "\n")
        if line:
            print0(line)


if __name__ == "__main__":
    write_decontaminated(parse_config(Decontamination))

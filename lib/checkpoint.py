"""Checkpoints: what is in a folder, when it is whole, what a run starts or resumes from.

    out/toy/mathrl/step_000050/   a Hugging Face folder, each rank's optimizer, and run.json: flags, command, versions, state, checksums
    out/toy/mathrl/final          names the last of them: this stage is done, and the next one starts here

A file of its own because these promises are kept by all of it together: one run a folder, a name that only whole folders have, checksums
against what happens to them later, and pruning that spares the best. tests/kill_harness.py holds them against SIGKILL at any instant.
"""

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import torch

from lib.common import all_gather, print0, ranks, shard
from lib.guard import fail, first_line, one_sentence
from lib.plan import check_memory, longest_sequence
from model import Qwen3, load_tokenizer, save_tokenizer


# ---- The folder of a run -------------------------------------------------------------------------
def lock(out_dir):
    """Create out_dir and hold it: a second run on the same directory refuses. What a save that was cut off has left goes."""
    try:
        os.makedirs(out_dir, exist_ok=True)
        if ranks()[0] > 0:
            return
        lock.file = open(os.path.join(out_dir, ".lock"), "w")
        # a verifier that outlives a killed run does not hold its folder
        os.register_at_fork(after_in_child=lock.file.close)
        fcntl.flock(lock.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"{out_dir}: another run is writing here.")
    except OSError as e:
        fail(f"{out_dir}: no folder to write into ({e.strerror}).")
    for name in os.listdir(out_dir):
        if name.startswith("step_") and name.endswith(".tmp"):
            shutil.rmtree(os.path.join(out_dir, name))


def step_folders(out_dir):
    return (
        sorted(f for f in os.listdir(out_dir) if f.startswith("step_") and not f.endswith(".tmp"))
        if os.path.isdir(out_dir)
        else []
    )


def best_checkpoint(out_dir):
    """Name of the checkpoint with the best held-out score in metrics.jsonl: KEEP_BEST=1 may want it, so it is not pruned."""
    logged = open(path) if os.path.exists(path := os.path.join(out_dir, "metrics.jsonl")) else ()
    scores = {f"step_{m['step']:06d}": m["eval"] for m in map(json.loads, logged) if "eval" in m}
    return max(
        scores.keys() & set(step_folders(out_dir)),
        key=lambda name: (scores[name], name),
        default="",
    )


def latest_checkpoint(out_dir):
    """The newest whole checkpoint of out_dir, or ""; a damaged one is skipped with a line saying so. Rank 0 looks for all."""
    found = ""
    for name in reversed(step_folders(out_dir)) if ranks()[0] == 0 else ():
        folder = os.path.join(out_dir, name)
        try:
            files = json.load(open(os.path.join(folder, "run.json")))["files"]
            damaged = [
                f for f, expected in files.items() if checksum(os.path.join(folder, f)) != expected
            ]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            damaged = [str(e)]
        if not damaged:
            found = folder
            break
        print0(f"{folder} is damaged ({damaged[0]}), trying the one before")
    return all_gather(found)[0]


def mark_final(out_dir, folder):
    """out_dir/final -> the last checkpoint: what the next stage starts from, and the sign that this stage is done."""
    if ranks()[0] == 0:
        link = os.path.join(out_dir, "final.tmp")
        if os.path.lexists(link):
            os.remove(link)
        os.symlink(os.path.basename(folder), link)
        os.replace(link, os.path.join(out_dir, "final"))


# ---- Write ---------------------------------------------------------------------------------------
def checksum(path):
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as f:
        while block := f.read(1 << 22):
            digest.update(block)
    return [os.path.getsize(path), digest.hexdigest()]


def sync(path):
    """A file, or the names in a folder, are on the disk when this returns."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def git_hash():
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return (
        subprocess.run(
            ["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True
        ).stdout.strip()
        or "unknown"
    )


def save_checkpoint(out_dir, step, model, optimizer, cfg, state, keep=2):
    """out_dir/step_000200, written under a temporary name and renamed, so that a folder with this name is always whole. The `keep` newest
    and the best stay."""
    (rank, world), final = ranks(), os.path.join(out_dir, f"step_{step:06d}")
    folder = final + ".tmp"
    if hasattr(model, "reshard"):
        # a forward without backward leaves the root gathered, in compute precision
        model.reshard()
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
            # not the checkpoint resumed from: that one is pruned some day
            save_tokenizer(cfg.init_from, folder)
            run = {
                "step": step,
                "config": dataclasses.asdict(cfg),
                "command": sys.argv,
                "git": git_hash(),
                "torch": torch.__version__,
                "world": world,
                "state": state,
            }
            names = sorted(name for name in os.listdir(folder) if name != "run.json")
            with ThreadPoolExecutor(8) as pool:  # 100 GB at 8B, and every rank waits
                run["files"] = dict(
                    zip(names, pool.map(lambda name: checksum(os.path.join(folder, name)), names))
                )
            with open(os.path.join(folder, "run.json"), "w") as f:
                json.dump(run, f)
            for name in (*run["files"], "run.json", ""):
                sync(os.path.join(folder, name))
            shutil.rmtree(final, ignore_errors=True)
            os.rename(folder, final)
            sync(out_dir)
    except Exception as e:  # torch and safetensors have their own words for a full disk
        free = shutil.disk_usage(out_dir).free / 1e9
        shutil.rmtree(folder, ignore_errors=True)
        fail(
            f"{final} cannot be written ({first_line(e)}; {free:.3g} GB were left there).",
            note="The checkpoint before it is whole.",
        )
    if rank == 0:
        if os.path.lexists(link := os.path.join(out_dir, "final")):
            # the stage went on: it is not done, and pruning may take what the link names
            os.remove(link)
        for old in set(step_folders(out_dir)[:-keep]) - {best_checkpoint(out_dir)}:
            shutil.rmtree(os.path.join(out_dir, old))
    all_gather(None)
    return final


# ---- Read ----------------------------------------------------------------------------------------
def load_policy(cfg, world, device):
    """(tokenizer, model sharded over the ranks, checkpoint that the run resumes from or ""). Says first what the run will take."""
    resume = latest_checkpoint(cfg.out_dir)
    folder = resume or cfg.init_from
    with one_sentence(f"--init_from={folder}"):
        check_memory(folder, cfg, world, device)
        tokenizer, model = (
            load_tokenizer(folder),
            Qwen3.from_pretrained(folder, device=device, rope_factor=cfg.rope_factor),
        )
        if tokenizer.get_vocab_size() > model.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.get_vocab_size()} tokens, the model only {model.config.vocab_size}"
            )
    if longest_sequence(cfg) > model.max_positions():
        flags = (
            "--max_seq_len"
            if hasattr(cfg, "max_seq_len")
            else "--max_prompt_tokens + --max_new_tokens"
        )
        fail(
            f"{flags} is {longest_sequence(cfg)}, over the {model.max_positions()} positions of {folder}: pass --rope_factor={max(2, -(-longest_sequence(cfg) // 32768))}."
        )
    model.gradient_checkpointing = device.type == "cuda"
    return tokenizer, shard(model, device, cfg.shard), resume


def load_checkpoint(folder, optimizer, cfg):
    """Restore the optimizer of this rank and return (step, state); the weights are loaded by Qwen3.from_pretrained(folder)."""
    (rank, world), run = ranks(), json.load(open(os.path.join(folder, "run.json")))
    if run["world"] != world:
        fail(f"{folder} was written by {run['world']} ranks and can only be resumed by as many.")
    optimizer.load_state_dict(
        torch.load(os.path.join(folder, f"optim_rank{rank}.pt"), weights_only=True)
    )
    now = dataclasses.asdict(cfg)
    for name in [k for k, v in run["config"].items() if now.get(k, v) != v]:
        print0(f"{folder}: --{name} was {run['config'][name]}, now {now[name]}")
    for group in optimizer.param_groups:  # flags win over the file
        group |= {"betas": (cfg.beta1, cfg.beta2), "weight_decay": cfg.weight_decay}
    return run["step"], run["state"]

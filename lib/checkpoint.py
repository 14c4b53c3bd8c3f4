"""Checkpoints: save, verify, prune, resume.

    out/toy/mathrl/step_000050/   a Hugging Face folder, the optimizer in shards, and run.json
                                  (flags, command, versions, state, checksums of all files)
    out/toy/mathrl/final          a link to the last checkpoint: this stage is done, and the next
                                  one starts here

Five promises hold together. Only one run writes into a folder. Only a whole checkpoint has a name
of the form step_000050. Checksums find what is damaged later. Pruning spares the best checkpoint. A
run goes on bit for bit on as many ranks, and to rounding on any other number, under any --shard.
tests/kill_harness.py tests them against SIGKILL at any instant.

The optimizer is resharded here and not by torch.distributed.checkpoint: that reads its metadata
with pickle, which runs what a file says, where all of this is read with weights_only, and a save in
the background would report a full disk steps later than the one it belongs to.
"""

import dataclasses
import fcntl
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import torch

from lib.common import all_gather, print0, ranks, shard
from lib.guard import fail, first_line, one_sentence
from lib.lora import add_lora, load_adapter, lora_layers, save_adapter
from lib.optimizer import weight_dtype
from lib.plan import check_memory, longest_sequence
from model import Qwen3, load_tokenizer, original_positions, save_tokenizer


# ---- The folder of a run -------------------------------------------------------------------------
def lock(out_dir):
    """Create out_dir and hold it until this process ends. A second run on the folder is refused.

    Removes what an interrupted save has left there.
    """
    try:
        os.makedirs(out_dir, exist_ok=True)
        if ranks()[0] > 0:
            return
        # The file stays open, since closing it would release the lock.
        lock.file = open(os.path.join(out_dir, ".lock"), "w")  # noqa: SIM115
        # A forked verifier closes its copy, so that one that outlives a killed run does not hold
        # the folder.
        os.register_at_fork(after_in_child=lock.file.close)
        fcntl.flock(lock.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"{out_dir}: another run is writing here.")
    except OSError as error:
        fail(f"{out_dir}: no folder to write into ({error.strerror}).")
    for name in os.listdir(out_dir):
        if name.startswith("step_") and name.endswith(".tmp"):
            shutil.rmtree(os.path.join(out_dir, name))


def step_folders(out_dir):
    """Names of the checkpoints in out_dir, oldest first."""
    if not os.path.isdir(out_dir):
        return []
    names = os.listdir(out_dir)
    return sorted(n for n in names if n.startswith("step_") and not n.endswith(".tmp"))


def best_checkpoint(out_dir):
    """Name of the checkpoint with the best held-out score in metrics.jsonl, or "".

    Of equal scores the latest wins. It is not pruned, because KEEP_BEST=1 of run_cascade.sh may
    start the next stage from it.
    """
    log = os.path.join(out_dir, "metrics.jsonl")
    if not os.path.exists(log):
        return ""
    scores = {}
    with open(log) as f:
        for line in f:
            metrics = json.loads(line)
            if metrics.get("eval") is not None:
                scores[f"step_{metrics['step']:06d}"] = metrics["eval"]
    # Many steps are logged, and few are saved.
    candidates = [(scores[name], name) for name in step_folders(out_dir) if name in scores]
    _, best = max(candidates, default=(0.0, ""))
    return best


def latest_checkpoint(out_dir):
    """Path of the newest whole checkpoint in out_dir, or "".

    A damaged one is skipped with a line that says so. Rank 0 looks, and all ranks get its answer.
    """
    found = ""
    if ranks()[0] == 0:
        for name in reversed(step_folders(out_dir)):
            folder = os.path.join(out_dir, name)
            damage = find_damage(folder)
            if not damage:
                found = folder
                break
            print0(f"{folder} is damaged ({damage}), trying the one before")
    return all_gather(found)[0]


def find_damage(folder):
    """Say in a word what is wrong with a checkpoint, or return "" if its files are as saved."""
    try:
        files = read_run_json(folder)["files"]
        damaged = [
            name
            for name, expected in files.items()
            if checksum(os.path.join(folder, name)) != expected
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        # A file is missing, or run.json is not what a checkpoint has.
        return str(error) or type(error).__name__
    return damaged[0] if damaged else ""


def mark_final(out_dir, folder):
    """Link out_dir/final to the last checkpoint.

    The link says that this stage is done, and the next stage starts from it.
    """
    if ranks()[0] == 0:
        link = os.path.join(out_dir, "final.tmp")
        if os.path.lexists(link):
            os.remove(link)
        os.symlink(os.path.basename(folder), link)
        # A rename replaces the old link at one instant.
        os.replace(link, os.path.join(out_dir, "final"))


# ---- Write ---------------------------------------------------------------------------------------
def checksum(path):
    """[size in bytes, BLAKE2b digest] of a file."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as f:
        while block := f.read(1 << 22):
            digest.update(block)
    return [os.path.getsize(path), digest.hexdigest()]


def fsync_path(path):
    """Wait until a file is on the disk, or, for a folder, the names in it."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def git_hash():
    """Commit of this repository, or "unknown"."""
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    command = ["git", "-C", here, "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def save_checkpoint(out_dir, step, model, optimizer, cfg, state, keep=2):
    """Write out_dir/step_000200 and return its path; all ranks call this together.

    The folder is written under a temporary name and then renamed, so that a folder with this name
    is always whole. Afterwards only the `keep` newest checkpoints and the best one stay.
    state: what the stage needs to go on, as JSON.
    """
    rank, world = ranks()
    final = os.path.join(out_dir, f"step_{step:06d}")
    folder = final + ".tmp"
    weights = gather_weights(model, rank)
    try:
        os.makedirs(folder, exist_ok=True)
        index, num_shards = shard_of(next(model.parameters()))
        # Under --shard=hybrid and replicate, later ranks hold copies of these shards.
        if rank == index:
            moments = local_moments(optimizer)
            torch.save(moments, os.path.join(folder, f"optim_rank{rank}.pt"))
        # Rank 0 goes on when every rank has written its optimizer.
        all_gather(None)
        if rank == 0:
            model.save_pretrained(folder, weights)
            if cfg.lora_rank:
                save_adapter(model, folder, cfg.init_from)
            # The tokenizer's files were read with the weights: the folder may be gone by now.
            only_thinks = getattr(cfg, "think_only", False)  # a flag of sft.py
            save_tokenizer(model.tokenizer_files, folder, only_thinks=only_thinks)
            run = {
                "step": step,
                "config": dataclasses.asdict(cfg),
                "command": sys.argv,
                "git": git_hash(),
                "torch": torch.__version__,
                "world": world,
                "shards": num_shards,
                "state": state,
            }
            complete_folder(folder, run)
            shutil.rmtree(final, ignore_errors=True)
            os.rename(folder, final)
            fsync_path(out_dir)
    except Exception as error:  # noqa: BLE001  torch and safetensors word a full disk differently
        free = shutil.disk_usage(out_dir).free / 1e9
        shutil.rmtree(folder, ignore_errors=True)
        before = step_folders(out_dir)
        fail(
            f"{final} cannot be written ({first_line(error)}; {free:.3g} GB were left there).",
            note=f"{before[-1]} before it is whole." if before else "None was saved before it.",
        )
    # A step that was not applied proves nothing about the weights: the checkpoints before it may be
    # the last good ones.
    if rank == 0 and not state.get("skipped"):
        prune(out_dir, keep)
    # No rank goes on before the folder has its name.
    all_gather(None)
    return final


def shard_of(parameter):
    """(index, count): this rank holds the index-th of count shards, cut along dimension 0."""
    if not hasattr(parameter, "device_mesh"):
        return 0, 1
    # The last dimension of the mesh shards; under --shard=hybrid the first one makes copies.
    mesh = parameter.device_mesh
    return mesh.get_local_rank(mesh.ndim - 1), mesh.size(mesh.ndim - 1)


def local_moments(optimizer):
    """The optimizer's state_dict with this rank's shards as plain tensors, so that it can be read
    by any number of ranks."""
    moments = optimizer.state_dict()
    plain = {}
    for number, of_parameter in moments["state"].items():
        plain[number] = {
            name: t.to_local() if hasattr(t, "to_local") else t for name, t in of_parameter.items()
        }
    return {**moments, "state": plain}


def gather_weights(model, rank):
    """{name: whole tensor on the CPU} on rank 0, and {} on the other ranks. Adapters are merged."""
    if hasattr(model, "reshard"):
        # A forward pass without backward, as in evaluate, leaves FSDP's root parameters gathered
        # and in compute precision. Resharding brings the fp32 master weights back.
        model.reshard()
    adapters = dict(lora_layers(model))
    weights = {}
    for name, parameter in model.named_parameters():
        if name.endswith((".lora_A", ".lora_B")):
            continue
        if hasattr(parameter, "full_tensor"):
            # A collective: every rank has to take part.
            whole = parameter.full_tensor()
        else:
            whole = parameter.detach()
        if rank == 0:
            adapter = adapters.get(name.removesuffix(".weight"))
            if adapter is not None:
                whole = adapter.merged_weight(whole)
            weights[name] = whole.cpu()
    return weights


def complete_folder(folder, run):
    """Add run.json, with the checksums of all other files, and wait until all is on the disk."""
    paths = []
    for where, _, names in os.walk(folder):
        paths += [os.path.join(where, name) for name in names if name != "run.json"]
    names = [os.path.relpath(path, folder) for path in paths]
    # In threads, since every rank waits meanwhile: a checkpoint of 8B parameters has 100 GB.
    with ThreadPoolExecutor(8) as pool:
        run["files"] = dict(zip(names, pool.map(checksum, paths)))
    run_json = os.path.join(folder, "run.json")
    with open(run_json, "w") as f:
        json.dump(run, f)
    folders = {os.path.dirname(path) for path in paths}
    for path in [*paths, run_json, *folders]:
        fsync_path(path)


def prune(out_dir, keep):
    """Remove all checkpoints but the `keep` newest and the best one."""
    # A saved step means that the stage has gone on after its end, for example with more steps. It
    # is not done any more, and the checkpoint that the link names may be removed below.
    link = os.path.join(out_dir, "final")
    if os.path.lexists(link):
        os.remove(link)
    best = best_checkpoint(out_dir)
    for name in step_folders(out_dir)[:-keep]:
        if name != best:
            shutil.rmtree(os.path.join(out_dir, name))


# ---- Read ----------------------------------------------------------------------------------------
def read_run_json(folder):
    """Content of a checkpoint's run.json."""
    with open(os.path.join(folder, "run.json")) as f:
        return json.load(f)


def load_policy(cfg, world, device):
    """(tokenizer, model sharded over the ranks, checkpoint that the run resumes from or "").

    A run that does not resume starts from weights alone, without the optimizer's state (G9).

    Prints first how much memory and time the run will take.
    """
    resume = latest_checkpoint(cfg.out_dir)
    if resume:
        check_method(resume, cfg)
    folder = resume or cfg.init_from
    if cfg.lora_rank:
        folder = cfg.init_from  # the base of the adapters, which alone are resumed
    with one_sentence(f"--init_from={folder}"):
        checkpointing, reduce_once = check_memory(folder, cfg, world, device)
        tokenizer = load_tokenizer(folder)
        dtype = weight_dtype(cfg, device)
        model = Qwen3.from_pretrained(folder, dtype, device, rope_factor=cfg.rope_factor)
        if cfg.lora_rank:
            add_lora(model, cfg.lora_rank, cfg.lora_alpha, cfg.seed)
            if resume:
                load_adapter(model, resume)
        if tokenizer.get_vocab_size() > model.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.get_vocab_size()} tokens, "
                f"the model only {model.config.vocab_size}"
            )

    # The model knows only the positions it was trained on, which YaRN stretches by the rope factor.
    longest = longest_sequence(cfg)
    if longest > model.max_positions():
        is_sft = hasattr(cfg, "max_seq_len")
        flags = "--max_seq_len" if is_sft else "--max_prompt_tokens + --max_new_tokens"
        original = original_positions(model.config)
        # YaRN is for Qwen3's context; a shorter one is that of a small model.
        stretch = ""
        if original >= 32768:
            stretch = f", or pass --rope_factor={max(2, math.ceil(longest / original))}"
        fail(
            f"{flags} is {longest}, over the {model.max_positions()} positions of {folder}: "
            f"lower it{stretch}."
        )
    model.checkpointing = checkpointing
    return tokenizer, shard(model, device, cfg.shard, reduce_once), resume


def check_method(folder, cfg):
    """End a run that would resume a checkpoint with another kind of optimizer or adapters."""
    before = read_run_json(folder)["config"]
    for name, default in (("optimizer", "adamw"), ("lora_rank", 0), ("lora_alpha", 0.0)):
        was, now = before.get(name, default), getattr(cfg, name)
        if was != now:
            fail(
                f"{folder} was trained with --{name}={was}, now {now}: resume it with the same, or "
                f"take another --out_dir and start from {cfg.out_dir}/final."
            )


def load_checkpoint(folder, optimizer, cfg):
    """Restore the optimizer of this rank and return (step, state).

    The checkpoint may be of another number of ranks, or of another --shard. The weights are not
    loaded here: load_policy has done that.
    """
    run = read_run_json(folder)
    if "shards" not in run:
        fail(f"{folder}: its optimizer is that of an older version (commit {run['git'][:10]}).")
    world = ranks()[1]
    if run["world"] != world:
        print0(f"{folder}: was trained on {run['world']} ranks, goes on on {world}")
    load_moments(folder, run["shards"], optimizer)

    # Flags may change between the runs. Say which have; flags that one run lacks do not count.
    config = dataclasses.asdict(cfg)
    for name, before in run["config"].items():
        if name in config and config[name] != before:
            print0(f"{folder}: --{name} was {before}, now {config[name]}")
    # The saved optimizer brings its old settings along. The flags of this run win over them.
    for group in optimizer.param_groups:
        group["betas"] = (cfg.beta1, cfg.beta2)
        group["weight_decay"] = cfg.weight_decay
    return run["step"], run["state"]


def load_moments(folder, num_shards, optimizer):
    """Give the optimizer its state: of every parameter the rows that this rank holds."""
    shards = []
    for i in range(num_shards):
        path = os.path.join(folder, f"optim_rank{i}.pt")
        # Mapped and not read: a rank needs a few rows of all shards, whose bytes come on access.
        shards.append(torch.load(path, weights_only=True, mmap=True))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {}
    for number, of_parameter in shards[0]["state"].items():
        state[number] = {}
        for name, value in of_parameter.items():
            # The number of steps is no tensor, or one without dimensions.
            if torch.is_tensor(value) and value.dim() > 0:
                parts = [shard["state"][number][name] for shard in shards]
                value = own_rows(parameters[number], parts)
            state[number][name] = value
    optimizer.load_state_dict({**shards[0], "state": state})


def own_rows(parameter, parts):
    """A tensor like this rank's shard of a parameter, from the shards of a whole one in order."""
    moment = torch.empty_like(parameter.detach(), dtype=parts[0].dtype)
    local = moment.to_local() if hasattr(moment, "to_local") else moment
    index, num_shards = shard_of(parameter)
    # FSDP cuts as torch.chunk does: equal shards, the last ones shorter or empty.
    begin = index * -(-len(parameter) // num_shards)
    end = begin + len(local)
    part_begin = 0
    for part in parts:
        part_end = part_begin + len(part)
        first, last = max(begin, part_begin), min(end, part_end)
        if first < last:
            local[first - begin : last - begin] = part[first - part_begin : last - part_begin]
        part_begin = part_end
    return moment

"""Data sets: reads any of them row by row, says what it dropped and why, deals out prompts, and takes out of a training set what a
held-out one asks.

A stage gives its normalize(row, where); what comes back are normal rows. As a script it removes the rows of a training set that
share 9 words in a row with a held-out set, as in the paper's curation:
    python data.py --data=nvidia/Nemotron-Cascade-RL-Math --eval_data=HuggingFaceH4/MATH-500,math-ai/aime25 --out=out/math_clean.jsonl
"""

import collections
import contextlib
import dataclasses
import io
import itertools
import json
import os
import re
import unicodedata

import numpy as np
import torch

from common import all_gather, fail, parse_config, print0
from model import NO_THINK, THINK, render_chat


# ---- Data files ------------------------------------------------------------------------------------------------------
class BadRow(ValueError):
    """Raised by a stage's normalize(row, where): the row is dropped and counted under this reason."""


FORMATS = (".jsonl", ".json", ".parquet", ".jsonl.gz")


def data_files(path):
    """Files or URLs of a data set: a file, a folder of them, or a hub id ("owner/name:config@split"; held-out splits only by name); commas join several."""
    if "," in path:
        return [file for part in path.split(",") for file in data_files(part)]
    if os.path.isdir(path):
        files = sorted(os.path.join(top, f) for top, _, names in os.walk(path) for f in names if f.endswith(FORMATS))
    elif os.path.exists(path) or "://" in path:
        files = [path] if path.endswith(FORMATS) else fail(f"data {path}: expected a file that ends in {', '.join(FORMATS)}.")
    elif path.count("/") == 1 and not path.endswith(FORMATS):
        import datasets  # slow to import, so only where it is used

        hub, _, wanted = path.partition("@")
        name, _, config = hub.partition(":")
        try:
            names = datasets.get_dataset_config_names(name)
            names = [config] if config else ["default"] if "default" in names else names
            splits = [datasets.load_dataset_builder(name, n).config.data_files or {} for n in names]
        except Exception as e:  # whatever is wrong with a name or a hub, in the library's words
            fail(f"data {path}: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else 'no message'}.")
        held_out = lambda split: "train" in splits[0] and split != "train" or split.startswith(("val", "test", "dev"))
        files = [str(f) for files in splits for split in files if (split == wanted if wanted else not held_out(split)) for f in files[split] if str(f).endswith(FORMATS)]
    else:
        fail(f"data {path}: no such file or folder, and not a hub id of the form owner/name.")
    return files or fail(f"data {path}: no file that ends in {', '.join(FORMATS)}.")


def read_file(file, cursor=(0, 0, 0.0)):
    """(where, row, cursor behind it) from a cursor on, holding only what is being read (a .json whole): nothing is downloaded or
    unpacked ahead. A cursor is [rows, bytes, share of the file that is read]."""
    import fsspec

    num_rows, offset, _ = cursor
    try:
        system, path = fsspec.core.url_to_fs(file)
        size = max(system.size(path) or 1, 1)
        with system.open(path, "rb", compression="gzip" if file.endswith(".gz") else None) as f:
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
            for line in iter(io.BufferedReader(f, 1 << 20).readline, b""):  # fsspec's own readline fetches a remote file almost three times
                num_rows, offset = num_rows + 1, offset + len(line)
                if line.strip():  # packed bytes are fewer than read ones, so that share only says how far the file is not done
                    share = 1 - size / (size + offset) if file.endswith(".gz") else offset / size
                    yield f"{file} row {num_rows}", json.loads(line), [num_rows, offset, share]
    except (ValueError, RecursionError, OSError, ImportError) as e:  # pyarrow's errors are ValueErrors or OSErrors
        text = f"not valid JSON ({e.msg} at column {e.colno})" if isinstance(e, json.JSONDecodeError) else f"{type(e).__name__}: {e}"
        fail(f"data {file} row {num_rows}: {text.splitlines()[0]}.")


def read_rows(path, limit=0):
    """[(where, row)] of a data set, file after file."""
    rows = ((where, row) for file in data_files(path) for where, row, _ in read_file(file))
    return list(itertools.islice(rows, limit or None))


def fresh_cursors(path):
    """{file: cursor at its start}; a file that is named again, to be seen more often, is read beside itself, as file#1."""
    files = data_files(path)
    return {f"{file}#{n}" if (n := files[:i].count(file)) else file: [0, 0, 0.0] for i, file in enumerate(files)}


def stream_rows(cursors, limit=0):
    """(where, row), always from the file of which the smallest share is read, so that every stretch has the mix of the whole.
    cursors {file: cursor} move along: reading on from a copy of them gives the same rows as not having stopped."""
    readers = {file: read_file(re.sub(r"#\d+$", "", file), cursor) for file, cursor in cursors.items() if cursor[2] < 1}
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
    if row[name] is None:
        raise BadRow(f'field "{name}" is null')
    if not isinstance(row[name], kind):
        kinds = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        fail(f'data {where}: field "{name}" is {type(row[name]).__name__}, expected {kinds}.')
    return row[name]


def given(row, *names):
    """The first of these names that the row has something for, else one that is empty, else one that is null, else the first."""
    return min((n for n in names if n in row), key=lambda n: (row[n] is None, row[n] in ("", [])), default=names[0])


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


def language_ok(prompt, response):
    """False if response has letters of a script that prompt does not use; Latin, Greek and symbols are always fine."""

    def scripts(text):
        letters = (c for c in set(text) if ord(c) > 127 and c.isalpha() and not 0x2070 <= ord(c) < 0x2190)
        names = {unicodedata.name(c, "UNNAMED").split()[0].split("-")[0] for c in letters}
        return names - {"LATIN", "GREEK", "MATHEMATICAL", "MODIFIER", "FULLWIDTH", "MICRO", "FEMININE", "MASCULINE"}

    return scripts(response) <= scripts(prompt)


# ---- Prompts of an RL stage ------------------------------------------------------------------------------------------
def encode_prompts(rows, tokenizer, cfg):
    """Rows with prompt_ids; prompts longer than max_prompt_tokens are dropped here, before anything is grouped."""
    known = {}  # equal ids are one object: 8 bytes a token where they would be 36
    for row in rows:
        asked = row["messages"][-1]["content"].strip()  # a flag that it ends in wins, so the verifier has to know
        row["think"] = asked.endswith(THINK) or row["think"] and not asked.endswith(NO_THINK)
        row["prompt_ids"] = [known.setdefault(i, i) for i in render_chat(tokenizer, row["messages"], row["think"])[0]]
    kept = [row for row in rows if len(row["prompt_ids"]) <= cfg.max_prompt_tokens]
    for index, row in enumerate(kept):
        row["index"] = index
    if len(kept) < len(rows):
        print0(f"data: dropped {len(rows) - len(kept)} of {len(rows)} rows, prompt over {cfg.max_prompt_tokens} tokens")
    return kept if kept else fail(f"data: every prompt is longer than max_prompt_tokens={cfg.max_prompt_tokens}.")


def next_prompts(rows, state, cfg, select_rows):
    """Row indices of the next step: a walk through a permutation of what select_rows picks for the epoch. Advances the cursor in `state`."""
    chosen = []
    while len(chosen) < cfg.prompts_per_step:
        if state["position"] >= len(state["pool"]):
            pool = select_rows(rows, state["epoch"], {int(i): n for i, n in state["history"].items()}, cfg)
            order = np.random.default_rng([cfg.seed, state["epoch"]]).permutation(len(pool))
            state |= {"pool": [pool[i] for i in order], "position": 0, "epoch": state["epoch"] + 1}
        taken = state["pool"][state["position"] :][: cfg.prompts_per_step - len(chosen)]
        state["position"] += len(taken)
        chosen += taken
    return chosen


def count_correct(rollouts):
    """{row index: [num_correct, num_rollouts]} of one rank, rollouts that are not trained on left out."""
    counts = {}
    for r in rollouts:
        if r.trained:
            correct, total = counts.get(str(r.row["index"]), (0, 0))
            counts[str(r.row["index"])] = [correct + (r.status == "ok"), total + 1]
    return counts


# ---- Rollouts into packed batches ------------------------------------------------------------------------------------
# T tokens of a packed micro-batch; entry t of every per-token tensor is about token t
def deal(units, world):
    """(largest number of tokens on a rank, shares): the largest unit goes first, each to the rank that then has the fewest tokens. A rank
    computes a prompt once, so it counts once there."""
    shares, tokens, there = [[] for _ in range(world)], [0] * world, [set() for _ in range(world)]
    for unit in sorted(units, key=lambda unit: (-sum(len(r.prompt_ids) + len(r.completion_ids) for r in unit), unit[0].seed)):
        sums = [n + sum(len(r.completion_ids) for r in unit) + (unit[0].group not in groups) * len(unit[0].prompt_ids) for n, groups in zip(tokens, there)]
        rank = sums.index(min(sums))
        shares[rank] += unit
        tokens[rank] = sums[rank]
        there[rank].add(unit[0].group)
    return max(tokens), shares


def balance(rollouts, world):
    """This rank's share of all ranks' rollouts with a gradient: dealt one by one, or by whole groups where prompts are long."""
    if world == 1:
        return rollouts
    groups = {}
    for rank, part in enumerate(all_gather([dataclasses.replace(r, row={}, text="", pending=None) for r in rollouts if r.advantage])):
        for r in part:
            r.group = (rank, r.group)
            groups.setdefault(r.group, []).append(r)
    ways = [[r] for group in groups.values() for r in group], groups.values()
    return min((deal(units, world) for units in ways), key=lambda way: way[0])[1][torch.distributed.get_rank()]


def fill(items, length, budget):
    """Lists of consecutive items, as long as their lengths sum to at most `budget`; a longer item stands alone."""
    packs, room = [], 0
    for item in items:
        if length(item) > room:
            packs.append([])
            room = budget
        packs[-1].append(item)
        room -= length(item)
    return packs


def collate(rollouts, cfg, device):
    """Packed micro-batches of at most micro_batch_tokens each, equal prompts together, long sequences first. Rollouts with advantage 0
    have no gradient and are left out here (their tokens stay in the denominator). Masks come from recorded lengths only."""
    groups, length = {}, lambda r: len(r.prompt_ids) + len(r.completion_ids)
    for r in sorted((r for r in rollouts if r.advantage), key=length, reverse=True):
        groups.setdefault(tuple(r.prompt_ids), []).append(r)
    return [pack_rollouts(pack, device) for pack in fill((r for group in groups.values() for r in group), length, cfg.micro_batch_tokens)]


def shared_prefixes(sequences, device):
    """(first_U, copy_T) of sequences that are packed one behind another: the places of the first tokens with their past, and for every
    token which of them it equals, or None where that saves less than a tenth. [[5, 6, 7], [5, 6, 8]] -> [0, 1, 2, 5], [0, 1, 2, 0, 1, 3]."""
    starts = np.cumsum([0, *map(len, sequences)])
    copy_T, order = np.arange(starts[-1]), sorted(range(len(sequences)), key=lambda i: (sequences[i], i))
    for a, b in zip(order, order[1:]):  # sorted: nobody has a longer prefix in common with b than the one before it
        pairs = enumerate(zip(sequences[a], sequences[b]))
        length = next((i for i, (x, y) in pairs if x != y), min(len(sequences[a]), len(sequences[b])))
        copy_T[starts[b] : starts[b] + length] = copy_T[starts[a] : starts[a] + length]
    first_U, copy_T = np.unique(copy_T, return_inverse=True)
    return (torch.from_numpy(first_U).to(device), torch.from_numpy(copy_T).to(device)) if len(first_U) < 0.9 * len(copy_T) else None


def pack_rollouts(rollouts, device):
    """One micro-batch: [p1 c1 p2 c2 ...] flat, with the offsets of the sequences and the positions of completion tokens."""
    lengths = [len(r.prompt_ids) + len(r.completion_ids) for r in rollouts]
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
    index = [np.arange(end - len(r.completion_ids), end) for r, end in zip(rollouts, cu_seqlens[1:], strict=True)]
    advantages_T, sampler_logprobs_T, teacher_logprobs_T = np.zeros((3, cu_seqlens[-1]), np.float32)
    for r, where in zip(rollouts, index, strict=True):
        advantages_T[where], sampler_logprobs_T[where], teacher_logprobs_T[where] = r.advantage, r.sampler_logprobs, r.teacher_logprobs or 0.0
    tensor = lambda x, dtype=None: torch.as_tensor(x, dtype=dtype).to(device)
    return {
        "input_ids_T": tensor(np.concatenate([r.prompt_ids + r.completion_ids for r in rollouts])),
        "cu_seqlens": tensor(cu_seqlens, torch.int32), "max_seqlen": max(lengths), "loss_index": tensor(np.concatenate(index)),
        "shared": shared_prefixes([r.prompt_ids + r.completion_ids for r in rollouts], device),
        "advantages_T": tensor(advantages_T), "sampler_logprobs_T": tensor(sampler_logprobs_T), "teacher_logprobs_T": tensor(teacher_logprobs_T),
    }  # fmt: skip


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


if __name__ == "__main__":
    write_decontaminated(parse_config(Decontamination))

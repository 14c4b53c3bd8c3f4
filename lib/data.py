"""Data sets: reads any of them row by row, says what it dropped and why, deals out prompts, and takes out of a training set what a
held-out one asks.

A stage gives its normalize(row, where); what comes back are normal rows. As a script it removes the rows of a training set that
share 9 words in a row with a held-out set, as in the paper's curation:
    python -m extras.decontaminate --data=nvidia/Nemotron-Cascade-RL-Math --eval_data=HuggingFaceH4/MATH-500,math-ai/aime25 --out=out/math_clean.jsonl
"""

import contextlib
import io
import itertools
import json
import os
import re

from lib.common import print0
from lib.guard import fail


# ---- Data files ----------------------------------------------------------------------------------
class BadRow(ValueError):
    """Raised by a stage's normalize(row, where): the row is dropped and counted under this reason."""


FORMATS = (".jsonl", ".json", ".parquet", ".jsonl.gz")


def data_files(path):
    """Files or URLs of a data set: a file, a folder of them, or a hub id ("owner/name:config@split"; held-out splits only by name); commas join several."""
    if "," in path:
        return [file for part in path.split(",") for file in data_files(part)]
    if os.path.isdir(path):
        files = sorted(
            os.path.join(top, f)
            for top, _, names in os.walk(path)
            for f in names
            if f.endswith(FORMATS)
        )
    elif os.path.exists(path) or "://" in path:
        files = (
            [path]
            if path.endswith(FORMATS)
            else fail(f"data {path}: expected a file that ends in {', '.join(FORMATS)}.")
        )
    elif path.count("/") == 1 and not path.endswith(FORMATS):
        import datasets  # slow to import, so only where it is used

        hub, _, wanted = path.partition("@")
        name, _, config = hub.partition(":")
        try:
            names = datasets.get_dataset_config_names(name)
            names = [config] if config else ["default"] if "default" in names else names
            splits = [datasets.load_dataset_builder(name, n).config.data_files or {} for n in names]
        except Exception as e:  # whatever is wrong with a name or a hub, in the library's words
            fail(
                f"data {path}: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else 'no message'}."
            )
        held_out = lambda split: (
            "train" in splits[0] and split != "train" or split.startswith(("val", "test", "dev"))
        )
        files = [
            str(f)
            for files in splits
            for split in files
            if (split == wanted if wanted else not held_out(split))
            for f in files[split]
            if str(f).endswith(FORMATS)
        ]
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
                        for row in itertools.islice(
                            (r for batch in batches for r in batch.to_pylist()),
                            num_rows - here.start,
                            None,
                        ):
                            num_rows += 1
                            yield f"{file} row {num_rows}", row, [num_rows, 0, num_rows / total]
                return
            f.seek(offset)
            # a list of rows or one row; else lines, whatever the name says
            if file.endswith(".json"):
                with contextlib.suppress(ValueError):
                    parsed = json.load(f)
                    rows = parsed if isinstance(parsed, list) else [parsed]
                    yield from (
                        (f"{file} row {n}", row, [n, 0, n / len(rows)])
                        for n, row in enumerate(rows, 1)
                        if n > num_rows
                    )
                    return
                f.seek(offset)
            # fsspec's own readline fetches a remote file almost three times
            for line in iter(io.BufferedReader(f, 1 << 20).readline, b""):
                num_rows, offset = num_rows + 1, offset + len(line)
                # packed bytes are fewer than read ones, so that share only says how far the file is
                # not done
                if line.strip():
                    share = 1 - size / (size + offset) if file.endswith(".gz") else offset / size
                    yield f"{file} row {num_rows}", json.loads(line), [num_rows, offset, share]
    except (
        ValueError,
        RecursionError,
        OSError,
        ImportError,
    ) as e:  # pyarrow's errors are ValueErrors or OSErrors
        text = (
            f"not valid JSON ({e.msg} at column {e.colno})"
            if isinstance(e, json.JSONDecodeError)
            else f"{type(e).__name__}: {e}"
        )
        fail(f"data {file} row {num_rows}: {text.splitlines()[0]}.")


def read_rows(path, limit=0):
    """[(where, row)] of a data set, file after file."""
    rows = ((where, row) for file in data_files(path) for where, row, _ in read_file(file))
    return list(itertools.islice(rows, limit or None))


def fresh_cursors(path):
    """{file: cursor at its start}; a file that is named again, to be seen more often, is read beside itself, as file#1."""
    files = data_files(path)
    return {
        f"{file}#{n}" if (n := files[:i].count(file)) else file: [0, 0, 0.0]
        for i, file in enumerate(files)
    }


def stream_rows(cursors, limit=0):
    """(where, row), always from the file of which the smallest share is read, so that every stretch has the mix of the whole.
    cursors {file: cursor} move along: reading on from a copy of them gives the same rows as not having stopped."""
    readers = {
        file: read_file(re.sub(r"#\d+$", "", file), cursor)
        for file, cursor in cursors.items()
        if cursor[2] < 1
    }
    # one row, to know when a file is done
    ahead = {file: next(reader, None) for file, reader in readers.items()}
    cursors |= {file: [*cursors[file][:2], 1.0] for file, row in ahead.items() if row is None}
    while (open_files := [f for f in readers if cursors[f][2] < 1]) and not 0 < limit <= sum(
        c[0] for c in cursors.values()
    ):
        file = min(open_files, key=lambda f: cursors[f][2])
        where, row, cursor = ahead[file]
        ahead[file] = next(readers[file], None)
        cursors[file] = cursor if ahead[file] else [*cursor[:2], 1.0]
        yield where, row


def required_field(row, where, name, kind=str):
    """row[name], or one sentence naming file, row, field and what was expected."""
    if name not in row:
        fail(f'data {where}: no "{name}" field (has: {", ".join(map(str, row))}).')
    if row[name] is None:
        raise BadRow(f'field "{name}" is null')
    if not isinstance(row[name], kind):
        kinds = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        fail(f'data {where}: field "{name}" is {type(row[name]).__name__}, expected {kinds}.')
    return row[name]


def first_nonempty(row, *names):
    """The first of these names that the row has something for, else one that is empty, else one that is null, else the first."""
    return min(
        (n for n in names if n in row),
        key=lambda n: (row[n] is None, row[n] in ("", [])),
        default=names[0],
    )


def as_messages(turns, name="prompt"):
    """Chat messages [{"role", "content", ...}]: a string is a user's turn, a list of parts is joined, None is empty text."""
    turns = [{"role": "user", "content": turns}] if isinstance(turns, str) else turns
    if not isinstance(turns, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) for m in turns
    ):
        raise BadRow(f'field "{name}" is no list of chat messages with a role each')
    text = lambda parts: "\n".join(
        p["text"] for p in parts if isinstance(p, dict) and isinstance(p.get("text"), str)
    )
    turns = [
        m
        | {
            "content": text(m["content"])
            if isinstance(m.get("content"), list)
            else m.get("content") or ""
        }
        for m in turns
    ]
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
        fail(
            f"data {path}: no usable row ({'; '.join(f'{len(w)} x {r}' for r, w in dropped.items()) or 'the file is empty'})."
        )


def load_table(path, normalize, limit=0):
    """Normal rows of a data set, all at once."""
    return list(normal_rows(read_rows(path, limit), normalize, path))

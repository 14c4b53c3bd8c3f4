"""Data sets: read any of them row by row, say what was dropped and why, deal out prompts.

A stage brings its own normalize(row, where), which turns a row of any known schema into the stage's
normal form or raises BadRow. `where` names the row in messages, like "out/toy/math.jsonl row 17".
"""

import csv
import io
import itertools
import json
import os
import re

from lib.common import print0
from lib.guard import fail, first_line
from lib.unread import ASKED, Watched, kind_of_field, may_be_ignored

FORMATS = (".jsonl", ".json", ".parquet", ".csv", ".jsonl.gz")


class BadRow(ValueError):
    """Raised by a stage's normalize: the row is dropped, and counted under this reason."""


# ---- Files of a data set -------------------------------------------------------------------------
def data_files(path):
    """Files or URLs of a data set.

    path: a file, a folder, a URL, or a hub id "owner/name:config@split"; commas join several.
    """
    formats = ", ".join(FORMATS)
    if "," in path:
        files = []
        for part in path.split(","):
            files += data_files(part)
        return files
    if os.path.isdir(path):
        files = files_below(path)
    elif os.path.exists(path) or "://" in path:
        if not path.endswith(FORMATS):
            fail(f"data {path}: expected a file that ends in {formats}.")
        files = [path]
    elif path.count("/") == 1 and not path.endswith(FORMATS):
        files = hub_files(path)
    else:
        fail(f"data {path}: no such file or folder, and not a hub id of the form owner/name.")
    if not files:
        fail(f"data {path}: no file that ends in {formats}.")
    return files


def files_below(folder):
    """Paths of the data files in a folder and its subfolders, sorted."""
    files = []
    for parent, _, names in os.walk(folder):
        files += [os.path.join(parent, name) for name in names if name.endswith(FORMATS)]
    return sorted(files)


def hub_files(path):
    """URLs of the data files of a hub id "owner/name:config@split".

    Without a config it is the one called "default", or all of them if none has that name. Without a
    split it is all training data; a held-out split is read only if it is named.
    """
    import datasets  # slow to import, and most runs read local files

    hub_id, _, wanted_split = path.partition("@")
    name, _, config = hub_id.partition(":")
    try:
        configs = datasets.get_dataset_config_names(name)
        if config:
            configs = [config]
        elif "default" in configs:
            configs = ["default"]
        # {split: files} of every config
        splits_of_configs = [
            datasets.load_dataset_builder(name, chosen).config.data_files or {}
            for chosen in configs
        ]
    except Exception as error:  # noqa: BLE001  whatever is wrong with a name or with the hub
        text = str(error).splitlines()[0] if str(error) else "no message"
        fail(f"data {path}: {type(error).__name__}: {text}.")

    files = []
    for splits in splits_of_configs:
        # Some sets have a split for each subject (chat, code, math) and none called "train".
        has_train = "train" in splits_of_configs[0]
        for split in splits:
            if wanted_split:
                wanted = split == wanted_split
            elif has_train:
                wanted = split == "train"
            else:
                wanted = not split.startswith(("val", "test", "dev"))
            if wanted:
                files += [str(f) for f in splits[split] if str(f).endswith(FORMATS)]
    return files


# ---- Rows of a file ------------------------------------------------------------------------------
def read_file(file, cursor=(0, 0, 0.0)):
    """Yield (where, row, cursor behind the row) of a file or URL, from a cursor on.

    A cursor is [rows read, bytes read, share of the file that is read]. Nothing is downloaded or
    unpacked ahead, and only what is being read is in memory (of a .json, the whole file).
    """
    import fsspec

    num_rows, offset, _ = cursor
    try:
        file_system, path = fsspec.core.url_to_fs(file)
        size = max(file_system.size(path) or 1, 1)
        compression = "gzip" if file.endswith(".gz") else None
        with file_system.open(path, "rb", compression=compression) as f:
            if file.endswith(".parquet"):
                for row, share in read_parquet(f, num_rows):
                    num_rows += 1
                    yield f"{file} row {num_rows}", row, [num_rows, 0, share]
                return

            if file.endswith(".csv"):
                for row, offset in read_csv(f, offset):
                    num_rows += 1
                    yield f"{file} row {num_rows}", row, [num_rows, offset, offset / size]
                return

            # From the start, wherever the cursor is: what is left of a file of lines could be one
            # JSON value by itself.
            if file.endswith(".json"):
                rows = read_json(f)
                if rows is not None:
                    for n, row in enumerate(rows, 1):
                        if n > num_rows:
                            yield f"{file} row {n}", row, [n, 0, n / len(rows)]
                    return

            # What is left are lines of JSON. fsspec's own readline would fetch a remote file almost
            # three times, hence the reader around it.
            f.seek(offset)
            for line in iter(io.BufferedReader(f, 1 << 20).readline, b""):
                num_rows += 1
                offset += len(line)
                if not line.strip():
                    continue
                if compression:
                    # `size` counts packed bytes and `offset` unpacked ones. This share grows with
                    # the offset and stays below 1; it only says that the file is not done.
                    share = 1 - size / (size + offset)
                else:
                    share = offset / size
                yield f"{file} row {num_rows}", json.loads(line), [num_rows, offset, share]
    # The errors of pyarrow are ValueErrors or OSErrors.
    except (ValueError, RecursionError, OSError, ImportError, csv.Error) as error:
        if isinstance(error, json.JSONDecodeError):
            text = f"not valid JSON ({error.msg} at column {error.colno})"
        else:
            text = f"{type(error).__name__}: {error}"
        fail(f"data {file} row {num_rows}: {text.splitlines()[0]}.")


def read_parquet(f, skip):
    """Yield (row, share of the file that is read) of an open parquet file, without `skip` rows."""
    import pyarrow.parquet

    table = pyarrow.parquet.ParquetFile(f)
    total = table.metadata.num_rows
    num_rows = 0
    for group in range(table.num_row_groups):
        rows_in_group = table.metadata.row_group(group).num_rows
        if num_rows + rows_in_group <= skip:
            # Nothing of this row group is wanted, so it is not even fetched.
            num_rows += rows_in_group
            continue
        for batch in table.iter_batches(64, row_groups=[group]):
            for row in batch.to_pylist():
                num_rows += 1
                if num_rows > skip:
                    yield row, num_rows / total


def read_csv(f, offset):
    """Yield ({column: text}, bytes read) of an open .csv file, from a number of bytes on.

    The first line names the columns. A quoted field may hold commas, quotes and line breaks.
    """
    reader = io.BufferedReader(f, 1 << 20)
    bytes_read = 0

    def lines():
        nonlocal bytes_read
        for line in iter(reader.readline, b""):
            encoding = "utf-8" if bytes_read else "utf-8-sig"  # a file may begin with a mark
            bytes_read += len(line)
            yield line.decode(encoding)

    csv.field_size_limit(1 << 30)  # the default of 128 KB is less than some fields have
    columns = next(csv.reader(lines(), strict=True), [])
    if offset:
        reader.seek(offset)
        bytes_read = offset
    for fields in csv.reader(lines(), strict=True):
        if not fields:
            continue  # an empty line
        if len(fields) != len(columns):
            raise ValueError(f"{len(fields)} fields, but the first line names {len(columns)}")
        yield dict(zip(columns, fields)), bytes_read


def read_json(f):
    """Rows of an open .json file: a list, or one object. None if it is not one JSON value.

    Some .json files hold a JSON value per line.
    """
    try:
        value = json.load(f)
    except ValueError:
        return None
    return value if isinstance(value, list) else [value]


def read_rows(path, limit=0):
    """[(where, row)] of a data set, file after file; the first `limit` rows if that is not 0."""
    rows = ((where, row) for file in data_files(path) for where, row, _ in read_file(file))
    return list(itertools.islice(rows, limit or None))


# ---- Streams over files --------------------------------------------------------------------------
def fresh_cursors(path):
    """{file: cursor at its start} for all files of a data set.

    A file may be named several times, to be seen more often. The second time it is called file#1,
    and both are read side by side.
    """
    cursors = {}
    times_named = {}
    for file in data_files(path):
        n = times_named.get(file, 0)
        times_named[file] = n + 1
        cursors[f"{file}#{n}" if n else file] = [0, 0, 0.0]
    return cursors


def stream_rows(cursors, limit=0):
    """Yield (where, row) from all files, always from the one of which the smallest share is read.

    So every stretch of the stream has the mix of the whole. The cursors {file: cursor} are moved
    along: going on from a copy of them gives the same rows as not having stopped.
    limit: end when so many rows are read, counted from the start of the files; 0 for no limit.
    """
    readers = {}
    for file, cursor in cursors.items():
        if cursor[2] < 1:
            name = re.sub(r"#\d+$", "", file)
            readers[file] = read_file(name, cursor)
    # One row of each file is read ahead, to know which row is the last one.
    ahead = {file: next(reader, None) for file, reader in readers.items()}
    for file, row_ahead in ahead.items():
        if row_ahead is None:
            cursors[file] = [*cursors[file][:2], 1.0]

    while True:
        open_files = [file for file in readers if cursors[file][2] < 1]
        rows_read = sum(num_rows for num_rows, _, _ in cursors.values())
        if not open_files or 0 < limit <= rows_read:
            return
        file = min(open_files, key=lambda name: cursors[name][2])
        where, row, cursor = ahead[file]
        ahead[file] = next(readers[file], None)
        if ahead[file] is None:
            # The share of a packed file never gets to 1 by itself.
            cursor = [*cursor[:2], 1.0]
        cursors[file] = cursor
        yield where, row


# ---- Fields of a row -----------------------------------------------------------------------------
def required_field(row, where, name, kind=str):
    """row[name], which must be of type `kind`, or of one of several types.

    A missing field or one of another type ends the run; null drops the row.
    """
    if name not in row:
        fail(f'data {where}: no "{name}" field (has: {", ".join(map(str, row))}).')
    value = row[name]
    if value is None:
        raise BadRow(f'field "{name}" is null')
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        expected = " or ".join(k.__name__ for k in kinds)
        fail(f'data {where}: field "{name}" is {type(value).__name__}, expected {expected}.')
    return value


def first_nonempty(row, *names):
    """The first of these names that has a value in the row.

    If none has, the first whose field is empty, else the first whose field is null, else the first.
    """
    present = [name for name in names if name in row]
    for name in present:
        if row[name] is not None and row[name] not in ("", []):
            return name
    for name in present:
        if row[name] is not None:
            return name
    return present[0] if present else names[0]


# ---- Normal rows ---------------------------------------------------------------------------------
def normal_rows(items, normalize, path, ignore_fields=None, kinds=ASKED, can_stop=True):
    """Yield normalize(row, where) of each (where, row); print at the end what was dropped and why.

    A run without a usable row ends here. path: the data set, for the messages.

    ignore_fields: fields that may stay unread although a row means something else without them,
    joined by commas. A row with another one (kinds: lib/unread.py) is dropped, and the run ends.
    All unread fields are printed. None: nobody asks.
    can_stop: if False, nothing ends the run. It is for rows that are read while a run trains.
    """
    total = 0
    dropped = {}  # reason -> where the rows are
    unread = {}  # name of a field -> where the rows are
    for where, raw in items:
        total += 1
        try:
            if isinstance(raw, BadRow):
                raise raw
            if not isinstance(raw, dict):
                raise ValueError(f"a row is {type(raw).__name__}, expected an object")
            row = Watched(raw)
            normal = normalize(row, where)
            check_text(normal)
            if ignore_fields is not None:
                names = row.unread()
                for name in names:
                    unread.setdefault(name, []).append(where)
                check_unread(names, ignore_fields, kinds)
        except BadRow as reason:
            dropped.setdefault(str(reason), []).append(where)
            continue
        except Exception as error:  # noqa: BLE001  a row of a shape that nobody thought of
            if can_stop:
                fail(f"data {where}: {first_line(error)}.")
            reason = f"it cannot be read ({type(error).__name__})"
            dropped.setdefault(reason, []).append(where)
            continue
        yield normal

    for reason, rows in sorted(dropped.items(), key=lambda item: -len(item[1])):
        print0(f"data {path}: dropped {len(rows)} of {total} rows, {reason} (first: {rows[0]})")
    say_unread(unread, total, path, ignore_fields, kinds, can_stop)
    if can_stop and total == sum(len(rows) for rows in dropped.values()):
        reasons = "; ".join(f"{len(rows)} x {reason}" for reason, rows in dropped.items())
        fail(f"data {path}: no usable row ({reasons or 'the file is empty'}).")


def check_text(value):
    """BadRow if a text in a normal row has half of a surrogate pair, which no tokenizer encodes."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise BadRow("a text with half of a surrogate pair")
    elif isinstance(value, dict):
        for item in value.values():
            check_text(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            check_text(item)


def check_unread(names, ignore_fields, kinds):
    """BadRow if one of these fields, which nobody looked at, changes what the row means."""
    for name in sorted(names):
        kind = kind_of_field(name, kinds)
        if kind and not may_be_ignored(name, ignore_fields):
            raise BadRow(f'"{name}" is not read, {kind} by its name')


def say_unread(unread, total, path, ignore_fields, kinds, can_stop):
    """Print which fields nobody looked at, {name: where}. One that matters ends the run."""
    most_first = sorted(unread.items(), key=lambda item: (-len(item[1]), item[0]))
    if most_first:
        shares = [f"{name} in {len(rows)} of {total} rows" for name, rows in most_first[:20]]
        more = f" and {len(most_first) - 20} more" if len(most_first) > 20 else ""
        print0(f"data {path}: not read: {', '.join(shares)}{more}")
    for name, rows in most_first:
        kind = kind_of_field(name, kinds)
        if can_stop and kind and not may_be_ignored(name, ignore_fields):
            fail(
                f"data {path}: {name}, {kind} by its name, is in {len(rows)} of {total} rows "
                f"(first: {rows[0]}) and nobody reads it. --ignore_fields={name} allows that."
            )


def load_table(path, normalize, limit=0, ignore_fields=None, kinds=ASKED):
    """Normal rows of a data set, all at once; of its first `limit` rows if that is not 0.

    ignore_fields and kinds are explained at normal_rows.
    """
    return list(normal_rows(read_rows(path, limit), normalize, path, ignore_fields, kinds))

"""Data sets: read any of them row by row, say what was dropped and why, deal out prompts.

A stage brings its own normalize(row, where), which turns a row of any known schema into the stage's
normal form or raises BadRow. `where` names the row in messages, like "out/toy/math.jsonl row 17".

The `datasets` library finds the files of a hub's set and reads arrow files. The other formats are
read here. A row that is no JSON is named by file and line, or dropped alone while a run trains,
where the library ends without naming it. A text such as 007 or NA in a .csv stays a text. Files of
all formats are mixed by their sizes under one cursor, from which a resumed run reads on.
"""

import csv
import io
import itertools
import json
import os
import re

from lib.common import print0
from lib.guard import fail, first_line
from lib.progress import progress
from lib.unread import ASKED, Watched, kind_of_field, may_be_ignored

FORMATS = (".jsonl", ".json", ".parquet", ".csv", ".jsonl.gz", ".arrow")
# What save_to_disk of `datasets` writes beside its .arrow files.
ARROW_NOTES = ("dataset_info.json", "dataset_dict.json", "state.json")


class BadRow(ValueError):
    """Raised by a stage's normalize: the row is dropped, and counted under its first argument."""


# ---- Files of a data set -------------------------------------------------------------------------
def data_files(path):
    """Files or URLs of a data set.

    path: a file, a folder, a URL, or a hub id "owner/name:config@split"; commas join several. A
    folder that save_to_disk wrote with splits may also have "@split" behind it.
    """
    formats = ", ".join(FORMATS)
    parts = split_at_commas(path)
    if len(parts) > 1:
        files = []
        for part in parts:
            files += data_files(part)
        return files
    folder, _, split = path.rpartition("@")
    if os.path.isdir(path):
        files = files_below(path, "")
    elif os.path.exists(os.path.join(folder, "dataset_dict.json")):
        files = files_below(folder, split)
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


def split_at_commas(path):
    """The sets that commas join. A comma inside the name of a file or folder separates nothing."""
    words = path.split(",")
    sets = []
    while words:
        # The longest run of words that is a path as it stands, else one word.
        for end in range(len(words), 0, -1):
            joined = ",".join(words[:end])
            if end == 1 or os.path.exists(joined):
                sets.append(joined)
                del words[:end]
                break
    return sets


def files_below(folder, split):
    """Paths of the data files in a folder and its subfolders, sorted; of one split if it is named.

    Hidden files are left out. Where save_to_disk wrote several splits, those of training are read.
    """
    if os.path.exists(os.path.join(folder, "dataset_dict.json")):
        names = sorted(name for name in os.listdir(folder) if os.path.isdir(f"{folder}/{name}"))
        chosen = [name for name in names if is_wanted(name, split, "train" in names)]
        return [file for name in chosen for file in files_below(os.path.join(folder, name), "")]
    files = []
    for parent, _, names in os.walk(folder):
        for name in names:
            if name.endswith(FORMATS) and name not in ARROW_NOTES and not name.startswith("."):
                files.append(os.path.join(parent, name))
    return sorted(files)


def is_wanted(split, wanted_split, has_train):
    """Whether a split is read: the one that is named, or else all training data.

    Some sets have a split for each subject (chat, code, math) and none called "train". A held-out
    split is read only if it is named.
    """
    if wanted_split:
        return split == wanted_split
    if has_train:
        return split == "train"
    return not split.startswith(("val", "test", "dev"))


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
    has_train = "train" in splits_of_configs[0]
    for splits in splits_of_configs:
        for split in splits:
            if is_wanted(split, wanted_split, has_train):
                files += [str(f) for f in splits[split] if str(f).endswith(FORMATS)]
    return files


def cache_folder(path, out_dir):
    """Where results about a data set are kept: beside its first file if that folder can be written
    to, else in out_dir."""
    first = os.path.abspath(split_at_commas(path)[0])
    folder = first if os.path.isdir(first) else os.path.dirname(first)
    is_local = os.path.exists(first) and os.access(folder, os.W_OK)
    return folder if is_local else out_dir


# ---- Rows of a file ------------------------------------------------------------------------------
def read_file(file, cursor=(0, 0, 0.0)):
    """Yield (where, row, cursor behind the row) of a file or URL, from a cursor on.

    A cursor is [rows read, bytes read, share of the file that is read]. Nothing is downloaded or
    unpacked ahead, and only what is being read is in memory (of a .json, the whole file). A line
    that is no JSON comes as a BadRow, so that its readers decide whether it ends the run.
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

            if file.endswith(".arrow"):
                for row, share in read_arrow(path, num_rows):
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
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    row = BadRow("not valid JSON", f"{error.msg} at column {error.colno}")
                except (ValueError, RecursionError) as error:
                    row = BadRow("not valid JSON", first_line(error))
                yield f"{file} row {num_rows}", row, [num_rows, offset, share]
    # The errors of pyarrow are ValueErrors or OSErrors.
    except (ValueError, RecursionError, OSError, ImportError, csv.Error) as error:
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


def read_arrow(path, skip):
    """Yield (row, share of the file that is read) of a local .arrow file, without `skip` rows."""
    import datasets  # slow to import, and few sets are kept so

    table = datasets.Dataset.from_file(path).with_format("arrow")
    for start in range(skip, len(table), 64):
        for n, row in enumerate(table[start : start + 64].to_pylist(), start + 1):
            yield row, n / len(table)


def read_csv(f, offset):
    """Yield ({column: text}, bytes read) of an open .csv file, from a number of bytes on.

    The first line names the columns. A quoted field may hold commas, quotes and line breaks. A row
    of more or fewer fields is a BadRow.
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
        row = dict(zip(columns, fields))
        if len(fields) != len(columns):
            detail = f"{len(fields)} fields, but the first line names {len(columns)}"
            row = BadRow("not a row of the table", detail)
        yield row, bytes_read


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
    """[(where, row)] of a data set, file after file; the first `limit` rows if that is not 0.

    A line that is no JSON ends the run.
    """
    return list(itertools.islice(iterate_rows(path), limit or None))


def iterate_rows(path):
    """Yield (where, row) of a data set, file after file. A line that is no JSON ends the run."""
    for file in data_files(path):
        for where, row, _ in read_file(file):
            if isinstance(row, BadRow):
                refuse(where, row)
            yield where, row


def refuse(where, bad_row):
    """End the run because of a row that cannot be read."""
    reason, detail = bad_row.args
    fail(f"data {where}: {reason} ({detail}).")


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
                if can_stop:
                    refuse(where, raw)
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
            dropped.setdefault(reason.args[0], []).append(where)
            continue
        except Exception as error:  # noqa: BLE001  a row of a shape that nobody thought of
            if can_stop:
                fail(f"data {where}: {first_line(error)}.")
            reason = f"it cannot be read ({type(error).__name__})"
            dropped.setdefault(reason, []).append(where)
            continue
        yield normal

    say_dropped(dropped, total, path)
    say_unread(unread, total, path, ignore_fields, kinds, can_stop)
    if can_stop and total == sum(len(rows) for rows in dropped.values()):
        reasons = "; ".join(f"{len(rows)} x {reason}" for reason, rows in dropped.items())
        fail(f"data {path}: no usable row ({reasons or 'the file is empty'}).")


def say_dropped(dropped, total, path):
    """Print how many of the rows were dropped for each reason: {reason: where the rows are}."""
    for reason, rows in sorted(dropped.items(), key=lambda item: -len(item[1])):
        print0(f"data {path}: dropped {len(rows)} of {total} rows, {reason} (first: {rows[0]})")


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
    items = progress(read_rows(path, limit), "rows")
    return list(normal_rows(items, normalize, path, ignore_fields, kinds))


def one_row_each(rows, path):
    """One row of each problem: DAPO repeats its problems. Copies with other answers are said.

    The most frequent answer of a problem counts. Where two are equally frequent, none does.
    """
    rows_of = {}  # problem -> answer -> its rows
    for row in rows:
        answers = rows_of.setdefault(row["messages"][0]["content"], {})
        answers.setdefault(row["answer"], []).append(row)
    kept, num_contradicted, num_unclear = [], 0, 0
    for answers in rows_of.values():
        copies = sorted(answers.values(), key=len, reverse=True)
        num_contradicted += len(copies) > 1
        if len(copies) > 1 and len(copies[0]) == len(copies[1]):
            num_unclear += 1
        else:
            kept.append(copies[0][-1])
    if len(rows_of) < len(rows):
        print0(f"data {path}: dropped {len(rows) - len(rows_of)} repeated problems")
    if num_contradicted:
        print0(
            f"data {path}: {num_contradicted} problems have different answers; "
            f"{num_unclear} without a most frequent one are dropped"
        )
    return kept

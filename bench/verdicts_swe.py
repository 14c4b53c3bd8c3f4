"""Tries the verdicts of SWE RL on real commits: is the golden change paid, however it is written?

    python bench/verdicts_swe.py --repos=.,../click --limit=120

Each commit is a row: its files before it, and its `git diff` as the golden patch. The numbers go to
bench/verdicts_swe.json.
"""

import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import swerl  # noqa: E402
from lib.flags import parse_config  # noqa: E402
from verifiers import patches  # noqa: E402

KINDS = ("*.py", "*.md", "*.sh", "*.toml", "*.cfg", "*.js")
THOUGHT = "<think>\nHere.\n</think>\n"


@dataclass
class Config:
    repos: str = "."  # git folders, separated by commas
    limit: int = 120  # commits of each folder, drawn at random
    max_chars: int = 60000  # larger diffs are left out


def git(repo, *arguments):
    done = subprocess.run(["git", "-C", repo, *arguments], capture_output=True, check=False)
    return done.stdout.decode("utf-8", "replace")


def read_commit(repo, commit):
    """Return ({path: text} before, the same after, golden patch) of a commit."""
    between = (f"{commit}~1", commit, "--", *KINDS)
    patch = git(repo, "diff", "-M", "-C", "--find-copies-harder", *between)
    before, after = {}, {}
    for line in git(repo, "diff", "--no-renames", "--name-status", *between).splitlines():
        status, path = line.split("\t")
        if status != "A":
            before[path] = git(repo, "show", f"{commit}~1:{path}")
        after[path] = "" if status == "D" else git(repo, "show", f"{commit}:{path}")
    # The source of a copy does not change, so it is not in the list.
    for path in re.findall(r"^copy from (.*)$", patch, re.M):
        before.setdefault(path, git(repo, "show", f"{commit}~1:{path}"))
    return before, after, patch


def hunks_as_blocks(patch):
    """Return a response with one SEARCH/REPLACE block for each hunk of a patch."""
    blocks = []
    for part in re.split(r"^(?=diff --git )", patch, flags=re.M):
        old_path = re.search(r"^--- a/(.*)$", part, re.M)
        path = re.search(r"^\+\+\+ b/(.*)$", part, re.M) or old_path
        for hunk in re.split(r"^(?=@@ )", part, flags=re.M)[1:]:
            lines = [line for line in hunk.rstrip("\n").split("\n")[1:] if line[:1] != "\\"]
            old = "\n".join(line[1:] for line in lines if line[:1] != "+")
            new = "\n".join(line[1:] for line in lines if line[:1] != "-")
            blocks.append(patches.BLOCK.format(path=path[1], old=old, new=new))
    return THOUGHT + "\n".join(blocks)


def try_row(before, after, patch, counts):
    """Count what the golden change earns in several forms. Returns the seconds of a verdict."""
    counts["rows"] += 1
    try:
        oracle = patches.apply_patch(patch, before)
    except patches.NoPatch as error:
        counts[f"not loaded: {error}"] += 1
        return 0.0
    counts["as git says"] += not patches.changes({**before, **after}, oracle)
    try:
        patches.apply_patch(patch.strip(), before)
        counts["loaded without the patch's last blanks"] += 1
    except patches.NoPatch:
        pass
    responses = {
        "whole files": patches.as_response(before, oracle),
        "a block a hunk": hunks_as_blocks(patch),
        "nothing": THOUGHT + "It is fixed.",
    }
    start = time.process_time()
    for name, response in responses.items():
        value, reason = swerl.verdict(response, before, patch)
        counts[f"{name}: paid 1" if value == 1 else f"{name}: {value:.0f} {reason}"] += 1
    return (time.process_time() - start) / len(responses)


def main(cfg):
    counts = Counter()
    seconds = 0.0
    for repo in cfg.repos.split(","):
        commits = git(repo, "log", "--no-merges", "--format=%H").split()[:-1]
        random.Random(0).shuffle(commits)
        for commit in commits[: cfg.limit]:
            before, after, patch = read_commit(repo, commit)
            if patch and len(patch) <= cfg.max_chars:
                seconds += try_row(before, after, patch, counts)
    result = dict(sorted(counts.items()))
    result["CPU seconds of a verdict"] = round(seconds / max(counts["rows"], 1), 4)
    print(json.dumps(result, indent=1))
    (ROOT / "bench/verdicts_swe.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(parse_config(Config))

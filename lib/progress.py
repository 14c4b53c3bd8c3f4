"""No silent minute: a bar on a terminal, and a line a minute wherever nothing else is printed.

    mathrl.py: step 7, rollout: 3 min so far, 512 of 1024 done, about 3 min left

The line comes from the thread that watches the run (lib/guard.py). It knows the phase of the main
thread, so that loading, update, saving and syncing need no code of their own.
"""

import contextlib
import os
import sys
import time

from tqdm import tqdm

# A log that was silent for so many seconds gets a line.
SILENCE_S = 60

# When something was last printed, and the counts that are under way, the innermost last.
last_printed = {"at": time.monotonic()}
under_way = []


def printed():
    """Note that a line has just been printed."""
    last_printed["at"] = time.monotonic()


def span(seconds):
    """Write a time in the unit that suits it: 45 s, 12.5 min, 3.2 h."""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    if seconds >= 90:
        return f"{seconds / 60:.1f} min"
    return f"{seconds:.0f} s"


def count_under_way():
    """The innermost Count that is under way, or None. For other threads: the main thread may end it
    at any instant."""
    counts = list(under_way)
    return counts[-1] if counts else None


class Count:
    """How much of a long piece of work is done: `done` of `total` (0: not known)."""

    def __init__(self, what, total=0):
        self.done, self.total, self.began = 0, total, time.monotonic()
        self.note = ""
        # Rank 0 alone draws. tqdm decides by itself (None) whether there is a terminal.
        hidden = None if os.environ.get("RANK", "0") == "0" else True
        self.bar = tqdm(desc=what, total=total or None, leave=False, disable=hidden)

    def add(self, note=""):
        """One more is done. note: what the bar shows behind its numbers, like a running score."""
        self.done += 1
        self.note = note or self.note
        self.bar.set_postfix_str(self.note, refresh=False)
        self.bar.update()

    def describe(self):
        """ ", 512 of 1024 done, about 3 min left" for the line a minute."""
        note = f", {self.note}" if self.note else ""
        if not self.total:
            return f", {self.done} done{note}"
        text = f", {self.done} of {self.total} done{note}"
        if 0 < self.done < self.total:
            seconds = time.monotonic() - self.began
            text += f", about {span(seconds / self.done * (self.total - self.done))} left"
        return text


@contextlib.contextmanager
def counting(what, total=0):
    """A Count that is under way inside the block."""
    count = Count(what, total)
    under_way.append(count)
    try:
        yield count
    finally:
        under_way.remove(count)
        count.bar.close()


def progress(items, what, total=0):
    """Yield the items of a loop, and count them."""
    with counting(what, total or (len(items) if hasattr(items, "__len__") else 0)) as count:
        for item in items:
            yield item
            count.add()


@contextlib.contextmanager
def counted(function, what, total):
    """A function that calls `function` and counts one more: the on_finished of engine.generate."""
    with counting(what, total) as count:

        def call_and_count(argument):
            function(argument)
            count.add()

        yield call_and_count


def break_silence(position, seconds):
    """Print a line on rank 0 if nothing was printed for a minute and no bar is on the screen.

    position: where the main thread is, like "step 7, rollout"; seconds: since when.
    """
    if os.environ.get("RANK", "0") != "0" or time.monotonic() - last_printed["at"] < SILENCE_S:
        return
    count = count_under_way()
    if count and not count.bar.disable:
        return
    printed()
    script = os.path.basename(sys.argv[0])
    described = count.describe() if count else ""
    where = position.removeprefix("start, ")
    print(f"{script}: {where}: {span(seconds)} so far{described}", flush=True)

"""How far a long job is: a bar on a terminal, elsewhere (a log file, a pipe) a line a minute.

    with progress("paths", total=64_000, unit="tok") as bar:
        bar.update(64)

    paths: 12,345 of 64,000 tok (19%), 205 tok/s, 4.2 min left

Both go to stderr, from the first process only. What a job prints beside them goes through `say`,
which keeps a bar whole.
"""
import contextlib
import sys
import threading
import time

from huggingface_hub.utils import tqdm

from plumbing import processes

EVERY = 60.0  # seconds between two lines

say = tqdm.write


def progress(name, total, unit, done=0):
    """A bar or lines that count `total` units, of which `done` are there: a context with `total`
    (it may be set), `update(units)` and `set_postfix_str(text)`, as tqdm has them."""
    if not processes.is_first():
        return tqdm(disable=True, total=total, initial=done)
    if sys.stderr.isatty():
        return tqdm(desc=name, total=total, initial=done, unit=unit, unit_scale=unit == "tok")
    return Lines(name, total, unit, done)


class Lines:
    """What stands for a bar where there is no terminal. A thread writes the lines: one step of a
    large model may take minutes, and the log is to say that it is at work."""

    def __init__(self, name, total, unit, done=0, clock=time.monotonic):
        self.name = name
        self.total = total
        self.unit = unit
        self.n = done
        self.begun_with = done
        self.postfix = ""
        self.clock = clock
        self.start = clock()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.tell, args=(self.ended.wait,), daemon=True)

    def update(self, units=1):
        self.n += units

    def set_postfix_str(self, text, refresh=True):
        """What else the lines say, from the next one on."""
        self.postfix = f", {text}"

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        self.thread.join()
        if self.clock() - self.start >= EVERY:
            write(self.line())

    def tell(self, wait):
        """Write a line each time that wait(seconds) returns, until it returns True."""
        while not wait(EVERY):
            write(self.line())

    def line(self):
        """The job as it stands."""
        seconds = self.clock() - self.start
        rate = (self.n - self.begun_with) / seconds if seconds > 0 else 0.0
        share = f" ({self.n / self.total:.0%})" if self.total else ""
        text = f"{self.name}: {self.n:,.0f} of {self.total:,.0f} {self.unit}{share}, "
        text += f"{shown_rate(rate, self.unit)}, "
        if self.n >= self.total:
            text += f"{shown_time(seconds)} in all"
        elif rate == 0:
            text += "time left not known yet"
        else:
            text += f"{shown_time((self.total - self.n) / rate)} left"
        return text + self.postfix


def write(line):
    """Write a line to stderr. Nobody may be there to read it: that ends no job."""
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


def shown_rate(rate, unit):
    """Units a second or, where they are slow, seconds a unit."""
    if 0 < rate < 0.1:
        return f"{shown_time(1 / rate)} a {unit}"
    return f"{rate:,.0f} {unit}/s" if rate >= 10 else f"{rate:.1f} {unit}/s"


def shown_time(seconds):
    """Seconds in s, min or h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"

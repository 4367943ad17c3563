"""Kills and full disks, placed, not timed: a run dies at its i-th touch of the disk (an open, a
write cut in its middle, a sync, a rename, a truncation, a removal, a new folder), is
started again, and must leave the same bytes as a run that nobody disturbed."""
import builtins
import errno
import os
import random

import hostile
import pytest
from helpers import Killed

TOUCHES = ("replace", "unlink", "truncate", "fsync", "mkdir")
TAKE_ROOM = ("replace", "fsync")  # those that a full disk refuses


class Disk:
    """Counts the touches of files below `folder`. Number `last` is cut short: by a kill, after
    which nothing is done that handlers would still do, or, if `full`, by an error."""

    def __init__(self, folder, last=None, full=False):
        self.folder = str(folder)
        self.last = last
        self.full = full
        self.touches = 0
        self.dead = False

    def touch(self, before=None):
        """Count a touch; the last one does no more than `before()`."""
        if self.dead:
            raise Killed
        self.touches += 1
        if self.touches != self.last:
            return
        if before is not None:
            before()
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.dead = True
        raise Killed

    def install(self, monkeypatch):
        monkeypatch.setattr(builtins, "open", self.opening(builtins.open))
        for name in TAKE_ROOM if self.full else TOUCHES:
            monkeypatch.setattr(os, name, self.touching(getattr(os, name)))

    def is_ours(self, file):
        return isinstance(file, int) or str(file).startswith(self.folder)

    def touching(self, function):
        def wrapped(file, *args, **kwargs):
            if self.is_ours(file):
                self.touch()
            return function(file, *args, **kwargs)
        return wrapped

    def opening(self, function):
        def wrapped(file, mode="r", *args, **kwargs):
            if mode[0] == "r" or not self.is_ours(file):
                return function(file, mode, *args, **kwargs)
            self.touch()
            opened = function(file, mode, *args, **kwargs)
            return Writer(opened, self)
        return wrapped


class Writer:
    """An open file whose last write is cut in its middle."""

    def __init__(self, file, disk):
        self.file = file
        self.disk = disk

    def write(self, content):
        def write_half():
            self.file.write(content[:len(content) // 2])
            self.file.flush()

        self.disk.touch(write_half)
        return self.file.write(content)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return hostile.write_world(tmp_path_factory.mktemp("kills") / "it")


def words_for(script, out):
    """The flags that send a run's files to the folder `out`."""
    if script == "score":
        return ["--out", str(out / "scored.jsonl"), "--trace", str(out / "traces")]
    return ["--out", str(out)]


def files_of(folder):
    """{name: content} of every file in a folder; of a report without the state of the checkout."""
    found = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            found[str(file.relative_to(folder))] = file.read_bytes()
    if "report.json" in found:
        lines = found["report.json"].splitlines()
        found["report.json"] = [line for line in lines if b'"commit"' not in line]
    return found


@pytest.fixture
def start(world, tmp_path):
    """A function that runs a script in one folder, where touch `last` is cut short -> its Disk,
    exit status (None: killed) and stderr."""
    out = tmp_path / "out"

    def run(script, last=None, full=False):
        out.mkdir(exist_ok=True)
        disk = Disk(out, last, full)
        status = None
        err = ""
        with pytest.MonkeyPatch.context() as patch:
            disk.install(patch)
            try:
                status, _, err = hostile.run(script, world, *words_for(script, out))
            except Killed:
                pass
        return disk, status, err

    run.out = out
    return run


def empty(folder):
    for file in sorted(folder.rglob("*"), reverse=True):
        if file.is_dir():
            file.rmdir()
        else:
            file.unlink()


@pytest.mark.parametrize("script, at_least, share", (
    ("train", 60, 0.6), ("eval", 10, 1.0), ("score", 30, 1.0)))
def test_a_run_killed_at_any_touch_of_the_disk_goes_on_to_the_same_bytes(
        start, script, at_least, share):
    """Every third one is killed again, at a touch of the run that goes on."""
    touches = start(script)[0].touches
    expected = files_of(start.out)
    assert touches >= at_least
    draw = random.Random(0)
    places = [place for place in range(1, touches + 1) if draw.random() < share]
    for place in places:
        empty(start.out)
        _, status, _ = start(script, place)
        assert status is None
        if place % 3 == 0:
            start(script, draw.randrange(1, touches))
        _, status, err = start(script)
        assert status == 0, err
        assert files_of(start.out) == expected, f"killed at touch {place} of {touches}"


def test_a_kill_leaves_a_lock_and_half_a_file_which_the_next_run_removes(start):
    """So the kills above are real ones: no handler has tidied up."""
    left = set()
    touches = start("eval")[0].touches
    for place in range(1, touches + 1):
        empty(start.out)
        start("eval", place)
        left |= {file.suffix or file.name for file in start.out.iterdir()}
    assert {".tmp", "lock"} <= left
    start("eval")
    assert {file.suffix for file in start.out.iterdir()} == {".json", ".jsonl"}


@pytest.mark.parametrize("script, share", (("train", 0.2), ("eval", 0.7), ("score", 0.3)))
def test_a_disk_that_is_full_at_any_touch_is_one_line_and_the_run_goes_on(start, script, share):
    touches = start(script, full=True)[0].touches
    expected = files_of(start.out)
    draw = random.Random(1)
    for place in range(1, touches + 1):
        if draw.random() > share:
            continue
        empty(start.out)
        _, status, err = start(script, place, full=True)
        (line,) = err.splitlines()
        assert status == 2 and "No space left" in line, line
        _, status, err = start(script)
        assert status == 0, err
        assert files_of(start.out) == expected, f"full at touch {place} of {touches}"
